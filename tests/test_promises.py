"""Every test that docs/promises.md names exists, and it names one for every promise."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "promises.md"
ROWS = [
    line for line in DOCUMENT.read_text().splitlines() if line.startswith("| ") and not line.startswith("| promise")
]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2:50])
def test_the_tests_of_a_promise_exist(row):
    promise, tests = (cell.strip() for cell in row.strip("|").rsplit("|", 1))
    named = NAMED.findall(tests)
    assert promise and named, "no test is named"
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text())
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{path} has no {name}"


def test_the_document_is_found_from_the_readme():
    assert len(ROWS) > 25
    assert "docs/promises.md" in (ROOT / "README.md").read_text()
