"""Multi-query associative recall at the paper's size: accuracy of several mixers against the width of the model.

    python -m experiments mqar --budget 110
    python -m experiments mqar --out small.json --device cpu --length 64 --pairs 8 --vocab 256 --widths 64 --steps 300

512 tokens, 64 pairs, 8,192 words, two layers without a feed-forward part.  Each cell (model, width, seed) is trained on
its own, on batches drawn on the GPU, asked on 3,000 other examples, and written when it is done; the same command again
goes on with what is missing, failed or was skipped.  Every mixer but softmax attention has a short convolution of two
taps.  DeltaNet goes through the Triton kernels, the others through PyTorch.

At full length the loss stays for long where it begins, so a cell learns from 64 tokens and 8 pairs first, then 128 and
16, then 256 and 32 (--lessons; 1 does without), each until the accuracy is above 90%, or for an eighth of the steps.
Training ends at --steps, or once the accuracy of 25 batches in a row is above 99%.  A GPU runs the whole step as one
CUDA graph (`steps_by` says whether it could be recorded).

`results` has one entry for each model and width: `accuracy`, one number for each seed, and `steps`, how many were
taken.  `rows` are the cells with their learning curves.  --budget leaves out (`skipped`) a cell that would end later,
judged after its first 25 steps.  One learning rate serves all models unless --learning-rates names several, of which
the best is kept, model by model and width by width: with one, a low accuracy may be the rate's fault, or that of too
few steps, as well as the memory's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dn_lib.data.recall import multi_query_associative_recall
from dn_lib.models import LanguageModel, ModelConfig
from experiments.harness.cli import Experiment, device_of
from experiments.harness.problems import matmul_precision
from experiments.harness.results import Results, first_line, plain

MODELS = {
    "delta": "DeltaNet",
    "linear": "linear attention",
    "gla": "GLA",
    "retnet": "RetNet",
    "mamba": "Mamba",
    "attention": "softmax attention",
}
PAPER = {
    "citation": "yang2024parallelizing",
    "what": "accuracy in per cent at 512 tokens and 64 pairs; DeltaNet without a convolution, trained far longer",
    "widths": [64, 128, 256, 512],
    "accuracy": {
        "DeltaNet": [100, 100, 100, 100],
        "Mamba": [81, 100, 100, 100],
        "GLA": [22, 95, 100, 100],
        "RetNet": [5, 87, 96, 97],
    },
}
HOW = ("out", "models", "widths", "seeds", "learning_rates", "budget", "device", "eager", "smoke")  # not which task
PASSED = 0.9  # the same for a lesson before the last
LEARNED = 0.99  # training ends when the mean accuracy of 25 batches in a row is above it


# --- The task ----------------------------------------------------------------------------------------------------


def draw(
    n: int, length: int, pairs: int, vocab: int, device: str, power: float = 0.01
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens `[n, length]`, where the `pairs` queries are `[n, pairs]`, and their answers, drawn on `device`.

    The distribution of `dn_lib.data.recall.multi_query_associative_recall`, in operations that a CUDA graph can hold:
    the gaps, drawn there by `torch.multinomial`, are the largest of log-weights plus Gumbel noise.
    """
    half, space = vocab // 2, (length - 2 * pairs) // 2
    keys = 1 + torch.rand(n, half - 1, device=device).topk(pairs, dim=1).indices
    values = half + torch.rand(n, half, device=device).topk(pairs, dim=1).indices
    noise = torch.empty(n, space, device=device).exponential_().log_()
    log_weights = (power - 1) * torch.arange(1, space + 1, device=device).log()
    asked = 2 * pairs + 2 * (log_weights - noise).topk(pairs, dim=1).indices
    stored = torch.stack([keys, values], dim=2).flatten(1)
    rest = torch.zeros(n, length - 2 * pairs, dtype=torch.long, device=device)
    return torch.cat([stored, rest], dim=1).scatter(1, asked, keys), asked, values


def answers(model: LanguageModel, tokens: Tensor, asked: Tensor) -> Tensor:
    """Logits at the queries alone, `[n, pairs, vocab]`."""
    features = model.features(tokens)
    return model.logits(features.gather(1, asked[..., None].expand(-1, -1, features.shape[-1])))


def lessons(o: argparse.Namespace) -> list[tuple[int, int, int]]:
    """(batch, length, pairs) of the sequences to learn from, shortest first: equally many tokens, equally full."""
    halvings = [n for n in range(o.lessons - 1, 0, -1) if o.pairs >> n >= 4 and o.length % (1 << n) == 0]
    return [(o.batch << n, o.length >> n, o.pairs >> n) for n in [*halvings, 0]]


