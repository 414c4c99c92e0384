"""LoRA (Hu et al. 2021): a trained model is fine-tuned through thin matrices beside its own, which stay as they are."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dn_lib.forms.common import check_integer, check_positive
from dn_lib.stored import read_tensors


class LoRALinear(nn.Linear):
    """A linear map with an adapter: y = W x + (alpha / r) B A x, where W is frozen (eq-s4-lora, its c is alpha).

    weight `[out, in]` is that of `linear`, the same tensor under the same name; `down` (A) `[r, in]` starts uniform,
    as a linear layer does, and `up` (B) `[out, r]` at 0, so that the layer starts as it was.

        >>> linear = nn.Linear(6, 4)
        >>> x = torch.randn(3, 6)
        >>> torch.equal(LoRALinear(linear, rank=2, alpha=2.0)(x), linear(x))
        True
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        check_integer("rank", rank)
        check_positive("alpha", alpha)
        self.weight, self.bias, self.factor = linear.weight, linear.bias, alpha / rank
        self.down = nn.Parameter(linear.weight.new_empty(rank, self.in_features))
        self.up = nn.Parameter(linear.weight.new_zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias) + self.factor * F.linear(F.linear(input, self.down), self.up)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain linear layer that does the same: its weight is W + (alpha / r) B A, in the memory of W."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        self.weight += self.factor * self.up @ self.down
        plain.weight, plain.bias = self.weight, self.bias
        return plain


def _adapters(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    if adapters := _adapters(model):
        raise ValueError(f"model must have no adapters yet, it has one at {next(iter(adapters))}")
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _put(model: nn.Module, adapters: dict[str, LoRALinear]) -> list[str]:
    """Put the adapters in their places; they alone can be trained then."""
    model.requires_grad_(False)
    for name, adapter in adapters.items():
        model.set_submodule(name, adapter)
        for parameter in (adapter.down, adapter.up):
            parameter.requires_grad_(True)
    return list(adapters)


def add_lora(
    model: nn.Module, names: Collection[str] = ("query", "key", "value"), *, rank: int = 8, alpha: float | None = None
) -> list[str]:
    """Put a `LoRALinear` in the place of every linear layer whose name ends in one of `names`, and freeze all else.

    The model is changed in place; returns the full names of the layers. alpha: 2 `rank` if None, the factor on B A then
    being 2. Raises ValueError where a name is that of no linear layer, or the model has adapters already.

        >>> model = nn.ModuleDict({"query": nn.Linear(8, 8), "value": nn.Linear(8, 8)})
        >>> add_lora(model, ["query"], rank=2)
        ['query']
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['query.down', 'query.up']
    """
    linear = _linear_layers(model)
    missing = [name for name in names if not any(f".{full}".endswith(f".{name}") for full in linear)]
    if missing or not names:
        raise ValueError(f"names must be those of linear layers, got {missing[0] if missing else list(names)!r}")
    alpha = 2.0 * rank if alpha is None else alpha
    found = {full: m for full, m in linear.items() if any(f".{full}".endswith(f".{name}") for name in names)}
    return _put(model, {full: LoRALinear(module, rank, alpha) for full, module in found.items()})


def merge_lora(model: nn.Module) -> list[str]:
    """Add every adapter into its weight and take it away; all parameters can be trained again. Returns the names."""
    adapters = _adapters(model)
    for name, adapter in adapters.items():
        model.set_submodule(name, adapter.merged())
    model.requires_grad_(True)
    return list(adapters)


def save_lora(path: str | os.PathLike, model: nn.Module) -> None:
    """Write the adapters of `model`, and nothing else, as safetensors; their factors go into the metadata.

    Raises ValueError where the model has none.
    """
    from safetensors.torch import save_file

    adapters = _adapters(model)
    if not adapters:
        raise ValueError("model must have adapters to save, it has none")
    tensors = {f"{n}.{part}": getattr(m, part).detach().cpu() for n, m in adapters.items() for part in ("down", "up")}
    save_file(tensors, path, metadata={name: repr(module.factor) for name, module in adapters.items()})


def load_lora(path: str | os.PathLike, model: nn.Module) -> list[str]:
    """Give `model` the adapters that `save_lora` wrote, on the layers where they were; returns their names.

    All other parameters are frozen, as by `add_lora`. Raises ValueError for a file that does not fit the model.
    """
    tensors, factors = read_tensors(Path(path))
    layers = _linear_layers(model)
    adapters: dict[str, LoRALinear] = {}
    for name, factor in factors.items():
        down, up = (tensors.get(f"{name}.{part}") for part in ("down", "up"))
        linear = layers.get(name)
        if linear is None or down is None or up is None or linear.weight.shape != (up.shape[0], down.shape[1]):
            raise ValueError(f"{path} must hold adapters of this model, {name!r} does not fit")
        adapters[name] = LoRALinear(linear, len(down), float(factor) * len(down))
        for part, stored in (("down", down), ("up", up)):
            getattr(adapters[name], part).data.copy_(stored)
    return _put(model, adapters)
