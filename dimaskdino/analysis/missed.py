"""Why an object of the truth was not found: at which stage of the model it was lost.

Three numbers decide (:class:`Limits`): a detection fits an object if box and mask both have an IoU of at least ``fit``
with it; a token or query is near it if its box or its mask has at least ``near``; a detection is reported if it scores
at least ``score`` and is among the best of its image.

An object is found if a reported detection of its class that fits is its own: detections choose their objects in the
order of their scores, each the object of the largest IoU that nobody has taken, as in COCO's evaluation. Of an object
that is not found, the first of these that holds is the cause:

* no token selected: no token of the first selection is near it.
* dropped by a later selection: a token of the first selection is near it, none of the last selection.
* Otherwise the nearest query is asked: of those near the object the one that meets most of the conditions class, box,
  mask, score; of equals the one with the largest IoU. The first condition that it does not meet is the cause:
  wrong class (another class scores higher, and the object's does not reach the threshold); box off; mask off; below
  the threshold. Where no query is near any more, the boxes moved away: box off.
* lost to another query: the nearest query meets all, but its detection belongs to another object, or better detections
  of the image fill its places.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np


class Outcome(Enum):
    """What became of an object; the values are the titles in tables."""

    FOUND = "found"
    NO_TOKEN = "no token selected"
    DROPPED = "dropped by a later selection"
    WRONG_CLASS = "wrong class"
    BOX_OFF = "box off"
    MASK_OFF = "mask off"
    LOW_SCORE = "below the threshold"
    OTHER_QUERY = "lost to another query"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The numbers that decide."""

    score: float = 0.35  # of a detection that is reported
    fit: float = 0.5  # least IoU of box and mask of a detection that is right
    near: float = 0.3  # least IoU of box or mask of a token or query that is near an object
    max_detections: int = 100  # reported of an image


@dataclass(frozen=True, kw_only=True)
class StageView:
    """What the Q queries of a stage predict in an image with G objects."""

    scores: np.ndarray  # (Q, K) of the classes, in [0, 1]
    quality: np.ndarray  # (Q,) that scores are multiplied by, once the best are chosen; ones where masks do not count
    box_iou: np.ndarray  # (Q, G)
    mask_iou: np.ndarray | None = None  # (Q, G); None for a model without masks

    def near(self, limits: Limits) -> np.ndarray:
        """(Q, G) bool: whose box or mask is near which object."""
        best = self.box_iou if self.mask_iou is None else np.maximum(self.box_iou, self.mask_iou)
        return best >= limits.near

    def fits(self, limits: Limits) -> np.ndarray:
        """(Q, G) bool: whose box and mask are right for which object."""
        worst = self.box_iou if self.mask_iou is None else np.minimum(self.box_iou, self.mask_iou)
        return worst >= limits.fit


@dataclass(frozen=True)
class Verdict:
    """What became of an object at a stage."""

    outcome: Outcome  # the cause
    query: int | None  # the query that found it, or the nearest one; None where none is near


def judge(
    view: StageView, classes: Sequence[int], limits: Limits, *, selections: Sequence[StageView] = ()
) -> list[Verdict]:
    """Judge every object of an image at a stage; ``selections`` are the first and, of several, the last."""
    reported = _reported(view, limits)
    found = _match(view, reported, classes, limits)
    verdicts = []
    for index, label in enumerate(classes):
        query, causes = _nearest(view, index, label, limits)
        if index in found:
            verdicts.append(Verdict(Outcome.FOUND, found[index]))
            continue
        for selection, lost in zip(selections, (Outcome.NO_TOKEN, Outcome.DROPPED), strict=False):
            if not selection.near(limits)[:, index].any():
                causes = [lost]
                break
        verdicts.append(Verdict(causes[0] if causes else Outcome.OTHER_QUERY, query))
    return verdicts


def _reported(view: StageView, limits: Limits) -> list[tuple[float, int, int]]:
    """(score, query, class) of the detections that are reported, best first."""
    flat = view.scores.ravel()
    best = np.argsort(-flat, kind="stable")[: limits.max_detections]
    pairs = [(int(each) // view.scores.shape[1], int(each) % view.scores.shape[1]) for each in best]
    scored = [(float(view.scores[pair] * view.quality[pair[0]]), *pair) for pair in pairs]
    return sorted((each for each in scored if each[0] >= limits.score), key=lambda each: -each[0])


def _match(
    view: StageView, reported: Sequence[tuple[float, int, int]], classes: Sequence[int], limits: Limits
) -> dict[int, int]:
    """The query that finds each object that is found."""
    overlap = view.box_iou if view.mask_iou is None else view.mask_iou
    fits, labels, found = view.fits(limits), np.asarray(classes), dict[int, int]()
    for _, query, label in reported:
        free = [int(index) for index in np.flatnonzero(fits[query] & (labels == label)) if index not in found]
        if free:
            found[max(free, key=lambda index: overlap[query, index])] = query
    return found


def _nearest(view: StageView, index: int, label: int, limits: Limits) -> tuple[int | None, list[Outcome]]:
    """The nearest query of an object, and what it does not meet, in the order of causes."""
    near = np.flatnonzero(view.near(limits)[:, index])
    if not len(near):
        return None, [Outcome.BOX_OFF]
    own = view.scores[near, label] * view.quality[near]
    box = view.box_iou[near, index]
    mask = box if view.mask_iou is None else view.mask_iou[near, index]
    met = {
        Outcome.WRONG_CLASS: (own >= limits.score) | (view.scores[near].argmax(1) == label),
        Outcome.BOX_OFF: box >= limits.fit,
        Outcome.MASK_OFF: mask >= limits.fit,
        Outcome.LOW_SCORE: own >= limits.score,
    }
    counts = np.sum(list(met.values()), axis=0)
    place = max(range(len(near)), key=lambda each: (counts[each], min(box[each], mask[each])))
    return int(near[place]), [outcome for outcome, holds in met.items() if not holds[place]]
