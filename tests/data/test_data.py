"""Corpora: splits, tokenizers, wheels, batches."""

import hashlib
import platform
import re
import zipfile

import numpy as np
import pytest
import torch

import dn_lib  # noqa: F401
from dn_lib import data
from dn_lib.data import Batches, Corpus, DataError, build_corpus, load_corpus
from dn_lib.data import wheels as wheels_module
from dn_lib.training import windows


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DN_LIB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def source_folder(tmp_path):
    folder = tmp_path / "source"
    for i in range(60):
        path = folder / f"part{i % 5}" / f"module{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"def function_{i}(x):\n    return x + {i}\n" * 3)
    return folder


@pytest.fixture(scope="module")
def stdlib():
    return load_corpus("stdlib")


class TestStdlib:
    def test_is_there_without_a_network_and_is_split_by_file(self, stdlib):
        corpus = stdlib
        assert corpus.vocab_size == 256 and corpus.train.dtype == np.uint8
        assert len(corpus.train) > 4_000_000
        assert 0.03 < len(corpus.validation) / len(corpus.train) < 0.3
        assert corpus.facts["python"] == platform.python_version()
        assert len(corpus.facts["file_list_sha256"]) == 64
        assert corpus.bytes_per_token == 1.0

    def test_no_document_is_on_both_sides(self, stdlib):
        names = [name for name, _ in data.stdlib_documents()]
        assert len(names) == len(set(names)) == stdlib.facts["files"]
        starts = int((stdlib.train == 0).sum()), int((stdlib.validation == 0).sum())
        held_out = sum(data.in_validation(name) for name in names)
        assert starts == (len(names) - held_out, held_out)

    def test_leaves_tests_and_installed_packages_out(self, tmp_path):
        for name in ("a.py", "test/b.py", "json/tests/c.py", "site-packages/d.py", "_sysconfigdata_x.py"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("x = 1\n")
        assert [name for name, _ in data.stdlib_documents(tmp_path)] == ["a.py"]

    def test_the_split_of_a_file_does_not_depend_on_the_others(self):
        documents = [(f"f{i}.py", b"x = 1\n") for i in range(200)]
        few = build_corpus(documents[:100], name="few")
        many = build_corpus(documents, name="many")
        assert few.facts["file_list_sha256"] != many.facts["file_list_sha256"]
        assert data.in_validation("f7.py") == data.in_validation("f7.py")
        assert len(few.validation) < len(many.validation) <= len(few.validation) + 100 * 7


class TestFilesAndFolders:
    def test_folder(self, source_folder):
        corpus = load_corpus(source_folder)
        assert corpus.facts["files"] == 60
        text = corpus.tokenizer.decode(corpus.train)
        assert "function_" in text and "\ufffd" not in text

    def test_binary_files_are_left_out(self, source_folder):
        (source_folder / "picture.bin").write_bytes(b"\0\1\2")
        assert load_corpus(source_folder).facts["files"] == 60

    def test_file_holds_out_its_end(self, tmp_path):
        path = tmp_path / "text.txt"
        path.write_text("".join(f"line {i}\n" for i in range(1000)))
        corpus = load_corpus(path)
        assert corpus.tokenizer.decode(corpus.validation).endswith("line 999\n")
        assert corpus.tokenizer.decode(corpus.validation)[1:].startswith("line ")
        assert "line 999" not in corpus.tokenizer.decode(corpus.train)

    def test_unknown_corpus(self):
        with pytest.raises(DataError, match=r"corpus 'no/such/place' does not exist: give a file"):
            load_corpus("no/such/place")

    def test_empty_folder_and_too_few_files(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match="holds no files"):
            load_corpus(tmp_path / "empty")
        (tmp_path / "one").mkdir()
        (tmp_path / "one" / "a.txt").write_text("text")
        with pytest.raises(DataError, match="too few to hold some out"):
            load_corpus(tmp_path / "one")

    def test_save_and_open_are_memory_mapped(self, source_folder, tmp_path):
        corpus = load_corpus(source_folder)
        corpus.save(tmp_path / "prepared")
        again = load_corpus(tmp_path / "prepared")
        assert isinstance(again.train, np.memmap)
        assert np.array_equal(again.train, corpus.train)
        assert np.array_equal(again.validation, corpus.validation)
        assert again.facts == corpus.facts
        corpus.save(tmp_path / "prepared")  # over an old one
        assert sorted(p.name for p in (tmp_path / "prepared").iterdir()) == [
            "corpus.json",
            "train.bin",
            "validation.bin",
        ]

    def test_archive(self, source_folder, tmp_path):
        load_corpus(source_folder).save(tmp_path / "prepared")
        archive = data.pack(tmp_path / "prepared", tmp_path / "corpus.tar.xz")
        again = load_corpus(archive)
        assert np.array_equal(again.train, load_corpus(source_folder).train)


class TestBPE:
    def test_round_trip_and_bytes_per_token(self, source_folder):
        pytest.importorskip("tokenizers")
        corpus = load_corpus(source_folder, vocab=300)
        plain = load_corpus(source_folder)
        assert 257 < corpus.vocab_size <= 300 and corpus.train.dtype == np.uint16
        assert corpus.tokenizer.decode(corpus.tokenizer.encode("naïve λ\n")) == "naïve λ\n"
        assert corpus.bytes_per_token == pytest.approx(len(plain.validation) / len(corpus.validation))

    def test_saved_with_the_corpus(self, source_folder, tmp_path):
        pytest.importorskip("tokenizers")
        corpus = load_corpus(source_folder, vocab=300)
        corpus.save(tmp_path / "prepared")
        again = Corpus.open(tmp_path / "prepared")
        assert again.tokenizer.name == corpus.tokenizer.name
        with pytest.raises(DataError, match="prepared with"):
            load_corpus(tmp_path / "prepared", vocab=999)

    @pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe", b"[" * 10_000])
    def test_a_tokenizer_that_is_gone_or_damaged(self, source_folder, tmp_path, content):
        pytest.importorskip("tokenizers")
        load_corpus(source_folder, vocab=300).save(tmp_path / "prepared")
        path = tmp_path / "prepared" / "tokenizer.json"
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(DataError, match=r"holds no tokenizer that can be read|was prepared with tokenizer bpe-"):
            load_corpus(tmp_path / "prepared")

    def test_the_tokenizer_of_another_corpus(self, source_folder, tmp_path):
        pytest.importorskip("tokenizers")
        for size in (300, 310):
            load_corpus(source_folder, vocab=size).save(tmp_path / str(size))
        (tmp_path / "310" / "tokenizer.json").replace(tmp_path / "300" / "tokenizer.json")
        with pytest.raises(DataError, match=r"was prepared with tokenizer bpe-\w+, but holds bpe-"):
            load_corpus(tmp_path / "300")

    def test_too_small(self, source_folder):
        with pytest.raises(DataError, match="at least 257"):
            load_corpus(source_folder, vocab=100)


def test_hugging_face_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"text": [f"document number {i}\n" * 5 for i in range(100)]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "set"))
    corpus = load_corpus(f"hf:{tmp_path / 'set'}")
    assert corpus.facts["files"] == 100
    datasets.Dataset.from_dict({"other": ["x"]}).save_to_disk(str(tmp_path / "bad"))
    with pytest.raises(DataError, match="no column 'text'"):
        load_corpus(f"hf:{tmp_path / 'bad'}")


