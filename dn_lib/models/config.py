"""A model in a few numbers."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from dn_lib.forms.common import describe
from dn_lib.layers.common import ACTIVATIONS, QK_NORMS
from dn_lib.layers.gated_delta_net import value_size
from dn_lib.layers.lightning import DECAYS
from dn_lib.layers.registry import mixer_kind, mixer_names
from dn_lib.ops.backend import BACKENDS

MIXERS = mixer_names()
HYBRIDS = ("none", "window", "global")
INITIALISATIONS = ("normal", "mimetic")
MIMETIC_MIXERS = ("delta", "linear", "retnet", "gla", "gated_delta", "mamba", "mamba2", "kda", "lightning")
LARGEST_SIZE, LARGEST_WINDOW = 2**31 - 1, 2**63 - 1  # beyond, PyTorch refuses in words of its own


@dataclass(frozen=True)
class ModelConfig:
    """What a `LanguageModel` is made of. Raises ValueError, naming the field, for what cannot be built.

    Every field, with the mixers that it concerns where not all:

    - `vocab_size`, `width`, `layers`, `heads`; `head_dim`, width // heads if None; `attention_heads` for
      attention layers, `heads` if None (their head size is width // attention_heads then).
    - `mixer`: "delta", "linear", "retnet", "gla", "gated_delta", "mamba", "mamba2", "kda", "lightning", "mom",
      "attention", "window" or "liger".
    - `hybrid`: "none"; "window", sliding-window attention in every other layer, from the second;
      "global", full attention in layers 2 and layers/2 + 1, counted from 1.
    - `pattern`: the mixer of every layer, spelled out; `mixer` and `hybrid` are then not read.
    - `window`: how many tokens, itself included, a token of a layer "window" or "liger" attends to.
    - `activation`, `qk_norm` (delta, linear): "silu", "relu", "elu1", "identity"; "l2", "l1", "none".
    - `conv_size` (all but attention, liger): taps of the short convolution, 0 for none.
    - `beta_range` (delta, gated_delta, kda, mom): beta lies in (0, beta_range).
    - `delta_steps` (delta, linear): writes a token.
    - `value_heads`, `heads` if None (gated_delta); `expand_v`, the channels of a value over those of a key
      (gated_delta, mom).
    - `memories` beside the shared one, of which each token goes to `active_memories` (mom).
    - `decay` (lightning): the table of fixed decays, "lightning", "transnormer", "retnet" or "none". `decay_by_depth`:
      layer l of L, counted from 0, decays more slowly by the factor 1 - l / L in the exponent, as in TransNormerLLM.
    - `backend` (all but mamba and attention): the operator's, "auto" for the fastest that there is; "chunkwise" where
      second derivatives or `torch.func` are wanted on a GPU.
    - `output_gate` (delta, linear, gated_delta, mom): None for what the mixer's paper has, none for delta and linear,
      one for gated_delta and mom. RetNet, GLA, Mamba, Mamba-2, KDA and Lightning always have one.
    - `mlp_ratio`: inner size of SwiGLU over width, rounded up to a multiple of 64; 0 for no feed-forward
      part. `hidden` gives that size itself.
    - `mamba_expand`, `mamba_state` (mamba, mamba2): channels over width, states a channel. Mamba-2 is usually built
      with 128 states and heads of 64 channels.
    - `tie_embeddings`: the head's weight is the embedding's. `rope_base` (attention, liger, retnet). `norm_eps`.
    - `initialisation`: "normal"; or "mimetic", which after that start sets the recurrent layers, by
      `dn_lib.layers.mimetic_`, to what attention learns to do. Not with "mom" and "liger", nor several `delta_steps`.

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
    value_heads: int | None = None
    expand_v: float = 2.0
    decay: str = "lightning"
    decay_by_depth: bool = False
    memories: int = 4
    active_memories: int = 2
    output_gate: bool | None = None
    mlp_ratio: float = 8 / 3
    hidden: int | None = None
    mamba_expand: int = 2
    mamba_state: int = 16
    tie_embeddings: bool = False
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    backend: str = "auto"
    initialisation: str = "normal"

    def __post_init__(self):
        if self.pattern is not None:
            if not isinstance(self.pattern, (tuple, list)):
                raise ValueError(f"pattern must be a list of mixers or None, got {describe(self.pattern)}")
            object.__setattr__(self, "pattern", tuple(self.pattern))
        self._check_types()
        self._check_sizes()
        self._check_choices()
        self._check_heads()
        self._check_initialisation()

    def _check_types(self) -> None:
        optional = {"head_dim": int, "attention_heads": int, "hidden": int, "value_heads": int, "output_gate": bool}
        for field in dataclasses.fields(self):
            value, default = getattr(self, field.name), field.default
            if field.name == "pattern" or (field.name in optional and value is None):
                continue
            kind = optional.get(field.name, type(default))
            allowed = (int, float) if kind is float else kind
            if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
                raise ValueError(f"{field.name} must be of type {kind.__name__}, got {value!r}")

    def _check_sizes(self) -> None:
        at_least_one = ("vocab_size", "width", "layers", "heads", "window", "delta_steps", "mamba_expand")
        for name in (*at_least_one, "memories", "active_memories"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        positive = ("head_dim", "attention_heads", "hidden", "mamba_state", "value_heads", "expand_v")
        for name in (*positive, "rope_base", "norm_eps"):
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
        options = {"mixer": mixer_names(), "hybrid": HYBRIDS, "activation": ACTIVATIONS, "qk_norm": QK_NORMS}
        options |= {"backend": BACKENDS, "decay": DECAYS, "initialisation": INITIALISATIONS}
        for name, allowed in options.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.pattern is not None:
            wrong = [mixer for mixer in self.pattern if mixer not in mixer_names()]
            if wrong or len(self.pattern) != self.layers:
                raise ValueError(
                    f"pattern must name {self.layers} mixers (one a layer) out of {', '.join(mixer_names())}, "
                    f"got {list(self.pattern)}"
                )
        least = {"none": 1, "window": 2, "global": 4}[self.hybrid]
        if self.pattern is None and self.layers < least:
            raise ValueError(f"layers must be at least {least} with hybrid={self.hybrid!r}, got {self.layers}")

    def _check_heads(self) -> None:
        used = set(self.mixers())
        for kind in (mixer_kind(name) for name in mixer_names() if name in used):
            field = next((field for field in kind.heads if getattr(self, field) is not None), None)
            if field is None:  # a mixer without heads
                continue
            heads, head_dim = getattr(self, field), self.head_dim if field == "heads" else None
            if head_dim is None and self.width % heads:
                raise ValueError(f"{field} must divide width, got {field} = {heads} and width = {self.width}")
            head_dim = head_dim or self.width // heads
            if kind.even and head_dim % 2:
                raise ValueError(f"head_dim must be even for {', '.join(sorted(used))}, got {head_dim}")
            if kind.name == "gated_delta":
                self._check_values(head_dim)
            if kind.name == "mom":
                self._check_memories(head_dim)

    def _check_values(self, head_dim: int) -> None:
        value_size(head_dim, self.expand_v)
        if self.value_heads is not None and self.value_heads % self.heads:
            raise ValueError(f"value_heads must be a multiple of heads = {self.heads}, got {self.value_heads}")

    def _check_memories(self, head_dim: int) -> None:
        value_size(head_dim, self.expand_v)
        if self.active_memories > self.memories:
            raise ValueError(f"active_memories must be at most memories = {self.memories}, got {self.active_memories}")

    def _check_initialisation(self) -> None:
        if self.initialisation == "normal":
            return
        used = set(self.mixers())
        unfit = sorted(used - {*MIMETIC_MIXERS, "attention", "window"})
        if unfit or not used & set(MIMETIC_MIXERS):
            raise ValueError(
                f"initialisation must be 'normal' for {', '.join(unfit or sorted(used))}, got {self.initialisation!r}"
            )
        if self.delta_steps > 1 and used & {"delta", "linear"}:
            raise ValueError(
                f"delta_steps must be 1 with initialisation={self.initialisation!r}, got {self.delta_steps}"
            )

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


def check_config(config: ModelConfig) -> None:
    if not isinstance(config, ModelConfig):
        raise TypeError(f"config must be a ModelConfig, got {describe(config)}")
