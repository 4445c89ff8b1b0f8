"""The one list of what the laws are tested on: losses, tangents, combinations and rules.

A new tangent, combination, rule or kind of loss is tested by being listed here.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import forwax as fx
from forwax import combine, tangents

Tree = Any


# --- losses ---


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss, the arguments to call it with, and what to expect of it.

    Attributes:
        name: the test's id.
        loss: the user's function.
        make: makes the positional arguments.
        kwargs: keyword arguments of the loss.
        options: `argnums`, `has_aux` and `in_axes` of `forwax.value_and_grad`.
        reverse: whether reverse mode accepts the loss.
        traceable: whether the loss runs under a trace.
        data: whether parameters meet data, as rules on sites need it.
    """

    name: str
    loss: Callable[..., Any]
    make: Callable[[], tuple]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    reverse: bool = True
    traceable: bool = True
    data: bool = False

    @property
    def args(self) -> tuple:
        """The positional arguments."""
        return self.make()

    def estimate(self, rule: fx.Rule, key: Array) -> Any:
        """`forwax.value_and_grad` of this case."""
        return fx.value_and_grad(self.loss, rule, **self.options)(
            key, *self.args, **self.kwargs
        )

    def reference(self) -> tuple[tuple[Array, Tree], Tree]:
        """`((value, aux), grads)` by JAX alone; forward mode where reverse mode refuses."""
        argnums = self.options.get("argnums", 0)
        if self.reverse:
            return jax.value_and_grad(self._plain, argnums, has_aux=True)(*self.args)
        grads = jax.jacfwd(lambda *args: self._plain(*args)[0], argnums)(*self.args)
        return self._plain(*self.args), grads

    def _plain(self, *args: Any) -> tuple[Array, Tree]:
        """The scalar objective and aux of the whole batch, one example after the other."""
        in_axes = self.options.get("in_axes")
        if in_axes is None:
            return self._one(*args)
        number = in_axes.index(0)

        def at(i: int) -> list[Any]:
            """The arguments of one example."""
            pairs = zip(args, in_axes, strict=True)
            return [
                x if axis is None else jax.tree.map(lambda x: x[i], x)
                for x, axis in pairs
            ]

        count = len(jax.tree.leaves(args[number])[0])
        outputs = [self._one(*at(i)) for i in range(count)]
        values, auxes = zip(*outputs, strict=True)
        return sum(values) / len(values), jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *auxes
        )

    def _one(self, *args: Any) -> tuple[Array, Tree]:
        out = self.loss(*args, **self.kwargs)
        value, aux = out if self.options.get("has_aux") else (out, None)
        if isinstance(value, fx.LocalLosses):
            value = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(value.tree))
        return value, aux


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> Array:
    """Fixed data, the same on every machine."""
    generator = np.random.default_rng(seed)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.asarray(
            generator.normal(size=shape) + 1j * generator.normal(size=shape), dtype
        )
    return jnp.asarray(generator.normal(size=shape), dtype)


def quadratic(w: Array) -> Array:
    """Any leaf: Σ |w|² c / 2 with curvatures 1, 2, ..."""
    curvature = (
        jnp.arange(1, w.size + 1).reshape(w.shape).astype(jnp.finfo(w.dtype).dtype)
    )
    return jnp.sum(curvature * jnp.abs(w) ** 2) / 2


