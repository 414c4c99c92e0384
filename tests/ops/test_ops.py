"""The operator: one function whatever the backend, every bad input named, and what PyTorch knows of it."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dn_lib
from dn_lib import checked, chunk_delta_rule, decode_delta_rule, delta_rule, fused_recurrent_delta_rule, ops
from dn_lib.kernels.plan import using
from dn_lib.ops.backend import forget_warnings
from dn_lib.teaching.judge.trace import observe, record
from dn_lib.testing import (
    delta_rule_inputs,
    delta_rule_reference,
    forward_and_gradients,
    leaves,
    relative_error,
    sensitivity,
)

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
PYTORCH = ("recurrent", "parallel", "chunkwise")
needs_triton = pytest.mark.skipif(ops.triton_problem(torch.device("cpu")) is not None, reason="needs the interpreter")
EVERY = (*PYTORCH, pytest.param("triton", marks=needs_triton))
every_backend = pytest.mark.parametrize("backend", EVERY)
# float64: 4500 eps, float32: 84 eps, for sums of up to some hundred terms, each rounded a few times.
BOUND = {F64: 1e-12, F32: 1e-5}


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=root)


# --- The same numbers -------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(
    L=st.integers(1, 300),
    d_k=st.integers(1, 96),
    d_v=st.integers(1, 96),
    chunk=st.sampled_from([16, 32, 64]),
    state=st.booleans(),
    bias=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_pytorch_backends_agree_with_float64(L, d_k, d_v, chunk, state, bias, seed):
    *x, S = delta_rule_inputs(1, L, 2, d_k, d_v, seed=seed, dtype=F64, state=1 if state else None, bias=bias)
    o, last, size = delta_rule_reference(*x, initial_state=S)
    size_of_state = S.norm().item() if state else 0.0

    def reference(*inputs):
        return delta_rule_reference(*inputs[:4], initial_state=inputs[4])[:2]

    # With few key channels little of a state may be left: rounding of the inputs alone then shows as much.
    of_o, of_state = (max(1, c) for c in sensitivity(reference, (*x, S), (size, size_of_state)))
    for dtype, backend in ((dtype, backend) for dtype in BOUND for backend in PYTORCH):
        got, end = delta_rule(
            *(y.to(dtype) for y in x), initial_state=S, output_final_state=True, chunk_size=chunk, backend=backend
        )
        assert got.dtype == end.dtype == dtype
        assert relative_error(got, o, size) < of_o * BOUND[dtype], (backend, dtype)
        assert relative_error(end, last, size_of_state) < of_state * BOUND[dtype], (backend, dtype)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("varlen", [None, torch.int32, torch.int64])
@every_backend
def test_every_backend_and_option(backend, varlen, norm):
    """Every gradient too, with a scale of our own, both states, and packed sequences, some of them empty."""
    cu = None if varlen is None else torch.tensor([0, 0, 17, 18, 18, 40, 40], dtype=varlen)
    x = delta_rule_inputs(
        2 if cu is None else 1, 40, 2, 6, 9, dtype=F64, state=2 if cu is None else 6, unit=not norm, seed=3
    )
    options = {"scale": 0.7, "cu_seqlens": cu, "qk_l2norm": norm}
    do, dS = delta_rule_inputs(*x[2].shape[:3], 6, 9, seed=4, state=len(x[4]), dtype=F64)[2::2]
    expected = forward_and_gradients(delta_rule_reference, leaves(*x, dtype=F64), do, dS, **options)
    dtype = F32 if backend == "triton" else F64
    got = forward_and_gradients(
        delta_rule, leaves(*x, dtype=dtype), do, dS, **options, output_final_state=True, chunk_size=16, backend=backend
    )
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < BOUND[dtype]


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 5, 3), (2, 5, 0), (0, 0, 0)], ids=str)
@every_backend
def test_nothing_to_do(backend, shape):
    """No tokens: the state passes through, and so does its gradient.  No sequences, no heads: empty tensors."""
    *x, S = leaves(*delta_rule_inputs(*shape, 4, 6, state=shape[0]))
    o, last = delta_rule(*x, initial_state=S, output_final_state=True, backend=backend)
    assert o.shape == (*shape, 6) and last.shape == (shape[0], shape[2], 4, 6)
    if shape[1] == 0:
        assert torch.equal(last, S)
    gradients = torch.autograd.grad(o.sum() + last.sum(), [*x, S], allow_unused=True)
    for tensor, gradient in zip((*x, S), gradients, strict=True):
        assert gradient is None or gradient.shape == tensor.shape
    if shape[1] == 0:
        assert torch.equal(gradients[-1], torch.ones_like(S))
    with torch.no_grad():  # another kernel, in Triton
        o, last = delta_rule(*x, initial_state=S, output_final_state=True, backend=backend)
        assert o.shape == (*shape, 6) and (shape[1] > 0 or torch.equal(last, S))


@every_backend
def test_only_empty_sequences(backend):
    *x, S = delta_rule_inputs(1, 0, 2, 4, 6, state=3)
    cu = torch.zeros(4, dtype=torch.int32)
    o, last = delta_rule(*x, initial_state=S, cu_seqlens=cu, output_final_state=True, backend=backend)
    assert o.shape == (1, 0, 2, 6) and torch.equal(last, S)


@every_backend
def test_non_contiguous_inputs(backend):
    """Heads before time in memory, every second row, an expanded beta, a transposed state: results don't change."""
    *x, S = delta_rule_inputs(1, 20, 2, 5, 7, state=1)
    x[3] = x[3][:, :1].expand(-1, 20, -1).contiguous()
    strided = [
        x[0].transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([x[1], x[1] * 0 + 9], dim=2)[:, :, 0],
        x[2].permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        x[3][:, :1].expand(-1, 20, -1),
        S.mT.contiguous().mT,
    ]
    assert not any(y.is_contiguous() for y in strided)
    do, dS = delta_rule_inputs(1, 20, 2, 5, 7, seed=1, state=1)[2::2]
    run = {"output_final_state": True, "chunk_size": 16, "backend": backend}
    plain = forward_and_gradients(delta_rule, leaves(*x, S), do, dS, **run)
    tensors = [y.detach().requires_grad_() for y in strided]
    odd = forward_and_gradients(delta_rule, tensors, do.mT.contiguous().mT, dS.mT.contiguous().mT, **run)
    for a, b in zip(plain, odd, strict=True):
        # The same numbers; the PyTorch forms may sum strided operands in another order.
        assert torch.equal(a, b) if backend == "triton" else relative_error(b, a.double()) < 1e-6


