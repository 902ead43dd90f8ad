"""Results as JSON lines, and going on with a run that was left off."""

import json
from pathlib import Path

from objslot.errors import UserError

# What may differ between the parts of one run.
_DATE = "date"


class ResultsFile:
    """Records of one run, appended job by job; each job's are written together, so a file holds whole jobs.

    Args:
        path: created with its folder; a file that is there is gone on with.
        provenance: from `machine.provenance`; written into every record.

    Raises `UserError` when the file holds something else, or records of another machine, version or commit.
    """

    def __init__(self, path: Path, provenance: dict):
        self.path, self.provenance = Path(path), provenance
        self.done: set[str] = set()
        if self.path.exists():
            for record in read(self.path):
                for name, value in provenance.items():
                    if name != _DATE and record.get(name) != value:
                        found = record.get(name)
                        raise UserError(
                            f"--out: {self.path} holds results of another {name} ({found}); name another file"
                        )
                self.done.add(record["job"])
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, job: str, records: list[dict]) -> None:
        text = "".join(
            json.dumps({"job": job, **record, **self.provenance}, separators=(",", ":")) + "\n" for record in records
        )
        with self.path.open("a") as file:
            file.write(text)
        self.done.add(job)


def read(path: Path) -> list[dict]:
    """The records of a file. Raises `UserError` where it is not JSON lines of records."""
    records = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            record["job"], record["kind"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: line {number} is no record of a benchmark") from None
        records.append(record)
    return records
