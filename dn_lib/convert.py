"""Weights from the authors' library: a fla DeltaNet checkpoint as a `LanguageModel` with the same logits.

The flash-linear-attention library (Yang and Zhang 2024) names a block's parts `attn_norm`, `attn`, `mlp_norm`
and `mlp`; ours are `mixer_norm`, `mixer`, `mlp_norm` and `mlp`. Every matrix has the same orientation in both,
so that converting is renaming, and finding out which options the checkpoint was trained with.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from dn_lib.models import LanguageModel, ModelConfig

OUTER = {"embeddings.weight": "embedding.weight", "norm.weight": "norm.weight"}
MIXER = {
    "q_proj.weight": "query.weight",
    "k_proj.weight": "key.weight",
    "v_proj.weight": "value.weight",
    "o_proj.weight": "output.weight",
    "b_proj.weight": "beta.weight",
    "g_proj.weight": "gate.weight",
    "o_norm.weight": "norm.weight",
    "q_conv1d.weight": "query_conv.weight",
    "k_conv1d.weight": "key_conv.weight",
    "v_conv1d.weight": "value_conv.weight",
}
MLP = {"gate_proj.weight": "gate.weight", "up_proj.weight": "up.weight", "down_proj.weight": "output.weight"}
BLOCK = (
    {"attn_norm.weight": "mixer_norm.weight", "mlp_norm.weight": "mlp_norm.weight"}
    | {f"attn.{theirs}": f"mixer.{ours}" for theirs, ours in MIXER.items()}
    | {f"mlp.{theirs}": f"mlp.{ours}" for theirs, ours in MLP.items()}
)
QK_NORM = {"l2": "l2", "sum": "l1"}
ACTIVATION = {"silu": "silu", "relu": "relu", "elu": "elu1", "identity": "identity"}


def from_fla_state_dict(state_dict: dict[str, Tensor], config) -> LanguageModel:
    """A model with the weights of a fla `DeltaNetForCausalLM` and, up to rounding, its logits.

    `state_dict` is what its `state_dict()` gives, any dtype (kept); `config` its configuration, as an object
    or as the dict in `config.json`. Sizes are read from the weights, options from the configuration, with
    fla's defaults for those that are absent. Layers of attention (`config.attn`) are converted too, with
    key-value heads that several query heads share written out. Checked against fla 0.6.0, whose names have
    been the same since 0.1; before that, `gate_proj` held the gate and the up projection in one matrix.

    Raises ValueError, naming what it met, for options that have no counterpart here (no beta, a bias in
    attention, residual attention, expansions of keys and values that differ) and for weights that do not fit.

        >>> from_fla_state_dict({}, {"use_beta": False})
        Traceback (most recent call last):
        ValueError: config.use_beta must be True to be converted, got False
    """
    options = config if isinstance(config, dict) else config.to_dict()
    _refuse_unsupported(options)
    weights = {name.removeprefix("model."): t for name, t in state_dict.items() if ".rotary." not in name}
    model_config = _read_config(weights, options)
    ours = _rename(weights, model_config)
    with torch.device("meta"):
        model = LanguageModel(model_config)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in ours or tuple(ours[name].shape) != shape:
            got = tuple(ours[name].shape) if name in ours else "nothing"
            raise ValueError(f"state_dict must give {name} of shape {shape}, it gives {got}")
    model.load_state_dict({name: ours[name].detach().clone() for name in expected}, assign=True)
    return model


def load_fla_checkpoint(folder: str | os.PathLike) -> LanguageModel:
    """Read a checkpoint folder in Hugging Face form, `config.json` and `*.safetensors`.

    Raises FileNotFoundError if either is missing and what `from_fla_state_dict` raises.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise FileNotFoundError(f"folder must hold config.json and *.safetensors: {folder} does not")
    weights = {name: t for file in files for name, t in load_file(file).items()}
    return from_fla_state_dict(weights, json.loads((folder / "config.json").read_text()))


def _refuse_unsupported(options: dict) -> None:
    supported = {
        "use_beta": (True,),
        "use_output_norm": (True,),
        "hidden_act": ("swish", "silu"),
        "attnres_block_size": (None,),
        "qk_norm": tuple(QK_NORM),
        "qk_activation": tuple(ACTIVATION),
        "expand_k": (options.get("expand_v", 1.0),),
    }
    for name, allowed in supported.items():
        value = options.get(name, allowed[0])
        if value not in allowed:
            one = " or ".join(str(a) for a in allowed)
            raise ValueError(f"config.{name} must be {one} to be converted, got {value}")


