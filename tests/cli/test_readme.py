"""What the README shows must run, and what it names must exist."""

import re
import shlex
from pathlib import Path

import pytest
import tyro

from objslot.commands import COMMANDS

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^    (objslot .*)$", README, re.M)


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S))
def test_python_examples_run(code):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("line", EXAMPLES)
def test_command_examples_are_accepted(line):
    words = shlex.split(line, comments=True)[1:]
    tyro.cli(COMMANDS[words[0]], args=words[1:])


def test_there_are_examples_of_the_main_commands():
    assert {"train", "discover", "evaluate"} <= {line.split()[1] for line in EXAMPLES}


def test_pictures_exist_and_are_small():
    root = Path(__file__).resolve().parents[2]
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (root / path).stat().st_size < 300_000
