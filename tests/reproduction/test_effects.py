"""Main effects and interaction of two modules, against numbers computed by hand."""

import csv
import io

import pytest

from dimaskdino.reproduction.effects import Effect, contrast, effects, effects_csv, effects_markdown
from dimaskdino.reproduction.tables import paper_tables
from tests.reproduction.fakes import write_run
from tests.reproduction.test_report import cells, runs_of

TABLE = paper_tables()["interaction"]
# Mean box AP of the rows: 11, 14 with DI, 12 with BATO, 17 with both; each row's variance is 2.
ROWS = {"neither": 10.0, "di_only": 13.0, "bato_only": 11.0, "dimaskdino": 16.0}
T_OF_4 = 2.776445  # Student's t, two-sided 95%, 4 degrees of freedom


@pytest.fixture
def found(tmp_path) -> dict[tuple[str, str], Effect]:
    for row, box in ROWS.items():
        for seed in (1, 2):
            write_run(tmp_path, "coco", row, box=box + 2 * (seed - 1), mask=30.0, seed=seed)
    listed = effects(TABLE, "coco", runs_of(TABLE, "coco", tmp_path, seeds=(1, 2)))
    return {(effect.name, effect.metric): effect for effect in listed}


@pytest.mark.parametrize(
    ("name", "ours", "margin", "paper"),
    [
        # (3 + 5) / 2; the error is the root of variance 2 times 4 rows times (1/2)^2 over 2 seeds.
        ("DI", 4.0, T_OF_4 * 1, 0.75),
        ("BATO", 2.0, T_OF_4 * 1, 0.55),
        # 5 - 3; four rows of weight 1.
        ("DI x BATO", 2.0, T_OF_4 * 2, -0.1),
    ],
)
def test_effects_and_their_intervals_over_seeds(found, name, ours, margin, paper):
    effect = found[name, "bbox/AP"]
    assert effect.ours == pytest.approx(ours)
    assert effect.margin == pytest.approx(margin, rel=1e-5)
    assert effect.paper == pytest.approx(paper)


def test_equal_runs_have_no_effect(found):
    assert (found["DI", "segm/AP"].ours, found["DI", "segm/AP"].margin) == (0.0, 0.0)


def test_tables_show_effects_intervals_and_the_papers(found):
    text = effects_markdown(TABLE, "coco", list(found.values()))
    assert ["DI", "box AP", "+4.00", "[+1.22, +6.78]", "+0.75"] in cells(text)
    assert "DI-MaskDINO, Table 4: Effects of the main modules, on COCO" in text
    record = next(csv.DictReader(io.StringIO(effects_csv(TABLE, "coco", list(found.values())))))
    assert (record["effect"], record["ours"], record["margin"], record["paper"]) == ("DI", "4.00", "2.78", "0.75")


def test_missing_runs_and_single_seeds_leave_gaps(tmp_path):
    assert contrast([[1.0], []], [1.0, -1.0]) == (None, None)
    assert contrast([[3.0], [1.0]], [1.0, -1.0]) == (2.0, None)
    listed = effects(TABLE, "coco", runs_of(TABLE, "coco", tmp_path))
    assert {effect.ours for effect in listed} == {None}
    assert "| –" in effects_markdown(TABLE, "coco", listed)
