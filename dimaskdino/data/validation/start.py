"""The check at the start: the datasets of a job, before anything is built, each mistake in one line."""

import itertools
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from dimaskdino.data.coco_file import has_objects
from dimaskdino.data.datasets import register_all
from dimaskdino.data.datasets.registration import load_dataset
from dimaskdino.data.fields import check_fields
from dimaskdino.data.images import Header, size_problem
from dimaskdino.data.json_file import without_collecting
from dimaskdino.data.orders import image_keys, nothing_to_train_on, take_fold
from dimaskdino.data.readers import image_reader
from dimaskdino.data.transforms import check_color_distortion
from dimaskdino.data.validation.dataset import UNLISTED, Dataset, Found, Picture, find_dataset, open_dataset, open_file
from dimaskdino.data.validation.files import check_files_exist, exif_note, spread_first
from dimaskdino.data.validation.report import KEPT, Counts, list_all
from dimaskdino.data.validation.rules import CORNERS, NORMALIZED, Level
from dimaskdino.data.validation.segmentation import check_class_count, check_segmentation, check_truth, truth_of
from dimaskdino.errors import ConfigError, DatasetError

logger = logging.getLogger(__name__)

# Image files whose headers the check reads in any case, evenly spread over a dataset. Of images to test on it reads
# all: one that cannot be used would be met after the whole training.
LEAST_HEADERS = 5000

# What objects look like whose coordinates mean something else.
_CAUSES = {
    NORMALIZED: "have coordinates that look normalized (0 to 1): multiply them by the image's width and height",
    CORNERS: "have boxes that read as x1, y1, x2, y2: write them as x, y, width, height",
}


@without_collecting()
def check_datasets(cfg: CfgNode, *, train: bool = True, test: bool = True, with_masks: bool = True) -> None:
    """Check the datasets that a job will use, and log what they hold; draws the synthetic dataset if it is missing.

    Raises:
        ConfigError: if there is no dataset to train on, or, without training, to evaluate on, or if keys of INPUT
            contradict each other.
        DatasetError: if a dataset is not registered, lacks a file, is malformed, loses its objects, or does not fit the
            configuration or the other datasets.
    """
    register_all(cfg=cfg)
    if train and not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN names no dataset; set it, for example to ('coco_2017_train',).")
    if test and not train and not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST names no dataset to evaluate on; set it, for example to ('coco_2017_val',).")
    for key in ("TRAIN", "TEST"):
        if not all(isinstance(name, str) for name in cfg.DATASETS[key]):
            raise ConfigError(f"DATASETS.{key} is {cfg.DATASETS[key]}; give names of datasets as text.")
    if train:
        check_color_distortion(cfg)
    trained, tested = cfg.DATASETS.TRAIN if train else (), cfg.DATASETS.TEST if test else ()
    classes: dict[str, tuple[str, ...]] = {}
    images: dict[str, tuple[set[str], set[str]]] = {}
    left = cfg.DATASETS.MAX_IMAGES or None
    for name in dict.fromkeys((*trained, *tested)):
        find_dataset(name)
        check_truth(cfg, name, trained=name in trained, tested=name in tested, with_masks=with_masks)
        if truth_of(name) != "instance":
            fitting = next(iter(classes), "")
            entries, names = check_segmentation(cfg, name, trained=name in trained, fitting=fitting)
            files = [
                _paths(each["file_name"] for each in take_fold(cfg, name, entries, train=train) if name in names_of_use)
                for train, names_of_use in ((True, trained), (False, tested))
            ]
            images[name] = files[0], files[1]
            image_reader(cfg).read(entries[0]["file_name"])
            classes[name] = tuple(names)
            continue
        use = {"trained": name in trained, "tested": name in tested, "with_masks": with_masks}
        dataset = _check_dataset(cfg, name, **use, fitting=next(iter(classes), ""))
        to_test = _of_fold(cfg, dataset, train=False)[: cfg.DATASETS.MAX_IMAGES or None] if name in tested else []
        to_train: list[Picture] = []
        if name in trained:
            pictures = _of_fold(cfg, dataset, train=True)
            background = not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
            to_train = [each for each in pictures[:left] if background or has_objects(each.annotations)]
            left = left and max(left - len(pictures), 0)
        _check_files(cfg, dataset, to_train, to_test)
        images[name] = _paths(each.path for each in to_train), _paths(each.path for each in to_test)
        classes[name] = tuple(dataset.classes.values())
    _check_same_classes(classes, trained)
    if trained and not any(images[name][0] for name in trained):
        raise nothing_to_train_on(trained)
    _note_shared_images(images)


