"""Random windows of a token array, drawn so that a run can be stopped, resumed and spread over processes."""

from __future__ import annotations

from numbers import Integral

import numpy as np
import torch

from dn_lib.data.tokens import DataError


class Batches:
    """Batches of windows at random places of a token array.

    tokens: one-dimensional integer array, in memory or memory-mapped.
    length: context length L; a window holds L + 1 tokens, the inputs and their successors.
    batch: windows in a step, over all processes and accumulation steps together.
    accumulate, rank, world: each of the `world` processes gets its own `batch / world` windows of a
      step, cut in `accumulate` equal parts.  All draw the same numbers, so the union of the processes'
      windows does not depend on `world`.

    Raises DataError if the window is longer than the data, if `batch` does not divide, or for a number that is no
    whole one or out of its range.

    >>> batches = Batches(np.arange(100, dtype=np.uint8), length=8, batch=4, seed=0)
    >>> batches.next().shape
    torch.Size([1, 4, 9])
    """

    def __init__(
        self,
        tokens: np.ndarray,
        length: int,
        batch: int,
        *,
        seed: int = 0,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
    ):
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise DataError(f"tokens must be integers [n], got {tokens.dtype} {list(tokens.shape)}")
        counts = {"length": length, "batch": batch, "accumulate": accumulate, "world": world}
        for name, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
                raise DataError(f"{name} must be a whole number, at least 1, got {count!r}")
        if rank not in range(world):
            raise DataError(f"rank must be from 0 to {world - 1}, got {rank!r}")
        if len(tokens) < length + 1:
            raise DataError(
                f"length must be below the number of training tokens, {len(tokens)}, got {length}: "
                "use a shorter context or a larger corpus"
            )
        if batch % (accumulate * world):
            raise DataError(f"batch must be a multiple of accumulate * processes = {accumulate} * {world}, got {batch}")
        self.tokens, self.length, self.batch = tokens, length, batch
        self.accumulate, self.rank, self.world = accumulate, rank, world
        self.generator = torch.Generator().manual_seed(seed)

    def next(self) -> torch.Tensor:
        """The next step's windows for this process, int64 `[accumulate, micro batch, length + 1]`."""
        starts = torch.randint(len(self.tokens) - self.length, (self.batch,), generator=self.generator)
        share = self.batch // self.world
        mine = starts[self.rank * share : (self.rank + 1) * share].tolist()
        windows = np.stack([self.tokens[start : start + self.length + 1] for start in mine])
        return torch.from_numpy(windows.astype(np.int64)).view(self.accumulate, -1, self.length + 1)

    def state(self) -> torch.Tensor:
        """The generator's state, a uint8 tensor."""
        return self.generator.get_state()

    def restore(self, state: torch.Tensor) -> None:
        """Go on from `state`."""
        self.generator.set_state(state)
