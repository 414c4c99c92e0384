"""Drawings and tables of appendix A: how a kernel is measured."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure

from dn_lib import cost
from dn_lib.teaching import plotting
from dn_lib.teaching.figures.appendix.common import NOTHING, SERIES
from dn_lib.teaching.figures.ch5 import FORMS, Record, ladder_rows


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
