"""The whole model at tiny size: batches, padding, training, results."""

import io
import weakref

import pytest
import torch
from detectron2.modeling import build_model

from dimaskdino.data import register_all
from dimaskdino.errors import ConfigError, DatasetError
from dimaskdino.modeling.meta_arch import DIMaskDINO, needs_masks
from tests.tiny_model import (
    NUM_CLASSES,
    ONE_STAGE,
    TINY_DINO,
    image,
    instances,
    predict,
    sample,
    tiny_cfg,
    tiny_model,
    train_batch,
)

BOXES = [[0, 0, 32, 32], [16, 8, 48, 40], [36, 40, 60, 48]]


@pytest.fixture(scope="module")
def model() -> DIMaskDINO:
    return tiny_model()


@pytest.mark.parametrize(
    ("options", "wanted"), [({}, True), ({"MODEL.MaskDINO.PREDICT_MASKS": False}, False), (TINY_DINO, False)], ids=str
)
def test_models_with_masks_alone_need_them(options: dict, wanted: bool) -> None:
    assert needs_masks(tiny_cfg(options)) is wanted


def assert_same(one, two) -> None:
    """Results of one image: same values, same size."""
    assert one.image_size == two.image_size
    torch.testing.assert_close(one.scores, two.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.pred_boxes.tensor, two.pred_boxes.tensor, rtol=1e-4, atol=1e-3)
    assert torch.equal(one.pred_classes, two.pred_classes)
    assert (one.pred_masks == two.pred_masks).float().mean() > 0.999


