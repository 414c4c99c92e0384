"""Equations of study 4, in its order.  "By hand" means: token by token and memory by memory, nothing sorted."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.layers import GatedDeltaNet, LayerCache, Liger, MixtureOfMemories, balance_loss
from dn_lib.layers.mom import sort_by_memory
from dn_lib.models import LanguageModel, ModelConfig
from dn_lib.models.lora import LoRALinear, add_lora
from dn_lib.ops import gated_delta_rule
from dn_lib.teaching.registry import Equation


# Inputs ------------------------------------------------------------------------------------------------
def _randint(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (1,), generator=generator))


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _rand(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def _chosen(generator: torch.Generator, length: int, memories: int, active: int) -> Tensor:
    return _rand(generator, length, memories).topk(active).indices


# The router --------------------------------------------------------------------------------------------
def _router(generator: torch.Generator) -> tuple:
    """x, the router's matrix, and how many memories are chosen: at least two, at least one is not."""
    memories, width = _randint(generator, 3, 6), _randint(generator, 2, 5)
    active = _randint(generator, 2, memories - 1)
    return _randn(generator, _randint(generator, 2, 8), width), _randn(generator, memories, width), active


def _weights_of_the_layer(x: Tensor, router: Tensor, active: int) -> Tensor:
    """What the library's layer gives each memory of each token, `[L, M + 1]`, the shared one last."""
    layer = MixtureOfMemories(x.shape[1], 1, 2, memories=len(router), active=active).double()
    layer.router.weight.data.copy_(router)
    weights, chosen = layer._route(x[None])
    return x.new_zeros(len(x), len(router) + 1).scatter(1, chosen[0], weights[0])


def _weights(x, router, active, *, renormalised=True, shared=1.0, equal=False, over=1):
    p = (x @ router.T).softmax(over)
    kept = p * (p >= p.topk(active).values[:, -1:])
    kept = (kept > 0) / active if equal else kept / kept.sum(1, keepdim=True) if renormalised else kept
    return F.pad(kept, (0, 1), value=shared)


router_weights = Equation(
    label="eq-s4-router-weights",
    kind="definition",
    sample=_router,
    left=_weights_of_the_layer,
    right=_weights,
    mutants={
        "not renormalised": lambda *x: _weights(*x, renormalised=False),
        "the shared memory weighted like one of many": lambda *x: _weights(*x, shared=0.5),
        "all chosen memories alike": lambda *x: _weights(*x, equal=True),
        "softmax over time": lambda *x: _weights(*x, over=0),
    },
)


# One token, several memories ----------------------------------------------------------------------------
def _mixture(generator: torch.Generator) -> tuple:
    """q, and of every memory k (unit), v, beta, log gates; the choices and weights; the shared memory is the last."""
    length, memories = _randint(generator, 5, 12), _randint(generator, 2, 4)
    d_k, d_v, active = _randint(generator, 2, 4), _randint(generator, 2, 4), _randint(generator, 1, memories)
    states = memories + 1
    k, v = _unit(_randn(generator, length, states, d_k)), _randn(generator, length, states, d_v)
    beta, g = _rand(generator, length, states), -_rand(generator, length, states)
    chosen = F.pad(_chosen(generator, length, memories, active), (0, 1), value=memories)
    weights = F.pad(_rand(generator, length, active) + 0.1, (0, 1), value=1.0)
    return _randn(generator, length, d_k), k, v, beta, g, chosen, weights


def _packed(q, k, v, beta, g, chosen, weights):
    """Rows sorted by memory, one packed call of the operator, and the sum over each token's rows."""
    length, memories = k.shape[:2]
    routes = sort_by_memory(chosen, torch.zeros(length, dtype=torch.long), memories, 1)
    rows, streams = (routes.tokens, routes.memories), routes.streams
    inputs = [x[None, :, None] for x in (q[routes.tokens], k[rows], v[rows], beta[rows], g[rows])]
    o, _ = gated_delta_rule(*inputs, scale=1.0, cu_seqlens=streams.offsets, backend="recurrent")
    o = o[0, :, 0][routes.unsorted].unflatten(0, (length, -1))
    return (weights[..., None] * o).sum(1)


