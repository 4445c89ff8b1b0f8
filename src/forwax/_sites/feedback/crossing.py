"""A forward pass that says how errors come back through products of parameters with data.

Forward it is the loss as it is. On the way back a product hands its data's error on through the
product's own weight, through a twin of the weight, or not at all: then the error enters from
outside, at the product's inlet.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import Array, lax

from forwax._programs.custom_rules import with_jvp
from forwax._programs.evaluate import Values, bind, inject, read
from forwax._programs.program import Atom, Constant, Equation, Variable
from forwax._sites.levels import Level, LoopPlan
from forwax._sites.products import Products


@dataclasses.dataclass(frozen=True, eq=False)
class Mirror:
    """A weight whose twin is kept from step to step.

    Attributes:
        variable: the weight, in front of what only moves and repeats its entries.
        equations: from the weight to its product.
        loops: the loops around it, outermost first.
        varies: for each of these whether the weight differs from step to step.
    """

    variable: Variable
    equations: tuple[Equation, ...]
    loops: tuple[Equation, ...] = ()
    varies: tuple[bool, ...] = ()

    @property
    def product(self) -> Equation:
        """The product with data."""
        return self.equations[-1]

    def inside(self, equation: Equation) -> bool:
        """Whether it stands in a loop, or in one inside it."""
        return equation in self.loops


@dataclasses.dataclass(frozen=True, eq=False)
class WayBack:
    """How errors cross the products of a program.

    Attributes:
        products: where trained weights meet data.
        inlets: for each product that is cut the numbers of its inlets, by the variable that it
            reads.
        is_aligned: which products errors cross through the twins of their weights.
        twins: what stands for parameters on the way back, by variable; chains of parameters are
            evaluated on it a second time. What has none is its own. Those of a loop's body that
            differ from step to step have a leading axis.
        mirrors: where the twins of a loop's body stand.
        is_traced: whether it is only asked what hangs on what.
    """

    products: Products
    inlets: Mapping[Equation, Mapping[Variable, int]]
    is_aligned: Callable[[Equation], bool]
    twins: Mapping[Variable, Any] = dataclasses.field(default_factory=dict)
    mirrors: Sequence[Mirror] = ()
    is_traced: bool = False


def forward(
    level: Level,
    inputs: Sequence[Any],
    way: WayBack,
    noise: Mapping[int, Array] | None = None,
    time: Array | None = None,
    behind: Mapping[Variable, Array] | None = None,
) -> tuple[Values, dict[int, Array]]:
    """Evaluate a level.

    Args:
        level: what to evaluate.
        inputs: the values of the program's inputs.
        way: how errors come back.
        noise: by the inlet that it enters at, with a leading axis for each loop around it; then
            nothing is cut.
        time: the scalar whose tangent scales the noise.
        behind: noise by the variable that it is added to, with such axes too.

    Returns:
        The values of all variables of this level, and of each inlet the value in front of the cut;
        those of a loop's body have a leading axis.
    """
    run = _LevelRun(way, dict(way.twins), noise, behind or {}, time)
    return run.level(level, inputs), run.taps


@dataclasses.dataclass
class _LevelRun:
    """One evaluation of one level.

    Attributes:
        way: how errors come back.
        twins: those of the level's inputs, and of what was computed from them so far.
        noise: what enters at each inlet; None to cut there.
        behind: what enters at variables.
        time: as in `forward`.
        taps: the values in front of the cuts so far.
        entered: what products read in place of them.
    """

    way: WayBack
    twins: dict[Variable, Any]
    noise: Mapping[int, Array] | None
    behind: Mapping[Variable, Array]
    time: Array | None
    taps: dict[int, Array] = dataclasses.field(default_factory=dict)
    entered: dict[int, Array] = dataclasses.field(default_factory=dict)

    def level(self, level: Level, inputs: Sequence[Any]) -> Values:
        """The values of all variables of a level."""
        env: Values = dict(zip(level.program.inputs, inputs, strict=True))
        for equation in level.program.equations:
            values = self.entering(equation, env)
            plan = level.loop_of(equation)
            if plan is not None:
                outputs = self.loop(plan, values)
            else:
                outputs = self.apply(equation, values)
            for v, value in zip(equation.outputs, outputs, strict=True):
                if v in self.behind:
                    value = inject(value, self.behind[v], self.time)
                env[v] = value
        return env

    def entering(self, equation: Equation, env: Values) -> list[Any]:
        """An equation's inputs, those behind an inlet as it lets them through."""
        inlets = self.way.inlets.get(equation, {})
        values = []
        for atom in equation.inputs:
            value = read(atom, env)
            if not isinstance(atom, Constant) and atom in inlets:
                value = self.through(inlets[atom], value)
            values.append(value)
        return values

    def through(self, number: int, value: Array) -> Array:
        """What products read at an inlet: all of them the same value, with one noise."""
        if number not in self.entered:
            if self.noise is None:
                # The error of what is in front of the cut comes from outside.
                self.taps[number] = value
                self.entered[number] = lax.stop_gradient(value)
            else:
                self.entered[number] = inject(value, self.noise[number], self.time)
        return self.entered[number]

    def apply(self, equation: Equation, values: Sequence[Any]) -> list[Any]:
        """Compute an equation, with the weight's twin in the derivative of a product."""
        if self.time is not None and equation.facts.lacks_jvp:
            return with_jvp(equation, values, or_joined=self.way.is_traced)
        if not self.twins:
            return bind(equation, values)
        if self.way.is_aligned(equation):
            return [_aligned(equation, values, self.twins_of(equation, values))]
        is_chain = self.way.products.makes_weights(equation)
        if is_chain and self.twins.keys().isdisjoint(equation.outputs):
            # What is done to a weight before it is used is done to its twin too.
            computed = bind(equation, self.twins_of(equation, values))
            self.twins.update(zip(equation.outputs, computed, strict=True))
        return bind(equation, values)

    def twins_of(self, equation: Equation, values: Sequence[Any]) -> list[Any]:
        """What stands for an equation's inputs on the way back: the twins, else the values."""
        twins = []
        for atom, twin in zip(equation.inputs, values, strict=True):
            if not isinstance(atom, Constant):
                twin = self.twins.get(atom, twin)
            twins.append(twin)
        return twins

    def loop(self, plan: LoopPlan, values: Sequence[Any]) -> list[Any]:
        """Run a loop; what is inside is done in every step."""
        loop = plan.loop
        body = plan.level.program
        consts, first_carry, scanned = loop.split(values)
        pairs = zip(body.inputs, plan.equation.inputs, strict=True)
        const_pairs, carry_pairs, scanned_pairs = loop.split(list(pairs))

        # A carry is a weight only if the body returns it as it is; so is its twin.
        is_made = self.way.products.is_made
        entering = self.known([*const_pairs, *carry_pairs])
        fixed = {v: twin for v, twin in entering.items() if is_made(v)}
        returned = zip(plan.equation.outputs, body.outputs, strict=True)
        handed_on, stacked = loop.split_outputs(list(returned))
        fixed_inside, scanned_inside = self.twins_inside(plan)
        fixed |= fixed_inside
        # Each step takes its slice of the noise that enters inside.
        numbers = _numbers_inside(plan.level, self.way)
        noise = None
        if self.noise is not None:
            noise = {number: self.noise[number] for number in numbers}
        made = _made_inside(plan.level)
        behind = {v: x for v, x in self.behind.items() if v in made}

        def step(carry: list[Any], slices: Any) -> tuple[list[Any], Any]:
            xs, twins_of_step, noise_of_step, behind_of_step = slices
            twins = {**fixed, **twins_of_step}
            run = _LevelRun(self.way, twins, noise_of_step, behind_of_step, self.time)
            env = run.level(plan.level, [*consts, *carry, *xs])
            outputs = [read(atom, env) for atom in body.outputs]
            carry, ys = loop.split_outputs(outputs)
            return carry, (ys, run.taps, run.known(stacked))

        twins_of_steps = self.known(scanned_pairs) | scanned_inside
        slices = (scanned, twins_of_steps, noise, behind)
        carry, (ys, taps, twins) = loop.scan(step, first_carry, slices)
        self.taps.update(taps)
        self.twins.update(twins)
        # A weight that goes through the loop as it is comes out with its twin.
        for outer, v in handed_on:
            if not isinstance(v, Constant) and v in fixed:
                self.twins[outer] = fixed[v]
        return [*carry, *ys]

    def twins_inside(
        self, plan: LoopPlan
    ) -> tuple[dict[Variable, Any], dict[Variable, Any]]:
        """The twins of a loop's body: those of all steps, and those of each."""
        fixed: dict[Variable, Any] = {}
        scanned: dict[Variable, Any] = {}
        for mirror in self.way.mirrors:
            if mirror.inside(plan.equation) and mirror.variable in self.twins:
                depth = mirror.loops.index(plan.equation)
                part = scanned if mirror.varies[depth] else fixed
                part[mirror.variable] = self.twins[mirror.variable]
        return fixed, scanned

    def known(self, pairs: Sequence[tuple[Variable, Atom]]) -> dict[Variable, Any]:
        """The twins of variables by what stands outside for them."""
        twins: dict[Variable, Any] = {}
        for v, atom in pairs:
            if not isinstance(atom, Constant) and atom in self.twins:
                twins[v] = self.twins[atom]
        return twins


