"""`dn_lib.fla.accelerate()` on a stand-in of fla: a package with the layout of fla 0.6.0 that looks functions up as its
layers do and calls them with the same arguments.  fla itself needs a GPU."""

from __future__ import annotations

import importlib
import sys
import textwrap
import warnings

import pytest
import torch

import dn_lib
from dn_lib.testing import delta_rule_inputs, log_gates, relative_error

DELTA = """
from fla.ops.delta_rule import chunk_delta_rule, fused_recurrent_delta_rule

class DeltaNet:
    def __call__(self, mode, q, k, v, beta, state=None, cu_seqlens=None, **more):
        function = chunk_delta_rule if mode == "chunk" else fused_recurrent_delta_rule
        return function(
            q=q, k=k, v=v, beta=beta, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens,
            use_qk_l2norm_in_kernel=True, **more,
        )
"""
GATED = """
from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

class GatedDeltaNet:
    def __call__(self, mode, q, k, v, a, beta, A_log, dt_bias, state=None, **more):
        function = chunk_gated_delta_rule if mode == "chunk" else fused_recurrent_gated_delta_rule
        return function(
            q=q, k=k, v=v, g=a, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True, A_log=A_log, dt_bias=dt_bias, use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=True, state_v_first=True, cu_seqlens=None, **more,
        )
"""
OPERATORS = """
def {0}(*args, **kwargs):
    return "fla", "{0}"

def {1}(*args, **kwargs):
    return "fla", "{1}"
"""


