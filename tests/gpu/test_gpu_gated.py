"""The delta rule's relatives compiled, on a GPU: gates, no erasure, shared key heads, against float64.

All kernels that a plan may choose: one family in Triton, and for heads of 128 the ones for Hopper.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

import dn_lib
from dn_lib.kernels.plan import plan_call, using
from dn_lib.testing import (
    delta_rule_inputs,
    forward_and_gradients,
    gated_inputs,
    leaves,
    offsets,
    relative_error,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
BOUND = {BF16: 8e-3, F16: 1.2e-3, F32: 1e-5}  # as in test_gpu.py, which derives them
KINDS = ("gated delta rule", "gated linear attention", "linear attention")


@pytest.fixture(autouse=True)
def clean():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
    torch.cuda.empty_cache()


def sample(B, L, H, K, V, *, kind, group=1, state=None, **options):
    """q, k of H heads, v, (beta,) (g,) and the state of H group heads; some gates are exactly 0, some exactly 1."""
    q, k, v, beta, g, first = gated_inputs(
        delta_rule_inputs, B, L, H * group, K, V, state=state, device="cuda", **options
    )
    gates = {"delta rule": [beta], "gated delta rule": [beta, g], "gated linear attention": [g], "linear attention": []}
    return [q[:, :, ::group].contiguous(), k[:, :, ::group].contiguous(), v, *gates[kind]], first


def rule(kind):
    rules = {"delta rule": dn_lib.delta_rule, "gated delta rule": dn_lib.gated_delta_rule}
    return rules.get(kind, dn_lib.linear_attention)


def exact(kind, inputs, first, upstream, **options):
    """Results in float64, by the chunkwise form, which the suite holds to 1e-12 of the recurrence."""
    wide = leaves(*(x.double() for x in inputs), None if first is None else first.double())

    def form(*x, initial_state=None):
        return rule(kind)(*x, initial_state=initial_state, output_final_state=True, backend="chunkwise", **options)

    return forward_and_gradients(form, wide, *(x.double() for x in upstream))


def compare(kind, sizes, dtype, *, group=1, state=False, lengths=None, seed=0, norm=False):
    B = sizes[0]
    N = B if lengths is None else len(lengths)
    inputs, first = sample(
        *sizes,
        kind=kind,
        group=group,
        state=N if state else None,
        dtype=dtype,
        seed=seed,
        edges=kind != "linear attention",
    )
    H = inputs[2].shape[2]
    g = torch.Generator().manual_seed(seed + 7)
    do = torch.randn(inputs[2].shape, generator=g).to("cuda", dtype)
    dstate = torch.randn(N, H, sizes[3], sizes[4], generator=g).to("cuda")
    options = {"qk_l2norm": norm}
    if lengths is not None:
        options["cu_seqlens"] = offsets(lengths, device="cuda")

    def kernels(*x, initial_state=None):
        return rule(kind)(*x, initial_state=initial_state, output_final_state=True, backend="triton", **options)

    wanted = exact(kind, inputs, first, (do, dstate), **options)
    for _ in range(2):  # the second is played back
        got = forward_and_gradients(kernels, leaves(*inputs, first), do, dstate)
        errors = [relative_error(x, y) for x, y in zip(got, wanted, strict=True)]
        assert max(errors) < BOUND[dtype], (kind, sizes, errors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("K, V", [(64, 64), (128, 128), (256, 256), (40, 96)])
def test_the_family_in_triton(kind, dtype, K, V):
    with using(gluon=False):
        compare(kind, (2, 150, 2, K, V), dtype, state=True, seed=K)
        compare(kind, (1, 512, 1, K, V), dtype, group=2, norm=True, seed=K + 1)
        with using(segments=3):
            compare(kind, (1, 512, 2, K, V), dtype, state=True, seed=K + 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [1, 3])
def test_packed_sequences(kind, group):
    compare(kind, (1, 300, 2, 64, 64), BF16, group=group, state=True, lengths=[1, 0, 130, 64, 105], seed=3)


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_fetched_by_tma(kind):
    with using(tma=True, gluon=False):
        compare(kind, (1, 1024, 2, 64, 64), BF16, state=True, seed=4)
        compare(kind, (1, 1024, 2, 128, 128), BF16, group=2, seed=5)


@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("segments", [1, 4])
def test_the_kernels_for_hopper(norm, group, segments):
    kind = "gated delta rule"
    with using(gluon=True, segments=segments):
        inputs, _ = sample(2, 1024, 2, 128, 128, kind=kind, group=group, dtype=BF16)
        plan = plan_call(*inputs[:3], norm=norm, training=True, chunk=64, gate=True)
        if not plan.launches["chunk_scan_bwd"].gluon:
            pytest.skip("not on this GPU, or not with this Triton")
        for state in (False, True):
            compare(kind, (2, 1024, 2, 128, 128), BF16, group=group, state=state, norm=norm, seed=6)
        compare(kind, (1, 1024, 70, 128, 128), BF16, group=group, norm=norm, seed=8)  # 128 values a program


@pytest.mark.parametrize("d", [64, 128])
def test_gates_of_one_are_the_delta_rule(d):
    """Within one rounding: the same products in the same order, and ratios of exactly 1."""
    *inputs, first = delta_rule_inputs(2, 1024, 3, d, d, dtype=BF16, device="cuda", state=2)
    ones = torch.zeros(2, 1024, 3, device="cuda")
    do, dstate = torch.randn_like(inputs[2]), torch.randn_like(first)

    def plain(*x, initial_state):
        return dn_lib.delta_rule(*x, initial_state=initial_state, output_final_state=True)

    def gated(*x, initial_state):
        return dn_lib.gated_delta_rule(*x, ones, initial_state=initial_state, output_final_state=True)

    for options in ({"fused": False, "gluon": False}, {"gluon": True}):
        with using(**options):
            expected, found = (forward_and_gradients(f, leaves(*inputs, first), do, dstate) for f in (plain, gated))
        errors = [relative_error(x, y) for x, y in zip(found, expected, strict=True)]
        assert max(errors) < 2**-8, errors


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bfloat16", "float32"])
def test_a_reset_leaves_nothing_and_has_no_gradient(dtype):
    """What comes before a gate of zero changes nothing behind it, bit for bit.  Its gradient is zero.

    In half precision sums in float32 cancel there, but for some 2^-22 of them (`gate_gradient`).
    """
    inputs, _ = sample(1, 256, 2, 64, 64, kind="gated delta rule", dtype=dtype)
    q, k, v, beta, g = inputs
    g = torch.where(torch.arange(256, device="cuda")[None, :, None] == 100, float("-inf"), g)
    o, _ = dn_lib.gated_delta_rule(q, k, v, beta, g)
    v2 = v.clone()
    v2[:, :100] = 7 * v[:, :100]
    o2, _ = dn_lib.gated_delta_rule(q, k, v2, beta, g)
    assert torch.equal(o[:, 100:], o2[:, 100:]) and not torch.equal(o[:, :100], o2[:, :100])
    g.requires_grad_()
    o, _ = dn_lib.gated_delta_rule(q, k, v, beta, g)
    (dg,) = torch.autograd.grad(o.float().square().sum(), g)
    assert dg.isfinite().all()
    largest = dg.abs().max()
    assert dg[:, 100].abs().max() <= (0 if dtype == F32 else 2**-16 * largest)  # each of 64 rows may leave 2^-22


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_token_by_token_is_the_whole(kind):
    inputs, first = sample(3, 20, 2, 64, 64, kind=kind, group=2, state=3, dtype=BF16)
    with torch.no_grad():
        whole, last = rule(kind)(*inputs, initial_state=first, output_final_state=True, chunk_size=16)
        state, pieces = first, []
        for t in range(20):
            o, state = rule(kind)(*(x[:, t : t + 1] for x in inputs), initial_state=state, output_final_state=True)
            pieces.append(o)
    assert relative_error(torch.cat(pieces, 1), whole) < BOUND[BF16] and relative_error(state, last) < BOUND[BF16]


@pytest.mark.parametrize("kind", ["delta rule", *KINDS])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_ten_runs_are_equal(kind, dtype, d, norm):
    """Bit for bit, while the GPU is busy: a copy that overtakes a dot does not do so every time."""
    inputs, first = sample(2, 1024, 16, d, d, kind=kind, state=2, dtype=dtype)
    do, dstate = torch.randn_like(inputs[2]), torch.randn_like(first)

    def kernels(*x, initial_state=None):
        return rule(kind)(*x, initial_state=initial_state, output_final_state=True, qk_l2norm=norm)

    for options in ({"gluon": False, "tma": False}, {"gluon": False, "tma": True}, {"gluon": True}):
        with using(**options):
            expected = forward_and_gradients(kernels, leaves(*inputs, first), do, dstate)
            for _ in range(9):
                again = forward_and_gradients(kernels, leaves(*inputs, first), do, dstate)
                assert all(map(torch.equal, again, expected)), options
