"""What every form shares: the working dtype, checks of arguments, chunks, and what autograd cannot do."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_INTEGERS = (int, np.integer, torch.SymInt)
_NUMBERS = (*_INTEGERS, float, np.floating, torch.SymFloat)
_FLAGS = (bool, np.bool_)
_OPTIONAL = ("initial_state",)


def working_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input is, else float32: what sums and states are kept in.  None is passed over."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def initial_state_or_zeros(k: Tensor, v: Tensor, initial_state: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The state `[..., d_k, d_v]` to start from, in `dtype`; zeros if `initial_state` is None.

    It may be the caller's own tensor: a form that reads no token must hand back a copy, see `fresh`.
    """
    if initial_state is not None:
        return initial_state.to(dtype)
    return torch.zeros(*k.shape[:-2], k.shape[-1], v.shape[-1], dtype=dtype, device=k.device)


def fresh(state: Tensor) -> Tensor:
    """A copy with memory of its own: decoding writes into the state that it is given."""
    return state.clone(memory_format=torch.contiguous_format)


# --- Checks ---------------------------------------------------------------------------------------------
def check_is_tensor(name: str, value: Any, meaning: str = "") -> None:
    """Raise unless `value` is a dense tensor: not nested, sparse or of another layout.

    >>> check_is_tensor("q", [1.0], "[..., L, d]")
    Traceback (most recent call last):
    TypeError: q must be a tensor [..., L, d], got list
    """
    meaning = meaning and f" {meaning}"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor{meaning}, got {type(value).__name__}")
    if value.is_nested:
        raise ValueError(f"{name} must be a dense tensor{meaning}, got a nested one (pass cu_seqlens for packed rows)")
    if value.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor{meaning}, got layout {value.layout}")


def check_tensors(**tensors: Any) -> None:
    """Raise unless all are dense floating-point tensors on the device of the first; an initial_state may be None.

    >>> check_tensors(q=torch.zeros(3, 2), k=torch.zeros(3, 2, dtype=torch.long))
    Traceback (most recent call last):
    ValueError: k must be a floating-point tensor, got torch.int64 [3, 2]
    """
    first, reference = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if name in _OPTIONAL and tensor is None:
            continue
        check_is_tensor(name, tensor)
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype} {list(tensor.shape)}")
        if tensor.device != reference.device:
            raise ValueError(f"{name} must be on {reference.device} like {first}, got {tensor.device}")


def check_one_dtype(**tensors: Tensor) -> None:
    """Raise ValueError unless all have the dtype of the first.

    >>> check_one_dtype(q=torch.zeros(2), k=torch.zeros(2, dtype=torch.float64))
    Traceback (most recent call last):
    ValueError: k must have the dtype of q, torch.float32, got torch.float64
    """
    first, reference = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.dtype != reference.dtype:
            raise ValueError(f"{name} must have the dtype of {first}, {reference.dtype}, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, axes: str, expected: tuple[int, ...], match: str) -> None:
    """Raise a one-line ValueError that names the argument unless `tensor` has shape `expected`.

    >>> check_shape("beta", torch.zeros(3, 2), "..., L", (2, 3), "q")
    Traceback (most recent call last):
    ValueError: beta must be [..., L] = [2, 3] to match q, got [3, 2]
    """
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name} must be [{axes}] = {list(expected)} to match {match}, got {list(tensor.shape)}")


