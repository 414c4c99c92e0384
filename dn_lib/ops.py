"""The operator: `delta_rule`, its argument checks, the choice of a backend, and what PyTorch needs to know of it.

`chunk_delta_rule` and `fused_recurrent_delta_rule` have the signatures of flash-linear-attention's functions of
those names, and `decode_delta_rule` updates a state in place, one token at a time.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import itertools
import os
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dn_lib.chunkwise import chunkwise_delta_rule, parallel_delta_rule
from dn_lib.common import (
    active_transform,
    check_channels,
    check_flag,
    check_is_tensor,
    check_offsets,
    describe,
    differentiable_once,
    is_integer,
    refuse_transforms,
    scale_or_default,
    working_dtype,
)
from dn_lib.delta_rule import delta_rule_step, recurrent_delta_rule

BACKENDS = ("auto", "recurrent", "parallel", "chunkwise", "triton")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_MAX_HEAD_DIM = 256
NORM_EPS = 1e-6
# Up to this length, and with no gradient asked for, the Triton backend runs the recurrence itself.
RECURRENT_MAX_LENGTH = 16

# Looked up once: torch.compile cannot trace the look-up.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_checking = contextvars.ContextVar("dn_lib_checking", default=os.environ.get("DN_LIB_CHECKED") == "1")
_warned: set[str] = set()


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Within it, calls also check values: all finite, and 0 <= beta |k|^2 <= 2, beyond which states may grow.

    Reading values costs a synchronisation, so it is off by default; `DN_LIB_CHECKED=1` turns it on everywhere.

    >>> import torch, dn_lib
    >>> x = torch.ones(1, 3, 1, 16)
    >>> with dn_lib.checked():
    ...     dn_lib.delta_rule(x, x, x, torch.ones(1, 3, 1))
    Traceback (most recent call last):
    ...
    ValueError: k must satisfy beta |k|^2 <= 2 (normalise the keys, or pass qk_l2norm=True): 16 at [b, l, h] = [0, 0, 0]
    """
    token = _checking.set(True)
    try:
        yield
    finally:
        _checking.reset(token)


def triton_problem(device: torch.device | None = None) -> str | None:
    """Why the Triton kernels cannot run (on `device`), with the remedy; None if they can."""
    if not _TRITON_INSTALLED:
        return "Triton is not installed: `pip install triton` (Linux only), or use backend='chunkwise'"
    if device is not None and device.type not in ("cuda", "cpu"):
        return f"tensors are on {device}: move them to an NVIDIA GPU, or use backend='chunkwise'"
    if device is not None and device.type != "cuda":
        from dn_lib.kernels.common import INTERPRETED

        if not INTERPRETED.value:
            return (
                f"tensors are on {device}, and Triton's interpreter is off: move them to a GPU, or set "
                "TRITON_INTERPRET=1 before dn_lib is imported"
            )
    return None


def _size(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _check_tensor(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str, of: Tensor, hint: str = ""):
    check_is_tensor(name, tensor, meaning)
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name} must be {meaning} = {list(expected)}, got {_size(tensor)}{hint}")
    if tensor.device != of.device:
        raise ValueError(f"{name} must be on {of.device} like q, got {tensor.device}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")


def _check_rank(name: str, x: Tensor, rank: int, meaning: str) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must have {meaning}, got {type(x).__name__}")
    check_is_tensor(name, x)
    if x.ndim != rank:
        raise ValueError(f"{name} must have {meaning}, got {_size(x)}")


