"""`gated_delta_rule` and `linear_attention`: one function whatever the backend, and every bad input named."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from dn_lib import checked, delta_rule, gated_delta_rule, linear_attention, ops
from dn_lib.ops.gated import family
from dn_lib.teaching.judge.trace import observe
from dn_lib.testing import (
    delta_rule_inputs,
    delta_rule_reference,
    forward_and_gradients,
    gated_delta_rule_reference,
    gated_linear_attention_reference,
    leaves,
    linear_attention_reference,
    log_gates,
    output_gradients,
    relative_error,
)

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
PYTORCH = ("recurrent", "parallel", "chunkwise")
needs_triton = pytest.mark.skipif(ops.triton_problem(torch.device("cpu")) is not None, reason="needs the interpreter")
EVERY = (*PYTORCH, pytest.param("triton", marks=needs_triton))
every_backend = pytest.mark.parametrize("backend", EVERY)
# float64: 4500 eps, float32: 84 eps, for sums of up to some hundred terms, each rounded a few times.
BOUND = {F64: 1e-12, F32: 1e-5}
GATES = ("token", "head", "channel", "none")
CU = torch.tensor([0, 0, 17, 18, 18, 40, 40], dtype=torch.int32)


def sample(gates, B=2, L=40, H=2, H_v=4, d_k=6, d_v=9, *, state=None, seed=0, dtype=F64, edges=False, unit=True):
    """q, k, v, beta, g and a state: H heads of q and k, H_v of all else; g None, or of one of its three shapes."""
    q, k = delta_rule_inputs(B, L, H, d_k, d_v, seed=seed, dtype=dtype, unit=unit)[:2]
    _, _, v, beta, first = delta_rule_inputs(B, L, H_v, d_k, d_v, seed=seed + 1, dtype=dtype, state=state)
    shape = {"token": (B, L, H_v), "head": (H_v,), "channel": (B, L, H_v, d_k)}.get(gates)
    g = None if shape is None else log_gates(*shape, seed=seed, dtype=dtype, edges=edges)
    return q, k, v, beta, g, first


def reference(q, k, v, beta, g, *, initial_state=None, **options):
    """By the recurrences of `dn_lib.testing`, which know neither groups nor fixed gates."""
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    if g is not None and g.ndim == 1:
        g = g.expand(v.shape[:3])
    options["initial_state"] = initial_state
    if beta is None:
        if g is None:
            return linear_attention_reference(q, k, v, **options)
        return gated_linear_attention_reference(q, k, v, g, **options)
    return gated_delta_rule_reference(q, k, v, beta, g, **options)


def operator(q, k, v, beta, g, **options):
    return linear_attention(q, k, v, g, **options) if beta is None else gated_delta_rule(q, k, v, beta, g, **options)


CASES = [(erase, gates) for erase in (True, False) for gates in GATES if gates != "none" or not erase]
every_case = pytest.mark.parametrize("erase, gates", CASES, ids=[f"{'delta' * e or 'linear'}-{g}" for e, g in CASES])


def compare(inputs, dtype, backend, **options):
    """Values and the gradient of every input against those of the recurrence in float64."""
    q, v, first = inputs[0], inputs[2], inputs[5]
    states = v.shape[0] if options.get("cu_seqlens") is None else options["cu_seqlens"].numel() - 1
    do, dstate = output_gradients(*v.shape[:3], q.shape[3], v.shape[3], seed=9, state=states)
    given = [i for i, x in enumerate(inputs) if x is not None]

    def spread(function):
        def run(*tensors, **rest):
            full = dict(zip(given, tensors, strict=True))
            q, k, v, beta, g = (full.get(i) for i in range(5))
            return function(q, k, v, beta, g, initial_state=full.get(5), **rest)

        return lambda *tensors, initial_state=None, **rest: run(
            *tensors, *(() if initial_state is None else (initial_state,)), **rest
        )

    tensors = [inputs[i] for i in given] + ([None] if first is None else [])
    expected = forward_and_gradients(spread(reference), leaves(*tensors, dtype=F64), do, dstate, **options)
    got = forward_and_gradients(
        spread(operator), leaves(*tensors, dtype=dtype), do, dstate, **options, output_final_state=True,
        chunk_size=16, backend=backend,
    )  # fmt: skip
    names = ["o", "state", *(("q", "k", "v", "beta", "g", "state")[i] for i in given)]
    for name, a, b in zip(names, got, expected, strict=True):
        # A gate's gradient sums differences of products as large as those of v and k, which may cancel.
        assert relative_error(a, b) < BOUND[dtype], (name, relative_error(a, b))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@every_backend
@every_case
def test_every_backend_and_option(erase, gates, backend, packed, norm):
    """Two value heads for each key head, a scale of our own, both states, packed sequences, some of them empty."""
    cu = CU if packed else None
    inputs = list(sample(gates, *((1,) if packed else (2,)), state=6 if packed else 2, seed=3, unit=not norm))
    if not erase:
        inputs[3] = None
    if gates == "channel" and erase and backend == "triton":
        with pytest.raises(ValueError, match=r"g must be \[B, L, H_v\] or \[H_v\] for backend 'triton', got one for"):
            operator(*(None if x is None else x.float() for x in inputs[:5]), backend=backend)
        return
    dtype = F32 if backend == "triton" else F64
    compare(inputs, dtype, backend, scale=0.7, cu_seqlens=cu, qk_l2norm=norm)


@pytest.mark.parametrize("gates", ["token", "channel"])
@pytest.mark.parametrize("backend", PYTORCH)
def test_gates_of_exactly_zero_and_one(backend, gates):
    """A third each; 70 tokens, so that chunks of 64 meet one that a reset has cut."""
    *x, g, S = sample(gates, 1, 70, state=1, edges=True, seed=5)
    for beta in (x[3], None):
        exact, last, size = reference(*x[:3], beta, g, initial_state=S)
        for dtype in (F64, F32):
            narrow = [None if t is None else t.to(dtype) for t in (*x[:3], beta, g, S)]
            o, state = operator(*narrow[:5], initial_state=narrow[5], output_final_state=True, backend=backend)
            assert relative_error(o, exact, size) < BOUND[dtype]
            assert relative_error(state, last, S.norm().item()) < BOUND[dtype]


@needs_triton
@pytest.mark.parametrize("erase", [True, False])
def test_gates_of_exactly_zero_and_one_through_the_kernels(erase):
    *x, g, S = sample("token", 1, 40, state=1, edges=True, seed=6)
    beta = x[3] if erase else None
    exact, last, size = reference(*x[:3], beta, g, initial_state=S)
    narrow = leaves(*x[:3], beta, g, S, dtype=F32)
    o, state = operator(*narrow[:5], initial_state=narrow[5], output_final_state=True, backend="triton", chunk_size=16)
    assert relative_error(o, exact, size) < BOUND[F32] and relative_error(state, last, S.norm().item()) < BOUND[F32]
    gradients = torch.autograd.grad(o.square().sum() + state.sum(), [t for t in narrow if t is not None])
    assert all(dx.isfinite().all() for dx in gradients)


@every_backend
def test_gates_of_one_are_the_delta_rule(backend):
    q, k, v, beta, S = delta_rule_inputs(2, 40, 2, 6, 9, state=2)
    options = {"initial_state": S, "output_final_state": True, "backend": backend, "chunk_size": 16}
    expected = delta_rule(q, k, v, beta, **options)
    for g in (torch.zeros(2), torch.zeros_like(beta)):
        for a, b in zip(gated_delta_rule(q, k, v, beta, g, **options), expected, strict=True):
            assert relative_error(a, b.double()) < BOUND[F32]


@needs_triton
def test_the_delta_rule_with_groups_of_value_heads():
    """What fla's signature asks of the family without gates."""
    q, k, v, beta, _, S = sample("none", state=2, dtype=F32)
    wide = [x.repeat_interleave(2, 2) for x in (q, k)]
    exact, last, _ = delta_rule_reference(*wide, v, beta, initial_state=S)
    for backend in ("recurrent", "chunkwise", "triton"):
        o, state = family(q, k, v, beta, None, None, S, True, None, False, None, backend)
        assert relative_error(o, exact) < BOUND[F32] and relative_error(state, last) < BOUND[F32]


