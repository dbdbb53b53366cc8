"""docs/differences.md names tests that exist; and the differences that no other file of tests is about."""

import argparse
import ast
import re
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from dimaskdino.checkpoint import checkpointer
from dimaskdino.engine import evaluate
from dimaskdino.engine.launch import _dist_url
from tests.tiny_model import tiny_cfg

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "differences.md").read_text()
NAMED_TESTS = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


def functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_test_that_the_page_names_exists():
    assert len(NAMED_TESTS) > 40
    missing = [f"{file}::{name}" for file, name in NAMED_TESTS if name not in functions(file)]
    assert not missing


def test_every_difference_names_a_test():
    rows = [line for line in PAGE.splitlines() if line.startswith("|") and not re.match(r"\|(---| Releases)", line)]
    assert len(rows) > 25
    assert [row for row in rows if not re.search(r"`tests/[\w/]+\.py::\w+`", row.split("|")[-2])] == []


@pytest.mark.parametrize("url", ["tcp://10.0.0.7:29500", "file:///shared/rendezvous"])
def test_a_given_dist_url_is_used_as_it_is(url):
    assert _dist_url(argparse.Namespace(dist_url=url, num_machines=2), "unused") == url


def test_evaluation_reads_its_weights_once(tmp_path, monkeypatch):
    cfg = tiny_cfg({"OUTPUT_DIR": str(tmp_path), "MODEL.WEIGHTS": str(tmp_path / "weights.pth"), "DATASETS.TEST": ()})
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    seen, read = [], checkpointer.read_weights
    monkeypatch.setattr(
        checkpointer, "read_weights", lambda path, **options: seen.append(path) or read(path, **options)
    )
    evaluate(cfg)
    assert len(seen) == 1
