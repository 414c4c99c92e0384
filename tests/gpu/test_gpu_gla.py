"""Linear attention with a gate per key channel compiled, on a GPU, against float64."""

from __future__ import annotations

import functools
import importlib.util
import math

import pytest
import torch

import dn_lib
from dn_lib.kernels.gla.plan import resolve
from dn_lib.testing import (
    forward_and_gradients,
    gated_inputs,
    leaves,
    linear_attention_inputs,
    offsets,
    output_gradients,
    poisoned,
    relative_error,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
BOUND = {BF16: 8e-3, F16: 1.2e-3, F32: 1e-5}  # as in test_gpu.py, which derives them
every_dtype = pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=["bfloat16", "float16", "float32"])
inputs_of = functools.partial(gated_inputs, functools.partial(linear_attention_inputs, unit=True), channels=True)


@pytest.fixture(autouse=True)
def clean():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
    torch.cuda.empty_cache()


def sample(B, L, H, K, V, *, group=1, state=None, gates=None, **options):
    """q, k of H heads; v, g and the state of group H heads.  gates: the dtype of g, that of q if None."""
    q, k, v, g, first = inputs_of(B, L, H * group, K, V, state=state, device="cuda", **options)
    return [q[:, :, ::group].contiguous(), k[:, :, ::group].contiguous(), v, g.to(gates or g.dtype)], first


def run(*x, initial_state=None, backend="triton", **options):
    return dn_lib.linear_attention(
        *x, initial_state=initial_state, output_final_state=True, backend=backend, **options
    )  # fmt: skip


def compare(sizes, dtype, *, lengths=None, state=False, seed=0, chunk_size=None, **options):
    """Values and every gradient; the exact ones by the chunkwise form, which the suite holds to the recurrence."""
    N = sizes[0] if lengths is None else len(lengths)
    inputs, first = sample(*sizes, dtype=dtype, state=N if state else None, seed=seed, **options)
    cu = None if lengths is None else offsets(lengths, device="cuda")
    v = inputs[2]
    do, dstate = output_gradients(*v.shape[:3], sizes[3], sizes[4], seed=seed, state=N, device="cuda")
    do, dstate = do.to(dtype), dstate.float()
    wide = leaves(*inputs, first, dtype=torch.float64)
    form = functools.partial(run, backend="chunkwise", cu_seqlens=cu)
    exact = forward_and_gradients(form, wide, do.double(), dstate.double())
    kernels = functools.partial(run, backend="triton", cu_seqlens=cu, chunk_size=chunk_size)
    with poisoned():
        got = forward_and_gradients(kernels, leaves(*inputs, first), do, dstate)
    errors = [relative_error(x, y) for x, y in zip(got, exact, strict=True)]
    assert max(errors) < BOUND[dtype], (sizes, errors)


@every_dtype
@pytest.mark.parametrize("K, V", [(64, 64), (128, 128), (256, 256), (64, 128), (40, 96), (16, 200)])
def test_heads_of_every_size(dtype, K, V):
    compare((2, 150, 2, K, V), dtype, state=True, seed=K)
    compare((1, 512, 1, K, V), dtype, group=2, gates=F32, seed=K + 1)


@every_dtype
@pytest.mark.parametrize("chunk_size", [16, 32, 64])
def test_chunks_of_every_size(dtype, chunk_size):
    compare((2, 200, 2, 128, 64), dtype, state=True, chunk_size=chunk_size, edges=True, seed=chunk_size)


@every_dtype
@pytest.mark.parametrize("group", [1, 3])
def test_packed_sequences(dtype, group):
    compare((1, 300, 2, 64, 64), dtype, group=group, state=True, lengths=[1, 0, 130, 64, 105], seed=3)


@pytest.mark.parametrize("seed", range(20))
def test_random_calls(seed):
    g = torch.Generator().manual_seed(seed)
    pick = lambda *values: values[int(torch.randint(len(values), (), generator=g))]  # noqa: E731
    sizes = (
        pick(1, 2, 3),
        pick(1, 15, 65, 129, 700),
        pick(1, 2, 5),
        pick(1, 24, 64, 100, 128),
        pick(1, 40, 64, 128, 192),
    )
    dtype = pick(BF16, F16, F32)
    options = {"group": pick(1, 2), "state": pick(True, False), "edges": pick(True, False), "gates": pick(None, F32)}
    compare(sizes, dtype, chunk_size=pick(None, 16, 32, 64), seed=seed, **options)


