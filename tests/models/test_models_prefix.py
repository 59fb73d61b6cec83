"""A prefix in float: the logits of the same tokens read as text, in every form; how it is chosen; what is refused."""

from collections import Counter
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from slow import slow_but
from tiny_llama import GROUPED, Letters, compiled, looking_back, random_ids, random_params
from untyped import untyped

import sqjax as sq
from sqjax.models import (
    CacheFormat,
    Encoder,
    EncoderConfig,
    Model,
    generate,
    greedy,
    load_prefix,
    loglikelihoods,
    perplexity,
    save_prefix,
    stack_layers,
    token_peaks,
)
from sqjax.models import prefix as make_prefix
from sqjax.models.config import LayerKind
from sqjax.models.rope import Dynamic, LongRope, Rope

IDS = (7, 5, 9)
TEXT = random_ids(2, 12)
BATCHES = [TEXT, random_ids(2, 12, 2)]
ONE = {"num_layers": 1}
KINDS = {
    "plain": ONE,
    # The token at position 8 looks at none of the three.
    "window": {"kinds": looking_back(6), **ONE},
    "alibi": {"kinds": (LayerKind(rope=None),), "alibi": 1.0, **ONE},
    "learned positions": {"kinds": (LayerKind(rope=None),), "learned_positions": True, **ONE},
    "soft cap": {"attention_softcap": 2.0, **ONE},
    # The last, which runs with all tests.
    "two kinds": {"kinds": (LayerKind(4), LayerKind())},
}
each_kind = pytest.mark.parametrize("name", slow_but(list(KINDS), "plain", "alibi"))


@cache
def made(name):
    """(model, params, prefix, the logits of the text after the same tokens, read as text)."""
    model = Model(replace(GROUPED, **KINDS[name]))
    params = random_params(model)
    prefix = make_prefix(model, params, ids=IDS)
    whole = jax.jit(model.apply)(params, prefix.before(TEXT))
    return model, params, prefix, whole[:, len(IDS) :]


def close(got, expected, tolerance=1e-5):
    """Whether logits are alike, relative to the largest; and not those of something else."""
    assert got.shape == expected.shape
    largest = np.abs(expected).max()
    np.testing.assert_allclose(got / largest, expected / largest, atol=tolerance, rtol=0)


@each_kind
def test_text_after_a_prefix_is_that_after_the_same_tokens(name):
    model, params, prefix, expected = made(name)
    close(jax.jit(prefix.apply)(params, TEXT), expected)
    without = jax.jit(model.apply)(params, TEXT)
    assert np.abs(without - expected).max() > 0.1 * np.abs(expected).max()


@each_kind
def test_a_stack_of_layers_gives_the_same(name):
    _, params, prefix, expected = made(name)
    close(jax.jit(prefix.apply)(stack_layers(params), TEXT), expected)


CACHES = {
    "float": CacheFormat(),
    "int8 channels": CacheFormat("int8", keys="channels"),
    "int8 plain": CacheFormat("int8", keys="plain"),
    "e4m3": CacheFormat("e4m3"),
    "int4": CacheFormat("int4", group=4, zero_point=True),
    "int8": CacheFormat("int8"),
}


def off(got, expected):
    """The root mean square of how far logits are off, relative to the largest."""
    return float(np.sqrt(np.mean((got - expected) ** 2)) / np.abs(expected).max())


@pytest.mark.parametrize("name", slow_but(["plain", "alibi", "soft cap", "two kinds"]))
@pytest.mark.parametrize("kind", slow_but(list(CACHES)))
def test_a_cache_of_any_kind_goes_on_after_a_prefix(name, kind):
    """It is off no more than the same cache that holds the prefix's tokens as codes, too."""
    model, params, prefix, expected = made(name)
    read = jax.jit(model.read)
    held, logits = model.init_cache(2, 12, kind=CACHES[kind], chunk=4), []
    for piece in jnp.split(TEXT, [4, 8], axis=1):
        new, held = read(params, piece, held, prefix.cache)
        logits.append(new)
    got = jnp.concatenate(logits, axis=1)
    whole = prefix.before(TEXT)
    as_codes, _ = read(params, whole, model.init_cache(2, 15, kind=CACHES[kind], chunk=15))
    allowed = 1e-6 + 1.5 * off(as_codes[:, len(IDS) :], expected)
    assert off(got, expected) < allowed < 0.06


