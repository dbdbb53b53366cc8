"""Configuration keys that a module of a user's own registers."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dimaskdino.command_line import import_modules
from dimaskdino.config import get_cfg, own_keys, register_keys, report_unused_keys
from dimaskdino.config.reader import _REGISTERED
from dimaskdino.errors import ConfigError

MODULE = """
from dimaskdino.config import register_keys

register_keys({"MODEL.OWN_HEAD.WIDTHS": [8, 16], "MODEL.MaskDINO.OWN_WEIGHT": 1.5, "OWN": ""})
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of modules; their keys are forgotten after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    registered, modules = dict(_REGISTERED), set(sys.modules)
    yield tmp_path
    _REGISTERED.clear()
    _REGISTERED.update(registered)
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def test_registered_keys_are_read_and_written(here: Path) -> None:
    (here / "own_keys_module.py").write_text(MODULE)
    import_modules(["own_keys_module"])
    cfg = get_cfg()
    assert cfg.MODEL.OWN_HEAD.WIDTHS == [8, 16]
    cfg.MODEL.OWN_HEAD.WIDTHS.append(32)
    cfg.merge_from_list(["MODEL.MaskDINO.OWN_WEIGHT", "2.5"])
    (here / "config.yaml").write_text(cfg.dump())
    again = get_cfg()
    assert again.MODEL.OWN_HEAD.WIDTHS == [8, 16]  # a default of its own for each configuration
    again.merge_from_file(str(here / "config.yaml"))
    assert (again.MODEL.OWN_HEAD.WIDTHS, again.MODEL.MaskDINO.OWN_WEIGHT) == ([8, 16, 32], 2.5)


def test_misspelled_own_key_names_the_closest(here: Path) -> None:
    (here / "own_keys_module.py").write_text(MODULE)
    import_modules(["own_keys_module"])
    with pytest.raises(ConfigError, match=r"MODEL\.OWN_HEAD\.WITHS.*MODEL\.OWN_HEAD\.WIDTHS"):
        get_cfg().merge_from_list(["MODEL.OWN_HEAD.WITHS", "[1]"])


@pytest.mark.parametrize(
    ("key", "owner"),
    [("SOLVER.BASE_LR", "detectron2"), ("MODEL.MaskDINO.DN_NUM", "dimaskdino"), ("OWN.ONE", "the_other")],
)
def test_existing_key_names_module_and_key(key: str, owner: str, here: Path) -> None:
    (here / "the_other.py").write_text("from dimaskdino.config import register_keys\nregister_keys({'OWN.ONE': 1})")
    (here / "the_own.py").write_text(f"from dimaskdino.config import register_keys\nregister_keys({{{key!r}: 1}})")
    before = own_keys()
    with pytest.raises(ConfigError) as error:
        import_modules(["the_other", "the_own"])
    assert own_keys() == before | {"OWN.ONE": 1}
    for part in ("--import the_own", "the_own.py, line 2", key, owner):
        assert part in str(error.value)


@pytest.mark.parametrize("key", ["SOLVER", "SOLVER.BASE_LR.OWN"])
def test_key_that_breaks_the_tree_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"test_own_keys.*{key}"):
        register_keys({key: 1})
    assert key not in own_keys()


@pytest.mark.parametrize(
    ("key", "default"), [("MODEL..OWN", 1), ("SOLVER.MY OWN", 1), ("SOLVER.OWN", object()), ("SOLVER.OWN", {"A": 1})]
)
def test_key_that_no_file_can_hold_is_refused(key: str, default: object) -> None:
    with pytest.raises(ConfigError, match=f"test_own_keys.*{key}"):
        register_keys({key: default})
    assert key not in own_keys()
    register_keys({"SOLVER.OWN_LIST": [{"pattern": "*", "lr_factor": 0.1}, (1, None)]})


def test_file_names_the_modules_that_it_needs(here: Path) -> None:
    config = here / "config.yaml"
    config.write_text("IMPORTS: [not_imported, sys]\nMODEL: {NOT_THERE: {WIDTH: 3}}\n")
    with pytest.raises(ConfigError) as error:
        get_cfg().merge_from_file(str(config))
    assert "MODEL.NOT_THERE.WIDTH" in str(error.value)
    assert "--import not_imported;" in str(error.value)


def test_own_key_below_an_unread_node_is_not_called_unused(caplog: pytest.LogCaptureFixture) -> None:
    register_keys({"MODEL.RPN.OWN": 1})
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.RPN.OWN", 2, "MODEL.RPN.NMS_THRESH", 0.1])
    report_unused_keys(cfg)
    assert "MODEL.RPN.NMS_THRESH" in caplog.text
    assert "MODEL.RPN.OWN" not in caplog.text
