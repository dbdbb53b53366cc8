"""datasets/prepare_*.py: label maps are shifted and numbered right, once, by any number of processes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dimaskdino.data.label_maps import read_label_map

ROOT = Path(__file__).parents[2]


def run(script: str, root: Path, *options: str, status: int = 0) -> str:
    command = [sys.executable, str(ROOT / "datasets" / script), "--root", str(root), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def write(path: Path, labels: list[list[int]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(labels, dtype=np.uint8)).save(path)
    return path


def test_ade20k_is_shifted_once_and_resumed(tmp_path):
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
def test_ade20k_that_cannot_be_used_is_named(labels, words, tmp_path):
    if labels:
        write(tmp_path / "ADEChallengeData2016" / "annotations" / "validation" / "0.png", labels)
    error = run("prepare_ade20k_sem_seg.py", tmp_path, "--splits", "val", status=2)
    assert [word for word in words if word not in error] == []
    assert "Traceback" not in error


def test_cityscapes_keeps_its_19_classes(tmp_path):
    source = write(
        tmp_path / "cityscapes/gtFine/val/ulm/ulm_0_gtFine_labelIds.png", [[7, 8, 33], [0, 4, 34], [1, 26, 18]]
    )
    run("prepare_cityscapes_sem_seg.py", tmp_path, "--splits", "val")
    made = source.with_name("ulm_0_gtFine_labelTrainIds.png")
    assert read_label_map(str(made)).tolist() == [[0, 1, 18], [255, 255, 255], [255, 13, 255]]
