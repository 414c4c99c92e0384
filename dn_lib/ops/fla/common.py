"""What the functions with fla's signatures share: arguments refused by name, and the layout of states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dn_lib.forms.common import check_flag, check_is_tensor
from dn_lib.ops.checks import check_copy, check_rank, size_of


def refuse_options(function: str, options: dict[str, Any]) -> None:
    """Raise, naming them, for arguments that fla's function takes, or drops without a word, and ours does not have."""
    head_first = options.pop("head_first", False)
    if head_first is not None:
        check_flag("head_first", head_first)
    if head_first:
        raise ValueError("head_first must be False: tensors are [B, L, H, d]; transpose them first")
    if options:
        raise TypeError(f"{function} has no argument {', '.join(map(repr, sorted(options)))}")


def check_cpu_copy(cu_seqlens: Tensor | None, copy: Tensor | None) -> None:
    """cu_seqlens_cpu must be a copy of cu_seqlens on the CPU, or None; it is not needed."""
    if copy is None:
        return
    check_is_tensor("cu_seqlens_cpu", copy, "like cu_seqlens")
    if copy.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens_cpu must be int32 or int64, got {copy.dtype}")
    expected = size_of(cu_seqlens) if isinstance(cu_seqlens, Tensor) else None
    if copy.device.type != "cpu" or size_of(copy) != expected:
        raise ValueError(
            f"cu_seqlens_cpu must be a copy of cu_seqlens, {expected}, on the CPU, got {size_of(copy)} on {copy.device}"
        )
    if cu_seqlens is not None:
        check_copy(cu_seqlens, copy)


def state_in(state: Tensor | None, k: Tensor, v: Tensor, state_v_first: bool) -> Tensor | None:
    """fla's initial state as ours, `[N, H_v, d_k, d_v]`, without a copy."""
    check_flag("state_v_first", state_v_first)
    if state is None or not state_v_first:
        return state
    check_rank("initial_state", state, 4, "four dimensions [N, H_v, d_v, d_k], for state_v_first")
    check_rank("k", k, 4, "four dimensions [B, L, H, d]")
    check_rank("v", v, 4, "four dimensions [B, L, H, d]")
    if state.shape[2:] != (v.shape[3], k.shape[3]):
        expected = [v.shape[3], k.shape[3]]
        raise ValueError(f"initial_state must end in [d_v, d_k] = {expected} for state_v_first, got {size_of(state)}")
    return state.mT


def state_out(result: tuple[Tensor, Tensor | None], state_v_first: bool) -> tuple[Tensor, Tensor | None]:
    o, state = result
    return o, state.mT if state is not None and state_v_first else state
