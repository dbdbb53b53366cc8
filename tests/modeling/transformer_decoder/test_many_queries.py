"""Memory grows with the number of queries, not with its square."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.tiny_model import TINY_DINO, image, sample, tiny_model

FEW, MANY = 100, 400
SIDE = 160  # px; 534 tokens, which are more than MANY


class LargestTensors(TorchDispatchMode):
    """Notes the elements of the largest tensor that each operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.elements[str(func)] = max(self.elements.get(str(func), 0), value.numel())
        return result


def largest(options: dict[str, Any], work: Callable[[torch.nn.Module], object], queries: int) -> dict[str, int]:
    """The elements of the largest tensor of each operation, with this many queries and detections."""
    numbers = {"MODEL.DINO.NUM_QUERIES": queries, "MODEL.MaskDINO.NUM_OBJECT_QUERIES": queries}
    numbers |= {"MODEL.MaskDINO.FIRST_SELECTED_QUERIES": queries, "TEST.DETECTIONS_PER_IMAGE": queries}
    model = tiny_model(options | numbers)
    with LargestTensors() as seen:
        work(model)
    return seen.elements


def train(model: torch.nn.Module) -> None:
    sum(model.train()([sample(SIDE, SIDE, [[4, 4, 30, 40], [20, 10, 60, 44]])]).values()).backward()


def predict(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model([{"image": image(SIDE, SIDE)}])


@pytest.mark.parametrize("work", [train, predict])
@pytest.mark.parametrize("options", [{}, TINY_DINO], ids=["DI-MaskDINO", "DINO"])
def test_no_tensor_grows_faster_than_the_queries(options: dict[str, Any], work: Callable[..., object]) -> None:
    few, many = (largest(options, work, queries) for queries in (FEW, MANY))
    grown = {name: many[name] / count for name, count in few.items() if many.get(name, 0) > count}
    assert {name: ratio for name, ratio in grown.items() if ratio > MANY / FEW} == {}
