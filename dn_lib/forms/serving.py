"""Serving with a state instead of a list of keys: taking tokens back, and keeping states in 8 bits.

A list of keys and values forgets its last m tokens by being cut.  A state has the tokens mixed into it.  But each
token changed it by one outer product,

    S_t = A_t S_{t-1} + k_t u_t^T,        u_t = beta_t (v_t - (A_t S_{t-1})^T k_t),

where u_t is a pseudo-value (chapter 4), which the write has to compute anyway, and A_t the gate (1 without gates).
Three ways lead from S_t back to S_{t-m}:

- **take back what was written** (`roll_back`): S_{t-m} = S_t - K^T U with the last m keys and pseudo-values.  Without
  gates only, no division, no condition: the error is the rounding of S_t and of a product.
- **replay** (`replay`): keep S_{t-m} itself and the m pairs (k, u), and write the accepted ones again.  Takes gates,
  and repeats the arithmetic of decoding.  Memory: one state and m (d_k + d_v) numbers, where copies are m states.
- **invert the step** (`step_back`), which needs k, v, beta and no pseudo-values:
  S_{t-1} = A_t^{-1} (I + beta / (1 - beta |k|^2) k k^T) (S_t - beta k v^T).  It divides by 1 - beta |k|^2 and by the
  gate: what was erased, or decayed, is multiplied up from its rounding error (`step_back_growth`).  At
  beta |k|^2 = 1 the old value is gone, at a gate of 0 the whole state.

All functions take keys `[..., m, d_k]`, values `[..., m, d_v]`, beta `[..., m]`, log gates g `[..., m]` or
`[..., m, d_k]`, and states `[..., d_k, d_v]`.  Computed in float32 at least.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dn_lib.forms.common import (
    check_inputs,
    check_integer,
    check_sequence,
    check_tensors,
    scale_or_default,
    working_dtype,
)
from dn_lib.forms.gated import gate_columns


def _gate_of(g: Tensor | None, k: Tensor, dtype: torch.dtype) -> Tensor | None:
    """exp(g) as columns `[..., m, 1]` or `[..., m, d_k]`."""
    if g is None:
        return None
    check_tensors(k=k, g=g)
    return gate_columns(g, k).to(dtype).exp()


# --- Tokens that are taken back -------------------------------------------------------------------------
def draft_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    g: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """m steps of the delta rule from `state`, and what they wrote: o `[..., m, d_v]`, the state, U `[..., m, d_v]`.

    Shapes as above, q like k.  `scale=None` means d_k**-0.5.  o is in v's dtype, the state and U in float32 at least.
    The given state is not changed.  Raises ValueError or TypeError, naming the argument, for what does not fit.
    Implements eq-delta-recurrence and, with g, eq-gated-delta; per channel as `dn_lib.forms.gated`: decay, then erase.

    >>> k = torch.eye(2)
    >>> o, state, u = draft_delta_rule(k, k, torch.ones(2, 1), torch.full((2,), 0.5), torch.zeros(2, 1))
    >>> u.tolist(), state.tolist()
    ([[0.5], [0.5]], [[0.5], [0.5]])
    """
    check_sequence(q, k, v, state, beta=beta)
    scale, dtype = scale_or_default(scale, q), working_dtype(q, k, v, beta, state, g)
    gates, S = _gate_of(g, k, dtype), state.to(dtype)
    outputs, written = [v[..., :0, :].to(dtype)], [v[..., :0, :].to(dtype)]
    for t in range(k.shape[-2]):
        q_t, k_t, v_t = (x[..., t : t + 1, :].to(dtype) for x in (q, k, v))
        if gates is not None:
            S = gates[..., t, :, None] * S
        u_t = beta[..., t, None, None].to(dtype) * (v_t - k_t @ S)
        S = S + k_t.mT @ u_t
        outputs.append(scale * q_t @ S)
        written.append(u_t)
    return torch.cat(outputs, -2).to(v.dtype), S.clone(), torch.cat(written, -2)


def roll_back(state: Tensor, k: Tensor, written: Tensor) -> Tensor:
    """The state before the last m tokens of an ungated rule, S_{t-m} = S_t - K^T U.

    state `[..., d_k, d_v]`; k `[..., m, d_k]` and written `[..., m, d_v]` of exactly the tokens to be taken back.  For
    the delta rule U are the pseudo-values (`draft_delta_rule`), for linear attention the values.  Returns float32 at
    least; m may be 0.  With gates use `replay`: here the decay would have to be divided out.
    The error is at most a few roundings of the largest numbers met, |S| and |k| |u|, whatever beta is.
    Raises ValueError or TypeError, naming the argument, for what does not fit.

    >>> k, start = torch.eye(2), torch.ones(2, 1)
    >>> _, state, u = draft_delta_rule(k, k, torch.zeros(2, 1), torch.ones(2), start)
    >>> roll_back(state, k[1:], u[1:]).tolist(), torch.equal(roll_back(state, k, u), start)
    ([[0.0], [1.0]], True)
    """
    check_inputs({"k": k}, {"written": written}, {}, {"state": state}, time="m")
    dtype = working_dtype(state, k, written)
    return state.to(dtype) - k.to(dtype).mT @ written.to(dtype)


def replay(state: Tensor, k: Tensor, written: Tensor, *, g: Tensor | None = None) -> Tensor:
    """The state after m tokens from the one before them and what they wrote, S <- A_t S + k_t u_t^T.

    state `[..., d_k, d_v]` before the tokens, k `[..., m, d_k]`, written `[..., m, d_v]`, g as above.  U may come from
    a longer draft of which the first m tokens are accepted.  The steps are those of decoding, in its order.
    Raises ValueError or TypeError, naming the argument, for what does not fit.

    >>> replay(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1), g=torch.tensor([0.5]).log()).item()
    1.5
    """
    check_inputs({"k": k}, {"written": written}, {}, {"state": state}, time="m")
    dtype = working_dtype(state, k, written, g)
    gates, S = _gate_of(g, k, dtype), state.to(dtype)
    for t in range(k.shape[-2]):
        if gates is not None:
            S = gates[..., t, :, None] * S
        S = S + k[..., t : t + 1, :].to(dtype).mT @ written[..., t : t + 1, :].to(dtype)
    return S.clone()


def step_back(state: Tensor, k: Tensor, v: Tensor, beta: Tensor, *, g: Tensor | None = None) -> Tensor:
    """The state before m tokens by inverting their steps, newest first; needs no pseudo-values.

    state `[..., d_k, d_v]`, the rest as above.  Exact in exact arithmetic, but rounding errors grow by
    `step_back_growth`: see there before use.  Raises ValueError, naming beta or g, where a step has no inverse
    (beta |k|^2 = 1, or a gate of 0), and for what does not fit.

    >>> k, v, half = torch.eye(2)[:1], torch.tensor([[3.0]]), torch.tensor([0.5])
    >>> step_back(torch.tensor([[2.0], [5.0]]), k, v, half).tolist()  # 0.5 * 1 + 0.5 * 3 = 2
    [[1.0], [5.0]]
    >>> step_back(torch.tensor([[3.0], [5.0]]), k, v, 2 * half)
    Traceback (most recent call last):
    ValueError: beta must not make beta |k|^2 = 1, where a step erases for good, got it at token 0
    """
    check_inputs({"k": k}, {"v": v}, {"beta": beta}, {"state": state}, time="m")
    dtype = working_dtype(state, k, v, beta, g)
    gates, S = _gate_of(g, k, dtype), state.to(dtype)
    kept = _kept(k, beta, dtype)
    _refuse_zero("beta", kept, "make beta |k|^2 = 1, where a step erases for good")
    if gates is not None:
        _refuse_zero("g", gates.amin(-1), "be a gate of 0, which forgets the whole state")
    for t in reversed(range(k.shape[-2])):
        k_t, v_t = k[..., t : t + 1, :].to(dtype), v[..., t : t + 1, :].to(dtype)
        b_t = beta[..., t, None, None].to(dtype)
        S = S - k_t.mT @ (b_t * v_t)
        S = S + k_t.mT @ (b_t / kept[..., t, None, None] * (k_t @ S))
        if gates is not None:
            S = S / gates[..., t, :, None]
    return S.clone()


def _kept(k: Tensor, beta: Tensor, dtype: torch.dtype) -> Tensor:
    """1 - beta |k|^2, the eigenvalue of a step along its key: `[..., m]`."""
    return 1 - beta.to(dtype) * k.to(dtype).square().sum(-1)


def _refuse_zero(name: str, x: Tensor, what: str) -> None:
    zero = (x == 0).reshape(-1, x.shape[-1]).any(0)
    if zero.any():
        raise ValueError(f"{name} must not {what}, got it at token {int(zero.nonzero()[0])}")


def step_back_growth(k: Tensor, beta: Tensor, *, g: Tensor | None = None) -> Tensor:
    """By how much `step_back` can multiply an error of the state it starts from, at most: `[...]`.

    The product over the tokens of max(1, 1 / |1 - beta |k|^2|) / (smallest gate): the norm of each inverse.  Without
    gates `roll_back` has 1 here.  At beta = 0.9 a token costs a digit, at 0.99 two.

    >>> step_back_growth(torch.eye(2), torch.tensor([0.9, 0.99])).round().item()
    1000.0
    """
    check_inputs({"k": k}, {}, {"beta": beta}, {}, time="m")
    dtype = working_dtype(k, beta, g)
    growth = (1 / _kept(k, beta, dtype).abs()).clamp(min=1)
    gates = _gate_of(g, k, dtype)
    return (growth if gates is None else growth / gates.amin(-1)).prod(-1)


# --- States in 8 bits -----------------------------------------------------------------------------------
def quantise_state(state: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """A state as int8 codes `[..., d_k, d_v]` and one scale for each row `[..., d_k, 1]`, float32 at least.

    A row is a key channel.  Its scale is its largest modulus over 127, its codes the nearest multiples: no entry is
    off by more than half a scale.  With a `generator` (on the state's device) rounding is random and right on average,
    off by less than a scale.  Raises ValueError or TypeError, naming `state`, for what is no state.

    >>> codes, scales = quantise_state(torch.tensor([[127.0, -50.4], [0.0, 0.0]]))
    >>> codes.tolist(), scales.tolist()
    ([[127, -50], [0, 0]], [[1.0], [0.0]])
    """
    check_tensors(state=state)
    if state.ndim < 2:
        raise ValueError(f"state must be [..., d_k, d_v], got {list(state.shape)}")
    wide = state.to(working_dtype(state))
    scales = wide.abs().amax(-1, keepdim=True) / 127
    ratio = wide / torch.where(scales == 0, torch.ones_like(scales), scales)
    if generator is None:
        whole = ratio.round()
    else:
        noise = torch.rand(ratio.shape, generator=generator, dtype=ratio.dtype, device=ratio.device)
        whole = (ratio + noise).floor()
    return whole.clamp(-127, 127).to(torch.int8), scales


def dequantise_state(codes: Tensor, scales: Tensor) -> Tensor:
    """codes * scales: `[..., d_k, d_v]` in the dtype of the scales.

    >>> dequantise_state(torch.tensor([[2, -1]], dtype=torch.int8), torch.tensor([[0.5]])).tolist()
    [[1.0, -0.5]]
    """
    if not isinstance(codes, Tensor) or codes.dtype != torch.int8 or codes.ndim < 2:
        got = f"{codes.dtype} {list(codes.shape)}" if isinstance(codes, Tensor) else type(codes).__name__
        raise ValueError(f"codes must be int8 [..., d_k, d_v], got {got}")
    check_tensors(scales=scales)
    if tuple(scales.shape) != (*codes.shape[:-1], 1):
        raise ValueError(f"scales must be [..., d_k, 1] = {[*codes.shape[:-1], 1]}, got {list(scales.shape)}")
    return codes.to(scales.dtype) * scales


def rounding_bound(scales: Tensor, d_v: int) -> Tensor:
    """The most that nearest rounding changes a state, in Frobenius norm: `[..., d_k, 1]` -> `[...]`.

    Half a scale for each of a row's d_v entries: sqrt(d_v sum of scales^2) / 2.  With unit keys, 0 <= beta <= 2 and
    gates at most 1, no step makes a difference of two states longer.  So the drift of a state that is rounded after
    each token is at most the sum of these bounds over the tokens: linear in the length at worst.  Erasure and decay
    forget old errors along with old values.

    >>> rounding_bound(torch.tensor([[2.0]]), 4).item()
    2.0
    """
    check_tensors(scales=scales)
    check_integer("d_v", d_v)
    return scales.square().sum((-2, -1)).mul(d_v).sqrt() / 2


def quantised_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    g: Tensor | None = None,
    scale: float | None = None,
    every: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The (gated) delta rule from a state of zeros that is kept in 8 bits, stored again after each `every` tokens.

    Shapes as above, with L tokens for m; `generator` as in `quantise_state`.  Between two stores the state is float32
    at least, as in a kernel that takes `every` tokens a call.  Returns o `[..., L, d_v]`, the last codes and scales.
    Raises ValueError or TypeError, naming the argument, for what does not fit.

    >>> x = torch.eye(4)
    >>> o, codes, scales = quantised_delta_rule(x, x, x, torch.ones(4), scale=1.0)
    >>> torch.allclose(o, x), dequantise_state(codes, scales).diagonal().tolist()
    (True, [1.0, 1.0, 1.0, 1.0])
    """
    check_sequence(q, k, v, None, beta=beta)
    check_integer("every", every)
    dtype = working_dtype(q, k, v, beta, g)
    if g is not None:
        check_tensors(k=k, g=g)
        g = gate_columns(g, k)
    start = torch.zeros(*k.shape[:-2], k.shape[-1], v.shape[-1], dtype=dtype, device=k.device)
    (codes, scales), outputs = quantise_state(start), [v[..., :0, :]]
    for begin in range(0, k.shape[-2], every):
        part = slice(begin, begin + every)
        gates = None if g is None else g[..., part, :].expand(*k[..., part, :].shape)
        o, state, _ = draft_delta_rule(
            q[..., part, :], k[..., part, :], v[..., part, :], beta[..., part], dequantise_state(codes, scales),
            g=gates, scale=scale,
        )  # fmt: skip
        codes, scales = quantise_state(state, generator=generator)
        outputs.append(o)
    return torch.cat(outputs, -2), codes, scales
