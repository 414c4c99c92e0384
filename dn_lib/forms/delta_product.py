"""Several delta steps per token, and what a product of them can do: permute, rotate, follow a group.

    S_t = H_{t,n} ... H_{t,1} S_{t-1} + ...,      H_{t,j} = I - beta_{t,j} k_{t,j} k_{t,j}^T,      o_t = scale S_t^T q_t

with n writes per token, of which each is one step of the delta rule.  So a sequence of L tokens with n steps is one of
n L tokens with one step, of which every n-th output is kept.

Shapes: q `[..., L, d_k]`, k `[..., L, n, d_k]`, v `[..., L, n, d_v]`, beta `[..., L, n]`, a state `[..., d_k, d_v]`.
Source: Siems et al. (2025), DeltaProduct.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dn_lib.forms.chunkwise import chunkwise_delta_rule
from dn_lib.forms.common import check_chunk_size, check_integer, check_is_tensor, check_shape, check_tensors
from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.forms.householder import householder_product


def one_step_per_token(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The longer sequence: q, k `[..., n L, d_k]`, v `[..., n L, d_v]`, beta `[..., n L]`, a token's steps in a row.

    A token is read after its last step, so what the other steps are asked does not matter; they repeat the query.
    Raises ValueError or TypeError, naming the argument, for what does not fit.

    >>> q, k = torch.zeros(5, 4), torch.zeros(5, 2, 4)
    >>> [list(x.shape) for x in one_step_per_token(q, k, torch.zeros(5, 2, 3), torch.zeros(5, 2))]
    [[10, 4], [10, 4], [10, 3], [10]]
    """
    check_tensors(q=q, k=k, v=v, beta=beta)
    if k.ndim < 3:
        raise ValueError(f"k must be [..., L, n, d_k], got {list(k.shape)}")
    *leading, steps, d_k = k.shape
    check_integer("the number of steps in k", steps)
    check_shape("q", q, "..., L, d_k", (*leading, d_k), "k")
    check_shape("beta", beta, "..., L, n", (*leading, steps), "k")
    check_shape("v", v, "..., L, n, d_v", (*leading, steps, *v.shape[-1:]), "k")
    return q.repeat_interleave(steps, dim=-2), k.flatten(-3, -2), v.flatten(-3, -2), beta.flatten(-2)


def recurrent_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """{eq}`eq-delta-product`, one write after the other; options as `recurrent_delta_rule` has them.

    Returns o `[..., L, d_v]` in v's dtype and the last state, float32 at least.  Raises ValueError or TypeError, naming
    the argument, for what does not fit.

    >>> k = torch.eye(2).expand(1, 2, 2)  # one token that writes under two keys
    >>> o, S = recurrent_delta_product(torch.ones(1, 2), k, torch.tensor([[[3.0], [4.0]]]), torch.ones(1, 2), scale=1.0)
    >>> o.tolist(), S.flatten().tolist()
    ([[7.0]], [3.0, 4.0])
    """
    longer = one_step_per_token(q, k, v, beta)
    o, S = recurrent_delta_rule(*longer, scale=scale, initial_state=initial_state)
    return o[..., k.shape[-2] - 1 :: k.shape[-2], :], S


