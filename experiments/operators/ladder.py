"""Predicted against measured time of every rung of chapter 5's ladder, and of the operator that it leads to.

A stage is a form at one size. The **ladder** is the delta rule's forward in four kernels, in three, in two and in one
(`dn_lib.kernels.ladder`, `dn_lib.kernels.rungs`): each keeps one more thing on chip than the rung before, and nothing
else differs, the inverse of all being the operator's own (`inverse` in the row). Beside it: linear attention's kernel,
the four inverses alone, the operator's two kernels at inference and for training, its backward, and one token of 512
sequences; and softmax attention by both of torch's fast kernels, FlashAttention and cuDNN's, named, for its cost alone.

A stage first has to agree with float64 on the first and the last sequence of the batch that is timed, with its outputs
filled with NaN beforehand; above the limit it is `refused` and not timed. Then the form is timed as a whole, and each
of its Triton kernels alone, on the arguments with which the form launched it. The prediction is
`dn_lib.cost.roofline_time` with the two ceilings measured in the same run, a large copy and a large bfloat16 matrix
product: nothing is fitted. Which cost model applies is read off the launches: where the operator launches what the
model does not count, the row says `failed`. A row holds

- ms (median of the two samples_ms), predicted_ms, ratio (measured over predicted), bytes, flops, bound (by which of
  the two), and steps, the longest chain of dependent chunks;
- kernels: the same for each Triton kernel alone, with programs, registers, spills (as Triton counts them) and
  shared_bytes;
- float32_flops and float32_ms where a stage has float32 dots: their time at the rate of a large float32 product.  The
  prediction does not use it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import dn_lib
from dn_lib import cost
from dn_lib.forms.householder import ut_transform
from dn_lib.forms.linear_attention import chunkwise_linear_attention
from dn_lib.kernels import ladder, rungs
from dn_lib.testing import poisoned, relative_error
from experiments.harness.cli import Experiment, device_of, settings_of
from experiments.harness.clock import Clock, ceilings, float32_rate
from experiments.harness.errors import limit_of, refused, verdict
from experiments.harness.launches import Launch, launches
from experiments.harness.problems import INPUTS, draw, softmax_form
from experiments.harness.processes import compile_ahead
from experiments.harness.results import Results

SIZES = ((16, 2048, 16, 128), (16, 2048, 32, 64))  # B, L, H, d: 32,768 tokens of 2,048 channels
DECODED = 512  # sequences of which one token is decoded
CHUNK, BLOCK_V = 64, 64
OFF = 0.4
# Four intermediates are rounded to bfloat16, one after the other; the tests of these kernels have the same bound.
LADDER_LIMIT = 2e-2
INVERSE = "blocks"  # of every rung: the operator's own
SOFTMAX = {"FlashAttention": "FLASH_ATTENTION", "cuDNN": "CUDNN_ATTENTION"}


# --- The stages --------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """run: what is timed.  errors: of what `run` returned, by name.  model: the costs of what was launched.

    inverse: the method of its inverse.  triton: whether its kernels are seen as they are launched.
    """

    name: str
    run: Callable[[], Any]
    errors: Callable[[Any], dict[str, float]]
    model: Callable[[list[Launch]], tuple[cost.Cost, ...]]
    limit: float
    shape: cost.Shape
    float32_flops: int = 0
    inverse: str | None = None
    triton: bool = True


class Size:
    """Inputs of one size, their results in float64, and the stages."""

    def __init__(self, B: int, L: int, H: int, d: int, device: str, *, chunk: int, decoded: int):
        self.shape = cost.Shape(B, L, H, d, d, C=chunk, block_v=min(d, BLOCK_V))
        self.device, self.decoded = device, decoded
        self.p = draw(B, L, H, d, d, torch.bfloat16, device, seed=3)
        self.inputs = [x.detach() for x in self.p.leaves]
        self.some = sorted({0, B - 1})
        self.limit = limit_of(torch.bfloat16, device=device)
        self.ladder_limit = LADDER_LIMIT if device == "cuda" else limit_of(torch.bfloat16, device=device)

    def wide(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return [x.detach()[self.some].double() for x in tensors]

    @functools.cached_property
    def exact(self) -> dict[str, torch.Tensor]:
        leaves = [x.requires_grad_() for x in self.wide(*self.inputs)]
        o, state = dn_lib.delta_rule(*leaves, backend="chunkwise", output_final_state=True)
        gradients = torch.autograd.grad(o, leaves, self.wide(self.p.do))
        assert state is not None
        names = ("o", "state", "dq", "dk", "dv", "dbeta")
        return dict(zip(names, (o.detach(), state.detach(), *gradients), strict=True))

    @functools.cached_property
    def exact_linear(self) -> tuple[torch.Tensor, torch.Tensor]:
        o, state = chunkwise_linear_attention(*(x.transpose(1, 2) for x in self.wide(*self.inputs[:3])))
        return o.transpose(1, 2), state

    @functools.cached_property
    def exact_T(self) -> torch.Tensor:
        """[sequences, H, chunks, C, C]."""
        k, beta = (x.transpose(1, 2).unflatten(2, (-1, self.shape.C)) for x in self.wide(self.inputs[1], self.p.beta))
        return ut_transform(k, beta)

    def compare(self, *pairs: tuple[str, torch.Tensor, torch.Tensor]) -> dict[str, float]:
        return {name: relative_error(got[self.some], exact) for name, got, exact in pairs}

    def output(self, found: tuple) -> dict[str, float]:
        return self.compare(("o", found[0], self.exact["o"]), ("state", found[1], self.exact["state"]))

    def operator(self, *, gradients: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        inputs = self.p.leaves if gradients else self.inputs
        with torch.set_grad_enabled(gradients):
            return dn_lib.delta_rule(*inputs, backend="triton", chunk_size=self.shape.C, output_final_state=True)

    def operator_model(self, seen: list[Launch]) -> tuple[cost.Cost, ...]:
        """The cost of what the operator launched: its regime and its blocks are read off the launches."""
        options = {launch.name: launch.options for launch in seen}
        names = tuple(launch.name for launch in seen)
        first = options.get("chunk_scan_fwd") or options.get("chunk_scan_bwd") or {}
        # The Gluon kernels have chunks of 64, and call a block VALUES where it is not the whole head.
        C, block_v = first.get("C", 64), first.get("BV", first.get("VALUES", self.shape.d_v))
        shape = dataclasses.replace(
            self.shape, block_v=block_v, block_k=options.get("chunk_bwd_dqk", {}).get("BK"), C=C
        )
        if names == ("chunk_inverse", "chunk_scan_fwd"):
            save = "Vn states" if first.get("STATES") else "Vn" if first["SAVE"] else ""
            return cost.two_kernels(shape, save=save)
        forms = {("chunk_scan_bwd",): cost.fused_backward, ("chunk_scan_bwd", "chunk_bwd_dqk"): cost.backward}
        if names not in forms:
            raise ValueError(f"dn_lib.cost has no model for the launches {names}")
        return forms[names](shape)

    def inverse(self, method: str) -> Stage:
        _, k, _, beta = self.inputs
        C, counted = self.shape.C, "scaled" if method == INVERSE else method

        def errors(T: torch.Tensor) -> dict[str, float]:
            blocks = T[self.some].transpose(1, 2).unflatten(2, (-1, C))
            return {"T": relative_error(blocks, self.exact_T)}

        return Stage(
            f"T by {method}",
            lambda: ladder.ut_transform(k, beta, method=method, chunk_size=C),
            errors,
            lambda seen: cost.delta_rule_in_steps(self.shape, method=counted)[:1],
            self.ladder_limit,
            self.shape,
            0 if method == INVERSE else self.inverse_flops(method),
            inverse=method,
        )

    def inverse_flops(self, method: str) -> int:
        """FLOPs of the three inverses with float32 dots, which the tensor cores do not do."""
        return self.shape.heads * self.shape.chunks * cost.inverse_flops(self.shape.C, method)

    def backward(self) -> Stage:
        leaves = self.p.leaves
        forward = functools.cache(lambda: self.operator(gradients=True)[0])  # launched once, outside of `run`

        def run() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(forward(), leaves, self.p.do, retain_graph=True)

        def errors(found: tuple) -> dict[str, float]:
            names = ("dq", "dk", "dv", "dbeta")
            return self.compare(*((name, x, self.exact[name]) for name, x in zip(names, found, strict=True)))

        def model(seen: list[Launch]) -> tuple[cost.Cost, ...]:
            seen[:] = [launch for launch in seen if launch.name not in ("chunk_inverse", "chunk_scan_fwd")]
            return self.operator_model(seen)

        return Stage("operator, backward", run, errors, model, self.limit, self.shape)

    def token(self) -> Stage:
        """One token for each of many states, which are in memory and go back there."""
        s = self.shape
        few = slice(0, min(self.decoded, 8))
        p = draw(self.decoded, 1, s.H, s.d_k, s.d_v, torch.bfloat16, self.device, seed=10, state=True)
        inputs = [x.detach() for x in (p.q, p.k, p.v, p.beta)]
        assert p.initial_state is not None
        state = p.initial_state.detach()

        def step(tensors: list[torch.Tensor], first: torch.Tensor, backend: str) -> tuple:
            options = {"initial_state": first, "output_final_state": True, "backend": backend}
            with torch.no_grad():
                return dn_lib.delta_rule(*tensors, **options)

        def errors(found: tuple) -> dict[str, float]:
            exact = step([x[few].double() for x in inputs], state[few].double(), "recurrent")
            return {name: relative_error(x[few], y) for name, x, y in zip(("o", "state"), found, exact, strict=True)}

        shape = cost.Shape(self.decoded, 1, s.H, s.d_k, s.d_v, C=1)
        return Stage(
            "one token", lambda: step(inputs, state, "triton"), errors, lambda _: cost.decode(shape), self.limit, shape
        )

    def rung(self, name: str, form: Callable, model: Callable[[cost.Shape], tuple[cost.Cost, ...]]) -> Stage:
        """A rung of the ladder, with the inverse of all others."""
        options = {"chunk_size": self.shape.C, "block_v": self.shape.block_v, "method": INVERSE}
        return Stage(
            name,
            lambda: form(*self.inputs, **options),
            self.output,
            lambda seen: model(self.shape),
            self.ladder_limit,
            self.shape,
            inverse=INVERSE,
        )

    @functools.cached_property
    def exact_softmax(self) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in self.wide(*self.inputs[:3]))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def softmax(self, name: str) -> Stage:
        """Softmax attention by one of torch's kernels; on a CPU, by the one that there is."""
        p = dataclasses.replace(self.p, inputs=self.inputs)

        def run() -> torch.Tensor:
            with torch.no_grad():
                return softmax_form(p, SOFTMAX[name] if self.device == "cuda" else "MATH")[0]

        return Stage(
            f"softmax attention, {name}",
            run,
            lambda found: self.compare(("o", found, self.exact_softmax)),
            lambda seen: cost.softmax_attention(self.shape),
            self.limit,
            self.shape,
            triton=False,
        )

    def stages(self) -> list[Stage]:
        """In the chapter's order."""
        q, k, v, _ = self.inputs
        narrow = {"chunk_size": self.shape.C, "block_v": self.shape.block_v}
        linear = Stage(
            "linear attention",
            lambda: ladder.linear_attention(q, k, v, **narrow),
            lambda found: self.compare(
                ("o", found[0], self.exact_linear[0]), ("state", found[1], self.exact_linear[1])
            ),
            lambda seen: cost.linear_attention(self.shape),
            self.limit,
            self.shape,
        )
        two = Stage("two kernels", self.operator, self.output, self.operator_model, self.limit, self.shape)
        training = functools.partial(self.operator, gradients=True)
        return [
            linear,
            *(self.inverse(method) for method in ladder.METHODS),
            self.rung(
                "four kernels", ladder.delta_rule_in_steps, functools.partial(cost.delta_rule_in_steps, method="scaled")
            ),
            self.rung("three kernels", rungs.delta_rule_in_three, cost.delta_rule_in_three),
            self.rung("two kernels, plain", rungs.delta_rule_in_two, cost.delta_rule_in_two),
            self.rung("one kernel", ladder.delta_rule_in_one, functools.partial(cost.fused, method="scaled")),
            two,
            Stage("operator, training", training, self.output, self.operator_model, self.limit, self.shape),
            self.backward(),
            self.token(),
            *(self.softmax(name) for name in SOFTMAX),
        ]


