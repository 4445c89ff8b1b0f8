"""Activity noise of the right size and kind, on nine public architectures.

    python benchmarks/scaled_noise.py [--draws 300] [--only NAME ...]

At the initial parameters, on one batch: E|ĝ - g|² / |g|² with one noise of signs, g by backprop. A
few minutes an architecture on two cores.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import forwax as fx
from architectures import ARCHITECTURES, Architecture
from timing import machine

KEY = jax.random.key(0)


def relative_mse(rule: fx.Rule, of: Architecture, draws: int) -> tuple[float, float]:
    """The mean over draws, and its standard error."""
    grad = fx.grad(of.loss, rule, in_axes=of.in_axes)
    exact = fx.grad(of.loss, fx.Backprop(), in_axes=of.in_axes)

    @jax.jit
    def error(key, *args):
        truth = exact(KEY, *args)
        apart = jax.tree.map(jnp.subtract, grad(key, *args), truth)
        one, both = (
            sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree))
            for tree in (apart, truth)
        )
        return one / both

    keys = jax.random.split(KEY, draws)
    found = np.array([float(error(key, of.params, *of.data)) for key in keys])
    return float(found.mean()), float(found.std(ddof=1) / draws**0.5)


def calibrated(rule: fx.ActivityPerturbation, of: Architecture) -> fx.Rule:
    """The rule with scales."""
    calibrate = rule.calibrate(of.loss, in_axes=of.in_axes)
    return calibrate(KEY, of.params, *of.data)


def coordinates(rule: fx.Rule, of: Architecture) -> int:
    """The coordinates of one example's noise."""
    rows = fx.explain(of.loss, rule, in_axes=of.in_axes)(of.params, *of.data).rows
    return sum(row.activity_noise for row in rows if row.credit != "exact error")


def row(name: str, draws: int) -> list[str]:
    of = ARCHITECTURES[name]()
    num = sum(leaf.size for leaf in jax.tree.leaves(of.params))
    cells = [name, f"{num:,}", f"{num - 1:,}"]
    for noise in ("activity", "auto"):
        plain = fx.ActivityPerturbation(noise=noise)
        scaled = calibrated(plain, of)
        cells.append(f"{coordinates(plain, of):,}")
        for rule in (plain, scaled):
            mean, error = relative_mse(rule, of, draws)
            cells.append(f"{mean:,.4g} ± {error:.2g}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--only", nargs="*", choices=ARCHITECTURES)
    options = parser.parse_args()
    print(f"{machine()}; {options.draws} draws\n")
    header = (
        "architecture",
        "parameters",
        "weight noise",
        "coordinates",
        "activity noise",
        "scaled",
        "coordinates, auto",
        "auto",
        "auto, scaled",
    )
    print("| " + " | ".join(header) + " |")
    print("|---|" + "---:|" * (len(header) - 1))
    for name in options.only or ARCHITECTURES:
        print("| " + " | ".join(row(name, options.draws)) + " |", flush=True)


if __name__ == "__main__":
    main()
