"""Training runs: what they leave, that they go on bit for bit, and how they stop."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwax as fx
from forwax.lab.catalogue import experiments
from forwax.lab.catalogue import rules as choices
from forwax.lab.catalogue.experiments import Experiment
from forwax.lab.catalogue.options import resolve
from forwax.lab.catalogue.settings import Settings
from forwax.lab.commands import train
from forwax.lab.commands.train import TrainOptions
from forwax.lab.data import DataSet
from forwax.lab.flags import UsageError
from forwax.lab.keeping.checkpoints import Checkpoints
from forwax.lab.keeping.folder import CHECKPOINTS, CONFIG, Run
from forwax.lab.keeping.metrics import METRICS
from forwax.lab.report import write_json
from forwax.lab.training.problem import Task, problem_of
from forwax.lab.training.program import (
    MAX_BLOCK,
    Trainer,
    build_trainer,
    loops_well,
    scorer,
)
from forwax.lab.training.step import init_state, make_step
from forwax.models import MLP, Conv

pytestmark = pytest.mark.usefixtures("compile_once")
STEPS = 60
TINY = Experiment(
    name="tiny",
    data_set="tiny",
    model=lambda shape, classes, key: MLP(9, (4,), classes, key=key),
    # momentum, so that the optimizer has a state to lose
    configurations={
        "default": Settings(
            num_tangents=4,
            optimizer="momentum",
            batch_size=4,
            steps=STEPS,
            eval_every=25,
        )
    },
    effective_dimension=4,
)


def tiny_data(seed=0):
    """Three classes of 3×3 images; 22 to train on, so that an epoch has 5 steps of 4."""
    draw = np.random.default_rng(seed)
    labels = (np.arange(31) % 3).astype(np.int32)
    images = (
        draw.integers(0, 80, (31, 3, 3, 1)) + 80 * labels[:, None, None, None]
    ).astype(np.uint8)
    return DataSet(
        "tiny",
        images[:22],
        labels[:22],
        images[22:],
        labels[22:],
        3,
        ("a", "b", "c"),
        255,
    )


@pytest.fixture(autouse=True)
def tiny_experiment(monkeypatch):
    monkeypatch.setattr(
        "forwax.lab.training.problem.load", lambda name, data_dir: tiny_data()
    )
    monkeypatch.setitem(experiments.EXPERIMENTS, "tiny", TINY)
    # the picture has tests of its own, and takes longer than these runs
    monkeypatch.setattr(
        "forwax.lab.style.save", lambda figure, path: path.write_bytes(b"curves")
    )


def trainer(**given):
    settings = resolve(TINY, "default", given, num_examples=22, num_parameters=55)
    return build_trainer(problem_of(tiny_data(), TINY, settings), settings)


def start(folder, **options):
    return train.run(TrainOptions(experiment="tiny", runs=folder, **options))


def resume(path):
    return train.run(TrainOptions(resume=path))


def only_run(folder) -> Run:
    (path,) = folder.iterdir()
    return Run.open(path)


def copy_without(run, folder, *names):
    """A copy of a run's folder that lacks some of its parts."""
    path = folder / run.path.name
    shutil.copytree(run.path, path, ignore=lambda parent, inside: names)
    return Run.open(path)


def final_state(run):
    settings = Settings.from_dict(run.config)
    checkpoints = Checkpoints(run.path / CHECKPOINTS)
    checkpoint = checkpoints.restore(
        init_state(problem_of(tiny_data(), TINY, settings), settings)
    )
    checkpoints.close()
    assert checkpoint is not None
    return checkpoint.state


def without_times(rows):
    return [
        {name: value for name, value in row.items() if name != "seconds"}
        for row in rows
    ]


def assert_same_run(run, other):
    same = jax.tree.map(np.array_equal, final_state(run), final_state(other))
    assert jax.tree.all(same), same
    assert without_times(run.metrics()) == without_times(other.metrics())


@pytest.fixture(scope="module")
def reference(tmp_path_factory, compile_once):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "forwax.lab.training.problem.load", lambda name, data_dir: tiny_data()
        )
        patch.setitem(experiments.EXPERIMENTS, "tiny", TINY)
        assert start(folder) == 0
    return only_run(folder)


