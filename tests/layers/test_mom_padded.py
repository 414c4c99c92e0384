"""Streams of a mixture side by side, filled up, or packed one after the other: the same outputs and states."""

from __future__ import annotations

import torch

from dn_lib.layers import LayerCache, MixtureOfMemories
from dn_lib.layers.documents import Documents
from dn_lib.layers.mom import _better_padded
from dn_lib.testing import relative_error

# Sums of a few hundred terms: 1e-12 leaves float64 (eps 2e-16) three digits to lose.
EXACT = 1e-12


def streams(*lengths: int) -> Documents:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return Documents(offsets, torch.zeros(1, int(offsets[-1])))


def test_a_long_stream_among_short_ones_stays_packed():
    assert _better_padded(streams(5, 0, 7, 6), torch.device("cpu"))
    assert not _better_padded(streams(5, 0, 7, 6), torch.device("cuda"))
    assert not _better_padded(streams(0, 0), torch.device("cpu"))
    # 3 streams of 4 are 12 places for 4 rows; 5 of 4 are 20, more than four times the rows.
    assert _better_padded(streams(4, 0, 0), torch.device("cpu"))
    assert not _better_padded(streams(4, 0, 0, 0, 0), torch.device("cpu"))


def test_packed_and_filled_up_are_the_same():
    """One long document among single tokens goes through packed; each document by itself is filled up."""
    torch.manual_seed(0)
    layer = MixtureOfMemories(12, 2, memories=3, active=1).double()
    offsets = torch.tensor([0, 1, 2, 3, 3, 4, 5, 6, 46])
    x = torch.randn(1, 46, 12, dtype=torch.float64, requires_grad=True)
    # The shared memory of the last document alone has 40 of the 92 rows: 32 streams times 40 are more than 4 times 92.
    cache, weights = LayerCache(), torch.randn(1, 46, 12, dtype=torch.float64)
    y = layer(x, cache, cu_seqlens=offsets)
    parts, states = [], []
    for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        if a == b:
            states.append(torch.zeros_like(cache["state"][:4]))
            continue
        one = LayerCache()
        parts.append(layer(x[:, a:b], one, cu_seqlens=torch.tensor([0, b - a])))
        states.append(one["state"])
    alone = torch.cat(parts, dim=1)
    assert relative_error(y, alone) < EXACT
    assert relative_error(cache["state"], torch.cat(states)) < EXACT
    wanted = [x, layer.key.weight, layer.beta.weight, layer.key_conv.weight]
    for got, expected in zip(*(torch.autograd.grad(o, wanted, weights) for o in (y, alone)), strict=True):
        assert relative_error(got, expected) < EXACT


def test_the_filling_leaves_states_as_they_were():
    """Tokens that come in three calls, streams of other lengths in each, end in the states of one call."""
    torch.manual_seed(1)
    layer = MixtureOfMemories(12, 2).double()
    x, whole, pieces = torch.randn(2, 33, 12, dtype=torch.float64), LayerCache(), LayerCache()
    with torch.no_grad():
        y = layer(x, whole)
        parts = [layer(x[:, a:b], pieces) for a, b in ((0, 11), (11, 13), (13, 33))]
    assert relative_error(torch.cat(parts, dim=1), y) < EXACT
    assert relative_error(pieces["state"], whole["state"]) < EXACT
