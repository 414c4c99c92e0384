"""The mixers of chapter 6 against plain recurrences in float64, and their caches."""

import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from small_models import LAYERS

from dn_lib import layers
from dn_lib.forms.decay import gated_linear_attention, retention, selective_scan
from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.layers import (
    Attention,
    DeltaNet,
    GatedLinearAttention,
    LayerCache,
    LinearAttention,
    Mamba,
    RetNet,
    ShortConvolution,
    SwiGLU,
    rotary_embedding,
    window_attention,
)
from dn_lib.testing import relative_error

# Sums of a few hundred terms: 1e-12 leaves float64 (eps 2e-16) three digits to lose, 1e-5 float32 two.
EXACT, SINGLE = 1e-12, 1e-5


def decayed_recurrence(q, k, v, decay, state):
    """S_t = decay_t * S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(d_k), one token at a time."""
    outputs = []
    for t in range(q.shape[-2]):
        state = decay[..., t, :, None] * state + k[..., t, :, None] * v[..., t, None, :]
        outputs.append((q[..., t, None, :] @ state)[..., 0, :] / math.sqrt(q.shape[-1]))
    return torch.stack(outputs, -2), state


@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 65, 150])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, EXACT), (torch.float32, SINGLE)])
def test_decayed_forms_equal_the_recurrence(length, dtype, tolerance):
    torch.manual_seed(length)
    q, k, v, state = (torch.randn(2, 3, *s, dtype=torch.float64) for s in [(length, 6)] * 2 + [(length, 5), (6, 5)])
    per_channel = torch.rand(2, 3, length, 6, dtype=torch.float64)
    per_token = torch.rand(2, 3, length, 1, dtype=torch.float64)
    for function, decay in ((gated_linear_attention, per_channel), (retention, per_token)):
        log_decay = decay.log() if decay.shape[-1] > 1 else decay.log().squeeze(-1)
        o, last = function(*(t.to(dtype) for t in (q, k, v, log_decay)), initial_state=state.to(dtype))
        reference, final = decayed_recurrence(q, k, v, decay, state)
        assert o.dtype == dtype and relative_error(o, reference) < tolerance
        assert relative_error(last, final) < tolerance


