"""The folder of a run: who holds it, which run it belongs to, and where that run may begin or go on."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import secrets
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dn_lib.training import checkpoint as checkpoints
from dn_lib.training.checkpoint import CheckpointError
from dn_lib.training.interruptions import lines, read_log, warn

LOCK, RUN, LOG = "run.lock", "run.json", "log.jsonl"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of file systems that cannot lock


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other runs out of `folder`, which is made if need be.

    The lock is the operating system's: it goes with the process, so that a dead one never blocks.
    Raises CheckpointError at once if another run is in the folder, or if nothing can be written there.
    """
    try:
        str(folder).encode()
        folder.mkdir(parents=True, exist_ok=True)
    except UnicodeEncodeError:  # its checkpoints could be written, and not be read again
        raise CheckpointError(f"folder must have a name in UTF-8, got {str(folder)!r}: take another") from None
    except OSError as error:
        raise CheckpointError(f"folder {folder} cannot be made: {error.strerror or error}") from None
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise CheckpointError(f"folder {folder} is in use by {_holder(folder)}: wait for it, or take another") from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise CheckpointError(f"folder {folder} cannot be written to: {error.strerror or error}") from None
        warn(f"the file system of {folder} has no locks: make sure that no second run uses this folder")
    try:
        yield
    finally:
        lock.release()


def _holder(folder: Path) -> str:
    about = run_facts(folder)
    if not {"since", "pid", "host"} <= set(about):
        return "another run"
    return f"another run, since {about['since']} (process {about['pid']} on {about['host']})"


def run_facts(folder: str | Path) -> dict[str, Any]:
    """What `run.json` tells: `run`, `since`, `pid`, `host`, `notes`; empty if there is none that can be read."""
    try:
        about = json.loads((Path(folder) / RUN).read_bytes())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def begin(folder: Path, notes: dict[str, Any], again: bool) -> str:
    """A new run in `folder`: returns its name.  `again`: a run that died before its first checkpoint may be replaced.

    Raises CheckpointError if there is anything in the folder that the new run would write over.
    """
    if checkpoints.latest(folder) is not None:
        raise CheckpointError(f"{folder} holds a run already: go on with --resume, or take another folder")
    began = run_facts(folder).get("run")
    there = _first_with_content(folder, ("model", LOG, "tokenizer.json", *(() if began else (RUN,))))
    if there == "model":
        raise CheckpointError(f"{folder} holds a model and no checkpoint to go on from: take another folder")
    if there and not (began and again):
        remedy = "begin it again with --resume, or take" if began else "take"
        whose = "a run that wrote no checkpoint" if began else "something else"
        raise CheckpointError(f"{folder / there} is there already, from {whose}: {remedy} another folder")
    run = began if isinstance(began, str) else secrets.token_hex(8)
    enter(folder, run, notes, [])
    return run


def _first_with_content(folder: Path, names: Iterable[str]) -> str | None:
    """The first of `names` that is in `folder`, empty files left out."""
    try:
        return next((name for name in names if (folder / name).exists() and (folder / name).stat().st_size), None)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from None


def enter(folder: Path, run: str, notes: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Make `folder` ready for a process of `run`: what a killed one left goes, `log.jsonl` holds `records`."""
    about = {
        "run": run,
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "pid": os.getpid(),
        "host": platform.node(),
        "notes": notes,
    }
    try:
        checkpoints.remove_parts(folder, run)
        checkpoints.write_file(folder / RUN, (json.dumps(about, indent=1) + "\n").encode(), run)
        checkpoints.write_file(folder / LOG, lines(records), run)
    except OSError as error:
        raise CheckpointError(f"could not write into {folder}: {error.strerror or error}") from None


def go_on(folder: Path, saved: checkpoints.Checkpoint, notes: dict[str, Any]) -> list[dict[str, Any]]:
    """Make `folder` ready to go on from `saved`; returns the log up to it.

    Checkpoints of more steps are set aside: the run now takes another way than theirs.
    Raises CheckpointError if the folder belongs to another run than the checkpoint.
    """
    run, step = saved.about["run"], saved.about["step"]
    began = run_facts(folder).get("run", run)
    if began != run:
        raise CheckpointError(f"the checkpoint of step {step} is of another run than {folder}: take another folder")
    try:
        if not run_facts(folder) and _first_with_content(folder, (RUN,)):  # damaged, or the user's own
            checkpoints.set_aside(folder / RUN)
        records, damaged = read_log(folder / LOG, step)
        if damaged:
            kept = checkpoints.name_aside(folder / LOG)
            checkpoints.write_file(kept, (folder / LOG).read_bytes(), run)
            warn(f"line {damaged[0]} of {folder / LOG} is no record and is left out; the log as it was is {kept}")
        records += [record for record in saved.about.get("unlogged", []) if record not in records]
        for path in checkpoints.numbered(folder):
            if checkpoints.step_of(path) > step:
                checkpoints.set_aside(path)
    except OSError as error:
        raise CheckpointError(f"could not use {folder}: {error.strerror or error}") from None
    enter(folder, run, notes, records)
    return records


def read_to_resume(path: Path, folder: Path) -> checkpoints.Checkpoint:
    """`read(path)`; an error says which older checkpoint in `folder` is whole, and how to take it."""
    try:
        return checkpoints.read(path)
    except CheckpointError as error:
        step = checkpoints.step_of(path)
        if step is None:
            raise
        older = checkpoints.newest_whole(folder, below=step)
        remedy = f"the newest older one that is whole is {older}: go on from it with --resume-from {older}"
        raise CheckpointError(f"{error}; {remedy if older else 'no older one is whole'}") from None