@pytest.fixture
def signal_after(monkeypatch):
    """A function that lets a real signal arrive while the block that reaches a step is running."""

    def arrange(step, number=signal.SIGINT):
        plain = Trainer.run

        def run(self, count):
            block = plain(self, min(count, 7))
            if self.step >= step:
                signal.raise_signal(number)
            return block

        monkeypatch.setattr(Trainer, "run", run)
        return lambda: monkeypatch.setattr(Trainer, "run", plain)

    return arrange


def test_what_a_run_leaves(reference):
    names = {path.name for path in reference.path.iterdir()}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "curves.png",
        "summary.json",
    }
    assert reference.config["rule"] == "weight"
    summary, rows = reference.summary(), reference.metrics()
    assert 0 <= summary["test_accuracy"] <= 1
    assert summary["rule"] == "weight"
    assert summary["reverse_mode"] is False
    assert summary["num_parameters"] == 55
    assert summary["steps"] == STEPS
    assert summary["compiled_temporary_bytes"] > 0
    assert summary["steps_per_second"] * summary["seconds"] == pytest.approx(STEPS)
    assert summary["learning_rate"] == reference.config["learning_rate"]
    assert {"forwax", "jax", "python"} <= set(summary["versions"])
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    tests = [row for row in rows if "test_accuracy" in row]
    assert [row["step"] for row in tests] == [25, 50, 60]
    assert tests[-1]["test_accuracy"] == summary["test_accuracy"]
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert (reference.path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_training_lowers_the_loss(reference):
    losses = [row["loss"] for row in reference.metrics() if "loss" in row]
    assert np.mean(losses[-15:]) < 0.8 * np.mean(losses[:15])


def test_the_cut_into_blocks_does_not_matter():
    whole, cut, single = trainer(), trainer(), trainer()
    losses = whole.run(17).losses
    pieces = [cut.run(count).losses for count in (3, 1, 6, 7)]
    singles = [single.run(1).losses for _ in range(17)]
    np.testing.assert_array_equal(np.concatenate(pieces), losses)
    np.testing.assert_array_equal(np.concatenate(singles), losses)
    for other in (cut, single):
        assert jax.tree.all(jax.tree.map(np.array_equal, other.state, whole.state))


def test_an_epoch_sees_every_example_once_and_the_next_in_another_order(monkeypatch):
    seen = []

    def spy(problem, settings):
        def step(state, images, labels):
            jax.debug.callback(
                lambda x: seen.append(np.asarray(x)),
                images.reshape(4, -1)[:, 0],
                ordered=True,
            )
            return (
                state._replace(step=state.step + 1),
                jnp.float32(0),
                jnp.float32(0),
                jnp.bool(True),
            )

        return step

    monkeypatch.setattr("forwax.lab.training.program.make_step", spy)
    data = tiny_data()
    data.train_images[:, 0, 0, 0] = np.arange(22)
    settings = resolve(TINY, "default", {}, num_examples=22, num_parameters=55)
    build_trainer(problem_of(data, TINY, settings), settings).run(10)
    jax.effects_barrier()
    first, second = np.concatenate(seen[:5]), np.concatenate(seen[5:])
    assert len(set(first.tolist())) == len(set(second.tolist())) == 20
    assert not np.array_equal(first, second)


def test_steps_outside_a_loop_are_the_same(monkeypatch):
    """Networks with convolutions run step by step on a CPU."""
    looped = trainer()
    expected = looped.run(12)
    monkeypatch.setattr("forwax.lab.training.program.loops_well", lambda problem: False)
    single = trainer()
    assert single._call(12).losses.shape == (1,)
    got = single.run(11)
    np.testing.assert_allclose(got.losses, expected.losses[1:], rtol=1e-5)
    assert got.stopped_by is None
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        single.state,
        looped.state,
    )


