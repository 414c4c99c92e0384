"""DeltaNet, step by step: the package behind the book.

    >>> import torch, dn_lib
    >>> q, k, v = (torch.randn(1, 100, 2, 16) for _ in range(3))
    >>> beta = torch.rand(1, 100, 2)
    >>> o, state = dn_lib.delta_rule(q, k / k.norm(dim=-1, keepdim=True), v, beta, output_final_state=True)
    >>> o.shape, state.shape
    (torch.Size([1, 100, 2, 16]), torch.Size([1, 2, 16, 16]))

Importing it changes nothing outside: neither the environment nor Triton, which is imported when a kernel is first
asked for. Where there is no GPU, `backend="triton"` then turns Triton's interpreter on, in this process alone
(`dn_lib.kernels.interpreter`); TRITON_INTERPRET=0 keeps it off.
"""

from dn_lib import fla as fla
from dn_lib.ops import (
    checked,
    chunk_delta_rule,
    chunk_gated_delta_rule,
    chunk_gla,
    chunk_lightning_attn,
    chunk_retention,
    chunk_simple_gla,
    decode_delta_rule,
    delta_rule,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
    gated_delta_rule,
    linear_attention,
)

__version__ = "0.1.0"
__all__ = [
    "checked",
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_gla",
    "chunk_lightning_attn",
    "chunk_retention",
    "chunk_simple_gla",
    "decode_delta_rule",
    "delta_rule",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "gated_delta_rule",
    "linear_attention",
]
