"""The diagnosis.

Figures that agree with compiled programs and laws, losses that go wrong, and honest advice.
"""

import dataclasses
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwax as fx
from forwax._reports.chunks import about_chunks
from forwax._reports.diagnosis import Diagnosis, DiagnosisRow
from forwax._reports.diagnostics import named_rules
from forwax._reports.timing import interleaved, ratios

KEY = jax.random.key(3)


def loss(params, x):
    return jnp.mean((jnp.tanh(x @ params["a"] + params["b"][None]) @ params["c"]) ** 2)


def arguments():
    a, c, x = (
        jax.random.normal(jax.random.fold_in(KEY, i), (n, 4))
        for i, n in enumerate((3, 4, 5))
    )
    return {"a": a[:, :4], "b": jnp.ones(4), "c": c}, x[:, :3]


def growing(x):
    return jax.lax.while_loop(lambda s: jnp.sum(s) < 100, lambda s: s * 2, x).sum()


@pytest.fixture(scope="module")
def found():
    rules = {
        "signs": fx.WeightPerturbation(),
        "rank-1": fx.WeightPerturbation(fx.tangents.LowRank(), 2),
    }
    return fx.diagnose(loss, {**rules, "backprop": fx.Backprop()}, draws=200, rounds=2)(
        KEY, *arguments()
    )


def test_predicted_and_measured_errors_agree(found):
    """32 parameters: 31 and 15.5, each within 5 standard errors of what was measured.

    Backprop's is zero.
    """
    assert found.num_parameters == 32
    for row, law in zip(found.rules, (31.0, 15.5, 0.0), strict=True):
        mean, error = row.mse
        assert row.predicted_mse == law
        assert abs(mean - law) <= 5 * error + 1e-6
    assert found.rules[2].cosine == pytest.approx((1.0, 0.0), abs=1e-5)
    assert 0.05 < found.rules[0].cosine[0] < found.rules[1].cosine[0] < 0.5


def test_arithmetic_and_memory_are_those_of_the_compiled_programs(found):
    params, x = arguments()
    step = fx.value_and_grad(loss, fx.WeightPerturbation())
    for row, compiled in (
        (found.rules[0], jax.jit(step).lower(KEY, params, x).compile()),
        (found.backprop, jax.jit(jax.value_and_grad(loss)).lower(params, x).compile()),
        (found.loss, jax.jit(loss).lower(params, x).compile()),
    ):
        assert row.flops == pytest.approx(compiled.cost_analysis()["flops"], rel=0.02)
        memory = compiled.memory_analysis()
        held = memory.temp_size_in_bytes + memory.output_size_in_bytes
        assert row.temporary_bytes == pytest.approx(held, abs=64)
        assert row.seconds > 0
    assert found.value == pytest.approx(float(loss(params, x)))


def test_the_table_holds_every_figure(found):
    header, rule, *lines = str(found).splitlines()
    assert header.split("  ")[0] == "gradient"
    assert set(rule) == {"-", " "}
    assert [line.split("  ")[0] for line in lines[:3]] == [
        row.name for row in found.rows[:3]
    ]
    assert any(
        line.startswith("signs") and " 31 " in line and "FLOP" in line and "KiB" in line
        for line in lines
    )
    assert (
        "32 parameters; 200 draws against the exact gradient by backprop; times are medians."
        in lines
    )
    assert lines[-1] == found.advice
    assert found.advice.startswith("Use ")


def test_rich_shows_the_same(found):
    from rich.console import Console

    screen = io.StringIO()
    Console(width=200, file=screen).print(found)
    text = screen.getvalue()
    assert all(row.name in text for row in found.rows)
    assert found.advice[:60] in text


def test_a_loss_that_reverse_mode_rejects():
    rules = {
        "signs": fx.WeightPerturbation(),
        "forward mode": fx.Exact(),
        "backprop": fx.Backprop(),
    }
    found = fx.diagnose(growing, rules, draws=2, rounds=2)(KEY, jnp.arange(1.0, 40.0))
    assert found.reference == "forward mode"
    assert found.rules[1].mse == (0.0, 0.0)
    assert found.rules[2].error.startswith(
        "Reverse-mode differentiation does not work for lax.while_loop"
    )
    assert found.advice.startswith("Backprop does not run here, so use ")
    assert (
        "jax.value_and_grad does not run: Reverse-mode differentiation does not work"
        in str(found)
    )


