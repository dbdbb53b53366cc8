"""Tables to read."""

import math

from dimaskdino.evaluation.report import class_table, coco_table, layer_table, run_table, stage_row

SCORES = {"AP": 1.0, "AP50": 2.0, "AP-cat": 1.0}


def cells(table: str, line: int) -> list[str]:
    return [cell.strip() for cell in table.splitlines()[line].split("|")[1:-1]]


def test_a_stage_has_its_title_and_scores() -> None:
    table = layer_table([stage_row("selection.2", {"bbox": {"AP": 1.0}, "segm": {"AP": 2.5}})])
    assert cells(table, 0) == ["stage", "after", "box AP", "mask AP", "box - mask"]
    assert cells(table, 2) == ["selection.2", "second selection", "1.0", "2.5", "-1.5"]


def test_tables_show_only_the_tasks_that_were_scored() -> None:
    assert cells(coco_table({"bbox": SCORES}), 0) == ["", "AP", "AP50"]
    assert len(coco_table({"bbox": SCORES}).splitlines()) == 3
    assert cells(class_table({"bbox": SCORES}), 0) == ["class", "box AP"]
    assert cells(layer_table([stage_row("layer.0", {"bbox": SCORES})]), 0) == ["stage", "after", "box AP"]
    assert cells(coco_table({"bbox": SCORES, "segm": SCORES}), 3)[0] == "mask"


def test_a_dash_stands_for_what_cannot_be_measured() -> None:
    assert cells(coco_table({"bbox": {"AP": 1.0, "APl": math.nan, "APs": None}}), 2) == ["box", "1.0", "–", "–"]
    runs = run_table({"first": {"bbox": {"AP": 1.0, "AP50": 2.0, "AP75": 0.5}}, "second": {}})
    assert cells(runs, 0) == ["", "box AP", "box AP50", "box AP75"]
    assert cells(runs, 3) == ["second", "–", "–", "–"]
