"""`forwax finetune`: train an adapter of a language model, by default forwards only."""

from forwax.lab.finetune import run as runs
from forwax.lab.finetune import versus
from forwax.lab.finetune.options import resumed
from forwax.lab.options.finetune import FinetuneOptions
from forwax.lab.terminal import Shown


def run(options: FinetuneOptions) -> int:
    """Train, and tell how it went.

    Args:
        options: the command's options.

    Returns:
        The exit code: 0 when done, 130 after Ctrl-C, 143 after a termination, 3 after a loss that
        is not finite.

    Raises:
        UsageError: when the options do not go together.
        DataError: when model or texts cannot be loaded.

    Example:
        ```sh
        forwax finetune --model tiny-random --data tiny-sentences
        ```
    """
    found = None
    if options.resume is not None:
        options, found = resumed(options)
        if options.print_config:
            raise Shown(found.config)
        if found.finished:
            print(f"{found.path} is finished already.")
            return 0
    ready = runs.make_ready(options)
    if found is None:
        found = runs.create(ready)
    else:
        runs.check_data(found, ready)
    act = versus.compare if options.compare else runs.train
    return act(ready.with_prefixes(), found)
