"""Launches played back: what is recorded, what is refused, and the interface of Triton that it needs."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import dn_lib
from dn_lib.kernels.delta_rule import eager
from dn_lib.kernels.plan import Target, plan_call, using
from dn_lib.kernels.playback import Block, Launched, Recorder, made, recorder, why_not
from dn_lib.testing import delta_rule_inputs

triton = pytest.importorskip("triton")


def kernel(started: list[tuple]) -> SimpleNamespace:
    return SimpleNamespace(
        run=lambda *arguments: started.append(arguments), function="function", packed_metadata="meta"
    )


def test_the_interface_of_triton_is_the_one_that_was_read():
    """Releases 3.6 to 3.9 have it; where a later one differs, calls go the ordinary way, and this says so."""
    assert why_not() is None


def test_why_not_names_what_differs(monkeypatch):
    from triton.backends.nvidia import driver

    class Other:
        def __call__(self, grid, stream, function, *args): ...

    monkeypatch.setattr(driver, "CudaLauncher", Other)
    assert why_not.__wrapped__() == "Triton's launcher takes grid, stream, function, args first"


def test_a_recording_fills_in_addresses_and_numbers_and_keeps_the_rest():
    started: list[tuple] = []
    q, k = torch.ones(2, 64), torch.ones(2, 64)
    with Recorder(q=q, k=k, state=None) as noted:
        o, scratch = made("o", torch.empty(2, 64)), made("scratch", torch.empty(3, dtype=torch.float64))
        noted.launched.append(Launched(kernel(started), (4, 1, 1), (q, o, None, 0.5, 64), (1e-6, True)))
        noted.launched.append(Launched(kernel(started), (2, 1, 1), (scratch, k, 0.5), (0.5,)))
    assert recorder() is None
    recording = noted.recording(("o", "state"), numbers=(0.5,))
    assert recording is not None and recording.returned == ("o",) and recording.scratch.size == 256
    recording.play([16, 32, 48], (0.25,), torch.device("cpu"), 7)
    head = (7, "function", "meta", None, None, None)
    assert started[0] == (4, 1, 1, *head, 16, 48, None, 0.25, 64, 1e-6, True)
    x, y, z, *rest = started[1]
    address = rest.pop(6)  # of the block that is allocated for the time of the call
    assert (x, y, z) == (2, 1, 1) and tuple(rest) == (*head, 32, 0.25, 0.5) and address > 0


def test_a_descriptor_gets_the_new_address_and_keeps_its_shape():
    @dataclasses.dataclass
    class Descriptor:
        base: torch.Tensor
        shape: list[int]

        def __post_init__(self):
            assert isinstance(self.base, torch.Tensor)

    started: list[tuple] = []
    q = torch.ones(2, 64)
    with Recorder(q=q) as noted:
        noted.launched.append(Launched(kernel(started), (1, 1, 1), (Descriptor(q, [2, 64]),), ()))
    recording = noted.recording(())
    assert recording is not None
    recording.play([4096], (), torch.device("cpu"), 0)
    found = started[0][-1]
    assert isinstance(found, Descriptor) and found.base.data_ptr() == 4096 and found.shape == [2, 64]


def test_tensors_that_addresses_do_not_tell_apart_are_not_recorded():
    q = torch.ones(2, 64)
    with Recorder(q=q, k=q) as noted:
        pass
    assert noted.recording(()) is None  # one tensor twice
    with Recorder(q=q, k=torch.ones(0)) as noted:
        pass
    assert noted.recording(()) is None  # an empty one
    with Recorder(q=q) as noted:
        noted.launched.append(Launched(kernel([]), (1, 1, 1), (torch.ones(3),), ()))
    assert noted.recording(()) is None  # one that nobody named


def test_a_failed_call_leaves_nothing_recording():
    with pytest.raises(RuntimeError, match="no"), Recorder(q=torch.ones(1)):
        raise RuntimeError("no")
    assert recorder() is None


def test_a_block_holds_its_tensors_apart():
    block = Block([("a", (3, 5), torch.bfloat16), ("b", (2,), torch.float64), ("c", (0, 4), torch.float32)])
    assert block.offsets == [0, 256, 512] and block.size == 512
    memory = block.allocate(torch.device("cpu"))
    views = block.views(memory)
    for name, shape, dtype in block.tensors:
        assert views[name].shape == shape and views[name].dtype == dtype and views[name].is_contiguous()
    views["a"].fill_(1.5)
    views["b"].fill_(-2.0)
    assert (views["a"] == 1.5).all() and (views["b"] == -2.0).all()


@pytest.mark.parametrize("final_state", [False, True])
@pytest.mark.parametrize("d", [64, 128])
def test_what_is_kept_lies_in_one_block(d, final_state):
    """But for the state where segments end, if the caller gets it too: outputs share no memory with what is saved."""
    x = torch.empty(2, 1024, 4, d, dtype=torch.bfloat16, device="meta")
    with using(target=Target(arch=90, sms=132)):
        plan = plan_call(x, x, x, training=True, norm=True, chunk=64)
    names = {name for name, *_ in eager.block_of(plan, final_state).tensors}
    assert set(plan.layout.buffers) - names == ({"state_end"} if final_state and d == 64 else set())


def test_what_is_saved_is_the_same_in_every_call():
    """Activation checkpointing compares it between the first call and the second."""
    q, k, v, beta, _ = delta_rule_inputs(1, 40, 2, 16, 16, dtype=torch.float32)
    k.requires_grad_()
    saved: list[list[tuple]] = []
    for _ in range(2):
        saved.append([])

        def keep(x):
            saved[-1].append((tuple(x.shape), x.dtype))
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            o, _ = dn_lib.delta_rule(q, k, v, beta, backend="triton")
        o.sum().backward()
    assert saved[0] == saved[1] and len(saved[0]) == 4  # q, k, beta and the block
