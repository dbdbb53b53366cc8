"""A dataset of the size of COCO's train2017, made up, to time the start of a job with.

`python -m benchmarks.coco_size make FOLDER` writes FOLDER/coco in the layout of datasets/README.md: 118,287 images with
1,064,598 objects (polygons, and a crowd region in a hundred) in a file of about 630 MB, and as many names of images,
which are links to a few files. `python -m benchmarks.coco_size start FOLDER --processes 2` prints the seconds of each
phase from there to the first batch, and the memory of every process.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.utils import comm
from PIL import Image
from tabulate import tabulate

from benchmarks.measure import memory_bytes
from dimaskdino.config import get_cfg
from dimaskdino.data import build_train_loader, coco_file
from dimaskdino.engine import launch
from dimaskdino.engine.setup import check_datasets_once

CONFIG = Path(__file__).parents[1] / "configs" / "coco" / "dimaskdino_r50_12ep.yaml"

IMAGES, OBJECTS = 118_287, 1_064_598
SIZES = ((480, 640), (640, 480), (427, 640), (500, 375))  # height and width of the files behind the links
POINTS = 28  # of a polygon, on average
CROWD_SHARE = 0.01
CHUNK = 1000  # images that are drawn together


def make(folder: Path, *, images: int = IMAGES, objects: int = OBJECTS, seed: int = 0) -> Path:
    """Write the dataset and return its annotation file; one that is there is kept."""
    file = folder / "coco" / "annotations" / "instances_train2017.json"
    if file.is_file():
        return file
    generator = np.random.default_rng(seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    _make_images(folder / "coco" / "train2017", images)
    counts = 1 + generator.multinomial(objects - images, np.full(images, 1 / images))
    partial = file.with_suffix(".part")
    with open(partial, "w") as out:
        kept = [{key: each[key] for key in ("id", "name")} for each in COCO_CATEGORIES if each["isthing"]]
        out.write('{"categories": ' + json.dumps(kept) + ', "images": [')
        out.write(", ".join(json.dumps(_image(number)) for number in range(images)))
        out.write('], "annotations": [')
        labels = [each["id"] for each in kept]
        for start in range(0, images, CHUNK):
            of_chunk = counts[start : start + CHUNK]
            numbers = np.repeat(np.arange(start, start + len(of_chunk)), of_chunk)
            lines = map(json.dumps, _annotations(numbers, int(counts[:start].sum()), labels, generator))
            out.write(", " * (start > 0) + ", ".join(lines))
        out.write("]}")
    partial.rename(file)
    return file


def _name(number: int) -> str:
    return f"{number:012}.jpg"


def _image(number: int) -> dict[str, Any]:
    height, width = SIZES[number % len(SIZES)]
    return {"id": number, "file_name": _name(number), "height": height, "width": width}


def _make_images(folder: Path, number: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, (height, width) in enumerate(SIZES):
        Image.effect_noise((width, height), 50).convert("RGB").save(folder / f"file{index}.jpg")
    for index in range(number):
        link = folder / _name(index)
        if not link.is_symlink():
            os.symlink(f"file{index % len(SIZES)}.jpg", link)


def _annotations(
    images: np.ndarray, first: int, labels: list[int], generator: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """One object of each of ``images``, a star around a point with rays of random lengths."""
    number = len(images)
    size = np.array(SIZES)[images % len(SIZES)][:, ::-1]
    radius = size * generator.uniform(0.02, 0.25, (number, 1))
    center = radius + generator.random((number, 2)) * (size - 2 * radius)
    points = np.maximum(generator.poisson(POINTS, number), 3)
    drawn = generator.choice(labels, number).tolist()
    crowds = (generator.random(number) < CROWD_SHARE).tolist()
    for index in range(number):
        turns = np.sort(generator.random(points[index])) * 2 * np.pi
        rays = generator.uniform(0.5, 1, (points[index], 1)) * radius[index]
        corners = (center[index] + rays * np.stack((np.cos(turns), np.sin(turns)), 1)).round(2)
        low, high = corners.min(0), corners.max(0)
        x, y = corners.T
        area = abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
        polygons: Any = [corners.ravel().tolist()]
        yield {
            "segmentation": _crowd(low, high, size[index]) if crowds[index] else polygons,
            "area": round(float(area), 4),
            "iscrowd": int(crowds[index]),
            "image_id": int(images[index]),
            "bbox": [*low.tolist(), *(high - low).round(2).tolist()],
            "category_id": drawn[index],
            "id": first + index + 1,
        }


def _crowd(low: np.ndarray, high: np.ndarray, size: np.ndarray) -> dict[str, Any]:
    """A box as an RLE that is not compressed, as COCO's crowd regions are."""
    (left, top), (right, bottom) = low.astype(int).tolist(), np.ceil(high).astype(int).tolist()
    width, height = size.tolist()
    inside, between = bottom - top, height - (bottom - top)
    runs = [left * height + top, *[inside, between] * (right - left - 1), inside]
    return {"counts": [*runs, width * height - sum(runs)], "size": [height, width]}


def start(args: argparse.Namespace) -> None:
    """The start of a training in one of its processes, from the registered dataset to the first batch."""
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIG))
    cfg.merge_from_list(["DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu", "SEED", "1"])
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", str(2 * comm.get_world_size())])
    clock, row = Clock(), {"process": comm.get_rank()}
    with patch.object(coco_file, "read_json", clock.timed(coco_file.read_json)):
        check_datasets_once(cfg, train=True)
        row |= clock.phase("check")
        batches = build_train_loader(cfg)
        row |= clock.phase("loader")
    next(iter(batches))
    row |= clock.phase("first batch")
    comm.synchronize()
    rows = comm.gather({**row, "reading a file": f"{clock.inside:.1f} s"})
    if comm.is_main_process():
        print(tabulate(rows, headers="keys", tablefmt="github"))


class Clock:
    """Seconds and memory by phase of this process."""

    def __init__(self) -> None:
        self._last, self.inside = time.perf_counter(), 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose seconds are added up in :attr:`inside`."""

        def call(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.inside += time.perf_counter() - began

        return call

    def phase(self, name: str) -> dict[str, str]:
        """What happened since the last phase: seconds, and gigabytes at the end and at most."""
        seconds, self._last = time.perf_counter() - self._last, time.perf_counter()
        held, most = memory_bytes(), memory_bytes(peak=True)
        Path("/proc/self/clear_refs").write_text("5")
        return {name: f"{seconds:.1f} s, {held / 1e9:.2f} GB, at most {most / 1e9:.2f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=["make", "start"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int, default=1, help="of the job that starts (default: 1)")
    args = parser.parse_args()
    file = make(args.folder)
    if args.job == "make":
        print(f"{file}: {file.stat().st_size / 1e6:.0f} MB")
        return
    os.environ["DETECTRON2_DATASETS"] = str(args.folder)
    launched = {"num_gpus": 0, "num_machines": 1, "machine_rank": 0, "dist_url": "auto"}
    launch(start, argparse.Namespace(**launched), cpu_processes=args.processes)


if __name__ == "__main__":
    main()
