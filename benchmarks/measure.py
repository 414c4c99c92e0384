"""What the benchmark scripts share: inputs, references, clocks, the peer, and result files that can be resumed."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import torch
from provenance import package_version, provenance
from torch import Tensor

import dn_lib
from dn_lib import cost
from dn_lib.kernels.delta_rule import launch

NOT_MEASURED = "smoke run: each time is a stub of 1 ms, no error was measured on a GPU; nothing here is a result"
OUTPUTS = ("o", "dq", "dk", "dv", "dbeta", "dinitial", "state")


# --- Inputs and the forms that take them -------------------------------------------------------------------------


@dataclass
class Problem:
    """One call: tensors `[B, L, H, d]` and what goes with them; `dstate` is the final state's gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    do: Tensor
    initial_state: Tensor | None = None
    dstate: Tensor | None = None
    cu_seqlens: Tensor | None = None
    norm: bool = False
    chunk: int | None = None

    @property
    def leaves(self) -> list[Tensor]:
        x = [self.q, self.k, self.v, self.beta]
        return x if self.initial_state is None else [*x, self.initial_state]

    def requiring_grad(self) -> Problem:
        for x in self.leaves:
            x.requires_grad_()
        return self

    def double(self) -> Problem:
        names = ("q", "k", "v", "beta", "do", "initial_state", "dstate")
        wide = {n: x.detach().double() for n in names if (x := getattr(self, n)) is not None}
        return replace(self, **wide).requiring_grad()


def draw(
    B: int, L: int, H: int, d_k: int, d_v: int, dtype: torch.dtype, device: str, *, seed: int = 0, bias: float = 0.0,
    identical: bool = False, beta_range: float | None = None, norm: bool = False, state: bool = False,
    dstate: bool = False, lengths: Sequence[int] | None = None, chunk: int | None = None,
) -> Problem:  # fmt: skip
    """Random inputs: q and k of norm 1 (normalised in float32, then cast), v and do standard normal.

    beta: sigmoid of a standard normal, or uniform in [0, beta_range].  bias: added to the keys before they are
    normalised, so that they are correlated.  identical: every key of a head is the same.  norm: the operator
    normalises, so q and k are left as they are.  lengths: of the sequences packed along L, whose sum L must be.
    """
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=random)

    q, k = normal(B, L, H, d_k), normal(B, L, H, d_k) + bias
    if identical:
        k = k[:, :1].expand(B, L, H, d_k)
    if not norm:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    v, do = normal(B, L, H, d_v), normal(B, L, H, d_v)
    beta = normal(B, L, H).sigmoid()
    if beta_range is not None:
        beta = torch.rand(B, L, H, device=device, generator=random) * beta_range
    half = [x.to(dtype).contiguous() for x in (q, k, v, beta, do)]
    N = B if lengths is None else len(lengths)
    cu = None
    if lengths is not None:
        cu = torch.tensor([0, *lengths], device=device).cumsum(0)
    return Problem(
        *half,
        initial_state=normal(N, H, d_k, d_v) * d_k**-0.5 if state else None,
        dstate=normal(N, H, d_k, d_v) * d_k**-0.5 if dstate else None,
        cu_seqlens=cu,
        norm=norm,
        chunk=chunk,
    ).requiring_grad()


def mixed_lengths(count: int, total: int, seed: int = 0) -> list[int]:
    """`count` lengths of at least 1, very unequal (log-normal), that sum to `total`."""
    weight = torch.randn(count, generator=torch.Generator().manual_seed(seed)).exp()
    edges = (weight.cumsum(0) / weight.sum() * (total - count)).round().long().tolist()
    return [1 + b - a for a, b in zip([0, *edges[:-1]], edges, strict=True)]


def operator(p: Problem, backend: str = "triton") -> tuple[Tensor, Tensor | None]:
    """`dn_lib.delta_rule` by backend."""
    return dn_lib.delta_rule(
        p.q, p.k, p.v, p.beta, initial_state=p.initial_state, output_final_state=p.dstate is not None,
        cu_seqlens=p.cu_seqlens, qk_l2norm=p.norm, chunk_size=p.chunk if backend == "triton" else None,
        backend=backend,
    )  # fmt: skip


pytorch_form = functools.partial(operator, backend="chunkwise")


def recurrent_form(p: Problem) -> tuple[Tensor, Tensor | None]:
    """Our recurrent kernel; forward only."""
    return dn_lib.fused_recurrent_delta_rule(
        p.q, p.k, p.v, p.beta, initial_state=p.initial_state, use_qk_l2norm_in_kernel=p.norm, cu_seqlens=p.cu_seqlens
    )


