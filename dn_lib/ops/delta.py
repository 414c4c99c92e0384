"""The operator `delta_rule`, and `decode_delta_rule`, which updates a state in place, one token at a time."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from dn_lib.forms.chunkwise import chunkwise_delta_rule, parallel_delta_rule
from dn_lib.forms.common import check_flag, check_is_tensor, l2_normalise, on_heads, scale_or_default, working_dtype
from dn_lib.forms.delta_rule import delta_rule_step, recurrent_delta_rule
from dn_lib.ops.autograd import decode_through_triton, through_triton
from dn_lib.ops.backend import choose_backend, resolve_backend
from dn_lib.ops.checks import (
    check_arguments,
    check_rank,
    check_tensor,
    check_values,
    checking,
    is_plain,
    refuse_gradients,
)


# --- The public functions ---------------------------------------------------------------------------------------
def _under_autocast(q: Tensor) -> bool:
    """Whether autocast is on where q lies; on "meta", which it does not know, it is not."""
    return q.device.type != "meta" and torch.is_autocast_enabled(q.device.type)


def autocast_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast q, k and v take its dtype, as a matrix product's operands do; beta and states keep theirs."""
    if _under_autocast(q):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if x.dtype != torch.float64 else x for x in (q, k, v))
    return q, k, v


