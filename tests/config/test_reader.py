"""Keys, their defaults, and what is said about a key or value that cannot be used."""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg

from dimaskdino.compat import NEWER_KEYS
from dimaskdino.config import IGNORED_KEYS, KEYS, Config, add_dimaskdino_config, add_keys, flatten, get_cfg, reader
from dimaskdino.config.keys import MAY_BE_NO
from dimaskdino.errors import ConfigError, UserError
from tests import contract
from tests.parity.releases import NAMES, release

ROOT = Path(__file__).parents[2]
# A file that is only ever a further base of others is not a configuration by itself.
CONFIG_FILES = sorted(file for file in (ROOT / "configs").rglob("*.yaml") if file.stem != "Base-BDD100K")


def load(folder: Path, text: str) -> Config:
    (folder / "mine.yaml").write_text(text)
    cfg = get_cfg()
    cfg.merge_from_file(str(folder / "mine.yaml"))
    return cfg


def plain(cfg: CfgNode) -> dict:
    """The values with lists for tuples, which YAML does not have."""
    return json.loads(json.dumps(cfg))


def nested(values: dict[str, Any]) -> CfgNode:
    """Dotted keys as the tree that a file holds."""
    tree = CfgNode()
    add_keys(tree, values)
    return tree


def test_defaults_of_detectron2_stay() -> None:
    ours = dict(flatten(get_cfg()))
    for key, value in flatten(get_detectron2_cfg()):
        assert ours[key] == value, key


def test_keys_keep_their_defaults() -> None:
    current, recorded = contract.keys(), contract.recorded()["keys"]
    assert {key: current.get(key, "missing") for key in recorded} == recorded


def test_a_change_of_one_configuration_leaves_others() -> None:
    cfg = get_cfg()
    clone = cfg.clone()
    clone.MODEL.MaskDINO.DEC_LAYERS = 3
    clone.MODEL.SWIN.DEPTHS.append(2)
    assert (cfg.MODEL.MaskDINO.DEC_LAYERS, cfg.MODEL.SWIN.DEPTHS) == (6, [2, 2, 6, 2])
    cfg.MODEL.SWIN.DEPTHS.append(2)
    assert get_cfg().MODEL.SWIN.DEPTHS == [2, 2, 6, 2]
    with pytest.raises(ConfigError):
        clone.merge_from_list(["MODEL.MaskDINO.DEC_LAYER", 3])


def test_keys_extend_a_configuration_of_detectron2() -> None:
    cfg = get_detectron2_cfg()
    add_dimaskdino_config(cfg)
    assert cfg.MODEL.MaskDINO.DI.ENABLED


@pytest.mark.parametrize("key", ["SEED.MINE", "MODEL.MaskDINO", "MODEL"])
def test_a_key_cannot_be_a_node(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"Cannot add the key {key}:"):
        add_keys(get_cfg(), {key: 1})


def test_every_key_is_read_somewhere() -> None:
    # A key that nothing reads promises what does not happen.
    files = [*(ROOT / "dimaskdino").rglob("*.py"), *(ROOT / "tools").glob("*.py"), ROOT / "train_net.py"]
    source = "\n".join(path.read_text() for path in files if path.parent.name != "config")
    assert [key for key in KEYS if not re.search(rf"\.{key.rsplit('.', 1)[-1]}\b", source)] == []


