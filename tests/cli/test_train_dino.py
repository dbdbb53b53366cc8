"""train_net.py trains and evaluates DINO, on a dataset that has boxes alone."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import TINY

SCRIPT = "train_net.py"
OWN_DATA = """
from detectron2.data.datasets import register_coco_instances

for part in ("train", "val"):
    register_coco_instances(f"boxes_{part}", {}, f"{ROOT}/annotations/boxes_{part}.json", f"{ROOT}/{part}")
"""
SMALL = [
    *("MODEL.DINO.HIDDEN_DIM", "64", "MODEL.DINO.DIM_FEEDFORWARD", "32", "MODEL.DINO.NUM_QUERIES", "20"),
    *("MODEL.DINO.ENC_LAYERS", "1", "MODEL.DINO.DEC_LAYERS", "2", "MODEL.DINO.DN_NUM", "8"),
    *("INPUT.MIN_SIZE_TRAIN", "(56, 64)", "INPUT.MAX_SIZE_TRAIN", "64"),
]


@pytest.fixture
def dino(shapes_root: Path, tmp_path: Path) -> list[str]:
    """Arguments of a tiny run of DINO on the CPU."""
    options = [*TINY, *SMALL, "DATASETS.SHAPES.ROOT", str(shapes_root), "OUTPUT_DIR", str(tmp_path / "run")]
    return ["--num-gpus", "0", "--config-file", "configs/demo/dino_shapes.yaml", *options]


def drop_masks(folder: Path, part: str) -> None:
    """Write the annotations of a part of shapes again, without masks."""
    content = json.loads((folder / "annotations" / f"instances_{part}.json").read_text())
    content["annotations"] = [
        {key: value for key, value in each.items() if key != "segmentation"} for each in content["annotations"]
    ]
    (folder / "annotations" / f"boxes_{part}.json").write_text(json.dumps(content))


def test_dino_trains_resumes_and_evaluates_boxes(run, dino: list[str], tmp_path: Path) -> None:
    assert run(SCRIPT, *dino).status == 0
    folder = tmp_path / "run"
    results = json.loads((folder / "inference" / "results.json").read_text())
    assert "AP" in results["bbox"]
    assert "segm" not in results
    losses = json.loads((folder / "metrics.json").read_text().splitlines()[0])
    assert {"loss_ce", "loss_bbox_0", "loss_giou_interm", "loss_ce_dn_0"} <= set(losses)
    assert run(SCRIPT, "--resume", *dino, "SOLVER.MAX_ITER", 4).status == 0
    evaluation = ["--eval-only", "--eval-layers", "all", *dino, "MODEL.WEIGHTS", folder / "model_final.pth"]
    evaluated = run(SCRIPT, *evaluation, "OUTPUT_DIR", tmp_path / "evaluation")
    assert evaluated.status == 0
    rows = json.loads((tmp_path / "evaluation" / "inference" / "layers.json").read_text())
    assert [row["stage"] for row in rows] == ["interm", "layer.0", "layer.1"]
    assert "segm" not in evaluated.out


def test_a_dataset_without_masks_is_enough(run, dino, tmp_path, monkeypatch):
    dino += ["DATASETS.SHAPES.ROOT", str(tmp_path / "shapes")]
    assert run(SCRIPT, *dino, "SOLVER.MAX_ITER", 1).status == 0  # makes the shapes
    (file,) = (tmp_path / "shapes").rglob("instances_train.json")
    folder = file.parents[1]
    for part in ("train", "val"):
        drop_masks(folder, part)
    (tmp_path / "own_boxes.py").write_text(OWN_DATA.replace("{ROOT}", str(folder)))
    monkeypatch.syspath_prepend(tmp_path)
    data = ["DATASETS.TRAIN", "('boxes_train',)", "DATASETS.TEST", "('boxes_val',)"]
    finished = run(SCRIPT, "--import", "own_boxes", *dino, *data, "OUTPUT_DIR", tmp_path / "boxes")
    assert finished.status == 0, finished.err
    results = json.loads((tmp_path / "boxes" / "inference" / "results.json").read_text())
    assert set(results["bbox"]) >= {"AP", "AP50", "APs"}
    assert "segm" not in results
