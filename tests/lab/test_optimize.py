"""`forwax optimize`: that it ends where the paper does; its table, numbers and picture."""

import dataclasses
import io
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from rich.console import Console

import forwax as fx
from forwax.lab.commands import optimize
from forwax.lab.commands.optimize import OptimizeOptions
from forwax.lab.flags import UsageError
from forwax.lab.optimize import descent
from forwax.lab.optimize.descent import Descent, Plan, Timing
from forwax.lab.pictures import descent as picture

NORMAL = fx.WeightPerturbation(tangents=fx.tangents.Normal())
KEYS = jax.random.split(jax.random.key(0), 10)
SHORT = Plan(
    fx.functions.beale, (0.0, 0.5), iterations=7, learning_rate=0.02, decay=0.1
)


# As users compile: thousands of steps carry the last digits on to the paper's figures.
pytestmark = pytest.mark.usefixtures("optimised")


def _lost(runs=3):
    """Runs of which the second leaves the numbers after two steps."""
    values = (
        np.tile(np.array([4.0, 3.0, 2.0, 1.0]), (runs, 1))
        * np.arange(1, runs + 1)[:, None]
    )
    values[1, 2:] = np.nan
    return Descent(
        values,
        np.repeat(values[..., None] / 10, 2, axis=-1),
        values[:, -1:].repeat(2, axis=1),
    )


@pytest.mark.parametrize(("name", "backprop", "low", "high"), [
    ("beale", 5.56e-5, 3.7e-5, 8.1e-5),
    ("rosenbrock", 5.33e-6, 3.7e-6, 8.1e-6),
])  # fmt: skip
def test_ends_where_the_paper_does(name, backprop, low, high):
    plan = optimize.make_plan(OptimizeOptions(function=name))
    reference = descent.descend(plan, fx.Backprop(), KEYS[:1])
    np.testing.assert_allclose(reference.final, backprop, rtol=2e-3)
    forward = descent.descend(plan, NORMAL, KEYS)
    assert forward.non_finite == 0
    assert low < np.median(forward.final) < high
    assert 0.5 * low < forward.final.min() < forward.final.max() < 1.5 * high


@pytest.mark.parametrize("name", ["himmelblau", "styblinski-tang", "quadratic"])
def test_other_defaults_reach_a_minimum(name):
    plan = optimize.make_plan(OptimizeOptions(function=name))
    forward = descent.descend(plan, NORMAL, KEYS)
    assert np.all(forward.final - plan.function.minimum < 2e-3)


@pytest.mark.parametrize(
    ("name", "low", "high"), [("ackley", 0.5, 6.0), ("rastrigin", 4.97, 4.98)]
)
def test_other_defaults_end_in_a_local_minimum(name, low, high):
    plan = optimize.make_plan(OptimizeOptions(function=name))
    assert low < np.median(descent.descend(plan, NORMAL, KEYS).final) < high


def test_backprop_runs_are_gradient_descent():
    x, points = jnp.array(SHORT.start), []
    for i in range(SHORT.iterations):
        points.append(x)
        x = x - SHORT.learning_rate * np.exp(-SHORT.decay * i) * jax.grad(
            fx.functions.beale
        )(x)
    runs = descent.descend(SHORT, fx.Backprop(), KEYS[:2])
    assert runs.points is not None
    np.testing.assert_allclose(
        runs.points, np.tile([*points, x], (2, 1, 1)), rtol=1e-5, atol=1e-6
    )


def test_values_belong_to_points_and_keys_make_runs():
    runs = descent.descend(SHORT, NORMAL, KEYS[:3])
    assert runs.points is not None
    values = jax.vmap(jax.vmap(fx.functions.beale))(jnp.asarray(runs.points))
    np.testing.assert_allclose(runs.values, values, rtol=1e-5)
    np.testing.assert_array_equal(runs.points[:, -1], runs.last)
    assert len(np.unique(runs.final)) == 3
    np.testing.assert_array_equal(
        runs.values, descent.descend(SHORT, NORMAL, KEYS[:3]).values
    )


def test_more_variables_keep_no_points():
    function = fx.functions.rosenbrock.in_dimensions(3)
    runs = descent.descend(
        dataclasses.replace(SHORT, function=function, start=function.start),
        NORMAL,
        KEYS[:2],
    )
    assert runs.points is None
    assert runs.last.shape == (2, 3)
    assert runs.values.shape == (2, SHORT.iterations + 1)


def test_seconds_are_the_median_of_counted_calls(monkeypatch):
    # Two programs in turn take 1 and 10 seconds, then 20 and 2, then 6 and 60. The clock is read
    # at the start, and in each further round to see whether time is up.
    clock = iter([0, 0, 1, 0, 10, 0, 20, 0, 2, 0, 6, 0, 60])
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    seconds = descent.seconds_of(
        [jax.random.bits, jax.random.normal], jax.random.key(0), repeats=3
    )
    assert seconds == [2.0, 20.0]