def test_only_convolutions_run_step_by_step():
    problem = problem_of(tiny_data(), TINY, Settings())
    assert loops_well(problem)
    convolve = dataclasses.replace(
        TINY, model=lambda shape, classes, key: Convolve(key)
    )
    assert loops_well(problem_of(tiny_data(), convolve, Settings())) == (
        jax.default_backend() != "cpu"
    )


class Convolve(eqx.Module):
    """A convolution and a sum."""

    conv: Conv

    def __init__(self, key):
        self.conv = Conv(1, 3, size=3, key=key)

    def __call__(self, x):
        return self.conv(x).sum((0, 1))


@pytest.mark.parametrize(
    "rule", ["activity", "feedback", "direct-feedback", "learned-feedback"]
)
def test_rules_on_sites_lower_the_loss(rule):
    losses = trainer(rule=rule, steps=400).run(400).losses
    assert losses[-40:].mean() < 0.8 * losses[:40].mean()


def test_gauss_newton_is_at_its_end_after_few_steps():
    one = trainer(rule="gauss-newton", steps=60)
    settings = one.program.settings
    assert (settings.num_tangents, settings.schedule) == (64, "cosine")
    assert settings.learning_rate == 0.5
    losses = one.run(60).losses
    assert losses[-20:].mean() < 0.2 * losses[:3].mean()


def test_feedback_is_drawn_once_and_follows_the_seed():
    one = trainer(rule="feedback")
    before = jax.tree.map(np.asarray, one.state.guess)
    assert (
        len(jax.tree.leaves(before)) == 2
    )  # the two matrices; biases are their own feedback
    one.run(5)
    jax.tree.map(np.testing.assert_array_equal, before, one.state.guess)
    jax.tree.map(
        np.testing.assert_array_equal, before, trainer(rule="feedback").state.guess
    )
    other = jax.tree.leaves(trainer(rule="feedback", seed=1).state.guess)
    assert not np.array_equal(jax.tree.leaves(before)[0], other[0])


def test_remembered_slopes_are_checkpointed_bit_for_bit(tmp_path):
    one = trainer(clip_slopes=1.0)
    one.run(15)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(one.state, seconds=1.0)
    problem, settings = one.program.problem, one.program.settings
    state = checkpoints.restore(
        jax.eval_shape(lambda: init_state(problem, settings))
    ).state
    checkpoints.close()
    assert int(state.slopes.num_steps) == 15
    assert int(state.slopes.num_clipped) > 0
    again = one.program.start(one.learning_rate, one.seed, state)
    for each in (one, again):
        each.run(10)
    jax.tree.map(np.testing.assert_array_equal, again.state, one.state)


def test_a_block_has_limits():
    one = trainer()
    for count in (0, MAX_BLOCK + 1):
        with pytest.raises(
            ValueError, match=f"a block has 1 to {MAX_BLOCK} steps, got {count}"
        ):
            one.run(count)


def test_the_evaluation_counts_every_test_example_once(monkeypatch):
    monkeypatch.setattr("forwax.lab.training.program.EVALUATION_BATCH", 4)
    one = trainer()
    problem = one.program.problem
    loss, accuracy = scorer(problem, problem.test)(one.state.params)
    images, labels = problem.test
    assert len(images) == 9
    losses, correct = jax.vmap(problem.loss, (None, 0, 0))(
        one.state.params, images, labels
    )
    assert loss == pytest.approx(float(losses.mean()), rel=1e-5)
    assert accuracy == pytest.approx(float(correct.mean()))


@pytest.mark.parametrize("rule", ["weight", "exact", "finite-difference", "backprop"])
def test_only_backprop_transposes(rule):
    settings = resolve(
        TINY, "default", {"rule": rule}, num_examples=22, num_parameters=55
    )
    problem = problem_of(tiny_data(), TINY, settings)
    batch = problem.train[0][:4], problem.train[1][:4]
    text = (
        jax.jit(make_step(problem, settings))
        .lower(init_state(problem, settings), *batch)
        .as_text(debug_info=True)
    )
    # JAX writes the transformations that made an operation into its name
    assert ("transpose(" in text) == (rule == "backprop")
    assert ("jvp(" in text) == (rule != "finite-difference")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_signal_ends_the_block_and_the_run_goes_on_bit_for_bit(
    reference, tmp_path, capsys, signal_after, number, code
):
    undo = signal_after(30, number)
    before = signal.getsignal(number)
    assert start(tmp_path) == code
    assert signal.getsignal(number) is before
    undo()
    run = only_run(tmp_path)
    stopped_at = int(final_state(run).step)
    assert 30 <= stopped_at < STEPS
    assert (
        f"Stopped at step {stopped_at} of 60; go on with: forwax train --resume {run.path}"
        in capsys.readouterr().out
    )
    assert not run.finished
    assert resume(run.path) == 0
    assert (
        f"Going on with {run.path} from step {stopped_at} of 60."
        in capsys.readouterr().out
    )
    assert_same_run(run, reference)


