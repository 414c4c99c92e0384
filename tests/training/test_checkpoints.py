"""Which checkpoint is taken, what one must hold, and whether a run that goes on is the one that was stopped."""

import json
import multiprocessing
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from small_runs import CONFIG, corpus, losses, model
from torch import nn

from dn_lib.data import split_text
from dn_lib.training import (
    CheckpointError,
    TrainConfig,
    checkpoint,
    folder,
    latest,
    make_optimiser,
    read,
    same_run,
    train,
)
from dn_lib.training.runs import export, load_run, notes

SHORT = replace(CONFIG, steps=4, batch=2, length=16, checkpoint_every=1, keep=9, evaluate_every=0, evaluation_tokens=32)
SMALLEST = dict(width=8, layers=1, heads=1, hybrid="none", vocab_size=256)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps with a checkpoint after each; tests take copies of it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(model(), corpus(), SHORT, folder=folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def go_on(folder, config=SHORT, **options):
    return train(model(5), corpus(), config, folder=folder, **{"resume": True, **options})


def steps(folder) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.numbered(folder)]


def flip(path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


class TestNames:
    def test_numbers_are_compared_not_names(self, tmp_path):
        for step in (9_999_999, 10_000_000, 3):
            checkpoint.checkpoint_path(tmp_path, step).touch()
        assert steps(tmp_path) == [3, 9_999_999, 10_000_000]
        assert latest(tmp_path).name == "checkpoint_10000000.safetensors"

    @pytest.mark.parametrize(
        "name",
        [
            "checkpoint_best.safetensors",
            "checkpoint_9999999.safetensors.bak",
            "old_checkpoint_9999999.safetensors",
            "checkpoint_-1.safetensors",
            "checkpoint_٣.safetensors",
            "checkpoint_1e9.safetensors",
            "checkpoint_9 .safetensors",
        ],
    )
    def test_other_names_are_no_checkpoints(self, tmp_path, name):
        (tmp_path / name).touch()
        assert latest(tmp_path) is None and checkpoint.numbered(tmp_path) == []

    def test_a_folder_is_no_checkpoint(self, tmp_path):
        checkpoint.checkpoint_path(tmp_path, 1).mkdir()
        assert latest(tmp_path) is None and latest(tmp_path / "nowhere") is None

    def test_the_newest_stays_at_ten_million(self, run, tmp_path):
        saved = read(latest(run))
        for step in (9_999_998, 9_999_999, 10_000_000, 10_000_001):
            about = {**saved.about, "step": step}
            checkpoint.write(checkpoint.Checkpoint(saved.tensors, about), tmp_path / "long", keep=2)
        assert steps(tmp_path / "long") == [10_000_000, 10_000_001]

    def test_only_this_runs_checkpoints_are_deleted(self, run):
        stranger = read(latest(run))
        stranger.about["run"] = "another"
        for step in (1, 2):
            shutil.copy(checkpoint.checkpoint_path(run, step), run / f"kept_{step}")
            checkpoint.checkpoint_path(run, step).unlink()
            stranger.about["step"] = step
            stranger.tensors = {
                n: torch.full_like(t, step) if ".step." in n else t for n, t in stranger.tensors.items()
            }
            checkpoint.write(stranger, run)
        (run / "checkpoint_best.safetensors").write_bytes(b"mine")
        go_on(run, replace(SHORT, steps=6, keep=1), allow_changes=["steps"])
        assert steps(run) == [1, 2, 6] and (run / "checkpoint_best.safetensors").read_bytes() == b"mine"

    def test_a_copy_under_a_shorter_number_is_the_users(self, run):
        shutil.copy(checkpoint.checkpoint_path(run, 1), run / "checkpoint_1.safetensors")
        go_on(run, replace(SHORT, steps=6, keep=1), allow_changes=["steps"])
        assert sorted(path.name for path in checkpoint.numbered(run)) == [
            "checkpoint_0000006.safetensors",
            "checkpoint_1.safetensors",
        ]

    def test_another_runs_file_of_that_name_is_set_aside(self, run):
        saved = read(latest(run))
        stranger = checkpoint.Checkpoint(saved.tensors, {**saved.about, "run": "another"})
        latest(run).unlink()
        theirs = checkpoint.write(stranger, run).read_bytes()
        checkpoint.write(saved, run)
        assert read(latest(run)).about["run"] == saved.about["run"]
        assert (run / f"set_aside_{latest(run).name}").read_bytes() == theirs

    def test_what_was_trained_is_exported(self, run):
        history = go_on(run, replace(SHORT, steps=5), allow_changes=["steps"])
        shutil.copy(checkpoint.checkpoint_path(run, 1), run / "checkpoint_zzz.safetensors")
        about = json.loads((export(run, corpus().tokenizer, history.checkpoint) / "run.json").read_text())
        assert about["step"] == 5 == checkpoint.step_of(history.checkpoint)

    def test_a_model_older_than_the_checkpoints_is_not_loaded(self, run):
        export(run, corpus().tokenizer)
        go_on(run, replace(SHORT, steps=6), allow_changes=["steps"])
        loaded, _, _ = load_run(run)
        assert torch.equal(loaded.head.weight, read(latest(run)).tensors["model.head.weight"])
        old, _, _ = load_run(run / "model")
        assert not torch.equal(loaded.head.weight, old.head.weight)


class TestDamage:
    def test_no_flipped_bit_is_silent(self, tmp_path):
        """Twenty positions in each of the file's parts: lengths and header, description, numbers."""
        config = replace(SHORT, steps=1)
        train(model(**SMALLEST), corpus(), config, folder=tmp_path)
        path = latest(tmp_path)
        whole = path.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        description = whole.index(b"__metadata__"), whole.index(b"sha256") + 80
        chosen = torch.Generator().manual_seed(0)
        parts = [(0, 8), (8, header), description, (header, len(whole))]
        places = [at for a, b in parts for at in torch.randint(a, b, (20,), generator=chosen).tolist()]
        for position in places:
            for bit in (0, position % 7 + 1):
                flip(path, position, bit)
                with pytest.raises(CheckpointError, match=re.escape(str(path))):
                    read(path)
                path.write_bytes(whole)
        assert read(path).about["step"] == 1

    @pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
    def test_a_file_cut_short(self, run, part):
        path = latest(run)
        content = path.read_bytes()
        path.write_bytes(content[: int(part * len(content))])
        with pytest.raises(CheckpointError, match="no readable checkpoint"):
            read(path)

    def test_a_renamed_checkpoint(self, run):
        shutil.copy(latest(run), checkpoint.checkpoint_path(run, 9))
        message = r"named for step 9 and holds step 4: .* own name is checkpoint_0000004"
        with pytest.raises(CheckpointError, match=message):
            go_on(run)

    def test_without_a_digest(self, run):
        from safetensors.torch import save_file

        saved = read(latest(run))
        save_file(saved.tensors, latest(run), metadata={"about": json.dumps(saved.about)})
        with pytest.raises(CheckpointError, match="holds no digest"):
            read(latest(run))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t, a: t.pop("optimiser.exp_avg.head.weight"), r"it lacks optimiser\.exp_avg\.head\.weight"),
            (
                lambda t, a: t.update({"optimiser.exp_avg.head.weight": torch.zeros(3)}),
                "must be float32 .* as the weigh",
            ),
            (
                lambda t, a: t.update({"optimiser.exp_avg.head.weight": t["optimiser.exp_avg.head.weight"].double()}),
                "it is float64",
            ),
            (lambda t, a: t.update({"optimiser.step.head.weight": torch.tensor(5.0)}), "one number from 0 to 4"),
            (lambda t, a: t.update({"optimiser.exp_avg.nowhere": torch.zeros(1)}), "belongs to nothing"),
            (lambda t, a: t.pop("random.batches"), "lacks random.batches"),
            (lambda t, a: t.update({"random.cpu": torch.zeros(7, dtype=torch.uint8)}), "random.cpu must be uint8"),
            (lambda t, a: t.update({"random.cuda": torch.zeros(2)}), "random.cuda must be uint8"),
            (lambda t, a: t["model.head.weight"].fill_(float("inf")), "model.head.weight holds values that are no num"),
            (lambda t, a: a.update(step=-1), "step must not be negative"),
            (lambda t, a: a.update(step=True), "step must be of type int"),
            (lambda t, a: a.pop("model"), "model must be of type dict"),
        ],
    )
    def test_parts_that_do_not_fit_together(self, run, change, message):
        """With the right digest: not damaged, but no run could have written it, and none writes it."""
        saved = read(latest(run))
        change(saved.tensors, saved.about)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.write(saved, run / "copy")
        text = json.dumps(saved.about)
        metadata = {"about": text, "sha256": checkpoint.digest(saved.tensors, text)}
        (run / "made").write_bytes(checkpoint.to_bytes(saved.tensors, metadata=metadata))
        with pytest.raises(CheckpointError, match=message):
            read(run / "made")

    def test_moments_missing_for_a_weight(self, run):
        saved, net = read(latest(run)), model(1)
        for moment in checkpoint.MOMENTS:
            del saved.tensors[f"optimiser.{moment}.head.weight"]
        before = net.head.weight.clone()
        with pytest.raises(CheckpointError, match=r"lacks the optimiser's moments of head\.weight"):
            checkpoint.restore(saved, net, make_optimiser(net, SHORT))
        assert torch.equal(net.head.weight, before)

    def test_a_weight_of_another_dtype(self, run):
        with pytest.raises(CheckpointError, match=r"is float32 .* there, bfloat16 .* here"):
            checkpoint.load_weights(read(latest(run)), model().bfloat16())

    def test_the_newest_whole_one_is_named_and_taken_on_request(self, finished, run):
        whole = train(model(), corpus(), SHORT)
        flip(checkpoint.checkpoint_path(run, 4), -100)
        flip(checkpoint.checkpoint_path(run, 3), -100)
        older = checkpoint.checkpoint_path(run, 2)
        with pytest.raises(CheckpointError, match=f"0000004.* is damaged.*whole is {older}: .*--resume-from {older}"):
            go_on(run)
        again = go_on(run, resume=older)
        assert losses(again) == losses(whole)
        assert steps(run) == [1, 2, 3, 4] and read(latest(run)).about["step"] == 4
        assert len(list(run.glob("set_aside_*"))) == 2  # the damaged ones: nothing was deleted

    def test_none_is_whole(self, run):
        for path in checkpoint.numbered(run):
            flip(path, -100)
        with pytest.raises(CheckpointError, match="no older one is whole"):
            go_on(run)

    def test_loading_names_the_newest_whole_one_too(self, run):
        flip(latest(run), -100)
        older = checkpoint.checkpoint_path(run, 3)
        with pytest.raises(CheckpointError, match=f"is damaged.*whole is {older}"):
            load_run(run)
        loaded, tokenizer, facts = load_run(older)
        assert tokenizer.name == "bytes" and facts["name"] == "text"
        assert torch.equal(loaded.head.weight, read(older).tensors["model.head.weight"])


