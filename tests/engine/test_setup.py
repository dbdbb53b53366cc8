"""From the command line to a configuration that fits the job."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from detectron2.utils import comm

from dimaskdino.config import Config, get_cfg
from dimaskdino.engine import argument_parser
from dimaskdino.engine.setup import _set_device, load_config
from dimaskdino.errors import ConfigError
from dimaskdino.modeling.postprocessing import thing_classes
from tests.data_pipeline.conftest import registrations  # noqa: F401  (a fixture)
from tests.data_pipeline.label_maps import write_panoptic

REPO = Path(__file__).parents[2]

engine_setup = sys.modules["dimaskdino.engine.setup"]  # the package has a function of this name


def configured(*options: object) -> Config:
    cfg = get_cfg()
    cfg.merge_from_list(list(options))
    return cfg


def set_up(monkeypatch: pytest.MonkeyPatch, *command: str) -> Config:
    """Set up a run on the CPU, without its folder and datasets."""
    for name in ("_prepare_folder", "check_datasets_once"):
        monkeypatch.setattr(engine_setup, name, lambda *_, **__: None)
    return engine_setup.setup(argument_parser().parse_args(["--num-gpus", "0", *command]))


def test_command_line_wins_over_the_file() -> None:
    file = str(REPO / "configs" / "coco" / "dimaskdino_r50_12ep.yaml")
    args = argument_parser().parse_args(["--eval-layers", "layer.0,layer.5", "--config-file", file, "SEED", "7"])
    cfg = load_config(args)
    assert cfg.SEED == 7
    assert cfg.SOLVER.MAX_ITER == 88_500
    assert cfg.TEST.EVAL_LAYERS == ["layer.0", "layer.5"]


def test_defaults_of_the_command_line() -> None:
    args = argument_parser().parse_args([])
    assert (args.resume, args.eval_only, args.num_gpus, args.num_machines, args.machine_rank) == (
        False,
        False,
        None,
        1,
        0,
    )


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ([], ["usage:", "--config-file FILE"]),
        (["--config-file", "x.yaml", "--max-iter", "5"], ["--max-iter", "KEY VALUE", "SOLVER.MAX_ITER?"]),
        (["--batch-size=4"], ["--batch-size", "SOLVER.IMS_PER_BATCH?"]),
        (["--num-gpus", "many"], ["--num-gpus", "invalid int value"]),
    ],
    ids=str,
)
def test_bad_command_line_says_what_to_do(command: list[str], parts: list[str], monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["train_net.py", *command])
    with pytest.raises(SystemExit) as stopped:
        argument_parser().parse_args()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert all(part in error for part in parts), error


def test_device_follows_the_number_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = configured()
    _set_device(cfg, num_gpus=0)
    assert cfg.MODEL.DEVICE == "cpu"
    for device in ("cpu", "cuda"):
        cfg = configured("MODEL.DEVICE", device)
        _set_device(cfg, num_gpus=1)
        assert device == cfg.MODEL.DEVICE
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="--num-gpus 0"):
        _set_device(configured("MODEL.DEVICE", "cpu"), num_gpus=2)


def test_evaluation_ignores_solver_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    set_up(monkeypatch, "--eval-only", "SOLVER.IMS_PER_BATCH", "0")
    with pytest.raises(ConfigError, match="IMS_PER_BATCH"):
        set_up(monkeypatch, "SOLVER.IMS_PER_BATCH", "0")


def test_unknown_policy_for_nonfinite_steps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"SOLVER\.NONFINITE is 'ignore'"):
        set_up(monkeypatch, "SOLVER.NONFINITE", "ignore")


def test_own_keys_may_have_any_value(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"MODEL.MaskDINO.OWN_WEIGHT": ("auto", "mine"), "MODEL.MyDINO.SHIFT_WEIGHT": (-1.0, "mine")}
    monkeypatch.setattr("dimaskdino.config.reader._REGISTERED", own)
    assert set_up(monkeypatch, "--eval-only").MODEL.MyDINO.SHIFT_WEIGHT == -1.0
    with pytest.raises(ConfigError, match=r"MODEL\.DINO\.COST_BOX_WEIGHT is -1\.0; it must be at least 0"):
        set_up(monkeypatch, "--eval-only", "MODEL.DINO.COST_BOX_WEIGHT", "-1.0")


@pytest.fixture
def precision() -> Iterator[Callable[[], str]]:
    """The precision of float32 matrix products; restored after the test."""
    before = torch.get_float32_matmul_precision()
    yield torch.get_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("flags", [[], ["--eval-only"]])
def test_float32_precision_follows_its_key(flags: list[str], precision, monkeypatch: pytest.MonkeyPatch) -> None:
    set_up(monkeypatch, *flags, "FLOAT32_PRECISION", "medium")
    assert precision() == "medium"
    set_up(monkeypatch, *flags, "FLOAT32_PRECISION", "")
    assert precision() == "medium"
    with pytest.raises(ConfigError, match="FLOAT32_PRECISION is 'low'; it must be one of highest, high, medium"):
        set_up(monkeypatch, *flags, "FLOAT32_PRECISION", "low")


def test_memory_is_kept_on_the_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[str] = []
    monkeypatch.setattr(engine_setup, "keep_freed_memory", kept.append)
    set_up(monkeypatch, "--num-gpus", "1")
    set_up(monkeypatch)
    assert kept == ["cuda", "cpu"]


@pytest.mark.usefixtures("registrations")
def test_things_of_keyed_datasets_are_known_before_the_model(monkeypatch, tmp_path) -> None:
    keys = write_panoptic(tmp_path / "set") | {
        "DATASETS.TRAIN": "('panoptic_train',)",
        "DATASETS.TEST": "('panoptic_val',)",
    }
    keys |= {"MODEL.MaskDINO.TEST.PANOPTIC_ON": "True"}
    file = str(REPO / "configs" / "demo" / "dimaskdino_shapes.yaml")
    command = ["--config-file", file, "OUTPUT_DIR", str(tmp_path), *(item for pair in keys.items() for item in pair)]
    cfg = set_up(monkeypatch, *command)
    assert thing_classes(cfg, "a test") == [0, 1]
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 3  # the configuration has 6
    given = set_up(monkeypatch, *command, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "4")
    assert given.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 4  # which the check of the datasets refuses
    with pytest.raises(ConfigError, match=r"PANOPTIC_ON .* shapes_none is not registered.*PANOPTIC.*THING"):
        set_up(monkeypatch, *command, "DATASETS.TRAIN", "('shapes_none',)", "DATASETS.TEST", "()")


def test_evaluation_in_a_precision_that_the_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dimaskdino.layers.precision.computes_in_bfloat16", lambda device: False)
    options = ["MODEL.MaskDINO.TEST.PRECISION", "bfloat16"]
    with pytest.raises(ConfigError, match=r"TEST\.PRECISION is bfloat16"):
        set_up(monkeypatch, "--eval-only", *options)
    set_up(monkeypatch, "--eval-only", *options[:1], "auto")
