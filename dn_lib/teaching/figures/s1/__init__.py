"""Study 1, forgetting on purpose: `measured` has the numbers, `drawings` the figures."""

from dn_lib.teaching.figures.s1.drawings import (
    bound_and_return,
    documents,
    half_lives,
    noise,
    ratios,
    speed,
    tiles,
    two_documents,
)
from dn_lib.teaching.figures.s1.measured import MEMORIES, Memory, best_gate, recall_in_documents, speeds

__all__ = [
    "MEMORIES",
    "Memory",
    "best_gate",
    "bound_and_return",
    "documents",
    "half_lives",
    "noise",
    "ratios",
    "recall_in_documents",
    "speed",
    "speeds",
    "tiles",
    "two_documents",
]