@pytest.mark.parametrize("log_decay", [0.0, -1e-4, -30.0, -1e4])
def test_extreme_decays_stay_finite_and_right_in_float32(log_decay):
    """exp(-b) of the textbook factoring overflows float32 as soon as a chunk's decay falls below e^-88."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 100, 4, dtype=torch.float64) for _ in range(3))
    decays = torch.full((1, 1, 100, 4), log_decay, dtype=torch.float64)
    reference, _ = decayed_recurrence(q, k, v, decays.exp(), torch.zeros(1, 1, 4, 4, dtype=torch.float64))
    narrow = [t.float().requires_grad_() for t in (q, k, v, decays)]
    for function, last in ((gated_linear_attention, narrow[3]), (retention, narrow[3][..., 0])):
        o, _ = function(*narrow[:3], last)
        assert relative_error(o.detach(), reference) < SINGLE
        grads = torch.autograd.grad(o.square().sum(), narrow)
        assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 70, 1100])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, EXACT), (torch.float32, SINGLE)])
def test_selective_scan_equals_the_recurrence(length, dtype, tolerance):
    torch.manual_seed(length)
    x, B, C = (torch.randn(2, length, n, dtype=torch.float64) for n in (5, 3, 3))
    delta, A = torch.rand(2, length, 5, dtype=torch.float64) * 3, -5 * torch.rand(5, 3, dtype=torch.float64)
    first = state = torch.randn(2, 5, 3, dtype=torch.float64)
    outputs = []
    for t in range(length):
        state = (delta[:, t, :, None] * A).exp() * state + (delta * x)[:, t, :, None] * B[:, t, None, :]
        outputs.append((state * C[:, t, None, :]).sum(-1))
    y, last = selective_scan(*(t.to(dtype) for t in (x, delta, A, B, C)), initial_state=first.to(dtype))
    assert relative_error(y, torch.stack(outputs, 1)) < tolerance and relative_error(last, state) < tolerance


def test_selective_scan_gradient_through_recomputation():
    torch.manual_seed(0)
    x, delta, B, C = (torch.randn(1, 5, n, dtype=torch.float64) for n in (2, 2, 3, 3))
    inputs = [x, delta.exp(), -torch.rand(2, 3, dtype=torch.float64), B, C]
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *t: selective_scan(*t, chunk_size=2), inputs)


def test_selective_scan_over_several_stretches_has_the_gradient_of_one():
    torch.manual_seed(0)
    x, B, C = (torch.randn(1, 70, n, dtype=torch.float64) for n in (2, 3, 3))
    inputs = [x, x.exp(), -torch.rand(2, 3, dtype=torch.float64), B, C]
    inputs = [t.requires_grad_() for t in inputs]
    many, one = (torch.autograd.grad(selective_scan(*inputs, chunk_size=c)[0].square().sum(), inputs) for c in (1, 64))
    assert all(relative_error(a, b) < EXACT for a, b in zip(many, one, strict=True))


@pytest.mark.parametrize("function, channels", [(gated_linear_attention, 3), (retention, None)])
def test_decayed_gradients(function, channels):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    shape = (1, 5) if channels is None else (1, 5, channels)
    log_decay = torch.rand(shape, dtype=torch.float64).log().requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: function(*t, chunk_size=2), (q, k, v, log_decay))


@pytest.mark.parametrize("name", LAYERS)
def test_pieces_equal_the_whole(name):
    """Split anywhere, the first piece shorter than the convolution too, then one token at a time."""
    torch.manual_seed(1)
    layer, x = LAYERS[name](), torch.randn(2, 21, 24)
    with torch.no_grad():
        whole = layer(x)
        assert whole.shape == x.shape
        for cuts in ([1], [2, 3], [7], [20], [0, 5, 6, 13], list(range(1, 21))):
            cache, edges = LayerCache(), [0, *cuts, 21]
            pieces = [layer(x[:, a:b], cache) for a, b in itertools.pairwise(edges)]
            assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-4), cuts


@pytest.mark.parametrize("name", LAYERS)
def test_no_layer_looks_ahead(name):
    torch.manual_seed(2)
    layer, x = LAYERS[name]().double(), torch.randn(1, 20, 24, dtype=torch.float64)
    changed = x.clone()
    changed[:, 12] += 1
    a, b = layer(x), layer(changed)
    assert torch.allclose(a[:, :12], b[:, :12], atol=1e-12)
    assert (a[:, 12] - b[:, 12]).abs().max() > 1e-6


@pytest.mark.parametrize("name", LAYERS)
def test_every_parameter_has_a_gradient(name):
    torch.manual_seed(3)
    layer = LAYERS[name]()
    layer(torch.randn(2, 20, 24)).square().sum().backward()
    for parameter_name, parameter in layer.named_parameters():
        if name == "window of one" and parameter_name.startswith(("query", "key")):
            continue  # one key: its weight is 1 whatever q and k are
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_keeps_the_state_in_float32(name):
    torch.manual_seed(4)
    layer, x, cache = LAYERS[name](), torch.randn(1, 9, 24), LayerCache()
    reference = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, cache)
        layer(x[:, :1], cache)
    assert "state" not in cache or cache["state"].dtype == torch.float32
    assert relative_error(y.float(), reference) < 0.05  # a dozen roundings of 2^-9 each, some of them amplified


def test_deltanet_layer_is_what_the_chapter_writes():
    """Convolution, SiLU, L2 norm, beta, recurrence, norm per head: written out for one example."""
    torch.manual_seed(5)
    layer, x = DeltaNet(12, 2, beta_range=2.0).double(), torch.randn(1, 9, 12, dtype=torch.float64)

    def convolved(name):
        y = F.pad(getattr(layer, name)(x).mT, (3, 0))
        return F.silu(F.conv1d(y, getattr(layer, f"{name}_conv").weight.permute(2, 1, 0), groups=12)).mT

    q, k, v = (convolved(n).view(1, 9, 2, 6).transpose(1, 2) for n in ("query", "key", "value"))
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    beta = 2 * layer.beta(x).sigmoid().mT
    o, _ = recurrent_delta_rule(q, k, v, beta)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    # The operator may guard the norm of q and k in another way than by 1e-6 under the root: hence 1e-3.
    assert relative_error(layer(x), layer.output(o.transpose(1, 2).flatten(-2))) < 1e-3


def test_delta_steps_are_steps_of_the_operator():
    """With 2 steps a token, output t is what a plain recurrence over 2L steps has after step 2t + 1."""
    torch.manual_seed(6)
    layer, x = DeltaNet(8, 1, steps=2, conv_size=0, qk_norm="l1").double(), torch.randn(1, 5, 8).double()
    q = layers.l1_norm(F.silu(layer.query(x)))
    k = layers.l1_norm(F.silu(layer.key(x)).view(1, 10, 8))
    v, beta = F.silu(layer.value(x)).view(1, 10, 8), layer.beta(x).sigmoid().view(1, 10)
    zeros = torch.zeros_like(q)
    o, _ = recurrent_delta_rule(torch.stack([zeros, q], 2).view(1, 10, 8), k, v, beta)
    assert relative_error(layer(x), layer.output(layer.norm(o[:, 1::2]))) < EXACT


@pytest.mark.parametrize("activation", layers.ACTIVATIONS)
@pytest.mark.parametrize("qk_norm", layers.QK_NORMS)
def test_ablation_options_run(activation, qk_norm):
    torch.manual_seed(7)
    layer = DeltaNet(16, 2, activation=activation, qk_norm=qk_norm)
    x, cache = 0.1 * torch.randn(1, 12, 16), LayerCache()
    with torch.no_grad():
        pieces = torch.cat([layer(x[:, :5], cache), *(layer(x[:, t : t + 1], cache) for t in range(5, 12))], 1)
        assert torch.allclose(pieces, layer(x), atol=1e-4)


def masked_softmax(q, k, v, window):
    length = q.shape[-2]
    i, j = torch.arange(length)[:, None], torch.arange(length)
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill((j > i) | (j <= i - window), -math.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("length, window", [(1, 1), (7, 1), (7, 3), (8, 4), (30, 7), (30, 29), (30, 64)])
def test_window_attention_equals_a_masked_softmax(length, window):
    torch.manual_seed(length)
    q, k, v = (torch.randn(2, 2, length, 4, dtype=torch.float64) for _ in range(3))
    reference = masked_softmax(q, k, v, window)
    assert relative_error(window_attention(q, k, v, window), reference) < EXACT
    last = (length + 1) // 2
    assert relative_error(window_attention(q[:, :, -last:], k, v, window), reference[:, :, -last:]) < EXACT


def test_rotary_scores_depend_on_distance_alone():
    torch.manual_seed(9)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(i, j):
        return (rotary_embedding(q, i) * rotary_embedding(k, j)).sum()

    assert torch.allclose(score(5, 3), score(1005, 1003)) and not torch.allclose(score(5, 3), score(5, 4))
    assert torch.allclose(rotary_embedding(q, 0), q)


def test_short_convolution_equals_torch_and_its_cache_handles_short_pieces():
    torch.manual_seed(10)
    conv, x = ShortConvolution(6, 4, bias=True), torch.randn(2, 10, 6)
    torch.nn.init.normal_(conv.bias)
    reference = F.conv1d(F.pad(x.mT, (3, 0)), conv.weight.permute(2, 1, 0), conv.bias, groups=6).mT
    assert relative_error(conv(x), reference) < SINGLE
    cache = LayerCache()
    pieces = [conv(x[:, a:b], cache) for a, b in ((0, 1), (1, 3), (3, 10))]
    assert torch.equal(torch.cat(pieces, 1), conv(x))
    assert torch.equal(cache["conv"], x[:, -3:])


def test_swiglu():
    torch.manual_seed(11)
    layer, x = SwiGLU(4, 6), torch.randn(3, 4)
    gate, up = x @ layer.gate.weight.T, x @ layer.up.weight.T
    assert torch.allclose(layer(x), (gate * torch.sigmoid(gate) * up) @ layer.output.weight.T, atol=1e-6)


def test_caches_grow_as_they_should():
    """A recurrent state stays; a window stops at w - 1 tokens; full attention holds every token."""
    x = torch.randn(1, 300, 24)
    delta, window, full = (LayerCache() for _ in range(3))
    for part in (x[:, :100], x[:, 100:]):
        DeltaNet(24, 2)(part, delta)
        Attention(24, 2, window=50)(part, window)
        Attention(24, 2)(part, full)
    assert delta["state"].shape == (1, 2, 12, 12)
    assert window["k"].shape == (1, 2, 49, 12)
    assert full["k"].shape[2] >= 300 and full.position == 300


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: DeltaNet(10, 3), "heads must divide width, got heads = 3 and width = 10"),
        (lambda: Attention(10, 3), "heads must divide width"),
        (lambda: Attention(6, 2), "head_dim must be even"),
        (lambda: GatedLinearAttention(6, 2), "head_dim must be even"),
        (lambda: DeltaNet(8, 2, activation="gelu"), "activation must be one of silu, relu, elu1, identity"),
        (lambda: DeltaNet(8, 2, qk_norm="max"), "qk_norm must be one of l2, l1, none"),
        (lambda: DeltaNet(8, 2, beta_range=3.0), r"beta_range must be in \(0, 2\], got 3.0"),
        (lambda: Attention(8, 2, window=0), "window must be an integer of at least 1, got 0"),
        (lambda: ShortConvolution(4, 0), "size must be an integer of at least 1, got 0"),
        (lambda: DeltaNet(8, 2, qk_norm=["l2"]), "qk_norm must be one of l2, l1, none, got .'l2'."),
        (lambda: DeltaNet(8, 2, beta_range="1"), r"beta_range must be in \(0, 2\], got 1"),
        (lambda: DeltaNet(8, 2.0), "heads must be an integer of at least 1, got 2.0"),
        (lambda: DeltaNet("8", 2), "width must be an integer of at least 1, got '8'"),
        (lambda: RetNet(8, 2, 4.0), "head_dim must be an integer of at least 1, got 4.0"),
        (lambda: RetNet(8, 2, conv_size=-1), "conv_size must be an integer of at least 0, got -1"),
        (lambda: LinearAttention(8, 2, steps=True), "steps must be an integer of at least 1, got True"),
        (lambda: GatedLinearAttention(8, 2, rank=0), "rank must be an integer of at least 1, got 0"),
        (lambda: Mamba(8, expand=0), "expand must be an integer of at least 1, got 0"),
        (lambda: Mamba(8, state_size=1.5), "state_size must be an integer of at least 1, got 1.5"),
        (lambda: SwiGLU(8, None), "hidden must be an integer of at least 1, got None"),
        (lambda: DeltaNet(8, 0), "heads must be an integer of at least 1, got 0"),
        (lambda: DeltaNet(8, 2, norm_eps=math.nan), "norm_eps must be a finite number above 0, got nan"),
        (lambda: LinearAttention(8, 2, output_gate="no"), "output_gate must be True or False, got 'no'"),
        (lambda: RetNet(8, 2, rope_base=0), "rope_base must be a finite number above 0, got 0"),
        (lambda: Attention(8, 2, rope_base="1"), "rope_base must be a finite number above 0, got '1'"),
        (lambda: ShortConvolution(4, 2, bias=None), "bias must be True or False, got None"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def zeros(*shape):
    return torch.zeros(*shape)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda q: retention(q, q[:, :3], q, q[..., 0]),
            "k must be [..., L, d_k] = [2, 5, 4] to match q, got [2, 3, 4]",
        ),
        (lambda q: retention(q, q, q, q), "g must be [..., L] = [2, 5] to match q, got [2, 5, 4]"),
        (lambda q: retention(q, q, q, None), "g must be a tensor, got NoneType"),
        (lambda q: retention(None, q, q, q[..., 0]), "q must be a tensor, got NoneType"),
        (lambda q: retention(q, q, q, q[..., 0], chunk_size=0), "chunk_size must be an integer of at least 1, got 0"),
        (lambda q: retention(q, q, q, q[..., 0], scale="x"), "scale must be a number or None, got 'x'"),
        (lambda q: retention(q, q, q, q[..., 0], initial_state=q), "initial_state must be [..., d_k, d_v] = [2, 4, 4]"),
        (lambda q: gated_linear_attention(q, q, q, q[..., 0]), "g must be [..., L, d_k] = [2, 5, 4]"),
        (lambda q: selective_scan(q[0], q, zeros(4, 3), q, q), "x must be [B, L, D], got [5, 4]"),
        (lambda q: selective_scan(q, q[:1], zeros(4, 3), q, q), "delta must be [B, L, D] = [2, 5, 4] to match x"),
        (lambda q: selective_scan(q, q, zeros(3, 4), q, q), "A must be [D, N] with D = 4 to match x, got [3, 4]"),
        (lambda q: selective_scan(q, q, zeros(4, 3), q, q), "B must be [B, L, N] = [2, 5, 3] to match x and A"),
        (lambda q: rotary_embedding(q), "x must be [B, L, H, d] with d even, got [2, 5, 4]"),
        (lambda q: window_attention(q, q, q, 3), "q must be [B, H, L, d], got [2, 5, 4]"),
        (
            lambda q: window_attention(q[None], q[None, :, :3], q[None], 3),
            "k must be [B, H, L + past, d] with L = 5 to match q, got [1, 2, 3, 4]",
        ),
        (lambda q: window_attention(*[q[None]] * 3, 0), "window must be an integer of at least 1, got 0"),
        (
            lambda q: window_attention(*[q[None]] * 3, 2, zeros(5)),
            "documents must be [B or 1, L + past] = [1, 5] to match k, got [5]",
        ),
        (lambda q: SwiGLU(8, 6)(q), "x must be [..., width] with width = 8, got [2, 5, 4]"),
        (lambda q: ShortConvolution(8, 3)(q), "x must be [B, L, channels] with channels = 8, got [2, 5, 4]"),
        (lambda q: ShortConvolution(4, 3)(q, {}), "cache must be a LayerCache, got dict"),
        (lambda q: ShortConvolution(4, 3)(q, LayerCache(), 5), "name must be a string, got 5"),
        (lambda q: convolve_twice(q, q[:1]), "x must have the cache's batch size 2, got [1, 5, 4]"),
        (lambda q: window_attention(q[None], q[None], zeros(()), 3), "v must be [B, H, L + past, d_v]"),
        (lambda q: window_attention(*[q[None]] * 3, 2, [0]), "documents must be a tensor [B or 1, L + past], got list"),
        (
            lambda q: window_attention(*[q[None]] * 3, 2, torch.zeros(1, 5, device="meta")),
            "documents must be on cpu like q, got meta",
        ),
        (lambda q: rotary_embedding(q[None], 1.5), "start must be a whole number or a tensor [L], got 1.5"),
        (lambda q: rotary_embedding(q[None], base=-1), "base must be a finite number above 0, got -1"),
        (lambda q: layers.l1_norm(None), "x must be a tensor, got NoneType"),
        (lambda q: layers.l2_norm(q.long()), "x must be a floating-point tensor"),
        (
            lambda q: DeltaNet(4, 1)(q[:1], cu_seqlens=torch.tensor([0, 5]).to_sparse()),
            "cu_seqlens must be a dense tensor of offsets, got layout torch.sparse_coo",
        ),
        (lambda q: DeltaNet(4, 1)(q.long()), "x must be a floating-point tensor, got torch.int64 [2, 5, 4]"),
    ],
)
def test_wrong_shapes_are_named(call, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        call(zeros(2, 5, 4))


def convolve_twice(first, second):
    convolution, cache = ShortConvolution(4, 3), LayerCache()
    convolution(first, cache)
    return convolution(second, cache)


def test_functions_take_their_arguments_by_name():
    q, x = torch.randn(2, 5, 4), torch.rand(2, 5, 3)
    for function, arguments in (
        (retention, {"q": q, "k": q, "v": q, "g": -x[..., 0]}),
        (gated_linear_attention, {"q": q, "k": q, "v": q, "g": -q.abs()}),
        (selective_scan, {"x": x, "delta": x, "A": -x[0, :3], "B": x, "C": x}),
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            named = function(**arguments)
        for a, b in zip(named, function(*arguments.values()), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", LAYERS)
def test_shapes_can_be_worked_out_on_meta(name):
    x = torch.empty(2, 5, 24, device="meta")
    assert LAYERS[name]().to("meta")(x).shape == x.shape


def test_at_length_zero_the_state_is_a_copy():
    """Decoding writes into the state that it is given: it must not be the caller's."""
    q, A = zeros(1, 0, 4), zeros(4, 4)
    for function, arguments in (
        (retention, (q, q, q, q[..., 0])),
        (gated_linear_attention, (q, q, q, q)),
        (selective_scan, (q, q, A, q, q)),
    ):
        first = torch.randn(1, 4, 4)
        o, last = function(*arguments, initial_state=first)
        assert o.shape == q.shape and torch.equal(first, last) and first.data_ptr() != last.data_ptr()


def test_a_wide_state_is_not_narrowed():
    q, first = torch.randn(1, 5, 4), torch.randn(1, 4, 4, dtype=torch.float64)
    for function, arguments in (
        (retention, (q, q, q, -q[..., 0].abs())),
        (gated_linear_attention, (q, q, q, -q.abs())),
        (selective_scan, (q, q.abs(), -torch.rand(4, 4), q, q)),
    ):
        o, last = function(*arguments, initial_state=first)
        assert o.dtype == torch.float32 and last.dtype == torch.float64
