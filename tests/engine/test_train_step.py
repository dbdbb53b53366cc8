"""A training step: losses, gradients, accumulation."""

import math
from typing import Any

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from dimaskdino.config import Config, get_cfg
from dimaskdino.engine import GradientClipper, TrainStep
from dimaskdino.errors import ConfigError, DatasetError
from dimaskdino.solver import check_solver
from tests.modeling.criterion.stages import GridSampler
from tests.tiny_model import ONE_STAGE, TINY_DINO, sample, scramble, tiny_cfg


class Line(nn.Module):
    """Losses ``a * weight`` and ``b * weight`` for a batch ``[{"a": a, "b": b}]``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {"loss_ce": self.weight * batch[0]["a"], "loss_bbox": self.weight * batch[0]["b"]}


def step_on(*batches: dict[str, Any], clip: float = math.inf, amp: bool = False) -> TrainStep:
    model = Line()
    return TrainStep(
        model=model,
        data_loader=[[batch] for batch in batches],
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        clipper=GradientClipper(clip_type="full_model", limit=clip),
        autocast_to=torch.float16 if amp else None,
    )


def test_step_descends_the_sum_of_the_losses() -> None:
    step = step_on({"a": 2.0, "b": 3.0})
    with EventStorage() as storage:
        step.run_step()
    # The gradient of 2w + 3w is 5.
    assert step.model.weight.item() == pytest.approx(1.0 - 0.1 * 5.0)
    latest = {name: value for name, (value, _) in storage.latest().items()}
    assert (latest["loss_ce"], latest["loss_bbox"]) == (2.0, 3.0)
    assert latest["total_loss"] == 5.0
    assert latest["grad_norm"] == 5.0


@pytest.mark.parametrize("amp", [False, True])
def test_update_uses_the_clipped_gradient_whatever_the_loss_scale(amp: bool) -> None:
    step = step_on({"a": 2.0, "b": 3.0}, clip=1.0, amp=amp)
    with EventStorage() as storage:
        step.run_step()
    assert step.model.weight.item() == pytest.approx(1.0 - 0.1 * 1.0, abs=1e-5)
    assert storage.latest()["grad_norm"][0] == 5.0


def test_overflow_skips_the_update_and_lowers_the_scale() -> None:
    step = step_on({"a": 2.0, "b": 3.0}, amp=True)
    step.model.weight.register_hook(lambda gradient: gradient * math.inf)
    before = step._scaler.get_scale()
    with EventStorage() as storage:
        step.run_step()
    assert step.model.weight.item() == 1.0
    assert step._scaler.get_scale() < before
    assert "grad_norm" not in storage.latest()


def test_gradients_do_not_accumulate() -> None:
    step = step_on({"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 0.0})
    with EventStorage():
        step.run_step()
        step.run_step()
    assert step.model.weight.item() == pytest.approx(1.0 - 0.1 - 0.1)


def test_non_finite_loss_stops_before_the_update() -> None:
    step = step_on({"a": 2.0, "b": math.nan, "image_id": 139})
    step.iter = 7
    with EventStorage(), pytest.raises(FloatingPointError, match=r"loss_bbox = nan \(iteration 7, .*images 139\)"):
        step.run_step()
    assert step.model.weight.item() == 1.0


@pytest.mark.parametrize("kind", [FloatingPointError, DatasetError])
def test_errors_of_the_model_name_the_images(kind: type[Exception]) -> None:
    step = step_on({"a": 2.0, "b": 0.0, "file_name": "x.png", "image_id": 3})

    def refuse(*_: object) -> None:
        raise kind("The masks of image 0 do not fit.")

    step.model.register_forward_pre_hook(refuse)
    with EventStorage(), pytest.raises(kind, match=r"do not fit\. \(iteration 0, process 0, images x\.png\)"):
        step.run_step()


def test_non_finite_gradient_stops() -> None:
    step = step_on({"a": 2.0, "b": 0.0, "file_name": "x.png"})
    step.model.weight.register_hook(lambda gradient: gradient * math.inf)
    with EventStorage(), pytest.raises(FloatingPointError, match="grad_norm = inf.*images x.png"):
        step.run_step()
    assert step.model.weight.item() == 1.0


def test_optimizer_state_round_trips() -> None:
    step = step_on({"a": 1.0, "b": 1.0})
    step.optimizer.param_groups[0]["lr"] = 0.01
    other = step_on()
    other.load_state_dict(step.state_dict(), ["weight"])
    assert other.optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
@pytest.mark.parametrize("amp", [False, True])
def test_non_finite_running_statistics_stop(buffer: str, amp: bool) -> None:
    step = step_on({"a": 2.0, "b": 3.0, "file_name": "x.png"}, {"a": 2.0, "b": 3.0, "file_name": "y.png"}, amp=amp)
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(3e38)  # finite, though the sum of two is not
    step.model.norm = norm
    options = {"data_loader": step.data_loader, "autocast_to": torch.float16 if amp else None}
    step = TrainStep(model=step.model, optimizer=step.optimizer, clipper=step.clipper, **options)
    with EventStorage():
        step.run_step()
        getattr(norm, buffer)[1] = math.inf
        step.iter = 1
        message = rf"^Not finite: norm\.{buffer} \(iteration 1, .*y\.png\).*--resume.*SOLVER\.BASE_LR"
        with pytest.raises(FloatingPointError, match=message):
            step.run_step()
    assert step.model.weight.item() == pytest.approx(1.0 - 0.1 * 5.0)


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