def _numbers_inside(level: Level, way: WayBack) -> set[int]:
    """The inlets of a loop's body, and of the loops inside it."""
    numbers: set[int] = set()
    for equation in level.program.equations:
        numbers.update(way.inlets.get(equation, {}).values())
    for plan in level.loops.values():
        numbers |= _numbers_inside(plan.level, way)
    return numbers


def _made_inside(level: Level) -> set[Variable]:
    """What the equations of a loop's body compute, and of the loops inside it."""
    made = {v for equation in level.program.equations for v in equation.outputs}
    for plan in level.loops.values():
        made |= _made_inside(plan.level)
    return made


def _aligned(
    equation: Equation,
    values: Sequence[Any],
    twins: Sequence[Any],
) -> Any:
    """A bilinear operation whose derivative by one operand takes the other's twin."""

    @jax.custom_jvp
    def operation(values: Sequence[Any], twins: Sequence[Any]) -> Any:
        return bind(equation, values)[0]

    @operation.defjvp
    def rule(primals: Any, tangents: Any) -> tuple[Any, Any]:
        values, twins = primals
        moved, _ = tangents
        # By the product rule, with the other operand's twin in place of itself.
        (first,) = bind(equation, [moved[0], twins[1]])
        (second,) = bind(equation, [twins[0], moved[1]])
        # Not `operation`: a derivative around this one is that of the values.
        return bind(equation, values)[0], first + second

    return operation(list(values), list(twins))
