"""What every command of the command line does: print on any console, say an error in one line, end quietly."""

from __future__ import annotations

import codecs
import contextlib
import http.client
import lzma
import os
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import TextIO

import typer
from safetensors import SafetensorError
from typer.core import TyperGroup

PLAIN = {"✓": "+", "✗": "x", "○": "o", "→": "->", "…": "...", "–": "-", "—": "-", "−": "-", "×": "x", "\ufffd": "?"}
"""What stands for a character that a console cannot show; others are shown by their number."""

# What a user, a file of theirs or their machine can cause. Any other exception is a fault of this package.
CAUSED_OUTSIDE = (
    ValueError,
    OSError,
    RuntimeError,
    MemoryError,
    ImportError,
    EOFError,
    SafetensorError,
    http.client.HTTPException,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)
CLOSED_PIPE = 128 + 13
"""Exit status after `| head` has closed the pipe: what a shell reports for a program that SIGPIPE ended."""


def _in_plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lost), error.end


codecs.register_error("dn_lib.plain", _in_plain)


def print_anything() -> None:
    """Let stdout and stderr print every text, whatever their encoding: what it lacks is spelled in ASCII."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="dn_lib.plain")


def say(text: str) -> None:
    """Print a line on stdout, at once. (Without `file`, typer would print UTF-8 on a console that reads ASCII.)"""
    typer.echo(text, file=sys.stdout)


def one_line(error: BaseException) -> str:
    """The message of `error` in one line, or its kind if it has none."""
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str, status: int) -> None:
    with contextlib.suppress(OSError):  # stderr may be closed too
        typer.echo(f"error: {message}", file=sys.stderr)
    raise typer.Exit(status) from None


# What a stream raises that takes nothing: a closed pipe or a full disk; a closed stream; no stream at all.
_LOST = (OSError, ValueError, AttributeError)


def silence(stream: TextIO) -> None:
    """Drop what waits in `stream` and what comes later: Python would try to write it once more at its very end, and
    complain in lines of its own."""
    with contextlib.suppress(*_LOST):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def end_streams(*streams: TextIO) -> None:
    """Flush `streams`, or stdout and stderr if none is given; one that takes nothing is silenced.

    So a stream that is lost changes no exit status.
    """
    for stream in streams or (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except _LOST:
            silence(stream)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End a command that fails with one line on stderr: exit status 2 for what was caused outside, 1 for a fault of
    the package. `DN_LIB_TRACEBACK=1` shows where it came from instead."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):  # a wanted end; a wrong option
        raise
    except BrokenPipeError:
        raise typer.Exit(CLOSED_PIPE) from None
    except Exception as error:
        if hasattr(error, "format_message"):  # another of typer's errors: `Commands.main` says it
            raise
        if os.environ.get("DN_LIB_TRACEBACK", "0") not in ("", "0"):
            raise
        if isinstance(error, CAUSED_OUTSIDE):
            _fail(one_line(error), 2)
        kind = type(error).__name__
        _fail(f"internal error ({kind}: {one_line(error)}); DN_LIB_TRACEBACK=1 shows where", 1)


class Commands(TyperGroup):
    """The group of all commands. `typer` itself would print a usage error in a frame of several lines."""

    def main(self, args=None, prog_name=None, **extra):
        print_anything()
        args = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False
        try:
            status = super().main(args or ["--help"], prog_name, **extra)
        except typer.Abort:
            status = 130
        except Exception as error:
            message = getattr(error, "format_message", None)
            if message is None:  # DN_LIB_TRACEBACK is set
                raise
            context = getattr(error, "ctx", None)
            hint = f" (see {context.command_path} --help)" if context else ""
            with contextlib.suppress(OSError):
                typer.echo(f"error: {' '.join(message().split())}{hint}", file=sys.stderr)
            status = getattr(error, "exit_code", 1)
        end_streams()
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx):
        with one_line_errors():
            super().invoke(ctx)
            if sys.stdout is not None:
                sys.stdout.flush()