def _by_hand(
    q, k, v, beta, g, chosen, weights, *, still=True, read_all=False, before=False, weighted=True, write=False
):
    length, memories = k.shape[:2]
    S, o = q.new_zeros(memories, q.shape[1], v.shape[2]), []
    for t in range(length):
        old = S.clone()
        if not still:
            S = S * g[t, :, None, None].exp()
        for m, w in zip(chosen[t].tolist(), weights[t].tolist(), strict=True):
            decayed = g[t, m].exp() * old[m]
            strength = w * beta[t, m] if write else beta[t, m]
            S[m] = decayed + strength * torch.outer(k[t, m], v[t, m] - decayed.T @ k[t, m])
        read = old if before else S
        given = dict(zip(chosen[t].tolist(), weights[t].tolist(), strict=True))
        names = range(memories) if read_all else given
        parts = [(given.get(m, 1.0) if weighted else 1.0) * (read[m].T @ q[t]) for m in names]
        o.append(torch.stack(parts).sum(0))
    return torch.stack(o)


mom_step = Equation(
    label="eq-s4-mom-step",
    kind="definition",
    sample=_mixture,
    left=_packed,
    right=_by_hand,
    mutants={
        "memories that were not chosen decay as well": lambda *x: _by_hand(*x, still=False),
        "all memories are read": lambda *x: _by_hand(*x, read_all=True),
        "read before the write": lambda *x: _by_hand(*x, before=True),
        "weights left out": lambda *x: _by_hand(*x, weighted=False),
        "weights in the write as well": lambda *x: _by_hand(*x, write=True),
    },
)


# A wide key ---------------------------------------------------------------------------------------------
def _one_memory(generator: torch.Generator) -> tuple:
    """q, unit k, v, beta, the memory of each token, and how many there are."""
    length, memories = _randint(generator, 6, 12), _randint(generator, 2, 4)
    d_k, d_v = _randint(generator, 2, 4), _randint(generator, 2, 4)
    m = _chosen(generator, length, memories, 1)[:, 0]
    k, v = _unit(_randn(generator, length, d_k)), _randn(generator, length, d_v)
    return _randn(generator, length, d_k), k, v, 2 * _rand(generator, length), m, memories


def _wide(x: Tensor, m: Tensor, memories: int) -> Tensor:
    """The Kronecker product of the unit vector number m and x, row by row: `[L, M d]`."""
    return torch.stack([torch.kron(F.one_hot(i, memories).to(x), row) for i, row in zip(m, x, strict=True)])


def _separate_states(q, k, v, beta, m, memories):
    states, o = [q.new_zeros(q.shape[1], v.shape[1]) for _ in range(memories)], []
    for t, i in enumerate(m.tolist()):
        states[i] = states[i] + beta[t] * torch.outer(k[t], v[t] - states[i].T @ k[t])
        o.append(states[i].T @ q[t])
    return torch.stack(o), torch.cat(states)


def _wide_states(q, k, v, beta, m, memories, *, read=None, keys=None):
    keys = _wide(k, m, memories) if keys is None else keys
    o, S = recurrent_delta_rule(
        _wide(q, m, memories) if read is None else read, keys, v, beta, scale=1.0, initial_state=None
    )
    return o, S


wide_key = Equation(
    label="eq-s4-wide-key",
    kind="identity",
    sample=_one_memory,
    left=_separate_states,
    right=_wide_states,
    mutants={
        "the key in every block": lambda q, k, v, beta, m, M: _wide_states(q, k, v, beta, m, M, keys=k.repeat(1, M)),
        "the query in every block": lambda q, k, v, beta, m, M: _wide_states(q, k, v, beta, m, M, read=q.repeat(1, M)),
        "the next block": lambda q, k, v, beta, m, M: _wide_states(q, k, v, beta, (m + 1) % M, M),
    },
)


def _two_blocks(generator: torch.Generator) -> tuple:
    """Two wide keys in different blocks, and their strengths."""
    d, memories = _randint(generator, 2, 4), _randint(generator, 2, 4)
    m = _rand(generator, memories).topk(2).indices
    return _wide(_unit(_randn(generator, 2, d)), m, memories), 2 * _rand(generator, 2)


def _one_step(keys: Tensor, beta: Tensor) -> Tensor:
    """I - sum of beta k k^T over the rows of `keys`."""
    return torch.eye(keys.shape[1], dtype=keys.dtype) - keys.T @ (beta[:, None] * keys)


orthogonal_steps = Equation(
    label="eq-s4-orthogonal-steps",
    kind="identity",
    sample=_two_blocks,
    left=lambda keys, beta: _one_step(keys[1:], beta[1:]) @ _one_step(keys[:1], beta[:1]),
    right=_one_step,
    mutants={
        "one key that is the sum": lambda keys, beta: _one_step(keys.sum(0, keepdim=True), beta.mean(0, keepdim=True)),
        "only the later step": lambda keys, beta: _one_step(keys[1:], beta[1:]),
        "strengths exchanged": lambda keys, beta: _one_step(keys, beta.flip(0)),
    },
)


