"""Configuration: every key with its default, the reader, and what the releases' files need."""

from dimaskdino.config.keys import KEYS, add_dimaskdino_config, add_keys
from dimaskdino.config.reader import Config, config_of_dump, flatten, get_cfg, own_keys, read_config, register_keys
from dimaskdino.config.unused_keys import report_unused_keys
from dimaskdino.config.yaml_files import IGNORED_KEYS, read_yaml

__all__ = [
    "IGNORED_KEYS",
    "KEYS",
    "Config",
    "add_dimaskdino_config",
    "add_keys",
    "config_of_dump",
    "flatten",
    "get_cfg",
    "own_keys",
    "read_config",
    "read_yaml",
    "register_keys",
    "report_unused_keys",
]
