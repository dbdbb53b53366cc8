"""The dimaskdino package and its compiled op: `python -m pip install --no-build-isolation -e .`.

Install torch and detectron2 first (tools/install_detectron2.py installs the latter). Neither is a listed requirement,
so installing this package never replaces them. tools/build_op.py builds the op, dimaskdino._C. configs/ and
train_net.py are used from the repository and are not packaged.
"""

import os
import re
import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).parent / "tools"))
import build_op

COMPILER = build_op.find_compiler(os.environ)
OP = build_op.op_wanted(os.environ, COMPILER)
VERSION = re.findall('__version__ = "(.+)"', (Path(__file__).parent / "dimaskdino" / "__init__.py").read_text())

setup(
    name="dimaskdino",
    version=VERSION[0],
    description="DI-MaskDINO: joint object detection and instance segmentation, on detectron2",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=("dimaskdino", "dimaskdino.*")),
    package_data={"dimaskdino.reproduction": ["papers/*.json"]},
    ext_modules=[build_op.extension()] if OP else [],
    cmdclass={"build_ext": build_op.build_command(COMPILER)} if OP else {},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if OP and build_op.STABLE_ABI else {},
    extras_require={
        "slurm": ["submitit>=1.5"],  # tools/reproduce.py --submit slurm
        "track": ["trackers>=2.6"],  # tools/predict.py --track
        "geo": ["rasterio>=1.3"],  # GeoTIFF and GeoJSON in tools/predict.py --tile
        "supervision": ["supervision>=0.27"],  # Prediction.to_supervision
    },
    install_requires=[
        "fvcore>=0.1.5",
        "hotcoco>=1.3,<2",
        "iopath>=0.1.7",
        "matplotlib>=3.5",
        "numpy>=1.23",
        "opencv-python-headless>=4.6",  # detectron2 imports it without requiring it
        "Pillow>=9.1",
        "pycocotools>=2.0.6",
        "PyYAML>=6.0",
        "safetensors>=0.4",
        "scipy>=1.9",
        "tabulate>=0.8",
        "tensorboard>=2.10",
        "timm>=0.9.10",
        "tqdm>=4.60",
    ],
)
