"""train_net.py from the command line: whole runs, and one line for each mistake."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from dimaskdino.config.reader import _REGISTERED
from tests.data_pipeline.scripts import REPO

SCRIPT = "train_net.py"
OWN_BATO = """
import torch
from dimaskdino.modeling.bato import BalanceAwareTokensOptimization
from dimaskdino.modeling.registry import BATO_REGISTRY


@BATO_REGISTRY.register()
class OwnBato(BalanceAwareTokensOptimization):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.own = torch.nn.Parameter(torch.tensor(torch.ones(()).item()))  # needs a real device

    def renew_mask_features(self, mask_features, finest_level):
        return self.own * super().renew_mask_features(mask_features, finest_level)
"""


def assert_one_error_line(finished, *parts: str) -> None:
    assert finished.status == 2
    lines = finished.err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in finished.err
    for part in parts:
        assert part in lines[-1]


def test_help_shows_flags_and_examples(run) -> None:
    finished = run(SCRIPT, "--help")
    assert finished.status == 0
    for flag in ("config-file", "num-gpus", "num-machines", "machine-rank", "dist-url", "resume", "eval-only"):
        assert f"--{flag}" in finished.out
    assert "--eval-layers" in finished.out
    assert "torchrun" in finished.out


def test_run_trains_evaluates_and_resumes(run, tiny: list[str], tmp_path: Path) -> None:
    assert run(SCRIPT, *tiny).status == 0
    folder = tmp_path / "run"
    for name in ("config.yaml", "log.txt", "metrics.json", "model_final.pth", "inference/results.json"):
        assert (folder / name).is_file(), name
    log = (folder / "log.txt").read_text()
    assert "eta" in log
    assert "No GPU is used: MODEL.DEVICE is set to cpu." in log

    resumed = run(SCRIPT, "--resume", *tiny, "SOLVER.MAX_ITER", 4)
    assert resumed.status == 0
    assert "Starting training from iteration 3" in resumed.out
    iterations = [json.loads(line)["iteration"] for line in (folder / "metrics.json").read_text().splitlines()]
    assert iterations == sorted(iterations)
    assert {2, 3} <= set(iterations)

    evaluation = ["--eval-only", "--eval-layers", "all", *tiny, "MODEL.WEIGHTS", folder / "model_final.pth"]
    evaluated = run(SCRIPT, *evaluation, "OUTPUT_DIR", tmp_path / "evaluation")
    assert evaluated.status == 0
    rows = json.loads((tmp_path / "evaluation" / "inference" / "layers.json").read_text())
    assert [row["stage"] for row in rows] == ["interm", "initial", "layer.0", "layer.1"]
    assert rows[-1]["bbox"] == json.loads((folder / "inference" / "results.json").read_text())["bbox"]
    assert "box - mask" in evaluated.out


def test_config_file_describes_the_checkpoints(run, tiny: list[str], tmp_path: Path) -> None:
    assert run(SCRIPT, *tiny).status == 0
    folder = tmp_path / "run"
    trained = (folder / "config.yaml").read_text()
    assert yaml.safe_load(trained)["SOLVER"]["MAX_ITER"] == 3

    other = [*tiny, "SOLVER.MAX_ITER", 5]
    assert_one_error_line(run(SCRIPT, *other, "DATASETS.TRAIN", "('shapes_trian',)"), "shapes_trian")
    assert_one_error_line(run(SCRIPT, *other, "MODEL.WEIGHTS", "absent.pth"), "absent.pth")
    assert run(SCRIPT, "--eval-only", "--resume", *tiny, "TEST.DETECTIONS_PER_IMAGE", 3).status == 0
    assert (folder / "config.yaml").read_text() == trained
    evaluated = yaml.safe_load((folder / "inference" / "config.yaml").read_text())
    assert evaluated["TEST"]["DETECTIONS_PER_IMAGE"] == 3

    assert run(SCRIPT, "--resume", *other).status == 0
    assert yaml.safe_load((folder / "config.yaml").read_text())["SOLVER"]["MAX_ITER"] == 5


def test_unknown_key_names_the_closest(run, tiny: list[str]) -> None:
    assert_one_error_line(run(SCRIPT, *tiny, "SOLVER.BASE_LRR", 1), "SOLVER.BASE_LRR", "Did you mean SOLVER.BASE_LR?")


def test_missing_configuration_is_named(run) -> None:
    assert_one_error_line(run(SCRIPT, "--config-file", "configs/none.yaml"), "configs/none.yaml")


def test_missing_dataset_names_the_folder(run, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    options = ["DATASETS.TRAIN", "('coco_2017_train',)", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 80]
    finished = run(SCRIPT, *tiny, *options)
    assert_one_error_line(finished, "coco_2017_train", str(tmp_path / "nowhere"), "DETECTRON2_DATASETS")


def test_unregistered_dataset_names_the_closest(run, tiny: list[str]) -> None:
    finished = run(SCRIPT, *tiny, "DATASETS.TRAIN", "('shapes_trian',)")
    assert_one_error_line(finished, "shapes_trian", "shapes_train")


def test_wrong_class_count_gives_both_numbers(run, tiny: list[str]) -> None:
    finished = run(SCRIPT, *tiny, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 5)
    assert_one_error_line(finished, "NUM_CLASSES is 5", "shapes_train has 6")


def test_unreadable_image_in_a_worker_is_named(run, tiny: list[str], tmp_path: Path) -> None:
    # A dataset of its own, since its images are broken here.
    options = [*tiny, "DATASETS.SHAPES.ROOT", tmp_path / "broken", "DATALOADER.NUM_WORKERS", 1]
    assert run(SCRIPT, *options, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()").status == 0
    images = sorted((tmp_path / "broken").glob("*/train/*.png"))
    for image in images[1:]:
        image.write_bytes(b"not an image")
    assert_one_error_line(run(SCRIPT, *options), ".png")


def test_evaluation_needs_weights(run, tiny: list[str], tmp_path: Path) -> None:
    assert_one_error_line(run(SCRIPT, "--eval-only", *tiny), "MODEL.WEIGHTS")
    missing = tmp_path / "absent.pth"
    assert_one_error_line(run(SCRIPT, "--eval-only", *tiny, "MODEL.WEIGHTS", missing), str(missing))


def test_absent_gpus_are_refused(run, tiny: list[str]) -> None:
    assert_one_error_line(run(SCRIPT, "--num-gpus", 99, *tiny[2:]), "--num-gpus is 99")


def test_imported_part_is_trained(run, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    tiny[tiny.index("--config-file") + 1] = str(REPO / "configs" / "demo" / "dimaskdino_shapes.yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_bato.py").write_text(OWN_BATO)
    arguments = [*tiny, "MODEL.MaskDINO.BATO.NAME", "OwnBato", "DATASETS.TEST", "()"]
    assert_one_error_line(run(SCRIPT, *arguments), "OwnBato")
    assert_one_error_line(run(SCRIPT, "--import", "own_batos", *arguments), "own_batos", str(tmp_path))
    assert run(SCRIPT, "--import", "own_bato", *arguments).status == 0
    weights = torch.load(tmp_path / "run" / "model_final.pth")["model"]
    assert any(name.endswith("bato.own") for name in weights)


OWN_KEYS = """
from dimaskdino.config import register_keys

