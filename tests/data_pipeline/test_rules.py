"""The rules for one annotation, and that the mapper, the check at the start and the tool all apply them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from pycocotools import mask as mask_util

from dimaskdino.config import Config
from dimaskdino.data import build_mapper
from dimaskdino.data.coco_file import Annotations
from dimaskdino.data.datasets.registration import load_dataset
from dimaskdino.data.validation import screen
from dimaskdino.data.validation.dataset import open_file
from dimaskdino.data.validation.files import inspect_dataset
from dimaskdino.data.validation.report import Counts
from dimaskdino.data.validation.rules import Level, Rules
from dimaskdino.data.validation.screen import look
from dimaskdino.data.validation.start import check_datasets
from dimaskdino.errors import DatasetError
from dimaskdino.structures.rle_masks import checked_rle, run_lengths
from tests.data_pipeline.conftest import HEIGHT, POLYGON, WIDTH, Json

pytestmark = pytest.mark.usefixtures("registrations")

SIZE = (HEIGHT, WIDTH)
REFUSED, DROPPED, NOTE = Level.REFUSED, Level.DROPPED, Level.NOTE
CATEGORIES = {3: "ball", 7: "box"}


def rle(*runs: int, size: tuple[int, int] = SIZE) -> Json:
    return {"size": list(size), "counts": list(runs)}


# Columns 1 to 3, rows 1 to 2, down the columns, as the polygon.
RUNS = (7, 2, 4, 2, 4, 2, 27)
COMPRESSED = mask_util.frPyObjects(rle(*RUNS), *SIZE)["counts"].decode()
SOUND: Json = {"id": 11, "category_id": 7, "segmentation": [POLYGON], "bbox": [1, 1, 3, 2], "area": 6, "iscrowd": 0}


def found(change: Json, size: tuple[int, int] | None = SIZE, **use: bool) -> set[tuple[str, Level]]:
    """Kinds and levels of the problems of the sound annotation after a change, by default in a scored file."""
    rules = Rules(categories=CATEGORIES, **{"scored": True, "in_file": True, **use})
    return {(problem.kind, problem.level) for problem in rules.problems({**SOUND, **change}, size)}


@pytest.mark.parametrize(
    "change",
    [
        {"box_supervised": False, "box_weight": 0.5, "ignored": None},
        {"segmentation": rle(*RUNS)},
        {"segmentation": {"size": list(SIZE), "counts": COMPRESSED}, "iscrowd": 1, "ignored": 1},
        # COCO's crowd boxes end one pixel early; coordinates are rounded.
        {"segmentation": rle(*RUNS), "bbox": [1, 1, 2, 1], "iscrowd": 1},
        {"bbox": [0.996, 1.004, 3.001, 1.998], "area": 6.25},
        {"category_id": 7.0},
    ],
)
def test_sound_annotation_has_no_problem(change: Json) -> None:
    assert found(change) == set()


# A change, the kind of problem, and its level if predictions are scored, and if not.
DAMAGES: list[tuple[Json, str, Level, Level]] = [
    ({"category_id": 4}, "category: unknown", REFUSED, REFUSED),
    ({"category_id": "7"}, "category: the id is of another type", REFUSED, REFUSED),
    ({"iscrowd": 2}, "iscrowd: neither 0 nor 1", REFUSED, REFUSED),
    ({"iscrowd": None}, "iscrowd: neither 0 nor 1", REFUSED, REFUSED),
    ({"ignore": 1}, "ignore: not supported", REFUSED, REFUSED),
    ({"ignored": "no", "iscrowd": 1}, "ignored: neither true nor false", REFUSED, REFUSED),
    ({"box_supervised": "no"}, "box_supervised: neither true nor false", REFUSED, REFUSED),
    ({"box_supervised": None}, "box_supervised: neither true nor false", REFUSED, REFUSED),
    ({"box_weight": "1"}, "box_weight: not a weight", REFUSED, REFUSED),
    ({"box_weight": -1}, "box_weight: not a weight", REFUSED, REFUSED),
    ({"box_weight": 1e300}, "box_weight: not a weight", REFUSED, REFUSED),
    ({"ignored": 1}, "ignored: the region is trained on", NOTE, NOTE),
    ({"bbox": [1, 1, 3]}, "box: not four finite numbers", REFUSED, REFUSED),
    ({"bbox": 5}, "box: not four finite numbers", REFUSED, REFUSED),
    ({"bbox": ["1", 1, 3, 2]}, "box: not four finite numbers", REFUSED, REFUSED),
    ({"bbox": [1, 1, float("nan"), 2]}, "box: not four finite numbers", REFUSED, REFUSED),
    ({"bbox": [1, 1, 10**400, 2]}, "box: not four finite numbers", REFUSED, REFUSED),
    ({"bbox": [1, 1, 1e8, 2]}, "box: far outside the image", REFUSED, REFUSED),
    ({"bbox": [4, 1, -3, 2]}, "box: width or height is not positive", REFUSED, NOTE),
    ({"bbox": [1, 1, 0, 2]}, "box: width or height is not positive", NOTE, NOTE),
    ({"bbox": [1, 1, 8.5, 2]}, "box: leaves the image", NOTE, NOTE),
    ({"bbox": [-2, 1, 6, 2]}, "box: leaves the image", NOTE, NOTE),
    ({"bbox": [1, 1, 5, 4.5]}, "box: is not its mask's extent", NOTE, NOTE),
    ({"segmentation": [[3, 3, 6, 3, 6, 5, 3, 5]], "bbox": [3, 3, 6, 5]}, "box: reads as x1, y1, x2, y2", NOTE, NOTE),
    ({"segmentation": None}, "mask: missing", REFUSED, REFUSED),
    ({"segmentation": []}, "mask: missing", REFUSED, REFUSED),
    ({"segmentation": 5}, "mask: neither a list of polygons", REFUSED, REFUSED),
    ({"segmentation": POLYGON}, "mask: neither a list of polygons", REFUSED, REFUSED),
    ({"segmentation": [[[1, 1], [4, 1], [4, 3]]]}, "mask: a polygon is not a flat list", REFUSED, REFUSED),
    ({"segmentation": [POLYGON, [1, 1, 4, 1, 4, "3"]]}, "mask: a polygon is not a flat list", REFUSED, REFUSED),
    ({"segmentation": [[1, 1, 4, 1, 4, float("inf")]]}, "mask: a polygon is not a flat list", REFUSED, REFUSED),
    ({"segmentation": [[1, 1, 10**400, 1, 4, 3]]}, "mask: a polygon is not a flat list", REFUSED, REFUSED),
    ({"segmentation": [[1, 1, 1e12, 1, 4, 3]]}, "mask: far outside the image", REFUSED, REFUSED),
    ({"segmentation": [[1, 1, 4, 1, 4, -81]]}, "mask: far outside the image", REFUSED, REFUSED),
    ({"segmentation": [[1, 1, 4, 1]]}, "mask: no polygon with three points", REFUSED, DROPPED),
    ({"segmentation": [[1, 1, 4, 1, 4, 3, 1]]}, "mask: no polygon with three points", REFUSED, DROPPED),
    ({"segmentation": [POLYGON, [1, 1, 4, 1]]}, "mask: a polygon without three points", NOTE, NOTE),
    ({"segmentation": [[1, 1, 4, 1, 2, 1]]}, "mask: no pixel", DROPPED, DROPPED),
    ({"segmentation": [[0.1, 0.2, 0.3, 0.2, 0.3, 0.4]]}, "mask: no pixel", DROPPED, DROPPED),
    ({"segmentation": [[20, 1, 24, 1, 24, 3]]}, "mask: outside the image", DROPPED, DROPPED),
    ({"segmentation": [[1, 1, 40, 1, 40, 3, 1, 3]]}, "mask: leaves the image", NOTE, NOTE),
    ({"segmentation": rle(48)}, "mask: no pixel", DROPPED, DROPPED),
    ({"segmentation": rle(*RUNS, size=(8, 6))}, "mask: an RLE of another size", REFUSED, REFUSED),
    ({"segmentation": {"size": [6.0, 8], "counts": [48]}}, "mask: an RLE of another size", REFUSED, REFUSED),
    ({"segmentation": {"size": 6, "counts": [48]}}, "mask: an RLE without size or counts", REFUSED, REFUSED),
    ({"segmentation": {"size": list(SIZE)}}, "mask: an RLE without size or counts", REFUSED, REFUSED),
    ({"segmentation": rle(7, 2)}, "mask: an RLE whose runs do not cover", REFUSED, REFUSED),
    ({"segmentation": {"size": list(SIZE), "counts": [7, None]}}, "mask: an RLE whose runs", REFUSED, REFUSED),
    ({"segmentation": {"size": list(SIZE), "counts": COMPRESSED[:-2]}}, "mask: an RLE whose runs", REFUSED, REFUSED),
    ({"segmentation": {"size": list(SIZE), "counts": "é" * 9}}, "mask: an RLE whose runs", REFUSED, REFUSED),
    ({"segmentation": {"size": list(SIZE), "counts": "o" * 40 + "0"}}, "mask: an RLE whose runs", REFUSED, REFUSED),
    ({"segmentation": {"size": list(SIZE), "counts": 3}}, "mask: an RLE whose counts", REFUSED, REFUSED),
    ({"area": None}, "area: missing or not positive", NOTE, NOTE),
    ({"area": 0}, "area: missing or not positive", NOTE, NOTE),
    ({"area": 30}, "area: is not its mask's", NOTE, NOTE),
]


def test_the_quick_look_passes_nothing_that_the_rules_object_to() -> None:
    several: Json = {"segmentation": [POLYGON, [5, 1, 7, 1, 7, 4, 5, 4]], "bbox": [1, 1, 6, 3], "area": 12}
    changes = [
        {},
        several,
        {"iscrowd": 1, "box_supervised": False, "box_weight": 0.5},
        *(change for change, *_ in DAMAGES),
    ]
    annotations = [{**SOUND, **change} for change in changes]
    for one in annotations[3:]:  # each fault alone, as some make the quick look give up
        for with_masks in (True, False):
            rules = Rules(categories=CATEGORIES, with_masks=with_masks, scored=True, in_file=True)
            fine = look([[*annotations[:3], one]], [SIZE], rules).fine.tolist()
            assert not (fine[3] and rules.problems(one, SIZE))
            assert fine[:3] == [True] * 3 or not any(fine)


def test_the_quick_look_passes_what_is_sound() -> None:
    generator = np.random.default_rng(0)
    annotations = []
    for _ in range(50):
        left, top, width, height = generator.uniform(1, 20, 4).round(2).tolist()
        box, corners = [left, top, width, height], [left, top, left + width, top, left + width, top + height]
        annotations.append({**SOUND, "segmentation": [corners], "bbox": box, "area": width * height / 2})
    without = [{key: each[key] for key in ("id", "category_id", "bbox", "area")} for each in annotations]
    for with_masks, listed in ((True, annotations), (False, annotations), (False, without)):
        rules = Rules(categories=CATEGORIES, with_masks=with_masks, scored=True, in_file=True)
        least = np.array([each["area"] * (1 if with_masks else 2) > 4.1 for each in listed])
        looked = look([listed], [(50, 50)], rules)
        assert looked.fine.tolist() == looked.kept.tolist() == least.tolist()
        assert not look([listed], [None], rules).fine.any()


@pytest.mark.parametrize("compiled", [True, False])
def test_masks_are_measured_from_their_text(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(screen, "COMPILED", False)
    triangles = b" [[1,1 , 4,1, 4,3]\n,[-2.5E-1,0,1e1,0,0,+6]]".replace(b"+", b"")
    good = {
        b"[[1,1,4,1,4,3,1,3]]": (1, 1, 4, 3, 6),
        triangles: (-0.25, 0, 10, 6, 3 + 30.75),
        b"[[0,0,0,0,0,0]]": (0,) * 5,
    }
    other = (b"[]", b"null", b"{}", b"5", b"[5]", b"[[]]", b"[[1,1,4,1]]", b"[[1,1,4,1,4,3,1]]", b'[[1,1,4,1,4,"3"]]')
    other += (
        b"[[1,1,4,1,4,[3]]]",
        b"[[1,1,4,1,4,null]]",
        b"[[1,1,4,1,4,1e999]]",
        b"[[1,1,4,1,4,3],[]]",
        b'{"size": [6, 8]}',
    )
    extent, area = screen._measured([*good, *other])
    measured = np.stack((*extent, area), 1)
    assert measured[:3] == pytest.approx(np.array(list(good.values())))
    assert not np.isfinite(measured[3:]).all(1).any()
    assert screen._measured([])[0].shape == (4, 0)


def test_the_quick_look_changes_neither_problems_nor_counts(coco, write_coco, monkeypatch):
    finite = [change for change, *_ in DAMAGES if all(text not in repr(change) for text in ("nan", "inf", "0" * 99))]
    changes: list[Json] = [*finite, {"iscrowd": 1}, {"iscrowd": True}, {"category_id": 3}, {"category_id": 3}]
    damaged = [{**SOUND, **change, "id": 100 + i, "image_id": 1} for i, change in enumerate(changes)]
    sound = [{**SOUND, "id": 10 + i, "image_id": 2, "category_id": label} for i, label in enumerate((3, 7))]
    coco["annotations"] = [sound[0], *damaged, sound[1]]
    file = open_file("mine", *map(str, write_coco(coco)))
    lists = replace(file, pictures=[replace(each, annotations=list(each.annotations)) for each in file.pictures])
    assert isinstance(file.pictures[0].annotations, Annotations)
    for with_masks in (True, False):
        rules = file.rules(with_masks=with_masks, scored=True)
        seen = []
        for dataset in (file, lists):
            counts = Counts(dataset.classes)
            seen.append((list(dataset.problems(rules, counts)), vars(counts)))
        with monkeypatch.context() as patch:
            patch.setattr(
                "dimaskdino.data.validation.dataset.look", lambda images, *_: look(images, [], Rules(categories={}))
            )
            counts = Counts(lists.classes)
            alone = list(lists.problems(rules, counts)), vars(counts)
        assert seen == [alone] * 2
        assert counts.images_with_any == 2
        assert counts.objects[3, "kept"] >= 1


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"iscrowd": 1},
        {"area": 30},
        {"area": None},
        {"category_id": 5},
        {"category_id": 7.0},
        {"bbox": SOUND["bbox"]},
        SOUND,
    ],
)
def test_objects_beside_a_doubtful_one_are_counted_without_a_look_at_them(change, coco, write_coco, monkeypatch):
    others = [{**SOUND, "id": label, "image_id": 2, "category_id": label} for label in CATEGORIES]
    last = {**SOUND, "segmentation": [[5, 1, 7, 1, 7, 4, 5, 4]], "bbox": [5, 1, 2, 3], **change, "image_id": 2}
    coco["annotations"] = [*others, last]
    file = open_file("mine", *map(str, write_coco(coco)))
    seen: list[Any] = []
    for looked in (look, lambda images, *_: look(images, [], Rules(categories={}))):
        monkeypatch.setattr("dimaskdino.data.validation.dataset.look", looked)
        counts = Counts(file.classes)
        seen.append((list(file.problems(file.rules(with_masks=True, scored=True), counts)), vars(counts)))
    assert seen[0] == seen[1]
    images = seen[0][1]["images"]
    assert (images[3], images[7], seen[0][1]["images_with_any"]) == (1, 1, 1)


@pytest.mark.parametrize(("change", "kind", "scored", "trained"), DAMAGES)
def test_each_fault_is_found_at_its_level(change: Json, kind: str, scored: Level, trained: Level) -> None:
    for use, level in ((True, scored), (False, trained)):
        levels = [given for name, given in found(change, scored=use) if name.startswith(kind)]
        assert levels == [level]


@pytest.mark.parametrize(
    ("change", "kind", "level"),
    [
        ({"bbox": None}, "box: missing", REFUSED),
        ({"bbox": [1, 1, -3, 2]}, "box: width or height is not positive", REFUSED),
        ({"bbox": [1, 1, 0, 2]}, "box: no pixel", DROPPED),
        ({"bbox": [0.2, 0.2, 0.5, 0.6]}, "box: no pixel", DROPPED),
        ({"bbox": [9, 1, 3, 2]}, "box: outside the image", DROPPED),
        ({"bbox": [3, 3, 6, 5]}, "box: reads as x1, y1, x2, y2", NOTE),
    ],
)
def test_object_without_mask_is_judged_by_its_box(change: Json, kind: str, level: Level) -> None:
    change = {"segmentation": [], **change}
    assert (kind, level) in found(change, with_masks=False, scored=False)
    assert found({"segmentation": []}, with_masks=False) == set()


def test_crowd_needs_box_and_mask_only_where_scored() -> None:
    crowd = {"iscrowd": 1, "segmentation": [], "bbox": None}
    assert found(crowd) == {("box: missing", REFUSED), ("mask: missing", REFUSED)}
    assert found(crowd, scored=False) == set()


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"bbox_mode": None}, "box: unknown bbox_mode"),
        ({"bbox_mode": BoxMode.XYWHA_ABS}, "box: unknown bbox_mode"),
        ({"bbox": [4, 3, 3, 2], "bbox_mode": BoxMode.XYXY_ABS}, "box: width or height is not positive"),
    ],
)
def test_boxes_of_functions_need_a_mode_where_scored(change: Json, kind: str) -> None:
    change = {"bbox_mode": BoxMode.XYWH_ABS, **change}
    assert (kind, REFUSED) in found(change, in_file=False)
    assert (kind, NOTE) in found(change, in_file=False, scored=False)


def test_arrays_and_tuples_pass_as_lists_do() -> None:
    change: Json = {"bbox": np.array([1, 1, 3, 2]), "bbox_mode": BoxMode.XYWH_ABS, "category_id": np.int64(7)}
    change |= {"segmentation": [np.array(POLYGON), tuple(POLYGON)], "iscrowd": np.bool_(False)}
    assert found(change, in_file=False) == set()
    assert ("mask: an array", REFUSED) in found({"segmentation": np.ones(SIZE)})


def test_size_need_not_be_known() -> None:
    assert found({"segmentation": rle(7, 2)}, size=None) == set()
    assert found({"segmentation": [[1, 1, 1e12, 1, 4, 3]]}, size=None) == {("mask: far outside the image", REFUSED)}


def test_run_lengths_are_those_that_pycocotools_compresses() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        height, width = (int(side) for side in rng.integers(1, 90, 2))
        mask = np.asfortranarray(rng.random((height, width)) < rng.random() ** 2, dtype=np.uint8)
        compressed = mask_util.encode(mask)
        runs = run_lengths(compressed["counts"]).tolist()
        assert mask_util.frPyObjects(rle(*runs, size=mask.shape), height, width) == compressed
        assert np.array_equal(mask_util.decode(checked_rle(compressed, mask.shape)), mask)


@pytest.mark.parametrize(("change", "kind", "scored", "trained"), DAMAGES)
def test_mapper_start_and_tool_find_the_same(change, kind, scored, trained, cfg, coco, write_coco, caplog):
    coco["annotations"][0].update(change)
    sound = [{**SOUND, "id": number, "image_id": 2} for number in range(20, 40)]
    coco["annotations"] += sound
    register_coco_instances("mine", {}, *(str(path) for path in write_coco(coco)))
    cfg.merge_from_list(["DATASETS.TRAIN", ("mine",), "DATASETS.TEST", ("mine",), "DATASETS.MAX_DROPPED_SHARE", 1.0])
    findings = inspect_dataset("mine").findings
    assert any(finding.kind.startswith(kind) and "annotation 11 of one.png" in finding.where for finding in findings)
    for which, level in (({"train": False}, scored), ({"test": False}, trained)):
        caplog.clear()
        if level is REFUSED:
            with pytest.raises(DatasetError, match="annotation 11 of one.png") as error:
                check_datasets(cfg, **which)
            assert kind in str(error.value)
            assert "tools/check_dataset.py mine" in str(error.value)
        else:
            check_datasets(cfg, **which)
            assert kind in caplog.text
    if trained is REFUSED and kind not in ("mask: missing",) and not kind.startswith("category"):
        with pytest.raises(DatasetError, match="Annotation 11 of .*one.png: ") as error:
            build_mapper(cfg, is_train=True)(load_dataset("mine")[0])
        assert kind in str(error.value)


def test_text_and_nested_values_never_reach_the_mapper(registrations: None, cfg: Config) -> None:
    entry: Any = {"file_name": "x.png", "image_id": 1, "annotations": []}
    DatasetCatalog.register("function", lambda: [entry])
    MetadataCatalog.get("function").thing_classes = ["ball", "box"]
    cfg.merge_from_list(["DATASETS.TRAIN", ("function",)])
    for label in ("box", None, [1], {"id": 1}, True, 2, -1):
        entry["annotations"] = [{"category_id": label, "segmentation": [POLYGON]}]
        with pytest.raises(DatasetError, match=r"annotation number 0.* of x\.png: category: unknown.*known ids: 0, 1"):
            check_datasets(cfg, test=False)
