"""What the README shows must run, and what it names must exist."""

import re
import shlex
from pathlib import Path

import pytest
import tyro

from objslot.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = {
    f"{path.name}-{number}": code
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.S))
}
# What an example compares with, and the tests do without.
PEERS = ("ot", "slot_attention")
EXAMPLES = re.findall(r"^    (objslot .*)$", README, re.M)


@pytest.mark.parametrize("name", PYTHON)
def test_python_examples_run(name):
    for peer in PEERS:
        if re.search(rf"^(import|from) {peer}\b", PYTHON[name], re.M):
            pytest.importorskip(peer)
    exec(compile(PYTHON[name], name, "exec"), {})


@pytest.mark.parametrize("line", EXAMPLES)
def test_command_examples_are_accepted(line):
    words = shlex.split(line, comments=True)[1:]
    tyro.cli(COMMANDS[words[0]], args=words[1:])


def test_there_are_examples_of_the_main_commands():
    assert {"train", "discover", "evaluate"} <= {line.split()[1] for line in EXAMPLES}


def test_pictures_exist_and_are_small():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).stat().st_size < 300_000
