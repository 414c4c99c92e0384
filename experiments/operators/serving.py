"""Serving with a state: tokens that are taken back, and states in 8 bits.

Rollback: a draft of m tokens of which some are rejected.  Ways back to the state before them: keep a copy of the state
after each token; keep keys and pseudo-values and take them back (`roll_back`, without gates); keep the first state as
well and write the accepted ones again (`replay`); invert the steps (`step_back`).  For each: bytes kept for the draft,
milliseconds to keep and to return to the middle of it, and the distance from the state in float64, at three strengths
of writing.
Prediction: `roll_back` keeps (d_k + d_v) / (d_k d_v) of what copies keep and is as exact as decoding; `step_back` loses
about two digits a token at beta = 0.99.

Drift: the delta rule, with and without gates, whose state is stored in 8 bits with a scale for each row after each
token or after each 64, by nearest or by random rounding.  The distance of state and outputs from float32, by length.
Prediction: without gates and with nearest rounding the drift grows with the length until erasure forgets as much as
is added, and stays there; stored every 64 tokens it is several times smaller.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from dn_lib.forms.serving import (
    dequantise_state,
    draft_delta_rule,
    quantise_state,
    replay,
    roll_back,
    step_back,
    step_back_growth,
)
from dn_lib.testing import relative_error
from experiments.harness.cli import Experiment, device_of, settings_of
from experiments.harness.clock import Clock
from experiments.harness.results import Results

STRENGTHS = {"beta 0.5": 0.5, "beta 0.99": 0.99, "beta 2": 2.0}


def drawn(lead: tuple[int, ...], m: int, d: int, device: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k of norm 1, v, and a first state made by 4 d writes: in float64."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*lead, *size, generator=g, dtype=torch.float64).to(device)

    q, k, before = (F.normalize(x, dim=-1) for x in (normal(m, d), normal(m, d), normal(4 * d, d)))
    return q, k, normal(m, d), before.mT @ normal(4 * d, d)


def rollback(clock: Clock, device: str, requests: int, heads: int, d: int, m: int, seed: int) -> dict:
    """Bytes, times and errors of each way back to the middle of a draft."""
    q, k, v, start = drawn((requests, heads), m, d, device, seed)
    accepted, row = m // 2, {"requests": requests, "heads": heads, "d": d, "m": m}
    gone = slice(accepted, None)
    errors = {}
    for name, value in STRENGTHS.items():
        beta = torch.full(k.shape[:-1], value, dtype=torch.float64, device=device)
        first = [x[..., :accepted, :] for x in (q, k, v)]
        _, want, _ = draft_delta_rule(first[0], first[1], first[2], beta[..., :accepted], start)
        q32, k32, v32, beta32, start32 = (x.float() for x in (q, k, v, beta, start))
        _, last, written = draft_delta_rule(q32, k32, v32, beta32, start32)
        back = step_back(last, k32[..., gone, :], v32[..., gone, :], beta32[..., gone])
        errors[name] = {
            "roll_back": relative_error(roll_back(last, k32[..., gone, :], written[..., gone, :]), want),
            "replay": relative_error(replay(start32, k32[..., :accepted, :], written[..., :accepted, :]), want),
            "step_back": relative_error(back, want),
            "step_back growth": step_back_growth(k32[..., gone, :], beta32[..., gone]).max().item(),
        }
    copies = torch.empty(m, *start32.shape, device=device)

    def keep_copies() -> Tensor:
        for t in range(m):
            copies[t].copy_(start32)
        return copies[accepted - 1]

    tail, head = (k32[..., gone, :], written[..., gone, :]), (k32[..., :accepted, :], written[..., :accepted, :])
    ms = {
        "copies": clock.median(keep_copies),
        "roll_back": clock.median(lambda: roll_back(last, *tail)),
        "replay": clock.median(lambda: replay(start32, *head)),
        "step_back": clock.median(lambda: step_back(last, tail[0], v32[..., gone, :], beta32[..., gone])),
    }
    state, pairs = start32.numel() * 4, m * requests * heads * 2 * d * 4
    kept = {"copies": m * state, "roll_back": pairs, "replay": pairs + state, "step_back": pairs}
    return row | {"bytes": kept, "ms": ms, "errors": errors}


def drift(
    device: str, heads: int, d: int, lengths: list[int], gated: bool, every: int, random: bool, seed: int
) -> dict:
    """Distances of the 8-bit state and of its outputs from those of float32, at each of the lengths."""
    longest = max(lengths)
    q, k, v, _ = drawn((heads,), longest, d, device, seed)
    g = torch.Generator().manual_seed(seed + 1)
    beta = torch.rand(heads, longest, generator=g).to(device)
    log = -0.02 * torch.rand(heads, longest, generator=g).to(device) if gated else None
    q, k, v = (x.float() for x in (q, k, v))
    generator = torch.Generator(device).manual_seed(seed) if random else None
    exact = torch.zeros(heads, d, d, device=device)
    stored, rows, since = quantise_state(exact), [], 0
    for begin in range(0, longest, every):
        part = slice(begin, min(begin + every, longest))
        rest = (q[:, part], k[:, part], v[:, part], beta[:, part])
        gates = None if log is None else log[:, part]
        want, exact, _ = draft_delta_rule(*rest, exact, g=gates)
        got, state, _ = draft_delta_rule(*rest, dequantise_state(*stored), g=gates)
        stored = quantise_state(state, generator=generator)
        since = part.stop
        if since in lengths:
            off = relative_error(dequantise_state(*stored), exact)
            rows.append({"length": since, "state": off, "outputs": relative_error(got, want)})
    rounding = "random" if random else "nearest"
    return {"heads": heads, "d": d, "gated": gated, "every": every, "rounding": rounding, "drift": rows}


def run(options: argparse.Namespace) -> int:
    device, clock, seed = device_of(options.smoke), Clock.of(options), options.seed
    results = Results(options.out, settings_of(options), budget=options.budget, smoke=options.smoke, seed=seed)
    shapes = [(2, 2, 16, 4)] if options.smoke else [(b, 16, 128, m) for b in (1, 32) for m in (4, 8, 16)]
    lengths = [64, 128] if options.smoke else [2**n for n in range(6, 15)]

    def body() -> None:
        for requests, heads, d, m in shapes:
            key = f"rollback, {requests} requests, m = {m}"
            results.measure(key, lambda s=(requests, heads, d, m): rollback(clock, device, *s, seed))
        heads, d = (1, 16) if options.smoke else (8, 128)
        for gated in (False, True):
            for every, random in ((1, False), (1, True), (64, False)):
                key = f"drift, {'gated' if gated else 'delta'}, every {every}, {'random' if random else 'nearest'}"
                settings = (gated, every, random, seed)
                results.measure(key, lambda s=settings: drift(device, heads, d, lengths, *s))

    code, lines = results.fill(body), []
    for row in results.done:
        if "ms" in row:
            cells = [f"{w}: {row['bytes'][w] / 2**20:.2f} MiB {row['ms'][w]:.4f} ms" for w in row["ms"]]
        else:
            cells = [f"{r['length']}: {r['state']:.1e} {r['outputs']:.1e}" for r in row["drift"]]
        lines.append(f"{row['key']:40} {' | '.join(cells)}")
    return results.finish("\n".join(lines), code, failed=results.not_done)


EXPERIMENT = Experiment(
    question="What does it cost to take tokens back from a state, and how far does a state in 8 bits drift?",
    writes=("serving.json",),
    minutes=4,
    gpu="H200",
    run=run,
    shared=("budget", "quick", "seed", "smoke"),
    measured=False,
)
