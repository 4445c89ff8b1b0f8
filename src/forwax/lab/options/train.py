"""What `forwax train` may be asked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from forwax.lab.catalogue import menu
from forwax.lab.distributed.options import TeamOptions
from forwax.lab.flags import PathOrNot, Range
from forwax.lab.options.settings import ExperimentName, SettingOptions


@dataclass(frozen=True, kw_only=True)
class TrainOptions(SettingOptions, TeamOptions):
    """Train a model on real data, by default without backpropagation.

    Example:
        ```sh
        forwax train                                     # digits, 64 random tangents a step
        forwax train mnist-mlp                           # the paper's MLP on MNIST, activity noise
        forwax train mnist-mlp --config paper-fast       # as in Baydin et al. 2022
        forwax train digits --rule backprop              # the reference
        forwax train local-mixer --size M/1/16 --rule LG-FG-A  # as in Ren et al. 2023
        forwax train --resume runs/digits-20250101-120000
        ```
    """

    experiment: Annotated[ExperimentName, tyro.conf.Positional] = "digits"
    """What to train on what."""
    config: str = "default"
    """A configuration: default, paper or paper-fast; for local-mixer a column of reproduce."""
    resume: Annotated[
        Path | None, tyro.conf.arg(metavar="RUN", help_behavior_hint="")
    ] = None
    """Go on with the run in this folder, bit for bit as if it had never stopped."""
    runs: Path = Path("runs")
    """The folder that the run's folder is made in."""
    data_dir: PathOrNot = None
    """A folder to look for the data in first, before FORWAX_DATA and the cache."""
    checkpoint_seconds: Annotated[float, Range("zero or more", lambda x: x >= 0)] = 5.0
    """The time between two checkpoints."""
    print_config: bool = False
    """Print what config.json would hold, and start nothing."""


DESCRIPTION = "\n".join(
    [
        "Train a model on real data, by default without backpropagation.",
        "",
        "Experiments; docs/results/experiments.md tells what their defaults reached:",
        *(f"- {name}: {about}" for name, about in menu.EXPERIMENTS.items()),
        "",
        "Rules:",
        *(f"- {name}: {about}" for name, about in menu.RULES.items()),
        "",
        "Options that are left out are those of the experiment's configuration.",
    ]
)
"""What `forwax train --help` says first."""
