"""A short table of result files: python -m benchmarks.short FILE.jsonl..."""

import sys
from pathlib import Path

from benchmarks.digest import Digest
from objslot.benchmarks.results import read

if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        if records := read(path):
            print(Digest(records, path.stem).short())