def softmax_form(p: Problem) -> tuple[Tensor, None]:
    """Causal flash attention on the same q, k and v: another function, for its cost alone."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        x = (x.transpose(1, 2) for x in (p.q, p.k, p.v))
        return torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True).transpose(1, 2), None


Form = Callable[[Problem], tuple[Tensor, Tensor | None]]


def forward(form: Form, p: Problem) -> Tensor:
    with torch.no_grad():
        return form(p)[0]


def forward_backward(form: Form, p: Problem, leaves: list[Tensor] | None = None) -> dict[str, Tensor]:
    """Output and gradients by name, through `torch.autograd.grad`: nothing is accumulated into `.grad`."""
    o, state = form(p)
    leaves = p.leaves if leaves is None else leaves
    grads = torch.autograd.grad(
        *(([o], leaves, [p.do]) if p.dstate is None else ([o, state], leaves, [p.do, p.dstate]))
    )
    found = dict(zip(("o", "dq", "dk", "dv", "dbeta", "dinitial"), (o, *grads), strict=False))
    return found if p.dstate is None else found | {"state": state}


def long_calls() -> contextlib.AbstractContextManager:
    """Within it short calls of whole chunks fetch their tiles as long ones do, by the copy engine."""
    return mock.patch.object(launch, "TMA_MIN_VALUES", 0)


@contextlib.contextmanager
def split(segments: int | None) -> Iterator[None]:
    """Within it every sequence is split into so many parts; None leaves the operator's own rule."""
    if segments is None:
        yield
        return
    plain = launch.forward, launch.backward
    launch.forward, launch.backward = (functools.partial(f, segments=segments) for f in plain)
    try:
        yield
    finally:
        launch.forward, launch.backward = plain


# --- Errors ------------------------------------------------------------------------------------------------------


def relative(got: Tensor, exact: Tensor) -> float:
    """|got - exact| / |exact|, Frobenius norms; NaN stays NaN."""
    difference, size = (got.detach().double() - exact.detach()).norm().item(), exact.detach().norm().item()
    return difference / size if size > 0 else difference


def exact_results(p: Problem) -> dict[str, Tensor]:
    """Output and gradients in float64, by the PyTorch chunkwise form, of the inputs as they were rounded."""
    return forward_backward(pytorch_form, p.double())


def errors_of(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {name: relative(x, exact[name]) for name, x in got.items()}


def limit_of(dtype: torch.dtype, precision: str = "ieee", device: str = "cuda") -> float:
    """The error above which nothing is timed: about one rounding of the dtype (bfloat16: 8e-3).

    The interpreter truncates where a GPU rounds to bfloat16, so there the limit is wider.
    """
    if dtype == torch.float32:
        return 1e-5 if precision == "ieee" else 2e-3
    if dtype == torch.float16:
        return 1e-3
    return 8e-3 if device == "cuda" else 3e-2


def verdict(ours: dict[str, float], theirs: dict[str, float] | None, limit: float) -> list[str]:
    """What is wrong with `ours`: above the limit, or above 1.1 times the peer's; empty if nothing is."""
    wrong = [f"{n}: {e:.3g} is not below {limit:g}" for n, e in ours.items() if not e <= limit]
    for n, e in ours.items():
        if theirs is not None and e > 1.1 * theirs.get(n, math.inf):  # not where theirs is NaN
            wrong.append(f"{n}: {e:.3g} is above 1.1 times fla's {theirs[n]:.3g}")
    return wrong


# --- Clocks ------------------------------------------------------------------------------------------------------


@dataclass
class Clock:
    """Medians in milliseconds; with `smoke` each call runs once and the time is a stub."""

    warmup: int = 25
    rep: int = 100
    smoke: bool = False

    def median(self, run: Callable[[], object], quick: bool = False) -> float:
        """`do_bench`, which clears the L2 cache between calls; a few calls if one takes longer than 30 ms."""
        if self.smoke:
            run()
            return 1.0
        from triton.testing import do_bench

        run()
        once = self.loop(run, calls=1, repeats=1, warm=0)
        if once > 500:
            return once
        if once > 30:
            return statistics.median(self.loop(run, calls=1, repeats=1, warm=0) for _ in range(3))
        warmup, rep = (5, 30) if quick else (self.warmup, self.rep)
        return do_bench(run, warmup=warmup, rep=rep, return_mode="median")

    def loop(self, run: Callable[[], object], *, calls: int = 200, repeats: int = 5, warm: int = 20) -> float:
        """Milliseconds a call when many follow one another: what the host needs counts, the cache stays warm."""
        if self.smoke:
            run()
            return 1.0
        times = []
        for _ in range(warm):
            run()
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            for _ in range(calls):
                run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / calls)
        return statistics.median(times)


