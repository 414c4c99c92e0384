"""Each table as a figure, next to the paper's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dn_lib.teaching import plotting

NAMES = {
    "delta": "DeltaNet", "linear": "linear attention", "gated_delta": "gated DeltaNet", "gla": "GLA",
    "retnet": "RetNet", "attention": "attention", "delta_conv": "DeltaNet, convolution", "gla_conv": "GLA, convolution",
    "delta_one_layer": "DeltaNet, one layer",
}  # fmt: skip
TASKS = {"s3": "permutations of three (S3)", "s5": "permutations of five (S5)", "arithmetic": "arithmetic modulo 5"}
MODELS = ("delta", "linear", "attention", "gated_delta", "gla", "retnet", "delta_conv", "gla_conv")


def style_of(model: str) -> dict[str, Any]:
    """The same for a model in every figure."""
    mechanisms = {"delta": "delta", "linear": "linear", "gated_delta": "gated", "attention": "softmax"}
    if model in mechanisms:
        return plotting.MECHANISMS[mechanisms[model]]
    others = ("gla", "retnet", "delta_conv", "gla_conv")
    return plotting.OTHERS[others.index(model) % len(plotting.OTHERS)]


def draw(table: dict[str, Any], changes: bool = False) -> Figure:
    """A table of the gathered file: by width as lines, anything else as bars with a cross for the paper's number.

    changes: the cells in which one setting of a task is changed, which are left out otherwise.
    """
    cells = [c for c in table["cells"].values() if table["across"] == "width" or is_change(table, c) == changes]
    with plt.rc_context():
        plotting.use_style()
        if table["across"] == "width":
            fig, ax = plotting.figure(height=3.6)
            by_width(ax, table)
        else:
            fig = in_panels(table, cells)
        fig.suptitle(table["title"] + (", one setting changed" if changes else ""), fontsize=12)
        seeds = sorted({len(cell["best"]["seeds"]) for cell in cells})
        few = f"{len(table['cells'])} of {table['all_cells']} cells; seeds: {', '.join(map(str, seeds))}"
        footer = f"{few}; whiskers: from the least to the largest"
        if table["paper"] and not changes:
            footer += f"\npaper: {table['paper']['what']}"
        fig.supxlabel(footer, fontsize=8)
    return fig


def is_change(table: dict[str, Any], cell: dict[str, Any]) -> bool:
    """Whether a cell differs from the plain one of its task and model, in a table that has plain ones."""
    plain = any(set(c["place"]) <= {"task", "model"} for c in table["cells"].values())
    return plain and not set(cell["place"]) <= {"task", "model"}


def in_panels(table: dict[str, Any], cells: list[dict[str, Any]]) -> Figure:
    """A panel for each task, a bar for each of its cells; the paper's number as a cross."""
    tasks = list(dict.fromkeys(c["place"].get("task") for c in cells))
    columns = 3 if len(tasks) > 4 else min(2, len(tasks))
    rows = -(-len(tasks) // columns)
    most = max(sum(c["place"].get("task") == task for c in cells) for task in tasks)
    fig, axes = plotting.figure(rows, columns, height=1.0 + rows * (0.8 + 0.19 * most), squeeze=False, sharex=True)
    for ax in axes.flat[len(tasks) :]:
        ax.set_visible(False)
    for task, ax in zip(tasks, axes.flat, strict=False):
        own = [c for c in cells if c["place"].get("task") == task]
        models = {c["place"]["model"] for c in own}
        means = [100 * c["best"]["mean"] for c in own]
        colours = [style_of(_family(c["place"]["model"]))["color"] for c in own]
        ax.barh(range(len(own)), means, color=colours, alpha=0.7, xerr=_ranges(own, means), capsize=2)
        for i, c in enumerate(own):
            if (paper := paper_of(table, c["place"])) is not None:
                ax.plot([paper], [i], "kx", label="paper")
        ax.set_yticks(range(len(own)), [label_of(c["place"], len(models) > 1) for c in own], fontsize=8)
        ax.invert_yaxis()
        ax.tick_params(axis="x", labelsize=8)
        ax.set_xlim(min(0.0, *means) - 2, 104)
        if task is not None:
            ax.set_title(TASKS.get(task, task.replace("_", " ")), fontsize=9)
    if handles := {label: h for ax in axes.flat for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}:
        fig.legend(handles.values(), handles, fontsize=8, loc="upper right")
    for ax in axes[-1]:
        ax.set_xlabel("score (%)" if table["measure"] == "accuracy" else "scaled accuracy (%)", fontsize=9)
    return fig


def by_width(ax: Axes, table: dict[str, Any]) -> None:
    paper = table["paper"]
    for model in MODELS:
        cells = [c for c in table["cells"].values() if c["place"]["model"] == model]
        cells.sort(key=lambda c: c["place"]["width"])
        style = style_of(model)
        if cells:
            means = [100 * c["best"]["mean"] for c in cells]
            ax.errorbar(
                [c["place"]["width"] for c in cells], means, yerr=_ranges(cells, means), capsize=3,
                label=NAMES[model], **style,
            )  # fmt: skip
        if model in paper:
            places, values = zip(*zip(paper["places"], paper[model], strict=True), strict=True)
            hollow = {**style, "linestyle": ":", "linewidth": 1, "markerfacecolor": "white"}
            ax.plot(places, values, label=f"{NAMES[model]}, paper", **hollow)
    ax.set_xscale("log", base=2)
    ax.set_xticks(paper["places"], [str(x) for x in paper["places"]])
    ax.set(xlabel="width of the model", ylabel="accuracy (%)", ylim=(-3, 104))
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _family(model: str) -> str:
    return "delta" if model == "delta_one_layer" else model


def label_of(place: dict[str, Any], with_model: bool) -> str:
    words = [NAMES[place["model"]]] if with_model or len(place) <= 2 else []
    said = {"beta_range": "beta below {:g}", "delta_steps": "steps: {:g}"}
    for name, value in place.items():
        if name not in ("task", "model"):
            words.append(said.get(name, name + " {:g}").format(value))
    return ", ".join(words)


def paper_of(table: dict[str, Any], place: dict[str, Any]) -> float | None:
    """The paper's number for a cell in per cent, if it has one: by model and task, or by task and a setting."""
    paper, model, task = table["paper"], place["model"], place.get("task")
    more = [f"{name}={value}" for name, value in place.items() if name not in ("task", "model")]
    if not more and model in paper:
        where = task if task is not None else "score"
        return paper[model][paper["places"].index(where)] if where in paper["places"] else None
    if task in paper and len(more) == 1 and more[0] in paper["places"]:
        return 100 * paper[task][paper["places"].index(more[0])]
    return None


def _ranges(cells: list[dict[str, Any]], means: list[float]) -> list[list[float]]:
    """Below and above the mean, from the least to the largest seed."""
    scores = [[100 * s for s in c["best"]["score"]] for c in cells]
    low = [max(0.0, mean - min(s)) for s, mean in zip(scores, means, strict=True)]
    high = [max(0.0, max(s) - mean) for s, mean in zip(scores, means, strict=True)]
    return [low, high]


def save(results: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
    """A PNG for each table that has a cell; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, table in results.items():
        for changes in sorted({table["across"] != "width" and is_change(table, c) for c in table["cells"].values()}):
            fig = draw(table, changes)
            paths.append(folder / f"{name}{'_changes' * changes}.png")
            fig.savefig(paths[-1], dpi=150)
            plt.close(fig)
    return paths
