"""Where submissions run: a process that has imported what answers need, and a copy of it for every answer.

This side knows no exercise, no reference and no verdict.  It defines what it is told to, calls it on the inputs that
it is sent, and sends back what came of it (see `dn_lib.course.wire`).  The judge is in another process, which started
this one (`dn_lib.course.rooms`).
"""

from __future__ import annotations

import ast
import contextlib
import io
import linecache
import os
import signal
import socket
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from dn_lib.course import confine, wire
from dn_lib.teaching.judge import compare, limits, method

SMALL = 4096  # numbers in a tensor on the way that is handed over with its values; of a larger one, its size
MANY = 20_000  # operations that are noted of an answer


# --- The first process --------------------------------------------------------------------------------------------
def serve(descriptor: int) -> None:
    """Make copies of this process until nobody asks any more.

    Requests on the socket `descriptor`: "open" with the socket of the new room, answered by its process id; "close"
    with a process id, answered by the exit code, once nothing of that room runs any more; "import" with statements.
    """
    confine.prctl(confine.SET_PDEATHSIG, signal.SIGKILL)
    confine.prctl(confine.SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the judge ends it
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    method.prepare()
    control = socket.socket(fileno=descriptor)
    ended: dict[int, int] = {}  # exit codes, by process id
    paths = confine.readable() if os.environ.pop("DN_LIB_CONFINED") == "1" else None
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 1)
        if not data:
            break
        request, _, rest = data.decode().partition(" ")
        if request == "import":
            _run_each(rest, {})
            control.sendall(b"1\n")
        elif request == "open":
            pid = os.fork()
            if not pid:
                control.close()
                _live(socket.socket(fileno=descriptors[0]), paths)
            os.close(descriptors[0])
            ended.pop(pid, None)  # of an older process with this number
            control.sendall(f"{pid}\n".encode())
        elif request == "close":
            pid = int(rest)
            if pid not in ended:
                ended[pid] = _close(pid)
            control.sendall(f"{ended[pid]}\n".encode())
    confine.end_all_children()


