"""The operator against fla, softmax attention, the recurrence and PyTorch, on one GPU in one process.

    python benchmarks/operator.py --out book/results/operator.json

See `side_by_side.py`, which does the work, and README.md beside it for the options.
"""

import os
import sys

if __name__ == "operator":
    # Python puts a script's own folder first on its path, so a script here that needs the standard library's
    # `operator` (almost all of them do) is led to this file.  Hand it the real one.
    _here, _path = os.path.dirname(os.path.realpath(__file__)), sys.path[:]
    sys.path[:] = [folder for folder in _path if os.path.realpath(folder) != _here]
    del sys.modules["operator"]
    import operator  # noqa: F401

    sys.path[:] = _path
elif __name__ == "__main__":
    from side_by_side import main

    sys.exit(main())
