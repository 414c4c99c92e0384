"""Chapter 5's teaching kernels: against float64, ugly shapes, every type; and that they compile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from dn_lib import cost, delta_rule
from dn_lib.forms.householder import ut_transform
from dn_lib.forms.linear_attention import recurrent_linear_attention
from dn_lib.kernels import ladder, rungs
from dn_lib.teaching.judge.kernels import compile_ahead
from dn_lib.teaching.judge.source import Plan
from dn_lib.testing import delta_rule_inputs, relative_error

tl = ladder.tl  # Triton is imported by dn_lib, which switches its interpreter on where there is no GPU
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative error: 24 bits and sums of some hundred terms; 8 bits for inputs, every intermediate and o.
BOUND = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
every_dtype = pytest.mark.parametrize("dtype", BOUND, ids=str)


def inputs(B, L, H, d_k, d_v, dtype=torch.float32, seed=0):
    return delta_rule_inputs(B, L, H, d_k, d_v, dtype=dtype, seed=seed, device=DEVICE)[:4]


def exact_linear(q, k, v):
    o, state = recurrent_linear_attention(*(x.transpose(1, 2).double() for x in (q, k, v)))
    return o.transpose(1, 2), state


def exact_delta(q, k, v, beta):
    tensors = (x.double() for x in (q, k, v, beta))
    return delta_rule(*tensors, backend="recurrent", output_final_state=True)


@pytest.mark.parametrize(("n", "block"), [(1, 16), (16, 16), (17, 16), (1000, 128)])
def test_scaled_add(n, block):
    x, y = torch.randn(2, n, device=DEVICE).unbind(0)
    torch.testing.assert_close(ladder.scaled_add(x, y, -1.5, block=block), -1.5 * x + y)


@given(m=st.integers(1, 40), k=st.integers(1, 40), n=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_matmul(m, k, n, seed):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(m, k, generator=g), torch.randn(k, n, generator=g)
    product = ladder.matmul(a.to(DEVICE), b.to(DEVICE)).cpu().double()
    scale = a.double().norm() * b.double().norm()  # a product may cancel
    assert (product - a.double() @ b.double()).norm() < 1e-6 * scale


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 33, 3, 20, 24), (1, 64, 2, 16, 40)])
def test_linear_attention(shape, dtype):
    q, k, v, _ = inputs(*shape, dtype)
    o, state = ladder.linear_attention(q, k, v, block_v=16)
    exact_o, exact_state = exact_linear(q, k, v)
    # At length 1 the output is one product q.k, which may cancel: measure it against |q| |S|.
    size = (exact_o.norm() + shape[3] ** -0.5 * q.double().norm() * exact_state.norm()).item()
    assert relative_error(o, exact_o, size) < BOUND[dtype]
    assert relative_error(state, exact_state) < BOUND[dtype]
    assert o.dtype == dtype and state.dtype == torch.float32


@pytest.mark.parametrize("method", ladder.INVERSES)
@pytest.mark.parametrize("L", [1, 16, 40])
def test_ut_transform(method, L):
    _, k, _, beta = inputs(2, L, 2, 24, 8)
    T = ladder.ut_transform(k, beta, method=method)
    for start in range(0, L, 16):
        rows = slice(start, min(start + 16, L))
        size = rows.stop - rows.start
        expected = ut_transform(*(x[:, rows].transpose(1, 2).double() for x in (k, beta)))
        # Doubling loses digits even on independent keys: that is what it is here to show.
        bound = 1e-3 if method == "doubling" else 1e-5
        assert relative_error(T[:, rows, :, :size].transpose(1, 2), expected) < bound
        assert (T[:, rows, :, size:] == 0).all()


def test_ut_transform_names_the_methods():
    with pytest.raises(ValueError, match=r"method must be one of .*'doubling'.*, got 'series'"):
        ladder.ut_transform(torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1), method="series")


@pytest.mark.parametrize(("method", "survives"), [("substitution", True), ("merging", True), ("doubling", False)])
def test_equal_keys_with_beta_two_separate_the_methods(method, survives):
    """Powers of A reach 1e28 in a chunk of 64, and the inverse is their small difference."""
    k = normalize(torch.ones(1, 64, 1, 16), dim=-1).to(DEVICE)
    beta = torch.full((1, 64, 1), 2.0, device=DEVICE)
    T = ladder.ut_transform(k, beta, method=method, chunk_size=64)[0, :, 0]
    error = relative_error(T, ut_transform(k[0, :, 0].double(), beta[0, :, 0].double()))
    assert (error < 1e-3) == survives


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 33, 3, 20, 24), (1, 48, 1, 32, 40)])
def test_delta_rule_in_steps(shape, dtype):
    q, k, v, beta = inputs(*shape, dtype)
    o, state, steps = ladder.delta_rule_in_steps(q, k, v, beta, block_v=16)
    exact_o, exact_state = exact_delta(q, k, v, beta)
    size = (exact_o.norm() + shape[3] ** -0.5 * q.double().norm() * exact_state.norm()).item()
    assert relative_error(o, exact_o, size) < BOUND[dtype]
    assert relative_error(state, exact_state) < BOUND[dtype]
    assert set(steps) == {"T", "W", "U", "new", "S"}
    assert (steps["S"][:, 0] == 0).all()


def test_delta_rule_in_steps_with_beta_zero_writes_nothing():
    q, k, v, beta = inputs(1, 20, 1, 16, 16)
    o, state, _ = ladder.delta_rule_in_steps(q, k, v, 0 * beta)
    assert (o == 0).all() and (state == 0).all()


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 33, 3, 20, 24), (1, 48, 1, 32, 40)])
def test_delta_rule_in_one(shape, dtype):
    q, k, v, beta = inputs(*shape, dtype)
    o, state = ladder.delta_rule_in_one(q, k, v, beta, block_v=16)
    exact_o, exact_state = exact_delta(q, k, v, beta)
    size = (exact_o.norm() + shape[3] ** -0.5 * q.double().norm() * exact_state.norm()).item()
    assert relative_error(o, exact_o, size) < BOUND[dtype]
    assert relative_error(state, exact_state) < BOUND[dtype]
    assert o.dtype == dtype and state.dtype == torch.float32


@pytest.mark.parametrize("method", ladder.INVERSES)
def test_one_kernel_and_four_agree_with_each_inverse_and_a_scale(method):
    q, k, v, beta = inputs(1, 40, 2, 16, 16)
    options = dict(scale=1.0, method=method, chunk_size=32)
    one, four = ladder.delta_rule_in_one(q, k, v, beta, **options), ladder.delta_rule_in_steps(q, k, v, beta, **options)
    bound = 1e-3 if method == "doubling" else 1e-5
    assert all(relative_error(x, y.double()) < bound for x, y in zip(one, four[:2], strict=True))


RUNGS = {
    "four": lambda *inputs, **options: ladder.delta_rule_in_steps(*inputs, **options)[:2],
    "three": rungs.delta_rule_in_three,
    "two": rungs.delta_rule_in_two,
    "one": ladder.delta_rule_in_one,
}


@every_dtype
@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 33, 3, 20, 24)], ids=str)
def test_every_rung_with_the_operators_inverse(rung, shape, dtype):
    """The inverse's dots are in float16 for bfloat16 inputs, in two halves for float16, in float32 for float32."""
    q, k, v, beta = inputs(*shape, dtype)
    o, state = RUNGS[rung](q, k, v, beta, method="blocks", block_v=16)
    exact_o, exact_state = exact_delta(q, k, v, beta)
    size = (exact_o.norm() + shape[3] ** -0.5 * q.double().norm() * exact_state.norm()).item()
    assert relative_error(o, exact_o, size) < BOUND[dtype]
    assert relative_error(state, exact_state) < BOUND[dtype]
    assert o.dtype == dtype and state.dtype == torch.float32 and o.shape == v.shape


