"""Annotations become masks, boxes and classes in the frame of the transformed image."""

from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, BoxMode, Instances
from pycocotools import mask as mask_util

from dimaskdino.data.annotations import annotations_to_instances
from dimaskdino.errors import DatasetError
from tests.data_pipeline.conftest import HEIGHT, POLYGON, WIDTH

# The same pixels as POLYGON (columns 1 to 3, rows 1 to 2), as run lengths down the columns:
# column 0 and row 0 of column 1 are 6 + 1 zeros; then 2 ones and 4 zeros a column, three times; then two columns more.
RUNS = [7, 2, 4, 2, 4, 2, 27]
RLE_UNCOMPRESSED = {"size": [HEIGHT, WIDTH], "counts": RUNS}
RLE_COMPRESSED = mask_util.frPyObjects(RLE_UNCOMPRESSED, HEIGHT, WIDTH)
RLE_COMPRESSED_TEXT = {**RLE_COMPRESSED, "counts": RLE_COMPRESSED["counts"].decode("ascii")}
LABELS = {
    "polygon": [POLYGON],
    "two polygons": [[1, 1, 3, 1, 3, 3, 1, 3], [2, 1, 4, 1, 4, 3, 2, 3]],
    "uncompressed RLE": RLE_UNCOMPRESSED,
    "compressed RLE": RLE_COMPRESSED,
    "compressed RLE as text": RLE_COMPRESSED_TEXT,
}


def targets(segmentation: Any, transforms: list[T.Transform], size: tuple[int, int], **more: Any) -> Instances:
    """One object of class 1 in the 8 x 6 image, after the transforms."""
    return annotations_to_instances(
        [{"id": 5, "category_id": 1, "segmentation": segmentation, **more}],
        transforms=T.TransformList(transforms),
        source_size=(HEIGHT, WIDTH),
        target_size=size,
        num_classes=2,
        file_name="folder/image.png",
    )


