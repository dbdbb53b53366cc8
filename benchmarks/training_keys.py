"""What each key of memory and speed costs in training: `python -m benchmarks.training_keys`.

Trains the 12-epoch model from random weights on made-up square images of eight objects, each key in a process of its
own, all of them in turn, and prints seconds of an iteration and the process's peak memory relative to the default
(medians). Keys that share something out are compared with two processes that do not.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from benchmarks.whole_model import CONFIG
from dimaskdino.config import Config, get_cfg
from dimaskdino.engine import Trainer, keep_freed_memory, launch
from dimaskdino.engine.ema import AveragedWeights

CHECKPOINTING, SHARDING = "SOLVER.ACTIVATION_CHECKPOINTING", "SOLVER.SHARDING"
ALONE, TWO = "default", "default, two processes"
KEYS: dict[str, list[Any]] = {
    ALONE: [],
    f"`{CHECKPOINTING} \"['backbone']\"`": [CHECKPOINTING, ["backbone"]],
    "`... \"['encoder']\"`": [CHECKPOINTING, ["encoder"]],
    "`... \"['decoder']\"`": [CHECKPOINTING, ["decoder"]],
    "`... \"['backbone', 'encoder', 'decoder']\"`": [CHECKPOINTING, ["backbone", "encoder", "decoder"]],
    "`SOLVER.ACCUMULATION_STEPS 2`": ["SOLVER.ACCUMULATION_STEPS", 2],
    "`SOLVER.AMP.ENABLED True SOLVER.AMP.DTYPE bfloat16`": ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16"],
    "`MODEL.CHANNELS_LAST True`": ["MODEL.CHANNELS_LAST", True],
    "`SOLVER.EMA.ENABLED True`": ["SOLVER.EMA.ENABLED", True],
    "`MODEL.MaskDINO.DN_FIXED_SIZE True`": ["MODEL.MaskDINO.DN_FIXED_SIZE", True],
    "`MODEL.COMPILE \"['encoder', 'decoder']\"`": ["MODEL.COMPILE", ["encoder", "decoder"]],
    TWO: [],
    f"`{SHARDING} optimizer`": [SHARDING, "optimizer"],
    f"`{SHARDING} full`": [SHARDING, "full"],
}
OBJECTS = 8


def image(size: int, seed: int) -> dict[str, Any]:
    """An image with rectangular objects at random places."""
    draw = torch.Generator().manual_seed(seed)
    corners = torch.rand(OBJECTS, 2, generator=draw) * 0.6 * size
    boxes = torch.cat([corners, corners + (0.1 + 0.3 * torch.rand(OBJECTS, 2, generator=draw)) * size], dim=1)
    masks = torch.zeros(OBJECTS, size, size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    objects = Instances((size, size), gt_boxes=Boxes(boxes), gt_masks=BitMasks(masks))
    objects.gt_classes = torch.arange(OBJECTS) % 5
    return {"image": torch.rand(3, size, size, generator=draw) * 255, "instances": objects}


def configured(args: argparse.Namespace) -> Config:
    """The configuration of one key."""
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "SEED", 0, *KEYS[args.one]])
    return cfg


def measure(args: argparse.Namespace) -> None:
    """Train in this process, which the job may share with another one, and print what it took as JSON."""
    cfg = configured(args)
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    step = Trainer.build_step(cfg, model)
    average = AveragedWeights(model, decay=cfg.SOLVER.EMA.DECAY) if cfg.SOLVER.EMA.ENABLED else None
    share = args.batch // comm.get_world_size()
    images = [image(args.size, seed=comm.get_rank() * share + index) for index in range(share)]
    step.data_loader, step.seed = itertools.repeat(images), 0
    seconds, clock = [], time.process_time if args.cpu_time else time.perf_counter
    with EventStorage():
        for step.iter in range(args.warm_up + args.steps):
            start = clock()
            step.run_step()
            if average:
                average.update(step.iter)
            seconds.append(clock() - start)
    peaks = comm.all_gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    if comm.is_main_process():
        found = {"seconds": statistics.median(seconds[args.warm_up :]), "mebibytes": max(peaks), "first": seconds[0]}
        args.output.write_text(json.dumps(found))


def in_process(name: str, args: argparse.Namespace) -> dict[str, float]:
    """The measurement of one key in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        command = [sys.executable, "-m", "benchmarks.training_keys", "--one", name, "--output", str(output)]
        for flag in ("config_file", "size", "batch", "steps", "warm_up"):
            command += [f"--{flag.replace('_', '-')}", str(getattr(args, flag))]
        command += ["--cpu-time"] * args.cpu_time
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name}:\n{done.stderr[-2000:]}")
        return json.loads(output.read_text())


def rows(found: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    """Each key's medians relative to those of the default of as many processes."""
    middle = {
        name: {what: statistics.median(each[what] for each in runs) for what in ("seconds", "mebibytes")}
        for name, runs in found.items()
    }
    table = []
    for name, own in middle.items():
        base = middle[TWO if SHARDING in KEYS[name] else ALONE] if name not in (ALONE, TWO) else None
        table.append(
            [
                name,
                f"{own['seconds'] / base['seconds']:.2f}" if base else f"1 ({own['seconds']:.2f} s)",
                f"{own['mebibytes'] / base['mebibytes']:.2f}" if base else f"1 ({own['mebibytes']:.0f} MiB)",
            ]
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default=str(CONFIG))
    parser.add_argument("--size", type=int, default=256, help="of the images in pixels (default: 256)")
    parser.add_argument("--batch", type=int, default=2, help="images of an iteration (default: 2)")
    parser.add_argument("--steps", type=int, default=3, help="iterations of which the median counts (default: 3)")
    parser.add_argument("--warm-up", type=int, default=1, help="iterations before them (default: 1)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each key (default: 3)")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of a process, where others run as well")
    parser.add_argument("--only", nargs="*", default=[], metavar="TEXT", help="keys whose name holds one of these")
    parser.add_argument("--one", choices=list(KEYS), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        args.num_gpus, args.num_machines, args.machine_rank, args.dist_url = 0, 1, 0, "auto"
        two = args.one == TWO or SHARDING in KEYS[args.one]
        launch(measure, args, cpu_processes=2 if two else 1)
        return
    chosen = [name for name in KEYS if not args.only or any(text in name for text in args.only)]
    two = any(SHARDING in KEYS[name] for name in chosen)
    alone = any(KEYS[name] and SHARDING not in KEYS[name] for name in chosen)
    names = [name for name in KEYS if name in chosen or (name == TWO and two) or (name == ALONE and alone)]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name, runs in found.items():
            runs.append(in_process(name, args))
            print(name, runs[-1], file=sys.stderr)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    what = f"{Path(args.config_file).stem}, {args.batch} images of {args.size} px"
    print(f"{what}; torch {torch.__version__}, {cores} cores")
    print(tabulate(rows(found), ["key", "time", "memory"], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    keep_freed_memory()
    main()
