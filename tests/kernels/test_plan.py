"""The plan of a call: its rules, its overrides, and that what runs is what it says."""

from __future__ import annotations

import importlib.util
import itertools
import threading

import pytest
import torch

import dn_lib
from dn_lib import ops
from dn_lib.kernels import rules
from dn_lib.kernels.plan import Saved, plan_call, using
from dn_lib.kernels.rules import Overrides, Target, Tiles, choose_tiles
from dn_lib.ops import backend
from dn_lib.teaching.judge.trace import record
from dn_lib.testing import delta_rule_inputs, forward_and_gradients, leaves

needs_triton = pytest.mark.skipif(
    ops.triton_problem(torch.device("cpu")) is not None, reason="needs Triton's interpreter"
)
H100, A100 = Target(90, 132), Target(80, 108)
BF16, F32 = torch.bfloat16, torch.float32


def planned(B, L, H, d, *, dtype=BF16, target=H100, training=True, norm=False, d_v=None, call=None, **overrides):
    q, v = (torch.empty(B, L, H, width, dtype=dtype, device="meta") for width in (d, d_v or d))
    with using(target=target, **overrides):
        return plan_call(q, q, v, norm=norm, training=training, chunk=rules.default_chunk(dtype), **(call or {}))


# --- The rules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, segments",
    [((1, 8192, 2, 128), 8), ((8, 2048, 16, 128), 1), ((1, 32768, 16, 128), 8), ((1, 512, 1, 64), 1)],
)
def test_few_heads_and_long_sequences_are_split(shape, segments):
    assert planned(*shape).layout.segments == segments


@pytest.mark.parametrize("target, dtype, values", [(H100, BF16, 64), (H100, F32, 32), (A100, BF16, 32)])
def test_the_split_counts_the_programs_that_run(target, dtype, values):
    """The tiles of float32 and of chips before Hopper are half as wide, so as many heads make twice the programs."""
    plan = planned(1, 8192, 8, 128, dtype=dtype, target=target, segments=1)
    assert plan.launches["chunk_scan_fwd"].programs == 8 * 128 // values
    wide, narrow = (planned(1, 8192, H, 128, dtype=F32).layout.segments for H in (2, 32))
    assert wide > narrow == 1


def test_without_erasure_a_map_is_a_number_and_has_no_programs():
    delta, linear = (planned(1, 8192, 2, 64, segments=4, call={"erase": erase}) for erase in (True, False))
    assert delta.layout.buffers["transition"].shape == (4, 2, 64, 64)
    assert linear.layout.buffers["transition"].shape == (4, 2)
    # Of three segments and two heads: 64 values, and with erasure the 64 columns of M.
    assert [p.launches["segment_maps_fwd"].programs for p in (delta, linear)] == [3 * 2 * 2, 3 * 2]


@pytest.mark.parametrize("arch", [None, 80, 90])
@pytest.mark.parametrize("d_k, d_v", [(64, 64), (16, 64), (40, 24), (64, 33)])
def test_one_program_of_the_fused_backward_holds_all_values(arch, d_k, d_v):
    """Two would write the same dq and dk.  Before Hopper tiles are narrower, and no backward is fused."""
    plan = planned(2, 256, 2, d_k, d_v=d_v, target=Target(arch, 100))
    assert plan.layout.fused == (arch != 80)
    assert not plan.layout.fused or plan.launches["chunk_scan_bwd"].blocks == 1
    assert ("chunk_bwd_dqk" in plan.launches) == (not plan.layout.fused)


def test_one_wave_fetches_further_ahead():
    few, many = (planned(B, 2048, 4, 128).launches["chunk_scan_fwd"] for B in (1, 64))
    assert (few.tiles.stages, many.tiles.stages) == (3, 2)
    assert choose_tiles("inverse_norms", 128, 128, BF16, arch=90).rows == 32


@pytest.mark.parametrize(
    "change", [{"L": 8200}, {"L": 512}, {"d": 100}, {"dtype": F32}, {"target": A100}, {"tma": False}, {"B": 1}], ids=str
)
def test_tma_needs_whole_chunks_whole_heads_a_new_chip_and_work(change):
    call = {"B": 8, "L": 8192, "H": 16, "d": 128}
    assert planned(**call).launches["chunk_scan_fwd"].tma
    assert not planned(**call | change).launches["chunk_scan_fwd"].tma
    if change == {"B": 1}:
        assert planned(**call | change, tma=True).launches["chunk_scan_fwd"].tma


