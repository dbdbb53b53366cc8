"""What the decoder's keys mean together, and which combinations cannot work."""

from detectron2.config import CfgNode

from dimaskdino.errors import ConfigError, check_choice

_BOX_TYPES = ("no", "mask2box", "bitmask")
_DN_KINDS = ("no", "standard", "seg")
_GUIDANCE = ("q_bal", "t_s2", "t_s1", "t_i")


def uses_no_object_class(cfg: CfgNode) -> bool:
    """Whether the class head has a no-object logit: semantic segmentation with softmax cross entropy."""
    test = cfg.MODEL.MaskDINO.TEST
    return bool(test.SEMANTIC_ON and cfg.MODEL.MaskDINO.SEMANTIC_CE_LOSS and not test.PANOPTIC_ON)


def num_selected(cfg: CfgNode) -> list[int]:
    """Tokens that each selection of De-Imbalance keeps: k1, k2 and so on."""
    node = cfg.MODEL.MaskDINO
    return list(node.DI.NUM_SELECTED or [node.FIRST_SELECTED_QUERIES, node.NUM_OBJECT_QUERIES])


def num_first_selected(cfg: CfgNode) -> int:
    """Tokens of the first selection: k1 with De-Imbalance, the decoder's queries without."""
    node = cfg.MODEL.MaskDINO
    return num_selected(cfg)[0] if node.DI.ENABLED else node.NUM_OBJECT_QUERIES


def stages_with_masks(cfg: CfgNode) -> list[str]:
    """Names of the stages whose boxes and masks can be evaluated, in the order they are made.

    "interm" is the first selection T_s1, "selection.2" and so on a later one, "initial" the queries before layer 0,
    "layer.l" decoder layer l. Every selection is among them once: the last one is "initial" unless the queries take
    something else than its tokens.
    """
    node = cfg.MODEL.MaskDINO
    first = ["interm", *_later_selections(cfg)] if node.TWO_STAGE else []
    first += ["initial"] if node.INITIAL_PRED else []
    return first + [f"layer.{index}" for index in range(node.DEC_LAYERS)]


def evaluates_selections(cfg: CfgNode) -> bool:
    """Whether TEST.EVAL_LAYERS asks for a selection that is predicted for evaluation alone."""
    asked = cfg.TEST.EVAL_LAYERS
    return any("all" in asked or name in asked for name in _later_selections(cfg))


def _later_selections(cfg: CfgNode) -> list[str]:
    """Stages of the selections that neither "interm" nor "initial" stands for."""
    node = cfg.MODEL.MaskDINO
    if not node.DI.ENABLED or node.TRANSFORMER_DECODER_NAME == "MaskDINODecoder":
        return []
    last = len(num_selected(cfg))
    is_initial = node.INITIAL_PRED and not node.LEARN_TGT and not node.DI.RANDOM_POSITION
    return [f"selection.{number}" for number in range(2, last if is_initial else last + 1)]


def check_decoder_config(cfg: CfgNode) -> None:
    """Refuse combinations that cannot work.

    Raises:
        ConfigError: naming the keys and what to change.
    """
    node = cfg.MODEL.MaskDINO
    for key, value, allowed in (
        ("INITIALIZE_BOX_TYPE", node.INITIALIZE_BOX_TYPE, _BOX_TYPES),
        ("DN", node.DN, _DN_KINDS),
        ("BATO.GUIDANCE", node.BATO.GUIDANCE, _GUIDANCE),
    ):
        check_choice(f"MODEL.MaskDINO.{key}", value, allowed)
    selected = node.DI.NUM_SELECTED
    if node.DI.ENABLED and selected and selected[-1] != node.NUM_OBJECT_QUERIES:
        raise ConfigError(
            f"MODEL.MaskDINO.DI.NUM_SELECTED ends in {selected[-1]}, but NUM_OBJECT_QUERIES is "
            f"{node.NUM_OBJECT_QUERIES}; the last selection gives the decoder its queries."
        )
    for message, applies in _conflicts(cfg).items():
        if applies:
            raise ConfigError(f"MODEL.MaskDINO.{message}")


def _conflicts(cfg: CfgNode) -> dict[str, bool]:
    """What cannot be, and why, each with whether it is so."""
    node = cfg.MODEL.MaskDINO
    return {
        "DI.ENABLED needs TWO_STAGE: De-Imbalance selects from tokens.": node.DI.ENABLED and not node.TWO_STAGE,
        "INITIALIZE_BOX_TYPE needs TWO_STAGE: learned queries bring their own boxes.": (
            node.INITIALIZE_BOX_TYPE != "no" and not node.TWO_STAGE
        ),
        "INITIALIZE_BOX_TYPE needs INITIAL_PRED, as in MaskDINO.": (
            node.INITIALIZE_BOX_TYPE != "no" and not node.INITIAL_PRED
        ),
        "BATO.ENABLED needs DEC_LAYERS of at least 2: it acts before layer 1.": (
            node.BATO.ENABLED and node.DEC_LAYERS < 2
        ),
        "BATO.GUIDANCE t_i means that De-Imbalance is off: set DI.ENABLED False.": (
            node.BATO.ENABLED and node.BATO.GUIDANCE == "t_i" and node.DI.ENABLED
        ),
        "BATO.GUIDANCE t_s2 needs DI.ENABLED: without De-Imbalance there is one selection alone, T_s1.": (
            node.BATO.ENABLED and node.BATO.GUIDANCE == "t_s2" and not node.DI.ENABLED
        ),
        "BATO.GUIDANCE t_s1 needs TWO_STAGE: learned queries are not selected from tokens.": (
            node.BATO.ENABLED and node.BATO.GUIDANCE == "t_s1" and not node.TWO_STAGE
        ),
        "DI.RANDOM_POSITION needs TWO_STAGE: the boxes of learned queries would never be trained.": (
            node.DI.RANDOM_POSITION and not node.TWO_STAGE
        ),
        "DI.ENABLED needs TI_LAYERS of at least 1: the second selection is among tokens that have interacted.": (
            node.DI.ENABLED and node.TI_LAYERS < 1
        ),
        "BATO.ENABLED needs HIDDEN_DIM and SEM_SEG_HEAD.MASK_DIM to be equal.": (
            node.BATO.ENABLED and node.HIDDEN_DIM != cfg.MODEL.SEM_SEG_HEAD.MASK_DIM
        ),
        "DEC_LAYERS must be at least 1.": node.DEC_LAYERS < 1,
        "NUM_OBJECT_QUERIES must be at least 1.": node.NUM_OBJECT_QUERIES < 1,
        "FIRST_SELECTED_QUERIES must be at least NUM_OBJECT_QUERIES: the second selection is among its tokens.": (
            node.DI.ENABLED and not node.DI.NUM_SELECTED and node.FIRST_SELECTED_QUERIES < node.NUM_OBJECT_QUERIES
        ),
        "NHEADS must divide HIDDEN_DIM and SEM_SEG_HEAD.CONVS_DIM.": (
            node.HIDDEN_DIM % node.NHEADS != 0 or cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM % node.NHEADS != 0
        ),
        "HIDDEN_DIM and SEM_SEG_HEAD.CONVS_DIM must be multiples of 32: group normalisation has 32 groups.": (
            node.HIDDEN_DIM % 32 != 0 or cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM % 32 != 0
        ),
        "NUM_GUIDING_TOKENS must be at least 1.": node.BATO.ENABLED and node.NUM_GUIDING_TOKENS < 1,
        "DN_NUM must be at least 1 (or set DN no).": node.DN != "no" and node.DN_NUM < 1,
    }
