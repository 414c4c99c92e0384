"""The loop: schedule, exact resume, kill -9, signals, a full disk, several processes, measures."""

import argparse
import ast
import itertools
import json
import math
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import CONFIG, TEXT, corpus, last_logged, losses, model, wait_until

import dn_lib  # noqa: F401
from dn_lib.data import ByteTokenizer, Corpus, DataError, split_text
from dn_lib.training import (
    CheckpointError,
    TrainConfig,
    TrainingError,
    bits_per_byte,
    checkpoint,
    document_windows,
    evaluate,
    latest,
    learning_rate_at,
    loss_at_names,
    loss_by_position,
    name_occurrences,
    parses,
    read,
    resolve_device,
    steps_within,
    token_losses,
    train,
    windows,
)
from dn_lib.training.folder import held
from dn_lib.training.runs import export, load_run


class TestConfig:
    @pytest.mark.parametrize(
        "change",
        [
            {"steps": 0},
            {"batch": 0},
            {"warmup": -1},
            {"learning_rate": 1e-5},
            {"precision": "float8"},
            {"parallel": "both"},
            {"steps": True},
            {"steps": 2.0},
            {"batch": "4"},
            {"keep": None},
            {"evaluation_tokens": -1},
            {"log_every": float("nan")},
            {"seed": 2**64},
            {"seed": 0.5},
            {"clip": float("nan")},
            {"clip": float("inf")},
            {"clip": -1.0},
            {"clip": "1"},
            {"weight_decay": float("nan")},
            {"weight_decay": True},
            {"learning_rate": float("nan")},
            {"learning_rate": float("inf")},
            {"min_learning_rate": float("nan")},
            {"min_learning_rate": -1e-4},
            {"betas": (0.9, float("nan"))},
            {"betas": (0.9, 1.0)},
            {"betas": 0.9},
            {"betas": (0.9,)},
            {"compile": 1},
        ],
    )
    def test_names_the_setting(self, change):
        name = "learning_rate" if "learning_rate" in change else next(iter(change))
        with pytest.raises(ValueError, match=name):
            replace(CONFIG, **change)

    def test_numbers_of_numpy_become_plain_ones(self):
        """Otherwise the first checkpoint, hours later, could not be written."""
        config = replace(CONFIG, steps=np.int64(3), clip=np.float32(0.5), seed=np.int32(-1), device=torch.device("cpu"))
        assert json.loads(json.dumps(config.to_dict()))["steps"] == 3 and config.device == "cpu"

    def test_json_round_trip(self):
        assert TrainConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG
        with pytest.raises(ValueError, match="unknown training settings: speed"):
            TrainConfig.from_dict({"speed": 1})

    def test_gpu_that_is_not_there(self):
        with pytest.raises(ValueError, match="use --device cpu"):
            resolve_device(f"cuda:{torch.cuda.device_count()}")
        with pytest.raises(ValueError, match="device must be auto"):
            resolve_device("gpu")


class TestLearningRate:
    config = TrainConfig(steps=100, warmup=10, learning_rate=1.0, min_learning_rate=0.1)

    def test_shape(self):
        rates = [learning_rate_at(step, self.config) for step in range(100)]
        assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and rates[-1] == pytest.approx(0.1)
        assert all(a < b for a, b in itertools.pairwise(rates[:10]))
        assert all(a > b for a, b in itertools.pairwise(rates[9:]))
        assert rates[54] == pytest.approx(0.55)

    def test_no_warmup_and_beyond_the_end(self):
        config = replace(self.config, warmup=0)
        assert learning_rate_at(99, config) == learning_rate_at(500, config) == pytest.approx(0.1)