def tree_loss(params: Tree) -> Array:
    """Every leaf's quadratic, coupled."""
    parts = [quadratic(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(params)]
    return functools.reduce(
        lambda total, part: total + part + 0.1 * total * part, parts
    )


def regression(
    params: dict[str, Array], x: Array, *, target: float | Array = 1.0
) -> Array:
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"][None]) - target) ** 2)


def complex_loss(z: Array) -> Array:
    """Not holomorphic, and not symmetric under conjugation, so that a wrong conjugate shows."""
    return jnp.sum(jnp.abs(z) ** 2) + jnp.sum(z**2).imag + 2 * jnp.sum(z.real)


def scalar_loss(x: Array) -> Array:
    return jnp.sin(x) * x


def mlp(params: dict[str, Array], x: Array, y: Array) -> Array:
    """One example."""
    hidden = jnp.tanh(x @ params["first"] + params["bias"])
    return (hidden @ params["second"] - y) ** 2


def mlp_params() -> dict[str, Array]:
    return {"first": normal(1, 3, 2), "bias": normal(2, 2), "second": normal(3, 2)}


def with_aux(w: Array, x: Array) -> tuple[Array, dict[str, Array]]:
    prediction = jnp.vdot(w, x)
    return (prediction - 1) ** 2, {"prediction": prediction, "doubled": 2 * x}


def mlp_with_aux(params: dict[str, Array], x: Array, y: Array) -> tuple[Array, Array]:
    return mlp(params, x, y), 3 * x


def local_losses(params: dict[str, Array]) -> fx.LocalLosses:
    """Two blocks; no gradient flows from the second into the first."""
    hidden = jnp.tanh(params["first"])
    second = (lax.stop_gradient(hidden) * params["second"]) ** 2
    return fx.LocalLosses({"first": jnp.sum(hidden), "second": second})


def while_loss(x: Array) -> Array:
    """Doubles until the sum is large: the number of trips depends on x."""
    return lax.while_loop(
        lambda s: jnp.sum(s**2) < 50, lambda s: s * 1.5 + 0.1, x
    ).sum()


def island(w: Array, x: Array) -> Array:
    """A piece that runs forwards only, through which reverse mode goes all the same."""
    converge = fx.enable_reverse(
        lambda h: lax.while_loop(
            lambda s: jnp.sum(s**2) > 0.1, lambda s: 0.7 * s + 0.1 * jnp.sin(s), h
        )
    )
    return jnp.sum(jnp.tanh(converge(x @ w)))


def rnn(w: Array, xs: Array) -> Array:
    def step(h: Array, x: Array) -> tuple[Array, Array]:
        h = jnp.tanh(w @ h + x)
        return h, jnp.sum(h**2)

    return jnp.sum(lax.scan(step, jnp.zeros(w.shape[0]), xs)[1])


def remat(w: Array) -> Array:
    return jnp.sum(jax.checkpoint(lambda u: jnp.sin(u) ** 2)(w))


def eager(w: Array) -> Array:
    """Python control flow on concrete values."""
    total = jnp.zeros(())
    while total < 10:
        total = total + jnp.sum(w**2)
    return total * w[0] if w[0] > 0 else total


def two_arguments(w: Array, x: Array, v: tuple[Array, Array]) -> Array:
    return jnp.sum((w * x) ** 2) + jnp.sum(v[0]) * jnp.sum(w) * v[1]


def keyword_loss(w: Array, *, scale: Array, power: int = 2) -> Array:
    return jnp.sum(scale * w**power)


CASES = [
    Case("vector", quadratic, lambda: (normal(0, 5),)),
    Case(
        "dict",
        regression,
        lambda: ({"w": normal(1, 3, 2), "b": normal(2, 2)}, normal(3, 4, 3)),
        data=True,
    ),
    Case(
        "nested-tuple",
        tree_loss,
        lambda: (((normal(1, 2), (normal(2, 1, 2),)), normal(3, 1)),),
    ),
    Case(
        "mixed-dtypes",
        tree_loss,
        lambda: ({"a": normal(1, 3), "b": normal(2, 2, dtype=jnp.bfloat16)},),
    ),
    Case("complex", complex_loss, lambda: (normal(1, 3, dtype=jnp.complex64),)),
    Case(
        "real-and-complex",
        tree_loss,
        lambda: ((normal(1, 2), normal(2, 2, dtype=jnp.complex64)),),
    ),
    Case("scalar", scalar_loss, lambda: (jnp.asarray(0.7, jnp.float32),)),
    Case(
        "per-example",
        mlp,
        lambda: (mlp_params(), normal(4, 4, 3), normal(5, 4)),
        options={"in_axes": (None, 0, 0)},
        data=True,
    ),
    Case(
        "per-example-aux",
        mlp_with_aux,
        lambda: (mlp_params(), normal(4, 4, 3), normal(5, 4)),
        options={"in_axes": (None, 0, 0), "has_aux": True},
        data=True,
    ),
    Case(
        "local-losses",
        local_losses,
        lambda: ({"first": normal(1, 3), "second": normal(2, 3)},),
    ),
    Case(
        "has-aux",
        with_aux,
        lambda: (normal(1, 4), normal(2, 4)),
        options={"has_aux": True},
        data=True,
    ),
    Case(
        "while-loop", while_loss, lambda: (jnp.abs(normal(1, 3)) + 0.5,), reverse=False
    ),
    Case("island", island, lambda: (normal(1, 3, 2), normal(2, 2, 3)), data=True),
    Case("scan", rnn, lambda: (normal(1, 2, 2), normal(2, 5, 2)), data=True),
    Case("remat", remat, lambda: (normal(1, 4),)),
    Case("eager", eager, lambda: (jnp.abs(normal(1, 4)) + 0.5,), traceable=False),
    Case(
        "argnums",
        two_arguments,
        lambda: (normal(1, 3), normal(2, 3), (normal(3, 2), normal(4))),
        options={"argnums": (2, 0)},
        data=True,
    ),
    Case(
        "keywords",
        keyword_loss,
        lambda: (normal(1, 3),),
        kwargs={"scale": normal(2, 3), "power": 3},
    ),
    Case("numpy", quadratic, lambda: (np.array([1.0, -2.0, 3.0], np.float32),)),
]
TRACEABLE = [case for case in CASES if case.traceable]


# --- residuals, for Gauss-Newton ---


@dataclasses.dataclass(frozen=True)
class ResidualCase:
    """A program of residuals, its arguments, and the loss of them.

    Attributes:
        name: the test's id.
        residuals: the user's function.
        make: makes the positional arguments.
        loss: a convex function of the residuals; None for half the sum of squares.
    """

    name: str
    residuals: Callable[..., Tree]
    make: Callable[[], tuple]
    loss: Callable[[Tree], Array] | None = None

    def of(self, dtype: Any) -> tuple:
        """The arguments, floating ones in a dtype and complex ones in one as wide."""
        as_wide = jnp.complex128 if dtype == jnp.float64 else jnp.complex64

        def cast(x: Any) -> Any:
            if jnp.iscomplexobj(x):
                return jnp.asarray(x, as_wide)
            is_real = jnp.issubdtype(jnp.result_type(x), jnp.floating)
            return jnp.asarray(x, dtype) if is_real else x

        return jax.tree.map(cast, self.make())

    def value(self, *args: Any) -> Array:
        """The loss."""
        found = self.residuals(*args)
        return half_squares(found) if self.loss is None else self.loss(found)


def half_squares(tree: Tree) -> Array:
    parts = [jnp.sum(jnp.abs(leaf) ** 2) for leaf in jax.tree.leaves(tree)]
    return jnp.sum(jnp.stack(parts)) / 2


def affine(w: Array, x: Array, y: Array) -> Array:
    return x @ w - y


def bends(params: dict[str, Array], x: Array, y: Array) -> Array:
    return jnp.tanh(x @ params["w"] + params["b"][None]) - y


def with_prior(params: tuple, x: Array) -> dict[str, Any]:
    """A tree of residuals of a nested tree of parameters, which are among them."""
    (first, (second,)), bias = params
    misfit = jnp.sin(x @ first)[:, None] * second[None] + bias
    return {"misfit": misfit, "prior": (first, second, bias)}


def phases(z: Array, x: Array) -> Array:
    """Complex residuals, not holomorphic in complex parameters."""
    return x @ z + 0.1 * jnp.conj(z[:1]) * z[1:2] ** 2


def waves(w: Array, x: Array) -> Array:
    """Complex residuals of real parameters."""
    phase = x @ w
    if phase.dtype == jnp.bfloat16:  # of which there are no complex numbers
        phase = phase.astype(jnp.float32)
    return lax.complex(jnp.cos(phase), jnp.sin(phase)) - 1


def scores(w: Array, x: Array) -> Array:
    return jnp.tanh(x @ w)


def cross_entropy(logits: Array) -> Array:
    labels = jnp.arange(len(logits)) % logits.shape[1]
    chances = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(chances, labels[:, None], axis=1))


