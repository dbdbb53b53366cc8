"""From the command line to a configuration that fits the job."""

import sys
from pathlib import Path

import pytest
from detectron2.utils import comm

from dimaskdino.config import Config, get_cfg
from dimaskdino.engine import argument_parser
from dimaskdino.engine.setup import _check_solver, _place, load_config
from dimaskdino.errors import ConfigError

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
    file = str(Path(__file__).parents[2] / "configs" / "coco" / "dimaskdino_r50_12ep.yaml")
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


def test_evaluation_asks_nothing_of_the_batch_of_training(processes, monkeypatch: pytest.MonkeyPatch) -> None:
    processes(3)
    for name in ("_prepare_run", "_check_datasets_once"):
        monkeypatch.setattr(engine_setup, name, lambda *_, **__: None)
    command = ["--num-gpus", "0", "SOLVER.IMS_PER_BATCH", "16"]
    engine_setup.setup(argument_parser().parse_args(["--eval-only", *command]))
    with pytest.raises(ConfigError, match="IMS_PER_BATCH"):
        engine_setup.setup(argument_parser().parse_args(command))


def test_a_training_without_iterations_is_refused() -> None:
    with pytest.raises(ConfigError, match="MAX_ITER is 0"):
        _check_solver(configured("SOLVER.MAX_ITER", 0))
