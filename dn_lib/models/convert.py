"""Weights from the authors' library: a DeltaNet or Gated DeltaNet of fla as a `LanguageModel` with the same logits.

The flash-linear-attention library (Yang and Zhang 2024) names a block's parts `attn_norm`, `attn`, `mlp_norm`
and `mlp`; ours are `mixer_norm`, `mixer`, `mlp_norm` and `mlp`. Every matrix has the same orientation in both,
so that converting is renaming, and finding out which options the checkpoint was trained with.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from dn_lib.models.config import ModelConfig
from dn_lib.models.language_model import LanguageModel
from dn_lib.stored import FLOATS, as_folder, read_json, read_tensors

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
DELTA, GATED = "delta_net", "gated_deltanet"  # as fla's config.model_type has them
LAYERS = {DELTA: 24, GATED: 21}  # fla's default for config.num_hidden_layers
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
GATES = {"a_proj.weight": "step.weight", "A_log": "log_rates", "dt_bias": "step_biases"}
MLP = {"gate_proj.weight": "gate.weight", "up_proj.weight": "up.weight", "down_proj.weight": "output.weight"}
BLOCK = (
    {"attn_norm.weight": "mixer_norm.weight", "mlp_norm.weight": "mlp_norm.weight"}
    | {f"attn.{theirs}": f"mixer.{ours}" for theirs, ours in MIXER.items()}
    | {f"mlp.{theirs}": f"mlp.{ours}" for theirs, ours in MLP.items()}
)
QK_NORM = {"l2": "l2", "sum": "l1"}
GATED_BLOCK = BLOCK | {f"attn.{theirs}": f"mixer.{ours}" for theirs, ours in GATES.items()}
ACTIVATION = {"silu": "silu", "relu": "relu", "elu": "elu1", "identity": "identity"}


def from_fla_state_dict(state_dict: dict[str, Tensor], config) -> LanguageModel:
    """A model with the weights of a fla `DeltaNetForCausalLM` or `GatedDeltaNetForCausalLM` and its logits.

    (Its logits up to rounding.) `config.model_type` says which of the two it is, "delta_net" or "gated_deltanet";
    where it is missing, the presence of `A_log` does.

    `state_dict` is what its `state_dict()` gives, any floating-point dtype (kept); `config` its configuration, as an
    object or as the dict in `config.json`. Sizes are read from the weights and must be those of the configuration,
    options are read from the configuration, with fla's defaults for those that are absent. Layers of attention
    (`config.attn`) are converted too, with key-value heads that several query heads share written out. Checked
    against fla 0.6.0, whose names have been the same since 0.1; before that, `gate_proj` held the gate and the up
    projection in one matrix.

    Norms and convolutions may be in float32 beside bfloat16 matrices, as some checkpoints have them: they stay so,
    compute in float32 and round what they give, as in fla. Matrices must all have one dtype.

    Raises ValueError, naming what it met, for options that have no counterpart here (no beta, a bias in
    attention, residual attention, in DeltaNet expansions of keys and values that differ, in Gated DeltaNet a sigmoid
    as output gate) and for weights that do not fit, or are not all there.

        >>> from_fla_state_dict({}, {"use_beta": False})
        Traceback (most recent call last):
        ValueError: config.use_beta must be True to be converted, got False
    """
    if not isinstance(state_dict, dict):
        raise TypeError(f"state_dict must be a dict of tensors, got {type(state_dict).__name__}")
    for name, tensor in state_dict.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"state_dict must be a dict of tensors, got {name!r}: {type(tensor).__name__}")
    if not isinstance(config, dict) and not hasattr(config, "to_dict"):
        raise TypeError(f"config must be a configuration or its dict, got {type(config).__name__}")
    options = config if isinstance(config, dict) else config.to_dict()
    weights = {name.removeprefix("model."): t for name, t in state_dict.items() if ".rotary." not in name}
    kind = _kind(weights, options)
    _refuse_unsupported(options, kind)
    _check_layers(weights, options, kind)
    model_config = _read_config(weights, options, kind)
    _check_sizes(model_config, options, kind)
    ours = _rename(weights, model_config)
    with torch.device("meta"):
        model = LanguageModel(model_config)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    extra = sorted(set(ours) - set(expected))
    if extra:
        raise ValueError(f"state_dict must not give {extra[0]}, which a model of these options does not have")
    for name, shape in expected.items():
        if name not in ours or tuple(ours[name].shape) != shape:
            got = tuple(ours[name].shape) if name in ours else "nothing"
            raise ValueError(f"state_dict must give {name} of shape {shape}, it gives {got}")
    _check_dtypes(model, ours)
    model.load_state_dict({name: ours[name].detach().clone() for name in expected}, assign=True)
    return model


def load_fla_checkpoint(folder: str | os.PathLike) -> LanguageModel:
    """Read a checkpoint folder in Hugging Face form: `config.json`, and safetensors in one file or in shards.

    If there is an index (`model.safetensors.index.json`), it says which files are read, and others are not. Without
    one, there must be a single `*.safetensors`, or shards that number themselves `-00001-of-00003` and are all there.
    Pickled weights (`*.bin`, `*.pt`) are never read: loading them can run any code.

    Raises FileNotFoundError if a file is missing, ValueError, naming it, if one is damaged or contradicts the index,
    and what `from_fla_state_dict` raises.
    """
    folder = as_folder(folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"folder must hold {CONFIG} and *.safetensors: no {CONFIG} in {folder}")
    config = read_json(folder / CONFIG)
    placed = _index(folder)
    names = _single_or_numbered(folder) if placed is None else sorted(set(placed.values()))
    weights: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"folder must hold {name}, which {INDEX} lists: it is not in {folder}")
        tensors, _ = read_tensors(folder / name)
        for tensor in tensors:
            if tensor in weights:
                raise ValueError(f"{folder} must hold {tensor} once: it is in {name} and in another file")
            if placed is not None and placed.get(tensor) != name:
                raise ValueError(f"{folder / name} holds {tensor}, which {INDEX} does not place there")
        weights |= tensors
    for tensor, name in (placed or {}).items():
        if tensor not in weights:
            raise ValueError(f"{folder / name} must hold {tensor}, as {INDEX} says; it does not")
    return from_fla_state_dict(weights, config)


def _index(folder: Path) -> dict[str, str] | None:
    """The file of each tensor, as the index has it; None if there is no index."""
    if not (folder / INDEX).is_file():
        return None
    placed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ValueError(f"{folder / INDEX} must have a weight_map: the file of every tensor")
    for name in placed.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{folder / INDEX} must name *.safetensors files of its own folder, it names {name!r}")
    return placed


def _single_or_numbered(folder: Path) -> list[str]:
    """The weight files of a folder that has no index."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise FileNotFoundError(f"folder must hold {CONFIG} and *.safetensors: no weights in {folder}")
    if len(names) == 1 and "-of-" not in names[0]:
        return names
    matches = [re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.safetensors", name) for name in names]
    parts = [match for match in matches if match is not None]
    if len(parts) < len(names) or len({(part[1], part[3]) for part in parts}) != 1:
        raise ValueError(f"folder must hold one checkpoint, or {INDEX} to say which of its files are it, got {names}")
    present, count = {int(part[2]) for part in parts}, int(parts[0][3])
    missing = next((i for i in range(1, count + 1) if i not in present), None)
    if missing is not None or len(names) != count:
        raise ValueError(f"folder must hold shards 1 to {count}, number {missing} is missing: {folder}")
    return names


def _kind(weights: dict[str, Tensor], options: dict) -> str:
    """DELTA or GATED."""
    kind = options.get("model_type")
    if kind in (None, ""):  # as in the dict of a configuration that was written by hand
        return GATED if any(name.endswith(".attn.A_log") for name in weights) else DELTA
    if kind not in (DELTA, GATED):
        raise ValueError(f"config.model_type must be {DELTA} or {GATED} to be converted, got {kind}")
    return kind


def _check_layers(weights: dict[str, Tensor], options: dict, kind: str) -> None:
    """Every layer that the configuration counts must be there, and no other."""
    wanted = options.get("num_hidden_layers", LAYERS[kind])
    found = {int(name.split(".")[1]) for name in weights if re.match(r"layers\.\d+\.", name)}
    if found and found != set(range(len(found))):
        raise ValueError(
            f"state_dict must hold layers 0 to {max(found)}, layer {min(set(range(max(found))) - found)} is missing"
        )
    if found and len(found) != wanted:
        raise ValueError(f"state_dict must hold config.num_hidden_layers = {wanted} layers, it holds {len(found)}")


def _check_sizes(config: ModelConfig, options: dict, kind: str) -> None:
    """What the weights say must be what the configuration says, where it says it."""
    defaults = {"use_short_conv": True, "conv_size": 4, "use_gate": kind == GATED}
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_heads": config.heads,
        "intermediate_size": config.hidden,
        "use_short_conv": config.conv_size > 0,
        "use_gate": config.output_gate,
    }
    if kind == GATED:
        defaults["expand_v"] = 2.0
        if options.get("num_v_heads") is None:
            options = options | {"num_v_heads": options.get("num_heads", config.heads)}
        sizes |= {"expand_v": config.expand_v, "num_v_heads": config.value_heads}
    if config.conv_size:
        sizes["conv_size"] = config.conv_size
    for name, found in sizes.items():
        said = options.get(name, defaults.get(name))
        if said is not None and said != found:
            raise ValueError(f"state_dict must be of config.{name} = {said}, its weights are of {found}")


