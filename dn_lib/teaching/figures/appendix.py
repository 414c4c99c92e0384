"""The appendices: what was measured and how it is taken apart, errors of the kernels, and a chunk on Hopper.

Tables come as text, figures as figures.  Where a result is missing the tables say so and the figures are empty.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from dn_lib import cost
from dn_lib.teaching import plotting
from dn_lib.teaching.excerpts import resolve
from dn_lib.teaching.figures.ch5 import FORMS, Record, ladder_rows

NOTHING = "not measured yet"
OUTPUTS = ("o", "dq", "dk", "dv", "dbeta")
# Six outputs, sizes or methods side by side: none of them a mechanism of the book.
SERIES = [plotting.STYLES[n] for n in (4, 5, 6, 7)] + [
    {"color": "#5D3A9B", "marker": "^", "linestyle": (0, (1, 1))},
    {"color": "#7F7F7F", "marker": "o", "linestyle": "-"},
]


# --- A. Errors first ----------------------------------------------------------------------------------------
def errors_table(errors: Record, sanitizer: Record, chapters: Record) -> str:
    """Errors of random calls, ours over fla's, what compute-sanitizer found, chapters that print otherwise on a GPU."""
    lines = []
    summary = errors["summary"] if errors else {"errors": {}, "ratio_to_fla": {}}
    for dtype, outputs in summary["errors"].items():
        lost, worst = sum(x["not_finite"] for x in outputs.values()), max(x["worst"] for x in outputs.values())
        median = max(x["median"] for x in outputs.values())
        calls = outputs["o"]["calls"]
        lines.append(f"{dtype:9} {calls} calls, not finite: {lost}, largest median {median:.0e}, worst {worst:.0e}")
    lines.append(f"\n{'error, ours / fla':20}{'calls':>6}{'median':>8}{'most':>6}   above 1.1")
    for dtype, outputs in summary["ratio_to_fla"].items():
        for name, x in outputs.items():
            above = len(x["above_1.1"])
            lines.append(f"{dtype:9} {name:10}{x['calls']:6}{x['median']:8.2f}{x['max']:6.2f}{above:8}")
    lines.append("")
    for tool, found in (sanitizer["tools"] if sanitizer else {}).items():
        lines.append(f"{tool}: {found['calls']} calls, {found['summary'][0]}")
    moved = [name for name, cells in (chapters["gpu"]["different"] if chapters else {}).items() if cells]
    lines.append(f"chapters whose text outputs on the GPU differ from the stored ones: {moved or 'none'}")
    return "\n".join(lines)


def errors_by_keys(errors: Record) -> str:
    """Geometric means of our error over fla's by number format and by how alike the keys are."""
    summary = errors["summary"] if errors else {}
    means = [row["ratios"] for row in summary.get("ratio_by_configuration", [])]
    if not means:
        return NOTHING
    every = [mean for ratios in means for mean in ratios.values()]
    lines = [
        f"{len(means)} configurations: geometric means of every output from {min(every):.2f} to {max(every):.2f}\n",
        f"{'':34}o: ours / fla       worst output      o: fla again / fla",
        f"{'format, keys, beta to':27}{'calls':>5}  mean  most  > 1.1    by its mean       most  > 1.1",
    ]
    for row in summary.get("ratio_by_keys", []):
        o, again, worst = row["o"], row.get("scatter"), max(row["geometric_means"].items(), key=lambda item: item[1])
        common = {0.0: "independent", "identical": "identical"}.get(row["bias"], f"common {row['bias']}")
        keys = f"{row['dtype']:9}{common:13}{row['beta_range']:.0f}"
        lines.append(
            f"{keys:27}{o['calls']:5}{o['geometric_mean']:6.2f}{o['max']:6.2f}{o['above_1.1']:6}     "
            f"{worst[0]:9}{worst[1]:5.2f}" + (f"{again['max']:12.2f}{again['above_1.1']:6}" if again else "")
        )
    return "\n".join(lines)


# --- A. How it was measured, and how far ahead ------------------------------------------------------------------
def grid(operator: Record) -> list[dict[str, Any]]:
    """The rows of the grid of shapes that were measured."""
    rows = operator["rows"] if operator else []
    return [row for row in rows if row["key"].startswith("grid") and row["status"] == "ok"]


