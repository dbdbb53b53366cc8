"""The detectron2 installer, offline: which source it chooses, and what it says when something is missing."""

from pathlib import Path

import install_detectron2 as installer
import pytest
from detectron2_wheel import SDIST_SHA256
from install_detectron2 import InstallError


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: str) -> None:
        raise AssertionError(f"pip was called: {arguments}")

    monkeypatch.setattr(installer, "pip", refuse)


def test_wrong_hash_is_an_error_before_anything_is_installed(tmp_path, no_pip, monkeypatch, capfd):
    sdist = tmp_path / "detectron2_cdo-0.5.tar.gz"
    sdist.write_bytes(b"another file")
    monkeypatch.setattr(installer, "installed_version", lambda: None)
    assert installer.main(["--source", "index", "--sdist", str(sdist)]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: detectron2_cdo-0.5.tar.gz has sha256 ")
    assert SDIST_SHA256 in error
    assert error.count("\n") == 1


def test_missing_sdist_file_is_one_line(no_pip, monkeypatch, capfd):
    monkeypatch.setattr(installer, "installed_version", lambda: None)
    assert installer.main(["--source", "index", "--sdist", "no/such/file.tar.gz"]) == 2
    assert "no/such/file.tar.gz" in capfd.readouterr().err


def test_missing_torch_is_one_line(no_pip, monkeypatch, capfd):
    monkeypatch.setattr(installer.importlib.util, "find_spec", lambda name: None)
    assert installer.main([]) == 2
    assert capfd.readouterr().err.startswith("error: torch is not installed in ")


def test_auto_keeps_a_detectron2_that_can_be_imported(no_pip: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert installer.main([]) == 0
    output = capfd.readouterr().out
    assert output.startswith("detectron2: keeping ")
    assert output.count("\n") == 1


def test_auto_takes_the_index_and_says_why(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    chosen: list[Path | None] = []
    monkeypatch.setattr(installer, "importable_detectron2", lambda: None)
    monkeypatch.setattr(installer, "UPSTREAM_URL", "file:///no/such/repository.git")
    monkeypatch.setattr(installer, "install_index", chosen.append)
    assert installer.main(["--sdist", "given.tar.gz"]) == 0
    assert chosen == [Path("given.tar.gz")]
    output = capfd.readouterr().out
    assert "taking the index, because official: cannot reach file:///no/such/repository.git" in output
    assert output.count("\n") == 1


def test_official_out_of_reach_is_one_line_and_no_fallback(no_pip, monkeypatch, capfd):
    monkeypatch.setattr(installer, "UPSTREAM_URL", "file:///no/such/repository.git")
    monkeypatch.setattr(installer, "installed_commit", lambda: None)
    assert installer.main(["--source", "official"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: official: cannot reach file:///no/such/repository.git (")
    assert error.count("\n") == 1


def test_official_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InstallError, match="'no-such-compiler' is missing"):
        installer.check_official_possible()
