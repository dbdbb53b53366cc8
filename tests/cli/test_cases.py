"""Users' reports, from the command line: train_net.py and check_dataset.py end on each input as its user expects."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

CASES = Path(__file__).parents[1] / "data" / "cases"
REGISTRATION = """
from detectron2.data.datasets import register_coco_instances

register_coco_instances("{name}", {{}}, r"{file}", r"{images}")
"""


@dataclass(frozen=True)
class Case:
    """What becomes of a case."""

    folder: str  # the number that the name of its folder begins with
    status: int  # of train_net.py
    words: tuple[str, ...]  # parts of what train_net.py prints
    keys: tuple[object, ...] = ()
    file: str = "train.json"  # the annotations, for training and testing
    checked: int | None = 0  # the status of tools/check_dataset.py; None where the case is not about the dataset


GRAY = ("INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", "[127.5]", "MODEL.PIXEL_STD", "[64.0]")
COCO = ("DATASETS.TRAIN", "('coco_2017_train',)", "DATASETS.TEST", "()")
WORKED = ("box", "mask", "AP")
TABLE = {
    "EXIF turns": Case("01", 2, ("EXIF", "INPUT.APPLY_EXIF False", "part_01.jpg"), checked=1),
    "EXIF, pixels as stored": Case("01", 0, WORKED, ("INPUT.APPLY_EXIF", False), checked=1),
    "EXIF mirrors": Case("01", 0, ("1 of them", "mirrors", "False the pixels as stored"), file="val.json"),
    "more than 100": Case("02", 0, ("AP@176", "TEST.DETECTIONS_PER_IMAGE"), file="val.json", checked=None),
    "Windows paths": Case("07", 2, ("backslashes",), checked=1),
    "text category id": Case("08", 2, ("'2'", "annotation 1 of part_01.png"), checked=1),
    "byte order mark": Case("12", 0, WORKED),
    "gray photos": Case("14", 0, WORKED),
    "gray format": Case("14", 0, WORKED, GRAY),
    "gray colors": Case("14", 2, ("INPUT.COLOR_AUG_SSD", "INPUT.FORMAT"), (*GRAY, "INPUT.COLOR_AUG_SSD", True)),
    "own data named COCO": Case("18", 2, ("under a name of its own",), COCO, checked=1),
    "classes of Mask R-CNN": Case("21", 0, ("MODEL.ROI_HEADS.NUM_CLASSES 3",), ("MODEL.ROI_HEADS.NUM_CLASSES", 3)),
    "scores of Mask R-CNN": Case("21", 0, ("have no effect",), ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.9)),
    "mixed images": Case("23", 2, ("part_06.tif", "8 bits"), file="val.json", checked=1),
    "Chinese names": Case("26", 0, ("螺栓",)),
    "normalized polygons": Case("27", 2, ("normalized", "DATASETS.MAX_DROPPED_SHARE"), checked=1),
    "text ids": Case("31", 0, WORKED),
    "merged files": Case("32", 2, ("image id 1 of monday/part_01.png and tuesday/part_01.png",), checked=1),
}
# The class order is a case of two files, and Cityscapes one of a package; both are quick.
ELSEWHERE = {"06": "tests/cli/test_cases.py", "29": "tests/data_pipeline/test_cases.py"}


def folder_of(number: str) -> Path:
    (folder,) = CASES.glob(f"{number}-*")
    return folder


@pytest.fixture
def arguments(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[object]]]:
    """The name of the case's dataset, and the keys that name it; images that the case does without are blank."""
    folder = folder_of(case.folder)
    if case.keys == COCO:
        monkeypatch.setenv("DETECTRON2_DATASETS", str(folder))
        yield "coco_2017_train", []
        return
    images, content = folder / "images", json.loads((folder / case.file).read_bytes().decode("utf-8-sig"))
    if not images.is_dir():
        images = tmp_path / "images"
        images.mkdir()
        for each in content["images"]:
            Image.new("RGB", (each["width"], each["height"])).save(images / each["file_name"])
    name = f"case_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(REGISTRATION.format(name=name, file=folder / case.file, images=images))
    monkeypatch.syspath_prepend(tmp_path)
    classes = len(content["categories"])
    names = ["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)"]
    yield name, [*names, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", classes]
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop(name, None)


def test_every_case_has_an_outcome() -> None:
    numbers = {folder.name[:2] for folder in CASES.iterdir() if folder.is_dir()}
    assert {case.folder for case in TABLE.values()} | {*ELSEWHERE} == numbers
    assert all(f"{number}-" in Path(CASES.parents[2] / file).read_text() for number, file in ELSEWHERE.items())


@pytest.mark.cases
@pytest.mark.slow
@pytest.mark.parametrize("case", TABLE.values(), ids=TABLE.keys())
def test_case_ends_as_its_user_expects(case, arguments, run, tiny, tmp_path):
    name, keys = arguments
    imports = ["--import", name] if keys else []
    trained = run("train_net.py", *imports, *tiny, *keys, *case.keys, "TEST.EVAL_LAYERS", "[]")
    printed = trained.out + trained.err
    assert trained.status == case.status, printed
    for part in case.words:
        assert part in printed
    if case.status:
        assert trained.err.strip().splitlines()[-1].startswith("error: ")
    if case.checked is not None:
        drawn = ("--draw", 2, "--output", tmp_path / "drawn")
        checked = run("tools/check_dataset.py", name, *imports, *drawn)
        assert checked.status == case.checked, checked.out + checked.err


@pytest.mark.cases
def test_eval_only_refuses_classes_in_another_order(run, tiny, tmp_path, monkeypatch):
    for number in (1, 2):
        Image.new("RGB", (96, 64)).save(tmp_path / f"part_0{number}.png")
    folder = CASES / "06-class-order"
    parts = [
        REGISTRATION.format(name=f"order_{split}", file=folder / f"{split}.json", images=tmp_path)
        for split in ("train", "val")
    ]
    (tmp_path / "order_data.py").write_text("".join(parts))
    (tmp_path / "unread.pth").touch()
    monkeypatch.syspath_prepend(tmp_path)
    names = ["DATASETS.TRAIN", "('order_train',)", "DATASETS.TEST", "('order_val',)"]
    try:
        finished = run(
            *("train_net.py", "--eval-only", "--import", "order_data", *tiny, *names),
            *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3, "MODEL.WEIGHTS", tmp_path / "unread.pth"),
        )
    finally:
        for name in ("order_train", "order_val"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    assert finished.status == 2
    message = finished.err.strip().splitlines()[-1]
    for part in ("order_train", "order_val", "1 'nut', 2 'washer'", "1 'washer', 2 'nut'"):
        assert part in message
