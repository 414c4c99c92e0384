"""`chunk_delta_rule` and `fused_recurrent_delta_rule`, with the signatures of flash-linear-attention's functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dn_lib.forms.common import check_channels, check_flag, scale_or_default
from dn_lib.ops.autograd import for_triton, through_recurrent
from dn_lib.ops.backend import resolve_backend
from dn_lib.ops.checks import (
    check_arguments,
    check_rank,
    check_scale_in_float32,
    check_values,
    checking,
    is_plain,
    size_of,
    wants_gradient,
)
from dn_lib.ops.delta import autocast_dtype, delta_rule
from dn_lib.ops.fla.common import check_cpu_copy, refuse_options


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`delta_rule` under the name and signature of flash-linear-attention's function: swap one import.

    Shapes as in `delta_rule`.  cu_seqlens_cpu is a copy of cu_seqlens; it is checked (its values where cu_seqlens
    is on the CPU too) and not needed: no length is read on the host.  chunk_size, which fla takes by keyword, is that
    of `delta_rule`.  Raises TypeError for an argument that neither function has, else errors as `delta_rule` does.

    >>> q = k = v = torch.eye(16)[None, :, None]
    >>> chunk_delta_rule(q, k, v, torch.ones(1, 16, 1))[0].shape
    torch.Size([1, 16, 1, 16])
    """
    chunk_size = options.pop("chunk_size", None)
    refuse_options("chunk_delta_rule", options)
    check_flag("use_qk_l2norm_in_kernel", use_qk_l2norm_in_kernel)
    check_cpu_copy(cu_seqlens, cu_seqlens_cpu)
    return delta_rule(
        q, k, v, beta, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        qk_l2norm=use_qk_l2norm_in_kernel, cu_seqlens=cu_seqlens, chunk_size=chunk_size,
    )  # fmt: skip


def fused_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The recurrent kernel under the name and signature of flash-linear-attention's function.

    Shapes as in `delta_rule`; beta None means ones.  A beta for each value channel, `[B, L, H, d_v]`, is refused.
    Where a gradient is wanted, inside torch.compile, and where there is no GPU, this is `delta_rule` itself.

    >>> q = k = v = torch.eye(16)[None, :, None]
    >>> fused_recurrent_delta_rule(q, k, v)[0].shape
    torch.Size([1, 16, 1, 16])
    """
    refuse_options("fused_recurrent_delta_rule", options)
    check_flag("use_qk_l2norm_in_kernel", use_qk_l2norm_in_kernel)
    check_flag("output_final_state", output_final_state)
    check_rank("q", q, 4, "four dimensions [B, L, H, d]")
    if beta is None:
        check_channels(q=q)
        beta = torch.ones_like(q[..., 0])
    if isinstance(beta, Tensor) and beta.ndim == 4:
        raise ValueError(
            f"beta must be [B, L, H]: one strength for each value channel, {size_of(beta)}, is not supported"
        )
    check_arguments(q, k, v, beta, initial_state, cu_seqlens, None, "auto")
    tensors = (q, k, v, beta, initial_state)
    triton = resolve_backend(*tensors, None, "auto") == "triton" and all(map(is_plain, tensors))
    if not triton or torch.compiler.is_compiling() or wants_gradient(*tensors):
        return chunk_delta_rule(
            q, k, v, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens
        )
    scale = scale_or_default(scale, q)
    check_scale_in_float32(scale)
    if checking.get():
        check_values(q, k, v, beta, initial_state, cu_seqlens, use_qk_l2norm_in_kernel)
    q, k, v = autocast_dtype(q, k, v)
    beta, initial_state = for_triton(beta), for_triton(initial_state)
    return through_recurrent(
        q, k, v, beta, scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel
    )
