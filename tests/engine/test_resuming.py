"""Where a training goes on from a checkpoint: the same one in all processes, and with the optimiser that made it."""

import argparse
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.utils import comm

from dimaskdino.config import Config
from dimaskdino.engine import Trainer, evaluate, launch
from dimaskdino.errors import CheckpointError, UserError
from tests.engine import toy  # noqa: F401  registers ToyDetector in the processes of a job


def save_checkpoint(cfg: Config) -> Path:
    """The file that a training of ``cfg`` leaves after its fifth iteration, but for the weights."""
    trainer = Trainer(cfg)
    trainer.iter = 4
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    trainer.checkpointer.save("model_0000004", iteration=4)
    return Path(cfg.OUTPUT_DIR) / "model_0000004.pth"


def change(cfg: Config, options: dict[str, Any]) -> None:
    cfg.merge_from_list([item for option in options.items() for item in option])


def start_from_folders_of_their_own(args: argparse.Namespace) -> None:
    """In each process: what is refused where the main process alone has a checkpoint, or was told to resume."""
    cfg = args.cfg
    cfg.OUTPUT_DIR = str(args.folder / str(comm.get_rank()))
    if comm.is_main_process():
        save_checkpoint(cfg)
    else:
        Trainer(cfg)  # All processes must make as many, which meet to make them.
    refusals = []
    for start in (
        lambda: Trainer(cfg).resume_or_load(resume=True),
        lambda: Trainer(cfg).resume_or_load(resume=comm.is_main_process()),
        lambda: evaluate(cfg, resume=True),
    ):
        try:
            start()
        except UserError as error:
            refusals.append(str(error))
    torch.save(refusals, args.folder / f"{comm.get_rank()}.pth")


def test_processes_that_find_different_checkpoints_are_all_refused(toy_cfg: Config, tmp_path: Path) -> None:
    args = argparse.Namespace(num_gpus=0, num_machines=1, machine_rank=0, dist_url="auto", folder=tmp_path, cfg=toy_cfg)
    launch(start_from_folders_of_their_own, args, cpu_processes=2)
    for rank in range(2):
        without_checkpoint, without_flag, evaluated = torch.load(tmp_path / f"{rank}.pth")
        for refusal in (without_checkpoint, evaluated):
            assert (
                f"OUTPUT_DIR {tmp_path / str(rank)}: process 0 finds model_0000004.pth, process 1 finds none" in refusal
            )
            assert "must be a folder that all machines share" in refusal
        assert "process 1 was not given --resume" in without_flag


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"SOLVER.BACKBONE_MULTIPLIER": 1.0}, r"groups of \[2, 2, 2\] parameters, the configured one of \[4, 2\]"),
        ({"SOLVER.WEIGHT_DECAY_NORM": 0.0001}, r"of \[2, 2, 2\] parameters, the configured one of \[2, 4\].*_NORM"),
        ({"SOLVER.OPTIMIZER": "SGD"}, r"another kind than SOLVER.OPTIMIZER: it has .*betas.*, and not .*momentum"),
    ],
)
def test_another_optimiser_than_that_of_the_checkpoint_is_refused_with_what_differs(
    toy_cfg: Config, options: dict[str, Any], message: str
) -> None:
    path = save_checkpoint(toy_cfg)
    change(toy_cfg, options)
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))}: .*{message}.*new run with MODEL.WEIGHTS"):
        Trainer(toy_cfg).resume_or_load(resume=True)


def test_groups_of_other_sizes_are_refused(toy_cfg: Config) -> None:
    toy_cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    save_checkpoint(toy_cfg)
    change(toy_cfg, {"SOLVER.BACKBONE_MULTIPLIER": 0.1, "SOLVER.WEIGHT_DECAY_NORM": 0.0001})
    with pytest.raises(CheckpointError, match=r"of \[4, 2\] parameters, the configured one of \[2, 4\]"):
        Trainer(toy_cfg).resume_or_load(resume=True)


def test_settings_that_another_torch_does_not_have_are_no_other_optimiser(toy_cfg: Config) -> None:
    path = save_checkpoint(toy_cfg)
    content = torch.load(path)
    for group in content["trainer"]["step"]["optimizer"]["param_groups"]:
        del group["decoupled_weight_decay"]
    torch.save(content, path)
    trainer = Trainer(toy_cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 5


def test_the_state_of_detectron2s_own_trainer_is_refused(toy_cfg: Config) -> None:
    path = save_checkpoint(toy_cfg)
    content = torch.load(path)
    content["trainer"]["_trainer"] = content["trainer"].pop("step")
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"model_0000004.pth: .*_trainer.* of another trainer; start a new run"):
        Trainer(toy_cfg).resume_or_load(resume=True)


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        (
            "ADAMW",
            {"SOLVER.BASE_LR": 0.02},
            r"learning rates of the run stay \[.*0\.01\b.*\]; SOLVER.BASE_LR .* ask for",
        ),
        ("ADAMW", {"SOLVER.WEIGHT_DECAY": 0.5}, r"weight decays of the run stay \[0\.0001, .*ask for \[0\.5, "),
        ("SGD", {"SOLVER.MOMENTUM": 0.5}, r"momenta of the run stay \[0\.9, .*SOLVER.MOMENTUM ask for \[0\.5, "),
    ],
)
def test_settings_that_stay_as_they_were_are_told_where_others_are_configured(
    toy_cfg: Config, optimizer: str, options: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    toy_cfg.SOLVER.OPTIMIZER = optimizer
    save_checkpoint(toy_cfg)
    with caplog.at_level(logging.WARNING):
        Trainer(toy_cfg).resume_or_load(resume=True)
    assert "of the run stay" not in caplog.text
    change(toy_cfg, options)
    with caplog.at_level(logging.WARNING):
        Trainer(toy_cfg).resume_or_load(resume=True)
    assert re.search(message, caplog.text)
    assert caplog.text.count("of the run stay") == 1
