"""What the operator's errors depend on, one axis at a time, against float64 on the same rounded inputs.

The point: keys of norm 1, independent of each other, beta uniform in [0, 1], bfloat16, chunks of 64, heads of 128.  The
axes: chunk size, number format (float32 with full products and with TF32), norm of the keys, their correlation (with
beta up to 1 and to 2), range of beta.  Each point holds median and largest relative error of o, dq, dk, dv and dbeta
over the seeds, how many seeds were not finite, and what the inputs turned out to be once rounded: `measured_cosine`,
and `may_grow` where some beta |k|^2 is above 2, so that a step of the recurrence itself can grow.

Rows of section `inverse` do the same for the triangular inverse by each method, a chunk at a time: error of T, of N
where the method makes it, and of o and the gradients if these alone were wrong.  `how` says whether a kernel made it
or an emulation in PyTorch.  The row `tf32 rounding` shows whether a compiled TF32 dot rounds its operands or cuts them
off.

Exits with 1 if a call raised, or if a result is not finite where no step of the recurrence can grow (doubling
excepted, which is there to fail); with 2 if the budget ran out; with 3 if the GPU is lost.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Callable
from typing import Any, cast

import dn_lib  # noqa: F401  # isort: skip  (before Triton: it decides on the interpreter)

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import normalize

from dn_lib.forms.householder import rounded_matmul, scaled_inverse, ut_transform
from dn_lib.kernels import inverse, ladder
from dn_lib.kernels.common import dot
from experiments.harness.cli import Experiment, device_of, settings_of
from experiments.harness.errors import exact_results
from experiments.harness.problems import Problem, forward_backward, matmul_precision, operator
from experiments.harness.processes import compile_ahead
from experiments.harness.results import Results, first_line

# name -> dtype, torch's switch for float32 products, chunk size (the one that the operator would choose)
FORMATS = {
    "bfloat16": (torch.bfloat16, "highest", 64),
    "float16": (torch.float16, "highest", 64),
    "tf32": (torch.float32, "high", 32),
    "float32": (torch.float32, "highest", 32),
}
# Unit roundoff of a dot's operands.  TF32 keeps 11 bits; 2^-10 is for hardware that cuts off, see `tf32_rounding`.
UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "tf32": 2.0**-10, "float32": 2.0**-24}
BASE = {"format": "bfloat16", "chunk": 64, "norm": 1.0, "cosine": 0.0, "beta_range": 1.0}
COSINES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, "identical")
AXES = {
    "chunk": [{"chunk": c} for c in (16, 32, 64)],
    "norm": [{"norm": x} for x in (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)],
    "cosine": [{"cosine": c} for c in COSINES],
    "cosine, beta to 2": [{"cosine": c, "beta_range": 2.0} for c in COSINES],
    "beta": [{"beta_range": b} for b in (1.0, 1.5, 1.9, 2.0)],
}
EVERY_FORMAT = ("cosine", "cosine, beta to 2", "beta")
SMOKE_AXES = {name: points[-1:] for name, points in AXES.items()}
SMOKE_AXES |= {"chunk": AXES["chunk"][:1], "cosine": AXES["cosine"][::3]}


# --- Inputs ------------------------------------------------------------------------------------------------------


class Source:
    """Random numbers `[seeds, L, H, d]`, drawn once, on the CPU in float64: the same on every machine."""

    def __init__(self, seeds: list[int], L: int, H: int, d: int, device: str):
        drawn: dict[str, list[Tensor]] = {}
        for seed in seeds:
            g = torch.Generator().manual_seed(seed)
            for name in ("q", "k", "v", "do"):
                drawn.setdefault(name, []).append(torch.randn(L, H, d, generator=g, dtype=torch.float64))
            drawn.setdefault("beta", []).append(torch.rand(L, H, generator=g, dtype=torch.float64))
        self.x = {name: torch.stack(parts).to(device) for name, parts in drawn.items()}

    def keys(self, c: dict) -> Tensor:
        """Of the norm and correlation that `c` asks for.

        A number b added to every entry before the key is normalised gives a cosine of about b^2 / (1 + b^2).
        """
        k = self.x["k"]
        if c["cosine"] == "identical":
            k = k[:, :1].expand_as(k)
        elif c["cosine"]:
            k = k + math.sqrt(c["cosine"] / (1 - c["cosine"]))
        return c["norm"] * normalize(k, dim=-1)

    def problem(self, c: dict, dtype: torch.dtype) -> Problem:
        x = self.x
        q, beta = normalize(x["q"], dim=-1), c["beta_range"] * x["beta"]
        *inputs, do = (t.to(dtype).contiguous() for t in (q, self.keys(c), x["v"], beta, x["do"]))
        return Problem(inputs, do, chunk=c["chunk"]).requiring_grad()


def facts(k: Tensor, beta: Tensor) -> dict:
    """Of the inputs as they were rounded: mean cosine of two keys of a head; whether a step can grow (eq-eigenvalues).

    k `[seeds, L, H, d]`, beta `[seeds, L, H]`.  A step multiplies what lies along its key by 1 - beta |k|^2.
    """
    k, beta = k.detach().double(), beta.detach().double()
    unit, L = normalize(k, dim=-1), k.shape[1]
    cosine = (unit.sum(1).square().sum(-1) - L) / (L * (L - 1))
    strength = beta * k.square().sum(-1)
    return {
        "measured_cosine": cosine.mean().item(),
        "beta_k2_max": strength.max().item(),
        "may_grow": bool((strength > 2).any()),
        "share_of_tokens_that_grow": (strength > 2).double().mean().item(),
    }


def errors_by_seed(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, dict]:
    """|x - exact| / |exact| for each seed (first dimension): median and largest of the finite ones.

    A seed whose result or reference holds an infinity or NaN counts as not finite and is in neither; if that is
    all of them, both are null.
    """
    found = {}
    for name, reference in exact.items():
        x, y = got[name].detach().double().flatten(1), reference.detach().flatten(1)
        size = y.norm(dim=1)
        # An exact zero (dbeta, dk, ... of a chunk that cannot matter) leaves nothing to be relative to.
        error = (x - y).norm(dim=1) / torch.where(size > 0, size, torch.ones_like(size))
        good = [e for e in error.tolist() if math.isfinite(e)]
        found[name] = {
            "median": statistics.median(good) if good else None,
            "max": max(good, default=None),
            "not_finite": len(error) - len(good),
        }
    return found


# --- The operator ------------------------------------------------------------------------------------------------


def of_operator(c: dict, source: Source) -> dict:
    """Errors of the Triton kernels' output and gradients at one point."""
    dtype, switch, _ = FORMATS[c["format"]]
    p = source.problem(c, dtype)
    exact = exact_results(p)
    with matmul_precision(switch):
        got = forward_backward(operator, p)
    return facts(p.k, p.beta) | {"errors": errors_by_seed(got, exact)}


