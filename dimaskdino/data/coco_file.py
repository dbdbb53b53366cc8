"""Reading a COCO file, and the form that its lists need for anything else to be said of them."""

import functools
import math
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from dimaskdino.data.json_file import Json, decode_json, read_json
from dimaskdino.errors import DatasetError

MOST_PIXELS = 2**16  # of a side
MOST_WEIGHT = 1e6
BATCH = 2**13  # annotations that are decoded at once

# Keys that every entry needs, and their types.
_NEEDED: dict[str, dict[str, tuple[type, ...]]] = {
    "images": {"id": (int, str), "file_name": (str,), "height": (int,), "width": (int,)},
    "categories": {"id": (int, str), "name": (str,)},
    "annotations": {"id": (int, str), "image_id": (int, str), "category_id": (int, str, float)},
}

_TYPE_NAMES = {int: "a whole number", str: "text", float: "a number", bool: "true or false", list: "a list"}


class _Keys(msgspec.Struct, gc=False):
    """What must be known of an annotation to place and count it."""

    id: int | str
    image_id: int | str
    category_id: int | str | float
    iscrowd: Any = 0


class _Plain(_Keys, gc=False, kw_only=True):
    """An annotation of the usual types, with a mask as text; msgspec refuses all others."""

    category_id: int
    bbox: tuple[float, float, float, float]
    area: float
    segmentation: msgspec.Raw = msgspec.Raw(b"null")
    iscrowd: Literal[0, 1] | bool = 0
    ignore: Literal[0] = 0
    ignored: Literal[0] = 0
    box_supervised: Literal[0, 1] | bool = 1
    box_weight: Annotated[float, msgspec.Meta(ge=0, le=MOST_WEIGHT)] = 1.0


_decode_keys = msgspec.json.Decoder(_Keys).decode
_decode_plain = msgspec.json.Decoder(_Plain).decode


class _Lists(msgspec.Struct):
    """A COCO file whose annotations are text still."""

    images: Any = msgspec.UNSET
    categories: Any = msgspec.UNSET
    annotations: list[msgspec.Raw] | msgspec.UnsetType = msgspec.UNSET


class Annotations(Sequence[Json]):
    """Annotations as the text of their file, decoded when they are looked at: decoded, they need six times the memory.

    ``columns`` are those of all annotations of the file at ``path``: text, id, image_id, category_id, iscrowd (bool),
    bbox (n, 4), area and segmentation (text); of one with a value of an unusual type, the last three are nan, nan and
    null. These annotations are at the positions ``which`` among them.
    """

    __slots__ = ("_columns", "_path", "_which")

    def __init__(self, columns: dict[str, np.ndarray], path: str, which: np.ndarray) -> None:
        self._columns, self._path, self._which = columns, path, which

    @classmethod
    def of_texts(cls, texts: Sequence[msgspec.Raw | bytes], path: str = "") -> "Annotations":
        """All annotations of a file; raises ValueError if one lacks an id of :class:`_Keys` or has another type."""
        columns: dict[str, np.ndarray] = {}
        for start in range(0, len(texts) or 1, BATCH):
            for key, part in _columns(texts[start : start + BATCH]).items():
                whole = columns[key] if start else np.empty((len(texts), *part.shape[1:]), dtype=part.dtype)
                columns[key] = whole.astype(np.promote_types(whole.dtype, part.dtype), copy=False)
                columns[key][start : start + BATCH] = part
        return cls(columns, path, np.arange(len(texts)))

    @classmethod
    def together(cls, images: Sequence[Sequence[Json]]) -> "Annotations":
        """The annotations of some images of a file; raises ValueError or TypeError where they are no JSON."""
        parts = [each for each in images if isinstance(each, Annotations)]
        if parts:
            return parts[0].take(np.concatenate([each._which for each in parts]))
        return cls.of_texts([msgspec.json.encode({**x, "id": 0, "image_id": 0}) for x in chain.from_iterable(images)])

    def __len__(self) -> int:
        return len(self._which)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return list(self)[index]
        return decode_json(self._columns["text"][self._which[index]], self._path)

    def __iter__(self) -> Iterator[Json]:
        return iter(decode_json(self.text(), self._path))

    def take(self, which: np.ndarray) -> "Annotations":
        """Those at some positions in the file."""
        return Annotations(self._columns, self._path, which)

    def text(self) -> bytes:
        """The annotations as JSON, a list."""
        return b"[" + b",".join(self.array("text")) + b"]"

    def array(self, key: str) -> np.ndarray:
        """A column's values of these annotations."""
        return self._columns[key][self._which]


