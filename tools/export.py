#!/usr/bin/env python
"""Export a trained model to ONNX, TorchScript, torch.export or OpenVINO, and check that the file finds the same.

tools/predict_onnx.py runs an ONNX file without this package. If the check fails, the file is removed, and so is an
earlier one of that name.
"""

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dimaskdino.command_line import add_model_flags, at_least, import_modules
from dimaskdino.errors import UserError, run_cli
from dimaskdino.export.choices import FORMS, OPSET, OPSETS, SUFFIXES

CHECKED_IMAGES = 2


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--format", choices=SUFFIXES, required=True, help="of the file")
    default = "output/demo/run, else the repository's demo model"
    add("--weights", type=Path, help=f"run folder, saved model, or weight file (default: {default})")
    add("--config-file", type=Path, help="configuration of a weight file")
    add("--output", type=Path, required=True, help=f"file; {', '.join(SUFFIXES.values())}")
    add("--size", type=at_least(1), nargs=2, metavar=("H", "W"), help="fixed canvas in px (default: any size)")
    add("--batch", type=at_least(1), default=1, help="images at a time of a fixed canvas (default: 1)")
    add("--deformable-attention", choices=FORMS, default="grid_sample", help="its form (default: grid_sample)")
    add("--opset", type=int, choices=OPSETS, default=OPSET, metavar="16..20", help=f"of ONNX (default: {OPSET})")
    add("--images", type=Path, nargs=CHECKED_IMAGES, help="that the file is checked with (default: of DATASETS.TEST)")
    add("--evaluate", action="store_true", help="also measure AP and time on DATASETS.TEST beside PyTorch's")
    add_model_flags(parser, device=False)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes end here, before the imports that take seconds

import numpy as np
import torch
from predict import demo_model
from predict_onnx import Model, open_onnx

from dimaskdino import Predictor
from dimaskdino.export.check import dataset_entries, differences, evaluate, reference_results
from dimaskdino.export.formats import FORMATS, Export, require
from dimaskdino.export.graph import ExportGraph, check_exportable, describe, has_enough_tokens, predict
from dimaskdino.prediction.outputs import check_writable

CHECK_FAILED_STATUS = 1


def main() -> None:
    """Export what the command line names; the exit status is 1 if the file does not find what the model finds."""
    args = parse_args()
    logging.getLogger("dimaskdino").addHandler(logging.StreamHandler())
    import_modules(args.modules)
    predictor = build_predictor(args)
    check_exportable(predictor.model, predictor.cfg)
    files = check_output(args, predictor)
    images = args.images or example_images(predictor)
    temporary = args.output.with_name(f"unchecked_{args.output.name}")
    export = build_export(args, predictor)
    for file in files:
        file.unlink(missing_ok=True)
    try:
        messages = write_and_check(args.format, export, temporary, predictor, images)
        if messages:
            print(f"error: {args.output} was not kept, as it finds something else than the model:", file=sys.stderr)
            print("\n".join(messages), file=sys.stderr)
            sys.exit(CHECK_FAILED_STATUS)
        for file in files:
            temporary.with_suffix(file.suffix).replace(file)
    finally:
        for file in files:
            temporary.with_suffix(file.suffix).unlink(missing_ok=True)
    size = sum(file.stat().st_size for file in files) / 1e6
    print(f"{' and '.join(map(str, files))}: {size:.1f} MB; finds what the model finds on {len(images)} images")
    if args.evaluate:
        print(compare(args.format, open_file(args.format, args.output, export), predictor))


def build_predictor(args: argparse.Namespace) -> Predictor:
    """The model, on the CPU."""
    if args.config_file:
        run, weights = args.config_file, args.weights
    else:
        run, weights = (args.weights, None) if args.weights else demo_model()
    # The weights are exported as they are, and layers that torch.compile has changed cannot be traced.
    options = ["MODEL.MaskDINO.TEST.PRECISION", "float32", "MODEL.COMPILE", [], *args.opts]
    return Predictor(run, weights, options=options, device="cpu", score=0)


def check_output(args: argparse.Namespace, predictor: Predictor) -> list[Path]:
    """The files that will be written, after a look at whether they can be.

    Raises:
        UserError: something on the command line cannot work.
    """
    kind = FORMATS[args.format]
    for package in kind.packages:
        require(package)
    if args.output.suffix != kind.suffix:
        raise UserError(f"--output {args.output} must end in {kind.suffix} for --format {args.format}.")
    if not kind.dynamic and args.size is None:
        raise UserError(
            f"--format {args.format} needs --size: torch.export cannot prove that the sizes of the feature levels fit "
            "together for every image size; the other formats take any size."
        )
    step = predictor.model.size_divisibility
    if args.size and any(side % step for side in args.size):
        raise UserError(f"--size {args.size[0]} {args.size[1]}: both sides must be multiples of {step}.")
    if args.batch > 1 and args.size is None:
        raise UserError("--batch goes with --size; without it the file takes any number of images.")
    if args.output.is_dir():
        raise UserError(f"--output {args.output} is a folder; name a file in it.")
    if args.opset != OPSET and "onnx" not in kind.packages:
        raise UserError(f"--opset is of ONNX, and --format {args.format} has none; leave it out.")
    if args.evaluate:
        dataset_entries(predictor.cfg)
    check_writable(args.output.parent)
    return [args.output.with_suffix(suffix) for suffix in kind.files or (kind.suffix,)]


