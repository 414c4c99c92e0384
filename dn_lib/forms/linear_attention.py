"""Chapter 1: softmax attention, linear attention in three forms, and what its state remembers.

Every function takes leading batch dimensions freely: q, k are `[..., L, d_k]`, v is `[..., L, d_v]` and a
state is `[..., d_k, d_v]`.  Half-precision inputs are computed with in float32; states are float32 at
least, float64 if any input is.  An argument that does not fit raises a ValueError or TypeError that names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dn_lib.forms.common import (
    check_chunk_size,
    check_function,
    check_inputs,
    check_integer,
    check_sequence,
    check_tensors,
    describe,
    fresh,
    initial_state_or_zeros,
    over_time,
    scale_or_default,
    working_dtype,
)

FeatureMap = Callable[[Tensor], Tensor]
LARGEST_DEGREE = 170  # of a Taylor polynomial: 171! is more than the largest float64
MOST_NUMBERS = 2**31  # that one tensor of features may hold: 8 GiB in float32


# --- From softmax attention to a kernel -----------------------------------------------------------------
def softmax_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Causal softmax attention: `[..., L, d_k]`, `[..., L, d_k]`, `[..., L, d_v]` -> `[..., L, d_v]`.

    Implements eq-softmax-attention (Vaswani et al. 2017).  `scale=None` means d_k**-0.5.
    Raises ValueError if the shapes do not fit.

    >>> q, k, v = torch.randn(3, 10, 4).unbind(0)
    >>> softmax_attention(q, k, v).shape
    torch.Size([10, 4])
    """
    check_sequence(q, k, v)
    dtype = working_dtype(q, k, v)
    scale = scale_or_default(scale, q)
    scores = (q.to(dtype) @ k.to(dtype).mT) * scale
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return (scores.masked_fill(future, float("-inf")).softmax(-1) @ v.to(dtype)).to(v.dtype)


def elu_feature_map(x: Tensor) -> Tensor:
    """elu(x) + 1, entry by entry: positive, x + 1 for x > 0 and exp(x) below (Katharopoulos et al. 2020).

    >>> elu_feature_map(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([0.3679, 1.0000, 3.0000])
    """
    check_tensors(x=x)
    return F.elu(x) + 1


def taylor_feature_map(x: Tensor, degree: int) -> Tensor:
    """The features of exp up to `degree`: `[..., d]` -> `[..., 1 + d + d^2 + ... + d^degree]`.

    The dot product of two such vectors is the Taylor polynomial of exp(x^T y): eq-exp-features. Raises ValueError
    for a degree above 170, and for more than 2^31 features.

    >>> taylor_feature_map(torch.tensor([1.0, 2.0]), degree=2)
    tensor([1.0000, 1.0000, 2.0000, 0.7071, 1.4142, 1.4142, 2.8284])
    """
    check_tensors(x=x)
    if x.ndim < 1:
        raise ValueError(f"x must be [..., d], got {list(x.shape)}")
    check_integer("degree", degree, least=0)
    _check_size(x, degree)
    power, features = torch.ones_like(x[..., :1]), []
    for n in range(degree + 1):
        features.append(power / math.sqrt(math.factorial(n)))
        power = (power[..., :, None] * x[..., None, :]).flatten(-2)
    return torch.cat(features, dim=-1)


def _check_size(x: Tensor, degree: int) -> None:
    """Refuses a `degree` whose features no machine holds, before the first is computed."""
    rows, d, features, power = max(1, math.prod(x.shape[:-1])), x.shape[-1], 1, 1
    for n in range(1, degree + 1):
        if n > LARGEST_DEGREE:
            raise ValueError(
                f"degree must be at most {LARGEST_DEGREE}, whose factorial float64 holds, got {describe(degree)}"
            )
        power *= d
        features += power
        if rows * features > MOST_NUMBERS:
            raise ValueError(
                f"degree must give at most {MOST_NUMBERS} features, got {describe(degree)} for x {list(x.shape)}: "
                f"up to degree {n} there are {rows} x {features}"
            )


def _features(feature_map: FeatureMap, x: Tensor) -> Tensor:
    """feature_map(x), after a check that it keeps tokens apart: `[..., L, d]` -> `[..., L, D]`."""
    features = feature_map(x)
    if not isinstance(features, Tensor) or features.shape[:-1] != x.shape[:-1]:
        got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"feature_map must return {[*x.shape[:-1], 'D']} for {list(x.shape)}, got {got}")
    return features


