"""Exported files find what the model finds; what cannot be exported is refused."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import export
import numpy as np
import predict_onnx
import pytest
import torch
from PIL import Image
from predict_onnx import Frame, Model, interpolation, run_lengths
from pycocotools import mask as mask_util

from dimaskdino import Predictor
from dimaskdino.export import formats
from dimaskdino.export.check import differences, to_detectron2
from dimaskdino.layers import ms_deform_attn_fused
from dimaskdino.layers.exporting import exporting
from dimaskdino.modeling.backbone.timm import TimmBackbone
from dimaskdino.modeling.postprocessing import Frame as TorchFrame
from dimaskdino.modeling.postprocessing import MaskRendering
from dimaskdino.structures import MaskLogits
from dimaskdino.visualization import class_color
from tests.documentation import example
from tests.test_predictor import make_run
from tests.tiny_model import TINY_DINO, image

TOOLS = Path(__file__).parents[2] / "tools"
DINO = TINY_DINO | {"MODEL.DINO.DEC_LAYERS": 1}
SMALL = {"MODEL.MaskDINO.DEC_LAYERS": 2, "INPUT.MAX_SIZE_TEST": 96}
ONE_LAYER = {"MODEL.MaskDINO.DEC_LAYERS": 1, "MODEL.MaskDINO.BATO.ENABLED": False, "MODEL.MaskDINO.DI.ENABLED": False}
PANOPTIC = {"MODEL.MaskDINO.TEST.PANOPTIC_ON": True, "MODEL.MaskDINO.TEST.SEMANTIC_ON": True}
PANOPTIC |= {"MODEL.MaskDINO.THING_CLASSES": [0, 1, 2], "MODEL.MaskDINO.TEST.OBJECT_MASK_THRESHOLD": 0.2}
SEMANTIC = {"MODEL.MaskDINO.TEST.INSTANCE_ON": False, "MODEL.MaskDINO.TEST.SEMANTIC_ON": True}
SEMANTIC |= {"MODEL.MaskDINO.SEMANTIC_CE_LOSS": True}


def box_type(name: str) -> dict:
    return {"MODEL.MaskDINO.INITIALIZE_BOX_TYPE": name}


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Two images of different shapes, neither of which fills its canvas."""
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for seed, (path, size) in enumerate(zip(paths, ((50, 90), (80, 60)), strict=True)):
        Image.fromarray(image(*size, seed).permute(1, 2, 0).numpy().astype(np.uint8)).save(path)
    return paths


def run_tool(monkeypatch, run: Path, kind: str, output: Path, pictures: list[Path], *more: str) -> None:
    arguments = ["--format", kind, "--weights", run, "--output", output, "--images", *pictures, *more]
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    export.main()


def assert_finds_the_same(model: Model, run: Path, pictures: list[Path]) -> None:
    predictor = Predictor(run, device="cpu", score=0)
    for picture in pictures:
        (found,), expected = model([picture]), predictor(picture)
        if "instances" in expected:
            instances = expected.instances
            assert len(instances) > 0
            assert found["labels"].tolist() == instances.pred_classes.tolist()
            np.testing.assert_allclose(found["scores"], instances.scores.numpy(), atol=1e-4)
            np.testing.assert_allclose(found["boxes"], instances.pred_boxes.tensor.numpy(), atol=0.02)
            if instances.has("pred_masks"):
                assert (found["masks"] == instances.pred_masks.numpy()).mean() > 0.999
        if "panoptic_seg" in expected:
            ids, segments = expected["panoptic_seg"]
            assert found["segments"] == [each | {"score": pytest.approx(each["score"], abs=1e-4)} for each in segments]
            assert len(segments) > 1
            assert (found["panoptic"] == ids.numpy()).mean() > 0.999
        if "sem_seg" in expected:
            np.testing.assert_allclose(found["semantic"], expected["sem_seg"].numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "more"),
    [
        (box_type("bitmask") | PANOPTIC | ONE_LAYER, []),
        (box_type("no") | SEMANTIC | ONE_LAYER, ["--deformable-attention", "gather"]),
        (DINO, []),
    ],
    ids=["panoptic, bitmask", "semantic, no, gather", "dino"],
)
def test_onnx_of_any_size_finds_what_the_predictor_finds(tmp_path, monkeypatch, pictures, options, more):
    pytest.importorskip("onnxruntime")
    run, output = make_run(tmp_path / "run", SMALL | options), tmp_path / "model.onnx"
    run_tool(monkeypatch, run, "onnx", output, pictures, *more)
    assert_finds_the_same(Model(output), run, pictures)
    written = formats.require("onnx").load(output)
    assert ("GridSample" in {node.op_type for node in written.graph.node}) == (not more)
    assert written.opset_import[0].version == 17


