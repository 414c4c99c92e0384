"""Which implementation a call takes, and why the Triton kernels cannot take it."""

from __future__ import annotations

import importlib.util
import warnings

import torch
from torch import Tensor

from dn_lib.forms.common import active_transform, refuse_transforms

BACKENDS = ("auto", "recurrent", "parallel", "chunkwise", "triton")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_MAX_HEAD_DIM = 256
# Looked up once: torch.compile cannot trace the look-up.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_warned: set[str] = set()


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


def choose_backend(q: Tensor, v: Tensor, chunk_size: int | None, backend: str) -> str:
    """`auto` takes Triton on a GPU wherever it can, chunkwise elsewhere."""
    dim = max(q.shape[-1], v.shape[-1])
    if backend == "auto":
        if q.device.type != "cuda" or q.dtype not in TRITON_DTYPES or triton_problem(q.device):
            return "chunkwise"
        if dim > TRITON_MAX_HEAD_DIM:
            if "head_dim" not in _warned:
                _warned.add("head_dim")
                warnings.warn(
                    f"delta_rule: head size {dim} is above {TRITON_MAX_HEAD_DIM}, the most that the Triton kernels "
                    "take; using backend='chunkwise'",
                    stacklevel=3,
                )
            return "chunkwise"
        return "triton"
    if backend == "triton":
        if problem := triton_problem(q.device):
            raise RuntimeError(f"backend 'triton' cannot run: {problem}")
        if q.dtype not in TRITON_DTYPES:
            raise TypeError(f"q must be float32, bfloat16 or float16 for backend 'triton', got {q.dtype}")
        if dim > TRITON_MAX_HEAD_DIM:
            raise ValueError(
                f"q and v must have at most {TRITON_MAX_HEAD_DIM} channels for backend 'triton', got {dim}; "
                "use 'chunkwise'"
            )
        if chunk_size not in (None, 16, 32, 64):
            raise ValueError(f"chunk_size must be 16, 32, 64 or None for backend 'triton', got {chunk_size}")
    return backend


def resolve_backend(q, k, v, beta, initial_state, chunk_size, backend):
    """`choose_backend`, with chunkwise in place of Triton where PyTorch has to see every operation."""
    chosen = choose_backend(q, v, chunk_size, backend)
    if chosen == "triton":
        if backend == "triton":
            refuse_transforms("backend 'triton'", "use backend='chunkwise'", q, k, v, beta, initial_state)
        elif active_transform(q, k, v, beta, initial_state):
            return "chunkwise"
    return chosen