def build_export(args: argparse.Namespace, predictor: Predictor) -> Export:
    """What is to be written."""
    graph = ExportGraph(predictor.model).eval().requires_grad_(False)
    canvas = tuple(args.size) if args.size else None
    batch, form = args.batch if canvas else None, args.deformable_attention
    return Export(
        graph=graph,
        inputs=traced_inputs(graph, canvas, args.batch),
        description=describe(predictor, graph, canvas=canvas, batch=batch, form=form),
        dynamic=canvas is None,
        form=form,
        opset=args.opset,
    )


def traced_inputs(graph: ExportGraph, canvas: tuple[int, ...] | None, batch: int) -> tuple[torch.Tensor, ...]:
    """Noise to trace the graph with.

    Raises:
        UserError: the canvas has too few tokens for the model to select from.
    """
    if canvas is None:
        step, count = max(graph.model.size_divisibility, 32), 2
        while not has_enough_tokens(graph.model, count * step, (count + 1) * step):
            count += 1
        canvas, batch = (count * step, (count + 1) * step), 2
    elif not has_enough_tokens(graph.model, *canvas):
        raise UserError(f"--size {canvas[0]} {canvas[1]} is too small: it has fewer tokens than the model selects.")
    height, width = canvas
    images = torch.rand((batch, 3, height, width), generator=torch.Generator().manual_seed(0)) * 255
    image_sizes = torch.tensor([[height, width - 8]] * batch)
    return (images, image_sizes)[: len(graph.input_names)]


def example_images(predictor: Predictor) -> list[str]:
    """Two images of the dataset that the model is tested on.

    Raises:
        UserError: there is none on this machine.
    """
    try:
        entries = dataset_entries(predictor.cfg)
    except (UserError, OSError) as error:
        raise UserError(
            f"Give two images to check the file with, by --images, as there are no others: {error}"
        ) from error
    with_objects = [entry for entry in entries if entry.get("annotations", True)]
    if len(with_objects) < CHECKED_IMAGES:
        raise UserError(f"{predictor.cfg.DATASETS.TEST[0]} has no two images; give two by --images.")
    return [entry["file_name"] for entry in with_objects[:CHECKED_IMAGES]]


def write_and_check(kind: str, export: Export, path: Path, predictor: Predictor, images: list[Any]) -> list[str]:
    """Write the file; returns how its results differ from the model's.

    Raises:
        UserError: the format cannot hold the model, or its runtime cannot run it.
    """
    try:
        FORMATS[kind].write(export, path)
        return check(open_file(kind, path, export), predictor, images)
    except UserError:
        raise
    except Exception as error:  # exporters and runtimes raise errors of many types
        raise UserError(
            f"--format {kind} cannot hold this model ({type(error).__name__}: {error}); a fixed --size, another "
            "--format or the other --deformable-attention may."
        ) from error


def open_file(kind: str, path: Path, export: Export) -> Model:
    """The written file, as tools/predict_onnx.py runs it."""
    threads = torch.get_num_threads()
    if kind == "onnx":
        description, run = open_onnx(path, threads)
    else:
        description, run = FORMATS[kind].load(path, export.graph.output_names, threads)
    return Model(path, description=description, run=run)


def check(model: Model, predictor: Predictor, images: list[Any]) -> list[str]:
    """How the file's results differ from the model's: a line for each difference beyond the bars.

    Images go through the model one by one and, if it takes several, together. If it takes any size, so does a part of
    the first one, as those of a dataset may all have one size.
    """
    read = [(str(image), predictor.read(image)) for image in images]
    batches = [[each] for each in read] + ([read] if model.description["batch"] != 1 else [])
    if model.description["canvas"] is None:
        name, picture = read[0]
        batches.append([(f"{name}, its upper part", picture[: -(-4 * len(picture) // 5)])])
    messages = []
    for batch in batches:
        names, pictures = zip(*batch, strict=True)
        try:
            inputs, inner = model.prepare(pictures)
        except ValueError as error:
            raise UserError(
                f"The file cannot be checked with {' and '.join(names)}: {error}; name others by --images."
            ) from error
        expected = reference_results(predictor.model, inputs, inner, [picture.shape[:2] for picture in pictures])
        for name, found, wanted in zip(names, model(pictures), expected, strict=True):
            messages += [f"{name}: {message}" for message in differences(found, wanted)]
    return messages


def compare(name: str, model: Model, predictor: Predictor) -> str:
    """A table of the main figures and the median time of the file and of the model, both in as many threads."""
    graph = ExportGraph(predictor.model).eval()

    def run_model(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            tensors = [torch.from_numpy(value) for value in inputs.values()]
            outputs = graph.outputs(predict(graph.model, tensors[0], *tensors[1:]))
        return {name: value.numpy() for name, value in zip(graph.output_names, outputs, strict=True)}

    def predict_with(path: str, run: Callable[..., Any]) -> dict[str, Any]:
        return Model(description=model.description, run=run)([predictor.read(path)])[0]

    entries = dataset_entries(predictor.cfg)
    rows = []
    for label, graph_of in (("PyTorch", run_model), (name, model.run)):
        with tempfile.TemporaryDirectory() as folder:
            scores, seconds = evaluate(predictor.cfg, predict_with, graph_of, Path(folder), entries)
        rows.append((label, scores, seconds))
    lines = [
        f"{label:14}"
        + "".join(f"{task} {value:.2f}  " for task, value in scores.items())
        + f"{1000 * seconds:.1f} ms  {seconds / rows[0][2]:.2f} x"
        for label, scores, seconds in rows
    ]
    return "\n".join(
        [f"{predictor.cfg.DATASETS.TEST[0]}, {len(entries)} images, {torch.get_num_threads()} threads", *lines]
    )


if __name__ == "__main__":
    run_cli(main)