def test_unaligned_tensors_are_read_by_pointers():
    x = torch.zeros(1 + 2 * 1024 * 64, dtype=BF16)
    aligned, shifted = (x[n : n + 2 * 1024 * 64].view(1, 1024, 2, 64) for n in (0, 1))
    with using(target=H100, tma=True):
        plans = [plan_call(y, y, y, training=True, chunk=64) for y in (aligned, shifted)]
    assert [plan.launches["chunk_scan_fwd"].tma for plan in plans] == [True, False]
    assert plans[0].for_backward(aligned, None, precision="ieee") is plans[0]
    assert not plans[0].for_backward(shifted, precision="ieee").launches["chunk_scan_bwd"].tma


def test_a_plan_is_made_once():
    assert planned(3, 640, 5, 64) is planned(3, 640, 5, 64)
    assert planned(3, 640, 5, 64) is not planned(3, 640, 5, 64, segments=2)


# --- Overrides ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"segments": 0}, ValueError, "segments must be an integer of at least 1, got 0"),
        ({"segments": True}, ValueError, "segments must be an integer"),
        ({"fused": 1}, TypeError, "fused must be True or False, got 1"),
        ({"tma": "no"}, TypeError, "tma must be True or False, got 'no'"),
        (
            {"tiles": {"walk": Tiles(64, 64, 4, 1)}},
            ValueError,
            "tiles must be for one of .*chunk_scan_fwd.*, got 'walk'",
        ),
        ({"tiles": {"recurrent": (64, 64, 4, 1)}}, TypeError, "tiles of recurrent must be Tiles"),
        ({"tiles": {"recurrent": Tiles(48, 64, 4, 1)}}, ValueError, "a power of two for BK, got 48"),
        ({"target": "h100"}, TypeError, r"target must be a Target\(arch, sms\), got 'h100'"),
    ],
)
def test_bad_overrides_are_named(options, error, message):
    with pytest.raises(error, match=message), using(**options):
        pass


def test_overrides_nest_and_end():
    def current():
        return plan_call(*(torch.empty(1, 64, 1, 16, device="meta"),) * 3, chunk=32).call.overrides

    inner = Tiles(16, 16, 4, 1)
    with using(segments=2, tiles={"chunk_inverse": inner}):
        with using(tma=False, tiles={"chunk_scan_fwd": inner}):
            both = current()
            assert (both.segments, both.tma) == (2, False) and dict(both.tiles).keys() == {
                "chunk_inverse", "chunk_scan_fwd",
            }  # fmt: skip
            seen = []
            thread = threading.Thread(target=lambda: seen.append(current()))
            thread.start()
            thread.join()
            assert seen == [Overrides()]
        assert current().tma is None
    assert current() == Overrides()


def test_tiles_of_a_launch_come_before_those_of_its_kernel():
    one, other = Tiles(64, 32, 4, 1), Tiles(64, 16, 4, 1)
    tiles = {"chunk_scan_fwd": one, "segment_maps_fwd": other}
    plan = planned(1, 8192, 1, 64, segments=4, tiles=tiles)
    assert plan.launches["chunk_scan_fwd"].tiles == one and plan.launches["segment_maps_fwd"].tiles == other
    plan = planned(1, 8192, 1, 64, segments=4, tiles={"chunk_scan_fwd": one})
    assert plan.launches["segment_maps_fwd"].tiles == one


def test_wide_heads_cannot_be_fused():
    with pytest.raises(ValueError, match=r"^fused must be False"):
        planned(1, 64, 1, 128, fused=True)


# --- What runs is what the plan says --------------------------------------------------------------------------------

CASES = {
    "fused": {},
    "wide": {"d_k": 80},
    "float32": {"dtype": F32},
    "normalised": {"norm": True},
    "split": {"segments": 2},
    "split, wide": {"segments": 2, "d_k": 80, "norm": True},
    "packed": {"packed": True},
    "not fused": {"fused": False},
}


@needs_triton
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_launched_and_saved_is_what_the_plan_says(case):
    from dn_lib.kernels.delta_rule import launch

    case = {"d_k": 16, "dtype": torch.float16, "norm": False, "packed": False, "segments": None, "fused": None} | case
    cu = torch.tensor([0, 0, 17, 40], dtype=torch.int32) if case["packed"] else None
    sequences = 1 if cu is None else 3
    *x, S = delta_rule_inputs(1, 40, 2, case["d_k"], 16, dtype=case["dtype"], state=sequences)
    with using(segments=case["segments"], fused=case["fused"]):
        plan = plan_call(*x[:3], cu_seqlens=cu, norm=case["norm"], training=True, chunk=16)
        shown = ops.plan(*x, cu_seqlens=cu, qk_l2norm=case["norm"], chunk_size=16, training=True, backend="triton")
    assert shown.kernels is plan
    shared = {"plan": plan, "q": x[0], "k": x[1], "beta": x[3], "scale": 0.5}
    with record() as trace:
        _, state, saved = launch.forward(**shared, v=x[2], initial_state=S, cu_seqlens=cu, final_state=True)
        launch.backward(**shared, saved=saved, do=x[2], dstate=state, initial_state=True)
    expected = [(step.kernel, step.programs) for step in plan.launches.values()]
    assert [(done.kernel, done.programs) for done in trace.launches] == expected
    kept = {name: (tuple(y.shape), y.dtype) for name, y in saved._asdict().items() if y is not None}
    assert kept == {name: tuple(buffer) for name, buffer in plan.layout.buffers.items()}
    assert kept.keys() <= set(Saved._fields)


