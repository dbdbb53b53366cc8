"""Repackage the source distribution of detectron2 v0.5 that the package index has as a pure-Python wheel.

The sdist's Python files are upstream's; the edits of the table EDITS make them run with the libraries of today.
detectron2's own compiled operators, which DI-MaskDINO does not use, are left out: a module in their place imports, and
says what is missing when one of them is called. install_detectron2.py installs the wheel.
"""

import base64
import fnmatch
import hashlib
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

SDIST_REQUIREMENT = "detectron2-cdo==0.5"
SDIST_SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"

# Folder of the sdist -> folder of the wheel, as upstream's setup.py lays them out.
PACKAGES = {
    "detectron2/": "detectron2/",
    "projects/PointRend/point_rend/": "detectron2/projects/point_rend/",
    "projects/DeepLab/deeplab/": "detectron2/projects/deeplab/",
    "projects/Panoptic-DeepLab/panoptic_deeplab/": "detectron2/projects/panoptic_deeplab/",
}

# Upstream's requirements, less what only its Caffe2 export and its LazyConfig printer use (future, pydot, black) and
# less the direct URL. torch is not among them, so nothing here can replace the installed one.
REQUIRES = (
    "Pillow>=7.1",
    "matplotlib",
    "pycocotools>=2.0.2",
    "termcolor>=1.1",
    "yacs>=0.1.6",
    "tabulate",
    "cloudpickle",
    "tqdm>4.29.0",
    "tensorboard",
    "fvcore>=0.1.5,<0.1.6",
    "iopath>=0.1.7,<0.1.10",
    "omegaconf>=2.1",
    "hydra-core>=1.1",
)


@dataclass(frozen=True)
class Edit:
    """Replace every `old` by `new` in each file of the wheel that matches `file_glob`; each of them must hold `old`."""

    file_glob: str
    old: str
    new: str
    reason: str


NUMPY_ALIAS = "NumPy 1.24 removed its aliases of the builtin types"
PKG_RESOURCES = "setuptools 82 removed pkg_resources"

EDITS = (
    Edit("detectron2/data/transforms/transform.py", "Image.LINEAR", "Image.BILINEAR", "Pillow 10 removed the alias"),
    Edit("detectron2/data/build.py", "dtype=np.int)", "dtype=int)", NUMPY_ALIAS),
    Edit("detectron2/data/build.py", "dtype=np.int\n", "dtype=int\n", NUMPY_ALIAS),
    Edit("detectron2/data/datasets/pascal_voc.py", "dtype=np.str)", "dtype=str)", NUMPY_ALIAS),
    Edit("detectron2/evaluation/pascal_voc_evaluation.py", "astype(np.bool)", "astype(bool)", NUMPY_ALIAS),
    Edit("detectron2/evaluation/sem_seg_evaluation.py", "dtype=np.int)", "dtype=int)", NUMPY_ALIAS),
    Edit("detectron2/evaluation/sem_seg_evaluation.py", "np.float)", "float)", NUMPY_ALIAS),
    Edit("detectron2/structures/masks.py", "np.bool)", "bool)", NUMPY_ALIAS),
    Edit("detectron2/utils/visualizer.py", "astype(np.bool)", "astype(bool)", NUMPY_ALIAS),
    Edit("detectron2/utils/video_visualizer.py", "dtype=np.bool)", "dtype=bool)", NUMPY_ALIAS),
    Edit(
        "detectron2/layers/mask_ops.py",
        "np.array(mask, copy=False)",
        "np.asarray(mask)",
        "NumPy 2 raises where copy=False cannot be honoured, as for a Pillow image",
    ),
    Edit("detectron2/model_zoo/model_zoo.py", "import pkg_resources", "from importlib import resources", PKG_RESOURCES),
    Edit(
        "detectron2/model_zoo/model_zoo.py",
        'pkg_resources.resource_filename(\n        "detectron2.model_zoo", os.path.join("configs", config_path)\n    )',
        'str(resources.files("detectron2.model_zoo").joinpath("configs", config_path))',
        PKG_RESOURCES,
    ),
)

