"""generate: cached = uncached = chunked, batch = one by one, stops, draws, streams, errors."""

from dataclasses import replace
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import GROUPED, Letters, looking_back, random_params
from untyped import untyped

import sqjax as sq
from sqjax.models import CacheFormat, Model, generate, greedy
from sqjax.models.decoding.generation import check_counts
from sqjax.models.decoding.sampling import restrict
from sqjax.models.decoding.sizes import program_sizes

CONFIG = replace(GROUPED, num_layers=1, tie_embeddings=False)
MODEL = Model(CONFIG)
STEPS = 10
PROMPTS = [[3, 14, 15, 9, 26, 5, 35], [8], [9, 7, 9, 3]]


class Trees(dict):
    """The parameters "float", and the same in "W8A8", made when a test first asks for them."""

    def __missing__(self, name):
        if name == "float":
            tree = random_params(MODEL)
        else:
            ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, 32))
            batches = [jnp.asarray(ids)]
            tree = sq.smoothquant(MODEL.apply, self["float"], batches, 0.5, sq.W8A8)
        self[name] = tree
        return tree


class Uncached(dict):
    """{tree: each prompt's greedy continuation, every token from all before it, without a cache}."""

    def __init__(self, trees):
        self.trees = trees
        self.apply = jax.jit(sq.quantized(MODEL.apply))

    def __missing__(self, name):
        rows = [self.continuation(self.trees[name], prompt) for prompt in PROMPTS]
        assert len({token for row in rows for token in row}) > 8
        self[name] = rows
        return rows

    def continuation(self, params, prompt):
        ids = list(prompt)
        for _ in range(STEPS):  # what stands later does not matter: the model is causal
            padded = jnp.asarray([ids + [0] * (len(PROMPTS[0]) + STEPS - len(ids))], jnp.int32)
            ids.append(int(self.apply(params, padded)[0, len(ids) - 1].argmax()))
        return ids[len(prompt) :]


@pytest.fixture(scope="module")
def trees():
    return Trees()


@pytest.fixture(scope="module")
def uncached(trees):
    return Uncached(trees)