def how_measured(operator: Record) -> str:
    """Machine, versions, clock; by how much samples of one shape differ; the largest errors."""
    if operator is None:
        return NOTHING
    where, how, rows = operator["provenance"], operator["settings"], grid(operator)
    versions = {**{name: where[name] for name in ("torch", "triton")}, "fla": how["fla"].get("fla", "absent")}
    lines = [f"{where['device']} {versions} commit {where['git_commit'][:7]}"]
    lines.append(f"clock: {how['clock']}; order: {how['order']}")
    for what in ("forward", "forward_backward"):
        samples = [(row[what]["ours_samples_ms"], row["key"]) for row in rows]
        pairs = sorted((max(times) / min(times) - 1, key) for times, key in samples)
        lines.append(f"our samples differ, {what}: median {pairs[len(pairs) // 2][0]:.1%}; by more than 10 %:")
        lines += [f"    {key.removeprefix('grid ')}: {spread:.0%}" for spread, key in pairs if spread > 0.1]
    for side in ("ours", "fla"):
        found = [error for row in rows for error in row["errors"].get(side, {}).values()]
        if found:
            largest = max(found)
            lines.append(f"largest error of {side:4} in outputs and gradients, {len(rows)} shapes: {largest:.1e}")
    return "\n".join(lines)


def predicted_ms(row: dict[str, Any], operator: dict[str, Any]) -> float:
    """The roofline's time of the operator's forward for one row, by the ceilings of the same run."""
    shape = cost.Shape(**{name: row[name] for name in ("B", "L", "H", "d_k", "d_v")})
    rates = (operator["ceilings"][name] for name in ("copy_bytes_per_s", "matmul_flops_per_s"))
    return 1e3 * cost.roofline_time(cost.two_kernels(shape), *rates)


def forward_table(operator: Record) -> str:
    """The operator's forward against its prediction and others, and how far off the prediction is."""
    if operator is None:
        return NOTHING
    heads = ("predicted", "ours", "fla", "softmax", "recurrent")
    lines = [f"{'B x L x H x d':>18} segments" + "".join(f"{head:>10}" for head in heads) + "   ms, forward"]
    for row in grid(operator):
        other = {name: timed.get("ms") for name, timed in row.get("others", {}).items()}
        times = [predicted_ms(row, operator), row["forward"]["ours_ms"], row["forward"].get("fla_ms")]
        times += [other.get("softmax_attention.forward"), other.get("recurrent.forward")]
        name = f"{row['B']} x {row['L']} x {row['H']} x {row['d_k']}"
        numbers = "".join(f"{x:10.3f}" if x is not None else f"{'-':>10}" for x in times)
        lines.append(f"{name:>18} {row['parts']:8}{numbers}")
    for title, split in (("walked whole", False), ("split", True)):
        rows = [row for row in grid(operator) if (row["parts"] > 1) == split]
        off = sorted(row["forward"]["ours_ms"] / predicted_ms(row, operator) for row in rows)
        if off:
            lines.append(f"sequences {title}: {len(off)} shapes, measured / predicted {off[0]:.1f} to {off[-1]:.1f}")
    return "\n".join(lines)


def host_table(operator: Record) -> str:
    """Single sequences: what their bytes would take, and what a call takes."""
    rows = operator["rows"] if operator else []
    lines = [f"{'B x L x H x d, ms':>20} {'bytes, forward + backward':>26} {'forward':>9} {'with backward':>14}"]
    for row in rows:
        if row["status"] == "ok" and row.get("B") == 1 and row["key"].startswith(("grid", "small")):
            bytes_ms = 1e3 * row["forward_backward"]["compulsory_bytes"] / row["copy_bytes_per_s"]
            name = f"{row['B']} x {row['L']} x {row['H']} x {row['d_k']}"
            times = f"{row['forward']['ours_ms']:9.3f} {row['forward_backward']['ours_ms']:14.3f}"
            lines.append(f"{name:>20} {bytes_ms:26.3f} {times}")
    return "\n".join(lines) if len(lines) > 1 else NOTHING


