"""Inference speed on a clock that the model moves."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.evaluation import inference_on_dataset
from torch import nn

from dimaskdino.evaluation.speed import SpeedEvaluator, device_name, timed


class Clock:
    """Stands for time.perf_counter."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Model(nn.Module):
    """Takes as many seconds as its images say."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.clock = clock

    def forward(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self.clock.now += sum(image["seconds"] for image in batch)
        return [{} for _ in batch]


class SlowEvaluator(SpeedEvaluator):
    """Takes time itself."""

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        self._timer.model.clock.now += 50.0
        super().process(inputs, outputs)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def measure(clock: Clock, folder: Path, batches: list[list[float]]) -> dict[str, Any]:
    """The content of speed.json for batches whose images take these seconds."""
    model = Model(clock)
    with timed(model) as timer:
        evaluator = SlowEvaluator(timer, str(folder))
        loader = [[{"seconds": seconds} for seconds in batch] for batch in batches]
        assert inference_on_dataset(model, loader, evaluator) == {}
    file = folder / "speed.json"
    return json.loads(file.read_text()) if file.is_file() else {}


WARM_UP = [[9.0]] * 5


def test_speed_leaves_out_the_first_five_batches(clock: Clock, tmp_path: Path) -> None:
    speed = measure(clock, tmp_path, [*WARM_UP, [0.25], [0.5], [0.75]])
    assert speed == {
        "images_per_second": 2.0,
        "device": device_name(torch.device("cpu")),
        "images": 3,
        "images_per_batch": 1,
        "processes": 1,
    }


def test_speed_leaves_out_batches_that_are_scored_beside_the_model(clock: Clock, tmp_path: Path) -> None:
    speed = measure(clock, tmp_path, [*WARM_UP, *[[0.5]] * 300, [9.0], [9.0]])
    assert (speed["images_per_second"], speed["images"]) == (2.0, 300)


def test_speed_counts_images_not_batches(clock: Clock, tmp_path: Path) -> None:
    speed = measure(clock, tmp_path, [*WARM_UP, [0.25, 0.25], [0.5]])
    assert (speed["images_per_second"], speed["images"], speed["images_per_batch"]) == (3.0, 3, 2)


def test_too_few_images_give_no_speed(clock: Clock, tmp_path: Path) -> None:
    assert measure(clock, tmp_path, WARM_UP) == {}


def test_several_processes_report_the_speed_of_one(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = [(1, 0.5), (1, 1.0)]
    monkeypatch.setattr("dimaskdino.evaluation.speed.comm.gather", lambda mine: [mine, other])
    speed = measure(clock, tmp_path, [*WARM_UP, [0.25], [0.25]])
    assert (speed["images_per_second"], speed["images"], speed["processes"]) == (2.0, 4, 2)


def test_the_device_is_synchronized_around_a_pass(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.cpu, "synchronize", lambda: events.append("wait"))
    model = Model(clock)
    monkeypatch.setattr(time, "perf_counter", lambda: events.append("clock") or 0.0)
    with timed(model):
        model([])
    assert events == ["wait", "clock", "wait", "clock"]


def test_only_passes_inside_the_block_are_timed(clock: Clock) -> None:
    model = Model(clock)
    with timed(model) as timer:
        model([{"seconds": 3.0}])
    model([{"seconds": 1.0}])
    assert timer.seconds == 3.0


def test_the_device_has_a_name() -> None:
    assert device_name(torch.device("cpu")).endswith(f", {torch.get_num_threads()} thread(s)")
