"""README's way from a run's folder to the predictions of an image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.documentation import example
from tests.tiny_model import image, predict, tiny_cfg, tiny_model

SIZES = {"INPUT.MIN_SIZE_TEST": 64, "INPUT.MAX_SIZE_TEST": 64, "INPUT.FORMAT": "RGB"}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_predictor_of_the_readme_finds_what_the_model_finds(tmp_path: Path, monkeypatch, suffix: str) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("output/demo/run")
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(tiny_cfg(SIZES).dump())
    model, picture = tiny_model(SIZES), image(64, 64).round()
    if suffix == ".pth":
        torch.save({"model": model.state_dict()}, run / "model_final.pth")
    else:
        save_file(
            {name: value.contiguous() for name, value in model.state_dict().items()}, run / f"model_final{suffix}"
        )
    Image.fromarray(picture.permute(1, 2, 0).numpy().astype(np.uint8)).save("image.png")
    names: dict = {}
    exec(example("README.md", "predict").replace(".pth", suffix).replace("scores > 0.35", "scores > 0"), names)
    (expected,) = predict(model, picture)
    torch.testing.assert_close(names["instances"].scores, expected.scores)
    torch.testing.assert_close(names["instances"].pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(names["instances"].pred_masks, expected.pred_masks)
