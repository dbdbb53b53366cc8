"""Configuration files are read without running code."""

import re
from pathlib import Path

import pytest

from dimaskdino.errors import ConfigError
from dimaskdino.yaml_files import read_yaml


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def test_a_file_overrides_its_bases_and_later_bases_override_earlier_ones(tmp_path: Path) -> None:
    write(tmp_path / "one.yaml", "A: {X: 1, Y: 1, Z: 1}\n")
    write(tmp_path / "deep" / "two.yaml", "_BASE_: ../one.yaml\nA: {Y: 2}\n")
    write(tmp_path / "three.yaml", "A: {Z: 3}\nB: [1, 2]\n")
    path = write(tmp_path / "own.yaml", "_BASE_: [deep/two.yaml, three.yaml]\nB: [4]\n")
    assert read_yaml(path) == {"A": {"X": 1, "Y": 2, "Z": 3}, "B": [4]}


def test_a_cycle_of_bases_is_an_error_that_shows_it(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", f"_BASE_: {tmp_path}/b.yaml\n")
    write(tmp_path / "b.yaml", f"_BASE_: {first}\n")
    with pytest.raises(ConfigError, match=r"leads back to this file \(.*a.yaml -> .*b.yaml -> .*a.yaml\)"):
        read_yaml(first)


def test_the_arithmetic_of_the_releases_lists_is_computed(tmp_path: Path) -> None:
    expression = "[int(x * 0.1 * 640) for x in range(5, 21)]"
    path = write(tmp_path / "c.yaml", f'SIZES: !!python/object/apply:eval ["{expression}"]\n')
    assert read_yaml(path) == {"SIZES": [int(x * 0.1 * 640) for x in range(5, 21)]}


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:eval [\"__import__('pathlib').Path('{marker}').touch()\"]",
        "!!python/object/apply:eval [\"open('{marker}', 'w')\"]",
        '!!python/object/apply:eval ["().__class__"]',
        '!!python/object/apply:eval ["[0] * 1000000"]',
        '!!python/object/apply:eval ["range(10000000)"]',
        '!!python/object/apply:eval ["1 / 0"]',
        '!!python/object/apply:eval ["x + 1"]',
        '!!python/object/apply:eval "1 + 1"',
        "!!python/object/apply:eval {A: 1}",
        "!!python/object/apply:os.mkdir ['{marker}']",
    ],
)
def test_a_file_that_asks_for_more_is_refused_and_nothing_runs(tmp_path: Path, value: str) -> None:
    marker = tmp_path / "ran"
    path = write(tmp_path / "evil.yaml", f"KEY: {value.replace('{marker}', str(marker))}\n")
    with pytest.raises(ConfigError, match="evil.yaml"):
        read_yaml(path)
    assert not marker.exists()


@pytest.mark.parametrize(("text", "message"), [("- 1\n", "a mapping of keys, not a list"), ("A: [1\n", "Cannot read")])
def test_a_file_that_is_no_mapping_is_an_error_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        read_yaml(write(tmp_path / "bad.yaml", text))
    assert "bad.yaml" in str(error.value)


@pytest.mark.parametrize("content", [b"PK\x03\x04\x9a\xff", "WEIGHTS: café\n".encode("latin-1"), b"A: 2020-13-45\n"])
def test_a_file_that_is_no_text_or_holds_an_impossible_date_is_an_error_that_names_it(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"Cannot read the configuration .*bad\.yaml: ") as error:
        read_yaml(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("MODEL: {1: {2: 3}}\n", "MODEL.1 is no key: keys are text, and YAML reads 1 (int) here."),
        ("no: 1\n", "False is no key: keys are text, and YAML reads False (bool) here."),
    ],
)
def test_keys_that_yaml_reads_as_something_else_than_text_are_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"bad.yaml: {words}")):
        read_yaml(write(tmp_path / "bad.yaml", text))


@pytest.mark.parametrize("base", ["", "3", "[3]", "{a.yaml: b.yaml}", "[a.yaml, ~]"])
def test_bases_that_are_no_paths_are_an_error_that_names_file_and_key(tmp_path: Path, base: str) -> None:
    with pytest.raises(ConfigError, match=r"bad\.yaml: _BASE_ is .*; it must be the path of a file"):
        read_yaml(write(tmp_path / "bad.yaml", f"_BASE_: {base}\n"))


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing.yaml"):
        read_yaml(str(tmp_path / "missing.yaml"))
