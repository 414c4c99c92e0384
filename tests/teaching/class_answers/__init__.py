"""Wrong answers as a class would give them, eight or more for each exercise.

They are kept apart from the mutants of the registry and share no code with them; the judge has to name most of them
all the same (`test_class_answers.py`, for chapter 5 `test_class_answers_ch5.py`).  `held_out.py` was written last, and
nothing was added to the registry for it.

`fresh_chN.py` hold four sets that were written from the chapters alone, one after another.  Of the first, 87 answers,
the judge named 79 and accepted one that broke a rule of its exercise; of 44 less usual ones it named 26, accepted one
and gave one a hint that was beside the point.  It then learnt from these.  Of 44 odder ones it named 18 and misled one.
It learnt from those, too: all three sets are `ANSWERS`.  The last 44, `HELD_OUT`, are more like the second set.  They
were judged once and nothing was changed for them: 33 were named, none accepted or misled.

`ch5.py` holds 101 answers to chapter 5, written from its text before its mutants were read. As the judge was then, it
named 61 of them, accepted none, and misled one (it said of a store without a mask that the load had none).  It has
learnt from these.  Eight more, written when the mutants were known and unlike any of them, were judged once: none was
named, accepted or misled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """A wrong answer.

    name: the misunderstanding.  fn: what was handed in.  says: a regular expression that a message matches if it
    names this misunderstanding; a message that names one and does not match is untrue of this answer.
    """

    name: str
    fn: Callable[..., Any]
    says: str


NOT_NAMED = r"(?!)"
"""For an answer of which the judge says what is true and no more: it matches nothing."""
