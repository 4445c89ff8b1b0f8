"""Random 32-bit words: an even and an odd number of them, by `jax.random.bits`.

    python benchmarks/draw_words.py

Prints the median time of each, interleaved in one run; a few seconds.
"""

import jax
import jax.numpy as jnp
import numpy as np

from timing import interleaved, machine

COUNTS = (58_240, 58_241)


def main() -> None:
    key = jax.random.key(0)
    draws = {
        n: jax.jit(lambda key, n=n: jax.random.bits(key, (n,), jnp.uint32))
        for n in COUNTS
    }
    seconds = interleaved(
        {str(n): (lambda draw=draw: draw(key)) for n, draw in draws.items()}, rounds=300
    )
    print(f"Median of 300 interleaved rounds; {machine()}.")
    for name, times in seconds.items():
        print(f"{name} words: {np.median(times) * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
