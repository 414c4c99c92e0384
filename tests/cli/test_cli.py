"""The command line: a run from training to generation, and one-line errors for what users get wrong."""

import errno
import functools
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import dn_lib  # noqa: F401
from dn_lib.__main__ import app
from dn_lib.data import DOWNLOADS, load_corpus
from dn_lib.data.downloads import Download
from dn_lib.models import ModelConfig
from dn_lib.training import TrainConfig, latest, read
from dn_lib.training.settings import model_config, read_settings, train_config

SHAPE = ["--width", "16", "--layers", "2", "--heads", "2", "--window", "8"]
RUN = ["--steps", "6", "--batch", "4", "--length", "24", "--device", "cpu", "--quiet"]
SMALL = SHAPE + RUN


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DN_LIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DN_LIB_TRACEBACK", raising=False)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.py"
    path.write_text("".join(f"name_{i % 37} = value({i % 11})\n" for i in range(2000)))
    return str(path)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error_of(*arguments) -> str:
    """The single line on stderr of a command that has to fail."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert "Traceback" not in result.output
    return lines[0]


def test_train_resume_eval_generate(text, tmp_path):
    out = tmp_path / "run"
    result = run("train", "--corpus", text, "--out", out, *SMALL, "--evaluate-every", 3)
    assert result.exit_code == 0, result.output
    assert re.search(r"step +6 +validation \d\.\d+ bits per byte", result.stdout)
    assert (out / "model" / "model.safetensors").exists()

    result = run("train", "--corpus", text, "--out", out, *SMALL, "--steps", 9, "--resume", "--change", "steps")
    assert result.exit_code == 0, result.output
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps if "step" in record] == list(range(1, 10))

    result = run("eval", out, "--corpus", text, "--length", 24, "--device", "cpu")
    assert 0 < json.loads(result.stdout)["bits_per_byte"] < 9
    one, two = (run("generate", out, "--tokens", 20, "--device", "cpu", "--prompt", "name") for _ in "ab")
    assert one.stdout == two.stdout and one.stdout.startswith("name")


CONFIG = """
corpus = "{corpus}"

[model]
pattern = ["delta", "window", "gated_delta"]
width = 16
heads = 2
window = 8
beta_range = 2.0
conv_size = 3
expand_v = 1.0
output_gate = false
tie_embeddings = true

