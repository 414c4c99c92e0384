"""Recall of a trained model: names that were never in its text, and pairs that it was just shown."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from dn_lib.training import assignments, loss_at_unseen_names, probes, recall_of_assignments, token_losses, words_of


class Copier(nn.Module):
    """Predicts that what stood `distance` tokens before the next one stands there again; else byte `other`."""

    def __init__(self, distance: int, other: int = 0):
        super().__init__()
        self.distance, self.other = distance, other
        self.gain = nn.Parameter(torch.tensor(10.0))

    def forward(self, tokens):
        shifted = torch.full_like(tokens, self.other)
        shifted[:, self.distance - 1 :] = tokens[:, : tokens.shape[1] - self.distance + 1]
        return self.gain * nn.functional.one_hot(shifted, 256).float()


class Looker(nn.Module):
    """Knows the assignments by looking: at a digit it finds the line of the same name, and goes on as that does."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(10.0))

    def forward(self, tokens):
        logits = torch.zeros(*tokens.shape, 256)
        for row, out in zip(tokens, logits, strict=True):
            text = bytes(row.tolist())
            for t in range(len(text)):
                found = re.search(rb"([a-z]{4} = [0-9]{0,3})$", text[: t + 1])
                if found:
                    place = text.find(found[1])
                    out[t, text[place + len(found[1])] if place < found.start() else 0] = 10.0
        return self.gain * logits


def bytes_of(text: bytes) -> torch.Tensor:
    return torch.tensor([list(b"\0" + text)])


def test_words_are_found_whole_wherever_a_piece_ends(monkeypatch):
    text = b"alpha = beta_2 + gamma\n\0no xy " + "größe = ".encode() + b"delta" * 3 + b"\n"
    wanted = {b"alpha", b"beta_2", b"gamma", "größe".encode(), b"delta" * 3}
    for piece in (1 << 24, 24, 16):
        monkeypatch.setattr(probes, "PIECE", piece)
        assert words_of(np.frombuffer(text, dtype=np.uint8)) == wanted
    assert words_of(np.zeros(0, dtype=np.uint8)) == set()


class TestUnseenNames:
    text = b"known = 1\nfresh = 2\nonce = known + fresh\nfresh\n"

    def test_means_are_over_the_bytes_of_the_same_names(self):
        tokens = bytes_of(self.text)
        model = Copier(20)
        found = loss_at_unseen_names(model, tokens, {b"known"})
        loss = token_losses(model, tokens)[0]
        places = [i.start() for i in re.finditer(b"fresh", self.text)]
        spans = [loss[i : i + 5] for i in places]
        assert len(places) == 3 and (found["names"], found["first_bytes"], found["later_bytes"]) == (1, 5, 10)
        assert found["first"] == pytest.approx(spans[0].mean().item())
        assert found["later"] == pytest.approx(torch.cat(spans[1:]).mean().item())

    def test_a_known_name_and_one_that_comes_once_do_not_count(self):
        found = loss_at_unseen_names(Copier(20), bytes_of(self.text), {b"known", b"fresh"})
        assert found["names"] == found["first_bytes"] == found["later_bytes"] == 0
        assert np.isnan(found["first"]) and np.isnan(found["later"])

    def test_what_recalls_pays_less_later(self):
        text = b"alpha = 1\n" * 2
        found = loss_at_unseen_names(Copier(10), bytes_of(text), set())
        assert found["later"] < 0.05 < 5 < found["first"]


class TestAssignments:
    def test_the_second_half_says_what_the_first_did(self):
        tokens, asked = assignments(3, 5, torch.Generator().manual_seed(1))
        for row, mask in zip(tokens, asked, strict=True):
            text = bytes(row.tolist())
            assert text[:1] == b"\0"
            lines = text[1:].splitlines()
            assert len(lines) == 10 and all(re.fullmatch(rb"[a-z]{4} = [0-9]{4}", line) for line in lines)
            assert sorted(lines[:5]) == sorted(lines[5:]) and lines[:5] != lines[5:]
            digits = bytes(row[mask].tolist())
            assert digits == b"".join(line[-4:] for line in lines[5:])

    def test_who_looks_knows_all_and_who_guesses_a_tenth(self):
        assert recall_of_assignments(Looker(), (2, 4), n=4) == {
            2: {"digits": 1.0, "values": 1.0},
            4: {"digits": 1.0, "values": 1.0},
        }
        guess = recall_of_assignments(Copier(10**6, ord("7")), (16,), n=64)[16]
        # 4,096 digits of a chance of 0.1 each: four standard errors are 0.019.
        assert guess["digits"] == pytest.approx(0.1, abs=0.019) and guess["values"] < 0.01

    def test_the_model_is_left_as_it_was(self):
        model = Copier(24).train()
        recall_of_assignments(model, (1,), n=2)
        assert model.training

    @pytest.mark.parametrize(("n", "pairs", "name"), [(0, 1, "n"), (1, 0, "pairs"), (1, 1.5, "pairs")])
    def test_counts_are_checked(self, n, pairs, name):
        with pytest.raises((TypeError, ValueError), match=name):
            assignments(n, pairs)
