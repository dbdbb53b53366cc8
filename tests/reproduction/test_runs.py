"""What is known of a run from its folder."""

import json
from pathlib import Path

import pytest

from dimaskdino.config import read_yaml
from dimaskdino.errors import ConfigError, UserError
from dimaskdino.reproduction.experiments import find_experiment
from dimaskdino.reproduction.runs import Run, decoder_layers, read_stages
from dimaskdino.reproduction.tables import paper_tables
from tests.reproduction.fakes import CONFIGS, stage, write_run

HALF_DEMO = read_yaml(str(CONFIGS / "ablation" / "shapes" / "dimaskdino.yaml"))["SOLVER"]["MAX_ITER"]
TABLE1, TABLE4, FIGURE1 = (paper_tables()[name] for name in ("table1", "table4", "figure1"))


def open_run(output: Path, row: str = "neither", dataset: str = "shapes", options: tuple[str, ...] = ()) -> Run:
    experiment = find_experiment(CONFIGS, dataset, row)
    assert experiment is not None
    return Run.open(experiment, output, options)


def test_a_run_lies_under_its_dataset_and_the_name_of_its_file(tmp_path):
    assert open_run(tmp_path, "dimaskdino", "coco").folder == tmp_path / "coco" / "dimaskdino_r50_12ep"


def test_a_folder_that_is_not_there_is_a_run_that_was_not_run(tmp_path):
    run = open_run(tmp_path)
    assert (run.status, run.iterations_done, run.iterations_left) == ("not run", 0, HALF_DEMO)
    assert run.results(TABLE4) == (None, None)
    assert not run.has_checkpoint
    assert run.seconds_per_iteration() is None


def test_an_interrupted_run_has_the_iterations_of_its_last_checkpoint(tmp_path):
    write_run(tmp_path, "shapes", "neither", done=300, evaluated=False)
    run = open_run(tmp_path)
    assert (run.status, run.iterations_left, run.has_checkpoint) == (
        f"stopped at 300 of {HALF_DEMO}",
        HALF_DEMO - 300,
        True,
    )
    assert run.results(TABLE4) == (None, None)


def test_an_evaluation_on_the_way_does_not_finish_a_run(tmp_path):
    write_run(tmp_path, "shapes", "neither", done=600, evaluated=True)
    assert open_run(tmp_path).status == f"stopped at 600 of {HALF_DEMO}"


def test_a_trained_run_without_its_last_evaluation_is_not_finished(tmp_path):
    write_run(tmp_path, "shapes", "neither", evaluated=False)
    run = open_run(tmp_path)
    assert (run.status, run.iterations_left, run.is_finished) == ("not evaluated", 0, False)


def test_a_finished_run_has_the_results_that_a_table_asks_for(tmp_path):
    write_run(tmp_path, "coco", "dimaskdino_r50_12ep", box=46.94, mask=42.3)
    run = open_run(tmp_path, "dimaskdino", "coco")
    assert (run.status, run.iterations_left) == ("finished", 0)
    assert run.results(TABLE4) == (46.94, 42.3)
    assert run.results(TABLE1) == pytest.approx((46.94, 45.94, 47.94, 48.94, 42.3, 41.3, 43.3, 44.3, 7.5))


def test_a_run_whose_speed_was_not_measured_has_the_other_results(tmp_path):
    write_run(tmp_path, "coco", "dimaskdino_r50_12ep", speed=None)
    run = open_run(tmp_path, "dimaskdino", "coco")
    assert run.speed() == {}
    assert run.results(TABLE1)[-2:] == (27.0, None)


def test_an_unfinished_run_has_no_speed(tmp_path):
    write_run(tmp_path, "coco", "dimaskdino_r50_12ep", done=600)
    assert open_run(tmp_path, "dimaskdino", "coco").speed() == {}


def test_a_long_metrics_file_is_read_from_its_end(tmp_path):
    folder = write_run(tmp_path, "shapes", "neither")
    metrics = folder / "metrics.json"
    padding = json.dumps({"iteration": 5, "time": 0.5, "text": "x" * 1000}) + "\n"
    metrics.write_text(padding * 400 + metrics.read_text())
    assert open_run(tmp_path).is_finished


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    folder = write_run(tmp_path, "shapes", "neither", done=300, evaluated=False, seconds=0.25)
    with (folder / "metrics.json").open("a") as file:
        file.write('{"iteration": 59, "time": 9')
    assert open_run(tmp_path).seconds_per_iteration() == 0.25