# --- The inverse, alone ------------------------------------------------------------------------------------------


@triton.jit
def recursion_kernel(
    k_ptr, beta_ptr, n_ptr, D: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, INVERSE: tl.constexpr
):
    """N of a chunk by the function that the operator's kernels call, kept in float32.  k `[chunks, C, D]`."""
    m = tl.program_id(0)
    i, columns = tl.arange(0, C), tl.arange(0, D)
    k = tl.load(k_ptr + (m * C + i[:, None]) * D + columns[None, :])
    beta = tl.load(beta_ptr + m * C + i).to(tl.float32)
    gram = dot(k, tl.trans(k), PRECISION)
    B = tl.where(i[:, None] > i[None, :], gram, 0.0)
    N = inverse.scaled_inverse(B, beta, C, INVERSE)
    tl.store(n_ptr + (m * C + i[:, None]) * C + i[None, :], N)


def by_recursion(k: Tensor, beta: Tensor, half: bool) -> Tensor:
    """N `[seeds, n, C, C]` of k `[seeds, n, C, d]` and beta `[seeds, n, C]`; products in float16 if half, else TF32."""
    *chunks, C, d = k.shape
    N = torch.full((*chunks, C, C), float("nan"), device=k.device)
    k, beta = (k if half else k.float()).contiguous(), beta.contiguous()
    cast(Any, recursion_kernel)[(math.prod(chunks),)](
        k, beta, N, D=d, C=C, PRECISION="ieee" if half else "tf32", INVERSE="half" if half else "tf32"
    )
    return N