@pytest.mark.parametrize("name", slow_but(["plain", "alibi", "window"]))
def test_padding_stands_between_a_prefix_and_its_row(name):
    model, params, prefix, expected = made(name)
    padded = jnp.pad(TEXT, ((0, 0), (5, 0)))
    empty = model.init_cache(2, 17, chunk=17)._replace(padding=jnp.array([5, 5]))
    logits, _ = jax.jit(model.read)(params, padded, empty, prefix.cache)
    close(logits[:, 5:], expected)


@pytest.mark.parametrize("name", slow_but(["window", "alibi", "plain"]))
def test_generate_goes_on_as_after_the_same_tokens(name):
    model, params, prefix, _ = made(name)
    prompts = [[3, 14, 15, 9, 26], [8], [9, 7, 9]]
    got = generate(model, params, prompts, 6, prefix=prefix, chunk=2)
    expected = generate(model, params, [[*IDS, *prompt] for prompt in prompts], 6)
    assert got.tokens == expected.tokens
    # The prefix is the caller's: no call gives its memory away.
    again = generate(model, params, prompts, 6, prefix=prefix, chunk=2)
    assert again.tokens == got.tokens


def test_greedy_goes_on_as_after_the_same_tokens():
    model, params, prefix, _ = made("two kinds")
    got = greedy(model, params, TEXT, 5, prefix=prefix)
    np.testing.assert_array_equal(got, greedy(model, params, prefix.before(TEXT), 5))
    assert np.any(got != greedy(model, params, TEXT, 5))


def test_likelihoods_are_those_after_the_same_tokens():
    """The last context is cut to what 64 positions leave: 3 of the prefix, 61 inputs, one target."""
    model, params, prefix, _ = made("plain")
    pairs = [([1, 2], [3, 4]), ([5], [6]), (list(range(60)), [7, 8, 9])]
    whole = [([*IDS, *context[-59:]], asked) for context, asked in pairs]
    expected = np.array([one.logprob for one in loglikelihoods(model, params, whole)])
    for kind in (None, "float"):
        got = loglikelihoods(model, params, pairs, prefix=prefix, cache=kind)
        np.testing.assert_allclose([one.logprob for one in got], expected, 1e-4)
    without = [one.logprob for one in loglikelihoods(model, params, pairs)]
    assert np.all(np.abs(without - expected) > 0.01 * np.abs(expected))


def test_perplexity_counts_the_text_alone():
    model, params, prefix, logits = made("plain")
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits)[:, :-1], TEXT[:, 1:, None], axis=-1)
    expected = np.exp(-np.mean(chosen))
    for how in ({}, {"cache": "float", "chunk": 3}):
        got = perplexity(model, params, TEXT, prefix=prefix, **how)
        np.testing.assert_allclose(got, expected, 1e-4)


@cache
def calibrated():
    """Statistics of the text after the prefix, by mask."""
    model, params, prefix, _ = made("plain")
    batches = [prefix.before(ids) for ids in BATCHES]
    return sq.calibrate(model.apply, params, batches, mask=prefix.mask)


@pytest.mark.slow
def test_calibration_sees_the_text_alone():
    """By mask all scales can be folded; by `prefix.apply` those of values can not."""
    model, params, prefix, _ = made("plain")
    masked = calibrated()
    cached = sq.calibrate(prefix.apply, params, BATCHES)
    plain = sq.calibrate(model.apply, params, [prefix.before(ids) for ids in BATCHES])
    assert masked.absmax.keys() == cached.absmax.keys()
    differing = 0
    for site, absmax in cached.absmax.items():
        assert int(masked.count[site]) == int(cached.count[site]) == 48
        np.testing.assert_allclose(masked.absmax[site], absmax, 1e-4, 1e-4)
        differing += not np.allclose(plain.absmax[site], absmax, 1e-3)
    assert differing > 5
    folded_into = {site for group in masked.graph.groups for site, _ in group.sites}
    assert any("o_proj" in site for site in folded_into)
    left = {site for group in cached.graph.groups for site, _ in group.sites}
    assert left == {site for site in folded_into if "o_proj" not in site}


