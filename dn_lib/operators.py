"""Every operator of the package, declared once: tests and benchmarks read it from here.

    >>> rule = OPERATORS["delta_rule"]
    >>> *inputs, state = rule.sample(1, 40, 2, 16, 8, seed=0)
    >>> o, final, size = rule.reference(*inputs)
    >>> [round(relative_error(form(*inputs)[0], o, size), 5) for form in rule.forms.values()]
    [0.0, 0.0, 0.0, 0.0]

To add one, write an `Operator` and put it into OPERATORS; CONTRIBUTING.md says what else there is to do.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dn_lib import cost, ops
from dn_lib.cost import Cost, Shape
from dn_lib.forms.chunkwise_backward import reversible_chunkwise_delta_rule
from dn_lib.forms.common import on_heads
from dn_lib.forms.delta_rule import delta_rule_step
from dn_lib.forms.dplr import chunkwise_dplr, recurrent_dplr
from dn_lib.forms.gated import (
    chunkwise_gated_delta_rule,
    chunkwise_gated_linear_attention,
    parallel_gated_delta_rule,
    parallel_gated_linear_attention,
    recurrent_gated_delta_rule,
    recurrent_gated_linear_attention,
)
from dn_lib.forms.linear_attention import (
    chunkwise_linear_attention,
    parallel_linear_attention,
    recurrent_linear_attention,
)
from dn_lib.ops.backend import using
from dn_lib.testing import (
    delta_rule_inputs,
    delta_rule_reference,
    gated_delta_rule_reference,
    gated_inputs,
    gated_linear_attention_reference,
    linear_attention_inputs,
    linear_attention_reference,
    recurrence,
    relative_error,  # noqa: F401 - of the example
)

Function = Callable[..., tuple[Any, ...]]
OPTIONS = ("scale", "initial_state", "cu_seqlens", "qk_l2norm", "chunk_size")
HALF = (torch.bfloat16, torch.float16)


def resolve(function: Function | str) -> Function:
    """The function, or what a name `"module:function"` stands for, whose module is imported only now."""
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Form:
    """One way to compute an operator, on tensors `[B, L, H, d]` and gates `[B, L, H]`.

    run: the function, or its name `"module:function"` where it must not be imported with this module (Triton may be
        missing).  It takes the operator's inputs, then options by keyword, and returns o, the final state, and maybe
        more.
    takes: which of OPTIONS it has; what it has not it computes as with the option's default.
    differentiable: whether autograd gives the gradients of all inputs and of the initial state.
    dtypes: of its inputs.
    triton: whether it needs Triton, and a GPU or the interpreter.
    cost: the kernels that it launches for a problem, without gradients.  training: the same for a call that is
        differentiated, forward and backward.
    flops: what its matrix products and triangular solves take in plain PyTorch, where a formula says so.
    """

    run: Function | str
    takes: tuple[str, ...] = OPTIONS
    differentiable: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, *HALF)
    triton: bool = False
    cost: Callable[[Shape], tuple[Cost, ...]] | None = None
    training: Callable[[Shape], tuple[tuple[Cost, ...], tuple[Cost, ...]]] | None = None
    flops: Callable[[Shape], int] | None = None

    def __post_init__(self):
        unknown = [name for name in self.takes if name not in OPTIONS]
        if unknown:
            raise ValueError(f"takes must hold names of {', '.join(OPTIONS)}, got {', '.join(unknown)}")

    def __call__(self, *inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """(o, final state).  Raises TypeError for an option that the form does not take, unless it is None."""
        refused = [name for name, value in options.items() if value is not None and name not in self.takes]
        if refused:
            raise TypeError(f"this form does not take {', '.join(refused)}")
        o, state, *_ = resolve(self.run)(*inputs, **{name: options[name] for name in options if name in self.takes})
        return o, state

    def why_not(self, device: torch.device) -> str | None:
        """Why it cannot run on a device, in words; None if it can."""
        return ops.triton_problem(device) if self.triton else None


@dataclass(frozen=True)
class Peer:
    """Another package's function for the same operator; nothing is imported before `load`.

    function: `"module:function"`.  arguments: our names of inputs and options -> the peer's; what is not listed has
    the same name, and what maps to None is not passed.  constants: what else is passed at every call.
    """

    function: str
    arguments: Mapping[str, str | None] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> Function:
        """The peer's function.  Raises ImportError where the package is missing."""
        return resolve(self.function)

    def keywords(self, **given: Any) -> dict[str, Any]:
        """The keyword arguments with which the peer is called for our inputs and options.

        >>> Peer("math:hypot", {"qk_l2norm": "norm", "chunk_size": None}).keywords(q=1, qk_l2norm=True, chunk_size=16)
        {'q': 1, 'norm': True}
        """
        names = {name: self.arguments.get(name, name) for name in given}
        return {theirs: given[ours] for ours, theirs in names.items() if theirs is not None} | dict(self.constants)


