"""Take out of a loop what its steps do not hand on, so that sites there are output sites like all others.

A `scan` whose body computes an output from the carry, such as a readout at every step, or adds a
loss up, becomes two: the recurrent rest, which now puts out what the other part reads, and that
part for all steps at once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from forwax._programs.evaluate import evaluate, read
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
    """The same computation with sites taken out of the top level's loops where no step depends on them."""
    equations: list[Equation] = []
    renamed: dict[Variable, Atom] = {}
    for equation in traced.program.equations:
        moved = renamed_inputs(equation, renamed)
        parts = _parts(moved.loop, is_site) if moved.loop is not None else None
        if parts is None:
            equations.append(moved)
            continue
        found = retrace(_function(moved, parts), moved.inputs, traced.types)
        equations += found.equations
        renamed |= dict(zip(moved.outputs, found.outputs, strict=True))
    if not renamed:
        return traced
    outputs = tuple(
        atom if isinstance(atom, Constant) else renamed.get(atom, atom)
        for atom in traced.program.outputs
    )
    return dataclasses.replace(
        traced, program=Program(traced.program.inputs, tuple(equations), outputs)
    )


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What becomes of a loop's body.

    Attributes:
        kept: the equations that the next step needs.
        taken: those that it does not.
        sums: carries that only add up, with what is added.
    """

    kept: tuple[Equation, ...]
    taken: tuple[Equation, ...]
    sums: dict[int, Variable]


def _parts(loop: Loop, is_site: Callable[[Equation], bool]) -> _Parts | None:
    """How to split a loop, or None if nothing is gained."""
    body = loop.body
    sums, adding = _sums(loop)
    needed = {
        v
        for i, v in enumerate(body.outputs[: loop.num_carry])
        if i not in sums and not isinstance(v, Constant)
    }
    kept, taken = [], []
    for equation in reversed(body.equations):
        if equation in adding:
            continue
        if needed.intersection(equation.outputs):
            needed.update(equation.variables)
            kept.append(equation)
        else:
            taken.append(equation)
    gained = any(is_site(equation) for equation in taken)
    if not gained or any(e.contains(lambda facts: facts.stays_in_a_loop) for e in taken):
        return None
    return _Parts(tuple(reversed(kept)), tuple(reversed(taken)), sums)


def _sums(loop: Loop) -> tuple[dict[int, Variable], list[Equation]]:
    """The carries c that become c + x in each step and are not read otherwise, and the equations that add."""
    body, sums, adding = loop.body, {}, []
    readers: dict[Variable, list[Equation]] = {}
    for equation in body.equations:
        for v in equation.variables:
            readers.setdefault(v, []).append(equation)
    outputs = variables(body.outputs)
    for i in range(loop.num_carry):
        carry, chain = body.inputs[loop.num_consts + i], []
        while len(readers.get(carry, [])) == 1 and carry not in outputs:
            equation = readers[carry][0]
            chain.append(equation)
            if not equation.facts.casts:  # a weak type becomes a strong one
                break
            carry = equation.outputs[0]
        if chain and chain[-1].facts.sum_of_a_loop and chain[-1].outputs[0] == body.outputs[i]:
            others = [v for v in chain[-1].variables if v != carry]
            if (
                len(others) == 1
                and outputs.count(chain[-1].outputs[0]) == 1
                and body.outputs[i] not in readers
            ):
                sums[i] = others[0]
                adding += chain
    return sums, adding


def _function(equation: Equation, parts: _Parts) -> Callable[..., list[Any]]:
    """The split loop as a function of the loop's inputs."""
    loop = equation.loop
    assert loop is not None
    body, first, last = loop.body, loop.num_consts, loop.num_consts + loop.num_carry
    made = {v for e in parts.taken for v in e.outputs}
    stacked = body.outputs[loop.num_carry :]
    early = [atom for atom in stacked if isinstance(atom, Constant) or atom not in made]
    carries = [i for i in range(loop.num_carry) if i not in parts.sums]
    wanted = [*(v for e in parts.taken for v in e.variables), *parts.sums.values()]
    given = {*body.inputs[:first], *body.inputs[last:]}
    handed = [v for v in dict.fromkeys(wanted) if v not in made and v not in given]

    def run(*values: Any) -> list[Any]:
        fixed = dict(zip(body.inputs[:first], values[:first], strict=True))
        slices = dict(zip(body.inputs[last:], values[last:], strict=True))

        def step(carry: list[Any], slices: dict[Variable, Any]) -> tuple[list[Any], list[Any]]:
            env = {
                **fixed,
                **slices,
                **{body.inputs[first + i]: x for i, x in zip(carries, carry, strict=True)},
            }
            evaluate(parts.kept, env)
            return [read(body.outputs[i], env) for i in carries], [
                read(a, env) for a in [*early, *handed]
            ]

        starts = [values[first + i] for i in carries]
        ends, ys = lax.scan(step, starts, slices, loop.length, loop.reverse, loop.unroll)

        def after(mapped: dict[Variable, Any]) -> dict[Variable, Any]:
            env = {**fixed, **mapped}
            evaluate(parts.taken, env)
            return {
                v: env[v]
                for v in [*variables(stacked), *parts.sums.values()]
                if v in made or v in mapped
            }

        behind = jax.vmap(after, axis_size=loop.length)(
            {**slices, **dict(zip(handed, ys[len(early) :], strict=True))}
        )
        sums = {
            i: _added(values[first + i], _stacked(behind, v, fixed, loop))
            for i, v in parts.sums.items()
        }
        whole = iter(ys)
        outputs = [
            behind[a] if not isinstance(a, Constant) and a in made else next(whole) for a in stacked
        ]
        final = dict(zip(carries, ends, strict=True)) | sums
        return [*(final[i] for i in range(loop.num_carry)), *outputs]

    return run


def _added(start: Any, steps: Any) -> Any:
    return jnp.asarray(start, steps.dtype) + jnp.sum(steps, axis=0, dtype=steps.dtype)


def _stacked(
    behind: dict[Variable, Any], variable: Variable, fixed: dict[Variable, Any], loop: Loop
) -> Any:
    """What is added in each step, for all steps."""
    if variable in behind:
        return behind[variable]
    return jnp.broadcast_to(fixed[variable], (loop.length, *jnp.shape(fixed[variable])))
