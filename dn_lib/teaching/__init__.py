"""What the chapters use to teach: exercises that check themselves, equations that are tested, figures."""

from dn_lib.teaching.checks import Verdict, check, evaluate
from dn_lib.teaching.registry import Equation, Exercise, Mutant, equations, exercises, holds, relative_error

__all__ = [
    "Equation",
    "Exercise",
    "Mutant",
    "Verdict",
    "check",
    "equations",
    "evaluate",
    "exercises",
    "holds",
    "relative_error",
]
