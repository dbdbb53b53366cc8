"""Panoptic datasets in COCO's form: COCO itself, and one's own by the keys of DATASETS.PANOPTIC."""

import functools
import os
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin import _PREDEFINED_SPLITS_COCO_PANOPTIC
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata

from dimaskdino.data.coco_file import Json, check_entries, read_json
from dimaskdino.data.datasets.registration import made_metadata, own_paths, register
from dimaskdino.errors import DatasetError

_OWN = {
    "train": ("DATASETS.PANOPTIC.TRAIN_JSON", "DATASETS.PANOPTIC.TRAIN_LABELS", "DATASETS.PANOPTIC.TRAIN_IMAGES"),
    "val": ("DATASETS.PANOPTIC.VAL_JSON", "DATASETS.PANOPTIC.VAL_LABELS", "DATASETS.PANOPTIC.VAL_IMAGES"),
}


def register_coco_panoptic(root: Path) -> None:
    """Register coco_2017_{train,val}_panoptic, and the same as ..._with_sem_seg, the releases' name, under ``root``."""
    for name, (panoptic_root, json_file, _) in _PREDEFINED_SPLITS_COCO_PANOPTIC.items():
        split = name.split("_")[2]
        for full_name in (name, f"{name}_with_sem_seg"):
            register_panoptic(
                full_name,
                json_file=root / json_file,
                panoptic_root=root / panoptic_root,
                image_root=root / f"coco/{split}2017",
                instances_json=root / f"coco/annotations/instances_{split}2017.json",
                metadata=_get_builtin_metadata("coco_panoptic_standard"),
            )


def register_own_panoptic(cfg: CfgNode) -> None:
    """Register panoptic_train and panoptic_val where DATASETS.PANOPTIC names all of their files."""
    for split, names in _OWN.items():
        paths = own_paths(cfg, names)
        if not paths:
            continue
        (json_key, json_file), (labels_key, labels), (images_key, images) = paths.items()
        if not json_file.is_file():
            raise DatasetError(f"{json_key} names {json_file}, which is not a file; correct the path.")
        keys = {"label maps": labels_key, "images": images_key}
        metadata = {**categories_metadata(str(json_file)), "keys": keys}
        register_panoptic(
            f"panoptic_{split}", json_file=json_file, panoptic_root=labels, image_root=images, metadata=metadata
        )


def register_panoptic(
    name: str,
    *,
    json_file: Path,
    panoptic_root: Path,
    image_root: Path,
    metadata: Json,
    instances_json: Path | None = None,
) -> None:
    """Register a panoptic dataset in COCO's form, in place of one of the same name.

    ``metadata`` is what :func:`categories_metadata` gives; also ``make``, called before the files are first read. By
    ``instances_json``, instance annotations of the same images, instances are scored if the file exists.
    """
    source = {**metadata, "make": None, "roots": (str(json_file), str(panoptic_root), str(image_root))}
    if MetadataCatalog.get(name).get("source") == source:
        return
    things = f"{name}_things"
    for catalog in (DatasetCatalog, MetadataCatalog):  # what evaluation made of a set of that name
        if things in catalog.list():
            catalog.remove(things)
    metadata = {
        "source": source,
        **{"truth": "panoptic", "evaluator_type": "coco_panoptic_seg", "ignore_label": 255, "label_divisor": 1000},
        **{"panoptic_json": str(json_file), "panoptic_root": str(panoptic_root), "image_root": str(image_root)},
        "json_file": None if instances_json is None else str(instances_json),
        **metadata,
    }
    register(name, partial(load_panoptic, name), metadata)


def categories_metadata(json_file: str) -> Json:
    """Names, in the order of the ids, of things and stuff together, as detectron2's pictures want it, and their ids."""
    categories = sorted(read_panoptic_json(json_file)["categories"], key=lambda category: category["id"])
    names = [category["name"] for category in categories]
    by_kind: dict[bool, dict[Any, int]] = {True: {}, False: {}}
    for index, category in enumerate(categories):
        by_kind[bool(category["isthing"])][category["id"]] = index
    return {
        "thing_classes": names,
        "stuff_classes": names,
        "thing_dataset_id_to_contiguous_id": by_kind[True],
        "stuff_dataset_id_to_contiguous_id": by_kind[False],
    }


def read_panoptic_json(path: str) -> Json:
    """Read a panoptic JSON file, once until :func:`forget_panoptic_files`; DatasetError names an entry of no use."""
    return _read_panoptic_json(path, os.stat(path).st_mtime_ns)


