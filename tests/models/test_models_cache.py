"""The cache's formats against arithmetic in float64; attention over codes; rings; what a token takes."""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxprs import dots
from slow import slow_but
from tiny_llama import GROUPED, compiled, looking_back, random_ids, random_params

from sqjax.models import CacheFormat, Model
from sqjax.models import attention as attention_module
from sqjax.models.attention import Scoring, attend, visible
from sqjax.models.cache import empty_cache, write
from sqjax.models.slots import (
    CACHE_FORMATS,
    Slots,
    cache_format,
    decoded,
    encode,
    integers,
    rotation,
)
from sqjax.numerics.digits import two_digits

WIDE = replace(GROUPED, head_dim=32, hidden_size=48)
ONE_LAYER = replace(WIDE, num_layers=1)
KINDS = {
    **CACHE_FORMATS,
    "int8 by group": CacheFormat("int8", group=8),
    "int8 plain keys": CacheFormat("int8", keys="plain"),
    "int8 key channels": CacheFormat("int8", keys="channels"),
    "int4 symmetric": CacheFormat("int4", group=16),
    "int4 key channels": CacheFormat("int4", group=8, zero_point=True, keys="channels"),
    "e4m3 rotated": CacheFormat("e4m3", keys="rotated"),
}
QUICK = ("float", "int8", "int4")
each_format = pytest.mark.parametrize("name", slow_but(list(KINDS), *QUICK))
each_coded_format = pytest.mark.parametrize(
    "name", slow_but([name for name in KINDS if name != "float"], *QUICK[1:])
)


def scoring(queries, softcap=None):
    """The usual scores: q k^T / sqrt(head_dim)."""
    return Scoring(queries.shape[-1] ** -0.5, softcap)


