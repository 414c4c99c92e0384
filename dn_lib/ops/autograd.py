"""The Triton kernels as PyTorch sees them: an autograd function, and operators that torch.compile knows.

The plan of a call is made here, once (`dn_lib.kernels.plan`); its backward runs by the same plan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from dn_lib.forms.common import check_offsets
from dn_lib.forms.derivatives import differentiable_once, refuse_transforms
from dn_lib.kernels.plan import Plan, Saved, call_of, lay_out, plan_call, resolve
from dn_lib.kernels.rules import DTYPES, RECURRENT_MAX_LENGTH, default_chunk
from dn_lib.ops.checks import check_arguments, check_scale_in_float32, is_plain, wants_gradient

if TYPE_CHECKING:
    from dn_lib.kernels.delta_rule import launch

Given = TypeVar("Given", bound=Tensor | None)


def dot_precision() -> str:
    """float32 dots follow PyTorch's own switch, torch.set_float32_matmul_precision, when the kernels are launched."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def chunk_of(L: int, dtype: torch.dtype, chunk_size: int | None, training: bool) -> int | None:
    """The chunk that an eager call takes; None for the recurrence, which short sequences without a gradient take."""
    if chunk_size is None and not training and L <= RECURRENT_MAX_LENGTH:
        return None
    return chunk_size or default_chunk(dtype)


def check_offsets_on_cpu(cu_seqlens: Tensor | None, L: int) -> None:
    """Raise ValueError unless offsets on a CPU rise from 0 to L.  Reading a GPU's would wait for it."""
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        check_offsets(cu_seqlens.tolist(), L)


