"""A class that works through the book: `build` makes an nbgrader course of it, `grade` judges what was handed in.

An answer runs in a room, a process that may read Python and little else, under the limits of `check` on time and
memory.  Its verdict is computed elsewhere, from numbers that it has sent.
"""
