"""What the journeys share: commands in a folder of the user's own, and a model that trains in seconds."""

import os
import subprocess
import sys
from pathlib import Path

from tests.documentation import REPOSITORY

CONFIG = REPOSITORY / "configs" / "demo" / "dimaskdino_shapes.yaml"
SMALL = [
    *("MODEL.MaskDINO.HIDDEN_DIM", 64, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 64, "MODEL.SEM_SEG_HEAD.MASK_DIM", 64),
    *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 1, "MODEL.MaskDINO.DEC_LAYERS", 2, "MODEL.MaskDINO.DN_NUM", 8),
    *("MODEL.MaskDINO.TRAIN_NUM_POINTS", 64, "INPUT.IMAGE_SIZE", 64, "INPUT.MIN_SIZE_TEST", 64),
    *("INPUT.MAX_SIZE_TEST", 64, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.STEPS", "()", "DATALOADER.NUM_WORKERS", 0),
]


def run(folder: Path, script: str, *arguments: object) -> str:
    """Run a script of the repository in a folder, as a user does; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPOSITORY / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def train(folder: Path, output: str, *options: object, modules: tuple[str, ...] = ()) -> Path:
    """Train the small model on the CPU; returns the folder of the run."""
    imports = [word for name in modules for word in ("--import", name)]
    keys = [*SMALL, "OUTPUT_DIR", output, *options]
    run(folder, "train_net.py", "--config-file", CONFIG, "--num-gpus", 0, *imports, *keys)
    return folder / output
