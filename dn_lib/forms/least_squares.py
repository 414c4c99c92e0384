"""Least squares as a state: what the delta rule approaches by one step of gradient descent per token.

A fast weight S that maps keys to values has, after t tokens, the weighted squared error

    L_t(S) = sum_{j <= t} beta_j (alpha_{j+1} ... alpha_t) |v_j - S^T k_j|^2  +  (what is left of ridge |S|^2).

The delta rule takes one step against the newest term.  Here S_t is the minimiser: recursive least squares keeps, beside
S, the inverse P of the weighted sum of k k^T, and corrects S by P_t k_t instead of k_t.  With P = I for ever it is the
delta rule.

Shapes: q, k `[..., L, d_k]`, v `[..., L, d_v]`, beta and g = log alpha `[..., L]`, S `[..., d_k, d_v]`,
P `[..., d_k, d_k]`.
Sources: Plackett (1950), recursive least squares; von Oswald et al. (2025), MesaNet, for its use as a layer, whose
ridge does not decay (`mesa`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dn_lib.forms.common import (
    check_inputs,
    check_positive,
    check_shape,
    check_tensors,
    fresh,
    initial_state_or_zeros,
    over_time,
    scale_or_default,
    without_autocast,
    working_dtype,
)
from dn_lib.forms.linear_attention import stacked, write_and_read


@without_autocast
def recursive_least_squares(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    ridge: float = 1.0,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """S_t = argmin of L_t above, one token at a time in O(d_k^2 + d_k d_v): o_t = scale S_t^T q_t.

        P  = P_{t-1} / alpha_t                                        forget: every earlier term weighs less
        h  = beta_t P k_t / (1 + beta_t k_t^T P k_t)                  the gain
        S_t = S_{t-1} + h (v_t - S_{t-1}^T k_t)^T
        P_t = P - h (P k_t)^T

    beta: weights of the tokens, >= 0; 0 leaves a token out.  g: log alpha <= 0, None for no forgetting; finite, since
    alpha = 0 would make P infinite.  ridge: P_0 = I / ridge.  With forgetting, the ridge decays too.
    initial_state: (S, P) as this function returns it.
    Returns o `[..., L, d_v]` in v's dtype and (S, P), float32 at least.  Raises ValueError or TypeError, naming the
    argument, for what does not fit.
    P_t is a difference of nearly equal matrices where the keys are few or much alike: in float32 it can lose its
    symmetry and its sign.  `mesa` solves anew for each token and does not.

    >>> k = torch.eye(3)
    >>> o, (S, P) = recursive_least_squares(k, k, torch.ones(3, 1), torch.ones(3), scale=1.0)
    >>> S.flatten().tolist(), P.diagonal().tolist()  # one key, one value, a ridge of 1: half way
    ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
    """
    gates = {"beta": beta} if g is None else {"beta": beta, "g": g}
    check_tensors(q=q, k=k, v=v, **gates)
    check_inputs({"k": k, "q": q}, {"v": v}, gates, {})
    check_positive("ridge", ridge)
    dtype = working_dtype(q, k, v, beta, g)
    if initial_state is None:
        S = initial_state_or_zeros(k, v, None, dtype)
        P = torch.eye(k.shape[-1], dtype=dtype, device=k.device).expand(*k.shape[:-2], -1, -1) / ridge
    else:
        S, P = _state_pair(initial_state, k, v, dtype)
    factor, outputs = scale_or_default(scale, q), list[Tensor]()
    forget = torch.ones_like(beta, dtype=dtype) if g is None else g.to(dtype).neg().exp()
    tokens = (q, k, v, beta[..., None], forget[..., None])
    for q_t, k_t, v_t, beta_t, f_t in over_time(*(x.to(dtype) for x in tokens)):
        P = f_t[..., None] * P
        Pk = (P @ k_t[..., None])[..., 0]
        gain = beta_t * Pk / (1 + beta_t * (k_t * Pk).sum(-1, keepdim=True))
        error = v_t - (k_t[..., None, :] @ S)[..., 0, :]
        P = P - gain[..., :, None] * Pk[..., None, :]
        o, S = write_and_read(q_t, gain, error, S, factor)
        outputs.append(o)
    o, S = stacked(outputs, v, S)
    return o, (S, fresh(P) if not outputs else P)


def _state_pair(pair: tuple[Tensor, Tensor], k: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(S, P), checked, in `dtype` at least."""
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise TypeError(f"initial_state must be a pair (S, P) or None, got {type(pair).__name__}")
    S, P = pair
    check_tensors(**{"initial_state[0]": S, "initial_state[1]": P})
    leading, d = tuple(k.shape[:-2]), k.shape[-1]
    check_shape("initial_state[0]", S, "..., d_k, d_v", (*leading, d, v.shape[-1]), "k and v")
    check_shape("initial_state[1]", P, "..., d_k, d_k", (*leading, d, d), "k")
    return S.to(dtype), P.to(dtype)


@without_autocast
def mesa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    ridge: float | Tensor = 1.0,
    scale: float | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """o_t = scale G_t^T (H_t + Diag(ridge))^{-1} q_t, with H_t = alpha_t H_{t-1} + beta_t k_t k_t^T and
    G_t = alpha_t G_{t-1} + beta_t k_t v_t^T: the minimiser with a ridge that does not decay, solved for each token.

    Without forgetting it is `recursive_least_squares`.  A direct solve in O(L d_k^3) work and O(L d_k (d_k + d_v))
    memory, the definition to test by; the MesaNet layer solves by conjugate gradients.
    ridge: a number > 0, or a tensor `[d_k]` of them.  All else as in `recursive_least_squares`.
    Returns o and (G_L, H_L).  Source: von Oswald et al. (2025), MesaNet.

    >>> k = torch.eye(3)
    >>> mesa(k, k, torch.ones(3, 1), torch.ones(3), scale=1.0)[0].flatten().tolist()
    [0.5, 0.5, 0.5]
    """
    gates = {"beta": beta} if g is None else {"beta": beta, "g": g}
    check_tensors(q=q, k=k, v=v, **gates)
    check_inputs({"k": k, "q": q}, {"v": v}, gates, {})
    dtype = working_dtype(q, k, v, beta, g)
    queries, keys, values, weights = (x.to(dtype) for x in (q, k, v, beta[..., None]))
    decay = torch.ones_like(beta, dtype=dtype) if g is None else g.to(dtype).exp()
    if isinstance(ridge, Tensor):
        check_shape("ridge", ridge, "d_k", tuple(k.shape[-1:]), "k")
        added = ridge.to(dtype).diag()
    else:
        check_positive("ridge", ridge)
        added = ridge * torch.eye(k.shape[-1], dtype=dtype, device=k.device)
    G = initial_state_or_zeros(k, v, None, dtype)
    H = initial_state_or_zeros(k, k, None, dtype)
    factor, outputs = scale_or_default(scale, q), list[Tensor]()
    for q_t, k_t, v_t, beta_t, a_t in over_time(queries, keys, values, weights, decay[..., None]):
        G = a_t[..., None] * G + (beta_t * k_t)[..., :, None] * v_t[..., None, :]
        H = a_t[..., None] * H + (beta_t * k_t)[..., :, None] * k_t[..., None, :]
        p = torch.cholesky_solve(q_t[..., None], torch.linalg.cholesky(H + added))
        outputs.append(factor * (p.mT @ G)[..., 0, :])
    o, G = stacked(outputs, v, G)
    return o, (G, H)
