"""The package's configurations by name, from the repository or from an installed wheel."""

import difflib
from pathlib import Path

from dimaskdino.config import Config, read_config
from dimaskdino.errors import ConfigError

# A wheel has them in the package; an editable installation, in the repository around it.
_FOLDERS = (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs")


def config_folder() -> Path:
    """The folder with all configurations.

    Raises:
        ConfigError: the installation has none.
    """
    for folder in _FOLDERS:
        if (folder / "coco").is_dir():
            return folder
    raise ConfigError(f"{_FOLDERS[0]} does not exist: this installation has no configurations; install a wheel.")


def config_names() -> list[str]:
    """Every name that :func:`get_config` takes, such as ``coco/dimaskdino_r50_12ep``."""
    folder = config_folder()
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    return sorted(name for name in names if not name.rpartition("/")[2].startswith("Base-"))


def get_config_file(name: str) -> Path:
    """The file of a configuration, with or without ``.yaml`` in its name.

    Raises:
        ConfigError: there is none; names the closest.
    """
    plain = name.removesuffix(".yaml")
    names = config_names()
    if plain not in names:
        closest = difflib.get_close_matches(plain, names, n=1, cutoff=0)
        raise ConfigError(f"There is no configuration {name}; did you mean {closest[0]}? config_names() lists all.")
    return config_folder() / f"{plain}.yaml"


def get_config(name: str) -> Config:
    """A configuration, unfrozen.

    >>> cfg = get_config("coco/dimaskdino_r50_12ep")

    Raises:
        ConfigError: there is none; names the closest.
    """
    return read_config(get_config_file(name))
