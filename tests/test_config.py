"""Keys, files and errors of the configuration."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg

from dimaskdino import config as config_module
from dimaskdino.compat import NEWER_KEYS
from dimaskdino.config import IGNORED_KEYS, Config, _flatten, add_dimaskdino_config, get_cfg
from dimaskdino.errors import ConfigError, UserError
from tests.parity.releases import NAMES, release

ROOT = Path(__file__).parents[1]
# A file that is only ever a further base of others is not a configuration by itself.
CONFIG_FILES = sorted(file for file in (ROOT / "configs").rglob("*.yaml") if file.stem != "Base-BDD100K")


def write(folder: Path, text: str, name: str = "mine.yaml") -> str:
    file = folder / name
    file.write_text(text)
    return str(file)


def load(folder: Path, text: str) -> Config:
    cfg = get_cfg()
    cfg.merge_from_file(write(folder, text))
    return cfg


def plain(cfg: CfgNode) -> dict:
    """The values as YAML holds them: it knows no tuples."""
    return yaml.safe_load(cfg.dump())


def own_keys() -> dict:
    """The keys that this package adds to detectron2's."""
    theirs = dict(_flatten(get_detectron2_cfg()))
    return {key: value for key, value in _flatten(get_cfg()) if key not in theirs}


def test_defaults_of_detectron2_stay_as_they_are():
    ours = dict(_flatten(get_cfg()))
    for key, value in _flatten(get_detectron2_cfg()):
        assert ours[key] == value, key


def test_a_configuration_survives_a_file(tmp_path):
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            "MODEL.MaskDINO.DI.NUM_SELECTED",
            [600, 450, 300],
            "TEST.EVAL_LAYERS",
            ["all"],
            "MODEL.MaskDINO.BATO.GTG",
            False,
        ]
    )
    other = load(tmp_path, cfg.dump())
    assert plain(other) == plain(cfg)
    assert other.MODEL.MaskDINO == cfg.MODEL.MaskDINO


@pytest.mark.parametrize("name", NAMES)
def test_the_releases_resolved_settings_are_taken_and_survive_a_file(name, tmp_path):
    cfg = release(name).cfg()
    for key, value in release(name).config_values.items():
        if key in dict(_flatten(cfg)) and key not in ("MODEL.WEIGHTS", "MODEL.DEVICE"):
            ours = dict(_flatten(cfg))[key]
            assert list(ours) == list(value) if isinstance(value, list | tuple) else ours == value, key
    assert plain(load(tmp_path, cfg.dump())) == plain(cfg)


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as the tree that a file holds."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *parents, name = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


@pytest.mark.parametrize("name", NAMES)
def test_what_a_run_of_a_release_dumps_loads_as_a_file(name, tmp_path):
    # Everything that a newer detectron2 and the release write to config.yaml, keys without effect included.
    values = dict(_flatten(get_detectron2_cfg())) | NEWER_KEYS | release(name).config_values
    values |= {"MODEL.WEIGHTS": "", "MODEL.DEVICE": "cpu"}
    assert plain(load(tmp_path, yaml.safe_dump(nested(values)))) == plain(release(name).cfg())


