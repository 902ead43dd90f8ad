"""A run: its jobs one after the other, printed and written as they end."""

import itertools
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from objslot.benchmarks import machine, runner, table
from objslot.benchmarks.results import ResultsFile
from objslot.benchmarks.suite import Job

# Of a job that is started within the time, the longest that it may be expected to take, in seconds.
LONGEST_JOB = 30.0


@dataclass
class Outcome:
    """`wrong`: whether objslot's result was off, or a job failed; `left`: jobs that were not started."""

    wrong: bool = False
    left: int = 0


def run(
    jobs: Sequence[Job],
    device: torch.device,
    *,
    out: Path | None = None,
    within: float | None = None,
    say: Callable[[str], None] = lambda text: print(text, flush=True),
) -> Outcome:
    """Runs the jobs that `out` does not hold yet.

    Args:
        out: a file of JSON lines, see `ResultsFile`.
        within: no job is started that may outlast so many seconds; the times of its kind so far tell.
        say: takes the lines for people.

    Raises `UserError` for a file that will not do.
    """
    start = time.monotonic()
    # Compiled code of other shapes must not make a peer fall back to eager mode unseen.
    torch._dynamo.config.recompile_limit = 64
    provenance = machine.provenance(device)
    file = ResultsFile(out, provenance) if out is not None else None
    outcome, longest = Outcome(), {}
    for job in jobs:
        if file is not None and job.name in file.done:
            continue
        began = time.monotonic()
        kind = job.name.split()[0]
        if within is not None and began - start + longest.get(kind, LONGEST_JOB) > within:
            outcome.left += 1
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                records = list(job.run())
        except Exception as failure:
            traceback.print_exc()
            say(f"{job.name}: failed, {type(failure).__name__}")
            outcome.wrong = True
            continue
        longest[kind] = max(longest.get(kind, 0.0), time.monotonic() - began)
        own = [record for record in records if record["kind"] == "time" and record["name"] == runner.OURS]
        outcome.wrong |= any(record["status"] in (runner.WRONG, runner.FAILED) for record in own)
        for _, group in itertools.groupby(records, lambda record: (record["kind"], record["mode"])):
            say("\n".join(table.lines(list(group))))
        if file is not None:
            file.write(job.name, records)
    return outcome