def lead(operator: Record) -> Figure:
    """fla's time over ours against the length, forward and with the backward."""
    fig, axes = plotting.figure(columns=2, height=3.4, sharey=True)
    for ax, what in zip(axes, ("forward", "forward_backward"), strict=True):
        for style, d in zip(FORMS, (64, 128, 256), strict=False):
            rows = [row for row in grid(operator) if row["d_k"] == d and row[what].get("ratio")]
            full = [(row["L"], row[what]["ratio"]) for row in rows if row["B"] * row["L"] == 32768]
            fewer = [(row["L"], row[what]["ratio"]) for row in rows if row["B"] * row["L"] < 32768]
            if full:
                ax.plot(*zip(*sorted(full), strict=True), **style, label=f"d = {d}")
            if fewer:
                hollow = {**style, "linestyle": "none", "fillstyle": "none", "markersize": 9}
                ax.plot(*zip(*fewer, strict=True), **hollow, label=f"d = {d}, one sequence")
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set(title=what.replace("_", " + "), xlabel="length of a sequence", xscale="log", ylim=(0, None))
        ax.set_xticks([1024, 4096, 16384], ["1,024", "4,096", "16,384"])
        ax.minorticks_off()
    axes[0].set(ylabel="fla / ours")
    if grid(operator):
        fig.legend(*axes[0].get_legend_handles_labels(), fontsize=9, ncols=3, loc="outside lower center")
    return fig


def lead_table(operator: Record) -> str:
    """The smallest and largest leads over fla, and the geometric mean."""
    lines = []
    for what in ("forward", "forward_backward"):
        rows = sorted((row for row in grid(operator) if row[what].get("ratio")), key=lambda row: row[what]["ratio"])
        for title, some in (("least", rows[:4]), ("most", rows[-2:])):
            shapes = [f"{row[what]['ratio']:.2f} at {row['B']}x{row['L']}x{row['H']}x{row['d_k']}" for row in some]
            if shapes:
                lines.append(f"{what.replace('_', ' + '):18} {title:5}: {', '.join(shapes)}")
        if rows:
            mean = torch.tensor([row[what]["ratio"] for row in rows]).log().mean().exp()
            lines.append(f"{what.replace('_', ' + '):18} geometric mean of {len(rows)} shapes: {mean:.2f}")
    return "\n".join(lines) or NOTHING


def paper_figure(record: Record, in_paper: dict[int, list[float]]) -> Figure:
    """Chunkwise over recurrent: the paper's numbers and ours, a panel for each head size."""
    lengths = [512, 1024, 2048, 4096, 8192, 16384]
    fig, axes = plotting.figure(columns=3, height=3.3, sharey=True)
    for ax, (d, speed_up) in zip(axes, in_paper.items(), strict=True):
        ax.loglog(lengths, speed_up, color="#7F7F7F", marker="o", fillstyle="none", linestyle="--", label="the paper")
        rows = [row for row in (record or {"rows": []})["rows"] if row["status"] == "ok" and row["d"] == d]
        if rows:
            at, found = [row["L"] for row in rows], [row["speed_up"] for row in rows]
            ax.plot(at, found, color="black", marker="s", linestyle="-", label="ours")
            again = [row["recurrent_ms"] / row["chunkwise_again_ms"] for row in rows]
            ax.vlines(at, found, again, color="black", linewidth=3, alpha=0.5, label="ours, timed again")
        ax.set(title=f"d = {d}", xlabel="length")
        ax.set_xticks([512, 2048, 8192], ["512", "2,048", "8,192"])
        ax.set_yticks([5, 10, 20, 40, 80], ["5", "10", "20", "40", "80"])
        ax.minorticks_off()
    axes[0].set_ylabel("recurrent / chunkwise time")
    fig.legend(*axes[0].get_legend_handles_labels(), fontsize=9, ncols=3, loc="outside lower center")
    return fig


def paper_table(record: Record) -> str:
    """Points whose two timings differ by more than a tenth."""
    lines = []
    for row in (record or {"rows": []})["rows"]:
        spread = row["chunkwise_again_ms"] / row["chunkwise_ms"]
        if max(spread, 1 / spread) > 1.1:
            again = row["recurrent_ms"] / row["chunkwise_again_ms"]
            lines.append(f"{row['key']:14} {row['speed_up']:5.1f}, by the second timing {again:5.1f}")
    for other in (record or {"provenance": {}})["provenance"].get("also", []):
        lines.append(f"from another run of {other['date'][:16]}: {other['rows']} - {other['remark']}")
    return "\n".join(lines) or NOTHING


