"""Weight mirrors: twins of weights that learn them from the products' own answers to noise.

Akrout, Wilson, Humphreys, Lillicrap, Tweed, "Deep Learning without Weight Transport", arXiv
1904.05391. A mirror B of the weight of a product φ sees noise u and the answer φ(w, u), and learns
by least mean squares: B ← B + η mean((φ(w, u) - φ(B, u)) ⊗ u).

Answers to its own noise are all that a mirror hears, so that it may learn faster than a direct map.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from forwax._programs.dataflow import mapped_variables
from forwax._programs.evaluate import Values, evaluate, read
from forwax._programs.program import Constant, Equation, Variable
from forwax._sites.feedback.crossing import Mirror
from forwax._sites.kinds import Kind
from forwax._sites.levels import Level, LoopPlan
from forwax._sites.model import Sites
from forwax.tangents._base import draw_in_one_axis


def may_have_mirror(equation: Equation, sites: Sites) -> bool:
    """Whether a product is linear in one weight that can be had without data."""
    weights = [v for v in equation.variables if sites.kinds[v] is Kind.PARAMETER]
    is_linear = equation.facts.bilinear or equation.facts.scaled == (0, 1)
    if not is_linear or len(weights) != 1:
        return False
    return len(find_mirrors(sites, [equation])) == 1


def find_mirrors(sites: Sites, products: Sequence[Equation]) -> list[Mirror]:
    """The mirrors of the products' weights, one for each weight."""
    found: dict[Variable, Mirror] = {}
    _search(sites, sites.level, frozenset(products), (), (), set(), found)
    return list(found.values())


def _search(
    sites: Sites,
    level: Level,
    products: frozenset[Equation],
    loops: tuple[Equation, ...],
    varying: tuple[set[Variable], ...],
    carried: set[Variable],
    found: dict[Variable, Mirror],
) -> None:
    """Add the mirrors of a level.

    Args:
        sites: the problem's sites.
        level: where to look.
        products: whose weights are wanted.
        loops: around the level, outermost first.
        varying: for each of these what differs from step to step.
        carried: what hangs on the steps before: it is known once the loop has run.
        found: the mirrors so far, by weight.
    """
    makers = {v: e for e in level.program.equations for v in e.outputs}
    for equation in level.program.equations:
        plan = level.loop_of(equation)
        if plan is not None:
            own = mapped_variables(plan.level.program, _of_steps(plan))
            inside = [_inside(plan, varies) for varies in varying]
            changing = mapped_variables(plan.level.program, _changing_carries(plan))
            _search(
                sites,
                plan.level,
                products,
                (*loops, equation),
                (*inside, own),
                _inside(plan, carried) | changing,
                found,
            )
        elif equation in products:
            variable, chain = _weight(equation, makers, sites)
            # The learner visits all steps at once, when no step's outcome is there.
            if variable in carried:
                continue
            differs = tuple(variable in varies for varies in varying)
            found.setdefault(variable, Mirror(variable, chain, loops, differs))


def _inside(plan: LoopPlan, outer: set[Variable]) -> set[Variable]:
    """What in a loop's body hangs on some variables outside."""
    body = plan.level.program
    pairs = zip(body.inputs, plan.equation.inputs, strict=True)
    given = [v for v, a in pairs if not isinstance(a, Constant) and a in outer]
    return mapped_variables(body, given)


def _of_steps(plan: LoopPlan) -> list[Variable]:
    """The inputs of a loop's body that differ from step to step."""
    _, _, xs = plan.loop.split(plan.level.program.inputs)
    return [*_changing_carries(plan), *xs]


def _changing_carries(plan: LoopPlan) -> list[Variable]:
    _, carry, _ = plan.loop.split(plan.level.program.inputs)
    pairs = zip(carry, plan.loop.unchanged, strict=True)
    return [v for v, is_unchanged in pairs if not is_unchanged]


def _weight(
    product: Equation, makers: Mapping[Variable, Equation], sites: Sites
) -> tuple[Variable, tuple[Equation, ...]]:
    """The weight of a product in front of what repeats its entries, and the way from there."""
    (variable,) = {v for v in product.variables if sites.kinds[v] is Kind.PARAMETER}
    chain = [product]
    # In front of a broadcast a mirror has as many entries as the parameter.
    while variable in makers and makers[variable].facts.repeats:
        chain.append(makers[variable])
        (variable,) = makers[variable].variables
    return variable, tuple(reversed(chain))


def mirror_shapes(sites: Sites, mirrors: Sequence[Mirror]) -> list[tuple[int, ...]]:
    """The shape of each mirror: the weight's, behind the loops in which it differs."""
    shapes: list[tuple[int, ...]] = []
    for mirror in mirrors:
        lengths = [
            equation.loop.length
            for equation, varies in zip(mirror.loops, mirror.varies, strict=True)
            if varies and equation.loop is not None
        ]
        shape = sites.traced.types[mirror.variable].shape
        shapes.append((*lengths, *shape))
    return shapes


def zeros(sites: Sites, mirrors: Sequence[Mirror]) -> list[Array]:
    """The mirrors before the first step, in at least float32."""
    found: list[Array] = []
    for mirror, shape in zip(mirrors, mirror_shapes(sites, mirrors), strict=True):
        dtype = sites.traced.types[mirror.variable].dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        found.append(jnp.zeros(shape, wide))
    return found


