"""What experiments share.

`problems` has the inputs and the forms of the operator, `clock` the times, `errors` the distances from float64, `peers`
flash-linear-attention, `processes` work on all cores, `launches` the kernels that a call launches, `provenance` where
a result came from, `results` the files, and `cli` the command line.
"""
