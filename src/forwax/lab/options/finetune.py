"""What `forwax finetune` may be asked, and the settings of the lab's loop that it stands for."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from forwax.lab.catalogue.settings import Seed, Settings
from forwax.lab.flags import Chosen, Count, CountOrNot, NotNegative, PathOrNot, Positive
from forwax.lab.report import Json

RULES: dict[str, Json] = {
    "activity": {"rule": "activity"},
    "learned-feedback": {"rule": "learned-feedback"},
    "rank-1": {"rule": "weight", "tangents": "low-rank"},
    "mezo": {"rule": "finite-difference", "tangents": "rademacher"},
    "backprop": {"rule": "backprop"},
}
"""Each rule of the command as settings of the lab."""

RuleName = Literal["activity", "learned-feedback", "rank-1", "mezo", "backprop"]
TEMPLATES = {"classify": "{text} It was", "next-token": "{text}"}


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """Fine-tune a language model on texts, by default without backpropagation.

    Example:
        ```sh
        forwax finetune                               # SmolLM2-135M on rated movie sentences
        forwax finetune --model tiny-random --data tiny-sentences   # seconds, without a network
        forwax finetune --data reviews.csv --labels " bad" " good"
        forwax finetune --compare mezo backprop       # each at a rate found on held-out texts
        forwax finetune --resume runs/finetune-smollm2-20250101-120000
        ```
    """

    model: str = "smollm2"
    """The frozen model: smollm2, tiny-random or the path of a GGUF file."""
    data: str = "movie-sentences"
    """The texts: a name of `forwax data`, or a CSV or TSV file with columns text and label."""
    task: Literal["classify", "next-token"] = "classify"
    """Whether a text's class is told by the next word, or each next word is foretold."""
    adapter: Literal["last-token", "lora", "full"] = "last-token"
    """What is trained: the last token's state (for next-token every one's), low rank, all."""
    rule: RuleName = "activity"
    """How the gradient is found."""
    credit: Literal["own", "later"] = "own"
    """Whether activity noise at a token hears its own next word alone, or later ones (unbiased)."""
    packed: bool = False
    """Whether the model's matrices stay small integers in memory."""
    layers: CountOrNot = None
    """Behind how many of the top layers --adapter last-token acts; 3 by default, at most all."""
    rank: Count = 4
    """The adapter's rank."""
    labels: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """The words that stand for the classes in their alphabetical order, one token each."""
    template: Chosen[str] = None
    """What the model reads; {text} stands for the text. To classify, "{text} It was"."""
    max_tokens: CountOrNot = None
    """Texts with more tokens than this, the template's among them, are left out."""
    train_texts: CountOrNot = None
    """How many texts are trained on; at most 256 by default."""
    validation_texts: CountOrNot = None
    """How many are held out to choose by; at most 200 by default."""
    test_texts: CountOrNot = None
    """How many the result is told on, once, at the end; at most 1,000 by default."""
    num_tangents: Count = 1
    """How many noises a step of activity, rank-1 and mezo draws."""
    steps: Count = 112
    """The number of steps."""
    batch_size: Count = 16
    """The number of texts of a step."""
    learning_rate: Chosen[Positive] = None
    """The rate at the start, from which it falls to zero; by default the loss's curvature says."""
    seed: Seed = 0
    """The seed of the adapter, the order of texts and the noise."""
    compare: Annotated[tuple[RuleName, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """Rules to train as well, each at a rate found on held-out texts in equally many trials."""
    trials: Count = 4
    """How many rates each rule of a comparison tries."""
    resume: Annotated[
        Path | None, tyro.conf.arg(metavar="RUN", help_behavior_hint="")
    ] = None
    """Go on with the run in this folder, bit for bit as if it had never stopped."""
    runs: Path = Path("runs")
    """The folder that the run's folder is made in."""
    data_dir: PathOrNot = None
    """A folder to look for data and model in first, before FORWAX_DATA and the cache."""
    checkpoint_seconds: NotNegative = 5.0
    """The time between two checkpoints."""
    print_config: bool = False
    """Print what config.json would hold, and start nothing."""

    @property
    def pattern(self) -> str:
        """The template, or the task's."""
        return TEMPLATES[self.task] if self.template is None else self.template

    @property
    def rules(self) -> tuple[str, ...]:
        """The rule, and those that it is compared with."""
        return self.rule, *self.compare

    def settings(self, rule: str, rate: float | None) -> Settings:
        """The settings of the lab's loop for a rule at a rate."""
        # imported here: it needs jax, which `forwax finetune --help` need not wait for
        from forwax.lab.catalogue.rules import check_rule

        settings = Settings(
            **RULES[rule],
            num_tangents=self.num_tangents,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=rate,
            seed=self.seed,
            schedule="linear",
            eval_every=max(1, self.steps // 8),
        )
        return dataclasses.replace(check_rule(settings, {}), decay_rate=None)


DESCRIPTION = """Fine-tune a language model on texts, by default without backpropagation.

Rules:
- activity: slopes along noise on the adapter's activations, one for each text and step
- learned-feedback: the output's error reaches each site by a map that noise teaches
- rank-1: slopes along random directions of rank one of all trained numbers
- mezo: the same along random signs, by two evaluations in place of a derivative
- backprop: reverse mode, each layer computed again on the way back; the reference

Model and texts are fetched from your package index when they are first needed."""
"""What `forwax finetune --help` says first."""
