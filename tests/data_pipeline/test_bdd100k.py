"""BDD100K's bitmasks, RLEs and polygons become one COCO file, without losing anything."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools import mask as mask_util

from dimaskdino.config import Config
from dimaskdino.data import build_mapper, register_all
from dimaskdino.data.datasets import bdd100k_convert
from dimaskdino.data.datasets.bdd100k import CLASSES, SOURCES, annotation_file
from dimaskdino.data.datasets.bdd100k_convert import convert_split
from dimaskdino.data.datasets.bdd100k_labels import labels_of_bitmask, labels_of_frame
from dimaskdino.data.validation.start import check_datasets
from dimaskdino.errors import DatasetError
from tests.data_pipeline.bdd100k import CATEGORY_IDS, bitmask_of, record, write_bitmask, write_frames, write_images
from tests.data_pipeline.scripts import run_script

SIZE = (6, 8)


def rle_of(top: int, left: int, bottom: int, right: int, size: tuple[int, int] = SIZE) -> dict[str, Any]:
    """RLE of the rows [top, bottom) and columns [left, right)."""
    mask = np.zeros(size, dtype=np.uint8, order="F")
    mask[top:bottom, left:right] = 1
    rle = mask_util.encode(mask)
    return {"size": list(size), "counts": rle["counts"].decode()}


def bitmask(*instances: tuple[tuple[slice, slice], tuple[int, int, int, int]]) -> np.ndarray:
    """A bitmask with each part set to its category, attribute bits and the two bytes of its instance id."""
    pixels = np.zeros((*SIZE, 4), dtype=np.uint8)
    for part, values in instances:
        pixels[part] = values
    return pixels


def kinds(problems: list[Any]) -> list[tuple[str, str]]:
    return [tuple(problem) for problem in problems]


# ------------------------------------------------------------------------------------------------------- one image


def test_bitmask_gives_its_instances() -> None:
    labels = labels_of_bitmask(
        bitmask(
            (np.s_[1:3, 1:4], (3, 4, 0, 7)),  # car 7, occluded
            (np.s_[4:6, 0:2], (1, 8, 1, 2)),  # pedestrian 256 + 2, truncated
        )
    )
    assert labels.problems == []
    car, pedestrian = labels.annotations
    assert (car["category_id"], car["source_id"], car["area"], car["bbox"]) == (3, 7, 6, [1, 1, 3, 2])
    assert (pedestrian["category_id"], pedestrian["source_id"]) == (1, 258)
    assert np.array_equal(np.argwhere(mask_util.decode(pedestrian["segmentation"])), [[4, 0], [4, 1], [5, 0], [5, 1]])
    names = ("truncated", "occluded", "crowd", "ignored", "iscrowd")
    assert [car[name] for name in names] == [0, 1, 0, 0, 0]
    assert [pedestrian[name] for name in names] == [1, 0, 0, 0, 0]


@pytest.mark.parametrize(("bits", "crowd", "ignored"), [(2, 1, 0), (1, 0, 1), (3, 1, 1), (13, 0, 1), (12, 0, 0)])
def test_crowd_and_ignored_instances_become_crowd_regions(bits: int, crowd: int, ignored: int) -> None:
    (annotation,) = labels_of_bitmask(bitmask((np.s_[0:2, 0:2], (2, bits, 0, 1)))).annotations
    assert (annotation["crowd"], annotation["ignored"]) == (crowd, ignored)
    assert annotation["iscrowd"] == (crowd or ignored)


def test_bitmask_pixels_without_class_or_instance_are_counted() -> None:
    labels = labels_of_bitmask(
        bitmask(
            (np.s_[0, 0], (9, 0, 0, 1)),
            (np.s_[1, 0], (0, 3, 0, 2)),
            (np.s_[2, 0], (3, 0, 0, 0)),
            (np.s_[3, 0], (3, 0, 0, 4)),
            (np.s_[4, 0], (3, 2, 0, 4)),
        )
    )
    assert [annotation["source_id"] for annotation in labels.annotations] == [4, 4]
    assert sorted(labels.problems) == [
        "object kept apart: its instance id also has another category or attributes",
        "object left out: category id 0 is not 1 to 8",
        "object left out: category id 9 is not 1 to 8",
        "object left out: instance id 0, which is the background's",
    ]


@pytest.mark.parametrize("category", [*CATEGORY_IDS])
def test_label_gets_the_class_of_the_toolkit(category: str) -> None:
    labels = labels_of_frame({"labels": [{"category": category, "rle": rle_of(0, 0, 2, 2)}]}, SIZE)
    (annotation,) = labels.annotations
    assert annotation["category_id"] == CATEGORY_IDS[category]
    is_ignored = category in ("other person", "other vehicle", "trailer")
    assert (annotation["ignored"], annotation["iscrowd"]) == (is_ignored, is_ignored)


def test_polygon_covers_its_pixels_and_earlier_labels() -> None:
    square = {"vertices": [[1, 1], [5, 1], [5, 4], [1, 4]], "types": "LLLL", "closed": True}
    above = {"vertices": [[3, 0], [8, 0], [8, 6], [3, 6]], "types": "LLLL", "closed": True}
    labels = [{"id": "a", "category": "car", "poly2d": [square]}, {"id": "b", "category": "bus", "poly2d": [above]}]
    below, over = labels_of_frame({"labels": labels}, SIZE).annotations
    assert (below["source_id"], below["bbox"], below["area"]) == ("a", [1, 1, 2, 3], 6)
    assert (over["source_id"], over["bbox"], over["area"]) == ("b", [3, 0, 5, 6], 30)


@pytest.mark.parametrize("number", range(3))
def test_polygons_and_curves_match_the_toolkits_bitmasks(number: int) -> None:
    labels = labels_of_frame(record()["polygons"][number], tuple(record()["size"]))
    assert labels.problems == []
    for found, drawn in zip(labels.annotations, record()["drawn"][number], strict=True):
        assert found["segmentation"]["counts"] == drawn["counts"]
        assert (int(found["source_id"]), found["category_id"]) == (drawn["instance_id"], drawn["category_id"])
        assert (found["crowd"], found["ignored"]) == (drawn["attributes"] >> 1 & 1, drawn["attributes"] & 1)


@pytest.mark.parametrize(
    ("label", "problems"),
    [
        ({"category": "tram", "rle": rle_of(0, 0, 2, 2)}, ["object left out: category 'tram' has no class"]),
        ({"category": "car"}, ["object left out: neither RLE nor polygons"]),
        ({"category": "car", "rle": rle_of(0, 0, 0, 0)}, ["object left out: a mask without a pixel"]),
        ({"category": "car", "rle": rle_of(0, 0, 2, 2, (8, 6))}, ["object left out: an RLE of another size"]),
        ({"category": "car", "rle": {"size": list(SIZE)}}, ["object left out: an RLE without size or counts"]),
        # pycocotools decodes it, to whatever lay in memory.
        (
            {"category": "car", "rle": {"size": list(SIZE), "counts": rle_of(1, 1, 3, 4)["counts"][:-2]}},
            ["object left out: an RLE whose runs do not cover the image"],
        ),
        (
            {"category": "car", "poly2d": [{"vertices": [[0, 0], [3, 3]], "types": "LL"}]},
            ["polygon left out: malformed or of fewer than three", "object left out: a mask without a pixel"],
        ),
        (
            {"category": "car", "poly2d": [{"vertices": [[0, 0], [3, None], [3, 3]], "types": "LLL"}]},
            ["polygon left out: malformed", "object left out: a mask without a pixel"],
        ),
        (
            {"category": "car", "poly2d": [{"vertices": [[0, 0], [3, 10**400], [3, 3]], "types": "LLL"}]},
            ["polygon left out: malformed", "object left out: a mask without a pixel"],
        ),
        (
            {"category": "car", "poly2d": [{"vertices": [[90, 90], [99, 90], [99, 99]], "types": "LLL"}]},
            ["object left out: a mask without a pixel"],
        ),
    ],
)
def test_unusable_label_is_counted_and_the_others_stay(label: dict, problems: list[str]) -> None:
    sound = {"id": "3", "category": "bus", "rle": rle_of(0, 0, 2, 2)}
    labels = labels_of_frame({"labels": [label, sound]}, SIZE)
    assert [annotation["source_id"] for annotation in labels.annotations] == ["3"]
    assert len(labels.problems) == len(problems)
    assert all(found.startswith(expected) for found, expected in zip(labels.problems, problems, strict=True))


def test_frame_without_labels_is_an_empty_image() -> None:
    for frame in ({}, {"labels": None}, {"labels": []}):
        assert labels_of_frame(frame, SIZE).annotations == []


# ---------------------------------------------------------------------------------------------------- whole splits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The recorded set under ``bdd100k``, split val: bitmasks and RLE of the same objects."""
    size, frames = tuple(record()["size"]), record()["frames"]
    folder = write_images(tmp_path, "val", [frame["name"] for frame in frames], size)
    write_frames(folder, "val", "rles", {"frames": frames, "groups": None, "config": None})
    for frame in frames:
        write_bitmask(folder, "val", frame["name"], bitmask_of(frame, size))
    return folder


