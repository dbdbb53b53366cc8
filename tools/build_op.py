"""Builds the compiled op, dimaskdino._C, for setup.py; docs/op.md is the users' guide.

The decisions (whether to build, with or without CUDA, for which GPUs) are functions of what is on the machine, so tests
call them without compiling. Each decision that leaves something out is printed; pip shows this with `-v`, and always if
the build fails.

Environment variables:
    DIMASKDINO_BUILD_OP    0 leaves the op out, 1 insists on it; unset: built where a C++ compiler and torch are found
    FORCE_CUDA             auto (or unset), 1: CUDA or an error, 0: without CUDA
    TORCH_CUDA_ARCH_LIST   GPU architectures, such as "8.0;9.0+PTX"; unset: those of the visible GPUs
    DIMASKDINO_SANITIZE    1 compiles with AddressSanitizer and UndefinedBehaviorSanitizer, for `make sanitize`
    CXX, CUDA_HOME, MAX_JOBS
"""

import importlib
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "dimaskdino" / "layers" / "csrc"
MINIMUM_GCC = 9  # torch's headers refuse older ones
DEFAULT_ARCHS = "8.0;9.0+PTX"  # for FORCE_CUDA=1 where no GPU is visible
# One build for every Python; a free-threaded one has no stable ABI.
STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")
# The parts of a toolkit that pip's torch does not install. Without a version, pip would take the newest of each.
PIP_TOOLKIT = ["nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-cccl"]
WITHOUT_OP = "DIMASKDINO_BUILD_OP=0 installs without the compiled op (the slower reference form runs then)"
ONCE_THERE_IS_TORCH = "Install torch, then run pip again with --no-build-isolation, which lets the build see torch."
WITHOUT_CUDA = "FORCE_CUDA=0 installs without CUDA"
# Only functions of the same file pass vectors wider than the instruction set's, so no ABI depends on them.
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi"]
SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]


class BuildError(SystemExit):
    """Stops the build with one message for the user, without a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"error: dimaskdino's compiled op: {message}")


class Toolkit(NamedTuple):
    """A CUDA toolkit: the folder that holds bin/nvcc, and its release such as "13.0"."""

    home: Path
    version: str


def say(message: str) -> None:
    """Print one line about the build."""
    print(f"dimaskdino's compiled op: {message}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------- whether to build


def find_compiler(environ: Mapping[str, str]) -> str | None:
    """The command of GCC or Clang, or None; always None on Windows, because MSVC lacks the vectors of the kernels.

    Raises:
        BuildError: CXX names a program that does not exist.
    """
    if sys.platform == "win32":
        return None
    if environ.get("CXX"):
        if shutil.which(shlex.split(environ["CXX"])[0], path=environ.get("PATH")) is None:
            raise BuildError(f"CXX is {environ['CXX']!r}, but there is no such program")
        return environ["CXX"]
    candidates = (*shlex.split(sysconfig.get_config_var("CXX") or "")[:1], "c++", "g++", "clang++")
    return next((name for name in candidates if shutil.which(name, path=environ.get("PATH"))), None)


def missing_torch() -> str:
    """Why torch cannot be imported; empty if it can.

    pip hides the packages of the environment that it installs into from the build. The op needs the torch of that
    environment, so its packages are added after those of the build.
    """
    if importlib.util.find_spec("torch") is None:
        for folder in site.getsitepackages():
            site.addsitedir(folder)
    try:
        importlib.import_module("torch")
    except ImportError as error:
        return f"{sys.executable} cannot import torch ({error})"
    return ""


def op_wanted(environ: Mapping[str, str], compiler: str | None, find_torch: Callable[[], str] = missing_torch) -> bool:
    """Whether to build the op, given DIMASKDINO_BUILD_OP, the compiler, and whether there is a torch."""
    choice = environ.get("DIMASKDINO_BUILD_OP", "")
    if choice not in ("", "0", "1"):
        raise BuildError(f"DIMASKDINO_BUILD_OP is {choice!r}; set it to 0 or 1, or unset it")
    if choice == "0":
        say("not built, because DIMASKDINO_BUILD_OP is 0")
        return False
    if compiler is None:
        missing = "no GCC or Clang was found (`apt install g++`, `dnf install gcc-c++`, or set CXX; not on Windows)"
        if choice == "1":
            raise BuildError(missing)
        say(f"*** NOT BUILT: {missing}; the slower reference form will run. Install again once there is one. ***")
        return False
    missing = find_torch()
    if missing and choice != "1":
        say(f"*** NOT BUILT: {missing}; the slower reference form will run. {ONCE_THERE_IS_TORCH} ***")
        return False
    return True


def check_compiler(compiler: str) -> None:
    """Raise BuildError if Python's headers are missing or g++ is too old for torch's headers."""
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise BuildError(
            f"Python.h is not in {sysconfig.get_path('include')}: install Python's headers "
            f"(`apt install python3-dev`, `dnf install python3-devel`). {WITHOUT_OP}"
        )
    if "clang" in _output(compiler, "--version"):
        return
    version = _output(compiler, "-dumpversion").strip()
    if version.split(".")[0].isdecimal() and int(version.split(".")[0]) < MINIMUM_GCC:
        raise BuildError(
            f"{compiler} is version {version}, but torch needs {MINIMUM_GCC} or newer: install a newer g++ and set CXX "
            f"to it, for example CXX=g++-12. {WITHOUT_OP}"
        )


def _output(command: str, *arguments: str) -> str:
    """What a compiler prints; empty if it does not run."""
    try:
        words = [*shlex.split(command), *arguments]
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


# ---------------------------------------------------------------------------------------------------- CUDA or not


def toolkit_homes(environ: Mapping[str, str], site_packages: Path) -> list[Path]:
    """Folders to look for a CUDA toolkit in: CUDA_HOME if it is set, else around nvcc, pip's, and the usual one."""
    given = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    if given:
        return [Path(given)]
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    # The program on PATH can be a script that calls another nvcc, so that its folder holds no toolkit.
    around = [Path(nvcc).resolve().parents[1]] if nvcc else []
    return [*around, *sorted(site_packages.glob("nvidia/cu*")), Path("/usr/local/cuda")]


