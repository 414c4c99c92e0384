"""Chapter 6's ablations: one change a bar, edits that do what they say, and a smoke run that goes on."""

from __future__ import annotations

import json

import pytest
import torch

from dn_lib.layers.short_convolution import ShortConvolution
from dn_lib.models import LanguageModel
from experiments.harness import kinds
from experiments.harness.kinds import COMPARED, Kind
from experiments.models import ablations

SHAPE = ablations.SHAPE


@pytest.mark.parametrize("name", [name for name in ablations.VARIANTS if name != ablations.WHOLE])
def test_every_bar_changes_one_thing(name):
    variant = ablations.VARIANTS[name]
    found = variant.kind.differences(ablations.VARIANTS[variant.against].kind, **SHAPE)
    assert len(found) == 1, found


def test_at_least_seven_parts_are_changed():
    changed = set()
    for variant in ablations.VARIANTS.values():
        changed |= variant.kind.differences(ablations.VARIANTS[variant.against].kind, **SHAPE)
    assert changed == {
        "convolution", "activation", "qk_norm", "no output norm", "beta = 1", "heads", "mixer"
    }  # fmt: skip
    activations = {v.kind.fields.get("activation") for v in ablations.VARIANTS.values()}
    assert {"identity", "elu1"} <= activations  # SiLU taken away, and another feature map


def output(kind: Kind, tokens: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return kind.build(**SHAPE)(tokens)


@pytest.mark.parametrize("name", [name for name in ablations.VARIANTS if name != ablations.WHOLE])
def test_no_change_is_idle(name):
    """From the same random weights where the parameters are the same, and in its output always."""
    variant = ablations.VARIANTS[name]
    tokens = torch.randint(32, (2, 20), generator=torch.Generator().manual_seed(0))
    ours, theirs = output(variant.kind, tokens), output(ablations.VARIANTS[variant.against].kind, tokens)
    assert ours.isfinite().all() and not torch.allclose(ours, theirs, atol=1e-6)


class TestEdits:
    def test_beta_is_one_and_is_not_learned(self):
        model = Kind({}, ("beta = 1",)).build(**SHAPE)
        mixer = model.blocks[0].mixer
        x = torch.randn(2, 5, 32)
        assert (mixer.beta(x).sigmoid() == 1).all() and not list(mixer.beta.parameters())

    def test_without_the_norm_the_output_is_as_large_as_the_state(self):
        """With values ten times as large, far from where SiLU bends, so is the output; or with the norm, it is not."""

        def size(kind: Kind, factor: float) -> float:
            torch.manual_seed(0)
            mixer = kind.build(**SHAPE).blocks[0].mixer
            with torch.no_grad():
                mixer.value_conv.weight.mul_(factor)
                return mixer(torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(0))).norm().item()

        bare = Kind({}, ("no output norm",))
        assert size(bare, 1e6) / size(bare, 1e5) == pytest.approx(10, rel=0.01)
        assert size(Kind(), 1e6) / size(Kind(), 1e5) == pytest.approx(1, rel=0.01)

    def test_attention_sees_through_convolutions_and_stays_causal(self):
        model = Kind({"mixer": "attention"}, ("convolutions in attention",)).build(**SHAPE)
        assert sum(isinstance(part, ShortConvolution) for part in model.modules()) == 3
        tokens = torch.randint(32, (1, 12))
        changed = tokens.clone()
        changed[0, 8] = (changed[0, 8] + 1) % 32
        before, after = model(tokens)[0], model(changed)[0]
        assert torch.equal(before[:8], after[:8]) and not torch.allclose(before[8:], after[8:])

    def test_who_has_no_cache_says_so(self):
        assert not COMPARED["Transformer, convolutions"].caches and COMPARED["Transformer"].caches


def test_the_compared_models_have_equal_sizes():
    shape = {"vocab_size": 256, "width": 512, "layers": 8, "heads": 4, "window": 256}
    counts = {name: kinds.parameters(kind, **shape) for name, kind in COMPARED.items()}
    assert max(counts.values()) < 1.02 * min(counts.values()) and 25e6 < counts["DeltaNet"] < 27e6
    gated, plain = (
        COMPARED[name].build(vocab_size=256, width=64, layers=2, heads=2) for name in ("gated DeltaNet", "DeltaNet")
    )
    extra = {name for name, _ in gated.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert {name.split(".")[-2 if name.endswith("weight") else -1] for name in extra} == {
        "step",
        "log_rates",
        "step_biases",
    }
    assert isinstance(gated, LanguageModel)


def test_a_stopped_run_goes_on_with_the_rows_it_has(tmp_path, capsys):
    out = tmp_path / "ablations.json"
    options = ["--smoke", "--out", str(out)]
    assert ablations.EXPERIMENT.start([*options, "--budget", "-1"]) == 2
    assert ablations.EXPERIMENT.start(options) == 0
    record = json.loads(out.read_text())
    assert {row["variant"] for row in record["rows"]} == set(ablations.VARIANTS)
    assert all(row["status"] == "ok" and row["measured"] is False and row["seed"] == 0 for row in record["rows"])
    assert set(record["summary"]) == set(ablations.VARIANTS)
    capsys.readouterr()
    assert ablations.EXPERIMENT.start(options) == 0 and "12 rows kept" in capsys.readouterr().out
    assert json.loads(out.read_text())["rows"] == record["rows"]
    some = [r | {"accuracy": a} for r, a in zip([record["rows"][0]] * 3, (0.2, 0.9, 0.5), strict=True)]
    found = ablations.summary(some)[ablations.WHOLE]
    assert found == {"median": 0.5, "least": 0.2, "most": 0.9, "seeds": 3}


def test_training_is_the_same_again_and_learns():
    one, two = (ablations.train(Kind(), 40, 3) for _ in "ab")
    assert one == two and len(one["curve"]) == 4
    other = ablations.train(Kind(), 40, 4)
    assert other["curve"] != one["curve"] and one["curve"][-1] < one["curve"][0]
