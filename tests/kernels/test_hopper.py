"""The Hopper kernels: what they take, that they compile well for a GPU that is not there, and, on one, what they give.

N is made here, in float64, and rounded: these kernels read it, another makes it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dn_lib import delta_rule
from dn_lib.kernels.hopper import launch
from dn_lib.testing import (
    NAMES,
    delta_rule_inputs,
    forward_and_gradients,
    leaves,
    normalised,
    relative_error,
    sensitivity,
)

ROOT = Path(__file__).resolve().parents[2]
HAS_TRITON = importlib.util.find_spec("triton") is not None
C, D = launch.CHUNK, launch.HEAD
BF16 = torch.bfloat16
# As in test_gpu.py: bfloat16 is off by at most u = 2^-8, less than half of that on average, and some four or five such
# errors meet in a result.  Where inputs are ill-conditioned on purpose, times the result's condition number.
BOUND = 8e-3
DEVICE = "cuda"


# --- What they take ---------------------------------------------------------------------------------------------

CALL = {
    "capability": 90, "triton_version": "3.6.0", "dtype": BF16, "d_k": D, "d_v": D, "tokens": 4096, "L": 2048, "H": 16,
}  # fmt: skip
REFUSED = {
    "Hopper": {"capability": 100},
    "Triton": {"triton_version": "3.9.1"},
    "bfloat16": {"dtype": torch.float16},
    "channels": {"d_v": 64},
    "chunks": {"chunk": 32},
    "equal lengths": {"packed": True},
    "multiple of 64": {"L": 2047},
    "32 bits": {"tokens": 2**26},
}


def test_what_they_take():
    assert launch.why_not(**CALL) is None
    for word, change in REFUSED.items():
        assert word in launch.why_not(**CALL | change), word
    assert "multiple of 64" in launch.why_not(**CALL | {"L": 0})


def arguments(B=1, L=192, H=1, **changes):
    wide, narrow = (torch.zeros(B, L, H, d, dtype=BF16) for d in (D, C))
    given = {"q": wide, "k": wide, "v": wide, "o": wide, "beta": wide[..., 0], "n": narrow}
    return given | {"scale": 1.0, "segment": L, "segments": 1, "values": 64} | changes


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"segments": 2}, "segments of 192"),
        ({"segment": 128}, "segments of 128"),
        ({"segment": 128, "segments": 3}, "none empty"),  # the third would begin behind the end
        ({"segment": 96, "segments": 2}, "whole chunks"),
        ({"L": 190}, "multiple of 64"),
        ({"q": torch.zeros(1, 192, 1, 64, dtype=BF16)}, "q must be"),
        ({"q": torch.zeros(1, 192, 1, D)}, "q must be"),
        ({"pseudo": torch.zeros(1, 192, 1, D, dtype=BF16)}, "together"),
        ({"values": 32}, "values"),
    ],
)
def test_calls_that_would_go_wrong_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        launch.chunk_scan_fwd(**arguments(**changes))


def test_nothing_imports_gluon_before_a_launch():
    code = (
        "import sys, dn_lib, dn_lib.ops, dn_lib.kernels.hopper.launch\n"
        "print([m for m in sys.modules if m in ('dn_lib.kernels.hopper.scan', 'dn_lib.kernels.hopper.common')])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- Compiled for a GPU that is not there -----------------------------------------------------------------------


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="Triton's ptxas is for Linux on x86-64"
)
def test_they_compile_without_spills_and_with_asynchronous_products(tmp_path):
    """Shared memory: the CUDA C programming guide, compute capability 9.0.  Stack: what the study measured well."""
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) > (3, 7):
        # The copy engine has other names there.  Nothing launches these kernels, then.
        assert "Triton" in launch.why_not(**CALL | {"triton_version": triton.__version__})
        return
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "dn_lib.kernels.hopper.aot", "--json"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)
    assert {row["kernel"] for row in rows} == {"chunk_scan_fwd", "chunk_scan_bwd"}
    assert {row["NORM"] for row in rows} == {row["GATE"] for row in rows} == {True, False}
    assert {row.get("VALUES") for row in rows} == {64, 128, None}
    for row in rows:
        assert row["shared"] <= 227 * 1024, row
        assert 0 < row["registers"] <= 255, row
        assert row["stack"] <= (256 if row["GATE"] else 64), row
        assert row["serialised"] is False, row


# --- On a GPU ---------------------------------------------------------------------------------------------------


def refusal() -> str | None:
    if not (HAS_TRITON and torch.cuda.is_available()):
        return None  # the mark says it
    import triton

    major, minor = torch.cuda.get_device_capability()
    return launch.why_not(**CALL | {"capability": 10 * major + minor, "triton_version": triton.__version__})


@pytest.fixture
def hopper():
    if reason := refusal():
        pytest.skip(reason)


def exact_rule(*x, initial_state=None, **options):
    """Chapter 4's form in float64, which the suite holds to 1e-12 of the recurrence."""
    return delta_rule(
        *x, initial_state=initial_state, output_final_state=True, backend="chunkwise", chunk_size=C, **options
    )


