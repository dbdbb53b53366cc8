"""Gradients of a batch that is computed in parts are those of the whole batch."""

from typing import Any

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from dimaskdino.config import Config, get_cfg
from dimaskdino.engine import GradientClipper, TrainStep
from dimaskdino.errors import ConfigError
from dimaskdino.solver import check_solver
from tests.modeling.criterion.stages import GridSampler
from tests.tiny_model import ONE_STAGE, TINY_DINO, sample, scramble, tiny_cfg

BOXES = [[0, 0, 32, 32], [16, 8, 48, 40], [36, 40, 60, 48]]
# Each part of two has an image of three objects, so that parts and batch have the same groups of denoising queries.
COUNTS = (3, 1, 3, 2, 0, 3, 3, 3)
SEMANTIC = ONE_STAGE | {
    "TRANSFORMER_DECODER_NAME": "MaskDINODecoder",
    "SEMANTIC_CE_LOSS": True,
    "TEST__INSTANCE_ON": False,
    "TEST__SEMANTIC_ON": True,
}


def gradients(cfg: Config, steps: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradients, and the recorded losses, of one step on eight images of one size."""
    torch.manual_seed(0)
    build = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    sampler = {} if cfg.MODEL.META_ARCHITECTURE == "DINO" else {"point_sampler": GridSampler()}
    model = scramble(build(cfg, **sampler))
    batch = [sample(64, 64, BOXES[:count], seed=index) for index, count in enumerate(COUNTS)]
    with EventStorage() as storage:
        step_of(model, [batch], steps).run_step()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found, {name: value for name, (value, _) in storage.latest().items() if "loss" in name}


def step_of(model: nn.Module, batches: list[Any], steps: int) -> TrainStep:
    return TrainStep(
        model=model,
        data_loader=batches,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        clipper=GradientClipper(clip_type="full_model", limit=torch.inf),
        amp=False,
        accumulation_steps=steps,
    )


@pytest.mark.parametrize("kind", ["instances", "semantic", "boxes"])
def test_four_parts_of_two_have_the_gradients_of_eight(kind: str) -> None:
    cfg = {
        "instances": lambda: tiny_cfg(DN_NOISE_SCALE=0.0),
        "semantic": lambda: tiny_cfg(DN_NOISE_SCALE=0.0, **SEMANTIC),
        "boxes": lambda: tiny_cfg(TINY_DINO | {"MODEL.DINO.DN_LABEL_NOISE": 0.0, "MODEL.DINO.DN_BOX_NOISE": 0.0}),
    }[kind]()
    (whole, losses), (parts, losses_of_parts) = gradients(cfg, 1), gradients(cfg, 4)
    assert losses_of_parts == pytest.approx(losses, rel=1e-5, abs=1e-6)
    assert whole.keys() == parts.keys()
    largest = max(gradient.abs().max() for gradient in whole.values())
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-5, atol=1e-5 * float(largest), msg=name)


class Mean(nn.Module):
    """A model of another package: its losses are means over the images."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, batch: list[dict[str, float]]) -> dict[str, Tensor]:
        return {"loss": torch.stack([self.weight * image["x"] for image in batch]).mean()}


def test_means_over_parts_are_averaged() -> None:
    model = Mean()
    with EventStorage() as storage:
        step_of(model, [[{"x": float(x)} for x in (1, 2, 3, 6)]], 2).run_step()
    assert model.weight.grad == pytest.approx(3.0)
    assert storage.latest()["total_loss"][0] == pytest.approx(3.0)


def test_processes_exchange_gradients_once_a_step() -> None:
    model, entered = Mean(), []
    step = step_of(model, [[{"x": 1.0}] * 6], 3)

    class Recorded:
        def __enter__(self) -> None:
            entered.append(model.weight.grad is None)

        def __exit__(self, *error: object) -> None:
            entered.append(model.weight.grad.item())

    model.no_sync = Recorded
    with EventStorage():
        step.run_step()
    # The third part, whose backward pass exchanges the gradients, is outside.
    assert entered == [True, pytest.approx(1 / 3), False, pytest.approx(2 / 3)]


@pytest.mark.parametrize(("images", "steps", "processes"), [(8, 3, 1), (8, 4, 4), (4, 8, 1)])
def test_a_batch_that_does_not_divide_is_refused(images: int, steps: int, processes: int) -> None:
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", images, "SOLVER.ACCUMULATION_STEPS", steps])
    with pytest.raises(ConfigError, match=rf"SOLVER.IMS_PER_BATCH is {images}.*{steps} .*SOLVER.ACCUMULATION_STEPS"):
        check_solver(cfg, processes)
