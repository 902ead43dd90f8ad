"""`objslot info`."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

from objslot.commands._common import Command, option, say


@dataclasses.dataclass
class Info(Command):
    """Show versions, devices and the backend that serves each op, and why."""

    check: Annotated[
        bool, option("Check and time every backend; GPU kernels that are right and faster serve from then on.")
    ] = False
    json: Annotated[bool, option("Print JSON.")] = False

    def run(self) -> int:
        from objslot.info import as_text, collect

        information = collect(check=self.check)
        say(json.dumps(information, indent=2) if self.json else as_text(information))
        return 0 if all(result["passed"] for result in information.get("checks", ())) else 1
