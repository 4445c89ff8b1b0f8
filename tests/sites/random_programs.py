"""Small random losses: a list of steps, each of which takes one example's activity to the next."""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import forwax as fx

N = 2
MOST = 12  # entries of one example's activity


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation, what is done to its weights first, what wraps it, and two free choices."""

    op: str
    chain: str = "as it is"
    tied: bool = False
    wrap: str = "nothing"
    a: int = 0
    b: int = 0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A whole loss: its steps, its end, the weights that decay, and how it is called."""

    steps: tuple[Step, ...]
    head: str = "waves"
    decay: int = 0
    local: bool = False
    mapped: bool = True


class Env:
    """The parameters in the order of their use, and what a step can see of the example."""

    def __init__(
        self,
        given: dict[str, Array] | None,
        made: dict[str, np.ndarray],
        example: tuple[Array, ...],
    ) -> None:
        self.given, self.made, self.example = given, made, example
        self.count, self.saved, self.losses = 0, [], []

    def weight(self, step: Step, *shape: int) -> Array:
        """A parameter behind the step's chain: a new one, or when tied the first of this shape."""
        same = [
            name
            for name in list(self.made)[: self.count]
            if self.made[name].shape == shape
        ]
        if step.tied and same:
            return self._through(step.chain, self._read(same[0]))
        name = f"p{self.count}"
        self.made.setdefault(
            name, np.random.default_rng(self.count).normal(size=shape) * 0.7
        )
        self.count += 1
        return self._through(step.chain, self._read(name))

    def _through(self, chain: str, w: Array) -> Array:
        if chain in OF_EXAMPLE:
            return OF_EXAMPLE[chain](w, jnp.mean(self.example[0]))
        return CHAINS[chain](w)

    def _read(self, name: str) -> Array:
        return jnp.asarray(self.made[name] if self.given is None else self.given[name])


def spectral(w: Array) -> Array:
    again = lambda s: (s[0] + 1, 1.1 * s[1] / jnp.sqrt(1 + jnp.sum(s[1] ** 2)))
    return w / (
        1 + jnp.abs(jnp.sum(lax.while_loop(lambda s: s[0] < 2, again, (0, w))[1]))
    )


CHAINS: dict[str, Callable[[Array], Array]] = {
    "as it is": lambda w: w,
    "scaled": lambda w: w * jnp.exp(-jnp.mean(w)),
    "standardised": lambda w: (w - jnp.mean(w)) / jnp.sqrt(jnp.var(w) + 0.5),
    "flipped": lambda w: jnp.flip(w.T).reshape(w.shape),
    "stopped norm": lambda w: w / lax.stop_gradient(1 + jnp.linalg.norm(w.ravel())),
    "half stopped": lambda w: w + lax.stop_gradient(jnp.tanh(w)),
    "cumulated": lambda w: (
        lax.scan(lambda c, x: (c + x, c * x), w[0] * 0, w)[1] if w.ndim else w
    ),
    "spectral": spectral,
    "added to a frozen one": lambda w: w + frozen(w),
    "masked": lambda w: w * np.sign(frozen(w)).clip(0),
    "chosen": lambda w: jnp.where(frozen(w) > 0, w, 0),
    "scaled by a statistic": lambda w: w * lax.rsqrt(jnp.var(frozen(w)) + 0.5),
}

OF_EXAMPLE: dict[str, Callable[[Array, Array], Array]] = {
    "noisy": lambda w, x: w + jnp.exp(0.1 * w) * jnp.sin(frozen(w) + x),
    "dropped": lambda w, x: jnp.where(frozen(w) > x, w / 0.5, 0),
}


def frozen(w: Array) -> np.ndarray:
    """An array of a weight's shape that no parameter enters."""
    return np.asarray(np.random.default_rng(w.size).normal(size=w.shape), w.dtype)


def matrix(h: Array) -> Array:
    return h[None] if h.ndim == 1 else h.reshape(-1, h.shape[-1])


