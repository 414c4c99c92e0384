"""What a kernel does in the interpreter: every access and every dot, with its program."""

from __future__ import annotations

import contextlib
import inspect
import linecache
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

GAP = 1 << 22  # bytes on each side of a tensor in the arena
BFLOAT16_NAN = 0x7FC0


@dataclass(frozen=True)
class Access:
    """One load, store or atomic of one program: the flat indices of the elements it touched."""

    program: int
    kind: str
    tensor: str
    elements: np.ndarray
    itemsize: int


@dataclass(frozen=True)
class Dot:
    """One `tl.dot`: `[m, k] @ [k, n]`, the types of its operands, and the input precision asked for."""

    program: int
    m: int
    k: int
    n: int
    batch: int
    types: tuple[str, str]
    precision: str

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.n * self.k


@dataclass(frozen=True)
class Outside:
    """An access that fell outside of every argument: its nearest tensor, and where it would have been."""

    program: tuple[int, int, int]
    kind: str
    tensor: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    count: int
    line: str

    def __str__(self) -> str:
        where = "[" + ", ".join(map(str, self.index)) + "]"
        return (
            f"program {self.program} would {self.kind} {self.tensor}{where}, but {self.tensor} is "
            f"{list(self.shape)} ({self.count} such elements), in `{self.line}`"
        )


@dataclass
class Launch:
    """One launch of a kernel: its grid, its tensors by name, and what its programs did, in their order.

    constants: its other arguments, by name.  undefined: lines that load under a mask without an `other`, where some
    elements were masked: these were NaN in this run.
    """

    kernel: str
    grid: tuple[int, int, int]
    shapes: dict[str, tuple[int, ...]]
    events: list[Access | Dot] = field(default_factory=list)
    outside: list[Outside] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)
    undefined: list[str] = field(default_factory=list)

    @property
    def programs(self) -> int:
        return int(np.prod(self.grid))

    @property
    def accesses(self) -> list[Access]:
        return [e for e in self.events if isinstance(e, Access)]

    @property
    def dots(self) -> list[Dot]:
        return [e for e in self.events if isinstance(e, Dot)]

    def bytes(self, kind: str | None = None, tensor: str | None = None) -> int:
        """Bytes that the programs asked for, of one kind ("load", "store") and tensor if given."""
        chosen = (a for a in self.accesses if kind in (None, a.kind) and tensor in (None, a.tensor))
        return sum(a.elements.size * a.itemsize for a in chosen)

    def overlaps(self) -> list[str]:
        """Elements that two programs race for: both store, or one stores what the other loads.

        The interpreter runs programs one after the other and shows nothing of it; a GPU runs them at once.
        """
        found = []
        for name, shape in self.shapes.items():
            size = int(np.prod(shape)) if shape else 1
            writer = np.full(size, -1)
            clashes: dict[tuple[int, int, str], int] = {}
            for kind in ("store", "load"):
                for a in self.accesses:
                    if a.tensor != name or a.kind != kind:
                        continue
                    owners = writer[a.elements]
                    other = (owners >= 0) & (owners != a.program)
                    for owner in np.unique(owners[other]):
                        first = int(a.elements[other & (owners == owner)].min())
                        clashes.setdefault((int(owner), a.program, kind), first)
                    if kind == "store":
                        writer[a.elements] = a.program
            for (one, two, kind), first in clashes.items():
                index = [int(i) for i in np.unravel_index(first, shape)] if shape else []
                found.append(f"programs {one} and {two}: {name}{index} is stored by {one}, and {two} {kind}s it")
        return found


@dataclass
class Trace:
    """All launches seen by one `record()`."""

    launches: list[Launch] = field(default_factory=list)

    def bytes(self, kind: str | None = None, tensor: str | None = None) -> int:
        return sum(launch.bytes(kind, tensor) for launch in self.launches)

    @property
    def flops(self) -> int:
        return sum(dot.flops for launch in self.launches for dot in launch.dots)

    @property
    def outside(self) -> list[Outside]:
        return [o for launch in self.launches for o in launch.outside]


