"""When a plan takes the kernels for Hopper, and how it cuts sequences for them."""

from __future__ import annotations

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

from dn_lib.kernels import plan, rules

H100 = rules.Target(arch=90, sms=132)


def hopper_plan(B=16, L=2048, H=16, d=128, dtype=torch.bfloat16, training=True, **asked):
    x = torch.empty(B, L, H, d, dtype=dtype, device="meta")
    with plan.using(target=H100, **asked):
        return plan.plan_call(x, x, x, training=training, chunk=64)


def is_gluon(made) -> bool:
    """Both scans or neither."""
    (answer,) = {launch.gluon for name, launch in made.launches.items() if name in ("chunk_scan_fwd", "chunk_scan_bwd")}
    return answer


def test_which_calls_the_kernels_for_hopper_take():
    taken = rules.triton_version().startswith("3.6")  # the release with which they were checked on a GPU
    assert is_gluon(hopper_plan()) is taken
    for other in ({"d": 64}, {"dtype": torch.float16}, {"L": 2000}, {"gluon": False}, {"tma": False}, {"B": 1}):
        assert not is_gluon(hopper_plan(**other)), other
    assert is_gluon(hopper_plan(B=1, gluon=True)) is taken
    with plan.using(target=rules.Target(arch=100, sms=148)):
        x = torch.empty(16, 2048, 16, 128, dtype=torch.bfloat16, device="meta")
        assert not is_gluon(plan.plan_call(x, x, x, training=True, chunk=64))


@pytest.mark.skipif(not rules.triton_version().startswith("3.6"), reason="they were checked with Triton 3.6 alone")
def test_their_backward_is_one_kernel():
    assert "chunk_bwd_dqk" not in hopper_plan().launches


# Training, forward alone: from times of these shapes with 1 to 16 segments on an H100.
SEGMENTS = {
    (16, 2048, 16): (1, 1), (4, 8192, 16): (1, 1), (2, 16384, 16): (4, 1), (1, 32768, 16): (8, 4),
    (1, 8192, 16): (8, 4), (1, 16384, 8): (8, 8), (1, 2048, 32): (2, 1), (2, 4096, 8): (4, 4), (1, 32768, 2): (16, 16),
}  # fmt: skip


@pytest.mark.parametrize("shape", SEGMENTS)
def test_segments_for_the_kernels_for_hopper(shape):
    """By the rule itself, which asks no Triton for its release."""
    x = torch.empty(*shape, 128, dtype=torch.bfloat16, device="meta")
    with plan.using(target=H100):
        calls = [plan.call_of(x, x, training=training, chunk=64) for training in (True, False)]
    assert tuple(rules.gluon_segments(call) for call in calls) == SEGMENTS[shape]
