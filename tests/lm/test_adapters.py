"""Adapters: the same logits by every way, files, and every rule."""

import dataclasses
import functools
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwax as fx
from forwax import adapters, lm
from forwax.losses import softmax_cross_entropy

CONFIG = lm.LlamaConfig(
    num_layers=3,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    inner_width=32,
    num_words=50,
    context=16,
    name="tiny",
    sha256="0123456789abcdef",
)
TOKENS = jnp.array([[5, 30, 2, 9, 30], [1, 0, 25, 33, 34]])
LABELS = jnp.array([3, 7])
MASK = jnp.array([[False, False, True, True, True], [True] * 5])
# one program each, not one for each operation
forward = jax.jit(lm.forward, static_argnums=0, static_argnames="checkpoint")


def one_by_one(function):
    """Of operations that are compiled once each, for all tests with the same shapes."""

    @functools.wraps(function)
    def call(*args, **options):
        with jax.disable_jit():
            return function(*args, **options)

    return call


by_steps = one_by_one(lm.forward)
cached_prefix = one_by_one(adapters.cached_prefix)
compiled_prefix = jax.jit(
    adapters.cached_prefix, static_argnums=0, static_argnames="layers"
)


@functools.cache
def parameters(dtype=jnp.float32):
    shapes = {name: (3, *shape) for name, shape in CONFIG.shapes().items()}
    rng = np.random.default_rng(0)

    def normal(shape):
        return jnp.asarray(rng.normal(size=shape) / 4, dtype)

    layers = {name: normal(shape) for name, shape in shapes.items()}
    layers |= {name: 1 + layers[name] for name in ("attn_norm", "ffn_norm")}
    return {
        "layers": layers,
        "token_embd": normal((50, 32)),
        "output_norm": 1 + normal((32,)),
    }


def packed_parameters():
    params = parameters()
    rng = np.random.default_rng(1)

    def packed(shape):
        blocks = (*shape[:-1], shape[-1] // 32)
        scale = jnp.asarray(rng.uniform(0.02, 0.04, blocks), jnp.float16)
        return lm.Packed(
            jnp.asarray(rng.integers(0, 256, (*blocks, 16)), jnp.uint8), scale
        )

    layers = {
        name: packed(x.shape) if x.ndim == 3 else x
        for name, x in params["layers"].items()
    }
    return {**params, "layers": layers}


def moved(adapter, size=0.3):
    """An adapter as after some training."""
    leaves, structure = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    noises = [
        x + size * jax.random.normal(key, x.shape, x.dtype)
        for key, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, noises)


KEY = jax.random.key(1)


def lora(params):
    return adapters.lora(params, 3, "attn_[qv]", KEY, scale=0.5, config=CONFIG)


def last_token():
    return adapters.last_token(CONFIG, 4, 2, KEY)


def test_low_rank_equals_merge():
    params = parameters()
    adapter = moved(lora(params))
    logits = forward(CONFIG, params, TOKENS, mask=MASK, adapter=adapter)
    merged = adapters.merge(params, adapter)
    expected = forward(CONFIG, merged, TOKENS, mask=MASK)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    plain = forward(CONFIG, params, TOKENS, mask=MASK)
    assert jnp.abs(logits - plain).max() > 0.1


def test_low_rank_beside_packed_matrices():
    params = packed_parameters()
    adapter = moved(lora(params))
    dense = jax.tree.map(
        lambda x: x.dense(jnp.float32) if isinstance(x, lm.Packed) else x,
        params,
        is_leaf=lambda x: isinstance(x, lm.Packed),
    )
    logits = forward(CONFIG, params, TOKENS, adapter=adapter)
    expected = forward(CONFIG, adapters.merge(dense, adapter), TOKENS)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="but attn_q is packed"):
        adapters.merge(params, adapter)