def _stored(generator: torch.Generator) -> tuple:
    """Random keys, their memories; some memories get more keys than they have rows, some fewer."""
    d, memories = _randint(generator, 3, 5), _randint(generator, 2, 4)
    counts = [_randint(generator, 0, 2 * d) for _ in range(memories - 1)] + [2 * d]
    m = torch.repeat_interleave(torch.arange(memories), torch.tensor(counts))
    m = m[torch.randperm(len(m), generator=generator)]
    return _randn(generator, len(m), d), m, memories


def _returned(k: Tensor, m: Tensor, memories: int) -> float:
    """The trace of the map from the stored values to what the best state returns for the same keys."""
    keys = _wide(k, m, memories)
    return (keys @ torch.linalg.pinv(keys)).trace().item()


split_capacity = Equation(
    label="eq-s4-split-capacity",
    kind="identity",
    sample=_stored,
    left=_returned,
    right=lambda k, m, memories: float(sum(min(n, k.shape[1]) for n in m.bincount(minlength=memories).tolist())),
    mutants={
        "one state of d rows": lambda k, m, memories: float(min(len(k), k.shape[1])),
        "every memory full": lambda k, m, memories: float(memories * k.shape[1]),
        "everything stored": lambda k, m, memories: float(len(k)),
    },
)


def _sizes(generator: torch.Generator) -> tuple:
    """Heads, keys per head, values per head, memories; width is heads times keys."""
    return *(_randint(generator, 1, 3) for _ in range(3)), _randint(generator, 1, 4)


def _state_numbers(heads: int, d_k: int, expand: int, memories: int) -> tuple[int, int]:
    """Numbers in the states of a MoM and of a Gated DeltaNet after one token, from their caches."""
    width, counts = heads * d_k, []
    mom = MixtureOfMemories(width, heads, d_k, memories=memories, active=1, expand_v=float(expand), conv_size=0)
    for layer in (mom, GatedDeltaNet(width, heads, d_k, expand_v=float(expand), conv_size=0)):
        cache = LayerCache()
        with torch.no_grad():
            layer(torch.zeros(1, 1, width), cache)
        counts.append(cache["state"].numel())
    return counts[0], counts[1]


def _state_formula(heads, d_k, expand, memories, shared=1):
    one = heads * d_k * expand * d_k
    return (memories + shared) * one, one


mom_state = Equation(
    label="eq-s4-mom-state",
    kind="count",
    sample=_sizes,
    left=_state_numbers,
    right=_state_formula,
    trials=4,
    mutants={
        "the shared memory forgotten": lambda *x: _state_formula(*x, shared=0),
        "one state": lambda *x: (_state_formula(*x)[1], _state_formula(*x)[1]),
    },
)


# Agreement ----------------------------------------------------------------------------------------------
def _spread(generator: torch.Generator) -> tuple:
    """Shares of values `[M]` and of keys among all tokens, and N: the memories, of M, that get keys or values."""
    memories = _randint(generator, 2, 5)
    f = _rand(generator, memories) + 4.0  # nearly even, so that the keys can fill up what values leave
    nu = 0.1 + 0.2 * _rand(generator, 1).item()
    return F.pad(f / f.sum(), (0, _randint(generator, 1, 2))), nu * (1.5 + _rand(generator, 1).item()), nu, memories


def _meet(f: Tensor, kappa: float, nu: float, memories: int) -> Tensor:
    """How often a key and a value meet, where keys fill each of the N memories up to the same number of tokens."""
    g = ((kappa + nu) / memories - nu * f) / kappa * (f > 0)
    return torch.outer(f, g / g.sum()).trace()


agreement = Equation(
    label="eq-s4-agreement",
    kind="identity",
    sample=_spread,
    left=_meet,
    right=lambda f, kappa, nu, n: (kappa + nu) / (kappa * n) - nu / kappa * f.square().sum(),
    mutants={
        "as if keys alone were even": lambda f, kappa, nu, n: f.new_tensor(1 / n),
        "all memories counted, the filler's too": lambda f, kappa, nu, n: (
            (kappa + nu) / (kappa * len(f)) - nu / kappa * f.square().sum()
        ),
        "keys and values the wrong way round": lambda f, kappa, nu, n: (
            (kappa + nu) / (nu * n) - kappa / nu * f.square().sum()
        ),
    },
)


# Balance ------------------------------------------------------------------------------------------------
def _logits(generator: torch.Generator) -> tuple:
    memories = _randint(generator, 3, 5)
    return _randn(generator, _randint(generator, 4, 9), memories), _randint(generator, 1, 2)