@every_backend
def test_state_is_returned_only_on_request(backend):
    x = delta_rule_inputs(1, 18, 1, 4, 4)[:4]
    assert delta_rule(*x, backend=backend)[1] is None
    state = delta_rule(*x, backend=backend, output_final_state=True)[1]
    assert state.dtype == F32 and state.shape == (1, 1, 4, 4)


@every_backend
def test_half_precision_keeps_its_dtypes(backend):
    """o in v's dtype, the state in float32, gradients in the dtypes of their tensors."""
    *x, S = leaves(*delta_rule_inputs(1, 20, 1, 16, 16, dtype=BF16, state=1))
    x[3] = x[3].detach().float().requires_grad_()
    S = S.detach().half().requires_grad_()
    o, last = delta_rule(*x, initial_state=S, output_final_state=True, backend=backend)
    assert o.dtype == BF16 and last.dtype == F32
    gradients = torch.autograd.grad((o.float().sum() + last.sum()), [*x, S])
    assert [g.dtype for g in gradients] == [BF16, BF16, BF16, F32, torch.float16]
    expected, _, size = delta_rule_reference(*x, initial_state=S)
    # 8 bits of mantissa; Triton's interpreter cuts where a GPU rounds, which about doubles the error.
    assert relative_error(o, expected, size) < (3e-2 if backend == "triton" else 8e-3)


@pytest.mark.parametrize("backend", PYTORCH)
def test_float64_and_second_derivative(backend):
    x = leaves(*delta_rule_inputs(1, 5, 1, 3, 2, dtype=F64)[:4])
    run = lambda *x: delta_rule(*x, backend=backend, chunk_size=None, qk_l2norm=True)[0]  # noqa: E731
    assert run(*x).dtype == F64
    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


@pytest.mark.parametrize("backend", ["chunkwise", pytest.param("triton", marks=needs_triton)])
def test_autocast_takes_half_precision_operands(backend):
    *x, S = delta_rule_inputs(1, 20, 1, 16, 8, state=1)
    run = {"initial_state": S, "output_final_state": True, "backend": backend}
    expected = delta_rule(*(y.to(BF16) for y in x[:3]), x[3], **run)
    with torch.autocast("cpu", dtype=BF16):
        o, state = delta_rule(*x, **run)
        exact, _ = delta_rule(*(y.double() for y in x), backend="chunkwise")
    assert o.dtype == BF16 and state.dtype == F32 and exact.dtype == F64
    assert torch.equal(o, expected[0]) and torch.equal(state, expected[1])


