"""The generalised delta rule: a state that is multiplied by a diagonal plus a matrix of rank one.

    S_t = (Diag(exp g_t) + b_t a_t^T) S_{t-1} + k_t v_t^T,      o_t = scale S_t^T q_t

The delta rule is a = -k, b = beta k, g = 0, and a write of beta v; Kimi Delta Attention b = beta k, a = -exp(g) k; the
rule of RWKV-7 (`rwkv7_inputs`) erases with a key of its own and with a strength for each channel.  The matrix need not
be symmetric, so unlike the Householder matrices of chapter 3 it can make vectors longer: no bound on its norm holds in
general.

Shapes: q, k, a, b `[..., L, d_k]`, v `[..., L, d_v]`, a state `[..., d_k, d_v]`; g `[..., L, d_k]`, `[..., L]` or
`[H]`, as in `dn_lib.forms.gated`, at most 0.
Sources: Peng et al. (2025), RWKV-7; the chunkwise form is chapter 4's with the decays of `dn_lib.forms.gated`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dn_lib.forms.common import (
    check_chunk_size,
    check_inputs,
    check_tensors,
    fresh,
    initial_state_or_zeros,
    l2_normalise,
    over_time,
    scale_or_default,
    to_chunks,
    without_autocast,
    working_dtype,
)
from dn_lib.forms.gated import decayed_products, gate_columns, sums_after
from dn_lib.forms.linear_attention import stacked, write_and_read


def rwkv7_inputs(k: Tensor, w: Tensor, a: Tensor, k_k: Tensor, k_a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k, a, b and g of this module for RWKV-7's rule: `[..., L, d]` three times, weights `[d]` twice -> `[..., L, d]`.

    S_t = (Diag(w_t) - (a_t * kappa_t) kappa_t^T) S_{t-1} + k~_t v_t^T, with kappa = (k * k_k) / |k * k_k|, the key that
    erases, and k~ = k * (1 + (a - 1) * k_a), the key that is written.

    k: the projected keys.  w: the decays, in (0, 1]; RWKV-7 has exp(-e^(-1/2) sigmoid(.)), so above 0.545.  a: the
    in-context learning rate, in (0, 1), one per channel.
    Returns (k~, -kappa, a * kappa, log w).  Raises ValueError, naming the argument, for shapes that do not fit.
    Source: Peng et al. (2025), RWKV-7, whose state is the transpose of ours.

    >>> k, one = torch.tensor([[3.0, 4.0]]), torch.ones(2)
    >>> [x.tolist() for x in rwkv7_inputs(k, one[None], one[None], one, one)[:3]]
    [[[3.0, 4.0]], [[-0.6000000238418579, -0.800000011920929]], [[0.6000000238418579, 0.800000011920929]]]
    """
    check_inputs({"k": k, "w": w, "a": a}, {}, {}, {})
    check_tensors(k_k=k_k, k_a=k_a)
    for name, x in (("k_k", k_k), ("k_a", k_a)):
        if x.shape != k.shape[-1:]:
            raise ValueError(f"{name} must be [d_k] = {list(k.shape[-1:])} to match k, got {list(x.shape)}")
    dtype = working_dtype(k, w, a, k_k, k_a)
    k, w, a = (x.to(dtype) for x in (k, w, a))
    kappa = l2_normalise(k * k_k.to(dtype))
    return k * (1 + (a - 1) * k_a.to(dtype)), -kappa, a * kappa, w.log()