def check_inputs(
    keys: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    gates: Mapping[str, Tensor],
    states: Mapping[str, Tensor | None],
    *,
    time: str = "L",
    broadcast: bool = False,
) -> None:
    """Raise unless the arguments of a form fit together, on one device; the error names the first that does not.

    keys `[..., L, d_k]`, values `[..., L, d_v]`, gates `[..., L]` and states `[..., d_k, d_v]`, each under its name.
    All are compared with the first of the keys.  A state that is called initial_state may be None.
    time: the letter of the time dimension, for messages; "" where there is none, for a single token.
    broadcast: leading dimensions may differ if they broadcast; otherwise they are the same.

    >>> k = torch.zeros(2, 5, 4)
    >>> check_inputs({"k": k}, {"v": torch.zeros(2, 3, 4)}, {}, {})
    Traceback (most recent call last):
    ValueError: v must be [..., L, d_v] = [2, 5, 4] to match k, got [2, 3, 4]
    """
    check_tensors(**keys, **values, **gates, **states)
    axes, rank = (f"..., {time}", 2) if time else ("...", 1)
    for name, x in (*keys.items(), *values.items()):
        if x.ndim < rank:
            raise ValueError(f"{name} must be a floating-point tensor [{axes}, d], got {x.dtype} {list(x.shape)}")
    first, base = next(iter(keys.items()))
    length, d_k = tuple(base.shape[-rank:-1]), base.shape[-1]
    d_v = next(iter(values.values()), base).shape[-1]
    check = _check_broadcast if broadcast else _check_same
    leading = tuple(base.shape[:-rank])
    for name, x in keys.items():
        check(name, x, f"{axes}, d_k", leading, (*length, d_k), first)
    for name, x in values.items():
        check(name, x, f"{axes}, d_v", leading, (*length, d_v), first)
    check_channels(**{first: base}, **values)
    for name, x in gates.items():
        check(name, x, axes, leading, length, first)
    for name, x in states.items():
        if x is not None:
            check(name, x, "..., d_k, d_v", leading, (d_k, d_v), "k and v")


def _check_same(name: str, x: Tensor, axes: str, leading: tuple[int, ...], own: tuple[int, ...], match: str) -> None:
    check_shape(name, x, axes, (*leading, *own), match)


def _check_broadcast(
    name: str, x: Tensor, axes: str, leading: tuple[int, ...], own: tuple[int, ...], match: str
) -> None:
    cut = x.ndim - len(own)
    if cut < 0 or tuple(x.shape[cut:]) != own:
        expected = ", ".join(["...", *map(str, own)])
        raise ValueError(f"{name} must be [{axes}] = [{expected}] to match {match}, got {list(x.shape)}")
    try:
        torch.broadcast_shapes(leading, x.shape[:cut])
    except RuntimeError:
        wanted, got = list(leading), list(x.shape[:cut])
        raise ValueError(f"{name} must have leading dimensions {wanted} to match {match}, got {got}") from None


def check_sequence(q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None = None, **gates: Tensor) -> None:
    """`check_inputs` of q, k `[..., L, d_k]`, v `[..., L, d_v]`, the initial state, and gates `[..., L]`."""
    check_inputs({"q": q, "k": k}, {"v": v}, gates, {"initial_state": initial_state})


def check_state(name: str, state: Tensor, k: Tensor, v: Tensor, rank: int = 2) -> None:
    """Raise unless `state` is `[..., d_k, d_v]`, with leading dimensions that broadcast to those of k.

    rank: how many of k's dimensions are no leading ones, 3 where they are cut into chunks.
    """
    check_tensors(k=k, **{name: state})
    if tuple(state.shape[-2:]) != (k.shape[-1], v.shape[-1]):
        raise ValueError(
            f"{name} must be [..., d_k, d_v] = [..., {k.shape[-1]}, {v.shape[-1]}], got {list(state.shape)}"
        )
    wanted, given = tuple(k.shape[:-rank]), tuple(state.shape[:-2])
    fits = len(given) <= len(wanted) and all(
        a in (1, b) for a, b in zip(reversed(given), reversed(wanted), strict=False)
    )
    if not fits:
        raise ValueError(f"{name} must have leading dimensions {list(wanted)} to match k, got {list(state.shape)}")


def check_channels(**tensors: Tensor) -> None:
    """Raise ValueError for a tensor whose last dimension is empty.

    >>> check_channels(q=torch.zeros(3, 0))
    Traceback (most recent call last):
    ValueError: q must have at least one channel, got [3, 0]
    """
    for name, tensor in tensors.items():
        if tensor.shape[-1] == 0:
            raise ValueError(f"{name} must have at least one channel, got {list(tensor.shape)}")


