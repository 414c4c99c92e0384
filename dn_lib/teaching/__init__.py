"""What the chapters use to teach: exercises that check themselves, equations that are tested, figures."""

from dn_lib.teaching.checks import Verdict, check, evaluate
from dn_lib.teaching.registry import Equation, Exercise, Mutant, all_equations, all_exercises, holds, relative_error

__all__ = [
    "Equation",
    "Exercise",
    "Mutant",
    "Verdict",
    "all_equations",
    "all_exercises",
    "check",
    "evaluate",
    "holds",
    "relative_error",
]
