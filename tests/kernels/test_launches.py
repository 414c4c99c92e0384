"""What the operator promises of memory: which tensors it reads, which it writes, and that autograd hears of it."""

from __future__ import annotations

import inspect

import pytest
import torch

from dn_lib import decode_delta_rule, delta_rule, fused_recurrent_delta_rule, ops
from dn_lib.forms import decay
from dn_lib.forms import householder as hh
from dn_lib.forms import linear_attention as la
from dn_lib.forms.affine import segment_affine
from dn_lib.forms.chunkwise import chunkwise_delta_rule, parallel_delta_rule, varlen_delta_rule
from dn_lib.forms.chunkwise_backward import reversible_chunkwise_delta_rule
from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.forms.gated import recurrent_gated_delta_rule
from dn_lib.testing import (
    delta_rule_inputs,
    delta_rule_reference,
    forward_and_gradients,
    leaves,
    poisoned,
    relative_error,
)

F32, F64 = torch.float32, torch.float64
needs_triton = pytest.mark.skipif(ops.triton_problem(torch.device("cpu")) is not None, reason="needs the interpreter")
every_backend = pytest.mark.parametrize(
    "backend", ["recurrent", "parallel", "chunkwise", pytest.param("triton", marks=needs_triton)]
)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every-second": lambda x: torch.stack([x, x * 0 + 9], dim=-1)[..., 0],
    "offset": lambda x: torch.cat([x * 0 + 9, x], dim=0)[x.shape[0] :],
    "negative-view": lambda x: torch._neg_view(-x),
    "imaginary-part": lambda x: torch.complex(x * 0, -x).conj().imag,
}


# --- Reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@needs_triton
def test_any_layout_is_read_as_its_values(layout):
    """Of every input and of both upstream gradients, in each kernel."""
    change = LAYOUTS[layout]
    x = delta_rule_inputs(1, 17, 2, 5, 6, state=1)
    upstream = delta_rule_inputs(1, 17, 2, 5, 6, seed=1, state=1)[2::2]
    run = {"output_final_state": True, "backend": "triton", "chunk_size": 16}
    odd = [change(y).detach().requires_grad_() for y in x]
    plain = forward_and_gradients(delta_rule, leaves(*x), *upstream, **run)
    for a, b in zip(plain, forward_and_gradients(delta_rule, odd, *map(change, upstream), **run), strict=True):
        assert torch.equal(a, b)
    *x, S = delta_rule_inputs(1, 2, 2, 5, 6, state=1)  # a short call without a gradient: the recurrent kernel
    run = {"output_final_state": True, "backend": "triton"}
    expected = delta_rule(*x, initial_state=S, **run)
    for a, b in zip(expected, delta_rule(*map(change, x), initial_state=change(S), **run), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["q", "k", "v", "beta"])
@every_backend
def test_expanded_inputs_and_their_gradients(name, backend):
    tensors = delta_rule_inputs(1, 17, 2, 5, 6, dtype=F64 if backend != "triton" else F32)
    x = dict(zip(("q", "k", "v", "beta"), tensors, strict=False))
    row = x[name][:, :1].detach().requires_grad_()
    x[name] = row.expand_as(x[name])
    o, _ = delta_rule(**x, backend=backend)
    (got,) = torch.autograd.grad(o.square().sum(), row)
    wide = {key: y.detach().double() for key, y in x.items()}
    again = wide[name][:, :1].clone().requires_grad_()
    wide[name] = again.expand_as(wide[name])
    (expected,) = torch.autograd.grad(delta_rule_reference(**wide)[0].square().sum(), again)
    # Sums over 17 tokens and 6 channels, each term rounded a few times: 84 eps of float32, 4500 of float64.
    assert relative_error(got, expected) < (1e-5 if backend == "triton" else 1e-12)


