"""Tables of the rules, tangents and combinations of the command line.

One line adds one, and its name to `forwax.lab.catalogue.menu`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import forwax as fx
from forwax import combine, tangents
from forwax.lab.catalogue.settings import Settings, fields_in
from forwax.lab.flags import UsageError, flag
from forwax.lab.report import Json
from forwax.models import ren2023

TANGENTS: Mapping[str, Any] = {
    "rademacher": tangents.Rademacher(),
    "low-rank": tangents.LowRank(),
    "normal": tangents.Normal(),
    "sphere": tangents.Sphere(),
    "coordinate": tangents.Coordinate(),
    "coordinate-without-replacement": tangents.Coordinate(replace=False),
    "hadamard": tangents.Hadamard(),
    "orthonormal": tangents.Orthonormal(),
    "sparse": tangents.Sparse(0.1),
    "guided": tangents.Guided(None),
}
"""Every distribution of tangents; a density and a guess are put in where a rule is built."""

COMBINES: Mapping[str, Any] = {
    "mean": combine.Mean(),
    "projection": combine.Projection(),
    "shrinkage": combine.Shrinkage(),
    "control-variate": combine.ControlVariate(None),
}
"""Every combination; likewise."""

FEEDBACK = 0xFEED
"""Folded into a seed's key for fixed feedback: the small numbers give the run's other keys."""


@dataclass(frozen=True)
class RuleChoice:
    """A rule of the command line.

    Attributes:
        build: builds it from what it takes, by name.
        takes: the settings that it takes, and what it keeps between steps: `feedback` for fixed
            matrices, `maps` for what it learns.
        backward: what it does backwards, in one sentence for the end of a run; empty where errors
            cross layers backwards.
        needs_data: whether it only works on a loss with data.
        published: whether it is a method of Ren et al. 2023, which also says where losses sit.
        tangents: the tangents that it takes by default, a name of `TANGENTS`.
        own: settings that it has by default, whatever the experiment's configuration says.

    >>> RULES["exact"].takes
    ('chunk_size',)
    """

    build: Callable[..., Any]
    takes: tuple[str, ...]
    backward: str = (
        "No reverse mode was used: no backward pass, and nothing kept for one."
    )
    needs_data: bool = False
    published: bool = False
    tangents: str = "rademacher"
    own: Json = field(default_factory=dict)


_LOCAL = (
    "No error crossed two layers: reverse mode was used inside single layers and behind the last "
    "one alone."
)
_SAFETY = ("clip_slopes", "skip_bad_slopes")
_LEARNS = ("num_tangents", "chain", "every")
_DRAWN = ("tangents", "num_tangents", "combine", "density", "guess_decay")

_PLAIN: Mapping[str, RuleChoice] = {
    "weight": RuleChoice(
        fx.WeightPerturbation,
        (*_DRAWN, "chunk_size", *_SAFETY),
        tangents="low-rank",
    ),
    "exact": RuleChoice(
        fx.Exact,
        ("chunk_size",),
    ),
    "finite-difference": RuleChoice(
        fx.FiniteDifference,
        (*_DRAWN, "epsilon"),
    ),
    "gauss-newton": RuleChoice(
        partial(fx.GaussNewton, adapt=False),
        ("tangents", "num_tangents", "chunk_size"),
        "Reverse mode was used behind the logits alone.",
        # at a constant rate it follows each minibatch in turn
        own={"num_tangents": 64, "schedule": "cosine"},
    ),
    "activity": RuleChoice(
        fx.ActivityPerturbation,
        (*_DRAWN, "noise", "calibrate"),
        _LOCAL,
        needs_data=True,
    ),
    "feedback": RuleChoice(
        fx.FeedbackAlignment,
        ("feedback",),
        "",
        needs_data=True,
    ),
    "direct-feedback": RuleChoice(
        lambda seed: fx.DirectFeedbackAlignment(
            jax.random.fold_in(jax.random.key(seed), FEEDBACK)
        ),
        ("seed",),
        _LOCAL,
        needs_data=True,
    ),
    "learned-feedback": RuleChoice(
        fx.LearnedFeedback,
        ("maps", *_LEARNS),
        "No error crossed a layer but the last: each came by a map from the output.",
        needs_data=True,
        own={"num_tangents": 1},
    ),
    "backprop": RuleChoice(fx.Backprop, (), ""),
}


def _published(name: str, kind: str) -> RuleChoice:
    """A method of Ren et al. 2023: one of the rules above, or noise of its own."""
    own = RuleChoice(
        # the key is for fixed feedback, which noise has none of
        lambda **options: ren2023.method(name, None, jax.random.key(0), **options).rule,
        ("tangents", "num_tangents"),
        _LOCAL,
    )
    plain = {
        "BP": "backprop",
        "FA": "feedback",
        "DFA": "direct-feedback",
        "LF": "learned-feedback",
    }
    return replace(
        _PLAIN[plain[kind]] if kind in plain else own,
        tangents="hadamard",
        needs_data=True,
        published=True,
    )


RULES: Mapping[str, RuleChoice] = {
    **_PLAIN,
    **{name: _published(name, each.kind) for name, each in ren2023.READINGS.items()},
}
"""Every rule of the command line."""

RULE_SETTINGS = (
    *_DRAWN,
    *_LEARNS,
    "noise",
    "calibrate",
    "chunk_size",
    "epsilon",
    *_SAFETY,
)
"""The settings that only some rules take."""


def needs_guess(settings: Settings) -> bool:
    """Say whether the rule uses a guess of the gradient, a running mean of past estimates.

    >>> needs_guess(Settings(tangents="guided"))
    True
    >>> needs_guess(Settings(rule="backprop", tangents="guided"))
    False
    """
    guesses = settings.tangents == "guided" or settings.combine == "control-variate"
    return guesses and "tangents" in RULES[settings.rule].takes


def guarded_rule(settings: Settings, guess: Any = None, history: Any = None) -> Any:
    """Build the rule, inside `forwax.Safe` where the settings clip slopes or skip bad ones.

    A step whose loss is not finite is not skipped: the loop stops before it, and keeps a
    checkpoint. So it does where a slope that is not skipped makes the gradient so.

    >>> guarded_rule(Settings(rule="backprop"))
    Backprop()
    """
    rule = build_rule(settings, guess)
    if settings.calibrate:
        rule = replace(rule, scales=guess)
    skip = bool(settings.skip_bad_slopes)
    if settings.clip_slopes is None and not skip:
        return rule
    return fx.Safe(rule, clip=settings.clip_slopes, skip=skip, history=history)


def initial_guess(settings: Settings, params: Any, key: Array) -> Any:
    """Give what the rule keeps between steps: a guess of zero, fixed feedback, or nothing.

    Args:
        settings: the run's settings.
        params: the initial parameters.
        key: the PRNG key of the feedback.

    >>> initial_guess(Settings(), {}, jax.random.key(0)) is None
    True
    """
    if "feedback" in RULES[settings.rule].takes:
        return fx.random_feedback(key, params)
    return jax.tree.map(jnp.zeros_like, params) if needs_guess(settings) else None


def build_rule(settings: Settings, guess: Any = None) -> Any:
    """Build the rule that the settings name.

    Args:
        settings: the run's settings.
        guess: what `initial_guess` gave, or what has become of it.

    Returns:
        A forwax rule.

    Raises:
        UsageError: when the library refuses the combination; the sentence is the library's own.

    >>> build_rule(Settings(rule="backprop"))
    Backprop()
    """
    choice = RULES[settings.rule]
    own = {"guess": guess, "density": settings.density or 0.1}
    options = {
        "tangents": _filled(TANGENTS[settings.tangents or choice.tangents], own),
        "num_tangents": settings.num_tangents,
        "combine": _filled(COMBINES[settings.combine or "mean"], own),
        "chunk_size": settings.chunk_size,
        "epsilon": settings.epsilon,
        "noise": settings.noise,
        "chain": settings.chain,
        "every": settings.every,
        "seed": settings.seed,
        "feedback": guess,
        "maps": guess,
    }
    # what is None has the library's default
    taken = {
        name: value
        for name, value in options.items()
        if name in choice.takes and value is not None
    }
    try:
        return choice.build(**taken)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _filled(entry: Any, own: Json) -> Any:
    """Put a run's guess or density into tangents or a combination that have one."""
    return replace(entry, **fields_in(entry, own))


