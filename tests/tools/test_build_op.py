"""How the compiled op would be built, by what is found on a machine; nothing is compiled here."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import Distribution

from tools import build_op
from tools.build_op import BuildError, Toolkit

CUDA_13 = Toolkit(Path("/opt/cuda"), "13.0")


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def toolkit_folder(folder: Path, version: str) -> Path:
    script(folder / "bin" / "nvcc", f'echo "Cuda compilation tools, release {version}, V{version}.88"')
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").touch()
    return folder


# ------------------------------------------------------------------------------------------------ compiler


def test_cxx_names_the_compiler(tmp_path):
    script(tmp_path / "my++", "")
    assert build_op.find_compiler({"CXX": "my++ -m64", "PATH": str(tmp_path)}) == "my++ -m64"


def test_missing_cxx_is_an_error_not_a_smaller_install(tmp_path):
    with pytest.raises(BuildError, match=r"CXX is 'my\+\+'"):
        build_op.find_compiler({"CXX": "my++", "PATH": str(tmp_path)})


def test_the_compiler_is_looked_for_on_path(tmp_path):
    assert build_op.find_compiler({"PATH": str(tmp_path)}) is None
    script(tmp_path / "clang++", "")
    assert build_op.find_compiler({"PATH": str(tmp_path)}) == "clang++"


def test_windows_has_no_compiler_that_will_do(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert build_op.find_compiler({"CXX": "cl"}) is None


@pytest.mark.parametrize(
    ("choice", "compiler", "expected", "said"),
    [
        (None, "c++", True, ""),
        ("1", "c++", True, ""),
        ("0", "c++", False, "DIMASKDINO_BUILD_OP is 0"),
        (None, None, False, "NOT BUILT: no GCC or Clang"),
    ],
)
def test_op_is_built_where_there_is_a_compiler(choice, compiler, expected, said, capsys):
    environ = {} if choice is None else {"DIMASKDINO_BUILD_OP": choice}
    assert build_op.op_wanted(environ, compiler) is expected
    assert said in capsys.readouterr().err


def test_op_is_left_out_where_torch_is_missing(capsys):
    assert build_op.op_wanted({}, "c++", lambda: "python3 cannot import torch") is False
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "NOT BUILT: python3 cannot import torch" in line
    assert "--no-build-isolation" in line


def test_insisting_on_the_op_without_torch_waits_for_the_build():
    # Without it, building an sdist would need torch.
    assert build_op.op_wanted({"DIMASKDINO_BUILD_OP": "1"}, "c++", lambda: "python3 cannot import torch") is True


def test_build_sees_the_torch_that_pip_hides(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("")
    code = f"""
import site, sys
from tools.build_op import missing_torch
sys.path[:] = [entry for entry in sys.path if "site-packages" not in entry]
site.getsitepackages = list
assert "torch" in missing_torch()
site.getsitepackages = lambda: [{str(tmp_path)!r}]
assert missing_torch() == ""
assert list(sys.modules["torch"].__path__) == [{str(tmp_path / "torch")!r}]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=build_op.ROOT)


def test_insisting_on_the_op_without_a_compiler_is_an_error():
    with pytest.raises(BuildError, match="apt install g"):
        build_op.op_wanted({"DIMASKDINO_BUILD_OP": "1"}, None)


def test_other_values_are_refused():
    with pytest.raises(BuildError, match="'yes'; set it to 0 or 1"):
        build_op.op_wanted({"DIMASKDINO_BUILD_OP": "yes"}, "c++")
    with pytest.raises(BuildError, match="'yes'; set it to auto, 0, or 1"):
        build_op.choose_cuda("yes", "", gpu_visible=True, arch_list="")


@pytest.mark.parametrize(("version", "refused"), [("8", True), ("9", False), ("12.2.0", False)])
def test_a_compiler_that_is_too_old_for_torch_is_refused(tmp_path, version, refused, monkeypatch):
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(build_op.sysconfig, "get_path", lambda name: str(tmp_path))
    compiler = script(tmp_path / "g++", f'case "$1" in -dumpversion) echo {version};; *) echo "g++ (GCC)";; esac')
    if refused:
        with pytest.raises(BuildError, match="version 8, but torch needs 9 or newer"):
            build_op.check_compiler(str(compiler))
    else:
        build_op.check_compiler(str(compiler))