class OneMap(TimmBackbone):
    def forward(self, images):
        return super().forward(images)["res3"]


def test_backbones_of_timm_give_the_same_sizes_in_onnx():
    onnxruntime = pytest.importorskip("onnxruntime")
    backbone = OneMap(name="regnetx_002", out_features=["res3"]).eval()
    buffer, axes = io.BytesIO(), {"images": {2: "height", 3: "width"}}
    given = {"dynamo": False, "opset_version": 17, "input_names": ["images"], "dynamic_axes": axes}
    torch.onnx.export(backbone, (torch.rand(1, 3, 64, 96),), buffer, **given)
    session = onnxruntime.InferenceSession(buffer.getvalue())
    for size in ((64, 64), (50, 90), (33, 31)):
        images = torch.rand(1, 3, *size)
        (found,) = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(found, backbone(images).detach().numpy(), atol=1e-4)


def test_opsets_go_from_16_to_20(monkeypatch):
    known = []
    for opset in range(14, 23):
        monkeypatch.setattr(sys, "argv", ["export.py", "--format", "onnx", "--output", "a.onnx", "--opset", str(opset)])
        with contextlib.suppress(SystemExit):
            known.append(export.parse_args().opset)
    assert known == [16, 17, 18, 19, 20]


@pytest.mark.parametrize("kind", ["torchscript", "torch-export", "openvino"])
def test_other_formats_find_what_the_model_finds(tmp_path, monkeypatch, pictures, kind):
    for package in formats.FORMATS[kind].packages:
        pytest.importorskip(package)
    run = make_run(tmp_path / "run", DINO | {"INPUT.MAX_SIZE_TEST": 96})
    output = tmp_path / f"model{formats.FORMATS[kind].suffix}"
    fixed = ["--size", "96", "96", "--batch", "2"] if kind == "torch-export" else []
    run_tool(monkeypatch, run, kind, output, pictures, *fixed)
    description, _ = formats.FORMATS[kind].load(output, [], 1)
    assert description["classes"] == [f"class {index}" for index in range(5)]
    expected = ([96, 96], 2) if kind == "torch-export" else (None, None)
    assert (description["canvas"], description["batch"]) == expected
    assert list(tmp_path.glob("unchecked*")) == []


def test_runner_equals_predictor_without_torch(tmp_path, monkeypatch, pictures):
    pytest.importorskip("onnxruntime")
    lone = tmp_path / "lone"
    lone.mkdir()
    run = make_run(tmp_path / "run", SMALL | {"MODEL.MaskDINO.FIRST_SELECTED_QUERIES": 66})
    output = lone / "shapes.onnx"
    run_tool(monkeypatch, run, "onnx", output, pictures)
    assert_finds_the_same(Model(output), run, pictures)
    assert [each["size"] for each in Model(output)(pictures)] == [(50, 90), (80, 60)]
    program = (
        "import runpy, sys\n"
        "try: runpy.run_path('predict_onnx.py', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 3, end.code\n"
        "runpy.run_path('use_onnx.py')\n"
        "assert not {'torch', 'detectron2', 'dimaskdino'} & set(sys.modules)\n"
    )
    (lone / "predict_onnx.py").write_text((TOOLS / "predict_onnx.py").read_text())
    (lone / "use_onnx.py").write_text(example("docs/export.md", "use_onnx"))
    twins = [lone / "image.jpg", tmp_path / "image.jpg", lone / "image_4.jpg"]
    for twin in twins:
        Image.open(pictures[0]).save(twin)
    (tmp_path / "bad.png").write_text("not an image")
    Image.new("RGB", (3000, 4)).save(tmp_path / "long.png")  # 32 x 96 px on the canvas: 48 + 12 + 3 + 2 tokens
    pipe, taken = tmp_path / "pipe", tmp_path / "taken.jpg"  # of these, one never ends, and one's picture has no place
    os.mkfifo(pipe)
    Image.open(pictures[0]).save(taken)
    (tmp_path / "out" / "taken.png").mkdir(parents=True)
    unusable = [tmp_path / "bad.png", tmp_path / "long.png", lone]
    arguments = [output, pictures[0], *unusable, *twins, pipe, taken, "--output", tmp_path / "out", "--score", "0"]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], cwd=lone, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "bad.png" in done.stderr
    assert f"{lone}: not a file; name images" in done.stderr
    assert f"{pipe}: not a file" in done.stderr
    assert re.search(r"Is a directory: .*taken\.png", done.stderr), done.stderr
    assert re.search(r"long\.png: .* 65 tokens, .* 66; cut it", done.stderr), done.stderr
    content, *_ = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (content["height"], content["width"], len(content["objects"])) == (50, 90, 6)
    assert content["objects"][0]["class"].startswith("class ")
    assert Image.open(tmp_path / "out" / "a.png").size == (90, 50)
    assert {path.name for path in (tmp_path / "out").glob("i*")} == {"image_4_4.png", "image_5.png", "image_4.png"}


