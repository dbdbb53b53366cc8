"""ThreadSanitizer on the emulation of CUDA: `make sanitize` relies on it to find races of the kernels."""

import os
import shutil
import subprocess

import pytest

from tests.layers.cuda_emulation import build_program

COMPILER = shutil.which("g++")
RACE = 66  # ThreadSanitizer's exit status


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("the emulation is compiled by g++")
    return build_program(tmp_path_factory.mktemp("races"), COMPILER, ["-O1", "-g", "-fsanitize=thread"], "races.cu")


def run(program, *arguments):
    options = os.environ | {"TSAN_OPTIONS": f"exitcode={RACE}"}
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, env=options)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this ThreadSanitizer does not know this kernel's memory layout; setarch -R runs it")
    return done


@pytest.mark.parametrize("kernel", ["warp", "block", "again", "blocks"])
def test_a_race_is_found_and_what_is_ordered_passes(program, kernel):
    done = run(program, kernel, "ordered")
    assert done.returncode == 0, done.stderr
    done = run(program, kernel, "racing")
    assert done.returncode == RACE, done.stderr
    assert "ThreadSanitizer: data race" in done.stderr
