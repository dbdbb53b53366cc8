"""Plain transformers through a simple pyramid: features, freezing, adapters, weights, partial checkpoints."""

from pathlib import Path

import pytest
import timm
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model

from dimaskdino.checkpoint import Checkpointer, read_weights
from dimaskdino.errors import CheckpointError, ConfigError
from dimaskdino.modeling.backbone import ViTBackbone
from tests.tiny_model import predict, tiny_cfg, train_batch

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
    with pytest.raises(ConfigError, match=r"MODEL\.VIT\.LORA.*qkw"):
        vit(lora={"rank": 2, "alpha": 4.0, "layers": ["qkw"]})


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

    torch.save(timm.create_model(NAME).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=r"model_final\.pth.*vit\.pth"):
        Checkpointer(make(4)).load(str(tmp_path / "run" / "model_final.pth"))
    (tmp_path / "vit.pth").unlink()
    with pytest.raises(CheckpointError, match=r"vit\.pth does not exist"):
        Checkpointer(make(4)).load(str(tmp_path / "run" / "model_final.pth"))
