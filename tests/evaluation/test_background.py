"""Scoring in a thread: the order, what is raised, and how much waits."""

import threading
from typing import Any

import pytest
import torch
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from torch import nn

from dimaskdino.errors import UserError
from dimaskdino.evaluation import BackgroundEvaluator

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
