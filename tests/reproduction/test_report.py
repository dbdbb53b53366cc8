"""Ours beside the paper's: numbers, differences, and what is missing."""

import csv
import io

import pytest

from dimaskdino.reproduction.report import compare, markdown, to_csv
from dimaskdino.reproduction.runs import Run
from dimaskdino.reproduction.tables import DATASETS, Table, find_experiment, paper_tables
from tests.reproduction.fakes import CONFIGS, write_run

ALL = [(dataset, table) for table in paper_tables().values() for dataset in DATASETS if dataset in table.datasets]


def runs_of(table: Table, dataset: str, output, seeds=(None,)) -> dict[str, list[Run]]:
    found = {row.experiment: find_experiment(CONFIGS, dataset, row.experiment) for row in table.rows}
    return {
        row: [Run.open(experiment, output, seed=seed) for seed in seeds] if experiment else []
        for row, experiment in found.items()
    }


def compared(name: str, dataset: str, output, seeds=(None,)):
    table = paper_tables()[name]
    return table, compare(table, dataset, runs_of(table, dataset, output, seeds))


def cells(text: str) -> list[list[str]]:
    """The body of a Markdown table."""
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize(("dataset", "table"), ALL, ids=lambda value: getattr(value, "name", value))
def test_the_papers_numbers_stand_beside_missing_runs(dataset, table, tmp_path):
    rows = compare(table, dataset, runs_of(table, dataset, tmp_path))
    body = cells(markdown(table, dataset, rows))
    assert len(body) == len(table.rows)
    for cells_of_row, row in zip(body, table.rows, strict=True):
        assert cells_of_row[: len(row.labels)] == list(row.labels)
        assert cells_of_row[len(row.labels) + 1] in ("not run", "not on shapes", "not on COCO")
        for cell, value in zip(cells_of_row[len(row.labels) + 2 :], row.paper.get(dataset, ()), strict=False):
            assert cell == f"– / {'–' if value is None else value}"


@pytest.mark.parametrize("table", paper_tables().values(), ids=lambda table: table.name)
def test_every_table_is_written_as_markdown_and_csv(table, tmp_path):
    dataset = table.datasets[-1]
    for row in table.rows:
        if find_experiment(CONFIGS, dataset, row.experiment):
            of_paper = {"panoptic": table.paper == "Mask DINO", "first_layer": (20.0, 24.0)}
            write_run(tmp_path, dataset, row.experiment, box=40.0, mask=35.0, **of_paper)
    rows = compare(table, dataset, runs_of(table, dataset, tmp_path))
    body = cells(markdown(table, dataset, rows))
    records = list(csv.DictReader(io.StringIO(to_csv(table, dataset, rows))))
    assert len(records) == len(body) == len(table.rows)
    for row, record in zip(rows, records, strict=True):
        assert record["status"] == row.status
        if row.status == "finished":
            assert all(cell.ours is not None for cell in row.cells)
            assert list(record.values())[: 2 + len(row.labels)] == [table.name, dataset, *row.labels]


def test_a_cell_holds_ours_the_papers_and_the_difference(tmp_path):
    write_run(tmp_path, "bdd100k", "di_only", box=29.04, mask=24.76)
    table, rows = compared("table4", "bdd100k", tmp_path)
    assert cells(markdown(table, "bdd100k", rows))[1] == [
        *("yes", "no", "di_only", "finished"),
        *("29.0 / 28.8 (+0.2)", "24.8 / 25.2 (-0.4)"),
    ]
    record = list(csv.DictReader(io.StringIO(to_csv(table, "bdd100k", rows))))[1]
    assert (record["box AP"], record["box AP paper"], record["box AP difference"]) == ("29.0", "28.8", "0.2")
    assert (record["mask AP difference"], record["box AP change"]) == ("-0.4", "")


