"""tools/check_dataset.py finds every kind of fault, names where it is, counts and draws."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from check_dataset import draw_samples
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from dimaskdino.config import Config
from dimaskdino.data import register_all
from dimaskdino.data.datasets.registration import register_coco_format
from dimaskdino.data.validation.files import Inspection, inspect_dataset
from dimaskdino.data.validation.report import Finding, problem_table
from dimaskdino.errors import DatasetError
from tests.data_pipeline.conftest import HEIGHT, WIDTH, Json
from tests.data_pipeline.scripts import run_script
from tests.data_pipeline.test_rules import SOUND
from tests.data_pipeline.test_start import turn

pytestmark = pytest.mark.usefixtures("registrations")

Write = Callable[[Json], tuple[Path, Path]]
Change = Callable[[Json, Path], Any]


@pytest.fixture
def inspect(coco: Json, write_coco: Write) -> Callable[..., Inspection]:
    """Change the sound dataset of the fixture ``coco``, write it as "mine" and inspect it."""

    def inspect_changed(change: Change = lambda coco, images: None, **options: Any) -> Inspection:
        json_file, image_root = write_coco(coco)
        change(coco, image_root)
        json_file.write_text(json.dumps(coco))
        register_coco_format("mine", json_file, image_root, ["ball", "box"])
        return inspect_dataset("mine", **options)

    return inspect_changed


def annotation(coco: Json) -> Json:
    return coco["annotations"][0]


def test_sound_dataset_has_no_problem(inspect: Callable[..., Inspection]) -> None:
    assert inspect().findings == []
    assert inspect(lambda coco, _: annotation(coco).pop("segmentation")).findings == []


DAMAGES: dict[str, tuple[Change, str, str]] = {
    "missing image": (lambda _, images: (images / "two.png").unlink(), "image cannot be used", "two.png does not"),
    "not an image": (lambda _, images: (images / "two.png").write_bytes(b"?"), "image cannot be used", "two.png"),
    "cut image": (
        lambda _, images: (images / "two.png").write_bytes((images / "one.png").read_bytes()[:-30]),
        "image cannot be used",
        "two.png",
    ),
    "16 bits": (
        lambda _, images: Image.new("I;16", (WIDTH, HEIGHT)).save(images / "two.png"),
        "image cannot be used",
        "convert it to 8 bits",
    ),
    "other size": (
        lambda _, images: Image.new("RGB", (HEIGHT, WIDTH)).save(images / "two.png"),
        "image has another size than listed",
        "two.png: 6x8 (width x height), listed as 8x6",
    ),
    "image twice": (
        lambda coco, _: coco["images"].append({**coco["images"][1], "id": 3, "file_name": "./two.png"}),
        "image file_name: listed more than once",
        "two.png",
    ),
    "image id twice": (
        lambda coco, _: coco["images"][1].update(id=1),
        "image id: used more than once",
        "image id 1 of one.png and two.png",
    ),
    "category id twice": (
        lambda coco, _: coco["categories"].append({"id": 7, "name": "cone"}),
        "category id: used more than once",
        "category id 7",
    ),
    "other categories": (
        lambda coco, _: coco["categories"][0].update(name="sphere"),
        "categories: not the registered classes",
        "class 0 is 'sphere', registered as 'ball'",
    ),
    "no such image": (
        lambda coco, _: annotation(coco).update(image_id=9),
        "image_id: not among the file's images",
        "annotation 11 of image id 9",
    ),
    "annotation id twice": (
        lambda coco, _: coco["annotations"].append({**annotation(coco), "image_id": 2}),
        "annotation id: used more than once",
        "annotation 11",
    ),
    "object twice": (
        lambda coco, _: coco["annotations"].append({**annotation(coco), "id": 12}),
        "object: annotated more than once",
        "annotation 12 of one.png",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_fault_is_named_with_its_place(inspect: Callable[..., Inspection], damage: str) -> None:
    change, kind, where = DAMAGES[damage]
    places = [finding.where for finding in inspect(change).findings if finding.kind == kind]
    assert any(where in place for place in places)


def test_classes_are_counted_by_outcome(inspect: Callable[..., Inspection], coco: Json) -> None:
    coco["annotations"] += [
        {**SOUND, "id": 12, "image_id": 1, "iscrowd": 1},
        {**SOUND, "id": 13, "image_id": 1, "iscrowd": 1, "ignored": 1, "category_id": 3},
        {**SOUND, "id": 14, "image_id": 2, "segmentation": [[1, 1, 4, 1, 2, 1]]},
    ]
    inspection = inspect()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in inspection.counts.table().splitlines()]
    assert lines[0] == ["class", "kept", "crowd", "ignored", "no pixel", "images"]
    assert lines[2:] == [
        ["ball", "0", "0", "1", "0", "1"],
        ["box", "1", "1", "0", "1", "2"],
        ["all", "1", "1", "1", "1", "2"],
    ]
    assert Finding("class: all of its annotations are crowd regions", "class 'ball'") in inspection.findings


def test_many_classes_are_counted_side_by_side(inspect: Callable[..., Inspection], coco: Json) -> None:
    coco["categories"] = [{"id": number, "name": f"class{number}"} for number in range(29)]
    table = inspect().counts.table().splitlines()
    assert len(table) == 2 + 30 / 3
    assert all(sum(f"class{number} " in line for line in table) == 1 for number in range(29))


def test_problems_are_counted_by_kind_with_the_first_place() -> None:
    table = problem_table([Finding("rare", "a.png"), Finding("often", "b " * 500), Finding("often", "c.png")])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["often", "2"], ["rare", "1"]]
    assert rows[0][2].startswith("b b")
    assert max(map(len, table.splitlines())) < 300


def test_dataset_of_a_function_is_inspected(tmp_path: Path) -> None:
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "one.png")
    found = {"category_id": 1, "segmentation": [[1, 1, 40, 1, 40, 3, 1, 3]], "bbox": [1, 1, 4, 3], "bbox_mode": 0}
    entry = {"file_name": str(tmp_path / "one.png"), "image_id": 1, "annotations": [found]}
    DatasetCatalog.register("function", lambda: [entry])
    MetadataCatalog.get("function").thing_classes = ["ball", "box"]
    kinds = {finding.kind for finding in inspect_dataset("function").findings}
    assert kinds == {"size: missing", "mask: leaves the image", "box: is not its mask's extent"}


@pytest.mark.parametrize(
    ("orientation", "label", "fits"),
    [
        (6, [1, 1, 8, 1, 8, 3, 1, 3], "1 fit only the pixels as stored"),
        (8, [1, 1, 4, 1, 4, 8, 1, 8], "1 fit only the upright photo"),
        (6, [1, 1, 4, 1, 4, 3, 1, 3], "1 fit both"),
        (3, [1, 1, 7, 1, 7, 3, 1, 3], "1 fit both"),
    ],
)
def test_labels_tell_whether_exif_applies(inspect, coco, orientation, label, fits):
    annotation(coco)["segmentation"] = [label]
    inspection = inspect(lambda _, images: turn(images / "one.png", orientation))
    assert fits in inspection.exif
    assert "INPUT.APPLY_EXIF" in inspection.exif
    assert "one.png" in inspection.exif
    sizes = [finding for finding in inspection.findings if finding.kind == "image has another size than listed"]
    assert len(sizes) == (orientation >= 5)
    assert inspect(lambda _, images: turn(images / "one.png", 1)).exif == ""
    kinds = {
        finding.kind for finding in inspect(lambda _, images: turn(images / "one.png", 6), apply_exif=False).findings
    }
    assert "image has another size than listed" not in kinds


@pytest.fixture
def shapes(cfg: Config) -> Config:
    """shapes_val registered with two pictures of 64 x 64 pixels."""
    register_all(cfg=cfg)
    return cfg


def test_synthetic_dataset_is_sound_and_drawn_with_its_objects(shapes: Config, tmp_path: Path) -> None:
    inspection = inspect_dataset("shapes_val")
    assert inspection.findings == []
    paths = draw_samples(inspection.dataset, 5, tmp_path / "drawn")
    annotated = [Path(picture.path) for picture in inspection.dataset.pictures if picture.annotations]
    assert [path.name for path in paths] == [path.name for path in annotated]
    for path, source in zip(paths, annotated, strict=True):
        drawn = np.asarray(Image.open(path).convert("RGB")).astype(int)
        original = Image.open(source).resize(drawn.shape[1::-1], Image.Resampling.NEAREST)
        changed = np.abs(drawn - np.asarray(original).astype(int)).max(axis=2) > 20
        assert min(drawn.shape[:2]) == 512
        assert 0.05 < changed.mean() < 0.95


def test_unusable_masks_boxes_and_images_do_not_stop_the_drawing(inspect, tmp_path):
    def damage(coco: Json, images: Path) -> None:
        coco["annotations"] += [
            {**SOUND, "id": 12, "image_id": 1, "segmentation": [[1, 1]], "bbox": None},
            {**SOUND, "id": 13, "image_id": 2},
            {**SOUND, "id": 14, "image_id": 1, "category_id": 99},
        ]
        (images / "two.png").unlink()

    inspection = inspect(damage)
    assert [path.name for path in draw_samples(inspection.dataset, 9, tmp_path / "drawn")] == ["one.png"]


def test_images_of_one_stem_get_files_of_their_own(coco: Json, write_coco: Write, tmp_path: Path) -> None:
    json_file, image_root = write_coco(coco)
    names = ["a/0.jpg", "b/0.jpg", "0.png", "0_2.png"]
    for number, name in enumerate(names):
        (image_root / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), (60 * number, 0, 0)).save(image_root / name)
    coco["images"] = [{**coco["images"][0], "id": number, "file_name": name} for number, name in enumerate(names)]
    coco["annotations"] = [{**SOUND, "id": number, "image_id": number} for number in range(4)]
    json_file.write_text(json.dumps(coco))
    register_coco_format("mine", json_file, image_root, ["ball", "box"])
    paths = draw_samples(inspect_dataset("mine").dataset, 9, tmp_path / "drawn")
    assert [path.name for path in paths] == ["0.png", "0_2.png", "0_3.png", "0_2_2.png"]
    # The corner that no object covers tells which image a picture shows.
    corners = [Image.open(path).convert("RGB").getpixel((500, 500))[0] for path in paths]
    assert corners == pytest.approx([0, 60, 120, 180], abs=5)


def test_command_answers_by_its_status_and_lists_every_problem(coco, write_coco, tmp_path, monkeypatch, capfd):
    def check(*arguments: object) -> int:
        return run_script(monkeypatch, "tools/check_dataset.py", *arguments, "--output", tmp_path / "out")

    json_file, image_root = write_coco(coco)
    register_coco_format("mine", json_file, image_root, ["ball", "box"])
    assert check("mine", "--draw", 1) == 0
    out = capfd.readouterr().out
    assert "2 images, 1 of them without any annotation" in out
    assert "No problem was found." in out
    assert [path.name for path in (tmp_path / "out" / "mine").iterdir()] == ["one.png"]
    for image in image_root.iterdir():
        image.unlink()
    assert check("mine") == 1
    assert "| image cannot be used |       2 |" in capfd.readouterr().out
    with (tmp_path / "out" / "mine" / "problems.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["problem", "where"]
    assert [row[0] for row in rows] == ["image cannot be used"] * 2
    assert "one.png" in rows[0][1]
    json_file.write_text("[")
    assert check("mine") == 2
    assert check("mein") == 2
    errors = capfd.readouterr().err.splitlines()
    assert errors[-2].startswith(f"error: Annotation file {json_file} is not valid JSON")
    assert errors[-1].startswith("error: Dataset mein is not registered; did you mean ")


def test_augmented_images_are_drawn_with_their_objects(coco, write_coco, tmp_path, monkeypatch, capfd):
    register_coco_format("mine", *write_coco(coco), ["ball", "box"])
    keys = ["INPUT.AUGMENTATIONS", "[{'MultiScaleResize': {'sizes': [300]}}, 'Rotate90', 'CopyPaste']", "SEED", 3]

    def draw(folder: str) -> list[np.ndarray]:
        options = ["--augmented", "--draw", 2, "--output", tmp_path / folder, "--keys", *keys]
        assert run_script(monkeypatch, "tools/check_dataset.py", "mine", *options) == 0
        paths = sorted((tmp_path / folder / "mine").iterdir())
        assert [path.name for path in paths] == ["one_augmented.png"]
        return [np.asarray(Image.open(path)) for path in paths]

    first, second = draw("first"), draw("second")
    assert np.array_equal(first, second)
    assert "Drew 1 augmented images" in capfd.readouterr().out
    assert len(np.unique(first[0].reshape(-1, 3), axis=0)) > 3  # a box, a mask, and a label


@pytest.mark.parametrize(
    ("script", "name"),
    [("tools/check_dataset.py", ["shapes_val"]), ("tools/make_shapes.py", []), ("datasets/prepare_bdd100k.py", [])],
    ids=["check", "make", "prepare"],
)
def test_negative_number_of_workers_is_refused(script, name, monkeypatch, capfd):
    assert run_script(monkeypatch, script, *name, "--workers", -1) == 2
    assert "argument --workers: -1 is too small" in capfd.readouterr().err


def test_dataset_of_an_imported_module_is_checked(coco, write_coco, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    json_file, image_root = write_coco(coco)
    (tmp_path / "checked_data.py").write_text(
        "from detectron2.data.datasets import register_coco_instances\n"
        f"register_coco_instances('checked_train', {{}}, '{json_file.name}', '{image_root.name}')\n"
    )
    assert run_script(monkeypatch, "tools/check_dataset.py", "checked_train", "--import", "checked_data") == 0
    assert "No problem was found." in capfd.readouterr().out


def test_output_below_a_file_gives_one_line(coco, write_coco, tmp_path, monkeypatch, capfd):
    register_coco_format("mine", *write_coco(coco), ["ball", "box"])
    output = tmp_path / "annotations.json" / "look"
    assert run_script(monkeypatch, "tools/check_dataset.py", "mine", "--draw", 1, "--output", output) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith(f"error: {output}")


def test_name_without_class_names_is_refused() -> None:
    DatasetCatalog.register("mine", list)
    with pytest.raises(DatasetError, match="mine is empty"):
        inspect_dataset("mine")