def dense(env: Env, h: Array, s: Step) -> Array:
    m = matrix(h)
    t, d = m.shape
    out = 2 + s.b % 2
    if s.a == 0:
        return m @ env.weight(s, d, out)
    if s.a == 1:
        return env.weight(s, out, t) @ m
    if s.a == 2:
        return (env.weight(s, out, d) @ m.T).T
    return h.ravel() @ env.weight(s, h.size, out)


def batched(env: Env, h: Array, s: Step) -> Array:
    m = matrix(h)
    t, d = m.shape
    if s.a % 2:
        return jnp.einsum("td,dto->to", m, env.weight(s, d, t, 2))
    return jnp.einsum("td,tdo->to", m, env.weight(s, t, d, 2))


def convolution_1d(env: Env, h: Array, s: Step) -> Array:
    m = matrix(h)
    groups = 2 if m.shape[1] % 2 == 0 and s.b % 2 else 1
    kernel = env.weight(s, 2, m.shape[1] // groups, 2)
    return lax.conv_general_dilated(
        m[None], kernel, (1 + s.a % 2,), "SAME",
        rhs_dilation=(1 + s.a // 2,), feature_group_count=groups,
        dimension_numbers=("NWC", "WIO", "NWC"),
    )[0]  # fmt: skip


def convolution_2d(env: Env, h: Array, s: Step) -> Array:
    image = h if h.ndim == 3 else matrix(h)[..., None]
    channels = image.shape[-1]
    groups = channels if s.b % 2 else 1
    kernel = env.weight(s, 2, 2, channels // groups, 2 if groups == 1 else channels)
    padding = "SAME" if s.b // 2 or min(image.shape[:2]) < 2 else "VALID"
    strides = (1 + s.a % 2, 1 + s.a // 2)
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        image[None],
        kernel,
        strides,
        padding,
        dimension_numbers=numbers,
        feature_group_count=groups,
    )[0]


def gain(env: Env, h: Array, s: Step) -> Array:
    g = env.weight(s, *((), h.shape[-1:], h.shape, h.shape[:1])[s.a])
    g = (
        g.reshape(*g.shape, *[1] * (h.ndim - 1))
        if s.a == 3
        else jnp.broadcast_to(g, h.shape)
    )
    return (h * g, g * h + g, h / (1 + g**2), h * g * g)[s.b]


def bias(env: Env, h: Array, s: Step) -> Array:
    b = jnp.broadcast_to(
        env.weight(s, *((), h.shape[-1:], h.shape, h.shape)[s.a]), h.shape
    )
    return (h + b, b - h, jnp.tanh(h) + b, jnp.maximum(h, b))[s.b]


def move(env: Env, h: Array, s: Step) -> Array:
    m = matrix(h)
    moved = (
        m.T,
        h.ravel(),
        jnp.flip(m, s.b % 2),
        jnp.concatenate([m, jnp.sin(m[:1])]),
    )[s.a]
    if s.b == 3:
        return jnp.broadcast_to(moved[None], (2, *moved.shape)) * jnp.arange(
            1.0, 3
        ).reshape(2, *[1] * moved.ndim)
    return moved


def norm(env: Env, h: Array, s: Step) -> Array:
    axis = (None, -1, 0, -1)[s.a]
    if s.b == 0:
        return (h - jnp.mean(h, axis, keepdims=True)) / jnp.sqrt(
            jnp.var(h, axis, keepdims=True) + 0.1
        )
    if s.b == 1:
        return h * lax.rsqrt(jnp.mean(h**2, axis, keepdims=True) + 0.1)
    return (
        jax.nn.softmax(h, axis)
        if s.b == 2
        else h - jax.nn.logsumexp(h, axis, keepdims=True)
    )


ACTIVATIONS = [
    jnp.tanh,
    jax.nn.relu,
    jax.nn.silu,
    jax.nn.gelu,
    jax.nn.softplus,
    jnp.sin,
    jax.nn.relu6,
    jax.nn.elu,
]


def activation(env: Env, h: Array, s: Step) -> Array:
    return ACTIVATIONS[2 * s.a + s.b % 2](h)


def over_time(env: Env, h: Array, s: Step) -> Array:
    m = matrix(h)
    w, u, start = env.weight(s, m.shape[1], 2), env.weight(s, 2, 2), jnp.zeros(2)
    if s.a % 2:
        start = env.weight(s, 2)

    def step(h: Array, x: Array) -> tuple[Array, Array]:
        h = jnp.tanh(x @ w + h @ u)
        return (h * jax.nn.sigmoid(h @ u.T) if s.a // 2 else h), h * start

    step = jax.checkpoint(step) if s.b // 2 else step
    last, every = lax.scan(step, start, m, reverse=bool(s.b % 2))
    return every if s.b % 2 else jnp.concatenate([every, last[None]])


def over_layers(env: Env, h: Array, s: Step) -> Array:
    m = matrix(h)
    w, b = env.weight(s, 2, m.shape[1], m.shape[1]), env.weight(s, 2, m.shape[1])

    def layer(h: Array, own: tuple[Array, Array]) -> tuple[Array, Array]:
        h = (h if s.a % 2 else 0) + jnp.tanh(h @ own[0] + own[1][None])
        return h, jnp.sum(own[0] ** 2) if s.a // 2 else jnp.sum(h)

    h, rest = lax.scan(jax.checkpoint(layer) if s.b % 2 else layer, m, (w, b))
    return h + 0.1 * jnp.sum(rest)


def indexed_layers(env: Env, h: Array, s: Step) -> Array:
    w = env.weight(s, 2, h.shape[-1], h.shape[-1])
    if s.a % 2:
        carried = lambda c, i: (
            (jnp.tanh(c[0] @ c[1][i]), c[1], c[2] * 0.5 + c[1][i, 0, 0]),
            None,
        )
        (h, _, extra), _ = lax.scan(carried, (h, w, jnp.zeros(())), jnp.arange(2))
        return h + extra
    return lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ w[i]), h)


def conditional(env: Env, h: Array, s: Step) -> Array:
    w, g = env.weight(s, h.shape[-1], h.shape[-1]), env.weight(s)
    which = (
        env.example[2],
        jnp.sum(h) > 0,
        jnp.sum(env.example[0]) > 0,
        env.example[2],
    )[s.a]
    branches = [lambda h: h @ w, lambda h: jnp.sin(h) * g, lambda h: h + 1]
    if s.b == 0:
        return lax.switch(which.astype(int) + 1, branches, h)
    if s.b == 1:
        return lax.cond(which, branches[0], branches[2], h)
    if s.b == 2:
        return lax.cond(which, lambda h, g: h * g, lambda h, g: h - g, h, g)
    return jnp.where(which, h @ w, h * g)


def look_up(env: Env, h: Array, s: Step) -> Array:
    m, tokens = matrix(h), env.example[1]
    table = env.weight(s, 3, m.shape[1])
    if s.a == 0:
        return m + jnp.sum(table[tokens], axis=0, keepdims=True)
    if s.a == 1:
        return jnp.concatenate([m, table[tokens[:1]]])
    if s.a == 2:
        return (
            m @ jax.nn.one_hot(tokens, 3) @ table
            if m.shape[1] == 2
            else m * table[jnp.argmax(m) % 3][None]
        )
    return m + lax.dynamic_index_in_dim(
        table.at[tokens].add(m[0][None]), tokens[0], keepdims=True
    )


def gate(env: Env, h: Array, s: Step) -> Array:
    other = env.saved[s.b % len(env.saved)]
    if s.a == 0:
        return h * jax.nn.sigmoid(h * env.weight(s))
    if s.a == 1:
        return h * jnp.tanh(jnp.sum(other))
    if s.a == 2:
        return h + other if other.shape == h.shape else h + jnp.mean(other)
    return h * env.weight(s, h.shape[-1]).reshape(*[1] * (h.ndim - 1), -1) + h.ravel()[
        0
    ] * env.weight(s)


def stop(env: Env, h: Array, s: Step) -> Array:
    if s.a == 0:
        return h + lax.stop_gradient(jnp.sin(h))
    if s.a == 1:
        return h * lax.stop_gradient(env.weight(s))
    if s.a == 2:
        return h[..., :1] + lax.stop_gradient(h)
    return jnp.where(lax.stop_gradient(h) > 0, h, h * env.weight(s))


def attention(env: Env, h: Array, s: Step) -> Array:
    m = matrix(h)
    q, k = m @ env.weight(s, m.shape[1], 2), m @ env.weight(s, m.shape[1], 2)
    causal, scores = jnp.tri(m.shape[0], dtype=bool), q @ k.T
    if s.a == 0:
        return m + jax.nn.softmax(scores, where=causal | (scores > 0)) @ m
    if s.a == 1:
        return m + jax.nn.softmax(jnp.where(causal, scores, -1e9)) @ m
    if s.a == 2:
        return m + jax.nn.softmax(scores + jnp.where(causal.T, 0, -jnp.inf)) @ m
    # Some rows may be off: they hear all positions alike.
    seen = (
        causal & (scores[:1] > 0)
        if s.b % 2
        else causal & (jnp.sum(causal, 1, keepdims=True) > 1)
    )
    return m + jax.nn.softmax(jnp.where(seen, scores, -1e30)) @ m


def cumulate(env: Env, h: Array, s: Step) -> Array:
    m = matrix(h)
    m = jnp.flip(m, 0) if s.b % 2 else m
    if s.a == 0:
        return jnp.cumsum(m, axis=s.b // 2)
    if s.a == 1:
        return jnp.cumprod(jnp.tanh(m), axis=0)
    if s.a == 2:
        decays = jax.nn.sigmoid(m * env.weight(s))
        both = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])
        return lax.associative_scan(both, (decays, m))[1]
    shifted = jnp.concatenate([jnp.zeros_like(m[:1]), m[:-1]])
    return shifted if s.b // 2 else m - shifted


def spectrum(env: Env, h: Array, s: Step) -> Array:
    z = jnp.fft.fft(h * env.weight(s, h.shape[-1]).reshape(*[1] * (h.ndim - 1), -1))
    return (
        z.real + z.imag,
        jnp.abs(z) ** 2 * 0.1,
        jnp.sin(z).real,
        (z * z).imag * 0.1,
    )[s.a]


def until_small(env: Env, h: Array, s: Step) -> Array:
    w = env.weight(s, h.shape[-1], h.shape[-1])
    again = lambda state: (state[0] < 3) & (jnp.sum(state[1] ** 2) > 1e-2)
    return lax.while_loop(
        again, lambda state: (state[0] + 1, jnp.tanh(state[1] @ w)), (0, h)
    )[1]


@jax.custom_jvp
def _leaky(x: Array, a: Array) -> Array:
    return jnp.where(x > 0, x, a * x)


@_leaky.defjvp
def _leaky_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, a), (dx, da) = primals, tangents
    return _leaky(x, a), jnp.where(x > 0, dx, a * dx + da * x)


