"""Every example of docs/extend.md runs."""

import argparse
import re
import shlex
from collections.abc import Iterator

import pytest
import yaml

import dimaskdino.data.augmentations
import dimaskdino.data.readers
from dimaskdino.config import get_cfg
from dimaskdino.config.reader import _REGISTERED
from dimaskdino.data.augmentations import copy_paste, own_augmentations
from dimaskdino.engine import HOOK_REGISTRY, argument_parser
from dimaskdino.evaluation import EVALUATOR_REGISTRY
from dimaskdino.modeling.registry import BATO_REGISTRY
from tests.documentation import REPOSITORY

PAGE = (REPOSITORY / "docs" / "extend.md").read_text()
REGISTRIES = [
    *(BATO_REGISTRY, EVALUATOR_REGISTRY, HOOK_REGISTRY),
    *(dimaskdino.data.readers.READER_REGISTRY, dimaskdino.data.augmentations.AUGMENTATION_REGISTRY),
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What an example registers is forgotten after the test."""
    before, keys = [dict(each._obj_map) for each in REGISTRIES], dict(_REGISTERED)
    yield
    for registry, content in zip(REGISTRIES, before, strict=True):
        registry._obj_map = content
    _REGISTERED.clear()
    _REGISTERED.update(keys)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.partition("\n")[0])
def test_python_runs(code: str) -> None:
    exec(compile(code, "docs/extend.md", "exec"), {"__name__": "extend_page"})


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_is_a_configuration(text: str) -> None:
    cfg = get_cfg()
    cfg.INPUT.AUGMENTATIONS = yaml.safe_load(text)["INPUT"]["AUGMENTATIONS"]
    assert len(own_augmentations(cfg)) == 10  # Color gives three, LargeScaleJitter two; CopyPaste comes by itself
    assert copy_paste(cfg).prob == 0.3


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    return [words[words.index("python") + 1 :] for line in lines if "python" in (words := shlex.split(line))]


@pytest.mark.parametrize(
    "words", [each for each in commands() if each[0] == "train_net.py"], ids=lambda words: words[4]
)
def test_keys_of_commands_exist(words: list[str]) -> None:
    args = argument_parser().parse_args(words[1:])
    cfg = get_cfg()
    cfg.merge_from_file(str(REPOSITORY / args.config_file))
    cfg.merge_from_list(args.opts)


def test_flags_of_tools_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    import check_dataset
    import convert_dataset
    import tile_dataset

    modules = (check_dataset, convert_dataset, tile_dataset)
    tools = {f"tools/{module.__name__}.py": module for module in modules}
    for script, *arguments in [each for each in commands() if each[0] in tools]:
        monkeypatch.setattr("sys.argv", [script, *arguments])
        assert isinstance(tools[script].parse_args(), argparse.Namespace)


def test_keys_of_tables_exist() -> None:
    cfg = get_cfg()
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    named = [key for row in rows for key in re.findall(r"`([A-Z]+(?:\.[A-Za-z_]+)+)", row)]
    assert len(named) >= 9
    for key in named:
        node = cfg
        for part in key.split("."):
            assert part in node, key
            node = node[part]
