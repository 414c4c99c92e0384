"""The language model: embeddings, blocks of a mixer and a feed-forward layer, and the prediction of the next token."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dn_lib.forms.common import check_integer
from dn_lib.forms.derivatives import active_transform
from dn_lib.layers.cache import LayerCache
from dn_lib.layers.common import RMSNorm
from dn_lib.layers.documents import Documents
from dn_lib.layers.mimetic import MIMETIC, mimetic_
from dn_lib.layers.registry import Mixer, mixer_kind
from dn_lib.layers.short_convolution import ShortConvolution
from dn_lib.layers.swiglu import SwiGLU
from dn_lib.models.cache import Cache
from dn_lib.models.config import ModelConfig, check_config
from dn_lib.ops.checks import checking


def build_mixer(name: str, config: ModelConfig) -> Mixer:
    """The layer that `name`, one of the registered mixers, means under `config`.

    >>> type(build_mixer("gla", ModelConfig())).__name__
    'GatedLinearAttention'
    """
    check_config(config)
    return mixer_kind(name).build(config)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)): `[B, L, width]` -> the same."""

    def __init__(self, name: str, config: ModelConfig):
        super().__init__()
        hidden = config.mlp_width()
        self.mixer_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.mixer = build_mixer(name, config)
        self.mlp_norm = RMSNorm(config.width, eps=config.norm_eps) if hidden else None
        self.mlp = SwiGLU(config.width, hidden) if hidden else None

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, *, cu_seqlens: Tensor | Documents | None = None
    ) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x), cache, cu_seqlens=cu_seqlens)
        return x if self.mlp is None or self.mlp_norm is None else x + self.mlp(self.mlp_norm(x))


def check_in_vocabulary(name: str, tokens: Tensor, size: int) -> None:
    """Raise ValueError unless all tokens are from 0 to size - 1. Reads them: on a GPU that waits.

    >>> check_in_vocabulary("tokens", torch.tensor([[3, 300]]), 256)
    Traceback (most recent call last):
    ValueError: tokens must hold tokens from 0 to 255, got 3 to 300
    """
    low, high = (t.item() for t in tokens.aminmax())
    if low < 0 or high >= size:
        raise ValueError(f"{name} must hold tokens from 0 to {size - 1}, got {low} to {high}")


