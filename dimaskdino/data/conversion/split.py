"""Splits that keep the classes in proportion."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from dimaskdino.data.conversion.labels import LabeledImage


def stratified(images: Sequence[LabeledImage], shares: Sequence[float], seed: int) -> list[list[LabeledImage]]:
    """Divide images so that each part has its share of the objects of every class, and of the images without any.

    The images of the rarest class that is left are dealt out first, each to the part that lacks most of that class,
    then most images.

    Args:
        images: to divide.
        shares: of each part; they sum up to 1.
        seed: decides on the order in which images of a class are dealt out.

    Returns:
        The parts, each in the order of ``images``.

    Source: Sechidis et al., "On the Stratification of Multi-Label Data" (2011).
    """
    labels = [Counter(each.label for each in image.objects) or Counter([""]) for image in images]
    total: Counter[str] = sum(labels, Counter())
    lacks = [{label: share * count for label, count in total.items()} for share in shares]
    room = [share * len(images) for share in shares]
    parts: list[list[int]] = [[] for _ in shares]
    left = set(range(len(images)))
    order = np.random.default_rng(seed).permutation(len(images)).tolist()
    while left:
        remaining: Counter[str] = sum((labels[index] for index in left), Counter())
        rarest = min(remaining, key=lambda label: (remaining[label], label))
        for index in [index for index in order if index in left and rarest in labels[index]]:
            part = max(range(len(parts)), key=lambda which: (lacks[which][rarest], room[which], -which))
            parts[part].append(index)
            left.discard(index)
            room[part] -= 1
            for label, count in labels[index].items():
                lacks[part][label] -= count
    return [[images[index] for index in sorted(part)] for part in parts]
