"""Backbones and classifiers of others load into ours, and of another kind they are refused."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone
from torch import Tensor, nn

from dimaskdino.checkpoint import Checkpointer
from dimaskdino.config import get_cfg
from dimaskdino.errors import CheckpointError
from dimaskdino.modeling.backbone import D2SwinTransformer, TimmBackbone
from tests.checkpoint.models import save

ALL = ["res2", "res3", "res4", "res5"]
SWIN = {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2), "window_size": 4}


class Detector(nn.Module):
    """A backbone, and a head that no backbone's file knows."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.sem_seg_head = nn.Linear(2, 2)


def resnet(depth: int = 18) -> nn.Module:
    cfg = get_cfg()
    options = ["MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.OUT_FEATURES", ALL, "MODEL.RESNETS.STRIDE_IN_1X1", False]
    if depth < 50:
        options += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    cfg.merge_from_list(options)
    return build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()


def swin(**changes: Any) -> nn.Module:
    return D2SwinTransformer(patch_size=4, out_features=ALL, **{**SWIN, **changes}).eval()


def timm_swin(**options: Any) -> nn.Module:
    size = {"img_size": 128, "always_partition": True}
    return timm.create_model("swin_tiny_patch4_window7_224", **SWIN, **size, **options).eval()


def classifier(make: Callable[[], nn.Module]) -> nn.Module:
    """`make`'s model with running statistics that differ from a fresh one's."""
    model = make()
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    return model.eval()


def loaded(backbone: nn.Module, path: str) -> nn.Module:
    Checkpointer(Detector(backbone), finetune=True).load(path)
    return backbone


