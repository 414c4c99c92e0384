"""The processes in which a learner's kernel runs and is compiled."""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import time
from functools import cache
from typing import Any

SECONDS = 60.0  # of processor time for one answer, which a busy machine does not use up
WAIT = 15  # times as long an answer may be waited for, since a kernel may also sleep


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

    def ask(self, *request: Any, seconds: float = SECONDS, wait: float = WAIT) -> Any:
        """The child's answer.

        Raises KernelError if it raised, died, or took more than `seconds` of processor time, or `wait` times as long.
        """
        process = self.start()
        deadline = time.monotonic() + wait * seconds
        late = f"it did not finish in {seconds:.0f} seconds"
        try:
            send(process.stdin, (seconds, *request))
            size = struct.unpack("<Q", self._read(8, deadline))[0]
            kind, value = pickle.loads(self._read(size, deadline))
        except TimeoutError:
            self.stop()
            raise KernelError(late) from None
        except (EOFError, BrokenPipeError):
            code = process.wait()
            self.stop()
            if code == -signal.SIGXCPU:
                raise KernelError(late) from None
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise KernelError(f"it ended the process that ran it ({how})") from None
        if kind == "error":
            raise KernelError(value)
        return value

    def _read(self, size: int, deadline: float) -> bytes:
        data = b""
        while len(data) < size:
            ready, _, _ = select.select([self.answers], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
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
    return child(True).ask(*request)


def send(stream: Any, value: Any) -> None:
    data = pickle.dumps(value)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()