# --- The eager path: no dispatcher between the caller and the kernels ---------------------------------------------
class _Family(torch.autograd.Function):
    """The delta rule and its relatives.  beta is None without erasure, g without gates."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor | None,
        g: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        final_state: bool,
        plan: Plan,
    ) -> tuple[Tensor, Tensor | None]:
        from dn_lib.kernels.delta_rule import eager, launch

        kept: tuple[Tensor | None, ...]
        if plan.layout.packed:
            o, state, saved = launch.forward(
                plan=plan, q=q, k=k, v=v, beta=beta, g=g, scale=scale, initial_state=initial_state,
                cu_seqlens=cu_seqlens, final_state=final_state,
            )  # fmt: skip
            kept = cast(Saved, saved)
        else:
            o, state, kept = eager.forward(
                plan=plan, q=q, k=k, v=v, beta=beta, g=g, scale=scale, initial_state=initial_state,
                final_state=final_state,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v if beta is None else None, beta, initial_state, *kept)
        ctx.plan, ctx.scale, ctx.gate_dtype = plan, scale, None if g is None else g.dtype
        ctx.set_materialize_grads(False)
        return o, state

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        from dn_lib.kernels.delta_rule import eager

        do, dstate = upstream
        refuse_transforms(f"{_name(ctx.plan)} with backend 'triton'", "use backend='chunkwise'", do, dstate)
        q, k, v, beta, initial_state, *kept = ctx.saved_tensors
        plan: Plan = ctx.plan
        with torch.no_grad():
            if plan.layout.packed:
                given = _run_backward(plan, q, k, v, beta, initial_state, Saved(*kept), do, dstate, ctx.scale)
            else:
                found = eager.backward(
                    plan=plan, q=q, k=k, v=v, beta=beta, kept=eager.Kept(*kept), do=_or_zeros(do, q, plan),
                    dstate=dstate, scale=ctx.scale, initial_state=initial_state is not None, precision=dot_precision(),
                )  # fmt: skip
                given = _in_their_dtypes(found, initial_state)
            if given[4] is not None:
                given[4] = given[4].to(ctx.gate_dtype)
        inputs = q, k, v, beta, initial_state, do, dstate
        return *differentiable_once(_twice(plan), given, inputs), *(None,) * 4


def _name(plan: Plan) -> str:
    call = plan.call
    if not call.erase:
        return "linear_attention"
    return "gated_delta_rule" if call.gate else "delta_rule"


def _twice(plan: Plan) -> str:
    return f"{_name(plan)} with backend 'triton' has no second derivative: use backend='chunkwise'"


def _or_zeros(do: Tensor | None, q: Tensor, plan: Plan) -> Tensor:
    return q.new_zeros(plan.call.B, plan.call.L, plan.call.H, plan.call.V) if do is None else do


def _in_their_dtypes(found: launch.Gradients, initial_state: Tensor | None) -> list[Tensor | None]:
    first = found.initial_state
    return [*found[:5], None if first is None or initial_state is None else first.to(initial_state.dtype)]


def _run_backward(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    saved: Saved,
    do: Tensor | None,
    dstate: Tensor | None,
    scale: float,
) -> list[Tensor | None]:
    """[dq, dk, dv, dbeta, dg, d initial_state], each in the dtype of its tensor, but dg in float32."""
    from dn_lib.kernels.delta_rule import launch

    do = _or_zeros(do, q, plan)
    plan = plan.for_backward(q, k, v, do, saved.n, saved.pseudo, saved.states, precision=dot_precision())
    found = launch.gradients(
        plan=plan, q=q, k=k, v=v, beta=beta, saved=saved, do=do, dstate=dstate, scale=scale,
        initial_state=initial_state is not None,
    )  # fmt: skip
    return _in_their_dtypes(found, initial_state)


# --- The same as operators, for torch.compile and for tensors that handle operators themselves --------------------
def _absent(x: Tensor) -> bool:
    """Operators return tensors alone, so an empty one, with a single dimension, stands for None."""
    return x.ndim == 1 and x.shape[0] == 0


@torch.library.custom_op("dn_lib::delta_rule", mutates_args=())
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, g: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, norm: bool, chunk: int, save: bool,
) -> list[Tensor]:  # fmt: skip
    """[o, final_state, and what `Saved` holds, in its order]; empty where there is nothing.

    The whole family: beta is None without erasure, g without gates.  Outputs must not share memory.  Small heads keep
    the state at the end of each segment; where a sequence is one segment, that is final_state.
    """
    from dn_lib.kernels.delta_rule import launch

    check_arguments(q, k, v, beta, initial_state, cu_seqlens, chunk, "triton", g=g, grouped=True)
    check_offsets_on_cpu(cu_seqlens, q.shape[1])
    plan = plan_call(
        q, k, v, cu_seqlens=cu_seqlens, norm=norm, training=save, chunk=chunk, precision=dot_precision(),
        gate=g is not None, erase=beta is not None,
    )  # fmt: skip
    o, state, saved = launch.forward(
        plan=plan, q=q, k=k, v=v, beta=beta, g=g, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens,
        final_state=True,
    )  # fmt: skip
    kept = saved or (None,) * len(Saved._fields)
    return [o, state, *(q.new_empty(0) if x is None or x is state else x for x in kept)]


@_forward_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    norm: bool,
    chunk: int,
    save: bool,
) -> list[Tensor]:
    layout = lay_out(
        call_of(
            k, v, cu_seqlens=cu_seqlens, norm=norm, training=save, chunk=chunk, gate=g is not None,
            erase=beta is not None,
        )
    )  # fmt: skip
    o = v.new_empty(v.shape)
    state = q.new_empty(layout.call.sequences, layout.call.H, layout.call.K, layout.call.V, dtype=torch.float32)
    buffers = dict(layout.buffers) if save else {}
    if layout.segments == 1:
        buffers.pop("state_end", None)  # it is the final state
    kept = (buffers.get(name) for name in Saved._fields)
    return [o, state, *(q.new_empty(0) if b is None else q.new_empty(b.shape, dtype=b.dtype) for b in kept)]


@torch.library.custom_op("dn_lib::delta_rule_backward", mutates_args=())
def _backward_op(
    q: Tensor, k: Tensor, v: Tensor | None, beta: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, final_state: Tensor, saved: list[Tensor], do: Tensor, dstate: Tensor | None,
    scale: float, chunk: int,
) -> list[Tensor]:  # fmt: skip
    """[dq, dk, dv, dbeta, dg, d initial_state]; empty where there is none.  v is given where nothing is erased."""
    kept = Saved(*(cast(Any, None if _absent(x) else x) for x in saved))
    # What the forward saved tells by which layout, also where the overrides of its thread are not known.
    call = call_of(
        k, do, cu_seqlens=cu_seqlens, norm=kept.q_norm is not None, training=True, chunk=chunk,
        gate=kept.sums is not None, erase=beta is not None,
    )  # fmt: skip
    segments = 1 if kept.transition is None else kept.transition.shape[0] // max(1, call.sequences)
    overrides = call.overrides._replace(segments=max(1, segments), fused=kept.states is None)
    plan = resolve(call._replace(overrides=overrides))
    if kept.states is None and kept.state_end is None:
        kept = kept._replace(state_end=final_state)
    given = _run_backward(plan, q, k, v, beta, initial_state, kept, do, dstate, scale)
    return [q.new_empty(0) if x is None else x for x in given]


@_backward_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    final_state: Tensor,
    saved: list[Tensor],
    do: Tensor,
    dstate: Tensor | None,
    scale: float,
    chunk: int,
) -> list[Tensor]:
    # Contiguous, whatever the strides of q or do; what is not there is empty, and no two outputs are one tensor.
    dbeta, dfirst = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (beta, initial_state))
    sums = cast(Tensor, Saved(*saved).sums)
    dg = q.new_empty(0) if _absent(sums) else q.new_empty(do.shape[:3], dtype=torch.float32)
    return [*(x.new_empty(x.shape) for x in (q, k, do)), dbeta, dg, dfirst]


def _op_setup(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, beta, g, initial_state, cu_seqlens, scale, _norm, chunk, save = inputs
    if not save:
        raise RuntimeError("dn_lib::delta_rule needs save=True where a gradient is wanted")
    ctx.save_for_backward(q, k, v if beta is None else None, beta, initial_state, cu_seqlens, *output[1:])
    ctx.options = scale, chunk
    ctx.gate_dtype = None if g is None else g.dtype
    ctx.set_materialize_grads(False)


def _op_backward(ctx: Any, upstream: Any) -> tuple[Tensor | None, ...]:
    do, dstate = upstream[:2]
    q, k, v, beta, initial_state, cu_seqlens, final_state, *saved = ctx.saved_tensors
    if do is None:
        kept = Saved(*saved)
        do = torch.zeros_like(kept.pseudo if v is None else v)
    dq, dk, dv, dbeta, dg, dfirst = _backward_op(
        q, k, v, beta, initial_state, cu_seqlens, final_state, saved, do, dstate, *ctx.options
    )
    dg = None if ctx.gate_dtype is None else dg.to(ctx.gate_dtype)
    given = dq, dk, dv, None if beta is None else dbeta, dg, None if initial_state is None else dfirst
    return *given, *(None,) * 5


def _second_derivative(ctx: Any, _: Any) -> None:
    raise RuntimeError("delta_rule with backend 'triton' has no second derivative: use backend='chunkwise'")


_forward_op.register_autograd(_op_backward, setup_context=_op_setup)
_backward_op.register_autograd(_second_derivative)


# --- What `delta_rule` and its relatives call ---------------------------------------------------------------------
def for_triton(x: Given) -> Given:
    """beta or a state, whose dtype is free, in one that the kernels take."""
    return cast(Any, x if x is None or x.dtype in DTYPES else x.to(torch.float32))


def through_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    final_state: bool,
    cu_seqlens: Tensor | None,
    norm: bool,
    chunk_size: int | None,
    g: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """beta None: without erasure.  g None: without gates."""
    check_scale_in_float32(scale)
    beta, g, initial_state = for_triton(beta), for_triton(g), for_triton(initial_state)
    training = wants_gradient(q, k, v, beta, g, initial_state)
    # A launch would do this too; here a copy that has to be made is kept for the backward.
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    beta, g, initial_state = (None if x is None else x.contiguous() for x in (beta, g, initial_state))
    if torch.compiler.is_compiling() or not all(map(is_plain, (q, k, v, beta, g, initial_state, cu_seqlens))):
        chunk = chunk_size or default_chunk(q.dtype)
        o, state, *_ = _forward_op(q, k, v, beta, g, initial_state, cu_seqlens, scale, norm, chunk, training)
        return o, state if final_state else None
    chunk = chunk_of(q.shape[1], q.dtype, chunk_size, training)
    if chunk is None:
        return through_recurrent(q, k, v, beta, scale, initial_state, final_state, cu_seqlens, norm, g)
    check_offsets_on_cpu(cu_seqlens, q.shape[1])
    plan = plan_call(
        q, k, v, cu_seqlens=cu_seqlens, norm=norm, training=training, chunk=chunk, precision=dot_precision(),
        gate=g is not None, erase=beta is not None,
    )  # fmt: skip
    if training:
        return _Family.apply(q, k, v, beta, g, initial_state, cu_seqlens, scale, final_state, plan)
    from dn_lib.kernels.delta_rule import eager, launch

    if plan.layout.packed:
        o, state, _ = launch.forward(
            plan=plan, q=q, k=k, v=v, beta=beta, g=g, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens,
            final_state=final_state,
        )  # fmt: skip
    else:
        o, state, _ = eager.forward(
            plan=plan, q=q, k=k, v=v, beta=beta, g=g, scale=scale, initial_state=initial_state,
            final_state=final_state,
        )  # fmt: skip
    return o, state


def through_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    final_state: bool,
    cu_seqlens: Tensor | None,
    norm: bool,
    g: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    from dn_lib.kernels.delta_rule import launch

    check_offsets_on_cpu(cu_seqlens, q.shape[1])
    plan = plan_call(
        q, k, v, cu_seqlens=cu_seqlens, norm=norm, chunk=None, gate=g is not None, erase=beta is not None
    )  # fmt: skip
    c, state = plan.call, None
    if final_state:
        state = q.new_empty(c.sequences, c.H, c.K, c.V, dtype=torch.float32)
    o = launch.recurrent(
        plan=plan, q=q, k=k, v=v, beta=beta, g=g, scale=scale, initial_state=initial_state, final_state=state,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return o, state


def decode_through_triton(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, scale: float, norm: bool
) -> Tensor:
    """o of tokens `[B, L, H, d]` by the recurrence, which overwrites `state`."""
    run = _decode_op if torch.compiler.is_compiling() else _decode
    return run(q, k, v, beta, state, scale, norm)


def _decode(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, scale: float, norm: bool) -> Tensor:
    from dn_lib.kernels.delta_rule import launch

    plan = plan_call(q, k, v, norm=norm, chunk=None)
    return launch.recurrent(
        plan=plan, q=q, k=k, v=v, beta=beta, scale=scale, initial_state=state, final_state=state
    )  # fmt: skip


@torch.library.custom_op("dn_lib::decode_delta_rule", mutates_args={"state"})
def _decode_op(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, scale: float, norm: bool) -> Tensor:
    return _decode(q, k, v, beta, state, scale, norm)


@_decode_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, scale: float, norm: bool) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)
