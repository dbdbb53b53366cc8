"""The papers' numbers as data."""

import pytest

from dimaskdino.errors import UserError
from dimaskdino.reproduction.tables import SPEED, choose_tables, find_experiment, metric_name, paper_tables
from tests.reproduction.fakes import CONFIGS

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