def test_shapes_shows_changes_beside_the_papers(tmp_path):
    write_run(tmp_path, "shapes", "neither", box=60.0, mask=50.0)
    write_run(tmp_path, "shapes", "dimaskdino", box=62.5, mask=49.0)
    table, rows = compared("table4", "shapes", tmp_path)
    text = markdown(table, "shapes", rows)
    body = cells(text)
    assert body[0][-2:] == ["60.0", "50.0"]
    assert body[1][-2:] == ["– (paper +1.0)", "– (paper +0.8)"]
    assert body[3][-2:] == ["62.5 (+2.5; paper +1.7)", "49.0 (-1.0; paper +1.3)"]
    assert "BDD100K" in text
    assert "synthetic" in text


def test_speed_has_a_device_and_no_difference(tmp_path):
    write_run(tmp_path, "bdd100k", "maskdino", speed=(12.34, "GPU one"))
    write_run(tmp_path, "bdd100k", "dimaskdino", speed=None)
    table, rows = compared("table2", "bdd100k", tmp_path)
    text = markdown(table, "bdd100k", rows)
    assert [row[-1] for row in cells(text)] == ["12.3 / 6.7", "– / 6.4", "– / 3.2", "– / 2.8"]
    assert text.endswith("it depends on the device: ours on GPU one.\n")
    first, second = list(csv.DictReader(io.StringIO(to_csv(table, "bdd100k", rows))))[:2]
    speed = ("FPS", "FPS paper", "FPS difference", "FPS change", "FPS paper change", "FPS device")
    assert [first[name] for name in speed] == ["12.3", "6.7", "", "", "", "GPU one"]
    assert [second[name] for name in speed] == ["", "6.4", "", "", "", ""]


def test_speeds_of_several_devices_name_their_runs(tmp_path):
    write_run(tmp_path, "shapes", "neither", speed=(30.0, "a CPU"))
    write_run(tmp_path, "shapes", "dimaskdino", speed=(90.0, "a GPU"))
    table, rows = compared("table2", "shapes", tmp_path)
    text = markdown(table, "shapes", rows)
    assert [row[-1] for row in cells(text)] == ["30.0", "90.0", "–", "–"]
    assert "ours on a CPU (neither); a GPU (dimaskdino)." in text


def test_an_unmeasured_speed_is_marked(tmp_path):
    table, rows = compared("table1", "coco", tmp_path)
    assert markdown(table, "coco", rows).endswith("ours not measured.\n")
    table, rows = compared("table4", "coco", tmp_path)
    assert "FPS" not in markdown(table, "coco", rows) + to_csv(table, "coco", rows)


def test_a_row_that_the_dataset_lacks_is_marked(tmp_path):
    _, rows = compared("table2", "shapes", tmp_path)
    assert [row.status for row in rows] == ["not run", "not run", "not on shapes", "not on shapes"]


def test_the_figure_marks_runs_without_results_by_layer(tmp_path):
    write_run(tmp_path, "bdd100k", "maskdino")
    write_run(tmp_path, "bdd100k", "dimaskdino", first_layer=(20.0, 21.0))
    _, rows = compared("figure1", "bdd100k", tmp_path)
    assert [row.status for row in rows] == ["not evaluated by layer", "finished"]


def test_one_run_fills_its_row_in_every_table(tmp_path):
    write_run(tmp_path, "coco", "bato_only", box=46.5, mask=41.5)
    for name, row in (("table4", 2), ("table5", 0), ("table7", 0)):
        _, rows = compared(name, "coco", tmp_path)
        assert [cell.ours for cell in rows[row].cells] == [46.5, 41.5]


def test_several_seeds_give_a_mean_and_a_spread(tmp_path):
    for seed, box in ((1, 29.0), (2, 31.0)):
        write_run(tmp_path, "bdd100k", "di_only", box=box, mask=25.0, seed=seed)
    table, rows = compared("table4", "bdd100k", tmp_path, seeds=(1, 2, 3))
    assert rows[1].status == "2 of 3 seeds finished"
    # The standard deviation of two numbers is their distance over the root of 2.
    assert cells(markdown(table, "bdd100k", rows))[1][-2:] == ["30.0 ± 1.4 / 28.8 (+1.2)", "25.0 ± 0.0 / 25.2 (-0.2)"]
    record = list(csv.DictReader(io.StringIO(to_csv(table, "bdd100k", rows))))[1]
    assert (record["box AP"], record["box AP spread"]) == ("30.0", "1.4")
