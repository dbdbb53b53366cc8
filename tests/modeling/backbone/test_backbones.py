"""Backbones beyond detectron2's."""

import math
import re
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone, build_model
from torch import nn

from dimaskdino.checkpoint import Checkpointer, read_weights
from dimaskdino.config import get_cfg
from dimaskdino.errors import CheckpointError, ConfigError
from dimaskdino.modeling.backbone import D2SwinTransformer, TimmBackbone, ViTBackbone
from dimaskdino.modeling.backbone.swin_blocks import (
    merge_windows,
    relative_position_index,
    shifted_window_mask,
    split_windows,
)
from tests.tiny_model import predict, tiny_cfg, train_batch

ALL = ["res2", "res3", "res4", "res5"]
TINY_SWIN = {"embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4], "window_size": 4, "patch_size": 4}


def tiny_swin(**changes) -> D2SwinTransformer:
    torch.manual_seed(0)
    model = D2SwinTransformer(**{"out_features": ALL, **TINY_SWIN, **changes})
    with torch.no_grad():  # the usual start, std 0.02, would hide a wrong bias table
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3))
    return model.eval()


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224", "efficientnet_b0"])
@pytest.mark.parametrize("size", [(64, 96), (75, 131)])
@torch.no_grad()
def test_timm_features_have_declared_channels_and_strides(name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = TimmBackbone(name=name, out_features=ALL).eval()
    features = model(torch.rand(2, 3, *size))
    assert list(features) == ALL
    for (key, spec), stride in zip(model.output_shape().items(), (4, 8, 16, 32), strict=True):
        assert spec.stride == stride
        assert features[key].shape == (2, spec.channels, math.ceil(size[0] / stride), math.ceil(size[1] / stride))
    assert model.size_divisibility == 32


@torch.no_grad()
def test_timm_swin_features_are_permuted_to_channels_first_not_reshaped() -> None:
    torch.manual_seed(0)
    model = TimmBackbone(name="swin_tiny_patch4_window7_224", out_features=ALL).eval()
    images = torch.rand(1, 3, 96, 160)
    for ours, theirs in zip(model(images).values(), model.body(images), strict=True):
        assert torch.equal(ours[0, :, 1, 2], theirs[0, 1, 2, :])


@torch.no_grad()
def test_timm_backbone_gives_what_the_timm_classifier_computes_inside() -> None:
    torch.manual_seed(0)
    classifier = timm.create_model("resnet18").eval()
    model = TimmBackbone(name="resnet18", out_features=["res5"]).eval()
    model.body.load_state_dict({k: v for k, v in classifier.state_dict().items() if not k.startswith("fc.")})
    images = torch.rand(1, 3, 64, 96)
    torch.testing.assert_close(model(images)["res5"], classifier.forward_features(images))


def test_stages_behind_the_last_timm_output_are_not_built() -> None:
    model = TimmBackbone(name="resnet18", out_features=["res2", "res3"])
    sum(feature.sum() for feature in model(torch.rand(2, 3, 32, 32)).values()).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_stages_behind_the_last_swin_output_are_not_built() -> None:
    model = tiny_swin(out_features=["res2", "res3"])
    sum(feature.sum() for feature in model(torch.rand(2, 3, 64, 64)).values()).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    whole = tiny_swin()
    loaded = whole.load_state_dict(model.state_dict(), strict=False)
    assert not loaded.unexpected_keys


def test_timm_stochastic_depth_follows_the_configuration() -> None:
    model = TimmBackbone(name="convnext_atto", out_features=ALL, drop_path_rate=0.3)
    rates = [module.drop_prob for module in model.modules() if hasattr(module, "drop_prob")]
    assert max(rates) == pytest.approx(0.3)


def test_timm_backbone_is_built_by_name_from_the_configuration() -> None:
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", "convnext_atto"])
    model = build_backbone(cfg)
    assert isinstance(model, TimmBackbone)
    assert list(model.output_shape()) == ALL
    assert "build_timm_backbone" in BACKBONE_REGISTRY
    assert "D2SwinTransformer" in BACKBONE_REGISTRY


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet5", "out_features": ALL}, "no model 'resnet5'; the closest names are resnet50"),
        (
            {"name": "resnet18", "out_features": ["res2", "res7"]},
            "resnet18 has no res7; its features have strides 2, 4",
        ),
        ({"name": "resnet18", "out_features": []}, "MODEL.TIMM.OUT_FEATURES"),
        ({"name": "vit_tiny_patch16_224", "out_features": ALL}, "vit_tiny_patch16_224 has no res2, res3, res5"),
        ({"name": "resnet18.no_such_tag", "out_features": ALL}, "no_such_tag"),
        ({"name": "vgg11", "out_features": ["res1"], "drop_path_rate": 0.1}, "vgg11 has no stochastic depth"),
        ({"name": "coat_lite_mini", "out_features": ALL}, "other sizes than its own"),
    ],
)
def test_unusable_timm_model_is_named_with_the_reason(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        TimmBackbone(**options)


def test_pretrained_weights_without_a_network_give_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args, **options) -> nn.Module:
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(ConfigError, match=r"MODEL\.TIMM\.PRETRAINED: the weights of resnet18 .*MODEL\.WEIGHTS"):
        TimmBackbone(name="resnet18", out_features=ALL, pretrained=True)


