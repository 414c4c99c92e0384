"""Chapter 3's functions against a float64 recurrence, against each other, and on the ugly cases by name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from dn_lib.forms import householder as hh
from dn_lib.testing import relative_error, sensitivity

FLOAT32 = 1e-5  # about 100 units in the last place of float32, for sums of up to 64 terms
FLOAT64 = 1e-12


def unit_keys(length, d, seed=0, batch=(), cosine=0.0, dtype=torch.float64):
    """Unit keys that share a direction: any two of them have a cosine of about `cosine`."""
    generator = torch.Generator().manual_seed(seed)
    common = normalize(torch.randn(*batch, 1, d, generator=generator, dtype=torch.float64), dim=-1)
    noise = torch.randn(*batch, length, d, generator=generator, dtype=torch.float64)
    noise = normalize(noise - (noise @ common.mT) * common, dim=-1)
    return normalize(cosine**0.5 * common + (1 - cosine) ** 0.5 * noise, dim=-1).to(dtype)


def problem(length, d, d_v=3, seed=0, batch=()):
    generator = torch.Generator().manual_seed(seed + 1)
    k = unit_keys(length, d, seed, batch, cosine=0.3 if d > 1 else 0.0)
    if d == 1:  # normalising the noise across a line leaves nothing
        k = torch.ones_like(k)
    v = torch.randn(*batch, length, d_v, generator=generator, dtype=torch.float64)
    beta = 2 * torch.rand(*batch, length, generator=generator, dtype=torch.float64)
    return k, v, beta


def error(x, reference):
    """The relative error, and the absolute one where the reference is zero."""
    return relative_error(x, reference, size=0.0 if reference.any() else 1.0)


shapes = {"length": st.integers(0, 40), "d": st.integers(1, 24), "seed": st.integers(0, 10**6)}


# ---- One matrix and products -----------------------------------------------------------------------------


def test_householder_matrix_projects_reflects_and_does_nothing():
    k = unit_keys(1, 5)[0]
    across = torch.linalg.svd(k[None]).Vh[1:]
    for beta, factor in ((0.0, 1), (0.5, 0.5), (1.0, 0), (2.0, -1)):
        H = hh.householder_matrix(k, beta)
        assert error(H @ k, factor * k) < FLOAT64
        assert error(across @ H, across) < FLOAT64


def test_householder_matrix_keeps_precision_with_a_plain_number():
    assert hh.householder_matrix(torch.randn(3), 0.5).dtype == torch.float32
    assert hh.householder_matrix(torch.randn(3).double(), 0.5).dtype == torch.float64
    assert hh.householder_matrix(torch.randn(3).half(), 0.5).dtype == torch.float32


@settings(max_examples=15, deadline=None)
@given(**shapes)
def test_product_by_three_roads(length, d, seed):
    k, _, beta = problem(length, d, seed=seed)
    explicit = hh.householder_product(k, beta)
    eye = torch.eye(d, dtype=torch.float64)
    assert error(hh.apply_householder(k, beta, eye), explicit) < FLOAT64
    assert (eye - k.mT @ hh.wy_recursion(k, beta) - explicit).norm() < FLOAT64 * d


def test_product_has_the_newest_factor_on_the_left():
    k, _, beta = problem(2, 4)
    first, second = hh.householder_matrix(k[0], beta[0]), hh.householder_matrix(k[1], beta[1])
    assert error(hh.householder_product(k, beta), second @ first) < FLOAT64
    assert error(hh.householder_product(k, beta), first @ second) > 1e-3


@settings(max_examples=15, deadline=None)
@given(**shapes)
def test_pseudo_values_rebuild_the_recurrent_state(length, d, seed):
    k, v, beta = problem(length, d, seed=seed)
    initial = torch.randn(d, v.shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    state = initial
    for t in range(length):
        state = state + beta[t] * torch.outer(k[t], v[t] - k[t] @ state)
    u, w = hh.pseudo_values(k, v, beta), hh.wy_recursion(k, beta)
    assert error(initial + k.mT @ (u - w @ initial), state) < FLOAT64
    T = hh.ut_transform(k, beta)
    assert error(T @ v, u) < FLOAT64 and error(T @ k, w) < FLOAT64


# ---- T and N ---------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(**shapes)
def test_all_methods_agree_in_float64(length, d, seed):
    generator = torch.Generator().manual_seed(seed)
    k = normalize(torch.randn(length, d, generator=generator, dtype=torch.float64), dim=-1)
    beta = torch.rand(length, generator=generator, dtype=torch.float64)
    if d < 8:  # many unit keys in few dimensions are correlated, which doubling cannot do: see below
        k = k / 4
    reference = hh.ut_transform(k, beta, method="substitution")
    for method in hh.UT_METHODS:
        assert error(hh.ut_transform(k, beta, method=method), reference) < FLOAT64, method
    D = torch.diag(beta)
    for method in hh.N_METHODS:
        N = hh.scaled_inverse(k, beta, method=method)
        assert error(D + D @ N @ D, reference) < FLOAT64, method
        assert error(N, hh.scaled_inverse(k, beta, method="solve")) < FLOAT64, method


@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 63, 64, 65])
def test_all_methods_agree_in_float32(length):
    k = unit_keys(length, 64, dtype=torch.float32)
    beta = torch.rand(length, generator=torch.Generator().manual_seed(1))
    reference = hh.ut_transform(k.double(), beta.double(), method="substitution")
    for method in hh.UT_METHODS:
        T = hh.ut_transform(k, beta, method=method)
        assert T.dtype == torch.float32 and error(T, reference) < FLOAT32, method


WORST = {"identical keys, beta 2": (1.0, 2.0), "identical keys, beta 1": (1.0, 1.0), "cosine 0.9": (0.9, 1.9)}


@pytest.mark.parametrize("cosine, strength", WORST.values(), ids=WORST.keys())
def test_worst_keys_leave_all_methods_but_doubling_exact(cosine, strength):
    k = unit_keys(64, 64, cosine=cosine, dtype=torch.float32)
    beta = torch.full((64,), strength)

    def by_substitution(k, beta):
        return [hh.ut_transform(k, beta, method="substitution")]

    (reference,) = by_substitution(k.double(), beta.double())
    # A product of n terms is exact for operands that are off by n u: k.k over 64 channels, then sums over 64 tokens.
    bound = (64 + 64) * torch.finfo(torch.float32).eps / 2 * sensitivity(by_substitution, (k, beta))[0]
    for method in ("substitution", "solve", "blocked"):
        assert error(hh.ut_transform(k, beta, method=method), reference) < bound, method
    assert error(hh.ut_transform(k, beta, method="doubling"), reference) > 1e6
    # Keys rounded to float32 are not quite unit keys: at beta = 2, each of 62 factors may exceed 1 by some
    # units of 2^-23, and so may |k|^2 itself.
    assert hh.scaled_inverse(k, beta).abs().max() - 1 <= 62 * 6 * 2**-23


@pytest.mark.parametrize("cosine, strength", WORST.values(), ids=WORST.keys())
def test_the_merge_survives_half_precision_operands(cosine, strength):
    k = unit_keys(64, 64, cosine=cosine, dtype=torch.float32)
    beta = torch.full((64,), strength)
    gram, D = (k.double() @ k.double().mT).tril(-1), torch.diag(beta.double())

    def exact(L):
        return -torch.linalg.solve_triangular(torch.eye(64) + L @ D, L, upper=False, unitriangular=True)

    reference = exact(gram)
    # Merging X and Y to X L Y rounds four operands (L, X, X L, Y), each of which costs at most what rounding all of L
    # to float16 does; the last product may cost half a unit in the last place more.
    bound = 4 * error(exact(gram.half().double()), reference) + 2**-11
    for method in ("blocked", "masked"):
        N = hh.scaled_inverse(k, beta, method=method, matmul=hh.rounded_matmul(torch.float16))
        assert error(N, reference) < bound, method


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 32), d=st.integers(2, 16), seed=st.integers(0, 10**6), cosine=st.floats(0, 1),
    strength=st.floats(0, 2),
)  # fmt: skip
def test_entries_of_N_are_at_most_one(length, d, seed, cosine, strength):
    generator = torch.Generator().manual_seed(seed)
    k = unit_keys(length, d, seed, cosine=cosine)
    beta = strength * torch.rand(length, generator=generator, dtype=torch.float64).clamp(min=0.5).mul(2)
    N = hh.scaled_inverse(k, beta.clamp(max=2.0))
    assert N.abs().max() - 1 <= 1e-12
    assert torch.equal(N, N.tril(-1))


def test_beta_zero_is_no_special_case():
    k, v, beta = problem(20, 8)
    beta[::3] = 0.0
    kept = beta > 0
    for method in hh.UT_METHODS:
        T = hh.ut_transform(k, beta, method=method)
        assert T.isfinite().all() and (T[~kept] == 0).all() and (T[:, ~kept] == 0).all()
        short = hh.ut_transform(k[kept], beta[kept], method=method)
        assert error(T[kept][:, kept], short) < FLOAT64
    for method in hh.N_METHODS:  # a skipped token still has a row: the error that it would have seen
        N = hh.scaled_inverse(k, beta, method=method)
        state = torch.zeros(8, 3, dtype=torch.float64)
        seen = []
        for t in range(20):
            seen.append(v[t] - k[t] @ state)
            state = state + beta[t] * torch.outer(k[t], seen[-1])
        assert error(v + N @ (beta[:, None] * v), torch.stack(seen)) < FLOAT64


@pytest.mark.parametrize("batch", [(3,), (2, 3), (0,), (2, 1, 2)])
def test_leading_dimensions(batch):
    k, v, beta = problem(9, 6, batch=batch)
    functions = [lambda k, v, b: hh.householder_product(k, b), lambda k, v, b: hh.pseudo_values(k, v, b)]
    functions += [lambda k, v, b, m=m: hh.ut_transform(k, b, method=m) for m in hh.UT_METHODS]
    functions += [lambda k, v, b, m=m: hh.scaled_inverse(k, b, method=m) for m in hh.N_METHODS]
    for f in functions:
        out = f(k, v, beta)
        assert out.shape[: len(batch)] == batch
        flat = [x.reshape(-1, *x.shape[len(batch) :]) for x in (k, v, beta, out)]
        for k_i, v_i, beta_i, out_i in zip(*flat, strict=True):
            assert error(f(k_i, v_i, beta_i), out_i) < FLOAT64


def test_everything_is_differentiable():
    k, v, beta = problem(5, 3, d_v=2)
    S = torch.randn(3, 2, dtype=torch.float64)
    for x in (k, v, beta, S):
        x.requires_grad_()
    assert torch.autograd.gradcheck(hh.householder_product, (k, beta))
    assert torch.autograd.gradcheck(hh.apply_householder, (k, beta, S))
    assert torch.autograd.gradcheck(hh.pseudo_values, (k, v, beta))
    assert torch.autograd.gradcheck(hh.wy_recursion, (k, beta))
    for method in hh.UT_METHODS:
        assert torch.autograd.gradcheck(lambda k, b, m=method: hh.ut_transform(k, b, method=m), (k, beta))
    for method in hh.N_METHODS:
        assert torch.autograd.gradcheck(lambda k, b, m=method: hh.scaled_inverse(k, b, method=m), (k, beta))


def test_half_precision_inputs_are_worked_on_in_float32():
    k, v, beta = (x.bfloat16() for x in problem(8, 4))
    exact = hh.ut_transform(k.double(), beta.double())
    for method in hh.UT_METHODS:
        T = hh.ut_transform(k, beta, method=method)
        assert T.dtype == torch.float32 and error(T, exact) < FLOAT32
    assert hh.pseudo_values(k, v, beta).dtype == torch.float32


# ---- Errors ----------------------------------------------------------------------------------------------

K, BETA = torch.zeros(2, 5, 4), torch.zeros(2, 5)
BAD = {
    "beta must be [..., L] = [2, 5] to match k, got [5, 2]": lambda: hh.ut_transform(K, torch.zeros(5, 2)),
    "beta must be [..., L] = [2, 5] to match k, got [2]": lambda: hh.scaled_inverse(K, torch.zeros(2)),
    "beta must be [..., L] = [2, 5] to match k, got [5]": lambda: hh.wy_recursion(K, torch.zeros(5)),
    "beta must be [..., L] = [2, 5] to match k, got []": lambda: hh.householder_product(K, torch.zeros(())),
    "beta must be [...] = [2, 5] to match k, got [5]": lambda: hh.householder_matrix(K, torch.zeros(5)),
    "k must be [..., L, d], got [4]": lambda: hh.ut_transform(torch.zeros(4), torch.zeros(())),
    "k must be [..., d], got []": lambda: hh.householder_matrix(torch.zeros(()), 1.0),
    "v must be [..., L, d_v] = [2, 5, d_v] to match k, got [2, 4, 4]": lambda: hh.pseudo_values(
        K, torch.zeros(2, 4, 4), BETA
    ),
    "state must be [..., 4, d_v] to match k, got [3, 4]": lambda: hh.apply_householder(K, BETA, torch.zeros(3, 4)),
    "method must be one of 'substitution', 'solve', 'blocked', 'doubling', got 'lu'": lambda: hh.ut_transform(
        K, BETA, method="lu"
    ),
    "method must be one of 'blocked', 'masked', 'solve', got 'lu'": lambda: hh.scaled_inverse(K, BETA, method="lu"),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_argument(message):
    with pytest.raises(ValueError) as caught:
        BAD[message]()
    assert str(caught.value) == message
