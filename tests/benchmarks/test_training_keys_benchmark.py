"""The benchmark of the keys of training: its ratios, and that each of its keys is one."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import training_keys
from benchmarks.training_keys import ALONE, KEYS, SHARDING, TWO, configured, measure, rows

DEMO = str(Path(__file__).parents[2] / "configs" / "demo" / "dimaskdino_shapes.yaml")


def options(name: str, tmp_path: Path) -> argparse.Namespace:
    output = tmp_path / "found.json"
    return argparse.Namespace(one=name, config_file=DEMO, size=64, batch=2, steps=2, warm_up=1, output=output)


def test_rows_are_ratios_to_the_default_of_as_many_processes() -> None:
    def runs(*seconds: float, mebibytes: float) -> list[dict[str, float]]:
        return [{"seconds": each, "mebibytes": mebibytes} for each in seconds]

    accumulated, full = "`SOLVER.ACCUMULATION_STEPS 2`", f"`{SHARDING} full`"
    found = {
        ALONE: runs(1.0, 2.0, 9.0, mebibytes=1000),
        accumulated: runs(3.0, 3.0, 8.0, mebibytes=500),
        TWO: runs(4.0, mebibytes=2000),
        full: runs(5.0, mebibytes=1000),
    }
    assert rows(found) == [
        [ALONE, "1 (2.00 s)", "1 (1000 MiB)"],
        [accumulated, "1.50", "0.50"],
        [TWO, "1 (4.00 s)", "1 (2000 MiB)"],
        [full, "1.25", "0.50"],
    ]


def test_each_key_changes_the_configuration(tmp_path: Path) -> None:
    dumps = {name: configured(options(name, tmp_path)).dump() for name in KEYS}
    assert dumps[ALONE] == dumps[TWO]
    assert len(set(dumps.values())) == len(KEYS) - 1


def test_a_key_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = []
    monkeypatch.setattr(training_keys.AveragedWeights, "update", lambda self, iteration: updates.append(iteration))
    args = options("`SOLVER.EMA.ENABLED True`", tmp_path)
    measure(args)
    found = json.loads(args.output.read_text())
    assert found["seconds"] > 0
    assert found["mebibytes"] > 100
    assert updates == [0, 1, 2]
