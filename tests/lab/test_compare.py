"""`forwax compare`: equal budgets, figures that agree with results.json, honest words, resuming."""

import dataclasses
import json
import math
import re
import shutil

import jax
import numpy as np
import pytest

from forwax.lab import cli, style
from forwax.lab.catalogue import names
from forwax.lab.catalogue.settings import Settings
from forwax.lab.commands import compare
from forwax.lab.compare import findings, rates, setup, tables
from forwax.lab.compare.bench import Trial, evaluation_steps
from forwax.lab.compare.setup import CompareOptions
from forwax.lab.flags import UsageError
from forwax.lab.keeping.lock import writing
from forwax.lab.pictures import comparison as picture
from forwax.lab.training import timing
from forwax.lab.training.program import CompiledTraining, build_trainer, scorer

pytestmark = pytest.mark.usefixtures("compile_once")
RULES = ("backprop", "forward", "projection-4")
TINY = CompareOptions(
    rules=RULES,
    steps=12,
    seeds=2,
    search_rates=4,
    evaluations=6,
    validation_examples=100,
    test_examples=300,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compile_once):
    """A tiny comparison, run once: its folder and its results."""
    folder = tmp_path_factory.mktemp("compare") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "BLOCK_SECONDS", 1e-3)
        assert compare.run(dataclasses.replace(TINY, out=folder)) == 0
    return folder, json.loads((folder / "results.json").read_text())


def _cells(markdown: str) -> list[list[str]]:
    lines = [
        line
        for line in markdown.splitlines()
        if line.startswith("| ") and "---" not in line
    ]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_folder_holds_results_table_figure_and_parts(finished):
    folder, results = finished
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "results.json",
        "table.md",
        "comparison.png",
        "parts",
    }
    assert (folder / "comparison.png").stat().st_size > 10_000
    assert list(results["rules"]) == list(RULES)
    assert results["seeds"] == [0, 1]
    assert (
        results["steps"],
        results["validation_examples"],
        results["test_examples"],
    ) == (
        12,
        100,
        300,
    )


def test_every_rule_searches_on_the_same_budget(finished):
    _, results = finished
    for each in results["rules"].values():
        assert [candidate["steps"] for candidate in each["search"]] == [12] * 4
        tried = rates.pairs(each["search"])
        assert len({rate for rate, _ in tried}) == 4
        assert each["learning_rate"] == rates.best_rate(tried)
        assert {run["learning_rate"] for run in each["runs"]} == {each["learning_rate"]}
        told = next(
            note
            for note in tables.notes(results)
            if note.startswith(f"{each['about']} tried")
        )
        assert all(tables.number(rate) in told for rate, _ in tried)


def test_the_table_tells_the_figures_of_the_results(finished):
    folder, results = finished
    cells = _cells((folder / "table.md").read_text())
    assert tuple(cells[0]) == tables.COLUMNS
    reference = results["rules"]["backprop"]["seconds_per_step"]
    for row, each in zip(cells[1:4], results["rules"].values(), strict=True):
        accuracies = [run["test_accuracy"] for run in each["runs"]]
        assert row[0] == each["about"]
        assert float(row[1].removesuffix(" (edge)")) == pytest.approx(
            each["learning_rate"], rel=0.06
        )
        assert float(row[2]) == pytest.approx(
            np.mean([run["train_loss"] for run in each["runs"]]), rel=5e-3
        )
        mean, deviation = re.match(r"([\d.]+) ± ([\d.]+) %", row[3]).groups()
        assert float(mean) == pytest.approx(100 * np.mean(accuracies), abs=0.051)
        assert float(deviation) == pytest.approx(
            100 * np.std(accuracies, ddof=1), abs=0.051
        )
        assert float(row[4]) == pytest.approx(1000 * each["seconds_per_step"], rel=5e-3)
        assert float(row[5]) == pytest.approx(
            each["seconds_per_step"] / reference, abs=5.1e-3
        )
        assert float(row[6]) == pytest.approx(
            each["temporary_bytes"] / 2**20, abs=0.051
        )
        assert row[7] == tables.number(each["steps_to_target"])
    assert tuple(cells[4]) == tables.RATIO_COLUMNS
    for row, each in zip(cells[5:], results["rules"].values(), strict=True):
        assert float(row[1]) == pytest.approx(
            each["seconds_per_step"] / results["loss_seconds"], abs=5.1e-3
        )