def _balance_by_autograd(z: Tensor, active: int) -> Tensor:
    z = z.clone().requires_grad_()
    p = z.softmax(-1)
    return torch.autograd.grad(balance_loss(p, p.topk(active).indices), z)[0]


def _balance_gradient(z: Tensor, active: int, *, own=True, factor=True, sign=1) -> Tensor:
    length, memories = z.shape
    p = z.softmax(-1)
    f = F.one_hot(p.topk(active).indices, memories).sum((0, 1)).to(z) / (length * active)
    mean = (p * f).sum(-1, keepdim=True) if own else 1 / memories
    return sign * (memories if factor else 1) / length * p * (f - mean)


balance_gradient = Equation(
    label="eq-s4-balance-gradient",
    kind="identity",
    sample=_logits,
    left=_balance_by_autograd,
    right=_balance_gradient,
    mutants={
        "compared with 1/M, not with the token's own mean": lambda *x: _balance_gradient(*x, own=False),
        "the factor M left out": lambda *x: _balance_gradient(*x, factor=False),
        "busy memories pushed up": lambda *x: _balance_gradient(*x, sign=-1),
    },
)


# Liger ----------------------------------------------------------------------------------------------------
def _head(generator: torch.Generator) -> tuple:
    """Inputs of a layer of one head, and its three matrices."""
    d, length = 2 * _randint(generator, 1, 3), _randint(generator, 3, 9)
    return _randn(generator, length, d), *(_randn(generator, d, d) for _ in range(3))


def _linear_half(x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The library's layer with nothing of the window, its output map the identity."""
    layer = Liger(x.shape[1], 1, window=2, share=1.0, backend="recurrent").double()
    for name, weight in (("query", query), ("key", key), ("value", value), ("output", torch.eye(x.shape[1]))):
        getattr(layer, name).weight.data.copy_(weight)
    return layer(x[None])[0].detach()


def _liger(x, query, key, value, *, gate="key", root=16, late=False, features=True):
    q, k, v = x @ query.T, x @ key.T, x @ value.T
    phi_q, phi_k = (q.softmax(-1), k.softmax(-1)) if features else (q, k)
    alpha = {"key": k, "features": phi_k, "value": v}[gate].sigmoid() ** (1 / root)
    S, o = x.new_zeros(x.shape[1], x.shape[1]), []
    for t in range(len(x)):
        decay = alpha[t] if gate == "value" else alpha[t, :, None]
        write = torch.outer(phi_k[t], v[t])
        S = decay * (S + write) if late else decay * S + write
        o.append(S.T @ phi_q[t])
    return torch.stack(o)


liger_step = Equation(
    label="eq-s4-liger-step",
    kind="definition",
    sample=_head,
    left=_linear_half,
    right=_liger,
    mutants={
        "gate from the features": lambda *x: _liger(*x, gate="features"),
        "gate on the channels of the value": lambda *x: _liger(*x, gate="value"),
        "no sixteenth root": lambda *x: _liger(*x, root=1),
        "the new write decays too": lambda *x: _liger(*x, late=True),
        "no feature map": lambda *x: _liger(*x, features=False),
    },
)

liger_life = Equation(
    label="eq-s4-liger-life",
    kind="identity",
    sample=lambda g: (_randn(g, 5),),
    # Left: after how many tokens the product of equal gates is one half, from the gate itself.
    left=lambda k: -1 / torch.log2(k.sigmoid() ** (1 / 16)),
    right=lambda k: 16 * math.log(2) / torch.log1p((-k).exp()),
    mutants={
        "the sign of the key": lambda k: 16 * math.log(2) / torch.log1p(k.exp()),
        "no sixteenth root": lambda k: math.log(2) / torch.log1p((-k).exp()),
        "to 1/e instead of one half": lambda k: 16 / torch.log1p((-k).exp()),
    },
)


def _cached(generator: torch.Generator) -> tuple:
    heads = _randint(generator, 1, 2)
    return (
        heads,
        2 * _randint(generator, 1, 3),
        _randint(generator, 1, 4),
        _randint(generator, 2, 6),
        _randint(generator, 1, 12),
    )


def _numbers_kept(heads: int, d: int, layers: int, window: int, tokens: int) -> int:
    config = ModelConfig(vocab_size=7, width=heads * d, layers=layers, heads=heads, mixer="liger", window=window)
    model = LanguageModel(config)
    cache = model.new_cache(1)
    with torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long), cache)
    return cache.bytes() // 4  # all of it is in float32


def _kept_formula(heads, d, layers, window, tokens, *, own=1, state=True, full=False):
    kept = tokens if full else min(tokens, window - own)
    return layers * heads * ((d * d if state else 0) + 2 * d * kept)


