"""What is left to train and how long it takes."""

import os

import pytest

from dimaskdino.reproduction.costs import cost_table, hours_left, images_left, measure_folder, speeds
from tests.reproduction.fakes import open_run, write_run


def write_measured(folder, seconds: float) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(f'{{"iteration": 19, "time": {seconds}}}\n')


def test_runs_of_one_dataset_backbone_and_batch_are_measured_together(tmp_path):
    groups = [
        str(measure_folder(open_run(tmp_path, row, dataset), tmp_path).relative_to(tmp_path))
        for row, dataset in [
            ("neither", "coco"),
            ("dimaskdino", "coco"),
            ("dimaskdino_swinl_12ep", "coco"),
            ("neither", "bdd100k"),
            ("neither", "shapes"),
        ]
    ]
    assert groups == [
        "coco/measured/R50_batch16",
        "coco/measured/R50_batch16",
        "coco/measured/swin192_batch4",
        "bdd100k/measured/R50_batch8",
        "shapes/measured/regnetx_002_batch8",
    ]


def test_a_run_without_a_speed_takes_the_newest_similar_one(tmp_path):
    old = write_run(tmp_path, "coco", "neither", done=5000, evaluated=False, seconds=2.0)
    os.utime(old / "metrics.json", (1, 1))
    write_run(tmp_path, "coco", "di_only", done=5000, evaluated=False, seconds=1.0)
    names = ["neither", "di_only", "no_gtg", "dimaskdino_swinl_12ep"]
    runs = [open_run(tmp_path, name, "coco") for name in names]
    known = speeds(runs, tmp_path)
    assert [known[run].seconds for run in runs[:3]] == [2.0, 1.0, 1.0]
    assert [known[run].source for run in runs[:3]] == ["neither", "di_only", "di_only"]
    assert runs[3] not in known


def test_a_measurement_counts_for_similar_runs_alone(tmp_path):
    runs = [open_run(tmp_path, name, "coco") for name in ("neither", "dimaskdino_swinl_12ep")]
    write_measured(measure_folder(runs[0], tmp_path), 1.5)
    known = speeds(runs, tmp_path)
    assert known[runs[0]].seconds == 1.5
    assert runs[1] not in known


def test_hours_and_images_count_what_is_left(tmp_path):
    write_run(tmp_path, "coco", "neither", done=78500, evaluated=False, seconds=0.36)
    write_run(tmp_path, "coco", "di_only")
    half, done, fresh = (open_run(tmp_path, name, "coco") for name in ("neither", "di_only", "no_gtg"))
    known = speeds([half], tmp_path)
    assert images_left(half) == 160_000
    assert hours_left(half, known[half]) == pytest.approx(1.0)
    assert hours_left(done, None) == 0.0
    assert hours_left(fresh, None) is None


def lines(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_cost_table_adds_up_and_shows_what_is_unknown(tmp_path):
    write_run(tmp_path, "coco", "neither", done=78500, evaluated=False, seconds=0.36)
    runs = [open_run(tmp_path, name, "coco") for name in ("neither", "dimaskdino_swinl_12ep")]
    first, second, total = lines(cost_table(runs, speeds(runs, tmp_path)))
    status = "stopped at 78500 of 88500"
    assert first == ["coco/neither", status, "12", "10000", "160000", "0.36", "1.0", "neither"]
    assert second[1:] == ["not run", "12", "354000", "1416000", "unknown", "unknown", ""]
    assert total == ["together", "", "", "364000", "1576000", "", "1.0 and 1 unknown", ""]


def test_the_cost_table_shows_differing_numbers_of_gpus(tmp_path):
    runs = [open_run(tmp_path, name, "coco") for name in ("neither", "dimaskdino_swinl_12ep")]
    table = cost_table(runs, {}, {runs[1]: 4})
    assert table.splitlines()[0].strip("|").split("|")[-1].strip() == "GPUs"
    assert [row[-1] for row in lines(table)] == ["", "4", ""]
    assert "GPUs" not in cost_table(runs, {}, {})


def test_nothing_left_costs_nothing(tmp_path):
    run = open_run(tmp_path, "neither", "coco")
    assert lines(cost_table([run], {}))[-1][6] == "unknown"
    write_run(tmp_path, "coco", "neither")
    assert lines(cost_table([run], {}))[-1][3:7] == ["0", "0", "", "0.0"]
