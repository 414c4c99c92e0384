"""A model whose recurrent layers start as an attention that copies (Trockman et al. 2024)."""

from __future__ import annotations

from collections.abc import Collection

from dn_lib.layers.mimetic import MIMETIC, PARTS, mimetic_
from dn_lib.models.language_model import LanguageModel


def mimetic_initialisation(model: LanguageModel, parts: Collection[str] = PARTS) -> int:
    """Apply `dn_lib.layers.mimetic_` to every layer of the model that it takes; returns how many these are.

    Attention layers, feed-forward parts, norms and embeddings keep their weights. parts: as there. Raises TypeError for
    what is no `LanguageModel`, ValueError for unknown parts and where no layer can be set.

        >>> from dn_lib.models import ModelConfig
        >>> mimetic_initialisation(LanguageModel(ModelConfig(width=32, layers=4, hybrid="window")))
        2
    """
    if not isinstance(model, LanguageModel):
        raise TypeError(f"model must be a LanguageModel, got {type(model).__name__}")
    mixers = [m for m in model.modules() if isinstance(m, MIMETIC)]
    if not mixers:
        raise ValueError(f"model must have a recurrent layer that can be set, got {', '.join(model.config.mixers())}")
    for mixer in mixers:
        mimetic_(mixer, parts)
    return len(mixers)
