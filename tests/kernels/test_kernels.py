"""The Triton kernels in the interpreter, on the CPU: every gradient against the recurrence in float64."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dn_lib  # noqa: F401 - before Triton

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from dn_lib.kernels.common import INTERPRETED
from dn_lib.kernels.delta_rule import launch
from dn_lib.kernels.inverse import scaled_inverse
from dn_lib.kernels.ladder import tl, triton
from dn_lib.kernels.plan import plan_call, using
from dn_lib.testing import (
    NAMES,
    delta_rule_inputs,
    delta_rule_reference,
    forward_and_gradients,
    leaves,
    normalised,
    poisoned,
    relative_error,
    sensitivity,
)

pytestmark = pytest.mark.skipif(
    not INTERPRETED.value, reason="there is a GPU: tests/gpu/test_gpu.py runs the kernels compiled"
)

F32 = torch.float32
# What half precision is rounded to. The interpreter cuts bfloat16 where a GPU rounds, so that a unit is twice as large
# there; it proves the arithmetic and not the accuracy (tests/gpu/test_gpu.py does).
UNIT = {torch.float16: 2**-11, torch.bfloat16: 2**-8}
ROUNDINGS = 8  # on the way from an input to a gradient: N, U, W, a state, P, the new values, their gradient, the result


def planned(q, k, v, *, segments=None, **options):
    with using(segments=segments):
        return plan_call(q, k, v, **options)


def run(
    q, k, v, beta, *, initial_state=None, do=None, dstate=None,
    scale=None, cu_seqlens=None, qk_l2norm=False, chunk=16, segments=None,
):  # fmt: skip
    """[o, final state, dq, dk, dv, dbeta(, dinitial)] of one launch forward and one backward."""
    plan = planned(q, k, v, cu_seqlens=cu_seqlens, norm=qk_l2norm, training=True, chunk=chunk, segments=segments)
    shared = {"plan": plan, "q": q, "k": k, "beta": beta, "scale": q.shape[-1] ** -0.5 if scale is None else scale}
    o, state, saved = launch.forward(
        **shared, v=v, initial_state=initial_state, cu_seqlens=cu_seqlens, final_state=True
    )
    *gradients, dfirst = launch.backward(
        **shared, saved=saved, do=do, dstate=dstate, initial_state=initial_state is not None
    )
    return [o, state, *gradients] + ([] if dfirst is None else [dfirst])


def compare(tensors, *, seed=1, **options):
    """Outputs, states and gradients of the kernels against the recurrence on the same (rounded) inputs.

    In float32: a dot product of n terms is exact for operands that are off by n u, half of eps each, in any order of
    the sum and so with any BLAS. The longest are q.k over the key channels and sums over a chunk. Each result may be
    off by that times its condition number: 1 or 2 for most inputs, 33 for dbeta on identical keys with beta 2.
    o, the state and dinitial are sums that may cancel, so they are measured against the size of their terms as well.
    """
    q, k, v, beta, first = tensors
    dtype = v.dtype
    cu, scale = options.get("cu_seqlens"), options.get("scale", q.shape[-1] ** -0.5)
    sequences = q.shape[0] if cu is None else cu.numel() - 1
    g = torch.Generator().manual_seed(seed)
    do = torch.randn(v.shape, generator=g).to(v.dtype)
    dstate = torch.randn(sequences, q.shape[2], q.shape[3], v.shape[3], generator=g)
    exact = {name: options[name] for name in ("scale", "cu_seqlens", "qk_l2norm") if name in options}

    def reference(*inputs):
        *tensors, do, dstate = inputs
        return forward_and_gradients(delta_rule_reference, leaves(*tensors, dtype=torch.float64), do, dstate, **exact)

    expected = reference(*tensors, do.double(), dstate.double())
    got = run(*tensors[:4], initial_state=first, do=do, dstate=dstate, **options)
    sizes = [delta_rule_reference(*tensors[:4], initial_state=first, **exact)[2], *[0.0] * (len(expected) - 1)]
    q, k, v, beta = (x.double() for x in (q, k, v, beta))
    if options.get("qk_l2norm"):
        q, k = normalised(q), normalised(k)
    sizes[1] = terms(k * beta[..., None], v, first)
    if first is not None:
        sizes[6] = terms(scale * q, do, dstate)
    if dtype == F32:
        relative = (q.shape[-1] + options.get("chunk", 16)) * torch.finfo(F32).eps / 2
    else:
        relative = ROUNDINGS * UNIT[dtype]
    bounds = [relative * max(1, c) for c in sensitivity(reference, (*tensors, do, dstate), sizes)]
    for name, a, b, size, bound in zip(("o", "state", *NAMES), got, expected, sizes, bounds, strict=False):
        assert relative_error(a, b, size) < bound, name
    return got


def terms(rows, columns, first):
    """The size of the sum of outer products rows_t columns_t^T and of `first`: of its terms, which may cancel."""
    squares = (rows.norm(dim=-1) * columns.double().norm(dim=-1)).square().sum()
    return (squares + (0 if first is None else first.double().square().sum())).sqrt().item()


CASES = {
    # name: (B, L, H, d_k, d_v, chunk, norm, state)
    "one-token": (1, 1, 2, 5, 3, 16, False, True),
    "below-a-chunk": (1, 15, 1, 16, 16, 16, False, False),
    "one-chunk": (2, 16, 1, 7, 20, 16, False, True),
    "above-a-chunk": (1, 17, 1, 33, 16, 16, True, True),
    "three-chunks": (2, 47, 1, 24, 40, 16, True, False),
    "chunk-32": (1, 63, 2, 16, 5, 32, False, True),
    "chunk-64": (1, 65, 1, 40, 24, 64, True, True),
    "chunk-64-below": (1, 63, 1, 16, 70, 64, False, False),
    "wide": (1, 33, 1, 128, 96, 32, False, True),
    "wide-norm": (1, 33, 1, 100, 128, 32, True, False),
    "narrow": (1, 33, 2, 2, 1, 32, True, True),
    "single-channel": (1, 18, 1, 1, 1, 16, False, True),
}


@pytest.mark.parametrize("B, L, H, d_k, d_v, chunk, norm, state", CASES.values(), ids=CASES)
def test_float32(B, L, H, d_k, d_v, chunk, norm, state):
    x = delta_rule_inputs(B, L, H, d_k, d_v, state=B if state else None, unit=not norm, seed=2)
    compare(x, chunk=chunk, qk_l2norm=norm, scale=0.6)


@settings(max_examples=12)
@given(
    L=st.integers(1, 40),
    d_k=st.integers(2, 72),
    d_v=st.integers(2, 72),
    chunk=st.sampled_from([16, 32]),
    norm=st.booleans(),
    state=st.booleans(),
    segments=st.sampled_from([None, 2]),
    seed=st.integers(0, 1000),
)
def test_float32_on_random_shapes(L, d_k, d_v, chunk, norm, state, segments, seed):
    x = delta_rule_inputs(1, L, 1, d_k, d_v, state=1 if state else None, unit=not norm, seed=seed)
    compare(x, chunk=chunk, qk_l2norm=norm, segments=segments, seed=seed)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("norm, state", [(False, True), (True, False)])
def test_packed_sequences(kind, norm, state):
    """Empty ones first, last and in between; lengths around the chunk."""
    cu = torch.tensor([0, 0, 1, 17, 17, 17, 33, 48, 48], dtype=kind)
    x = delta_rule_inputs(1, 48, 1, 9, 21, state=8 if state else None, unit=not norm)
    compare(x, cu_seqlens=cu, qk_l2norm=norm)


def test_packed_sequences_are_those_computed_one_by_one():
    *x, S = delta_rule_inputs(1, 40, 1, 9, 21, state=3)
    cu = torch.tensor([0, 19, 19, 40])
    do, dS = torch.randn_like(x[2]), torch.randn_like(S)
    packed = run(*x, initial_state=S, do=do, dstate=dS, cu_seqlens=cu)
    for n, (begin, end) in enumerate([(0, 19), (19, 19), (19, 40)]):
        part = [y[:, begin:end].contiguous() for y in (*x, do)]
        alone = run(*part[:4], do=part[4], initial_state=S[n : n + 1], dstate=dS[n : n + 1])
        for i, (a, b) in enumerate(zip(packed, alone, strict=True)):
            piece = a[n : n + 1] if i in (1, 6) else a[:, begin:end]
            assert torch.equal(piece, b)


@pytest.mark.parametrize("segments, L", [(2, 33), (2, 64), (3, 80), (3, 100)])
@pytest.mark.parametrize("norm, state", [(False, False), (True, True)])
def test_split_sequences(segments, L, norm, state):
    """Affine maps of the segments, forward and backward; the last segment may be shorter."""
    x = delta_rule_inputs(2, L, 1, 20, 12, state=2 if state else None, unit=not norm)
    assert planned(*x[:3], chunk=16, segments=segments).layout.segments == segments
    compare(x, qk_l2norm=norm, segments=segments)


def test_split_state_wider_than_the_block_of_merge():
    compare(delta_rule_inputs(1, 40, 1, 72, 130, state=1), segments=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "L, d_k, d_v, norm, segments",
    [(40, 24, 64, False, None), (33, 64, 16, True, None), (40, 32, 16, True, 2), (33, 80, 16, False, 2)],
)
def test_half_precision(dtype, L, d_k, d_v, norm, segments):
    """Up to 64 channels the backward is one kernel."""
    x = delta_rule_inputs(1, L, 1, d_k, d_v, dtype=dtype, state=1, unit=not norm)
    assert planned(*x[:3], training=True, chunk=16).layout.fused == (d_k <= 64)
    compare(x, qk_l2norm=norm, segments=segments)


@pytest.mark.parametrize("dtype", [F32, torch.float16])
@pytest.mark.parametrize("norm", [False, True])
def test_inference_equals_the_forward_of_training(dtype, norm):
    """Without a backward nothing is kept but what is asked for."""
    q, k, v, beta, S = delta_rule_inputs(1, 40, 1, 24, 16, dtype=dtype, state=1, unit=not norm)
    shared = {"q": q, "k": k, "v": v, "beta": beta, "scale": 0.5, "initial_state": S}
    plans = {training: planned(q, k, v, norm=norm, training=training, chunk=16) for training in (True, False)}
    o, state, _ = launch.forward(plan=plans[True], **shared, final_state=True)
    fast, end, saved = launch.forward(plan=plans[False], **shared, final_state=True)
    assert saved is None and not {"pseudo", "states", "state_end"} & {*plans[False].layout.buffers}
    assert torch.equal(fast, o) and torch.equal(end, state)
    assert launch.forward(plan=plans[False], **shared, final_state=False)[1] is None


@pytest.mark.parametrize(
    "dtype, options",
    [
        (F32, {}),
        (F32, {"qk_l2norm": True, "segments": 2}),
        (F32, {"cu_seqlens": torch.tensor([0, 0, 7, 40, 40])}),
        (torch.float16, {"qk_l2norm": True}),
        (torch.float16, {"segments": 2}),
    ],
    ids=str,
)
def test_every_output_is_written_and_nothing_unwritten_is_read(dtype, options):
    cu = options.get("cu_seqlens")
    *x, S = delta_rule_inputs(1, 40, 2, 12, 20, dtype=dtype, state=1 if cu is None else 4)
    do, dS = torch.randn_like(x[2]), torch.randn_like(S)
    clean = run(*x, initial_state=S, do=do, dstate=dS, **options)
    with poisoned():
        assert torch.empty_like(S).isnan().all()
        for a, b in zip(clean, run(*x, initial_state=S, do=do, dstate=dS, **options), strict=True):
            assert torch.equal(a, b)
        without = run(*x, do=do, dstate=None, **options)
        assert all(y.isfinite().all() for y in without)
        shared = dict(zip(("q", "k", "v", "beta"), x, strict=True))
        shared |= {"scale": 0.5, "initial_state": S, "cu_seqlens": cu}
        about = {"cu_seqlens": cu, "norm": "qk_l2norm" in options}
        plan = planned(*x[:3], **about, chunk=16, segments=options.get("segments"))
        o, state, _ = launch.forward(plan=plan, **shared, final_state=True)
        assert o.isfinite().all() and state.isfinite().all()
        state.fill_(float("nan"))
        o = launch.recurrent(plan=planned(*x[:3], **about, chunk=None), **shared, final_state=state)
        assert o.isfinite().all() and state.isfinite().all()


# --- Few key channels: sums that cancel -------------------------------------------------------------------------


def by_formulas(tensors, do, dstate, *, scale, norm, chunk, rounded):
    """[o, final state, dq, dk, dv, dbeta, dinitial] by the kernels' formulas (the fused backward), in float64.

    rounded: called with what the kernels round to half precision.
    """
    q, k, v, do = (x.double().transpose(1, 2) for x in (*tensors[:3], do))
    beta, S = tensors[3].double().transpose(1, 2)[..., None], tensors[4].double()
    r_q, r_k = (1 / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() if norm else x.new_ones(()) for x in (q, k))
    r_q, r_k = (r.expand(beta.shape) for r in (r_q, r_k))
    kept, outputs, gradients = [], [], []
    for at in range(0, q.shape[2], chunk):
        Q, K, V, b, rq, rk, dO = (x[:, :, at : at + chunk] for x in (q, k, v, beta, r_q, r_k, do))
        B = (rk * (K @ K.mT) * rk.mT).tril(-1)
        matrix = torch.eye(K.shape[2], dtype=torch.float64) + B * b.mT
        N = rounded(-torch.linalg.solve_triangular(matrix, B, upper=False, unitriangular=True))
        low = rounded(S)
        R = V - rk * (K @ low)
        E = R + N @ rounded(b * R)
        least, weak = (2**-40, 2**-40) if tensors[0].dtype == torch.bfloat16 else (2**-6, 1.0)
        factor = torch.where((b * rk).abs() >= least, b * rk, weak)  # `kept_strength`
        stored, to_Vn, to_E = rounded(factor * E), b * rk / factor, 1 / factor
        Vn = rounded(b * rk * E)
        outputs.append(rounded(scale * rq * (Q @ low + rounded((Q @ K.mT).tril()) @ Vn)))
        S = S + K.mT @ Vn
        kept.append((Q, K, b, rq, rk, dO, N, stored, to_Vn, to_E))
    end, dS = S, dstate.double()
    for Q, K, b, rq, rk, dO, N, stored, to_Vn, to_E in reversed(kept):
        dO = scale * (rounded(rq * dO) if norm else dO)
        d_low = rounded(dS)
        dVn = rk * (K @ d_low + rounded((K @ Q.mT).triu()) @ dO)
        Z = dVn + N.mT @ rounded(b * dVn)
        dR, minus_dR = rounded(b * Z), rounded(-b * rk * Z)
        dbeta = rounded(to_E * (Z * stored).sum(-1, keepdim=True))
        Vn = rounded(to_Vn * stored)
        S = S - K.mT @ Vn
        low, dP, G = rounded(S), rounded((dO @ Vn.mT).tril()), (minus_dR @ Vn.mT).tril(-1)
        dQ = dO @ low.mT + dP @ K
        dK = Vn @ d_low.mT + minus_dR @ low.mT + dP.mT @ Q + rounded(G + G.mT) @ K
        if norm:
            dQ = dQ - rq**2 * Q * (Q * dQ).sum(-1, keepdim=True)
            dK = dK - rk**2 * K * (K * dK).sum(-1, keepdim=True)
        gradients.append((rounded(dQ), rounded(dK), dR, dbeta))
        dS = dS + Q.mT @ dO + K.mT @ minus_dR
    dq, dk, dv, dbeta = (torch.cat(x[::-1], 2).transpose(1, 2) for x in zip(*gradients, strict=True))
    return [torch.cat(outputs, 2).transpose(1, 2), end, dq, dk, dv, dbeta[..., 0], dS]


SMALL = {
    # name: (L, d_k, d_v, chunk, norm, largest beta, seed)
    "one-channel": (33, 1, 8, 32, False, 2.0, 91),
    "one-channel-long": (64, 1, 3, 64, False, 2.0, 87),
    "one-channel-weak": (64, 1, 16, 64, False, 0.5, 189),
    "one-channel-forgets": (20, 1, 4, 16, False, 1.0, 46),
    "two-channels": (70, 2, 8, 32, False, 2.0, 110),
    "two-channels-norm": (64, 2, 3, 64, True, 2.0, 7),
    "two-channels-forget": (70, 2, 16, 64, False, 1.0, 5),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("L, d_k, d_v, chunk, norm, beta_max, seed", SMALL.values(), ids=SMALL)
def test_half_precision_on_few_key_channels(L, d_k, d_v, chunk, norm, beta_max, seed, dtype):
    """Of a state with few rows soon nothing is left: K^T D E cancels it, and relative to the result errors are large.

    How large is known. Each rounding takes off a share of what is rounded, at most a unit: 2 UNIT for bfloat16, which
    the interpreter cuts. In float64, in the kernels' own formulas, with a share of their own, at most 2^-24, taken off
    everything that is rounded, the results change by their condition number times as much. That is 1 to 3 where nothing
    cancels. Twice the larger change of two draws is allowed, since the shares are drawn.
    """
    x = delta_rule_inputs(1, L, 1, d_k, d_v, dtype=dtype, state=1, unit=not norm, beta_max=beta_max, seed=seed)
    g = torch.Generator().manual_seed(seed)
    do, dstate = torch.randn(x[2].shape, generator=g).to(dtype), torch.randn(x[4].shape, generator=g)
    options = {"scale": d_k**-0.5, "chunk": chunk}
    assert planned(*x[:3], training=True, chunk=chunk).layout.fused
    exact = forward_and_gradients(
        delta_rule_reference, leaves(*x, dtype=torch.float64), do, dstate, scale=options["scale"], qk_l2norm=norm
    )

    def formulas(rounded):
        return by_formulas(x, do, dstate, norm=norm, rounded=rounded, **options)

    assert all(relative_error(a, b) < 1e-9 for a, b in zip(formulas(lambda y: y), exact, strict=True))
    step, condition = 2.0**-24, [1.0] * len(exact)
    for _ in range(2):
        less = formulas(lambda y: y * (1 - step * torch.rand(y.shape, generator=g, dtype=torch.float64)))
        condition = [max(c, relative_error(a, b) / step) for c, a, b in zip(condition, less, exact, strict=True)]
    assert max(condition) > 8  # something does cancel
    unit = 2 * UNIT[dtype] if dtype == torch.bfloat16 else UNIT[dtype]
    got = run(*x[:4], initial_state=x[4], do=do, dstate=dstate, qk_l2norm=norm, **options)
    for name, a, b, c in zip(("o", "state", *NAMES), got, exact, condition, strict=True):
        assert relative_error(a, b) < 2 * unit * c, (name, relative_error(a, b), c)


# --- The recurrent kernel ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("lengths", [None, torch.tensor([0, 4, 4, 9], dtype=torch.int32)])
def test_recurrent_kernel_in_place(lengths, norm):
    """final_state may be initial_state; value blocks (70 channels, 64 at a time) don't meet."""
    sequences = 2 if lengths is None else 3
    *x, S = delta_rule_inputs(2 if lengths is None else 1, 9, 2, 5, 70, state=sequences, unit=not norm)
    expected, end, _ = delta_rule_reference(*x, scale=0.8, initial_state=S, cu_seqlens=lengths, qk_l2norm=norm)
    common = dict(zip(("q", "k", "v", "beta"), x, strict=True)) | {"scale": 0.8, "cu_seqlens": lengths}
    common["plan"] = planned(*x[:3], cu_seqlens=lengths, norm=norm, chunk=None)
    elsewhere = torch.full_like(S, float("nan"))
    before = S.clone()
    o = launch.recurrent(**common, initial_state=S, final_state=elsewhere)
    assert torch.equal(S, before) and relative_error(o, expected) < 1e-5 and relative_error(elsewhere, end) < 1e-5
    in_place = launch.recurrent(**common, initial_state=S, final_state=S)
    assert torch.equal(in_place, o) and torch.equal(S, elsewhere)
    zeros = launch.recurrent(**common)
    assert relative_error(zeros, delta_rule_reference(*x, scale=0.8, cu_seqlens=lengths, qk_l2norm=norm)[0]) < 1e-5