# --- A. A stage taken apart ---------------------------------------------------------------------------------------
INVERTING = ("ut_kernel", "chunk_inverse", "one_kernel")
FLOAT32 = ("ut_kernel", "one_kernel")  # their dots take float32 operands, which tensor cores do not multiply in full


def kernels_of(ladder: Record) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(stage, kernel) for every kernel of the ladder."""
    return [(row, kernel) for row in ladder_rows(ladder) for kernel in row["kernels"]]


def at_once(kernel: dict[str, Any]) -> int:
    """Programs that fit on one SM of a Hopper GPU, by registers, shared memory and warps.

    >>> at_once({"warps": 4, "registers": 255, "shared_bytes": 110_000})
    2
    """
    registers = 32 * kernel["warps"] * -(-kernel["registers"] // 8) * 8
    room = (65536 // registers, 233472 // (kernel["shared_bytes"] + 1024), 64 // kernel["warps"], 32)
    return max(1, min(room))


def waves(kernel: dict[str, Any], ladder: dict[str, Any]) -> int:
    """How many times the chip is filled with programs, one filling after the other."""
    return -(-kernel["programs"] // (at_once(kernel) * ladder["settings"]["multiprocessors"]))


def requested(row: dict[str, Any], kernel: dict[str, Any], ladder: dict[str, Any]) -> tuple[float, float]:
    """Gigabytes that the programs ask for, and the roofline's ms if each cost as much as one from HBM.

    Blocks are 64 values wide, or 128 keys.  Raises ValueError if the row was measured with other blocks.
    """
    shape = cost.Shape(*(row[name] for name in ("B", "L", "H", "d", "d")), C=row["chunk"], block_v=64, block_k=128)
    save, back = ("Vn", cost.fused_backward) if row["d"] <= 64 else ("Vn states", cost.backward)
    forms = {
        "linear attention": cost.linear_attention(shape),
        "four kernels": cost.delta_rule_in_steps(shape),
        "two kernels": cost.two_kernels(shape),
        "operator, training": cost.two_kernels(shape, save=save),
        "operator, backward": back(shape),
    }
    counted = next(c for c in forms[row["stage"]] if c.name == kernel["name"])
    if (counted.bytes, counted.flops) != (kernel["bytes"], kernel["flops"]):
        raise ValueError(f"{row['key']}, {kernel['kernel']}: measured with other blocks than these")
    rates = (ladder["ceilings"][name] for name in ("copy_bytes_per_s", "matmul_flops_per_s"))
    work = (counted.requested, counted.flops)
    return counted.requested / 1e9, 1e3 * max(x / rate for x, rate in zip(work, rates, strict=True))


def occupancy_table(ladder: Record) -> str:
    """Kernels that do not invert: against prediction and against what is asked for, resident programs, waves, steps."""
    if ladder is None:
        return NOTHING
    lines = [
        f"{'':52}measured /              asked              at once,",
        f"{'stage':28}{'kernel':24}predicted   / asked    TB/s  TFLOP/s   waves x steps of us   spills",
    ]
    for row, kernel in kernels_of(ladder):
        if kernel["kernel"] in INVERTING or row["stage"] == "one token":
            continue
        gigabytes, asked = requested(row, kernel, ladder)
        step = 1e3 * kernel["ms"] / waves(kernel, ladder) / kernel["steps"]
        lines.append(
            f"{row['stage'] + ', d = ' + str(row['d']):28}{kernel['kernel']:24}"
            f"{kernel['ratio']:9.2f}{kernel['ms'] / asked:10.2f}"
            f"{gigabytes / kernel['ms']:8.2f}{kernel['flops'] / kernel['ms'] / 1e9:9.0f}"
            f"{at_once(kernel):6},{waves(kernel, ladder):4} x {kernel['steps']:2} of {step:4.1f}{kernel['spills']:11}"
        )
    return "\n".join(lines)


def inverse_table(ladder: Record) -> str:
    """Kernels that invert: against prediction, and what their float32 dots alone would take."""
    if ladder is None:
        return NOTHING
    lines = [
        f"{'':43}         at once,                      float32 dots alone:",
        f"{'stage':28}{'kernel':15} ratio   waves x steps of us   spills   ms, share of the time",
    ]
    for row, kernel in kernels_of(ladder):
        if kernel["kernel"] not in INVERTING or row["stage"] == "operator, training":
            continue
        step = 1e3 * kernel["ms"] / waves(kernel, ladder) / kernel["steps"]
        dots = row.get("float32_ms") if kernel["kernel"] in FLOAT32 else None
        lines.append(
            f"{row['stage'] + ', d = ' + str(row['d']):28}{kernel['kernel']:15}{kernel['ratio']:6.1f}"
            f"{at_once(kernel):5},{waves(kernel, ladder):4} x {kernel['steps']:2} of {step:6.1f}{kernel['spills']:8}   "
            + (f"{dots:5.2f}, {dots / kernel['ms']:.0%}" if dots else "")
        )
    return "\n".join(lines)


KINDS = {
    "scan along the chunks": ("linear_attention_kernel", "state_kernel", "chunk_scan_fwd", "chunk_scan_bwd"),
    "parallel over chunks": ("wu_kernel", "output_kernel", "chunk_bwd_dqk"),
    "one token": ("recurrent",),
    "inverse, float16 dots": ("chunk_inverse",),
    "inverse, float32 dots": FLOAT32,
}


def measured_against_predicted(ladder: Record) -> Figure:
    """Every kernel of the ladder by kind.  The prediction for float32 dots uses the rate of float32 products."""
    fig, ax = plotting.figure(height=3.8)
    line = torch.logspace(-2, 1, 2)
    ax.fill_between(line, 0.6 * line, 1.4 * line, color="0.88")
    ax.loglog(line, line, color="black", linewidth=0.8)
    for style, (kind, names) in zip(SERIES, KINDS.items(), strict=False):
        points = []
        for row, kernel in kernels_of(ladder):
            if kernel["kernel"] in names:
                slow = row.get("float32_ms", 0.0) if kernel["kernel"] in FLOAT32 else 0.0
                points.append((max(kernel["predicted_ms"], slow), kernel["ms"]))
        ax.plot(*(zip(*points, strict=True) if points else ([], [])), **{**style, "linestyle": "none"}, label=kind)
    ax.set(xlabel="predicted, ms", ylabel="measured, ms")
    ax.legend(fontsize=9)
    return fig


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
        ax.set_xticks(range(len(KEYS)), ["0", ".25", ".5", ".75", ".9", ".99", "1"], fontsize=8)
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


def units_table(microscope: Record) -> str:
    """The operator's largest error in units u of its format, for independent, similar and identical keys."""
    if microscope is None:
        return NOTHING

    def largest(form: str, axis: str, cosine: Any) -> float:
        for row in microscope["rows"]:
            if (row["section"], row.get("axis"), row.get("format")) == ("operator", axis, form):
                point = next(p for p in row["points"] if p["cosine"] == cosine)
                return max(point["errors"][name]["max"] for name in OUTPUTS)
        return float("nan")

    lines = [f"{'largest error / u':20} beta up to 1: cosine 0, 0.9, identical   beta up to 2: the same"]
    for form, u in microscope["settings"]["unit_roundoff"].items():
        cells = [
            "".join(f"{largest(form, axis, c) / u:{width}.1f}" for c, width in ((0.0, 16), (0.9, 7), ("identical", 7)))
            for axis in ("cosine", "cosine, beta to 2")
        ]
        lines.append(f"{form:20} {cells[0]}        {cells[1]}")
    return "\n".join(lines)


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
            ax.legend(fontsize=8, loc="upper right" if form == "float16" else "center right")
    axes[0].set(ylabel="relative error of T")
    return fig


