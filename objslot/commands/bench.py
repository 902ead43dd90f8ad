"""`objslot bench`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from objslot.commands._common import Command, option, say
from objslot.errors import UserError


@dataclasses.dataclass
class Bench(Command):
    """Time the ops and modules on this machine, each checked first, beside what you would use instead.

    Peers that are not installed are named; `pip install 'objslot[bench]'` brings them.
    """

    operations: Annotated[
        tyro.conf.Positional[tuple[str, ...]], option("Ops and modules; all of them when none is named.", "OP")
    ] = ()
    device: Annotated[Literal["cpu", "cuda"], option("Where to run.")] = "cpu"
    quick: Annotated[
        bool, option("Two minutes: fewer shapes, float32, nothing that torch.compile has to build first.")
    ] = False
    threads: Annotated[int | None, option("Threads on the CPU.", "N", "all, then one; with --quick all")] = None
    out: Annotated[Path | None, option("Write JSON lines; goes on with a run that is there.", "FILE.jsonl")] = None

    def run(self) -> int:
        if self.threads is not None and self.threads < 1:
            raise UserError(f"--threads must be at least 1, got {self.threads}")
        import torch

        from objslot.benchmarks import registry, session, suite

        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch sees no GPU here")
        names = [name for name in self.operations if name != suite.TRAINING_STEP]
        device = torch.device(self.device)
        threads = [self.threads] if self.threads else suite.default_threads(device)
        plan = suite.Plan(device=device, threads=threads[:1] if self.quick else threads, quick=self.quick)
        operations = registry.find(names) if names or not self.operations else []
        training = suite.TRAINING_STEP in self.operations or not (self.operations or self.quick)
        jobs = suite.jobs(operations, plan, training=training)
        if self.quick:
            say("quick: compiled peers, other dtypes, memory, scaling and the training step are left out")
        outcome = session.run(jobs, device, out=self.out, say=say)
        return 1 if outcome.wrong else 0