def test_adapters_change_nothing_at_the_start():
    params = parameters()
    plain = forward(CONFIG, params, TOKENS)
    for adapter in (lora(params), last_token()):
        logits = forward(CONFIG, params, TOKENS, adapter=adapter)
        np.testing.assert_allclose(logits, plain, rtol=0, atol=1e-5)


def test_every_token_is_changed_as_the_last_one_is(tmp_path):
    key = jax.random.key(0)
    weights = jax.random.normal(jax.random.key(1), (1, CONFIG.width, 2))
    last, every = (
        dataclasses.replace(
            adapters.last_token(CONFIG, 2, 1, key, everywhere=everywhere),
            weights=weights,
        )
        for everywhere in (False, True)
    )
    params = parameters()
    logits = by_steps(CONFIG, params, TOKENS, adapter=every)
    for length in (1, 3, 5):
        shifted = jnp.roll(TOKENS, -length, axis=1)
        mask = jnp.broadcast_to(jnp.arange(5) >= 5 - length, TOKENS.shape)
        alone = by_steps(CONFIG, params, shifted, mask=mask, adapter=last)
        np.testing.assert_allclose(logits[:, length - 1], alone[:, -1], atol=2e-5)
    adapters.save(tmp_path / "a", every)
    assert adapters.load(tmp_path / "a").everywhere
    prefix = cached_prefix(CONFIG, params, TOKENS, layers=1)
    with pytest.raises(ValueError, match="expected an adapter that acts there"):
        lm.forward(CONFIG, params, TOKENS, adapter=every, prefix=prefix)


