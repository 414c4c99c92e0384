"""What several layers share: norms, activations, heads, and the checks of sizes."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dn_lib.forms.common import check_integer, check_tensors, l2_normalise, working_dtype


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean of x^2 + eps) * weight along the last dimension, in the dtype of x.

    Models are trained and published with norms in float32 and the rest in bfloat16. Then the wider dtype is computed
    in, and what comes out is rounded to that of x, which the next matrix product needs (fla's norms do the same).

        >>> RMSNorm(4)(torch.ones(2, 4, dtype=torch.bfloat16)).dtype
        torch.bfloat16
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        return F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps).to(x.dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "elu1": lambda x: F.elu(x) + 1,
    "identity": lambda x: x,
}


def l1_norm(x: Tensor) -> Tensor:
    """x / max(|x|_1, 1e-6) along the last dimension, computed in float32 at least."""
    check_tensors(x=x)
    wide = x.to(working_dtype(x))
    return (wide / wide.abs().sum(-1, keepdim=True).clamp(min=1e-6)).to(x.dtype)


def l2_norm(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-6) along the last dimension, computed in float32 at least."""
    check_tensors(x=x)
    return l2_normalise(x).to(x.dtype)


QK_NORMS: dict[str, Callable[[Tensor], Tensor]] = {"l2": l2_norm, "l1": l1_norm, "none": lambda x: x}


def check_choice(name: str, value: str, options: Collection[str]) -> str:
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}")
    return value


def head_dim_or_default(width: int, heads: int, head_dim: int | None) -> int:
    check_integer("width", width)
    check_integer("heads", heads)
    if head_dim is not None:
        check_integer("head_dim", head_dim)
    if head_dim is None and width % heads:
        raise ValueError(f"heads must divide width, got heads = {heads} and width = {width}; or set head_dim")
    return width // heads if head_dim is None else head_dim


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`[B, L, heads * d]` -> `[B, L, heads, d]`."""
    return x.unflatten(-1, (heads, -1))


def check_even(head_dim: int) -> int:
    if head_dim % 2:
        raise ValueError(f"head_dim must be even for this mixer, got {head_dim}")
    return head_dim