@pytest.mark.parametrize("shape", [(2, 0, 2, 4), (0, 5, 2, 4), (2, 5, 0, 0), (0, 0, 0, 0)], ids=str)
@every_backend
def test_nothing_to_do(backend, shape):
    """No tokens: the state passes through, and so does its gradient.  No sequences, no heads: empty tensors."""
    B, L, H, H_v = shape
    for erase in (True, False):
        inputs = list(sample("token", B, L, H, H_v, state=B, dtype=F32))
        inputs = [*leaves(*inputs[:3]), leaves(inputs[3])[0] if erase else None, *leaves(*inputs[4:])]
        o, last = operator(*inputs[:5], initial_state=inputs[5], output_final_state=True, backend=backend)
        assert o.shape == (B, L, H_v, 9) and last.shape == (B, H_v, 6, 9)
        (gradient,) = torch.autograd.grad(o.sum() + last.sum(), inputs[5], allow_unused=True)
        if L == 0:
            assert torch.equal(last, inputs[5]) and torch.equal(gradient, torch.ones_like(last))


@every_backend
@every_case
def test_token_by_token_equals_the_whole(erase, gates, backend):
    """The state carried from call to call; short calls without a gradient take the recurrent kernel, in Triton."""
    if gates == "channel" and erase and backend == "triton":
        backend = "auto"
    dtype = F32 if backend == "triton" else F64
    q, k, v, beta, g, S = sample(gates, 2, 21, dtype=dtype, state=2, seed=2)
    beta = beta if erase else None
    options = {"qk_l2norm": True, "scale": 0.4, "output_final_state": True, "backend": backend}
    whole, end, _ = reference(q, k, v, beta, g, initial_state=S, scale=0.4, qk_l2norm=True)
    outputs, state, edges = [], S, [0, 17, *range(18, 22)]
    for a, b in itertools.pairwise(edges):
        part = [x if x is None or x.ndim == 1 else x[:, a:b] for x in (q, k, v, beta, g)]
        o, state = operator(*part, initial_state=state, **options)
        outputs.append(o)
    assert relative_error(torch.cat(outputs, 1), whole) < BOUND[dtype]
    assert relative_error(state, end) < BOUND[dtype]


