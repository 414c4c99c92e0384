"""The operator's inputs, the forms that take them, and the settings under which they are called."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import dn_lib
from dn_lib import cost
from dn_lib.kernels import plan, rules

OUTPUTS = ("o", "dq", "dk", "dv", "dbeta", "dinitial", "state")
INPUTS = "q, k normalised in float32 then cast; beta = sigmoid(normal); v, do normal"
COMPULSORY = (
    "forward reads q, k, v, beta and writes o: B L H (2 d_k + 2 d_v + 1) e bytes, e the size of an element; "
    "forward+backward adds reading q, k, v, beta, do and writing dq, dk, dv, dbeta: B L H (4 d_k + 3 d_v + 2) e "
    "more (dn_lib.cost.compulsory)"
)


@dataclass
class Problem:
    """One call: tensors `[B, L, H, d]` and what goes with them; `dstate` is the final state's gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    do: Tensor
    initial_state: Tensor | None = None
    dstate: Tensor | None = None
    cu_seqlens: Tensor | None = None
    norm: bool = False
    chunk: int | None = None

    @property
    def leaves(self) -> list[Tensor]:
        x = [self.q, self.k, self.v, self.beta]
        return x if self.initial_state is None else [*x, self.initial_state]

    def requiring_grad(self) -> Problem:
        for x in self.leaves:
            x.requires_grad_()
        return self

    def double(self) -> Problem:
        names = ("q", "k", "v", "beta", "do", "initial_state", "dstate")
        wide = {n: x.detach().double() for n in names if (x := getattr(self, n)) is not None}
        return replace(self, **wide).requiring_grad()


def draw(
    B: int, L: int, H: int, d_k: int, d_v: int, dtype: torch.dtype, device: str, *, seed: int = 0, bias: float = 0.0,
    identical: bool = False, beta_range: float | None = None, norm: bool = False, state: bool = False,
    dstate: bool = False, lengths: Sequence[int] | None = None, chunk: int | None = None,
) -> Problem:  # fmt: skip
    """Random inputs: q and k of norm 1 (normalised in float32, then cast), v and do standard normal.

    beta: sigmoid of a standard normal, or uniform in [0, beta_range].  bias: added to the keys before they are
    normalised, so that they are correlated.  identical: every key of a head is the same.  norm: the operator
    normalises, so q and k are left as they are.  lengths: of the sequences packed along L, whose sum L must be.
    """
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=random)

    q, k = normal(B, L, H, d_k), normal(B, L, H, d_k) + bias
    if identical:
        k = k[:, :1].expand(B, L, H, d_k)
    if not norm:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    v, do = normal(B, L, H, d_v), normal(B, L, H, d_v)
    beta = normal(B, L, H).sigmoid()
    if beta_range is not None:
        beta = torch.rand(B, L, H, device=device, generator=random) * beta_range
    half = [x.to(dtype).contiguous() for x in (q, k, v, beta, do)]
    N = B if lengths is None else len(lengths)
    cu = None
    if lengths is not None:
        cu = torch.tensor([0, *lengths], device=device).cumsum(0)
    return Problem(
        *half,
        initial_state=normal(N, H, d_k, d_v) * d_k**-0.5 if state else None,
        dstate=normal(N, H, d_k, d_v) * d_k**-0.5 if dstate else None,
        cu_seqlens=cu,
        norm=norm,
        chunk=chunk,
    ).requiring_grad()


def operator(p: Problem, backend: str = "triton") -> tuple[Tensor, Tensor | None]:
    """`dn_lib.delta_rule` by backend."""
    return dn_lib.delta_rule(
        p.q, p.k, p.v, p.beta, initial_state=p.initial_state, output_final_state=p.dstate is not None,
        cu_seqlens=p.cu_seqlens, qk_l2norm=p.norm, chunk_size=p.chunk if backend == "triton" else None,
        backend=backend,
    )  # fmt: skip


pytorch_form = functools.partial(operator, backend="chunkwise")


def recurrent_form(p: Problem) -> tuple[Tensor, Tensor | None]:
    """Our recurrent kernel; forward only."""
    return dn_lib.fused_recurrent_delta_rule(
        p.q, p.k, p.v, p.beta, initial_state=p.initial_state, use_qk_l2norm_in_kernel=p.norm, cu_seqlens=p.cu_seqlens
    )


def softmax_form(p: Problem) -> tuple[Tensor, None]:
    """Causal flash attention on the same q, k and v: another function, for its cost alone."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        x = (x.transpose(1, 2) for x in (p.q, p.k, p.v))
        return torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True).transpose(1, 2), None


Form = Callable[[Problem], tuple[Tensor, Tensor | None]]


def forward(form: Form, p: Problem) -> Tensor:
    with torch.no_grad():
        return form(p)[0]


def forward_backward(form: Form, p: Problem, leaves: list[Tensor] | None = None) -> dict[str, Tensor]:
    """Output and gradients by name, through `torch.autograd.grad`: nothing is accumulated into `.grad`."""
    o, state = form(p)
    leaves = p.leaves if leaves is None else leaves
    grads = torch.autograd.grad(
        *(([o], leaves, [p.do]) if p.dstate is None else ([o, state], leaves, [p.do, p.dstate]))
    )
    found = dict(zip(("o", "dq", "dk", "dv", "dbeta", "dinitial"), (o, *grads), strict=False))
    return found if p.dstate is None else found | {"state": state}


def segments_of(B: int, L: int, H: int, d: int, dtype: torch.dtype, device: str) -> int:
    """Into how many segments the operator's rule splits each sequence of this shape."""
    x = torch.empty(B, L, H, d, dtype=dtype, device="meta")
    with plan.using(target=plan.target_of(torch.device(device))):
        return plan.plan_call(x, x, x, chunk=rules.default_chunk(dtype)).layout.segments


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Within it `torch.set_float32_matmul_precision(name)` holds: "highest" is IEEE, "high" allows TF32."""
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
    return tuple(cost.total_bytes(cost.compulsory(shape, backward=b)) for b in (False, True))
