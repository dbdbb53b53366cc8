"""Tables to read."""

from dimaskdino.evaluation.report import layer_table, stage_name


def test_stages_have_names_to_read() -> None:
    stages = ["interm", "selection.2", "selection.3", "selection.7", "initial", "layer.0"]
    assert [stage_name(stage) for stage in stages] == [
        *("first selection", "second selection", "third selection", "7th selection"),
        *("queries before layer 0", "decoder layer 0"),
    ]
    table = layer_table([{"stage": "selection.2", "box_AP": 1.0, "mask_AP": 2.5, "gap": -1.5}])
    assert table.splitlines()[2].split("|")[1:-1] == [
        *(" selection.2 ", " second selection "),
        *("      1.0 ", "       2.5 ", "         -1.5 "),
    ]