def _check_arguments(q, k, v, beta, initial_state, cu_seqlens, chunk_size, backend) -> None:
    """Shapes, dtypes and devices; raises ValueError or TypeError naming the argument."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_rank(name, x, 4, "four dimensions [B, L, H, d]")
    B, L, H, K = q.shape
    _check_tensor("q", q, (B, L, H, K), "[B, L, H, d_k]", q)
    swapped = " (heads before time?)" if tuple(k.shape) == (B, H, L, K) and H != L else ""
    _check_tensor("k", k, (B, L, H, K), "[B, L, H, d_k], as q,", q, swapped)
    swapped = " (heads before time?)" if tuple(v.shape[:3]) == (B, H, L) and H != L else ""
    _check_tensor("v", v, (B, L, H, v.shape[-1]), "[B, L, H, d_v]", q, swapped)
    swapped = " (heads before time?)" if tuple(getattr(beta, "shape", ())) == (B, H, L) and H != L else ""
    _check_tensor("beta", beta, (B, L, H), "[B, L, H]", q, swapped)
    if K == 0 or v.shape[-1] == 0:
        raise ValueError(f"q and v must have at least one channel, got d_k = {K} and d_v = {v.shape[-1]}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
    sequences = B
    if cu_seqlens is not None:
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
            got = _size(cu_seqlens) if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
            raise ValueError(f"cu_seqlens must be a tensor of N + 1 >= 2 offsets, got {got}")
        check_is_tensor("cu_seqlens", cu_seqlens, "of offsets")
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
        if cu_seqlens.device != q.device:
            raise ValueError(f"cu_seqlens must be on {q.device} like q, got {cu_seqlens.device}")
        if cu_seqlens.is_meta:
            raise ValueError("cu_seqlens must have values, got a tensor on meta")
        if B != 1:
            raise ValueError(f"q must have batch size 1 with cu_seqlens (sequences packed along L), got {B}")
        sequences = cu_seqlens.numel() - 1
    if initial_state is not None:
        shape = (sequences, H, K, v.shape[-1])
        _check_tensor("initial_state", initial_state, shape, "[N, H, d_k, d_v]", q)
    if chunk_size is not None and (not is_integer(chunk_size) or chunk_size < 1):
        raise ValueError(f"chunk_size must be a positive integer or None, got {describe(chunk_size)}")
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {describe(backend)}")


def _first(where: Tensor) -> list[int]:
    return where.nonzero()[0].tolist()


def _check_values(q, k, v, beta, initial_state, cu_seqlens, qk_l2norm) -> None:
    """What `checked` promises; raises ValueError naming the argument and the first offending [b, l, h]."""
    for name, x in (("q", q), ("k", k), ("v", v), ("beta", beta)):
        bad = ~x.isfinite() if x.ndim == 3 else ~x.isfinite().all(-1)
        if bad.any():
            raise ValueError(f"{name} must be finite: NaN or infinity at [b, l, h] = {_first(bad)}")
    if initial_state is not None and not initial_state.isfinite().all():
        bad = ~initial_state.isfinite().flatten(2).all(-1)
        raise ValueError(f"initial_state must be finite: NaN or infinity at [n, h] = {_first(bad)}")
    strength = beta.double() if qk_l2norm else beta.double() * k.double().square().sum(-1)
    # A key that is normalised and then rounded to its dtype may be off by that much.
    slack = 1 + 2 * torch.finfo(k.dtype).eps
    if (bad := strength > 2 * slack).any():
        at = _first(bad)
        remedy = "keep beta <= 2" if qk_l2norm else "normalise the keys, or pass qk_l2norm=True"
        name = "beta" if qk_l2norm else "k"
        raise ValueError(
            f"{name} must satisfy beta |k|^2 <= 2 ({remedy}): {strength[tuple(at)]:.4g} at [b, l, h] = {at}"
        )
    if (bad := beta < 0).any():
        raise ValueError(f"beta must be at least 0: {beta[tuple(_first(bad))]:.4g} at [b, l, h] = {_first(bad)}")
    if cu_seqlens is not None:
        check_offsets(cu_seqlens.tolist(), q.shape[1])


def _choose_backend(q: Tensor, v: Tensor, chunk_size: int | None, backend: str) -> str:
    """`auto` takes Triton on a GPU wherever it can, chunkwise elsewhere."""
    dim = max(q.shape[-1], v.shape[-1])
    if backend == "auto":
        if q.device.type != "cuda" or q.dtype not in TRITON_DTYPES or triton_problem(q.device):
            return "chunkwise"
        if dim > TRITON_MAX_HEAD_DIM:
            if "head_dim" not in _warned:
                _warned.add("head_dim")
                warnings.warn(
                    f"delta_rule: head size {dim} is above {TRITON_MAX_HEAD_DIM}, the most that the Triton kernels "
                    "take; using backend='chunkwise'",
                    stacklevel=3,
                )
            return "chunkwise"
        return "triton"
    if backend == "triton":
        if problem := triton_problem(q.device):
            raise RuntimeError(f"backend 'triton' cannot run: {problem}")
        if q.dtype not in TRITON_DTYPES:
            raise TypeError(f"q must be float32, bfloat16 or float16 for backend 'triton', got {q.dtype}")
        if dim > TRITON_MAX_HEAD_DIM:
            raise ValueError(
                f"q and v must have at most {TRITON_MAX_HEAD_DIM} channels for backend 'triton', got {dim}; "
                "use 'chunkwise'"
            )
        if chunk_size not in (None, 16, 32, 64):
            raise ValueError(f"chunk_size must be 16, 32, 64 or None for backend 'triton', got {chunk_size}")
    return backend


def _resolve_backend(q, k, v, beta, initial_state, chunk_size, backend):
    """`_choose_backend`, with chunkwise in place of Triton where PyTorch has to see every operation."""
    chosen = _choose_backend(q, v, chunk_size, backend)
    if chosen == "triton":
        if backend == "triton":
            refuse_transforms("backend 'triton'", "use backend='chunkwise'", q, k, v, beta, initial_state)
        elif active_transform(q, k, v, beta, initial_state):
            return "chunkwise"
    return chosen


def l2_normalise(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) along the last dimension, in float32 at least; keeps float64."""
    x = x.to(working_dtype(x))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)