@pytest.mark.parametrize("kind", ["none", "lora", "last_token"])
def test_checkpointed_layers_give_the_same_in_less_memory(kind):
    params = parameters()
    adapter = {
        "none": lambda: None,
        "lora": lambda: adapters.lora(params, 2, None, jax.random.key(0)),
        "last_token": lambda: adapters.last_token(CONFIG, 2, 3, jax.random.key(0)),
    }[kind]()
    trained = params if adapter is None else adapter

    def gradient(checkpoint):
        def loss(trained, params):
            base = trained if adapter is None else params
            own = None if adapter is None else trained
            return lm.forward(
                CONFIG, base, TOKENS, adapter=own, checkpoint=checkpoint
            ).var()

        return jax.jit(jax.grad(loss)).lower(trained, params).compile()

    plain, again = (gradient(checkpoint) for checkpoint in (False, True))
    for a, b in zip(
        jax.tree.leaves(plain(trained, params)),
        jax.tree.leaves(again(trained, params)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    sizes = [each.memory_analysis().temp_size_in_bytes for each in (plain, again)]
    assert sizes[1] < sizes[0]


def test_the_last_token_is_changed_as_written():
    """Of one layer the change stands straight in front of the last norm."""
    params = parameters()
    adapter = moved(adapters.last_token(CONFIG, 4, 1, KEY))
    bottom = one_by_one(lm.model.through_layers)(
        CONFIG,
        params["layers"],
        params["token_embd"][TOKENS],
        lm.model.visible(TOKENS, None),
        0,
        3,
    )
    last = np.asarray(bottom[:, -1], np.float64)
    a, u = np.asarray(adapter.weights[0]), adapter.directions()[0]
    root = np.sqrt((last**2).mean(axis=1, keepdims=True) + 1e-5)
    last = last + (last / root) @ a @ u
    root = np.sqrt((last**2).mean(axis=1, keepdims=True) + 1e-5)
    expected = (last / root * params["output_norm"][None]) @ params["token_embd"].T
    logits = by_steps(CONFIG, params, TOKENS, adapter=adapter)
    np.testing.assert_allclose(logits[:, -1], expected, rtol=0, atol=1e-4)
    plain = by_steps(CONFIG, params, TOKENS)
    np.testing.assert_allclose(logits[:, :-1], plain[:, :-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_last_token_by_prefix_equals_the_whole_sequence(layers, mask):
    params = parameters()
    # no scan over no layers runs one by one
    run, cached = (
        (forward, compiled_prefix) if layers == 3 else (by_steps, cached_prefix)
    )
    adapter = moved(adapters.last_token(CONFIG, 4, layers, KEY))
    expected = run(CONFIG, params, TOKENS, mask=mask, adapter=adapter)[:, -1]
    prefix = cached(CONFIG, params, TOKENS, layers=layers, mask=mask)
    assert {len(x) for x in jax.tree.leaves(prefix)} == {len(TOKENS)}
    logits = run(CONFIG, params, TOKENS, adapter=adapter, prefix=prefix)
    assert logits.shape == (2, 50)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    plain = run(CONFIG, params, TOKENS, mask=mask)[:, -1]
    assert jnp.abs(logits - plain).max() > 0.1
    one = jax.tree.map(lambda x: x[1], prefix)
    alone = run(CONFIG, params, TOKENS[1], adapter=adapter, prefix=one)
    np.testing.assert_allclose(alone, expected[1], rtol=0, atol=1e-4)


def test_padding_changes_nothing_by_prefix():
    params = parameters()
    adapter = moved(last_token())
    short = TOKENS[:1, 2:]
    whole = cached_prefix(CONFIG, params, short, layers=2)
    padded = cached_prefix(CONFIG, params, TOKENS, layers=2, mask=MASK)
    expected = by_steps(CONFIG, params, short, adapter=adapter, prefix=whole)
    logits = by_steps(CONFIG, params, TOKENS, adapter=adapter, prefix=padded)
    np.testing.assert_allclose(logits[:1], expected, rtol=0, atol=1e-4)


def test_a_prefix_may_be_kept_in_float16_and_of_one_token():
    params = parameters()
    adapter = moved(last_token())
    prefix = cached_prefix(CONFIG, params, TOKENS, layers=2)
    halves = jax.tree.map(
        lambda x: x.astype(jnp.float16) if x.dtype == jnp.float32 else x, prefix
    )
    logits = by_steps(CONFIG, params, TOKENS, adapter=adapter, prefix=halves)
    expected = by_steps(CONFIG, params, TOKENS, adapter=adapter, prefix=prefix)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=0.02)
    first = TOKENS[:, :1]
    prefix = cached_prefix(CONFIG, params, first, layers=2)
    logits = by_steps(CONFIG, params, first, adapter=adapter, prefix=prefix)
    expected = by_steps(CONFIG, params, first, adapter=adapter)[:, 0]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def of_last_token(adapter, params, prefix, label):
    logits = lm.forward(CONFIG, params, label, adapter=adapter, prefix=prefix)
    return softmax_cross_entropy(logits, label)


def of_whole(adapter, params, tokens, label):
    logits = lm.forward(CONFIG, params, tokens, adapter=adapter)
    return softmax_cross_entropy(logits[-1], label)


@functools.cache
def case(kind):
    """A loss of one example, its arguments, and the mean over the examples with its gradient."""
    params = parameters()
    if kind == "lora":
        loss, args = of_whole, (moved(lora(params), 0.1), params, TOKENS, LABELS)
    else:
        prefix = cached_prefix(CONFIG, params, TOKENS, layers=2)
        loss, args = of_last_token, (moved(last_token(), 0.1), params, prefix, LABELS)
    mean = lambda *args: jax.vmap(loss, AXES)(*args).mean()
    return loss, args, *jax.jit(jax.value_and_grad(mean))(*args)


AXES = (None, None, 0, 0)
ADAPTERS = ["lora", "last-token"]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_activity_is_unbiased(kind):
    loss, args, *_ = case(kind)
    # The sum over basis noise is exact; three tenths are what the draws besides must find.
    fx.testing.assert_unbiased(
        fx.ActivityPerturbation(),
        loss,
        args,
        in_axes=AXES,
        tolerance=0.3,
        reference=fx.Backprop(),
    )


RULES = {
    "weights": fx.WeightPerturbation(),
    "rank one": fx.WeightPerturbation(tangents=fx.tangents.LowRank()),
    "activity": fx.ActivityPerturbation(),
    "differences": fx.FiniteDifference(),
    "backprop": fx.Backprop(),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_rule_takes_adapters(kind, rule):
    loss, args, expected, exact = case(kind)
    run = jax.jit(fx.value_and_grad(loss, rule, in_axes=AXES))
    value, grads = run(KEY, *args)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert jax.tree.structure(grads) == jax.tree.structure(args[0])
    if isinstance(rule, fx.Backprop):
        jax.tree.map(
            lambda g, e: np.testing.assert_allclose(g, e, rtol=0, atol=1e-5),
            grads,
            exact,
        )
    assert all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(grads))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_learned_feedback_takes_adapters(kind):
    loss, args, expected, exact = case(kind)
    rule = fx.LearnedFeedback().init(loss, in_axes=AXES)(*args)

    @jax.jit
    def step(rule, key):
        return rule.step(loss, in_axes=AXES)(key, *args)

    for own in jax.random.split(KEY, 30):
        value, grads, rule = step(rule, own)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert cosine(grads, exact) > 0.9


def cosine(a, b):
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (a, b)]
    return flat[0] @ flat[1] / np.prod([np.linalg.norm(x) for x in flat])


@pytest.mark.parametrize(("kind", "num_sites"), [("lora", 8), ("last-token", 2)])
def test_explain_shows_the_sites(kind, num_sites):
    """By the adapter's leaves."""
    loss, args, *_ = case(kind)
    table = fx.explain(loss, in_axes=AXES)(*args)
    assert len(table.rows) == num_sites
    named = {path.partition(".")[0] for row in table.rows for path in row.parameters}
    assert named == ({"down", "up"} if kind == "lora" else {"weights"})


def test_leaves_are_what_is_trained():
    params = parameters()
    assert sum(x.size for x in jax.tree.leaves(last_token())) == 2 * 32 * 4
    low_rank = lora(params)
    assert set(low_rank.down) == {"attn_q", "attn_v"}
    scaled = jax.tree.map(lambda x: 0 * x, moved(last_token()))
    assert scaled == dataclasses.replace(scaled, weights=scaled.weights)
    assert (scaled.scale, scaled.base.name) == (10.0, "tiny")


def test_wrong_adapters_are_refused():
    params = parameters()
    with pytest.raises(ValueError, match=r"got 'conv', which selects none"):
        adapters.lora(params, 3, "conv", KEY)
    with pytest.raises(ValueError, match=r"expected a rank in \[1, 16\], got 17"):
        adapters.lora(params, 17, "attn_v", KEY)
    with pytest.raises(
        ValueError, match=r"last_token: expected a rank in \[1, 32\], got 0"
    ):
        adapters.last_token(CONFIG, 0, 1, KEY)
    with pytest.raises(ValueError, match=r"top layers in \[1, 3\], got 4"):
        adapters.last_token(CONFIG, 1, 4, KEY)
    with pytest.raises(ValueError, match=r"cached_prefix: expected .* got 0"):
        adapters.cached_prefix(CONFIG, params, TOKENS, layers=0)
    with pytest.raises(
        ValueError, match="whose changes are matrices, got LastTokenAdapter"
    ):
        adapters.merge(params, last_token())
    prefix = cached_prefix(CONFIG, params, TOKENS, layers=1)
    for adapter, num_layers in ((last_token(), 2), (lora(params), 0), (None, 0)):
        with pytest.raises(
            ValueError, match=f"1 top layers.* got one of {num_layers} layers"
        ):
            lm.forward(CONFIG, params, TOKENS, adapter=adapter, prefix=prefix)
    deep = adapters.LastTokenAdapter(jnp.zeros((4, 32, 2)), 0)
    with pytest.raises(ValueError, match="at most 3 layers, got one of 4"):
        lm.forward(CONFIG, params, TOKENS, adapter=deep)


def test_directions_never_change():
    """Files hold the seed alone."""
    rows = adapters.LastTokenAdapter(jnp.zeros((1, 3, 2)), seed=7).directions()[0]
    expected = STORED
    np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-4)


STORED = [[9.0604, 0.1759, -4.2282], [-1.9443, 9.0474, -3.7899]]


class TestFiles:
    """They hold the same bits, and nothing foreign."""

    @pytest.fixture(autouse=True)
    def package(self):
        pytest.importorskip("safetensors")

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
    @pytest.mark.parametrize("kind", ADAPTERS)
    def test_saved_is_loaded(self, kind, dtype, tmp_path):
        path = tmp_path / "adapter.safetensors"
        adapter = moved(lora(parameters()) if kind == "lora" else last_token())
        adapter = jax.tree.map(lambda x: x.astype(dtype), adapter)
        adapters.save(path, adapter)
        loaded = adapters.load(path, config=CONFIG)
        assert jax.tree.structure(loaded) == jax.tree.structure(adapter)
        for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(adapter), strict=True):
            assert x.dtype == y.dtype
            assert x.tobytes() == y.tobytes()
        assert [file.name for file in tmp_path.iterdir()] == [path.name]

    def test_metadata_says_what_it_is(self, tmp_path):
        path = tmp_path / "adapter.safetensors"
        adapters.save(path, last_token())
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]
        assert metadata == {
            "format": "forwax adapter 1",
            "kind": "last-token",
            "rank": "4",
            "scale": "10.0",
            "place": "the last token behind the top 2 layers",
            "seed": str(last_token().seed),
            "base": "tiny",
            "base_sha256": "0123456789abcdef",
        }
        # A and the header, no U.
        assert len(content) < 2 * 32 * 4 * 4 + 600

    def test_truncated_and_foreign_files_are_refused(self, tmp_path):
        import safetensors.numpy

        path = tmp_path / "adapter.safetensors"
        adapters.save(path, lora(parameters()))
        whole = path.read_bytes()
        for size in (0, 5, 100, len(whole) - 4):
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match="is foreign or truncated"):
                adapters.load(path)
        path.write_bytes(safetensors.numpy.save({"x": np.ones(2)}))
        with pytest.raises(ValueError, match="It was not written by"):
            adapters.load(path)
        with pytest.raises(FileNotFoundError, match="found no file"):
            adapters.load(tmp_path / "none")

    @pytest.mark.parametrize(
        "change",
        [
            {"kind": "prompt"},
            {"rank": "2"},
            {"rank": "many"},
            {"place": "attn_q"},
            {"place": "attn_q attn_v conv"},
        ],
    )
    def test_what_does_not_fit_together_is_refused(self, change, tmp_path):
        import safetensors
        import safetensors.numpy

        path = tmp_path / "adapter.safetensors"
        adapters.save(path, lora(parameters()))
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = {**file.metadata(), **change}
        arrays = safetensors.numpy.load_file(path)
        path.write_bytes(safetensors.numpy.save(arrays, metadata))
        with pytest.raises(ValueError, match=r"but .*adapter\.safetensors is damaged"):
            adapters.load(path)

    def test_another_base_is_refused(self, tmp_path):
        path = tmp_path / "adapter.safetensors"
        adapters.save(path, last_token())
        other = dataclasses.replace(CONFIG, name="other", sha256="f" * 64)
        with pytest.raises(
            ValueError, match="made for tiny, sha256 0123456789ab…, expected other"
        ):
            adapters.load(path, config=other)
        assert adapters.load(path).seed == last_token().seed

    def test_only_adapters_are_saved(self, tmp_path):
        with pytest.raises(TypeError, match=r"adapters\.last_token, got dict"):
            adapters.save(tmp_path / "adapter.safetensors", {})
