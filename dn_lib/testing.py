"""What tests, the registry of operators and experiments share: inputs, the reference in float64, one error metric.

Every sampler draws in float64 from a seed, on the CPU unless told otherwise, and rounds afterwards, so that all dtypes
and devices get the same numbers.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("dq", "dk", "dv", "dbeta", "dinitial")


# --- Inputs -------------------------------------------------------------------------------------------------------
def linear_attention_inputs(
    *sizes: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    state: int | Sequence[int] | None = None,
    unit: bool = False,
    bias: float = 0.0,
    equal: bool = False,
    device: str | torch.device = "cpu",
    drawn_on: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v and an initial state for linear attention, standard normal.

    Args:
        sizes: of the tokens' dimensions, then d_k and d_v: `B, L, H, d_k, d_v` for the operators and
            `..., L, d_k, d_v` for the forms.
        state: None for no initial state, else the state's leading dimensions; a number N stands for `N, H`.
        unit: whether keys are divided by their norm.
        bias: is added to every entry of the keys before that; a large one makes them nearly equal.
        equal: whether all keys are the same one, so that every write meets all the others.
        drawn_on: where the numbers are drawn.  A GPU draws large inputs in no time, but not the CPU's numbers.

    Returns q, k `[*tokens, d_k]`, v `[*tokens, d_v]` in `dtype`, and the state `[..., d_k, d_v]`, float32 at least.

    >>> [list(x.shape) for x in linear_attention_inputs(2, 7, 3, 4, 5, state=2)]
    [[2, 7, 3, 4], [2, 7, 3, 4], [2, 7, 3, 5], [2, 3, 4, 5]]
    """
    g = torch.Generator(drawn_on).manual_seed(seed)
    vectors = _vectors(g, sizes, unit, bias, equal)
    q, k, v = (x.to(device, dtype) for x in vectors)
    return q, k, v, _state(g, sizes, state, dtype, device)