# --- Decoding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64])
@every_backend
def test_prefill_then_decode_equals_one_pass(backend, dtype):
    if backend == "triton" and dtype == F64:
        pytest.skip("Triton takes no float64")
    q, k, v, beta, _ = delta_rule_inputs(2, 21, 2, 6, 5, dtype=dtype)
    options = {"qk_l2norm": True, "scale": 0.4}
    whole, end = delta_rule(q, k, v, beta, output_final_state=True, backend=backend, **options)
    first = [x[:, :17] for x in (q, k, v, beta)]
    o, state = delta_rule(*first, output_final_state=True, backend=backend, **options)
    outputs, address = [o], state.data_ptr()
    for t in range(17, 21):
        outputs.append(decode_delta_rule(*(x[:, t] for x in (q, k, v, beta)), state, **options)[:, None])
    assert state.data_ptr() == address
    assert relative_error(torch.cat(outputs, 1), whole.double()) < BOUND[dtype]
    assert relative_error(state, end.double()) < BOUND[dtype]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": (0, 2, 1, 4)}, r"q must have three dimensions \[B, H, d_k\], got \[0, 2, 1, 4\]"),
        ({"k": (2, 1)}, r"k must have three dimensions \[B, H, d_k\], got \[2, 1\]"),
        ({"v": (2, 4, 1, 3)}, r"v must have three dimensions \[B, H, d_v\]"),
        ({"beta": (2, 3)}, r"beta must be \[B, H\] = \[2, 4\], got \[2, 3\]"),
        ({"state": (2, 4, 3, 3)}, r"state must be \[B, H, d_k, d_v\] = \[2, 4, 5, 3\], got \[2, 4, 3, 3\]"),
        ({"scale": 0.0}, "scale must be finite and not 0, got 0"),
    ],
)
def test_decode_names_what_is_wrong(change, message):
    shapes = {"q": (2, 4, 5), "k": (2, 4, 5), "v": (2, 4, 3), "beta": (2, 4), "state": (2, 4, 5, 3)} | change
    arguments = {name: torch.zeros(s) if isinstance(s, tuple) else s for name, s in shapes.items()}
    with pytest.raises(ValueError, match=message):
        decode_delta_rule(**arguments)


@pytest.mark.parametrize("state", [torch.zeros(1, 1, 4, 4, dtype=BF16), torch.zeros(1, 1, 4, 4).expand(2, 1, 4, 4)])
def test_decode_refuses_a_state_it_cannot_write(state):
    x = torch.zeros(state.shape[0], 1, 4)
    with pytest.raises(ValueError, match=r"state must be contiguous and torch\.float32, got"):
        decode_delta_rule(x, x, x, torch.zeros(x.shape[:2]), state)


# --- fla's names and signatures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [chunk_delta_rule, fused_recurrent_delta_rule])
def test_positional_order_is_that_of_fla(function):
    """q, k, v, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens."""
    *x, S = delta_rule_inputs(1, 12, 2, 4, 3, dtype=F64, state=3)
    cu = torch.tensor([0, 5, 5, 12])
    o, state = function(*x, 0.3, S, True, True, cu)
    expected, end, _ = delta_rule_reference(*x, scale=0.3, initial_state=S, cu_seqlens=cu, qk_l2norm=True)
    assert relative_error(o, expected) < 1e-12 and relative_error(state, end) < 1e-12
    assert function(*x)[1] is None


def test_fused_recurrent_takes_beta_as_ones():
    q, k, v, beta, _ = delta_rule_inputs(1, 12, 2, 4, 3, dtype=F64)
    expected = delta_rule_reference(q, k, v, torch.ones_like(beta))[0]
    assert relative_error(fused_recurrent_delta_rule(q, k, v)[0], expected) < 1e-12


def test_fused_recurrent_refuses_a_beta_for_each_channel():
    q, k, v, _, _ = delta_rule_inputs(1, 12, 2, 4, 3)
    with pytest.raises(
        ValueError, match=r"beta must be \[B, L, H\]: one strength for each value channel, \[1, 12, 2, 3\]"
    ):
        fused_recurrent_delta_rule(q, k, v, torch.ones_like(v))


@pytest.mark.parametrize("function", [chunk_delta_rule, fused_recurrent_delta_rule])
def test_arguments_that_make_no_sense_here(function):
    x = delta_rule_inputs(1, 4, 1, 4, 4)[:4]
    with pytest.raises(ValueError, match="head_first must be False"):
        function(*x, head_first=True)
    assert function(*x, head_first=False)[0].shape == (1, 4, 1, 4)
    with pytest.raises(TypeError, match=f"{function.__name__} has no argument 'chunk', 'heads'"):
        function(*x, heads=1, chunk=2)
    with pytest.raises(ValueError, match="scale must be finite"):
        function(*x, scale=float("inf"))


@needs_triton
def test_fused_recurrent_through_the_kernel(auto_takes):
    """What happens on a GPU, where "auto" is Triton: the recurrent kernel, whatever the length; no gradient."""
    auto_takes("triton")
    *x, S = delta_rule_inputs(1, 24, 1, 5, 6, state=2)
    cu = torch.tensor([0, 20, 24])
    (o, state), trace = observe(fused_recurrent_delta_rule, *x, 0.3, S, True, True, cu)
    expected, end, _ = delta_rule_reference(*x, scale=0.3, initial_state=S, cu_seqlens=cu, qk_l2norm=True)
    assert relative_error(o, expected) < 1e-5 and relative_error(state, end) < 1e-5
    assert [launch.kernel for launch in trace.launches] == ["recurrent"]
    (o, _), trace = observe(fused_recurrent_delta_rule, *leaves(*x))
    o.sum().backward()
    assert "recurrent" not in [launch.kernel for launch in trace.launches]
    with checked(), pytest.raises(ValueError, match="v must be finite"):
        fused_recurrent_delta_rule(x[0], x[1], x[2] * float("nan"), x[3])