def inverses_table(microscope: Record) -> str:
    """Errors of T, and of o and dbeta if the inverse alone is wrong, for six ways to invert."""
    lines = [f"{'beta up to 2':26} {'cosine 0':>24} {'cosine 0.9':>24} {'identical':>24}"]
    lines.append(f"{'':26} " + f"{'T':>8}{'o':>8}{'dbeta':>8} " * 3)
    wanted = {f"{name}, {form}" for name in METHODS for form in ("float16", "float32")}
    for row in microscope["rows"] if microscope else []:
        if row["section"] == "inverse" and row["axis"] == "cosine, beta to 2" and row["method"] in wanted:
            cells = []
            for point in (p for p in row["points"] if p["cosine"] in (0.0, 0.9, "identical")):
                for name in ("T", "o", "dbeta"):
                    found = point["errors"][name]
                    cells.append(f"{'-' if found['not_finite'] else format(found['max'], '.0e'):>8}")
            lines.append(f"{row['method']:26} " + " ".join("".join(cells[i : i + 3]) + " " for i in (0, 3, 6)).rstrip())
    return "\n".join(line.rstrip() for line in lines) if len(lines) > 2 else NOTHING


# --- C. A chunk on Hopper ------------------------------------------------------------------------------------------
CHUNK, HEAD = 64, 128
X = 2 * HEAD  # bytes of a row of q, k, v or o: the unit in which the kernels' log counts


