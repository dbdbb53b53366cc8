"""Export: while it lasts, the model runs in standard operators alone, in forms that keep sizes in the graph."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

# No context variable: torch.compile cannot read one, and would compile the layers in pieces.
_form: str | None = None


def export_form() -> str | None:
    """grid_sample or gather while a model is exported, else None."""
    return _form


def is_watched() -> bool:
    """Whether torch compiles, traces, or exports what runs: it would write down loops and choices of this moment."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or export_form() is not None


@contextmanager
def exporting(form: str) -> Iterator[None]:
    """Write deformable attention as ``form`` says (``dimaskdino.export.choices.FORMS``) inside the block."""
    global _form
    before, _form = _form, form
    try:
        yield
    finally:
        _form = before


def tensor_of_sizes(sizes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(N, n) tensor of N rows of n sizes; those that a trace follows stay parts of its graph.

    Non-blocking: a blocking copy would wait for everything that the device has still to do.
    """
    if export_form() is None:
        return torch.tensor(sizes, dtype=dtype).to(device, non_blocking=True)
    # A trace knows sizes as tensors, which torch.as_tensor would make constants of.
    flat = [
        size.to(device, dtype) if isinstance(size, Tensor) else torch.as_tensor(size, dtype=dtype, device=device)
        for row in sizes
        for size in row
    ]
    return torch.stack(flat).view(len(sizes), -1)


def split_levels(tokens: Tensor, spatial_shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Tokens (B, N, ...) of all levels, level by level (B, h * w, ...)."""
    areas = [height * width for height, width in spatial_shapes]
    if export_form() is None:
        return list(tokens.split(areas, dim=1))
    # ONNX splits at sizes that are not constant into a sequence, which few runtimes know; all know slices.
    ends = [sum(areas[: index + 1]) for index in range(len(areas))]
    return [tokens[:, end - area : end] for area, end in zip(areas, ends, strict=True)]


def to_map(tokens: Tensor, spatial_shape: tuple[int, int]) -> Tensor:
    """Tokens (B, h * w, C) of a level as a map (B, C, h, w)."""
    flat = tokens.transpose(1, 2)
    # Not unflatten: the ONNX exporter makes a constant of its batch.
    return flat.view(*flat.shape[:2], *spatial_shape)
