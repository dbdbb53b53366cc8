"""tools/own_data.py from a folder of photos and a COCO file to a checkpoint, a table and drawings."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from dimaskdino.data.datasets.shapes import ShapesSpec, annotation_file, make_shapes
from tests.data_pipeline.scripts import REPO

SCRIPT = "tools/own_data.py"


def write_photos(folder: Path) -> tuple[Path, Path]:
    """Four synthetic pictures with two of their classes."""
    made = make_shapes(folder, ShapesSpec(num_train=4, num_val=1, image_size=64))
    coco = json.loads(annotation_file(made, "train").read_text())
    coco["annotations"] = [each | {"category_id": 7 + each["category_id"] % 2} for each in coco["annotations"]]
    coco["categories"] = [{"id": 7, "name": "even"}, {"id": 8, "name": "odd"}]
    (folder / "labels.json").write_text(json.dumps(coco))
    return made / "train", folder / "labels.json"


def test_photos_become_a_checkpoint_a_table_and_drawings(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})  # no other process
    photos, labels = write_photos(tmp_path)
    output = tmp_path / "own"
    keys = ["SOLVER.AUTO_SCHEDULE.MIN_ITER", 2, "SOLVER.AUTO_SCHEDULE.EPOCHS", 1, "DATALOADER.NUM_WORKERS", 0]
    keys += ["INPUT.IMAGE_SIZE", 64, "INPUT.MIN_SIZE_TEST", 64, "SOLVER.IMS_PER_BATCH", 2, "LOG.PICTURES", 0]
    small = ["--config-file", REPO / "configs/own_data_cpu.yaml", "--weights", REPO / "tools/demo_model.pth"]
    flags = [*small, "--output", output, "--num-gpus", 0, "--pictures", 2]
    finished = run(SCRIPT, photos, labels, *flags, *keys)
    assert finished.status == 0, finished.err
    assert "SOLVER.MAX_ITER 2" in finished.out
    # The demo's model has six classes.
    assert "Fine-tuning from 6 classes to 2" in finished.out
    for part in ("class_embed", "label_embed", "| box ", "| mask ", f"pictures:   {output / 'predictions.png'}"):
        assert part in finished.out
    assert (output / "model_final.pth").is_file()
    with Image.open(output / "predictions.png") as picture:
        assert min(picture.size) > 400


def test_paths_are_checked_before_processes_start(run, tmp_path: Path) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text("{}")
    for paths, key in (
        ((tmp_path / "nowhere", labels), "TRAIN_IMAGES"),
        ((tmp_path, tmp_path / "none.json"), "TRAIN_JSON"),
        ((tmp_path, labels, "--val-json", tmp_path), "VAL_JSON"),
    ):
        refused = run(SCRIPT, *paths)
        assert refused.status == 2
        assert f"DATASETS.{key} names " in refused.err.splitlines()[-1]
