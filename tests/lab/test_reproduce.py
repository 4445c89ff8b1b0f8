"""`forwax reproduce`: a column over rules and seeds, what it leaves, and how it goes on."""

import contextlib
import dataclasses
import json
import signal

import jax
import pytest

import forwax as fx
from forwax.lab import cli
from forwax.lab.catalogue import columns, objectives, optimizers
from forwax.lab.catalogue import rules as choices
from forwax.lab.catalogue.columns import COLUMNS
from forwax.lab.catalogue.names import Entry
from forwax.lab.catalogue.options import resolve
from forwax.lab.catalogue.settings import Settings
from forwax.lab.commands import reproduce
from forwax.lab.commands.reproduce import ReproduceOptions
from forwax.lab.data import load
from forwax.lab.flags import UsageError
from forwax.lab.ren2023 import runs, table
from forwax.lab.ren2023.finished import finished
from forwax.lab.report import write_json
from forwax.lab.training.problem import problem_of
from forwax.lab.training.step import split_seed

pytestmark = pytest.mark.usefixtures("compile_once")
KINDS = ("BP", "FA", "LF", "FG-W", "FG-A")
SIZE = {"blocks": 1, "patches": 1, "channels": 8, "groups": 2}


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tiny_data):
    """Small models in place of the columns' own, on 60 images."""
    for name in columns.SIZES:
        monkeypatch.setitem(
            columns.SIZES, name, columns.SIZES[name]._replace(options=SIZE)
        )
    # the picture has a test of its own
    monkeypatch.setattr(
        "forwax.lab.style.save", lambda figure, path, **_: path.write_bytes(b"picture")
    )


def words(out, *more):
    return ["reproduce", "ren2023", "--batch-size", "30", "--out", str(out), *more]


def test_a_column_is_run_once_and_read_afterwards(tmp_path, capsys, monkeypatch):
    asked = words(tmp_path, "--rules", "L-BP", "DFA", "--seeds", "2", "--epochs", "1")
    assert cli.main(asked) == 0
    told = capsys.readouterr().out
    assert "M/1/16: L-BP, seed 0" in told
    assert "DFA, seed 1" in told
    folder = tmp_path / "mnist-m"
    summary = json.loads((folder / "DFA-1" / "summary.json").read_text())
    assert len(summary["test_errors"]) == 1
    assert 0 <= summary["train_error"] <= 100
    rows = [
        line
        for line in (folder / "table.md").read_text().splitlines()
        if line.startswith(("| L", "| D"))
    ]
    assert [row.split(" | ")[0] for row in rows] == ["| L-BP", "| DFA"]
    assert rows[0].split(" | ")[3:5] == ["2.16", "0.00"]
    assert rows[1].split(" | ")[3:5] == ["3.17", "0.00"]
    assert (folder / "curves.png").exists()
    monkeypatch.setattr(
        "forwax.lab.training.session.build_trainer",
        lambda *_: pytest.fail("it trained again"),
    )
    config = json.loads((folder / "DFA-1" / "config.json").read_text())
    # as from a version without this setting, and without seals
    del config["skip_bad_slopes"], config["sha256"]
    (folder / "DFA-1" / "config.json").write_text(json.dumps(config))
    assert cli.main(asked) == 0
    assert (
        cli.main(words(tmp_path, "--rules", "L-BP", "--seeds", "1", "--epochs", "2"))
        == 2
    )
    assert (
        "holds a run whose steps is another (2, not 4); choose another --out"
        in capsys.readouterr().err
    )


SUMMARY = {
    "finite": True,
    "train_error": 0.0,
    "epochs": [],
    "test_errors": [],
    "losses": [],
}


class After:
    """Signals of which one comes after so many looks."""

    def __init__(self, looks):
        self.looks = looks

    def watch(self):
        return contextlib.nullcontext()

    @property
    def received(self):
        self.looks -= 1
        return signal.SIGINT if self.looks < 0 else None


def test_a_run_goes_on_as_if_it_had_never_stopped(tmp_path):
    column = COLUMNS["mnist-m"]
    settings = Entry.parse("FG-A").settings(column, 60, batch_size=30, epochs=2)
    problem = problem_of(load("mnist"), reproduce.EXPERIMENTS["local-mixer"], settings)
    stopped, lines = tmp_path / "stopped", []
    for _ in ("inside the first epoch", "at its end"):
        with pytest.raises(KeyboardInterrupt):
            runs.train(stopped, problem, settings, lines.append, After(1))
    assert [line.split(":")[0] for line in lines] == ["epoch 1"]
    assert not (stopped / "summary.json").exists()
    ours = runs.train(stopped, problem, settings, lines.append)
    assert [line.split(":")[0] for line in lines] == ["epoch 1", "epoch 2"]
    whole = runs.train(tmp_path / "whole", problem, settings, lines.append)
    for name in ("losses", "test_errors", "epochs"):
        assert ours[name] == whole[name]


