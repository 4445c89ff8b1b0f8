"""What rules learn on a language model: `python benchmarks/language.py SECTION ... --runs FOLDER`.

Sections, each of which prints the tables of docs/results/language.md that it is for:

- accuracy: `forwax finetune --compare` for each seed, then one table of all. Seeds that are
  finished in the folder are not run again, and one that was stopped goes on.
- times: a step of each rule beside the others, in turns, and its memory.
- full: a step on all parameters, rank-1 beside checkpointed backprop, on 4 x 64 tokens.
- next-token: estimates of one gradient and held-out losses at equal steps, by what a token's noise
  is multiplied with. The states below the adapter never change, and are computed once.

The first section takes half an hour, the others some minutes each on a quiet machine with 2 cores.
"""

import argparse
import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import forwax as fx
import language_memory
from forwax import adapters, lm
from forwax.lab import cli
from forwax.lab.finetune import results
from forwax.lab.finetune.run import make_ready
from forwax.lab.options.finetune import FinetuneOptions
from forwax.lab.training.program import CompiledTraining
from forwax.losses import linear_cross_entropy
from timing import interleaved, machine, medians

RULES = ("activity", "learned-feedback", "backprop", "mezo")
TOP = 3
BLOCK = 4
"""Steps of one timing."""

RATES = {
    "its own token's slope": 1.0,
    "its own and later tokens' slopes": 0.3,
    "one slope an example": 0.1,
    "one slope a batch": 0.01,
    "backprop": 1.0,
}
"""The first rate of each way; the others follow by factors of three."""


def table(heads, rows):
    print(f"\n| {' | '.join(heads)} |\n|---{'|---:' * (len(heads) - 1)}|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


# --- accuracy ---


def compared(asked, seed):
    """The summary of a seed's comparison, finished first where it is not."""
    for path in sorted(asked.runs.glob("finetune-*/config.json")):
        options = json.loads(path.read_text())["options"]
        if options["seed"] == seed and set(options["compare"]) == set(RULES[1:]):
            if not (path.parent / "summary.json").exists():
                cli.main(["finetune", "--resume", str(path.parent)])
            return json.loads((path.parent / "summary.json").read_text())
    words = ["finetune", "--max-tokens", "16", "--rule", RULES[0]]
    words += ["--compare", *RULES[1:], "--trials", "4", "--seed", str(seed)]
    assert cli.main([*words, "--runs", str(asked.runs)]) == 0
    return compared(asked, seed)


def accuracy(asked):
    found = [compared(asked, seed) for seed in asked.seeds]
    rows = []
    for number, rule in enumerate(RULES):
        own = [each["rules"][number] for each in found]
        scores = [100 * each["test_accuracy"] for each in own]
        rates = [f"{each['search'][0]['learning_rate']:.2f}" for each in own]
        rows.append(
            (
                rule,
                ", ".join(rates),
                ", ".join(f"{each['learning_rate']:.2f}" for each in own),
                ", ".join(f"{score:.1f}" for score in scores),
                f"{np.mean(scores):.1f}",
                ", ".join(f"{each['test_loss']:.3f}" for each in own),
                f"{own[0]['step_bytes'] / results.MIB:.1f}",
            )
        )
    heads = ("rule", "measured rate", "best rate", "test accuracy, %", "mean")
    table((*heads, "test loss", "memory of a step, MiB"), rows)
    first = found[0]
    print(
        f"\nSeeds {asked.seeds}. Without training {first['test_accuracy_before']:.1%}, the "
        f"commonest class {first['test_share_of_commonest']:.1%}, a shifted threshold "
        f"{first['test_accuracy_shifted']:.1%}."
    )


# --- times ---


def times(asked):
    # compared, backprop computes each layer again
    options = FinetuneOptions(max_tokens=16, compare=RULES[1:])
    ready = make_ready(options).with_prefixes()
    data = jax.device_put(ready.task.train)
    programs = {
        rule: CompiledTraining(ready.task, options.settings(rule, 1.0), data)
        for rule in RULES
    }
    # at rate zero the parameters stay where they are, and the work is the same
    runs = {name: each.start(0.0, seed=0).run for name, each in programs.items()}
    calls = {name: functools.partial(run, BLOCK) for name, run in runs.items()}
    seconds = medians(interleaved(calls, asked.rounds))
    rows = []
    for name, program in programs.items():
        held = results.memory(ready.task, program.block)
        sizes = [held[x] / results.MIB for x in ("step_bytes", "inference_bytes")]
        ratio = seconds[name] / seconds["backprop"]
        rows.append((name, f"{ratio:.2f}", *(f"{size:.1f}" for size in sizes)))
    table(("rule", "time / backprop's", "a step, MiB", "inference, MiB"), rows)


def full(asked):
    shapes = language_memory.parameters()
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype), shapes)
    tokens = jnp.arange(256).reshape(4, 64)
    key = jax.random.key(0)
    step = language_memory.update(language_memory.full, language_memory.RANK_ONE)
    reverse = language_memory.reverse(language_memory.full, checkpoint=True)
    rank_one = jax.jit(step, donate_argnums=1).lower(key, params, tokens).compile()
    backprop = jax.jit(reverse).lower(params, tokens).compile()

    def rank_one_step():
        nonlocal params
        value, params = rank_one(key, params, tokens)
        return value

    calls = {"rank-1": rank_one_step, "backprop": lambda: backprop(params, tokens)}
    seconds = medians(interleaved(calls, asked.rounds))
    ratio = seconds["rank-1"] / seconds["backprop"]
    print(f"\nAll parameters, 4 x 64 tokens: rank-1 takes {ratio:.2f} of the time of")
    print("checkpointed backprop, the update of which is not counted.")


