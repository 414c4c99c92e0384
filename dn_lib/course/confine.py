"""What a room may not do: write, read what is not its business, reach the network, make or signal processes.

Linux alone knows how (Landlock, since 5.13, and seccomp); none of it needs the rights of an administrator.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

import dn_lib

# System calls, which have these numbers on every architecture.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
SET_PDEATHSIG, SET_SECCOMP, SET_CHILD_SUBREAPER, SET_NO_NEW_PRIVS = 1, 22, 36, 38
FILTER = 2

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
FILES = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # version: how many rights on files it knows; later ones know as many
CONNECT_AND_BIND = 0b11  # TCP, from version 4
SIGNALS_AND_SOCKETS = 0b11  # of processes outside, from version 6


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int) -> None:
    if _libc().prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def version() -> int:
    """The version of Landlock that this machine has, 0 if it has none."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(int(_libc().syscall(CREATE_RULESET, None, 0, 1)), 0)


def _below(path: Path, hidden: set[Path]) -> list[Path]:
    """`path`, or what is in it where something in it is hidden."""
    resolved = path.resolve()
    if resolved in hidden or not path.exists():
        return []
    if any(resolved in other.parents for other in hidden):
        return [piece for child in path.iterdir() for piece in _below(child, hidden)]
    return [path]


def readable() -> list[Path]:
    """What a room has to read: Python, its packages and the machine's libraries, and this package without answers.

    References and mutants of the exercises are left out, and with them every solution: the book is not here at all.
    """
    package = Path(dn_lib.__file__).resolve().parent
    hidden = {package / "teaching" / "exercises", package / "teaching" / "equations"}
    packages = [entry for entry in sys.path if "site-packages" in entry or "dist-packages" in entry]
    systems = ("/usr", "/lib", "/lib64", "/sys", "/dev/null", "/dev/urandom", "/proc/cpuinfo", "/proc/meminfo")
    files = ("/etc/ld.so.cache", "/etc/localtime", "/etc/passwd", "/etc/nsswitch.conf")
    wanted = (package, sys.prefix, sys.base_prefix, *packages, *systems, *files)
    return [piece for path in wanted for piece in _below(Path(path), hidden)]


def restrict(paths: Iterable[Path]) -> None:
    """From now on, let this process read below `paths` and touch no other file.  Raises OSError where that fails."""
    abi, call = version(), _libc().syscall
    if not abi:
        raise OSError("this kernel has no Landlock")
    files = (1 << FILES.get(abi, 16)) - 1
    attributes = struct.pack(
        "<QQQ", files, CONNECT_AND_BIND if abi >= 4 else 0, SIGNALS_AND_SOCKETS if abi >= 6 else 0
    )[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = int(call(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0))
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    for path in paths:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = EXECUTE | READ_FILE | READ_DIR if path.is_dir() else READ_FILE
        if path.name == "null":
            allowed |= WRITE_FILE
        rule = struct.pack("<Qi", allowed & files, folder)
        if call(ADD_RULE, ruleset, 1, rule, 0):
            raise OSError(ctypes.get_errno(), f"landlock_add_rule: {path}")
        os.close(folder)
    prctl(SET_NO_NEW_PRIVS, 1)
    if call(RESTRICT_SELF, ruleset, 0):
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    os.close(ruleset)


# Calls by their numbers: a group that makes or signals processes or reaches into them, one that changes what Landlock
# lets pass (owners, permissions, times, extended attributes), one that opens other ways to both (sockets, io_uring).
REFUSED = {
    "x86_64": (
        0xC000003E,  # its name in a filter
        (57, 58, 56, 435, 62, 200, 234, 424, 129, 297, 101, 311, 112, 109, 302),
        (90, 91, 92, 93, 94, 132, 235, 280, 261, 268, 452, 260, 188, 189, 190, 197, 198, 199, 463, 466, 469),
        (41, 425),
    ),
    "aarch64": (
        0xC00000B7,
        (220, 435, 129, 130, 131, 424, 138, 240, 117, 271, 157, 154, 261),
        (52, 53, 54, 55, 88, 452, 5, 6, 7, 14, 15, 16, 463, 466, 469),
        (198, 425),
    ),
}
LOAD, EQUALS, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # instructions of a filter
ALLOW, REFUSE = 0x7FFF0000, 0x00050001  # the latter with EPERM


def refuse_calls() -> None:
    """From now on, this process makes no other, signals none, opens no socket, and changes nothing about any file.

    Raises OSError where that fails.  On a kind of processor that is not listed, the other limits have to do.
    """
    if os.uname().machine not in REFUSED:
        return
    architecture, *groups = REFUSED[os.uname().machine]
    calls = [number for group in groups for number in group]
    tests = [(AT_LEAST, 1 << 30), *((EQUALS, number) for number in calls)]  # the first: another way to count calls
    program = [(LOAD, 0, 0, 4), (EQUALS, 1, 0, architecture), (RETURN, 0, 0, REFUSE), (LOAD, 0, 0, 0)]
    program += [(code, len(tests) - i, 0, number) for i, (code, number) in enumerate(tests)]
    program += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    steps = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in program))
    header = ctypes.create_string_buffer(struct.pack("<H6xQ", len(program), ctypes.addressof(steps)))
    if _libc().prctl(SET_SECCOMP, FILTER, ctypes.c_void_p(ctypes.addressof(header)), 0, 0):
        raise OSError(ctypes.get_errno(), "prctl: seccomp")


def give_up_rights() -> None:
    """From now on, this process has no right that other users lack, whoever started it."""
    header, none = struct.pack("<Ii", 0x20080522, 0), bytes(24)
    if _libc().capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


def confine(paths: Iterable[Path]) -> None:
    """All of this module that keeps a process from its surroundings."""
    restrict(paths)
    give_up_rights()
    refuse_calls()


def limit_the_rest() -> None:
    """No file may grow, few may be open, and no thread or process may be added (but by root, who is exempt)."""
    for what in (resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
        resource.setrlimit(what, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error, not the end


def children() -> list[int]:
    """The processes whose parent is this one."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(entry.name))
    return found


def end_all_children() -> None:
    """Kill them, and what they leave behind, until there are none: this process has to be their subreaper."""
    while True:
        # First all are stopped, so that none can go on making others while the rest are ended.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in children():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
