"""Runs the suite, or some of it, from a checkout.

python -m benchmarks sinkhorn --shapes 48x256x256x3,8x196x196x3 --peers compiled --threads 2 --seconds 1
"""

import argparse
import itertools
import sys

import torch

from objslot.benchmarks import registry, runner, table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def main() -> int:
    arguments = _arguments()
    device = torch.device(arguments.device)
    failed = False
    for operation in registry.find(arguments.operations):
        shapes = arguments.shapes or operation.shapes
        for sizes, dtype, threads in itertools.product(shapes, arguments.dtypes, arguments.threads):
            records = runner.run(
                operation,
                sizes,
                device=device,
                dtype=DTYPES[dtype],
                threads=threads,
                budget=arguments.budget,
                wanted=lambda name: not arguments.peers or any(part in name for part in arguments.peers),
                modes=arguments.modes,
            )
            for _, group in itertools.groupby(records, lambda record: record["mode"]):
                group = list(group)
                failed |= group[0]["status"] == runner.WRONG
                print("\n".join(table.lines(group)), flush=True)
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("operations", nargs="*", metavar="OP", help=f"of {', '.join(registry.OPERATIONS)}")
    parser.add_argument("--shapes", type=_shapes, help="instead of the registered ones: 48x256x256x3,...")
    parser.add_argument("--peers", type=_words, help="only those whose name contains one of these words")
    parser.add_argument("--modes", type=_words, default=list(runner.MODES))
    parser.add_argument("--dtypes", type=_words, default=["float32"])
    parser.add_argument("--threads", type=lambda text: [int(word) for word in text.split(",")])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--budget", type=float, default=1.5, help="seconds of rounds for each mode")
    arguments = parser.parse_args()
    arguments.threads = arguments.threads or [torch.get_num_threads()]
    return arguments


def _words(text: str) -> list[str]:
    return text.split(",")


def _shapes(text: str) -> list[tuple[int, ...]]:
    return [tuple(int(word) for word in shape.split("x")) for shape in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
