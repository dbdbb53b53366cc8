"""The predictor gives what the model gives, for every form of image and of trained model."""

import json
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image
from pycocotools import mask as mask_util

from dimaskdino import Predictor
from dimaskdino.errors import UserError
from dimaskdino.prediction.outputs import mask_map
from dimaskdino.prediction.refinement import Refinement
from dimaskdino.prediction.results import Classes, Prediction
from dimaskdino.predictor import classes_of
from dimaskdino.structures import FeatureTokens
from tests.checkpoint.test_hub import put
from tests.data_pipeline.conftest import registrations  # noqa: F401  (a fixture)
from tests.data_pipeline.label_maps import write_panoptic
from tests.documentation import example
from tests.tiny_model import TINY_DINO, image, predict, tiny_cfg, tiny_model

SIZES = {"INPUT.MIN_SIZE_TEST": 64, "INPUT.MAX_SIZE_TEST": 64, "INPUT.FORMAT": "BGR"}
NAMES = ["cat", "dog", "cow", "hen", "pig"]
BOXES_ALONE = {"MODEL.MaskDINO.PREDICT_MASKS": False, "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "DeformableEncoder"}
BOXES_ALONE |= {"MODEL.MaskDINO.INITIALIZE_BOX_TYPE": "no", "MODEL.MaskDINO.BATO.ENABLED": False}


def make_run(folder: Path, options: dict | None = None) -> Path:
    options = SIZES | {"DATASETS.TRAIN": ("farm",)} | (options or {})
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(tiny_cfg(options).dump())
    torch.save({"model": tiny_model(options).state_dict()}, folder / "model_final.pth")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    MetadataCatalog.get("farm").set(thing_classes=NAMES)
    yield make_run(tmp_path / "run")
    MetadataCatalog.pop("farm", None)


@pytest.fixture
def pixels() -> np.ndarray:
    """(64, 64, 3) uint8 RGB."""
    return image(64, 64).permute(1, 2, 0).numpy().astype(np.uint8)


def same(one: Prediction, other: Prediction) -> bool:
    found, expected = one.instances, other.instances
    return len(found) == len(expected) and all(
        torch.equal(getattr(value, "tensor", value), getattr(expected.get(name), "tensor", expected.get(name)))
        for name, value in found.get_fields().items()
    )


def test_results_are_those_of_the_model(run, pixels) -> None:
    found = Predictor(run, device="cpu", score=0)(pixels).instances
    (expected,) = predict(tiny_model(SIZES), torch.from_numpy(pixels[..., ::-1].copy()).permute(2, 0, 1))
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.pred_masks, expected.pred_masks)
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_every_form_of_an_image_gives_the_same(run, pixels, tmp_path) -> None:
    predictor = Predictor(run, device="cpu", score=0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = predictor(pixels)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    for form in (tmp_path / "a.png", Image.fromarray(pixels), tensor):
        assert same(predictor(form), expected)
    assert same(predictor(pixels[..., ::-1], channels="BGR"), expected)
    assert same(Predictor(run, device="cpu", score=0, channels="BGR")(pixels[..., ::-1]), expected)
    assert predictor(tmp_path / "a.png").source == str(tmp_path / "a.png")


def test_a_list_of_mixed_sizes_gives_a_result_each(run, pixels) -> None:
    images = [pixels, pixels[:40], pixels[:, :30], pixels[..., 0]]
    one_by_one = Predictor(run, device="cpu", score=0)
    found = one_by_one(images)
    assert all(same(result, one_by_one(each)) for result, each in zip(found, images, strict=True))
    batched = Predictor(run, device="cpu", score=0, batch_size=3)(images)
    assert [result.instances.image_size for result in batched] == [(64, 64), (40, 64), (64, 30), (64, 64)]
    assert all(len(result.instances) == 6 for result in batched)
    assert one_by_one([]) == []


def test_threads_share_a_predictor(run, pixels) -> None:
    predictor = Predictor(run, device="cpu", score=0)
    images = [np.roll(pixels, shift, axis=1) for shift in range(8)]
    expected = predictor(images)
    with ThreadPoolExecutor(4) as pool:
        assert all(map(same, pool.map(predictor, images * 2), expected * 2))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_saved_model_needs_nothing_else(run, pixels, tmp_path, suffix) -> None:
    predictor = Predictor(run, device="cpu", score=0)
    Predictor(run, device="cpu", score=1).save(tmp_path / "files" / f"model{suffix}")  # who loads it says what is kept
    MetadataCatalog.remove("farm")
    loaded = Predictor(tmp_path / "files" / f"model{suffix}", device="cpu", score=0)
    assert loaded.classes.things == NAMES
    assert same(loaded(pixels), predictor(pixels))


def test_a_file_that_cannot_be_written_is_named(run, tmp_path) -> None:
    predictor = Predictor(run, device="cpu")
    for path in (run / "config.yaml" / "model.pth", tmp_path, Path("/proc/absent/model.safetensors")):
        with pytest.raises(UserError, match=re.escape(str(path))):
            predictor.save(path)


def test_a_saved_model_and_weights_may_be_on_the_hub(run, pixels, tmp_path, monkeypatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    predictor = Predictor(run, device="cpu", score=0)
    predictor.save(put(tmp_path / "cache", "model.pth"))
    expected = predictor(pixels)
    assert same(Predictor("hf://owner/model", device="cpu", score=0)(pixels), expected)
    predictor.cfg.MODEL.WEIGHTS = "hf://owner/model/model.pth"
    (tmp_path / "config.yaml").write_text(predictor.cfg.dump())
    assert same(Predictor(tmp_path / "config.yaml", device="cpu", score=0)(pixels), expected)
    with pytest.raises(UserError, match=r"hf://owner/absent: .*HF_HUB_OFFLINE"):
        Predictor("hf://owner/absent")


def test_weights_may_have_an_address(run, pixels, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    handler = partial(SimpleHTTPRequestHandler, directory=str(run))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        loaded = Predictor(run / "config.yaml", Path(f"{address}/model_final.pth"), device="cpu", score=0)
        with pytest.raises(UserError, match=rf"{address}/absent\.pth cannot be fetched .*local file"):
            Predictor(f"{address}/absent.pth")
        server.shutdown()
    assert same(loaded(pixels), Predictor(run, device="cpu", score=0)(pixels))


def test_a_configuration_and_weights_are_a_run(run, pixels) -> None:
    config, weights = run / "config.yaml", run / "model_final.pth"
    expected = Predictor(run, device="cpu", score=0)(pixels)
    assert same(Predictor(config, weights, device="cpu", score=0)(pixels), expected)
    options = ["MODEL.WEIGHTS", str(weights)]
    assert same(Predictor(config, device="cpu", score=0, options=options)(pixels), expected)
    weights.rename(run / "model_0000009.pth")
    (run / "last_checkpoint").write_text("model_0000009.pth")
    assert same(Predictor(run, device="cpu", score=0)(pixels), expected)


def test_what_is_no_model_is_named(run, tmp_path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, named in ((empty, "config.yaml"), (tmp_path / "absent", "absent"), (run / "config.yaml", "WEIGHTS")):
        with pytest.raises(UserError, match=named):
            Predictor(path, device="cpu")
    with pytest.raises(UserError, match="configuration"):
        Predictor(run / "model_final.pth", device="cpu")
    with pytest.raises(UserError, match=r"other\.pth"):
        Predictor(run / "config.yaml", run / "model_final.pth", options=["MODEL.WEIGHTS", "other.pth"], device="cpu")
    (run / "model_final.pth").unlink()
    with pytest.raises(UserError, match="no weights"):
        Predictor(run, device="cpu")


def test_several_views_are_joined_by_key(run, pixels) -> None:
    options = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (64,), "INPUT.MIN_SIZE_TEST", 32]
    # The views are made of the image of the file, so that this one is the image itself.
    expected = Predictor(run, device="cpu", score=0)(pixels)
    assert same(Predictor(run, device="cpu", score=0, options=[*options, "TEST.AUG.FLIP", False])(pixels), expected)
    joined = Predictor(run, device="cpu", score=0, options=options)(pixels)
    assert len(joined.instances) == 6
    assert not same(joined, expected)
    with pytest.raises(UserError, match=r"TEST\.AUG\.ENABLED.*layers"):
        Predictor(run, device="cpu", options=options, layers=["all"])


def test_device_that_is_not_there_is_named(run) -> None:
    with pytest.raises(UserError, match=r"'gpu' cannot be used .*cuda:0"):
        Predictor(run, device="gpu")


def test_unknown_classes_and_channels_are_named(run) -> None:
    with pytest.raises(UserError, match="yak.*cat, dog"):
        Predictor(run, device="cpu", classes=["yak"])
    with pytest.raises(UserError, match="batch_size"):
        Predictor(run, batch_size=0)
    with pytest.raises(UserError, match="channels.*RGB"):
        Predictor(run, device="cpu", channels="rgb")


def test_classes_that_no_dataset_names_have_numbers(run, pixels) -> None:
    options = ["DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]
    predictor = Predictor(run, device="cpu", score=0, options=options)
    assert predictor.classes.things == [f"class {index}" for index in range(5)]
    assert set(predictor(pixels).class_names) <= set(predictor.classes.things)


def test_classes_come_from_an_annotation_file_that_nothing_has_loaded(run, tmp_path) -> None:
    categories = [{"id": 10 * number, "name": name} for number, name in enumerate(NAMES, start=1)]
    (tmp_path / "farm.json").write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    register_coco_instances("unread_farm", {}, str(tmp_path / "farm.json"), str(tmp_path))
    try:
        predictor = Predictor(run, device="cpu", options=["DATASETS.TRAIN", "('unread_farm',)"])
    finally:
        DatasetCatalog.remove("unread_farm")
        MetadataCatalog.remove("unread_farm")
    assert (predictor.classes.things, predictor.classes.category_ids) == (NAMES, [10, 20, 30, 40, 50])


@pytest.mark.usefixtures("registrations")
def test_things_and_stuff_have_the_ids_of_a_panoptic_dataset(tmp_path) -> None:
    own = {"DATASETS.TRAIN": ("panoptic_train",)}
    classes = classes_of(tiny_cfg({**own, **write_panoptic(tmp_path / "set"), "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 3}))
    assert (classes.things, classes.category_ids) == (["cell", "bug", "grass"], [0, 4, 9])
    coco = {"DATASETS.TRAIN": ("coco_2017_train_panoptic",), "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 133}
    classes = classes_of(tiny_cfg(coco))
    assert len(classes.things) == len(classes.category_ids) == 133
    assert (classes.category_ids[79], classes.category_ids[80], classes.category_ids[132]) == (90, 92, 200)


@pytest.mark.usefixtures("registrations")
@pytest.mark.parametrize("things", [[0, 1], []])
def test_a_panoptic_model_does_without_its_data(tmp_path, pixels, things) -> None:
    own = {"DATASETS.TRAIN": ("panoptic_val",), "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 3} | write_panoptic(tmp_path / "set")
    if not things:
        path = tmp_path / "set" / "panoptic.json"
        path.write_text(path.read_text().replace('"isthing": 1', '"isthing": 0'))
    run, saved = make_run(tmp_path / "run", own), tmp_path / "saved.pth"
    on = ["MODEL.MaskDINO.TEST.PANOPTIC_ON", True]
    predictor = Predictor(run, device="cpu", score=0, options=on)
    predictor.save(saved)
    expected = predictor(pixels)["panoptic_seg"][1]
    shutil.rmtree(tmp_path / "set")
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.remove("panoptic_val")
    again = Predictor(saved, device="cpu", score=0)
    assert again(pixels)["panoptic_seg"][1] == expected
    for label, name in enumerate(again.classes.things):
        again.refine = Refinement(score=0, classes=name)
        chosen = again(pixels)
        of_class = [each["id"] for each in expected if each["category_id"] == label]
        assert {each["class"] for each in chosen.to_dict()["segments"]} <= {name}
        assert {0, *of_class} == {0, *np.unique(mask_map(chosen)).tolist()}
    assert again.model.post_processor.is_thing.nonzero().flatten().tolist() == things
    assert again.classes.things == ["cell", "bug", "grass"]
    with pytest.raises(UserError, match=r"panoptic_val is not registered.*THING_CLASSES"):
        Predictor(run, device="cpu", options=on)
    assert Predictor(run, device="cpu", options=[*on, "MODEL.MaskDINO.THING_CLASSES", "[0, 1]"])


def test_classes_come_from_the_weights_where_no_dataset_is_there(run) -> None:
    weights = torch.load(run / "model_final.pth", weights_only=True)
    torch.save({**weights, "class_names": NAMES}, run / "model_final.pth")
    predictor = Predictor(run, device="cpu", options=["DATASETS.TRAIN", "()", "DATASETS.TEST", "()"])
    assert (predictor.classes.things, predictor.classes.category_ids) == (NAMES, [1, 2, 3, 4, 5])


def test_masks_of_rejected_detections_are_not_made(run, pixels) -> None:
    predictor = Predictor(run, device="cpu", score=0)
    scores = predictor(pixels).instances.scores
    middle = float(scores.median())
    chosen = Predictor(run, device="cpu", score=middle)
    assert middle == chosen.cfg.MODEL.MaskDINO.TEST.MIN_SCORE
    assert torch.equal(chosen(pixels).instances.scores, scores[scores >= middle])


@pytest.mark.parametrize("options", [BOXES_ALONE, TINY_DINO], ids=["Mask DINO", "DINO"])
def test_a_model_without_masks_predicts_boxes(tmp_path, pixels, options) -> None:
    found = Predictor(make_run(tmp_path / "boxes", options), device="cpu", score=0, mask_nms=0.9)(pixels)
    assert not found.instances.has("pred_masks")
    assert "segmentation" not in found.to_coco()[0]
    assert "mask" not in found.to_dict()["objects"][0]
    assert found.draw().size == (512, 512)


def test_rle_masks_give_the_same_forms(run, pixels) -> None:
    expected = Predictor(run, device="cpu", score=0)(pixels)
    found = Predictor(run, device="cpu", score=0, options=["MODEL.MaskDINO.TEST.MASK_FORMAT", "rle"])(pixels)
    assert found.to_json() == expected.to_json()
    assert np.array_equal(np.asarray(found.draw()), np.asarray(expected.draw()))


@pytest.mark.parametrize("options", [{}, TINY_DINO | {"INPUT.MAX_SIZE_TEST": 128}], ids=["DI-MaskDINO", "DINO"])
def test_query_features_give_the_class_scores(tmp_path, pixels, options) -> None:
    run = make_run(tmp_path / "run", {**options, "MODEL.MaskDINO.TEST.QUERY_FEATURES": True})
    predictor = Predictor(run, device="cpu", score=0, batch_size=2)
    found = predictor(pixels)
    instances, heads = found.instances, predictor.model.sem_seg_head.predictor.heads
    head = heads[-1].class_embed if options else heads.class_embed
    scores = head(instances.query_features).sigmoid()[torch.arange(len(instances)), instances.pred_classes]
    torch.testing.assert_close(scores, instances.class_scores, atol=1e-6, rtol=0)
    assert (instances.scores <= instances.class_scores).all()
    assert found["image_feature"].shape == (64,)
    if options:  # beside an image of twice its width, half of the tokens are padding
        seen: list[FeatureTokens] = []
        decoder = predictor.model.sem_seg_head.predictor
        with decoder.register_forward_hook(lambda _, given, output: seen.append(output.t_i)):
            beside = predictor([pixels, np.zeros((64, 128, 3), np.uint8)])[0]
        levels = seen[0].tokens[0].split([h * w for h, w in seen[0].spatial_shapes])
        sides = zip(levels, seen[0].spatial_shapes, strict=True)
        inside = torch.cat([level.view(h, w, -1)[:, : w // 2].flatten(0, 1) for level, (h, w) in sides])
        torch.testing.assert_close(beside["image_feature"], inside.mean(0))


def test_json_and_coco_hold_what_was_found(run, pixels) -> None:
    found = Predictor(run, device="cpu", score=0)(pixels)
    content = json.loads(found.to_json())
    assert (content["height"], content["width"]) == (64, 64)
    for number, (item, result) in enumerate(zip(content["objects"], found.to_coco(3), strict=True)):
        assert item["class"] == NAMES[item["class_index"]] == found.class_names[number]
        assert item["score"] == pytest.approx(float(found.instances.scores[number]))
        x0, y0, x1, y1 = item["box"]
        assert result["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=1e-3)
        assert (result["image_id"], result["category_id"]) == (3, item["class_index"] + 1)
        assert np.array_equal(mask_util.decode(item["mask"]), found.instances.pred_masks[number].numpy())


def test_huge_images_are_reduced_for_drawing(run) -> None:
    found = Predictor(run, device="cpu", score=0)(np.zeros((60, 4800, 3), dtype=np.uint8))
    assert found.draw().size == (2400, 30)
    assert found.draw(width=480).size == (480, 6)


def test_tiles_of_one_picture_are_the_picture(run, pixels) -> None:
    whole = Predictor(run, device="cpu", score=0)(pixels)
    tiled = Predictor(run, device="cpu", score=0, tile=64)(pixels)
    # Probabilities inside the masks are summed in another order.
    torch.testing.assert_close(tiled.instances.scores, whole.instances.scores, rtol=1e-6, atol=0)
    assert torch.equal(tiled.instances.pred_masks.tensor, whole.instances.pred_masks)
    assert np.array_equal(np.asarray(tiled.draw()), np.asarray(whole.draw()))


@pytest.mark.parametrize("semantic", [True, False])
def test_tiles_tell_what_they_leave_out(run, semantic, caplog) -> None:
    Predictor(run, device="cpu", tile=64, options=["MODEL.MaskDINO.TEST.SEMANTIC_ON", semantic])
    assert ("SEMANTIC_ON" in caplog.text) == semantic


def test_a_large_picture_is_predicted_in_tiles(run) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (100, 2500, 3), dtype=np.uint8)
    found = Predictor(run, device="cpu", score=0, tile=400, overlap=0.1, batch_size=4, min_area=9)(picture)
    assert found.instances.image_size == (100, 2500)
    assert found.image.shape == (96, 2400, 3)
    assert found.draw().size == (2400, 96)
    assert found.to_dict()["width"] == 2500
    assert float(found.instances.pred_boxes.tensor[:, 2].max()) > 1000


def test_panoptic_and_semantic_results_are_drawn(monkeypatch) -> None:
    ids = torch.zeros(40, 40, dtype=torch.int32)
    ids[:25] = 1
    ids[25:] = 2
    segments = [{"id": 1, "category_id": 1, "isthing": False}, {"id": 2, "category_id": 0, "isthing": True}]
    classes, blank = Classes(["cat"], [1], ["cat", "sky"]), np.full((40, 40, 3), 90, dtype=np.uint8)
    panoptic = Prediction({"panoptic_seg": (ids, segments)}, image=blank, classes=classes)
    assert [segment["class"] for segment in panoptic.to_dict()["segments"]] == ["sky", "cat"]
    semantic = Prediction({"sem_seg": torch.stack((ids == 2, ids == 1)).float()}, image=blank, classes=classes)
    assert np.array_equal(np.asarray(panoptic.draw()), np.asarray(semantic.draw()))
    assert len(np.unique(np.asarray(panoptic.draw()).reshape(-1, 3), axis=0)) > 2
    monkeypatch.setitem(sys.modules, "supervision", MagicMock())
    for form in (panoptic.to_coco, panoptic.to_supervision):
        with pytest.raises(UserError, match="panoptic_seg"):
            form()


def test_the_package_supervision_is_optional(run, pixels, monkeypatch) -> None:
    found = Predictor(run, device="cpu", score=0)(pixels)
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match="supervision.*pip install"):
        found.to_supervision()


def test_supervision_reads_the_result_unchanged(run, pixels) -> None:
    pytest.importorskip("supervision")
    for options in ([], ["MODEL.MaskDINO.TEST.MASK_FORMAT", "rle"]):
        found = Predictor(run, device="cpu", score=0, options=options)(pixels)
        detections = found.to_supervision()
        assert np.array_equal(detections.mask, np.asarray(found.instances.pred_masks))
        assert detections.data["class_name"].tolist() == found.class_names


def test_sahi_slices_images_for_the_predictor(run, pixels) -> None:
    sahi = pytest.importorskip("sahi.models.detectron2")
    from sahi.predict import get_sliced_prediction

    names = {str(index): name for index, name in enumerate(NAMES)}
    model = sahi.Detectron2DetectionModel(load_at_init=False, category_mapping=names, confidence_threshold=0)
    model.model = Predictor(run, device="cpu", score=0)
    found = get_sliced_prediction(pixels, model, slice_height=40, slice_width=40, verbose=0)
    assert {each.category.name for each in found.object_prediction_list} <= set(NAMES)
    assert found.object_prediction_list


def test_the_default_predictor_takes_the_same_run(run, pixels) -> None:
    from detectron2.engine import DefaultPredictor

    predictor = Predictor(run, device="cpu", score=0)
    theirs = DefaultPredictor(predictor.cfg)
    theirs.model.load_state_dict(predictor.model.state_dict())
    found = theirs(pixels[..., ::-1])["instances"]
    assert torch.equal(found.scores, predictor(pixels).instances.scores)


def test_the_examples_of_the_documentation_run(tmp_path, monkeypatch, pixels) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(Path("output/demo/run"), {"MODEL.SEM_SEG_HEAD.NUM_CLASSES": 6})
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("farm", "shapes_train"))
    Image.fromarray(pixels).save("image.jpg")
    for page, name in (("README.md", "predict"), ("docs/inference.md", "predict"), ("docs/inference.md", "save_model")):
        Path("found.png").unlink(missing_ok=True)
        exec(example(page, name), {})
        assert name == "save_model" or Path("found.png").is_file()
    assert Path("shapes.safetensors").is_file()
