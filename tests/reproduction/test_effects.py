"""Effects of modules, and intervals of differences."""

import csv
import io
import json

import pytest
from detectron2.data import MetadataCatalog
from pycocotools import mask as mask_util

from dimaskdino.data.datasets import register_all
from dimaskdino.data.datasets.registration import load_dataset
from dimaskdino.reproduction.effects import Effect, ap_interval, contrast, effects, effects_csv, effects_markdown
from dimaskdino.reproduction.report import compare, markdown, to_csv
from dimaskdino.reproduction.tables import paper_tables
from tests.reproduction.fakes import open_run, write_run
from tests.reproduction.test_report import cells, runs_of

TABLE = paper_tables()["interaction"]
# Mean box AP of the rows: 11, 14 with DI, 12 with BATO, 17 with both; each row's variance is 2.
ROWS = {"neither": 10.0, "di_only": 13.0, "bato_only": 11.0, "dimaskdino": 16.0}
T_OF_4 = 2.776445  # Student's t, two-sided 95%, 4 degrees of freedom


@pytest.fixture
def found(tmp_path) -> dict[tuple[str, str], Effect]:
    for row, box in ROWS.items():
        for seed in (1, 2):
            write_run(tmp_path, "coco", row, box=box + 2 * (seed - 1), mask=30.0, seed=seed)
    listed = effects(TABLE, "coco", runs_of(TABLE, "coco", tmp_path, seeds=(1, 2)))
    return {(effect.name, effect.metric): effect for effect in listed}


@pytest.mark.parametrize(
    ("name", "ours", "margin", "paper"),
    [
        # (3 + 5) / 2; the error is the root of variance 2 times 4 rows times (1/2)^2 over 2 seeds.
        ("DI", 4.0, T_OF_4 * 1, 0.75),
        ("BATO", 2.0, T_OF_4 * 1, 0.55),
        # 5 - 3; four rows of weight 1.
        ("DI x BATO", 2.0, T_OF_4 * 2, -0.1),
    ],
)
def test_effects_and_their_intervals_over_seeds(found, name, ours, margin, paper):
    effect = found[name, "bbox/AP"]
    assert effect.ours == pytest.approx(ours)
    assert effect.margin == pytest.approx(margin, rel=1e-5)
    assert effect.paper == pytest.approx(paper)


def test_equal_runs_have_no_effect(found):
    assert (found["DI", "segm/AP"].ours, found["DI", "segm/AP"].margin) == (0.0, 0.0)


def test_tables_show_effects_intervals_and_the_papers(found):
    text = effects_markdown(TABLE, "coco", list(found.values()))
    assert ["DI", "box AP", "+4.00", "[+1.22, +6.78]", "+0.75"] in cells(text)
    assert "DI-MaskDINO, Table 4: Effects of the main modules, on COCO" in text
    record = next(csv.DictReader(io.StringIO(effects_csv(TABLE, "coco", list(found.values())))))
    assert (record["effect"], record["ours"], record["margin"], record["paper"]) == ("DI", "4.00", "2.78", "0.75")


def test_missing_runs_and_single_seeds_leave_gaps(tmp_path):
    assert contrast([[1.0], []], [1.0, -1.0]) == (None, None)
    assert contrast([[3.0], [1.0]], [1.0, -1.0]) == (2.0, None)
    listed = effects(TABLE, "coco", runs_of(TABLE, "coco", tmp_path))
    assert {effect.ours for effect in listed} == {None}
    assert "| –" in effects_markdown(TABLE, "coco", listed)


SMALL = ("DATASETS.SHAPES.NUM_TRAIN", "1", "DATASETS.SHAPES.NUM_VAL", "12", "DATASETS.SHAPES.IMAGE_SIZE", "64")


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> tuple[str, ...]:
    return (*SMALL, "DATASETS.SHAPES.ROOT", str(tmp_path_factory.mktemp("shapes")))


def rle(segmentation: list[list[float]] | dict) -> dict:
    """A mask as results hold it."""
    if isinstance(segmentation, dict):
        return segmentation
    mask = mask_util.merge(mask_util.frPyObjects(segmentation, 64, 64))
    return {"size": mask["size"], "counts": mask["counts"].decode()}


def write_predictions(output, row: str, options, shift_px: float) -> None:
    """A finished run that finds every object of shapes_val, some px too far right."""
    folder = write_run(output, "shapes", row, options=options, box=50.0)
    register_all(cfg=open_run(output, row, options=options).cfg)
    load_dataset("shapes_val")
    with open(MetadataCatalog.get("shapes_val").json_file) as file:
        objects = json.load(file)["annotations"]
    found = [
        {
            "image_id": each["image_id"],
            "category_id": each["category_id"],
            "bbox": [each["bbox"][0] + shift_px * (number % 3), *each["bbox"][1:]],
            "segmentation": rle(each["segmentation"]),
            "score": 0.9,
        }
        for number, each in enumerate(objects)
    ]
    (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(found))


def test_interval_of_better_boxes_excludes_zero(tmp_path, options):
    write_predictions(tmp_path, "neither", options, shift_px=2.0)
    write_predictions(tmp_path, "di_only", options, shift_px=0.0)
    first, other = (open_run(tmp_path, row, options=options) for row in ("neither", "di_only"))
    low, high = ap_interval(first, other, "bbox/AP")
    assert 5 < low < high < 95
    assert ap_interval(other, first, "bbox/AP") == pytest.approx((-high, -low), abs=1.0)
    assert ap_interval(first, other, "segm/AP") == (0.0, 0.0)
    assert ap_interval(first, other, "bbox/AP50") is None


def test_runs_without_predictions_have_no_interval(tmp_path, options):
    write_predictions(tmp_path, "neither", options, shift_px=0.0)
    write_run(tmp_path, "shapes", "di_only", options=options)
    runs = [open_run(tmp_path, row, options=options) for row in ("neither", "di_only")]
    assert ap_interval(*runs, "bbox/AP") is None


def test_intervals_stand_under_a_table_of_single_runs_alone(tmp_path):
    table = paper_tables()["table6"]
    for seed in (None, 1, 2):
        write_run(tmp_path, "bdd100k", "no_gtg", box=30.0, seed=seed)
        write_run(tmp_path, "bdd100k", "dimaskdino", box=31.0, seed=seed)

    def interval_of(first, other, metric):
        assert first.experiment.name == "no_gtg"
        return (0.25, 1.75) if metric == "bbox/AP" else None

    rows = compare(table, "bdd100k", runs_of(table, "bdd100k", tmp_path), interval_of)
    assert cells(markdown(table, "bdd100k", rows).split("Change against")[1]) == [["yes", "+1.0 [+0.2, +1.8]"]]
    record = list(csv.DictReader(io.StringIO(to_csv(table, "bdd100k", rows))))[1]
    assert (record["box AP change at least"], record["box AP change at most"]) == ("0.2", "1.8")
    seeds = compare(table, "bdd100k", runs_of(table, "bdd100k", tmp_path, seeds=(1, 2)), interval_of)
    assert "Change against" not in markdown(table, "bdd100k", seeds)
