import numpy as np
import pytest
import torch
from PIL import Image

from dimaskdino import Predictor
from dimaskdino.errors import UserError
from tests.cli.test_predict import SIZES
from tests.tiny_model import tiny_cfg, tiny_model


@pytest.fixture
def runs(tmp_path):
    for seed, name in enumerate(("one", "two")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(tiny_cfg(SIZES).dump())
        torch.save({"model": tiny_model(SIZES, seed=seed).state_dict()}, folder / "model_final.pth")
    return [tmp_path / "one", tmp_path / "two"]


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def test_sheet_has_rows_of_images_and_columns_of_layers(run, runs, pixels, tmp_path) -> None:
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    images = ["--images", tmp_path / "a.png", tmp_path / "b.png"]
    given = [
        *runs,
        *images,
        "--width",
        "100",
        "--score",
        "0",
        "--device",
        "cpu",
        "--output",
        tmp_path / "out/sheet.png",
    ]
    finished = run("tools/compare_runs.py", *given)
    assert finished.status == 0, finished.err
    sheet = Image.open(tmp_path / "out/sheet.png")
    assert sheet.width == 5 * 108 + 8
    assert sheet.height > 2 * 100


def test_images_of_a_dataset_stand_beside_their_truth(run, runs, tmp_path) -> None:
    shapes = ["DATASETS.SHAPES.ROOT", tmp_path / "shapes", "DATASETS.SHAPES.NUM_TRAIN", 1, "DATASETS.SHAPES.NUM_VAL", 3]
    given = ["--dataset", "shapes_val", "--number", "1", "--device", "cpu", "--output", tmp_path / "sheet.png"]
    finished = run("tools/compare_runs.py", *runs, *given, "--opts", *shapes)
    assert finished.status == 0, finished.err
    assert (tmp_path / "sheet.png").is_file()


def test_images_or_a_dataset_must_be_named(run, runs) -> None:
    finished = run("tools/compare_runs.py", *runs)
    assert finished.status == 2
    assert "--dataset" in finished.err


def test_results_of_a_layer_are_those_of_the_model(runs, pixels) -> None:
    predictor = Predictor(runs[0], device="cpu", score=0.0, layers=["layer.0"])
    found = predictor(pixels)
    earlier = found.at("layer.0")
    assert earlier.class_names
    assert not torch.equal(earlier.instances.scores, found.instances.scores)
    threshold = float(earlier.instances.scores.median())
    kept = Predictor(runs[0], device="cpu", score=threshold, layers=["layer.0"])(pixels).at("layer.0")
    assert 0 < len(kept.instances) < len(earlier.instances)
    with pytest.raises(UserError, match=r"layer\.1"):
        found.at("layer.1")