@pytest.mark.parametrize("rung", ["three", "two"])
@pytest.mark.parametrize("method", ladder.METHODS)
def test_rungs_between_agree_with_four_kernels(rung, method):
    q, k, v, beta = inputs(1, 70, 2, 16, 40)
    options = dict(scale=0.3, method=method, chunk_size=32, block_v=16)
    bound = 1e-3 if method == "doubling" else 1e-5
    for x, y in zip(RUNGS[rung](q, k, v, beta, **options), RUNGS["four"](q, k, v, beta, **options), strict=True):
        assert relative_error(x, y.double()) < bound


@pytest.mark.parametrize("C", [16, 32, 64])
def test_the_operators_inverse_is_as_safe_here(C):
    """Identical keys and beta = 2, in bfloat16, whose T is made of float16 dots: entries of T are at most 4."""
    k = normalize(torch.ones(1, C, 1, 16), dim=-1).to(DEVICE, torch.bfloat16)
    beta = torch.full((1, C, 1), 2.0, device=DEVICE, dtype=torch.bfloat16)
    T = ladder.ut_transform(k, beta, method="blocks", chunk_size=C)[0, :, 0]
    exact = ut_transform(k[0, :, 0].double(), beta[0, :, 0].double())
    assert relative_error(T, exact) < BOUND[torch.bfloat16]


