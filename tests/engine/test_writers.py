"""Where records go: writers by key, pictures of each evaluation, losses of the validation."""

import importlib.machinery
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from dimaskdino.config import Config, get_cfg
from dimaskdino.data import build_mapper, register_all
from dimaskdino.data.datasets.registration import load_dataset
from dimaskdino.engine.hooks import ProgressLog, peak_memory, progress_line
from dimaskdino.engine.pictures import picture_inputs, picture_rows
from dimaskdino.engine.trainer import validation_losses
from dimaskdino.engine.writers import WRITER_REGISTRY, check_writers
from dimaskdino.errors import ConfigError
from dimaskdino.modeling.meta_arch import build_model
from tests.cli.conftest import TINY
from tests.documentation import REPOSITORY, example
from tests.engine.toy import ToyDetector, train


@pytest.fixture
def cfg(toy_cfg: Config) -> Config:
    """Ten iterations, evaluated after four, eight and ten."""
    toy_cfg.merge_from_list(["TEST.EVAL_PERIOD", 4, "LOG.PICTURES", 2])
    return toy_cfg


def test_tensorboard_has_pictures_of_each_evaluation(cfg: Config) -> None:
    trainer = train(cfg)
    events = EventAccumulator(cfg.OUTPUT_DIR, size_guidance={"images": 0}).Reload()
    assert sorted(events.Tags()["images"]) == ["shapes_val/0", "shapes_val/1"]
    pictures = events.Images("shapes_val/0")
    assert [each.step for each in pictures] == [3, 7, 10]
    assert (pictures[0].width, pictures[0].height) == (2 * 384, 384)  # truth and prediction side by side
    assert not trainer.storage._vis_data
    assert trainer.model.training