def output(folder: Path, split: str = "val") -> bytes:
    return annotation_file(folder, split).read_bytes()


def test_bitmasks_and_rles_give_the_same_annotations(folder: Path) -> None:
    def without_source(coco: dict[str, Any]) -> list[dict[str, Any]]:
        return [{key: value for key, value in found.items() if key != "source_id"} for found in coco["annotations"]]

    (of_bitmasks, none), (of_rles, no_more) = (convert_split(folder, "val", source) for source in SOURCES[:2])
    assert none == no_more == []
    assert len(of_rles["annotations"]) == sum(len(frame["labels"]) for frame in record()["frames"])
    assert without_source(of_bitmasks) == without_source(of_rles)
    assert of_bitmasks["images"] == of_rles["images"]
    assert [category["name"] for category in of_rles["categories"]] == list(CLASSES)


def test_file_depends_on_neither_workers_nor_label_order(folder: Path) -> None:
    convert_split(folder, "val", "bitmasks")
    alone = output(folder)
    convert_split(folder, "val", "bitmasks", num_workers=2)
    assert output(folder) == alone
    convert_split(folder, "val", "rles")
    in_order = output(folder)
    write_frames(folder, "val", "rles", record()["frames"][::-1])
    convert_split(folder, "val", "rles")
    assert output(folder) == in_order


