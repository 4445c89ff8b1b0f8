"""What a step costs by each rule: time and arithmetic in turns with backprop's, temporaries."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import forwax as fx
from cost_models import KEY, perceptron
from feedback_rules import gradient
from feedback_tasks import IN_AXES, Loss, cross_entropy, language_loss, language_task
from step_time import WIDTHS
from timing import interleaved, ratios

BACKPROP = "backprop"
STEPS = 4  # of one timed call: maps that learn in each fourth step learn once
RULES: dict[str, fx.Rule] = {
    BACKPROP: fx.Backprop(),
    "learned feedback": fx.LearnedFeedback(),
    "learned feedback, every 4th step": fx.LearnedFeedback(every=4),
    "learned feedback, maps in use": fx.LearnedFeedback(),
    "FDFA": fx.FDFA(),
    "direct feedback": fx.DirectFeedbackAlignment(KEY),
    "activity noise": fx.ActivityPerturbation(),
}
IN_USE = "learned feedback, maps in use"


def dense_loss(params: list[tuple[Array, Array]], x: Array, y: Array) -> Array:
    *hidden, (w, b) = params
    for weight, bias in hidden:
        x = jax.nn.relu(x @ weight + bias)
    return cross_entropy(x @ w + b, y)


class Descent:
    """Four SGD steps a call, parameters donated, at a rate that moves them little."""

    def __init__(self, loss: Loss, name: str, params: Any, data: tuple[Array, ...]):
        rule = RULES[name]
        if isinstance(rule, fx.LearnedFeedback | fx.FDFA):
            rule = rule.init(loss, in_axes=IN_AXES)(params, *data)
        estimate = gradient(loss)

        def step(rule: Any, key: Array, params: Any, *data: Array) -> Any:
            if name == IN_USE:
                _, grads = fx.value_and_grad(loss, rule, in_axes=IN_AXES)(
                    key, params, *data
                )
            else:
                _, grads, rule = estimate(rule, key, params, *data)
            return rule, jax.tree.map(lambda p, g: p - 1e-12 * g, params, grads)

        self.rule, self.params = jax.tree.map(jnp.copy, (rule, params))
        self.data = data
        compiled = jax.jit(step, donate_argnums=(0, 2))
        self.program = compiled.lower(self.rule, KEY, self.params, *data).compile()

    def __call__(self) -> Any:
        for _ in range(STEPS):
            self.rule, self.params = self.program(
                self.rule, KEY, self.params, *self.data
            )
        return self.params

    @property
    def flops(self) -> float:
        return self.program.cost_analysis()["flops"]

    @property
    def temporaries(self) -> int:
        return self.program.memory_analysis().temp_size_in_bytes


def networks() -> Iterator[tuple[str, Loss, Any, tuple[Array, ...]]]:
    """Name, loss of one example, parameters and data."""
    name = "MLP " + "-".join(map(str, WIDTHS))
    for batch in (64, 256, 1024):
        scenario = perceptron(batch)
        yield f"{name}, batch {batch}", dense_loss, scenario.params, scenario.data
    task = language_task(6, 1)
    data = task.batch(KEY)
    yield "transformer of 6 layers, batch 8", language_loss, task.init(KEY), data


def measure(rounds: int) -> Iterator[dict[str, Any]]:
    """For each network and rule the ratios to backprop."""
    for network, loss, params, data in networks():
        calls = {name: Descent(loss, name, params, data) for name in RULES}
        timed: dict[str, Callable[[], Any]] = dict(calls)
        over = ratios(interleaved(timed, rounds, max_seconds=120), BACKPROP)
        flops = {name: call.flops for name, call in calls.items()}
        every = "learned feedback, every 4th step"
        flops[every] = (flops["learned feedback"] + 3 * flops[IN_USE]) / 4
        for name, call in calls.items():
            yield {
                "network": network,
                "rule": name,
                "time": over[name],
                "flops": flops[name] / flops[BACKPROP],
                "temporaries": call.temporaries / calls[BACKPROP].temporaries,
            }
