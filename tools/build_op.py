"""Builds the compiled op, dimaskdino._C, for setup.py; docs/op.md tells users what this does.

Decisions (is there anything to build, with CUDA or without, for which GPUs) are functions of what was found on the
machine, so that tests can ask them without compiling. Every one that leaves something out is printed; pip shows what is
printed with `-v`, and always where the build fails.

Read from the environment:
    DIMASKDINO_BUILD_OP    0 leaves the op out, 1 insists on it; unset: built where a C++ compiler is found
    FORCE_CUDA             auto (or unset), 1: CUDA or an error, 0: without CUDA
    TORCH_CUDA_ARCH_LIST   GPU architectures, such as "8.0;9.0+PTX"; unset: those of the visible GPUs
    DIMASKDINO_SANITIZE    1 compiles with AddressSanitizer and UndefinedBehaviorSanitizer, for `make sanitize`
    CXX, CUDA_HOME, MAX_JOBS
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
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
# What pip's torch does not bring of a toolkit already. Unless told, pip would take the newest of each.
PIP_TOOLKIT = ["nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-cccl"]
WITHOUT_OP = "DIMASKDINO_BUILD_OP=0 installs without the compiled op (the slower reference form runs then)"
WITHOUT_CUDA = "FORCE_CUDA=0 installs without CUDA"
# Vectors wider than the instruction set's are passed between functions of one file only: no ABI is at stake.
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi"]
SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]


class BuildError(SystemExit):
    """What stops the build, as one message for the user and without a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"error: dimaskdino's compiled op: {message}")


class Toolkit(NamedTuple):
    """A CUDA toolkit: the folder that holds bin/nvcc, and its release such as "13.0"."""

    home: Path
    version: str


def say(message: str) -> None:
    """Print one line about the build."""
    print(f"dimaskdino's compiled op: {message}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------- is there a build


def find_compiler(environ: Mapping[str, str]) -> str | None:
    """The command of a GCC or Clang, or None; on Windows always None: the kernels use vectors that MSVC does not know.

    Raises:
        BuildError: CXX names a program that is not there.
    """
    if sys.platform == "win32":
        return None
    if environ.get("CXX"):
        if shutil.which(shlex.split(environ["CXX"])[0], path=environ.get("PATH")) is None:
            raise BuildError(f"CXX is {environ['CXX']!r}, and there is no such program")
        return environ["CXX"]
    candidates = (*shlex.split(sysconfig.get_config_var("CXX") or "")[:1], "c++", "g++", "clang++")
    return next((name for name in candidates if shutil.which(name, path=environ.get("PATH"))), None)


def op_wanted(environ: Mapping[str, str], compiler: str | None) -> bool:
    """Whether to build the op, by DIMASKDINO_BUILD_OP and by what there is to build it with."""
    choice = environ.get("DIMASKDINO_BUILD_OP", "")
    if choice not in ("", "0", "1"):
        raise BuildError(f"DIMASKDINO_BUILD_OP is {choice!r}; it can be 0, 1 or unset")
    if choice == "0":
        say("left out, because DIMASKDINO_BUILD_OP is 0")
        return False
    if compiler is None:
        missing = "no GCC or Clang was found (`apt install g++`, `dnf install gcc-c++`, or set CXX; not on Windows)"
        if choice == "1":
            raise BuildError(missing)
        say(f"*** LEFT OUT: {missing}; the slower reference form will run. Install again once there is one. ***")
        return False
    return True


def check_compiler(compiler: str) -> None:
    """Raise BuildError where Python's headers are missing or g++ is older than torch's headers allow."""
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
            f"{compiler} is version {version}, and torch needs {MINIMUM_GCC} or newer: install a newer g++ and set CXX "
            f"to it, for example CXX=g++-12. {WITHOUT_OP}"
        )


def _output(command: str, *arguments: str) -> str:
    """What a compiler prints; empty where it cannot be run."""
    try:
        words = [*shlex.split(command), *arguments]
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


# ---------------------------------------------------------------------------------------------------- CUDA or not


