"""The command line: `python -m dn_lib train | generate | eval | prepare-data | doctor | course`."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Annotated

import dn_lib  # noqa: F401  (before anything that imports triton)

# isort: split
import torch
import typer
from typer.core import TyperGroup

from dn_lib.console import CAUSED_OUTSIDE, Commands, end_streams, one_line, say, silence

app = typer.Typer(
    cls=Commands,
    help="DeltaNet, step by step: train and use the language models of chapter 6.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # which would show flags as if they took a value, and swallow [model]
)


def path(text: str) -> Path:
    """The type of all options that are paths: `Path("")` would be the current folder, which nobody meant."""
    if not str(text).strip():
        raise typer.BadParameter("a path must not be empty (the current folder is '.')")
    return Path(text)


Folder = Annotated[Path, typer.Argument(help="A run folder of `train`, or a folder of `save_model`.", parser=path)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one.")]
CorpusName = Annotated[
    str,
    typer.Option(
        help="stdlib, wheels, tinyshakespeare, enwik8, hf:NAME, a file, a folder, or a .tar.xz that "
        "prepare-data packed."
    ),
]


def _first_process() -> bool:
    rank = os.environ.get("RANK", "0")
    if not rank.strip().isdecimal():
        raise ValueError(f"RANK must be a whole number, as torchrun sets it, got {rank!r}")
    return int(rank) == 0


def _finite(ctx: typer.Context, value: float) -> float:
    """Refuse nan and infinity, which pass every comparison of a range."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def _vocab(ctx: typer.Context, value: int) -> int:
    """Refuse a size that no encoding can have, before anything is read or downloaded."""
    if value != 0 and not 257 <= value <= 65536:
        raise typer.BadParameter(f"{value} is neither 0 (plain bytes) nor in the range 257<=x<=65536")
    return value


Vocab = Annotated[int, typer.Option(help="Size of a byte-pair encoding to train; 0 for plain bytes.", callback=_vocab)]


def _load(folder: Path, device: torch.device):
    """(model, tokenizer, facts of the corpus) of a run or model folder; a ValueError names a folder that is damaged."""
    from dn_lib.training.runs import load_run

    try:
        model, tokenizer, facts = load_run(folder, device)
    except CAUSED_OUTSIDE:
        raise
    except Exception as error:  # a file that is well-formed but holds something else: KeyError, TypeError, ...
        message = f"{folder} holds no whole model ({type(error).__name__}: {one_line(error)}): copy or train it again"
        raise ValueError(message) from error
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the model in {folder} has {model.config.vocab_size} tokens, its tokenizer {tokenizer.vocab_size}: "
            "the tokenizer.json of its run is missing, or is another's"
        )
    return model, tokenizer, facts


def _tell(text: str) -> None:
    """Print a line, in the first process.  Where nobody listens any more (`| head`), training goes on without."""
    if not _first_process():
        return
    try:
        say(text)
    except OSError:
        silence(sys.stdout)


CALL = {"out", "resume", "resume_from", "change", "config", "quiet"}
"""Options of `train` that are no settings of the run."""


def _settings(ctx: typer.Context, from_file: dict, begun_with: dict) -> dict:
    """All settings of a run: the command line's, those of --config, and those that it was begun with, in this order."""
    from dn_lib.data.sources import NAMED
    from dn_lib.training.settings import merged

    own = {name: value for name, value in ctx.params.items() if name not in CALL}
    if own["pattern"] is not None:
        own["pattern"] = [name.strip() for name in own["pattern"].split(",")]
    given = [name for name in own if getattr(ctx.get_parameter_source(name), "name", None) == "COMMANDLINE"]
    settings = merged(own, given, from_file, begun_with)
    corpus = settings["corpus"]
    if corpus.strip() and corpus not in NAMED and Path(corpus).exists():  # found again from another working folder
        settings["corpus"] = str(Path(corpus).resolve())
    return settings


