"""A hybrid language model in one file: DeltaNet and window attention, trained on the source of Python itself.

    python experiments/nano_delta.py                     a minute on two CPU cores, then a sample
    python experiments/nano_delta.py --steps 1000        longer; on a GPU a model of 26 million parameters

Everything is here but the delta rule itself, which is the package's operator. `dn_lib.models` and `dn_lib.training` do
the same with more layers, checks, checkpoints and several GPUs. Parameters have the same names, so that weights can be
exchanged, and a test holds the losses of both against each other. Tensors are [B, L, width], or [B, L, H, d] by heads.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dn_lib import delta_rule


@dataclass
class Settings:
    """What decides a run; the defaults are for a CPU."""

    vocab: int = 256  # tokens are bytes
    width: int = 96
    layers: int = 2
    heads: int = 2
    window: int = 32  # tokens that a window layer sees
    conv: int = 4  # taps of the short convolution
    hidden: int = 256  # inside SwiGLU
    batch: int = 8
    length: int = 128
    steps: int = 200
    warmup: int = 20
    learning_rate: float = 6e-3  # its peak; the floor is a tenth
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0


LARGE = Settings(width=512, layers=8, heads=4, window=256, hidden=1408, batch=32, length=1024, learning_rate=2e-3)


class ShortConvolution(nn.Module):
    """y_t = sum_j w_j * x_{t - n + 1 + j}: n taps in time, each channel by itself."""

    def __init__(self, channels: int, taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(taps, 1, channels).uniform_(-(taps**-0.5), taps**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        taps, length = len(self.weight), x.shape[1]
        padded = F.pad(x.float(), (0, 0, taps - 1, 0))  # zeros before the first token
        return torch.stack([padded[:, j : j + length] * w for j, w in enumerate(self.weight)]).sum(0).to(x.dtype)


class DeltaNet(nn.Module):
    """q, k, v: linear, convolution, SiLU. beta: sigmoid, one a head. The delta rule. A norm on each head's output."""

    def __init__(self, s: Settings):
        super().__init__()
        self.heads = s.heads
        self.query, self.key, self.value = (nn.Linear(s.width, s.width, bias=False) for _ in range(3))
        self.query_conv, self.key_conv, self.value_conv = (ShortConvolution(s.width, s.conv) for _ in range(3))
        self.beta = nn.Linear(s.width, s.heads, bias=False)
        self.norm = nn.RMSNorm(s.width // s.heads, eps=1e-5)
        self.output = nn.Linear(s.width, s.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        ways = ((self.query, self.query_conv), (self.key, self.key_conv), (self.value, self.value_conv))
        q, k, v = (F.silu(conv(linear(x))).unflatten(-1, (self.heads, -1)) for linear, conv in ways)
        beta = self.beta(x).float().sigmoid()
        o, _ = delta_rule(q, k, v, beta, qk_l2norm=True)  # divides q and k by their norms
        return self.output(self.norm(o.float()).to(x.dtype).flatten(-2))


class WindowAttention(nn.Module):
    """Softmax attention with rotary positions to the newest `window` tokens, by a mask: short code, O(L^2) work."""

    def __init__(self, s: Settings):
        super().__init__()
        self.heads, self.window = s.heads, s.window
        self.query, self.key, self.value, self.output = (nn.Linear(s.width, s.width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.query, self.key, self.value))
        t = torch.arange(x.shape[1], device=x.device)
        mask = (t[:, None] >= t) & (t[:, None] < t + self.window)  # not the future, and not further back
        q, k, v = rotated(q, t).transpose(1, 2), rotated(k, t).transpose(1, 2), v.transpose(1, 2)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.output(o.transpose(1, 2).flatten(-2))


def rotated(x: Tensor, t: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary positions: the pair (x_i, x_{i + d/2}) is turned by the angle t base^(-2i/d)."""
    d = x.shape[-1]
    angle = t.float()[:, None, None] * base ** (-torch.arange(0, d, 2, device=x.device).float() / d)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1).to(x.dtype)


class SwiGLU(nn.Module):
    """(silu(x W_1) * x W_2) W_3."""

    def __init__(self, s: Settings):
        super().__init__()
        self.gate, self.up = (nn.Linear(s.width, s.hidden, bias=False) for _ in range(2))
        self.output = nn.Linear(s.hidden, s.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)). Every other block, from the second, has attention for its mixer."""

    def __init__(self, s: Settings, index: int):
        super().__init__()
        self.mixer_norm, self.mlp_norm = (nn.RMSNorm(s.width, eps=1e-5) for _ in range(2))
        self.mixer = WindowAttention(s) if index % 2 else DeltaNet(s)
        self.mlp = SwiGLU(s)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Model(nn.Module):
    """Tokens [B, L] -> logits [B, L, vocab] of the token after each."""

    def __init__(self, s: Settings):
        super().__init__()
        self.embedding = nn.Embedding(s.vocab, s.width)
        self.blocks = nn.ModuleList([Block(s, i) for i in range(s.layers)])
        self.norm = nn.RMSNorm(s.width, eps=1e-5)
        self.head = nn.Linear(s.width, s.vocab, bias=False)
        for name, part in self.named_modules():  # what writes into the residual stream starts smaller
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.normal_(part.weight, std=0.02 / (math.sqrt(2 * s.layers) if name.endswith(".output") else 1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def standard_library() -> tuple[np.ndarray, np.ndarray]:
    """Bytes for training and for validation; a hash of its name says on which side a file is, a zero begins each."""
    root, sides = Path(sysconfig.get_path("stdlib")), ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(name.split("/")):
            held_out = hashlib.sha256(name.encode()).digest()[0] < 26  # one in ten
            sides[held_out].append(b"\0" + path.read_bytes())
    train, validation = (np.frombuffer(b"".join(side), dtype=np.uint8) for side in sides)
    return train, validation


def draw(text: np.ndarray, s: Settings, generator: torch.Generator) -> Tensor:
    """A batch of random windows, [batch, length + 1]."""
    starts = torch.randint(len(text) - s.length, (s.batch,), generator=generator).tolist()
    return torch.from_numpy(np.stack([text[i : i + s.length + 1] for i in starts]).astype(np.int64))


def rate(step: int, s: Settings) -> float:
    """Linear warm-up, then half a cosine down to a tenth; `step` counts from 0."""
    t, floor = step + 1, s.learning_rate / 10
    if t <= s.warmup:
        return s.learning_rate * t / s.warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (t - s.warmup) / max(s.steps - s.warmup, 1)))
    return floor + (s.learning_rate - floor) * cosine


def mean_loss(model: Model, tokens: Tensor) -> Tensor:
    """Nats per token; matrix products in bfloat16 on a GPU."""
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def train(model: Model, text: np.ndarray, s: Settings, say=None) -> list[float]:
    """AdamW on random windows of `text`; returns the loss of every step. `say` is called with (step, loss)."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]  # gains and taps: no weight decay
    groups = [{"params": matrices, "weight_decay": s.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=s.learning_rate, betas=(0.9, 0.95))
    generator, losses = torch.Generator().manual_seed(s.seed), []
    for step in range(s.steps):
        for group in optimiser.param_groups:
            group["lr"] = rate(step, s)
        loss = mean_loss(model, draw(text, s, generator))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.detach())  # read at the end, so that a GPU need not wait
        if say and (step + 1) % max(s.steps // 10, 1) == 0:
            say(step + 1, losses[-1].item())
    return [loss.item() for loss in losses]


@torch.no_grad()
def generate(model: Model, prompt: str, count: int, s: Settings, temperature: float = 0.7) -> str:
    """`count` bytes after `prompt`. Each reads the last `length` tokens anew; `dn_lib.models` keeps a cache instead."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(s.seed)
    tokens = torch.tensor([list(prompt.encode())], device=device)
    for _ in range(count):
        logits = model(tokens[:, -s.length :])[:, -1].float()
        following = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, following], dim=1)
    return bytes(tokens[0].tolist()).decode(errors="replace")


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    s = LARGE if device == "cuda" else Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=s.steps)
    s.steps = parser.parse_args().steps
    if device == "cpu":
        torch.set_num_threads(1)  # for matrices this small a second thread gains little, and waits for a free core
    torch.manual_seed(s.seed)
    model = Model(s).to(device)
    text, held_out = standard_library()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(text):,} bytes, on {device}")
    begun = time.perf_counter()
    train(model, text, s, lambda step, loss: print(f"step {step:5d}  {loss / math.log(2):.3f} bits per byte"))
    with torch.no_grad():
        loss = sum(mean_loss(model, draw(held_out, s, torch.Generator().manual_seed(i))).item() for i in range(8)) / 8
    print(f"held out: {loss / math.log(2):.3f} bits per byte, after {time.perf_counter() - begun:.0f} s\n")
    print(generate(model, "def ", 300, s))


if __name__ == "__main__":
    main()
