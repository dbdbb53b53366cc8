"""Speed is measured, and scoring goes on beside the model."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from torch import nn

from dimaskdino.errors import UserError
from dimaskdino.evaluation import BackgroundEvaluator
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


def test_several_processes_report_the_speed_of_one(clock, tmp_path, monkeypatch):
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


Batch = list[dict[str, Any]]


class Recorder(DatasetEvaluator):
    """Records what it is given, and what holds in its thread."""

    def reset(self) -> None:
        self.seen: list[int] = []
        self.running = self.most_running = 0
        self.threads: set[int] = set()

    def process(self, inputs: Batch, outputs: Batch) -> None:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.threads.add(threading.get_ident())
        assert not torch.is_grad_enabled()
        if inputs[0].get("broken"):
            raise UserError("image 3 has no score")
        self.seen += [each["number"] for each in outputs]
        self.running -= 1

    def evaluate(self) -> dict[str, list[int]]:
        return {"seen": self.seen}


class Echo(nn.Module):
    """Gives the number of an image."""

    def forward(self, batch: Batch) -> Batch:
        return [{"number": each["number"]} for each in batch]


def images(count: int, *, broken: int = -1) -> list[Batch]:
    return [[{"number": number, "broken": number == broken}] for number in range(count)]


def test_batches_are_scored_in_order_in_one_other_thread() -> None:
    recorder = Recorder()
    assert inference_on_dataset(Echo(), images(9), BackgroundEvaluator(recorder)) == {"seen": list(range(9))}
    assert recorder.most_running == 1
    assert len(recorder.threads) == 1
    assert threading.get_ident() not in recorder.threads


def test_first_batches_are_done_before_the_model_goes_on() -> None:
    recorder, done = Recorder(), threading.Event()
    evaluator = BackgroundEvaluator(recorder, first=2)
    evaluator.reset()
    process = recorder.process

    def held(inputs: Batch, outputs: Batch) -> None:
        if outputs[0]["number"] == 2:
            done.wait(10)
        process(inputs, outputs)

    recorder.process = held  # type: ignore[method-assign]
    for number, seen in enumerate(([0], [0, 1], [0, 1])):
        evaluator.process([{}], [{"number": number}])
        assert recorder.seen == seen
    done.set()
    assert evaluator.evaluate() == {"seen": [0, 1, 2]}


@pytest.mark.parametrize("broken", [3, 8], ids=["in between", "last"])
def test_an_error_of_the_thread_ends_the_evaluation(broken: int) -> None:
    recorder = Recorder()
    with pytest.raises(UserError, match="image 3 has no score"):
        inference_on_dataset(Echo(), images(9, broken=broken), BackgroundEvaluator(recorder))
    assert recorder.seen == list(range(broken))  # nothing after it


def test_no_more_than_one_batch_waits() -> None:
    begun, may_end = threading.Event(), threading.Event()

    class Slow(Recorder):
        def process(self, inputs: Batch, outputs: Batch) -> None:
            begun.set()
            assert may_end.wait(10)
            super().process(inputs, outputs)

    evaluator = BackgroundEvaluator(Slow())
    evaluator.reset()
    (first,), (second,) = images(2)
    evaluator.process([first], [first])
    assert begun.wait(10)
    waiting = threading.Thread(target=evaluator.process, args=([second], [second]))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()  # the model's thread waits for the first
    may_end.set()
    waiting.join(10)
    assert evaluator.evaluate() == {"seen": [0, 1]}


def test_autocast_holds_in_the_thread() -> None:
    found = []

    class Asks(Recorder):
        def process(self, inputs: Batch, outputs: Batch) -> None:
            found.append(torch.is_autocast_enabled("cpu"))

    context = lambda: torch.autocast("cpu", dtype=torch.bfloat16)  # noqa: E731
    evaluator = BackgroundEvaluator(Asks(), context=context)
    evaluator.reset()
    evaluator.process([{}], [{}])
    evaluator.evaluate()
    assert found == [True]
