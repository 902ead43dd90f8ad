"""Makes the README's section on speed, docs/benchmarks.md and the pictures from benchmarks/results/*.jsonl.

    python -m benchmarks.report            # writes them
    python -m benchmarks.report --check    # fails where they differ from the results
"""

import argparse
import sys
from pathlib import Path

from benchmarks import plots
from benchmarks.digest import Digest
from objslot.benchmarks.results import read

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmarks: made by python -m benchmarks.report -->", "<!-- end of benchmarks -->"
NONE = "No results yet."


def produce(root: Path) -> dict[Path, str]:
    """The text of every file that shows results, from the results under `root`."""
    paths = sorted((root / "benchmarks" / "results").glob("*.jsonl"), key=lambda path: path.stem)
    digests = [Digest(read(path), path.stem) for path in paths]
    readme = (root / "README.md").read_text(encoding="utf-8")
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"README.md: the lines {BEGIN!r} and {END!r} are missing")
    sections = [digest.summary() if place else digest.section() for place, digest in enumerate(digests)]
    section = "\n\n".join(sections) or NONE
    everything = "\n\n".join(digest.everything() for digest in digests) or NONE
    files = {
        root / "README.md": f"{before}{BEGIN}\n\n{section}\n\n{END}{after}",
        root / "docs" / "benchmarks.md": f"# Benchmarks\n\n{everything}\n",
    }
    for digest in digests:
        for theme in plots.THEMES:
            files[root / "docs" / f"benchmarks-{digest.name}-{theme}.svg"] = plots.bars(digest.bars(), theme)
    return files


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    stale = [path for path, text in produce(ROOT).items() if not path.exists() or path.read_text("utf-8") != text]
    if arguments.check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} differs from the results")
        return 1 if stale else 0
    for path, text in produce(ROOT).items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
