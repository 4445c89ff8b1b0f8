"""The options of `forwax compare`, and the folder that keeps them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from forwax.lab.flags import Chosen
from forwax.lab.options import OneLossName
from forwax.lab.settings import UsageError
from forwax.lab.train.runs import CONFIG, Run, write_json
from forwax.lab.train.sitting import versions


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Train the same model by several rules, from the same start on the same data, and tell what each cost and gained.

    Each rule first gets a learning rate, found on the same budget by the loss on a part held out of
    the training set.

    Rules: backprop, forward, forward-normal, low-rank, projection, shrinkage, orthonormal,
    finite-difference, activity, feedback, direct-feedback, exact. A number of tangents may follow:
    forward-16.

    Example:
        ```sh
        forwax compare digits                                  # a few minutes
        forwax compare mnist-mlp --steps 2000 --seeds 2
        forwax compare mnist-mlp --rules backprop forward-4 projection-4
        forwax compare mnist-mlp --paper                       # the rates of Baydin et al. 2022, without a search
        forwax compare --resume runs/compare-digits-20250101-120000
        ```
    """

    experiment: Annotated[OneLossName, tyro.conf.Positional] = "digits"
    """What to train on what."""
    rules: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """The rules; by default backprop forward forward-16 projection, with --paper backprop forward-normal forward."""
    config: str = "default"
    """A named configuration of the experiment: default, paper or paper-fast (Baydin et al. 2022)."""
    paper: bool = False
    """Use the configuration's own rate for every rule, without a search; --config is then paper by default."""
    steps: Chosen[int] = None
    """The number of training steps; the default belongs to the experiment."""
    batch_size: Chosen[int] = None
    """The number of examples of a step; the default belongs to the experiment."""
    seeds: int = 3
    """The number of seeds, each with its initial parameters, data order and tangents."""
    search_rates: int = 6
    """How many learning rates each rule may try."""
    search_steps: Chosen[int] = None
    """For how many steps each rate is tried, all by default: what survives a short trial may explode later."""
    target_loss: Chosen[float] = None
    """The validation loss to reach; by default the one that the slowest rule that stays finite ends at."""
    evaluations: int = 48
    """How often the validation loss is taken."""
    validation_examples: Chosen[int] = None
    """How many training examples are held out; 2,000 by default, at most a fifth."""
    test_examples: Chosen[int] = None
    """How many test examples, from the first on, are used; all by default."""
    data_dir: Chosen[Path] = None
    """A folder to look for the data in first, before FORWAX_DATA and the cache."""
    out: Chosen[Path] = None
    """The folder of the comparison; runs/compare-EXPERIMENT-TIME by default."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Go on with the comparison in this folder; finished parts are not done again."""


def resumed(options: CompareOptions) -> CompareOptions:
    """Give the options of the comparison that --resume names.

    Raises:
        UsageError: when other settings are given as well, or the folder holds no comparison.
    """
    folder = options.resume
    assert folder is not None
    if dataclasses.replace(options, resume=None, data_dir=None) != CompareOptions():
        raise UsageError(
            "--resume takes every setting from the comparison's config.json; leave the other "
            "settings out."
        )
    config = Run.open(folder).config
    if "rules" not in config or "seeds" not in config:
        raise UsageError(
            f"{folder} is the folder of a training run; go on with: forwax train --resume {folder}"
        )
    names = {field.name for field in dataclasses.fields(CompareOptions)} - {
        "data_dir",
        "out",
        "resume",
    }
    stored: dict[str, Any] = {name: value for name, value in config.items() if name in names} | {
        "rules": tuple(config["rules"])
    }
    data_dir = options.data_dir or (Path(config["data_dir"]) if config.get("data_dir") else None)
    return CompareOptions(**stored, data_dir=data_dir, resume=folder)


def check(options: CompareOptions) -> None:
    """Refuse numbers that lie out of range.

    Raises:
        UsageError: naming the option, the range and what came.

    >>> check(CompareOptions(seeds=0))
    Traceback (most recent call last):
        ...
    forwax.lab.settings.UsageError: --seeds must be at least 1, got 0.
    """
    for name in (
        "steps",
        "batch_size",
        "seeds",
        "search_rates",
        "search_steps",
        "evaluations",
        "test_examples",
    ):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
    if options.target_loss is not None and not 0 < options.target_loss < float("inf"):
        raise UsageError(f"--target-loss must be a positive number, got {options.target_loss}.")


def make_folder(options: CompareOptions) -> Path:
    """Make the comparison's folder with config.json inside.

    Raises:
        UsageError: when it cannot be made, or holds a comparison already.
    """
    config = dataclasses.asdict(options) | {
        "rules": list(options.rules),
        "versions": versions(),
    }
    config |= {
        "data_dir": str(options.data_dir.absolute()) if options.data_dir else None,
        "out": None,
        "resume": None,
    }
    if options.out is None:
        folder = Run.create(Path("runs"), f"compare-{options.experiment}", config).path
    else:
        folder = options.out
        if (folder / CONFIG).exists():
            raise UsageError(
                f"{folder} holds a comparison already; choose another --out, or --resume {folder}."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, config)
    return folder