@pytest.mark.parametrize("gradient, length", [(True, 20), (False, 20), (False, 9)])
@every_backend
def test_offsets_of_any_layout(backend, gradient, length):
    """A column of a table, int32 and int64; training, inference and short prompts, which run other kernels."""
    *x, S = delta_rule_inputs(1, length, 1, 4, 5, state=3)
    x = leaves(*x) if gradient else x
    cu = torch.tensor([0, 5, 5, length])
    column = torch.stack([cu, cu * 0 + 99], dim=1).int()[:, 0]
    assert not column.is_contiguous()
    options = {"initial_state": S, "output_final_state": True, "backend": backend}
    results = [delta_rule(*x, cu_seqlens=offsets, **options) for offsets in (cu, column)]
    if gradient:
        results = [(*r, *torch.autograd.grad(r[0].square().sum() + r[1].sum(), x)) for r in results]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


BAD_OFFSETS = [[0, 5, 2, 24], [0, -3, 24], [-3, 24], [2, 24], [0, 20], [0, 25], [0, 2**31 - 1], [0, 2**31 - 1, 24]]


@pytest.mark.parametrize("offsets", BAD_OFFSETS, ids=str)
@every_backend
def test_offsets_are_checked_on_a_cpu(backend, offsets):
    """In every kernel, in the backward too, compiled as well: never followed outside."""
    x = delta_rule_inputs(1, 24, 1, 4, 5)[:4]
    cu = torch.tensor(offsets)
    for tensors in (x, leaves(*x)):
        with pytest.raises(ValueError, match=r"^cu_seqlens must rise from 0 to L = 24, got"):
            delta_rule(*tensors, cu_seqlens=cu, backend=backend)
    with pytest.raises(ValueError, match=r"^cu_seqlens must rise from 0 to L = 24, got"):
        fused_recurrent_delta_rule(*x, cu_seqlens=cu)
    if backend == "triton":
        with torch.no_grad(), pytest.raises(ValueError, match=r"^cu_seqlens must rise"):
            torch.ops.dn_lib.delta_rule(*x, None, None, cu, 0.5, False, 16, False)


@needs_triton
@pytest.mark.parametrize("offsets, safe", [([0, -7, 30, 12, 24], [0, 0, 24, 24, 24]), ([3, 2, 9], [3, 3, 9])])
def test_offsets_where_they_are_not_read_cannot_lead_outside(offsets, safe):
    """What happens on a GPU, whose offsets no operator reads: a launch clamps them and makes them rise.

    Tokens of no sequence get zeros.
    """
    from dn_lib.kernels.arguments import token_offsets
    from dn_lib.kernels.delta_rule import launch
    from dn_lib.kernels.plan import plan_call

    *x, S = delta_rule_inputs(1, 24, 1, 4, 5, state=len(offsets) - 1)
    cu = torch.tensor(offsets)
    assert token_offsets(cu, x[0]).tolist() == safe
    first, last = safe[0], safe[-1]
    do, dS = torch.ones_like(x[2]), torch.ones_like(S)
    inside, inside_cu = [y[:, first:last] for y in x], torch.tensor(safe) - first
    options = {"cu_seqlens": inside_cu, "backend": "triton", "output_final_state": True, "chunk_size": 16}
    with poisoned():
        plan = plan_call(*x[:3], cu_seqlens=cu, training=True, chunk=16)
        shared = {"plan": plan, "q": x[0], "k": x[1], "beta": x[3], "scale": 0.5}
        o, state, saved = launch.forward(**shared, v=x[2], initial_state=S, cu_seqlens=cu, final_state=True)
        *gradients, dfirst = launch.backward(**shared, saved=saved, do=do, dstate=dS, initial_state=True)
        expected = forward_and_gradients(delta_rule, leaves(*inside, S), do[:, first:last], dS, **options)
        assert torch.equal(state, expected[1]) and torch.equal(dfirst, expected[6])
        for got, wanted in zip((o, *gradients), (expected[0], *expected[2:6]), strict=True):
            assert torch.equal(got[:, first:last], wanted)
            assert not got[:, :first].any() and not got[:, last:].any()
        o, expected = (
            launch.recurrent(
                plan=plan_call(*y[:3], cu_seqlens=edges, chunk=None), q=y[0], k=y[1], v=y[2], beta=y[3], scale=0.5,
                initial_state=S, cu_seqlens=edges,
            )
            for y, edges in ((x, cu), (inside, inside_cu))
        )  # fmt: skip
    assert torch.equal(o[:, first:last], expected) and not o[:, :first].any() and not o[:, last:].any()