def test_a_file_that_finds_something_else_is_not_kept(tmp_path, monkeypatch, pictures, capsys):
    write = formats.write_torchscript

    def write_wrong(wanted: formats.Export, path: Path) -> None:
        bias = wanted.graph.model.sem_seg_head.predictor.heads.class_embed.bias
        bias += 0.1
        write(wanted, path)
        bias -= 0.1

    wrong = formats.Format(".pt", write_wrong, formats.open_torchscript)
    monkeypatch.setitem(formats.FORMATS, "torchscript", wrong)
    run, output = make_run(tmp_path / "run", SMALL), tmp_path / "model.pt"
    output.touch()  # of an earlier export, which nobody must take for this one
    with pytest.raises(SystemExit) as end:
        run_tool(monkeypatch, run, "torchscript", output, pictures)
    assert end.value.code == export.CHECK_FAILED_STATUS
    assert "a.png" in capsys.readouterr().err
    assert list(tmp_path.glob("*.pt")) == []


def test_a_file_of_any_size_is_checked_on_another_shape(tmp_path, monkeypatch, capsys):
    def open_wrong(path: Path, threads: int) -> tuple:
        description, right = formats.open_torchscript(path, threads)
        return description, lambda images, sizes: (
            right(images, sizes)[0] + (images.shape[2] != images.shape[3]),
            *right(images, sizes)[1:],
        )

    monkeypatch.setitem(formats.FORMATS, "torchscript", formats.Format(".pt", formats.write_torchscript, open_wrong))
    square = tmp_path / "square.png"
    Image.fromarray(image(96, 96, 0).permute(1, 2, 0).numpy().astype(np.uint8)).save(square)
    run = make_run(tmp_path / "run", DINO | {"INPUT.MAX_SIZE_TEST": 96})
    with pytest.raises(SystemExit):
        run_tool(monkeypatch, run, "torchscript", tmp_path / "model.pt", [square, square])
    assert "square.png, its upper part" in capsys.readouterr().err


def test_an_image_that_the_file_cannot_take_is_named(tmp_path, monkeypatch, pictures):
    Image.new("RGB", (3000, 4)).save(tmp_path / "long.png")
    run = make_run(tmp_path / "run", SMALL | {"MODEL.MaskDINO.FIRST_SELECTED_QUERIES": 66})
    with pytest.raises(export.UserError, match=r"^The file cannot be checked with .*long\.png"):
        run_tool(monkeypatch, run, "torchscript", tmp_path / "model.pt", [pictures[0], tmp_path / "long.png"])


@pytest.mark.parametrize(
    ("kind", "name", "more", "options", "named"),
    [
        ("torchscript", "model.onnx", [], {}, ".pt"),
        ("torch-export", "model.pt2", [], {}, "--size"),
        ("torchscript", "folder.pt", [], {}, r"folder\.pt is a folder"),
        ("torchscript", "model.pt", ["--size", "96", "90"], {}, "multiples"),
        ("torchscript", "model.pt", ["--size", "32", "32"], {"MODEL.MaskDINO.FIRST_SELECTED_QUERIES": 80}, "too small"),
        ("torchscript", "model.pt", ["--batch", "2"], {}, "--batch"),
        ("torchscript", "model.pt", ["--opset", "16"], {}, "--opset"),
        ("torchscript", "model.pt", ["--evaluate"], {"DATASETS.TEST": ("absent_val",)}, "DATASETS.TEST.*absent_val"),
        ("torchscript", "model.pt", [], {"MODEL.MaskDINO.DI.RANDOM_POSITION": True}, "RANDOM_POSITION"),
        ("torchscript", "model.pt", [], {"INPUT.READER": "auto"}, "INPUT.READER"),
        ("torchscript", "model.pt", [], {"TEST.AUG.ENABLED": True}, "TEST.AUG.ENABLED"),
    ],
)
def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch, pictures, kind, name, more, options, named):
    run = make_run(tmp_path / "run", options)
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(export.UserError, match=named):
        run_tool(monkeypatch, run, kind, tmp_path / name, pictures, *more)
    assert not (tmp_path / name).is_file()


