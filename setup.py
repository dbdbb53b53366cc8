"""The dimaskdino package and its compiled op: `python -m pip install --no-build-isolation -e .`.

Install torch and detectron2 first (tools/install_detectron2.py installs the latter). Neither is a listed requirement,
so installing this package never replaces them. tools/build_op.py builds the op, dimaskdino._C. configs/ is
copied into wheels, for dimaskdino.model_zoo; train_net.py stays in the repository.
"""

import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent / "tools"))
import build_op

COMPILER = build_op.find_compiler(os.environ)
OP = build_op.op_wanted(os.environ, COMPILER)
VERSION = re.findall('__version__ = "(.+)"', (Path(__file__).parent / "dimaskdino" / "__init__.py").read_text())


class BuildWithConfigs(build_py):
    """Copies configs/ beside the modules, where dimaskdino.model_zoo looks for it."""

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if not self.editable_mode:
            source, target = Path(__file__).parent / "configs", Path(self.build_lib) / "dimaskdino" / "configs"
            shutil.copytree(source, target, dirs_exist_ok=True)


setup(
    name="dimaskdino",
    version=VERSION[0],
    description="DI-MaskDINO: joint object detection and instance segmentation, on detectron2",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=("dimaskdino", "dimaskdino.*")),
    package_data={"dimaskdino.reproduction": ["papers/*.json"]},
    ext_modules=[build_op.extension()] if OP else [],
    cmdclass={"build_py": BuildWithConfigs} | ({"build_ext": build_op.build_command(COMPILER)} if OP else {}),
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if OP and build_op.STABLE_ABI else {},
    extras_require={
        "browse": ["gradio>=6,<7"],  # tools/browse.py
        "slurm": ["submitit>=1.5"],  # tools/reproduce.py --submit slurm
        "track": ["trackers>=2.6"],  # tools/predict.py --track
        "export": ["onnx>=1.16", "onnxruntime>=1.18", "openvino>=2024.4"],  # tools/export.py
        "geo": ["rasterio>=1.3"],  # GeoTIFF and GeoJSON in tools/predict.py --tile
        "hub": ["huggingface_hub>=0.25"],  # weights of hf://owner/name
        "docs": ["sphinx>=7", "myst-parser>=3", "furo>=2024.1"],  # make docs
        "notebook": ["nbclient>=0.8", "nbformat>=5.7", "ipykernel>=6.25"],  # make notebook
        "wandb": ["wandb>=0.16"],  # LOG.WRITERS wandb
        "mlflow": ["mlflow>=2.9"],  # LOG.WRITERS mlflow
        "albumentations": ["albumentations>=2.0"],  # INPUT.AUGMENTATIONS by the names of Albumentations
        "tiff": ["tifffile>=2023.1"],  # INPUT.READER TiffReader
        "hdf5": ["h5py>=3.8"],  # INPUT.READER Hdf5Reader
        "lora": ["peft>=0.12"],  # MODEL.VIT.LORA
        "supervision": ["supervision>=0.27"],  # Prediction.to_supervision
    },
    install_requires=[
        "fvcore>=0.1.5",
        "hotcoco>=1.3,<2",
        "iopath>=0.1.7",
        "matplotlib>=3.5",
        "msgspec>=0.18",
        "numpy>=1.23",
        "opencv-python-headless>=4.6",  # detectron2 imports it without requiring it
        "Pillow>=10.1",
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
