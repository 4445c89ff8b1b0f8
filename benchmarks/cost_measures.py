"""What the cost benchmark measures: ratios of times, compiled temporaries, time to compile."""

import functools
import importlib.util
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import forwax as fx
from cost_models import KEY, Scenario
from timing import interleaved, medians, ratios

RANK_1 = fx.tangents.LowRank()
FORWARD, BACKPROP, SIGNS, ONE, EIGHT = (
    "forward pass",
    "backprop",
    "packed signs",
    "rank-1",
    "eight rank-1",
)
RULES = {
    SIGNS: fx.WeightPerturbation(),
    ONE: fx.WeightPerturbation(RANK_1),
    EIGHT: fx.WeightPerturbation(RANK_1, 8),
}
MIB = 2**20


def gradient(scenario: Scenario, rule: fx.Rule | None) -> Callable[..., Any]:
    """A function of a key, the parameters and data; backprop without a rule."""
    if rule is None:
        both = jax.value_and_grad(scenario.loss)
        return lambda key, *args: both(*args)
    return fx.value_and_grad(scenario.loss, rule)


def held_signs(scenario: Scenario, num_tangents: int) -> Callable[..., Any]:
    """A gradient along dense signs by its definition: all directions are held."""

    def estimate(key: Array, params: Any, *data: Any) -> tuple[Array, Any]:
        directions = fx.tangents.Rademacher().sample(key, params, num_tangents)
        push = lambda v: jax.jvp(lambda p: scenario.loss(p, *data), (params,), (v,))  # noqa: E731
        value, slopes = jax.vmap(push, out_axes=(None, 0))(directions)
        return value, jax.tree.map(
            lambda v: jnp.tensordot(slopes, v, axes=1) / num_tangents, directions
        )

    return estimate


def program(function: Callable[..., Any], scenario: Scenario, **options: Any) -> Any:
    """The compiled function of a key, the parameters and data."""
    return (
        jax.jit(function, **options)
        .lower(KEY, scenario.params, *scenario.data)
        .compile()
    )


def gradients(scenario: Scenario, rules: Mapping[str, fx.Rule]) -> dict[str, Any]:
    """Compiled: the loss, backprop and the rules."""
    functions = {
        FORWARD: lambda key, *args: scenario.loss(*args),
        BACKPROP: gradient(scenario, None),
    }
    functions |= {name: gradient(scenario, rule) for name, rule in rules.items()}
    return {name: program(f, scenario) for name, f in functions.items()}


def wide_products(scenario: Scenario, num_tangents: int) -> functools.partial[Any]:
    """What a rank-1 gradient of `cost_models.perceptron` cannot do without, by itself.

    The wide layers' products for the values, and the second one's once more for each tangent.
    """
    (first, _), (second, _) = scenario.params[:2]
    x = scenario.data[0]
    hidden, tangents = (
        jnp.ones((rows * len(x), len(second))) for rows in (1, num_tangents)
    )
    multiply = jax.jit(
        lambda first, second, *left: [
            a @ b for a, b in zip(left, (first, second, second), strict=True)
        ]
    )
    return functools.partial(
        multiply.lower(first, second, x, hidden, tangents).compile(),
        first,
        second,
        x,
        hidden,
        tangents,
    )


def times(
    scenario: Scenario,
    programs: Mapping[str, Any],
    rounds: int,
    **others: Callable[[], Any],
) -> dict[str, float]:
    """Median seconds of compiled functions of a key, parameters and data, and of other calls."""
    calls = {
        name: functools.partial(f, KEY, scenario.params, *scenario.data)
        for name, f in programs.items()
    } | others
    return medians(interleaved(calls, rounds))


class Descent:
    """Whole SGD steps, parameters donated, one after another, at a rate that moves them little."""

    def __init__(self, scenario: Scenario, rule: fx.Rule | None):
        both = gradient(scenario, rule)

        def step(key: Array, params: Any, *data: Any) -> tuple[Array, Any]:
            value, grads = both(key, params, *data)
            return value, jax.tree.map(lambda p, g: p - 1e-12 * g, params, grads)

        self.program = program(step, scenario, donate_argnums=1)
        self.params, self.data = jax.tree.map(jnp.copy, scenario.params), scenario.data

    def __call__(self) -> Array:
        value, self.params = self.program(KEY, self.params, *self.data)
        jax.block_until_ready(self.params)
        return value


def step_times(
    scenario: Scenario, rules: Mapping[str, fx.Rule], rounds: int
) -> dict[str, float]:
    """Median seconds of one evaluation of the loss, and of a whole SGD step by each rule."""
    evaluate = program(lambda key, *args: scenario.loss(*args), scenario)
    calls: dict[str, Callable[[], Any]] = {
        FORWARD: lambda: evaluate(KEY, scenario.params, *scenario.data)
    }
    calls |= {
        name: Descent(scenario, rule)
        for name, rule in {BACKPROP: None, **rules}.items()
    }
    return medians(interleaved(calls, rounds))


def sampling_time(scenario: Scenario, num_tangents: int, rounds: int) -> float:
    """Median seconds of the draw of rank-1 factors alone.

    They are two vectors for a matrix, and a layer's for a stack of them.
    """
    specs = []
    for leaf in jax.tree.leaves(scenario.params):
        sides = (
            [(int(np.prod(leaf.shape[:-1])),), (leaf.shape[-1],)]
            if leaf.ndim > 1
            else [leaf.shape]
        )
        specs += [jax.ShapeDtypeStruct(side, leaf.dtype) for side in sides]
    draw = jax.jit(lambda key: fx.tangents.Rademacher().draw(key, specs, num_tangents))
    return medians(interleaved({"draw": lambda: draw(KEY)}, rounds))["draw"]


def temporaries(scenario: Scenario, rule: fx.Rule | None) -> int:
    """Bytes that the compiled gradient needs beside its arguments and results."""
    return (
        program(gradient(scenario, rule), scenario).memory_analysis().temp_size_in_bytes
    )


def compile_times(
    scenario: Scenario, rules: Mapping[str, fx.Rule | None], repeats: int
) -> dict[str, float]:
    """Median seconds to trace and compile a gradient, from an empty cache, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in rules}
    for _ in range(repeats):
        for name, rule in rules.items():
            jax.clear_caches()
            start = time.perf_counter()
            program(gradient(scenario, rule), scenario)
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(each)) for name, each in seconds.items()}


def torch_ratio(batch: int, widths: Sequence[int], rounds: int) -> float | None:
    """`torch.func.jvp` with normal tangents over torch's own backprop; None without torch."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    shapes = [
        shape for pair in itertools.pairwise(widths) for shape in (pair, pair[1:])
    ]
    params = tuple(torch.randn(shape) / shape[0] ** 0.5 for shape in shapes)
    x, y = torch.randn(batch, widths[0]), torch.randint(0, widths[-1], (batch,))

    def loss(params: Any) -> Any:
        h = x
        for i in range(0, len(params), 2):
            h = h @ params[i] + params[i + 1]
            h = torch.relu(h) if i < len(params) - 2 else h
        return torch.nn.functional.cross_entropy(h, y)

    def forward() -> Any:
        tangents = tuple(torch.randn_like(p) for p in params)
        _, slope = torch.func.jvp(loss, (params,), (tangents,))
        return [slope * v for v in tangents][-1].sum().item()

    def backprop() -> Any:
        return torch.func.grad(loss)(params)[-1].sum().item()

    seconds = interleaved({"forward": forward, BACKPROP: backprop}, rounds)
    return ratios(seconds, BACKPROP)["forward"]
