"""The experiment of study 1: its task, its models, and a smoke run that goes on where it stopped."""

from __future__ import annotations

import json

import pytest
import torch

from dn_lib.data.recall import IGNORE
from experiments.studies import forgetting


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("marked", [False, True])
def test_every_question_has_the_answer_of_its_own_document(marked):
    tokens, labels = forgetting.documents(5, 4, 3, 6, marked=marked, generator=generator())
    assert tokens.shape == labels.shape == (5, 4 * (9 + marked))
    stale = 0
    for text, label in zip(tokens.view(5, 4, -1).tolist(), labels.view(5, 4, -1).tolist(), strict=True):
        held: dict[int, int] = {}
        for row, wanted in zip(text, label, strict=True):
            assert not marked or row[0] == forgetting.MARK
            written, asked = row[marked : marked + 6], row[marked + 6 :]
            new = dict(zip(written[::2], written[1::2], strict=True))
            assert len(new) == 3 and set(asked) == set(new)
            assert wanted[marked + 6 :] == [new[key] for key in asked]
            assert set(wanted[: marked + 6]) == {IGNORE}
            stale += sum(key in held and held[key] != value for key, value in new.items())
            held |= new
        assert len(held) <= 6  # one pool for a text
    assert stale > 10  # keys come back with new values


def test_without_a_mark_nothing_else_changes():
    plain = forgetting.documents(3, generator=generator(1))
    marked = forgetting.documents(3, marked=True, generator=generator(1))
    kept = marked[0].view(3, forgetting.DOCUMENTS, -1)[..., 1:].flatten(1)
    assert torch.equal(kept, plain[0]) and (plain[0] != forgetting.MARK).all()


def test_a_pool_too_small_or_too_large_is_refused():
    for pool in (2, 64):
        with pytest.raises(ValueError, match="pool must be from pairs = 3 to 63"):
            forgetting.documents(1, 2, 3, pool)


def test_a_better_answer_scores_more():
    """A perfect reader of the task would get all: the labels are those of the newest value."""
    tokens, labels = forgetting.documents(8, generator=generator(2))
    held: list[dict[int, int]] = [{} for _ in range(8)]
    right = total = 0
    for i in range(tokens.shape[1]):
        for text, memory in enumerate(held):
            token, label = int(tokens[text, i]), int(labels[text, i])
            if label != IGNORE:
                right, total = right + (memory[token] == label), total + 1
            elif token < 64 and i + 1 < tokens.shape[1] and int(tokens[text, i + 1]) >= 64:
                memory[token] = int(tokens[text, i + 1])
    assert right == total == 8 * forgetting.DOCUMENTS * forgetting.PAIRS


def test_the_models_differ_in_their_mixers():
    tokens, _ = forgetting.documents(2, generator=generator())
    outputs = []
    for kind in forgetting.KINDS.values():
        torch.manual_seed(0)
        outputs.append(kind.build(**forgetting.TINY)(tokens))
    assert len({tuple(o.flatten().tolist()) for o in outputs}) == len(outputs)


def test_the_three_mixings_have_gradients():
    for run in forgetting.mixings(16, "cpu", smoke=True).values():
        gradients = run()
        assert len(gradients) == 3 and all(x.isfinite().all() and x.any() for x in gradients)


@pytest.mark.skipif(torch.cuda.is_available(), reason="--smoke is for machines without a GPU")
def test_a_smoke_run_goes_on_and_says_what_it_is(tmp_path, capsys):
    out = tmp_path / "forgetting.json"
    options = forgetting.EXPERIMENT.arguments(["--smoke", "--out", str(out)])
    assert forgetting.EXPERIMENT.run(options) == 0
    record = json.loads(out.read_text())
    parts = [row["part"] for row in record["rows"]]
    assert parts.count("recall") == 2 * len(forgetting.KINDS) and parts.count("speed") == 2
    assert all(row["status"] == "ok" and not row["measured"] for row in record["rows"])
    said = capsys.readouterr().out
    assert "NOT MEASURED" in said and "gated delta" in said and "length      64" in said
    before = [row["seconds"] for row in record["rows"]]
    assert forgetting.EXPERIMENT.run(forgetting.EXPERIMENT.arguments(["--smoke", "--out", str(out)])) == 0
    assert [row["seconds"] for row in json.loads(out.read_text())["rows"]] == before
