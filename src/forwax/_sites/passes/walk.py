"""A level evaluated for all examples at once, from site to site, so that something may be done at each site.

The interpreters in `run` evaluate one example and are mapped as a whole. Here what lies between two
sites is mapped, and the values at the sites carry the examples: what is done at a site is done for
the whole batch.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

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
        return self.size is not None and not isinstance(atom, Constant) and atom in self.mapped

    def bind(self, equations: Sequence[Equation], env: Values) -> Values:
        """What equations compute for all examples, mapped together."""
        made = {v: 0 if self.has(v) else None for e in equations for v in e.outputs}
        slices = {
            v: env[v] for e in equations for v in e.variables if v not in made and self.has(v)
        }

        def one(slices: Values) -> Values:
            scope = {**env, **slices}
            evaluate(equations, scope)
            return {v: scope[v] for v in made}

        return jax.vmap(one, out_axes=made, axis_size=self.size)(slices) if slices else one({})

    def spread(self, value: Any, atom: Atom) -> Any:
        """A value without the axis, repeated along it unless the atom's value has it."""
        value = jnp.asarray(value)
        return (
            value
            if self.size is None or self.has(atom)
            else jnp.broadcast_to(value, (self.size, *value.shape))
        )


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
    last = {id(region.equations[-1]): region for region in level.regions}
    waiting: list[Equation] = []
    for equation in level.program.equations:
        plan = level.loop_of(equation)
        if plan is None:
            waiting.append(equation)
        if plan is not None or id(equation) in last:
            env.update(batch.bind(waiting, env))
            waiting = []
        if plan is not None:
            env.update(zip(equation.outputs, at_loop(plan, env), strict=True))
        if id(equation) in last:
            at_region(last[id(equation)], env)
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
    loop, body = plan.loop, plan.level.program
    first, last = loop.num_consts, loop.num_consts + loop.num_carry
    values = [read(atom, env) for atom in plan.equation.inputs]
    names, carries = body.inputs, body.inputs[first:last]

    def like(
        values: Sequence[Any], atoms: Sequence[Atom]
    ) -> list[Any]:  # a carry has the axis in every step or none
        pairs = zip(values, atoms, carries, strict=True)
        return [batch.spread(x, atom) if batch.has(v) else x for x, atom, v in pairs]

    def body_step(old: Any, both: Any) -> Any:
        (carry, state), (xs, more) = old, both
        outputs, state, stacked = step(
            dict(zip(names, [*values[:first], *carry, *xs], strict=True)), state, more
        )
        carry = like(outputs[: loop.num_carry], body.outputs[: loop.num_carry])
        return (carry, state), (outputs[loop.num_carry :], stacked)

    start = (like(values[first:last], plan.equation.inputs[first:last]), state)
    xs = [
        jnp.moveaxis(x, 1, 0) if batch.has(v) else x
        for x, v in zip(values[last:], names[last:], strict=True)
    ]
    (carry, state), (ys, stacked) = lax.scan(
        body_step, start, (xs, slices), loop.length, loop.reverse, loop.unroll
    )
    ys = [
        jnp.moveaxis(y, 0, 1) if batch.has(o) else y
        for y, o in zip(ys, body.outputs[loop.num_carry :], strict=True)
    ]
    return [*carry, *ys], state, stacked