@app.command()
def train(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, log.jsonl and the finished model.", parser=path)],
    corpus: CorpusName = "stdlib",
    vocab: Vocab = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint, with the settings of the run.")
    ] = False,
    resume_from: Annotated[
        Path | None,
        typer.Option(help="Go on from this checkpoint; newer ones in --out are set aside, not deleted.", parser=path),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option(help="A setting that may differ from the run's own when it goes on: steps, corpus, ...; repeat."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A TOML file: corpus and vocab, and in [model] and [train] any field of ModelConfig and TrainConfig. "
            "The command line goes first.",
            parser=path,
        ),
    ] = None,
    width: Annotated[int, typer.Option(help="Model width.")] = 64,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 4,
    heads: Annotated[int, typer.Option(help="Heads a layer; must divide the width.")] = 2,
    mixer: Annotated[
        str,
        typer.Option(
            help="delta, linear, retnet, gla, gated_delta, kda, lightning, mom, liger, mamba, mamba2, "
            "attention, window."
        ),
    ] = "delta",
    hybrid: Annotated[str, typer.Option(help="none, window (every other layer) or global (two).")] = "window",
    window: Annotated[int, typer.Option(help="Tokens that a window layer sees.")] = 64,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="The mixer of every layer, as in delta,delta,window; --mixer and --hybrid are then not read.",
            metavar="MIXER,...",
        ),
    ] = None,
    beta_range: Annotated[float, typer.Option(help="beta lies between 0 and this, which is at most 2.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 500,
    batch: Annotated[int, typer.Option(help="Sequences a step, over all processes.")] = 8,
    length: Annotated[int, typer.Option(help="Context length in tokens.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Peak; the floor is a tenth of it.")] = 6e-3,
    warmup: Annotated[int, typer.Option(help="Warm-up steps.")] = 20,
    weight_decay: Annotated[float, typer.Option(help="Of the matrices.")] = 0.1,
    clip: Annotated[float, typer.Option(help="Largest gradient norm; 0 for none.")] = 1.0,
    accumulate: Annotated[int, typer.Option(help="Parts that a step's batch is cut into.")] = 1,
    evaluate_every: Annotated[int, typer.Option(help="Steps between evaluations; 0: at the end.")] = 100,
    evaluation_tokens: Annotated[int, typer.Option(help="Validation tokens measured on.")] = 32768,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0: at the end.")] = 100,
    keep: Annotated[int, typer.Option(help="Checkpoints kept.")] = 2,
    precision: Annotated[str, typer.Option(help="auto (bfloat16 on a GPU), float32 or bfloat16.")] = "auto",
    device: Device = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the model.")] = False,
    parallel: Annotated[str, typer.Option(help="Under torchrun: ddp or fsdp.")] = "ddp",
    seed: Annotated[int, typer.Option(help="Of the weights and the batches.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar, on a terminal either.")] = False,
):
    """Train a language model; stop it with Ctrl-C, go on with --resume.

    A run that goes on keeps its own settings: options that are not given are taken from it, and one that is given,
    here or in --config, has to be the same. A longer schedule, another rate or other data have to be asked for, as in
    `--resume --steps 2000 --change steps`. Only device, compile and parallel, and how often to log, evaluate and
    save, may differ without being asked for.

    On a terminal a bar shows the progress; evaluations are lines on stdout, and every step is in OUT/log.jsonl.

    Several GPUs: the same command after `torchrun --nproc-per-node N -m dn_lib`.
    """
    from dn_lib.data import load_corpus, load_tokenizer
    from dn_lib.models import LanguageModel
    from dn_lib.training import resolve_device
    from dn_lib.training import train as run
    from dn_lib.training.runs import export, notes
    from dn_lib.training.settings import MACHINE, model_config, read_settings, train_config

    begun = resume_from.parent if resume_from else out
    resuming = resume or resume_from is not None
    begun_with = notes(begun) if resuming else {}
    settings = _settings(ctx, read_settings(config) if config else {}, begun_with)
    corpus, vocab = settings["corpus"], settings["vocab"]
    training = train_config(settings)
    resolve_device(training.device)
    model_config(settings, max(vocab, 256))  # a wrong shape is told before the corpus is read
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, {out} is a file")
    own = load_tokenizer(begun) if resuming and vocab else None  # to resume, the run's own encoding is read again
    if own is None or own.name == "bytes" or vocab not in (own.vocab_size, begun_with.get("vocab")):
        own = vocab or None  # (a small text gives fewer tokens than were asked for)
    bar = not quiet and _first_process() and sys.stderr.isatty()  # in a file a bar would be one endless line
    data = load_corpus(corpus, vocab=own, progress=bar)
    torch.manual_seed(training.seed)
    model = LanguageModel(model_config(settings, data.vocab_size))
    _tell(f"{model.num_parameters():,} parameters, {len(data.train):,} training tokens of {corpus}")

    def report(record):
        _tell(f"step {record['step']:6d}  validation {record['bits_per_byte']:.3f} bits per byte")

    changes = {name.replace("-", "_") for name in change or ()}
    try:
        history = run(
            model,
            data,
            training,
            folder=out,
            resume=resume_from or resume,
            allow_changes=changes | ({"min_learning_rate"} if "learning_rate" in changes else set()),
            notes={name: value for name, value in settings.items() if name not in MACHINE},
            progress=bar,
            report=report,
        )
    finally:
        end_streams(sys.stderr)  # after the progress bar
    if history.stopped:
        _tell(f"stopped after step {history.steps[-1]['step']}; run again with --resume to go on")
        raise typer.Exit(128 + history.stopped)
    if _first_process():
        export(out, data.tokenizer, history.checkpoint)
    _tell(f"{history.tokens_per_second:,.0f} tokens/s; the model is in {out / 'model'}")


@app.command()
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "def ",
    tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=0, max=10**9)] = 400,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token each time.", min=0, callback=_finite)
    ] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest; 0 for all.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Of the sampling.", min=-(2**63), max=2**63 - 1)] = 0,
    device: Device = "auto",
):
    """Continue a prompt."""
    from dn_lib.models import generate as run
    from dn_lib.training import resolve_device

    if not prompt:
        raise ValueError("--prompt must not be empty")
    model, tokenizer, _ = _load(folder, resolve_device(device))
    start = torch.from_numpy(tokenizer.encode(prompt).astype("int64"))
    where = next(model.parameters()).device
    generator = torch.Generator(where).manual_seed(seed)
    out = run(
        model.eval(),
        start[None].to(where),
        tokens,
        temperature=temperature,
        top_k=top_k or None,
        generator=generator,
    )
    say(tokenizer.decode(out[0].tolist()))


