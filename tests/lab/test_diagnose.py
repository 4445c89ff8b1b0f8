"""`forwax diagnose`: a table with every rule and one sentence, and mistakes in one sentence."""

import pytest

from forwax.lab import cli


def test_a_table_and_a_sentence(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = [
        "diagnose",
        "digits",
        "--rules",
        "low-rank-2",
        "feedback",
        "--batch-size",
        "8",
    ]
    assert cli.main([*words, "--draws", "2", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert "digits, 8 examples, at the initial parameters of seed 0." in out
    assert "rank-1 forward gradient, 2 tangents" in out
    assert "1,204" in out or "1,205" in out  # (2,410 - 1) / 2
    assert "feedback alignment" in out
    assert "no law" in out
    assert "2,410 parameters; 2 draws against the exact gradient by backprop" in out
    assert "Use " in out


def test_on_files(tiny_data, capsys):
    words = [
        "diagnose",
        "mnist-logistic",
        "--rules",
        "low-rank",
        "--batch-size",
        "2",
        "--draws",
        "1",
        "--rounds",
        "1",
    ]
    assert cli.main(words) == 0
    assert "7,850 parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--draws", "0"], "--draws must be at least 1, got 0."),
        (
            ["--batch-size", "5000"],
            "--batch-size must be at most the 1437 examples of the training set, got 5000.",
        ),
        (
            ["--rules", "magic"],
            "There is no rule 'magic'; choose --rules from: backprop, ",
        ),
    ],
)
def test_mistakes(words, sentence, capsys):
    assert cli.main(["diagnose", *words]) == 2
    assert sentence in capsys.readouterr().err
