"""The command line: help, mistakes in one sentence with exit code 2, from words to folder."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from forwax.lab import cli
from forwax.lab.catalogue.names import LINES
from forwax.lab.cli import COMMANDS, main
from forwax.lab.compare import setup
from forwax.lab.training import progress


def test_help_names_every_command(capsys):
    for words in ([], ["--help"], ["-h"]):
        assert main(words) == 0
        out = capsys.readouterr().out
        assert all(f"  {name} " in out for name in COMMANDS)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from forwax.lab.cli import main; main(['--help']);"
        "print([m for m in ('tyro', 'rich', 'optax', 'equinox', 'orbax', 'matplotlib', 'sklearn') "
        "if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert out.splitlines()[-1] == "[]"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("forwax 0.")


def test_unknown_command(capsys):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == (
        "forwax: there is no command 'trian'; choose one of: train, finetune, compare, diagnose, "
        "optimize, reproduce, data.\n"
    )


def test_a_missing_extra_names_the_command_that_installs_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["train"]) == 2
    assert (
        "tyro is not installed; the command line needs: pip install 'forwax[lab]'."
        in capsys.readouterr().err
    )


def test_train_help_shows_every_choice(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for word in (
        "fashion-mnist-mlp",
        "finite-difference",
        "coordinate-without-replacement",
        "control-variate",
        "lion",
    ):
        assert word in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_defaults_and_breaks_no_line_early(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    out = capsys.readouterr().out
    assert "--data-dir" in out or command == "optimize"
    assert "(default: None)" not in out
    assert "(default: )" not in out
    module = sys.modules[f"forwax.lab.commands.{command}"]
    source = Path(module.__file__ or "").parent
    for file in [*source.glob("*.py"), Path(setup.__file__)]:
        assert not re.search(
            r'^    [a-z_]+: .+ = .+\n    """[^"]+\n',
            file.read_text(encoding="utf-8"),
            re.MULTILINE,
        )


def test_compare_help_names_every_rule(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    told = re.search(
        r"Rules: (.*?)\. A number", " ".join(capsys.readouterr().out.split())
    )
    assert told is not None
    assert set(told[1].split(", ")) == set(LINES)


@pytest.mark.parametrize("words", [["cats"], ["--rule", "magic"], ["--steps", "many"]])
def test_words_that_tyro_refuses(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", *words])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0."),
        (
            ["--batch-size", "5000"],
            "--batch-size must be at most the 1437 examples of the training set, got 5000.",
        ),
        (
            ["--rule", "backprop", "--tangents", "normal"],
            "--tangents does not apply to --rule backprop",
        ),
        (
            ["--config", "paper"],
            "digits has no configuration 'paper'. Choose --config from: default.",
        ),
        (
            ["--resume", "nowhere"],
            "nowhere is not the folder of a run: expected a folder with a readable config.json",
        ),
        (
            ["--checkpoint-seconds", "-1"],
            "--checkpoint-seconds must be zero or more, got -1.0.",
        ),
        (["mnist-mlp"], "mnist"),
    ],
)
def test_mistakes_leave_no_folder(words, sentence, capsys, tmp_path):
    assert main(["train", "--runs", str(tmp_path / "runs"), *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("forwax: ")
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_train_from_words_to_folder(capsys, tmp_path):
    assert (
        main(
            [
                "train",
                "--runs",
                str(tmp_path),
                "--steps",
                "20",
                "--num-tangents",
                "2",
                "--seed",
                "3",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    assert "Rule: weight, 2 low-rank tangents a step, combined by mean." in out
    assert "No reverse mode was used" in out
    assert "\x1b" not in out
    assert json.loads((path / "summary.json").read_text())["seed"] == 3


def test_backprop_claims_nothing(capsys, tmp_path):
    assert (
        main(["train", "--runs", str(tmp_path), "--steps", "2", "--rule", "backprop"])
        == 0
    )
    assert "No reverse mode" not in capsys.readouterr().out


def test_ctrl_c_before_training(monkeypatch, capsys, tmp_path):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("forwax.lab.training.problem.load", interrupted)
    assert main(["train", "--runs", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "Stopped.\n"


def test_every_command_has_its_module():
    for name, about in COMMANDS.items():
        module = importlib.import_module(f"forwax.lab.commands.{name}")
        assert callable(module.run)
        assert about
    assert cli.usage().count("\n") >= len(COMMANDS)


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "bar", lambda *asked: asked)
    assert progress.reporting("digits", 10, 0) == ("digits", 10, 0)


def test_the_bar_shows_loss_accuracy_and_pace():
    import io

    from rich.console import Console

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    with progress.bar("digits", 100, start=0, console=console) as report:
        report(50, 0.25, 0.875, 1234.0)
    shown = screen.getvalue()
    for part in ("digits", "50/100", "0.2500", "0.875", "1,234"):
        assert part in shown
