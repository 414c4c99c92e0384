"""Every rule on three stretches is the recurrence on the whole, forward and backward; bytes are what is counted."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from dn_lib.forms.common import on_heads
from dn_lib.forms.gated import recurrent_gated_delta_rule, recurrent_gated_linear_attention
from dn_lib.parallel.affine import run_on_processes
from dn_lib.parallel.rules import delta_map, entering, linear_map, stretched_rule
from dn_lib.parallel.stretches import Stretches, earlier, next_token
from dn_lib.parallel.traffic import ring_attention_bytes, rows_bytes, state_bytes
from dn_lib.testing import relative_error

# Three: with two, nothing ever passes through the map of a stretch, since the first begins at zero.
LENGTHS = [13, 9, 11]
RULES = {
    "linear": (False, None),
    "decay": (False, "token"),
    "fixed decay": (False, "fixed"),
    "channels": (False, "channel"),
    "delta": (True, None),
    "gated delta": (True, "token"),
    "gated delta, channels": (True, "channel"),
}


def inputs(rule: str) -> list[torch.Tensor]:
    """q, k, v, then beta and g where the rule has them; four value heads, and gates of zero."""
    erases, gates = RULES[rule]
    g = torch.Generator().manual_seed(1)
    B, L, H, K, V = 2, sum(LENGTHS), 4, 5, 3
    heads = 4 if rule == "delta" else 2  # `dn_lib.delta_rule` knows no groups

    def normal(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)

    q, k = (torch.nn.functional.normalize(normal(B, L, heads, K), dim=-1) for _ in range(2))
    tensors = [q, k, normal(B, L, H, V)]
    if erases:
        tensors.append(2 * normal(B, L, H).sigmoid())
    if gates:
        size = {"token": (B, L, H), "channel": (B, L, H, K), "fixed": (H,)}[gates]
        log = -torch.rand(size, generator=g, dtype=torch.float64)
        if gates != "fixed":
            log[0, 4, 1], log[1, 15, 2] = float("-inf"), float("-inf")
        tensors.append(log)
    return tensors


def on_three(rule: str) -> dict[str, torch.Tensor]:
    """Outputs, last states and gradients of this process's stretch."""
    stretches = Stretches(LENGTHS)
    erases, gates = RULES[rule]
    own = [stretches.mine(x) if x.ndim > 1 else x for x in inputs(rule)]
    leaves = [x.clone().requires_grad_() for x in own]
    beta = leaves[3] if erases else None
    g = leaves[-1] if gates else None
    o, state = stretched_rule(*leaves[:3], beta, g, stretches=stretches, chunk_size=8)
    do = stretches.mine(cotangent(rule))
    grads = torch.autograd.grad(o, leaves, do)
    return {"o": o.detach(), "state": state.detach()} | {f"d{i}": x for i, x in enumerate(grads)}


