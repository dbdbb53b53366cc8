"""Models load completely or not at all, and the error says why; training continues where it stopped."""

import errno
import logging
import re
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from torch import nn

from dimaskdino.checkpoint import Checkpointer, checkpointer, class_names_of, from_release, read_weights, to_release
from dimaskdino.checkpoint.names import CLASS_KEYS
from dimaskdino.errors import CheckpointError
from tests.checkpoint.models import Counter, RunsCode, assert_loaded, randomised, save, small_model

MASKDINO = {"MODEL.MaskDINO.TRANSFORMER_DECODER_NAME": "MaskDINODecoder"}
ONE_STAGE = {**MASKDINO, "MODEL.MaskDINO.TWO_STAGE": False, "MODEL.MaskDINO.INITIALIZE_BOX_TYPE": "no"}
OTHER_CLASSES = {"MODEL.SEM_SEG_HEAD.NUM_CLASSES": 7}
# Its class head has a logit for no object besides.
SEMANTIC = {"MODEL.MaskDINO.SEMANTIC_CE_LOSS": True, "MODEL.MaskDINO.TEST.INSTANCE_ON": False}


@pytest.mark.parametrize("options", [{}, MASKDINO, ONE_STAGE])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_release_files_fill_the_matching_model(tmp_path: Path, options: dict[str, Any], prefix: str) -> None:
    model = small_model(options)
    expected = randomised(model)
    theirs = {prefix + key: value for key, value in to_release(expected).items()}
    assert len(theirs) > len(expected)
    Checkpointer(model).load(save({"model": theirs}, tmp_path / "theirs.pth"))
    assert_loaded(model, expected)


def test_our_files_fill_the_model_and_return_the_rest(tmp_path: Path) -> None:
    model = small_model()
    expected = randomised(model)
    rest = Checkpointer(model).load(save({"model": expected, "iteration": 41}, tmp_path / "ours.pth"))
    assert rest == {"iteration": 41}
    assert_loaded(model, expected)
    with pytest.raises(CheckpointError, match="could run code"):
        Checkpointer(model).load(save({"model": expected, "trap": RunsCode(tmp_path / "made")}, tmp_path / "trap.pth"))


def test_names_of_one_tensor_must_hold_equal_values(tmp_path: Path) -> None:
    theirs = to_release(randomised(small_model()))
    key = "sem_seg_head.predictor.bbox_embed.1.layers.0.bias"
    theirs[key] = theirs[key] + 1
    path = save({"model": theirs}, tmp_path / "theirs.pth")
    with pytest.raises(
        CheckpointError, match=f"theirs.pth: .*{re.escape(key)} are one tensor in the releases, but differ"
    ):
        Checkpointer(small_model()).load(path)


def test_a_file_may_have_both_names_at_once() -> None:
    ours = randomised(small_model())
    both = {**ours, **to_release(ours)}
    assert from_release(both).keys() == ours.keys()