def detectron2_names(state: dict[str, Tensor]) -> dict[str, Any]:
    """What detectron2's model zoo holds of a torchvision ResNet: arrays under its own names, the classifier too."""
    renamed = {}
    for key, value in state.items():
        key = key if key.startswith("layer") else f"stem.{key}"
        for number in (1, 2, 3, 4):
            key = key.replace(f"layer{number}", f"res{number + 1}").replace(f"bn{number}", f"conv{number}.norm")
        renamed[key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")] = value.numpy()
    return renamed


def caffe2_names(state: dict[str, Tensor]) -> dict[str, Any]:
    """What Caffe2's model zoo holds of such a ResNet: running statistics merged into scale and shift."""
    renamed = {"fc1000_w": torch.zeros(1000, 512).numpy(), "conv1_w_momentum": torch.zeros(1).numpy()}
    branches = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c", "shortcut": "branch1"}
    for key, value in detectron2_names(state).items():
        parts = key.split(".")
        if "running" in key or "num_batches" in key or "fc" in parts:
            continue
        what = {"weight": "w", "bias": "b"}[parts[-1]]
        if parts[0] == "stem":
            place = "res_conv1" if parts[2] == "norm" else "conv1"
        else:
            place = f"{parts[0]}_{parts[1]}_{branches[parts[2]]}"
        renamed[f"{place}_bn_{what.replace('w', 's')}" if "norm" in parts else f"{place}_{what}"] = value
    return renamed


def through_torchvision(model: nn.Module, images: Tensor) -> Tensor:
    return nn.Sequential(*list(model.children())[:-2])(images)


@torch.no_grad()
def test_torchvisions_resnet_computes_the_same_in_detectron2s(tmp_path: Path) -> None:
    theirs = classifier(torchvision.models.resnet18)
    images = torch.rand(1, 3, 64, 64)
    expected = through_torchvision(theirs, images)
    state = theirs.state_dict()
    for path in (
        save(state, tmp_path / "resnet18.pth"),
        save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "wrapped.pth"),
    ):
        torch.testing.assert_close(loaded(resnet(), path)(images)["res5"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [torchvision.models.resnet18, lambda: timm.create_model("resnet18")])
def test_only_the_head_of_a_classifier_is_unused(tmp_path, caplog, make):
    with caplog.at_level("INFO"):
        loaded(resnet(), save(make().state_dict(), tmp_path / "resnet18.pth"))
    assert "Not used: fc." in caplog.text


@torch.no_grad()
def test_detectron2s_model_zoo_pickle_computes_the_same(tmp_path: Path) -> None:
    theirs = classifier(torchvision.models.resnet18)
    content = {"model": detectron2_names(theirs.state_dict()), "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-18.pkl").write_bytes(pickle.dumps(content))
    images = torch.rand(1, 3, 64, 64)
    features = loaded(resnet(), str(tmp_path / "R-18.pkl"))(images)
    torch.testing.assert_close(features["res5"], through_torchvision(theirs, images), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_caffe2s_model_zoo_pickle_computes_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = torchvision.models.resnet18().eval()  # fresh running statistics: none to merge
    (tmp_path / "R-18.pkl").write_bytes(pickle.dumps(caffe2_names(theirs.state_dict())))
    images = torch.rand(1, 3, 64, 64)
    features = loaded(resnet(), str(tmp_path / "R-18.pkl"))(images)
    torch.testing.assert_close(features["res5"], through_torchvision(theirs, images), rtol=1e-3, atol=1e-4)
    assert "INPUT.FORMAT BGR" in caplog.text


@torch.no_grad()
def test_the_backbone_of_a_detector_loads(tmp_path: Path) -> None:
    theirs = classifier(torchvision.models.resnet18)
    named = detectron2_names(theirs.state_dict())
    state = {f"backbone.bottom_up.{key}": torch.from_numpy(value) for key, value in named.items()}
    state |= {"backbone.fpn_lateral2.weight": torch.zeros(1), "roi_heads.box_head.fc1.weight": torch.zeros(1)}
    images = torch.rand(1, 3, 64, 64)
    features = loaded(resnet(), save({"model": state}, tmp_path / "mask_rcnn.pth"))(images)
    torch.testing.assert_close(features["res5"], through_torchvision(theirs, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "efficientnet_b0"])
@torch.no_grad()
def test_timms_classifiers_load_into_the_timm_backbone(tmp_path: Path, name: str) -> None:
    theirs = classifier(lambda: timm.create_model(name))
    images = torch.rand(1, 3, 64, 64)
    backbone = loaded(TimmBackbone(name=name, out_features=ALL).eval(), save(theirs.state_dict(), tmp_path / "a.pth"))
    expected = theirs.forward_intermediates(images, intermediates_only=True)[-1]
    torch.testing.assert_close(backbone(images)["res5"], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_timms_resnet_loads_into_detectron2s(tmp_path: Path) -> None:
    theirs = classifier(lambda: timm.create_model("resnet18"))
    images = torch.rand(1, 3, 64, 64)
    features = loaded(resnet(), save(theirs.state_dict(), tmp_path / "a.pth"))(images)
    torch.testing.assert_close(features["res5"], theirs.forward_features(images), rtol=1e-4, atol=1e-5)


def original_swin_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Swin's authors count a stage's way down as its end, and store what follows from the architecture."""
    renamed = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64)}
    renamed["layers.2.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    for key, value in state.items():
        parts = key.split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) - 1)
        renamed[".".join(parts)] = value
    return renamed


@pytest.mark.parametrize("rename", [dict, original_swin_names])
@torch.no_grad()
def test_swin_classifiers_load_into_the_releases_swin(tmp_path, caplog, rename):
    theirs = timm_swin()
    with caplog.at_level("INFO"):
        backbone = loaded(swin(), save({"model": rename(theirs.state_dict())}, tmp_path / "swin.pth"))
    assert "norm0, norm1, norm2, norm3 keep their initial values. Not used: head" in caplog.text
    images = torch.rand(1, 3, 128, 128)
    raw = theirs.forward_intermediates(images, intermediates_only=True)[-1].permute(0, 2, 3, 1)
    expected = backbone.norm3(raw).permute(0, 3, 1, 2)
    torch.testing.assert_close(backbone(images)["res5"], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rename", [dict, original_swin_names])
def test_swin_classifiers_load_into_timms_swin(tmp_path: Path, rename: Callable) -> None:
    theirs = timm_swin()
    # TimmBackbone holds timm's model under the same name, but builds none of such small sizes.
    backbone = nn.ModuleDict({"body": timm_swin(features_only=True)})
    loaded(backbone, save({"model": rename(theirs.state_dict())}, tmp_path / "swin.pth"))
    assert torch.equal(
        backbone["body"].layers_3.downsample.reduction.weight, theirs.layers[3].downsample.reduction.weight
    )


def test_stages_without_an_output_are_left_out(tmp_path: Path) -> None:
    theirs = classifier(lambda: timm.create_model("convnext_atto"))
    backbone = TimmBackbone(name="convnext_atto", out_features=["res2", "res3"])
    loaded(backbone, save(theirs.state_dict(), tmp_path / "a.pth"))
    assert torch.equal(backbone.body.stages_1.blocks[0].conv_dw.weight, theirs.stages[1].blocks[0].conv_dw.weight)


@pytest.mark.parametrize(
    ("file", "backbone", "message"),
    [
        (torchvision.models.resnet34, resnet, r"\(ResNet-18\).*not in the model: layer1\.2\.\*.*another backbone"),
        (torchvision.models.resnet18, lambda: resnet(34), r"\(ResNet-34\).*missing in the file: res2\.2\.\*"),
        (
            timm_swin,
            lambda: swin(embed_dim=16),
            r"another shape, such as patch_embed\.proj\.weight \(\(8, 3, 4, 4\) in",
        ),
        (timm_swin, resnet, r"none of its \d+ names is known; the first are patch_embed\.proj\.weight"),
        (torchvision.models.resnet18, swin, r"\(Swin of 8 channels with 1, 1, 2, 1 blocks\); none of its"),
    ],
)
def test_another_backbone_is_refused(tmp_path: Path, file: Callable, backbone: Callable, message: str) -> None:
    target = backbone()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    path = save(file().state_dict(), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=f"other.pth: .*{message}"):
        loaded(target, path)
    for key, value in target.state_dict().items():
        assert torch.equal(value, before[key])
