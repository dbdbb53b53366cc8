"""The repeated blocks of a network: what is recomputed as a whole, and what layer-wise settings count as a layer."""

from torch import nn


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The blocks of any backbone in the order in which they were registered, which is the order of their use.

    They are the innermost elements of ``nn.Sequential`` or ``nn.ModuleList`` whose elements are alike and have parts of
    their own: the bottlenecks of a ResNet, the blocks of a ViT, those of all stages of a Swin. Empty where a network
    repeats nothing.
    """
    inner = [blocks_of(child) for child in network.children()]
    if not _is_list_of_blocks(network):
        return [block for found in inner for block in found]
    return [block for child, found in zip(network.children(), inner, strict=True) for block in found or [child]]


def _is_list_of_blocks(module: nn.Module) -> bool:
    elements = list(module.children())
    return (
        isinstance(module, nn.Sequential | nn.ModuleList)
        and len(elements) > 1
        and len({type(element) for element in elements}) == 1
        and not isinstance(elements[0], nn.Sequential)
        and all(list(element.children()) and list(element.parameters()) for element in elements)
    )
