"""Draws the pictures of the synthetic dataset: overlapping shapes on textured backgrounds, and who owns which pixel.

Shapes are drawn with 3x3 samples per pixel, so that edges are smooth; a pixel belongs to a shape when the shape covers
more than half of it. Most shapes of a class are of about the same hue, as many real things are, the others of any
color. Every random choice comes from the generator of the picture.
"""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

MIN_CONTRAST = 50  # mean absolute difference per channel, of 255, between a shape and what it covers
COLOR_TRIES = 10
TYPICAL_SHARE = 0.85  # of the shapes; the others have any color
HUE_SPREAD = 0.04  # standard deviation of the typical ones, of the whole circle
MIN_DIAMETER, MAX_DIAMETER = 0.09, 0.6  # of the picture's side: 12 to 77 pixels at 128
MIN_VISIBLE_SHARE = 0.4  # of a shape's whole area; shapes that would hide more of another are not placed
MIN_VISIBLE_PIXELS = 20
MIN_OBJECTS, MAX_OBJECTS = 2, 12
EMPTY_SHARE = 0.04  # of the pictures
SAMPLES = 3  # per pixel and direction
PLACEMENT_TRIES = 4
MAX_STROKES = 6


def contrasting_color(rng: np.random.Generator, behind: np.ndarray, hue: float) -> np.ndarray:
    """A color (3,) in [0, 255], around ``hue`` (in [0, 1)) or now and then any, far enough from ``behind``."""
    is_typical = rng.random() < TYPICAL_SHARE
    for _ in range(COLOR_TRIES):
        color = _color_around(rng, hue, (0.5, 1), (0.4, 1)) if is_typical else random_color(rng, max_saturation=0.95)
        if np.abs(color - behind).mean() >= MIN_CONTRAST:
            break
    return color


def _color_around(rng: np.random.Generator, hue: float, *ranges: tuple[float, float]) -> np.ndarray:
    saturation, value = (rng.uniform(*each) for each in ranges)
    return 255 * np.array(colorsys.hsv_to_rgb((hue + rng.normal(0, HUE_SPREAD)) % 1, saturation, value))


