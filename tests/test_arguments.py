"""Malformed arguments of every public function: each raises a TypeError or a ValueError that names the argument."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
import torch

import dn_lib
from dn_lib.forms import affine, chunkwise_backward, common, decay
from dn_lib.forms import chunkwise as cw
from dn_lib.forms import householder as hh
from dn_lib.forms import linear_attention as la
from dn_lib.forms.delta_rule import delta_rule_step, erase_write, recurrent_delta_rule, sweep_matrix, sweep_rate
from dn_lib.forms.gated import recurrent_gated_delta_rule
from dn_lib.parallel import affine as sp
from dn_lib.testing import delta_rule_inputs

B, L, H, K, V = 1, 6, 2, 4, 3


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


def like(x):
    """What is no tensor for `x`, or one of another rank, shape, dtype, layout or device."""
    return {
        "none": None,
        "number": 1.0,
        "list": [1.0],
        "array": np.zeros(tuple(x.shape)),
        "text": "x",
        "scalar": zeros(()),
        "rank": zeros(*x.shape, 1),
        "longer": zeros(*x.shape[:-1], x.shape[-1] + 1),
        "integers": x.long(),
        "bools": x.bool(),
        "complex": x.to(torch.complex64),
        "meta": x.to("meta"),
        "sparse": x.to_sparse(),
        "nested": torch.nested.nested_tensor([zeros(2, 3), zeros(4, 3)], layout=torch.jagged),
    }


SCALE = {
    "text": "x",
    "list": [1.0],
    "complex": 1j,
    "true": True,
    "zero": 0.0,
    "nan": float("nan"),
    "infinity": np.float32("inf"),
    "huge": 10**400,
    "tensor": torch.tensor(0.5),
    "wants-a-gradient": torch.tensor(0.5, requires_grad=True),
    "array": np.ones(1),
}
COUNT = {"zero": 0, "negative": -3, "float": 16.0, "true": True, "text": "16", "nan": float("nan"), "tensor": zeros(())}
FLAG = {"text": "False", "one": 1, "none": None, "tensor": torch.tensor(True)}
NAME = {"unknown": "cuda", "none": None, "number": 1, "list": ["auto"], "tensor": zeros(2)}
FUNCTION = {"none": None, "text": "matmul", "tensor": zeros(2)}
OFFSETS = {
    "list": [0, L],
    "array": np.array([0, L]),
    "float": torch.tensor([0.0, L]),
    "bool": torch.tensor([False, True]),
    "short": torch.tensor([0, L], dtype=torch.int16),
    "one": torch.tensor([L]),
    "matrix": torch.tensor([[0, L]]),
    "meta": torch.tensor([0, L], device="meta"),
    "sparse": torch.tensor([0, L]).to_sparse(),
    "falling": torch.tensor([0, 5, 2, L]),
    "negative": torch.tensor([0, -1, L]),
    "late": torch.tensor([1, L]),
    "padded": torch.tensor([0, L - 1]),
    "beyond": torch.tensor([0, L + 1]),
    "far": torch.tensor([0, 2**40, L]),
}

q, k, v, beta, state = delta_rule_inputs(B, L, H, K, V, state=B)
token = {name: x[:, 0] for name, x in (("q", q), ("k", k), ("v", v), ("beta", beta))}
rows = {name: x.transpose(1, 2) for name, x in (("q", q), ("k", k), ("v", v), ("beta", beta))}
one = {"q": q[0, :, 0], "k": k[0, :, 0], "v": v[0, :, 0], "beta": beta[0, :, 0], "state": state[0, 0]}
head = {name: one[name] for name in ("q", "k", "v", "beta")}
only = lambda *names: {name: one[name] for name in names}  # noqa: E731
pair = (torch.eye(2), zeros(2, 1))

# name: function, its sound arguments, which of them are tensors, and further malformed values of arguments.
STATE = {name: x for name, x in like(state).items() if name != "none"}
BETA = {name: x for name, x in like(beta).items() if name != "none"}
OPERATOR = {"scale": SCALE, "initial_state": STATE, "cu_seqlens": OFFSETS, "output_final_state": FLAG}
FLA = OPERATOR | {"use_qk_l2norm_in_kernel": FLAG, "head_first": {"true": True, "text": "x"}}
FORM = {"scale": SCALE, "initial_state": {n: x for n, x in like(state[0]).items() if n not in ("none", "rank")}}
FUNCTIONS = {
    "delta_rule": (
        dn_lib.delta_rule,
        {"q": q, "k": k, "v": v, "beta": beta},
        "q k v beta",
        OPERATOR | {"qk_l2norm": FLAG, "chunk_size": COUNT, "backend": NAME},
    ),
    "chunk_delta_rule": (
        dn_lib.chunk_delta_rule,
        {"q": q, "k": k, "v": v, "beta": beta},
        "q k v beta",
        FLA | {"cu_seqlens_cpu": {"list": [0, L], "alone": torch.tensor([0, L]), "float": torch.tensor([0.0, L])}},
    ),
    "fused_recurrent_delta_rule": (
        dn_lib.fused_recurrent_delta_rule,
        {"q": q, "k": k, "v": v},
        "q k v",
        FLA | {"beta": BETA},
    ),
    "decode_delta_rule": (
        dn_lib.decode_delta_rule,
        {**token, "state": state},
        "q k v beta state",
        {
            "scale": SCALE,
            "qk_l2norm": FLAG,
            "state": {"half": state.half(), "strided": state.mT.contiguous().mT, "negative": torch._neg_view(state)},
        },
    ),
    "recurrent_delta_rule": (recurrent_delta_rule, head, "q k v beta", FORM),
    "recurrent_gated_delta_rule": (
        recurrent_gated_delta_rule,
        {**head, "g": -one["beta"]},
        "q k v beta g",
        FORM,
    ),
    "delta_rule_step": (
        delta_rule_step,
        {**{name: x[0, 0] for name, x in token.items()}, "state": state[0, 0]},
        "q k v state",
        {"scale": SCALE},
    ),
    "sweep_matrix": (sweep_matrix, only("k", "beta"), "k beta", {}),
    "sweep_rate": (
        sweep_rate,
        {"k": one["k"][:3], "beta": one["beta"][:3]},
        "k beta",
        {"k": {"many": zeros(5, 3)}},
    ),
    "erase_write": (
        erase_write,
        {"k": one["k"][0], "v": one["v"][0], "beta": one["beta"][0], "state": one["state"]},
        "k v state",
        {"v": {"half": one["v"][0].half()}},
    ),
    "parallel_delta_rule": (cw.parallel_delta_rule, rows, "q k v beta", {"scale": SCALE}),
    "chunkwise_delta_rule": (cw.chunkwise_delta_rule, rows, "q k v beta", {"scale": SCALE, "chunk_size": COUNT}),
    "reversible_chunkwise_delta_rule": (
        chunkwise_backward.reversible_chunkwise_delta_rule,
        rows,
        "q k v beta",
        {"scale": SCALE, "chunk_size": COUNT},
    ),
    "delta_attention_matrix": (cw.delta_attention_matrix, only("q", "k", "beta"), "q k beta", {"scale": SCALE}),
    "varlen_delta_rule": (
        cw.varlen_delta_rule,
        {**head, "cu_seqlens": torch.tensor([0, L])},
        "q k v beta",
        {"cu_seqlens": OFFSETS, "form": FUNCTION, "initial_state": {"states": zeros(2, K, V), "text": "x"}},
    ),
    "to_chunks": (
        common.to_chunks,
        {"x": one["q"], "chunk_size": 2},
        "",
        {"x": {"row": zeros(3)}, "chunk_size": COUNT},
    ),
    "chunk_wy": (cw.chunk_wy, only("k", "v", "beta"), "k v beta", {}),
    "chunk_states": (
        cw.chunk_states,
        {"k": one["k"][None], "v": one["v"][None], "beta": one["beta"][None], "state": one["state"]},
        "k v beta state",
        {},
    ),
    "chunk_errors": (chunkwise_backward.chunk_errors, only("k", "v", "beta", "state"), "k v beta state", {}),
    "chunk_backward": (
        chunkwise_backward.chunk_backward,
        {**only("q", "k", "beta", "state"), "errors": one["v"], "do": one["v"], "dstate": one["state"]},
        "q k beta errors do state dstate",
        {"do": {"double": one["v"].double()}},
    ),
    "chunkwise_delta_rule_backward": (
        chunkwise_backward.chunkwise_delta_rule_backward,
        {
            **only("q", "k", "beta"),
            **{"errors": one["v"], "do": one["v"], "final_state": one["state"], "dstate": one["state"]},
        },
        "q k beta errors do final_state dstate",
        {"scale": SCALE, "chunk_size": COUNT},
    ),
    "chunkwise_forward_with_errors": (
        chunkwise_backward.chunkwise_forward_with_errors,
        only("q", "k", "v", "beta", "state"),
        "q k v beta state",
        {"chunk_size": COUNT, "state": {"double": one["state"].double()}},
    ),
    "chunk_affine": (affine.chunk_affine, only("k", "v", "beta"), "k v beta", {}),
    "compose_affine": (
        affine.compose_affine,
        {"second": pair, "first": pair},
        "",
        {"first": {"none": None, "shape": (zeros(3, 3), zeros(3, 1)), "text": ("x", "y")}, "second": {"tensor": q}},
    ),
    "segment_affine": (affine.segment_affine, only("k", "v", "beta"), "k v beta", {"chunk_size": COUNT}),
    "segment_state_gradient": (
        affine.segment_state_gradient,
        {**only("q", "k", "beta"), "do": one["v"], "dstate": one["state"]},
        "q k beta do dstate",
        {"chunk_size": COUNT},
    ),
    "multiply_adds": (cw.multiply_adds, {"fn": torch.ones}, "", {"fn": FUNCTION}),
    "saved_bytes": (cw.saved_bytes, {"fn": torch.ones}, "", {"fn": FUNCTION}),
    "softmax_attention": (la.softmax_attention, only("q", "k", "v"), "q k v", {"scale": SCALE}),
    "kernel_attention": (
        la.kernel_attention,
        only("q", "k", "v"),
        "q k v",
        {"feature_map": FUNCTION | {"sum": torch.sum, "text": lambda x: "x"}},
    ),
    "recurrent_kernel_attention": (
        la.recurrent_kernel_attention,
        only("q", "k", "v"),
        "q k v",
        {"feature_map": FUNCTION},
    ),
    "linear_attention_step": (
        la.linear_attention_step,
        {"q": one["q"][0], "k": one["k"][0], "v": one["v"][0], "state": one["state"]},
        "q k v state",
        {"scale": SCALE},
    ),
    "recurrent_linear_attention": (la.recurrent_linear_attention, only("q", "k", "v"), "q k v", {"scale": SCALE}),
    "parallel_linear_attention": (la.parallel_linear_attention, only("q", "k", "v"), "q k v", {"scale": SCALE}),
    "chunkwise_linear_attention": (
        la.chunkwise_linear_attention,
        only("q", "k", "v"),
        "q k v",
        {"scale": SCALE, "chunk_size": COUNT},
    ),
    "recurrent_decay_attention": (
        decay.recurrent_decay_attention,
        {**only("q", "k", "v"), "decay": one["k"].abs()},
        "q k v decay",
        {"scale": SCALE},
    ),
    "taylor_feature_map": (
        la.taylor_feature_map,
        {"x": one["q"], "degree": 2},
        "",
        {
            "x": {"scalar": zeros(()), "integers": torch.arange(3)},
            "degree": {"float": 2.0, "negative": -1, "large": 60, "huge": 10**5000},
        },
    ),
    "chunkwise_flops": (
        la.chunkwise_flops,
        {"length": 8, "d_k": 2, "d_v": 2, "chunk_size": 4},
        "",
        {"length": {"negative": -1, "float": 2.5}, "d_k": {"text": "2"}, "chunk_size": COUNT},
    ),
    "random_unit_keys": (la.random_unit_keys, {"count": 2, "d": 3}, "", {"count": {"float": 2.0}, "d": COUNT}),
    "retrieval_error": (la.retrieval_error, only("k", "v"), "k v", {}),
    "expected_retrieval_error": (
        la.expected_retrieval_error,
        {"count": 2, "d": 3},
        "",
        {"count": COUNT, "d": {"zero": 0}},
    ),
    "householder_matrix": (
        hh.householder_matrix,
        {"k": one["k"], "beta": one["beta"]},
        "k",
        {"beta": {"text": "2", "true": True, "none": None, "integers": one["beta"].long(), "shape": zeros(4)}},
    ),
    "householder_product": (hh.householder_product, only("k", "beta"), "k beta", {}),
    "apply_householder": (
        hh.apply_householder,
        only("k", "beta", "state"),
        "k beta",
        {"state": {"rows": zeros(5, 3), "integers": one["state"].long(), "none": None}},
    ),
    "pseudo_values": (hh.pseudo_values, only("k", "v", "beta"), "k v beta", {}),
    "ut_transform": (
        hh.ut_transform,
        only("k", "beta"),
        "k beta",
        {"method": NAME, "matmul": FUNCTION},
    ),
    "scaled_inverse": (hh.scaled_inverse, only("k", "beta"), "k beta", {"method": NAME, "matmul": FUNCTION}),
    "rounded_matmul": (
        hh.rounded_matmul,
        {"dtype": torch.float16},
        "",
        {"dtype": {"text": "float16", "integers": torch.int8}},
    ),
    "entering_state": (
        sp.entering_state,
        {"pieces": [pair], "rank": 0},
        "",
        {"pieces": {"empty": [], "none": None, "text": ["x"]}, "rank": {"negative": -1, "beyond": 2, "float": 0.0}},
    ),
    "leaving_gradient": (
        sp.leaving_gradient,
        {"pieces": [pair], "rank": 0},
        "",
        {"pieces": {"empty": [], "shape": [(zeros(2, 3), zeros(2, 1))]}, "rank": {"beyond": 1}},
    ),
    "sequence_parallel_delta_rule": (
        sp.sequence_parallel_delta_rule,
        head,
        "q k v beta",
        {"scale": SCALE, "chunk_size": COUNT, "group": {"text": "gloo", "number": 1}},
    ),
    "run_on_processes": (
        sp.run_on_processes,
        {"fn": torch.ones, "world_size": 1},
        "",
        {"fn": FUNCTION, "world_size": COUNT},
    ),
}
# Shapes that are sound where they look odd: a value dimension of its own, leading dimensions that broadcast.
SOUND = {(name, "v", "longer") for name in FUNCTIONS} | {(name, "do", "longer") for name in FUNCTIONS}
SOUND |= {
    ("apply_householder", "k", "longer"),
    ("sweep_matrix", "k", "longer"),
    ("sweep_rate", "k", "longer"),
    ("householder_product", "k", "longer"),
    ("householder_matrix", "k", "longer"),
    ("ut_transform", "k", "longer"),
    ("scaled_inverse", "k", "longer"),
    ("pseudo_values", "k", "longer"),
    ("chunk_wy", "k", "longer"),
    ("chunk_affine", "k", "longer"),
    ("segment_affine", "k", "longer"),
    ("retrieval_error", "k", "longer"),
    ("householder_matrix", "k", "rank"),
    ("recurrent_gated_delta_rule", "g", "scalar"),  # of one head: a gate fixed in time
}
# A change of one tensor that makes another the odd one out: the message may name that one.
PARTNERS = {
    "q": "k beta state",
    "k": "q beta state v",
    "v": "initial_state state errors do",
    "errors": "do",
    "do": "dstate errors",
}


def cases():
    for name, (function, sound, tensors, others) in FUNCTIONS.items():
        malformed = {argument: like(sound[argument]) for argument in tensors.split()}
        for argument, values in others.items():
            malformed[argument] = malformed.get(argument, {}) | values
        for argument, values in malformed.items():
            for label, value in values.items():
                if (name, argument, label) not in SOUND:
                    yield pytest.param(function, sound, argument, value, id=f"{name}-{argument}-{label}")


CASES = list(cases())


def test_there_are_many_cases():
    assert len(CASES) >= 1000, len(CASES)


@pytest.mark.parametrize("function, sound, argument, value", CASES)
def test_a_malformed_argument_is_named(function, sound, argument, value):
    with pytest.raises((TypeError, ValueError)) as caught:
        function(**sound | {argument: value})
    message = str(caught.value)
    taken = inspect.signature(function).parameters  # a name that the caller cannot find in the call is no help
    names = [argument, *(name for name in PARTNERS.get(argument, "").split() if name in taken)]
    assert any(re.match(rf"{name}\b", message) for name in names), message
    assert "\n" not in message and len(message) < 250


@pytest.mark.parametrize(
    "name, argument",
    [
        (name, argument)
        for name, (_, sound, *_) in FUNCTIONS.items()
        for argument in ("state", "dstate", "final_state")
        if argument in sound and name != "decode_delta_rule"
    ],
)
def test_leading_dimensions_of_a_state_that_do_not_fit_are_named(name, argument):
    function, sound, *_ = FUNCTIONS[name]
    three = {key: torch.stack([x] * 3) if torch.is_tensor(x) else x for key, x in sound.items()}
    function(**three)
    with pytest.raises(ValueError, match=rf"^{argument} must "):
        function(**three | {argument: torch.stack([sound[argument]] * 2)})


def test_one_state_serves_all_sequences():
    k, v, beta = (torch.stack([one[name]] * 2)[:, None].expand(-1, 3, *one[name].shape) for name in ("k", "v", "beta"))
    alone = cw.chunk_states(k[0], v[0], beta[0], one["state"])
    for both, single in zip(cw.chunk_states(k, v, beta, one["state"]), alone, strict=True):
        assert both.shape == (2, *single.shape) and torch.allclose(both[1], single)


def test_offsets_on_the_cpu_are_those_of_the_copy():
    offsets = torch.tensor([0, 2, L])
    dn_lib.chunk_delta_rule(q, k, v, beta, cu_seqlens=offsets, cu_seqlens_cpu=offsets.int())
    with pytest.raises(ValueError, match=r"^cu_seqlens_cpu must be a copy of cu_seqlens"):
        dn_lib.chunk_delta_rule(q, k, v, beta, cu_seqlens=offsets, cu_seqlens_cpu=torch.tensor([0, 3, L]))


def test_a_state_of_inference_mode_is_updated_there_alone():
    with torch.inference_mode():
        made_there = torch.zeros_like(state)
        dn_lib.decode_delta_rule(**token, state=made_there)
    with pytest.raises(ValueError, match=r"^state must not be made in inference mode"):
        dn_lib.decode_delta_rule(**token, state=made_there)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_sound_arguments_are_taken(name):
    function, sound, *_ = FUNCTIONS[name]
    sound = {argument: x.clone() if torch.is_tensor(x) else x for argument, x in sound.items()}
    if name in ("multiply_adds", "saved_bytes"):
        function(torch.ones, 2)
    elif name == "sequence_parallel_delta_rule":
        with pytest.raises(RuntimeError, match="init_process_group"):
            function(**sound)
    elif name != "run_on_processes":  # tests/parallel/test_sequence_parallel.py starts processes
        function(**sound)