def _check_dataset(cfg: CfgNode, name: str, *, trained: bool, tested: bool, with_masks: bool, fitting: str) -> Dataset:
    dataset = open_dataset(name, tested=tested)
    truth = "" if dataset.source else MetadataCatalog.get(name).get("json_file", "")
    _refuse_first(dataset, dataset.listing)
    if trained and not dataset.annotated:
        raise DatasetError(f"Dataset {name} has no annotations, so it can be predicted but not trained on.")
    check_class_count(cfg, name, len(dataset.classes), fitting)
    if trained and cfg.INPUT.ANNOTATION_FIELDS:
        annotations = [each for picture in dataset.pictures for each in picture.annotations]
        check_fields(annotations, cfg.INPUT.ANNOTATION_FIELDS, name)
    if trained or not truth:
        _check_objects(cfg, dataset, with_masks=with_masks, scored=tested and not truth)
    if tested and truth:  # predictions are compared with a file in place of the annotations that the function lists
        _check_objects(cfg, open_file(name, truth, ""), with_masks=with_masks, scored=True)
    return dataset


def _check_objects(cfg: CfgNode, dataset: Dataset, *, with_masks: bool, scored: bool) -> None:
    if with_masks and any(each.annotations for each in dataset.pictures) and not dataset.has_masks():
        raise DatasetError(
            f"Dataset {dataset.name} has boxes but no masks (segmentation), and this model needs masks; add polygons "
            "or RLEs, or choose a model without masks (MODEL.META_ARCHITECTURE DINO, or MODEL.MaskDINO.PREDICT_MASKS "
            "False)."
        )
    rules = dataset.rules(with_masks=with_masks, scored=scored)
    counts = Counts(dataset.classes)
    notes: Counter[str] = Counter()
    first: dict[str, str] = {}
    for where, problem in dataset.problems(rules, counts):
        if problem.level is Level.REFUSED:
            _refuse_first(dataset, [(where, problem)])
        notes[problem.kind] += 1
        first.setdefault(problem.kind, where)
    logger.info("Objects of %s:\n%s", dataset.name, counts.table())
    if notes:
        listed = ", ".join(f"{kind} ({number}, first {first[kind]})" for kind, number in notes.most_common())
        logger.warning("Dataset %s: %s. %s", dataset.name, listed, list_all(dataset.name))
    _check_losses(dataset, counts, notes, cfg.DATASETS.MAX_DROPPED_SHARE)


def _refuse_first(dataset: Dataset, found: Sequence[Found]) -> None:
    for where, problem in found:
        if problem.level is Level.REFUSED:
            source = f" ({dataset.source})" if dataset.source else ""
            raise DatasetError(f"Dataset {dataset.name}{source}, {where}: {problem}. {list_all(dataset.name)}")


def _check_losses(dataset: Dataset, counts: Counts, notes: Counter[str], most: float) -> None:
    """Refuse a dataset that loses too many objects, with the likely cause."""
    dropped, objects = counts.lost()
    if not objects and notes[UNLISTED]:
        raise DatasetError(
            f"Dataset {dataset.name}: no annotation belongs to a listed image; correct image_id, or the list of images."
        )
    classes = counts.lost_classes()
    causes = [f"{notes[kind]} {cause}" for kind, cause in _CAUSES.items() if notes[kind] > most * objects]
    if most >= 1 or not (classes or causes or dropped > most * objects):
        return
    total = counts.total()
    reasons = [f"{total[kind]} {kind}" for kind in sorted(total.keys() - {KEPT, "crowd", "ignored"})]
    lost = [f"{dropped} of {objects} objects would be dropped ({', '.join(reasons)})"] if dropped else []
    lost += [f"no object is left of class {', '.join(map(repr, classes[:3]))}"] if classes else []
    raise DatasetError(
        f"Dataset {dataset.name}: {'; '.join(lost + causes)}. Correct the annotations, or raise "
        f"DATASETS.MAX_DROPPED_SHARE (now {most:g}; 1 accepts any loss). {list_all(dataset.name)}"
    )


