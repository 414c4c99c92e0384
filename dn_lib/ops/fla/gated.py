"""The gated delta rule with the signatures of flash-linear-attention's functions.

What fla computes in its kernels beside the recurrence, the gate from a raw input and the sigmoid of beta, is a few
operations of PyTorch on `[B, L, H_v]` here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dn_lib.forms.common import check_flag, check_is_tensor, working_dtype
from dn_lib.ops.checks import check_rank, size_of
from dn_lib.ops.fla.common import check_cpu_copy, refuse_options, state_in, state_out
from dn_lib.ops.gated import family


def _gate(use_gate_in_kernel: bool, g: Tensor | None, A_log: Tensor | None, dt_bias: Tensor | None) -> Tensor | None:
    """-exp(A_log) softplus(g + dt_bias), or g itself where it is a log gate already."""
    check_flag("use_gate_in_kernel", use_gate_in_kernel)
    if not use_gate_in_kernel:
        return g
    heads: tuple[int, ...] = ()
    for name, x in (("g", g), ("A_log", A_log), ("dt_bias", dt_bias)):
        if name == "dt_bias" and x is None:
            continue
        check_is_tensor(name, x, "where use_gate_in_kernel is True")
        assert x is not None
        if name == "g":
            check_rank("g", x, 3, "three dimensions [B, L, H_v]")
            heads = (x.shape[2],)
        elif tuple(x.shape) != heads:
            raise ValueError(f"{name} must be [H_v] = {list(heads)} to match g, got {size_of(x)}")
    assert g is not None and A_log is not None
    dtype = working_dtype(g, A_log, dt_bias)
    raw = g.to(dtype) if dt_bias is None else g.to(dtype) + dt_bias.to(dtype)
    return -A_log.to(dtype).exp() * F.softplus(raw)


def _strength(beta: Tensor, use_beta_sigmoid_in_kernel: bool, allow_neg_eigval: bool) -> Tensor:
    """beta, or its sigmoid, or twice that."""
    check_flag("use_beta_sigmoid_in_kernel", use_beta_sigmoid_in_kernel)
    check_flag("allow_neg_eigval", allow_neg_eigval)
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise ValueError("allow_neg_eigval must be False where use_beta_sigmoid_in_kernel is: beta is taken as it is")
    check_is_tensor("beta", beta, "[B, L, H_v]")
    if beta.ndim == 4:
        raise ValueError(
            f"beta must be [B, L, H_v]: one strength for each value channel, {size_of(beta)}, is not supported"
        )
    if not use_beta_sigmoid_in_kernel:
        return beta
    return (2.0 if allow_neg_eigval else 1.0) * beta.to(working_dtype(beta)).sigmoid()


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: Any = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`gated_delta_rule` under the name and signature of flash-linear-attention's function: g before beta.

    use_gate_in_kernel, A_log `[H_v]` and dt_bias `[H_v]` (keywords): the log gate is -exp(A_log) softplus(g + dt_bias).
    use_beta_sigmoid_in_kernel: beta is sigmoid(beta), twice that with allow_neg_eigval.  state_v_first: states are
    `[N, H_v, d_v, d_k]`; the one returned is a view.  chunk_size is that of `gated_delta_rule`.  cu_seqlens_cpu and
    chunk_indices tell nothing that cu_seqlens does not, and are not needed.  cp_context is refused.
    Raises TypeError for an argument that neither function has, else errors as `gated_delta_rule` does.

    >>> q = k = v = torch.eye(16)[None, :, None]
    >>> one = torch.ones(1, 16, 1)
    >>> chunk_gated_delta_rule(q, k, v, -one, one)[0].shape
    torch.Size([1, 16, 1, 16])
    """
    gate = {name: options.pop(name, None) for name in ("A_log", "dt_bias")}
    raw, chunk_size = options.pop("use_gate_in_kernel", False), options.pop("chunk_size", None)
    refuse_options("chunk_gated_delta_rule", options)
    check_flag("use_qk_l2norm_in_kernel", use_qk_l2norm_in_kernel)
    if cp_context is not None:
        raise ValueError("cp_context must be None: dn_lib.parallel spreads a sequence over processes")
    check_cpu_copy(cu_seqlens, cu_seqlens_cpu)
    if chunk_indices is not None:
        check_is_tensor("chunk_indices", chunk_indices, "or None")
    g, beta = _log_gate(g, raw, gate), _strength(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    result = family(
        q, k, v, beta, g, scale, state_in(initial_state, k, v, state_v_first), output_final_state, cu_seqlens,
        use_qk_l2norm_in_kernel, chunk_size, "auto",
    )  # fmt: skip
    return state_out(result, state_v_first)


def _log_gate(g: Tensor, raw: bool, gate: dict[str, Tensor | None]) -> Tensor:
    log = _gate(raw, g, gate["A_log"], gate["dt_bias"])
    check_is_tensor("g", log, "[B, L, H_v]")
    assert log is not None
    return log


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The recurrent kernel of the family under the name and signature of flash-linear-attention's function.

    g `[B, L, H_v]` and gk `[B, L, H_v, d_k]` are log gates and add up; without both nothing is forgotten.  beta None
    means ones.  gv, a gate for each value channel, and a beta for each value channel are refused.  All else as in
    `chunk_gated_delta_rule`.  Where a gradient is wanted, inside torch.compile, with gk and where there is no GPU, this
    is `gated_delta_rule` itself.

    >>> q = k = v = torch.eye(16)[None, :, None]
    >>> fused_recurrent_gated_delta_rule(q, k, v, g=torch.zeros(1, 16, 1))[0].shape
    torch.Size([1, 16, 1, 16])
    """
    refuse_options("fused_recurrent_gated_delta_rule", options)
    check_flag("use_qk_l2norm_in_kernel", use_qk_l2norm_in_kernel)
    if gv is not None:
        raise ValueError("gv must be None: gates for value channels are not supported")
    check_rank("v", v, 4, "four dimensions [B, L, H, d]")
    beta = torch.ones_like(v[..., 0]) if beta is None else beta
    beta = _strength(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    g = _gate(use_gate_in_kernel, g, A_log, dt_bias)
    if gk is not None:
        check_rank("gk", gk, 4, "four dimensions [B, L, H_v, d_k]")
        if g is not None:
            check_rank("g", g, 3, "three dimensions [B, L, H_v]")
            if g.shape != gk.shape[:3]:
                raise ValueError(f"gk must be [B, L, H_v, d_k] to match g, {size_of(g)}, got {size_of(gk)}")
        g = gk if g is None else g[..., None] + gk
    result = family(
        q, k, v, beta, g, scale, state_in(initial_state, k, v, state_v_first), output_final_state, cu_seqlens,
        use_qk_l2norm_in_kernel, None, "auto", recurrent=True,
    )  # fmt: skip
    return state_out(result, state_v_first)
