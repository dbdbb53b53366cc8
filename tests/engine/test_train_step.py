"""One optimization step of a model with one parameter."""

import math
from typing import Any

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from dimaskdino.engine import GradientClipper, TrainStep
from dimaskdino.errors import DatasetError


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
        amp=amp,
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


def test_update_uses_the_clipped_gradient() -> None:
    step = step_on({"a": 2.0, "b": 3.0}, clip=1.0)
    with EventStorage() as storage:
        step.run_step()
    assert step.model.weight.item() == pytest.approx(1.0 - 0.1 * 1.0, abs=1e-5)
    assert storage.latest()["grad_norm"][0] == 5.0


def test_loss_scaling_clips_the_true_gradient() -> None:
    step = step_on({"a": 2.0, "b": 3.0}, clip=1.0, amp=True)
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
    other.load_state_dict(step.state_dict())
    assert other.optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
@pytest.mark.parametrize("amp", [False, True])
def test_non_finite_running_statistics_stop(buffer: str, amp: bool) -> None:
    step = step_on({"a": 2.0, "b": 3.0, "file_name": "x.png"}, {"a": 2.0, "b": 3.0, "file_name": "y.png"}, amp=amp)
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(3e38)  # finite, though the sum of two is not
    step.model.norm = norm
    step = TrainStep(
        model=step.model, data_loader=step.data_loader, optimizer=step.optimizer, clipper=step.clipper, amp=amp
    )
    with EventStorage():
        step.run_step()
        getattr(norm, buffer)[1] = math.inf
        step.iter = 1
        message = rf"^Not finite: norm\.{buffer} \(iteration 1, .*y\.png\).*--resume.*SOLVER\.BASE_LR"
        with pytest.raises(FloatingPointError, match=message):
            step.run_step()
    assert step.model.weight.item() == pytest.approx(1.0 - 0.1 * 5.0)
