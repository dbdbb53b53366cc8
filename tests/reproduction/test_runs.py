"""What a run's folder says about it."""

import json

import pytest

from dimaskdino.config import read_yaml
from dimaskdino.errors import ConfigError, UserError
from dimaskdino.reproduction.runs import decoder_layers, read_stages, seconds_per_iteration
from dimaskdino.reproduction.tables import paper_tables
from tests.reproduction.fakes import CONFIGS, open_run, stage, write_run

HALF_DEMO = read_yaml(str(CONFIGS / "ablation" / "shapes" / "dimaskdino.yaml"))["SOLVER"]["MAX_ITER"]
TABLE1, TABLE4, FIGURE1 = (paper_tables()[name] for name in ("table1", "table4", "figure1"))


def test_a_run_is_named_after_its_dataset_and_file(tmp_path):
    run = open_run(tmp_path, "dimaskdino", "coco")
    assert (run.name, run.folder) == ("coco/dimaskdino_r50_12ep", tmp_path / "coco" / "dimaskdino_r50_12ep")


def test_each_seed_has_a_folder_and_a_configuration(tmp_path):
    run = open_run(tmp_path, "dimaskdino", "coco", seed=3)
    assert (run.folder.name, run.cfg.SEED, run.options) == ("dimaskdino_r50_12ep_seed3", 3, ("SEED", "3"))
    write_run(tmp_path, "coco", "dimaskdino", seed=2).rename(run.folder)
    with pytest.raises(ConfigError, match="SEED is 2 there and 3 here"):
        open_run(tmp_path, "dimaskdino", "coco", seed=3)


def test_a_missing_folder_is_a_run_not_started(tmp_path):
    run = open_run(tmp_path)
    assert (run.status, run.iterations_done, run.iterations_left) == ("not run", 0, HALF_DEMO)
    assert run.results(TABLE4) == (None, None)
    assert not run.has_checkpoint
    assert seconds_per_iteration(run.folder) is None


def test_an_interrupted_run_counts_its_last_checkpoint(tmp_path):
    write_run(tmp_path, "shapes", "neither", done=300, evaluated=False)
    run = open_run(tmp_path)
    assert (run.status, run.iterations_left, run.has_checkpoint) == (
        f"stopped at 300 of {HALF_DEMO}",
        HALF_DEMO - 300,
        True,
    )
    assert run.results(TABLE4) == (None, None)


def test_an_intermediate_evaluation_does_not_finish_a_run(tmp_path):
    write_run(tmp_path, "shapes", "neither", done=600, evaluated=True)
    assert open_run(tmp_path).status == f"stopped at 600 of {HALF_DEMO}"


def test_a_run_without_its_last_evaluation_is_not_finished(tmp_path):
    write_run(tmp_path, "shapes", "neither", evaluated=False)
    run = open_run(tmp_path)
    assert (run.status, run.iterations_left, run.is_finished) == ("not evaluated", 0, False)


def test_a_finished_run_has_the_metrics_of_a_table(tmp_path):
    write_run(tmp_path, "coco", "dimaskdino_r50_12ep", box=46.94, mask=42.3)
    run = open_run(tmp_path, "dimaskdino", "coco")
    assert (run.status, run.iterations_left) == ("finished", 0)
    assert run.results(TABLE4) == (46.94, 42.3)
    assert run.results(TABLE1) == pytest.approx((46.94, 45.94, 47.94, 48.94, 42.3, 41.3, 43.3, 44.3, 7.5))


def test_a_run_without_a_speed_has_the_other_results(tmp_path):
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


def test_a_cut_off_line_is_skipped(tmp_path):
    folder = write_run(tmp_path, "shapes", "neither", done=300, evaluated=False, seconds=0.25)
    with (folder / "metrics.json").open("a") as file:
        file.write('{"iteration": 59, "time": 9')
    assert seconds_per_iteration(folder) == 0.25