# --- Measuring ---------------------------------------------------------------------------------------------------


def prediction(costs: tuple[cost.Cost, ...], rates: dict, ms: float) -> dict:
    """Bytes, each tensor once and as programs ask for them; FLOPs; predicted time, and the measured one over it."""
    bandwidth, flop_rate = rates["copy_bytes_per_s"], rates["matmul_flops_per_s"]
    predicted = 1e3 * cost.roofline_time(costs, bandwidth, flop_rate)
    moved, work = cost.total_bytes(costs), cost.total_flops(costs)
    return {
        "ms": ms,
        "predicted_ms": predicted,
        "ratio": ms / predicted,
        "bytes": moved,
        "flops": work,
        "requested": sum(c.requested for c in costs),
        "bound": "bytes" if moved / bandwidth > work / flop_rate else "operations",
        "steps": max(c.steps for c in costs),
    }


def measure(stage: Stage, clock: Clock, rates: dict) -> dict:
    s = stage.shape
    row = {"stage": stage.name, "B": s.B, "L": s.L, "H": s.H, "d": s.d_k, "chunk": s.C, "dtype": "bfloat16"}
    with launches() as seen, poisoned():
        found = stage.run()
    row |= {"errors": stage.errors(found), "limit": stage.limit}
    del found
    if wrong := verdict(row["errors"], None, stage.limit):
        return row | refused(wrong)
    if stage.inverse:
        row["inverse"] = stage.inverse
    costs = stage.model(seen)
    if stage.triton and len(costs) != len(seen):
        names = [launch.name for launch in seen]
        raise ValueError(f"the model counts {len(costs)} kernels, launched were {names}")
    row["samples_ms"] = [clock.median(stage.run) for _ in range(2)]
    row |= prediction(costs, rates, statistics.median(row["samples_ms"]))
    if stage.float32_flops:
        row["float32_flops"] = stage.float32_flops
        row["float32_ms"] = 1e3 * stage.float32_flops / rates["float32_flops_per_s"]
    row["kernels"] = []
    for launch, c in zip(seen, costs, strict=True) if stage.triton else ():
        ms = clock.median(launch.again) if len(seen) > 1 else row["ms"]
        kernel = {"kernel": launch.name, "name": c.name, **prediction((c,), rates, ms), **launch.facts()}
        row["kernels"].append(kernel)
    return row


