"""Install detectron2 into the Python that runs this script.

Usage: python tools/install_detectron2.py [--source {auto,official,index}] [--sdist FILE]

    official  the upstream repository at a pinned commit, built against the installed torch (needs git and a compiler)
    index     a source distribution of upstream v0.5 from the package index, checked by its sha256 and repackaged as a
              pure-Python wheel with the edits of the table EDITS below; detectron2's own compiled operators are left
              out, which DI-MaskDINO does not use
    auto      keep a detectron2 that can be imported, else official, else index

Only pip is needed. For `index` the script calls the downloader `unearth`, in a temporary folder if it is not installed,
because pip refuses the distribution: an optional requirement in its metadata is a direct URL. `--sdist` takes a file
that is already on the disk in place of the download. Whatever goes wrong is one line on stderr and exit status 2.
"""

import argparse
import base64
import fnmatch
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

UPSTREAM_URL = "https://github.com/facebookresearch/detectron2.git"
UPSTREAM_COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
NETWORK_TIMEOUT_S = 20

SDIST_REQUIREMENT = "detectron2-cdo==0.5"
SDIST_SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"
DOWNLOADER = "unearth==0.19.0"

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


class InstallError(Exception):
    """What stops an installation, in one line for the user."""


# ---------------------------------------------------------------------------------------------------- sdist -> wheel


def check_sha256(path: Path, expected: str) -> None:
    """Raise InstallError unless the file's sha256 is `expected`."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise InstallError(f"{path.name} has sha256 {found}, expected {expected}: not installed; fetch it again")


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
        raise InstallError(f"{path.name} holds none of the folders {', '.join(PACKAGES)}")
    return files, license_text


def apply_edits(files: Mapping[str, bytes], edits: Iterable[Edit]) -> dict[str, bytes]:
    """Return the files with every edit made.

    Raises:
        InstallError: an edit matches no file, or a file that it matches does not hold its old text.
    """
    edited = dict(files)
    for edit in edits:
        names = fnmatch.filter(edited, edit.file_glob)
        if not names:
            raise InstallError(f"edit of {edit.file_glob} ({edit.reason}): the sdist has no such file")
        for name in names:
            text = edited[name].decode()
            if edit.old not in text:
                raise InstallError(f"edit of {name} ({edit.reason}): its text {edit.old!r} is missing")
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


# ---------------------------------------------------------------------------------------------------- what is there


def importable_detectron2() -> str | None:
    """Version of the detectron2 that a fresh process of this Python can import, or None."""
    code = "import detectron2, detectron2.layers; print(detectron2.__version__)"
    with tempfile.TemporaryDirectory() as neutral:
        done = subprocess.run([sys.executable, "-c", code], cwd=neutral, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return None
    return installed_version() or done.stdout.split()[-1]


def installed_version() -> str | None:
    """Version in detectron2's metadata, which tells our wheel from others; None without metadata."""
    try:
        return importlib.metadata.version("detectron2")
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_commit() -> str | None:
    """Commit that detectron2 was installed from, or None where it did not come from a repository."""
    try:
        origin = importlib.metadata.distribution("detectron2").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    return json.loads(origin or "{}").get("vcs_info", {}).get("commit_id")


def require_torch() -> None:
    """Raise InstallError where torch is missing: detectron2 is built against it and cannot be imported without it."""
    if importlib.util.find_spec("torch") is None:
        raise InstallError(f"torch is not installed in {sys.executable}: install it first (pip install torch)")


# ---------------------------------------------------------------------------------------------------- installing


def pip(*arguments: str) -> None:
    """Run pip of this Python; its output goes to the terminal."""
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], check=False)
    if done.returncode != 0:
        raise InstallError(f"`pip {' '.join(arguments)}` failed (exit {done.returncode}); its output is above")