@dataclass(frozen=True)
class Operator:
    """A map of sequences to sequences, with everything that a test or a benchmark has to know of it.

    name: as its public function, if it has one.
    inputs: their names, in order: q, k and v, then the gates.
    sample: `sample(B, L, H, d_k, d_v, *, seed, dtype, state, bias, equal, ...)` returns the inputs and an initial
        state, None unless `state` says of how many sequences.  See `dn_lib.testing`.
    reference: `reference(*inputs, *, scale, initial_state, cu_seqlens, qk_l2norm)` returns o, the final state and the
        size of o's terms, by the recurrence in float64.
    forms: in plain PyTorch, by name.  kernels: in Triton, by name.
    peers: other packages' functions, by the package's name.
    length: the only length that it takes, or None.
    """

    name: str
    inputs: tuple[str, ...]
    sample: Callable[..., tuple[Tensor | None, ...]]
    reference: Callable[..., tuple[Tensor, Tensor, float]]
    forms: Mapping[str, Form]
    kernels: Mapping[str, Form] = field(default_factory=dict)
    peers: Mapping[str, Peer] = field(default_factory=dict)
    length: int | None = None

    def every_form(self) -> Iterator[tuple[str, Form]]:
        """Names and forms, those in PyTorch first."""
        yield from self.forms.items()
        yield from self.kernels.items()

    def compulsory(self, shape: Shape, *, backward: bool = False) -> tuple[Cost, ...]:
        """What no form can avoid: each input read once and each output written once."""
        return cost.compulsory(shape, inputs=self.inputs, backward=backward)


# --- Linear attention -----------------------------------------------------------------------------------
_PLAIN = ("scale", "initial_state", "cu_seqlens", "qk_l2norm")

LINEAR_ATTENTION = Operator(
    name="linear_attention",
    inputs=("q", "k", "v"),
    sample=partial(linear_attention_inputs, unit=True),
    reference=linear_attention_reference,
    forms={
        "recurrent": Form(partial(on_heads, recurrent_linear_attention), takes=_PLAIN),
        "parallel": Form(partial(on_heads, parallel_linear_attention), takes=_PLAIN),
        "chunkwise": Form(
            partial(on_heads, chunkwise_linear_attention), flops=lambda s: cost.total_flops(cost.linear_attention(s))
        ),
    },
    kernels={
        "chunk kernel": Form(
            "dn_lib.kernels.ladder:linear_attention",
            takes=("scale", "chunk_size"),
            differentiable=False,
            dtypes=(torch.float32, *HALF),
            triton=True,
            cost=cost.linear_attention,
        ),
        "triton": Form(
            partial(ops.linear_attention, backend="triton", output_final_state=True),
            dtypes=(torch.float32, *HALF),
            triton=True,
            cost=partial(cost.gated, gate=False, erase=False),
            training=lambda s: (
                cost.gated(s, gate=False, erase=False, save=True),
                cost.gated_backward(s, gate=False, erase=False),
            ),
        ),
    },
    peers={
        "fla": Peer(
            "fla.ops.linear_attn:chunk_linear_attn",
            {"cu_seqlens": None, "qk_l2norm": None, "chunk_size": None},
            {"normalize": False, "output_final_state": True},
        )
    },
)


# --- The delta rule -------------------------------------------------------------------------------------
def _backend(name: str) -> Function:
    return partial(ops.delta_rule, backend=name, output_final_state=True)


def _delta_rule_training(s: Shape) -> tuple[tuple[Cost, ...], tuple[Cost, ...]]:
    """Small heads in half precision go back in one kernel; the others save the states and take two."""
    if s.element == 2 and max(s.d_k, s.d_v) <= 64:
        return cost.two_kernels(s, save="Vn"), cost.fused_backward(s)
    return cost.two_kernels(s, save="Vn states"), cost.backward(s)