def random_color(rng: np.random.Generator, *, max_saturation: float) -> np.ndarray:
    """A random color: any hue, up to the given saturation in [0, 1], not too dark."""
    hue, saturation, value = rng.random(), rng.uniform(0.1, max_saturation), rng.uniform(0.25, 1)
    return 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value))


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Two muted colors mixed by a texture: (S, S, 3) float32 in [0, 255]."""
    first = random_color(rng, max_saturation=0.5)
    second = first + rng.uniform(-70, 70, 3)
    mix = texture(rng, size, size)[..., None]
    return (first + mix * (second - first)).astype(np.float32)


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """One of four textures: (H, W) in [0, 1]."""
    make = (_gradient, _stripes, _checks, _clouds)[rng.integers(4)]
    return make(rng, height, width)


def _ramp(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Distance in pixels along a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    return np.cos(angle) * np.arange(width)[None, :] + np.sin(angle) * np.arange(height)[:, None]


def _gradient(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    ramp = _ramp(rng, height, width)
    return (ramp - ramp.min()) / max(float(np.ptp(ramp)), 1e-6)


def _stripes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    period, phase = rng.uniform(5, 24), rng.uniform(0, 2 * np.pi)
    return 0.5 + 0.5 * np.sin(2 * np.pi * _ramp(rng, height, width) / period + phase)


def _checks(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    period = rng.uniform(8, 28)
    angle, shift = rng.uniform(0, 2 * np.pi), rng.uniform(0, period, 2)
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    along, across = np.cos(angle) * x + np.sin(angle) * y, -np.sin(angle) * x + np.cos(angle) * y
    waves = np.sin(2 * np.pi * (along + shift[0]) / period) * np.sin(2 * np.pi * (across + shift[1]) / period)
    return np.clip(0.5 + 2 * waves, 0, 1)


def _clouds(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    total = np.zeros((height, width))
    for cells, weight in ((3, 0.6), (9, 0.4)):
        coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
        total += weight * np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return np.clip(total, 0, 1)


# Class of stuff -> its texture and hue. In class order.
STUFF = {"meadow": (_clouds, 0.3), "water": (_stripes, 0.55), "tiles": (_checks, 0.05), "sky": (_gradient, 0.7)}


def colored_texture(rng: np.random.Generator, label: int, size: int) -> np.ndarray:
    """The texture of a class of stuff in two muted colors around its hue: (S, S, 3) float32 in [0, 255]."""
    make, hue = list(STUFF.values())[label]
    color = _color_around(rng, hue, (0.15, 0.45), (0.35, 0.9))
    shade = (make(rng, size, size)[..., None] - 0.5) * rng.uniform(40, 90)
    return (color + shade).astype(np.float32)


def regions(rng: np.random.Generator, size: int) -> np.ndarray:
    """Cut a square into 2 to 5 regions with wavy borders: (S, S) int64, the region of each pixel, from 0 on."""
    points = rng.uniform(0, size, (int(rng.integers(2, 6)), 2))
    y, x = np.mgrid[:size, :size] + 0.5
    wave = size * 0.06 * np.sin(2 * np.pi * (np.stack((y, x)) / size * rng.uniform(1, 3) + rng.random()))
    return np.argmin([np.hypot(x + wave[0] - left, y + wave[1] - top) for left, top in points], axis=0)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The pentagram: its points lie on the inner side of at least four of the five lines that draw it."""
    inner_sides = [np.cos(a) * u + np.sin(a) * v <= np.cos(2 * np.pi / 5) for a in 2 * np.pi * np.arange(5) / 5]
    return np.sum(inner_sides, axis=0) >= 4


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    narrow, wide = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
    return (narrow <= 0.28) & (wide <= 0.96)


# Class name -> whether a point of the shape's own frame, where it fits the unit circle, lies inside. In class order.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda u, v: u**2 + v**2 <= 1,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) <= np.sqrt(0.5),
    "triangle": lambda u, v: (v <= 0.5) & (np.sqrt(3) * np.abs(u) - v <= 1),
    "star": _star,
    "ring": lambda u, v: (u**2 + v**2 <= 1) & (u**2 + v**2 >= 0.55**2),
    "cross": _cross,
}


@dataclass(frozen=True)
class Picture:
    """One drawn picture."""

    image: np.ndarray  # (S, S, 3) uint8, RGB
    classes: tuple[int, ...]  # class index of each shape, back to front
    owner: np.ndarray  # (S, S) int16, index of the shape that a pixel belongs to, -1 for the background


def draw_picture(rng: np.random.Generator, size: int, canvas: np.ndarray | None = None) -> Picture:
    """Draw one picture of ``size`` x ``size`` pixels, on ``canvas`` (S, S, 3) float32 in place of a background."""
    canvas = background(rng, size) if canvas is None else canvas
    _draw_clutter(rng, canvas)
    owner = np.full((size, size), -1, dtype=np.int16)
    classes: list[int] = []
    whole_areas: list[int] = []
    wanted = 0 if rng.random() < EMPTY_SHARE else int(rng.integers(MIN_OBJECTS, MAX_OBJECTS + 1))
    for _ in range(wanted):
        for _ in range(PLACEMENT_TRIES):
            label = int(rng.integers(len(SHAPES)))
            patch = _random_shape(rng, label, size)
            if _leaves_enough_visible(patch, owner, whole_areas):
                _paint(rng, canvas, patch, hue=label / len(SHAPES))
                owner[patch.rows, patch.columns][patch.coverage > 0.5] = len(classes)
                classes.append(label)
                whole_areas.append(patch.whole_area)
                break
    canvas += rng.normal(0, rng.uniform(1, 4), (size, size, 1))
    return Picture(image=np.clip(np.rint(canvas), 0, 255).astype(np.uint8), classes=tuple(classes), owner=owner)