def find_toolkit(homes: list[Path], torch_cuda: str | None) -> Toolkit | None:
    """The first of these folders with an nvcc that runs and the runtime's headers.

    Toolkits of the same major version as torch's CUDA come before all others.
    """
    found = []
    for home in homes:
        release = re.search(r"release (\d+\.\d+)", _output(shlex.quote(str(home / "bin" / "nvcc")), "--version"))
        if release and any((folder / "cuda_runtime.h").is_file() for folder in cuda_folders(home, "include")):
            found.append(Toolkit(home, release.group(1)))
    return next((toolkit for toolkit in found if _same_major(toolkit.version, torch_cuda)), found[0] if found else None)


def _same_major(version: str, torch_cuda: str | None) -> bool:
    return torch_cuda is not None and version.split(".")[0] == torch_cuda.split(".")[0]


def cuda_folders(home: Path, *names: str) -> list[Path]:
    """The toolkit's folders of these names, including where conda puts them."""
    found = [folder for name in names for folder in (home / name, *home.glob(f"targets/*/{name}"))]
    # Given once more on the command line, /usr/include would come before the compiler's own headers.
    return [folder for folder in found if folder.is_dir() and folder != Path("/usr/include")]


def toolkit_problem(torch_cuda: str | None, toolkit: Toolkit | None, homes: list[Path]) -> str:
    """Why this toolkit cannot build for this torch, and what to install; empty if it can."""
    if torch_cuda is None:
        return "this torch is built without CUDA (install a CUDA build of torch: https://pytorch.org/get-started)"
    if toolkit is None:
        looked = ", ".join(map(str, homes))
        return (
            f"no CUDA toolkit (bin/nvcc and include/cuda_runtime.h) in {looked}: install CUDA {torch_cuda}, torch's "
            "version, and put its nvcc on PATH or set CUDA_HOME (https://developer.nvidia.com/cuda-toolkit-archive)"
            f"{_from_pip(torch_cuda)}"
        )
    if not _same_major(toolkit.version, torch_cuda):
        return (
            f"the CUDA toolkit in {toolkit.home} is {toolkit.version}, but torch is built for CUDA {torch_cuda}; "
            f"the major versions must match: install CUDA {torch_cuda} and set CUDA_HOME to it, or install a torch for "
            f"CUDA {toolkit.version.split('.')[0]}{_from_pip(torch_cuda)}"
        )
    return ""


