"""Linear attention, with and without gates, with the signatures of flash-linear-attention's functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dn_lib.forms.common import check_integer
from dn_lib.ops.checks import check_rank, size_of
from dn_lib.ops.fla.common import check_cpu_copy, refuse_options, state_in, state_out
from dn_lib.ops.gated import linear_attention, retention_gates


def _unerased(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    state_v_first: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    result = linear_attention(
        q, k, v, g, scale=scale, initial_state=state_in(initial_state, k, v, state_v_first),
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, chunk_size=chunk_size,
    )  # fmt: skip
    return state_out(result, state_v_first)


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`linear_attention` under the name and signature of flash-linear-attention's function.

    g `[B, L, H_v]` is a log gate per token, g_gamma `[H_v]` one fixed in time; they add up, and without both nothing is
    forgotten.  All else as in `chunk_gated_delta_rule`.

    >>> q = k = v = torch.eye(16)[None, :, None]
    >>> chunk_simple_gla(q, k, v, g_gamma=torch.tensor([-0.5]))[0].shape
    torch.Size([1, 16, 1, 16])
    """
    chunk_size = options.pop("chunk_size", None)
    refuse_options("chunk_simple_gla", options)
    check_cpu_copy(cu_seqlens, cu_seqlens_cpu)
    if g is not None:
        check_rank("g", g, 3, "three dimensions [B, L, H_v]")
    if g_gamma is not None:
        check_rank("g_gamma", g_gamma, 1, "one dimension [H_v]")
        check_rank("v", v, 4, "four dimensions [B, L, H, d]")
        if g_gamma.shape[0] != v.shape[2]:
            raise ValueError(f"g_gamma must be [H_v] = [{v.shape[2]}], got {size_of(g_gamma)}")
        g = g_gamma if g is None else g + g_gamma
    return _unerased(
        q, k, v, g, scale, initial_state, output_final_state, state_v_first, cu_seqlens, chunk_size
    )  # fmt: skip


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Retention, with the decay 1 - 2^(-5-h) in head h, counted from 0, under flash-linear-attention's signature.

    Source: Sun et al. (2023), RetNet.  The options are those of `chunk_simple_gla`.

    >>> q = k = v = torch.eye(16)[None, :, None]
    >>> chunk_retention(q, k, v)[0].shape
    torch.Size([1, 16, 1, 16])
    """
    chunk_size = options.pop("chunk_size", None)
    refuse_options("chunk_retention", options)
    check_rank("v", v, 4, "four dimensions [B, L, H, d]")
    g = retention_gates(v.shape[2], v.device)
    return _unerased(q, k, v, g, scale, initial_state, output_final_state, False, cu_seqlens, chunk_size)


def chunk_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Lightning Attention with the decays that flash-linear-attention gives it, under its signature.

    The log decay of head h, counted from 0, is -(8 h / H) (1 - layer_idx / num_layers), as in TransNormerLLM; head 0
    forgets nothing.  The options are those of `chunk_simple_gla`.

    >>> q = k = v = torch.eye(16)[None, :, None]
    >>> chunk_lightning_attn(q, k, v, layer_idx=0, num_layers=2)[0].shape
    torch.Size([1, 16, 1, 16])
    """
    chunk_size = options.pop("chunk_size", None)
    refuse_options("chunk_lightning_attn", options)
    check_integer("layer_idx", layer_idx, least=0)
    check_integer("num_layers", num_layers)
    if layer_idx > num_layers:
        raise ValueError(f"layer_idx must be at most num_layers = {num_layers}, got {layer_idx}")
    check_rank("v", v, 4, "four dimensions [B, L, H, d]")
    H = v.shape[2]
    slope = 8 / max(H, 1) * (1 - layer_idx / num_layers)
    g = -slope * torch.arange(H, device=v.device, dtype=torch.float32)
    return _unerased(q, k, v, g, scale, initial_state, output_final_state, False, cu_seqlens, chunk_size)


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`linear_attention` with a log gate g `[B, L, H, d_k]` for each key channel, under flash-linear-attention's
    signature.  All else as in `chunk_gated_delta_rule`.

    >>> q = k = v = torch.eye(16)[None, :, None]
    >>> chunk_gla(q, k, v, -k)[0].shape
    torch.Size([1, 16, 1, 16])
    """
    check_rank("g", g, 4, "four dimensions [B, L, H, d_k]")
    check_cpu_copy(cu_seqlens, cu_seqlens_cpu)
    return _unerased(q, k, v, g, scale, initial_state, output_final_state, state_v_first, cu_seqlens)
