"""Memory of steps on a language model: `python benchmarks/language_memory.py`.

The compiler's figures on shapes alone, of SmolLM2-135M and next-token steps on 4 x 64 tokens; no
weights are read. Prints the table of docs/language-model.md in about two minutes.
"""

import jax
import jax.numpy as jnp

import forwax as fx
from forwax import adapters, lm
from forwax.losses import linear_cross_entropy

CONFIG = lm.LlamaConfig(
    num_layers=30,
    width=576,
    num_heads=9,
    num_kv_heads=3,
    head_size=64,
    inner_width=1536,
    num_words=49152,
    context=8192,
    rope_base=1e5,
)
TOKENS = jax.ShapeDtypeStruct((4, 64), jnp.int32)
KEY = jax.eval_shape(lambda: jax.random.key(0))
RANK_ONE = fx.WeightPerturbation(tangents=fx.tangents.LowRank())
MEZO = fx.FiniteDifference(tangents=fx.tangents.LowRank())


def floats(shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def parameters():
    shapes = CONFIG.shapes().items()
    return {
        "layers": {name: floats((CONFIG.num_layers, *shape)) for name, shape in shapes},
        "token_embd": floats((CONFIG.num_words, CONFIG.width)),
        "output_norm": floats((CONFIG.width,)),
    }


def loss_of(states, params, tokens):
    labels = jnp.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)
    mask = jnp.ones_like(tokens, bool).at[:, -1].set(False)
    head = params["token_embd"]
    losses = linear_cross_entropy(states, head, labels, mask=mask, chunk_size=32)
    return losses.sum() / mask.sum()


def full(params, tokens, checkpoint=False):
    states = lm.hidden(CONFIG, params, tokens, checkpoint=checkpoint)
    return loss_of(states, params, tokens)


def adapted(adapter, params, tokens, checkpoint=False):
    states = lm.hidden(CONFIG, params, tokens, adapter=adapter, checkpoint=checkpoint)
    return loss_of(states, params, tokens)


def reverse(loss, checkpoint):
    return jax.value_and_grad(lambda *args: loss(*args, checkpoint=checkpoint))


def low_rank(params, key):
    return adapters.lora(params, 8, "attn_[qv]", key)


def update(loss, rule):
    step = fx.update(loss, rule, learning_rate=1e-4)
    return lambda *args: step(*args)


def mebibytes(function, *args, donate=()):
    jitted = jax.jit(function, donate_argnums=donate)
    memory = jitted.lower(*args).compile().memory_analysis()
    temporaries = memory.temp_size_in_bytes + memory.output_size_in_bytes
    return (temporaries - memory.alias_size_in_bytes) / 2**20


def main():
    params = parameters()
    adapter = jax.eval_shape(low_rank, params, KEY)
    rows = {
        "inference": (
            mebibytes(full, params, TOKENS),
            mebibytes(adapted, adapter, params, TOKENS),
        )
    }
    rules = {"rank-1 tangents": RANK_ONE, "MeZO along low rank": MEZO}
    for name, rule in rules.items():
        rows[f"`fx.update`, {name}"] = (
            mebibytes(update(full, rule), KEY, params, TOKENS, donate=1),
            mebibytes(update(adapted, rule), KEY, adapter, params, TOKENS, donate=1),
        )
    for name, checkpoint in (("", False), (", `checkpoint=True`", True)):
        rows[f"`jax.value_and_grad`{name}"] = (
            mebibytes(reverse(full, checkpoint), params, TOKENS),
            mebibytes(reverse(adapted, checkpoint), adapter, params, TOKENS),
        )
    print("| MiB | all parameters | low rank 8 on q and v |\n|---|---:|---:|")
    for name, (all_of_them, of_adapter) in rows.items():
        print(f"| {name} | {all_of_them:.1f} | {of_adapter:.1f} |")


if __name__ == "__main__":
    main()
