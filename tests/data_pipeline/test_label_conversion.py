"""datasets/prepare_*.py: label maps are shifted and numbered right, once, by any number of processes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dimaskdino.data.label_maps import read_label_map
from tests.data_pipeline.label_maps import SEGMENTS, label_map, write_panoptic
from tests.data_pipeline.scripts import run_script

pytestmark = pytest.mark.usefixtures("forked_workers")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a script on a folder of datasets; returns what it says."""

    def run(script: str, root: Path, *options: object, status: int = 0) -> str:
        assert run_script(monkeypatch, f"datasets/{script}", "--root", root, *options) == status
        output = capsys.readouterr()
        return output.err if status else output.out

    return run


def write(path: Path, labels: list[list[int]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(labels, dtype=np.uint8)).save(path)
    return path


def test_ade20k_is_shifted_once_and_resumed(run, tmp_path):
    folder = tmp_path / "ADEChallengeData2016"
    for number in range(3):
        write(folder / "annotations" / "validation" / f"{number}.png", [[0, 1, number], [150, 2, 0]])
    assert "3 label maps made" in run("prepare_ade20k_sem_seg.py", tmp_path, "--splits", "val", "--workers", "2")
    made = folder / "annotations_detectron2" / "validation"
    assert read_label_map(str(made / "2.png")).tolist() == [[255, 0, 1], [149, 1, 255]]
    first = {path.name: path.read_bytes() for path in made.iterdir()}
    (made / "1.png").unlink()
    assert "1 label maps made, 2 were there already" in run("prepare_ade20k_sem_seg.py", tmp_path, "--splits", "val")
    assert {path.name: path.read_bytes() for path in made.iterdir()} == first


@pytest.mark.parametrize(
    ("labels", "words"), [([[151]], ["0.png", "label 151"]), (None, ["annotations/validation", "--root"])]
)
def test_ade20k_that_cannot_be_used_is_named(run, labels, words, tmp_path):
    if labels:
        write(tmp_path / "ADEChallengeData2016" / "annotations" / "validation" / "0.png", labels)
    error = run("prepare_ade20k_sem_seg.py", tmp_path, "--splits", "val", status=2)
    assert [word for word in words if word not in error] == []
    assert "Traceback" not in error


@pytest.mark.parametrize("labels", [None, [[1, 2, 3]]])
def test_earlier_map_that_does_not_fit_is_made_again(run, labels, tmp_path):
    folder = tmp_path / "ADEChallengeData2016"
    write(folder / "annotations" / "validation" / "0.png", [[0, 1], [150, 2]])
    run("prepare_ade20k_sem_seg.py", tmp_path, "--splits", "val")
    made = folder / "annotations_detectron2" / "validation" / "0.png"
    whole = made.read_bytes()
    if labels:
        write(made, labels)
    else:
        made.write_bytes(b"")
    error = run("prepare_ade20k_sem_seg.py", tmp_path, "--splits", "val", "--workers", 1, status=2)
    assert str(made) in error
    assert "--force" in error
    run("prepare_ade20k_sem_seg.py", tmp_path, "--splits", "val", "--force")
    assert made.read_bytes() == whole
    assert [path.name for path in made.parent.iterdir()] == ["0.png"]


def test_cityscapes_keeps_its_19_classes(run, tmp_path):
    ids = np.arange(35).reshape(5, 7).tolist()
    source = write(tmp_path / "cityscapes/gtFine/val/ulm/ulm_0_gtFine_labelIds.png", ids)
    run("prepare_cityscapes_sem_seg.py", tmp_path, "--splits", "val")
    made = source.with_name("ulm_0_gtFine_labelTrainIds.png")
    # trainId by id, as cityscapesScripts lists them.
    assert read_label_map(str(made)).tolist() == [
        [255, 255, 255, 255, 255, 255, 255],
        [0, 1, 255, 255, 2, 3, 4],
        [255, 255, 255, 5, 255, 6, 7],
        [8, 9, 10, 11, 12, 13, 14],
        [15, 255, 255, 16, 17, 18, 255],
    ]


@pytest.mark.usefixtures("registrations")
def test_coco_becomes_semantic_but_for_crowds(run, tmp_path):
    keys = write_panoptic(tmp_path / "coco")
    content = json.loads(Path(keys["DATASETS.PANOPTIC.VAL_JSON"]).read_text())
    # Persons, cars and grass, as COCO numbers them.
    ids, classes = {0: 1, 4: 3, 9: 193}, {0: 0, 4: 2, 9: 125}
    content["categories"] = [{**each, "id": ids[each["id"]]} for each in content["categories"]]
    for annotation in content["annotations"]:
        for segment in annotation["segments_info"]:
            segment["category_id"] = ids[segment["category_id"]]
    (tmp_path / "coco" / "annotations").mkdir()
    (tmp_path / "coco" / "annotations" / "panoptic_val2017.json").write_text(json.dumps(content))
    (tmp_path / "coco" / "labels").rename(tmp_path / "coco" / "panoptic_val2017")
    assert "2 label maps made" in run("prepare_coco_semantic.py", tmp_path, "--splits", "val")
    for number, segments in enumerate(SEGMENTS, start=1):
        values = [255 if crowd else list(classes.values())[label] for label, crowd, _ in segments]
        made = read_label_map(str(tmp_path / "coco" / "panoptic_semseg_val2017" / f"{number}.png"))
        assert np.array_equal(made, label_map(segments, values, 255))


@pytest.mark.usefixtures("registrations")
@pytest.mark.parametrize(
    ("annotations", "words"),
    [
        ([], ["--root"]),
        ([{"image_id": 1, "bbox": [0, 0, 1, 1]}], ["panoptic_val2017.json", "segments_info"]),
        (
            [{"file_name": "1.png", "segments_info": [{"id": 7, "category_id": 500}]}],
            ["panoptic_val2017/1.png", "category id 500"],
        ),
    ],
)
def test_coco_that_cannot_be_used_is_named(run, annotations, words, tmp_path):
    folder = tmp_path / "coco"
    (folder / "annotations").mkdir(parents=True)
    (folder / "annotations" / "panoptic_val2017.json").write_text(json.dumps({"annotations": annotations}))
    (folder / "panoptic_val2017").mkdir()
    Image.fromarray(np.array([[[7, 0, 0]]], dtype=np.uint8)).save(folder / "panoptic_val2017" / "1.png")
    error = run("prepare_coco_semantic.py", tmp_path, "--splits", "val", status=2)
    assert [word for word in words if word not in error] == []
    assert "Traceback" not in error


@pytest.mark.usefixtures("registrations")
def test_the_check_reads_label_maps_of_datasets_named_by_keys(monkeypatch, capsys, tmp_path):
    keys = [item for pair in write_panoptic(tmp_path / "set").items() for item in pair]
    arguments = ["panoptic_val", "--draw", 2, "--output", tmp_path / "out", "--keys", *keys]
    assert run_script(monkeypatch, "tools/check_dataset.py", *arguments) == 0
    output = capsys.readouterr().out
    assert "| cell    |      176 |          3 |        2 |" in output
    assert "No problem was found" in output
    assert sorted(path.name for path in (tmp_path / "out" / "panoptic_val").iterdir()) == ["1.png", "2.png"]
    (tmp_path / "set" / "labels" / "2.png").unlink()
    assert run_script(monkeypatch, "tools/check_dataset.py", *arguments) == 1
    assert "label map cannot be used" in capsys.readouterr().out
