"""The output sites' exact error, sent straight to every other site by maps; and what maps must be like to be right."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _tree
from forwax._programs.evaluate import Values
from forwax._programs.program import Variable
from forwax._sites.model import Site, Sites
from forwax._sites.passes.keep import forward


def output_sites(sites: Sites) -> list[Site]:
    """The last sites that put something out; an added weight decay has a constant error, which tells nothing."""
    return [
        site
        for site in sites.places
        if site.exact
        and not site.region.promoted
        and not all(equation.facts.additive for equation in site.region.equations)
        and (site.mapped or sites.num_examples is None)
    ]


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
    """For each site that is not a last one, the sizes of the errors that it hears of and of its own value."""
    return [(sum(s.size for s in heard_by(site, sites, name)), site.size) for site in sites.noisy]


def push_outputs(sites: Sites, noise: Sequence[Array], num_tangents: int) -> list[Array]:
    """The slope of each output site's value along noises [k, *spec]: [k, *shape], with examples before the shape."""
    outputs = [site.variable for site in output_sites(sites)]
    inputs = [*sites.traced.closed, *jax.tree.leaves(sites.problem.params)]
    axes = (
        list(sites.problem.mapped_axes),
        {s.variable: 0 if s.mapped else None for s in sites.noisy},
    )

    def one(mapped: Sequence[Array], noise: Values, time: Array) -> list[Array]:
        values, _ = forward(sites.level, [*inputs, *mapped], noise, time, frozenset(), outputs)
        return values[len(values) - len(outputs) :]

    def slopes(noise: Values) -> list[Array]:
        def values(time: Array) -> list[Array]:
            if sites.num_examples is None:
                return one((), noise, time)
            return jax.vmap(one, (*axes, None), axis_size=sites.num_examples)(
                list(sites.problem.mapped), noise, time
            )

        return jax.jvp(values, (jnp.zeros(()),), (jnp.ones(()),))[1]

    named = dict(zip([site.variable for site in sites.noisy], noise, strict=True))
    if num_tangents == 1:
        return [x[None] for x in slopes({v: x[0] for v, x in named.items()})]
    return jax.vmap(slopes)(named)


def sent(
    site: Site,
    sites: Sites,
    heard: Sequence[Site],
    errors: Mapping[Variable, Array],
    through: Array,
) -> Array:
    """A site's error: that of the outputs it hears of, as real coordinates [..., e], times a map [e, z].

    A map of the size of one step's value serves every step of the loops around the site.
    """
    lead = () if sites.num_examples is None else (sites.num_examples,)
    flat = jnp.concatenate(
        [coordinates(jnp.conj(errors[s.variable]), len(lead)) for s in heard], axis=-1
    )
    error = flat @ through.astype(flat.dtype)
    if lead and not site.mapped:
        error, lead = jnp.sum(error, axis=0), ()
    own = sites.own_shape(site)
    whole = error.shape[-1] == site.size
    shape = site.shape if whole else (*[1] * (len(site.shape) - len(own)), *own)
    spec = _tree.Spec(shape, site.dtype)
    parts = error.reshape(*lead, *_tree.real_specs(spec)[0].shape)
    value = _tree.from_real([parts], spec, len(lead))
    return jnp.broadcast_to(jnp.conj(value), (*lead, *site.shape))


def coordinates(x: Array, lead: int) -> Array:
    """The real coordinates [*lead, n] of values, after a number of leading axes."""
    parts = jnp.stack([x.real, x.imag], axis=lead) if _tree.is_complex(x) else x
    return parts.reshape(*x.shape[:lead], -1)


def step_size(site: Site, sites: Sites) -> int:
    """The number of real coordinates of a site's value in one step of the loops around it."""
    return _tree.num_coordinates(_tree.Spec(sites.own_shape(site), site.dtype))
