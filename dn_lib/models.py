"""Chapter 6: language models, pure or hybrid, from one small configuration.

>>> import dn_lib, torch
>>> from dn_lib.models import LanguageModel, ModelConfig, generate
>>> config = ModelConfig(width=32, layers=4, heads=2, hybrid="window", window=16)
>>> config.mixers()
('delta', 'window', 'delta', 'window')
>>> model = LanguageModel(config)
>>> generate(model, torch.zeros(1, 3, dtype=torch.long), 5).shape
torch.Size([1, 8])
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dn_lib.common import active_transform, check_integer, check_is_tensor, describe, is_integer, is_number
from dn_lib.layers import (
    ACTIVATIONS,
    QK_NORMS,
    Attention,
    DeltaNet,
    Documents,
    GatedLinearAttention,
    LayerCache,
    LinearAttention,
    Mamba,
    RetNet,
    RMSNorm,
    ShortConvolution,
    SwiGLU,
)
from dn_lib.ops import BACKENDS, _checking
from dn_lib.stored import FLOATS, as_folder, digest, parse_json, read_tensors, read_text

MIXERS = ("delta", "linear", "retnet", "gla", "mamba", "attention", "window")
HYBRIDS = ("none", "window", "global")
LONGEST = 2**31 - 1  # tokens of one generated sequence
LARGEST_SIZE, LARGEST_WINDOW = 2**31 - 1, 2**63 - 1  # beyond, PyTorch refuses in words of its own


@dataclass(frozen=True)
class ModelConfig:
    """What a `LanguageModel` is made of. Raises ValueError, naming the field, for what cannot be built.

    Every field, with the mixers that it concerns where not all:

    - `vocab_size`, `width`, `layers`, `heads`; `head_dim`, width // heads if None; `attention_heads` for
      attention layers, `heads` if None (their head size is width // attention_heads then).
    - `mixer`: "delta", "linear", "retnet", "gla", "mamba", "attention" or "window".
    - `hybrid`: "none"; "window", sliding-window attention in every other layer, from the second;
      "global", full attention in layers 2 and layers/2 + 1, counted from 1.
    - `pattern`: the mixer of every layer, spelled out; `mixer` and `hybrid` are then not read.
    - `window`: how many tokens, itself included, a token of a window layer attends to.
    - `activation`, `qk_norm` (delta, linear): "silu", "relu", "elu1", "identity"; "l2", "l1", "none".
    - `conv_size` (all but attention): taps of the short convolution, 0 for none.
    - `beta_range` (delta): beta lies in (0, beta_range); `delta_steps` (delta, linear): writes a token.
    - `backend` (delta): `dn_lib.delta_rule`'s, "auto" for the fastest that there is; "chunkwise" where second
      derivatives or `torch.func` are wanted on a GPU.
    - `output_gate` (delta, linear); RetNet, GLA and Mamba always have one.
    - `mlp_ratio`: inner size of SwiGLU over width, rounded up to a multiple of 64; 0 for no feed-forward
      part. `hidden` gives that size itself.
    - `mamba_expand`, `mamba_state` (mamba): channels over width, states a channel.
    - `tie_embeddings`: the head's weight is the embedding's. `rope_base` (attention, retnet). `norm_eps`.

        >>> ModelConfig.from_dict(ModelConfig(width=64).to_dict()).width
        64
    """

    vocab_size: int = 256
    width: int = 256
    layers: int = 6
    heads: int = 2
    head_dim: int | None = None
    attention_heads: int | None = None
    mixer: str = "delta"
    hybrid: str = "none"
    pattern: tuple[str, ...] | None = None
    window: int = 128
    activation: str = "silu"
    qk_norm: str = "l2"
    conv_size: int = 4
    beta_range: float = 1.0
    delta_steps: int = 1
    output_gate: bool = False
    mlp_ratio: float = 8 / 3
    hidden: int | None = None
    mamba_expand: int = 2
    mamba_state: int = 16
    tie_embeddings: bool = False
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    backend: str = "auto"

    def __post_init__(self):
        if self.pattern is not None:
            if not isinstance(self.pattern, (tuple, list)):
                raise ValueError(f"pattern must be a list of mixers or None, got {describe(self.pattern)}")
            object.__setattr__(self, "pattern", tuple(self.pattern))
        self._check_types()
        self._check_sizes()
        self._check_choices()
        self._check_heads()

    def _check_types(self) -> None:
        optional = ("head_dim", "attention_heads", "hidden")
        for field in dataclasses.fields(self):
            value, default = getattr(self, field.name), field.default
            if field.name == "pattern" or (field.name in optional and value is None):
                continue
            kind = int if field.name in optional else type(default)
            allowed = (int, float) if kind is float else kind
            if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
                raise ValueError(f"{field.name} must be of type {kind.__name__}, got {value!r}")

    def _check_sizes(self) -> None:
        for name in ("vocab_size", "width", "layers", "heads", "window", "delta_steps", "mamba_expand"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("head_dim", "attention_heads", "hidden", "mamba_state", "rope_base", "norm_eps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            most = LARGEST_WINDOW if name == "window" else LARGEST_SIZE
            if type(value) is int and value > most and type(field.default) is not float:
                raise ValueError(f"{name} must be at most {most}, got {value}")
        if self.conv_size < 0:
            raise ValueError(f"conv_size must be 0 (no convolution) or more, got {self.conv_size}")
        if not 0 <= self.mlp_ratio < math.inf:
            raise ValueError(f"mlp_ratio must be 0 (no feed-forward part) or more, got {self.mlp_ratio}")
        if not 0 < self.beta_range <= 2:
            raise ValueError(f"beta_range must be in (0, 2], got {self.beta_range}")

    def _check_choices(self) -> None:
        options = {"mixer": MIXERS, "hybrid": HYBRIDS, "activation": ACTIVATIONS, "qk_norm": QK_NORMS}
        options["backend"] = BACKENDS
        for name, allowed in options.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.pattern is not None:
            wrong = [mixer for mixer in self.pattern if mixer not in MIXERS]
            if wrong or len(self.pattern) != self.layers:
                raise ValueError(
                    f"pattern must name {self.layers} mixers (one a layer) out of {', '.join(MIXERS)}, "
                    f"got {list(self.pattern)}"
                )
        least = {"none": 1, "window": 2, "global": 4}[self.hybrid]
        if self.pattern is None and self.layers < least:
            raise ValueError(f"layers must be at least {least} with hybrid={self.hybrid!r}, got {self.layers}")

    def _check_heads(self) -> None:
        used = set(self.mixers())
        checks = []
        if used & {"delta", "linear", "retnet", "gla"}:
            checks.append(("heads", self.heads, self.head_dim, bool(used & {"retnet", "gla"})))
        if used & {"attention", "window"}:
            own = self.attention_heads is not None
            name = "attention_heads" if own else "heads"
            checks.append((name, getattr(self, name), None if own else self.head_dim, True))
        for name, heads, head_dim, even in checks:
            if head_dim is None and self.width % heads:
                raise ValueError(f"{name} must divide width, got {name} = {heads} and width = {self.width}")
            head_dim = head_dim or self.width // heads
            if even and head_dim % 2:
                raise ValueError(f"head_dim must be even for {', '.join(sorted(used))}, got {head_dim}")

    def mixers(self) -> tuple[str, ...]:
        """The mixer of each layer, first to last."""
        if self.pattern is not None:
            return self.pattern
        names = [self.mixer] * self.layers
        if self.hybrid == "window":
            names[1::2] = ["window"] * len(names[1::2])
        if self.hybrid == "global":
            names[1] = names[self.layers // 2] = "attention"
        return tuple(names)

    def mlp_width(self) -> int:
        """The inner size of SwiGLU; 0 if there is no feed-forward part."""
        if self.hidden is not None:
            return self.hidden
        return 64 * math.ceil(self.mlp_ratio * self.width / 64 - 1e-9)

    def to_dict(self) -> dict:
        """A dict of numbers, strings, lists and None: `json.dumps` takes it."""
        values = dataclasses.asdict(self)
        values["pattern"] = None if self.pattern is None else list(self.pattern)
        return values

    @classmethod
    def from_dict(cls, values: dict) -> ModelConfig:
        """The reverse of `to_dict`; a field that is missing has its default. Raises ValueError for an unknown one."""
        if not isinstance(values, dict):
            raise TypeError(f"values must be a dict, got {describe(values)}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"model configuration has no field {unknown[0]!r}; it has {', '.join(known)}")
        return cls(**values)


def build_mixer(name: str, config: ModelConfig) -> nn.Module:
    """The layer that `name`, one of `MIXERS`, means under `config`.

    >>> type(build_mixer("gla", ModelConfig())).__name__
    'GatedLinearAttention'
    """
    _check_config(config)
    c = config
    common = {"conv_size": c.conv_size, "norm_eps": c.norm_eps}
    linear = {"activation": c.activation, "qk_norm": c.qk_norm, "output_gate": c.output_gate}
    linear |= {"steps": c.delta_steps, **common}
    if name in ("attention", "window"):
        heads, head_dim = (c.attention_heads, None) if c.attention_heads else (c.heads, c.head_dim)
        window = c.window if name == "window" else None
        return Attention(c.width, heads, head_dim, window=window, rope_base=c.rope_base)
    if name == "delta":
        return DeltaNet(c.width, c.heads, c.head_dim, beta_range=c.beta_range, backend=c.backend, **linear)
    if name == "linear":
        return LinearAttention(c.width, c.heads, c.head_dim, **linear)
    if name == "retnet":
        return RetNet(c.width, c.heads, c.head_dim, rope_base=c.rope_base, **common)
    if name == "gla":
        return GatedLinearAttention(c.width, c.heads, c.head_dim, **common)
    if name == "mamba":
        return Mamba(c.width, expand=c.mamba_expand, state_size=c.mamba_state, conv_size=c.conv_size)
    raise ValueError(f"name must be one of {', '.join(MIXERS)}, got {describe(name)}")


def _check_config(config: ModelConfig) -> None:
    if not isinstance(config, ModelConfig):
        raise TypeError(f"config must be a ModelConfig, got {describe(config)}")


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
        return x if self.mlp is None else x + self.mlp(self.mlp_norm(x))


class Cache:
    """What a model keeps between calls: `layers`, a `LayerCache` each, and `length`, the tokens seen so far (of the
    longest sequence, if they differ).

    >>> model = LanguageModel(ModelConfig(width=32, layers=1, heads=1, conv_size=0))
    >>> cache = model.new_cache(batch_size=1)
    >>> sizes = [model(torch.zeros(1, n, dtype=torch.long), cache) is None or cache.bytes() for n in (5, 50)]
    >>> sizes  # one 32 x 32 state in float32, however long the context
    [4096, 4096]
    """

    def __init__(self, batch_size: int, layers: int):
        self.batch_size = batch_size
        self.length = 0
        self.layers = [LayerCache() for _ in range(layers)]

    def bytes(self) -> int:
        """The memory held by all its tensors."""
        return sum(layer.bytes() for layer in self.layers)


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
    stream divided by sqrt(2 layers).

        >>> model = LanguageModel(ModelConfig(width=32, layers=2, heads=2))
        >>> model(torch.zeros(3, 7, dtype=torch.long)).shape
        torch.Size([3, 7, 256])
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        _check_config(config)
        self.config = config
        self._tokens_were_read = False
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList([Block(name, config) for name in config.mixers()])
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
            if isinstance(module, Mamba):
                module.reset_time_scale()

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
        if tokens.device.type == "cpu" or not self._tokens_were_read or _checking.get():
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
        - linear attention: 4 d_k d_v a head, a multiply-add for the write and for the read; RetNet and GLA
          5 (the decay), DeltaNet 6 (the prediction S^T k) times `delta_steps`; Mamba 6 a state.

        The backward pass is counted as twice the forward. What an algorithm does beyond this (a chunkwise
        form's products inside a chunk, recomputation) is not counted, nor are norms, activations and softmax.

            >>> model = LanguageModel(ModelConfig(width=32, layers=2, heads=2, mixer="attention"))
            >>> model.flops_per_token(100) > 6 * model.num_parameters(embeddings=False) * 0.99
            True
        """
        check_integer("length", length)
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear | ShortConvolution))
        weights += 0 if self.head is not None else self.embedding.weight.numel()
        return 3 * (2 * weights + sum(block.mixer.state_flops(length) for block in self.blocks))


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt: Tensor,
    new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    lengths: Tensor | list[int] | None = None,
) -> Tensor:
    """Continue `prompt` `[B, L]`, L >= 1, by `new_tokens`: returns `[B, L + new_tokens]`.

    The prompt goes through the model once, then each new token alone, through one cache. Prompts of different
    lengths are padded on the left, with whatever tokens: the last `lengths[b]` of row b are its prompt. temperature 0
    takes the most likely token; `top_k` draws among the k most likely. `generator` (on the model's device) makes
    the draw repeatable. Raises ValueError for arguments out of range.

        >>> model = LanguageModel(ModelConfig(width=32, layers=1, heads=1))
        >>> a, b = (generate(model, torch.zeros(1, 1, dtype=torch.long), 8, temperature=0) for _ in range(2))
        >>> torch.equal(a, b)
        True
        >>> padded = torch.tensor([[0, 0, 5], [7, 8, 9]])
        >>> both = generate(model, padded, 8, temperature=0, lengths=[1, 3])
        >>> torch.equal(both[:1, 2:], generate(model, torch.tensor([[5]]), 8, temperature=0))
        True
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "new_cache"):
        raise TypeError(f"model must be a LanguageModel, compiled or not, got {describe(model)}")
    if not isinstance(prompt, Tensor):
        raise TypeError(f"prompt must be a tensor of tokens [B, L], got {type(prompt).__name__}")
    if prompt.dim() != 2 or prompt.numel() == 0:
        raise ValueError(f"prompt must be [B, L] with B and L at least 1, got shape {tuple(prompt.shape)}")
    check_is_tensor("prompt", prompt, "of tokens [B, L]")
    if prompt.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"prompt must be int32 or int64, got {prompt.dtype}")
    lengths = _prompt_lengths(prompt, lengths)
    read = prompt if lengths is None else prompt[_is_prompt(prompt, lengths)]  # padding may be any number
    check_in_vocabulary("prompt", read, model.config.vocab_size)
    if not is_integer(new_tokens):
        raise TypeError(f"new_tokens must be a whole number of 0 or more, got {describe(new_tokens)}")
    if new_tokens < 0:
        raise ValueError(f"new_tokens must be 0 or more, got {new_tokens}")
    if new_tokens > (most := LONGEST - prompt.shape[1]):
        raise ValueError(f"new_tokens must be at most {most} after this prompt, got {describe(new_tokens)}")
    if not is_number(temperature):
        raise TypeError(f"temperature must be a number, 0 (greedy) or more, got {describe(temperature)}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if top_k is not None and not is_integer(top_k):
        raise TypeError(f"top_k must be a whole number of at least 1 or None, got {describe(top_k)}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    cache, tokens = model.new_cache(prompt.shape[0]), [prompt]
    for step in range(new_tokens):
        last = _read_prompt(model, prompt, lengths, cache) if step == 0 else model.features(tokens[-1], cache)[:, -1]
        tokens.append(_sample(model.logits(last).float(), temperature, top_k, generator))
    return torch.cat(tokens, dim=1)


def _prompt_lengths(prompt: Tensor, lengths: Tensor | list[int] | None) -> Tensor | None:
    """`lengths` as a tensor on the prompt's device; raises ValueError unless it is `[B]`, from 1 to L."""
    if lengths is None:
        return None
    try:
        lengths = torch.as_tensor(lengths, device=prompt.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"lengths must be a tensor or a list of whole numbers, got {lengths!r}") from error
    if lengths.shape != prompt.shape[:1] or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(
            f"lengths must be {prompt.shape[0]} whole numbers, one a prompt, got {lengths.dtype} {list(lengths.shape)}"
        )
    if not 1 <= lengths.min() <= lengths.max() <= prompt.shape[1]:
        raise ValueError(f"lengths must be from 1 to L = {prompt.shape[1]}, got {lengths.tolist()}")
    return lengths.long()