def toolkit_homes(environ: Mapping[str, str], site_packages: Path) -> list[Path]:
    """Where a CUDA toolkit may be: CUDA_HOME alone where it is set, else around nvcc, pip's, and the usual folder."""
    given = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    if given:
        return [Path(given)]
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    # The program on PATH can be a script that calls another nvcc, so that its folder holds no toolkit.
    around = [Path(nvcc).resolve().parents[1]] if nvcc else []
    return [*around, *sorted(site_packages.glob("nvidia/cu*")), Path("/usr/local/cuda")]


def find_toolkit(homes: list[Path], torch_cuda: str | None) -> Toolkit | None:
    """The first of these folders that holds an nvcc that runs, and the runtime's headers.

    One of the major version of torch's CUDA comes before all others.
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
    """The toolkit's folders of these names, also where conda puts them."""
    found = [folder for name in names for folder in (home / name, *home.glob(f"targets/*/{name}"))]
    # Given once more on the command line, /usr/include would come before the compiler's own headers.
    return [folder for folder in found if folder.is_dir() and folder != Path("/usr/include")]


def toolkit_problem(torch_cuda: str | None, toolkit: Toolkit | None, homes: list[Path]) -> str:
    """Why this toolkit cannot build for this torch and what to install; empty where it can."""
    if torch_cuda is None:
        return "this torch is a build without CUDA (install a CUDA build of torch: https://pytorch.org/get-started)"
    if toolkit is None:
        looked = ", ".join(map(str, homes))
        return (
            f"no CUDA toolkit (bin/nvcc and include/cuda_runtime.h) in {looked}: install CUDA {torch_cuda}, which is "
            "torch's, and put its nvcc on PATH or set CUDA_HOME (https://developer.nvidia.com/cuda-toolkit-archive)"
            f"{_from_pip(torch_cuda)}"
        )
    if not _same_major(toolkit.version, torch_cuda):
        return (
            f"the CUDA toolkit in {toolkit.home} is {toolkit.version}, but torch is built for CUDA {torch_cuda}, and "
            f"the major versions must agree: install CUDA {torch_cuda} and set CUDA_HOME to it, or install a torch for "
            f"CUDA {toolkit.version.split('.')[0]}{_from_pip(torch_cuda)}"
        )
    return ""


def _from_pip(torch_cuda: str) -> str:
    """How to install what is missing by pip, which has nvcc from CUDA 13 on, on Linux."""
    if sys.platform != "linux" or int(torch_cuda.split(".")[0]) < 13:
        return ""
    parts = " ".join(f"'{name}=={torch_cuda}.*'" for name in PIP_TOOLKIT)
    return f"; pip has one too: python -m pip install {parts}"


def choose_cuda(force: str, problem: str, gpu_visible: bool, arch_list: str) -> tuple[bool, str]:
    """Whether to compile the CUDA kernels, and why not where not.

    Args:
        force: FORCE_CUDA.
        problem: what is wrong with the toolkit; empty where nothing is.
        gpu_visible: whether torch sees a GPU.
        arch_list: TORCH_CUDA_ARCH_LIST.
    """
    if force not in ("", "auto", "0", "1"):
        raise BuildError(f"FORCE_CUDA is {force!r}; it can be auto, 0, 1 or unset")
    if force == "0":
        return False, "FORCE_CUDA is 0"
    if problem and force == "1":
        raise BuildError(f"FORCE_CUDA is 1, but {problem}")
    if problem:
        return False, problem
    if force == "1" or gpu_visible or arch_list:
        return True, ""
    return False, "no GPU is visible; FORCE_CUDA=1 builds for GPUs elsewhere, TORCH_CUDA_ARCH_LIST says for which"


def nvcc_problem(nvcc: Path) -> str:
    """What nvcc says where it cannot compile an empty kernel, as with a host compiler that is too new for it."""
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
    """What is compiled, relative to the root, as setuptools wants it."""
    patterns = ("*.cpp", "cpu/*.cpp", *(("cuda/*.cpp", "cuda/*.cu") if cuda else ()))
    return [path.relative_to(ROOT).as_posix() for pattern in patterns for path in sorted(CSRC.glob(pattern))]


