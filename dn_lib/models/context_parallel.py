"""A language model on a sequence that several processes share: context parallelism for the whole hybrid.

Process r holds the r-th stretch of the tokens and all parameters.  Embedding, norms, feed-forward layers and the head
work on each token alone.  What is left are the mixers, and three things that they need from other processes:

- a short convolution, the taps - 1 tokens before the stretch: the layer's input there is fetched, and goes through the
  same projections;
- a recurrence, the state that enters, by one exchange of affine maps (`dn_lib.parallel.rules`);
- attention, the keys and values of the tokens before: all of them, or a window's.

Then each process has the loss of its own tokens, whose labels at the right border belong to the next stretch, and
the gradients of all parameters are sums over the processes.

    stretches = Stretches.of(tokens.shape[1])
    loss = context_parallel_loss(model, tokens, stretches)
    loss.backward()
    sum_gradients(model, stretches)
    optimiser.step()

The same code runs over gloo on CPUs and over NCCL on GPUs.
Sources: Sun et al. (2025), LASP-2 and LASP-2H, for linear attention and its hybrids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from dn_lib.forms.common import describe, working_dtype
from dn_lib.layers.attention import Attention, full_attention, window_attention
from dn_lib.layers.common import QK_NORMS, l1_norm, split_heads
from dn_lib.layers.decay import log_gates
from dn_lib.layers.delta_net import DeltaNet
from dn_lib.layers.gated_delta_net import GatedDeltaNet
from dn_lib.layers.gla import GatedLinearAttention
from dn_lib.layers.kda import KimiDeltaAttention
from dn_lib.layers.liger import TEMPERATURE, Liger
from dn_lib.layers.lightning import LightningAttention, decay_slopes
from dn_lib.layers.linear_attention import LinearAttention
from dn_lib.layers.mamba2 import Mamba2
from dn_lib.layers.registry import Mixer
from dn_lib.layers.retnet import RetNet
from dn_lib.layers.rotary import rotary_embedding
from dn_lib.models.config import ModelConfig
from dn_lib.models.language_model import Block, LanguageModel
from dn_lib.ops.gated import retention_gates
from dn_lib.parallel.rules import stretched_rule
from dn_lib.parallel.stretches import Stretches, check_stretches, earlier, next_token

IGNORED = -100  # the label of a token whose loss does not count


# The mixers ---------------------------------------------------------------------------------------------
def _with_halo(convolution: Any, x: Tensor, stretches: Stretches) -> tuple[Tensor, int]:
    """x with the tokens before it that a `ShortConvolution` (or None) reads, and their number."""
    if convolution is None:
        return x, 0
    halo = earlier(x, convolution.weight.shape[0] - 1, stretches, "halo")
    return torch.cat([halo, x], dim=1), halo.shape[1]


def _delta(mixer: DeltaNet, x: Tensor, stretches: Stretches) -> Tensor:
    wide, halo = _with_halo(mixer.key_conv, x, stretches)
    # The first rows, whose convolutions lack tokens themselves, are dropped: they belong to the process before.
    q, k, v = (t[:, halo * mixer.steps :] for t in mixer._query_key_value(wide, None))
    beta = mixer._split_steps(mixer.beta(x)).squeeze(-1)
    beta = mixer.beta_range * beta.to(working_dtype(beta)).sigmoid()
    if mixer.qk_norm == "l1":
        q, k = l1_norm(q), l1_norm(k)
    options: dict[str, Any] = {"qk_l2norm": mixer.qk_norm == "l2", "backend": mixer.backend}
    o, _ = stretched_rule(q, k, v, beta, stretches=stretches, **options)
    return mixer._finish(o[:, mixer.steps - 1 :: mixer.steps], x)


def _linear(mixer: LinearAttention, x: Tensor, stretches: Stretches) -> Tensor:
    wide, halo = _with_halo(mixer.key_conv, x, stretches)
    q, k, v = (t[:, halo * mixer.steps :] for t in mixer._query_key_value(wide, None))
    q, k = QK_NORMS[mixer.qk_norm](q), QK_NORMS[mixer.qk_norm](k)
    o, _ = stretched_rule(q, k, v, stretches=stretches, backend=mixer.backend)
    return mixer._finish(o[:, mixer.steps - 1 :: mixer.steps], x)


def _retention(mixer: RetNet, x: Tensor, stretches: Stretches) -> Tensor:
    wide, halo = _with_halo(mixer.key_conv, x, stretches)
    q, k, v = (t[:, halo:] for t in mixer._heads_of(wide, None, None))
    q, k = (rotary_embedding(t, stretches.start, mixer.rope_base) for t in (q, k))
    g = retention_gates(mixer.heads, x.device, working_dtype(x))
    return mixer._finish(stretched_rule(q, k, v, g=g, stretches=stretches, backend=mixer.backend)[0], x)


def _gla(mixer: GatedLinearAttention, x: Tensor, stretches: Stretches) -> Tensor:
    wide, halo = _with_halo(mixer.key_conv, x, stretches)
    q, k, v = (t[:, halo:] for t in mixer._heads_of(wide, None, None))
    z = split_heads(mixer.decay(x), mixer.heads)
    g = F.logsigmoid(z.to(working_dtype(z))) / 16
    return mixer._finish(stretched_rule(q, k, v, g=g, stretches=stretches, backend=mixer.backend)[0], x)


def _gated_delta(mixer: GatedDeltaNet, x: Tensor, stretches: Stretches) -> Tensor:
    wide, halo = _with_halo(mixer.key_conv, x, stretches)
    q, k, v = (F.silu(t)[:, halo:] for t in mixer._heads_of(wide, None, None))
    beta = mixer.beta(x)
    beta = mixer.beta_range * beta.to(working_dtype(beta)).sigmoid()
    _, g = log_gates(mixer.step(x), mixer.log_rates, mixer.step_biases)
    o, _ = stretched_rule(q, k, v, beta, g, stretches=stretches, qk_l2norm=True, backend=mixer.backend)
    return mixer._finish(o, x)


def _kda(mixer: KimiDeltaAttention, x: Tensor, stretches: Stretches) -> Tensor:
    wide, halo = _with_halo(mixer.key_conv, x, stretches)
    q, k, v = (F.silu(t)[:, halo:] for t in mixer._heads_of(wide, None, None))
    beta = mixer.beta(x)
    beta = mixer.beta_range * beta.to(working_dtype(beta)).sigmoid()
    step, biases = split_heads(mixer.step(x), mixer.heads), split_heads(mixer.step_biases, mixer.heads)
    _, g = log_gates(step, mixer.log_rates[:, None], biases)
    o, _ = stretched_rule(q, k, v, beta, g, stretches=stretches, qk_l2norm=True, backend=mixer.backend)
    o = mixer.norm(o.to(mixer.norm.weight.dtype)).to(x.dtype)
    return mixer.output(o.flatten(-2) * mixer.sigmoid_gate(x).sigmoid())


def _lightning(mixer: LightningAttention, x: Tensor, stretches: Stretches) -> Tensor:
    wide, halo = _with_halo(mixer.key_conv, x, stretches)
    q, k, v = (t[:, halo:] for t in mixer._heads_of(wide, None, None))
    g = -decay_slopes(mixer.heads, mixer.decay, mixer.depth).to(x.device, working_dtype(x))
    o, _ = stretched_rule(F.silu(q), F.silu(k), v, g=g, stretches=stretches, backend=mixer.backend)
    o = mixer.norm(o.flatten(-2).to(mixer.norm.weight.dtype)).to(x.dtype)
    return mixer.output(o * mixer.linear_gate(x))


def _mamba2(mixer: Mamba2, x: Tensor, stretches: Stretches) -> Tensor:
    wide, halo = _with_halo(mixer.conv, x, stretches)
    mixed = mixer.channels + 2 * mixer.state_size
    z, mixed, step = mixer.input(wide).split([mixer.channels, mixed, mixer.heads], dim=-1)
    z, mixed, step = z[:, halo:], F.silu(mixed if mixer.conv is None else mixer.conv(mixed))[:, halo:], step[:, halo:]
    x, B, C = mixed.split([mixer.channels, mixer.state_size, mixer.state_size], dim=-1)
    x, B, C = split_heads(x, mixer.heads), B.unsqueeze(2), C.unsqueeze(2)
    step, g = log_gates(step, mixer.log_rates, mixer.step_biases)
    v = (step[..., None] * x).to(x.dtype)
    y, _ = stretched_rule(C, B, v, g=g, stretches=stretches, scale=1.0, backend=mixer.backend)
    y = (y + mixer.D.to(x.dtype)[:, None] * x).flatten(-2) * F.silu(z)
    return mixer.output(mixer.norm(y))


def _attention(mixer: Attention, x: Tensor, stretches: Stretches) -> Tensor:
    q, k, v = (split_heads(layer(x), mixer.heads) for layer in (mixer.query, mixer.key, mixer.value))
    q, k = (rotary_embedding(t, stretches.start, mixer.rope_base) for t in (q, k))
    both = torch.cat([k, v], dim=2)
    rows = stretches.total if mixer.window is None else mixer.window - 1
    past = earlier(both, rows, stretches, "keys and values")
    k, v = torch.cat([past, both], dim=1).transpose(1, 2).chunk(2, dim=1)
    q = q.transpose(1, 2)
    if mixer.window is not None:
        o = window_attention(q, k, v, mixer.window)
    elif past.shape[1] == 0:
        o = full_attention(q, k, v)
    else:
        # A mask that is known by its shape: on a GPU, FlashAttention takes it without writing it out.
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(q.shape[2], k.shape[2]))
    return mixer.output(o.transpose(1, 2).flatten(-2))


def _liger(mixer: Liger, x: Tensor, stretches: Stretches) -> Tensor:
    attention = _attention(mixer, x, stretches)
    q, k, v = (split_heads(layer(x), mixer.heads) for layer in (mixer.query, mixer.key, mixer.value))
    wide = working_dtype(x)
    g = F.logsigmoid(k.to(wide)) / TEMPERATURE
    q, k = (t.to(wide).softmax(-1).to(v.dtype) for t in (q, k))
    o, _ = stretched_rule(q, k, v, g=g, stretches=stretches, scale=1.0, backend=mixer.backend)
    return mixer.share * mixer.output(o.flatten(-2)) + (1 - mixer.share) * attention


_MIXERS: dict[type[Mixer], Callable[[Any, Tensor, Stretches], Tensor]] = {
    DeltaNet: _delta,
    LinearAttention: _linear,
    RetNet: _retention,
    GatedLinearAttention: _gla,
    GatedDeltaNet: _gated_delta,
    KimiDeltaAttention: _kda,
    LightningAttention: _lightning,
    Mamba2: _mamba2,
    Attention: _attention,
    Liger: _liger,
}
# Not among them: "mamba", whose decay is a factor of its own for each entry of the state, which none of the exchange's
# three forms of a map holds; and "mom", whose memories each have a sequence of their own, with stretches and a
# convolution's halo that only the router knows.


# The model ----------------------------------------------------------------------------------------------
def _blocks(model: LanguageModel) -> list[Block]:
    return cast(list[Block], list(model.blocks))


def _check(model: Any, tokens: Any, stretches: Any) -> None:
    check_stretches(stretches)
    if not isinstance(model, LanguageModel):
        raise TypeError(f"model must be a LanguageModel, not wrapped or compiled, got {describe(model)}")
    for i, block in enumerate(_blocks(model)):
        if type(block.mixer) not in _MIXERS:
            known = ", ".join(kind.__name__ for kind in _MIXERS)
            raise ValueError(f"model must have layers of {known}, got {type(block.mixer).__name__} in layer {i + 1}")
    stretches.check_rows("tokens", tokens)
    if tokens.ndim != 2 or tokens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"tokens must be int32 or int64 [B, L_r], got {tokens.dtype} {list(tokens.shape)}")


def context_parallel_features(model: LanguageModel, tokens: Tensor, stretches: Stretches) -> Tensor:
    """`model.features` of this process's stretch, as if the model had seen the whole sequence.

    tokens: `[B, L_r]` integers, L_r = `stretches.length`; the same B on every process.  Returns `[B, L_r, width]`.
    Every process must call it, and then backward if one does.  Differentiable once.
    Layers: delta, linear, retnet, lightning, gla, gated_delta, kda, mamba2, attention, window, liger.  Raises
    ValueError for others (mamba, mom), and ValueError or TypeError, naming the argument, for what does not fit.

    >>> import torch.distributed as dist
    >>> from dn_lib.models import ModelConfig
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> model, tokens = LanguageModel(ModelConfig(width=32, layers=1, heads=2)), torch.zeros(1, 5, dtype=torch.long)
    >>> same = context_parallel_features(model, tokens, Stretches.of(5))
    >>> torch.allclose(same, model.features(tokens), atol=1e-5)
    True
    >>> dist.destroy_process_group()
    """
    _check(model, tokens, stretches)
    x = model.embedding(tokens)
    for block in _blocks(model):
        x = x + _MIXERS[type(block.mixer)](block.mixer, block.mixer_norm(x), stretches)
        if block.mlp is not None and block.mlp_norm is not None:
            x = x + block.mlp(block.mlp_norm(x))
    return model.norm(x)


def context_parallel_loss(
    model: LanguageModel, tokens: Tensor, stretches: Stretches, labels: Tensor | None = None
) -> Tensor:
    """The mean cross-entropy of the next token over the whole sequence; its gradient is this process's share.

    tokens `[B, L_r]`.  labels `[B, L_r]`, the token after each, -100 where it does not count; None takes them from the
    tokens, over the borders of stretches, and the last token of the sequence has none.
    Every process gets the same value.  The gradients that backward leaves are to be added up (`sum_gradients`): that
    of the mean over all tokens is the sum of what each process's tokens give.
    Raises errors as `context_parallel_features`, and ValueError if no label counts.
    """
    _check(model, tokens, stretches)
    if labels is None:
        labels = next_token(tokens, stretches, IGNORED)
    elif not isinstance(labels, Tensor) or labels.shape != tokens.shape or labels.is_floating_point():
        raise ValueError(f"labels must be whole numbers {list(tokens.shape)} like tokens, got {describe(labels)}")
    logits = model.logits(context_parallel_features(model, tokens, stretches))
    wide = logits.to(working_dtype(logits)).flatten(0, 1)
    own = F.cross_entropy(wide, labels.reshape(-1).long(), ignore_index=IGNORED, reduction="sum")
    counted = (labels != IGNORED).sum()
    whole = stretches.total_of(torch.stack([own.detach().double(), counted.double()]), "loss")
    if whole[1] == 0:
        raise ValueError("labels must have at least one token whose loss counts, got none")
    share = own / whole[1].to(own.dtype)
    return share + ((whole[0] / whole[1]).to(own.dtype) - share.detach())


def sum_gradients(model: nn.Module, stretches: Stretches) -> None:
    """Add up the gradients of all parameters over the processes, in place: one all-reduce for each dtype.

    To be called after backward, by every process, with gradients of the same parameters.  Raises TypeError.
    """
    check_stretches(stretches)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {describe(model)}")
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    for dtype in dict.fromkeys(g.dtype for g in grads):
        some = [g for g in grads if g.dtype == dtype]
        flat = stretches.total_of(torch.cat([g.flatten() for g in some]), "gradients")
        for g, part in zip(some, flat.split([g.numel() for g in some]), strict=True):
            g.copy_(part.view_as(g))


def shared_step(job: dict[str, Any]) -> dict[str, Any]:
    """What each process does in the study: take its stretch, one step of training, return loss, gradients and bytes.

    job: `config`, the fields of a `ModelConfig`; `weights`, a state_dict; `tokens` `[B, L]`, the whole sequence;
    `lengths` of the stretches.  To be run by `dn_lib.parallel.affine.run_on_processes`.
    Returns `loss`, the same on every process; `grads`, by parameter and added up over the processes; `received`, the
    bytes that this process got, by name.
    """
    model = LanguageModel(ModelConfig.from_dict(job["config"])).to(next(iter(job["weights"].values())).dtype)
    model.load_state_dict(job["weights"])
    stretches = Stretches(job["lengths"])
    loss = context_parallel_loss(model, stretches.mine(job["tokens"]), stretches)
    loss.backward()
    sum_gradients(model, stretches)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "grads": grads, "received": dict(stretches.received)}
