"""Stored results: where one came from, and whether the code that it describes has changed since.

A file in `book/results` holds, in its provenance, a digest of every source file of the package (`sources`). `DESCRIBES`
says which of them a result speaks about. It is *current* while all of these have the same digest today, and *older*
otherwise; also where it has no digests at all, as results from before they were kept. Comments, docstrings and blank
lines are left out of a digest: they change no number.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import json
import textwrap
import tokenize
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any] | None
WIDTH = 96  # columns of a line that the site shows without a scroll bar

PACKAGE = Path(__file__).parents[1]
COVERED = ("forms", "kernels", "ops", "parallel", "layers", "models", "training", "data")
"""The folders of the package whose sources are kept; the rest computes nothing that is measured."""

OPERATOR = (  # the delta rule's; those with gates and the signatures of fla are beside it
    "ops/autograd.py", "ops/backend.py", "ops/checks.py", "ops/delta.py", "ops/planning.py", "kernels/common.py",
    "kernels/inverse.py", "kernels/plan.py", "kernels/rules.py", "kernels/launcher.py", "kernels/playback.py",
    "kernels/arguments.py", "kernels/delta_rule/", "kernels/hopper/",
)  # fmt: skip
FAMILY = (*OPERATOR, "ops/", "kernels/gla/")
MODEL = (*FAMILY, "layers/", "models/config.py", "models/language_model.py")
TRAINING = (
    *MODEL, "training/loop.py", "training/optimiser.py", "training/evaluate.py", "data/batches.py", "data/corpus.py",
)  # fmt: skip
DESCRIBES: dict[str, tuple[str, ...]] = {
    "ablations": (  # on a CPU, without a kernel
        "forms/common.py",
        "forms/chunkwise.py",
        "forms/linear_attention.py",
        "layers/delta_net.py",
        "layers/linear_attention.py",
        "layers/attention.py",
        "layers/recurrent.py",
        "layers/common.py",
        "layers/short_convolution.py",
        "layers/rotary.py",
        "models/config.py",
        "models/language_model.py",
        "data/recall.py",
    ),
    "attention_training": TRAINING,
    "bpe_training": (*TRAINING, "data/tokens.py"),
    "chapter_times": ("forms/", "kernels/", "ops/", "layers/", "models/", "training/", "data/"),
    "comparison": (*TRAINING, "data/recall.py"),
    "delta_training": TRAINING,
    "error_microscope": (*OPERATOR, "kernels/ladder.py", "forms/householder.py"),
    "errors": ("forms/", *FAMILY),
    "errors_gated": ("forms/", *FAMILY),
    "every_form": ("forms/", "kernels/", "ops/"),
    "flash_qla": OPERATOR,
    "flash_qla_gated": FAMILY,
    "flash_qla_strong": FAMILY,
    "fla_conversion": (*MODEL, "models/convert.py"),
    "hybrid_training": TRAINING,
    "ladder": (*OPERATOR, "kernels/ladder.py", "kernels/rungs.py"),
    "mqar": (*MODEL, "data/recall.py"),
    "operator": OPERATOR,
    "paper_figure": OPERATOR,
    "sanitizer": FAMILY,
    "segments": OPERATOR,
    "throughput": (*MODEL, "training/loop.py", "training/optimiser.py"),
    "tiles_sm90": OPERATOR,
    "two_gpus": (*TRAINING, "training/distributed.py", "parallel/affine.py"),
    "context_parallel": (*MODEL, "models/context_parallel.py", "parallel/"),
    "distribution": (*TRAINING, "forms/serving.py"),
    "expressiveness": (*MODEL, "forms/", "layers/mimetic.py", "data/recall.py"),
    "forgetting": (*MODEL, "kernels/gla/", "data/recall.py"),
    "memory": (*TRAINING, "models/liger.py", "models/lora.py", "data/recall.py"),
    "serving": ("forms/serving.py", "forms/gated.py", "forms/common.py"),
    "reproduce": (*MODEL, "data/recall.py", "data/mad.py", "data/automata.py", "data/state_tracking.py"),
}
"""The sources, from the package's root, that each result speaks about; a folder ends in a slash."""

