"""What models cost and how long they take."""

import sys
import time

import analyze_model
import benchmark
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dimaskdino.analysis import timing
from dimaskdino.analysis.flops import _attention, count_flops, parts_of
from dimaskdino.analysis.timing import (
    PARTS,
    REST,
    compiled,
    example_input,
    time_exported,
    time_model,
    time_parts,
)
from dimaskdino.errors import UserError
from tests.analysis.hand_count import Sizes, resnet50, total
from tests.tiny_model import DIM, NUM_CLASSES, ToyBackbone, image, tiny_cfg, tiny_dino, tiny_model


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
    config.write_text(tiny_cfg({"MODEL.COMPILE": ["encoder"]}).dump())  # which cannot be traced
    for size, expected in (("128", "GFLOPs"), ("100", "--size 100 96")):
        monkeypatch.setattr(sys, "argv", ["analyze_model.py", str(config), "--size", size, "96"])
        if size == "128":
            analyze_model.main()
            assert expected in capsys.readouterr().out
        else:
            with pytest.raises(ValueError, match=expected):
                analyze_model.main()


class Slow(nn.Module):
    """Takes some seconds of a clock."""

    def __init__(self, clock, seconds, *inner) -> None:
        super().__init__()
        self.clock, self.seconds, self.inner = clock, seconds, nn.ModuleList(inner)

    def forward(self, images) -> None:
        self.clock.now += self.seconds
        for each in self.inner:
            each(images)


class SlowModel(Slow):
    """Parts of 1, 2, 4 and 8 seconds; 16 of its own, and as many as the image says."""

    def __init__(self, clock) -> None:
        self_parts = [Slow(clock, 2.0**power) for power in range(4)]
        super().__init__(clock, 16.0, *self_parts)
        self.weight = nn.Parameter(torch.zeros(1))
        self.device = torch.device("cpu")
        self.backbone, self.post_processor = self_parts[0], self_parts[3]
        self.sem_seg_head = nn.Module()
        self.sem_seg_head.pixel_decoder, self.sem_seg_head.predictor = self_parts[1:3]

    def forward(self, images) -> None:
        super().forward(images)
        self.clock.now += images[0]["seconds"]


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(time, "perf_counter", lambda: Clock.now)
    return Clock


def test_images_take_turns_and_the_first_runs_do_not_count(clock) -> None:
    images = [{"seconds": seconds} for seconds in (1000.0, 1.0, 3.0)]
    times = time_model(SlowModel(clock), images, warmup=1, runs=4)
    assert times.tolist() == [32.0, 34.0, 1031.0, 32.0]


def test_parts_are_timed_apart_and_what_is_left_is_preparation(clock) -> None:
    parts = time_parts(SlowModel(clock), [{"seconds": 5.0}], warmup=0, runs=2)
    assert {name: each.tolist() for name, each in parts.items()} == dict(
        zip((*PARTS, REST), ([1.0] * 2, [2.0] * 2, [4.0] * 2, [8.0] * 2, [21.0] * 2), strict=True)
    )


def test_the_spread_leaves_out_a_tenth_at_each_end() -> None:
    *_, row = benchmark.table("form", {"any": np.arange(1.0, 12.0)}).splitlines()
    assert row.split() == ["any", "6000.0", "2000.0", "to", "10000.0", "0.17"]


def test_the_parts_of_a_model_are_those_that_compute() -> None:
    model = tiny_model()
    parts = time_parts(model, [{"image": image(64, 96)}], warmup=0, runs=1)
    assert all(each.min() > 0 for each in parts.values())


def test_compiled_model_finds_the_same_and_is_eager_afterwards(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(
        torch, "compile", lambda forward: lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    )
    model, given = tiny_model(), [{"image": image(64, 64)}]
    with torch.no_grad():
        expected = model(given)[0]["instances"].scores
        with compiled(model):
            assert torch.equal(model(given)[0]["instances"].scores, expected)
        assert len(calls) == 3
        model(given)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("shape", "kind", "expected"),
    [
        ((1, 3, 800, 1216), np.float32, (1, 3, 800, 1216)),
        (("batch", 3, "height", None), np.float32, (1, 3, 64, 96)),
        (("height", "width", 3), np.uint8, (3, 64, 3)),
        ((2,), np.int64, (2,)),
    ],
)
def test_open_sides_of_an_input_are_those_of_the_image(shape, kind, expected) -> None:
    made = example_input(shape, kind, (64, 96))
    assert (made.shape, made.dtype) == (expected, kind)
    if shape == (2,):
        assert made.tolist() == [64, 96]


