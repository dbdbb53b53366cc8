"""The whole model with the compiled deformable attention and without it: `python -m benchmarks.whole_model`.

Inference and a training step (forward, losses, backward; three objects) of one square image, with random weights, the
two forms in turn in one process, which on the CPU keeps the memory that it frees, as train_net.py does. Losses and
scores are compared while at it.

With `--against COMMIT` instead: this checkout against an earlier commit, on the CPU, in processes of their own.
"""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from detectron2.structures import BitMasks, Boxes, Instances
from tabulate import tabulate
from torch import nn

from benchmarks.against import ROWS, print_table
from benchmarks.measure import Work, side_by_side
from dimaskdino.config import get_cfg
from dimaskdino.devices import default_device
from dimaskdino.engine import keep_freed_memory
from dimaskdino.errors import UserError
from dimaskdino.layers import ms_deform_attn_ops
from dimaskdino.modeling.meta_arch import build_model

CONFIG = Path(__file__).parents[1] / "configs" / "coco" / "dimaskdino_r50_12ep.yaml"
# The package has a function of the module's name.
OP = importlib.import_module("dimaskdino.layers.ms_deform_attn")


def sample(size: int, device: torch.device) -> dict[str, Any]:
    """One image with three rectangular objects of class 0."""
    objects = Instances((size, size))
    boxes = torch.tensor([[0.1, 0.1, 0.4, 0.5], [0.3, 0.4, 0.9, 0.8], [0.6, 0.1, 0.7, 0.2]], device=device) * size
    masks = torch.zeros(3, size, size, dtype=torch.bool, device=device)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    objects.gt_boxes, objects.gt_masks = Boxes(boxes), BitMasks(masks)
    objects.gt_classes = torch.zeros(3, dtype=torch.int64, device=device)
    return {"image": torch.rand(3, size, size, generator=torch.Generator().manual_seed(0)) * 255, "instances": objects}


def make_work(model: nn.Module, batch: list[dict[str, Any]], *, train: bool, compiled: bool) -> Work:
    """A run of the model in one form, the same random numbers in each; gives what the forms must agree in."""

    def work() -> torch.Tensor:
        torch.manual_seed(0)
        if not train:
            with torch.no_grad():
                return model.eval()(batch)[0]["instances"].scores
        loss = torch.stack(list(model.train()(batch).values())).sum()
        model.zero_grad()
        loss.backward()
        return loss.detach()

    def reference() -> torch.Tensor:
        with patch.object(OP, "use_compiled", lambda device: False):
            return work()

    return work if compiled else reference


def row(model: nn.Module, size: int, *, train: bool, rounds: int) -> dict[str, Any]:
    """Measure one pass at one size."""
    device = model.device
    batch = [sample(size, device)]
    works = {name: make_work(model, batch, train=train, compiled=name == "compiled") for name in ("plain", "compiled")}
    torch.testing.assert_close(works["compiled"](), works["plain"](), rtol=1e-3, atol=1e-4)
    seconds = side_by_side(works, device, rounds=rounds)
    result = {"pass": "training step" if train else "inference", "px": size}
    result["compiled"] = f"{seconds['plain'] / seconds['compiled']:.2f}x"
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default=str(CONFIG))
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--sizes", nargs="*", type=int, default=[512, 1024], help="of the image, in inference")
    parser.add_argument("--train-sizes", nargs="*", type=int, default=[512], help="of the image, in training")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each form, of which the median counts")
    parser.add_argument("--against", metavar="COMMIT", help="compare with this commit instead")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), help="of --against")
    parser.add_argument("--threads", type=int, default=0, help="of --against; 0 for torch's own number")
    parser.add_argument("--cpu-time", action="store_true", help="with --against: CPU time, for busy machines")
    args = parser.parse_args()
    if args.against:
        options = ["--threads", str(args.threads), *["--cpu-time"] * args.cpu_time]
        try:
            print_table(args.against, args.rows, Path(args.config_file).resolve(), options, args.rounds)
        except UserError as error:
            print(error, file=sys.stderr)
            sys.exit(2)
        return
    if not ms_deform_attn_ops.COMPILED:
        sys.exit(f"The compiled op is not in use: {ms_deform_attn_ops.MISSING or 'DIMASKDINO_MSDA is reference'}.")
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(["MODEL.DEVICE", args.device, "MODEL.WEIGHTS", ""])
    torch.manual_seed(0)
    model = build_model(cfg)
    table = [row(model, size, train=False, rounds=args.rounds) for size in args.sizes]
    table += [row(model, size, train=True, rounds=args.rounds) for size in args.train_sizes]
    print(f"{Path(args.config_file).stem}; torch {torch.__version__}; {torch.get_num_threads()} threads")
    print("times as fast as with plain PyTorch's deformable attention:")
    print(tabulate(table, headers="keys", tablefmt="github"))


if __name__ == "__main__":
    keep_freed_memory()
    main()
