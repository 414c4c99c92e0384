"""Models compiled, on a GPU: every length, decoding with CUDA graphs, what fits into memory.  `make gpu` runs it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import dn_lib
from dn_lib.layers import Attention, window_attention
from dn_lib.models import LanguageModel, ModelConfig
from dn_lib.testing import relative_error

pytestmark = pytest.mark.gpu

SMALL = {"vocab_size": 50, "width": 64, "heads": 2, "window": 40, "hidden": 64}
HYBRIDS = [("delta", "window"), ("delta", "attention")]
# float32 with TF32 off: relative errors of 2^-24, sums of at most a few hundred terms, two layers.
SINGLE = 1e-4


@pytest.fixture(autouse=True)
def precise():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    torch.set_float32_matmul_precision(before)


def hybrid(pattern):
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(**SMALL, layers=len(pattern), pattern=pattern)).cuda()


@pytest.mark.parametrize("pattern", HYBRIDS)
def test_a_hybrid_compiles_a_few_times_for_all_lengths(pattern):
    """Forward and backward, far beyond a chunk: the delta rule is one node, however long the sequence."""
    model, counter = hybrid(pattern), CompileCounterWithBackend("inductor")
    fast = torch.compile(model, backend=counter, fullgraph=True)
    for length in (33, 40, 47, 64, 80, 97, 160, 200, 333, 512, 777, 1000):
        tokens = torch.randint(50, (2, length), device="cuda")
        gradients = []
        for run in (fast, model):
            loss = F.cross_entropy(run(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
        assert relative_error(*gradients) < SINGLE, length
    assert counter.frame_count <= 8  # after eight torch.compile gives up


@pytest.mark.parametrize("pattern", [("delta",), ("linear",), *HYBRIDS])
def test_decoding_with_cuda_graphs_reads_the_states_it_wrote(pattern):
    """mode="reduce-overhead" returns memory that the next call overwrites; a cache is read in the next call."""
    model = hybrid(pattern)
    fast = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    tokens = torch.randint(50, (2, 60), device="cuda")
    with torch.no_grad():
        whole, cache = model(tokens), model.new_cache(2)
        pieces = [model(tokens[:, :45], cache)]
        for t in range(45, 60):
            torch.compiler.cudagraph_mark_step_begin()
            pieces.append(fast(tokens[:, t : t + 1], cache).clone())
    assert relative_error(torch.cat(pieces, 1), whole) < SINGLE


def test_two_caches_take_turns_under_cuda_graphs():
    model = hybrid(("delta",))
    fast = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    tokens = torch.randint(50, (2, 24), device="cuda")
    with torch.no_grad():
        whole, caches, pieces = model(tokens), [model.new_cache(1) for _ in range(2)], [[], []]
        for row, cache in enumerate(caches):
            pieces[row].append(model(tokens[row : row + 1, :8], cache))
        for t in range(8, 24):
            for row, cache in enumerate(caches):
                pieces[row].append(fast(tokens[row : row + 1, t : t + 1], cache).clone())
    assert relative_error(torch.cat([torch.cat(p, 1) for p in pieces]), whole) < SINGLE


@pytest.mark.parametrize("dtype, bound", [(torch.float32, SINGLE), (torch.bfloat16, 3 * 2**-8)])
@pytest.mark.parametrize("length, window", [(1000, 64), (777, 100), (512, 128), (300, 299)])
def test_window_attention_is_that_of_float64(length, window, dtype, bound):
    """bfloat16: scores' weights, the output and the inputs of each product are rounded, by at most 2^-9 each."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 3, length, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
    upstream = torch.randn(2, 3, length, 64, device="cuda", dtype=dtype)
    got = window_attention(q, k, v, window)
    got = (got, *torch.autograd.grad(got, (q, k, v), upstream))
    wide = [t.detach().cpu().double().requires_grad_() for t in (q, k, v)]
    expected = window_attention(*wide, window)
    expected = (expected, *torch.autograd.grad(expected, wide, upstream.cpu().double()))
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a.cpu(), b) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 40])
def test_packed_attention_is_that_of_float64(window, dtype):
    """In half precision FlashAttention takes the offsets; float64 goes through masks. Gradients of all weights."""
    torch.manual_seed(1)
    layer = Attention(width=128, heads=2, window=window).to("cuda", dtype)
    x = torch.randn(1, 500, 128, device="cuda", dtype=dtype, requires_grad=True)
    upstream = torch.randn_like(x)
    offsets = torch.tensor([0, 1, 200, 200, 463, 500])
    wide = copy.deepcopy(layer).double().cpu()
    wide_x = x.detach().double().cpu().requires_grad_()
    got = layer(x, cu_seqlens=offsets.cuda())
    got = (got, *torch.autograd.grad(got, (x, *layer.parameters()), upstream))
    expected = wide(wide_x, cu_seqlens=offsets)
    expected = (expected, *torch.autograd.grad(expected, (wide_x, *wide.parameters()), upstream.double().cpu()))
    for a, b in zip(got, expected, strict=True):
        # Twice as many products in a row as attention alone.
        assert relative_error(a.cpu(), b) < 3 * torch.finfo(dtype).eps


def test_packed_attention_reads_nothing_outside_for_wrong_offsets():
    layer = Attention(width=128, heads=2, window=40).to("cuda", torch.bfloat16)
    x = torch.randn(1, 300, 128, device="cuda", dtype=torch.bfloat16)
    for wrong in ([-500, 100, 300], [0, 2**30, 300], [0, 200, 100, 300], [0, 100, 200]):
        assert layer(x, cu_seqlens=torch.tensor(wrong, device="cuda")).isfinite().all()


def test_window_attention_compiles_a_few_times_and_can_be_deterministic():
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    fast = torch.compile(lambda *inputs: window_attention(*inputs, 64), backend=counter, fullgraph=True)
    for length in (40, 64, 100, 128, 200, 333, 512, 700, 1000):
        q, k, v = (torch.randn(2, 3, length, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        assert relative_error(fast(q, k, v), window_attention(q, k, v, 64)) < 2**-8
    assert counter.frame_count <= 4
    flash = window_attention(q, k, v, 64)
    torch.use_deterministic_algorithms(True)
    try:
        assert relative_error(window_attention(q, k, v, 64), flash) < 3 * 2**-8
    finally:
        torch.use_deterministic_algorithms(False)


def test_window_attention_takes_memory_for_the_window():
    """The scores of all pairs would be 16 GiB; q, k, v, their blocks and the output are some 100 MiB."""
    q, k, v = (torch.randn(1, 4, 2**15, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    window_attention(q, k, v, 256).sum().backward()
    one = q.numel() * q.element_size()
    # Keys and values twice as long, and the gradients of both; scores of half a block more are kept nowhere.
    assert torch.cuda.max_memory_allocated() - before < 24 * one


def test_tokens_outside_the_vocabulary_are_told_in_the_first_call_and_when_checked():
    """Let through they end in the GPU's own assertion, after which the process can use the GPU no more."""
    wrong = torch.full((1, 3), 50, device="cuda")
    with pytest.raises(ValueError, match="tokens must hold tokens from 0 to 49, got 50 to 50"):
        hybrid(("delta",))(wrong)
    model = hybrid(("delta",))
    model(wrong - 1)
    with dn_lib.checked(), pytest.raises(ValueError, match="tokens must hold tokens from 0 to 49"):
        model(wrong)
