#!/usr/bin/env python
"""Convert a checkpoint between the names of the MaskDINO, DI-MaskDINO and DINO releases, or of detrex, and ours."""

import argparse
import logging
from pathlib import Path
from typing import Any

from dimaskdino.errors import CheckpointError, run_cli


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", type=Path, metavar="IN", help="a checkpoint with either's names")
    parser.add_argument("output", type=Path, metavar="OUT", help="the file to write; .safetensors for that format")
    parser.add_argument("--to", choices=("release", "detrex", "ours"), required=True, help="the names to write")
    parser.add_argument("--strip", action="store_true", help="write only the weights, without the training state")
    parser.add_argument("--trust", action="store_true", help="read a file that runs code; only if you trust its author")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes end here, before the imports that take seconds

from dimaskdino.checkpoint import (
    DESCRIPTIONS,
    from_release,
    is_release,
    local_path,
    pick_coco_rows,
    read_weights,
    to_release,
    write_weights,
)
from dimaskdino.checkpoint.dino import COCO_OUTPUTS
from dimaskdino.checkpoint.fitting import num_classes

HEADS = "sem_seg_head."


def convert(content: dict[str, Any], *, to: str, strip: bool) -> tuple[dict[str, Any], str]:
    """Rename the weights of a checkpoint.

    Args:
        content: what :func:`read_weights` returns.
        to: "release", "detrex" (a DINO model) or "ours".
        strip: keep only the weights and what describes them.

    Returns:
        The checkpoint to write, and a remark on what was left undone ("" for nothing).

    Raises:
        CheckpointError: names that are one tensor in a release hold different values.
    """
    state = content["model"]
    kept = {key: content[key] for key in DESCRIPTIONS if key in content}
    others = {key: value for key, value in content.items() if key not in ("model", *DESCRIPTIONS)}
    if not (is_release(state) or any(key.startswith(HEADS) for key in state)):
        written = {"model": state, **kept, **({} if strip else others)}
        return written, "The file has no heads of MaskDINO, DI-MaskDINO or DINO; names are kept."
    ours, remark = from_release(state), ""
    if to == "ours" and num_classes(ours) == COCO_OUTPUTS:
        ours = pick_coco_rows(ours)
        remark = (
            f"Of {COCO_OUTPUTS} outputs, numbered by category id, took those of COCO's {num_classes(ours)} categories."
        )
    written = {"model": ours if to == "ours" else to_release(ours, detrex=to == "detrex"), **kept}
    if not others:
        return written, remark
    if not strip and written["model"].keys() == state.keys():
        return {**written, **others}, remark
    # An optimizer's state is in the order of its model's parameters, and the two codes order them differently.
    reason = "as asked" if strip else "because it is in the order of the other code's parameters"
    return written, f"{remark} Left out the training state {reason}: {', '.join(others)}.".strip()


def main() -> None:
    """Convert what the command line names."""
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    path = local_path(args.input)
    if not path.is_file():
        raise CheckpointError(f"The weight file {args.input} does not exist.")
    if args.output.exists() and args.output.samefile(path):
        raise CheckpointError(f"{args.output} is the input itself; give another name for the output.")
    read = read_weights(path, trust=args.trust)
    try:
        content, remark = convert(read, to=args.to, strip=args.strip)
    except CheckpointError as error:
        raise CheckpointError(f"{args.input}: {error}") from error
    write_weights(args.output, content)
    if remark:
        print(remark)
    print(f"{args.output}: {len(content['model'])} tensors")


if __name__ == "__main__":
    run_cli(main)