# --- next-token ---


def texts_of(asked):
    """Tokens and masks [N, T] of training and held-out texts, and the model."""
    options = FinetuneOptions(
        task="next-token",
        template=asked.template,
        max_tokens=asked.max_tokens,
        test_texts=1,
        batch_size=asked.batch,
        train_texts=asked.texts,
        validation_texts=asked.held_out,
    )
    ready = make_ready(options)
    parts = [x[0].own for x in (ready.task.train, ready.task.validation)]
    return parts, ready.model


def above(model, parts):
    """The top layers as a model of their own, whose words are the states below them.

    Args:
        model: the whole one.
        parts: tokens and masks of texts.

    Returns:
        Its config, its parameters, and the parts with the numbers of their states.
    """
    config = model.config
    bottom = config.num_layers - TOP

    @jax.jit
    def below(params, tokens, mask):
        states = lm.model.embedded(params, tokens)
        sees = lm.model.visible(tokens, mask)
        layers = params["layers"]
        return lm.model.through_layers(config, layers, states, sees, 0, bottom)

    found = []
    for own in parts:
        for start in range(0, len(own["tokens"]), 8):
            block = [own[x][start : start + 8] for x in ("tokens", "mask")]
            found.append(below(model.params, *block).reshape(-1, config.width))
    fields = {**vars(config), "num_layers": TOP}
    params = {
        "layers": jax.tree.map(lambda x: x[bottom:], model.params["layers"]),
        "token_embd": jnp.concatenate(found),
        "output": model.params.get("output", model.params["token_embd"]),
        "output_norm": model.params["output_norm"],
    }
    count = 0
    for own in parts:
        size = own["tokens"].size
        own["states"] = np.arange(count, count + size).reshape(own["tokens"].shape)
        count += size
    return lm.LlamaConfig(**fields), params, parts


def losses(config):
    """A text's mean loss over its words, by the library and by hand with noise beside it."""

    def loss_of(states, params, own):
        counts = own["mask"][:-1]
        head, tokens = params["output"], own["tokens"][1:]
        found = linear_cross_entropy(states[:-1], head, tokens, mask=counts)
        return found.sum() / counts.sum()

    def total(adapter, params, own):
        numbers, mask = own["states"], own["mask"]
        states = lm.hidden(config, params, numbers, mask=mask, adapter=adapter)
        return loss_of(states, params, own)

    def noisy(noise, adapter, params, own):
        states = params["token_embd"][own["states"]][None]
        sees = lm.model.visible(states[..., 0], own["mask"][None])
        inputs = []
        for index, directions in enumerate(adapter.directions()):
            layer = jax.tree.map(lambda x, index=index: x[index], params["layers"])
            states, _ = lm.model.block(config, layer, states, sees)
            inputs.append(lm.model.unit(states[0]))
            coordinates = inputs[-1] @ adapter.weights[index] + noise[index]
            states = states + (coordinates @ directions)[None]
        states = lm.model.norm(states[0], params["output_norm"], config)
        return loss_of(states, params, own), jnp.stack(inputs)

    return total, noisy


def by_hand(config, of_batch):
    """Noise on the adapter's coordinates times one slope of the batch, or of each text.

    The library finds slopes of its own for tokens, so this is literal. The last layer has the exact
    gradient, as it has there.
    """
    total, noisy = losses(config)

    def mean(adapter, params, texts):
        return jax.vmap(total, (None, None, 0))(adapter, params, texts).mean()

    def estimate(key, adapter, params, texts):
        count, length = texts["mask"].shape
        layers, _, rank = adapter.weights.shape
        shape = (count, layers, length, rank)
        noise = jax.random.rademacher(key, shape, jnp.float32)

        def each(own, noise):
            push = functools.partial(noisy, adapter=adapter, params=params, own=own)
            zeros = jnp.zeros_like(noise)
            _, slope, inputs = jax.jvp(push, (zeros,), (noise,), has_aux=True)
            return slope, inputs

        slopes, inputs = jax.vmap(each)(texts, noise)
        if of_batch:
            slopes = jnp.full(count, slopes.sum())
        found = jnp.einsum("b,blti,bltr->lir", slopes, inputs, noise) / count
        value, exact = jax.value_and_grad(mean)(adapter, params, texts)
        found = found.at[-1].set(exact.weights[-1])
        return value, dataclasses.replace(adapter, weights=found)

    return estimate