class TestTraining:
    def test_the_loss_falls(self):
        history = train(model(), corpus(), replace(CONFIG, steps=60, learning_rate=1e-2, batch=8))
        assert history.evaluations[-1]["bits_per_byte"] < 4.5 < history.evaluations[0]["bits_per_byte"]
        assert losses(history)[0] == pytest.approx(math.log(256), rel=0.05)
        assert history.tokens_per_second > 0

    def test_accumulation_changes_nothing_but_rounding(self):
        one = train(model(), corpus(), CONFIG)
        four = train(model(), corpus(), replace(CONFIG, accumulate=4))
        assert np.allclose(losses(one), losses(four), rtol=1e-5)

    def test_clipping_bounds_the_gradient(self):
        """Gradients far below AdamW's epsilon of 1e-8 hardly move anything; unclipped ones do."""
        moved = {}
        for clip in (0.0, 1e-12):
            net, start = model(), model().head.weight
            history = train(net, corpus(), replace(CONFIG, clip=clip, weight_decay=0.0))
            moved[clip] = (net.head.weight - start).abs().max().item()
            assert history.steps[0]["gradient_norm"] > 0.1  # the norm is told as it was before clipping
        assert moved[1e-12] < 1e-3 * moved[0.0]

    def test_weight_decay_is_for_matrices_only(self):
        from dn_lib.training import make_optimiser

        decayed, others = make_optimiser(model(), CONFIG).param_groups
        assert decayed["weight_decay"] == CONFIG.weight_decay and others["weight_decay"] == 0.0
        assert all(p.ndim == 2 for p in decayed["params"]) and all(p.ndim != 2 for p in others["params"])

    def test_log_and_report(self, tmp_path):
        seen = []
        history = train(model(), corpus(), CONFIG, folder=tmp_path, report=seen.append)
        lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "step" in line] == list(range(1, 13))
        assert [line["evaluation"] for line in lines if "evaluation" in line] == seen == history.evaluations
        assert [record["step"] for record in seen] == [6, 12]

    def test_a_loss_that_is_no_number(self, tmp_path):
        broken = model()
        train(broken, corpus(), CONFIG, folder=tmp_path)
        with torch.no_grad():
            broken.norm.weight.fill_(float("nan"))
        with pytest.raises(TrainingError, match=r"the loss is nan at step 1: .* lower learning rate"):
            train(broken, corpus(), CONFIG)

    def test_context_longer_than_the_data(self):
        with pytest.raises(DataError, match="length must be below the number of training tokens"):
            train(model(), corpus(), replace(CONFIG, length=10**6))
        short = Corpus(np.zeros(1000, np.uint8), np.zeros(10, np.uint8), ByteTokenizer())
        with pytest.raises(DataError, match="length must be below the number of validation tokens"):
            train(model(), short, CONFIG)

    def test_steps_within_leaves_the_model_alone(self):
        net = model()
        before = {name: p.clone() for name, p in net.named_parameters()}
        config = steps_within(0.5, net, corpus(), CONFIG)
        assert config.steps >= 10 and config.evaluate_every <= config.steps
        assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


