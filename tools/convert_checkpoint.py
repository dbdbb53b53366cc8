#!/usr/bin/env python
"""Convert a checkpoint between the names of the public MaskDINO and DI-MaskDINO releases and ours."""

import argparse
import logging
import os
from pathlib import Path
from typing import Any

import torch

from dimaskdino.checkpoint import from_release, is_release, read_weights, to_release
from dimaskdino.errors import CheckpointError, run_cli

HEADS = "sem_seg_head."


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", type=Path, metavar="IN", help="a checkpoint under either's names")
    parser.add_argument("output", type=Path, metavar="OUT", help="the file to write")
    parser.add_argument("--to", choices=("release", "ours"), required=True, help="the names to write")
    parser.add_argument("--strip", action="store_true", help="write the weights alone, without the state of a training")
    parser.add_argument("--trust", action="store_true", help="read a file that runs code; only if you know its author")
    return parser.parse_args()


def convert(content: dict[str, Any], *, to: str, strip: bool) -> tuple[dict[str, Any], str]:
    """Rename the weights of a checkpoint.

    Args:
        content: what :func:`read_weights` returns.
        to: "release" or "ours".
        strip: keep the weights alone.

    Returns:
        The checkpoint to write, and a remark on what was not done ("" for nothing).

    Raises:
        CheckpointError: if names that are one tensor in a release hold different numbers.
    """
    state = content["model"]
    if not any(key.startswith(HEADS) for key in state):
        others = {} if strip else {key: value for key, value in content.items() if key != "model"}
        return {"model": state, **others}, "No weights of MaskDINO's or DI-MaskDINO's heads are in it: names are kept."
    renamed = is_release(state) != (to == "release")
    ours = from_release(state)
    state = to_release(ours) if to == "release" else ours
    others = {key: value for key, value in content.items() if key != "model"}
    if not others:
        return {"model": state}, ""
    if not (strip or renamed):
        return {"model": state, **others}, ""
    # An optimiser's state is in the order of its model's parameters, and the two codes order them differently.
    reason = "as asked" if strip else "it is in the order of the other code's parameters"
    return {"model": state}, f"Left out the state of a training, {reason}: {', '.join(others)}."


def write(path: Path, content: dict[str, Any]) -> None:
    """Write `path` as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    torch.save(content, partial)
    os.replace(partial, path)


def main() -> None:
    """Convert what the command line names."""
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not args.input.is_file():
        raise CheckpointError(f"The weight file {args.input} does not exist.")
    if args.output.exists() and args.output.samefile(args.input):
        raise CheckpointError(f"{args.output} is the input itself; give another name.")
    read = read_weights(args.input, trust=args.trust)
    try:
        content, remark = convert(read, to=args.to, strip=args.strip)
    except CheckpointError as error:
        raise CheckpointError(f"{args.input}: {error}") from error
    write(args.output, content)
    if remark:
        print(remark)
    print(f"{args.output}: {len(content['model'])} tensors")


if __name__ == "__main__":
    run_cli(main)
