"""Runs the kernels of an earlier call again, on other tensors of the same sizes.

Triton's own launch finds out what to run each time it is called: it binds the arguments by name, and makes a key of
their types and alignments.  The delta rule's four kernels then cost more host time than one sequence of a thousand
tokens costs the GPU.  But a plan fixes all of it except addresses.  So the first call goes the ordinary way, while a
`Recorder` notes each launch, and what its tensors are called.  From then on a `Recording` fills in the addresses and
starts the compiled kernels.

    with Recorder(q=q, k=k) as recorder:       # what the caller gives
        o = made("o", torch.empty_like(q))     # what is allocated on the way
        launch_kernel(...)
    recording = recorder.recording(returned=("o",))
    recording.play([q.data_ptr(), k.data_ptr(), o.data_ptr()], numbers, q.device, current_stream(q.device))

Starting a compiled kernel is not a public interface of Triton.  `why_not` looks whether it is as it was in the releases
that were read, 3.6 to 3.9, and a test pins it; where it is not, every call goes the ordinary way.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dn_lib.kernels.common import INTERPRETED

_active = threading.local()
ALIGNMENT = 256  # of each tensor in a block, in bytes: as PyTorch's allocator aligns them on a GPU


def recorder() -> Recorder | None:
    """The one of this thread, if a call is being recorded."""
    return getattr(_active, "recorder", None)


def made(name: str, x: Tensor) -> Tensor:
    """x itself; if a call is being recorded, a tensor that it allocates, by this name."""
    if (active := recorder()) is not None:
        active.tensors[name] = x
    return x


class Launched(NamedTuple):
    """A kernel that was launched: compiled, with its grid, its arguments in order, and the constants behind them."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    constants: tuple[Any, ...]


class Recorder:
    """Notes the launches of this thread.  tensors: what the call was given, by name; None is left out."""

    def __init__(self, **tensors: Tensor | None) -> None:
        self.given = tuple(name for name, x in tensors.items() if x is not None)
        self.tensors = {name: x for name, x in tensors.items() if x is not None}
        self.launched: list[Launched] = []

    def __enter__(self) -> Recorder:
        _active.recorder = self
        return self

    def __exit__(self, *_: object) -> None:
        _active.recorder = None

    def recording(self, returned: Sequence[str], numbers: Sequence[float] = ()) -> Recording | None:
        """How to do it again, or None where tensors can't be told apart by their addresses.

        returned: names of tensors that were made and that the caller allocates in a later call too; those that were not
        made are left out.  All other tensors that were made share one block, which lives as long as the kernels run.
        numbers: arguments of type float, which a later call may change.
        """
        returned = [name for name in returned if name in self.tensors]
        scratch = [name for name in self.tensors if name not in (*self.given, *returned)]
        slots = [*self.given, *returned, *scratch]
        at = {self.tensors[name].data_ptr(): slot for slot, name in enumerate(slots)}
        if len(at) < len(slots) or 0 in at:  # one tensor given twice, or an empty one
            return None
        steps = []
        for kernel, grid, arguments, constants in self.launched:
            addresses, descriptors, scalars = [], [], []
            for position, x in enumerate(arguments):
                base = getattr(x, "base", None)  # of a TMA descriptor
                if isinstance(x, Tensor) or base is not None:
                    slot = at.get((x if base is None else base).data_ptr())
                    if slot is None:
                        return None
                    if base is None:
                        addresses.append((position, slot))
                    else:
                        descriptors.append((position, slot, type(x), {**vars(x), "base": None}))
                elif isinstance(x, float):
                    scalars.append((position, tuple(numbers).index(x)))
            template = [None if isinstance(x, Tensor) or hasattr(x, "base") else x for x in arguments] + list(constants)
            steps.append(
                _Step(kernel.run, grid, kernel.function, kernel.packed_metadata, template, tuple(addresses),
                      tuple(descriptors), tuple(scalars), kernel)
            )  # fmt: skip
        block = Block([(name, tuple(self.tensors[name].shape), self.tensors[name].dtype) for name in scratch])
        return Recording(tuple(steps), tuple(returned), block, any(step.descriptors for step in steps))


