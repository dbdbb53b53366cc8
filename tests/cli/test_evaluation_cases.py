"""train_net.py --eval-only on datasets that would give a plausible wrong number."""

from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

CASES = Path(__file__).parents[1] / "data" / "cases"
REGISTRATION = """
from detectron2.data.datasets import register_coco_instances

for split in ("train", "val"):
    register_coco_instances(f"order_{{split}}", {{}}, f"{case}/{{split}}.json", "{images}")
"""


@pytest.mark.cases
def test_eval_only_refuses_classes_in_another_order(run, tiny, tmp_path, monkeypatch):
    for number in (1, 2):
        Image.new("RGB", (96, 64)).save(tmp_path / f"part_0{number}.png")
    (tmp_path / "order_data.py").write_text(REGISTRATION.format(case=CASES / "06-class-order", images=tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    names = ["DATASETS.TRAIN", "('order_train',)", "DATASETS.TEST", "('order_val',)"]
    try:
        finished = run(
            *("train_net.py", "--eval-only", "--import", "order_data", *tiny, *names),
            *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3, "MODEL.WEIGHTS", "absent.pth"),
        )
    finally:
        for name in ("order_train", "order_val"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    assert finished.status == 2
    message = finished.err.strip().splitlines()[-1]
    for part in ("order_train", "order_val", "1 'nut', 2 'washer'", "1 'washer', 2 'nut'"):
        assert part in message
