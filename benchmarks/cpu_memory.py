"""Memory on the CPU as train_net.py has it and as the libraries have it by default: `python -m benchmarks.cpu_memory`.

train_net.py keeps the memory that it frees (dimaskdino.engine.keep_freed_memory), and importing dimaskdino has oneDNN
keep fewer compiled sizes. Either belongs to a whole process, so each measurement is a process of its own, the two ways
in turn; the medians of several count. Peaks are those of the process.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.whole_model import CONFIG, make_work, sample
from dimaskdino.config import get_cfg
from dimaskdino.engine import keep_freed_memory
from dimaskdino.modeling.meta_arch import build_model

DEFAULT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024"}  # oneDNN's own
RUNS = 3  # of the model in a process, of which the median counts
SIZES = 40  # of images of many sizes


def measure(kind: str, size: int, config_file: str) -> dict[str, float]:
    """Seconds of a run and the process's peak, in this process."""
    cfg = get_cfg()
    cfg.merge_from_file(config_file)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    torch.manual_seed(0)
    model = build_model(cfg)
    shapes = [(size, size)] * (RUNS + 1)
    if kind == "many sizes":
        random.seed(0)
        shapes = [(random.randint(size // 2, size), random.randint(size // 2, size)) for _ in range(SIZES)]
    seconds = []
    for height, width in shapes:
        image = sample(size, model.device)
        image["image"] = image["image"][:, :height, :width]
        work = make_work(model, [image], train=kind == "training step", compiled=True)
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    taken = sum(seconds) if kind == "many sizes" else statistics.median(seconds[1:])
    return {"seconds": taken, "mebibytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def in_process(kind: str, size: int, config_file: str, *, ours: bool) -> dict[str, float]:
    """The measurement in a new process."""
    command = [sys.executable, "-m", "benchmarks.cpu_memory", "--config-file", config_file, "--kind", kind]
    command += ["--size", str(size), *(["--ours"] if ours else [])]
    environment = {name: value for name, value in os.environ.items() if name not in DEFAULT} | ({} if ours else DEFAULT)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def row(kind: str, size: int, config_file: str, rounds: int) -> dict[str, Any]:
    """Measure both ways in turn."""
    found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for _ in range(rounds):
        for ours, results in found.items():
            results.append(in_process(kind, size, config_file, ours=ours))
    middle = {
        (ours, key): statistics.median(result[key] for result in results)
        for ours, results in found.items()
        for key in ("seconds", "mebibytes")
    }
    return {
        "pass": kind,
        "px": size,
        "as fast": f"{middle[False, 'seconds'] / middle[True, 'seconds']:.2f}x",
        "MiB at the peak: default": round(middle[False, "mebibytes"]),
        "ours": round(middle[True, "mebibytes"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default=str(CONFIG))
    parser.add_argument("--sizes", nargs="*", type=int, default=[512, 1024], help="of the image, in inference")
    parser.add_argument("--train-sizes", nargs="*", type=int, default=[512], help="of the image, in training")
    parser.add_argument(
        "--many-sizes", nargs="*", type=int, default=[800], help="the longest side of many, in inference"
    )
    parser.add_argument("--rounds", type=int, default=3, help="processes of each way, of which the median counts")
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        if args.ours and not keep_freed_memory():
            sys.exit("The C library is not glibc, or environment variables choose how it keeps memory.")
        print(json.dumps(measure(args.kind, args.size, args.config_file)))
        return
    sizes = {"inference": args.sizes, "many sizes": args.many_sizes, "training step": args.train_sizes}
    table = [row(kind, size, args.config_file, args.rounds) for kind, each in sizes.items() for size in each]
    print(f"{Path(args.config_file).stem}; torch {torch.__version__}; {torch.get_num_threads()} threads")
    print(tabulate(table, headers="keys", tablefmt="github"))


if __name__ == "__main__":
    main()
