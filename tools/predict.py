#!/usr/bin/env python
"""Predict images, folders, videos or a camera with a trained model: pictures, COCO results, masks, CSV.

Run the same command again to continue a job that was stopped. Under torchrun or in a Slurm array its
processes share the inputs, and whichever is last merges the results.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
import time
import warnings
import zlib
from collections import Counter
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from dimaskdino.command_line import add_model_flags, at_least, fraction, import_modules
from dimaskdino.cpu import keep_freed_memory
from dimaskdino.errors import BAD_INPUT_STATUS, UserError, require, run_cli

DEMO_RUN = Path("output/demo/run")
# What stands in for it where make demo did not run.
DEMO_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo" / "dimaskdino_shapes.yaml"
DEMO_WEIGHTS = Path(__file__).resolve().with_name("demo_model.pth")
OVERLAP = 0.2


def class_score(text: str) -> tuple[str, float]:
    """An argparse type: CLASS=SCORE."""
    name, separator, score = text.rpartition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text} is not CLASS=SCORE, such as car=0.7")
    return name, fraction(score)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="file, folder, glob, - for a list on stdin, @FILE for one in a file")
    add("--camera", type=at_least(0), metavar="N", help="also the camera of this number, until Ctrl-C")
    add(
        "--weights",
        type=Path,
        help=f"run folder, saved model, or weight file (default: {DEMO_RUN}, else the repository's demo model)",
    )
    add("--config-file", type=Path, help="configuration of a weight file")
    add("--output", type=Path, default=Path("output/predictions"), help="folder (default: output/predictions)")
    add(
        "--save",
        nargs="+",
        choices=("pictures", "coco", "masks", "csv", "geojson"),
        default=["pictures", "coco"],
        help="what to write (default: pictures coco)",
    )
    add("--score", type=fraction, default=0.35, help="least score of a detection (default: 0.35)")
    add("--score-class", type=class_score, action="append", default=[], metavar="CLASS=SCORE", help="of one class")
    add("--classes", nargs="+", help="classes to keep (default: all)")
    add("--max-detections", type=at_least(1), help="per image (default: as the configuration says)")
    add("--boxes-from-masks", action="store_true", help="boxes around the masks instead of the predicted ones")
    add("--keep-largest", action="store_true", help="keep the largest connected part of each mask")
    add("--min-area", type=at_least(0), default=0, metavar="PX", help="remove smaller connected parts of masks")
    add("--mask-nms", type=fraction, metavar="IOU", help="remove objects that overlap a better one of their class more")
    add("--query-features", action="store_true", help="write the query behind each detection, as safetensors")
    add("--track", action="store_true", help="number the objects of videos (needs the package trackers)")
    add("--by-instance", action="store_true", help="draw each object in a color of its own")
    add("--annotations", type=Path, help="COCO file whose image ids the results take, by file name")
    add("--tile", type=at_least(16), metavar="PX", help="predict images in tiles of this side, for huge ones")
    add("--augment", action="store_true", help="join what several sizes and mirror images show (keys TEST.AUG)")
    add(
        "--overlap", type=float, default=OVERLAP, help=f"share of a tile that the next one repeats (default: {OVERLAP})"
    )
    add("--batch-size", type=at_least(1), default=1, help="images that go through the model together (default: 1)")
    add("--max-frames", type=at_least(1), help="of each video and of the camera")
    add("--no-exif", action="store_true", help="leave images as stored, whatever their EXIF data says")
    add(
        "--overwrite",
        action="store_true",
        help="begin anew in a folder of results; pictures that are not made again stay",
    )
    add_model_flags(parser)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes end here, before the imports that take seconds

import torch
import torch.distributed as dist
from PIL import Image

from dimaskdino import Predictor
from dimaskdino.config import Config
from dimaskdino.devices import device_of_process
from dimaskdino.modeling.meta_arch import needs_masks
from dimaskdino.prediction.canvases import Canvas
from dimaskdino.prediction.inputs import Source, find_sources
from dimaskdino.prediction.job import Job, known_id
from dimaskdino.prediction.outputs import Outputs, check_writable
from dimaskdino.prediction.records import Records, Share, write_coco, write_csv

# Flags that say nothing about semantic maps; those of OF_OBJECTS say nothing about panoptic maps either.
OF_SEGMENTS = ("classes", "score_class")
OF_MASKS = ("boxes_from_masks", "keep_largest", "min_area")
OF_OBJECTS = ("track", "query_features", "max_detections", "mask_nms", *OF_MASKS)
# A folder takes the results of one choice of all flags but these.
NO_SETTINGS = ("inputs", "output", "batch_size", "device", "overwrite")


def main() -> None:
    """Predict what the command line names; the exit status is 3 if some of it could not be predicted."""
    args = parse_args()
    logging.getLogger("dimaskdino").addHandler(logging.StreamHandler())  # warnings, and the names of bad files
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # photos of 90 megapixels are no attack
    warnings.filterwarnings("ignore", "Dataset has no geotransform")  # of a TIFF in tiles, which need not have one
    import_modules(args.modules)
    share = Share.from_environment(os.environ)
    if share.count > 1 and "-" in args.inputs:
        raise UserError("Several processes cannot share a list on stdin; write it to a file and give @FILE.")
    check_together(args)
    sources = find_sources(args.inputs, sys.stdin, camera=args.camera, output=args.output)
    check_kinds(args, sources)
    ids = image_ids(args.annotations)  # before the folder takes the settings of a job that may not begin
    if args.annotations:
        check_ids(sources, ids, args.annotations)
    check_writable(args.output)
    predictor = build_predictor(args)
    check_model(args, predictor.cfg)
    records = Records(args.output, settings(args, sources, predictor), share, overwrite=args.overwrite)
    done = {number for number, succeeded in records.state().items() if succeeded}
    mine = sources[share.index :: share.count]  # what other processes do now was not done before
    own = [source for source in mine if source.number not in done]
    if len(own) < len(mine):
        print(f"{len(mine) - len(own)} of {len(mine)} inputs were done before; {len(own)} are left for this process")
    job = build_job(args, predictor, records, ids)
    started = time.perf_counter()
    job.run(own)
    seconds = time.perf_counter() - started
    merge(args, predictor, records, len(sources))
    wait_for_others()
    count = len(own) - len(job.failed)
    print(f"{count} inputs in {seconds:.1f} s ({count / seconds:.2f} per second): {args.output}")
    if job.failed:
        print(f"{len(job.failed)} could not be predicted; they are named above", file=sys.stderr)
        sys.exit(BAD_INPUT_STATUS)


def check_together(args: argparse.Namespace) -> None:
    """Check flags that need each other or a package, before anything is computed.

    Raises:
        UserError: naming the flag.
    """
    if args.track:
        require("trackers", "--track", "track")
    if args.query_features and args.tile:
        raise UserError("--query-features and --tile do not go together: an object of several tiles has no one query.")
    if args.overlap != OVERLAP and not args.tile:
        raise UserError("--overlap is a share of tiles; give --tile as well.")
    if "geojson" in args.save and not args.tile:
        raise UserError("--save geojson takes GeoTIFF in tiles; give --tile as well.")


def check_kinds(args: argparse.Namespace, sources: list[Source]) -> None:
    """Check flags that are about images alone, or about videos alone.

    Raises:
        UserError: naming the flag.
    """
    videos = [source.name for source in sources if source.kind != "image"]
    of_images = [f"--save {kind}" for kind in ("geojson", "masks") if kind in args.save]
    of_images += ["--query-features"] * args.query_features
    if videos and of_images:
        raise UserError(
            f"{of_images[0]} is about images, and the inputs have videos ({videos[0]}); predict those by themselves. "
            "The masks of a video are in videos/NAME.jsonl."
        )
    if args.track and not videos:
        raise UserError("--track numbers the objects of videos, and the inputs have none; leave it out.")


def build_predictor(args: argparse.Namespace) -> Predictor:
    """The predictor that the command line describes."""
    if args.weights is None and args.config_file is None:
        args.config_file, args.weights = demo_model()
    run, weights = (args.config_file, args.weights) if args.config_file else (args.weights, None)
    keys = ["MODEL.MaskDINO.TEST.MASK_FORMAT", "rle", "MODEL.MaskDINO.TEST.QUERY_FEATURES", args.query_features]
    keys += ["TEST.AUG.ENABLED", True] if args.augment else []
    predictor = Predictor(
        run,
        weights,
        options=[*keys, *args.opts],
        device=device_of_process(args.device),
        exif=False if args.no_exif else None,
        batch_size=args.batch_size,
        tile=args.tile,
        overlap=args.overlap,
        score=args.score,
        class_scores=dict(args.score_class),
        classes=args.classes,
        max_detections=args.max_detections,
        boxes_from_masks=args.boxes_from_masks,
        keep_largest=args.keep_largest,
        min_area=args.min_area,
        mask_nms=args.mask_nms,
    )
    keep_freed_memory(predictor.model.device.type)
    return predictor


def demo_model() -> tuple[Path, Path | None]:
    """The run of make demo, or else the configuration and weights of the repository's small model."""
    if any(DEMO_RUN.glob("*.pth")):
        return DEMO_RUN, None
    print(f"No model is named, and {DEMO_RUN} has none, so this uses the repository's: colored shapes, {DEMO_WEIGHTS}")
    return DEMO_CONFIG, DEMO_WEIGHTS


