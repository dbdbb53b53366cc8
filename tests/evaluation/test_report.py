"""Tables to read."""

from dimaskdino.evaluation.report import layer_table


def test_a_stage_stands_with_its_title_and_scores() -> None:
    table = layer_table([{"stage": "selection.2", "box_AP": 1.0, "mask_AP": 2.5, "gap": -1.5}])
    assert [cell.strip() for cell in table.splitlines()[2].split("|")[1:-1]] == [
        *("selection.2", "second selection", "1.0", "2.5", "-1.5")
    ]
