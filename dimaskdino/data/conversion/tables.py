"""A table with a row for each box or polygon, as CSV."""

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from dimaskdino.data.conversion.labels import Images, LabeledObject, Labels, Problems, of_classes, read_text
from dimaskdino.data.conversion.xml_files import to_number
from dimaskdino.errors import DatasetError

# What columns are called, in lower case.
_COLUMNS = {
    "image": ("image", "filename", "file_name", "file", "image_path", "path", "imageid", "image_id"),
    "class": ("class", "label", "name", "category", "labelname", "class_name"),
    "left": ("xmin", "x1", "left", "x_min"),
    "top": ("ymin", "y1", "top", "y_min"),
    "right": ("xmax", "x2", "right", "x_max"),
    "bottom": ("ymax", "y2", "bottom", "y_max"),
    "x": ("x",),
    "y": ("y",),
    "width": ("w", "width", "box_width"),
    "height": ("h", "height", "box_height"),
    "polygon": ("polygon", "segmentation", "points"),
}


def read_csv(
    source: Path, images: Images, classes: Sequence[str], problems: Problems, *, normalized: bool = False
) -> Labels:
    """The images that a table names; an image without a row, or with a row of its name alone, is background.

    The first row names the columns: the image, the class, and xmin, ymin, xmax, ymax; or x, y, width, height; or
    polygon ("x y x y ..."). Other common names work as well. Without such a row, the columns are image, xmin, ymin,
    xmax, ymax, class.

    With ``normalized``, coordinates are parts of the image.
    """
    files = [source] if source.is_file() else sorted(source.glob("*.csv"))
    if len(files) != 1:
        raise DatasetError(f"{source} has {len(files)} .csv files; name the file itself with --source.")
    found = {path: images.read(path, problems) for path in images.paths}
    spoiled: set[str] = set()  # images with a row that cannot be used
    csv.field_size_limit(sys.maxsize)  # polygons may be long
    reader = csv.reader(io.StringIO(_text(files[0]), newline=""), skipinitialspace=True)
    columns: dict[str, int] = {}
    rows = 0
    for row in reader:
        where = f"{files[0]}, line {reader.line_num}"
        if not any(row):
            continue
        if not columns:
            columns = _columns(row)
            if columns:
                continue
            columns = dict(zip(("image", "left", "top", "right", "bottom", "class"), range(6), strict=True))
        image = None
        try:
            values = {name: row[place].strip() for name, place in columns.items() if place < len(row)}
            image = found[images.find(values.get("image", ""))]
            rows += 1
            if image and any(value for name, value in values.items() if name != "image"):
                image.objects.append(_object(values, where, image.size if normalized else None))
        except ValueError as error:
            problems.add(where, str(error))
            if image:
                spoiled.add(image.file_name)
    if not rows:
        raise DatasetError(f"{files[0]} has no row that names an image below {images.root}; export it again.")
    read = [image for image in found.values() if image]
    listed = [each for each in read if each.file_name not in spoiled or not problems.leave_out(each.objects, 0)]
    return of_classes(listed, classes, problems)


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except ValueError as error:
        raise DatasetError(f"{path} {error}.") from error


def _columns(row: list[str]) -> dict[str, int]:
    """Where each column is; empty if the row does not name an image and a class."""
    given = [word.strip().lower() for word in row]
    columns = {name: given.index(word) for name, words in _COLUMNS.items() for word in words if word in given}
    if not {"image", "class"} <= columns.keys():
        return {}
    if "x" not in columns:
        for name in ("width", "height"):  # then the size of the image
            columns.pop(name, None)
    return columns


def _object(values: dict[str, str], where: str, scale: tuple[int, int] | None) -> LabeledObject:
    height, width = scale or (1, 1)
    label = values.get("class", "")
    if values.get("polygon"):
        words = values["polygon"].replace(",", " ").replace(";", " ").strip("[]()").split()
        points = [to_number(word) * (height if index % 2 else width) for index, word in enumerate(words)]
        return LabeledObject(label, where, polygons=[points])
    if "x" in values and "width" in values:
        left, top, width_px, height_px = (to_number(values.get(name, "")) for name in ("x", "y", "width", "height"))
        right, bottom = left + width_px, top + height_px
    else:
        left, top, right, bottom = (to_number(values.get(name, "")) for name in ("left", "top", "right", "bottom"))
    return LabeledObject(label, where, (left * width, top * height, right * width, bottom * height))