def test_a_record_joined_to_a_cut_one_is_skipped(tmp_path):
    folder = write_run(tmp_path, "shapes", "neither", seconds=0.25)
    metrics = folder / "metrics.json"
    joined = '{"iteration": 49, "time": 9, "bbox/AP": 3{"iteration": 59, "time": 9, "bbox/AP": 4}\n'
    metrics.write_text(joined + metrics.read_text())
    run = open_run(tmp_path)
    assert run.is_finished
    assert seconds_per_iteration(run.folder) == 0.25


def test_invalid_utf8_does_not_hide_other_records(tmp_path):
    metrics = write_run(tmp_path, "shapes", "neither") / "metrics.json"
    metrics.write_bytes(b"\xff\x00\n" + metrics.read_bytes())
    assert open_run(tmp_path).is_finished


def test_results_of_boxes_alone_finish_a_run(tmp_path):
    folder = write_run(tmp_path, "coco", "dimaskdino", box=40.0)
    (folder / "inference" / "results.json").write_text(json.dumps({"bbox": {"AP": 40.0}}))
    assert open_run(tmp_path, "dimaskdino", "coco").results(TABLE4) == (40.0, None)


@pytest.mark.parametrize("content", [{}, {"layers": {}}, {"bbox": 3, "segm": 3}])
def test_results_without_scores_do_not_finish_a_run(tmp_path, content):
    folder = write_run(tmp_path, "bdd100k", "maskdino", first_layer=(16.0, 21.0))
    (folder / "inference" / "results.json").write_text(json.dumps(content))
    run = open_run(tmp_path, "maskdino", "bdd100k")
    assert (run.status, run.is_finished, run.layers(), run.speed()) == ("not evaluated", False, [], {})
    assert run.results(FIGURE1) == (None,) * 6


@pytest.mark.parametrize("content", ['{"bbox": {"AP": 3', "3"])
@pytest.mark.parametrize("name", ["results.json", "layers.json", "speed.json"])
def test_a_broken_result_file_is_named_with_a_remedy(tmp_path, name, content):
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
        ([3], "holds 3, which is not the result of a stage"),
        ([{"box_AP": 1.0}], "which is not the result of a stage"),
        ([stage("layer.x", 1.0, 2.0)], r"'layer\.x'.*which is not the result of a stage"),
        ([{"stage": "layer.0", "box_AP": 1.0, "gap": 1.0}], r"has no number mask_AP for stage layer\.0"),
        ([{**stage("layer.0", 1.0, 2.0), "gap": "-1"}], r"has no number gap for stage layer\.0"),
    ],
)
def test_rows_that_are_not_stages_are_refused(tmp_path, rows, words):
    file = tmp_path / "layers.json"
    file.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=words) as error:
        read_stages(file)
    assert str(file) in str(error.value)


def test_every_stage_can_be_read(tmp_path):
    rows = [stage(name, 1.0, 2.0) for name in ("interm", "selection.2", "initial", "layer.0", "layer.11")]
    (tmp_path / "layers.json").write_text(json.dumps(rows))
    assert read_stages(tmp_path / "layers.json") == rows


def test_seconds_are_the_median_of_the_iterations(tmp_path):
    folder = write_run(tmp_path, "shapes", "neither", done=300, evaluated=False)
    lines = [{"iteration": i, "time": time} for i, time in enumerate((9.0, 0.4, 0.5))]
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert seconds_per_iteration(folder) == 0.5


def test_results_by_layer_are_of_the_first_and_the_last(tmp_path):
    write_run(tmp_path, "bdd100k", "maskdino", box=28.0, mask=25.0, first_layer=(16.0, 21.0))
    results = open_run(tmp_path, "maskdino", "bdd100k").results(FIGURE1)
    assert results == (16.0, 21.0, -5.0, 28.0, 25.0, 3.0)


def test_results_by_layer_of_an_earlier_checkpoint_are_ignored(tmp_path):
    folder = write_run(tmp_path, "bdd100k", "maskdino", box=28.0, mask=25.0, first_layer=(16.0, 21.0))
    earlier = [stage("layer.0", 10.0, 11.0), stage("layer.1", 12.0, 13.0)]
    (folder / "inference" / "layers.json").write_text(json.dumps(earlier))
    run = open_run(tmp_path, "maskdino", "bdd100k")
    assert run.is_finished
    assert run.layers() == []
    assert run.results(FIGURE1) == (None,) * 6


