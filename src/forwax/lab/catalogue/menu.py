"""The names that options may have, and the lines that `--help` says of them: words alone.

The tables of this package, which need jax, have a row for each; a test compares them.
"""

from collections.abc import Mapping

RULES: Mapping[str, str] = {
    "weight": "slopes along random weight tangents, by forward mode",
    "exact": "the true gradient by forward mode, one basis vector after another",
    "finite-difference": "slopes from two evaluations each",
    "gauss-newton": "damped Gauss-Newton steps in the span of random directions, by slopes alone",
    "activity": "slopes along noise on the activities, one for each example",
    "feedback": "errors cross layers through fixed random matrices",
    "direct-feedback": "the output error reaches every layer by a fixed random map",
    "learned-feedback": "the output error reaches every layer by maps that noise teaches",
    "backprop": "reverse mode, the reference",
}
"""Rules for any experiment."""

WITHOUT_DATA = ("exact", "finite-difference", "gauss-newton", "weight")
"""Those of them that work on a loss without data, but for backprop."""

METHODS = (
    *("BP", "L-BP", "LG-BP", "FA", "L-FA", "LG-FA", "LF", "L-LF", "LG-LF"),
    *("FG-W", "L-FG-W", "LG-FG-W", "FG-A", "L-FG-A", "LG-FG-A", "DFA"),
)
"""Rules for LocalMixers, as Ren et al. 2023 name them; LF is learned feedback in their place."""

TANGENTS = (
    *("coordinate", "coordinate-without-replacement", "guided", "hadamard"),
    *("low-rank", "normal", "orthonormal", "rademacher", "sparse", "sphere"),
)
COMBINES = ("control-variate", "mean", "projection", "shrinkage")
OPTIMIZERS = (
    *("adabelief", "adagrad", "adam", "adamax", "adamw", "lamb", "lars", "lion"),
    *("momentum", "nadam", "nesterov", "radam", "rmsprop", "sgd", "yogi"),
)
SCHEDULES = ("constant", "cosine", "exponential", "linear")
SIZES = ("L/32/64", "L/8/64", "M/1/16", "M/8/16", "S/1/1", "S/4/8")
DATA = ("cifar10", "digits", "fashion-mnist", "mnist")

NAMES: Mapping[str, tuple[str, ...]] = {
    "rule": (*RULES, *METHODS),
    "tangents": TANGENTS,
    "combine": COMBINES,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "size": SIZES,
    "data": DATA,
}
"""Those of the settings that name an entry of a table."""

MIXER = "local-mixer"
_KINDS = {
    "logistic": "Logistic regression",
    "mlp": "The MLP 784-1024-1024-10, by activity noise,",
    "cnn": "The convolutional network, by activity noise,",
}
EXPERIMENTS: Mapping[str, str] = {
    "digits": "An MLP 64-32-10 on scikit-learn's 8×8 digits.",
    **{
        f"{data}-{kind}": f"{about} on {title}."
        for data, title in (("mnist", "MNIST"), ("fashion-mnist", "Fashion-MNIST"))
        for kind, about in _KINDS.items()
    },
    "cifar10-cnn": f"{_KINDS['cnn']} on CIFAR-10.",
    MIXER: "LocalMixer of Ren et al. 2023 by any of sixteen methods, eleven of its tables and five "
    "more, see `forwax reproduce --help`; --size, --data and --objective choose what is trained.",
}
"""What is trained on what."""

COLUMNS: Mapping[str, tuple[str, int]] = {
    "mnist-s": ("MNIST, S/1/1", 20),
    "mnist-m": ("MNIST, M/1/16", 20),
    "cifar-small": ("CIFAR-10, S/4/8 (not in the paper)", 5),
    "cifar-small-contrastive": ("CIFAR-10, S/4/8, contrastive (not in the paper)", 3),
    "cifar-m": ("CIFAR-10, M/8/16", 200),
    "cifar-m-contrastive": ("CIFAR-10, M/8/16, contrastive", 800),
    "cifar-l-contrastive": ("CIFAR-10, L/8/64, contrastive", 800),
}
"""Titles of the columns of Ren et al. 2023, and of two small ones, with their epochs."""

LINES = (
    *("backprop", "forward", "forward-normal", "low-rank", "projection", "shrinkage"),
    *("orthonormal", "finite-difference", "activity", "feedback", "direct-feedback"),
    *("learned-feedback", "exact"),
)
"""Rules by the names of `forwax compare`; a number of tangents may follow."""

DEFAULT_LINES = ("backprop", "forward", "forward-16", "projection")
PAPER_LINES = ("backprop", "forward-normal", "forward")