def _attention_layers(options: dict) -> dict[int, dict]:
    """What `config.attn` says of each layer of attention, by its index from 0."""
    entry = options.get("attn") or []
    specs = [entry] if isinstance(entry, dict) else entry
    layers = {}
    for spec in specs:
        if spec.get("qkv_bias"):
            raise ValueError("config.attn.qkv_bias must be False to be converted, got True")
        for layer in spec["layers"]:
            layers.setdefault(layer, spec)
    return layers


def _the_one(values: set, name: str):
    if len(values) > 1:
        raise ValueError(f"config.attn.{name} must be the same in all layers, got {sorted(values, key=str)}")
    return values.pop() if values else None


def _read_config(weights: dict[str, Tensor], options: dict) -> ModelConfig:
    """Sizes from the weights, options from the configuration."""
    layers = 1 + max((int(n.split(".")[1]) for n in weights if n.startswith("layers.")), default=-1)
    attention = _attention_layers(options)
    delta = [i for i in range(layers) if i not in attention]
    if not delta or "embeddings.weight" not in weights:
        raise ValueError("state_dict must be of a fla DeltaNetForCausalLM with a layer of DeltaNet")
    first = f"layers.{delta[0]}.attn."
    for name in (f"{first}b_proj.weight", f"{first}o_norm.weight", "layers.0.mlp.down_proj.weight"):
        if name not in weights:
            raise ValueError(f"state_dict must have model.{name}")
    convolution = weights.get(f"{first}q_conv1d.weight")
    windows = {spec.get("window_size") for spec in attention.values()} - {None}
    window = _the_one(windows, "window_size")
    bases = {float(spec.get("rope_theta") or 10000.0) for spec in attention.values()}
    return ModelConfig(
        vocab_size=weights["embeddings.weight"].shape[0],
        width=weights["embeddings.weight"].shape[1],
        layers=layers,
        heads=weights[f"{first}b_proj.weight"].shape[0],
        head_dim=weights[f"{first}o_norm.weight"].shape[0],
        attention_heads=_the_one({spec["num_heads"] for spec in attention.values()}, "num_heads"),
        pattern=tuple(_mixer(attention.get(i)) for i in range(layers)) if attention else None,
        window=window or ModelConfig.window,
        activation=ACTIVATION[options.get("qk_activation", "silu")],
        qk_norm=QK_NORM[options.get("qk_norm", "l2")],
        conv_size=0 if convolution is None else convolution.shape[-1],
        beta_range=2.0 if options.get("allow_neg_eigval", False) else 1.0,
        output_gate=f"{first}g_proj.weight" in weights,
        hidden=weights["layers.0.mlp.down_proj.weight"].shape[1],
        tie_embeddings=bool(options.get("tie_word_embeddings", False)),
        rope_base=_the_one(bases, "rope_theta") or 10000.0,
        norm_eps=float(options.get("norm_eps", 1e-6)),
    )


def _mixer(attention: dict | None) -> str:
    if attention is None:
        return "delta"
    return "attention" if attention.get("window_size") is None else "window"


def _rename(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our names; matrices that older versions or shared heads store otherwise are brought into our form."""
    ours, mixers = {}, config.mixers()
    for name, tensor in weights.items():
        if name in OUTER:
            ours[OUTER[name]] = tensor
        elif name == "lm_head.weight":
            if not config.tie_embeddings:
                ours["head.weight"] = tensor
        elif name.startswith("layers."):
            _, index, part = name.split(".", 2)
            if part not in BLOCK:
                raise ValueError(f"state_dict has model.{name}, which has no counterpart here")
            prefix = f"blocks.{index}."
            if part == "mlp.gate_proj.weight" and tensor.shape[0] == 2 * config.hidden:
                ours[f"{prefix}mlp.gate.weight"], ours[f"{prefix}mlp.up.weight"] = tensor.chunk(2)
                continue
            if mixers[int(index)] != "delta" and part in ("attn.k_proj.weight", "attn.v_proj.weight"):
                tensor = _own_heads(tensor, config)
            if part.endswith("_conv1d.weight"):
                tensor = tensor.permute(2, 1, 0).contiguous()  # [channels, 1, size] as PyTorch's Conv1d has it
            ours[prefix + BLOCK[part]] = tensor
        else:
            raise ValueError(f"state_dict has {name}, which has no counterpart here")
    return ours


def _own_heads(weight: Tensor, config: ModelConfig) -> Tensor:
    """Repeat the rows of each key-value head for every query head that shares it."""
    head_dim = config.width // config.attention_heads
    shared = weight.unflatten(0, (-1, head_dim))
    return shared.repeat_interleave(config.attention_heads // shared.shape[0], dim=0).flatten(0, 1)
