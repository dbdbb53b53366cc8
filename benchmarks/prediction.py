"""The time of a job of tools/predict.py as a multiple of the model's own: `python -m benchmarks.prediction`.

The model alone (from tensors to results) and the job with each choice of files take turns in one process; their medians
are compared. So is the time of a job that processes of one thread share, as under torchrun. Loading the program is not
counted.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.measure import side_by_side
from dimaskdino import Predictor
from dimaskdino.cpu import keep_freed_memory
from dimaskdino.data.datasets.shapes import ShapesSpec, make_shapes
from dimaskdino.prediction.images import to_model_input
from dimaskdino.prediction.inputs import Source, find_sources
from dimaskdino.prediction.job import Job
from dimaskdino.prediction.outputs import Outputs
from dimaskdino.prediction.records import Records, Share

REPO = Path(__file__).parents[1]
FILES = (("coco",), ("pictures", "coco"))
LOADED: dict[str, Predictor] = {}  # the model of a process that shares a job


def run_model(predictor: Predictor, inputs: list[dict[str, Any]]) -> None:
    """The model alone on inputs that are ready."""
    with torch.inference_mode():
        for each in inputs:
            predictor.model([each])


def run_job(predictor: Predictor, sources: list[Source], files: tuple[str, ...]) -> None:
    """A job that reads the sources and writes ``files``."""
    with tempfile.TemporaryDirectory() as folder:
        Job(
            read=predictor.read,
            predict=predictor.predict_batch,
            outputs=Outputs(Path(folder), files),
            records=Records(Path(folder), {}, Share(0, 1), overwrite=False),
        ).run(sources)


def load(args: argparse.Namespace) -> Predictor:
    """The model of the command line, as tools/predict.py has it."""
    keep_freed_memory("cpu")
    options = ["MODEL.MaskDINO.TEST.MASK_FORMAT", "rle"]
    return Predictor(args.config_file, args.weights, options=options, device="cpu", score=args.score)


def load_in_process(args: argparse.Namespace) -> None:
    """What a process that shares a job begins with."""
    LOADED["model"] = load(args)


def run_share(sources: list[Source], files: tuple[str, ...]) -> None:
    """The part of a job that one process does."""
    run_job(LOADED["model"], sources, files)


@contextmanager
def processes_of_one_thread(count: int, args: argparse.Namespace) -> Iterator[ProcessPoolExecutor]:
    """Processes that have a thread and the model each."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes; this one has read it
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, initializer=load_in_process, initargs=(args,)) as pool:
        yield pool


def run_shared(pool: ProcessPoolExecutor, count: int, sources: list[Source], files: tuple[str, ...]) -> None:
    """A job that ``count`` processes share."""
    list(pool.map(partial(run_share, files=files), [sources[index::count] for index in range(count)]))


def measure(predictor: Predictor, sources: list[Source], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each choice of files, in one process and shared."""
    images = [predictor.read(source.path) for source in sources]
    inputs = [to_model_input(image, predictor._resize, predictor.cfg.INPUT.FORMAT) for image in images]
    works = {(1, " ".join(files)): partial(run_job, predictor, sources, files) for files in FILES}
    with processes_of_one_thread(args.processes, args) as pool:
        for files in FILES if args.processes > 1 else ():
            works[args.processes, " ".join(files)] = partial(run_shared, pool, args.processes, sources, files)
        model = {(0, "model"): partial(run_model, predictor, inputs)}
        seconds = side_by_side(model | works, torch.device("cpu"), rounds=args.rounds)
    return [
        {"processes": count, "--save": files, "times the model": seconds[count, files] / seconds[0, "model"]}
        for count, files in works
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", help="images (default: pictures of shapes)")
    parser.add_argument("--config-file", type=Path, default=REPO / "configs" / "demo" / "dimaskdino_shapes.yaml")
    parser.add_argument("--weights", type=Path, default=REPO / "tools" / "demo_model.pth")
    parser.add_argument("--pictures", type=int, default=40, help="of shapes, without inputs (default: 40)")
    parser.add_argument("--score", type=float, default=0.35, help="least score of a detection (default: 0.35)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--processes", type=int, default=torch.get_num_threads(), help="that share a job (default: one for each thread)"
    )
    parser.add_argument("--data", type=Path, default=Path("output/prediction"), help="folder of the pictures")
    args = parser.parse_args()
    spec = ShapesSpec(num_train=1, num_val=args.pictures, seed=0)
    sources = find_sources(args.inputs or [str(make_shapes(args.data, spec) / "val")], sys.stdin)
    rows = measure(load(args), sources, args)
    print(f"{len(sources)} images, {torch.get_num_threads()} threads")
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f"))


if __name__ == "__main__":
    main()
