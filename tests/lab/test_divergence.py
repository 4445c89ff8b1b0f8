"""A loss that explodes or does not fall is told, with a smaller rate; others are not."""

import pytest

from forwax.lab.cli import main

DIGITS = ("train", "digits", "--rule", "backprop", "--eval-every", "5", "--runs")
SMALLER = "try a smaller --learning-rate (say 0.5; it was 1e+03)."


def test_an_explosion_is_told_once_and_its_end_too(capsys, tmp_path):
    words = [*DIGITS, str(tmp_path), "--steps", "20", "--learning-rate", "1000"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert err.count("times the loss of the first batch") == 1
    assert err.strip().startswith("The test loss after step 5 is ")
    assert SMALLER in err
    assert "of the first batch: nothing was learnt; " + SMALLER in out


@pytest.mark.parametrize("steps", [1, 20])
def test_a_loss_that_falls_is_not_told(capsys, tmp_path, steps):
    words = [*DIGITS, str(tmp_path), "--steps", str(steps), "--learning-rate", "0.3"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert "first batch" not in out + err


def test_a_resumed_run_knows_where_it_began(capsys, tmp_path):
    words = [*DIGITS, str(tmp_path), "--steps", "20", "--learning-rate", "1000"]
    assert main(words) == 0
    (folder,) = tmp_path.iterdir()
    (folder / "summary.json").unlink()
    capsys.readouterr()
    assert main(["train", "--resume", str(folder)]) == 0
    assert "nothing was learnt" in capsys.readouterr().out
