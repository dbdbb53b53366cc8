#!/usr/bin/env python
"""Cut a COCO dataset of large pictures, with its labels, to tiles that a model is trained on.

  tile_dataset.py --annotations train.json --images photos --side 512 --overlap 0.2 --output tiles

Objects on a seam are cut; tiles without objects are kept, as background. Predict with tools/predict.py --tile.
"""

import argparse
import json
from pathlib import Path

from dimaskdino.command_line import at_least
from dimaskdino.errors import DatasetError, run_cli


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--annotations", type=Path, required=True, metavar="FILE", help="in COCO's format")
    add("--images", type=Path, required=True, metavar="DIR", help="folder that its file names are relative to")
    add("--output", type=Path, required=True, metavar="DIR", help="for images/ and annotations.json")
    add("--side", type=at_least(16), default=512, metavar="PX", help="of a tile (default: 512)")
    add("--overlap", type=float, default=0.2, metavar="SHARE", help="that neighbors have in common (default: 0.2)")
    add("--least-share", type=float, default=0.05, metavar="SHARE", help="of an object in a tile (default: 0.05)")
    add("--no-exif", action="store_true", help="labels were drawn on photos as stored (INPUT.APPLY_EXIF False)")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes end here, before the imports that take seconds

from PIL import Image
from tqdm import tqdm

from dimaskdino.data.coco_file import Json, annotations_by_image, below, read_coco
from dimaskdino.data.cutting import cut_annotation
from dimaskdino.data.validation.rules import why_refused
from dimaskdino.prediction.canvases import Canvas, open_canvas
from dimaskdino.prediction.tiles import Tile, Tiling


def main() -> None:
    """Cut every picture and its labels."""
    args = parse_args()
    tiling, coco = Tiling(args.side, args.overlap), read_coco(str(args.annotations))
    images: list[Json] = []
    annotations: list[Json] = []
    names = {category["id"]: category["name"] for category in coco["categories"]}
    stems: dict[str, str] = {}
    (args.output / "images").mkdir(parents=True, exist_ok=True)
    for picture, objects in tqdm(annotations_by_image(coco), unit="image"):
        canvas = open_canvas(args.images / picture["file_name"], exif=not args.no_exif)
        size = picture["height"], picture["width"]
        if canvas.size != size:
            found = f"{canvas.size[1]}x{canvas.size[0]} px, listed as {size[1]}x{size[0]}"
            raise DatasetError(f"{args.images / picture['file_name']} is {found}; correct the size.")
        if other := stems.get(stem_of(picture)):
            both = f"{other} and {picture['file_name']}"
            raise DatasetError(f"{args.annotations} lists {both}, whose tiles would have the same names; rename one.")
        stems[stem_of(picture)] = picture["file_name"]
        for each in objects:
            if wrong := why_refused(each, size, names, scored="bbox" in each):
                raise DatasetError(f"Annotation {each['id']} in {args.annotations}: {wrong}.")
        for tile in tiling.tiles(size):
            images.append(write_tile(canvas, picture, tile, args.output, len(images) + 1))
            annotations += cut_objects(objects, size, tile, len(images), args.least_share, len(annotations) + 1)
    content = {"images": images, "annotations": annotations, "categories": coco["categories"]}
    path = args.output / "annotations.json"
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    having = len({each["image_id"] for each in annotations})
    print(f"{path}: {len(images)} tiles, {len(images) - having} of them empty, {len(annotations)} objects")


def write_tile(canvas: Canvas, picture: Json, tile: Tile, output: Path, image_id: int) -> Json:
    """Write one tile as PNG; returns its entry, which says where it is from."""
    name = f"{stem_of(picture)}_{tile.top}_{tile.left}.png"
    height, width = tile.bottom - tile.top, tile.right - tile.left
    (output / "images" / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas.read(tile.top, tile.left, height, width)).save(output / "images" / name)
    place = {"source": picture["file_name"], "top": tile.top, "left": tile.left}
    return {"id": image_id, "file_name": name, "height": height, "width": width, **place}


def stem_of(picture: Json) -> str:
    """The path of a picture's tiles below the output, without what tells them apart."""
    return below(picture["file_name"]).with_suffix("").as_posix()


def cut_objects(
    objects: list[Json], size: tuple[int, int], tile: Tile, image_id: int, least_share: float, first_id: int
) -> list[Json]:
    """The objects of a picture that lie in a tile."""
    window = tile.top, tile.left, tile.bottom, tile.right
    cut: list[Json] = []
    for each in objects:
        if (inside := cut_annotation(each, size, window, least_share)) is not None:
            cut.append({**inside, "id": first_id + len(cut), "image_id": image_id})
    return cut


if __name__ == "__main__":
    run_cli(main)
