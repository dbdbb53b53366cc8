import json
import os
import re
import sys
import threading
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file

from dimaskdino import Predictor
from dimaskdino.errors import UserError
from dimaskdino.prediction import records
from tests.data_pipeline.scripts import REPO
from tests.tiny_model import TINY_DINO, tiny_cfg, tiny_model

SIZES = {
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 64,
    "INPUT.FORMAT": "RGB",
    "DATASETS.TRAIN": ("shapes_train",),
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 6,
}
ALL = ["--score", "0", "--device", "cpu"]


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    """Arguments of a job on four pictures, one of which cannot be read."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(tiny_cfg(SIZES).dump())
    torch.save({"model": tiny_model(SIZES).state_dict()}, tmp_path / "run" / "model_final.pth")
    (tmp_path / "in").mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{number}.png")
    (tmp_path / "in" / "2.png").write_bytes(b"")
    return [str(tmp_path / "in"), "--weights", str(tmp_path / "run"), "--output", str(tmp_path / "out"), *ALL]


def read(tmp_path: Path) -> list[dict]:
    return json.loads((tmp_path / "out" / "coco_results.json").read_text())


def test_a_folder_is_predicted_and_the_bad_file_named(run, job, tmp_path) -> None:
    stem = os.fsdecode(b"3\xe9")  # Latin-1, as old archives have it
    (tmp_path / "in" / "3.png").rename(tmp_path / "in" / f"{stem}.png")
    done = run("tools/predict.py", *job, "--save", "pictures", "coco", "masks", "csv", "--query-features")
    assert done.status == 3
    assert "2.png" in done.err
    assert {result["image_id"] for result in read(tmp_path)} == {1, 2, 4}
    for kind, suffix in (("pictures", "jpg"), ("masks", "png"), ("features", "safetensors")):
        names = sorted(path.name for path in (tmp_path / "out" / kind).iterdir())
        assert names == [f"{i}.{suffix}" for i in (0, 1, stem)]
    assert load_file(tmp_path / "out" / "features" / "0.safetensors")["query_features"].shape == (6, 64)
    assert len((tmp_path / "out" / "detections.csv").read_bytes().splitlines()) == 1 + len(read(tmp_path))


def test_a_large_photo_is_no_attack(run, job, monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # the pictures have 4096; PIL refuses twice as many
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        assert run("tools/predict.py", *job).status == 3


def test_processes_share_the_inputs_and_the_last_merges(run, job, tmp_path, monkeypatch) -> None:
    run("tools/predict.py", *job)
    whole = read(tmp_path)
    job[job.index("--output") + 1] = str(tmp_path / "shared")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        assert not (tmp_path / "shared" / "coco_results.json").exists()
        assert "done before" not in run("tools/predict.py", *job).out
    assert json.loads((tmp_path / "shared" / "coco_results.json").read_text()) == whole
    assert len(list((tmp_path / "shared" / "parts").iterdir())) == 2


def test_a_second_run_does_what_is_left(run, job, tmp_path) -> None:
    run("tools/predict.py", *job)
    Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8)).save(tmp_path / "in" / "2.png")
    done = run("tools/predict.py", *job)
    assert done.status == 0
    assert "3 of 4" in done.out
    assert {result["image_id"] for result in read(tmp_path)} == {1, 2, 3, 4}
    torch.save({"model": tiny_model(SIZES, seed=1).state_dict()}, tmp_path / "run" / "model_final.pth")
    done = run("tools/predict.py", *job)  # the run was trained again
    assert done.status == 2
    assert "--overwrite" in done.err
    torch.save({"model": tiny_model(SIZES).state_dict()}, tmp_path / "run" / "model_final.pth")
    assert run("tools/predict.py", *job).status == 0
    (tmp_path / "run" / "config.yaml").write_text(tiny_cfg(SIZES | {"INPUT.MIN_SIZE_TEST": 32}).dump())
    assert run("tools/predict.py", *job).status == 2


def test_files_of_another_folder_are_no_part_of_the_job(run, job, tmp_path, monkeypatch) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "in").symlink_to(tmp_path / "in")
    statuses = []
    for folder in (tmp_path, tmp_path / "other"):
        monkeypatch.chdir(folder)
        statuses.append(run("tools/predict.py", "in", *job[1:]).status)
    assert statuses == [3, 2]


def test_results_that_change_while_they_are_merged_are_merged_again(run, job, tmp_path, monkeypatch) -> None:
    write_coco, merged = records.write_coco, []

    def another_succeeds(of_job, classes) -> None:
        write_coco(of_job, classes)
        merged.append(len(read(tmp_path)))
        found = {"image_id": 9, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}
        number_2 = {"number": 2, "id": 9, "file": "2.png", "height": 1, "width": 1, "results": [found]}
        (tmp_path / "out" / "parts" / "other.jsonl").write_text(json.dumps(number_2) + "\n")

    monkeypatch.setattr(records, "write_coco", another_succeeds)
    run("tools/predict.py", *job)
    assert len(merged) == 2
    assert merged[1] == merged[0] + 1


def test_under_torchrun_a_process_waits_for_the_others(run, job, tmp_path, monkeypatch) -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    torchrun = {"TORCHELASTIC_RUN_ID": 1, "TORCHELASTIC_USE_AGENT_STORE": True, "MASTER_ADDR": "localhost"}
    for name, value in (torchrun | {"MASTER_PORT": store.port, "WORLD_SIZE": 2, "RANK": 0}).items():
        monkeypatch.setenv(name, str(value))
    others = []

    def other() -> None:
        store.wait(["done"], timedelta(seconds=60))
        others.append(store.add("done", 1))
        store.set("all done", "")

    thread = threading.Thread(target=other)
    thread.start()
    done = run("tools/predict.py", *job)
    assert (done.status, others) == (3, [2])
    thread.join()


def test_annotations_give_ids_to_the_images_that_they_mean(run, job, tmp_path) -> None:
    images = [{"file_name": f"{name}.png", "id": number} for number, name in enumerate(("in/0", "b/0", "b/3"))]
    (tmp_path / "a.json").write_text(json.dumps({"images": images}))
    done = run("tools/predict.py", *job, "--annotations", str(tmp_path / "a.json"))
    assert "2 of 4 images are not in" in done.out
    assert {result["image_id"] for result in read(tmp_path)} == {0, 4, 2}
    for given, named in (({"0.png": 1, "1.png": 1}, "in/1.png"), ({"z.png": 1}, "in/0.png"), ({"0.png": []}, "a.json")):
        images = [{"file_name": name, "id": number} for name, number in given.items()]
        (tmp_path / "a.json").write_text(json.dumps({"images": images}))
        done = run("tools/predict.py", *job, "--annotations", str(tmp_path / "a.json"))
        assert done.status == 2
        assert named in done.err


def test_augment_joins_several_views(run, job, tmp_path) -> None:
    run("tools/predict.py", *job)
    plain = read(tmp_path)
    job[job.index("--output") + 1] = str(tmp_path / "augmented")
    done = run("tools/predict.py", *job, "--augment", "--opts", "TEST.AUG.MIN_SIZES", "(64,)")
    assert done.status == 3  # of the file that cannot be read
    joined = json.loads((tmp_path / "augmented" / "coco_results.json").read_text())
    assert len(joined) == len(plain)
    assert max(result["score"] for result in joined) < max(result["score"] for result in plain)


def test_options_choose_what_is_reported(run, job, tmp_path) -> None:
    run("tools/predict.py", *job, "--classes", "star", "ring", "--max-detections", "2", "--boxes-from-masks")
    found = read(tmp_path)
    assert {result["category_id"] for result in found} <= {4, 5}
    assert max(sum(result["image_id"] == image for result in found) for image in range(5)) <= 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--classes", "yak"], "yak"),
        (["--score-class", "yak=0.5"], "yak"),
        (["--weights", "absent"], "absent"),
        (["--output", "{file}"], "file"),
        (["--opts", "INPUT.MIN_SIZE_TST", "3"], "INPUT.MIN_SIZE_TEST"),
        (["--opts", "TEST.DETECTIONS_PER_IMAGE", "0"], "TEST.DETECTIONS_PER_IMAGE"),
        (["--annotations", "{file}"], "file"),
        (["--tile", "64", "--overlap", "2"], "overlap"),
        (["--tile", "64", "--query-features"], "--query-features"),
        (["--overlap", "0.3"], "--tile"),
        (["--save", "geojson"], "--tile"),
        (["--track"], "dimaskdino[track]"),
        (["--query-features"], "--query-features is about images"),
        (["--save", "coco", "masks"], "--save masks is about images"),
        (["--track"], "--track numbers the objects of videos"),
    ],
)
def test_what_the_user_can_fix_is_one_line(run, job, tmp_path, monkeypatch, change, named) -> None:
    monkeypatch.setitem(sys.modules, "trackers", None if "[track]" in named else sys)
    (tmp_path / "file").touch()
    if "images" in named:
        (tmp_path / "in" / "v.mp4").touch()
    done = run("tools/predict.py", *job, *(each.format(file=tmp_path / "file") for each in change))
    assert done.status == 2
    assert named in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "out" / "settings.json").exists()  # so the folder takes the job once it is right


def test_a_model_of_boxes_alone_saves_no_masks(run, job, tmp_path) -> None:
    options = SIZES | TINY_DINO
    (tmp_path / "run" / "config.yaml").write_text(tiny_cfg(options).dump())
    torch.save({"model": tiny_model(options).state_dict()}, tmp_path / "run" / "model_final.pth")
    for flag in (["--save", "masks"], ["--keep-largest"], ["--min-area", "2"], ["--boxes-from-masks"]):
        done = run("tools/predict.py", *job, *flag)
        assert done.status == 2
        assert f"{flag[-1]} needs a model with masks" in done.err or f"{flag[0]} needs a model with masks" in done.err
    segments = ["MODEL.MaskDINO.TEST.INSTANCE_ON", "False", "MODEL.MaskDINO.TEST.SEMANTIC_ON", "True"]
    assert run("tools/predict.py", *job, "--query-features").status == 3  # one picture cannot be read
    assert load_file(tmp_path / "out" / "features" / "0.safetensors")["query_features"].shape[1] == 64
    for flag in (["--query-features"], ["--max-detections", "3"]):
        done = run("tools/predict.py", *job, *flag, "--opts", *segments)
        assert done.status == 2
        assert done.err.splitlines()[-1].startswith(f"error: {flag[0]} needs a model of objects")


def test_segments_follow_the_classes_of_the_command_line(run, job, tmp_path) -> None:
    on = {"INSTANCE_ON": "False", "PANOPTIC_ON": "True", "OBJECT_MASK_THRESHOLD": "0.0", "OVERLAP_THRESHOLD": "0.0"}
    keys = [each for name, value in on.items() for each in (f"MODEL.MaskDINO.TEST.{name}", value)]
    job += ["--opts", *keys, "MODEL.MaskDINO.THING_CLASSES", "[0, 1]", "--overwrite", "--save", "masks"]
    assert run("tools/predict.py", *job, "--max-detections", "3").status == 2
    counts = []
    for wanted in ([], ["--classes", "star", "--score-class", "star=1"]):
        assert run("tools/predict.py", *job, *wanted).status == 3  # one picture cannot be read
        counts.append(max(np.asarray(Image.open(path)).max() for path in (tmp_path / "out" / "masks").iterdir()))
    assert counts[0] > 0 == counts[1]


def test_the_demo_model_is_used_unless_another_is_named(run, job, tmp_path, monkeypatch) -> None:
    del job[1:3]
    monkeypatch.chdir(tmp_path)
    done = run("tools/predict.py", *job)
    assert done.status == 3
    assert "demo_model.pth" in done.out
    assert {result["image_id"] for result in read(tmp_path)} == {1, 2, 4}
    (tmp_path / "output" / "demo" / "run").mkdir(parents=True)  # of a training that was stopped early
    assert "demo_model.pth" in run("tools/predict.py", *job, "--overwrite").out
    (tmp_path / "output" / "demo" / "run").rmdir()
    (tmp_path / "run").rename(tmp_path / "output" / "demo" / "run")
    done = run("tools/predict.py", *job, "--overwrite")
    assert done.status == 3
    assert "demo_model.pth" not in done.out


def test_the_documentation_names_flags_that_exist(run) -> None:
    known, *of_others = (
        set(re.findall(r"--[a-z-]+", run(f"tools/{tool}.py", "--help").out))
        for tool in ("predict", "benchmark", "ensemble")
    )
    page = (REPO / "docs" / "inference.md").read_text()
    commands = re.findall(r"tools/predict\.py.*", page)
    assert commands
    named = {flag for line in commands for flag in re.findall(r" (--[a-z-]+)", line)} - {"--array", "--wrap"}
    assert named <= known
    assert set(re.findall(r"`(--[a-z-]+)", page)) <= known.union(*of_others)


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
    for name in ("a.png", "b.png", "cut.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:5000])
    images = ["--images", *(tmp_path / name for name in ("a.png", "cut.png", "b.png"))]
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
    assert finished.status == 3, finished.err
    assert [line.count("cut.png") for line in finished.err.strip().splitlines()] == [1, 0]
    sheet = Image.open(tmp_path / "out/sheet.png")
    assert sheet.width == 5 * 108 + 8
    assert sheet.height > 2 * 100
    given[given.index("--output") + 1] = tmp_path / "none.png"
    assert run("tools/compare_runs.py", *given[:2], "--images", tmp_path / "cut.png", *given[6:]).status == 3
    assert not (tmp_path / "none.png").exists()


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
    finished = run("tools/compare_runs.py", *runs, "--images", "a.png", "--output", "sheet.pgn")
    assert finished.status == 2
    assert "sheet.pgn" in finished.err


def test_results_of_a_layer_are_those_of_the_model(runs, pixels) -> None:
    predictor = Predictor(runs[0], device="cpu", score=0.0, layers=["layer.0"])
    found = predictor(pixels)
    earlier = found.at("layer.0")
    assert earlier.class_names
    assert not torch.equal(earlier.instances.scores, found.instances.scores)
    threshold = float(earlier.instances.scores.median())
    kept = Predictor(runs[0], device="cpu", score=threshold, layers="layer.0")(pixels).at("layer.0")
    assert 0 < len(kept.instances) < len(earlier.instances)
    with pytest.raises(UserError, match=r"layer\.1"):
        found.at("layer.1")
