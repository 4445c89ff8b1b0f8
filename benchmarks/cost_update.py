"""The cost benchmark on the fused step: temporaries beside inference's, time with momentum."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import forwax as fx
from cost_measures import BACKPROP, ONE, RANK_1, SIGNS, Descent, program
from cost_models import KEY, Scenario, perceptron, spec, stacked
from cost_sections import Points, Row, Sizes
from timing import interleaved, medians

RULES = {
    ONE: fx.WeightPerturbation(RANK_1),
    "four rank-1": fx.WeightPerturbation(RANK_1, 4),
    "four rank-1, chunk_size=1": fx.WeightPerturbation(RANK_1, 4, chunk_size=1),
    SIGNS: fx.WeightPerturbation(),
    "four packed signs, chunk_size=1": fx.WeightPerturbation(
        num_tangents=4, chunk_size=1
    ),
}
WINDOWS = (0, 16, 66)


def tied(width: int = 256, batch: int = 8, length: int = 32) -> Scenario:
    """A tanh-RNN without inputs; shapes only."""

    def mean_loss(w: Any, x: Any) -> Any:
        return jnp.mean(
            lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=length)[0]
            ** 2
        )

    return Scenario(mean_loss, spec(width, width), (spec(batch, width),))


def unrolled(layers: int = 12, width: int = 128, batch: int = 4) -> Scenario:
    """Layers without a loop, each a parameter of its own; shapes only."""

    def mean_loss(params: list[Any], x: Any) -> Any:
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    return Scenario(mean_loss, [spec(width, width)] * layers, (spec(batch, width),))


NETWORKS = {
    "24 layers 64 wide by scan, batch 8": stacked(24, 64, 8),
    "24 layers 64 wide by scan, batch 256": stacked(24, 64, 256),
    "tanh-RNN 256 wide, batch 8": tied(),
    "12 layers 128 wide, batch 4": unrolled(),
}


def held(scenario: Scenario, step: Callable[..., Any], **options: Any) -> int:
    return program(step, scenario, **options).memory_analysis().temp_size_in_bytes


class Fused(Descent):
    """Fused steps, parameters and momentum donated, one after another."""

    def __init__(self, scenario: Scenario, rule: fx.WeightPerturbation, window: int):
        self.momentum = fx.Momentum(window=window).init(KEY, rule) if window else None

        def step(key: Any, params: Any, momentum: Any, *data: Any) -> tuple[Any, ...]:
            value, *state = fx.update(
                scenario.loss, rule, learning_rate=1e-12, momentum=momentum
            )(key, params, *data)
            return value, *state, *([] if window else [None])

        self.params, self.data = jax.tree.map(jnp.copy, scenario.params), scenario.data
        self.program = (
            jax.jit(step, donate_argnums=(1, 2))
            .lower(KEY, self.params, self.momentum, *self.data)
            .compile()
        )
        for _ in range(window):  # from here on all of it is used
            self()

    def __call__(self) -> Any:
        value, self.params, self.momentum = self.program(
            KEY, self.params, self.momentum, *self.data
        )
        jax.block_until_ready(self.params)
        return value


def fused_step(sizes: Sizes, points: Points) -> Iterator[Row]:
    for name, scenario in NETWORKS.items():
        largest = max(
            leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(scenario.params)
        )
        bound = (
            1.1 * held(scenario, lambda key, *args, f=scenario.loss: f(*args)) + largest
        )
        yield Row(
            f"{name}: 1.1 × inference's temporaries and the largest parameter",
            bound / 1024,
            "KiB",
        )
        for each, rule in RULES.items():
            found = held(
                scenario,
                fx.update(scenario.loss, rule, learning_rate=0.1),
                donate_argnums=1,
            )
            yield Row(
                f"{name}, {each}: temporaries of the fused step",
                found / bound,
                "× that",
                1,
            )
    scenario = perceptron(256)
    calls: dict[str, Callable[[], Any]] = {BACKPROP: Descent(scenario, None)}
    for each in (ONE, SIGNS):
        for window in WINDOWS:
            name = f"fused step, {each}, " + (
                f"momentum of {window} steps" if window else "no momentum"
            )
            calls[name] = Fused(scenario, RULES[each], window)
    found = medians(interleaved(calls, sizes.rounds))
    for name in list(calls)[1:]:
        yield Row(
            f"MLP 784-1024-1024-10, batch 256: {name}", found[name] / found[BACKPROP]
        )
