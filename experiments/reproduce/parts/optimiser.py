"""AdamW for many runs at once: each with its own learning rates, weight decay and gradient norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ALIGNED = 16  # numbers: every parameter begins at a multiple, as matrix products like it


class RunsAdamW:
    """AdamW (Loshchilov and Hutter 2019) on all parameters of R stacked models as one matrix `[R, P]`.

    The parameters of `module` become views into such a matrix, and their gradients are copied into another, so that a
    step is a dozen operations however many parameters there are, and a norm per run is a norm of rows.  A run's row
    takes the same steps as `torch.optim.AdamW` would with its rate and decay, after `clip_grad_norm_` with `clip`.

    rates: `[R, steps]`, the learning rate of each step.  weight_decay: `[R]`.  What is decayed are matrices, that is
    parameters `[R, m, n]`; gains, biases and convolution taps are not.
    The step's number is a tensor on the device, so that a CUDA graph can hold the step.
    """

    def __init__(
        self,
        module: nn.Module,
        rates: Tensor,
        weight_decay: Tensor,
        *,
        clip: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        self.parameters = parameters = list(module.parameters())
        runs, first = len(rates), parameters[0]
        if any(len(p) != runs for p in parameters):
            raise ValueError(f"rates must have a row for each run, {len(first)}, got {runs}")
        sizes = [-(-p[0].numel() // ALIGNED) * ALIGNED for p in parameters]
        self.weights = first.new_zeros(runs, sum(sizes)).detach()
        self.gradient, self.mean, self.square = (torch.zeros_like(self.weights) for _ in range(3))
        decays = torch.zeros_like(self.weights[0])
        self.gradients: list[Tensor] = []
        begin = 0
        for p, size in zip(parameters, sizes, strict=True):
            here = slice(begin, begin + p[0].numel())
            begin += size
            self.weights[:, here] = p.detach().flatten(1)
            p.data = self.weights[:, here].view(p.shape)
            self.gradients.append(self.gradient[:, here].view(p.shape))
            decays[here] = p.ndim == 3
        t = torch.arange(1, rates.shape[1] + 1, dtype=torch.float64)
        (self.beta1, self.beta2), self.eps, self.clip = betas, eps, clip
        like = {"dtype": first.dtype, "device": first.device}
        self.rates = rates.to(**like)
        self.decay = weight_decay.to(**like)[:, None] * decays
        self.correction1, self.correction2 = (1 - self.beta1**t).to(**like), (1 - self.beta2**t).sqrt().to(**like)

    @property
    def state(self) -> list[Tensor]:
        """What has to be kept to go on later; changed in place."""
        return [self.weights, self.mean, self.square]

    def backward(self, loss: Tensor) -> None:
        """The gradient of `loss`, which every parameter must have a part in; each run's by its own loss in the sum."""
        gradients = torch.autograd.grad(loss, self.parameters)
        torch._foreach_copy_(self.gradients, gradients)  # pyright: ignore[reportPrivateImportUsage] - the one fused copy of many tensors

    @torch.no_grad()
    def step(self, count: Tensor) -> None:
        """Step number `count`, int64 `[1]`, counted from 0."""
        norm = self.gradient.norm(dim=1, keepdim=True)
        self.gradient.mul_((self.clip / (norm + 1e-6)).clamp(max=1.0))
        rate = self.rates.index_select(1, count)  # [R, 1]
        self.weights.mul_(1 - rate * self.decay)
        self.mean.lerp_(self.gradient, 1 - self.beta1)
        self.square.mul_(self.beta2).addcmul_(self.gradient, self.gradient, value=1 - self.beta2)
        bottom = (self.square.sqrt() / self.correction2[count]).add_(self.eps)
        self.weights.sub_(rate / self.correction1[count] * (self.mean / bottom))


def schedule(learning_rate: Tensor, steps: int, warmup: int, floor: float | Tensor) -> Tensor:
    """Learning rates `[R, steps]`: a straight line up to `learning_rate` `[R]`, then half a cosine down to `floor`.

    The last step has the floor.

    >>> schedule(torch.tensor([1.0]), 5, 2, 0.1)[0].tolist()
    [0.5, 1.0, 0.775..., 0.325..., 0.1...]
    """
    t = torch.arange(1, steps + 1, dtype=torch.float64)
    peak = learning_rate.double()[:, None]
    progress = ((t - warmup) / max(steps - warmup, 1)).clamp(0, 1)
    down = floor + (peak - floor) * 0.5 * (1 + (torch.pi * progress).cos())
    return torch.where(t <= warmup, peak * t / max(warmup, 1), down)
