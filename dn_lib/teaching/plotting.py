"""One look for every figure of the book: readable in print, on a projector and without colour vision.

Series differ by marker and line style as well as by colour; the colours are those of Okabe and Ito, which
stay apart under the common forms of colour blindness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from io import BytesIO
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import CenteredNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.text import Text
from PIL import Image as PillowImage

WIDTH = 7.2  # inches: the text width of the site, and of a printed page
SMALLEST = 9.0  # points: no letter is smaller; on a phone the site shows a point as one CSS pixel (book.css)

# Okabe and Ito's palette, darkest and most distinct pairs first; their yellow is too pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))

#: Keyword arguments of `Axes.plot` for series 0, 1, 2, ...; there are eight.
STYLES: list[dict[str, Any]] = [
    {"color": colour, "marker": marker, "linestyle": line}
    for colour, marker, line in zip(COLOURS, MARKERS, LINES, strict=True)
]

#: The style of each mechanism, the same in every chapter; "ideal" is the best that a state could do (least squares).
MECHANISMS: dict[str, dict[str, Any]] = {
    "linear": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "delta": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "softmax": {"color": "#009E73", "marker": "^", "linestyle": "-."},
    "gated": {"color": "#CC79A7", "marker": "D", "linestyle": ":"},
    "ideal": {"color": "#000000", "marker": "v", "linestyle": (0, (5, 1))},
}

#: Styles for series that are no mechanism (dimensions, cosines, forms of one thing): colours that no mechanism has.
OTHERS: list[dict[str, Any]] = [style | {"linestyle": line} for style, line in zip(STYLES[5:], LINES[:3], strict=True)]

#: The style of a model by what its layers are: its mechanism's.  A hybrid has two, and so a colour of its own.
MODELS: dict[str, dict[str, Any]] = {
    "DeltaNet": MECHANISMS["delta"],
    "fla's DeltaNet": MECHANISMS["delta"] | {"marker": "D", "linestyle": ":", "fillstyle": "none"},
    "hybrid": OTHERS[0],
    "Transformer": MECHANISMS["softmax"],
}

MAPS = {"diverging": "RdBu_r", "sequential": "cividis"}


STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 11,
    "axes.prop_cycle": cycler(color=COLOURS, linestyle=LINES),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 12,
    "figure.constrained_layout.use": True,
    "figure.dpi": 120,
    "figure.facecolor": "white",  # a figure stays readable on a page with a dark theme
    "font.family": "DejaVu Sans",  # comes with Matplotlib, so that figures look alike everywhere
    "font.size": 11,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.handlelength": 3.2,  # long enough to tell the line styles apart
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "savefig.facecolor": "white",
}


def use_style() -> None:
    """Set Matplotlib's style to the book's; call it once, at the top of a chapter.

    The whole style is set: Matplotlib's own defaults first, so that nothing of a personal `matplotlibrc` (a dark
    background, LaTeX for all text) is left in a figure, then what the book changes.  Backend and other settings that
    are no style stay.  Within `with plt.rc_context():` the former style comes back at the end of the block.

    >>> with plt.rc_context({"text.usetex": True}):
    ...     use_style()
    ...     plt.rcParams["axes.grid"], plt.rcParams["text.usetex"]
    (True, False)
    """
    plt.style.use(["default", STYLE])


def figure(rows: int = 1, columns: int = 1, height: float = 3.2, **subplots: Any) -> tuple[Figure, Any]:
    """A figure of the book's width and `height` inches; `subplots` goes to `plt.subplots`.

    Returns the figure and one Axes, or the array of them where there are several.

    >>> fig, axes = figure(columns=2)
    >>> axes.shape
    (2,)
    >>> plt.close(fig)
    """
    return plt.subplots(rows, columns, figsize=(WIDTH, height), **subplots)


def matrix(
    ax: Axes,
    tensor: torch.Tensor,
    title: str = "",
    cmap: str = "diverging",
    values: bool = False,
    limit: float | None = None,
) -> AxesImage:
    """Draw the two-dimensional `tensor` as a grid of coloured cells.

    `cmap="diverging"` shows signs and centres the colours on zero, `limit` (the largest magnitude, by default) at
    their ends; `"sequential"` shows magnitudes, from 0 to `limit` if it is given.
    `values=True` writes each number into its cell.  Rows and columns are counted from 1, as in the text.
    Returns the image, for `fig.colorbar`.  Raises ValueError if `tensor` has not two dimensions, or for
    any other `cmap`.

    >>> fig, ax = figure()
    >>> matrix(ax, torch.eye(3), "identity").get_clim()
    (-1.0, 1.0)
    >>> plt.close(fig)
    """
    if cmap not in MAPS:
        raise ValueError(f"cmap must be one of {sorted(MAPS)}, got {cmap!r}")
    if tensor.ndim != 2:
        raise ValueError(f"tensor must be [rows, columns], got shape {list(tensor.shape)}")
    array = tensor.detach().to("cpu", torch.float64).numpy()
    if cmap == "diverging":
        norm = CenteredNorm(halfrange=limit or abs(array).max() or 1.0)
    else:
        norm = Normalize() if limit is None else Normalize(0, limit)
    image = ax.imshow(array, cmap=MAPS[cmap], norm=norm, interpolation="nearest")
    ax.set_title(title)
    ax.grid(False)
    for axis, count in ((ax.xaxis, array.shape[1]), (ax.yaxis, array.shape[0])):
        shown = range(0, count, max(1, count // 8))
        axis.set_ticks(list(shown), [str(i + 1) for i in shown])
    ax.spines[:].set_visible(True)
    ax.tick_params(length=0, labelsize=9)
    if values:
        for (i, j), number in np.ndenumerate(array):
            # Rec. 601 luma of the cell decides between black and white digits.
            red, green, blue, _ = image.cmap(image.norm(number))
            ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
            ax.text(j, i, f"{number:.2g}", ha="center", va="center", color=ink, fontsize=9)
    return image


def smallest_type(fig: Figure) -> float:
    """The size in points of the smallest text that `fig` shows; infinite if it shows none.

    Indices and exponents within a formula don't count: mathematics is set with smaller ones everywhere.

    >>> fig, ax = figure()
    >>> _ = ax.text(0, 0, "a footnote", fontsize=5)
    >>> smallest_type(fig)
    5.0
    >>> plt.close(fig)
    """
    # Ticks have labels only once they are drawn.
    (fig.canvas if isinstance(fig.canvas, FigureCanvasAgg) else FigureCanvasAgg(fig)).draw()
    seen = (text for text in fig.findobj(Text) if text.get_visible() and text.get_text().strip())
    return min((float(text.get_fontsize()) for text in seen), default=float("inf"))


def still(data: bytes) -> bytes | None:
    """The picture that stands for an animation where nothing moves: a plain PNG; None if `data`, a PNG, has no frames.

    A browser that prints a page prints the frame that is just shown, so that whoever makes pages for print has to put
    this in its place.

    >>> moving = animation(lambda fig, n: fig.text(0.5, 0.5, str(n)), range(3))
    >>> plain = still(moving.data)
    >>> PillowImage.open(BytesIO(plain)).size == PillowImage.open(BytesIO(moving.data)).size
    True
    >>> still(plain) is None
    True
    """
    with PillowImage.open(BytesIO(data)) as picture:
        if getattr(picture, "n_frames", 1) == 1:
            return None
        picture.seek(0)  # the first page, which belongs to no animation
        buffer = BytesIO()
        picture.copy().save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def animation(
    draw: Callable[[Figure, Any], None],
    frames: Iterable[Any],
    *,
    fps: float = 2,
    height: float = 3.2,
    alt: str | None = None,
    still: Callable[[Figure], None] | None = None,
) -> Any:
    """A short animation, to be the last expression of a cell.

    `draw(fig, frame)` is called on an empty figure for every item of `frames`.  The result, an IPython
    `Image`, is an animated PNG that loops: every browser and notebook plays it, and it needs no script.
    Its first page is what `still(fig)` draws, or the last frame: programs that know no animations show it, and the
    function `still` returns it, for print.  A frame takes about 10 kB.  Raises ValueError if `frames` is empty.

    >>> moving = animation(lambda fig, n: fig.text(0.5, 0.5, str(n)), range(3))
    >>> PillowImage.open(BytesIO(moving.data)).is_animated
    True
    """
    from IPython.display import Image  # here, so that scripts can draw figures without Jupyter

    fig = Figure(figsize=(WIDTH, height), layout="constrained", dpi=STYLE["figure.dpi"])
    canvas = FigureCanvasAgg(fig)
    pictures = []

    def take(drawing: Callable[..., None], *arguments: Any) -> None:
        fig.clear()
        drawing(fig, *arguments)
        canvas.draw()
        pictures.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())

    for frame in frames:
        take(draw, frame)
    if not pictures:
        raise ValueError("frames must hold at least one item, got none")
    if still is None:
        pictures.append(pictures[-1])
    else:
        take(still)
    # One palette for all frames makes the file three times smaller; its last entry is the paper's white.
    palette = PillowImage.fromarray(np.concatenate(pictures)).quantize(255)
    colours = [*(palette.getpalette() or ())[: 3 * 255], 255, 255, 255]
    pages = []
    for picture in pictures:
        entries = np.asarray(
            PillowImage.fromarray(picture).quantize(palette=palette, dither=PillowImage.Dither.NONE)
        ).copy()
        entries[(picture == 255).all(axis=-1)] = len(colours) // 3 - 1
        pages.append(PillowImage.fromarray(entries))
        pages[-1].putpalette(colours)
    buffer = BytesIO()
    # With `default_image` the first page is the still (the last of `pages`), and the animation is the rest.
    options = {"save_all": True, "default_image": True, "duration": round(1000 / fps), "loop": 0}
    pages[-1].save(buffer, format="PNG", append_images=pages[:-1], optimize=True, **options)
    return Image(data=buffer.getvalue(), format="png", alt=alt)
