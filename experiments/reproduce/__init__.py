"""The paper's small experiments again: `reproduce.py` is the command, a TOML file holds the settings of each table.

`parts/` has what it is made of: `tables` reads the settings, `tasks` draws the examples, `model` and `optimiser` train
many runs at once, `job` is one cell of a table, `store` its file, `estimate` its time, `draw` the figures.
"""