def package(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


FILES = {
    "fla/__init__.py": "",
    "fla/ops/__init__.py": "",
    "fla/ops/delta_rule.py": OPERATORS.format("chunk_delta_rule", "fused_recurrent_delta_rule"),
    "fla/ops/gated_delta_rule.py": OPERATORS.format("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"),
    "fla/layers/__init__.py": "",
    "fla/layers/delta_net.py": DELTA,
    "fla/layers/gated_deltanet.py": GATED,
}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A function that puts a stand-in on the path, without some of its files."""

    def make(without=()):
        package(tmp_path, {name: text for name, text in FILES.items() if name not in without})
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()

    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "fla"}
    for name in before:
        del sys.modules[name]
    yield make
    dn_lib.fla.restore()
    for name in [name for name in sys.modules if name.split(".")[0] == "fla"]:
        del sys.modules[name]
    sys.modules.update(before)


def layers():
    modules = importlib.import_module("fla.layers.delta_net"), importlib.import_module("fla.layers.gated_deltanet")
    return modules[0].DeltaNet(), modules[1].GatedDeltaNet()


def tensors(**options):
    return dict(zip(("q", "k", "v", "beta"), delta_rule_inputs(1, 12, 2, 4, 5, **options)[:4], strict=True))


def gated():
    rates = {"A_log": torch.tensor([0.3, -1.0]), "dt_bias": torch.tensor([-2.0, 0.5])}
    return tensors() | {"a": torch.randn(1, 12, 2)} | rates


NAMES = (
    "fla.layers.delta_net.chunk_delta_rule",
    "fla.layers.delta_net.fused_recurrent_delta_rule",
    "fla.layers.gated_deltanet.chunk_gated_delta_rule",
    "fla.layers.gated_deltanet.fused_recurrent_gated_delta_rule",
)


def test_layers_made_before_and_after_run_on_our_operators(stand_in):
    stand_in()
    before = layers()
    assert before[0]("chunk", **tensors())[0] == "fla"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dn_lib.fla.accelerate() == NAMES
        for delta, gated_delta in (before, layers()):
            for mode in ("chunk", "fused_recurrent"):
                x = tensors()
                o, state = delta(mode, **x)
                expected = dn_lib.delta_rule(**x, qk_l2norm=True, output_final_state=True)
                assert relative_error(o, expected[0]) < 1e-5 and relative_error(state, expected[1]) < 1e-5
                x = gated()
                o, state = gated_delta(mode, **x)
                g = -x["A_log"].exp() * torch.nn.functional.softplus(x["a"] + x["dt_bias"])
                beta = 2 * x["beta"].sigmoid()
                options = {"qk_l2norm": True, "output_final_state": True}
                expected = dn_lib.gated_delta_rule(*(x[n] for n in "qkv"), beta, g, **options)
                assert relative_error(o, expected[0]) < 1e-5 and relative_error(state.mT, expected[1]) < 1e-5
                assert gated_delta(mode, **x, state=state)[0].shape == o.shape


def test_restore_undoes_it_and_both_may_be_called_again(stand_in):
    stand_in()
    dn_lib.fla.restore()  # nothing to undo
    module = importlib.import_module("fla.layers.delta_net")
    theirs = module.chunk_delta_rule
    dn_lib.fla.accelerate()
    ours = module.chunk_delta_rule
    assert dn_lib.fla.accelerate() == NAMES and module.chunk_delta_rule is ours is not theirs
    for _ in range(2):
        dn_lib.fla.restore()
        assert module.chunk_delta_rule is theirs
    assert importlib.import_module("fla.ops.delta_rule").chunk_delta_rule is theirs
    dn_lib.fla.accelerate()
    other = module.chunk_delta_rule = lambda *_: None
    dn_lib.fla.restore()
    assert module.chunk_delta_rule is other


LEFT = {
    "dtypes": ({"v": torch.zeros(1, 12, 2, 5, dtype=torch.float64)}, "q, k and v have several dtypes"),
    "beta": ({"beta": torch.zeros(1, 12, 2, 5)}, "beta has a strength for each value channel"),
    "rank": ({"q": torch.zeros(12, 2, 4)}, "q, k and v are not tensors of four dimensions"),
    "unknown": ({"new_option": 1}, "ours does not know the argument new_option"),
}


@pytest.mark.parametrize("change, reason", LEFT.values(), ids=LEFT)
def test_what_ours_cannot_take_is_left_to_fla_and_said_once(stand_in, change, reason):
    stand_in()
    dn_lib.fla.accelerate()
    delta, _ = layers()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            assert delta("chunk", **tensors() | change) == ("fla", "chunk_delta_rule")
    assert [str(w.message)[: len(reason) + 33] for w in seen] == [f"chunk_delta_rule is left to fla: {reason}"]
    assert isinstance(delta("chunk", **tensors())[0], torch.Tensor)


def test_arguments_that_only_fla_has(stand_in):
    stand_in()
    dn_lib.fla.accelerate()
    _, gated_delta = layers()
    with pytest.warns(UserWarning, match="chunk_gated_delta_rule is left to fla: ours does not take cp_context"):
        assert gated_delta("chunk", **gated(), cp_context=object()) == ("fla", "chunk_gated_delta_rule")
    by_channel = log_gates(1, 12, 2, 4)
    with pytest.warns(UserWarning, match="fused_recurrent_gated_delta_rule is left to fla: ours does not take gk"):
        assert gated_delta("fused_recurrent", **gated(), gk=by_channel)[0] == "fla"
    assert isinstance(gated_delta("chunk", **gated(), cp_context=None, chunk_size=16)[0], torch.Tensor)
    assert isinstance(layers()[0]("chunk", **tensors(), head_first=False)[0], torch.Tensor)


def test_positional_calls_are_understood(stand_in):
    stand_in()
    dn_lib.fla.accelerate()
    module = importlib.import_module("fla.layers.gated_deltanet")
    x = gated()
    arguments = *(x[n] for n in "qkv"), -x["a"].abs(), x["beta"]
    assert isinstance(module.chunk_gated_delta_rule(*arguments, 0.5, None, True)[1], torch.Tensor)
    mixed = (arguments[0], arguments[1], arguments[2].double(), *arguments[3:])
    with pytest.warns(UserWarning, match="several dtypes"):
        assert module.chunk_gated_delta_rule(*mixed)[0] == "fla"
    with pytest.warns(UserWarning, match="with 20 positional arguments, and ours has 16"):
        assert module.chunk_gated_delta_rule(*[None] * 20)[0] == "fla"


def test_an_fla_with_one_layer_alone(stand_in):
    stand_in(without=("fla/layers/gated_deltanet.py", "fla/ops/gated_delta_rule.py"))
    assert dn_lib.fla.accelerate() == NAMES[:2]


def test_an_fla_without_the_layers_and_none_at_all(stand_in, monkeypatch):
    stand_in(without=[name for name in FILES if "layers/" in name])
    with pytest.raises(ImportError, match="fla must have one of fla"):
        dn_lib.fla.accelerate()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="fla is not installed: pip install flash-linear-attention"):
        dn_lib.fla.accelerate()
    dn_lib.fla.restore()


def test_a_layer_that_lacks_what_it_imports_says_so(stand_in):
    """A broken installation is not taken for an old one."""
    stand_in(without=("fla/ops/delta_rule.py",))
    with pytest.raises(ModuleNotFoundError, match=r"fla\.ops\.delta_rule"):
        dn_lib.fla.accelerate()
