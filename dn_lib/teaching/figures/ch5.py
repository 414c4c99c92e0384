"""Chapter 5: how memory is read, how a tensor of heads lies in it, rooflines, and the ladder as it was measured.

Results are read from `book/results`; where one is missing the tables say so and the figures show predictions alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dn_lib import cost
from dn_lib.teaching import plotting
from dn_lib.teaching.results import Record
from dn_lib.teaching.results import origin as origin
from dn_lib.teaching.results import stored as stored
from dn_lib.teaching.tables import Table

SECTOR, LINE = 32, 128  # bytes: what L2 and HBM hand out at least, and a line of the cache, four sectors
H100 = (3.0e12, 6.8e14)  # bytes and bfloat16 operations a second, in round numbers, where nothing was measured
LARGE = {"B": 16, "L": 2048, "H": 16, "d_k": 128, "d_v": 128}
# Forms of one thing are no mechanisms: they take the styles that no mechanism has.
FORMS = [*plotting.OTHERS, plotting.STYLES[4]]
# Names of kernels in results that were stored before they had those of today.
RENAMED = {
    "walk": "chunk_scan_fwd",
    "walk_back": "chunk_scan_bwd",
    "walk back": "chunk_scan_bwd",
    "gradients": "chunk_bwd_dqk",
}


# --- Results ------------------------------------------------------------------------------------------------
def ceilings(record: Record) -> tuple[float, float]:
    """Bytes and bfloat16 operations a second: measured in the run of `record`, else those of an H100.

    >>> ceilings(None) == H100
    True
    """
    if record is None:
        return H100
    return record["ceilings"]["copy_bytes_per_s"], record["ceilings"]["matmul_flops_per_s"]


def ladder_rows(record: Record) -> list[dict[str, Any]]:
    """The stages of the ladder that were measured, wide heads first, kernels under today's names."""
    rows = json.loads(json.dumps(record["rows"])) if record else []
    for kernel in (kernel for row in rows for kernel in row.get("kernels", ())):
        kernel |= {key: RENAMED.get(kernel[key], kernel[key]) for key in ("kernel", "name")}
    return sorted((row for row in rows if row["status"] == "ok"), key=lambda row: -row["d"])


def rung(record: Record, *stages: str) -> Table:
    """Prediction and measurement of some stages of the ladder, side by side, and of each of their kernels.

    >>> rung(None, "two kernels")
    not measured yet
    """
    rows = []
    for row in (row for stage in stages for row in ladder_rows(record) if row["stage"] == stage):
        parts = row["kernels"] if len(row["kernels"]) > 1 else []
        size = f"{row['B']} x {row['L']} x {row['H']} x {row['d']}"
        named = [(row["stage"], size, row), *((f"`{part['kernel']}`", "", part) for part in parts)]
        for name, size, x in named:
            rows.append(
                (name, size, f"{x['predicted_ms']:.3f}", f"{x['ms']:.3f}", f"{x['ratio']:.2f}", str(x["bound"]))
            )
    return Table(("times in ms", "B x L x H x d", "predicted", "measured", "ratio", "bound by"), rows)


RUNGS = ("four kernels", "three kernels", "two kernels, plain", "one kernel")


def fair_ladder(record: Record) -> Table:
    """Predicted and measured milliseconds of the ladder's rungs, one change each, and of the operator.

    All rungs have the operator's inverse where the result says so (`inverse`). Of an older result, whose rungs inverted
    in float32, this shows four kernels and the operator's two, with the time of that inverse replaced by that of the
    operator's `chunk_inverse`.

    >>> fair_ladder(None)
    not measured yet
    """
    rows = {(row["stage"], row["d"]): row for row in ladder_rows(record)}
    sizes = sorted({d for _, d in rows}, reverse=True)
    alike = {d for d in sizes if all(rows.get((name, d), {}).get("inverse") == "blocks" for name in RUNGS)}
    lines = []
    for d in sizes:
        found: dict[str, list[dict[str, Any]]] = {}
        if d in alike:
            found = {name: [rows[name, d]] for name in RUNGS}
            if ("two kernels", d) in rows:
                found["two kernels, the operator"] = [rows["two kernels", d]]
        elif ("four kernels", d) in rows and ("two kernels", d) in rows:
            inverse, scan = rows["two kernels", d]["kernels"]
            found = {"four kernels": [inverse, *rows["four kernels", d]["kernels"][1:]]}
            found["two kernels, the operator"] = [inverse, scan]
        for name, parts in found.items():
            predicted, measured = (sum(part[key] for part in parts) for key in ("predicted_ms", "ms"))
            lines.append((name, str(d), f"{predicted:.3f}", f"{measured:.3f}", f"{measured / predicted:.2f}"))
    older = [] if alike else ["An older result: its other rungs inverted in float32, or were not there yet."]
    return Table(("the same inverse on all, times in ms", "d", "predicted", "measured", "ratio"), lines, notes=older)