@pytest.mark.parametrize("file", CONFIG_FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_configurations_survive_a_round_trip(file: Path, tmp_path: Path) -> None:
    cfg = get_cfg()
    cfg.merge_from_file(str(file))
    assert cfg != get_cfg()
    assert plain(load(tmp_path, cfg.dump())) == plain(cfg)


@pytest.mark.parametrize("name", NAMES)
def test_settings_of_the_releases_are_taken(name: str) -> None:
    cfg = dict(flatten(release(name).cfg()))
    values = {key: value for key, value in release(name).config_values.items() if key in cfg}
    values |= {"MODEL.WEIGHTS": "", "MODEL.DEVICE": "cpu"}
    assert yaml.safe_dump({key: cfg[key] for key in values}) == yaml.safe_dump(values)


@pytest.mark.parametrize("name", NAMES)
def test_dumps_of_the_releases_load(name: str, tmp_path: Path) -> None:
    # Everything that a newer detectron2 and the release write to config.yaml, keys without effect included.
    values = dict(flatten(get_detectron2_cfg())) | NEWER_KEYS | release(name).config_values
    values |= {"MODEL.WEIGHTS": "", "MODEL.DEVICE": "cpu"}
    assert plain(load(tmp_path, nested(values).dump())) == plain(release(name).cfg())


def test_ignored_keys_are_dropped_and_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    assert not IGNORED_KEYS & set(dict(flatten(get_cfg())))
    reader._report_ignored.cache_clear()
    with caplog.at_level(logging.INFO, logger="dimaskdino"):
        for _ in range(2):
            cfg = get_cfg()
            cfg.merge_from_list(["MODEL.MaskDINO.PRE_NORM", True, "MODEL.MaskDINO.ENC_LAYERS", 3])
    assert cfg == get_cfg()
    (report,) = [record.getMessage() for record in caplog.records]
    assert "MODEL.MaskDINO.ENC_LAYERS, MODEL.MaskDINO.PRE_NORM" in report


def cfg_of_detectron2_0_5() -> Config:
    """Our keys on top of those of the oldest detectron2 that we support, whichever is installed."""
    cfg = get_cfg()
    for key in NEWER_KEYS:
        *parents, name = key.split(".")
        node = cfg
        for parent in parents:
            node = node[parent]
        node.pop(name, None)
    return cfg


def test_keys_of_a_newer_detectron2_pass_at_their_defaults(caplog: pytest.LogCaptureFixture) -> None:
    reader._report_ignored.cache_clear()
    with caplog.at_level(logging.INFO, logger="dimaskdino"):
        for rescale in (False, "False"):  # from a file, from the command line
            cfg = cfg_of_detectron2_0_5()
            cfg.merge_from_list(["SOLVER.RESCALE_INTERVAL", rescale, "DATALOADER.REPEAT_SQRT", True])
            assert cfg == cfg_of_detectron2_0_5()
    (report,) = [record.getMessage() for record in caplog.records]
    assert "DATALOADER.REPEAT_SQRT, SOLVER.RESCALE_INTERVAL" in report


@pytest.mark.parametrize(("key", "value"), [("SOLVER.BASE_LR_END", 1e-6), ("SOLVER.RESCALE_INTERVAL", True)])
def test_other_values_of_newer_keys_are_errors(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{re.escape(key)} to {value!r}: .* install a newer detectron2"):
        cfg_of_detectron2_0_5().merge_from_list([key, value])


@pytest.mark.parametrize(
    ("key", "closest"),
    [
        ("MODEL.MaskDINO.DEC_LAYER", "MODEL.MaskDINO.DEC_LAYERS"),
        ("MODEL.MASKDINO.NUM_OBJECT_QUERIES", "MODEL.MaskDINO.NUM_OBJECT_QUERIES"),
        ("MODEL.MaskDINO.DI.NUM_SELECT", "MODEL.MaskDINO.DI.NUM_SELECTED"),
        ("SOLVER.BASELR", "SOLVER.BASE_LR"),
        ("QWXZ", "dimaskdino/config/keys.py"),
    ],
)
def test_unknown_keys_name_the_closest(key: str, closest: str) -> None:
    with pytest.raises(ConfigError, match=rf"{re.escape(key)}\..*{re.escape(closest)}"):
        get_cfg().merge_from_list([key, 1])


def test_a_node_is_not_a_key() -> None:
    with pytest.raises(ConfigError, match=r"Unknown configuration key MODEL\.MaskDINO\."):
        get_cfg().merge_from_list(["MODEL.MaskDINO", "on"])


def test_configuration_errors_are_user_errors() -> None:
    assert issubclass(ConfigError, UserError)
    assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["MODEL.MaskDINO.DEC_LAYERS", "six"], "MODEL.MaskDINO.DEC_LAYERS to 'six'"),
        (["SOLVER.STEPS", "[" * 2000 + "]" * 2000], "SOLVER.STEPS"),
        (["SOLVER.BASE_LR", 1.0, "SEED"], "'SEED' has no value"),
        (["SEED", "1", "--eval-only"], "--eval-only follows KEY VALUE pairs"),
        (["SEED", "1", "--import", "my_parts"], "--import follows KEY VALUE pairs"),
    ],
    ids=["type", "depth", "no value", "flag", "flag with value"],
)
def test_unusable_options_are_named(options: list[Any], named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        get_cfg().merge_from_list(options)


def test_option_values_are_literals() -> None:
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.MaskDINO.DI.NUM_SELECTED", "[600, 300]", "MODEL.MaskDINO.BATO.ENABLED", "False"])
    assert cfg.MODEL.MaskDINO.DI.NUM_SELECTED == [600, 300]
    assert cfg.MODEL.MaskDINO.BATO.ENABLED is False


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("MODEL: {MaskDINO: {DEC_LAYER: 3}}", "MODEL.MaskDINO.DEC_LAYER"),
        ("MODEL: {MaskDINO: {DEC_LAYERS: six}}", "MODEL.MaskDINO.DEC_LAYERS"),
        ("SOLVER: {STEPS: 2020-01-01}", "SOLVER.STEPS"),
        ("SOLVER: {STEPS: !!set {a, b}}", "SOLVER.STEPS"),
        ("SEED: !!python/object/apply:os.getpid []", "os.getpid"),
    ],
)
def test_errors_in_a_file_name_file_and_key(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"mine\.yaml: .*{re.escape(key)}\b") as error:
        load(tmp_path, text)
    assert "\n" not in str(error.value)


def test_unsafe_yaml_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.yaml: unsafe YAML"):
        get_cfg().merge_from_file(str(tmp_path / "a.yaml"), allow_unsafe=True)


@pytest.mark.parametrize("value", ["1", 1])
def test_whole_numbers_fit_keys_of_floats(value: Any) -> None:
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.BASE_LR", value])
    assert cfg.SOLVER.BASE_LR == 1.0
    assert isinstance(cfg.SOLVER.BASE_LR, float)
    with pytest.raises(ConfigError, match=r"SOLVER\.BASE_LR"):
        cfg.merge_from_list(["SOLVER.BASE_LR", "True"])


@pytest.mark.parametrize("key", MAY_BE_NO)
def test_unquoted_no_is_a_word_in_a_file(tmp_path: Path, key: str) -> None:
    top, node, name = key.split(".")
    cfg = load(tmp_path, f"{top}: {{{node}: {{{name}: no}}}}\nSOLVER: {{BASE_LR: 1, AMP: {{ENABLED: no}}}}")
    assert cfg[top][node][name] == "no"
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.AMP.ENABLED) == (1.0, False)
    with pytest.raises(ConfigError, match=re.escape(key)):
        load(tmp_path, f"{top}: {{{node}: {{{name}: yes}}}}")


def test_named_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match=r"pipe\.yaml: it is a named pipe"):
        get_cfg().merge_from_file(str(tmp_path / "pipe.yaml"))


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load(tmp_path, "") == get_cfg()
