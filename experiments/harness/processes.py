"""Work on all cores: things done side by side in processes of their own, and kernels compiled ahead in them."""

from __future__ import annotations

import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TypeVar

MOST_WORKERS = 16  # each holds a context on the GPU, and throughput.py's a model and the activations of its step


def default_workers() -> int:
    """One process a core, and at most 16."""
    return min(os.cpu_count() or 1, MOST_WORKERS)


Item = TypeVar("Item")
Result = TypeVar("Result")


class Died(Exception):
    """A process ended, or was ended at the deadline, before it had the result."""


def _serve(function: Callable, items: Sequence, connection: Connection) -> None:
    for item in items:
        connection.send(function(item))


def spread(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, deadline: float | None = None
) -> Iterator[tuple[Item, Result | Died]]:
    """(item, function(item)) in the order of `items`, from `workers` processes; with 0 of them from this one.

    Process n does items n, n + workers, ... in order, so which process does what never depends on time.  `function`
    and what it takes and gives must be picklable; the processes are started anew ("spawn"), as CUDA needs it.  One
    that ends early, be it by a signal, costs the rest of its items: their result is a `Died`.  So it is for those of
    a process that is still at work at `deadline` (of `time.monotonic`), when it is killed.
    """
    if workers < 1:
        yield from ((item, function(item)) for item in items)
        return
    context, started = multiprocessing.get_context("spawn"), []
    count = min(workers, len(items))
    try:
        for n in range(count):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_serve, args=(function, items[n::count], sender), daemon=True)
            process.start()
            sender.close()  # so that the end of the process is the end of what can be received
            started.append((process, receiver))
        for n, item in enumerate(items):
            process, receiver = started[n % count]
            yield item, _received(process, receiver, deadline)
    finally:
        for process, _ in started:
            process.kill()
            process.join()


def _received(process: BaseProcess, receiver: Connection, deadline: float | None):
    if not receiver.poll(None if deadline is None else max(0.0, deadline - time.monotonic())):
        process.kill()
        return Died("stopped at the budget")
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return Died(f"its process ended early, with exit code {process.exitcode}")


# --- Compiling ahead ---------------------------------------------------------------------------------------------


def _attempt(function: Callable, job) -> str | None:
    import torch  # not above: a process that needs neither starts in a fraction of the time

    from experiments.harness.results import first_line

    try:
        function(job)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:
        return f"{job}: {first_line(error)}"
    return None


def compile_ahead(function: Callable, jobs: Sequence, workers: int) -> dict:
    """Calls `function` with each of `jobs` on several cores, so that Triton's cache holds the kernels.

    What fails here fails again, and is recorded, where it is measured.  The slowest to compile should come first.
    """
    begun, count = time.monotonic(), min(workers, len(jobs))
    with multiprocessing.get_context("spawn").Pool(count) as pool:
        failed = [f for f in pool.imap_unordered(functools.partial(_attempt, function), jobs, chunksize=1) if f]
    return {"workers": count, "seconds": time.monotonic() - begun, "failed": failed}
