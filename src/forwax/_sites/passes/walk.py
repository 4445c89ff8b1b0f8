"""A level evaluated for all examples at once, so that something may be done at each site.

The interpreters in `keep` evaluate one example and are mapped as a whole. Here what lies between
two sites is mapped, and the values at the sites carry the examples: what is done at a site is
done for the whole batch.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from forwax._programs.evaluate import Values, evaluate, read
from forwax._programs.program import Atom, Constant, Equation, Variable
from forwax._sites.levels import Level, LoopPlan
from forwax._sites.regions import Region


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Which values have a leading axis of examples.

    Attributes:
        mapped: the variables that differ between examples.
        size: the number of examples; None without examples.
    """

    mapped: frozenset[Variable]
    size: int | None

    def has(self, atom: Atom) -> bool:
        """Whether the atom's value has the axis."""
        return (
            self.size is not None
            and not isinstance(atom, Constant)
            and atom in self.mapped
        )

    def bind(self, equations: Sequence[Equation], env: Values) -> Values:
        """What equations compute for all examples, mapped together."""
        out_axes = {v: 0 if self.has(v) else None for e in equations for v in e.outputs}
        inputs = {v for e in equations for v in e.variables} - set(out_axes)
        mapped = {v: env[v] for v in inputs if self.has(v)}

        def one(mapped: Values) -> Values:
            scope = {**env, **mapped}
            evaluate(equations, scope)
            return {v: scope[v] for v in out_axes}

        if all(axis is None for axis in out_axes.values()):
            return one({})
        return jax.vmap(one, out_axes=out_axes, axis_size=self.size)(mapped)

    def spread(self, value: Any, atom: Atom) -> Any:
        """A value with the axis of examples: as it is, or repeated along a new one."""
        value = jnp.asarray(value)
        if self.size is None or self.has(atom):
            return value
        return jnp.broadcast_to(value, (self.size, *value.shape))


def walk(
    level: Level,
    env: Values,
    batch: Batch,
    at_region: Callable[[Region, Values], None],
    at_loop: Callable[[LoopPlan, Values], list[Any]],
) -> list[Any]:
    """Evaluate a level.

    Args:
        level: what to evaluate.
        env: the values of the program's inputs; all others are added.
        batch: which of them have an axis of examples.
        at_region: called when the last equation of a region has been evaluated; it may change the
            region's outputs.
        at_loop: the outputs of a loop.

    Returns:
        The program's outputs.
    """
    # Equations are compared by identity.
    region_behind = {region.equations[-1]: region for region in level.regions}
    waiting: list[Equation] = []
    for equation in level.program.equations:
        plan = level.loop_of(equation)
        region = region_behind.get(equation)
        if plan is None:
            waiting.append(equation)
        if plan is not None or region is not None:
            env.update(batch.bind(waiting, env))
            waiting = []
        if plan is not None:
            env.update(zip(equation.outputs, at_loop(plan, env), strict=True))
        if region is not None:
            at_region(region, env)
    env.update(batch.bind(waiting, env))
    return [read(atom, env) for atom in level.program.outputs]


def scan(
    plan: LoopPlan,
    env: Values,
    batch: Batch,
    step: Callable[[Values, Any, Any], tuple[list[Any], Any, Any]],
    state: Any,
    slices: Any,
) -> tuple[list[Any], Any, Any]:
    """Run a loop whose body also carries a state of the caller's.

    Args:
        plan: the loop.
        env: the values around it.
        batch: which values have an axis of examples.
        step: takes the values of the body's inputs, the state and a slice of `slices` to the body's
            outputs, the next state and something to stack.
        state: the first state.
        slices: arrays with a leading axis of steps.

    Returns:
        The loop's outputs, the last state, and what was stacked.
    """
    loop = plan.loop
    body = plan.level.program
    values = [read(atom, env) for atom in plan.equation.inputs]
    consts, first_carry, scanned = loop.split(values)
    _, carry_atoms, _ = loop.split(plan.equation.inputs)
    _, carry_inputs, scanned_inputs = loop.split(body.inputs)
    carry_results, _ = loop.split_outputs(body.outputs)
    _, stacked_outputs = loop.split_outputs(plan.equation.outputs)

    def like_carries(values: Sequence[Any], atoms: Sequence[Atom]) -> list[Any]:
        # A carry has the axis of examples in every step or in none.
        carries = zip(values, atoms, carry_inputs, strict=True)
        return [batch.spread(x, atom) if batch.has(v) else x for x, atom, v in carries]

    def body_step(carried: Any, of_step: Any) -> Any:
        carry, state = carried
        xs, more = of_step
        scope = dict(zip(body.inputs, [*consts, *carry, *xs], strict=True))
        outputs, state, stacked = step(scope, state, more)
        carry, ys = loop.split_outputs(outputs)
        return (like_carries(carry, carry_results), state), (ys, stacked)

    start = (like_carries(first_carry, carry_atoms), state)
    # The axis of steps comes first inside the scan, that of examples outside of it.
    xs = [
        jnp.moveaxis(x, 1, 0) if batch.has(v) else x
        for x, v in zip(scanned, scanned_inputs, strict=True)
    ]
    (carry, state), (ys, stacked) = loop.scan(body_step, start, (xs, slices))
    ys = [
        jnp.moveaxis(y, 0, 1) if batch.has(v) else y
        for y, v in zip(ys, stacked_outputs, strict=True)
    ]
    return [*carry, *ys], state, stacked
