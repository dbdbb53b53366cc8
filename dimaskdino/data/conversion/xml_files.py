"""XML label files: PASCAL VOC's, one for each image, and CVAT's for all images."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.parsers import expat

import numpy as np
from pycocotools import mask as mask_util

from dimaskdino.data.conversion.labels import Images, LabeledObject, Labels, Problems, of_classes
from dimaskdino.data.label_maps import read_label_map
from dimaskdino.errors import DatasetError
from dimaskdino.structures.rle_masks import Size

Part = tuple[LabeledObject, Any]  # a shape, and the group that it belongs to
_DEEPEST = 50  # elements within elements
_CIRCLE_POINTS = 64


@dataclass
class Node:
    """An element, with the line that it starts in."""

    tag: str
    attributes: dict[str, str]
    line: int
    text: str = ""
    children: list["Node"] = field(default_factory=list)

    def child(self, tag: str) -> "Node":
        """The first child of a name; raises ValueError without one."""
        for each in self.all(tag):
            return each
        raise ValueError(f"<{self.tag}> has no <{tag}>")

    def value(self, tag: str, default: str | None = None) -> str:
        """The text of the first child of a name."""
        return self.child(tag).text.strip() if default is None or any(self.all(tag)) else default

    def attribute(self, name: str) -> str:
        """An attribute; raises ValueError without it."""
        if name not in self.attributes:
            raise ValueError(f"<{self.tag}> has no {name}")
        return self.attributes[name]

    def all(self, *tags: str) -> Iterator["Node"]:
        """Every child of these names."""
        return (each for each in self.children if each.tag in tags)


def parse_xml(path: Path) -> Node:
    """The root of a file; raises DatasetError if it cannot be read; names the line."""
    root = Node("", {}, 0)
    stack = [root]
    parser = expat.ParserCreate()

    def start(tag: str, attributes: dict[str, str]) -> None:
        if len(stack) > _DEEPEST:
            raise ValueError("elements are nested too deep")
        node = Node(tag, attributes, parser.CurrentLineNumber)
        stack[-1].children.append(node)
        stack.append(node)

    def text(data: str) -> None:
        stack[-1].text += data

    def entity(*declared: object) -> None:  # a few lines of them can expand to gigabytes
        raise ValueError("it declares entities, which no label file needs")

    parser.StartElementHandler, parser.CharacterDataHandler, parser.EntityDeclHandler = start, text, entity
    parser.EndElementHandler = lambda tag: stack.pop()
    try:
        parser.Parse(path.read_bytes(), True)
    except (expat.ExpatError, ValueError, LookupError) as error:  # the last two: of encodings that expat does not know
        reason = expat.errors.messages[error.code] if isinstance(error, expat.ExpatError) else error
        line = parser.CurrentLineNumber
        raise DatasetError(f"{path}, line {line}: not valid XML ({reason}); export it again, in UTF-8.") from error
    return root.children[0]


def read_voc(
    source: Path, images: Images, classes: Sequence[str], problems: Problems, *, one_based: bool = False
) -> Labels:
    """The images of all files in ``source``/Annotations, or in ``source``.

    Masks are those of ``source``/SegmentationObject, where the pixels of the first object of a file are 1, and so on.
    With ``one_based``, the first pixel is 1 and boxes include their last one, as in the challenge's own files.
    """
    folder = source / "Annotations" if (source / "Annotations").is_dir() else source
    files = sorted(folder.glob("*.xml"))
    if not files:
        raise DatasetError(f"{folder} has no .xml file.")
    found = []
    for file in files:
        try:
            root = parse_xml(file)
            if root.tag != "annotation":
                raise ValueError(f"it holds <{root.tag}>, not the <annotation> of PASCAL VOC")
            path = images.find(root.value("filename", file.stem) or file.stem)
            image = images.read(path, problems, str(file))
            map_file = source / "SegmentationObject" / f"{file.stem}.png"
            masks = read_label_map(str(map_file), image.size) if image and map_file.is_file() else None
        except DatasetError as error:  # names file and line already
            problems.found.append(str(error).rstrip("."))
        except ValueError as error:
            problems.add(str(file), str(error))
        else:
            if image:
                found.extend(problems.filled(image, _voc_objects(root, file, one_based, masks, problems)))
    return of_classes(found, classes, problems)


def _voc_objects(
    root: Node, file: Path, one_based: bool, masks: np.ndarray | None, problems: Problems
) -> Iterator[LabeledObject]:
    for number, node in enumerate(root.all("object"), start=1):
        where = f"{file}, line {node.line}"
        with problems.at(where):
            label, box = node.value("name"), node.child("bndbox")
            left, top, right, bottom = (to_number(box.value(name)) for name in ("xmin", "ymin", "xmax", "ymax"))
            if one_based:
                left, top = left - 1, top - 1
            extra = {"difficult": 1} if node.value("difficult", "0") == "1" else {}
            if masks is not None and (masks == number).any():
                yield LabeledObject(label, where, mask=masks == number, extra=extra)
            else:
                yield LabeledObject(label, where, (left, top, right, bottom), extra=extra)


def read_cvat(source: Path, images: Images, classes: Sequence[str], problems: Problems) -> Labels:
    """The images of a file of "CVAT for images 1.1"; a group of shapes, except upright boxes, is one object."""
    file = source / "annotations.xml" if source.is_dir() else source
    root = parse_xml(file)
    listed = [node.value("name") for node in _below(root, "label") if any(node.all("name"))]
    nodes = list(root.all("image"))
    if not nodes:
        raise DatasetError(f"{file} lists no <image>; export the task in the format CVAT for images 1.1.")
    found = []
    for node in nodes:
        where = f"{file}, line {node.line}"
        with problems.at(where):
            image = images.read(images.find(node.attribute("name")), problems, where)
            if image:
                parts = _cvat_parts(node, file, image.size, problems)
                found.extend(problems.filled(image, grouped(parts, image.size), where))
    return of_classes(found, classes or listed, problems)


def _below(node: Node, tag: str) -> Iterator[Node]:
    for each in node.children:
        if each.tag == tag:
            yield each
        yield from _below(each, tag)


def _cvat_parts(image: Node, file: Path, size: Size, problems: Problems) -> Iterator[Part]:
    for node in image.children:
        where, group = f"{file}, line {node.line}", node.attributes.get("group_id", "0")
        if node.tag not in ("box", "polygon", "ellipse", "mask"):
            problems.notes[f"<{node.tag}> of CVAT, which COCO cannot hold"] += node.tag != "tag"
            continue
        with problems.at(where):
            yield _cvat_object(node, where, size), None if node.tag == "box" or group == "0" else group


def _cvat_object(node: Node, where: str, size: Size) -> LabeledObject:
    label = node.attribute("label")
    extra = {"occluded": 1} if node.attributes.get("occluded") == "1" else {}
    turn = to_number(node.attributes.get("rotation", "0"))
    if node.tag == "box":
        left, top, right, bottom = (to_number(node.attribute(name)) for name in ("xtl", "ytl", "xbr", "ybr"))
        if not turn:
            return LabeledObject(label, where, (left, top, right, bottom), extra=extra)
        return LabeledObject(label, where, polygons=[turned(corners(left, top, right, bottom), turn)], extra=extra)
    if node.tag == "polygon":
        pairs = [pair.split(",") for pair in node.attribute("points").split(";")]
        if not all(len(pair) == 2 for pair in pairs):
            raise ValueError("the points are not pairs of numbers")
        return LabeledObject(label, where, polygons=[[to_number(word) for pair in pairs for word in pair]], extra=extra)
    if node.tag == "ellipse":
        x, y, rx, ry = (to_number(node.attribute(name)) for name in ("cx", "cy", "rx", "ry"))
        return LabeledObject(label, where, polygons=[turned(ellipse(x, y, rx, ry), turn)], extra=extra)
    left, top, width, height = (int(to_number(node.attribute(name))) for name in ("left", "top", "width", "height"))
    if min(left, top, width, height) < 0 or top + height > size[0] or left + width > size[1]:
        raise ValueError(f"the mask lies outside the image of {size[1]}x{size[0]} px")
    runs = [int(to_number(word)) for word in node.attribute("rle").split(",")]
    if min(runs) < 0 or sum(runs) != width * height:
        raise ValueError(f"the runs of the mask sum up to {sum(runs)}, not {width} times {height}")
    values = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
    mask = np.zeros(size, dtype=bool)
    mask[top : top + height, left : left + width] = values
    return LabeledObject(label, where, mask=mask, extra=extra)


def corners(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    """(4, 2) of a box."""
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def ellipse(x: float, y: float, rx: float, ry: float) -> np.ndarray:
    """(n, 2) points around (x, y)."""
    angles = np.linspace(0, 2 * math.pi, _CIRCLE_POINTS, endpoint=False)
    return np.stack((x + rx * np.cos(angles), y + ry * np.sin(angles)), axis=1)


def turned(points: np.ndarray, degrees: float) -> list[float]:
    """[x, y, ...] of points (n, 2) turned clockwise, as one sees them, around the middle of their extent."""
    angle, middle = math.radians(degrees), (points.min(0) + points.max(0)) / 2
    turn = np.array([(math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))])
    return ((points - middle) @ turn + middle).ravel().tolist()


def grouped(parts: Iterable[Part], size: Size) -> Iterator[LabeledObject]:
    """Objects of parts with their groups; those of one label and group are joined, and None is no group."""
    objects: dict[Any, LabeledObject] = {}
    for number, (part, group) in enumerate(parts):
        key = number if group is None else (part.label, group)
        objects[key] = _joined(objects[key], part, size) if key in objects else part
    yield from objects.values()


def _joined(first: LabeledObject, second: LabeledObject, size: Size) -> LabeledObject:
    """Two parts of an object: their polygons or boxes, or where one is a mask, what both cover."""
    extra = {**first.extra, **second.extra}
    parts = (first, second)
    outlines = [each.polygons or ([corners(*each.box).ravel().tolist()] if each.box else ()) for each in parts]
    if first.mask is None and second.mask is None:
        return replace(first, box=None, polygons=[*outlines[0], *outlines[1]], extra=extra)
    covered = np.zeros(size, dtype=bool)
    for part, polygons in zip(parts, outlines, strict=True):
        if part.mask is not None:
            covered |= part.mask
        else:
            rle = mask_util.merge(mask_util.frPyObjects([list(each) for each in polygons], *size))
            covered |= mask_util.decode(rle).astype(bool)
    return LabeledObject(first.label, first.where, mask=covered, extra=extra)


def to_number(word: str) -> float:
    """A finite number; raises ValueError that shows what else the word is."""
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{word.strip()!r:.40} is not a number")
    return number
