"""The model in one file: the package's own losses, step by step, on the same weights and the same text."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import corpus

from dn_lib.models import LanguageModel, ModelConfig
from dn_lib.training import TrainConfig
from dn_lib.training import train as train_package
from experiments import nano_delta as nano

SMALL = nano.Settings(width=32, layers=4, heads=2, window=8, hidden=64, batch=4, length=48, steps=30, warmup=5)
PATH = Path(nano.__file__)


def package_model(s: nano.Settings) -> LanguageModel:
    torch.manual_seed(s.seed)
    shape = ModelConfig(
        vocab_size=s.vocab, width=s.width, layers=s.layers, heads=s.heads, window=s.window, hidden=s.hidden,
        conv_size=s.conv, hybrid="window",
    )  # fmt: skip
    return LanguageModel(shape)


def package_training(s: nano.Settings, device: str = "cpu") -> TrainConfig:
    same = ("steps", "batch", "length", "warmup", "learning_rate", "weight_decay", "clip", "seed")
    values = {name: getattr(s, name) for name in same}
    return TrainConfig(**values, min_learning_rate=s.learning_rate / 10, evaluation_tokens=0, device=device)


def test_it_fits_on_a_few_pages_and_uses_the_operator_alone():
    text = PATH.read_text()
    assert len(text.splitlines()) <= 250
    used = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    of_ours = [
        ast.unparse(node) for node in used if "dn_lib" in ast.unparse(node) or "experiments" in ast.unparse(node)
    ]
    assert of_ours == ["from dn_lib import delta_rule"]


def test_losses_are_those_of_the_package():
    """Float32 on both sides: what differs is the order of sums, some 1e-7 in a step, which training multiplies. Over 30
    steps at this rate the losses part by less than 1e-4; a wrong schedule, decay, mask or start parts them by 1e-2."""
    ours, theirs = nano.Model(SMALL), package_model(SMALL)
    ours.load_state_dict(theirs.state_dict())  # the names and shapes of all parameters are the same
    text = corpus()
    expected = [record["loss"] for record in train_package(theirs, text, package_training(SMALL)).steps]
    found = nano.train(ours, text.train, SMALL)
    assert len(found) == 30 and expected[-1] < expected[0] - 1
    assert np.allclose(found, expected, rtol=1e-4, atol=0)
    theirs_by_name = dict(theirs.named_parameters())
    apart = {n: ((p - theirs_by_name[n]).norm() / theirs_by_name[n].norm()).item() for n, p in ours.named_parameters()}
    assert max(apart.values()) < 1e-2, apart


@pytest.mark.parametrize(
    "change",
    [{"learning_rate": 3e-3}, {"warmup": 6}, {"weight_decay": 0.5}, {"clip": 1e-6}, {"window": 7}, {"seed": 1}],
    ids=lambda change: next(iter(change)),
)
def test_a_setting_that_differs_would_be_seen(change):
    """The comparison above can fail: each of these, in one of the two, moves a loss further than its tolerance."""
    ours, theirs = nano.Model(replace(SMALL, **change)), package_model(SMALL)
    ours.load_state_dict(theirs.state_dict())
    text = corpus()
    expected = [record["loss"] for record in train_package(theirs, text, package_training(SMALL)).steps]
    assert not np.allclose(nano.train(ours, text.train, replace(SMALL, **change)), expected, rtol=1e-4, atol=0)


def test_the_start_is_drawn_like_the_packages():
    """The same spread of every weight, though not the same numbers."""
    ours, theirs = dict(nano.Model(SMALL).named_parameters()), dict(package_model(SMALL).named_parameters())
    assert {name: p.shape for name, p in ours.items()} == {name: p.shape for name, p in theirs.items()}
    for name, p in ours.items():
        spread = theirs[name].std().item()
        assert p.std().item() == pytest.approx(spread, rel=5 / p.numel() ** 0.5, abs=1e-6), name


def test_text_schedule_and_generation():
    train, validation = nano.standard_library()
    assert train[0] == 0 and 0.03 < len(validation) / len(train) < 0.3 and bytes(train[:4000]).count(b"import")
    rates = [nano.rate(step, SMALL) for step in range(SMALL.steps)]
    assert max(rates) == SMALL.learning_rate == rates[SMALL.warmup - 1]
    assert rates[-1] == pytest.approx(SMALL.learning_rate / 10)
    assert nano.generate(nano.Model(SMALL), "def ", 5, SMALL).startswith("def ")


def test_it_runs_as_a_program():
    run = subprocess.run([sys.executable, str(PATH), "--help"], capture_output=True, text=True, cwd=PATH.parents[1])
    assert run.returncode == 0 and "--steps" in run.stdout


@pytest.mark.gpu
def test_losses_on_a_gpu_are_those_of_the_package_on_a_gpu():
    """bfloat16 products and Triton's kernels on both sides; windows by a mask here, by FlashAttention there, so that
    rounding differs from the first step: 2^-9 in an operand, and the loss is a mean over many.  That holds until the
    small text is learned by heart: the loss then falls by a third in a step, and losses a little apart in time are far
    apart in size.  Where it has settled they are compared again, as a mean."""
    s = replace(SMALL, width=128, hidden=256, heads=2, window=32, length=128)
    ours, theirs = nano.Model(s).cuda(), package_model(s).cuda()
    ours.load_state_dict(theirs.state_dict())
    text = corpus()
    expected = [record["loss"] for record in train_package(theirs, text, package_training(s, "cuda")).steps]
    found = nano.train(ours, text.train, s)
    assert np.allclose(found[:6], expected[:6], rtol=5e-3, atol=0), (found, expected)
    assert np.mean(found[-10:]) == pytest.approx(np.mean(expected[-10:]), rel=0.05), (found, expected)
