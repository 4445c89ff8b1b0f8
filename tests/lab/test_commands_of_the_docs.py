"""Every `forwax` command that README and docs show passes its parser and runs, on tiny settings."""

import re
import shlex
from pathlib import Path

import pytest
import tyro

from forwax.lab import cli
from forwax.lab.catalogue import columns
from forwax.lab.commands import COMMANDS
from forwax.lab.options import options_of

pytestmark = pytest.mark.usefixtures("compile_once")
ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SMALL = {
    "compare": "--batch-size 2 --steps 2 --seeds 1 --search-rates 2 --evaluations 1 "
    "--validation-examples 4 --test-examples 4",
    "diagnose": "--batch-size 2 --draws 2 --rounds 1",
    "finetune": "--model tiny-random --steps 2 --batch-size 4 --max-tokens 64 "
    "--train-texts 8 --validation-texts 4 --test-texts 4",
    "optimize": "--iterations 2 --runs 1",
    "reproduce": "--batch-size 8 --examples 64 --steps 2 --seeds 1",
    "train": "--batch-size 2 --steps 2",
}
"""What is said after a command's own options, and so in their place."""
TEXTS = {"my-texts.csv": "text,label", "texts.tsv": "text\tlabel"}
"""Files that the commands name."""


QUICK = {
    "forwax compare digits",
    "forwax diagnose digits",
    "forwax finetune",
    "forwax optimize beale",
    "forwax optimize rosenbrock --n 20 --method gauss-newton",
    "forwax reproduce ren2023 --column mnist-s --rules BP FG-A FG-A:8",
    "forwax train",
    "forwax train digits --rule activity --noise auto --calibrate",
    "forwax train digits --tangents orthonormal --combine projection "
    "--optimizer momentum --schedule cosine",
    "forwax train local-mixer --size S/1/1 --rule FG-W --num-tangents 4",
}
"""One of each kind; the others, of which some compile for long, are slow tests."""


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


def name_of(command: str) -> str:
    return command.split()[1]


def is_run_elsewhere(command: str) -> bool:
    """With other processes, or on a run's folder: tests of the lab have both."""
    return "--distributed" in command or "--resume" in command


SHOWN = shown()
RUN = [each for each in SHOWN if name_of(each) in SMALL and not is_run_elsewhere(each)]


def test_there_are_commands():
    assert len(RUN) > 50
    assert {*RUN} > QUICK
    assert {name_of(each) for each in RUN} == {*SMALL}


@pytest.mark.parametrize("command", SHOWN)
def test_a_command_of_the_docs_passes_its_parser(command):
    _, name, *words = shlex.split(command)
    if name in ("--help", "--version"):
        return
    assert name in COMMANDS, command
    tyro.cli(options_of(name)[0], args=words, config=(tyro.conf.DisallowNone,))


@pytest.fixture
def small(monkeypatch, tiny_data, tmp_path):
    """Small mixers, 60 images, a folder with the texts that commands name."""
    size = {"blocks": 1, "patches": 1, "channels": 8, "groups": 2}
    for name, each in columns.SIZES.items():
        monkeypatch.setitem(columns.SIZES, name, each._replace(options=size))
    for name, head in TEXTS.items():
        between = head[4]
        rows = [f"A text {i}{between}{i % 2}" for i in range(40)]
        (tmp_path / name).write_text("\n".join([head, *rows]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(each, marks=[] if each in QUICK else pytest.mark.slow)
        for each in RUN
    ],
)
def test_a_command_of_the_docs_runs(command, small, tmp_path, capsys):
    _, name, *words = shlex.split(command)
    if name == "finetune":
        pytest.importorskip("tokenizers", reason="needs pip install 'forwax[lm]'")
        words += [] if "--data" in words else ["--data", "tiny-sentences"]
        words += (
            ["--trials", "1"] if "--compare" in words else ["--learning-rate", "0.01"]
        )
    if "--labels" in words:  # its words are letters
        words += ["--labels", "a", "b"]
    if "--epochs" in words:  # of passes or steps only one may be given
        at = words.index("--epochs")
        del words[at : at + 2]
    if "--holdout" in words:
        words += ["--holdout", "8"]
    assert cli.main([name, *words, *SMALL[name].split()]) == 0
    assert capsys.readouterr().out
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(left) > len(TEXTS) or name == "diagnose"
