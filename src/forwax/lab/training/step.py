"""One training step as a pure function: what it starts from, where its keys come from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from forwax.lab.catalogue.optimizers import build_optimizer
from forwax.lab.catalogue.rules import (
    FEEDBACK,
    guarded_rule,
    initial_guess,
    needs_guess,
)
from forwax.lab.catalogue.settings import Settings
from forwax.lab.flags import UsageError
from forwax.lab.training.problem import Task


class TrainState(NamedTuple):
    """Everything that the next step depends on, besides the settings and the data.

    `slopes` is what `forwax.Safe` remembers of them, or None.
    """

    params: Any
    opt_state: Any
    guess: Any
    step: Array
    slopes: Any = None


class Keys(NamedTuple):
    """The three independent keys of a run."""

    init: Array
    data: Array
    noise: Array


def split_seed(seed: Any) -> Keys:
    """Give the keys of a seed.

    >>> split_seed(0).init.shape
    ()
    """
    return Keys(*jax.random.split(jax.random.key(seed), 3))


def init_state(problem: Task, settings: Settings) -> TrainState:
    """Give the state before the first step.

    >>> from forwax.lab.catalogue.experiments import EXPERIMENTS
    >>> from forwax.lab.training.problem import build_problem
    >>> settings = Settings(learning_rate=0.1)
    >>> int(init_state(build_problem(EXPERIMENTS["digits"], settings), settings).step)
    0
    """
    optimizer = build_optimizer(settings)

    def init() -> TrainState:
        key = split_seed(settings.seed).init
        params = problem.init(key)
        guess = initial_guess(settings, params, jax.random.fold_in(key, FEEDBACK))
        rule = problem.ready(guarded_rule(settings, guess), params)
        guess = getattr(rule, "maps", guess)
        slopes = (
            rule.init().history if getattr(rule, "inner", rule) is not rule else None
        )
        return TrainState(params, optimizer.init(params), guess, jnp.int32(0), slopes)

    # one program instead of one for each operation
    return jax.jit(init)()


def make_step(problem: Task, settings: Settings) -> Any:
    """Make one training step, not compiled.

    Args:
        problem: the experiment made ready.
        settings: the run's settings; the learning rate and the seed may be traced values.

    Returns:
        A function from (state, images uint8 [batch, ...], labels [batch]) to (state, loss,
        accuracy, finite). Where the loss or the squared norm of the gradient is not finite, the
        state comes back unchanged.

    Example: `state, loss, accuracy, finite = make_step(problem, settings)(state, images, labels)`
    """
    optimizer = build_optimizer(settings)
    noise_key = split_seed(settings.seed).noise

    def step(state: TrainState, images: Array, labels: Array) -> Any:
        key = jax.random.fold_in(noise_key, state.step)
        (loss, correct), grads, *learnt = problem.gradient(
            guarded_rule(settings, state.guess, state.slopes)
        )(key, state.params, images, labels)
        finite = jnp.isfinite(loss) & jnp.isfinite(
            optax.tree_utils.tree_vdot(grads, grads)
        )

        def advance() -> TrainState:
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            slopes, guess = state.slopes, state.guess
            for after in learnt:  # a rule that learns
                slopes = getattr(after, "history", None)
                guess = getattr(after, "maps", guess)
            if needs_guess(settings):
                share = 1 - (settings.guess_decay or 0.0)
                guess = optax.incremental_update(grads, guess, share)
            return TrainState(
                optax.apply_updates(state.params, updates),
                opt_state,
                guess,
                state.step + 1,
                slopes,
            )

        # a branch, not a select: a select would copy all parameters at every step
        after = jax.lax.cond(finite, advance, lambda: state)
        return after, loss, jnp.mean(correct, dtype=jnp.float32), finite

    return problem.own_step(settings) or step


def placement(settings: Settings) -> tuple[NamedSharding | None, Callable[[Any], Any]]:
    """Say where a run's arrays lie, and how a batch is spread over the devices.

    Args:
        settings: the run's settings.

    Returns:
        A sharding that copies an array to every local device, or None for the one default device;
        and a function that spreads the leading axis of arrays inside a compiled program.

    Raises:
        UsageError: when a batch cannot be spread evenly.

    >>> placement(Settings())[0] is None
    True
    """
    devices = jax.local_devices()
    count = len(devices)
    if not settings.data_parallel or count == 1:
        return None, lambda batch: batch
    if settings.batch_size % count:
        raise UsageError(
            f"--batch-size must be a multiple of the {count} local devices that share it, got "
            f"{settings.batch_size}."
        )
    mesh = jax.make_mesh((count,), ("examples",), (AxisType.Auto,), devices=devices)
    rows = NamedSharding(mesh, PartitionSpec("examples"))
    return NamedSharding(
        mesh, PartitionSpec()
    ), lambda batch: jax.lax.with_sharding_constraint(batch, rows)
