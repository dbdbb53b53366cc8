"""Tensors of which each process of a job has a part (DTensor; SOLVER.SHARDING full): the part, and the whole."""

from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether the processes share the tensor out among them; asks for no import of torch's DTensor."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """The part of this process, in the same memory; the tensor itself if it is whole."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, sharded as ``like`` is; itself if that is whole."""
    if not is_sharded(like) or is_sharded(whole):
        return whole
    from torch.distributed.tensor import distribute_tensor

    # Each process cuts its part out; nothing is sent.
    whole = whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def gathered(content: Any, *, keep: bool) -> Any:
    """Nested containers with all tensors whole, those gathered on the CPU, or None without ``keep``; collective."""
    if isinstance(content, dict):
        return {key: gathered(value, keep=keep) for key, value in content.items()}
    if isinstance(content, list):
        return [gathered(value, keep=keep) for value in content]
    if not isinstance(content, Tensor) or not is_sharded(content):
        return content
    whole = content.full_tensor()  # type: ignore[attr-defined]
    return whole.cpu() if keep else None
