"""XML label files: PASCAL VOC's, one for each image, and CVAT's for all images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

import numpy as np
from PIL import Image
from pycocotools import mask as mask_util

from dimaskdino.data.conversion.labels import Images, LabeledImage, LabeledObject, Problems
from dimaskdino.errors import DatasetError


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
        for each in self.children:
            if each.tag == tag:
                return each
        raise ValueError(f"<{self.tag}> has no <{tag}>")

    def value(self, tag: str, default: str | None = None) -> str:
        """The text of the first child of a name."""
        if default is not None and all(each.tag != tag for each in self.children):
            return default
        return self.child(tag).text.strip()

    def attribute(self, name: str) -> str:
        """An attribute; raises ValueError without it."""
        if name not in self.attributes:
            raise ValueError(f"<{self.tag}> has no {name}")
        return self.attributes[name]

    def all(self, *tags: str) -> Iterator["Node"]:
        """Every child of these names."""
        return (each for each in self.children if each.tag in tags)


def parse_xml(path: Path) -> Node:
    """The root of a file.

    Raises:
        DatasetError: it cannot be read; names the line.
    """
    root = Node("", {}, 0)
    stack = [root]
    parser = expat.ParserCreate()

    def start(tag: str, attributes: dict[str, str]) -> None:
        node = Node(tag, attributes, parser.CurrentLineNumber)
        stack[-1].children.append(node)
        stack.append(node)

    def text(data: str) -> None:
        stack[-1].text += data

    parser.StartElementHandler, parser.CharacterDataHandler = start, text
    parser.EndElementHandler = lambda tag: stack.pop()
    try:
        parser.Parse(path.read_bytes(), True)
    except expat.ExpatError as error:
        reason = expat.errors.messages[error.code]
        raise DatasetError(f"{path}, line {error.lineno}: not valid XML ({reason}); export it again.") from error
    return root.children[0]


def read_voc(
    source: Path, images: Images, classes: Sequence[str], problems: Problems, *, one_based: bool = False
) -> tuple[list[LabeledImage], list[str]]:
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
            path = images.find(root.value("filename", file.stem) or file.stem)
        except DatasetError as error:  # names file and line already
            problems.found.append(str(error).rstrip("."))
            continue
        except ValueError as error:
            problems.add(str(file), str(error))
            continue
        image, since = images.read(path, problems), len(problems.found)
        if image is None:
            continue
        map_file = source / "SegmentationObject" / f"{file.stem}.png"
        masks = np.asarray(Image.open(map_file)) if map_file.is_file() else None
        for number, node in enumerate(root.all("object"), start=1):
            where = f"{file}, line {node.line}"
            try:
                image.objects.append(_voc_object(node, where, one_based, None if masks is None else masks == number))
            except ValueError as error:
                problems.add(where, str(error))
        if not problems.leave_out(image.objects, since):
            found.append(image)
    return found, known_classes(found, classes, problems)


def _voc_object(node: Node, where: str, one_based: bool, mask: np.ndarray | None) -> LabeledObject:
    label, box = node.value("name"), node.child("bndbox")
    left, top, right, bottom = (to_number(box.value(name)) for name in ("xmin", "ymin", "xmax", "ymax"))
    if one_based:
        left, top = left - 1, top - 1
    extra = {"difficult": 1} if node.value("difficult", "0") == "1" else {}
    if mask is not None and mask.any():
        return LabeledObject(label, where, mask=mask, extra=extra)
    return LabeledObject(label, where, (left, top, right, bottom), extra=extra)


def read_cvat(
    source: Path, images: Images, classes: Sequence[str], problems: Problems
) -> tuple[list[LabeledImage], list[str]]:
    """The images of a file of "CVAT for images 1.1": boxes, polygons, masks; a group is one object of many parts."""
    file = source / "annotations.xml" if source.is_dir() else source
    root = parse_xml(file)
    listed = [node.value("name") for node in _below(root, "label") if any(node.all("name"))]
    found = []
    for node in root.all("image"):
        where = f"{file}, line {node.line}"
        try:
            image = images.read(images.find(node.attribute("name")), problems)
        except ValueError as error:
            problems.add(where, str(error))
            continue
        if image is None:
            continue
        since = len(problems.found)
        image.objects.extend(_cvat_objects(node, file, image.size, problems))
        if not problems.leave_out(image.objects, since):
            found.append(image)
    return found, known_classes(found, classes or listed, problems)


def _below(node: Node, tag: str) -> Iterator[Node]:
    for each in node.children:
        if each.tag == tag:
            yield each
        yield from _below(each, tag)


def _cvat_objects(image: Node, file: Path, size: tuple[int, int], problems: Problems) -> list[LabeledObject]:
    objects: list[LabeledObject] = []
    groups: dict[tuple[str, str], int] = {}
    for node in image.children:
        where = f"{file}, line {node.line}"
        if node.tag not in ("box", "polygon", "mask"):
            problems.notes[f"<{node.tag}> of CVAT, which COCO cannot hold"] += node.tag != "tag"
            continue
        try:
            made = _cvat_object(node, where, size)
        except ValueError as error:
            problems.add(where, str(error))
            continue
        group = (made.label, node.attributes.get("group_id", "0"))
        if node.tag != "box" and group[1] != "0":
            if group in groups:
                objects[groups[group]] = joined(objects[groups[group]], made, size)
                continue
            groups[group] = len(objects)
        objects.append(made)
    return objects


def _cvat_object(node: Node, where: str, size: tuple[int, int]) -> LabeledObject:
    label = node.attribute("label")
    extra = {"occluded": 1} if node.attributes.get("occluded") == "1" else {}
    if node.tag == "box":
        left, top, right, bottom = (to_number(node.attribute(name)) for name in ("xtl", "ytl", "xbr", "ybr"))
        return LabeledObject(label, where, (left, top, right, bottom), extra=extra)
    if node.tag == "polygon":
        points = [to_number(word) for pair in node.attribute("points").split(";") for word in pair.split(",")]
        return LabeledObject(label, where, polygons=[points], extra=extra)
    left, top, width, height = (int(to_number(node.attribute(name))) for name in ("left", "top", "width", "height"))
    runs = [int(to_number(word)) for word in node.attribute("rle").split(",")]
    if min(runs) < 0 or sum(runs) != width * height:
        raise ValueError(f"the runs of the mask sum up to {sum(runs)}, not {width} times {height}")
    values = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
    if left < 0 or top < 0 or top + height > size[0] or left + width > size[1]:
        raise ValueError(f"the mask lies outside the image of {size[1]}x{size[0]} px")
    mask = np.zeros(size, dtype=bool)
    mask[top : top + height, left : left + width] = values
    return LabeledObject(label, where, mask=mask, extra=extra)


def joined(first: LabeledObject, second: LabeledObject, size: tuple[int, int]) -> LabeledObject:
    """Two parts of an object: their polygons, or where one is a mask, what both cover."""
    extra = {**first.extra, **second.extra}
    if first.mask is None and second.mask is None:
        return LabeledObject(first.label, first.where, None, [*first.polygons, *second.polygons], extra=extra)
    covered = np.zeros(size, dtype=bool)
    for part in (first, second):
        if part.mask is not None:
            covered |= part.mask
        elif part.polygons:
            rle = mask_util.merge(mask_util.frPyObjects([list(each) for each in part.polygons], *size))
            covered |= mask_util.decode(rle).astype(bool)
    return LabeledObject(first.label, first.where, mask=covered, extra=extra)


def known_classes(images: list[LabeledImage], classes: Sequence[str], problems: Problems) -> list[str]:
    """``classes``, or those that occur; objects of others are problems and are taken out, and images of them alone."""
    occurring = sorted({each.label for image in images for each in image.objects})
    if not classes:
        return occurring
    for image in list(images):
        since = len(problems.found)
        for each in [each for each in image.objects if each.label not in classes]:
            problems.add(each.where, f"class {each.label!r} is unknown; there are {', '.join(classes)}")
            image.objects.remove(each)
        if problems.leave_out(image.objects, since):
            images.remove(image)
    return list(classes)


def to_number(word: str) -> float:
    """A number; raises ValueError that shows what else the word is."""
    try:
        return float(word)
    except ValueError:
        raise ValueError(f"{word.strip()!r:.40} is not a number") from None