def test_a_missing_package_is_named_with_the_extra(tmp_path, monkeypatch, pictures):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(export.UserError, match=r"dimaskdino\[export\]"):
        run_tool(monkeypatch, make_run(tmp_path / "run"), "onnx", tmp_path / "model.onnx", pictures)


def test_images_must_be_given_where_there_are_none(tmp_path, monkeypatch):
    make_run(tmp_path / "output/demo/run")  # which is exported if no other is named
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["export.py", "--format", "torchscript", "--output", "model.pt"])
    with pytest.raises(export.UserError, match="--images"):
        export.main()


def test_both_forms_of_deformable_attention_are_the_op():
    shapes = [(6, 5), (3, 3), (1, 2)]
    tokens = sum(height * width for height, width in shapes)
    value, reference = torch.randn(2, tokens, 4, 8), torch.rand(2, 7, 4) * 1.6 - 0.3
    offsets, logits = 3 * torch.randn(2, 7, 4, 3, 4, 2), torch.randn(2, 7, 4, 3, 4)
    offsets[0, 0, 0, 0, 0] = torch.tensor([float("nan"), 1e30])
    offsets[0, 1, 0, 0, 0] = 1e30
    expected = ms_deform_attn_fused(value, shapes, reference, offsets, logits)
    for form in ("grid_sample", "gather"):
        with exporting(form):
            found = ms_deform_attn_fused(value, shapes, reference, offsets, logits)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def result(**changes: object) -> dict:
    masks = np.zeros((2, 20, 20), bool)
    masks[0, :10] = masks[1, 10:] = True
    boxes = np.array([[0, 0, 20, 10], [0, 10, 20, 20]], np.float32)
    found = {"scores": np.array([0.9, 0.5]), "labels": np.array([1, 2]), "boxes": boxes, "masks": masks}
    return {name: value.copy() for name, value in found.items()} | changes


def test_the_same_is_the_same():
    assert differences(result(), result()) == []
    tiny = np.zeros((2, 20, 20), bool)
    tiny[:, 4:8, 4:8] = True
    one_less, empty = tiny.copy(), np.zeros_like(tiny)
    one_less[0, 4, 4] = False
    assert differences(result(masks=one_less), result(masks=tiny)) != []  # 1/16 of its pixels
    assert differences(result(masks=empty), result(masks=empty)) == []
    assert differences(result(boxes=result()["boxes"] + 0.09, scores=np.array([0.9009, 0.5])), result()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"boxes": result()["boxes"] + 0.11},
        {"scores": np.array([0.902, 0.5])},
        {"labels": np.array([3, 2])},
        {"masks": np.roll(result()["masks"], 1, axis=1)},
        {"scores": np.array([0.9]), "labels": np.array([1]), "boxes": result()["boxes"][:1]},
    ],
)
def test_what_differs_is_found(changes):
    assert differences(result(**changes), result()) != []


def test_segments_and_maps_are_compared():
    ids = np.repeat([[1], [2]], 10, axis=0) * np.ones((1, 20), int)
    segments = [{"id": 1, "category_id": 4, "isthing": True}, {"id": 2, "category_id": 5, "isthing": False}]
    scores = np.stack([ids == 1, ids == 2]).astype(np.float32)
    expected = {"panoptic": ids, "segments": segments, "semantic": scores}
    renumbered = {"panoptic": 3 - ids, "segments": [segments[0] | {"id": 2}, segments[1] | {"id": 1}]}
    assert differences(expected | renumbered, expected) == []
    assert differences(expected | {"panoptic": np.roll(ids, 1, axis=0)}, expected) != []
    assert differences(expected | {"segments": segments[:1]}, expected) != []
    assert differences(expected | {"semantic": scores + 2e-3}, expected) != []