def test_overhead_is_the_run_on_a_sum(monkeypatch):
    seen = []
    monkeypatch.setattr(
        descent,
        "one_run",
        lambda plan, rule: seen.append((plan.function.name, rule)) or len(seen),
    )
    monkeypatch.setattr(
        descent,
        "seconds_of",
        lambda programs, key: [10.0 * each for each in programs],
    )
    rules = {"backprop": fx.Backprop(), "forward": NORMAL}
    timings = descent.measure(SHORT, rules, KEYS[0])
    assert seen == [
        ("beale", fx.Backprop()),
        ("sum", fx.Backprop()),
        ("beale", NORMAL),
        ("sum", NORMAL),
    ]
    assert timings == {"backprop": Timing(10.0, 20.0), "forward": Timing(30.0, 40.0)}


def test_lost_runs_rank_last_and_are_counted():
    assert _lost().final.tolist() == [1.0, np.inf, 3.0]
    assert _lost().non_finite == 1


def test_lost_runs_are_told_in_the_table_the_numbers_and_the_picture():
    plan = dataclasses.replace(SHORT, iterations=3)
    rules = {"backprop": fx.Backprop(), "forward": NORMAL}
    whole = dataclasses.replace(_lost(), values=np.ones((3, 4)))
    descents = {"backprop": whole, "forward": _lost()}
    timings = {name: Timing(1.0, 0.0) for name in rules}
    found = descent.summarise(plan, rules, descents, timings, seed=0)
    assert found["methods"]["forward"]["final"] == [1.0, None, 3.0]
    assert found["methods"]["forward"]["median"] == 3.0
    paper = io.StringIO()
    Console(width=100, file=paper).print(descent.make_table(found))
    lines = [" ".join(line.split()) for line in paper.getvalue().splitlines()]
    assert "│ runs not finite │ 0 of 3 │ 1 of 3 │" in lines
    assert "│ final f, range │ 1 │ 1 to not finite │" in lines
    figure = picture.draw(plan, descents, timings)
    labels = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert labels == ["backprop", "forward gradient\n1 of 3 runs not finite"]


def test_median_run_is_thick():
    lines = (
        picture.draw(
            SHORT,
            {"backprop": _shifted(5), "forward": _shifted(4)},
            {"backprop": Timing(1, 0), "forward": Timing(2, 1)},
        )
        .axes[1]
        .lines
    )
    thick = [line.get_ydata() for line in lines if line.get_linewidth() > 2]
    np.testing.assert_allclose(thick[0], 3.0)
    np.testing.assert_allclose(thick[1], 2.5)


def _shifted(runs):
    values = np.tile(np.arange(1.0, runs + 1)[:, None], (1, SHORT.iterations + 1))
    return Descent(values, np.zeros((*values.shape, 2)), np.zeros((runs, 2)))


def test_seconds_axis_ends_at_the_seconds_of_a_run():
    timings = {"backprop": Timing(0.25, 0), "forward": Timing(2.0, 1)}
    figure = picture.draw(
        SHORT, {"backprop": _shifted(3), "forward": _shifted(3)}, timings
    )
    thick = [
        line.get_xdata() for line in figure.axes[2].lines if line.get_linewidth() > 2
    ]
    assert [float(x[-1]) for x in thick] == [0.25, 2.0]


@pytest.mark.parametrize(("n", "panels"), [(2, 3), (5, 2)])
def test_contours_are_for_two_variables(n, panels):
    plan = optimize.make_plan(
        OptimizeOptions(function="rosenbrock", n=n, iterations=SHORT.iterations)
    )
    runs = {name: _shifted(3) for name in ("backprop", "forward")}
    figure = picture.draw(plan, runs, dict.fromkeys(runs, Timing(1.0, 0.5)))
    assert len(figure.axes) == panels


def test_command_end_to_end(tmp_path, capsys):
    arguments = [
        "himmelblau",
        "--iterations",
        "5",
        "--runs",
        "2",
        "--out",
        str(tmp_path / "deep" / "way.png"),
    ]
    assert optimize.run(tyro.cli(OptimizeOptions, args=arguments)) == 0
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == [
        "way.json",
        "way.png",
    ]
    numbers = json.loads((tmp_path / "deep" / "way.json").read_text())
    assert (numbers["function"], numbers["iterations"], numbers["runs"]) == (
        "himmelblau",
        5,
        2,
    )
    assert list(numbers["methods"]) == ["backprop", "forward"]
    assert numbers["methods"]["forward"]["rule"].startswith(
        "WeightPerturbation(tangents=Normal(), num_tangents=1"
    )
    assert numbers["methods"]["backprop"]["times_backprop"] == 1.0
    printed = capsys.readouterr().out
    assert "himmelblau, n = 2: 5 iterations, learning rate 0.003, 2 runs" in printed
    assert "way.png" in printed


