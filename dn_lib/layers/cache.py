"""What a layer remembers between calls, an object that wrappers of a model hand on uncopied."""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """What one layer keeps between calls: tensors by name, and how far the sequences have come.

    Neither a dict nor a dataclass, on purpose. Wrappers that move or cast a module's arguments (DDP, FSDP2 with
    mixed precision) rebuild both kinds, and what a layer wrote into the copy would be lost. They pass an object
    that they don't know as it is.

        >>> from dn_lib.layers.delta_net import DeltaNet
        >>> cache = LayerCache()
        >>> _ = DeltaNet(width=32, heads=2, conv_size=0)(torch.randn(3, 5, 32), cache)
        >>> cache.batch_size, cache["state"].shape, cache.bytes()
        (3, torch.Size([3, 2, 16, 16]), 6144)
    """

    def __init__(self):
        self.batch_size: int | None = None  # of the first call, which all later ones must have
        self.position = 0  # of the next token, for the layers that rotate
        self._tensors: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.get(name)
        if tensor is None:
            raise KeyError(name)
        return tensor

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        kept = tensor.detach()
        self._tensors[name] = outside_graphs(kept) if torch.compiler.is_compiling() else kept

    def get(self, name: str) -> Tensor | None:
        """The tensor called `name`, or None."""
        tensor = self._tensors.get(name)
        if tensor is None or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return tensor
        # A tensor made in inference mode could neither be saved for a backward pass nor written to outside of it.
        if tensor.is_inference():
            tensor = self._tensors[name] = tensor.clone()
        return tensor

    def bytes(self) -> int:
        """The memory held by its tensors."""
        return sum(t.numel() * t.element_size() for t in self._tensors.values())


@torch.library.custom_op("dn_lib::outside_graphs", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def outside_graphs(x: Tensor) -> Tensor:
    """A copy that no CUDA graph owns.

    With mode="reduce-overhead" the results of a compiled model lie in memory that its next call overwrites, and a
    cache is read in the next call. The tag makes the compiler run this operator between its CUDA graphs.
    """
    return x.clone()


@outside_graphs.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)