def check_official_possible() -> None:
    """Raise InstallError, quickly, where the upstream repository cannot be reached or nothing could build it."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    for program in ("git", compiler):
        if shutil.which(program) is None:
            raise InstallError(f"official: the program {program!r} is missing")
    command = ["git", "ls-remote", "--exit-code", UPSTREAM_URL, "HEAD"]
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=NETWORK_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise InstallError(f"official: no answer from {UPSTREAM_URL} within {NETWORK_TIMEOUT_S} s") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        reason = next((line for line in lines if line.startswith("fatal:")), lines[-1])
        raise InstallError(f"official: cannot reach {UPSTREAM_URL} ({reason})")


def install_official() -> None:
    """Build and install the pinned upstream commit, unless it is there."""
    if installed_commit() == UPSTREAM_COMMIT and importable_detectron2():
        print(f"detectron2: already the official commit {UPSTREAM_COMMIT[:8]}")
        return
    check_official_possible()
    print(f"detectron2: building the official commit {UPSTREAM_COMMIT[:8]}; this takes some minutes", flush=True)
    install(f"git+{UPSTREAM_URL}@{UPSTREAM_COMMIT}")
    print(f"detectron2: installed the official commit {UPSTREAM_COMMIT[:8]}")


def install_index(sdist: Path | None) -> None:
    """Repackage and install the sdist, from a file or from the index, unless it is there."""
    if installed_version() == WHEEL_VERSION and importable_detectron2():
        print(f"detectron2: already {WHEEL_VERSION}, made by this script from the index")
        return
    with tempfile.TemporaryDirectory() as folder:
        wheel = repackage(sdist or download_sdist(Path(folder)), Path(folder))
        install(str(wheel))
    print(f"detectron2: installed {WHEEL_VERSION}, repackaged from {SDIST_REQUIREMENT} without compiled operators")


def install(requirement: str) -> None:
    """Put this detectron2 in the place of any other, then install what it requires and is missing.

    pip by itself would keep another commit or build of the same version.
    """
    pip("install", "--no-build-isolation", "--force-reinstall", "--no-deps", requirement)
    importlib.invalidate_caches()
    needed = importlib.metadata.requires("detectron2") or []
    pip("install", "--quiet", *(need for need in needed if "extra ==" not in need))
    if importable_detectron2() is None:
        raise InstallError("detectron2 is installed, but `import detectron2.layers` fails; run it to see why")


def download_sdist(folder: Path) -> Path:
    """Fetch the sdist from pip's index into `folder`."""
    environment = dict(os.environ)
    if importlib.util.find_spec("unearth") is None:
        tools = folder / "tools"
        try:
            pip("install", "--quiet", "--target", str(tools), DOWNLOADER)
        except InstallError as error:
            raise InstallError(f"index: no downloader, is the package index reachable? {error}") from None
        environment["PYTHONPATH"] = str(tools)
    command = [sys.executable, "-m", "unearth", *index_options(), SDIST_REQUIREMENT, "--download", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("detectron2_cdo-*.tar.gz"))
    if done.returncode != 0 or not found:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InstallError(f"index: cannot download {SDIST_REQUIREMENT} ({reason}); is the package index reachable?")
    return found[0]


def index_options() -> list[str]:
    """The downloader's options for the index that pip is set to; none where pip uses its default."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    # Later lines win, and pip lists the environment last, as it ranks them itself.
    urls = [line.partition("=")[2].strip("'") for line in listed.splitlines() if ".index-url=" in line]
    return ["--index-url", urls[-1]] if urls else []


def install_auto(sdist: Path | None) -> None:
    """Keep what can be imported, else install official, else index; say which and why."""
    version = importable_detectron2()
    if version:
        print(f"detectron2: keeping {version}, which is already importable")
        return
    try:
        install_official()
    except InstallError as error:
        print(f"detectron2: taking the index, because {error}", flush=True)
        install_index(sdist)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Install detectron2 into the Python that runs this script.")
    parser.add_argument("--source", choices=("auto", "official", "index"), default="auto")
    parser.add_argument("--sdist", type=Path, help=f"the file of {SDIST_REQUIREMENT}, in place of a download")
    options = parser.parse_args(arguments)
    try:
        require_torch()
        if options.source == "official":
            install_official()
        elif options.source == "index":
            install_index(options.sdist)
        else:
            install_auto(options.sdist)
    except (InstallError, OSError, tarfile.TarError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