def test_a_termination_is_answered_between_two_blocks(tmp_path, capsys, monkeypatch):
    asked = words(tmp_path, "--rules", "DFA", "--seeds", "1", "--epochs", "2")
    with monkeypatch.context() as patch:
        patch.setattr(
            reproduce, "_tell", lambda line: signal.raise_signal(signal.SIGTERM)
        )
        assert cli.main(asked) == 143
    assert "Stopped; what was done is kept in" in capsys.readouterr().out
    assert cli.main(asked) == 0
    told = capsys.readouterr().out
    assert "epoch 2:" in told
    assert "epoch 1:" not in told


def test_contrastive_by_lars_in_half_precision_on_two_devices(
    tmp_path, capsys, monkeypatch
):
    two = jax.local_devices()[:2]
    monkeypatch.setattr(jax, "local_devices", lambda: two)
    asked = words(
        tmp_path,
        "--column",
        "cifar-m-contrastive",
        "--rules",
        "LG-BP",
        "--seeds",
        "1",
        "--steps",
        "2",
    )
    asked[3] = "31"
    assert cli.main(asked) == 2
    assert (
        "--batch-size must be a multiple of the 2 local devices that share it, got 31."
        in capsys.readouterr().err
    )
    asked[3:6:2] = "32", str(tmp_path / "again")
    assert cli.main(asked) == 0
    assert "29.63" in capsys.readouterr().out
    summary = json.loads(
        (
            tmp_path / "again" / "cifar-m-contrastive" / "LG-BP-0" / "summary.json"
        ).read_text()
    )
    assert summary["finite"]
    assert summary["num_devices"] == 2
    assert (
        json.loads(
            (
                tmp_path / "again" / "cifar-m-contrastive" / "LG-BP-0" / "config.json"
            ).read_text()
        )["dtype"]
        == "bfloat16"
    )


def test_views_are_of_values_up_to_one_and_have_keys_of_their_own(monkeypatch):
    seen = []

    def of_batch(key, *_):
        seen.append(key)
        raise StopIteration

    monkeypatch.setattr("forwax.models.ren2023.contrastive", lambda *_: of_batch)
    settings = dataclasses.replace(COLUMNS["mnist-s"].settings, objective="contrastive")
    problem = problem_of(load("digits"), reproduce.EXPERIMENTS["local-mixer"], settings)
    monkeypatch.setattr(
        "forwax.lab.catalogue.augment.two_views",
        lambda key, images: seen.extend((key, images)) or (images,) * 2,
    )
    with pytest.raises(StopIteration):
        problem.gradient(None)(jax.random.key(0), {}, *(x[:60] for x in problem.train))
    shown, images, key = seen
    assert float(images.max()) == 1.0
    assert drawn_from(shown).isdisjoint(drawn_from(key))


def test_fixed_feedback_has_a_key_of_its_own():
    rule = choices.build_rule(Settings(rule="direct-feedback", seed=3))
    others = [drawn_from(key) for key in split_seed(3)]
    assert drawn_from(rule.feedback).isdisjoint(set.union(*others))


def drawn_from(key):
    """A key, and those that its first splits give."""
    return {
        jax.random.key_data(each).tobytes() for each in [key, *jax.random.split(key, 8)]
    }


def test_a_loss_that_is_not_finite_is_counted(tmp_path, capsys):
    asked = words(
        tmp_path,
        "--rules",
        "BP",
        "--seeds",
        "1",
        "--epochs",
        "3",
        "--learning-rate",
        "1e30",
    )
    assert cli.main(asked) == 3
    told = capsys.readouterr().out
    assert "the loss or its gradient is not finite at step" in told
    assert "(1 not finite)" in told
    assert cli.main(asked) == 3
    assert (
        f"not finite in an earlier sitting; to train it again, remove {tmp_path}"
        in capsys.readouterr().out
    )


