"""Mixture of Memories as a layer (Du et al. 2025): a router sends each token to a few of several states."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dn_lib.forms.common import check_integer, check_positive, check_tensors, is_number, working_dtype
from dn_lib.layers.cache import LayerCache
from dn_lib.layers.common import RMSNorm, check_choice, head_dim_or_default, split_heads
from dn_lib.layers.decay import log_gates, new_rates, new_step_biases
from dn_lib.layers.documents import Documents, open_documents
from dn_lib.layers.gated_delta_net import gated_delta_rule_in_full_precision, value_size
from dn_lib.layers.recurrent import run_operator
from dn_lib.layers.registry import Mixer, register_mixer
from dn_lib.layers.short_convolution import ShortConvolution
from dn_lib.ops.backend import BACKENDS


@contextmanager
def balance_losses(model: nn.Module) -> Generator[list[Tensor], None, None]:
    """Within it, every call of a `MixtureOfMemories` in `model` appends its balance loss, a number `[]`, to the list.

    Add their sum times a small factor (the paper: 0.01) to the loss of training, or the router may come to send all
    tokens to the same memories.  The layers hold the list, so that a compiled model fills it too.
    Raises ValueError for a model without such a layer, and where the losses of one are being collected already.

    >>> layer = MixtureOfMemories(width=8, heads=1)
    >>> with balance_losses(layer) as losses:
    ...     y = layer(torch.randn(1, 5, 8))
    >>> len(losses), losses[0].shape
    (1, torch.Size([]))
    """
    layers = [layer for layer in model.modules() if isinstance(layer, MixtureOfMemories)]
    if not layers:
        raise ValueError("model must have a MixtureOfMemories, and this one has none")
    if any(layer.collected is not None for layer in layers):
        raise ValueError("model: its balance losses are being collected already")
    losses: list[Tensor] = []
    for layer in layers:
        layer.collected = losses
    try:
        yield losses
    finally:
        for layer in layers:
            layer.collected = None


def balance_loss(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """M sum_m f_m p_m: 1 where all memories are used alike, up to M where one gets all.

    probabilities: `[..., M]`, the router's softmax.  chosen: `[..., k]`, integers, the memories that each token
    went to.  f_m is the share of all choices that fell on memory m, p_m the mean probability; the gradient goes
    through p alone.
    Raises ValueError for leading dimensions that differ.  Source: Fedus et al. (2022), Switch Transformer, for k = 1.

    >>> balance_loss(torch.tensor([[0.5, 0.5], [0.5, 0.5]]), torch.tensor([[0], [1]])).item()
    1.0
    """
    check_tensors(probabilities=probabilities)
    if chosen.shape[:-1] != probabilities.shape[:-1]:
        expected, got = list(probabilities.shape[:-1]), list(chosen.shape)
        raise ValueError(f"chosen must be [..., k] with leading dimensions {expected} like probabilities, got {got}")
    memories = probabilities.shape[-1]
    shares = F.one_hot(chosen, memories).to(probabilities.dtype).flatten(0, -2).mean(0)
    return memories * (shares * probabilities.flatten(0, -2).mean(0)).sum()


@dataclass(frozen=True)
class Routes:
    """Where tokens go, as rows sorted by stream: one stream for each pair of a sequence and a memory.

    A batch of N sequences has N M streams; that of sequence n and memory m is number n M + m.  Of every row r,
    `tokens` `[R]` says whose it is (counted through the batch), `memories` `[R]` for which memory.  Within a
    stream tokens keep their order.  `streams` packs the rows for the operator; `unsorted` `[R]` are the rows in the
    order of tokens and their choices.
    """

    tokens: Tensor
    memories: Tensor
    streams: Documents
    unsorted: Tensor


def sort_by_memory(chosen: Tensor, sequences: Tensor, memories: int, count: int) -> Routes:
    """The rows of tokens `[T, k]` that went to k memories each.

    chosen: `[T, k]`, from 0 to `memories` - 1.  sequences: `[T]`, which of the `count` sequences each token belongs to.

    >>> routes = sort_by_memory(torch.tensor([[1], [0], [1]]), torch.zeros(3, dtype=torch.long), 2, 1)
    >>> routes.tokens.tolist(), routes.memories.tolist(), routes.streams.offsets.tolist()
    ([1, 0, 2], [0, 1, 1], [0, 1, 3])
    """
    numbers = (sequences[:, None] * memories + chosen).flatten()
    order = numbers.argsort(stable=True)
    offsets = torch.searchsorted(numbers[order], torch.arange(count * memories + 1, device=numbers.device))
    streams = Documents(offsets, numbers[None])
    return Routes(order // chosen.shape[1], numbers[order] % memories, streams, order.argsort())


class MixtureOfMemories(Mixer):
    """Gated DeltaNet with several states per head, of which every token writes and reads a few (Du et al. 2025).

    `[B, L, width]` -> `[B, L, width]`. A router, softmax(linear), picks the `active` most probable of `memories`
    states; their weights are their probabilities, made to sum to 1. One more state is shared by all tokens, with
    weight 1. A memory that was chosen takes a step of Gated DeltaNet; the others stand still:

        o_t = sum over chosen m of weight_tm S^m_t^T q_t  +  S^shared_t^T q_t.

    Each memory has its own linear maps for k, v, beta and the gate; that of q, the short convolutions (`conv_size`, 0
    for none), A and the bias of the gate are shared. All else is as in `GatedDeltaNet`.

    The rows of tokens, one for each choice, are sorted by memory, and one packed call of `dn_lib.gated_delta_rule`
    (`backend` is its) runs all memories of all sequences; on a CPU, where that would be a loop, they are a batch.
    A convolution looks back at the tokens of its own memory. The cache holds the states of all memories,
    `[B (memories + 1), H, d_k, d_v]`; a single token touches the chosen ones alone. k and v are computed for all
    memories and then picked, which keeps every shape independent of the router's choices at (memories + 1) /
    (active + 1) times the work of those two projections.

    With `active` = 1 the weight is always 1, and nothing but the balance loss (`balance_losses(model)`) trains the
    router.  Raises ValueError for sizes that do not fit and for unknown options.

        >>> MixtureOfMemories(width=32, heads=2)(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int | None = None,
        *,
        memories: int = 4,
        active: int = 2,
        expand_v: float = 2.0,
        conv_size: int = 4,
        output_gate: bool = True,
        beta_range: float = 1.0,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ):
        super().__init__()
        self.collected: list[Tensor] | None = None  # where `balance_losses` gathers, within it
        head_dim = head_dim_or_default(width, heads, head_dim)
        check_integer("memories", memories)
        check_integer("active", active)
        if active > memories:
            raise ValueError(f"active must be at most memories = {memories}, got {active}")
        check_integer("conv_size", conv_size, least=0)
        check_positive("norm_eps", norm_eps)
        if not is_number(beta_range) or not 0 < beta_range <= 2:
            raise ValueError(f"beta_range must be in (0, 2], got {beta_range}")
        self.width, self.heads, self.memories, self.active = width, heads, memories, active
        self.key_dim, self.value_dim = head_dim, value_size(head_dim, expand_v)
        self.beta_range = beta_range
        self.backend = check_choice("backend", backend, BACKENDS)
        keys, values, states = heads * self.key_dim, heads * self.value_dim, memories + 1
        self.router = nn.Linear(width, memories, bias=False)
        self.query = nn.Linear(width, keys, bias=False)
        self.key = nn.Linear(width, states * keys, bias=False)
        self.value = nn.Linear(width, states * values, bias=False)
        self.beta = nn.Linear(width, states * heads, bias=False)
        self.step = nn.Linear(width, states * heads, bias=False)
        self.query_conv, self.key_conv, self.value_conv = (
            ShortConvolution(channels, conv_size) if conv_size else None for channels in (keys, keys, values)
        )
        self.log_rates, self.step_biases = new_rates(heads, 0.0, 16.0), new_step_biases(heads)
        self.gate = nn.Linear(width, values, bias=False) if output_gate else None
        self.norm = RMSNorm(self.value_dim, eps=norm_eps)
        self.output = nn.Linear(values, width, bias=False)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, *, cu_seqlens: Tensor | Documents | None = None
    ) -> Tensor:
        documents = open_documents(x, self.width, cache, cu_seqlens)
        batch, length, _ = x.shape
        weights, chosen = self._route(x)
        if documents is None:
            sequences, count = torch.arange(batch, device=x.device).repeat_interleave(length), batch
        else:
            sequences, count = documents.numbers, len(documents)
        if cache is not None and documents is None and length == 1:
            o = self._one_token(x, chosen[:, 0], cache)
        else:
            routes = sort_by_memory(chosen.flatten(0, 1), sequences, self.memories + 1, count)
            o = self._all_tokens(x, routes, cache)[routes.unsorted]
        o = o.unflatten(0, (batch, length, self.active + 1))
        return self._finish((o * weights[..., None, None].to(o.dtype)).sum(2), x)

    def _all_tokens(self, x: Tensor, routes: Routes, cache: LayerCache | None) -> Tensor:
        """What each row reads, `[R, H, d_v]`: the streams one after the other in one packed call."""
        vectors, beta, g = self._rows(x, routes.tokens, routes.memories)
        q, k, v = (
            self._heads(_convolve(name, getattr(self, name), rows[None], cache, routes.streams))
            for name, rows in vectors.items()
        )
        # On "meta" there are no offsets to be read, and shapes are all that is asked for.
        streams = None if x.device.type == "meta" else routes.streams
        options: dict[str, Any] = {"qk_l2norm": True, "backend": self.backend}
        tensors = q, k, v, beta[None], g[None]
        if streams is None or self.backend == "triton" or not _better_padded(streams, x.device):
            return run_operator(gated_delta_rule_in_full_precision, tensors, cache, streams, **options)[0]
        places = streams.numbers * streams.longest() + streams.positions
        padded = (_padded(rows[0], places, len(streams), streams.longest()) for rows in tensors)
        o = run_operator(gated_delta_rule_in_full_precision, tuple(padded), cache, None, **options)
        return o.flatten(0, 1)[places]

    def _one_token(self, x: Tensor, chosen: Tensor, cache: LayerCache) -> Tensor:
        """The same for x `[B, 1, width]` and `chosen` `[B, active + 1]`: only the states that were chosen are touched.

        Each row is a batch entry of its own, which takes its stream's state and puts the new one back.
        """
        batch, states = x.shape[0], self.memories + 1
        sequences = torch.arange(batch, device=x.device)
        streams = (sequences[:, None] * states + chosen).flatten()
        vectors, beta, g = self._rows(x, sequences.repeat_interleave(self.active + 1), chosen.flatten())
        one = LayerCache()  # what the chosen streams remember, `[B (active + 1), ...]`
        kept = {name: cache.get(name) for name in (*vectors, "state")}
        for name, past in kept.items():
            if past is not None:
                one[name] = past[streams]
        q, k, v = (
            self._heads(rows[:, None] if convolution is None else convolution(rows[:, None], one, name))
            for name, rows in vectors.items()
            for convolution in (getattr(self, name),)
        )
        options: dict[str, Any] = {"qk_l2norm": True, "backend": self.backend}
        o = run_operator(gated_delta_rule_in_full_precision, (q, k, v, beta[:, None], g[:, None]), one, None, **options)
        for name, past in kept.items():
            new = one.get(name)
            if new is not None:
                past = new.new_zeros(batch * states, *new.shape[1:]) if past is None else past.to(new.dtype)
                cache[name] = past.index_copy(0, streams, new)
        return o[:, 0]

    def _rows(self, x: Tensor, tokens: Tensor, memories: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Of rows that belong to `tokens` `[R]` and go to `memories` `[R]`: q, k, v `[R, H d]` by the names of their
        convolutions, beta and the log gates `[R, H]`."""

        def own(layer: nn.Linear) -> Tensor:
            return layer(x).flatten(0, 1).unflatten(-1, (self.memories + 1, -1))[tokens, memories]

        q = self.query(x).flatten(0, 1)[tokens]
        vectors = {"query_conv": q, "key_conv": own(self.key), "value_conv": own(self.value)}
        beta = own(self.beta)
        beta = self.beta_range * beta.to(working_dtype(beta)).sigmoid()
        return vectors, beta, log_gates(own(self.step), self.log_rates, self.step_biases)[1]

    def _heads(self, rows: Tensor) -> Tensor:
        return split_heads(F.silu(rows), self.heads)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers of the memories of each token, the shared one last: `[B, L, active + 1]` both."""
        logits = self.router(x)
        probabilities = logits.to(working_dtype(logits)).softmax(-1)
        weights, chosen = probabilities.topk(self.active, dim=-1)
        if self.collected is not None:
            self.collected.append(balance_loss(probabilities, chosen))
        weights = weights / weights.sum(-1, keepdim=True)
        return F.pad(weights, (0, 1), value=1.0), F.pad(chosen, (0, 1), value=self.memories)

    def _finish(self, o: Tensor, x: Tensor) -> Tensor:
        """o `[B, L, H, d_v]` -> `[B, L, width]`."""
        o = self.norm(o.to(self.norm.weight.dtype)).to(x.dtype)
        if self.gate is not None:
            o = o * F.silu(split_heads(self.gate(x), self.heads))
        return self.output(o.flatten(-2))

    def state_flops(self, length: int) -> float:
        """Gated DeltaNet's, for each memory that a token goes to and for the shared one."""
        return 7 * (self.active + 1) * self.heads * self.key_dim * self.value_dim


def _better_padded(streams: Documents, device: torch.device) -> bool:
    """Whether the streams had better go through the operator side by side, all filled up to the longest.

    The PyTorch forms, which a CPU runs, take packed streams one by one; kernels take them all at once.  They stay
    packed while a model is compiled, since no compiler knows how long they are, and where one long stream among short
    ones would fill more than four times the memory of all rows.
    """
    if device.type != "cpu" or torch.compiler.is_compiling() or streams.length == 0:
        return False
    return len(streams) * streams.longest() <= 4 * streams.length


def _padded(rows: Tensor, places: Tensor, count: int, longest: int) -> Tensor:
    """`[R, ...]` -> `[count, longest, ...]`.  A row of zeros (k, beta and the log gate) leaves a state as it was."""
    return rows.new_zeros(count * longest, *rows.shape[1:]).index_copy(0, places, rows).unflatten(0, (count, longest))


def _convolve(
    name: str, convolution: ShortConvolution | None, rows: Tensor, cache: LayerCache | None, streams: Documents
) -> Tensor:
    """The convolution of each stream by itself, `[1, R, channels]`, after what the cache holds of its past.

    The past, size - 1 rows a stream, is put before the stream's new rows, and what comes out there is left out.
    """
    if convolution is None:
        return rows
    size = convolution.weight.shape[0] - 1
    past = None if cache is None else cache.get(name)
    if cache is None or size == 0:
        return convolution(rows, cu_seqlens=streams)
    if past is None:
        cache[name] = streams.last_rows(rows, size)
        return convolution(rows, cu_seqlens=streams)
    numbers = torch.arange(len(streams), device=rows.device)
    longer = streams.offsets + size * F.pad(numbers + 1, (1, 0))
    old = (longer[:-1, None] + torch.arange(size, device=rows.device)).flatten()
    new = torch.arange(rows.shape[1], device=rows.device) + size * (streams.numbers + 1)
    padded = rows.new_zeros(rows.shape[1] + old.shape[0], rows.shape[2])
    padded = padded.index_copy(0, old, past.to(rows.dtype).flatten(0, 1)).index_copy(0, new, rows[0])[None]
    documents = Documents(longer, padded)
    cache[name] = documents.last_rows(padded, size)
    return convolution(padded, cu_seqlens=documents)[:, new]


@register_mixer("mom")
def _from_config(config: Any) -> MixtureOfMemories:
    names = ("memories", "expand_v", "conv_size", "beta_range", "norm_eps", "backend")
    options = {name: getattr(config, name) for name in names} | {"active": config.active_memories}
    gate = True if config.output_gate is None else config.output_gate
    return MixtureOfMemories(config.width, config.heads, config.head_dim, output_gate=gate, **options)