def test_what_a_rule_has_learnt_is_kept_and_goes_on_bit_for_bit(
    tmp_path, monkeypatch, signal_after
):
    def model(shape, classes, key):
        return MLP(9, (4, 4), classes, key=key)  # its second layer has a map

    monkeypatch.setitem(
        experiments.EXPERIMENTS, "tiny", dataclasses.replace(TINY, model=model)
    )
    monkeypatch.setattr(f"{__name__}.TINY", experiments.EXPERIMENTS["tiny"])
    assert start(tmp_path / "whole", rule="learned-feedback") == 0
    whole = only_run(tmp_path / "whole")
    (learnt,) = final_state(whole).guess.direct
    assert np.any(learnt != 0)
    undo = signal_after(30)
    assert start(tmp_path / "parts", rule="learned-feedback") == 130
    undo()
    run = only_run(tmp_path / "parts")
    assert resume(run.path) == 0
    assert_same_run(run, whole)


def test_metrics_past_the_checkpoint_and_torn_lines_are_cut(
    reference, tmp_path, signal_after
):
    undo = signal_after(30)
    start(tmp_path)
    undo()
    run = only_run(tmp_path)
    with (run.path / METRICS).open("ab") as file:
        file.write(b'{"step": 37, "loss": 1.0}\n{"step": 38')
    assert resume(run.path) == 0
    assert_same_run(run, reference)


@pytest.mark.parametrize("lost", [["summary.json"], ["summary.json", CHECKPOINTS]])
def test_a_kill_after_the_last_step_or_before_the_first_checkpoint(
    reference, tmp_path, lost
):
    run = copy_without(reference, tmp_path, *lost)
    assert resume(run.path) == 0
    assert run.summary()["test_accuracy"] == reference.summary()["test_accuracy"]
    assert_same_run(run, reference)


def test_a_finished_run_says_so(reference, capsys):
    before = (reference.path / METRICS).read_bytes()
    assert resume(reference.path) == 0
    accuracy = reference.summary()["test_accuracy"]
    assert (
        capsys.readouterr().out
        == f"{reference.path} is finished already: test accuracy {accuracy:.1%}.\n"
    )
    assert (reference.path / METRICS).read_bytes() == before


def test_changed_data_are_refused(reference, tmp_path, monkeypatch):
    run = copy_without(reference, tmp_path, "summary.json")
    monkeypatch.setattr(
        "forwax.lab.training.problem.load", lambda name, data_dir: tiny_data(seed=1)
    )
    with pytest.raises(
        UsageError,
        match=r"The data set tiny is not the one that .* was trained on \(its checksum differs\)",
    ):
        resume(run.path)


def test_resume_takes_no_settings(reference):
    with pytest.raises(
        UsageError, match=r"--resume takes every setting from the run's config\.json"
    ):
        train.run(TrainOptions(resume=reference.path, steps=100))


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path, capsys):
    code = start(tmp_path, learning_rate=1e30)
    assert code == 3
    run = only_run(tmp_path)
    state, rows = final_state(run), run.metrics()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert [row["step"] for row in rows if "loss" in row] == list(
        range(1, int(state.step) + 1)
    )
    out = capsys.readouterr().out
    assert f"Step {int(state.step) + 1} was not made because its " in out
    for advice in (
        "smaller --learning-rate (say ",
        "more --num-tangents (it was 4)",
        "or --combine projection.",
    ):
        assert advice in out
    # resumed, it stops at the same place
    assert resume(run.path) == 3
    assert int(final_state(run).step) == int(state.step)


