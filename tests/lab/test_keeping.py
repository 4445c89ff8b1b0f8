"""A run's folder: one writer, plain files, metrics and settings whose damage is seen."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from filelock import FileLock

from forwax.lab import cli
from forwax.lab.flags import UsageError
from forwax.lab.keeping.folder import Run
from forwax.lab.keeping.lock import HOLDER, LOCK, writing
from forwax.lab.keeping.metrics import METRICS, Metrics, resumed, rows_of, spans
from forwax.lab.keeping.regular import read_object
from forwax.lab.keeping.seal import sealed, unsealed
from forwax.lab.keeping.stored import check_stored
from forwax.lab.report import write_json

pytestmark = pytest.mark.usefixtures("compile_once")
LAST = 12


def rows(first=1, last=LAST):
    """A line for each step, and a test after each fourth."""
    for step in range(first, last + 1):
        yield {"step": step, "loss": 2.0 / step, "accuracy": 0.5, "seconds": step / 4}
        if step % 4 == 0:
            yield {"step": step, "test_loss": 1.0, "test_accuracy": 0.25}


@pytest.fixture
def kept(tmp_path):
    """A folder with metrics, and what a checkpoint after `LAST` keeps of them."""
    metrics = Metrics(tmp_path)
    metrics.append(rows())
    metrics.sync()
    metrics.close()
    return tmp_path, metrics.sums()


def damage(folder, old, new):
    path = folder / METRICS
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    return path.read_bytes()


def test_sound_metrics_are_cut_back_without_a_word(kept, capsys):
    folder, sums = kept
    before = (folder / METRICS).read_bytes()
    with (folder / METRICS).open("ab") as file:
        file.write(b'{"step": 13, "loss": 1.0}\n{"st')
    metrics = resumed(folder, LAST, sums)
    assert (folder / METRICS).read_bytes() == before
    metrics.append([{"step": 13}])
    metrics.close()
    assert (folder / METRICS).read_bytes() == before + b'{"step": 13}\n'
    assert metrics.sums()["bytes"] == len(before) + 13
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("old", "new", "steps"),
    [
        (b'{"step": 3,', b'{"stfp": 3,', "3"),
        (b'{"step": 3,', b'{"step": "3",', "3"),
        (b'{"step": 3,', b'[1]\n[{"step": 3,', "3"),
        (b'{"step": 4, "test', b'{"step": 4, test', "4"),
        (b'"step": 6, "loss": 0.3', b'"step": 6, "loss": "0.3"', "6"),
        (b'"step": 7,', b'"step": -7,', "7"),
        (b'{"step": 1,', b'{"step": 1\xff,', "1"),
        (b"}\n", b"}\x0e", "1-12"),
        (b'{"step": 12, "loss"', b'{"step": 1.2, "loss"', "12"),
    ],
)
def test_an_unreadable_line_is_named_and_the_others_stay(kept, capsys, old, new, steps):
    folder, sums = kept
    damaged = damage(folder, old, new)
    sound = rows_of(damaged)
    metrics = resumed(folder, LAST, sums)
    metrics.close()
    path = folder / METRICS
    assert capsys.readouterr().err == (
        f"forwax: {path} is damaged: the lines of the steps {steps} are missing or unreadable; "
        f"what it held is kept as {path}.damaged.\n"
    )
    assert Path(f"{path}.damaged").read_bytes() == damaged
    assert rows_of(path.read_bytes()) == sound
    assert metrics.sums()["doubtful"] == ""


def test_a_changed_value_is_seen_though_every_line_reads(kept, capsys):
    folder, sums = kept
    before = damage(folder, b'"step": 5, "loss": 0.4', b'"step": 5, "loss": 0.5')
    metrics = resumed(folder, LAST, sums)
    metrics.close()
    path = folder / METRICS
    assert capsys.readouterr().err == (
        f"forwax: {path} is damaged: a value of the steps 1-12 is not what was written; what it "
        f"held is kept as {path}.damaged.\n"
    )
    assert path.read_bytes() == before
    # the next checkpoint carries the doubt on
    assert metrics.sums()["doubtful"] == "1-12"
    resumed(folder, LAST, metrics.sums()).close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("size", [None, 0, 500])
def test_lost_metrics_are_told(kept, capsys, size):
    folder, sums = kept
    path = folder / METRICS
    if size is None:
        path.unlink()
    else:
        os.truncate(path, size)
    resumed(folder, LAST, sums).close()
    told = "7-12" if size else "1-12"
    assert f"the lines of the steps {told} are missing" in capsys.readouterr().err
    assert Path(f"{path}.damaged").exists() == bool(size)


def test_metrics_that_must_be_whole_are_refused_and_left_as_they_are(kept):
    folder, sums = kept
    before = damage(folder, b'{"step": 8, "loss"', b'{"step" 8, "loss"')
    with pytest.raises(UsageError, match=r"Remove .*, and the same command trains it"):
        resumed(folder, LAST, sums, whole_every=4)
    assert (folder / METRICS).read_bytes() == before
    assert [path.name for path in folder.iterdir()] == [METRICS]


def test_steps_in_short():
    assert spans([]) == ""
    assert spans([7]) == "7"
    assert spans([9, 1, 2, 11, 3, 10]) == "1-3, 9-11"


def test_one_process_writes(tmp_path):
    with writing(tmp_path):
        with (
            pytest.raises(UsageError, match=f"process, number {os.getpid()}; wait"),
            writing(tmp_path),
        ):
            pytest.fail("two processes write")
        assert (tmp_path / HOLDER).read_text() == str(os.getpid())
    assert not list(tmp_path.iterdir())


def test_a_holder_that_was_killed_holds_nothing(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from forwax.lab.keeping.lock import writing\n"
        "with writing(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    (tmp_path / ".summary.json.123.part").write_text("a draft")
    (tmp_path / ".mine.part").write_text("not a draft")
    assert {path.name for path in tmp_path.glob(".lock*")} == {LOCK, HOLDER}
    with writing(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".mine.part"]


@pytest.mark.parametrize(
    ("kind", "value", "told"),
    [
        (int, 1.5, "a whole number, got 1.5"),
        (int, True, "a whole number, got True"),
        (float, "fast", "a number, got 'fast'"),
        (str, None, "text, got None"),
        (bool, 1, "true or false, got 1"),
        (int | None, [], "a whole number, got []"),
        (tuple[str, ...], ["a", 1], "a list of text, got ['a', 1]"),
    ],
)
def test_values_of_another_kind_are_named(kind, value, told):
    with pytest.raises(UsageError) as caught:
        check_stored(Path("a.json"), {"key": kind}, {"key": value})
    assert str(caught.value) == f"a.json: key must be {told}."


def test_a_missing_value_is_named():
    with pytest.raises(UsageError, match=r"a\.json: key is missing\."):
        check_stored(Path("a.json"), {"key": int}, {})


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compile_once):
    """The folder of a run of the digits that has finished."""
    folder = tmp_path_factory.mktemp("finished")
    words = "--steps 60 --num-tangents 2 --eval-every 20 --checkpoint-seconds 0"
    assert cli.main(["train", "--runs", str(folder), *words.split()]) == 0
    (path,) = folder.iterdir()
    return path


@pytest.fixture
def stopped(finished, tmp_path):
    """The same before its summary was written."""
    path = shutil.copytree(finished, tmp_path / finished.name)
    (path / "summary.json").unlink()
    return path


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def resume(path, capsys, command="train"):
    capsys.readouterr()
    code = cli.main([command, "--resume", str(path)])
    return code, capsys.readouterr().err


@pytest.mark.parametrize("kind", ["symbolic link", "hard links", "fifo"])
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "config.json", "summary.json", "curves.png", LOCK]
)
def test_nothing_is_written_through_a_link(stopped, tmp_path, capsys, name, kind):
    victim = tmp_path / "victim"
    path = stopped / name
    if path.exists():
        path.rename(victim)
    else:
        victim.write_bytes(b"of somebody else")
    before = victim.read_bytes()
    if kind == "symbolic link":
        path.symlink_to(victim)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.hardlink_to(victim)
    files = contents(stopped)
    code, error = resume(stopped, capsys)
    assert code == 2
    assert f"{path} is " in error
    assert kind in error
    assert error.count("\n") == 1
    assert victim.read_bytes() == before
    assert {name: files[name] for name in contents(stopped)} == contents(stopped)


def test_nothing_is_removed_behind_a_link(stopped, tmp_path, capsys):
    outside = tmp_path / "photos"
    for number in "123":
        (outside / number).mkdir(parents=True)
        (outside / number / "photo.jpg").write_bytes(b"a photo")
    before = contents(outside)
    shutil.rmtree(stopped / "checkpoints")
    (stopped / "checkpoints").symlink_to(outside)
    code, error = resume(stopped, capsys)
    assert code == 2
    assert f"{stopped / 'checkpoints'} is a symbolic link" in error
    assert contents(outside) == before


def test_the_folder_itself_may_be_a_link(finished, tmp_path, capsys):
    (tmp_path / "link").symlink_to(finished)
    assert resume(tmp_path / "link", capsys) == (0, "")


def test_a_second_process_is_refused(stopped, capsys):
    (stopped / HOLDER).write_text("4711")
    with FileLock(stopped / LOCK):
        code, error = resume(stopped, capsys)
    assert code == 2
    assert f"{stopped} is written to by another process, number 4711; wait" in error


@pytest.mark.parametrize(
    ("old", "new", "summary", "told"),
    [
        (b'{"step": 7,', b'{"step" 7,', {"missing_steps": "7"}, "steps 7 are missing"),
        (b'"step": 8,', b'"step":  8,', {"doubtful_steps": "1-60"}, "steps 1-60 is"),
        (b'60, "test', b"60, test", {}, "steps 60 are missing"),
        (
            b'9, "loss',
            b'9, "lost',
            {"missing_steps": "9, 19, 29, 39, 49, 59", "doubtful_steps": "1-60"},
            "steps 1-60 is",
        ),
        (b'"seconds"', b'"secondr"', {"doubtful_steps": "1-60"}, "steps 1-60 is"),
    ],
)
def test_damaged_metrics_are_told_everywhere(
    finished, stopped, capsys, monkeypatch, old, new, summary, told
):
    titles = []
    monkeypatch.setattr(
        "forwax.lab.pictures.curves.style.headline", lambda figure, t: titles.append(t)
    )
    damage(stopped, old, new)
    code, error = resume(stopped, capsys)
    assert code == 0
    assert told in error
    found = Run.open(stopped).summary()
    whole = Run.open(finished).summary()
    for name in ("missing_steps", "doubtful_steps"):
        assert found.get(name) == summary.get(name)
    for name, steps in summary.items():
        assert f"{name.replace('_', ' ')}: {steps}" in titles[0]
    for name in ("test_loss", "test_accuracy"):
        assert found[name] == whole[name]


def rewrite(path, **changes):
    """Edit a file as a person would, its seal as it was."""
    value = read_object(path)
    for name, each in changes.items():
        value[name] = each
        if each is ...:
            del value[name]
    write_json(path, value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 1}, "seed was 0 and is 1."),
        ({"rule": "backprop"}, "rule was 'weight' and is 'backprop'."),
        ({"dtype": ...}, "dtype was 'float32' and is missing."),
        ({"colour": 1}, "colour was missing and is 1."),
        ({"steps": 90, "seed": 3}, "steps was 60 and is 90; seed was 0 and is 3."),
        ({"num_tangents": 10**9}, "num_tangents was 2 and is 1000000000."),
        ({"steps": 10**30}, "steps must be at most 2,147,483,647, got 1000000"),
        ({"steps": -5}, "steps must be at least 1, got -5."),
        ({"eval_every": -1}, "eval_every must be at least 1, got -1."),
        ({"rule": "wait"}, "rule must be one of weight"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'."),
        ({"learning_rate": None}, "learning_rate must be a number, got None."),
        ({"learning_rate": float("nan")}, "learning_rate must be a positive number"),
        ({"batch_size": 10**12}, "batch_size must be at most 2,147,483,647"),
        ({"batch_size": 10**6}, "must be at most the 1437 examples"),
        ({"batch_size": True}, "batch_size must be a whole number, got True."),
        ({"dtype": "int8"}, "dtype must be one of float32"),
        ({"experiment": 3}, "experiment must be text, got 3."),
        ({"experiment": "cats"}, "There is no experiment 'cats'"),
        ({"data_checksum": ...}, "data_checksum is missing."),
        ({"data_dir": []}, "data_dir must be text, got []."),
        ({"size": "M/1/16"}, "size"),
    ],
    ids=str,
)
def test_an_edited_config_is_refused(stopped, capsys, changes, told):
    rewrite(stopped / "config.json", **changes)
    before = contents(stopped)
    code, error = resume(stopped, capsys)
    assert code == 2
    assert told in error
    assert error.count("\n") == 1
    assert contents(stopped) == before


def test_an_edited_config_of_a_finished_run_or_before_a_checkpoint(
    finished, stopped, tmp_path, capsys
):
    path = shutil.copytree(finished, tmp_path / "edited")
    rewrite(path / "config.json", seed=7)
    told = "config.json was changed since forwax wrote it: seed was 0 and is 7."
    assert told in resume(path, capsys)[1]
    shutil.rmtree(stopped / "checkpoints")
    rewrite(stopped / "config.json", seed=7)
    code, error = resume(stopped, capsys)
    assert code == 2
    assert (
        "config.json is not what forwax wrote: its content and its sum differ" in error
    )


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({}, "test_accuracy is missing."),
        ({"test_accuracy": "high"}, "test_accuracy must be a number, got 'high'."),
        ({"test_accuracy": 1.5}, "test_accuracy must be from 0 to 1, got 1.5."),
        (sealed({"test_accuracy": 0.5}) | {"test_accuracy": 0.6}, "its sum differ"),
    ],
    ids=str,
)
def test_an_edited_summary_is_refused(stopped, capsys, value, told):
    write_json(stopped / "summary.json", value)
    code, error = resume(stopped, capsys)
    assert code == 2
    assert f"{stopped / 'summary.json'}" in error
    assert told in error


def test_a_summary_without_a_seal_is_from_an_earlier_version(finished, stopped, capsys):
    summary = unsealed(read_object(finished / "summary.json"))
    write_json(stopped / "summary.json", summary)
    assert resume(stopped, capsys) == (0, "")


def test_a_batch_that_devices_cannot_share_leaves_no_folder(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(jax, "local_devices", lambda: [None] * 3)
    words = ["train", "--data-parallel", "--batch-size", "64", "--runs"]
    assert cli.main([*words, str(tmp_path / "runs")]) == 2
    assert "must be a multiple of the 3 local devices" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_run_whose_metrics_are_gone_is_finished(finished, stopped, capsys):
    (stopped / METRICS).unlink()
    code, error = resume(stopped, capsys)
    assert code == 0
    assert "steps 1-60 are missing or unreadable; nothing of it is left" in error
    found, whole = Run.open(stopped).summary(), Run.open(finished).summary()
    assert found["test_accuracy"] == whole["test_accuracy"]
    assert (found["missing_steps"], found["train_loss"]) == ("1-60", None)
