"""The delta rule one token at a time: against hand-computed numbers, its own properties and bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dn_lib.forms.delta_rule import delta_rule_step, erase_write, recurrent_delta_rule, sweep_matrix, sweep_rate
from dn_lib.forms.gated import recurrent_gated_delta_rule
from dn_lib.forms.gated_delta_rule import gated_delta_rule_step
from dn_lib.forms.linear_attention import recurrent_linear_attention
from dn_lib.testing import delta_rule_inputs

SIZES = {
    "length": st.integers(0, 12),
    "d_k": st.integers(1, 9),
    "d_v": st.integers(1, 9),
    "batch": st.sampled_from([(), (1,), (3,), (2, 2)]),
    "seed": st.integers(0, 2**16),
}
F64 = torch.float64


def draw(length, d_k, d_v, batch, seed, dtype=F64):
    """q, unit k, v, beta in (0, 2) and a state."""
    return tuple(x.to(dtype) for x in delta_rule_inputs(*batch, length, d_k, d_v, seed=seed, dtype=F64, state=batch))


def with_matrices(q, k, v, beta, state, scale):
    """The recurrence with the matrices written out."""
    outputs = [q[..., :0, :] @ state]
    eye = torch.eye(k.shape[-1], dtype=k.dtype)
    for t in range(k.shape[-2]):
        k_t, v_t, b_t = k[..., t, :, None], v[..., t, :, None], beta[..., t, None, None]
        state = (eye - b_t * k_t @ k_t.mT) @ state + b_t * k_t @ v_t.mT
        outputs.append(scale * q[..., t : t + 1, :] @ state)
    return torch.cat(outputs, dim=-2), state


@given(**SIZES)
@settings(max_examples=40, deadline=None)
def test_recurrence_is_the_matrix_formula(length, d_k, d_v, batch, seed):
    q, k, v, beta, state = draw(length, d_k, d_v, batch, seed)
    o, final = recurrent_delta_rule(q, k, v, beta, initial_state=state)
    expected_o, expected = with_matrices(q, k, v, beta, state, d_k**-0.5)
    assert o.shape == (*batch, length, d_v) and final.shape == (*batch, d_k, d_v)
    torch.testing.assert_close(o, expected_o, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(final, expected, rtol=1e-10, atol=1e-12)


def test_by_hand():
    """Store (4, 0) under e1; then (2, 2) under (e1 + e2)/sqrt 2 with beta 1/2; read with both axes."""
    root = 0.5**0.5
    k = torch.tensor([[1.0, 0.0], [root, root]], dtype=F64)
    v = torch.tensor([[4.0, 0.0], [2.0, 2.0]], dtype=F64)
    q = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=F64)
    beta = torch.tensor([1.0, 0.5], dtype=F64)
    # v_old = (4 root, 0), error = (2 - 4 root, 2), S = e1 (4, 0)^T + (root / 2) (1, 1)^T (2 - 4 root, 2)
    row = torch.tensor([root - 1.0, root], dtype=F64)
    o, state = recurrent_delta_rule(q, k, v, beta, scale=1.0)
    torch.testing.assert_close(state, torch.stack([row + v[0], row]), rtol=0, atol=1e-14)
    torch.testing.assert_close(o, torch.stack([v[0], row + v[0]]), rtol=0, atol=1e-14)


def test_overwriting_replaces_and_adding_does_not():
    k = torch.tensor([[1.0, 0.0]]).expand(2, -1)
    v = torch.tensor([[1.0], [10.0]])
    assert recurrent_delta_rule(k, k, v, torch.ones(2), scale=1.0)[0][-1].item() == 10.0
    assert recurrent_linear_attention(k, k, v, scale=1.0)[0][-1].item() == 11.0


@given(**SIZES)
@settings(max_examples=25, deadline=None)
def test_beta_zero_does_nothing(length, d_k, d_v, batch, seed):
    q, k, v, beta, state = draw(length, d_k, d_v, batch, seed)
    o, final = recurrent_delta_rule(q, k, v, 0 * beta, initial_state=state, scale=1.0)
    assert torch.equal(final, state)
    torch.testing.assert_close(o, q @ state, rtol=1e-12, atol=1e-12)


@given(**SIZES)
@settings(max_examples=25, deadline=None)
def test_beta_one_over_squared_length_stores_exactly(length, d_k, d_v, batch, seed):
    _, k, v, _, state = draw(max(length, 1), d_k, d_v, batch, seed)
    k, v = 3 * k[..., 0, :], v[..., 0, :]
    beta = 1 / (k * k).sum(-1)
    o, _ = delta_rule_step(k, k, v, beta, state, scale=1.0)
    torch.testing.assert_close(o, v, rtol=1e-10, atol=1e-12)


@given(**SIZES)
@settings(max_examples=25, deadline=None)
def test_norm_never_grows_without_values(length, d_k, d_v, batch, seed):
    _, k, v, beta, state = draw(length, d_k, d_v, batch, seed)
    norms = [torch.linalg.matrix_norm(state)]
    for t in range(length):
        k_t = k[..., t, :]
        state = delta_rule_step(k_t, k_t, 0 * v[..., t, :], beta[..., t], state)[1]
        norms.append(torch.linalg.matrix_norm(state))
    for before, after in itertools.pairwise(norms):
        assert (after - before <= 1e-12 * before).all()


def test_norm_grows_beyond_the_bound():
    k = torch.tensor([1.2, 0.0], dtype=F64)  # beta |k|^2 = 2.16 with beta = 1.5
    state = delta_rule_step(k, k, torch.zeros(1, dtype=F64), torch.tensor(1.5, dtype=F64), torch.eye(2, 1, dtype=F64))[
        1
    ]
    assert state.norm() > 1.1


@given(**SIZES)
@settings(max_examples=25, deadline=None)
def test_erase_write_is_the_step(length, d_k, d_v, batch, seed):
    _, k, v, beta, state = draw(max(length, 1), d_k, d_v, batch, seed)
    k, v, beta = k[..., 0, :], v[..., 0, :], beta[..., 0]
    v_old, v_new = erase_write(k, v, beta, state)
    torch.testing.assert_close(
        state + k[..., :, None] * (v_new - v_old)[..., None, :],
        delta_rule_step(k, k, v, beta, state)[1],
        rtol=1e-10,
        atol=1e-12,
    )


@given(**SIZES, cut=st.integers(0, 12))
@settings(max_examples=25, deadline=None)
def test_a_sequence_can_be_cut_anywhere(length, d_k, d_v, batch, seed, cut):
    q, k, v, beta, state = draw(length, d_k, d_v, batch, seed)
    cut = min(cut, length)
    whole = recurrent_delta_rule(q, k, v, beta, initial_state=state)
    head, tail = ([x[..., :cut, :] for x in (q, k, v)], [x[..., cut:, :] for x in (q, k, v)])
    o1, middle = recurrent_delta_rule(*head, beta[..., :cut], initial_state=state)
    o2, final = recurrent_delta_rule(*tail, beta[..., cut:], initial_state=middle)
    assert torch.equal(torch.cat([o1, o2], -2), whole[0]) and torch.equal(final, whole[1])


def test_given_state_is_left_alone_and_gradients_flow():
    q, k, v, beta, state = draw(5, 3, 2, (), 0)
    kept = state.clone()
    for x in (inputs := (q, k, v, beta, state)):
        x.requires_grad_()

    def run(q, k, v, beta, state):
        return recurrent_delta_rule(q, k, v, beta, initial_state=state)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.equal(state.detach(), kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_a_float32_state(dtype):
    q, k, v, beta, state = draw(40, 8, 4, (2,), 1, dtype)
    o, final = recurrent_delta_rule(q, k, v, beta, initial_state=state)
    exact_o, exact = recurrent_delta_rule(*(x.double() for x in (q, k, v, beta)), initial_state=state.double())
    assert o.dtype == dtype and final.dtype == torch.float32
    # float32 arithmetic; only the outputs are rounded to `dtype`, by half a unit in the last place
    assert (final - exact).norm() <= 1e-5 * exact.norm()
    assert (o - exact_o).norm() <= torch.finfo(dtype).eps * exact_o.norm()
    step = delta_rule_step(q[:, 0], k[:, 0], v[:, 0], beta[:, 0], state)
    assert step[0].dtype == dtype and step[1].dtype == torch.float32


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_empty_sequence(batch):
    q, k, v, beta, state = draw(0, 4, 3, batch, 0)
    o, final = recurrent_delta_rule(q, k, v, beta, initial_state=state)
    assert o.shape == (*batch, 0, 3) and torch.equal(final, state)
    assert not recurrent_delta_rule(q, k, v, beta)[1].any()


def test_leading_dimensions_broadcast():
    q, k, v, beta, state = draw(4, 3, 2, (5,), 0)
    o, final = recurrent_delta_rule(q[0], k[0], v, beta[0], initial_state=state[0])
    for i in range(5):
        expected = recurrent_delta_rule(q[0], k[0], v[i], beta[0], initial_state=state[0])
        torch.testing.assert_close(o[i], expected[0])
        torch.testing.assert_close(final[i], expected[1])


@given(**SIZES)
@settings(max_examples=25, deadline=None)
def test_gated_is_the_matrix_formula(length, d_k, d_v, batch, seed):
    q, k, v, beta, state = draw(length, d_k, d_v, batch, seed)
    alpha = torch.rand_like(beta)
    o, final = recurrent_gated_delta_rule(q, k, v, beta, alpha.log(), initial_state=state)
    eye = torch.eye(d_k, dtype=F64)
    for t in range(length):
        k_t, v_t, b_t = k[..., t, :, None], v[..., t, :, None], beta[..., t, None, None]
        state = alpha[..., t, None, None] * (eye - b_t * k_t @ k_t.mT) @ state + b_t * k_t @ v_t.mT
        expected = d_k**-0.5 * (q[..., t : t + 1, :] @ state)[..., 0, :]
        torch.testing.assert_close(o[..., t, :], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(final, state, rtol=1e-10, atol=1e-12)


def test_gated_step_is_the_gated_sequence():
    q, k, v, beta, state = draw(3, 4, 2, (2,), 3)
    alpha, running = torch.rand_like(beta), state
    for t in range(3):
        inputs = (x[:, t] for x in (q, k, v, alpha, beta))
        o, running = gated_delta_rule_step(*inputs, running)
    expected = recurrent_gated_delta_rule(q, k, v, beta, alpha.log(), initial_state=state)
    torch.testing.assert_close(o, expected[0][:, -1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(running, expected[1], rtol=1e-10, atol=1e-12)


@given(d=st.integers(2, 8), n=st.integers(0, 8), batch=st.sampled_from([(), (2,)]), seed=st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_sweep_matrix_is_the_product_newest_first(d, n, batch, seed):
    _, k, _, beta, _ = draw(n, d, 1, batch, seed)
    product = torch.eye(d, dtype=F64).expand(*batch, d, d)
    for t in range(n):
        k_t = k[..., t, :, None]
        product = (torch.eye(d, dtype=F64) - beta[..., t, None, None] * k_t @ k_t.mT) @ product
    torch.testing.assert_close(sweep_matrix(k, beta), product, rtol=1e-10, atol=1e-12)


def test_sweep_rate_of_two_keys_is_the_squared_cosine():
    for cosine in (0.0, 0.3, -0.9):
        k = torch.tensor([[1.0, 0, 0], [cosine, (1 - cosine**2) ** 0.5, 0]], dtype=F64)
        assert abs(sweep_rate(k, torch.ones(2, dtype=F64)).item() - cosine**2) < 1e-12


BAD = {
    "q": {"q": torch.zeros(2, 5, 4)},
    "v": {"v": torch.zeros(2, 7, 3)},
    "beta": {"beta": torch.zeros(5, 2)},
    "beta (an axis too many)": {"beta": torch.zeros(2, 5, 1)},
    "k": {"k": torch.zeros(6)},
    "initial_state": {"initial_state": torch.zeros(2, 3, 6)},
    "initial_state (batch)": {"initial_state": torch.zeros(4, 6, 3)},
    "v (batch)": {"v": torch.zeros(3, 5, 3)},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_shapes_name_the_argument(name):
    good = {
        "q": torch.zeros(2, 5, 6),
        "k": torch.zeros(2, 5, 6),
        "v": torch.zeros(2, 5, 3),
        "beta": torch.zeros(2, 5),
    }
    recurrent_delta_rule(**good)
    with pytest.raises(ValueError, match=f"^{name.split()[0]} must") as caught:
        recurrent_delta_rule(**{**good, **BAD[name]})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("q", torch.zeros(5)),
        ("v", torch.zeros(())),
        ("beta", torch.zeros(7)),
        ("state", torch.zeros(3, 6)),
        ("alpha", torch.zeros(9)),
    ],
)
def test_bad_shapes_of_one_token(name, bad):
    good = {"q": torch.zeros(4, 6), "k": torch.zeros(4, 6), "v": torch.zeros(4, 3), "beta": torch.zeros(4)}
    good |= {"alpha": torch.zeros(4), "state": torch.zeros(4, 6, 3)}
    gated_delta_rule_step(**good)
    with pytest.raises(ValueError, match=f"^{name} must"):
        gated_delta_rule_step(**{**good, name: bad})


def test_more_keys_than_dimensions():
    with pytest.raises(ValueError, match=r"^k must have at most d = 2"):
        sweep_rate(torch.zeros(3, 2), torch.zeros(3))


@pytest.mark.parametrize("form", [recurrent_delta_rule, recurrent_gated_delta_rule, recurrent_linear_attention])
def test_the_outputs_of_no_tokens_have_a_gradient(form):
    """So that a batch that happens to be empty goes through a training loop; its gradients are empty."""
    q, k, v, beta, state = (x.requires_grad_() for x in draw(0, 3, 2, (2,), seed=0))
    gates = {recurrent_delta_rule: [beta], recurrent_gated_delta_rule: [beta, -beta.exp()]}.get(form, [])
    o, final = form(q, k, v, *gates, initial_state=state)
    (o.sum() + final.sum()).backward()
    assert v.grad.shape == v.shape and torch.equal(state.grad, torch.ones_like(state))