def ways(config):
    """Each way's function of (key, adapter, model, texts) to an estimate, and a text's loss."""
    total, _ = losses(config)
    own = fx.ActivityPerturbation(credit=fx.credit.Decay(0.0))
    axes = {"in_axes": (None, None, 0)}
    made = (
        fx.value_and_grad(total, own, **axes),
        fx.value_and_grad(total, fx.ActivityPerturbation(), **axes),
        by_hand(config, of_batch=False),
        by_hand(config, of_batch=True),
        fx.value_and_grad(total, fx.Backprop(), **axes),
    )
    return dict(zip(RATES, made, strict=True)), total


def next_token(asked):
    (train, held), model = texts_of(asked)
    config, params, (train, held) = above(model, [train, held])
    estimates, total = ways(config)
    start = adapters.last_token(config, 4, TOP, jax.random.key(0), everywhere=True)
    train, held = jax.device_put((train, held))
    order = jax.random.permutation(jax.random.key(1), asked.texts)

    @jax.jit
    def held_out(adapter, params):
        def each(own):
            return total(adapter, params, own)

        return jax.lax.map(each, held, batch_size=asked.batch).mean()

    def batch(number):
        first = number * asked.batch % (asked.texts - asked.batch + 1)
        rows = order[first : first + asked.batch]
        return jax.tree.map(lambda x: x[rows], train)

    def key(number):
        return jax.random.fold_in(jax.random.key(2), number)

    def trained(gradient, rate):
        adapter = start
        for number in range(asked.steps):
            grads = gradient(key(number), adapter, params, batch(number))
            adapter = jax.tree.map(lambda w, g: w - rate * g, adapter, grads)
        return float(held_out(adapter, params))

    print(f"\nHeld-out loss at the start {held_out(start, params):.3f}.")
    gradients = {
        name: jax.jit(lambda *given, f=estimate: f(*given)[1])
        for name, estimate in estimates.items()
        if name in (*asked.ways, "backprop")
    }
    exact = gradients["backprop"](key(0), start, params, batch(0)).weights.ravel()
    rows = []
    for name, gradient in gradients.items():
        count = 1 if name == "backprop" else asked.draws
        drawn = [gradient(key(i), start, params, batch(0)) for i in range(count)]
        told = agreement(np.array([each.weights.ravel() for each in drawn]), exact)
        print(name, told, flush=True)
        score = functools.partial(trained, gradient)
        held_at = searched(score, RATES[name], asked.trials)
        best = min(held_at, key=held_at.__getitem__)
        tried = ", ".join(f"{x:g}" for x in sorted(held_at))
        rows.append((name, *told, f"{held_at[best]:.3f}", f"{best:g} of {tried}"))
    heads = ("noise times", "cosine of one", f"of the mean of {asked.draws}")
    table((*heads, "relative MSE", "held-out loss", "rate"), rows)


def searched(score, first, trials):
    """Losses by rate: towards the lower one by factors of three, until it lies between others."""
    found = {first: score(first)}
    print(f"  {first:g}: {found[first]:.3f}", flush=True)
    for _ in range(trials - 1):
        best = min(found, key=found.__getitem__)
        near = [x for x in (best / 3, best * 3) if not any(np.isclose(x, [*found]))]
        if not near:
            break
        found[near[0]] = score(near[0])
        print(f"  {near[0]:g}: {found[near[0]]:.3f}", flush=True)
    return found


def agreement(drawn, exact):
    """Cosine of one estimate and of the mean of all [draws, n], and the relative MSE of one."""
    exact = np.asarray(exact)
    length = np.linalg.norm(exact)
    cosines = drawn @ exact / (np.linalg.norm(drawn, axis=1) * length)
    mean = drawn.mean(0)
    of_mean = mean @ exact / (np.linalg.norm(mean) * length)
    error = np.mean(np.sum((drawn - exact) ** 2, axis=1)) / length**2
    return f"{cosines.mean():.3f}", f"{of_mean:.2f}", f"{error:.3g}"


SECTIONS = {
    "accuracy": accuracy,
    "times": times,
    "full": full,
    "next-token": next_token,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", default=[*SECTIONS], metavar="SECTION")
    parser.add_argument("--runs", type=Path, default=Path("runs/language"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=48, help="of next-token")
    parser.add_argument("--batch", type=int, default=16, help="texts of a step")
    parser.add_argument("--template", default="{text} It was", help="of next-token")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--texts", type=int, default=256, help="to train on")
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--draws", type=int, default=48)
    parser.add_argument("--ways", nargs="+", default=[*RATES], help="of next-token")
    parser.add_argument("--trials", type=int, default=4, help="rates of each way")
    parser.add_argument("--rounds", type=int, default=7, help="of timing")
    asked = parser.parse_args()
    print(f"{machine()}; {' '.join(f'{k}={v}' for k, v in vars(asked).items())}")
    for name in asked.sections:
        SECTIONS[name](asked)


if __name__ == "__main__":
    main()
