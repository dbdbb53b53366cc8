"""Augmentations by key: labels follow the pixels, wrong entries are named, copy-paste."""

import inspect
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances
from PIL import Image
from pycocotools import mask as mask_util

from dimaskdino.config import Config, get_cfg
from dimaskdino.data.annotations import annotations_to_instances
from dimaskdino.data.augmentations import AUGMENTATION_REGISTRY, Turn, copy_paste, own_augmentations
from dimaskdino.data.copy_paste import CopyPaste
from dimaskdino.data.mapper import InstanceMapper, build_mapper
from dimaskdino.data.orders import Samples
from dimaskdino.data.transforms import shortest_edge
from dimaskdino.errors import ConfigError

SIZE = (20, 30)
BLOB = np.zeros(SIZE, dtype=np.uint8)
BLOB[3:9, 4:19] = BLOB[5:14, 20:24] = 1
BLOB[5, 6:9] = 0


def aug_cfg(*entries: Any, **options: Any) -> Config:
    cfg = get_cfg()
    cfg.merge_from_list(["INPUT.AUGMENTATIONS", list(entries), "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3])
    cfg.INPUT.merge_from_list([item for pair in options.items() for item in pair])
    return cfg


def annotation(segmentation: Any = None, box: tuple[float, ...] = (4, 3, 20, 11)) -> dict[str, Any]:
    found = {"category_id": 0, "bbox": list(box), "bbox_mode": BoxMode.XYWH_ABS}
    return found if segmentation is None else found | {"segmentation": segmentation}


def rle(mask: np.ndarray) -> dict[str, Any]:
    return mask_util.encode(np.asfortranarray(mask))


def moved(annotations: list[dict[str, Any]], augmentation: Any, image: np.ndarray | None = None) -> tuple[Any, Any]:
    """The augmented image and the objects in it."""
    given = T.AugInput(np.repeat(BLOB[..., None] * 255, 3, axis=2) if image is None else image)
    transforms = T.AugmentationList([augmentation])(given)
    options = {"source_size": SIZE, "target_size": given.image.shape[:2], "num_classes": 3, "file_name": "a.png"}
    return given.image, annotations_to_instances(annotations, transforms=transforms, **options)


@pytest.mark.parametrize("quarters", range(4))
def test_quarter_turns_are_exact(quarters: int) -> None:
    polygon = [4, 3, 19, 3, 19, 9, 4, 9]
    image, found = moved(
        [annotation(rle(BLOB)), annotation([polygon], (4, 3, 15, 6)), annotation()], Turn(quarters, *SIZE)
    )
    assert np.array_equal(image[..., 0] > 0, np.rot90(BLOB, quarters))
    assert np.array_equal(found.gt_masks.tensor[0], np.rot90(BLOB, quarters))
    corners = Turn(quarters, *SIZE).apply_coords(np.array([[4.0, 3.0], [19.0, 9.0]]))
    expected = [*corners.min(0), *corners.max(0)]
    assert found.gt_boxes.tensor[1].tolist() == expected
    left, top, right, bottom = map(int, expected)
    filled = np.zeros(image.shape[:2], dtype=bool)
    filled[top:bottom, left:right] = True
    assert np.array_equal(found.gt_masks.tensor[1], filled)


def test_rotation_keeps_labels_on_the_pixels() -> None:
    (augmentation,) = own_augmentations(aug_cfg({"Rotate": {"angle": 30}}))
    image, found = moved([annotation(rle(BLOB)), annotation([[4, 3, 19, 3, 19, 9, 4, 9]])], augmentation)
    assert image.shape[:2] > SIZE
    bright = image[..., 0] > 127
    mask = found.gt_masks.tensor[0].numpy()
    assert (bright & mask).sum() / (bright | mask).sum() > 0.85
    assert abs(found.gt_masks.tensor[1].sum().item() - 15 * 6) <= 12


@pytest.mark.parametrize("channels", [1, 6])
def test_images_of_other_channels_are_augmented(channels: int) -> None:
    entries = ({"Rotate": {"angle": 30}}, "Rotate90", "Flip", {"Blur": {"prob": 1}}, {"Crop": {"size": [0.5, 0.5]}})
    given = T.AugInput(np.random.default_rng(0).random((*SIZE, channels), dtype=np.float32), boxes=np.zeros((0, 4)))
    T.AugmentationList(own_augmentations(aug_cfg(*entries, {"LargeScaleJitter": {"size": 32}})))(given)
    assert (given.image.shape, given.image.dtype) == ((32, 32, channels), np.float32)


@pytest.mark.parametrize(
    ("entry", "shape"),
    [
        ({"LargeScaleJitter": {"size": 32}}, (32, 32)),
        (["MultiScaleResize", {"sizes": [40], "max_size": 600}], (40, 60)),
        ("Flip", SIZE),
        ({"Color": {"brightness": 1.0}}, SIZE),
        ({"Blur": {"sigma": [1, 2], "prob": 1}}, SIZE),
        ("Color", SIZE),
        ({"Flip": {"direction": "vertical"}}, SIZE),
    ],
)
def test_every_augmentation_of_ours(entry: Any, shape: tuple[int, int]) -> None:
    given = T.AugInput(np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8))
    before = given.image.copy()
    T.AugmentationList(own_augmentations(aug_cfg(entry)))(given)
    assert given.image.shape == (*shape, 3)
    assert given.image.dtype == np.uint8
    assert "Flip" in str(entry) or not np.array_equal(given.image, before)


def test_half_of_the_images_are_resized_and_cropped_as_by_detr() -> None:
    cfg = get_cfg()
    cfg.merge_from_list(["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "relative", "INPUT.CROP.SIZE", [0.5, 0.5]])
    *before, _ = shortest_edge(cfg)
    sides = []
    for _ in range(60):
        image = T.AugInput(np.zeros((40, 40, 3), np.uint8))
        T.AugmentationList(before)(image)
        sides.append(image.image.shape[0])
    assert {*sides} == {40, 200, 250, 300}
    assert 20 < sides.count(40) < 40


def test_crop_is_drawn_again_until_an_object_is_inside() -> None:
    (crop,) = own_augmentations(aug_cfg({"Crop": {"kind": "absolute", "size": [8, 8], "tries": 500}}))
    boxes = np.array([[20.0, 10.0, 24.0, 14.0]])
    image = np.zeros((*SIZE, 3), np.uint8)
    for _ in range(20):
        transform = crop.get_transform(image, boxes)
        inside = transform.apply_box(boxes)[0].clip(0, 8)
        assert (inside[2] - inside[0]) * (inside[3] - inside[1]) >= 8
    (once,) = own_augmentations(aug_cfg({"Crop": {"kind": "absolute", "size": [2, 2], "tries": 3}}))
    assert isinstance(once.get_transform(image, boxes), T.NoOpTransform)  # no crop holds half of the object
    assert isinstance(once.get_transform(image, boxes[:0]), T.CropTransform)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("Rotat", "ours are Blur"),
        ({"Rotate": {"angel": 3}}, "Rotate.*angel"),
        ({"Rotate": {}, "Flip": {}}, "write a name"),
        (3, "write a name"),
        ({"Rotate": 3}, "write a name"),
        ({"Rotate": {"angle": [9, 3]}}, "Rotate.*ends below"),
        ({"Blur": {"sigma": -3}}, "Blur.*sigma"),
        ({"Crop": {"size": "big"}}, "Crop.*'big'"),
        ({"CopyPaste": {"prop": 1}}, "CopyPaste.*prop"),
        ({"Blur": {"sigma": [1]}}, "Blur.*sigma"),
        ({"Blur": {"sigma": 1e9}}, "Blur.*sigma"),
        ({"Blur": {"prob": "x"}}, "Blur.*prob"),
        ({"Rotate90": {"prob": 2}}, "Rotate90.*prob"),
        ({"Flip": {"prob": -1}}, "Flip.*prob"),
        ({"Rotate": {"prob": 2}}, "Rotate.*prob"),
        ({"Rotate": {"angle": float("nan")}}, "Rotate.*angle"),
        ({"Color": {"contrast": -1}}, "Color.*contrast"),
        ({"LargeScaleJitter": {"size": 0}}, "LargeScaleJitter.*size"),
        ({"LargeScaleJitter": {"size": [32, 32]}}, "LargeScaleJitter.*size"),
        ({"LargeScaleJitter": {"min_scale": 2, "max_scale": 1}}, "LargeScaleJitter.*scale"),
        ({"MultiScaleResize": {"sizes": []}}, "MultiScaleResize.*sizes"),
        ({"MultiScaleResize": {"sizes": "640"}}, "MultiScaleResize.*sizes"),
        ({"MultiScaleResize": {"sizes": [40], "max_size": "x"}}, "MultiScaleResize.*max_size"),
        ({"Crop": {"kind": "middle"}}, "kind of Crop.*relative_range"),
        ({"Crop": {"size": [0, 1]}}, "Crop.*size"),
        ({"Crop": {"kind": "absolute", "size": [0, 8]}}, "Crop.*size"),
        ({"Crop": {"kind": "absolute_range", "size": [9, 3]}}, "Crop.*size"),
        ({"Crop": {"least_share": "x"}}, "Crop.*least_share"),
        ({"CopyPaste": {"prob": 2}}, "CopyPaste needs prob"),
        ({"CopyPaste": {"most": 1.5}}, "CopyPaste needs .*most"),
        ({"CopyPaste": {"most": 0}}, "CopyPaste needs .*most"),
    ],
)
def test_wrong_entry_is_named(entry: Any, said: str) -> None:
    build = copy_paste if "CopyPaste" in str(entry) else own_augmentations
    with pytest.raises(ConfigError, match=rf"INPUT\.AUGMENTATIONS.*{said}"):
        build(aug_cfg(entry))
    with pytest.raises(ConfigError, match="CopyPaste.*masks"):
        copy_paste(aug_cfg("CopyPaste"), with_masks=False)
    with pytest.raises(ConfigError, match="CopyPaste twice"):
        copy_paste(aug_cfg("CopyPaste", "CopyPaste"))


def test_own_augmentation_is_named_by_key() -> None:
    def Invert(cfg: Config, *, most: int) -> Any:  # noqa: N802
        return T.ColorTransform(lambda pixels: most - pixels) if most else np.invert

    AUGMENTATION_REGISTRY.register(Invert)
    try:
        image, _ = moved([], own_augmentations(aug_cfg({"Invert": {"most": 255}}))[0])
        assert np.array_equal(image[..., 0] == 0, BLOB == 1)
        with pytest.raises(ConfigError, match="Invert gives .*invert"):
            own_augmentations(aug_cfg({"Invert": {"most": 0}}))
    finally:
        del AUGMENTATION_REGISTRY._obj_map["Invert"]


def test_albumentations_move_objects_by_pixels() -> None:
    pytest.importorskip("albumentations")
    (augmentation,) = own_augmentations(aug_cfg({"Transpose": {"p": 1.0}}))
    image, found = moved([annotation(rle(BLOB)), annotation([[4, 3, 19, 3, 19, 9, 4, 9]]), annotation()], augmentation)
    assert np.array_equal(image[..., 0] > 0, BLOB.T)
    assert np.array_equal(found.gt_masks.tensor[0], BLOB.T)
    assert found.gt_boxes.tensor[1].tolist() == [3, 4, 9, 19]
    (noise,) = own_augmentations(aug_cfg({"GaussNoise": {"p": 1.0}}))
    image, found = moved([annotation([[4, 3, 19, 3, 19, 9, 4, 9.5]])], noise)
    assert len(np.unique(image)) > 2
    assert found.gt_boxes.tensor[0].tolist() == [4, 3, 19, 9.5]
    np.random.seed(3)
    first = moved([], noise)[0]
    np.random.seed(3)
    assert np.array_equal(moved([], noise)[0], first)
    for entry, said in (("GausNoise", "GausNoise.*GaussNoise"), ({"GaussNoise": {"pp": 1}}, "GaussNoise.*'pp'")):
        with pytest.raises(ConfigError, match=said):
            own_augmentations(aug_cfg(entry))


def instances(*boxes: tuple[int, int, int, int], size: tuple[int, int] = (10, 12), label: int = 0) -> Instances:
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    made = Instances(size, gt_boxes=Boxes(torch.tensor(boxes).float().reshape(-1, 4)), gt_masks=BitMasks(masks))
    made.gt_classes = torch.full((len(boxes),), label)
    return made


@pytest.mark.parametrize("name", ["coco_instance_lsj", "coco_panoptic_lsj"])
def test_objects_are_pasted_in_training_alone(name: str) -> None:
    cfg = aug_cfg("CopyPaste")
    cfg.INPUT.DATASET_MAPPER_NAME = name
    for is_train, with_instances in itertools.product((True, False), repeat=2):
        mapper = build_mapper(cfg, is_train, with_instances=with_instances)
        assert (mapper.copy_paste is not None) == (is_train and with_instances)


def test_pasted_objects_hide_those_below() -> None:
    below = {"image": torch.zeros(3, 10, 12, dtype=torch.uint8), "instances": instances((0, 0, 6, 6), (6, 0, 8, 2))}
    above = {"image": torch.full((3, 8, 20), 200, dtype=torch.uint8)}
    above["instances"] = instances((3, 0, 9, 4), (15, 0, 18, 3), size=(8, 20), label=1)
    pasted = CopyPaste(share=1.0, blend=0)(below, above)
    found = pasted["instances"]
    # The second object below is wholly hidden, the second one above lies outside.
    assert found.gt_classes.tolist() == [0, 1]
    assert found.gt_masks.tensor.flatten(1).sum(1).tolist() == [36 - 12, 24]
    assert found.gt_boxes.tensor.tolist() == [[0, 0, 6, 6], [3, 0, 9, 4]]
    expected = torch.zeros(3, 10, 12)
    expected[:, 0:4, 3:9] = 200
    assert torch.equal(pasted["image"].float(), expected)
    assert not below["image"].any()
    soft = CopyPaste(share=1.0, blend=1.0)(below, above)["image"]
    assert 0 < soft[0, 2, 9] < soft[0, 2, 8] < 200
    assert len(CopyPaste()(below, {**above, "instances": instances(size=(8, 20))})["instances"]) == 2


def test_pasting_keeps_fields_of_either_image() -> None:
    below, above = instances((0, 0, 3, 3)), instances((6, 6, 9, 9))
    below.gt_mask_supervised, above.gt_age = torch.tensor([True]), torch.tensor([4.0])
    images = [{"image": torch.zeros(3, 10, 12), "instances": each} for each in (below, above)]
    found = CopyPaste(share=1.0, most=1)(*images)["instances"]
    assert found.gt_mask_supervised.tolist() == [True, True]
    assert found.gt_age.isnan().tolist() == [False, False] or found.gt_age.isnan().tolist() == [True, False]


def test_mapper_and_samples_use_the_key(tmp_path) -> None:
    entries = []
    for number in range(2):
        Image.fromarray(np.full((*SIZE, 3), 60 * number + 60, np.uint8)).save(tmp_path / f"{number}.png")
        entries.append({"file_name": str(tmp_path / f"{number}.png"), "annotations": [annotation(rle(BLOB))]})
    cfg = aug_cfg({"MultiScaleResize": {"sizes": [40]}}, {"CopyPaste": {"prob": 1.0, "least_left": 0.0}})
    for name in ("coco_instance_lsj", "coco_instance_detr"):
        cfg.INPUT.DATASET_MAPPER_NAME = name
        mapper = build_mapper(cfg, is_train=True)
        assert isinstance(mapper, InstanceMapper)
        samples = Samples(entries, mapper, seed=1)
        mapped = samples[0, 0]
        assert mapped["image"].shape == (3, 40, 60)
        assert {samples[place, 0]["image"].unique().numel() > 1 for place in range(8)} == {True, False}
        assert torch.equal(samples[0, 0]["image"], mapped["image"])
    assert build_mapper(cfg, is_train=False)(entries[0])["image"].shape[1] == 800


def test_defaults_of_entries_stay() -> None:
    parts = {name: part for name, part in AUGMENTATION_REGISTRY if part.__module__.startswith("dimaskdino.")}
    parameters = {name: inspect.signature(part).parameters for name, part in (parts | {"CopyPaste": CopyPaste}).items()}
    defaults = {
        name: {each.name: each.default for each in of_part.values() if each.default is not each.empty}
        for name, of_part in parameters.items()
    }
    assert defaults == {
        "Flip": {"direction": "horizontal", "prob": 0.5},
        "LargeScaleJitter": {"min_scale": 0.1, "max_scale": 2.0, "size": 1024},
        "MultiScaleResize": {"max_size": 1333},
        "Rotate": {"angle": (-15, 15), "expand": True, "prob": 1.0},
        "Rotate90": {"prob": 1.0},
        "Color": dict.fromkeys(("brightness", "contrast", "saturation"), (0.8, 1.2)),
        "Blur": {"sigma": (0.1, 2.0), "prob": 0.5},
        "Crop": {"kind": "relative_range", "size": (0.5, 0.5), "least_objects": 1, "least_share": 0.5, "tries": 10},
        "CopyPaste": {"prob": 0.5, "share": 0.5, "most": 100, "blend": 1.0, "least_left": 0.05},
    }
