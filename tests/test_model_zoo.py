"""Configurations by name, also from a wheel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dimaskdino import model_zoo
from dimaskdino.errors import ConfigError
from tests.documentation import REPOSITORY


def test_configuration_by_name() -> None:
    cfg = model_zoo.get_config("coco/dimaskdino_r50_12ep")
    assert cfg.MODEL.MaskDINO.TRANSFORMER_DECODER_NAME == "DIMaskDINODecoder"
    assert model_zoo.get_config_file("coco/maskdino_r50_12ep.yaml").is_file()
    names = model_zoo.config_names()
    assert {"coco/dimaskdino_r50_12ep", "ablation/coco/di_only", "dino/dino_r50_4scale_12ep"} <= set(names)
    assert not [name for name in names if "Base-" in name]


def test_unknown_name_gives_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"coco/dimaskdinno_r50_12ep.*coco/dimaskdino_r50_12ep"):
        model_zoo.get_config("coco/dimaskdinno_r50_12ep")


def test_build_copies_every_configuration(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    environment = {**os.environ, "DIMASKDINO_BUILD_OP": "0"}
    subprocess.run(command, cwd=REPOSITORY, check=True, env=environment, capture_output=True)
    built = {path.relative_to(tmp_path / "dimaskdino").as_posix() for path in tmp_path.rglob("*.yaml")}
    assert built == {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "configs").rglob("*.yaml")}
    assert (tmp_path / "dimaskdino" / "model_zoo.py").is_file()


def test_installation_without_configurations_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_zoo, "_FOLDERS", (tmp_path / "configs",))
    with pytest.raises(ConfigError, match="configs"):
        model_zoo.get_config("coco/dimaskdino_r50_12ep")