def test_without_a_reference_errors_are_laws_alone(monkeypatch):
    monkeypatch.setattr("forwax._reports.diagnostics.EXACT_LIMIT", 2)
    found = fx.diagnose(growing, [fx.WeightPerturbation()], draws=2, rounds=1)(
        KEY, jnp.ones(3)
    )
    (row,) = found.rules
    assert (row.name, row.predicted_mse, row.mse, row.cosine) == (
        "WeightPerturbation()",
        2.0,
        None,
        None,
    )
    assert "no reference" in str(found)
    assert "against no exact gradient" in str(found)


def test_a_loss_that_is_not_finite():
    bad = fx.diagnose(
        lambda x: jnp.sum(jnp.log(x)), [fx.WeightPerturbation()], draws=2, rounds=1
    )
    assert bad(KEY, -jnp.ones(3)).advice.startswith(
        "The loss is nan here, so no gradient can be judged: "
    )
    assert bad(KEY, jnp.zeros(3)).advice.startswith(
        "The loss is -inf here, so no gradient can be judged: "
    )


def test_examples_auxiliary_outputs_and_plain_arguments():
    """`in_axes` adds activity noise, whose law counts other coordinates.

    Numbers stay numbers as in a plain call.
    """

    def one(scale, params, x, *, power):
        assert isinstance(power, int)
        return scale * loss(params, x[None]) ** power, {"name": "aux", "x": x}

    params, x = arguments()
    axes = (None, None, 0)
    rules = [fx.WeightPerturbation(fx.tangents.LowRank(), 8), fx.ActivityPerturbation()]
    diagnose = fx.diagnose(
        one, rules, argnums=1, has_aux=True, in_axes=axes, draws=2, rounds=1
    )
    found = diagnose(KEY, 2.0, params, x, power=1)
    assert [row.predicted_mse for row in found.rules] == [31 / 8, None]
    assert found.rules[1].mse[0] > 0
    assert "no law" in str(found)


def test_the_default_rules():
    names = list(named_rules(None, (None, 0)))
    assert names == [
        "WeightPerturbation()",
        "WeightPerturbation(tangents=LowRank())",
        "WeightPerturbation(tangents=LowRank(), num_tangents=8)",
        "ActivityPerturbation()",
    ]
    assert list(named_rules(None, None)) == names[:3]


def test_equal_labels_are_numbered():
    guess = lambda x: fx.WeightPerturbation(
        combine=fx.combine.ControlVariate(x * jnp.ones(3))
    )
    names = list(named_rules([guess(1), fx.Exact(), guess(2)], None))
    same = "WeightPerturbation(combine=ControlVariate())"
    assert names == [f"{same} #1", "Exact()", f"{same} #2"]


def test_keys_of_another_kind():
    found = fx.diagnose(
        lambda x: jnp.sum(x**2), [fx.WeightPerturbation()], draws=1, rounds=1
    )
    assert found(jax.random.key(0, impl="rbg"), jnp.ones(3)).reference == "backprop"


def test_a_rule_that_fails_when_it_runs_is_a_row_that_says_why():
    """As one does that needs more memory than there is.

    And one whose tangents do not exist has no law.
    """

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class TooLarge(fx.Backprop):
        def estimate(self, key, problem):
            value, _, grads = super().estimate(key, problem)
            return value, jnp.broadcast_to(value, (2**24, 2**24)), grads

    rules = {
        "too large": TooLarge(),
        "too many": fx.WeightPerturbation(fx.tangents.Orthonormal(), 4),
    }
    found = fx.diagnose(lambda x: jnp.sum(x**2), rules, draws=1, rounds=1)(
        KEY, jnp.ones(3)
    )
    assert "RESOURCE_EXHAUSTED" in found.rules[0].error
    assert "draws at most n = 3 directions" in found.rules[1].error
    assert found.rules[1].predicted_mse is None
    assert "too large does not run: " in str(found)