class TestResume:
    """What is saved at step n is all that step n + 1 depends on."""

    @pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}])
    def test_exact(self, tmp_path, changes):
        whole = train(model(**changes), corpus(), replace(CONFIG, checkpoint_every=5), folder=tmp_path / "a")
        first = replace(CONFIG, checkpoint_every=5, keep=9)
        train(model(**changes), corpus(), first, folder=tmp_path / "b")
        for path in sorted((tmp_path / "b").glob("checkpoint_*"))[1:]:
            path.unlink()
        assert read(latest(tmp_path / "b")).about["step"] == 5
        again = train(model(99, **changes), corpus(), first, folder=tmp_path / "b", resume=True)
        assert losses(again) == losses(whole)
        assert [r["loss"] for r in again.evaluations] == [r["loss"] for r in whole.evaluations]
        lines = [json.loads(line) for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "step" in line] == list(range(1, 13))

    def test_without_a_checkpoint_it_starts(self, tmp_path):
        assert len(train(model(), corpus(), CONFIG, folder=tmp_path, resume=True).steps) == 12

    def test_a_finished_run_has_nothing_left_to_do(self, tmp_path):
        train(model(), corpus(), CONFIG, folder=tmp_path)
        assert len(train(model(), corpus(), CONFIG, folder=tmp_path, resume=True).steps) == 12

    def test_a_folder_is_not_used_twice(self, tmp_path):
        train(model(), corpus(), CONFIG, folder=tmp_path)
        with pytest.raises(CheckpointError, match="holds a run already"):
            train(model(), corpus(), CONFIG, folder=tmp_path)

    def test_another_vocabulary(self, tmp_path):
        train(model(), corpus(), CONFIG, folder=tmp_path)
        with pytest.raises(CheckpointError, match="cannot resume: vocab_size is 256 in the checkpoint, 300"):
            train(model(vocab_size=300), corpus(), CONFIG, folder=tmp_path, resume=True)

    def test_another_model(self, tmp_path):
        train(model(), corpus(), CONFIG, folder=tmp_path)
        with pytest.raises(CheckpointError, match="cannot resume: window is 8 in the checkpoint, 4 here"):
            train(model(window=4), corpus(), CONFIG, folder=tmp_path, resume=True)

    def test_another_corpus(self, tmp_path):
        train(model(), corpus(), CONFIG, folder=tmp_path)
        other = split_text(TEXT + b"more\n", name="text")
        with pytest.raises(CheckpointError, match="cannot resume: the corpus differs"):
            train(model(), other, CONFIG, folder=tmp_path, resume=True)

    def test_no_checkpoint_at_all(self, tmp_path):
        path = checkpoint.checkpoint_path(tmp_path, 3)
        path.write_bytes(b"not a checkpoint")
        with pytest.raises(CheckpointError, match="no readable checkpoint"):
            train(model(), corpus(), CONFIG, folder=tmp_path, resume=True)

    def test_only_the_newest_are_kept(self, tmp_path):
        train(model(), corpus(), replace(CONFIG, checkpoint_every=2, keep=3), folder=tmp_path)
        steps = [int(path.stem[-7:]) for path in sorted(tmp_path.glob("checkpoint_*"))]
        assert steps == [8, 10, 12]


