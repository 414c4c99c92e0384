"""Finds copies that overtake a dot, in the code that Triton made of a kernel (TTGIR, for Hopper GPUs).

In a pipelined loop Triton fetches the tiles of later iterations while the tensor cores work on this one's.  On Hopper
a dot (`warp_group_dot`) runs on its own until a wait, and reads its operands from shared memory meanwhile.  So a
tile's ring of buffers needs one buffer more than there are copies under way.  Triton (3.6 to 3.9) reserves that one
only for a tile that serves dots alone.  A tile that is also used entry by entry, as in `sum(S * dS)`, gets one too
few: the next copy may overwrite it while a dot still reads.  Results are then a little off, and not every time.

A copy that is masked off is no way out: it writes zeros.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_VALUE = r"%[\w#.-]+"
_ALLOC = re.compile(rf"\s*({_VALUE}) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x")
_VIEW = re.compile(rf"\s*({_VALUE}) = ttg\.memdesc_\w+ ({_VALUE})")
_WAIT = re.compile(rf"\s*({_VALUE})(?::\d+)? = ttng\.warp_group_dot_wait ([^{{]*){{pendings = (\d+)")
_DOT = re.compile(rf"\s*({_VALUE}) = ttng\.warp_group_dot ([^:]*)")
_COPY = re.compile(r"copy_global_to_local ([^:]*)")


class Overtaken(NamedTuple):
    """A dot whose operand a later copy may overwrite.

    ring: the operand's buffers in shared memory, by name.  dot: by name.  ahead: by how many iterations copies are
    ahead.  buffers: how many there are.
    """

    ring: str
    dot: str
    ahead: int
    buffers: int


class _Reader:
    """Follows rings of buffers, copies into them and dots that read them, line by line."""

    def __init__(self) -> None:
        self.rings: dict[str, str] = {}  # each view of a ring, and the ring
        self.buffers: dict[str, int] = {}
        self.ahead: dict[str, int] = {}  # copies before the loop
        self.running: list[tuple[int, set[str], str]] = []  # dots: iteration, rings, name
        self.found: set[Overtaken] = set()

    def rings_of(self, operands: str) -> set[str]:
        return {self.rings[name] for name in re.findall(_VALUE, operands) if name in self.rings}

    def read(self, line: str, iteration: int | None) -> None:
        """iteration: of the loop that the line is in; None outside, where copies fill the rings."""
        if found := _ALLOC.match(line):
            self.rings[found[1]], self.buffers[found[1]] = found[1], int(found[2])
        elif found := _VIEW.match(line):
            if found[2] in self.rings:
                self.rings[found[1]] = self.rings[found[2]]
        elif found := _WAIT.match(line):
            left = int(found[3])
            self.running = self.running[-left:] if left else []
            for i, name in enumerate(re.findall(_VALUE, found[2])):  # the wait hands its operands on
                if name in self.rings:
                    self.rings[f"{found[1]}#{i}"] = self.rings[name]
        elif found := _DOT.match(line):
            if "isAsync = true" not in line:
                self.running = []
            elif iteration is not None:
                self.running.append((iteration, self.rings_of(found[2]), found[1]))
        elif found := _COPY.search(line):
            for ring in self.rings_of(found[1]):
                if iteration is None:
                    self.ahead[ring] = self.ahead.get(ring, 0) + 1
                    continue
                ahead, buffers = self.ahead.get(ring, 0), self.buffers[ring]
                for since, rings, dot in self.running:
                    if ring in rings and (iteration + ahead - since) % buffers == 0:
                        self.found.add(Overtaken(ring, dot, ahead, buffers))


def overtaken_dots(ttgir: str) -> list[Overtaken]:
    """Dots that a copy may overtake in the loops of a kernel's TTGIR (`compiled.asm["ttgir"]`)."""
    reader, lines = _Reader(), ttgir.splitlines()
    body: list[str] = []
    closing = ""
    for line in lines:
        if closing:
            if not line.startswith(closing):
                body.append(line)
                continue
            for iteration in range(1 + max([1, *reader.buffers.values()])):  # until every ring has come round
                for inner in body:
                    reader.read(inner, iteration)
            reader.running, reader.ahead, body, closing = [], {}, [], ""
        elif "scf.for" in line:
            closing = line[: len(line) - len(line.lstrip())] + "}"
        else:
            reader.read(line, None)
    return sorted(reader.found)
