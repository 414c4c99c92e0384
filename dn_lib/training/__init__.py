"""Training: a readable loop with exact resume, evaluation in bits per byte, several processes."""

from dn_lib.training.checkpoint import Checkpoint, CheckpointError, latest, read
from dn_lib.training.config import TrainConfig
from dn_lib.training.distributed import resolve_device
from dn_lib.training.evaluate import (
    bits_per_byte,
    document_windows,
    evaluate,
    loss_at_names,
    loss_by_position,
    name_occurrences,
    parses,
    token_losses,
    windows,
)
from dn_lib.training.loop import History, TrainingError, steps_within, train
from dn_lib.training.optimiser import learning_rate_at, make_optimiser
from dn_lib.training.probes import assignments, loss_at_unseen_names, recall_of_assignments, words_of

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "History",
    "TrainConfig",
    "TrainingError",
    "assignments",
    "bits_per_byte",
    "document_windows",
    "evaluate",
    "latest",
    "learning_rate_at",
    "loss_at_names",
    "loss_at_unseen_names",
    "loss_by_position",
    "make_optimiser",
    "name_occurrences",
    "parses",
    "read",
    "recall_of_assignments",
    "resolve_device",
    "steps_within",
    "token_losses",
    "train",
    "windows",
    "words_of",
]
