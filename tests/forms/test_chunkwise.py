"""Chapter 4's module: every form against the recurrence in float64, and every gradient against autograd.

Errors are relative to the larger of |reference| and |q| |S|, where |S| is the larger of the norms of the
first and the last state: outputs and states are sums that may cancel, and no algorithm can do better than a
few roundings of their terms.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dn_lib.forms.chunkwise as ch
from dn_lib.forms import affine, chunkwise_backward, common
from dn_lib.forms.delta_rule import delta_rule_step, recurrent_delta_rule
from dn_lib.testing import delta_rule_inputs, relative_error

F64, F32 = torch.float64, torch.float32
FORMS = {
    "chunkwise": ch.chunkwise_delta_rule,
    "reversible": chunkwise_backward.reversible_chunkwise_delta_rule,
    "parallel": lambda *x, chunk_size, **options: ch.parallel_delta_rule(*x, **options),
}
form_names = st.sampled_from(list(FORMS))


def make(length, d_k, d_v, *, seed=0, lead=(), with_state=True, correlated=0.0, dtype=F64):
    """q, k (unit), v, beta in (0, 2), initial state, all in `dtype`."""
    sizes, state = (*lead, length, d_k, d_v), lead if with_state else None
    inputs = delta_rule_inputs(*sizes, seed=seed, dtype=F64, bias=correlated, state=state)
    return tuple(x if x is None else x.to(dtype) for x in inputs)


def sizes(q, state, initial_state):
    """|scaled q| |S|, the size of the terms that an output is the sum of, and |S|."""
    largest = max(x.norm().item() for x in (state, initial_state) if x is not None)
    return q.norm().item() * q.shape[-1] ** -0.5 * largest, largest


def recurrence(q, k, v, beta, S):
    """o, the last state, and the largest |S_t|: what is erased later leaves its rounding errors behind."""
    S = q.new_zeros(k.shape[-1], v.shape[-1]) if S is None else S
    outputs, largest = [], S.norm().item()
    for t in range(len(beta)):
        o, S = delta_rule_step(q[t], k[t], v[t], beta[t], S)
        outputs.append(o)
        largest = max(largest, S.norm().item())
    return torch.stack(outputs), S, largest


def accumulated(length, d_k, chunk, dtype):
    """What the roundings of one computation may add up to, relative to the largest state, in any order of the sums.

    Each of `length` writes goes through sums over the key channels and over its chunk. The maps that carry an error on
    never enlarge it, so n roundings of u = eps / 2 with independent signs stay below 6 sqrt(n) u, but for a chance of
    2 exp(-18). Two computations are compared, hence eps.
    """
    return 6 * (length * (d_k + min(chunk, length))) ** 0.5 * torch.finfo(dtype).eps


def gradients(fn, inputs, do, dstate, **options):
    leaves = [x.clone().requires_grad_() for x in inputs if x is not None]
    o, state = fn(*leaves[:4], initial_state=leaves[4] if len(leaves) == 5 else None, **options)
    return torch.autograd.grad((o, state), leaves, (do, dstate))


# Forward ------------------------------------------------------------------------------------------------
@settings(max_examples=80, deadline=None)
@given(
    form=form_names,
    length=st.integers(1, 300),
    d_k=st.integers(1, 96),
    d_v=st.integers(1, 96),
    chunk_size=st.sampled_from([16, 32, 64]),
    with_state=st.booleans(),
    correlated=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_forms_equal_recurrence(form, length, d_k, d_v, chunk_size, with_state, correlated, seed):
    *inputs, S = make(length, d_k, d_v, seed=seed, with_state=with_state, correlated=correlated)
    o, state, largest = recurrence(*inputs, S)
    of_output = inputs[0].norm().item() * d_k**-0.5 * largest
    for dtype in (F64, F32):
        args = [x.to(dtype) for x in inputs]
        got, last = FORMS[form](*args, initial_state=None if S is None else S.to(dtype), chunk_size=chunk_size)
        assert got.dtype == last.dtype == dtype
        bound = accumulated(length, d_k, length if form == "parallel" else chunk_size, dtype)
        assert relative_error(got, o, of_output) < bound
        assert relative_error(last, state, largest) < bound


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("form", FORMS)
def test_any_chunk_size_and_leading_dimensions(form, chunk_size):
    *inputs, S = make(37, 5, 3, lead=(2, 3))
    o, state = recurrent_delta_rule(*inputs, scale=0.7, initial_state=S)
    got, last = FORMS[form](*inputs, scale=0.7, initial_state=S, chunk_size=chunk_size)
    assert relative_error(got, o) < 1e-13 and relative_error(last, state) < 1e-13


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("form", FORMS)
def test_equal_keys_and_beta_at_its_ends(form, beta):
    q, k, v, b, S = make(130, 8, 4)
    k, b = k[:1].expand_as(k), torch.full_like(b, beta)
    o, state = recurrent_delta_rule(q, k, v, b, initial_state=S)
    got, last = FORMS[form](q, k, v, b, initial_state=S, chunk_size=64)
    of_output, of_state = sizes(q, state, S)
    assert relative_error(got, o, of_output) < 1e-12 and relative_error(last, state, of_state) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_empty_sequence_returns_the_state(form):
    *inputs, S = make(0, 4, 3, lead=(2,))
    o, state = FORMS[form](*inputs, initial_state=S, chunk_size=16)
    assert o.shape == (2, 0, 3) and torch.equal(state, S)
    (dS,) = torch.autograd.grad(FORMS[form](*inputs, initial_state=S.requires_grad_(), chunk_size=16)[1].sum(), S)
    assert torch.equal(dS, torch.ones_like(S))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_inputs_are_computed_in_float32(form, dtype):
    *inputs, S = make(70, 16, 8, dtype=dtype)
    o, state = FORMS[form](*inputs, initial_state=S, chunk_size=16)
    wide, wide_state = FORMS[form](*(x.float() for x in inputs), initial_state=S.float(), chunk_size=16)
    assert o.dtype == dtype and state.dtype == F32
    assert torch.equal(o, wide.to(dtype)) and torch.equal(state, wide_state)


@pytest.mark.parametrize("form", FORMS)
def test_float64_state_asks_for_float64(form):
    *inputs, S = make(20, 4, 3, dtype=F32)
    o, state = FORMS[form](*inputs, initial_state=S.double(), chunk_size=8)
    want_o, want = recurrent_delta_rule(*inputs, initial_state=S.double())
    assert o.dtype == want_o.dtype and state.dtype == want.dtype == F64
    assert relative_error(state, want) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_batch_is_the_same_as_a_loop(form):
    *inputs, S = make(20, 4, 3, lead=(3,))
    together = FORMS[form](*inputs, initial_state=S, chunk_size=8)[0]
    alone = [FORMS[form](*(x[b] for x in inputs), initial_state=S[b], chunk_size=8)[0] for b in range(3)]
    assert relative_error(together, torch.stack(alone)) < 1e-14


def test_attention_matrix_applied_to_values_is_the_output():
    q, k, v, beta, _ = make(60, 6, 5, lead=(2,))
    A = ch.delta_attention_matrix(q, k, beta)
    assert torch.equal(A, A.tril())
    assert relative_error(A @ v, recurrent_delta_rule(q, k, v, beta)[0]) < 1e-13


# Errors -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"v": torch.zeros(2, 9, 3)}, "v must be"),
        ({"k": torch.zeros(2, 10, 5)}, "k must be"),
        ({"beta": torch.zeros(10, 2)}, "beta must be"),
        ({"initial_state": torch.zeros(2, 3, 4)}, "initial_state must be"),
        ({"q": torch.zeros(4)}, "q must be"),
    ],
)
def test_bad_shapes_are_named_in_one_line(form, change, named):
    shapes = {"q": (2, 10, 4), "k": (2, 10, 4), "v": (2, 10, 3), "beta": (2, 10), "initial_state": (2, 4, 3)}
    args = {name: torch.zeros(*shape) for name, shape in shapes.items()} | change
    with pytest.raises(ValueError, match=rf"^{named}") as caught:
        FORMS[form](**args, chunk_size=4) if form != "parallel" else ch.parallel_delta_rule(**args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("chunk_size", [0, -1, 2.5])
@pytest.mark.parametrize("form", ["chunkwise", "reversible"])
def test_bad_chunk_size_is_named(form, chunk_size):
    *inputs, _ = make(4, 2, 2)
    with pytest.raises(ValueError, match=r"^chunk_size must be"):
        FORMS[form](*inputs, chunk_size=chunk_size)


@pytest.mark.parametrize("offsets", [[0], [0, 3], [1, 10], [0, 6, 4, 10]])
def test_bad_offsets_are_named(offsets):
    *inputs, _ = make(10, 2, 2)
    with pytest.raises(ValueError, match=r"^cu_seqlens must"):
        ch.varlen_delta_rule(*inputs, torch.tensor(offsets))


# Backward -----------------------------------------------------------------------------------------------
@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any),
    d_k=st.integers(1, 24),
    d_v=st.integers(1, 24),
    chunk_size=st.sampled_from([1, 5, 16, 64]),
    with_state=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_handwritten_backward_equals_autograd_varlen(lengths, d_k, d_v, chunk_size, with_state, seed):
    g = torch.Generator().manual_seed(seed)
    q, k, v, beta, _ = make(sum(lengths), d_k, d_v, seed=seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    shape = (len(lengths), d_k, d_v)
    S = torch.randn(shape, generator=g, dtype=F64) if with_state else None
    do, dstate = (torch.randn(s, generator=g, dtype=F64) for s in (v.shape, shape))

    def run(form, **options):
        return gradients(
            lambda *x, **o: ch.varlen_delta_rule(*x, offsets, form=form, **o, **options),
            (q, k, v, beta, S), do, dstate,
        )  # fmt: skip

    by_hand = run(chunkwise_backward.reversible_chunkwise_delta_rule, chunk_size=chunk_size)
    for form, options in ((recurrent_delta_rule, {}), (ch.chunkwise_delta_rule, {"chunk_size": chunk_size})):
        for a, b in zip(by_hand, run(form, **options), strict=True):
            assert relative_error(a, b) < 1e-10


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    *inputs, S = make(7, 3, 2, lead=(2,))
    leaves = [x.requires_grad_() for x in (*inputs, S)]
    assert torch.autograd.gradcheck(
        lambda *x: FORMS[form](*x[:4], initial_state=x[4], chunk_size=3), leaves, fast_mode=True
    )


def test_handwritten_backward_without_gradient_of_one_output():
    *inputs, _ = make(30, 4, 3)
    for pick in (0, 1):
        grads = []
        for form in (chunkwise_backward.reversible_chunkwise_delta_rule, recurrent_delta_rule):
            leaves = [x.clone().requires_grad_() for x in inputs]
            grads.append(torch.autograd.grad(form(*leaves)[pick].square().sum(), leaves, allow_unused=True))
        for a, b in zip(*grads, strict=True):
            assert relative_error(a, torch.zeros_like(a) if b is None else b) < 1e-12


def test_handwritten_backward_in_half_precision():
    *inputs, S = make(50, 8, 4)
    leaves = [x.bfloat16().requires_grad_() for x in (*inputs, S)]
    o, state = chunkwise_backward.reversible_chunkwise_delta_rule(*leaves[:4], initial_state=leaves[4], chunk_size=16)
    grads = torch.autograd.grad((o.float().sum() + state.sum()), leaves)
    assert [g.dtype for g in grads] == [torch.bfloat16] * 5
    wide = [x.detach().double().requires_grad_() for x in leaves]
    o, state = recurrent_delta_rule(*wide[:4], initial_state=wide[4])
    for a, b in zip(grads, torch.autograd.grad(o.sum() + state.sum(), wide), strict=True):
        assert relative_error(a, b) < 2**-8  # each gradient is rounded to bfloat16 once


def test_second_derivatives_are_refused():
    leaves = [x.requires_grad_() for x in make(5, 2, 2)[:4]]
    (grad, *_) = torch.autograd.grad(
        chunkwise_backward.reversible_chunkwise_delta_rule(*leaves)[0].square().sum(), leaves, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_chunk_errors_are_the_errors_of_the_recurrence():
    q, k, v, beta, S = make(20, 5, 3)
    errors = chunkwise_backward.chunk_errors(k, v, beta, S)
    for t in range(20):
        _, before = recurrent_delta_rule(q[:t], k[:t], v[:t], beta[:t], initial_state=S)
        assert relative_error(errors[t], v[t] - before.mT @ k[t]) < 1e-12


# Costs --------------------------------------------------------------------------------------------------
def test_saved_bytes_grow_as_the_text_says():
    inputs = [x.requires_grad_() for x in make(256, 8, 4)[:4]]
    assert ch.saved_bytes(chunkwise_backward.reversible_chunkwise_delta_rule, *inputs) == 8 * (256 * 21 + 32)
    assert ch.saved_bytes(ch.chunkwise_delta_rule, *inputs) > 4 * 8 * (256 * 21 + 32)


def test_multiply_adds_of_a_batch_are_those_of_its_members():
    one = ch.multiply_adds(ch.chunkwise_delta_rule, *make(64, 8, 4)[:4], chunk_size=16)
    three = ch.multiply_adds(ch.chunkwise_delta_rule, *make(64, 8, 4, lead=(3,))[:4], chunk_size=16)
    assert three == 3 * one > 0


# Variable lengths ---------------------------------------------------------------------------------------
def test_varlen_equals_one_at_a_time_and_packs_states():
    q, k, v, beta, _ = make(30, 4, 3, lead=(2,))
    S = torch.randn(2, 3, 4, 3, dtype=F64, generator=torch.Generator().manual_seed(5))
    o, states = ch.varlen_delta_rule(q, k, v, beta, torch.tensor([0, 11, 11, 30]), initial_state=S)
    for n, piece in enumerate((slice(0, 11), slice(11, 11), slice(11, 30))):
        x = [x[:, piece] for x in (q, k, v, beta)]
        want, state = recurrent_delta_rule(*x, initial_state=S[:, n])
        assert torch.allclose(o[:, piece], want, atol=1e-12) and relative_error(states[:, n], state) < 1e-12


# Affine maps --------------------------------------------------------------------------------------------
@settings(max_examples=20, deadline=None)
@given(length=st.integers(0, 90), d_k=st.integers(1, 12), d_v=st.integers(1, 12), seed=st.integers(0, 999))
def test_segment_affine_is_the_composition_of_chunks(length, d_k, d_v, seed):
    _, k, v, beta, S = make(length, d_k, d_v, seed=seed)
    pair = torch.eye(d_k, dtype=F64), torch.zeros(d_k, d_v, dtype=F64)
    for c in common.chunk_slices(length, 16):
        pair = affine.compose_affine(affine.chunk_affine(k[c], v[c], beta[c]), pair)
    M, X = affine.segment_affine(k, v, beta, chunk_size=16)
    assert torch.allclose(M, pair[0], atol=1e-12) and torch.allclose(X, pair[1], atol=1e-11)
    _, final = recurrent_delta_rule(k, k, v, beta, initial_state=S)
    assert relative_error(M @ S + X, final, S.norm().item()) < 1e-12
    assert relative_error(affine.segment_affine(k, v, beta, initial_state=S)[1], final, S.norm().item()) < 1e-12


def test_composition_is_associative_and_does_not_commute():
    a, b, c = (affine.chunk_affine(*make(9, 4, 3, seed=seed)[1:4]) for seed in range(3))
    left, right = (
        affine.compose_affine(affine.compose_affine(c, b), a),
        affine.compose_affine(c, affine.compose_affine(b, a)),
    )
    assert all(relative_error(x, y) < 1e-13 for x, y in zip(left, right, strict=True))
    swapped = affine.compose_affine(affine.compose_affine(b, c), a)
    assert all(relative_error(x, y) > 1e-2 for x, y in zip(left, swapped, strict=True))


def test_segment_state_gradient_is_that_of_autograd():
    *inputs, S = make(50, 6, 4)
    do, dstate = torch.randn_like(inputs[2]), torch.randn_like(S)
    dS = gradients(recurrent_delta_rule, (*inputs, S), do, dstate)[4]
    q, k, _, beta = inputs
    got = affine.segment_state_gradient(q * 6**-0.5, k, beta, do, dstate, chunk_size=16)
    assert relative_error(got, dS) < 1e-12