def _from_pip(torch_cuda: str) -> str:
    """How to install what is missing with pip, which has nvcc for CUDA 13 and newer on Linux."""
    if sys.platform != "linux" or int(torch_cuda.split(".")[0]) < 13:
        return ""
    parts = " ".join(f"'{name}=={torch_cuda}.*'" for name in PIP_TOOLKIT)
    return f"; or with pip: python -m pip install {parts}"


def choose_cuda(force: str, problem: str, gpu_visible: bool, arch_list: str) -> tuple[bool, str]:
    """Whether to compile the CUDA kernels, and if not, why.

    Args:
        force: FORCE_CUDA.
        problem: what is wrong with the toolkit; empty if nothing is.
        gpu_visible: whether torch sees a GPU.
        arch_list: TORCH_CUDA_ARCH_LIST.
    """
    if force not in ("", "auto", "0", "1"):
        raise BuildError(f"FORCE_CUDA is {force!r}; set it to auto, 0, or 1, or unset it")
    if force == "0":
        return False, "FORCE_CUDA is 0"
    if problem and force == "1":
        raise BuildError(f"FORCE_CUDA is 1, but {problem}")
    if problem:
        return False, problem
    if force == "1" or gpu_visible or arch_list:
        return True, ""
    return (
        False,
        "no GPU is visible; FORCE_CUDA=1 builds for GPUs elsewhere, and TORCH_CUDA_ARCH_LIST lists their architectures",
    )