def test_mistakes():
    with pytest.raises(
        ValueError,
        match=r"expected one or more rules, such as .*, got WeightPerturbation\(",
    ):
        fx.diagnose(loss, fx.WeightPerturbation())
    with pytest.raises(
        ValueError,
        match=r"\['jax.value_and_grad', 'the loss alone'\] name rows that are always there",
    ):
        fx.diagnose(
            loss, {"the loss alone": fx.Exact(), "jax.value_and_grad": fx.Exact()}
        )
    with pytest.raises(
        TypeError, match="diagnose: expected a function as the loss, got int"
    ):
        fx.diagnose(3)
    with pytest.raises(
        ValueError, match="expected draws to be a positive integer, got 0"
    ):
        fx.diagnose(loss, draws=0)
    with pytest.raises(
        ValueError, match=r"expected one or more rules, such as .*, got \[\]"
    ):
        fx.diagnose(loss, [])
    with pytest.raises(
        TypeError, match="diagnose: the first argument must be a PRNG key"
    ):
        fx.diagnose(loss)(*arguments())
    with pytest.raises(
        TypeError, match="Gradient only defined for scalar-output functions"
    ):
        fx.diagnose(jnp.sin)(KEY, jnp.ones(3))


def row(name="rule", mse=999.0, seconds=1.0, memory=100, **own):
    own = {"unbiased": True, **own}
    return DiagnosisRow(name, mse, None, None, 1.0, memory, seconds, **own)


REJECTED = row("backprop", error="Reverse-mode differentiation does not work.")


def built(*rules, backprop=None, checkpointed=None, value=1.0):
    backprop = backprop or row("backprop", 0.0)
    checkpointed = checkpointed or dataclasses.replace(
        backprop, name="checkpointed", seconds=1.3
    )
    return Diagnosis(
        row("loss"), backprop, checkpointed, rules, 1000, value, "backprop", 16
    )


ADVICE = {
    "no cheaper": (
        built(row("signs", seconds=0.97)),
        "Use backprop: its gradient is exact, and no rule's step is cheaper (signs: 0.97 of it).",
    ),
    "cheaper but noisy": (
        built(row("signs"), row("rank-1", seconds=0.6)),
        "Use backprop: a step of rank-1 takes 0.60 of its time, but with a relative MSE of 999 the "
        "progress of one "
        "exact step takes 1e+03 of them.",
    ),
    "memory matters": (
        built(row(memory=2**10), backprop=row("backprop", 0.0, memory=2**20)),
        "Use backprop: its gradient is exact, and no rule's step is cheaper (rule: 1.00 of it); "
        "only if its memory "
        "does not fit, rule needs 1 KiB against 1 MiB (1 MiB with jax.checkpoint).",
    ),
    "checkpointing saves the memory": (
        built(
            row(memory=2**10),
            backprop=row("backprop", 0.0, memory=2**20),
            checkpointed=row("checkpointed", 0.0, memory=2**11),
        ),
        "Use backprop: its gradient is exact, and no rule's step is cheaper (rule: 1.00 of it).",
    ),
    "a rule is better": (
        built(row("forward mode", 0.0, 0.25)),
        "Use forward mode: for the progress of one exact step it takes 0.25 of backprop's time, "
        "its relative MSE of 0 "
        "counted in.",
    ),
    "biased rules are not ranked": (
        built(row("projection", 0.5, 0.4, unbiased=False)),
        "Use backprop: its gradient is exact, though a step of projection takes 0.40 of its time.",
    ),
    "reverse mode in disguise": (
        built(row("feedback", None, 0.5, reverse_mode=True)),
        "Use backprop: reverse mode runs, and no rule does.",
    ),
    "rejected": (
        built(row("signs", 9.0, 0.1), row("forward mode", 0.0, 0.5), backprop=REJECTED),
        "Backprop does not run here, so use forward mode: its gradient is exact, and of the rules "
        "that run it "
        "takes the least time for the progress of one exact step, 500 ms.",
    ),
    "rejected, many parameters": (
        built(
            row("signs", 99.0, 1e-4), row("forward mode", 0.0, 0.5), backprop=REJECTED
        ),
        "Backprop does not run here, so use signs: its relative MSE is 99, and of the rules that "
        "run it takes the "
        "least time for the progress of one exact step, 10 ms.",
    ),
    "rejected, nothing known": (
        built(row("mine", None), backprop=REJECTED),
        "Backprop does not run here, and without a law or a reference the rules cannot be ranked: "
        "start with mine, "
        "the quickest that runs.",
    ),
    "nothing runs": (
        built(row(error="no."), backprop=REJECTED),
        "Backprop does not run here and none of the rules runs: try forwax.FiniteDifference().",
    ),
}


