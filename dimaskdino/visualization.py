"""Draw objects and segments on pictures: boxes, masks, and labels, in the one style that every tool uses."""

import functools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from detectron2.structures import Instances
from matplotlib.colors import hsv_to_rgb
from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

logger = logging.getLogger(__name__)

Color = tuple[int, int, int]
Box = tuple[float, float, float, float]
Patch = tuple[int, int, np.ndarray]  # left and top in px of a picture, and what is there of a mask, (h, w) uint8

SHORTEST_SIDE_PX, LONGEST_SIDE_PX = 512, 2400  # smaller pictures are enlarged to about these
MASK_OPACITY = 0.4
HALO: Color = (16, 16, 16)
_GOLDEN_RATIO = (5**0.5 - 1) / 2  # turning a hue by this keeps it far from the hues before it
_TONES = ((0.85, 1.0), (0.6, 1.0), (0.9, 0.8))  # saturation and value, in turn
_LONGEST_LABEL = 28
_SMOOTHING = 0.6  # standard deviation in px of the mask, of the blur before a mask is enlarged and cut at one half
_BLUR_REACH_PX = 3
_RIM_TOLERANCE_PX = 0.5  # how far a rim may be from its smooth course: fewer corners are drawn sooner
_RIM_SMOOTHING = 3  # neighbors on both sides with which each pixel of a rim is averaged
_RIM_BITS = 4  # fractional ones of the coordinates of rims
_GRID_MARGIN_PX, _GRID_BACKGROUND = 8, (255, 255, 255)


def to_picture(pixels: np.ndarray) -> np.ndarray:
    """What a person can look at: (H, W, 3) uint8 of an image (H, W, C) of any numbers.

    Colors of 8 bits stay as they are. Of others, the first three channels (or the first, where there are fewer) are
    stretched so that all but the darkest and brightest percent of the pixels lie between black and white.
    """
    if pixels.dtype == np.uint8 and pixels.shape[2] == 3:
        return pixels
    shown = (pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1].repeat(3, axis=2)).astype(np.float32)
    low, high = np.percentile(shown, (1, 99), axis=(0, 1))
    return (255 * ((shown - low) / np.maximum(high - low, 1e-6)).clip(0, 1)).round().astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Objects:
    """Objects of one image, or segments of a panoptic or semantic map."""

    classes: Sequence[int]  # class index of each
    names: Sequence[str]  # class name of each
    scores: Sequence[float] | None = None  # in [0, 1]; None for ground truth
    boxes: np.ndarray | None = None  # (N, 4) xyxy px, nan for an object without one; None for segments
    masks: Sequence[np.ndarray] | np.ndarray | None = None  # N masks (H, W) bool; None for objects with boxes alone

    @classmethod
    def from_instances(cls, instances: Instances, class_names: Sequence[str]) -> "Objects":
        """Read predicted (``pred_``) or true (``gt_``) detectron2 instances on the CPU, with or without masks."""
        fields: dict[str, Any] = instances.get_fields()
        prefix = "pred" if "pred_classes" in fields else "gt"
        classes = fields[f"{prefix}_classes"].tolist()
        masks = fields.get(f"{prefix}_masks")
        return cls(
            classes=classes,
            names=[class_names[index] for index in classes],
            scores=fields["scores"].tolist() if "scores" in fields else None,
            boxes=fields[f"{prefix}_boxes"].tensor.numpy(),
            masks=None if masks is None else getattr(masks, "tensor", masks).numpy().astype(bool),
        )

    @classmethod
    def from_segments(cls, ids: np.ndarray, classes: Mapping[int, int], class_names: Sequence[str]) -> "Objects":
        """Read a panoptic map, or a semantic one, whose segments are its classes.

        Args:
            ids: (H, W) segment of each pixel.
            classes: class index by segment; pixels of other segments are left as they are.
            class_names: by class index.
        """
        there = [segment for segment in classes if (ids == segment).any()]
        return cls(
            classes=[classes[segment] for segment in there],
            names=[class_names[classes[segment]] for segment in there],
            masks=np.array([ids == segment for segment in there], dtype=bool).reshape(-1, *ids.shape),
        )


