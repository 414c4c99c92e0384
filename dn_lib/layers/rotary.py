"""Rotary positions (Su et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from dn_lib.forms.common import check_positive, check_tensors, describe, is_integer, working_dtype


def rotary_embedding(x: Tensor, start: int | Tensor = 0, base: float = 10000.0) -> Tensor:
    """Rotate pairs (x_i, x_{i + d/2}) of `[B, L, H, d]` by the angle position * base^(-2i/d), d even.

    The first row has position `start`, or row t has `start[t]` where it is a tensor `[L]`, so that q_i . k_j
    depends on i - j alone. Raises ValueError for other shapes and for an odd d. Source: Su et al. 2024.

        >>> x = torch.randn(1, 4, 1, 8)
        >>> torch.allclose(rotary_embedding(x)[:, 1:], rotary_embedding(x[:, 1:], start=1), atol=1e-6)
        True
    """
    check_tensors(x=x)
    if x.dim() != 4 or x.shape[-1] % 2:
        raise ValueError(f"x must be [B, L, H, d] with d even, got {list(x.shape)}")
    check_positive("base", base)
    if not isinstance(start, Tensor):
        if not is_integer(start):
            raise TypeError(f"start must be a whole number or a tensor [L], got {describe(start)}")
        start = torch.arange(start, start + x.shape[1], device=x.device)
    elif start.shape != (x.shape[1],):
        raise ValueError(f"start must be a number or [L] = [{x.shape[1]}], got {list(start.shape)}")
    dtype = working_dtype(x)
    cos, sin = _rotations(start, x.shape[-1], base, dtype)
    a, b = x.to(dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


@torch.library.custom_op("dn_lib::rotations", mutates_args=())
def _rotations(positions: Tensor, d: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles of the positions `[L]`: `[L, 1, d/2]` each, the same for every head.

    An operator of its own, since a compiler would compute them anew for every sequence and head, where they are used.
    """
    frequency = base ** (-torch.arange(0, d, 2, device=positions.device, dtype=dtype) / d)
    angle = (positions.to(dtype)[:, None] * frequency)[:, None, :]
    return angle.cos(), angle.sin()


@_rotations.register_fake
def _(positions: Tensor, d: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cos = positions.new_empty(positions.shape[0], 1, (d + 1) // 2, dtype=dtype)
    return cos, torch.empty_like(cos)
