"""`dn_lib.teaching.plotting`: figures that differ by more than colour, matrix pictures, animations."""

from io import BytesIO

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image

from dn_lib.teaching import plotting


@pytest.fixture(autouse=True)
def own_style():
    with plt.rc_context():
        plotting.use_style()
        yield
    plt.close("all")


def test_series_differ_by_colour_by_marker_and_by_line_style():
    for key in ("color", "marker", "linestyle"):
        assert len({str(style[key]) for style in plotting.STYLES}) == len(plotting.STYLES) >= 6


def test_the_whole_style_is_set_and_a_context_brings_the_former_one_back():
    personal = {"text.usetex": True, "axes.facecolor": "black", "text.color": "white", "savefig.dpi": 37}
    with plt.rc_context(personal):
        before = dict(plt.rcParams)
        with plt.rc_context():
            plotting.use_style()
            ours = {name: value for name, value in plt.rcParams.items() if name not in plt.style.core.STYLE_BLACKLIST}
        assert dict(plt.rcParams) == before
    with plt.rc_context():
        plt.rcdefaults()
        plt.rcParams.update(plotting.STYLE)
        assert ours.items() <= dict(plt.rcParams).items()


def luminance(colour):
    """Relative luminance of WCAG 2, from 0 (black) to 1 (white)."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in matplotlib.colors.to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_lines_stand_out_from_white_paper():
    assert all((1 + 0.05) / (luminance(style["color"]) + 0.05) > 2 for style in plotting.STYLES)


def test_figure_has_the_width_of_the_book():
    fig, ax = plotting.figure(height=2.5)
    ax.plot([0, 1], [1, 2], **plotting.STYLES[0], label="a")
    assert fig.get_size_inches().tolist() == [plotting.WIDTH, 2.5]
    assert plotting.figure(rows=2, columns=3)[1].shape == (2, 3)


def test_matrix_centres_on_zero_and_counts_from_one():
    _, ax = plotting.figure()
    tensor = torch.tensor([[1.0, -4.0, 2.0], [0.0, 0.5, 3.0]], requires_grad=True)
    image = plotting.matrix(ax, tensor, "T", values=True)
    assert image.get_clim() == (-4, 4)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "3"]
    assert [text.get_text() for text in ax.texts] == ["1", "-4", "2", "0", "0.5", "3"]


def test_matrix_draws_zeros_and_half_precision():
    _, (a, b) = plotting.figure(columns=2)
    assert plotting.matrix(a, torch.zeros(2, 2)).get_clim() == (-1, 1)
    plotting.matrix(b, torch.rand(40, 40, dtype=torch.bfloat16), cmap="sequential")
    a.figure.canvas.draw()


def test_matrix_names_the_bad_argument():
    _, ax = plotting.figure()
    with pytest.raises(ValueError, match=r"tensor must be \[rows, columns\], got shape \[3\]"):
        plotting.matrix(ax, torch.zeros(3))
    with pytest.raises(ValueError, match="cmap must be one of"):
        plotting.matrix(ax, torch.zeros(3, 3), cmap="jet")


def test_animation_plays_the_frames_and_leaves_no_open_figure():
    seen = []

    def draw(fig, frame):
        assert not fig.axes  # each frame starts empty
        seen.append(frame)
        fig.subplots().bar([0, 1, 2], [frame, 1, 3 - frame])

    shown = plotting.animation(draw, range(3), fps=4, height=2)
    picture = Image.open(BytesIO(shown.data))
    assert seen == [0, 1, 2]
    assert "image/png" in shown._repr_mimebundle_()[0]
    assert picture.is_animated and picture.n_frames == 1 + 3  # the still for print, then the frames
    pixels = []
    for page in range(4):
        picture.seek(page)
        pixels.append(picture.convert("RGB").tobytes())
    assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)  # paper stays white
    assert pixels[0] == pixels[3] and len(set(pixels)) == 3
    assert picture.info["duration"] == 250
    assert len(shown.data) < 100_000
    assert plt.get_fignums() == []


def test_animation_without_frames():
    with pytest.raises(ValueError, match="frames must hold at least one item"):
        plotting.animation(lambda fig, frame: None, [])
