"""`plan`: what a call of `delta_rule` would run, and why, without running it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from dn_lib.forms.common import check_flag
from dn_lib.forms.derivatives import active_transform
from dn_lib.kernels import plan as kernels
from dn_lib.ops.autograd import chunk_of, dot_precision
from dn_lib.ops.backend import check_for_triton, choose_backend, triton_problem, why_not_auto
from dn_lib.ops.checks import check_arguments, wants_gradient

_FORMS = {
    "recurrent": "the recurrence in PyTorch, one token at a time",
    "parallel": "the parallel form in PyTorch, one L x L matrix for each head",
    "chunkwise": "the chunkwise form in PyTorch",
}


@dataclass(frozen=True)
class OperatorPlan:
    """What a call would run.  `print` it.

    backend: the one that is taken.  why: in words.  kernels: of backend "triton", else None.
    """

    backend: str
    why: str
    form: str
    kernels: kernels.Plan | None

    def __str__(self) -> str:
        head = f"backend {self.backend}: {self.why}"
        return f"{head}\n{self.form if self.kernels is None else self.kernels}"


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    qk_l2norm: bool = False,
    chunk_size: int | None = None,
    training: bool | None = None,
    backend: str = "auto",
) -> OperatorPlan:
    """What `delta_rule` would run for these arguments, and why.  Nothing is computed.

    Shapes, dtypes and devices count, values do not: tensors may be on "meta".  A plan for a GPU that is not there is
    made inside `dn_lib.kernels.plan.using(target=...)`, for backend "auto" too.

    Args:
        as in `delta_rule`; beta may be left out.
        training: whether a gradient is wanted; None means what `delta_rule` would see, from requires_grad.

    Raises ValueError, TypeError and RuntimeError as `delta_rule` does.

    >>> from dn_lib.kernels.plan import Target, using
    >>> q, k, v = (torch.empty(8, 2048, 16, 128, dtype=torch.bfloat16, device="meta") for _ in range(3))
    >>> with using(target=Target(arch=90, sms=132)):  # an H100
    ...     print(plan(q, k, v, training=False))
    backend triton: auto takes the kernels on a GPU
    8 x 2,048 tokens, 16 heads of 128 key and 128 value channels, bfloat16; compute capability 9.0, 132 SMs
    chunks of 64; one segment per sequence, since 256 programs fill 132 SMs
    1. chunk_inverse (N of each chunk): 4,096 programs, tiles of 64 keys, 1 warp, 3 stages, pointers
    2. chunk_scan_fwd (the state along the chunks, and o): 256 programs, tiles of 128 keys x 64 values, 4 warps, \
2 stages, TMA
    >>> print(plan(q.float(), k.float(), v.float(), backend="chunkwise"))
    backend chunkwise: asked for
    the chunkwise form in PyTorch, chunks of 64
    """
    if beta is None and isinstance(q, Tensor) and q.ndim == 4:
        beta = torch.empty(q.shape[:3], dtype=q.dtype, device=q.device)
    beta = cast(Tensor, beta)  # the check refuses anything else
    check_arguments(q, k, v, beta, initial_state, cu_seqlens, chunk_size, backend)
    check_flag("qk_l2norm", qk_l2norm)
    if training is None:
        training = wants_gradient(q, k, v, beta, initial_state)
    check_flag("training", training)
    chosen, why = _backend(q, k, v, beta, initial_state, chunk_size, backend)
    if chosen != "triton":
        chunks = f", chunks of {chunk_size or 64}" if chosen == "chunkwise" else ""
        return OperatorPlan(chosen, why, _FORMS[chosen] + chunks, None)
    found = kernels.plan_call(
        q, k, v, cu_seqlens=cu_seqlens, norm=qk_l2norm, training=training, precision=dot_precision(),
        chunk=chunk_of(q.shape[1], q.dtype, chunk_size, training),
    )  # fmt: skip
    return OperatorPlan(chosen, why, "Triton kernels", found)


def _backend(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, initial_state: Tensor | None, chunk_size: int | None, backend: str
) -> tuple[str, str]:
    dim = max(q.shape[-1], v.shape[-1])
    target = kernels.target_in_use()
    if target is not None and backend in ("auto", "triton"):  # a device that need not be there
        problem = triton_problem() or why_not_auto(torch.device("cuda"), q.dtype, dim, chunk_size)
        if backend == "triton":
            check_for_triton(q.dtype, dim, chunk_size)
            return "triton", "asked for"
        return ("chunkwise", problem) if problem else ("triton", "auto takes the kernels on a GPU")
    chosen = choose_backend(q, v, chunk_size, backend)
    if backend != "auto":
        return chosen, "asked for"
    if chosen == "triton" and (transform := active_transform(q, k, v, beta, initial_state)):
        return "chunkwise", f"the kernels have no rule for {transform}"
    problem = why_not_auto(q.device, q.dtype, dim, chunk_size)
    natural = "triton" if problem is None else "chunkwise"
    if chosen != natural:
        return chosen, "what auto takes inside using(auto=...)"
    return chosen, problem or "auto takes the kernels on a GPU"