def chunkwise_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The same in chunks of `chunk_size` writes, by `chunkwise_delta_rule`.

    >>> q, k = torch.zeros(1, 5, 4), torch.zeros(1, 5, 3, 4)
    >>> chunkwise_delta_product(q, k, torch.ones(1, 5, 3, 2), torch.zeros(1, 5, 3))[0].shape
    torch.Size([1, 5, 2])
    """
    check_chunk_size(chunk_size)
    longer = one_step_per_token(q, k, v, beta)
    o, S = chunkwise_delta_rule(*longer, scale=scale, initial_state=initial_state, chunk_size=chunk_size)
    return o[..., k.shape[-2] - 1 :: k.shape[-2], :], S


def token_matrix(k: Tensor, beta: Tensor) -> Tensor:
    """H_n ... H_1, what one token does to the state: k `[..., n, d]`, beta `[..., n]` -> `[..., d, d]`.

    >>> k = torch.eye(2)
    >>> token_matrix(k, torch.tensor([2.0, 2.0])).tolist()
    [[-1.0, 0.0], [0.0, -1.0]]
    """
    return householder_product(k, beta)


# --- Which matrices are such products ---------------------------------------------------------------------------
def swaps_of(permutation: list[int]) -> list[tuple[int, int]]:
    """Swaps of two places, the first to act first, that together carry the entry at i to `permutation[i]`.

    There are as many as the permutation has entries, less its cycles; fewer do not do it ({eq}`eq-fewest-steps`).
    Raises ValueError for what is no permutation of 0, 1, ..., n - 1.

    >>> swaps_of([1, 2, 0]), swaps_of([1, 0, 2]), swaps_of([0, 1, 2])
    ([(0, 2), (1, 2)], [(0, 1)], [])
    """
    if sorted(permutation) != list(range(len(permutation))):
        raise ValueError(f"permutation must hold 0 to {len(permutation) - 1}, each once, got {permutation}")
    held, swaps = list(range(len(permutation))), list[tuple[int, int]]()
    for place in range(len(permutation)):
        source = held.index(permutation.index(place))  # where the entry is now that has to end at `place`
        if source != place:
            held[place], held[source] = held[source], held[place]
            swaps.append((place, source))
    return swaps


def permutation_steps(
    permutations: Tensor, steps: int | None = None, *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Keys and betas that permute the rows of a state: integers `[..., d]` -> k `[..., n, d]`, beta `[..., n]`.

    Token x carries row i to row `permutations[x, i]`, by reflections with keys (e_i - e_j) / sqrt 2 and beta = 2, see
    {eq}`eq-swap`.  steps: n, d - 1 if None, which is enough for all; unused steps have beta = 0.
    Raises ValueError if a permutation needs more, or if it is none.

    >>> k, beta = permutation_steps(torch.tensor([[1, 2, 0]]))
    >>> (token_matrix(k, beta)[0] @ torch.tensor([5.0, 6.0, 7.0]).double()).round().tolist()
    [7.0, 5.0, 6.0]
    """
    check_is_tensor("permutations", permutations, "[..., d]")
    if permutations.ndim == 0 or permutations.shape[-1] == 0 or permutations.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"permutations must be integers [..., d], got {permutations.dtype} {list(permutations.shape)}")
    *leading, d = permutations.shape
    swaps = [swaps_of(row) for row in permutations.reshape(-1, d).tolist()]
    most = max(map(len, swaps), default=0)
    steps = max(d - 1, 1) if steps is None else steps
    check_integer("steps", steps)
    if most > steps:
        raise ValueError(f"steps must be at least {most} for these permutations, got {steps}")
    k, beta = torch.zeros(len(swaps), steps, d, dtype=dtype), torch.zeros(len(swaps), steps, dtype=dtype)
    k[..., 0] = 1  # a unit key, which beta = 0 leaves unused
    for x, row in enumerate(swaps):
        for n, (i, j) in enumerate(row):
            k[x, n] = 0
            k[x, n, i], k[x, n, j] = 0.5**0.5, -(0.5**0.5)
            beta[x, n] = 2
    return k.reshape(*leading, steps, d), beta.reshape(*leading, steps)


def fewest_steps(M: Tensor, *, tolerance: float | None = None) -> Tensor:
    """How many delta steps it takes at least to make M, `[..., d, d]`: the rank of M - I, int64 `[...]`.

    A bound for any matrix, {eq}`eq-rank-of-steps`; for an orthogonal one, so many reflections are enough.
    tolerance: singular values of M - I up to it count as zero; the root of the dtype's rounding if None.

    >>> fewest_steps(torch.stack([torch.eye(3), -torch.eye(3), torch.eye(3)[[1, 2, 0]]])).tolist()
    [0, 3, 2]
    """
    check_tensors(M=M)
    if M.ndim < 2 or M.shape[-1] != M.shape[-2]:
        raise ValueError(f"M must be [..., d, d], got {list(M.shape)}")
    eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    least = torch.finfo(M.dtype).eps ** 0.5 if tolerance is None else tolerance
    return (torch.linalg.svdvals(M - eye) > least).sum(-1)


def reflections_of(M: Tensor, *, tolerance: float | None = None) -> Tensor:
    """Unit keys `[n, d]` whose reflections, key 0 acting first, multiply to the orthogonal M `[d, d]`; n = rank(M - I).

    Pick x that M moves and the key along M x - x: its reflection carries x to M x, and what is left to do leaves x and
    all that M fixes where they are.  tolerance: as `fewest_steps` has it.  Raises ValueError if M is not orthogonal.

    >>> reflections_of(torch.tensor([[0.0, 1.0], [1.0, 0.0]])).abs().tolist()
    [[0.7071067690849304, 0.7071067690849304]]
    """
    check_tensors(M=M)
    if M.ndim != 2 or M.shape[0] != M.shape[1]:
        raise ValueError(f"M must be [d, d], got {list(M.shape)}")
    eye = torch.eye(len(M), dtype=M.dtype, device=M.device)
    off = (M.mT @ M - eye).abs().max().item() if len(M) else 0.0
    if not off <= 1e-4:
        raise ValueError(f"M must be orthogonal, but an entry of M^T M - I is {off:.1e}")
    left, keys = M, list[Tensor]()
    for _ in range(int(fewest_steps(M, tolerance=tolerance))):
        moved = left - eye
        x = moved.norm(dim=0).argmax()  # the axis that it moves farthest
        key = moved[:, x] / moved[:, x].norm()
        keys.append(key)
        left = left - 2 * key[:, None] * (key @ left)  # the reflection undone, from the left
    return torch.stack(keys[::-1]) if keys else M.new_zeros(0, len(M))
