"""Chapter 1's functions against a float64 recurrence written here, on shapes that hypothesis draws."""

import math

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dn_lib.forms import decay as decays
from dn_lib.forms import linear_attention as la
from dn_lib.testing import linear_attention_inputs, relative_error

FORMS = {
    "recurrent": la.recurrent_linear_attention,
    "parallel": la.parallel_linear_attention,
    "chunkwise": la.chunkwise_linear_attention,
}
# Sums of up to 300 products: a few hundred rounding errors, far below these, in either type.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
lengths, widths = st.integers(1, 300), st.integers(1, 96)


def draw(length, d_k, d_v, seed=0, dtype=torch.float64, batch=()):
    inputs = linear_attention_inputs(*batch, length, d_k, d_v, seed=seed, state=batch)
    return [x.to(dtype) for x in inputs]


def reference(q, k, v, state=None, scale=None, decay=None):
    """The recurrence of eq-linear-attention in float64, with none of the library's code."""
    q, k, v = q.double(), k.double(), v.double()
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    state = torch.zeros(*k.shape[:-2], k.shape[-1], v.shape[-1]).double() if state is None else state.double()
    outputs = torch.zeros(*q.shape[:-1], v.shape[-1]).double()
    for t in range(q.shape[-2]):
        if decay is not None:
            state = torch.einsum("...d,...de->...de", decay[..., t, :].double(), state)
        state = state + torch.einsum("...d,...e->...de", k[..., t, :], v[..., t, :])
        outputs[..., t, :] = scale * torch.einsum("...de,...d->...e", state, q[..., t, :])
    return outputs, state


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@few
@given(
    length=lengths,
    d_k=widths,
    d_v=widths,
    chunk=st.integers(1, 320),
    start=st.booleans(),
    seed=st.integers(0, 99),
)
@example(length=300, d_k=96, d_v=96, chunk=64, start=True, seed=0)
@example(length=1, d_k=1, d_v=1, chunk=1, start=False, seed=1)
def test_forms_agree_with_the_recurrence(dtype, length, d_k, d_v, chunk, start, seed):
    q, k, v, state = draw(length, d_k, d_v, seed, dtype)
    state = state if start else None
    o_ref, state_ref = reference(q, k, v, state)
    for name, form in FORMS.items():
        extra = {"chunk_size": chunk} if name == "chunkwise" else {}
        o, final = form(q, k, v, initial_state=state, **extra)
        assert o.dtype == final.dtype == dtype
        assert relative_error(o, o_ref) < TOLERANCE[dtype], name
        assert relative_error(final, state_ref) < TOLERANCE[dtype], name


@pytest.mark.parametrize("name", FORMS)
def test_batches_scale_and_split(name):
    """Leading dimensions are independent, scale is a factor, and a state carries a sequence on."""
    q, k, v, state = draw(37, 8, 6, batch=(2, 3))
    form = FORMS[name]
    o, final = form(q, k, v, scale=0.3, initial_state=state)
    o_ref, final_ref = reference(q, k, v, state, scale=0.3)
    assert relative_error(o, o_ref) < 1e-12 and relative_error(final, final_ref) < 1e-12
    head, half = form(q[..., :20, :], k[..., :20, :], v[..., :20, :], scale=0.3, initial_state=state)
    tail, end = form(q[..., 20:, :], k[..., 20:, :], v[..., 20:, :], scale=0.3, initial_state=half)
    assert relative_error(torch.cat([head, tail], dim=-2), o_ref) < 1e-12
    assert relative_error(end, final_ref) < 1e-12


