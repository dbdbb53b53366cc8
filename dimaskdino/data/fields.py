"""What annotations say beyond shapes: a user's fields, and classes that were not labeled."""

import difflib
import math
from collections.abc import Sequence

import torch

from dimaskdino.data.coco_file import Json
from dimaskdino.errors import ConfigError, DatasetError

# Names that the package gives a meaning of its own.
_TAKEN = ("classes", "boxes", "masks", "box_supervised", "mask_supervised", "id", "image_id", "category_id", "bbox")


def check_field_names(names: Sequence[str]) -> None:
    """Raise ConfigError if INPUT.ANNOTATION_FIELDS names what the package reads already."""
    taken = [name for name in names if not isinstance(name, str) or name in _TAKEN or not name.isidentifier()]
    if taken:
        raise ConfigError(f"INPUT.ANNOTATION_FIELDS names {taken[0]!r}, which is taken or no name; rename the field.")


def read_field(annotation: Json, name: str) -> list[float] | float | None:
    """The value of a field: a number, a list of numbers, or None without it; raises ValueError for anything else."""
    value = annotation.get(name)
    if isinstance(value, int | float | None):
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(each, int | float) for each in value):
        return list(value)
    raise ValueError(f"{name} is {value!r:.60}, but a field is a number or a list of numbers")


def check_fields(annotations: Sequence[Json], names: Sequence[str], dataset: str) -> None:
    """Raise DatasetError if a dataset has a field of other than numbers, or in no annotation; names the closest."""
    for name in names:
        for annotation in annotations:
            try:
                read_field(annotation, name)
            except ValueError as error:
                where = f"annotation {annotation.get('id', '')} of dataset {dataset}"
                raise DatasetError(f"{where}: {error} (INPUT.ANNOTATION_FIELDS).") from error
        if annotations and all(annotation.get(name) is None for annotation in annotations):
            known = {key for annotation in annotations for key in annotation}
            closest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {closest[0]}?" if closest else "add it, or take the name out."
            raise DatasetError(f"No annotation of dataset {dataset} has {name!r} (INPUT.ANNOTATION_FIELDS); {hint}")


def fields_of(annotations: Sequence[Json], names: Sequence[str], where: str) -> dict[str, torch.Tensor]:
    """Fields of the n objects of an image.

    Returns:
        ``gt_<name>`` -> (n,) float32, or (n, d) where the values are lists; NaN for an object without the field.

    Raises:
        DatasetError: a value is no number or list of numbers, or lists differ in length.
    """
    found = {}
    for name in names:
        try:
            values = [read_field(annotation, name) for annotation in annotations]
        except ValueError as error:
            raise DatasetError(f"An annotation of {where}: {error} (INPUT.ANNOTATION_FIELDS).") from error
        lengths = {len(value) if isinstance(value, list) else 0 for value in values if value is not None}
        if len(lengths) > 1:
            raise DatasetError(f"Annotations of {where}: {name} has {sorted(lengths)} numbers; give all the same.")
        length = lengths.pop() if lengths else 0
        missing = [math.nan] * length or math.nan
        rows = torch.tensor([missing if value is None else value for value in values], dtype=torch.float32)
        found[f"gt_{name}"] = rows.reshape(len(values), length) if length else rows
    return found


def unlabeled_classes(entry: Json, annotations: Sequence[Json], num_classes: int) -> list[int]:
    """The classes of which an image may show objects without labels; predicting them is no mistake there.

    With "neg_category_ids" of an entry, these are all classes but those that it lists and those with an object; they
    were not looked for. Of "not_exhaustive_category_ids", some objects may lack labels.

    Source: LVIS (Gupta et al., 2019).
    """
    unlabeled = set(entry.get("not_exhaustive_category_ids", ()))
    if "neg_category_ids" in entry:
        looked_for = {*entry["neg_category_ids"], *(each["category_id"] for each in annotations)}
        unlabeled |= set(range(num_classes)) - looked_for
    return sorted(unlabeled)