OLDER = "measured with an older version of this code"


def code_only(source: str) -> str:
    """`source` without comments, docstrings, blank lines and what stands at the end of a line.

    >>> code_only('def f(x):\\n    "What it does."\\n\\n    return 2 * x  # twice\\n')
    'def f(x):\\n    return 2 * x'
    """
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                for row in range(first.lineno - 1, first.end_lineno or first.lineno):
                    lines[row] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


@functools.cache
def sources(package: Path = PACKAGE) -> dict[str, str]:
    """The digest of every source file in the folders of `COVERED`, by its path from `package`."""
    return {
        path.relative_to(package).as_posix(): hashlib.sha256(code_only(path.read_text("utf-8")).encode()).hexdigest()[
            :12
        ]
        for folder in COVERED
        for path in sorted((package / folder).rglob("*.py"))
    }


def described(name: str, among: Iterable[str]) -> set[str]:
    """Those of the paths `among` that the result `name` speaks about; all of them for a name that is not listed."""
    places = DESCRIBES.get(name)
    return {p for p in among if places is None or any(p == x or (x[-1] == "/" and p.startswith(x)) for x in places)}


def provenance_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The provenance in a result; of one that holds a part for each device, that of the GPU."""
    return record.get("gpu", record).get("provenance", {})


def changed(name: str, record: Mapping[str, Any], now: Mapping[str, str] | None = None) -> list[str] | None:
    """The source files that the result `name` speaks about and that are not what they were when it was measured.

    now: the digests of today, `sources()` if None. An empty list means that the result is current; None that it holds
    no digests, so that nobody knows.

    >>> changed("ladder", {"provenance": {"date": "2026-01-02"}}) is None
    True
    """
    now = sources() if now is None else now
    then = provenance_of(record).get("sources")
    if not isinstance(then, dict):
        return None
    return sorted(p for p in described(name, {*now, *then}) if now.get(p) != then.get(p))


def is_current(name: str, record: Mapping[str, Any], now: Mapping[str, str] | None = None) -> bool:
    """Whether the result `name` was measured with the code that is here."""
    return changed(name, record, now) == []


def stored(name: str, folder: Path | None = None) -> Record:
    """The result `book/results/<name>.json`, or None: upwards from `folder`, by default the working directory.

    From there the package's own copy is taken where there is no other: a wheel has one.

    >>> stored("no such result") is None
    True
    """
    start = (folder or Path.cwd()).resolve()
    folders = [start, *start.parents] + ([] if folder else [PACKAGE, PACKAGE.parent])
    places = [place / f"book/results/{name}.json" for place in folders]
    return next((json.loads(place.read_text("utf-8")) for place in places if place.exists()), None)


def origin(**records: Record) -> str:
    """For each result by its name: on which device, when and at which commit it was measured; and whether the code that
    it describes has changed since.  No line is longer than code in the book may be; what is left of one is indented.

    >>> print(origin(ladder=None))
    ladder: not measured yet; `python -m experiments --list` says what measures it on a GPU
    """
    lines = list[str]()
    for name, record in records.items():
        if record is None:
            lines.append(f"{name}: not measured yet; `python -m experiments --list` says what measures it on a GPU")
            continue
        where = provenance_of(record)
        versions = ", ".join(f"{package} {where[package]}" for package in ("torch", "triton") if package in where)
        when = f"{where['date'][:10]}, commit {where['git_commit'][:7]}"
        mark = "" if is_current(name, record) else f" ({OLDER})"
        line = f"{name}: {where['device']}, {when}{', ' + versions if versions else ''}{mark}"
        lines += textwrap.wrap(line, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)
