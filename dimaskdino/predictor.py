"""The predictor: a trained model, an image in, what was found out."""

import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances

from dimaskdino.checkpoint import Checkpointer, class_names_of, local_path, read_weights
from dimaskdino.checkpoint.reading import replacing
from dimaskdino.config import Config, config_of_dump, read_config
from dimaskdino.config.reader import config_of_run
from dimaskdino.data.datasets import register_all
from dimaskdino.data.datasets.registration import known_classes
from dimaskdino.data.readers import image_reader
from dimaskdino.data.transforms import test_resize
from dimaskdino.devices import usable_device
from dimaskdino.errors import CheckpointError, ConfigError, UserError, check_choice, check_range
from dimaskdino.modeling.meta_arch import build_model
from dimaskdino.modeling.postprocessing import thing_classes
from dimaskdino.modeling.transformer_decoder.checks import NO_THINGS
from dimaskdino.prediction.augmented import AugmentedModel, check_augmentation, whole_images
from dimaskdino.prediction.canvases import Canvas, open_canvas
from dimaskdino.prediction.images import CHANNEL_ORDERS, of_own_kind, to_model_input, to_rgb
from dimaskdino.prediction.refinement import Refinement
from dimaskdino.prediction.results import Classes, Prediction
from dimaskdino.prediction.tiles import Tiling, predict_tiles
from dimaskdino.structures import on_cpu
from dimaskdino.visualization import to_picture

logger = logging.getLogger(__name__)

# What suits large pictures, unless the caller's options say otherwise.
TILE_OPTIONS = ("MODEL.MaskDINO.TEST.MASK_FORMAT", "rle")
# Entries of a self-contained weight file.
CONFIG_ENTRY, CLASSES_ENTRY = "dimaskdino_config", "dimaskdino_classes"


