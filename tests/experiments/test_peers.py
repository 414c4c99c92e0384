"""The work of autotuners, split among processes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from experiments.harness.peers import compile_only, part
from experiments.harness.processes import compile_ahead


@pytest.mark.parametrize("workers", [1, 2, 7, 16])
def test_every_configuration_is_one_workers(workers):
    shares = [0] * workers
    for kernel in range(200):
        parts = [part(f"kernel {kernel}", kernel % 9, worker, workers) for worker in range(workers)]
        assert sorted(n for found in parts for n in found) == list(range(kernel % 9))
        shares = [share + len(found) for share, found in zip(shares, parts, strict=True)]
    assert max(shares) < 1.7 * min(shares)  # were all kernels begun at worker 0, the first would have all of it


def test_autotuners_compile_their_part_and_launch_nothing(monkeypatch):
    import triton
    from triton.runtime.autotuner import Autotuner, Heuristics

    for name in ("run", "prune_configs"):
        monkeypatch.setattr(Autotuner, name, getattr(Autotuner, name))  # put back in the end

    class Compiled:
        def __init__(self, BT):
            self.hash = str(BT)

        @property
        def run(self):
            if self.hash == "3":
                raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")

    class Kernel:
        """As `triton.jit` makes it: `run` compiles, and launches unless `warmup`."""

        def __init__(self):
            self.asked, self.launched = [], 0

        @staticmethod
        def fn(x, T):
            pass

        def run(self, x, *, T, BT, even, num_warps, num_ctas, num_stages, grid, warmup):
            assert even is (T % 2 == 0) and num_warps == 8
            self.asked.append(BT)
            self.launched += not warmup
            if BT == 4:
                raise RuntimeError("no such instruction")
            return Compiled(BT)

    def no_time(call, quantiles):
        call()
        raise AssertionError("timed")

    def tuner(kernel, **options):
        inner = Heuristics(kernel, ["x", "T"], {"even": lambda given: given["T"] % 2 == 0})
        configs = [triton.Config({"BT": n}, num_warps=8) for n in range(10)]
        return Autotuner(inner, ["x", "T"], configs, ["T"], ["x"], None, do_bench=no_time, **options)

    done, failed = set(), {}
    for worker in range(3):
        tally, kernel = compile_only(worker, 3), Kernel()
        pruned = {"early_config_prune": lambda configs, named, **options: configs[: options["T"]]}
        call = tuner(kernel, prune_configs_by=pruned)[lambda meta: 1 / 0]  # the grid is asked for by a launch only
        for _ in range(2):
            call(torch.ones(3), T=8)
        assert kernel.launched == 0 and kernel.asked == 2 * list(part("fn", 8, worker, 3))
        assert not done & tally.done
        done, failed = done | tally.done, failed | tally.failed
        assert str(tally).startswith(f"{len(tally.done)} configurations compiled")
        assert ("cannot be used (such as fn BT: " in str(tally)) == bool(tally.failed)
    assert done == {"0", "1", "2", "5", "6", "7"}
    assert sorted(failed.values()) == ["OutOfResources", "RuntimeError"]
    monkeypatch.undo()
    with pytest.raises(AssertionError, match="timed"):  # the stub is one that Triton's own `run` would have timed
        tuner(Kernel())[(1,)](torch.ones(3), T=8)


def fails_on_two(n: int) -> None:
    if n == 2:
        raise ValueError("no such instruction")


def test_what_cannot_be_compiled_ahead_is_named_and_costs_nothing_else():
    made = compile_ahead(fails_on_two, [1, 2, 3], workers=2)
    assert made["workers"] == 2 and made["failed"] == ["2: ValueError: no such instruction"]