def chunk_matrices(k, beta):
    """N = -(I + B D)^{-1} B of every chunk, `[B, L, H, C]` in float64, where B = tril(K K^T, -1)."""
    B, L, H, _ = k.shape
    K = k.reshape(B, L // C, C, H, D).transpose(2, 3)
    lower = (K @ K.mT).tril(-1)
    one = torch.eye(C, dtype=k.dtype, device=k.device)
    scaled = lower * beta.reshape(B, L // C, C, H).transpose(2, 3)[..., None, :]
    N = -torch.linalg.solve_triangular(one + scaled, lower, upper=False, unitriangular=True)
    return N.transpose(2, 3).reshape(B, L, H, C)


def exact_errors_and_states(k, v, beta, n, state):
    """E `[B, L, H, D]` and the state that enters each chunk, `[B L / C, H, D, D]`, chunk by chunk in float64."""
    B, L, H, _ = k.shape
    S = k.new_zeros(B, H, D, D) if state is None else state.double()
    errors, states = [], []
    for begin in range(0, L, C):
        K, V, N = (x[:, begin : begin + C].transpose(1, 2) for x in (k, v, n))
        b = beta[:, begin : begin + C].transpose(1, 2)[..., None]
        R = V - K @ S
        E = R + N @ (b * R)
        errors.append(E.transpose(1, 2))
        states.append(S)
        S = S + K.mT @ (b * E)
    return torch.cat(errors, dim=1), torch.stack(states, dim=1).flatten(0, 1)


def unwritten(*shape, dtype=BF16):
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def by_the_kernels(
    tensors, do, dstate, *, norm=False, values=64, segments=(1, 1), state_in=None, dstate_out=None, save=True
):
    """What both launches write, by name.

    segments: of the forward and of the backward.  state_in, dstate_out: at the ends of the parts, if there are several.
    """
    q, k, v, beta, first = tensors
    B, L, H, _ = q.shape
    state_in, dstate_out = (x if y is None else y for x, y in ((first, state_in), (dstate, dstate_out)))
    wide, given = k.double(), {"q": q, "k": k, "beta": beta, "scale": D**-0.5}
    if norm:
        wide = normalised(wide)
        given |= {
            f"{name}_norm": (x.double().square().sum(-1) + 1e-6).rsqrt().float() for name, x in (("q", q), ("k", k))
        }
    given["n"] = chunk_matrices(wide, beta.double()).to(BF16).contiguous()
    parts = [{"segment": -(-L // (C * n)) * C, "segments": n} for n in segments]
    ends = [
        None if x is None else unwritten(B * n, H, D, D, dtype=torch.float32)
        for x, n in zip((first, dstate), segments, strict=True)
    ]
    out = {"o": unwritten(B, L, H, D)}
    kept = {"pseudo": unwritten(B, L, H, D), "states": unwritten(B * L // C, H, D, D)} if save else {}
    launch.chunk_scan_fwd(**given, **parts[0], **out, **kept, v=v, state_in=state_in, state_out=ends[0], values=values)
    out |= {"state": ends[0], **kept}
    if save:
        gradients = {
            "dq": unwritten(*q.shape),
            "dk": unwritten(*k.shape),
            "dv": unwritten(*v.shape),
            "dbeta": unwritten(B, L, H),
        }
        launch.chunk_scan_bwd(**given, **parts[1], **kept, **gradients, do=do, dstate_out=dstate_out, dstate_in=ends[1])
        out |= {**gradients, "dinitial": ends[1]}
    return out


def upstream(q, state, seed=9):
    g = torch.Generator().manual_seed(seed)
    do = torch.randn(q.shape, generator=g).to(DEVICE, BF16)
    return do, torch.randn(q.shape[0], q.shape[2], D, D, generator=g).to(DEVICE) if state else None


def reference(tensors, do, dstate, norm=False):
    """The same by name, in float64; pseudo is `strength` times E."""
    exact = leaves(*tensors, dtype=torch.float64)
    ones = torch.zeros(do.shape[0], do.shape[2], D, D, device=DEVICE) if dstate is None else dstate
    results = forward_and_gradients(exact_rule, exact, do, ones, qk_l2norm=norm)
    out = dict(zip(("o", "state", *NAMES), results, strict=False))
    _, k, v, beta, first = (None if x is None else x.detach() for x in exact)
    unit = normalised(k) if norm else k
    E, states = exact_errors_and_states(unit, v, beta, chunk_matrices(unit, beta), first)
    strength = beta * (k.square().sum(-1) + 1e-6).rsqrt() if norm else beta
    return out | {"pseudo": strength[..., None] * E, "states": states}


def agree(got, expected, conditions=None, skip=()):
    errors = {n: relative_error(x, expected[n]) for n, x in got.items() if x is not None and n not in skip}
    wrong = {n: f"{e:.2g}" for n, e in errors.items() if not e < BOUND * max(1.0, (conditions or {}).get(n, 1.0))}
    assert not wrong, f"{wrong}, of { ({n: f'{e:.2g}' for n, e in errors.items()}) }, conditions {conditions}"


@pytest.mark.gpu
@pytest.mark.parametrize("values", [64, 128])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("B, L, H", [(1, 64, 1), (2, 128, 3), (2, 1024, 2)])
def test_against_float64(hopper, B, L, H, norm, state, values):
    x = delta_rule_inputs(
        B, L, H, D, D, dtype=BF16, state=B if state else None, unit=not norm, seed=L, beta_max=1.0, device=DEVICE
    )
    do, dstate = upstream(x[0], state)
    got = by_the_kernels(x, do, dstate, norm=norm, values=values)
    nothing = () if state or L > C else ("states",)  # all zero, and so is the reference
    agree(got, reference(x, do, dstate, norm), skip=nothing)
    assert state or not got["states"].view(B, L // C, H, D, D)[:, 0].any()


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True])
def test_inference_saves_nothing_and_gives_the_same_o(hopper, norm):
    x = delta_rule_inputs(2, 512, 3, D, D, dtype=BF16, unit=not norm, seed=5, beta_max=1.0, device=DEVICE)
    do, _ = upstream(x[0], False)
    for values in (64, 128):
        got = by_the_kernels(x, do, None, norm=norm, values=values, save=False)
        agree({"o": got["o"]}, reference(x, do, None, norm))


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True])
def test_beta_from_zero_to_two(hopper, norm):
    """Zero, the last bits above and below 2^-40, small, and two; with a gradient of beta in each such row."""
    x = delta_rule_inputs(2, 1024, 3, D, D, dtype=BF16, state=2, unit=not norm, seed=1, beta_max=1.0, device=DEVICE)
    beta = x[3]
    beta[:, ::3], beta[:, 1::7], beta[:, 2::11], beta[:, 5::13] = 0, 2**-12, 2**-45, 2**-36
    beta[:, 100:200], beta[:, 256:300] = 0, 2
    do, dstate = upstream(x[0], True)
    got, exact = by_the_kernels(x, do, dstate, norm=norm), reference(x, do, dstate, norm)
    agree(got, exact)
    assert not got["dv"][beta == 0].any()
    for value in (0, 2**-45, 2**-36, 2**-12, 2):
        rows = beta == value
        assert rows.any()
        assert relative_error(got["dbeta"][rows], exact["dbeta"][rows]) < BOUND, value
        if value:
            # Small beside the rest of v's gradient, but a product of two of its own numbers.
            assert relative_error(got["dv"][rows], exact["dv"][rows]) < BOUND, value


@pytest.mark.gpu
@pytest.mark.parametrize("beta_max", [1.0, 2.0])
def test_identical_keys(hopper, beta_max):
    q, k, v, beta, first = delta_rule_inputs(
        2, 512, 3, D, D, dtype=BF16, state=2, seed=2, beta_max=beta_max, device=DEVICE
    )
    x = (q, k[:, :1].expand_as(k).contiguous(), v, beta, first)
    do, dstate = upstream(q, True)

    on_cpu = [t.cpu() for t in (*x, do.double(), dstate.double())]

    def results(*inputs):
        return forward_and_gradients(exact_rule, leaves(*inputs), *on_cpu[5:])

    conditions = dict(zip(("o", "state", *NAMES), sensitivity(results, on_cpu[:5]), strict=True))
    conditions |= {"pseudo": conditions["o"], "states": conditions["state"]}
    agree(by_the_kernels(x, do, dstate), reference(x, do, dstate), conditions)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True])
def test_split_sequences_forward_and_backward_apart(hopper, norm):
    """Five chunks in three parts, the last of one chunk; the other direction unsplit.

    What enters a part, state or gradient, comes from the rule in float64 on what lies left or right of it.
    """
    B, L, H, part, parts = 2, 320, 3, 128, 3
    x = delta_rule_inputs(B, L, H, D, D, dtype=BF16, state=B, unit=not norm, seed=3, beta_max=1.0, device=DEVICE)
    do, dstate = upstream(x[0], True)
    exact, wide = reference(x, do, dstate, norm), leaves(*x, dtype=torch.float64)
    entering, leaving = [wide[4].detach()], []
    for begin in range(part, L, part):
        left, right = ([t[:, at] for t in wide[:4]] for at in (slice(0, begin), slice(begin, None)))
        entering.append(exact_rule(*left, initial_state=wide[4], qk_l2norm=norm)[1].detach())
        inputs = leaves(*right, entering[-1])
        results = forward_and_gradients(exact_rule, inputs, do[:, begin:], dstate, qk_l2norm=norm)
        leaving.append(results[-1])
    state_in = torch.stack(entering, dim=1).flatten(0, 1).float()
    dstate_out = torch.stack([*leaving, dstate.double()], dim=1).flatten(0, 1).float()

    got = by_the_kernels(x, do, dstate, norm=norm, segments=(parts, 1), state_in=state_in)
    ends = got["state"].view(B, parts, H, D, D)
    for p in range(1, parts):
        assert relative_error(ends[:, p - 1], entering[p]) < BOUND
    agree(got | {"state": ends[:, -1]}, exact)

    got = by_the_kernels(x, do, dstate, norm=norm, segments=(1, parts), dstate_out=dstate_out)
    begins = got["dinitial"].view(B, parts, H, D, D)
    for p in range(1, parts):
        assert relative_error(begins[:, p], leaving[p - 1]) < BOUND
    agree(got | {"dinitial": begins[:, 0]}, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("norm, values", [(False, 128), (False, 64), (True, 64)])
def test_twenty_runs_agree_bit_for_bit(hopper, norm, values):
    """More programs than fit on the chip at a time, so that neighbours change from run to run."""
    x = delta_rule_inputs(4, 1024, 48, D, D, dtype=BF16, state=4, unit=not norm, seed=4, device=DEVICE)
    do, dstate = upstream(x[0], True)
    first = by_the_kernels(x, do, dstate, norm=norm, values=values)
    assert all(t.isfinite().all() for t in first.values())
    for _ in range(19):
        again = by_the_kernels(x, do, dstate, norm=norm, values=values)
        for name, t in first.items():
            assert torch.equal(t, again[name]), name