def test_the_default_target_is_reached_by_every_rule(finished):
    _, results = finished
    assert all(
        isinstance(each["steps_to_target"], int) for each in results["rules"].values()
    )
    assert "the slowest rule" in results["target_is"]


def test_all_rules_start_from_the_same_loss_and_the_best_rate_was_not_chosen_on_the_test_set(
    finished,
):
    _, results = finished
    for seed in results["seeds"]:
        first = {
            each["runs"][seed]["validation_losses"][0]
            for each in results["rules"].values()
        }
        assert max(first) - min(first) < 1e-5
    losses = {each["runs"][0]["test_loss"] for each in results["rules"].values()}
    assert losses.isdisjoint(
        {
            candidate["validation_loss"]
            for each in results["rules"].values()
            for candidate in each["search"]
        }
    )


def test_a_rerun_skips_what_is_finished(finished, monkeypatch, capsys):
    folder, results = finished

    def refuse(*args, **kwargs):
        raise AssertionError("a finished part was done again")

    monkeypatch.setattr("forwax.lab.compare.bench.CompiledTraining", refuse)
    assert compare.run(CompareOptions(resume=folder)) == 0
    again = json.loads((folder / "results.json").read_text())
    assert again == results
    assert f"Results, table and figure: {folder}" in capsys.readouterr().out


def _stop(*args):
    raise KeyboardInterrupt


def test_ctrl_c_keeps_what_is_finished_and_resume_does_the_rest(
    finished, tmp_path, monkeypatch, capsys
):
    folder = shutil.copytree(finished[0], tmp_path / "stopped")
    (folder / "results.json").unlink()
    (folder / "parts" / "run-forward-1.json").unlink()
    kept = {path.name: path.read_bytes() for path in (folder / "parts").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(compare.Bench, "run", _stop)
        assert compare.run(CompareOptions(resume=folder)) == 130
    assert f"forwax compare --resume {folder}" in capsys.readouterr().out
    assert not (folder / "results.json").exists()
    assert compare.run(CompareOptions(resume=folder)) == 0
    assert all(
        (folder / "parts" / name).read_bytes() == content
        for name, content in kept.items()
    )
    ours = json.loads((folder / "results.json").read_text())["rules"]["forward"]
    np.testing.assert_allclose(
        ours["curve"]["validation_losses"],
        finished[1]["rules"]["forward"]["curve"]["validation_losses"],
        rtol=1e-5,
    )


@pytest.fixture(scope="module")
def program(compile_once):
    """The compiled program of a forward-gradient rule on digits, and its validation part."""
    problem = setup.build_problem(setup.find_experiment("digits"), Settings())
    problem, validation = setup.hold_out(problem, None)
    settings = Settings(
        num_tangents=2, learning_rate=1.0, schedule="cosine", steps=20, batch_size=64
    )
    return CompiledTraining(problem, settings, jax.device_put(problem.train)), scorer(
        problem, validation
    )


def test_one_program_serves_every_rate_and_seed_as_forwax_train_would_run_them(program):
    made, score = program
    history = Trial(made, 0.01, 3, score, [0, 10, 20]).train()
    params = history.trainer.state.params
    trainer = build_trainer(
        made.problem, dataclasses.replace(made.settings, learning_rate=0.01, seed=3)
    )
    np.testing.assert_allclose(history.losses, trainer.run(20).losses, rtol=1e-4)
    for ours, theirs in zip(
        jax.tree.leaves(params), jax.tree.leaves(trainer.state.params), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    assert history.validated == [0, 10, 20]


def test_a_model_that_does_not_loop_well_makes_one_step_a_call_with_the_same_result(
    program, monkeypatch
):
    made, score = program
    monkeypatch.setattr("forwax.lab.training.program.loops_well", lambda problem: False)
    monkeypatch.setattr(timing, "loops_well", lambda problem: False)
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 1e-3)
    single = CompiledTraining(made.problem, made.settings, made.data)
    ours, theirs = (
        Trial(each, 0.01, 3, score, [0, 5]).train() for each in (single, made)
    )
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-4)
    assert len(ours.losses) == 5
    assert set(timing.measure({"forward": single}, rounds=1)) == {"loss", "forward"}