@needs_triton
@pytest.mark.parametrize("erase", [True, False])
@pytest.mark.parametrize("gates", ["token", "head"])
def test_short_calls_take_the_recurrence(erase, gates):
    q, k, v, beta, g, S = sample(gates, 1, 9, dtype=F32, state=1)
    inputs = q, k, v, beta if erase else None, g
    run = {"initial_state": S, "output_final_state": True, "backend": "triton"}
    (o, state), trace = observe(operator, *inputs, **run)
    assert [launch.kernel for launch in trace.launches] == ["recurrent"]
    exact, last, _ = reference(*inputs, initial_state=S)
    assert relative_error(o, exact) < BOUND[F32] and relative_error(state, last) < BOUND[F32]
    _, trace = observe(operator, *leaves(*inputs), **run)
    assert "recurrent" not in [launch.kernel for launch in trace.launches]


@every_backend
def test_dtypes_are_kept(backend):
    """o in v's dtype, the state in float32, every gradient in the dtype of its tensor."""
    q, k, v, beta, g, S = sample("token", 1, 20, d_k=16, d_v=16, dtype=BF16, state=1)
    x = [*leaves(q, k, v), *leaves(beta, dtype=F32), *leaves(g, dtype=F32), *leaves(S, dtype=torch.float16)]
    o, last = gated_delta_rule(*x[:5], initial_state=x[5], output_final_state=True, backend=backend)
    assert o.dtype == BF16 and last.dtype == F32
    gradients = torch.autograd.grad(o.float().sum() + last.sum(), x)
    assert [dx.dtype for dx in gradients] == [BF16, BF16, BF16, F32, F32, torch.float16]
    exact, _, size = reference(*x[:5], initial_state=x[5])
    # 8 bits of mantissa; Triton's interpreter cuts where a GPU rounds, which about doubles the error.
    assert relative_error(o, exact, size) < (3e-2 if backend == "triton" else 8e-3)
    wide = leaves(g, dtype=F64)[0]
    (dg,) = torch.autograd.grad(gated_delta_rule(*x[:4], wide, backend=backend)[0].float().sum(), wide)
    assert dg.dtype == F64


@pytest.mark.parametrize("backend", PYTORCH)
@pytest.mark.parametrize("gates", ["token", "channel"])
def test_float64_and_second_derivative(backend, gates):
    inputs = leaves(*sample(gates, 1, 5, 1, 2, 3, 2)[:5])
    # Away from the edges of what is allowed, over which a difference quotient would step.
    inputs[4] = (-torch.rand_like(inputs[4]) - 0.1).requires_grad_()
    run = lambda *x: gated_delta_rule(*x, backend=backend, qk_l2norm=True)[0]  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs) and torch.autograd.gradgradcheck(run, inputs)


