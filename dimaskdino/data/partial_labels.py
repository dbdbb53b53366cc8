"""Images of which not every class was labeled."""

from collections.abc import Mapping, Sequence
from typing import Any


def unlabeled_classes(
    entry: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]], num_classes: int
) -> list[int]:
    """The classes of which an image may show objects without labels; predicting them is no mistake there.

    Args:
        entry: of a dataset. With "neg_category_ids", all classes but those that it lists and those with an object were
            not looked for; of "not_exhaustive_category_ids", some objects may lack labels.
        annotations: its objects.
        num_classes: of the model.

    Source: LVIS (Gupta et al., 2019).
    """
    unlabeled = set(entry.get("not_exhaustive_category_ids", ()))
    if "neg_category_ids" in entry:
        looked_for = {*entry["neg_category_ids"], *(each["category_id"] for each in annotations)}
        unlabeled |= set(range(num_classes)) - looked_for
    return sorted(unlabeled)