def leaky(env: Env, h: Array, s: Step) -> Array:
    return _leaky(h, env.weight(s))


OPS = [
    dense,
    batched,
    convolution_1d,
    convolution_2d,
    gain,
    bias,
    move,
    norm,
    activation,
    over_time,
    over_layers,
]
OPS += [
    indexed_layers,
    conditional,
    look_up,
    gate,
    stop,
    attention,
    cumulate,
    spectrum,
    until_small,
    leaky,
]
OPS_BY_NAME = {op.__name__: op for op in OPS}
OFTEN = ["dense", "gate", "bias", "gain", "activation"]
WRAPS = [
    "nothing",
    "jit",
    "jit with arguments",
    "checkpoint",
    "noise point",
    "vmap",
    "scan",
]


def apply(env: Env, h: Array, step: Step) -> Array:
    """One step in its wrapping."""
    op = OPS_BY_NAME[step.op]
    if env.given is not None and step.wrap in ("jit with arguments", "checkpoint"):
        outside = env.given

        def inner(given: dict[str, Array], h: Array) -> Array:
            env.given = given
            try:
                return op(env, h, step)
            finally:
                env.given = outside

        return (jax.jit if step.wrap.startswith("jit") else jax.checkpoint)(inner)(
            outside, h
        )
    if step.wrap == "vmap" and h.ndim > 1:
        return jax.vmap(lambda row: op(env, row, step))(h)
    if step.wrap == "scan":
        turn = lambda total, x: (jnp.sin(total + jnp.sum(x)), total * op(env, x, step))
        return lax.scan(turn, jnp.ones(()), jnp.stack([h, jnp.sin(h)]))[1]
    if step.wrap == "jit":
        return jax.jit(lambda h: op(env, h, step))(h)
    out = op(env, h, step)
    return fx.noise_point(out) if step.wrap == "noise point" else out


