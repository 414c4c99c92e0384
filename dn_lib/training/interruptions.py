"""What may happen around a run and must not end it: signals, a reader that went away, a disk that is full."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
INSISTING = 1.0  # seconds; a terminal and torchrun both pass a Ctrl-C on, so that one arrives twice at once


@contextlib.contextmanager
def stop_signals(wanted: bool, insisting: float = INSISTING) -> Iterator[list[int]]:
    """Signals that end a process append their numbers to the list instead, so that the loop can end it in order.

    SIGINT, SIGTERM and SIGHUP (a terminal that was closed).  One that is ignored, as `nohup` ignores SIGHUP, stays
    ignored.  A second SIGINT, `insisting` seconds or more after the first, ends the process at once.
    """
    caught: list[int] = []
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield caught
        return
    first = 0.0

    def handle(number, frame):
        nonlocal first
        if not caught:
            first = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - first >= insisting:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        caught.append(number)

    before = {number: signal.getsignal(number) for number in STOPPING}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handle)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def warn(message: str) -> None:
    """A warning that cannot end the run, not even where the user turns warnings into errors."""
    with contextlib.suppress(Warning):
        warnings.warn(message, RuntimeWarning, stacklevel=3)


class Report:
    """Calls the user's function with each record.  An exception in it is told once, as a warning."""

    def __init__(self, function: Callable[[dict[str, float]], None] | None):
        self.function, self.told = function, False

    def __call__(self, record: dict[str, float]) -> None:
        if self.function is None:
            return
        try:
            self.function(record)
        except Exception as error:
            if not self.told:
                warn(f"report raised {type(error).__name__}: {error}; training goes on, and this is told once")
            self.told = True


class Screen:
    """stderr for a progress bar: what cannot be written (a closed pipe or terminal) is dropped."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


class Log:
    """`log.jsonl`: one line for each record.

    A disk that refuses does not end the run: the records wait in memory and are tried again with the next one.
    `waiting` goes into checkpoints, so that no record is lost.
    """

    def __init__(self, path: Path | None):
        self.path, self.told = path, False
        self.waiting: list[dict[str, Any]] = []

    def add(self, *records: dict[str, Any]) -> None:
        if self.path is None:
            return
        self.waiting += records
        if not self.waiting:
            return
        try:
            append_whole(self.path, lines(self.waiting))
        except OSError as error:
            if not self.told:
                reason = error.strerror or error
                warn(f"could not write {self.path}: {reason}; training goes on, and its records wait in memory")
            self.told = True
        else:
            self.waiting = []


def lines(records: list[dict[str, Any]]) -> bytes:
    """Records as the lines of a log."""
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def append_whole(path: Path, content: bytes) -> None:
    """Append `content`, or nothing of it.  Raises OSError."""
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, before)
            raise


def read_log(path: Path, step: int) -> tuple[list[dict[str, Any]], list[int]]:
    """The records up to `step`, and the numbers of the lines that hold none (a last one that broke off left out)."""
    records, damaged = [], []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else [], 1):
        try:
            record = json.loads(line)
            if record.get("evaluation", record)["step"] <= step:
                records.append(record)
        except (ValueError, KeyError, TypeError, AttributeError):
            if line.endswith(b"\n"):
                damaged.append(number)
    return records, damaged