def timm_name(key: str) -> str:
    """Our Swin's name of a key of timm's, which counts a stage's way down as the start of the next stage."""
    key = key.replace("layers_", "layers.")
    return re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)


@torch.no_grad()
def test_swin_equals_timm_at_the_native_size() -> None:
    model = tiny_swin()
    theirs = timm.create_model(
        "swin_tiny_patch4_window7_224",
        features_only=True,
        img_size=128,
        window_size=4,
        embed_dim=8,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 2, 4),
        always_partition=True,
    ).eval()
    ours = model.state_dict()
    theirs.load_state_dict({key: ours[timm_name(key)] for key in theirs.state_dict()})
    images = torch.randn(2, 3, 128, 128)
    for index, (ours, raw) in enumerate(zip(model(images).values(), theirs(images), strict=True)):
        normed = getattr(model, f"norm{index}")(raw).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours, normed, rtol=1e-4, atol=1e-5)


def torchvision_name(key: str) -> str:
    """Our Swin's name of a key of torchvision's, which keeps stages and ways down in one list."""
    key = re.sub(r"^features\.0\.0", "patch_embed.proj", key)
    key = re.sub(r"^features\.0\.2", "patch_embed.norm", key)
    key = re.sub(r"^features\.(\d)\.(\d+)", lambda m: f"layers.{int(m[1]) // 2}.blocks.{m[2]}", key)
    key = re.sub(r"^features\.(\d)", lambda m: f"layers.{int(m[1]) // 2 - 1}.downsample", key)
    return key.replace("mlp.0", "mlp.fc1").replace("mlp.3", "mlp.fc2")


@torch.no_grad()
def test_swin_equals_torchvision_where_maps_are_padded_to_whole_windows() -> None:
    model = tiny_swin()
    theirs = torchvision.models.swin_transformer.SwinTransformer(
        patch_size=[4, 4], embed_dim=8, depths=[2, 2, 2, 2], num_heads=[1, 2, 2, 4], window_size=[4, 4]
    ).eval()
    ours = model.state_dict()
    state = {
        key: ours[torchvision_name(key)].reshape(value.shape)
        for key, value in theirs.state_dict().items()
        if not key.startswith(("head.", "norm."))
    }
    assert set(theirs.load_state_dict(state, strict=False).missing_keys) == {
        "head.weight", "head.bias", "norm.weight", "norm.bias"
    }  # fmt: skip
    images = torch.randn(2, 3, 148, 212)  # stride 32: 5x7 positions, in windows of 4
    maps, x = [], images
    for index, part in enumerate(theirs.features):
        x = part(x)
        if index % 2 == 1:  # patches and ways down have the even places
            maps.append(x)
    for index, (output, map_) in enumerate(zip(model(images).values(), maps, strict=True)):
        normed = getattr(model, f"norm{index}")(map_).permute(0, 3, 1, 2)
        torch.testing.assert_close(output, normed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 96), (75, 131), (5, 9)])
@torch.no_grad()
def test_swin_takes_images_of_any_size(size: tuple[int, int]) -> None:
    model = tiny_swin(absolute_position=True, pretrain_image_size=64)
    for key, feature in model(torch.rand(1, 3, *size)).items():
        spec = model.output_shape()[key]
        assert feature.shape == (1, spec.channels, math.ceil(size[0] / spec.stride), math.ceil(size[1] / spec.stride))


def test_swin_names_its_parameters_as_the_release_does() -> None:
    keys = set(tiny_swin().state_dict())
    attention = {
        "relative_position_bias_table",
        "relative_position_index",
        "qkv.weight",
        "qkv.bias",
        "proj.weight",
        "proj.bias",
    }
    block = {f"attn.{key}" for key in attention}
    block |= {f"{m}.{p}" for m in ("norm1", "norm2", "mlp.fc1", "mlp.fc2") for p in ("weight", "bias")}
    down = {"norm.weight", "norm.bias", "reduction.weight"}
    expected = {f"patch_embed.{m}.{p}" for m in ("proj", "norm") for p in ("weight", "bias")}
    expected |= {f"layers.{i}.blocks.{j}.{key}" for i in range(4) for j in range(2) for key in block}
    expected |= {f"layers.{i}.downsample.{key}" for i in range(3) for key in down}
    expected |= {f"norm{i}.{p}" for i in range(4) for p in ("weight", "bias")}
    assert keys == expected