@functools.lru_cache(maxsize=1024)
def class_color(index: int) -> Color:
    """A bright RGB color, the same for a class wherever it is drawn."""
    saturation, value = _TONES[index % len(_TONES)]
    red, green, blue = (hsv_to_rgb((index * _GOLDEN_RATIO % 1, saturation, value)) * 255).round().astype(int).tolist()
    return red, green, blue


def draw_objects(
    image: np.ndarray, objects: Objects, *, width: int | None = None, by_instance: bool = False
) -> np.ndarray:
    """Draw objects on an image.

    Masks are tinted and outlined, boxes outlined, both with a dark halo. A label never covers another one: it moves
    along its object, and is left out if there is no room.

    Args:
        image: (H, W, 3) uint8 RGB.
        objects: in the image's frame.
        width: of the picture in px; None enlarges a small image, so that its labels can be read.
        by_instance: whether each object has a color of its own, not of its class.

    Returns:
        (H', W', 3) uint8 RGB.
    """
    scale = width / image.shape[1] if width else _enlargement(image.shape[0], image.shape[1])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    picture = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    canvas = _Canvas(
        size=size,
        colors=[class_color(index if by_instance else label) for index, label in enumerate(objects.classes)],
        boxes=None if objects.boxes is None else np.asarray(objects.boxes, dtype=float).reshape(-1, 4) * scale,
        masks=objects.masks,
    )
    canvas.tint(picture)
    canvas.outline(picture)
    canvas.add_labels(picture, objects)
    return picture


def _enlargement(height: int, width: int) -> int:
    """How many times a picture is enlarged, so that labels can be read; its longest side limits a long one."""
    return max(1, min(round(SHORTEST_SIDE_PX / min(height, width)), LONGEST_SIDE_PX // max(height, width)))


def save_grid(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], path: str | Path) -> None:
    """Write pictures side by side as one image file, with a title over each column.

    Args:
        rows: of pictures (H, W, 3) uint8 RGB, one for each title; those of a row are scaled to the width of its first.
        titles: of the columns.
        path: of the file; its suffix decides the format, and its folder exists.
    """
    margin, head = _GRID_MARGIN_PX, 20 + 2 * _GRID_MARGIN_PX
    scaled = [[_to_width(picture, row[0].shape[1]) for picture in row] for row in rows]
    column = max((row[0].shape[1] for row in scaled), default=0) + margin
    heights = [max(picture.shape[0] for picture in row) + margin for row in scaled]
    titles, font = _fitting(titles, column - margin)
    sheet = Image.new("RGB", (margin + column * len(titles), head + sum(heights)), _GRID_BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for index, title in enumerate(titles):
        draw.text((margin + column * index + (column - margin) / 2, head / 2), title, HALO, font, anchor="mm")
    top = head
    for row, height in zip(scaled, heights, strict=True):
        for index, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture), (margin + column * index, top))
        top += height
    sheet.save(path)


def _fitting(titles: Sequence[str], width: int) -> tuple[list[str], ImageFont.FreeTypeFont]:
    """Titles, and the largest font in which all fit a width in px; of one that fits in none, the end."""
    fonts = [_font("", size) for size in range(20, 9, -1)]
    font = next((font for font in fonts if all(font.getlength(title) <= width for title in titles)), fonts[-1])
    shown = []
    for title in titles:
        ends = (title, *(f"…{title[start:]}" for start in range(1, len(title))), "")
        shown.append(next(end for end in ends if font.getlength(end) <= width or not end))
    return shown, font


def _to_width(picture: np.ndarray, width: int) -> np.ndarray:
    if picture.shape[1] == width:
        return picture
    height = max(1, round(picture.shape[0] * width / picture.shape[1]))
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


