"""Writing a graph in each format, and running what was written."""

import functools
import io
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dimaskdino import errors
from dimaskdino.errors import UserError
from dimaskdino.export.choices import OPSET, SUFFIXES
from dimaskdino.export.graph import KEY, ExportGraph
from dimaskdino.layers.exporting import exporting

require = functools.partial(errors.require, who="This format", extra="export")
Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
_EXTRA_FILE = f"{KEY}.json"
_AXES = {"images": {2: "height", 3: "width"}, "masks": {2: "mask_height", 3: "mask_width"}}


@dataclass(frozen=True, kw_only=True)
class Export:
    """A graph and how it is to be written."""

    graph: ExportGraph  # in evaluation
    inputs: tuple[Tensor, ...]  # that it is traced with; their sizes are those of the file where it is not ``dynamic``
    description: dict[str, Any]  # for the file's metadata
    dynamic: bool  # leave open the number and the size of the images
    form: str  # of deformable attention
    opset: int = OPSET  # of ONNX


def write_onnx(export: Export, path: Path) -> None:
    """Write an .onnx file of standard operators."""
    onnx = require("onnx")
    buffer = io.BytesIO()
    names = export.graph.input_names
    axes = {name: {0: "batch", **_AXES.get(name, {})} for name in (*names, *export.graph.output_names)}
    with _tracing(export.form):
        torch.onnx.export(
            export.graph,
            export.inputs,
            buffer,  # type: ignore[arg-type]
            dynamo=False,
            opset_version=export.opset,
            input_names=names,
            output_names=export.graph.output_names,
            dynamic_axes=axes if export.dynamic else None,
        )
    model = onnx.load_model_from_string(buffer.getvalue())
    foreign = sorted(
        {f"{node.domain}::{node.op_type}" for node in model.graph.node if node.domain not in ("", "ai.onnx")}
    )
    if foreign:
        raise UserError(f"The model needs operators that are not part of ONNX: {', '.join(foreign)}.")
    onnx.helper.set_model_props(model, {KEY: json.dumps(export.description)})
    onnx.save_model(model, str(path))


def write_torchscript(export: Export, path: Path) -> None:
    """Write a TorchScript file."""
    with _tracing(export.form):
        traced = torch.jit.trace(export.graph, export.inputs, check_trace=False)
        torch.jit.save(traced, str(path), _extra_files={_EXTRA_FILE: json.dumps(export.description)})


def write_torch_export(export: Export, path: Path) -> None:
    """Write a file of torch.export, of ATen operators."""
    with _tracing(export.form):
        program = torch.export.export(export.graph, export.inputs)
        torch.export.save(program, path, extra_files={_EXTRA_FILE: json.dumps(export.description)})


def write_openvino(export: Export, path: Path) -> None:
    """Write OpenVINO's pair of files, .xml and .bin, by way of ONNX."""
    openvino = require("openvino")
    between = path.with_suffix(".onnx.tmp")
    try:
        write_onnx(export, between)
        model = openvino.convert_model(str(between))
    finally:
        between.unlink(missing_ok=True)
    model.set_rt_info(json.dumps(export.description), [KEY])
    openvino.save_model(model, str(path), compress_to_fp16=False)


def open_torchscript(path: Path, _: int) -> tuple[dict[str, Any], Callable[..., Any]]:
    """The description and the graph of a TorchScript file."""
    extra: dict[str, Any] = {_EXTRA_FILE: ""}
    with _quiet():
        module = torch.jit.load(str(path), _extra_files=extra)
    return json.loads(extra[_EXTRA_FILE]), module


def open_torch_export(path: Path, _: int) -> tuple[dict[str, Any], Callable[..., Any]]:
    """The description and the graph of a file of torch.export."""
    extra: dict[str, Any] = {_EXTRA_FILE: ""}
    with _quiet():
        program = torch.export.load(path, extra_files=extra)
    return json.loads(extra[_EXTRA_FILE]), program.module()


def open_openvino(path: Path, threads: int) -> tuple[dict[str, Any], Callable[..., Any]]:
    """The description and the graph of OpenVINO's files."""
    openvino = require("openvino")
    core = openvino.Core()
    model = core.read_model(str(path))
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = core.compile_model(model, "CPU", options)
    return json.loads(model.get_rt_info([KEY]).astype(str)), lambda *inputs: compiled(
        [each.numpy() for each in inputs]
    ).to_tuple()


@dataclass(frozen=True)
class Format:
    """A kind of file."""

    suffix: str  # that its files must have
    write: Callable[[Export, Path], None]  # writes one
    # gives the description and the graph of one, in ``threads``; None for ONNX, which tools/predict_onnx.py opens
    # without this package
    open: Callable[[Path, int], tuple[dict[str, Any], Callable[..., Any]]] | None = None
    packages: tuple[str, ...] = ()  # that it needs
    dynamic: bool = True  # whether the number and size of images may be left open
    files: tuple[str, ...] = ()  # suffixes of all files that it consists of

    def load(self, path: Path, output_names: Sequence[str], threads: int) -> tuple[dict[str, Any], Run]:
        """The description of a file, and its graph as a function of arrays by name."""
        assert self.open is not None
        description, module = self.open(path, threads)

        def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            with torch.no_grad():
                outputs = module(*(torch.from_numpy(value) for value in inputs.values()))
            return {name: np.asarray(value) for name, value in zip(output_names, outputs, strict=True)}

        return description, run


FORMATS = {
    "onnx": Format(SUFFIXES["onnx"], write_onnx, packages=("onnx", "onnxruntime")),
    "torchscript": Format(SUFFIXES["torchscript"], write_torchscript, open_torchscript),
    "torch-export": Format(SUFFIXES["torch-export"], write_torch_export, open_torch_export, dynamic=False),
    "openvino": Format(
        SUFFIXES["openvino"], write_openvino, open_openvino, ("onnx", "openvino"), files=(".xml", ".bin")
    ),
}


@contextmanager
def _tracing(form: str) -> Iterator[None]:
    with torch.no_grad(), exporting(form), _quiet():
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings: the tracers warn of every check of a size, and of their own age; the file itself is checked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
