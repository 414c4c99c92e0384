"""The kernels as an eager call runs them: all that is kept for the backward in one block, and launches played back.

`launch.py` runs any call.  Here a call on a GPU that has been made before, by the same plan, is played back
(`dn_lib.kernels.playback`), so that little of its host time is left but checks, allocations and the launches proper.
What is saved does not depend on whether a call is played back: activation checkpointing compares it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from dn_lib.kernels.arguments import readable
from dn_lib.kernels.common import INTERPRETED
from dn_lib.kernels.delta_rule import launch
from dn_lib.kernels.plan import Plan, Saved
from dn_lib.kernels.playback import Block, Recorder, current_stream, is_watched, why_not


class Kept(NamedTuple):
    """What the forward leaves for the backward, besides its inputs.

    memory: bytes that hold the tensors of `Saved`, see `block_of`.
    state_end: that one where it is a tensor of its own, since the caller gets the state too.
    """

    memory: Tensor | None
    state_end: Tensor | None


@functools.lru_cache(maxsize=4096)
def block_of(plan: Plan, final_state: bool) -> Block:
    """How the tensors of `Saved` lie in one block, whether or not the final state is wanted."""
    buffers = plan.layout.buffers if plan.call.training else {}
    return Block([(name, b.shape, b.dtype) for name, b in buffers.items() if not (name == "state_end" and final_state)])


def forward(
    *, plan: Plan, q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, g: Tensor | None = None, scale: float,
    initial_state: Tensor | None, final_state: bool,
) -> tuple[Tensor, Tensor | None, Kept]:  # fmt: skip
    """As `launch.forward`, for sequences of equal lengths.  The inputs are contiguous."""
    block = block_of(plan, final_state)
    memory = block.allocate(q.device) if plan.call.training else None
    inputs = [x for x in (q, k, v, beta, g, initial_state) if x is not None]
    kind = "forward", q.get_device(), _dtype(beta), _dtype(g), _dtype(initial_state), final_state
    recording = plan.recorded.get(kind)
    if recording is not None and (addresses := _addresses(inputs, memory, block)) is not None:
        o, state = torch.empty_like(v), None
        addresses.append(o.data_ptr())
        if "state" in recording.returned:
            state = k.new_empty(launch.per_segment(plan), dtype=torch.float32)
            addresses.append(state.data_ptr())
        recording.play(addresses, (scale,), q.device, current_stream(q.device))
        last = launch.last_of(plan, state) if final_state and state is not None else None
        return o, last, Kept(memory, state if "state_end" in plan.layout.buffers else None)
    views = {} if memory is None else block.views(memory)
    recorder = Recorder(q=q, k=k, v=v, beta=beta, g=g, initial_state=initial_state, **views)
    with recorder:
        o, last, saved = launch.forward(
            plan=plan, q=q, k=k, v=v, beta=beta, g=g, scale=scale, initial_state=initial_state,
            final_state=final_state, kept=views,
        )  # fmt: skip
    if _addresses(inputs, memory, block) is not None:
        plan.recorded[kind] = recorder.recording(("o", "state"), (scale,))
    return o, last, Kept(memory, None if saved is None or "state_end" in views else saved.state_end)


def backward(
    *, plan: Plan, q: Tensor, k: Tensor, v: Tensor | None = None, beta: Tensor | None, kept: Kept, do: Tensor,
    dstate: Tensor | None, scale: float, initial_state: bool, precision: str,
) -> launch.Gradients:  # fmt: skip
    """As `launch.gradients`.  precision: of float32 dots, now."""
    memory = cast(Tensor, kept.memory)
    block = block_of(plan, kept.state_end is not None)
    if do.dtype != k.dtype or not do.is_contiguous():
        do = do.to(k.dtype).contiguous()
    inputs = [x for x in (q, k, v, beta, do, dstate, kept.state_end) if x is not None]
    kind = (
        "backward", q.get_device(), _dtype(beta), dstate is not None, kept.state_end is not None, initial_state,
        precision,
    )  # fmt: skip
    recording = plan.recorded.get(kind)
    if recording is not None and (addresses := _addresses(inputs, memory, block)) is not None:
        written = launch.to_write(plan, q=q, k=k, do=do, beta=beta, initial_state=initial_state)
        addresses += [x.data_ptr() for x in written.values()]
        recording.play(addresses, (scale,), q.device, current_stream(q.device))
        return launch.finished(plan, k.dtype, **written)
    # Hooks of autograd may have kept tensors elsewhere, and in another layout.
    q, k, v, beta, do, dstate, memory = readable(
        q=q, k=k, v=v, beta=beta, do=do, dstate=dstate, memory=memory.to(q.device)
    )
    views = block.views(memory)
    saved = Saved(**{name: cast(Tensor, views.get(name)) for name in Saved._fields})
    if kept.state_end is not None:
        saved = saved._replace(state_end=kept.state_end)
    recorder = Recorder(q=q, k=k, v=v, beta=beta, do=do, dstate=dstate, own_end=kept.state_end, **views)
    with recorder:
        gradients = launch.gradients(
            plan=plan.for_backward(q, k, do, memory, precision=precision), q=q, k=k, v=v, beta=beta, saved=saved, do=do,
            dstate=dstate, scale=scale, initial_state=initial_state,
        )  # fmt: skip
    if _addresses(inputs, memory, block) is not None:
        plan.recorded[kind] = recorder.recording(launch.WRITTEN, (scale,))
    return gradients


def _dtype(x: Tensor | None) -> torch.dtype | None:
    return None if x is None else x.dtype


def _addresses(inputs: Sequence[Tensor], memory: Tensor | None, block: Block) -> list[int] | None:
    """Of the inputs and of what lies in the block; None where the call has to go the ordinary way.

    A recording serves tensors that are contiguous and lie, with their own values, on the current GPU, at multiples of
    16 bytes, for which the kernels were compiled.
    """
    device = inputs[0].get_device()
    if device < 0 or INTERPRETED.value or why_not() or is_watched() or device != torch.cuda.current_device():
        return None
    found, low = [], 0
    for x in inputs if memory is None else (*inputs, memory):
        if x.get_device() != device or not x.is_contiguous() or x.is_neg():
            return None
        found.append(address := x.data_ptr())
        low |= address
    if low % 16:
        return None
    if memory is not None:
        base = found.pop()
        found += [base + offset for offset in block.offsets]
    return found
