"""The device that a tool or a job uses."""

import os

import torch

from dimaskdino.errors import UserError


def default_device() -> str:
    """The device of a tool that is given none: a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def usable_device(name: str | None) -> str:
    """The device that a user names, or :func:`default_device`.

    Raises:
        UserError: torch has no such device here.
    """
    name = name or default_device()
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"The device {name!r} cannot be used ({reason}); give cpu, or cuda:0 for a GPU.") from error
    return name


def device_of_process(asked: str | None) -> str | None:
    """What was asked for, else, under torchrun, the GPU that is this process's own."""
    if asked or not torch.cuda.is_available():
        return asked
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
