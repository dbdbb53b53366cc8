"""tools/check_dataset.py finds every kind of fault, names where it is, counts and draws."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image
from pycocotools import mask as mask_util

from dimaskdino.config import Config
from dimaskdino.data import register_all
from dimaskdino.data.datasets.registration import register_coco_format
from dimaskdino.data.inspection import inspect_dataset
from dimaskdino.data.inspection_drawing import draw_samples
from dimaskdino.data.inspection_image import annotation_problems
from dimaskdino.data.reports import Problem, count_table, problem_table
from dimaskdino.data.rle import checked_rle, run_lengths
from dimaskdino.errors import DatasetError
from tests.data_pipeline.conftest import HEIGHT, POLYGON, WIDTH, Json
from tests.data_pipeline.scripts import run_script

pytestmark = pytest.mark.usefixtures("registrations")

Write = Callable[[Json], tuple[Path, Path]]
Found = list[tuple[str, str]]
SIZE = (HEIGHT, WIDTH)


@pytest.fixture
def inspect(coco: Json, write_coco: Write) -> Callable[..., Found]:
    """Change the sound dataset of the fixture ``coco``, write it as "mine" and inspect it."""

    def inspect_changed(change: Callable[[Json, Path], Any] = lambda coco, images: None) -> Found:
        json_file, image_root = write_coco(coco)
        change(coco, image_root)
        json_file.write_text(json.dumps(coco))
        register_coco_format("mine", json_file, image_root, ["ball", "box"])
        return [tuple(problem) for problem in inspect_dataset("mine").problems]

    return inspect_changed


def annotation(coco: Json) -> Json:
    return coco["annotations"][0]


def test_a_sound_dataset_has_no_problem(inspect: Callable[..., Found]) -> None:
    assert inspect() == []


DAMAGES: dict[str, tuple[Callable[[Json, Path], Any], str, str]] = {
    "missing image": (lambda _, images: (images / "two.png").unlink(), "image file is missing", "two.png"),
    "no image": (lambda _, images: (images / "two.png").write_bytes(b"?"), "image file cannot be read", "two.png"),
    "cut image": (
        lambda _, images: (images / "two.png").write_bytes((images / "one.png").read_bytes()[:-30]),
        "image file cannot be read",
        "two.png",
    ),
    "16 bits": (
        lambda _, images: Image.new("I;16", (WIDTH, HEIGHT)).save(images / "two.png"),
        "image has more than 8 bits a channel: convert it to 8 bits",
        "two.png",
    ),
    "other size": (
        lambda _, images: Image.new("RGB", (HEIGHT, WIDTH)).save(images / "two.png"),
        "image has another size than listed",
        "two.png: 6x8, listed as 8x6 (width x height)",
    ),
    "image twice": (
        lambda coco, _: coco["images"].append({**coco["images"][1], "id": 3}),
        "image file_name is listed more than once",
        "two.png",
    ),
    "image id twice": (
        lambda coco, _: coco["images"][1].update(id=1),
        "image id is listed more than once",
        "1",
    ),
    "category id twice": (
        lambda coco, _: coco["categories"].append({"id": 7, "name": "cone"}),
        "category id is used more than once",
        "7",
    ),
    "category name twice": (
        lambda coco, _: coco["categories"].append({"id": 8, "name": "box"}),
        "category name is used more than once",
        "box",
    ),
    "other categories": (
        lambda coco, _: coco["categories"][0].update(name="sphere"),
        "categories are not the registered classes",
        "['sphere', 'box'], registered: ['ball', 'box']",
    ),
    "no such category": (
        lambda coco, _: annotation(coco).update(category_id=4),
        "category that is not listed",
        "annotation 11 of one.png: 4",
    ),
    "no such image": (
        lambda coco, _: annotation(coco).update(image_id=9),
        "annotation of an image that is not listed",
        "annotation 11 of image id 9",
    ),
    "object twice": (
        lambda coco, _: coco["annotations"].append({**annotation(coco), "id": 12}),
        "object is annotated more than once",
        "annotation 12 of one.png",
    ),
    "no mask": (
        lambda coco, _: annotation(coco).update(segmentation=[]),
        "mask: missing",
        "annotation 11 of one.png",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_fault_is_named_with_its_place(inspect: Callable[..., Found], damage: str) -> None:
    change, kind, where = DAMAGES[damage]
    assert (kind, where) in inspect(change)


@pytest.mark.parametrize("value", [None, 11])
def test_annotation_ids_that_detectron2_would_refuse_are_named(inspect: Callable[..., Found], value: Any) -> None:
    def add(coco: Json, _: Path) -> None:
        other = {"segmentation": [[5, 3, 7, 3, 7, 5, 5, 5]], "bbox": [5, 3, 2, 2], "area": 4}
        coco["annotations"].append({**annotation(coco), **other, "id": value})

    assert inspect(add) == [("annotation id is missing or used more than once", str(value))]


def test_an_annotation_id_that_is_no_number_is_named(inspect: Callable[..., Found]) -> None:
    found = inspect(lambda coco, _: annotation(coco).update(id="eleven"))
    assert found == [("annotation id is not a whole number", "'eleven'")]


def rle(*runs: int, size: tuple[int, int] = SIZE) -> Json:
    return {"size": list(size), "counts": list(runs)}


# Columns 1 to 3, rows 1 to 2, down the columns, as the polygon.
RUNS = (7, 2, 4, 2, 4, 2, 27)
COMPRESSED = mask_util.frPyObjects(rle(*RUNS), *SIZE)["counts"].decode()
SOUND: Json = {"id": 1, "category_id": 7, "segmentation": [POLYGON], "bbox": [1, 1, 3, 2], "area": 6, "iscrowd": 0}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"segmentation": rle(*RUNS)},
        {"segmentation": {"size": list(SIZE), "counts": COMPRESSED}, "iscrowd": 1, "ignored": 1},
        # COCO's crowd boxes end one pixel early; coordinates are rounded.
        {"segmentation": rle(*RUNS), "bbox": [1, 1, 2, 1], "iscrowd": 1},
        {"bbox": [0.996, 1.004, 3.001, 1.998], "area": 6.25},
    ],
)
def test_a_sound_annotation_has_no_problem(change: Json) -> None:
    assert annotation_problems({**SOUND, **change}, SIZE) == []


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"segmentation": None}, "mask: missing"),
        ({"segmentation": [[1, 1, 4, 1]]}, "mask: a polygon of fewer than three finite points"),
        ({"segmentation": [[1, 1, 4, 1, 4, float("nan")]]}, "mask: a polygon of fewer than three finite points"),
        ({"segmentation": [POLYGON, [1, 1, 4, 1, 4, 3, 1]]}, "mask: a malformed polygon"),
        ({"segmentation": [3]}, "mask: a malformed polygon"),
        ({"segmentation": [[[1, 1], [4, 1], [4, 3], [1, 3]]]}, "mask: a malformed polygon: not a flat list"),
        ({"segmentation": [["1", "1", "4", "1", "4", "3"]]}, "mask: a malformed polygon: not a flat list"),
        ({"segmentation": [[1, 1, 10**400, 1, 4, 3]]}, "mask: a malformed polygon: not a flat list"),
        ({"segmentation": [[1, 1, 40, 1, 40, 3, 1, 3]]}, "mask: a polygon leaves the image"),
        ({"segmentation": [[1, 1, 4, 1, 2, 1]], "bbox": [1, 1, 3, 1]}, "mask: no pixel in the image"),
        ({"segmentation": rle(48)}, "mask: no pixel in the image"),
        ({"segmentation": rle(*RUNS, size=(8, 6))}, "mask: an RLE of another size than the image"),
        ({"segmentation": rle(7, 2)}, "mask: an RLE whose runs do not cover the image"),
        ({"segmentation": {"size": list(SIZE), "counts": COMPRESSED[:-2]}}, "mask: an RLE whose runs do not cover"),
        ({"segmentation": {"size": list(SIZE)}}, "mask: an RLE without size or counts"),
        ({"segmentation": {"size": list(SIZE), "counts": 3}}, "mask: an RLE whose counts are neither text nor a list"),
        ({"bbox": None}, "box: not four finite numbers"),
        ({"bbox": [1, 1, 3]}, "box: not four finite numbers"),
        ({"bbox": [1, 1, float("inf"), 2]}, "box: not four finite numbers"),
        ({"bbox": [1, 1, 10**400, 2]}, "box: not four finite numbers"),
        ({"bbox": [1, 1, 0, 2]}, "box: width or height is not positive"),
        ({"bbox": [1, 1, 8.5, 2]}, "box: leaves the image"),
        ({"bbox": [-2, 1, 6, 2]}, "box: leaves the image"),
        # The far corner in place of width and height.
        ({"bbox": [1, 1, 4, 3.5]}, "box: is not its mask's extent"),
        ({"area": None}, "area: missing or not positive"),
        ({"area": 0}, "area: missing or not positive"),
        ({"area": 30}, "area: is not its mask's"),
        ({"iscrowd": 2}, "iscrowd is neither 0 nor 1"),
        ({"ignore": 1}, "ignore is set, which detectron2 refuses"),
        ({"ignored": 1}, "ignored region without iscrowd"),
    ],
)
def test_each_fault_of_an_annotation_is_found(change: Json, kind: str) -> None:
    found = [problem for problem, _ in annotation_problems({**SOUND, **change}, SIZE)]
    assert any(problem.startswith(kind) for problem in found), found


def test_run_lengths_are_those_that_pycocotools_compresses() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        height, width = (int(side) for side in rng.integers(1, 90, 2))
        mask = np.asfortranarray(rng.random((height, width)) < rng.random() ** 2, dtype=np.uint8)
        compressed = mask_util.encode(mask)
        runs = run_lengths(compressed["counts"]).tolist()
        assert mask_util.frPyObjects(rle(*runs, size=mask.shape), height, width) == compressed
        assert np.array_equal(mask_util.decode(checked_rle(compressed, mask.shape)), mask)


def test_classes_are_counted_with_their_crowd_and_ignored_regions(coco: Json) -> None:
    coco["annotations"] += [
        {**SOUND, "id": 12, "image_id": 1, "iscrowd": 1},
        {**SOUND, "id": 13, "image_id": 1, "iscrowd": 1, "ignored": 1, "category_id": 3},
    ]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in count_table(coco).splitlines()[:5]]
    assert lines[0] == ["class", "objects", "crowd", "ignored", "images"]
    assert lines[2:] == [["ball", "0", "0", "1", "1"], ["box", "1", "1", "0", "1"], ["all", "1", "1", "1", "1"]]
    assert count_table(coco).endswith("2 images, 1 of them without any annotation")


def test_images_that_are_not_listed_are_not_counted(coco: Json) -> None:
    coco["annotations"] += [{**SOUND, "id": 12 + index, "image_id": 90 + index} for index in range(4)]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in count_table(coco).splitlines()[:5]]
    assert [line[-1] for line in lines[2:]] == ["0", "1", "1"]
    assert count_table(coco).endswith("2 images, 1 of them without any annotation")


def test_problems_are_counted_by_kind_with_the_first_place() -> None:
    table = problem_table([Problem("rare", "a.png"), Problem("often", "b.png"), Problem("often", "c.png")])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert rows == [["often", "2", "b.png"], ["rare", "1", "a.png"]]


@pytest.mark.parametrize("text", ["{", "[]", '{"images": [{"id": 1}], "annotations": [], "categories": []}'])
def test_a_file_in_another_format_is_refused(coco: Json, write_coco: Write, text: str) -> None:
    json_file, image_root = write_coco(coco)
    json_file.write_text(text)
    register_coco_format("mine", json_file, image_root, ["ball", "box"])
    with pytest.raises(DatasetError, match="not in COCO's format"):
        inspect_dataset("mine")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda coco: coco["categories"][0].update(id="3"), "a category's id is '3'"),
        (lambda coco: coco["categories"][0].update(id=None), "a category's id is None"),
        (lambda coco: coco["categories"][0].update(name=["ball"]), r"a category's name is \['ball'\]"),
        (lambda coco: annotation(coco).update(id=[11]), r"an annotation's id is \[11\]"),
        (lambda coco: annotation(coco).update(image_id=[1]), r"an annotation's image_id is \[1\]"),
        (lambda coco: annotation(coco).update(category_id={"id": 7}), "an annotation's category_id is {'id': 7}"),
        (lambda coco: coco["images"][0].update(height="6"), "an image's height is '6'"),
        (lambda coco: coco["images"][0].update(width=-8), "one.png is -8x6 pixels"),
        (lambda coco: coco["images"].clear(), "lists no image"),
    ],
)
def test_an_entry_that_no_check_could_go_on_with_ends_with_one_line(
    coco: Json, write_coco: Write, change: Callable[[Json], Any], words: str
) -> None:
    json_file, image_root = write_coco(coco)
    change(coco)
    json_file.write_text(json.dumps(coco))
    register_coco_format("mine", json_file, image_root, ["ball", "box"])
    with pytest.raises(DatasetError, match=words) as error:
        inspect_dataset("mine")
    assert str(json_file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_dataset_without_an_annotation_file_is_refused() -> None:
    DatasetCatalog.register("mine", list)
    with pytest.raises(DatasetError, match="mine is not registered with a COCO annotation file"):
        inspect_dataset("mine")


@pytest.fixture
def shapes(cfg: Config) -> Config:
    """shapes_val registered with two pictures of 64 x 64 pixels."""
    register_all(cfg=cfg)
    return cfg


def test_the_synthetic_dataset_is_sound_and_drawn_with_its_objects(shapes: Config, tmp_path: Path) -> None:
    inspection = inspect_dataset("shapes_val")
    assert inspection.problems == []
    paths = draw_samples(inspection, 5, tmp_path / "drawn")
    annotated = [image["file_name"] for image, annotations in inspection.units() if annotations]
    assert [path.name for path in paths] == annotated
    for path in paths:
        drawn = np.asarray(Image.open(path).convert("RGB")).astype(int)
        original = Image.open(Path(inspection.image_root) / path.name).resize(
            drawn.shape[1::-1], Image.Resampling.NEAREST
        )
        changed = np.abs(drawn - np.asarray(original).astype(int)).max(axis=2) > 20
        assert min(drawn.shape[:2]) == 600
        assert 0.05 < changed.mean() < 0.95


def test_unusable_masks_boxes_and_images_do_not_stop_the_drawing(
    inspect: Callable[..., Found], coco: Json, tmp_path: Path
) -> None:
    def damage(coco: Json, images: Path) -> None:
        coco["annotations"] += [
            {**SOUND, "id": 12, "image_id": 1, "segmentation": [[1, 1]], "bbox": None},
            {**SOUND, "id": 13, "image_id": 2},
            {**SOUND, "id": 14, "image_id": 1, "category_id": 99},
        ]
        (images / "two.png").unlink()

    assert inspect(damage)
    assert [path.name for path in draw_samples(inspect_dataset("mine"), 9, tmp_path / "drawn")] == ["one.png"]


def test_images_of_one_stem_are_drawn_into_files_of_their_own(coco: Json, write_coco: Write, tmp_path: Path) -> None:
    json_file, image_root = write_coco(coco)
    names = ["a/0.jpg", "b/0.jpg", "0.png", "0_2.png"]
    for number, name in enumerate(names):
        (image_root / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), (60 * number, 0, 0)).save(image_root / name)
    coco["images"] = [{**coco["images"][0], "id": number, "file_name": name} for number, name in enumerate(names)]
    coco["annotations"] = [{**SOUND, "id": number, "image_id": number} for number in range(4)]
    json_file.write_text(json.dumps(coco))
    register_coco_format("mine", json_file, image_root, ["ball", "box"])
    paths = draw_samples(inspect_dataset("mine"), 9, tmp_path / "drawn")
    assert [path.name for path in paths] == ["0.png", "0_2.png", "0_3.png", "0_2_2.png"]
    # The corner that no object covers tells which image a picture shows.
    corners = [Image.open(path).convert("RGB").getpixel((599, 599))[0] for path in paths]
    assert corners == pytest.approx([0, 60, 120, 180], abs=5)


def test_the_command_answers_by_its_status_and_lists_every_problem(
    coco: Json, write_coco: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def check(*arguments: object) -> int:
        return run_script(monkeypatch, "tools/check_dataset.py", *arguments, "--output", tmp_path / "out")

    json_file, image_root = write_coco(coco)
    register_coco_format("mine", json_file, image_root, ["ball", "box"])
    assert check("mine", "--draw", 1) == 0
    assert "No problem was found." in capfd.readouterr().out
    assert [path.name for path in (tmp_path / "out" / "mine").iterdir()] == ["one.png"]
    for image in image_root.iterdir():
        image.unlink()
    assert check("mine") == 1
    out = capfd.readouterr().out
    assert "| image file is missing |       2 | one.png |" in out
    with (tmp_path / "out" / "mine" / "problems.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["problem", "where"], ["image file is missing", "one.png"], ["image file is missing", "two.png"]]
    assert check("mein") == 2
    error = capfd.readouterr().err
    assert error.startswith("error: Dataset mein is not registered; did you mean ")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("script", "name"),
    [("tools/check_dataset.py", ["shapes_val"]), ("tools/make_shapes.py", []), ("datasets/prepare_bdd100k.py", [])],
    ids=["check", "make", "prepare"],
)
def test_fewer_than_no_worker_is_refused(
    script: str, name: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    assert run_script(monkeypatch, script, *name, "--workers", -1) == 2
    assert "argument --workers: -1 is too small" in capfd.readouterr().err


def test_a_dataset_of_an_imported_module_is_checked(
    coco: Json, write_coco: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    json_file, image_root = write_coco(coco)
    (tmp_path / "own_data.py").write_text(
        "from detectron2.data.datasets import register_coco_instances\n"
        f"register_coco_instances('own_train', {{}}, '{json_file.name}', '{image_root.name}')\n"
    )
    assert run_script(monkeypatch, "tools/check_dataset.py", "own_train", "--import", "own_data") == 0
    assert "No problem was found." in capfd.readouterr().out


def test_an_output_below_a_file_is_told_in_one_line(
    coco: Json, write_coco: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    register_coco_format("mine", *write_coco(coco), ["ball", "box"])
    output = tmp_path / "annotations.json" / "look"
    assert run_script(monkeypatch, "tools/check_dataset.py", "mine", "--draw", 1, "--output", output) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith(f"error: {output}")