# Several modules of detectron2 import `_C` when they are imported, so it must exist; only a call may fail.
# default_setup() logs the two versions and has_cuda().
STUB_MODULE = "detectron2/_C.py"
STUB_TEXT = '''"""Stands in for detectron2's compiled operators, which this pure-Python build does not have."""


def get_compiler_version():
    return "not built (pure-Python detectron2)"


def get_cuda_version():
    return "not built (pure-Python detectron2)"


def has_cuda():
    return False


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def not_built(*args, **kwargs):
        raise NotImplementedError(
            f"detectron2._C.{name} is not built: this detectron2 is pure Python. Install the official one, "
            "for example with dimaskdino's tools/install_detectron2.py --source official."
        )

    return not_built
'''


def table_digest(edits: Iterable[Edit]) -> str:
    """Eight hex digits that tell a wheel made with these edits from one made with others."""
    return hashlib.sha256(repr((tuple(edits), STUB_TEXT, REQUIRES)).encode()).hexdigest()[:8]


WHEEL_VERSION = f"0.5+index.{table_digest(EDITS)}"


class WheelError(Exception):
    """Why no wheel can be made of the sdist, in one line for the user."""


def check_sha256(path: Path, expected: str) -> None:
    """Raise WheelError unless the file's sha256 is `expected`."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise WheelError(f"{path.name} has sha256 {found}, expected {expected}: not installed; fetch it again")


def read_sdist(path: Path) -> tuple[dict[str, bytes], bytes]:
    """Read what the wheel is made of from an sdist.

    Returns:
        The files of PACKAGES by their path in the wheel, and the text of LICENSE.
    """
    files: dict[str, bytes] = {}
    license_text = b""
    with tarfile.open(path) as archive:
        for member in archive:
            stored = archive.extractfile(member) if member.isfile() else None
            if stored is None:
                continue
            name = member.name.partition("/")[2]
            if name == "LICENSE":
                license_text = stored.read()
            for folder, target in PACKAGES.items():
                if name.startswith(folder):
                    files[target + name[len(folder) :]] = stored.read()
    if not files:
        raise WheelError(f"{path.name} holds none of the folders {', '.join(PACKAGES)}")
    return files, license_text


def apply_edits(files: Mapping[str, bytes], edits: Iterable[Edit]) -> dict[str, bytes]:
    """Return the files with every edit made.

    Raises:
        WheelError: an edit matches no file, or a file that it matches does not hold its old text.
    """
    edited = dict(files)
    for edit in edits:
        names = fnmatch.filter(edited, edit.file_glob)
        if not names:
            raise WheelError(f"edit of {edit.file_glob} ({edit.reason}): the sdist has no such file")
        for name in names:
            text = edited[name].decode()
            if edit.old not in text:
                raise WheelError(f"edit of {name} ({edit.reason}): its text {edit.old!r} is missing")
            edited[name] = text.replace(edit.old, edit.new).encode()
    return edited


def build_wheel(files: Mapping[str, bytes], license_text: bytes, folder: Path) -> Path:
    """Write the pure-Python wheel of `files`, with its metadata and RECORD, and return its path."""
    info = f"detectron2-{WHEEL_VERSION}.dist-info"
    metadata = ["Metadata-Version: 2.1", "Name: detectron2", f"Version: {WHEEL_VERSION}", "Requires-Python: >=3.10"]
    metadata += [f"Requires-Dist: {requirement}" for requirement in REQUIRES]
    wheel = ["Wheel-Version: 1.0", "Generator: dimaskdino", "Root-Is-Purelib: true", "Tag: py3-none-any"]
    contents = {
        **files,
        f"{info}/LICENSE": license_text,
        f"{info}/METADATA": "\n".join([*metadata, ""]).encode(),
        f"{info}/WHEEL": "\n".join([*wheel, ""]).encode(),
    }
    record = "".join(f"{name},{_record_hash(data)},{len(data)}\n" for name, data in contents.items())
    contents[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    path = folder / f"detectron2-{WHEEL_VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return path


def _record_hash(data: bytes) -> str:
    """The hash of one RECORD line: urlsafe base64 of the sha256, without padding."""
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def repackage(sdist: Path, folder: Path) -> Path:
    """Turn the checked sdist into the wheel; returns the wheel's path."""
    check_sha256(sdist, SDIST_SHA256)
    files, license_text = read_sdist(sdist)
    return build_wheel({**apply_edits(files, EDITS), STUB_MODULE: STUB_TEXT.encode()}, license_text, folder)
