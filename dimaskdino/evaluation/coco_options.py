"""What COCO's evaluation reports beside its own numbers, by key."""

import math
from dataclasses import dataclass

from detectron2.config import CfgNode

from dimaskdino.errors import ConfigError

# The names and areas (px^2) of COCO's own ranges.
AREA_RANGES = (("all", 0.0, 1e10), ("s", 0.0, 32.0**2), ("m", 32.0**2, 96.0**2), ("l", 96.0**2, 1e10))


@dataclass(frozen=True)
class CocoOptions:
    """Further numbers."""

    limits: tuple[int, ...] = ()  # numbers of detections of a class in an image at which AP and AR are reported as well
    # name, least and largest area in px^2, each of which gives ``AP_<name>`` and ``AR_<name>``
    area_ranges: tuple[tuple[str, float, float], ...] = ()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "CocoOptions":
        """Read TEST.COCO; raises ConfigError if a limit is no positive number, or a range is no name with two areas."""
        limits, ranges = cfg.TEST.COCO.LIMITS, cfg.TEST.COCO.AREA_RANGES
        if any(not isinstance(limit, int) or limit < 1 for limit in limits):
            raise ConfigError(f"TEST.COCO.LIMITS is {list(limits)}; give numbers of detections of at least 1.")
        for each in ranges:
            if not _is_range(each):
                raise ConfigError(
                    f"TEST.COCO.AREA_RANGES has {each!r}; write [NAME, LEAST, LARGEST] with areas in square pixels, "
                    "such as [tiny, 0, 256]; inf is the largest of all."
                )
        names = [each[0] for each in ranges]
        if len(set(names)) < len(names):
            raise ConfigError(f"TEST.COCO.AREA_RANGES has a name twice: {names}.")
        return cls(
            tuple(sorted(set(limits))), tuple((n, float(low), min(float(high), 1e10)) for n, low, high in ranges)
        )


def _is_range(each: object) -> bool:
    if not (isinstance(each, list | tuple) and len(each) == 3 and isinstance(each[0], str)):
        return False
    try:
        low, high = float(each[1]), float(each[2])
    except (TypeError, ValueError):
        return False
    return not math.isnan(low) and 0 <= low < high


NO_OPTIONS = CocoOptions()
