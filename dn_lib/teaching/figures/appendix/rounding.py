"""Drawings and tables of appendix B: rounding errors under the microscope."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dn_lib.teaching import plotting
from dn_lib.teaching.figures.appendix.common import NOTHING, OUTPUTS, SERIES
from dn_lib.teaching.figures.ch5 import Record
from dn_lib.teaching.tables import Table

# --- B. Errors under the microscope -----------------------------------------------------------------------------
KEYS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, "identical")  # mean cosines of the sweeps, drawn evenly spaced


def sweep(ax: Axes, microscope: Record, style: dict[str, Any], label: str, x: str, names: Sequence[str], **kept: Any):
    """Draw the largest error of `names` along a sweep.  Hollow: a step may grow.  Crosses at the top: not finite."""
    for row in microscope["rows"] if microscope else []:
        if kept.items() <= row.items():
            points = [point for point in row.get("points", []) if "errors" in point]
            at = [KEYS.index(point[x]) if x == "cosine" else point[x] for point in points]
            lost = [any(point["errors"][name]["not_finite"] for name in names) for point in points]
            worst = [
                float("nan") if gone else max(point["errors"][name]["max"] for name in names)
                for point, gone in zip(points, lost, strict=True)
            ]
            ax.plot(at, worst, **style, label=label)
            grows = [(a, e) for a, e, point in zip(at, worst, points, strict=True) if point["may_grow"]]
            if grows:
                ax.plot(*zip(*grows, strict=True), **{**style, "linestyle": "none"}, markerfacecolor="white")
            crosses = [a for a, gone in zip(at, lost, strict=True) if gone]
            ax.plot(crosses, [0.97] * len(crosses), "x", color=style["color"], transform=ax.get_xaxis_transform())
    ax.set(yscale="log")
    if x == "cosine":
        ax.set_xticks(range(len(KEYS)), ["0", ".25", ".5", ".75", ".9", ".99", "1"], fontsize=9)
    if not microscope and not ax.texts:
        ax.text(0.5, 0.5, NOTHING, ha="center", transform=ax.transAxes)


def operator_sweeps(microscope: Record) -> Figure:
    """The operator's largest error in each format, along keys that become alike, and along beta."""
    fig, axes = plotting.figure(columns=3, height=3.6, sharey=True)
    sweeps = (
        ("cosine", "cosine", "beta to 1"),
        ("cosine, beta to 2", "cosine", "beta to 2"),
        ("beta", "beta_range", "independent keys"),
    )
    for ax, (axis, x, title) in zip(axes, sweeps, strict=True):
        for style, form in zip(SERIES, ("bfloat16", "tf32", "float16", "float32"), strict=False):
            sweep(ax, microscope, style, form, x, OUTPUTS, section="operator", axis=axis, format=form)
        ax.set(title=title, xlabel="upper end of beta" if axis == "beta" else "mean cosine of keys")
    axes[0].set(ylabel="largest relative error")
    if microscope:
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig


def units_table(microscope: Record) -> Table:
    """The operator's largest error in units u of its format, for independent, similar and identical keys."""

    def largest(form: str, axis: str, cosine: Any) -> float:
        for row in microscope["rows"] if microscope else []:
            if (row["section"], row.get("axis"), row.get("format")) == ("operator", axis, form):
                point = next(p for p in row["points"] if p["cosine"] == cosine)
                return max(point["errors"][name]["max"] for name in OUTPUTS)
        return float("nan")

    places = [(axis, c) for axis in ("cosine", "cosine, beta to 2") for c in (0.0, 0.9, "identical")]
    units = microscope["settings"]["unit_roundoff"] if microscope else {}
    rows = [(form, *(f"{largest(form, axis, c) / u:.1f}" for axis, c in places)) for form, u in units.items()]
    head = [
        f"beta to {2 if '2' in axis else 1}, " + ("identical keys" if c == "identical" else f"cosine {c:g}")
        for axis, c in places
    ]
    return Table(("largest error / u", *head), rows)


def each_output(microscope: Record) -> Figure:
    """Every output by itself in bfloat16, against the chunk and against the norm of the keys."""
    fig, axes = plotting.figure(columns=2, height=3.6, sharey=True)
    for ax, (axis, title) in zip(axes, (("chunk", "size of a chunk"), ("norm", "norm of the keys")), strict=True):
        for style, name in zip(SERIES, OUTPUTS, strict=False):
            sweep(ax, microscope, style, name, axis, [name], section="operator", axis=axis, format="bfloat16")
        ax.set(xlabel=title)
    axes[0].set(ylabel="relative error")
    axes[0].set_xticks([16, 32, 64])
    axes[0].set_yticks([0.003, 0.005, 0.01, 0.02], ["0.003", "0.005", "0.01", "0.02"])
    axes[0].minorticks_off()
    if microscope:
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    return fig


METHODS = {
    "recursion on N": SERIES[0],
    "blocked": SERIES[1],
    "substitution": SERIES[5],
    "doubling": SERIES[2],
}


def inverses(microscope: Record) -> Figure:
    """Error of T by each method, a panel for each format of the operands, as keys become alike."""
    fig, axes = plotting.figure(columns=2, height=3.6, sharey=True)
    kept = {"section": "inverse", "axis": "cosine, beta to 2"}
    for ax, form in zip(axes, ("float16", "float32"), strict=True):
        for name, style in METHODS.items():
            sweep(ax, microscope, style, name, "cosine", ["T"], **kept, method=f"{name}, {form}")
        ax.set(title=f"operands in {form}", xlabel="mean cosine of keys", ylim=(1e-8, 1e4))
        if microscope:
            place, top = ("upper right", 0.94) if form == "float16" else ("center right", 0.5)  # below the crosses
            ax.legend(fontsize=9, loc=place, bbox_to_anchor=(1, top))
    axes[0].set(ylabel="relative error of T")
    return fig


def inverses_table(microscope: Record) -> Table:
    """Errors of T, and of o and dbeta if the inverse alone is wrong, for six ways to invert."""
    rows = []
    wanted = {f"{name}, {form}" for name in METHODS for form in ("float16", "float32")}
    for row in microscope["rows"] if microscope else []:
        if row["section"] == "inverse" and row["axis"] == "cosine, beta to 2" and row["method"] in wanted:
            found = [
                point["errors"][name]
                for point in row["points"]
                if point["cosine"] in (0.0, 0.9, "identical")
                for name in ("T", "o", "dbeta")
            ]
            rows.append((row["method"], *("-" if x["not_finite"] else format(x["max"], ".0e") for x in found)))
    head = [f"{name}{keys}" for keys in (" at 0", " at 0.9", ", equal") for name in ("T", "o", "dbeta")]
    return Table(("beta to 2, cosine of keys", *head), rows)
