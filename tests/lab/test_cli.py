"""The command line: help, mistakes in one sentence with exit code 2, from words to folder."""

import contextlib
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from forwax.lab import cli, options
from forwax.lab.catalogue import rules as choices
from forwax.lab.catalogue.experiments import EXPERIMENTS
from forwax.lab.catalogue.names import LINES
from forwax.lab.catalogue.optimizers import OPTIMIZERS
from forwax.lab.cli import COMMANDS, main
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


HELPED = """
import contextlib, io, sys
from forwax.lab.cli import COMMANDS, main

asked = [["train", "digit"], ["completion", "bash"]]
for name in COMMANDS:
    asked += [name, "--help"], [name, "--lr"]
codes = []
for words in asked:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            codes.append(main(words))
        except SystemExit as end:
            codes.append(end.code)
print(codes, sorted({"jax", "numpy", "optax", "equinox", "matplotlib"} & {*sys.modules}))
"""


def test_helps_refusals_and_completion_come_without_jax():
    shown = subprocess.run(
        [sys.executable, "-c", HELPED], capture_output=True, text=True, check=True
    ).stdout
    *codes, last = re.findall(r"\d|\[\]", shown)
    assert last == "[]"
    assert {*codes} == {"0", "2"}
    assert codes.count("0") == len(COMMANDS) + 1


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("forwax 0.")


def test_unknown_command(capsys):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == (
        "forwax: there is no command 'trian'; choose one of: train, finetune, compare, diagnose, "
        "optimize, reproduce, data, completion. Did you mean train?\n"
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
    assert "--data-dir" in out or command in ("optimize", "completion")
    assert "(default: None)" not in out
    assert "(default: )" not in out
    source = Path(options.__file__).parent
    for file in source.glob("*.py"):
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
        assert dataclasses.is_dataclass(options.options_of(name)[0])
        assert about
    assert cli.usage().count("\n") >= len(COMMANDS)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_sees_how_long_it_compiles(tmp_path):
    import pty

    ours, theirs = pty.openpty()
    words = ["train", "digits", "--steps", "2", "--runs", str(tmp_path)]
    child = subprocess.Popen(
        [sys.executable, "-m", "forwax", *words], stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(ours, 1024):
            seen += part
    os.close(ours)
    assert child.wait(timeout=120) == 0
    assert re.search(rb"Compiling\W.*\d:\d\d:\d\d", seen)
    assert seen.index(b"Run:") < seen.index(b"Compiling") < seen.index(b"Test accuracy")


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


def completed(script, *words):
    """What bash offers for the last word."""
    line = " ".join(f"'{word}'" for word in words)
    asked = (
        f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; "
        "_tyro_forwax; echo ${COMPREPLY[@]}"
    )
    done = subprocess.run(
        ["bash", "-c", asked], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.split()


def test_bash_completes_commands_options_and_values(capsys, tmp_path):
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "forwax.bash"
    script.write_text(capsys.readouterr().out, encoding="utf-8")
    assert completed(script, "forwax", "di") == ["diagnose"]
    assert "--learning-rate" in completed(script, "forwax", "train", "--learning-r")
    assert completed(script, "forwax", "train", "--schedule", "cos") == ["cosine"]
    rules = completed(script, "forwax", "train", "--rule", "")
    assert rules == sorted(choices.RULES)


@pytest.mark.parametrize(
    ("words", "option", "names"),
    [
        (["train", "--optimizer", "none"], "--optimizer", OPTIMIZERS),
        (["train", "digit"], "experiment", EXPERIMENTS),
        (["reproduce", "--dtype", "int8"], "--dtype", ["bfloat16", "float32"]),
        (["optimize", "--combine", "sum"], "--combine", {*choices.COMBINES} - {"control-variate"}),
    ],
)  # fmt: skip
def test_a_refusal_lists_the_choices_in_order_without_none(
    words, option, names, capsys
):
    with pytest.raises(SystemExit):
        main(words)
    told = "".join(capsys.readouterr().err.replace("│", "").split())
    assert option in told
    assert f"Expectedoneof({','.join(map(repr, sorted(names)))})" in told


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_scripts_for_other_shells_name_commands_and_sorted_values(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(command in script for command in COMMANDS)
    assert re.search(r"control-variate\W+mean\W+projection\W+shrinkage", script)
    listed = re.findall(r"'choices': (\[[^]]*)|/(\([^()]*)", script)
    assert len(listed) > 20
    assert not [each for each in listed if "None" in "".join(each)]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "Did you mean train?"),
        (["train", "--lr", "0.1"], "Did you mean --learning-rate, not --lr?"),
        (["train", "--rule=wieght"], "Did you mean weight, not wieght?"),
        (["train", "--rule", "wieght"], "Did you mean weight, not wieght?"),
        (["train", "mnist-mlpp"], "Did you mean mnist-mlp, not mnist-mlpp?"),
        (["train", "--config", "defualt"], "Did you mean default?"),
        (["compare", "--rules", "bakprop"], "Did you mean backprop?"),
        (["optimize", "rosenbruck"], "Did you mean rosenbrock, not rosenbruck?"),
        (["reproduce", "ren2032"], "Did you mean ren2023, not ren2032?"),
    ],
)
def test_mistyped_words_are_answered_with_what_was_meant(words, sentence, capsys):
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "compare"])
def test_print_config_starts_nothing(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([command, "digits", "--steps", "3", "--print-config"]) == 0
    out, err = capsys.readouterr()
    config = json.loads(out)
    assert (config["experiment"], config["steps"], err) == ("digits", 3, "")
    assert not [*tmp_path.iterdir()]


def test_print_config_takes_no_other_processes(capfd):
    # with --distributed it is a child that refuses
    assert main(["train", "digits", "--print-config", "--distributed"]) == 2
    out, err = capfd.readouterr()
    assert "--print-config starts nothing: leave --distributed out." in err
    assert out == ""


def test_print_config_is_what_a_run_keeps(capsys, tmp_path):
    words = ["train", "digits", "--steps", "2", "--runs", str(tmp_path)]
    assert main([*words, "--print-config"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert main(words) == 0
    capsys.readouterr()
    (folder,) = tmp_path.iterdir()
    kept = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept.pop("sha256")
    assert printed == kept
    assert main(["train", "--resume", str(folder), "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out) == kept


def test_one_tangent_is_told_in_the_singular(capsys, tmp_path):
    words = ["train", "digits", "--steps", "1", "--runs", str(tmp_path)]
    assert main([*words, "--num-tangents", "1"]) == 0
    assert "Rule: weight, 1 low-rank tangent a step" in capsys.readouterr().out
    assert main([*words, "--rule", "learned-feedback"]) == 0
    assert "Rule: learned-feedback, 1 noise a step." in capsys.readouterr().out
