"""Mimetic initialisation: layers that start as what attention learns to do (Trockman et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from dn_lib.layers.delta_net import DeltaNet
from dn_lib.layers.gated_delta_net import GatedDeltaNet
from dn_lib.layers.gla import GatedLinearAttention
from dn_lib.layers.kda import KimiDeltaAttention
from dn_lib.layers.lightning import LightningAttention
from dn_lib.layers.linear_attention import LinearAttention
from dn_lib.layers.mamba import Mamba
from dn_lib.layers.mamba2 import Mamba2
from dn_lib.layers.recurrent import RecurrentMixer
from dn_lib.layers.registry import Mixer
from dn_lib.layers.retnet import RetNet
from dn_lib.layers.short_convolution import ShortConvolution

PARTS = ("keys", "values", "convolutions", "gates")
OPEN_GATE = 6.0  # GLA's logit: alpha = sigmoid(6)^(1/16) = 0.99985
LOG_RATE = -8.0  # log A: with a step of 1, alpha = exp(-e^-8) = 0.99966
STEP_BIAS = math.log(math.e - 1)  # softplus of it is 1
# Layers whose decay is fixed, or that have none, have no gates to set.
MIMETIC = (
    DeltaNet,
    LinearAttention,
    RetNet,
    LightningAttention,
    GatedLinearAttention,
    GatedDeltaNet,
    KimiDeltaAttention,
    Mamba,
    Mamba2,
)


@torch.no_grad()
def mimetic_(mixer: Mixer, parts: Collection[str] = PARTS) -> Mixer:
    """Set the weights of a linear layer, in place, so that it starts as an attention that copies; returns it.

    A trained attention layer asks for keys that resemble the query, and hands on values as they are. `parts` says what
    is set to that end, any of:

    - "keys": W_k = W_q, with orthonormal rows, drawn anew: q_i . k_j compares the inputs i and j themselves, over the
      d_k directions of a head, and W_q^T W_k is the identity where the heads together have `width` channels. In
      Mamba and Mamba-2 the maps to C and B are the query's and the key's.
    - "values": W_o = W_v^T, with orthonormal rows or columns: W_o W_v is the identity where all heads together have
      at least `width` channels, else a projection.
    - "convolutions": the identity: the last tap 1, the others 0, no bias.
    - "gates": open and blind to the token, so that alpha starts near 1: log A = -8 and a step of 1 (alpha = 0.99966,
      half-life 2,066 tokens); GLA's logit 6 (alpha = 0.99985). Layers with fixed decays, and without, have none to set.
      A gate so wide open learns slowly: the derivative of log alpha by its logit is -2.1e-4, and for GLA 1.5e-4.

    What lies between (SiLU, norms, the output gate, beta, Mamba's skip D) stays, so the layer is near to copying, not
    equal to it. The paper's exact constants are not public; those of the gates are the numbers above, chosen here.

    Takes DeltaNet, linear attention, RetNet, Lightning, GLA, Gated DeltaNet, KDA, Mamba and Mamba-2. Raises TypeError
    for another layer, and ValueError for unknown parts and for more than one step per token.
    Source: Trockman, Harutyunyan, Kolter, Kumar and Bhojanapalli (2024), for Mamba; the carrying over is ours.

        >>> layer = mimetic_(DeltaNet(width=8, heads=2))
        >>> torch.allclose(layer.query.weight.T @ layer.key.weight, torch.eye(8), atol=1e-6)
        True
    """
    if not isinstance(mixer, MIMETIC):
        raise TypeError(f"mixer must be a recurrent layer that can be set, got {type(mixer).__name__}")
    unknown = [part for part in parts if part not in PARTS]
    if isinstance(parts, str) or unknown:
        raise ValueError(f"parts must be some of {', '.join(PARTS)}, got {parts!r}")
    if isinstance(mixer, RecurrentMixer) and mixer.steps > 1:
        raise ValueError(f"mixer must take one step per token, got {mixer.steps}")
    if "keys" in parts:
        query, key = _query_and_key(mixer)
        key.copy_(_orthonormal_(query))
    if "values" in parts:
        value, output = _value_and_output(mixer)
        output.copy_(_orthonormal_(value).T)
    if "convolutions" in parts:
        for module in mixer.modules():
            if isinstance(module, ShortConvolution):
                module.weight.zero_()[-1] = 1
                if module.bias is not None:
                    module.bias.zero_()
    if "gates" in parts:
        _open_gates(mixer)
    return mixer


def _orthonormal_(weight: Tensor) -> Tensor:
    """Fill `weight` so that its rows are orthonormal, or its columns where it is higher than wide; returns it."""
    weight.copy_(nn.init.orthogonal_(torch.empty_like(weight, dtype=torch.float32)))
    return weight


def _query_and_key(mixer: Mixer) -> tuple[Tensor, Tensor]:
    """The weights, as views that can be written to."""
    if isinstance(mixer, Mamba):
        B, C = mixer.select.weight.split([mixer.rank, mixer.state_size, mixer.state_size])[1:]
        return C, B
    if isinstance(mixer, Mamba2):
        _, _, B, C, _ = _mamba2_parts(mixer)
        return C, B
    assert isinstance(mixer, RecurrentMixer)
    return mixer.get_parameter("query.weight"), mixer.get_parameter("key.weight")


def _value_and_output(mixer: Mixer) -> tuple[Tensor, Tensor]:
    if isinstance(mixer, Mamba):
        return mixer.input.weight[: mixer.channels], mixer.output.weight
    if isinstance(mixer, Mamba2):
        return _mamba2_parts(mixer)[1], mixer.output.weight
    assert isinstance(mixer, RecurrentMixer)
    return mixer.get_parameter("value.weight"), mixer.output.weight


def _mamba2_parts(mixer: Mamba2) -> tuple[Tensor, ...]:
    """The rows of its one input map that make z, x, B, C and the step."""
    sizes = [mixer.channels, mixer.channels, mixer.state_size, mixer.state_size, mixer.heads]
    return tuple(mixer.input.weight.split(sizes))


def _open_gates(mixer: Mixer) -> None:
    if isinstance(mixer, GatedLinearAttention):
        mixer.get_parameter("decay.1.weight").zero_()
        mixer.get_parameter("decay.1.bias").fill_(OPEN_GATE)
    elif isinstance(mixer, Mamba):
        mixer.log_A.fill_(LOG_RATE)
        mixer.delta.weight.zero_()
        mixer.delta.bias.fill_(STEP_BIAS)
    elif isinstance(mixer, (GatedDeltaNet, KimiDeltaAttention, Mamba2)):
        mixer.log_rates.fill_(LOG_RATE)
        mixer.step_biases.fill_(STEP_BIAS)
        if isinstance(mixer, GatedDeltaNet):
            mixer.step.weight.zero_()
        elif isinstance(mixer, KimiDeltaAttention):
            mixer.get_parameter("step.1.weight").zero_()
        else:
            _mamba2_parts(mixer)[4].zero_()
