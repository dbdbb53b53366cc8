"""Multi-layer perceptrons, attention, position embeddings, padding, boxes, and blocks."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_backbone
from torch import nn

from dimaskdino.config import get_cfg
from dimaskdino.layers import MLP, FeedForward, MSDeformAttn, MultiheadAttention
from dimaskdino.layers.attention import xavier_init
from dimaskdino.layers.blocks import blocks_of
from dimaskdino.layers.boxes import cxcywh_to_xyxy, generalized_iou, inverse_sigmoid, masks_to_boxes, xyxy_to_cxcywh
from dimaskdino.layers.padding import PaddedBatch, level_centers
from dimaskdino.layers.position import box_sine_embedding, pixel_sine_embedding


@pytest.mark.parametrize(
    ("num_layers", "widths"), [(1, [(3, 5)]), (2, [(3, 7), (7, 5)]), (3, [(3, 7), (7, 7), (7, 5)])]
)
def test_mlp_has_the_widths_asked_for(num_layers, widths):
    mlp = MLP(3, 7, 5, num_layers)
    assert [(layer.in_features, layer.out_features) for layer in mlp.layers] == widths
    assert mlp(torch.randn(2, 4, 3)).shape == (2, 4, 5)


def test_mlp_has_relu_between_layers_but_not_after_the_last():
    mlp = MLP(1, 1, 1, 2)
    with torch.no_grad():
        for layer, weight in zip(mlp.layers, (1.0, -1.0), strict=True):
            layer.weight.fill_(weight)
            layer.bias.fill_(0.0)
    assert mlp(torch.tensor([[2.0], [-3.0]])).tolist() == [[-2.0], [0.0]]


def test_attention_is_batch_first_and_returns_one_tensor():
    attention = MultiheadAttention(8, 2)
    output = attention(torch.randn(3, 5, 8), torch.randn(3, 7, 8), torch.randn(3, 7, 8))
    assert output.shape == (3, 5, 8)


def test_attention_agrees_with_torch_in_its_own_layout():
    ours, theirs = MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)
    theirs.load_state_dict(ours.state_dict())
    query, key, value = torch.randn(3, 5, 8), torch.randn(3, 7, 8), torch.randn(3, 7, 8)
    expected, _ = theirs(*(x.transpose(0, 1) for x in (query, key, value)))
    torch.testing.assert_close(ours(query, key, value), expected.transpose(0, 1))


def test_attention_mask_hides_where_it_is_true():
    attention = MultiheadAttention(8, 2)
    query, tokens = torch.randn(1, 2, 8), torch.randn(1, 3, 8)
    mask = torch.tensor([[False, False, True], [False, False, False]])
    before = attention(query, tokens, tokens, mask)
    tokens = tokens.clone()
    tokens[:, 2] += 1
    after = attention(query, tokens, tokens, mask)
    torch.testing.assert_close(after[:, 0], before[:, 0], rtol=0, atol=0)
    assert not torch.allclose(after[:, 1], before[:, 1])


class Block(FeedForward):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.add_feed_forward(4, 6, dropout)
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return self.feed_forward(x, self.norm)


def test_feed_forward_is_post_norm_with_a_residual():
    block, x = Block(0.0), torch.randn(2, 3, 4)
    expected = block.norm(x + block.linear2(block.linear1(x).relu()))
    torch.testing.assert_close(block(x), expected)


def test_feed_forward_takes_tokens_in_parts_in_evaluation(monkeypatch):
    block, x, widened = Block(0.0), torch.randn(2, 5, 4), []
    expected = block(x)
    block.linear1.register_forward_hook(lambda _, args, out: widened.append(tuple(out.shape)))
    monkeypatch.setattr("dimaskdino.layers.attention._WIDE_VALUES", 24)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected)
    assert widened == [(2, 2, 6), (2, 2, 6), (2, 1, 6)]


def test_feed_forward_drops_the_hidden_values_and_the_output():
    block, x, seen = Block(0.5), torch.randn(2, 3, 4), []
    drop = block.drop
    block.drop = lambda values: seen.append(values.shape[-1]) or drop(values)
    block(x)
    assert seen == [6, 4]


def test_feed_forward_drops_in_training_alone():
    block, x = Block(0.5), torch.randn(2, 3, 4)
    assert not torch.equal(block(x), block(x))
    block.eval()
    torch.testing.assert_close(block(x), block(x), rtol=0, atol=0)


def test_xavier_init_bounds_matrices_and_leaves_vectors():
    layer = nn.Linear(20, 10)
    bias = layer.bias.clone()
    nn.init.constant_(layer.weight, 9.0)
    xavier_init(layer)
    bound = (6 / 30) ** 0.5
    assert layer.weight.abs().max() <= bound
    assert layer.weight.abs().max() > bound / 2
    assert torch.equal(layer.bias, bias)


BACKBONES = {
    "resnet": (["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", 50], "BottleneckBlock", 16),
    "swin": (["MODEL.BACKBONE.NAME", "D2SwinTransformer", "MODEL.SWIN.DEPTHS", [2, 2, 6, 2]], "SwinBlock", 12),
    "timm": (["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", "convnext_atto"], "ConvNeXtBlock", 12),
}


@pytest.mark.parametrize("kind", BACKBONES)
def test_blocks_of_a_backbone(kind: str) -> None:
    options, block, count = BACKBONES[kind]
    cfg = get_cfg()
    cfg.merge_from_list([*options, "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]])
    with torch.device("meta"):
        backbone = build_backbone(cfg)
    assert [type(each).__name__ for each in blocks_of(backbone)] == [block] * count


def test_plain_layers_are_no_blocks() -> None:
    assert blocks_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == []
    assert blocks_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []


CPU = torch.device("cpu")


def test_pixel_embedding_has_y_in_its_first_half():
    embedding = pixel_sine_embedding(2, 3, 8, CPU).view(2, 3, 8)
    assert torch.equal(embedding[0, 0, :4], embedding[0, 2, :4])
    assert torch.equal(embedding[0, 1, 4:], embedding[1, 1, 4:])
    assert not torch.allclose(embedding[0, 0, 4:], embedding[0, 1, 4:])
    assert not torch.allclose(embedding[0, 0, :4], embedding[1, 0, :4])


@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 2)])
def test_pixel_embedding_entries_by_hand(row, column):
    embedding = pixel_sine_embedding(2, 3, 8, CPU).view(2, 3, 8)[row, column]
    y, x = 2 * math.pi * (row + 1) / (2 + 1e-6), 2 * math.pi * (column + 1) / (3 + 1e-6)
    # Four channels per axis: frequency 10000^0 for the first pair, 10000^(2/4) = 100 for the second.
    expected = [f(p / w) for p in (y, x) for w in (1, 100) for f in (math.sin, math.cos)]
    assert embedding.tolist() == pytest.approx(expected, abs=1e-5)


def test_box_embedding_by_hand_in_order_y_x_w_h():
    cx, cy, w, h = 0.2, 0.4, 0.3, 0.7
    embedding = box_sine_embedding(torch.tensor([[[cx, cy, w, h]]]), 8)
    assert embedding.shape == (1, 1, 16)
    expected = [f(2 * math.pi * p / t) for p in (cy, cx, w, h) for t in (1, 100) for f in (math.sin, math.cos)]
    assert embedding[0, 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_box_embedding_is_float32_whatever_the_boxes_are():
    assert box_sine_embedding(torch.rand(3, 4).bfloat16(), 8).dtype == torch.float32


def test_embeddings_have_256_channels_per_pixel_512_per_box():
    assert pixel_sine_embedding(3, 5, 256, CPU).shape == (15, 256)
    assert box_sine_embedding(torch.rand(7, 4), 256).shape == (7, 512)


def test_temperature_and_offset_by_hand():
    embedding = pixel_sine_embedding(1, 2, 8, CPU, temperature=25.0, offset=-0.5).view(2, 8)
    # Cell centers at .5 and 1.5 of 2; the second pair of channels has the wavelength 25^(2/4) = 5.
    x = [2 * math.pi * (cell + 0.5) / (2 + 1e-6) for cell in (0, 1)]
    for row, position in zip(embedding, x, strict=True):
        assert row[4:].tolist() == pytest.approx(
            [f(position / w) for w in (1, 5) for f in (math.sin, math.cos)], abs=1e-5
        )


SHAPES = [(8, 16), (4, 8)]


def test_valid_cells_by_hand():
    valid = PaddedBatch([(40, 100), (64, 128)], (64, 128)).valid_cells(SHAPES, CPU)
    # 100 of 128 columns are 12.5 of 16 cells, and a cell that starts on the image lies on it.
    assert valid.counts.tolist() == [[[13, 5], [7, 3]], [[16, 8], [8, 4]]]
    torch.testing.assert_close(valid.ratios[0], torch.tensor([[13 / 16, 5 / 8], [7 / 8, 3 / 4]]))
    assert torch.equal(valid.ratios[1], torch.ones(2, 2))
    assert not valid.is_padding[1].any()
    padding = [each.view(shape) for each, shape in zip(valid.is_padding[0].split([128, 32]), SHAPES, strict=True)]
    assert not padding[0][:5, :13].any()
    assert padding[0][5:].all()
    assert padding[0][:, 13:].all()
    assert int((~padding[1]).sum()) == 7 * 3


def test_without_padding_there_is_nothing_to_ignore():
    assert PaddedBatch([(64, 128)] * 2, (64, 128)).valid_cells(SHAPES, CPU) is None


def test_cells_are_those_of_a_mask_resized_by_nearest_neighbor():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        canvas = torch.randint(20, 400, (2,), generator=generator)
        size = [int(torch.randint(1, int(side) + 1, (1,), generator=generator)) for side in canvas]
        shape = [-(-int(side) // 8) for side in canvas]
        batch = PaddedBatch([tuple(size), tuple(canvas.tolist())], tuple(canvas.tolist()))
        valid = batch.valid_cells([tuple(shape)], CPU)
        if valid is None:
            continue
        mask = torch.ones(*canvas.tolist())
        mask[: size[0], : size[1]] = 0
        assert torch.equal(valid.is_padding[0].view(shape), F.interpolate(mask[None, None], shape)[0, 0] > 0)


@pytest.mark.parametrize("coordinates", [2, 4], ids=["points", "boxes"])
def test_attention_sees_the_image_as_if_there_were_no_padding(coordinates):
    torch.manual_seed(0)
    attention = MSDeformAttn(dim=16, num_levels=2, num_heads=2)
    torch.nn.init.normal_(attention.sampling_offsets.weight)
    torch.nn.init.normal_(attention.value_proj.bias)
    query, reference = torch.randn(1, 5, 16), torch.rand(1, 5, coordinates)
    image = [torch.randn(1, 4, 6, 16), torch.randn(1, 2, 3, 16)]
    alone = torch.cat([level.flatten(1, 2) for level in image], dim=1)
    expected = attention(query, reference, alone, [(4, 6), (2, 3)])
    # The same image in the corner of a canvas of 8 x 16 and 4 x 8 cells, beside noise.
    canvas = [torch.randn(1, 8, 16, 16), torch.randn(1, 4, 8, 16)]
    for level, own in zip(canvas, image, strict=True):
        level[:, : own.shape[1], : own.shape[2]] = own
    tokens = torch.cat([level.flatten(1, 2) for level in canvas], dim=1)
    valid = PaddedBatch([(32, 48)], (64, 128)).valid_cells(SHAPES, CPU)
    torch.testing.assert_close(attention(query, reference, tokens, SHAPES, valid), expected)


def test_centers_are_parts_of_the_image():
    valid = PaddedBatch([(32, 64), (64, 128)], (64, 128)).valid_cells(SHAPES, CPU)
    fine, coarse = level_centers(SHAPES, CPU, valid)
    assert fine[0, 0].tolist() == pytest.approx([0.5 / 8, 0.5 / 4])
    assert fine[1, 0].tolist() == pytest.approx([0.5 / 16, 0.5 / 8])
    assert coarse[0, -1].tolist() == pytest.approx([7.5 / 4, 3.5 / 2])


def test_positions_end_where_the_image_ends():
    valid = PaddedBatch([(32, 64), (64, 128)], (64, 128)).valid_cells(SHAPES, CPU)
    padded = pixel_sine_embedding(8, 16, 8, CPU, counts=valid.counts[:, 0]).view(2, 8, 16, 8)
    torch.testing.assert_close(padded[0, :4, :8].flatten(0, 1), pixel_sine_embedding(4, 8, 8, CPU))
    torch.testing.assert_close(padded[1].flatten(0, 1), pixel_sine_embedding(8, 16, 8, CPU))


def test_conversions_by_hand():
    corners = torch.tensor([[[0.1, 0.2, 0.5, 0.8]]])
    centered = torch.tensor([[[0.3, 0.5, 0.4, 0.6]]])
    torch.testing.assert_close(xyxy_to_cxcywh(corners), centered)
    torch.testing.assert_close(cxcywh_to_xyxy(centered), corners)


def test_inverse_sigmoid_undoes_sigmoid():
    x = torch.tensor([-5.0, -1.0, 0.0, 2.0])
    torch.testing.assert_close(inverse_sigmoid(x.sigmoid()), x)


@pytest.mark.parametrize(("value", "expected"), [(0.0, math.log(1e-5)), (1.0, -math.log(1e-5)), (-3.0, math.log(1e-5))])
def test_inverse_sigmoid_stays_finite_at_the_ends_and_beyond(value, expected):
    # At 0: log(1e-5 / 1); at 1: log(1 / 1e-5); values outside [0, 1] count as the nearest end.
    assert inverse_sigmoid(torch.tensor(value)).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_inverse_sigmoid_keeps_the_dtype(dtype):
    assert inverse_sigmoid(torch.tensor([0.25, 0.75], dtype=dtype)).dtype == dtype


def test_inverse_sigmoid_takes_another_eps():
    assert inverse_sigmoid(torch.tensor(0.0), eps=1e-3).item() == pytest.approx(math.log(1e-3), rel=1e-6)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ([0.0, 0.0, 2.0, 2.0], 1.0),  # the same box
        ([1.0, 0.0, 3.0, 2.0], 2 / 6),  # overlap 2 of union 6, hull 6
        ([1.0, 1.0, 3.0, 3.0], 1 / 7 - 2 / 9),  # overlap 1 of union 7, hull 9 of which 2 empty
        ([2.0, 0.0, 4.0, 2.0], 0.0),  # they touch: no overlap, hull 8 is all union
        ([4.0, 0.0, 6.0, 2.0], -4 / 12),  # apart: hull 12, union 8
    ],
)
def test_generalized_iou_by_hand(other, expected):
    value = generalized_iou(torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor(other))
    assert value.item() == pytest.approx(expected, abs=1e-5)


def test_generalized_iou_broadcasts_to_all_pairs():
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [4.0, 0.0, 6.0, 2.0]])
    pairs = generalized_iou(boxes[:, None], boxes[None])
    torch.testing.assert_close(pairs, torch.tensor([[1.0, -1 / 3], [-1 / 3, 1.0]]), rtol=0, atol=1e-5)


def test_generalized_iou_of_two_empty_boxes_is_zero():
    point = torch.tensor([0.5, 0.5, 0.5, 0.5])
    assert generalized_iou(point, point).item() == 0.0


def test_generalized_iou_adds_1e_6_to_areas():
    # A box of one pixel of a 1024 px image has area 9.5e-7, so even a perfect hit scores about one half.
    side = 1 / 1024
    box = torch.tensor([0.0, 0.0, side, side])
    assert generalized_iou(box, box).item() == pytest.approx(side**2 / (side**2 + 1e-6), rel=1e-4)


def test_generalized_iou_has_finite_gradients_for_empty_boxes():
    box = torch.full((4,), 0.5, requires_grad=True)
    generalized_iou(box, torch.tensor([0.5, 0.5, 0.5, 0.5])).backward()
    assert box.grad.isfinite().all()


def mask_of(*pixels: tuple[int, int]) -> torch.Tensor:
    """(4, 6) mask with these (y, x) pixels."""
    mask = torch.zeros(4, 6, dtype=torch.bool)
    for y, x in pixels:
        mask[y, x] = True
    return mask


@pytest.mark.parametrize(
    ("mask", "inclusive", "exclusive"),
    [
        (mask_of((1, 2)), [2, 1, 2, 1], [2, 1, 3, 2]),  # one pixel
        (mask_of((0, 1), (2, 4)), [1, 0, 4, 2], [1, 0, 5, 3]),  # two pixels apart
        (mask_of((3, 0), (3, 5)), [0, 3, 5, 3], [0, 3, 6, 4]),  # a row at the lower edge
        (mask_of(), [6, 4, 6, 4], [0, 0, 0, 0]),  # empty: the far corner without size, or zeros
        (~mask_of(), [0, 0, 5, 3], [0, 0, 6, 4]),  # everything
    ],
    ids=["pixel", "pair", "row", "empty", "full"],
)
def test_masks_to_boxes_by_hand(mask, inclusive, exclusive):
    stack = torch.stack((mask, mask_of((0, 0))))[None]
    for flag, expected in ((True, inclusive), (False, exclusive)):
        boxes = masks_to_boxes(stack, inclusive=flag)
        assert boxes.shape == (1, 2, 4)
        assert boxes.dtype == torch.float32
        assert boxes[0, 0].tolist() == expected


def test_masks_to_boxes_takes_no_masks():
    assert masks_to_boxes(torch.zeros(0, 4, 6, dtype=torch.bool), inclusive=True).shape == (0, 4)
