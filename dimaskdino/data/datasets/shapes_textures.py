"""Colors and textures of the synthetic dataset's pictures."""

import colorsys

import numpy as np
from PIL import Image

MIN_CONTRAST = 50  # mean absolute difference per channel, of 255, between a shape and what it covers
COLOR_TRIES = 10
TYPICAL_SHARE = 0.85  # of the shapes; the others have any color
HUE_SPREAD = 0.04  # standard deviation of the typical ones, of the whole circle


def contrasting_color(rng: np.random.Generator, behind: np.ndarray, hue: float) -> np.ndarray:
    """A color around ``hue`` (in [0, 1)), or now and then any, far enough from ``behind``.

    Returns:
        (3,) RGB in [0, 255], as are all colors here.
    """
    is_typical = rng.random() < TYPICAL_SHARE
    for _ in range(COLOR_TRIES):
        color = _color_around(rng, hue) if is_typical else random_color(rng, max_saturation=0.95)
        if np.abs(color - behind).mean() >= MIN_CONTRAST:
            break
    return color


def _color_around(rng: np.random.Generator, hue: float) -> np.ndarray:
    saturation, value = rng.uniform(0.5, 1), rng.uniform(0.4, 1)
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
    saturation, value = rng.uniform(0.15, 0.45), rng.uniform(0.35, 0.9)
    color = 255 * np.array(colorsys.hsv_to_rgb((hue + rng.normal(0, HUE_SPREAD)) % 1, saturation, value))
    shade = (make(rng, size, size)[..., None] - 0.5) * rng.uniform(40, 90)
    return (color + shade).astype(np.float32)


def regions(rng: np.random.Generator, size: int) -> np.ndarray:
    """Cut a square into 2 to 5 regions with wavy borders: (S, S) int64, the region of each pixel, from 0 on."""
    points = rng.uniform(0, size, (int(rng.integers(2, 6)), 2))
    y, x = np.mgrid[:size, :size] + 0.5
    wave = size * 0.06 * np.sin(2 * np.pi * (np.stack((y, x)) / size * rng.uniform(1, 3) + rng.random()))
    return np.argmin([np.hypot(x + wave[0] - left, y + wave[1] - top) for left, top in points], axis=0)
