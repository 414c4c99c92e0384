"""Prepared corpora: written where nothing is lost, read only if they are whole, packed and unpacked safely."""

import io
import json
import multiprocessing
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

import dn_lib  # noqa: F401
from dn_lib import data
from dn_lib.data import ByteTokenizer, Corpus, DataError, check_target, load_corpus, pack, prepared_folder, unpack
from dn_lib.data import corpus as corpus_module
from dn_lib.data import files as files_module

TEXT = "".join(f"line {i}\n" for i in range(500))


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """A cache, a home and a current folder of the test's own."""
    for name in ("cache", "home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("DN_LIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def corpus(text):
    return load_corpus(text)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below `folder`, with its content."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


class TestTarget:
    """Where `save` may write. What is refused is left exactly as it was."""

    @pytest.mark.parametrize(
        "name",
        [".", "..", "", "./", "../here", "../here/../here", "/", "../cache", "../cache/..", "../home", "../cache/."],
    )
    def test_a_folder_that_is_or_holds_a_place_of_the_user(self, corpus, tmp_path, name):
        before = tree(tmp_path)
        with pytest.raises(DataError, match="folder must be one of its own"):
            corpus.save(name)
        assert tree(tmp_path) == before

    @pytest.mark.parametrize(
        "files",
        [
            ["notes.txt"],
            [".hidden"],
            ["deep/notes.txt"],
            ["train.bin"],
            ["corpus.json"],
            ["corpus.json", "train.bin", "validation.bin"],
        ],
    )
    def test_a_folder_of_somebody_else(self, corpus, tmp_path, files):
        for name in files:
            path = tmp_path / "target" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('{"name": "somebody else\'s"}')
        before = tree(tmp_path)
        with pytest.raises(DataError, match=r"holds other files .*nothing was changed"):
            corpus.save(tmp_path / "target")
        assert tree(tmp_path) == before

    @pytest.mark.parametrize("extra", ["notes.txt", "tokenizer.json/x", "folder/x"])
    def test_a_prepared_corpus_to_which_something_was_added(self, corpus, tmp_path, extra):
        corpus.save(tmp_path / "target")
        (tmp_path / "target" / extra).parent.mkdir(exist_ok=True)
        (tmp_path / "target" / extra).write_text("of the user")
        before = tree(tmp_path)
        with pytest.raises(DataError, match="holds other files"):
            corpus.save(tmp_path / "target")
        assert tree(tmp_path) == before

    def test_a_file_and_a_link_to_one(self, corpus, text, tmp_path):
        (tmp_path / "link").symlink_to(text)
        for name in ("text.txt", "link"):
            with pytest.raises(DataError, match="is a file"):
                corpus.save(tmp_path / name)
        assert text.read_text() == TEXT

    def test_below_a_file(self, corpus, text):
        with pytest.raises(DataError, match="must be a folder that can be written"):
            corpus.save(text / "target")
        assert text.read_text() == TEXT

    def test_links_in_a_circle_and_a_null_byte(self, corpus, tmp_path):
        (tmp_path / "a").symlink_to(tmp_path / "b")
        (tmp_path / "b").symlink_to(tmp_path / "a")
        for name in (tmp_path / "a", "a\0b"):
            with pytest.raises(DataError, match="cannot be resolved"):
                corpus.save(name)

    def test_a_link_stays_and_its_folder_is_looked_at(self, corpus, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        corpus.save(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert len(Corpus.open(tmp_path / "real").train) == len(corpus.train)
        (tmp_path / "home" / "notes").write_text("of the user")
        (tmp_path / "to_home").symlink_to(tmp_path / "home")
        with pytest.raises(DataError, match="the home folder"):
            corpus.save(tmp_path / "to_home")

    def test_the_source_and_what_holds_it(self, tmp_path):
        for name in ("a/texts/x.txt", "a/texts/y.txt"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(TEXT)
        for target in ("a", "a/texts"):
            with pytest.raises(DataError, match="the text to be prepared"):
                check_target(tmp_path / target, source=tmp_path / "a" / "texts")
        assert check_target(tmp_path / "a" / "texts" / "new", source=tmp_path / "a" / "texts")

    def test_new_empty_and_prepared_before(self, corpus, text, tmp_path):
        (tmp_path / "empty").mkdir()
        for name in ("empty", "new", "deep/er/new", "new", ".hidden", "n" * 250, "naïve λ"):
            corpus.save(tmp_path / name)
            assert np.array_equal(Corpus.open(tmp_path / name).train, corpus.train)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(files_module.TEMPORARY)]

    def test_a_prepared_corpus_may_be_prepared_again_in_its_place(self, corpus, tmp_path):
        corpus.save(tmp_path / "p")
        assert check_target(tmp_path / "p", source=tmp_path / "p") == tmp_path / "p"
        load_corpus(tmp_path / "p").save(tmp_path / "p")
        assert np.array_equal(load_corpus(tmp_path / "p").train, corpus.train)

    def test_a_folder_that_others_may_read(self, corpus, tmp_path):
        old = os.umask(0o022)
        try:
            corpus.save(tmp_path / "p")
        finally:
            os.umask(old)
        assert (tmp_path / "p").stat().st_mode & 0o777 == 0o755

    def test_no_current_folder(self, corpus, tmp_path):
        (tmp_path / "gone").mkdir()
        os.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        with pytest.raises(DataError, match="cannot be resolved"):
            corpus.save("p")


class TestDefaultPlace:
    def test_two_sources_of_one_name_are_two_corpora(self, tmp_path):
        for name, content in (("a", "first\n" * 50), ("b", "second\n" * 50)):
            (tmp_path / name).mkdir()
            (tmp_path / name / "x.txt").write_text(content)
            spec = str(tmp_path / name / "x.txt")
            load_corpus(spec).save(prepared_folder(spec))
        one, two = (Corpus.open(prepared_folder(str(tmp_path / n / "x.txt"))) for n in "ab")
        assert (bytes(one.train[:6]), bytes(two.train[:7])) == (b"\0first", b"\0second")

    @pytest.mark.parametrize(
        "spec",
        [
            *(
                ".",
                "..",
                "../..",
                "/",
                "x",
                "./x",
                "a/wheels",
                "downloads",
                "unpacked",
                "-",
                "a b",
                "con",
                "~",
                "x" * 300,
            ),
            *("hf:a/b", "hf:a/b:c", "hf:..", "hf:", "stdlib", "wheels", "\udcff", "λ"),
        ],
    )
    def test_is_one_folder_in_the_cache_whatever_the_spec(self, spec, tmp_path):
        folder = prepared_folder(spec)
        assert folder.parent == tmp_path / "cache" and not folder.name.startswith(".")
        assert len(os.fsencode(folder.name)) < 200
        assert check_target(folder) == folder

    def test_an_encoding_has_its_own(self):
        assert len({prepared_folder("stdlib", vocab) for vocab in (None, 300, 400)}) == 3


class TestInterrupted:
    @pytest.mark.parametrize("step", ["write_text", "rename"])
    def test_a_failure_leaves_the_old_corpus_and_nothing_else(self, corpus, tmp_path, monkeypatch, step):
        corpus.save(tmp_path / "p")
        before = tree(tmp_path)

        def fail(*arguments, **options):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path if step == "write_text" else os, step, fail)
        with pytest.raises(OSError, match="No space left"):
            corpus.save(tmp_path / "p")
        assert tree(tmp_path) == before

    @pytest.mark.parametrize("number", [1, 2, 3])
    @pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
    def test_each_rename_may_fail(self, corpus, tmp_path, monkeypatch, number, error):
        corpus.save(tmp_path / "p")
        before, rename, calls = tree(tmp_path), os.rename, []

        def failing(*names):
            calls.append(names)
            if len(calls) == number:
                raise error
            rename(*names)

        monkeypatch.setattr(os, "rename", failing)
        with pytest.raises(type(error)):
            corpus.save(tmp_path / "p")
        assert tree(tmp_path) == before

    def test_old_leftovers_that_are_ours_are_removed_and_no_others(self, corpus, tmp_path):
        made = {"ours": ["train.bin"], "young": ["train.bin"], "mixed": ["train.bin", "notes.txt"], "empty": []}
        made["half written"] = ["train.bin", f"{files_module.TEMPORARY}tokenizer"]
        for name, contents in made.items():
            folder = tmp_path / f"{files_module.TEMPORARY}{name}"
            folder.mkdir()
            for file in contents:
                (folder / file).write_text("")
        now, stat = time.time(), Path.lstat

        class Older:
            def __init__(self, path):
                self.st_mtime = self.st_ctime = now - (0 if "young" in path.name else 2 * files_module.DAY)
                self.st_mode = stat(path).st_mode

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "lstat", lambda path: Older(path))
            corpus.save(tmp_path / "p")
        left = {p.name.removeprefix(files_module.TEMPORARY) for p in tmp_path.glob(f"{files_module.TEMPORARY}*")}
        assert left == {"young", "mixed"}


def _save_and_open(folder: str, seed: int) -> None:
    tokens = np.full(2000, seed, dtype=np.uint8)
    for _ in range(20):
        Corpus(tokens, tokens[:100], ByteTokenizer(), facts={"seed": seed}).save(folder)
        again = Corpus.open(folder)
        assert set(again.train) == {again.facts["seed"]} and len(again.validation) == 100


def _unpack(archive: str, _: int) -> None:
    assert len(Corpus.open(unpack(archive)).train) > 0


def together(work, *arguments) -> None:
    """Run `work(*arguments, number)` in four processes at once; all have to end well."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(*arguments, number)) for number in range(1, 5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are started by a fork here")
class TestAtOnce:
    def test_saves_into_one_folder(self, tmp_path):
        together(_save_and_open, str(tmp_path / "p"))
        assert [p.name for p in tmp_path.glob(".*")] == []

    def test_a_folder_that_is_moved_away_is_no_file(self, tmp_path, monkeypatch):
        folder, stat = tmp_path / "p", Path.stat
        folder.mkdir()

        def moved_after(path, **options):
            about = stat(path, **options)
            if path == folder:
                path.rename(tmp_path / "moved")
            return about

        monkeypatch.setattr(Path, "stat", moved_after)
        with pytest.raises(FileNotFoundError):
            corpus_module.check_contents(folder)

    def test_another_corpus_that_was_there_for_a_moment(self, tmp_path, monkeypatch):
        one, other = (
            Corpus(np.full(9, seed, np.uint8), np.full(9, seed, np.uint8), ByteTokenizer(), facts={"seed": seed})
            for seed in (1, 2)
        )
        one.save(tmp_path / "p")
        mapped = np.memmap

        def between(*arguments, **options):  # another process saves while this one opens
            monkeypatch.setattr(np, "memmap", mapped)
            other.save(tmp_path / "p")
            found = mapped(*arguments, **options)
            time.sleep(0.05)  # the clock of a file system may be that coarse
            one.save(tmp_path / "p")
            return found

        monkeypatch.setattr(np, "memmap", between)
        found = Corpus.open(tmp_path / "p")
        assert set(found.train) == set(found.validation) == {found.facts["seed"]}

    def test_unpackings_of_one_archive(self, corpus, tmp_path):
        corpus.save(tmp_path / "p")
        together(_unpack, str(pack(tmp_path / "p", tmp_path / "p.tar.xz")))
        assert len(list((tmp_path / "cache" / "unpacked").iterdir())) == 1


def changed(**values):
    def damage(folder):
        path = folder / "corpus.json"
        about = json.loads(path.read_text())
        about.update(values)
        about = {key: value for key, value in about.items() if value != "absent"}
        if "digest" in about and "digest" not in values:  # so that the check behind it is met
            about["digest"] = corpus_module._digest(about)
        path.write_text(json.dumps(about))

    return damage


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def removed(name):
    return lambda folder: (folder / name).unlink()


def made_a_folder(name):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def made_a_pipe(name):
    def damage(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


DAMAGES = {
    "no validation": removed("validation.bin"),
    "no train": removed("train.bin"),
    "short train": written("train.bin", b"abc"),
    "empty train": written("train.bin", b""),
    "empty validation": written("validation.bin", b""),
    "long train": lambda folder: (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes() + b"x"),
    "train is a folder": made_a_folder("train.bin"),
    "train is a pipe": made_a_pipe("train.bin"),
    "json is a folder": made_a_folder("corpus.json"),
    "json is a pipe": made_a_pipe("corpus.json"),
    "json is empty": written("corpus.json", b""),
    "json is cut": written("corpus.json", b'{"dtype": "uint8", "byt'),
    "json is no UTF-8": written("corpus.json", b"\xff\xfe\x00"),
    "json is a list": written("corpus.json", b"[]"),
    "json is null": written("corpus.json", b"null"),
    "json is a number": written("corpus.json", b"1e999"),
    "json is deep": written("corpus.json", b"[" * 100_000),
    "json of somebody else": written("corpus.json", b'{"name": "x"}'),
    "no dtype": changed(dtype="absent"),
    "dtype float64": changed(dtype="float64"),
    "dtype object": changed(dtype="O"),
    "dtype a list": changed(dtype=["uint8"]),
    "dtype uint16": changed(dtype="uint16"),
    "rate 0": changed(bytes_per_token=0),
    "rate negative": changed(bytes_per_token=-1.0),
    "rate nan": changed(bytes_per_token=float("nan")),
    "rate infinite": changed(bytes_per_token=float("inf")),
    "rate a string": changed(bytes_per_token="1"),
    "rate a truth": changed(bytes_per_token=True),
    "no rate": changed(bytes_per_token="absent"),
    "facts a list": changed(facts=[]),
    "no facts": changed(facts="absent"),
    "no tokens": changed(tokens="absent"),
    "tokens a number": changed(tokens=5),
    "tokens strings": changed(tokens={"train": "5", "validation": "5"}),
    "tokens negative": changed(tokens={"train": -5, "validation": 5}),
    "tokens of others": changed(tokens={"train": 7, "validation": 5}),
    "another digest": changed(digest="0" * 64),
    "no digest": changed(digest="absent"),
    "another rate": lambda folder: (folder / "corpus.json").write_text(
        (folder / "corpus.json").read_text().replace('"bytes_per_token": 1.0', '"bytes_per_token": 1.5')
    ),
    "no hashes": changed(sha256="absent"),
    "another format": changed(format="dn_lib corpus 99"),
    "another tokenizer": changed(facts={"tokenizer": "bpe-0123456789ab"}),
    "a tokenizer that is a list": changed(facts={"tokenizer": ["bytes"]}),
}


class TestDamaged:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_is_one_line_and_never_another_corpus(self, corpus, tmp_path, damage):
        corpus.save(tmp_path / "p")
        DAMAGES[damage](tmp_path / "p")
        for read in (Corpus.open, load_corpus):
            with pytest.raises(DataError) as caught:
                read(tmp_path / "p")
            assert "\n" not in str(caught.value) and str(tmp_path / "p") in str(caught.value)

    def test_a_flipped_bit_is_found_before_training(self, corpus, tmp_path):
        corpus.save(tmp_path / "p")
        path = tmp_path / "p" / "train.bin"
        content = bytearray(path.read_bytes())
        content[777] ^= 1
        path.write_bytes(content)
        assert len(Corpus.open(tmp_path / "p").train) == len(content)  # reads nothing
        for read in (load_corpus, lambda folder: pack(folder, tmp_path / "p.tar.xz")):
            with pytest.raises(DataError, match=r"train\.bin is not what was written"):
                read(tmp_path / "p")

    def test_one_from_before_formats_had_names_is_read(self, corpus, tmp_path):
        corpus.save(tmp_path / "p")
        changed(format="absent", tokens="absent", sha256="absent", digest="absent")(tmp_path / "p")
        assert np.array_equal(Corpus.open(tmp_path / "p").train, corpus.train)
        corpus.save(tmp_path / "p")

    def test_what_cannot_be_read_back_is_not_written(self, tmp_path):
        good = np.arange(100, dtype=np.uint8)
        for bad in (good.astype(np.int64), good[None], good[:0], good.astype(np.float32)):
            with pytest.raises(DataError, match=r"must hold uint8 tokens \[n\]"):
                Corpus(bad, good, ByteTokenizer()).save(tmp_path / "p")
        assert not (tmp_path / "p").exists()


def archive_of(path: Path, *members) -> Path:
    """A `.tar.xz` of (name, content or a change of the TarInfo)."""
    with tarfile.open(path, "w:xz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if callable(content):
                content(info)
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def link_to(place, kind=tarfile.SYMTYPE):
    def change(info):
        info.type, info.linkname = kind, place

    return change


def of_type(kind):
    return lambda info: setattr(info, "type", kind)


class TestArchives:
    @pytest.fixture
    def packed(self, corpus, tmp_path):
        corpus.save(tmp_path / "p")
        return pack(tmp_path / "p", tmp_path / "p.tar.xz")

    def test_round_trip(self, packed, corpus):
        assert np.array_equal(load_corpus(packed).train, corpus.train)

    def test_one_made_by_tar_of_the_whole_folder(self, packed, corpus, tmp_path):
        with tarfile.open(tmp_path / "by_hand.tar.xz", "w:xz") as tar:
            tar.add(tmp_path / "p", arcname=".")
        assert np.array_equal(load_corpus(tmp_path / "by_hand.tar.xz").train, corpus.train)

    @pytest.mark.parametrize(
        "members",
        [
            [],
            [("notes.txt", b"x")],
            [("../corpus.json", b"{}")],
            [("/corpus.json", b"{}")],
            [("p/corpus.json", b"{}")],
            [("corpus.json", b"{}")],
            [("corpus.json", b"{}"), ("corpus.json", b"{}")],
            [("corpus.json", link_to("/etc/hostname"))],
            [("corpus.json", link_to("train.bin", tarfile.LNKTYPE))],
            [("corpus.json", of_type(tarfile.FIFOTYPE))],
            [("corpus.json", of_type(tarfile.CHRTYPE))],
            [("corpus.json", of_type(tarfile.DIRTYPE))],
            [("train.bin", b"x"), ("train.bin/../../x", b"x")],
            [("..", of_type(tarfile.DIRTYPE))],
        ],
    )
    def test_other_members_are_refused_and_nothing_is_left(self, tmp_path, members):
        before = tree(tmp_path)
        with pytest.raises(DataError, match=r"is no packed corpus|holds no prepared corpus"):
            load_corpus(archive_of(tmp_path / "bad.tar.xz", *members))
        (tmp_path / "bad.tar.xz").unlink()
        (tmp_path / "cache" / "unpacked").rmdir()
        assert tree(tmp_path) == before

    @pytest.mark.parametrize("content", [b"", b"no archive", b"\xfd7zXZ\0", TEXT.encode() * 9])
    def test_no_archive_at_all(self, tmp_path, content):
        (tmp_path / "bad.tar.xz").write_bytes(content)
        with pytest.raises(DataError, match="is no packed corpus"):
            load_corpus(tmp_path / "bad.tar.xz")

    def test_every_cut_and_many_flips(self, packed, corpus):
        whole = packed.read_bytes()
        places = range(0, len(whole), max(len(whole) // 40, 1))
        damaged = [whole[:at] for at in places]
        damaged += [whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :] for at in places]
        for content in damaged:
            packed.write_bytes(content)
            try:
                found = load_corpus(packed)
            except DataError as error:
                assert "\n" not in str(error)
            else:  # a flip that decompression does not need
                assert np.array_equal(found.train, corpus.train)

    def test_bombs(self, tmp_path):
        limits = {"most": 10**6, "largest_note": 10**5}
        bombs = [
            [("train.bin", bytes(2 * 10**6))],
            [("corpus.json", bytes(2 * 10**5))],
            [("train.bin", bytes(6 * 10**5)), ("validation.bin", bytes(6 * 10**5))],
        ]
        for members in bombs:
            with pytest.raises(DataError, match="is too large"):
                unpack(archive_of(tmp_path / "bomb.tar.xz", *members), **limits)
        with tarfile.open(tmp_path / "bomb.tar.xz", "w:xz", format=tarfile.PAX_FORMAT) as tar:
            info = tarfile.TarInfo("corpus.json")
            info.pax_headers = {"comment": "x" * 10**6}
            tar.addfile(info)
        with pytest.raises(DataError, match="a header of"):
            unpack(tmp_path / "bomb.tar.xz", **limits)

    def test_a_cache_that_was_damaged_is_unpacked_again(self, packed, corpus):
        folder = unpack(packed)
        (folder / "train.bin").write_bytes(b"")
        assert np.array_equal(load_corpus(packed).train, corpus.train)

    def test_pack_takes_whole_corpora_and_spares_other_files(self, packed, corpus, tmp_path):
        (tmp_path / "mine.tar.xz").write_bytes(b"of the user")
        with tarfile.open(tmp_path / "backup.tar.xz", "w:xz") as tar:
            tar.add(tmp_path / "text.txt", arcname="text.txt")
        (tmp_path / "folder.tar.xz").mkdir()
        before = tree(tmp_path)
        for name in ("mine.tar.xz", "backup.tar.xz", "folder.tar.xz"):
            with pytest.raises(DataError, match="must be new or a packed corpus"):
                pack(tmp_path / "p", tmp_path / name)
        with pytest.raises(DataError, match=r"must end in \.tar\.xz"):
            pack(tmp_path / "p", tmp_path / "p.zip")
        with pytest.raises(DataError, match="holds no prepared corpus"):
            pack(tmp_path / "home", tmp_path / "new.tar.xz")
        assert tree(tmp_path) == before
        pack(tmp_path / "p", packed)  # over one packed before


class TestSources:
    @pytest.mark.parametrize("spec", ["", " ", "\t", "hf:"])
    def test_an_empty_name(self, spec):
        with pytest.raises(DataError, match=r"must not be empty|must name a dataset"):
            load_corpus(spec)

    @pytest.mark.parametrize("spec", [None, 5, b"stdlib", ["stdlib"]])
    def test_no_name_at_all(self, spec):
        with pytest.raises(DataError, match="corpus must be a name or a path"):
            load_corpus(spec)

    @pytest.mark.parametrize("vocab", [0, -1, 256, 65537, True, 3.5, "300", float("nan")])
    def test_a_vocabulary_that_cannot_be(self, text, vocab):
        for spec in (text, "stdlib", "enwik8"):
            with pytest.raises(DataError, match="vocab must be"):
                load_corpus(spec, vocab=vocab)

    @pytest.mark.parametrize("content", [b"\0", b"PK\3\4\0\0" * 9, TEXT.encode("utf-16")])
    def test_a_file_that_is_no_text(self, tmp_path, content):
        (tmp_path / "x").write_bytes(content * 2)
        with pytest.raises(DataError, match="is no text"):
            load_corpus(tmp_path / "x")

    def test_devices_and_pipes(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        for spec in (tmp_path / "pipe", "/dev/null", "/dev/zero"):
            with pytest.raises(DataError, match="neither a file nor a folder"):
                load_corpus(spec)

    def test_prepared_corpora_below_a_folder_are_not_its_text(self, corpus, tmp_path):
        for i in range(60):
            (tmp_path / "texts" / str(i)).mkdir(parents=True)
            (tmp_path / "texts" / str(i) / "x.txt").write_text(TEXT)
        before = load_corpus(tmp_path / "texts").facts
        corpus.save(tmp_path / "texts" / "prepared")
        assert load_corpus(tmp_path / "texts").facts == before

    def test_a_folder_of_texts_may_hold_a_corpus_json_of_its_own(self, tmp_path):
        for i in range(60):
            (tmp_path / "home" / f"{i}.txt").write_text(TEXT)
        (tmp_path / "home" / "corpus.json").write_text("[]")
        assert load_corpus(tmp_path / "home").facts["files"] == 61

    def test_names_that_are_no_utf8(self, tmp_path):
        folder = os.fsencode(tmp_path / "home")
        try:
            for i in range(60):
                Path(os.fsdecode(folder + b"/\xff%d" % i)).write_text(TEXT)
        except OSError:
            pytest.skip("this file system takes UTF-8 names only")
        corpus = load_corpus(tmp_path / "home")
        corpus.save(tmp_path / "p")
        assert Corpus.open(tmp_path / "p").facts == corpus.facts

    def test_a_folder_that_cannot_be_read_is_an_error(self, tmp_path, monkeypatch):
        (tmp_path / "home" / "closed").mkdir()
        (tmp_path / "home" / "x.txt").write_text(TEXT)
        scandir = os.scandir

        def closed(path):
            if str(path).endswith("closed"):
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", closed)
        with pytest.raises(PermissionError, match="closed"):
            load_corpus(tmp_path / "home")

    def test_split_by(self):
        with pytest.raises(DataError, match="split_by must be file or folder, got 'files'"):
            data.build_corpus([], name="x", split_by="files")