def test_stages_of_another_evaluation_are_refused(tmp_path):
    folder = write_run(tmp_path, "bdd100k", "maskdino", box=28.0, mask=25.0, first_layer=(16.0, 21.0))
    earlier = [stage("layer.0", 10.0, 11.0), stage("layer.1", 12.0, 13.0)]
    file, results = (folder / "inference" / name for name in ("layers.json", "results.json"))
    file.write_text(json.dumps(earlier))
    for path in (folder, file):
        with pytest.raises(
            UserError, match=r"layers\.json comes from another evaluation .*--eval-only .*--eval-layers all"
        ):
            read_stages(path)
    by_stage = {f"{row['stage']}/{key}": row[key] for row in earlier for key in ("box_AP", "mask_AP", "gap")}
    results.write_text(json.dumps({**json.loads(results.read_text()), "layers": by_stage}))
    assert read_stages(folder) == earlier
    results.unlink()
    assert read_stages(folder) == earlier


def test_another_configuration_is_refused_with_its_keys(tmp_path):
    write_run(tmp_path, "shapes", "neither", options=("SOLVER.MAX_ITER", "20", "MODEL.MaskDINO.DN_NUM", "7"))
    message = r"neither\.yaml.*MODEL\.MaskDINO\.DN_NUM is 7 there and 40 here; SOLVER\.MAX_ITER is 20 there and "
    message += str(HALF_DEMO)
    with pytest.raises(ConfigError, match=message):
        open_run(tmp_path)


def test_a_run_opens_with_its_options(tmp_path):
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
def test_where_a_run_was_made_does_not_matter(tmp_path, options):
    write_run(tmp_path, "shapes", "neither", options=options)
    assert open_run(tmp_path).is_finished


def test_weights_may_move_but_not_change(tmp_path):
    write_run(tmp_path, "coco", "neither", options=("MODEL.WEIGHTS", "/data/R-50.pkl"))
    assert open_run(tmp_path, dataset="coco").is_finished
    write_run(tmp_path / "other", "coco", "neither", options=("MODEL.WEIGHTS", ""))
    with pytest.raises(ConfigError, match=r"MODEL\.WEIGHTS is '' there and 'R-50\.pkl' here"):
        open_run(tmp_path / "other", dataset="coco")


def test_a_key_newer_than_the_run_had_its_default(tmp_path):
    path = write_run(tmp_path, "shapes", "neither") / "config.yaml"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if "SINGLE_DELTA_BOXES" not in line) + "\nNEWER: 1\n")
    assert open_run(tmp_path).is_finished
    path.write_text(path.read_text().replace("RANDOM_POSITION: false", "RANDOM_POSITION: true"))
    with pytest.raises(ConfigError, match="RANDOM_POSITION is True there and False here"):
        open_run(tmp_path)


def test_a_folder_without_training_may_hold_any_configuration(tmp_path):
    folder = write_run(tmp_path, "shapes", "neither", options=("MODEL.MaskDINO.DN_NUM", "7"))
    (folder / "last_checkpoint").unlink()
    with pytest.raises(ConfigError, match="DN_NUM"):
        open_run(tmp_path)
    (folder / "metrics.json").unlink()
    assert open_run(tmp_path).status == "not run"


def test_many_differences_are_counted(tmp_path):
    folder = write_run(tmp_path, "shapes", "neither")
    (folder / "config.yaml").write_text("VERSION: 2\n")
    with pytest.raises(ConfigError, match=r"; and \d+ more\. .*--output"):
        open_run(tmp_path)


def test_stages_are_read_from_a_run_or_a_file(tmp_path):
    folder = write_run(tmp_path, "shapes", "neither", first_layer=(1.0, 2.0))
    stages = read_stages(folder)
    assert stages == read_stages(folder / "inference" / "layers.json")
    assert [row["stage"] for row in decoder_layers(stages)] == ["layer.0", "layer.1"]
    with pytest.raises(UserError, match="layers.json does not exist.*--eval-layers all"):
        read_stages(tmp_path)
