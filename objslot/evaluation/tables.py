"""Results as tables, in percent with one decimal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_MEASURES = {"J": "J", "F": "F", "JF": "J&F"}
_STATISTICS = ("J", "J_recall", "J_decay", "F", "F_recall", "F_decay")
_REGIONS = ("FG-ARI", "FG-ARI_video", "mBO", "mBO_video")


def table_rows(results: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the main table: one row a sequence, then the mean, then the mean of every baseline.

    Args:
        results: from `evaluate_dataset`.
    """
    protocols = list(results["protocols"])
    header = ["sequence", *(f"{protocol} {name}" for protocol in protocols for name in _MEASURES.values())]

    def row(name: str, scores: dict) -> list[str]:
        return [
            name,
            *(percent(scores[protocol][measure]) for protocol in protocols for measure in _MEASURES),
        ]

    rows = [row(name, scores) for name, scores in results["sequences"].items()]
    rows.append(row("mean", results["protocols"]))
    rows += [row(f"baseline: {name}", scores) for name, scores in results["baselines"].items()]
    return header, rows


def statistics_rows(results: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of mean, recall and decay of J and F: one row a method and protocol."""
    rows = [
        [f"{method}, {protocol}", *(percent(scores[name]) for name in _STATISTICS)]
        for method, judged in _methods(results).items()
        for protocol, scores in judged["protocols"].items()
    ]
    return ["method, protocol", *(name.replace("_", " ") for name in _STATISTICS)], rows


def region_rows(results: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of FG-ARI and mBO, per frame and per video: one row a method."""
    rows = [
        [method, *(percent(judged["regions"][name]) for name in _REGIONS)]
        for method, judged in _methods(results).items()
    ]
    return ["method", *(f"{name.removesuffix('_video')} per {_unit(name)}" for name in _REGIONS)], rows


def _methods(results: dict) -> dict[str, dict]:
    return {"this run": results} | {f"baseline: {name}": scores for name, scores in results["baselines"].items()}


def _unit(name: str) -> str:
    return "video" if name.endswith("_video") else "frame"


def percent(value: float | None) -> str:
    """A fraction in percent with one decimal; a dash for None."""
    return "-" if value is None else f"{100 * value:z.1f}"


def markdown_table(results: dict) -> str:
    """The main table in Markdown, the mean in bold, then the tables of statistics and of regions."""
    header, rows = table_rows(results)
    rows = [[f"**{cell}**" for cell in row] if row[0] == "mean" else row for row in rows]
    return "\n".join(_markdown(*table) for table in ((header, rows), statistics_rows(results), region_rows(results)))


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def plain_table(results: dict) -> str:
    """The same tables as aligned text, for logs."""
    return "\n".join(_plain(*table(results)) for table in (table_rows, statistics_rows, region_rows))


def _plain(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines) + "\n"


def rich_tables(results: dict) -> list[Table]:
    """The same tables for a terminal."""
    from rich.table import Table

    tables = []
    for header, rows in (table_rows(results), statistics_rows(results), region_rows(results)):
        table = Table(title=None if tables else results["dataset"] or None)
        table.add_column(header[0])
        for name in header[1:]:
            table.add_column(name, justify="right")
        names = [row[0] for row in rows]
        for row in rows:
            last = "mean" in names and names.index("mean") - 1 == len(table.rows)
            table.add_row(*row, style="bold" if row[0] == "mean" else None, end_section=last)
        tables.append(table)
    return tables
