"""fla's names: signatures against a written table, results against our operators, and what is refused by name."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
import torch.nn.functional as F

import dn_lib
from dn_lib import gated_delta_rule, linear_attention, ops
from dn_lib.teaching.judge.trace import observe
from dn_lib.testing import (
    delta_rule_inputs,
    delta_rule_reference,
    gated_delta_rule_reference,
    gated_linear_attention_reference,
    leaves,
    log_gates,
    relative_error,
)

F64, F32 = torch.float64, torch.float32
needs_triton = pytest.mark.skipif(ops.triton_problem(torch.device("cpu")) is not None, reason="needs the interpreter")
# float64: 4500 eps, float32: 84 eps, for sums of up to some hundred terms, each rounded a few times.
BOUND = {F64: 1e-12, F32: 1e-5}

# Source: flash-linear-attention 0.6.0 (August 2026), fla/ops/*/*.py.  "name" has no default, "name=default" one;
# behind the bar, what the function reads from its **kwargs.  One that fla has there beside these is out of date:
# head_first, and transpose_state_layout, which is state_v_first now.
STATE = "scale=None initial_state=None output_final_state=False"
RAW = "use_beta_sigmoid_in_kernel=False allow_neg_eigval=False state_v_first=False"
NORM = "use_qk_l2norm_in_kernel=False"
LENGTHS = "cu_seqlens=None cu_seqlens_cpu=None"
SIGNATURES = {
    "chunk_delta_rule": f"q k v beta {STATE} {NORM} {LENGTHS} | chunk_size",
    "fused_recurrent_delta_rule": f"q k v beta=None {STATE} {NORM} cu_seqlens=None |",
    "chunk_gated_delta_rule": (
        f"q k v g beta {STATE} {NORM} {RAW} {LENGTHS} chunk_indices=None cp_context=None "
        "| chunk_size use_gate_in_kernel A_log dt_bias"
    ),
    "fused_recurrent_gated_delta_rule": (
        f"q k v g=None gk=None gv=None beta=None {STATE} {NORM} use_gate_in_kernel=False A_log=None dt_bias=None {RAW} "
        "cu_seqlens=None |"
    ),
    "chunk_simple_gla": f"q k v g=None g_gamma=None {STATE} state_v_first=False {LENGTHS} | chunk_size",
    "chunk_retention": f"q k v {STATE} cu_seqlens=None | chunk_size",
    "chunk_lightning_attn": f"q k v layer_idx num_layers {STATE} cu_seqlens=None | chunk_size",
    "chunk_gla": f"q k v g {STATE} state_v_first=False {LENGTHS} |",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_fla(name):
    function = getattr(dn_lib, name)
    parameters = list(inspect.signature(function).parameters.values())
    named = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert all(p.kind is p.VAR_KEYWORD for p in parameters[len(named) :])
    written = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in named]
    positional, keywords = SIGNATURES[name].split("|")
    assert written == positional.split()
    arguments = sample(name)
    values = {"chunk_size": 16, "use_gate_in_kernel": False, "A_log": None, "dt_bias": None}
    for keyword in keywords.split():
        function(**arguments, **{keyword: values[keyword]})


def sample(name, *, L=24, H=2, H_v=2, d_k=6, d_v=5, dtype=F64, seed=0, state=None):
    """Sound arguments of the function, by name, without the optional ones."""
    q, k = delta_rule_inputs(1, L, H, d_k, d_v, seed=seed, dtype=dtype)[:2]
    _, _, v, beta, S = delta_rule_inputs(1, L, H_v, d_k, d_v, seed=seed + 1, dtype=dtype, state=state)
    given = {"q": q, "k": k, "v": v}
    if "delta" in name:
        given["beta"] = beta
    if "gated" in name:
        given["g"] = log_gates(1, L, H_v, seed=seed, dtype=dtype)
    if name == "chunk_gla":
        given["g"] = log_gates(1, L, H_v, d_k, seed=seed, dtype=dtype)
    if name == "chunk_lightning_attn":
        given |= {"layer_idx": 1, "num_layers": 3}
    return given if S is None else given | {"initial_state": S}


CU = torch.tensor([0, 5, 5, 24])


def written_out(name, given, **options):
    """What the function must give, by the recurrences in float64."""
    q, k, v = (given[n] for n in ("q", "k", "v"))
    heads = v.shape[2]
    q, k = (x.repeat_interleave(heads // x.shape[2], 2) for x in (q, k))
    if name in ("chunk_delta_rule", "fused_recurrent_delta_rule"):
        return delta_rule_reference(q, k, v, given["beta"], **options)
    if "gated" in name:
        return gated_delta_rule_reference(q, k, v, given["beta"], given["g"], **options)
    g = given.get("g", torch.zeros(1, q.shape[1], heads))
    head = torch.arange(heads, dtype=F64)
    if name == "chunk_retention":
        g = g + (1 - 2.0 ** (-5 - head)).log()
    if name == "chunk_lightning_attn":
        g = g - 8 / heads * (1 - given["layer_idx"] / given["num_layers"]) * head
    return gated_linear_attention_reference(q, k, v, g, **options)


@pytest.mark.parametrize("name", SIGNATURES)
def test_results_are_those_of_the_recurrence(name):
    """A scale, states, packed sequences of which one is empty, the norm where there is one; all by position."""
    given = sample(name, state=3)
    norm = NORM.split("=")[0] in SIGNATURES[name]
    options = {"scale": 0.3, "initial_state": given.pop("initial_state"), "cu_seqlens": CU}
    o, S, _ = written_out(name, given, **options, **({"qk_l2norm": True} if norm else {}))
    values = given | options | {"output_final_state": True} | ({"use_qk_l2norm_in_kernel": True} if norm else {})
    names = [part.split("=") for part in SIGNATURES[name].split("|")[0].split()]
    defaults = {"None": None, "False": False}
    positional = [values[n[0]] if n[0] in values else defaults[n[1]] for n in names]
    got, state = getattr(dn_lib, name)(*positional)
    # The decays of retention and Lightning are computed in float32, as fla does.
    bound = BOUND[F32] if name in ("chunk_retention", "chunk_lightning_attn") else BOUND[F64]
    assert relative_error(got, o) < bound and relative_error(state, S) < bound
    assert getattr(dn_lib, name)(**given)[1] is None


GROUPED = [name for name in SIGNATURES if name not in ("chunk_delta_rule", "fused_recurrent_delta_rule")]


@pytest.mark.parametrize("name", GROUPED)
def test_more_value_heads_than_key_heads(name):
    given = sample(name, H=2, H_v=6)
    o, _, _ = written_out(name, given)
    bound = BOUND[F32] if name in ("chunk_retention", "chunk_lightning_attn") else BOUND[F64]
    assert relative_error(getattr(dn_lib, name)(**given)[0], o) < bound


@pytest.mark.parametrize("name", [n for n in SIGNATURES if "state_v_first" in SIGNATURES[n]])
def test_states_with_values_first(name):
    """In and out; what comes out goes in as it is.  Products sum transposed operands in another order."""
    given = sample(name, state=1)
    S, function = given.pop("initial_state"), getattr(dn_lib, name)
    o, last = function(**given, initial_state=S, output_final_state=True)
    options = {"output_final_state": True, "state_v_first": True}
    flipped, state = function(**given, initial_state=S.mT.contiguous(), **options)
    assert relative_error(flipped, o) < BOUND[F64] and relative_error(state.mT, last) < BOUND[F64]
    again, state = function(**given, initial_state=state, **options)
    o, last = function(**given, initial_state=last, output_final_state=True)
    assert relative_error(again, o) < BOUND[F64] and relative_error(state.mT, last) < BOUND[F64]
    with pytest.raises(ValueError, match=r"initial_state must end in \[d_v, d_k\] = \[5, 6\] for state_v_first, got"):
        function(**given, initial_state=S, state_v_first=True)
    with pytest.raises(ValueError, match="initial_state must have four dimensions"):
        function(**given, initial_state=S[0], state_v_first=True)


GATED = ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")


@pytest.mark.parametrize("name", GATED)
def test_the_gate_and_beta_may_come_raw(name):
    """As fla's layer gives them: the gate's input and beta before its sigmoid."""
    given, function = sample(name), getattr(dn_lib, name)
    raw, logits = torch.randn_like(given["g"]), torch.randn_like(given["beta"])
    A_log, dt_bias = torch.randn(2, dtype=F64), torch.randn(2, dtype=F64)
    for bias in (dt_bias, None):
        g = -A_log.exp() * F.softplus(raw + (0 if bias is None else bias))
        o, _ = function(**given | {"g": raw}, use_gate_in_kernel=True, A_log=A_log, dt_bias=bias)
        assert relative_error(o, function(**given | {"g": g})[0]) < BOUND[F64]
    for twice in (False, True):
        beta = (2 if twice else 1) * logits.sigmoid()
        o, _ = function(**given | {"beta": logits}, use_beta_sigmoid_in_kernel=True, allow_neg_eigval=twice)
        assert relative_error(o, function(**given | {"beta": beta})[0]) < BOUND[F64]
    x = leaves(raw, A_log, dt_bias)
    o, _ = function(**given | {"g": x[0]}, use_gate_in_kernel=True, A_log=x[1], dt_bias=x[2])
    assert all(dx.abs().max() > 0 for dx in torch.autograd.grad(o.square().sum(), x))


def test_fused_recurrent_without_some_of_its_gates():
    given = sample("fused_recurrent_gated_delta_rule", H=1, H_v=2)
    q, k, v, beta, g = (given[n] for n in ("q", "k", "v", "beta", "g"))
    function = dn_lib.fused_recurrent_gated_delta_rule
    by_channel = log_gates(1, 24, 2, 6, seed=8)
    ones = torch.ones_like(beta)
    cases = [
        (function(q, k, v, beta=beta), (beta, torch.zeros_like(g))),
        (function(q, k, v, g), (ones, g)),
        (function(q, k, v, gk=by_channel, beta=beta), (beta, by_channel)),
        (function(q, k, v, g, by_channel, beta=beta), (beta, g[..., None] + by_channel)),
    ]
    for (o, _), gates in cases:
        assert relative_error(o, gated_delta_rule(q, k, v, *gates)[0]) < BOUND[F64]


def test_simple_gla_adds_its_two_gates():
    given, fixed = sample("chunk_simple_gla"), torch.tensor([-0.1, -0.5], dtype=F64)
    g = log_gates(1, 24, 2)
    for gates, expected in (({}, None), ({"g_gamma": fixed}, fixed), ({"g": g, "g_gamma": fixed}, g + fixed)):
        o, _ = dn_lib.chunk_simple_gla(**given, **gates)
        assert relative_error(o, linear_attention(**given, g=expected)[0]) < BOUND[F64]


@needs_triton
def test_the_recurrent_kernel_takes_what_it_can(auto_takes):
    """What happens on a GPU, where "auto" is Triton: one kernel, whatever the length; chunks where a gradient is."""
    auto_takes("triton")
    given = sample("fused_recurrent_gated_delta_rule", L=40, H_v=4, dtype=F32, state=1)
    (o, state), trace = observe(dn_lib.fused_recurrent_gated_delta_rule, **given, output_final_state=True)
    assert [launch.kernel for launch in trace.launches] == ["recurrent"]
    first = given.pop("initial_state")
    exact, S, _ = written_out("fused_recurrent_gated_delta_rule", given, initial_state=first)
    assert relative_error(o, exact) < BOUND[F32] and relative_error(state, S) < BOUND[F32]
    wanted = given | {"v": given["v"].requires_grad_()}
    (o, _), trace = observe(dn_lib.fused_recurrent_gated_delta_rule, **wanted)
    o.sum().backward()
    assert "recurrent" not in [launch.kernel for launch in trace.launches]
    without = {n: x for n, x in given.items() if n != "g"}
    (o, _), trace = observe(dn_lib.fused_recurrent_gated_delta_rule, **without | {"v": given["v"].detach()})
    assert [launch.kernel for launch in trace.launches] == ["recurrent"]


@pytest.mark.parametrize("name", [n for n in SIGNATURES if "chunk_size" in SIGNATURES[n]])
def test_chunk_size_goes_to_the_operator(name):
    given = sample(name)
    with pytest.raises(ValueError, match="chunk_size must be a positive integer or None, got 0"):
        getattr(dn_lib, name)(**given, chunk_size=0)
    few, many = (getattr(dn_lib, name)(**given, chunk_size=C)[0] for C in (5, 64))
    assert relative_error(few, many) < BOUND[F64] and not torch.equal(few, many)


REFUSED = {
    "chunk_delta_rule": {"chunk_indices": CU, "g": CU},
    "fused_recurrent_delta_rule": {"chunk_size": 16},
    "chunk_gated_delta_rule": {"gk": CU, "transpose_state_layout": True},
    "fused_recurrent_gated_delta_rule": {"chunk_size": 16, "cp_context": None},
    "chunk_simple_gla": {"gk": CU, "reverse": False},
    "chunk_retention": {"state_v_first": True, "cu_seqlens_cpu": CU},
    "chunk_lightning_attn": {"state_v_first": True},
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_have_no_counterpart(name):
    function, given = getattr(dn_lib, name), sample(name)
    for option, value in REFUSED[name].items():
        with pytest.raises(TypeError, match=f"{name} has no argument '{option}'"):
            function(**given, **{option: value})
    with pytest.raises(ValueError, match="head_first must be False"):
        function(**given, head_first=True)
    assert function(**given, head_first=False)[0].shape == (1, 24, 2, 5)


HEADS = (1, 24, 2)
BAD = {
    "cp_context": ("chunk_gated_delta_rule", {"cp_context": 1}, ValueError, "cp_context must be None"),
    "chunk_indices": ("chunk_gated_delta_rule", {"chunk_indices": [1]}, TypeError, "chunk_indices must be a tensor"),
    "a copy": ("chunk_gla", {"cu_seqlens": CU, "cu_seqlens_cpu": CU[:2]}, ValueError, "cu_seqlens_cpu must be a copy"),
    "gv": ("fused_recurrent_gated_delta_rule", {"gv": CU}, ValueError, "gv must be None: gates for value channels"),
    "channels of beta": (
        "chunk_gated_delta_rule",
        {"beta": torch.ones(1, 24, 2, 5)},
        ValueError,
        "beta must be [B, L, H_v]: one strength for each value channel, [1, 24, 2, 5], is not supported",
    ),
    "no g": ("chunk_gated_delta_rule", {"g": None}, TypeError, "g must be a tensor [B, L, H_v], got NoneType"),
    "no beta": ("chunk_gated_delta_rule", {"beta": None}, TypeError, "beta must be a tensor [B, L, H_v], got NoneType"),
    "no rate": ("chunk_gated_delta_rule", {"use_gate_in_kernel": True}, TypeError, "A_log must be a tensor where"),
    "rate": (
        "fused_recurrent_gated_delta_rule",
        {"use_gate_in_kernel": True, "A_log": torch.zeros(3)},
        ValueError,
        "A_log must be [H_v] = [2] to match g, got [3]",
    ),
    "raw g": (
        "fused_recurrent_gated_delta_rule",
        {"use_gate_in_kernel": True, "A_log": torch.zeros(2), "g": None},
        TypeError,
        "g must be a tensor where use_gate_in_kernel is True, got NoneType",
    ),
    "twice": ("chunk_gated_delta_rule", {"allow_neg_eigval": True}, ValueError, "allow_neg_eigval must be False where"),
    "flag": ("chunk_gla", {"state_v_first": 1}, TypeError, "state_v_first must be True or False, got 1"),
    "positive": ("chunk_simple_gla", {"g": torch.ones(HEADS)}, ValueError, "g must be at most 0"),
    "rank of g": ("chunk_simple_gla", {"g": torch.zeros(2)}, ValueError, "g must have three dimensions [B, L, H_v]"),
    "g_gamma": ("chunk_simple_gla", {"g_gamma": torch.zeros(3)}, ValueError, "g_gamma must be [H_v] = [2], got [3]"),
    "gla": ("chunk_gla", {"g": torch.zeros(HEADS)}, ValueError, "g must have four dimensions [B, L, H, d_k], got"),
    "gk": (
        "fused_recurrent_gated_delta_rule",
        {"gk": torch.zeros(1, 23, 2, 6)},
        ValueError,
        "gk must be [B, L, H_v, d_k] to match g, [1, 24, 2], got [1, 23, 2, 6]",
    ),
    "layer": ("chunk_lightning_attn", {"layer_idx": 4}, ValueError, "layer_idx must be at most num_layers = 3, got 4"),
    "no layers": ("chunk_lightning_attn", {"num_layers": 0}, ValueError, "num_layers must be an integer of at least 1"),
}


@pytest.mark.parametrize("name, change, error, message", BAD.values(), ids=BAD)
def test_bad_input_is_named(name, change, error, message):
    with pytest.raises(error, match=re.escape(message)):
        getattr(dn_lib, name)(**sample(name) | change)