def step_of(loss, **given):
    """The state before and after one step of another loss, and whether it was made."""
    settings = resolve(
        TINY,
        "default",
        {"learning_rate": 0.1} | given,
        num_examples=22,
        num_parameters=55,
    )

    class Other(Task):
        """The same, with another loss."""

    Other.loss = staticmethod(loss)
    problem = Other(**vars(problem_of(tiny_data(), TINY, settings)))
    state = init_state(problem, settings)
    after, _, _, finite = jax.jit(make_step(problem, settings))(
        state, problem.train[0][:4], problem.train[1][:4]
    )
    return state, after, bool(finite)


def bad_slope(params, x, y):
    """Its value is zero, its slope at zero infinite."""
    return jnp.sqrt(0 * params.layers[0].bias[0]), y == 0


def test_a_gradient_that_is_not_finite_stops_as_well():
    before, after, made = step_of(bad_slope)
    assert not made
    assert jax.tree.all(jax.tree.map(np.array_equal, after, before))


def test_a_slope_that_is_not_finite_can_be_skipped_a_loss_cannot():
    before, after, made = step_of(bad_slope, skip_bad_slopes=True)
    assert made
    assert jax.tree.all(jax.tree.map(np.array_equal, after.params, before.params))
    assert (
        int(after.step),
        int(after.slopes.num_skipped),
        int(after.slopes.num_steps),
    ) == (
        1,
        4,
        0,
    )
    *_, made = step_of(
        lambda params, x, y: (jnp.nan * params.layers[0].bias[0], y == 0),
        skip_bad_slopes=True,
    )
    assert not made


def test_what_slopes_tell_is_in_the_metrics(tmp_path, capsys):
    assert (
        start(tmp_path, clip_slopes=1.0, skip_bad_slopes=True, steps=30, eval_every=15)
        == 0
    )
    assert (
        "clipped at 1 running medians, skipped where they are not finite."
        in capsys.readouterr().out
    )
    run = only_run(tmp_path)
    tests = [row for row in run.metrics() if "test_loss" in row]
    assert [row["step"] for row in tests] == [15, 30]
    settings, state = Settings.from_dict(run.config), final_state(run)
    found = fx.Safe(choices.build_rule(settings), history=state.slopes).monitor(55)
    for name in (
        "gradient_norm",
        "relative_mse",
        "cosine",
        "num_clipped",
        "num_skipped",
    ):
        assert tests[-1][name] == pytest.approx(float(getattr(found, name)))
    assert tests[-1]["gradient_norm"] > 0
    assert tests[-1]["relative_mse"] == pytest.approx(54 / 4)
    assert tests[-1]["num_clipped"] > 0


def test_float64_runs_in_float64(tmp_path, capsys):
    assert start(tmp_path, dtype="float64", steps=3) == 0
    with jax.enable_x64(True):
        assert {
            leaf.dtype.name
            for leaf in jax.tree.leaves(final_state(only_run(tmp_path)).params)
        } == {"float64"}


CHILD = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import importlib.util
spec = importlib.util.spec_from_file_location("tiny_child", {file!r})
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
from forwax.lab import cli
from forwax.lab.catalogue import experiments
from forwax.lab.training import folder, progress, session
from forwax.lab.commands import train
import forwax.lab.training.problem
forwax.lab.training.problem.load = lambda name, data_dir: tests.tiny_data()
experiments.EXPERIMENTS["tiny"] = tests.TINY
progress.SECONDS_BETWEEN_LINES = 0.0
session.BLOCK_SECONDS = 0.0
{extra}
sys.exit(train.run(train.TrainOptions({options})))
"""

KILL_IN_METRICS = """
plain = folder.Metrics.append
def append(self, rows):
    rows = list(rows)
    if rows[0]["step"] == {step}:
        os.write(self._file, b'{{"step": {step}, "lo')
        os.kill(os.getpid(), signal.SIGKILL)
    plain(self, rows)
