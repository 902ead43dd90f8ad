"""The report of all tables and figures made so far: one page, and Markdown."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from objslot.ablations.tables import TABLES
from objslot.models.files import write_whole
from objslot.viz.report import write_page

TITLE = "Ablations"
PROTOCOLS = (
    "A: label-free, what the method itself calls foreground. "
    "B: official DAVIS unsupervised, at most 20 tracks and one assignment a video. "
    "C: oracle, the best choice of regions in every frame, made with the annotation. "
    "The paper's numbers stand for training on YouTube-VOS and an oracle selection: compare them with C, and only "
    "their order. Numbers are percent; with several seeds, mean ± standard deviation."
)


def keep(folder: Path, name: str, content: dict) -> None:
    """Put what a table or the figures hold into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_whole(folder / f"{name}.json", lambda path: path.write_text(text, encoding="utf-8"))


def write(out: Path) -> Path:
    """Write report.md, a Markdown file beside every table, and report.html; returns the page."""
    tables = [held for name in TABLES if (held := _held(out / "tables" / f"{name}.json"))]
    figures = _held(out / "figures" / "figures.json")
    texts = {name: markdown(held) for name in TABLES if (held := _held(out / "tables" / f"{name}.json"))}
    for name, text in texts.items():
        (out / "tables" / f"{name}.md").write_text(text, encoding="utf-8")
    whole = "\n".join([f"# {TITLE}\n", f"{PROTOCOLS}\n", *texts.values(), *_figure_lines(figures)])
    (out / "report.md").write_text(whole, encoding="utf-8")
    page = {
        "title": TITLE,
        "protocols": PROTOCOLS,
        "tables": tables,
        "figures": [
            {
                "title": figure["title"],
                "caption": figure["caption"],
                "source": figure.get("picture") or _svg_uri(figure["svg"]),
            }
            for figure in (figures or {}).get("figures", [])
        ],
        "figure_settings": (figures or {}).get("settings"),
    }
    write_page(out / "report.html", "ablations.html", page)
    return out / "report.html"


def markdown(table: dict) -> str:
    """A table, its findings and its settings as Markdown."""
    lines = [f"## {table['title']}", "", _line(table["header"]), _line(["---", *["---:"] * (len(table["header"]) - 1)])]
    lines += [_line(row) for row in table["rows"]]
    lines += ["", "The paper's findings here:", ""]
    for finding in table["findings"]:
        measured = "; ".join(f"{m['where']} {m['gain']}, {m['verdict']}" for m in finding["measured"])
        lines.append(f"* {finding['text']}: {measured}.")
    return "\n".join([*lines, "", _settings(table["settings"]), ""])


def _figure_lines(figures: dict | None) -> list[str]:
    if figures is None:
        return []
    lines = ["## Figures", ""]
    for number, figure in enumerate(figures["figures"], start=1):
        file = f"figures/figure-{number}.{'svg' if 'svg' in figure else 'png'}"
        lines += [f"![{figure['title']}]({file})", "", f"{figure['title']}. {figure['caption']}", ""]
    return [*lines, _settings(figures["settings"]), ""]


def _settings(settings: dict) -> str:
    return "Settings: " + "; ".join(f"{name} {value}" for name, value in settings.items()) + "."


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _held(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _svg_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii")
