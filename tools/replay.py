#!/usr/bin/env python
"""Compute a training step again that was not finite, from the file that the run wrote to OUTPUT_DIR/nonfinite.

  tools/replay.py output/run/nonfinite/iteration_0001234.process0.pth
  tools/replay.py FILE SOLVER.AMP.ENABLED False      with another key, to see what helps

Status 1 if the step is still not finite.
"""

import argparse
import sys
from pathlib import Path

from dimaskdino.command_line import add_import_flag, import_modules
from dimaskdino.errors import run_cli


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the replay file")
    add_import_flag(parser)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="keys over the run's configuration")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes end here, before the imports that take seconds

from tabulate import tabulate
from torch import Tensor

from dimaskdino.engine.replay import replay


def main() -> None:
    """Replay, and print the losses of both times."""
    args = parse_args()
    import_modules(args.modules)
    recorded, again = replay(args.file, args.opts)
    images = [str(image.get("file_name", image.get("image_id", "?"))) for image in recorded["batch"]]
    print(f"iteration {recorded['iteration']}, process {recorded['process']} of {recorded['processes']}")
    print("images: " + ", ".join(images))
    names = sorted({*recorded["losses"], *again.losses})
    rows = [[name, *(_shown(each.get(name)) for each in (recorded["losses"], again.losses))] for name in names]
    if rows:
        print(tabulate(rows, ["loss", "then", "now"], disable_numparse=True))
    differing = again.differences(recorded)
    print(f"losses that differ in any bit: {len(differing)} of {len(names)}")
    print(f"not finite then: {', '.join(recorded['terms'])}")
    print(f"not finite now:  {', '.join(again.terms) or 'nothing'}")
    if again.first_module:
        print(f"first module whose output is not finite: {again.first_module}")
    sys.exit(1 if again.terms else 0)


def _shown(value: Tensor | None) -> str:
    return "" if value is None else f"{value.item():.7g}"


if __name__ == "__main__":
    run_cli(main)
