"""Every form and every kernel of every operator, as the registry declares them, against the recurrence in float64."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect

import pytest
import torch

from dn_lib import cost
from dn_lib.cost import Shape
from dn_lib.forms.chunkwise import multiply_adds
from dn_lib.operators import OPERATORS, OPTIONS, Form
from dn_lib.teaching.judge.trace import observe
from dn_lib.testing import LAYOUTS, forward_and_gradients, laid_out, leaves, offsets, relative_error

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# float64: 4500 eps, float32: 84 eps, for sums of up to some hundred terms, each rounded a few times.
BOUND = {F64: 1e-12, F32: 1e-5}
# Half precision rounds the inputs, which the reference gets rounded too, and in the kernels every operand of a dot: at
# most ROUNDINGS units one after the other from an input to a result. Triton's interpreter cuts bfloat16 where a GPU
# rounds, so that a unit is 2^-8.
UNIT, ROUNDINGS = {F16: 2**-11, BF16: 2**-8}, 8
FORMS = {
    f"{operator.name}, {name}": (operator, form)
    for operator in OPERATORS.values()
    for name, form in operator.every_form()
}


def cases(wanted, dtypes=()):
    """pytest's parameters: operators and forms for which `wanted(operator, form)`, with those of `dtypes` they take."""
    found = []
    for name, (operator, form) in FORMS.items():
        problem = form.why_not(DEVICE)
        marks = [pytest.mark.skip(reason=problem)] if problem else []
        if wanted(operator, form) and dtypes:
            taken = [dtype for dtype in dtypes if dtype in form.dtypes]
            found += [pytest.param(operator, form, dtype, id=f"{name}, {dtype}", marks=marks) for dtype in taken]
        elif wanted(operator, form):
            found.append(pytest.param(operator, form, id=name, marks=marks))
    return pytest.mark.parametrize(["operator", "form", "dtype"][: 3 if dtypes else 2], found)


every_form = cases(lambda operator, form: True)
packed = cases(lambda operator, form: "cu_seqlens" in form.takes)
any_length = cases(lambda operator, form: operator.length is None)


interpreted = pytest.mark.skipif(DEVICE.type != "cpu", reason="the interpreter traces kernels, and there is a GPU")


def bound(form: Form, dtype: torch.dtype) -> float:
    """For plain PyTorch in half precision: arithmetic is in float32, and the result is rounded."""
    if dtype in BOUND:
        return BOUND[dtype]
    return ROUNDINGS * UNIT[dtype] if form.triton else torch.finfo(dtype).eps


def takes(form: Form, **options):
    """Of `options` those that the form has."""
    return {name: value for name, value in options.items() if name in form.takes}


def sample(operator, B, L, *, state=None, **options):
    L = L if operator.length is None else operator.length
    return operator.sample(B, L, 2, 20, 24, state=state, device=DEVICE, **options)


# --- Values -----------------------------------------------------------------------------------------------------
@cases(lambda operator, form: True, [F64, F32, F16, BF16])
def test_values(operator, form, dtype):
    """With every option that the form has, at a length that no chunk divides."""
    *inputs, first = sample(operator, 2, 37, state=2 if "initial_state" in form.takes else None, dtype=dtype)
    options = takes(form, scale=0.7, initial_state=first, qk_l2norm=True)
    exact, last, size = operator.reference(*inputs, **options)
    o, state = form(*inputs, **options, **takes(form, chunk_size=16))
    assert o.dtype == dtype and state.dtype == (F64 if dtype == F64 else F32)
    assert relative_error(o, exact, size) < bound(form, dtype)
    # The forms in PyTorch compute in float32, and a state is not rounded.
    rounded = dtype if form.triton or dtype == F64 else F32
    assert relative_error(state, last, 0.0 if first is None else first.norm().item()) < bound(form, rounded)


@pytest.mark.parametrize("equal", [False, True])
@every_form
def test_keys_that_are_alike(operator, form, equal):
    """Nearly equal keys, and equal ones with the strongest writes: what a write meets of the others is largest."""
    dtype = form.dtypes[0]
    *inputs, _ = sample(operator, 1, 40, dtype=dtype, bias=3.0, equal=equal)
    exact, last, size = operator.reference(*inputs)
    o, state = form(*inputs, **takes(form, chunk_size=16))
    # States and outputs are sums over up to 40 writes, whose sizes are that of v, of which little may be left.
    written = inputs[2].double().norm().item()
    assert relative_error(o, exact, size) < bound(form, dtype)
    assert relative_error(state, last, written) < bound(form, dtype)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@every_form