def interleaved(time_it: Callable, ours: Callable, theirs: Callable | None, rounds: int) -> dict:
    """ours, theirs, ours, ... , ours: the samples show the spread; the medians are compared."""
    samples: dict[str, list[float]] = {"ours": [], "fla": []}
    for _ in range(rounds):
        samples["ours"].append(time_it(ours))
        if theirs is not None:
            samples["fla"].append(time_it(theirs))
    samples["ours"].append(time_it(ours))
    row = {"ours_ms": statistics.median(samples["ours"]), "ours_samples_ms": samples["ours"]}
    if theirs is not None:
        row |= {"fla_ms": statistics.median(samples["fla"]), "fla_samples_ms": samples["fla"]}
        row["ratio"] = row["fla_ms"] / row["ours_ms"]
    return row


def peak_extra_bytes(run: Callable[[], object], smoke: bool) -> int | None:
    """Peak of allocated memory during a call above what was allocated before it (the inputs)."""
    if smoke:
        return None
    run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ceilings(clock: Clock) -> dict:
    """Bytes a second of a device-to-device copy (read and written), FLOP/s of an 8192^3 bfloat16 matmul."""
    smoke = clock.smoke
    device, count, n = ("cpu", 1 << 16, 64) if smoke else ("cuda", 1 << 30, 8192)
    x = torch.randn(count, device=device)
    y = torch.empty_like(x)
    copy = clock.median(lambda: y.copy_(x))
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    matmul = clock.median(lambda: a @ b)
    return {
        "copy_bytes_per_s": 2 * x.numel() * 4 / (copy * 1e-3),
        "copy_bytes": 2 * x.numel() * 4,
        "matmul_flops_per_s": 2 * n**3 / (matmul * 1e-3),
        "matmul_size": n,
    }


COMPULSORY = (
    "forward reads q, k, v, beta and writes o: B L H (2 d_k + 2 d_v + 1) e bytes, e the size of an element; "
    "forward+backward adds reading q, k, v, beta, do and writing dq, dk, dv, dbeta: B L H (4 d_k + 3 d_v + 2) e "
    "more (dn_lib.cost.compulsory)"
)


def compulsory_bytes(p: Problem) -> tuple[int, int]:
    """(forward, forward and backward) of a call without states."""
    B, L, H, d_k = p.q.shape
    shape = cost.Shape(B, L, H, d_k, p.v.shape[-1], element=p.q.element_size())
    return tuple(cost.total_bytes(cost.compulsory(shape, backward=b)) for b in (False, True))


# --- fla ---------------------------------------------------------------------------------------------------------


@dataclass
class Peer:
    """flash-linear-attention's chunkwise and recurrent functions, or why they are not there."""

    status: str
    chunk: Callable | None = None
    recurrent: Callable | None = None
    cut: bool = False
    facts: dict = field(default_factory=dict)

    def form(self, p: Problem) -> tuple[Tensor, Tensor | None]:
        return self.chunk(
            p.q, p.k, p.v, p.beta, initial_state=p.initial_state, output_final_state=p.dstate is not None,
            use_qk_l2norm_in_kernel=p.norm, cu_seqlens=p.cu_seqlens,
        )  # fmt: skip


@functools.cache
def load_fla(skip: bool, smoke: bool = False) -> Peer:
    """fla as it is installed.  While `peer.cut` is true its autotuners try only their first configuration."""
    if skip:
        return Peer("skipped")
    if smoke:
        return Peer("skipped: smoke run")
    if importlib.util.find_spec("fla") is None:
        return Peer("absent")
    from triton.runtime.autotuner import Autotuner

    peer = Peer(
        "present", facts={"fla": package_version("flash-linear-attention"), "fla_core": package_version("fla-core")}
    )
    plain = Autotuner.prune_configs

    def prune(self, *arguments, **options):
        configs = plain(self, *arguments, **options)
        return configs[:1] if peer.cut and self.base_fn.__module__.startswith("fla.") else configs

    try:
        from fla.ops.delta_rule import chunk_delta_rule, fused_recurrent_delta_rule
    except Exception as error:
        return Peer(f"failed to import: {first_line(error)}")
    Autotuner.prune_configs = prune
    peer.chunk, peer.recurrent = chunk_delta_rule, fused_recurrent_delta_rule
    return peer


