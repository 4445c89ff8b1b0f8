"""What `forwax data` may be asked."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from forwax.lab.flags import PathOrNot


@dataclass(frozen=True)
class DataOptions:
    """Fetch, verify and cache a data set, or say where it is.

    Example:
        ```sh
        forwax data                            # a table of all sets, without fetching
        forwax data mnist                      # fetch, verify and cache MNIST
        forwax data smollm2                    # a language model, for forwax finetune
        forwax data cifar10 --data-dir ~/data  # use ~/data/cifar-10-batches-bin
        ```
    """

    name: Positional[
        Annotated[str | None, arg(metavar="SET", help_behavior_hint="")]
    ] = None
    """The set, such as mnist or movie-sentences, or smollm2. Without it, a table of all."""

    data_dir: PathOrNot = None
    """A folder to look into first, before FORWAX_DATA and the cache."""
