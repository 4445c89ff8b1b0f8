"""What `forwax reproduce` may be asked."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from forwax.lab.catalogue import menu
from forwax.lab.flags import Chosen, Count, CountOrNot, Natural, PathOrNot
from forwax.lab.terminal import left_open

if TYPE_CHECKING:
    ColumnName = str
    DtypeOrNot = Any
else:
    ColumnName = Literal[tuple(sorted(menu.COLUMNS))]
    DtypeOrNot = left_open(Literal["float32", "bfloat16"])


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions:
    """Run a column of a paper's tables over its methods and seeds.

    Example:
        ```sh
        forwax reproduce ren2023                   # LocalMixer M/1/16 on MNIST, all 16 methods
        forwax reproduce ren2023 --column mnist-s --seeds 3
        forwax reproduce ren2023 --rules BP LG-FG-A LG-FG-A:4      # one noise a step, and four
        forwax reproduce ren2023 --column cifar-m --rules LG-FG-A  # for a GPU
        ```
    """

    paper: Positional[Literal["ren2023"]] = "ren2023"
    """Whose experiments: Ren et al. 2023, "Scaling Forward Gradient With Local Losses"."""
    column: ColumnName = "mnist-m"
    """The model, the data set and the objective."""
    rules: tuple[str, ...] = menu.METHODS
    """Methods; of forward gradients also LG-FG-A:4 (noises), :normal (kind), :one-slope."""
    seeds: Count = 3
    """How many seeds; the first is 0."""
    epochs: CountOrNot = None
    """Passes over the training set, instead of the column's."""
    steps: CountOrNot = None
    """Training steps, instead of epochs."""
    batch_size: CountOrNot = None
    """The number of examples of a step, instead of the column's."""
    learning_rate: Chosen[float] = None
    """One rate for all methods, instead of the column's own for each."""
    augment: Chosen[bool] = None
    """Whether supervised images are shifted by up to 2 pixels, and flipped where coloured."""
    dtype: DtypeOrNot = None
    """The floating type that the model computes in, instead of the column's."""
    examples: CountOrNot = None
    """Use only so many training and test images, to try a command out."""
    holdout: Natural = 0
    """Hold out so many of the last training images, to choose settings by errors on them."""
    out: Path = Path("runs/ren2023")
    """The folder of results; the same command goes on there where it stopped."""
    data_dir: PathOrNot = None
    """A folder to look for the data in first, before FORWAX_DATA and the cache."""


DESCRIPTION = (
    "Run the experiments of a paper, and set our figures beside the paper's.\n\n"
    f"Methods: {', '.join(menu.METHODS)}.\n\nColumns:\n"
) + "\n".join(
    f"- {name}: {title}, {epochs} epochs"
    for name, (title, epochs) in menu.COLUMNS.items()
)
"""What `forwax reproduce --help` says first."""
