"""Memory of steps on a language model: `python benchmarks/language_memory.py`.

The compiler's figures on shapes alone, of SmolLM2-135M and next-token steps on 4 x 64 tokens; no
weights are read. Prints the table of docs/language-model.md, then what docs/results/language.md
says of other heads, longer texts, a packed base and compiling. Takes about three minutes.
"""

import time

import jax
import jax.numpy as jnp

import forwax as fx
from forwax import adapters, lm
from forwax.losses import linear_cross_entropy, softmax_cross_entropy

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
LONG = jax.ShapeDtypeStruct((4, 512), jnp.int32)
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


def packed():
    """The same in blocks of 32 integers and their scales: Q4_1, and Q8_0 of the embedding."""
    params = parameters()

    def halves(x):
        blocks = (*x.shape[:-1], x.shape[-1] // 32)
        return blocks, jax.ShapeDtypeStruct(blocks, jnp.float16)

    def four_bits(x):
        blocks, half = halves(x)
        return lm.Packed(jax.ShapeDtypeStruct((*blocks, 16), jnp.uint8), half, half)

    blocks, half = halves(params["token_embd"])
    table = lm.Packed(jax.ShapeDtypeStruct((*blocks, 32), jnp.int8), half)
    layers = {
        name: four_bits(x) if x.ndim == 3 else x for name, x in params["layers"].items()
    }
    return {**params, "layers": layers, "token_embd": table}


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


def whole_logits(params, tokens):
    """The loss by one array of logits, of positions side by side."""
    states = lm.hidden(CONFIG, params, tokens)[:, :-1].reshape(-1, CONFIG.width)
    logits = states @ params["token_embd"].T
    return softmax_cross_entropy(logits, tokens[:, 1:].reshape(-1)).mean()


def reverse(loss, checkpoint):
    return jax.value_and_grad(lambda *args: loss(*args, checkpoint=checkpoint))


def low_rank(params, key):
    return adapters.lora(params, 8, "attn_[qv]", key)


def update(loss, rule):
    step = fx.update(loss, rule, learning_rate=1e-4)
    return lambda *args: step(*args)


def compiled(function, *args, donate=()):
    return jax.jit(function, donate_argnums=donate).lower(*args).compile()


def mebibytes(function, *args, donate=()):
    memory = compiled(function, *args, donate=donate).memory_analysis()
    temporaries = memory.temp_size_in_bytes + memory.output_size_in_bytes
    return (temporaries - memory.alias_size_in_bytes) / 2**20


def of_update(loss, rule, trained, *args):
    return mebibytes(update(loss, rule), KEY, trained, *args, donate=1)


def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 2**20


def figures():
    """What docs/results/language.md says beside the table, in MiB."""
    params, base = parameters(), packed()
    adapter = jax.eval_shape(low_rank, base, KEY)
    held = size(base) + size(adapter)
    low = {
        name: of_update(adapted, rule, adapter, base, TOKENS)
        for name, rule in (
            ("MeZO", MEZO),
            ("rank-1", RANK_ONE),
            ("signs", fx.WeightPerturbation()),
        )
    }
    return {
        "rank-1, head in chunks": of_update(full, RANK_ONE, params, TOKENS),
        "rank-1, whole logits": of_update(whole_logits, RANK_ONE, params, TOKENS),
        "inference, 4 x 64": mebibytes(full, params, TOKENS),
        "MeZO, 4 x 64": of_update(full, MEZO, params, TOKENS),
        "inference, 4 x 512": mebibytes(full, params, LONG),
        "MeZO, 4 x 512": of_update(full, MEZO, params, LONG),
        **{
            f"all arrays of low rank 8 on a 4-bit base, {x}": held + low[x] for x in low
        },
    }


def compile_seconds():
    """Processor seconds of tracing and compiling, of rank-1 and of backprop."""
    params = parameters()
    found = []
    for function, args in (
        (update(full, RANK_ONE), (KEY, params, TOKENS)),
        (reverse(full, checkpoint=False), (params, TOKENS)),
    ):
        jax.clear_caches()
        started = time.process_time()
        compiled(function, *args)
        found.append(time.process_time() - started)
    return found


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
    for name, value in figures().items():
        print(f"{name}: {value:.1f} MiB")
    rank_one, backprop = compile_seconds()
    print(f"compiling: rank-1 {rank_one:.1f}, backprop {backprop:.1f} CPU s")


if __name__ == "__main__":
    main()