DELTA_RULE = Operator(
    name="delta_rule",
    inputs=("q", "k", "v", "beta"),
    sample=delta_rule_inputs,
    reference=delta_rule_reference,
    forms={
        "recurrent": Form(_backend("recurrent"), takes=_PLAIN),
        "parallel": Form(_backend("parallel"), takes=_PLAIN),
        "chunkwise": Form(_backend("chunkwise"), flops=cost.chunkwise_delta_rule_flops),
        "reversible": Form(partial(on_heads, reversible_chunkwise_delta_rule)),
    },
    kernels={
        "triton": Form(
            _backend("triton"),
            dtypes=(torch.float32, *HALF),
            triton=True,
            cost=cost.two_kernels,
            training=_delta_rule_training,
        ),
        "in steps": Form(
            "dn_lib.kernels.ladder:delta_rule_in_steps",
            takes=("scale", "chunk_size"),
            differentiable=False,
            dtypes=(torch.float32, *HALF),
            triton=True,
            cost=cost.delta_rule_in_steps,
        ),
        "in one": Form(
            "dn_lib.kernels.ladder:delta_rule_in_one",
            takes=("scale", "chunk_size"),
            differentiable=False,
            dtypes=(torch.float32, *HALF),
            triton=True,
            cost=cost.fused,
        ),
    },
    peers={
        "fla": Peer(
            "fla.ops.delta_rule:chunk_delta_rule",
            {"qk_l2norm": "use_qk_l2norm_in_kernel", "chunk_size": None},
            {"output_final_state": True},
        )
    },
)


# --- One token of the delta rule ------------------------------------------------------------------------
def _one_token(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *, initial_state=None, scale=None) -> tuple:
    state = _state(q, v, initial_state)
    o, state = delta_rule_step(q[:, 0], k[:, 0], v[:, 0], beta[:, 0], state, scale=scale)
    return o[:, None], state


def _in_place(backend: str, q, k, v, beta, *, initial_state=None, scale=None, qk_l2norm=False) -> tuple:
    state = _state(q, v, initial_state).clone()
    with torch.no_grad(), using(auto=backend):
        o = ops.decode_delta_rule(q[:, 0], k[:, 0], v[:, 0], beta[:, 0], state, scale=scale, qk_l2norm=qk_l2norm)
    return o[:, None], state


def _state(q: Tensor, v: Tensor, given: Tensor | None) -> Tensor:
    if given is not None:
        return given
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=dtype, device=q.device)


DECODE_DELTA_RULE = Operator(
    name="decode_delta_rule",
    inputs=DELTA_RULE.inputs,
    sample=delta_rule_inputs,
    reference=delta_rule_reference,
    forms={
        "step": Form(_one_token, takes=("scale", "initial_state")),
        "in place": Form(
            partial(_in_place, "chunkwise"), takes=("scale", "initial_state", "qk_l2norm"), differentiable=False
        ),
    },
    kernels={
        "triton": Form(
            partial(_in_place, "triton"),
            takes=("scale", "initial_state", "qk_l2norm"),
            differentiable=False,
            dtypes=(torch.float32, *HALF),
            triton=True,
            cost=cost.decode,
        )
    },
    peers={
        "fla": Peer(
            "fla.ops.delta_rule:fused_recurrent_delta_rule",
            {"qk_l2norm": "use_qk_l2norm_in_kernel", "chunk_size": None},
            {"output_final_state": True},
        )
    },
    length=1,
)


# --- Gates ----------------------------------------------------------------------------------------------
# Under the field's names: "simple_gla" is linear attention with a gate per token, "gla" with one per key channel;
# "gated_delta_rule" and "kda" are the delta rule with the same.
_GATED_LINEAR_FORMS = {
    "recurrent": Form(partial(on_heads, recurrent_gated_linear_attention), takes=_PLAIN),
    "parallel": Form(partial(on_heads, parallel_gated_linear_attention), takes=_PLAIN),
    "chunkwise": Form(partial(on_heads, chunkwise_gated_linear_attention)),
}
_GATED_DELTA_FORMS = {
    "recurrent": Form(partial(on_heads, recurrent_gated_delta_rule), takes=_PLAIN),
    "parallel": Form(partial(on_heads, parallel_gated_delta_rule), takes=_PLAIN),
    "chunkwise": Form(partial(on_heads, chunkwise_gated_delta_rule)),
}
_FLA_GATED = {"qk_l2norm": "use_qk_l2norm_in_kernel", "chunk_size": None}
_FLA_UNERASED = {"qk_l2norm": None, "chunk_size": None}
_FLA_STATE = {"output_final_state": True}
_linear_inputs = partial(linear_attention_inputs, unit=True)


