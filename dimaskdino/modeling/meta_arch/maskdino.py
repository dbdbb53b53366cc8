"""Images to losses (training) or results (evaluation); the head has encoder and decoder, each by a registered name."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY, build_backbone
from detectron2.modeling import build_model as build_detectron2_model
from detectron2.structures import ImageList
from torch import Tensor, nn

from dimaskdino.errors import ConfigError
from dimaskdino.layers.fast_layers import in_fast_layout, use_fast_layers
from dimaskdino.layers.padding import PaddedBatch
from dimaskdino.layers.precision import evaluation_dtype
from dimaskdino.modeling.criterion import Criterion, PointSampler, StepObjects
from dimaskdino.modeling.policies import compile_layers, use_channels_last
from dimaskdino.modeling.postprocessing import Frame, PostProcessor, class_mask, mean_feature, thing_classes
from dimaskdino.modeling.registry import PIXEL_DECODER_REGISTRY, TRANSFORMER_DECODER_REGISTRY, get_registered
from dimaskdino.structures import DecoderOutput, Stage, Targets


@SEM_SEG_HEADS_REGISTRY.register()
class MaskDINOHead(nn.Module):
    """Backbone features to predictions."""

    @configurable
    def __init__(self, *, pixel_decoder: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.pixel_decoder = pixel_decoder
        self.predictor = predictor

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Read the registered names of both parts.

        Raises:
            ConfigError: for a name that is not registered.
        """
        encoder = get_registered(
            PIXEL_DECODER_REGISTRY, cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME, "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME"
        )
        decoder = get_registered(
            TRANSFORMER_DECODER_REGISTRY,
            cfg.MODEL.MaskDINO.TRANSFORMER_DECODER_NAME,
            "MODEL.MaskDINO.TRANSFORMER_DECODER_NAME",
        )
        # The decoder first: it checks that the keys of both fit together.
        predictor = decoder(cfg)
        return {"pixel_decoder": encoder(cfg, input_shape), "predictor": predictor}

    def forward(
        self, features: Mapping[str, Tensor], targets: Sequence[Targets] | None = None, batch: PaddedBatch | None = None
    ) -> DecoderOutput:
        """Predict.

        Args:
            features: of the backbone by name, (B, C_f, h_f, w_f).
            targets: of each image, in training.
            batch: the images on their canvas, for an encoder that ignores padding.
        """
        encoded = self.pixel_decoder(features) if batch is None else self.pixel_decoder(features, batch)
        return self.predictor(encoded, targets)