def kernel_attention(q: Tensor, k: Tensor, v: Tensor, *, feature_map: FeatureMap = elu_feature_map) -> Tensor:
    """Causal attention with weights phi(q_i)^T phi(k_j), normalised to sum to one; quadratic in L.

    Implements eq-kernel-attention.  Shapes as for `softmax_attention`; raises ValueError alike.

    >>> q, k, v = torch.randn(3, 10, 4).unbind(0)
    >>> kernel_attention(q, k, v).shape
    torch.Size([10, 4])
    """
    check_sequence(q, k, v)
    check_function("feature_map", feature_map)
    dtype = working_dtype(q, k, v)
    phi_q, phi_k = _features(feature_map, q.to(dtype)), _features(feature_map, k.to(dtype))
    weights = (phi_q @ phi_k.mT).tril()
    return (weights @ v.to(dtype) / weights.sum(-1, keepdim=True)).to(v.dtype)


def recurrent_kernel_attention(
    q: Tensor, k: Tensor, v: Tensor, *, feature_map: FeatureMap = elu_feature_map
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`kernel_attention` as a recurrence over the pair (S, z): linear in L.

    Implements eq-kernel-state (Katharopoulos et al. 2020).  Returns o `[..., L, d_v]` and (S, z), of shapes
    `[..., D, d_v]` and `[..., D]` for D features.  Raises ValueError if the shapes do not fit.

    >>> q, k, v = torch.randn(3, 10, 4).unbind(0)
    >>> torch.allclose(recurrent_kernel_attention(q, k, v)[0], kernel_attention(q, k, v), atol=1e-5)
    True
    """
    check_sequence(q, k, v)
    check_function("feature_map", feature_map)
    dtype = working_dtype(q, k, v)
    phi_q, phi_k, values = _features(feature_map, q.to(dtype)), _features(feature_map, k.to(dtype)), v.to(dtype)
    state = initial_state_or_zeros(phi_k, values, None, dtype)
    z = torch.zeros_like(state[..., 0])
    outputs = []
    for q_t, k_t, v_t in over_time(phi_q, phi_k, values):
        state = state + k_t[..., :, None] * v_t[..., None, :]
        z = z + k_t
        read = (q_t[..., None, :] @ state)[..., 0, :]
        outputs.append(read / (q_t * z).sum(-1, keepdim=True))
    o, state = stacked(outputs, v, state)
    return o, (state, z)


# --- One memory, three forms ----------------------------------------------------------------------------
def linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token, as in decoding: write k v^T into the state, then read with q.

    Implements eq-linear-attention.  q, k `[..., d_k]`, v `[..., d_v]`, state `[..., d_k, d_v]`; returns
    o `[..., d_v]` in v's dtype and the new state.  Raises ValueError if the shapes do not fit.

    >>> o, state = linear_attention_step(*torch.randn(3, 4).unbind(0), torch.zeros(4, 4))
    >>> o.shape, state.shape
    (torch.Size([4]), torch.Size([4, 4]))
    """
    check_inputs({"q": q, "k": k}, {"v": v}, {}, {"state": state}, time="")
    dtype = working_dtype(q, k, v, state)
    out, scale = v.dtype, scale_or_default(scale, q)
    q, k, v, state = (x.to(dtype) for x in (q, k, v, state))
    o, state = write_and_read(q, k, v, state, scale)
    return o.to(out), state


def write_and_read(q: Tensor, k: Tensor, v: Tensor, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The step itself, on tensors of one dtype."""
    state = state + k[..., :, None] * v[..., None, :]
    return scale * (q[..., None, :] @ state)[..., 0, :], state


def stacked(outputs: list[Tensor], v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs in v's dtype, token after token, and the state; of no tokens, neither is the caller's own tensor."""
    if not outputs:
        return v.clone(), fresh(state)
    return torch.stack(outputs, dim=-2).to(v.dtype), state


def recurrent_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear attention one token at a time: O(L d_k d_v) work in L dependent steps.

    Implements eq-linear-attention.  Returns o `[..., L, d_v]` in v's dtype and the final state
    `[..., d_k, d_v]`.  `scale=None` means d_k**-0.5.  Raises ValueError if the shapes do not fit.

    >>> o, state = recurrent_linear_attention(*torch.randn(3, 10, 4).unbind(0))
    >>> o.shape, state.shape
    (torch.Size([10, 4]), torch.Size([4, 4]))
    """
    check_sequence(q, k, v, initial_state)
    dtype = working_dtype(q, k, v, initial_state)
    state = initial_state_or_zeros(k, v, initial_state, dtype)
    scale, outputs = scale_or_default(scale, q), []
    for q_t, k_t, v_t in over_time(q.to(dtype), k.to(dtype), v.to(dtype)):
        o, state = write_and_read(q_t, k_t, v_t, state, scale)
        outputs.append(o)
    return stacked(outputs, v, state)


def parallel_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear attention as one masked L x L matrix: O(L^2 d) work in a constant number of steps.

    Implements eq-linear-parallel.  Arguments, result and errors as `recurrent_linear_attention`.

    >>> o, state = parallel_linear_attention(*torch.randn(3, 10, 4).unbind(0))
    >>> o.shape, state.shape
    (torch.Size([10, 4]), torch.Size([4, 4]))
    """
    check_sequence(q, k, v, initial_state)
    dtype = working_dtype(q, k, v, initial_state)
    scale = scale_or_default(scale, q)
    queries, keys, values = q.to(dtype) * scale, k.to(dtype), v.to(dtype)
    o, state = (queries @ keys.mT).tril() @ values, keys.mT @ values
    if initial_state is not None:
        o, state = o + queries @ initial_state.to(dtype), state + initial_state.to(dtype)
    return o.to(v.dtype), state


def chunkwise_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Parallel within chunks, recurrent between them: O(L C d + L d^2) work in L / C dependent steps.

    Implements eq-linear-chunk-output and eq-linear-chunk-state.  Any L and any chunk_size >= 1; the last
    chunk may be shorter.  Arguments, result and errors otherwise as `recurrent_linear_attention`.

    >>> o, state = chunkwise_linear_attention(*torch.randn(3, 10, 4).unbind(0), chunk_size=4)
    >>> o.shape, state.shape
    (torch.Size([10, 4]), torch.Size([4, 4]))
    """
    check_sequence(q, k, v, initial_state)
    check_chunk_size(chunk_size)
    dtype = working_dtype(q, k, v, initial_state)
    scale = scale_or_default(scale, q)
    state = initial_state_or_zeros(k, v, initial_state, dtype)
    outputs = []
    for q_c, k_c, v_c in zip(*(x.to(dtype).split(chunk_size, dim=-2) for x in (q, k, v)), strict=True):
        q_c = q_c * scale
        outputs.append(q_c @ state + (q_c @ k_c.mT).tril() @ v_c)
        state = state + k_c.mT @ v_c
    return torch.cat(outputs, dim=-2).to(v.dtype), state


# --- What they cost -------------------------------------------------------------------------------------
def chunkwise_flops(length: int, d_k: int, d_v: int, chunk_size: int) -> int:
    """Floating-point operations of the matrix products in `chunkwise_linear_attention`, one head.

    Implements eq-linear-work, with a shorter last chunk where chunk_size does not divide the length.  A
    multiplication and an addition count as two; the masked half of a chunk's scores is computed and counted.

    >>> chunkwise_flops(128, 16, 16, 128) > chunkwise_flops(128, 16, 16, 16)
    True
    """
    for name, size in (("length", length), ("d_k", d_k), ("d_v", d_v)):
        check_integer(name, size, least=0)
    check_chunk_size(chunk_size)
    whole, rest = divmod(length, chunk_size)
    return 4 * length * d_k * d_v + 2 * (whole * chunk_size**2 + rest**2) * (d_k + d_v)


# --- The state as an associative memory -----------------------------------------------------------------
def random_unit_keys(count: int, d: int, generator: torch.Generator | None = None) -> Tensor:
    """`[count, d]` float64 keys, independent and uniform on the unit sphere.

    >>> random_unit_keys(5, 3).norm(dim=-1).sub(1).abs().max() < 1e-12
    tensor(True)
    """
    check_integer("count", count, least=0)
    check_integer("d", d)
    return F.normalize(torch.randn(count, d, generator=generator, dtype=torch.float64), dim=-1)


def retrieval_error(k: Tensor, v: Tensor) -> Tensor:
    """Squared error |S^T k_j - v_j|^2 of reading each stored pair back, for S = sum k_i v_i^T.

    k `[..., n, d_k]`, v `[..., n, d_v]` -> `[..., n]`: the left side of eq-retrieval less v_j, squared.
    Raises ValueError if the shapes do not fit.

    >>> retrieval_error(torch.eye(3), torch.randn(3, 2)).sum()
    tensor(0.)
    """
    check_inputs({"k": k}, {"v": v}, {}, {}, time="n")
    dtype = working_dtype(k, v)
    k, v = k.to(dtype), v.to(dtype)
    return (k @ (k.mT @ v) - v).square().sum(-1)


def expected_retrieval_error(count: int, d: int) -> float:
    """What eq-interference predicts for `count` independent, uniform unit keys and values of mean square 1.

    >>> expected_retrieval_error(33, 64)
    0.5
    """
    check_integer("count", count)
    check_integer("d", d)
    return (count - 1) / d
