"""Chapter 6: the layers of a language model around the operator.

Every mixer here has one signature, `mixer(x, cache=None, *, cu_seqlens=None) -> y`, with x and y of shape
`[B, L, width]`, and mixes information between positions without looking ahead.

A `LayerCache` starts empty. A call reads what earlier calls left there and replaces it, so that a prompt can be
given whole, in pieces or a token at a time, and the outputs are those of the whole sequence. What a cache holds
is detached: no gradient flows into an earlier call.

    >>> import dn_lib, torch
    >>> from dn_lib.layers import DeltaNet, LayerCache
    >>> layer, x, cache = DeltaNet(width=32, heads=2), torch.randn(1, 10, 32), LayerCache()
    >>> pieces = torch.cat([layer(x[:, :7], cache), layer(x[:, 7:], cache)], dim=1)
    >>> torch.allclose(pieces, layer(x), atol=1e-4)
    True

`cu_seqlens`, N + 1 offsets that rise from 0 to L, says that x `[1, L, width]` holds N documents one after the
other. Each is then computed as if it were alone. With an empty cache, the documents become its N sequences: the
next call continues them, and takes x `[N, L, width]`.

    >>> packed = layer(x, cu_seqlens=torch.tensor([0, 7, 10]))
    >>> torch.allclose(packed[:, 7:], layer(x[:, 7:]), atol=1e-4)
    True
"""

# isort: off
# Each of these files registers its mixers. Errors list them in this order.
from dn_lib.layers.delta_net import DeltaNet, delta_rule_in_full_precision
from dn_lib.layers.linear_attention import LinearAttention, linear_attention_in_full_precision
from dn_lib.layers.retnet import RetNet
from dn_lib.layers.gla import GatedLinearAttention
from dn_lib.layers.gated_delta_net import GatedDeltaNet, gated_delta_rule_in_full_precision
from dn_lib.layers.mamba import Mamba
from dn_lib.layers.mamba2 import Mamba2
from dn_lib.layers.kda import KimiDeltaAttention
from dn_lib.layers.lightning import LightningAttention, decay_slopes
from dn_lib.layers.mom import MixtureOfMemories, balance_loss, balance_losses
from dn_lib.layers.attention import Attention, full_attention, window_attention
from dn_lib.layers.liger import Liger
# isort: on

from dn_lib.layers.cache import LayerCache, outside_graphs
from dn_lib.layers.common import (
    ACTIVATIONS,
    QK_NORMS,
    RMSNorm,
    check_choice,
    check_even,
    head_dim_or_default,
    l1_norm,
    l2_norm,
    split_heads,
)
from dn_lib.layers.documents import Documents, as_documents, check_rows, document_numbers, open_documents, positions_of
from dn_lib.layers.mimetic import mimetic_
from dn_lib.layers.recurrent import MultiStepMixer, RecurrentMixer, run_operator, run_recurrence
from dn_lib.layers.registry import Mixer, MixerKind, mixer_kind, mixer_names, register_mixer
from dn_lib.layers.rotary import rotary_embedding
from dn_lib.layers.short_convolution import ShortConvolution
from dn_lib.layers.swiglu import SwiGLU

__all__ = [
    "ACTIVATIONS",
    "QK_NORMS",
    "Attention",
    "DeltaNet",
    "Documents",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "KimiDeltaAttention",
    "LayerCache",
    "Liger",
    "LightningAttention",
    "LinearAttention",
    "Mamba",
    "Mamba2",
    "Mixer",
    "MixerKind",
    "MixtureOfMemories",
    "MultiStepMixer",
    "RMSNorm",
    "RecurrentMixer",
    "RetNet",
    "ShortConvolution",
    "SwiGLU",
    "as_documents",
    "balance_loss",
    "balance_losses",
    "check_choice",
    "check_even",
    "check_rows",
    "decay_slopes",
    "delta_rule_in_full_precision",
    "document_numbers",
    "full_attention",
    "gated_delta_rule_in_full_precision",
    "head_dim_or_default",
    "l1_norm",
    "l2_norm",
    "linear_attention_in_full_precision",
    "mimetic_",
    "mixer_kind",
    "mixer_names",
    "open_documents",
    "outside_graphs",
    "positions_of",
    "register_mixer",
    "rotary_embedding",
    "run_operator",
    "run_recurrence",
    "split_heads",
    "window_attention",
]