def learnt(
    sites: Sites,
    mirrors: Sequence[Mirror],
    values: Sequence[Array],
    key: Array,
) -> list[Array]:
    """The mirrors after one step of learning.

    Args:
        sites: the problem's sites.
        mirrors: where they stand.
        values: the mirrors so far.
        key: a typed PRNG key for the noise.
    """
    if not mirrors:
        return []
    inputs = sites.traced.arguments(sites.problem.params)
    env: Values = dict(zip(sites.level.program.inputs, inputs, strict=False))
    table = {m.variable: x for m, x in zip(mirrors, values, strict=True)}
    learner = _Learner(sites, key)
    new = learner.level(sites.level, env, list(mirrors), table)
    return [new[mirror.variable] for mirror in mirrors]


class _Learner:
    """A walk over the weights of a program, in which each mirror learns beside its weight."""

    def __init__(
        self,
        sites: Sites,
        key: Array,
    ) -> None:
        self.sites = sites
        self.key = key

    def level(
        self,
        level: Level,
        env: Values,
        mirrors: Sequence[Mirror],
        values: Mapping[Variable, Array],
        depth: int = 0,
    ) -> dict[Variable, Array]:
        """The mirrors of a level after one step; `env` has its parameters, and gets those made."""
        new: dict[Variable, Array] = {}
        for equation in _read_by_steps(level):
            # Of no data and no parameter, such as the index of a looked-up row.
            if all(_is_known(atom, env) for atom in equation.inputs):
                evaluate([equation], env)
        for step in level.steps:
            if isinstance(step, Equation):
                evaluate([step], env)
            elif isinstance(step, LoopPlan):
                new |= self.loop(step, env, mirrors, values, depth)
        for mirror in mirrors:
            # Those of loops inside have been learnt there.
            if len(mirror.loops) == depth:
                weight = env[mirror.variable]
                new[mirror.variable] = self.one(mirror, weight, values[mirror.variable])
        return new

    def loop(
        self,
        plan: LoopPlan,
        env: Values,
        mirrors: Sequence[Mirror],
        values: Mapping[Variable, Array],
        depth: int,
    ) -> dict[Variable, Array]:
        """All steps at once: no weight depends on another step."""
        inside = [m for m in mirrors if m.inside(plan.equation)]
        # What a weight is made of is known; what else the body reads is not.
        fixed, scanned = (
            {v: read(atom, env) for v, atom in given.items() if _is_known(atom, env)}
            for given in (plan.fixed, plan.scanned)
        )
        # What is the same in all steps learns once: under vmap it has no axis of steps.
        varies = {m.variable: 0 if m.varies[depth] else None for m in inside}

        def step(
            of_step: Values, values: Mapping[Variable, Array]
        ) -> tuple[dict[Variable, Array], Values]:
            scope = {**fixed, **of_step}
            new = self.level(plan.level, scope, inside, values, depth + 1)
            return new, {outer: scope[v] for outer, v in plan.stacked.items()}

        steps = jax.vmap(
            step,
            in_axes=(0, varies),
            out_axes=(varies, 0),
            axis_size=plan.loop.length,
        )
        new, stacked = steps(scanned, {v: values[v] for v in varies})
        env.update(stacked)
        for outer, atom in plan.unchanged.items():
            env[outer] = read(atom, env)
        return new

    def one(
        self,
        mirror: Mirror,
        weight: Array,
        value: Array,
    ) -> Array:
        """One mirror after one step, by noise for all examples."""
        product = mirror.product
        types = self.sites.traced.types
        # Linear in one weight, so that it has one other operand.
        (data,) = [v for v in product.variables if self.sites.kinds[v] is Kind.MIXED]
        examples = self.sites.num_examples or 1
        aval = types[data]
        # As many samples as the loss has examples: fewer would learn more slowly.
        shape = (examples, *aval.shape)
        own = jax.random.fold_in(self.key, mirror.variable)
        signs = draw_in_one_axis(jax.random.rademacher, own, shape, jnp.float32)
        noise = signs.astype(aval.dtype)

        def answers(weight: Array) -> Array:
            def answer(u: Array) -> Array:
                scope: Values = {mirror.variable: weight, data: u}
                evaluate(mirror.equations, scope)
                return scope[product.outputs[0]]

            return jax.vmap(answer)(noise)

        # The product is linear in its weight: φ(w, u) - φ(B, u) = φ(w - B, u).
        left = weight - value.astype(weight.dtype)
        unforeseen, pull = jax.vjp(answers, left)
        (total,) = pull(unforeseen.conj())
        terms = _num_terms(product, types)
        # how often each entry of the weight is used
        samples = unforeseen.size * terms / max(weight.size, 1)
        # |w - B|² falls by 2η - η²(1 + D/N) a step: fastest at twice this rate, which is three
        # quarters as fast and far from divergence where samples overlap (convolutions).
        rate = 0.5 / (1 + terms / samples)
        return value + rate / samples * total.conj().astype(value.dtype)


def _read_by_steps(level: Level) -> list[Equation]:
    """The equations that make what a level's steps read besides parameters."""
    wanted = set(level.records)
    found: list[Equation] = []
    for equation in reversed(level.program.equations):
        if level.loop_of(equation) is None and not wanted.isdisjoint(equation.outputs):
            wanted.update(equation.variables)
            found.append(equation)
    return found[::-1]


def _is_known(atom: Any, env: Values) -> bool:
    return isinstance(atom, Constant) or atom in env


def _num_terms(product: Equation, types: Sequence[Any]) -> int:
    """The number D of terms in the sum that one entry of a product is."""
    if not product.facts.bilinear:
        return 1
    first = product.inputs[0]
    assert not isinstance(first, Constant)
    shape = types[first].shape
    if product.facts.is_dot:
        (contracted, _), _ = product.params["dimension_numbers"]
        return math.prod(shape[axis] for axis in contracted)
    kernel = types[product.variables[1]].shape
    features = product.params["dimension_numbers"].rhs_spec[0]
    return math.prod(kernel) // kernel[features]