@needs_triton
def test_a_backward_follows_the_plan_of_its_forward():
    """Outside of the overrides' block, as in autograd's own thread on a GPU; as an operator too."""
    *x, S = delta_rule_inputs(1, 48, 1, 16, 16, state=1)
    do, dS = torch.ones_like(x[2]), torch.ones_like(S)
    rule = lambda *y, **o: dn_lib.delta_rule(*y, backend="triton", chunk_size=16, output_final_state=True, **o)  # noqa: E731
    expected = forward_and_gradients(rule, leaves(*x, S), do, dS)

    def operator(*y, initial_state):
        return torch.ops.dn_lib.delta_rule(*y, None, initial_state, None, 0.25, False, 16, True)[:2]

    for function, fused in itertools.product((rule, operator), (None, True)):
        y = leaves(*x, S)
        with using(segments=3, fused=fused):
            o, state = function(*y[:4], initial_state=y[4])
        with record() as trace:
            found = [o, state, *torch.autograd.grad((o, state), y, (do, dS))]
        launched = [done.kernel for done in trace.launches]
        last = [] if fused else ["chunk_bwd_dqk"]
        assert launched == ["chunk_scan_bwd", "merge_segments", "chunk_scan_bwd", *last]
        for a, b in zip(found, expected, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()  # float32: 84 eps


# --- ops.plan -----------------------------------------------------------------------------------------------------


def test_a_plan_is_printed_in_words():
    text = str(planned(1, 8192, 2, 128, norm=True))
    for words in (
        "1 x 8,192 tokens",
        "8 segments of 1,024 tokens per sequence, since unsplit only 4 programs would run on 132 SMs",
        "one wave",
        "1/|q| and 1/|k|",
        "saved for the backward, ",
        "transition [8, 2, 128, 128] float32",
    ):
        assert words in text, text
    assert "fill 132 SMs" in str(planned(8, 2048, 16, 128))


@pytest.mark.parametrize("d, dtype, why", [(300, BF16, "300 is above 256"), (64, torch.float64, "not float64")])
def test_why_auto_leaves_the_kernels(d, dtype, why):
    x = torch.empty(1, 64, 1, d, dtype=dtype, device="meta")
    with using(target=H100):
        shown = ops.plan(x, x, x)
    assert shown.backend == "chunkwise" and why in shown.why and shown.kernels is None


def test_the_backend_of_a_plan_is_that_of_the_call():
    x = delta_rule_inputs(1, 20, 1, 16, 16)[:4]
    assert "not on a GPU" in str(ops.plan(*x))
    for name in ("recurrent", "parallel", "chunkwise"):
        assert ops.plan(*x, backend=name).backend == name
        with backend.using(auto=name):
            assert ops.plan(*x).backend == name
    with pytest.raises(ValueError, match=r"^k must be \[B, L, H, d_k\]"):
        ops.plan(x[0], x[1][:, :5], x[2])


@needs_triton
@pytest.mark.parametrize(
    "L, training, kernel", [(16, False, "recurrent"), (16, True, "chunk_inverse"), (17, False, "chunk_inverse")]
)
def test_short_sequences_without_a_gradient_run_the_recurrence(L, training, kernel):
    x = delta_rule_inputs(1, L, 1, 16, 16)[:4]
    shown = ops.plan(*x, training=training, backend="triton")
    assert next(iter(shown.kernels.launches)) == kernel
    assert ops.plan(*leaves(*x), backend="triton").kernels.call.training


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_every_launch_has_a_name_and_every_name_a_kernel():
    from dn_lib.kernels.delta_rule import backward, forward, gates, recurrent

    for name in rules.KERNELS.values():
        assert any(hasattr(module, name) for module in (forward, gates, backward, recurrent)), name
    gated = {"gate": True}
    names = {*planned(1, 8192, 2, 128, norm=True).launches, *planned(1, 8192, 2, 128, call=gated).launches, "recurrent"}
    assert names == {*rules.KERNELS}
