"""Our DINO has the parameters of the release and of detrex, and their files load with nothing left over."""

import logging

import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor

from dimaskdino.checkpoint import Checkpointer, from_release, is_release, to_release
from dimaskdino.checkpoint.dino import COCO_IDS
from dimaskdino.checkpoint.names import is_class_key
from dimaskdino.errors import CheckpointError
from tests.parity.dino import FULL_NAMES, NAMES, cfg, our_names, state
from tests.parity.releases import release


def full_state(name: str) -> dict[str, Tensor]:
    """The state dict of a recorded full model without numbers; aliases are the tensors that they alias."""
    recorded = release(name)
    made = {key: torch.empty(shape, device="meta") for key, shape in recorded.keys.items()}
    return {key: made[recorded.alias.get(key, key)] for key in made}


def shapes(state_dict: dict[str, Tensor]) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in state_dict.items()}


@pytest.fixture(scope="module", params=FULL_NAMES)
def full(request):
    """A recorded full model's name and ours, without numbers."""
    settings = cfg(request.param)
    settings.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return request.param, build_model(settings)


def test_the_full_model_has_exactly_the_recorded_tensors(full):
    name, model = full
    assert shapes(model.state_dict()) == shapes(from_release(full_state(name)))


def test_the_same_parameters_are_frozen(full):
    name, model = full
    frozen = {our_names(name)[key] for key in release(name).frozen}
    assert {key for key, each in model.named_parameters() if not each.requires_grad} == frozen


@pytest.mark.parametrize("name", FULL_NAMES)
def test_names_go_to_ours_and_back_to_the_same_set(name):
    ours = from_release(full_state(name))
    assert not is_release(ours)
    assert from_release(ours).keys() == ours.keys()
    back = to_release(ours, detrex=name.startswith("detrex"))
    assert shapes(back) == release(name).keys


@pytest.mark.parametrize("name", NAMES)
def test_weights_go_to_ours_and_back_with_their_aliases(name):
    theirs = release(name).state_dict()
    back = to_release(from_release(theirs), detrex=name.startswith("detrex"))
    assert back.keys() == theirs.keys()
    for key, value in theirs.items():
        # The last row of the release's labels is never used.
        unused = key == "label_enc.weight" and name == "dino_tiny"
        assert torch.equal(back[key][:-1] if unused else back[key], value[:-1] if unused else value), key
    for key, principal in release(name).alias.items():
        assert back[key] is back[principal]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_loads_by_itself_and_fills_the_model(name, tmp_path):
    torch.save({"model": release(name).state_dict(), "epoch": 11}, tmp_path / "checkpoint0011.pth")
    model = build_model(cfg(name))
    assert Checkpointer(model).load(str(tmp_path / "checkpoint0011.pth"))["epoch"] == 11
    assert model.state_dict().keys() == state(name).keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state(name)[key]), key


def with_outputs(name: str, num_outputs: int) -> dict[str, Tensor]:
    """Weights under our names for another number of classes, every row of which differs."""
    return {
        key: torch.rand(num_outputs, *value.shape[1:]) if is_class_key(key) else value
        for key, value in state(name).items()
    }


def test_of_91_outputs_those_of_cocos_80_categories_are_loaded(tmp_path, caplog):
    ours = with_outputs("dino_tiny", 91)
    torch.save({"model": to_release(ours)}, tmp_path / "release.pth")
    settings = cfg("dino_tiny")
    settings.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 80
    model = build_model(settings)
    with caplog.at_level(logging.INFO):
        Checkpointer(model).load(str(tmp_path / "release.pth"))
    assert "category id" in caplog.text
    # Person is 1, the last category, toothbrush, is 90; 12 never occurs.
    assert (COCO_IDS[0], COCO_IDS[-1], 12 in COCO_IDS) == (1, 90, False)
    for key, value in model.state_dict().items():
        assert torch.equal(value, ours[key][COCO_IDS] if is_class_key(key) else ours[key]), key


def test_80_classes_become_91_outputs_11_never_chosen():
    ours = with_outputs("dino_tiny", 80)
    theirs = to_release(ours)
    assert theirs["label_enc.weight"].shape == (92, 256)
    bias = theirs["class_embed.2.bias"]
    assert torch.equal(bias[COCO_IDS], ours["sem_seg_head.predictor.heads.0.class_embed.bias"])
    assert (bias[[0, 12, 26, 83]] < -4).all()


def test_91_outputs_stay_where_the_model_has_91_classes(tmp_path):
    ours = with_outputs("dino_tiny", 91)
    torch.save({"model": to_release(ours)}, tmp_path / "release.pth")
    settings = cfg("dino_tiny")
    settings.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 91
    model = build_model(settings)
    Checkpointer(model).load(str(tmp_path / "release.pth"))
    assert all(torch.equal(value, ours[key]) for key, value in model.state_dict().items())


def test_unshared_heads_come_as_one_set_a_layer():
    theirs = release("dino_tiny").state_dict()
    changed = "class_embed.1.bias"
    theirs[changed] = theirs["transformer.decoder." + changed] = torch.zeros(9)
    ours = from_release(theirs)
    assert not ours["sem_seg_head.predictor.heads.1.class_embed.bias"].any()
    assert ours["sem_seg_head.predictor.heads.2.class_embed.bias"].any()
    assert {key: value.shape for key, value in to_release(ours).items()} == {k: v.shape for k, v in theirs.items()}


def test_aliases_that_differ_are_an_error():
    theirs = release("dino_tiny").state_dict()
    theirs["class_embed.1.bias"] = torch.zeros(9)
    with pytest.raises(CheckpointError, match=r"class_embed\.1\.bias"):
        from_release(theirs)


def test_shared_heads_have_no_names_in_detrex():
    with pytest.raises(CheckpointError, match="SHARED_HEADS"):
        to_release(state("dino_tiny"), detrex=True)


def test_other_classes_keep_fresh_heads_and_labels_in_fine_tuning(tmp_path, caplog):
    torch.save({"model": release("dino_tiny").state_dict()}, tmp_path / "release.pth")
    settings = cfg("dino_tiny")
    settings.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 4
    model = build_model(settings)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    Checkpointer(model, finetune=True).load(str(tmp_path / "release.pth"))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if is_class_key(key) else state("dino_tiny")[key]), key
        assert (key in caplog.text) == is_class_key(key)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["MODEL.DINO.DEC_LAYERS", 2], "MODEL.DINO.DEC_LAYERS"),
        (["MODEL.DINO.ENC_LAYERS", 3], "MODEL.DINO.ENC_LAYERS"),
        (["MODEL.DINO.NUM_QUERIES", 30], "MODEL.DINO.NUM_QUERIES"),
        (["MODEL.DINO.QUERY_SELECTION", "pure"], "MODEL.DINO.QUERY_SELECTION"),
        (["MODEL.DINO.SHARED_HEADS", False], "MODEL.DINO.SHARED_HEADS"),
        (["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 8], "MODEL.SEM_SEG_HEAD.NUM_CLASSES"),
    ],
)
def test_weights_that_do_not_fit_name_the_key(tmp_path, options, cause):
    torch.save({"model": release("dino_tiny").state_dict()}, tmp_path / "release.pth")
    settings = cfg("dino_tiny")
    settings.merge_from_list(options)
    with pytest.raises(CheckpointError, match=cause):
        Checkpointer(build_model(settings)).load(str(tmp_path / "release.pth"))