def check_rule(settings: Settings, given: Json) -> Settings:
    """Refuse what the rule or the schedule does not take, and set to None what does not apply.

    Args:
        settings: settings with every default filled in.
        given: the settings that the user named.

    Returns:
        The settings as config.json tells them.

    Raises:
        UsageError: when the user named something that the schedule, the rule or its tangents do not
            take.

    >>> check_rule(Settings(rule="exact"), {}).num_tangents is None
    True
    """
    rule = RULES[settings.rule]
    tangents = settings.tangents or rule.tangents
    refusals = {}
    if settings.schedule != "exponential":
        refusals["decay_rate"] = (
            f"belongs to --schedule exponential, but the schedule is {settings.schedule}"
        )
    own = {name: value for name, value in rule.own.items() if name not in given}
    settings = replace(settings, tangents=tangents, **own)
    for name in RULE_SETTINGS:
        takers = [other for other, choice in RULES.items() if name in choice.takes]
        if settings.rule not in takers:
            refusals[name] = (
                f"does not apply to --rule {settings.rule}; it belongs to: {', '.join(takers)}"
            )
    if "tangents" in rule.takes:
        if tangents != "sparse":
            refusals["density"] = (
                f"belongs to --tangents sparse, but the tangents are {tangents}"
            )
        if needs_guess(settings):
            refusals["calibrate"] = "does not go with --tangents guided"
        else:
            refusals["guess_decay"] = (
                "belongs to --tangents guided or --combine control-variate, and neither was chosen"
            )
    for name, refusal in refusals.items():
        if name in given:
            raise UsageError(f"{flag(name)} {refusal}.")
    return replace(settings, **dict.fromkeys(refusals))