@needs_triton
def test_double_backward_is_refused():
    for gates, erase, name in (("token", True, "gated_delta_rule"), ("token", False, "linear_attention")):
        q, k, v, beta, g, _ = sample(gates, 1, 17, dtype=F32)
        x = leaves(q, k, v, beta, g) if erase else [*leaves(q, k, v), None, *leaves(g)]
        given = [t for t in x if t is not None]
        first = torch.autograd.grad(operator(*x, backend="triton")[0].square().sum(), given, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{name} with backend 'triton' has no second derivative"):
            torch.autograd.grad(first[0].sum(), given)


def test_transforms_go_through_the_forms():
    """vmap over g, whose values cannot be read then, and a tangent of g."""
    q, k, v, beta, g, _ = sample("token", 1, 8)
    several = torch.stack([g, 2 * g, torch.zeros_like(g)])
    together = torch.vmap(lambda g: gated_delta_rule(q, k, v, beta, g)[0])(several)
    assert relative_error(together[1], gated_delta_rule(q, k, v, beta, several[1])[0]) < BOUND[F64]
    slow = torch.full_like(g, -0.5)
    (ours,) = torch.autograd.grad(linear_attention(q, k, v, slow.requires_grad_())[0].sum(), slow)
    functional = torch.func.grad(lambda g: linear_attention(q, k, v, g)[0].sum())(slow.detach())
    assert relative_error(functional, ours) < BOUND[F64]
    if ops.triton_problem(q.device) is None:
        narrow = [x.float() for x in (q, k, v, beta)]
        with pytest.raises(RuntimeError, match="backend 'triton' does not support"):
            torch.func.grad(lambda g: gated_delta_rule(*narrow, g, backend="triton")[0].sum())(g.float())


@pytest.mark.parametrize("backend", ["chunkwise", pytest.param("triton", marks=needs_triton)])
def test_autocast_takes_half_precision_operands(backend):
    q, k, v, beta, g, S = sample("token", 1, 20, d_k=16, d_v=8, dtype=F32, state=1)
    run = {"initial_state": S, "output_final_state": True, "backend": backend}
    expected = gated_delta_rule(*(x.to(BF16) for x in (q, k, v)), beta, g, **run)
    with torch.autocast("cpu", dtype=BF16):
        o, state = gated_delta_rule(q, k, v, beta, g, **run)
    assert o.dtype == BF16 and state.dtype == F32
    assert torch.equal(o, expected[0]) and torch.equal(state, expected[1])


# --- torch.library and torch.compile ------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("erase, norm, state, save", [(True, False, True, True), (False, True, False, True)])
def test_opcheck_forward(erase, norm, state, save):
    q, k, v, beta, g, S = sample("token", 1, 20, 1, 2, 5, 16, dtype=F32, state=1 if state else None)
    q, k, v, beta, g, S = leaves(q, k, v, beta if erase else None, g, S)
    torch.library.opcheck(torch.ops.dn_lib.delta_rule, (q, k, v, beta, g, S, None, 0.3, norm, 16, save))


@needs_triton
@pytest.mark.parametrize("erase, gate", [(True, True), (False, True), (False, False)])
def test_opcheck_backward(erase, gate):
    q, k, v, beta, g, S = sample("token" if gate else "none", 1, 20, 1, 2, 5, 16, dtype=F32, state=1)
    beta = beta if erase else None
    o, last, *saved = torch.ops.dn_lib.delta_rule(q, k, v, beta, g, S, None, 0.3, False, 16, True)
    do = torch.randn_like(o).transpose(1, 2).contiguous().transpose(1, 2)  # strides of a gradient may be any
    kept = None if erase else v
    arguments = (q, k, kept, beta, S, None, last, saved, do, torch.randn_like(last), 0.3, 16)
    torch.library.opcheck(torch.ops.dn_lib.delta_rule_backward, arguments)


@needs_triton
@every_case
def test_compiled_equals_eager(erase, gates):
    """Kernels where there are any; the delta rule with a gate for each channel goes through the forms."""
    torch._dynamo.reset()
    backend = "chunkwise" if gates == "channel" and erase else "triton"
    q, k, v, beta, g, S = sample(gates, 1, 24, 1, 2, 5, 16, dtype=F32, state=1)
    x = [t for t in (q, k, v, beta if erase else None, g, S) if t is not None]

    def run(*x):
        *inputs, first = x
        q, k, v, *rest = inputs
        beta = rest.pop(0) if erase else None
        options = {"initial_state": first, "output_final_state": True, "qk_l2norm": True, "backend": backend}
        return operator(q, k, v, beta, rest.pop() if rest else None, **options)

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        y = leaves(*x)
        o, state = function(*y)
        results.append([o, state, *torch.autograd.grad((o.sin().sum() + state.sum()), y)])
    for a, b in zip(*results, strict=True):
        # The kernels get the same operands; a compiler may reorder the forms' sums.
        assert torch.equal(a, b) if backend == "triton" else relative_error(a, b.double()) < BOUND[F32]


@needs_triton
def test_compiled_with_packed_sequences_and_autocast():
    torch._dynamo.reset()
    cu = torch.tensor([0, 9, 9, 24], dtype=torch.int32)

    def run(q, k, v, beta, g):
        with torch.autocast("cpu", dtype=BF16):
            return gated_delta_rule(q, k, v, beta, g, cu_seqlens=cu, output_final_state=True, backend="triton")

    x = sample("token", 1, 24, 1, 2, 5, 16, dtype=F32)[:5]
    for a, b in zip(run(*x), torch.compile(run, fullgraph=True, backend="aot_eager")(*x), strict=True):
        assert a.dtype == b.dtype and torch.isfinite(a).all()
        # Uncompiled and without a gradient, a short call takes the recurrence, which rounds less: 8 bits.
        assert relative_error(a, b.double()) < 3e-2


# --- Bad input ------------------------------------------------------------------------------------------------


def sound():
    q, k, v, beta, g, S = sample("token", 2, 6, 3, 6, 4, 5, dtype=F32, state=2)
    return {"q": q, "k": k, "v": v, "beta": beta, "g": g, "initial_state": S}


HEADS = (2, 6, 6)
BAD = {
    "g-none": ({"g": None}, TypeError, r"g must be a tensor [B, L, H_v], [H_v] or [B, L, H_v, d_k], got NoneType"),
    "g-number": ({"g": -1.0}, TypeError, "g must be a tensor [B, L, H_v]"),
    "g-key-heads": ({"g": (2, 6, 3)}, ValueError, "g must be [B, L, H_v] = [2, 6, 6], got [2, 6, 3]"),
    "g-heads": ({"g": (3,)}, ValueError, "g must be [H_v] = [6], got [3]"),
    "g-scalar": ({"g": ()}, ValueError, "g must be [B, L, H_v] = [2, 6, 6], [H_v] = [6] or [B, L, H_v, d_k] ="),
    "g-matrix": ({"g": (6, 6)}, ValueError, "g must be [B, L, H_v] = [2, 6, 6], [H_v] = [6] or"),
    "g-channels": ({"g": (2, 6, 6, 5)}, ValueError, "g must be [B, L, H_v, d_k] = [2, 6, 6, 4], got [2, 6, 6, 5]"),
    "g-integers": ({"g": torch.zeros(HEADS, dtype=torch.int)}, TypeError, "g must be floating point, got torch.int32"),
    "g-device": ({"g": torch.zeros(HEADS, device="meta")}, ValueError, "g must be on cpu like q, got meta"),
    "beta-none": ({"beta": None}, TypeError, "beta must be a tensor [B, L, H_v], got NoneType"),
    "beta-key-heads": ({"beta": (2, 6, 3)}, ValueError, "beta must be [B, L, H_v] = [2, 6, 6], got [2, 6, 3]"),
    "no-multiple": (
        {"v": (2, 6, 4, 5)},
        ValueError,
        "v must have a multiple of the H = 3 heads of k, got [2, 6, 4, 5]",
    ),
    "fewer": ({"v": (2, 6, 2, 5)}, ValueError, "v must have a multiple of the H = 3 heads of k, got [2, 6, 2, 5]"),
    "state": ({"initial_state": (2, 3, 4, 5)}, ValueError, "initial_state must be [N, H_v, d_k, d_v] = [2, 6, 4, 5]"),
    "positive": ({"g": torch.full(HEADS, 0.25)}, ValueError, "g must be at most 0, the logarithm of a gate in [0, 1]"),
    "positive-head": ({"g": torch.ones(6)}, ValueError, "g must be at most 0, .* 1 at [h] = [0]"),
    "flag": ({"qk_l2norm": 1}, TypeError, "qk_l2norm must be True or False, got 1"),
    "chunk": ({"chunk_size": 0}, ValueError, "chunk_size must be a positive integer or None, got 0"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of auto, recurrent"),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD)
def test_bad_input_is_named(change, error, message):
    arguments = sound() | {n: torch.zeros(x) if isinstance(x, tuple) else x for n, x in change.items()}
    pattern = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(error, match=pattern):
        gated_delta_rule(**arguments)
    if "beta" in change or ("g" in change and change["g"] is None):
        return
    del arguments["beta"]
    with pytest.raises(error, match=pattern):
        linear_attention(**arguments)


def test_heads_before_time_is_suspected():
    for name, shape in (("g", (2, 3, 8)), ("v", (2, 3, 8, 5))):
        x = sample("token", 2, 8, 3, 3, 4, 5, dtype=F32)
        good = dict(zip(("q", "k", "v", "beta", "g"), x[:5], strict=True))
        with pytest.raises(ValueError, match=rf"{name} must .* \(heads before time\?\)"):
            gated_delta_rule(**good | {name: torch.zeros(shape)})


def test_one_positive_gate_is_found():
    """On a CPU always, where it costs no wait; within `checked()` everywhere."""
    arguments = sound()
    arguments["g"][1, 4, 2] = 0.5
    for context in (None, checked()):
        message = r"g must be at most 0, the logarithm of a gate in \[0, 1\]: 0.5 at \[b, l, h\] = \[1, 4, 2\]"
        with pytest.raises(ValueError, match=message):
            if context is None:
                gated_delta_rule(**arguments)
            else:
                with context:
                    gated_delta_rule(**arguments)
    by_channel = torch.zeros(2, 6, 6, 4)
    by_channel[1, 5, 0, 3] = 2.0
    with pytest.raises(ValueError, match=r"2 at \[b, l, h, channel\] = \[1, 5, 0, 3\]"):
        gated_delta_rule(**arguments | {"g": by_channel})


def test_nan_is_found_within_checked_alone():
    """A model that has diverged shows NaN in its loss, on a CPU as on a GPU."""
    arguments = sound()
    arguments["g"][0, 3, 1] = float("nan")
    assert gated_delta_rule(**arguments)[0][0, 3:, 1].isnan().all()
    with checked(), pytest.raises(ValueError, match=r"g must be at most 0, .* nan at \[b, l, h\] = \[0, 3, 1\]"):
        gated_delta_rule(**arguments)


def test_checked_reads_the_rest():
    arguments = sound()
    with checked():
        gated_delta_rule(**arguments)
        linear_attention(*(arguments[n] for n in ("q", "k", "v", "g")))
        linear_attention(*(arguments[n] for n in ("q", "k", "v")))
        # Without erasure no key is too long.
        linear_attention(arguments["q"], 9 * arguments["k"], arguments["v"], arguments["g"])
        with pytest.raises(ValueError, match=r"k must satisfy beta \|k\|\^2 <= 2"):
            gated_delta_rule(**arguments | {"k": 9 * arguments["k"]})
        with pytest.raises(ValueError, match="v must be finite"):
            linear_attention(arguments["q"], arguments["k"], arguments["v"] * float("nan"), arguments["g"])


@needs_triton
def test_what_the_kernels_cannot_take_is_named():
    arguments = sound()
    with pytest.raises(ValueError, match="chunk_size must be 16, 32, 64 or None for backend 'triton', got 8"):
        gated_delta_rule(**arguments, chunk_size=8, backend="triton")
    wide = {n: x.double() for n, x in arguments.items()}
    with pytest.raises(TypeError, match="q must be float32, bfloat16 or float16 for backend 'triton'"):
        gated_delta_rule(**wide, backend="triton")


@needs_triton
def test_auto_takes_the_forms_for_a_gate_per_channel(auto_takes):
    """What happens on a GPU, where "auto" is Triton."""
    auto_takes("triton")
    q, k, v, beta, g, _ = sample("channel", 1, 20)
    o, _ = gated_delta_rule(q, k, v, beta, g)
    assert relative_error(o, reference(q, k, v, beta, g)[0]) < BOUND[F64]
