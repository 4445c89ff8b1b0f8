"""A model, texts and an adapter as the `Task` of the lab's loop."""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import forwax as fx
from forwax import adapters, lm
from forwax.lab.catalogue.objectives import Estimate
from forwax.lab.catalogue.optimizers import build_schedule
from forwax.lab.catalogue.rules import guarded_rule
from forwax.lab.catalogue.settings import Settings
from forwax.lab.finetune import prefixes
from forwax.lab.finetune.models import Model, encoded
from forwax.lab.flags import UsageError
from forwax.lab.options.finetune import FinetuneOptions
from forwax.lab.texts.sets import Texts
from forwax.lab.training.problem import Task
from forwax.lab.training.step import TrainState, split_seed
from forwax.lm.packed import rows_of
from forwax.losses import linear_cross_entropy
from forwax.models.ren2023 import estimator

TEXT = "{text}"
AXES = (None, None, 0, 0)
"""Parameters and the frozen model are everybody's, the rest has examples in front."""

ADAPTED = "attn_[qv]"
"""The matrices that `--adapter lora` changes."""

TOP = 3
"""Behind how many layers `--adapter last-token` acts by default."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Rows:
    """Inputs of examples, and what all share: a row is an example with the frozen model beside it.

    Attributes:
        own: arrays with examples in front.
        frozen: arrays of the model, an argument of each step and no constant.

    >>> rows = Rows({"tokens": np.zeros((3, 5), int)}, frozen={})
    >>> len(rows), rows[:2].own["tokens"].shape
    (3, (2, 5))
    """

    own: Any
    frozen: Any

    def __len__(self) -> int:
        return len(jax.tree.leaves(self.own)[0])

    def __getitem__(self, index: Any) -> "Rows":
        return Rows(jax.tree.map(lambda x: x[index], self.own), self.frozen)


Part = tuple[Rows, np.ndarray]
"""Examples and their labels int32 [N]."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Tuning(Task):
    """A task whose examples are `Rows`.

    Attributes:
        validation: examples held out of training, by which rates are chosen.
        batch_size: of steps and of inference.
        loss_of_tokens: from (parameters, one example) to the loss, where no label is predicted.
        credit: of rules that have one.
    """

    validation: Any
    batch_size: int
    loss_of_tokens: Callable[[Any, Any], Array] | None = None
    credit: Any = None

    @property
    def start(self) -> Any:
        """The parameters before the first step."""
        return self.init(jax.random.key(0))

    def loss(self, params: Any, image: Any, label: Array) -> tuple[Array, Array]:
        """The loss of one example, and whether its label was found, or no number."""
        if self.loss_of_tokens is None:
            return super().loss(params, image, label)
        return self.loss_of_tokens(params, image), jnp.float32(jnp.nan)

    def loss_beside(self, params: Any, frozen: Any, own: Any, label: Array) -> Any:
        """The loss of one example with the frozen model, which is not mapped over examples."""
        return self.loss(params, Rows(own, frozen), label)

    def credited(self, rule: Any) -> Any:
        """The rule, with the task's credit where it has one."""
        has_one = hasattr(rule, "credit")
        return replace(rule, credit=self.credit) if has_one else rule

    def gradient(self, rule: Any) -> Estimate:
        """The estimate of a batch's gradient."""
        rule = self.credited(rule)
        estimate = estimator(self.loss_beside, rule, has_aux=True, in_axes=AXES)

        def of_batch(key: Array, params: Any, rows: Any, labels: Array) -> Any:
            return estimate(key, params, rows.frozen, rows.own, labels)

        return of_batch

    def own_step(self, settings: Settings) -> Any:
        """A step in place, without a gradient, where directions follow from a key; else None.

        It is `forwax.update` in its two halves, between which a step that is not finite is left.
        """
        rule = guarded_rule(settings)
        if rule.replayed is None:
            return None
        loss = self.loss_beside
        push = fx.slopes(loss, rule, has_aux=True, in_axes=AXES)
        replay = fx.replay(loss, rule, in_axes=AXES, rounding="stochastic")
        rate = build_schedule(settings, settings.learning_rate)  # type: ignore[arg-type]
        noise = split_seed(settings.seed).noise

        def step(state: TrainState, rows: Any, labels: Array) -> Any:
            key = jax.random.fold_in(noise, state.step)
            given = state.params, rows.frozen, rows.own, labels
            (value, correct), slopes = push(key, *given)
            finite = jnp.isfinite(value) & jnp.isfinite(slopes.weights).all()

            def advance() -> TrainState:
                params = replay(slopes, rate(state.step), *given)
                return state._replace(params=params, step=state.step + 1)

            after = jax.lax.cond(finite, advance, lambda: state)
            return after, value, jnp.mean(correct, dtype=jnp.float32), finite

        return step

    @functools.cached_property
    def inference(self) -> Any:
        """Compiled: from parameters and a batch to losses, what was found, and logits."""

        def of_batch(params: Any, rows: Rows, labels: Array) -> Any:
            def of_example(own: Any, label: Array) -> Any:
                row: Any = Rows(own, rows.frozen)
                logits = () if self.loss_of_tokens else self.logits(params, row)
                return *self.loss(params, row, label), logits

            return jax.vmap(of_example)(rows.own, labels)

        batch = self.batch(self.train, 0)  # type: ignore[arg-type]
        return jax.jit(of_batch).lower(self.start, *batch).compile()

    def scores(self, part: Part) -> Callable[[Any], tuple[np.ndarray, ...]]:
        """A function of parameters: losses [N], whether labels were found [N], and logits."""
        starts = range(0, len(part[0]), self.batch_size)
        batches = [self.batch(part, start) for start in starts]

        def score(params: Any) -> tuple[np.ndarray, ...]:
            found = [jax.device_get(self.inference(params, *each)) for each in batches]
            joined = jax.tree.map(lambda *x: np.concatenate(x)[: len(part[0])], *found)
            return tuple(joined)

        return score

    def batch(self, part: Part, start: int) -> Part:
        """As many rows as a step has; behind the last one comes the first again."""
        rows, labels = part
        numbers = np.arange(start, start + self.batch_size)
        chosen = np.where(numbers < len(rows), numbers, 0)
        return rows[chosen], labels[chosen]


