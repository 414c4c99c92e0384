"""What a model remembers between calls: one cache a layer, and the position."""

from __future__ import annotations

from dn_lib.layers.cache import LayerCache


class Cache:
    """What a model keeps between calls: `layers`, a `LayerCache` each, and `length`, the tokens seen so far (of the
    longest sequence, if they differ).

    >>> import torch
    >>> from dn_lib.models import ModelConfig
    >>> from dn_lib.models import LanguageModel
    >>> model = LanguageModel(ModelConfig(width=32, layers=1, heads=1, conv_size=0))
    >>> cache = model.new_cache(batch_size=1)
    >>> sizes = [model(torch.zeros(1, n, dtype=torch.long), cache) is None or cache.bytes() for n in (5, 50)]
    >>> sizes  # one 32 x 32 state in float32, however long the context
    [4096, 4096]
    """

    def __init__(self, batch_size: int, layers: int):
        self.batch_size = batch_size
        self.length = 0
        self.layers = [LayerCache() for _ in range(layers)]

    def bytes(self) -> int:
        """The memory held by all its tensors."""
        return sum(layer.bytes() for layer in self.layers)