@needs_triton
def test_a_launch_refuses_what_has_no_memory():
    from dn_lib.kernels.arguments import readable

    x = torch.zeros(2, 3)
    for bad, message in [
        (x.to("meta"), "k must be on cpu like q, got meta"),
        (x.to_sparse(), "k must be a dense tensor, got layout"),
        ([1.0], "k must be a tensor, got list"),
    ]:
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            readable(q=x, k=bad)
    with pytest.raises(ValueError, match=r"^q must have values"):
        readable(q=x.to("meta"))


@needs_triton
def test_the_operator_of_the_dispatcher_checks_shapes():
    x = list(delta_rule_inputs(1, 20, 1, 4, 5)[:4])
    x[1] = x[1][:, :7]
    with pytest.raises(ValueError, match=r"^k must be \[B, L, H, d_k\]"):
        torch.ops.dn_lib.delta_rule(*x, None, None, None, 0.5, False, 16, False)


@needs_triton
def test_tensors_that_handle_operators_themselves_go_through_the_dispatcher():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        x = [mode.from_tensor(y) for y in delta_rule_inputs(1, 20, 1, 4, 5)[:4]]
        o, state = delta_rule(*x, backend="triton", output_final_state=True)
        assert o.shape == x[2].shape and state.shape == (1, 1, 4, 5) and type(o) is type(x[0])
        with pytest.raises(ValueError, match=r"^state must hold its own values"):
            decode_delta_rule(*(y[:, 0] for y in x), state)


LADDER = {
    "scaled_add": ("x y", {"a": 2.0}),
    "matmul": ("a b", {}),
    "round_to_tf32": ("x", {}),
    "linear_attention": ("q k v", {}),
    "ut_transform": ("k beta", {}),
    "delta_rule_in_steps": ("q k v beta", {}),
    "delta_rule_in_one": ("q k v beta", {}),
}


def flat(results):
    """The tensors of a result, those in its dictionaries too."""
    for x in results if isinstance(results, tuple) else (results,):
        yield from x.values() if isinstance(x, dict) else (x,)


@needs_triton
@pytest.mark.parametrize("name", LADDER)
def test_the_kernels_of_the_ladder_read_any_layout_and_name_what_does_not_fit(name):
    from dn_lib.kernels import ladder

    function, (names, options) = getattr(ladder, name), LADDER[name]
    known = dict(zip(("q", "k", "v", "beta"), delta_rule_inputs(1, 20, 2, 8, 8)[:4], strict=True))
    known |= {x: torch.rand(9, 9) for x in "xyab"}
    x = {key: known[key] for key in names.split()}
    expected = list(flat(function(**x, **options)))
    for change in LAYOUTS.values():
        odd = {key: change(y) for key, y in x.items()}
        assert all(map(torch.equal, flat(function(**odd, **options)), expected))
    for key in x:
        malformed = [None, x[key].long(), x[key].to("meta"), x[key][None]]
        for bad in malformed[: 3 if name == "round_to_tf32" else 4]:  # which takes any shape
            with pytest.raises((TypeError, ValueError), match=f"^({'|'.join(x)}) must"):
                function(**x | {key: bad}, **options)
    for argument, bad in [("scale", "x"), ("chunk_size", 24), ("chunk_size", True), ("block_v", 8), ("method", "lu")]:
        if argument in inspect.signature(function).parameters:
            with pytest.raises((TypeError, ValueError), match=f"^{argument} must"):
                function(**x, **options, **{argument: bad})