@dataclass(frozen=True)
class _Patch:
    """A shape's part inside the picture: where it is, how much of each pixel it covers; and the whole shape's area."""

    rows: slice
    columns: slice
    coverage: np.ndarray
    whole_area: int


def _random_shape(rng: np.random.Generator, label: int, size: int) -> _Patch:
    radius = size * MIN_DIAMETER * (MAX_DIAMETER / MIN_DIAMETER) ** (rng.random() ** 0.7) / 2
    center = rng.uniform(0, size, 2)
    angle, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.75, 1)
    left, top = (int(np.floor(c - radius)) for c in center)
    side = int(np.ceil(2 * radius)) + 2
    offsets = (np.arange(side * SAMPLES) + 0.5) / SAMPLES
    dx, dy = np.meshgrid(left + offsets - center[0], top + offsets - center[1])
    u = (np.cos(angle) * dx + np.sin(angle) * dy) / radius
    v = (-np.sin(angle) * dx + np.cos(angle) * dy) / (radius * stretch)
    inside = list(SHAPES.values())[label](u, v)
    coverage = inside.reshape(side, SAMPLES, side, SAMPLES).mean(axis=(1, 3))
    rows, columns = (slice(max(start, 0), min(start + side, size)) for start in (top, left))
    within = coverage[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return _Patch(rows=rows, columns=columns, coverage=within, whole_area=int((coverage > 0.5).sum()))


def _leaves_enough_visible(patch: _Patch, owner: np.ndarray, whole_areas: list[int]) -> bool:
    """Whether the new shape and every shape that it would cover keep enough visible pixels to be worth a label."""
    covered = patch.coverage > 0.5
    after = owner.copy()
    after[patch.rows, patch.columns][covered] = len(whole_areas)
    visible = np.bincount(after[after >= 0], minlength=len(whole_areas) + 1)
    needed = np.maximum(MIN_VISIBLE_SHARE * np.array([*whole_areas, patch.whole_area]), MIN_VISIBLE_PIXELS)
    return bool((visible >= needed).all())


def _paint(rng: np.random.Generator, canvas: np.ndarray, patch: _Patch, hue: float) -> None:
    """Blend the shape in, in a color that stands out from what it covers."""
    region = canvas[patch.rows, patch.columns]
    alpha = patch.coverage[..., None]
    behind = (region * alpha).sum(axis=(0, 1)) / max(alpha.sum(), 1e-6)
    color = contrasting_color(rng, behind, hue)
    shade = texture(rng, *region.shape[:2])[..., None] - 0.5
    fill = color + shade * rng.uniform(0, 60)
    region += alpha * (fill - region)


def _draw_clutter(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """Thin strokes behind the shapes that belong to no class."""
    size = canvas.shape[0]
    for _ in range(int(rng.integers(0, MAX_STROKES + 1))):
        start, length, angle = rng.uniform(0, size, 2), size * rng.uniform(0.1, 0.5), rng.uniform(0, 2 * np.pi)
        half_width, color = rng.uniform(0.5, 1.5), random_color(rng, max_saturation=0.6)
        direction = np.array([np.cos(angle), np.sin(angle)])
        low = np.floor(np.minimum(start, start + length * direction) - half_width - 1).astype(int).clip(0)
        high = np.ceil(np.maximum(start, start + length * direction) + half_width + 1).astype(int)
        region = canvas[low[1] : high[1], low[0] : high[0]]
        x = low[0] + np.arange(region.shape[1])[None, :] + 0.5 - start[0]
        y = low[1] + np.arange(region.shape[0])[:, None] + 0.5 - start[1]
        along = np.clip(direction[0] * x + direction[1] * y, 0, length)
        distance = np.hypot(x - along * direction[0], y - along * direction[1])
        region += np.clip(half_width + 0.5 - distance, 0, 1)[..., None] * (color - region)
