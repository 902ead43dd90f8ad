"""Evaluation of a method on a data set, one sequence in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from objslot.data.segmentation import VideoSegmentation
from objslot.data.sequences import Sequence
from objslot.errors import UserError
from objslot.evaluation.predictions import read_predictions
from objslot.evaluation.protocols import check_protocols, evaluate_sequence, mean_scores
from objslot.evaluation.workers import usable_cores

Segmenter = Callable[[Sequence], VideoSegmentation]


def evaluate_dataset(
    segment: Segmenter | str | Path,
    sequences: Iterable[Sequence],
    protocols: Iterable[str] = ("A", "B", "C"),
    *,
    dataset: str = "",
    baselines: Mapping[str, Segmenter] | None = None,
    merge_objects: bool | None = None,
    workers: int | None = None,
    settings: Mapping | None = None,
    progress: Callable[[Sequence, dict], None] | None = None,
) -> dict:
    """Judge a method, and baselines beside it, on annotated sequences.

    Args:
        segment: segments one sequence, or a folder of predictions (see `read_predictions`).
        sequences: from `objslot.data.sequences.open_sequences`.
        protocols: names from `objslot.evaluation.PROTOCOLS`.
        dataset: the data set's name, for the result.
        baselines: other methods by name, judged the same way.
        merge_objects: judge all objects as one; default: every data set's convention.
        workers: processes that measure frames side by side; as many as there are cores by default.
        settings: what to write down beside the figures.
        progress: called after every sequence with the sequence and its result.

    Returns:
        A JSON-ready dictionary, every figure a fraction. ``dataset``; ``protocols``: per protocol the means
        over all objects of all sequences; ``sequences``: per sequence what `evaluate_sequence` returns;
        ``regions``: means of FG-ARI and mBO over the sequences; ``baselines``: per baseline its
        ``protocols``, ``regions`` and ``sequences`` likewise, the protocols also directly under its name;
        ``settings``.

    Raises:
        UserError: whatever `evaluate_sequence` or `read_predictions` raises; no sequence; a folder of
            predictions that lacks a sequence, before any is judged.
    """
    protocols = check_protocols(protocols)
    sequences = list(sequences)
    if not sequences:
        raise UserError("sequences is empty; expected at least one annotated sequence")
    methods: dict[str | None, Segmenter] = {
        None: segment if callable(segment) else prediction_reader(segment, sequences)
    }
    methods |= dict(baselines or {})
    judged: dict[str | None, dict[str, dict]] = {name: {} for name in methods}
    workers = usable_cores() if workers is None else workers
    for sequence in sequences:
        for name, method in methods.items():
            judged[name][sequence.name] = evaluate_sequence(
                method(sequence), sequence, protocols, merge_objects, workers=workers
            )
        if progress is not None:
            progress(sequence, judged[None][sequence.name])
    own = _averages(judged.pop(None), protocols)
    beside = {name: _averages(results, protocols) for name, results in judged.items()}
    return {
        "dataset": dataset,
        **own,
        "baselines": {name: averages["protocols"] | averages for name, averages in beside.items()},
        "settings": {"protocols": list(protocols), **(settings or {})},
    }


def prediction_reader(directory: str | Path, sequences: list[Sequence]) -> Segmenter:
    """A segmenter that reads a folder of predictions; `UserError` if that lacks one of ``sequences``."""
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise UserError(f"{directory}: no such folder of predictions")
    missing = [sequence.name for sequence in sequences if not (directory / sequence.name).is_dir()]
    if missing:
        raise UserError(
            f"{directory}: no predictions for the sequence {missing[0]} "
            f"({len(missing)} of {len(sequences)} sequences are missing)"
        )
    return lambda sequence: read_predictions(directory, sequence.name, sequence)


def _averages(results: dict[str, dict], protocols: tuple[str, ...]) -> dict:
    means = {
        protocol: mean_scores([entry for result in results.values() for entry in result[protocol]["objects"]])
        for protocol in protocols
    }
    regions = {}
    for score in next(iter(results.values()))["regions"]:
        values = [
            result["regions"][score] for result in results.values() if result["regions"][score] is not None
        ]
        regions[score] = float(np.mean(values)) if values else None
    return {"protocols": means, "regions": regions, "sequences": results}