class LanguageModel(nn.Module):
    """Embedding, `config.layers` pre-norm blocks, a last RMSNorm and a linear head over the vocabulary.

    Linear weights and the embedding start as N(0, 0.02^2), the projections that write into the residual
    stream divided by sqrt(2 layers). With `config.initialisation` "mimetic", the recurrent layers then start as
    `dn_lib.layers.mimetic_` sets them.

        >>> model = LanguageModel(ModelConfig(width=32, layers=2, heads=2))
        >>> model(torch.zeros(3, 7, dtype=torch.long)).shape
        torch.Size([3, 7, 256])
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        check_config(config)
        self.config = config
        self._tokens_were_read = False
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        blocks = [Block(name, config) for name in config.mixers()]
        for i, block in enumerate(blocks):
            block.mixer.place(i, config.layers)
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        tied = config.tie_embeddings
        self.head = None if tied else nn.Linear(config.width, config.vocab_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the linear and embedding weights anew; other parameters keep their layer's own start."""
        residual = std / math.sqrt(2 * self.config.layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=residual if name.endswith(".output") else std)
        for module in self.modules():
            if isinstance(module, Mixer):
                module.reset_own_parameters()
                if self.config.initialisation == "mimetic" and isinstance(module, MIMETIC):
                    mimetic_(module)

    def features(self, tokens: Tensor, cache: Cache | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """As `forward`, without the head: what it reads, `[B, L, width]`."""
        if not isinstance(tokens, Tensor) or tokens.dim() != 2:
            got = f"shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(f"tokens must be [B, L], got {got}")
        self._check_tokens(tokens)
        documents = None if cu_seqlens is None else Documents(cu_seqlens, tokens)
        if cache is not None:
            self._check_cache(tokens, cache, documents)
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache.layers[i], cu_seqlens=documents)
        if cache is not None:
            cache.length += tokens.shape[1] if documents is None else documents.longest()
        return self.norm(x)

    def _check_tokens(self, tokens: Tensor) -> None:
        """Raise unless tokens are whole numbers of the vocabulary.

        On a GPU reading them waits for all that was launched, so there they are read in a model's first call, and in
        each inside `dn_lib.checked()`. What is let through ends in the GPU's own assertion, which names no argument.
        """
        if tokens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"tokens must be int32 or int64, got {tokens.dtype}")
        unreadable = torch.compiler.is_compiling() or tokens.device.type == "meta" or active_transform(tokens)
        if unreadable or tokens.numel() == 0:
            return
        if tokens.device.type == "cpu" or not self._tokens_were_read or checking.get():
            check_in_vocabulary("tokens", tokens, self.config.vocab_size)
            self._tokens_were_read = True

    def _check_cache(self, tokens: Tensor, cache: Cache, documents: Documents | None) -> None:
        if not isinstance(cache, Cache) or len(cache.layers) != len(self.blocks):
            got = f"one of {len(cache.layers)} layers" if isinstance(cache, Cache) else type(cache).__name__
            raise ValueError(f"cache must come from this model's new_cache ({len(self.blocks)} layers), got {got}")
        if documents is None and tokens.shape[0] != cache.batch_size:
            raise ValueError(
                f"tokens must have the cache's batch size {cache.batch_size}, got shape {tuple(tokens.shape)}"
            )
        if documents is not None and cache.length:
            raise ValueError(f"cache must be empty with cu_seqlens, got one that holds {cache.length} tokens")
        if documents is not None and len(documents) != cache.batch_size:
            raise ValueError(
                f"cu_seqlens must have {cache.batch_size} + 1 offsets to match the cache's batch size, "
                f"got {len(documents)} + 1"
            )

    def logits(self, features: Tensor) -> Tensor:
        """`[..., width]` -> `[..., vocab_size]`."""
        return F.linear(features, self.embedding.weight if self.head is None else self.head.weight)

    def forward(self, tokens: Tensor, cache: Cache | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Tokens `[B, L]` (integers) -> logits `[B, L, vocab_size]` of the token after each.

        With a `cache` (from `new_cache`, updated in place) the tokens continue those of earlier calls.

        `cu_seqlens`, int32 or int64 `[N + 1]`, rises from 0 to L: B is 1, and the row holds N documents of which
        none sees another. With an empty cache for N sequences, the documents become those sequences, and later
        calls, with tokens `[N, L]`, continue them. Raises ValueError, naming the argument, for what does not fit.

            >>> model = LanguageModel(ModelConfig(width=32, layers=2, heads=2))
            >>> a, b = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)
            >>> packed = model(torch.cat([a, b], dim=1), cu_seqlens=torch.tensor([0, 3, 7]))
            >>> torch.allclose(packed[:, 3:], model(b), atol=1e-5)
            True
        """
        return self.logits(self.features(tokens, cache, cu_seqlens=cu_seqlens))

    def new_cache(self, batch_size: int) -> Cache:
        """An empty cache for `batch_size` sequences."""
        check_integer("batch_size", batch_size, least=0)
        return Cache(batch_size, len(self.blocks))

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """All parameters; without `embeddings`, all but the embedding table (kept if it is the head)."""
        total = sum(p.numel() for p in self.parameters())
        return total if embeddings or self.head is None else total - self.embedding.weight.numel()

    def flops_per_token(self, length: int) -> float:
        """Model FLOPs of training on one token, forward and backward, in sequences of `length` tokens.

        3 * (2 P + sum over layers of s), P being the weights that multiply a token: linear layers, short
        convolutions and the head, not the embedding look-up. s counts the mixing itself for one token:

        - attention: 4 d keys a head, with keys the mean number that a query sees, (L + 1) / 2 for full
          attention;
        - linear attention: 4 d_k d_v a head, a multiply-add for the write and for the read; RetNet, GLA
          and Mamba-2 5 (the decay), DeltaNet 6 (the prediction S^T k) times `delta_steps`, Gated DeltaNet 7 (both);
          Mamba 6 a state.

        The backward pass is counted as twice the forward. What an algorithm does beyond this (a chunkwise
        form's products inside a chunk, recomputation) is not counted, nor are norms, activations and softmax.

            >>> model = LanguageModel(ModelConfig(width=32, layers=2, heads=2, mixer="attention"))
            >>> model.flops_per_token(100) > 6 * model.num_parameters(embeddings=False) * 0.99
            True
        """
        check_integer("length", length)
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear | ShortConvolution))
        weights += 0 if self.head is not None else self.embedding.weight.numel()
        mixing = sum(module.state_flops(length) for module in self.modules() if isinstance(module, Mixer))
        return 3 * (2 * weights + mixing)