# --- The triangular inverse -------------------------------------------------------------------------------------


@triton.jit
def inverse_kernel(L, beta, n, C: tl.constexpr, PRECISION: tl.constexpr):
    rows = tl.arange(0, C)
    at = rows[:, None] * C + rows[None, :]
    tl.store(n + at, scaled_inverse(tl.load(L + at), tl.load(beta + rows), C, PRECISION))


def keys_of_cosine(C, cosine, d=96):
    """Unit keys, any two of which meet at about `cosine`."""
    g = torch.Generator().manual_seed(0)
    k = torch.randn(C, d, generator=g, dtype=torch.float64)
    k = (1 - cosine) ** 0.5 * k / k.norm(dim=1, keepdim=True)
    k[:, 0] += cosine**0.5
    return torch.nn.functional.normalize(k, dim=1)


WORST = {
    "identical-2": (1.0, torch.full((64,), 2.0)),
    "identical-1": (1.0, torch.full((64,), 1.0)),
    "cosine-0.9": (0.9, torch.full((64,), 1.9)),
    "cosine-0.9-some-zero": (0.9, torch.tensor([1.9, 0.0, 2.0, 1.0] * 16)),
    "random": (0.0, torch.linspace(0, 2, 64)),
}


@pytest.mark.parametrize("precision", ["ieee", "half", "halves"])
@pytest.mark.parametrize("C", [16, 32, 64])
@pytest.mark.parametrize("cosine, beta", WORST.values(), ids=WORST)
def test_inverse_on_the_worst_keys(cosine, beta, C, precision):
    """N = -(I + B D)^{-1} B, in float32 as exact as sums of C terms and the condition of I + B D allow.

    With float16 operands it may be off by what they must cost. Merging X and Y to X B Y rounds four (B, X, X B, Y),
    each of which costs at most what rounding all of B to float16 does, and N itself is rounded.
    """
    k, beta = keys_of_cosine(C, cosine), beta[:C].contiguous()
    gram = (k @ k.T).tril(-1)

    def inverse(B):
        matrix = torch.eye(C, dtype=torch.float64) + B * beta.double()
        return -torch.linalg.solve_triangular(matrix, B, upper=False, unitriangular=True)

    exact = inverse(gram)
    assert exact.abs().max() - 1 < 1e-6  # what makes float16 safe
    if precision == "half":
        bound = 4 * relative_error(inverse(gram.half().double()), exact) + 2**-11
    else:
        bound = C * torch.finfo(F32).eps / 2 * max(1, sensitivity(lambda L: [inverse(L)], (gram,))[0])
    n = torch.full((C, C), float("nan"))
    inverse_kernel[(1,)](gram.float(), beta, n, C=C, PRECISION=precision)
    assert relative_error(n, exact) < bound
    assert n.abs().max() - 1 < bound and not n.triu().any()