PARENT = """
    import io, os, sys, time, dn_lib, torch
    torch.set_num_threads(1)
    sys.path[:0] = {tests!r}
    from test_training import CONFIG, checkpoint, corpus, model, replace, train

    class SlowDisk(io.FileIO):
        def write(self, content):
            half = len(content) // 2
            written = super().write(content[:half])
            time.sleep(0.01)
            return written + super().write(content[half:])

    checkpoint.open = SlowDisk
    config = replace(CONFIG, steps={steps}, checkpoint_every=3, log_every=1)
    print("ready", flush=True)
    for folder in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                train(model(), corpus(), config, folder=folder.strip(), resume=True)
                code = 0
            finally:
                os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def forking_parent():
    """A process that has imported torch: each line it is given, a folder, forks one that trains there.

    It answers with the child's number, and with its exit code when it has ended. Restarts then cost
    milliseconds, where a new Python would cost seconds. Writing half of a checkpoint takes a hundredth of a second,
    as with a larger model or a slow disk, so that there is something to interrupt.
    """
    script = textwrap.dedent(
        PARENT.format(tests=[str(folder) for folder in Path(__file__).parents[:2]], steps=TestKilled.steps)
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.stdin.close()
    process.stdout.close()
    process.wait()


class TestKilled:
    steps, kills = 200, 20

    def test_killed_twenty_times_the_losses_are_those_of_a_run_left_alone(self, tmp_path, forking_parent):
        """SIGKILL at random moments, the same command again, no checkpoint is ever unreadable, all losses exact."""
        parent, chance = forking_parent, random.Random(0)

        def start(folder) -> int:
            parent.stdin.write(f"{folder}\n")
            return int(parent.stdout.readline())

        start(tmp_path / "whole")
        assert parent.stdout.readline() == "0\n"
        folder, saved, cut = tmp_path / "killed", 0, 0
        for _ in range(self.kills):
            child, kind = start(folder), chance.choice(["soon", "in a step", "in a checkpoint"])
            if kind == "soon":  # while it reads the checkpoint, or cuts the log back to it
                time.sleep(chance.uniform(0, 0.1))
            else:
                target = saved + chance.randint(1, 9)
                wait_until(lambda target=target: last_logged(folder) >= target, 60)
            if kind == "in a step":
                time.sleep(chance.uniform(0, 0.02))
            elif kind == "in a checkpoint":
                wait_until(lambda: any(folder.glob("*.part")), 1)
            os.kill(child, signal.SIGKILL)
            assert parent.stdout.readline() == f"{-signal.SIGKILL}\n"
            steps = [read(path).about["step"] for path in sorted(folder.glob("checkpoint_*.safetensors"))]
            assert max(steps, default=0) >= saved  # all are whole, and the newest is not lost
            saved = max(steps, default=0)
            cut += any(folder.glob("*.part"))
        assert cut > 0  # some were killed while they wrote
        assert 0 < saved < self.steps
        start(folder)
        assert parent.stdout.readline() == "0\n"
        assert logged(folder) == logged(tmp_path / "whole")
        assert [step for step, _ in logged(folder)] == list(range(1, self.steps + 1))

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_signals_stop_after_a_checkpoint(self, tmp_path, number):
        seen = []

        def report(record):
            seen.append(record)
            signal.raise_signal(number)

        before = signal.getsignal(number)
        config = replace(CONFIG, steps=40, evaluate_every=10)
        history = train(model(), corpus(), config, folder=tmp_path, report=report)
        assert history.stopped == number and len(history.steps) == 11
        assert read(latest(tmp_path)).about["step"] == 11
        assert signal.getsignal(number) == before
        again = train(model(3), corpus(), config, folder=tmp_path, resume=True)
        assert losses(again) == losses(train(model(), corpus(), config))


def logged(folder) -> list[tuple[int, float]]:
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(record["step"], record["loss"]) for record in records if "step" in record]


class TestFullDisk:
    def test_the_last_good_checkpoint_stays(self, tmp_path):
        """A file-size limit is the full disk that a test without privileges can have."""
        config = replace(CONFIG, steps=6, checkpoint_every=6)
        train(model(), corpus(), config, folder=tmp_path)
        good = latest(tmp_path).read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, hard))
            with pytest.raises(CheckpointError, match=r"could not write .* the last good one is .*0000006"):
                train(model(), corpus(), CONFIG, folder=tmp_path, resume=True, allow_changes=["steps"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert latest(tmp_path).read_bytes() == good
        assert list(tmp_path.glob("*.part")) == []
        again = train(model(), corpus(), CONFIG, folder=tmp_path, resume=True, allow_changes=["steps"])
        assert len(again.steps) == 12

    def test_a_write_cut_short_never_gets_the_name(self, tmp_path, monkeypatch):
        def full(descriptor):
            if any(tmp_path.glob("checkpoint_*.part")):
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left on device; there is none before it"):
            train(model(), corpus(), CONFIG, folder=tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl", "run.json", "run.lock"]


PARALLEL = """
    import json, sys, dn_lib, torch
    torch.set_num_threads(1)
    sys.path[:0] = {tests!r}
    from test_training import CONFIG, CheckpointError, corpus, losses, model, replace, train
    found = {{}}
    try:
        train(model(), corpus(), CONFIG, folder={folder!r} + "busy")
    except CheckpointError as error:
        found["busy"] = str(error)
    torch.compiler.set_stance("force_eager")  # of what is compiled below, only the wrapper matters
    for kind in ("ddp", "fsdp"):
        config = replace(CONFIG, steps=6, parallel=kind, accumulate=2, evaluation_tokens=240)
        history = train(model(), corpus(), config, folder={folder!r} + kind)
        found[kind] = [losses(history), history.evaluations]
        config = replace(config, steps=8)
        net = torch.compile(model(1))
        again = train(net, corpus(), config, folder={folder!r} + kind, resume=True, allow_changes=["steps"])
        found[kind + " resumed"] = losses(again)
    print(json.dumps(found))