def test_arrays_become_what_detectron2_evaluates() -> None:
    found = to_detectron2(result(size=(20, 20), labels=np.array([1, 2])))
    assert found.keys() == {"instances"}
    assert found["instances"].image_size == (20, 20)
    assert found["instances"].pred_boxes.tensor.tolist() == result()["boxes"].tolist()
    assert found["instances"].pred_masks.sum((1, 2)).tolist() == [200, 200]
    segments = to_detectron2(
        {"panoptic": np.ones((2, 3), np.int32), "segments": [{"id": 1}], "semantic": np.zeros((4, 2, 3))}
    )
    assert segments.keys() == {"panoptic_seg", "sem_seg"}
    assert segments["panoptic_seg"][1] == [{"id": 1}]
    assert segments["sem_seg"].shape == (4, 2, 3)


DESCRIPTION = {"version": 1, "canvas": None, "batch": None, "divisibility": 32, "min_size": 800, "max_size": 1333}
DESCRIPTION |= {"pad_value": [1.0, 2.0, 3.0], "format": "BGR", "ignores_padding": False}


def model(**changes: object) -> Model:
    return Model(description=DESCRIPTION | changes, run=dict)


@pytest.mark.parametrize("sizes", [((64, 96), (50, 90), (25, 45)), ((64, 64), (64, 64), (150, 130)), ((32, 32),) * 3])
def test_masks_are_resized_as_by_the_model(sizes):
    logits = torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(0))
    expected = TorchFrame(*sizes).crop_and_resize(TorchFrame(*sizes).on_canvas(logits))
    frame = Frame(*sizes)
    found = np.stack([frame.interpolate(each.numpy(), "both") for each in logits])
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
    in_steps = np.stack([frame.interpolate(frame.interpolate(each.numpy(), "enlarge"), "fit") for each in logits])
    np.testing.assert_allclose(in_steps, expected.numpy(), atol=1e-4)
    for steps, name in (("two_step", "both"), ("direct", "direct")):
        rendering = MaskRendering(interpolation=steps)
        masks, _ = rendering(MaskLogits(torch.eye(2)[None], logits[None]), 0, torch.arange(2), TorchFrame(*sizes))
        found = np.stack([frame.interpolate(each.numpy(), name) > 0 for each in logits])
        assert (found == masks.numpy()).mean() > 0.999


def test_runner_interpolates_masks_as_its_model_does():
    outputs = {"scores": torch.ones(1).numpy(), "labels": np.zeros(1, np.int64), "boxes": np.zeros((1, 4), np.float32)}
    outputs["masks"] = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()
    told = {"results": ["instances"], "min_score": 0, "score_by_mask": False}
    frames = (32, 32), (30, 31), (90, 17)
    found = {
        kind: model(**told, mask_interpolation=kind).results(outputs, *frames)["masks"][0]
        for kind in ("direct", "two_step")
    }
    assert np.array_equal(found["direct"], Frame(*frames).interpolate(outputs["masks"][0], "direct") > 0)
    assert not np.array_equal(found["direct"], found["two_step"])


def test_interpolation_is_between_centers_of_cells():
    assert interpolation(2, 4).tolist() == [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]


@pytest.mark.parametrize(
    ("size", "changes", "expected"),
    [
        ((480, 640), {}, (800, 1067)),
        ((300, 1000), {}, (400, 1333)),
        ((480, 640), {"min_size": 0}, (480, 640)),
        ((480, 640), {"canvas": [640, 640]}, (480, 640)),
        ((480, 640), {"canvas": [1344, 1344]}, (800, 1067)),
    ],
)
def test_sizes_follow_the_rule_and_fit_the_canvas(size, changes, expected):
    assert model(**changes)._resized(*size) == expected


def test_images_are_padded_with_the_mean_in_model_order():
    small = model(min_size=0)
    picture = np.zeros((30, 20, 3), np.uint8)
    picture[..., 0] = 200  # red
    inputs, inner = small.prepare([picture])
    images = inputs["images"]
    assert (images.shape, inner) == ((1, 3, 32, 32), [(30, 20)])
    assert images[0, :, 0, 0].tolist() == [0, 0, 200]
    assert images[0, :, 31, 0].tolist() == images[0, :, 0, 31].tolist() == [1, 2, 3]