# --- Writing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=needs_triton)])
def test_decoding_raises_the_version_of_its_state(auto_takes, kernel):
    """A backward through an earlier use of the state fails, in PyTorch's own words, instead of using the new values."""
    if kernel:
        auto_takes("triton")
    *x, S = leaves(*delta_rule_inputs(1, 20, 1, 4, 5, state=1))
    _, state = delta_rule(*x, initial_state=S, output_final_state=True)
    loss = state.square().sum()
    token = [y[:, 0].detach() for y in x]
    before = state._version
    decode_delta_rule(*token, state.detach())
    assert state._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=needs_triton)])
def test_decoding_raises_the_version_of_an_initial_state(auto_takes, kernel):
    if kernel:
        auto_takes("triton")
    *x, _ = leaves(*delta_rule_inputs(1, 20, 1, 4, 5))
    S = torch.ones(1, 1, 4, 5)
    o, _ = delta_rule(*x, initial_state=S)
    decode_delta_rule(*(y[:, 0].detach() for y in x), S)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.square().sum().backward()


@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=needs_triton)])
def test_decoding_in_inference_mode(auto_takes, kernel):
    """Such tensors have no version; one made outside has."""
    if kernel:
        auto_takes("triton")
    x = [y[:, 0] for y in delta_rule_inputs(1, 1, 1, 4, 5)[:4]]
    outside = torch.zeros(1, 1, 4, 5)
    with torch.inference_mode():
        inside = torch.zeros(1, 1, 4, 5)
        decode_delta_rule(*x, inside), decode_delta_rule(*x, outside)
    assert torch.equal(inside, outside) and outside.any() and outside._version > 0


@pytest.mark.parametrize("name", ["q", "k", "v", "beta"])
def test_decoding_refuses_to_lose_a_gradient(name):
    x = dict(zip(("q", "k", "v", "beta"), (y[:, 0] for y in delta_rule_inputs(1, 1, 1, 4, 5)[:4]), strict=True))
    x[name].requires_grad_()
    state = torch.zeros(1, 1, 4, 5)
    with pytest.raises(RuntimeError, match=f"^decode_delta_rule is not differentiable, and {name} requires a gradient"):
        decode_delta_rule(**x, state=state)
    assert not state.any()
    with torch.no_grad():
        decode_delta_rule(**x, state=state)


q, k, v, beta, S = (x[0] if x.ndim > 3 else x for x in delta_rule_inputs(1, 0, 2, 4, 3, state=1))
q, k, v = (x.transpose(0, 1) for x in (q, k, v))
beta = beta[0].mT
OF_NO_TOKENS = {
    "recurrent": lambda s: recurrent_delta_rule(q, k, v, beta, initial_state=s)[1],
    "gated": lambda s: recurrent_gated_delta_rule(q, k, v, beta, -beta, initial_state=s)[1],
    "parallel": lambda s: parallel_delta_rule(q, k, v, beta, initial_state=s)[1],
    "chunkwise": lambda s: chunkwise_delta_rule(q, k, v, beta, initial_state=s)[1],
    "reversible": lambda s: reversible_chunkwise_delta_rule(q, k, v, beta, initial_state=s)[1],
    "segment": lambda s: segment_affine(k, v, beta, initial_state=s)[1],
    "varlen": lambda s: varlen_delta_rule(q, k, v, beta, torch.tensor([0, 0]), initial_state=s[:, None])[1][:, 0],
    "householder": lambda s: hh.apply_householder(k, beta, s),
    "linear": lambda s: la.recurrent_linear_attention(q, k, v, initial_state=s)[1],
    "linear-parallel": lambda s: la.parallel_linear_attention(q, k, v, initial_state=s)[1],
    "linear-chunkwise": lambda s: la.chunkwise_linear_attention(q, k, v, initial_state=s)[1],
    "decay": lambda s: decay.recurrent_decay_attention(q, k, v, k, initial_state=s)[1],
}


