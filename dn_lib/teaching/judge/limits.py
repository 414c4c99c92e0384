"""Learner's code under limits of time and memory, in a copy of this process.

The copy is a fork: it has everything that the notebook has defined, takes milliseconds to make, and whatever happens
in it (a loop that never ends, `os._exit`, a tensor larger than the machine) ends the copy and not the notebook.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import faulthandler
import io
import os
import pickle
import select
import signal
import struct
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SECONDS = 10.0  # of work or of sleep that an answer may take; what a busy machine makes it wait is not counted
MEMORY = 2 << 30  # bytes that an answer may take on top of what the notebook holds
PATIENCE = 60  # times as long as `SECONDS` on the clock, at the most
POLL = 0.05  # seconds between two looks at a process that gives no sign
PRINTED = 2000  # characters of what an answer prints that are passed on
FORKS = sys.platform.startswith("linux")  # macOS has `fork`, but not its linear algebra in a forked process


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    value: what it returned, None if it was ended.  ended: how it was ended, "" if it was not; a whole sentence
    without its subject, such as "did not finish within 10 seconds".  printed: what it wrote to the console.
    steps: how often it reported progress.
    """

    value: Any
    ended: str
    printed: str
    steps: int


Task = Callable[[Callable[[], None]], Any]


def run(task: Task, *, seconds: float = SECONDS, memory: int = MEMORY, fork: bool = FORKS) -> Outcome:
    """Run `task(report)` under limits; it may call `report()` after each step, and returns what can be pickled.

    fork: in a copy of this process.  Where that is not possible (Windows, macOS), in this process, with a limit on
    the time of Python's own loops alone.
    """
    return _in_a_copy(task, seconds, memory) if fork else _in_place(task, seconds)


# --- In a copy of this process --------------------------------------------------------------------------------
def _in_a_copy(task: Task, seconds: float, memory: int) -> Outcome:
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns where there are threads; none of a notebook's holds a lock that the copy needs.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        _serve(task, writing, seconds, memory)
    os.close(writing)
    ended, frames = "", _Frames(reading)
    try:
        ended = frames.collect(pid, seconds)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # what it may have started as well
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        os.close(reading)
    if not ended and not frames.done:
        ended = how_it_ended(os.waitstatus_to_exitcode(status), seconds)
    return Outcome(frames.value, ended, frames.printed, frames.steps)


