"""The sdist and the wheel that `make package` builds hold what they should, and work in a fresh environment."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.documentation import REPOSITORY, copy_repository

pytestmark = [pytest.mark.slow, pytest.mark.package]
DIST = REPOSITORY / "build" / "dist"
WITHOUT_OP = {**os.environ, "DIMASKDINO_BUILD_OP": "0"}
PREDICT = """
from pathlib import Path
import numpy
import dimaskdino
from dimaskdino import Predictor, model_zoo
from dimaskdino.layers.ms_deform_attn_ops import MISSING
assert Path(dimaskdino.__file__).is_relative_to({environment!r}), dimaskdino.__file__
cfg = model_zoo.get_config("coco/dimaskdino_r50_12ep")
assert cfg.MODEL.MaskDINO.TRANSFORMER_DECODER_NAME == "DIMaskDINODecoder"
predict = Predictor(model_zoo.get_config_file("demo/dimaskdino_shapes"), {weights!r}, device="cpu")
image = numpy.full((128, 128, 3), 90, numpy.uint8)
image[40:80, 30:90] = (220, 40, 40)
assert len(predict(image).instances) > 0
print("op:", MISSING or "compiled")
"""


def run(*command: str | Path, cwd: Path = REPOSITORY, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def only(pattern: str, folder: Path = DIST) -> Path:
    (path,) = folder.glob(pattern)
    return path


def tree(folder: str, *suffixes: str) -> set[str]:
    files = (path for path in (REPOSITORY / folder).rglob("*") if path.suffix in suffixes)
    return {path.relative_to(REPOSITORY).as_posix() for path in files}


def package() -> set[str]:
    """What an installation needs beside the compiled op."""
    configs = {f"dimaskdino/{name}" for name in tree("configs", ".yaml")}
    return tree("dimaskdino", ".py") | tree("dimaskdino/reproduction", ".json") | configs


def wheel_content(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment that sees the packages of this one, but not its dimaskdino."""
    folder = tmp_path_factory.mktemp("fresh") / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    site_packages = only("lib/python*/site-packages", folder)
    (site_packages / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def install(environment: Path, *what: str | Path, env: dict[str, str] | None = None) -> str:
    pip = (sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "install", "-v", "--no-deps")
    return run(*pip, "--force-reinstall", *what, env=env)


def predict(environment: Path) -> str:
    code = PREDICT.format(environment=str(environment), weights=str(REPOSITORY / "tools" / "demo_model.pth"))
    plain = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return run(environment / "bin" / "python", "-c", code, cwd=environment, env=plain)


def test_sdist_has_all_that_a_wheel_is_built_of() -> None:
    with tarfile.open(only("*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "dimaskdino/layers/csrc").rglob("*.*")}
    others = {"setup.py", "pyproject.toml", "README.md", "LICENSE", "tools/build_op.py"}
    assert tree("dimaskdino", ".py", ".json") | tree("configs", ".yaml") | sources | others <= names
    assert not [name for name in names if name.startswith(("tests/", "docs/")) or name.endswith((".so", ".pth"))]


def test_wheel_has_the_package_its_configurations_and_the_op_alone() -> None:
    assert wheel_content(only("*.whl")) == package() | {"dimaskdino/_C.abi3.so"}


def test_sdist_builds_the_same_wheel(tmp_path: Path) -> None:
    build = (sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", tmp_path)
    output = run(*build, only("*.tar.gz"), env=WITHOUT_OP)
    assert "not built, because DIMASKDINO_BUILD_OP is 0" in output
    assert wheel_content(only("*-none-any.whl", tmp_path)) == package()


def test_wheel_works_in_a_fresh_environment(environment: Path) -> None:
    install(environment, "--no-index", only("*.whl"))
    assert "op: compiled" in predict(environment)


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="this copy of the repository has no history")
def test_git_address_installs(environment: Path, tmp_path: Path) -> None:
    # Not this history itself, because pip's partial clone of a shallow one, as CI has it, does not end.
    clone = tmp_path / "clone"
    copy_repository(clone)
    run("git", "init", "-q", cwd=clone)
    run("git", "add", "--all", cwd=clone)
    run("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-q", "-m", "All", cwd=clone)
    output = install(environment, f"git+file://{clone}", env=WITHOUT_OP)
    assert "not built, because DIMASKDINO_BUILD_OP is 0" in output
    assert "op: dimaskdino was installed without its compiled op" in predict(environment)
