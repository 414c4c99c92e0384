"""The Triton kernels as PyTorch sees them: an autograd function, and operators that torch.compile knows."""

from __future__ import annotations

import torch
from torch import Tensor

from dn_lib.forms.common import differentiable_once, refuse_transforms
from dn_lib.ops.backend import TRITON_DTYPES
from dn_lib.ops.checks import check_arguments, check_scale_in_float32, is_plain, wants_gradient

# Up to this length, and with no gradient asked for, the Triton backend runs the recurrence itself.
RECURRENT_MAX_LENGTH = 16
# --- Triton: the forward and the backward as they are launched, then as PyTorch sees them -----------------------

# What `launch.Saved` holds, in the order in which the operator returns it.
_SAVED = ("n", "pseudo", "q_norm", "k_norm", "states", "state_end", "transition", "token_offsets", "chunk_offsets")


def _precision() -> str:
    """float32 dots follow PyTorch's own switch, torch.set_float32_matmul_precision, when the kernels are launched."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _run_forward(q, k, v, beta, initial_state, cu_seqlens, scale, norm, chunk, save, final_state):
    from dn_lib.kernels.delta_rule import launch

    return launch.forward(
        q, k, v, beta, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens, norm=norm, chunk=chunk,
        precision=_precision(), save=save, final_state=final_state,
    )  # fmt: skip


def _run_backward(
    q, k, beta, saved, do, dstate, cu_seqlens, scale, chunk, initial_state
):  # fmt: skip
    from dn_lib.kernels.delta_rule import launch

    return launch.backward(
        q, k, do, beta, saved, do, dstate, scale=scale,
        cu_seqlens=cu_seqlens, chunk=chunk, precision=_precision(), initial_state=initial_state,
    )  # fmt: skip


_TWICE = "delta_rule with backend 'triton' has no second derivative: use backend='chunkwise'"


class _DeltaRule(torch.autograd.Function):
    """The eager path: no dispatcher between the caller and the kernels."""

    @staticmethod
    def forward(ctx, q, k, v, beta, initial_state, cu_seqlens, scale, norm, chunk, final_state):
        o, state, saved = _run_forward(q, k, v, beta, initial_state, cu_seqlens, scale, norm, chunk, True, final_state)
        ctx.save_for_backward(q, k, beta, initial_state, cu_seqlens, *(getattr(saved, name) for name in _SAVED))
        ctx.options = scale, chunk
        ctx.set_materialize_grads(False)
        return o, state

    @staticmethod
    def backward(ctx, do, dstate):
        from dn_lib.kernels.delta_rule.launch import Saved

        refuse_transforms("delta_rule with backend 'triton'", "use backend='chunkwise'", do, dstate)
        q, k, beta, initial_state, cu_seqlens, *saved = ctx.saved_tensors
        saved = Saved(*saved)
        with torch.no_grad():
            given = torch.zeros_like(saved.pseudo) if do is None else do
            *grads, dfirst = _run_backward(
                q, k, beta, saved, given, dstate, cu_seqlens, *ctx.options, initial_state is not None
            )
            grads.append(None if dfirst is None else dfirst.to(initial_state.dtype))
        return *differentiable_once(_TWICE, grads, (q, k, beta, initial_state, do, dstate)), *(None,) * 5


@torch.library.custom_op("dn_lib::delta_rule", mutates_args=())
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, norm: bool, chunk: int, save: bool,
) -> list[Tensor]:  # fmt: skip
    """[o, final_state, and what `launch.Saved` holds, in its order]; empty where there is nothing."""
    check_arguments(q, k, v, beta, initial_state, cu_seqlens, chunk, "triton")
    o, state, saved = _run_forward(q, k, v, beta, initial_state, cu_seqlens, scale, norm, chunk, save, True)
    if saved.state_end is state:
        saved.state_end = None
    kept = [getattr(saved, name) if save else None for name in _SAVED]
    return [o, state, *(q.new_empty(0) if x is None else x for x in kept)]


@_forward_op.register_fake
def _(q, k, v, beta, initial_state, cu_seqlens, scale, norm, chunk, save):
    from dn_lib.kernels.delta_rule import launch

    s = launch.shape_of(k, v, cu_seqlens, chunk)
    split, single = s.plan.segments > 1, {"dtype": torch.float32}
    none = [q.new_empty(0) for _ in _SAVED]  # one each: outputs must not share memory
    o, state = v.new_empty(v.shape), q.new_empty(s.sequences, s.H, s.K, s.V, **single)
    if not save:
        return [o, state, *none]
    n, pseudo = q.new_empty(s.B, s.L, s.H, chunk), v.new_empty(v.shape)
    norms = [q.new_empty(s.B, s.L, s.H, **single) for _ in range(2)] if norm else none[2:4]
    states, end, transition, *offsets = none[4:]
    if not s.plan.fused:
        states = q.new_empty(s.chunks, s.H, s.K, s.V)
    elif split:
        end = q.new_empty(s.total_segments, s.H, s.K, s.V, **single)
    if split:
        transition = q.new_empty(s.total_segments, s.H, s.K, s.K, **single)
    if s.varlen:
        offsets = [cu_seqlens.new_empty(s.sequences + 1, dtype=kind) for kind in (cu_seqlens.dtype, torch.int32)]
    return [o, state, n, pseudo, *norms, states, end, transition, *offsets]


@torch.library.custom_op("dn_lib::delta_rule_backward", mutates_args=())
def _backward_op(
    q: Tensor, k: Tensor, beta: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, final_state: Tensor,
    saved: list[Tensor], do: Tensor, dstate: Tensor | None, scale: float, chunk: int,
) -> list[Tensor]:  # fmt: skip
    """[dq, dk, dv, dbeta, d initial_state (empty if there is none)]."""
    from dn_lib.kernels.delta_rule.launch import Saved

    saved = Saved(*saved[:2], *(x if x.numel() else None for x in saved[2:]))
    if saved.states is None and saved.state_end is None:
        saved.state_end = final_state
    *grads, dfirst = _run_backward(q, k, beta, saved, do, dstate, cu_seqlens, scale, chunk, initial_state is not None)
    return [*grads, q.new_empty(0) if dfirst is None else dfirst.to(initial_state.dtype)]


@_backward_op.register_fake
def _(q, k, beta, initial_state, cu_seqlens, final_state, saved, do, dstate, scale, chunk):
    dfirst = q.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)
    # Contiguous, whatever the strides of q or do.
    return [*(x.new_empty(x.shape) for x in (q, k, do, beta)), dfirst]


def _op_setup(ctx, inputs, output):
    q, k, _v, beta, initial_state, cu_seqlens, scale, _norm, chunk, save = inputs
    if not save:
        raise RuntimeError("dn_lib::delta_rule needs save=True where a gradient is wanted")
    ctx.save_for_backward(q, k, beta, initial_state, cu_seqlens, *output[1:])
    ctx.options = scale, chunk
    ctx.set_materialize_grads(False)


def _op_backward(ctx, gradients):
    do, dstate = gradients[:2]
    q, k, beta, initial_state, cu_seqlens, final_state, *saved = ctx.saved_tensors
    do = torch.zeros_like(saved[1]) if do is None else do
    *grads, dfirst = _backward_op(q, k, beta, initial_state, cu_seqlens, final_state, saved, do, dstate, *ctx.options)
    return *grads, None if initial_state is None else dfirst, *(None,) * 5


def _second_derivative(ctx, _):
    raise RuntimeError(_TWICE)


_forward_op.register_autograd(_op_backward, setup_context=_op_setup)
_backward_op.register_autograd(_second_derivative)


def for_triton(x: Tensor | None) -> Tensor | None:
    """beta or a state, whose dtype is free, in one that the kernels take."""
    return x if x is None or x.dtype in TRITON_DTYPES else x.to(torch.float32)


def through_triton(q, k, v, beta, scale, initial_state, final_state, cu_seqlens, norm, chunk):
    from dn_lib.kernels import plan as configs

    check_scale_in_float32(scale)
    beta, initial_state = for_triton(beta), for_triton(initial_state)
    needs_gradient = wants_gradient(q, k, v, beta, initial_state)
    size = chunk or configs.default_chunk(q.dtype)
    # A launch would do this too; here a copy that has to be made is kept for the backward.
    tensors = tuple(None if x is None else x.contiguous() for x in (q, k, v, beta, initial_state))
    q, k, v, beta, initial_state = tensors
    if torch.compiler.is_compiling() or not all(map(is_plain, (*tensors, cu_seqlens))):
        o, state, *_ = _forward_op(q, k, v, beta, initial_state, cu_seqlens, scale, norm, size, needs_gradient)
        return o, state if final_state else None
    if needs_gradient:
        return _DeltaRule.apply(q, k, v, beta, initial_state, cu_seqlens, scale, norm, size, final_state)
    if chunk is None and q.shape[1] <= RECURRENT_MAX_LENGTH:
        return through_recurrent(q, k, v, beta, scale, initial_state, final_state, cu_seqlens, norm)
    o, state, _ = _run_forward(q, k, v, beta, initial_state, cu_seqlens, scale, norm, size, False, final_state)
    return o, state


def through_recurrent(q, k, v, beta, scale, initial_state, final_state, cu_seqlens, norm):
    from dn_lib.kernels.delta_rule import launch

    state = None
    if final_state:
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        state = q.new_empty(sequences, q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    o = launch.recurrent(
        q, k, v, beta, scale=scale, initial_state=initial_state, final_state=state, cu_seqlens=cu_seqlens, norm=norm
    )
    return o, state
