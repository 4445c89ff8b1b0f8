"""Take out of a loop what its steps do not hand on, so that sites there are output sites too.

A `scan` whose body computes an output from the carry, such as a readout at every step, or adds a
loss up, becomes two: the recurrent rest, which now puts out what the other part reads, and that
part for all steps at once.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax import Array

from forwax._programs.evaluate import Values, evaluate, read
from forwax._programs.program import (
    Atom,
    Constant,
    Equation,
    Loop,
    Program,
    Traced,
    Variable,
    variables,
)
from forwax._programs.tracing import renamed_inputs, retrace


def split_loops(traced: Traced, is_site: Callable[[Equation], bool]) -> Traced:
    """The same computation with sites taken out of loops where no step depends on them.

    Only loops of the top level are split. What is returned is `traced` itself if none is.
    """
    equations: list[Equation] = []
    renamed: dict[Variable, Atom] = {}
    for equation in traced.program.equations:
        equation = renamed_inputs(equation, renamed)
        split = None
        if equation.loop is not None:
            split = _split(equation.loop, is_site)
        if split is None:
            equations.append(equation)
            continue
        program = retrace(split.run, equation.inputs, traced.types)
        equations += program.equations
        renamed.update(zip(equation.outputs, program.outputs, strict=True))
    if not renamed:
        return traced

    outputs: list[Atom] = []
    for atom in traced.program.outputs:
        if not isinstance(atom, Constant):
            atom = renamed.get(atom, atom)
        outputs.append(atom)
    program = Program(
        traced.program.inputs,
        tuple(equations),
        tuple(outputs),
    )
    return dataclasses.replace(traced, program=program)


def _split(loop: Loop, is_site: Callable[[Equation], bool]) -> "_SplitLoop | None":
    """How to split a loop, or None if nothing is gained."""
    sums = _running_sums(loop)
    adding: set[Equation] = set()
    for running_sum in sums.values():
        adding.update(running_sum.equations)
    after, _ = loop.split_outputs(loop.body.outputs)
    # Backwards: what a needed value is computed from is needed too.
    needed = set(variables(atom for i, atom in enumerate(after) if i not in sums))
    recurrent: list[Equation] = []
    behind: list[Equation] = []
    for equation in reversed(loop.body.equations):
        if equation in adding:
            continue
        if needed.isdisjoint(equation.outputs):
            behind.append(equation)
        else:
            needed.update(equation.variables)
            recurrent.append(equation)

    if not any(map(is_site, behind)):
        return None
    # All steps at once would take both branches of each `cond`.
    if any(map(_stays_in_a_loop, behind)):
        return None
    recurrent.reverse()
    behind.reverse()
    summands = {i: running_sum.summand for i, running_sum in sums.items()}
    return _SplitLoop(loop, recurrent, behind, summands)


def _stays_in_a_loop(equation: Equation) -> bool:
    return equation.contains(lambda facts: facts.stays_in_a_loop)


@dataclasses.dataclass(frozen=True)
class _RunningSum:
    """A carry c that becomes c + x in each step and is not read otherwise.

    Attributes:
        equations: what adds, with casts of c before it.
        summand: x.
    """

    equations: list[Equation]
    summand: Variable


def _running_sums(loop: Loop) -> dict[int, _RunningSum]:
    """The carries that only add up, by their position."""
    readers: dict[Variable, list[Equation]] = {}
    for equation in loop.body.equations:
        for variable in equation.variables:
            known = readers.setdefault(variable, [])
            known.append(equation)
    outputs = loop.body.outputs
    _, before, _ = loop.split(loop.body.inputs)
    sums: dict[int, _RunningSum] = {}
    for i, carry in enumerate(before):
        running_sum = _running_sum(carry, outputs[i], readers, outputs)
        if running_sum is not None:
            sums[i] = running_sum
    return sums


def _running_sum(
    carry: Variable,
    end: Atom,
    readers: Mapping[Variable, Sequence[Equation]],
    outputs: Sequence[Atom],
) -> _RunningSum | None:
    """How a carry adds up to what the body returns for it, or None if it does anything else."""
    equations: list[Equation] = []
    while carry not in outputs and len(readers.get(carry, [])) == 1:
        equation = readers[carry][0]
        equations.append(equation)
        if not equation.facts.casts:
            break
        carry = equation.outputs[0]  # a weak type becomes a strong one
    if not equations or not equations[-1].facts.sum_of_a_loop:
        return None

    total = equations[-1].outputs[0]
    summands = [v for v in equations[-1].variables if v != carry]
    # Nobody but the next step may see the sum: else its partial sums are needed, step by step.
    is_next_carry = total == end and outputs.count(total) == 1
    if not is_next_carry or total in readers:
        return None
    if len(summands) != 1:  # `c + c` is no running sum
        return None
    return _RunningSum(equations, summands[0])


class _SplitLoop:
    """A loop in two parts, and the values that pass between them.

    Attributes:
        loop: the whole.
        recurrent: the equations of its body that the next step needs.
        behind: those that it does not.
        sums: the carries that only add up, by position, with what is added.
        consts: the body's inputs that are the same in every step.
        before: its inputs that are carries.
        xs: its inputs that are slices.
        after: its outputs that are carries.
        stacked: its other outputs.
        carries: the positions of carries that do more than add up.
        late: what is computed behind the loop.
        handed_on: what that is computed from in each step.
    """

    def __init__(
        self,
        loop: Loop,
        recurrent: Sequence[Equation],
        behind: Sequence[Equation],
        sums: Mapping[int, Variable],
    ) -> None:
        self.loop = loop
        self.recurrent = recurrent
        self.behind = behind
        self.sums = sums
        self.consts, self.before, self.xs = loop.split(loop.body.inputs)
        self.after, self.stacked = loop.split_outputs(loop.body.outputs)
        positions = range(len(self.before))
        self.carries = [i for i in positions if i not in sums]

        self.late: set[Variable] = set()
        reads: list[Variable] = []
        for equation in behind:
            self.late.update(equation.outputs)
            reads += equation.variables
        reads += sums.values()
        others = {*self.late, *self.consts, *self.xs}
        self.handed_on = [v for v in dict.fromkeys(reads) if v not in others]

    def run(self, *values: Any) -> list[Any]:
        """The loop's outputs from its inputs."""
        const_values, starts, x_values = self.loop.split(values)
        consts = dict(zip(self.consts, const_values, strict=True))
        mapped = dict(zip(self.xs, x_values, strict=True))
        final, early, handed_on = self.run_recurrent(starts, consts, mapped)
        mapped.update(handed_on)
        late = self.run_behind(consts, mapped)

        for i, summand in self.sums.items():
            if summand in late:
                steps = late[summand]
            else:  # the same in every step
                value = consts[summand]
                shape = (self.loop.length, *jnp.shape(value))
                steps = jnp.broadcast_to(value, shape)
            final[i] = _added(starts[i], steps)
        outputs = [final[i] for i in range(len(starts))]
        in_order = iter(early)
        for atom in self.stacked:
            if self.is_late(atom):
                outputs.append(late[atom])
            else:
                outputs.append(next(in_order))
        return outputs

    def run_recurrent(
        self,
        starts: Sequence[Any],
        consts: Values,
        xs: Values,
    ) -> tuple[dict[int, Any], Sequence[Any], Values]:
        """The last carries by position, the early outputs, and what the other part reads."""
        before = [self.before[i] for i in self.carries]
        after = [self.after[i] for i in self.carries]
        early = [atom for atom in self.stacked if not self.is_late(atom)]

        def step(
            carry: list[Any],
            x: Values,
        ) -> tuple[list[Any], tuple[list[Any], list[Any]]]:
            env = {**consts, **x}
            env.update(zip(before, carry, strict=True))
            evaluate(self.recurrent, env)
            ends = [read(atom, env) for atom in after]
            ys = [read(atom, env) for atom in early]
            return ends, (ys, [env[v] for v in self.handed_on])

        carry = [starts[i] for i in self.carries]
        ends, (ys, handed_on) = self.loop.scan(step, carry, xs)
        return (
            dict(zip(self.carries, ends, strict=True)),
            ys,
            dict(zip(self.handed_on, handed_on, strict=True)),
        )

    def run_behind(self, consts: Values, mapped: Values) -> Values:
        """Late outputs and summands, as far as they differ between steps: [steps, ...]."""
        results: list[Variable] = []
        for variable in (*variables(self.stacked), *self.sums.values()):
            if variable in self.late or variable in mapped:
                results.append(variable)

        def one(mapped: Values) -> Values:
            env = {**consts, **mapped}
            evaluate(self.behind, env)
            return {v: env[v] for v in results}

        # The steps do not depend on one another any more.
        all_steps = jax.vmap(one, axis_size=self.loop.length)
        return all_steps(mapped)

    def is_late(self, atom: Atom) -> TypeGuard[Variable]:
        return not isinstance(atom, Constant) and atom in self.late


def _added(start: Any, steps: Array) -> Array:
    """The last sum: the start and what all steps add, [steps, ...]."""
    dtype = steps.dtype
    total = jnp.sum(steps, axis=0, dtype=dtype)
    return jnp.asarray(start, dtype) + total