def test_missing_python_headers_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(build_op.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(BuildError, match="apt install python3-dev"):
        build_op.check_compiler("c++")


# ------------------------------------------------------------------------------------------------ CUDA


def test_cuda_home_alone_is_looked_at_where_it_is_set(tmp_path):
    script(tmp_path / "bin" / "nvcc", "")
    path, site = str(tmp_path / "bin"), tmp_path / "site-packages"
    pips = site / "nvidia" / "cu13"
    pips.mkdir(parents=True)
    assert build_op.toolkit_homes({"PATH": path, "CUDA_HOME": "/a"}, site) == [Path("/a")]
    assert build_op.toolkit_homes({"PATH": path, "CUDA_PATH": "/b"}, site) == [Path("/b")]
    assert build_op.toolkit_homes({"PATH": path}, site) == [tmp_path, pips, Path("/usr/local/cuda")]


def test_links_to_nvcc_are_followed(tmp_path):
    home = toolkit_folder(tmp_path / "cuda-13.0", "13.0")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
    assert build_op.toolkit_homes({"PATH": str(tmp_path / "bin")}, tmp_path)[0] == home


def test_toolkit_is_a_running_nvcc_with_headers(tmp_path):
    script(tmp_path / "wrapper" / "bin" / "nvcc", 'echo "release 12.0"')  # no headers: a script that calls another nvcc
    home = toolkit_folder(tmp_path / "a toolkit", "13.0")
    assert build_op.find_toolkit([tmp_path / "nothing", tmp_path / "wrapper", home], "13.0") == (home, "13.0")
    assert build_op.find_toolkit([tmp_path / "nothing", tmp_path / "wrapper"], "13.0") is None


@pytest.mark.parametrize(
    ("torch_cuda", "chosen"), [("13.0", "13.2"), ("12.8", "12.4"), ("11.8", "12.4"), (None, "12.4")]
)
def test_toolkit_of_torchs_major_version_is_preferred(tmp_path, torch_cuda, chosen):
    homes = [toolkit_folder(tmp_path / version, version) for version in ("12.4", "13.2")]
    assert build_op.find_toolkit(homes, torch_cuda).version == chosen


def test_conda_keeps_headers_and_libraries_below_targets(tmp_path):
    folder = tmp_path / "targets" / "x86_64-linux" / "include"
    folder.mkdir(parents=True)
    assert build_op.cuda_folders(tmp_path, "include", "lib") == [folder]


@pytest.mark.parametrize(
    ("torch_cuda", "toolkit", "said"),
    [
        ("13.0", CUDA_13, ""),
        ("13.2", CUDA_13, ""),  # the minor versions may differ
        (None, CUDA_13, "torch is built without CUDA"),
        ("13.0", None, "no CUDA toolkit .* in /opt/cuda: install CUDA 13.0"),
        ("12.8", CUDA_13, "in /opt/cuda is 13.0, but torch is built for CUDA 12.8.*install CUDA 12.8 .* CUDA 13$"),
    ],
)
def test_fault_of_a_toolkit_comes_with_what_to_install(torch_cuda, toolkit, said):
    problem = build_op.toolkit_problem(torch_cuda, toolkit, [Path("/opt/cuda")])
    assert re.search(said or "^$", problem)


@pytest.mark.parametrize("toolkit", [None, Toolkit(Path("/opt/cuda"), "12.4")])
def test_pips_toolkit_is_told_of_where_pip_has_one(monkeypatch, toolkit):
    def said(platform, torch_cuda):
        monkeypatch.setattr(sys, "platform", platform)
        return build_op.toolkit_problem(torch_cuda, toolkit, [Path("/opt/cuda")])

    assert "; or with pip: python -m pip install 'nvidia-cuda-nvcc==13.0.*' 'nvidia-nvvm==13.0.*'" in said(
        "linux", "13.0"
    )
    assert "pip" not in said("darwin", "13.0") + said("linux", "11.8")


@pytest.mark.parametrize(
    ("force", "problem", "gpu_visible", "arch_list", "expected"),
    [
        ("", "", True, "", (True, "")),
        ("auto", "", True, "", (True, "")),
        ("", "", False, "8.0", (True, "")),
        ("1", "", False, "", (True, "")),
        ("0", "", True, "8.0", (False, "FORCE_CUDA is 0")),
        ("0", "broken", True, "8.0", (False, "FORCE_CUDA is 0")),
        ("", "broken", True, "8.0", (False, "broken")),
    ],
)
def test_cuda_is_built_where_it_is_of_use_and_possible(force, problem, gpu_visible, arch_list, expected):
    assert build_op.choose_cuda(force, problem, gpu_visible, arch_list) == expected


def test_without_a_gpu_cuda_takes_a_word():
    chosen, reason = build_op.choose_cuda("", "", gpu_visible=False, arch_list="")
    assert not chosen
    assert "no GPU is visible; FORCE_CUDA=1" in reason


def test_forcing_cuda_where_it_cannot_be_built_is_an_error():
    with pytest.raises(BuildError, match="FORCE_CUDA is 1, but the toolkit is broken"):
        build_op.choose_cuda("1", "the toolkit is broken", gpu_visible=True, arch_list="")


def test_an_nvcc_that_compiles_nothing_is_quoted(tmp_path):
    nvcc = script(tmp_path / "nvcc", 'echo "In file x:"; echo "error: unsupported GNU version!" >&2; exit 1')
    assert "cannot compile (error: unsupported GNU version!)" in build_op.nvcc_problem(nvcc)
    assert build_op.nvcc_problem(script(tmp_path / "nvcc", "exit 0")) == ""


# ------------------------------------------------------------------------------------------------ sources, options


def test_cuda_files_are_compiled_for_cuda_alone():
    cpu, both = build_op.sources(cuda=False), build_op.sources(cuda=True)
    assert "dimaskdino/layers/csrc/ms_deform_attn.cpp" in cpu
    assert not [name for name in cpu if "/cuda/" in name]
    added = both[len(cpu) :]
    assert both[: len(cpu)] == cpu
    assert {Path(name).suffix for name in added} == {".cpp", ".cu"}
    assert all("/cuda/" in name for name in added)


def test_a_toolkit_adds_its_headers_after_torchs_and_before_pips(tmp_path):
    toolkit = Toolkit(toolkit_folder(tmp_path / "cuda", "13.0"), "13.0")
    torch_folder, pip_headers = tmp_path / "site" / "torch", tmp_path / "site" / "nvidia" / "cu13" / "include"
    pip_headers.mkdir(parents=True)
    op = build_op.extension()
    build_op.complete(op, torch_folder, toolkit, sanitize=False)
    words = op.extra_compile_args["cxx"]
    folders = [words[i + 1] for i, word in enumerate(words) if word == "-isystem"]
    assert folders[0] == str(torch_folder / "include")
    assert folders[-2:] == [str(toolkit.home / "include"), str(pip_headers)]
    assert "torch_cuda" in op.libraries
    build_op.complete(op, torch_folder, None, sanitize=False)
    assert op.libraries == ["c10", "torch", "torch_cpu"]


def test_runtime_without_another_name_is_linked_by_full_name(tmp_path):
    assert build_op.cuda_runtime([tmp_path]) == "cudart"
    (tmp_path / "libcudart.so.13").touch()
    assert build_op.cuda_runtime([tmp_path]) == ":libcudart.so.13"
    (tmp_path / "libcudart.so").touch()
    assert build_op.cuda_runtime([tmp_path]) == "cudart"


def test_the_options_fit_every_processor_and_keep_ieee_arithmetic():
    options, _ = build_op.compile_arguments([], sanitize=False)
    for words in options.values():
        assert not [word for word in words if word.startswith(("-march", "-mtune", "-Ofast", "-ffast-math"))]


def test_sanitizers_stand_in_both_compiling_and_linking():
    options, link = build_op.compile_arguments([], sanitize=True)
    for words in (options["cxx"], link):
        assert any(word.startswith("-fsanitize=address,undefined") for word in words)


def test_interrupted_build_leaves_the_old_library(tmp_path, monkeypatch):
    command = build_op.PutInPlace(Distribution())
    built, target = tmp_path / "built.so", tmp_path / "_C.so"
    built.write_text("new")
    target.write_text("old")
    os.utime(built, (0, 0))

    def broken_off(source, part):
        Path(part).write_text("ne")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(build_op.shutil, "copy", broken_off)
        with pytest.raises(OSError, match="No space left"):
            command.copy_file(str(built), str(target))
    assert target.read_text() == "old"
    command.copy_file(str(built), str(target))
    assert target.read_text() == "new"
    assert target.stat().st_mtime > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_C.so", "built.so"]


def test_run_as_a_script_it_says_how_to_build(capsys):
    runpy.run_path(build_op.__file__, run_name="__main__")
    printed = capsys.readouterr().out
    assert "DIMASKDINO_BUILD_OP" in printed
    assert "pip install --no-build-isolation -e ." in printed
