"""`objslot ablate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from objslot.commands._common import option, say
from objslot.commands._training import TrainingCommand
from objslot.errors import UserError


@dataclasses.dataclass(kw_only=True)
class Ablate(TrainingCommand):
    """Train and judge the variants of one of the paper's tables, or draw its figures. Run it again to go on."""

    what: Annotated[
        tyro.conf.Positional[Literal["marginals", "instances", "sampling", "figures"]],
        option("Tables 1, 2 and 3, or figures 1 to 5.", "marginals|instances|sampling|figures"),
    ]
    root: Annotated[Path, option("DAVIS-2016, DAVIS-2017, or a folder that holds them.", "DIR")]
    out: Annotated[Path, option("Gets the runs and report.html; tables in one folder share runs and report.", "DIR")]
    data: Annotated[Path | None, option("Videos to train on.", "DATA", "those of --root, without labels")] = None
    seeds: Annotated[str, option("A run each; figures show the first.", "0,1,2")] = "0,1,2"

    def run(self) -> None:
        seeds = _numbers(self.seeds)
        from objslot.ablations import run_ablation

        report = run_ablation(self.what, self.root, self.out, self.configuration(), seeds, data=self.data, say=say)
        table = self.out / "tables" / f"{self.what}.md"
        if table.exists():
            say(table.read_text(encoding="utf-8").rstrip())
        say(f"report -> {report}")


def _numbers(text: str) -> list[int]:
    """ "0,1,2" -> [0, 1, 2]."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() for word in words):
        raise UserError(f"--seeds: got {text!r}, expected whole numbers such as 0,1,2")
    return [int(word) for word in words]