# --- How memory is read -------------------------------------------------------------------------------------
def sectors(addresses: Sequence[int] | np.ndarray, itemsize: int) -> np.ndarray:
    """The numbers of the 32-byte sectors that loads of `itemsize` bytes at these byte addresses touch, in order.

    >>> sectors([0, 4, 28, 32], itemsize=4).tolist()
    [0, 1]
    """
    first = np.asarray(addresses, dtype=np.int64)
    return np.unique(np.concatenate([first // SECTOR, (first + itemsize - 1) // SECTOR]))


PATTERNS = (
    ("32 floats, one after another", 4, 4),
    ("every second float", 8, 4),
    ("every eighth float", 32, 4),
    ("one bfloat16 of each of 32 tokens, H = 16: how beta lies", 32, 2),
)


def warp_requests(patterns: Iterable[tuple[str, int, int]] = PATTERNS) -> Table:
    """What one load of a warp wants and what moves; patterns: (name, bytes between threads, bytes of a number).

    >>> print(warp_requests([("every second float", 8, 4)]))
    what 32 threads load  wanted  sectors  moved  used
    every second float     128 B        8  256 B   50%
    """
    rows = []
    for name, stride, itemsize in patterns:
        moved = sectors(stride * np.arange(32), itemsize)
        wanted, bytes_moved = 32 * itemsize, SECTOR * len(moved)
        rows.append((name, f"{wanted} B", str(len(moved)), f"{bytes_moved} B", f"{wanted / bytes_moved:.0%}"))
    return Table(("what 32 threads load", "wanted", "sectors", "moved", "used"), rows)


def coalescing(patterns: Iterable[tuple[str, int, int]] = PATTERNS[:3]) -> Figure:
    """The sectors that one load of a warp touches (coloured), and the bytes of them that it asked for (dark)."""
    chosen = list(patterns)
    fig, axes = plotting.figure(rows=len(chosen), height=0.75 * len(chosen) + 0.5, sharex=True)
    for ax, (name, stride, itemsize) in zip(np.atleast_1d(axes), chosen, strict=True):
        touched = sectors(stride * np.arange(32), itemsize)
        for sector in range(32):
            colour = plotting.OTHERS[1]["color"] if sector in touched else "0.93"
            ax.add_patch(Rectangle((sector * SECTOR, 0), SECTOR, 1, fc=colour, ec="white", lw=1.5))
        for thread in range(32):
            ax.add_patch(Rectangle((thread * stride, 0.2), itemsize, 0.6, fc="black", ec="white", lw=0.4))
        ax.set(xlim=(0, 32 * SECTOR), ylim=(0, 1), yticks=[])
        ax.set_title(f"{name}: {len(touched)} sectors for {32 * itemsize} bytes", fontsize=9, loc="left")
        ax.grid(False)
        ax.spines[:].set_visible(False)
    np.atleast_1d(axes)[-1].set(
        xlabel="address in bytes; a coloured box is one sector of 32", xticks=range(0, 1025, 128)
    )
    return fig


def tensor_of_heads(L: int = 6, H: int = 3, d: int = 4, head: int = 1, rows: int = 4) -> Figure:
    """How one sequence of `[B, L, H, d]` lies in memory, and the tile of `rows` tokens of one head in it."""
    fig, (flat, tile) = plotting.figure(columns=2, height=2.6, width_ratios=[2.4, 1])
    colours = [plotting.OTHERS[h % 3]["color"] for h in range(H)]
    for t in range(L):
        for h in range(H):
            mine = h == head and t < rows
            for i in range(d):
                offset = (t * H + h) * d + i
                place = (h * d + i, -t)
                flat.add_patch(Rectangle(place, 1, 0.9, fc=colours[h], alpha=1.0 if mine else 0.3, ec="white"))
                flat.text(place[0] + 0.5, place[1] + 0.45, str(offset), ha="center", va="center", fontsize=9)
                if mine:
                    tile.add_patch(Rectangle((i, -t), 1, 0.9, fc=colours[h], ec="white"))
                    tile.text(i + 0.5, -t + 0.45, str(offset), ha="center", va="center", fontsize=9)
    for ax, width, depth in ((flat, H * d, L), (tile, d, L)):
        ax.set(xlim=(-0.1, width + 0.1), ylim=(-depth + 0.8, 1.1), xticks=[])
        ax.set_yticks([-t + 0.45 for t in range(depth)], [f"token {t}" for t in range(depth)], fontsize=9)
        ax.tick_params(length=0)
        ax.grid(False)
        ax.spines[:].set_visible(False)
    flat.set_title(f"memory, from left to right and down: H = {H} heads of d = {d}", fontsize=9)
    tile.set_title(f"tile of head {head}:\nrows lie H d = {H * d} apart", fontsize=9)
    tile.set_yticks([])
    return fig


# --- Predictions --------------------------------------------------------------------------------------------
def roofline(record: Record) -> Figure:
    """The roof, and under it what the kernels of the ladder reached: FLOPs by their count, times as measured.

    Kernels whose dots take float32 operands have a roof of their own and are left out.
    """
    bandwidth, rate = ceilings(record)
    fig, ax = plotting.figure(height=3.6)
    intensity = torch.logspace(1, 3, 100)
    ax.loglog(intensity, torch.minimum(intensity * bandwidth, torch.tensor(rate)) / 1e12, color="black", label="roof")
    kinds = (
        ("linear attention", ("linear attention",)),
        ("four kernels, but for the inverse", ("four kernels",)),
        ("the operator's two kernels", ("two kernels",)),
        ("its backward", ("operator, backward",)),
    )
    for style, (name, stages) in zip(FORMS, kinds, strict=False):
        found = [
            (kernel["flops"] / kernel["bytes"], kernel["flops"] / kernel["ms"] / 1e9)
            for row in ladder_rows(record)
            if row["stage"] in stages
            for kernel in row["kernels"]
            if kernel["kernel"] != "ut_kernel"
        ]
        if found:
            ax.plot(*zip(*found, strict=True), **{**style, "linestyle": "none"}, label=name, markersize=8)
    if record is None:
        ax.text(0.5, 0.1, "no measurement in this copy", ha="center", transform=ax.transAxes)
    ax.set(xlabel="FLOPs for each byte that must move", ylabel="TFLOP/s", ylim=(20, 2000))
    ax.legend(fontsize=9)
    return fig


def bytes_of_forms(record: Record) -> Figure:
    """Predicted bytes of the forms for each token and head; at the end of a bar its predicted time."""
    shape = cost.Shape(**LARGE)
    forms = {
        "four kernels": cost.delta_rule_in_steps(shape),
        "two kernels": cost.two_kernels(shape),
        "one kernel": cost.fused(shape),
        "compulsory": cost.compulsory(shape),
    }
    rows = shape.B * shape.L * shape.H
    fig, ax = plotting.figure(height=2.8)
    for y, costs in enumerate(forms.values()):
        left = 0.0
        for n, (kernel, style) in enumerate(zip(costs, plotting.STYLES[4:], strict=False)):
            width = kernel.bytes / rows
            ax.barh(
                y, width, left=left, color=style["color"], alpha=0.6, edgecolor="white", hatch=["", "//", "..", "xx"][n]
            )
            label = kernel.name if len(costs) > 1 and width > 300 else ""
            ax.text(left + width / 2, y, label, ha="center", va="center", fontsize=9, backgroundcolor="white")
            left += width
        predicted = 1e3 * cost.roofline_time(costs, *ceilings(record))
        ax.text(left + 90, y, f"{predicted:.2f} ms", va="center", fontsize=9)
    ax.set_yticks(range(len(forms)), list(forms))
    ax.set(xlabel="bytes for each token and head", xlim=(0, 1.15 * cost.total_bytes(forms["four kernels"]) / rows))
    ax.invert_yaxis()
    return fig


def inverse_errors(weights: Sequence[float], errors: dict[str, list[float]]) -> Figure:
    """Error of T by each method; hollow marks of growing size, so that methods which agree are seen one in another."""
    fig, ax = plotting.figure(height=3.2)
    sizes = (13, 5.5, 8)
    for style, size, (method, row) in zip(FORMS, sizes, errors.items(), strict=False):
        ax.plot(weights, row, **style, markersize=size, fillstyle="none", markeredgewidth=1.8, label=method)
    ax.set(xlabel="weight of the common part of the keys", ylabel="relative error of T", yscale="log")
    ax.axhline(1, color="black", linewidth=0.8)
    ax.legend()
    return fig


def which_form(operator: Record, ladder: Record) -> Figure:
    """Time of 32,768 tokens, 16 heads of 128, by length: rooflines as lines, measurements as hollow marks."""
    lengths = [2**n for n in range(9, 16)]
    shapes = [cost.Shape(B=32768 // L, L=L, H=16, d_k=128, d_v=128) for L in lengths]
    delta, softmax = plotting.MECHANISMS["delta"], plotting.MECHANISMS["softmax"]
    forms = (
        ("delta rule, two kernels", cost.two_kernels, delta),
        ("delta rule, four kernels", cost.delta_rule_in_steps, plotting.OTHERS[0]),
        ("softmax attention, one kernel", cost.softmax_attention, softmax),
    )
    fig, ax = plotting.figure(height=3.9)
    for name, form, style in forms:
        times = [1e3 * cost.roofline_time(form(s), *ceilings(operator)) for s in shapes]
        ax.loglog(lengths, times, color=style["color"], linestyle=style["linestyle"], label=f"{name}, predicted")
    hollow = {"linestyle": "none", "fillstyle": "none", "markersize": 9, "markeredgewidth": 1.8}
    rows = [
        row
        for row in (operator["rows"] if operator else [])
        if row["key"].startswith("grid") and row["status"] == "ok"
        if (row["H"], row["d_k"], row["B"] * row["L"]) == (16, 128, 32768)
    ]
    marks: list[tuple[str, dict[str, Any], list[tuple[int, float]]]] = [
        ("delta rule, the operator, measured", delta, [(row["L"], row["forward"]["ours_ms"]) for row in rows])
    ]
    for label, names in baselines(rows).items():
        marks.append(
            (label, softmax, [(row["L"], row["others"][names]["ms"]) for row in rows if names in row["others"]])
        )
    four = [row for row in ladder_rows(ladder) if (row["stage"], row["d"]) == ("four kernels", 128)]
    slow = any(row.get("inverse") != "blocks" for row in four)
    kind = "four kernels, float32 inverse" if slow else "delta rule, four kernels"
    marks.append((f"{kind}, measured", plotting.OTHERS[0], [(row["L"], row["ms"]) for row in four]))
    for label, style, points in marks:
        if points:
            xs, ys = zip(*points, strict=True)
            ax.plot(xs, ys, **hollow, color=style["color"], marker=style["marker"], label=label)
    ax.set(xlabel="length of a sequence", ylabel="ms")
    ax.set_xticks(lengths, [f"{L:,}" for L in lengths])
    ax.set_yticks([0.2, 0.5, 1, 2, 5, 10], ["0.2", "0.5", "1", "2", "5", "10"])
    ax.minorticks_off()
    fig.legend(fontsize=9, ncols=2, loc="outside lower center", columnspacing=1.2)
    return fig


def baselines(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Softmax attention as it was measured: what a legend calls it -> the name of its forward in the rows.

    An older result has one, PyTorch's FlashAttention; each library's kernel that a newer one adds is named after it.

    >>> baselines([{"others": {"softmax_attention.forward": {"ms": 1.0}, "recurrent.forward": {"ms": 2.0}}}])
    {'softmax attention (FlashAttention), measured': 'softmax_attention.forward'}
    """
    names = sorted({name for row in rows for name in row.get("others", {})})
    found = {}
    for name in names:
        kind, _, what = name.partition(".")
        if kind.startswith("softmax_attention") and what == "forward":
            which = kind.removeprefix("softmax_attention").strip("_") or "FlashAttention"
            found[f"softmax attention ({which}), measured"] = name
    return found
