"""The kernels compiled, on a GPU: accuracy, worst cases, and what PyTorch does with them.  `make gpu` runs it.

Few combinations of head sizes and options, each with several batch sizes, lengths and numbers of heads, because only
the former compile anew.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import threading
import warnings

import pytest
import torch

import dn_lib
from dn_lib import decode_delta_rule, delta_rule, fused_recurrent_delta_rule, ops
from dn_lib.kernels.plan import plan_call, using
from dn_lib.ops.backend import forget_warnings
from dn_lib.testing import NAMES, delta_rule_inputs, forward_and_gradients, leaves, poisoned, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# Norms of errors over norms of references.  Half precision: the result, N, E, states and gradients of states are
# rounded to the dtype, by at most u = 2^-8 = 4e-3 (bfloat16) or 2^-11 = 5e-4 (float16), less than half of that on
# average: some four or five such errors.  TF32: tensor cores read the first 11 bits of an operand and cut off the
# rest, so u = 2^-10, three of them.  (With operands cut so, the interpreter gives 2.1e-3 where this file's random keys
# give it on a GPU, and 1.0e-3 with operands rounded.)  float32: 84 eps.
BOUND = {BF16: 8e-3, F16: 1.2e-3, F32: 1e-5, "tf32": 3 * 2**-10}


@pytest.fixture(autouse=True)
def clean():
    """TF32 off, TMA in short calls of whole chunks too, and nothing of the last test in memory."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with using(tma=True):
        yield
    torch.set_float32_matmul_precision(before)
    torch.cuda.empty_cache()


def cuda_inputs(*shape, **options):
    return delta_rule_inputs(*shape, device="cuda", **options)


def upstream(q, v, sequences, seed=9):
    """Gradients for the output and the final state."""
    g = torch.Generator().manual_seed(seed)
    do = torch.randn(v.shape, generator=g).to("cuda", v.dtype)
    return do, torch.randn(sequences, q.shape[2], q.shape[3], v.shape[3], generator=g).to("cuda")


def triton_rule(*x, initial_state=None, **options):
    return delta_rule(*x, initial_state=initial_state, output_final_state=True, backend="triton", **options)


def exact_rule(*x, initial_state=None, **options):
    """Chapter 4's form in float64, which the suite holds to 1e-12 of the recurrence."""
    options["chunk_size"] = 64
    return delta_rule(*x, initial_state=initial_state, output_final_state=True, backend="chunkwise", **options)


def compare(tensors, bound, **options):
    q, _, v, _, _ = tensors
    cu = options.get("cu_seqlens")
    do, dS = upstream(q, v, q.shape[0] if cu is None else cu.numel() - 1)
    got = forward_and_gradients(triton_rule, leaves(*tensors), do, dS, **options)
    expected = forward_and_gradients(exact_rule, leaves(*tensors, dtype=torch.float64), do, dS, **options)
    errors = {n: relative_error(a, b) for n, a, b in zip(("o", "state", *NAMES), got, expected, strict=False)}
    wrong = {name: f"{e:.2g}" for name, e in errors.items() if not e < bound}
    assert not wrong, f"above {bound}: {wrong}, of { ({n: f'{e:.2g}' for n, e in errors.items()}) }"


# --- Accuracy ---------------------------------------------------------------------------------------------------

# dtype, d_k, d_v, chunk (None: the default), norm, initial state
CONFIGURATIONS = [
    (BF16, 64, 64, None, False, True),
    (BF16, 64, 64, None, True, True),
    (BF16, 128, 128, None, False, True),
    (BF16, 128, 128, None, True, True),
    (BF16, 256, 128, None, True, False),
    (BF16, 16, 40, 16, True, False),
    (BF16, 96, 200, 32, False, True),
    (BF16, 200, 64, None, True, True),
    (F16, 128, 64, None, True, True),
    (F16, 40, 16, None, False, False),
    # With one key channel every key is +1 or -1, and what half precision keeps of their product is little.
    (F32, 1, 16, None, False, False),
    (F32, 16, 1, None, False, True),
    (F32, 64, 64, None, True, True),
    (F32, 128, 128, None, False, True),
    (F32, 40, 96, 64, True, False),
    (F32, 256, 200, 16, False, False),
    ("tf32", 64, 64, None, True, True),
    ("tf32", 128, 128, None, False, True),
]
# B, L, H; the last is long enough, and a multiple of the chunk, for the copy engine.
BATCHES = [(3, 1, 5), (2, 77, 3), (1, 1000, 4), (2, 1024, 2)]


