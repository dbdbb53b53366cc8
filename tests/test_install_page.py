"""docs/install.md names every extra, build argument and make target there is; its Python runs."""

import ast
import re

from tests.documentation import REPOSITORY

PAGE = (REPOSITORY / "docs" / "install.md").read_text()


def extras() -> set[str]:
    tree = ast.parse((REPOSITORY / "setup.py").read_text())
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    call = next(each for each in calls if ast.unparse(each.func) == "setup")
    return set(ast.literal_eval(next(each.value for each in call.keywords if each.arg == "extras_require")))


def first_cells(heading: str) -> set[str]:
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)[1]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_extras_are_those_of_setup() -> None:
    assert first_cells("Extras") == extras()


def test_extras_that_code_and_pages_recommend_exist() -> None:
    files = [path for folder in ("dimaskdino", "tools", "docs") for path in (REPOSITORY / folder).rglob("*.[pm][yd]")]
    named = {name for path in files for name in re.findall(r"dimaskdino\[([a-z]\w+)\]", path.read_text())}
    assert "export" in named
    assert named <= extras()


def test_build_arguments_are_those_of_the_dockerfile() -> None:
    arguments = re.findall(r"^ARG (\w+)=", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE)
    assert first_cells("Docker") == {*arguments} - {"PIP_NO_CACHE_DIR"}


def test_make_targets_exist() -> None:
    rules = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([\w-]+)", PAGE))
    assert len(named) >= 5
    assert named <= rules


def test_python_runs(capsys) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "docs/install.md", "exec"), {"__name__": "install_page"})
    assert "coco/dimaskdino_r50_12ep" in capsys.readouterr().out
