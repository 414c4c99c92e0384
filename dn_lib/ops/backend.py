"""Which implementation a call takes, and why the Triton kernels cannot take it."""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import warnings
from collections.abc import Generator

import torch
from torch import Tensor

from dn_lib.forms.common import describe
from dn_lib.forms.derivatives import active_transform, refuse_transforms
from dn_lib.kernels.rules import CHUNK_SIZES, DTYPES, MAX_HEAD_DIM

BACKENDS = ("auto", "recurrent", "parallel", "chunkwise", "triton")
# Looked up once: torch.compile cannot trace the look-up.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_warned: set[str] = set()
_auto: contextvars.ContextVar[str | None] = contextvars.ContextVar("dn_lib_auto", default=None)


@contextlib.contextmanager
def using(*, auto: str) -> Generator[None, None, None]:
    """Within it, backend "auto" takes `auto` wherever it may.  Raises ValueError for what is no backend.

    With auto="triton" a CPU takes the kernels, through Triton's interpreter, as a GPU would.

    >>> x = torch.ones(1, 4, 1, 16)
    >>> with using(auto="recurrent"):
    ...     print(choose_backend(x, x, None, "auto"))
    recurrent
    """
    if not isinstance(auto, str) or auto not in BACKENDS:
        raise ValueError(f"auto must be one of {', '.join(BACKENDS)}, got {describe(auto)}")
    token = _auto.set(None if auto == "auto" else auto)
    try:
        yield
    finally:
        _auto.reset(token)


def _auto_choice() -> str | None:
    """What `using` has set.  Asked for when a call is compiled, once."""
    return _auto.get()


vars(_auto_choice)["_dynamo_marked_constant"] = True  # as `dn_lib.forms.common` explains beside `_in_torch_func`


def forget_warnings() -> None:
    """The next fallback of "auto" warns again, as the first one of a process does."""
    _warned.clear()


def triton_problem(device: torch.device | None = None) -> str | None:
    """Why the Triton kernels cannot run (on `device`), with the remedy; None if they can."""
    if not _TRITON_INSTALLED:
        return "Triton is not installed: `pip install triton` (Linux only), or use backend='chunkwise'"
    if device is not None and device.type not in ("cuda", "cpu"):
        return f"tensors are on {device}: move them to an NVIDIA GPU, or use backend='chunkwise'"
    if device is not None and device.type != "cuda":
        from dn_lib.kernels.common import INTERPRETED

        if not INTERPRETED.value:
            return (
                f"tensors are on {device}, and Triton's interpreter is off: move them to a GPU, or set "
                "TRITON_INTERPRET=1 before dn_lib is imported"
            )
    return None


def why_not_auto(device: torch.device, dtype: torch.dtype, dim: int, chunk_size: int | None = None) -> str | None:
    """Why "auto" leaves the Triton kernels, in words; None where it takes them.  dim: the widest head."""
    if device.type != "cuda":
        return f"tensors are on {device.type}, not on a GPU"
    if dtype not in DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if triton_problem(device):
        return triton_problem(device)
    if dim > MAX_HEAD_DIM:
        return f"head size {dim} is above {MAX_HEAD_DIM}, the most that the Triton kernels take"
    if not _takes_chunks(chunk_size):
        return f"the Triton kernels take chunks of 16, 32 and 64 tokens, not {chunk_size}"
    return None


def _takes_chunks(chunk_size: int | None) -> bool:
    return chunk_size is None or chunk_size in CHUNK_SIZES


def choose_backend(q: Tensor, v: Tensor, chunk_size: int | None, backend: str) -> str:
    """`auto` takes Triton on a GPU wherever it can, chunkwise elsewhere."""
    dim = max(q.shape[-1], v.shape[-1])
    if backend == "auto":
        wanted = _auto_choice()
        if wanted is not None and (wanted != "triton" or _takes_chunks(chunk_size)):
            return wanted
        problem = why_not_auto(q.device, q.dtype, dim, chunk_size)
        if problem is None:
            return "triton"
        if q.device.type == "cuda" and q.dtype in DTYPES and dim > MAX_HEAD_DIM and "head_dim" not in _warned:
            _warned.add("head_dim")
            warnings.warn(f"delta_rule: {problem}; using backend='chunkwise'", stacklevel=3)
        return "chunkwise"
    if backend == "triton":
        if problem := triton_problem(q.device):
            raise RuntimeError(f"backend 'triton' cannot run: {problem}")
        check_for_triton(q.dtype, dim, chunk_size)
    return backend


def check_for_triton(dtype: torch.dtype, dim: int, chunk_size: int | None) -> None:
    """Raise TypeError or ValueError for what the Triton kernels cannot take, on any device."""
    if dtype not in DTYPES:
        raise TypeError(f"q must be float32, bfloat16 or float16 for backend 'triton', got {dtype}")
    if dim > MAX_HEAD_DIM:
        raise ValueError(
            f"q and v must have at most {MAX_HEAD_DIM} channels for backend 'triton', got {dim}; use 'chunkwise'"
        )
    if not _takes_chunks(chunk_size):
        raise ValueError(f"chunk_size must be 16, 32, 64 or None for backend 'triton', got {chunk_size}")


def resolve_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int | None,
    backend: str,
    g: Tensor | None = None,
) -> str:
    """`choose_backend`, with chunkwise in place of Triton where PyTorch has to see every operation."""
    chosen = choose_backend(q, v, chunk_size, backend)
    if chosen == "triton":
        if backend == "triton":
            refuse_transforms("backend 'triton'", "use backend='chunkwise'", q, k, v, beta, initial_state, g)
        elif active_transform(q, k, v, beta, initial_state, g):
            return "chunkwise"
    return chosen