def _prepared(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, scale: float | None, initial_state: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """Checked arguments in the working dtype: scaled q, then k, v, a, b and columns of g; the state."""
    check_tensors(q=q, k=k, v=v, a=a, b=b, g=g, initial_state=initial_state)
    check_inputs({"k": k, "q": q, "a": a, "b": b}, {"v": v}, {}, {"initial_state": initial_state})
    columns, dtype = gate_columns(g, k), working_dtype(q, k, v, a, b, g, initial_state)
    state = initial_state_or_zeros(k, v, initial_state, dtype)
    scaled = scale_or_default(scale, q) * q.to(dtype)
    return [scaled, *(x.to(dtype) for x in (k, v, a, b, columns))], state


@without_autocast
def recurrent_dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = (Diag(exp g_t) + b_t a_t^T) S_{t-1} + k_t v_t^T, one token at a time: the definition.

    Shapes as above.  Returns o `[..., L, d_v]` in v's dtype and the last state, float32 at least.  `scale=None` means
    d_k**-0.5.  Raises ValueError or TypeError, naming the argument, for what does not fit; g <= 0 is not checked.

    >>> from dn_lib.forms.delta_rule import recurrent_delta_rule
    >>> q, k, v, beta = torch.rand(5, 4), torch.rand(5, 4), torch.rand(5, 2), torch.rand(5, 1)
    >>> o, _ = recurrent_dplr(q, beta * k, v, -k, beta * k, torch.zeros(5))
    >>> torch.allclose(o, recurrent_delta_rule(q, k, v, beta[:, 0])[0], atol=1e-6)
    True
    """
    inputs, state = _prepared(q, k, v, a, b, g, scale, initial_state)
    outputs: list[Tensor] = []
    for q_t, k_t, v_t, a_t, b_t, g_t in over_time(*inputs):
        read = a_t[..., None, :] @ state
        o, state = write_and_read(q_t, k_t, v_t, g_t.exp()[..., :, None] * state + b_t[..., :, None] * read, 1.0)
        outputs.append(o)
    return stacked(outputs, v, state)


@without_autocast
def chunkwise_dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The same in ceil(L / C) sequential steps.

    In a chunk that starts from S, let row i of U be u_i = S_{i-1}^T a_i, what token i reads before it writes.  Then
    token i writes b_i u_i^T + k_i v_i^T and everything before decays, so with <x_i, y_j> the product in which each
    channel has decayed over the tokens between, j + 1 ... i - 1 for a, which reads before the decay, j + 1 ... i for q,

        U  = (I - <A, B>)^{-1} (<A, K> V + (A gamma_before) S)          <A, .> strictly lower triangular
        O  = (Q gamma) S + <Q, B> U + <Q, K> V                          <Q, .> lower triangular
        S' = Diag(gamma_C) S + (B gamma_C / gamma)^T U + (K gamma_C / gamma)^T V.

    Arguments, results and errors as for `recurrent_dplr`.

    >>> x = torch.rand(10, 4)
    >>> chunkwise_dplr(x, x, x, -x, x / 4, torch.zeros(10), chunk_size=4)[1].shape
    torch.Size([4, 4])
    """
    check_chunk_size(chunk_size)
    inputs, state = _prepared(q, k, v, a, b, g, scale, initial_state)
    length = v.shape[-2]
    if length == 0:
        return v.clone(), fresh(state)
    C = min(chunk_size, length)
    # The rows that fill the last chunk are zero: they change nothing.
    qc, kc, vc, ac, bc, gc = (to_chunks(x, C) for x in inputs)
    gamma, after = gc.cumsum(-2).exp(), sums_after(gc).exp()
    gamma_before = F.pad(gc, (0, 0, 1, 0))[..., :-1, :].cumsum(-2).exp()
    AB, AK = (_products_before(ac, x, gc) for x in (bc, kc))
    eye = torch.eye(C, dtype=ac.dtype, device=ac.device)
    solved = torch.linalg.solve_triangular(
        eye - AB, torch.cat([AK @ vc, ac * gamma_before], -1), upper=False, unitriangular=True
    )
    own, reads = solved.split([vc.shape[-1], ac.shape[-1]], -1)
    before: list[Tensor] = []
    erased: list[Tensor] = []
    chunks = (own, reads, gamma[..., -1:, :].mT, bc * after, kc * after, vc)
    # By unbind, because the gradient of each indexing would be a tensor of zeros of the full size.
    for own_n, reads_n, whole, b_n, k_n, v_n in zip(*(x.unbind(-3) for x in chunks), strict=True):
        before.append(state)
        u = own_n + reads_n @ state
        erased.append(u)
        state = whole * state + b_n.mT @ u + k_n.mT @ v_n
    o = (qc * gamma) @ torch.stack(before, -3) + decayed_products(qc, kc, gc) @ vc
    o = o + decayed_products(qc, bc, gc) @ torch.stack(erased, -3)
    return o.flatten(-3, -2)[..., :length, :].to(v.dtype), state


def _products_before(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    """sum_d x_id y_jd exp(g_{j+1,d} + ... + g_{i-1,d}) for j < i, else 0: what row i reads before it decays.

    That is row i - 1 of `decayed_products` with the next row's x.
    """
    following = F.pad(x[..., 1:, :], (0, 0, 0, 1))
    return F.pad(decayed_products(following, y, g)[..., :-1, :], (0, 0, 1, 0))