def test_tensorboard_hides_what_a_resumed_run_repeats(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    for start, steps in ((0, range(10)), (5, (5, 6))):
        # Event files are read in the order of the seconds in their names.
        monkeypatch.setattr(time, "time", lambda start=start: now + start)
        writer = WRITER_REGISTRY.get("tensorboard")(cfg, start)
        for step in steps:
            writer._writer.add_scalar("loss", step + 100 * start, step)
        writer.close()
    events = EventAccumulator(cfg.OUTPUT_DIR).Reload().Scalars("loss")
    assert [event.step for event in events] == list(range(7))
    assert [event.value for event in events] == [0, 1, 2, 3, 4, 505, 506]


@pytest.mark.parametrize("config", ["dimaskdino_panoptic_shapes", "maskdino_semantic_shapes", "dino_shapes"])
def test_pictures_of_every_task_have_truth_and_prediction(config: str, shapes_root: Path) -> None:
    cfg = get_cfg()
    cfg.merge_from_file(str(REPOSITORY / "configs" / "demo" / f"{config}.yaml"))
    cfg.merge_from_list([*TINY, "DATASETS.SHAPES.ROOT", str(shapes_root), "MODEL.DEVICE", "cpu", "OUTPUT_DIR", ""])
    register_all(cfg=cfg)
    name, model = cfg.DATASETS.TEST[0], build_model(cfg)
    ((image, truth, found),) = picture_rows(cfg, model, name, picture_inputs(cfg, name, 1), min_score=0.0)
    assert image.shape == truth.shape == found.shape == (384, 384, 3)
    assert (truth != image).any()
    assert (found != image).any()


def test_pictures_change_nothing_of_the_run(cfg: Config) -> None:
    drawn = train(cfg).model.state_dict()
    cfg.merge_from_list(["LOG.PICTURES", 0, "OUTPUT_DIR", f"{cfg.OUTPUT_DIR}_none"])
    torch.testing.assert_close(train(cfg).model.state_dict(), drawn, rtol=0, atol=0)


class Fake(types.ModuleType):
    """Stands for a package of a tracker and notes what it is asked."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.inits: list[dict[str, Any]] = []
        self.params: dict[str, str] = {}
        self.scalars: dict[int, dict[str, float]] = {}
        self.pictures: list[tuple[str, int, Any]] = []
        self.ended = 0

    def note(self, values: dict[str, Any], step: int) -> None:
        """Scalars, and pictures as wandb takes them."""
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                self.pictures.append((name, step, value.shape))
            else:
                self.scalars.setdefault(step, {})[name] = value

    def end(self) -> None:
        """Of a run."""
        self.ended += 1


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake("wandb")

    def init(**options: Any) -> types.SimpleNamespace:
        fake.inits.append(options)
        return types.SimpleNamespace(id=options["id"] or "abc", log=fake.note, finish=fake.end)

    fake.init, fake.Image = init, lambda picture: picture
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def fake_mlflow(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake("mlflow")

    def start_run(**options: Any) -> types.SimpleNamespace:
        fake.inits.append(options)
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=options["run_id"] or "def"))

    fake.set_tracking_uri = lambda uri: fake.params.update(uri=uri)
    fake.get_experiment_by_name = lambda name: fake.params.get("artifacts")
    fake.create_experiment = lambda name, artifact_location: fake.params.update(artifacts=artifact_location)
    fake.set_experiment = lambda name: fake.params.update(experiment=name)
    fake.start_run, fake.end_run, fake.log_metrics = start_run, fake.end, fake.note
    fake.log_params = fake.params.update
    fake.log_image = lambda picture, artifact_file: fake.pictures.append((artifact_file, 0, picture.shape))
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return fake


def assert_logged(fake: Fake, cfg: Config) -> None:
    assert sorted(fake.scalars) == [3, 7, 9, 10]  # the evaluation after the last iteration stands at 10
    recorded = [json.loads(line) for line in (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()]
    assert fake.scalars[3]["total_loss"] == recorded[0]["total_loss"]
    assert fake.scalars[7]["bbox/AP"] == recorded[1]["bbox/AP"]
    assert {shape for _, _, shape in fake.pictures} == {(384, 768, 3)}
    assert len(fake.pictures) == 6
    assert fake.ended == 1


def test_wandb_gets_scalars_pictures_and_a_resumed_run(cfg: Config, fake_wandb: Fake) -> None:
    cfg.merge_from_list(["LOG.WRITERS", ["metrics_json", "tensorboard", "wandb"], "LOG.PROJECT", "parts"])
    check_writers(cfg)
    train(cfg)
    assert_logged(fake_wandb, cfg)
    assert fake_wandb.inits[0]["project"] == "parts"
    assert fake_wandb.inits[0]["name"] == "run"
    assert fake_wandb.inits[0]["id"] is None
    assert fake_wandb.inits[0]["config"]["SOLVER.MAX_ITER"] == 10
    cfg.SOLVER.MAX_ITER = 12
    train(cfg, resume=True)
    assert fake_wandb.inits[1]["id"] == "abc"
    WRITER_REGISTRY.get("wandb")(cfg, 0)  # a new run in the same folder
    assert fake_wandb.inits[2]["id"] is None


def test_mlflow_gets_scalars_pictures_and_parameters(cfg: Config, fake_mlflow: Fake) -> None:
    cfg.LOG.WRITERS = ["metrics_json", "mlflow"]
    check_writers(cfg)
    train(cfg)
    assert_logged(fake_mlflow, cfg)
    assert fake_mlflow.params["SOLVER.MAX_ITER"] == "10"
    assert fake_mlflow.params["uri"] == f"sqlite:///{cfg.OUTPUT_DIR}/mlflow.db"
    assert fake_mlflow.params["artifacts"] == (Path(cfg.OUTPUT_DIR) / "mlartifacts").as_uri()
    assert fake_mlflow.pictures[0][0] == "shapes_val/0/0000003.png"
    cfg.SOLVER.MAX_ITER = 12
    train(cfg, resume=True)
    assert fake_mlflow.inits[1]["run_id"] == "def"


def test_writer_of_the_documentation_takes_part(cfg: Config, capsys: pytest.CaptureFixture) -> None:
    exec(example("docs/training.md", "my_writer"), {})
    try:
        cfg.LOG.WRITERS = ["metrics_json", "lines"]
        check_writers(cfg)
        trainer = train(cfg)
    finally:
        del WRITER_REGISTRY._obj_map["lines"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["3", "7", "9", "10"]
    assert str(trainer.storage.latest()["total_loss"][0]) in lines[-1]


@pytest.mark.parametrize(
    ("writers", "named"),
    [
        (["metrics_json", "tensorbord"], "'tensorbord'.*tensorboard"),
        (["tensorboard"], "metrics_json must be among them"),
        (["metrics_json", "wandb"], r"wandb.*pip install 'dimaskdino\[wandb\]'"),
    ],
)
def test_writers_are_checked(cfg: Config, writers: list[str], named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cfg.LOG.WRITERS = writers
    with pytest.raises(ConfigError, match=rf"LOG\.WRITERS.*{named}"):
        check_writers(cfg)


def test_validation_losses_are_averages_that_training_does_not_disturb(cfg: Config) -> None:
    class Noisy(ToyDetector):
        def __init__(self, cfg: Config) -> None:
            super().__init__(cfg)
            self.backbone = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.9), nn.BatchNorm1d(8))

    model = Noisy(cfg).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = validation_losses(cfg, model, "shapes_val")
    assert found == validation_losses(cfg, model, "shapes_val")
    assert found["total_loss"] == pytest.approx(found["loss_bbox"] + found["loss_bbox_0"])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not any(module.training for module in model.modules())
    # By hand: the mean over the images of the toy's absolute error, without dropout.
    labeled = [entry for entry in load_dataset("shapes_val") if entry["annotations"]]
    errors = []
    for given in map(build_mapper(cfg, is_train=False, with_instances=True), labeled):
        color = given["image"].float().mean((1, 2)) / 255
        box = model.box_head(model.norm(model.backbone(color[None])))[0].sigmoid()
        truth = given["instances"].gt_boxes.tensor.mean(0) / 64
        errors.append((box - truth).abs().mean().item())
    assert found["loss_bbox"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_validation_losses_are_recorded(cfg: Config) -> None:
    cfg.TEST.LOSS = True
    trainer = train(cfg)
    assert trainer._last_eval_results["loss"]["loss_bbox"] > 0
    records = [json.loads(line) for line in (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()]
    assert records[0]["loss/total_loss"] > 0


def test_console_shows_rate_and_memory(cfg: Config) -> None:
    trainer = train(cfg)
    with_rate = progress_line(trainer.storage, 5, 10, images=2)
    assert "  5/10  " in with_rate
    assert " images/s" in with_rate
    assert f"max_mem {peak_memory() / 2**20:.0f}M" in with_rate
    assert peak_memory() > 50 * 2**20
    assert any(isinstance(hook, ProgressLog) for hook in trainer._hooks)