def holding(folder, started, end):
    from dn_lib.training import folder as folders

    with folders.held(folder):
        folders.begin(folder, {}, False)
        started.set()
        end.wait(60)


class TestOneRunPerFolder:
    def test_a_second_run_is_told(self, tmp_path):
        context = multiprocessing.get_context("fork")
        started, end = context.Event(), context.Event()
        other = context.Process(target=holding, args=(tmp_path, started, end))
        other.start()
        assert started.wait(60)
        try:
            message = rf"{tmp_path} is in use by another run, since 20.* \(process {other.pid} on .*\): wait for it"
            with pytest.raises(CheckpointError, match=message):
                go_on(tmp_path)
            other.kill()  # a lock of a dead process blocks nobody
            other.join()
            assert len(go_on(tmp_path).steps) == 4
        finally:
            other.kill()
            other.join()

    def test_loading_goes_on_while_a_run_trains(self, tmp_path):
        seen = []
        config = replace(SHORT, steps=6, checkpoint_every=1, keep=1, evaluate_every=2)
        train(
            model(),
            corpus(),
            config,
            folder=tmp_path,
            report=lambda r: r["step"] > 2 and seen.append(load_run(tmp_path)),
        )
        assert len(seen) == 2

    def test_a_checkpoint_deleted_before_it_is_opened(self, run):
        """The run at work writes a newer one and deletes that one: the reader takes the newer."""
        from dn_lib.training import runs

        gone = [run / "checkpoint_0000003.safetensors"]
        gone[0].unlink()
        found = runs._read_latest(run, lambda folder: gone.pop() if gone else checkpoint.latest(folder))
        assert found.about["step"] == 4 and not gone

    def test_the_same_folder_twice_in_one_process(self, tmp_path):
        found = []

        def nested(record):
            with pytest.raises(CheckpointError, match="is in use by another run"):
                train(model(), corpus(), SHORT, folder=tmp_path, resume=True)
            found.append(record)

        train(model(), corpus(), replace(SHORT, evaluate_every=4), folder=tmp_path, report=nested)
        assert len(found) == 1

    @pytest.mark.parametrize("name", ["log.jsonl", "tokenizer.json", "run.json", "model/model.safetensors"])
    def test_what_is_there_already_is_not_written_over(self, tmp_path, name):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine\n")
        for resume in (False, True):
            with pytest.raises(CheckpointError, match="another folder"):
                train(model(), corpus(), SHORT, folder=tmp_path, resume=resume)
        assert path.read_text() == "mine\n"

    def test_a_run_json_that_is_no_runs_is_set_aside_to_go_on(self, run):
        (run / "run.json").write_text("mine\n")
        go_on(run)
        assert (run / "set_aside_run.json").read_text() == "mine\n"
        assert folder.run_facts(run)["run"] == read(latest(run)).about["run"]

    def test_a_log_with_a_damaged_line_is_kept_and_told(self, run):
        flip(run / "log.jsonl", 2, 7)
        damaged = (run / "log.jsonl").read_bytes()
        with pytest.warns(RuntimeWarning, match=r"line 1 of .*log.jsonl is no record .* as it was is .*set_aside_log"):
            go_on(run)
        assert (run / "set_aside_log.jsonl").read_bytes() == damaged
        go_on(run)  # and this once only
        assert len(list(run.glob("set_aside*"))) == 1

    @pytest.mark.skipif(sys.platform != "linux", reason="names that are no UTF-8 are of Linux")
    def test_a_name_that_is_no_utf8_is_refused_at_the_start(self, tmp_path):
        with pytest.raises(CheckpointError, match="folder must have a name in UTF-8, got "):
            train(model(), corpus(), SHORT, folder=tmp_path / "bad\udcff")
        assert list(tmp_path.iterdir()) == []

    def test_only_its_own_unfinished_files_are_removed(self, run):
        own = run / f"checkpoint_0000009.safetensors.{read(latest(run)).about['run']}.abcd.part"
        other = run / "checkpoint_0000009.safetensors.another.abcd.part"
        own.touch()
        other.touch()
        go_on(run)
        assert not own.exists() and other.exists()

    def test_a_file_in_place_of_the_folder(self, tmp_path):
        (tmp_path / "run").touch()
        with pytest.raises(CheckpointError, match="run cannot be made"):
            train(model(), corpus(), SHORT, folder=tmp_path / "run")


