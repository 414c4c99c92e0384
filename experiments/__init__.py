"""Everything in the book that was measured.  `python -m experiments --list` says what there is; see README.md."""
