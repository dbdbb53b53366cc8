"""The precision of evaluation: what the device has, and what is cast."""

import pytest
import torch

from dimaskdino.errors import ConfigError
from dimaskdino.layers import precision
from tests.tiny_model import image, tiny_model

CPU = torch.device("cpu")


def test_precision_that_the_device_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(precision, "computes_in_bfloat16", lambda device: False)
    assert precision.evaluation_dtype("auto", CPU) == torch.float32
    with pytest.raises(ConfigError, match=r"TEST\.PRECISION is bfloat16, .*cpu.*float32, or auto"):
        precision.evaluation_dtype("bfloat16", CPU)


def test_a_precision_that_the_device_has_is_chosen(monkeypatch):
    monkeypatch.setattr(precision, "computes_in_bfloat16", lambda device: True)
    assert precision.evaluation_dtype("auto", CPU) == precision.evaluation_dtype("bfloat16", CPU) == torch.bfloat16
    assert precision.evaluation_dtype("float32", CPU) == torch.float32


def test_other_names_are_refused():
    with pytest.raises(ConfigError, match=r"TEST\.PRECISION is 'half'"):
        precision.evaluation_dtype("half", CPU)


def test_weights_are_cast_and_pixel_values_are_not(monkeypatch):
    monkeypatch.setattr(precision, "computes_in_bfloat16", lambda device: True)
    model = tiny_model()
    batch = [{"image": image(64, 64)}]
    with torch.no_grad():
        expected = model(batch)[0]["instances"].scores
        model.set_precision("bfloat16")
        found = model(batch)[0]["instances"].scores
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.pixel_mean.dtype == model.pixel_std.dtype == torch.float32
    torch.testing.assert_close(found.sort().values, expected.sort().values, rtol=0, atol=0.02)
