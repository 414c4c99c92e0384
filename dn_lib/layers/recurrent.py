"""What mixers with a state of fixed size share: projections, convolutions, the cached state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dn_lib.forms.common import check_flag, check_integer, check_positive
from dn_lib.layers.cache import LayerCache
from dn_lib.layers.common import ACTIVATIONS, QK_NORMS, RMSNorm, check_choice, head_dim_or_default, split_heads
from dn_lib.layers.documents import Documents
from dn_lib.layers.registry import Mixer
from dn_lib.layers.short_convolution import ShortConvolution
from dn_lib.ops.backend import BACKENDS


class RecurrentMixer(Mixer):
    """What DeltaNet, Gated DeltaNet, linear attention, RetNet and GLA share: projections and convolutions before the
    recurrence; a norm per head, an optional gate and the output projection after it.

    There are `value_heads` heads of values, `heads` if None; value head h reads key head h // (value_heads / heads).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        *,
        conv_size: int,
        output_gate: bool,
        norm_eps: float,
        steps: int = 1,
        value_heads: int | None = None,
    ):
        super().__init__()
        check_integer("conv_size", conv_size, least=0)
        check_integer("steps", steps)
        check_flag("output_gate", output_gate)
        check_positive("norm_eps", norm_eps)
        self.width, self.heads, self.steps = width, heads, steps
        self.value_heads = heads if value_heads is None else value_heads
        check_integer("value_heads", self.value_heads)
        if self.value_heads % heads:
            raise ValueError(f"value_heads must be a multiple of heads = {heads}, got {value_heads}")
        self.key_dim, self.value_dim = key_dim, value_dim
        values = self.value_heads * value_dim
        sizes = {"query": heads * key_dim, "key": steps * heads * key_dim, "value": steps * values}
        for name, size in sizes.items():
            setattr(self, name, nn.Linear(width, size, bias=False))
            setattr(self, f"{name}_conv", ShortConvolution(size, conv_size) if conv_size else None)
        self.gate = nn.Linear(width, values, bias=False) if output_gate else None
        self.norm = RMSNorm(value_dim, eps=norm_eps)
        self.output = nn.Linear(values, width, bias=False)

    def _project(self, name: str, x: Tensor, cache: LayerCache | None, documents: Documents | None) -> Tensor:
        y, convolution = getattr(self, name)(x), getattr(self, f"{name}_conv")
        return y if convolution is None else convolution(y, cache, f"{name}_conv", cu_seqlens=documents)

    def _heads_of(self, x: Tensor, cache: LayerCache | None, documents: Documents | None) -> list[Tensor]:
        """q, k, v `[B, L, H, d]`."""
        heads = {"query": self.heads, "key": self.heads, "value": self.value_heads}
        return [split_heads(self._project(name, x, cache, documents), count) for name, count in heads.items()]

    def _finish(self, o: Tensor, x: Tensor) -> Tensor:
        """o `[B, L, H_v, d_v]` -> `[B, L, width]`."""
        o = self.norm(o.to(self.norm.weight.dtype)).to(x.dtype)
        if self.gate is not None:
            o = o * F.silu(split_heads(self.gate(x), self.value_heads))
        return self.output(o.flatten(-2))


class MultiStepMixer(RecurrentMixer):
    """What DeltaNet and linear attention share: an activation and a norm for q and k, and `steps` writes per token."""

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int | None = None,
        *,
        activation: str = "silu",
        qk_norm: str = "l2",
        conv_size: int = 4,
        output_gate: bool = False,
        norm_eps: float = 1e-5,
        steps: int = 1,
        backend: str = "auto",
    ):
        head_dim = head_dim_or_default(width, heads, head_dim)
        super().__init__(
            width,
            heads,
            head_dim,
            head_dim,
            conv_size=conv_size,
            output_gate=output_gate,
            norm_eps=norm_eps,
            steps=steps,
        )
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        self.qk_norm = check_choice("qk_norm", qk_norm, QK_NORMS)
        self.backend = check_choice("backend", backend, BACKENDS)

    def _query_key_value(
        self, x: Tensor, cache: LayerCache | None, documents: Documents | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v `[B, steps L, H, d]`, a token's steps one after the other; q, k not normalised."""
        activation = ACTIVATIONS[self.activation]
        q, k, v = (self._project(name, x, cache, documents) for name in ("query", "key", "value"))
        # Only a token's last step is read, so what the earlier ones are asked does not matter.
        q = activation(split_heads(q, self.heads)).repeat_interleave(self.steps, dim=1)
        return q, self._split_steps(activation(k)), self._split_steps(F.silu(v))

    def _split_steps(self, x: Tensor) -> Tensor:
        """`[B, L, steps H d]` -> `[B, steps L, H, d]`."""
        return x.unflatten(-1, (self.steps, self.heads, -1)).flatten(1, 2)


def multi_step_options(config: Any) -> dict[str, Any]:
    """The options of `MultiStepMixer` that a `ModelConfig` sets."""
    same_name = ("activation", "qk_norm", "conv_size", "norm_eps", "backend")
    own = {"steps": config.delta_steps, "output_gate": bool(config.output_gate)}
    return {name: getattr(config, name) for name in same_name} | own


def run_operator(
    operator: Callable[..., tuple[Tensor, Tensor | None]],
    tensors: Sequence[Tensor],
    cache: LayerCache | None,
    documents: Documents | None,
    *,
    steps: int = 1,
    **options: Any,
) -> Tensor:
    """o of `operator(*tensors, **options)`, one of `dn_lib.ops`, between reading the cached state and writing it.

    A token has `steps` rows.
    """
    o, state = operator(
        *tensors,
        initial_state=None if cache is None else cache.get("state"),
        output_final_state=cache is not None,
        cu_seqlens=None if documents is None else documents.offsets * steps,
        **options,
    )
    if cache is not None and state is not None:
        cache["state"] = state
    return o


def run_recurrence(
    recurrence: Callable[..., tuple[Tensor, Tensor]],
    sequences: Sequence[Tensor],
    cache: LayerCache | None,
    documents: Documents | None,
) -> Tensor:
    """The same for `recurrence(*sequences, state) -> (o, state)`, which knows no packed documents.

    Time is axis 1 of all sequences and of o. Documents go through one by one, each from an empty state.
    """
    if documents is None:
        o, state = recurrence(*sequences, None if cache is None else cache.get("state"))
    else:
        parts = [recurrence(*(t[:, begin:end] for t in sequences), None) for begin, end in documents.bounds()]
        o, state = (torch.cat(part, dim) for part, dim in zip(zip(*parts, strict=True), (1, 0), strict=True))
    if cache is not None:
        cache["state"] = state
    return o
