"""The output sites' exact error, sent straight to every other site by maps."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _tree
from forwax._programs.evaluate import Values
from forwax._programs.program import Variable
from forwax._pushforward import along, over_tangents
from forwax._sites.model import Site, Sites
from forwax._sites.passes.keep import forward


def output_sites(sites: Sites) -> list[Site]:
    """The last sites that put something out.

    An added weight decay is none: its error is constant, which tells nothing.
    """
    return [
        site for site in sites.places if site.exact and _tells_something(site, sites)
    ]


def _tells_something(site: Site, sites: Sites) -> bool:
    if site.region.promoted:
        return False
    if all(equation.facts.additive for equation in site.region.equations):
        return False
    return site.mapped or sites.num_examples is None


def heard_by(site: Site, sites: Sites, name: str) -> list[Site]:
    """The output sites whose losses a site reaches.

    Raises:
        ValueError: when there is none; `name` is the rule's, for the text.
    """
    heard = [output for output in output_sites(sites) if output.reach & site.reach]
    if not heard:
        raise ValueError(
            f"{name}: found no output site after the {site.region.equations[0].name} of shape "
            f"{site.shape}: none whose "
            "way to the loss is free of parameters. Use FeedbackAlignment for this loss."
        )
    return heard


def map_shapes(sites: Sites, name: str) -> list[tuple[int, int]]:
    """For each site that is not a last one, the sizes of the errors it hears and of its value."""
    heard = [heard_by(site, sites, name) for site in sites.noisy]
    sizes = [sum(output.size for output in outputs) for outputs in heard]
    return [(size, site.size) for size, site in zip(sizes, sites.noisy, strict=True)]


def push_outputs(
    sites: Sites, noise: Sequence[Array], num_tangents: int
) -> list[Array]:
    """The slope of each output site's value along noises [k, *spec].

    Shapes are [k, *shape], with examples [k, examples, *shape].
    """
    outputs = [site.variable for site in output_sites(sites)]
    mapped_axes = list(sites.problem.mapped_axes)
    noise_axes = {site.variable: sites.axis_of(site.variable) for site in sites.noisy}

    def one(mapped: Sequence[Array], noise: Values, time: Array) -> list[Array]:
        inputs = sites.traced.arguments(sites.problem.params, mapped)
        values, _ = forward(sites.level, inputs, noise, time, frozenset(), outputs)
        return values[len(values) - len(outputs) :]

    def slopes(noise: Values) -> tuple[list[Array], None]:
        def values(time: Array) -> tuple[list[Array], None]:
            if sites.num_examples is None:
                return one((), noise, time), None
            each = jax.vmap(
                one, (mapped_axes, noise_axes, None), axis_size=sites.num_examples
            )
            return each(list(sites.problem.mapped), noise, time), None

        _, tangents, _ = along(values)
        return tangents, None

    named = dict(zip([site.variable for site in sites.noisy], noise, strict=True))
    return over_tangents(slopes, named, num_tangents)[0]


def sent(
    site: Site,
    sites: Sites,
    heard: Sequence[Site],
    errors: Mapping[Variable, Array],
    through: Array,
) -> Array:
    """A site's error: that of the outputs it hears, real coordinates [..., e], times a map [e, z].

    A map of the size of one step's value serves every step of the loops around the site.
    """
    lead = () if sites.num_examples is None else (sites.num_examples,)
    parts = [
        coordinates(jnp.conj(errors[output.variable]), len(lead)) for output in heard
    ]
    flat = jnp.concatenate(parts, axis=-1)  # [*lead, e]
    error = flat @ through.astype(flat.dtype)  # [*lead, z]
    if (
        lead and not site.mapped
    ):  # one value for all examples has the sum of their errors
        error = jnp.sum(error, axis=0)
        lead = ()
    of_step = sites.own_shape(site)
    is_whole = error.shape[-1] == site.size
    shape = (
        site.shape if is_whole else (*[1] * (len(site.shape) - len(of_step)), *of_step)
    )
    spec = _tree.Spec(shape, site.dtype)
    real_shape = _tree.real_specs(spec)[0].shape
    value = _tree.from_real([error.reshape(*lead, *real_shape)], spec, len(lead))
    return jnp.broadcast_to(jnp.conj(value), (*lead, *site.shape))


def coordinates(x: Array, lead: int) -> Array:
    """The real coordinates [*lead, n] of values, after a number of leading axes."""
    parts = jnp.stack([x.real, x.imag], axis=lead) if _tree.is_complex(x) else x
    return parts.reshape(*x.shape[:lead], -1)


def step_size(site: Site, sites: Sites) -> int:
    """The number of real coordinates of a site's value in one step of the loops around it."""
    return _tree.num_coordinates(_tree.Spec(sites.own_shape(site), site.dtype))
