#!/usr/bin/env python
"""Count the FLOPs and parameters of a configuration's model, part by part.

The weights do not matter and are not read.
"""

import argparse
import json
from pathlib import Path

from dimaskdino.command_line import add_model_flags, at_least, import_modules
from dimaskdino.errors import ConfigError, run_cli


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("config_file", type=Path, metavar="CONFIG", help="configuration of the model")
    add("--size", type=at_least(32), nargs=2, default=(800, 1216), metavar=("H", "W"), help="px (default: 800 1216)")
    add("--depth", type=at_least(1), default=3, help="how far modules are taken apart (default: 3)")
    add("--json", type=Path, metavar="FILE", help="write the parts to a file as well")
    add_model_flags(parser, device=False)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes end here, before the imports that take seconds

import torch
from tabulate import tabulate

from dimaskdino.analysis.flops import CONVENTION, Part, parts_of
from dimaskdino.config import read_config
from dimaskdino.data.datasets import register_all
from dimaskdino.modeling.meta_arch import build_model
from dimaskdino.prediction.outputs import check_writable

# GFLOPs and millions of parameters: Mask DINO, Table 1 (R50, 300 queries); DINO, Table 1 (4 scales).
PAPERS = {"Mask DINO, R50, 300 queries": (286, 52), "DINO, R50, 4 scales": (279, 47)}


def main() -> None:
    """Count and print."""
    args = parse_args()
    import_modules(args.modules)
    if args.json:
        check_writable(args.json.parent)
    cfg = read_config(args.config_file)
    # Layers that torch.compile has changed cannot be traced.
    fixed = ("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.TIMM.PRETRAINED", False, "MODEL.COMPILE", [])
    cfg.merge_from_list([*args.opts, *fixed])
    register_all(cfg=cfg)
    model = build_model(cfg)
    check_size(args.size, model.size_divisibility)
    with torch.no_grad():
        parts = parts_of(model, tuple(args.size), args.depth)
    print(f"{args.config_file}, one image of {args.size[0]} x {args.size[1]} px\n")
    print(table(parts))
    print(f"\n{CONVENTION}\n")
    known = ", ".join(f"{name}: {flops} GFLOPs, {weights} M" for name, (flops, weights) in PAPERS.items())
    print(f"The papers, averaged over photos of COCO: {known}.")
    if args.json:
        args.json.write_text(json.dumps({"size": args.size, "parts": [vars(part) for part in parts]}, indent=1))


def check_size(size: tuple[int, int], divisor: int) -> None:
    """Check that an image of this size needs no padding.

    Raises:
        ConfigError: it does.
    """
    if any(side % divisor for side in size):
        raise ConfigError(
            f"--size {size[0]} {size[1]}: both must be multiples of {divisor}, as the model pads to that."
        )


def table(parts: list[Part]) -> str:
    """Rows of the parts, their names indented by depth, and the share of each in the whole."""
    whole = parts[0]
    rows = []
    for part in parts:
        depth = part.name.count(".") + 1 if part.name else 0
        name = "  " * depth + (part.name.rpartition(".")[2] or "all")
        share = f"{100 * part.flops / whole.flops:.1f} %"
        rows.append([name, f"{part.flops / 1e9:.3f}", share, f"{part.parameters / 1e6:.3f}"])
    heads = ("part", "GFLOPs", "share", "M parameters")
    return tabulate(rows, heads, preserve_whitespace=True, disable_numparse=True, colalign=("left", *["right"] * 3))


if __name__ == "__main__":
    run_cli(main)
