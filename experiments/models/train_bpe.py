"""The window hybrid of chapter 6 on tokens of several bytes: a byte-pair encoding of 32,768, and what it writes.

    python -m dn_lib prepare-data wheels --vocab 32768 --archive wheels-bpe.tar.xz
    python -m experiments train_bpe --corpus wheels-bpe.tar.xz

It is `train_hybrid` with another corpus and half as many tokens in a step, for the head over so many tokens is most of
the memory. Bits per byte compare with those of a model of bytes; the number of steps does not, since a token holds
several bytes. Names are not looked for: their bytes are spread over tokens.
"""

from __future__ import annotations

import argparse

from experiments.harness.cli import Experiment
from experiments.models import train_hybrid


def options(parser: argparse.ArgumentParser) -> None:
    train_hybrid.options(parser)
    parser.set_defaults(corpus="wheels-bpe.tar.xz", kind="hybrid", steps=1264, batch=32, accumulate=2)


def run(options: argparse.Namespace) -> int:
    return train_hybrid.run(options)


EXPERIMENT = Experiment(
    question="What does the hybrid learn, and write, when a token is several bytes?",
    writes=("bpe_training.json",),
    minutes=3,
    gpu="H200, on `python -m dn_lib prepare-data wheels --vocab 32768`",
    run=run,
    options=options,
    shared=("seed",),
    measured=False,
    dry=("sizes",),
)