def nvcc_problem(nvcc: Path) -> str:
    """The message of nvcc if it cannot compile an empty kernel, for example with a host compiler that is too new."""
    # Torch passes CC to nvcc in the same way.
    host = ["-ccbin", os.environ["CC"]] if "CC" in os.environ else []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("#include <cuda_runtime.h>\n__global__ void probe() {}\n")
        command = [str(nvcc), *host, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["no message"]
    message = next((line for line in lines if "error" in line.lower()), lines[-1])
    return f"{nvcc} cannot compile ({message}): CC can name another host compiler, for example CC=g++-12 CXX=g++-12"


# ---------------------------------------------------------------------------------------------------- compiling


def sources(*, cuda: bool) -> list[str]:
    """The files to compile, relative to the root, as setuptools wants them."""
    patterns = ("*.cpp", "cpu/*.cpp", *(("cuda/*.cpp", "cuda/*.cu") if cuda else ()))
    return [path.relative_to(ROOT).as_posix() for pattern in patterns for path in sorted(CSRC.glob(pattern))]


def extension() -> Extension:
    """The extension without what depends on torch, which the command of build_command() adds."""
    return Extension("dimaskdino._C", sources(cuda=False), language="c++", py_limited_api=STABLE_ABI)


def complete(op: Extension, torch_folder: Path, toolkit: Toolkit | None, *, sanitize: bool) -> None:
    """Add sources, libraries, and options, with those for CUDA if there is a toolkit."""
    includes = [torch_folder / "include", torch_folder / "include" / "torch" / "csrc" / "api" / "include"]
    libraries, library_folders = ["c10", "torch", "torch_cpu"], [torch_folder / "lib"]
    if toolkit:
        # The last are pip's, for headers of libraries that a small toolkit lacks.
        includes += [*cuda_folders(toolkit.home, "include"), *sorted(torch_folder.parent.glob("nvidia/*/include"))]
        folders = cuda_folders(toolkit.home, "lib64", "lib")
        libraries += [cuda_runtime(folders), "c10_cuda", "torch_cuda"]
        library_folders += folders
    op.sources = sources(cuda=toolkit is not None)
    op.libraries, op.library_dirs = libraries, [str(folder) for folder in library_folders]
    op.extra_compile_args, op.extra_link_args = compile_arguments(includes, sanitize=sanitize)


def cuda_runtime(folders: list[Path]) -> str:
    """The name by which the linker finds the runtime library: the full name if there is no other, as with pip's."""
    if not any((folder / "libcudart.so").exists() for folder in folders):
        full_names = sorted(path.name for folder in folders for path in folder.glob("libcudart.so.*"))
        if full_names:
            return f":{full_names[0]}"
    return "cudart"


def compile_arguments(includes: list[Path], *, sanitize: bool) -> tuple[dict[str, list[str]], list[str]]:
    """Options of the C++ compiler, nvcc, and the linker; the kernels choose their instruction sets themselves."""
    host = ["-O3", "-g0"]
    if sanitize:
        # Many Pythons have extensions compiled with -fwrapv, which would hide an overflow.
        host = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-wrapv", *SANITIZERS]
    # Without it at::parallel_for runs in one thread. Apple's Clang has no OpenMP.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    # Warnings are for our own files alone.
    system = [word for path in includes for word in ("-isystem", str(path))]
    options = {"cxx": [*host, *WARNINGS, *openmp, *system], "nvcc": ["-O3", "-Xcompiler", ",".join(WARNINGS)]}
    return options, [*openmp, *(SANITIZERS if sanitize else [])]


class PutInPlace(build_ext):
    """Copies the library from the build to the source tree, where Python imports it."""

    def copy_file(self, infile: str, outfile: str, *_: object, **__: object) -> tuple[str, bool]:
        """Copy the file completely or not at all; importing half a library ends Python.

        Its time is now, which makes it newer than every source even if none of its own sources changed.
        """
        part = f"{outfile}.part"
        shutil.copy(infile, part)
        os.replace(part, outfile)
        return outfile, True


def build_command(compiler: str) -> type[build_ext]:
    """The build_ext command of torch, completing our extension too; without torch, one that reports this when run."""
    os.environ["CXX"] = compiler  # otherwise torch and setuptools each choose one
    # pip's ninja lies beside the interpreter, which is on PATH only if the environment is activated.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    try:
        import torch
    except ImportError as error:
        return _command_without_torch(error)
    homes = toolkit_homes(os.environ, Path(torch.__file__).parents[1])
    toolkit = find_toolkit(homes, torch.version.cuda)
    if toolkit:
        os.environ["CUDA_HOME"] = str(toolkit.home)  # this part of torch reads it on import
    from torch.utils import cpp_extension

    def usable_toolkit() -> Toolkit | None:
        """The toolkit to build CUDA kernels with; None to build without, after a line that says why."""
        force, archs = os.environ.get("FORCE_CUDA", ""), os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        gpu = torch.cuda.is_available()
        chosen, reason = choose_cuda(force, toolkit_problem(torch.version.cuda, toolkit, homes), gpu, archs)
        if chosen:
            chosen, reason = choose_cuda(force, nvcc_problem(toolkit.home / "bin" / "nvcc"), gpu, archs)
        if not chosen:
            say(f"building without CUDA: {reason}")
            return None
        if not gpu:
            archs = os.environ["TORCH_CUDA_ARCH_LIST"] = archs or DEFAULT_ARCHS
        say(f"building with CUDA {toolkit.version} ({toolkit.home}) for {archs or 'the visible GPUs'}")
        return toolkit

    class BuildOp(PutInPlace, cpp_extension.BuildExtension):
        """Builds the op for the CPU, and for CUDA if chosen."""

        def finalize_options(self) -> None:
            """Keep the object files, even under pip, so that the next build compiles only what changed.

            Each version of torch has its own folder, because ninja does not watch torch's headers.
            """
            given = self.build_temp
            super().finalize_options()
            self.build_temp = given or str(Path("build", f"op-torch-{torch.__version__}"))
            self.force = True  # for builds without ninja

        def build_extensions(self) -> None:
            """Complete and compile the extension; the compiler's messages go to the build's output."""
            check_compiler(compiler)
            sanitize = os.environ.get("DIMASKDINO_SANITIZE") == "1"
            complete(self.extensions[0], Path(torch.__file__).parent, usable_toolkit(), sanitize=sanitize)
            try:
                super().build_extensions()
            except (RuntimeError, ValueError, OSError, subprocess.SubprocessError, BaseError, CCompilerError) as error:
                raise BuildError(f"{error}; the compiler's messages are above. {WITHOUT_CUDA}; {WITHOUT_OP}") from error

    return BuildOp


def _command_without_torch(error: ImportError) -> type[build_ext]:
    class NoTorch(build_ext):
        """Lets other commands, such as sdist, run without torch."""

        def run(self) -> None:
            """Say that torch is missing."""
            raise BuildError(
                f"it compiles against the torch that it will run with, but {sys.executable} cannot import torch "
                f"({error}). {ONCE_THERE_IS_TORCH} {WITHOUT_OP}"
            )

    return NoTorch


if __name__ == "__main__":
    print(__doc__)
    print("It has no command line of its own: `python -m pip install --no-build-isolation -e .` builds the op.")
