"""The processes in which a learner's kernel runs and is compiled."""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import select
import struct
import subprocess
import sys
from functools import cache
from typing import Any

from dn_lib.teaching.judge.limits import POLL, Stopwatch, how_it_ended, too_late

SECONDS = 12.0  # of work or sleep for one answer; what a busy machine makes it wait is not counted
COMPILING = 60.0  # for what is slow and ends by itself, such as the compiler


class KernelError(Exception):
    """What is wrong with a kernel, in one line."""


class Child:
    """A Python process that answers one request at a time, and is started anew after it died."""

    def __init__(self, *, interpret: bool):
        self.environment = {"TRITON_INTERPRET": "1" if interpret else "0", "CUDA_VISIBLE_DEVICES": ""}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        if self.process is not None and self.process.poll() is None:
            return self.process
        self.stop()
        # Answers have a pipe of their own: start-up files of the user's may print before `serve` begins.
        self.answers, writing = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from dn_lib.teaching.judge.served import serve; serve({writing})"],
            env={**os.environ, **self.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(writing,),
        )
        os.close(writing)
        return self.process

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            if self.process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):  # of a request that was never read
                    self.process.stdin.close()
            os.close(self.answers)
            self.process = None

    def ask(self, *request: Any, seconds: float = SECONDS) -> Any:
        """The child's answer.

        Raises KernelError if it raised, died, or worked or slept for more than `seconds`.
        """
        process = self.start()
        try:
            send(process.stdin, (seconds, *request))
            self._read(1, None)  # it has started and begins with the request
            clock = Stopwatch(process.pid, seconds)
            size = struct.unpack("<Q", self._read(8, clock))[0]
            kind, value = pickle.loads(self._read(size, clock))
        except TimeoutError:
            self.stop()
            raise KernelError(f"it {too_late(seconds)}") from None
        except (EOFError, BrokenPipeError):
            code = process.wait()
            self.stop()
            raise KernelError(f"it {how_it_ended(code, seconds)}") from None
        if kind == "error":
            raise KernelError(value)
        return value

    def _read(self, size: int, clock: Stopwatch | None) -> bytes:
        data = b""
        while len(data) < size:
            ready, _, _ = select.select([self.answers], [], [], POLL)
            if not ready:
                if clock is not None and clock.is_late():
                    raise TimeoutError
                continue
            piece = os.read(self.answers, size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data


@cache
def child(interpret: bool) -> Child:
    """This process's interpreter (`interpret=True`) or compiler child."""
    made = Child(interpret=interpret)
    atexit.register(made.stop)
    return made


def call_in_child(*request: Any) -> Any:
    return child(True).ask(*request, seconds=COMPILING)  # the book's own kernels, which end


def send(stream: Any, value: Any) -> None:
    data = pickle.dumps(value)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()
