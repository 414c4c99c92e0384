"""Questions to a trained model about recall: names that it cannot have learned, and pairs that it was just shown."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dn_lib.data.tokens import SEPARATOR
from dn_lib.forms.common import check_integer
from dn_lib.training.evaluate import autocast, name_occurrences, token_losses

WORD = re.compile(rb"[A-Za-z_\x80-\xff][\w\x80-\xff]{3,}")
PIECE = 1 << 24  # bytes of a text that are searched at a time


def words_of(tokens: np.ndarray) -> set[bytes]:
    """Every word of at least four characters in a text of byte tokens `[n]`: whatever Python could take for a name.

    >>> sorted(words_of(np.frombuffer(b"total = 2 * size_of(it)", dtype=np.uint8)))
    [b'size_of', b'total']
    """
    found: set[bytes] = set()
    start = 0
    while start < len(tokens):
        piece = bytes(tokens[start : start + PIECE])
        if start + len(piece) < len(tokens):  # not to cut a word: it ends with the last separator of the piece
            whole = max(piece.rfind(b"\n"), piece.rfind(b" "), piece.rfind(b"\0")) + 1
            piece = piece[: whole or len(piece)]
        found.update(WORD.findall(piece))
        start += len(piece)
    return found


def loss_at_unseen_names(model: nn.Module, tokens: Tensor, known: Container[bytes], **options) -> dict[str, float]:
    """Loss in nats per byte at names that are not among the `known` words and occur at least twice in their row.

    tokens: int64 `[n, L + 1]`, from `document_windows`; byte tokens only. Returns the means over the bytes of the
    `first` occurrences and of the `later` ones, of the same names; and how many `names` there were, and `first_bytes`
    and `later_bytes`. The means are NaN where there is no such name. `options` are those of `token_losses`.

    What was never in the training text cannot have been learned, so that the difference is recall: from this row alone.
    """
    loss = token_losses(model, tokens, **options)
    totals, counts, names = {"first": 0.0, "later": 0.0}, {"first": 0, "later": 0}, 0
    for row, values in zip(tokens, loss, strict=True):
        text = bytes(row[1:].tolist())  # row[0] is the separator
        first, later = name_occurrences(text)
        again = {text[begin:end] for begin, end in later}
        again = {name for name in again if name not in known}
        names += len(again)
        for key, spans in (("first", first), ("later", later)):
            for begin, end in spans:  # byte i of the text is token i + 1, predicted at place i
                if text[begin:end] in again:
                    totals[key] += values[begin:end].sum().item()
                    counts[key] += end - begin
    means = {key: total / counts[key] if counts[key] else float("nan") for key, total in totals.items()}
    return {**means, "names": names, **{f"{key}_bytes": count for key, count in counts.items()}}


DIGITS, LETTERS = 4, 4
LINE = LETTERS + DIGITS + 4  # bytes of "abcd = 1234\n"


def assignments(n: int, pairs: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """`n` texts that assign numbers to `pairs` random names, and then assign them again in another order.

    Returns (tokens, asked): int64 `[n, 1 + 24 pairs]`, byte tokens behind a separator, and a bool mask of the same
    shape, true at the digits of the second time, which the first time tells. Two names are the same with probability
    26^-4. Raises ValueError for `n` or `pairs` below 1.

    >>> tokens, asked = assignments(1, 2, torch.Generator().manual_seed(0))
    >>> tokens.shape, int(asked.sum())
    (torch.Size([1, 49]), 8)
    """
    check_integer("n", n)
    check_integer("pairs", pairs)
    names = torch.randint(26, (n, pairs, LETTERS), generator=generator) + ord("a")
    values = torch.randint(10, (n, pairs, DIGITS), generator=generator) + ord("0")
    equals, newline = (torch.tensor(list(text)).expand(n, pairs, -1) for text in (b" = ", b"\n"))
    lines = torch.cat([names, equals, values, newline], dim=2)  # [n, pairs, LINE]
    order = torch.rand(n, pairs, generator=generator).argsort(1)
    again = lines.gather(1, order[..., None].expand(-1, -1, LINE))
    separator = torch.full((n, 1), SEPARATOR)
    tokens = torch.cat([separator, lines.flatten(1), again.flatten(1)], dim=1)
    asked = torch.zeros(n, 2, pairs, LINE, dtype=torch.bool)
    asked[:, 1, :, LETTERS + 3 : LETTERS + 3 + DIGITS] = True
    return tokens, torch.cat([torch.zeros(n, 1, dtype=torch.bool), asked.flatten(1)], dim=1)


@torch.no_grad()
def recall_of_assignments(
    model: nn.Module,
    pairs: Sequence[int] = (4, 8, 16, 32),
    *,
    n: int = 64,
    seed: int = 0,
    batch: int = 8,
    precision: str = "auto",
) -> dict[int, dict[str, float]]:
    """Of the texts of `assignments`, how much of the second half a model knows: for each number of pairs the share of
    `digits`, and of whole `values`, that are the most likely next bytes. A model that cannot recall gets a tenth of the
    digits. It was trained for none of this: what it gets, it gets from its context. Byte tokens only.
    """
    device, found = next(model.parameters()).device, {}
    training = model.training
    model.eval()
    for count in pairs:
        tokens, asked = assignments(n, count, torch.Generator().manual_seed(seed))
        right = []
        for part in tokens.split(batch):
            part = part.to(device)
            with autocast(device, precision):
                right.append((model(part[:, :-1]).argmax(-1) == part[:, 1:]).cpu())
        hits = torch.cat(right)[asked[:, 1:]].view(n, count, DIGITS)
        found[count] = {"digits": hits.float().mean().item(), "values": hits.all(-1).float().mean().item()}
    model.train(training)
    return found
