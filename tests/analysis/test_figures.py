"""Pictures: curves of runs, and the figures of a report."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dimaskdino.analysis.curves import default_metrics, draw_curves, read_groups
from dimaskdino.analysis.figures import TIDE_NAMES, TaskScores, draw_errors
from dimaskdino.errors import UserError


def write_run(folder: Path, seed: int, losses: list[float], lr: float = 0.1) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"SEED: {seed}\nOUTPUT_DIR: {folder}\nSOLVER:\n  BASE_LR: {lr}\n")
    lines = [
        {"iteration": 20 * i + 19, "total_loss": x, "loss_ce": x / 2, "loss_ce_0": 1} for i, x in enumerate(losses)
    ]
    lines[0]["loss_ce_0"] = 1.0
    lines[-1]["bbox/AP"] = 10.0 + seed
    (folder / "metrics.json").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def test_runs_of_several_seeds_are_one_curve(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a_seed1", 1, [4.0, 2.0]), write_run(tmp_path / "a_seed2", 2, [6.0, 3.0, 1.0])]
    runs.append(write_run(tmp_path / "b", 1, [5.0, 4.0], lr=0.2))
    first, second = read_groups(runs)
    assert (first.name, second.name) == ("a_seed (2 runs)", "b")
    # Iterations that both seeds have: mean, lowest, highest.
    assert first.curve("total_loss").tolist() == [[19, 5, 4, 6], [39, 2.5, 2, 3]]
    assert default_metrics([first, second]) == ["total_loss", "loss_ce", "bbox/AP"]
    draw_curves([first, second], ["total_loss", "loss_ce", "bbox/AP"], tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert min(picture.size) > 300
        colors = {color for _, color in picture.convert("RGB").getcolors(2**24)}
    assert (0x00, 0x72, 0xB2) in colors
    assert (0xE6, 0x9F, 0x00) in colors


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a" / "run", 1, [4.0]), write_run(tmp_path / "b" / "run", 1, [5.0], lr=0.2)]
    assert [group.name for group in read_groups(runs)] == ["a/run", "b/run"]
    alike = [write_run(tmp_path / name, seed, [4.0]) for seed, name in enumerate(("one", "two"))]
    assert [group.name for group in read_groups(alike)] == ["one (2 runs)"]


def test_missing_records_and_metrics_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 1, [1.0])
    with pytest.raises(UserError, match=r"segm/AP.*bbox/AP"):
        draw_curves(read_groups([run]), ["segm/AP"], tmp_path / "x.png")
    with pytest.raises(UserError, match="nothing"):
        read_groups([tmp_path / "nothing"])


def test_errors_of_boxes_and_masks_stand_side_by_side() -> None:
    scores = [
        TaskScores(
            task=task,
            metrics={},
            tide={name: (float(place), 1) for place, name in enumerate(TIDE_NAMES)},
            curves={},
            confusion=np.zeros((1, 1)),
            calibration=[],
            calibration_error=0.0,
        )
        for task in ("box", "mask")
    ]
    (axes,) = draw_errors(scores).axes
    boxes, masks = axes.containers
    for place, (tick, box, mask) in enumerate(zip(axes.get_yticks(), boxes, masks, strict=True)):
        assert box.get_y() + box.get_height() == pytest.approx(mask.get_y()) == pytest.approx(tick)
        assert box.get_width() == mask.get_width() == place
