"""The options of `forwax finetune`: checked, read back from a run, and as config.json has them."""

import dataclasses
from pathlib import Path
from typing import Any

from forwax.lab.catalogue.settings import fields_in
from forwax.lab.flags import UsageError, check_ranges
from forwax.lab.options.finetune import FinetuneOptions
from forwax.lab.report import Json
from forwax.lab.training.folder import Run


def check(options: FinetuneOptions) -> None:
    """Refuse what lies out of range, and what does not go together.

    Raises:
        UsageError: naming the option.

    >>> check(FinetuneOptions(compare=("activity",)))
    Traceback (most recent call last):
        ...
    forwax.lab.flags.UsageError: --compare must name rules other than --rule activity, each once.
    """
    check_ranges(options)
    if len(set(options.rules)) < len(options.rules):
        raise UsageError(
            f"--compare must name rules other than --rule {options.rule}, each once."
        )
    if options.compare and options.learning_rate is not None:
        raise UsageError(
            "--compare finds each rule's rate; leave --learning-rate or --compare out."
        )


def resumed(options: FinetuneOptions) -> tuple[FinetuneOptions, Run]:
    """The options of the run that --resume names, and its folder.

    Raises:
        UsageError: when other settings are given too, or the folder holds no such run.
    """
    assert options.resume is not None
    kept = ("data_dir", "checkpoint_seconds", "resume", "runs", "print_config")
    free: Any = {name: getattr(options, name) for name in kept}
    if options != FinetuneOptions(**free):
        raise UsageError(
            "--resume takes every setting from the run's config.json; leave the other settings "
            "out."
        )
    run = Run.open(options.resume)
    if "options" not in run.config:
        raise UsageError(f"{run.path} is not the folder of a run of forwax finetune.")
    stored = fields_in(FinetuneOptions, run.config["options"])
    for name in ("labels", "compare"):
        stored[name] = tuple(stored[name])
    if options.data_dir is None and stored["data_dir"]:
        free["data_dir"] = Path(stored["data_dir"])
    return FinetuneOptions(**stored | free), run


def as_json(options: FinetuneOptions) -> Json:
    """The options as config.json holds them."""
    found: Json = dataclasses.asdict(options)
    del found["print_config"]
    for name, value in found.items():
        names_file = name in ("model", "data") and Path(value).is_file()
        if names_file or isinstance(value, Path):
            found[name] = str(Path(value).absolute())
    return found