def test_what_is_shown_is_counted():
    maps, scores = np.eye(4).reshape(4, 2, 2)[:3], np.ones(5)
    assert predict_onnx.number_found({"semantic": maps}) == 3
    assert predict_onnx.number_found({"scores": scores, "semantic": maps}) == 5
    assert predict_onnx.number_found({"segments": [{}, {}], "scores": scores, "semantic": maps}) == 2


def test_no_image_takes_the_name_of_another_ones_map(tmp_path, monkeypatch):
    paths = [tmp_path / name for name in ("a.png", "a_panoptic.png", "b.png")]
    for path in paths:
        Image.new("RGB", (6, 4)).save(path)
    empty = {"size": (4, 6), "panoptic": np.zeros((4, 6), np.int32), "segments": []}
    told = {"results": ["panoptic"], "segment_classes": ["sky"], "exif": True}
    runner = model(**told)
    monkeypatch.setattr(Model, "__call__", lambda *_: [empty])
    monkeypatch.setattr(predict_onnx, "Model", lambda *_, **__: runner)
    arguments = ["predict_onnx.py", "a.onnx", *map(str, paths), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert predict_onnx.main() == 0
    names = ("a_0", "a_panoptic_1", "b")
    written = {f"{name}{ending}.png" for name in names for ending in ("", "_panoptic")}
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == written


def test_gray_tiff_is_read_as_by_the_predictor(tmp_path):
    gray = np.random.default_rng(0).integers(0, 256, (30, 50), np.uint8)
    Image.fromarray(gray).save(tmp_path / "a.tif", tiffinfo={274: 6})
    found = model(exif=True).read(tmp_path / "a.tif")
    np.testing.assert_array_equal(found, np.repeat(np.rot90(gray, -1)[..., None], 3, axis=2))


@pytest.mark.parametrize("first", [False, True])
def test_run_lengths_are_those_of_coco(first):
    mask = np.random.default_rng(0).random((5, 7)) > 0.5
    mask[0, 0] = first
    rle = run_lengths(mask)
    np.testing.assert_array_equal(mask_util.decode(mask_util.frPyObjects(rle, *rle["size"])), mask)


def test_colors_are_those_of_the_other_tools():
    assert [predict_onnx.class_color(index) for index in range(200)] == [class_color(index) for index in range(200)]


def test_labels_and_lines_grow_with_the_picture():
    description = {"classes": ["square"], "segment_classes": ["square"]}
    shown = []
    for side in (420, 1680):
        found = {"boxes": np.array([[0.3, 0.3, 0.7, 0.7]]) * side, "labels": np.array([0]), "scores": np.array([0.9])}
        drawn = np.asarray(predict_onnx.draw(np.full((side, side, 3), 90, np.uint8), found, description))
        letters, line = drawn.min(2) > 200, (drawn[side // 2] == class_color(0)).all(1)
        shown.append((np.ptp(np.flatnonzero(letters.any(1))), line.sum()))
    (height, width), (taller, wider) = shown
    assert taller > 3.5 * height
    assert (width, wider) == (4, 8)


def test_labels_cover_no_other_one():
    box, text, picture, taken = (20, 30, 40, 50), (10, 8), (100, 100), []
    for expected in ((20, 22), (20, 30), (20, 50), (30, 22), (30, 50)):
        taken.append(predict_onnx.free_spot(box, text, picture, taken))
        assert taken[-1] == (*expected, expected[0] + 10, expected[1] + 8)
    assert predict_onnx.free_spot(box, text, picture, taken) is None


def test_a_score_out_of_range_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["predict_onnx.py", "shapes.onnx", "a.png", "--score", "35"])
    with pytest.raises(SystemExit, match="2"):
        predict_onnx.main()
    assert "--score" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_predicted(tmp_path, monkeypatch, capsys):
    (tmp_path / "results.json").mkdir()
    monkeypatch.setattr(predict_onnx, "Model", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["predict_onnx.py", "shapes.onnx", "a.png", "--output", str(tmp_path)])
    assert predict_onnx.main() == 2
    assert "results.json" in capsys.readouterr().err


def test_a_file_of_another_version_is_refused():
    with pytest.raises(ValueError, match="version"):
        predict_onnx.Model(description=DESCRIPTION | {"version": 0}, run=dict)
