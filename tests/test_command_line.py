"""Types and flags that the command lines share."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dimaskdino.command_line import add_import_flag, at_least, import_modules, names_of_runs
from dimaskdino.errors import ConfigError
from dimaskdino.modeling.registry import BATO_REGISTRY


@pytest.mark.parametrize(("text", "said"), [("-1", "-1 is too small; it must be at least 0"), ("1.5", "whole number")])
def test_bad_number_names_its_flag(text: str, said: str, capsys: pytest.CaptureFixture) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=at_least(0))
    assert parser.parse_args(["--workers", "0"]).workers == 0
    with pytest.raises(SystemExit):
        parser.parse_args(["--workers", text])
    error = capsys.readouterr().err
    assert "argument --workers: " in error
    assert said in error


def test_runs_are_told_apart_by_name(tmp_path: Path) -> None:
    for folder in ("lr_0.1", "run 5", "a/run", "b/run", "c/run", "lr_0.01"):
        (tmp_path / folder).mkdir(parents=True)
    runs = [tmp_path / name for name in ("lr_0.1", "run 5", "a/run", "b/run", "c/run", "lr_0.01", "small.safetensors")]
    assert names_of_runs(runs) == ["lr_0.1", "run 5", "run", "run 4", "run 6", "lr_0.01", "small"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder; what is imported from it is forgotten after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_modules_are_imported_in_order(here: Path) -> None:
    (here / "own_one.py").write_text("seen = []")
    (here / "own").mkdir()
    (here / "own" / "two.py").write_text("import own_one\nown_one.seen.append(__name__)")
    parser = argparse.ArgumentParser()
    add_import_flag(parser)
    assert parser.parse_args([]).modules == []
    import_modules(parser.parse_args(["--import", "own_one", "--import", "own.two"]).modules)
    assert sys.modules["own_one"].seen == ["own.two"]


@pytest.mark.parametrize("name", ["own_absent", "own_one.absent", "own.absent"])
def test_absent_module_is_named_with_the_folder(name: str, here: Path) -> None:
    (here / "own_one.py").touch()
    (here / "own").mkdir()
    with pytest.raises(ConfigError) as error:
        import_modules([name])
    assert f"--import {name}: there is no module {name}" in str(error.value)
    assert f"current folder {here}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("own_one.py", "--import own_one."),
        ("./own/one.py", "--import own.one."),
        ("own/one", "my.parts"),
        (".one", "my.parts"),
        ("", "my.parts"),
        ("own-one", "my.parts"),
    ],
)
def test_path_is_refused_with_the_name(name: str, remedy: str, here: Path) -> None:
    (here / "own_one.py").touch()
    with pytest.raises(ConfigError) as error:
        import_modules([name])
    assert f"--import {name} is not the name of a module" in str(error.value)
    assert remedy in str(error.value)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("import own_absent", ModuleNotFoundError),
        ("from argparse import absent", ImportError),
        ("open('own_absent')", FileNotFoundError),
        ("1 / 0", ZeroDivisionError),
        ("def f(:", SyntaxError),
        ("raise UserWarning", UserWarning),
        ("import sys; sys.exit(0)", SystemExit),
    ],
)
def test_error_inside_a_module_names_its_line(text: str, error: type[BaseException], here: Path) -> None:
    (here / "own_wrong.py").write_text(f"\n\n{text}")
    with pytest.raises(ConfigError) as raised:
        import_modules(["own_wrong"])
    assert isinstance(raised.value.__cause__, error)
    for part in ("--import own_wrong", f"{here / 'own_wrong.py'}, line 3", error.__name__):
        assert part in str(raised.value)


def test_name_registered_twice_names_the_line(here: Path) -> None:
    text = "from dimaskdino.modeling.registry import BATO_REGISTRY\n\nBATO_REGISTRY.register(type('Bato', (), {}))\n"
    (here / "own_twice.py").write_text(text + "BATO_REGISTRY.register(type('Bato', (), {}))\n")
    try:
        with pytest.raises(ConfigError, match=r"own_twice\.py, line 4.*Bato"):
            import_modules(["own_twice"])
    finally:
        del BATO_REGISTRY._obj_map["Bato"]