def test_recomputing_swin_blocks_changes_no_gradient() -> None:
    images = torch.rand(1, 3, 64, 64)
    gradients = []
    for use_checkpoint in (False, True):
        model = tiny_swin(use_checkpoint=use_checkpoint).train()
        sum(feature.square().sum() for feature in model(images).values()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_swin_is_built_from_the_releases_keys() -> None:
    cfg = get_cfg()
    options = ["MODEL.BACKBONE.NAME", "D2SwinTransformer", "MODEL.SWIN.EMBED_DIM", 8, "MODEL.SWIN.DEPTHS", [1, 1, 2, 1]]
    options += ["MODEL.SWIN.NUM_HEADS", [1, 2, 4, 8], "MODEL.SWIN.OUT_FEATURES", ["res3", "res5"]]
    cfg.merge_from_list(options)
    model = build_backbone(cfg)
    assert model.output_shape() == {"res3": ShapeSpec(channels=16, stride=8), "res5": ShapeSpec(channels=64, stride=32)}
    assert [name for name, _ in model.named_children() if name.startswith("norm")] == ["norm1", "norm3"]
    rates = [block.drop_path.drop_prob for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx([0, 0.075, 0.15, 0.225, 0.3])


@pytest.mark.parametrize(
    ("change", "key"), [({"out_features": ["res6"]}, "OUT_FEATURES"), ({"num_heads": [1, 2, 3, 4]}, "NUM_HEADS")]
)
def test_swin_settings_that_do_not_fit_name_their_key(change: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        tiny_swin(**change)


def test_windows_are_row_major_and_merge_back() -> None:
    x = torch.arange(2 * 4 * 6).view(2, 4, 6, 1)
    windows = split_windows(x, 2)
    assert windows[1].flatten().tolist() == [2, 3, 8, 9]
    assert torch.equal(merge_windows(windows, 2, 4, 6), x)


def test_relative_position_index_of_a_2x2_window_by_hand() -> None:
    # Row = (dy + 1) * 3 + (dx + 1), with (dy, dx) the query's place minus the key's.
    assert relative_position_index(2).tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]


def test_shift_mask_separates_exactly_the_regions_that_the_shift_joined() -> None:
    mask = shifted_window_mask(4, 4, 2, 1, torch.device("cpu"))
    assert mask.shape == (4, 4, 4)
    assert mask[0].eq(0).all()  # the first window holds neighbors only
    assert mask[1].tolist() == [[0, -100, 0, -100], [-100, 0, -100, 0]] * 2  # left and right column were far apart
    assert mask[3].eq(0).tolist() == torch.eye(4).bool().tolist()  # the corner joins four regions


NAME = "test_vit"
STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


def vit(name: str = NAME, **options) -> ViTBackbone:
    torch.manual_seed(0)
    return ViTBackbone(name=name, out_features=list(STRIDES), out_channels=32, **options)


@pytest.mark.parametrize("name", [NAME, "eva02_tiny_patch14_224"], ids=["16 px", "14 px"])
def test_features_have_the_strides_that_they_declare(name: str) -> None:
    backbone = vit(name).eval()
    images = torch.randn(1, 3, 50, 100)
    with torch.no_grad():
        features = backbone(images)
    assert {key: each.shape for key, each in features.items()} == {
        key: (1, 32, -(-50 // stride), -(-100 // stride)) for key, stride in STRIDES.items()
    }
    assert backbone.output_shape() == {key: ShapeSpec(channels=32, stride=stride) for key, stride in STRIDES.items()}
    assert all(each.isfinite().all() for each in features.values())


def test_part_of_the_features_is_enough() -> None:
    backbone = ViTBackbone(name=NAME, out_features=["res4"], out_channels=32, in_channels=5)
    assert list(backbone(torch.randn(1, 5, 64, 64))) == ["res4"]


def test_frozen_transformer_is_not_trained() -> None:
    backbone = vit(freeze=True, drop_path_rate=0.5).train()
    assert not backbone.vit.training
    assert backbone.pyramid.training
    assert {name.split(".")[0] for name, each in backbone.named_parameters() if each.requires_grad} == {"pyramid"}


def test_adapters_alone_are_trained() -> None:
    pytest.importorskip("peft")
    backbone = vit(lora={"rank": 2, "alpha": 4.0, "layers": ["qkv"]})
    trained = [name for name, each in backbone.vit.named_parameters() if each.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    plain, images = vit(), torch.randn(1, 3, 64, 64)
    plain.pyramid.load_state_dict(backbone.pyramid.state_dict())
    plain.vit.load_state_dict(
        {k.replace(".base_layer", ""): v for k, v in backbone.vit.state_dict().items() if "lora" not in k}
    )
    for each, other in zip(plain.eval()(images).values(), backbone.eval()(images).values(), strict=True):
        assert torch.allclose(each, other, atol=1e-6)  # a new adapter changes nothing
    for layers, said in ((["qkw"], "qkw"), ([3], r"\[3\]")):
        with pytest.raises(ConfigError, match=rf"MODEL\.VIT\.LORA.*{said}"):
            vit(lora={"rank": 2, "alpha": 4.0, "layers": layers})


@pytest.mark.parametrize(
    ("name", "said"), [("vit_tinny_patch16_224", "vit_tiny_patch16_224"), ("resnet18", "resnet18")]
)
def test_unsuitable_model_is_named(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"MODEL\.VIT\.NAME.*{said}"):
        vit(name)
    with pytest.raises(ConfigError, match=r"MODEL\.VIT\.OUT_FEATURES"):
        ViTBackbone(name=NAME, out_features=["res9"])


def model_cfg(**options):
    keys = {"MODEL.BACKBONE.NAME": "build_vit_backbone", "MODEL.VIT.NAME": NAME, "MODEL.VIT.OUT_CHANNELS": 32}
    return tiny_cfg(keys | {f"MODEL.VIT.{key.replace('__', '.')}": value for key, value in options.items()})


def test_model_trains_on_a_frozen_transformer() -> None:
    torch.manual_seed(0)
    model = build_model(model_cfg(FREEZE=True))
    sum(model.train()(train_batch([[4, 4, 30, 40]], [])).values()).backward()
    assert all(each.grad is None for each in model.backbone.vit.parameters())
    assert model.backbone.pyramid["res5"][1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "LoRA"])
def test_timms_weights_are_found(lora: bool, tmp_path: Path) -> None:
    if lora:
        pytest.importorskip("peft")
    torch.manual_seed(1)
    source = timm.create_model(NAME)
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    model = build_model(model_cfg(LORA__RANK=2 if lora else 0))
    Checkpointer(model, finetune=True).load(str(tmp_path / "vit.pth"), checkpointables=[])
    own = {key.replace("base_layer.", ""): value for key, value in model.backbone.vit.state_dict().items()}
    for key in ("blocks.0.attn.qkv.weight", "patch_embed.proj.weight", "norm.weight"):
        assert torch.equal(own[key], source.state_dict()[key])


def test_checkpoint_without_frozen_weights(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    torch.manual_seed(1)
    torch.save(timm.create_model(NAME).state_dict(), tmp_path / "vit.pth")

    def make(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return build_model(model_cfg(LORA__RANK=2))

    trained = make(2)
    checkpointer = Checkpointer(trained, str(tmp_path / "run"), finetune=True)
    checkpointer.load(str(tmp_path / "vit.pth"), checkpointables=[])
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    checkpointer.leaves_out_frozen = True
    (tmp_path / "run").mkdir()
    checkpointer.save("model_final")
    written = read_weights(tmp_path / "run" / "model_final.pth")["model"]
    assert any("lora_B" in name for name in written)
    assert not [name for name in written if "base_layer.weight" in name]

    again = make(3)
    Checkpointer(again).load(str(tmp_path / "run" / "model_final.pth"))
    picture = torch.rand(3, 64, 64) * 255
    (first,), (second,) = predict(trained.eval(), picture), predict(again.eval(), picture)
    assert torch.equal(first.scores, second.scores)

    with pytest.raises(CheckpointError, match=r"of another shape.*Likely cause: .*MODEL\.VIT\.LORA"):
        Checkpointer(build_model(model_cfg(LORA__RANK=3))).load(str(tmp_path / "run" / "model_final.pth"))
    torch.save(timm.create_model(NAME).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=r"model_final\.pth.*vit\.pth"):
        Checkpointer(make(4)).load(str(tmp_path / "run" / "model_final.pth"))
    (tmp_path / "vit.pth").unlink()
    with pytest.raises(CheckpointError, match=r"vit\.pth does not exist"):
        Checkpointer(make(4)).load(str(tmp_path / "run" / "model_final.pth"))