@app.command("eval")
def evaluate_command(
    folder: Folder,
    corpus: Annotated[
        str | None, typer.Option(help="As for train; the one that the model was trained on if not given.")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Context length in tokens; the run's if not given.", min=1)] = None,
    tokens: Annotated[int, typer.Option(help="Validation tokens measured on; 0 for all.", min=0)] = 131072,
    batch: Annotated[int, typer.Option(help="Sequences at a time.", min=1)] = 8,
    device: Device = "auto",
):
    """Measure bits per byte on a corpus's validation part, by default that of the training run; prints JSON.

    `same_text` says whether the corpus holds the very files that the model was trained on (null if nobody knows).
    """
    from dn_lib.data import DataError, is_prepared, load_corpus
    from dn_lib.training import evaluate, resolve_device
    from dn_lib.training.runs import origin

    where = resolve_device(device)
    model, tokenizer, trained_on = _load(folder, where)
    known = origin(folder)
    if corpus is None:
        corpus = known.get("corpus")
    if not isinstance(corpus, str):
        raise ValueError(f"--corpus must be given: {folder} does not say what its model was trained on")
    context: int = length or known.get("length") or 128
    prepared = corpus == "wheels" or corpus.endswith(".tar.xz") or is_prepared(corpus)
    data = load_corpus(corpus, vocab=None if prepared or tokenizer.name == "bytes" else tokenizer)
    if data.tokenizer.name != tokenizer.name:
        raise DataError(f"the model reads {tokenizer.name} tokens, corpus {corpus} holds {data.tokenizer.name}")
    result = evaluate(model, data, length=context, limit=tokens or None, batch=batch)
    if not math.isfinite(result["loss"]):
        raise ValueError(f"the model in {folder} gives a loss of {result['loss']}: its weights are no use")
    before, now = (facts.get("file_list_sha256") for facts in (trained_on, data.facts))
    same = None if before is None or now is None else before == now
    result |= {"corpus": corpus, "length": context, "trained_on": trained_on, "same_text": same}
    say(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in result.items()}))


