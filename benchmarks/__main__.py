"""Runs the suite, or some of it, from a checkout.

    python -m benchmarks --out benchmarks/results/cpu.jsonl --within 220

runs the whole suite; it ends before the given seconds are over and exits with 3 while jobs remain: give the same
command again until it exits with 0. And while working on an op:

    python -m benchmarks sinkhorn --shapes 48x256x256x3,8x196x196x3 --peers compiled --threads 2 --budget 1
"""

import argparse
import sys
from pathlib import Path

import torch

from objslot.benchmarks import registry, runner, session, suite
from objslot.errors import UserError

UNFINISHED = 3


def main() -> int:
    arguments = _arguments()
    device = torch.device(arguments.device)
    names = [name for name in arguments.operations if name != suite.TRAINING_STEP]
    plan = suite.Plan(
        device=device,
        threads=arguments.threads or suite.default_threads(device),
        shapes=arguments.shapes,
        dtypes=arguments.dtypes,
        modes=arguments.modes,
        peers=arguments.peers,
        budget=arguments.budget,
    )
    try:
        operations = registry.find(names) if names or not arguments.operations else []
        jobs = suite.jobs(operations, plan, training=suite.TRAINING_STEP in arguments.operations or not names)
        outcome = session.run(jobs, device, out=arguments.out, within=arguments.within)
    except UserError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    if outcome.left:
        print(f"{outcome.left} of {len(jobs)} jobs remain", flush=True)
        return UNFINISHED
    return 1 if outcome.wrong else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*registry.OPERATIONS, suite.TRAINING_STEP]
    parser.add_argument("operations", nargs="*", metavar="OP", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--shapes", type=_shapes, help="instead of the registered ones: 48x256x256x3,...")
    parser.add_argument("--peers", type=_words, help="only those whose name contains one of these words")
    parser.add_argument("--modes", type=_words, default=list(runner.MODES))
    parser.add_argument("--dtypes", type=_words)
    parser.add_argument("--threads", type=lambda text: [int(word) for word in text.split(",")])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--budget", type=float, help="seconds of rounds for each mode of a shape")
    parser.add_argument("--out", type=Path, help="a file of JSON lines, gone on with where it exists")
    parser.add_argument("--within", type=float, help="seconds after which no job is started")
    return parser.parse_args()


def _words(text: str) -> list[str]:
    return text.split(",")


def _shapes(text: str) -> list[tuple[int, ...]]:
    return [tuple(int(word) for word in shape.split("x")) for shape in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
