"""`gated_delta_rule` and `linear_attention`: the delta rule's relatives, by the same kernels with two switches.

Is there an erasure, and is there a gate?  Gates are given by their logarithms, g <= 0, so that the ratios in a chunk
are differences: one per token and head, a fixed one per head, or one per token and key channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dn_lib.forms.chunkwise import chunkwise_delta_rule, parallel_delta_rule
from dn_lib.forms.common import check_flag, check_is_tensor, on_heads, scale_or_default
from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.forms.derivatives import active_transform
from dn_lib.forms.gated import (
    chunkwise_gated_delta_rule,
    chunkwise_gated_linear_attention,
    parallel_gated_delta_rule,
    parallel_gated_linear_attention,
    recurrent_gated_delta_rule,
    recurrent_gated_linear_attention,
)
from dn_lib.forms.linear_attention import (
    chunkwise_linear_attention,
    parallel_linear_attention,
    recurrent_linear_attention,
)
from dn_lib.ops.autograd import for_triton, through_recurrent, through_triton
from dn_lib.ops.backend import resolve_backend
from dn_lib.ops.checks import (
    check_arguments,
    check_log_gates,
    check_scale_in_float32,
    check_tensor,
    check_values,
    checking,
    is_plain,
    size_of,
    wants_gradient,
)
from dn_lib.ops.delta import autocast_dtype, no_autocast
from dn_lib.ops.gla import through_gla

# By whether something is erased, and whether there are gates.
_FORMS = {
    (True, True): {
        "recurrent": recurrent_gated_delta_rule,
        "parallel": parallel_gated_delta_rule,
        "chunkwise": chunkwise_gated_delta_rule,
    },
    (True, False): {
        "recurrent": recurrent_delta_rule,
        "parallel": parallel_delta_rule,
        "chunkwise": chunkwise_delta_rule,
    },
    (False, True): {
        "recurrent": recurrent_gated_linear_attention,
        "parallel": parallel_gated_linear_attention,
        "chunkwise": chunkwise_gated_linear_attention,
    },
    (False, False): {
        "recurrent": recurrent_linear_attention,
        "parallel": parallel_linear_attention,
        "chunkwise": chunkwise_linear_attention,
    },
}


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    qk_l2norm: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The delta rule with a gate that forgets, the same function whatever the backend.

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = scale S_t^T q_t  (chapter 2,
    `eq-gated-delta`).  With a gate for each key channel, Diag(exp g_t) stands for exp(g_t): the state decays, and then
    token t erases.  Sources: Yang, Kautz and Hatamizadeh (2025), Gated DeltaNet; Kimi Team (2025), Kimi Linear.

    Args:
        q, k: `[B, L, H, d_k]`.  v: `[B, L, H_v, d_v]`.  H_v is a multiple of H; value head h reads key head
            h // (H_v / H).
        beta: `[B, L, H_v]`.
        g: logarithms of the gates, at most 0; -inf is a gate of zero, which resets the state.  `[B, L, H_v]`; `[H_v]`
            for a fixed decay; or `[B, L, H_v, d_k]`, one for each key channel, which the Triton kernels take without
            erasure only (`linear_attention`).  Its values are checked where that costs no wait: on a CPU, and within
            `checked()`.
        initial_state: `[N, H_v, d_k, d_v]`.
        all else as in `delta_rule`.

    Returns and raises as `delta_rule` does.

    >>> q = k = v = torch.eye(16)[None, :, None]
    >>> one = torch.ones(1, 16, 1)
    >>> o, _ = gated_delta_rule(q, k, v, one, torch.full((1,), 0.5).log(), scale=1.0)
    >>> torch.equal(o, v)
    True
    """
    check_is_tensor("beta", beta, "[B, L, H_v]")
    check_is_tensor("g", g, "[B, L, H_v], [H_v] or [B, L, H_v, d_k]")
    return family(
        q, k, v, beta, g, scale, initial_state, output_final_state, cu_seqlens, qk_l2norm, chunk_size, backend
    )


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    qk_l2norm: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Linear attention, with or without a gate: `gated_delta_rule` without erasure.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t; g None means gates of one.  A fixed g is retention
    (RetNet) and Lightning Attention; one per token, Mamba-2's recurrence with k scaled by its step; one per channel,
    GLA.
    No feature map and no normaliser (chapter 1 has both).

    Args: as in `gated_delta_rule`; there is no beta.  Returns and raises as `delta_rule` does.

    >>> q = k = v = torch.eye(16)[None, :, None]
    >>> o, state = linear_attention(q, k, v, scale=1.0, output_final_state=True)
    >>> torch.equal(o, v), torch.equal(state[0, 0], torch.eye(16))
    (True, True)
    """
    return family(
        q, k, v, None, g, scale, initial_state, output_final_state, cu_seqlens, qk_l2norm, chunk_size, backend
    )


def retention_gates(heads: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """log(1 - 2^(-5-h)) for head h, `[H]`: RetNet's decays.

    >>> retention_gates(2).exp().tolist()
    [0.96875, 0.984375]
    """
    return torch.log1p(-(2.0 ** (-5 - torch.arange(heads, device=device, dtype=dtype))))


def _gates(g: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor | None, bool]:
    """g as `[B, L, H_v]` or `[B, L, H_v, d_k]`, and whether it is the latter.  Raises naming g."""
    if g is None or not isinstance(k, Tensor) or not isinstance(v, Tensor) or k.ndim != 4 or v.ndim != 4:
        return g, False  # `check_arguments` says what is wrong
    check_is_tensor("g", g, "[B, L, H_v], [H_v] or [B, L, H_v, d_k]")
    B, L, _, K = k.shape
    H = v.shape[2]
    if g.ndim == 1:
        check_tensor("g", g, (H,), "[H_v]", k)
        return g.expand(B, L, H), False
    if g.ndim == 4:
        check_tensor("g", g, (B, L, H, K), "[B, L, H_v, d_k]", k, over_time=True)
        return g, True
    if g.ndim != 3:
        expected = f"[B, L, H_v] = {[B, L, H]}, [H_v] = {[H]} or [B, L, H_v, d_k] = {[B, L, H, K]}"
        raise ValueError(f"g must be {expected}, got {size_of(g)}")
    return g, False


def family(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    qk_l2norm: bool,
    chunk_size: int | None,
    backend: str,
    recurrent: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The whole family: without erasure where beta is None, without gates where g is.

    recurrent: whether Triton takes the recurrent kernel, whatever the length, where no gradient is wanted.
    """
    gates, by_channel = _gates(g, k, v)
    check_arguments(
        q, k, v, beta, initial_state, cu_seqlens, chunk_size, backend, None if by_channel else gates, grouped=True
    )
    check_flag("output_final_state", output_final_state)
    check_flag("qk_l2norm", qk_l2norm)
    if by_channel and beta is not None and backend == "triton":
        raise ValueError(
            "g must be [B, L, H_v] or [H_v] for backend 'triton', got one for each channel; use 'chunkwise'"
        )
    scale, chunk_size = scale_or_default(scale, q), None if chunk_size is None else int(chunk_size)
    if not torch.compiler.is_compiling():
        if checking.get():
            check_values(q, k, v, beta, initial_state, cu_seqlens, qk_l2norm, g)
        elif g is not None:
            _refuse_positive(g)
    q, k, v = autocast_dtype(q, k, v)
    backend = resolve_backend(q, k, v, beta, initial_state, chunk_size, backend, gates)
    if by_channel and beta is not None and backend == "triton":
        backend = "chunkwise"  # what auto takes where there is no kernel
    if backend == "triton":
        rest = output_final_state, cu_seqlens, qk_l2norm
        if by_channel and gates is not None:
            return through_gla(q, k, v, gates, scale, initial_state, *rest, chunk_size)
        if recurrent and _takes_recurrent(q, k, v, beta, gates, initial_state, cu_seqlens):
            check_scale_in_float32(scale)
            beta, gates, initial_state = for_triton(beta), for_triton(gates), for_triton(initial_state)
            return through_recurrent(q, k, v, beta, scale, initial_state, *rest, gates)
        return through_triton(q, k, v, beta, scale, initial_state, *rest, chunk_size, gates)
    if gates is None and v.shape[2] != k.shape[2]:  # the forms without gates know no groups
        q, k = (x.repeat_interleave(v.shape[2] // k.shape[2], 2) for x in (q, k))
    form = _FORMS[beta is not None, gates is not None][backend]
    options = {"chunk_size": chunk_size or 64} if backend == "chunkwise" else {}
    with no_autocast(q):
        o, state = on_heads(
            form, q, k, v, *(x for x in (beta, gates) if x is not None), scale=scale, initial_state=initial_state,
            cu_seqlens=cu_seqlens, qk_l2norm=qk_l2norm, **options,
        )  # fmt: skip
    return o, state if output_final_state else None


def _refuse_positive(g: Tensor) -> None:
    """Raise for a positive log gate where reading it costs no wait.  NaN is let through, as it is elsewhere."""
    if g.device.type == "cpu" and is_plain(g) and not active_transform(g) and (g.detach() > 0).any():
        check_log_gates(g.detach())


def _takes_recurrent(*tensors: Tensor | None) -> bool:
    return not torch.compiler.is_compiling() and not wants_gradient(*tensors) and all(map(is_plain, tensors))