NAMES = ["float", pytest.param("W8A8", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_a_batch_of_unequal_prompts_is_each_uncached(trees, uncached, name):
    got = generate(MODEL, trees[name], PROMPTS, STEPS)
    assert got.tokens == uncached[name]
    assert got.stopped == [False] * 3
    assert got.texts is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_chunks_of_the_prefill_change_nothing(trees, uncached, name):
    assert generate(MODEL, trees[name], PROMPTS, STEPS, chunk=3).tokens == uncached[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
@pytest.mark.every_case
def test_one_by_one_and_greedy(trees, uncached, name):
    assert generate(MODEL, trees[name], PROMPTS[0], STEPS).tokens == uncached[name][:1]
    assert (
        greedy(MODEL, trees[name], jnp.asarray(PROMPTS[:1]), STEPS).tolist() == uncached[name][:1]
    )


@pytest.mark.slow
@pytest.mark.every_case
def test_a_quantized_cache_is_the_same_in_a_batch_and_in_chunks(trees):
    alone = generate(MODEL, trees["W8A8"], PROMPTS[2], STEPS, cache="int8").tokens[0]
    assert generate(MODEL, trees["W8A8"], PROMPTS, STEPS, cache="int8", chunk=4).tokens[2] == alone


@pytest.mark.slow
def test_a_coarse_cache_changes_what_is_generated(trees, uncached):
    """So that the formats are not ignored."""
    coarse = CacheFormat("int4", group=8)
    assert generate(MODEL, trees["float"], PROMPTS, STEPS, cache=coarse).tokens != uncached["float"]


@pytest.mark.slow
def test_a_window_and_its_ring(trees):
    model, prompt = Model(replace(CONFIG, kinds=looking_back(4))), PROMPTS[0]
    apply, ids = jax.jit(model.apply), list(prompt)
    for _ in range(STEPS):
        padded = jnp.asarray([ids + [0] * (len(prompt) + STEPS - len(ids))], jnp.int32)
        ids.append(int(apply(trees["float"], padded)[0, len(ids) - 1].argmax()))
    got = generate(model, trees["float"], [PROMPTS[1], prompt], STEPS, chunk=3).tokens[1]
    assert got == ids[len(prompt) :]
    assert got != generate(MODEL, trees["float"], prompt, STEPS).tokens[0]


# Stops and streams ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stop_token_ends_its_row_only(trees, uncached):
    stop = uncached["float"][0][2]
    got = generate(MODEL, trees["float"], PROMPTS, STEPS, stop=stop)
    for row, expected, stopped in zip(got.tokens, uncached["float"], got.stopped, strict=True):
        end = expected.index(stop) + 1 if stop in expected else STEPS
        assert row == expected[:end]
        assert stopped == (stop in expected)
    assert len(got.tokens[0]) <= 3 < max(map(len, got.tokens))


@pytest.mark.slow
def test_the_loop_ends_when_all_rows_have(trees, uncached):
    """Seen from outside: after the last row's stop nothing more is streamed, and no step is made."""
    ends, calls = [uncached["float"][0][1], uncached["float"][1][0], uncached["float"][2][0]], []
    got = generate(
        MODEL,
        trees["float"],
        PROMPTS,
        STEPS,
        stop=ends,
        stream=lambda row, new: calls.append((row, new)),
    )
    assert all(got.stopped)
    assert sum(len(new) for _, new in calls) == sum(map(len, got.tokens))
    assert max(map(len, got.tokens)) <= 2


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.slow
def test_the_stream_is_the_result_in_pieces(trees, uncached, every):
    pieces = {0: [], 1: [], 2: []}
    got = generate(
        MODEL,
        trees["float"],
        PROMPTS,
        STEPS,
        stream=lambda r, t: pieces[r].append(t),
        stream_every=every,
    )
    assert got.tokens == uncached["float"] == [list(chain(*pieces[row])) for row in range(3)]
    assert [len(piece) for piece in pieces[0]] == ([1] * 10 if every == 1 else [1, 4, 4, 1])


@pytest.mark.slow
def test_the_callback_may_end_a_row(trees, uncached):
    got = generate(MODEL, trees["float"], PROMPTS, STEPS, stream=lambda row, tokens: row == 1)
    assert got.tokens == [uncached["float"][0], uncached["float"][1][:1], uncached["float"][2]]
    assert got.stopped == [False, True, False]


# Texts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_texts_and_their_end(trees):
    params = trees["float"]
    [expected] = generate(MODEL, params, [3, 0, 2], 4).tokens
    model = Model(CONFIG, Letters(None, eos_id=expected[2]))
    got = generate(model, params, "dac", 4)
    assert got.tokens == [expected[: expected.index(expected[2]) + 1]]
    assert got.texts == [model.tokenizer.decode(got.tokens[0])]
    assert generate(model, params, ["dac"], 4, stop=()).tokens == [expected]
    named = model.tokenizer.decode(expected[1:2])
    assert generate(model, params, "dac", 4, stop=named).tokens == [
        expected[: expected.index(expected[1]) + 1]
    ]
    with pytest.raises(ValueError, match="expected the text of one token, got 'ab'"):
        generate(model, params, "dac", 4, stop=["ab"])


# Draws ---------------------------------------------------------------------------------------------------------------


def kept_by_sorting(logits, top_k, top_p):
    order = np.argsort(-logits, kind="stable")[:top_k]
    share = np.exp(logits[order].astype(np.float64) - logits.max())
    before = np.cumsum(share) / share.sum() - share / share.sum()
    return set(order[before < top_p].tolist())


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(300, 1.0), (5, 1.0), (1, 1.0), (300, 0.5), (300, 0.05), (7, 0.6)]
)
def test_top_k_and_top_p_keep_what_a_sort_keeps(top_k, top_p):
    logits = np.random.default_rng(2).normal(size=(4, 300)).astype(np.float32) * 3
    got = jax.jit(restrict)(jnp.asarray(logits), jnp.int32(top_k), jnp.float32(top_p))
    for row, left in zip(logits, np.asarray(got), strict=True):
        kept = np.isfinite(left)
        assert set(np.flatnonzero(kept).tolist()) == kept_by_sorting(row, top_k, top_p)
        np.testing.assert_array_equal(left[kept], row[kept])


@pytest.mark.slow
@pytest.mark.every_case
def test_draws_have_the_probabilities_of_the_logits(trees):
    """1000 first tokens after one prompt: 4 standard deviations of a binomial, for each likely token."""
    count, temperature = 1000, 1.7
    logits = np.asarray(
        jax.jit(MODEL.apply)(trees["float"], jnp.asarray([[8]], jnp.int32))[0, 0], np.float64
    )
    logits = logits / temperature
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    got = generate(MODEL, trees["float"], [[8]] * count, 1, temperature=temperature, seed=3).tokens
    share = np.bincount(np.ravel(got), minlength=CONFIG.vocab_size) / count
    assert (np.abs(share - expected) <= 4 * np.sqrt(expected * (1 - expected) / count) + 1e-3).all()
    assert (expected > 0.02).sum() > 3


@pytest.mark.slow
@pytest.mark.every_case
def test_seeds(trees):
    def draw(prompts, seed, **how):
        return generate(
            MODEL, trees["float"], prompts, STEPS, temperature=1.5, seed=seed, **how
        ).tokens

    first = draw(PROMPTS, 1)
    assert draw(PROMPTS, 1) == first
    assert draw(PROMPTS, 2) != first
    assert draw(PROMPTS, np.int64(1)) == first
    assert draw(PROMPTS, 1, chunk=7) == first
    mixed = draw([PROMPTS[0]] * 3, 0)
    assert mixed[0] != mixed[1] != mixed[2]
    by_row = draw(PROMPTS, [5, 6, 7])
    assert draw(PROMPTS[::-1], [7, 6, 5])[::-1] == by_row


@pytest.mark.slow
def test_the_coldest_draw_and_the_narrowest_are_greedy(trees, uncached):
    cold = ({"temperature": t} for t in (1e-4, 1e-9, 1e-11, 1e-38, 1e-45))
    for how in (*cold, {"temperature": 1.5, "top_k": 1}, {"temperature": 1.5, "top_p": 1e-6}):
        assert generate(MODEL, trees["float"], PROMPTS, STEPS, **how).tokens == uncached["float"]


@pytest.mark.slow
def test_settings_compile_nothing_anew(trees):
    from sqjax.models.decoding.generation import _advance

    generate(MODEL, trees["float"], PROMPTS, STEPS, temperature=0.7, top_p=0.9, stop=[1])
    before = _advance._cache_size()
    generate(MODEL, trees["float"], PROMPTS, STEPS, temperature=1.3, top_k=9, seed=4, stop=[2])
    assert _advance._cache_size() == before


@pytest.mark.parametrize(
    ("longest", "steps", "chunk", "expected"),
    [
        (1, 1, None, (64, 64, 64)),
        (64, 64, None, (64, 64, 64)),
        (65, 65, None, (128, 128, 128)),
        (70, 5, 50, (100, 50, 64)),
        (70, 5, 16384, (128, 128, 64)),  # a chunk beyond the prompt is the prompt
        (1990, 5, None, (2000, 2000, 64)),  # as is the model's length
        (7, 1990, None, (64, 64, 2000)),
        (1990, 5, 16384, (2000, 2000, 64)),
    ],
)
def test_lengths_are_rounded_up_but_not_past_the_model(longest, steps, chunk, expected):
    assert program_sizes(longest, steps, chunk, 2000, exact=False) == expected
    exact = program_sizes(longest, steps, None, 2000, exact=True)
    assert exact == (longest, longest, expected[2])


@pytest.mark.slow
def test_another_length_and_other_steps_compile_nothing_anew(trees, uncached):
    from sqjax.models.decoding import generation

    model = Model(replace(CONFIG, num_layers=1))
    one = random_params(model)

    def programs(prompt, steps, **how):
        generate(model, one, prompt, steps, **how)
        return generation._prefill._cache_size(), generation._advance._cache_size()

    first = programs([1, 2, 3], 5)
    for length, steps in ((1, 1), (4, 9), (40, 20)):
        assert programs([7] * length, steps) == first
    assert programs([7] * 9, 3, chunk=16384) == first
    # A callback sees as many tokens as were asked for, though there is room for more.
    seen = []
    got = generate(model, one, [1, 2], 5, stream=lambda _, new: seen.extend(new), stream_every=4)
    assert [seen] == got.tokens
    assert len(seen) == 5


@pytest.mark.slow
def test_activations_that_share_a_scale_are_not_padded(monkeypatch, trees):
    from sqjax.models.decoding import generation

    shapes = []

    def seen(model, params, ids, *_):
        shapes.append(ids.shape)
        raise StopIteration

    monkeypatch.setattr(generation, "_prefill", seen)
    tensor = sq.QTensor.quantize(jnp.ones((2, 2)), (0,))
    for activations in ("per_tensor", "per_token"):
        weight = sq.QuantWeight(tensor, None, None, activations)
        with pytest.raises(StopIteration):
            generate(MODEL, trees["float"] | {"head": weight}, PROMPTS, STEPS)
    assert shapes == [(3, 7), (3, 64)]


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "change", "message"),
    [
        ([1] * 55, {}, r"at most 64 \(config\.max_length\), got 55 \+ 10"),
        ([1, 61], {}, r"prompts\[0\]: expected token ids from 0 to 60, got 61"),
        ([[1], []], {}, r"prompts\[1\]: expected at least one token"),
        ([], {}, "prompts: expected at least one, got none"),
        ([[1.5]], {}, "expected integer token ids, got float64"),
        ("abc", {}, "the model has no tokenizer; give token ids"),
        ([1], {"stop": 61}, "stop: expected token ids from 0 to 60, got 61"),
        ([1], {"stop": -1}, "stop: expected token ids from 0 to 60, got -1"),
        ([1], {"stop": "."}, "stop: '.' is a text, and the model has no tokenizer"),
        ([1], {"steps": 0}, "steps to be a whole number of at least 1, got 0"),
        ([1], {"chunk": 0}, "chunk to be a whole number of at least 1, got 0"),
        ([1], {"temperature": -1.0}, "a temperature of at least 0, got -1.0"),
        ([1], {"top_k": 0}, "top_k to be a whole number of at least 1, got 0"),
        ([1], {"top_p": 1.5}, "top_p above 0 and at most 1, got 1.5"),
        ([1], {"seed": [1, 2]}, "one for each of 1 prompts, got 2"),
        ([1], {"seed": 2**70}, "seeds to be whole numbers of 32 bits, got 1180591620717411303424"),
        ([1], {"seed": 1.5}, "seeds to be whole numbers of 32 bits, got 1.5"),
        ([1], {"seed": [2**40]}, "seeds to be whole numbers of 32 bits"),
        ([1], {"stop": [[1]]}, r"stop: expected the ids or texts of tokens, got \[1\]"),
        ([1], {"stop": {1}}, r"stop: expected the ids or texts of tokens, got \{1\}"),
        ([1], {"stop": 1.5}, "stop: expected the ids or texts of tokens, got 1.5"),
        ([1], {"temperature": "1"}, "expected temperature to be a number, got '1'"),
        ([1], {"temperature": 1j}, "expected temperature to be a number, got 1j"),
        ([1], {"steps": True}, "steps to be a whole number of at least 1, got True"),
        ([1], {"temperature": None}, "expected temperature to be a number, got None"),
        ([1], {"temperature": float("nan")}, "a temperature of at least 0, got nan"),
        ([1], {"top_p": "1"}, "expected top_p to be a number, got '1'"),
        ([1], {"top_p": float("nan")}, "top_p above 0 and at most 1, got nan"),
        ([1], {"stream": 3}, "expected stream to be a function, got 3"),
        ([1], {"cache": ["int8"]}, r"cache: expected one of .*got \['int8'\]"),
        (None, {}, "prompts: expected a text, a sequence .*got NoneType"),
        (5, {}, "prompts: expected a text, a sequence .*got int"),
        ({1, 2}, {}, "prompts: expected a text, a sequence .*got set"),
        ({"a": 1}, {}, "prompts: expected a text, a sequence .*got dict"),
        (b"abc", {}, "prompts: expected a text, a sequence .*got bytes"),
        (np.int32(3), {}, "prompts: expected a text, a sequence .*got int32"),
        ("\ud800", {}, r"prompts\[0\]: expected a text of Unicode"),
        ([None], {}, r"prompts\[0\]: expected at least one token in a flat sequence"),
        ([[1], {2}], {}, r"prompts\[1\]: expected at least one token in a flat sequence"),
        ([[1, [2, 3]]], {}, r"prompts\[0\]: expected token ids, got \[1, \[2, 3\]\]"),
        ([[2**70]], {}, r"prompts\[0\]: expected integer token ids, got object"),
        ([1], {"cache": "int3"}, "cache: expected one of .*got 'int3'"),
        (
            [1],
            {"stream": print, "stream_every": 0},
            "stream_every to be a whole number of at least 1, got 0",
        ),
    ],
)
def test_bad_input(prompts, change, message):
    with untyped(), pytest.raises(ValueError, match=message):
        generate(MODEL, {}, prompts, **{"steps": STEPS, **change})


@pytest.mark.parametrize("count", [2.5, np.float32(3), "4", None, -1])
def test_counts_that_are_none(count):
    """Python lets them through, and a jitted function would round them or fail far from here."""
    check_counts("generate", steps=3, top_k=np.int64(1))
    with pytest.raises(
        ValueError,
        match=f"generate: expected top_k to be a whole number of at least 1, got .*{count}",
    ):
        check_counts("generate", steps=3, top_k=count)


@pytest.mark.slow
def test_logits_that_are_nan(trees):
    params = jax.tree.map(lambda x: x, trees["float"])
    table = params["model"]["embed_tokens"]["embedding"]
    stop = generate(MODEL, params, PROMPTS, STEPS).tokens[1][4]
    params["model"]["embed_tokens"]["embedding"] = table.at[stop].set(jnp.nan)
    with pytest.raises(
        ValueError, match=r"logits of row \d are NaN or infinite after \d new tokens"
    ):
        generate(MODEL, params, PROMPTS, STEPS)
