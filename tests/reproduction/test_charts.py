"""Which bars and texts the charts show."""

import re

import pytest

from dimaskdino.errors import UserError
from dimaskdino.reproduction.charts import StageResults, draw_imbalance, draw_table, paper_ends
from dimaskdino.reproduction.report import compare
from dimaskdino.reproduction.tables import find_experiment, paper_tables
from tests.reproduction.fakes import CONFIGS, open_run, stage, write_run

STAGES = [stage("interm", 5.0, 6.0), stage("initial", 7.0, 8.0), stage("layer.0", 16.0, 21.5), stage("layer.1", 28, 25)]


def drawn(tmp_path, *labels: str, **how) -> str:
    path = tmp_path / "figure.svg"
    draw_imbalance([StageResults(label, STAGES) for label in labels], path, **how)
    return path.read_text()


def test_bars_show_the_first_and_the_last_decoder_layer(tmp_path):
    text = drawn(tmp_path, "one", "two")
    assert text.count("<!-- 16.0 -->") == text.count("<!-- 21.5 -->") == text.count("<!-- 28.0 -->") == 2
    assert text.count("gap −5.5") == text.count("gap +3.0") == 2
    assert "<!-- one -->" in text
    assert "<!-- 5.0 -->" not in text
    assert "paper" not in text


def test_only_the_papers_models_get_its_bars(tmp_path):
    text = drawn(tmp_path, "MaskDINO", "mine", with_paper=True)
    assert text.count("<!-- 16.6 -->") == text.count("<!-- 21.1 -->") == 1
    assert "gap −5.5 (paper −4.5)" in text
    assert "<!-- 21.6 -->" not in text
    with pytest.raises(UserError, match="MaskDINO and DI-MaskDINO.*--labels"):
        drawn(tmp_path, "mine", with_paper=True)


def test_lines_show_every_stage_in_order(tmp_path):
    text = drawn(tmp_path, "one", lines=True)
    places = [text.index(f"<!-- {name} -->") for name in ("interm", "initial", "layer.0", "layer.1")]
    assert places == sorted(places)
    width, alone = (float(re.search(r'width="([\d.]+)pt"', each)[1]) for each in (text, drawn(tmp_path, "one")))
    assert width - alone == pytest.approx(72 * 4.4)  # the second panel takes nothing from the first


def test_later_selections_come_before_the_queries(tmp_path):
    runs = [
        StageResults("two", STAGES),
        StageResults("three", [STAGES[0], stage("selection.2", 6.0, 7.0), *STAGES[1:]]),
    ]
    draw_imbalance(runs, tmp_path / "figure.svg", lines=True)
    text = (tmp_path / "figure.svg").read_text()
    places = [text.index(f"<!-- {name} -->") for name in ("interm", "selection.2", "initial", "layer.0")]
    assert places == sorted(places)


def test_runs_may_differ_in_their_stages(tmp_path):
    runs = [StageResults("deep", [*STAGES, stage("layer.2", 29.0, 26.0)]), StageResults("shallow", STAGES[2:])]
    draw_imbalance(runs, tmp_path / "figure.svg", lines=True)
    text = (tmp_path / "figure.svg").read_text()
    assert text.count("<!-- layer.2 -->") == 1


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_an_unmeasured_value_is_marked(tmp_path, nothing):
    first = {**stage("layer.0", 16.0, 21.5), "mask_AP": nothing, "gap": nothing}
    path = tmp_path / "figure.svg"
    draw_imbalance([StageResults("one", [STAGES[0], first, STAGES[3]])], path, lines=True)
    text = path.read_text()
    assert text.count("<!-- n/a -->") == text.count("gap n/a") == 1
    assert "nan" not in text


def test_a_run_without_decoder_layers_is_refused(tmp_path):
    with pytest.raises(UserError, match="one.*--eval-layers all"):
        draw_imbalance([StageResults("one", STAGES[:2])], tmp_path / "figure.png")


def test_the_papers_numbers_are_found_by_model():
    ends = paper_ends("DI-MaskDINO")
    assert ends is not None
    assert (ends["first/box_AP"], ends["last/mask_AP"], ends["last/gap"]) == (21.6, 25.7, 3.8)
    assert paper_ends("mine") is None


@pytest.mark.parametrize(("name", "dataset"), [("table1", "coco"), ("table4", "shapes"), ("table8", "bdd100k")])
def test_a_table_is_drawn_with_what_is_missing(name, dataset, tmp_path):
    table = paper_tables()[name]
    write_run(tmp_path, dataset, table.rows[0].experiment, box=0.0, mask=35.0)
    runs = {
        row.experiment: [open_run(tmp_path, row.experiment, dataset)]
        for row in table.rows
        if find_experiment(CONFIGS, dataset, row.experiment)
    }
    draw_table(table, dataset, compare(table, dataset, runs), tmp_path / "chart.svg")
    drawn = (tmp_path / "chart.svg").read_text()
    for text in (table.heading(dataset), "not run", "35.0", "box AP (%)", "mask AP (%)"):
        assert f"<!-- {text}" in drawn
    assert ("<!-- paper -->" in drawn) is (dataset != "shapes")


def test_several_runs_are_drawn_as_their_mean(tmp_path):
    runs = []
    for seed, box in ((1, 20.0), (2, 24.0)):
        write_run(tmp_path, "bdd100k", "maskdino", first_layer=(box, 21.0), seed=seed)
        runs.append(open_run(tmp_path, "maskdino", "bdd100k", seed=seed))
    first = StageResults.of_runs("MaskDINO", runs).ends()["first"]
    assert first == {"stage": "layer.0", "box_AP": 22.0, "mask_AP": 21.0, "gap": 1.0}


def test_bars_of_panoptic_and_semantic_models_show_what_they_have(tmp_path):
    path = tmp_path / "figure.svg"
    panoptic = [{**row, "PQ": 33.0 + number, "mIoU": 44.0} for number, row in enumerate(STAGES[2:])]
    draw_imbalance([StageResults("MaskDINO", panoptic)], path, lines=True)
    text = path.read_text()
    assert "<!-- 33.0 -->" in text
    assert "<!-- 34.0 -->" in text
    assert text.count("<!-- 44.0 -->") == 2
    assert "<!-- PQ -->" in text
    semantic = [{"stage": f"layer.{number}", "mIoU": 55.0 + number} for number in range(2)]
    draw_imbalance([StageResults("MaskDINO", semantic)], path)
    text = path.read_text()
    assert "<!-- 56.0 -->" in text
    assert "gap" not in text
    assert "box AP" not in text
