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
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import dn_lib  # noqa: F401
from dn_lib.__main__ import app
from dn_lib.data import DOWNLOADS, load_corpus
from dn_lib.data.downloads import Download

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