def delta_rule_inputs(
    *sizes: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    state: int | Sequence[int] | None = None,
    unit: bool = True,
    bias: float = 0.0,
    equal: bool = False,
    beta_max: float = 2.0,
    edges: bool = False,
    device: str | torch.device = "cpu",
    drawn_on: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v, beta and an initial state for the delta rule; as `linear_attention_inputs`, with keys of norm 1.

    beta `[*tokens]` is uniform in [0, beta_max]. `equal` also sets it to beta_max everywhere: the worst case for the
    inverse of a chunk, whose powers then grow as fast as they can. `edges` sets about a third of beta to 0 and a third
    to beta_max, both exactly: tokens that write nothing, among those that write with full strength.

    >>> q, k, v, beta, state = delta_rule_inputs(7, 4, 5)
    >>> beta.shape, state
    (torch.Size([7]), None)
    """
    g = torch.Generator(drawn_on).manual_seed(seed)
    vectors = _vectors(g, sizes, unit, bias, equal)
    share = torch.rand(*sizes[:-2], generator=g, dtype=torch.float64, device=g.device)
    if edges:
        pick = torch.randint(3, share.shape, generator=g, device=g.device)  # 0: beta is 0, 1: beta_max, 2: as drawn
        share = pick.double().where(pick < 2, share)
    beta = beta_max * share
    if equal:
        beta = torch.full_like(beta, beta_max)
    q, k, v, beta = (x.to(device, dtype) for x in (*vectors, beta))
    return q, k, v, beta, _state(g, sizes, state, dtype, device)


def log_gates(
    *sizes: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    edges: bool = False,
    device: str | torch.device = "cpu",
    drawn_on: str | torch.device = "cpu",
) -> Tensor:
    """Log gates of that shape: most are the log of u^(1/4), u uniform in [0, 1]; gates of exactly 0 and 1 among them.

    An eighth is 0, a gate of 1, and one in 32 is -inf, a gate of 0; with `edges` a third each.

    >>> sorted(set(log_gates(1000, edges=True)[:3].sign().tolist()))
    [-1.0, 0.0]
    """
    g = torch.Generator(drawn_on).manual_seed(seed ^ 0x9E3779B9)
    drawn = torch.rand(sizes, generator=g, dtype=torch.float64, device=g.device).log() / 4
    pick = torch.rand(sizes, generator=g, dtype=torch.float64, device=g.device)
    whole, none = (1 / 3, 2 / 3) if edges else (1 / 8, 1 / 8 + 1 / 32)
    drawn = drawn.masked_fill(pick < none, -math.inf).masked_fill(pick < whole, 0.0)
    return drawn.to(device, dtype)


def gated_inputs(
    inputs: Callable[..., tuple[Tensor | None, ...]],
    *sizes: int,
    channels: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    edges: bool = False,
    device: str | torch.device = "cpu",
    drawn_on: str | torch.device = "cpu",
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """What the sampler `inputs` draws, with log gates before the state: `[*tokens]`, or `[*tokens, d_k]` of channels.

    >>> [list(x.shape) for x in gated_inputs(delta_rule_inputs, 2, 7, 3, 4, 5, state=2)][3:]
    [[2, 7, 3], [2, 7, 3], [2, 3, 4, 5]]
    """
    placed: dict[str, Any] = {"seed": seed, "dtype": dtype, "device": device, "drawn_on": drawn_on}
    gates = log_gates(*(sizes[:-1] if channels else sizes[:-2]), edges=edges, **placed)
    *given, state = inputs(*sizes, **placed, **options)
    return *given, gates, state


def _vectors(g: torch.Generator, sizes: Sequence[int], unit: bool, bias: float, equal: bool) -> list[Tensor]:
    *tokens, d_k, d_v = sizes
    q, k, v = (torch.randn(*tokens, d, generator=g, dtype=torch.float64, device=g.device) for d in (d_k, d_k, d_v))
    k = k + bias
    if equal and k.numel():
        k = k.flatten(0, -2)[0].expand(k.shape)
    return [q, F.normalize(k, dim=-1) if unit else k, v]


def _state(g: torch.Generator, sizes: Sequence[int], state, dtype: torch.dtype, device) -> Tensor | None:
    if state is None:
        return None
    leading = (state, sizes[-3]) if isinstance(state, int) else tuple(state)
    first = torch.randn(*leading, *sizes[-2:], generator=g, dtype=torch.float64, device=g.device)
    return first.to(device, torch.float64 if dtype == torch.float64 else torch.float32)


def output_gradients(
    *sizes: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    state: int | Sequence[int] | None = None,
    device: str | torch.device = "cpu",
    drawn_on: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the output and, if `state` says of how many sequences, of the final state, standard normal.

    The arguments are as in `linear_attention_inputs`, whose numbers of the same seed these are not.

    >>> do, dstate = output_gradients(2, 7, 3, 4, 5, state=2)
    >>> do.shape, dstate.shape
    (torch.Size([2, 7, 3, 5]), torch.Size([2, 3, 4, 5]))
    """
    g = torch.Generator(drawn_on).manual_seed(seed ^ 0x5DEECE66D)
    do = torch.randn(*sizes[:-2], sizes[-1], generator=g, dtype=torch.float64, device=g.device)
    return do.to(device, dtype), _state(g, sizes, state, dtype, device)


LAYOUTS = ("contiguous", "heads first", "rows apart")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers `[B, L, H, ...]` in one of LAYOUTS, detached.

    "heads first" lies in memory as `[B, H, L, ...]`.  "rows apart" is cut out of a wider tensor, in which NaN stands
    between the rows; it is how q is cut out of a joint projection.

    >>> x = laid_out(torch.ones(2, 5, 3, 4), "heads first")
    >>> x.shape, x.stride()
    (torch.Size([2, 5, 3, 4]), (60, 4, 20, 1))
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout}")
    x = x.detach()
    if layout == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "contiguous":
        return x.contiguous()
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), math.nan)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def mixed_lengths(count: int, total: int, seed: int = 0) -> list[int]:
    """`count` lengths of at least 1, very unequal (log-normal), that sum to `total`.

    >>> sum(mixed_lengths(5, 100)), min(mixed_lengths(5, 100)) > 0
    (100, True)
    """
    weight = torch.randn(count, generator=torch.Generator().manual_seed(seed)).exp()
    edges = (weight.cumsum(0) / weight.sum() * (total - count)).round().long().tolist()
    return [1 + b - a for a, b in zip([0, *edges[:-1]], edges, strict=True)]