def random_vectors(shape, seed=0):
    """Normal, with a few large channels, as keys have them."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(
        rng.normal(size=shape) * np.where(np.arange(shape[-1]) % 7 == 3, 8, 1), jnp.float32
    )


def positions(first, tokens):
    """(batch, tokens), of rows whose next token is the first-th; negative for padding."""
    return jnp.asarray(first, jnp.int32)[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None]


#: Slots of `through`: three without a token, 21 with one, two without. Row 0 begins with 3 tokens of padding, row 1
#: with 6, so its first three written tokens are padding.
BEFORE, TOKENS, AFTER = 3, 21, 2
PADDING = jnp.asarray([3, 6], jnp.int32)
SOFTCAP = 2.0
#: (tokens, query heads) of the queries that read them.
QUERIES = {"a step": (1, 6), "a step, one query a head": (1, 2), "a prefill": (5, 6)}


def plain_attention(queries, keys, values, mask, softcap=None):
    """In float64, without blocks, groups or shifts."""
    q, k, v = (np.asarray(x, np.float64) for x in (queries, keys, values))
    k, v = (np.repeat(x, q.shape[2] // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("bthd,bhsd->bhts", q, k) / np.sqrt(q.shape[-1])
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    weights = np.where(np.asarray(mask)[:, None], np.exp(scores), 0)
    return np.einsum("bhts,bhsd->bthd", weights / weights.sum(-1, keepdims=True), v)


class Through(NamedTuple):
    """What one format makes of vectors: encoded, written into a cache, read by attention."""

    vectors: Any
    encoded: Any
    of_encoded: Any
    keys: Any
    values: Any
    of_keys: Any
    of_values: Any
    reads: dict


@functools.cache
def through(name):
    """One compiled program for each format; the tests below look at its parts."""
    kind = KINDS[name]
    vectors = [random_vectors((2, 2, TOKENS, 32), seed) for seed in (0, 1)]
    rng = np.random.default_rng(4)
    queries = {
        case: jnp.asarray(rng.normal(size=(2, tokens, heads, 32)), jnp.float32)
        for case, (tokens, heads) in QUERIES.items()
    }
    slots = BEFORE + TOKENS + AFTER

    @jax.jit
    def program(vectors, queries):
        cache = empty_cache(2, 2, [slots], (32, 32), jnp.float32, kind)
        in_row = positions(BEFORE - PADDING, TOKENS)
        keys, values = (
            write(old, new, jnp.int32(BEFORE), in_row, ring=False)
            for old, new in zip((cache.keys[0], cache.values[0]), vectors, strict=True)
        )
        reads = {}
        for case, q in queries.items():
            tokens = q.shape[1]
            before = jnp.int32(BEFORE + TOKENS - tokens)
            mask = visible(before, tokens, slots, PADDING, None)
            read = mask, attend(q, keys, values, mask, True, scoring(q))
            capped = attend(q, keys, values, mask, True, scoring(q, SOFTCAP))
            reads[case] = *read, capped
        encoded = encode(vectors[0], kind)
        return encoded, decoded(encoded), keys, values, decoded(keys), decoded(values), reads

    found = Through(vectors[0], *program(vectors, queries))
    reads = {case: (queries[case], *read) for case, read in found.reads.items()}
    return found._replace(reads=reads)


@each_coded_format
@pytest.mark.slow
def test_encoding_is_off_by_at_most_half_a_step(name):
    kind, found = KINDS[name], through(name)
    x = np.asarray(found.vectors)
    error = np.abs(np.asarray(found.of_encoded, np.float64) - np.asarray(x, np.float64))
    scale = np.repeat(np.asarray(found.encoded.scale, np.float64), kind.group or 32, axis=-1)
    bound = np.maximum(np.abs(x) * 2.0**-4, scale * 2.0**-10) if kind.codes == "e4m3" else scale / 2
    # A zero point is rounded too, and so may lose half a step at an end of the range.
    assert (error <= (1 + kind.zero_point) * bound + 1e-5 * np.abs(x)).all()
    assert (error > 0).any()


@each_coded_format
@pytest.mark.slow
def test_written_slots_hold_the_vectors_and_leave_the_others(name):
    found, written = through(name), slice(BEFORE, BEFORE + TOKENS)
    for array in found.keys.token_arrays():
        array = np.asarray(array, np.float32)
        assert not array[:, :, :BEFORE].any()
        assert not array[:, :, written.stop :].any()
    got, x = np.asarray(found.of_keys)[:, :, written], np.asarray(found.vectors)
    if KINDS[name].keys == "plain":
        np.testing.assert_array_equal(got, found.of_encoded)
    real = np.asarray(positions(BEFORE - PADDING, TOKENS))[:, None, :, None] >= 0
    assert 0 < np.abs(got - x).max(where=real, initial=0) < 0.12 * np.abs(x).max()


@each_format
def test_attention_over_codes_is_attention_over_what_they_stand_for(name):
    """Only the queries' and the weights' two digits are rounded: 1 in 508 * 127 of the largest."""
    found = through(name)
    keys, values = np.asarray(found.of_keys), np.asarray(found.of_values)
    assert found.reads.keys() == QUERIES.keys()
    for queries, mask, got, got_capped in found.reads.values():
        expected = plain_attention(queries, keys, values, mask)
        expected_capped = plain_attention(queries, keys, values, mask, SOFTCAP)
        largest_score = 32 * np.abs(queries).max() * np.abs(keys).max() / 32**0.5
        tolerance = 4 * (1 + largest_score) / (508 * 127)
        if KINDS[name].codes in ("float", "e4m3"):
            tolerance = 2e-6
        off = {"rtol": 0, "atol": tolerance * np.abs(values).max()}
        np.testing.assert_allclose(got, expected, **off)
        # A soft cap sees what a softmax does not: a number that all scores of a row have more.
        np.testing.assert_allclose(got_capped, expected_capped, **off)


jitted_write = jax.jit(write, static_argnums=4)
jitted_decoded = jax.jit(decoded)


@pytest.mark.slow
def test_scales_of_channels_are_those_of_the_first_real_tokens():
    x, kind = random_vectors((2, 1, 4, 32)), KINDS["int8 key channels"]
    slots = empty_cache(2, 1, [12], (32, 32), jnp.float32, kind).keys[0]
    slots = jitted_write(slots, x, jnp.int32(0), positions([-1, -4], 4), False)
    np.testing.assert_array_equal(slots.channel[0], np.abs(x[0, :, 1:]).max(1))
    np.testing.assert_array_equal(slots.channel[1], 0)  # only padding so far
    later = jitted_write(slots, 10 * x, jnp.int32(4), positions([3, 0], 4), False)
    np.testing.assert_array_equal(later.channel[0], slots.channel[0])
    np.testing.assert_array_equal(later.channel[1], 10 * np.abs(x[1]).max(1))
    # A token that is larger than the first ones is not clipped.
    error = np.abs(jitted_decoded(later)[:, :, 4:8] - 10 * x)
    steps = later.scale[:, :, 4:8] * jnp.maximum(later.channel, 1e-9)[:, :, None]
    assert (error <= 0.51 * steps).all()


@pytest.mark.slow
def test_a_rotation_hides_one_large_channel_and_the_mean():
    """What is common to all tokens is not encoded at all, and one channel's 100 does not coarsen the others."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 1, 50, 32)) + 40 * rng.normal(size=32), jnp.float32)
    error = {}
    for keys in ("plain", "rotated"):
        slots = empty_cache(1, 1, [50], (32, 32), jnp.float32, CacheFormat("int4", keys=keys)).keys[
            0
        ]
        after = jitted_write(slots, x, jnp.int32(0), positions([0], 50), False)
        error[keys] = np.abs(jitted_decoded(after) - x).mean()
    assert error["rotated"] < 0.05 * error["plain"]
    matrix = np.asarray(rotation(24), np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(24), atol=1e-6)