register_keys({"MODEL.OWN_PART.WIDTHS": [8], "SOLVER.OWN_RATE": 0.5})
"""


def test_own_keys_are_in_the_run_and_read_back(run, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    tiny[tiny.index("--config-file") + 1] = str(REPO / "configs" / "demo" / "dimaskdino_shapes.yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_keys_of_run.py").write_text(OWN_KEYS)
    options = ["MODEL.OWN_PART.WIDTHS", "[16, 32]", "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()"]
    before = dict(_REGISTERED)
    try:
        assert run(SCRIPT, "--import", "own_keys_of_run", *tiny, *options).status == 0
        config = tmp_path / "run" / "config.yaml"
        written = yaml.safe_load(config.read_text())
        assert (written["IMPORTS"], written["MODEL"]["OWN_PART"]) == (["own_keys_of_run"], {"WIDTHS": [16, 32]})
        again = ["--num-gpus", "0", "--config-file", config, "--eval-only", "--resume"]
        assert run(SCRIPT, "--import", "own_keys_of_run", *again).status == 0
        wrong = run(SCRIPT, "--import", "own_keys_of_run", *again, "SOLVER.OWN_RAET", 1)
        assert_one_error_line(wrong, "SOLVER.OWN_RAET", "SOLVER.OWN_RATE")
    finally:
        _REGISTERED.clear()
        _REGISTERED.update(before)
        sys.modules.pop("own_keys_of_run", None)
    assert_one_error_line(run(SCRIPT, *again), str(config), "MODEL.OWN_PART.WIDTHS", "--import own_keys_of_run")


def test_unusable_output_folder_is_named(run, tiny: list[str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    for folder in (file, file / "run"):
        assert_one_error_line(run(SCRIPT, *tiny, "OUTPUT_DIR", folder), f"OUTPUT_DIR {folder} cannot be written")
    taken = tmp_path / "run" / "config.yaml"
    taken.mkdir(parents=True)
    assert_one_error_line(run(SCRIPT, *tiny), str(taken))


@pytest.mark.parametrize(
    ("key", "value", "choice"),
    [
        ("MODEL.META_ARCHITECTURE", "Nope", "DIMaskDINO"),
        ("MODEL.BACKBONE.NAME", "Nope", "build_resnet_backbone"),
        ("MODEL.SEM_SEG_HEAD.NAME", "Nope", "MaskDINOHead"),
        ("MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "Nope", "MaskDINOEncoder"),
        ("MODEL.MaskDINO.TRANSFORMER_DECODER_NAME", "Nope", "DIMaskDINODecoder"),
        ("MODEL.MaskDINO.DI.NAME", "Nope", "DeImbalance"),
        ("MODEL.MaskDINO.BATO.NAME", "Nope", "BalanceAwareTokensOptimization"),
        ("INPUT.DATASET_MAPPER_NAME", "Nope", "coco_instance_lsj"),
        ("DATALOADER.SAMPLER_TRAIN", "Nope", "TrainingSampler"),
        ("SOLVER.OPTIMIZER", "Nope", "ADAMW"),
        ("SOLVER.BASE_LR", "-0.1", "at least 0"),
        ("SOLVER.IMS_PER_BATCH", "0", "at least 1"),
        ("SEED", "9999999999", "at most 2147483647"),
        ("DATALOADER.NUM_WORKERS", "-1", "at least 0"),
        ("DATALOADER.NUM_WORKERS", "100000", "at most"),
        ("OUTPUT_DIR", "", "name a folder"),
        ("TEST.DETECTIONS_PER_IMAGE", "0", "at least 1"),
        ("INPUT.IMAGE_SIZE", "1000000", "at least 1 and at most 65536"),
        ("INPUT.FORMAT", "XYZ", "BGR"),
        ("INPUT.FORMAT", "CMYK", "4 channels, but MODEL.PIXEL_MEAN has 3"),
        ("INPUT.FORMAT", "P", "give RGB"),
        ("MODEL.MaskDINO.NHEADS", "0", "at least 1"),
        ("MODEL.MaskDINO.DROPOUT", "1.5", "at most 1.0"),
        ("MODEL.MaskDINO.COST_GIOU_WEIGHT", "-1.0", "at least 0.0"),
        ("MODEL.PIXEL_STD", "[1.0, 0.0, 1.0]", "positive"),
        ("MODEL.MaskDINO.DEC_LAYERS", "two", "int"),
        ("MODEL.MaskDINO.BATO.GUIDANCE", "t_i", "DI.ENABLED False"),
        ("TEST.EVAL_LAYERS", "['layer.9']", "layer.1"),
        ("TEST.COCO.LIMITS", "[0]", "at least 1"),
        ("MODEL.MaskDINO.FOCAL_GAMMA", "-1.0", "at least 0.0"),
        ("MODEL.VIT.LORA.ALPHA", "-1.0", "at least 0.0"),
        ("MODEL.WEIGHTS", "absent.pth", "does not exist"),
        ("MODEL.WEIGHTS", "hf://owner", "hf://owner/name"),
        ("MODEL.WEIGHTS", "HF:owner/name", "hf://owner/name"),
    ],
)
def test_bad_key_is_refused_before_data_is_made(run, tiny, tmp_path: Path, key: str, value: str, choice: str) -> None:
    root = tmp_path / "shapes"
    assert_one_error_line(run(SCRIPT, *tiny, "DATASETS.SHAPES.ROOT", root, key, value), key, value, choice)
    assert not root.exists()


def test_console_shows_no_environment_and_no_copypaste(run, tiny: list[str], tmp_path: Path) -> None:
    finished = run(SCRIPT, *tiny, "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()")
    assert finished.status == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    for part in ("environment:", "Command line:", "Serializing"):
        assert part not in finished.out
        assert log.count(part) >= 1
    assert log.count("environment:") == 1
    assert "copypaste" not in log
    for part in ("No GPU is used", "total_loss", "| mask "):
        assert finished.out.count(part) == 1


def test_failed_start_leaves_only_the_log(run, tiny: list[str], tmp_path: Path) -> None:
    assert_one_error_line(run(SCRIPT, *tiny, "MODEL.WEIGHTS", "absent.pth"), "absent.pth", "MODEL.WEIGHTS")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log.txt"]


def test_nothing_given_prints_usage(run) -> None:
    finished = run(SCRIPT)
    assert finished.status == 2
    assert "usage:" in finished.err
    assert "--config-file FILE" in finished.err
