"""Memory and time against the number of queries: `python -m benchmarks.queries`, on the CPU.

One training step and one inference of the demo's model (width 64) on an image of 256 px, as many queries as first
selected tokens and reported detections. Each measurement is a process of its own; memory is what the run needs on top
of the model.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from tabulate import tabulate

from benchmarks.measure import peak_bytes, seconds_of
from benchmarks.whole_model import make_work, sample
from dimaskdino.config import Config, get_cfg
from dimaskdino.modeling.meta_arch import build_model

CONFIG = Path(__file__).parents[1] / "configs" / "demo" / "dimaskdino_shapes.yaml"
SIZE = 256
# Four levels from stride 4 on have more tokens than there are queries.
LEVELS = ["res2", "res3", "res4", "res5"]


def configured(queries: int) -> Config:
    """The demo's model with other numbers."""
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIG))
    cfg.MODEL.DEVICE, cfg.TEST.EVAL_LAYERS, cfg.TEST.DETECTIONS_PER_IMAGE = "cpu", [], queries
    cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES = LEVELS
    node = cfg.MODEL.MaskDINO
    node.FIRST_SELECTED_QUERIES = node.NUM_OBJECT_QUERIES = queries
    node.TRAIN_NUM_POINTS, node.DN_NUM, node.TEST.MASK_FORMAT = 112 * 112, 100, "rle"
    return cfg


def measure(queries: int, *, train: bool) -> dict[str, float]:
    """MiB and seconds of a run, in this process."""
    torch.manual_seed(0)
    model = build_model(configured(queries))
    small = sample(64, model.device)
    make_work(model, [small], train=train, compiled=True)()  # what the first run sets up
    work = make_work(model, [sample(SIZE, model.device)], train=train, compiled=True)
    seconds: list[float] = []
    peak = peak_bytes(lambda: seconds.append(seconds_of(work, model.device)), model.device) or 0
    return {"MiB": peak / 2**20, "seconds": seconds[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", nargs="+", type=int, default=[300, 1000, 3000])
    parser.add_argument("--only", choices=("training step", "inference"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.queries[0], train=args.only == "training step")))
        return
    rows = []
    for queries in args.queries:
        row: dict[str, str] = {"queries": str(queries)}
        for kind in ("training step", "inference"):
            command = [sys.executable, "-m", "benchmarks.queries", "--queries", str(queries), "--only", kind]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            row |= {f"{kind}: MiB": f"{found['MiB']:.0f}", f"{kind}: seconds": f"{found['seconds']:.2f}"}
        rows.append(row)
    print(f"torch {torch.__version__}; {torch.get_num_threads()} threads")
    print(tabulate(rows, headers="keys", tablefmt="github"))


if __name__ == "__main__":
    main()