@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("cosine, strength", [(1.0, 2.0), (0.9, 1.9)])
def test_whole_forward_on_the_worst_keys(cosine, strength, chunk):
    """Reflections of one key: no growth with the length, with every gradient."""
    q, k, v, beta, S = delta_rule_inputs(1, 70, 1, 96, 4, state=1)
    k = keys_of_cosine(70, cosine)[None, :, None].float()
    compare((q, k, v, torch.full_like(beta, strength), S), chunk=chunk)


def test_empty_batches_launch_nothing():
    for B, L, H in ((0, 5, 2), (2, 5, 0), (0, 0, 0)):
        *x, S = delta_rule_inputs(B, L, H, 4, 6, state=B)
        results = run(*x, initial_state=S, do=x[2], dstate=S)
        assert [tuple(y.shape) for y in results[:2]] == [(B, L, H, 6), (B, H, 4, 6)]


def test_interpreter_multiplies_bfloat16_as_numbers():
    """Why `common.dot` converts first: 1.5 x 2 of bfloat16, whose bit patterns would give another product."""
    *x, _ = delta_rule_inputs(1, 16, 1, 16, 16, dtype=torch.bfloat16)
    eye = torch.eye(16, dtype=torch.bfloat16)[None, :, None]
    two = torch.full_like(x[2], 2.0)
    plan = planned(eye, eye, two, training=True, chunk=16)
    o, _, _ = launch.forward(plan=plan, q=eye * 1.5, k=eye, v=two, beta=torch.ones_like(x[3]), scale=1.0)
    assert torch.equal(o, torch.full_like(o, 3.0))


def test_gradient_of_a_strength_that_is_nearly_zero():
    """dbeta where beta is 0, and on both sides of the bound below which the forward keeps E in place of Vn."""
    q, k, v, _, S = delta_rule_inputs(1, 40, 1, 20, 12, state=1)
    beta = torch.tensor([0.0, 1e-30, 1e-3, 0.0156, 0.015625, 0.02, 1.0, 2.0]).repeat(5)[None, :, None]
    for norm in (False, True):
        compare((q, k, v, beta, S), qk_l2norm=norm)
