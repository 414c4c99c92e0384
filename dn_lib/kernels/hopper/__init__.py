"""The delta rule's kernels for Hopper, in Gluon: heads of 128 in bfloat16.  README.md in this folder tells their story.

`launch` says what they take and launches them; it is safe to import anywhere.  The kernels themselves (`scan`,
`backward`) import `triton.experimental.gluon`, which has no interpreter, and so are imported by the first launch.
"""