# --- Bad input --------------------------------------------------------------------------------------------------

SHAPES = {"q": (2, 6, 3, 4), "k": (2, 6, 3, 4), "v": (2, 6, 3, 5), "beta": (2, 6, 3)}
ONE = {"q": (1, 6, 3, 4), "k": (1, 6, 3, 4), "v": (1, 6, 3, 5), "beta": (1, 6, 3)}
BAD = {
    "rank": ({"q": (6, 3, 4)}, ValueError, r"q must have four dimensions \[B, L, H, d\], got \[6, 3, 4\]"),
    "not-a-tensor": ({"v": [1.0]}, ValueError, "v must have four dimensions .*, got list"),
    "beta-not-a-tensor": ({"beta": 1.0}, TypeError, r"beta must be a tensor \[B, L, H\], got float"),
    "key-size": (
        {"k": (2, 6, 3, 8)},
        ValueError,
        r"k must be \[B, L, H, d_k\], as q, = \[2, 6, 3, 4\], got \[2, 6, 3, 8\]",
    ),
    "key-heads": ({"k": (2, 6, 1, 4)}, ValueError, r"k must be .* = \[2, 6, 3, 4\], got \[2, 6, 1, 4\]$"),
    "swapped-k": ({"k": (2, 3, 6, 4)}, ValueError, r"k must be .*, got \[2, 3, 6, 4\] \(heads before time\?\)"),
    "swapped-v": ({"v": (2, 3, 6, 5)}, ValueError, r"v must be .*, got \[2, 3, 6, 5\] \(heads before time\?\)"),
    "swapped-beta": ({"beta": (2, 3, 6)}, ValueError, r"beta must be .*, got \[2, 3, 6\] \(heads before time\?\)"),
    "value-length": (
        {"v": (2, 7, 3, 5)},
        ValueError,
        r"v must be \[B, L, H, d_v\] = \[2, 6, 3, 5\], got \[2, 7, 3, 5\]$",
    ),
    "beta-rank": ({"beta": (2, 6, 3, 1)}, ValueError, r"beta must be \[B, L, H\] = \[2, 6, 3\], got \[2, 6, 3, 1\]"),
    "no-channels": ({"v": (2, 6, 3, 0)}, ValueError, "at least one channel, got d_k = 4 and d_v = 0"),
    "k-dtype": (
        {"k": torch.zeros(2, 6, 3, 4, dtype=BF16)},
        TypeError,
        "k must have the dtype of q, torch.float32, got",
    ),
    "v-dtype": ({"v": torch.zeros(2, 6, 3, 5, dtype=F64)}, TypeError, "v must have the dtype of q, torch.float32, got"),
    "integers": (
        {"q": torch.zeros(2, 6, 3, 4, dtype=torch.long)},
        TypeError,
        "q must be floating point, got torch.int64",
    ),
    "integer-beta": ({"beta": torch.ones(2, 6, 3, dtype=torch.int)}, TypeError, "beta must be floating point, got"),
    "device": ({"k": torch.zeros(2, 6, 3, 4, device="meta")}, ValueError, "k must be on cpu like q, got meta"),
    "beta-device": ({"beta": torch.zeros(2, 6, 3, device="meta")}, ValueError, "beta must be on cpu like q, got meta"),
    "state": (
        {"initial_state": (2, 3, 5, 4)},
        ValueError,
        r"initial_state must be \[N, H, d_k, d_v\] = \[2, 3, 4, 5\], got",
    ),
    "state-type": ({"initial_state": 0.0}, TypeError, "initial_state must be a tensor .*, got float"),
    "cu-list": (
        ONE | {"cu_seqlens": [0, 6]},
        ValueError,
        r"cu_seqlens must be a tensor of N \+ 1 >= 2 offsets, got list",
    ),
    "cu-one": (ONE | {"cu_seqlens": torch.tensor([6])}, ValueError, r"cu_seqlens must be .* offsets, got \[1\]"),
    "cu-rank": (
        ONE | {"cu_seqlens": torch.tensor([[0, 6]])},
        ValueError,
        r"cu_seqlens must be .* offsets, got \[1, 2\]",
    ),
    "cu-dtype": (
        ONE | {"cu_seqlens": torch.tensor([0.0, 6])},
        TypeError,
        "cu_seqlens must be int32 or int64, got torch.float32",
    ),
    "cu-device": (
        ONE | {"cu_seqlens": torch.zeros(3, dtype=torch.int, device="meta")},
        ValueError,
        "cu_seqlens must be on cpu like q, got meta",
    ),
    "cu-batch": (
        {"cu_seqlens": torch.tensor([0, 6])},
        ValueError,
        "q must have batch size 1 with cu_seqlens .*, got 2",
    ),
    "cu-end": (
        ONE | {"cu_seqlens": torch.tensor([0, 5])},
        ValueError,
        "cu_seqlens must rise from 0 to L = 6, got .* 5",
    ),
    "cu-falls": (ONE | {"cu_seqlens": torch.tensor([0, 4, 3, 6])}, ValueError, "cu_seqlens must rise from 0 to L = 6"),
    "cu-state": (
        ONE | {"cu_seqlens": torch.tensor([0, 2, 6]), "initial_state": (1, 3, 4, 5)},
        ValueError,
        r"initial_state must be .* = \[2, 3, 4, 5\], got \[1, 3, 4, 5\]",
    ),
    "chunk-zero": ({"chunk_size": 0}, ValueError, "chunk_size must be a positive integer or None, got 0"),
    "chunk-float": ({"chunk_size": 16.0}, ValueError, "chunk_size must be a positive integer or None, got 16.0"),
    "backend": (
        {"backend": "cuda"},
        ValueError,
        "backend must be one of auto, recurrent, parallel, chunkwise, triton, got 'cuda'",
    ),
    "scale-zero": ({"scale": 0}, ValueError, "scale must be finite and not 0, got 0"),
    "scale-nan": ({"scale": float("nan")}, ValueError, "scale must be finite and not 0, got nan"),
    "scale-infinite": ({"scale": -float("inf")}, ValueError, "scale must be finite and not 0, got -inf"),
}


