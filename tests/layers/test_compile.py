"""torch.compile over many lengths: the same numbers, whole graphs, and few of them."""

import operator

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dn_lib import delta_rule
from dn_lib.forms.decay import gated_linear_attention, retention
from dn_lib.layers import full_attention, mixer_names, window_attention
from dn_lib.models import LanguageModel, ModelConfig

SMALL = {"vocab_size": 20, "width": 8, "heads": 2, "window": 5, "hidden": 8, "conv_size": 2}
# Below a window, at it, one and several blocks behind it, filled and not.
LENGTHS = (3, 4, 5, 6, 7, 9, 10, 11, 15, 16, 20, 24, 25, 31, 40, 41, 55, 62)
# One graph for the first length alone, one for all short ones, and beyond the window: one block, several, several that
# are full. After eight, torch.compile gives up.
GRAPHS = 6


@pytest.fixture(autouse=True)
def forget():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function, backend="eager"):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, fullgraph=True), counter


@pytest.mark.parametrize("pattern", [("window",), ("delta", "attention")])
def test_a_model_compiles_a_few_times_for_all_lengths(pattern):
    """`fullgraph` makes an error of what else would be a silent return to uncompiled code.

    Lengths stop at 64: on a CPU DeltaNet goes through chapter 4's form, whose loop over chunks is unrolled.
    """
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(**SMALL, layers=len(pattern), pattern=pattern))
    fast, counter = compiled(model)
    for length in LENGTHS:
        tokens = torch.randint(20, (2, length))
        assert torch.allclose(fast(tokens), model(tokens), atol=1e-5), length  # float32, numbers of size one
    assert counter.frame_count <= GRAPHS


@pytest.mark.parametrize("attention", [full_attention, lambda q, k, v: window_attention(q, k, v, 5)])
def test_attention_and_its_gradients_compile_for_all_lengths(attention):
    """As the graphs that a compiler takes apart into PyTorch's smallest operators, forward and backward."""
    fast, counter = compiled(attention, "aot_eager")
    for length in LENGTHS[::2]:
        inputs = [torch.randn(2, 2, length, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        results = []
        for function in (fast, attention):
            o = function(*inputs)
            results.append((o, *torch.autograd.grad(o.sin().sum(), inputs)))
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, atol=1e-12), length  # float64 keeps 16 digits
    assert counter.frame_count <= GRAPHS


def chunks_of_delta_rule(x):
    return delta_rule(x, x / 4, x, x[..., 0].sigmoid(), backend="chunkwise")[0]


def chunks_of_retention(x):
    x = x.transpose(1, 2)
    return retention(x, x, x, -x[..., 0].abs())[0]


def chunks_of_gated_attention(x):
    x = x.transpose(1, 2)
    return gated_linear_attention(x, x, x, -x.abs())[0]


@pytest.mark.parametrize("form", [chunks_of_delta_rule, chunks_of_retention, chunks_of_gated_attention])
def test_chunks_compile_for_lengths_that_need_no_padding(form):
    """[B, L, H, d] is read by heads: a chunk that needs no padding must not keep those strides in a later graph."""
    fast, counter = compiled(form, "aot_eager")
    for length in (5, 9, 16, 12):
        x = torch.randn(2, length, 3, 4, dtype=torch.float64, requires_grad=True)
        results = []
        for function in (fast, form):
            o = function(x)
            results.append((o, *torch.autograd.grad(o.sin().sum(), x)))
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, atol=1e-12), length  # float64 keeps 16 digits
    assert counter.frame_count <= GRAPHS


@pytest.mark.parametrize("pattern", [("attention", "window"), ("delta",)])
def test_decoding_compiled_does_not_compile_every_step(pattern):
    torch.manual_seed(2)
    model = LanguageModel(ModelConfig(**SMALL, layers=len(pattern), pattern=pattern))
    fast, counter = compiled(model)
    tokens = torch.randint(20, (2, 40))
    cache = model.new_cache(2)
    with torch.no_grad():
        pieces = [fast(tokens[:, :11], cache)]
        pieces += [fast(tokens[:, t : t + 1], cache) for t in range(11, 40)]
        # float32, numbers of size one; a cache goes through other products than the whole.
        assert torch.allclose(torch.cat(pieces, 1), model(tokens), atol=1e-5)
    assert counter.frame_count <= 8


@pytest.mark.parametrize("length, past, window", [(4096, 0, 64), (4096, 63, 64), (2048, 0, 300)])
def test_a_window_takes_memory_for_the_window(length, past, window):
    """The largest tensor on the way holds keys or a mask, not a score for every pair of tokens."""

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    self.size = max(self.size, tensor.untyped_storage().nbytes() // tensor.element_size())
            return result

    q, k, v = (torch.randn(1, 1, n, 4) for n in (length, length + past, length + past))
    with Largest() as largest:
        window_attention(q, k, v, window)
    assert largest.size <= max(2 * (length + window) * 4, 4 * window**2) < length**2 / 8


def test_a_cached_state_is_a_copy_that_no_cuda_graph_owns():
    """What CUDA graphs return is overwritten by the next call. The operator's tag keeps it out of them."""
    model = LanguageModel(ModelConfig(**SMALL, layers=2, pattern=("delta", "window")))
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    fast = torch.compile(model, backend=backend, fullgraph=True)
    cache = model.new_cache(1)
    with torch.no_grad():
        fast(torch.zeros(1, 3, dtype=torch.long), cache)
    copies = [n for n in graphs[0].graph.nodes if n.target is torch.ops.dn_lib.outside_graphs.default]
    assert len(copies) == sum(len(layer._tensors) for layer in cache.layers) > 4
    assert torch.Tag.cudagraph_unsafe in torch.ops.dn_lib.outside_graphs.default.tags


class Strides(TorchDispatchMode):
    """The calls whose results lie otherwise in memory than a compiler is told, which traces with fake tensors."""

    def __init__(self):
        super().__init__()
        self.wrong = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        with FakeTensorMode() as mode:
            fake = [tree_map_only(torch.Tensor, mode.from_tensor, given) for given in (arguments, options or {})]
            try:
                expected = function(*fake[0], **fake[1])
            except DataDependentOutputException:
                return result
        for real, told in zip(tree_leaves(result), tree_leaves(expected), strict=True):
            # A dimension of one entry has no stride that matters.
            if isinstance(real, torch.Tensor) and real.numel():
                layouts = ([s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1] for x in (real, told))
                if operator.ne(*layouts):
                    self.wrong.add(str(function))
        return result


@pytest.mark.parametrize("mixer", mixer_names())
def test_no_result_lies_otherwise_than_compilers_expect(mixer):
    """Where it does, a compiled graph fails at the next view: softplus's derivative did, in Kimi Delta Attention."""
    layer = LanguageModel(ModelConfig(**(SMALL | {"width": 16}), layers=1, mixer=mixer)).blocks[0].mixer
    x = torch.randn(2, 18, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16), Strides() as strides:
        layer(x).float().square().sum().backward()
    assert not strides.wrong
