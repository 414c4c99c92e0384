"""Numbers between the judge and a room, as JSON and raw bytes: what a submission sends is never unpickled.

A frame is its length and that of its JSON head (two 8-byte numbers), the head, and the bytes of its tensors.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

LARGEST = 64 << 20  # bytes of one frame; the largest honest answer of the book takes less than one of them
DEPTH = 8  # of nested tuples and lists
SIZES = struct.Struct("<QQ")

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


class WireError(ValueError):
    """A frame that says nothing that could be read, or too much."""


class Other:
    """Stands for an answer that is no number: but for the name of its type, nothing is known of it."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


def _tensor_head(x: torch.Tensor, blobs: list[bytes], *, kind: str = "tensor") -> dict[str, Any]:
    name = str(x.dtype).removeprefix("torch.")
    if type(x) not in (torch.Tensor, torch.nn.Parameter) or x.is_nested or name not in DTYPES:
        return {"other": type(x).__name__}
    dense = x.detach().cpu()
    dense = dense.resolve_conj().resolve_neg() if dense.layout is torch.strided else dense.to_dense()
    if dense.numel() * dense.element_size() > LARGEST:  # an expanded view of one number may be terabytes
        raise WireError(f"a tensor of {list(x.shape)} is too large to be handed over")
    blobs.append(dense.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {kind: name, "shape": list(dense.shape)}


def _head(value: Any, blobs: list[bytes], give: Callable[[Any], int] | None, depth: int = 0) -> Any:
    if depth > DEPTH:
        raise WireError(f"tuples and lists may be nested {DEPTH} deep")
    if value is None or type(value) is bool:
        return value
    if value is Ellipsis:
        return {"dots": True}
    if type(value) is int:
        return {"int": hex(value)} if value.bit_length() < 4096 else {"other": "int"}
    if type(value) is float:
        return {"float": value.hex()}
    if type(value) is complex:
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if type(value) is str:
        return {"str": value[:2000]}
    if isinstance(value, (tuple, list)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_head(item, blobs, give, depth + 1) for item in list(value)]}
    if isinstance(value, torch.Tensor):
        return _tensor_head(value, blobs)
    if type(value) is np.ndarray or isinstance(value, np.generic):
        try:
            tensor = torch.from_numpy(np.array(value))
        except TypeError:
            return {"other": type(value).__name__}
        return _tensor_head(tensor, blobs, kind="array")
    if give is not None and callable(value):
        return {"call": give(value)}
    return {"other": type(value).__name__}


def pack(kind: str, *, give: Callable[[Any], int] | None = None, facts: Any = None, **values: Any) -> bytes:
    """A frame of `kind` with `facts` (anything JSON) and `values` (numbers, tensors, nests of them).

    give: makes a number of a function, with which the other side may call it.  Raises WireError if it is too large.
    """
    blobs: list[bytes] = []
    head = {"kind": kind, "facts": facts, "values": {k: _head(v, blobs, give) for k, v in values.items()}}
    text = json.dumps(head).encode()
    body = text + b"".join(blobs)
    if len(body) > LARGEST:
        raise WireError(f"{len(body):,} bytes are too many to be handed over")
    return SIZES.pack(len(body), len(text)) + body


def _value(head: Any, blobs: memoryview, at: list[int], take: Callable[[int], Any] | None) -> Any:
    if head is None or isinstance(head, bool):
        return head
    (kind, given), *_ = head.items()
    if kind == "dots":
        return ...
    if kind == "int":
        return int(given, 16)
    if kind == "float":
        return float.fromhex(given)
    if kind == "complex":
        return complex(*map(float.fromhex, given))
    if kind == "str":
        return str(given)
    if kind in ("tuple", "list"):
        return {"tuple": tuple, "list": list}[kind](_value(item, blobs, at, take) for item in given)
    if kind in ("tensor", "array"):
        dtype, shape = DTYPES[given], [int(n) for n in head["shape"]]
        count = int(np.prod([0 if 0 in shape else 1, *shape], dtype=object))
        size = count * dtype.itemsize
        piece = bytes(blobs[at[0] : at[0] + size])
        if min(shape, default=0) < 0 or len(piece) != size:
            raise WireError("a tensor is shorter than it says")
        at[0] += size
        tensor = torch.frombuffer(bytearray(piece), dtype=dtype) if size else torch.empty(0, dtype=dtype)
        return tensor.reshape(shape) if kind == "tensor" else tensor.reshape(shape).numpy()
    if kind == "call" and take is not None:
        return take(int(given))
    if kind == "other":
        return type(str(given)[:80], (Other,), {})()
    raise WireError(f"{kind!r} is no kind of value")


def unpack(size: int, body: bytes, *, take: Callable[[int], Any] | None = None) -> tuple[str, Any, dict[str, Any]]:
    """(kind, facts, values) of a frame's body, whose JSON takes `size` bytes.

    take: makes a function of its number.  Raises WireError for whatever is not a frame.
    """
    try:
        head = json.loads(body[:size])
        at = [0]
        values = {str(k): _value(v, memoryview(body)[size:], at, take) for k, v in head["values"].items()}
        return str(head["kind"]), head["facts"], values
    except WireError:
        raise
    except Exception as error:  # anything may be sent, so anything may go wrong
        raise WireError(f"no frame ({type(error).__name__})") from None
