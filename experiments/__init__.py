"""Everything in the book that was measured.  `python -m experiments --list` says what there is; see README.md."""

import dn_lib  # noqa: F401  (first: without a GPU it chooses Triton's interpreter, before anything imports Triton)
