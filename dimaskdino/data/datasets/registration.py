"""Registers COCO-format datasets with detectron2, and loads what is registered."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.structures import BoxMode

from dimaskdino.data.coco_file import (
    Annotations,
    Json,
    annotations_by_image,
    category_names,
    read_coco,
)
from dimaskdino.data.json_file import decode_json, read_json, without_collecting
from dimaskdino.data.shared import once_a_machine
from dimaskdino.errors import ConfigError, DatasetError
from dimaskdino.structures.rle_masks import checked_rle

SPLITS = ("train", "val")
# Keys of an annotation that reach the mapper; "ignore" does so that it is refused there too.
KEPT_KEYS = (
    *("id", "iscrowd", "ignore", "bbox", "keypoints", "category_id", "segmentation", "box_supervised"),
    *("box_weight", "ignored"),
)
# Keys of an image with lists of categories, as in LVIS.
CATEGORY_LISTS = ("neg_category_ids", "not_exhaustive_category_ids")


def own_paths(cfg: CfgNode, keys: Sequence[str]) -> dict[str, Path]:
    """The paths that keys name, none if all are empty; raises ConfigError if only some are."""
    given = {key: functools.reduce(getattr, key.split("."), cfg) for key in keys}
    if not any(given.values()):
        return {}
    for key, path in given.items():
        if not path:
            raise ConfigError(f"{key} is empty; a dataset of your own needs {', '.join(given)}.")
    return {key: Path(path).expanduser() for key, path in given.items()}


def is_registered_at(name: str, json_file: Path) -> bool:
    """Whether :func:`register_coco_format` registered ``name`` with this annotation file."""
    if name not in DatasetCatalog.list():
        return False
    metadata = MetadataCatalog.get(name)
    return hasattr(metadata, "make") and metadata.json_file == str(json_file)


def register_coco_format(
    name: str,
    json_file: Path,
    image_root: Path,
    thing_classes: list[str] | None,
    make: Callable[[], Any] | None = None,
    evaluator_type: str = "coco",
    **metadata: Any,
) -> None:
    """Register a dataset, in place of one of the same name.

    Args:
        name: name for DATASETS.TRAIN and DATASETS.TEST.
        json_file: annotations in COCO's instances format.
        image_root: folder that the JSON's file names are relative to.
        thing_classes: class names in the order of the JSON's category ids; None takes those of the file.
        make: called before the files are first read; makes them if they are missing.
        evaluator_type: what it is scored by.
        metadata: anything else for detectron2's metadata.
    """
    metadata |= {"json_file": str(json_file), "image_root": str(image_root), "evaluator_type": evaluator_type}
    metadata |= {"make": make} | ({} if thing_classes is None else {"thing_classes": thing_classes})
    register(name, partial(_load_coco, name), metadata)


def register(name: str, load: Callable[[], list[Json]], metadata: Json) -> None:
    """Register what lists a dataset, and its metadata, in place of one of the same name."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        if name in catalog.list():
            catalog.remove(name)
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**metadata)


def is_coco_file(name: str) -> bool:
    """Whether a dataset is what a COCO file lists, as :func:`register_coco_format` or detectron2 registers one."""
    loader = DatasetCatalog[name]
    ours = isinstance(loader, partial) and loader.func is _load_coco
    return ours or getattr(loader, "__module__", "") == "detectron2.data.datasets.coco"


def take_over(name: str) -> None:
    """Make ``DatasetCatalog.get`` read a COCO file that detectron2 has registered in any Unicode encoding."""
    if is_coco_file(name):
        DatasetCatalog[name] = partial(_load_coco, name)


def load_dataset(
    name: str, fields: Sequence[str] = (), image_keys: Sequence[str] = (), *, packed: bool = False
) -> list[Json]:
    """Load a registered dataset in detectron2's format.

    COCO files are read by this package: in any Unicode encoding, with the ids of annotations and the further keys of
    annotations (``fields``) and images, from memory where the check at the start has read them. With ``packed``, their
    annotations may be :class:`PackedAnnotations`. Everything else is loaded by the function that it is registered with.

    Raises:
        DatasetError: if a COCO file cannot be read, or a function needs a package or files that are missing.
    """
    take_over(name)
    if is_coco_file(name):
        return _load_coco(name, fields, image_keys, packed=packed)
    try:
        return DatasetCatalog.get(name)
    except ModuleNotFoundError as error:
        message = f"needs the Python package {error.name}: `pip install {error.name}`"
    except AssertionError as error:  # how detectron2's own functions say that files are missing
        message = f"cannot be loaded ({error!s:.200}); check its files and folders"
    # Raised here, since the first error keeps detectron2's worker processes alive until Python exits.
    raise DatasetError(f"Dataset {name} {message}.")