class Predictor:
    """Finds objects in images with a trained model.

    >>> predict = Predictor("output/demo/run")            # or a configuration and weights, or a self-contained file
    >>> found = predict("image.jpg")                      # or a PIL image, an array, a tensor, or a list of any
    >>> found.instances.pred_boxes, found.class_names
    >>> found.draw().save("found.png")

    A predictor may be called from several threads at once.

    Args:
        run: the folder of a run, a configuration file (then give ``weights``), or a file that :meth:`save` wrote, also
            on the Hugging Face Hub: ``hf://owner/name[@revision][/file]``.
        weights: the weight file, also on the hub; None for MODEL.WEIGHTS of ``options``, or else the run's last one.
        options: KEY VALUE pairs that change the configuration.
        device: where the model runs, such as "cuda:1"; None for the first GPU if there is one, else the CPU.
        channels: channel order of arrays and tensors, RGB or BGR; a call may say otherwise.
        exif: turn images upright as their EXIF data says; None does as in training (INPUT.APPLY_EXIF).
        batch_size: images of a list, or tiles of an image, that go through the model together.
        tile: side in px of the tiles in which images are predicted; None predicts them whole. The model resizes a tile
            as it does an image (INPUT.MIN_SIZE_TEST).
        overlap: share of a tile that the next one repeats.
        layers: stages whose results :meth:`Prediction.at` gives beside the final ones, as in TEST.EVAL_LAYERS: names
            such as "layer.0", or "all"; not in tiles.
        refinement: as :class:`Refinement` takes it: score, classes, mask_nms, and others.

    Raises:
        UserError: there is no run, configuration or weight file, they do not fit, or a class does not exist.
    """

    def __init__(
        self,
        run: str | Path,
        weights: str | Path | None = None,
        *,
        options: Sequence[Any] = (),
        device: str | None = None,
        channels: str = "RGB",
        exif: bool | None = None,
        batch_size: int = 1,
        tile: int | None = None,
        overlap: float = 0.2,
        layers: str | Sequence[str] = (),
        **refinement: Any,
    ) -> None:
        check_choice("channels", channels, CHANNEL_ORDERS)
        check_range("batch_size", batch_size, 1)
        self.input_format, self.batch_size = channels, batch_size
        self.refine = Refinement(**refinement)
        self.tiling = None if tile is None else Tiling(tile, overlap)
        named = dict(zip(options[::2], options[1::2], strict=False)).get("MODEL.WEIGHTS")
        if weights and named and str(weights) != str(named):
            raise ConfigError(f"{weights} and {named} (MODEL.WEIGHTS) are two files of weights; name one, and its run.")
        weights = weights or named
        self.cfg, self.weights, classes = _read_run(local_path(run), local_path(weights) if weights else None)
        if self.tiling:
            self.cfg.merge_from_list(list(TILE_OPTIONS))
        self.cfg.merge_from_list(list(options))
        self._given = self.cfg.clone()
        _prepare(self.cfg, device, self.refine)
        _check_together(self.cfg, tiled=self.tiling is not None, staged=bool(layers))
        named = [layers] if isinstance(layers, str) else list(layers)
        self.cfg.TEST.EVAL_LAYERS = named if self.tiling is None else []
        self.exif = self.cfg.INPUT.APPLY_EXIF if exif is None else exif
        reader = image_reader(self.cfg)
        self.reader = reader if self.cfg.INPUT.READER else None
        register_all(cfg=self.cfg)  # A panoptic model asks its datasets which classes are things.
        self.model = build_model(self.cfg).eval()
        about = Checkpointer(self.model).load(str(self.weights))
        if set_precision := getattr(self.model, "set_precision", None):  # a model of the user's own may have none
            set_precision(self.cfg.MODEL.MaskDINO.TEST.PRECISION)
        self.classes = classes or classes_of(self.cfg, class_names_of(about))
        self.refine.check(self.classes.things)
        augments = self.cfg.TEST.AUG.ENABLED
        self._model = AugmentedModel(self.cfg, model=self.model).eval() if augments else self.model
        self._resize = test_resize(whole_images(self.cfg) if augments else self.cfg)[0]

    def __call__(self, images: Any, *, channels: str | None = None) -> Any:
        """Predict one image, or a list of images of any sizes.

        Args:
            images: a path, PIL image, array (H, W[, C]) or tensor ([C,] H, W), or a list or tuple of these.
            channels: channel order of arrays and tensors; None for the predictor's.

        Returns:
            A :class:`Prediction`, or a list of them.

        Raises:
            UserError: something is not an image; the message names it.
        """
        if isinstance(images, list | tuple):
            return list(self.stream(images, channels=channels))
        return next(self.stream([images], channels=channels))

    def stream(self, images: Iterable[Any], *, channels: str | None = None) -> Iterator[Prediction]:
        """Predict any number of images one batch at a time, in their order."""
        images = iter(images)
        while batch := list(itertools.islice(images, self.batch_size)):
            pictures = [self.read(image, channels=channels) for image in batch]
            sources = [str(image) if isinstance(image, str | Path) else "" for image in batch]
            yield from self.predict_batch(pictures, sources)

    def read(self, image: Any, *, channels: str | None = None) -> np.ndarray | Canvas:
        """Read or convert an image: to (H, W, 3) uint8 RGB, or for tiles to what they are read from.

        With INPUT.READER, its path is read as in training, and an array or tensor has the channels of MODEL.PIXEL_MEAN.
        """
        if self.reader is not None:
            return of_own_kind(image, self.reader, len(self.cfg.MODEL.PIXEL_MEAN))
        read = to_rgb if self.tiling is None else open_canvas
        return read(image, channels=channels or self.input_format, exif=self.exif)

    def predict_batch(self, pictures: Sequence[Any], sources: Sequence[str]) -> list[Prediction]:
        """Predict what :meth:`read` gave; ``sources`` says where each picture is from."""
        if self.tiling is None:
            results = self._results(pictures)
            copies: list[tuple[np.ndarray, Canvas | None]] = [(to_picture(picture), None) for picture in pictures]
        else:
            canvases = [open_canvas(picture) if isinstance(picture, np.ndarray) else picture for picture in pictures]
            objects = [predict_tiles(canvas, self.tiling, self._objects, self.batch_size) for canvas in canvases]
            results = [{"instances": each} for each in objects]
            copies = [(canvas.copy(), canvas) for canvas in canvases]
        for result in results:
            for each in (result, *result.get("layers", {}).values()):
                if "instances" in each:
                    each["instances"] = self.refine(each["instances"], self.classes.things)
                if "panoptic_seg" in each:
                    each["panoptic_seg"] = self.refine.of_segments(each["panoptic_seg"], self.classes.segments)
        return [
            Prediction(result, image=image, canvas=canvas, classes=self.classes, source=source)
            for result, (image, canvas), source in zip(results, copies, sources, strict=True)
        ]

    def _results(self, arrays: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """The model's results of a batch of (H, W, 3) uint8 RGB arrays."""
        image_format = "" if self.reader else self.cfg.INPUT.FORMAT
        inputs = [to_model_input(array, self._resize, image_format) for array in arrays]
        with torch.inference_mode():
            return [on_cpu(result) for result in self._model(inputs)]

    def _objects(self, tiles: Sequence[np.ndarray]) -> list[Instances]:
        return [result["instances"] for result in self._results(tiles)]

    def save(self, path: str | Path) -> None:
        """Write one file (safetensors if it ends so) that :class:`Predictor` loads: weights, configuration, classes.

        Raises:
            CheckpointError: the file cannot be written; what was there before stays.
        """
        path = Path(path)
        cfg, node = self._given.clone(), self.cfg.MODEL.MaskDINO
        _prepare(cfg, self.cfg.MODEL.DEVICE, Refinement(score=0))  # Who loads the file says what is kept.
        if node.TEST.PANOPTIC_ON or node.PANO_BOX_LOSS:  # The data that says it need not be where the file goes.
            things = thing_classes(self.cfg, "MODEL.MaskDINO.TEST.PANOPTIC_ON")
            cfg.MODEL.MaskDINO.THING_CLASSES = things or NO_THINGS
        extra = {CONFIG_ENTRY: cfg.dump(), CLASSES_ENTRY: json.dumps(vars(self.classes))}
        state = {key: value.cpu().clone().contiguous() for key, value in self.model.state_dict().items()}
        with replacing(path) as partial:
            if path.suffix == ".safetensors":
                from safetensors.torch import save_file

                save_file(state, partial, extra)
            else:
                torch.save({"model": state, **extra}, partial)


def _read_run(run: Path, weights: Path | None) -> tuple[Config, Path, Classes | None]:
    """The configuration and weight file of a run, and its classes where the file knows them."""
    if run.is_dir():
        return config_of_run(run), weights or _last_weights(run), None
    if not run.is_file():
        raise UserError(f"{run} does not exist; give a run's folder, a configuration with weights, or a saved model.")
    if run.suffix in (".yaml", ".yml"):
        cfg = read_config(run)
        weights = weights or (local_path(cfg.MODEL.WEIGHTS) if cfg.MODEL.WEIGHTS else None)
        if weights is None:
            raise UserError(f"{run} names no weights (MODEL.WEIGHTS); give the weight file as well.")
        return cfg, weights, None
    cfg, saved, classes = _read_saved(run)
    return cfg, weights or saved, classes


def _last_weights(run: Path) -> Path:
    tag = run / "last_checkpoint"
    names = ["model_final.pth", "model_final.safetensors", *([tag.read_text().strip()] if tag.is_file() else [])]
    for name in names:
        if name and (run / name).is_file():
            return run / name
    raise CheckpointError(f"{run} has no weights (model_final.pth); train it to the end, or give the weight file.")


def _read_saved(path: Path) -> tuple[Config, Path, Classes | None]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                content = file.metadata() or {}
        except SafetensorError as error:
            raise CheckpointError(f"{path} cannot be read as weights ({error}).") from error
    else:
        content = read_weights(path)
    if not (isinstance(content.get(CONFIG_ENTRY), str) and isinstance(content.get(CLASSES_ENTRY), str)):
        raise UserError(
            f"{path} holds weights without their configuration; give that too (Predictor(configuration, weights), "
            "--config-file of tools/predict.py), or a file that Predictor.save wrote."
        )
    return config_of_dump(content[CONFIG_ENTRY]), path, Classes(**json.loads(content[CLASSES_ENTRY]))


def _prepare(cfg: Config, device: str | None, refinement: Refinement) -> None:
    """Set the keys that prediction decides."""
    node = cfg.MODEL.MaskDINO.TEST
    check_range("TEST.DETECTIONS_PER_IMAGE", cfg.TEST.DETECTIONS_PER_IMAGE, 1)
    cfg.MODEL.DEVICE = usable_device(device)
    cfg.MODEL.WEIGHTS = ""
    own = cfg.DATASETS.PANOPTIC
    for split in ("TRAIN", "VAL"):
        if not Path(own[f"{split}_JSON"]).expanduser().is_file():  # Prediction does without the data.
            own.update(dict.fromkeys((f"{split}_JSON", f"{split}_LABELS", f"{split}_IMAGES"), ""))
    if not cfg.SOLVER.CHECKPOINT_WITHOUT_FROZEN:
        cfg.MODEL.TIMM.PRETRAINED = cfg.MODEL.VIT.PRETRAINED = False
    if not cfg.TEST.AUG.ENABLED:  # What one view finds with a low score, another one may find with a high one.
        node.MIN_SCORE = max(node.MIN_SCORE, refinement.least_score)
    cfg.TEST.DETECTIONS_PER_IMAGE = max(cfg.TEST.DETECTIONS_PER_IMAGE, refinement.max_detections or 0)


def _check_together(cfg: Config, *, tiled: bool, staged: bool) -> None:
    """Check keys that do not go together, or not with tiles or the results of stages; raises ConfigError."""
    check_augmentation(cfg)
    test = cfg.MODEL.MaskDINO.TEST
    if staged and cfg.TEST.AUG.ENABLED:
        raise ConfigError("TEST.AUG.ENABLED joins the final results alone; set it to False, or leave layers out.")
    if tiled and not test.INSTANCE_ON:
        raise ConfigError("Pictures are predicted in tiles by models of objects (MODEL.MaskDINO.TEST.INSTANCE_ON).")
    if tiled and cfg.INPUT.READER:
        raise ConfigError("Images that INPUT.READER reads are predicted whole; leave tile out.")
    if tiled and (maps := [key for key in ("PANOPTIC_ON", "SEMANTIC_ON") if test[key]]):
        logger.warning("Tiles give objects alone; what MODEL.MaskDINO.TEST.%s asks for is left out.", maps[0])


def classes_of(cfg: Config, trained: Sequence[str] | None = None) -> Classes:
    """The classes of a configuration's datasets; where none is on this machine, the weights', or "class 0", ...."""
    register_all(cfg=cfg)
    count = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    datasets = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    for name in datasets:
        names, ids = known_classes(name)
        if names and len(names) <= count:
            more = range(len(names), count)  # a model may have more classes than its dataset
            names += [f"class {index}" for index in more]
            ids += [max(ids) + 1 + index for index in more]
            return Classes(names, ids, list(MetadataCatalog.get(name).get("stuff_classes", [])))
    if trained and len(trained) == count:
        return Classes(list(trained), list(range(1, count + 1)))
    logger.warning(
        "No registered dataset (%s) names the model's %d classes; they are called by number.",
        ", ".join(datasets) or "none",
        count,
    )
    return Classes([f"class {index}" for index in range(count)], list(range(count)))
