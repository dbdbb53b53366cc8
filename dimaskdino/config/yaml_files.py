"""Reading YAML: plain values, what the releases' files hold beyond them, and errors that name file, line and key."""

import copy
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from iopath.common.file_io import g_pathmgr

from dimaskdino.errors import ConfigError

logger = logging.getLogger(__name__)

# Keys that nothing in the releases read: the decoder used its own default, or never built the part.
IGNORED_KEYS = frozenset(
    {
        "Default_loading",
        "DATASETS.TEST_PANOPTIC",
        "MODEL.RESNETS.RES4_DILATION",
        "MODEL.RESNETS.RES5_MULTI_GRID",
        "MODEL.RESNETS.STEM_TYPE",
        "MODEL.MaskDINO.ENC_LAYERS",
        "MODEL.MaskDINO.EVAL_FLAG",
        "MODEL.MaskDINO.PRED_CONV",
        "MODEL.MaskDINO.PRE_NORM",
        "MODEL.SEM_SEG_HEAD.ASPP_CHANNELS",
        "MODEL.SEM_SEG_HEAD.ASPP_DILATIONS",
        "MODEL.SEM_SEG_HEAD.ASPP_DROPOUT",
        "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS",
        "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS",
        "MODEL.SEM_SEG_HEAD.LOSS_TYPE",
        "MODEL.SEM_SEG_HEAD.NUM_FEATURE_LEVELS",
        "MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS",
        "MODEL.SEM_SEG_HEAD.PROJECT_FEATURES",
        "MODEL.SEM_SEG_HEAD.USE_DEPTHWISE_SEPARABLE_CONV",
    }
)

# The one Python expression in their files: training sizes from half to twice a length in pixels.
_SCALED_SIZES = re.compile(r"\[int\(x \* 0\.1 \* (\d{1,5})\) for x in range\((\d{1,3}), (\d{1,3})\)\]")
_BASE_KEY = "_BASE_"
_EVAL_TAG = "tag:yaml.org,2002:python/object/apply:eval"
# Far beyond any configuration, and read in seconds.
_MAX_BYTES = 10**6
_MAX_VALUES = 10**5
_MAX_DEPTH = 20
_TOO_DEEP = f"values are nested more than {_MAX_DEPTH} levels deep"
_MAX_DIGITS = 100
_MAX_FILES = 100


def read_yaml(path: str) -> dict[str, Any]:
    """Read a YAML file on top of the files that its ``_BASE_`` names.

    That is one path or a list, each relative to the file, absolute, or a URL that iopath knows; a later one overrides
    an earlier one.

    Raises:
        ConfigError: a file that is missing, is not a mapping, asks for code to run, or is too large or nested too
            deeply; bases that form a cycle, or too many of them. The message names the file.
    """
    merged: dict[str, Any] = {}
    for count, own in enumerate(_files(path, ()), start=1):
        if count > _MAX_FILES:
            raise ConfigError(f"{path}: _BASE_ leads to more than {_MAX_FILES} files; name each file once.")
        _merge(merged, own)
    return merged


def _files(path: str, readers: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield the contents of the files below ``path`` and of ``path`` itself, each after what it overrides."""
    file = path if "://" in path else os.path.realpath(path)
    if file in readers:
        raise ConfigError(f"{path}: _BASE_ leads back to this file ({' -> '.join([*readers, file])}).")
    if len(readers) >= _MAX_FILES:
        raise ConfigError(f"{readers[0]}: _BASE_ leads to more than {_MAX_FILES} files; name each file once.")
    own = _read(path)
    for base in _bases(own.pop(_BASE_KEY, []), path):
        base = os.path.expanduser(base)
        yield from _files(base if "://" in base else os.path.join(os.path.dirname(path), base), (*readers, file))
    yield own


def _read(path: str) -> dict[str, Any]:
    try:
        # A shell's `<(command)` is a pipe as well, but one that ends.
        if Path(path).is_fifo() and not path.startswith(("/dev/", "/proc/")):
            raise ValueError("it is a named pipe, not a file")
        with g_pathmgr.open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ValueError(f"a configuration has at most {_MAX_BYTES:,} bytes")
        own = _parse(content, path)
    except (OSError, ValueError, IndexError, yaml.YAMLError) as error:
        # PyYAML raises ValueError for a date that does not exist, and IndexError for a !!int without digits.
        raise ConfigError(f"Cannot read the configuration {path}: {' '.join(str(error).split())}.") from error
    own = {} if own is None else own
    if not isinstance(own, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys, not a {type(own).__name__}.")
    _check_keys(own, path, "")
    return own


def _parse(content: bytes, path: str) -> Any:
    depth = 0
    for event in yaml.parse(content, _Loader):  # without recursion, which must not exhaust the stack below
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
    loader = _Loader(content)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        _warn_of_repeated_keys(node, path)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_size(root: yaml.Node) -> None:
    """Bound what ``root`` expands to; aliases and merges can make a few lines endless."""
    pending, count = [(root, 0)], 0
    while pending:
        node, depth = pending.pop()
        count += 1
        if depth > _MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
        if count > _MAX_VALUES:
            raise ValueError(f"it expands to more than {_MAX_VALUES:,} values")
        if isinstance(node, yaml.MappingNode):
            pending += [(child, depth + 1) for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            pending += [(child, depth + 1) for child in node.value]
        elif node.tag.endswith((":int", ":float")) and len(node.value) > _MAX_DIGITS:
            raise ValueError(f"a number has more than {_MAX_DIGITS} characters")


def _warn_of_repeated_keys(node: yaml.Node, path: str) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                line = key.start_mark.line + 1
                logger.warning("%s, line %d: %s is repeated; its last value counts.", path, line, key.value)
            seen.add(key.value)
        _warn_of_repeated_keys(value, path)


def _check_keys(node: dict[Any, Any], path: str, prefix: str) -> None:
    for key, value in node.items():
        if not isinstance(key, str):
            raise ConfigError(
                f"{path}: keys are strings, but YAML reads {prefix}{key} as {key!r} ({type(key).__name__}); put it in "
                "quotes."
            )
        if isinstance(value, dict):
            _check_keys(value, path, f"{prefix}{key}.")


def _bases(given: Any, path: str) -> list[str]:
    bases = [given] if isinstance(given, str) else given
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        raise ConfigError(f"{path}: _BASE_ is {given!r}; it must be the path of a file, or a list of paths.")
    return bases


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)  # An alias would tie two keys together.


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML that also knows the releases' ``!!python/object/apply:eval``; read in C, in a quarter of the time."""


def _construct_sizes(loader: yaml.SafeLoader, node: yaml.Node) -> list[int]:
    """The sizes (px) of ``[int(x * 0.1 * 640) for x in range(5, 21)]``, with any numbers."""
    expression = ", ".join(map(str, loader.construct_sequence(node)))
    match = _SCALED_SIZES.fullmatch(expression)
    if match is None:
        known = f"only [int(x * 0.1 * SIZE) for x in range(FIRST, END)] is evaluated, not {expression:.80}"
        raise yaml.constructor.ConstructorError(None, None, known, node.start_mark)
    size, first, end = map(int, match.groups())
    return [int(x * 0.1 * size) for x in range(first, end)]


_Loader.add_constructor(_EVAL_TAG, _construct_sizes)