def _gated_kernels(operator: Function, erase: bool) -> dict[str, Form]:
    """The kernels of the family, with a gate per token."""
    return {
        "triton": Form(
            partial(operator, backend="triton", output_final_state=True),
            dtypes=(torch.float32, *HALF),
            triton=True,
            cost=partial(cost.gated, erase=erase),
            training=lambda s: (cost.gated(s, erase=erase, save=True), cost.gated_backward(s, erase=erase)),
        )
    }


SIMPLE_GLA = Operator(
    name="simple_gla",
    inputs=("q", "k", "v", "g"),
    sample=partial(gated_inputs, _linear_inputs),
    reference=gated_linear_attention_reference,
    forms=_GATED_LINEAR_FORMS,
    kernels=_gated_kernels(ops.linear_attention, erase=False),
    peers={"fla": Peer("fla.ops.simple_gla:chunk_simple_gla", _FLA_UNERASED, _FLA_STATE)},
)

GLA = Operator(
    name="gla",
    inputs=("q", "k", "v", "g_channels"),
    sample=partial(gated_inputs, _linear_inputs, channels=True),
    reference=gated_linear_attention_reference,
    forms=_GATED_LINEAR_FORMS,
    kernels={
        "triton": Form(
            partial(ops.linear_attention, backend="triton", output_final_state=True),
            dtypes=(torch.float32, *HALF),
            triton=True,
            cost=cost.gated_by_channel,
            training=lambda s: (cost.gated_by_channel(s), cost.gated_by_channel_backward(s)),
        )
    },
    peers={"fla": Peer("fla.ops.gla:chunk_gla", {**_FLA_UNERASED, "g_channels": "g"}, _FLA_STATE)},
)

GATED_DELTA_RULE = Operator(
    name="gated_delta_rule",
    inputs=("q", "k", "v", "beta", "g"),
    sample=partial(gated_inputs, delta_rule_inputs),
    reference=gated_delta_rule_reference,
    forms=_GATED_DELTA_FORMS,
    kernels=_gated_kernels(ops.gated_delta_rule, erase=True),
    peers={"fla": Peer("fla.ops.gated_delta_rule:chunk_gated_delta_rule", _FLA_GATED, _FLA_STATE)},
)

KDA = Operator(
    name="kda",
    inputs=("q", "k", "v", "beta", "g_channels"),
    sample=partial(gated_inputs, delta_rule_inputs, channels=True),
    reference=gated_delta_rule_reference,
    forms=_GATED_DELTA_FORMS,
    peers={"fla": Peer("fla.ops.kda:chunk_kda", {**_FLA_GATED, "g_channels": "g"}, _FLA_STATE)},
)


# --- A diagonal plus a matrix of rank one ------------------------------------------------------------------
def _dplr_inputs(
    *sizes: int, seed: int = 0, dtype: torch.dtype = torch.float64, device: str | torch.device = "cpu", **options: Any
) -> tuple[Tensor | None, ...]:
    """Keys that erase beside those that are written, as RWKV-7 has them: a = -kappa, b = s kappa with s in (0, 1).

    >>> [list(x.shape) for x in _dplr_inputs(2, 7, 3, 4, 5, state=2)][3:]
    [[2, 7, 3, 4], [2, 7, 3, 4], [2, 7, 3, 4], [2, 3, 4, 5]]
    """
    placed: dict[str, Any] = {"dtype": dtype, "device": device}
    q, k, v, g, state = gated_inputs(_linear_inputs, *sizes, channels=True, seed=seed, **placed, **options)
    alike = {name: options[name] for name in ("bias", "equal", "drawn_on") if name in options}
    kappa = _linear_inputs(*sizes, seed=seed + 1, **placed, **alike)[1]
    # Numbers between 0 and 1.
    strength = linear_attention_inputs(*sizes, seed=seed + 2, **placed, **alike)[0].sigmoid()
    return q, k, v, -kappa, strength * kappa, g, state


def _dplr_update(S: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    return g.exp() * S + b * (a.mT @ S) + k * v


DPLR = Operator(
    name="dplr",
    inputs=("q", "k", "v", "a", "b", "g_channels"),
    sample=_dplr_inputs,
    reference=partial(recurrence, _dplr_update),
    forms={
        "recurrent": Form(partial(on_heads, recurrent_dplr), takes=_PLAIN),
        "chunkwise": Form(partial(on_heads, chunkwise_dplr)),
    },
)

_ALL = (LINEAR_ATTENTION, DELTA_RULE, DECODE_DELTA_RULE, SIMPLE_GLA, GLA, GATED_DELTA_RULE, KDA, DPLR)
OPERATORS: dict[str, Operator] = {x.name: x for x in _ALL}
