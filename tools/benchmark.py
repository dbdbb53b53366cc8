#!/usr/bin/env python
"""Measure how many images per second a model predicts, as the papers do, and which part takes how long.

One image at a time, from its tensor to instances, with warm-up; the median counts, and the spread is that of the
middle eight tenths of the runs. Exported files are timed from the input to what they give.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from dimaskdino.command_line import add_model_flags, at_least, import_modules
from dimaskdino.cpu import keep_freed_memory
from dimaskdino.errors import run_cli


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("config_file", type=Path, metavar="CONFIG", help="configuration of the model")
    add("--weights", type=Path, help="weight file (default: random weights, which are as fast)")
    what = parser.add_mutually_exclusive_group()
    images = "files to use in turn, resized as in evaluation (default: noise)"
    what.add_argument("--images", type=Path, nargs="+", help=images)
    what.add_argument(
        "--size", type=at_least(32), nargs=2, default=(800, 1216), metavar=("H", "W"), help="of noise, px"
    )
    add("--compile", action="store_true", help="also with torch.compile")
    add("--exported", type=Path, nargs="+", default=[], metavar="FILE", help="also .onnx or OpenVINO's .xml files")
    add("--threads", type=at_least(1), help="of the CPU (default: torch's choice)")
    add("--warmup", type=at_least(0), default=5, help="runs that do not count (default: 5)")
    add("--runs", type=at_least(2), default=30, help="runs that count (default: 30)")
    add("--json", type=Path, metavar="FILE", help="write the numbers to a file as well")
    add_model_flags(parser)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes end here, before the imports that take seconds

import numpy as np
import torch
from tabulate import tabulate

from dimaskdino.analysis.timing import check_exported, compiled, time_exported, time_model, time_parts
from dimaskdino.checkpoint import Checkpointer
from dimaskdino.config import Config, read_config
from dimaskdino.data.datasets import register_all
from dimaskdino.data.transforms import test_resize
from dimaskdino.devices import usable_device
from dimaskdino.evaluation.speed import device_name
from dimaskdino.modeling.meta_arch import build_model
from dimaskdino.prediction.images import to_model_input, to_rgb
from dimaskdino.prediction.outputs import check_writable


def main() -> None:
    """Time every form, and the parts of the model."""
    args = parse_args()
    import_modules(args.modules)
    if args.json:
        check_writable(args.json.parent)
    for path in args.exported:  # before the minutes that the model may take
        check_exported(path)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    cfg = configuration(args)
    register_all(cfg=cfg)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    if args.weights:
        Checkpointer(model).load(str(args.weights))
    model.set_precision(cfg.MODEL.MaskDINO.TEST.PRECISION)
    keep_freed_memory(model.device.type)
    images = inputs(args, cfg)
    count = {"warmup": args.warmup, "runs": args.runs}
    forms = {"PyTorch": time_model(model, images, **count)}
    parts = time_parts(model, images, **count)
    if args.compile:
        with compiled(model):
            forms["torch.compile"] = time_model(model, images, **count)
    step, sizes = model.size_divisibility, [tuple(each["image"].shape[-2:]) for each in images]
    size, padded = sizes[0], [tuple(-(-side // step) * step for side in each) for each in sizes]
    for path in args.exported:
        seconds, fixed = time_exported(path, padded, threads=torch.get_num_threads(), **count)
        name = path.name if [each.name for each in args.exported].count(path.name) == 1 else str(path)
        forms[name if fixed[-2:] in ((), *padded) else f"{name}, {' x '.join(map(str, fixed))}"] = seconds
    print(f"{args.config_file}: {len(images)} image(s), the first of {size[0]} x {size[1]} px, one at a time")
    print(f"{device_name(model.device)}; torch {torch.__version__}; {args.warmup} runs before {args.runs} that count\n")
    print(table("form", forms))
    print(f"\n{table('part of the model, PyTorch', parts)}")
    if args.json:
        named = {"forms": forms, "parts": parts}
        seconds = {kind: {name: list(each) for name, each in times.items()} for kind, times in named.items()}
        args.json.write_text(json.dumps({"size": size, "device": device_name(model.device), "seconds": seconds}))


def configuration(args: argparse.Namespace) -> Config:
    """The configuration, for prediction alone."""
    device = usable_device(args.device)
    fixed = ("MODEL.DEVICE", device, "MODEL.WEIGHTS", "", "MODEL.TIMM.PRETRAINED", False, "TEST.EVAL_LAYERS", [])
    cfg = read_config(args.config_file)
    cfg.merge_from_list([*args.opts, *fixed])
    return cfg


def inputs(args: argparse.Namespace, cfg: Config) -> list[dict[str, Any]]:
    """The images as the model takes them, on its device."""
    if not args.images:
        noise = torch.randint(0, 256, (3, *args.size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        return [{"image": noise.to(cfg.MODEL.DEVICE)}]
    resize = test_resize(cfg)[0]
    given = [to_model_input(to_rgb(path, exif=cfg.INPUT.APPLY_EXIF), resize, cfg.INPUT.FORMAT) for path in args.images]
    return [each | {"image": each["image"].to(cfg.MODEL.DEVICE)} for each in given]


def table(title: str, times: dict[str, np.ndarray]) -> str:
    """A row for each name: images per second, the median, and the spread."""
    rows = []
    for name, seconds in times.items():
        low, median, high = np.percentile(seconds, (10, 50, 90))
        rows.append([name, f"{1e3 * median:.1f}", f"{1e3 * low:.1f} to {1e3 * high:.1f}", f"{1 / median:.2f}"])
    heads = (title, "ms", "8 of 10 runs, ms", "per second")
    return tabulate(rows, heads, disable_numparse=True, colalign=("left", "right", "right", "right"))


if __name__ == "__main__":
    run_cli(main)