def _of_fold(cfg: CfgNode, dataset: Dataset, *, train: bool) -> list[Picture]:
    """The images that DATASETS.FOLDS leaves for training or for a test."""
    if not cfg.DATASETS.FOLDS.NUM:
        return dataset.pictures
    entries = take_fold(cfg, dataset.name, load_dataset(dataset.name, (), image_keys(cfg)), train=train)
    paths = {entry["file_name"] for entry in entries}
    return [picture for picture in dataset.pictures if picture.path in paths]


def _check_files(cfg: CfgNode, dataset: Dataset, to_train: Sequence[Picture], to_test: Sequence[Picture]) -> None:
    """Look whether the images exist, read the headers of many, and decode one."""
    reader = image_reader(cfg)
    tested = {picture.path: picture for picture in to_test}
    used = [*(tested | {picture.path: tested.get(picture.path, picture) for picture in to_train}).values()]
    check_files_exist(dataset.name, [reader.file(each.path) for each in used])
    local = [each for each in used if "://" not in each.path]
    turned: list[tuple[Picture, Header]] = []
    number = 0
    of_test = [each for each in local if each.path in tested]
    for picture in itertools.chain(of_test, spread_first(local[len(of_test) :], LEAST_HEADERS)):
        header = reader.header(picture.path)
        problem = size_problem(header, picture.size, apply_exif=cfg.INPUT.APPLY_EXIF) if picture.size else ""
        if problem:
            raise DatasetError(f"Image {picture.path} of dataset {dataset.name} is {problem}. {list_all(dataset.name)}")
        turned += [(picture, header)] * (header.orientation != 1)
        number += 1
    rest = "" if number == len(local) else f"; {list_all(dataset.name)}"
    logger.info("Dataset %s: read the headers of %d of %d images%s", dataset.name, number, len(local), rest)
    if turned:
        rules = dataset.rules(with_masks=False, scored=False)
        logger.warning("Dataset %s: %s", dataset.name, exif_note(turned, rules))
    if used:
        reader.read(used[0].path)


def _paths(paths: Iterable[str]) -> set[str]:
    return {os.path.normpath(path) for path in paths}


def _note_shared_images(images: dict[str, tuple[set[str], set[str]]]) -> None:
    """Warn of images that two datasets share, by name the paths that are trained and tested on."""
    for first, second in itertools.permutations(images, 2):
        (trained, _), (trained_too, tested) = images[first], images[second]
        if shared := trained & tested:
            logger.warning(
                "%d images of %s, such as %s, are in %s as well: the scores on them say little about new images.",
                *(len(shared), second, min(shared), first),
            )
        if first < second and (shared := trained & trained_too):
            logger.warning(
                "%d images, such as %s, are in %s and in %s: what only one of them labels is background in the other.",
                *(len(shared), min(shared), first, second),
            )


def _check_same_classes(classes: dict[str, tuple[str, ...]], trained: Collection[str]) -> None:
    """Class numbers must mean the same everywhere: against others even perfect predictions score AP 0.

    ``classes`` are those of each dataset by number, as many in each; the others are compared with the first.
    """
    first = next(iter(classes), "")
    for name, names in classes.items():
        expected = classes[first]
        if names == expected:
            continue
        index = next(index for index in range(len(names)) if names[index] != expected[index])
        where = f"class {index} is {expected[index]!r} in {first} and {names[index]!r} in {name}"
        if set(names) == set(expected):
            raise DatasetError(
                f"Datasets {first} and {name} have the same classes in another order: {where}; give their categories "
                "the same order."
            )
        if name in trained:
            raise DatasetError(f"Datasets {first} and {name} cannot be trained on together: {where}.")
        logger.warning("Datasets %s and %s have different class names, compared by number: %s.", first, name, where)