def owner(row: int, column: int) -> tuple[int, int]:
    """Warp and lane that hold an entry of a wgmma accumulator, one warpgroup's 64 rows.

    >>> owner(0, 0), owner(0, 2), owner(1, 0), owner(8, 0), owner(16, 0)
    ((0, 0), (0, 1), (0, 4), (0, 0), (1, 0))
    """
    return row // 16, row % 8 * 4 + column % 8 // 2


def accumulator_layout(rows: int = 16, columns: int = 16) -> Figure:
    """Who holds which entry: a warpgroup's four warps (left), and the lanes of one warp in a corner (right)."""
    fig, (whole, corner) = plotting.figure(columns=2, height=3.2, width_ratios=[1, 1.6])
    colours = [style["color"] for style in SERIES[:4]]
    for row in range(0, 64, 16):
        warp, _ = owner(row, 0)
        whole.add_patch(Rectangle((0, row), 64, 16, fc=colours[warp], alpha=0.6, ec="white"))
        whole.text(32, row + 8, f"warp {warp}", ha="center", va="center", fontsize=9)
    whole.set(xlim=(0, 64), ylim=(64, 0), xlabel="64 columns", ylabel="64 rows (tokens)", title="one warpgroup")
    for row in range(rows):
        for column in range(columns):
            warp, lane = owner(row, column)
            shade = 0.85 if lane == 5 else 0.25
            corner.add_patch(Rectangle((column, row), 1, 1, fc=colours[warp], alpha=shade, ec="white"))
            corner.text(column + 0.5, row + 0.5, str(lane), ha="center", va="center", fontsize=6.5)
    corner.set(xlim=(0, columns), ylim=(rows, 0), title="warp 0: the lane that holds each entry (lane 5 dark)")
    corner.title.set_fontsize(9)
    for ax in (whole, corner):
        ax.grid(False)
        ax.set(xticks=[], yticks=[])
    return fig


@dataclass(frozen=True)
class Event:
    """What one part of an SM does from `start` to `end`, in microseconds, for chunk `chunk`."""

    lane: str
    name: str
    chunk: int
    start: float
    end: float


#: Rates of one SM, an H100's divided by 132: bytes and bfloat16 operations a microsecond; and entries of a tile that
#: its 128 lanes handle in a microsecond, at 1.7 GHz with eight instructions for each.  Assumptions, not measurements.
RATES = {"memory": 3.0e12 / 132 / 1e6, "dots": 6.8e14 / 132 / 1e6, "threads": 128 * 1.7e3 / 8}
LANES = ("TMA, loads", "tensor cores", "threads", "TMA, stores")


def source_lines(kernel: Any, *, gate: bool = False) -> list[str]:
    """The source of a kernel for Hopper, with gates or without."""
    return resolve(inspect.getsource(kernel.fn).splitlines(), {"GATE": gate})


def products_in_source(kernel: Any) -> list[str]:
    """What the products of a kernel for Hopper make, in the order in which its source begins them, without gates.

    >>> from dn_lib.kernels.hopper.scan import chunk_scan_fwd
    >>> products_in_source(chunk_scan_fwd)
    ['read', 'O', 'P', 'E', 'S', 'O']
    """
    lines = source_lines(kernel)
    return [found[1] for line in lines if (found := re.match(r"\s+(\w+) = (?:product|add)\(", line))]


