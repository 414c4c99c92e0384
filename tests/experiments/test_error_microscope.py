"""Inputs of the microscope, the errors it keeps, and what it computes through an inverse."""

from __future__ import annotations

import pytest
import torch

microscope = pytest.importorskip("experiments.operators.error_microscope")


def test_inputs_of_the_microscope():
    source = microscope.Source([0, 1], 256, 2, 32, "cpu")
    for cosine in microscope.COSINES:
        c = microscope.BASE | {"cosine": cosine, "norm": 1.5, "beta_range": 2.0}
        p = source.problem(c, torch.float32)
        found = microscope.facts(p.k, p.beta)
        assert found["measured_cosine"] == pytest.approx(1.0 if cosine == "identical" else cosine, abs=0.03)
        assert torch.allclose(p.k.norm(dim=-1), torch.tensor(1.5)) and p.beta.max() <= 2
        assert found["may_grow"] and found["beta_k2_max"] == pytest.approx(1.5**2 * p.beta.max().item(), rel=1e-5)
    calm = source.problem(microscope.BASE | {"norm": 0.5}, torch.float32)
    assert not microscope.facts(calm.k, calm.beta)["may_grow"]


@pytest.mark.parametrize("cosine", [0.5, "identical"])
@pytest.mark.parametrize("with_N", [False, True])
def test_what_the_microscope_computes_through_the_inverse_is_the_operator(cosine, with_N):
    """With the exact inverse: one chunk from state zero, its gradients by autograd through the float64 recurrence."""
    import dn_lib
    from dn_lib.forms.householder import scaled_inverse, ut_transform

    source = microscope.Source([0, 1], 24, 1, 16, "cpu")
    p = source.problem(microscope.BASE | {"cosine": cosine, "beta_range": 2.0}, torch.float64)
    o, _ = dn_lib.delta_rule(p.q, p.k, p.v, p.beta, backend="recurrent")
    exact = dict(zip(("o", "dq", "dk", "dv", "dbeta"), (o, *torch.autograd.grad(o, p.leaves, p.do)), strict=True))
    q, k, v, do, beta = (x.detach()[:, :, 0] for x in (p.q, p.k, p.v, p.do, p.beta))
    N = scaled_inverse(k, beta) if with_N else None
    found = microscope.used(ut_transform(k, beta), N, q, k, v, beta, do)
    for name, x in exact.items():
        assert torch.allclose(found[name], x[:, :, 0].detach(), rtol=0, atol=1e-11), name


def test_the_microscope_keeps_what_is_not_finite_as_null_and_says_so():
    exact = {"o": torch.ones(3, 4, 1, 2, dtype=torch.float64)}
    x = exact["o"].clone()
    x[0, 0] = float("inf")
    x[1] *= 1.5
    assert microscope.errors_by_seed({"o": x}, exact)["o"] == {"median": 0.25, "max": 0.5, "not_finite": 1}
    lost = {"o": torch.full_like(x, float("nan"))}
    nothing = microscope.errors_by_seed(lost, exact)
    assert nothing["o"] == {"median": None, "max": None, "not_finite": 3}
    point = {"cosine": 0.0, "may_grow": False, "errors": nothing}
    row = {"key": "operator cosine", "status": "ok", "section": "operator", "axis": "cosine", "points": [point]}
    assert len(microscope.faults([row])) == 1
    point["may_grow"] = True
    assert microscope.faults([row]) == []
    raised = microscope.a_sweep([{"cosine": 0.0}], lambda c: [][0])["points"]
    assert raised == [{"cosine": 0.0, "failure": "IndexError: list index out of range"}]
    assert len(microscope.faults([row | {"points": raised}])) == 1