def compile_one(job: tuple[tuple[int, int, int, int], int]) -> None:
    """In a process of its own: one stage for one sequence, so that Triton's cache holds its kernels."""
    (_, L, H, d), index = job
    Size(1, L, H, d, "cuda", chunk=CHUNK, decoded=1).stages()[index].run()


def summary(rows: list[dict]) -> dict:
    done = [row for row in rows if row["status"] == "ok"]
    return {
        "stages": len(rows),
        "off_by": OFF,
        "off": [row["key"] for row in done if abs(row["ratio"] - 1) > OFF],
        "within": [row["key"] for row in done if abs(row["ratio"] - 1) <= OFF],
        "refused_or_failed": [row["key"] for row in rows if row["status"] != "ok"],
    }


def table(rows: list[dict]) -> str:
    lines = [f"{'stage':44} {'predicted':>9} {'measured':>9} {'ratio':>6}  bound by"]
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"{row['key']:44} {row['status']}: {row['failure']}")
            continue
        parts = row["kernels"] if len(row["kernels"]) > 1 else []
        for name, x in [(row["key"], row), *((f"    {part['kernel']}", part) for part in parts)]:
            times = f"{x['predicted_ms']:9.3f} {x['ms']:9.3f} {x['ratio']:6.2f}"
            lines.append(f"{name:44} {times}  {x['bound']}")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    """0; 1 if a row failed or was refused; 2 if the budget ran out; 3 if the GPU was lost."""
    device, clock = device_of(options.smoke), Clock.of(options)
    settings = {
        **settings_of(options),
        "clock": f"{clock}; a stage: twice, a kernel: once",
        "inputs": f"{INPUTS}; all bfloat16",
        "errors": "relative Frobenius norm against float64 of the same rounded inputs, first and last sequence; "
        "one token: the first eight; uninitialised memory filled with NaN",
        "prediction": "dn_lib.cost.roofline_time: sum over kernels of the larger of bytes / copy rate and FLOPs / "
        "bfloat16 matmul rate, both measured in this run; every tensor is counted once for each kernel",
        "kernels": "each alone, on the arguments of the stage's own launch; final states are asked for",
        "float32_ms": "the FLOPs of float32 dots at the rate of a large float32 product; no part of the prediction",
    }
    results = Results(options.out, settings, budget=options.budget, smoke=options.smoke)
    sizes, chunk, decoded = (((2, 32, 1, 16),), 16, 2) if options.smoke else (SIZES, CHUNK, DECODED)

    def body() -> None:
        made = [Size(*size, device, chunk=chunk, decoded=decoded) for size in sizes]
        stages = [
            (size, n, stage) for size, one in zip(sizes, made, strict=True) for n, stage in enumerate(one.stages())
        ]
        if not options.smoke:
            settings["multiprocessors"] = torch.cuda.get_device_properties(0).multi_processor_count
            if options.workers:
                jobs = [(size, n) for size, n, _ in stages]
                settings["compiled"] = compile_ahead(compile_one, jobs, options.workers)
        results.ceilings = {**ceilings(clock), **float32_rate(clock)}
        for _, _, stage in stages:
            s = stage.shape
            key = f"{s.B}x{s.L}x{s.H}x{s.d_k} {stage.name}"
            results.measure(key, functools.partial(measure, stage, clock, results.ceilings))

    code = results.fill(body)
    results.summary = summary(results.rows)
    return results.finish(table(results.rows), code, failed=results.not_done)


EXPERIMENT = Experiment(
    question="How long should each stage of chapter 5's ladder take, by its bytes and FLOPs, and how long does it?",
    writes=("ladder.json",),
    minutes=1,
    gpu="H200",
    run=run,
    shared=("budget", "quick", "smoke", "workers"),
)