@pytest.mark.parametrize("keys", ["rotated", "channels"])
def test_a_channel_of_zeros_at_first_takes_nothing_from_later_tokens(keys):
    """Else keys that are stored already would be read with another mean."""
    x, far = jnp.zeros((1, 1, 2, 32)), jnp.full((1, 1, 2, 32), 40.0)
    slots = empty_cache(1, 1, [4], (32, 32), jnp.float32, CacheFormat("int8", keys=keys)).keys[0]
    first = jitted_write(slots, x, jnp.int32(0), positions([0], 2), False)
    after = jitted_write(first, far, jnp.int32(2), positions([2], 2), False)
    expected = np.concatenate([x, far], axis=2)
    np.testing.assert_allclose(jitted_decoded(after), expected, atol=1.0)


@pytest.mark.parametrize("block", [pytest.param(1, marks=pytest.mark.slow), 3, 4, 100])
def test_blocks_of_queries_change_nothing(block, monkeypatch):
    q, k, v = (
        random_vectors((2, *shape, 8), i) for i, shape in enumerate([(9, 4), (2, 12), (2, 12)])
    )
    mask = visible(jnp.int32(3), 9, 12, jnp.zeros((1,), jnp.int32), None)
    monkeypatch.setattr(attention_module, "BLOCK", block)
    got = jax.jit(lambda q, k, v: attend(q, Slots(k), Slots(v), mask, True, scoring(q)))(q, k, v)
    np.testing.assert_allclose(got, plain_attention(q, k, v, mask), rtol=0, atol=2e-5)


def test_no_block_computes_the_triangle_it_may_not_see(monkeypatch):
    monkeypatch.setattr(attention_module, "BLOCK", 2)
    q, k = random_vectors((1, 6, 2, 8)), random_vectors((1, 2, 6, 8))
    mask = visible(jnp.int32(0), 6, 6, jnp.zeros((1,), jnp.int32), None)
    jaxpr = jax.make_jaxpr(lambda q, k: attend(q, Slots(k), Slots(k), mask, True, scoring(q)))(q, k)
    assert [dot.shapes[1][2] for dot in dots(jaxpr)] == [2, 2, 4, 4, 6, 6]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=6, max_size=6))
def test_two_digits_are_off_by_a_508th_of_a_step(row):
    x = jnp.asarray([row], jnp.float32)
    digits, scale = jax.jit(two_digits)(x)
    high, low = np.split(np.asarray(digits, np.float64), 2)
    assert np.abs(digits.astype(jnp.int32)).max() <= 127
    step = float(scale[0, 0])
    assert (
        np.abs((high + low / 254) * step - np.asarray(x, np.float64)).max()
        <= step / 508 + 4e-7 * np.abs(x).max()
    )


@pytest.mark.slow
def test_int8_slots_are_never_copied_to_float():
    """In the program that is written, and in the one that is compiled."""
    model = Model(replace(WIDE, max_length=512))
    params, cache = random_params(model), model.init_cache(2, 500, kind="int8")
    step = jax.jit(model.decode)
    ids = jnp.zeros((2, 1), jnp.int32)
    with_codes = [
        dot
        for dot in dots(jax.make_jaxpr(model.decode)(params, ids, cache))
        if 500 in sum(dot.shapes, ())
    ]
    assert len(with_codes) == 4
    assert all(dot.dtypes == ("int8", "int8", "int32") for dot in with_codes)
    compiled = step.lower(params, ids, cache).compile().as_text()
    assert "s8[2,2,500,32]" in compiled
    assert "f32[2,2,500,32]" not in compiled
    assert "f32[2,2,500,1,32]" not in compiled


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("float", 4 * 32),
        ("int8", 32 + 4),
        ("e4m3", 32 + 4),
        ("int4", 16 + 2 * (2 + 1)),
        ("int8 by group", 32 + 4 * 4),
    ],
)
def test_bytes_of_a_token_are_those_of_its_arrays(name, expected):
    cache = Model(WIDE).init_cache(3, 10, kind=KINDS[name])
    assert cache.bytes_per_token == 2 * 2 * 2 * expected  # layers, keys and values, heads
    stored = [replace(slots, channel=None) for slots in (*cache.keys, *cache.values)]
    assert sum(x.nbytes for x in jax.tree.leaves(stored)) == 30 * cache.bytes_per_token