def test_every_method_has_a_rate_and_asks_for_its_own_losses(monkeypatch):
    asked = {}

    def losses(model, x, label, where, *, parts):
        asked[settings.rule] = where, parts
        raise StopIteration

    monkeypatch.setattr(objectives, "local_losses", losses)
    problem = problem_of(
        load("mnist"), reproduce.EXPERIMENTS["local-mixer"], COLUMNS["mnist-m"].settings
    )
    for name in columns.RULES:
        settings = Entry.parse(name).settings(COLUMNS["mnist-m"], 60_000)
        assert settings.rule == name
        assert all(column.rows[name][0] > 0 for column in COLUMNS.values())
        rule = fx.Backprop()
        gradient = objectives.supervised({}, lambda x: x, settings, 255, rule)
        with pytest.raises(StopIteration):
            gradient(jax.random.key(0), {}, *(x[:2] for x in problem.train))
    ways = {"": "global", "L-": "local", "LG-": "greedy"}
    expected = {
        f"{place}{kind}": (where, "FG" in kind)
        for place, where in ways.items()
        for kind in KINDS
    }
    assert asked == {**expected, "DFA": ("global", False)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rules": ("BQ",)},
            r"There is no rule 'BQ' in Ren et al\. 2023; choose from: BP, L-BP",
        ),
        (
            {"rules": ("BP:4",)},
            r"BP draws no noise, so that 'BP:4' means nothing; write BP\.",
        ),
        (
            {"rules": ("FG-A:cauchy",)},
            r"'FG-A:cauchy': expected a number of noises, one-slope or one of rademacher",
        ),
        (
            {"rules": ("LG-FG-A:4:8",)},
            r"'LG-FG-A:4:8' says twice how many noises, of which kind or",
        ),
        (
            {"rules": ()},
            r"--rules needs at least one method, such as LG-FG-A; without --rules all 16 are run\.",
        ),
        ({"holdout": -5}, r"--holdout must be zero or more, got -5\."),
        ({"seeds": 0}, r"--seeds must be at least 1, got 0\."),
        ({"epochs": 1, "steps": 1}, r"--steps and --epochs both say how long"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(UsageError, match=message):
        reproduce.parse_entries(ReproduceOptions(**options))


def test_an_unknown_column_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["reproduce", "ren2023", "--column", "mnist-xl"])
    assert "cifar-m-contrastive" in capsys.readouterr().err


def test_methods_belong_to_local_mixer_and_other_rules_do_not(capsys):
    assert cli.main(["train", "digits", "--rule", "LG-FG-A"]) == 2
    assert (
        "--rule LG-FG-A says where local losses sit; it belongs to local-mixer"
        in capsys.readouterr().err
    )
    assert cli.main(["train", "local-mixer", "--rule", "backprop"]) == 2
    assert (
        "local-mixer takes the methods of Ren et al. 2023: --rule BP, L-BP"
        in capsys.readouterr().err
    )
    assert cli.main(["train", "digits", "--size", "M/1/16"]) == 2
    assert (
        "--size belongs to local-mixer, but the experiment is digits."
        in capsys.readouterr().err
    )
    assert cli.main(["train", "local-mixer", "--tangents", "guided"]) == 2
    assert "--tangents guided needs a guess of the gradient" in capsys.readouterr().err


def test_held_out_images_stand_in_for_the_test_set():
    data = load("mnist")
    cut = reproduce.prepared(data, ReproduceOptions(holdout=10))
    assert (cut.test_images == data.train_images[-10:]).all()
    assert len(cut.train_images) == 50
    few = reproduce.prepared(data, ReproduceOptions(examples=7))
    assert (len(few.train_images), len(few.test_labels)) == (7, 7)
    with pytest.raises(
        UsageError, match="--holdout must leave images to train on; there are 60 in all"
    ):
        reproduce.prepared(data, ReproduceOptions(holdout=60))


def test_a_columns_batch_is_cut_to_the_images_that_there_are(tmp_path, capsys):
    asked = ["reproduce", "ren2023", "--rules", "BP", "--seeds", "1", "--steps", "2"]
    assert cli.main([*asked, "--examples", "40", "--out", str(tmp_path)]) == 0
    assert "Batches of 40 images, not of 128" in capsys.readouterr().out
    assert cli.main([*asked, "--batch-size", "99", "--out", str(tmp_path / "b")]) == 2
    assert "--batch-size must be at most the 60 examples" in capsys.readouterr().err


