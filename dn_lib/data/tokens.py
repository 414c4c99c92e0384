"""Text to integers and back: bytes, or byte-pair encoding through the `tokenizers` package."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from numbers import Integral
from pathlib import Path

import numpy as np

SEPARATOR = 0
"""The token between two documents: the NUL byte, which no source file holds, or BPE's first token."""


class DataError(ValueError):
    """A corpus that cannot be used as asked; the message is one line and names the remedy."""


def check_vocab(vocab: int) -> None:
    """Raise DataError unless byte-pair encodings of `vocab` tokens can be trained and stored."""
    if isinstance(vocab, bool) or not isinstance(vocab, Integral):
        raise DataError(f"vocab must be a whole number of tokens, got {vocab!r}")
    if vocab < 257:
        raise DataError(f"vocab must be at least 257 (256 bytes and a separator), got {vocab}")
    if vocab > 65536:
        raise DataError(f"vocab must be at most 65536 to fit uint16, got {vocab}")


class ByteTokenizer:
    """Every byte is a token: 256 of them, nothing to train, nothing out of vocabulary.

    >>> ByteTokenizer().decode(ByteTokenizer().encode("naïve"))
    'naïve'
    """

    name = "bytes"
    vocab_size = 256
    dtype = np.uint8

    def encode(self, text: str | bytes) -> np.ndarray:
        """uint8 array of the UTF-8 bytes of `text` (bytes that came in as surrogates go out as they were)."""
        raw = text.encode(errors="surrogateescape") if isinstance(text, str) else text
        return np.frombuffer(raw, dtype=np.uint8)

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of `tokens`; a sequence that is no UTF-8 gets replacement characters."""
        return bytes(int(token) for token in tokens).decode(errors="replace")

    def save(self, folder: str | Path) -> None:
        """Nothing to save: the vocabulary is the byte."""


class BPETokenizer:
    """Byte-level byte-pair encoding.  Needs the `tokenizers` package (`pip install dn-lib[data]`).

    tokenizer: a `tokenizers.Tokenizer`.  Its name holds a hash of the vocabulary, so that a checkpoint
    can tell one tokenizer from another.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size()
        if self.vocab_size > 65536:
            raise DataError(f"vocab must be at most 65536 to fit uint16, got {self.vocab_size}")
        self.dtype = np.uint16
        self.name = "bpe-" + hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:12]

    @classmethod
    def train(cls, texts: Iterable[bytes], vocab_size: int) -> BPETokenizer:
        """Train on an iterable of documents.

        Raises DataError without `tokenizers`, below 257 or above 65536 tokens.
        """
        check_vocab(vocab_size)
        tokenizers = _import_tokenizers()
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|separator|>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator((text.decode(errors="replace") for text in texts), trainer)
        return cls(model)

    @classmethod
    def load(cls, path: str | Path) -> BPETokenizer:
        """Read a `tokenizer.json`.  Raises DataError if it cannot be read as one."""
        read = _import_tokenizers().Tokenizer.from_file
        try:
            tokenizer = read(str(path))
        except Exception as error:  # the package raises nothing more special
            raise DataError(f"{path} holds no tokenizer that can be read: {' '.join(str(error).split())}") from None
        return cls(tokenizer)

    def encode(self, text: str | bytes) -> np.ndarray:
        """uint16 array of token numbers."""
        raw = text if isinstance(text, bytes) else text.encode(errors="surrogateescape")
        text = raw.decode(errors="replace")
        return np.array(self.tokenizer.encode(text).ids, dtype=np.uint16)

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of `tokens`."""
        return self.tokenizer.decode([int(token) for token in tokens])

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` into `folder`: whole, or the one that was there stays.  Raises OSError."""
        from dn_lib.data.files import written_aside  # which needs this module

        with written_aside(Path(folder) / "tokenizer.json") as part:
            part.write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8", newline="\n")


Tokenizer = ByteTokenizer | BPETokenizer


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer saved in `folder`: its `tokenizer.json`, or bytes where there is none."""
    path = Path(folder) / "tokenizer.json"
    return BPETokenizer.load(path) if path.exists() else ByteTokenizer()


def _import_tokenizers():
    try:
        import tokenizers  # pyright: ignore[reportMissingImports]
        import tokenizers.decoders  # pyright: ignore[reportMissingImports]
        import tokenizers.models  # pyright: ignore[reportMissingImports]
        import tokenizers.pre_tokenizers  # pyright: ignore[reportMissingImports]
        import tokenizers.trainers  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError("byte-pair encoding needs the tokenizers package: pip install tokenizers") from None
    return tokenizers