@pytest.mark.parametrize(
    ("file", "model", "message"),
    [
        ({}, MASKDINO, r"bato\.\* \(15\).*the file is of DI-MaskDINO \(De-Imbalance and BATO\)"),
        (MASKDINO, {}, r"missing in the file: .*de_imbalance\.\* \(36\).*the configuration is of DI-MaskDINO"),
        ({}, {"MODEL.MaskDINO.BATO.ENABLED": False}, r"the file is of DI-MaskDINO \(BATO\)"),
        (
            {},
            {"MODEL.MaskDINO.DEC_LAYERS": 4},
            r"layers\.2\.\* \(22\).*2 layers in the file, 4 in the model .*DEC_LAYERS",
        ),
        (
            {"MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 3},
            {},
            r"layers\.2\.\* \(16\).*3 layers in the file, 1 in the model .*TRANSFORMER_ENC_LAYERS",
        ),
        (
            {},
            {"MODEL.SWIN.DEPTHS": [1, 1, 2, 1]},
            r"another backbone, Swin of 8 .* 1, 1, 1, 1 .* 1, 1, 2, 1 blocks in the",
        ),
        (
            {},
            {"MODEL.MaskDINO.DIM_FEEDFORWARD": 32},
            r"\(16, 32\) for \(32, 32\).*MaskDINO\.DIM_FEEDFORWARD is 32 but 16",
        ),
        ({}, {"MODEL.SEM_SEG_HEAD.DIM_FEEDFORWARD": 32}, r"SEM_SEG_HEAD\.DIM_FEEDFORWARD is 32 but 16 in the file"),
        ({}, {"MODEL.SEM_SEG_HEAD.TOTAL_NUM_FEATURE_LEVELS": 3}, r"TOTAL_NUM_FEATURE_LEVELS is 3 but 4 in the file"),
        (
            ONE_STAGE,
            {**ONE_STAGE, "MODEL.MaskDINO.NUM_OBJECT_QUERIES": 8},
            r"NUM_OBJECT_QUERIES is 8 but 6 in the file",
        ),
        (ONE_STAGE, MASKDINO, r"one-stage and two-stage queries"),
    ],
)
@pytest.mark.parametrize("finetune", [False, True])
def test_a_misfit_names_the_likely_cause(tmp_path, file, model, message, finetune):
    target = small_model(model)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    path = save({"model": to_release(randomised(small_model(file)))}, tmp_path / "theirs.pth")
    with pytest.raises(CheckpointError, match=f"theirs.pth: The weights do not fit the model: .*{message}"):
        Checkpointer(target, finetune=finetune).load(path)
    assert_loaded(target, before)  # nothing was half loaded


def test_evaluation_refuses_another_number_of_classes(tmp_path: Path) -> None:
    path = save({"model": randomised(small_model())}, tmp_path / "ours.pth")
    with pytest.raises(
        CheckpointError, match=r"class_embed\.weight \(5, 32\) for \(7, 32\).*trained for 5 classes, .*for 7"
    ):
        Checkpointer(small_model(OTHER_CLASSES)).load(path)
    with pytest.raises(CheckpointError, match=r"cause: one of the class heads has a row for no object .*SEMANTIC_CE"):
        Checkpointer(small_model(SEMANTIC)).load(path)


@pytest.mark.parametrize("options", [{}, SEMANTIC], ids=["objects", "semantic"])
def test_fine_tuning_reinitializes_class_weights_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    model = small_model({**options, **OTHER_CLASSES})
    fresh = {key: model.state_dict()[key].clone() for key in CLASS_KEYS}
    trained = randomised(small_model(options))
    with caplog.at_level(logging.INFO):
        Checkpointer(model, finetune=True).load(save({"model": to_release(trained)}, tmp_path / "theirs.pth"))
    assert_loaded(model, trained, but=CLASS_KEYS)
    for key in CLASS_KEYS:
        assert torch.equal(model.state_dict()[key], fresh[key])
    line = next(record.getMessage() for record in caplog.records if "Fine-tuning" in record.getMessage())
    assert "from 5 classes to 7" in line
    assert all(key in line for key in CLASS_KEYS)


def test_fine_tuning_on_the_same_classes_loads_all_weights(tmp_path: Path) -> None:
    model = small_model()
    trained = randomised(model)
    Checkpointer(model, finetune=True).load(save({"model": trained}, tmp_path / "ours.pth"))
    assert_loaded(model, trained)


def test_only_a_trainer_fine_tunes() -> None:
    assert Checkpointer(small_model(), trainer=Counter(0)).finetune
    assert not Checkpointer(small_model()).finetune


def test_evaluation_refuses_a_backbone_alone(tmp_path: Path) -> None:
    model = small_model()
    backbone = {key: value for key, value in randomised(model).items() if key.startswith("backbone.")}
    path = save({"model": backbone}, tmp_path / "backbone.pth")
    with pytest.raises(CheckpointError, match="holds no weights of this model's heads"):
        Checkpointer(model).load(path)
    Checkpointer(model, finetune=True).load(path)
    assert torch.equal(model.state_dict()["backbone.norm0.weight"], backbone["backbone.norm0.weight"])


def test_resuming_restores_weights_iteration_and_trainer(tmp_path: Path) -> None:
    model = small_model()
    expected = randomised(model)
    model.load_state_dict(expected)
    Checkpointer(model, str(tmp_path), trainer=Counter(7)).save("model_0000041", iteration=41)
    again, counter = small_model(), Counter(0)
    assert Checkpointer(again, str(tmp_path), trainer=counter).resume_or_load("", resume=True)["iteration"] == 41
    assert counter.count == 7
    assert_loaded(again, expected)


def test_loading_weights_leaves_the_trainer_alone(tmp_path: Path) -> None:
    path = save({"model": randomised(small_model()), "trainer": {"count": 7}}, tmp_path / "ours.pth")
    counter = Counter(0)
    Checkpointer(small_model(), str(tmp_path), trainer=counter).resume_or_load(path, resume=True)
    assert counter.count == 0


def test_resuming_refuses_another_number_of_classes(tmp_path: Path) -> None:
    Checkpointer(small_model(), str(tmp_path), trainer=Counter(1)).save("model_final")
    resumed = Checkpointer(small_model(OTHER_CLASSES), str(tmp_path), finetune=True, trainer=Counter(0))
    with pytest.raises(CheckpointError, match="trained for 5 classes"):
        resumed.resume_or_load("", resume=True)


def test_training_does_not_resume_from_weights_alone(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    Checkpointer(model, str(tmp_path)).save("stripped")
    with pytest.raises(CheckpointError, match=r"stripped.pth holds no training state \(trainer\).*MODEL.WEIGHTS"):
        Checkpointer(nn.Linear(3, 2), str(tmp_path), trainer=Counter(0)).resume_or_load("")
    evaluated = nn.Linear(3, 2)
    Checkpointer(evaluated, str(tmp_path)).resume_or_load("")
    assert_loaded(evaluated, model.state_dict())


def test_an_unusable_training_state_names_its_file(tmp_path: Path) -> None:
    class Refuses(Counter):
        def load_state_dict(self, state: dict[str, int]) -> None:
            raise CheckpointError("too many")

    Checkpointer(nn.Linear(3, 2), str(tmp_path), trainer=Counter(7)).save("model_final")
    with pytest.raises(CheckpointError, match=r"model_final.pth: too many"):
        Checkpointer(nn.Linear(3, 2), str(tmp_path), trainer=Refuses(0)).resume_or_load("")


def test_resuming_restores_the_optimizer(tmp_path: Path) -> None:
    def stepped(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        return optimizer

    model = nn.Linear(3, 2)
    optimizer = stepped(model)
    Checkpointer(model, str(tmp_path), optimizer=optimizer).save("model_final")
    fresh = torch.optim.AdamW(model.parameters(), lr=0.2)
    Checkpointer(nn.Linear(3, 2), str(tmp_path), optimizer=fresh).resume_or_load("")
    assert fresh.param_groups[0]["lr"] == 0.1
    assert torch.equal(fresh.state_dict()["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_a_wrapped_model_loads_through_its_wrapper(tmp_path: Path) -> None:
    model = nn.DataParallel(nn.Linear(3, 2))
    expected = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    Checkpointer(model).load(save({"model": expected}, tmp_path / "a.pth"))
    assert_loaded(model.module, expected)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.pth", "nowhere.pth does not exist; MODEL.WEIGHTS names it"),
        (".", "is a folder, not a weight file"),
        ("http://localhost:1/R-50.pkl", "http://localhost:1/R-50.pkl cannot be fetched"),
        ("detectron2://ImageNetPretrained/nowhere/R-50.pkl", "R-50.pkl cannot be fetched"),
    ],
)
def test_missing_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str) -> None:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        Checkpointer(small_model()).load(path)


def test_no_path_loads_nothing() -> None:
    model = small_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert Checkpointer(model).load("") == {}
    assert_loaded(model, before)


CLASSES = ["car", "bus", "bike", "dog", "cat"]


def saved_with_classes(folder: Path, *, of_training: bool = False) -> str:
    states = {"trainer": Counter(7)} if of_training else {}
    Checkpointer(small_model(), str(folder), class_names=CLASSES, **states).save("model_final")
    return str(folder / "model_final.pth")


def test_class_names_are_saved_and_read(tmp_path: Path) -> None:
    assert class_names_of(read_weights(saved_with_classes(tmp_path))) == CLASSES
    assert class_names_of({}) is None
    assert class_names_of({"class_names": {"car": 0}}) is None


@pytest.mark.parametrize("names", [["bus", "car", "bike", "dog", "cat"], ["car", "bus", "bike", "dog", "cow"]])
def test_evaluation_and_resuming_refuse_other_class_names(tmp_path: Path, names: list[str]) -> None:
    path = saved_with_classes(tmp_path, of_training=True)
    evaluation = Checkpointer(small_model(), class_names=names)
    resumed = Checkpointer(small_model(), str(tmp_path), class_names=names, trainer=Counter(0))
    for load in (lambda: evaluation.load(path), lambda: resumed.resume_or_load("")):
        with pytest.raises(
            CheckpointError, match=r"model_final\.pth: .*0 'car', 1 'bus'.* in the file.*dataset"
        ) as error:
            load()
        assert all(f"{index} '{name}'" in str(error.value) for index, name in enumerate(names))


def test_the_same_class_names_or_none_are_accepted(tmp_path: Path) -> None:
    path = saved_with_classes(tmp_path)
    for names in (CLASSES, tuple(CLASSES), ()):
        Checkpointer(small_model(), class_names=names).load(path)
    torch.save({"model": small_model().state_dict()}, tmp_path / "unnamed.pth")
    Checkpointer(small_model(), class_names=CLASSES).load(str(tmp_path / "unnamed.pth"))


def test_fine_tuning_on_other_class_names_reinitializes_class_weights(tmp_path, caplog):
    path = saved_with_classes(tmp_path)
    saved = torch.load(path)["model"]
    model = small_model()
    Checkpointer(model, class_names=CLASSES[::-1], finetune=True).load(path)
    assert {key for key, value in model.state_dict().items() if not torch.equal(value, saved[key])} <= set(CLASS_KEYS)
    assert not torch.equal(model.state_dict()[CLASS_KEYS[0]], saved[CLASS_KEYS[0]])
    assert all(key in caplog.text for key in CLASS_KEYS)
    assert "0 'cat'" in caplog.text


def test_many_class_names_are_shown_from_the_first_difference(tmp_path: Path) -> None:
    many = [f"class {index}" for index in range(1000)]
    other = [*many[:500], "new", *many[501:]]
    message = checkpointer._difference(many, other)
    assert "500 'class 500'" in message
    assert "500 'new'" in message
    assert len(message) < 1500


def test_a_failed_save_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(content: Any, file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    model = nn.Linear(3, 2)
    Checkpointer(model, str(tmp_path)).save("model_0000001")
    monkeypatch.setattr(torch, "save", full_disk)
    for name in ("model_0000001", "model_0000002"):
        with pytest.raises(CheckpointError, match=rf"{name}\.pth cannot be written .*No space left"):
            Checkpointer(model, str(tmp_path)).save(name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last_checkpoint", "model_0000001.pth"]
    Checkpointer(nn.Linear(3, 2), str(tmp_path)).resume_or_load("")
