import sys

import analyze_model
import pytest
import torch
from torch import nn

from dimaskdino.analysis.flops import _attention, count_flops, parts_of
from tests.analysis.hand_count import Sizes, resnet50, total
from tests.tiny_model import DIM, NUM_CLASSES, ToyBackbone, tiny_cfg, tiny_dino, tiny_model


def tiny_sizes(guides: int, height: int, width: int) -> Sizes:
    strides = [(channels, 4 * 2**i) for i, channels in enumerate(ToyBackbone.channels.values())]
    features = tuple((channels, height // stride, width // stride) for channels, stride in strides)
    first = 12 if guides else 8
    return Sizes(features, DIM, 48, 48, 8, NUM_CLASSES, 1, 3, first, 8, guides)


def toy_backbone(height: int, width: int) -> int:
    widths = [3, *ToyBackbone.channels.values()]
    return sum((height * width // 16 // 4**i) * 9 * widths[i] * widths[i + 1] for i in range(4))


@pytest.mark.parametrize(
    ("decoder", "guides", "size"), [("DIMaskDINODecoder", 4, (800, 1216)), ("MaskDINODecoder", 0, (256, 320))]
)
def test_the_count_agrees_with_one_by_hand(decoder, guides, size) -> None:
    with torch.no_grad():
        counted = count_flops(tiny_model(TRANSFORMER_DECODER_NAME=decoder), size).total()
    assert counted == pytest.approx(total(tiny_sizes(guides, *size), toy_backbone(*size)), rel=0.01)


def test_r50_by_hand_is_what_is_known_of_it() -> None:
    # 4.09 billion without norms, of which the classifier has 2 million, and 11.1 million values are normed.
    assert resnet50(224, 224) == pytest.approx(4.087e9 + 2 * 11.1e6, rel=0.002)


def test_attention_counts_both_products() -> None:
    graph = torch.jit.trace(
        lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v),
        [torch.rand(2, 3, length, width) for length, width in ((5, 8), (7, 8), (7, 4))],
    ).graph
    (node,) = graph.findAllNodes("aten::scaled_dot_product_attention")
    assert _attention(list(node.inputs()), []) == {"attention": 2 * 3 * 5 * 7 * (8 + 4)}


@pytest.mark.parametrize("model", [tiny_model, tiny_dino])
def test_parts_add_up(model) -> None:
    model = model()
    whole, *parts = parts_of(model, (128, 128), depth=2)
    assert whole.name == ""
    assert whole.parameters == sum(each.numel() for each in model.parameters())
    top = [part for part in parts if "." not in part.name]
    assert [part.name for part in top] == ["backbone", "sem_seg_head"]
    # The masks' products are the network's own.
    assert 0.9 * whole.flops < sum(part.flops for part in top) <= whole.flops
    assert {part.name for part in parts if "." in part.name} == {
        *(f"backbone.{name}" for name, _ in model.backbone.named_children()),
        "sem_seg_head.pixel_decoder",
        "sem_seg_head.predictor",
    }


def test_the_tool_names_a_size_that_needs_padding(tmp_path, monkeypatch, capsys) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny_cfg().dump())
    for size, expected in (("128", "GFLOPs"), ("100", "--size 100 96")):
        monkeypatch.setattr(sys, "argv", ["analyze_model.py", str(config), "--size", size, "96"])
        if size == "128":
            analyze_model.main()
            assert expected in capsys.readouterr().out
        else:
            with pytest.raises(ValueError, match=expected):
                analyze_model.main()
