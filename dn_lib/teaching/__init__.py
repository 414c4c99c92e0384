"""What the chapters use to teach: exercises that check themselves, equations that are tested, figures."""

import dn_lib.kernels.interpreter  # noqa: F401  (readers write kernels: interpreted where there is no GPU)
from dn_lib.teaching.checks import Verdict, check, evaluate
from dn_lib.teaching.registry import (
    Candidate,
    Equation,
    Exercise,
    Extreme,
    Mutant,
    all_equations,
    all_exercises,
    holds,
    relative_error,
)

__all__ = [
    "Candidate",
    "Equation",
    "Exercise",
    "Extreme",
    "Mutant",
    "Verdict",
    "all_equations",
    "all_exercises",
    "check",
    "evaluate",
    "holds",
    "relative_error",
]
