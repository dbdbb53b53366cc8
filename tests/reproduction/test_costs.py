"""What is left to train, and how long it takes."""

import os

import pytest

from dimaskdino.reproduction.costs import cost_table, hours_left, images_left, measure_folder, speed_group, speeds
from tests.reproduction.fakes import write_run
from tests.reproduction.test_runs import open_run


def write_measured(folder, seconds: float) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(f'{{"iteration": 19, "time": {seconds}}}\n')


def test_runs_are_as_fast_as_others_of_their_dataset_backbone_and_batch(tmp_path):
    groups = [
        speed_group(open_run(tmp_path, row, dataset))
        for row, dataset in [
            ("neither", "coco"),
            ("dimaskdino", "coco"),
            ("dimaskdino_swinl_12ep", "coco"),
            ("neither", "bdd100k"),
            ("neither", "shapes"),
        ]
    ]
    assert groups == [
        ("coco", "R50", 16),
        ("coco", "R50", 16),
        ("coco", "swin192", 4),
        ("bdd100k", "R50", 8),
        ("shapes", "regnetx_002", 8),
    ]


def test_a_speed_is_a_runs_own_else_the_newest_of_its_group(tmp_path):
    old = write_run(tmp_path, "coco", "neither", done=5000, evaluated=False, seconds=2.0)
    os.utime(old / "metrics.json", (1, 1))
    write_run(tmp_path, "coco", "di_only", done=5000, evaluated=False, seconds=1.0)
    names = ["neither", "di_only", "no_gtg", "dimaskdino_swinl_12ep"]
    runs = [open_run(tmp_path, name, "coco") for name in names]
    known = speeds(runs, tmp_path)
    assert [known[run].seconds for run in runs[:3]] == [2.0, 1.0, 1.0]
    assert [known[run].source for run in runs[:3]] == ["neither", "di_only", "di_only"]
    assert runs[3] not in known


def test_a_measurement_counts_for_the_runs_of_its_group_that_were_not_started(tmp_path):
    runs = [open_run(tmp_path, name, "coco") for name in ("neither", "dimaskdino_swinl_12ep")]
    write_measured(measure_folder(runs[0], tmp_path), 1.5)
    known = speeds(runs, tmp_path)
    assert known[runs[0]].seconds == 1.5
    assert "measured" in str(measure_folder(runs[0], tmp_path))
    assert runs[1] not in known


def test_hours_and_images_are_those_that_are_left(tmp_path):
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


def test_the_table_of_costs_adds_up_and_says_what_is_unknown(tmp_path):
    write_run(tmp_path, "coco", "neither", done=78500, evaluated=False, seconds=0.36)
    runs = [open_run(tmp_path, name, "coco") for name in ("neither", "dimaskdino_swinl_12ep")]
    first, second, total = lines(cost_table(runs, speeds(runs, tmp_path)))
    status = "stopped at 78500 of 88500"
    assert first == ["coco/neither", status, "12", "10000", "160000", "0.36", "1.0", "neither"]
    assert second[1:] == ["not run", "12", "354000", "1416000", "unknown", "unknown", ""]
    assert total == ["together", "", "", "364000", "1576000", "", "1.0 and 1 unknown", ""]


def test_the_table_of_costs_shows_the_gpus_of_the_runs_that_get_others_than_asked_for(tmp_path):
    runs = [open_run(tmp_path, name, "coco") for name in ("neither", "dimaskdino_swinl_12ep")]
    table = cost_table(runs, {}, {runs[1]: 4})
    assert table.splitlines()[0].strip("|").split("|")[-1].strip() == "GPUs"
    assert [row[-1] for row in lines(table)] == ["", "4", ""]
    assert "GPUs" not in cost_table(runs, {}, {})


def test_nothing_measured_is_unknown_and_nothing_left_is_free(tmp_path):
    run = open_run(tmp_path, "neither", "coco")
    assert lines(cost_table([run], {}))[-1][6] == "unknown"
    write_run(tmp_path, "coco", "neither")
    assert lines(cost_table([run], {}))[-1][3:7] == ["0", "0", "", "0.0"]