def schedule(chunks: int = 3, *, save: bool = True) -> list[Event]:
    """One program of `chunk_scan_fwd` for Hopper (128 values), on an SM of its own, by the rates of `RATES`.

    Follows the source: what is begun, and what is waited for.  A model: each part works through what it was given in
    order, loads and stores share the rate of memory, and nothing else is contended for.
    """
    events: list[Event] = []
    free = dict.fromkeys(RATES, 0.0)
    now = 0.0  # where the threads are
    square, tile, state = CHUNK * CHUNK, CHUNK * HEAD, HEAD * HEAD
    work = {  # FLOPs of each product, by what is made of what
        "K S": 2 * CHUNK * HEAD * HEAD, "Q S": 2 * CHUNK * HEAD * HEAD, "Q Kᵀ": 2 * CHUNK * CHUNK * HEAD,
        "N D R": 2 * CHUNK * CHUNK * HEAD, "Kᵀ Vn": 2 * HEAD * CHUNK * HEAD, "P Vn": 2 * CHUNK * CHUNK * HEAD,
    }  # fmt: skip

    def run(lane: str, name: str, chunk: int, amount: float, rate: str) -> float:
        start = max(now, free[rate])
        free[rate] = start + amount / RATES[rate]
        events.append(Event(lane, name, chunk, start, free[rate]))
        return free[rate]

    def threads(name: str, chunk: int, entries: int) -> None:
        nonlocal now
        now = run("threads", name, chunk, entries, "threads")

    def begin(name: str, chunk: int) -> float:
        return run("tensor cores", name, chunk, work[name], "dots")

    loaded = run("TMA, loads", "k v N q", 0, 2 * (3 * tile + square), "memory")
    for i in range(chunks):
        arrived = loaded
        if i + 1 < chunks:
            loaded = run("TMA, loads", "k v N q", i + 1, 2 * (3 * tile + square), "memory")
        if save:
            run("TMA, stores", "S", i, 2 * state, "memory")
        now = max(now, arrived)
        read = begin("K S", i)
        begin("Q S", i)
        scores = begin("Q Kᵀ", i)
        now = max(now, read)
        threads("R", i, tile)
        errors = begin("N D R", i)
        now = max(now, scores)
        threads("P", i, square)
        now = max(now, errors)
        threads("Vn", i, tile * (2 if save else 1))
        begin("Kᵀ Vn", i)
        outputs = begin("P Vn", i)
        if save:
            run("TMA, stores", "Vn", i, 2 * tile, "memory")
        now = max(now, outputs)
        threads("S, o", i, state + tile)
        run("TMA, stores", "o", i, 2 * tile, "memory")
    return events


def timeline(chunks: int = 2, *, save: bool = True) -> Figure:
    """`schedule` drawn: a lane for each part of the SM, a colour for each chunk."""
    fig, ax = plotting.figure(height=3.6)
    colours = [style["color"] for style in plotting.OTHERS]
    for event in schedule(chunks, save=save):
        y, width = -LANES.index(event.lane), event.end - event.start
        colour = colours[event.chunk % len(colours)]
        ax.add_patch(Rectangle((event.start, y - 0.4), width, 0.8, fc=colour, alpha=0.6, ec="black", lw=0.6))
        ax.text(
            event.start + width / 2, y, event.name, ha="center", va="center", fontsize=6.5, rotation=90 * (width < 0.5)
        )
    end = max(event.end for event in schedule(chunks, save=save))
    ax.set(xlim=(0, end), ylim=(-len(LANES) + 0.4, 0.6), xlabel="microseconds, by the model")
    ax.set_yticks([-i for i in range(len(LANES))], LANES)
    ax.tick_params(axis="y", length=0)
    ax.grid(False)
    return fig


def busy(lane: str, events: list[Event]) -> float:
    """The share of the time in which a lane works.

    >>> busy("threads", [Event("threads", "a", 0, 0.0, 1.0), Event("threads", "b", 0, 3.0, 4.0)])
    0.5
    """
    return sum(e.end - e.start for e in events if e.lane == lane) / max(e.end for e in events)


def backward_kernels() -> dict[str, tuple[cost.Cost, ...]]:
    """The two backward passes for heads of 128: Triton's two kernels, and the one for Hopper."""
    shape = cost.Shape(B=16, L=2048, H=16, d_k=HEAD, d_v=HEAD)
    reads, writes = ("q", "k", "beta", "N", "Vn", "do", "states"), ("dq", "dk", "dv", "dbeta")
    size = shape.tensor_bytes
    C, d, tokens = CHUNK, HEAD, shape.tokens
    flops = tokens * (12 * d * d + 18 * C * d)  # six products with a state in them, nine without
    hopper = cost.Cost(
        "chunk_scan_bwd, Hopper", {n: size(n) for n in reads}, {n: size(n) for n in writes}, flops, steps=shape.chunks
    )
    return {"two kernels": cost.backward(shape), "one kernel": (hopper,)}


