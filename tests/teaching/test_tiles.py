"""The tile visualiser: what is recorded, what is left out, and what two programs race for."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from dn_lib.kernels import ladder
from dn_lib.teaching import pictures as tiles
from dn_lib.teaching.judge import trace as tracing

tl, jit = ladder.tl, ladder.triton.jit  # imported by dn_lib, which switches the interpreter on
pytestmark = pytest.mark.skipif(not ladder.interpreted(), reason="record() needs the interpreter")


@jit
def shifted_copy(x_ptr, out_ptr, n, shift, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(out_ptr + i + shift, x, mask=i < n)


@jit
def swap_neighbours(x_ptr, out_ptr):
    p = tl.program_id(0)
    tl.store(out_ptr + p, tl.load(x_ptr + (p ^ 1)))


@jit
def count_all(out_ptr):
    tl.atomic_add(out_ptr, 1.0)


def test_accesses_are_recorded_by_program():
    with tracing.record() as trace:
        ladder.scaled_add(torch.ones(40), torch.ones(40), 1.0, block=16)
    (launch,) = trace.launches
    assert (launch.kernel, launch.grid) == ("scaled_add_kernel", (3, 1, 1))
    assert launch.shapes == {"x": (40,), "y": (40,), "out": (40,)}
    stored = [a.elements.tolist() for a in launch.accesses if a.kind == "store"]
    assert stored == [list(range(16)), list(range(16, 32)), list(range(32, 40))]
    assert trace.bytes() == 3 * 40 * 4 and trace.bytes("load", "y") == 40 * 4


def test_dots_are_recorded():
    with tracing.record() as trace:
        ladder.matmul(torch.ones(32, 48), torch.ones(48, 16))
    dots = trace.launches[0].dots
    assert [(d.m, d.k, d.n, d.types, d.precision) for d in dots] == [(16, 16, 16, ("fp32", "fp32"), "ieee")] * 6
    assert trace.flops == 2 * 32 * 48 * 16


def test_results_are_copied_back():
    x, out = torch.arange(10.0), torch.zeros(10)
    with tracing.record():
        shifted_copy[(1,)](x, out, 10, 0, BLOCK=16)
    assert torch.equal(x, out)


def test_views_keep_what_lies_between_their_rows():
    """Strides, and tensors of several types in one launch."""
    x, out = torch.arange(12.0).reshape(3, 4)[:, 1:3], torch.zeros(10, dtype=torch.float64)
    with tracing.record() as trace:
        shifted_copy[(1,)](x, out, 10, 0, BLOCK=16)
    assert not trace.outside and out.tolist() == list(range(1, 11))


def test_one_tensor_under_two_names_stays_one():
    x = torch.arange(8.0)
    with tracing.record() as trace:
        shifted_copy[(1,)](x, x[2:], 6, 0, BLOCK=8)
        shifted_copy[(1,)](x, x, 8, 0, BLOCK=8)
    assert x.tolist() == [0, 1, 0, 1, 2, 3, 4, 5] and not trace.outside


def test_neighbours_in_one_allocation_are_told_apart():
    x, out = torch.zeros(2, 8).unbind(0)
    with tracing.record() as trace:
        shifted_copy[(1,)](x, out, 10, 0, BLOCK=16)
    assert sorted({o.tensor for o in trace.outside}) == ["out", "x"]


@pytest.mark.parametrize("shift", [3, -2, 10**5])
def test_stray_stores_are_named_and_left_out(shift):
    x, out = torch.ones(10), torch.zeros(10)
    with tracing.record() as trace:
        shifted_copy[(1,)](x, out, 10, shift, BLOCK=16)
    (stray,) = trace.outside
    assert (stray.kind, stray.tensor, stray.shape) == ("store", "out", (10,))
    assert stray.count == min(abs(shift), 10)
    assert stray.index == ((shift,) if abs(shift) >= 10 else (10,) if shift > 0 else (shift,))
    assert f"would store out[{stray.index[0]}], but out is [10]" in str(stray)
    assert "tl.store(out_ptr + i + shift, x, mask=i < n)" in str(stray)
    assert out.sum() == 10 - stray.count


def test_the_index_of_a_stray_access_follows_the_shape():
    x, out = torch.ones(2, 3, 4), torch.ones(32)
    with tracing.record() as trace:
        shifted_copy[(1,)](x, out, 26, 0, BLOCK=32)
    assert trace.outside[0].index == (2, 0, 0) and trace.outside[0].kind == "load"


def test_what_lies_outside_of_all_tensors_is_read_as_zero():
    x, out = torch.ones(4), torch.ones(16)
    with tracing.record():
        shifted_copy[(1,)](x, out, 16, 0, BLOCK=16)
    assert out.tolist() == [1.0] * 4 + [0.0] * 12


def test_a_store_that_another_program_loads_is_a_race():
    x = torch.ones(2)
    with tracing.record() as trace:
        swap_neighbours[(2,)](x, x)
        swap_neighbours[(2,)](x, torch.zeros(2))
    raced, apart = (launch.overlaps() for launch in trace.launches)
    assert "programs 0 and 1: x[0] is stored by 0, and 1 loads it" in [line.replace("out", "x") for line in raced]
    assert apart == []


def test_overlap_names_the_element():
    @jit
    def all_store_first(out_ptr):
        tl.store(out_ptr, tl.program_id(0))

    with tracing.record() as trace:
        all_store_first[(2,)](torch.zeros(3, 2, dtype=torch.int32))
    assert trace.launches[0].overlaps() == ["programs 0 and 1: out[0, 0] is stored by 0, and 1 stores it"]


def test_atomics_are_recorded_and_are_no_race():
    out = torch.zeros(1)
    with tracing.record() as trace:
        count_all[(3,)](out)
    assert out.item() == 3 and trace.launches[0].overlaps() == []
    assert [a.kind for a in trace.launches[0].accesses] == ["atomic"] * 3


def test_the_interpreter_is_as_before_afterwards():
    from triton.runtime import interpreter

    before = interpreter.GridExecutor.__call__
    with pytest.raises(interpreter.InterpreterError), tracing.record():
        shifted_copy[(1,)](torch.ones(4), None, 4, 0, BLOCK=16)
    assert interpreter.GridExecutor.__call__ is before
    assert "create_masked_load" not in vars(interpreter.interpreter_builder)


def test_steps_and_pictures():
    from matplotlib.figure import Figure

    with tracing.record() as trace:
        ladder.linear_attention(*torch.randn(3, 1, 32, 1, 16).unbind(0), block_v=16)
    (launch,) = trace.launches
    # Two chunks: loads and dots, then a store and the update's dot; at the end the state.
    kinds = [sorted({e.kind for e in step if isinstance(e, tracing.Access)}) for step in tiles.steps(launch)]
    assert kinds == [["load"], ["store"], ["load"], ["store"], ["store"]]
    fig = Figure()
    tiles.draw_step(fig, launch, ["q", "o"], 3)
    assert [ax.get_title() for ax in fig.axes] == ["q", "o (store)"]
    picture = fig.axes[0].images[0].get_array()
    assert picture.shape == (32, 16, 3) and (picture < 1).any(axis=-1).all()  # all of q was loaded
    moving = tiles.animate(launch, ["q", "o"], limit=2)
    assert Image.open(io.BytesIO(moving.data)).is_animated


def test_observe_returns_the_result_too():
    out, trace = tracing.observe(ladder.scaled_add, torch.ones(4), torch.ones(4), 3.0)
    assert out.tolist() == [4.0] * 4 and len(trace.launches) == 1


def test_observing_in_a_child_is_the_same():
    """What happens where kernels are compiled: the call travels to a process with the interpreter."""
    from dn_lib.teaching.judge.child import call_in_child

    x, y = torch.ones(20), torch.arange(20.0)
    out, trace = call_in_child("observe", "dn_lib.kernels.ladder", "scaled_add", (x, y, 2.0), {"block": 16})
    here, expected = tracing.observe(ladder.scaled_add, x, y, 2.0, block=16)
    assert torch.equal(out, here) and trace.bytes() == expected.bytes()
    assert trace.launches[0].shapes == expected.launches[0].shapes
