"""Running statistics of batch norm in several processes: apart while training, one set where they are used."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from torch import Tensor, nn

from dimaskdino.config import Config
from dimaskdino.data.datasets import register_all
from dimaskdino.data.validation.start import check_datasets
from dimaskdino.engine import Trainer, launch
from dimaskdino.engine.running_statistics import average_running_statistics
from tests.engine.toy import ToyDetector

Buffers = dict[str, Tensor]
MAX_ITER, CHECKPOINT_PERIOD, EVAL_PERIOD = 5, 2, 3


class ToyBatchNormDetector(ToyDetector):
    """With the one layer that keeps statistics."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.norm = nn.BatchNorm1d(8)


if "ToyBatchNormDetector" not in META_ARCH_REGISTRY:
    META_ARCH_REGISTRY.register(ToyBatchNormDetector)


def buffers_of(model: nn.Module) -> Buffers:
    """By the last part of their names, which is unique in the toy."""
    return {name.rpartition(".")[2]: buffer.clone() for name, buffer in model.named_buffers()}


class KeepBuffers(HookBase):
    """Notes the buffers of every iteration; first among the hooks, it sees what this process alone has gathered."""

    def __init__(self) -> None:
        self.kept: dict[int, Buffers] = {}

    def after_step(self) -> None:
        """Note them by the number of iterations done."""
        self.kept[self.trainer.iter + 1] = buffers_of(self.trainer.model)


class RecordingTrainer(Trainer):
    """Notes the buffers that evaluations find."""

    evaluated: list[Buffers] = []

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Note, then evaluate."""
        cls.evaluated.append(buffers_of(model))
        return super().test(cfg, model, evaluators)


def train(args: argparse.Namespace) -> None:
    """In each process: train, and write what was seen."""
    register_all(cfg=args.cfg)
    torch.manual_seed(args.cfg.SEED)
    trainer = RecordingTrainer(args.cfg)
    local = KeepBuffers()
    local.trainer = trainer
    trainer._hooks.insert(0, local)
    trainer.train()
    torch.save({"local": local.kept, "evaluated": RecordingTrainer.evaluated}, args.folder / f"{comm.get_rank()}.pth")


def in_two_processes(main: Callable[[argparse.Namespace], None], folder: Path, **more: Any) -> list[Any]:
    """What ``main`` saves as FOLDER/RANK.pth in each of two processes on the CPU."""
    args = argparse.Namespace(num_gpus=0, num_machines=1, machine_rank=0, dist_url="auto", folder=folder, **more)
    launch(main, args, cpu_processes=2)
    return [torch.load(folder / f"{rank}.pth") for rank in range(2)]


@pytest.fixture
def batch_norm_cfg(toy_cfg: Config) -> Config:
    """The toy with batch norm, saved, evaluated and ended after different iterations."""
    toy_cfg.MODEL.META_ARCHITECTURE = "ToyBatchNormDetector"
    toy_cfg.SOLVER.IMS_PER_BATCH = 4
    toy_cfg.SOLVER.STEPS = ()
    toy_cfg.SOLVER.MAX_ITER = MAX_ITER
    toy_cfg.SOLVER.CHECKPOINT_PERIOD = CHECKPOINT_PERIOD
    toy_cfg.TEST.EVAL_PERIOD = EVAL_PERIOD
    return toy_cfg


def test_processes_evaluate_and_save_the_statistics_of_what_all_have_seen(
    batch_norm_cfg: Config, tmp_path: Path
) -> None:
    check_datasets(batch_norm_cfg)  # Makes the images, which two processes should not do at once.
    seen = in_two_processes(train, tmp_path, cfg=batch_norm_cfg)
    local = [process["local"] for process in seen]

    def expected(done: int) -> Buffers:
        """Mean, and second moment less the square of the mean, over both processes."""
        means = torch.stack([process[done]["running_mean"] for process in local]).double()
        variances = torch.stack([process[done]["running_var"] for process in local]).double()
        mean = means.mean(0)
        variance = (variances + means**2).mean(0) - mean**2
        count = torch.tensor(done)
        return {"running_mean": mean.float(), "running_var": variance.float(), "num_batches_tracked": count}

    # The test sees something: the processes gather different statistics.
    assert not torch.allclose(local[0][MAX_ITER]["running_mean"], local[1][MAX_ITER]["running_mean"], rtol=1e-3)

    for process in seen:
        assert len(process["evaluated"]) == 2
        for done, found in zip((EVAL_PERIOD, MAX_ITER), process["evaluated"], strict=True):
            torch.testing.assert_close(found, expected(done), rtol=1e-5, atol=1e-7)
    for of_one, of_other in zip(*(process["evaluated"] for process in seen), strict=True):
        torch.testing.assert_close(of_one, of_other, rtol=0, atol=0)

    for name, done in {"model_0000001": 2, "model_0000003": 4, "model_final": MAX_ITER}.items():
        weights = torch.load(Path(batch_norm_cfg.OUTPUT_DIR) / f"{name}.pth")["model"]
        saved = {key.removeprefix("norm."): value for key, value in weights.items() if "running" in key}
        wanted = {key: value for key, value in expected(done).items() if "running" in key}
        torch.testing.assert_close(saved, wanted, rtol=1e-5, atol=1e-7)
    # At the end both are the same, and so evaluating the file repeats the last evaluation.
    last = {key: value for key, value in seen[0]["evaluated"][-1].items() if "running" in key}
    torch.testing.assert_close(saved, last, rtol=0, atol=0)


def average_by_hand(args: argparse.Namespace) -> None:
    """In each process: average layers of every kind, filled with values of this process."""
    rank = comm.get_rank()
    plain, without, frozen = nn.BatchNorm2d(2), nn.BatchNorm1d(2, track_running_stats=False), FrozenBatchNorm2d(2)
    for norm in (plain, frozen):
        norm.running_mean.copy_(torch.tensor([[1000.0, 2.0], [1006.0, 2.0]][rank]))
        norm.running_var.copy_(torch.tensor([[0.25, 3.0], [0.75, 5.0]][rank]))
    plain.num_batches_tracked.fill_(7 + rank)
    average_running_statistics(nn.Sequential(plain, without, frozen))
    average_running_statistics(nn.Sequential(without, frozen))
    torch.save([buffers_of(norm) for norm in (plain, frozen)], args.folder / f"{rank}.pth")


def test_shares_that_differ_add_the_variance_of_their_means(tmp_path: Path) -> None:
    seen = in_two_processes(average_by_hand, tmp_path)
    for rank, (plain, frozen) in enumerate(seen):
        # Channel 0: both means are 3 from their own, so 9 + (0.25 + 0.75) / 2. Channel 1: equal means add nothing.
        assert plain["running_mean"].tolist() == [1003.0, 2.0]
        assert plain["running_var"].tolist() == [9.5, 4.0]
        assert plain["num_batches_tracked"] == 7 + rank
        assert frozen["running_mean"].tolist() == [[1000.0, 2.0], [1006.0, 2.0]][rank]
        assert frozen["running_var"].tolist() == [[0.25, 3.0], [0.75, 5.0]][rank]


def test_one_process_keeps_its_statistics() -> None:
    norm = nn.BatchNorm1d(3)
    norm(torch.rand(4, 3))
    before = buffers_of(norm)
    average_running_statistics(norm)
    torch.testing.assert_close(buffers_of(norm), before, rtol=0, atol=0)