def test_a_folded_tree_has_a_prefix_of_its_own():
    _, params, prefix, expected = made("plain")
    stats = calibrated()
    folded = sq.fold(params, stats.graph, sq.scales(params, stats, 0.5))
    close(jax.jit(prefix.of(folded).apply)(folded, TEXT), expected)
    assert (
        np.abs(jax.jit(prefix.apply)(folded, TEXT) - expected).max() > 0.01 * np.abs(expected).max()
    )
    assert prefix.of(folded).ids == IDS


@pytest.mark.slow
def test_a_quantized_model_runs_on_integers_after_a_prefix():
    model, params, prefix, expected = made("plain")
    qparams = sq.quantize(params, calibrated(), sq.W8A8_O3)
    run = sq.quantized(prefix.apply)
    close(jax.jit(run)(qparams, TEXT), expected, 0.2)
    kinds = Counter(dot.dtypes for dot in jaxprs.dots(jaxprs.of(run, qparams, TEXT)))
    without = sq.quantized(model.apply)
    plain = Counter(dot.dtypes for dot in jaxprs.dots(jaxprs.of(without, qparams, TEXT)))
    assert kinds[jaxprs.INT8_DOT] == plain[jaxprs.INT8_DOT] >= 7
    # Two float products a layer more: the scores of the prefix, and its values.
    assert kinds.total() - plain.total() == 2 * model.config.num_layers
    assert perplexity(model, qparams, TEXT, prefix=prefix, cache="int8") > 1
    assert len(generate(model, qparams, [[3], [4, 5]], 3, prefix=prefix).tokens) == 2


def test_a_prefix_longer_than_a_window_leaves_what_the_window_reaches():
    model = Model(replace(GROUPED, kinds=looking_back(2), num_layers=1))
    params = random_params(model)
    prefix = make_prefix(model, params, ids=(1, 2, 3, 4, 5))
    expected = jax.jit(model.apply)(params, prefix.before(TEXT))[:, 5:]
    held, logits = model.init_cache(2, 12, chunk=4), []
    for piece in jnp.split(TEXT, 3, axis=1):
        new, held = compiled(model.config, "read")(params, piece, held, prefix.cache)
        logits.append(new)
    close(jnp.concatenate(logits, axis=1), expected)


def test_a_theta_that_grows_is_that_of_a_cache_which_read_the_prefix_first():
    rope = Rope(scaling=Dynamic(4.0, 8))
    model = Model(replace(GROUPED, kinds=(LayerKind(None, rope),), num_layers=1))
    params = random_params(model)
    prefix = make_prefix(model, params, ids=IDS)
    read = compiled(model.config, "read")
    own = jnp.broadcast_to(jnp.asarray(IDS)[None], (2, 3))
    _, held = read(params, own, model.init_cache(2, 15))
    expected, _ = read(params, TEXT, held)
    close(jax.jit(prefix.apply)(params, TEXT), expected)
    at_once = jax.jit(model.apply)(params, prefix.before(TEXT))[:, 3:]
    assert np.abs(at_once - expected).max() > 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("softcap", slow_but([None, 2.0], 2.0))
def test_rotated_keys_with_large_means_weigh_a_prefix_rightly(softcap):
    """Scores of codes lack q . m, with m the keys' mean; those of the prefix, which are whole, do not."""
    model = Model(replace(GROUPED, attention_softcap=softcap, attention_bias=True, num_layers=1))
    params = random_params(model)
    for layer in params["model"]["layers"].values():
        layer["self_attn"]["k_proj"]["bias"] *= 20
    prefix = make_prefix(model, params, ids=IDS)
    expected = jax.jit(model.apply)(params, prefix.before(TEXT))[:, 3:]
    read = compiled(model.config, "read")
    got, _ = read(params, TEXT, model.init_cache(2, 12, kind="int8"), prefix.cache)
    whole = model.init_cache(2, 15, kind="int8")
    as_codes, _ = read(params, prefix.before(TEXT), whole)
    assert off(got, expected) < 1.5 * off(as_codes[:, 3:], expected) < 0.1


def test_several_prefixes_and_paddings_may_be_mapped_over():
    model, params, prefix, expected = made("plain")
    other = make_prefix(model, params, ids=(1, 2, 3))
    both = jax.tree.map(lambda *parts: jnp.stack(parts), prefix.cache, other.cache)
    got = jax.jit(jax.vmap(lambda held: model.apply(params, TEXT, held)))(both)
    close(got[0], expected)
    assert np.abs(got[1] - expected).max() > 0.01 * np.abs(expected).max()

    # Checks of lengths look at no number that is mapped over.
    empty = model.init_cache(1, 12)
    shapes = jax.eval_shape(
        jax.vmap(
            lambda padding: model.decode(
                params, TEXT[:1], empty._replace(padding=padding[None]), prefix.cache
            )[0]
        ),
        jnp.arange(2),
    )
    assert shapes.shape == (2, 1, GROUPED.vocab_size)