def _pytorch(form: Callable, q, k, v, beta, scale, initial_state, cu_seqlens, qk_l2norm, options):
    """A form of chapters 1-4 on `[B, L, H, d]` tensors, sequence by sequence where they are packed."""
    dtype, precise = v.dtype, working_dtype(q)
    if qk_l2norm:
        q, k = l2_normalise(q), l2_normalise(k)
    q, k, v, beta = (x.transpose(1, 2).to(precise) for x in (q, k, v, beta))
    initial_state = None if initial_state is None else initial_state.to(precise)
    if cu_seqlens is None:
        o, state = form(q, k, v, beta, scale=scale, initial_state=initial_state, **options)
        return o.transpose(1, 2).to(dtype), state
    outputs, states = [], []
    offsets = cu_seqlens.tolist()
    check_offsets(offsets, q.shape[2])
    for n, (begin, end) in enumerate(itertools.pairwise(offsets)):
        part = [x[:, :, begin:end] for x in (q, k, v, beta)]
        first = None if initial_state is None else initial_state[n : n + 1]
        o, state = form(*part, scale=scale, initial_state=first, **options)
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype), torch.cat(states)


# --- Triton: the forward and the backward as they are launched, then as PyTorch sees them -----------------------

# What `launch.Saved` holds, in the order in which the operator returns it.
_SAVED = ("n", "vn", "q_norm", "k_norm", "states", "state_end", "transition", "token_offsets", "chunk_offsets")


