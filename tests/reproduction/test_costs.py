"""What runs cost, and their scores over epochs."""

import json
import os

import pytest
import torch

from dimaskdino.errors import UserError
from dimaskdino.layers.padding import PaddedBatch
from dimaskdino.reproduction.costs import cost_table, hours_left, images_left, measure_folder, speeds
from dimaskdino.reproduction.epochs import (
    Curve,
    average_top_k,
    distance_curves,
    draw_curves,
    measure_run,
    object_distances,
    score_curve,
)
from tests.reproduction.fakes import open_run, write_run
from tests.tiny_model import image, instances, tiny_dino


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


@pytest.fixture
def run(tmp_path):
    """A run on shapes of 2,000 images in batches of 8, that is 250 iterations an epoch, evaluated three times."""
    cfg = open_run(tmp_path).cfg
    (tmp_path / "config.yaml").write_text(cfg.dump())
    records = [(249, 10.0), (499, 20.0), (499, 21.0), (1249, None)]
    lines = [{"iteration": 19, "total_loss": 3.0}] + [{"iteration": i + 1, "bbox/AP": score} for i, score in records]
    (tmp_path / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_scores_are_by_epoch_and_repeats_count_once(run):
    curve = score_curve(run, "mine", "bbox/AP")
    assert list(zip(curve.epochs, curve.scores, strict=True)) == [(1.0, 10.0), (2.0, 21.0)]  # null is left out
    assert score_curve(run, "mine", "bbox/AP", epoch_images=4000).epochs == [0.5, 1.0]


def test_a_score_that_was_not_measured_is_named(run, tmp_path):
    with pytest.raises(UserError, match="segm/AP.*TEST.EVAL_PERIOD"):
        score_curve(run, "mine", "segm/AP")
    with pytest.raises(UserError, match="metrics.json"):
        score_curve(tmp_path / "nowhere", "mine", "bbox/AP")


def test_curves_are_drawn_with_their_scores(tmp_path):
    curve = Curve("mine", [1.0, 2.0], [10.0, 20.0])
    draw_curves({"bbox/AP": [curve], "ATD(100) on small objects": [curve]}, tmp_path / "curves.svg")
    text = (tmp_path / "curves.svg").read_text()
    for expected in ("epoch", "bbox/AP", "ATD(100) on small objects", "mine"):
        assert f"<!-- {expected} -->" in text


def test_the_average_is_over_the_largest_distances():
    assert average_top_k([0.1, 0.4, 0.2, 0.3], 2) == pytest.approx(0.35)
    assert average_top_k([0.1, 0.3], 100) == pytest.approx(0.2)
    with pytest.raises(UserError):
        average_top_k([], 3)


def test_distances_are_from_the_matched_queries_first_boxes():
    model = tiny_dino()
    objects = instances(64, 96, [[0, 0, 24, 32], [48, 16, 96, 64]])
    model.criterion.matcher = lambda stages, targets: [[(torch.tensor([5, 2]), torch.tensor([1, 0]))]]
    # In the original image the objects have 675 and 2025 px.
    given = {"image": image(64, 96), "instances": objects, "height": 60, "width": 90}
    (found,) = object_distances(model, [given])
    with torch.no_grad():
        batch = model._preprocess([given])
        features = model.backbone(batch.tensor)
        output = model.sem_seg_head(features, batch=PaddedBatch(batch.image_sizes, tuple(batch.tensor.shape[-2:])))
    selected = output.stages[0].boxes[0, [5, 2]]  # of the first selection: mixed selection starts from these
    boxes = torch.tensor([[0.75, 40 / 64, 0.5, 0.75], [0.125, 0.25, 0.25, 0.5]])  # cxcywh of the second and the first
    torch.testing.assert_close(found.distance, (selected - boxes).abs().sum(1))
    assert found.is_small.tolist() == [False, True]
    assert not model.sem_seg_head.predictor._forward_hooks


def test_a_run_of_another_model_is_refused(run):
    with pytest.raises(UserError, match="MODEL.META_ARCHITECTURE"):
        measure_run(run)


def test_measured_checkpoints_give_curves(run, monkeypatch):
    measured = {"model_0000249": {"all": [0.5, 0.3, 0.1], "small": [0.3]}, "model_0000499": {"all": [0.4], "small": []}}
    monkeypatch.setattr("dimaskdino.reproduction.epochs.measure_run", lambda folder, progress: measured)
    curves = distance_curves(run, "mine", 2)
    assert (curves["all"].epochs, curves["all"].scores) == ([1.0, 2.0], pytest.approx([0.4, 0.4]))
    assert (curves["small"].epochs, curves["small"].scores) == ([1.0], [0.3])