@pytest.mark.parametrize("name", FORMS)
def test_empty_sequence(name):
    q, k, v, state = draw(0, 4, 3, batch=(2,))
    o, final = FORMS[name](q, k, v, initial_state=state)
    assert o.shape == (2, 0, 3)
    assert torch.equal(final, state)
    o, final = FORMS[name](q, k, v)
    assert o.shape == (2, 0, 3) and torch.equal(final, torch.zeros(2, 4, 3, dtype=torch.float64))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_inputs(name, dtype):
    q, k, v, state = draw(100, 16, 16, dtype=dtype)
    o, final = FORMS[name](q, k, v, initial_state=state.float())
    o_ref, final_ref = reference(q, k, v, state)
    assert o.dtype == dtype and final.dtype == torch.float32
    # The inputs are the same rounded numbers: only the output is rounded again.
    assert relative_error(o, o_ref) < torch.finfo(dtype).eps and relative_error(final, final_ref) < 1e-5


@pytest.mark.parametrize("name", FORMS)
def test_gradients(name):
    inputs = [x.requires_grad_() for x in draw(7, 3, 4)]
    extra = {"chunk_size": 3} if name == "chunkwise" else {}

    def run(q, k, v, state):
        return FORMS[name](q, k, v, initial_state=state, **extra)

    assert torch.autograd.gradcheck(run, inputs)
    weights = torch.randn(7, 4, dtype=torch.float64)
    grads = torch.autograd.grad((run(*inputs)[0] * weights).sum(), inputs)
    o = la.recurrent_linear_attention(*inputs[:3], initial_state=inputs[3])[0]
    expected = torch.autograd.grad((o * weights).sum(), inputs)
    assert all(relative_error(g, e) < 1e-12 for g, e in zip(grads, expected, strict=True))


def test_step_continues_a_prompt():
    q, k, v, _ = draw(12, 5, 4)
    expected, _ = reference(q, k, v)
    _, state = la.chunkwise_linear_attention(q[:9], k[:9], v[:9], chunk_size=4)
    for t in range(9, 12):
        o, state = la.linear_attention_step(q[t], k[t], v[t], state)
        assert relative_error(o, expected[t]) < 1e-12


@few
@given(length=st.integers(1, 40), d_k=st.integers(1, 24), d_v=st.integers(1, 24), seed=st.integers(0, 99))
def test_softmax_and_kernel_attention(length, d_k, d_v, seed):
    q, k, v, _ = draw(length, d_k, d_v, seed)
    o = la.softmax_attention(q, k, v, scale=0.7)
    p = la.kernel_attention(q, k, v)
    for i in range(length):
        w = torch.exp(0.7 * k[: i + 1] @ q[i])
        assert relative_error(o[i], w @ v[: i + 1] / w.sum()) < 1e-12
        w = la.elu_feature_map(k[: i + 1]) @ la.elu_feature_map(q[i])
        assert relative_error(p[i], w @ v[: i + 1] / w.sum()) < 1e-12
    r, (state, z) = la.recurrent_kernel_attention(q, k, v)
    assert relative_error(r, p) < 1e-12
    assert relative_error(state, la.elu_feature_map(k).T @ v) < 1e-12
    assert relative_error(z, la.elu_feature_map(k).sum(0)) < 1e-12


def test_kernel_attention_of_nothing_and_of_half_precision():
    q, k, v, _ = draw(0, 4, 3)
    assert la.softmax_attention(q, k, v).shape == la.kernel_attention(q, k, v).shape == (0, 3)
    assert la.recurrent_kernel_attention(q, k, v)[0].shape == (0, 3)
    q, k, v, _ = draw(20, 4, 3, dtype=torch.bfloat16)
    for fn in (la.softmax_attention, la.kernel_attention):
        assert fn(q, k, v).dtype == torch.bfloat16
        assert relative_error(fn(q, k, v), fn(q.double(), k.double(), v.double())) < torch.finfo(torch.bfloat16).eps


def test_elu_feature_map_is_positive_and_has_a_bounded_log_slope():
    x = torch.linspace(-20, 20, 401, dtype=torch.float64, requires_grad=True)
    phi = la.elu_feature_map(x)
    (slope,) = torch.autograd.grad(phi.sum(), x)
    assert (phi > 0).all() and (slope - phi <= 1e-6 * phi).all()