@pytest.mark.parametrize("file", CONFIG_FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_configuration_of_ours_loads_and_survives_a_file(file, tmp_path):
    cfg = get_cfg()
    cfg.merge_from_file(str(file))
    assert cfg.MODEL.SEM_SEG_HEAD.NAME == "MaskDINOHead"
    assert plain(load(tmp_path, cfg.dump())) == plain(cfg)


def test_a_clone_is_independent_and_keeps_its_errors():
    cfg = get_cfg()
    clone = cfg.clone()
    clone.MODEL.MaskDINO.DEC_LAYERS = 3
    assert cfg.MODEL.MaskDINO.DEC_LAYERS == 6
    with pytest.raises(ConfigError):
        clone.merge_from_list(["MODEL.MaskDINO.DEC_LAYER", 3])


def test_keys_can_be_added_to_a_configuration_of_detectron2():
    cfg = get_detectron2_cfg()
    add_dimaskdino_config(cfg)
    assert isinstance(cfg, CfgNode)
    assert cfg.MODEL.MaskDINO.DI.ENABLED


def test_every_key_is_read_somewhere():
    # A key that nothing reads promises what does not happen.
    files = [*(ROOT / "dimaskdino").rglob("*.py"), *(ROOT / "tools").glob("*.py"), ROOT / "train_net.py"]
    source = "\n".join(path.read_text() for path in files if path.name != "config.py")
    # The keys of Swin are read as a whole.
    names = {key: key.rsplit(".", 1)[-1] for key in own_keys() if not key.startswith("MODEL.SWIN.")}
    assert len(names) > 60
    assert [key for key, name in names.items() if not re.search(rf"\.{name}\b", source)] == []


def test_ignored_keys_are_not_keys():
    assert not IGNORED_KEYS & set(dict(_flatten(get_cfg())))


def test_ignored_keys_are_accepted_dropped_and_reported_once(caplog):
    config_module._report_left_out.cache_clear()
    with caplog.at_level(logging.INFO, logger="dimaskdino"):
        for _ in range(2):
            cfg = get_cfg()
            cfg.merge_from_list(["MODEL.MaskDINO.PRE_NORM", True, "MODEL.MaskDINO.ENC_LAYERS", 3])
    reports = [record.getMessage() for record in caplog.records if "ignored" in record.getMessage()]
    assert len(reports) == 1
    assert "MODEL.MaskDINO.ENC_LAYERS, MODEL.MaskDINO.PRE_NORM" in reports[0]
    assert "PRE_NORM" not in cfg.MODEL.MaskDINO


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


def test_keys_of_a_newer_detectron2_are_accepted_at_what_the_older_one_does_and_reported_once(caplog):
    config_module._report_left_out.cache_clear()
    with caplog.at_level(logging.INFO, logger="dimaskdino"):
        for rescale in (False, "False"):  # from a file, from the command line
            cfg = cfg_of_detectron2_0_5()
            cfg.merge_from_list(["SOLVER.RESCALE_INTERVAL", rescale, "DATALOADER.REPEAT_SQRT", True])
            assert cfg == cfg_of_detectron2_0_5()
    (report,) = [record.getMessage() for record in caplog.records]
    assert "DATALOADER.REPEAT_SQRT, SOLVER.RESCALE_INTERVAL" in report


@pytest.mark.parametrize(("key", "value"), [("SOLVER.BASE_LR_END", 1e-6), ("SOLVER.RESCALE_INTERVAL", True)])
def test_a_value_that_only_a_newer_detectron2_follows_is_an_error_that_says_so(key, value):
    with pytest.raises(ConfigError, match=rf"Cannot set {re.escape(key)} to {value!r}: .* install a newer detectron2"):
        cfg_of_detectron2_0_5().merge_from_list([key, value])


@pytest.mark.parametrize(
    ("key", "closest"),
    [
        ("MODEL.MaskDINO.DEC_LAYER", "MODEL.MaskDINO.DEC_LAYERS"),
        ("MODEL.MASKDINO.NUM_OBJECT_QUERIES", "MODEL.MaskDINO.NUM_OBJECT_QUERIES"),
        ("MODEL.MaskDINO.DI.NUM_SELECT", "MODEL.MaskDINO.DI.NUM_SELECTED"),
        ("SOLVER.BASELR", "SOLVER.BASE_LR"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_closest_one(key, closest):
    with pytest.raises(ConfigError, match=re.escape(f"Unknown configuration key {key}. Did you mean {closest}?")):
        get_cfg().merge_from_list([key, 1])


def test_a_key_like_no_other_points_to_the_list_of_keys():
    with pytest.raises(ConfigError, match=r"Unknown configuration key QWXZ\. See dimaskdino/config\.py"):
        get_cfg().merge_from_list(["QWXZ", 1])


def test_a_part_of_the_tree_is_no_key():
    with pytest.raises(ConfigError, match=r"Unknown configuration key MODEL\.MaskDINO\."):
        get_cfg().merge_from_list(["MODEL.MaskDINO", "on"])


def test_errors_are_the_users_and_value_errors():
    assert issubclass(ConfigError, UserError)
    assert issubclass(ConfigError, ValueError)


def test_a_value_of_the_wrong_type_names_key_and_value():
    with pytest.raises(ConfigError, match=r"Cannot set MODEL\.MaskDINO\.DEC_LAYERS to 'six'"):
        get_cfg().merge_from_list(["MODEL.MaskDINO.DEC_LAYERS", "six"])


def test_a_key_without_value_is_named():
    with pytest.raises(ConfigError, match=r"KEY VALUE pairs, but 'SEED' stands alone"):
        get_cfg().merge_from_list(["SOLVER.BASE_LR", 1.0, "SEED"])


@pytest.mark.parametrize("options", [["SEED", "1", "--eval-only"], ["SEED", "1", "--import", "my_parts"]], ids=str)
def test_a_flag_after_the_keys_is_told_to_stand_before_them(options) -> None:
    with pytest.raises(ConfigError, match=rf"{options[2]} comes after KEY VALUE pairs; flags stand before them"):
        get_cfg().merge_from_list(options)


def test_values_of_the_command_line_are_read_as_literals():
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.MaskDINO.DI.NUM_SELECTED", "[600, 300]", "MODEL.MaskDINO.BATO.ENABLED", "False"])
    assert cfg.MODEL.MaskDINO.DI.NUM_SELECTED == [600, 300]
    assert cfg.MODEL.MaskDINO.BATO.ENABLED is False


def test_an_error_in_a_file_names_the_file_and_the_key(tmp_path):
    with pytest.raises(ConfigError, match=r"mine\.yaml: Unknown configuration key MODEL\.MaskDINO\.DEC_LAYER\."):
        load(tmp_path, "MODEL: {MaskDINO: {DEC_LAYER: 3}}")


def test_an_error_is_one_line(tmp_path):
    for text in ("MODEL: {MaskDINO: {DEC_LAYERS: six}}", "MODEL: [", "MODEL: {MaskDINO: {NOTHING: 3}}"):
        with pytest.raises(ConfigError) as error:
            load(tmp_path, text)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["2020-01-01", "!!set {a, b}"])
def test_a_value_of_a_type_that_configurations_do_not_have_names_the_file_and_the_key(tmp_path, value):
    with pytest.raises(ConfigError, match=r"mine\.yaml: Key SOLVER\.STEPS with value .* is not a valid type") as error:
        load(tmp_path, f"SOLVER: {{STEPS: {value}}}")
    assert "\n" not in str(error.value)


def test_bases_are_relative_to_their_file_and_overridden_by_it(tmp_path):
    (tmp_path / "base").mkdir()
    write(tmp_path / "base", "SEED: 1\nSOLVER: {MAX_ITER: 10, STEPS: [5]}", "base.yaml")
    write(tmp_path, "_BASE_: base/base.yaml\nSOLVER: {MAX_ITER: 20}", "middle.yaml")
    cfg = load(tmp_path, "_BASE_: middle.yaml\nSEED: 3")
    assert (cfg.SEED, cfg.SOLVER.MAX_ITER, tuple(cfg.SOLVER.STEPS)) == (3, 20, (5,))


def test_later_bases_override_earlier_ones(tmp_path):
    write(tmp_path, "SEED: 1\nSOLVER: {MAX_ITER: 10}", "one.yaml")
    write(tmp_path, "SEED: 2", "two.yaml")
    cfg = load(tmp_path, "_BASE_: [one.yaml, two.yaml]")
    assert (cfg.SEED, cfg.SOLVER.MAX_ITER) == (2, 10)


def test_a_base_that_leads_back_is_an_error(tmp_path):
    write(tmp_path, "_BASE_: mine.yaml", "other.yaml")
    with pytest.raises(ConfigError, match="_BASE_ leads back to this file"):
        load(tmp_path, "_BASE_: other.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("_BASE_: nowhere.yaml", "Cannot read the configuration .*nowhere.yaml"),
        ("MODEL: [", "Cannot read the configuration .*mine.yaml"),
        ("- MODEL", "a configuration is a mapping of keys, not a list"),
        ("just text", "a configuration is a mapping of keys, not a str"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match="Cannot read the configuration nowhere.yaml"):
        get_cfg().merge_from_file("nowhere.yaml")


def test_an_empty_file_changes_nothing(tmp_path):
    assert load(tmp_path, "") == get_cfg()


@pytest.mark.parametrize(
    "value",
    [
        '!!python/object/apply:os.system ["touch TARGET"]',
        '!!python/object/apply:os.mkdir ["TARGET"]',
        "!!python/name:os.system",
        "!!python/object/apply:eval [\"__import__('os').mkdir('TARGET')\"]",
        "!!python/object/apply:eval [\"[x for x in open('TARGET', 'w')]\"]",
        '!!python/object/apply:eval ["().__class__"]',
        '!!python/object/apply:eval ["10 ** 9"]',
        '!!python/object/apply:eval ["[0] * 10"]',
        '!!python/object/apply:eval ["[x for x in range(100000000)]"]',
    ],
)
def test_yaml_that_would_run_code_is_refused(tmp_path, value):
    # The releases load YAML with detectron2's unsafe loader.
    target = tmp_path / "made"
    with pytest.raises(ConfigError, match="Cannot read the configuration"):
        load(tmp_path, f"OUTPUT_DIR: {value.replace('TARGET', str(target))}")
    assert not target.exists()


def test_unsafe_yaml_cannot_be_asked_for(tmp_path):
    with pytest.raises(ConfigError, match="unsafe YAML is not supported"):
        get_cfg().merge_from_file(write(tmp_path, "SEED: 1"), allow_unsafe=True)


def test_the_arithmetic_lists_of_the_releases_are_computed_without_running_them(tmp_path):
    value = '!!python/object/apply:eval ["[int(x * 0.1 * 640) for x in range(5, 8)]"]'
    assert list(load(tmp_path, f"INPUT: {{MIN_SIZE_TRAIN: {value}}}").INPUT.MIN_SIZE_TRAIN) == [320, 384, 448]


def test_the_dump_is_plain_yaml():
    assert yaml.safe_load(get_cfg().dump())["MODEL"]["MaskDINO"]["DI"]["ENABLED"] is True
