"""DINO: boxes alone, from images whose padding is masked."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_backbone

from dimaskdino.modeling.criterion import Criterion, HungarianMatcher, PointSampler
from dimaskdino.modeling.criterion.criterion import extra_costs, with_extra_terms
from dimaskdino.modeling.criterion.matcher import BoxCost, FocalClassCost
from dimaskdino.modeling.criterion.terms import BoxLoss, ClassOptions, FocalClassLoss, LossTerm
from dimaskdino.modeling.meta_arch.maskdino import DIMaskDINO, MaskDINOHead
from dimaskdino.modeling.postprocessing import PostProcessor
from dimaskdino.modeling.registry import PIXEL_DECODER_REGISTRY, TRANSFORMER_DECODER_REGISTRY, get_registered


@META_ARCH_REGISTRY.register()
class DINO(DIMaskDINO):
    """Object detection; masks of the data are not used.

    Source: DINO (Zhang et al., 2023).
    """

    ignores_padding = True

    @classmethod
    def needs_masks(cls, cfg: CfgNode) -> bool:
        """No: boxes are enough."""
        return False

    @classmethod
    def from_config(cls, cfg: CfgNode, point_sampler: PointSampler | None = None) -> dict[str, Any]:
        """Build the parts that MODEL.DINO names; ``point_sampler`` is for models with masks.

        Raises:
            ConfigError: for a name that is not registered, or values that cannot work together.
        """
        node, num_classes = cfg.MODEL.DINO, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        encoder = get_registered(PIXEL_DECODER_REGISTRY, node.ENCODER_NAME, "MODEL.DINO.ENCODER_NAME")
        decoder = get_registered(TRANSFORMER_DECODER_REGISTRY, node.DECODER_NAME, "MODEL.DINO.DECODER_NAME")
        predictor = decoder(cfg)
        get_registered(BACKBONE_REGISTRY, cfg.MODEL.BACKBONE.NAME, "MODEL.BACKBONE.NAME")
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "sem_seg_head": MaskDINOHead(pixel_decoder=encoder(cfg, backbone.output_shape()), predictor=predictor),
            "criterion": _criterion(cfg),
            "post_processor": PostProcessor(
                num_classes=num_classes,
                max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
                with_queries=cfg.MODEL.MaskDINO.TEST.QUERY_FEATURES,
            ),
            "num_classes": num_classes,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "size_divisibility": node.SIZE_DIVISIBILITY,
            "eval_layers": cfg.TEST.EVAL_LAYERS,
            "predicts_masks": False,
        }


def _criterion(cfg: CfgNode) -> Criterion:
    node = cfg.MODEL.DINO
    focal = {"alpha": node.FOCAL_ALPHA, "gamma": node.FOCAL_GAMMA}
    terms: list[LossTerm] = [
        FocalClassLoss(
            weight=node.CLASS_WEIGHT,
            num_classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            options=ClassOptions.from_config(cfg),
            **focal,
        ),
        BoxLoss(l1_weight=node.BOX_WEIGHT, giou_weight=node.GIOU_WEIGHT),
    ]
    return Criterion(
        terms=with_extra_terms(cfg, terms),
        matcher=HungarianMatcher(
            [
                FocalClassCost(weight=node.COST_CLASS_WEIGHT, **focal),
                BoxCost(l1_weight=node.COST_BOX_WEIGHT, giou_weight=node.COST_GIOU_WEIGHT),
                *extra_costs(cfg),
            ]
        ),
        denoising="no" if node.DN == "no" else "standard",
        deep_supervision=True,
        learned_queries_skip_first=False,
    )