def _check_dtypes(model: LanguageModel, weights: dict[str, Tensor]) -> None:
    """Floating point throughout, and one dtype for all matrices: a product of two dtypes is refused by PyTorch."""
    for name, tensor in weights.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"state_dict must hold tensors of {', '.join(map(str, FLOATS))}; {name} has {tensor.dtype}"
            )
    matrices = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]
    for name in matrices:
        if weights[name].dtype != weights[matrices[0]].dtype:
            raise ValueError(
                f"state_dict must hold matrices of one dtype, {matrices[0]} has {weights[matrices[0]].dtype} "
                f"and {name} {weights[name].dtype}"
            )


def _refuse_unsupported(options: dict, kind: str) -> None:
    supported = {"hidden_act": ("swish", "silu"), "attnres_block_size": (None,)}
    if kind == GATED:
        supported["output_gate_activation"] = ("swish", "silu")
    else:
        supported |= {
            "use_beta": (True,),
            "use_output_norm": (True,),
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
        for name, kind in (("layers", list | tuple), ("num_heads", int)):
            if not isinstance(spec, dict) or not isinstance(spec.get(name), kind):
                raise ValueError(f"config.attn must have {name}, got {spec}")
        if spec.get("qkv_bias"):
            raise ValueError("config.attn.qkv_bias must be False to be converted, got True")
        for layer in spec["layers"]:
            layers.setdefault(layer, spec)
    return layers


def _the_one(values: set, name: str):
    if len(values) > 1:
        raise ValueError(f"config.attn.{name} must be the same in all layers, got {sorted(values, key=str)}")
    return values.pop() if values else None


def _read_config(weights: dict[str, Tensor], options: dict, kind: str) -> ModelConfig:
    """Sizes from the weights, options from the configuration."""
    layers = len({n.split(".")[1] for n in weights if re.match(r"layers\.\d+\.", n)})
    attention = _attention_layers(options)
    delta = [i for i in range(layers) if i not in attention]
    if not delta or "embeddings.weight" not in weights:
        name = "GatedDeltaNet" if kind == GATED else "DeltaNet"
        raise ValueError(f"state_dict must be of a fla {name}ForCausalLM with a layer of {name}")
    first = f"layers.{delta[0]}.attn."
    sized = {f"{first}b_proj.weight": 2, f"{first}o_norm.weight": 1, "layers.0.mlp.down_proj.weight": 2}
    sized["embeddings.weight"] = 2
    if kind == GATED:
        sized[f"{first}q_proj.weight"] = 2
    if f"{first}q_conv1d.weight" in weights:
        sized[f"{first}q_conv1d.weight"] = 3
    for name, dimensions in sized.items():
        if name not in weights or weights[name].dim() != dimensions:
            got = list(weights[name].shape) if name in weights else "nothing"
            raise ValueError(f"state_dict must have model.{name} of {dimensions} dimensions, got {got}")
    beyond = [i for i in attention if not isinstance(i, int) or not 0 <= i < layers]
    if beyond:
        raise ValueError(f"config.attn.layers must be from 0 to {layers - 1}, got {beyond[0]!r}")
    convolution = weights.get(f"{first}q_conv1d.weight")
    windows = {spec.get("window_size") for spec in attention.values()} - {None}
    window = _the_one(windows, "window_size")
    bases = {_number("attn.rope_theta", spec.get("rope_theta") or 10000.0) for spec in attention.values()}
    return ModelConfig(
        vocab_size=weights["embeddings.weight"].shape[0],
        width=weights["embeddings.weight"].shape[1],
        layers=layers,
        **_heads(weights, first, options, kind),
        attention_heads=_the_one({spec["num_heads"] for spec in attention.values()}, "num_heads"),
        pattern=tuple(_mixer(attention.get(i), kind) for i in range(layers)) if attention else None,
        window=window or ModelConfig.window,
        activation=ACTIVATION[options.get("qk_activation", "silu")],
        qk_norm=QK_NORM[options.get("qk_norm", "l2")],
        conv_size=0 if convolution is None else convolution.shape[-1],
        beta_range=2.0 if options.get("allow_neg_eigval", False) else 1.0,
        output_gate=f"{first}g_proj.weight" in weights,
        hidden=weights["layers.0.mlp.down_proj.weight"].shape[1],
        tie_embeddings=bool(options.get("tie_word_embeddings", False)),
        rope_base=_the_one(bases, "rope_theta") or 10000.0,
        norm_eps=_number("norm_eps", options.get("norm_eps", 1e-6)),
    )


def _heads(weights: dict[str, Tensor], first: str, options: dict, kind: str) -> dict:
    """The fields of `ModelConfig` about heads, and the mixer.  `first` is the prefix of the first recurrent layer."""
    rows, channels = weights[f"{first}b_proj.weight"].shape[0], weights[f"{first}o_norm.weight"].shape[0]
    if kind == DELTA:
        return {"heads": rows, "head_dim": channels}
    # Only the configuration tells how many heads the keys' channels make.
    head_dim, keys = options.get("head_dim", 256), weights[f"{first}q_proj.weight"].shape[0]
    if isinstance(head_dim, bool) or not isinstance(head_dim, int) or head_dim < 1 or keys % head_dim or not keys:
        raise ValueError(f"state_dict must be of config.head_dim = {head_dim!r}, its queries have {keys} channels")
    heads, said = keys // head_dim, _number("expand_v", options.get("expand_v", 2.0))
    if rows % heads:
        raise ValueError(f"state_dict must have a multiple of {heads} value heads to be converted, got {rows}")
    expand_v = said if round(said * head_dim) == channels else channels / head_dim
    sizes = {"heads": heads, "head_dim": head_dim, "value_heads": rows, "expand_v": expand_v}
    return sizes | {"mixer": "gated_delta"}


def _number(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"config.{name} must be a number, got {value!r}")
    return float(value)


def _mixer(attention: dict | None, kind: str) -> str:
    if attention is None:
        return "gated_delta" if kind == GATED else "delta"
    return "attention" if attention.get("window_size") is None else "window"


def _rename(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our names; matrices that older versions or shared heads store otherwise are brought into our form."""
    ours, mixers = {}, config.mixers()
    block = GATED_BLOCK if "gated_delta" in mixers else BLOCK
    for name, tensor in weights.items():
        if name in OUTER:
            ours[OUTER[name]] = tensor
        elif name == "lm_head.weight":
            if not config.tie_embeddings:
                ours["head.weight"] = tensor
        elif re.match(r"layers\.\d+\.", name):
            _, index, part = name.split(".", 2)
            if part not in block:
                raise ValueError(f"state_dict has model.{name}, which has no counterpart here")
            prefix = f"blocks.{index}."
            if part == "mlp.gate_proj.weight" and tensor.shape[:1] == (2 * config.mlp_width(),):
                ours[f"{prefix}mlp.gate.weight"], ours[f"{prefix}mlp.up.weight"] = tensor.chunk(2)
                continue
            if mixers[int(index)] in ("attention", "window") and part in ("attn.k_proj.weight", "attn.v_proj.weight"):
                tensor = _own_heads(tensor, config)
            if part.endswith("_conv1d.weight") and tensor.dim() == 3:
                tensor = tensor.permute(2, 1, 0).contiguous()  # [channels, 1, size] as PyTorch's Conv1d has it
            ours[prefix + block[part]] = tensor
        else:
            raise ValueError(f"state_dict has {name}, which has no counterpart here")
    return ours


def _own_heads(weight: Tensor, config: ModelConfig) -> Tensor:
    """Repeat the rows of each key-value head for every query head that shares it."""
    heads = config.attention_heads or config.heads
    head_dim = config.width // heads
    rows = weight.shape[0] if weight.dim() else 0
    if rows == 0 or rows % head_dim or heads % (rows // head_dim):
        return weight  # of no shape that heads can share; told where shapes are compared
    shared = weight.unflatten(0, (-1, head_dim))
    return shared.repeat_interleave(heads // shared.shape[0], dim=0).flatten(0, 1)
