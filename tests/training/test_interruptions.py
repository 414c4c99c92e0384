"""What happens around a run and must not cost it: signals, a reader that leaves, a full disk, a number that is none."""

import builtins
import errno
import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import CONFIG, corpus, last_logged, losses, model, wait_until
from typer.testing import CliRunner

from dn_lib.__main__ import app
from dn_lib.training import CheckpointError, TrainingError, checkpoint, interruptions, latest, read, train

QUICK = replace(CONFIG, steps=8, batch=2, length=16, log_every=3, evaluate_every=2, evaluation_tokens=32)
# fmt: off
OPTIONS = [
    "--width", "16", "--layers", "2", "--heads", "2", "--window", "8", "--batch", "2", "--length", "24",
    "--evaluation-tokens", "48", "--device", "cpu",
]
# fmt: on


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.py"
    path.write_text("".join(f"name_{i % 37} = value({i % 11})\n" for i in range(500)))
    return str(path)


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


class TestSignals:
    def test_two_hangups_and_a_termination_still_leave_a_checkpoint(self, tmp_path):
        """A closed terminal sends SIGHUP more than once; a service manager sends SIGHUP, then SIGTERM."""

        def report(record):
            for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
                signal.raise_signal(number)

        history = train(model(), corpus(), QUICK, folder=tmp_path, report=report)
        assert history.stopped and read(latest(tmp_path)).about["step"] == len(history.steps) == 3

    def test_an_interrupt_that_arrives_twice_at_once_is_one(self):
        with interruptions.stop_signals(True) as caught:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT] * 2

    def test_a_second_interrupt_ends_it_at_once(self):
        def interrupted():
            with interruptions.stop_signals(True, insisting=0.0):  # the second one comes late enough
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

        child = multiprocessing.get_context("fork").Process(target=interrupted)
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGINT

    def test_a_signal_that_is_ignored_stays_ignored(self):
        """As `nohup` has it: the run outlives its terminal."""
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with interruptions.stop_signals(True) as caught:
                signal.raise_signal(signal.SIGHUP)
            assert caught == [] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_a_checkpoint_after_every_step_hides_no_signal(self, tmp_path):
        config = replace(QUICK, steps=20, checkpoint_every=1)
        history = train(
            model(), corpus(), config, folder=tmp_path, report=lambda r: signal.raise_signal(signal.SIGTERM)
        )
        assert history.stopped == signal.SIGTERM and len(history.steps) == 3


