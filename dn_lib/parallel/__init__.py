"""One sequence on several processes.

`affine`: the delta rule by one exchange of affine maps, as chapter 4 derives it.  `stretches`: how a sequence lies on
the processes, what they fetch from each other, and how many bytes that is.  `rules`: the exchange for linear attention,
decays and delta rules, by the public operators.  `traffic`: the same bytes as formulas, and those of ring attention.
`simulated`: counting them for groups of processes that are not there.
A whole model on a shared sequence is in `dn_lib.models.context_parallel`.
"""
