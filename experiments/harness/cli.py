"""The command line of all experiments.

    python -m experiments --list              what there is, what it writes, how long it takes
    python -m experiments NAME [options]      one of them; --help lists its options
    python -m experiments --all               all of them, one after the other, each in a process of its own
    python -m experiments --all --smoke       those that can run without a GPU, tiny; the others are named
    python -m experiments --stale             results that are older than the code that they describe

An experiment is a module with an `EXPERIMENT`, in one of the folders beside `harness`.  Its name is the module's.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import experiments
from dn_lib.teaching.results import changed
from experiments.harness.processes import MOST_WORKERS, default_workers
from experiments.harness.provenance import RESULTS, ROOT


def device_of(smoke: bool) -> str:
    """The device to measure on; exits with a word where a GPU is needed and there is none."""
    if smoke:
        if torch.cuda.is_available():
            raise SystemExit("--smoke is for machines without a GPU: set CUDA_VISIBLE_DEVICES= to hide it")
        return "cpu"
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here: --smoke runs everything on tiny shapes in Triton's interpreter, untimed")
    return "cuda"


# --- Options -----------------------------------------------------------------------------------------------------

# What several experiments take.  Each names those that it wants.
SHARED = {
    "any-commit": {"action": "store_true", "help": "keep rows that other commits measured"},
    "budget": {"type": float, "metavar": "S", "help": "begin no row after so many seconds; the same command goes on"},
    "quick": {"action": "store_true", "help": "shorter timings"},
    "retry": {"action": "store_true", "help": "repeat rows that failed or were refused"},
    "seed": {"type": int, "default": 0},
    "smoke": {"action": "store_true", "help": "tiny, on a CPU, kernels in Triton's interpreter; times are stubs"},
    "workers": {
        "type": int,
        "metavar": "N",
        "default": default_workers(),
        "help": f"processes that compile first (default: one a core, at most {MOST_WORKERS}); 0: none",
    },
}


@dataclass(frozen=True)
class Experiment:
    """What is asked, where the answer goes, and how it is found.

    question: in one line.
    writes: files in book/results.
    minutes, gpu: how long it takes, and on what.
    run: the work; takes the parsed options and gives the exit code.
    options: adds the experiment's own options to a parser.
    shared: which of `SHARED` it takes, too.
    each: the options that made each of the files, beside --out.
    small: the options that make a smoke run short.
    measured: whether the files are there.
    dry: options with which nothing is written.
    """

    question: str
    writes: tuple[str, ...]
    minutes: float
    gpu: str
    run: Callable[[argparse.Namespace], int]
    options: Callable[[argparse.ArgumentParser], None] | None = None
    shared: tuple[str, ...] = ()
    each: tuple[tuple[str, ...], ...] = ((),)
    small: tuple[str, ...] = ()
    measured: bool = True
    dry: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.run.__module__.rpartition(".")[2]

    def parser(self) -> argparse.ArgumentParser:
        about = sys.modules[self.run.__module__].__doc__
        parser = argparse.ArgumentParser(
            prog=f"python -m experiments {self.name}",
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        files = " or ".join(self.writes)
        parser.add_argument("--out", type=Path, help=f"the JSON file; on a GPU by default book/results/{files}")
        for name in self.shared:
            parser.add_argument(f"--{name}", **SHARED[name])
        if self.options is not None:
            self.options(parser)
        return parser

    def arguments(self, argv: list[str]) -> argparse.Namespace:
        """The parsed options, with the file to write: what no GPU has measured never goes to book/results by itself."""
        parser = self.parser()
        options = parser.parse_args(argv)
        if options.out is None and not any(getattr(options, name) for name in self.dry):
            if getattr(options, "smoke", False):
                options.out = Path(tempfile.mkdtemp(prefix="smoke_")) / self.writes[0]
                print(f"writes {options.out}", flush=True)
            elif len(self.writes) == 1 and torch.cuda.is_available():
                options.out = RESULTS / self.writes[0]
            else:
                parser.error("--out is needed")
        return options

    def start(self, argv: list[str]) -> int:
        return self.run(self.arguments(argv))


def settings_of(options: argparse.Namespace, *left_out: str) -> dict:
    """What a result file says of the options: all but where it lies and those `left_out`."""
    return {name: value for name, value in vars(options).items() if name not in ("out", *left_out)}


# --- Which there are ---------------------------------------------------------------------------------------------


def modules() -> dict[str, str]:
    """Name and module of each experiment, in the order of the folders and of the alphabet."""
    folders = [p.name for p in pkgutil.iter_modules(experiments.__path__) if p.ispkg and p.name != "harness"]
    found = {}
    for folder in folders:
        for module in pkgutil.iter_modules([str(Path(experiments.__path__[0]) / folder)]):
            found[module.name] = f"experiments.{folder}.{module.name}"
    return found


def catalogue() -> Iterator[Experiment]:
    """All experiments."""
    for module in modules().values():
        yield importlib.import_module(module).EXPERIMENT


def listing() -> str:
    """The experiments as text."""
    lines = []
    for e in catalogue():
        lines.append(f"{e.name}  ({e.minutes:g} min, {e.gpu})\n    {e.question}")
        lines += [f"    writes {file}{'' if e.measured else ', not yet measured'}" for file in e.writes]
    return "\n".join(lines)


def stale(folder: Path = RESULTS, now: dict[str, str] | None = None) -> dict[str, str]:
    """The results in `folder` that are older than the code that they describe, and why.

    now: the digests of today's sources, by default those of the package.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        files = changed(path.stem, json.loads(path.read_text("utf-8")), now)
        if files is None:
            found[path.name] = "it holds no digests of the sources"
        elif files:
            more = f" and {len(files) - 3} more" if len(files) > 3 else ""
            found[path.name] = f"changed since: {', '.join(files[:3])}{more}"
    return found