@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("degree", [0, 1, 4])
def test_taylor_feature_map(d, degree):
    x, y = draw(2, d, 1)[0]
    phi = la.taylor_feature_map(x, degree)
    assert phi.shape == (sum(d**n for n in range(degree + 1)),)
    expected = sum((x @ y) ** n / math.factorial(n) for n in range(degree + 1))
    assert abs(phi @ la.taylor_feature_map(y, degree) - expected) < 1e-12 * max(1, abs(expected))


@pytest.mark.parametrize("length, chunk", [(64, 16), (70, 16), (5, 64), (0, 4)])
def test_flops_are_those_counted(length, chunk):
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v, _ = draw(length, 8, 12)
    with FlopCounterMode(display=False) as counter:
        la.chunkwise_linear_attention(q, k, v, chunk_size=chunk)
    assert counter.get_total_flops() == la.chunkwise_flops(length, 8, 12, chunk)


def test_retrieval_error_measured_and_predicted():
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=g, dtype=torch.float64))[0]
    values = torch.randn(16, 5, generator=g, dtype=torch.float64)
    assert la.retrieval_error(basis, values).max() < 1e-24  # orthonormal keys: perfect recall
    d, n, trials = 32, 20, 400
    keys = torch.stack([la.random_unit_keys(n, d, g) for _ in range(trials)])
    values = torch.randn(trials, n, 16, generator=g, dtype=torch.float64) / 4
    measured = la.retrieval_error(keys, values).mean(-1)
    spread = measured.std() / trials**0.5
    assert abs(measured.mean() - la.expected_retrieval_error(n, d)) < 4 * spread < 0.05


@few
@given(length=st.integers(0, 40), d_k=st.integers(1, 16), d_v=st.integers(1, 16), seed=st.integers(0, 99))
def test_decay(length, d_k, d_v, seed):
    q, k, v, state = draw(length, d_k, d_v, seed)
    decay = torch.rand(length, d_k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    o, final = decays.recurrent_decay_attention(q, k, v, decay, initial_state=state)
    o_ref, final_ref = reference(q, k, v, state, decay=decay)
    assert relative_error(o, o_ref) < 1e-12 and relative_error(final, final_ref) < 1e-12
    plain = decays.recurrent_decay_attention(q, k, v, torch.ones_like(k), initial_state=state)
    assert torch.equal(plain[0], la.recurrent_linear_attention(q, k, v, initial_state=state)[0])


def shape_errors():
    q, k, v, state = draw(5, 4, 3)
    step = la.linear_attention_step
    return {
        "k must": lambda f: f(q, k[:, :2], v),
        "v must": lambda f: f(q, k, v[:4]),
        "initial_state must": lambda f: f(q, k, v, initial_state=state.T),
        "q must": lambda f: f(q[0], k[0], v[0]),
        "k must be a floating": lambda f: f(q, k.long(), v),
    }, {
        "k must": lambda: step(q[0], k[0, :2], v[0], state),
        "v must": lambda: step(q, k, v[:2], state),
        "state must": lambda: step(q[0], k[0], v[0], state.T),
        "chunk_size must": lambda: la.chunkwise_linear_attention(q, k, v, chunk_size=0),
        "chunk_size must be an": lambda: la.chunkwise_linear_attention(q, k, v, chunk_size=2.0),
        "decay must": lambda: decays.recurrent_decay_attention(q, k, v, k[:, :1]),
        "q must be a floating": lambda: la.softmax_attention(q[0], k[0], v[0]),
        "v must be [": lambda: la.retrieval_error(k, v[:2]),
    }


@pytest.mark.parametrize("message", shape_errors()[0])
@pytest.mark.parametrize("name", FORMS)
def test_bad_arguments_of_the_forms(name, message):
    with pytest.raises(ValueError) as info:
        shape_errors()[0][message](FORMS[name])
    assert str(info.value).startswith(message) and "\n" not in str(info.value)


@pytest.mark.parametrize("message", shape_errors()[1])
def test_bad_arguments_elsewhere(message):
    with pytest.raises(ValueError) as info:
        shape_errors()[1][message]()
    assert str(info.value).startswith(message) and "\n" not in str(info.value)