def rectangle(size: tuple[int, int], left: int, top: int, right: int, bottom: int) -> torch.Tensor:
    """A mask of ``size`` (height, width) with columns [left, right) and rows [top, bottom) set."""
    mask = torch.zeros(size, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize(
    ("transform", "size", "box"),
    [
        (T.NoOpTransform(), (6, 8), (1, 1, 4, 3)),
        # Column x goes to 7 - x: columns 1 to 3 become 4 to 6.
        (T.HFlipTransform(WIDTH), (6, 8), (4, 1, 7, 3)),
        (T.VFlipTransform(HEIGHT), (6, 8), (1, 3, 4, 5)),
        # The crop starts at (2, 2): columns 2 and 3 and row 2 remain.
        (T.CropTransform(2, 2, 5, 4, WIDTH, HEIGHT), (4, 5), (0, 0, 2, 1)),
        # The crop ends at (3, 2): columns 1 and 2 and row 1 remain.
        (T.CropTransform(0, 0, 3, 2, WIDTH, HEIGHT), (2, 3), (1, 1, 3, 2)),
        (T.ResizeTransform(HEIGHT, WIDTH, 12, 24), (12, 24), (3, 2, 12, 6)),
        (T.PadTransform(0, 0, 4, 2, WIDTH, HEIGHT, 128), (8, 12), (1, 1, 4, 3)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, T.Transform) else None,
)
def test_every_kind_of_label_moves_with_the_image(label, transform, size, box):
    instances = targets(LABELS[label], [transform], size)
    assert instances.image_size == size
    assert isinstance(instances.gt_masks, BitMasks)
    assert instances.gt_masks.tensor.is_contiguous()
    assert instances.gt_masks.tensor.dtype == torch.bool
    assert torch.equal(instances.gt_masks.tensor, rectangle(size, *box)[None])
    assert instances.gt_boxes.tensor.tolist() == [list(box)]
    assert instances.gt_boxes.tensor.dtype == torch.float32
    assert instances.gt_classes.tolist() == [1]
    assert instances.gt_classes.dtype == torch.int64


def test_box_of_a_clipped_triangle_bounds_what_is_left() -> None:
    # Behind the cut at x = 3 the triangle x + y < 6 keeps the corners (3, 0), (6, 0) and (3, 3); the clipped box of the
    # whole triangle would reach down to y = 6.
    crop = T.CropTransform(3, 0, 5, 6, WIDTH, HEIGHT)
    assert targets([[0, 0, 6, 0, 0, 6]], [crop], (6, 5)).gt_boxes.tensor.tolist() == [[0, 0, 3, 3]]


def test_box_of_a_polygon_is_its_extent() -> None:
    instances = targets([[1.25, 0.5, 4.75, 0.5, 4.75, 3.0]], [], (HEIGHT, WIDTH))
    assert instances.gt_boxes.tensor.tolist() == [[1.25, 0.5, 4.75, 3.0]]


@pytest.mark.parametrize("seed", range(8))
def test_cropped_polygon_equals_the_cropped_mask(seed: int) -> None:
    rng = np.random.default_rng(seed)
    polygon = rng.uniform(-30, 130, (7, 2))
    left, top, width, height = (int(value) for value in rng.integers(5, 60, 4))
    whole = mask_util.decode(mask_util.frPyObjects([(polygon + 40).reshape(-1).tolist()], 180, 180))[..., 0]
    expected = whole[40 + top : 40 + top + height, 40 + left : 40 + left + width].astype(bool)
    crop = T.CropTransform(left, top, width, height)
    label = {"category_id": 1, "segmentation": [polygon.reshape(-1).tolist()]}
    sizes = {"source_size": (100, 100), "target_size": (height, width)}
    instances = instances_of([label], transforms=T.TransformList([crop]), **sizes)
    found = instances.gt_masks.tensor.any(dim=0).numpy()
    assert (found != expected).mean() < 0.01


def test_padding_never_counts_as_mask() -> None:
    pad = T.PadTransform(0, 0, 4, 2, WIDTH, HEIGHT, pad_value=128, seg_pad_value=128)
    assert targets(RLE_COMPRESSED, [pad], (8, 12)).gt_masks.tensor.sum() == 6


@pytest.mark.parametrize(("count", "longest"), [(300, 1), (40, 6)], ids=["many apart", "overlapping"])
def test_objects_together_get_the_masks_they_get_alone(count: int, longest: int) -> None:
    generator = np.random.default_rng(0)
    size, transforms = (
        (20, 24),
        T.TransformList([T.ResizeTransform(20, 24, 31, 17), T.PadTransform(1, 2, 3, 4, 17, 31, 128)]),
    )
    annotations = []
    for index in range(count):
        top, left = (index // 24, index % 24) if longest == 1 else generator.integers(0, 16, size=2)
        mask = np.zeros(size, dtype=np.uint8, order="F")
        mask[top : top + generator.integers(1, longest + 1), left : left + generator.integers(1, longest + 1)] = 1
        annotations.append({"category_id": index, "segmentation": mask_util.encode(mask)})

    def moved(chosen: list[Any]) -> Instances:
        sizes: dict[str, Any] = {"source_size": size, "target_size": (37, 21)}
        return annotations_to_instances(
            chosen, transforms=transforms, num_classes=count, file_name="image.png", **sizes
        )

    together, alone = moved(annotations), [moved([annotation]) for annotation in annotations]
    assert 10 < len(together) == sum(map(len, alone))
    assert torch.equal(together.gt_masks.tensor, torch.cat([one.gt_masks.tensor for one in alone]))
    assert torch.equal(together.gt_boxes.tensor, torch.cat([one.gt_boxes.tensor for one in alone]))
    assert together.gt_classes.tolist() == [label for one in alone for label in one.gt_classes.tolist()]


def test_hole_of_a_mask_stays() -> None:
    ring = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    ring[1:5, 1:5] = 1
    ring[2:4, 2:4] = 0
    instances = targets(mask_util.encode(ring), [T.HFlipTransform(WIDTH)], (HEIGHT, WIDTH))
    assert np.array_equal(instances.gt_masks.tensor[0].numpy(), ring[:, ::-1].astype(bool))


def test_crowd_is_left_out() -> None:
    assert len(targets(RLE_UNCOMPRESSED, [], (HEIGHT, WIDTH), iscrowd=1)) == 0


@pytest.mark.parametrize("label", LABELS)
def test_crop_beside_the_object_leaves_empty_targets(label: str) -> None:
    instances = targets(LABELS[label], [T.CropTransform(5, 0, 3, 6, WIDTH, HEIGHT)], (6, 3))
    assert instances.gt_masks.tensor.shape == (0, 6, 3)
    assert instances.gt_boxes.tensor.shape == (0, 4)
    assert instances.gt_classes.shape == (0,)


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        ({"category_id": 2, "segmentation": [POLYGON]}, r"category: unknown .* MODEL.SEM_SEG_HEAD.NUM_CLASSES is 2"),
        ({"category_id": -1, "segmentation": [POLYGON]}, "category: unknown"),
        ({"category_id": 0}, "box: missing"),
        ({"category_id": 0, "bbox": [1, 1, 3, 2]}, "box: unknown bbox_mode"),
        ({"category_id": 0, "segmentation": [[1, 1, 2, 2, 3, float("nan")]]}, "finite"),
        ({"category_id": 0, "segmentation": [[1, 1, 2, 2, 3, 1e10]]}, "far outside"),
        ({"category_id": 0, "segmentation": {"size": [8, 6], "counts": RUNS}}, "of another size than the image.*6x8"),
        ({"category_id": 0, "iscrowd": 2, "segmentation": [POLYGON]}, "neither 0 nor 1"),
    ],
)
def test_unusable_annotation_is_named_with_its_file(annotation: dict[str, Any], words: str) -> None:
    with pytest.raises(DatasetError, match=words) as error:
        instances_of([{"id": 5, **annotation}])
    assert "nnotation 5 of folder/image.png" in str(error.value)
    assert "tools/check_dataset.py" in str(error.value)
    assert "\n" not in str(error.value)


def instances_of(annotations: list[dict[str, Any]], **more: Any) -> Instances:
    """Targets in the 8 x 6 image itself."""
    sizes: dict[str, Any] = {"source_size": (HEIGHT, WIDTH), "target_size": (HEIGHT, WIDTH)}
    arguments: dict[str, Any] = {"transforms": T.TransformList([]), "num_classes": 2, **sizes, **more}
    return annotations_to_instances(annotations, file_name="folder/image.png", **arguments)


@pytest.mark.parametrize("polygon", [[1, 1, 2, 2], [1, 1, 2, 2, 3, 3, 4]])
def test_polygon_without_three_points_is_left_out(polygon: list[int]) -> None:
    assert len(instances_of([{"category_id": 0, "segmentation": [polygon]}])) == 0
    both = instances_of([{"category_id": 0, "segmentation": [POLYGON, polygon]}])
    assert both.gt_masks.tensor.sum() == 6


BOX = {"category_id": 1, "bbox": [1, 1, 3, 2], "bbox_mode": BoxMode.XYWH_ABS}


@pytest.mark.parametrize("box", [{}, {"bbox": [1, 1, 4, 3], "bbox_mode": BoxMode.XYXY_ABS}])
def test_boxes_alone_move_with_the_image(box: dict[str, Any]) -> None:
    transforms = [T.HFlipTransform(WIDTH), T.CropTransform(2, 0, 4, 6, WIDTH, HEIGHT)]
    # Flipped, the box reaches from x = 4 to 7; the crop from 2 to 6 leaves 2 to 4.
    found = instances_of([{**BOX, **box}], transforms=T.TransformList(transforms), target_size=(6, 4), with_masks=False)
    assert found.gt_boxes.tensor.tolist() == [[2, 1, 4, 3]]
    assert found.gt_classes.tolist() == [1]
    assert not found.has("gt_masks")


def test_boxes_without_a_pixel_left_are_dropped() -> None:
    tiny = {**BOX, "bbox": [0.2, 0.2, 0.3, 0.3]}
    outside = {**BOX, "bbox": [9, 1, 2, 2]}
    crowd = {**BOX, "iscrowd": 1}
    assert len(instances_of([BOX, tiny, outside, crowd], with_masks=False)) == 1


def test_masks_give_boxes_that_are_missing() -> None:
    found = instances_of([{"category_id": 0, "segmentation": [POLYGON]}], with_masks=False)
    assert found.gt_boxes.tensor.tolist() == [[1, 1, 4, 3]]


def test_object_without_mask_among_masks_is_flagged() -> None:
    found = instances_of([BOX, {"category_id": 0, "segmentation": [POLYGON]}])
    assert found.gt_mask_supervised.tolist() == [False, True]
    assert found.gt_masks.tensor.sum(dim=(1, 2)).tolist() == [0, 6]
    assert found.gt_boxes.tensor.tolist() == [[1, 1, 4, 3]] * 2
    assert not instances_of([{"category_id": 0, "segmentation": [POLYGON]}]).has("gt_mask_supervised")


def test_annotations_say_whether_their_box_is_supervised() -> None:
    first = {"category_id": 0, "segmentation": [POLYGON], "box_supervised": False}
    second = {"category_id": 1, "segmentation": [POLYGON]}
    assert instances_of([first, second]).gt_box_supervised.tolist() == [False, True]
    assert not instances_of([second]).has("gt_box_supervised")
