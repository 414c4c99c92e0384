"""The mixers by name: every file of a mixer registers what it makes, and models build by that name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dn_lib.forms.common import describe
from dn_lib.layers.cache import LayerCache
from dn_lib.layers.documents import Documents


class Mixer(nn.Module):
    """What a block of a model asks of the layer that mixes its positions.

    `mixer(x, cache=None, *, cu_seqlens=None) -> y`, with x and y `[B, L, width]`. The class has no parameters and
    computes nothing: it names the four things that a new mixer has or inherits.
    """

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, *, cu_seqlens: Tensor | Documents | None = None
    ) -> Tensor:
        raise NotImplementedError

    def state_flops(self, length: int) -> float:
        """Forward operations per token of the mixing itself, in sequences of `length` tokens."""
        raise NotImplementedError

    def place(self, layer: int, layers: int) -> None:
        """Called by a model that was built: this is layer `layer` of `layers`, counted from 0. Nothing, here."""

    def reset_own_parameters(self) -> None:
        """Called after a model has drawn all linear weights anew, for what needs another start. Nothing, here."""


@dataclass(frozen=True)
class MixerKind:
    """A registered mixer: how it is made from a model's configuration, and what it asks of it.

    `build` takes a `dn_lib.models.ModelConfig`. (Layers know nothing of models, so its type is not named here.)
    `heads` are the fields that may give the number of heads, of which the first that is set counts; none for a mixer
    without heads. `even`: the size of a head must be even.
    """

    name: str
    build: Callable[[Any], Mixer]
    heads: tuple[str, ...] = ("heads",)
    even: bool = False


_KINDS: dict[str, MixerKind] = {}


def register_mixer(
    name: str, *, heads: tuple[str, ...] = ("heads",), even: bool = False
) -> Callable[[Callable[[Any], Mixer]], Callable[[Any], Mixer]]:
    """Register the decorated function, which takes a ModelConfig and returns the layer, as the mixer `name`.

    `heads` and `even` as in `MixerKind`. Raises ValueError for a name that is taken.

        >>> @register_mixer("delta")
        ... def build(config): ...
        Traceback (most recent call last):
        ValueError: name must be new, 'delta' is registered
    """
    if name in _KINDS:
        raise ValueError(f"name must be new, {name!r} is registered")

    def register(build: Callable[[Any], Mixer]) -> Callable[[Any], Mixer]:
        _KINDS[name] = MixerKind(name, build, heads, even)
        return build

    return register


def mixer_names() -> tuple[str, ...]:
    """The names of all registered mixers, in the order in which they were registered.

    >>> mixer_names()[:4]
    ('delta', 'linear', 'retnet', 'gla')
    """
    return tuple(_KINDS)


def mixer_kind(name: str) -> MixerKind:
    """The mixer registered as `name`. Raises ValueError, listing those known, for another name.

    >>> mixer_kind("gla").even
    True
    """
    if not isinstance(name, str) or name not in _KINDS:
        raise ValueError(f"name must be one of {', '.join(_KINDS)}, got {describe(name)}")
    return _KINDS[name]
