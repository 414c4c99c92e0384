"""What a launch does with its tensors first: a kernel sees addresses, and takes them to be of plain, packed rows.

Every tensor goes through `readable` or `writable` before a kernel is given its address.  Offsets
go through `token_offsets`, which does that for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dn_lib.forms.common import check_is_tensor


def readable(**tensors: Tensor | None) -> list[Any]:
    """The tensors as kernels read them: contiguous, with their own values in memory, on the device of the first.

    Copies what is not contiguous (strided, expanded) or stands for its negative; None stays None.  Raises TypeError
    or ValueError, naming the argument, for what has no such memory: nested, sparse, on another device or on "meta".

    >>> x = torch.arange(6.0).reshape(2, 3)
    >>> [y.is_contiguous() for y in readable(x=x, y=x.T)]
    [True, True]
    """
    first, reference = next(iter(tensors.items()))
    device = reference.device if isinstance(reference, Tensor) else None
    return [
        x if x is None or _is_ready(x, device) else _made_ready(name, x, first, device) for name, x in tensors.items()
    ]


def _is_ready(x: Tensor, device: torch.device | None) -> bool:
    """Whether there is nothing to do, as in nearly every call."""
    return (
        isinstance(x, Tensor)
        and x.layout is torch.strided
        and not x.is_nested
        and x.device == device
        and x.is_contiguous()
        and not x.is_neg()
        and not x.is_meta
    )


def _made_ready(name: str, x: Tensor, first: str, device: torch.device | None) -> Tensor:
    check_is_tensor(name, x)
    if x.device != device:
        raise ValueError(f"{name} must be on {device} like {first}, got {x.device}")
    if x.is_meta:
        raise ValueError(f"{name} must have values, got a tensor on meta")
    return x.resolve_neg().contiguous()


def writable(name: str, x: Tensor, reference: Tensor) -> Tensor:
    """`x` itself, after a check that a kernel can write into it; autograd learns that its values change.

    >>> x = torch.zeros(2, 3)
    >>> writable("state", x, x)._version
    1
    """
    check_is_tensor(name, x)
    if x.device != reference.device:
        raise ValueError(f"{name} must be on {reference.device} like q, got {x.device}")
    if not x.is_contiguous() or x.is_neg():
        raise ValueError(f"{name} must be contiguous, got strides {x.stride()}{' of a negative view' * x.is_neg()}")
    if not x.is_inference():  # such a tensor has no version, since no backward may ever need it
        torch.autograd.graph.increment_version(x)
    return x


def token_offsets(cu_seqlens: Tensor | None, reference: Tensor) -> Tensor | None:
    """The offsets of packed sequences, safe to follow in `reference`, `[1, L, ...]`.

    They are clamped to 0 ... L and made to rise, on the device, so that no kernel leaves the tensors.  Their values
    are not read here, which would wait for a GPU; on a CPU the operators check them.

    >>> token_offsets(torch.tensor([[0, 2, 1, 7], [9, 9, 9, 9]]).T[:, 0], torch.zeros(1, 3, 1, 16))
    tensor([0, 2, 2, 3])
    """
    if cu_seqlens is None:
        return None
    offsets: Tensor = readable(q=reference, cu_seqlens=cu_seqlens)[1]
    L = reference.shape[1]
    return offsets.clamp(0, min(L, torch.iinfo(offsets.dtype).max)).cummax(0).values


def chunk_offsets(tokens: Tensor | None, chunk: int) -> Tensor | None:
    """Running sum of the number of chunks of each packed sequence, `[N + 1]`, made on the device.

    >>> chunk_offsets(torch.tensor([0, 2, 2, 7]), 4)
    tensor([0, 1, 1, 3], dtype=torch.int32)
    """
    if tokens is None:
        return None
    chunks = (tokens.diff() + chunk - 1).div(chunk, rounding_mode="floor")
    return torch.nn.functional.pad(chunks.cumsum(0), (1, 0)).to(torch.int32)


def on_its_device(run: Callable) -> Callable:
    """Makes the GPU of q the current one, as Triton expects, for the time of the call."""

    @functools.wraps(run)
    def there(*, q: Tensor, **arguments):
        if q.is_cuda and q.device.index != torch.cuda.current_device():
            with torch.cuda.device(q.device):
                return run(q=q, **arguments)
        return run(q=q, **arguments)

    return there
