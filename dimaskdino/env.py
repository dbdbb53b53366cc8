"""What an error report needs to say about a machine: ``python -m dimaskdino.env`` prints it."""

import os
import sys

import torch
from detectron2.utils.collect_env import collect_env_info

import dimaskdino
from dimaskdino.evaluation.speed import device_name
from dimaskdino.layers import ms_deform_attn_ops as op

_VARIABLES = ("DETECTRON2_DATASETS", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", op.VARIABLE)


def describe_environment() -> str:
    """Versions, devices, the compiled op, and the environment variables that matter, as text."""
    devices = [device_name(torch.device("cpu"))]
    devices += [device_name(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    kernels = [kind for kind in ("cpu", "cuda") if op.has_kernels(kind)]
    lines = {
        "dimaskdino": dimaskdino.__version__,
        "deformable attention": op.MISSING or f"compiled for {' and '.join(kernels)}",
        "devices": "; ".join(devices),
        "CPU cores": os.cpu_count(),
        "variables": ", ".join(f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ) or "none",
    }
    return "\n".join([*(f"{name}: {value}" for name, value in lines.items()), collect_env_info()])


if __name__ == "__main__":
    sys.stdout.write(describe_environment() + "\n")