def _precision() -> str:
    """float32 dots follow PyTorch's own switch, torch.set_float32_matmul_precision, when the kernels are launched."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _run_forward(q, k, v, beta, initial_state, cu_seqlens, scale, norm, chunk, save, final_state):
    from dn_lib.kernels import launch

    return launch.forward(
        q, k, v, beta, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens, norm=norm, chunk=chunk,
        precision=_precision(), save=save, final_state=final_state,
    )  # fmt: skip


def _run_backward(
    q, k, beta, saved, do, dstate, cu_seqlens, scale, chunk, initial_state
):  # fmt: skip
    from dn_lib.kernels import launch

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
        from dn_lib.kernels.launch import Saved

        refuse_transforms("delta_rule with backend 'triton'", "use backend='chunkwise'", do, dstate)
        q, k, beta, initial_state, cu_seqlens, *saved = ctx.saved_tensors
        saved = Saved(*saved)
        with torch.no_grad():
            given = torch.zeros_like(saved.vn) if do is None else do
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
    _check_arguments(q, k, v, beta, initial_state, cu_seqlens, chunk, "triton")
    o, state, saved = _run_forward(q, k, v, beta, initial_state, cu_seqlens, scale, norm, chunk, save, True)
    if saved.state_end is state:
        saved.state_end = None
    kept = [getattr(saved, name) if save else None for name in _SAVED]
    return [o, state, *(q.new_empty(0) if x is None else x for x in kept)]


@_forward_op.register_fake
def _(q, k, v, beta, initial_state, cu_seqlens, scale, norm, chunk, save):
    from dn_lib.kernels import launch

    s = launch.shape_of(k, v, cu_seqlens, chunk)
    split, single = s.plan.segments > 1, {"dtype": torch.float32}
    none = [q.new_empty(0) for _ in _SAVED]  # one each: outputs must not share memory
    o, state = v.new_empty(v.shape), q.new_empty(s.sequences, s.H, s.K, s.V, **single)
    if not save:
        return [o, state, *none]
    n, vn = q.new_empty(s.B, s.L, s.H, chunk), v.new_empty(v.shape)
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
    return [o, state, n, vn, *norms, states, end, transition, *offsets]


@torch.library.custom_op("dn_lib::delta_rule_backward", mutates_args=())
def _backward_op(
    q: Tensor, k: Tensor, beta: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, final_state: Tensor,
    saved: list[Tensor], do: Tensor, dstate: Tensor | None, scale: float, chunk: int,
) -> list[Tensor]:  # fmt: skip
    """[dq, dk, dv, dbeta, d initial_state (empty if there is none)]."""
    from dn_lib.kernels.launch import Saved

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


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _is_plain(x: Tensor | None) -> bool:
    """Whether x has memory that a kernel can be given: not where a subclass (FakeTensor, DTensor) handles operators."""
    return x is None or type(x).__torch_dispatch__ is Tensor.__torch_dispatch__


def _for_triton(x: Tensor | None) -> Tensor | None:
    """beta or a state, whose dtype is free, in one that the kernels take."""
    return x if x is None or x.dtype in TRITON_DTYPES else x.to(torch.float32)


def _triton(q, k, v, beta, scale, initial_state, final_state, cu_seqlens, norm, chunk):
    from dn_lib.kernels import configs

    _check_scale_in_float32(scale)
    beta, initial_state = _for_triton(beta), _for_triton(initial_state)
    needs_gradient = _needs_gradient(q, k, v, beta, initial_state)
    size = chunk or configs.default_chunk(q.dtype)
    # A launch would do this too; here a copy that has to be made is kept for the backward.
    tensors = tuple(None if x is None else x.contiguous() for x in (q, k, v, beta, initial_state))
    q, k, v, beta, initial_state = tensors
    if torch.compiler.is_compiling() or not all(map(_is_plain, (*tensors, cu_seqlens))):
        o, state, *_ = _forward_op(q, k, v, beta, initial_state, cu_seqlens, scale, norm, size, needs_gradient)
        return o, state if final_state else None
    if needs_gradient:
        return _DeltaRule.apply(q, k, v, beta, initial_state, cu_seqlens, scale, norm, size, final_state)
    if chunk is None and q.shape[1] <= RECURRENT_MAX_LENGTH:
        return _recurrent(q, k, v, beta, scale, initial_state, final_state, cu_seqlens, norm)
    o, state, _ = _run_forward(q, k, v, beta, initial_state, cu_seqlens, scale, norm, size, False, final_state)
    return o, state


def _check_scale_in_float32(scale: float) -> None:
    limits = torch.finfo(torch.float32)
    if not limits.tiny <= abs(scale) <= limits.max:
        raise ValueError(f"scale must be finite and not 0 in float32 for backend 'triton', got {scale}")


def _recurrent(q, k, v, beta, scale, initial_state, final_state, cu_seqlens, norm):
    from dn_lib.kernels import launch

    state = None
    if final_state:
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        state = q.new_empty(sequences, q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    o = launch.recurrent(
        q, k, v, beta, scale=scale, initial_state=initial_state, final_state=state, cu_seqlens=cu_seqlens, norm=norm
    )
    return o, state


# --- The public functions ---------------------------------------------------------------------------------------


def _under_autocast(q: Tensor) -> bool:
    """Whether autocast is on where q lies; on "meta", which it does not know, it is not."""
    return q.device.type != "meta" and torch.is_autocast_enabled(q.device.type)


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast q, k and v take its dtype, as a matrix product's operands do; beta and states keep theirs."""
    if _under_autocast(q):
        dtype = torch.get_autocast_dtype(q.device.type)
        return tuple(x.to(dtype) if x.dtype != torch.float64 else x for x in (q, k, v))
    return q, k, v


