"""The models that chapter 6 compares and takes apart: a configuration, and what no configuration can say.

Some parts have no setting in `ModelConfig`, since nobody would want a model without them, or since a model so changed
could not generate with a cache: these are changed on the finished model (`EDITS`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dn_lib.layers.attention import Attention
from dn_lib.layers.common import RMSNorm
from dn_lib.layers.short_convolution import ShortConvolution
from dn_lib.models import LanguageModel, ModelConfig

TAPS = 4


class GainAlone(nn.Module):
    """What is left of an RMSNorm when nothing is divided by the size: the gain."""

    def __init__(self, norm: RMSNorm):
        super().__init__()
        self.weight = norm.weight

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Always(nn.Module):
    """The same number for every token and head, whatever the token is."""

    def __init__(self, value: float, features: int):
        super().__init__()
        self.value, self.features = value, features

    def forward(self, x: Tensor) -> Tensor:
        return x.new_full((*x.shape[:-1], self.features), self.value)


def without_output_norm(model: LanguageModel) -> None:
    """The output of each head goes on as it is, times the norm's gain."""
    for block in model.blocks:
        if isinstance(norm := getattr(block.mixer, "norm", None), RMSNorm):
            block.mixer.norm = GainAlone(norm)


def with_beta_one(model: LanguageModel) -> None:
    """beta is 1 for every token: the sigmoid of 30, which float32 cannot tell from 1."""
    for block in model.blocks:
        mixer: Any = block.mixer
        if isinstance(beta := getattr(mixer, "beta", None), nn.Linear):
            mixer.beta = Always(30.0, beta.out_features)


def with_convolutions(model: LanguageModel) -> None:
    """Attention gets the convolutions that a DeltaNet layer has: behind the maps to q, k and v, before the positions.

    For training and for measuring whole texts. Not for a cache, which would have to keep the convolutions' past.
    """
    for block in model.blocks:
        mixer = block.mixer
        if isinstance(mixer, Attention):
            for name in ("query", "key", "value"):
                linear = getattr(mixer, name)
                convolution = ShortConvolution(linear.out_features, TAPS).to(linear.weight.device)
                mixer.add_module(name, nn.Sequential(linear, convolution))


EDITS: dict[str, Callable[[LanguageModel], None]] = {
    "no output norm": without_output_norm,
    "beta = 1": with_beta_one,
    "convolutions in attention": with_convolutions,
}


@dataclass(frozen=True)
class Kind:
    """A model, told by its fields of `ModelConfig` and by its `edits`, keys of `EDITS`.

    caches: whether it can generate with a cache.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    edits: tuple[str, ...] = ()

    @property
    def caches(self) -> bool:
        return "convolutions in attention" not in self.edits

    def build(self, **shape: Any) -> LanguageModel:
        """The model at the sizes `shape`, which the kind's own fields go before."""
        model = LanguageModel(ModelConfig(**(shape | self.fields)))
        for edit in self.edits:
            EDITS[edit](model)
        return model

    def differences(self, other: Kind, **shape: Any) -> set[str]:
        """What is not the same in two kinds of one shape: fields of the configuration, edits, and "convolution"."""
        ours, theirs = (kind.told(**shape) for kind in (self, other))
        return {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}

    def told(self, **shape: Any) -> dict[str, Any]:
        """All that this kind is, with one word for the convolution, which attention has by an edit and others by a
        field."""
        fields = ModelConfig(**(shape | self.fields)).to_dict()
        taps = fields.pop("conv_size")
        if fields["mixer"] in ("attention", "window"):
            taps = 0 if self.caches else TAPS
        edits = {edit: True for edit in self.edits if edit != "convolutions in attention"}
        return fields | edits | {"convolution": taps}


# Alike in width, depth, heads and feed-forward part. Of Gated DeltaNet the gate alone: as published it also has values
# twice as wide and a gate on its output, which would be a second and a third change.
COMPARED: dict[str, Kind] = {
    "window hybrid": Kind({"mixer": "delta", "hybrid": "window"}),
    "global hybrid": Kind({"mixer": "delta", "hybrid": "global"}),
    "DeltaNet": Kind({"mixer": "delta"}),
    "gated DeltaNet": Kind({"mixer": "gated_delta", "expand_v": 1.0, "output_gate": False}),
    "Transformer": Kind({"mixer": "attention"}),
    "Transformer, convolutions": Kind({"mixer": "attention"}, ("convolutions in attention",)),
}


def parameters(kind: Kind, **shape: Any) -> int:
    """How many numbers a model of `kind` has; nothing is allocated."""
    with torch.device("meta"):
        return kind.build(**shape).num_parameters()