@app.command("prepare-data")
def prepare_data(
    corpus: Annotated[str, typer.Argument(help="wheels, or anything that --corpus takes.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the token files: new, empty, or prepared before (default: one in the cache, with a name "
            "of the corpus's own).",
            parser=path,
        ),
    ] = None,
    vocab: Vocab = 0,
    archive: Annotated[Path | None, typer.Option(help="Also pack them into this .tar.xz.", parser=path)] = None,
):
    """Tokenise a corpus into memory-mapped files, once."""
    from dn_lib.data import (
        Corpus,
        DataError,
        check_archive,
        check_target,
        load_corpus,
        pack,
        prepared_folder,
        source_path,
    )
    from dn_lib.data.wheels import prepare_wheels

    if not corpus.strip():
        load_corpus(corpus)  # which says what it may be
    # All that can be refused is refused before the first byte is read or downloaded.
    target = prepared_folder(corpus, vocab or None) if out is None else out
    try:
        folder = check_target(target, source=source_path(corpus))
    except DataError as error:
        raise DataError(f"--out: {error}") from None
    if archive is not None and folder in check_archive(archive).resolve().parents:
        raise DataError(f"--archive must not lie in the folder that it packs, got {archive}")
    if corpus == "wheels":
        say("fetching pinned wheels with pip (about 90 MB the first time) ...")
        data = prepare_wheels(folder, vocab=vocab or None)
    else:
        load_corpus(corpus, vocab=vocab or None, progress=True).save(folder)
        data = Corpus.open(folder)
    say(
        f"{data.facts['files']:,} files, {len(data.train):,} training and {len(data.validation):,} "
        f"validation tokens in {folder}"
    )
    if archive is not None:
        say(f"packing {archive} (a minute or two) ...")
        say(f"{archive}: {pack(folder, archive).stat().st_size / 1e6:.1f} MB")


@app.command()
def doctor():
    """Print versions, devices, and what to do about whatever is missing."""
    from dn_lib.doctor import report

    say(report())


course = typer.Typer(cls=TyperGroup, help="A class: make an nbgrader course of the book, grade what was handed in.")
app.add_typer(course, name="course")

Book = Annotated[
    Path | None,
    typer.Option(help="Folder of the chapters, `book` in a clone; beside the package if not given.", parser=path),
]


@course.command("build")
def course_build(
    out: Annotated[Path, typer.Argument(help="Folder for the course: new, empty, or built before.", parser=path)],
    only: Annotated[str, typer.Option(help="Only chapters whose name begins so, e.g. 02.")] = "",
    book: Book = None,
):
    """Write release/ (for students), source/ (the instructor's copies, with solutions) and nbgrader's settings."""
    from dn_lib.course.build import build

    made = build(out, book=book, only=only)
    number = sum(len(assignment.tasks) for assignment in made)
    say(f"{len(made)} assignments with {number} exercises in {out}: hand out {out / 'release'}, keep {out / 'source'}")


@course.command("grade")
def course_grade(
    submissions: Annotated[Path, typer.Argument(help="A folder for each student, with notebooks.", parser=path)],
    out: Annotated[
        Path, typer.Option(help="Folder for tables, picture and feedback: new, or of a grading.", parser=path)
    ],
    only: Annotated[str, typer.Option(help="Only chapters whose name begins so, e.g. 02.")] = "",
    book: Book = None,
    seed: Annotated[int, typer.Option(help="Of the inputs that answers are tried on.", min=0, max=2**63 - 1)] = 1,
    workers: Annotated[int, typer.Option(help="Students judged at the same time.", min=1, max=256)] = 2,
    unconfined: Annotated[
        bool, typer.Option("--unconfined", help="Grade even where answers cannot be kept from files and the network.")
    ] = False,
):
    """Grade a class: scores.csv, verdicts.csv, misunderstandings.csv, stuck.png, feedback/."""
    from dn_lib.course.grade import grade, summary

    rows = grade(
        submissions, out, book=book, only=only, seed=seed, confined=not unconfined, workers=workers, report=say
    )
    say(f"{summary(rows)}. Open {out / 'stuck.png'} and {out / 'scores.csv'}")


if __name__ == "__main__":
    app(prog_name="python -m dn_lib")