class Block:
    """Several tensors in one allocation: `offsets` in bytes, in the order given, and `size`."""

    def __init__(self, tensors: Sequence[tuple[str, tuple[int, ...], torch.dtype]]) -> None:
        self.tensors, self.offsets, self.size = tuple(tensors), [], 0
        for _, shape, dtype in tensors:
            self.offsets.append(self.size)
            length = functools.reduce(lambda a, b: a * b, shape, 1) * dtype.itemsize
            self.size += -(-length // ALIGNMENT) * ALIGNMENT

    def allocate(self, device: torch.device) -> Tensor:
        return torch.empty(self.size, dtype=torch.uint8, device=device)

    def views(self, block: Tensor) -> dict[str, Tensor]:
        """The tensors in a block, by name."""
        found = {}
        for (name, shape, dtype), offset in zip(self.tensors, self.offsets, strict=True):
            length = functools.reduce(lambda a, b: a * b, shape, 1) * dtype.itemsize
            found[name] = block[offset : offset + length].view(dtype).view(shape)
        return found


class _Step(NamedTuple):
    """One launch: what to call, and which arguments change, as (position, slot).  kernel: kept alive."""

    run: Any
    grid: tuple[int, int, int]
    function: Any
    metadata: Any
    arguments: list[Any]
    addresses: tuple[tuple[int, int], ...]
    descriptors: tuple[tuple[int, int, type, dict[str, Any]], ...]
    scalars: tuple[tuple[int, int], ...]
    kernel: Any


class _Address(int):
    """What Triton asks the base of a TMA descriptor for."""

    def data_ptr(self) -> int:
        return int(self)


class Recording(NamedTuple):
    """Launches of a call.  returned: names of the tensors that the caller allocates.  scratch: the others."""

    steps: tuple[_Step, ...]
    returned: tuple[str, ...]
    scratch: Block
    has_descriptors: bool

    def play(self, addresses: list[int], numbers: Sequence[float], device: torch.device, stream: int) -> None:
        """Start the kernels on a stream of `device`, which must be the current device.

        addresses: of the tensors given, then of those returned, in the order of the recording.
        """
        if self.scratch.size:
            scratch = self.scratch.allocate(device)
            base = scratch.data_ptr()
            addresses = [*addresses, *(base + offset for offset in self.scratch.offsets)]
        if self.has_descriptors:
            bind_context(device)
        for run, (x, y, z), function, metadata, template, tensors, descriptors, scalars, _ in self.steps:
            arguments = template.copy()
            for position, slot in tensors:
                arguments[position] = addresses[slot]
            for position, slot, kind, fields in descriptors:
                arguments[position] = descriptor = object.__new__(kind)
                descriptor.__dict__.update(fields)
                descriptor.base = _Address(addresses[slot])
            for position, number in scalars:
                arguments[position] = numbers[number]
            run(x, y, z, stream, function, metadata, None, None, None, *arguments)


def bind_context(device: torch.device) -> None:
    """Once for each thread: the driver encodes TMA descriptors only in a thread that has a CUDA context.

    A launch makes one, but autograd's own thread may come here before it has launched anything.  Asking for free
    memory binds the context, and can be done while a CUDA graph is captured.
    """
    if device.type == "cuda" and not INTERPRETED.value and not getattr(_active, "bound", False):
        torch.cuda.mem_get_info(device)
        _active.bound = True


@functools.cache
def _driver() -> Any:
    from triton.runtime import driver

    return driver.active


def current_stream(device: torch.device) -> int:
    """The handle of PyTorch's current stream on a GPU."""
    return _driver().get_current_stream(device.index)


@functools.cache
def why_not() -> str | None:
    """Why compiled kernels cannot be started directly, in words; None if they can."""
    try:
        from triton.backends.nvidia.driver import CudaLauncher
        from triton.compiler import CompiledKernel
    except ImportError as error:
        return f"Triton has no CUDA driver: {error}"
    first = list(inspect.signature(CudaLauncher.__call__).parameters)[1:6]
    if first != ["gridX", "gridY", "gridZ", "stream", "function"]:
        return f"Triton's launcher takes {', '.join(first)} first"
    rest = list(inspect.signature(CudaLauncher.__call__).parameters)[6:]
    hooks = ["kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook"]
    if rest not in (["args"], [*hooks, "args"]):
        return f"Triton's launcher takes {', '.join(rest)} after the function"
    if not isinstance(inspect.getattr_static(CompiledKernel, "run", None), property):
        return "a compiled kernel of Triton has no property `run`"
    source = inspect.getsource(CompiledKernel.__init__)
    if not all(f"self.{name} = " in source for name in ("packed_metadata", "function")):
        return "a compiled kernel of Triton has no packed_metadata or function"
    return None


def is_watched() -> bool:
    """Whether somebody, such as a profiler, wants to know of each launch: then it goes the ordinary way."""
    hook = _knobs().runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))


@functools.cache
def _knobs() -> Any:
    from triton import knobs

    return knobs