def settings(args: argparse.Namespace, sources: list[Source], predictor: Predictor) -> dict[str, Any]:
    """What a folder of results was made from."""
    listed = hashlib.sha256(os.fsencode("\n".join(os.path.abspath(source.path) for source in sources))).hexdigest()
    chosen = {name: value for name, value in vars(args).items() if name not in NO_SETTINGS}
    weights = 0  # a run that was trained again has other weights under the same name
    for tensor in predictor.model.state_dict().values():
        weights = zlib.crc32(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), weights)
    cfg = predictor.cfg.clone()  # of a file that may have changed, too
    cfg.MODEL.DEVICE = ""
    model = zlib.crc32(f"{cfg.MODEL}{cfg.INPUT}{cfg.TEST}{predictor.classes}".encode())
    known = {"number": len(sources), "sha256": listed, "crc32_of_weights": weights, "crc32_of_model": model}
    return known | json.loads(json.dumps(chosen, default=str))


def check_model(args: argparse.Namespace, cfg: Config) -> None:
    """Check that the model gives what is to be written.

    Raises:
        UserError: naming the flag.
    """
    test = cfg.MODEL.MaskDINO.TEST
    of_objects = [name for name in (*OF_OBJECTS, *(() if test.PANOPTIC_ON else OF_SEGMENTS)) if getattr(args, name)]
    if of_objects and not test.INSTANCE_ON:
        flag = f"--{of_objects[0].replace('_', '-')}"
        raise UserError(f"{flag} needs a model of objects (MODEL.MaskDINO.TEST.INSTANCE_ON); leave it out.")
    of_masks = [f"--save {kind}" for kind in ("geojson", "masks") if kind in args.save]
    of_masks += [f"--{name.replace('_', '-')}" for name in OF_MASKS if getattr(args, name)]
    if of_masks and not needs_masks(cfg):
        raise UserError(f"{of_masks[0]} needs a model with masks; this one finds boxes alone, so leave it out.")


