"""Numbers of study 1, computed by `dn_lib`: ratios of gates, states walked back, and recall in documents."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dn_lib.forms.gated import (
    chunkwise_gated_delta_rule,
    chunkwise_gated_linear_attention,
    gated_scaled_inverse,
    span_sums,
)
from dn_lib.forms.linear_attention import softmax_attention
from dn_lib.teaching.registry import relative_error

NEVER = -torch.inf  # the log gate of a token that starts the state anew


# --- Ratios --------------------------------------------------------------------------------------------
def _divided(g: Tensor) -> Tensor:
    gamma = g.exp().cumprod(0)
    return (gamma[:, None] / gamma).tril()


def _two_factors(g: Tensor) -> Tensor:
    b = g.cumsum(0)
    return (b.exp()[:, None] * (-b).exp()).tril()


def _difference(g: Tensor) -> Tensor:
    b = g.cumsum(0)
    return (b[:, None] - b).exp().tril()


def _spans(g: Tensor) -> Tensor:
    return span_sums(g[:, None])[..., 0].exp().tril()


#: Four ways to the mask of ratios, `[C]` log gates -> `[C, C]`; all are right in exact arithmetic.
WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "quotient of products": _divided,
    "exp(b_i) exp(-b_j)": _two_factors,
    "exp(b_i - b_j)": _difference,
    "exp of the span's sum": _spans,
}


def ratio_errors(lengths: Sequence[int], gate: float, dtype: torch.dtype = torch.float32) -> dict[str, list[float]]:
    """For each way and chunk length the error of the mask in `dtype`, infinite if an entry is not finite.

    Gates are spread evenly from `gate` / 2 to 3 `gate` / 2, in a random order.  The reference is made in float64.

    >>> ratio_errors([4], 0.5)["exp of the span's sum"][0] < 1e-6
    True
    """
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for length in lengths:
        order = torch.rand(length, generator=torch.Generator().manual_seed(length)).argsort()
        alpha = gate * (0.5 + torch.linspace(0, 1, length, dtype=torch.float64))[order]
        g = alpha.log().to(dtype)
        exact = _spans(g.double())
        for name, way in WAYS.items():
            mask = way(g).double()
            found[name].append(relative_error(mask, exact) if mask.isfinite().all() else torch.inf)
    return found


# --- N, and the way back ---------------------------------------------------------------------------------
def largest_entries(gate: float, chunk: int = 32, d: int = 8, draws: int = 200) -> Tensor:
    """The largest |N_ij| at each distance i - j = 1 ... chunk - 1, over random chunks with one gate for all tokens.

    Keys are all alike in half of the draws, betas at 0 and 2 in half, so that the bound is pressed.
    """
    g = torch.Generator().manual_seed(0)
    k = normalize(torch.randn(draws, chunk, d, generator=g, dtype=torch.float64), dim=-1)
    k[::2] = k[::2, :1]
    beta = 2 * torch.rand(draws, chunk, generator=g, dtype=torch.float64)
    beta[::4], beta[1::4] = (2 * (beta[::4] > 1)).to(beta), (2 * (beta[1::4] > 1)).to(beta)
    N = gated_scaled_inverse(k, beta, torch.full_like(beta, gate).log()).abs().amax(0)
    return torch.stack([N.diagonal(-distance).max() for distance in range(1, chunk)])


def walked_back(gate: float, chunks: int, chunk: int = 16, d: int = 16) -> list[float]:
    """Errors of the states that are recovered from the last one, chunk by chunk, in float32.

    The errors of all writes are known (from the same forward pass, in float32); only states are recomputed.  Entry n
    is the relative error of the state n + 1 chunks back.

    >>> walked_back(1.0, 4)[-1] < 1e-5
    True
    """
    generator = torch.Generator().manual_seed(0)
    length = chunks * chunk
    k, v = torch.randn(2, length, d, generator=generator, dtype=torch.float32)
    k, beta = normalize(k, dim=-1), torch.rand(length, generator=generator, dtype=torch.float32)
    g = torch.full((length,), gate, dtype=torch.float32).log()
    S, states, writes = torch.zeros(d, d, dtype=torch.float32), [], []
    for t in range(length):
        if t % chunk == 0:
            states.append(S)
        S = g[t].exp() * S
        writes.append(beta[t] * (v[t] - k[t] @ S))
        S = S + torch.outer(k[t], writes[-1])
    written = torch.stack(writes)
    left = (g[1] * torch.arange(chunk - 1, -1, -1)).exp()
    found = []
    for n in reversed(range(chunks)):
        rows = slice(n * chunk, (n + 1) * chunk)
        S = (S - (left[:, None] * k[rows]).mT @ written[rows]) / (g[1] * chunk).exp()
        if n == 0:  # the first state is zero: no relative error
            break
        found.append(relative_error(S, states[n]))
    return found


# --- Attention maps --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Memory:
    """A way to remember: erase: whether writes replace.  gate: of every token.  clears: whether documents end in it."""

    erase: bool = False
    gate: float = 1.0
    clears: bool = False

    def log_gates(self, starts: Tensor) -> Tensor:
        """`[...]` from `starts` `[...]`, true where a document begins."""
        g = torch.full(starts.shape, self.gate, dtype=torch.float64).log()
        return g.masked_fill(starts, NEVER) if self.clears else g


MEMORIES: dict[str, Memory] = {
    "additive": Memory(),
    "decay": Memory(gate=0.93),
    "delta": Memory(erase=True),
    "gated delta": Memory(erase=True, gate=0.98),
    "delta, cleared": Memory(erase=True, clears=True),
}


def read(memory: Memory, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, state: Tensor | None = None) -> tuple:
    """Outputs and the last state, scale 1, beta 1; all `[..., L, d]`, starts `[..., L]`."""
    g = memory.log_gates(starts)
    if memory.erase:
        return chunkwise_gated_delta_rule(q, k, v, torch.ones_like(g), g, scale=1.0, initial_state=state)
    return chunkwise_gated_linear_attention(q, k, v, g, scale=1.0, initial_state=state)


def two_documents(memory: Memory, pairs: int = 8, shared: int = 5, d: int = 16) -> Tensor:
    """What comes back of each value for each key, after two documents: `[2 pairs - shared, 2 pairs]`.

    Rows: the keys of the second document, of which the first `shared` were in the first document too; then the other
    keys of the first.  Columns: the values of the first document, then those of the second.
    """
    g = torch.Generator().manual_seed(2)
    k = normalize(torch.randn(2 * pairs, d, generator=g, dtype=torch.float64), dim=-1)
    k[pairs : pairs + shared] = k[:shared]
    starts = torch.arange(2 * pairs) % pairs == 0
    _, state = read(memory, k, k, torch.eye(2 * pairs, dtype=torch.float64), starts)
    return torch.cat([k[pairs:], k[shared:pairs]]) @ state


# --- Recall in documents -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Recall:
    """accuracy: of the questions after each document, `[documents]`.  error: their mean squared error, likewise.

    stale: how much of an old value comes back for a key that the document has not, by the number of documents since
    that key was written, `[documents - 1]`; NaN where there was none.
    """

    accuracy: Tensor
    error: Tensor
    stale: Tensor


def recall_in_documents(
    memory: Memory,
    *,
    documents: int = 24,
    pairs: int = 16,
    pool: int = 64,
    d: int = 32,
    streams: int = 16,
    seed: int = 0,
) -> Recall:
    """Documents that end without a mark, read one after the other by one state.

    Each document writes `pairs` keys out of a pool of `pool`, with new values out of 64, and then all of its keys are
    asked.  An answer counts if the value that is wanted is the nearest of the 64.  Keys and values are random unit
    vectors of width d; nothing is trained.
    """
    g = torch.Generator().manual_seed(seed)

    def unit(count: int) -> Tensor:
        return normalize(torch.randn(streams, count, d, generator=g, dtype=torch.float64), dim=-1)

    keys, values = unit(pool), unit(64)
    which = torch.rand(streams, documents, pool, generator=g).argsort(-1)[..., :pairs]
    wanted = torch.randint(64, (streams, documents, pairs), generator=g)
    rows = torch.arange(streams)[:, None]
    starts = (torch.arange(pairs) == 0).expand(streams, pairs)
    last = torch.full((streams, pool), -1)  # the document in which a key was last written
    held = torch.zeros(streams, pool, d, dtype=torch.float64)  # and its value
    accuracy, error, state = [], [], None
    total, count = torch.zeros(documents, dtype=torch.float64), torch.zeros(documents, dtype=torch.float64)
    for n in range(documents):
        k, v = keys[rows, which[:, n]], values[rows, wanted[:, n]]
        _, state = read(memory, k, k, v, starts, state)
        answers = k @ state
        accuracy.append(((answers @ values.mT).argmax(-1) == wanted[:, n]).double().mean())
        error.append((answers - v).pow(2).sum(-1).mean())
        last[rows, which[:, n]], held[rows, which[:, n]] = n, v
        if n == documents - 1:
            echo = (keys @ state * held).sum(-1)
            for age in range(1, documents):
                old = last == n - age
                total[age], count[age] = (echo * old).sum(), old.sum()
    return Recall(torch.stack(accuracy), torch.stack(error), (total / count)[1:])


def best_gate(erase: bool, gates: Sequence[float], **options: int) -> tuple[float, dict[float, float]]:
    """The constant gate with the least mean squared error in the second half of the documents, and all errors."""
    errors = {}
    for gate in gates:
        error = recall_in_documents(Memory(erase, gate), **options).error
        errors[gate] = float(error[len(error) // 2 :].mean())
    return min(errors, key=errors.__getitem__), errors


def answers_by_age(decay: float, count: int, d: int, draws: int = 400) -> Tensor:
    """The mean squared error of the answer for each age, newest first, `[count]`: random unit keys and values."""
    g = torch.Generator().manual_seed(0)
    k, v = (normalize(torch.randn(draws, count, d, generator=g, dtype=torch.float64), dim=-1) for _ in range(2))
    _, state = chunkwise_gated_linear_attention(k, k, v, torch.full((draws, count), decay).log().double(), scale=1.0)
    return (k @ state - v).pow(2).sum(-1).mean(0).flip(0)


def expected_by_age(decay: float, count: int, d: int) -> Tensor:
    """eq-s1-noise for each age, newest first, `[count]`, with 1/d for the squared overlaps; decay below 1.

    >>> bool((answers_by_age(0.9, 8, 4) / expected_by_age(0.9, 8, 4) - 1).abs().max() < 0.2)
    True
    """
    ages = torch.arange(count, dtype=torch.float64)
    noise = (1 - decay ** (2 * count)) / (1 - decay**2) - decay ** (2 * ages)
    return (1 - decay**ages) ** 2 + noise / d


# --- Speed -------------------------------------------------------------------------------------------------
STRETCH = 512


def speeds(
    lengths: Sequence[int], device: str, *, longest_softmax: int = 2048, heads: int = 4, d: int = 64
) -> dict[str, list[float]]:
    """Tokens per second of one forward pass, best of three: Lightning's chunks, and softmax attention; float32.

    The chunks are done in stretches of `STRETCH` tokens, which hand on the state, so that what is in hand stays small.
    Softmax attention stops at `longest_softmax` tokens.
    """
    g = torch.full((heads,), -0.05, device=device)

    def lightning(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs, state = [], None
        stretches = (x.split(STRETCH, dim=-2) for x in (q, k, v))
        for q_n, k_n, v_n in zip(*stretches, strict=True):
            o, state = chunkwise_gated_linear_attention(q_n, k_n, v_n, g, initial_state=state)
            outputs.append(o)
        return torch.cat(outputs, dim=-2)

    forms: dict[str, Callable[..., object]] = {
        "fixed decay, in chunks": lightning,
        "softmax attention": softmax_attention,
    }
    found: dict[str, list[float]] = {name: [] for name in forms}
    for length in lengths:
        q, k, v = torch.randn(3, heads, length, d, device=device, dtype=torch.float32)
        for name, form in forms.items():
            if name != "softmax attention" or length <= longest_softmax:
                found[name].append(length / min(_seconds(form, q, k, v) for _ in range(3)))
    return found


def _seconds(form: Callable[..., object], *tensors: Tensor) -> float:
    def wait() -> None:
        if tensors[0].is_cuda:
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    form(*tensors)
    wait()
    return time.perf_counter() - start
