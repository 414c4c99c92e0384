"""Predicted times of the ladder: what is wrong, or was not counted, gets none."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from dn_lib import cost
from dn_lib.testing import poisoned
from experiments.harness.clock import Clock
from experiments.harness.errors import verdict

ladder = pytest.importorskip("experiments.operators.ladder")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels on the CPU, in the interpreter")


def test_a_stage_that_is_wrong_or_launches_what_was_not_counted_gets_no_time():
    size = ladder.Size(2, 32, 1, 16, "cpu", chunk=16, decoded=2)
    rates = {"copy_bytes_per_s": 1.0, "matmul_flops_per_s": 1.0, "float32_flops_per_s": 1.0}
    clock, stage = Clock(smoke=True), size.inverse("merging")
    right = ladder.measure(stage, clock, rates)
    assert right["float32_ms"] == pytest.approx(1e3 * 4 * 2 * 4 * 2 * 16**3)  # 4 chunks, 4 levels of 2 dots
    stage.limit = right["errors"]["T"] / 2
    row = ladder.measure(stage, clock, rates)
    assert row["status"] == "refused" and "ms" not in row
    stage.limit, stage.model = 1.0, lambda seen: ()
    with pytest.raises(ValueError, match=r"counts 0 kernels, launched were \['ut_kernel'\]"):
        ladder.measure(stage, clock, rates)
    with pytest.raises(ValueError, match="no model for the launches"):
        size.operator_model([])


def test_rungs_have_one_inverse_and_softmax_is_named_after_its_kernel():
    size = ladder.Size(2, 32, 1, 16, "cpu", chunk=16, decoded=2)
    stages = {stage.name: stage for stage in size.stages()}
    climb = ("four kernels", "three kernels", "two kernels, plain", "one kernel")
    assert {stages[name].inverse for name in climb} == {"blocks"} and all(not stages[n].float32_flops for n in climb)
    assert stages["T by merging"].float32_flops and stages["T by blocks"].float32_flops == 0
    assert {name for name in stages if name.startswith("softmax")} == {
        "softmax attention, FlashAttention", "softmax attention, cuDNN"
    }  # fmt: skip
    softmax = stages["softmax attention, cuDNN"]
    right = softmax.run()
    assert softmax.errors(right)["o"] < 0.01 and softmax.errors(right.flip(1))["o"] > 0.5


def test_nothing_that_was_not_written_passes_for_a_result():
    size = ladder.Size(2, 32, 1, 16, "cpu", chunk=16, decoded=2)
    with poisoned():
        fresh = torch.empty_like(size.inputs[0])
    assert fresh.isnan().all() and not torch.are_deterministic_algorithms_enabled()
    assert verdict(size.compare(("o", fresh, size.exact["o"])), None, 1.0)


def test_what_is_off_by_more_than_forty_percent():
    rows = [{"key": str(r), "status": "ok", "ratio": r} for r in (0.5, 0.7, 1.39, 1.41, 9.0)]
    found = ladder.summary([*rows, {"key": "no", "status": "failed", "failure": "x"}])
    assert found["off"] == ["0.5", "1.41", "9.0"] and found["within"] == ["0.7", "1.39"]
    assert found["refused_or_failed"] == ["no"] and found["stages"] == 6


@pytest.mark.parametrize("values", [64, 128])
def test_the_gluon_kernels_blocks_are_read_off_their_launches(values):
    """Their chunks have 64 tokens, and a block of values is called VALUES, or is the head."""
    size = ladder.Size(2, 128, 1, 128, "cpu", chunk=64, decoded=2)

    def launch(name, **options):
        kernel = SimpleNamespace(fn=SimpleNamespace(__name__=name))
        return ladder.Launch(kernel, (), options, None)

    inverse, scan = launch("chunk_inverse", C=64), launch("chunk_scan_fwd", VALUES=values, SAVE=False)
    expected = cost.two_kernels(dataclasses.replace(size.shape, block_v=values))
    assert size.operator_model([inverse, scan]) == expected and expected[1].steps == 2
    assert size.operator_model([launch("chunk_scan_bwd")]) == cost.fused_backward(
        dataclasses.replace(size.shape, block_v=128)
    )