def forget_panoptic_files() -> None:
    """Free what :func:`read_panoptic_json` keeps."""
    _read_panoptic_json.cache_clear()


@functools.lru_cache(maxsize=2)
def _read_panoptic_json(path: str, modified_ns: int) -> Json:
    content = read_json(path)
    try:
        _check_lists(content)
        _check_annotations(content)
    except ValueError as error:
        raise DatasetError(
            f"Annotation file {path} is not in COCO's panoptic format: {error}. It needs images (id, file_name), "
            "categories (id, name, isthing) and annotations (image_id, file_name, segments_info)."
        ) from None
    return content


_NEEDED: dict[str, dict[str, tuple[type, ...]]] = {
    "images": {"id": (int, str), "file_name": (str,)},
    "categories": {"id": (int, str), "name": (str,), "isthing": (int, bool)},
    "annotations": {"image_id": (int, str), "file_name": (str,), "segments_info": (list,)},
}


def _check_lists(content: Any) -> None:
    for kind, types in _NEEDED.items():
        entries = content.get(kind) if isinstance(content, dict) else None
        if not entries:
            raise ValueError(f'"{kind}" is missing or empty')
        check_entries(kind, entries, types)
    for kind, key in (("categories", "id"), ("images", "id"), ("annotations", "image_id")):
        values = [entry[key] for entry in content[kind]]
        if len({(type(value), value) for value in values}) != len(values):
            raise ValueError(f"{kind} have the same {key} more than once")
        if len({isinstance(value, str) for value in values}) > 1:
            raise ValueError(f"some {key} of {kind} are numbers and some are text; write all in one way")


def _check_annotations(content: Json) -> None:
    images = {image["id"] for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    for annotation in content["annotations"]:
        where = f"the annotation of {annotation['file_name']}"
        if annotation["image_id"] not in images:
            raise ValueError(f"{where} is of image {annotation['image_id']!r}, which images does not list")
        seen: set[Any] = {0}
        for segment in annotation["segments_info"]:
            if not isinstance(segment, dict):
                raise ValueError(f"{where} has {segment!r:.40} in segments_info, which is not an entry")
            if not isinstance(segment.get("id"), int) or segment["id"] in seen:
                raise ValueError(
                    f"{where} has a segment with the id {segment.get('id')!r}; ids are whole numbers from 1 on, each "
                    "used once (0 means no segment)"
                )
            seen.add(segment["id"])
            label = segment.get("category_id")
            if not isinstance(label, int | str) or label not in categories:
                raise ValueError(
                    f"segment {segment['id']} of {where} has the category_id {label!r:.40}, which "
                    "categories does not list"
                )


def load_panoptic(name: str) -> list[Json]:
    """List the annotated images of a dataset of :func:`register_panoptic` in detectron2's format, by image id."""
    metadata = made_metadata(name)
    if not os.path.isfile(metadata.panoptic_json):
        raise DatasetError(
            f"Dataset {name}: annotation file {metadata.panoptic_json} does not exist; check DETECTRON2_DATASETS "
            "(layouts: datasets/README.md)."
        )
    content = read_panoptic_json(metadata.panoptic_json)
    things, stuff = metadata.thing_dataset_id_to_contiguous_id, metadata.stuff_dataset_id_to_contiguous_id
    images = {image["id"]: image for image in content["images"]}
    unknown = {category["id"] for category in content["categories"]} - things.keys() - stuff.keys()
    if unknown:
        raise DatasetError(
            f"Dataset {name} is registered without the category {min(unknown, key=str)!r} of {metadata.panoptic_json}; "
            "give a file with other categories a name of its own (DATASETS.PANOPTIC)."
        )

    def entry(annotation: Json) -> Json:
        image = images[annotation["image_id"]]
        size = {key: image[key] for key in ("height", "width") if key in image}
        return {
            "file_name": os.path.join(metadata.image_root, image["file_name"]),
            "image_id": image["id"],
            **size,
            "pan_seg_file_name": os.path.join(metadata.panoptic_root, annotation["file_name"]),
            "segments_info": [segment_entry(segment) for segment in annotation["segments_info"]],
        }

    def segment_entry(segment: Json) -> Json:
        is_thing = segment["category_id"] in things
        return {**segment, "category_id": (things if is_thing else stuff)[segment["category_id"]], "isthing": is_thing}

    return [entry(each) for each in sorted(content["annotations"], key=lambda each: each["image_id"])]
