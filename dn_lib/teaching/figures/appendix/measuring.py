"""Drawings and tables of appendix A: how a kernel is measured."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure

from dn_lib import cost
from dn_lib.teaching import plotting
from dn_lib.teaching.figures.appendix.common import SERIES
from dn_lib.teaching.figures.ch5 import FORMS, Record, ladder_rows
from dn_lib.teaching.tables import NOTHING, Table, Tables


# --- A. Errors first ----------------------------------------------------------------------------------------
def errors_table(errors: Record, sanitizer: Record, chapters: Record) -> Tables:
    """Errors of random calls, ours over fla's, what compute-sanitizer found, chapters that print otherwise on a GPU."""
    summary = errors["summary"] if errors else {"errors": {}, "ratio_to_fla": {}}
    calls, ratios = [], []
    for dtype, outputs in summary["errors"].items():
        lost, worst = sum(x["not_finite"] for x in outputs.values()), max(x["worst"] for x in outputs.values())
        median = max(x["median"] for x in outputs.values())
        calls.append((dtype, str(outputs["o"]["calls"]), str(lost), f"{median:.0e}", f"{worst:.0e}"))
    for dtype, outputs in summary["ratio_to_fla"].items():
        for name, x in outputs.items():
            above = str(len(x["above_1.1"]))
            ratios.append((dtype, name, str(x["calls"]), f"{x['median']:.2f}", f"{x['max']:.2f}", above))
    found = [
        (tool, str(one["calls"]), str(one["summary"][0]))
        for tool, one in (sanitizer["tools"] if sanitizer else {}).items()
    ]
    moved = [name for name, cells in (chapters["gpu"]["different"] if chapters else {}).items() if cells]
    return Tables(
        Table(("random calls", "calls", "not finite", "largest median error", "worst error"), calls),
        Table(("error, ours / fla", "of", "calls", "median", "most", "above 1.1"), ratios),
        Table(("compute-sanitizer", "calls", "what it says"), found),
        f"Chapters whose text outputs on the GPU differ from the stored ones: {', '.join(moved) or 'none'}.",
    )


def errors_by_keys(errors: Record) -> Table:
    """Geometric means of our error over fla's by number format and by how alike the keys are."""
    head = (
        "format", "keys", "beta to", "calls", "o, ours / fla: mean", "most", "above 1.1", "worst output", "its mean",
        "o, fla again / fla: most", "above 1.1",
    )  # fmt: skip
    summary = errors["summary"] if errors else {}
    means = [row["ratios"] for row in summary.get("ratio_by_configuration", [])]
    if not means:
        return Table(head, [])
    every = [mean for ratios in means for mean in ratios.values()]
    rows = []
    for row in summary.get("ratio_by_keys", []):
        o, again, worst = row["o"], row.get("scatter"), max(row["geometric_means"].items(), key=lambda item: item[1])
        keys = {0.0: "independent", "identical": "identical"}.get(row["bias"], f"common {row['bias']}")
        ours = (str(o["calls"]), f"{o['geometric_mean']:.2f}", f"{o['max']:.2f}", str(o["above_1.1"]))
        other = (f"{again['max']:.2f}", str(again["above_1.1"])) if again else ("", "")
        rows.append((row["dtype"], keys, f"{row['beta_range']:.0f}", *ours, worst[0], f"{worst[1]:.2f}", *other))
    note = f"{len(means)} configurations: geometric means of every output from {min(every):.2f} to {max(every):.2f}."
    return Table(head, rows, notes=[note])


# --- A. How it was measured, and how far ahead ------------------------------------------------------------------
def grid(operator: Record) -> list[dict[str, Any]]:
    """The rows of the grid of shapes that were measured."""
    rows = operator["rows"] if operator else []
    return [row for row in rows if row["key"].startswith("grid") and row["status"] == "ok"]


def _shape(row: dict[str, Any], head: str = "d_k") -> str:
    return f"{row['B']} x {row['L']} x {row['H']} x {row[head]}"