def absolute_nearly(residuals: Array) -> Array:
    return jnp.sum(jnp.sqrt(1 + residuals**2))


def states(w: Array, xs: Array) -> Array:
    """Of a recurrent network, at all times."""

    def step(h: Array, x: Array) -> tuple[Array, Array]:
        h = jnp.tanh(w @ h + x)
        return h, h

    return lax.scan(step, jnp.zeros_like(xs[0]), xs)[1]


def settled(w: Array, x: Array) -> Array:
    """Where each of some states settles: a `while_loop`, which reverse mode rejects."""

    def one(x: Array) -> Array:
        start = x, x + 1
        go_on = lambda s: jnp.max(jnp.abs(s[0] - s[1])) > 1e-2
        return lax.while_loop(
            go_on, lambda s: (0.4 * jnp.sin(w) * jnp.tanh(s[0]) + x, s[0]), start
        )[0]

    return jax.vmap(one)(x) - 1


def settled_as_an_island(w: Array, x: Array) -> Array:
    return fx.enable_reverse(settled)(jnp.sin(w), x)


def powers(x: Array) -> Array:
    """Three residuals of a number."""
    return jnp.stack([x - 2, x**2 - 1, jnp.sin(x)])


RESIDUALS = [
    ResidualCase(
        "affine", affine, lambda: (normal(1, 3), normal(2, 7, 3), normal(3, 7))
    ),
    ResidualCase(
        "fewer-residuals",
        affine,
        lambda: (normal(1, 9), normal(2, 4, 9), normal(3, 4)),
    ),
    ResidualCase(
        "low-rank",
        affine,
        # exact in float32, so that it has this rank in float64 too
        lambda: (
            normal(1, 6),
            jnp.round(normal(2, 8, 2), 0) @ jnp.round(3 * normal(4, 2, 6), 0),
            normal(3, 8),
        ),
    ),
    ResidualCase(
        "dict",
        bends,
        lambda: (
            {"w": 0.3 * normal(1, 3, 2), "b": normal(2, 2)},
            normal(3, 8, 3),
            0.5 * normal(4, 8, 2),
        ),
    ),
    ResidualCase(
        "trees",
        with_prior,
        lambda: (((normal(1, 3), (normal(2, 2),)), normal(3)), normal(4, 5, 3)),
    ),
    ResidualCase(
        "complex",
        phases,
        lambda: [
            normal(i, *shape, dtype=jnp.complex64)
            for i, shape in ((1, (3,)), (2, (6, 3)))
        ],
    ),
    ResidualCase("waves", waves, lambda: (normal(1, 3), normal(2, 6, 3))),
    ResidualCase(
        "cross-entropy",
        scores,
        lambda: (normal(1, 3, 3), normal(2, 9, 3)),
        loss=cross_entropy,
    ),
    ResidualCase(
        "robust",
        affine,
        lambda: (normal(1, 3), normal(2, 7, 3), normal(3, 7)),
        loss=absolute_nearly,
    ),
    ResidualCase("scan", states, lambda: (normal(1, 2, 2), normal(2, 5, 2))),
    ResidualCase("while-loop", settled, lambda: (normal(1, 3), normal(2, 4, 3))),
    ResidualCase(
        "island", settled_as_an_island, lambda: (normal(1, 3), normal(2, 4, 3))
    ),
    ResidualCase("scalar", powers, lambda: (jnp.asarray(0.7, jnp.float32),)),
    ResidualCase(
        "numpy",
        affine,
        lambda: (
            np.ones(2, np.float32),
            np.eye(4, 2, dtype=np.float32),
            np.arange(4, dtype=np.float32),
        ),
    ),
]


