"""The checks of an operator's arguments: shapes, dtypes and devices always, values inside `checked()`."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Generator

import torch
from torch import Tensor

from dn_lib.forms.common import check_cu_seqlens, check_is_tensor, check_offsets, describe, is_integer
from dn_lib.forms.derivatives import refuse_transforms
from dn_lib.ops.backend import BACKENDS

checking = contextvars.ContextVar("dn_lib_checking", default=os.environ.get("DN_LIB_CHECKED") == "1")


@contextlib.contextmanager
def checked() -> Generator[None, None, None]:
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
    token = checking.set(True)
    try:
        yield
    finally:
        checking.reset(token)


def size_of(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def check_tensor(
    name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str, of: Tensor, over_time: bool = False
) -> None:
    """over_time: whether it is `[B, L, H, ...]`, where the likeliest mistake is `[B, H, L, ...]`."""
    check_is_tensor(name, tensor, meaning)
    if tensor.shape != expected:
        hint = ""
        if over_time and expected[1] != expected[2]:
            B, L, H, *rest = expected
            hint = " (heads before time?)" if tensor.shape == (B, H, L, *rest) else ""
        raise ValueError(f"{name} must be {meaning} = {list(expected)}, got {size_of(tensor)}{hint}")
    if tensor.device != of.device:
        raise ValueError(f"{name} must be on {of.device} like q, got {tensor.device}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")


def check_rank(name: str, x: Tensor, rank: int, meaning: str) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must have {meaning}, got {type(x).__name__}")
    check_is_tensor(name, x)
    if x.ndim != rank:
        raise ValueError(f"{name} must have {meaning}, got {size_of(x)}")


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    backend: str,
    g: Tensor | None = None,
    grouped: bool = False,
) -> None:
    """Shapes, dtypes and devices; raises ValueError or TypeError naming the argument.

    beta: None where the operator has none.  g: the log gates, None without.  grouped: whether v may have a multiple of
    the heads of k; beta, g and states go with those of v.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_rank(name, x, 4, "four dimensions [B, L, H, d]")
    B, L, H, K = q.shape
    check_tensor("q", q, (B, L, H, K), "[B, L, H, d_k]", q)
    check_tensor("k", k, (B, L, H, K), "[B, L, H, d_k], as q,", q, over_time=True)
    heads = "H"
    if grouped and v.shape[2] != H and H:
        if v.shape[2] % H:
            swapped = " (heads before time?)" if v.shape[1] == H and v.shape[2] == L else ""
            raise ValueError(f"v must have a multiple of the H = {H} heads of k, got {size_of(v)}{swapped}")
        H, heads = v.shape[2], "H_v"
    check_tensor("v", v, (B, L, H, v.shape[-1]), f"[B, L, {heads}, d_v]", q, over_time=True)
    if beta is not None:
        check_tensor("beta", beta, (B, L, H), f"[B, L, {heads}]", q, over_time=True)
    if g is not None:
        check_tensor("g", g, (B, L, H), f"[B, L, {heads}]", q, over_time=True)
    if K == 0 or v.shape[-1] == 0:
        raise ValueError(f"q and v must have at least one channel, got d_k = {K} and d_v = {v.shape[-1]}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
    sequences = B
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q)
        if cu_seqlens.is_meta:
            raise ValueError("cu_seqlens must have values, got a tensor on meta")
        if B != 1:
            raise ValueError(f"q must have batch size 1 with cu_seqlens (sequences packed along L), got {B}")
        sequences = cu_seqlens.numel() - 1
    if initial_state is not None:
        shape = (sequences, H, K, v.shape[-1])
        check_tensor("initial_state", initial_state, shape, f"[N, {heads}, d_k, d_v]", q)
    if chunk_size is not None and (not is_integer(chunk_size) or chunk_size < 1):
        raise ValueError(f"chunk_size must be a positive integer or None, got {describe(chunk_size)}")
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {describe(backend)}")


def _first(where: Tensor) -> list[int]:
    return where.nonzero()[0].tolist()


def check_values(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    qk_l2norm: bool,
    g: Tensor | None = None,
) -> None:
    """What `checked` promises; raises ValueError naming the argument and the first offending [b, l, h]."""
    for name, x in (("q", q), ("k", k), ("v", v), ("beta", beta)):
        if x is None:
            continue
        bad = ~x.isfinite() if x.ndim == 3 else ~x.isfinite().all(-1)
        if bad.any():
            raise ValueError(f"{name} must be finite: NaN or infinity at [b, l, h] = {_first(bad)}")
    if g is not None:
        check_log_gates(g)
    if initial_state is not None and not initial_state.isfinite().all():
        bad = ~initial_state.isfinite().flatten(2).all(-1)
        raise ValueError(f"initial_state must be finite: NaN or infinity at [n, h] = {_first(bad)}")
    if beta is not None:
        _check_strength(k, beta, qk_l2norm)
    if cu_seqlens is not None:
        check_offsets(cu_seqlens.tolist(), q.shape[1])


def check_log_gates(g: Tensor) -> None:
    """Raise ValueError unless all are at most 0; -inf is a gate of zero."""
    bad = ~(g <= 0)
    if bad.any():
        at = _first(bad)
        axes = "[b, l, h]" if g.ndim == 3 else "[h]" if g.ndim == 1 else "[b, l, h, channel]"
        raise ValueError(f"g must be at most 0, the logarithm of a gate in [0, 1]: {g[tuple(at)]:.4g} at {axes} = {at}")


def _check_strength(k: Tensor, beta: Tensor, qk_l2norm: bool) -> None:
    if beta.shape[2] != k.shape[2]:
        k = k.repeat_interleave(beta.shape[2] // k.shape[2], 2)
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


def wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def is_plain(x: Tensor | None) -> bool:
    """Whether x has memory that a kernel can be given: not where a subclass (FakeTensor, DTensor) handles operators."""
    plain = Tensor.__torch_dispatch__  # pyright: ignore[reportAttributeAccessIssue]
    return x is None or type(x).__torch_dispatch__ is plain  # pyright: ignore[reportAttributeAccessIssue]


def check_scale_in_float32(scale: float) -> None:
    limits = torch.finfo(torch.float32)
    if not limits.tiny <= abs(scale) <= limits.max:
        raise ValueError(f"scale must be finite and not 0 in float32 for backend 'triton', got {scale}")


def refuse_gradients(**tensors: Tensor) -> None:
    """Raise RuntimeError where a gradient of decoding is asked for, which would be lost without a word."""
    refuse_transforms("decode_delta_rule", "use delta_rule", *tensors.values())
    for name, x in tensors.items():
        if wants_gradient(x):
            raise RuntimeError(
                f"decode_delta_rule is not differentiable, and {name} requires a gradient: call it under "
                "torch.no_grad(), or use delta_rule"
            )


def check_copy(cu_seqlens: Tensor, copy: Tensor) -> None:
    """Raise ValueError where the two can be compared, on a CPU, and differ."""
    if torch.compiler.is_compiling() or not (is_plain(cu_seqlens) and is_plain(copy)):
        return
    if cu_seqlens.device.type == "cpu" and cu_seqlens.layout is torch.strided and cu_seqlens.tolist() != copy.tolist():
        raise ValueError("cu_seqlens_cpu must be a copy of cu_seqlens, got other offsets")