def test_a_record_that_a_crash_cut_and_the_next_one_followed_is_left_out_with_one_warning(tmp_path, caplog):
    folder = write_run(tmp_path, "shapes", "neither", seconds=0.25)
    metrics = folder / "metrics.json"
    joined = '{"iteration": 49, "time": 9, "bbox/AP": 3{"iteration": 59, "time": 9, "bbox/AP": 4}\n'
    metrics.write_text(joined + metrics.read_text())
    run = open_run(tmp_path)
    assert run.is_finished
    assert run.seconds_per_iteration() == 0.25
    assert open_run(tmp_path).is_finished
    assert [record.getMessage() for record in caplog.records] == [
        f"{metrics}: 1 broken lines are left out, as a crash of a training leaves them."
    ]


def test_bytes_that_are_no_text_do_not_hide_the_other_records(tmp_path):
    metrics = write_run(tmp_path, "shapes", "neither") / "metrics.json"
    metrics.write_bytes(b"\xff\x00\n" + metrics.read_bytes())
    assert open_run(tmp_path).is_finished


@pytest.mark.parametrize("content", [{}, {"bbox": {}, "segm": {}}, {"bbox": {"AP": 3.0}}, {"bbox": 3, "segm": 3}])
def test_results_without_boxes_or_masks_are_none(tmp_path, content):
    folder = write_run(tmp_path, "bdd100k", "maskdino", first_layer=(16.0, 21.0))
    (folder / "inference" / "results.json").write_text(json.dumps(content))
    run = open_run(tmp_path, "maskdino", "bdd100k")
    assert (run.status, run.is_finished, run.layers(), run.speed()) == ("not evaluated", False, [], {})
    assert run.results(FIGURE1) == (None,) * 6


@pytest.mark.parametrize("content", ['{"bbox": {"AP": 3', "", "\x00", "3"])
@pytest.mark.parametrize("name", ["results.json", "layers.json", "speed.json"])
def test_a_file_of_results_that_is_broken_is_named_with_what_to_do(tmp_path, name, content):
    file = write_run(tmp_path, "bdd100k", "maskdino", first_layer=(16.0, 21.0)) / "inference" / name
    file.write_text(content)
    run = open_run(tmp_path, "maskdino", "bdd100k")
    with pytest.raises(UserError, match=r"Remove it|evaluate the run by stage") as error:
        run.results(FIGURE1)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([3], "holds 3, which is no result of a stage"),
        ([{"box_AP": 1.0}], "which is no result of a stage"),
        ([stage("layer.x", 1.0, 2.0)], r"'layer\.x'.*which is no result of a stage"),
        ([{"stage": "layer.0", "box_AP": 1.0, "gap": 1.0}], r"has no number mask_AP of stage layer\.0"),
        ([{**stage("layer.0", 1.0, 2.0), "gap": "-1"}], r"has no number gap of stage layer\.0"),
    ],
)
def test_rows_that_are_no_stages_are_refused(tmp_path, rows, words):
    file = tmp_path / "layers.json"
    file.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=words) as error:
        read_stages(file)
    assert str(file) in str(error.value)


def test_every_stage_of_an_evaluation_is_known(tmp_path):
    rows = [stage(name, 1.0, 2.0) for name in ("interm", "selection.2", "initial", "layer.0", "layer.11")]
    (tmp_path / "layers.json").write_text(json.dumps(rows))
    assert read_stages(tmp_path / "layers.json") == rows


def test_seconds_are_the_median_of_the_iterations(tmp_path):
    folder = write_run(tmp_path, "shapes", "neither", done=300, evaluated=False)
    lines = [{"iteration": i, "time": time} for i, time in enumerate((9.0, 0.4, 0.5))]
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert open_run(tmp_path).seconds_per_iteration() == 0.5


def test_results_by_stage_are_those_of_the_first_and_the_last_decoder_layer(tmp_path):
    write_run(tmp_path, "bdd100k", "maskdino", box=28.0, mask=25.0, first_layer=(16.0, 21.0))
    results = open_run(tmp_path, "maskdino", "bdd100k").results(FIGURE1)
    assert results == (16.0, 21.0, -5.0, 28.0, 25.0, 3.0)


def test_results_by_stage_of_an_earlier_checkpoint_are_not_taken(tmp_path):
    folder = write_run(tmp_path, "bdd100k", "maskdino", box=28.0, mask=25.0, first_layer=(16.0, 21.0))
    earlier = [stage("layer.0", 10.0, 11.0), stage("layer.1", 12.0, 13.0)]
    (folder / "inference" / "layers.json").write_text(json.dumps(earlier))
    run = open_run(tmp_path, "maskdino", "bdd100k")
    assert run.is_finished
    assert run.layers() == []
    assert run.results(FIGURE1) == (None,) * 6


