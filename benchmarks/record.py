"""A record of compiled programs: what a change of the code's shape must leave equal, byte for byte.

`python -m benchmarks.record programs.json` writes the lowered text of each program, with its
arithmetic and temporaries; `python -m benchmarks.record before.json after.json` compares two
records. Texts differ between versions of jax, so that records are made anew in both checkouts and
none is kept.
"""

import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import forwax as fx

Case = tuple[str, Callable[..., Any], tuple[Any, ...]]
EXAMPLES = 6


def mlp(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["first"] + params["bias"])
    hidden = jax.nn.relu(hidden @ params["second"])
    return jnp.sum((hidden @ params["third"] - y) ** 2)


def rnn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    def step(state: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = jnp.tanh(x @ params["input"] + state @ params["state"])
        return state, state @ params["output"]

    _, outputs = jax.lax.scan(step, jnp.zeros(4), x)
    return jnp.sum((outputs - y) ** 2)


def arrays(shapes: dict[str, tuple[int, ...]]) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()
    }


MLP = arrays({"first": (5, 8), "bias": (8,), "second": (8, 7), "third": (7, 3)})
RNN = arrays({"input": (5, 4), "state": (4, 4), "output": (4, 3)})
IN_AXES = (None, 0, 0)


def with_momentum(loss: Callable[..., Any]) -> Callable[..., Any]:
    def step(key: jax.Array, momentum: fx.Momentum, *args: Any) -> Any:
        return fx.update(loss, learning_rate=0.1, momentum=momentum, in_axes=IN_AXES)(
            key, *args
        )

    return step


def learning_step(loss: Callable[..., Any]) -> Callable[..., Any]:
    def step(rule: fx.LearningRule, key: jax.Array, *args: Any) -> Any:
        return rule.step(loss, in_axes=IN_AXES)(key, *args)

    return step


def rules() -> dict[str, fx.Rule]:
    noise = fx.ActivityPerturbation
    return {
        "signs": fx.WeightPerturbation(),
        "normals": fx.WeightPerturbation(fx.tangents.Normal()),
        "signs, k = 4": fx.WeightPerturbation(num_tangents=4, chunk_size=2),
        "projection": fx.WeightPerturbation(
            num_tangents=4, combine=fx.combine.Projection()
        ),
        "low rank": fx.WeightPerturbation(
            fx.tangents.LowRank(), num_tangents=4, chunk_size=2
        ),
        "exact": fx.Exact(),
        "finite difference": fx.FiniteDifference(num_tangents=4),
        "backprop": fx.Backprop(),
        "keep": noise(),
        "replay": noise(memory="replay"),
        "shared": noise(memory="shared"),
        "keep, k = 4": noise(num_tangents=4),
        "replay, k = 4": noise(memory="replay", num_tangents=4),
        "sphere": noise(fx.tangents.Sphere()),
        "direct": fx.DirectFeedbackAlignment(jax.random.key(1)),
    }


def cases() -> Iterator[Case]:
    """Name, function and abstract arguments of each program."""
    key = jax.random.key(0)
    for name, loss, params in (("mlp", mlp, MLP), ("rnn", rnn, RNN)):
        steps = (3,) if loss is rnn else ()
        data = arrays({"x": (EXAMPLES, *steps, 5), "y": (EXAMPLES, *steps, 3)})
        args = (key, params, data["x"], data["y"])
        for label, rule in rules().items():
            yield (
                f"{name}, {label}",
                fx.value_and_grad(loss, rule, in_axes=IN_AXES),
                args,
            )
        feedback = jax.tree.map(lambda x: jnp.ones(x.shape), params)
        aligned = fx.value_and_grad(
            loss, fx.FeedbackAlignment(feedback), in_axes=IN_AXES
        )
        yield f"{name}, feedback", aligned, args
        guarded = fx.Safe(fx.WeightPerturbation()).init()
        yield f"{name}, safe", learning_step(loss), (guarded, *args)
        for label in ("signs", "low rank"):
            update = fx.update(loss, rules()[label], learning_rate=0.1, in_axes=IN_AXES)
            yield f"{name}, update, {label}", update, args
        momentum = fx.Momentum(0.9).init(key, fx.WeightPerturbation())
        yield f"{name}, momentum", with_momentum(loss), (key, momentum, *args[1:])
        learning = jax.eval_shape(fx.FDFA().init(loss, in_axes=IN_AXES), *args[1:])
        yield f"{name}, FDFA", learning_step(loss), (learning, *args)


def record() -> dict[str, dict[str, Any]]:
    """Text, arithmetic and temporaries of each program, by its name."""
    found: dict[str, dict[str, Any]] = {}
    for name, fun, args in cases():
        lowered = jax.jit(fun).lower(*args)
        text = lowered.as_text()
        compiled = lowered.compile()
        found[name] = {
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "flops": compiled.cost_analysis()["flops"],
            "temporaries": compiled.memory_analysis().temp_size_in_bytes,
            "text": text,
        }
    return found


def main() -> None:
    paths = [pathlib.Path(argument) for argument in sys.argv[1:]]
    if len(paths) == 1:
        paths[0].write_text(json.dumps(record(), indent=1))
        return
    before, after = (json.loads(path.read_text()) for path in paths)
    for name in sorted({*before, *after}):
        old, new = before.get(name, {}), after.get(name, {})
        same = old.get("sha256") == new.get("sha256")
        facts = [f"{f} {old.get(f)} -> {new.get(f)}" for f in ("flops", "temporaries")]
        print(f"{name}: {'equal' if same else 'differs; ' + '; '.join(facts)}")


if __name__ == "__main__":
    main()
