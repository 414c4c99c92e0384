"""Command lines that cannot work, damaged files, and consoles of other encodings: one line each, no traceback."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import dn_lib
from dn_lib.__main__ import app
from dn_lib.console import Commands
from dn_lib.models import LanguageModel, ModelConfig, save_model


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A text, a folder of texts, a model and a prepared corpus, made once and never changed."""
    root = tmp_path_factory.mktemp("places")
    (root / "text.txt").write_text("".join(f"name_{i % 37} = value({i % 11})\n" for i in range(300)))
    (root / "notes").mkdir()
    (root / "notes" / "mine.txt").write_text("of the user")
    (root / "empty").mkdir()
    torch.manual_seed(0)
    save_model(root / "model", LanguageModel(ModelConfig(width=16, layers=2, heads=2, window=8)))
    (root / "cut.tar.xz").write_bytes(b"\xfd7zXZ\0\0")
    (root / "wrong").mkdir()
    for name, content in WRONG_FILES.items():
        (root / "wrong" / f"{name}.toml").write_text(content)
    (root / "broken").mkdir()
    (root / "broken" / "corpus.json").write_text("{")
    (root / "broken" / "train.bin").write_text("x")
    return root


@pytest.fixture(autouse=True)
def here(places, tmp_path, monkeypatch):
    """Run beside the texts of `places`, as copies that a test may damage, with a cache of its own."""
    shutil.copytree(places, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("DN_LIB_CACHE", str(tmp_path / "cache"))
    for name in ("DN_LIB_TRACEBACK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "here"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def tree(folder: Path = Path()) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def error_of(*arguments, status=2) -> str:
    result = run(*arguments)
    assert result.exit_code == status, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert "Traceback" not in result.output and "internal error" not in result.output
    return lines[0]


TRAIN = "train --corpus text.txt --out run --device cpu --quiet --steps 2 --width 16 --layers 2 --heads 2 --length 8"
GENERATE = "generate model --device cpu --tokens 3"
EVAL = "eval model --device cpu --corpus text.txt --length 8"
PREPARE = "prepare-data text.txt --out prepared"

# (a command line, what its error has to say, "-" and "_" being the same)
WRONG = [
    # What typer refuses by itself.
    ("magic", "No such command 'magic'"),
    ("--magic", "No such option: --magic"),
    ("train", "Missing option '--out'"),
    ("train --out", "--out"),
    ("generate", "Missing argument 'folder'"),
    ("eval", "Missing argument 'folder'"),
    ("prepare-data", "Missing argument 'corpus'"),
    ("doctor now", "now"),
    (f"{GENERATE} more", "more"),
    (f"{GENERATE} --magic 1", "--magic"),
    (f"{PREPARE} --force", "--force"),
    # generate
    *[(f"{GENERATE} --tokens {value}", "--tokens") for value in ("-1", "1.5", "many", "nan", "9" * 40, "0x10")],
    *[(f"{GENERATE} --temperature {value}", "--temperature") for value in ("nan", "-nan", "inf", "-inf", "-1", "hot")],
    *[(f"{GENERATE} --temperature {value}", "--temperature") for value in ("-0.001", "1e400")],
    *[(f"{GENERATE} --top-k {value}", "--top-k") for value in ("-1", "0.5", "all")],
    *[(f"{GENERATE} --seed {value}", "--seed") for value in ("x", "1.5", "9" * 40, "-" + "9" * 40)],
    *[
        (f"{GENERATE} --device {value}", "device")
        for value in ("gpu", "cuda:999", "cuda:256", "cuda:-1", "1", "cpu:x", "=")
    ],
    (f"{GENERATE} --prompt=", "--prompt must not be empty"),
    # An empty path is not the current folder.
    (f"{TRAIN} --out=", "--out': a path must not be empty"),
    (f"{TRAIN} --resume-from=", "--resume-from': a path must not be empty"),
    (f"{PREPARE} --out=", "--out': a path must not be empty"),
    (f"{PREPARE} --archive=", "--archive': a path must not be empty"),
    *[(f"{TRAIN} --{name} {'9' * 20}", f"{name} must be at most") for name in ("width", "batch", "warmup", "steps")],
    ("generate nowhere", "nowhere holds neither"),
    ("generate empty", "empty holds neither"),
    ("generate notes", "notes holds neither"),
    ("generate text.txt", "text.txt is no"),
    ("generate model/config.json", "config.json is no"),
    # eval
    *[(f"{EVAL} --length {value}", "--length") for value in ("0", "-8", "1.5", "long")],
    (f"{EVAL} --length 1000000", "length must be below the number of validation tokens"),
    *[(f"{EVAL} --tokens {value}", "--tokens") for value in ("-1", "all")],
    *[(f"{EVAL} --batch {value}", "--batch") for value in ("0", "-1", "many")],
    *[(f"{EVAL} --device {value}", "device") for value in ("gpu", "cuda:999")],
    ("eval nowhere", "nowhere holds neither"),
    ("eval model --corpus=", "corpus must not be empty"),
    # corpora, of every command that takes one
    *[
        (line, message)
        for corpus, message in [
            ("nowhere.txt", "corpus 'nowhere.txt' does not exist: give a file"),
            ("nowhere.tar.xz", "corpus 'nowhere.tar.xz' does not exist"),
            ("empty", "empty holds no files"),
            ("notes", "corpus notes has 1 files, too few"),
            ("cut.tar.xz", "cut.tar.xz is no packed corpus"),
            ("broken", "broken holds no prepared corpus"),
            ("model/model.safetensors", "is no text (it holds a NUL byte)"),
            ("/dev/null", "is neither a file nor a folder"),
            ("hf:", "must name a dataset"),
            ("wheels", "run `python -m dn_lib prepare-data wheels`"),
        ]
        for line in (f"{TRAIN} --corpus {corpus}", f"{EVAL} --corpus {corpus}", f"prepare-data {corpus} --out new")
        if not (corpus == "wheels" and line.startswith("prepare"))
    ],
    (f"{TRAIN} --corpus=", "corpus must not be empty"),
    # prepare-data
    *[
        (f"prepare-data text.txt --out {place}", "--out: folder must be one of its own")
        for place in (".", "..", "./", "../here", "../../../..", "/", "../cache", "~", "notes/..")
        if place != "~"
    ],
    ("prepare-data text.txt --out notes", "--out: folder must be new, empty or a prepared corpus"),
    ("prepare-data text.txt --out model", "--out: folder must be new, empty or a prepared corpus"),
    ("prepare-data text.txt --out text.txt", "is or holds the text to be prepared"),
    ("prepare-data text.txt --out cut.tar.xz", "--out: folder must be a folder"),
    ("prepare-data text.txt --out text.txt/x", "folder that can be written"),
    ("prepare-data notes --out notes", "is or holds the text to be prepared"),
    ("prepare-data notes --out notes/../notes", "is or holds the text to be prepared"),
    ("prepare-data text.txt --out broken", "holds other files"),
    ("prepare-data wheels --out notes", "holds other files"),
    (f"{PREPARE} --archive x.zip", "archive must end in .tar.xz"),
    (f"{PREPARE} --archive cut.tar.xz", "archive must be new or a packed corpus"),
    (f"{PREPARE} --archive prepared/p.tar.xz", "--archive must not lie in the folder that it packs"),
    (f"{PREPARE} --archive text.txt/p.tar.xz", "archive must lie in a folder"),
    ("prepare-data  ", "Missing argument 'corpus'"),
    *[(f"{PREPARE} --vocab {value}", "--vocab") for value in ("-1", "1", "256", "65537", "x", "300.5", "9" * 30)],
    # train
    *[(f"{TRAIN} --vocab {value}", "--vocab") for value in ("-1", "256", "65537", "x")],
    *[
        (f"{TRAIN} --{name} {value}", name)
        for name in ("steps", "batch", "length", "accumulate", "keep", "width", "layers", "heads", "window")
        for value in ("0", "-1", "x", "1.5")
    ],
    *[
        (f"{TRAIN} --{name} {value}", name)
        for name in ("warmup", "evaluate-every", "evaluation-tokens", "checkpoint-every")
        for value in ("-1", "x", "1.5")
    ],
    *[
        (f"{TRAIN} --{name} {value}", name)
        for name in ("learning-rate", "weight-decay", "clip")
        for value in ("nan", "inf", "-1", "x")
    ],
    *[(f"{TRAIN} --seed {value}", "seed") for value in ("x", "9" * 40)],
    (f"{TRAIN} --precision float8", "precision must be"),
    (f"{TRAIN} --parallel pipeline", "parallel must be"),
    (f"{TRAIN} --mixer magic", "mixer must be"),
    (f"{TRAIN} --hybrid some", "hybrid must be"),
    (f"{TRAIN} --device gpu", "device must be"),
    (f"{TRAIN} --out text.txt", "--out must be a folder, text.txt is a file"),
    (f"{TRAIN} --out text.txt/run", "text.txt"),
    (f"{TRAIN} --length 1000000", "length must be below"),
    *[(f"{TRAIN} --beta-range {value}", "beta_range") for value in ("0", "-1", "2.1", "nan", "x")],
    (f"{TRAIN} --pattern delta,magic", "pattern must name 2 mixers (one a layer) out of"),
    (f"{TRAIN} --pattern delta", "pattern must name 2 mixers (one a layer) out of"),
    (f"{TRAIN} --pattern=", "pattern must name 2 mixers (one a layer) out of"),
    *[(f"{TRAIN} --{flag} true", "true") for flag in ("resume", "compile", "quiet")],
    # a file of settings
    (f"{TRAIN} --config nowhere.toml", "No such file or directory: 'nowhere.toml'"),
    (f"{TRAIN} --config=", "--config': a path must not be empty"),
    (f"{TRAIN} --config notes", "notes"),
    (f"{TRAIN} --config text.txt", "--config text.txt cannot be read"),
    (f"{TRAIN} --config cut.tar.xz", "--config cut.tar.xz cannot be read"),
    *[
        (f"{TRAIN} --config wrong/{name}.toml", f"--config wrong/{name}.toml{said}")
        for name, said in {
            "top": " must hold corpus, vocab, [model], [train] at its top, got 'width', which belongs into [model]",
            "magic": " must hold corpus, vocab, [model], [train] at its top, got 'magic'",
            "no_table": ": model must be a table, [model], got 'delta'",
            "misplaced": ": [train] has no setting 'heads', which belongs into [model]; it has steps",
            "text": ": [model] has no setting 'corpus', which belongs at the top",
            "vocab_size": ": [model] has no setting 'vocab_size'; it has width",
            "corpus": ": corpus must be a text, got 3",
            "vocab": ": vocab must be 0 (plain bytes) or from 257 to 65536, got 256",
            "vocab_true": ": vocab must be 0 (plain bytes) or from 257 to 65536, got True",
        }.items()
    ],
    ("train --out run --config wrong/betas.toml", "betas must be two numbers, got [0.9]"),
    ("train --out run --config wrong/kind.toml", "layers must be of type int, got 2.0"),
    ("train --out run --config wrong/range.toml", "steps must be at least 1, got 0"),
    ("train --out run --config wrong/rate.toml", "learning_rate must be a number, got 'high'"),
    ("eval model --device cpu", "--corpus must be given: model does not say what its model was trained on"),
]

WRONG_FILES = {
    "top": "width = 16",
    "magic": "magic = 1",
    "no_table": "model = 'delta'",
    "misplaced": "[train]\nheads = 2",
    "text": "[model]\ncorpus = 'stdlib'",
    "vocab_size": "[model]\nvocab_size = 300",
    "corpus": "corpus = 3",
    "vocab": "vocab = 256",
    "vocab_true": "vocab = true",
    "betas": "[train]\nbetas = [0.9]",
    "kind": "[model]\nlayers = 2.0",
    "range": "[train]\nsteps = 0",
    "rate": "[train]\nlearning_rate = 'high'",
}


def test_there_are_enough():
    assert len({line for line, _ in WRONG}) >= 150


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_is_one_line_that_names_what_is_wrong_and_changes_nothing(line, message):
    before = tree()
    said = error_of(*line.split())
    assert message.replace("-", "_") in said.replace("-", "_")
    assert tree() == before


def test_an_empty_folder_is_not_the_current_one():
    for command in ("generate", "eval"):
        assert "a path must not be empty" in error_of(command, "")


def config(change):
    path = Path("model/config.json")
    values = json.loads(path.read_text())
    path.write_text(json.dumps(change(values) or values))


DAMAGES = {
    "no config": lambda: os.unlink("model/config.json"),
    "no weights": lambda: os.unlink("model/model.safetensors"),
    "empty config": lambda: Path("model/config.json").write_text(""),
    "config no UTF-8": lambda: Path("model/config.json").write_bytes(b"\xff\xfe\x00"),
    "config a list": lambda: Path("model/config.json").write_text("[1]"),
    "config null": lambda: Path("model/config.json").write_text("null"),
    "config a number": lambda: Path("model/config.json").write_text("1"),
    "config deep": lambda: Path("model/config.json").write_text("[" * 10**5),
    "config a folder": lambda: (os.unlink("model/config.json"), os.mkdir("model/config.json")),
    "a width of another type": lambda: config(lambda c: c.update(width="16")),
    "a width of null": lambda: config(lambda c: c.update(width=None)),
    "a key too much": lambda: config(lambda c: c.update(magic=1)),
    "a key too few": lambda: config(lambda c: {"width": 16}),
    "empty weights": lambda: Path("model/model.safetensors").write_bytes(b""),
    "cut weights": lambda: os.truncate("model/model.safetensors", 3000),
    "weights of text": lambda: Path("model/model.safetensors").write_text("x" * 500),
    "a header of 2^63 bytes": lambda: Path("model/model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f" * 9),
    "other tensors": lambda: save_file({"x": torch.zeros(3)}, "model/model.safetensors"),
    "a run.json of text": lambda: Path("model/run.json").write_text("x"),
    "a run.json of a list": lambda: Path("model/run.json").write_text("[]"),
    "a tokenizer of text": lambda: Path("model/tokenizer.json").write_text("x"),
}


class TestDamagedModel:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_is_one_line(self, damage):
        DAMAGES[damage]()
        for line in (GENERATE, EVAL):
            error_of(*line.split())

    def test_weights_that_are_not_finite_are_no_result(self):
        weights = load_file("model/model.safetensors")
        weights = {name: tensor * float("nan") for name, tensor in weights.items()}
        save_file(weights, "model/model.safetensors")
        assert "its weights are no use" in error_of(*EVAL.split())

    def test_a_tokenizer_of_another_size(self):
        save_model("other", LanguageModel(ModelConfig(vocab_size=300, width=16, layers=1, heads=1)))
        assert "has 300 tokens, its tokenizer 256" in error_of("generate", "other", "--device", "cpu")


def run_failing(error):
    """Run a command of the same kind as those of the package, which raises `error`."""
    failing = typer.Typer(cls=Commands, pretty_exceptions_enable=False)

    @failing.callback()
    def about():
        pass

    @failing.command()
    def fail():
        raise error

    return CliRunner().invoke(failing, ["fail"])


@pytest.mark.parametrize("fault", [KeyError("x"), TypeError("no\nway"), ZeroDivisionError(), AssertionError("wrong")])
class TestFaultsOfThePackage:
    def test_are_called_so_in_one_line(self, fault):
        result = run_failing(fault)
        assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
        assert f"internal error ({type(fault).__name__}: " in result.stderr
        assert "DN_LIB_TRACEBACK=1 shows where" in result.stderr

    def test_are_shown_when_asked_for(self, fault, monkeypatch):
        monkeypatch.setenv("DN_LIB_TRACEBACK", "1")
        assert run_failing(fault).exception is fault
        monkeypatch.setenv("DN_LIB_TRACEBACK", "0")
        assert isinstance(run_failing(fault).exception, SystemExit)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (MemoryError(), 2, "error: there is not enough memory"),
        (ValueError(), 2, "error: ValueError"),
        (EOFError("the end"), 2, "error: the end"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
        (OSError(28, "No space left on device"), 2, "No space left"),
        (RecursionError("too deep"), 2, "error: too deep"),
    ],
)
def test_ends(error, status, said):
    result = run_failing(error)
    assert result.exit_code == status and result.stdout == ""
    assert said in result.stderr and len(result.stderr.splitlines()) == bool(said)


@pytest.mark.parametrize("rank", ["", "x", "-1", "1.5"])
def test_a_rank_that_is_none(monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    assert "RANK must be a whole number" in error_of(*TRAIN.split())


def test_no_command_is_help():
    assert run().exit_code == 0 and "prepare-data" in run().stdout


class TestPrepareData:
    def test_two_sources_of_one_name(self):
        for name in ("a", "b"):
            Path(name).mkdir()
            Path(name, "x.txt").write_text(f"{name}\n" * 100)
        results = [run("prepare-data", f"{name}/x.txt") for name in "ab"]
        folders = [result.stdout.split("validation tokens in ")[1].strip() for result in results]
        assert folders[0] != folders[1]
        assert [Path(folder, "train.bin").read_bytes()[1:2] for folder in folders] == [b"a", b"b"]

    @pytest.mark.parametrize("spec", [".", "..", "../here", "notes/.."])
    def test_a_dotted_source_is_never_written_to(self, spec, tmp_path):
        for i in range(60):
            Path("notes", f"{i}.txt").write_text(f"text {i}\n" * 9)
        before = tree(tmp_path / "here")
        result = run("prepare-data", spec)
        assert result.exit_code == 0, result.output
        assert tree(tmp_path / "here") == before

    def test_again_and_into_an_archive(self):
        for _ in range(2):
            result = run(*PREPARE.split(), "--archive", "p.tar.xz")
            assert result.exit_code == 0, result.output
        assert run(*EVAL.split(), "--corpus", "p.tar.xz").exit_code == 0

    def test_an_empty_cache_variable_is_not_the_current_folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("DN_LIB_CACHE", "")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
        before = tree()
        assert run("prepare-data", "text.txt").exit_code == 0
        assert tree() == before and (tmp_path / "shared" / "dn_lib").is_dir()


TEXT = "\u2713 \u03bb \u20ac \xe9 \u4e2d \U0001f600 \ufffd\n\ufffd"  # bytes that are no UTF-8 are shown so
SHOWN = {"✓": "+", "λ": r"\u03bb", "€": r"\u20ac", "é": r"\xe9", "中": r"\u4e2d", "😀": r"\U0001f600"}


@pytest.fixture
def broken_triton(tmp_path):
    """A PYTHONPATH with which the doctor's trial of Triton fails at once, where a kernel would take seconds."""
    says = "a compiler that says \u201cn\xe9\u201d \udcff".encode("utf-8", "surrogateescape")
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(
        f"import os, sys\nif sys.orig_argv[-1].endswith('trial.py'):\n    os.write(2, {says!r})\n    os._exit(1)\n"
    )
    return os.pathsep.join([str(tmp_path / "path"), str(Path(dn_lib.__file__).parents[1])])


class Console(io.TextIOWrapper):
    """Stands for stdout in `encoding`, strict as Python's own."""

    def __init__(self, encoding):
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict")

    def said(self) -> str:
        return self.buffer.getvalue().decode(self.encoding)


def finish(arguments, monkeypatch, encoding):
    console = Console(encoding)
    monkeypatch.setattr(sys, "stdout", console)
    with pytest.raises(SystemExit) as ended:
        app(arguments)
    assert ended.value.code == 0
    return console.said()


class TestConsoles:
    @pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii", "utf-8", "cp437", "koi8-r", "utf-16"])
    def test_print_all_that_was_generated(self, monkeypatch, encoding):
        said = finish(
            [*["generate", "model", "--device", "cpu", "--tokens", "0", "--prompt"], TEXT], monkeypatch, encoding
        )
        for character, plain in SHOWN.items():
            assert character in said or plain in said
        if encoding == "ascii":
            assert said == r"+ \u03bb \u20ac \xe9 \u4e2d \U0001f600 ?" + "\n?\n"

    @pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii"])
    def test_doctor(self, monkeypatch, broken_triton, encoding):
        monkeypatch.setenv("PYTHONPATH", broken_triton)
        lines = finish(["doctor"], monkeypatch, encoding).splitlines()
        assert lines[0].startswith("+ Python") and any(line.strip().startswith("->") for line in lines)


def started(encoding, *arguments, path, **options):
    """`python -m dn_lib`, as a user starts it, with `path` as PYTHONPATH."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = path
    command = [sys.executable, "-m", "dn_lib", *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, **options)


class TestProcesses:
    def test_of_other_encodings_and_streams_that_take_nothing(self, broken_triton):
        """All in one test, so that Python's start is paid for once on as many cores as there are."""
        plain = started("cp1252", "doctor", path=broken_triton, stdout=subprocess.PIPE)
        name = started("latin-1", "generate", "λ\udcff\N{GRINNING FACE}", path=broken_triton, stdout=subprocess.PIPE)
        closed = started("ascii", "doctor", path=broken_triton, stdout=subprocess.PIPE)
        closed.stdout.close()
        if os.path.exists("/dev/full"):  # a disk that is always full
            with open("/dev/full", "w") as disk:
                full = started("utf-8", "doctor", path=broken_triton, stdout=disk)
        said, errors = plain.communicate(timeout=120)
        lines = said.decode("cp1252").splitlines()
        assert (plain.returncode, errors) == (0, b"") and lines[0].startswith("+ Python")
        _, errors = name.communicate(timeout=120)
        assert name.returncode == 2 and len(errors.splitlines()) == 1 and b"holds neither" in errors
        errors = closed.stderr.read()
        assert (closed.wait(120), errors) == (128 + signal.SIGPIPE, b"")
        if os.path.exists("/dev/full"):
            _, errors = full.communicate(timeout=120)
            assert (full.returncode, errors) == (2, b"error: [Errno 28] No space left on device\n")