def test_interrupted_run_resumes_and_gives_the_same_file(folder, monkeypatch, caplog):
    convert_split(folder, "val", "rles")
    expected = output(folder)
    annotation_file(folder, "val").unlink()
    converted = []

    def until_broken(task: Any) -> Any:
        if len(converted) == 10:
            raise KeyboardInterrupt
        converted.append(task.image)
        return convert(task)

    convert = bdd100k_convert.convert_image
    monkeypatch.setattr(bdd100k_convert, "convert_image", until_broken)
    with pytest.raises(KeyboardInterrupt):
        convert_split(folder, "val", "rles")
    (part,) = annotation_file(folder, "val").parent.iterdir()
    # As if the power had failed in the middle of a line; and an image that changed meanwhile is converted again.
    part.write_bytes(part.read_bytes() + b'{"key": "half a li')
    Image.new("RGB", tuple(record()["size"][::-1]), (10, 200, 30)).save(converted[3])
    again = []
    monkeypatch.setattr(bdd100k_convert, "convert_image", lambda task: again.append(task.image) or convert(task))
    with caplog.at_level(logging.INFO):
        convert_split(folder, "val", "rles")
    assert "resuming after 9 of 24 images" in caplog.text
    assert len(again) == 15
    assert set(again) & set(converted) == {converted[3]}
    assert output(folder) == expected
    assert list(annotation_file(folder, "val").parent.iterdir()) == [annotation_file(folder, "val")]


