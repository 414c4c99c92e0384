"""flash-linear-attention, the peer: how it is loaded, kept from tuning, and compiled in several processes.

A Triton autotuner compiles its configurations one after another.  In a process where `compile_only` was called, every
autotuner compiles a part of its configurations and times none.  The compiled kernels stay in Triton's cache
(TRITON_CACHE_DIR), where a process that times finds them.
"""

from __future__ import annotations

import functools
import importlib.util
import zlib
from dataclasses import dataclass, field

from dn_lib.operators import DELTA_RULE
from experiments.harness.provenance import package_version
from experiments.harness.results import first_line


@dataclass
class Peer:
    """Whether flash-linear-attention is there, or why not; `problems.peer_form` calls it."""

    status: str
    present: bool = False
    cut: bool = False
    facts: dict = field(default_factory=dict)


@functools.cache
def load_fla(skip: bool, smoke: bool = False) -> Peer:
    """fla as it is installed.  While `peer.cut` is true its autotuners try only their first configuration."""
    if skip:
        return Peer("skipped")
    if smoke:
        return Peer("skipped: smoke run")
    if importlib.util.find_spec("fla") is None:
        return Peer("absent")
    from triton.runtime.autotuner import Autotuner

    peer = Peer(
        "present", facts={"fla": package_version("flash-linear-attention"), "fla_core": package_version("fla-core")}
    )
    plain = Autotuner.prune_configs

    def prune(self, *arguments, **options):
        configs = plain(self, *arguments, **options)
        return configs[:1] if peer.cut and self.base_fn.__module__.startswith("fla.") else configs

    try:
        DELTA_RULE.peers["fla"].load()
    except Exception as error:
        return Peer(f"failed to import: {first_line(error)}")
    Autotuner.prune_configs = prune
    peer.present = True
    return peer


# --- Compiling in several processes ------------------------------------------------------------------------------


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
