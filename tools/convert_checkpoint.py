#!/usr/bin/env python
"""Convert a checkpoint between the names of the public MaskDINO and DI-MaskDINO releases and ours."""

import argparse
import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dimaskdino.checkpoint import from_release, is_release, read_weights, to_release
from dimaskdino.checkpoint.reading import AUTHOR
from dimaskdino.errors import CheckpointError, run_cli

HEADS = "sem_seg_head."
SAFETENSORS = ".safetensors"


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", type=Path, metavar="IN", help="a checkpoint under either's names")
    parser.add_argument("output", type=Path, metavar="OUT", help="the file to write; .safetensors for that format")
    parser.add_argument("--to", choices=("release", "ours"), required=True, help="the names to write")
    parser.add_argument("--strip", action="store_true", help="write the weights alone, without the state of a training")
    parser.add_argument("--trust", action="store_true", help="read a file that runs code; only if you know its author")
    return parser.parse_args()


def convert(content: dict[str, Any], *, to: str, strip: bool) -> tuple[dict[str, Any], str]:
    """Rename the weights of a checkpoint.

    Args:
        content: what :func:`read_weights` returns.
        to: "release" or "ours".
        strip: keep the weights alone, and whose they are.

    Returns:
        The checkpoint to write, and a remark on what was not done ("" for nothing).

    Raises:
        CheckpointError: if names that are one tensor in a release hold different numbers.
    """
    state = content["model"]
    # Not the state of a training: Caffe2's weights, for one, cannot be loaded without it.
    author = {AUTHOR: content[AUTHOR]} if isinstance(content.get(AUTHOR), str) else {}
    others = {key: value for key, value in content.items() if key not in ("model", AUTHOR)}
    if not any(key.startswith(HEADS) for key in state):
        written = {"model": state, **author, **({} if strip else others)}
        return written, "No weights of MaskDINO's or DI-MaskDINO's heads are in it: names are kept."
    renamed = is_release(state) != (to == "release")
    ours = from_release(state)
    written = {"model": to_release(ours) if to == "release" else ours, **author}
    if not others:
        return written, ""
    if not (strip or renamed):
        return {**written, **others}, ""
    # An optimiser's state is in the order of its model's parameters, and the two codes order them differently.
    reason = "as asked" if strip else "it is in the order of the other code's parameters"
    return written, f"Left out the state of a training, {reason}: {', '.join(others)}."


def write(path: Path, content: dict[str, Any]) -> None:
    """Write `path` as a whole or not at all: torch's format, or safetensors where its name ends so.

    Raises:
        CheckpointError: if it is a folder, cannot be written, or its format has no place for what is not a weight.
    """
    others = [key for key in content if key not in ("model", AUTHOR)]
    if path.suffix == SAFETENSORS and others:
        raise CheckpointError(
            f"{path}: {SAFETENSORS} holds weights alone, not {', '.join(others)}; give --strip to leave that out, or "
            "another suffix."
        )
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give the name of the file to write.")
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == SAFETENSORS:
            metadata = {AUTHOR: content[AUTHOR]} if AUTHOR in content else None
            save_file({key: _alone(tensor) for key, tensor in content["model"].items()}, partial, metadata)
        else:
            torch.save(content, partial)
        os.replace(partial, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written ({type(error).__name__}: {error}).") from error
    finally:
        if partial.is_file():
            partial.unlink()


def _alone(tensor: Tensor) -> Tensor:
    """A contiguous copy: safetensors refuses tensors that share memory, as the names of one head do in a release."""
    return tensor.clone(memory_format=torch.contiguous_format)


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
