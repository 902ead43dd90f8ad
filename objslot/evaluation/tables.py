"""Results as tables, in percent with one decimal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_MEASURES = {"J": "J", "F": "F", "JF": "J&F"}


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


def percent(value: float | None) -> str:
    """A fraction in percent with one decimal; a dash for None."""
    return "-" if value is None else f"{100 * value:.1f}"


def markdown_table(results: dict) -> str:
    """The main table in Markdown, the mean in bold."""
    header, rows = table_rows(results)
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    lines += [[f"**{cell}**" for cell in row] if row[0] == "mean" else row for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def plain_table(results: dict) -> str:
    """The main table as aligned text, for logs."""
    header, rows = table_rows(results)
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines) + "\n"


def rich_table(results: dict) -> Table:
    """The main table for a terminal."""
    from rich.table import Table

    header, rows = table_rows(results)
    table = Table(title=results["dataset"] or None)
    table.add_column(header[0])
    for name in header[1:]:
        table.add_column(name, justify="right")
    for i, row in enumerate(rows):
        table.add_row(
            *row, style="bold" if row[0] == "mean" else None, end_section=i == len(results["sequences"]) - 1
        )
    return table
