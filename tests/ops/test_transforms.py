"""Derivatives of other kinds: torch.func, forward mode, second derivatives.  They work, or say what to use instead."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap

from dn_lib import decode_delta_rule, delta_rule, fused_recurrent_delta_rule, ops
from dn_lib.forms.chunkwise import chunkwise_delta_rule
from dn_lib.forms.chunkwise_backward import reversible_chunkwise_delta_rule
from dn_lib.parallel.affine import sequence_parallel_delta_rule
from dn_lib.testing import delta_rule_inputs, leaves, relative_error

F64 = torch.float64
needs_triton = pytest.mark.skipif(ops.triton_problem(torch.device("cpu")) is not None, reason="needs the interpreter")


def inputs(dtype=torch.float32):
    return delta_rule_inputs(1, 5, 1, 3, 2, dtype=dtype)[:4]


def loss(q, k, v, beta, **options):
    return delta_rule(q, k, v, beta, **options)[0].square().sum()


def forward_mode(f, *x):
    with fwad.dual_level():
        return fwad.unpack_dual(f(fwad.make_dual(x[0], torch.ones_like(x[0])), *x[1:])).tangent


TRANSFORMS = {
    "vmap": lambda f, *x: vmap(f)(*(torch.stack([y, y]) for y in x)),
    "grad": lambda f, *x: grad(f)(*x),
    "vjp": lambda f, *x: vjp(f, *x)[1](torch.ones(()))[0],
    "jvp": lambda f, *x: jvp(f, x, tuple(torch.ones_like(y) for y in x))[1],
    "jacrev": lambda f, *x: jacrev(f)(*x),
    "hessian": lambda f, *x: hessian(f)(*x),
    "forward-mode": forward_mode,
    "gradients-at-once": lambda f, *x: torch.autograd.grad(
        torch.stack([f(*x)] * 2), x[0], torch.eye(2), is_grads_batched=True
    ),
}


@needs_triton
@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_triton_says_what_it_cannot_do_and_what_can(transform, short):
    x = leaves(*inputs()) if transform == "gradients-at-once" else inputs()
    chunk = None if short else 16  # short calls without a gradient run another kernel
    with pytest.raises(
        RuntimeError, match=r"backend 'triton'.*(torch\.func|forward-mode|is_grads_batched).*use backend='chunkwise'"
    ):
        TRANSFORMS[transform](lambda *y: loss(*y, backend="triton", chunk_size=chunk), *x)


@needs_triton
@pytest.mark.parametrize("transform", [name for name in TRANSFORMS if name != "gradients-at-once"])
@pytest.mark.parametrize("function", [delta_rule, fused_recurrent_delta_rule])
def test_auto_takes_chunkwise_where_triton_cannot(auto_takes, function, transform):
    """What happens on a GPU, where "auto" is Triton."""
    x = inputs()
    run = TRANSFORMS[transform]
    expected = run(lambda *y: loss(*y, backend="chunkwise"), *x)
    auto_takes("triton")
    got = run(lambda *y: function(*y)[0].square().sum(), *x)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("transform", [name for name in TRANSFORMS if name != "hessian"])
def test_the_pytorch_forms_take_every_transform(transform):
    x = leaves(*inputs(F64)) if transform == "gradients-at-once" else inputs(F64)
    results = [TRANSFORMS[transform](lambda *y, b=b: loss(*y, backend=b), *x) for b in ("recurrent", "chunkwise")]
    if transform == "gradients-at-once":
        results = [r[0] for r in results]
    assert relative_error(*results) < 1e-12  # both in float64: 4500 eps of it


def test_hessian_of_a_pytorch_form():
    q, k, v, beta = inputs(F64)
    run = lambda b: hessian(lambda b: loss(q, k, v, b, backend="chunkwise"))(beta)  # noqa: E731
    x = beta.clone().requires_grad_()
    expected = torch.autograd.functional.hessian(lambda b: loss(q, k, v, b, backend="recurrent"), x)
    assert relative_error(run(beta), expected) < 1e-12


BY_HAND = {
    "triton": (lambda *x: delta_rule(*x, backend="triton")[0], "use backend='chunkwise'"),
    "reversible": (lambda *x: reversible_chunkwise_delta_rule(*x)[0], "use chunkwise_delta_rule"),
}


@pytest.mark.parametrize("form", [pytest.param("triton", marks=needs_triton), "reversible"])
@pytest.mark.parametrize("upstream", ["constant", "needs-a-gradient"])
def test_a_second_derivative_is_never_taken_for_zero(form, upstream):
    """The upstream gradient of a sum is a constant: PyTorch's once_differentiable lets that case pass."""
    run, remedy = BY_HAND[form]
    x = leaves(*inputs())
    o = run(*x)
    value = o.sum() if upstream == "constant" else o.square().sum()
    gradients = torch.autograd.grad(value, x, create_graph=True)
    penalty = o.square().sum() + sum(g.square().sum() for g in gradients)
    with pytest.raises(RuntimeError, match=remedy):
        penalty.backward()


@pytest.mark.parametrize("form", [pytest.param("triton", marks=needs_triton), "reversible"])
def test_create_graph_alone_is_no_second_derivative(form):
    run, _ = BY_HAND[form]
    x = leaves(*inputs())
    once = torch.autograd.grad(run(*x).square().sum(), x)
    for a, b in zip(once, torch.autograd.grad(run(*x).square().sum(), x, create_graph=True), strict=True):
        assert torch.equal(a, b.detach())


@pytest.mark.parametrize("function", [reversible_chunkwise_delta_rule, sequence_parallel_delta_rule])
def test_hand_written_derivatives_name_the_form_that_has_all(function):
    q, k, v, beta = (x.transpose(1, 2) for x in inputs())
    with pytest.raises(RuntimeError, match=r"does not support torch\.func transforms.*chunkwise_delta_rule"):
        grad(lambda q: function(q, k, v, beta)[0].sum())(q)
    with fwad.dual_level(), pytest.raises(RuntimeError, match=r"forward-mode.*chunkwise_delta_rule"):
        function(fwad.make_dual(q, q), k, v, beta)
    assert grad(lambda q: chunkwise_delta_rule(q, k, v, beta)[0].sum())(q).any()


def test_decoding_names_what_can_be_differentiated():
    x = [y[:, 0] for y in inputs()]
    state = torch.zeros(1, 1, 3, 2)
    with pytest.raises(RuntimeError, match=r"^decode_delta_rule does not support torch\.func.*use delta_rule"):
        grad(lambda q: decode_delta_rule(q, *x[1:], state).sum())(x[0])
    with fwad.dual_level(), pytest.raises(RuntimeError, match=r"^decode_delta_rule does not support forward-mode"):
        decode_delta_rule(fwad.make_dual(x[0], x[0]), *x[1:], state)
    assert not state.any()


@needs_triton
def test_compiled_transforms_too(auto_takes):
    torch._dynamo.reset()
    x = inputs()
    compiled = torch.compile(lambda *y, **o: grad(lambda *z: loss(*z, **o))(*y), backend="aot_eager")
    expected = grad(lambda *y: loss(*y, backend="chunkwise"))(*x)
    with pytest.raises(RuntimeError, match=r"backend 'triton' does not support torch\.func.*use backend='chunkwise'"):
        compiled(*x, backend="triton")
    auto_takes("triton")
    assert relative_error(compiled(*x), expected.double()) < 1e-6  # 8 eps: the compiler may sum in another order