def by_ladder(k: Tensor, beta: Tensor, method: str) -> Tensor:
    """T by one of chapter 5's three kernels, in float32 throughout."""
    seeds, n, C, d = k.shape
    rows = k.float().reshape(seeds, n * C, 1, d).contiguous(), beta.float().reshape(seeds, n * C, 1).contiguous()
    return ladder.ut_transform(*rows, method=method, chunk_size=C).reshape(seeds, n, C, C)


def blocked_emulated(k: Tensor, beta: Tensor, matmul: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """T by eq-merge-levels with the products left to `matmul`."""
    C, i = k.shape[-2], torch.arange(k.shape[-2], device=k.device)
    A = (beta[..., :, None] * (k @ k.mT)).tril(-1)
    M, size = torch.eye(C, device=k.device).expand_as(A), 1
    while size < C:
        block = i // size
        corner = (block[:, None] % 2 == 1) & (block[None, :] == block[:, None] - 1)
        M, size = M - matmul(matmul(M, A * corner), M), 2 * size
    return M * beta[..., None, :]


def emulated(form: Callable, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """Operands of every product rounded to `dtype`, sums in float32, as matrix units do; PyTorch, on the device."""
    return lambda k, beta: form(k.float(), beta.float(), matmul=rounded_matmul(dtype))


def doubling(k: Tensor, beta: Tensor, matmul: Callable) -> Tensor:
    return ut_transform(k, beta, method="doubling", matmul=matmul)


# name -> what it returns, how it runs, the function of (k, beta)
KERNEL, EMULATION = "kernel", "emulated in PyTorch: operands of products rounded, sums in float32"
# (The recursion's kernel in full float32 takes a minute to compile for chunks of 64, where the operator has no use
# for it: its float32 chunks are of 32.)
METHODS: dict[str, tuple[str, str, Callable[[Tensor, Tensor], Tensor]]] = {
    "recursion on N, float16": ("N", KERNEL, lambda k, beta: by_recursion(k, beta, True)),
    "recursion on N, tf32": ("N", KERNEL, lambda k, beta: by_recursion(k, beta, False)),
    "substitution, float32": ("T", KERNEL, lambda k, beta: by_ladder(k, beta, "substitution")),
    "blocked, float32": ("T", KERNEL, lambda k, beta: by_ladder(k, beta, "merging")),
    "doubling, float32": ("T", KERNEL, lambda k, beta: by_ladder(k, beta, "doubling")),
    "recursion on N, float32": ("N", EMULATION, emulated(scaled_inverse, torch.float32)),
    "recursion on N, bfloat16": ("N", EMULATION, emulated(scaled_inverse, torch.bfloat16)),
    "blocked, float16": ("T", EMULATION, emulated(blocked_emulated, torch.float16)),
    "doubling, float16": ("T", EMULATION, emulated(doubling, torch.float16)),
}


def used(T: Tensor, N: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, do: Tensor) -> dict[str, Tensor]:
    """o and gradients of one chunk from state zero, in float64 but for the T and N that are given (eq-backward-t).

    So what is wrong with them comes from the inverse alone.  The errors E of the writes and their gradient Z are
    taken from N, as the operator takes them; where there is only T, from E = V - B Vn and Z = dVn - B^T dR.
    """
    scale = q.shape[-1] ** -0.5
    B, P, D = (k @ k.mT).tril(-1), scale * (q @ k.mT).tril(), beta[..., None]
    Vn = T @ v
    dVn = P.mT @ do
    dR = T.mT @ dVn
    E = v - B @ Vn if N is None else v + N @ (D * v)
    Z = dVn - B.mT @ dR if N is None else dVn + N.mT @ (D * dVn)
    dP = scale * (do @ Vn.mT).tril()
    G = -(dR @ Vn.mT).tril(-1)
    dk = dP.mT @ q + (G + G.mT) @ k
    return {"o": P @ Vn, "dq": dP @ k, "dk": dk, "dv": dR, "dbeta": (Z * E).sum(-1)}


def of_inverse(c: dict, source: Source, method: str) -> dict:
    """Errors of T, of N where the method makes it, and of what they are used for, at one point; bfloat16 inputs."""
    p = source.problem(c, torch.bfloat16)
    known = facts(p.k, p.beta)
    C = c["chunk"]
    q, k, v, do = (x.detach()[:, :, 0].unflatten(1, (-1, C)) for x in (p.q, p.k, p.v, p.do))
    beta = p.beta.detach()[:, :, 0].unflatten(1, (-1, C))
    wide = [x.double() for x in (q, k, v, beta, do)]
    D = wide[3]
    T, N = ut_transform(wide[1], D), scaled_inverse(wide[1], D, method="solve")
    exact = {"T": T, "N": N, **used(T, N, *wide)}
    kind, _, run = METHODS[method]
    T, N = run(k, beta).double(), None
    if kind == "N":
        T, N = torch.diag_embed(D) + D[..., :, None] * T * D[..., None, :], T
    got = {"T": T, "N": N, **used(T, N, *wide)}
    if N is None:
        del exact["N"]
    return known | {"errors": errors_by_seed(got, exact)}


# --- What TF32 keeps ---------------------------------------------------------------------------------------------


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, C: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(out_ptr + at, dot(tl.load(a_ptr + at), tl.load(b_ptr + at), PRECISION))


def tf32_rounding(device: str) -> dict:
    """How a compiled dot with precision "tf32" shortens its operands: a matrix times the identity shows its numbers."""
    C = 64
    x = (1 + torch.rand(C, C, generator=torch.Generator().manual_seed(0))).to(device)
    cut = (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
    forms = {"unchanged": x, "cut off": cut, "rounded to nearest": ladder.round_to_tf32(x)}
    eye, row = torch.eye(C, device=device), {}
    for side, operands in (("left", (x, eye)), ("right", (eye, x))):
        out = torch.full_like(x, float("nan"))
        cast(Any, dot_kernel)[(1,)](*operands, out, C=C, PRECISION="tf32")
        row[side] = next((name for name, form in forms.items() if torch.equal(out, form)), "otherwise")
    return row


# --- Compilation, on all cores ------------------------------------------------------------------------------------


def compile_one(job: tuple[str, dict, dict]) -> None:
    """In a process of its own: one call, so that Triton's cache holds its kernels."""
    name, c, sizes = job
    source = Source([0], device="cuda", **sizes)
    if name in METHODS:
        of_inverse(c, source, name)
    else:
        of_operator(c, source)


def precompile(big: dict, small: dict, workers: int) -> dict:
    jobs = [(name, BASE | {"format": name, "chunk": chunk}, big) for name, (_, _, chunk) in FORMATS.items()][::-1]
    kernels = [name for name, (_, how, _) in METHODS.items() if how == KERNEL]
    jobs += [(name, BASE | p, small) for p in AXES["chunk"][::-1] for name in kernels]
    jobs += [(BASE["format"], BASE | p, big) for p in AXES["chunk"] if p["chunk"] != BASE["chunk"]]
    return {"jobs": len(jobs), **compile_ahead(compile_one, jobs, workers)}


# --- Rows --------------------------------------------------------------------------------------------------------


def a_sweep(points: list[dict], measure: Callable[[dict], dict]) -> dict:
    """One line of a figure: each point by itself, so that one that raises leaves the others."""
    done = []
    for changed in points:
        try:
            done.append({**changed, **measure({**BASE, **changed})})
        except Exception as error:
            done.append({**changed, "failure": first_line(error)})
    return {"points": done}


def faults(rows: list[dict]) -> list[str]:
    """What raised, and what is not finite though no step can grow; doubling is expected to fail and is left out."""
    found = []
    for row in rows:
        if row["status"] != "ok":
            found.append(f"{row['key']}: {row['failure']}")
        for point in row.get("points", ()):
            where = f"{row['key']}, {point.get(row['axis'].split(',')[0].replace('beta', 'beta_range'))}"
            if "failure" in point:
                found.append(f"{where}: {point['failure']}")
            elif not point["may_grow"] and not row.get("method", "").startswith("doubling"):
                bad = [name for name, e in point["errors"].items() if e["not_finite"]]
                found += [f"{where}: {name} is not finite" for name in bad]
    return found


def amplification(rows: list[dict]) -> dict:
    """For each format: the largest error of any output at each point of "cosine, beta to 2", in unit roundoffs."""
    found = {}
    for row in rows:
        if row["section"] == "operator" and row["axis"] == "cosine, beta to 2":
            largest = [[e["max"] for e in p.get("errors", {}).values()] for p in row["points"]]
            units = [None if not es or None in es else max(es) / UNIT[row["format"]] for es in largest]
            found[row["format"]] = {"cosine": [p["cosine"] for p in row["points"]], "units": units}
    return found


def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        for point in row.get("points", ()):
            setting = " ".join(f"{n}={point[n]}" for n in BASE if n in point)
            text = point.get("failure") or " ".join(
                f"{name} {'-' if e['median'] is None else format(e['median'], '.1e')}"
                for name, e in point["errors"].items()
            )
            mark = "*" if point.get("may_grow") else " "
            lines.append(f"{row.get('format') or row.get('method'):24} {setting:34}{mark} {text}")
    return "\n".join(lines) + "\n* some step multiplies by more than 1: beta |k|^2 > 2 as the inputs were rounded"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=3)


def run(options: argparse.Namespace) -> int:
    device, smoke = device_of(options.smoke), options.smoke
    axes = SMOKE_AXES if smoke else AXES
    big = dict(L=32, H=1, d=16) if smoke else dict(L=1024, H=2, d=128)
    small = dict(L=32, H=1, d=16) if smoke else dict(L=512, H=1, d=64)
    seeds = list(range(2 if smoke else options.seeds))
    base_chunk = {"chunk": 16} if smoke else {}
    chunks_alone = "chunks by themselves, from state zero; bfloat16 inputs; o and gradients in float64 but for T and N"
    settings = {
        **settings_of(options),
        "base": BASE | base_chunk,
        "operator": big,
        "formats": {name: {"dtype": f[0], "float32_matmul_precision": f[1]} for name, f in FORMATS.items()},
        "unit_roundoff": UNIT,
        "inputs": "q of norm 1, k as said, v and do standard normal, beta uniform; made in float64, then rounded",
        "error": "|x - exact| / |exact| by seed, against float64 on the same rounded inputs",
        "inverse": small | {"what": chunks_alone},
    }
    if options.workers and not smoke:
        settings["precompiled"] = precompile(big, small, options.workers)
        print(settings["precompiled"], flush=True)
    results = Results(options.out, settings, budget=options.budget, smoke=smoke)
    source, chunks = Source(seeds, device=device, **big), Source(seeds, device=device, **small)

    def sweep(section: str, axis: str, name: str, points: list[dict], run: Callable[[dict], dict], **more: str) -> None:
        row = {"section": section, "axis": axis, **more}
        results.measure(f"{section} {axis}: {name}", lambda: row | a_sweep([p | base_chunk for p in points], run))

    def body() -> None:
        for name, (_, _, chunk) in FORMATS.items():
            for axis, points in axes.items():
                if name == BASE["format"] or axis in EVERY_FORMAT:
                    given = [{"format": name, "chunk": chunk, **p} for p in points]
                    sweep("operator", axis, name, given, lambda c: of_operator(c, source), format=name)
        results.measure("tf32 rounding", lambda: {"section": "rounding", "axis": "tf32", **tf32_rounding(device)})
        for axis in sorted(axes, key="chunk".__eq__):  # chunk sizes last: they compile anew
            for name, (_, how, _) in METHODS.items():
                run = functools.partial(of_inverse, source=chunks, method=name)
                sweep("inverse", axis, name, axes[axis], run, method=name, how=how)

    code = results.fill(body)
    wrong = faults(results.rows)
    results.summary = {"amplification": amplification(results.rows), "faults": wrong}
    lines = [table(results.rows), *(f"FAULT {fault}" for fault in wrong)]
    return results.finish("\n".join(lines), code, failed=wrong)


EXPERIMENT = Experiment(
    question="What do the errors of the operator, and of the triangular inverse alone, depend on?",
    writes=("error_microscope.json",),
    minutes=1,
    gpu="H200",
    run=run,
    options=options,
    shared=("budget", "smoke", "workers"),
)