def arguments(change: dict) -> dict:
    named = {"q", "k", "v", "beta", "initial_state"}
    return {
        name: torch.zeros(value) if name in named and isinstance(value, tuple) else value
        for name, value in (SHAPES | change).items()
    }


@pytest.mark.parametrize("change, kind, message", BAD.values(), ids=BAD)
def test_bad_input_is_named(change, kind, message):
    with pytest.raises(kind, match=message) as caught:
        delta_rule(**arguments(change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scale", [0.0, float("nan")])
@every_backend
def test_scale_is_checked_for_every_backend(backend, scale):
    with pytest.raises(ValueError, match="scale must be finite and not 0"):
        delta_rule(**arguments({"scale": scale, "backend": backend}))


@needs_triton
def test_triton_says_what_it_does_not_take():
    wide = {"q": (1, 6, 1, 257), "k": (1, 6, 1, 257), "v": (1, 6, 1, 4), "beta": (1, 6, 1), "backend": "triton"}
    with pytest.raises(ValueError, match="q and v must have at most 256 channels for backend 'triton', got 257"):
        delta_rule(**arguments(wide))
    for size in (8, 48, 128):
        with pytest.raises(ValueError, match=f"chunk_size must be 16, 32, 64 or None for backend 'triton', got {size}"):
            delta_rule(**arguments({"chunk_size": size, "backend": "triton"}))
    x = [y.double() for y in delta_rule_inputs(1, 6, 1, 4, 4)[:4]]
    with pytest.raises(
        TypeError, match=r"q must be float32, bfloat16 or float16 for backend 'triton', got torch\.float64"
    ):
        delta_rule(*x, backend="triton")


class OnGPU:
    """As much of a tensor on a GPU as the choice of a backend asks for."""

    def __init__(self, d, dtype=BF16):
        self.shape, self.dtype, self.device = (1, 6, 1, d), dtype, torch.device("cuda", 0)


@needs_triton
def test_auto_falls_back_with_one_warning():
    forget_warnings()
    assert ops.choose_backend(OnGPU(256), OnGPU(256), None, "auto") == "triton"
    assert ops.choose_backend(OnGPU(64, F64), OnGPU(64, F64), None, "auto") == "chunkwise"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            assert ops.choose_backend(OnGPU(64), OnGPU(257), None, "auto") == "chunkwise"
    (warning,) = seen
    assert "head size 257 is above 256" in str(warning.message) and "backend='chunkwise'" in str(warning.message)


def test_auto_is_chunkwise_on_the_cpu():
    x = delta_rule_inputs(1, 70, 1, 4, 4)[:4]
    assert torch.equal(delta_rule(*x)[0], delta_rule(*x, backend="chunkwise", chunk_size=64)[0])


# --- checked() --------------------------------------------------------------------------------------------------


def sound():
    q, k, v, beta, S = delta_rule_inputs(2, 6, 3, 4, 5, state=2)
    return {"q": q, "k": k, "v": v, "beta": beta, "initial_state": S}


def spoil(name, at, value):
    tensors = sound()
    tensors[name][at] = value
    return tensors


VALUES = {
    "nan-beta": (
        spoil("beta", (1, 4, 2), float("nan")),
        r"beta must be finite: NaN or infinity at \[b, l, h\] = \[1, 4, 2\]",
    ),
    "nan-q": (spoil("q", (0, 3, 1, 2), float("nan")), r"q must be finite: .* = \[0, 3, 1\]"),
    "inf-k": (spoil("k", (1, 0, 0, 3), float("inf")), r"k must be finite: .* = \[1, 0, 0\]"),
    "inf-v": (spoil("v", (1, 5, 0, 4), -float("inf")), r"v must be finite: .* = \[1, 5, 0\]"),
    "nan-state": (
        spoil("initial_state", (1, 2, 0, 0), float("nan")),
        r"initial_state must be finite: .* \[n, h\] = \[1, 2\]",
    ),
    "long-key": (
        spoil("k", (1, 2, 1), 3.0) | {"beta": torch.ones(2, 6, 3)},
        r"k must satisfy beta \|k\|\^2 <= 2 \(normalise the keys, or pass qk_l2norm=True\): 36 at .* = \[1, 2, 1\]",
    ),
    "strong-beta": (
        spoil("beta", (0, 5, 1), 2.5) | {"qk_l2norm": True},
        r"beta must satisfy beta \|k\|\^2 <= 2 \(keep beta <= 2\): 2.5 at \[b, l, h\] = \[0, 5, 1\]",
    ),
    "negative-beta": (spoil("beta", (1, 1, 1), -0.5), r"beta must be at least 0: -0.5 at \[b, l, h\] = \[1, 1, 1\]"),
}


@pytest.mark.parametrize("tensors, message", VALUES.values(), ids=VALUES)
def test_checked_names_the_first_offender(tensors, message):
    delta_rule(**tensors)  # unchecked, nothing is read
    with checked(), pytest.raises(ValueError, match=message):
        delta_rule(**tensors)


def test_the_first_of_several_is_named():
    tensors = spoil("beta", (1, 4, 2), float("nan"))
    tensors["beta"][0, 5, 1] = float("inf")
    with checked(), pytest.raises(ValueError, match=r"= \[0, 5, 1\]"):
        delta_rule(**tensors)


def test_checked_ends_with_its_block_and_lets_sound_input_pass():
    bad = spoil("beta", (0, 0, 0), float("nan"))
    with checked():
        delta_rule(**sound())
        delta_rule(**sound(), backend="chunkwise", qk_l2norm=True)
        for dtype in (BF16, torch.float16):  # unit keys rounded to few bits are not quite unit keys
            x = delta_rule_inputs(1, 200, 2, 64, 4, dtype=dtype)[:4]
            delta_rule(*x[:3], torch.full_like(x[3], 2.0))
        with pytest.raises(ValueError, match="beta"):
            delta_rule(**bad)
    delta_rule(**bad)


def test_checked_reads_the_offsets():
    x = delta_rule_inputs(1, 6, 1, 4, 4)[:4]
    for offsets in ([1, 6], [0, 5], [0, 4, 2, 6], [0, 7]):
        with checked(), pytest.raises(ValueError, match="cu_seqlens must rise from 0 to L = 6, got"):
            delta_rule(*x, cu_seqlens=torch.tensor(offsets))


def test_checked_covers_decoding():
    x = torch.ones(1, 1, 4)
    with checked(), pytest.raises(ValueError, match="k must satisfy"):
        decode_delta_rule(x, x, x, torch.ones(1, 1), torch.zeros(1, 1, 4, 4))


def test_checked_by_environment():
    code = """
import torch, dn_lib
x = torch.ones(1, 2, 1, 4)
try:
    dn_lib.delta_rule(x, x, x, torch.full((1, 2, 1), float("nan")))
except ValueError as error:
    print(error)
"""
    assert run_python(code, DN_LIB_CHECKED="1").stdout.startswith("beta must be finite: NaN or infinity at [b, l, h] =")
    off = run_python(code, DN_LIB_CHECKED="0")
    assert off.stdout == "" and off.returncode == 0, off.stderr


# --- Without Triton ---------------------------------------------------------------------------------------------


def test_without_triton_everything_but_its_backend_works():
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] == "triton" else real(name, package)
sys.meta_path.insert(0, Refuse())
import torch, dn_lib
x = [torch.rand(1, 20, 2, 4, requires_grad=True) for _ in range(3)] + [torch.rand(1, 20, 2) / 4]
for backend in ("auto", "recurrent", "parallel", "chunkwise"):
    dn_lib.delta_rule(*x, backend=backend)[0].sum().backward()
dn_lib.chunk_delta_rule(*x), dn_lib.fused_recurrent_delta_rule(*x)
dn_lib.decode_delta_rule(*(y[:, 0].detach() for y in x), torch.zeros(1, 2, 4, 4))
assert not any(name.split(".")[0] == "triton" for name in sys.modules)
try:
    dn_lib.delta_rule(*x, backend="triton")
except RuntimeError as error:
    print(error)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "backend 'triton' cannot run: Triton is not installed: `pip install triton` (Linux only), "
        "or use backend='chunkwise'\n"
    )