def test_a_file_that_cannot_be_timed_is_named(tmp_path) -> None:
    (tmp_path / "broken.onnx").write_text("not a model")  # without onnxruntime, the package is named beside it
    for name in ("model.pt", "missing.onnx", "broken.onnx"):
        with pytest.raises(UserError, match=name):
            time_exported(tmp_path / name, [(64, 64)], threads=1, warmup=0, runs=1)


def test_the_image_that_a_file_does_not_run_on_is_named(tmp_path, monkeypatch) -> None:
    opened = [((1, 3, "height", "width"), np.float32)], lambda inputs: 1 / (inputs[0].shape[2] > 4)
    monkeypatch.setitem(timing._SESSIONS, ".onnx", lambda *_: opened)
    (tmp_path / "a.onnx").touch()
    with pytest.raises(UserError, match=r"a\.onnx does not run on 4 x 128 px"):
        time_exported(tmp_path / "a.onnx", [(64, 64), (4, 128)], threads=1, warmup=0, runs=2)


def exported(monkeypatch, *shape) -> list[tuple[int, ...]]:
    """Let .onnx files have an input of this shape; returns those that they are given."""
    seen: list[tuple[int, ...]] = []
    opened = [(shape, np.float32)], lambda inputs: seen.append(inputs[0].shape)
    monkeypatch.setitem(timing._SESSIONS, ".onnx", lambda *_: opened)
    return seen


def test_a_file_for_several_images_at_a_time_is_refused(tmp_path, monkeypatch) -> None:
    exported(monkeypatch, 4, 3, 64, 96)
    (tmp_path / "four.onnx").touch()
    with pytest.raises(UserError, match=r"four\.onnx takes 4 images"):
        time_exported(tmp_path / "four.onnx", [(64, 96)], threads=1, warmup=0, runs=1)


@pytest.mark.parametrize(
    ("sides", "given", "label"),
    [(("height", "width"), {(64, 96), (96, 64)}, ""), ((128, 128), {(128, 128)}, ", 1 x 3 x 128 x 128")],
)
def test_files_see_the_padded_images_or_say_otherwise(tmp_path, monkeypatch, capsys, sides, given, label) -> None:
    seen = exported(monkeypatch, 1, 3, *sides)
    files = [tmp_path / folder / "model.onnx" for folder in "ab"]
    for name, size, file in zip("ab", ((60, 90), (90, 60)), files, strict=True):
        file.parent.mkdir()
        file.touch()
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    (tmp_path / "tiny.yaml").write_text(tiny_cfg({"INPUT.MIN_SIZE_TEST": 0}).dump())
    arguments = [tmp_path / "tiny.yaml", "--images", tmp_path / "a.png", tmp_path / "b.png", "--exported", *files]
    arguments += ["--warmup", 0, "--runs", 2, "--device", "cpu", "--threads", 1]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, arguments)])
    benchmark.main()
    assert {shape[2:] for shape in seen} == given
    printed = capsys.readouterr().out
    assert all(f"\n{file}{label}  " in printed for file in files)  # they have one name


def test_noise_has_a_size_and_images_have_their_own(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "a.yaml", "--size", "64", "64", "--images", "a.png"])
    with pytest.raises(SystemExit, match="2"):
        benchmark.parse_args()
    assert "--size" in capsys.readouterr().err


def test_exported_files_are_checked_before_the_model_is_timed(monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "build_model", None)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "absent.yaml", "--exported", "absent.onnx"])
    with pytest.raises(UserError, match=r"absent\.onnx"):
        benchmark.main()


def test_the_tool_prints_forms_and_parts(tmp_path, monkeypatch, capsys) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny_cfg().dump())
    arguments = [str(config), "--size", "64", "96", "--warmup", "0", "--runs", "2", "--device", "cpu", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments, "--json", str(tmp_path / "a" / "times.json")])
    benchmark.main()
    printed = capsys.readouterr().out
    assert "64 x 96" in printed
    assert all(name in printed for name in ("PyTorch", *PARTS, REST))
    assert (tmp_path / "a" / "times.json").is_file()
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments, "--opts", "MODEL.MaskDINO.TEST.PRECISION", "half"])
    with pytest.raises(UserError, match=r"TEST\.PRECISION"):
        benchmark.main()