def _is_prompt(prompt: Tensor, lengths: Tensor) -> Tensor:
    """Which tokens of `[B, L]` are not padding."""
    return torch.arange(prompt.shape[1], device=prompt.device) >= prompt.shape[1] - lengths[:, None]


def _read_prompt(model: LanguageModel, prompt: Tensor, lengths: Tensor | None, cache: Cache) -> Tensor:
    """The features of each prompt's last token, `[B, width]`. Prompts of different lengths are packed into one row."""
    if lengths is None:
        return model.features(prompt, cache)[:, -1]
    packed = prompt[_is_prompt(prompt, lengths)][None]
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
    return model.features(packed, cache, cu_seqlens=cu_seqlens)[0, cu_seqlens[1:] - 1]


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator) -> Tensor:
    """`[B, vocab]` -> `[B, 1]`."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        # By place, not by value: of equal logits, which are common in bfloat16, no more than top_k are left.
        values, places = logits.topk(min(top_k, logits.shape[-1]))
        logits = torch.full_like(logits, float("-inf")).scatter(-1, places, values)
    # The largest logit is taken off first, so that a very small temperature cannot make inf - inf; and one that
    # is 0 in the precision of the logits would make 0 / 0.
    temperature = max(temperature, torch.finfo(logits.dtype).tiny)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


# --------------------------------------------------------------------------------- saving and loading

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def _write_atomically(path: Path, write) -> None:
    """`write(temporary path)`, then rename to `path`: a reader sees the old file or the new, whole."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    if os.name == "nt":  # a folder cannot be opened there
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# What torch.compile, DDP, FSDP and activation checkpointing put between a model's name for a tensor and ours.
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrapped(model: nn.Module) -> LanguageModel:
    """The `LanguageModel` inside any nesting of torch.compile, DDP and the like.

    >>> model = LanguageModel(ModelConfig(width=32, layers=1, heads=1))
    >>> unwrapped(nn.DataParallel(model)) is model
    True
    """
    inner = model
    while not isinstance(inner, LanguageModel):
        parts = inner.__dict__.get("_modules", {}) if isinstance(inner, nn.Module) else {}
        name = next((name for name in WRAPPERS if name in parts), None)
        if name is None:
            raise TypeError(f"model must be a LanguageModel, compiled or wrapped or not, got {type(model).__name__}")
        inner = parts[name]
    return inner


