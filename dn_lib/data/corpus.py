"""A corpus is two token arrays, training and validation, and what one needs to know about them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import lzma
import os
import platform
import re
import shutil
import stat
import tarfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dn_lib.data.downloads import DOWNLOADS, cache_folder, named_text, sha256_of
from dn_lib.data.files import (
    is_being_replaced,
    make_folder,
    remove_files,
    remove_leftovers,
    replace_folder,
    temporary_name,
    written_aside,
)
from dn_lib.data.stdlib import stdlib_documents
from dn_lib.data.tokens import (
    SEPARATOR,
    BPETokenizer,
    ByteTokenizer,
    DataError,
    Tokenizer,
    check_vocab,
    load_tokenizer,
)

VALIDATION_SHARE = 0.1


FORMAT = "dn_lib corpus 1"
FILES = frozenset({"corpus.json", "train.bin", "validation.bin", "tokenizer.json"})
"""All that a prepared corpus consists of, and all that `save` ever removes."""
LARGEST_NOTE = 2**24
"""Bytes of a `corpus.json`: more is somebody else's file."""
LARGEST_CORPUS = 2**36
"""Bytes that `unpack` writes at most."""


@dataclass
class Corpus:
    """Tokens to train on and tokens to measure on.

    train, validation: one-dimensional arrays, uint8 or uint16, in memory or memory-mapped.
    tokenizer: turns text into these tokens and back.
    bytes_per_token: of the validation part, so that a loss per token can be told in bits per byte.
    facts: name, number of files, hash of the file list and contents, Python version: all that a
      result has to say about its data.
    """

    train: np.ndarray
    validation: np.ndarray
    tokenizer: Tokenizer
    bytes_per_token: float = 1.0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def save(self, folder: str | Path) -> None:
        """Write `train.bin`, `validation.bin`, `corpus.json` (and `tokenizer.json`) so that `open` finds
        either all of them or nothing.

        A prepared corpus that is there is replaced. Raises DataError if anything else is (see `check_target`).
        """
        target = check_target(folder)
        make_folder(target.parent, "the parent of the corpus")
        remove_leftovers(target.parent, FILES)
        work = temporary_name(target.parent)
        make_folder(work, "the new corpus")
        try:
            self._write(work)
            replace_folder(work, target, _check_contents, FILES)
        finally:
            remove_files(work, FILES)

    def _write(self, folder: Path) -> None:
        for name, part in (("train", self.train), ("validation", self.validation)):
            if part.ndim != 1 or part.dtype != self.tokenizer.dtype or len(part) == 0:
                wanted = np.dtype(self.tokenizer.dtype).name
                raise DataError(f"{name} must hold {wanted} tokens [n], n > 0, got {part.dtype} {list(part.shape)}")
        self.train.tofile(folder / "train.bin")
        self.validation.tofile(folder / "validation.bin")
        self.tokenizer.save(folder)
        about = {
            "format": FORMAT,
            "dtype": str(self.train.dtype),
            "tokens": {"train": len(self.train), "validation": len(self.validation)},
            "sha256": {part: sha256_of(folder / f"{part}.bin") for part in PARTS},
            "bytes_per_token": self.bytes_per_token,
            "facts": self.facts,
        }
        about = json.loads(json.dumps(about))  # as it will be read: a tuple is a list then
        about["digest"] = _digest(about)
        (folder / "corpus.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = False) -> Corpus:
        """A saved corpus, memory-mapped: nothing is read before it is used.

        verify: read all of it once, and compare its hash with the one it was saved with.
        Raises DataError if a file is missing, damaged, or does not fit the others.
        """
        folder = Path(folder)
        for wait in (0.02, 0.05, 0.1, 0.2, 0.4, None):
            before = _stamp(folder)
            try:
                corpus = cls._open(folder, verify)
            except (DataError, FileNotFoundError):
                absent = before is None and is_being_replaced(folder)
                if wait is None or (before == _stamp(folder) and not absent):
                    raise
            else:
                if before == _stamp(folder):
                    return corpus
                if wait is None:
                    raise DataError(f"{folder} is being replaced by other processes all the time: stop them")
            time.sleep(wait)  # it was replaced while we read it
        raise AssertionError("unreachable")

    @classmethod
    def _open(cls, folder: Path, verify: bool) -> Corpus:
        about = _read_about(folder)
        if about is None:
            raise DataError(f"{folder} holds no prepared corpus (no corpus.json that prepare-data wrote)")
        tokenizer = load_tokenizer(folder)
        wanted = about["facts"].get("tokenizer", tokenizer.name)
        if tokenizer.name != wanted:
            raise DataError(f"{folder} was prepared with tokenizer {wanted}, but holds {tokenizer.name}: {REMEDY}")
        if about["dtype"] != np.dtype(tokenizer.dtype).name:
            raise DataError(f"{folder} holds {about['dtype']} tokens, {tokenizer.name} makes others: {REMEDY}")
        parts = [_map(folder, part, about) for part in PARTS]
        for name, part in zip(PARTS, parts, strict=True):
            if verify and about.get("sha256", {}).get(name) not in (None, hashlib.sha256(part).hexdigest()):
                raise DataError(f"{folder / name}.bin is not what was written (its hash differs): {REMEDY}")
        return cls(*parts, tokenizer, float(about["bytes_per_token"]), about["facts"])


PARTS = ("train", "validation")
REMEDY = "it is damaged; prepare it again"


def _stamp(folder: Path) -> tuple | None:
    """What tells one corpus in `folder` from the next; None if there is none.

    The note alone would not, where another corpus was there for a moment; nor would an inode alone, which is used
    again as soon as it is free.
    """
    note = _note(folder)
    try:
        about = (folder / "corpus.json").stat()
    except OSError:
        return None
    return None if note is None else (note, about.st_ino, about.st_mtime_ns)


def _note(folder: Path) -> bytes | None:
    """The bytes of `folder/corpus.json`, which hold the hashes of all else; None if they cannot be read."""
    path = folder / "corpus.json"
    try:
        return path.read_bytes() if path.is_file() and path.stat().st_size <= LARGEST_NOTE else None
    except OSError:
        return None


def _read_about(folder: Path) -> dict[str, Any] | None:
    """What `save` wrote into `folder/corpus.json`; None if there is none, or it is not of our making."""
    note = _note(folder)
    try:
        about = None if note is None else json.loads(note)
    except (ValueError, RecursionError):
        return None
    if not isinstance(about, dict):
        return None
    # Before formats had names, these three keys were all of it.
    older = set(about) == {"dtype", "bytes_per_token", "facts"}
    if about.get("format") != FORMAT and not older:
        return None
    rate, tokens = about.get("bytes_per_token"), about.get("tokens")
    whole = (
        about.get("dtype") in ("uint8", "uint16")
        and isinstance(rate, int | float)
        and not isinstance(rate, bool)
        and 0 < rate < float("inf")
        and isinstance(about.get("facts"), dict)
        and (older or (_are_counts(tokens) and isinstance(about.get("sha256"), dict)))
        and (older or about.get("digest") == _digest(about))
    )
    return about if whole else None


def _digest(about: dict[str, Any]) -> str:
    """The hash of all that `corpus.json` says."""
    rest = {key: value for key, value in about.items() if key != "digest"}
    return _hash(json.dumps(rest, sort_keys=True).encode())


def _are_counts(tokens: Any) -> bool:
    whole = isinstance(tokens, dict) and set(tokens) == set(PARTS)
    return whole and all(type(count) is int for count in tokens.values())


def is_prepared(folder: str | Path) -> bool:
    """Whether `folder` is meant as a prepared corpus, whole or damaged, and not as a folder of texts."""
    folder = Path(folder)
    marks = (folder / "corpus.json", folder / "train.bin")
    return all(mark.exists() for mark in marks) or _read_about(folder) is not None


def _map(folder: Path, part: str, about: dict[str, Any]) -> np.ndarray:
    path = folder / f"{part}.bin"
    if not path.is_file():
        raise DataError(f"{folder} holds no {path.name}: {REMEDY}")
    size, width = path.stat().st_size, np.dtype(about["dtype"]).itemsize
    wanted = about["tokens"][part] if "tokens" in about else size // width
    if size != wanted * width or size == 0:
        raise DataError(f"{path} must have {wanted} tokens of {width} bytes, it has {size} bytes: {REMEDY}")
    return np.memmap(path, dtype=about["dtype"], mode="r")


def check_target(folder: str | Path, *, source: str | Path | None = None) -> Path:
    """The resolved folder that a corpus may be written to as `folder`.

    It must be new, empty, or a prepared corpus and nothing else. It may not be the current folder, the cache or the
    home folder, nor hold one of them, nor hold the text `source` that the corpus is made of.
    Raises DataError otherwise; nothing is ever changed here.

    >>> check_target(".")
    Traceback (most recent call last):
    dn_lib.data.tokens.DataError: folder must be one of its own, '.' is or holds the current folder
    """
    try:
        target = Path(folder).resolve()
        places = {"the current folder": Path.cwd(), "the cache": cache_folder().resolve()}
        if source is not None:
            places["the text to be prepared"] = Path(source).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, no current folder, a NUL
        raise DataError(f"folder {str(folder)!r} cannot be resolved: {error}") from None
    with contextlib.suppress(RuntimeError):  # there need not be a home
        places["the home folder"] = Path.home()
    for what, place in places.items():
        prepared_anew = what == "the text to be prepared" and target == place and is_prepared(place)
        if (target == place and not prepared_anew) or target in place.parents:
            raise DataError(f"folder must be one of its own, {str(folder)!r} is or holds {what}")
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        _check_contents(target)
    return target


def _check_contents(folder: Path) -> None:
    """Raise DataError unless `folder` is empty or holds a prepared corpus and nothing else, FileNotFoundError if it
    is not there (any more)."""
    about = folder.stat()
    if not stat.S_ISDIR(about.st_mode):
        raise DataError(f"folder must be a folder for the corpus, {folder} is a file")
    names = sorted(os.listdir(folder))
    others = [name for name in names if name not in FILES or not (folder / name).is_file()]
    if others or (names and _read_about(folder) is None):
        now = folder.stat()
        if (now.st_ino, now.st_ctime_ns) != (about.st_ino, about.st_ctime_ns):  # moved away while we looked
            raise FileNotFoundError(folder)
        shown = ", ".join((others or names)[:3])
        raise DataError(
            f"folder must be new, empty or a prepared corpus, {folder} holds other files ({shown}): "
            "nothing was changed; name another folder"
        )


def prepared_folder(spec: str, vocab: int | None = None) -> Path:
    """The folder in the cache where `prepare-data` keeps the corpus `spec`.

    A corpus that is no path has its own name. A file or a folder gets a piece of the hash of where it lies, since
    many are called the same.

    >>> prepared_folder("stdlib", 4096).name, prepared_folder("a/text.txt") == prepared_folder("b/text.txt")
    ('stdlib-bpe4096', False)
    """
    encoding = f"-bpe{vocab}" if vocab else ""
    if spec in NAMED:
        # The wheels are looked up by this name alone, whatever their encoding.
        return cache_folder() / (spec if spec == "wheels" else spec + encoding)
    place = spec if spec.startswith("hf:") else str(Path(spec).resolve())
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", spec if spec.startswith("hf:") else Path(place).name).strip(".-")[:64]
    digest = _hash(_encoded(place))[:8]
    return cache_folder() / (f"{name or 'corpus'}-{digest}{encoding}")


def source_path(spec: str) -> Path | None:
    """The file or folder that the corpus `spec` is read from; None for one that is called by a name."""
    if spec in NAMED:
        return None
    path = Path(spec.removeprefix("hf:"))
    return path if path.exists() else None


NAMED = ("stdlib", "wheels", *DOWNLOADS)
"""The corpora that are called by a name."""


def in_validation(name: str, share: float = VALIDATION_SHARE) -> bool:
    """Whether the document called `name` is held out: decided by a hash of the name alone, so the same
    file is on the same side on every machine, whatever else is in the corpus.

    >>> in_validation("textwrap.py"), in_validation("json/decoder.py")
    (False, False)
    """
    return int.from_bytes(hashlib.sha256(_encoded(name)).digest()[:8], "big") < share * 2**64


def build_corpus(
    documents: Iterable[tuple[str, bytes]],
    *,
    name: str,
    vocab: int | Tokenizer | None = None,
    split_by: str = "file",
    **facts: Any,
) -> Corpus:
    """A corpus of (name, content) documents, split by the hash of their names.

    vocab: None for bytes; a number trains byte-pair encoding of that size on the training part; or a
      tokenizer.
    split_by: "file", or "folder" to keep the files of one folder on the same side.
    Raises DataError if either part would be empty.
    """
    if split_by not in ("file", "folder"):
        raise DataError(f"split_by must be file or folder, got {split_by!r}")
    _check_encoding(vocab)
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    digest, count, size = hashlib.sha256(), 0, 0
    for path, content in documents:
        digest.update(_encoded(path) + f"\0{_hash(content)}\n".encode())
        count, size = count + 1, size + len(content)
        unit = str(PurePosixPath(path).parent) if split_by == "folder" else path
        parts[in_validation(unit)].append(content)
    if not all(parts):
        raise DataError(f"corpus {name} has {count} files, too few to hold some out for validation")
    facts = {
        "name": name,
        "files": count,
        "bytes": size,
        "file_list_sha256": digest.hexdigest(),
        **facts,
    }
    return _tokenise(parts[0], parts[1], vocab, facts)


def _check_encoding(vocab: Any) -> None:
    """Raise DataError unless `vocab` is None, a tokenizer or a size, before anything is read or downloaded."""
    if vocab is not None and not hasattr(vocab, "vocab_size"):
        check_vocab(vocab)


def _tokenise(train: list[bytes], validation: list[bytes], vocab, facts: dict[str, Any]) -> Corpus:
    tokenizer = BPETokenizer.train(train, int(vocab)) if isinstance(vocab, Integral) else vocab or ByteTokenizer()

    def join(texts: list[bytes]) -> np.ndarray:
        if isinstance(tokenizer, ByteTokenizer):
            return tokenizer.encode(bytes([SEPARATOR]).join([b"", *texts]))
        separator = np.array([SEPARATOR], dtype=tokenizer.dtype)
        return np.concatenate([piece for text in texts for piece in (separator, tokenizer.encode(text))])

    tokens = join(validation)
    size = sum(len(text) + 1 for text in validation)  # a separator counts as one byte
    facts = {**facts, "tokenizer": tokenizer.name}
    return Corpus(join(train), tokens, tokenizer, size / max(len(tokens), 1), facts)


def split_text(text: bytes, *, name: str, vocab: int | Tokenizer | None = None, **facts: Any) -> Corpus:
    """A corpus of one text: its last tenth, cut at a line, is the validation part.

    Raises DataError if it is empty, or no text: the NUL byte is the token between documents.
    """
    _check_encoding(vocab)
    if len(text) < 2:
        raise DataError(f"corpus {name} is empty")
    if b"\0" in text:
        raise DataError(f"corpus {name} is no text (it holds a NUL byte): convert it to UTF-8, or unpack it")
    cut = max(1, min(text.rfind(b"\n", 0, int(len(text) * (1 - VALIDATION_SHARE))) + 1, len(text) - 1))
    if cut == 1:
        cut = max(1, int(len(text) * (1 - VALIDATION_SHARE)))
    facts = {"name": name, "files": 1, "bytes": len(text), "file_list_sha256": _hash(text), **facts}
    return _tokenise([text[:cut]], [text[cut:]], vocab, facts)


def _encoded(name: str) -> bytes:
    """UTF-8 on every machine; a file name that is no UTF-8 gives the bytes that it has on the disk."""
    return name.encode(errors="surrogateescape")


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def load_corpus(spec: str | Path = "stdlib", *, vocab: int | Tokenizer | None = None, progress: bool = False) -> Corpus:
    """The corpus that `spec` names.

    spec:
      - "stdlib": the Python standard library's own source;
      - "wheels": the prepared wheels corpus (`python -m dn_lib prepare-data wheels`);
      - "tinyshakespeare", "enwik8": downloaded once, hash checked;
      - "hf:NAME", "hf:NAME:CONFIG" or "hf:FOLDER": a Hugging Face dataset with a `text` column;
      - a folder with `corpus.json`, or a `.tar.xz` of one: a prepared corpus;
      - any other folder: its text files, split by file; any other file: its last tenth held out.
    vocab: None for bytes, or the size of a byte-pair encoding to train, or a tokenizer.

    Raises DataError (a ValueError) with one line that names the remedy.

    >>> corpus = load_corpus("stdlib")
    >>> corpus.vocab_size, corpus.train.dtype, len(corpus.train) > 5 * len(corpus.validation)
    (256, dtype('uint8'), True)
    """
    if not isinstance(spec, str | os.PathLike):
        raise DataError(f"corpus must be a name or a path, got {spec!r}")
    name = str(spec)
    if not name.strip():
        raise DataError(f"corpus must not be empty: give a file, a folder, hf:NAME or one of {', '.join(NAMED)}")
    _check_encoding(vocab)
    if name == "stdlib":
        return build_corpus(stdlib_documents(), name=name, vocab=vocab, python=platform.python_version())
    if name == "wheels":
        return _prepared(_wheels_folder(), vocab)
    if name in DOWNLOADS:
        train, validation = named_text(name, progress=progress)
        facts = {"name": name, "files": 1, "bytes": len(train) + len(validation)}
        facts["file_list_sha256"] = DOWNLOADS[name].sha256
        return _tokenise([train], [validation], vocab, facts)
    if name.startswith("hf:"):
        return build_corpus(_huggingface_documents(name[3:]), name=name, vocab=vocab)
    path = Path(spec)
    if is_prepared(path):
        return _prepared(path, vocab)
    if path.name.endswith(".tar.xz") and path.is_file():
        return _prepared(unpack(path), vocab)
    if path.is_dir():
        return build_corpus(_folder_documents(path), name=path.resolve().name, vocab=vocab)
    if path.is_file():
        return split_text(path.read_bytes(), name=path.name, vocab=vocab)
    if path.exists():
        raise DataError(f"corpus {name!r} is neither a file nor a folder")
    known = ", ".join(NAMED)
    raise DataError(f"corpus {name!r} does not exist: give a file, a folder, hf:NAME or one of {known}")


def _prepared(folder: Path, vocab) -> Corpus:
    corpus = Corpus.open(folder, verify=True)
    if vocab is not None and getattr(vocab, "vocab_size", vocab) != corpus.vocab_size:
        raise DataError(
            f"vocab {getattr(vocab, 'vocab_size', vocab)} was asked for, but {folder} was prepared with "
            f"{corpus.vocab_size}: prepare it again, or leave vocab out"
        )
    return corpus


def _wheels_folder() -> Path:
    folder = cache_folder() / "wheels"
    if not is_prepared(folder):
        raise DataError("corpus 'wheels' is not prepared yet: run `python -m dn_lib prepare-data wheels`")
    return folder


def _folder_documents(folder: Path) -> Iterable[tuple[str, bytes]]:
    """Every file below `folder` that holds text (no NUL byte). Hidden ones and prepared corpora are left out."""
    names = []
    # An unreadable folder is an error here; `rglob` would leave its files out without a word.
    for place, folders, files in os.walk(folder, onerror=_raise):
        here = Path(place)
        folders[:] = [n for n in folders if not n.startswith(".") and not is_prepared(here / n)]
        paths = [here / name for name in files if not name.startswith(".")]
        names += [path.relative_to(folder).as_posix() for path in paths if path.is_file()]
    if not names:
        raise DataError(f"corpus folder {folder} holds no files")
    for name in sorted(names):
        content = (folder / name).read_bytes()
        if content and b"\0" not in content:
            yield name, content


def _raise(error: OSError) -> None:
    raise error


def _huggingface_documents(spec: str) -> Iterable[tuple[str, bytes]]:
    if not spec:
        raise DataError("corpus hf: must name a dataset or a folder, as in hf:NAME")
    try:
        import datasets
    except ImportError:
        raise DataError("corpus hf:... needs the datasets package: pip install datasets") from None
    try:
        if (Path(spec) / "dataset_info.json").exists() or (Path(spec) / "dataset_dict.json").exists():
            data = datasets.load_from_disk(spec)
        else:
            name, _, config = spec.partition(":")
            data = datasets.load_dataset(name, config or None)
    except Exception as error:  # of many packages: the hub's, the network's, the file formats'
        raise DataError(f"dataset {spec} cannot be loaded: {' '.join(str(error).split())}") from None
    if isinstance(data, dict):
        if "train" not in data:
            raise DataError(f"dataset {spec} has no part 'train', only {', '.join(data)}")
        data = data["train"]
    if "text" not in data.column_names:
        raise DataError(f"dataset {spec} has no column 'text', only {', '.join(data.column_names)}")
    for number, row in enumerate(data):
        if not isinstance(row["text"], str | None):
            raise DataError(f"column 'text' of dataset {spec} must hold strings, got {type(row['text']).__name__}")
        if row["text"]:
            yield f"{number:09d}", row["text"].encode()


def check_archive(archive: str | Path) -> Path:
    """The path that `pack` may write: `archive`, if it is new or a corpus packed before.

    Raises DataError otherwise.
    """
    archive = Path(archive)
    if not archive.name.endswith(".tar.xz"):
        raise DataError(f"archive must end in .tar.xz, got {archive}")
    above = next(place for place in archive.absolute().parents if os.path.lexists(place))
    if not above.is_dir():
        raise DataError(f"archive must lie in a folder, got {archive}, but {above} is none")
    if os.path.lexists(archive):
        try:
            with _opened_archive(archive) as tar:
                first = tar.next()
            ours = first is not None and first.name == "corpus.json"
        except (DataError, OSError):
            ours = False
        if not ours:
            raise DataError(f"archive must be new or a packed corpus, {archive} is something else: it was left alone")
    return archive


def pack(folder: str | Path, archive: str | Path) -> Path:
    """Compress a prepared corpus into one `.tar.xz`, to be carried to a machine without a network.

    Raises DataError if `folder` holds no whole corpus, or `archive` is a file that is not a packed one.
    """
    folder, archive = Path(folder), check_archive(archive)
    Corpus.open(folder, verify=True)
    make_folder(archive.parent, "the place of the archive")
    with written_aside(archive) as part, tarfile.open(part, "w:xz", preset=6) as tar:
        for name in sorted(FILES):
            if (folder / name).exists():
                tar.add(folder / name, arcname=name)
    return archive


def unpack(archive: str | Path) -> Path:
    """The folder of a prepared corpus packed by `pack`, unpacked once into the cache.

    Of several processes that unpack one archive, all take what the first has finished.
    Raises DataError if it is no packed corpus, or is larger than the disk has room for.
    """
    archive = Path(archive)
    folder = (cache_folder() / "unpacked" / sha256_of(archive)[:16]).resolve()
    if _is_whole(folder):
        return folder
    make_folder(folder.parent, "the cache")
    remove_leftovers(folder.parent, FILES)
    work = temporary_name(folder.parent)
    work.mkdir()
    try:
        _extract(archive, work)
        try:
            Corpus.open(work, verify=True)
        except DataError as error:  # of the archive, which the caller knows
            raise DataError(str(error).replace(str(work), str(archive))) from None
        if not _is_whole(folder):  # another process may have been faster
            replace_folder(work, folder, _check_contents, FILES)
    finally:
        remove_files(work, FILES)
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        Corpus.open(folder, verify=True)
    except (DataError, OSError):
        return False
    return True


def _extract(archive: Path, folder: Path) -> None:
    """Write the files of a packed corpus into `folder`: no other names, no links, no more than there is room for."""
    room = min(LARGEST_CORPUS, shutil.disk_usage(folder).free)
    with _opened_archive(archive) as tar:
        for member in tar:
            name = str(PurePosixPath(member.name))
            if name == "." and member.isdir():  # tar makes it when it is called for a whole folder
                continue
            if name not in FILES or not member.isreg() or member.issparse() or (folder / name).exists():
                raise DataError(f"{archive} is no packed corpus: it holds {member.name!r}")
            room -= member.size
            if room < 0 or (name == "corpus.json" and member.size > LARGEST_NOTE):
                raise DataError(f"{archive} is too large: {member.name} has {member.size:,} bytes")
            with tar.extractfile(member) as source, open(folder / name, "wb") as file:
                shutil.copyfileobj(source, file)


@contextlib.contextmanager
def _opened_archive(archive: Path) -> Iterator[tarfile.TarFile]:
    """The tar in `archive`. Raises DataError for whatever is wrong with it."""
    if not archive.is_file():  # a folder, or a pipe, which would be waited on for ever
        raise DataError(f"{archive} is no packed corpus, nor any file")
    try:
        with lzma.open(archive) as plain, tarfile.open(fileobj=_SmallReads(plain), mode="r:") as tar:
            yield tar
    except (tarfile.TarError, lzma.LZMAError, EOFError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{archive} is no packed corpus: {' '.join(str(error).split())}") from None


class _SmallReads:
    """A file that refuses to be read by the gigabyte, as a header of that size would have `tarfile` do."""

    def __init__(self, file):
        self.file, self.tell, self.seek = file, file.tell, file.seek

    def read(self, size: int) -> bytes:
        if size > LARGEST_NOTE:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self.file.read(size)
