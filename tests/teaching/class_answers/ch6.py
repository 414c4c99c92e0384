"""Wrong answers to the exercises of chapter 6."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import conv1d

from . import Answer


# 6.2 -----------------------------------------------------------------------------------------------------
def convolution(before=None, flip=False, mix=False, anew=False):
    def answer(x, w):
        taps = w.shape[1]
        w = w.flip(1) if flip else w
        ahead = taps - 1 if before is None else before
        padded = torch.cat([x.new_zeros(ahead, x.shape[1]), x, x.new_zeros(taps, x.shape[1])])
        y = sum(w[:, j] * padded[j : j + len(x)] for j in range(taps))
        return y.sum(1, keepdim=True).expand_as(x) if mix else y

    return answer


def valid_only(x, w):
    return conv1d(x.T[None], w[:, None], groups=x.shape[1])[0].T


# 6.3 and 6.4 ---------------------------------------------------------------------------------------------
def block(mixer=4, conv=3, beta=1, head=1, mlp=3, norms=2, gain="head"):
    def answer(d, H, m, n):
        gain_size = {"head": d // H, "width": d, "heads": H}[gain]
        return mixer * d * d + conv * n * d + beta * d * H + head * gain_size + mlp * d * m + norms * d

    return answer


def kept(state="heads", sides=2, cap=True, full=True, every=True):
    def answer(mixers, d, H, w, t):
        size = {
            "delta": {"heads": d * d // H, "width": d * d, "one": (d // H) ** 2}[state] * (1 if full else t),
            "window": sides * d * (min(t, w) if cap else w),
            "attention": sides * d * t,
        }
        return sum(size[name] for name in (mixers if every else ["delta", "window", "attention"]))

    return answer


# 6.5 -----------------------------------------------------------------------------------------------------
def schedule(first=1, begin="w", end="T", floor=True, shape="cosine", warm=True):
    def answer(w, T, top, low):
        values = []
        for t in range(first, T + first):
            if t <= w and warm:
                values.append(top * t / w)
                continue
            start = w if begin == "w" else 0
            r = (t - start) / ((T if end == "T" else T + 1) - start)
            fall = {"cosine": (1 + math.cos(math.pi * r)) / 2, "line": 1 - r, "quarter": math.cos(math.pi * r / 2)}
            bottom = low if floor else 0.0
            values.append(bottom + (top - bottom) * fall[shape])
        return torch.tensor(values, dtype=torch.float64)

    return answer


# 6.7 -----------------------------------------------------------------------------------------------------
def one_step(flip=False, moved="right", now=True):
    def answer(x, past, w):
        rows = torch.cat([past, x[None]])
        y = ((w.flip(1) if flip else w).T * (rows if now else rows * 0 + torch.cat([past[:1], past]))).sum(0)
        new = {"right": rows[1:], "not": past, "grown": rows, "front": torch.cat([x[None], past])[:-1], "y": None}[
            moved
        ]
        return y, torch.cat([past, y[None]])[1:] if new is None else new

    return answer


ANSWERS = {
    "6.1": [
        Answer("nats", lambda losses, n: losses.sum() / n, "nats"),
        Answer("per token", lambda losses, n: losses.mean() / math.log(2), "per token"),
        Answer("mean over bytes", lambda losses, n: losses.mean() / math.log(2) / n, "mean over tokens"),
        Answer("multiplied", lambda losses, n: losses.sum() * math.log(2) / n, "wrong side"),
        Answer("total", lambda losses, n: losses.sum() / math.log(2), "total|whole text|divided"),
        Answer("log2 of the sum", lambda losses, n: torch.log2(losses.sum()) / n, "logarithm"),
        Answer("eight bits", lambda losses, n: losses.sum() / math.log(2) / n / 8, "8|eight"),
        Answer("perplexity", lambda losses, n: losses.mean().exp(), "perplexity"),
        Answer("upside down", lambda losses, n: n * math.log(2) / losses.sum(), "upside|bytes per bit|inverse"),
    ],
    "6.2": [
        Answer("reversed taps", convolution(flip=True), "reverse"),
        Answer("padding at the end", convolution(before=0), "end|future|later"),
        Answer("one row too few", lambda x, w: convolution(before=w.shape[1] - 2)(x, w), "sees token t \\+ 1"),
        Answer("one row too many", lambda x, w: convolution(before=w.shape[1])(x, w), "present token is left out"),
        Answer("channels mixed", convolution(mix=True), "added up"),
        Answer("not padded", valid_only, "shape"),
        Answer("centred", lambda x, w: convolution(before=(w.shape[1] - 1) // 2)(x, w), "centre|future|later|sees"),
        Answer("only the present", lambda x, w: w[:, -1] * x, "present"),
        Answer("transposed", lambda x, w: convolution()(x, w).T, "transpos"),
    ],
    "6.3": [
        Answer("three matrices", block(mixer=3), "matrix of the mixer"),
        Answer("no convolutions", block(conv=0), "convolutions are missing"),
        Answer("one convolution", block(conv=1), "convolution"),
        Answer("no beta", block(beta=0), "beta"),
        Answer("SwiGLU with two", block(mlp=2), "two matrices"),
        Answer("no head norm", block(head=0), "norm of the heads|head"),
        Answer("one norm", block(norms=1), "norm"),
        Answer("head norm of size d", block(gain="width"), "head"),
        Answer("a gain per head", block(gain="heads"), "head"),
    ],
    "6.4": [
        Answer("no min", kept(cap=False), "fewer|at most|min|short"),
        Answer("window without a cap", lambda mixers, d, H, w, t: kept()(mixers, d, H, t, t), "without end"),
        Answer("keys only", kept(sides=1), "keys"),
        Answer("d x d", kept(state="width"), "d x d"),
        Answer("one head", kept(state="one"), "one head"),
        Answer("state grows", kept(full=False), "grow"),
        Answer("mixers ignored", kept(every=False), "list"),
        Answer("each kind once", lambda mixers, *x: kept()(set(mixers), *x), "once|twice|several"),
        Answer("floats", lambda *x: float(kept()(*x)), "float"),
    ],
    "6.5": [
        Answer("counts from 0", schedule(first=0), "zero|from 0|from 1"),
        Answer("cosine from the start", schedule(begin="0"), "first step"),
        Answer("no floor", schedule(floor=False), "floor"),
        Answer("line", schedule(shape="line"), "straight"),
        Answer("quarter wave", schedule(shape="quarter"), "quarter|half a period"),
        Answer("no warm-up", schedule(warm=False), "warm"),
        Answer("never at the floor", schedule(end="T+1"), "floor|last step"),
        Answer("a list", lambda *x: schedule()(*x).tolist(), "list"),
    ],
    "6.6": [
        Answer("mean", lambda g, n: g.mean(0), "small parts"),
        Answer("sum", lambda g, n: g.sum(0), "added up"),
        Answer("not divided", lambda g, n: (n[:, None] * g).sum(0), "not divided"),
        Answer("inverse weights", lambda g, n: (g / n[:, None]).sum(0) / (1 / n).sum(), "wrong way round"),
        Answer("divided by the parts", lambda g, n: (n[:, None] * g).mean(0), "number of tokens|parts"),
        Answer("sum over tokens only", lambda g, n: g.sum(0) / n.sum(), "weight|size"),
        Answer("summed over the wrong axis", lambda g, n: (n[:, None] * g).sum(1) / n.sum(), "shape|axis"),
        Answer("largest part", lambda g, n: g[n.argmax()], "largest|one part"),
        Answer("roots", lambda g, n: (n.sqrt()[:, None] * g).sum(0) / n.sqrt().sum(), "root|weight"),
    ],
    "6.7": [
        Answer("memory not moved on", one_step(moved="not"), "not moved on"),
        Answer("newest first", one_step(moved="front"), "wrong order"),
        Answer("memory grows", one_step(moved="grown"), "grown"),
        Answer("taps reversed", one_step(flip=True), "reverse"),
        Answer("output remembered", one_step(moved="y"), "output"),
        Answer("output only", lambda *x: one_step()(*x)[0], "past|second|values"),
        Answer("past only", one_step(now=False), "present"),
        Answer("exchanged", lambda *x: one_step()(*x)[::-1], "order"),
        Answer(
            "newest forgotten", lambda x, past, w: ((w[:, :-1].T * past).sum(0), one_step()(x, past, w)[1]), "present"
        ),
    ],
}
