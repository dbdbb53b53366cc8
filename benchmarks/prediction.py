"""The time of a job of tools/predict.py as a multiple of the model's own: `python -m benchmarks.prediction`.

The model alone (from tensors to results) and the job with each choice of files take turns in one process; their medians
are compared. Loading the program is not counted.
"""

import argparse
import sys
import tempfile
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


def measure(predictor: Predictor, sources: list[Source], rounds: int) -> list[dict[str, Any]]:
    """A row for each choice of files."""
    images = [predictor.read(source.path) for source in sources]
    inputs = [to_model_input(image, predictor._resize, predictor.cfg.INPUT.FORMAT) for image in images]
    works = {" ".join(files): partial(run_job, predictor, sources, files) for files in FILES}
    seconds = side_by_side(
        {"model": partial(run_model, predictor, inputs), **works}, torch.device("cpu"), rounds=rounds
    )
    return [{"--save": name, "times the model": seconds[name] / seconds["model"]} for name in works]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", help="images (default: pictures of shapes)")
    parser.add_argument("--config-file", type=Path, default=REPO / "configs" / "demo" / "dimaskdino_shapes.yaml")
    parser.add_argument("--weights", type=Path, default=REPO / "tools" / "demo_model.pth")
    parser.add_argument("--pictures", type=int, default=40, help="of shapes, without inputs (default: 40)")
    parser.add_argument("--score", type=float, default=0.35, help="least score of a detection (default: 0.35)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--data", type=Path, default=Path("output/prediction"), help="folder of the pictures")
    args = parser.parse_args()
    keep_freed_memory("cpu")
    spec = ShapesSpec(num_train=1, num_val=args.pictures, seed=0)
    sources = find_sources(args.inputs or [str(make_shapes(args.data, spec) / "val")], sys.stdin)
    options = ["MODEL.MaskDINO.TEST.MASK_FORMAT", "rle"]
    predictor = Predictor(args.config_file, args.weights, options=options, device="cpu", score=args.score)
    rows = measure(predictor, sources, args.rounds)
    print(f"{len(sources)} images, {torch.get_num_threads()} threads")
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f"))


if __name__ == "__main__":
    main()
