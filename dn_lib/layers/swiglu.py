"""The feed-forward half of a block (Shazeer 2020)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dn_lib.forms.common import check_integer, check_is_tensor


class SwiGLU(nn.Module):
    """The feed-forward part: y = W_down (silu(W_gate x) * (W_up x)), `[..., width]` -> `[..., width]`.

    Source: Shazeer 2020, as in LLaMA (Touvron et al. 2023).

        >>> import torch
        >>> SwiGLU(8, 16)(torch.ones(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        check_integer("width", width)
        check_integer("hidden", hidden)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.output = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        check_is_tensor("x", x, "[..., width]")
        if x.dim() == 0 or x.shape[-1] != self.gate.in_features:
            raise ValueError(f"x must be [..., width] with width = {self.gate.in_features}, got {list(x.shape)}")
        return self.output(F.silu(self.gate(x)) * self.up(x))
