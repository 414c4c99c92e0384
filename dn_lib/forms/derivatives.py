"""What a hand-written derivative cannot do, and how it says so: transforms, forward mode and second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# What torch tells nowhere in public.
_functorch_is_active: Callable[[], bool] = torch._C._are_functorch_transforms_active  # pyright: ignore[reportPrivateUsage]
_functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009  # pyright: ignore[reportPrivateUsage]


def _in_torch_func() -> bool:
    """Asked for when a call is compiled, once: inside a transform the compiler is inside it too."""
    return _functorch_is_active()


# What torch.compiler.assume_constant_result does, which imports the compiler, and Triton with it: more than a second,
# and the kernels could no longer turn Triton's interpreter off.
vars(_in_torch_func)["_dynamo_marked_constant"] = True


def active_transform(*tensors: Tensor | None) -> str | None:
    """What transforms this call or differentiates it forwards, in words; None where plain tensors are passed."""
    if _in_torch_func():
        return "torch.func transforms (vmap, grad, jvp, jacrev, hessian, ...)"
    if torch.compiler.is_compiling():  # the compiler refuses the rest for itself
        return None
    if any(x is not None and _functorch.is_legacy_batchedtensor(x) for x in tensors):
        return "several gradients at once (torch.autograd.grad with is_grads_batched)"
    level = forward_ad._current_level  # pyright: ignore[reportPrivateUsage]
    if level >= 0 and any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        return "forward-mode differentiation (torch.autograd.forward_ad)"
    return None


def refuse_transforms(name: str, remedy: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError inside torch.func transforms and forward-mode differentiation: `name` has no rule for them."""
    if transform := active_transform(*tensors):
        raise RuntimeError(f"{name} does not support {transform}: {remedy}")


class _NoSecondDerivative(torch.autograd.Function):
    """Hands gradients on, and raises if they are differentiated in turn."""

    @staticmethod
    def forward(ctx: Any, message: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.message = message
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(ctx.message)


def differentiable_once(
    message: str, gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """`gradients` as the backward of a Function returns them; differentiating them raises RuntimeError(`message`).

    PyTorch's `once_differentiable` does so only if the gradients that came in want a gradient.  That of a sum does
    not, and a penalty on the gradient of a sum would be taken for a constant.
    inputs: the tensors on which the gradients depend.
    """
    if not torch.is_grad_enabled():  # without create_graph
        return tuple(gradients)
    known = [g for g in gradients if g is not None]
    guarded: Iterator[Tensor] = iter(
        _NoSecondDerivative.apply(message, len(known), *known, *(x for x in inputs if x is not None))
    )
    return tuple(None if g is None else next(guarded) for g in gradients)