def _columns(texts: Sequence[msgspec.Raw | bytes]) -> dict[str, np.ndarray]:
    try:
        keys = [*map(_decode_plain, texts)]
    except ValueError:
        keys = [*map(_keys_of, texts)]
    return {
        "text": np.fromiter(texts, dtype=object),
        "id": _compact([each.id for each in keys]),
        "image_id": _compact([each.image_id for each in keys]),
        "category_id": _compact([each.category_id for each in keys]),
        "iscrowd": np.array([bool(each.iscrowd) for each in keys], dtype=bool),
        "bbox": np.fromiter(chain.from_iterable([each.bbox for each in keys]), dtype=float).reshape(-1, 4),
        "area": np.fromiter([each.area for each in keys], dtype=float),
        "segmentation": np.fromiter([each.segmentation for each in keys], dtype=object),
    }


def _keys_of(text: msgspec.Raw | bytes) -> _Plain:
    try:
        return _decode_plain(text)
    except ValueError:
        return _Plain(**msgspec.structs.asdict(_decode_keys(text)), bbox=(math.nan,) * 4, area=math.nan)


def _compact(values: list[Any]) -> np.ndarray:
    """Numbers in eight bytes each, where all are whole numbers."""
    try:
        return np.array(array("q", values))
    except (TypeError, OverflowError):
        return np.array(values, dtype=object)


def column(entries: Sequence[Json], key: str) -> np.ndarray:
    """The values of a key of annotations, or of the other entries of a COCO file."""
    return entries.array(key) if isinstance(entries, Annotations) else np.array([x[key] for x in entries], dtype=object)


def has_objects(annotations: Sequence[Json]) -> bool:
    """Whether any of the annotations of an image is not a crowd region."""
    if isinstance(annotations, Annotations):
        return not annotations.array("iscrowd").all()
    return any(not each.get("iscrowd", 0) for each in annotations)


def read_coco(path: str) -> Json:
    """Read a COCO file whose lists have the form that every other check and reader relies on.

    The last files stay in memory until :func:`forget_files`, so that a job parses each once for the check and the
    loader. Annotations are :class:`Annotations` where they have the usual form.

    Raises:
        DatasetError: naming the first entry that cannot be used.
    """
    return _read_coco(str(path), os.stat(path).st_mtime_ns)


def forget_files() -> None:
    """Free what :func:`read_coco` keeps."""
    _read_coco.cache_clear()


@functools.lru_cache(maxsize=8)  # a job's datasets
def _read_coco(path: str, modified_ns: int) -> Json:
    coco = read_json(path, _Lists)
    if isinstance(coco, _Lists):
        coco = _with_annotations(coco, path)
    _name_images_by_url(coco)
    try:
        _check_structure(coco)
    except ValueError as error:
        entries = coco.get("annotations") if isinstance(coco, dict) else None
        panoptic = isinstance(entries, list) and any(isinstance(x, dict) and "segments_info" in x for x in entries)
        hint = " It is a panoptic file: name it in DATASETS.PANOPTIC (datasets/README.md)." * panoptic
        raise DatasetError(
            f"Annotation file {path} is not in COCO's format: {error}. It needs images (id, file_name, height, width), "
            f"categories (id, name) and, unless it is a test set, annotations (id, image_id, category_id).{hint}"
        ) from None
    return coco


def _with_annotations(lists: _Lists, path: str) -> Json:
    coco = {key: value for key, value in msgspec.structs.asdict(lists).items() if value is not msgspec.UNSET}
    if "annotations" in coco:
        try:
            coco["annotations"] = Annotations.of_texts(coco["annotations"], path)
        except ValueError:  # which _check_structure names
            coco["annotations"] = decode_json(b"[" + b",".join(coco["annotations"]) + b"]", path)
    return coco


