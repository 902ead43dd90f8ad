"""`objslot demo`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from objslot.commands._common import Command, option, say


@dataclasses.dataclass(kw_only=True)
class Demo(Command):
    """Make videos, train on them, and show what is found in others: no data, no download, a few minutes."""

    out: Annotated[Path, option("Where to write; a new folder.", "DIR")] = Path("objslot-demo")
    seed: Annotated[int, option("Of the videos and of the training.", "S")] = 0

    def run(self) -> int:
        from objslot.errors import UserError
        from objslot.viz.folders import refuse_existing

        if self.seed < 0:
            raise UserError(f"--seed must be at least 0, got {self.seed}")
        refuse_existing(self.out)
        from objslot.demo import DemoConfig, run_demo, summary

        results = run_demo(self.out, DemoConfig(seed=self.seed), say=say)
        say(summary(results))
        say(f"open {self.out / 'report.html'} and {self.out / 'sheet.png'}")
        return 0 if all(goal["reached"] for goal in results["goals"].values()) else 1
