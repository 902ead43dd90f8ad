"""What `evaluate` and `propagate` share: judging with a page for every sequence, and the tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from objslot.commands._common import progress, say


def judge(
    folder: Path,
    segment: Callable,
    sequences: list,
    protocols: tuple[str, ...],
    *,
    dataset: str,
    title: str,
    baselines: Mapping[str, Callable] | None = None,
    settings: Mapping | None = None,
) -> dict:
    """Judges a method and writes results.json, table.md, table.txt, report.html, sheet.png and sequences/.

    Args:
        folder: an existing folder.
        segment, sequences, protocols, dataset, baselines, settings: as for `evaluate_dataset`.
        title: what the progress is called.

    Returns:
        What results.json holds.
    """
    from objslot.evaluation import evaluate_dataset, markdown_table, plain_table
    from objslot.viz.evaluation_report import EvaluationReport

    report, kept, done = EvaluationReport(folder), {}, []

    def segment_and_keep(sequence):
        kept[sequence.name] = segment(sequence)
        return kept[sequence.name]

    with progress(title, "sequences") as update:

        def judged(sequence, result):
            report.add(sequence, kept.pop(sequence.name), result)
            done.append(sequence.name)
            update(len(done), len(sequences))

        results = evaluate_dataset(
            segment_and_keep,
            sequences,
            protocols,
            dataset=dataset,
            baselines=baselines,
            settings=settings,
            progress=judged,
        )
    report.write(results)
    (folder / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    (folder / "table.md").write_text(markdown_table(results))
    (folder / "table.txt").write_text(plain_table(results))
    return results


def print_tables(results: dict) -> None:
    """The tables of a result, in colour where someone looks."""
    from objslot.evaluation import plain_table, rich_tables

    if sys.stdout.isatty():
        from rich.console import Console

        for table in rich_tables(results):
            Console().print(table)
    else:
        say(plain_table(results).rstrip())
