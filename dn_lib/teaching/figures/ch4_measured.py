"""What chapter 4 measures: rounded reads, times of chunk sizes and of backward passes, summed states, an exchange.

Everything is computed by `dn_lib`, in float64 unless it says otherwise, on inputs from a generator of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.benchmark import Timer

from dn_lib.forms import affine
from dn_lib.forms import chunkwise as cw
from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.forms.householder import rounded_matmul, scaled_inverse, ut_transform
from dn_lib.forms.linear_attention import recurrent_linear_attention
from dn_lib.teaching.registry import relative_error
from dn_lib.teaching.results import Record, origin

DOUBLE = torch.float64


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=DOUBLE)


def rounded_reads(
    dtype: torch.dtype = torch.float16, size: int = 64, off: float = 1e-3, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """The relative error of DE, by R = V - KS and N, and by U - WS, where the memory is right up to `off`.

    The operands of products are rounded to `dtype`; the product with S is "exact" or "rounded" as well.
    `size` tokens with keys, values and a state of that size; beta is uniform in (0, 1).
    """
    g = torch.Generator().manual_seed(seed)
    k, beta = normalize(_normal(g, size, size), dim=-1), torch.rand(size, generator=g, dtype=DOUBLE)
    memory, noise = _normal(g, 2, size, size)
    v = k @ memory + off * noise
    T, N, rounded = ut_transform(k, beta), scaled_inverse(k, beta), rounded_matmul(dtype)
    wanted, D = T @ (v - k @ memory), beta[:, None]
    errors: dict[str, tuple[float, float]] = {}
    for name, read in (("exact", torch.matmul), ("rounded", rounded)):
        R = v - read(k, memory)
        through_r = D * (R + rounded(N, D * R))
        through_u = rounded(T, v) - read(rounded(T, k), memory)
        errors[name] = relative_error(through_r, wanted), relative_error(through_u, wanted)
    return errors


def chunk_times(sizes: Sequence[int], length: int, d: int, device: str, seconds: float = 0.15) -> list[float]:
    """Milliseconds of the chunkwise form for each chunk size: one head, float32.

    The shortest of `seconds` of runs, since other programs only make one longer.
    """
    inputs = [torch.randn(length, d, device=device, dtype=torch.float32) for _ in range(3)]
    inputs[1] = normalize(inputs[1], dim=-1)
    inputs.append(torch.rand(length, device=device, dtype=torch.float32))
    names = [{"form": cw.chunkwise_delta_rule, "inputs": inputs, "size": size} for size in sizes]
    timers = [Timer("form(*inputs, chunk_size=size)", globals=found) for found in names]
    return [1e3 * min(timer.blocked_autorange(min_run_time=seconds).times) for timer in timers]


def training_times(
    forms: Mapping[str, Callable[..., Any]], length: int, d: int, device: str, seconds: float = 0.3
) -> dict[str, float]:
    """Milliseconds of the forward and backward passes of each form (the shortest): one head, float32."""
    x = [torch.randn(length, d, dtype=torch.float32, device=device) for _ in range(3)]
    x[1] = normalize(x[1], dim=-1)
    x.append(torch.rand(length, dtype=torch.float32, device=device))
    leaves = [t.requires_grad_() for t in x]

    def step(form: Callable[..., Any]) -> None:
        torch.autograd.grad(form(*leaves)[0].sum(), leaves)

    timers = {name: Timer("step(form)", globals={"step": step, "form": form}) for name, form in forms.items()}
    return {name: 1e3 * min(timer.blocked_autorange(min_run_time=seconds).times) for name, timer in timers.items()}


def packed_gradients(
    form: Callable[..., Any], inputs: Sequence[Tensor], starts: Tensor, dO: Tensor, dS: Tensor, offsets: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, beta and the first states through `form`, over documents laid end to end.

    inputs: q, k `[L, d_k]`, v `[L, d_v]`, beta `[L]`.  starts, dS: `[N, d_k, d_v]` for N documents; dO `[L, d_v]`.
    offsets: `[N + 1]`, where the documents begin and end.
    """
    leaves = [t.clone().requires_grad_() for t in (*inputs, starts)]
    q, k, v, beta, first = leaves
    outputs = cw.varlen_delta_rule(q, k, v, beta, offsets, form=form, initial_state=first)
    return torch.autograd.grad(outputs, leaves, (dO, dS))


