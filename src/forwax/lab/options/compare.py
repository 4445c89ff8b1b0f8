"""What `forwax compare` may be asked."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from forwax.lab.catalogue import menu
from forwax.lab.flags import Chosen, Count, CountOrNot, PathOrNot, Positive
from forwax.lab.options.settings import OneLossName


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Train the same model by several rules, from the same start on the same data.

    Each rule first gets a learning rate, found on the same budget by the loss on a part held out of
    the training set. Then the table tells what each rule cost and gained.

    Example:
        ```sh
        forwax compare digits                                  # a few minutes
        forwax compare mnist-mlp --steps 2000 --seeds 2
        forwax compare mnist-mlp --rules backprop forward-4 projection-4
        forwax compare mnist-mlp --paper                       # the rates of Baydin et al. 2022
        forwax compare --resume runs/compare-digits-20250101-120000
        ```
    """

    experiment: Positional[OneLossName] = "digits"
    """What to train on what."""
    rules: Annotated[tuple[str, ...], arg(help_behavior_hint="")] = ()
    """The rules; which ones by default is told above."""
    config: str = "default"
    """A configuration of the experiment: default, paper or paper-fast (Baydin et al. 2022)."""
    paper: bool = False
    """The configuration's rate for every rule, without a search; --config is then paper."""
    steps: CountOrNot = None
    """The number of training steps; the default belongs to the experiment."""
    batch_size: CountOrNot = None
    """The number of examples of a step; the default belongs to the experiment."""
    seeds: Count = 3
    """The number of seeds, each with its initial parameters, data order and tangents."""
    search_rates: Count = 6
    """How many learning rates each rule may try."""
    search_steps: CountOrNot = None
    """For how many steps each rate is tried, all by default: a short trial misses explosions."""
    target_loss: Chosen[Positive] = None
    """The validation loss to reach; by default where the slowest rule that stays finite ends."""
    evaluations: Count = 48
    """How often the validation loss is taken."""
    validation_examples: Chosen[int] = None
    """How many training examples are held out; 2,000 by default, at most a fifth."""
    test_examples: CountOrNot = None
    """How many test examples, from the first on, are used; all by default."""
    data_dir: PathOrNot = None
    """A folder to look for the data in first, before FORWAX_DATA and the cache."""
    out: PathOrNot = None
    """The folder of the comparison; runs/compare-EXPERIMENT-TIME by default."""
    resume: Annotated[PathOrNot, arg(metavar="FOLDER")] = None
    """Go on with the comparison in this folder; finished parts are not done again."""
    print_config: bool = False
    """Print what config.json would hold, and start nothing."""

    @property
    def configuration(self) -> str:
        """The name of the experiment's configuration."""
        return "paper" if self.paper and self.config == "default" else self.config


DESCRIPTION = (
    "Train the same model by several rules, from the same start on the same data, and tell "
    "what each cost and gained.\n\n"
    "Each rule first gets a learning rate, found on the same budget by the loss on a part held "
    "out of the training set.\n\n"
    f"Rules: {', '.join(menu.LINES)}. A number of tangents may follow: forward-16.\n\n"
    f"By default they are {' '.join(menu.DEFAULT_LINES)}, and with --paper "
    f"{' '.join(menu.PAPER_LINES)}."
)
"""What `forwax compare --help` says first."""