def test_where_all_runs_are_lost_nothing_is_written(tmp_path, capsys):
    path = tmp_path / "way.png"
    path.write_bytes(b"an older picture")
    options = OptimizeOptions(iterations=30, runs=2, learning_rate=1e3, out=path)
    assert optimize.run(options) == 3
    assert [each.name for each in tmp_path.iterdir()] == ["way.png"]
    assert path.read_bytes() == b"an older picture"
    told = capsys.readouterr()
    assert told.err == (
        "forwax: all runs left the numbers at --learning-rate 1000: nothing is written. Try a "
        "smaller one.\n"
    )
    assert told.out == ""


def test_command_names_another_rule(tmp_path, capsys):
    options = OptimizeOptions(
        rule="exact", iterations=3, runs=1, out=tmp_path / "exact.png"
    )
    assert optimize.run(options) == 0
    methods = json.loads((tmp_path / "exact.json").read_text())["methods"]
    assert list(methods) == ["backprop", "exact"]
    np.testing.assert_allclose(
        methods["exact"]["final"], methods["backprop"]["final"], rtol=1e-5
    )
    assert "exact gradient" in capsys.readouterr().out


def test_plan_defaults():
    assert optimize.make_plan(OptimizeOptions()) == Plan(
        fx.functions.beale, (0.0, 0.5), 1000, 0.01, 0.0
    )
    plan = optimize.make_plan(
        OptimizeOptions(function="ackley", start=(1.0, 2.0, 3.0), learning_rate=0.5)
    )
    assert (plan.function.n, plan.start, plan.learning_rate) == (
        3,
        (1.0, 2.0, 3.0),
        0.5,
    )
    rate = optimize.make_plan(
        OptimizeOptions(function="quadratic", n=14, condition_number=7.0)
    ).learning_rate
    assert rate == pytest.approx(0.002 * 4 / 16)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"runs": 0}, "--runs must be at least 1, got 0"),
        (
            {"learning_rate": -1.0},
            r"--learning-rate must be a positive number, got -1\.0",
        ),
        ({"decay": float("nan")}, "--decay must be zero or more, got nan"),
        ({"condition_number": 0.5}, r"--condition-number must be at least 1, got 0\.5"),
        ({"start": (0.0, float("inf"))}, "--start must be one or more finite numbers"),
        ({"n": 3}, "beale is a function of 2 variables"),
        ({"n": 2, "start": (1.0,)}, "--start must have n = 2 numbers, got 1"),
        ({"tangents": "orthonormal", "num_tangents": 3}, "3"),
        (
            {"out": "picture.gif"},
            r"--out must end in \.png, \.svg or \.pdf, got 'picture\.gif'",
        ),
    ],
)
def test_errors_name_the_option(wrong, message, tmp_path):
    if "out" in wrong:
        wrong = {"out": tmp_path.joinpath(wrong["out"]).relative_to(tmp_path)}
    with pytest.raises(UsageError, match=message):
        optimize.run(OptimizeOptions(**wrong))


@pytest.mark.parametrize("name", ["beale", "rosenbrock", "himmelblau"])
def test_functions_are_the_squares_of_their_residuals(name):
    function = fx.functions.by_name(name)
    for point in ((0.3, -1.2), function.start, function.minima[0]):
        x = jnp.array(point)
        squares = jnp.sum(function.residuals(x) ** 2)
        np.testing.assert_allclose(squares, function(x), rtol=1e-5, atol=1e-12)


def test_gauss_newton_needs_few_steps():
    plan = optimize.make_plan(
        OptimizeOptions(function="rosenbrock", n=6, iterations=150)
    )
    options = OptimizeOptions(rule="gauss-newton")
    whole = descent.descend(plan, optimize.make_rule(options, 6), KEYS[:2])
    assert np.all(whole.final < 1e-9)
    np.testing.assert_allclose(whole.values[:, 0], fx.functions.rosenbrock(plan.start))
    options = dataclasses.replace(options, num_tangents=3)
    part = descent.descend(plan, optimize.make_rule(options, 6), KEYS[:2])
    assert np.all(np.diff(part.values) <= 1e-6 * part.values[:, :-1])


def test_gauss_newton_refuses_what_is_no_sum_of_squares():
    options = OptimizeOptions(function="ackley", rule="gauss-newton")
    with pytest.raises(UsageError, match="--method gauss-newton takes sums of squares"):
        optimize.run(options)


def test_method_is_another_name_of_rule():
    options = tyro.cli(OptimizeOptions, args=["beale", "--method", "gauss-newton"])
    assert options.rule == "gauss-newton"
