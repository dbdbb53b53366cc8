"""What the decoders' keys mean together, and which combinations cannot work."""

from collections.abc import Mapping

from detectron2.config import CfgNode

from dimaskdino.errors import ConfigError, check_choice

NO_THINGS = [-1]  # MODEL.MaskDINO.THING_CLASSES of a model of stuff alone


def uses_no_object_class(cfg: CfgNode) -> bool:
    """Whether the class head has a no-object logit: semantic segmentation with softmax cross entropy."""
    test = cfg.MODEL.MaskDINO.TEST
    return bool(test.SEMANTIC_ON and cfg.MODEL.MaskDINO.SEMANTIC_CE_LOSS and not test.PANOPTIC_ON)


def num_selected(cfg: CfgNode) -> list[int]:
    """Tokens that each selection of De-Imbalance keeps: k1, k2 and so on."""
    node = cfg.MODEL.MaskDINO
    return list(node.DI.NUM_SELECTED or [node.FIRST_SELECTED_QUERIES, node.NUM_OBJECT_QUERIES])


def layer_sizes(node: CfgNode) -> dict[str, int]:
    """Width, feed-forward width and attention heads of the layers that MODEL.MaskDINO or MODEL.DINO describes."""
    return {"dim": node.HIDDEN_DIM, "hidden_dim": node.DIM_FEEDFORWARD, "num_heads": node.NHEADS}


def check_maskdino(cfg: CfgNode) -> None:
    """Refuse keys of Mask DINO's decoder that cannot work together.

    Raises:
        ConfigError: names the keys and what to change.
    """
    node, head = cfg.MODEL.MaskDINO, cfg.MODEL.SEM_SEG_HEAD
    _check_results(cfg)
    check_choice("MODEL.MaskDINO.INITIALIZE_BOX_TYPE", node.INITIALIZE_BOX_TYPE, ("no", "mask2box", "bitmask"))
    check_choice("MODEL.MaskDINO.DN", node.DN, ("no", "standard", "seg"))
    box_of_mask = node.INITIALIZE_BOX_TYPE != "no"
    _refuse(
        {
            "INITIALIZE_BOX_TYPE needs TWO_STAGE: learned queries bring their own boxes.": (
                box_of_mask and not node.TWO_STAGE
            ),
            "INITIALIZE_BOX_TYPE needs INITIAL_PRED, as in Mask DINO.": box_of_mask and not node.INITIAL_PRED,
            "INITIALIZE_BOX_TYPE needs PREDICT_MASKS: without masks set it to no.": box_of_mask
            and not node.PREDICT_MASKS,
            "DI.RANDOM_POSITION needs TWO_STAGE: the boxes of learned queries would never be trained.": (
                node.DI.RANDOM_POSITION and not node.TWO_STAGE
            ),
            "DEC_LAYERS must be at least 1.": node.DEC_LAYERS < 1,
            "NUM_OBJECT_QUERIES must be at least 1.": node.NUM_OBJECT_QUERIES < 1,
            "NHEADS must divide HIDDEN_DIM and SEM_SEG_HEAD.CONVS_DIM.": (
                node.HIDDEN_DIM % node.NHEADS != 0 or head.CONVS_DIM % node.NHEADS != 0
            ),
            "HIDDEN_DIM and SEM_SEG_HEAD.CONVS_DIM must be multiples of 32: group normalization has 32 groups.": (
                node.HIDDEN_DIM % 32 != 0 or head.CONVS_DIM % 32 != 0
            ),
            "DN_NUM must be at least 1 (or set DN no).": node.DN != "no" and node.DN_NUM < 1,
        }
    )


def _check_results(cfg: CfgNode) -> None:
    """Refuse kinds of results that the model cannot give, or cannot give together."""
    node, test = cfg.MODEL.MaskDINO, cfg.MODEL.MaskDINO.TEST
    softmax = test.SEMANTIC_ON and node.SEMANTIC_CE_LOSS
    num_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    listed = [] if list(node.THING_CLASSES) == NO_THINGS else node.THING_CLASSES
    unknown = [each for each in listed if each not in range(num_classes)]
    _refuse(
        {
            "TEST.INSTANCE_ON, SEMANTIC_ON and PANOPTIC_ON are all False; set one of them.": not (
                test.INSTANCE_ON or test.SEMANTIC_ON or test.PANOPTIC_ON
            ),
            f"THING_CLASSES lists {unknown}, but the {num_classes} classes (MODEL.SEM_SEG_HEAD.NUM_CLASSES) have the "
            f"numbers 0 to {num_classes - 1}; correct it, or leave it empty to take the dataset's.": bool(unknown),
            "TEST.PANOPTIC_ON needs PREDICT_MASKS.": test.PANOPTIC_ON and not node.PREDICT_MASKS,
            "TEST.SEMANTIC_ON needs PREDICT_MASKS; for boxes set TEST.INSTANCE_ON.": (
                not test.INSTANCE_ON and not node.PREDICT_MASKS
            ),
            "SEMANTIC_CE_LOSS does not go with TEST.PANOPTIC_ON: panoptic results come from sigmoid scores, not from "
            "a softmax with a no-object class; set SEMANTIC_CE_LOSS False.": node.SEMANTIC_CE_LOSS and test.PANOPTIC_ON,
            "SEMANTIC_CE_LOSS does not go with TEST.INSTANCE_ON: instances come from sigmoid scores, not from a "
            "softmax with a no-object class; set one of them False.": softmax and test.INSTANCE_ON,
        }
    )