def check_integer(name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError unless `value` is a whole number of at least `least`.

    >>> check_integer("chunk_size", True)
    Traceback (most recent call last):
    ValueError: chunk_size must be an integer of at least 1, got True
    """
    if not is_integer(value) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {describe(value)}")


def check_chunk_size(chunk_size: int) -> None:
    """Raise ValueError unless `chunk_size` is a whole number of at least 1."""
    check_integer("chunk_size", chunk_size)


def check_offsets(offsets: list[int], length: int) -> None:
    """Raise ValueError unless the offsets of packed sequences rise from 0 to `length`.

    >>> check_offsets([0, 4, 3, 6], 6)
    Traceback (most recent call last):
    ValueError: cu_seqlens must rise from 0 to L = 6, got [0, 4, 3, 6]
    """
    if offsets[0] != 0 or offsets[-1] != length or any(b < a for a, b in itertools.pairwise(offsets)):
        shown = f"{offsets[:4]} ... {offsets[-1]}" if len(offsets) > 6 else f"{offsets}"
        raise ValueError(f"cu_seqlens must rise from 0 to L = {length}, got {shown}")


def check_cu_seqlens(cu_seqlens: Any, x: Tensor, like: str = "q") -> None:
    """Raise unless `cu_seqlens` is a tensor of N + 1 >= 2 integers on the device of x; values are not read.

    like: the name of x for the message.

    >>> check_cu_seqlens(torch.tensor([0.0, 4.0]), torch.zeros(4, 2))
    Traceback (most recent call last):
    TypeError: cu_seqlens must be int32 or int64, got torch.float32
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        got = list(cu_seqlens.shape) if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise ValueError(f"cu_seqlens must be a tensor of N + 1 >= 2 offsets, got {got}")
    check_is_tensor("cu_seqlens", cu_seqlens, "of offsets")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens must be on {x.device} like {like}, got {cu_seqlens.device}")


def check_positive(name: str, value: Any) -> None:
    """Raise unless `value` is a finite number above 0.

    >>> check_positive("rope_base", -1.0)
    Traceback (most recent call last):
    ValueError: rope_base must be a finite number above 0, got -1.0
    """
    if not is_number(value):
        raise TypeError(f"{name} must be a finite number above 0, got {describe(value)}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {describe(value)}")


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is True or False.

    >>> check_flag("qk_l2norm", "no")
    Traceback (most recent call last):
    TypeError: qk_l2norm must be True or False, got 'no'
    """
    if not isinstance(value, _FLAGS):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")


def check_function(name: str, value: Any) -> None:
    """Raise TypeError unless `value` can be called.

    >>> check_function("matmul", "torch.matmul")
    Traceback (most recent call last):
    TypeError: matmul must be a function, got 'torch.matmul'
    """
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {describe(value)}")


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer of Python or NumPy; True and False are none, nor is 1.0.

    >>> is_integer(1), is_integer(np.int64(1)), is_integer(True), is_integer(1.0)
    (True, True, False, False)
    """
    return isinstance(value, _INTEGERS) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether `value` is a number of Python or NumPy; True and False are none.

    >>> is_number(1), is_number(np.float32(1)), is_number(True), is_number("1")
    (True, True, False, False)
    """
    return isinstance(value, _NUMBERS) and not isinstance(value, bool)


def scale_or_default(scale: float | None, q: Tensor) -> float:
    """The scale as a number, d_k^-0.5 if it is None.  It must be finite, and not 0: gradients are divided by it.

    >>> scale_or_default(None, torch.zeros(1, 4)), scale_or_default(2, torch.zeros(1, 4))
    (0.5, 2.0)
    """
    if scale is None:
        return q.shape[-1] ** -0.5
    if isinstance(scale, Tensor):
        wanted = ", whose gradient would be lost" if scale.requires_grad else ""
        raise TypeError(f"scale must be a number or None, got a tensor{wanted}: multiply q by it, and pass scale=1.0")
    if not is_number(scale):
        raise TypeError(f"scale must be a number or None, got {describe(scale)}")
    try:
        number = float(scale)
    except OverflowError:  # an integer beyond all floats
        number = math.inf
    if not math.isfinite(number) or number == 0:
        raise ValueError(f"scale must be finite and not 0, got {number}")
    return number


def describe(value: Any) -> str:
    """A short text for what was passed: its type where its own text may be long.

    >>> describe(2.5), describe(torch.zeros(2, 3)), describe(len)
    ('2.5', 'a tensor [2, 3]', 'builtin_function_or_method')
    """
    if isinstance(value, Tensor):
        return "a nested tensor" if value.is_nested else f"a tensor {list(value.shape)}"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to write out very long ones
    if isinstance(value, (int, float, complex, bool, np.number, np.bool_)) or value is None:
        return str(value)
    return repr(value) if isinstance(value, str) and len(value) < 40 else type(value).__name__


def over_time(*sequences: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The rows of several `[..., L, d]` tensors, token by token.  A gate `[..., L]` goes in as `gate[..., None]`.

    By `unbind`: its backward pass fills one gradient of size L, where indexing `x[..., t, :]` makes one for
    every token, so that a loop over L tokens would take time quadratic in L.

    >>> [int(k @ v) for k, v in over_time(torch.eye(2), torch.ones(2, 2))]
    [1, 1]
    """
    return zip(*(x.unbind(-2) for x in sequences), strict=True)


def over_sequences(
    form: Callable[..., tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor],
    cu_seqlens: Tensor,
    *,
    initial_state: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`form` on each of the N sequences that are packed along L; the only loop over them.

    inputs: each `[..., L, d]`, as the first of them is, or `[..., L]`.  initial_state: `[..., N, d_k, d_v]` or None.
    form: called as `form(*inputs, initial_state=..., **options)` with the rows of one sequence.
    Returns o `[..., L, d_v]` and the final states `[..., N, d_k, d_v]`.
    Raises ValueError unless the offsets rise from 0 to L.
    """
    offsets = cu_seqlens.tolist()
    first = inputs[0]
    check_offsets(offsets, first.shape[-2])
    lengths = [end - begin for begin, end in itertools.pairwise(offsets)]
    parts = zip(*(x.split(lengths, dim=-2 if x.ndim == first.ndim else -1) for x in inputs), strict=True)
    starts = [None] * len(lengths) if initial_state is None else initial_state.unbind(-3)
    results = [form(*part, initial_state=start, **options) for part, start in zip(parts, starts, strict=True)]
    outputs, states = zip(*results, strict=True)
    return torch.cat(outputs, dim=-2), torch.stack(states, dim=-3)


def on_heads(
    form: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *gates: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    qk_l2norm: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """A form that takes `[..., L, d]`, on an operator's tensors: q, k, v `[B, L, H, d]`, gates `[B, L, H]`.

    initial_state `[N, H, d_k, d_v]` and cu_seqlens are as in `dn_lib.delta_rule`.  options go to the form.
    Returns o `[B, L, H, d_v]` in v's dtype and the final states `[N, H, d_k, d_v]`, float32 at least.
    """
    dtype, precise = v.dtype, working_dtype(q)
    if qk_l2norm:
        q, k = l2_normalise(q), l2_normalise(k)
    inputs = [x.transpose(1, 2).to(precise) for x in (q, k, v, *gates)]
    initial_state = None if initial_state is None else initial_state.to(precise)
    if cu_seqlens is None:
        o, state = form(*inputs, initial_state=initial_state, **options)
    else:  # B is 1, and the N states stand where the forms expect leading dimensions, behind the heads
        first = None if initial_state is None else initial_state.transpose(0, 1)[None]
        o, state = over_sequences(form, inputs, cu_seqlens, initial_state=first, **options)
        state = state[0].transpose(0, 1).contiguous()
    return o.transpose(1, 2).to(dtype), state


# One chunk, and all chunks -----------------------------------------------------------------------------
def to_chunks(x: Tensor, chunk_size: int) -> Tensor:
    """Cut `[..., L, d]` into chunks `[..., n, C, d]`, n = ceil(L / C); the last one is filled with zeros.

    A row with k = 0 and beta = 0 neither erases nor writes, so the filling changes nothing.

    >>> to_chunks(torch.ones(5, 3), 2).shape
    torch.Size([3, 2, 3])
    """
    check_tensors(x=x)
    if x.ndim < 2:
        raise ValueError(f"x must be [..., L, d], got {list(x.shape)}")
    check_chunk_size(chunk_size)
    count = math.ceil(x.shape[-2] / chunk_size)
    # Padding by nothing keeps the strides, which a compiled graph made for another length does not expect.
    x = F.pad(x.contiguous(), (0, 0, 0, count * chunk_size - x.shape[-2]))
    return x.unflatten(-2, (count, chunk_size))


def chunk_slices(length: int, chunk_size: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk_size, length)) for start in range(0, length, chunk_size))


NORM_EPS = 1e-6


def l2_normalise(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) along the last dimension, in float32 at least; keeps float64."""
    x = x.to(working_dtype(x))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` outside autocast: it chooses its own precision, and a state needs float32."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else next(iter(kwargs.values()), None)
        kind = first.device.type if isinstance(first, Tensor) else "cpu"
        # Tensors on "meta" have no arithmetic that autocast could change, and it does not know them.
        with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):
            return function(*args, **kwargs)

    return wrapped