def _close(pid: int) -> int:
    for end in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            end(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    confine.end_all_children()
    return os.waitstatus_to_exitcode(status)


# --- A copy -------------------------------------------------------------------------------------------------------
def _live(line: socket.socket, paths: list | None) -> None:
    """The life of a room; it never returns."""
    try:
        os.setsid()
        confine.prctl(confine.SET_PDEATHSIG, signal.SIGKILL)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        limits.limit_memory(limits.MEMORY)
        limits.limit_processor_time(limits.SECONDS)
        confine.limit_the_rest()
        if paths is not None:
            confine.confine(paths)
        sys.stdin = io.StringIO()
        sys.stdout = sys.stderr = _Nowhere()
        Room(line).answer_requests()
    finally:
        os._exit(0)


class _Nowhere(io.TextIOBase):
    """Takes all that is printed, and keeps nothing."""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


def _nothing(*_: Any, **__: Any) -> None:
    """`check` and its relatives, as an answer meets them: verdicts are not computed here."""


def _run_each(source: str, names: dict[str, Any], label: str = "<chapter>") -> None:
    """The statements of `source` that work; one that fails concerns only answers that need it."""
    for node in ast.parse(source).body:
        with contextlib.suppress(Exception):
            exec(compile(ast.Module([node], []), label, "exec"), names)


class Room:
    """One submission's answer, and the line to its judge."""

    def __init__(self, line: socket.socket):
        self.line = line
        self.answer: Callable[..., Any] = _nothing
        self.launches: Any = None

    def answer_requests(self) -> None:
        while True:
            kind, facts, values = self._receive()
            try:
                reply = getattr(self, f"do_{kind}")(facts, **values)
            except BaseException as error:
                reply = self._raised(error)
            self.line.sendall(reply)

    def _receive(self) -> tuple[str, Any, dict[str, Any]]:
        size, head = wire.SIZES.unpack(self._read(wire.SIZES.size))
        return wire.unpack(head, self._read(size), take=self._function_outside)

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = self.line.recv(min(size - len(data), 1 << 20))
            if not piece:
                os._exit(0)
            data += piece
        return bytes(data)

    def _raised(self, error: BaseException) -> bytes:
        try:
            said = str(error)[:500]
        except BaseException:
            said = ""
        root = error
        while root.__cause__ is not None:
            root = root.__cause__
        memory = isinstance(root, MemoryError) or "can't allocate memory" in said
        name = "ValueError" if isinstance(error, wire.WireError) else type(error).__name__
        return wire.pack("raised", facts={"name": name, "said": said, "memory": memory})

    def _function_outside(self, number: int) -> Callable[..., Any]:
        """A function of the judge's, which is called there."""

        def implementation(*args: Any, **kwargs: Any) -> Any:
            self.line.sendall(wire.pack("call", facts=[number, list(kwargs)], args=args, named=list(kwargs.values())))
            kind, facts, values = self._receive()
            if kind == "raised":
                raise RuntimeError(f"{facts['name']}: {facts['said']}")
            # Copied here, so that whoever watches sees where it comes from.
            return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, values["answer"])

        return method.handed_over(implementation)

    # --- Requests
    def do_define(self, facts: dict[str, Any]) -> bytes:
        """Run the chapter's definitions and the cells of the submission; the last of them has to define `name`."""
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        names = module.__dict__
        names |= dict.fromkeys(("check", "evaluate", "guarded", "launched"), _nothing)
        _run_each(facts["chapter"], names)
        for label, source in facts["cells"]:
            self._run(label, source, names, last=label == facts["cells"][-1][0])
        if facts["name"] not in names:
            raise NameError(f"{facts['name']} is not defined")
        self.answer = names[facts["name"]]
        if not callable(self.answer):
            raise TypeError(f"{facts['name']} is {type(self.answer).__name__}, asked for is a function")
        if facts["launches"]:
            self._watch_launches()
        return wire.pack("defined")

    def _run(self, label: str, source: str, names: dict[str, Any], *, last: bool) -> None:
        self.line.sendall(wire.pack("running", facts=label))
        file = f"<{label}>"
        linecache.cache[file] = (
            len(source),
            None,
            source.splitlines(keepends=True),
            file,
        )  # for Triton, which reads it
        try:
            exec(compile(source, file, "exec"), names)
        except Exception:
            if last:
                raise

    def do_call(self, facts: Any, args: tuple) -> bytes:
        before = [x.clone() for x in compare.parts(args)]
        found = self.answer(*args)
        after = list(compare.parts(args))
        same = all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(before, after, strict=True))
        report = None
        if self.launches is not None:
            report, self.launches = self._report(), None
        return wire.pack("answer", facts=report, answer=found, after=None if same else after)

    def do_watch(self, facts: Any, args: tuple) -> bytes:
        record = method.watch(self.answer, *args)
        if len(record.operations) > MANY:
            raise RuntimeError(f"more than {MANY:,} operations on small inputs")
        tensors: list[torch.Tensor] = []

        def size(x: torch.Tensor) -> dict[str, Any]:
            keep = x.numel() <= SMALL and x.layout is torch.strided
            tensors.extend([x] * keep)
            return {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch."), "kept": keep}

        operations = [
            {
                "name": op.name,
                "inputs": [size(x) for x in op.inputs],
                "outputs": [size(x) for x in op.outputs],
                "library": op.library,
                "reads": sorted(op.reads),
            }
            for op in record.operations
        ]
        seen = {"calls": record.calls, "outside": record.outside, "gradients": record.gradients}
        return wire.pack("record", facts={"operations": operations, **seen}, tensors=tensors)

    # --- Launches of kernels, for the exercise whose answer launches them
    def _watch_launches(self) -> None:
        from dn_lib.teaching.judge.trace import record

        memory: Any = torch.utils.deterministic
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = True  # with NaN: what no kernel has written shows
        plain = self.answer

        def watched(*args: Any) -> Any:
            with record() as trace:
                found = plain(*args)
            self.launches = trace
            return found

        self.answer = watched

    def _report(self) -> dict[str, Any]:
        launches = self.launches.launches
        return {
            "kernels": [launch.kernel for launch in launches],
            "outside": [str(access) for access in self.launches.outside[:1]],
            "races": [str(race) for launch in launches for race in launch.overlaps()][:1],
        }