@pytest.mark.parametrize("damage", [b'{"key": "half", "si', b"\xff\xfe", b"5", b'{"key": "3"}', b""])
def test_damaged_lines_of_an_interrupted_run_are_redone(folder, monkeypatch, caplog, damage):
    convert_split(folder, "val", "rles")
    expected = output(folder)
    with pytest.raises(KeyboardInterrupt):
        convert_split(folder, "val", "rles", progress=break_off)
    part = annotation_file(folder, "val").with_name(f"{annotation_file(folder, 'val').name}.part")
    lines = part.read_bytes().split(b"\n")
    part.write_bytes(b"\n".join([*lines[:2], damage, *lines[3:]]))
    again = []
    convert = bdd100k_convert.convert_image
    monkeypatch.setattr(bdd100k_convert, "convert_image", lambda task: again.append(task.image) or convert(task))
    convert_split(folder, "val", "rles")
    assert f"{part}: 1 lines are damaged; their images are converted again" in caplog.text
    assert len(again) == len(record()["frames"]) - 4
    assert output(folder) == expected


def test_a_journal_cut_in_its_first_line_has_no_damage(tmp_path: Path, caplog) -> None:
    path = tmp_path / "annotations.json.part"
    path.write_text('"rles"')
    assert bdd100k_convert._Journal(path, "rles").records == {}
    assert not caplog.text


def break_off(items: Any, *, total: int) -> Any:
    """Progress that ends after five images."""
    yield from list(items)[:5]
    raise KeyboardInterrupt


def test_sources_are_not_mixed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert_split(folder, "val", "rles", progress=break_off)
    coco, _ = convert_split(folder, "val", "bitmasks")
    assert all(isinstance(annotation["source_id"], int) for annotation in coco["annotations"])


def test_every_image_left_out_is_named_with_the_reason(tmp_path: Path) -> None:
    names = ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "f.jpg"]
    folder = write_images(tmp_path, "train", names, SIZE)
    sound = bitmask((np.s_[0:2, 0:2], (3, 0, 0, 1)))
    write_bitmask(folder, "train", "a.jpg", sound)
    write_bitmask(folder, "train", "b.jpg", sound[:4])
    write_bitmask(folder, "train", "c.jpg", sound[..., :3])
    write_bitmask(folder, "train", "d.jpg", sound).write_bytes(b"no image")
    write_bitmask(folder, "train", "e.jpg", sound)
    (folder / "images/10k/train/e.jpg").write_bytes(b"no image")
    write_bitmask(folder, "train", "z.jpg", sound)
    coco, problems = convert_split(folder, "train", "bitmasks")
    assert [image["file_name"] for image in coco["images"]] == ["a.jpg"]
    assert sorted(kinds(problems), key=lambda problem: problem[1]) == [
        ("image left out: its bitmask has another size", "b.jpg"),
        ("image left out: its bitmask is not RGBA with 8 bits a channel", "c.jpg"),
        ("image left out: its bitmask cannot be read", "d.jpg"),
        ("image left out: it cannot be read", "e.jpg"),
        ("image left out: it has no labels in bitmasks", "f.jpg"),
        ("labels left out: there is no such image", "z"),
    ]


def test_first_of_images_with_one_stem_is_taken(tmp_path: Path) -> None:
    folder = write_images(tmp_path, "train", ["a.jpg", "a.png"], SIZE)
    write_bitmask(folder, "train", "a.jpg", bitmask((np.s_[0:2, 0:2], (3, 0, 0, 1))))
    coco, problems = convert_split(folder, "train", "bitmasks")
    assert [image["file_name"] for image in coco["images"]] == ["a.jpg"]
    assert kinds(problems) == [("image left out: another one differs only in the suffix", "a.png")]


def test_split_of_which_nothing_is_left_is_an_error(tmp_path: Path) -> None:
    folder = write_images(tmp_path, "val", ["a.jpg"], SIZE)
    write_bitmask(folder, "val", "a.jpg", np.zeros((*SIZE, 3), dtype=np.uint8))
    with pytest.raises(DatasetError, match="No image of val .* its bitmask is not RGBA"):
        convert_split(folder, "val", "bitmasks")
    assert not annotation_file(folder, "val").exists()


@pytest.mark.parametrize("source", SOURCES)
def test_missing_labels_name_their_path_and_the_choice(tmp_path: Path, source: str) -> None:
    with pytest.raises(DatasetError, match="Image folder .*images/10k/val does not exist; .*datasets/README.md"):
        convert_split(tmp_path / "bdd100k", "val", source)
    folder = write_images(tmp_path, "val", ["a.jpg"], SIZE)
    with pytest.raises(DatasetError, match=f"labels/ins_seg/{source}/.*val.* does not exist; .*--source"):
        convert_split(folder, "val", source)