def test_what_a_gradient_keeps_makes_no_other_model():
    model, params, prefix, _ = made("plain")
    lean = replace(model, remat=True)
    got, expected = (perplexity(one, params, TEXT, prefix=prefix) for one in (lean, model))
    assert got == expected


def test_a_program_without_a_prefix_has_nothing_of_one():
    model, params, prefix, _ = made("plain")
    one = jax.make_jaxpr(model.apply)(params, TEXT[:, :1])
    many = str(jax.make_jaxpr(prefix.apply)(params, TEXT[:, :1]))
    # Two products of attention and seven projections a layer, and the head.
    assert str(one).count("dot_general[") == 9 * model.config.num_layers + 1
    assert many.count("dot_general[") == 11 * model.config.num_layers + 1


def test_a_file_gives_a_prefix_back_to_its_model(tmp_path):
    model, params, prefix, expected = made("plain")
    file = tmp_path / "prefix.safetensors"
    save_prefix(file, prefix)
    again = load_prefix(file, model)
    assert again.ids == IDS
    assert jax.tree.structure(again) == jax.tree.structure(prefix)
    for got, written in zip(jax.tree.leaves(again), jax.tree.leaves(prefix), strict=True):
        np.testing.assert_array_equal(got, written)
    close(jax.jit(again.apply)(params, TEXT), expected)
    for other, message in (
        (replace(model.config, max_length=32), "max_length = 64, not 32"),
        (
            replace(model.config, attention_softcap=2.0),
            r"attention_softcap = the default, not 2\.0",
        ),
    ):
        with pytest.raises(ValueError, match=f"got one of another, with {message}; make"):
            load_prefix(file, Model(other))
    with untyped(), pytest.raises(ValueError, match=r"what sqjax\.models\.prefix returns"):
        save_prefix(file, prefix.cache)
    sq.save(tmp_path / "other.safetensors", {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="expected what save_prefix wrote"):
        load_prefix(tmp_path / "other.safetensors", model)


def test_a_prefix_may_be_an_argument_of_a_compiled_function():
    _, params, prefix, expected = made("plain")
    run = jax.jit(lambda prefix, params: prefix.apply(params, TEXT))
    close(run(prefix, params), expected)
    assert jax.tree.structure(prefix) == jax.tree.structure(prefix.of(params))


# The choice ---------------------------------------------------------------------------------------


@cache
def massive():
    """A model whose tokens 11 and 12 have one channel that stands out wherever they are, and 13 less so."""
    model = Model(replace(GROUPED, tie_embeddings=False))
    params = random_params(model)
    rows = params["model"]["embed_tokens"]["embedding"]
    rows = rows.at[11, 3].set(9000).at[12, 5].set(-9000).at[13, 2].set(80)
    params["model"]["embed_tokens"]["embedding"] = rows
    return model, params


def test_peaks_are_what_blocks_give_over_the_median():
    model, params = massive()
    text = jnp.asarray([[1, 11, 2, 3], [4, 5, 6, 8]])
    peaks = np.asarray(token_peaks(model, params, text))
    assert set(zip(*np.where(peaks > 64), strict=True)) == {(0, 1)}
    assert np.median(peaks) < 5
    stacked = token_peaks(model, stack_layers(params), text)
    np.testing.assert_allclose(stacked, peaks, 1e-5)


def test_the_tokens_that_stand_out_most_often_are_chosen():
    model, params = massive()
    texts = jnp.asarray([[1, 12, 2, 11, 3, 11], [4, 11, 6, 8, 13, 2], [12, 5, 4, 1, 2, 3]])
    # 5 in 3 texts: two tokens; 11 opens, as there is no tokenizer, and 12 is the next.
    assert make_prefix(model, params, [texts]).ids == (12, 11)
    assert make_prefix(model, params, [texts, (texts,)]).ids == (12, 11)
    assert make_prefix(model, params, [texts], most=1).ids == (11,)
    named = replace(model, tokenizer=Letters(None, eos_id=20))
    assert make_prefix(named, params, [texts]).ids == (11, 20)
    named = replace(model, tokenizer=Letters(None, eos_id=20, bos_id=21))
    assert make_prefix(named, params, [texts]).ids == (11, 21)


def test_after_the_prefix_others_are_measured_against_each_other():
    model, params = massive()
    prefix = make_prefix(model, params, ids=[11])
    text = random_ids(2, 5)
    assert token_peaks(model, params, text, prefix).shape == (2, 5)
    whole = token_peaks(model, params, prefix.before(text))
    assert whole.max() > 64 > token_peaks(model, params, text, prefix).max()


# Refusals -----------------------------------------------------------------------------------------


def test_what_makes_no_prefix_is_refused():
    model, params, *_ = made("plain")
    for ids, message in {
        (): "at least one token",
        (61,): "from 0 to 60",
        (-1,): "from 0 to 60",
        (1.5,): "expected integer token ids",
        ((1, 2),): "flat sequence",
        (1,) * 64: "less than 64",
    }.items():
        with untyped(), pytest.raises(ValueError, match=message):
            make_prefix(model, params, ids=ids)
    with pytest.raises(ValueError, match="expected batches of token ids"):
        make_prefix(model, params)
    with pytest.raises(ValueError, match="this model needs no prefix"):
        make_prefix(model, params, [TEXT], ratio=1e6)
    with untyped(), pytest.raises(ValueError, match="most"):
        make_prefix(model, params, [TEXT], most=0)
    with pytest.raises(ValueError, match="ratio"):
        make_prefix(model, params, [TEXT], ratio=0.0)
    with pytest.raises(ValueError, match="NaN or infinite"):
        make_prefix(model, jax.tree.map(lambda x: x * jnp.nan, params), [TEXT])
    with pytest.raises(ValueError, match=r"parameter \S+: .* values are NaN or infinite"):
        make_prefix(model, jax.tree.map(lambda x: x * jnp.nan, params), ids=[1])
    encoder = Encoder(EncoderConfig(64, 32, 48, 2, 4))
    with untyped(), pytest.raises(ValueError, match=r"expected a sqjax\.models\.Model"):
        make_prefix(encoder, params, ids=[1])
    qparams = sq.quantize(params, calibrated(), sq.W8A8)
    with pytest.raises(ValueError, match=r"prefix: model/.*: expected a float array"):
        make_prefix(model, qparams, ids=[1])
    with pytest.raises(ValueError, match=r"parameters that .*quantize was given"):
        token_peaks(model, qparams, TEXT)
    long = LongRope((1.0,) * 4, (2.0,) * 4, 16, 1.0)
    changing = Model(replace(GROUPED, kinds=(LayerKind(None, Rope(scaling=long)),)))
    with pytest.raises(ValueError, match="LongRope"):
        make_prefix(changing, params, ids=[1])


def test_a_prefix_where_it_does_not_fit_is_refused():
    model, params, prefix, _ = made("plain")
    other = Model(replace(model.config, max_length=32))
    for call, inputs in ((generate, ([[1, 2]], 2)), (perplexity, (TEXT,))):
        with pytest.raises(ValueError, match="expected a prefix of this model"):
            call(other, params, *inputs, prefix=prefix)
        with untyped(), pytest.raises(ValueError, match=r"what sqjax\.models\.prefix returns"):
            call(model, params, *inputs, prefix=prefix.cache)
    with pytest.raises(ValueError, match=r"at most 64 .* got 65"):
        prefix.apply(params, random_ids(1, 62))
    jax.eval_shape(prefix.apply, params, random_ids(1, 61))
    with pytest.raises(ValueError, match=r"at most 64 .*, got 62 \+ 3"):
        generate(model, params, [[1] * 59], 3, prefix=prefix)
    with pytest.raises(ValueError, match=r"at most 64 .* got 65"):
        model.decode(params, random_ids(1, 62), model.init_cache(1, 62), prefix.cache)
    deeper = Model(GROUPED)
    with pytest.raises(ValueError, match="a prefix belongs to one model"):
        deeper.apply(random_params(deeper), TEXT, prefix.cache)
    with untyped(), pytest.raises(ValueError, match="the `cache` of what"):
        model.apply(params, TEXT, prefix)
