"""Texts from where they lie to a corpus: files, folders, archives, downloads, the standard library, wheels."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Iterable
from numbers import Integral
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dn_lib.data.archive import unpack
from dn_lib.data.corpus import Corpus, is_prepared, text_hash
from dn_lib.data.downloads import DOWNLOADS, cache_folder, named_text
from dn_lib.data.stdlib import stdlib_documents
from dn_lib.data.tokens import SEPARATOR, BPETokenizer, ByteTokenizer, DataError, Tokenizer, check_vocab

VALIDATION_SHARE = 0.1


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
    digest = text_hash(encoded_name(place))[:8]
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
    return int.from_bytes(hashlib.sha256(encoded_name(name)).digest()[:8], "big") < share * 2**64


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
        digest.update(encoded_name(path) + f"\0{text_hash(content)}\n".encode())
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
    facts = {"name": name, "files": 1, "bytes": len(text), "file_list_sha256": text_hash(text), **facts}
    return _tokenise([text[:cut]], [text[cut:]], vocab, facts)


def encoded_name(name: str) -> bytes:
    """UTF-8 on every machine; a file name that is no UTF-8 gives the bytes that it has on the disk."""
    return name.encode(errors="surrogateescape")


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
        import datasets  # pyright: ignore[reportMissingImports]
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
