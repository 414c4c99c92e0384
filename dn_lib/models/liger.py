"""A trained Transformer made recurrent, with its own weights (Lan et al. 2025)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import torch

from dn_lib.forms.common import check_integer, is_integer
from dn_lib.models.language_model import LanguageModel


def to_liger(
    model: LanguageModel, *, window: int = 64, keep: Collection[int] = (), backend: str = "auto"
) -> LanguageModel:
    """A copy of `model` whose layers of full attention are `Liger` layers with the same projections.

    Every parameter is carried over and none is added, so its memory per token is constant from the first step on, and
    it answers differently from the Transformer at first: a short training (the paper: LoRA, 0.02 billion tokens) mends
    what it can. Within the first tokens of a sequence the window's half is what the Transformer computed.

    model: a `LanguageModel` with layers "attention"; other layers are copied.  window: of the new layers, which is also
    that of layers "window" and must therefore agree with theirs.  keep: numbers of the attention layers, counted from
    0, that stay as they are.  Dtype and device are kept.
    Raises TypeError for what is no `LanguageModel`; ValueError, naming the argument, where nothing is to be converted.

        >>> from dn_lib.models import ModelConfig
        >>> transformer = LanguageModel(ModelConfig(width=32, layers=2, heads=2, mixer="attention"))
        >>> to_liger(transformer, window=8, keep=(1,)).config.mixers()
        ('liger', 'attention')
    """
    if not isinstance(model, LanguageModel):
        raise TypeError(f"model must be a LanguageModel, got {type(model).__name__}")
    check_integer("window", window)
    names = model.config.mixers()
    if "window" in names and window != model.config.window:
        raise ValueError(f"window must be {model.config.window} like the model's window layers, got {window}")
    wrong = [n for n in keep if not is_integer(n) or not 0 <= n < len(names) or names[n] != "attention"]
    if wrong:
        raise ValueError(f"keep must hold numbers of attention layers of {', '.join(names)}, got {wrong[0]}")
    pattern = tuple("liger" if name == "attention" and n not in keep else name for n, name in enumerate(names))
    if "liger" not in pattern or pattern == names:
        raise ValueError(f"model must have attention layers to convert, got {', '.join(names)}, keep {list(keep)}")
    config = dataclasses.replace(model.config, hybrid="none", pattern=pattern, window=window, backend=backend)
    reference = next(model.parameters())
    with torch.random.fork_rng(devices=[]):  # building draws weights that are replaced at once
        converted = LanguageModel(config).to(reference.device, reference.dtype)
    converted.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    for own, theirs in zip(converted.parameters(), model.parameters(), strict=True):
        own.requires_grad_(theirs.requires_grad)
    return converted.train(model.training)
