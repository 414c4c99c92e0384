"""Measures of a language model: bits per byte, loss by position, loss at repeated names, parsing samples."""

from __future__ import annotations

import ast
import keyword
import math
import re
from collections.abc import Generator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dn_lib.data import Corpus, DataError
from dn_lib.data.tokens import SEPARATOR
from dn_lib.forms.common import check_integer


def windows(tokens: np.ndarray, length: int, limit: int | None = None) -> torch.Tensor:
    """Windows that follow each other, int64 `[n, length + 1]`; neighbours share one token, so that every
    token but the first is predicted once.  At most `limit` tokens are predicted (but one window at least).
    They are spread evenly over `tokens` if that is longer.

    Raises DataError if `tokens` is shorter than a window, or `length` below 1.

    >>> windows(np.arange(9), length=4).tolist()
    [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    """
    if length < 1:
        raise DataError(f"length must be at least 1, got {length}")
    count = (len(tokens) - 1) // length
    if count < 1:
        raise DataError(
            f"length must be below the number of validation tokens, {len(tokens)}, got {length}: "
            "use a shorter context or a larger corpus"
        )
    chosen = range(count)
    if limit and limit // length < count:
        wanted = max(limit // length, 1)
        chosen = [i * count // wanted for i in range(wanted)]
    rows = [tokens[i * length : (i + 1) * length + 1] for i in chosen]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


@torch.no_grad()
def token_losses(model: nn.Module, tokens: torch.Tensor, *, batch: int = 8, precision: str = "auto") -> torch.Tensor:
    """Loss in nats of every predicted token.

    tokens: int64 `[n, L + 1]`.  Returns float32 `[n, L]` on the CPU: `[i, t]` is -log p(token t + 1).
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    losses = []
    for part in tokens.split(batch):
        part = part.to(device)
        with autocast(device, precision):
            logits = model(part[:, :-1])
        flat = F.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        losses.append(flat.view(part.shape[0], -1).cpu())
    model.train(was_training)
    return torch.cat(losses)


def bits_per_byte(loss: float | torch.Tensor, bytes_per_token: float = 1.0) -> float:
    """Nats per token to bits per byte (eq-bits-per-byte).

    >>> bits_per_byte(math.log(256))
    8.0
    """
    return float(loss) / (math.log(2) * bytes_per_token)


def evaluate(
    model: nn.Module, corpus: Corpus, *, length: int, limit: int | None = None, batch: int = 8, **options
) -> dict[str, float]:
    """Loss in nats per token and in bits per byte on the validation part, context `length`."""
    loss = token_losses(model, windows(corpus.validation, length, limit), batch=batch, **options)
    mean = loss.double().mean().item()
    return {"loss": mean, "bits_per_byte": bits_per_byte(mean, corpus.bytes_per_token)}


def loss_by_position(loss: torch.Tensor, bins: int = 16) -> tuple[list[float], list[float]]:
    """Mean loss by position in the context: (last position of each bin, mean loss in it).

    loss: `[n, L]` from `token_losses`.  Bins double in width, for the loss falls fastest at the start, and
    number at most L.

    >>> loss_by_position(torch.tensor([[4.0, 2.0, 1.0, 1.0]]), bins=3)
    ([1.0, 2.0, 4.0], [4.0, 2.0, 1.0])
    """
    check_integer("bins", bins)
    length = loss.shape[1]
    bins = min(bins, length)
    edges = sorted({max(1, round(length ** (i / max(bins - 1, 1)))) for i in range(bins)} | {length})
    starts = [0, *edges[:-1]]
    means = [loss[:, a:b].mean().item() for a, b in zip(starts, edges, strict=True)]
    return [float(edge) for edge in edges], means


def document_windows(tokens: np.ndarray, length: int, limit: int = 64) -> torch.Tensor:
    """The beginnings of up to `limit` documents, int64 `[n, length + 1]`, separator first.

    Documents shorter than a window are left out.  Raises DataError if none is long enough.
    """
    starts = np.flatnonzero(np.asarray(tokens) == SEPARATOR)
    ends = np.append(starts[1:], len(tokens))
    starts = starts[ends - starts > length][:limit]
    if len(starts) == 0:
        raise DataError(f"length must be below that of some validation document, got {length}")
    return torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64))


Span = tuple[int, int]


# A comment, the beginning of a string, a name, a number, or a mark that may end a field of an f-string.
_TOKEN = re.compile(
    rb"""\#[^\n]*
    | (?P<prefix>[bfrtu]?|[bft]r|r[bft])(?P<quotes>'{3}|"{3}|'|")
    | (?P<name>[a-z_\x80-\xff][\w\x80-\xff]*)
    | \.?[0-9][\w.]*
    | (?P<mark>[]()[{}:])""",
    re.VERBOSE | re.IGNORECASE,
)


def _names(text: bytes, place: int = 0, in_field: bool = False) -> Generator[Span, None, int]:
    """Spans of the names (keywords too) in the code that begins at `place`; returns the place behind that code.

    Python's own `tokenize` would not do: from version to version it finds other names in f-strings.
    """
    depth = 0
    while found := _TOKEN.search(text, place):
        place, mark = found.end(), found["mark"]
        if found["name"]:
            yield found.span("name")
        elif found["quotes"]:
            place = yield from _names_in_string(text, place, found["quotes"], found["prefix"].lower())
        elif mark and in_field:
            if depth == 0 and mark == b"}":
                return place
            if depth == 0 and mark == b":":
                return (yield from _names_in_string(text, place, b"}", b"f"))
            depth += (mark in b"([{") - (mark in b")]}")
    return len(text)


def _names_in_string(text: bytes, place: int, end: bytes, prefix: bytes) -> Generator[Span, None, int]:
    """The same for a string of this prefix, or the format of a field, that goes on to `end`.

    Only f-strings and t-strings hold names, in their fields.  A string that is not closed ends the code.
    """
    parts = [re.escape(end)] if len(end) == 3 else [re.escape(end), rb"\n"]
    if not {*b"ft"} & {*prefix}:
        parts.append(rb"\\.")
    elif end == b"}":
        parts.append(rb"\{")
    else:
        parts += ([] if b"r" in prefix else [rb"\\N\{"]) + [rb"\{\{", rb"\\[^{]", rb"\{"]
    part = re.compile(rb"|".join(parts), re.DOTALL)
    while found := part.search(text, place):
        place = found.end()
        if found[0] == end:
            return place
        if found[0] == b"{":
            place = yield from _names(text, place, in_field=True)
        elif found[0] == b"\n":
            break
    return len(text)


def name_occurrences(text: bytes) -> tuple[list[Span], list[Span]]:
    """Where names stand in Python source: (first occurrences, later ones), each (begin, end) in bytes.

    Keywords and names of fewer than four characters are left out; names in the fields of f-strings count.
    `text` may break off anywhere.

    >>> name_occurrences(b"total = 0\\nprint(total)\\n")
    ([(0, 5), (10, 15)], [(16, 21)])
    >>> name_occurrences(b"f'total {total:>{width}}'")
    ([(9, 14), (17, 22)], [])
    """
    seen: set[bytes] = set()
    first, later = [], []
    for begin, end in _names(text):
        name = text[begin:end]
        if len(name) >= 4 and not keyword.iskeyword(name.decode("latin-1")):
            (later if name in seen else first).append((begin, end))
            seen.add(name)
    return first, later


def loss_at_names(model: nn.Module, tokens: torch.Tensor, **options) -> dict[str, float]:
    """Mean loss (nats per byte) at the first occurrence of names and at later ones, byte tokens only.

    tokens: from `document_windows`.  A model that recalls pays less at later occurrences.
    """
    loss = token_losses(model, tokens, **options)
    totals = {"first": [0.0, 0], "later": [0.0, 0]}
    for row, values in zip(tokens, loss, strict=True):
        found = name_occurrences(bytes(row[1:].tolist()))  # row[0] is the separator
        for key, spans in zip(totals, found, strict=True):
            for begin, end in spans:  # byte i of the text is token i + 1, predicted at place i
                totals[key][0] += values[begin:end].sum().item()
                totals[key][1] += len(values[begin:end])
    return {key: total / max(count, 1) for key, (total, count) in totals.items()}


def parses(source: str) -> bool:
    """Whether `source`, less its last and perhaps unfinished line, is Python.

    >>> parses("x = 1\\nprint(x"), parses("x = = 1\\ny")
    (True, False)
    """
    whole_lines = source[: source.rfind("\n") + 1]
    try:
        ast.parse(whole_lines)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return bool(whole_lines.strip())


def autocast(device: torch.device, precision: str = "auto"):
    """The autocast context of `precision`: bfloat16 on a GPU with "auto", none for "float32"."""
    wanted = precision_in_use(device, precision) == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted)


def precision_in_use(device: torch.device, precision: str) -> str:
    """What `precision` means on `device`: "bfloat16" or "float32"."""
    if precision == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return precision