def save_model(folder: str | os.PathLike, model: nn.Module, state_dict: dict | None = None) -> None:
    """Write `model.safetensors` and `config.json` into `folder`, which is made if need be.

    A model that is compiled, or wrapped for several devices, or whose blocks are, is saved as the model inside.
    `state_dict` replaces the model's own (as when its parameters are spread over several devices). Each file is
    written under another name, flushed to disk and renamed. The weights carry the configuration too, and a digest of
    it and of themselves, so that `load_model` notices damage and a pair out of step.

    Weights that are not finite are written as they are. Raises TypeError for what is no `LanguageModel`, ValueError,
    before anything is written, for a `state_dict` that is not of this model.
    """
    from safetensors.torch import save_file

    model = unwrapped(model)
    if state_dict is not None and not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a dict of tensors or None, got {describe(state_dict)}")
    given = model.state_dict() if state_dict is None else state_dict
    weights = {_plain_name(name): _to_store(name, t) for name, t in given.items()}
    missing, extra = _difference(_expected(model.config), weights)
    if missing or extra:
        raise ValueError(f"state_dict must be of this model: missing {missing}, not wanted {extra}")
    folder = as_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(model.config.to_dict(), indent=2)
    metadata = {"config": config, "sha256": digest(weights, config)}
    _write_atomically(folder / WEIGHTS, lambda p: save_file(weights, p, metadata=metadata))
    _write_atomically(folder / CONFIG, lambda p: Path(p).write_text(config + "\n", encoding="utf-8"))


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _to_store(name: str, tensor: Tensor) -> Tensor:
    """Whole, contiguous, on the CPU, in memory that it shares with no other (safetensors refuses that)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"state_dict must hold tensors, {name} is {describe(tensor)}")
    if hasattr(tensor, "full_tensor"):
        raise ValueError(f"state_dict must hold whole tensors (see DTensor.full_tensor), {name} is a shard")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"state_dict must hold tensors of {', '.join(map(str, FLOATS))}; {name} has {tensor.dtype}")
    whole = tensor.detach().cpu().contiguous()
    return whole if whole.untyped_storage().nbytes() == whole.nbytes else whole.clone()


def load_model(folder: str | os.PathLike, device: str | torch.device | None = None) -> LanguageModel:
    """The model that `save_model` wrote, in the dtype of its weights, on `device` (the CPU if None).

    Raises FileNotFoundError if a file is missing; ValueError, naming the file, if it cannot be read, if its content
    is not what was written, or if the two files do not belong together. Files without a digest, as earlier versions
    wrote them and other programs may, are loaded if names and shapes fit: what was changed in their numbers goes
    unnoticed. Weights that are not finite are loaded as they are.

        >>> import tempfile
        >>> model = LanguageModel(ModelConfig(width=32, layers=1, heads=1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(folder, model)
        ...     again = load_model(folder)
        >>> torch.equal(again.head.weight, model.head.weight)
        True
    """
    folder, device = as_folder(folder), _device(device)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"folder must hold {CONFIG} and {WEIGHTS}: no {name} in {folder}")
    text = read_text(folder / CONFIG)
    values = parse_json(text, str(folder / CONFIG))
    weights, metadata = read_tensors(folder / WEIGHTS)
    _check_metadata(folder, metadata, weights, text, values)
    config = _config_that_fits(folder, values, weights)
    with torch.device("meta"):
        model = LanguageModel(config)
    model.load_state_dict(weights, assign=True)
    return model.to(device)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cpu")
    if not isinstance(device, (str, torch.device)) and not is_integer(device):
        raise TypeError(f"device must be a torch.device, its name or None, got {describe(device)}")
    try:
        return torch.device(device)
    except (RuntimeError, OverflowError) as error:
        raise ValueError(f"device must be one of PyTorch's, got {describe(device)}") from error


def _check_metadata(folder: Path, metadata: dict[str, str], weights: dict[str, Tensor], text: str, values) -> None:
    """Raise ValueError unless the weights are those that were written, with this configuration."""
    unknown = sorted(set(metadata) - {"config", "sha256", "format"})
    if unknown:
        raise ValueError(f"{folder / WEIGHTS} is damaged, or not of `save_model`: unknown metadata {unknown[0]!r}")
    config, stored = metadata.get("config"), metadata.get("sha256")
    if stored is not None and (config is None or stored != digest(weights, config)):
        raise ValueError(f"{folder / WEIGHTS} is damaged: its content does not have the digest written with it")
    if config is None:
        return
    # With a digest the two texts are compared to the letter, so that nothing in config.json can change unnoticed.
    same = text == config + "\n" if stored is not None else parse_json(config, str(folder / WEIGHTS)) == values
    if not same:
        raise ValueError(
            f"{CONFIG} and {WEIGHTS} in {folder} come from two different models: one of them was changed, or saving "
            "the second was interrupted"
        )


def _config_that_fits(folder: Path, values: dict, weights: dict[str, Tensor]) -> ModelConfig:
    """The configuration, if the weights are of such a model; raises ValueError if not."""
    misfit = f"{WEIGHTS} in {folder} does not fit {CONFIG}"
    layers, found = values.get("layers", ModelConfig.layers), {n.split(".")[1] for n in weights if n[:7] == "blocks."}
    if isinstance(layers, int) and layers != len(found):  # first, since it says how much is built below
        raise ValueError(f"{misfit}: {len(found)} layers, not {layers}")
    try:
        config = ModelConfig.from_dict(values)
        missing, extra = _difference(_expected(config), weights)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{folder / CONFIG} holds no usable configuration: {error}") from None
    if missing or extra:
        raise ValueError(f"{misfit}: missing {missing}, not wanted {extra}")
    return config


def _expected(config: ModelConfig) -> dict[str, Tensor]:
    """A state dict of the right names and shapes, without numbers. Raises ValueError for sizes that no tensor has."""
    try:
        with torch.device("meta"):
            return LanguageModel(config).state_dict()
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"config asks for tensors that cannot be made: {' '.join(str(error).split())}") from None


def _difference(wanted: dict, given: dict) -> tuple[list[str], list[str]]:
    """Names (with shapes) that only one of two state dicts has; at most three of each."""
    a, b = ({f"{name} {list(t.shape)}" for name, t in d.items()} for d in (wanted, given))
    return sorted(a - b)[:3], sorted(b - a)[:3]
