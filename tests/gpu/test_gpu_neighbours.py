"""Our KDA, Mixture of Memories and Lightning against fla's, with the same weights, on a GPU.  `make gpu` runs it."""

from __future__ import annotations

import pytest
import torch

import dn_lib
from dn_lib.layers import KimiDeltaAttention, MixtureOfMemories, decay_slopes
from dn_lib.testing import offsets, relative_error

pytestmark = pytest.mark.gpu

# fla's float32 kernels multiply in TF32, of which a number keeps ten bits (1e-3); a few of them one after the other.
TF32 = 5e-3


def copied(theirs, ours):
    """Load {our name: their weight}; a convolution's is transposed."""
    own = {n: w.permute(2, 1, 0) if n.endswith("conv.weight") else w for n, w in theirs.items()}
    ours.load_state_dict({name: weight.reshape(ours.state_dict()[name].shape) for name, weight in own.items()})


SHARED = {
    "query.weight": "q_proj.weight",
    "query_conv.weight": "q_conv1d.weight",
    "key_conv.weight": "k_conv1d.weight",
    "value_conv.weight": "v_conv1d.weight",
    "log_rates": "A_log",
    "step_biases": "dt_bias",
    "norm.weight": "o_norm.weight",
    "output.weight": "o_proj.weight",
}


def test_kda_agrees_with_flas_layer():
    layers = pytest.importorskip("fla.layers", reason="fla is not installed")
    torch.manual_seed(0)
    theirs = layers.KimiDeltaAttention(64, head_dim=32, num_heads=2, layer_idx=0).cuda().eval()
    ours = KimiDeltaAttention(64, 2, 32).cuda()
    names = SHARED | {"key.weight": "k_proj.weight", "value.weight": "v_proj.weight", "beta.weight": "b_proj.weight"}
    for our_name, their_name in (("step", "f_proj"), ("sigmoid_gate", "g_proj")):
        names |= {f"{our_name}.{n}.weight": f"{their_name}.{n}.weight" for n in (0, 1)}
    names["sigmoid_gate.1.bias"] = "g_proj.1.bias"
    weights = theirs.state_dict()
    copied({name: weights[their_name] for name, their_name in names.items()}, ours)
    for length in (40, 200):  # their recurrent kernel and their chunks
        x = torch.randn(2, length, 64, device="cuda")
        with torch.no_grad():
            assert relative_error(ours(x), theirs(x)[0].double()) < TF32
    x, cu_seqlens = torch.randn(1, 200, 64, device="cuda"), offsets([70, 1, 129]).cuda()
    with torch.no_grad():
        assert relative_error(ours(x, cu_seqlens=cu_seqlens), theirs(x, cu_seqlens=cu_seqlens)[0].double()) < TF32


def test_mixture_of_memories_agrees_with_flas_layer():
    """In evaluation: their training lets a convolution see the memory that is sorted before."""
    mom = pytest.importorskip("fla.layers.mom", reason="fla is not installed")
    torch.manual_seed(1)
    theirs = mom.MomAttention(64, head_dim=32, num_heads=2, num_memories=4, topk=2, shared_mem=True, layer_idx=0)
    theirs, ours = theirs.cuda().eval(), MixtureOfMemories(64, 2, 32).cuda()
    weights = theirs.state_dict()
    chosen = {name: weights[their_name] for name, their_name in SHARED.items()}
    chosen |= {"router.weight": weights["gate.weight"], "gate.weight": weights["g_proj.weight"]}
    for name, letter in (("key", "k"), ("value", "v"), ("beta", "b"), ("step", "a")):
        parts = [weights[f"{letter}_proj.{m}.weight"] for m in range(4)] + [weights[f"shared_{letter}.weight"]]
        chosen[f"{name}.weight"] = torch.cat(parts)
    copied(chosen, ours)
    for length in (40, 200):
        x = torch.randn(2, length, 64, device="cuda")
        with torch.no_grad():
            assert relative_error(ours(x), theirs(x)[0].double()) < TF32


def test_lightning_attention_agrees_with_flas_operator():
    """Their decays are TransNormer's table with its factor for the layer's depth."""
    lightning = pytest.importorskip("fla.ops.lightning_attn", reason="fla is not installed")
    torch.manual_seed(2)
    q, k, v = torch.randn(3, 2, 150, 4, 32, device="cuda").unbind(0)
    theirs, _ = lightning.chunk_lightning_attn(q, k, v, layer_idx=3, num_layers=12)
    g = -decay_slopes(4, "transnormer", depth=3 / 12).float().cuda()
    assert relative_error(dn_lib.linear_attention(q, k, v, g)[0], theirs.double()) < TF32