def build(model: Model, texts: Texts, options: FinetuneOptions) -> Tuning:
    """Tokenise and split; what is frozen is not cached yet, see `with_prefixes`.

    Args:
        model: the frozen model.
        texts: what is trained and tested on.
        options: of the command.

    Raises:
        UsageError: when texts, labels, model and options do not go together.
    """
    classifies = options.task == "classify"
    labels = np.zeros(len(texts.sentences), np.int32)
    words = np.zeros(0, np.int32)
    if classifies:
        labels = _checked_labels(texts)
        words = np.array(model.label_words(options.labels, texts.class_names), np.int32)
    lists, kept = _tokenised(model, texts, options)
    labels = labels[kept]
    tokens, mask = _padded(lists)
    digest = hashlib.sha256(f"{model.config.sha256} {model.is_packed}".encode())
    for array in (tokens, mask, labels, words):
        digest.update(array.tobytes())
    adapter, frozen = _start(model, options)
    own: Any = {"tokens": tokens, "mask": mask}
    counts = _sizes(len(tokens), options)
    parts: list[Part] = []
    for start, count in zip(np.cumsum([0, *counts]), counts, strict=False):
        chosen = slice(start, start + count)
        rows = Rows(jax.tree.map(lambda x, chosen=chosen: x[chosen], own), frozen)
        parts.append((rows, labels[chosen]))
    test, validation, train = parts
    if classifies and len(np.unique(train[1])) < 2:
        raise UsageError(
            "Training sentences of two classes or more are needed, got one."
        )
    compute = _states(model.config, options)
    return Tuning(
        init=lambda key: adapter,
        logits=_class_logits(compute, words),
        train=train,  # type: ignore[arg-type]
        test=test,  # type: ignore[arg-type]
        validation=validation,
        batch_size=options.batch_size,
        num_parameters=sum(leaf.size for leaf in jax.tree.leaves(adapter)),
        checksum=digest.hexdigest(),
        loss_of_tokens=None if classifies else _next_token(compute),
        credit=fx.credit.Decay(0.0) if options.credit == "own" else None,
    )


def with_prefixes(task: Tuning, model: Model) -> Tuning:
    """The task with what an adapter of the last token never changes computed once, and kept.

    Args:
        task: from `build`.
        model: the frozen model.

    Raises:
        DataError: where prefixes cannot be kept.
    """
    adapter = task.start
    if not getattr(adapter, "changes_last_token_alone", False):
        return task

    def cached(part: Any) -> Any:
        rows, labels = part
        own = prefixes.cached(model, **rows.own, layers=adapter.num_layers)
        return Rows(own, rows.frozen), labels

    parts: Any = {x: cached(getattr(task, x)) for x in ("test", "validation", "train")}
    return replace(task, **parts)


def _checked_labels(texts: Texts) -> np.ndarray:
    if texts.labels is None:
        raise UsageError(
            f"--task classify needs a column label, which {texts.name} lacks; add it, or take "
            "--task next-token."
        )
    if len(texts.class_names) < 2:
        raise UsageError(
            f"--task classify needs two labels or more, but {texts.name} has only "
            f"{', '.join(texts.class_names)}."
        )
    return texts.labels


