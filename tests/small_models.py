"""Small models and layers, one of each kind, that several test modules share."""

from __future__ import annotations

import torch

from dn_lib.layers import (
    Attention,
    DeltaNet,
    GatedDeltaNet,
    GatedLinearAttention,
    KimiDeltaAttention,
    Liger,
    LightningAttention,
    LinearAttention,
    Mamba,
    Mamba2,
    MixtureOfMemories,
    RetNet,
)
from dn_lib.models import MIXERS, LanguageModel, ModelConfig

SMALL = {"vocab_size": 50, "width": 32, "layers": 4, "heads": 2, "window": 6}


MODELS = {name: {"mixer": name} for name in MIXERS} | {
    "hybrid window": {"hybrid": "window"},
    "hybrid global": {"hybrid": "global"},
    "linear, hybrid global": {"mixer": "linear", "hybrid": "global"},
    "spelled out": {"pattern": ("gla", "mamba", "attention", "retnet")},
    "tied, no feed-forward": {"tie_embeddings": True, "mlp_ratio": 0},
    "two steps, gate, beta to 2": {"delta_steps": 2, "output_gate": True, "beta_range": 2.0},
    "gated, more value heads": {"mixer": "gated_delta", "value_heads": 4, "expand_v": 1.5, "output_gate": False},
    "two attention heads, four delta heads": {"hybrid": "window", "heads": 4, "attention_heads": 2},
}


def model_and_tokens(options, length=24, batch=2):
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(**SMALL | options))
    # At the usual start of 0.02 every model is close to its embedding; larger weights make the mixers speak.
    model.reset_parameters(std=0.2)
    return model, torch.randint(0, 50, (batch, length))


LAYERS = {
    "delta": lambda **o: DeltaNet(24, 2, **o),
    "delta without conv": lambda **o: DeltaNet(24, 2, conv_size=0, **o),
    "delta, gate, beta to 2": lambda **o: DeltaNet(24, 2, output_gate=True, beta_range=2.0, **o),
    "delta, two steps": lambda **o: DeltaNet(24, 2, steps=2, beta_range=2.0, **o),
    "delta, l1": lambda **o: DeltaNet(24, 2, qk_norm="l1", activation="elu1", **o),
    "delta, wide head": lambda **o: DeltaNet(24, 3, 16, **o),
    "gated delta": lambda **o: GatedDeltaNet(24, 2, **o),
    "gated delta, value heads, beta to 2": lambda **o: GatedDeltaNet(
        24, 2, value_heads=4, expand_v=0.5, beta_range=2.0, output_gate=False, conv_size=0, **o
    ),
    "linear": lambda **o: LinearAttention(24, 2, **o),
    "linear, two steps": lambda **o: LinearAttention(24, 2, steps=2, **o),
    "retnet": lambda **o: RetNet(24, 2, **o),
    "gla": lambda **o: GatedLinearAttention(24, 2, conv_size=4, **o),
    "mamba": lambda **o: Mamba(24, **o),
    "mamba without conv": lambda **o: Mamba(24, conv_size=0, **o),
    "mamba2": lambda **o: Mamba2(24, 4, state_size=8, **o),
    "mamba2 without conv": lambda **o: Mamba2(24, 3, 8, state_size=6, conv_size=0, **o),
    "kda": lambda **o: KimiDeltaAttention(24, 2, **o),
    "kda without conv, beta to 2": lambda **o: KimiDeltaAttention(24, 2, 8, conv_size=0, rank=3, beta_range=2.0, **o),
    "lightning": lambda **o: LightningAttention(24, 2, **o),
    "lightning, transnormer": lambda **o: LightningAttention(24, 3, decay="transnormer", depth=0.5, conv_size=4, **o),
    "mom": lambda **o: MixtureOfMemories(24, 2, **o),
    "mom without conv, beta to 2": lambda **o: MixtureOfMemories(
        24, 2, 8, memories=3, active=3, expand_v=0.5, conv_size=0, output_gate=False, beta_range=2.0, **o
    ),
    "attention": lambda **o: Attention(24, 2, **o),
    "window": lambda **o: Attention(24, 2, window=5, **o),
    "liger": lambda **o: Liger(24, 2, window=5, **o),
    "window of one": lambda **o: Attention(24, 2, window=1, **o),
}
