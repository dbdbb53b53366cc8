"""The picture of the imbalance: whose bars stand in it."""

import pytest

from dimaskdino.errors import UserError
from dimaskdino.reproduction.imbalance import StageResults, draw_imbalance, paper_ends
from tests.reproduction.fakes import stage

STAGES = [stage("interm", 5.0, 6.0), stage("initial", 7.0, 8.0), stage("layer.0", 16.0, 21.5), stage("layer.1", 28, 25)]


def drawn(tmp_path, *labels: str, **how) -> str:
    path = tmp_path / "figure.svg"
    draw_imbalance([StageResults(label, STAGES) for label in labels], path, **how)
    return path.read_text()


def test_bars_of_every_run_are_the_first_and_the_last_decoder_layer(tmp_path):
    text = drawn(tmp_path, "one", "two")
    assert text.count("<!-- 16.0 -->") == text.count("<!-- 21.5 -->") == text.count("<!-- 28.0 -->") == 2
    assert text.count("gap −5.5") == text.count("gap +3.0") == 2
    assert "<!-- one -->" in text
    assert "<!-- 5.0 -->" not in text
    assert "paper" not in text


def test_the_papers_bars_stand_beside_those_of_its_models_alone(tmp_path):
    text = drawn(tmp_path, "MaskDINO", "mine", with_paper=True)
    assert text.count("<!-- 16.6 -->") == text.count("<!-- 21.1 -->") == 1
    assert "gap −5.5 (paper −4.5)" in text
    assert "<!-- 21.6 -->" not in text
    with pytest.raises(UserError, match="MaskDINO and DI-MaskDINO; name the runs so with --labels"):
        drawn(tmp_path, "mine", with_paper=True)


def test_lines_show_every_stage_in_its_order(tmp_path):
    text = drawn(tmp_path, "one", lines=True)
    places = [text.index(f"<!-- {name} -->") for name in ("interm", "initial", "layer.0", "layer.1")]
    assert places == sorted(places)


def test_later_selections_stand_between_the_first_one_and_the_queries(tmp_path):
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
def test_what_could_not_be_measured_has_no_bar_and_says_so(tmp_path, nothing):
    first = {**stage("layer.0", 16.0, 21.5), "mask_AP": nothing, "gap": nothing}
    path = tmp_path / "figure.svg"
    draw_imbalance([StageResults("one", [STAGES[0], first, STAGES[3]])], path, lines=True)
    text = path.read_text()
    assert text.count("<!-- n/a -->") == text.count("gap n/a") == 1
    assert "nan" not in text


def test_a_run_without_decoder_layers_is_refused(tmp_path):
    with pytest.raises(UserError, match="hold no decoder layer"):
        draw_imbalance([StageResults("one", STAGES[:2])], tmp_path / "figure.png")


def test_the_papers_numbers_are_found_by_the_models_name():
    ends = paper_ends("DI-MaskDINO")
    assert ends is not None
    assert (ends["first/box_AP"], ends["last/mask_AP"], ends["last/gap"]) == (21.6, 25.7, 3.8)
    assert paper_ends("mine") is None