@pytest.mark.slow
def test_int4_takes_half_a_byte_and_unpacks_to_what_was_packed():
    x = random_vectors((1, 2, 3, 32))
    slots = encode(x, CacheFormat("int4", group=32))
    assert slots.codes.shape == (1, 2, 3, 16)
    assert slots.codes.dtype == jnp.int8
    assert slots.scale.dtype == jnp.bfloat16
    expected = np.round(np.asarray(x) / np.asarray(slots.scale, np.float32))
    np.testing.assert_array_equal(integers(slots).reshape(x.shape), expected)
    assert integers(slots).min() == -7
    assert integers(slots).max() <= 7


# Through the model ---------------------------------------------------------------------------------------------------


@functools.cache
def params_of(config):
    return random_params(Model(config))


@pytest.mark.parametrize("name", slow_but(list(KINDS), "int8"))
@pytest.mark.slow
def test_a_cache_loses_little_and_pieces_lose_no_more(name):
    """Each token is encoded on its own, so how many are read at once changes roundings of sums only."""
    model, kind, ids = Model(ONE_LAYER), KINDS[name], random_ids(2, 9)
    params, read = params_of(ONE_LAYER), compiled(ONE_LAYER, "read")
    plain = compiled(ONE_LAYER, "apply")(params, ids)
    largest = np.abs(plain).max()
    whole, _ = read(params, ids, model.init_cache(2, 11, kind=kind))
    lost = np.abs(whole - plain).max() / largest
    if kind.codes == "float":
        assert lost < 3e-6
    else:
        assert 1e-5 < lost < {"int8": 0.03, "e4m3": 0.2, "int4": 0.6}[kind.codes]
    if kind.keys != "plain":
        return  # the first piece says how keys are changed, so pieces are another encoding
    pieces, cache = [], model.init_cache(2, 11, kind=kind)
    for start in (0, 3, 6):
        logits, cache = read(params, ids[:, start : start + 3], cache)
        pieces.append(logits)
    tolerance = (0.02 if kind.codes != "float" else 3e-6) * largest
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", [pytest.param("float", marks=pytest.mark.slow), "int8"])
@pytest.mark.slow
def test_padding_on_the_left_changes_nothing(name):
    model, params, ids = Model(ONE_LAYER), params_of(ONE_LAYER), random_ids(1, 6)
    decode, empty = compiled(ONE_LAYER, "decode"), model.init_cache(1, 9, kind=name)
    alone, _ = decode(params, ids, empty)
    padded = jnp.concatenate([jnp.full((1, 3), 7), ids], axis=1)
    got, _ = decode(params, padded, empty._replace(padding=jnp.asarray([3], jnp.int32)))
    tolerance = (3e-6 if name == "float" else 1e-3) * np.abs(alone).max()
    np.testing.assert_allclose(got, alone, rtol=0, atol=tolerance)
    unmarked, _ = decode(params, padded, empty)
    assert np.abs(unmarked - alone).max() > 0.02 * np.abs(alone).max()


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        pytest.param("float", (3, 1, 3, 1, 3, 1), marks=pytest.mark.slow),
        pytest.param("float", (1,) * 12, marks=pytest.mark.slow),
        ("int8", (3,) * 4),
    ],
)
@pytest.mark.slow
def test_a_ring_remembers_the_window(name, pieces):
    """A ring of window + chunk - 1 slots gives what all slots and the window's mask give."""
    config = replace(ONE_LAYER, kinds=looking_back(4))
    model, params, ids = Model(config), params_of(config), random_ids(2, 12)
    read_piece = compiled(config, "read")
    expected, _ = read_piece(params, ids, model.init_cache(2, 12, kind=name))
    cache, read, got = model.init_cache(2, 12, kind=name, chunk=max(pieces)), 0, []
    assert cache.capacity == min(12, 4 + max(pieces) - 1)
    for piece in pieces:
        logits, cache = read_piece(params, ids[:, read : read + piece], cache)
        got.append(logits)
        read += piece
    tolerance = (3e-6 if name == "float" else 0.01) * np.abs(expected).max()
    np.testing.assert_allclose(np.concatenate(got, axis=1), expected, rtol=0, atol=tolerance)