folder.Metrics.append = append
"""

KILL_IN_CHECKPOINT = """
plain = os.rename
def rename(a, b, *args, **kwargs):
    if str(b).endswith("/{step}"):
        os.kill(os.getpid(), signal.SIGKILL)
    plain(a, b, *args, **kwargs)
os.rename = rename
"""

KILL_AFTER_CHECKPOINT = """
plain = folder.Checkpoints.save
def save(self, state, seconds, **notes):
    plain(self, state, seconds, **notes)
    if int(state.step) == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
folder.Checkpoints.save = save
"""


def child(options, extra="", **keywords):
    code = CHILD.format(
        folder=str(Path(__file__).parents[1]),
        file=__file__,
        extra=extra,
        options=options,
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, **keywords
    )


def test_three_kills(reference, tmp_path):
    """Killed in the middle of a line, before a checkpoint is in its place, and right after one."""
    options = (
        f"experiment='tiny', runs=tests.Path({str(tmp_path)!r}), checkpoint_seconds=0.0"
    )
    for step, extra in (
        (7, KILL_IN_METRICS),
        (20, KILL_IN_CHECKPOINT),
        (33, KILL_AFTER_CHECKPOINT),
    ):
        process = child(options, extra.format(step=step))
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        run = only_run(tmp_path)
        assert not run.finished
        options = f"resume=tests.Path({str(run.path)!r}), checkpoint_seconds=0.0"
    assert resume(run.path) == 0
    assert_same_run(run, reference)


def test_ctrl_c(reference, tmp_path):
    process = child(
        f"experiment='tiny', runs=tests.Path({str(tmp_path)!r}), steps=10**6"
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("tiny: step"):
            break
    assert "\x1b" not in line
    process.send_signal(signal.SIGINT)
    out = process.communicate()[0]
    assert process.returncode == 130
    run = only_run(tmp_path)
    step = int(final_state(run).step)
    assert (
        f"Stopped at step {step} of 1000000; go on with: forwax train --resume {run.path}"
        in out
    )
    assert [row["step"] for row in run.metrics() if "loss" in row][-1] == step


def test_config_holds_all_settings(reference):
    config = json.loads((reference.path / CONFIG).read_text())
    assert Settings.from_dict(config).as_dict().items() <= config.items()
    assert len(config["data_checksum"]) == 64
    assert os.path.basename(reference.path).startswith(config["experiment"])


def test_a_config_of_another_experiment_is_told(reference, tmp_path):
    write_json(tmp_path / CONFIG, reference.config | {"experiment": "cats"})
    with pytest.raises(UsageError, match="There is no experiment 'cats'"):
        resume(tmp_path)


def test_a_run_trains_the_model_and_the_loss_that_its_options_name(tmp_path):
    named = {"size": "S/1/1", "rule": "BP", "steps": 1, "batch_size": 4}
    assert (
        train.run(TrainOptions(experiment="local-mixer", runs=tmp_path, **named)) == 0
    )
    run = only_run(tmp_path)
    settings = Settings.from_dict(run.config)
    problem = problem_of(tiny_data(), experiments.EXPERIMENTS["local-mixer"], settings)
    assert (
        run.config["num_parameters"]
        == problem.num_parameters
        == 9 * 256 + 256 + 256 * 256 + 256 + 2 * (256 * 3 + 3)
    )
    block = build_trainer(problem, settings).run(1)
    assert run.metrics()[0]["loss"] == float(block.losses[0])
    assert run.metrics()[0]["loss"] < 2 * np.log(
        3
    )  # one loss; LG-FG-A, the default, has one for the block as well


def test_a_model_that_does_not_fit_its_data_is_refused(tmp_path):
    refusal = (
        r"local-mixer does not fit images of \(3, 3, 1\): .*8×8 patches\. Choose "
        r"another "
        r"--size or --data\."
    )
    with pytest.raises(UsageError, match=refusal):
        train.run(
            TrainOptions(
                experiment="local-mixer", runs=tmp_path, size="M/8/16", steps=1
            )
        )
    assert not list(tmp_path.iterdir())
