"""Configuration files are read in bounded time and without running code."""

import time
from pathlib import Path

import pytest

from dimaskdino.config import read_yaml
from dimaskdino.errors import ConfigError


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def error_of(path: str) -> str:
    """The message of the error that reading ``path`` raises: one line, soon."""
    started = time.monotonic()
    with pytest.raises(ConfigError) as error:
        read_yaml(path)
    assert time.monotonic() - started < 10
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 2000
    return str(error.value)


def test_later_bases_override_earlier_ones_and_the_file_overrides_all(tmp_path: Path) -> None:
    write(tmp_path / "one.yaml", "A: {X: 1, Y: 1, Z: 1}\n")
    write(tmp_path / "deep" / "two.yaml", "_BASE_: ../one.yaml\nA: {Y: 2}\n")
    write(tmp_path / "three.yaml", "A: {Z: 3}\nB: [1, 2]\n")
    path = write(tmp_path / "own.yaml", "_BASE_: [deep/two.yaml, three.yaml]\nB: [4]\n")
    assert read_yaml(path) == {"A": {"X": 1, "Y": 2, "Z": 3}, "B": [4]}


def test_overriding_an_aliased_value_leaves_its_other_uses(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "A: &a {X: 1}\nB: *a\n")
    assert read_yaml(write(tmp_path / "own.yaml", "_BASE_: base.yaml\nA: {X: 2}\n")) == {"A": {"X": 2}, "B": {"X": 1}}


@pytest.mark.parametrize("base", ["a.yaml", "./a.yaml", "../{folder}/a.yaml", "link.yaml", "b.yaml"])
def test_base_cycles_are_errors(tmp_path: Path, base: str) -> None:
    path = write(tmp_path / "a.yaml", f"_BASE_: {base.format(folder=tmp_path.name)}\n")
    write(tmp_path / "b.yaml", "_BASE_: ./a.yaml\n")
    (tmp_path / "link.yaml").symlink_to(path)
    message = error_of(path)
    assert "_BASE_ leads back to this file" in message
    assert path in message


@pytest.mark.parametrize("copies", [1, 2])
def test_long_chains_and_doubling_bases_are_errors(tmp_path: Path, copies: int) -> None:
    for number in range(200):
        write(tmp_path / f"{number}.yaml", f"_BASE_: [{', '.join([f'{number + 1}.yaml'] * copies)}]\n")
    write(tmp_path / "200.yaml", "SEED: 1\n")
    assert "0.yaml: _BASE_ leads to more than 100 files" in error_of(str(tmp_path / "0.yaml"))


def growing(form: str, first: str) -> str:
    """Ten values, each of which holds the one before it ten times."""
    lines = [f"x{i}: &x{i} {form.format(', '.join([f'*x{i - 1}'] * 10))}\n" for i in range(1, 10)]
    return "".join([f"x0: &x0 {first}\n", *lines])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("A: &a {B: *a}", "nested"),
        ("A: &a [*a]", "nested"),
        (f"A: {'[' * 3000}", "nested more than 20 levels"),
        ("- " * 400_000, "nested more than 20 levels"),
        ("{a: " * 200_000, "nested more than 20 levels"),
        ("{a: " * 100 + "1" + "}" * 100, "nested more than 20 levels"),
        (growing("[{}]", "1"), "expands"),
        (growing("{{<<: [{}]}}", "{k: 1}"), "expands"),
        (f"A: [{'1, ' * 400_000}]", "at most 1,000,000 bytes"),
        (f"A: {'1:' * 400_000}1", "a number has more than 100 characters"),
    ],
    ids=[
        "recursive mapping",
        "recursive list",
        "3000 lists",
        "400,000 lists",
        "200,000 mappings",
        "100 mappings",
        "aliases",
        "merges",
        "size",
        "base-60 number",
    ],
)
def test_endless_yaml_ends_soon(tmp_path: Path, text: str, reason: str) -> None:
    message = error_of(write(tmp_path / "bad.yaml", text))
    assert "bad.yaml" in message
    assert reason in message


@pytest.mark.parametrize("size", [512, 640, 1024])
def test_the_releases_training_sizes_are_computed(tmp_path: Path, size: int) -> None:
    expression = f"[int(x * 0.1 * {size}) for x in range(5, 21)]"
    path = write(tmp_path / "c.yaml", f'SIZES: !!python/object/apply:eval ["{expression}"]\n')
    assert read_yaml(path) == {"SIZES": [int(x * 0.1 * size) for x in range(5, 21)]}


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:eval [\"__import__('pathlib').Path('{marker}').touch()\"]",
        "!!python/object/apply:eval [\"open('{marker}', 'w')\"]",
        '!!python/object/apply:eval ["().__class__"]',
        '!!python/object/apply:eval ["[0] * 1000000"]',
        '!!python/object/apply:eval ["[int(x * 0.1 * 640) for x in range(5, 21) for y in range(9)]"]',
        '!!python/object/apply:eval "1 + 1"',
        "!!python/object/apply:eval {A: 1}",
        "!!python/object/apply:eval [[1], 2]",
        "!!python/object/apply:eval [[1]]",
        "!!python/object/apply:os.mkdir ['{marker}']",
        "!!python/name:os.system",
    ],
)
def test_code_is_refused_and_does_not_run(tmp_path: Path, value: str) -> None:
    marker = tmp_path / "ran"
    path = write(tmp_path / "evil.yaml", f"KEY: {value.replace('{marker}', str(marker))}\n")
    assert "evil.yaml" in error_of(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"- 1\n",
        b"just text\n",
        b"A: [1\n",
        b"PK\x03\x04\x9a\xff",
        "WEIGHTS: café\n".encode("latin-1"),
        b"A: 2020-13-45\n",
        b"A: !!int ''\n",
        b"MODEL: {1: {2: 3}}\n",
        b"no: 1\n",
        b"_BASE_:\n",
        b"_BASE_: 3\n",
        b"_BASE_: [3]\n",
        b"_BASE_: {a.yaml: b.yaml}\n",
        b"_BASE_: [a.yaml, ~]\n",
        b"_BASE_: bad.yaml/none.yaml\n",
    ],
)
def test_unusable_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    assert "bad.yaml" in error_of(str(path))


def test_a_file_may_start_with_a_byte_order_mark(tmp_path: Path) -> None:
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "a.yaml").write_text("SEED: 3\n", encoding=encoding)
        assert read_yaml(str(tmp_path / "a.yaml")) == {"SEED": 3}


def test_a_repeated_key_is_reported_with_its_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.yaml", "MODEL: {A: 1}\nSEED: 3\nMODEL:\n  B: 2\n")
    assert read_yaml(path) == {"MODEL": {"B": 2}, "SEED": 3}
    (warning,) = [record.getMessage() for record in caplog.records]
    assert f"{path}, line 3: MODEL is repeated" in warning
    caplog.clear()
    read_yaml(write(tmp_path / "b.yaml", "A: {X: 1}\nB: {X: 1}\n"))
    assert caplog.records == []


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "missing.yaml" in error_of(str(tmp_path / "missing.yaml"))


def test_an_empty_file_holds_no_keys(tmp_path: Path) -> None:
    assert read_yaml(write(tmp_path / "empty.yaml", "")) == {}