def test_inputs_may_lie_in_memory_in_any_way(operator, form, layout):
    """Heads before time, or cut out of a wider tensor, in which NaN stands between the rows."""
    dtype = form.dtypes[0]
    *inputs, _ = sample(operator, 2, 37, dtype=dtype)
    exact, last, size = operator.reference(*inputs)
    strided = [laid_out(x, layout) for x in inputs]
    assert operator.length == 1 or not any(x.is_contiguous() for x in strided)
    o, state = form(*strided, **takes(form, chunk_size=16))
    assert relative_error(o, exact, size) < bound(form, dtype)
    assert relative_error(state, last) < bound(form, dtype)


@packed
def test_packed_sequences(operator, form):
    """Some of them empty, each with a state of its own, and each as if it were alone."""
    lengths = [0, 17, 1, 0, 22, 0]
    dtype, cu = form.dtypes[0], offsets(lengths, torch.int32, DEVICE)
    *inputs, first = sample(operator, 1, sum(lengths), state=len(lengths), dtype=dtype)
    exact, last, size = operator.reference(*inputs, initial_state=first, cu_seqlens=cu)
    o, state = form(*inputs, initial_state=first, cu_seqlens=cu, **takes(form, chunk_size=16))
    assert relative_error(o, exact, size) < bound(form, dtype)
    assert relative_error(state, last, first.norm().item()) < bound(form, dtype)


@any_length
def test_no_tokens(operator, form):
    """The state passes through, as a copy of its own, and so does its gradient."""
    *inputs, first = sample(operator, 2, 0, state=2 if "initial_state" in form.takes else None, dtype=F32)
    if first is not None and form.differentiable:
        first.requires_grad_()
    o, state = form(*inputs, **takes(form, initial_state=first))
    assert o.shape == inputs[2].shape
    assert torch.equal(state, torch.zeros_like(state) if first is None else first)
    if first is not None:
        assert state.data_ptr() != first.data_ptr()
        if form.differentiable:
            (gradient,) = torch.autograd.grad(state.sum(), first)
            assert torch.equal(gradient, torch.ones_like(first))


@cases(lambda operator, form: operator.length is None and "initial_state" in form.takes)
def test_a_state_carries_a_sequence_on(operator, form):
    dtype = form.dtypes[0]
    *inputs, first = sample(operator, 1, 40, state=1, dtype=dtype)
    exact, last, size = operator.reference(*inputs, initial_state=first)
    parts, state = [], first
    for piece in (slice(0, 23), slice(23, 24), slice(24, 40)):
        o, state = form(*(x[:, piece] for x in inputs), initial_state=state, **takes(form, chunk_size=16))
        parts.append(o)
    assert relative_error(torch.cat(parts, 1), exact, size) < bound(form, dtype)
    assert relative_error(state, last, first.norm().item()) < bound(form, dtype)


@every_form
def test_options_that_a_form_does_not_take_are_refused(operator, form):
    *inputs, _ = sample(operator, 1, 4, dtype=F32)
    for name in OPTIONS:
        if name not in form.takes:
            with pytest.raises(TypeError, match=f"this form does not take {name}"):
                form(*inputs, **{name: 1})
            form(*inputs, **{name: None})


# --- Gradients --------------------------------------------------------------------------------------------------
@cases(lambda operator, form: form.differentiable, [F64, F32, BF16])
def test_gradients(operator, form, dtype):
    """Of all inputs and the initial state, from gradients of o and of the final state; packed where it can be."""
    for lengths in (None, [0, 17, 1, 19]) if "cu_seqlens" in form.takes else (None,):
        cu = None if lengths is None else offsets(lengths, device=DEVICE)
        B, N = (2, 2) if lengths is None else (1, len(lengths))
        tensors = sample(operator, B, 37, state=N, dtype=dtype)
        _, _, do, *_, dstate = sample(operator, B, 37, state=N, dtype=dtype, seed=1)
        options = takes(form, scale=0.7, cu_seqlens=cu)
        exact = forward_and_gradients(operator.reference, leaves(*tensors, dtype=F64), do, dstate, **options)
        got = forward_and_gradients(form, leaves(*tensors), do, dstate, **options, **takes(form, chunk_size=16))
        for a, b in zip(got, exact, strict=True):
            assert relative_error(a, b) < bound(form, dtype)