def backward_table() -> str:
    """Bytes of each tensor that the two backward passes read and write, in X for a token and head.

    What has one number a row (beta and its gradient) is left out of the columns.
    """
    rows = 16 * 2048 * 16
    names = ("q", "k", "N", "Vn", "do", "dv", "states", "dstates", "dq", "dk")
    lines = [f"{'':24}" + "".join(f"{name:>8}" for name in names) + f"{'sum':>8}"]
    for title, kernels in backward_kernels().items():
        total = 0.0
        for kernel in kernels:
            moved = [(kernel.reads.get(n, 0) + kernel.writes.get(n, 0)) / rows / X for n in names]
            total += sum(moved)
            cells = "".join(f"{x:8.1f}" if x else f"{'':8}" for x in moved)
            lines.append(f"{kernel.name:24}{cells}{sum(moved):8.1f}")
        lines.append(f"{'  ' + title:24}{'':80}{total:8.1f} X")
    return "\n".join(lines)


def weak_rows(strengths: Tensor, dtype: torch.dtype, rule: str) -> Tensor:
    """Relative error of E, got back from what the forward kept in `dtype` for a row of each strength.

    rule: "Vn" keeps beta E; "bfloat16" beta E, and 2^-40 E below 2^-40; "float16" beta E, and E below 2^-6.
    """
    g = torch.Generator().manual_seed(0)
    E = torch.randn(len(strengths), 256, generator=g, dtype=torch.float64)
    factor = {
        "Vn": strengths,
        "bfloat16": strengths.clamp(min=2.0**-40),
        "float16": torch.where(strengths < 2.0**-6, 1.0, strengths),
    }[rule][:, None]
    back = (factor * E).to(dtype).double() / factor
    return (back - E).norm(dim=1) / E.norm(dim=1)


def weak_rows_figure() -> Figure:
    """`weak_rows` for three rules, by the strength of a row."""
    exponents = torch.arange(-60, 2, 2, dtype=torch.float64)
    strengths = torch.exp2(exponents)
    fig, ax = plotting.figure(height=3.0)
    cases = (
        ("float16, Vn kept", torch.float16, "Vn"),
        ("float16, E kept below $2^{-6}$", torch.float16, "float16"),
        ("bfloat16, $2^{-40} E$ kept below $2^{-40}$", torch.bfloat16, "bfloat16"),
    )
    for style, (label, dtype, rule) in zip(FORMS, cases, strict=False):
        ax.plot(exponents, weak_rows(strengths, dtype, rule), **style, label=label)
    ax.set(xlabel=r"$\log_2 \beta$", ylabel="error of E, got back", yscale="log", ylim=(1e-4, 3))
    ax.legend(fontsize=9)
    return fig


def shared_memory(values: int = HEAD) -> dict[str, int]:
    """Kilobytes of shared memory of each buffer of `chunk_scan_fwd` for Hopper, read off its source.

    >>> sum(shared_memory(128).values()), sum(shared_memory(64).values())
    (200, 144)
    """
    from dn_lib.kernels.hopper import scan

    sizes = {"C": CHUNK, "D": HEAD, "VALUES": values}
    source = "\n".join(source_lines(scan.chunk_scan_fwd))
    found = re.findall(r"(\w+)_tiles = tiles\((\d), (\w+), (\w+)\)", source)
    return {name: 2 * int(count) * sizes[rows] * sizes[columns] // 1024 for name, count, rows, columns in found}


def hopper_gain(operator: Record) -> str:
    """Rows of the operator's result that say that they ran the kernels for Hopper; a sentence if there are none."""
    rows = [row for row in grid(operator) if row.get("gluon") or "hopper" in str(row.get("plan", "")).lower()]
    if not rows:
        return "no stored row was measured with the kernels for Hopper: their gain is not measured yet"
    lines = [f"{'B x L x H x d':>18}{'forward':>10}{'with backward':>15}   ms"]
    for row in rows:
        name = f"{row['B']} x {row['L']} x {row['H']} x {row['d_k']}"
        lines.append(f"{name:>18}{row['forward']['ours_ms']:10.3f}{row['forward_backward']['ours_ms']:15.3f}")
    return "\n".join(lines)