class TestTheSameRun:
    @pytest.mark.parametrize(
        "change",
        [
            {"seed": 1},
            {"batch": 4},
            {"length": 8},
            {"learning_rate": 1e-2},
            {"min_learning_rate": 1e-5},
            {"warmup": 1},
            {"steps": 8},
            {"precision": "bfloat16"},
            {"betas": (0.9, 0.99)},
            {"weight_decay": 0.0},
            {"clip": 0.5},
            {"accumulate": 2},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_every_setting_that_decides_the_numbers(self, run, change):
        (name, value), before = next(iter(change.items())), sorted(p.name for p in run.iterdir())
        shown = re.escape(repr(list(value) if isinstance(value, tuple) else value))
        with pytest.raises(
            CheckpointError, match=f"cannot resume: {name} is .* in the checkpoint, {shown} here; --chan"
        ):
            go_on(run, replace(SHORT, **change))
        assert sorted(p.name for p in run.iterdir()) == before
        go_on(run, replace(SHORT, **change), allow_changes=[name])

    def test_no_setting_is_forgotten(self):
        """A new setting is compared unless it is listed as free."""
        settings = set(TrainConfig().to_dict())
        about = {"train": TrainConfig().to_dict(), "precision": "float32"}
        assert settings >= same_run.FREE and set(same_run._numbers(about)) == settings - same_run.FREE

    def test_what_changes_no_number_may_differ(self, run):
        free = dict(keep=3, log_every=2, evaluate_every=3, evaluation_tokens=64, checkpoint_every=3, parallel="fsdp")
        assert len(go_on(run, replace(SHORT, **free, precision="float32")).steps) == 4

    def test_a_longer_schedule_on_request(self, run):
        history = go_on(run, replace(SHORT, steps=6), allow_changes=["steps"])
        assert [record["step"] for record in history.steps] == [1, 2, 3, 4, 5, 6]

    def test_a_new_seed_draws_other_batches(self, run):
        def last(seed):
            folder = shutil.copytree(run, run.parent / str(seed))
            config = replace(SHORT, steps=5, seed=seed)
            return losses(go_on(folder, config, allow_changes=["steps", "seed"]))[-1]

        assert last(seed=SHORT.seed) != last(seed=7)

    def test_tokens_are_compared_even_if_no_fact_differs(self, run):
        data, other = corpus(), split_text(b"something else\n" * 4000, name="text")
        other.facts = data.facts
        with pytest.raises(CheckpointError, match=r"the corpus differs \(train tokens"):
            train(model(), other, SHORT, folder=run, resume=True)
        assert len(train(model(), other, SHORT, folder=run, resume=True, allow_changes=["corpus"]).steps) == 4

    def test_unknown_changes(self, run):
        with pytest.raises(ValueError, match="allow_changes must hold settings of the run, got 'speed'"):
            go_on(run, allow_changes=["speed"])
        with pytest.raises(ValueError, match="allow_changes must be a collection"):
            go_on(run, allow_changes="steps")

    def test_a_checkpoint_of_another_run(self, run, tmp_path):
        train(model(), corpus(), SHORT, folder=tmp_path / "other")
        with pytest.raises(CheckpointError, match="of another run than"):
            go_on(run, resume=latest(tmp_path / "other"))

    def test_facts_that_json_cannot_hold_are_refused_at_the_start(self, tmp_path):
        data = corpus()
        data.facts["when"] = object()
        with pytest.raises(ValueError, match=r"corpus\.facts must hold only what JSON can"):
            train(model(), data, SHORT, folder=tmp_path / "run")

    def test_notes_are_kept(self, tmp_path):
        train(model(), corpus(), SHORT, folder=tmp_path, notes={"idea": 7})
        assert notes(tmp_path) == {"idea": 7} == read(latest(tmp_path)).about["notes"]
        (tmp_path / "run.json").unlink()
        assert notes(tmp_path) == {"idea": 7} and notes(tmp_path / "nowhere") == {}


def compiled(net, part):
    """`net` with "all" of it, or its first block, compiled."""
    if part == "all":
        return torch.compile(net, backend="eager")
    net.blocks[0] = torch.compile(net.blocks[0], backend="eager")
    return net


class TestWrappedModels:
    @pytest.mark.parametrize("part", ["all", "a block"])
    def test_a_compiled_model_is_stored_as_the_model_inside(self, finished, tmp_path, part):
        with torch.compiler.set_stance("force_eager"):  # the wrappers are there, the compiler's time is not spent
            history = train(compiled(model(), part), corpus(), SHORT, folder=tmp_path)
        weights, plain = (read(path).weights() for path in (history.checkpoint, latest(finished)))
        assert weights.keys() == plain.keys() and all(torch.equal(weights[name], plain[name]) for name in plain)
        assert losses(go_on(tmp_path)) == losses(history)
        export(tmp_path, corpus().tokenizer)
        assert torch.equal(load_run(tmp_path)[0].head.weight, weights["head.weight"])
        with torch.compiler.set_stance("force_eager"):
            again = train(compiled(model(3), part), corpus(), SHORT, folder=tmp_path, resume=True)
        assert losses(again) == losses(history)

    def test_names_are_those_of_the_bare_model(self):
        net = model()
        plain = list(checkpoint.named_tensors(net))
        net.blocks[0] = nn.DataParallel(torch.compile(net.blocks[0], backend="eager"))
        wrapped = torch.compile(nn.DataParallel(net), backend="eager")
        assert list(checkpoint.named_tensors(wrapped)) == plain

    def test_a_child_that_is_called_module_keeps_its_name(self):
        net = nn.ModuleDict({"module": nn.Linear(2, 2)})
        assert list(checkpoint.named_tensors(net)) == ["module.weight", "module.bias"]

    def test_weights_that_share_memory(self, run):
        net = model()
        both = torch.zeros(2, *net.head.weight.shape)
        net.head.weight.data, net.embedding.weight.data = both[0], both[1]
        state = checkpoint.capture(net, make_optimiser(net, SHORT), torch.get_rng_state(), read(latest(run)).about)
        checkpoint.write(state, run / "shared")
