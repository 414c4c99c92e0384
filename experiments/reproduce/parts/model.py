"""A model for a task, and many such models as one.

Models of one shape that differ in their weights alone are trained side by side.  `stack` makes one module of R of them:
their sequences follow one another along the batch, `[R B, L, ...]`, and every layer with weights takes the weights of
the run that a sequence belongs to.  What has no weights (the delta rule itself, convolutions of attention scores, norms
of q and k) treats the sequences of a batch alike, so it is called once for all runs, by the layers of `dn_lib`
themselves: nothing of a mixer is written a second time here.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dn_lib.forms.common import working_dtype
from dn_lib.layers import GatedDeltaNet, RMSNorm, ShortConvolution
from dn_lib.models import LanguageModel, ModelConfig


class TaskModel(nn.Module):
    """A language model that is asked at some positions, or once for a whole sequence.

    `model(tokens [B, L], at [B, K])` gives logits `[B, K, vocab]` for what to answer at the positions `at`.
    With `decoded` > 0 at is `[B, 1]`: the vector there, plus a sinusoidal code of the place, goes through two layers
    for each of the `decoded` tokens that it has to yield, `[B, decoded, vocab]`.
    """

    def __init__(self, config: ModelConfig, decoded: int = 0, init: float = 0.02):
        super().__init__()
        # Without a head of its own where it is not asked: every weight has a part in the loss.
        self.language_model = LanguageModel(replace(config, tie_embeddings=True) if decoded else config)
        self.language_model.reset_parameters(init)
        self.decoder = None
        if decoded:
            width = config.width
            self.register_buffer("places", sinusoids(decoded, width))
            layers = nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, config.vocab_size)
            for layer in (layers[0], layers[2]):
                nn.init.normal_(layer.weight, std=init)
                nn.init.zeros_(layer.bias)
            self.decoder = nn.Sequential(*layers)

    def forward(self, tokens: Tensor, at: Tensor) -> Tensor:
        features = self.language_model.features(tokens)
        rows = features.gather(1, at[..., None].expand(-1, -1, features.shape[-1]))
        if self.decoder is not None:
            return self.decoder(rows + self.get_buffer("places").to(rows.dtype))
        if self.language_model.head is not None:
            return self.language_model.head(rows)
        return scores(rows, self.language_model.embedding.weight)


def sinusoids(length: int, width: int) -> Tensor:
    """A code of each place, `[length, width]`: sines and cosines of the place at falling frequencies.

    >>> sinusoids(2, 4)[0].tolist()
    [0.0, 0.0, 1.0, 1.0]
    """
    frequency = 10000.0 ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(length)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :width]


def scores(rows: Tensor, table: Tensor) -> Tensor:
    """Products with the rows of an embedding, `[vocab, width]` or, stacked, `[R, vocab, width]`."""
    return F.linear(rows, table) if table.ndim == 2 else of_runs(rows, table)


def of_runs(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x `[R B, ..., in]` times the transposed weight of its run `[R, out, in]`, plus its bias `[R, out]`."""
    rows = x.reshape(len(weight), -1, x.shape[-1])
    y = torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias[:, None], rows, weight.mT)
    return y.view(*x.shape[:-1], weight.shape[1])


# --- Layers with the weights of several runs ----------------------------------------------------------------------


class StackedLinear(nn.Module):
    """`nn.Linear` with weight `[R, out, in]`: x `[R B, ..., in]` -> `[R B, ..., out]`."""

    def __init__(self, layers: Sequence[nn.Linear]):
        super().__init__()
        self.weight = _parameter([layer.weight for layer in layers])
        self.bias = None if layers[0].bias is None else _parameter([layer.bias for layer in layers])
        self.in_features, self.out_features = layers[0].in_features, layers[0].out_features

    def forward(self, x: Tensor) -> Tensor:
        return of_runs(x, self.weight, self.bias)


class StackedEmbedding(nn.Module):
    """`nn.Embedding` with weight `[R, vocab, width]`: tokens `[R B, L]` -> `[R B, L, width]`."""

    def __init__(self, layers: Sequence[nn.Embedding]):
        super().__init__()
        self.weight = _parameter([layer.weight for layer in layers])

    def forward(self, tokens: Tensor) -> Tensor:
        runs, vocab, width = self.weight.shape
        first = vocab * torch.arange(runs, device=tokens.device)
        own = tokens.unflatten(0, (runs, -1)) + first[:, None, None]
        return F.embedding(own.flatten(0, 1), self.weight.reshape(runs * vocab, width))