def stale_listing(folder: Path = RESULTS) -> tuple[str, int]:
    """`stale` as text, with the command that measures each anew; and an exit code, 1 if there is any."""
    found, lines = stale(folder), []
    commands = {
        file: " ".join(
            ["python -m experiments", e.name, *each, *(["--out", f"book/results/{file}"] if len(e.writes) > 1 else [])]
        )
        for e in catalogue()
        for file, each in zip(e.writes, e.each, strict=True)
    }
    for file, why in found.items():
        lines += [f"{file}: {why}", f"    {commands.get(file, 'no experiment writes it')}"]
    lines.append(
        f"{len(found)} of {len(list(folder.glob('*.json')))} results are older than the code that they describe"
    )
    return "\n".join(lines), int(bool(found))


def runs(e: Experiment, smoke: bool, folder: Path) -> list[list[str]]:
    """The arguments of each run of an experiment: one for each of its files, or a single short one; none it has not."""
    if not smoke:
        return [[e.name, *each, "--out", str(folder / file)] for file, each in zip(e.writes, e.each, strict=True)]
    return [[e.name, "--smoke", *e.small, "--out", str(folder / f"{e.name}.json")]] if "smoke" in e.shared else []


def run_all(smoke: bool) -> int:
    """Each experiment in a process of its own; 0, or the largest exit code."""
    codes = {}
    folder = Path(tempfile.mkdtemp(prefix="smoke_")) if smoke else RESULTS
    for e in catalogue():
        if not (every := runs(e, smoke, folder)):
            print(f"== {e.name}: skipped, it has no smoke run (measured on: {e.gpu})", flush=True)
        for arguments in every:
            print(f"== {' '.join(arguments)}", flush=True)
            code = subprocess.run([sys.executable, "-m", "experiments", *arguments], cwd=ROOT).returncode
            print(f"== {e.name}: exit code {code}", flush=True)
            codes[e.name] = max(abs(code), codes.get(e.name, 0))
    failed = [f"{name} ({code})" for name, code in codes.items() if code]
    print(f"== {len(codes)} run, not 0: {', '.join(failed) or 'none'}; written to {folder}", flush=True)
    return max(codes.values(), default=0)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-"):
        known = modules()
        if argv[0] in known:
            return importlib.import_module(known[argv[0]]).EXPERIMENT.start(argv[1:])
        print(f"there is no experiment {argv[0]}, but {', '.join(known)}", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(
        prog="python -m experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print name, question, files and time of each")
    parser.add_argument("--all", action="store_true", help="run all, writing to book/results")
    parser.add_argument("--stale", action="store_true", help="name the results that are older than what they describe")
    parser.add_argument("--smoke", action="store_true", help="with --all: those that can, tiny and on a CPU")
    options = parser.parse_args(argv)
    if options.all:
        return run_all(options.smoke)
    if options.stale:
        text, code = stale_listing()
        print(text)
        return code
    if options.list:
        print(listing())
        return 0
    parser.print_help()
    return 2