@pytest.mark.parametrize(
    "content",
    [
        *("{", "{}", "[1]", '[{"labels": []}]', '{"frames": 3}'),
        *(
            f'[{{"name": "a.jpg", "labels": [{label}]}}]'
            for label in (
                '"car"',
                '{"category": "car", "attributes": ["crowd"]}',
                '{"category": "car", "attributes": "crowd"}',
                '{"category": "car", "poly2d": 5}',
                '{"category": "car", "poly2d": {"vertices": []}}',
            )
        ),
    ],
)
def test_label_file_in_another_format_is_named(tmp_path: Path, content: str) -> None:
    folder = write_images(tmp_path, "val", ["a.jpg"], SIZE)
    path = write_frames(folder, "val", "rles", [])
    path.write_text(content)
    with pytest.raises(DatasetError, match=r"not in Scalabel's format") as error:
        convert_split(folder, "val", "rles")
    assert str(path) in str(error.value)


# --------------------------------------------------------------------------------------- registration and training


@pytest.fixture
def bdd(folder: Path, cfg: Config, registrations: None) -> Config:
    """A configuration that trains and tests on the recorded set, converted."""
    convert_split(folder, "val", "rles")
    register_all(folder.parent)
    name = ("bdd100k_ins_seg_val",)
    cfg.merge_from_list(["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 8, "DATASETS.TRAIN", name, "DATASETS.TEST", name])
    return cfg


def test_converted_split_is_registered(bdd: Config) -> None:
    check_datasets(bdd)
    assert MetadataCatalog.get("bdd100k_ins_seg_val").thing_classes == list(CLASSES)
    entries = DatasetCatalog.get("bdd100k_ins_seg_val")
    assert len(entries) == len(record()["frames"])
    assert sum(len(entry["annotations"]) for entry in entries) == 104


def test_unconverted_split_names_the_command(bdd: Config, folder: Path) -> None:
    bdd.DATASETS.TRAIN = ("bdd100k_ins_seg_train",)
    with pytest.raises(DatasetError, match=r"python datasets/prepare_bdd100k\.py --root ") as error:
        check_datasets(bdd)
    assert str(annotation_file(folder, "train")) in str(error.value)
    with pytest.raises(DatasetError, match="prepare_bdd100k"):
        DatasetCatalog.get("bdd100k_ins_seg_train")


def test_training_leaves_crowd_and_ignored_regions_out(bdd: Config) -> None:
    mapper = build_mapper(bdd, is_train=False, with_instances=True)
    for entry in DatasetCatalog.get("bdd100k_ins_seg_val"):
        objects = [annotation for annotation in entry["annotations"] if not annotation["iscrowd"]]
        assert len(mapper(entry)["instances"]) == len(objects)


def test_command_converts_once_and_counts(folder, monkeypatch, capfd, caplog):
    write_bitmask(folder, "val", "lost.jpg", np.zeros((*record()["size"], 4), dtype=np.uint8))

    def prepare(*arguments: str) -> tuple[int, str, str]:
        """Exit status, log and stderr."""
        caplog.clear()
        script = "datasets/prepare_bdd100k.py"
        with caplog.at_level(logging.INFO):
            status = run_script(monkeypatch, script, "--root", folder.parent, "--splits", "val", *arguments)
        return status, caplog.text, capfd.readouterr().err

    status, log, bar = prepare()
    assert status == 0
    assert "24/24" in bar
    assert "| all        |     60 |       6 |        38 |" in log
    assert "labels left out: there is no such image |       1 | lost" in log
    status, log, _ = prepare("--source", "rles")
    assert status == 0
    assert "exists already, made from bitmasks; --force makes it again" in log
    assert prepare("--source", "rles", "--force")[0] == 0
    assert json.loads(output(folder))["info"]["source"] == "rles"
    status, _, error = prepare("--source", "polygons", "--force")
    assert status == 2
    assert error.startswith("error: Label file ")
    assert len(error.splitlines()) == 1
