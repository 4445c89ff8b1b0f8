"""One training step as a pure function: what it starts from, where its keys come from."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from forwax.lab.catalogue.objectives import BATCHED
from forwax.lab.catalogue.optimizers import build_optimizer
from forwax.lab.catalogue.rules import (
    FEEDBACK,
    guarded_rule,
    initial_guess,
    needs_guess,
)
from forwax.lab.catalogue.settings import Settings
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
        if settings.calibrate:
            batch = (jnp.asarray(each[: settings.batch_size]) for each in problem.train)
            guess = rule.calibrate(problem.loss, **BATCHED)(key, params, *batch).scales
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
