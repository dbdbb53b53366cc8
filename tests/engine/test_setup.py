"""From the command line to a configuration that fits the job."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.utils import comm

from dimaskdino.config import Config, get_cfg
from dimaskdino.engine import argument_parser, launch
from dimaskdino.engine.setup import _check_solver, _place, load_config
from dimaskdino.errors import ConfigError
from dimaskdino.modeling.registry import BATO_REGISTRY
from tests.documentation import example

REPO = Path(__file__).parents[2]

engine_setup = sys.modules["dimaskdino.engine.setup"]  # the package has a function of this name


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch):
    """Pretend that the job has this many processes."""
    return lambda count: monkeypatch.setattr(comm, "get_world_size", lambda: count)


def configured(*options: object) -> Config:
    cfg = get_cfg()
    cfg.merge_from_list(list(options))
    return cfg


def test_keys_of_the_command_line_win_over_the_file() -> None:
    file = str(REPO / "configs" / "coco" / "dimaskdino_r50_12ep.yaml")
    args = argument_parser().parse_args(["--eval-layers", "layer.0,layer.5", "--config-file", file, "SEED", "7"])
    cfg = load_config(args)
    assert cfg.SEED == 7
    assert cfg.SOLVER.MAX_ITER == 88_500
    assert cfg.TEST.EVAL_LAYERS == ["layer.0", "layer.5"]


def test_resume_is_off_and_the_number_of_gpus_open_by_default() -> None:
    args = argument_parser().parse_args([])
    assert args.resume is False
    assert args.num_gpus is None


def test_without_gpus_the_device_becomes_the_cpu_and_with_one_it_stays_as_asked() -> None:
    cfg = configured()
    _place(cfg, num_gpus=0)
    assert cfg.MODEL.DEVICE == "cpu"
    for device in ("cpu", "cuda"):
        cfg = configured("MODEL.DEVICE", device)
        _place(cfg, num_gpus=1)
        assert device == cfg.MODEL.DEVICE


def test_the_cpu_as_device_of_several_gpu_processes_is_refused(processes) -> None:
    processes(2)
    with pytest.raises(ConfigError, match="--num-gpus 0"):
        _place(configured("MODEL.DEVICE", "cpu"), num_gpus=2)


def test_a_batch_that_the_processes_cannot_share_is_refused(processes) -> None:
    processes(3)
    _check_solver(configured("SOLVER.IMS_PER_BATCH", 6))
    with pytest.raises(ConfigError, match="IMS_PER_BATCH 16 .* not a multiple of the 3 processes"):
        _check_solver(configured("SOLVER.IMS_PER_BATCH", 16))
    # Here detectron2's trainer changes the batch to fit.
    _check_solver(configured("SOLVER.IMS_PER_BATCH", 16, "SOLVER.REFERENCE_WORLD_SIZE", 8))
    with pytest.raises(ConfigError, match="not a multiple of the 4 processes of SOLVER.REFERENCE_WORLD_SIZE"):
        _check_solver(configured("SOLVER.IMS_PER_BATCH", 6, "SOLVER.REFERENCE_WORLD_SIZE", 4))


def test_evaluation_asks_nothing_of_the_batch_of_training(processes, monkeypatch: pytest.MonkeyPatch) -> None:
    processes(3)
    for name in ("_prepare_run", "_check_datasets_once"):
        monkeypatch.setattr(engine_setup, name, lambda *_, **__: None)
    command = ["--num-gpus", "0", "SOLVER.IMS_PER_BATCH", "16"]
    engine_setup.setup(argument_parser().parse_args(["--eval-only", *command]))
    with pytest.raises(ConfigError, match="IMS_PER_BATCH"):
        engine_setup.setup(argument_parser().parse_args(command))


@pytest.mark.parametrize(("name", "value"), [("MAX_ITER", 0), ("CHECKPOINT_PERIOD", -1), ("REFERENCE_WORLD_SIZE", -2)])
def test_numbers_that_no_training_can_have_are_refused(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {value}; it must be at least"):
        _check_solver(configured(f"SOLVER.{name}", value))


@pytest.mark.parametrize("steps", [("60",), (60.5,), (100, 60), (60, 60), (0,), (True,)])
def test_steps_that_no_schedule_can_have_are_refused(steps: tuple[object, ...]) -> None:
    with pytest.raises(ConfigError, match=r"SOLVER\.STEPS is \(.*each later than the one before"):
        _check_solver(configured("SOLVER.STEPS", steps))
    for sound in ((), (1,), (60, 100)):
        _check_solver(configured("SOLVER.STEPS", sound))


@pytest.fixture
def precision() -> Iterator[Callable[[], str]]:
    """That of float32 matrix products; put back after the test."""
    before = torch.get_float32_matmul_precision()
    yield torch.get_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("flags", [[], ["--eval-only"]])
def test_the_precision_of_float32_is_as_asked(flags: list[str], precision, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_prepare_run", "_check_datasets_once"):
        monkeypatch.setattr(engine_setup, name, lambda *_, **__: None)

    def set_up(value: str) -> str:
        engine_setup.setup(argument_parser().parse_args([*flags, "--num-gpus", "0", "FLOAT32_PRECISION", value]))
        return precision()

    assert set_up("medium") == "medium"
    assert set_up("") == "medium"  # whatever it was
    with pytest.raises(ConfigError, match="FLOAT32_PRECISION is 'low'; it must be one of highest, high, medium"):
        set_up("low")


def set_up_and_record(args: argparse.Namespace) -> None:
    """What a process finds after its set-up."""
    cfg = engine_setup.setup(args)
    found = [BATO_REGISTRY.get("MyBato").__name__, "my_train" in DatasetCatalog.list(), cfg.MODEL.MaskDINO.BATO.NAME]
    Path(f"found.{comm.get_rank()}").write_text(json.dumps(found))


def test_every_process_imports_the_modules_of_the_documentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_parts.py").write_text(example("README.md", "my_parts"))
    Path("my_data.py").write_text(example("datasets/README.md", "my_data"))
    Path("path/to/images").mkdir(parents=True)
    Path("path/to/images/1.png").write_bytes((REPO / "docs/images/demo.png").read_bytes())
    categories = [{"id": number, "name": f"class {number}"} for number in (1, 2, 3)]
    image = {"id": 1, "file_name": "1.png", "width": 4, "height": 4}
    for split in ("train", "val"):
        coco = {"images": [image], "annotations": [], "categories": categories}
        Path(f"path/to/{split}.json").write_text(json.dumps(coco))
    options = ["DATASETS.TRAIN", "('my_train',)", "DATASETS.TEST", "('my_val',)", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3"]
    options += ["MODEL.MaskDINO.BATO.NAME", "MyBato", "OUTPUT_DIR", "run"]
    command = ["--num-gpus", "0", "--import", "my_parts", "--import", "my_data", *options]
    launch(set_up_and_record, argument_parser().parse_args(command), cpu_processes=2)
    for rank in range(2):
        assert json.loads(Path(f"found.{rank}").read_text()) == ["MyBato", True, "MyBato"]