def check_dimaskdino(cfg: CfgNode) -> None:
    """Refuse keys of De-Imbalance and BATO that cannot work together.

    Raises:
        ConfigError: names the keys and what to change.
    """
    node = cfg.MODEL.MaskDINO
    check_choice("MODEL.MaskDINO.BATO.GUIDANCE", node.BATO.GUIDANCE, ("q_bal", "t_s2", "t_s1", "t_i"))
    selected = node.DI.NUM_SELECTED
    if node.DI.ENABLED and selected and selected[-1] != node.NUM_OBJECT_QUERIES:
        raise ConfigError(
            f"MODEL.MaskDINO.DI.NUM_SELECTED ends in {selected[-1]}, but NUM_OBJECT_QUERIES is "
            f"{node.NUM_OBJECT_QUERIES}; the last selection gives the decoder its queries."
        )
    if node.DI.ENABLED:
        _refuse(
            {
                "DI.ENABLED needs TWO_STAGE: De-Imbalance selects from tokens.": not node.TWO_STAGE,
                "DI.ENABLED needs TI_LAYERS of at least 1: the second selection follows token interaction.": (
                    node.TI_LAYERS < 1
                ),
                "FIRST_SELECTED_QUERIES must be at least NUM_OBJECT_QUERIES, which are selected from them.": (
                    not selected and node.FIRST_SELECTED_QUERIES < node.NUM_OBJECT_QUERIES
                ),
            }
        )
    if node.BATO.ENABLED:
        guidance = node.BATO.GUIDANCE
        _refuse(
            {
                "BATO.ENABLED needs DEC_LAYERS of at least 2: it acts before layer 1.": node.DEC_LAYERS < 2,
                "BATO.GUIDANCE t_i means that De-Imbalance is off: set DI.ENABLED False.": (
                    guidance == "t_i" and node.DI.ENABLED
                ),
                "BATO.GUIDANCE t_s2 needs DI.ENABLED: without De-Imbalance there is one selection alone, T_s1.": (
                    guidance == "t_s2" and not node.DI.ENABLED
                ),
                "BATO.GUIDANCE t_s1 needs TWO_STAGE: learned queries are not selected from tokens.": (
                    guidance == "t_s1" and not node.TWO_STAGE
                ),
                "BATO.ENABLED needs PREDICT_MASKS: it updates the mask features.": not node.PREDICT_MASKS,
                "BATO.ENABLED needs HIDDEN_DIM and SEM_SEG_HEAD.MASK_DIM to be equal.": (
                    node.HIDDEN_DIM != cfg.MODEL.SEM_SEG_HEAD.MASK_DIM
                ),
                "BATO.PAPER_FORM needs BATO.GTG: without guiding token generation there are no Eqs. 5 to 7.": (
                    node.BATO.PAPER_FORM and not node.BATO.GTG
                ),
                "NUM_GUIDING_TOKENS must be at least 1.": node.NUM_GUIDING_TOKENS < 1,
            }
        )


def check_dino(cfg: CfgNode) -> None:
    """Refuse keys of DINO that cannot work together.

    Raises:
        ConfigError: names the keys and what to change.
    """
    node = cfg.MODEL.DINO
    check_choice("MODEL.DINO.QUERY_SELECTION", node.QUERY_SELECTION, ("none", "pure", "mixed"))
    check_choice("MODEL.DINO.DN", node.DN, ("no", "plain", "contrastive"))
    _refuse(
        {
            "DEC_LAYERS must be at least 1.": node.DEC_LAYERS < 1,
            "NUM_QUERIES must be at least 1.": node.NUM_QUERIES < 1,
            "SIZE_DIVISIBILITY must be at least 1.": node.SIZE_DIVISIBILITY < 1,
            "NHEADS must divide HIDDEN_DIM.": node.HIDDEN_DIM % node.NHEADS != 0,
            "HIDDEN_DIM must be a multiple of 32: group normalization has 32 groups.": node.HIDDEN_DIM % 32 != 0,
            "DN_NUM must be at least 1 (or set DN no).": node.DN != "no" and node.DN_NUM < 1,
        },
        "MODEL.DINO",
    )


def _refuse(conflicts: Mapping[str, bool], node: str = "MODEL.MaskDINO") -> None:
    """Raise a ConfigError with the first message whose condition holds."""
    for message, applies in conflicts.items():
        if applies:
            raise ConfigError(f"{node}.{message}")