liger_cache = Equation(
    label="eq-s4-liger-cache",
    kind="count",
    sample=_cached,
    left=_numbers_kept,
    right=_kept_formula,
    trials=6,
    mutants={
        "the state forgotten": lambda *x: _kept_formula(*x, state=False),
        "a cache without end": lambda *x: _kept_formula(*x, full=True),
        "the token itself kept as well": lambda *x: _kept_formula(*x, own=0),
    },
)


# LoRA -----------------------------------------------------------------------------------------------------
def _adapter(generator: torch.Generator) -> tuple:
    """x, W, A, B, alpha: inputs and outputs of different sizes, a rank below both."""
    inputs, outputs, rank = _randint(generator, 4, 6), _randint(generator, 7, 9), _randint(generator, 2, 3)
    sizes = ((5, inputs), (outputs, inputs), (rank, inputs), (outputs, rank))
    return *(_randn(generator, *size) for size in sizes), 1 + 9 * _rand(generator, 1).item()


def _adapted(x: Tensor, W: Tensor, A: Tensor, B: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The library's layer on x, and the weight that it merges into."""
    linear = torch.nn.Linear(W.shape[1], W.shape[0], bias=False).double()
    linear.weight.data.copy_(W)
    layer = LoRALinear(linear, len(A), alpha)
    layer.down.data.copy_(A)
    layer.up.data.copy_(B)
    return layer(x).detach(), layer.merged().weight.detach()


def _sum_of_maps(x, W, A, B, factor):
    merged = W + factor * B @ A
    return x @ merged.T, merged


lora = Equation(
    label="eq-s4-lora",
    kind="definition",
    sample=_adapter,
    left=_adapted,
    right=lambda x, W, A, B, alpha: _sum_of_maps(x, W, A, B, alpha / len(A)),
    mutants={
        "not divided by the rank": lambda x, W, A, B, alpha: _sum_of_maps(x, W, A, B, alpha),
        "no factor": lambda x, W, A, B, alpha: _sum_of_maps(x, W, A, B, 1.0),
        "the old weight dropped": lambda x, W, A, B, alpha: _sum_of_maps(x, 0 * W, A, B, alpha / len(A)),
        "divided by the width": lambda x, W, A, B, alpha: _sum_of_maps(x, W, A, B, alpha / W.shape[1]),
    },
)


def _first_gradients(x: Tensor, W: Tensor, A: Tensor, B: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The gradients of A and B at B = 0, for the loss sum(sin y), by autograd."""
    A, B = A.clone().requires_grad_(), torch.zeros_like(B).requires_grad_()
    y = x @ W.T + alpha / len(A) * (x @ A.T) @ B.T
    dA, dB = torch.autograd.grad(y.sin().sum(), (A, B))
    return dA, dB


def _first_formula(x, W, A, B, alpha, *, factor=None, transposed=False):
    G = (x @ W.T).cos().T @ x  # the gradient of the loss with respect to W
    factor = alpha / len(A) if factor is None else factor
    return (factor * B.T @ G if transposed else torch.zeros_like(A)), factor * G @ A.T


lora_gradient = Equation(
    label="eq-s4-lora-gradient",
    kind="identity",
    sample=_adapter,
    left=_first_gradients,
    right=_first_formula,
    mutants={
        "A learns in the first step": lambda *x: _first_formula(*x, transposed=True),
        "the factor left out": lambda *x: _first_formula(*x, factor=1.0),
    },
)


def _lora_sizes(generator: torch.Generator) -> tuple:
    return 2 * _randint(generator, 2, 6), _randint(generator, 1, 3), _randint(generator, 1, 3)


def _trained_numbers(width: int, layers: int, rank: int) -> int:
    model = LanguageModel(ModelConfig(vocab_size=7, width=width, layers=layers, heads=1, mixer="liger"))
    add_lora(model, rank=rank)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


lora_count = Equation(
    label="eq-s4-lora-count",
    kind="count",
    sample=_lora_sizes,
    left=_trained_numbers,
    right=lambda d, layers, r: 6 * layers * r * d,
    trials=4,
    mutants={
        "one of the two matrices": lambda d, layers, r: 3 * layers * r * d,
        "the whole matrices": lambda d, layers, r: 3 * layers * d * d,
        "one layer": lambda d, layers, r: 6 * r * d if layers > 1 else 0,
    },
)

ENTRIES = [
    router_weights,
    mom_step,
    wide_key,
    orthogonal_steps,
    split_capacity,
    mom_state,
    agreement,
    balance_gradient,
    liger_step,
    liger_life,
    liger_cache,
    lora,
    lora_gradient,
    lora_count,
]