# --- Training ----------------------------------------------------------------------------------------------------


class Training:
    """One model and its optimiser; `step` draws a batch and learns from it without asking the host for anything.

    So a whole step can be recorded as a CUDA graph: eager, some hundreds of launches of tiny kernels would be most of
    its time.
    """

    def __init__(self, mixer: str, width: int, learning_rate: float, o: argparse.Namespace, device: str):
        self.o, self.device, cuda = o, device, device == "cuda"
        self.lessons = lessons(o)
        self.batch, self.length, self.pairs = self.lessons[0]
        config = ModelConfig(
            vocab_size=o.vocab, width=width, layers=o.layers, heads=o.heads, mixer=mixer, conv_size=o.conv_size,
            mlp_ratio=0, tie_embeddings=True,
        )  # fmt: skip
        self.model = LanguageModel(config).to(device)
        self.model.reset_parameters(o.init)
        weights = list(self.model.parameters())
        groups = [
            {"params": [p for p in weights if p.ndim == 2], "weight_decay": o.weight_decay},
            {"params": [p for p in weights if p.ndim != 2], "weight_decay": 0.0},
        ]
        self.rate = torch.zeros((), device=device)
        self.optimiser = torch.optim.AdamW(groups, lr=self.rate, fused=cuda or None, capturable=cuda)
        t = torch.arange(1, o.steps + 3 * len(self.lessons) + 1, device=device)  # each recording takes 3 steps first
        warm, progress = t / o.warmup, ((t - o.warmup) / max(o.steps - o.warmup, 1)).clamp(max=1)
        self.rates = learning_rate * torch.where(t <= o.warmup, warm, 0.5 * (1 + (torch.pi * progress).cos()))
        self.count = torch.zeros(1, dtype=torch.long, device=device)
        self.history = torch.zeros(2, len(t), device=device)  # loss and accuracy of each step

    def autocast(self):
        # No cache of cast weights: it would not be filled anew when a recorded step runs again.
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda", cache_enabled=False)

    def step(self) -> None:
        tokens, asked, right = draw(self.batch, self.length, self.pairs, self.o.vocab, self.device)
        self.optimiser.zero_grad(set_to_none=True)
        with self.autocast():
            logits = answers(self.model, tokens, asked)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), right.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.rate.copy_(self.rates[self.count][0])
        self.optimiser.step()
        accuracy = (logits.detach().argmax(-1) == right).float().mean()
        self.history.index_copy_(1, self.count, torch.stack([loss.detach(), accuracy])[:, None])
        self.count += 1

    def recorded(self) -> tuple[Callable[[], None], str]:
        """What makes one step: the replay of a CUDA graph, or `step` itself, and which it is.  Takes three steps."""
        if self.device != "cuda" or self.o.eager:
            return self.step, "eager"
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        try:
            graph = torch.cuda.CUDAGraph()
            self.optimiser.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph):
                self.step()
            return graph.replay, "CUDA graph"
        except Exception as error:
            torch.cuda.synchronize()
            self.optimiser.zero_grad(set_to_none=True)
            return self.step, f"eager, for recording failed: {first_line(error)}"

    def run(self, left: Callable[[], float] = lambda: float("inf")) -> dict:
        """Train to the schedule's end, or until the task is learned; hardly at all if `left()` seconds are too few.

        A lesson ends when it is learned, or at the end of its share of the steps: an eighth for all but the last.
        """
        o, done, told, begun = self.o, 0, [], time.monotonic()
        for i, lesson in enumerate(self.lessons):
            self.batch, self.length, self.pairs = lesson
            last, first = i == len(self.lessons) - 1, done
            step, how = self.recorded()
            done = int(self.count)
            timed, taken, seconds = time.monotonic(), 0, 0.0
            end = o.steps if last else min(o.steps, first + max(o.steps // 8, 1))
            while done < end:
                for _ in range(min(25, end - done)):
                    step()
                    taken += 1
                done = int(self.count)  # waits for the device
                seconds = (time.monotonic() - timed) / taken
                if taken <= 25 and (wanted := seconds * (o.steps - done)) > left():
                    return {"status": "skipped", "failure": f"{wanted:.0f} s of training would not fit into the budget"}
                if done - first >= 25 and self.history[1, done - 25 : done].mean() > (LEARNED if last else PASSED):
                    break
            sizes = dict(zip(("batch", "length", "pairs"), lesson, strict=True))
            told.append(sizes | {"steps": done - first, "ms_per_step": 1e3 * seconds, "steps_by": how})
        every = max(1, done // 40)
        means = self.history[:, : done - done % every].unflatten(1, (-1, every)).mean(2).cpu()
        return {
            "steps_taken": done,
            "training_seconds": time.monotonic() - begun,
            "lessons": told,
            "curve": {"steps": [every * (i + 1) for i in range(means.shape[1])]}
            | dict(zip(("loss", "accuracy"), means.tolist(), strict=True)),
        }

    @torch.no_grad()
    def accuracy(self) -> float:
        """On examples that the library's own generator draws, the same for every cell."""
        o, right = self.o, 0
        generator = torch.Generator().manual_seed(12345)
        tokens, labels = multi_query_associative_recall(o.test, o.length, o.pairs, vocab=o.vocab, generator=generator)
        asked = (labels >= 0).nonzero()[:, 1].view(o.test, o.pairs)
        wanted = labels.gather(1, asked)
        for rows in zip(*(x.split(o.batch) for x in (tokens, asked, wanted)), strict=True):
            tokens, asked, wanted = (x.to(self.device) for x in rows)
            with self.autocast():
                right += int((answers(self.model, tokens, asked).argmax(-1) == wanted).sum())
        return right / (o.test * o.pairs)


def training_settings(o: argparse.Namespace) -> dict:
    """What makes two runs the same experiment."""
    return {name: value for name, value in vars(o).items() if name not in HOW}


def a_cell(mixer, width: int, learning_rate: float, seed: int, o: argparse.Namespace, device: str, left=None) -> dict:
    torch.manual_seed(1000 * seed + width)
    training = Training(mixer, width, learning_rate, o, device)
    row = {"model": MODELS[mixer], "mixer": mixer, "width": width, "seed": seed, "learning_rate": learning_rate}
    row |= {"length": o.length, "pairs": o.pairs, "parameters": training.model.num_parameters()}
    row |= {"training": training_settings(o)}
    row |= training.run(left or (lambda: float("inf")))
    return row if row.get("status") == "skipped" else row | {"accuracy": training.accuracy()}


# --- The file ----------------------------------------------------------------------------------------------------


def collected(rows: list[dict]) -> list[dict]:
    """One entry for each model and width: the accuracies of its seeds, at the learning rate with the best mean."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["status"] == "ok":
            at = row["model"], row["width"], row["length"], row["pairs"], row["learning_rate"]
            groups.setdefault(at, []).append(row)
    best: dict[tuple, dict] = {}
    for (*at, rate), cells in groups.items():
        cells = sorted(cells, key=lambda cell: cell["seed"])
        entry = dict(zip(("model", "width", "length", "pairs"), at, strict=True))
        entry |= {"accuracy": [cell["accuracy"] for cell in cells], "learning_rate": rate}
        entry |= {"steps": [cell["steps_taken"] for cell in cells]}
        before = best.get(tuple(at))
        if before is None or statistics.fmean(entry["accuracy"]) > statistics.fmean(before["accuracy"]):
            best[tuple(at)] = entry
    names = list(MODELS.values())
    return sorted(best.values(), key=lambda e: (names.index(e["model"]), e["width"]))


class Accuracies(Results):
    """`Results` with what a reader of the file wants first: `results`, see `collected`."""

    not_measured = "smoke run: a few steps of a tiny model; no accuracy here is a result"

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        # A row of other settings is another experiment: `settings["training"]` is kept in each row.
        before, wanted = len(self.rows), plain(self.settings["training"])
        self.rows = [row for row in self.rows if row.get("training") == wanted]
        if len(self.rows) < before:
            print(f"{before - len(self.rows)} cells that failed or have other settings will be replaced", flush=True)

    def record(self) -> dict:
        found = {"provenance": self.provenance, "settings": self.settings}
        return {**found, "results": collected(self.rows), "rows": self.rows}


def plan(o: argparse.Namespace) -> list[tuple[str, int, float, int]]:
    """Cells in the order of their worth: seed by seed, the first two models at all widths before the others."""
    halves = o.models[:2], o.models[2:]
    return [
        (m, w, r, s) for s in range(o.seeds) for ms in halves for w in o.widths for r in o.learning_rates for m in ms
    ]


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--models", nargs="+", choices=list(MODELS), default=["delta", "linear", "retnet", "gla"])
    add("--widths", nargs="+", type=int, default=[64, 128, 256])
    add("--seeds", type=int, default=2, help="seeds 0, 1, ... of each model and width")
    add("--learning-rates", nargs="+", type=float, default=[1e-2], help="of several the best is kept")
    add("--steps", type=int, default=2500, help="at most; fewer if the task is learned before")
    add("--warmup", type=int, default=100)
    add("--weight-decay", type=float, default=0.1)
    add("--init", type=float, default=0.1, help="standard deviation of initial weights")
    add("--batch", type=int, default=64, help="at full length; more, of shorter ones, in the lessons before")
    add("--length", type=int, default=512)
    add("--pairs", type=int, default=64)
    add("--vocab", type=int, default=8192)
    add("--lessons", type=int, default=4, help="lengths to learn from, each twice the one before; 1: --length alone")
    add("--layers", type=int, default=2)
    add("--heads", type=int, default=2)
    add("--conv-size", type=int, default=2, help="taps of the short convolutions, 0 for none")
    add("--test", type=int, default=3000, help="examples on which a trained model is asked")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--eager", action="store_true", help="no CUDA graph")


def table(rows: list[dict]) -> str:
    lines = [f"{'model':17} {'width':>5} {'lr':>7} {'seed':>4} {'accuracy':>8} {'steps':>6} {'ms/step':>8}  steps by"]
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"{row['key']}: {row['status']}: {row.get('failure')}")
            continue
        cell = f"{row['model']:17} {row['width']:5d} {row['learning_rate']:7.0e} {row['seed']:4d}"
        last = row["lessons"][-1]
        cell += f" {100 * row['accuracy']:8.2f} {row['steps_taken']:6d} {last['ms_per_step']:8.2f}"
        lines.append(f"{cell}  {last['steps_by']}")
    return "\n".join(lines)


@matmul_precision("high")
def run(o: argparse.Namespace) -> int:
    """0; 1 if a cell failed; 2 if the budget ran out; 3 if the GPU was lost."""
    if o.smoke:
        o.device, o.models, o.widths, o.seeds, o.steps, o.warmup = "cpu", ["delta", "retnet"], [16], 2, 3, 1
        o.batch, o.length, o.pairs, o.vocab, o.test = 2, 32, 8, 32, 5
    device = "cpu" if o.device == "cpu" and not o.smoke else device_of(o.smoke)
    settings = {
        "training": training_settings(o),
        **{name: getattr(o, name) for name in HOW if name != "out"},
        "task": "chapter 2's; a batch is drawn afresh for each step, the test examples are the same for all cells",
        "model": "dn_lib.models.LanguageModel without feed-forward part, embedding and head shared; each mixer with a "
        "short convolution of `conv_size` taps, softmax attention without",
        "optimiser": "AdamW, matrices decayed, gradient norm at most 1, linear warm-up, then a cosine to 0",
        "precision": "bfloat16 by autocast on a GPU, float32 on a CPU",
        "lessons": "each cell learns from shorter lists first, with as many tokens a batch; a lesson ends when the "
        f"mean accuracy of 25 batches in a row is above {PASSED}, or after an eighth of `steps`",
        "end": f"after `steps` steps, or once the mean accuracy of 25 batches in a row is above {LEARNED}",
        "results": "accuracy: one for each seed; of several learning rates that with the best mean over its seeds",
        "paper": PAPER,
    }
    results = Accuracies(o.out, settings, budget=o.budget, smoke=o.smoke)

    def body() -> None:
        for mixer, width, rate, seed in plan(o):
            left = None if o.budget is None else lambda: o.budget - results.elapsed()
            results.measure(
                f"{mixer} width={width} lr={rate:g} seed={seed}",
                lambda m=mixer, w=width, r=rate, s=seed, left=left: a_cell(m, w, r, s, o, device, left),
                again=lambda row: row["status"] != "ok",
            )

    code = results.fill(body)
    return results.finish(table(results.rows), code, failed=any(row["status"] == "failed" for row in results.rows))


EXPERIMENT = Experiment(
    question="How well does each mixer recall what it has seen, by the width of the model?",
    writes=("mqar.json",),
    minutes=1,
    gpu="H200, for two of the models and one seed",
    run=run,
    options=options,
    shared=("budget", "smoke"),
    each=(("--models", "delta", "linear", "--seeds", "1"),),
)