@pytest.mark.parametrize("form", OF_NO_TOKENS)
def test_the_state_of_no_tokens_is_a_copy(form):
    given = S.clone()
    state = OF_NO_TOKENS[form](given)
    assert torch.equal(state, given)
    state += 1
    assert torch.equal(given, S)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@every_backend
def test_the_operator_never_hands_back_the_callers_state(backend, packed, gradient):
    for length in (0, 3, 20):
        *x, S = delta_rule_inputs(1, length, 2, 4, 5, state=1)
        given = S.clone().requires_grad_(gradient)
        cu = torch.tensor([0, length]) if packed else None
        _, state = delta_rule(*x, initial_state=given, output_final_state=True, backend=backend, cu_seqlens=cu)
        assert state.untyped_storage().data_ptr() != given.untyped_storage().data_ptr()
        decode_delta_rule(*(torch.ones(1, 2, d) for d in (4, 4, 5)), torch.ones(1, 2), state.detach())
        assert torch.equal(given, S)


# --- The dtype of states ----------------------------------------------------------------------------------------

LENGTH = 6
q1, k1, v1 = (torch.rand(LENGTH, d) / 2 for d in (4, 4, 3))
STATES = {
    "recurrent": (recurrent_delta_rule, {"q": q1, "k": k1, "v": v1, "beta": q1[:, 0]}),
    "gated": (recurrent_gated_delta_rule, {"q": q1, "k": k1, "v": v1, "beta": q1[:, 0], "g": -q1[:, 1]}),
    "parallel": (parallel_delta_rule, {"q": q1, "k": k1, "v": v1, "beta": q1[:, 0]}),
    "chunkwise": (chunkwise_delta_rule, {"q": q1, "k": k1, "v": v1, "beta": q1[:, 0]}),
    "reversible": (reversible_chunkwise_delta_rule, {"q": q1, "k": k1, "v": v1, "beta": q1[:, 0]}),
    "linear": (la.recurrent_linear_attention, {"q": q1, "k": k1, "v": v1}),
    "linear-parallel": (la.parallel_linear_attention, {"q": q1, "k": k1, "v": v1}),
    "linear-chunkwise": (la.chunkwise_linear_attention, {"q": q1, "k": k1, "v": v1}),
    "decay": (decay.recurrent_decay_attention, {"q": q1, "k": k1, "v": v1, "decay": k1}),
}


@pytest.mark.parametrize("form", STATES)
def test_a_state_is_as_wide_as_the_widest_input(form):
    function, inputs = STATES[form]
    inputs = inputs | {"initial_state": torch.rand(4, 3)}
    assert function(**inputs)[1].dtype == F32
    wide = {name: x.double() for name, x in inputs.items()}
    exact = function(**wide)[1]
    for name in inputs:
        state = function(**inputs | {name: wide[name]})[1]
        assert state.dtype == F64, name
        assert relative_error(state, exact) < 1e-12, name  # float32 numbers, computed with in float64: 4500 eps of it


@pytest.mark.parametrize("name", ["q", "k", "v", "beta", "initial_state"])
@every_backend
def test_the_operator_computes_in_the_dtype_of_q(backend, name):
    """q, k and v have one dtype; a wider beta or state does not change it, whatever the backend."""
    x = dict(zip(("q", "k", "v", "beta", "initial_state"), delta_rule_inputs(1, 18, 1, 4, 5, state=1), strict=True))
    if name in ("q", "k", "v"):
        with pytest.raises(TypeError, match=r"must have the dtype of q"):
            delta_rule(**x | {name: x[name].double()}, backend=backend)
        return
    x[name] = x[name].double().requires_grad_()
    o, state = delta_rule(**x, output_final_state=True, backend=backend)
    assert o.dtype == state.dtype == F32
    assert torch.autograd.grad(o.sum(), x[name])[0].dtype == F64