@dataclass(frozen=True, kw_only=True)
class _Canvas:
    """What is drawn on one picture of ``size`` (width, height): boxes in its px, masks in the image's."""

    size: tuple[int, int]
    colors: Sequence[Color]
    boxes: np.ndarray | None
    masks: Sequence[np.ndarray] | np.ndarray | None

    @functools.cached_property
    def patches(self) -> list[Patch]:
        """Where each mask is: what is drawn of it."""
        return [] if self.masks is None else [_patch(mask, self.size) for mask in self.masks]

    def box(self, index: int) -> Box | None:
        """A box xyxy in px of the picture, if the object has one."""
        if self.boxes is None or not np.isfinite(self.boxes[index]).all():
            return None
        x0, y0, x1, y1 = self.boxes[index].tolist()
        return x0, y0, x1, y1

    @functools.cached_property
    def largest_first(self) -> list[int]:
        """The objects in the order in which they are drawn."""
        if self.masks is not None:
            areas = np.array([np.count_nonzero(patch) for _, _, patch in self.patches], dtype=np.float64)
        elif self.boxes is not None:
            areas = (self.boxes[:, 2:] - self.boxes[:, :2]).prod(axis=1)
        else:
            areas = np.zeros(0)
        return np.argsort(-areas, kind="stable").tolist()

    def tint(self, picture: np.ndarray) -> None:
        """Blend the colors of the masks into the picture."""
        for index in self.largest_first if self.masks is not None else ():
            x, y, patch = self.patches[index]
            if patch.size:
                region = picture[y : y + patch.shape[0], x : x + patch.shape[1]]
                red, green, blue = (MASK_OPACITY * value for value in self.colors[index])
                dimmed = cv2.convertScaleAbs(region, alpha=1 - MASK_OPACITY)
                cv2.copyTo(cv2.add(dimmed, (red, green, blue, 0)), patch, region)

    def outline(self, picture: np.ndarray) -> None:
        """Draw the rims of masks and boxes into the picture, each over a wider dark line.

        Boxes of masks are thin, and have a shadow instead of the dark line, which would outweigh their color.
        """
        line = max(2, round(min(self.size) / 350))
        thin = self.masks is not None
        for index in self.largest_first:
            rims = _rims(*self.patches[index]) if thin else []
            if (box := self.box(index)) is not None:
                # OpenCV's coordinates overflow far outside the picture.
                corners = np.clip(box, -9999, 32767).round().astype(int)
                width, shift, wider = (max(1, line // 2), 1, 0) if thin else (line, 0, 2)
                _rectangle(picture, corners + shift, HALO, width + wider)
                _rectangle(picture, corners, self.colors[index], width)
            for color, wider in ((HALO, 2), (self.colors[index], 0)):
                cv2.polylines(picture, rims, True, color, line + wider, cv2.LINE_AA, _RIM_BITS)

    def add_labels(self, picture: np.ndarray, objects: Objects) -> None:
        """Add labels to the picture, highest scores first, each where it covers no other."""
        taken: list[Box] = []
        scores = [1.0] * len(self.colors) if objects.scores is None else objects.scores
        size_px = max(12, round(min(self.size) / 42))
        for index in sorted(range(len(scores)), key=lambda index: -scores[index]):
            label = _label_picture(_label(objects, index), size_px, self.colors[index])
            height, width = label.shape[:2]
            place = _free_place(self._places(index, (width, height)), (width, height), self.size, taken)
            if place is not None:
                x, y = place
                taken.append((x, y, x + width, y + height))
                room = picture[y : y + height, x : x + width]
                room[:] = label[: room.shape[0], : room.shape[1]]

    def _places(self, index: int, size: tuple[float, float]) -> Iterable[tuple[float, float]]:
        """Places for the label of an object, the best first."""
        if (box := self.box(index)) is not None:
            return _places_at_box(box, size)
        return () if self.masks is None else _places_in_mask(*self.patches[index], size)


def _patch(mask: np.ndarray, size: tuple[int, int]) -> Patch:
    """The part of a mask (H, W) bool that is not empty, at the ``size`` (width, height) of the picture, its rim smooth.

    The same as the resized whole mask, without the time that this takes.
    """
    mask = mask.view(np.uint8)
    x, y, width, height = cv2.boundingRect(mask)
    scales = size[0] / mask.shape[1], size[1] / mask.shape[0]
    # What interpolation can reach, in px of the picture.
    spans = [
        (max(0, math.floor((start - 1) * scale)), min(side, math.ceil((start + length + 1) * scale)))
        for start, length, scale, side in zip((x, y), (width, height), scales, size, strict=True)
    ]
    (left, right), (top, bottom) = spans
    if not (width and height and right > left and bottom > top):
        return 0, 0, np.zeros((0, 0), dtype=np.uint8)
    x0, y0 = max(0, x - _BLUR_REACH_PX), max(0, y - _BLUR_REACH_PX)
    smooth = 255 * mask[y0 : y + height + _BLUR_REACH_PX, x0 : x + width + _BLUR_REACH_PX]
    if min(scales) > 1:  # the steps of enlarged pixels
        smooth = cv2.GaussianBlur(smooth, (0, 0), _SMOOTHING, borderType=cv2.BORDER_REPLICATE)
    if all(scale.is_integer() for scale in scales):
        smooth = cv2.resize(smooth, None, fx=scales[0], fy=scales[1], interpolation=cv2.INTER_LINEAR)
        above, before = round(y0 * scales[1]), round(x0 * scales[0])
        smooth = smooth[top - above : bottom - above, left - before : right - before]
    else:
        # From the centers of pixels to the centers of pixels.
        shifts = [
            (first + 0.5) * scale - 0.5 - start
            for first, scale, start in zip((x0, y0), scales, (left, top), strict=True)
        ]
        matrix = np.array([[scales[0], 0, shifts[0]], [0, scales[1], shifts[1]]])
        smooth = cv2.warpAffine(
            smooth, matrix, (right - left, bottom - top), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
    # A single pixel stays, however smooth.
    return left, top, cv2.threshold(smooth, min(127, int(smooth.max()) // 2), 1, cv2.THRESH_BINARY)[1]


def _rectangle(picture: np.ndarray, corners: np.ndarray, color: Color, width: int) -> None:
    cv2.rectangle(picture, corners[:2].tolist(), corners[2:].tolist(), color, width)


def _rims(x: int, y: int, patch: np.ndarray) -> list[np.ndarray]:
    """Smooth closed lines around the parts and holes of a mask, (N, 1, 2) int32 with :data:`_RIM_BITS`."""
    rims = cv2.findContours(patch, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE, offset=(x, y))[0] if patch.size else ()
    return [_smooth_rim(rim.astype(np.float32)) for rim in rims]


def _smooth_rim(rim: np.ndarray) -> np.ndarray:
    reach = min(_RIM_SMOOTHING, len(rim) // 8)  # little ones would shrink
    ring = cv2.copyMakeBorder(rim, reach, reach, 0, 0, cv2.BORDER_WRAP)
    smooth = cv2.blur(ring, (1, 2 * reach + 1))[reach : reach + len(rim)]
    return (cv2.approxPolyDP(smooth, _RIM_TOLERANCE_PX, True) * 2**_RIM_BITS).round().astype(np.int32)


@functools.lru_cache(maxsize=1024)
def _label_picture(text: str, size_px: int, color: Color) -> np.ndarray:
    """A label (H, W, 3) uint8 with letters of ``size_px``."""
    font, pad = _font(text, size_px), size_px // 5
    size = (math.ceil(font.getlength(text)) + 2 * pad, sum(font.getmetrics()) + pad)
    image = Image.new("RGB", size, color)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, size[0] - 1, size[1] - 1), outline=HALO)
    ink = (0, 0, 0) if np.dot(color, (0.299, 0.587, 0.114)) > 110 else (255, 255, 255)
    draw.text((pad, pad / 2), text, ink, font)
    return np.asarray(image)


def _label(objects: Objects, index: int) -> str:
    """Name and score; the class index stands in for a name that no font can show."""
    name = " ".join("".join(c for c in objects.names[index] if c.isprintable()).split())
    if len(name) > _LONGEST_LABEL:
        name = f"{name[: _LONGEST_LABEL - 1]}…"
    score = "" if objects.scores is None else f" {objects.scores[index]:.2f}"
    if _font_file(name + score) is None:
        _warn_of_missing_glyphs()
        name = f"class {objects.classes[index]}"
    return name + score


def _places_at_box(box: Box, size: tuple[float, float]) -> Iterable[tuple[float, float]]:
    """Places for a label of ``size`` at a box: over it, in it, under it, then further along its sides."""
    (x0, y0, x1, y1), (width, height) = box, size
    yield from ((x0, y0 - height), (x0, y0), (x0, y1), (x1 - width, y0 - height), (x1 - width, y1))
    yield from ((x1 - width, y0), (x0, y1 - height), (x1 - width, y1 - height), (x1, y0), (x0 - width, y0))
    for step in range(1, 7):
        for x in (x0, x1 - width, x1, x0 - width):
            yield from ((x, y0 + step * height), (x, y0 - (step + 1) * height))


def _places_in_mask(x: int, y: int, patch: np.ndarray, size: tuple[float, float]) -> Iterable[tuple[float, float]]:
    """Places for a label of ``size`` at a segment: where it is widest, near its middle, then around that."""
    if not patch.any():
        return
    # A rim of zeros: the border of the picture ends a segment, too.
    depth = cv2.distanceTransform(np.pad(patch, 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    deep = np.argwhere(depth >= 0.95 * depth.max())
    row, column = deep[np.square(deep - np.argwhere(patch).mean(axis=0)).sum(axis=1).argmin()].tolist()
    left, top = x + column - size[0] / 2, y + row - size[1] / 2
    yield left, top
    yield from _places_at_box((left, top, left + size[0], top + size[1]), size)


def _free_place(
    places: Iterable[tuple[float, float]], size: tuple[int, int], bounds: tuple[int, int], taken: Sequence[Box]
) -> tuple[int, int] | None:
    """The first place, moved into the picture, at which a label covers none that is there."""
    for left, top in places:
        x = min(max(0, round(left)), max(0, bounds[0] - size[0]))
        y = min(max(0, round(top)), max(0, bounds[1] - size[1]))
        if not any(x < x1 and x0 < x + size[0] and y < y1 and y0 < y + size[1] for x0, y0, x1, y1 in taken):
            return x, y
    return None


@functools.lru_cache(maxsize=256)
def _font(text: str, size_px: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_font_file(text) or _own_font()), size_px)


@functools.lru_cache(maxsize=1024)
def _font_file(text: str) -> Path | None:
    """A font that has every character of ``text``: matplotlib's own, or one of the system's; None if none has."""
    needed = {ord(character) for character in text if not character.isspace()}
    files = (_own_font(), *_system_fonts()) if needed - _characters(_own_font()) else (_own_font(),)
    return next((file for file in files if needed <= _characters(file)), None)


def _own_font() -> Path:
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@functools.cache
def _system_fonts() -> tuple[Path, ...]:
    """The system's fonts, upright sans-serif ones first."""
    files = sorted(Path(file) for file in findSystemFonts())
    return tuple(sorted(files, key=lambda file: ("sans" not in file.name.lower(), "regular" not in file.name.lower())))


@functools.cache
def _characters(font: Path) -> frozenset[int]:
    try:
        return frozenset(FT2Font(str(font)).get_charmap())
    except (OSError, RuntimeError):  # a font in a format that FreeType does not read
        return frozenset()


@functools.cache
def _warn_of_missing_glyphs() -> None:
    """Log one line for all names, however many there are."""
    logger.warning(
        "Some class names have characters that no installed font has; the class index is drawn instead. Install a font "
        "of their script, such as Noto Sans CJK."
    )