@pytest.mark.parametrize("case", ADVICE)
def test_the_advice_follows_from_the_rows(case):
    found, sentence = ADVICE[case]
    assert found.advice == sentence


def test_calls_are_timed_in_turn():
    """Each is made once before and once a round, in an order that turns; no round begins late."""
    made = []
    calls = {name: functools.partial(made.append, name) for name in "abc"}
    seconds = interleaved(calls, 2)
    assert "".join(made) == "abc" + "abc" + "bca"
    assert {name: times.shape for name, times in seconds.items()} == dict.fromkeys(
        "abc", (2,)
    )
    assert interleaved(calls, 9, max_seconds=0)["a"].shape == (3,)
    known = {"a": np.array([1.0, 3.0, 2.0]), "b": np.array([4.0, 4.0, 9.0])}
    assert ratios(known, "a") == {"a": 1, "b": 2}


def test_it_times_chunk_sizes_of_the_exact_gradient_and_says_which():
    def loss(w):
        return jnp.sum(jnp.sin(w) * jnp.cumsum(w))

    found = fx.diagnose(loss, [fx.Exact()], rounds=3)(KEY, jnp.linspace(0, 1, 80))
    (row,) = found.rules
    assert row.note in found.notes()
    assert row.note.startswith("Exact() takes ")
    assert " with chunk_size=7 and " in row.note
    assert " with chunk_size=80: " in row.note
    assert "chunk_size=56" not in row.note
    assert row.note.endswith(("take chunk_size=7.", "take chunk_size=80.", "leave it."))
    few = fx.diagnose(loss, [fx.Exact()], rounds=3)(KEY, jnp.ones(3))
    assert few.rules[0].note is None


def test_the_fastest_chunk_size_is_named():
    rows = {7: DiagnosisRow("", seconds=0.1), 40: DiagnosisRow("", seconds=0.2)}
    slow, fast = (DiagnosisRow("Exact()", seconds=s) for s in (1.0, 0.05))
    assert about_chunks("Exact()", slow, rows) == (
        "Exact() takes 1 s, 100 ms with chunk_size=7 and 200 ms with chunk_size=40: "
        "take chunk_size=7."
    )
    assert about_chunks("Exact()", fast, rows).endswith(": leave it.")
    assert about_chunks("Exact()", slow, {}) is None


def signed(params, x, sign):
    """Gradients of examples that differ in their sign alone cancel."""
    return sign * jnp.sum(jnp.sin(jnp.tanh(x @ params["a"]) @ params["c"]))


def test_it_says_unasked_where_activity_noise_loses_to_weight_noise():
    """Eight examples twice, with signs 1 and -0.9: their mean is a twentieth of each gradient."""
    params, _ = arguments()
    params = {"a": params["a"], "c": params["c"]}
    x = jnp.tile(jax.random.normal(KEY, (8, 3)), (2, 1))
    sign = jnp.repeat(jnp.array([1.0, -0.9]), 8)
    diagnose = fx.diagnose(
        signed, [fx.ActivityPerturbation()], in_axes=(None, 0, 0), draws=64, rounds=1
    )
    found = diagnose(KEY, params, x, sign)
    (row,) = found.rules
    assert row.mse[0] > 2 * found.num_parameters
    assert row.note in found.notes()
    assert "times the error of weight noise here, most at ['a'] (" in row.note
    assert "LowRank" in row.note
    assert row.learning_rate_scale == pytest.approx(1 / (1 + row.mse[0]))
    assert diagnose(KEY, params, x, jnp.ones(16)).rules[0].note is None


def test_it_names_the_parameter_that_is_used_at_many_positions():
    def gain(params, x):
        h = jnp.cumsum(jnp.tanh(x * params["gain"][None]), 0)  # [positions, channels]
        return jnp.sum(jnp.sin(h @ params["out"]))

    params = {"gain": jnp.ones(2), "out": jnp.ones((2, 1))}
    x = jax.random.normal(KEY, (4, 64, 2))
    rule = fx.ActivityPerturbation()
    found = fx.diagnose(gain, {"noise": rule}, in_axes=(None, 0), draws=64, rounds=1)(
        KEY, params, x
    )
    assert "at ['gain'] (" in found.rules[0].note