def check_gradients(model: DIMaskDINO, losses: dict[str, torch.Tensor]) -> None:
    """Data-parallel training waits for the gradient of every parameter, even if it is zero."""
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def on_canvas(model: DIMaskDINO, small: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The image in the upper left corner of a canvas of mean color, which is zero where the model pads."""
    canvas = model.pixel_mean.expand(3, height, width).clone()
    canvas[:, : small.shape[1], : small.shape[2]] = small
    return canvas


def test_results_are_instances_of_the_asked_size(model):
    (result,) = predict(model, image(50, 60), height=100, width=90)
    assert result.image_size == (100, 90)
    assert len(result) == 6
    assert result.pred_boxes.tensor.shape == (6, 4)
    assert result.pred_masks.shape == (6, 100, 90)
    assert result.pred_masks.dtype == torch.bool
    assert ((result.scores >= 0) & (result.scores <= 1)).all()
    assert ((result.pred_classes >= 0) & (result.pred_classes < NUM_CLASSES)).all()


def test_feature_maps_are_gone_when_results_are_made(model):
    maps, alive = [], []
    hooks = [
        model.backbone.register_forward_hook(
            lambda _, args, out: maps.extend(map(weakref.ref, [*args, *out.values()]))
        ),
        model.post_processor.register_forward_hook(lambda *_: alive.extend(each() is not None for each in maps)),
    ]
    predict(model, image(50, 60))
    for hook in hooks:
        hook.remove()
    assert alive == [False] * 5  # the images, and four levels


def test_without_an_asked_size_results_have_that_of_the_image(model):
    assert predict(model, image(50, 60))[0].image_size == (50, 60)


def test_image_in_a_batch_of_one_size_is_as_alone(model):
    first, second = image(50, 60, seed=1), image(64, 40, seed=2)
    for alone, together in zip(
        (predict(model, first)[0], predict(model, second)[0]), predict(model, first, second), strict=True
    ):
        assert_same(alone, together)


def test_the_order_of_a_batch_does_not_matter(model):
    first, second = image(64, 96, seed=1), image(40, 64, seed=2)
    one, two = predict(model, first, second)
    other_two, other_one = predict(model, second, first)
    assert_same(one, other_one)
    assert_same(two, other_two)


@pytest.mark.parametrize("size", [(50, 60), (96, 40), (33, 128)])
def test_padding_is_mean_color_at_the_right_and_below(model, size):
    # Beside a larger image, an image is as if it had been put on the batch's canvas by hand.
    small, large = image(*size, seed=1), image(96, 128, seed=2)
    together = model.sem_seg_head(model.backbone(model._preprocess([{"image": small}, {"image": large}]).tensor))
    alone = model.sem_seg_head(model.backbone(model._preprocess([{"image": on_canvas(model, small, 96, 128)}]).tensor))
    for one, two in zip(together.stages, alone.stages, strict=True):
        torch.testing.assert_close(one.logits[:1], two.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.boxes[:1], two.boxes, rtol=1e-4, atol=1e-4)


def test_results_of_a_smaller_image_are_in_its_own_pixels(model):
    small, large = image(48, 64, seed=1), image(96, 128, seed=2)
    result, _ = predict(model, small, large)
    (on_large,) = predict(model, on_canvas(model, small, 96, 128))
    order = [(on_large.pred_boxes.tensor - box).abs().amax(1).argmin().item() for box in result.pred_boxes.tensor]
    torch.testing.assert_close(result.pred_boxes.tensor, on_large.pred_boxes.tensor[order], rtol=1e-4, atol=1e-2)
    same = result.pred_masks == on_large.pred_masks[order][:, :48, :64]
    assert same.float().mean() > 0.999


def test_size_divisibility_pads_to_multiples():
    model = tiny_model(SIZE_DIVISIBILITY=48)
    assert model._preprocess([{"image": image(50, 60)}]).tensor.shape[-2:] == (96, 96)


def test_images_may_be_bytes(model):
    given = image(64, 64).round()
    assert_same(predict(model, given)[0], predict(model, given.to(torch.uint8))[0])


def test_an_image_smaller_than_one_coarse_pixel_is_predicted(model):
    assert len(predict(model, image(5, 7))[0]) == 6


def test_fewer_tokens_than_queries_are_no_error():
    model = tiny_model(NUM_OBJECT_QUERIES=40, FIRST_SELECTED_QUERIES=50, DI__NUM_SELECTED=[])
    assert len(predict(model, image(20, 20))[0]) == 6
    losses = model.train()([sample(20, 20, [[2, 2, 10, 12]])])
    assert all(value.isfinite() for value in losses.values())


def test_evaluation_is_deterministic(model):
    assert_same(predict(model, image(64, 64))[0], predict(model, image(64, 64))[0])


@pytest.mark.parametrize(
    "node",
    [
        {},
        {"TRANSFORMER_DECODER_NAME": "MaskDINODecoder"},
        {"DN": "standard"},
        {"INITIALIZE_BOX_TYPE": "no"},
        {"INITIALIZE_BOX_TYPE": "bitmask"},
        {"BATO__GTG": False},
        {"DI__NUM_SELECTED": [12, 10, 8]},
        ONE_STAGE,
        {"LEARN_TGT": True},
        {"ENFORCE_INPUT_PROJ": True},
    ],
    ids=str,
)
def test_every_parameter_gets_a_finite_gradient(node):
    model = tiny_model(**node).train()
    sum(model(train_batch(BOXES, BOXES[:1])).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("boxes", [([], []), ([], BOXES)], ids=["all empty", "one empty"])
@pytest.mark.parametrize(
    "node",
    [
        {},
        {"TRANSFORMER_DECODER_NAME": "MaskDINODecoder"},
        {"DN": "standard"},
        {"DN": "no"},
        {"BOX_LOSS": False},
        {"BOX_LOSS": False, "DN": "no"},
        ONE_STAGE,
    ],
    ids=str,
)
def test_images_without_objects_train_every_parameter(node, boxes):
    model = tiny_model(**node).train()
    losses = model(train_batch(*boxes))
    assert all(value.isfinite() for value in losses.values())
    check_gradients(model, losses)


@pytest.mark.parametrize("dn", ["no", "standard", "seg"])
def test_loss_names_do_not_depend_on_the_objects(dn):
    model = tiny_model(DN=dn).train()
    found = [set(model(train_batch(*boxes))) for boxes in ([BOXES, BOXES], [[], BOXES], [[], []])]
    assert found[0] == found[1] == found[2]


def test_losses_are_scalars_in_the_graph_named_by_stage():
    losses = tiny_model().train()(train_batch(BOXES))
    assert all(value.shape == () and value.requires_grad for value in losses.values())
    assert {name for name in losses if name.startswith("loss_giou")} == {
        f"loss_giou{end}"
        for end in ("", "_0", "_1", "_2", "_interm", "_di_0", "_di_1", "_dn", "_dn_0", "_dn_1", "_dn_2")
    }


def test_training_follows_the_seed():
    model, losses = tiny_model().train(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(sum(model(train_batch(BOXES)).values()).item())
    assert losses[0] == losses[1] != losses[2]


def test_targets_of_smaller_images_are_scaled_to_the_batchs_canvas():
    # Divided by the image's own size instead, as in the releases, the smaller image's boxes would be too large.
    model, seen = tiny_model().train(), []
    model.sem_seg_head.register_forward_pre_hook(lambda _m, inputs: seen.extend(inputs[1]))
    model([sample(48, 64, [[0, 0, 32, 24]]), sample(96, 128, [[0, 0, 32, 24]])])
    for target in seen:
        torch.testing.assert_close(target.boxes, torch.tensor([[0.125, 0.125, 0.25, 0.25]]))
        assert target.masks.shape == (1, 96, 128)


def test_a_few_steps_lower_the_loss():
    torch.manual_seed(0)
    model = build_model(tiny_cfg(DN_NOISE_SCALE=0.0)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch, totals = train_batch(BOXES, BOXES[:2]), []
    for _ in range(12):
        loss = sum(model(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
    assert totals[-1] < 0.8 * totals[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_step_gives_every_parameter_a_finite_gradient(dtype):
    model = tiny_model().train()
    batch = train_batch(BOXES, [])
    with torch.autocast("cpu", dtype=dtype):
        losses = model(batch)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    check_gradients(model, losses)
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        (result, _) = model.eval()(batch)
    assert result["instances"].scores.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_of_another_dtype_are_an_error_that_names_autocast(dtype):
    with pytest.raises(TypeError, match=rf"weights are {dtype}; .*bfloat16.*torch\.autocast"):
        predict(tiny_model().to(dtype), image(64, 64))


@pytest.mark.parametrize("node", [{}, {"TRANSFORMER_DECODER_NAME": "MaskDINODecoder"}, ONE_STAGE], ids=str)
def test_bfloat16_weights_predict_and_do_not_train(node):
    model = tiny_model(**node).bfloat16()
    (result,) = predict(model, image(64, 64), height=100, width=90)
    assert result.scores.dtype == result.pred_boxes.tensor.dtype == torch.float32
    assert result.scores.isfinite().all()
    assert result.pred_masks.shape == (6, 100, 90)
    with pytest.raises(TypeError, match="float32"):
        model.train()(train_batch(BOXES))


def test_bfloat16_weights_predict_almost_the_same_as_float32():
    model = tiny_model(**ONE_STAGE)
    features = model._preprocess([{"image": image(64, 64)}]).tensor
    with torch.no_grad():
        expected = model.sem_seg_head(model.backbone(features)).stages[-1]
        half = model.bfloat16()
        result = half.sem_seg_head(half.backbone(features.bfloat16())).stages[-1]
    torch.testing.assert_close(result.boxes, expected.boxes, rtol=0, atol=0.02)
    torch.testing.assert_close(result.logits.float(), expected.logits, rtol=0.1, atol=0.2)


SEMANTIC = {"TEST__INSTANCE_ON": False, "TEST__SEMANTIC_ON": True}
PANOPTIC = {"TEST__SEMANTIC_ON": True, "TEST__PANOPTIC_ON": True, "THING_CLASSES": [0, 1]}
SOFTMAX = SEMANTIC | {"SEMANTIC_CE_LOSS": True}
TASKS = [
    SEMANTIC,
    PANOPTIC,
    PANOPTIC | {"PANO_BOX_LOSS": True},
    SOFTMAX,
    SOFTMAX | ONE_STAGE,
    SOFTMAX | {"TRANSFORMER_DECODER_NAME": "MaskDINODecoder", "PANO_BOX_LOSS": True, "THING_CLASSES": [0]},
    SOFTMAX | {"DI__NUM_SELECTED": [12, 10, 8], "NO_OBJECT_WEIGHT": 0.0},
]


@pytest.mark.parametrize("boxes", [(BOXES, BOXES[:1]), ([], [])], ids=["objects", "no objects"])
@pytest.mark.parametrize("node", TASKS, ids=str)
def test_every_task_trains_every_parameter(node, boxes):
    model = tiny_model(**node).train()
    losses = model(train_batch(*boxes))
    assert all(value.isfinite() for value in losses.values())
    check_gradients(model, losses)


def test_pano_box_loss_supervises_the_boxes_of_things_alone():
    batch = train_batch(BOXES)
    batch[0]["instances"].gt_classes[:] = torch.tensor([0, 3, 4])
    stuff_alone = train_batch(BOXES)
    stuff_alone[0]["instances"].gt_classes[:] = 3
    model = tiny_model(**PANOPTIC, PANO_BOX_LOSS=True).train()
    assert model(batch)["loss_bbox"] > 0
    losses = model(stuff_alone)
    assert all(losses[name] == 0 for name in losses if "bbox" in name or "giou" in name)
    assert all(losses[name] > 0 for name in losses if "mask" in name)
    assert tiny_model(**PANOPTIC).train()(stuff_alone)["loss_bbox"] > 0


def test_panoptic_models_ask_the_datasets_which_classes_are_things():
    tiny = {"MODEL.SEM_SEG_HEAD.NUM_CLASSES": 133, "DATASETS.TEST": ["coco_2017_val_panoptic"]}
    model = build_model(tiny_cfg(tiny, TEST__PANOPTIC_ON=True))
    assert model.post_processor.is_thing.nonzero().flatten().tolist() == list(range(80))
    # To a set of objects alone, all that it lists are things.
    register_all()
    mixed = {"DATASETS.TRAIN": ["coco_2017_train"], "DATASETS.TEST": ["shapes_panoptic_val"]}
    model = build_model(tiny_cfg({**mixed, "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 10}, TEST__PANOPTIC_ON=True))
    assert model.post_processor.is_thing.nonzero().flatten().tolist() == list(range(6))
    for dataset, what in (
        ("coco_2017_val_panoptic_separated", "metadata of coco_2017_val_panoptic_separated"),
        ("ade20k_sem_seg_val", "metadata of ade20k_sem_seg_val"),
        ("not_registered", "not_registered is not registered"),
    ):
        with pytest.raises(ConfigError, match=f"PANOPTIC_ON .* {what}.*THING_CLASSES"):
            build_model(tiny_cfg({"DATASETS.TEST": [dataset]}, TEST__PANOPTIC_ON=True))


def test_semantic_scores_of_a_softmax_model_leave_no_object_out():
    model = tiny_model(**SOFTMAX)
    with torch.no_grad():
        # Every query is sure of no object.
        model.sem_seg_head.predictor.heads.class_embed.bias[-1] = 1e4
        (result,) = model([{"image": image(50, 60), "height": 20, "width": 30}])
    assert list(result) == ["sem_seg"]
    assert result["sem_seg"].shape == (NUM_CLASSES, 20, 30)
    assert not result["sem_seg"].any()


NO_MASKS = {"MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "DeformableEncoder"}
BOXES_ALONE = {"PREDICT_MASKS": False, "TRANSFORMER_DECODER_NAME": "MaskDINODecoder", "INITIALIZE_BOX_TYPE": "no"}
WITH_DI = BOXES_ALONE | {"TRANSFORMER_DECODER_NAME": "DIMaskDINODecoder", "BATO__ENABLED": False}


@pytest.mark.parametrize("boxes", [(BOXES, BOXES[:1]), ([], [])], ids=["objects", "no objects"])
@pytest.mark.parametrize("node", [BOXES_ALONE, WITH_DI], ids=["Mask DINO", "De-Imbalance"])
def test_a_model_without_masks_trains_every_parameter_on_boxes(node, boxes):
    model = tiny_model(NO_MASKS, **node).train()
    batch = train_batch(*boxes)
    for each in batch:
        each["instances"].remove("gt_masks")
    losses = model(batch)
    assert {name.split("_")[1] for name in losses} == {"ce", "bbox", "giou"}
    check_gradients(model, losses)
    (result,) = predict(model.eval(), image(50, 60), height=100, width=90)
    assert len(result) == 6
    assert not result.has("pred_masks")


def test_stages_without_masks_are_evaluated_by_their_boxes():
    model = tiny_model(NO_MASKS | {"TEST.EVAL_LAYERS": ["all"]}, **WITH_DI, DI__NUM_SELECTED=[12, 10, 8])
    with torch.no_grad():
        (result,) = model([{"image": image(64, 64)}])
    assert list(result["layers"]) == ["interm", "selection.2", "initial", "layer.0", "layer.1", "layer.2"]
    assert not any(each["instances"].has("pred_masks") for each in result["layers"].values())


@pytest.mark.parametrize("images", [1, 2])
def test_images_without_masks_train_a_model_with_masks(images):
    # The first image has boxes alone; of two, the other one's masks are supervised.
    model = tiny_model().train()
    batch = train_batch(BOXES, BOXES)[:images]
    batch[0]["instances"].remove("gt_masks")
    losses = model(batch)
    assert (losses["loss_mask"] > 0) == (images == 2)
    check_gradients(model, losses)


@pytest.mark.parametrize(
    ("options", "node", "message"),
    [
        ({}, BOXES_ALONE, "PREDICT_MASKS is False.*DeformableEncoder"),
        (NO_MASKS, {}, "PREDICT_MASKS is True.*MaskDINOEncoder"),
        (NO_MASKS, BOXES_ALONE | {"INITIALIZE_BOX_TYPE": "bitmask"}, "INITIALIZE_BOX_TYPE needs PREDICT_MASKS"),
        (NO_MASKS, WITH_DI | {"BATO__ENABLED": True}, "BATO.ENABLED needs PREDICT_MASKS"),
        (NO_MASKS, BOXES_ALONE | {"BOX_LOSS": False}, "BOX_LOSS and PREDICT_MASKS are both False"),
    ],
    ids=str,
)
def test_keys_that_contradict_a_model_without_masks_are_refused(options, node, message):
    with pytest.raises(ConfigError, match=message):
        build_model(tiny_cfg(options, **node))


def test_too_large_a_class_in_training_names_the_key():
    batch = train_batch(BOXES)
    batch[0]["instances"].gt_classes[0] = NUM_CLASSES
    with pytest.raises(DatasetError, match="NUM_CLASSES"):
        tiny_model().train()(batch)


def test_nonfinite_predictions_stop_training_naming_the_stage():
    model = tiny_model().train()
    with torch.no_grad():
        model.sem_seg_head.predictor.heads.class_embed.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="stage interm for image 0"):
        model(train_batch(BOXES))


@pytest.mark.parametrize("node", [{}, {"TRANSFORMER_DECODER_NAME": "MaskDINODecoder"}, ONE_STAGE], ids=str)
def test_weights_round_trip_through_a_file(node):
    model, other = tiny_model(**node), tiny_model(seed=1, **node)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(predict(model, image(64, 64))[0], predict(other, image(64, 64))[0])


def test_the_weights_hold_parameters_alone():
    # Pixel mean and std belong to the configuration.
    model = tiny_model()
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_both_names_of_the_meta_architecture_build_the_same_model():
    state = tiny_model().state_dict()
    other = tiny_model({"MODEL.META_ARCHITECTURE": "MaskDINO"})
    assert list(other.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


def test_channel_order_and_statistics_are_a_matter_of_configuration():
    options = {"MODEL.PIXEL_MEAN": [0.0, 0.0, 0.0], "MODEL.PIXEL_STD": [1.0, 2.0, 4.0]}
    tensor = tiny_model(options)._preprocess([{"image": torch.full((3, 32, 32), 8.0)}]).tensor
    assert tensor[0, :, 0, 0].tolist() == [8.0, 4.0, 2.0]


def test_thousands_of_queries_train_and_predict() -> None:
    many = {"NUM_OBJECT_QUERIES": 3000, "FIRST_SELECTED_QUERIES": 3000, "DEC_LAYERS": 1, "TI_LAYERS": 1}
    # 3,000 tokens need a picture of at least that many cells of its four levels.
    picture = image(384, 448)
    model = tiny_model({"TEST.DETECTIONS_PER_IMAGE": 3000}, BATO__ENABLED=False, DN="no", **many)
    assert len(predict(model, picture, height=24, width=28)[0]) == 3000
    boxes = [[8 * n, 8, 8 * n + 6, 14] for n in range(20)]
    losses = model.train()([{"image": picture, "instances": instances(384, 448, boxes)}])
    assert all(loss.isfinite() for loss in losses.values())