def _serve(task: Task, writing: int, seconds: float, memory: int) -> None:
    """The life of the copy; it never returns."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        faulthandler.disable()  # which would write into the console of the notebook
        quiet = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(quiet, descriptor)

        def send(kind: str, value: Any = None) -> None:
            data = pickle.dumps((kind, value))
            with open(writing, "wb", closefd=False) as stream:
                stream.write(struct.pack("<Q", len(data)) + data)

        sys.stdout = sys.stderr = _Console(send)
        builtins.input = sys.breakpointhook = _nobody_answers
        torch.set_num_threads(1)  # threads of the parent's pools are not in the copy
        limit_memory(memory)
        limit_processor_time(seconds)
        try:
            value = task(lambda: send("step"))
        except MemoryError:
            send("ended", out_of_memory(memory))
        except Exception:  # of the judge: what an answer raises, the judge takes
            send("broken", traceback.format_exc())
        else:
            send("value", value)
        code = 0
    finally:
        os._exit(code)


class _Console(io.TextIOBase):
    """Sends what is printed at once, up to a length: an endless loop may print."""

    def __init__(self, send: Callable[[str, str], None]):
        self.send, self.left = send, PRINTED

    def write(self, text: str, /) -> int:
        if self.left > 0:
            self.send("printed", text[: self.left])
            self.left -= len(text)
        return len(text)


def _nobody_answers(*_: Any, **__: Any) -> Any:
    raise RuntimeError("inside `check` nobody can answer: call your function yourself to debug it")


class _Frames:
    """Reads what the copy sends."""

    def __init__(self, descriptor: int):
        self.descriptor, self.buffer = descriptor, b""
        self.value, self.printed, self.steps, self.done = None, "", 0, False

    def collect(self, pid: int, seconds: float) -> str:
        """Read until the copy is done or has to be ended; in the latter case, how."""
        clock = Stopwatch(pid, seconds)
        while True:
            ready, _, _ = select.select([self.descriptor], [], [], POLL)
            if ready:
                piece = os.read(self.descriptor, 1 << 16)
                if not piece:
                    return ""
                self.buffer += piece
                ended = self._parse()
                if ended or self.done:
                    return ended
            elif clock.is_late():
                return too_late(seconds)

    def _parse(self) -> str:
        while len(self.buffer) >= 8:
            (size,) = struct.unpack("<Q", self.buffer[:8])
            if len(self.buffer) < 8 + size:
                break
            kind, value = pickle.loads(self.buffer[8 : 8 + size])
            self.buffer = self.buffer[8 + size :]
            if kind == "ended":
                return value
            if kind == "broken":
                raise RuntimeError(f"the judge itself failed:\n{value}")
            if kind == "step":
                self.steps += 1
            elif kind == "printed":
                self.printed += value
            elif kind == "value":
                self.value, self.done = value, True
        return ""


# --- Limits, which the processes of kernels share -----------------------------------------------------------------
class Stopwatch:
    """How long another process has worked or slept; the time in which it waits for a processor is not counted."""

    def __init__(self, pid: int, seconds: float):
        self.stat, self.seconds = Path(f"/proc/{pid}/stat"), seconds
        self.begun = self.seen = time.monotonic()
        self.worked = self._state()[1]
        self.slept = 0.0

    def _state(self) -> tuple[str, float]:
        """Its state as a letter and its processor time; a sleeper with none if that cannot be seen."""
        try:
            fields = self.stat.read_text().rpartition(")")[2].split()
        except OSError:
            return "S", 0.0
        return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def is_late(self) -> bool:
        now = time.monotonic()
        state, worked = self._state()
        if state == "S":
            self.slept += now - self.seen
        self.seen = now
        spent = worked - self.worked + self.slept
        return spent > self.seconds + 1 or now - self.begun > PATIENCE * self.seconds


def too_late(seconds: float) -> str:
    return f"did not finish within {seconds:.0f} seconds"


def out_of_memory(memory: int) -> str:
    return f"took more than {memory / 2**30:.3g} GiB of memory"


def how_it_ended(code: int, seconds: float) -> str:
    """Of a process that ended without an answer, by its exit code."""
    if code == -signal.SIGXCPU:
        return too_late(seconds)
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"ended the process that ran it ({how})"


def limit_processor_time(seconds: float) -> None:
    """End this process, by SIGXCPU, when it has used `seconds` more of processor time (in whole seconds)."""
    import resource  # which Windows does not have, where this module can be imported all the same

    used = resource.getrusage(resource.RUSAGE_SELF)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    limit = int(-(-(used.ru_utime + used.ru_stime + seconds) // 1))
    if most != resource.RLIM_INFINITY:
        limit = min(limit, most)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def limit_memory(more: int) -> None:
    """Let this process take `more` bytes than it has now, where that is known."""
    import resource

    try:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = now + more if most == resource.RLIM_INFINITY else min(now + more, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` comes from an allocation that failed, as Python, NumPy or PyTorch say it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


# --- In this process ------------------------------------------------------------------------------------------
class _Late(BaseException):
    """Raised in the thread that runs an answer; no `except Exception` of an answer holds it up."""


@contextlib.contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    thread = ctypes.c_ulong(threading.get_ident())
    raise_there = ctypes.pythonapi.PyThreadState_SetAsyncExc
    timer = threading.Timer(seconds, lambda: raise_there(thread, ctypes.py_object(_Late)))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _in_place(task: Task, seconds: float) -> Outcome:
    steps: list[None] = []
    try:
        with _interrupted_after(seconds):
            value = task(lambda: steps.append(None))
    except _Late:
        return Outcome(None, too_late(seconds), "", len(steps))
    except MemoryError:
        return Outcome(None, "took more memory than there is", "", len(steps))
    return Outcome(value, "", "", len(steps))
