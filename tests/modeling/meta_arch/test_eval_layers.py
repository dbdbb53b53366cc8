"""TEST.EVAL_LAYERS: results after every stage that is asked for, and nothing computed for the others."""

import pytest
import torch

from dimaskdino.errors import ConfigError
from dimaskdino.modeling.meta_arch import DIMaskDINO
from dimaskdino.modeling.registry import DE_IMBALANCE_REGISTRY, TRANSFORMER_DECODER_REGISTRY
from dimaskdino.modeling.transformer_decoder import MaskDINODecoder
from dimaskdino.modeling.transformer_decoder.de_imbalance import DeImbalance
from dimaskdino.structures import MaskLogits, highest_scores
from tests.tiny_model import ONE_STAGE, image, predict, tiny_model, train_batch

BOXES = [[0, 0, 32, 32], [16, 8, 48, 40], [36, 40, 60, 48]]
TRIPLE = {"DI__NUM_SELECTED": [12, 10, 8]}
MASKDINO = {"TRANSFORMER_DECODER_NAME": "MaskDINODecoder"}
ALL_LAYERS = ["interm", "initial", "layer.0", "layer.1", "layer.2"]


@pytest.fixture(scope="module")
def model() -> DIMaskDINO:
    return tiny_model()


def test_eval_layers_are_named_in_the_order_they_are_predicted(model):
    assert model.eval_layer_names() == ALL_LAYERS
    assert tiny_model(**ONE_STAGE).eval_layer_names() == ALL_LAYERS[1:]
    assert tiny_model(DEC_LAYERS=2).eval_layer_names() == ALL_LAYERS[:4]
    without_initial = tiny_model(INITIAL_PRED=False, INITIALIZE_BOX_TYPE="no")
    assert without_initial.eval_layer_names() == ["interm", "selection.2", *ALL_LAYERS[2:]]


@pytest.mark.parametrize(
    ("node", "before_layer_0"),
    [
        ({"DI__ENABLED": False}, ["interm", "initial"]),
        (MASKDINO | TRIPLE | {"DI__RANDOM_POSITION": True}, ["interm", "initial"]),
        ({"DI__NUM_SELECTED": [12, 8]}, ["interm", "initial"]),
        (TRIPLE, ["interm", "selection.2", "initial"]),
        # The queries take other boxes or another content than the last selection's.
        ({"DI__RANDOM_POSITION": True}, ["interm", "selection.2", "initial"]),
        (TRIPLE | {"LEARN_TGT": True}, ["interm", "selection.2", "selection.3", "initial"]),
    ],
    ids=str,
)
def test_every_selection_is_evaluated_once(node, before_layer_0):
    model = tiny_model({"TEST.EVAL_LAYERS": ["all"]}, **node)
    with torch.no_grad():
        (result,) = model([{"image": image(64, 64)}])
    assert list(result["layers"]) == [*before_layer_0, *ALL_LAYERS[2:]]
    assert all(each["instances"].pred_masks.shape == (6, 64, 64) for each in result["layers"].values())


@TRANSFORMER_DECODER_REGISTRY.register()
class MyMaskDINODecoder(MaskDINODecoder):
    """MaskDINO under a name that the package does not know."""


@DE_IMBALANCE_REGISTRY.register()
class SimpleDeImbalance(DeImbalance):
    """Predicts none of its selections."""

    selection_stages = ()

    def forward(self, t_s1, heads):
        return t_s1.gather(highest_scores(heads.class_embed(t_s1.content), 8)), []


@pytest.mark.parametrize(
    "node",
    [{"TRANSFORMER_DECODER_NAME": "MyMaskDINODecoder"} | TRIPLE, {"DI__NAME": "SimpleDeImbalance"} | TRIPLE],
    ids=str,
)
def test_selections_that_a_part_does_not_predict_are_absent(node):
    model = tiny_model({"TEST.EVAL_LAYERS": ["all"]}, **node)
    with torch.no_grad():
        (result,) = model([{"image": image(64, 64)}])
    assert list(result["layers"]) == ALL_LAYERS
    with pytest.raises(ConfigError, match=r"names \['selection\.2'\]; this model has interm, initial"):
        tiny_model({"TEST.EVAL_LAYERS": ["selection.2"]}, **node)