def summed_states(lengths: Sequence[int], d: int = 32, heads: int = 16, seed: int = 0) -> dict[str, list[float]]:
    """The relative error of a state of d by d that two stretches make, for each length of a stretch.

    "delta rule, summed" adds the stretches' states, "delta rule, composed" composes their affine maps, and
    "linear attention, summed" adds the states of linear attention.
    """
    g = torch.Generator().manual_seed(seed)
    errors: dict[str, list[float]] = {
        "delta rule, summed": [],
        "delta rule, composed": [],
        "linear attention, summed": [],
    }
    for n in lengths:
        q, k, v = (_normal(g, heads, 2 * n, d) for _ in range(3))
        k, beta = normalize(k, dim=-1), torch.rand(heads, 2 * n, generator=g, dtype=DOUBLE)
        whole = recurrent_delta_rule(q, k, v, beta)[1]
        cuts = zip(*(x.split(n, dim=1) for x in (k, v, beta)), strict=True)
        first, second = (affine.segment_affine(*stretch) for stretch in cuts)
        states = [recurrent_linear_attention(*x)[1] for x in zip(*(x.split(n, 1) for x in (q, k, v)), strict=True)]
        linear = recurrent_linear_attention(q, k, v)[1]
        composed = affine.compose_affine(second, first)[1]
        pairs = ((first[1] + second[1], whole), (composed, whole), (states[0] + states[1], linear))
        for series, (found, wanted) in zip(errors.values(), pairs, strict=True):
            series.append(relative_error(found, wanted))
    return errors


def exchange_job(lengths: Sequence[int], batch: int = 2, d_k: int = 16, d_v: int = 12, seed: int = 0) -> dict[str, Any]:
    """Random inputs and gradients for `dn_lib.parallel.affine.split_and_run` on stretches of these lengths.

    q, k `[batch, L, d_k]`, v, do `[batch, L, d_v]`, beta `[batch, L]` in (0, 2), states `[batch, d_k, d_v]`.
    """
    g, L = torch.Generator().manual_seed(seed), sum(lengths)
    q, k = _normal(g, 2, batch, L, d_k)
    v, do = _normal(g, 2, batch, L, d_v)
    start, dstate = _normal(g, 2, batch, d_k, d_v)
    beta = 2 * torch.rand(batch, L, generator=g, dtype=DOUBLE)
    job = {"q": q, "k": normalize(k, dim=-1), "v": v, "beta": beta, "initial_state": start, "do": do, "dstate": dstate}
    return job | {"lengths": list(lengths), "chunk_size": 64}


def exchange_errors(job: Mapping[str, Any], results: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """The relative errors of what the processes returned for `job`, against the chunkwise form and autograd here.

    results: of `split_and_run`, one for each stretch, in order.
    """
    inputs = ("q", "k", "v", "beta", "initial_state")
    leaves = [job[name].clone().requires_grad_() for name in inputs]
    o, state = cw.chunkwise_delta_rule(*leaves[:4], initial_state=leaves[4])
    gradients = torch.autograd.grad((o, state), leaves, (job["do"], job["dstate"]))
    whole = {"o": o, "state": state} | dict(zip(["d" + name for name in inputs], gradients, strict=True))
    found = {"state": results[-1]["state"], "dinitial_state": results[0]["dinitial_state"]}
    for name in ("o", "dq", "dk", "dv", "dbeta"):
        found[name] = torch.cat([result[name] for result in results], dim=1)
    return {name: relative_error(found[name], wanted) for name, wanted in whole.items()}


def exchange_on_gpus(record: Record) -> str:
    """What the stored run of `sequence_parallel_delta_rule` on two GPUs found, and where it was measured.

    record: the result `two_gpus`, or None where this copy has none.

    >>> exchange_on_gpus(None)
    'this copy of the book holds no measurement'
    """
    if record is None:
        return "this copy of the book holds no measurement"
    worst = record["checks"]["sequence"]["float32"]["worst"]
    found = f"{record['backend']}, float32: outputs and gradients are those of one process"
    return f"{found}, to a relative error of {worst:.0e}\n{origin(two_gpus=record)}"