[train]
steps = 6
batch = 4
length = 24
betas = [0.8, 0.9]
min_learning_rate = 0
log_every = 2
device = "cpu"
"""


class TestConfiguration:
    """--config: every field of the model and of the training, below the command line."""

    @pytest.fixture
    def path(self, text, tmp_path):
        path = tmp_path / "run.toml"
        path.write_text(CONFIG.format(corpus=text))
        return path

    def test_every_field_can_be_set(self, path, tmp_path):
        """One file with all of them, each at another value than its default, gives that model and that training."""
        model = ModelConfig(
            vocab_size=256, width=24, layers=2, heads=3, head_dim=10, attention_heads=2, mixer="gla", hybrid="window",
            window=9, activation="relu", qk_norm="l1", conv_size=2, beta_range=1.5, delta_steps=2, value_heads=6,
            expand_v=0.5, output_gate=True, mlp_ratio=1.0, hidden=40, mamba_expand=3, mamba_state=4,
            tie_embeddings=True, rope_base=100.0, norm_eps=1e-4, backend="recurrent", pattern=("gla", "window"),
            decay="none", decay_by_depth=True, memories=3, active_memories=1, initialisation="mimetic",
        )  # fmt: skip
        training = TrainConfig(
            steps=7, batch=6, length=20, learning_rate=0.5, min_learning_rate=0.25, warmup=3, weight_decay=0.2,
            betas=(0.5, 0.6), clip=2.0, accumulate=3, evaluate_every=4, evaluation_tokens=50, checkpoint_every=8,
            keep=9, log_every=5, precision="float32", device="cpu", compile=True, parallel="fsdp", seed=11,
        )  # fmt: skip
        lines = []
        for table, config, left_out in (("model", model, {"vocab_size"}), ("train", training, set())):
            default = type(config)()
            lines.append(f"[{table}]")
            for field in fields(config):
                value = getattr(config, field.name)
                if field.name not in left_out:
                    assert value != getattr(default, field.name), field.name
                    value = list(value) if isinstance(value, tuple) else value
                    lines.append(f"{field.name} = {json.dumps(value)}")  # which is TOML for all of these
        path.write_text("\n".join(lines))
        read = read_settings(path)
        assert model_config(read, 256) == model and train_config(read) == training

    def test_a_run_of_it_goes_on_by_itself(self, path, text, tmp_path):
        out = tmp_path / "run"
        result = run("train", "--out", out, "--config", path)
        assert result.exit_code == 0, result.output
        checkpoint = read(latest(out)).about
        model = checkpoint["model"]
        assert (model["pattern"], model["layers"]) == (["delta", "window", "gated_delta"], 3)
        assert model["beta_range"] == 2.0 and model["output_gate"] is False and model["tie_embeddings"] is True
        assert checkpoint["train"]["betas"] == [0.8, 0.9] and checkpoint["train"]["min_learning_rate"] == 0
        result = run("train", "--out", out, "--resume", "--steps", 9, "--change", "steps", "--device", "cpu")
        assert result.exit_code == 0, result.output
        after = read(latest(out)).about
        assert after["step"] == 9 and after["model"] == model
        assert after["train"] == checkpoint["train"] | {"steps": 9}

    def test_the_command_line_goes_first(self, path, tmp_path):
        out = tmp_path / "run"
        result = run("train", "--out", out, "--config", path, "--steps", 4, "--pattern", "linear,window,attention")
        assert result.exit_code == 0, result.output
        about = read(latest(out)).about
        assert about["step"] == 4 and about["model"]["pattern"] == ["linear", "window", "attention"]
        assert about["model"]["conv_size"] == 3

    def test_a_changed_file_is_refused_by_the_name_of_the_setting(self, path, tmp_path):
        out = tmp_path / "run"
        assert run("train", "--out", out, "--config", path).exit_code == 0
        path.write_text(path.read_text().replace("steps = 6", "steps = 12"))
        message = error_of("train", "--out", out, "--config", path, "--resume")
        assert "cannot resume: steps is 6 in the checkpoint, 12 here; --change steps" in message
        path.write_text(path.read_text().replace("beta_range = 2.0", "beta_range = 1.5"))
        message = error_of("train", "--out", out, "--config", path, "--resume", "--change", "steps")
        assert "cannot resume: beta_range is 2.0 in the checkpoint, 1.5 here" in message

    def test_a_longer_schedule_never_comes_by_itself(self, path, tmp_path):
        """Twice as many steps would lift the learning rate of the next one again: they have to be asked for."""
        out = tmp_path / "run"
        assert run("train", "--out", out, "--config", path).exit_code == 0
        before = (out / "log.jsonl").read_text()
        error_of("train", "--out", out, "--resume", "--steps", 12, "--device", "cpu")
        assert (out / "log.jsonl").read_text() == before and read(latest(out)).about["step"] == 6


@pytest.mark.parametrize("part", ["", "model", "checkpoint_6.safetensors"])
def test_eval_knows_what_a_run_was_trained_on(text, tmp_path, part, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    assert run("train", "--corpus", Path(text).name, "--out", out, *SMALL).exit_code == 0
    place = latest(out) if part.startswith("checkpoint") else out / part
    monkeypatch.chdir("/")
    known = json.loads(run("eval", place, "--device", "cpu").stdout)
    assert (known["corpus"], known["length"], known["same_text"]) == (text, 24, True)
    given = json.loads(run("eval", place, "--device", "cpu", "--corpus", text, "--length", 24).stdout)
    assert given == known
    Path(text).write_text("".join(f"value_{i % 37} = name({i % 11})\n" for i in range(2000)))
    assert json.loads(run("eval", place, "--device", "cpu").stdout)["same_text"] is False


@pytest.mark.parametrize("command", ["train", "generate", "eval", "prepare-data", "doctor", "course grade"])
def test_switches_take_no_value(command):
    """In the help, too: `--resume true` would read `true` as something else."""
    shown = run(*command.split(), "--help").stdout
    assert "bool" not in shown and "[no-" not in shown
    if command == "train":
        assert all(re.search(rf"^  --{flag}  +[A-Z]", shown, re.MULTILINE) for flag in ("resume", "quiet"))
        assert re.search(r"^  --compile  +torch", shown, re.MULTILINE) and "[model]" in shown


def seen(raw: str) -> list[str]:
    """The lines that a terminal shows after `raw`, which moves with newlines and carriage returns."""
    lines = []
    for line in raw.replace("\r\n", "\n").split("\n"):
        cells: list[str] = []
        for part in line.split("\r"):
            cells[: len(part)] = part
        lines.append("".join(cells).rstrip())
    return lines


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_progress_and_lines_stay_apart(text, tmp_path):
    """On a terminal that shows both, and in a file, where there is no bar at all."""
    import fcntl
    import pty
    import struct
    import termios

    arguments = ["train", "--corpus", text, "--out", str(tmp_path / "a"), *SHAPE, *RUN[:-1], "--evaluate-every", "2"]
    command = [sys.executable, "-m", "dn_lib", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "80"}
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(command, env=environment, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    raw = b""
    while True:
        try:
            raw += (piece := os.read(ours, 4096))
        except OSError:  # the terminal's other end was closed
            break
        if not piece:
            break
    os.close(ours)
    assert process.wait(60) == 0, raw
    shown = seen(raw.decode())
    assert "6/6" in raw.decode() and "tokens/s" in raw.decode()  # there was a bar
    told = [line for line in shown if "validation" in line]
    assert [re.fullmatch(r"step +(\d) +validation \d\.\d{3} bits per byte", line)[1] for line in told] == [
        "2",
        "4",
        "6",
    ]
    arguments[4] = str(tmp_path / "b")
    log = tmp_path / "output"
    with log.open("w") as file:
        subprocess.run([*command[:3], *arguments], env=environment, stdout=file, stderr=file, check=True)
    assert "\r" not in log.read_text() and "it/s" not in log.read_text() and log.read_text().count("validation") == 3


def test_bpe_run_keeps_its_tokenizer(text, tmp_path):
    pytest.importorskip("tokenizers")
    out = tmp_path / "run"
    assert run("train", "--corpus", text, "--out", out, *SMALL, "--vocab", 280).exit_code == 0
    assert (out / "model" / "tokenizer.json").exists()
    result = run("eval", out, "--corpus", text, "--length", 24, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "name" in run("generate", out, "--prompt", "name", "--tokens", 5, "--device", "cpu").stdout
    assert run("train", "--corpus", text, "--out", out, *SMALL, "--vocab", 280, "--resume").exit_code == 0


def test_bpe_run_goes_on_with_its_tokenizer_where_the_text_gave_fewer_tokens(text, tmp_path):
    pytest.importorskip("tokenizers")
    out, other = tmp_path / "run", tmp_path / "other.txt"
    other.write_text("".join(f"value_{i % 37} = other({i % 11})\n" for i in range(300)))
    assert run("train", "--corpus", text, "--out", out, *SMALL, "--vocab", 5000).exit_code == 0
    before = (out / "tokenizer.json").read_bytes()
    result = run("train", "--corpus", other, "--out", out, *SMALL, "--vocab", 5000, "--resume", "--change", "corpus")
    assert result.exit_code == 0, result.output
    assert (out / "tokenizer.json").read_bytes() == before


@pytest.mark.parametrize("exported", [True, False])
def test_a_tokenizer_that_was_changed_is_told(text, tmp_path, exported):
    pytest.importorskip("tokenizers")
    out = tmp_path / "run"
    assert run("train", "--corpus", text, "--out", out, *SMALL, "--vocab", 280).exit_code == 0
    if not exported:
        (out / "model").rename(tmp_path / "kept")
    path = out / "model" / "tokenizer.json" if exported else out / "tokenizer.json"
    about = json.loads(path.read_text())
    words = about["model"]["vocab"]
    a, b = list(words)[-2:]
    words[a], words[b] = words[b], words[a]  # as many tokens, with other numbers
    path.write_text(json.dumps(about))
    for command in ("generate", "eval"):
        result = run(command, out, "--device", "cpu")
        assert result.exit_code == 2 and "must hold the tokenizer of its run, bpe-" in result.stderr


def test_a_tokenizer_is_written_whole_or_the_old_one_stays(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    one, two = (load_corpus(Path(__file__), vocab=size).tokenizer for size in (260, 280))
    one.save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        two.save(tmp_path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("tokenizer.json", before)]


def test_prepare_data(text, tmp_path):
    result = run("prepare-data", text, "--out", tmp_path / "p", "--archive", tmp_path / "p.tar.xz")
    assert result.exit_code == 0, result.output
    assert run("train", "--corpus", tmp_path / "p.tar.xz", "--out", tmp_path / "run", *SMALL).exit_code == 0


def test_doctor():
    result = run("doctor")
    assert result.exit_code == 0 and torch.__version__ in result.stdout


def test_help_needs_no_corpus():
    for command in ("train", "generate", "eval", "prepare-data", "doctor"):
        assert run(command, "--help").exit_code == 0
    assert "prepare-data" in run("--help").stdout


class TestErrors:
    """Each is one line that names what was wrong and what to do."""

    def test_corpus_that_does_not_exist(self, tmp_path):
        message = error_of("train", "--corpus", "no/such/file", "--out", tmp_path / "run", *SMALL)
        assert "corpus 'no/such/file' does not exist: give a file, a folder" in message
        assert not (tmp_path / "run").exists()

    def test_wrong_hash(self, tmp_path, monkeypatch):
        (tmp_path / "served").write_text("not what was pinned")
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
        monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *arguments: None)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            url = f"http://127.0.0.1:{server.server_port}/served"
            monkeypatch.setitem(DOWNLOADS, "enwik8", Download(url, "0" * 64))
            message = error_of("train", "--corpus", "enwik8", "--out", tmp_path / "run", *SMALL)
            server.shutdown()
        assert "has SHA-256" in message and "deleted, not used" in message

    def test_vocabulary_mismatch_on_resume(self, text, tmp_path):
        pytest.importorskip("tokenizers")
        out = tmp_path / "run"
        assert run("train", "--corpus", text, "--out", out, *SMALL).exit_code == 0
        message = error_of("train", "--corpus", text, "--out", out, *SMALL, "--vocab", 280, "--resume")
        assert "cannot resume: vocab_size is 256 in the checkpoint, 280 here" in message

    def test_context_longer_than_data(self, text, tmp_path):
        message = error_of("train", "--corpus", text, "--out", tmp_path / "run", *SMALL, "--length", 10**6)
        assert "length must be below the number of training tokens" in message

    def test_odd_head_count(self, tmp_path):
        message = error_of("train", "--out", tmp_path / "run", *SMALL, "--heads", 3)
        assert "heads must divide width, got heads = 3 and width = 16" in message

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_missing_gpu(self, tmp_path):
        message = error_of("train", "--out", tmp_path / "run", *SMALL, "--device", "cuda")
        assert "torch finds 0 GPUs: use --device cpu" in message

    def test_a_run_is_not_overwritten(self, text, tmp_path):
        out = tmp_path / "run"
        assert run("train", "--corpus", text, "--out", out, *SMALL).exit_code == 0
        assert "go on with --resume" in error_of("train", "--corpus", text, "--out", out, *SMALL)

    def test_nothing_to_load(self, tmp_path):
        assert "neither" in error_of("generate", tmp_path)
        assert "neither" in error_of("eval", tmp_path / "nowhere")

    def test_unknown_mixer(self, tmp_path):
        message = error_of("train", "--out", tmp_path / "run", *SMALL, "--mixer", "magic")
        assert "mixer must be one of" in message

    def test_wheels_not_prepared(self, tmp_path):
        message = error_of("train", "--corpus", "wheels", "--out", tmp_path / "run", *SMALL)
        assert "run `python -m dn_lib prepare-data wheels`" in message

    def test_empty_prompt(self, text, tmp_path):
        run("train", "--corpus", text, "--out", tmp_path / "run", *SMALL)
        message = error_of("generate", tmp_path / "run", "--prompt", "", "--device", "cpu")
        assert "--prompt must not be empty" in message


def test_sigterm_checkpoints_and_exits(text, tmp_path):
    """The real command, told to stop, leaves a checkpoint that the same command goes on from."""
    out = tmp_path / "run"
    arguments = ["train", "--corpus", text, "--out", str(out), *SMALL, "--steps", "100000"]
    command = [sys.executable, "-m", "dn_lib", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = out / "log.jsonl"
    until = time.monotonic() + 60
    while not (log.exists() and log.stat().st_size) and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "run again with --resume" in output and "Traceback" not in errors
    assert len(list(out.glob("checkpoint_*.safetensors"))) == 1