class TestNobodyListens:
    def test_a_closed_pipe_ends_no_run(self, text, tmp_path):
        """`train 2>&1 | head -1`: the reader leaves after one line, the run goes on; a hangup ends it in order."""
        out = tmp_path / "run"
        words = ["train", *OPTIONS, "--corpus", text, "--out", str(out), "--steps", "1000000", "--evaluate-every", "5"]
        both = dict(env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        with (
            subprocess.Popen([sys.executable, "-m", "dn_lib", *words], **both) as process,
            subprocess.Popen(["head", "-1"], stdin=process.stdout, stdout=subprocess.PIPE) as head,
        ):
            process.stdout.close()
            assert b"parameters" in head.communicate(timeout=120)[0]
            heard = last_logged(out)
            wait_until(lambda: last_logged(out) > heard + 50 or process.poll() is not None, 120)
            process.send_signal(signal.SIGHUP)
            assert process.wait(60) == 128 + signal.SIGHUP
        assert read(latest(out)).about["step"] > heard + 50

    def test_a_failing_report_is_told_once(self, tmp_path):
        def report(record):
            raise BrokenPipeError(32, "Broken pipe")

        with pytest.warns(RuntimeWarning, match="report raised BrokenPipeError: .* training goes on") as told:
            history = train(model(), corpus(), QUICK, folder=tmp_path, report=report)
        assert len(told) == 1 and len(history.steps) == 8 and latest(tmp_path)

    def test_not_even_where_warnings_are_errors(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(train(model(), corpus(), QUICK, report=lambda record: 1 / 0).steps) == 8

    def test_a_bar_that_cannot_be_written(self, monkeypatch):
        class Closed:
            encoding = "utf-8"

            def write(self, text):
                raise BrokenPipeError(32, "Broken pipe")

            flush = fileno = isatty = lambda self: self.write("")

        monkeypatch.setattr(sys, "stderr", Closed())
        assert len(train(model(), corpus(), QUICK, progress=True).steps) == 8

    @staticmethod
    def disk_that_refuses_logs(monkeypatch, times):
        """A disk that has no space for the next `times` appends to a log; returns the paths that it refused."""
        real, refused = open, []

        def full(path, *arguments, **options):
            if Path(str(path)).name == "log.jsonl" and "ab" in arguments and len(refused) < times:
                refused.append(path)
                raise OSError(28, "No space left on device")
            return real(path, *arguments, **options)

        monkeypatch.setattr("builtins.open", full)
        return refused

    def test_a_log_that_cannot_be_written_waits(self, tmp_path, monkeypatch):
        refused = self.disk_that_refuses_logs(monkeypatch, 2)
        with pytest.warns(RuntimeWarning, match=r"could not write .*log\.jsonl: No space") as told:
            train(model(), corpus(), QUICK, folder=tmp_path)
        records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert len(told) == 1 and len(refused) == 2
        assert [record["step"] for record in records if "step" in record] == list(range(1, 9))

    def test_a_log_that_never_could_be_written_is_in_the_checkpoint(self, tmp_path, monkeypatch):
        with monkeypatch.context() as patch, pytest.warns(RuntimeWarning, match="could not write"):
            self.disk_that_refuses_logs(patch, sys.maxsize)
            history = train(model(), corpus(), QUICK, folder=tmp_path)
        assert last_logged(tmp_path) == 0
        again = train(model(), corpus(), QUICK, folder=tmp_path, resume=True)
        assert again.steps == history.steps and again.evaluations == history.evaluations and last_logged(tmp_path) == 8

    def test_a_line_is_appended_whole_or_not_at_all(self, tmp_path):
        resource = pytest.importorskip("resource")
        path = tmp_path / "log.jsonl"
        path.write_bytes(b"x" * 90 + b"\n")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
            with pytest.raises(OSError):
                interruptions.append_whole(path, b"y" * 30 + b"\n")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == b"x" * 90 + b"\n"

    def test_a_log_of_bytes_that_are_no_text(self, tmp_path):
        (tmp_path / "log.jsonl").write_bytes(
            b'\xff\xfe\n{"step": 1}\n[3]\n7\n{"step": "x"}\n{"other": 1}\n{"step": 2}\n{"st'
        )
        assert interruptions.read_log(tmp_path / "log.jsonl", 1) == ([{"step": 1}], [1, 3, 4, 5, 6])


class Poison(torch.autograd.Function):
    """The identity, whose gradient is `value` everywhere."""

    @staticmethod
    def forward(ctx, x, value):
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.full_like(gradient, ctx.value), None


def poisoned_at(step: int, value: float):
    """A model whose loss stays finite and whose gradient in one step is not."""
    net, calls = model(), []

    def hook(module, arguments, output):
        if module.training:
            calls.append(1)
        return Poison.apply(output, value) if len(calls) == step and module.training else output

    net.norm.register_forward_hook(hook)
    return net


class TestNumbersThatAreNone:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("clip", [1.0, 0.0])
    def test_a_gradient_is_never_stored(self, tmp_path, value, clip):
        config = replace(QUICK, checkpoint_every=2, clip=clip)
        message = r"the gradient norm is (nan|inf) at step 6: the last good checkpoint is \S*0000004\S*: .*--change"
        with pytest.raises(TrainingError, match=message):
            train(poisoned_at(6, value), corpus(), config, folder=tmp_path)
        assert [checkpoint.step_of(path) for path in checkpoint.numbered(tmp_path)] == [2, 4]
        again = train(model(9), corpus(), config, folder=tmp_path, resume=True)
        assert losses(again) == losses(train(model(), corpus(), config))

    def test_without_a_folder_too(self):
        config = replace(QUICK, evaluate_every=0, evaluation_tokens=0, log_every=100)
        with pytest.raises(TrainingError, match="the gradient norm is nan at step 8: start again"):
            train(poisoned_at(8, float("nan")), corpus(), config)

    def test_a_weight_is_never_stored(self, tmp_path):
        """Loss and gradient are finite, the step itself goes beyond the largest number."""
        config = replace(QUICK, learning_rate=1e30, min_learning_rate=1e30, weight_decay=1e30, steps=1)
        with pytest.raises(TrainingError, match="a weight is no finite number after step 1: start again"):
            train(model(), corpus(), config, folder=tmp_path)
        assert latest(tmp_path) is None

    def test_the_steps_before_it_are_logged(self, tmp_path):
        config = replace(QUICK, log_every=8, evaluate_every=0)
        with pytest.raises(TrainingError, match="at step 6"):
            train(poisoned_at(6, float("nan")), corpus(), config, folder=tmp_path)
        assert last_logged(tmp_path) == 5


class TestTheCommandGoesOn:
    """`--resume` takes the run's own settings, and refuses others unless asked."""

    @pytest.fixture
    def begun(self, text, tmp_path):
        out = tmp_path / "run"
        own = [*OPTIONS, "--corpus", text, "--steps", "4", "--learning-rate", "0.001", "--seed", "3", "--quiet"]
        assert self.train("--out", out, *own).exit_code == 0
        return out

    @staticmethod
    def train(*arguments):
        return CliRunner().invoke(app, ["train", *map(str, arguments)])

    def test_with_nothing_else_given(self, begun):
        for path in checkpoint.numbered(begun):
            path.unlink()
        (begun / "model").rename(begun / "kept")
        result = self.train("--out", begun, "--resume", "--quiet", "--device", "cpu")
        assert result.exit_code == 0, result.output
        about = read(latest(begun)).about
        assert about["train"]["learning_rate"] == 0.001 and about["train"]["seed"] == 3 and about["step"] == 4
        assert about["model"]["width"] == 16

    @pytest.mark.parametrize(
        ("option", "value", "name"),
        [("--steps", 9, "steps"), ("--learning-rate", 0.01, "learning_rate"), ("--width", 32, "width")],
    )
    def test_another_setting_is_refused_by_name(self, begun, option, value, name):
        result = self.train("--out", begun, "--resume", "--quiet", "--device", "cpu", option, value)
        assert result.exit_code == 2 and f"cannot resume: {name} is" in result.stderr
        assert len(result.stderr.splitlines()) == 1

    def test_another_setting_on_request(self, begun):
        options = ["--steps", 6, "--learning-rate", 0.002, "--change", "steps", "--change", "learning-rate"]
        result = self.train("--out", begun, "--resume", "--quiet", "--device", "cpu", *options)
        assert result.exit_code == 0, result.output
        assert read(latest(begun)).about["step"] == 6
        about = json.loads((begun / "model" / "run.json").read_text())
        assert about["step"] == 6 and about["train"]["min_learning_rate"] == pytest.approx(2e-4)

    def test_an_older_checkpoint_on_request(self, begun):
        self.train("--out", begun, "--resume", "--quiet", "--device", "cpu", "--steps", 6, "--change", "steps")
        content = bytearray(latest(begun).read_bytes())
        content[-50] ^= 1
        latest(begun).write_bytes(content)
        result = self.train("--out", begun, "--resume", "--quiet", "--device", "cpu")
        assert result.exit_code == 2 and "is damaged" in result.stderr
        older = re.search(r"--resume-from (\S+)", result.stderr)[1]
        result = self.train("--out", begun, "--resume-from", older, "--quiet", "--device", "cpu", "--change", "steps")
        assert result.exit_code == 0, result.output
        assert read(latest(begun)).about["step"] == 6

    @pytest.mark.parametrize("option", ["--clip", "--learning-rate", "--weight-decay"])
    @pytest.mark.parametrize("value", ["nan", "inf", "-1"])
    def test_no_number_for_a_number(self, tmp_path, option, value):
        result = self.train("--out", tmp_path / "run", option, value)
        assert result.exit_code == 2 and option[2:].replace("-", "_") in result.stderr.replace("-", "_")
        assert not (tmp_path / "run").exists()

    def test_a_folder_in_use(self, begun):
        from dn_lib.training.folder import held

        with held(begun):
            result = self.train("--out", begun, "--resume", "--quiet", "--device", "cpu")
        assert result.exit_code == 2 and "is in use by another run" in result.stderr


class FailsAt:
    """While it is entered, the `number`-th file operation in `folder` fails as a broken disk does."""

    names = ("listdir", "mkdir", "open", "rename", "replace", "scandir", "stat", "unlink")

    def __init__(self, folder: Path, number: int):
        self.folder, self.number, self.seen = str(folder), number, 0

    def wrapped(self, function):
        def call(path, *rest, **named):
            if self.folder in str(path):
                self.seen += 1
                if self.seen == self.number:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
            return function(path, *rest, **named)

        return call

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name in self.names:
            self.patch.setattr(os, name, self.wrapped(getattr(os, name)))
        self.patch.setattr(builtins, "open", self.wrapped(open))
        return self

    def __exit__(self, *problem):
        self.patch.undo()


def test_whichever_file_operation_fails_nothing_is_lost(tmp_path):
    """Each in turn: training goes on or ends with a CheckpointError, and the run can be gone on with, exactly."""
    config = replace(QUICK, steps=2, checkpoint_every=1, keep=1, evaluate_every=0, evaluation_tokens=0, log_every=1)
    text, ended = corpus(), set()

    def trained(folder, **options) -> list[float]:
        return losses(train(model(width=8, layers=1, heads=1, hybrid="none"), text, config, folder=folder, **options))

    wanted = trained(None)
    for number in itertools.count(1):
        folder = tmp_path / str(number) / "run"
        with FailsAt(folder, number) as disk, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a log that could not be written
            try:
                trained(folder)
                ended.add("trained")
            except CheckpointError as error:
                assert "Input/output error" in str(error) or "cannot be" in str(error)
                ended.add("told")
        if disk.seen < number:
            break
        assert all(read(path) for path in checkpoint.numbered(folder))
        assert trained(folder, resume=True) == wanted
    assert number > 30 and ended == {"trained", "told"}


def test_an_unwritable_folder_is_told_before_training():
    with pytest.raises(CheckpointError, match="folder /proc/nothing cannot be made"):
        train(model(), corpus(), QUICK, folder="/proc/nothing")
