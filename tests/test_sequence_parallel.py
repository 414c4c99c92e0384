"""One sequence on several processes gives what one process gives, forward and backward."""

import pytest
import torch

from dn_lib.delta_rule import recurrent_delta_rule
from dn_lib.sequence_parallel import run_on_processes, sequence_parallel_delta_rule, split_and_run


def error(x, reference):
    return ((x - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("lengths", [[40, 57], [33, 0, 20]])
def test_processes_equal_one(lengths):
    g = torch.Generator().manual_seed(len(lengths))
    B, L, d_k, d_v = 2, sum(lengths), 6, 5
    q, k, v, do = (torch.randn(B, L, d, generator=g, dtype=torch.float64) for d in (d_k, d_k, d_v, d_v))
    k = k / k.norm(dim=-1, keepdim=True)
    beta = 2 * torch.rand(B, L, generator=g, dtype=torch.float64)
    S, dstate = (torch.randn(B, d_k, d_v, generator=g, dtype=torch.float64) for _ in range(2))
    inputs = {"q": q, "k": k, "v": v, "beta": beta, "initial_state": S, "do": do, "dstate": dstate}
    parts = run_on_processes(split_and_run, len(lengths), {**inputs, "lengths": lengths, "chunk_size": 16})

    leaves = [x.clone().requires_grad_() for x in (q, k, v, beta, S)]
    o, state = recurrent_delta_rule(*leaves[:4], initial_state=leaves[4])
    dq, dk, dv, dbeta, dS = torch.autograd.grad((o, state), leaves, (do, dstate))
    for name, want in (("o", o), ("dq", dq), ("dk", dk), ("dv", dv)):
        assert error(torch.cat([part[name] for part in parts], dim=-2), want) < 1e-10
    assert error(torch.cat([part["dbeta"] for part in parts], dim=-1), dbeta) < 1e-10
    assert error(parts[-1]["state"], state) < 1e-10
    assert error(parts[0]["dinitial_state"], dS) < 1e-10
    assert all(not part["dinitial_state"].any() for part in parts[1:])


def test_without_process_group_says_so():
    x = torch.eye(3)
    with pytest.raises(RuntimeError, match="init_process_group"):
        sequence_parallel_delta_rule(x, x, x, torch.ones(3))


def test_world_size_is_named():
    with pytest.raises(ValueError, match="^world_size must be"):
        run_on_processes(torch.ones, 0, 2)


def test_wrong_shape_is_named():
    x = torch.eye(3)
    with pytest.raises(ValueError, match="^beta must be"):
        sequence_parallel_delta_rule(x, x, x, torch.ones(4))
