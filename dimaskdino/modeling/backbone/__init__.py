"""Backbones beyond detectron2's own; importing this package registers them."""

from dimaskdino.modeling.backbone.swin import D2SwinTransformer
from dimaskdino.modeling.backbone.timm import TimmBackbone, build_timm_backbone
from dimaskdino.modeling.backbone.vit import ViTBackbone, build_vit_backbone

__all__ = ["D2SwinTransformer", "TimmBackbone", "ViTBackbone", "build_timm_backbone", "build_vit_backbone"]