def test_stages_of_another_evaluation_than_the_results_beside_them_are_refused_with_what_to_run(tmp_path):
    folder = write_run(tmp_path, "bdd100k", "maskdino", box=28.0, mask=25.0, first_layer=(16.0, 21.0))
    earlier = [stage("layer.0", 10.0, 11.0), stage("layer.1", 12.0, 13.0)]
    file, results = (folder / "inference" / name for name in ("layers.json", "results.json"))
    file.write_text(json.dumps(earlier))
    for path in (folder, file):
        with pytest.raises(UserError, match=r"layers\.json is of another evaluation .*--eval-only .*--eval-layers all"):
            read_stages(path)
    by_stage = {f"{row['stage']}/{key}": row[key] for row in earlier for key in ("box_AP", "mask_AP", "gap")}
    results.write_text(json.dumps({**json.loads(results.read_text()), "layers": by_stage}))
    assert read_stages(folder) == earlier
    results.unlink()
    assert read_stages(folder) == earlier


def test_a_run_of_another_configuration_is_refused_with_the_keys_that_differ(tmp_path):
    write_run(tmp_path, "shapes", "neither", options=("SOLVER.MAX_ITER", "20", "MODEL.MaskDINO.DN_NUM", "7"))
    message = r"neither\.yaml.*MODEL\.MaskDINO\.DN_NUM is 7 there and 40 here; SOLVER\.MAX_ITER is 20 there and "
    message += str(HALF_DEMO)
    with pytest.raises(ConfigError, match=message):
        open_run(tmp_path)


def test_the_options_that_a_run_was_made_with_open_it(tmp_path):
    options = ("SOLVER.MAX_ITER", "20")
    write_run(tmp_path, "shapes", "neither", options=options)
    assert open_run(tmp_path, options=options).is_finished


@pytest.mark.parametrize(
    "options",
    [
        ("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0"),
        ("TEST.EVAL_LAYERS", "['all']", "TEST.EVAL_PERIOD", "7"),
        ("DATASETS.SHAPES.ROOT", "elsewhere"),
    ],
    ids=str,
)
def test_where_and_how_a_run_was_made_does_not_matter(tmp_path, options):
    write_run(tmp_path, "shapes", "neither", options=options)
    assert open_run(tmp_path).is_finished


def test_weights_may_lie_elsewhere_but_not_be_others(tmp_path):
    write_run(tmp_path, "coco", "neither", options=("MODEL.WEIGHTS", "/data/R-50.pkl"))
    assert open_run(tmp_path, dataset="coco").is_finished
    write_run(tmp_path / "other", "coco", "neither", options=("MODEL.WEIGHTS", ""))
    with pytest.raises(ConfigError, match=r"MODEL\.WEIGHTS is '' there and 'R-50\.pkl' here"):
        open_run(tmp_path / "other", dataset="coco")


def test_a_key_that_the_run_did_not_know_had_its_default_there(tmp_path):
    path = write_run(tmp_path, "shapes", "neither") / "config.yaml"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if "SINGLE_DELTA_BOXES" not in line) + "\nNEWER: 1\n")
    assert open_run(tmp_path).is_finished
    path.write_text(path.read_text().replace("RANDOM_POSITION: false", "RANDOM_POSITION: true"))
    with pytest.raises(ConfigError, match="RANDOM_POSITION is True there and False here"):
        open_run(tmp_path)


def test_a_folder_in_which_nothing_was_trained_may_hold_any_configuration(tmp_path):
    folder = write_run(tmp_path, "shapes", "neither", options=("MODEL.MaskDINO.DN_NUM", "7"))
    (folder / "last_checkpoint").unlink()
    with pytest.raises(ConfigError, match="DN_NUM"):
        open_run(tmp_path)
    (folder / "metrics.json").unlink()
    assert open_run(tmp_path).status == "not run"


def test_many_differences_are_counted_not_listed(tmp_path):
    folder = write_run(tmp_path, "shapes", "neither")
    (folder / "config.yaml").write_text("VERSION: 2\n")
    with pytest.raises(ConfigError, match=r"; and \d+ more\. Give its options"):
        open_run(tmp_path)


def test_stages_are_read_from_a_run_or_a_file_and_said_how_to_make_where_there_are_none(tmp_path):
    folder = write_run(tmp_path, "shapes", "neither", first_layer=(1.0, 2.0))
    stages = read_stages(folder)
    assert stages == read_stages(folder / "inference" / "layers.json")
    assert [row["stage"] for row in decoder_layers(stages)] == ["layer.0", "layer.1"]
    with pytest.raises(UserError, match="layers.json does not exist.*--eval-layers all"):
        read_stages(tmp_path)