# --- tangents and their laws ---


@dataclasses.dataclass(frozen=True)
class TangentCase:
    """A distribution and its exact law.

    The law is of n, k and cos² of the angle between gradient and guess.

    Attributes:
        name: the test's id.
        make: makes the distribution from a guess (a tree like the parameters).
        relative_mse: E|ĝ - g|²/|g|² of the mean.
        projection: that of the projection on the span.
        guided: whether the law depends on the guess.
        coordinatewise: whether each shard of a sharded parameter can draw its own.
    """

    name: str
    make: Callable[[Tree], tangents.Tangents]
    relative_mse: Callable[[int, int, float], float]
    projection: Callable[[int, int, float], float] = lambda n, k, cos2: 1 - k / n
    guided: bool = False
    coordinatewise: bool = False


TANGENTS = [
    TangentCase(
        "signs",
        lambda h: tangents.Rademacher(),
        lambda n, k, c: (n - 1) / k,
        coordinatewise=True,
    ),
    TangentCase(
        "normal",
        lambda h: tangents.Normal(),
        lambda n, k, c: (n + 1) / k,
        coordinatewise=True,
    ),
    TangentCase("low-rank", lambda h: tangents.LowRank(), lambda n, k, c: (n - 1) / k),
    TangentCase("sphere", lambda h: tangents.Sphere(), lambda n, k, c: (n - 1) / k),
    TangentCase(
        "coordinate",
        lambda h: tangents.Coordinate(),
        lambda n, k, c: (n - 1) / k,
        lambda n, k, c: (1 - 1 / n) ** k,  # a coordinate can be drawn twice
    ),
    TangentCase(
        "coordinates",
        lambda h: tangents.Coordinate(replace=False),
        lambda n, k, c: n / k - 1,
    ),
    TangentCase(
        "orthonormal", lambda h: tangents.Orthonormal(), lambda n, k, c: n / k - 1
    ),
    TangentCase(
        "hadamard",
        lambda h: tangents.Hadamard(),
        lambda n, k, c: n / k - 1,
        coordinatewise=True,
    ),
    TangentCase(
        "sparse",
        lambda h: tangents.Sparse(0.5),
        lambda n, k, c: (n + 2 - 2) / k,
        coordinatewise=True,
    ),
    TangentCase(
        "guided",
        tangents.Guided,
        lambda n, k, c: ((n - 1) / (k - 1) - 1) * (1 - c),
        lambda n, k, c: (1 - (k - 1) / (n - 1)) * (1 - c),
        guided=True,
    ),
]

