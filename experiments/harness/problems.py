"""The inputs of a call, the forms that take them, and the settings under which they are called.

Inputs, references and forms are those of the registry (`dn_lib.operators`); the delta rule's where nothing is said.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import dn_lib
from dn_lib import cost, operators
from dn_lib.kernels import plan, rules
from dn_lib.layers.decay import log_gates, new_rates, new_step_biases
from dn_lib.operators import DELTA_RULE, Operator
from dn_lib.testing import laid_out, offsets, output_gradients

INPUTS = "q, v, do standard normal, k of norm 1, beta uniform in [0, 1]; drawn in float64, then rounded"
COMPULSORY = (
    "forward reads q, k, v, beta and writes o: B L H (2 d_k + 2 d_v + 1) e bytes, e the size of an element; "
    "forward+backward adds reading q, k, v, beta, do and writing dq, dk, dv, dbeta: B L H (4 d_k + 3 d_v + 2) e "
    "more (dn_lib.cost.compulsory)"
)


@dataclass
class Problem:
    """One call: an operator's inputs, q, k, v `[B, L, H, d]` and gates, and what goes with them.

    `do` and `dstate` are the gradients of the output and of the final state.
    """

    inputs: Sequence[Tensor]
    do: Tensor
    initial_state: Tensor | None = None
    dstate: Tensor | None = None
    cu_seqlens: Tensor | None = None
    norm: bool = False
    chunk: int | None = None
    scale: float | None = None
    operator: Operator = DELTA_RULE

    @property
    def q(self) -> Tensor:
        return self.inputs[0]

    @property
    def k(self) -> Tensor:
        return self.inputs[1]

    @property
    def v(self) -> Tensor:
        return self.inputs[2]

    @property
    def beta(self) -> Tensor:
        return self.inputs[self.operator.inputs.index("beta")]

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.inputs] if self.initial_state is None else [*self.inputs, self.initial_state]

    @property
    def options(self) -> dict[str, Any]:
        """Those that are set, by the names that the registry's forms have for them."""
        every = {
            "scale": self.scale,
            "initial_state": self.initial_state,
            "cu_seqlens": self.cu_seqlens,
            "qk_l2norm": self.norm or None,
            "chunk_size": self.chunk,
        }
        return {name: x for name, x in every.items() if x is not None}

    def requiring_grad(self) -> Problem:
        for x in self.leaves:
            x.requires_grad_()
        return self

    def detached(self) -> Problem:
        """On the same memory, without gradients."""
        first = None if self.initial_state is None else self.initial_state.detach()
        return replace(self, inputs=[x.detach() for x in self.inputs], initial_state=first)

    def double(self) -> Problem:
        """The same numbers in float64, copied; the chunk is the form's own."""
        inputs = [x.detach().double().contiguous() for x in self.inputs]
        names = ("do", "initial_state", "dstate")
        wide = {n: x.detach().double() for n in names if (x := getattr(self, n)) is not None}
        return replace(self, inputs=inputs, chunk=None, **wide).requiring_grad()


def gates_of_a_new_layer(like: Tensor, seed: int) -> Tensor:
    """Log gates as Gated DeltaNet's layer has them before training, `[*tokens, H]`: weak in most heads.

    A is uniform in (0, 16], softplus of the bias between 0.001 and 0.1, and the token's part standard normal.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rates, biases = new_rates(like.shape[-1], 0.0, 16.0), new_step_biases(like.shape[-1])
        drawn = log_gates(torch.randn(like.shape), rates, biases)[1]
    return drawn.detach().to(like.device, like.dtype)


def gates_of_benchmarks(like: Tensor, seed: int) -> Tensor:
    """Log gates as fla's benchmarks draw them, the log of a sigmoid of standard normals: strong, 1/2 in the mean."""
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
    return F.logsigmoid(drawn).to(like.device, like.dtype)


GATES: dict[str, Callable[[Tensor, int], Tensor]] = {"layer": gates_of_a_new_layer, "strong": gates_of_benchmarks}


def draw(
    B: int, L: int, H: int, d_k: int, d_v: int, dtype: torch.dtype, device: str, *, operator: Operator = DELTA_RULE,
    seed: int = 0, norm: bool = False, state: bool = False, dstate: bool = False, lengths: Sequence[int] | None = None,
    chunk: int | None = None, scale: float | None = None, layout: str = "contiguous", drawn_on: str | None = None,
    gates: str | None = None, **sampled: Any,
) -> Problem:  # fmt: skip
    """A problem with the inputs of the operator's own sampler; `sampled` are options of that.

    gates: one of `GATES` for gates as a layer has them, since the sampler's hold zeros, which not every peer takes.

    norm: the operator normalises, so keys are left as they are.  lengths: of the sequences packed along L, whose sum L
    must be.  layout: one of `dn_lib.testing.LAYOUTS`.  drawn_on: by default the device, which is fast; what is drawn on
    the CPU is the same on every machine.
    """
    shape, N = (B, L, H, d_k, d_v), B if lengths is None else len(lengths)
    where = {"seed": seed, "dtype": dtype, "device": device, "drawn_on": device if drawn_on is None else drawn_on}
    if norm:
        sampled = {"unit": False} | sampled
    if "beta" in operator.inputs:
        sampled = {"beta_max": 1.0} | sampled
    *inputs, first = operator.sample(*shape, state=N if state else None, **where, **sampled)
    if gates is not None and "g" in operator.inputs:
        at = operator.inputs.index("g")
        sample = inputs[at]
        assert sample is not None  # an input of the operator
        inputs[at] = GATES[gates](sample, seed)
    do, last = output_gradients(*shape, state=N if dstate else None, **where)
    return Problem(
        [laid_out(x, layout) for x in inputs if x is not None],
        laid_out(do, layout),
        initial_state=first,
        dstate=last,
        cu_seqlens=None if lengths is None else offsets(lengths, device=device),
        norm=norm,
        chunk=chunk,
        scale=scale,
        operator=operator,
    ).requiring_grad()


