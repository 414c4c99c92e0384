"""The project of chapter 5: a wrapper that launches kernels is watched where they are interpreted."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import jupytext
import pytest
import torch

pytest.importorskip("triton")

from dn_lib.kernels import ladder
from dn_lib.teaching import evaluate
from dn_lib.teaching.exercises.ch5 import launched

PAGE = Path(__file__).resolve().parents[2] / "book" / "solutions" / "05_triton_kernel.md"
interpreted = pytest.mark.skipif(not ladder.interpreted(), reason="kernels are compiled here")


@pytest.fixture(scope="module")
def solution(tmp_path_factory):
    """The text of the page's three last kernels and wrapper, and what makes a function of it."""
    cells = [cell.source for cell in jupytext.read(PAGE, fmt="md:myst").cells if cell.cell_type == "code"]
    parts = [next(c for c in cells if f"def {name}(" in c) for name in ("all_inverses", "scan", "my_delta_rule")]
    head = "import torch\nimport triton\nimport triton.language as tl\n\n"
    text = head + "\n\n".join(re.sub(r"(?m)^check\(.*\n?", "", part) for part in parts)
    count = iter(range(100))

    def made(*exchanges):
        source = text
        for old, new in exchanges:
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        folder = tmp_path_factory.mktemp("project")
        path = folder / f"project_{next(count)}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.my_delta_rule

    return made


def test_the_solution_is_right(solution):
    assert evaluate("5.13", launched(solution())).status == "right"


@interpreted
@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("triton.cdiv(L, 16), B * H", "L // 16, B * H", "NaN first at"),
        ("scan[(B * H,)]", "scan[(B * H + 1,)]", "would load"),
        ("scan[(B * H,)]", "scan[B * H]", "a grid is a tuple"),
        ("d**-0.5", "1.0", "scale is missing"),
        ("d**-0.5", "blocks['D']**-0.5", "made of the block's width"),
        ("return o, state", "return o, state.mT.contiguous()", "state is transposed"),
        (
            "    all_inverses[(triton.cdiv(L, 16), B * H)](k, beta, n, L, H, d, **blocks)\n",
            "    n.zero_()\n",
            "n holds zeros",
        ),
        ("    return o, state\n", "", "it ends without a `return`"),
        ("return o, state", "return o", "Asked for are 2: o and state"),
    ],
)
def test_what_is_said_of_wrong_wrappers(solution, old, new, says):
    verdict = evaluate("5.13", launched(solution((old, new))))
    assert verdict.status != "right" and says in verdict.message, verdict.message


def test_kernels_of_the_package_and_no_kernels_are_told():
    def borrowed(q, k, v, beta):
        return ladder.delta_rule_in_one(q, k, v, beta)

    def in_pytorch(q, k, v, beta):
        return torch.zeros_like(v), torch.zeros(2, 3, q.shape[3], q.shape[3])

    if ladder.interpreted():
        assert "is a kernel of the package" in evaluate("5.13", launched(borrowed)).message
        assert "no kernel was launched" in evaluate("5.13", launched(in_pytorch)).message


def test_a_blank_is_not_attempted():
    def blank(q, k, v, beta):
        """Nothing yet."""
        ...

    assert evaluate("5.13", launched(blank)).status == "not attempted"


def test_settings_of_torch_are_left_as_they_were():
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    with pytest.raises(ZeroDivisionError):
        launched(lambda x: 1 / 0)(torch.zeros(1))
    assert before == (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)