@needs_triton
def test_triton_without_interpreter_names_the_remedy():
    code = """
import torch, dn_lib
x = torch.rand(1, 20, 2, 4)
try:
    dn_lib.delta_rule(x, x, x, x[..., 0], backend="triton")
except RuntimeError as error:
    print(error)
"""
    done = run_python(code, TRITON_INTERPRET="0")
    assert done.stdout.startswith("backend 'triton' cannot run: tensors are on cpu, and Triton's interpreter is off: ")
    assert "TRITON_INTERPRET=1" in done.stdout and done.stdout.count("\n") == 1


# --- torch.library and torch.compile ----------------------------------------------------------------------------


def triton_rule(q, k, v, beta, initial_state=None, **options):
    return delta_rule(q, k, v, beta, initial_state=initial_state, output_final_state=True, backend="triton", **options)


def saved_by_forward(x, S, norm, chunk=16, cu=None):
    o, state, *saved = torch.ops.dn_lib.delta_rule(*x, None, S, cu, 0.3, norm, chunk, True)
    return o, state, saved


@needs_triton
@pytest.mark.parametrize(
    "norm, state, save", [(False, False, False), (False, True, True), (True, False, True), (True, True, False)]
)
def test_opcheck_forward(norm, state, save):
    *x, S = delta_rule_inputs(1, 20, 2, 5, 16, state=1 if state else None)
    if save:
        *x, S = leaves(*x, S)
    torch.library.opcheck(torch.ops.dn_lib.delta_rule, (*x, None, S, None, 0.3, norm, 16, save))