@META_ARCH_REGISTRY.register()
class DIMaskDINO(nn.Module):
    """Object detection with instance, semantic, and panoptic segmentation.

    Args:
        backbone: images to features by name.
        sem_seg_head: features, and targets for denoising, to predictions.
        criterion: predictions and targets to losses.
        post_processor: predictions of a stage to results.
        num_classes: classes K.
        pixel_mean: of each channel, on the 0-255 scale.
        pixel_std: of each channel.
        size_divisibility: images are padded with zeros to a multiple of this.
        eval_layers: stages to report besides the final one: none, ("all",) or names of :attr:`stages`.
        box_classes: classes whose boxes are supervised; None for all.
        predicts_masks: False for a model of boxes alone, which is trained without the masks of its objects.

    Source: DI-MaskDINO (NeurIPS 2024), on MaskDINO (Li et al., 2023).
    """

    has_box_loss: Tensor
    pixel_mean: Tensor
    pixel_std: Tensor
    ignores_padding = False
    """Whether boxes are parts of each image and padding is masked; otherwise the padded canvas counts as the image."""

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        sem_seg_head: nn.Module,
        criterion: Criterion,
        post_processor: PostProcessor,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        size_divisibility: int,
        eval_layers: Sequence[str],
        box_classes: Sequence[int] | None = None,
        predicts_masks: bool = True,
    ) -> None:
        super().__init__()
        self.backbone, self.sem_seg_head, self.criterion = backbone, sem_seg_head, criterion
        self.num_classes, self.size_divisibility = num_classes, size_divisibility
        self.post_processor = post_processor
        self.predicts_masks = predicts_masks
        self.eval_layers = self._resolve_eval_layers(eval_layers)
        box_classes = range(num_classes) if box_classes is None else box_classes
        self.register_buffer("has_box_loss", class_mask(box_classes, num_classes), persistent=False)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode, point_sampler: PointSampler | None = None) -> dict[str, Any]:
        """Build the parts by their registered names; ``point_sampler`` replaces the random one in training."""
        node = cfg.MODEL.MaskDINO
        get_registered(BACKBONE_REGISTRY, cfg.MODEL.BACKBONE.NAME, "MODEL.BACKBONE.NAME")
        backbone = build_backbone(cfg)
        build_head = get_registered(SEM_SEG_HEADS_REGISTRY, cfg.MODEL.SEM_SEG_HEAD.NAME, "MODEL.SEM_SEG_HEAD.NAME")
        head = build_head(cfg, backbone.output_shape())
        return {
            "backbone": backbone,
            "sem_seg_head": head,
            "criterion": Criterion(cfg, sampler=point_sampler),
            "post_processor": PostProcessor(cfg),
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "size_divisibility": max(node.SIZE_DIVISIBILITY, backbone.size_divisibility, 1),
            "eval_layers": cfg.TEST.EVAL_LAYERS,
            "box_classes": thing_classes(cfg, "MODEL.MaskDINO.PANO_BOX_LOSS") if node.PANO_BOX_LOSS else None,
            "predicts_masks": node.PREDICT_MASKS,
        }

    @classmethod
    def needs_masks(cls, cfg: CfgNode) -> bool:
        """Whether the configured model is trained on masks."""
        return cfg.MODEL.MaskDINO.PREDICT_MASKS

    def train(self, mode: bool = True) -> "DIMaskDINO":
        """Switch to training or evaluation, with the layers of :mod:`dimaskdino.layers.fast_layers`."""
        use_fast_layers(self)
        super().train(mode)
        return self

    @property
    def device(self) -> torch.device:
        """Where the model lives; images are moved there."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def set_precision(self, precision: str) -> None:
        """Cast the weights once, for evaluation; a model in bfloat16 cannot be trained.

        Args:
            precision: float32, bfloat16, or auto for bfloat16 where the device computes in it by itself.

        Raises:
            ConfigError: the device would emulate it.
        """
        pixels = {"pixel_mean": self.pixel_mean, "pixel_std": self.pixel_std}
        self.to(evaluation_dtype(precision, self.device))
        for name, values in pixels.items():  # 255 values need more than the 8 bits of bfloat16
            setattr(self, name, values)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Stages that evaluation can report, in the order in which they are predicted; the last is the result."""
        return self.sem_seg_head.predictor.stages  # type: ignore[union-attr, return-value]

    def eval_layer_names(self) -> list[str]:
        """Names of :attr:`stages`."""
        return [stage.name for stage in self.stages]

    def _resolve_eval_layers(self, asked: Sequence[str]) -> tuple[str, ...]:
        if not asked:
            return ()
        known = self.eval_layer_names()
        if list(asked) == ["all"]:
            return tuple(known)
        unknown = [name for name in asked if name not in known]
        if unknown:
            raise ConfigError(f"TEST.EVAL_LAYERS names {unknown}; this model has {', '.join(known)} (or all).")
        return tuple(name for name in known if name in asked)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Train on or evaluate a batch.

        Args:
            batched_inputs: for each image a dict with "image" (3, H, W) in the channel order of INPUT.FORMAT, 0 to 255;
                optionally "height" and "width" of the wanted result in px (default: those of "image"); in training
                "instances" in the frame of "image" (:meth:`dimaskdino.structures.Targets.from_instances`).

        Returns:
            In training the weighted losses by name. In evaluation for each image what the configuration asks for of
            "instances", "panoptic_seg" and "sem_seg", in detectron2's format; where TEST.EVAL_LAYERS names stages,
            "layers": {stage: the same for that stage}; and "image_feature" (C,) where
            MODEL.MaskDINO.TEST.QUERY_FEATURES is set.

        Raises:
            DatasetError: for training data that does not fit the model.
        """
        self.check_supported()
        images = self._preprocess(batched_inputs)
        (height, width), image_sizes = images.tensor.shape[-2:], images.image_sizes
        features = self.backbone(images.tensor)
        del images
        batch = PaddedBatch(image_sizes, (height, width)) if self.ignores_padding else None
        frames = batch.image_sizes if batch else [(height, width)] * len(batched_inputs)
        padding = {} if batch is None else {"batch": batch}
        if not self.training:
            output = self.sem_seg_head(features, **padding)
            del features
            return [
                self._results(output, index, (height, width), frames[index], image_sizes[index], given)
                for index, given in enumerate(batched_inputs)
            ]
        targets = [
            Targets.from_instances(
                given["instances"],
                height,
                width,
                self.num_classes,
                self.device,
                with_masks=self.predicts_masks,
                unlabeled=given.get("unlabeled_classes", ()),
                crowd=given.get("crowd_regions"),
            ).supervise_boxes_of(self.has_box_loss)
            for (height, width), given in zip(frames, batched_inputs, strict=True)
        ]
        return self.criterion(self.sem_seg_head(features, targets, **padding), targets)

    @contextlib.contextmanager
    def losses_are_parts_of(self, batched_inputs: Sequence[dict[str, Any]]) -> Iterator[None]:
        """While it is entered, losses are parts of those of ``batched_inputs``: divided by the objects of all of it."""
        counts = [len(given["instances"]) for given in batched_inputs]
        denoising = getattr(self.sem_seg_head.predictor, "denoising", None)
        room = getattr(denoising, "num_denoised", int)
        self.criterion.step = StepObjects(counts, [room(count) for count in counts])
        try:
            yield
        finally:
            self.criterion.step = None

    def check_supported(self) -> None:
        """Refuse what the model cannot compute.

        Raises:
            TypeError: for weights of another type.
        """
        allowed = (torch.float32,) if self.training else (torch.float32, torch.bfloat16)
        if self.dtype not in allowed:
            raise TypeError(
                f"The weights are {self.dtype}; keep them in float32 (in evaluation bfloat16 works as well), and use "
                "torch.autocast for mixed precision."
            )

    def _preprocess(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        images = [
            (given["image"].to(self.device).float() - self.pixel_mean) / self.pixel_std for given in batched_inputs
        ]
        padded = ImageList.from_tensors(images, self.size_divisibility)
        tensor = padded.tensor.to(self.dtype)
        return ImageList(in_fast_layout(tensor), padded.image_sizes)

    def _results(
        self,
        output: DecoderOutput,
        index: int,
        canvas: tuple[int, int],
        frame: tuple[int, int],
        image_size: tuple[int, int],
        given: dict[str, Any],
    ) -> dict[str, Any]:
        """Results of an image of the batch: of the last stage, and of those that evaluation asks for; sizes in px."""
        sizes = Frame(frame, image_size, (given.get("height", image_size[0]), given.get("width", image_size[1])))
        stages = {stage.name: stage for stage in output.stages}
        final = output.stages[-1].name
        result = self.post_processor(stages[final], index, sizes)
        layers = {
            name: result if name == final else self.post_processor(stages[name], index, sizes)
            for name in self.eval_layers
        }
        extra: dict[str, Any] = {"layers": layers} if layers else {}
        if self.post_processor.with_queries and output.t_i is not None:
            extra["image_feature"] = mean_feature(output.t_i, index, canvas, image_size)
        return {**result, **extra}


def build_model(cfg: CfgNode) -> nn.Module:
    """detectron2's build_model: the model that MODEL.META_ARCHITECTURE names, on MODEL.DEVICE.

    It is computed as MODEL.COMPILE and MODEL.CHANNELS_LAST say.

    Raises:
        ConfigError: no model is registered under that name.
    """
    get_registered(META_ARCH_REGISTRY, cfg.MODEL.META_ARCHITECTURE, "MODEL.META_ARCHITECTURE")
    model = build_detectron2_model(cfg)
    use_channels_last(cfg, model)
    compile_layers(cfg, model)
    return model


def needs_masks(cfg: CfgNode) -> bool:
    """Whether the model that MODEL.META_ARCHITECTURE names is trained on masks; one that does not say so is.

    Raises:
        ConfigError: no model is registered under that name.
    """
    model = get_registered(META_ARCH_REGISTRY, cfg.MODEL.META_ARCHITECTURE, "MODEL.META_ARCHITECTURE")
    return getattr(model, "needs_masks", lambda _: True)(cfg)


@META_ARCH_REGISTRY.register()
class MaskDINO(DIMaskDINO):
    """The same model under the name that the releases' configurations use."""
