"""Many runs as one job: each must do what it would do alone, in plain PyTorch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from dn_lib.data.recall import IGNORE
from dn_lib.models import ModelConfig
from experiments.reproduce.parts import tasks
from experiments.reproduce.parts.job import Job, Run, Training, new_model
from experiments.reproduce.parts.model import stack, weights_of

MIXERS = ("delta", "gated_delta", "linear", "retnet", "gla", "attention")
RUNS = [Run(0, 3e-2, 0.1), Run(0, 1e-3, 0.0), Run(1, 1e-2, 0.3)]


def small_task(kind="mqar", train=24, test=10):
    options = {
        "mqar": {"length": 16, "pairs": 3, "vocab": 32, "power": 0.01},
        "compression": {"length": 8, "vocab": 8},
        "fuzzy_recall": {"length": 24, "vocab": 16},
        "regbench": {},
        "s3": {"length": 6, "test_length": 10},
    }
    return tasks.make(kind, train=train, test=test, seed=5, **options[kind])


def small_config(mixer, vocab, **options):
    base = {"width": 16, "heads": 2, "layers": 2, "conv_size": 0, "mlp_ratio": 1.0, "expand_v": 1.0}
    return ModelConfig(vocab_size=vocab, mixer=mixer, **base | options)


def alone(task, config, run, training, steps):
    """The run in plain PyTorch, with its own model and `torch.optim.AdamW`: losses and weights."""
    model = new_model(task, config, run.seed, training.init).double()
    weights = list(model.parameters())
    groups = [
        {"params": [p for p in weights if p.ndim == 2], "weight_decay": run.weight_decay},
        {"params": [p for p in weights if p.ndim != 2], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=run.learning_rate)
    total, found = training.steps(len(task.train)), []
    warm = round(training.warmup * total)
    per_epoch = len(task.train) // training.batch
    floor = training.floor + training.floor_share * run.learning_rate
    for t in range(steps):
        if t % per_epoch == 0:
            g = torch.Generator().manual_seed(1_000_003 * (run.seed + 1) + t // per_epoch)
            order = torch.randperm(len(task.train), generator=g)
        asked = task.train.rows(order[t % per_epoch * training.batch :][: training.batch])
        cosine = 0.5 * (1 + torch.tensor((t + 1 - warm) / (total - warm) * torch.pi, dtype=torch.float64).cos().item())
        rate = run.learning_rate * (t + 1) / warm if t < warm else floor + (run.learning_rate - floor) * cosine
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad()
        logits = model(asked.tokens, asked.at)
        loss = F.cross_entropy(logits.flatten(0, 1), asked.labels.flatten(), ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, training.clip)
        optimiser.step()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64), dict(model.named_parameters()), model


CASES = [(mixer, {}, "mqar") for mixer in MIXERS] + [
    ("delta", {"conv_size": 3, "output_gate": True, "tie_embeddings": True}, "mqar"),
    ("gla", {"conv_size": 2, "mlp_ratio": 0.0}, "mqar"),
    ("delta", {"delta_steps": 2, "beta_range": 2.0, "layers": 1}, "s3"),
    ("linear", {}, "compression"),
    ("retnet", {}, "fuzzy_recall"),
]


@pytest.mark.parametrize(("mixer", "options", "kind"), CASES)
def test_every_run_of_a_job_is_the_run_alone(mixer, options, kind):
    """In float64 both are the same sums in another order.

    Each loss is off by rounding, some thousand operations deep: 1e3 * 2^-53 = 1e-13.  Steps carry it on: AdamW divides
    by the root of a mean square, so that a relative error of a gradient becomes one of a step, and gradients of weights
    that hardly matter are sums that cancel, to perhaps 1e-2 of their terms: 1e-11.  A step taken with another rate,
    decay, norm or eps differs in the second digit.
    """
    task = small_task(kind)
    config = small_config(mixer, task.vocab, **options)
    training = Training(batch=8, epochs=3, warmup=0.3, floor=1e-4, floor_share=0.1, init=0.1, clip=0.5, evaluations=1)
    job = Job(task, config, RUNS, training, dtype=torch.float64)
    assert job.train() and job.done == 9
    stored = job.history.double()
    for i, run in enumerate(RUNS):
        expected, weights, model = alone(task, config, run, training, 9)
        # The history is float32: half a unit in the last place.
        torch.testing.assert_close(stored[0, i], expected, rtol=2.0**-23, atol=0)
        ours = weights_of(job.model, i)
        assert set(ours) == set(weights)
        for name, value in weights.items():
            torch.testing.assert_close(ours[name], value.detach(), rtol=1e-11, atol=1e-11, msg=f"{name} of run {i}")
        with torch.no_grad():
            asked = task.test.rows(slice(None))
            hits = (model(asked.tokens, asked.at).argmax(-1) == asked.labels) & asked.scored
        assert job.tests[-1]["accuracy"][i] == pytest.approx(hits.sum().item() / asked.scored.sum().item())
    assert len({tuple(stored[0, i].tolist()) for i in range(3)}) == 3  # three runs, not one three times


def test_a_run_that_diverges_leaves_the_others_alone():
    task = small_task()
    config, training = small_config("delta", task.vocab), Training(batch=8, epochs=3, init=0.1, evaluations=1)
    runs = [RUNS[0], Run(0, float("inf"), 0.0), RUNS[2]]
    job = Job(task, config, runs, training, dtype=torch.float64)
    job.train()
    others = Job(task, config, [RUNS[0], RUNS[2]], training, dtype=torch.float64)
    others.train()
    assert job.history[0, 1, -1].isnan() and not job.history[0, [0, 2]].isnan().any()
    torch.testing.assert_close(job.history[0, [0, 2]], others.history[0], rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("mixer", MIXERS)
def test_stacked_layers_compute_what_those_of_dn_lib_do(mixer):
    """Also in float32 and with the precision that a mixer asks for: outputs differ by rounding alone.

    Products of 16 and 32 terms, two layers deep: some tens of units of 2^-24, so 1e-5 of the largest logit.
    """
    task = small_task()
    config = small_config(mixer, task.vocab, conv_size=2)
    models = [new_model(task, config, seed, 0.3) for seed in range(3)]
    tokens = torch.randint(1, 32, (3, 4, 16), generator=torch.Generator().manual_seed(0))
    at = torch.arange(16).expand(4, -1)
    with torch.no_grad():
        expected = torch.stack([model(x, at) for model, x in zip(models, tokens, strict=True)])
        ours = stack(models)(tokens.flatten(0, 1), at.repeat(3, 1)).unflatten(0, (3, 4))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert (expected[0] - expected[1]).abs().max() > 1e-2  # the models differ


def test_a_layer_without_a_stacked_form_is_refused():
    task = small_task()
    models = [new_model(task, small_config("mamba2", task.vocab, conv_size=0), seed, 0.1) for seed in (0, 1)]
    with pytest.raises(TypeError, match="Mamba2 has parameters of its own"):
        stack(models)


def test_a_job_goes_on_where_another_process_stopped(tmp_path):
    task = small_task()
    config, training = small_config("delta", task.vocab), Training(batch=8, epochs=6, init=0.1, evaluations=4, glance=4)
    whole = Job(task, config, RUNS, training)
    assert whole.train()
    first = Job(task, config, RUNS, training)
    calls = iter([1.0, 0.0])
    assert not first.train(left=lambda: next(calls)) and 0 < first.done < first.steps
    torch.save(first.saved(), tmp_path / "half.pt")
    second = Job(task, config, RUNS, training)
    second.restore(torch.load(tmp_path / "half.pt"))
    assert second.train()
    assert second.tests == whole.tests and [test["examples"] for test in whole.tests] == [4, 4, 4, 10]
    assert torch.equal(second.history, whole.history) and torch.equal(second.optimiser.weights, whole.optimiser.weights)


def test_training_ends_when_all_seeds_of_one_point_know_enough():
    task = small_task("s3", train=64, test=8)
    runs = [Run(seed, rate, 0.0) for rate in (1e-5, 1e-2) for seed in (0, 1)]
    config = small_config("delta", task.vocab)
    training = Training(batch=16, epochs=10, evaluations=10, enough=-1.0, glance=3)
    job = Job(task, config, runs, training)
    assert job.train() and job.done == 4 and job.is_enough()
    assert [test["examples"] for test in job.tests] == [8]  # not by a glance
    job.training = dataclasses.replace(training, enough=0.5)
    for accuracies, enough in (
        ([0.6, 0.4, 0.4, 0.6], False),
        ([0.1, 0.2, 0.6, 0.7], True),
        ([0.6, float("nan")] * 2, False),
    ):
        job.tests = [{"accuracy": accuracies}]
        assert job.is_enough() is enough
    assert job.by_point() == {(1e-5, 0.0): [0.6, pytest.approx(float("nan"), nan_ok=True)],
                              (1e-2, 0.0): [0.6, pytest.approx(float("nan"), nan_ok=True)]}  # fmt: skip


def test_settings_that_cannot_be_are_refused():
    task = small_task()
    with pytest.raises(ValueError, match=r"^precision "):
        Training(batch=1, epochs=1, precision="half")
    with pytest.raises(ValueError, match=r"^batch "):
        Job(task, small_config("delta", task.vocab), RUNS, Training(batch=25, epochs=1))
    with pytest.raises(ValueError, match=r"^kind "):
        tasks.make("chess", train=1, test=1, seed=0)


def test_answers_are_sets_of_letters_in_regbench():
    task = small_task("regbench", train=3, test=4)
    asked = task.test.rows(slice(None))
    logits = torch.full((*asked.labels.shape, task.vocab), 0.0)
    logits.scatter_(2, asked.labels.clamp(min=0)[..., None], 1.0)
    from experiments.reproduce.parts.job import right

    assert right(logits, asked)[asked.scored].all()  # the letter that came is legal
    share = right(torch.randn(logits.shape), asked)[asked.scored].double().mean()
    assert 1 / 20 < share < 4 / 18  # one to three of 20 symbols
    assert not right(
        logits.roll(19, -1) * 0 + F.one_hot(torch.tensor(19), 20), asked
    ).any()  # the end is never a letter
    assert not set(map(tuple, task.train.tokens.tolist())) & set(map(tuple, task.test.tokens.tolist()))


def test_tracking_begins_with_a_token_and_scores_what_is_longer_than_training():
    task = tasks.make("parity", train=5, test=6, seed=0, length=8, test_length=20)
    assert (task.vocab, task.classes) == (3, 2)
    assert task.train.tokens.shape == (5, 9) and task.test.tokens.shape == (6, 21)
    assert (task.test.tokens[:, 0] == 2).all() and task.train.scored.all()
    labels = task.test.tokens[:, 1:].long().cumsum(1) % 2
    assert torch.equal(task.test.labels.long(), labels) and torch.equal(task.test.at[0].long(), torch.arange(1, 21))
    assert not task.test.scored[:, :8].any() and task.test.scored[:, 8:].all()


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_recorded_step_is_the_step(mixer):
    """Played back as a CUDA graph, a job computes what it computes launch by launch, and what a CPU computes.

    Both on the GPU take the same kernels in float32; sums whose order is left to the hardware differ by 2^-24 a term,
    which twelve steps carry on: 1e-4 of a loss.  The CPU's order is another throughout.  The first loss, before any
    step, shows that alone: 1e-5.  The second has one step of AdamW behind it, which divides small gradients by their
    size: 1e-3.  Later losses can't be held to the CPU's: these runs learn fast, and on a CPU alone, weights that begin
    2^-17 apart end with losses up to 5% apart.
    """
    task, jobs = small_task(train=64, test=16), []
    # The Triton kernels take heads of 16 and more.
    config = small_config(mixer, task.vocab, width=64)
    training = Training(batch=16, epochs=3, init=0.1, evaluations=2, precision="float32")
    for device, eager in (("cuda", False), ("cuda", True), ("cpu", True)):
        job = Job(task.to(device), config, RUNS, training, device=device, eager=eager)
        assert job.train() and job.done == 12
        jobs.append(job)
    recorded, launched, on_cpu = (job.history[0].cpu() for job in jobs)
    assert jobs[0].steps_by == "CUDA graph" and jobs[1].steps_by == "eager"
    torch.testing.assert_close(recorded, launched, rtol=1e-4, atol=0)
    torch.testing.assert_close(recorded[:, 0], on_cpu[:, 0], rtol=1e-5, atol=0)
    torch.testing.assert_close(recorded[:, 1], on_cpu[:, 1], rtol=1e-3, atol=0)
    assert recorded[:, -1].lt(recorded[:, 0]).any()  # something was learned: the steps are steps
