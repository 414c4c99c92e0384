"""Linear attention with a gate for each key channel, by the Triton kernels, as PyTorch sees it.

An autograd function for eager calls, and operators that torch.compile knows; `dn_lib.kernels.gla` computes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from dn_lib.forms.common import l2_normalise, working_dtype
from dn_lib.forms.derivatives import differentiable_once, refuse_transforms
from dn_lib.kernels.gla.plan import Plan, Saved, call_of, plan_call
from dn_lib.kernels.rules import default_chunk
from dn_lib.ops.autograd import check_offsets_on_cpu, chunk_of, dot_precision, for_triton
from dn_lib.ops.checks import check_arguments, check_scale_in_float32, check_tensor, is_plain, wants_gradient

_NAME = "linear_attention with backend 'triton'"
_TWICE = f"{_NAME} has no second derivative: use backend='chunkwise'"


# --- The eager path -----------------------------------------------------------------------------------------------
class _Gla(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        final_state: bool,
        plan: Plan,
    ) -> tuple[Tensor, Tensor | None]:
        from dn_lib.kernels.gla import launch

        o, state, saved = launch.forward(
            plan=plan, q=q, k=k, v=v, g=g, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens,
            final_state=final_state,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, g, initial_state, *cast(Saved, saved))
        ctx.plan, ctx.scale = plan, scale
        ctx.set_materialize_grads(False)
        return o, state

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        do, dstate = upstream
        refuse_transforms(_NAME, "use backend='chunkwise'", do, dstate)
        q, k, v, g, initial_state, *kept = ctx.saved_tensors
        with torch.no_grad():
            given = _run_backward(ctx.plan, q, k, v, g, initial_state, Saved(*kept), do, dstate, ctx.scale)
        inputs = q, k, v, g, initial_state, do, dstate
        return *differentiable_once(_TWICE, given, inputs), *(None,) * 4


def _run_backward(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    saved: Saved,
    do: Tensor | None,
    dstate: Tensor | None,
    scale: float,
) -> list[Tensor | None]:
    """[dq, dk, dv, dg, d initial_state], each in the dtype of its tensor."""
    from dn_lib.kernels.gla import launch

    found = launch.backward(
        plan=plan.for_backward(dot_precision()), q=q, k=k, v=v, g=g, saved=saved,
        do=torch.zeros_like(v) if do is None else do, dstate=dstate, scale=scale,
        initial_state=initial_state is not None,
    )  # fmt: skip
    first = found.initial_state
    return [*found[:4], None if first is None or initial_state is None else first.to(initial_state.dtype)]


# --- The same as operators, for torch.compile and for tensors that handle operators themselves --------------------
def _absent(x: Tensor) -> bool:
    """Operators return tensors alone, so an empty one, with a single dimension, stands for None."""
    return x.ndim == 1 and x.shape[0] == 0


@torch.library.custom_op("dn_lib::gla", mutates_args=())
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float,
    chunk: int, save: bool,
) -> list[Tensor]:  # fmt: skip
    """[o, final_state, and what `Saved` holds, in its order]; empty where there is nothing."""
    from dn_lib.kernels.gla import launch

    check_arguments(q, k, v, None, initial_state, cu_seqlens, chunk, "triton", grouped=True)
    check_tensor("g", g, (*v.shape[:3], k.shape[3]), "[B, L, H_v, d_k]", q, over_time=True)
    check_offsets_on_cpu(cu_seqlens, q.shape[1])
    plan = plan_call(q, k, v, cu_seqlens=cu_seqlens, training=save, chunk=chunk, precision=dot_precision())
    o, state, saved = launch.forward(
        plan=plan, q=q, k=k, v=v, g=g, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens,
        final_state=True,
    )  # fmt: skip
    kept = saved or (None,) * len(Saved._fields)
    return [o, cast(Tensor, state), *(q.new_empty(0) if x is None else x for x in kept)]


@_forward_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
    save: bool,
) -> list[Tensor]:
    c = call_of(k, v, cu_seqlens=cu_seqlens, training=save, chunk=chunk)
    state = q.new_empty(c.sequences, c.H, c.K, c.V, dtype=torch.float32)
    buffers = c.buffers if save else {}
    kept = (buffers.get(name) for name in Saved._fields)
    saved = (q.new_empty(0) if b is None else q.new_empty(b.shape, dtype=b.dtype) for b in kept)
    return [v.new_empty(v.shape), state, *saved]


@torch.library.custom_op("dn_lib::gla_backward", mutates_args=())
def _backward_op(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    saved: list[Tensor], do: Tensor, dstate: Tensor | None, scale: float, chunk: int,
) -> list[Tensor]:  # fmt: skip
    """[dq, dk, dv, dg, d initial_state]; empty where there is none."""
    kept = Saved(*(cast(Any, None if _absent(x) else x) for x in saved))
    plan = plan_call(q, k, v, cu_seqlens=cu_seqlens, training=True, chunk=chunk, precision=dot_precision())
    given = _run_backward(plan, q, k, v, g, initial_state, kept, do, dstate, scale)
    return [q.new_empty(0) if x is None else x for x in given]


@_backward_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: list[Tensor],
    do: Tensor,
    dstate: Tensor | None,
    scale: float,
    chunk: int,
) -> list[Tensor]:
    first = q.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return [*(x.new_empty(x.shape) for x in (q, k, v, g)), first]


def _op_setup(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, g, initial_state, cu_seqlens, scale, chunk, save = inputs
    if not save:
        raise RuntimeError("dn_lib::gla needs save=True where a gradient is wanted")
    ctx.save_for_backward(q, k, v, g, initial_state, cu_seqlens, *output[2:])
    ctx.options = scale, chunk
    ctx.set_materialize_grads(False)


def _op_backward(ctx: Any, upstream: Any) -> tuple[Tensor | None, ...]:
    do, dstate = upstream[:2]
    q, k, v, g, initial_state, cu_seqlens, *saved = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    dq, dk, dv, dg, dfirst = _backward_op(q, k, v, g, initial_state, cu_seqlens, saved, do, dstate, *ctx.options)
    return dq, dk, dv, dg, None if initial_state is None else dfirst, *(None,) * 4


def _second_derivative(ctx: Any, _: Any) -> None:
    raise RuntimeError(_TWICE)


_forward_op.register_autograd(_op_backward, setup_context=_op_setup)
_backward_op.register_autograd(_second_derivative)


# --- What `linear_attention` calls --------------------------------------------------------------------------------
def _normalised(x: Tensor) -> Tensor:
    return l2_normalise(x.to(working_dtype(x))).to(x.dtype)


def through_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    final_state: bool,
    cu_seqlens: Tensor | None,
    norm: bool,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor | None]:
    """o `[B, L, H_v, d_v]` and the final state or None, for log gates g `[B, L, H_v, d_k]`.

    q and k are normalised in PyTorch, in float32, and rounded to their dtype once more.  Short calls that want no
    gradient take the recurrence.
    """
    check_scale_in_float32(scale)
    if norm:
        q, k = _normalised(q), _normalised(k)
    g, initial_state = for_triton(g), for_triton(initial_state)
    training = wants_gradient(q, k, v, g, initial_state)
    # A launch would do this too; here a copy that has to be made is kept for the backward.
    q, k, v, g = q.contiguous(), k.contiguous(), v.contiguous(), g.contiguous()
    initial_state = None if initial_state is None else initial_state.contiguous()
    if torch.compiler.is_compiling() or not all(map(is_plain, (q, k, v, g, initial_state, cu_seqlens))):
        chunk = chunk_size or default_chunk(q.dtype)
        o, state, *_ = _forward_op(q, k, v, g, initial_state, cu_seqlens, scale, chunk, training)
        return o, state if final_state else None
    chunk = chunk_of(q.shape[1], q.dtype, chunk_size, training)
    check_offsets_on_cpu(cu_seqlens, q.shape[1])
    plan = plan_call(q, k, v, cu_seqlens=cu_seqlens, training=training, chunk=chunk, precision=dot_precision())
    if training:
        return _Gla.apply(q, k, v, g, initial_state, cu_seqlens, scale, final_state, plan)
    from dn_lib.kernels.gla import launch

    if chunk is None:
        c, state = plan.call, None
        if final_state:
            state = q.new_empty(c.sequences, c.H, c.K, c.V, dtype=torch.float32)
        o = launch.recurrent(
            plan=plan, q=q, k=k, v=v, g=g, scale=scale, initial_state=initial_state, final_state=state,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
        return o, state
    o, state, _ = launch.forward(
        plan=plan, q=q, k=k, v=v, g=g, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens,
        final_state=final_state,
    )  # fmt: skip
    return o, state