class StackedNorm(nn.Module):
    """`RMSNorm` with weight `[R, d]`: x `[R B, ..., d]` -> the same, in x's dtype."""

    def __init__(self, layers: Sequence[RMSNorm]):
        super().__init__()
        self.weight, self.eps = _parameter([layer.weight for layer in layers]), layers[0].eps

    def forward(self, x: Tensor) -> Tensor:
        runs, d = self.weight.shape
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        y = F.rms_norm(x.to(wide), (d,), None, self.eps).unflatten(0, (runs, -1))
        weight = self.weight.to(wide).view(runs, *[1] * (x.ndim - 1), d)
        return (y * weight).flatten(0, 1).to(x.dtype)


class StackedConvolution(nn.Module):
    """`ShortConvolution` with weight `[R, size, 1, channels]`: x `[R B, L, channels]` -> the same."""

    def __init__(self, layers: Sequence[ShortConvolution]):
        super().__init__()
        if layers[0].bias is not None:
            raise TypeError("a short convolution with a bias cannot be stacked")
        self.weight = _parameter([layer.weight for layer in layers])

    def forward(self, x: Tensor, cache: None = None, name: str = "conv", *, cu_seqlens: None = None) -> Tensor:
        if cache is not None or cu_seqlens is not None:
            raise TypeError("stacked models take whole sequences: no cache and no cu_seqlens")
        size, length, dtype = self.weight.shape[1], x.shape[1], working_dtype(x)
        weight = self.weight.to(dtype)[:, None]  # [R, 1, size, 1, channels]
        padded = F.pad(x.to(dtype), (0, 0, size - 1, 0)).unflatten(0, (len(weight), -1))
        taps = [padded[:, :, tap : tap + length] * weight[:, :, tap] for tap in range(size)]
        y = taps[0]
        for product in taps[1:]:
            y = y + product
        return y.flatten(0, 1).to(x.dtype)


STACKED = {
    nn.Linear: StackedLinear,
    nn.Embedding: StackedEmbedding,
    RMSNorm: StackedNorm,
    ShortConvolution: StackedConvolution,
}
# Parameters that a mixer itself holds and that, with a leading axis for the sequences and one for time, broadcast as
# they should.
OF_THE_MIXER: dict[type[nn.Module], tuple[str, ...]] = {GatedDeltaNet: ("log_rates", "step_biases")}


def stack(models: Sequence[TaskModel]) -> TaskModel:
    """One module that computes what each of `models` would, on sequences `[R B, L]` in their order.

    All must have one shape.  The weights are copies, with a first axis R.  Raises TypeError for a layer with
    parameters that has no stacked form.
    """
    whole = copy.deepcopy(models[0])
    for path, module in list(whole.named_modules()):
        peers = [model.get_submodule(path) for model in models]
        for name, child in list(module.named_children()):
            if type(child) in STACKED:
                module.register_module(name, STACKED[type(child)]([peer.get_submodule(name) for peer in peers]))
        names = [name for name, _ in module.named_parameters(recurse=False)]
        if type(module) in STACKED or not names:
            continue
        if tuple(names) != OF_THE_MIXER.get(type(module)):
            raise TypeError(f"{type(module).__name__} has parameters of its own and no stacked form")
        for name in names:
            del module._parameters[name]
            module.register_parameter(f"{name}_of_runs", _parameter([getattr(peer, name) for peer in peers]))
            module.register_forward_pre_hook(partial(_hand_out, name))
    return whole


def _hand_out(name: str, module: nn.Module, inputs: tuple) -> None:
    """Before a mixer is called with x `[R B, L, width]`: its parameter `[R, H]` as `[R B, 1, H]`."""
    values = getattr(module, f"{name}_of_runs")
    vars(module)[name] = values.repeat_interleave(inputs[0].shape[0] // len(values), dim=0)[:, None]


def _parameter(values: Sequence[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack([value.detach() for value in values]))


def weights_of(stacked: TaskModel, run: int) -> dict[str, Tensor]:
    """The weights of one run by the names that they have in a model of its own."""
    named = stacked.named_parameters()
    return {name.removesuffix("_of_runs"): value.detach()[run] for name, value in named}
