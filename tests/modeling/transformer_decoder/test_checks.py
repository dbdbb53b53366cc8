"""Which parameters a decoder has, and which settings it refuses."""

import pytest
from detectron2.modeling import build_model

from dimaskdino.errors import ConfigError
from dimaskdino.modeling.criterion import Criterion
from dimaskdino.modeling.transformer_decoder import DIMaskDINODecoder, MaskDINODecoder
from dimaskdino.modeling.transformer_decoder.checks import uses_no_object_class
from tests.tiny_model import DIM, NUM_CLASSES, tiny_cfg

NO_INITIAL_BOX = {"INITIALIZE_BOX_TYPE": "no"}
BOXES_ALONE = {"PREDICT_MASKS": False, "BATO__ENABLED": False}
SEMANTIC_ONLY = {"TEST__INSTANCE_ON": False, "TEST__SEMANTIC_ON": True}
PANOPTIC_ONLY = {"TEST__INSTANCE_ON": False, "TEST__PANOPTIC_ON": True}
SOFTMAX = {"SEMANTIC_CE_LOSS": True, "TEST__SEMANTIC_ON": True}
ONE_STAGE = {"TWO_STAGE": False, "DI__ENABLED": False, **NO_INITIAL_BOX}


def groups(decoder: DIMaskDINODecoder) -> set[str]:
    """The parameters, layers of a kind told apart by their number, each named by its first parts."""
    return {".".join(name.split(".")[: 3 if ".layers." in name else 2]) for name in decoder.state_dict()}


def parts(*prefixes: str) -> set[str]:
    return {name for name in groups(DIMaskDINODecoder(tiny_cfg())) if name.startswith(prefixes)}


@pytest.mark.parametrize(
    ("node", "removed", "added"),
    [
        ({"DI__ENABLED": False}, ("de_imbalance.",), ()),
        ({"BATO__ENABLED": False}, ("bato.",), ()),
        ({"BATO__GTG": False}, (), ()),
        ({"BATO__PAPER_FORM": True}, (), ("bato.mask_guide.layers", "bato.box_guide.layers")),
        ({"BATO__GUIDANCE": "t_s2"}, (), ()),
        ({"BATO__GUIDANCE": "t_s1"}, (), ()),
        ({"NUM_GUIDING_TOKENS": 2}, (), ()),
        ({"DI__SINGLE_DELTA_BOXES": True}, (), ()),
        ({"DI__RANDOM_POSITION": True}, (), ()),
        ({"DI__NUM_SELECTED": [12, 10, 8]}, (), ("de_imbalance.layers.2", "de_imbalance.layers.3")),
        ({"TI_LAYERS": 1}, ("de_imbalance.layers.1",), ()),
        ({"DEC_LAYERS": 2}, ("layers.2",), ()),
        ({"DN": "no"}, (), ()),
        ({"DN": "standard"}, (), ()),
        ({"INITIALIZE_BOX_TYPE": "bitmask"}, (), ()),
        ({"INITIAL_PRED": False, **NO_INITIAL_BOX}, (), ()),
        ({"LEARN_TGT": True}, (), ("query_feat.weight",)),
        (ONE_STAGE, ("de_imbalance.", "selection."), ("query_feat.weight", "query_embed.weight")),
        ({"ENFORCE_INPUT_PROJ": True}, (), ("input_proj.0", "input_proj.1", "input_proj.2", "input_proj.3")),
    ],
    ids=str,
)
def test_a_setting_adds_and_removes_its_own_parameters_alone(node, removed, added):
    expected = groups(DIMaskDINODecoder(tiny_cfg())) - parts(*removed) | set(added)
    assert groups(DIMaskDINODecoder(tiny_cfg(**node))) == expected


def test_maskdino_has_neither_di_nor_bato_whatever_their_switches_say():
    cfg = tiny_cfg(DI__ENABLED=True, BATO__ENABLED=True)
    expected = groups(DIMaskDINODecoder(cfg)) - parts("de_imbalance.", "bato.")
    assert groups(MaskDINODecoder(cfg)) == expected
    assert cfg.MODEL.MaskDINO.DI.ENABLED


def test_building_maskdino_leaves_a_frozen_configuration_as_it_is():
    cfg = tiny_cfg()
    cfg.freeze()
    MaskDINODecoder(cfg)
    assert cfg.is_frozen()
    assert cfg.MODEL.MaskDINO.BATO.ENABLED


def test_maskdino_selects_as_many_tokens_as_it_has_queries():
    assert MaskDINODecoder(tiny_cfg()).num_first_selected == 8
    assert DIMaskDINODecoder(tiny_cfg()).num_first_selected == 12
    assert DIMaskDINODecoder(tiny_cfg(DI__NUM_SELECTED=[20, 8])).num_first_selected == 20


def test_levels_of_another_width_are_projected():
    decoder = DIMaskDINODecoder(tiny_cfg({"MODEL.SEM_SEG_HEAD.CONVS_DIM": 96}))
    assert [proj.weight.shape for proj in decoder.input_proj] == [(DIM, 96, 1, 1)] * 4


