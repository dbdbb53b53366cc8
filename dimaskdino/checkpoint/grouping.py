"""Many keys in few words."""

from collections import Counter
from collections.abc import Iterable


def group(keys: Iterable[str], others: Iterable[str], *, at_most: int = 8) -> str:
    """Name `keys` by the largest modules that hold none of `others`: "a.b.* (12), c.weight".

    Args:
        keys: the keys to name.
        others: keys on the other side of a comparison; a module that is there too is not named as a whole.
        at_most: groups to name; how many more there are is said.
    """
    present = {prefix for key in others for prefix in _prefixes(key)}
    groups: Counter[str] = Counter()
    for key in keys:
        groups[next((prefix for prefix in _prefixes(key) if prefix not in present), key)] += 1
    keys = set(keys)
    names = [name if name in keys else f"{name}.* ({count})" for name, count in groups.items()]
    more = f" and {len(names) - at_most} more groups" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


def _prefixes(key: str) -> list[str]:
    """Every module that holds `key`, outermost first, then `key` itself."""
    parts = key.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
