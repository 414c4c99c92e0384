"""Chapter 6: the stored runs of models, read, compared and drawn, and the ablations of a layer.

Results are read from `book/results`. Where one is missing a table says so, and a figure is empty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from dn_lib.teaching import plotting
from dn_lib.teaching.results import Record
from dn_lib.teaching.results import origin as origin
from dn_lib.teaching.results import stored as stored
from dn_lib.training import bits_per_byte

Runs = Mapping[str, dict[str, Any]]

FILES = {"hybrid": "hybrid_training", "DeltaNet": "delta_training", "Transformer": "attention_training"}
LABELS = {"delta": "DeltaNet", "fla": "fla's DeltaNet", "attention": "Transformer"}
MISSING = "not measured yet; `python -m experiments --list` says what measures it on a GPU"


# --- The layer, part by part ------------------------------------------------------------------------------------
def ablations(record: Record) -> Figure:
    """For each variant of a layer the share of questions answered: a mark for each seed, a bar to their median.

    A variant that is held against another than the first has a corner before its name: it stands below that other.
    """
    found = record["summary"] if record else {}
    fig, ax = plotting.figure(height=0.3 * max(len(found), 3) + 0.9)
    if not found:
        ax.text(0.5, 0.5, "no measurement in this copy", ha="center", transform=ax.transAxes)
    rows = [row for row in record["rows"] if row["status"] == "ok"] if record else []
    kinds = {"linear attention": "linear", "attention": "softmax", "window of 4": "softmax"}
    kinds["no convolution, attention"] = "softmax"
    for y, (name, about) in enumerate(found.items()):
        style = plotting.MECHANISMS[kinds.get(name, "delta")]
        ax.barh(y, about["median"], edgecolor=style["color"], facecolor="none", hatch="//", linewidth=1.5)
        values = [row["accuracy"] for row in rows if row["variant"] == name]
        ax.plot(values, [y] * len(values), "o", color="black", markersize=4, fillstyle="none")
        ax.text(1.03, y, f"{about['median']:.0%}", va="center")
    against = {row["variant"]: row["against"] for row in rows}
    first = next(iter(found), "")
    labels = [
        name if against.get(name) in (first, None) else f"\u2514 {name.removesuffix(f', {against[name]}')}"
        for name in found
    ]
    ax.set_yticks(range(len(found)), labels)
    ax.invert_yaxis()
    ax.set(xlabel="questions answered; a circle is a seed", xlim=(0, 1.15), xticks=[0, 0.25, 0.5, 0.75, 1])
    return fig


# --- Three models on the same text ------------------------------------------------------------------------------
def same_task(run: Mapping[str, Any]) -> tuple[Any, ...]:
    """What must agree before two runs may be compared."""
    return run["corpus"]["file_list_sha256"], run["training_tokens"], run["train"]["length"]


def runs(found: Mapping[str, Record] | None = None) -> dict[str, dict[str, Any]]:
    """The stored training runs by name, of those that read what the hybrid read; by default from `book/results`."""
    found = {name: stored(file) for name, file in FILES.items()} if found is None else found
    first = found.get("hybrid")
    return {name: run for name, run in found.items() if run and first and same_task(run) == same_task(first)}


def about(chosen: Runs) -> str:
    """Where the runs come from, on which text, and how to repeat them."""
    lines = [origin(**{file: chosen.get(name)}) for name, file in FILES.items()]
    if run := chosen.get("hybrid"):
        text, steps = run["corpus"], run["train"]["steps"]
        lines += [
            f"corpus {text['name']}: {text['files']:,} files, {text['bytes'] / 1e6:.1f} million bytes",
            f"{run['training_tokens'] / 1e6:.1f} million tokens in {steps:,} steps, each run; "
            f"{run['seconds']:.0f} s of training for the hybrid",
            "to repeat:  python -m dn_lib prepare-data wheels --archive wheels.tar.xz",
            f"            python -m experiments train_hybrid --kind {run['kind']} --corpus wheels.tar.xz "
            f"--steps {steps} --out my_hybrid.json",
        ]
    return "\n".join(lines)


def table(chosen: Runs) -> str:
    """Parameters, speed, bits per byte, cost at names and share of samples that parse."""
    head = f"{'parameters':>12}{'tokens/s':>12}{'of peak':>9}{'bits/byte':>11}{'first':>7}{'later':>7}{'parse':>10}"
    lines = [f"{'':12}{head}"]
    for name, run in chosen.items():
        last, share = run["final"], run["share_that_parses"]
        use = f"{run['flop_use']:.0%}" if run["flop_use"] else "-"
        names = [f"{bits_per_byte(x):.2f}" for x in last.get("loss_at_names", {}).values()] or ["-", "-"]
        error = (share * (1 - share) / len(run["samples"])) ** 0.5
        lines.append(
            f"{name:12}{run['model']['parameters']:12,}{run['tokens_per_second']:12,.0f}{use:>9}"
            f"{last['bits_per_byte']:11.3f}{names[0]:>7}{names[1]:>7}{share:6.0%} ±{error:3.0%}"
        )
    return "\n".join(lines) if chosen else MISSING


def training_runs(chosen: Runs) -> Figure:
    """Loss as tokens go by; by position above the hybrid's; and at first and later occurrences of names."""
    fig, (left, middle, right) = plotting.figure(columns=3, height=3.5)
    for i, (name, run) in enumerate(chosen.items()):
        style, per_step = plotting.MODELS[name], run["train"]["batch"] * run["train"]["length"] / 1e6
        curve = [(record["step"] * per_step, record["bits_per_byte"]) for record in run["evaluations"]]
        left.plot(*zip(*curve, strict=True), **style, markersize=4, label=name)
        where, base = run["final"]["loss_by_position"], chosen["hybrid"]["final"]["loss_by_position"]["loss"]
        more = [bits_per_byte(x - y) for x, y in zip(where["loss"], base, strict=True)]
        middle.semilogx(where["position"], more, **style, markersize=4, base=2)
        names = [bits_per_byte(x) for x in run["final"].get("loss_at_names", {}).values()]
        shade = {"edgecolor": style["color"], "facecolor": "none", "hatch": ("//", "..", "xx")[i]}
        right.bar([k + 0.27 * (i - 1) for k in range(len(names))], names, width=0.25, **shade)
    if run := chosen.get("hybrid"):
        per_step = run["train"]["batch"] * run["train"]["length"] / 1e6
        steps = run["steps"][:: max(len(run["steps"]) // 25, 1)]
        learnt = [(record["step"] * per_step, bits_per_byte(record["loss"])) for record in steps]
        left.plot(*zip(*learnt, strict=True), color="#7F7F7F", linewidth=0.8, label="hybrid, training")
        low = min(record["bits_per_byte"] for record in run["evaluations"])
        left.set_ylim(0.85 * low, 2.6 * low)
        fig.legend(fontsize=9, ncols=4, loc="outside lower center")
    left.set(xlabel="million tokens", ylabel="bits per byte")
    middle.set(xlabel="position in the context", title="above the hybrid's")
    right.set(xlabel="occurrence of a name", xticks=[0, 1], xticklabels=["first", "later"])
    return fig


def mean_loss(run: Mapping[str, Any], low: int, high: int) -> float:
    """Mean over the positions from `low` + 1 to `high`, in bits per byte.

    >>> run = {"final": {"loss_by_position": {"position": [1, 2, 4], "loss": [9.0, math.log(2), 2 * math.log(2)]}}}
    >>> round(mean_loss(run, 1, 4), 3)
    1.667
    """
    position, loss = (run["final"]["loss_by_position"][key] for key in ("position", "loss"))
    inside = [(b - max(a, low), x) for a, b, x in zip([0, *position], position, loss, strict=False) if low < b <= high]
    return bits_per_byte(sum(n * x for n, x in inside) / sum(n for n, _ in inside))


def three_questions(chosen: Runs) -> str:
    """How often the text was read, whether it was over-fitted, what the context gave, and how far the models part."""
    lines = []
    for name, run in chosen.items():
        available, length = run["corpus"].get("train_tokens", run["corpus"]["bytes"]), run["train"]["length"]
        best, last = min(run["evaluations"], key=lambda r: r["bits_per_byte"]), run["evaluations"][-1]
        learnt = [record["loss"] for record in run["steps"][-len(run["steps"]) // 20 :]]
        near, far = mean_loss(run, length // 64, length // 16), mean_loss(run, length // 2, length)
        lines += [
            name,
            f"  each byte of the training text was read {run['training_tokens'] / available:.1f} times",
            f"  validation was lowest, {best['bits_per_byte']:.3f} bits per byte, after "
            f"{best['step'] / last['step']:.0%} of the steps; at the end {last['bits_per_byte']:.3f}, on training "
            f"batches {bits_per_byte(sum(learnt) / len(learnt)):.3f}",
            f"  at positions {length // 64} to {length // 16}: {near:.3f} bits per byte; in the second half: {far:.3f}",
        ]
    ranked = sorted((run["final"]["bits_per_byte"], name) for name, run in chosen.items())
    if ranked:
        lines.append("least first: " + ", ".join(f"{name} {bits / ranked[0][0] - 1:+.1%}" for bits, name in ranked))
    return "\n".join(lines) or MISSING


def samples(run: Mapping[str, Any] | None) -> str:
    """What a model wrote before training, and the first sample for each prompt that parses."""
    if run is None:
        return MISSING
    lines = [f"before: {run['samples_before'][0]['text'][:100]!r}"]
    for prompt in dict.fromkeys(s["prompt"] for s in run["samples"]):
        tried = [s for s in run["samples"] if s["prompt"] == prompt]
        good = [s["text"] for s in tried if s["parses"]]
        lines += [f"\n--- {prompt!r}: {len(good)} of {len(tried)} parse", good[0].strip() if good else ""]
    return "\n".join(lines)


def decoding(chosen: Runs) -> str:
    """Bytes of cache and milliseconds per token at growing contexts."""
    lines = []
    for name, run in chosen.items():
        for point in run["decode"]["points"]:
            memory, ms = point["cache_bytes"] / 2**20, 1000 * point["seconds_per_token"]
            lines.append(f"{name:12} context {point['context']:6d}: {memory:6.2f} MiB of cache, {ms:.1f} ms a token")
    return "\n".join(lines) or MISSING


# --- Checks on several GPUs, and against the authors' library -----------------------------------------------------
def checks(two: Record, conversion: Record) -> str:
    """How far two GPUs are from one, and converted models from those of the authors' library."""
    lines = [origin(two_gpus=two, fla_conversion=conversion)]
    if two:
        lines.append(f"{two['provenance']['device_count']} GPUs, {two['backend']}")
        parts = {"ddp": two["checks"]["ddp"], "fsdp": two["checks"]["fsdp"]}
        parts |= {f"sequence, {kind}": two["checks"]["sequence"][kind] for kind in ("float32", "float64")}
        for name, check in parts.items():
            lines.append(f"  {name:18} at most {check['worst']:.1e} from one process (limit {check['limit']:.0e})")
    if conversion:
        lines.append(
            f"fla {conversion['provenance']['fla']}, relative distance of the logits of models with the same weights"
        )
        apart = conversion["beyond"]
        for kind, limit in conversion["limits"].items():
            rows = [row for row in conversion["rows"] if row["sort"] == kind and "ours_to_fla" in row]
            names = dict.fromkeys(r["variant"] for r in rows if kind != "bfloat16" or r["variant"] not in apart)
            longest = max(row["shape"][1] for row in rows)
            lines.append(
                f"  {kind:8} at most {conversion['worst'][kind]:.1e} (limit {limit:.0e}), up to {longest} tokens: "
                f"{'; '.join(names)}"
            )
        for name, far in apart.items():
            lines.append(
                f"  {name} in bfloat16: {far['ours_to_fla']:.4f} between the two; from float64 fla "
                f"{far['fla_to_float64']:.4f}, ours {far['ours_to_float64']:.4f}"
            )
    return "\n".join(lines)


# --- Where the time goes ------------------------------------------------------------------------------------------
def measured_rows(speed: Record) -> list[dict[str, Any]]:
    """The rows of `throughput` that hold a result."""
    if not speed or "not_measured" in speed:
        return []
    return [row for row in speed["rows"] if row["status"] == "ok"]


def speeds(speed: Record) -> str:
    """Tokens a second of training at each length, and DeltaNet's speed over that of the others."""
    lines = [origin(throughput=speed)]
    if speed is None or not measured_rows(speed):
        return lines[0]
    lines.append("tokens a second, median of the rounds")
    for length, models in speed["summary"]["training"].items():
        lines.append(f"length {length}")
        for name, row in models.items():
            rounds = " and ".join(f"{x:,.0f}" for x in row["rounds"])
            lines.append(
                f"  {LABELS.get(name, name):15}{row['tokens_per_second']:9,.0f} ({rounds}), "
                f"{row['flop_use']:.0%} of peak, at most {row['peak_bytes'] / 2**30:.0f} GiB"
            )
        ratios = {key.split()[-1]: value for key, value in speed["summary"]["ratios"].get(length, {}).items()}
        lines.append("  DeltaNet's speed over that of " + ", of ".join(f"{name} {x:.2f}" for name, x in ratios.items()))
    return "\n".join(lines)


def speed_against_length(speed: Record) -> Figure:
    """Training speed against length, and decoding speed against context."""
    fig, (left, right) = plotting.figure(columns=2)
    lengths = speed["summary"]["training"] if speed and measured_rows(speed) else {}
    for name, label in LABELS.items():
        style = plotting.MODELS[label]
        of_model = {int(length): models[name] for length, models in lengths.items() if name in models}
        left.semilogx(
            list(of_model), [row["tokens_per_second"] / 1000 for row in of_model.values()], **style, base=2, label=label
        )
        rounds = [[x / 1000 for x in row["rounds"]] for row in of_model.values()]
        left.vlines(list(of_model), [min(x) for x in rounds], [max(x) for x in rounds], color=style["color"])
        decoded = [row for row in measured_rows(speed) if row["key"].startswith(f"decode {name} ")]
        if decoded:
            graph = [row["graph_tokens_per_second"] for row in decoded]
            right.semilogx([row["context"] for row in decoded], graph, **style, base=2)
    left.set(xlabel="length", ylabel="thousand tokens a second", title="training", ylim=(0, None))
    right.set(xlabel="context", ylabel="tokens a second", title="decoding", ylim=(0, None))
    left.legend()
    return fig


def profile(speed: Record) -> str:
    """Milliseconds of a step by kind of kernel."""
    profiles = {LABELS.get(r["name"], r["name"]): r for r in measured_rows(speed) if "categories_ms" in r}
    if not profiles:
        return MISSING
    length = next(iter(profiles.values()))["length"]
    lines = [f"{f'ms of a step, length {length}':26}" + "".join(f"{name:>18}" for name in profiles)]
    spent: dict[str, list[str]] = {}
    for n, row in enumerate(profiles.values()):
        for kind, ms in row["categories_ms"].items():
            spent.setdefault(kind, ["-"] * len(profiles))[n] = f"{ms:.1f} ({ms / row['kernels_ms']:3.0%})"
    lines += [f"{kind:26}" + "".join(f"{text:>18}" for text in shown) for kind, shown in spent.items()]
    for title, key in (("all kernels, profiled", "kernels_ms"), ("the step, not profiled", "step_ms")):
        lines.append(f"{title:26}" + "".join(f"{f'{row[key]:.1f}      ':>18}" for row in profiles.values()).rstrip())
    return "\n".join(lines)


def decoding_speeds(speed: Record) -> str:
    """Tokens a second of one sequence as it is launched, and as one graph; and what attention's cache costs."""
    decoded = [row for row in measured_rows(speed) if row["key"].startswith("decode ") and "graph_seconds" in row]
    lines = [
        f"{LABELS[row['name']]:12} context {row['context']:6d}: {row['cache_bytes'] / 2**20:8.1f} MiB of cache, "
        f"{row['tokens_per_second']:3.0f} tokens a second as launched, "
        f"{row['graph_tokens_per_second']:4.0f} as one graph"
        for row in decoded
    ]
    grown = [row for row in decoded if row["name"] == "attention"]
    if grown:
        more = grown[-1]["cache_bytes"] - grown[0]["cache_bytes"]
        longer = 1 / grown[-1]["graph_tokens_per_second"] - 1 / grown[0]["graph_tokens_per_second"]
        rate = more / longer / 1e12 if longer > 0 else math.nan
        lines.append(
            f"attention: {more / 1e9:.1f} GB more of cache cost {1000 * longer:.2f} ms more a token, {rate:.1f} TB/s"
        )
    return "\n".join(lines) or MISSING