class _Arena:
    """Copies of what tensors occupy, far apart in one stretch of memory.

    Tensors whose memory overlaps (one tensor under two names, slices of a packed one) stay together.
    """

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors
        self.spans = {name: self._span(t) for name, t in tensors.items()}
        self.groups: list[list[str]] = []
        end = 0
        for name in sorted(tensors, key=lambda n: tensors[n].data_ptr()):
            start = tensors[name].data_ptr()
            if not self.groups or start >= end:
                self.groups.append([])
                end = start
            self.groups[-1].append(name)
            end = max(end, start + self._bytes(name))
        # In the order of the arguments, so that what a far access is nearest to does not hang on the allocator.
        order = list(tensors)
        self.groups.sort(key=lambda names: min(order.index(name) for name in names))
        begins = [tensors[names[0]].data_ptr() for names in self.groups]
        self.sizes = [
            max(tensors[n].data_ptr() + self._bytes(n) for n in names) - begin
            for names, begin in zip(self.groups, begins, strict=True)
        ]
        self.slot = 2 * GAP + -(-max([16, *self.sizes]) // 64) * 64
        # Fresh pages of a large allocation cost nothing until they are touched, and the gaps never are.
        self.memory = np.empty(self.slot * max(len(self.groups), 1) + 64, np.uint8)
        self.base = -(-self.memory.ctypes.data // 64) * 64
        self.copies: dict[str, Tensor] = {}
        self.addresses: dict[str, int] = {}
        for slot, (names, begin) in enumerate(zip(self.groups, begins, strict=True)):
            self._slot_bytes(slot).copy_(self._original_bytes(slot))
            for name in names:
                t = tensors[name]
                self.addresses[name] = self.base + slot * self.slot + GAP + t.data_ptr() - begin
                first = self.addresses[name] - self.memory.ctypes.data
                flat = torch.from_numpy(self.memory[first : first + self._bytes(name)]).view(t.dtype)
                self.copies[name] = flat.as_strided(t.shape, t.stride())

    @staticmethod
    def _span(t: Tensor) -> int:
        """Elements from the first to the last of `t`, those between its rows included."""
        if t.numel() == 0:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))

    def _bytes(self, name: str) -> int:
        return self.spans[name] * self.tensors[name].element_size()

    def _slot_bytes(self, slot: int) -> Tensor:
        start = self.base - self.memory.ctypes.data + slot * self.slot + GAP
        return torch.from_numpy(self.memory[start : start + self.sizes[slot]])

    def _original_bytes(self, slot: int) -> Tensor:
        t = self.tensors[self.groups[slot][0]]
        storage = t.untyped_storage()
        view = torch.empty(0, dtype=torch.uint8)
        return view.set_(storage, t.data_ptr() - storage.data_ptr(), (self.sizes[slot],), (1,))

    def copy_back(self) -> None:
        for slot in range(len(self.groups)):
            self._original_bytes(slot).copy_(self._slot_bytes(slot))

    def locate(self, addresses: np.ndarray) -> tuple[str, np.ndarray, np.ndarray]:
        """The tensor that most addresses are nearest to, their element offsets in it, which are inside."""
        addresses = addresses.astype(np.int64)
        slots = np.clip((addresses - self.base) // self.slot, 0, len(self.groups) - 1)
        names = self.groups[int(np.bincount(slots.ravel()).argmax())]
        best: tuple[str, np.ndarray, np.ndarray] | None = None
        for name in names:
            offsets = (addresses - self.addresses[name]) // self.tensors[name].element_size()
            inside = (offsets >= 0) & (offsets < self.spans[name])
            if best is None or inside.sum() > best[2].sum():
                best = name, offsets, inside
        assert best is not None  # a slot has at least one tensor
        return best

    def index(self, name: str, offset: int) -> tuple[int, ...]:
        """The index that `offset` stands for; the leading one may lie outside of the shape."""
        strides = self.tensors[name].stride()
        index = []
        for stride in strides[:-1]:
            step, offset = (offset // stride, offset % stride) if stride else (0, offset)
            index.append(int(step))
        return (*index, int(offset // max(strides[-1], 1))) if strides else (int(offset),)


class _Watcher:
    """Stands between the interpreter's builder and memory during one launch."""

    def __init__(self, builder: Any, arena: _Arena, launch: Launch):
        self.builder, self.arena, self.launch = builder, arena, launch

    def program(self) -> int:
        x, y, z = self.builder.grid_idx
        _, ny, nz = self.launch.grid
        return (x * ny + y) * nz + z

    def _kernel_line(self) -> str:
        """The source line of the kernel that is being executed: the nearest frame outside of Triton."""
        frame = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            if "/triton/" not in name and name != __file__:
                return linecache.getline(name, frame.f_lineno).strip()
            frame = frame.f_back
        return ""

    def admit(self, kind: str, pointers: Any, mask: np.ndarray) -> np.ndarray:
        """Note the access; return the mask without the elements that lie outside of every tensor."""
        mask = np.broadcast_to(mask, pointers.data.shape).astype(bool)
        active = pointers.data[mask]
        if active.size == 0:
            return mask
        name, offsets, inside = self.arena.locate(active)
        itemsize = self.arena.tensors[name].element_size()
        self.launch.events.append(Access(self.program(), kind, name, offsets[inside], itemsize))
        if inside.all():
            return mask
        index = self.arena.index(name, int(offsets[~inside][0]))
        shape = self.launch.shapes[name]
        count = int((~inside).sum())
        self.launch.outside.append(
            Outside(tuple(self.builder.grid_idx), kind, name, index, shape, count, self._kernel_line())
        )
        allowed = mask.copy()
        allowed[mask] = inside
        return allowed

    def poison(self, loaded: Any, masked: np.ndarray) -> None:
        """Put NaN where nothing was loaded and no `other` was given: on a GPU these elements may hold anything."""
        if loaded.data.dtype.kind == "f":
            loaded.data[masked] = np.nan
        elif str(loaded.dtype.scalar) == "bf16":  # which the interpreter holds as bit patterns
            loaded.data[masked] = BFLOAT16_NAN
        else:
            return
        line = self._kernel_line()
        if line not in self.launch.undefined:
            self.launch.undefined.append(line)

    def patches(self) -> dict[str, Any]:
        from triton.runtime.interpreter import TensorHandle

        builder = type(self.builder)

        def load(pointers, mask, other, *rest):
            allowed = TensorHandle(self.admit("load", pointers, mask.data), mask.dtype)
            loaded = builder.create_masked_load(self.builder, pointers, allowed, other, *rest)
            if other is None and not mask.data.all():
                self.poison(loaded, ~np.broadcast_to(mask.data.astype(bool), loaded.data.shape))
            return loaded

        def store(pointers, value, mask, *rest):
            allowed = TensorHandle(self.admit("store", pointers, mask.data), mask.dtype)
            return builder.create_masked_store(self.builder, pointers, value, allowed, *rest)

        def atomic(operation, pointers, value, mask, *rest):
            allowed = TensorHandle(self.admit("atomic", pointers, mask.data), mask.dtype)
            return builder.create_atomic_rmw(self.builder, operation, pointers, value, allowed, *rest)

        def dot(a, b, total, precision, *rest):
            batch = int(np.prod(a.data.shape[:-2]))
            (m, k), n = a.data.shape[-2:], b.data.shape[-1]
            types = (str(a.dtype.scalar), str(b.dtype.scalar))
            asked = str(precision).rpartition(".")[2].lower()
            self.launch.events.append(Dot(self.program(), m, k, n, batch, types, asked))
            return builder.create_dot(self.builder, a, b, total, precision, *rest)

        return {
            "create_masked_load": load,
            "create_masked_store": store,
            "create_atomic_rmw": atomic,
            "create_dot": dot,
        }


@contextlib.contextmanager
def record() -> Iterator[Trace]:
    """Record every kernel launched inside the block; see the module's first lines.

    Needs the interpreter: raises RuntimeError where kernels are compiled (there, use `observe`).
    """
    from triton.runtime import interpreter

    from dn_lib.kernels.ladder import interpreted

    if not interpreted():
        raise RuntimeError("record() needs Triton's interpreter; where kernels are compiled use observe()")
    trace, original = Trace(), interpreter.GridExecutor.__call__
    builder = interpreter.interpreter_builder

    def launch_and_watch(self: Any, *args, **kwargs):
        names = inspect.getfullargspec(self.fn).args
        bound = inspect.getcallargs(self.fn, *args, **{k: v for k, v in kwargs.items() if k in names})
        tensors = {n.removesuffix("_ptr"): x for n, x in bound.items() if isinstance(x, Tensor)}
        arena = _Arena(tensors)
        copies = {n: arena.copies[n.removesuffix("_ptr")] for n, x in bound.items() if isinstance(x, Tensor)}
        grid: Any = self.grid(bound) if callable(self.grid) else self.grid
        x, y, z = (*grid, 1, 1)[:3]
        shapes = {n: tuple(t.shape) for n, t in tensors.items()}
        constants = {n: value for n, value in bound.items() if not isinstance(value, Tensor)}
        launch = Launch(self.fn.__name__, (x, y, z), shapes, constants=constants)
        trace.launches.append(launch)
        patches = _Watcher(builder, arena, launch).patches()
        vars(builder).update(patches)
        # The executor would copy whole storages, the arena's gaps included, onto themselves.
        restore, self._restore_args_dev = self._restore_args_dev, lambda *_: None
        try:
            original(self, **{**bound, **copies})
        finally:
            self._restore_args_dev = restore
            for name in patches:
                vars(builder).pop(name, None)
        arena.copy_back()

    interpreter.GridExecutor.__call__ = launch_and_watch
    try:
        yield trace
    finally:
        interpreter.GridExecutor.__call__ = original


def observe(function: Any, *args: Any, **kwargs: Any) -> tuple[Any, Trace]:
    """Call `function`, which launches kernels, under `record()`: its result and the trace.

    Where kernels are compiled the call runs in a child process with the interpreter, on copies on the CPU;
    `function` must then belong to a module that the child can import.
    """
    from dn_lib.kernels.ladder import interpreted

    if interpreted():
        with record() as trace:
            return function(*args, **kwargs), trace
    from dn_lib.teaching.judge.child import call_in_child

    return call_in_child("observe", function.__module__, function.__qualname__, args, kwargs)