@pytest.mark.parametrize("rung", ["three", "two"])
def test_a_rung_writes_nothing_with_beta_zero_and_names_what_does_not_fit(rung):
    q, k, v, beta = inputs(1, 20, 1, 16, 16)
    assert all((x == 0).all() for x in RUNGS[rung](q, k, v, 0 * beta))
    with pytest.raises(ValueError, match=r"method must be one of .*'blocks'"):
        RUNGS[rung](q, k, v, beta, method="series")
    with pytest.raises(ValueError, match="block_v must be a power of two"):
        RUNGS[rung](q, k, v, beta, block_v=24)
    with pytest.raises(ValueError, match="beta must be"):
        RUNGS[rung](q, k, v, beta[:, :10])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is watched")
@pytest.mark.parametrize("block_v", [32, 16])
def test_each_rung_asks_for_the_bytes_that_are_counted(block_v):
    """Every access of every program, against the costs with which `experiments ladder` predicts. And one change a rung:
    a rung's launches are those of the rung before, but for what is merged."""
    from dn_lib.teaching.judge.trace import observe

    q, k, v, beta = inputs(1, 64, 2, 32, 32)
    shape = cost.Shape(1, 64, 2, 32, 32, C=16, block_v=block_v, element=4)
    models = {
        "four": cost.delta_rule_in_steps, "three": cost.delta_rule_in_three, "two": cost.delta_rule_in_two,
        "one": cost.fused,
    }  # fmt: skip
    names = {}
    for rung, model in models.items():
        _, seen = observe(RUNGS[rung], q, k, v, beta, method="blocks", block_v=block_v)
        assert seen.bytes() == sum(c.requested for c in model(shape)), rung
        names[rung] = [launch.kernel for launch in seen.launches]
    assert names["three"] == [*names["four"][:2], "walk_wu_kernel"]
    assert names["two"] == [names["three"][0], "walk_kernel"] and names["one"] == ["one_kernel"]


def test_delta_rule_in_one_with_beta_zero_writes_nothing():
    q, k, v, beta = inputs(1, 20, 1, 16, 16)
    assert all((x == 0).all() for x in ladder.delta_rule_in_one(q, k, v, 0 * beta))


def test_round_to_tf32_keeps_eleven_bits():
    x = torch.randn(1000)
    rounded = ladder.round_to_tf32(x)
    assert (rounded.view(torch.int32) & 0x1FFF == 0).all()
    assert ((rounded - x).abs() <= 2.0**-11 * x.abs()).all()
    assert torch.equal(ladder.round_to_tf32(rounded), rounded) and not torch.equal(rounded, x)