def build_job(args: argparse.Namespace, predictor: Predictor, records: Records, ids: dict[str, Any]) -> Job:
    """The job that the command line describes."""
    kinds = {*args.save, *(["features"] if args.query_features else [])}
    return Job(
        read=partial(read_map, predictor) if "geojson" in kinds else predictor.read,
        predict=predictor.predict_batch,
        outputs=Outputs(args.output, kinds, by_instance=args.by_instance),
        records=records,
        batch_size=args.batch_size,
        pictures="pictures" in kinds,
        by_instance=args.by_instance,
        track_score=args.score if args.track else None,
        image_ids=ids,
        max_frames=args.max_frames,
    )


def read_map(predictor: Predictor, path: str) -> Canvas:
    """Read a picture that has a place on the map."""
    canvas = predictor.read(path)
    if not isinstance(canvas, Canvas) or canvas.to_map is None:
        raise UserError(f"{path} has no place on the map; --save geojson takes GeoTIFF, with --tile and rasterio.")
    return canvas


def image_ids(path: Path | None) -> dict[str, Any]:
    """Image ids of a COCO file by file name, and by its last part where no other image has that."""
    if path is None:
        return {}
    try:
        images = json.loads(path.read_text(encoding="utf-8-sig"))["images"]
        ids = {image["file_name"].replace("\\", "/"): image["id"] for image in images}
        set(ids.values())  # TypeError for lists and the like
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a COCO file with images ({type(error).__name__}: {error}).") from error
    count = Counter(Path(name).name for name in ids)
    return ids | {Path(name).name: number for name, number in ids.items() if count[Path(name).name] == 1}


def check_ids(sources: list[Source], ids: dict[str, Any], annotations: Path) -> None:
    """Say how many images the annotations do not know.

    Raises:
        UserError: two images would take one id, or none is known.
    """
    paths = [source.path for source in sources if source.kind == "image"]
    known = {path: number for path in paths if (number := known_id(path, ids)) is not None}
    taken: dict[Any, str] = {}
    for path, number in known.items():
        if (other := taken.setdefault(number, path)) != path:
            raise UserError(f"{other} and {path} both take the image id {number} of {annotations}; leave one out.")
    if paths and not known:
        raise UserError(f"{annotations} has none of the images, such as {paths[0]}; check its file names.")
    if len(known) < len(paths):
        print(f"{len(paths) - len(known)} of {len(paths)} images are not in {annotations} and take larger ids")


def merge(args: argparse.Namespace, predictor: Predictor, records: Records, count: int) -> None:
    """Write the results of all processes, if this one is the last."""
    if len(records.state()) < count:
        print("Other inputs are not done yet; the process that does the last one merges the results")
        return
    merged = None
    while merged != (known := records.sizes()):  # another process may succeed where an earlier run failed
        merged = known
        if "coco" in args.save:
            write_coco(records, predictor.classes)
        if "csv" in args.save:
            write_csv(records, predictor.classes)


def wait_for_others() -> None:
    """Wait for the other processes of torchrun, which ends all of them once one has another status than 0."""
    if dist.is_torchelastic_launched():
        store, _, count = next(dist.rendezvous("env://", timeout=timedelta(days=365)))
        if store.add("done", 1) == count:
            store.set("all done", "")
        store.wait(["all done"])


if __name__ == "__main__":
    run_cli(main)
