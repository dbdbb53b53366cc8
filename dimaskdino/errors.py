"""Errors that are the user's to fix: command-line tools print them on one line and exit with status 2."""


class UserError(Exception):
    """Something the user gave (a file, a key, a flag, an annotation) cannot be used; the message says what to do."""


class ConfigError(UserError, ValueError):
    """A configuration key or value that cannot be used."""


class DatasetError(UserError, ValueError):
    """A dataset that is missing, unreadable or does not fit the configuration."""


class CheckpointError(UserError, ValueError):
    """A weight file that is unreadable, untrusted or does not fit the model."""
