"""What the YAML files of the public MaskDINO and DI-MaskDINO releases contain beyond plain values and our keys."""

import re

# Keys that nothing in the releases read: the decoder used its own default, or never built the part.
IGNORED_KEYS = frozenset(
    {
        "Default_loading",
        "DATASETS.TEST_PANOPTIC",
        "MODEL.RESNETS.RES4_DILATION",
        "MODEL.RESNETS.RES5_MULTI_GRID",
        "MODEL.RESNETS.STEM_TYPE",
        "MODEL.MaskDINO.ENC_LAYERS",
        "MODEL.MaskDINO.EVAL_FLAG",
        "MODEL.MaskDINO.PRED_CONV",
        "MODEL.MaskDINO.PRE_NORM",
        "MODEL.SEM_SEG_HEAD.ASPP_CHANNELS",
        "MODEL.SEM_SEG_HEAD.ASPP_DILATIONS",
        "MODEL.SEM_SEG_HEAD.ASPP_DROPOUT",
        "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS",
        "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS",
        "MODEL.SEM_SEG_HEAD.LOSS_TYPE",
        "MODEL.SEM_SEG_HEAD.NUM_FEATURE_LEVELS",
        "MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS",
        "MODEL.SEM_SEG_HEAD.PROJECT_FEATURES",
        "MODEL.SEM_SEG_HEAD.USE_DEPTHWISE_SEPARABLE_CONV",
    }
)

# The one Python expression in their files: training sizes from half to twice a length in pixels.
_SCALED_SIZES = re.compile(r"\[int\(x \* 0\.1 \* (\d{1,5})\) for x in range\((\d{1,3}), (\d{1,3})\)\]")


def scaled_sizes(expression: str) -> list[int]:
    """Compute ``[int(x * 0.1 * 640) for x in range(5, 21)]`` without running it.

    Args:
        expression: any three numbers may stand for 640, 5 and 21.

    Returns:
        The sizes in pixels.

    Raises:
        ValueError: any other expression.
    """
    match = _SCALED_SIZES.fullmatch(expression)
    if match is None:
        raise ValueError(f"only [int(x * 0.1 * SIZE) for x in range(FIRST, END)] is evaluated, not {expression:.80}")
    size, first, end = map(int, match.groups())
    return [int(x * 0.1 * size) for x in range(first, end)]
