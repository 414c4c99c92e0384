"""What a class would answer: the judge names seven in ten, says nothing untrue, and accepts what is right alone."""

from __future__ import annotations

import importlib
import re

import pytest
from class_answers import NOT_NAMED
from class_answers.right import RIGHT

from dn_lib.teaching import all_exercises, evaluate

SECONDS = 3  # enough for every answer here but the endless ones, which take them
NAMED = 0.7
NAMED_OF_HELD_OUT = 0.5  # for which nothing was added
NAMED_OF_FRESH = 0.75  # 33 of 44, as measured when they were judged for the first time
FILES = ("ch1", "ch2", "ch3", "ch4", "ch6")


def answers_of(file):
    return importlib.import_module(f"class_answers.{file}").ANSWERS


LISTED = {number: answers for file in FILES for number, answers in answers_of(file).items()}
SECOND, HELD_OUT = answers_of("second"), answers_of("held_out")
FRESH = {n: importlib.import_module(f"class_answers.fresh_ch{n}") for n in (1, 2, 3, 4)}


def judged(number, answers):
    """Of `answers`: how many are named, what is said of them that is untrue, and the statuses."""
    named, untrue, statuses = 0, [], set()
    for answer in answers:
        verdict = evaluate(number, answer.fn, seconds=SECONDS)
        # Names of inputs, as in ", on q [7, 3], alpha [7].", name no misunderstanding.
        says = bool(re.search(answer.says, re.sub(r", on \w+ (\[|=).*", "", verdict.message)))
        named += says
        statuses.add(verdict.status)
        if verdict.status in ("right", "not attempted") or (
            verdict.status in ("misunderstanding", "method") and not says
        ):
            untrue.append((answer.name, verdict.message))
    return named, untrue, statuses


@pytest.mark.parametrize("number", LISTED)
def test_answers_of_a_class_are_named_and_none_is_misled(number):
    named, untrue, statuses = judged(number, LISTED[number])
    assert not untrue
    assert named >= NAMED * len(LISTED[number])
    # A rule that nothing breaks would be one that cannot fail.
    assert ("method" in statuses) == bool(all_exercises()[number].rules)


@pytest.mark.parametrize(("listed", "share"), [(SECOND, NAMED), (HELD_OUT, NAMED_OF_HELD_OUT)])
def test_nothing_untrue_is_said_of_further_answers(listed, share):
    verdicts = [judged(number, answers) for number, answers in listed.items()]
    assert [untrue for _, untrue, _ in verdicts if untrue] == []
    assert sum(named for named, *_ in verdicts) >= share * sum(map(len, listed.values()))


@pytest.mark.parametrize("chapter", FRESH)
def test_fresh_answers_are_neither_accepted_nor_misled(chapter):
    for number, answers in FRESH[chapter].ANSWERS.items():
        named, untrue, _ = judged(number, answers)
        assert not untrue
        assert named == sum(answer.says != NOT_NAMED for answer in answers), number


def test_three_in_four_of_fresh_answers_are_named_that_nothing_was_added_for():
    numbers = [(number, answers) for chapter in FRESH.values() for number, answers in chapter.HELD_OUT.items()]
    verdicts = [judged(number, answers) for number, answers in numbers]
    assert [untrue for _, untrue, _ in verdicts if untrue] == []
    assert sum(named for named, *_ in verdicts) >= NAMED_OF_FRESH * sum(len(answers) for _, answers in numbers)


@pytest.mark.parametrize("number", RIGHT)
def test_right_answers_by_other_ways_are_accepted(number):
    for fn in RIGHT[number]:
        verdict = evaluate(number, fn, seconds=SECONDS)
        assert verdict.status == "right", verdict.message


def test_every_exercise_without_a_kernel_has_eight_answers():
    """But those of the studies, which are for readers alone: of them mutants are asked, and no class."""
    numbers = {number for number in all_exercises() if not number.startswith(("5.", "S"))}
    assert set(LISTED) == numbers
    assert all(len({answer.name for answer in answers}) == len(answers) >= 8 for answers in LISTED.values())