# --- Result files ------------------------------------------------------------------------------------------------


def first_line(error: BaseException) -> str:
    """The exception's type and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}"


def plain(x):
    """As JSON can hold it: numbers that are not finite become strings, floats keep six digits."""
    if isinstance(x, dict):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [plain(v) for v in x]
    if isinstance(x, float):
        return float(f"{x:.6g}") if math.isfinite(x) else str(x)
    if isinstance(x, torch.dtype):
        return str(x).removeprefix("torch.")
    return str(x) if isinstance(x, Path) else x


class OutOfTime(Exception):
    """The budget is spent; what is done is written."""


class DeviceLost(Exception):
    """A kernel has brought the GPU's context down; what is done is written, and a rerun goes on after it."""


class Results:
    """A result file {provenance, settings, ceilings, rows, summary}, written anew, atomically, after each row.

    Rows of an existing file are kept if they come from the same commit and device, so that a run may be cut short
    and started again.  any_commit keeps those of other commits too: each row says which it is from.
    """

    def __init__(
        self, path: Path, settings: dict, *, budget: float | None = None, smoke: bool = False, seed: int = 0,
        any_commit: bool = False,
    ):  # fmt: skip
        self.path, self.smoke, self.started = path, smoke, time.monotonic()
        self.budget, self.summary = budget, {}
        self.settings = settings
        self.provenance = provenance(seed=seed)
        self.origin = {name: self.provenance[name] for name in ("git_commit", "device")}
        self.ceilings, self.rows = {}, []
        if path.exists():
            before = json.loads(path.read_text())
            same = ("device",) if any_commit else tuple(self.origin)
            self.rows = [row for row in before["rows"] if all(row.get(n) == self.origin[n] for n in same)]
            self.rows = [row for row in self.rows if row["measured"] != smoke]
            if dropped := len(before["rows"]) - len(self.rows):
                print(f"{path}: {dropped} rows of another commit or device will be replaced", flush=True)
            if self.rows:
                print(f"{path}: {len(self.rows)} rows kept", flush=True)
                self.provenance["begun"] = before["provenance"].get("begun", before["provenance"]["date"])

    def find(self, key: str) -> dict | None:
        return next((row for row in self.rows if row["key"] == key), None)

    def add(self, row: dict) -> None:
        row = {**row, **self.origin, "measured": not self.smoke}
        self.rows = [old for old in self.rows if old["key"] != row["key"]] + [plain(row)]
        self.write()

    def write(self) -> None:
        record = {"provenance": self.provenance, "settings": self.settings, "ceilings": self.ceilings}
        if self.smoke:
            record = {"not_measured": NOT_MEASURED, **record}
        record |= {"rows": self.rows, "summary": self.summary}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(plain(record), indent=1, allow_nan=False) + "\n")
        os.replace(part, self.path)

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def measure(self, key: str, run: Callable[[], dict], *, again: Callable[[dict], bool] = lambda row: False) -> None:
        """Adds the row `run` makes, unless it is there; an exception becomes a row with status "failed".

        Raises OutOfTime before it begins a row after the budget, DeviceLost if the GPU answers no more.
        """
        if (row := self.find(key)) is not None and not again(row):
            return
        if self.budget is not None and self.elapsed() > self.budget:
            raise OutOfTime
        begun = time.monotonic()
        try:
            row = {"key": key, "status": "ok", **run()}
        except Exception as error:
            row = {"key": key, "status": "failed", "failure": first_line(error)}
        row["seconds"] = time.monotonic() - begun
        self.add(row)
        say = row["status"] if row["status"] == "ok" else f"{row['status']}: {row.get('failure')}"
        print(f"[{self.elapsed():6.1f} s] {key}: {say}", flush=True)
        if torch.cuda.is_available():
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception as error:
                raise DeviceLost(f"{key}: {first_line(error)}") from error


def geometric_mean(x: Sequence[float]) -> float | None:
    return math.exp(statistics.fmean(map(math.log, x))) if x else None


def device_of(smoke: bool) -> str:
    """The device to measure on; exits with a word where a GPU is needed and there is none."""
    if smoke:
        if torch.cuda.is_available():
            raise SystemExit("--smoke is for machines without a GPU: set CUDA_VISIBLE_DEVICES= to hide it")
        return "cpu"
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here: --smoke runs everything on tiny shapes in Triton's interpreter, untimed")
    return "cuda"
