"""Semantic and panoptic results: every pixel gets a class, or a segment."""

from typing import Any

import torch
from torch import Tensor

from dimaskdino.modeling.postprocessing.masks import Frame
from dimaskdino.structures import MaskLogits, StagePrediction

SegmentInfo = dict[str, Any]
MEMORY_MB = 256


def class_probabilities(logits: Tensor, *, temperature: float | None, no_object_class: bool) -> Tensor:
    """What semantic results weigh the masks by.

    Args:
        logits: (Q, K) of one image, or (Q, K + 1) with a no-object class.
        temperature: of a softmax over the sigmoid scores; None keeps the scores.
        no_object_class: whether the last logit is that of no object; the classes then compete in a softmax.

    Returns:
        (Q, K) in [0, 1].
    """
    if no_object_class:
        return logits.float().softmax(-1)[:, :-1]
    scores = logits.float().sigmoid()
    return scores if temperature is None else (scores / temperature).softmax(-1)


def semantic_of_image(
    prediction: StagePrediction,
    image: int,
    frame: Frame,
    probabilities: Tensor,
    *,
    crop_first: bool,
    memory_mb: int = MEMORY_MB,
) -> Tensor:
    """Semantic result of one image: mask probabilities, weighed by class and summed over the queries.

    Args:
        prediction: of a stage with masks.
        image: index in the batch.
        frame: the sizes of the image.
        probabilities: (Q, K) of :func:`class_probabilities`.
        memory_mb: masks are made in chunks of about this many MiB.
        crop_first: bring the masks to the size of the result before they are summed up; otherwise the sum.

    Returns:
        (K, H, W) float32, a score of each class at each pixel.

    Source: MaskFormer (Cheng et al., 2021), section 3.4.
    """
    assert prediction.masks is not None
    everything = torch.arange(len(probabilities), device=probabilities.device)
    result, start = None, 0
    for logits in frame.logits(prediction.masks, image, everything, memory_mb=memory_mb, crop=crop_first):
        weights = probabilities[start : start + len(logits)]
        part = torch.einsum("qk,qhw->khw", weights, logits.sigmoid())
        result = part if result is None else result.add_(part)
        start += len(logits)
    assert result is not None
    return result if crop_first else frame.crop_and_resize(result)


def panoptic_of_image(
    prediction: StagePrediction,
    image: int,
    frame: Frame,
    *,
    is_thing: Tensor,
    object_threshold: float,
    overlap_threshold: float,
    temperature: float | None,
    memory_mb: int = MEMORY_MB,
) -> tuple[Tensor, list[SegmentInfo]]:
    """Panoptic result of one image: each pixel goes to the query with the largest score times mask probability.

    Args:
        prediction: of a stage with masks.
        image: index in the batch.
        frame: the sizes of the image.
        is_thing: (K,) bool.
        object_threshold: queries whose best class has a sigmoid score above it take part.
        overlap_threshold: least share of its own pixels that a query must win to become a segment.
        temperature: of a softmax over the sigmoid scores, whose best then scores the query; None keeps the sigmoid.
        memory_mb: masks are made in chunks of about this many MiB.

    Returns:
        (H, W) int32 with 0 for no segment, and for each segment its ``id``, ``category_id``, ``isthing``, and
        ``score`` (sigmoid), numbered from 1 in the order of the queries. Segments of one stuff class become one, with
        the best of their scores.

    Source: MaskFormer (Cheng et al., 2021), section 3.4; Mask DINO's released code.
    """
    assert prediction.masks is not None
    scores, classes = prediction.logits[image].float().sigmoid().max(-1)
    (kept,) = (scores > object_threshold).nonzero(as_tuple=True)
    if len(kept) == 0:
        return torch.zeros(frame.output, dtype=torch.int32, device=scores.device), []
    ranks = scores
    if temperature is not None:
        transformed = class_probabilities(prediction.logits[image], temperature=temperature, no_object_class=False)
        ranks, classes = transformed.max(-1)
    winner, inside, own = _contest(prediction.masks, image, kept, ranks[kept], frame, memory_mb)
    won = torch.bincount(winner.flatten(), minlength=len(kept))
    left = torch.bincount(winner[inside], minlength=len(kept))
    areas = torch.stack((won, own, left), dim=1).tolist()
    becomes_segment = [left > 0 and won / own >= overlap_threshold for won, own, left in areas]
    ids, segments = _number(classes[kept].tolist(), scores[kept].tolist(), becomes_segment, is_thing.tolist())
    return torch.tensor(ids, dtype=torch.int32, device=winner.device)[winner] * inside, segments


def _contest(
    masks: MaskLogits, image: int, queries: Tensor, scores: Tensor, frame: Frame, memory_mb: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Winner (H, W) of each pixel, whether it is inside the winner's own mask, and the pixels (N,) of each own mask."""
    winner, inside = scores.new_zeros(frame.output, dtype=torch.int64), scores.new_zeros(frame.output, dtype=torch.bool)
    best = scores.new_full(frame.output, -1.0)
    own: list[Tensor] = []
    start = 0
    for logits in frame.logits(masks, image, queries, memory_mb=memory_mb):
        probabilities = logits.sigmoid()
        in_mask = probabilities >= 0.5
        own.append(in_mask.sum((1, 2)))
        value, place = (scores[start : start + len(logits), None, None] * probabilities).max(0)
        better = value > best
        best = torch.where(better, value, best)
        winner = torch.where(better, place + start, winner)
        inside = torch.where(better, in_mask.gather(0, place[None])[0], inside)
        start += len(logits)
    return winner, inside, torch.cat(own)


def _number(
    classes: list[int], scores: list[float], becomes_segment: list[bool], is_thing: list[bool]
) -> tuple[list[int], list[SegmentInfo]]:
    """The segment id of each query, 0 for none, and the segments."""
    segments: list[SegmentInfo] = []
    stuff: dict[int, int] = {}
    ids = []
    for label, score, wanted in zip(classes, scores, becomes_segment, strict=True):
        known = stuff.get(label, 0) if wanted else 0
        if wanted and not known:
            known = len(segments) + 1
            segments.append({"id": known, "isthing": is_thing[label], "category_id": label, "score": score})
            if not is_thing[label]:
                stuff[label] = known
        elif wanted:
            segments[known - 1]["score"] = max(segments[known - 1]["score"], score)
        ids.append(known)
    return ids, segments
