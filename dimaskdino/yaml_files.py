"""Configuration files: safe YAML, ``_BASE_`` files, and the arithmetic of the releases' lists, without running code."""

import ast
import operator
import os
from collections.abc import Callable, Mapping
from typing import Any

import yaml
from iopath.common.file_io import g_pathmgr

from dimaskdino.errors import ConfigError

_BASE_KEY = "_BASE_"
_EVAL_TAG = "tag:yaml.org,2002:python/object/apply:eval"
_LARGEST = 10**6
_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"int": int, "float": float, "round": round, "range": range}


def read_yaml(path: str) -> dict[str, Any]:
    """Read a YAML file and, below its own values, the files that its ``_BASE_`` names.

    Args:
        path: of the file; ``_BASE_`` (one path or a list) is relative to it, absolute, or a URL that iopath knows.

    Returns:
        The merged tree of plain values.

    Raises:
        ConfigError: for a file that is missing, is not a mapping or needs code to be run; names the file.
    """
    return _read(path, ())


def _read(path: str, readers: tuple[str, ...]) -> dict[str, Any]:
    if path in readers:
        raise ConfigError(f"{path}: _BASE_ leads back to this file ({' -> '.join([*readers, path])}).")
    try:
        with g_pathmgr.open(path) as file:
            own = yaml.load(file, Loader=_ArithmeticLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"Cannot read the configuration {path}: it is no text in UTF-8 ({error}).") from error
    except (OSError, yaml.YAMLError, ValueError) as error:
        # A ValueError is a date that no calendar has.
        raise ConfigError(f"Cannot read the configuration {path}: {' '.join(str(error).split())}") from error
    own = {} if own is None else own
    if not isinstance(own, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys, not a {type(own).__name__}.")
    _check_keys(own, path, "")
    merged: dict[str, Any] = {}
    for base in _bases(own.pop(_BASE_KEY, []), path):
        _merge(merged, _read(_resolve(base, path), (*readers, path)))
    _merge(merged, own)
    return merged


def _check_keys(node: dict[Any, Any], path: str, prefix: str) -> None:
    for key, value in node.items():
        if not isinstance(key, str):
            raise ConfigError(
                f"{path}: {prefix}{key} is no key: keys are text, and YAML reads {key!r} ({type(key).__name__}) here."
            )
        if isinstance(value, dict):
            _check_keys(value, path, f"{prefix}{key}.")


def _bases(given: Any, path: str) -> list[str]:
    bases = [given] if isinstance(given, str) else given
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        raise ConfigError(f"{path}: _BASE_ is {given!r}; it must be the path of a file, or a list of such paths.")
    return bases


def _resolve(base: str, path: str) -> str:
    base = os.path.expanduser(base)
    if "://" in base or os.path.isabs(base):
        return base
    return os.path.join(os.path.dirname(path), base)


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


class _ArithmeticLoader(yaml.SafeLoader):
    """Safe YAML that also reads ``!!python/object/apply:eval ["[int(x * 0.1 * 640) for x in range(5, 21)]"]``.

    The releases' semantic configurations hold such lists. The expression is computed by :func:`_evaluate`, which knows
    numbers, lists, ranges and arithmetic alone.
    """


def _construct_arithmetic(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    if not isinstance(node, yaml.SequenceNode):
        raise yaml.constructor.ConstructorError(
            None, None, "!!python/object/apply:eval takes a list of one expression", node.start_mark
        )
    arguments = loader.construct_sequence(node)
    try:
        (expression,) = arguments
        return _evaluate(ast.parse(expression, mode="eval").body, {})
    except (ValueError, TypeError, SyntaxError, ArithmeticError) as error:
        raise yaml.constructor.ConstructorError(
            None, None, f"only plain arithmetic on lists is evaluated, not {arguments!r} ({error})", node.start_mark
        ) from error


_ArithmeticLoader.add_constructor(_EVAL_TAG, _construct_arithmetic)


def _evaluate(node: ast.AST, names: Mapping[str, Any]) -> Any:
    """Compute an expression of numbers, lists, comprehensions, ranges and arithmetic.

    Raises:
        ValueError: for anything else, and for numbers or lists beyond a million.
    """
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.List):
        return [_evaluate(element, names) for element in node.elts]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _evaluate(node.left, names), _evaluate(node.right, names)
        if not (isinstance(left, int | float) and isinstance(right, int | float)):
            raise ValueError("arithmetic on something else than numbers")
        return _bounded(_OPERATORS[type(node.op)](left, right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _bounded(_OPERATORS[type(node.op)](_evaluate(node.operand, names)))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        function = _FUNCTIONS.get(node.func.id)
        if function is not None:
            return _bounded(function(*[_evaluate(argument, names) for argument in node.args]))
    if isinstance(node, ast.ListComp):
        return _evaluate_comprehension(node, names)
    raise ValueError(f"unsupported: {ast.unparse(node)}")


def _evaluate_comprehension(node: ast.ListComp, names: Mapping[str, Any]) -> list[Any]:
    (loop,) = node.generators
    if loop.ifs or not isinstance(loop.target, ast.Name):
        raise ValueError("conditions in a comprehension")
    values = _evaluate(loop.iter, names)
    return [_evaluate(node.elt, {**names, loop.target.id: value}) for value in values]


def _bounded(value: Any) -> Any:
    size = len(value) if isinstance(value, range | list) else abs(value)
    if size > _LARGEST:
        raise ValueError("a number or list beyond a million")
    return value