def names(configuration):
    dtype, d_k, d_v, chunk, norm, state = configuration
    flags = f"{'-norm' if norm else ''}{'-state' if state else ''}{f'-C{chunk}' if chunk else ''}"
    return f"{str(dtype).removeprefix('torch.')}-{d_k}x{d_v}{flags}"


def precise(dtype):
    """The dtype to make tensors in, with torch's switch set."""
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    return F32 if dtype == "tf32" else dtype


@pytest.mark.parametrize("B, L, H", BATCHES)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=names)
def test_against_float64(configuration, B, L, H):
    kind, d_k, d_v, chunk, norm, state = configuration
    dtype, first = precise(kind), B if state else None
    x = cuda_inputs(B, L, H, d_k, d_v, dtype=dtype, state=first, unit=not norm, seed=L, beta_max=1.0)
    compare(x, BOUND[kind], chunk_size=chunk, qk_l2norm=norm)


@pytest.mark.parametrize("kind, d", [(BF16, 64), (BF16, 128), (F16, 128), (F32, 128), ("tf32", 128)])
def test_keys_that_are_alike(kind, d):
    """A shared direction in every key, cosine about a half, and beta up to 2.

    Reflections keep what a smaller beta would let fade, errors too, and near keys are told apart by their last
    bits: float16 with exact rounding, in the interpreter, is off by twice what it is for random keys and beta <= 1.
    So is TF32 with operands cut off as tensor cores cut them: 3.7e-3 in dk, 3.9e-3 in dbeta (1.2e-3 and 1.3e-3 with
    operands rounded), which is what a GPU shows too.
    """
    x = cuda_inputs(2, 512, 3, d, d, dtype=precise(kind), state=2, bias=1.0)
    compare(x, BOUND[kind] if kind == F32 else 2 * BOUND[kind])