def cotangent(rule: str) -> torch.Tensor:
    return torch.randn(inputs(rule)[2].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def all_rules() -> dict[str, dict[str, torch.Tensor]]:
    return {rule: on_three(rule) for rule in RULES}


@pytest.fixture(scope="module")
def by_rank():
    return run_on_processes(all_rules, 3)


@pytest.mark.parametrize("rule", RULES)
def test_three_stretches_are_one_sequence(by_rank, rule):
    erases, gates = RULES[rule]
    leaves = [x.requires_grad_() for x in inputs(rule)]
    q, k = (x.repeat_interleave(4 // x.shape[2], 2) for x in leaves[:2])
    g = leaves[-1] if gates else torch.zeros(4, dtype=torch.float64)
    rows = [q, k, leaves[2], *([leaves[3]] if erases else [])]
    if g.ndim == 1:
        g = g.expand(2, sum(LENGTHS), 4)
    form = recurrent_gated_delta_rule if erases else recurrent_gated_linear_attention
    o, state = on_heads(form, *rows, g)
    want = torch.autograd.grad(o, leaves, cotangent(rule))
    parts = [found[rule] for found in by_rank]
    assert relative_error(torch.cat([part["o"] for part in parts], 1), o) < 1e-12
    assert relative_error(parts[-1]["state"], state) < 1e-12
    for i, grad in enumerate(want):
        both = [part[f"d{i}"] for part in parts]
        assert relative_error(sum(both) if grad.ndim == 1 else torch.cat(both, 1), grad) < 1e-11, i


@contextlib.contextmanager
def one_of(ranks: int, rank: int, backend: str = "fake"):
    """A group of so many processes of which only this one is there: it moves nothing, and counts as if it did."""
    store = FakeStore() if backend == "fake" else dist.HashStore()
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_the_bytes_of_states_are_counted_and_know_no_length(ranks):
    B, L, H, K, V = 2, 3, 4, 5, 6
    with one_of(ranks, ranks // 2):
        for rule, formula in (("linear", "linear"), ("decay", "decay"), ("channels", "channels"), ("delta", "delta")):
            gates = {"decay": (B, L, H), "channels": (B, L, H, K)}.get(rule)
            g = None if gates is None else torch.zeros(gates)
            k, v = torch.rand(B, L, H, K, requires_grad=True), torch.rand(B, L, H, V)
            beta = torch.rand(B, L, H) if rule == "delta" else None
            stretches = Stretches([L] * ranks)
            o, _ = stretched_rule(k, k, v, beta, g, stretches=stretches)
            sizes = (ranks, B, H, K, V)
            assert stretches.received["states"] == state_bytes(formula, *sizes)
            o.sum().backward()
            assert stretches.received["states, backward"] == state_bytes(formula, *sizes, backward=True)
            longer = Stretches([2 * L] * ranks)
            stretched_rule(*(x.repeat(1, 2, *[1] * (x.ndim - 2)) for x in (k, k, v)), stretches=longer)
            assert longer.received["states"] == state_bytes("linear", *sizes)


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_the_bytes_of_rows_are_counted(ranks):
    L = 4
    for rank in {0, 1, ranks - 1}:
        with one_of(ranks, rank):
            for rows in (0, 3, 6, L * ranks):
                stretches = Stretches([L] * ranks)
                x = torch.zeros(2, L, 5, dtype=torch.float64, requires_grad=True)
                got = earlier(x, rows, stretches)
                assert got.shape == (2, min(rows, rank * L), 5)
                sizes, options = (L * ranks, ranks, rank, rows, 5), {"batch": 2, "size": 8}
                assert stretches.received["rows"] == rows_bytes(*sizes, **options)
                got.sum().backward()
                assert stretches.received["rows, backward"] == rows_bytes(*sizes, **options, backward=True)


def test_ring_attention_moves_every_key_past_every_process():
    L, H, d, size = 1024, 4, 32, 2
    for ranks in (2, 16, 64):
        got = ring_attention_bytes(L, ranks, H, d)
        assert got == sum(L // ranks * 2 * H * d * size for _ in range(ranks - 1))
        # Before the causal mask, half of that is needed on average: what `earlier` fetches.
        needed = [rows_bytes(L, ranks, rank, L, 2 * H * d, size=size) for rank in range(ranks)]
        assert max(needed) == got and sum(needed) * 2 == ranks * got
        lent = [rows_bytes(L, ranks, rank, L, 2 * H * d, size=size, backward=True) for rank in range(ranks)]
        assert sum(lent) == sum(needed)  # every borrowed row comes back once
    assert ring_attention_bytes(L, 1, H, d, backward=True) == 0


def test_maps_of_a_stretch_are_what_the_rule_does_to_a_state():
    """S -> M S + X, for a state that is not zero."""
    state = torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for rule, (erases, gates) in RULES.items():
        q, k, v, *rest = inputs(rule)
        g = rest[-1] if gates else None
        M, X = delta_map(k, v, rest[0], g) if erases else linear_map(k, v, g)
        form = recurrent_gated_delta_rule if erases else recurrent_gated_linear_attention
        log = torch.zeros(v.shape[:3], dtype=torch.float64) if g is None else g
        log = log.expand(v.shape[:3]) if log.ndim == 1 else log
        q, k = (x.repeat_interleave(4 // x.shape[2], 2) for x in (q, k))
        _, want = on_heads(form, q, k, v, *rest[: 1 if erases else 0], log, initial_state=state)
        moved = state if M is None else M @ state if M.shape[-1] == 5 else M * state
        assert relative_error(moved + X, want) < 1e-12, rule


def test_wrong_arguments_are_named():
    x = torch.eye(3)[None, :, None]
    with pytest.raises(RuntimeError, match="init_process_group"):
        Stretches([3])
    with one_of(1, 0, "gloo"):
        stretches = Stretches([3])
        with pytest.raises(ValueError, match=r"^lengths must be a list of 1"):
            Stretches([3, 4])
        with pytest.raises(ValueError, match=r"^lengths\[0\] must be"):
            Stretches([0])
        with pytest.raises(ValueError, match=r"^length must be"):
            Stretches.of(-1)
        with pytest.raises(ValueError, match=r"^x must be a tensor with 3 tokens"):
            stretches.mine(torch.zeros(1, 4))
        with pytest.raises(ValueError, match=r"^x must be \[B, L_r"):
            earlier(torch.zeros(1, 4, 2), 1, stretches)
        with pytest.raises(ValueError, match=r"^rows must be"):
            earlier(x, -1, stretches)
        with pytest.raises(ValueError, match=r"^tokens must be whole numbers"):
            next_token(torch.zeros(1, 3), stretches)
        with pytest.raises(TypeError, match=r"^stretches must be"):
            stretched_rule(x, x, x, stretches=None)
        with pytest.raises(ValueError, match=r"^v must be"):
            stretched_rule(x, x, x[:, 1:], torch.ones(1, 3, 1), stretches=stretches)
        with pytest.raises(ValueError, match=r"^v must be"):
            stretched_rule(x, x, x[:, 1:], stretches=stretches)
        with pytest.raises(ValueError, match=r"^transition must be"):
            entering(torch.zeros(2, 2), torch.zeros(3, 2), stretches)
        with pytest.raises(ValueError, match=r"^transition must have the dtype"):
            entering(torch.zeros(3, 3).double(), torch.zeros(3, 2), stretches)
    with pytest.raises(ValueError, match=r"^rule must be"):
        state_bytes("softmax", 2, 1, 1, 4, 4)
    with pytest.raises(ValueError, match=r"^ranks must be"):
        state_bytes("linear", 0, 1, 1, 4, 4)
    with pytest.raises(ValueError, match=r"^length must be a multiple"):
        ring_attention_bytes(10, 3, 1, 4)
    with pytest.raises(ValueError, match=r"^length must be a multiple"):
        rows_bytes(9, 3, 3, 1, 4)


def test_second_derivatives_are_refused():
    with one_of(1, 0, "gloo"):
        X = torch.ones(2, 2, requires_grad=True)
        (grad,) = torch.autograd.grad(entering(None, X, Stretches([3])).square().sum(), X, create_graph=True)
        with pytest.raises(RuntimeError):
            grad.sum().backward()