def offsets(lengths: Sequence[int], dtype: torch.dtype = torch.int64, device: str | torch.device = "cpu") -> Tensor:
    """The cu_seqlens `[N + 1]` of sequences with these lengths.

    >>> offsets([2, 0, 3])
    tensor([0, 2, 2, 5])
    """
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype, device=device)


# --- The reference ------------------------------------------------------------------------------------------------
def normalised(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-6), what `qk_l2norm` makes of queries and keys."""
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def recurrence(
    update: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *gates: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor, float]:
    """An operator as its definition says, one token after the other, in float64; o_t = scale S_t^T q_t.

    update: `S_t = update(S, k_t, v_t, *gates_t)`, with S `[H, d_k, d_v]`, k_t `[H, d_k, 1]`, v_t `[H, 1, d_v]`; a gate
        `[B, L, H]` comes as `[H, 1, 1]` and one for each key channel `[B, L, H, d_k]` as `[H, d_k, 1]`.

    Returns o `[B, L, H, d_v]`, the final states `[N, H, d_k, d_v]`, and the size of o, the norm of scale |q_t| |S_t|
    over all tokens: o is a sum that may cancel, so its error is measured against that size as well.
    It shares no code with the forms and the kernels.
    """
    q, k, v = (x.double() for x in (q, k, v))
    if qk_l2norm:
        q, k = normalised(q), normalised(k)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    wide = [x.double() for x in gates]
    for x in gates:
        if x.ndim not in (3, 4) or x.shape[:3] != q.shape[:3]:
            raise ValueError(f"a gate must be [B, L, H] or [B, L, H, d_k] to match q, got {list(x.shape)}")
    columns = [x[..., None] if x.ndim == 4 else x[..., None, None] for x in wide]
    if cu_seqlens is None:
        rows = [(b, 0, q.shape[1]) for b in range(q.shape[0])]
    else:
        rows = [(0, begin, end) for begin, end in itertools.pairwise(cu_seqlens.tolist())]
    outputs, states, size = [], [], 0.0
    for n, (b, begin, end) in enumerate(rows):
        S = q.new_zeros(q.shape[2], q.shape[3], v.shape[3])
        if initial_state is not None:
            S = initial_state[n].double()
        for t in range(begin, end):
            q_t = q[b, t, :, None, :]
            S = update(S, k[b, t, :, :, None], v[b, t, :, None, :], *(x[b, t] for x in columns))
            outputs.append(factor * (q_t @ S)[:, 0])
            size += (factor * q_t.norm(dim=(1, 2)) * S.norm(dim=(1, 2))).square().sum().item()
        states.append(S)
    o = torch.stack(outputs).reshape(v.shape) if outputs else torch.zeros_like(v)
    S = torch.stack(states) if states else q.new_zeros(0, q.shape[2], q.shape[3], v.shape[3])
    return o, S, size**0.5


def linear_attention_reference(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor, float]:
    """S_t = S_{t-1} + k_t v_t^T by `recurrence`, which says what it takes and returns."""
    return recurrence(lambda S, k, v: S + k * v, q, k, v, **options)


def delta_rule_reference(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, **options) -> tuple[Tensor, Tensor, float]:
    """S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T by `recurrence`, which says what it takes and returns."""
    return recurrence(lambda S, k, v, beta: S + beta * k * (v - k.mT @ S), q, k, v, beta, **options)


def gated_linear_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, **options
) -> tuple[Tensor, Tensor, float]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T by `recurrence`; g per token, or per token and key channel."""
    return recurrence(lambda S, k, v, g: g.exp() * S + k * v, q, k, v, g, **options)


