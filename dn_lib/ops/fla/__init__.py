"""The operators with the signatures of flash-linear-attention 0.6.0's functions: swap one import.

Names, positions and defaults are fla's.  Arguments that have no counterpart here are refused by name.
"""

from dn_lib.ops.fla.delta import chunk_delta_rule, fused_recurrent_delta_rule
from dn_lib.ops.fla.gated import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from dn_lib.ops.fla.linear import chunk_gla, chunk_lightning_attn, chunk_retention, chunk_simple_gla

__all__ = [
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_gla",
    "chunk_lightning_attn",
    "chunk_retention",
    "chunk_simple_gla",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
]