@pytest.mark.parametrize(
    ("semantic", "cross_entropy", "expected"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_the_no_object_class_belongs_to_semantic_cross_entropy_alone(semantic, cross_entropy, expected):
    cfg = tiny_cfg(TEST__SEMANTIC_ON=semantic, SEMANTIC_CE_LOSS=cross_entropy, TEST__INSTANCE_ON=not semantic)
    assert uses_no_object_class(cfg) is expected
    assert MaskDINODecoder(cfg).heads.class_embed.out_features == NUM_CLASSES + expected


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"INITIALIZE_BOX_TYPE": "mask"}, "INITIALIZE_BOX_TYPE is 'mask'; it must be one of no, mask2box, bitmask"),
        ({"DN": "yes"}, "DN is 'yes'; it must be one of no, standard, seg"),
        ({"BATO__GUIDANCE": "q"}, "BATO.GUIDANCE is 'q'; it must be one of q_bal, t_s2, t_s1, t_i"),
        ({"DI__NUM_SELECTED": [12, 7]}, "DI.NUM_SELECTED ends in 7, but NUM_OBJECT_QUERIES is 8"),
        ({"DI__NUM_SELECTED": [8]}, r"DI.NUM_SELECTED is \[8\]; De-Imbalance needs two or more"),
        ({"DI__NUM_SELECTED": [8, 12, 8]}, "none larger than the one before"),
        ({"FIRST_SELECTED_QUERIES": 7}, "FIRST_SELECTED_QUERIES must be at least NUM_OBJECT_QUERIES"),
        ({"NUM_OBJECT_QUERIES": 0}, "NUM_OBJECT_QUERIES must be at least 1"),
        ({"TWO_STAGE": False, **NO_INITIAL_BOX}, "DI.ENABLED needs TWO_STAGE"),
        ({"TWO_STAGE": False, "DI__ENABLED": False}, "INITIALIZE_BOX_TYPE needs TWO_STAGE"),
        ({"INITIAL_PRED": False}, "INITIALIZE_BOX_TYPE needs INITIAL_PRED"),
        ({"DEC_LAYERS": 1}, "BATO.ENABLED needs DEC_LAYERS of at least 2"),
        ({"BATO__PAPER_FORM": True, "BATO__GTG": False}, "BATO.PAPER_FORM needs BATO.GTG"),
        ({"BATO__GUIDANCE": "t_i"}, "BATO.GUIDANCE t_i means that De-Imbalance is off"),
        ({"DEC_LAYERS": 0, "BATO__ENABLED": False}, "DEC_LAYERS must be at least 1"),
        ({"NUM_GUIDING_TOKENS": 0}, "NUM_GUIDING_TOKENS must be at least 1"),
        ({"DN_NUM": 0}, "DN_NUM must be at least 1"),
        ({"TEST__INSTANCE_ON": False}, "INSTANCE_ON, SEMANTIC_ON and PANOPTIC_ON are all False"),
        (SOFTMAX, "SEMANTIC_CE_LOSS does not go with TEST.INSTANCE_ON: .* sigmoid scores"),
        (PANOPTIC_ONLY | {"SEMANTIC_CE_LOSS": True}, "SEMANTIC_CE_LOSS does not go with TEST.PANOPTIC_ON: .* sigmoid"),
        ({"THING_CLASSES": [0, 5, -1]}, r"THING_CLASSES lists \[5, -1\], but the 5 classes .* 0 to 4"),
        (PANOPTIC_ONLY | BOXES_ALONE, "TEST.PANOPTIC_ON needs PREDICT_MASKS"),
        (SEMANTIC_ONLY | BOXES_ALONE, "TEST.SEMANTIC_ON needs PREDICT_MASKS"),
    ],
    ids=str,
)
def test_impossible_settings_name_the_key_and_the_way_out(node, message):
    with pytest.raises(ConfigError, match=rf"MODEL\.MaskDINO\..*{message}|MODEL\.MaskDINO\.{message}"):
        DIMaskDINODecoder(tiny_cfg(**node))


def test_bato_needs_masks_of_the_width_of_the_queries():
    options = {"MODEL.SEM_SEG_HEAD.MASK_DIM": 32}
    with pytest.raises(ConfigError, match="HIDDEN_DIM and SEM_SEG_HEAD.MASK_DIM to be equal"):
        DIMaskDINODecoder(tiny_cfg(options))
    assert DIMaskDINODecoder(tiny_cfg(options, BATO__ENABLED=False)).heads.mask_embed.layers[-1].out_features == 32


@pytest.mark.parametrize(
    "node",
    [
        {"DEC_LAYERS": 1, "BATO__ENABLED": False},
        {"NUM_GUIDING_TOKENS": 0, "BATO__ENABLED": False},
        {"DN_NUM": 0, "DN": "no"},
        {"BATO__GUIDANCE": "t_i", "DI__ENABLED": False},
        {"DI__NUM_SELECTED": [12, 7], "DI__ENABLED": False},
    ],
    ids=str,
)
def test_settings_of_a_part_that_is_off_are_not_refused(node):
    DIMaskDINODecoder(tiny_cfg(**node))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.MaskDINO.NHEADS", 7, "NHEADS must divide HIDDEN_DIM and SEM_SEG_HEAD.CONVS_DIM"),
        ("MODEL.SEM_SEG_HEAD.CONVS_DIM", 40, "CONVS_DIM must be multiples of 32"),
    ],
)
def test_indivisible_widths_are_refused_before_building(key: str, value: int, message: str) -> None:
    cfg = tiny_cfg()
    cfg.merge_from_list([key, value])
    with pytest.raises(ConfigError, match=message):
        build_model(cfg)


@pytest.mark.parametrize(("key", "value"), [("TRAIN_NUM_POINTS", 0), ("OVERSAMPLE_RATIO", 0.5)])
def test_points_that_cannot_be_drawn_name_their_key(key, value):
    with pytest.raises(ConfigError, match=rf"MODEL\.MaskDINO\.TRAIN_NUM_POINTS and OVERSAMPLE_RATIO .* {value}"):
        Criterion(tiny_cfg(**{key: value}))
