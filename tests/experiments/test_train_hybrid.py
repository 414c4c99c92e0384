"""The models that chapter 6 compares, and a run that is stopped and goes on."""

from __future__ import annotations

import json

import pytest
import torch
from small_runs import TEXT, last_logged, wait_until

from dn_lib.models import LanguageModel, ModelConfig
from experiments.models import throughput
from experiments.models import train_hybrid as script


def test_equal_parameters():
    """The three kinds of chapter 6's comparison, and those of the throughput benchmark, within 2%."""
    sizes = script.sizes(script.EXPERIMENT.arguments(["--sizes"]))
    assert set(sizes) == {"hybrid", "delta", "attention"}
    assert max(sizes.values()) < 1.02 * min(sizes.values())
    assert sizes["hybrid"] == pytest.approx(26e6, rel=0.02)
    shape = throughput.SHAPE
    with torch.device("meta"):
        counts = [LanguageModel(ModelConfig(**shape, mixer=mixer)).num_parameters() for mixer in ("delta", "attention")]
    assert max(counts) < 1.02 * min(counts)


def test_a_run_stopped_and_resumed_writes_what_the_chapter_reads(begin, tmp_path):
    """SIGTERM during training; the same command finishes, with the steps fixed at the start."""
    text = tmp_path / "texts"
    text.mkdir()
    for number in range(30):  # by the hash of their names, some of them are for validation
        (text / f"part_{number}.py").write_bytes(TEXT[:5000])
    out, run = tmp_path / "delta_training.json", tmp_path / "run"
    # fmt: off
    options = [
        "--kind", "delta", "--corpus", str(text), "--steps", "60", "--width", "16", "--layers", "2", "--heads", "2",
        "--batch", "4", "--length", "64", "--evaluations", "3", "--evaluation-tokens", "256", "--samples", "1",
        "--sample-tokens", "8", "--device", "cpu", "--folder", str(run), "--out", str(out),
    ]
    # fmt: on
    process = begin("train_hybrid", *options)
    wait_until(lambda: process.poll() is not None or last_logged(run) >= 20, 120)
    process.terminate()
    printed, _ = process.communicate()
    assert process.returncode == 1 and "stopped; the same command" in printed, printed
    process = begin("train_hybrid", *[*options[:5], "999", *options[6:]])
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    result = json.loads(out.read_text())
    assert result["kind"] == "delta" and result["training_tokens"] == 60 * 4 * 64
    assert [record["step"] for record in result["evaluations"]] == [20, 40, 60]
    wanted = {"final", "samples", "share_that_parses", "decode", "timings", "provenance", "corpus", "flop_use"}
    assert wanted <= set(result) and {"first", "later"} == set(result["final"]["loss_at_names"])
