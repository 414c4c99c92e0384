"""Compiling fla's kernels with all cores: a Triton autotuner compiles its configurations one after another.

`spread` has several processes do a list of things, and hands the results back in the list's order.  In each of
them `compile_only` turns every autotuner from one that times all of its configurations into one that compiles a part
of them.  The compiled kernels stay in Triton's cache (TRITON_CACHE_DIR), where a process that times finds them.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

MOST_WORKERS = 16  # each holds a context on the GPU, and throughput.py's a model and the activations of its step


def default_workers() -> int:
    """One process a core, and at most 16."""
    return min(os.cpu_count() or 1, MOST_WORKERS)


# --- Processes ---------------------------------------------------------------------------------------------------


class Died(Exception):
    """A process ended, or was ended at the deadline, before it had the result."""


def _serve(function: Callable, items: Sequence, connection) -> None:
    for item in items:
        connection.send(function(item))


def spread(
    function: Callable, items: Sequence, workers: int, deadline: float | None = None
) -> Iterator[tuple[object, object]]:
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
            yield item, _received(*started[n % count], deadline)
    finally:
        for process, _ in started:
            process.kill()
            process.join()


def _received(process, receiver, deadline: float | None) -> object:
    if not receiver.poll(None if deadline is None else max(0.0, deadline - time.monotonic())):
        process.kill()
        return Died("stopped at the budget")
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return Died(f"its process ended early, with exit code {process.exitcode}")


# --- Autotuners --------------------------------------------------------------------------------------------------


def part(kernel: str, configurations: int, worker: int, workers: int) -> range:
    """Which of a kernel's configurations this worker compiles: every one of them is exactly one worker's.

    Kernels begin at different workers (by their names), or those that have few configurations would all be the
    first workers'.
    """
    return range((worker - zlib.crc32(kernel.encode())) % workers, configurations, workers)


@dataclass
class Tally:
    """What a worker has compiled: different kernels by their hashes, and why which configurations failed."""

    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        said = f"{len(self.done)} configurations compiled"
        if self.failed:
            name, why = next(iter(self.failed.items()))
            said += f", {len(self.failed)} cannot be used (such as {name}: {why})"
        return said


def compile_only(worker: int, workers: int) -> Tally:
    """From now on this process's Triton autotuners compile their `part`, and launch nothing at all.

    What a kernel would have written stays as it was allotted: the numbers of a step are worthless, its shapes,
    alignments and dtypes, for which kernels are compiled, are those of any step.  Nothing is timed, and so no choice
    can get into the cache.  A configuration that cannot be compiled or loaded (too much shared memory) is passed over.
    """
    from triton.runtime.autotuner import Autotuner

    tally = Tally()

    def run(self, *arguments, **options):
        self.nargs = dict(zip(self.arg_names, arguments, strict=False))
        configurations, name = self.prune_configs(options), self.base_fn.__name__
        for n in part(name, len(configurations), worker, workers):
            try:
                kernel = self.fn.run(*arguments, **options | configurations[n].all_kwargs() | {"warmup": True})
                _ = kernel.run  # loads it: its launcher is compiled too, and what does not fit the GPU is told here
            except Exception as error:
                tally.failed[f"{name} {configurations[n]}"] = type(error).__name__
            else:
                tally.done.add(kernel.hash)

    Autotuner.run = run
    return tally
