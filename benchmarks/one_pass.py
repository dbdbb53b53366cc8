"""One measurement of the whole model in a process of its own, for `python -m benchmarks.whole_model --against COMMIT`.

Runs with the package of whichever commit comes first on PYTHONPATH, so it uses nothing that is newer than the commits
that can be compared. Prints one line of JSON: seconds, and the most memory in bytes.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from dimaskdino.config import get_cfg  # before torch, so that the package says how threads wait

# isort: split

import torch
from detectron2.structures import BitMasks, Boxes, Instances
from torch import nn

from dimaskdino.engine import keep_freed_memory


def sample(height: int, width: int, objects: int, num_classes: int = 80) -> dict[str, Any]:
    """A random image, with random boxes as objects that are half covered by their masks."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(objects, 2, 2, generator=generator).sort(1).values
    corners[:, 1] = (corners[:, 1] + 0.05).clamp(max=1)
    boxes = (corners * torch.tensor([width, height])).flatten(1)
    instances = Instances((height, width), gt_boxes=Boxes(boxes))
    masks = torch.zeros(objects, height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y0 : y1 + 1, x0 : (x0 + x1) // 2 + 1] = True
    instances.gt_masks = BitMasks(masks)
    instances.gt_classes = torch.randint(num_classes, (objects,), generator=generator)
    return {"image": torch.rand(3, height, width, generator=generator) * 255, "instances": instances}


def make_model(config_file: str, *, train: bool, queries: int = 0) -> tuple[nn.Module, int]:
    """A model with random weights, on the CPU, and its number of classes."""
    cfg = get_cfg()
    cfg.merge_from_file(config_file)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    if queries:
        node = cfg.MODEL.MaskDINO
        node.NUM_OBJECT_QUERIES = queries
        node.FIRST_SELECTED_QUERIES = max(queries, node.FIRST_SELECTED_QUERIES)
    torch.manual_seed(0)
    try:
        from dimaskdino.modeling.meta_arch import build_model
    except ImportError:
        from detectron2.modeling import build_model
    return build_model(cfg).train(train), cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--height", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--objects", type=int, default=0, help="of a training step; 0 measures inference")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--queries", type=int, default=0, help="0 means as configured")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    model, num_classes = make_model(args.config_file, train=args.objects > 0, queries=args.queries)
    batch = [sample(args.height, args.width, args.objects, num_classes)]
    low = args.precision == "bfloat16"

    def train() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16) if low else nullcontext():
            losses = model(batch)
        model.zero_grad()
        torch.stack(list(losses.values())).sum().backward()

    def infer() -> None:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16) if use_autocast else nullcontext():
            model(batch)

    use_autocast = low and not prepare(model, args.precision)
    print(json.dumps(measure(train if args.objects else infer, args.runs, cpu_time=args.cpu_time)))


def prepare(model: nn.Module, precision: str) -> bool:
    """Whether the commit has a precision of its own for inference; otherwise autocast is measured."""
    set_precision = getattr(model, "set_precision", None)
    if set_precision is None or model.training:
        return False
    set_precision("auto" if precision == "bfloat16" else precision)
    return True


def measure(work: Callable[[], None], runs: int, *, cpu_time: bool) -> dict[str, float]:
    """Median seconds of some runs after a first one, and the process's peak memory."""
    clock = time.process_time if cpu_time else time.perf_counter
    seconds = []
    for _ in range(runs + 1):
        start = clock()
        work()
        seconds.append(clock() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": statistics.median(seconds[1:]), "peak": peak}


if __name__ == "__main__":
    main()
