"""Corpora: text to train on, as memory-mapped tokens, split into training and validation parts."""

from dn_lib.data.archive import check_archive, pack, unpack
from dn_lib.data.batches import Batches
from dn_lib.data.corpus import Corpus, check_target, is_prepared
from dn_lib.data.downloads import DOWNLOADS, cache_folder, fetch
from dn_lib.data.sources import build_corpus, in_validation, load_corpus, prepared_folder, source_path, split_text
from dn_lib.data.stdlib import stdlib_documents
from dn_lib.data.tokens import BPETokenizer, ByteTokenizer, DataError, load_tokenizer

__all__ = [
    "DOWNLOADS",
    "BPETokenizer",
    "Batches",
    "ByteTokenizer",
    "Corpus",
    "DataError",
    "build_corpus",
    "cache_folder",
    "check_archive",
    "check_target",
    "fetch",
    "in_validation",
    "is_prepared",
    "load_corpus",
    "load_tokenizer",
    "pack",
    "prepared_folder",
    "source_path",
    "split_text",
    "stdlib_documents",
    "unpack",
]