def made_metadata(name: str) -> Metadata:
    """The metadata of a dataset; its files are made first if it is one that is made on first use."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("make") is not None:
        metadata.make()
    return metadata


@without_collecting()
def _load_coco(
    name: str, fields: Sequence[str] = (), image_keys: Sequence[str] = (), *, packed: bool = False
) -> list[Json]:
    """What detectron2's ``load_coco_json`` returns, and adds to the metadata; annotations are as in the file."""
    metadata = made_metadata(name)
    coco = read_coco(metadata.json_file)
    indices = set_classes(name, category_names(coco))
    kept = tuple(dict.fromkeys((*KEPT_KEYS, *fields)))
    return [
        {
            "file_name": os.path.join(metadata.image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            **_category_lists(image, indices),
            **{key: image[key] for key in image_keys if key in image},
            "annotations": _annotations(annotations, indices, image, kept, packed=packed),
        }
        for image, annotations in annotations_by_image(coco)
    ]


class PackedAnnotations(Annotations):
    """Annotations on their way to memory that processes share; unpickled, they are a list of :func:`_entry` of each."""

    __slots__ = ("_arguments",)

    def __init__(self, annotations: Annotations, *arguments: Any) -> None:
        super().__init__(annotations._columns, annotations._path, annotations._which)
        self._arguments = arguments

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]

    def __iter__(self) -> Iterator[Json]:
        return (_entry(annotation, *self._arguments) for annotation in super().__iter__())

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked, (self.text(), self._path, *self._arguments)


def _unpacked(text: bytes, path: str, *arguments: Any) -> list[Json]:
    return [_entry(annotation, *arguments) for annotation in decode_json(text, path)]


def _annotations(
    annotations: Sequence[Json], indices: dict[Any, int], image: Json, kept: Sequence[str], *, packed: bool
) -> Sequence[Json]:
    if packed and isinstance(annotations, Annotations):
        labels = {*annotations.array("category_id").tolist()}
        if labels <= indices.keys():
            place = {key: image[key] for key in ("file_name", "height", "width")}
            return PackedAnnotations(annotations, {label: indices[label] for label in labels}, place, kept)
    return [_entry(annotation, indices, image, kept) for annotation in annotations]


def set_classes(name: str, names: dict[Any, str]) -> dict[Any, int]:
    """Tell detectron2 the classes, by category id, of a COCO file; returns the class index by category id."""
    metadata = MetadataCatalog.get(name)
    metadata.thing_classes = list(names.values())
    metadata.thing_dataset_id_to_contiguous_id = {key: index for index, key in enumerate(names)}
    return metadata.thing_dataset_id_to_contiguous_id


def known_classes(name: str) -> tuple[list[str], list[Any]]:
    """Names and category ids by class index of a registered dataset; empty if they are not known on this machine."""
    if name not in MetadataCatalog.list():
        return [], []
    metadata = MetadataCatalog.get(name)
    # A semantic dataset has names of stuff alone.
    names, file = metadata.get("thing_classes") or metadata.get("stuff_classes"), metadata.get("json_file")
    if not names and file and os.path.isfile(file):
        # register_coco_instances learns the classes when it loads the file.
        by_id = category_names(read_json(file))
        return list(by_id.values()), list(by_id)
    names = list(names or [])
    # Panoptic datasets number things and stuff together; detectron2's "separated" ones do not.
    maps = [metadata.get(f"{kind}_dataset_id_to_contiguous_id") or {} for kind in ("stuff", "thing")]
    id_of = {index: key for to_index in maps for key, index in to_index.items()}
    known = all(index in id_of for index in range(len(names)))
    return names, [id_of[index] if known else index + 1 for index in range(len(names))]


def class_names(name: str) -> list[str]:
    """The class names of a registered dataset by class index; empty if they are not known on this machine."""
    return known_classes(name)[0]


def share_classes(names: Iterable[str]) -> None:
    """Tell the processes of a machine the classes of COCO files that its first process has read; all call this."""

    def known() -> dict[str, dict[Any, str]]:
        return {name: category_names(read_coco(MetadataCatalog.get(name).json_file)) for name in names}

    for name, classes in once_a_machine(known).items():
        set_classes(name, classes)


def _category_lists(image: Json, indices: dict[Any, int]) -> Json:
    """The classes that an image lists, by index."""
    lists = {key: image[key] for key in CATEGORY_LISTS if key in image}
    for key, listed in lists.items():
        for each in listed if isinstance(listed, list) else [listed]:  # itself where it is no list
            if listed is each or not isinstance(each, int | str) or each not in indices:
                raise DatasetError(
                    f"{key} of {image['file_name']} has {each!r}, which is none of the file's categories."
                )
    return {key: [indices[each] for each in listed] for key, listed in lists.items()}


def _entry(annotation: Json, indices: dict[Any, int], image: Json, kept: Sequence[str]) -> Json:
    entry = {key: annotation[key] for key in kept if key in annotation}
    if annotation["category_id"] not in indices:
        where = f"Annotation {annotation['id']} of {image['file_name']}"
        raise DatasetError(f"{where} has category_id {annotation['category_id']!r}, which the file does not define.")
    entry["category_id"] = indices[annotation["category_id"]]
    entry["bbox_mode"] = BoxMode.XYWH_ABS
    segmentation = entry.get("segmentation")
    if isinstance(segmentation, dict):
        # A malformed one stays as it is: the mapper refuses it and names the annotation.
        with contextlib.suppress(ValueError):
            entry["segmentation"] = checked_rle(segmentation, (image["height"], image["width"]))
    return entry