COMBINATIONS: dict[str, Callable[[Tree], combine.Combine]] = {
    "mean": lambda h: combine.Mean(),
    "projection": lambda h: combine.Projection(),
    "shrinkage": lambda h: combine.Shrinkage(),
    "control-variate": combine.ControlVariate,
}


# --- rules ---


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=[], meta_fields=["num_tangents"]
)
@dataclasses.dataclass(frozen=True)
class ReverseBySlopes(fx.Rule):
    """`jax.grad` of a loss in `forwax.enable_reverse`, so that the laws of rules are its own."""

    num_tangents: int | None = None

    def estimate(self, key: Array, problem: Any) -> tuple[Array, Tree, Tree]:
        random = {"num_tangents": self.num_tangents, "key": key}
        wrapped = fx.enable_reverse(
            problem.objective, **random if self.num_tangents else {}
        )
        both = jax.value_and_grad(wrapped, has_aux=True)
        (value, aux), grads = both(problem.params)
        return value, aux, grads

    def relative_mse(self, n: int) -> float:
        return max(n - 1, 0) / self.num_tangents if self.num_tangents else 0.0

    def learning_rate_scale(self, n: int) -> float:
        return 1 / (1 + self.relative_mse(n))


RULES: dict[str, fx.Rule] = {
    "weight": fx.WeightPerturbation(),
    "weight-chunked": fx.WeightPerturbation(num_tangents=3, chunk_size=2),
    "weight-projection": fx.WeightPerturbation(
        tangents.Normal(), 2, combine.Projection()
    ),
    "low-rank": fx.WeightPerturbation(tangents.LowRank(), 2),
    "safe": fx.Safe(fx.WeightPerturbation()),
    "exact": fx.Exact(),
    "exact-chunked": fx.Exact(chunk_size=2),
    "finite-difference": fx.FiniteDifference(epsilon=1e-2),  # large enough for bfloat16
    "finite-differences": fx.FiniteDifference(
        tangents.Normal(), 3, combine.Shrinkage(), epsilon=1e-2
    ),
    "backprop": fx.Backprop(),
    "reverse-by-slopes": ReverseBySlopes(),
    "reverse-by-slopes-random": ReverseBySlopes(num_tangents=2),
}
SITE_RULES: dict[str, fx.Rule] = {
    "activity": fx.ActivityPerturbation(),
    "learned-feedback": fx.LearnedFeedback(correction=True),
    "decay": fx.ActivityPerturbation(credit=fx.credit.Decay(0.9)),
    "activity-auto": fx.ActivityPerturbation(noise="auto"),
}
"""Rules that need data."""

