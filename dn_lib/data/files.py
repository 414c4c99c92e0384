"""Files that are whole or not there: unique temporary names, locks, and folders that change at once."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from dn_lib.data.tokens import DataError

TEMPORARY = ".dn_lib-"
"""How every temporary name begins. It is hidden, so a corpus of a folder never reads one."""
DAY = 24 * 3600.0


def temporary_name(folder: Path) -> Path:
    """A name in `folder` that nobody else uses. (`tempfile` would make it unreadable for other users.)"""
    return folder / f"{TEMPORARY}{secrets.token_hex(8)}"


def make_folder(folder: Path, what: str) -> None:
    """Make `folder` and its parents. Raises DataError that says what the folder is for."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{what} must be a folder that can be written, {folder} cannot: {error.strerror}") from None


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place when the block ends well and is removed otherwise.

    It is forced to the disk first: a power cut leaves the old file or the new one, never an empty one.
    """
    part = temporary_name(path.parent)
    try:
        yield part
        with open(part, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def alone(path: Path, seconds: float) -> Iterator[None]:
    """Only one process at a time is in this block for `path`.

    The lock is the operating system's, so it goes with the process that holds it, however that ends. Its empty file
    stays: to remove it would let two processes hold two locks of one name.
    Raises DataError if another process is still there after `seconds`.
    """
    try:
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=seconds):
            yield
    except Timeout:
        message = f"another process has been writing {path} for {seconds:.0f} seconds: wait for it, or end it"
        raise DataError(message) from None


def is_taken(error: OSError) -> bool:
    """Whether a rename failed because something is there already."""
    # Windows says "access denied" (EACCES) where there is a folder.
    return error.errno in (errno.ENOTEMPTY, errno.EEXIST) or (os.name == "nt" and error.errno == errno.EACCES)


def replace_folder(work: Path, folder: Path, check: Callable[[Path], None], names: frozenset[str]) -> None:
    """Rename the folder `work` to `folder`. What was there is moved aside before, and removed after.

    check: raises if a folder that is there may not be replaced; asked before it is moved, and once more after, when
      nothing can be added under its old name.
    names: the files that may be removed from the old folder.
    If several processes do this at once, each finds its own or a later one's whole folder there.
    """
    for _ in range(100):
        try:
            os.rename(work, folder)
            return
        except OSError as error:
            if not is_taken(error):
                raise
        old = temporary_name(folder.parent)
        try:
            check(folder)
            os.rename(folder, old)
        except FileNotFoundError:  # another process has just moved it
            continue
        try:
            check(old)
            os.rename(work, folder)
        except BaseException as error:
            if isinstance(error, OSError) and is_taken(error):  # another process came first: ours goes over it
                remove_files(old, names)
                continue
            with contextlib.suppress(OSError):
                os.rename(old, folder)
            raise
        remove_files(old, names)
        return
    raise DataError(f"{folder} is being replaced by other processes all the time: stop them, and run again")


def is_being_replaced(folder: Path) -> bool:
    """Whether `folder` may be absent just between the two renames of `replace_folder`."""
    with contextlib.suppress(OSError):
        return any(folder.parent.glob(f"{TEMPORARY}*"))
    return False


def remove_files(folder: Path, names: frozenset[str]) -> None:
    """Remove the files called `names`, and temporary ones, from `folder`, and the folder if nothing else is in it."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if name in names or name.startswith(TEMPORARY):
                (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def remove_leftovers(parent: Path, names: frozenset[str]) -> None:
    """Remove what killed processes left in `parent`: our temporary folders, older than a day, that hold nothing but
    files called `names` and temporary ones."""
    with contextlib.suppress(OSError):
        for folder in parent.glob(f"{TEMPORARY}*"):
            about = folder.lstat()
            newest = max(about.st_mtime, about.st_ctime)  # to be moved aside changes the second only
            ours = folder.is_dir() and not folder.is_symlink()
            ours = ours and all(name in names or name.startswith(TEMPORARY) for name in os.listdir(folder))
            if ours and time.time() - newest > DAY:
                remove_files(folder, names)
