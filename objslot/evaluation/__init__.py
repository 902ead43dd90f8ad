"""Judging segmentations: measures, protocols, predictions from folders, tables."""

from objslot.evaluation.dataset import evaluate_dataset
from objslot.evaluation.measures import boundary_f, jaccard
from objslot.evaluation.predictions import read_predictions
from objslot.evaluation.protocols import PROTOCOLS, evaluate_sequence
from objslot.evaluation.tables import markdown_table, plain_table, rich_tables

__all__ = [
    "PROTOCOLS",
    "boundary_f",
    "evaluate_dataset",
    "evaluate_sequence",
    "jaccard",
    "markdown_table",
    "plain_table",
    "read_predictions",
    "rich_tables",
]
