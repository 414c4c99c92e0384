"""No letter of a figure is too small: for a printed page, and for a phone, where a point of a figure is a pixel."""

from __future__ import annotations

import ast
import importlib
from io import BytesIO
from pathlib import Path

import jupytext
import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.teaching import plotting
from dn_lib.teaching.figures import appendix, ch1, ch2, ch3, ch4, ch5
from dn_lib.teaching.results import stored
from tools.lowering import Book

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "dn_lib" / "teaching" / "figures"
MODULES = [*(ROOT / "dn_lib" / "teaching" / name for name in ("plotting.py", "pictures.py")), *FIGURES.rglob("*.py")]
PAGES = Book(ROOT / "book").pages
SIZES = {"fontsize", "labelsize", "size", "title_fontsize", "titlesize", "legend_fontsize"}
RELATIVE = {"x-small", "xx-small", "smaller", "small"}  # "small" of the style's 11 points would pass, of 10 not


@pytest.fixture(autouse=True)
def own_style():
    with plt.rc_context():
        plotting.use_style()
        yield
    plt.close("all")


def too_small(source: str) -> list[str]:
    """Every size of text in `source` that is below the smallest, as code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        pairs: list[tuple[str, ast.expr]] = []
        if isinstance(node, ast.Call):
            pairs += [(keyword.arg or "", keyword.value) for keyword in node.keywords]
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            pairs += [("fontsize", value) for value in node.args if name in ("set_fontsize", "set_size")]
        elif isinstance(node, ast.Dict):  # of options, and of the style
            keys = [key.value if isinstance(key, ast.Constant) else "" for key in node.keys]
            pairs += [(str(key).rpartition(".")[2], value) for key, value in zip(keys, node.values, strict=True)]
        elif isinstance(node, ast.FunctionDef):
            named = [*node.args.posonlyargs, *node.args.args]
            pairs += [(a.arg, d) for a, d in zip(named[::-1], node.args.defaults[::-1], strict=False)]
        for name, value in pairs:
            if name in SIZES and isinstance(value, ast.Constant):
                size = value.value
                if size in RELATIVE or (isinstance(size, int | float) and size < plotting.SMALLEST):
                    found.append(f"{name}={size!r} in line {value.lineno}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_drawing_asks_for_small_letters(path):
    assert not too_small(path.read_text("utf-8"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_no_cell_asks_for_small_letters(path):
    for cell in jupytext.read(path, fmt="md:myst").cells:
        if cell.cell_type == "code":
            assert not too_small(cell.source), cell.source


@pytest.mark.parametrize(
    "line",
    [
        "ax.text(0, 0, 'x', fontsize={})",
        "def f(ax, text, size={}): ...",
        "label.set_fontsize({})",
        "options = {{'labelsize': {}}}",
        "STYLE = {{'xtick.labelsize': {}}}",
    ],
)
def test_small_letters_are_found_however_they_are_asked_for(line):
    for size, found in (("8", 1), ("8.9", 1), ("'x-small'", 1), ("9", 0), ("10.5", 0), ("'medium'", 0)):
        assert len(too_small(line.format(size))) == found


def test_the_style_has_no_small_letters():
    fig, ax = plotting.figure()
    ax.loglog([1, 1e4], [1, 1e4], label="a line")
    ax.set(xlabel="x", ylabel="y", title="title")
    ax.legend(title="legend")
    assert plotting.smallest_type(fig) >= plotting.SMALLEST
    fig, ax = plotting.figure()
    fig.colorbar(plotting.matrix(ax, torch.eye(3), "eye", values=True), ax=ax, label="scale")
    assert plotting.smallest_type(fig) >= plotting.SMALLEST


def keys(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return ch3.correlated_keys(length, 4, 0.5), torch.full((length,), 0.5, dtype=torch.float64)


# The figures of a study stand in a table DRAWN of its own test file.
STUDIES = [path.stem.partition("_")[0].lower() for path in Book(ROOT / "book").studies]
OF_STUDIES = {study: importlib.import_module(f"test_figures_{study}").DRAWN for study in STUDIES}


def on(draw, *arguments) -> Figure:
    fig = plt.figure()
    draw(fig, *arguments)
    return fig


PAIR = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
STATE = torch.tensor([[0.1], [0.2]])
CURVE = torch.linspace(0, 1, 400).tolist()
DRAWN = {
    "features": lambda: ch1.taylor_features([0.5, 0.1], [1, 7], [1, 7], 200),
    "times": lambda: ch1.times([64, 128], {"a": [1.0, 2.0], "b": [2.0, 1.0], "c": [1.0, 1.0]}, 64),
    "valley": lambda: ch1.valley([4, 8], torch.ones(2), torch.ones(2)),
    "capacity": lambda: ch1.capacity([2, 4], {16: [0.1, 0.2], 64: [0.1, 0.2], 256: [0.1, 0.2]}, [0.0, 0.1], 64),
    "normaliser": lambda: ch1.normaliser(torch.ones(50), {name: torch.ones(50) for name in "abc"}),
    "descent": lambda: ch2.descent(torch.tensor([0.6, 0.8]), torch.tensor(1.0), {"linear": [STATE], "delta": [STATE]}),
    "convergence": lambda: ch2.convergence(
        {c: (torch.ones(31), torch.ones(31), torch.tensor(0.9), torch.ones(31)) for c in (0.2, 0.6, 0.9)}
    ),
    "after sweeps": lambda: ch2.capacity_after_sweeps(
        [16, 64, 96, 128], [{"added": 0.5, 1: 0.1, 5: 0.2, 20: 0.3, "best": 0.0}] * 4, 64
    ),
    "kept": lambda: ch4.kept_bytes({"recurrence": recurrent_delta_rule}, [8, 16], d=4)[0],
    "decoding": lambda: ch1.decoding([16, 32], [(1, 2), (2, 1)], [(1.0, 2.0), (2.0, 1.0)]),
    "decay": lambda: ch1.decay_factors({"none": torch.ones(4, 4), "some": torch.ones(4, 4)}),
    "memories": ch2.memories,
    "stability": lambda: ch2.stability({"a": CURVE, "b": CURVE, "c": CURVE, "d": CURVE}),
    "two tokens, 2": lambda: ch2.two_tokens(PAIR, 5 * PAIR),
    "recall": lambda: ch2.recall({("MQAR", "delta"): CURVE}, {"delta": torch.ones(12)}),
    "accuracy": lambda: ch2.mqar(ch2.mqar_record()),
    "parity": lambda: ch2.parity({2.0: torch.ones(400), 1.0: torch.ones(400)}, 40, [torch.ones(400)]),
    "wearing out": lambda: ch2.wearing_out(
        {(d, 1.0): torch.ones(301) for d in (16, 32, 64)}, [0, 8], {"delta": [0.1, 0.2]}
    ),
    "path": ch3.path_diagram,
    "images": lambda: ch3.images_of_a_vector(PAIR[1], PAIR[0], [0.0, 1.0]),
    "plane": lambda: on(ch3.draw_squeezed_plane, PAIR[1].float(), 1.0),
    "planes": lambda: on(ch3.draw_squeezed_strip, PAIR[1].float(), [0.0, 2.0]),
    "reflections": ch3.two_reflections,
    "two tokens, 3": lambda: ch3.two_tokens(PAIR, PAIR, torch.ones(2, dtype=torch.float64)),
    "product": lambda: ch3.wy_product(*keys(6)),
    "every path": lambda: ch3.every_path(*keys(4)),
    "key sets": ch3.three_key_sets,
    "merge": lambda: ch3.merge_of_paths(*keys(8)),
    "on the way": lambda: ch3.numbers_on_the_way(*keys(8)),
    "by cosine": lambda: ch3.errors_against_cosine(8),
    "by length": lambda: ch3.errors_against_length((4, 8)),
    "schedule": lambda: ch4.chunk_schedule(4),
    "chunk": lambda: on(ch4.draw_chunk, torch.eye(6), torch.zeros(3, 2, 2), 2, 1),
    "chunks": lambda: on(ch4.draw_chunk_strip, torch.eye(6), torch.zeros(3, 2, 2), 2, [0, 1, 2]),
    "maps": lambda: ch4.three_maps({"a": torch.eye(3), "b": torch.eye(3)}, "abc", "cab"),
    "row sums": lambda: ch4.row_sums(ch4.random_maps(3, length=16)),
    "work": lambda: ch4.work_steps_time([2, 4], [1, 2], [2, 1], [3.0, 2.0], "cpu"),
    "recovered": lambda: ch4.recovered_states(512, 8, 16)[0],
    "mirror": ch4.mirror,
    "processes": lambda: ch4.two_processes({"affine": 3, "forward": 2, "gradient": 4, "backward": 6}),
    "sectors": ch5.coalescing,
    "heads": ch5.tensor_of_heads,
    "roofline": lambda: ch5.roofline(stored("ladder", ROOT)),
    "bytes": lambda: ch5.bytes_of_forms(None),
    "methods": lambda: ch5.inverse_errors([0.0, 1.0], {name: [1e-7, 1.0] for name in "abc"}),
    "which form": lambda: ch5.which_form(stored("operator", ROOT), stored("ladder", ROOT)),
    "accumulator": appendix.accumulator_layout,
    "timeline": appendix.timeline,
    "weak rows": appendix.weak_rows_figure,
    "predicted": lambda: appendix.measured_against_predicted(stored("ladder", ROOT)),
    "lead": lambda: appendix.lead(stored("operator", ROOT)),
    "paper": lambda: appendix.paper_figure(stored("paper_figure", ROOT), {d: [1.0] * 6 for d in (64, 128, 256)}),
    "sweeps": lambda: appendix.operator_sweeps(stored("error_microscope", ROOT)),
    "outputs": lambda: appendix.each_output(stored("error_microscope", ROOT)),
    "inverses": lambda: appendix.inverses(stored("error_microscope", ROOT)),
}


ALL = DRAWN | {f"{study}: {name}": draw for study, drawn in OF_STUDIES.items() for name, draw in drawn.items()}


@pytest.mark.parametrize("name", ALL)
def test_every_letter_can_be_read(name):
    assert plotting.smallest_type(ALL[name]()) >= plotting.SMALLEST


@pytest.mark.parametrize("study", STUDIES)
def test_no_drawing_of_a_study_is_left_out(study):
    text = (Path(__file__).parent / f"test_figures_{study}.py").read_text("utf-8")
    for name, function in vars(importlib.import_module(f"dn_lib.teaching.figures.{study}")).items():
        makes = getattr(function, "__annotations__", {}).get("return", "")
        if not name.startswith("_") and "Figure" in str(makes):
            assert f"{study}.{name}" in text.partition("DRAWN")[2]


def test_no_drawing_is_left_out():
    """Every function of chapters 1 to 5 and the appendices that makes a figure is named in the table above."""
    table = Path(__file__).read_text("utf-8").partition("DRAWN = {")[2].partition("\n}\n")[0]
    for chapter in (ch1, ch2, ch3, ch4, ch5, appendix):
        for name, function in vars(chapter).items():
            makes = getattr(function, "__annotations__", {}).get("return", "")
            if not name.startswith("_") and "Figure" in str(makes):
                assert f"{chapter.__name__.rpartition('.')[2]}.{name}" in table


def test_smallest_type_finds_a_tick_and_skips_what_is_not_seen():
    fig, ax = plotting.figure()
    ax.tick_params(axis="x", labelsize=4)
    assert plotting.smallest_type(fig) == 4
    ax.set_xticks([])
    ax.text(0, 0, "hidden", fontsize=2, visible=False)
    ax.text(0, 0, "  ", fontsize=2)
    assert plotting.smallest_type(fig) >= plotting.SMALLEST


def test_the_still_of_an_animation_is_plain_and_its_own_drawing():
    def write(text):
        return lambda fig, *_: fig.text(0.5, 0.5, text)

    moving = plotting.animation(write("moves"), range(2), height=1, still=write("stands"))
    data = plotting.still(moving.data)
    assert data is not None and plotting.still(data) is None
    plain = Image.open(BytesIO(data))
    first = Image.open(BytesIO(moving.data))
    assert getattr(plain, "n_frames", 1) == 1 and not getattr(plain, "is_animated", False)
    assert plain.convert("RGB").tobytes() == first.convert("RGB").tobytes()
    first.seek(1)
    assert plain.convert("RGB").tobytes() != first.convert("RGB").tobytes()