def how_measured(operator: Record) -> Table:
    """Machine, versions, clock; by how much samples of one shape differ; the largest errors."""
    head = ("", "in the stored run")
    if operator is None:
        return Table(head, [])
    where, how, rows = operator["provenance"], operator["settings"], grid(operator)
    versions = {**{name: where[name] for name in ("torch", "triton")}, "fla": how["fla"].get("fla", "absent")}
    lines = [
        ("device", where["device"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("commit", where["git_commit"][:7]),
        ("clock", how["clock"]),
        ("order", how["order"]),
    ]
    for what in ("forward", "forward_backward"):
        samples = [(row[what]["ours_samples_ms"], row["key"]) for row in rows]
        pairs = sorted((max(times) / min(times) - 1, key) for times, key in samples)
        name = what.replace("_", " + ")
        if pairs:
            lines.append((f"our samples differ, {name}", f"median {pairs[len(pairs) // 2][0]:.1%}"))
        far = [f"{key.removeprefix('grid ')}: {spread:.0%}" for spread, key in pairs if spread > 0.1]
        lines.append((f"by more than 10 %, {name}", "; ".join(far) or "no shape"))
    for side in ("ours", "fla"):
        found = [error for row in rows for error in row["errors"].get(side, {}).values()]
        if found:
            what = f"in outputs and gradients, {len(rows)} shapes"
            lines.append((f"largest error of {side}", f"{max(found):.1e} {what}"))
    return Table(head, lines)


def predicted_ms(row: dict[str, Any], operator: dict[str, Any]) -> float:
    """The roofline's time of the operator's forward for one row, by the ceilings of the same run."""
    shape = cost.Shape(**{name: row[name] for name in ("B", "L", "H", "d_k", "d_v")})
    rates = (operator["ceilings"][name] for name in ("copy_bytes_per_s", "matmul_flops_per_s"))
    return 1e3 * cost.roofline_time(cost.two_kernels(shape), *rates)


def forward_table(operator: Record) -> Table:
    """The operator's forward against its prediction and others, and how far off the prediction is."""
    head = ("forward, ms: B x L x H x d", "segments", "predicted", "ours", "fla", "softmax", "recurrent")
    if operator is None:
        return Table(head, [])
    rows, notes = [], []
    for row in grid(operator):
        other = {name: timed.get("ms") for name, timed in row.get("others", {}).items()}
        times = [predicted_ms(row, operator), row["forward"]["ours_ms"], row["forward"].get("fla_ms")]
        times += [other.get("softmax_attention.forward"), other.get("recurrent.forward")]
        rows.append((_shape(row), str(row["parts"]), *(f"{x:.3f}" if x is not None else "-" for x in times)))
    for title, split in (("walked whole", False), ("split", True)):
        some = [row for row in grid(operator) if (row["parts"] > 1) == split]
        off = sorted(row["forward"]["ours_ms"] / predicted_ms(row, operator) for row in some)
        if off:
            notes.append(f"Sequences {title}: {len(off)} shapes, measured / predicted {off[0]:.1f} to {off[-1]:.1f}.")
    return Table(head, rows, notes)


def host_table(operator: Record) -> Table:
    """Single sequences: what their bytes would take, and what a call takes."""
    rows = []
    for row in operator["rows"] if operator else []:
        if row["status"] == "ok" and row.get("B") == 1 and row["key"].startswith(("grid", "small")):
            bytes_ms = 1e3 * row["forward_backward"]["compulsory_bytes"] / row["copy_bytes_per_s"]
            times = (bytes_ms, row["forward"]["ours_ms"], row["forward_backward"]["ours_ms"])
            rows.append((_shape(row), *(f"{x:.3f}" for x in times)))
    return Table(("times in ms: B x L x H x d", "bytes, forward + backward", "forward", "with backward"), rows)


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


def lead_table(operator: Record) -> Table:
    """The smallest and largest leads over fla, and the geometric mean."""
    lines = []
    for what in ("forward", "forward_backward"):
        name = what.replace("_", " + ")
        rows = sorted((row for row in grid(operator) if row[what].get("ratio")), key=lambda row: row[what]["ratio"])
        for title, some in (("least", rows[:4]), ("most", rows[-2:])):
            lines += [(name, title, f"{row[what]['ratio']:.2f}", _shape(row)) for row in some]
        if rows:
            mean = torch.tensor([row[what]["ratio"] for row in rows]).log().mean().exp()
            lines.append((name, "geometric mean", f"{mean:.2f}", f"{len(rows)} shapes"))
    return Table(("pass", "", "fla / ours", "at B x L x H x d"), lines)


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


def paper_table(record: Record) -> Table:
    """Points whose two timings differ by more than a tenth, and what the result says of runs it was joined from."""
    rows = []
    for row in (record or {"rows": []})["rows"]:
        spread = row["chunkwise_again_ms"] / row["chunkwise_ms"]
        if max(spread, 1 / spread) > 1.1:
            again = row["recurrent_ms"] / row["chunkwise_again_ms"]
            rows.append((row["key"], f"{row['speed_up']:.1f}", f"{again:.1f}"))
    also = [
        f"From another run of {other['date'][:16]}: {', '.join(other['rows'])}; {other['remark']}"
        for other in (record or {"provenance": {}})["provenance"].get("also", [])
    ]
    none = NOTHING if record is None else "no point has two timings that differ by more than a tenth"
    head = ("timings that differ by more than a tenth", "speed-up", "by the second timing")
    return Table(head, rows, also, empty="\n".join([none, *also]))


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

    Of a result from before requests were counted, with blocks of 64 values, or 128 keys; it raises ValueError if the
    row was measured with other blocks.
    """
    if "requested" in kernel:
        return _rated(kernel["requested"], kernel["flops"], ladder)
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
    return _rated(counted.requested, counted.flops, ladder)


def _rated(asked: int, flops: int, ladder: dict[str, Any]) -> tuple[float, float]:
    rates = (ladder["ceilings"][name] for name in ("copy_bytes_per_s", "matmul_flops_per_s"))
    return asked / 1e9, 1e3 * max(x / rate for x, rate in zip((asked, flops), rates, strict=True))


def _rounds(kernel: dict[str, Any], ladder: dict[str, Any]) -> tuple[str, ...]:
    """Programs resident on an SM, waves, steps of a program, and microseconds of a step."""
    step = 1e3 * kernel["ms"] / waves(kernel, ladder) / kernel["steps"]
    return str(at_once(kernel)), str(waves(kernel, ladder)), str(kernel["steps"]), f"{step:.1f}"


def occupancy_table(ladder: Record) -> Table:
    """Kernels that do not invert: against prediction and against what is asked for, resident programs, waves, steps."""
    rows = []
    for row, kernel in kernels_of(ladder) if ladder else []:
        if kernel["kernel"] in INVERTING or row["stage"] == "one token":
            continue
        gigabytes, asked = requested(row, kernel, ladder or {})
        rates = (f"{gigabytes / kernel['ms']:.2f}", f"{kernel['flops'] / kernel['ms'] / 1e9:.0f}")
        ratios = (f"{kernel['ratio']:.2f}", f"{kernel['ms'] / asked:.2f}")
        name = (row["stage"], str(row["d"]), f"`{kernel['kernel']}`")
        rows.append((*name, *ratios, *rates, *_rounds(kernel, ladder or {}), str(kernel["spills"])))
    head = (
        "stage", "d", "kernel", "measured / predicted", "measured / asked", "asked, TB/s", "TFLOP/s", "at once",
        "waves", "steps", "us a step", "spills",
    )  # fmt: skip
    return Table(head, rows)


def inverse_table(ladder: Record) -> Table:
    """Kernels that invert: against prediction, and what their float32 dots alone would take."""
    rows = []
    for row, kernel in kernels_of(ladder) if ladder else []:
        if kernel["kernel"] not in INVERTING or row["stage"] == "operator, training":
            continue
        dots = row.get("float32_ms") if kernel["kernel"] in FLOAT32 else None
        alone = (f"{dots:.2f}", f"{dots / kernel['ms']:.0%}") if dots else ("", "")
        name = (row["stage"], str(row["d"]), f"`{kernel['kernel']}`")
        rows.append((*name, f"{kernel['ratio']:.1f}", *_rounds(kernel, ladder or {}), str(kernel["spills"]), *alone))
    head = (
        "stage", "d", "kernel", "measured / predicted", "at once", "waves", "steps", "us a step", "spills",
        "float32 dots alone, ms", "of the time",
    )  # fmt: skip
    return Table(head, rows)


KINDS = {
    "scan along the chunks": (
        "linear_attention_kernel",
        "state_kernel",
        "walk_wu_kernel",
        "walk_kernel",
        "chunk_scan_fwd",
        "chunk_scan_bwd",
    ),
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
