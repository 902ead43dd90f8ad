"""From the scores of the runs to a table: mean and deviation over seeds, the paper's numbers, its findings."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from objslot.ablations.tables import Claim, Table, Variant, encoder_kind

# Per variant and data set: for each seed the score under each protocol.
Scores = Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]

TITLES = {"davis2016": "DAVIS-2016 J", "davis2017": "DAVIS-2017-U J&F"}


def summarise(
    table: Table,
    variants: Sequence[Variant],
    scores: Scores,
    baselines: Mapping[str, Mapping[str, Mapping[str, float]]],
    encoder: str,
) -> dict:
    """The table as plain values: title, header, rows of text, and what became of the paper's findings.

    Args:
        table: whose variants these are.
        variants: its rows.
        scores: fractions, by variant, data set and seed, under each protocol.
        baselines: fractions, by data set, baseline and protocol.
        encoder: its name decides which of the paper's numbers stand beside.
    """
    data_sets = list(baselines)
    protocols = list(next(iter(baselines[data_sets[0]].values())))
    header = [table.column]
    for dataset in data_sets:
        header += [f"{TITLES[dataset]}, {protocol}" for protocol in protocols]
        header.append(f"{TITLES[dataset]}, paper")
    kind, rows = encoder_kind(encoder), []
    for variant in variants:
        row = [variant.title]
        for dataset in data_sets:
            runs = scores[variant.name][dataset]
            row += [spread([run[protocol] for run in runs]) for protocol in protocols]
            published = variant.published.get(kind, {}).get(dataset)
            row.append("-" if published is None else f"{100 * published:.1f}")
        rows.append(row)
    for name, title in (("frozen", "frozen backbone"), ("null", "null: colour and position")):
        row = [title]
        for dataset in data_sets:
            row += [*(f"{100 * baselines[dataset][name][protocol]:.1f}" for protocol in protocols), "-"]
        rows.append(row)
    kept = {variant.name for variant in variants}
    claims = [claim for claim in table.claims if {claim.better, claim.worse} <= kept]
    return {
        "title": table.title,
        "header": header,
        "rows": rows,
        "findings": [_finding(claim, scores, data_sets, protocols) for claim in claims],
    }


def spread(values: Sequence[float]) -> str:
    """Fractions as their mean in percent, with the deviation between them where there are several."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def _finding(claim: Claim, scores: Scores, data_sets: Sequence[str], protocols: Sequence[str]) -> dict:
    measured = []
    for dataset in data_sets:
        better, worse = scores[claim.better][dataset], scores[claim.worse][dataset]
        for protocol in protocols:
            gains = [b[protocol] - w[protocol] for b, w in zip(better, worse, strict=True)]
            measured.append(
                {
                    "where": f"{TITLES[dataset]}, {protocol}",
                    "gain": f"{100 * statistics.mean(gains):+.1f}",
                    "verdict": verdict(gains, claim.margin),
                }
            )
    return {"text": claim.text, "measured": measured}


def verdict(gains: Sequence[float], margin: float) -> str:
    """Whether gains, one a seed, are above `margin`: with several seeds by more than the standard error of their mean.

    Returns "holds", "does not hold" or "undecided"; of one seed, whose spread nobody knows, "holds in this one run" or
    "does not hold in this one run".
    """
    above = statistics.mean(gains) - margin
    if len(gains) == 1:
        return ("holds" if above > 0 else "does not hold") + " in this one run"
    error = statistics.stdev(gains) / math.sqrt(len(gains))
    if above > error:
        return "holds"
    return "does not hold" if above < -error else "undecided"
