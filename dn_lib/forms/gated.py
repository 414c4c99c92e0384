"""Linear attention and the delta rule with a log gate g <= 0: one family, with two switches.

    S_t = A_t S_{t-1} + k_t v_t^T                                          no erasure
    S_t = (I - beta_t k_t k_t^T) A_t S_{t-1} + beta_t k_t v_t^T            erasure: decay first, then erase

A_t = exp(g_t) is one number per token, or Diag(exp(g_t)), one per key channel.  g = 0 forgets nothing; g = -inf, a gate
of exactly zero, starts the state anew.  Known members: RetNet, Lightning Attention-2 and Mamba-2 (no erasure, one
number; the first two with a fixed one per head), GLA (no erasure, per channel), Gated DeltaNet (erasure, one number)
and Kimi Delta Attention (erasure, per channel).

Every function takes q, k `[..., L, d_k]`, v `[..., L, d_v]`, beta `[..., L]`, a state `[..., d_k, d_v]`, and g as

    `[..., L]`        one number per token,
    `[..., L, d_k]`   one per token and key channel,
    `[H]`             fixed in time, one per head, where H is the last leading dimension (`[]` if there is none).

v, beta, g and states may have H_v heads, a multiple of the H of q and k: value head h reads key head h // (H_v / H).

**Sums, not differences.**  In a chunk, what token j wrote has decayed by i to exp(g_{j+1} + ... + g_i).  The textbook
forms this ratio as exp(b_i) exp(-b_j) from b, the running sum: the second factor overflows.  exp(b_i - b_j) does not,
but it is NaN as soon as a gate is zero (-inf minus -inf), and loses digits where b is large and the difference small.
Here each exponent is the *sum over its span*.  Every summand is at most 0.  So no exponent is above 0, -inf in a span
gives a ratio of exactly 0, nothing is ever subtracted, and long chunks of strong decay keep all their digits.  The
gradient of exp at -inf is 0, which is the true one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dn_lib.forms.common import (
    check_chunk_size,
    check_inputs,
    check_is_tensor,
    check_shape,
    check_tensors,
    fresh,
    initial_state_or_zeros,
    over_time,
    scale_or_default,
    to_chunks,
    without_autocast,
    working_dtype,
)
from dn_lib.forms.householder import N_METHODS, UT_METHODS
from dn_lib.forms.linear_attention import stacked, write_and_read

SUB_CHUNK = 16  # rows within which ratios per channel are formed one by one, [16, 16, d_k] numbers


# --- Arguments ------------------------------------------------------------------------------------------
def shared_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q and k with a head for each head of v: value head h gets key head h // (H_v / H).

    q, k `[..., H, L, d_k]`, v `[..., H_v, L, d_v]`.  Raises ValueError unless H_v is a multiple of H.

    >>> q = torch.arange(2.0).reshape(2, 1, 1)
    >>> shared_heads(q, q, torch.zeros(4, 1, 3))[0].flatten().tolist()
    [0.0, 0.0, 1.0, 1.0]
    """
    if k.ndim < 3 or q.shape != k.shape or v.ndim != k.ndim or k.shape[-3] == v.shape[-3]:
        return q, k
    heads, value_heads = k.shape[-3], v.shape[-3]
    if heads == 0 or value_heads % heads:
        raise ValueError(f"v must have a multiple of the H = {heads} heads of k, got {value_heads}")
    return q.repeat_interleave(value_heads // heads, -3), k.repeat_interleave(value_heads // heads, -3)


def gate_columns(g: Tensor, k: Tensor) -> Tensor:
    """g in one of its three shapes as columns `[..., L, 1]` or `[..., L, d_k]`, for keys `[..., L, d_k]`.

    >>> gate_columns(torch.zeros(3), torch.zeros(2, 3, 5, 4)).shape  # fixed, one per head
    torch.Size([2, 3, 5, 1])
    """
    if g.ndim == k.ndim:
        check_shape("g", g, "..., L, d_k", tuple(k.shape), "k")
        return g
    heads = tuple(k.shape[-3:-2])
    if g.ndim == len(heads) < k.ndim - 1:
        check_shape("g", g, "H", heads, "k")
        return g[..., None, None].expand(*k.shape[:-1], 1)
    check_shape("g", g, "..., L", tuple(k.shape[:-1]), "k")
    return g[..., None]


def _prepared(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, g: Tensor, scale: float | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Checked arguments in the working dtype: scaled q, k, v, beta `[..., L, 1]` or None, columns of g, the state."""
    gates = {} if beta is None else {"beta": beta}
    check_tensors(q=q, k=k, v=v, **gates, g=g, initial_state=initial_state)
    q, k = shared_heads(q, k, v)
    check_inputs({"q": q, "k": k}, {"v": v}, gates, {"initial_state": initial_state})
    columns = gate_columns(g, k)
    dtype = working_dtype(q, k, v, beta, g, initial_state)
    state = initial_state_or_zeros(k, v, initial_state, dtype)
    scaled = scale_or_default(scale, q) * q.to(dtype)
    strength = None if beta is None else beta.to(dtype)[..., None]
    return scaled, k.to(dtype), v.to(dtype), strength, columns.to(dtype), state


# --- Spans: the logarithms of ratios --------------------------------------------------------------------
def sums_after(g: Tensor) -> Tensor:
    """The sum of g over all later rows, `[..., C, d]` -> `[..., C, d]`: what the row's write decays by till the end.

    >>> sums_after(torch.tensor([[-1.0], [-2.0], [-4.0]]))[:, 0].tolist()
    [-6.0, -4.0, 0.0]
    """
    return F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def span_sums(g: Tensor) -> Tensor:
    """g_{j+1} + ... + g_i at `[i, j]`, and 0 where i <= j: `[..., C, d]` -> `[..., C, C, d]`.

    >>> span_sums(torch.tensor([[-1.0], [float("-inf")], [-4.0]]))[..., 0].tolist()
    [[0.0, 0.0, 0.0], [-inf, 0.0, 0.0], [-inf, -4.0, 0.0]]
    """
    rows = torch.arange(g.shape[-2], device=g.device)
    not_later = (rows[:, None] <= rows)[..., None]
    return g.unsqueeze(-2).expand(*g.shape[:-1], g.shape[-2], g.shape[-1]).masked_fill(not_later, 0).cumsum(-3)


def decayed_products(x: Tensor, y: Tensor, g: Tensor, sub_chunk: int = SUB_CHUNK) -> Tensor:
    """sum_d x_id y_jd exp(g_{j+1,d} + ... + g_{i,d}) for j <= i, else 0: `[..., C, d_k]` twice -> `[..., C, C]`.

    x_i . y_j with each channel decayed from j to i.  g `[..., C, 1]`: the ratio is one factor of the product.
    g `[..., C, d_k]`: the secondary chunking of GLA.  For rows i of one sub-chunk and columns j before it, the span is
    cut at the sub-chunk's first row; one sum goes into x, the other into y, both at most 0, and a matrix product does
    the rest.  Only the squares on the diagonal are formed entry by entry, `[sub_chunk, sub_chunk, d_k]`.
    Source: Yang et al. (2024), GLA, section 4.3; that both exponents are sums is ours.

    >>> x, g = torch.ones(3, 2), torch.tensor([[0.0], [float("-inf")], [0.0]])
    >>> decayed_products(x, x, g).tolist()
    [[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 2.0, 2.0]]
    """
    if g.shape[-1] == 1:
        return (x @ y.mT * span_sums(g)[..., 0].exp()).tril()
    C, rows = g.shape[-2], []
    for start in range(0, C, sub_chunk):
        here = slice(start, min(start + sub_chunk, C))
        x_n, y_n, g_n = x[..., here, :], y[..., here, :], g[..., here, :]
        square = ((x_n.unsqueeze(-2) * y_n.unsqueeze(-3)) * span_sums(g_n).exp()).sum(-1).tril()
        earlier = y[..., :start, :] * sums_after(g[..., :start, :]).exp()
        before = (x_n * g_n.cumsum(-2).exp()) @ earlier.mT
        rows.append(F.pad(torch.cat([before, square], -1), (0, C - here.stop)))
    return torch.cat(rows, -2)


def gated_scaled_inverse(k: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    """N of one chunk with gates, strictly lower triangular: `[..., C, d]`, `[..., C]`, g -> `[..., C, C]`.

    N = -(I + B D)^{-1} B, where B_ij = sum_d k_id k_jd exp(g_{j+1,d} + ... + g_{i,d}) for j < i and D = diag(beta).
    With it the errors that the writes of a chunk see are E = R + N D R, and T = D + D N D.

    **|N_ij| <= 1** for unit keys, 0 <= beta <= 2 and g <= 0, per token or per channel.  Start from S_0 = 0 with
    v_j = u at one row j and v = 0 elsewhere.  Then R = V, so row i > j of E = R + N D R is N_ij beta_j u.  The
    recurrence says what that row is: the error e_i = v_i - (A_i S_{i-1})^T k_i of a state that token j wrote,
    S_j = beta_j k_j u^T, and that only decayed and was erased from since:

        e_i = -(k_i^T A_i H_{i-1} A_{i-1} ... H_{j+1} A_{j+1} k_j) beta_j u,      H_m = I - beta_m k_m k_m^T.

    N_ij = -B_ij - (sum of B_im beta_m N_mj over j < m < i) does not depend on beta_j, so comparing the two rows at any
    beta_j > 0 gives, for every beta_j,

        N_ij = -k_i^T A_i H_{i-1} A_{i-1} ... H_{j+1} A_{j+1} k_j.

    H_m is symmetric with eigenvalues 1 and 1 - beta_m, of modulus at most 1; A_m is diagonal with entries in [0, 1].
    Neither makes a vector longer, and |k_i| = |k_j| = 1.  By Cauchy-Schwarz |N_ij| <= 1.  The order of A and H does
    not matter for it.  (One number per token comes out of the product, so then |N_ij| <= exp(g_{j+1} + ... + g_i).)

    >>> k = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    >>> gated_scaled_inverse(k, torch.full((3,), 2.0), torch.full((3,), 0.5).log())[2, :2].tolist()
    [0.25, -0.5]
    """
    check_inputs({"k": k}, {}, {"beta": beta}, {}, time="C")
    check_tensors(k=k, g=g)
    dtype, columns = working_dtype(k, beta, g), gate_columns(g, k)
    k = k.to(dtype)
    B = decayed_products(k, k, columns.to(dtype)).tril(-1)
    return N_METHODS["solve"](B, beta.to(dtype), torch.matmul)


# --- The recurrence -------------------------------------------------------------------------------------
def _recurrence(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, g: Tensor, scale: float | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    queries, keys, values, strength, columns, state = _prepared(q, k, v, beta, g, scale, initial_state)
    outputs = []
    # Without erasure there is no strength, and v is written as it is.
    for q_t, k_t, v_t, alpha_t, *beta_t in over_time(
        queries, keys, values, columns.exp(), *([] if strength is None else [strength])
    ):
        state = alpha_t[..., :, None] * state
        for b in beta_t:
            v_t = b * (v_t - (k_t[..., None, :] @ state)[..., 0, :])
        o, state = write_and_read(q_t, k_t, v_t, state, 1.0)
        outputs.append(o)
    return stacked(outputs, v, state)


# --- Chunks ---------------------------------------------------------------------------------------------
def _in_chunks(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, g: Tensor, scale: float | None, initial_state: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One body for every chunkwise form; chunk_size None makes one chunk of the whole sequence.

    With gamma_i = exp(g_1 + ... + g_i) from the chunk's start, and ratios as `decayed_products` has them:

        S' = gamma_C S + (K gamma_C / gamma)^T Vn            Vn = V, or with erasure U - W S
        O  = (Q gamma) S + tril(decayed Q K^T) Vn            W = T (K gamma),  U = T V
    """
    if chunk_size is not None:
        check_chunk_size(chunk_size)
    queries, keys, values, strength, columns, state = _prepared(q, k, v, beta, g, scale, initial_state)
    length = v.shape[-2]
    if length == 0:
        return v.clone(), fresh(state)
    C = min(chunk_size or length, length)
    # The rows that fill the last chunk have k = v = beta = g = 0: they change nothing.
    qc, kc, vc, gc = (to_chunks(x, C) for x in (queries, keys, values, columns))
    from_start = gc.cumsum(-2)
    gamma, whole = from_start.exp(), from_start[..., -1:, :].exp().mT
    writes = kc * sums_after(gc).exp()
    if strength is None:
        w, pseudo = None, vc
    else:
        B = decayed_products(kc, kc, gc).tril(-1)
        T = UT_METHODS["solve"](B, to_chunks(strength, C)[..., 0], torch.matmul)
        w, pseudo = T @ (kc * gamma), T @ vc
    before, written = [], []
    # By unbind, because the gradient of each indexing would be a tensor of zeros of the full size.
    steps = zip(whole.unbind(-3), writes.unbind(-3), pseudo.unbind(-3), strict=True)
    for n, (whole_n, writes_n, pseudo_n) in enumerate(steps):
        before.append(state)
        if w is not None:
            pseudo_n = pseudo_n - w[..., n, :, :] @ state
            written.append(pseudo_n)
        state = whole_n * state + writes_n.mT @ pseudo_n
    if w is not None:
        pseudo = torch.stack(written, -3)
    o = (qc * gamma) @ torch.stack(before, -3) + decayed_products(qc, kc, gc) @ pseudo
    return o.flatten(-3, -2)[..., :length, :].to(v.dtype), state


# --- Without erasure ------------------------------------------------------------------------------------
@without_autocast
def recurrent_gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, scale: float | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S_t = A_t S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t, one token at a time: the definition.

    Shapes as above; g <= 0 is not checked.  Returns o `[..., L, d_v]` in v's dtype and the last state, float32 at
    least.  `scale=None` means d_k**-0.5.  Raises ValueError or TypeError, naming the argument, for what does not fit.

    >>> q, k, v = torch.randn(3, 10, 4).unbind(0)
    >>> o, state = recurrent_gated_linear_attention(q, k, v, torch.full((10,), -0.1))
    >>> o.shape, state.shape
    (torch.Size([10, 4]), torch.Size([4, 4]))
    """
    return _recurrence(q, k, v, None, g, scale, initial_state)


@without_autocast
def parallel_gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, scale: float | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same as one L x L matrix of decayed products, in O(L^2 d) work.

    >>> q, k, v = torch.randn(3, 10, 4).unbind(0)
    >>> parallel_gated_linear_attention(q, k, v, torch.rand(10, 4).log())[0].shape
    torch.Size([10, 4])
    """
    return _in_chunks(q, k, v, None, g, scale, initial_state, None)


@without_autocast
def chunkwise_gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The same, parallel within chunks and recurrent between them.

    >>> q, k, v = torch.randn(3, 10, 4).unbind(0)
    >>> chunkwise_gated_linear_attention(q, k, v, torch.rand(10, 4).log(), chunk_size=4)[1].shape
    torch.Size([4, 4])
    """
    return _in_chunks(q, k, v, None, g, scale, initial_state, chunk_size)


# --- With erasure ---------------------------------------------------------------------------------------
@without_autocast
def recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = (I - beta_t k_t k_t^T) A_t S_{t-1} + beta_t k_t v_t^T, one token at a time: the definition.

    Decay first, then erase; where A_t is one number the order makes no difference.  Arguments, results and errors as
    for `recurrent_gated_linear_attention`, beta as in the delta rule.
    Source: Yang, Kautz and Hatamizadeh (2025), Gated DeltaNet; per channel, Kimi Team (2025), Kimi Delta Attention.

    >>> from dn_lib.forms.delta_rule import recurrent_delta_rule
    >>> q, k, v, beta = torch.rand(5, 4), torch.rand(5, 4), torch.rand(5, 2), torch.rand(5)
    >>> gated = recurrent_gated_delta_rule(q, k, v, beta, torch.zeros(5))
    >>> torch.allclose(gated[0], recurrent_delta_rule(q, k, v, beta)[0])
    True
    """
    check_is_tensor("beta", beta, "[..., L]")
    return _recurrence(q, k, v, beta, g, scale, initial_state)


@without_autocast
def parallel_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same with no loop over time, in O(L^3 + L^2 d) work.

    >>> q, k, v, beta = torch.rand(5, 4), torch.rand(5, 4), torch.rand(5, 2), torch.rand(5)
    >>> parallel_gated_delta_rule(q, k, v, beta, torch.rand(5).log())[1].shape
    torch.Size([4, 2])
    """
    check_is_tensor("beta", beta, "[..., L]")
    return _in_chunks(q, k, v, beta, g, scale, initial_state, None)


@without_autocast
def chunkwise_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The same in ceil(L / C) sequential steps.

    >>> q, k, v, beta = torch.rand(5, 4), torch.rand(5, 4), torch.rand(5, 2), torch.rand(5)
    >>> chunkwise_gated_delta_rule(q, k, v, beta, torch.rand(5, 4).log(), chunk_size=2)[0].shape
    torch.Size([5, 2])
    """
    check_is_tensor("beta", beta, "[..., L]")
    return _in_chunks(q, k, v, beta, g, scale, initial_state, chunk_size)
