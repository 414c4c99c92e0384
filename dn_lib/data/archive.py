"""A prepared corpus as one file, packed and unpacked."""

from __future__ import annotations

import contextlib
import lzma
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, cast

from dn_lib.data.corpus import FILES, LARGEST_NOTE, Corpus, check_contents
from dn_lib.data.downloads import cache_folder, sha256_of
from dn_lib.data.files import make_folder, remove_files, remove_leftovers, replace_folder, temporary_name, written_aside
from dn_lib.data.tokens import DataError

LARGEST_CORPUS = 2**36
"""Bytes that `unpack` writes at most."""


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


def unpack(archive: str | Path, *, most: int = LARGEST_CORPUS, largest_note: int = LARGEST_NOTE) -> Path:
    """The folder of a prepared corpus packed by `pack`, unpacked once into the cache.

    Of several processes that unpack one archive, all take what the first has finished.
    most, largest_note: bytes of the whole and of its `corpus.json`.
    Raises DataError if it is no packed corpus, or is larger than that or than the disk has room for.
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
        _extract(archive, work, most, largest_note)
        try:
            Corpus.open(work, verify=True)
        except DataError as error:  # of the archive, which the caller knows
            raise DataError(str(error).replace(str(work), str(archive))) from None
        if not _is_whole(folder):  # another process may have been faster
            replace_folder(work, folder, check_contents, FILES)
    finally:
        remove_files(work, FILES)
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        Corpus.open(folder, verify=True)
    except (DataError, OSError):
        return False
    return True


def _extract(archive: Path, folder: Path, most: int, largest_note: int) -> None:
    """Write the files of a packed corpus into `folder`: no other names, no links, no more than there is room for."""
    room = min(most, shutil.disk_usage(folder).free)
    with _opened_archive(archive, largest_note) as tar:
        for member in tar:
            name = str(PurePosixPath(member.name))
            if name == "." and member.isdir():  # tar makes it when it is called for a whole folder
                continue
            if name not in FILES or not member.isreg() or member.issparse() or (folder / name).exists():
                raise DataError(f"{archive} is no packed corpus: it holds {member.name!r}")
            room -= member.size
            if room < 0 or (name == "corpus.json" and member.size > largest_note):
                raise DataError(f"{archive} is too large: {member.name} has {member.size:,} bytes")
            source = tar.extractfile(member)
            assert source is not None  # as of every regular file
            with source, open(folder / name, "wb") as file:
                shutil.copyfileobj(source, file)


@contextlib.contextmanager
def _opened_archive(archive: Path, largest_note: int = LARGEST_NOTE) -> Iterator[tarfile.TarFile]:
    """The tar in `archive`. Raises DataError for whatever is wrong with it."""
    if not archive.is_file():  # a folder, or a pipe, which would be waited on for ever
        raise DataError(f"{archive} is no packed corpus, nor any file")
    try:
        with (
            lzma.open(archive) as plain,
            tarfile.open(fileobj=cast(Any, _SmallReads(plain, largest_note)), mode="r:") as tar,
        ):
            yield tar
    except (tarfile.TarError, lzma.LZMAError, EOFError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{archive} is no packed corpus: {' '.join(str(error).split())}") from None


class _SmallReads:
    """A file that refuses to be read by the gigabyte, as a header of that size would have `tarfile` do."""

    def __init__(self, file, most: int):
        self.file, self.tell, self.seek, self.most = file, file.tell, file.seek, most

    def read(self, size: int) -> bytes:
        if size > self.most:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self.file.read(size)