@every_dtype
@pytest.mark.parametrize("g", [float("-inf"), -1e38, -200.0, -30.0, -1e-4])
def test_strong_decay_stays_finite(dtype, g):
    inputs, first = sample(1, 200, 2, 64, 64, state=1, dtype=dtype)
    inputs[3] = torch.full_like(inputs[3], max(g, torch.finfo(dtype).min) if math.isfinite(g) else g)
    o, state = run(*inputs, initial_state=first, backend="triton")
    exact, last = run(*(x.double() for x in inputs), initial_state=first.double(), backend="chunkwise")
    assert relative_error(o, exact) < BOUND[dtype] and relative_error(state, last) < BOUND[dtype]
    given = leaves(*inputs, first)
    o, state = run(*given[:-1], initial_state=given[-1], backend="triton")
    assert all(x.isfinite().all() for x in torch.autograd.grad(o.float().sum() + state.sum(), given))


@every_dtype
def test_a_reset_leaves_nothing_and_has_no_gradient(dtype):
    """What comes before gates of zero changes nothing behind them, bit for bit."""
    inputs, _ = sample(1, 256, 2, 64, 64, dtype=dtype)
    q, k, v, g = inputs
    g = torch.where(torch.arange(256, device="cuda")[None, :, None, None] == 100, float("-inf"), g)
    o, _ = run(q, k, v, g)
    other = v.clone()
    other[:, :100] = 7 * v[:, :100]
    o2, _ = run(q, k, other, g)
    assert torch.equal(o[:, 100:], o2[:, 100:]) and not torch.equal(o[:, :100], o2[:, :100])
    g.requires_grad_()
    (dg,) = torch.autograd.grad(run(q, k, v, g)[0].float().square().sum(), g)
    # In a square on the diagonal dg is a difference of equal sums of at most 16 terms in float32.
    assert dg.isfinite().all() and dg[:, 100].abs().max() <= 2**-20 * dg.abs().max()


@every_dtype
def test_decoding_token_by_token_is_the_whole(dtype):
    inputs, first = sample(3, 20, 2, 64, 64, group=2, state=3, dtype=dtype)
    with torch.no_grad():
        whole, last = run(*inputs, initial_state=first, chunk_size=16)
        state, pieces = first, []
        for t in range(20):
            o, state = run(*(x[:, t : t + 1] for x in inputs), initial_state=state)
            pieces.append(o)
    assert relative_error(torch.cat(pieces, 1), whole) < BOUND[dtype] and relative_error(state, last) < BOUND[dtype]


def test_a_call_can_be_captured_in_a_graph():
    inputs, first = sample(1, 256, 2, 64, 64, state=1, dtype=BF16)
    with torch.no_grad():
        expected = run(*inputs, initial_state=first)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run(*inputs, initial_state=first)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run(*inputs, initial_state=first)
        graph.replay()
        torch.cuda.synchronize()
    assert all(map(torch.equal, got, expected))


def test_ten_runs_are_equal():
    inputs, first = sample(2, 1024, 4, 128, 128, state=2, dtype=BF16)
    do, dstate = torch.randn_like(inputs[2]), torch.randn_like(first)
    resolve.cache_clear()
    expected = forward_and_gradients(run, leaves(*inputs, first), do, dstate)
    for _ in range(9):
        assert all(map(torch.equal, forward_and_gradients(run, leaves(*inputs, first), do, dstate), expected))


@pytest.mark.parametrize("length", [3, 200])
def test_auto_takes_the_kernels(length):
    """For short calls the recurrence; not above 256 channels."""
    inputs, first = sample(1, length, 2, 64, 64, state=1, dtype=BF16)
    for asked in (functools.partial(run, backend="auto"), functools.partial(dn_lib.chunk_gla, output_final_state=True)):
        got = asked(*inputs, initial_state=first)
        assert all(map(torch.equal, got, run(*inputs, initial_state=first)))
    assert not torch.equal(got[0], run(*inputs, initial_state=first, backend="chunkwise")[0])
    wide, _ = sample(1, 20, 1, 320, 16, dtype=F32)
    assert torch.equal(run(*wide, backend="auto")[0], run(*wide, backend="chunkwise")[0])
