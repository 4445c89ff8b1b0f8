"""Every `forwax` command that README and docs show passes the command's own parser.

`.ci/run` and the tests of the lab run them.
"""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import tyro

from forwax.lab.cli import COMMANDS

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def shown() -> list[str]:
    """The commands in all blocks of shell, long lines joined."""
    found: list[str] = []
    for page in PAGES:
        if "_build" in page.parts:
            continue
        text = page.read_text(encoding="utf-8")
        for block in BLOCK.findall(text):
            for line in block.replace("\\\n", " ").splitlines():
                found += re.findall(r"(?:^|&& |\$ )(forwax [^#|&]*)", line)
    return sorted({" ".join(command.split()) for command in found})


def test_there_are_commands():
    assert len(shown()) > 30


@pytest.mark.parametrize("command", shown())
def test_a_command_of_the_docs_passes_its_parser(command):
    _, name, *words = shlex.split(command)
    if name in ("--help", "--version"):
        return
    assert name in COMMANDS, command
    if "--help" in words or any("..." in word for word in words):
        return
    module = import_module(f"forwax.lab.commands.{name}")
    options = getattr(module, f"{name.title()}Options")
    tyro.cli(options, args=words, config=(tyro.conf.DisallowNone,))
