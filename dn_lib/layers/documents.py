"""Documents packed along one row, and the checks with which every layer opens."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dn_lib.forms.common import check_cu_seqlens, check_offsets, check_tensors
from dn_lib.layers.cache import LayerCache


class Documents:
    """N documents packed one after the other along a row of L tokens, made once from `cu_seqlens` for all layers.

    `offsets` `[N + 1]` is `cu_seqlens`. Of every token, `numbers` `[L]` says in which document it is, counted from
    0, and `positions` `[L]` its position there. On a CPU the offsets' values are always checked; on
    a GPU where they are read anyway (`bounds`), since reading them waits for the GPU.

        >>> documents = Documents(torch.tensor([0, 3, 5]), torch.zeros(1, 5))
        >>> documents.positions
        tensor([0, 1, 2, 0, 1])
        >>> documents.last_rows(torch.arange(1, 6)[None, :, None], size=3).squeeze(-1)
        tensor([[1, 2, 3],
                [0, 4, 5]])
    """

    def __init__(self, cu_seqlens: Tensor, x: Tensor):
        _check_cu_seqlens(cu_seqlens, x)
        self.offsets, self.length = cu_seqlens, x.shape[1]
        self._bounds: list[tuple[int, int]] | None = None
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            self.bounds()
        self.numbers = document_numbers(cu_seqlens, self.length)
        self.positions = torch.arange(self.length, device=x.device) - cu_seqlens[self.numbers]

    def __len__(self) -> int:
        return self.offsets.shape[0] - 1

    def bounds(self) -> list[tuple[int, int]]:
        """Begin and end of each document. Raises ValueError unless they rise from 0 to L."""
        if self._bounds is None:
            offsets = self.offsets.tolist()
            check_offsets(offsets, self.length)
            self._bounds = list(itertools.pairwise(offsets))
        return self._bounds

    def longest(self) -> int:
        """The tokens of the longest document."""
        return max(end - begin for begin, end in self.bounds())

    def padding(self) -> Tensor:
        """`[N]`: by how many tokens each document is shorter than the longest."""
        return self.longest() - self.offsets.diff()

    def aligned_positions(self) -> Tensor:
        """`[L]`: positions counted so that all documents end at the same one, that of the longest."""
        return self.positions + self.padding()[self.numbers]

    def last_rows(self, x: Tensor, size: int) -> Tensor:
        """The last `size` rows of each document: `[1, L, ...]` -> `[N, size, ...]`, zeros before its first."""
        rows = self.offsets[1:, None] - size + torch.arange(size, device=x.device)
        missing = (rows < self.offsets[:-1, None]).reshape(len(self), size, *[1] * (x.dim() - 2))
        padded = torch.cat([x.new_zeros(size, *x.shape[2:]), x[0]])
        return padded[rows + size].masked_fill(missing, 0)


def as_documents(cu_seqlens: Tensor | Documents | None, x: Tensor) -> Documents | None:
    """`cu_seqlens` as `Documents`, if it is not made into one yet."""
    return Documents(cu_seqlens, x) if cu_seqlens is not None and not isinstance(cu_seqlens, Documents) else cu_seqlens


def document_numbers(cu_seqlens: Tensor, length: int) -> Tensor:
    """Which document each of `length` packed tokens belongs to, counted from 0: `[N + 1]` offsets -> `[length]`.

    >>> document_numbers(torch.tensor([0, 2, 5]), 5)
    tensor([0, 0, 1, 1, 1])
    """
    offsets = cu_seqlens[1:].contiguous()
    return torch.searchsorted(offsets, torch.arange(length, device=offsets.device, dtype=offsets.dtype), right=True)


def _check_cu_seqlens(cu_seqlens: Tensor, x: Tensor) -> None:
    check_cu_seqlens(cu_seqlens, x, like="the tokens")
    if x.shape[0] != 1:
        raise ValueError(f"cu_seqlens needs a batch size of 1 (documents packed along L), got {x.shape[0]}")


def check_rows(name: str, x: Tensor, width: int, axes: str = "B, L, width") -> None:
    check_tensors(**{name: x})
    if x.dim() != 3 or x.shape[-1] != width:
        raise ValueError(f"{name} must be [{axes}] with {axes.split(', ')[-1]} = {width}, got {list(x.shape)}")


def open_documents(
    x: Tensor, width: int, cache: LayerCache | None, cu_seqlens: Tensor | Documents | None
) -> Documents | None:
    """Check a mixer's arguments; returns the documents that x holds, None if its rows are one each."""
    check_rows("x", x, width)
    documents = as_documents(cu_seqlens, x)
    if cache is None:
        return documents
    if not isinstance(cache, LayerCache):
        raise TypeError(f"cache must be a LayerCache, got {type(cache).__name__}")
    if documents is not None and cache.batch_size is not None:
        raise ValueError("cache must be empty with cu_seqlens, got one that holds tokens")
    sequences = x.shape[0] if documents is None else len(documents)
    if cache.batch_size not in (None, sequences):
        raise ValueError(f"x must have the cache's batch size {cache.batch_size}, got {list(x.shape)}")
    cache.batch_size = sequences
    return documents


def positions_of(x: Tensor, cache: LayerCache | None, documents: Documents | None) -> Tensor:
    """The position of each row of x, `[L]`; the cache then stands after them.

    Scores of rotated vectors depend on distances alone. With a cache, documents of different lengths are therefore
    counted so that they all end at one position, and one number serves all sequences of the later calls.
    """
    if documents is not None:
        if cache is None:
            return documents.positions
        cache.position = documents.longest()
        return documents.aligned_positions()
    start = 0 if cache is None else cache.position
    if cache is not None:
        cache.position = start + x.shape[1]
    return torch.arange(start, start + x.shape[1], device=x.device)
