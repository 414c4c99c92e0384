"""The experiment of study 4: equal states, the router's agreement, and what a row holds."""

from __future__ import annotations

import json

import pytest
import torch

from dn_lib.models import LanguageModel, ModelConfig
from experiments.studies import memory

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="--smoke is for machines without a GPU")


def test_the_states_hold_the_same_numbers():
    sizes = {}
    for kind, fields in memory.KINDS.items():
        model = LanguageModel(ModelConfig(vocab_size=8, width=128, layers=1, heads=2, mlp_ratio=0, **fields))
        cache = model.new_cache(1)
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.long), cache)
        sizes[kind] = cache.layers[0]["state"].numel()
    assert sizes == {
        "small state": 512,
        "mixture": 2560,
        "mixture, two active": 2560,
        "wide keys": 2560,
        "wider heads": 2592,
    }


def test_agreement_is_that_of_the_value_and_the_question():
    """A router that looks at one number of the embedding, which we set for each token."""
    model = LanguageModel(
        ModelConfig(vocab_size=32, width=8, layers=1, heads=1, mixer="mom", memories=2, active_memories=1)
    )
    tokens, _ = memory.draw(6, memory.SMALL_TASK, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.embedding.weight.zero_()
        model.embedding.weight[:, 0] = torch.where(torch.arange(32) < 16, 1.0, -1.0)  # keys one way, values the other
        model.blocks[0].mixer.router.weight.zero_()[:, 0] = torch.tensor([1.0, -1.0])
        assert memory.agreements(model, tokens, 4) == [0.0]
        model.embedding.weight[:, 0] = 1.0
        assert memory.agreements(model, tokens, 4) == [1.0]
        # One key of four asks where the values are.
        model.embedding.weight[16:, 0] = -1.0
        model.embedding.weight[tokens[0, 0], 0] = -1.0
        assert memory.agreements(model, tokens[:1], 4) == [0.25]


def test_agreement_with_two_active_memories_is_a_share_of_weight():
    """Keys go to memories 0 and 1, values to 1 and 2: the question's weight on memory 1 is what agrees."""
    model = LanguageModel(
        ModelConfig(vocab_size=32, width=8, layers=1, heads=1, mixer="mom", memories=3, active_memories=2)
    )
    tokens, _ = memory.draw(6, memory.SMALL_TASK, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.embedding.weight.zero_()
        model.embedding.weight[:, 0] = torch.where(torch.arange(32) < 16, 1.0, -1.0)
        model.blocks[0].mixer.router.weight.zero_()[:, 0] = torch.tensor([0.3, 0.1, -0.5])
        scale = model.blocks[0].mixer_norm(model.embedding(tokens[:1, :1]))[0, 0, 0]
        expected = torch.tensor([0.3, 0.1]).mul(scale).softmax(0)[1].item()
        assert memory.agreements(model, tokens, 4)[0] == pytest.approx(expected, rel=1e-5)


def test_a_smoke_run_writes_every_row(tmp_path):
    out = tmp_path / "memory.json"
    assert memory.EXPERIMENT.start(["--smoke", "--out", str(out)]) == 0
    rows = {row["key"]: row for row in json.loads(out.read_text())["rows"]}
    assert len(rows) == 2 * len(memory.KINDS) + 1
    assert all(row["status"] == "ok" and row["measured"] is False for row in rows.values())
    assert (
        len(rows["mixture, layers 2, seed 0"]["agreement"]) == 2
        and "agreement" not in rows["wide keys, layers 1, seed 0"]
    )
    text = rows["text, seed 0"]
    assert {name for name, found in text.items() if isinstance(found, dict) and "after" in found} == set(
        memory.conversions(2)
    )
    assert all(0 < text[name]["after"]["bits_per_byte"] < 12 for name in memory.conversions(2))
