"""The experiment on states in 8 bits, in small."""

from __future__ import annotations

import json

import torch

from dn_lib.forms.serving import dequantise_state, quantise_state
from experiments.studies import distribution


def test_a_third_is_kept_and_two_are_rounded_in_their_ways():
    state = torch.randn(6, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    got = distribution.store(state, torch.Generator().manual_seed(1))
    assert torch.equal(got[:2], state[:2])
    assert torch.equal(got[2:4], dequantise_state(*quantise_state(state[2:4])))
    scales = quantise_state(state[4:])[1]
    off = (got[4:] - state[4:]).abs()
    assert (off <= 1.0001 * scales).all() and (off > 0.5001 * scales).any()  # not to the nearest


def test_it_runs_in_small_and_rounding_is_seen(tmp_path, capsys):
    path = tmp_path / "distribution.json"
    assert distribution.EXPERIMENT.start(["--smoke", "--out", str(path)]) == 0
    assert "NOT MEASURED: smoke run" in capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert [row["mixer"] for row in rows] == list(distribution.MIXERS)
    for row in rows:
        assert row["status"] == "ok"
        bits = row["bits_per_byte"]
        assert set(bits) == set(distribution.WAYS) and all(len(x) == 4 for x in bits.values())
        assert bits["nearest"] != bits["as it is"]
        assert 0 < row["state_error"]["nearest"] < 0.2