def losses_of(env: Env, recipe: Recipe) -> Any:
    """The loss of one example."""
    h = env.example[0]
    for step in recipe.steps:
        env.saved.append(h)
        h = jnp.atleast_1d(apply(env, h, step))
        while h.size > MOST:
            h = jnp.mean(h, axis=0) if h.ndim > 1 else h[:MOST]
    last = Step("dense")
    end = {
        "waves": lambda: jnp.sum(jnp.sin(h) * h),
        "label": lambda: (
            -jax.nn.log_softmax(h.ravel() @ env.weight(last, h.size, 3))[
                env.example[1][0]
            ]
        ),
        "readout": lambda: jnp.sum(
            jnp.cos(matrix(h) @ env.weight(last, h.shape[-1], 2))
        ),
    }
    loss = end[recipe.head]() + 0.1 * env.weight(last) * jnp.sum(env.example[0])
    names = list(env.made)[: env.count]
    decay = sum(
        (0.1 * jnp.sum(env._read(name) ** 2) for name in names[: recipe.decay]),
        start=jnp.zeros(()),
    )
    if not recipe.local:
        return loss + decay
    middle = env.saved[len(env.saved) // 2] if env.saved else h
    return fx.LocalLosses({"end": loss, "decay": decay, "middle": jnp.sin(middle)})


def build(
    recipe: Recipe,
) -> tuple[Callable[..., Any], dict[str, Array], tuple[Array, ...]]:
    """The loss, its parameters and its data."""
    draw = np.random.default_rng(7)
    data = (
        draw.normal(size=(N, 2, 3)),
        draw.integers(0, 3, size=(N, 2)),
        np.array([True, False]),
    )
    made: dict[str, np.ndarray] = {}
    jax.eval_shape(
        lambda *one: losses_of(Env(None, made, one), recipe), *(x[0] for x in data)
    )

    def loss(params: dict[str, Array], *example: Array) -> Any:
        if recipe.mapped:
            return losses_of(Env(params, made, example), recipe)
        every = jax.vmap(lambda *one: losses_of(Env(params, made, one), recipe))(
            *example
        )
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), every)

    return (
        loss,
        {name: jnp.asarray(w) for name, w in made.items()},
        tuple(map(jnp.asarray, data)),
    )


def forward_only(recipe: Recipe) -> bool:
    """Whether reverse mode refuses it."""
    return any(
        step.op == "until_small" or step.chain == "spectral" for step in recipe.steps
    )


def recipe_of(seed: int) -> Recipe:
    """The same recipe for the same seed, on every machine."""
    draw = random.Random(seed)

    def step() -> Step:
        return Step(
            op=draw.choice([*OPS_BY_NAME, *OFTEN]),
            chain=draw.choice(["as it is", draw.choice([*CHAINS, *OF_EXAMPLE])]),
            tied=draw.random() < 0.5,
            wrap=draw.choice(["nothing", draw.choice(WRAPS)]),
            a=draw.randrange(4),
            b=draw.randrange(4),
        )

    return Recipe(
        steps=tuple(step() for _ in range(draw.randint(2, 7))),
        head=draw.choice(["waves", "label", "readout"]),
        decay=draw.randrange(4),
        local=draw.random() < 0.5,
        mapped=draw.random() < 0.75,
    )
