"""Documents packed into one row, prompts padded on the left: each as if it were alone."""

import itertools
import re

import pytest
import torch
from small_models import LAYERS, MODELS, SMALL, model_and_tokens

from dn_lib.layers import (
    Attention,
    Documents,
    LayerCache,
    ShortConvolution,
    full_attention,
    rotary_embedding,
    window_attention,
)
from dn_lib.models import LanguageModel, ModelConfig, generate
from dn_lib.testing import offsets, relative_error

# A document is computed in other blocks alone than packed, so sums are rounded in another order. In float64
# (eps 2e-16) a few hundred roundings, through four layers that amplify them, stay far below this.
EXACT = 1e-11
LENGTHS = [5, 1, 0, 13, 2, 9]  # shorter than a convolution, empty, longer than the window of 5 or 6


@pytest.mark.parametrize("name", LAYERS)
def test_a_mixer_takes_each_document_by_itself(name):
    torch.manual_seed(1)
    layer = LAYERS[name]().double()
    x, dy = (torch.randn(1, sum(LENGTHS), 24, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    alone = torch.cat([layer(part) for part in x.split(LENGTHS, dim=1)], dim=1)
    packed = layer(x, cu_seqlens=offsets(LENGTHS, torch.int32))
    assert relative_error(packed, alone) < EXACT
    wanted = [x, *layer.parameters()]
    got, expected = (torch.autograd.grad(y, wanted, dy) for y in (packed, alone))
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= EXACT * (1 + b.norm())


@pytest.mark.parametrize("name", MODELS)
def test_a_model_takes_each_document_by_itself(name):
    model, tokens = model_and_tokens(MODELS[name], length=sum(LENGTHS), batch=1)
    model.double()
    alone = torch.cat([model(part) for part in tokens.split(LENGTHS, dim=1)], dim=1)
    packed = model(tokens, cu_seqlens=offsets(LENGTHS))
    assert relative_error(packed, alone) < EXACT
    got, expected = (torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (packed, alone))
    assert all(relative_error(a, b) < EXACT for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_packed_documents_become_the_sequences_of_an_empty_cache(name):
    """Afterwards each goes on from its own end, by one token and by several."""
    torch.manual_seed(2)
    layer, lengths = LAYERS[name]().double(), [5, 1, 13, 2]
    documents = [torch.randn(1, n + 12, 24, dtype=torch.float64) for n in lengths]
    packed = torch.cat([x[:, :n] for x, n in zip(documents, lengths, strict=True)], dim=1)
    rest = torch.cat([x[:, n:] for x, n in zip(documents, lengths, strict=True)])
    cache = LayerCache()
    with torch.no_grad():
        layer(packed, cache, cu_seqlens=offsets(lengths))
        pieces = [layer(rest[:, a:b], cache) for a, b in itertools.pairwise((0, 1, 2, 3, 11, 12))]
        expected = torch.cat([layer(x)[:, n:] for x, n in zip(documents, lengths, strict=True)])
    assert cache.batch_size == 4
    assert relative_error(torch.cat(pieces, dim=1), expected) < EXACT


@pytest.mark.parametrize("name", MODELS)
def test_prompts_padded_on_the_left_continue_as_each_alone(name):
    model, tokens = model_and_tokens(MODELS[name], length=11, batch=4)
    model.double()  # so that no two logits lie within rounding of each other
    lengths = [3, 11, 1, 7]
    padded = tokens.clone()
    for row, n in zip(padded, lengths, strict=True):
        row[: 11 - n] = -100  # the padding is never looked at
    made = generate(model, padded, 9, temperature=0, lengths=torch.tensor(lengths))
    assert torch.equal(made[:, :11], padded)
    for row, line, n in zip(made, tokens, lengths, strict=True):
        assert torch.equal(row[11 - n :], generate(model, line[None, 11 - n :], 9, temperature=0)[0])


def test_window_attention_sees_its_own_document_only():
    """A window shorter than the documents, and one longer than the row, against the mask written out."""
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, 2, 30, 4, dtype=torch.float64) for _ in range(3))
    numbers = torch.tensor([[0] * 7 + [1] * 11 + [2] * 12, [0] * 20 + [1] * 10])
    i, j = torch.arange(30)[:, None], torch.arange(30)
    same = numbers[:, None, :, None] == numbers[:, None, None, :]
    for window in (1, 4, 9, 64):
        seen = (j <= i) & (j > i - window) & same
        reference = (q @ k.mT / 2).masked_fill(~seen, -torch.inf).softmax(-1) @ v
        assert relative_error(window_attention(q, k, v, window, numbers), reference) < EXACT
    assert relative_error(full_attention(q, k, v, numbers), reference) < EXACT


@pytest.mark.parametrize("name", [name for name in LAYERS if not isinstance(LAYERS[name](), Attention)])
def test_not_even_infinity_reaches_the_next_document(name):
    """Softmax is left out: SDPA adds its mask to a score, and infinity stays infinity there."""
    torch.manual_seed(4)
    layer, x = LAYERS[name]().double(), torch.randn(1, 12, 24, dtype=torch.float64)
    expected = layer(x[:, 5:])
    x[:, 4] = torch.inf
    assert relative_error(layer(x, cu_seqlens=torch.tensor([0, 5, 12]))[:, 5:], expected) < EXACT


def test_last_rows_and_positions():
    documents = Documents(torch.tensor([0, 3, 3, 5]), torch.zeros(1, 5))
    assert documents.numbers.tolist() == [0, 0, 0, 2, 2]
    assert documents.positions.tolist() == [0, 1, 2, 0, 1]
    assert documents.aligned_positions().tolist() == [0, 1, 2, 1, 2]
    rows = documents.last_rows(torch.arange(1.0, 6.0)[None, :, None], size=2)[..., 0]
    assert rows.tolist() == [[2, 3], [0, 0], [4, 5]]


@pytest.mark.parametrize(
    "cu_seqlens, message",
    [
        ([0, 3, 9], "cu_seqlens must rise from 0 to L = 8, got [0, 3, 9]"),
        ([0, 3, 7], "cu_seqlens must rise from 0 to L = 8, got [0, 3, 7]"),
        ([1, 8], "cu_seqlens must rise from 0 to L = 8, got [1, 8]"),
        ([0, 5, 3, 8], "cu_seqlens must rise from 0 to L = 8, got [0, 5, 3, 8]"),
        ([0, -2, 8], "cu_seqlens must rise from 0 to L = 8, got [0, -2, 8]"),
        ([8], "cu_seqlens must be a tensor of N + 1 >= 2 offsets, got [1]"),
        ([[0, 8]], "cu_seqlens must be a tensor of N + 1 >= 2 offsets, got [1, 2]"),
        ([0.0, 8.0], "cu_seqlens must be int32 or int64, got torch.float32"),
    ],
)
def test_wrong_offsets_are_named(cu_seqlens, message):
    model, tokens = model_and_tokens({}, length=8, batch=1)
    for module, x in (
        (model, tokens),
        (model.blocks[0].mixer, torch.zeros(1, 8, 32)),
        (ShortConvolution(4, 3), torch.zeros(1, 8, 4)),
    ):
        with pytest.raises((ValueError, TypeError), match=re.escape(message)):
            module(x, cu_seqlens=torch.tensor(cu_seqlens))


@pytest.mark.parametrize("name", LAYERS)
def test_wrong_shapes_and_caches_are_named(name):
    layer, x, cache = LAYERS[name](), torch.zeros(2, 8, 24), LayerCache()
    layer(x, cache)
    whole = torch.tensor([0, 8])
    for arguments, options, error, message in [
        ((x[..., :-1],), {}, ValueError, "x must be [B, L, width] with width = 24, got [2, 8, 23]"),
        ((x[0],), {}, ValueError, "x must be [B, L, width] with width = 24, got [8, 24]"),
        ((x, {}), {}, TypeError, "cache must be a LayerCache, got dict"),
        ((x[:1], cache), {}, ValueError, "x must have the cache's batch size 2, got [1, 8, 24]"),
        ((x[:1], cache), {"cu_seqlens": whole}, ValueError, "cache must be empty with cu_seqlens"),
        (
            (x,),
            {"cu_seqlens": whole},
            ValueError,
            "cu_seqlens needs a batch size of 1 (documents packed along L), got 2",
        ),
        ((x[:1],), {"cu_seqlens": [0, 8]}, ValueError, "cu_seqlens must be a tensor of N + 1 >= 2 offsets, got list"),
    ]:
        with pytest.raises(error, match=re.escape(message)):
            layer(*arguments, **options)
    layer(x, cache)  # a refused call has left the cache as it was


def test_a_models_cache_must_fit():
    model, tokens = model_and_tokens({}, length=8, batch=1)
    cache = model.new_cache(2)
    with pytest.raises(ValueError, match=r"cu_seqlens must have 2 \+ 1 offsets .*, got 1 \+ 1"):
        model(tokens, cache, cu_seqlens=torch.tensor([0, 8]))
    model(tokens, cache, cu_seqlens=torch.tensor([0, 6, 8]))
    assert cache.length == 6
    with pytest.raises(ValueError, match="cache must be empty with cu_seqlens, got one that holds 6 tokens"):
        model(tokens, cache, cu_seqlens=torch.tensor([0, 6, 8]))
    with pytest.raises(ValueError, match=r"cache must come from this model's new_cache \(4 layers\), got one of 2"):
        model(tokens, LanguageModel(ModelConfig(**SMALL | {"layers": 2})).new_cache(1))
    with pytest.raises(ValueError, match=r"cache must come from this model's new_cache .*, got dict"):
        model(tokens, {})


@pytest.mark.parametrize(
    "lengths, message",
    [
        ([3, 0], "lengths must be from 1 to L = 5, got [3, 0]"),
        ([3, 6], "lengths must be from 1 to L = 5, got [3, 6]"),
        ([3], "lengths must be 2 whole numbers, one a prompt, got torch.int64 [1]"),
        ("3", "lengths must be a tensor or a list of whole numbers, got '3'"),
        ([3, None], "lengths must be a tensor or a list of whole numbers, got [3, None]"),
        ([3.0, 2.0], "lengths must be 2 whole numbers, one a prompt, got torch.float32 [2]"),
    ],
)
def test_wrong_lengths_of_prompts_are_named(lengths, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        generate(LanguageModel(ModelConfig(**SMALL)), torch.zeros(2, 5, dtype=torch.long), 3, lengths=lengths)


def test_rotations_by_position():
    x = torch.randn(1, 3, 1, 8, dtype=torch.float64)
    apart = torch.cat([rotary_embedding(x[:, t : t + 1], start) for t, start in enumerate((4, 0, 9))], dim=1)
    assert torch.equal(rotary_embedding(x, torch.tensor([4, 0, 9])), apart)
    with pytest.raises(ValueError, match=r"start must be a number or \[L\] = \[3\], got \[2\]"):
        rotary_embedding(x, torch.tensor([4, 0]))
    with pytest.raises(ValueError, match=r"x must be \[B, L, H, d\] with d even, got \[1, 3, 1, 7\]"):
        rotary_embedding(x[..., :7])


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_on_a_gpu(name):
    """Documents longer than a chunk and than the window, in one row, against each alone; gradients too."""
    lengths = [300, 1, 0, 70, 141]
    model, tokens = model_and_tokens(MODELS[name] | {"width": 64, "window": 100}, length=sum(lengths), batch=1)
    model, tokens, cu_seqlens = model.cuda(), tokens.cuda(), offsets(lengths, torch.int32).cuda()
    alone = torch.cat([model(part) for part in tokens.split(lengths, dim=1) if part.shape[1]], dim=1)
    packed = model(tokens, cu_seqlens=cu_seqlens)
    # float32 throughout: hundreds of terms in other orders (1e-5), amplified by four layers forward and backward.
    assert relative_error(packed, alone) < 1e-4
    got, expected = (torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (packed, alone))
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 1e-3
    if set(model.config.mixers()) <= {"delta", "attention", "window"}:  # no offset is read on the host
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(tokens, cu_seqlens=cu_seqlens), packed) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_padded_prompts_on_a_gpu(name):
    """The logits after the prompts, rather than tokens: of two that nearly tie, rounding may choose either."""
    lengths = [30, 110, 1, 71]
    model, tokens = model_and_tokens(MODELS[name] | {"width": 64, "window": 40}, length=115, batch=4)
    model, tokens = model.cuda(), tokens.cuda()
    packed = torch.cat([row[:n] for row, n in zip(tokens, lengths, strict=True)])[None]
    rest = torch.stack([row[n : n + 5] for row, n in zip(tokens, lengths, strict=True)])
    cache = model.new_cache(4)
    with torch.inference_mode():
        model(packed, cache, cu_seqlens=offsets(lengths).cuda())
        pieces = torch.cat([model(rest[:, t : t + 1], cache) for t in range(5)], dim=1)
        alone = [model(row[None, : n + 5])[:, n:] for row, n in zip(tokens, lengths, strict=True)]
        assert relative_error(pieces, torch.cat(alone)) < 1e-4
        assert generate(model, tokens, 3, lengths=lengths).shape == (4, 118)