# --- Costs ------------------------------------------------------------------------------------------------------
SHAPE = Shape(B=2, L=48, H=2, d_k=16, d_v=32, C=16, element=4)


def of_shape(operator):
    """The shape of the costs, and inputs and a state of that shape."""
    shape = SHAPE if operator.length is None else dataclasses.replace(SHAPE, L=operator.length)
    tensors = operator.sample(shape.B, shape.L, shape.H, shape.d_k, shape.d_v, dtype=F32, state=shape.B)
    return shape, tensors


@cases(lambda operator, form: form.flops is not None)
def test_flops_are_those_counted(operator, form):
    shape, (*inputs, _) = of_shape(operator)
    assert 2 * multiply_adds(form, *inputs, **takes(form, chunk_size=shape.C)) == form.flops(shape)


def assert_counted(trace, costs):
    assert len(trace.launches) == len(costs)
    for launch, expected in zip(trace.launches, costs, strict=True):
        assert launch.bytes() == expected.requested, expected.name
        assert launch.bytes("store") == sum(expected.writes.values()), expected.name
        assert sum(dot.flops for dot in launch.dots) == (expected.flops if launch.dots else 0), expected.name


@interpreted
@cases(lambda operator, form: form.cost is not None)
def test_kernels_move_and_multiply_what_is_predicted(operator, form):
    """Steps of one token have no dots: their work is sums."""
    shape, (*inputs, first) = of_shape(operator)
    state = first if operator.length == 1 else None
    _, trace = observe(form, *inputs, **takes(form, chunk_size=shape.C, initial_state=state))
    costs = form.cost(shape)
    assert_counted(trace, costs)
    assert cost.total_flops(costs) > 0 and cost.total_bytes(costs) >= cost.total_bytes(operator.compulsory(shape))


@interpreted
@cases(lambda operator, form: form.training is not None, [F32, BF16])
def test_training_moves_and_multiplies_what_is_predicted(operator, form, dtype):
    shape, (*inputs, _) = of_shape(operator)
    shape = dataclasses.replace(shape, element=dtype.itemsize)
    inputs = leaves(*inputs, dtype=dtype)
    forward, backward = form.training(shape)
    (o, _), trace = observe(form, *inputs, **takes(form, chunk_size=shape.C))
    assert_counted(trace, forward)
    _, trace = observe(torch.autograd.grad, o, inputs, torch.ones_like(o))
    assert_counted(trace, backward)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_compulsory_bytes_are_those_of_the_tensors(operator):
    shape, (*inputs, _) = of_shape(operator)
    forward, backward = operator.compulsory(shape, backward=True)
    assert forward.bytes == sum(x.nbytes for x in inputs) + inputs[2].nbytes
    assert backward.bytes == 2 * sum(x.nbytes for x in inputs) + inputs[2].nbytes


# --- The registry itself ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_an_entry_is_whole(operator):
    assert OPERATORS[operator.name] is operator
    assert operator.inputs[:3] == ("q", "k", "v")
    assert len(sample(operator, 1, 3)) == len(operator.inputs) + 1
    assert any(form.differentiable and F64 in form.dtypes for form in operator.forms.values())
    for form in operator.forms.values():
        assert form.cost is form.training is None and not form.triton


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_peers_are_called_by_their_own_names(operator):
    """Where the peer is installed, its function has all the arguments that the entry says."""
    for peer in operator.peers.values():
        given = peer.keywords(**dict.fromkeys((*operator.inputs, *OPTIONS)))
        assert {"q", "k", "v", "scale", "initial_state"} <= set(given)
        if importlib.util.find_spec(peer.function.split(".")[0]) is not None:
            inspect.signature(peer.load()).bind(**given)


def test_an_unknown_option_is_named():
    with pytest.raises(ValueError, match=r"takes must hold names of scale, .*, got scales"):
        Form(torch.add, takes=("scale", "scales"))