# --- Forms ---------------------------------------------------------------------------------------------------------

Form = Callable[[Problem], tuple[Tensor, Tensor | None]]


def operator(p: Problem, backend: str = "triton") -> tuple[Tensor, Tensor | None]:
    """`dn_lib.delta_rule` by backend."""
    q, k, v, beta = p.inputs
    return dn_lib.delta_rule(
        q, k, v, beta, initial_state=p.initial_state, output_final_state=p.dstate is not None,
        cu_seqlens=p.cu_seqlens, qk_l2norm=p.norm, chunk_size=p.chunk if backend == "triton" else None,
        backend=backend,
    )  # fmt: skip


pytorch_form = functools.partial(operator, backend="chunkwise")


def recurrent_form(p: Problem) -> tuple[Tensor, Tensor | None]:
    """Our recurrent kernel; forward only."""
    q, k, v, beta = p.inputs
    return dn_lib.fused_recurrent_delta_rule(
        q, k, v, beta, initial_state=p.initial_state, use_qk_l2norm_in_kernel=p.norm, cu_seqlens=p.cu_seqlens
    )


def softmax_form(p: Problem, kernel: str = "FLASH_ATTENTION") -> tuple[Tensor, None]:
    """Causal softmax attention on the same q, k and v: another function, for its cost alone.

    kernel: which of torch's, FLASH_ATTENTION or CUDNN_ATTENTION; raises RuntimeError where that cannot take the call.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, kernel)):
        q, k, v = (x.transpose(1, 2) for x in (p.q, p.k, p.v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2), None


def registered(form: operators.Form) -> Form:
    """A form of the registry.  Where it can leave the final state out, it does unless that has a gradient."""
    can_leave_out = "output_final_state" in inspect.signature(operators.resolve(form.run)).parameters

    def run(p: Problem) -> tuple[Tensor, Tensor | None]:
        if can_leave_out and p.dstate is None:
            o, state, *_ = operators.resolve(form.run)(*p.inputs, **p.options, output_final_state=False)
            return o, state
        return form(*p.inputs, **p.options)

    return run


_load = functools.cache(operators.resolve)


def peer_form(p: Problem, name: str = "fla") -> tuple[Tensor, Tensor | None]:
    """Another package's function for the problem's operator, as the registry says how to call it.

    It leaves the final state out unless that has a gradient, as ours does.
    """
    peer = p.operator.peers[name]
    given = dict(zip(p.operator.inputs, p.inputs, strict=True)) | p.options | {"qk_l2norm": p.norm}
    keywords = peer.keywords(**given)
    if "output_final_state" in peer.constants:
        keywords["output_final_state"] = p.dstate is not None
    o, state, *_ = _load(peer.function)(**keywords)
    return o, state


def forward(form: Form, p: Problem) -> Tensor:
    with torch.no_grad():
        return form(p)[0]


def forward_results(form: Form, p: Problem) -> dict[str, Tensor]:
    """Output and, where it is returned, the final state, without gradients."""
    with torch.no_grad():
        o, state = form(p)
    return {"o": o} if state is None else {"o": o, "state": state}


def forward_backward(form: Form, p: Problem, leaves: list[Tensor] | None = None) -> dict[str, Tensor]:
    """Output and gradients by name, through `torch.autograd.grad`: nothing is accumulated into `.grad`."""
    o, state = form(p)
    leaves = p.leaves if leaves is None else leaves
    outputs, gradients = [o], [p.do]
    if p.dstate is not None:
        if state is None:
            raise ValueError("dstate is given, but the form returns no final state")
        outputs, gradients = [o, state], [p.do, p.dstate]
    found = (o, *torch.autograd.grad(outputs, leaves, gradients))
    names = ("o", *(f"d{name}" for name in p.operator.inputs), "dinitial")
    results = dict(zip(names, found, strict=False))
    return results if len(outputs) == 1 else results | {"state": outputs[1]}


def segments_of(B: int, L: int, H: int, d: int, dtype: torch.dtype, device: str) -> int:
    """Into how many segments the operator's rule splits each sequence of this shape."""
    x = torch.empty(B, L, H, d, dtype=dtype, device="meta")
    with plan.using(target=plan.target_of(torch.device(device))):
        return plan.plan_call(x, x, x, chunk=rules.default_chunk(dtype)).layout.segments


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Within it, or in a function that it decorates, `torch.set_float32_matmul_precision(name)` holds.

    "highest" is IEEE, "high" allows TF32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def compulsory_bytes(p: Problem) -> tuple[int, int]:
    """(forward, forward and backward) of a call without states."""
    B, L, H, d_k = p.q.shape
    shape = cost.Shape(B, L, H, d_k, p.v.shape[-1], element=p.q.element_size())
    forward, both = (cost.total_bytes(p.operator.compulsory(shape, backward=b)) for b in (False, True))
    return forward, both
