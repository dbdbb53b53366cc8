"""What tiles cost in accuracy: `python -m benchmarks.tiles`, three minutes on a core.

The demo's model predicts a mosaic of pictures of `shapes` in tiles, and each of the same pictures alone. No limit of
detections applies to either.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
from PIL import Image
from pycocotools.coco import COCO
from tabulate import tabulate

from dimaskdino import Predictor
from dimaskdino.data.datasets.shapes import ShapesSpec, annotation_file, make_shapes
from dimaskdino.evaluation.coco import coco_curves
from dimaskdino.structures.rle_masks import place_crop

REPO = Path(__file__).parents[1]
SCORE = 0.1
NO_LIMIT = 100_000


def make_mosaic(folder: Path, pieces: int) -> tuple[list[np.ndarray], np.ndarray, dict[str, Any], dict[str, Any]]:
    """``pieces`` x ``pieces`` pictures, their mosaic, and the truth of both in COCO's format."""
    truth = json.loads(annotation_file(folder, "val").read_text())
    pictures = [np.asarray(Image.open(folder / "val" / image["file_name"])) for image in truth["images"]]
    side = len(pictures[0])
    rows = [np.concatenate(pictures[start : start + pieces], axis=1) for start in range(0, pieces**2, pieces)]
    coco, annotations = COCO(), []
    coco.imgs = {image["id"]: image for image in truth["images"]}
    for annotation in truth["annotations"]:
        row, column = (side * each for each in divmod(annotation["image_id"] - 1, pieces))
        x, y, width, height = annotation["bbox"]
        rle = place_crop(coco.annToMask(annotation) > 0, row, column, (side * pieces, side * pieces))
        placed = {
            "bbox": [x + column, y + row, width, height],
            "segmentation": rle | {"counts": rle["counts"].decode()},
        }
        annotations.append(annotation | placed | {"image_id": 1})
    image = {"id": 1, "file_name": "mosaic.png", "width": side * pieces, "height": side * pieces}
    return pictures, np.concatenate(rows), truth, truth | {"images": [image], "annotations": annotations}


def average_precision(truth: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, float]:
    """Box and mask AP, percent."""
    coco, scores = hotcoco.COCO(truth), {}
    for name, task, key in (("box AP", "bbox", "bbox"), ("mask AP", "segm", "segmentation")):
        kept = [{each: result[each] for each in ("image_id", "category_id", "score", key)} for result in results]
        precision = coco_curves(coco, kept, task, limits=[NO_LIMIT]).precision[..., 0, 0]
        scores[name] = 100 * float(precision[precision > -1].mean())
    return scores


def measure(folder: Path, pieces: int, overlaps: list[float]) -> list[dict[str, Any]]:
    """A row for the pictures alone, and one for each overlap; seconds are of this process's CPU."""
    pictures, mosaic, truth, placed = make_mosaic(folder, pieces)
    rows = []
    for overlap in (None, *overlaps):
        tile = None if overlap is None else len(pictures[0])
        config, weights = REPO / "configs" / "demo" / "dimaskdino_shapes.yaml", REPO / "tools" / "demo_model.pth"
        predict = Predictor(config, weights, device="cpu", score=SCORE, batch_size=8, tile=tile, overlap=overlap or 0)
        start = time.process_time()
        found = predict(pictures if overlap is None else [mosaic])
        seconds = time.process_time() - start
        results = [result for number, each in enumerate(found, start=1) for result in each.to_coco(number)]
        name = "alone" if overlap is None else f"overlap {overlap}"
        rows.append({"": name, **average_precision(truth if overlap is None else placed, results), "seconds": seconds})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", type=int, default=16, help="pictures in a row (default: 16)")
    parser.add_argument("--overlaps", type=float, nargs="+", default=[0.2, 0.4, 0.5])
    parser.add_argument("--seed", type=int, default=0, help="of the pictures (default: 0, those of shapes_val)")
    parser.add_argument("--data", type=Path, default=Path("output/tiles"), help="folder of the pictures")
    args = parser.parse_args()
    spec = ShapesSpec(num_train=1, num_val=args.pieces**2, seed=args.seed)
    rows = measure(make_shapes(args.data, spec), args.pieces, args.overlaps)
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".1f"))


if __name__ == "__main__":
    main()