@pytest.mark.slow
def test_a_window_hides_what_lies_before_it():
    config = replace(ONE_LAYER, kinds=looking_back(3))
    params, ids = params_of(config), random_ids(2, 9)
    apply = compiled(config, "apply")
    before = apply(params, ids)
    after = apply(params, ids.at[0, 2].set(ids[0, 2] + 1))
    changed = np.abs(before - after).max(axis=(0, 2)) > 1e-6
    np.testing.assert_array_equal(np.flatnonzero(changed), [2, 3, 4])
    everything = compiled(ONE_LAYER, "apply")(params, ids)
    np.testing.assert_allclose(before[:, :3], everything[:, :3], atol=1e-5)
    assert np.abs(before[:, 3:] - everything[:, 3:]).max() > 1e-3


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CacheFormat("int9"), "expected 'float' or one of .*got 'int9'"),
        (
            lambda: CacheFormat("int8", zero_point=True),
            "only int4 may have a zero point, got 'int8'",
        ),
        (lambda: CacheFormat("float", group=8), "a float cache has no scales"),
        (lambda: CacheFormat("int8", keys="turned"), "expected one of .*got 'turned'"),
        (lambda: CacheFormat("int8", group=0), "a group of at least one channel, or None, got 0"),
        (
            lambda: Model(WIDE).init_cache(1, 4, kind="int2"),
            r"expected one of \['e4m3', 'float', 'int4', 'int8'\]",
        ),
        (
            lambda: Model(replace(WIDE, max_length=2**18)).init_cache(1, 2**18, kind="int8"),
            "exact up to 133144 tokens",
        ),
        (
            lambda: Model(GROUPED).init_cache(1, 4, kind="int4"),
            "a group that divides head_dim = 8, got 16",
        ),
        (
            lambda: looking_back(0),
            "sliding_window: expected a whole number .* or none, got 0",
        ),
    ],
)
def test_formats_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_cache_of_another_model_or_batch():
    model, ids = Model(WIDE), random_ids(2, 3)
    params = jax.eval_shape(model.init, jax.random.key(0))
    others = {
        "layers": {"num_layers": 3},
        "heads": {"num_kv_heads": 4},
        "head_dim": {"head_dim": 8},
    }
    for change in others.values():
        cache = Model(replace(WIDE, **change)).init_cache(2, 4)
        with pytest.raises(
            ValueError,
            match=r"expected \(layers, batch, kv_heads, head_dim\) = \(2, 2, 2, 32\), got",
        ):
            jax.eval_shape(model.decode, params, ids, cache)
    with pytest.raises(ValueError, match=r"got \(2, 3, 2, 32\); a cache belongs to one model"):
        jax.eval_shape(model.decode, params, ids, model.init_cache(3, 4))


@pytest.mark.parametrize(
    ("window", "slots", "held", "tokens", "room"),
    [(None, 4, 3, 2, 1), (3, 6, 8, 5, 4), (3, 6, 1, 6, 5)],
)
def test_a_full_cache_is_seen_outside_jit(window, slots, held, tokens, room):
    model = Model(replace(WIDE, kinds=looking_back(window)))
    cache = model.init_cache(1, slots)._replace(length=jnp.int32(held))
    with pytest.raises(
        ValueError, match=f"expected room for {tokens} tokens, got {room}; make a longer one"
    ):
        model.decode({}, random_ids(1, tokens), cache)


# One large channel of the keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "e4m3"])
@pytest.mark.parametrize("bias", [20.0, 300.0])
@pytest.mark.slow
def test_a_large_channel_of_the_keys_does_not_take_the_others_digits(kind, bias):
    """Scores q . k of keys with a bias in one channel: the softmax is nearly that of float keys."""
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(1, 1, 12, 64))
    keys[..., 5] += bias
    queries = rng.normal(size=(1, 1, 3, 64))
    slots = empty_cache(1, 1, [12], (64, 64), jnp.float32, cache_format(kind)).keys[0]
    zero, positions = jnp.int32(0), jnp.arange(12, dtype=jnp.int32)[None]
    filled = write(slots, jnp.asarray(keys, jnp.float32), zero, positions, ring=False)
    got = np.asarray(decoded(filled), np.float64)
    expected, scores = (queries @ np.swapaxes(k, -1, -2) / 8 for k in (keys, got))
    centred = [s - s.mean(-1, keepdims=True) for s in (expected, scores)]
    assert np.abs(centred[0] - centred[1]).max() < {"int8": 0.05, "e4m3": 0.25}[kind]
