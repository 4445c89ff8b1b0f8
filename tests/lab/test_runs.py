"""The folder of a run: made in one move, cut back to a step, never half-written; its picture."""

import json
import os
import signal

import numpy as np
import pytest

from forwax.lab.flags import UsageError
from forwax.lab.keeping import folder as runs
from forwax.lab.keeping.folder import Run
from forwax.lab.keeping.metrics import METRICS, Metrics, resumed
from forwax.lab.pictures.curves import draw_curves, smooth
from forwax.lab.report import write_json


def test_a_folder_appears_with_its_config(tmp_path):
    run = Run.create(tmp_path / "runs", "digits", {"rule": "weight"})
    assert run.path.name.startswith("digits-")
    assert Run.open(run.path).config == {"rule": "weight"}
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [run.path.name]


def test_two_runs_of_one_second_get_two_folders(tmp_path):
    paths = {Run.create(tmp_path, "digits", {"number": i}).path for i in range(5)}
    assert len(paths) == 5
    assert sorted(Run.open(path).config["number"] for path in paths) == [0, 1, 2, 3, 4]


def test_a_kill_while_the_folder_is_made_leaves_no_run(tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        Run.create(tmp_path, "digits", {})
    assert not list(tmp_path.glob("digits-*"))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UsageError, match=r"Cannot make a run's folder in .*file: .*; choose --runs\."
    ):
        Run.create(tmp_path / "file", "digits", {})


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(
        UsageError,
        match=r"is not the folder of a run: expected a folder with a readable config\.json",
    ):
        Run.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "it is no JSON (Expecting value"),
        ("{", "it is no JSON (Expecting property name"),
        ("[" * 200_000, "it is no JSON (RecursionError)."),
        ("[1]", "expected a JSON object, got list."),
        ('"x"', "expected a JSON object, got str."),
    ],
)
def test_a_config_that_is_no_object_is_told(tmp_path, content, told):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError) as caught:
        Run.open(tmp_path)
    assert f"{tmp_path / 'config.json'} is damaged: {told}" in str(caught.value)


@pytest.mark.parametrize(
    ("step", "kept"),
    [(0, []), (1, [1]), (2, [1, 2, 2]), (3, [1, 2, 2, 3]), (9, [1, 2, 2, 3])],
    ids=str,
)
@pytest.mark.parametrize(
    "torn",
    [b"", b'{"step": 4, "lo', b'{"step": 4}'],
    ids=["whole", "torn", "no newline"],
)
def test_metrics_are_cut_back(tmp_path, step, kept, torn):
    run = Run.create(tmp_path, "digits", {})
    rows = [{"step": 1}, {"step": 2}, {"step": 2, "test_accuracy": 0.5}, {"step": 3}]
    metrics = Metrics(run.path)
    metrics.append(rows)
    metrics.sync()
    metrics.close()
    with (run.path / METRICS).open("ab") as file:
        file.write(torn)
    assert run.metrics() == rows
    resumed(run.path, step, None).close()
    lines = (run.path / METRICS).read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert [json.loads(line)["step"] for line in lines] == kept


def test_no_metrics_yet(tmp_path):
    run = Run.create(tmp_path, "digits", {})
    resumed(run.path, 0, None).close()
    assert run.metrics() == []


def test_json_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_curves_show_loss_and_accuracy_against_steps_and_seconds():
    rows = [
        {"step": i + 1, "loss": 2.0 / (i + 1), "accuracy": i / 10, "seconds": i / 4}
        for i in range(10)
    ]
    rows.append({"step": 10, "test_loss": 0.3, "test_accuracy": 0.85, "seconds": 2.25})
    panels = draw_curves(rows, "digits").axes
    assert [panel.get_xlabel() for panel in panels] == [
        "",
        "",
        "steps",
        "seconds of training",
    ]
    assert [panel.get_ylabel() for panel in panels] == [
        "training loss",
        "",
        "accuracy",
        "",
    ]
    steps, seconds = (panel.lines[0].get_xdata() for panel in panels[:2])
    np.testing.assert_allclose(steps, np.arange(1, 11))
    np.testing.assert_allclose(seconds, np.arange(10) / 4)
    assert np.asarray(panels[2].lines[1].get_ydata()).tolist() == [0.85]


def test_smoothing_keeps_a_constant_and_the_length():
    np.testing.assert_allclose(smooth(np.full(1000, 3.0)), 3.0)
    np.testing.assert_allclose(smooth(np.arange(300.0)), np.arange(300.0), atol=1e-12)


def test_smoothing_starts_and_ends_where_the_data_do():
    values = np.where(np.arange(1000) > 0, 0.9, 0.08)
    smoothed = smooth(values)
    assert smoothed[[0, -1]] == pytest.approx(values[[0, -1]])
    assert np.all((smoothed > 0.079) & (smoothed < 0.901))


def test_signal_numbers_are_those_of_the_exit_codes():
    assert (128 + signal.SIGINT, 128 + signal.SIGTERM) == (130, 143)