def test_a_run_that_explodes_ends_at_its_last_finite_step(program):
    made, score = program
    history = Trial(made, 1e30, 0, score, [0, 20]).train()
    params = history.trainer.state.params
    assert not history.finite
    assert history.validated == [0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_the_search_extends_beyond_an_edge_and_then_refines():
    optimum = 40.0
    found = rates.search(
        1.0,
        7,
        lambda i, rate: {
            "learning_rate": rate,
            "validation_loss": abs(math.log(rate / optimum)),
            "steps": 1,
        },
    )
    tried = [each["learning_rate"] for each in found]
    np.testing.assert_allclose(tried[:5], [1, 10**0.5, 10, 10**1.5, 100], rtol=1e-6)
    assert abs(math.log(rates.best_rate(rates.pairs(found)) / optimum)) < 0.3
    assert rates.edge_note(found) is None


@pytest.mark.parametrize(("losses", "note"), [
    ([0.5, 0.4, 0.3], "the largest rate tried was the best: a larger one may be better still"),
    ([0.3, 0.4, None], "the smallest rate tried was the best: a smaller one may be better still"),
    ([None, None, None], "no rate stayed finite"),
    ([0.4, 0.3, None], None),
])  # fmt: skip
def test_a_choice_at_an_edge_is_told(losses, note):
    found = [
        {"learning_rate": rate, "validation_loss": loss, "steps": 1}
        for rate, loss in zip((1.0, 3.0, 10.0), losses, strict=True)
    ]
    assert rates.edge_note(found) == note


def test_a_rate_that_turns_non_finite_loses_and_smaller_ones_are_tried():
    limit = 0.05
    found = rates.search(
        1.0,
        5,
        lambda i, rate: {
            "learning_rate": rate,
            "validation_loss": None if rate > limit else 1 / rate,
            "steps": 1,
        },
    )
    assert found[-1]["learning_rate"] == pytest.approx(0.1**1.5)
    assert rates.best_rate([(1.0, math.inf), (0.3, 5.0)]) == 0.3


def _run(losses, steps=(0, 5, 10), finite=True, accuracy=0.9):
    return {
        "learning_rate": 0.1,
        "steps": list(steps),
        "validation_losses": list(losses),
        "train_loss": 0.5,
        "test_accuracy": accuracy,
        "finite": finite,
    }


def _gathered(runs, target_loss=None):
    rules = names.parse_all(tuple(runs))
    seconds = {"loss": [0.5, 1.0, 1.5], "backprop": [2.0] * 3, "forward": [4.0] * 3}
    timing = {
        "seconds": seconds,
        "temporary_bytes": {"backprop": 2**20, "forward": None},
    }
    results = findings.gather(rules, timing, {}, runs, target_loss)
    facts = {
        "experiment": "digits",
        "num_parameters": 10,
        "steps": 10,
        "batch_size": 1,
        "seeds": [0],
        "search": None,
    }
    return facts | results


def test_what_is_not_reached_gets_no_number():
    results = _gathered(
        {"backprop": [_run([2.0, 0.4, 0.3])], "forward": [_run([2.0, 1.5, 0.9])]},
        target_loss=0.5,
    )
    forward, reference = results["rules"]["forward"], results["rules"]["backprop"]
    assert (reference["steps_to_target"], reference["seconds_to_target"]) == (5, 10.0)
    assert (forward["steps_to_target"], forward["seconds_to_target"]) == (
        "not reached",
        "not reached",
    )
    assert (reference["T_ratio"], forward["T_ratio"]) == (1.0, "not reached")
    assert "not reached" in tables.markdown(results)


def test_the_papers_ratios():
    results = _gathered(
        {"backprop": [_run([2.0, 0.4, 0.5])], "forward": [_run([2.0, 0.6, 0.39])]}
    )
    forward, reference = results["rules"]["forward"], results["rules"]["backprop"]
    assert (reference["R"], forward["R"]) == (2.0, 4.0)
    # backprop is at its best, 0.4, after 5 steps of 2 s; the forward gradient is there after 10
    # steps of 4 s
    assert forward["T_ratio"] == 4.0
    assert [row[1:] for row in tables.ratio_rows(results)] == [
        ("2.00", "1.000", "1.00"),
        ("4.00", "2.000", "4.00"),
    ]
    assert results["target_loss"] == 0.5


def test_without_backprop_there_is_nothing_to_compare_with():
    results = _gathered({"forward": [_run([2.0, 1.5, 0.9])]})
    assert results["rules"]["forward"]["time_ratio"] is None
    assert tables.ratio_rows(results)[0][2:] == ("-", "-")


def test_a_run_that_is_not_finite_neither_sets_the_target_nor_hides():
    runs = [_run([2.0, 1.0, 0.5]), _run([2.0], steps=(0,), finite=False)]
    results = _gathered({"backprop": [_run([2.0, 0.4, 0.3])] * 2, "forward": runs})
    assert results["target_loss"] == 0.3
    assert results["rules"]["forward"]["curve"]["validation_losses"] == [
        2.0,
        None,
        None,
    ]
    assert "1 of 2 runs turned non-finite" in tables.markdown(results)
    assert "0.500 (1 not finite)" in tables.markdown(results)
    figure = picture.draw(results)
    assert len(figure.axes) == 2
    assert "(1 of 2 not finite)" in figure.axes[0].get_legend_handles_labels()[1][1]


def test_runs_that_end_no_lower_than_they_began_are_marked():
    runs = [_run([2.0, 1.0, 0.5]), _run([2.0, 9.0, 2.0]), _run([2.0, 9.0, None])]
    results = _gathered({"backprop": [_run([2.0, 0.4, 0.3])] * 3, "forward": runs})
    assert results["rules"]["backprop"]["diverged"] == 0
    assert results["rules"]["forward"]["diverged"] == 2
    table = tables.markdown(results)
    assert "0.500 (2 diverged)" in table
    assert (
        "2 of 3 runs diverged: their validation loss ended no lower than it began."
        in table
    )
    assert table.count("diverged") == 2


def test_losses_that_lie_close_get_a_linear_axis():
    close, far = [_run([2.0, 1.5, 1.0])], [_run([2.0, 0.4, 0.1])]
    assert picture.draw(_gathered({"forward": close})).axes[0].get_yscale() == "linear"
    assert picture.draw(_gathered({"forward": far})).axes[0].get_yscale() == "log"
    low, high = (
        picture.draw(_gathered({"forward": [_run([2.0] * 3)]})).axes[0].get_ylim()
    )
    assert low < 2.0 < high


def test_a_target_far_from_the_losses_leaves_them_their_room(tmp_path):
    results = _gathered({"forward": [_run([2.0, 1.99, 1.98])]})
    results["target_loss"] = 60.0
    figure = picture.draw(results)
    style.save(figure, tmp_path / "figure.png")  # layout warns of axes without room
    assert figure.axes[0].get_position().height > 0.5


def test_evaluations_begin_at_the_start_and_end_at_the_last_step():
    for steps in (1, 7, 300):
        found = evaluation_steps(steps, 20)
        assert (found[0], found[-1]) == (0, steps)
        assert found == sorted(set(found))


def test_the_papers_rates_are_used_without_a_search(tmp_path, tiny_data, monkeypatch):
    timing = {
        "seconds": {
            "loss": [1.0],
            "backprop": [2.0],
            "forward-normal": [3.0],
            "forward": [2.5],
        }
    }
    timing["temporary_bytes"] = dict.fromkeys(timing["seconds"])
    monkeypatch.setattr(compare.Bench, "timing", lambda self: timing)
    monkeypatch.setattr(
        compare.Bench,
        "run",
        lambda self, name, rate, seed: _run([2.0, 1.0, 0.5]) | {"learning_rate": rate},
    )
    options = CompareOptions(
        experiment="mnist-logistic", paper=True, batch_size=4, out=tmp_path / "paper"
    )
    assert compare.run(options) == 0
    results = json.loads((tmp_path / "paper" / "results.json").read_text())
    assert list(results["rules"]) == ["backprop", "forward-normal", "forward"]
    assert {each["learning_rate"] for each in results["rules"].values()} == {1e-4}
    assert (results["search"], results["steps"]) == (None, 25_000)
    assert results["settings"]["forward-normal"]["tangents"] == "normal"
    assert results["settings"]["backprop"]["schedule"] == "exponential"
    assert "No rate was searched" in (tmp_path / "paper" / "table.md").read_text()


@pytest.mark.parametrize(("words", "sentence"), [
    (["--rules", "magic"], "There is no rule 'magic'; choose --rules from: backprop, forward,"),
    (["--rules", "backprop-3"], "There is no rule 'backprop-3'"),
    (["--rules", "forward", "forward"], "--rules names forward twice; name each rule once."),
    (["--steps", "0"], "--steps must be at least 1, got 0."),
    (["--target-loss", "-1"], "--target-loss must be a positive number, got -1.0."),
    (["--validation-examples", "1437"], "--validation-examples must be from 1 to 1436, got 1437."),
    (["--config", "nonsense"], "digits has no configuration 'nonsense'. Choose --config from: "
                               "default."),
    (["mnist-cnn", "--paper"], "its learning rate and iterations were not found in the paper"),
    (["--resume", "nowhere"], "nowhere is not the folder of a run"),
    (["--resume", "nowhere", "--steps", "3"], "--resume takes every setting from the comparison's "
                                              "config.json"),
])  # fmt: skip
def test_mistakes_get_one_sentence_and_exit_code_2(
    words, sentence, tmp_path, tiny_data, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_another_comparison_is_not_overwritten(finished, capsys):
    folder, _ = finished
    with pytest.raises(
        UsageError,
        match="holds a comparison already; choose another --out, or --resume",
    ):
        compare.run(dataclasses.replace(TINY, out=folder))


def test_every_named_rule_can_be_built():
    experiment = setup.find_experiment("digits")
    problem = setup.build_problem(experiment, Settings())
    for name in names.LINES:
        rule = names.parse(name)
        settings = setup._settings(CompareOptions(), experiment, rule, problem)
        assert settings.learning_rate is not None
        assert settings.rule == rule.given["rule"]
        assert "{k}" not in rule.about


def test_the_help_names_every_rule(capsys):
    with pytest.raises(SystemExit):
        cli.main(["compare", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in names.LINES)


def _edited(folder, path, **changes):
    """A copy of a comparison in which a file was edited, its seal as it was."""
    copy = shutil.copytree(folder, path)
    value = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(value))
    return copy


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"search_rates": 9},
            "config.json was changed since forwax wrote it: search_rates was",
        ),
        ({"seeds": "two"}, "config.json: seeds must be a whole number, got 'two'."),
        (
            {"experiment": "cats"},
            "config.json: experiment must be one of cifar10-cnn, digits, ",
        ),
        (
            {"rules": "backprop"},
            "config.json: rules must be a list of text, got 'backprop'.",
        ),
    ],
    ids=str,
)
def test_an_edited_comparison_is_refused(finished, tmp_path, changes, told):
    folder = _edited(finished[0], tmp_path / "edited", **changes)
    with pytest.raises(UsageError) as caught:
        compare.run(CompareOptions(resume=folder))
    assert told in str(caught.value)


def test_a_damaged_part_is_named(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "damaged")
    part = folder / "parts" / "run-forward-1.json"
    part.write_text(part.read_text().replace('"test_loss": ', '"test_loss": 1'))
    with pytest.raises(UsageError) as caught:
        compare.run(CompareOptions(resume=folder))
    assert str(caught.value) == (
        f"{part} is not what forwax wrote: its content and its sum differ. Undo the change, or "
        "remove it, and it is made again."
    )


def test_one_process_writes_a_comparison(finished):
    folder, _ = finished
    with (
        writing(folder),
        pytest.raises(UsageError, match="written to by another process"),
    ):
        compare.run(CompareOptions(resume=folder))