"""


def test_two_processes_give_the_losses_of_one(tmp_path):
    """DDP and FSDP2 over gloo, with accumulation; a compiled model goes on from what a bare one has saved.

    A folder in use is told by both processes: neither waits for the other.
    """
    one = train(model(), corpus(), replace(CONFIG, steps=6))
    tests = [str(folder) for folder in Path(__file__).parents[:2]]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(2):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        script = textwrap.dedent(PARALLEL.format(tests=tests, folder=str(tmp_path / "run_"), rank=rank))
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", script],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        with held(tmp_path / "run_busy"):
            outputs = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), outputs[0][1][-3000:]
    found, other = (json.loads(printed.splitlines()[-1]) for printed, _ in outputs)
    assert found["busy"] == other["busy"] and "is in use by another run" in found["busy"]
    for kind in ("ddp", "fsdp"):
        values, evaluations = found[kind]
        assert np.allclose(values, losses(one), rtol=1e-5, atol=0)
        assert evaluations[-1]["loss"] == pytest.approx(one.evaluations[-1]["loss"], rel=1e-5)
        saved = read(latest(tmp_path / f"run_{kind}"))
        assert saved.about["step"] == 8 and len(found[f"{kind} resumed"]) == 8
        assert found[f"{kind} resumed"][:6] == values
    whole = {
        kind: checkpoint.read(latest(tmp_path / f"run_{kind}")).tensors["model.head.weight"] for kind in ("ddp", "fsdp")
    }
    assert torch.allclose(whole["ddp"], whole["fsdp"], rtol=1e-4, atol=1e-6)


class TestRuns:
    def test_export_and_load(self, tmp_path):
        net = model()
        train(net, corpus(), CONFIG, folder=tmp_path)
        from_checkpoint, tokenizer, facts = load_run(tmp_path)
        export(tmp_path, corpus().tokenizer)
        from_model, _, again = load_run(tmp_path)
        tokens = torch.arange(10)[None]
        with torch.no_grad():
            assert torch.equal(net(tokens), from_checkpoint(tokens))
            assert torch.equal(net(tokens), from_model(tokens))
        assert tokenizer.name == "bytes" and facts["name"] == again["name"] == "text"

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="must hold a model or a checkpoint"):
            load_run(tmp_path / "nowhere")


class Uniform(torch.nn.Module):
    """Every token equally likely; `certain` makes it know the answer at position `certain` and later."""

    def __init__(self, vocabulary=256):
        super().__init__()
        self.p = torch.nn.Parameter(torch.zeros(vocabulary))

    def forward(self, tokens):
        return self.p.expand(*tokens.shape, -1)


class TestMeasures:
    def test_uniform_is_eight_bits(self):
        result = evaluate(Uniform(), corpus(), length=50)
        assert result["bits_per_byte"] == pytest.approx(8.0, abs=1e-5)

    def test_bytes_per_token(self):
        assert bits_per_byte(math.log(16), 2.0) == pytest.approx(2.0)

    def test_windows_predict_every_token_once(self):
        rows = windows(np.arange(101), 10)
        assert rows[:, 1:].flatten().tolist() == list(range(1, 101))
        assert windows(np.arange(101), 10, limit=30).shape == (3, 11)

    def test_token_losses_are_those_of_the_logits(self):
        net, rows = model(), windows(corpus().validation, 20, 100)
        loss = token_losses(net, rows, batch=2)
        with torch.no_grad():
            logits = net(rows[:, :-1]).log_softmax(-1)
        wanted = -logits.gather(-1, rows[:, 1:, None]).squeeze(-1)
        assert torch.allclose(loss, wanted, atol=1e-5)
        assert net.training

    def test_loss_by_position_is_a_partition(self):
        loss = torch.rand(3, 100)
        edges, means = loss_by_position(loss, bins=7)
        widths = np.diff([0, *edges])
        assert edges[-1] == 100 and np.dot(widths, means) / 100 == pytest.approx(loss.mean().item(), rel=1e-5)

    def test_name_occurrences(self):
        text = b"import json\n\x0cdef load(path):\n    return json.load(path)\n"
        first, later = name_occurrences(text)
        assert [text[a:b] for a, b in first] == [b"json", b"load", b"path"]
        assert [text[a:b] for a, b in later] == [b"json", b"load", b"path"]
        assert name_occurrences(b"call(unfinished, 'str")[0][:1] == [(0, 4)]

    @pytest.mark.parametrize(
        ("source", "names"),
        [
            (r"f'no {{nor}} {alpha} \N{GREEK} {beta!r:>{gamma}} none'", "alpha beta gamma"),
            (r"rf'\{alpha} \\{beta} \'none' + gamma", "alpha beta gamma"),
            ("f'{dict(alpha=[beta], more={1: gamma})[delta]:none}'", "dict alpha beta more gamma delta"),
            ('f"""none {alpha} "none" {f\'{beta}\'} none""" + gamma', "alpha beta gamma"),
            ("b'none' + u'none' + r'none\\\\' # none\n0xabcdef + 1e1000 + alpha", "alpha"),
            ("F'{alpha}' + t'{beta}' + Rb'{none}'", "alpha beta"),
            ("alpha = 'none\nbeta", "alpha"),
            ("alpha = f'none {beta", "alpha beta"),
        ],
    )
    def test_the_same_names_are_counted_on_every_version_of_python(self, source, names):
        first, later = name_occurrences(source.encode())
        assert sorted(source[a:b] for a, b in first + later) == sorted(names.split())

    def test_names_are_those_of_the_compiler(self):
        """Every name in the syntax tree of a module stands where it was found; 3.11 misplaces those in f-strings."""
        text = Path(argparse.__file__).read_bytes()
        found = {span for spans in name_occurrences(text) for span in spans}
        starts = [0, *itertools.accumulate(len(line) + 1 for line in text.split(b"\n"))]
        nodes = list(ast.walk(ast.parse(text)))
        formatted = {inner for node in nodes if isinstance(node, ast.JoinedStr) for inner in ast.walk(node)}
        names = [node for node in nodes if isinstance(node, ast.Name) and len(node.id) >= 4 and node not in formatted]
        assert len(names) > 1000
        for node in names:
            begin = starts[node.lineno - 1] + node.col_offset
            assert (begin, begin + len(node.id)) in found

    def test_loss_at_names(self):
        text = b"\0value = 1\nprint(value)\n" + b"#" * 40
        rows = document_windows(np.frombuffer(text, np.uint8), len(text) - 1)
        result = loss_at_names(Uniform(), rows)
        assert result["first"] == result["later"] == pytest.approx(math.log(256), rel=1e-5)

    def test_document_windows(self):
        tokens = np.array([0, 1, 2, 0, 3, 4, 5, 6, 0, 7], np.uint8)
        assert document_windows(tokens, 3).tolist() == [[0, 3, 4, 5]]
        with pytest.raises(DataError, match="length must be below"):
            document_windows(tokens, 30)

    @pytest.mark.parametrize(
        ("source", "good"),
        [("def f():\n    return 1\nx = (", True), ("def f(:\n", False), ("", False), ("\n\n", False)],
    )
    def test_parses(self, source, good):
        assert parses(source) is good
