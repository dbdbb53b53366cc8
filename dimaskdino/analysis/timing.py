"""How long an image takes, in which part of the model, and in which form of it."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dimaskdino.errors import UserError, require
from dimaskdino.evaluation.speed import timed
from dimaskdino.modeling.meta_arch.maskdino import DIMaskDINO

# The parts of a model by what they are called in results; what is left is preparing the image.
PARTS = {
    "backbone": "backbone",
    "encoder": "sem_seg_head.pixel_decoder",
    "decoder": "sem_seg_head.predictor",
    "results": "post_processor",
}
REST = "preparation"
Inputs = list[tuple[Sequence[Any], Any]]  # the shape, with anything but numbers for what is open, and type of each


def time_model(model: nn.Module, images: Sequence[dict[str, Any]], *, warmup: int, runs: int) -> np.ndarray:
    """The seconds (``runs``,) of a model in evaluation mode, one image at a time: from its tensor to instances.

    The first ``warmup`` runs choose kernels, fill caches, and compile; they do not count.
    """
    seconds = []
    with timed(model) as timer, torch.inference_mode():
        for image in itertools.islice(itertools.cycle(images), warmup + runs):
            model([image])
            seconds.append(timer.seconds)
    return np.array(seconds[warmup:])


def time_parts(model: DIMaskDINO, images: Sequence[dict[str, Any]], *, warmup: int, runs: int) -> dict[str, np.ndarray]:
    """Time the parts of a model, :data:`PARTS` and :data:`REST`; arguments as in :func:`time_model`.

    The device is waited for between parts, so their sum may be more than what the model takes.
    """
    seconds: list[list[float]] = []
    with ExitStack() as stack, torch.inference_mode():
        parts = [stack.enter_context(timed(model.get_submodule(path), model.device)) for path in PARTS.values()]
        whole = stack.enter_context(timed(model))
        for image in itertools.islice(itertools.cycle(images), warmup + runs):
            model([image])
            own = [part.seconds for part in parts]
            seconds.append([*own, whole.seconds - sum(own)])
    return dict(zip((*PARTS, REST), np.array(seconds[warmup:]).T, strict=True))


@contextmanager
def compiled(model: nn.Module) -> Iterator[nn.Module]:
    """The model with backbone, encoder, and decoder compiled by torch.compile, inside the block."""
    parts = [model.get_submodule(path) for name, path in PARTS.items() if name != "results"]
    for part in parts:
        part.forward = torch.compile(part.forward)  # hooks stay outside
    try:
        yield model
    finally:
        for part in parts:
            del part.forward


def time_exported(
    path: Path, sizes: Sequence[tuple[int, int]], *, threads: int, warmup: int, runs: int
) -> tuple[np.ndarray, tuple[int, ...]]:
    """The seconds (``runs``,) of one session of an ONNX file, or of OpenVINO's .xml, on the CPU, from input to output.

    ``sizes`` are the (height, width) of the images that take turns where the file leaves them open. Also returns the
    shape of a fixed input, () of an open one. Raises UserError if the file is missing or of another kind, takes several
    images at a time, does not run, or lacks the package that runs it.
    """
    check_exported(path)
    seconds, size = [], sizes[0]
    try:
        given, run = _SESSIONS[path.suffix](path, threads)
        made = {each: [example_input(shape, kind, each) for shape, kind in given] for each in sizes}
        images = max((shape for shape, _ in given), key=len)
        fixed = tuple(images) if all(isinstance(side, int) for side in images) else ()
        if len(images) > 3 and isinstance(images[0], int) and images[0] > 1:
            raise UserError(f"{path} takes {images[0]} images at a time; one is timed, so export it with --batch 1.")
        for size in itertools.islice(itertools.cycle(sizes), warmup + runs):
            started = time.perf_counter()
            run(made[size])
            seconds.append(time.perf_counter() - started)
    except UserError:
        raise
    except Exception as error:  # runtimes raise errors of many types
        raise UserError(
            f"{path} does not run on {size[0]} x {size[1]} px ({error}); write it anew with tools/export.py, "
            "or give larger images."
        ) from error
    return np.array(seconds[warmup:]), fixed


def check_exported(path: Path) -> None:
    """Raise UserError unless there is a file of a kind that can be timed."""
    if path.suffix not in _SESSIONS:
        raise UserError(f"{path} is neither .onnx nor OpenVINO's .xml; name an exported file.")
    if not path.is_file():
        raise UserError(f"{path} does not exist; write it with tools/export.py.")


def _onnx_session(path: Path, threads: int) -> tuple[Inputs, Callable[[list[np.ndarray]], Any]]:
    onnxruntime = require("onnxruntime", f"Timing {path}", "export")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = {"tensor(uint8)": np.uint8, "tensor(int64)": np.int64, "tensor(float)": np.float32}
    names = [each.name for each in session.get_inputs()]
    given = [(each.shape, kinds[each.type]) for each in session.get_inputs()]
    return given, lambda inputs: session.run(None, dict(zip(names, inputs, strict=True)))


def _openvino_session(path: Path, threads: int) -> tuple[Inputs, Callable[[list[np.ndarray]], Any]]:
    openvino = require("openvino", f"Timing {path}", "export")
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}  # as the file was checked
    model = openvino.Core().compile_model(str(path), "CPU", options)
    shapes = [[side.get_length() if side.is_static else None for side in each.partial_shape] for each in model.inputs]
    return [(shape, each.element_type.to_dtype()) for shape, each in zip(shapes, model.inputs, strict=True)], model


_SESSIONS = {".onnx": _onnx_session, ".xml": _openvino_session}


def example_input(shape: Sequence[Any], kind: Any, size: tuple[int, int]) -> np.ndarray:
    """An input of an exported file: sizes, or pixels from 0 to 255 of an image, of ``size`` where that is open."""
    if len(shape) < 3:
        return np.resize(np.array(size), [side if isinstance(side, int) else 1 for side in shape]).astype(kind)
    open_sides = [*[1] * (len(shape) - 3), 3, *size]
    sides = [side if isinstance(side, int) else own for side, own in zip(shape, open_sides, strict=True)]
    return np.random.default_rng(0).integers(0, 256, sides).astype(kind)
