"""What `forwax diagnose` may be asked."""

from dataclasses import dataclass

from tyro.conf import Positional

from forwax.lab.flags import Count, CountOrNot, PathOrNot
from forwax.lab.options.settings import OneLossName


@dataclass(frozen=True, kw_only=True)
class DiagnoseOptions:
    """Measure what rules give and cost on an experiment, beside backprop, and say which to use.

    Example:
        ```sh
        forwax diagnose digits
        forwax diagnose mnist-mlp --rules forward low-rank low-rank-8 activity --batch-size 256
        ```
    """

    experiment: Positional[OneLossName] = "digits"
    """Whose loss, on what data."""
    rules: tuple[str, ...] = ("forward", "low-rank", "low-rank-8", "activity")
    """The rules, by the names of `forwax compare`, and a number of tangents where wanted."""
    batch_size: CountOrNot = None
    """The number of examples; the default belongs to the experiment."""
    draws: Count = 16
    """How many estimates of each rule are compared with the exact gradient."""
    rounds: Count = 10
    """How often each program is timed, all of them in turn."""
    seed: int = 0
    """The seed of the initial parameters, the batch and the tangents."""
    data_dir: PathOrNot = None
    """A folder to look for the data in first, before FORWAX_DATA and the cache."""
