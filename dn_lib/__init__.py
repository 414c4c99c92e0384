"""DeltaNet, step by step: the package behind the book.

    >>> import torch, dn_lib
    >>> q, k, v = (torch.randn(1, 100, 2, 16) for _ in range(3))
    >>> beta = torch.rand(1, 100, 2)
    >>> o, state = dn_lib.delta_rule(q, k / k.norm(dim=-1, keepdim=True), v, beta, output_final_state=True)
    >>> o.shape, state.shape
    (torch.Size([1, 100, 2, 16]), torch.Size([1, 2, 16, 16]))

Import it before `triton`: where there is no GPU it asks Triton for its interpreter, which Triton only
looks up when it is first imported.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from dn_lib.ops import (
    checked,
    chunk_delta_rule,
    decode_delta_rule,
    delta_rule,
    fused_recurrent_delta_rule,
)

__version__ = "0.1.0"
__all__ = ["checked", "chunk_delta_rule", "decode_delta_rule", "delta_rule", "fused_recurrent_delta_rule"]
