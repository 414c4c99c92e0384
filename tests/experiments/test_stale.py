"""Results that are older than the code that they describe: named by `--stale`, marked in chapters that cite them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dn_lib.teaching import results
from dn_lib.teaching.figures import ch6
from dn_lib.teaching.results import (
    COVERED,
    DESCRIBES,
    OLDER,
    changed,
    code_only,
    described,
    is_current,
    origin,
    sources,
)

pytest.importorskip("triton")

from experiments.harness import cli
from experiments.harness.provenance import RESULTS, ROOT, provenance
from experiments.harness.results import Results

BOOK = ROOT / "book"
ABOUT = {"device": "some GPU", "date": "2026-01-02T03:04", "git_commit": "abcdef012"}


def record(**changes: str) -> dict:
    """A result of today, but that some sources had other digests when it was measured."""
    return {"provenance": {**ABOUT, "sources": sources() | changes}}


# --- Digests -----------------------------------------------------------------------------------------------------


def test_a_digest_covers_code_and_nothing_else():
    one = '"""About."""\nimport os  # why\n\n\ndef f(x):\n    """What."""\n    # how\n    return "# no comment"\n'
    assert code_only(one) == 'import os\ndef f(x):\n    return "# no comment"'
    two = one.replace("About", "Of").replace("What", "More\n    lines").replace("# how", "# so")
    assert code_only(two) == code_only(one)
    assert code_only(one.replace("return", "return 2 *")) != code_only(one)
    assert code_only('class A:\n    x = """text"""\n') != code_only('class A:\n    x = """other"""\n')


def test_every_source_has_one_and_a_change_is_seen(tmp_path):
    for path in ("kernels/delta_rule/forward.py", "ops/delta.py", "layers/delta_net.py", "training/loop.py"):
        assert path in sources()
    assert {path.split("/")[0] for path in sources()} == set(COVERED)
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "a.py").write_text("x = 1\n")
    before = sources(tmp_path)
    (tmp_path / "ops" / "a.py").write_text("x = 2  # other\n")
    sources.cache_clear()
    assert set(before) == {"ops/a.py"} and sources(tmp_path) != before


def test_what_is_described_is_there_and_no_result_is_without_it():
    """A path that no longer exists would make every result of its kind silently blind to it."""
    for name, places in DESCRIBES.items():
        for place in places:
            assert described(name, sources()) and any(p == place or p.startswith(place) for p in sources()), place
    written = {file.removesuffix(".json") for e in cli.catalogue() for file in e.writes}
    assert set(DESCRIBES) <= written  # one that is not listed describes every source


def test_a_result_is_older_when_what_it_describes_has_changed_and_only_then():
    assert is_current("ladder", record()) and changed("ladder", record()) == []
    kernel = "kernels/delta_rule/forward.py"
    assert changed("ladder", record(**{kernel: "0"})) == [kernel]
    assert is_current("ladder", record(**{"training/loop.py": "0"}))
    assert changed("ladder", record(**{"kernels/delta_rule/gone.py": "0"})) == ["kernels/delta_rule/gone.py"]
    assert changed("comparison", record(**{"training/loop.py": "0"})) == ["training/loop.py"]
    assert changed("of somebody", record(**{"forms/common.py": "0"})) == ["forms/common.py"]  # not listed: all of them
    assert changed("ladder", {"provenance": ABOUT}) is None and not is_current("ladder", {"provenance": ABOUT})
    new = dict(sources()) | {"kernels/delta_rule/new.py": "1"}
    assert changed("ladder", record(), new) == ["kernels/delta_rule/new.py"]


def test_origin_marks_what_is_older():
    line = "ladder: some GPU, 2026-01-02, commit abcdef0"
    assert origin(ladder=record()) == line
    assert origin(ladder={"provenance": ABOUT}) == f"{line} ({OLDER})"
    assert origin(ladder=record(**{"kernels/ladder.py": "0"})) == f"{line} ({OLDER})"
    assert origin(gpu={"gpu": {"provenance": ABOUT}}).endswith(f"({OLDER})")


def test_a_long_origin_goes_on_in_a_line_of_its_own():
    versions = {"torch": "2.11.0+cu130", "triton": "3.6.0"}
    text = origin(ladder={"provenance": ABOUT | versions}, operator=record())
    first, second, other = text.splitlines()
    assert second.startswith("    ") and other.startswith("operator: some GPU")
    assert " ".join(f"{first} {second}".split()) == (
        f"ladder: some GPU, 2026-01-02, commit abcdef0, torch 2.11.0+cu130, triton 3.6.0 ({OLDER})"
    )
    assert max(map(len, text.splitlines())) <= 96


def test_provenance_holds_the_digests():
    assert provenance()["sources"] == sources()


def test_rows_are_kept_while_the_code_and_the_settings_are_the_same(tmp_path):
    out = tmp_path / "ladder.json"

    def again(settings: dict, **changes: str) -> int:
        """Rows kept of a file that another commit has written, with `changes` in its digests."""
        first = Results(out, {"size": 1}, smoke=True)
        first.origin["git_commit"] = "other"
        first.rows = []
        first.measure("a", dict)
        text = json.loads(out.read_text())
        text["provenance"]["sources"] |= changes
        out.write_text(json.dumps(text))
        return len(Results(out, settings, smoke=True).rows)

    assert again({"size": 1}) == 1 and again({"size": 1, "budget": 5.0}) == 1
    assert again({"size": 2}) == 0
    assert again({"size": 1}, **{"kernels/ladder.py": "0"}) == 0
    assert again({"size": 1}, **{"training/loop.py": "0"}) == 1
    mixed = Results(out, {"size": 1}, smoke=True)
    assert mixed.provenance["sources"]["training/loop.py"] == "several"
    assert mixed.provenance["sources"]["kernels/ladder.py"] == sources()["kernels/ladder.py"]


# --- `--stale` ---------------------------------------------------------------------------------------------------


def test_stale_names_the_file_the_reason_and_the_remedy(tmp_path, capsys):
    kernel = "kernels/delta_rule/forward.py"
    for name, content in {
        "ladder": record(),
        "operator": record(**{kernel: "0"}),
        "errors": {"provenance": ABOUT},
        "hybrid_training": record(**{f"layers/{n}.py": "0" for n in "abcd"}),
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = cli.stale(tmp_path)
    assert found == {
        "errors.json": "it holds no digests of the sources",
        "hybrid_training.json": "changed since: layers/a.py, layers/b.py, layers/c.py and 1 more",
        "operator.json": f"changed since: {kernel}",
    }
    text, code = cli.stale_listing(tmp_path)
    assert code == 1 and text.endswith("3 of 4 results are older than the code that they describe")
    assert "operator.json: changed since" in text and "    python -m experiments side_by_side\n" in text
    assert "--kind hybrid" in text and "--out book/results/hybrid_training.json" in text
    for name in ("operator", "errors", "hybrid_training"):
        (tmp_path / f"{name}.json").unlink()
    assert cli.stale_listing(tmp_path) == ("0 of 1 results are older than the code that they describe", 0)


# --- Chapters ----------------------------------------------------------------------------------------------------


READERS = {"ch6.runs(": set(ch6.FILES.values()), "ch2.mqar_record(": {"mqar"}}  # what a function reads unasked


def cited(chapter: str) -> set[str]:
    """The results that a chapter names: in a string of its code, as a file, or by a function that reads it."""
    names = {path.stem for path in RESULTS.glob("*.json")}
    found = {name for name in names if re.search(rf'"{name}"|\b{name}\.json\b', chapter)}
    return found.union(*(read for call, read in READERS.items() if call in chapter)) & names


def shown(pair: Path) -> str:
    """All text that a chapter's executed pair shows: its prose and the outputs of its cells."""
    parts = []
    for cell in json.loads(pair.read_text("utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            parts.append("".join(cell["source"]))
        for output in cell.get("outputs", []):
            text = output.get("text", output.get("data", {}).get("text/plain", ""))
            parts.append("".join(text))
    return "\n".join(parts)


def unmarked(cites: set[str], text: str, folder: Path = RESULTS) -> list[str]:
    """Of the results that are cited, those that `text` does not call what they are, current or older."""
    wrong = []
    text = text.replace("\n    ", " ")  # what is left of a long line
    for name in sorted(cites):
        current = is_current(name, json.loads((folder / f"{name}.json").read_text("utf-8")))
        lines = [line for line in text.splitlines() if line.startswith(f"{name}: ")]
        if not lines or any((OLDER in line) == current for line in lines):
            wrong.append(f"{name} is {'current' if current else 'older'}, the chapter says {lines or 'nothing'}")
    return wrong


CITING = {
    path.stem: cites for path in sorted(BOOK.rglob("[0-9A-Z]*_*.md")) if (cites := cited(path.read_text("utf-8")))
}


def test_chapters_that_cite_are_found():
    assert {"05_triton_kernel", "06_training", "A_measuring", "B_rounding", "C_hopper"} <= set(CITING)
    assert CITING["05_triton_kernel"] == {"ladder", "operator"} and "mqar" in CITING["02_delta_rule"]
    assert {"hybrid_training", "throughput", "two_gpus"} <= CITING["06_training"]


@pytest.mark.parametrize("chapter", CITING)
def test_a_chapter_says_of_each_result_that_it_cites_whether_it_is_older(chapter):
    """`origin` prints a line for each; if this fails, execute the chapter anew, or measure the result anew."""
    assert unmarked(CITING[chapter], shown(BOOK / "notebooks" / f"{chapter}.ipynb")) == []


def test_an_older_result_that_is_not_marked_is_found(tmp_path):
    (tmp_path / "ladder.json").write_text(json.dumps({"provenance": ABOUT}))
    (tmp_path / "operator.json").write_text(json.dumps(record()))
    both, now = {"ladder", "operator"}, "operator: some GPU"
    assert unmarked(both, f"ladder: some GPU ({OLDER})\n{now}", tmp_path) == []
    assert len(unmarked(both, f"ladder: some GPU\n{now}", tmp_path)) == 1  # older, and not called so
    assert len(unmarked(both, now, tmp_path)) == 1  # cited, and not a word
    assert len(unmarked(both, f"ladder: some GPU ({OLDER})\n{now} ({OLDER})", tmp_path)) == 1  # measured anew since
    assert cited('x = stored("ladder")') == {"ladder"} and cited("as `book/results/errors.json` says") == {"errors"}


def test_the_package_and_the_experiments_agree_on_where_results_are():
    assert results.stored("operator", ROOT) == json.loads((RESULTS / "operator.json").read_text("utf-8"))
