"""`python -m experiments`: see `experiments.harness.cli`."""

from experiments.harness.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