def test_the_table_leaves_out_what_is_not_run():
    column = COLUMNS["mnist-m"]
    summary = {
        "finite": True,
        "test_error": 2.0,
        "train_error": 0.5,
        "seconds_per_epoch": 1.2,
        "learning_rate": 0.1,
        "epochs": [1.0],
    }
    lost = {**summary, "finite": False}
    results = {"LG-BP": [summary, {**summary, "test_error": 3.0}, lost]}
    cells = table.make_table(column, [Entry("LG-BP"), Entry("BP")], results).rows
    assert cells[0][:6] == (
        "LG-BP",
        "2.50 ± 0.71 (1 not finite)",
        "0.50 ± 0.00",
        "2.81",
        "0.00",
        "0.1",
    )
    assert cells[1][1:4] == ("-", "-", "2.41")
    assert {len(row) for row in cells} == {len(table.HEADINGS)}
    assert dict(zip(table.HEADINGS, cells[0], strict=True))["epochs"] == "1"


def test_the_picture_has_a_line_for_each_computation():
    from forwax.lab.pictures import reproduction as picture

    summary = {"finite": True, "epochs": [1.0, 2.0], "test_errors": [9.0, 5.0]}
    entries = [Entry("BP"), Entry("L-BP"), Entry("LG-BP"), Entry.parse("FG-A:4")]
    figure = picture.draw(
        COLUMNS["mnist-m"], entries, {"BP": [summary], "LG-BP": [summary, summary]}
    )
    assert [line.get_label() for line in figure.axes[0].get_lines()] == ["BP", "LG-BP"]


def test_contrastive_runs_warm_up_for_the_same_share_of_their_steps():
    column = COLUMNS["cifar-m-contrastive"]
    settings = [
        Entry("BP").settings(column, 50_000, **changes)
        for changes in ({}, {"epochs": 80}, {"steps": 2})
    ]
    assert [each.warm_up for each in settings] == [970, 97, 0]
    assert Entry("BP").settings(COLUMNS["mnist-m"], 60_000).warm_up == 0
    mixer = reproduce.EXPERIMENTS["local-mixer"]
    for given, expected in (
        ({}, 970),
        ({"steps": 800}, 10),
        ({"steps": 800, "warm_up": 3}, 3),
    ):
        assert resolve(mixer, column.name, given, 50_000, 100_000).warm_up == expected


def test_lars_takes_decay_off_the_weights_of_the_backbone_alone():
    make = columns.build_model(COLUMNS["cifar-m-contrastive"].settings)
    params = jax.eval_shape(lambda key: make((4, 4, 1), 10, key), jax.random.key(0))
    chosen = jax.tree.leaves_with_path(optimizers.decayed_by_lars(params))
    decayed = [jax.tree_util.keystr(path) for path, decays in chosen if decays]
    assert decayed == [".blocks[0].dense.weight", ".blocks[0].groups.weight"]
    params = {"w": jax.numpy.ones((2, 2)), "b": jax.numpy.ones(2)}
    optimizer = optimizers.build_optimizer(
        Settings(optimizer="lars", weight_decay=0.5, learning_rate=1.0)
    )
    updates, _ = optimizer.update(
        jax.tree.map(jax.numpy.zeros_like, params), optimizer.init(params), params
    )
    assert [bool(updates[name].any()) for name in params] == [True, False]


def test_settings_follow_size_data_and_objective():
    settings = COLUMNS["mnist-s"].settings
    assert (
        columns.suggested(dataclasses.replace(settings, rule="BP"))[0]
        == COLUMNS["mnist-s"].rows["BP"][0]
    )
    large = dataclasses.replace(
        settings, size="L/8/64", data="cifar10", objective="contrastive"
    )
    assert columns.column_of(large).name == "cifar-l-contrastive"
    assert (
        columns.column_of(dataclasses.replace(settings, data="fashion-mnist")).name
        == "mnist-s"
    )
    make = columns.build_model(large)
    assert jax.eval_shape(
        lambda key: make((4, 4, 1), 10, key).heads[0].weight, jax.random.key(0)
    ).shape == (8, 128)


def test_the_table_holds_what_other_calls_finished_on_the_same_data(tmp_path):
    for name, checksum in (
        ("LG-FG-A_4-0", "a"),
        ("BP-1", "a"),
        ("BP-0", "a"),
        ("FA-0", "held out"),
        ("notes-0", "a"),
    ):
        (tmp_path / name).mkdir()
        write_json(
            tmp_path / name / "config.json",
            {"data_checksum": checksum, "learning_rate": 0.1},
        )
        write_json(
            tmp_path / name / "summary.json",
            SUMMARY | {"test_error": float(name[-1])},
        )
    (tmp_path / "DFA-0").mkdir()  # begun
    entries, results = finished(tmp_path, "a")
    assert [entry.name for entry in entries] == ["BP", "LG-FG-A:4"]
    assert [run["test_error"] for run in results["BP"]] == [0.0, 1.0]