def _name_images_by_url(coco: Any) -> None:
    """Give images without a file_name the last folder and name of their coco_url, as LVIS means them."""
    images = coco.get("images") if isinstance(coco, dict) else None
    for image in images if isinstance(images, list) else ():
        if isinstance(image, dict) and "file_name" not in image and isinstance(image.get("coco_url"), str):
            image["file_name"] = "/".join(image["coco_url"].split("/")[-2:])


def _check_structure(coco: Any) -> None:
    """Raise ValueError unless the lists hold dictionaries with usable ids, names and sizes."""
    if not isinstance(coco, dict):
        raise ValueError(f"it holds a {type(coco).__name__}, not a dictionary")
    for kind, types in _NEEDED.items():
        if not isinstance(coco.get(kind), Annotations) and (kind != "annotations" or kind in coco):
            check_entries(kind, coco.get(kind), types)
    if not coco["images"]:
        raise ValueError("it lists no image")
    for image in coco["images"]:
        if not 1 <= min(image["height"], image["width"]) <= max(image["height"], image["width"]) <= MOST_PIXELS:
            sizes = f"{image['width']}x{image['height']}"
            raise ValueError(f"image {image['id']} ({image['file_name']}) is {sizes} px, not 1 to {MOST_PIXELS} a side")
    for kind in ("images", "categories"):
        if len({isinstance(entry["id"], str) for entry in coco[kind]}) > 1:
            raise ValueError(f"some ids of {kind} are numbers and some are text; write all in one way")


def check_entries(kind: str, entries: Any, types: dict[str, tuple[type, ...]]) -> None:
    """Raise ValueError unless a list of a file holds dictionaries whose keys have the given types."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        hint = "; remove the key for a test set" if kind == "annotations" else ""
        raise ValueError(f'"{kind}" is {entries!r:.40}, not a list of dictionaries{hint}')
    for key, wanted in types.items():
        if {type(entry.get(key)) for entry in entries} <= set(wanted):
            continue
        position = next(index for index, entry in enumerate(entries) if type(entry.get(key)) not in wanted)
        entry = entries[position]
        names = " or ".join(_TYPE_NAMES[each] for each in wanted if each is not int or float not in wanted)
        which = f"number {position} (counted from 0) of {kind}, with id {entry.get('id')!r:.40},"
        raise ValueError(f"{which} has the {key} {entry.get(key)!r:.40}, not {names}")


def annotations_by_image(coco: Json) -> list[tuple[Json, Sequence[Json]]]:
    """Every image of a COCO file with its annotations, in the order of the image ids."""
    images = {image["id"]: image for image in coco["images"]}
    keys = sorted(images)
    number = {key: index for index, key in enumerate(keys)}
    annotations = coco.get("annotations", [])
    of_image = np.array([number.get(key, len(keys)) for key in column(annotations, "image_id").tolist()], dtype=int)
    order = np.argsort(of_image, kind="stable")
    ends = np.searchsorted(of_image[order], np.arange(len(keys) + 1)).tolist()
    places = [order[first:end] for first, end in zip(ends[:-1], ends[1:], strict=True)]
    if isinstance(annotations, Annotations):
        return [(images[key], annotations.take(which)) for key, which in zip(keys, places, strict=True)]
    return [(images[key], [annotations[each] for each in which]) for key, which in zip(keys, places, strict=True)]


def coco_content(images: Iterable[tuple[Json, Iterable[Json]]], classes: Sequence[str], **about: Any) -> Json:
    """A COCO file's content: ``about`` itself, images, each with its annotations, and categories; ids count from 1."""
    listed: list[Json] = []
    annotations: list[Json] = []
    for image, objects in images:
        listed.append({"id": len(listed) + 1, **image})
        for each in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": len(listed), **each})
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
    return {**about, "images": listed, "annotations": annotations, "categories": categories}


def below(name: str) -> Path:
    """The path, relative to an output folder, of what a dataset names, even if it is absolute or contains ".."."""
    given = Path(name.replace("\\", "/"))
    return Path(*(part for part in given.parts if part not in ("..", given.anchor)))


def category_names(coco: Json) -> dict[Any, str]:
    """Category id -> class name, in the order of the class indices."""
    return {category["id"]: category["name"] for category in sorted(coco["categories"], key=lambda each: each["id"])}
