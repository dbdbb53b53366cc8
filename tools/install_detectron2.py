"""Install detectron2 into the Python that runs this script.

Usage: python tools/install_detectron2.py [--source {auto,official,index}] [--sdist FILE]

    official  the upstream repository at a pinned commit, built against the installed torch (needs git and a compiler)
    index     a source distribution of upstream v0.5 from the package index, checked by its sha256 and repackaged as a
              pure-Python wheel (detectron2_wheel.py), without detectron2's own compiled operators, which DI-MaskDINO
              does not use
    auto      keep a detectron2 that can be imported, else official, else index

Only pip is needed. For `index` the script calls the downloader `unearth`, in a temporary folder if it is not installed,
because pip refuses the distribution: an optional requirement in its metadata is a direct URL. `--sdist` takes a file
that is already on the disk in place of the download. Whatever goes wrong is one line on stderr and exit status 2.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from detectron2_wheel import SDIST_REQUIREMENT, WHEEL_VERSION, WheelError, repackage

UPSTREAM_URL = "https://github.com/facebookresearch/detectron2.git"
UPSTREAM_COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
NETWORK_TIMEOUT_S = 20
DOWNLOADER = "unearth==0.19.0"


class InstallError(Exception):
    """What stops an installation, in one line for the user."""


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
    except (InstallError, WheelError, OSError, tarfile.TarError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
