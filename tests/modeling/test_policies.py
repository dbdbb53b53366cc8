"""Recomputed and compiled layers have the same gradients."""

import logging

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from dimaskdino.config import Config
from dimaskdino.errors import ConfigError
from dimaskdino.modeling.meta_arch import build_model
from dimaskdino.modeling.policies import check_policies, checkpoint_activations, compile_layers
from tests.tiny_model import sample, tiny_cfg, tiny_model, train_batch

BOXES = [[0, 0, 32, 32], [16, 8, 48, 40]]
# A small Swin, whose stochastic depth draws random numbers as the encoder's dropout does.
SWIN = {
    "MODEL.BACKBONE.NAME": "D2SwinTransformer",
    "MODEL.SWIN.EMBED_DIM": 16,
    "MODEL.SWIN.DEPTHS": [2, 1, 2, 1],
    "MODEL.SWIN.NUM_HEADS": [2, 2, 2, 2],
    "MODEL.SWIN.DROP_PATH_RATE": 0.5,
}
PARTS = ("backbone", "encoder", "decoder")


def cfg_with(*parts: str) -> Config:
    return tiny_cfg(SWIN | {"SOLVER.ACTIVATION_CHECKPOINTING": list(parts)}, DROPOUT=0.3)


def step(*parts: str) -> tuple[dict[str, Tensor | None], int]:
    """The gradients of one batch, and the bytes that were kept for the backward pass."""
    model = tiny_model(SWIN, DROPOUT=0.3).train()
    checkpoint_activations(cfg_with(*parts), model)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = sum(model(train_batch(BOXES, BOXES[:1])).values())
    total.backward()
    return {name: p.grad for name, p in model.named_parameters()}, sum(kept.values())


@pytest.fixture(scope="module")
def plain() -> tuple[dict[str, Tensor | None], int]:
    return step()


@pytest.mark.parametrize("parts", [*((part,) for part in PARTS), PARTS])
def test_recomputation_saves_memory_and_changes_no_bit(plain: tuple, parts: tuple[str, ...]) -> None:
    gradients, kept = step(*parts)
    assert gradients.keys() == plain[0].keys()
    for name, gradient in gradients.items():
        expected = plain[0][name]
        assert gradient is expected or torch.equal(gradient, expected), name
    assert kept < plain[1] * (0.5 if parts == PARTS else 1.0)


def test_layers_with_running_statistics_are_left(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(SWIN).train()
    model.backbone.layers[0].blocks[1].norm1 = nn.BatchNorm2d(1)
    with caplog.at_level(logging.INFO):
        checkpoint_activations(cfg_with("backbone"), model)
    assert "5 layers are computed again" in caplog.text
    assert "1 update running statistics" in caplog.text


def test_unknown_part_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"SOLVER\.ACTIVATION_CHECKPOINTING is 'neck'.*backbone, encoder, decoder"):
        check_policies(cfg_with("neck"), tiny_model(SWIN))


def test_backbone_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"SOLVER\.ACTIVATION_CHECKPOINTING names 'backbone'"):
        check_policies(cfg_with("backbone"), tiny_model())


def gradients_of(model: nn.Module, *batches: list[dict]) -> dict[str, Tensor | None]:
    """The gradients of the last batch."""
    for batch in batches:
        torch.manual_seed(3)
        model.zero_grad()
        sum(model(batch).values()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def of_size(height: int, width: int) -> list[dict]:
    return [sample(height, width, BOXES, seed=index) for index in range(2)]


def test_compiled_layers_are_not_compiled_again_for_other_sizes() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()  # of Dynamo alone: opcheck tests what comes after it, which takes far longer
    plain, compiled = (tiny_model(DEC_LAYERS=2).train() for _ in range(2))
    compile_layers(tiny_cfg({"MODEL.COMPILE": ["encoder", "decoder"]}), compiled, counter)
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    first, *sizes = ([*of_size(*size), *of_size(*size)] for size in ((64, 96), (96, 64), (128, 160)))
    gradients_of(compiled, first)
    after_first = counter.frame_count
    found, expected = gradients_of(compiled, *sizes), gradients_of(plain, sizes[-1])
    assert counter.frame_count == after_first > 0
    for name, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


def test_failing_compiler_is_told_once_and_done_without(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(graph: object, inputs: object) -> None:
        raise OSError("no C++ compiler")

    torch._dynamo.reset()
    plain, compiled = tiny_model().train(), tiny_model().train()
    compile_layers(tiny_cfg({"MODEL.COMPILE": ["encoder", "decoder"]}), compiled, refuse)
    with caplog.at_level(logging.WARNING):
        found = gradients_of(compiled, of_size(64, 64))
    for name, gradient in gradients_of(plain, of_size(64, 64)).items():
        assert gradient is found[name] or torch.equal(gradient, found[name])
    (record,) = [record for record in caplog.records if "MODEL.COMPILE" in record.getMessage()]
    assert "no C++ compiler" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_channels_last_changes_strides_alone() -> None:
    models = [tiny_model().train()]
    torch.manual_seed(0)
    models.append(build_model(tiny_cfg({"MODEL.CHANNELS_LAST": True})).train())
    models[1].load_state_dict(models[0].state_dict())
    weights = [model.backbone.convs[1].weight for model in models]
    assert torch.equal(*weights)
    assert [weight.is_contiguous(memory_format=torch.channels_last) for weight in weights] == [False, True]
    seen = []
    models[1].backbone.register_forward_hook(lambda module, inputs, out: seen.append(out["res5"]))
    plain, last = (gradients_of(model, of_size(128, 128)) for model in models)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    for name, gradient in plain.items():
        if gradient is not None:
            torch.testing.assert_close(last[name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))
