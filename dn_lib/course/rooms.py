"""The judge's side of a room: it starts one, asks it under limits, and ends it (see `dn_lib.course.room`)."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from dn_lib.course import confine, wire
from dn_lib.teaching.judge import limits

WALL = 12  # times as long as an answer's seconds on the clock, however busy the machine is
STARTING = 120.0  # seconds until the first process has imported what it needs, on a machine that is busy


class Stopped(Exception):
    """A room that gave no answer; the message has no subject, such as "did not finish within 10 seconds"."""


class Clock(limits.Stopwatch):
    """How long a room has kept its judge waiting: work, and every state but the wait for a processor.

    A process that stops itself, or waits for a disk, is not working and not asleep either.
    """

    def is_late(self) -> bool:
        self.spend()
        return self.slept + self._state()[1] - self.worked > self.seconds + 1

    def spend(self) -> None:
        now = time.monotonic()
        if self._state()[0] != "R":
            self.slept += now - self.seen
        self.seen = now


class Room:
    """A process that runs one answer.  `functions` may be called from there, by their number."""

    def __init__(self, line: socket.socket, pid: int, close: Callable[[int], int]):
        self.line, self.pid, self.close = line, pid, close
        self.functions: list[Callable[..., Any]] = []
        self.spent = 0.0  # of the seconds that it has
        self.begun = time.monotonic()
        self.running = ""  # the cell that is being executed

    def _give(self, function: Callable[..., Any]) -> int:
        self.functions.append(function)
        return len(self.functions) - 1

    def ask(self, kind: str, *, facts: Any = None, **values: Any) -> tuple[str, Any, dict[str, Any]]:
        """What the room sends back: kind, facts, values.  Raises Stopped if it does not, or not in time."""
        self._send(wire.pack(kind, give=self._give, facts=facts, **values))
        while True:
            kind, facts, values = self._receive()
            if kind == "running":
                self.running = str(facts)[:80]
            elif kind == "call":
                self._send(self._called(facts, values))
            else:
                return kind, facts, values

    def _called(self, facts: Any, values: dict[str, Any]) -> bytes:
        try:
            number, names = facts
            named = dict(zip(map(str, names), values["named"], strict=True))
            return wire.pack("called", answer=self.functions[int(number)](*values["args"], **named))
        except Exception as error:
            return wire.pack("raised", facts={"name": type(error).__name__, "said": str(error)[:500]})

    def _send(self, data: bytes) -> None:
        with self._waiting() as ready:
            view = memoryview(data)
            while view:
                ready(write=True)
                with contextlib.suppress(BlockingIOError):
                    view = view[self.line.send(view) :]

    def _receive(self) -> tuple[str, Any, dict[str, Any]]:
        with self._waiting() as ready:
            size, head = wire.SIZES.unpack(self._read(wire.SIZES.size, ready))
            if max(size, head) > wire.LARGEST:
                raise Stopped(f"handed over more than {wire.LARGEST >> 20} MiB")
            body = self._read(size, ready)
        try:
            return wire.unpack(head, body)
        except wire.WireError:
            raise Stopped("wrote into the judge's line, which no answer needs") from None

    def _read(self, size: int, ready: Callable[..., None]) -> bytes:
        data = bytearray()
        while len(data) < size:
            ready()
            try:
                piece = self.line.recv(min(size - len(data), 1 << 20))
            except BlockingIOError:
                continue
            if not piece:
                raise ConnectionError
            data += piece
        return bytes(data)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[Callable[..., None]]:
        """Gives a function that waits until the line is ready.  The time counts; raises Stopped when it is over."""
        clock = Clock(self.pid, limits.SECONDS - self.spent)
        late = limits.too_late(limits.SECONDS)
        if self.spent > limits.SECONDS + 1:
            raise Stopped(late)

        def ready(*, write: bool = False) -> None:
            while True:
                if time.monotonic() - self.begun > WALL * limits.SECONDS:
                    raise Stopped(late)
                lists = ([], [self.line], []) if write else ([self.line], [], [])
                if any(select.select(*lists, limits.POLL)):
                    return
                if clock.is_late():
                    raise Stopped(late)

        try:
            yield ready
        except (ConnectionError, BrokenPipeError):
            code = self.close(self.pid)
            raise Stopped(limits.how_it_ended(code, limits.SECONDS)) from None
        finally:
            clock.spend()
            self.spent += max(clock.slept + clock._state()[1] - clock.worked, 0.0)


class Rooms:
    """Makes rooms, from one process that has imported PyTorch and the library.

    confined: whether a room is kept from files and the network.  imports: statements that all chapters begin with.
    """

    def __init__(self, *, confined: bool = True, imports: str = ""):
        self.confined, self.imports = confined, imports
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Rooms:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        if self.process is not None and self.process.poll() is None:
            return
        self.stop()
        self.control, other = socket.socketpair()
        self.control.settimeout(STARTING)
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from dn_lib.course.room import serve; serve({other.fileno()})"],
            # Answers run on the CPU, kernels in the interpreter, and one thread is one processor.
            env=os.environ
            | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            | {"DN_LIB_CONFINED": str(int(self.confined)), "MPLBACKEND": "agg"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(other.fileno(),),
            start_new_session=True,
        )
        other.close()
        self._request(f"import {self.imports}")

    def stop(self) -> None:
        """End all that was started here.  (It ends its own rooms when the line is closed.)"""
        if self.process is not None:
            self.control.close()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    def _request(self, text: str, descriptors: tuple[int, ...] = ()) -> int:
        socket.send_fds(self.control, [text.encode()], list(descriptors))
        answer = b""
        while not answer.endswith(b"\n"):
            piece = self.control.recv(64)
            if not piece:
                raise OSError("the process that makes rooms has ended")
            answer += piece
        return int(answer)

    @contextlib.contextmanager
    def open(self) -> Iterator[Room]:
        """A new room, which is ended with the block, and whatever it has started with it."""
        closed: dict[int, int] = {}

        def close(pid: int) -> int:
            if pid not in closed:
                closed[pid] = self._request(f"close {pid}")
            return closed[pid]

        self.start()
        line, other = socket.socketpair()
        with line, other:
            pid = self._request("open", (other.fileno(),))
            other.close()
            line.setblocking(False)
            try:
                yield Room(line, pid, close)
            finally:
                with contextlib.suppress(OSError):  # it was ended itself; the next room starts it anew
                    close(pid)


def can_confine() -> bool:
    """Whether rooms can be kept from files and the network on this machine: a copy of this process tries it."""
    if not limits.FORKS:
        return False

    def attempt(report: Callable[[], None]) -> bool:
        confine.confine([])
        return True

    try:
        return limits.run(attempt).value is True
    except RuntimeError:
        return False