def gated_delta_rule_reference(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, **options
) -> tuple[Tensor, Tensor, float]:
    """S_t = (I - beta_t k_t k_t^T) exp(g_t) S_{t-1} + beta_t k_t v_t^T by `recurrence`: decay first, then erase."""

    def update(S: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
        S = g.exp() * S
        return S + beta * k * (v - k.mT @ S)

    return recurrence(update, q, k, v, beta, g, **options)


def leaves(*tensors: Tensor | None, dtype: torch.dtype | None = None) -> list[Tensor | None]:
    """Copies that require a gradient, in `dtype` if it is given; None stays None."""
    return [None if x is None else x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in tensors]


def forward_and_gradients(
    fn: Callable[..., tuple], tensors: Sequence[Tensor | None], do: Tensor, dstate: Tensor, **options
) -> list[Tensor]:
    """[o, final state, and the gradient of each of `tensors`] of `fn(*tensors[:-1], initial_state=tensors[-1])`.

    do and dstate are the gradients of o and of the final state. An initial state of None has no gradient.
    """
    *inputs, first = tensors
    o, state, *_ = fn(*inputs, initial_state=first, **options)
    given = [x for x in tensors if x is not None]
    return [o, state, *torch.autograd.grad((o, state), given, (do.to(o.dtype), dstate.to(state.dtype)))]


# --- Errors -------------------------------------------------------------------------------------------------------
def relative_error(x: Tensor, reference: Tensor, size: float = 0.0) -> float:
    """|x - reference| / |reference|, norms over all entries, computed in float64 (complex128 for complex numbers).

    size: of the terms that the reference is a sum of, where they may cancel; it divides if it is larger.
    Where both |reference| and size are zero, the answer is 0 for zeros and infinity for anything else.
    It is infinity, too, if x or the reference holds NaN or infinity, or the answer is too large: it is never NaN, so
    that `relative_error(...) < bound` and `not relative_error(...) > bound` are the same.

    Raises TypeError for what is no tensor and ValueError for another shape: nothing is broadcast.

    >>> relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
    0.1
    >>> relative_error(torch.zeros(2), torch.zeros(2)), relative_error(torch.ones(2), torch.zeros(2))
    (0.0, inf)
    """
    for name, tensor in (("x", x), ("reference", reference)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if x.shape != reference.shape:
        raise ValueError(f"x must have the shape of the reference, {list(reference.shape)}, got {list(x.shape)}")
    wide = torch.complex128 if x.is_complex() or reference.is_complex() else torch.float64
    x, reference = (y.detach().to(reference.device, wide) for y in (x, reference))
    scale = max(reference.norm().item(), size)
    if not 1e-150 < scale < 1e150:  # where squares overflow, or vanish
        unit = max(reference.abs().max().item() if reference.numel() else 0.0, size)
        if 0.0 < unit < math.inf:
            x, reference, size = x / unit, reference / unit, size / unit
            scale = max(reference.norm().item(), size)
    if scale == 0.0:
        return math.inf if x.any() else 0.0
    error = (x - reference).norm().item() / scale
    return error if math.isfinite(error) else math.inf


def sensitivity(
    fn: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    sizes: Sequence[float] = (),
    *,
    draws: int = 2,
) -> list[float]:
    """For each result of `fn(*inputs)`, its condition number: its relative change per relative change of the inputs.

    Every number of every input is changed by a factor of its own, at most 1 +- 2^-24, in float64, where the changes of
    the results are far above rounding and far below the second order; the largest of a few draws counts. An algorithm
    whose every step is exact for operands that are off by a relative e gives results that are off by e times this.
    """
    step = 2.0**-24
    exact = [None if x is None else x.double() for x in inputs]
    results = fn(*exact)
    sizes = (*sizes, *(0.0 for _ in results[len(sizes) :]))
    g = torch.Generator().manual_seed(0)
    worst = [0.0] * len(results)
    for _ in range(draws):
        moved = [
            x if x is None else x * (1 + step * (2 * torch.rand(x.shape, generator=g, dtype=torch.float64) - 1))
            for x in exact
        ]
        for i, (a, b, size) in enumerate(zip(fn(*moved), results, sizes, strict=True)):
            worst[i] = max(worst[i], relative_error(a, b, size) / step)
    return worst


# --- Memory -------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within it memory that PyTorch allocates without writing it holds NaN, so that no earlier result lies in it.

    >>> with poisoned():
    ...     torch.empty(2)
    tensor([nan, nan])
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switches: Any = torch.utils.deterministic  # which makes properties when it is imported
    fill = switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    switches.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        switches.fill_uninitialized_memory = fill
