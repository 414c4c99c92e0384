"""fla's layers on our kernels: `dn_lib.fla.accelerate()`, undone by `dn_lib.fla.restore()`.

flash-linear-attention's DeltaNet and Gated DeltaNet look their operators up in the module that defines the layer.
There they are replaced, for layers that exist already and for those to come; nothing else of fla is touched.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dn_lib.ops import fla as ours
from dn_lib.ops.backend import why_not_auto

_TARGETS = {
    "fla.layers.delta_net": ("chunk_delta_rule", "fused_recurrent_delta_rule"),
    "fla.layers.gated_deltanet": ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"),
}
# Arguments that several operators have, in fla's order.
_STATE = ("scale", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel")
_RAW = ("use_beta_sigmoid_in_kernel", "allow_neg_eigval", "state_v_first")
_GATE = ("use_gate_in_kernel", "A_log", "dt_bias")


class _Operator(NamedTuple):
    """positional: the names of its arguments, in order.  keywords: further ones.  Those of `refused` must be None."""

    function: Callable[..., tuple[Tensor, Tensor | None]]
    positional: tuple[str, ...]
    keywords: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


_OPERATORS = {
    "chunk_delta_rule": _Operator(
        ours.chunk_delta_rule,
        ("q", "k", "v", "beta", *_STATE, "cu_seqlens", "cu_seqlens_cpu"),
        ("chunk_size",),
    ),
    "fused_recurrent_delta_rule": _Operator(
        ours.fused_recurrent_delta_rule, ("q", "k", "v", "beta", *_STATE, "cu_seqlens")
    ),
    "chunk_gated_delta_rule": _Operator(
        ours.chunk_gated_delta_rule,
        (
            *("q", "k", "v", "g", "beta"), *_STATE, *_RAW,
            *("cu_seqlens", "cu_seqlens_cpu", "chunk_indices", "cp_context"),
        ),
        (*_GATE, "chunk_size"),
        ("cp_context",),
    ),
    "fused_recurrent_gated_delta_rule": _Operator(
        ours.fused_recurrent_gated_delta_rule,
        ("q", "k", "v", "g", "gk", "gv", "beta", *_STATE, *_GATE, *_RAW, "cu_seqlens"),
        refused=("gk", "gv"),  # gk: ours has no kernel for a gate per channel, and fla's has
    ),
}  # fmt: skip

# What was replaced: by the layer's module and the function's name, fla's function and what stands in its place.
_replaced: dict[tuple[str, str], tuple[Callable[..., Any], Callable[..., Any]]] = {}
_said: set[str] = set()


def accelerate() -> tuple[str, ...]:
    """Make fla's DeltaNet and Gated DeltaNet layers run on our kernels, until `restore` is called.

    A call that ours cannot take (a head wider than 256 channels, mixed dtypes, an argument that only fla has) is left
    to fla, and a warning says so, once for each reason.  On a CPU our PyTorch forms take what fla's kernels cannot.
    States go from one to the other as they are.  Called again, it changes nothing.

    Returns the names of the functions that are replaced.  Raises ImportError where fla, or both layers, are missing.

    >>> import dn_lib
    >>> dn_lib.fla.accelerate()  # doctest: +SKIP
    ('fla.layers.delta_net.chunk_delta_rule', ..., 'fla.layers.gated_deltanet.fused_recurrent_gated_delta_rule')
    """
    for name, functions in _TARGETS.items():
        module = _layer(name)
        for function in functions if module is not None else ():
            _replace(name, module, function)
    if not _replaced:
        raise ImportError(f"fla must have one of {', '.join(_TARGETS)}, with the operators that they call; it has none")
    return tuple(f"{module}.{function}" for module, function in _replaced)


def restore() -> None:
    """Undo `accelerate`: fla's layers call fla's operators again.  Without `accelerate` it changes nothing.

    What somebody else has put in the place of our function since then is left as it is.

    >>> import dn_lib
    >>> dn_lib.fla.restore()
    """
    for (name, function), (theirs, replacement) in _replaced.items():
        module = importlib.import_module(name)
        if getattr(module, function) is replacement:
            setattr(module, function, theirs)
    _replaced.clear()
    _said.clear()


def _layer(name: str) -> ModuleType | None:
    """The module of a layer; None if this fla has no such layer.  ImportError without fla."""
    if importlib.util.find_spec("fla") is None:
        raise ImportError("fla is not installed: pip install flash-linear-attention")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and name.startswith(error.name) and error.name != "fla":
            return None
        raise


def _replace(name: str, module: ModuleType | None, function: str) -> None:
    theirs = getattr(module, function, None)
    known = _replaced.get((name, function))
    if theirs is None or (known is not None and theirs is known[1]):
        return
    replacement = _in_place_of(theirs, _OPERATORS[function], function)
    setattr(module, function, replacement)
    _replaced[name, function] = theirs, replacement


def _in_place_of(theirs: Callable[..., Any], operator: _Operator, name: str) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        problem = _why_theirs(operator, args, kwargs)
        if problem is None:
            return operator.function(*args, **kwargs)
        if problem not in _said:
            _said.add(problem)
            warnings.warn(f"{name} is left to fla: {problem}", stacklevel=2)
        return theirs(*args, **kwargs)

    return replacement


def _why_theirs(operator: _Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why a call is left to fla; None where ours takes it."""
    if len(args) > len(operator.positional):
        return f"it is called with {len(args)} positional arguments, and ours has {len(operator.positional)}"
    given = dict(zip(operator.positional, args, strict=False)) | kwargs
    if given.get("head_first") in (None, False):  # of old versions; there is no other layout
        given.pop("head_first", None)
    for name, value in given.items():
        if name in operator.refused and value is not None:
            return f"ours does not take {name}"
        if name not in operator.positional and name not in operator.keywords:
            return f"ours does not know the argument {name}"
    q, k, v, beta = (given.get(name) for name in ("q", "k", "v", "beta"))
    if not all(isinstance(x, Tensor) and x.ndim == 4 for x in (q, k, v)):
        return "q, k and v are not tensors of four dimensions"
    assert isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v have several dtypes, {q.dtype}, {k.dtype} and {v.dtype}"
    if isinstance(beta, Tensor) and beta.ndim == 4:
        return "beta has a strength for each value channel"
    if q.device.type == "cuda":
        dtype = q.dtype
        if torch.is_autocast_enabled("cuda") and dtype != torch.float64:
            dtype = torch.get_autocast_dtype("cuda")
        return why_not_auto(q.device, dtype, max(q.shape[-1], v.shape[-1]))
    return None