def _no_autocast(q: Tensor) -> contextlib.AbstractContextManager:
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

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = scale S_t^T q_t  (chapter 2, `eq-delta-rule`;
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
    _check_arguments(q, k, v, beta, initial_state, cu_seqlens, chunk_size, backend)
    check_flag("output_final_state", output_final_state)
    check_flag("qk_l2norm", qk_l2norm)
    scale, chunk_size = scale_or_default(scale, q), None if chunk_size is None else int(chunk_size)
    if not torch.compiler.is_compiling() and _checking.get():
        _check_values(q, k, v, beta, initial_state, cu_seqlens, qk_l2norm)
    q, k, v = _autocast(q, k, v)
    backend = _resolve_backend(q, k, v, beta, initial_state, chunk_size, backend)
    if backend == "triton":
        return _triton(q, k, v, beta, scale, initial_state, output_final_state, cu_seqlens, qk_l2norm, chunk_size)
    form = {
        "recurrent": recurrent_delta_rule,
        "parallel": parallel_delta_rule,
        "chunkwise": chunkwise_delta_rule,
    }
    options = {"chunk_size": chunk_size or 64} if backend == "chunkwise" else {}
    with _no_autocast(q):
        o, state = _pytorch(form[backend], q, k, v, beta, scale, initial_state, cu_seqlens, qk_l2norm, options)
    return o, state if output_final_state else None


def _refuse_gradients(**tensors: Tensor) -> None:
    """Raise RuntimeError where a gradient of decoding is asked for, which would be lost without a word."""
    refuse_transforms("decode_delta_rule", "use delta_rule", *tensors.values())
    for name, x in tensors.items():
        if _needs_gradient(x):
            raise RuntimeError(
                f"decode_delta_rule is not differentiable, and {name} requires a gradient: call it under "
                "torch.no_grad(), or use delta_rule"
            )


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
        _check_rank(name, x, 3, f"three dimensions {meaning}")
    _check_tensor("beta", beta, tuple(q.shape[:2]), "[B, H]", q)
    _check_tensor("state", state, (*q.shape[:2], q.shape[2], v.shape[2]), "[B, H, d_k, d_v]", q)
    check_flag("qk_l2norm", qk_l2norm)
    scale = scale_or_default(scale, q)
    sequence = [x[:, None] for x in (q, k, v, beta)]
    _check_arguments(*sequence, state, None, None, "auto")
    if not torch.compiler.is_compiling() and _checking.get():
        _check_values(*sequence, state, None, qk_l2norm)
    dtype = working_dtype(q)
    if state.dtype != dtype or not state.is_contiguous():
        raise ValueError(f"state must be contiguous and {dtype}, got {state.dtype} with strides {state.stride()}")
    if state.is_neg() or not _is_plain(state):
        raise ValueError(f"state must hold its own values, got {'a negative view' * state.is_neg() or type(state)}")
    compiling = torch.compiler.is_compiling()
    if not compiling and state.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError("state must not be made in inference mode to be updated outside of it: pass a clone")
    _refuse_gradients(q=q, k=k, v=v, beta=beta)
    with torch.no_grad(), _no_autocast(q):
        if _choose_backend(sequence[0], sequence[2], None, "auto") == "triton":
            from dn_lib.kernels import launch

            o = launch.recurrent(
                *sequence, scale=scale, initial_state=state, final_state=state, cu_seqlens=None, norm=qk_l2norm
            )
            return o[:, 0]
        if qk_l2norm:
            q, k = l2_normalise(q), l2_normalise(k)
        o, new = delta_rule_step(*(x.to(dtype) for x in (q, k, v, beta)), state, scale=scale)
        state.copy_(new)
        return o.to(v.dtype)


def _refuse(function: str, options: dict) -> None:
    head_first = options.pop("head_first", False)
    if head_first is not None:
        check_flag("head_first", head_first)
    if head_first:
        raise ValueError("head_first must be False: tensors are [B, L, H, d]; transpose them first")
    if options:
        raise TypeError(f"{function} has no argument {', '.join(map(repr, sorted(options)))}")


def _check_copy(cu_seqlens: Tensor, copy: Tensor) -> None:
    """Raise ValueError where the two can be compared, on a CPU, and differ."""
    if torch.compiler.is_compiling() or not (_is_plain(cu_seqlens) and _is_plain(copy)):
        return
    if cu_seqlens.device.type == "cpu" and cu_seqlens.layout is torch.strided and cu_seqlens.tolist() != copy.tolist():
        raise ValueError("cu_seqlens_cpu must be a copy of cu_seqlens, got other offsets")


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
    **options,
) -> tuple[Tensor, Tensor | None]:
    """`delta_rule` under the name and signature of flash-linear-attention's function: swap one import.

    Shapes as in `delta_rule`.  cu_seqlens_cpu is a copy of cu_seqlens; it is checked (its values where cu_seqlens
    is on the CPU too) and not needed: no length is read on the host.  Raises TypeError for an argument that neither
    function has, else errors as `delta_rule` does.

    >>> q = k = v = torch.eye(16)[None, :, None]
    >>> chunk_delta_rule(q, k, v, torch.ones(1, 16, 1))[0].shape
    torch.Size([1, 16, 1, 16])
    """
    _refuse("chunk_delta_rule", options)
    check_flag("use_qk_l2norm_in_kernel", use_qk_l2norm_in_kernel)
    if cu_seqlens_cpu is not None:
        check_is_tensor("cu_seqlens_cpu", cu_seqlens_cpu, "like cu_seqlens")
        if cu_seqlens_cpu.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens_cpu must be int32 or int64, got {cu_seqlens_cpu.dtype}")
        expected = _size(cu_seqlens) if isinstance(cu_seqlens, Tensor) else None
        if cu_seqlens_cpu.device.type != "cpu" or _size(cu_seqlens_cpu) != expected:
            raise ValueError(
                f"cu_seqlens_cpu must be a copy of cu_seqlens, {expected}, on the CPU, got {_size(cu_seqlens_cpu)} "
                f"on {cu_seqlens_cpu.device}"
            )
        _check_copy(cu_seqlens, cu_seqlens_cpu)
    return delta_rule(
        q, k, v, beta, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        qk_l2norm=use_qk_l2norm_in_kernel, cu_seqlens=cu_seqlens,
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
    **options,
) -> tuple[Tensor, Tensor | None]:
    """The recurrent kernel under the name and signature of flash-linear-attention's function.

    Shapes as in `delta_rule`; beta None means ones.  A beta for each value channel, `[B, L, H, d_v]`, is refused.
    Where a gradient is wanted, inside torch.compile, and where there is no GPU, this is `delta_rule` itself.

    >>> q = k = v = torch.eye(16)[None, :, None]
    >>> fused_recurrent_delta_rule(q, k, v)[0].shape
    torch.Size([1, 16, 1, 16])
    """
    _refuse("fused_recurrent_delta_rule", options)
    check_flag("use_qk_l2norm_in_kernel", use_qk_l2norm_in_kernel)
    check_flag("output_final_state", output_final_state)
    _check_rank("q", q, 4, "four dimensions [B, L, H, d]")
    if beta is None:
        check_channels(q=q)
        beta = torch.ones_like(q[..., 0])
    if isinstance(beta, Tensor) and beta.ndim == 4:
        raise ValueError(
            f"beta must be [B, L, H]: one strength for each value channel, {_size(beta)}, is not supported"
        )
    _check_arguments(q, k, v, beta, initial_state, cu_seqlens, None, "auto")
    tensors = (q, k, v, beta, initial_state)
    triton = _resolve_backend(*tensors, None, "auto") == "triton" and all(map(_is_plain, tensors))
    if not triton or torch.compiler.is_compiling() or _needs_gradient(*tensors):
        return chunk_delta_rule(
            q, k, v, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens
        )
    scale = scale_or_default(scale, q)
    _check_scale_in_float32(scale)
    if _checking.get():
        _check_values(q, k, v, beta, initial_state, cu_seqlens, use_qk_l2norm_in_kernel)
    q, k, v = _autocast(q, k, v)
    beta, initial_state = _for_triton(beta), _for_triton(initial_state)
    return _recurrent(q, k, v, beta, scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel)