class TestWheels:
    def test_pins(self):
        assert len(wheels_module.WHEELS) > 10
        for pin, digest in wheels_module.WHEELS.items():
            assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+", pin) and re.fullmatch("[0-9a-f]{64}", digest)

    def test_prepared_from_wheels_that_are_there(self, tmp_path, monkeypatch):
        store = tmp_path / "cache" / "wheel-files"
        store.mkdir(parents=True)
        path = store / "some_thing-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            for i in range(80):
                wheel.writestr(f"some_thing/sub{i}/a.py", f"value_{i} = {i}  # " + "x" * 60 + "\n")
            wheel.writestr("some_thing/copy.py", f"value_{0} = {0}  # " + "x" * 60 + "\n")
            wheel.writestr("some_thing/empty.py", "")
            wheel.writestr("some_thing/data.json", "{}" * 100)
        pins = {"some-thing==1.0": hashlib.sha256(path.read_bytes()).hexdigest()}
        with pytest.raises(DataError, match="not prepared yet"):
            load_corpus("wheels")
        wheels_module.prepare_wheels(wheels=pins)
        corpus = load_corpus("wheels")
        assert corpus.facts["files"] == 80  # the copy, the empty file and the JSON are left out
        assert isinstance(corpus.train, np.memmap) and len(corpus.validation) > 0

    def test_pip_failure_is_one_line(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        with pytest.raises(DataError, match="pip could not fetch the wheels") as caught:
            wheels_module.download_wheels(tmp_path, {"no-such-package==9.9": "0" * 64})
        assert "\n" not in str(caught.value)


class TestBatches:
    tokens = np.arange(1000, dtype=np.uint16)

    def test_windows_are_windows(self):
        part = Batches(self.tokens, 16, 4, seed=1, accumulate=2).next()
        assert part.shape == (2, 2, 17) and part.dtype == torch.int64
        assert (part.diff(dim=-1) == 1).all()

    def test_state_is_exact(self):
        one = Batches(self.tokens, 16, 4, seed=1)
        one.next()
        state = one.state()
        wanted = [one.next() for _ in range(3)]
        other = Batches(self.tokens, 16, 4, seed=2)
        other.restore(state)
        assert all(torch.equal(other.next(), w) for w in wanted)

    def test_processes_share_one_batch(self):
        whole = Batches(self.tokens, 16, 8, seed=1).next().flatten(0, 1)
        parts = [
            Batches(self.tokens, 16, 8, seed=1, rank=r, world=2, accumulate=2).next().flatten(0, 1) for r in range(2)
        ]
        assert torch.equal(torch.cat(parts), whole)

    def test_every_place_is_reached(self):
        batches = Batches(np.arange(10), 8, 64, seed=0)
        firsts = {row[0].item() for row in batches.next()[0]}
        assert firsts == {0, 1}

    def test_context_longer_than_data(self):
        with pytest.raises(DataError, match="length must be below the number of training tokens, 1000"):
            Batches(self.tokens, 1000, 4)

    @pytest.mark.parametrize("name", ["length", "batch", "accumulate", "world"])
    @pytest.mark.parametrize("value", [0, -1, 1.5, True, "4", None, float("nan")])
    def test_counts_are_whole_numbers(self, name, value):
        with pytest.raises(DataError, match=f"{name} must be a whole number"):
            Batches(self.tokens, **{"length": 16, "batch": 4, "accumulate": 1, "world": 1, name: value})

    @pytest.mark.parametrize("rank", [-1, 2, 0.5])
    def test_a_rank_that_is_none(self, rank):
        with pytest.raises(DataError, match="rank must be from 0 to 1"):
            Batches(self.tokens, 16, 4, rank=rank, world=2)

    @pytest.mark.parametrize("tokens", [tokens[None], tokens.astype(np.float32), tokens > 3])
    def test_tokens_are_a_row_of_integers(self, tokens):
        with pytest.raises(DataError, match=r"tokens must be integers \[n\]"):
            Batches(tokens, 16, 4)

    @pytest.mark.parametrize("length", [0, -1])
    def test_windows_that_follow_each_other_have_a_length(self, length):
        with pytest.raises(DataError, match="length must be at least 1"):
            windows(self.tokens, length)

    def test_batch_must_divide(self):
        with pytest.raises(DataError, match="batch must be a multiple"):
            Batches(self.tokens, 16, 5, accumulate=2)