@needs_triton
@pytest.mark.parametrize("norm, state", [(False, False), (True, True)])
def test_opcheck_backward(norm, state):
    *x, S = delta_rule_inputs(1, 20, 2, 5, 16, state=1 if state else None)
    o, last, saved = saved_by_forward(x, S, norm)
    do = torch.randn_like(o).transpose(1, 2).contiguous().transpose(1, 2)  # strides of a gradient may be any
    dstate = torch.randn_like(last) if state else None
    arguments = (x[0], x[1], None, x[3], S, None, last, saved, do, dstate, 0.3, 16)
    torch.library.opcheck(torch.ops.dn_lib.delta_rule_backward, arguments)


@needs_triton
def test_opcheck_decoding():
    q, k, v, beta, S = delta_rule_inputs(2, 1, 2, 5, 16, state=2)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.dn_lib.decode_delta_rule, (q, k, v, beta, S, 0.3, True), test_utils=tests)


@needs_triton
def test_a_compiled_decoding_step_through_the_kernel(auto_takes):
    """The state is overwritten, token after token, as eagerly; "auto" is Triton, as on a GPU."""
    torch._dynamo.reset()
    auto_takes("triton")
    *x, S = delta_rule_inputs(2, 3, 2, 5, 16, state=2)
    states = S.clone(), S.clone()
    compiled = torch.compile(decode_delta_rule, backend="aot_eager")
    for t in range(3):
        token = [y[:, t] for y in x]
        eager = decode_delta_rule(*token, states[0], qk_l2norm=True)
        assert torch.equal(eager, compiled(*token, states[1], qk_l2norm=True)) and torch.equal(*states)


@needs_triton
def test_opcheck_where_sequences_are_split_or_packed_or_empty():
    tests = ("test_schema", "test_faketensor")
    # A batch of one: the last of its segments is a view of all of them.
    *x, S = delta_rule_inputs(1, 40, 1, 5, 16, state=1)
    with using(segments=2):
        torch.library.opcheck(torch.ops.dn_lib.delta_rule, (*x, None, S, None, 0.3, True, 16, True), test_utils=tests)
    cu = torch.tensor([0, 20, 20, 40])
    torch.library.opcheck(torch.ops.dn_lib.delta_rule, (*x, None, None, cu, 0.3, False, 16, True), test_utils=tests)
    *x, S = leaves(*delta_rule_inputs(1, 0, 1, 5, 16, state=1))
    torch.library.opcheck(torch.ops.dn_lib.delta_rule, (*x, None, S, None, 0.3, True, 16, True), test_utils=tests)


def both_ways(fn, tensors, compiled):
    """Outputs and gradients of fn and of its compiled form, with a gradient of awkward strides."""
    results = []
    for f in (fn, compiled):
        y = leaves(*tensors)
        o, state = f(*y)
        do = torch.linspace(-1, 1, o.numel()).reshape(o.mT.shape).mT.to(o.dtype)
        given = [t for t in y if t is not None]
        results.append([o, state, *torch.autograd.grad((o, state), given, (do, torch.ones_like(state)))])
    return zip(*results, strict=True)


