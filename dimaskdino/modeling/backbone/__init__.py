"""Backbones beyond detectron2's own; importing this package registers them."""

from dimaskdino.modeling.backbone.swin import D2SwinTransformer
from dimaskdino.modeling.backbone.timm import TimmBackbone, build_timm_backbone

__all__ = ["D2SwinTransformer", "TimmBackbone", "build_timm_backbone"]