EXAMPLE_RULES: dict[str, fx.Rule] = {
    "by-example": fx.WeightPerturbation(num_tangents=2, per_example=True),
}
"""Rules that need examples, as `in_axes` says."""

BIASED = {
    "weight-projection",
    "safe",
    "finite-difference",
    "finite-differences",
    "decay",
}
"""Those of the rules whose mean is not the gradient."""

TRACES = {"low-rank", "reverse-by-slopes", "reverse-by-slopes-random"}
"""Those of the rules that trace the loss."""

REVERSE_MODE = {"backprop"}
"""Those of the rules that run reverse mode."""


def rules_for(case: Case) -> dict[str, fx.Rule]:
    """The rules that can estimate a case's gradient."""
    rules = {
        name: rule
        for name, rule in RULES.items()
        if case.reverse or not rule.reverse_mode
    }
    if not case.traceable:
        for name in TRACES:
            del rules[name]
    if case.options.get("in_axes") is not None:
        rules |= EXAMPLE_RULES
    return rules | (SITE_RULES if case.data else {})


CASE_RULES = [(case, name) for case in CASES for name in rules_for(case)]
CASE_RULE_IDS = [f"{case.name}-{name}" for case, name in CASE_RULES]


# --- arithmetic on trees ---


def inner(left: Tree, right: Tree) -> Array:
    """The real inner product over all leaves."""
    parts = [
        jnp.sum((jnp.conj(a) * b).real)
        for a, b in zip(*map(jax.tree.leaves, (left, right)), strict=True)
    ]
    return jnp.sum(jnp.stack(parts))


def difference(left: Tree, right: Tree) -> Tree:
    return jax.tree.map(lambda a, b: a - b, left, right)


def assert_trees_close(
    actual: Tree, expected: Tree, rtol: float = 1e-5, atol: float = 1e-6
) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, want in zip(
        jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        wide = np.complex128 if jnp.iscomplexobj(want) else np.float64
        np.testing.assert_allclose(
            np.asarray(got).astype(wide), np.asarray(want).astype(wide), rtol, atol
        )
