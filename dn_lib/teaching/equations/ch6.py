"""The labelled equations of chapter 6, in its order."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dn_lib.layers import RMSNorm, ShortConvolution
from dn_lib.models import LanguageModel, ModelConfig
from dn_lib.teaching.registry import Equation
from dn_lib.training import TrainConfig, bits_per_byte, learning_rate_at

F64 = torch.float64


def _int(g: torch.Generator, low: int, high: int) -> int:
    """An integer in low..high, both included."""
    return int(torch.randint(low, high + 1, (), generator=g))


def _randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=F64)


def _one_of(g: torch.Generator, *options):
    return options[_int(g, 0, len(options) - 1)]


# -- bits per byte ---------------------------------------------------------------------------------------


def sample_loss(g):
    return 0.5 + 4 * torch.rand((), generator=g, dtype=F64).item(), 1.5 + 3 * torch.rand((), generator=g).item()


# -- the short convolution -------------------------------------------------------------------------------


def sample_convolution(g):
    length, channels, taps = _int(g, 5, 9), _int(g, 2, 4), _int(g, 2, 4)
    return _randn(g, length, channels), _randn(g, channels, taps)


@torch.no_grad()
def library_convolution(x, w):
    layer = ShortConvolution(*w.shape).to(F64)
    layer.weight.copy_(w.mT[:, None])
    return layer(x[None])[0]


def convolution(x, w, shift=0, flip=False, wrap=False, first_tap=0):
    """y_t = sum over j of w_j * x_{t - n + j}, j = 1 ... n, as printed; options give the mutants."""
    (length, _), n = x.shape, w.shape[1]
    y = torch.zeros_like(x)
    for t in range(length):
        for j in range(first_tap, n):
            source = t - (n - 1) + j + shift
            if wrap or 0 <= source < length:
                y[t] += w[:, n - 1 - j if flip else j] * x[source % length]
    return y


# -- the norm of each head -------------------------------------------------------------------------------


def sample_heads(g):
    heads, d = _int(g, 2, 4), _int(g, 3, 6)
    return _randn(g, heads, d) * torch.arange(1, heads + 1, dtype=F64)[:, None], _randn(g, d)


@torch.no_grad()
def library_head_norm(o, gain):
    norm = RMSNorm(o.shape[-1], eps=1e-5).to(F64)
    norm.weight.copy_(gain)
    return norm(o)


def head_norm(o, gain):
    return gain * o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt()


# -- parameters, operations, cache -----------------------------------------------------------------------


def sample_shape(g):
    heads = _one_of(g, 1, 2, 3)
    return (_int(g, 40, 300), heads * _one_of(g, 4, 8), _int(g, 2, 4), heads, _one_of(g, 2, 4))


def delta_model(vocab, width, layers, heads, taps):
    return LanguageModel(ModelConfig(vocab_size=vocab, width=width, layers=layers, heads=heads, conv_size=taps))


def counted_parameters(*shape):
    return sum(p.numel() for p in delta_model(*shape).parameters())


def parameters(V, d, N, H, n, *, mixer=4, taps=3, beta=1, mlp=3, norms=2, tables=2):
    m = 64 * math.ceil(8 * d / 3 / 64)
    layer = mixer * d * d + taps * n * d + beta * H * d + d // H + mlp * d * m + norms * d
    return tables * V * d + N * layer + d


def sample_work(g):
    heads = _one_of(g, 1, 2)
    return (_int(g, 1, 3), heads * _one_of(g, 4, 8), heads, _int(g, 20, 60), _int(g, 5, 12), _int(g, 13, 40))


def model_for_work(N, d, H, V, mixer="attention", window=8):
    config = ModelConfig(vocab_size=V, width=d, layers=N, heads=H, mixer=mixer, window=window, conv_size=0)
    return LanguageModel(config)


def counted_work(N, d, H, V, w, L):
    """Training operations a token: products counted by PyTorch as they run (attention's by their pairs).

    The mixing itself is counted by hand, one multiply-add for every query-key pair in the window, twice.
    """
    model: Any = model_for_work(N, d, H, V, "window", w)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for block in model.blocks:
            x = torch.zeros(1, L, d)
            for layer in (block.mixer.query, block.mixer.key, block.mixer.value, block.mixer.output):
                layer(x)
            block.mlp(x)
        model.head(torch.zeros(1, L, d))
    pairs = sum(min(t, w) for t in range(1, L + 1))
    return 3 * (counter.get_total_flops() + N * pairs * 2 * 2 * d) / L


def work(N, d, H, V, w, L, *, passes=3, weights=2, mixing=4, keys=None, look_up=0):
    m = 64 * math.ceil(8 * d / 3 / 64)
    P = N * (4 * d * d + 3 * d * m) + V * d + look_up * V * d
    keys = min(w, L) - min(w, L) * (min(w, L) - 1) / (2 * L) if keys is None else keys(w, L)
    return passes * (weights * P + N * mixing * keys * d)


def library_work(N, d, H, V, w, L):
    return model_for_work(N, d, H, V, "window", w).flops_per_token(L), counted_work(N, d, H, V, w, L)


def twice(formula):
    """Both the library's own count and the products counted one by one have to be this."""
    return lambda *shape: (formula(*shape), formula(*shape))


def sample_cache(g):
    heads = _one_of(g, 1, 2)
    return (_one_of(g, 2, 4), heads * _one_of(g, 4, 8), heads, _int(g, 2, 4), _int(g, 4, 9), _int(g, 1, 40))


def counted_cache(N, d, H, n, w, t):
    config = ModelConfig(
        width=d, layers=N, heads=H, conv_size=n, window=w, pattern=("delta", "window") * (N // 2), mlp_ratio=0
    )
    model = LanguageModel(config)
    cache = model.new_cache(1)
    with torch.no_grad():
        model(torch.zeros(1, t, dtype=torch.long), cache)
    return cache.bytes() // 4


def cache_size(N, d, H, n, w, t, *, heads=True, conv=3, sides=2, cap=True, kept=-1, grows=False):
    state = d * d // H if heads else d * d
    state = state * t if grows else state
    window = sides * d * (min(t, w + kept) if cap else t)
    return N // 2 * (state + conv * (n - 1) * d) + N // 2 * window


# -- the schedule and the gradient of a batch ------------------------------------------------------------


def sample_schedule(g):
    warmup = _int(g, 2, 10)
    steps = warmup + _int(g, 5, 40)
    return warmup, steps, _int(g, 1, steps), 0.5 + torch.rand((), generator=g, dtype=F64).item(), 0.1


def library_schedule(w, T, t, top, floor):
    config = TrainConfig(steps=T, warmup=w, learning_rate=top, min_learning_rate=floor)
    return learning_rate_at(t - 1, config)


def schedule(w, T, t, top, floor, *, shift=0, start=None, bottom=True, shape=None):
    if t <= w:
        return top * (t - shift) / w
    start = w if start is None else start
    r = (t - start) / (T - start)
    shape = shape or (lambda r: (1 + math.cos(math.pi * r)) / 2)
    low = floor if bottom else 0.0
    return low + (top - low) * shape(r)


def sample_batch(g):
    parts, each, d = _int(g, 2, 4), _int(g, 2, 5), _int(g, 2, 5)
    return _randn(g, parts, each, d), _randn(g, parts, each), _randn(g, d)


def _gradient(x, y, w):
    """Gradient of the mean of (x w - y)^2 / 2, by autograd."""
    w = w.clone().requires_grad_()
    return torch.autograd.grad(0.5 * (x @ w - y).square().mean(), w)[0]


def whole_gradient(x, y, w):
    return _gradient(x.flatten(0, 1), y.flatten(), w)


def mean_of_gradients(x, y, w):
    return torch.stack([_gradient(a, b, w) for a, b in zip(x, y, strict=True)]).mean(0)


ENTRIES = [
    Equation(
        "eq-bits-per-byte",
        "definition",
        sample_loss,
        bits_per_byte,
        lambda loss, r: loss / (r * math.log(2)),
        {
            "nats called bits": lambda loss, r: loss / r,
            "multiplied by the bytes a token": lambda loss, r: loss * r / math.log(2),
            "per token, not per byte": lambda loss, r: loss / math.log(2),
            "base 10": lambda loss, r: loss / (r * math.log(10)),
            "perplexity": lambda loss, r: math.exp(loss) / r,
        },
    ),
    Equation(
        "eq-short-convolution",
        "definition",
        sample_convolution,
        library_convolution,
        convolution,
        {
            "taps in reverse": lambda x, w: convolution(x, w, flip=True),
            "looks one token ahead": lambda x, w: convolution(x, w, shift=1),
            "leaves the present token out": lambda x, w: convolution(x, w, shift=-1),
            "wraps around at the start": lambda x, w: convolution(x, w, wrap=True),
            "one filter for all channels": lambda x, w: convolution(x, w[:1].expand_as(w)),
            "oldest tap forgotten": lambda x, w: convolution(x, w, first_tap=1),
        },
    ),
    Equation(
        "eq-head-norm",
        "definition",
        sample_heads,
        library_head_norm,
        head_norm,
        {
            "one norm over all heads": lambda o, g: g * o / (o.square().mean() + 1e-5).sqrt(),
            "sum for mean": lambda o, g: g * o / (o.square().sum(-1, keepdim=True) + 1e-5).sqrt(),
            "mean taken off, as in LayerNorm": lambda o, g: head_norm(o - o.mean(-1, keepdim=True), g),
            "root forgotten": lambda o, g: g * o / (o.square().mean(-1, keepdim=True) + 1e-5),
            "gain forgotten": lambda o, g: head_norm(o, torch.ones_like(g)),
        },
    ),
    Equation(
        "eq-parameters",
        "count",
        sample_shape,
        counted_parameters,
        parameters,
        {
            "output projection forgotten": lambda *s: parameters(*s, mixer=3),
            "convolution of v forgotten": lambda *s: parameters(*s, taps=2),
            "beta forgotten": lambda *s: parameters(*s, beta=0),
            "SwiGLU with two matrices": lambda *s: parameters(*s, mlp=2),
            "one norm a block": lambda *s: parameters(*s, norms=1),
            "head and embedding taken for one": lambda *s: parameters(*s, tables=1),
        },
    ),
    Equation(
        "eq-flops",
        "identity",  # a mean of keys, so no whole number: equal but for rounding
        sample_work,
        library_work,
        twice(work),
        {
            "forward pass only": twice(lambda *s: work(*s, passes=1)),
            "multiply-add taken for one operation": twice(lambda *s: work(*s, weights=1)),
            "embedding look-up counted": twice(lambda *s: work(*s, look_up=1)),
            "window never partly filled": twice(lambda *s: work(*s, keys=lambda w, L: w)),
            "whole context attended to": twice(lambda *s: work(*s, keys=lambda w, L: (L + 1) / 2)),
            "sum over values forgotten": twice(lambda *s: work(*s, mixing=2)),
        },
    ),
    Equation(
        "eq-cache-size",
        "count",
        sample_cache,
        counted_cache,
        cache_size,
        {
            "state grows with the context": lambda *s: cache_size(*s, grows=True),
            "keys kept, values not": lambda *s: cache_size(*s, sides=1),
            "window never full": lambda *s: cache_size(*s, cap=False),
            "present token kept too": lambda *s: cache_size(*s, kept=0),
            "convolutions forgotten": lambda *s: cache_size(*s, conv=0),
        },
    ),
    Equation(
        "eq-learning-rate",
        "definition",
        sample_schedule,
        library_schedule,
        schedule,
        {
            "warm-up begins with zero": lambda *s: schedule(*s, shift=1),
            "cosine counted from the first step": lambda *s: schedule(*s, start=0),
            "floor forgotten": lambda *s: schedule(*s, bottom=False),
            "straight line": lambda *s: schedule(*s, shape=lambda r: 1 - r),
            "a whole period": lambda *s: schedule(*s, shape=lambda r: (1 + math.cos(2 * math.pi * r)) / 2),
        },
    ),
    Equation(
        "eq-accumulation",
        "identity",
        sample_batch,
        whole_gradient,
        mean_of_gradients,
        {
            "sum for mean": lambda x, y, w: mean_of_gradients(x, y, w) * len(x),
            "last part only": lambda x, y, w: _gradient(x[-1], y[-1], w),
            "a step between the parts": lambda x, y, w: (
                (_gradient(x[0], y[0], w) + _gradient(x[1], y[1], w - 0.1 * _gradient(x[0], y[0], w))) / 2
            ),
        },
    ),
]
