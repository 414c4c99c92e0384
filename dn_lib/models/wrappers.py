"""What torch.compile, DDP, FSDP and activation checkpointing put around a model, and the way through it."""

from __future__ import annotations

from torch import nn

PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)
COMPILED = "_orig_mod"  # the name under which `torch.compile` keeps the module that it wraps
WRAPPERS = (COMPILED, "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""The names of the wrapped module in its wrapper. "module" is also an ordinary name, except in `PARALLEL`."""


def wrapped_child(module: nn.Module) -> str | None:
    """The name under which a wrapper keeps the module that it wraps; None for a module that is no wrapper.

    >>> wrapped_child(nn.DataParallel(nn.Linear(2, 2))), wrapped_child(nn.Linear(2, 2))
    ('module', None)
    """
    if isinstance(module, PARALLEL):
        return "module"
    return next((name for name in WRAPPERS if name in module._modules and name != "module"), None)


def inner(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile` and DDP, however they are nested; `model` itself if it is bare.

    Activation checkpointing stays on: it changes how the module is computed, and FSDP shards it with its wrapper.

    >>> layer = nn.Linear(2, 2)
    >>> inner(nn.DataParallel(layer)) is inner(layer) is layer
    True
    """
    while (name := wrapped_child(model)) in (COMPILED, "module"):
        model = model.get_submodule(name)
    return model


def plain_name(model: nn.Module, name: str) -> str:
    """The name of a parameter or buffer of `model` without what wrappers put into it, at any depth.

    A child that is really called "module" keeps it.

    >>> plain_name(nn.Sequential(nn.DataParallel(nn.Linear(2, 2))), "0.module.weight")
    '0.weight'
    """
    kept, module = [], model
    for part in name.split("."):
        if part != wrapped_child(module):
            kept.append(part)
        child = module._modules.get(part)
        module = module if child is None else child
    return ".".join(kept)


def name_without_wrappers(name: str) -> str:
    """`plain_name` where the model is not at hand, but known to have no child called "module".

    >>> name_without_wrappers("module._orig_mod.embedding.weight")
    'embedding.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
