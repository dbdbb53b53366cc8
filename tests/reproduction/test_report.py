"""The papers' tables as data, and our results beside them."""

import csv
import io

import pytest

from dimaskdino.errors import UserError
from dimaskdino.reproduction.report import compare, markdown, to_csv
from dimaskdino.reproduction.runs import Run
from dimaskdino.reproduction.tables import (
    DATASETS,
    SPEED,
    Table,
    choose_tables,
    find_experiment,
    metric_name,
    paper_tables,
)
from tests.reproduction.fakes import CONFIGS, write_run

NUM_ROWS = {
    "table1": 10,
    "table2": 4,
    "table3": 6,
    "table4": 4,
    "interaction": 4,
    "table5": 4,
    "table6": 2,
    "table7": 3,
    "table8": 3,
    "table9": 3,
    "figure1": 2,
    "dino_table1": 2,
    "dino_table2": 4,
    "dino_table4": 6,
    "dino_table7": 7,
    "maskdino_instance": 5,
    "maskdino_panoptic": 4,
    "maskdino_semantic": 2,
    "maskdino_figure1": 2,
}


def test_every_table_has_all_its_rows():
    assert {name: len(table.rows) for name, table in paper_tables().items()} == NUM_ROWS


def test_rows_match_the_columns_of_their_table():
    for table in paper_tables().values():
        for row in table.rows:
            assert len(row.labels) == len(table.label_names)
            for dataset, values in row.paper.items():
                assert dataset in table.datasets
                assert len(values) == len(table.metrics)


def test_an_experiment_has_the_same_numbers_in_every_table():
    found: dict = {}
    for table in paper_tables().values():
        for row in table.rows:
            for dataset, values in row.paper.items():
                named = dict(zip(table.metrics, values, strict=True))
                ends = (named.get("bbox/AP", named.get("last/box_AP")), named.get("segm/AP", named.get("last/mask_AP")))
                if (experiment := find_experiment(CONFIGS, dataset, row.experiment)) and ends != (None, None):
                    # Two papers may have different numbers of a model.
                    found.setdefault((table.paper, experiment), set()).add(ends)
    assert len(found) > 40
    assert {experiment.name: ends for (_, experiment), ends in found.items() if len(ends) > 1} == {}


@pytest.mark.parametrize(
    ("table", "row", "dataset", "values"),
    [
        ("table1", 9, "coco", (57.8, 41.5, 61.2, 73.9, 51.8, 31.8, 55.1, 72.2, 3.0)),
        ("table2", 1, "bdd100k", (29.5, 18.0, 37.4, 50.4, 25.7, 14.5, 32.1, 48.1, 6.4)),
        ("table3", 5, "bdd100k", (23.8, 23.7)),
        ("table4", 1, "coco", (46.4, 42.1)),
        ("table4", 1, "bdd100k", (28.8, 25.2)),
        ("table9", 2, "coco", (46.9, 42.5)),
        ("dino_table1", 1, "coco", (49.4, 66.9, 53.8, 32.3, 52.5, 63.9, 10.0)),
        ("dino_table4", 0, "coco", (43.4, 61.9, 47.2, 24.8, 46.8, 59.4)),
        ("dino_table7", 6, "coco", (45.1,)),
        ("maskdino_instance", 0, "coco", (46.1, 51.5)),
        ("maskdino_panoptic", 0, "coco", (53.0, 48.8, 44.3, 60.6)),
        ("maskdino_semantic", 0, "cityscapes", (79.8,)),
    ],
)
def test_numbers_belong_to_their_dataset(table, row, dataset, values):
    assert paper_tables()[table].rows[row].paper[dataset] == values


def test_gaps_are_box_minus_mask():
    figure = paper_tables()["figure1"]
    for row in figure.rows:
        values = dict(zip(figure.metrics, row.paper["bdd100k"], strict=True))
        for end in ("first", "last"):
            assert values[f"{end}/gap"] == pytest.approx(values[f"{end}/box_AP"] - values[f"{end}/mask_AP"])


def test_only_the_figures_need_results_by_layer():
    assert [name for name, table in paper_tables().items() if table.needs_layers] == ["figure1", "maskdino_figure1"]


def test_only_the_main_results_have_speeds():
    assert [name for name, table in paper_tables().items() if SPEED in table.metrics] == [
        "table1",
        "table2",
        "dino_table1",
    ]


def test_tables_default_to_the_datasets_of_the_paper():
    chosen = {dataset: [table.name for table in tables] for dataset, tables in choose_tables(["all"], []).items()}
    both = ["table4", "interaction", *(f"table{number}" for number in range(5, 10))]
    of_others = [name for name in NUM_ROWS if name.startswith(("dino_", "maskdino_"))]
    of_others.remove("maskdino_semantic")
    assert chosen == {
        "coco": ["table1", *both, *of_others],
        "bdd100k": ["table2", "table3", *both, "figure1"],
        "ade20k": ["maskdino_semantic"],
        "cityscapes": ["maskdino_semantic"],
    }
    assert list(choose_tables(["table1"], [])) == ["coco"]


def test_headings_name_paper_table_and_dataset():
    assert paper_tables()["table4"].heading("coco") == "DI-MaskDINO, Table 4: Main modules, on COCO"
    assert paper_tables()["figure1"].heading("bdd100k").startswith("DI-MaskDINO, Figure 1: Imbalance")


def test_the_reference_dataset_has_the_papers_changes():
    assert [paper_tables()[name].reference_dataset for name in ("table1", "table4")] == ["coco", "bdd100k"]


def test_all_means_every_table_of_a_dataset():
    on_coco_alone = ("table1", "dino_table1", "dino_table2", "maskdino_instance")
    expected = [name for name in NUM_ROWS if name not in on_coco_alone]
    assert [table.name for table in choose_tables(["all"], ["shapes"])["shapes"]] == expected


def test_a_table_that_a_dataset_lacks_is_refused():
    with pytest.raises(UserError, match="table1.*bdd100k.*coco"):
        choose_tables(["table4", "table1"], ["bdd100k"])


def test_metrics_have_readable_names():
    names = [metric_name(metric) for metric in ("bbox/AP", "segm/APs", "first/box_AP", "last/gap", SPEED)]
    assert names == ["box AP", "mask AP S", "first layer box AP", "last layer box - mask", "FPS"]
    names = [metric_name(metric) for metric in ("panoptic_seg/PQ", "sem_seg/mIoU", "first/PQ")]
    assert names == ["PQ", "mIoU", "first layer PQ"]


def test_panoptic_and_semantic_models_are_found_by_dataset():
    for dataset, row, name in (
        ("coco", "maskdino_panoptic", "panoptic_maskdino_r50_50ep"),
        ("ade20k", "dimaskdino_semantic", "semantic_dimaskdino_r50_ade20k_160k"),
        ("shapes", "maskdino_semantic", "demo_maskdino_semantic_shapes"),
    ):
        experiment = find_experiment(CONFIGS, dataset, row)
        assert experiment is not None
        assert experiment.name == name
        assert experiment.config_file.is_file()
    assert find_experiment(CONFIGS, "cityscapes", "maskdino_panoptic") is None


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