def extension() -> Extension:
    """The extension as far as it is known without torch; the command of build_command() completes it."""
    return Extension("dimaskdino._C", sources(cuda=False), language="c++", py_limited_api=STABLE_ABI)


def complete(op: Extension, torch_folder: Path, toolkit: Toolkit | None, *, sanitize: bool) -> None:
    """Add sources, libraries and options; those for CUDA where there is a toolkit."""
    includes = [torch_folder / "include", torch_folder / "include" / "torch" / "csrc" / "api" / "include"]
    libraries, library_folders = ["c10", "torch", "torch_cpu"], [torch_folder / "lib"]
    if toolkit:
        # The last are pip's, for headers of libraries that a small toolkit leaves out.
        includes += [*cuda_folders(toolkit.home, "include"), *sorted(torch_folder.parent.glob("nvidia/*/include"))]
        folders = cuda_folders(toolkit.home, "lib64", "lib")
        libraries += [cuda_runtime(folders), "c10_cuda", "torch_cuda"]
        library_folders += folders
    op.sources = sources(cuda=toolkit is not None)
    op.libraries, op.library_dirs = libraries, [str(folder) for folder in library_folders]
    op.extra_compile_args, op.extra_link_args = compile_arguments(includes, sanitize=sanitize)


def cuda_runtime(folders: list[Path]) -> str:
    """The runtime library as the linker is to look for it: by its full name where only that is there, as with pip's."""
    if not any((folder / "libcudart.so").exists() for folder in folders):
        full_names = sorted(path.name for folder in folders for path in folder.glob("libcudart.so.*"))
        if full_names:
            return f":{full_names[0]}"
    return "cudart"


def compile_arguments(includes: list[Path], *, sanitize: bool) -> tuple[dict[str, list[str]], list[str]]:
    """Options of the C++ compiler and nvcc, and of the linker; the kernels choose their instruction sets themselves."""
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
    """The step from the build to the source tree, where Python imports the library."""

    def copy_file(self, infile: str, outfile: str, *_: object, **__: object) -> tuple[str, bool]:
        """Put the file there whole or not at all: half a library ends Python when it is imported.

        Its time is now: it is newer than every source, also where none of those that it was built from changed.
        """
        part = f"{outfile}.part"
        shutil.copy(infile, part)
        os.replace(part, outfile)
        return outfile, True


def build_command(compiler: str) -> type[build_ext]:
    """The build_ext command: torch's, made to complete our extension; without torch one that says so when it runs."""
    os.environ["CXX"] = compiler  # torch and setuptools would each choose one
    # ninja from pip lies beside the interpreter, which is on PATH only where the environment is activated.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    try:
        import torch
    except ImportError as error:
        return _command_without_torch(error)
    homes = toolkit_homes(os.environ, Path(torch.__file__).parents[1])
    toolkit = find_toolkit(homes, torch.version.cuda)
    if toolkit:
        os.environ["CUDA_HOME"] = str(toolkit.home)  # read by this part of torch when it is imported
    from torch.utils import cpp_extension

    def usable_toolkit() -> Toolkit | None:
        """The toolkit to build CUDA kernels with; None, and a line that says why, where they are left out."""
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
        """Builds the op for the CPU, and for CUDA where that is chosen."""

        def finalize_options(self) -> None:
            """Keep the objects, pip's too, so that the next build compiles what changed.

            Each torch has a folder: its headers count as the system's, which ninja does not watch.
            """
            given = self.build_temp
            super().finalize_options()
            self.build_temp = given or str(Path("build", f"op-torch-{torch.__version__}"))
            self.force = True  # where there is no ninja

        def build_extensions(self) -> None:
            """Complete the extension and compile it; the compiler's own messages go where the build's output goes."""
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
        """Other commands, such as sdist, do without torch."""

        def run(self) -> None:
            """Say that torch is missing."""
            raise BuildError(
                f"it is compiled against the torch that it will run with, and {sys.executable} cannot import torch "
                f"({error}). Install torch, then run pip with --no-build-isolation, which lets the build see it: "
                f"`python -m pip install --no-build-isolation -e .`. {WITHOUT_OP}"
            )

    return NoTorch