def test_evaluating_selections_leaves_weights_losses_and_results_alone():
    models = [tiny_model(**TRIPLE), tiny_model({"TEST.EVAL_LAYERS": ["all"]}, **TRIPLE)]
    plain, asked = (model.state_dict() for model in models)
    assert list(plain) == list(asked)
    results = [predict(model, image(64, 64))[0] for model in models]
    assert torch.equal(results[0].scores, results[1].scores)
    assert torch.equal(results[0].pred_masks, results[1].pred_masks)
    losses = []
    for model in models:
        torch.manual_seed(3)
        losses.append(model.train()(train_batch(BOXES)))
    assert list(losses[0]) == list(losses[1])
    assert all(torch.equal(value, losses[1][name]) for name, value in losses[0].items())


def test_by_default_only_the_final_results_are_given(model):
    assert list(model([{"image": image(64, 64)}])[0]) == ["instances"]


@pytest.mark.parametrize(
    ("asked", "given"),
    [(["all"], ALL_LAYERS), (["layer.1"], ["layer.1"]), (["layer.2", "interm"], ["interm", "layer.2"])],
    ids=str,
)
def test_eval_layers_gives_results_of_the_stages_asked_for(asked, given):
    model = tiny_model({"TEST.EVAL_LAYERS": asked})
    with torch.no_grad():
        (result,) = model([{"image": image(64, 64), "height": 32, "width": 48}])
    assert list(result["layers"]) == given
    assert all(each["instances"].image_size == (32, 48) for each in result["layers"].values())


@pytest.mark.parametrize(("asked", "number"), [([], 1), (["layer.2"], 1), (["layer.0"], 2), (["all"], 5)], ids=str)
def test_masks_are_computed_for_the_stages_asked_for_alone(asked, number, monkeypatch):
    model = tiny_model({"TEST.EVAL_LAYERS": asked}, INITIALIZE_BOX_TYPE="no")
    computed, select = set(), MaskLogits.select
    monkeypatch.setattr(MaskLogits, "dense", None)

    def recorded(masks, *args):
        computed.add(id(masks))
        return select(masks, *args)

    monkeypatch.setattr(MaskLogits, "select", recorded)
    predict(model, image(64, 64))
    assert len(computed) == number


def test_last_layer_is_the_result_and_earlier_ones_differ():
    model = tiny_model({"TEST.EVAL_LAYERS": ["all"]})
    with torch.no_grad():
        (result,) = model([{"image": image(64, 64)}])
    assert result["layers"]["layer.2"]["instances"] is result["instances"]
    assert not torch.allclose(result["layers"]["layer.0"]["instances"].scores, result["instances"].scores)


@pytest.mark.parametrize("asked", [["layer.3"], ["all", "layer.0"], ["di.0"]], ids=str)
def test_error_about_unknown_eval_layers_names_the_known(asked):
    with pytest.raises(ConfigError, match=r"TEST\.EVAL_LAYERS names .*interm, initial, layer\.0, layer\.1, layer\.2"):
        tiny_model({"TEST.EVAL_LAYERS": asked})


def test_stages_give_every_kind_of_result():
    kinds = {"TEST__SEMANTIC_ON": True, "TEST__PANOPTIC_ON": True, "THING_CLASSES": [0, 1]}
    model = tiny_model({"TEST.EVAL_LAYERS": ["all"]}, **kinds)
    with torch.no_grad():
        (result,) = model([{"image": image(64, 64), "height": 32, "width": 48}])
    assert list(result["layers"]) == ALL_LAYERS
    for each in result["layers"].values():
        assert list(each) == ["instances", "panoptic_seg", "sem_seg"]
        assert each["panoptic_seg"][0].shape == (32, 48)
        assert each["sem_seg"].shape == (5, 32, 48)
    assert not torch.allclose(result["layers"]["layer.0"]["sem_seg"], result["sem_seg"])