def lengths(n, seed=0):
    """n lengths between 0 and 130, every fifth empty, the first and the last too, and their offsets."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 131, (n,), generator=g)
    sizes[::5] = 0
    sizes[-1] = 0
    return [0, *sizes.cumsum(0).tolist()]


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "kind, d, norm, state", [(BF16, 64, True, True), (BF16, 128, False, True), (F32, 64, True, False)]
)
def test_packed_sequences(kind, d, norm, state, index):
    offsets = lengths(64)
    x = cuda_inputs(1, offsets[-1], 2, d, d, dtype=kind, state=64 if state else None, unit=not norm, beta_max=1.0)
    compare(x, BOUND[kind], qk_l2norm=norm, cu_seqlens=torch.tensor(offsets, dtype=index, device="cuda"))


@pytest.mark.parametrize("kind, d, norm", [(BF16, 64, True), (BF16, 128, False), (F32, 128, False)])
@pytest.mark.parametrize("segments", [2, 3])
def test_split_sequences(kind, d, norm, segments):
    x = cuda_inputs(2, 500, 2, d, d, dtype=kind, state=2, unit=not norm, beta_max=1.0)
    with using(segments=segments):
        assert ops.plan(*x[:4], qk_l2norm=norm, training=True).kernels.layout.segments == segments
        compare(x, BOUND[kind], qk_l2norm=norm)


def test_the_split_that_is_chosen():
    x = cuda_inputs(1, 8192, 2, 128, 128, dtype=BF16, state=1, beta_max=1.0)
    assert ops.plan(*x[:4], training=True).kernels.layout.segments > 1
    compare(x, BOUND[BF16])


@pytest.mark.parametrize("L", [1, 5, 16])
def test_short_prompts_run_the_recurrence(L):
    """Without a gradient; against the chunkwise kernels too."""
    x = cuda_inputs(3, L, 4, 64, 64, dtype=F32, state=3)
    with torch.no_grad():
        o, state = triton_rule(*x[:4], initial_state=x[4])
        other, end = triton_rule(*x[:4], initial_state=x[4], chunk_size=32)
        exact, last = exact_rule(*(y.double() for y in x[:4]), initial_state=x[4].double())
    for a in (o, other):
        assert relative_error(a, exact) < 1e-5
    for a in (state, end):
        assert relative_error(a, last) < 1e-5


# --- Worst cases ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, d", [(BF16, 64), (BF16, 128), (F32, 64)])
@pytest.mark.parametrize("pool", [1, 4])
@pytest.mark.parametrize("norm", [False, True])
def test_long_and_repetitive_stays_finite(kind, d, pool, norm):
    """Unit keys, the same `pool` ones over and over, |v| <= 1 and beta at its ends, for 131,072 tokens.

    Unit keys in their dtype: with beta = 2 and |k|^2 = 1.001 the exact recurrence grows by 1.003 a token.  So the
    kernel normalises them, or 64 of their entries are 1/8 or -1/8.
    """
    L, H = 131_072, 2
    g = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(1, L, H, d, generator=g, device="cuda").to(kind)
    keys = torch.randn(pool, d, generator=g, device="cuda")
    if not norm:
        keys[:, :64], keys[:, 64:] = keys[:, :64].sign() / 8, 0
        assert (keys.to(kind).double().square().sum(-1) == 1).all()
    k = keys[torch.randint(pool, (1, L, H), generator=g, device="cuda")].to(kind)
    v = torch.nn.functional.normalize(torch.randn(1, L, H, d, generator=g, device="cuda"), dim=-1).to(kind)
    beta = (2 * torch.rand(1, L, H, generator=g, device="cuda")).to(kind)
    beta[:, : L // 2] = 2
    x = leaves(q, k, v, beta)
    o, state = triton_rule(*x, qk_l2norm=norm)
    results = o, state, *torch.autograd.grad((o, state), x, (torch.ones_like(o), torch.ones_like(state)))
    assert all(y.isfinite().all() for y in results)


STEADY = [(BF16, 64, True), (BF16, 128, False), (F32, 64, True)]


@pytest.mark.parametrize("kind, d, norm", STEADY)
def test_fifty_runs_agree_bit_for_bit(kind, d, norm):
    x = cuda_inputs(2, 1024, 4, d, d, dtype=kind, state=2, unit=not norm)
    do, dS = upstream(x[0], x[2], 2)
    first = forward_and_gradients(triton_rule, leaves(*x), do, dS, qk_l2norm=norm)
    same = torch.ones((), dtype=torch.bool, device="cuda")
    for _ in range(49):
        for a, b in zip(first, forward_and_gradients(triton_rule, leaves(*x), do, dS, qk_l2norm=norm), strict=True):
            same &= (a == b).all()
    assert same.item()


@pytest.mark.parametrize("regime", ["plain", "split", "packed"])
@pytest.mark.parametrize("kind, d, norm", STEADY)
def test_every_output_is_written_and_nothing_unwritten_is_read(kind, d, norm, regime):
    cu = torch.tensor(lengths(6), device="cuda") if regime == "packed" else None
    L = cu[-1].item() if cu is not None else 300
    sequences = 1 if cu is None else 6
    x = cuda_inputs(1, L, 2, d, d, dtype=kind, state=sequences, unit=not norm)
    do, dS = upstream(x[0], x[2], sequences)
    planned = using(segments=2) if regime == "split" else contextlib.nullcontext()
    run = functools.partial(forward_and_gradients, triton_rule, do=do, dstate=dS, qk_l2norm=norm, cu_seqlens=cu)
    with planned:
        written_and_read(run, x, norm, cu)


def written_and_read(run, x, norm, cu):
    clean = run(leaves(*x))
    with torch.no_grad():
        inference = triton_rule(*x[:4], initial_state=x[4], qk_l2norm=norm, cu_seqlens=cu)
    with poisoned():
        for a, b in zip(clean, run(leaves(*x)), strict=True):
            assert torch.equal(a, b)
        with torch.no_grad():
            again = triton_rule(*x[:4], initial_state=x[4], qk_l2norm=norm, cu_seqlens=cu)
    assert all(torch.equal(a, b) for a, b in zip(inference, again, strict=True))


@pytest.mark.parametrize("d, H, gluon", [(64, 32, False), (128, 16, False), (128, 16, True)])
def test_offsets_beyond_31_bits(d, H, gluon):
    """The last sequence of a batch of more than 2^31 elements equals the same one alone, through either kernels."""
    with using(segments=1, gluon=gluon):
        last_of_many(d, H)


def last_of_many(d, H):
    B, L = 1025, 1024
    elements = B * L * H * d
    assert elements > 2**31
    # q, k, v, o, e, do, dq, dk, dv, N (64 a row), and the states and their gradients, d a row of a chunk's 64.
    needed = 2 * elements * (9 + 64 / d + (0 if d <= 64 else 2 * d / 64)) + 4 * 2**30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory")
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(B, L, H, d, dtype=BF16, device="cuda", generator=g).requires_grad_() for _ in range(3))
    beta = torch.rand(B, L, H, device="cuda", generator=g).to(BF16).requires_grad_()
    x = (q, k, v, beta)
    o, state = triton_rule(*x, qk_l2norm=True)
    do = torch.randn(L, H, d, dtype=BF16, device="cuda", generator=g)
    upstream_of_all = torch.zeros_like(o)
    upstream_of_all[-1] = do
    whole = [o.detach()[-1:].clone(), state.detach()[-1:].clone()]
    whole += [y[-1:].clone() for y in torch.autograd.grad(o, x, upstream_of_all)]
    del upstream_of_all
    alone = leaves(*(y[-1:] for y in x))
    o, state = triton_rule(*alone, qk_l2norm=True)
    gradients = torch.autograd.grad(o, alone, do[None])
    for a, b in zip(whole, (o, state, *gradients), strict=True):
        assert torch.equal(a, b)


# --- What is read and written -------------------------------------------------------------------------------------

LAYOUTS = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every-second": lambda x: torch.stack([x, x * 0 + 9], dim=-1)[..., 0],
    "negative-view": lambda x: torch._neg_view(-x),
    "offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].reshape(x.shape),  # not aligned to 16 bytes
}


@pytest.mark.parametrize("layout, compiled", [*((name, False) for name in LAYOUTS), ("transposed", True)])
def test_any_layout_is_read_as_its_values(layout, compiled):
    """Of every input and of both upstream gradients, one after the other and all at once."""
    torch._dynamo.reset()
    run = torch.compile(triton_rule, fullgraph=True) if compiled else triton_rule
    x = [*cuda_inputs(1, 1024, 2, 64, 64, dtype=BF16, state=1)]
    x += upstream(x[0], x[2], 1)
    plain = forward_and_gradients(run, leaves(*x[:5]), *x[5:])
    for changed in [[i] for i in range(7)] + [range(7)]:
        odd = [LAYOUTS[layout](y) if i in changed else y for i, y in enumerate(x)]
        odd[:5] = [y.detach().requires_grad_() for y in odd[:5]]
        for a, b in zip(plain, forward_and_gradients(run, odd[:5], *odd[5:]), strict=True):
            assert torch.equal(a, b)


def test_expanded_inputs_are_read_as_their_values():
    x = cuda_inputs(1, 300, 2, 64, 64, dtype=BF16, state=1)
    do, dS = upstream(x[0], x[2], 1)
    for i in range(5):
        narrow = [y[:, :1].expand_as(y) if i == j else y for j, y in enumerate(x)]
        for function in (triton_rule, lambda *y, **o: triton_rule(*(t[:, :9] for t in y), **o)):
            with torch.no_grad():
                got = function(*narrow[:4], initial_state=narrow[4])
                expected = function(*(y.contiguous() for y in narrow[:4]), initial_state=narrow[4].contiguous())
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        odd = [y.detach().requires_grad_() for y in narrow]
        got = forward_and_gradients(triton_rule, odd, do[:, :1].expand_as(do), dS)
        whole = leaves(*(y.contiguous() for y in narrow))
        expected = forward_and_gradients(triton_rule, whole, do[:, :1].expand_as(do).contiguous(), dS)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def packed_results(x, do, dS, cu, **options):
    """Training, inference, the recurrent kernel, and compiled training, on one packed row."""
    results = forward_and_gradients(triton_rule, leaves(*x), do, dS, cu_seqlens=cu, **options)
    with torch.no_grad():
        results += triton_rule(*x[:4], initial_state=x[4], cu_seqlens=cu, **options)
        results += fused_recurrent_delta_rule(*x[:4], initial_state=x[4], output_final_state=True, cu_seqlens=cu)
    compiled = torch.compile(triton_rule, fullgraph=True)
    return results + forward_and_gradients(compiled, leaves(*x), do, dS, cu_seqlens=cu, **options)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_offsets_of_any_layout(kind):
    torch._dynamo.reset()
    x = cuda_inputs(1, 200, 2, 64, 64, dtype=BF16, state=3)
    do, dS = upstream(x[0], x[2], 3)
    cu = torch.tensor([0, 70, 70, 200], dtype=kind, device="cuda")
    column = torch.stack([cu, cu * 0 + 10**6], dim=1)[:, 0]
    assert not column.is_contiguous()
    for a, b in zip(packed_results(x, do, dS, cu), packed_results(x, do, dS, column), strict=True):
        assert torch.equal(a, b)
    with dn_lib.checked():
        assert torch.equal(triton_rule(*x[:4], cu_seqlens=column)[0], triton_rule(*x[:4], cu_seqlens=cu)[0])


UNSAFE = {
    "padded": ([0, 70, 150], [0, 70, 150]),
    "late": ([30, 70, 200], [30, 70, 200]),
    "negative": ([-5, -1, 200], [0, 0, 200]),
    "overlong": ([0, 90, 2**31 - 1], [0, 90, 200]),
    "falling": ([0, 150, 40, 200], [0, 150, 150, 200]),
    "again-and-again": ([0, 200, 0, 200, 0, 200], [0, 200, 200, 200, 200, 200]),
    "empty": ([0, 0, 0], [0, 0, 0]),
}


@pytest.mark.parametrize("kind, d", [(BF16, 64), (BF16, 128), (F32, 64)])
@pytest.mark.parametrize("offsets, safe", UNSAFE.values(), ids=UNSAFE)
def test_offsets_lead_nowhere_outside_and_other_tokens_get_zeros(offsets, safe, kind, d):
    """Inside what memory there is around the tensors nothing is read or written; results are as for safe offsets."""

    torch._dynamo.reset()
    N, first, last = len(offsets) - 1, safe[0], safe[-1]
    # The tensors are the middle of larger ones, so that a step outside shows instead of failing.
    around = cuda_inputs(1, 600, 2, d, d, dtype=kind, state=3 * N)
    views = [y[:, 200:400] for y in around[:4]]
    state = around[4][N : 2 * N]
    kept = [y.clone() for y in around]
    for y in (*around[:4],):
        y[:, :200], y[:, 400:] = float("nan"), float("nan")
    x = [*views, state]
    do, dS = upstream(x[0], x[2], N)
    cu = torch.tensor(offsets, device="cuda")
    with poisoned():
        got = packed_results(x, do, dS, cu)
    inside = [*(y[:, first:last] for y in x[:4]), state]
    expected = packed_results(inside, do[:, first:last], dS, torch.tensor(safe, device="cuda") - first)
    for a, b in zip(got, expected, strict=True):
        if a.shape == state.shape:
            assert relative_error(a, b.double()) < BOUND[kind] or torch.equal(a, b)
            continue
        assert not a[:, :first].any() and not a[:, last:].any()
        assert last == first or relative_error(a[:, first:last], b.double()) < BOUND[kind]
    for y, before in zip(views, kept, strict=False):
        assert torch.equal(y, before[:, 200:400])
    with dn_lib.checked():
        if safe != [0, *sorted(offsets[1:-1]), 200] or offsets != safe:
            with pytest.raises(ValueError, match=r"^cu_seqlens must rise from 0 to L = 200"):
                triton_rule(*x[:4], cu_seqlens=cu)


def test_decoding_raises_the_version_of_its_state():
    *x, S = leaves(*cuda_inputs(2, 100, 2, 64, 64, dtype=BF16, state=2))
    o, state = triton_rule(*x, initial_state=S)
    token = [y[:, 0].detach() for y in x]
    loss = state.square().sum()
    version = state._version
    decode_delta_rule(*token, state.detach())
    assert state._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # small heads keep it for the backward
        o.sum().backward()
    with torch.inference_mode():
        inside = torch.zeros_like(state)
        decode_delta_rule(*token, inside)
    assert inside.any()


@pytest.mark.parametrize("gradient", [False, True])
def test_the_state_of_no_tokens_is_a_copy(gradient):
    *x, S = cuda_inputs(2, 0, 2, 64, 64, dtype=BF16, state=2)
    given = S.clone().requires_grad_(gradient)
    for backend in ("triton", "chunkwise"):
        _, state = delta_rule(*x, initial_state=given, output_final_state=True, backend=backend)
        assert torch.equal(state, S)
        state.detach().add_(1)
        assert torch.equal(given, S)


def test_torch_func_takes_the_pytorch_form():
    """ "auto" inside a transform; Triton asked for by name says what to use instead."""
    x = [y.float() for y in cuda_inputs(1, 20, 1, 16, 16)[:4]]
    run = lambda *y, **o: delta_rule(*y, **o)[0].square().sum()  # noqa: E731
    expected = torch.func.grad(lambda *y: run(*y, backend="chunkwise"))(*x)
    assert torch.equal(torch.func.grad(run)(*x), expected)
    assert torch.func.hessian(run, argnums=3)(*x).isfinite().all()
    for transform in (torch.func.grad, torch.func.jacrev, torch.vmap):
        with pytest.raises(RuntimeError, match=r"backend 'triton' does not support torch\.func.*'chunkwise'"):
            transform(lambda *y: run(*y, backend="triton"))(
                *(torch.stack([y, y]) if transform is torch.vmap else y for y in x)
            )
    y = leaves(*x)
    with pytest.raises(RuntimeError, match="use backend='chunkwise'"):
        torch.autograd.grad(triton_rule(*y)[0].sum(), y[0], torch.ones(2, device="cuda"), is_grads_batched=True)
    (dq, *_) = torch.autograd.grad(triton_rule(*y)[0].sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dq.square().sum().backward()


def test_a_compiled_decoding_step():
    """Equal to the eager one, again and again, on one state."""
    torch._dynamo.reset()
    *x, S = cuda_inputs(2, 4, 2, 64, 64, dtype=BF16, state=2)
    states = S.clone(), S.clone()
    compiled = torch.compile(decode_delta_rule)
    for t in range(4):
        token = [y[:, t] for y in x]
        a, b = decode_delta_rule(*token, states[0]), compiled(*token, states[1])
        assert relative_error(b, a.double()) < BOUND[BF16] and relative_error(states[1], states[0].double()) < 1e-5


# --- PyTorch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_compiled_equals_eager(norm, packed):
    torch._dynamo.reset()
    cu = torch.tensor([0, 50, 50, 200], device="cuda") if packed else None
    x = cuda_inputs(1, 200, 2, 64, 64, dtype=BF16, state=3 if packed else 1, unit=not norm)

    def run(*x, initial_state):
        return triton_rule(*(y * 1 for y in x), initial_state=initial_state, qk_l2norm=norm, cu_seqlens=cu)

    do, dS = upstream(x[0], x[2], len(x[4]))
    do = do.mT.contiguous().mT
    compiled = torch.compile(run, fullgraph=True)
    for a, b in zip(*(forward_and_gradients(f, leaves(*x), do, dS) for f in (run, compiled)), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    with torch.no_grad():
        for a, b in zip(run(*x[:4], initial_state=x[4]), compiled(*x[:4], initial_state=x[4]), strict=True):
            # Eagerly the fused kernel, whose sums may differ in order.
            assert relative_error(b, a.double()) < BOUND[BF16]


def test_compiled_where_a_sequence_is_split():
    torch._dynamo.reset()
    x = cuda_inputs(1, 8192, 2, 128, 128, dtype=BF16, state=1)
    do, dS = upstream(x[0], x[2], 1)
    compiled = torch.compile(triton_rule, fullgraph=True)
    for a, b in zip(*(forward_and_gradients(f, leaves(*x), do, dS) for f in (triton_rule, compiled)), strict=True):
        assert torch.equal(a, b)


def test_compiled_names_of_fla():
    torch._dynamo.reset()
    x = cuda_inputs(1, 100, 2, 64, 64, dtype=BF16)[:4]
    with torch.no_grad():
        expected = fused_recurrent_delta_rule(*x)[0]
        for function in (dn_lib.chunk_delta_rule, fused_recurrent_delta_rule):
            compiled = torch.compile(function, fullgraph=True)
            assert relative_error(compiled(*x)[0], expected.double()) < 2 * BOUND[BF16]


def test_autocast():
    *x, S = cuda_inputs(2, 100, 2, 64, 64, dtype=F32, state=2)
    expected = triton_rule(*(y.to(BF16) for y in x[:3]), x[3], initial_state=S, chunk_size=64)
    with torch.autocast("cuda", dtype=BF16):
        o, state = triton_rule(*x, initial_state=S, chunk_size=64)
        exact, _ = delta_rule(*(y.double() for y in x))
    assert o.dtype == BF16 and state.dtype == F32 and exact.dtype == torch.float64
    assert torch.equal(o, expected[0]) and torch.equal(state, expected[1])


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("L, packed", [(200, False), (1024, False), (200, True)])
def test_cuda_graph(backward, L, packed):
    cu = torch.tensor([0, 50, 50, L], device="cuda") if packed else None
    sequences = 3 if packed else 1
    static = leaves(*cuda_inputs(1, L, 2, 64, 64, dtype=BF16, state=sequences))
    do, dS = upstream(static[0], static[2], sequences)

    def run(tensors):
        if backward:
            return forward_and_gradients(triton_rule, tensors, do, dS, cu_seqlens=cu)
        with torch.no_grad():
            return triton_rule(*tensors[:4], initial_state=tensors[4], cu_seqlens=cu)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(static)
    fresh = cuda_inputs(1, L, 2, 64, 64, dtype=BF16, state=sequences, seed=5)
    with torch.no_grad():
        for a, b in zip(static, fresh, strict=True):
            a.copy_(b)
    graph.replay()
    for a, b in zip(captured, run(leaves(*fresh)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("norm, state", [(False, False), (True, True)])
def test_opcheck(norm, state):
    *x, S = leaves(*cuda_inputs(1, 100, 2, 64, 64, dtype=BF16, state=1 if state else None))
    arguments = (*x, None, S, None, 0.3, norm, 64, True)
    torch.library.opcheck(torch.ops.dn_lib.delta_rule, arguments)
    o, last, *saved = (y.detach() for y in torch.ops.dn_lib.delta_rule(*arguments))
    q, k, _, beta, S = (None if y is None else y.detach() for y in (*x, S))
    do = torch.randn_like(o).transpose(1, 2).contiguous().transpose(1, 2)
    arguments = (q, k, None, beta, S, None, last, saved, do, torch.randn_like(last), 0.3, 64)
    torch.library.opcheck(torch.ops.dn_lib.delta_rule_backward, arguments)


@pytest.mark.parametrize("packed", [False, True])
def test_a_call_does_not_wait_for_the_gpu(packed):
    cu = torch.tensor([0, 50, 50, 200], device="cuda") if packed else None
    x = leaves(*cuda_inputs(1, 200, 2, 64, 64, dtype=BF16, state=3 if packed else 1))
    do, dS = upstream(x[0], x[2], len(x[4]))
    token = [y.detach()[:, 0] for y in x[:4]]
    state = torch.zeros(1, 2, 64, 64, device="cuda")

    def run():
        forward_and_gradients(triton_rule, x, do, dS, cu_seqlens=cu)
        with torch.no_grad():
            delta_rule(*x[:4], initial_state=x[4], cu_seqlens=cu)
            fused_recurrent_delta_rule(*x[:4], initial_state=x[4], cu_seqlens=cu)
        decode_delta_rule(*token, state)

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_backward_that_begins_in_a_new_thread():
    """Descriptors need a CUDA context in the thread that makes them, which nothing before the first one binds."""
    from dn_lib.kernels.delta_rule import launch

    q, k, v, beta, _ = cuda_inputs(1, 1024, 2, 64, 64, dtype=BF16)
    plan = plan_call(q, k, v, training=True, chunk=64)
    assert plan.launches["chunk_scan_bwd"].tma
    shared = {"plan": plan, "q": q, "k": k, "beta": beta, "scale": 0.1}
    *_, saved = launch.forward(**shared, v=v)

    def backward():
        return launch.backward(**shared, saved=saved, do=v, dstate=None, initial_state=False)

    expected, found = backward(), []  # and what it allotted is in the cache: the thread need not ask the driver
    thread = threading.Thread(target=lambda: found.extend(backward()))
    thread.start()
    thread.join()
    assert found and all(torch.equal(a, b) for a, b in zip(found[:4], expected[:4], strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("d", [64, 128])
def test_a_gpu_that_is_not_the_current_one(d):
    x = cuda_inputs(2, 1024, 2, d, d, dtype=BF16, state=2)
    do, dS = upstream(x[0], x[2], 2)
    here = forward_and_gradients(triton_rule, leaves(*x), do, dS)
    other = [y.to("cuda:1") for y in (*x, do, dS)]
    assert torch.cuda.current_device() == 0
    there = forward_and_gradients(triton_rule, leaves(*other[:5]), *other[5:])
    assert all(b.device.index == 1 and torch.equal(a, b.to(a.device)) for a, b in zip(here, there, strict=True))
    state = torch.zeros(2, 2, d, d, device="cuda:1")
    decode_delta_rule(*(y[:, 0].detach() for y in other[:4]), state)
    assert state.isfinite().all() and state.any() and torch.cuda.current_device() == 0


def test_batch_length_and_heads_compile_at_most_once_more():
    from dn_lib.kernels.delta_rule import backward, forward

    kernels = (
        forward.inverse_norms,
        forward.chunk_inverse,
        forward.chunk_scan_fwd,
        backward.chunk_scan_bwd,
        backward.chunk_bwd_dqk,
    )

    def compiled():
        device = torch.cuda.current_device()
        return {kernel.fn.__name__: len(kernel.device_caches[device][0]) for kernel in kernels}

    def run(B, L, H, d):
        x = cuda_inputs(B, L, H, d, d, dtype=BF16, state=B)
        forward_and_gradients(triton_rule, leaves(*x), *upstream(x[0], x[2], B))

    for d in (64, 128):
        run(2, 100, 2, d)
        before = compiled()
        assert sum(before.values()) > 0
        for B, L, H in itertools.product((1, 3, 16), (1, 17, 64, 500), (1, 5, 16)):
            run(B, L, H, d)
        grown = {name: count - before[name] for name, count in compiled().items()}
        assert max(grown.values()) <= 1, grown


@pytest.mark.parametrize("kind", [BF16, F32])
def test_prefill_then_decode_equals_one_pass(kind):
    q, k, v, beta, _ = cuda_inputs(3, 100, 4, 64, 64, dtype=kind, unit=False, beta_max=1.0)
    options = {"qk_l2norm": True, "scale": 0.4}
    with torch.no_grad():
        whole, end = triton_rule(q, k, v, beta, **options)
        o, state = triton_rule(*(x[:, :90] for x in (q, k, v, beta)), **options)
        outputs, address = [o], state.data_ptr()
        for t in range(90, 100):
            outputs.append(decode_delta_rule(*(x[:, t] for x in (q, k, v, beta)), state, **options)[:, None])
        exact, last = exact_rule(*(x.double() for x in (q, k, v, beta)), **options)
    assert state.data_ptr() == address
    assert relative_error(torch.cat(outputs, 1), exact) < BOUND[kind] and relative_error(state, last) < BOUND[kind]
    assert relative_error(whole, exact) < BOUND[kind] and relative_error(end, last) < BOUND[kind]


def test_auto_on_a_gpu():
    """Triton where it can; chunkwise for float64 and, with one warning, for heads above 256."""
    x = cuda_inputs(1, 40, 1, 64, 64, dtype=BF16)[:4]
    assert torch.equal(delta_rule(*x)[0], triton_rule(*x)[0])
    assert delta_rule(*(y.double() for y in x))[0].dtype == torch.float64
    forget_warnings()
    wide = cuda_inputs(1, 5, 1, 257, 8, dtype=BF16)[:4]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            expected = delta_rule(*wide, backend="chunkwise")[0]
            assert torch.equal(delta_rule(*wide)[0], expected)
    assert len([w for w in seen if "head size 257 is above 256" in str(w.message)]) == 1


def test_tensors_on_two_devices_are_named():
    *x, S = cuda_inputs(1, 5, 1, 16, 16, state=1)
    for i, name in ((1, "k"), (2, "v"), (3, "beta")):
        mixed = [y.cpu() if j == i else y for j, y in enumerate(x)]
        with pytest.raises(ValueError, match=f"{name} must be on cuda:0 like q, got cpu"):
            delta_rule(*mixed)
    with pytest.raises(ValueError, match="initial_state must be on cuda:0 like q, got cpu"):
        delta_rule(*x, initial_state=S.cpu())
    with pytest.raises(ValueError, match="cu_seqlens must be on cuda:0 like q, got cpu"):
        delta_rule(*x, cu_seqlens=torch.tensor([0, 5]))
