"""Chapter 4: a chunk, or a segment of many, as an affine map of the state that enters it, S -> M S + X.

Shapes and dtypes as in `chunkwise`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dn_lib.forms.chunkwise import chunk_states, chunk_wy
from dn_lib.forms.chunkwise_backward import check_backward
from dn_lib.forms.common import (
    check_chunk_size,
    check_inputs,
    check_one_dtype,
    check_tensors,
    chunk_slices,
    initial_state_or_zeros,
    to_chunks,
    working_dtype,
)
from dn_lib.forms.householder import ut_transform


# Chunks as affine maps ---------------------------------------------------------------------------------
def chunk_affine(k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """A chunk as a map of states, S -> M S + X: M = I - K^T W `[..., d_k, d_k]`, X = K^T U `[..., d_k, d_v]`.

    Implements eq-chunk-affine.

    >>> M, X = chunk_affine(torch.eye(2)[:1], torch.tensor([[3.0]]), torch.ones(1))
    >>> M.tolist(), X.tolist()
    ([[0.0, 0.0], [0.0, 1.0]], [[3.0], [0.0]])
    """
    check_inputs({"k": k}, {"v": v}, {"beta": beta}, {}, time="C")
    k = k.to(working_dtype(k, v, beta))
    w, u = chunk_wy(k, v, beta)
    return torch.eye(k.shape[-1], dtype=w.dtype, device=w.device) - k.mT @ w, k.mT @ u


def check_affine(name: str, pair: tuple[Tensor, Tensor]) -> None:
    """Raise unless `pair` is the map S -> M S + X of a state: M `[..., d_k, d_k]`, X `[..., d_k, d_v]`.

    >>> check_affine("first", (torch.zeros(2, 2), torch.zeros(3, 1)))
    Traceback (most recent call last):
    ValueError: first must be a pair M [..., d_k, d_k], X [..., d_k, d_v], got [2, 2] and [3, 1]
    """
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name} must be a pair (M, X) of tensors, got {type(pair).__name__}")
    M, X = pair
    check_tensors(**{f"{name}[0]": M, f"{name}[1]": X})
    if M.ndim < 2 or X.ndim < 2 or M.shape[-1] != M.shape[-2] or X.shape[-2] != M.shape[-1]:
        raise ValueError(
            f"{name} must be a pair M [..., d_k, d_k], X [..., d_k, d_v], got {list(M.shape)} and {list(X.shape)}"
        )
    check_one_dtype(**{f"{name}[0]": M, f"{name}[1]": X})


def compose_affine(second: tuple[Tensor, Tensor], first: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`first`, then `second`: (M2, X2) o (M1, X1) = (M2 M1, M2 X1 + X2).  Implements eq-affine-composition.

    >>> a, b = (torch.tensor([[2.0]]), torch.tensor([[1.0]])), (torch.tensor([[3.0]]), torch.tensor([[5.0]]))
    >>> compose_affine(b, a)
    (tensor([[6.]]), tensor([[8.]]))
    """
    check_affine("second", second)
    check_affine("first", first)
    (M2, X2), (M1, X1) = second, first
    if M1.shape[-1] != M2.shape[-1] or X1.shape[-1] != X2.shape[-1]:
        raise ValueError(
            f"first must be a map of states [{M2.shape[-1]}, {X2.shape[-1]}] like second, "
            f"got one of [{M1.shape[-1]}, {X1.shape[-1]}]"
        )
    check_one_dtype(second=M2, first=M1)
    try:
        torch.broadcast_shapes(*(x.shape[:-2] for x in (M2, X2, M1, X1)))
    except RuntimeError:
        raise ValueError(
            f"first must have leading dimensions that fit second's {list(M2.shape[:-2])}, got {list(M1.shape[:-2])}"
        ) from None
    return M2 @ M1, M2 @ X1 + X2


def segment_affine(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """(M, X) of a long stretch of tokens: the state of a delta rule on values (0, V), begun at (I, X_0).

    The map S -> M S + X acts on each column of S alone, so M is what becomes of the columns of I when nothing
    is written, and X what becomes of `initial_state` (zeros if None): one pass gives both.

    >>> M, X = segment_affine(torch.eye(3), torch.ones(3, 2), torch.ones(3), chunk_size=2)
    >>> M.abs().max().item(), X.tolist()
    (0.0, [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    """
    check_inputs({"k": k}, {"v": v}, {"beta": beta}, {"initial_state": initial_state})
    check_chunk_size(chunk_size)
    dtype, d_k = working_dtype(k, v, beta, initial_state), k.shape[-1]
    X = initial_state_or_zeros(k, v, initial_state, dtype)
    eye = torch.eye(d_k, dtype=dtype, device=k.device).expand(*k.shape[:-2], d_k, d_k)
    values = torch.cat([torch.zeros_like(k, dtype=dtype), v.to(dtype)], dim=-1)
    C = min(chunk_size, max(k.shape[-2], 1))
    kc, vc, bc = (to_chunks(x, C) for x in (k.to(dtype), values, beta[..., None].to(dtype)))
    _, _, state = chunk_states(kc, vc, bc[..., 0], torch.cat([eye, X], dim=-1))
    return state[..., :d_k], state[..., d_k:]


def segment_state_gradient(
    q: Tensor, k: Tensor, beta: Tensor, do: Tensor, dstate: Tensor, *, chunk_size: int = 64
) -> Tensor:
    """The gradient of the state that enters a stretch, from those of its outputs and of its last state.

    q (scaled), k, beta, do as in `chunkwise_delta_rule_backward`; dstate `[..., d_k, d_v]`; all in one dtype.
    It is M^T dstate + Y, with Y from the outputs alone; values and states play no part: eq-backward-affine.

    >>> x, z = torch.eye(2), torch.zeros(2, 2)
    >>> segment_state_gradient(x, x, torch.ones(2), x, z).tolist()
    [[0.0, 0.0], [0.0, 0.0]]
    """
    check_backward(q, k, beta, {"do": do}, dstate=dstate)
    check_chunk_size(chunk_size)
    for c in reversed(list(chunk_slices(q.shape[-2], chunk_size))):
        qc, kc, dc = q[..., c, :], k[..., c, :], do[..., c, :]
        dpseudo = (qc @ kc.mT).tril().mT @ dc + kc @ dstate
        dR = ut_transform(kc, beta[..., c]).mT @ dpseudo
        dstate = dstate + qc.mT @ dc - kc.mT @ dR
    return dstate
