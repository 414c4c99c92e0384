"""One sequence on several processes gives what one process gives, forward and backward."""

import pytest
import torch

from dn_lib.forms.affine import segment_affine
from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.parallel.affine import entering_state, run_on_processes, sequence_parallel_delta_rule, split_and_run
from dn_lib.testing import delta_rule_inputs, relative_error


def make(lengths):
    L = sum(lengths)
    sizes, options = (2, L, 6, 5), {"dtype": torch.float64, "state": (2,)}
    inputs = delta_rule_inputs(*sizes, seed=L, **options)
    do, dstate = delta_rule_inputs(*sizes, seed=L + 1, **options)[2::2]
    names = dict(zip(("q", "k", "v", "beta", "initial_state"), inputs, strict=True))
    return {**names, "do": do, "dstate": dstate, "lengths": lengths, "chunk_size": 16}


def run_all(cases):
    """Runs in each process; a list of cases, since starting processes takes longer than all of them."""
    return [split_and_run(case) for case in cases]


CASES = [make(lengths) for lengths in ([40, 57], [64, 64], [33, 0], [0, 20])]


def test_two_processes_equal_one():
    by_rank = run_on_processes(run_all, 2, CASES)
    for n, case in enumerate(CASES):
        parts = [results[n] for results in by_rank]
        leaves = [case[x].clone().requires_grad_() for x in ("q", "k", "v", "beta", "initial_state")]
        o, state = recurrent_delta_rule(*leaves[:4], initial_state=leaves[4])
        grads = torch.autograd.grad((o, state), leaves, (case["do"], case["dstate"]))
        dq, dk, dv, dbeta, dS = grads
        for name, want in (("o", o), ("dq", dq), ("dk", dk), ("dv", dv)):
            assert relative_error(torch.cat([part[name] for part in parts], dim=-2), want) < 1e-10
        assert relative_error(torch.cat([part["dbeta"] for part in parts], dim=-1), dbeta) < 1e-10
        assert relative_error(parts[-1]["state"], state) < 1e-10
        assert relative_error(parts[0]["dinitial_state"], dS) < 1e-10
        assert not parts[1]["dinitial_state"].any()  # only the first process has it


def test_any_number_of_stretches():
    """The arithmetic of the exchange alone, for more stretches than a test should start processes for."""
    case = make([10, 1, 25, 4])
    leaves = [case[x].clone().requires_grad_() for x in ("q", "k", "v", "beta")]
    stretches = list(zip(*(x.split(case["lengths"], dim=-2) for x in leaves[:3]), strict=True))
    betas = leaves[3].split(case["lengths"], dim=-1)
    pieces = [segment_affine(k, v, b, chunk_size=8) for (_, k, v), b in zip(stretches, betas, strict=True)]
    o, state = recurrent_delta_rule(*leaves)
    for rank, ((q, k, v), b) in enumerate(zip(stretches, betas, strict=True)):
        got, _ = recurrent_delta_rule(q, k, v, b, initial_state=entering_state(pieces, rank))
        assert relative_error(got, o.split(case["lengths"], dim=-2)[rank]) < 1e-12
    assert relative_error(entering_state(pieces, 4), state) < 1e-12


def test_without_process_group_says_so():
    x = torch.eye(3)
    with pytest.raises(RuntimeError, match="init_process_group"):
        sequence_parallel_delta_rule(x, x, x, torch.ones(3))


def test_world_size_is_named():
    with pytest.raises(ValueError, match=r"^world_size must be"):
        run_on_processes(torch.ones, 0, 2)


def test_wrong_shape_is_named():
    x = torch.eye(3)
    with pytest.raises(ValueError, match=r"^beta must be"):
        sequence_parallel_delta_rule(x, x, x, torch.ones(4))