def _tokenised(
    model: Model, texts: Texts, options: FinetuneOptions
) -> tuple[list[list[int]], np.ndarray]:
    """The tokens of the texts that are used, and which these are."""
    if TEXT not in options.pattern:
        raise UsageError(
            f"--template must hold {TEXT} where the text stands, got {options.template!r}."
        )
    lists = [encoded(model, options.pattern.replace(TEXT, x)) for x in texts.sentences]
    sizes = np.array([len(each) for each in lists])
    context = model.config.context
    least = 1 if options.task == "classify" else 2
    most = options.max_tokens or sizes.max()
    kept = np.flatnonzero((least <= sizes) & (sizes <= most))
    long = kept[sizes[kept] > context]
    if len(long):
        text = texts.sentences[long[0]]
        raise UsageError(
            f"{model.config.name} sees {context} tokens, but the text {text[:40]!r} has "
            f"{sizes[long[0]]}; leave longer ones out with --max-tokens {context}."
        )
    if len(kept) < len(lists):
        print(f"{len(kept):,} of {len(lists):,} texts have at most {most} tokens.")
    return [lists[number] for number in kept], kept


def _padded(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [N, T], filled up on the left, and where they are no filling."""
    sizes = np.array([len(own) for own in lists], int)
    length = sizes.max(initial=0)
    mask = np.arange(length) >= length - sizes[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = [token for own in lists for token in own]
    return tokens, mask


def _sizes(total: int, options: FinetuneOptions) -> list[int]:
    """How many texts are for testing, validating and training, in this order."""
    train = options.train_texts or min(256, total // 2)
    validation = options.validation_texts or min(200, total // 8)
    test = options.test_texts or min(1000, total - train - validation)
    if test + validation + train > total or min(test, validation, train) < 1:
        raise UsageError(
            f"{total:,} texts are too few for {test} to test, {validation} to validate and {train} "
            "to train on; give fewer with --test-texts, --validation-texts and --train-texts."
        )
    if options.batch_size > train:
        raise UsageError(
            f"--batch-size must be at most the {train} texts to train on, got "
            f"{options.batch_size}."
        )
    return [test, validation, train]


def _start(model: Model, options: FinetuneOptions) -> tuple[Any, Any]:
    """What is trained, as it starts, and what is frozen."""
    if options.adapter == "full":
        if model.is_packed:
            raise UsageError(
                "--adapter full trains the weights themselves, which --packed keeps as integers; "
                "leave one of them out."
            )
        return model.params, {}
    key = jax.random.key(options.seed)
    config = model.config
    try:
        if options.adapter == "lora":
            made: Any = adapters.lora(
                model.params, options.rank, ADAPTED, key, config=config
            )
        else:
            made = adapters.last_token(
                config,
                options.rank,
                options.layers or min(TOP, config.num_layers),
                key,
                everywhere=options.task == "next-token",
            )
    except ValueError as error:
        raise UsageError(str(error)) from error
    return made, model.params


def _states(
    config: lm.LlamaConfig, options: FinetuneOptions
) -> Callable[[Any, Rows], tuple[Any, Array]]:
    """From parameters and one example to the head [words, width] and the states it is given."""
    again = "backprop" in options.rules

    def compute(params: Any, row: Rows) -> tuple[Any, Array]:
        full = options.adapter == "full"
        base = params if full else row.frozen
        adapter = None if full else params
        head = base.get("output", base["token_embd"])
        is_last = isinstance(row.own, adapters.Prefix)
        inputs = {"tokens": None, "prefix": row.own} if is_last else row.own
        found = lm.hidden(config, base, adapter=adapter, checkpoint=again, **inputs)
        return head, found if is_last or options.task == "next-token" else found[-1]

    return compute


def _class_logits(
    compute: Callable[[Any, Rows], tuple[Any, Array]], words: np.ndarray
) -> Callable[[Any, Any], Array]:
    """The logits of the words that stand for classes; no others are computed."""

    def logits(params: Any, row: Rows) -> Array:
        head, state = compute(params, row)
        return rows_of(head, words, state.dtype) @ state

    return logits


def _next_token(
    compute: Callable[[Any, Rows], tuple[Any, Array]],
) -> Callable[[Any, Any], Array]:
    """The mean loss of a text's words behind the first."""

    def loss(params: Any, row: Rows) -> Array:
        head, states = compute(params, row)
        tokens = row.own["tokens"][1:]
        # left of the text nothing is foretold, nor its first word
        counts = row.own["mask"][:-1]
        losses = linear_cross_entropy(states[:-1], head, tokens, mask=counts)
        return losses.sum() / counts.sum()

    return loss
