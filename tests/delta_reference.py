"""What the tests of the operator share: inputs, the recurrence in float64, and how an error is measured."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

NAMES = ("dq", "dk", "dv", "dbeta", "dinitial")


def make(
    B, L, H, d_k, d_v, *, seed=0, dtype=torch.float32, state=None, unit=True, bias=0.0, beta_max=2.0, device="cpu"
):
    """q, k, v, beta and an initial state (None, or for `state` sequences); made on the CPU in float64, then rounded.

    unit: keys of norm 1.  bias: added to every key before, so that keys are alike.  beta lies in [0, beta_max].
    """
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, L, H, d, generator=g, dtype=torch.float64) for d in (d_k, d_k, d_v))
    k = k + bias
    if unit:
        k = torch.nn.functional.normalize(k, dim=-1)
    beta = beta_max * torch.rand(B, L, H, generator=g, dtype=torch.float64)
    first = None
    if state is not None:
        first = torch.randn(state, H, d_k, d_v, generator=g, dtype=torch.float64).to(device)
        first = first.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return *(x.to(device=device, dtype=dtype) for x in (q, k, v, beta)), first


def normalised(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def recurrence(q, k, v, beta, *, scale=None, initial_state=None, cu_seqlens=None, qk_l2norm=False):
    """o, the final states, and the size of o, the norm of scale |q_t| |S_t| over all tokens; all in float64.

    q.S is a sum that may cancel, so its error is measured against that size as well.
    """
    q, k, v, beta = (x.double() for x in (q, k, v, beta))
    if qk_l2norm:
        q, k = normalised(q), normalised(k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
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
            k_t, q_t = k[b, t, :, :, None], q[b, t, :, None, :]
            S = S + beta[b, t, :, None, None] * k_t * (v[b, t, :, None, :] - k_t.mT @ S)
            outputs.append(scale * (q_t @ S)[:, 0])
            size += (scale * q_t.norm(dim=(1, 2)) * S.norm(dim=(1, 2))).square().sum().item()
        states.append(S)
    o = torch.stack(outputs).reshape(v.shape) if outputs else torch.zeros_like(v)
    S = torch.stack(states) if states else q.new_zeros(0, q.shape[2], q.shape[3], v.shape[3])
    return o, S, size**0.5


def leaves(*tensors: Tensor | None, dtype: torch.dtype | None = None) -> list[Tensor | None]:
    return [None if x is None else x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in tensors]


def forward_and_gradients(fn, tensors, do, dstate, **options) -> list[Tensor]:
    """[o, final state, dq, dk, dv, dbeta(, dinitial)] of `fn(q, k, v, beta, initial_state=..., **options)`."""
    o, state, *_ = fn(*tensors[:4], initial_state=tensors[4], **options)
    given = [x for x in tensors if x is not None]
    return [o, state, *torch.autograd.grad((o, state), given, (do.to(o.dtype), dstate.to(state.dtype)))]


def error(x: Tensor, reference: Tensor, size: float = 0.0) -> float:
    """|x - reference| over the larger of |reference| and `size`; inf if anything is not finite."""
    if x.shape != reference.shape:
        raise AssertionError(f"shape {tuple(x.shape)}, expected {tuple(reference.shape)}")
    difference = (x.double() - reference).norm().item()
    if difference != difference:
        return float("inf")
    return difference / max(reference.norm().item(), size, 1e-300)


def sensitivity(fn, inputs: tuple[Tensor | None, ...], sizes: Sequence[float] = (), *, draws: int = 2) -> list[float]:
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
            worst[i] = max(worst[i], error(a, b, size) / step)
    return worst


class Poisoned:
    """torch, with NaN in what it allocates."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def empty(*shape, **options):
        return torch.full(shape, float("nan"), **options)

    @staticmethod
    def empty_like(x, **options):
        return torch.full_like(x, float("nan"), **options)