@needs_triton
@pytest.mark.parametrize("state", [False, True])
def test_compiled_equals_eager(state):
    torch._dynamo.reset()
    x = delta_rule_inputs(1, 24, 1, 5, 16, state=1 if state else None)
    run = lambda *x: triton_rule(*x, qk_l2norm=True)  # noqa: E731
    for a, b in both_ways(run, x, torch.compile(run, fullgraph=True, backend="aot_eager")):
        assert torch.equal(a, b)
    with torch.no_grad():
        a, b = run(*x), torch.compile(run, fullgraph=True, backend="aot_eager")(*x)
    for y, z in zip(a, b, strict=True):  # eagerly another kernel, for no gradient is wanted
        assert relative_error(z, y.double()) < 1e-5


@needs_triton
def test_compiled_with_packed_sequences_and_autocast():
    torch._dynamo.reset()
    cu = torch.tensor([0, 9, 9, 24], dtype=torch.int32)

    def run(*x):
        with torch.autocast("cpu", dtype=BF16):
            return triton_rule(*x, cu_seqlens=cu)

    x = delta_rule_inputs(1, 24, 1, 5, 16, state=3)
    for a, b in both_ways(run, x, torch.compile(run, fullgraph=True, backend="aot_eager")):
        assert a.dtype == b.dtype and torch.equal(a, b)


@needs_triton
def test_one_graph_for_every_length():
    """One for lengths above a chunk, at most one more below; none at a change of B or H."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    compiled = torch.compile(lambda *x: triton_rule(*x, chunk_size=16), fullgraph=True, backend=backend, dynamic=True)
    for B, L, H in ((2, 40, 2), (3, 33, 2), (2, 20, 3)):
        x = delta_rule_inputs(B, L, H, 5, 16, state=B)
        for a, b in both_ways(lambda *x: triton_rule(*x, chunk_size=16), x, compiled):
            assert torch.equal(a, b)
    assert len(graphs) <= 2


@needs_triton
def test_matmul_precision_is_asked_at_every_call():
    """Compiled too: a change of torch's switch compiles again."""
    torch._dynamo.reset()
    x = delta_rule_inputs(1, 17, 1, 4, 4)[:4]
    compiled = torch.compile(triton_rule, fullgraph=True, backend="aot_eager")
    before, seen = torch.get_float32_matmul_precision(), []
    try:
        for setting in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(setting)
            with record() as trace:
                triton_rule(*x), compiled(*x)
            seen += [c.constants["PRECISION"] for c in trace.launches if c.kernel == "chunk_scan_fwd"]
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["ieee"] * 2 + ["tf32"] * 2 + ["ieee"] * 2


@needs_triton
@pytest.mark.parametrize("compiled", [False, True])
def test_double_backward_is_refused(compiled):
    torch._dynamo.reset()
    x = leaves(*delta_rule_inputs(1, 17, 1, 4, 4)[:4])
    run = torch.compile(triton_rule, fullgraph=True, backend="aot_eager") if compiled else triton_rule
    message = "no second derivative|does not currently support double backward" if compiled else "no second derivative"
    with pytest.raises(RuntimeError, match=message):
        gradients = torch.autograd.grad(run(*x)[0].square().sum(), x, create_graph=True)
        torch.autograd.grad(gradients[0].sum(), x)


@needs_triton
@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_through_the_final_state_alone(compiled):
    torch._dynamo.reset()
    x = delta_rule_inputs(1, 20, 1, 5, 6, state=1)
    run = torch.compile(triton_rule, fullgraph=True, backend="aot_eager") if compiled else triton_rule
    y, z = leaves(*x), leaves(*x, dtype=F64)
    got = torch.autograd.grad(run(*y)[1].square().sum(), y[1:])
    expected = torch.autograd.grad(delta_rule_reference(*z[:4], initial_state=z[4])[1].square().sum(), z[1:])
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 1e-5
    (dq,) = torch.autograd.grad(run(*y)[1].square().sum(), y[0])
    assert not dq.any()


@needs_triton
@pytest.mark.parametrize("wanted", range(5))
def test_gradient_of_one_input_alone(wanted):
    x = list(delta_rule_inputs(1, 20, 1, 5, 6, state=1))
    y, z = list(x), [t.double() for t in x]
    y[wanted], z[wanted] = leaves(x[wanted])[0], leaves(x[wanted], dtype=F64)[0]
    (got,) = torch.autograd.grad(triton_rule(*y)[0].square().sum(), y[wanted])
    (expected,) = torch.autograd.grad(delta_rule_reference(*z[:4], initial_state=z[4])[0].square().sum(), z[wanted])
    assert relative_error(got, expected) < 1e-5


def test_exports():
    assert all(callable(getattr(dn_lib, name)) for name in dn_lib.__all__)