def no_autocast(q: Tensor) -> contextlib.AbstractContextManager[Any]:
    """What follows computes in the dtypes that it was given: states and the triangular solve stay float32."""
    if _under_autocast(q):
        return torch.autocast(q.device.type, enabled=False)
    return contextlib.nullcontext()


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    qk_l2norm: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The delta rule over a sequence, the same function whatever the backend.

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = scale S_t^T q_t  (chapter 2, `eq-delta-recurrence`;
    Yang et al. 2024, transposed).  Keys should have norm 1 and beta lie in [0, 2]: beyond beta |k|^2 = 2 a
    state can grow without bound.  Keys rounded to 16 bits are only nearly of norm 1; where beta comes near 2 and keys
    repeat for thousands of tokens, pass qk_l2norm=True, which divides in float32.

    Args:
        q, k: `[B, L, H, d_k]`.  v: `[B, L, H, d_v]`.  One floating dtype; any strides; L may be 0.
        beta: `[B, L, H]`, the writing strength, any floating dtype.
        scale: of the output, a number; None means d_k^-0.5.
        initial_state: `[N, H, d_k, d_v]`, any floating dtype; None means zeros.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: N + 1 offsets, int32 or int64, on the same device: N sequences packed along L, with B = 1.
            Sequences may be empty.  Otherwise N = B.  They must rise from 0 to L, and are checked where that costs
            no wait: on a CPU, by the PyTorch forms, and within `checked()`.  The Triton kernels on a GPU take offsets
            as they are, clamped to 0 ... L and to the largest before them: nothing outside is read or written, and
            tokens of no sequence, as behind the last offset of a padded buffer, get zeros, outputs and gradients.
        qk_l2norm: divide each q and k by sqrt(|x|^2 + 1e-6), in float32, inside the kernels.
        chunk_size: of the chunkwise forms; None lets the backend choose.  Triton takes 16, 32 and 64.
        backend: "recurrent", "parallel", "chunkwise" (PyTorch, any device and dtype, differentiable any number
            of times) or "triton" (float32, bfloat16, float16; d_k and d_v up to 256; on a CPU through Triton's
            interpreter).  "auto" takes triton on a GPU and chunkwise elsewhere; for float64, and with one
            warning for heads wider than 256, it takes chunkwise on a GPU too; and inside torch.func transforms and
            forward-mode differentiation, for which the Triton kernels have no rule.

    Returns:
        o `[B, L, H, d_v]` in v's dtype, and the final state `[N, H, d_k, d_v]` in float32 (float64 where q, k and v
        are), or None.  The state never shares memory with initial_state.

    Float32 dots in Triton are full float32 (ieee) unless `torch.set_float32_matmul_precision` says otherwise; then
    they are TF32, whose operands the tensor cores cut off after 11 bits.
    In half precision Triton's errors are small against the terms that are summed, not against a sum that cancels: with
    one or two key channels little is soon left of a state, and some percent of the final state or of a gradient, even
    all of initial_state's where that is tiny, may be error (pass float32 there).  Triton's interpreter cuts bfloat16
    off where a GPU rounds, which makes errors several times larger.
    Under autocast q, k and v are cast to its dtype.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what it must be.
        RuntimeError: backend "triton" where it cannot run, inside a torch.func transform (vmap, grad, jvp, ...), in
            forward-mode differentiation, or a second derivative through it.

    >>> q = k = v = torch.eye(16)[None, :, None]
    >>> o, state = delta_rule(q, k, v, torch.ones(1, 16, 1), scale=1.0, output_final_state=True)
    >>> torch.equal(o, v), state.shape
    (True, torch.Size([1, 1, 16, 16]))
    """
    check_is_tensor("beta", beta, "[B, L, H]")
    check_arguments(q, k, v, beta, initial_state, cu_seqlens, chunk_size, backend)
    check_flag("output_final_state", output_final_state)
    check_flag("qk_l2norm", qk_l2norm)
    scale, chunk_size = scale_or_default(scale, q), None if chunk_size is None else int(chunk_size)
    if not torch.compiler.is_compiling() and checking.get():
        check_values(q, k, v, beta, initial_state, cu_seqlens, qk_l2norm)
    q, k, v = autocast_dtype(q, k, v)
    backend = resolve_backend(q, k, v, beta, initial_state, chunk_size, backend)
    if backend == "triton":
        return through_triton(
            q, k, v, beta, scale, initial_state, output_final_state, cu_seqlens, qk_l2norm, chunk_size
        )
    form = {
        "recurrent": recurrent_delta_rule,
        "parallel": parallel_delta_rule,
        "chunkwise": chunkwise_delta_rule,
    }
    options = {"chunk_size": chunk_size or 64} if backend == "chunkwise" else {}
    with no_autocast(q):
        o, state = on_heads(
            form[backend], q, k, v, beta, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens,
            qk_l2norm=qk_l2norm, **options,
        )  # fmt: skip
    return o, state if output_final_state else None


def decode_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    qk_l2norm: bool = False,
) -> Tensor:
    """One token of each sequence; `state` is updated in place.  Not differentiable: `delta_rule` is.

    Args:
        q, k: `[B, H, d_k]`.  v: `[B, H, d_v]`.  beta: `[B, H]`.
        state: `[B, H, d_k, d_v]`, contiguous, float32 (float64 with float64 inputs).
        scale, qk_l2norm: as in `delta_rule`.

    Returns: o `[B, H, d_v]` in v's dtype.
    Raises ValueError or TypeError, naming the argument, and RuntimeError where a gradient is asked for: of q, k, v or
    beta with gradients enabled, or inside a torch.func transform.  A backward through what used `state` before it was
    overwritten raises PyTorch's own error.

    >>> state = torch.zeros(1, 1, 16, 16)
    >>> x = torch.eye(16)[:1, None]
    >>> decode_delta_rule(x, x, x, torch.ones(1, 1), state, scale=1.0)[0, 0, :2], state[0, 0, 0, 0]
    (tensor([1., 0.]), tensor(1.))
    """
    for name, x, meaning in (("q", q, "[B, H, d_k]"), ("k", k, "[B, H, d_k]"), ("v", v, "[B, H, d_v]")):
        check_rank(name, x, 3, f"three dimensions {meaning}")
    check_tensor("beta", beta, tuple(q.shape[:2]), "[B, H]", q)
    check_tensor("state", state, (*q.shape[:2], q.shape[2], v.shape[2]), "[B, H, d_k, d_v]", q)
    check_flag("qk_l2norm", qk_l2norm)
    scale = scale_or_default(scale, q)
    q1, k1, v1, beta1 = q[:, None], k[:, None], v[:, None], beta[:, None]
    check_arguments(q1, k1, v1, beta1, state, None, None, "auto")
    if not torch.compiler.is_compiling() and checking.get():
        check_values(q1, k1, v1, beta1, state, None, qk_l2norm)
    dtype = working_dtype(q)
    if state.dtype != dtype or not state.is_contiguous():
        raise ValueError(f"state must be contiguous and {dtype}, got {state.dtype} with strides {state.stride()}")
    if state.is_neg() or not is_plain(state):
        raise ValueError(f"state must hold its own values, got {'a negative view' * state.is_neg() or type(state)}")
    compiling = torch.compiler.is_compiling()
    if not compiling and state.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError("state must not be made in inference mode to be updated outside of it: pass a clone")
    refuse_gradients(q=q, k=k, v=v, beta=beta)
    with torch.no_grad(), no_autocast(q):
        if choose_backend(q1, v1, None, "auto") == "triton":
            return decode_through_triton(q1, k1, v1, beta1, state, scale, qk_l2norm)[:, 0]
        if qk_l2norm:
            q, k = l2_normalise(q), l2_normalise(k)
        wide = q.to(dtype), k.to(dtype), v.to(dtype), beta.to(dtype)
        o, new = delta_rule_step(*wide, state, scale=scale)
        state.copy_(new)
        return o.to(v.dtype)