@ladder.triton.jit
def default_product(a_ptr, b_ptr, o_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(o_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@pytest.mark.gpu
def test_round_to_tf32_is_what_a_gpu_does():
    a, b = torch.randn(16, 16, device="cuda"), torch.eye(16, device="cuda")
    out = torch.empty_like(a)
    default_product[(1,)](a, b, out, N=16)
    # An H200 cuts the low bits off (`error_microscope.json`); another generation may round.
    assert ((out - ladder.round_to_tf32(a)).abs() <= 2.0**-10 * a.abs()).all()
    assert not torch.equal(out, a)


# --- ahead of time ------------------------------------------------------------------------------------------

TYPES = {torch.float32: "tl.float32", torch.bfloat16: "tl.bfloat16"}


def plans(dtype, d=32, C=32):
    """Every kernel of the ladder with arguments of the right types."""
    x, s, beta = torch.empty(1, 64, 1, d, dtype=dtype), torch.empty(1, 1, d, d), torch.empty(1, 64, 1, dtype=dtype)
    sizes = {"DOT": TYPES[dtype], "C": C, "BK": d}
    wide = {**sizes, "BV": d}
    L = (64, 1, d, d)
    return {
        "scaled_add_kernel": ((x, x, x, 0.5, 64), {"BLOCK": 64}),
        "matmul_kernel": ((x, x, x, 64, 64, 64), {"DOT": TYPES[dtype], "BLOCK": 32}),
        "linear_attention_kernel": ((x, x, x, x, s, 0.5, *L), wide),
        "wu_kernel": ((x, x, x, x, x, *L), wide),
        "state_kernel": ((x, x, x, x, s, s, *L), wide),
        "output_kernel": ((x, x, x, s, x, 0.5, *L), wide),
        "one_kernel": ((x, x, x, beta, x, s, 0.5, *L), {"INVERSE": "ladder.inverse_by_merging", **wide}),
        "walk_wu_kernel": ((x, x, x, x, x, s, 0.5, *L), wide),
        "walk_kernel": ((x, x, x, x, x, s, 0.5, *L), wide),
        "one_kernel blocks": ((x, x, x, beta, x, s, 0.5, *L), {"INVERSE": "ladder.inverse_by_blocks_half", **wide}),
    } | {
        f"ut_kernel {name}": ((x, beta, x, 64, 1, d), {"INVERSE": f"ladder.{inverse.fn.__name__}", **sizes})
        for name, inverse in (*ladder.INVERSES.items(), ("blocks", ladder.inverse_by_blocks_half))
    }


@pytest.mark.parametrize("name", plans(torch.bfloat16))
def test_kernel_compiles_for_a_gpu_that_is_not_there(name):
    arguments, constants = plans(torch.bfloat16)[name]
    kernel = name.split()[0]
    used = compile_ahead(
        getattr(rungs if kernel.startswith("walk") else ladder, kernel), Plan(arguments, (), (1,), constants)
    )
    assert used["warps"] == 4 and (used["shared"] > 0 or name == "scaled_add_kernel")


@pytest.mark.parametrize("d", [64, 128])
def test_one_kernel_compiles_at_the_sizes_that_are_measured(d):
    arguments, constants = plans(torch.bfloat16, d, C=64)["one_kernel"]
    used = compile_ahead(ladder.one_kernel, Plan(arguments, (), (1,), {**constants, "BV": 64}))
    assert 0 < used["shared"] <= 227 * 1024


def test_the_walk_compiles_for_an_older_gpu_and_in_float32():
    for dtype, arch in ((torch.bfloat16, 80), (torch.float32, 90)):
        arguments, constants = plans(dtype)["state_kernel"]
        assert compile_ahead(ladder.state_kernel, Plan(arguments, (), (1,), constants), arch=arch)["shared"] > 0
