"""The subcommands, a module each, whose options are the class that is named after it."""

from collections.abc import Mapping

COMMANDS: Mapping[str, str] = {
    "train": "train a model on real data, by default without backpropagation",
    "finetune": "train an adapter of a language model on texts",
    "compare": "train the same model by several rules, side by side",
    "diagnose": "measure what rules give and cost, and say which to use",
    "optimize": "minimise a test function by backprop and without it",
    "reproduce": "run a paper's experiments, ours beside the paper's",
    "data": "fetch, verify and cache a data set, or say where it is",
    "completion": "print a script by which a shell completes commands and options",
}
"""Each subcommand and one line about it."""
