"""Log-likelihoods and multiple choice against numpy; perplexity through a cache; the harness's interface."""

import sys
import types
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import GROUPED, Letters, random_params
from untyped import untyped

from sqjax.models import (
    CacheFormat,
    Model,
    Question,
    generate,
    harness_model,
    loglikelihoods,
    multiple_choice,
)
from sqjax.models.decoding.prompts import encode_alone, encode_open, stop_ids
from sqjax.models.evaluation.harness import cut, rolling_pairs
from sqjax.models.evaluation.perplexity import perplexity, windows
from sqjax.models.evaluation.scoring import encode_pair, next_logprobs
from sqjax.models.slots import cache_format

CONFIG = replace(GROUPED, num_layers=1, tie_embeddings=False)
MODEL = Model(CONFIG, Letters(None, eos_id=60))
APPLY, DECODE = (
    jax.jit(MODEL.apply),
    jax.jit(MODEL.decode),
)  # once: jax does not know a bound method again
PAIRS = [([1, 2, 3], [4, 5]), ([7], [8]), ([9, 9, 9, 9], [3]), ([1, 2, 3], [40, 50, 60, 3, 2, 1])]


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


def log_softmax(params, ids):
    logits = np.asarray(APPLY(params, jnp.asarray([ids], jnp.int32))[0], np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def likelihood(params, context, continuation):
    """One token at a time, each after all before it."""
    total, greedy, ids = 0.0, True, list(context)
    for token in continuation:
        padded = (ids + [0] * 64)[:64]
        row = log_softmax(params, padded)[len(ids) - 1]
        total, greedy, ids = total + row[token], greedy and row.argmax() == token, [*ids, token]
    return total, greedy


@pytest.mark.parametrize(
    "cache",
    [
        pytest.param(None, marks=pytest.mark.slow),
        "float",
        pytest.param("int8", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_loglikelihoods(params, cache):
    greedy = generate(MODEL, params, [1, 2, 3], 4, stop=()).tokens[0]
    pairs = [*PAIRS, ([1, 2, 3], greedy)]
    got = loglikelihoods(MODEL, params, pairs, cache=cache, batch=2)
    for (context, continuation), found in zip(pairs, got, strict=True):
        expected = likelihood(params, context, continuation)
        assert found.logprob == pytest.approx(expected[0], rel=1e-5 if cache != "int8" else 0.1)
        assert found.greedy == expected[1] or cache == "int8"
    assert [x.greedy for x in got] == [False, False, False, False, True] or cache == "int8"


@pytest.mark.slow  # a wider model of its own, compiled for each case
@pytest.mark.parametrize("cache", [None, "int4", CacheFormat("int8", keys="channels")])
@pytest.mark.every_case
def test_a_likelihood_does_not_depend_on_what_it_is_read_with(cache):
    """Nor on zeros up to a common length: keys' channels are those of the sequence's own tokens."""
    model = Model(replace(CONFIG, head_dim=32, max_length=200, attention_bias=True))
    tree, rng = random_params(model), np.random.default_rng(6)
    ids = rng.integers(0, 61, 100).tolist()
    pair, longer = (ids[:5], ids[5:9]), (ids[:90], [4])
    [alone], [beside, _] = (
        loglikelihoods(model, tree, pairs, cache=cache) for pairs in ([pair], [pair, longer])
    )
    inputs, targets = (jnp.asarray([ids[i : i + 8]], jnp.int32) for i in (0, 1))
    exact, _ = next_logprobs(
        model, tree, inputs, targets, None if cache is None else cache_format(cache)
    )
    assert alone.logprob == pytest.approx(float(exact[0, 4:].sum()), rel=2e-3)
    assert beside.logprob == pytest.approx(alone.logprob, rel=2e-3)


def test_nothing_that_is_empty_has_a_likelihood(params):
    """An empty continuation would have the likelihood 1, whatever the model."""
    with pytest.raises(
        ValueError, match=r"pairs\[1\]: .* a continuation of at least one .* 1 and 0"
    ):
        loglikelihoods(MODEL, params, [([7], [8]), ([7], [])])
    assert loglikelihoods(MODEL, params, []) == []
    for batch in (0, -1):
        with pytest.raises(ValueError, match=f"a batch of at least 1, got {batch}"):
            loglikelihoods(MODEL, params, PAIRS, batch=batch)


@pytest.mark.slow
def test_a_long_context_loses_its_beginning(params):
    context = np.random.default_rng(0).integers(0, 61, 80).tolist()
    [got] = loglikelihoods(MODEL, params, [(context, [5, 6])])
    row = log_softmax(params, [*context, 5][-64:])
    assert got.logprob == pytest.approx(row[-2][5] + row[-1][6], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "chunk"),
    [
        ("int8", 4),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("int8", None), ("int8", 1), ("float", None), ("float", 4), ("float", 1))
        ),
    ],
)
@pytest.mark.slow
def test_teacher_forcing_through_a_cache(params, chunk, name):
    """What every token sees is what it would see if the text were generated token by token."""
    ids = np.random.default_rng(1).integers(0, 61, (2, 9)).astype(np.int32)
    kind = CacheFormat(name, keys="plain")  # rotated ones depend on how many tokens come first
    got, greedy = next_logprobs(MODEL, params, ids[:, :-1], ids[:, 1:], kind, chunk)
    cache, read = MODEL.init_cache(2, 8, kind=kind), DECODE
    for i in range(8):
        logits, cache = read(params, jnp.asarray(ids[:, i : i + 1]), cache)
        expected = jax.nn.log_softmax(logits)[jnp.arange(2), ids[:, i + 1]]
        np.testing.assert_allclose(
            got[:, i], expected, rtol=0, atol=2e-5 if name == "float" else 5e-3
        )
        np.testing.assert_array_equal(greedy[:, i], logits.argmax(-1) == ids[:, i + 1])


def test_a_chunk_without_a_cache(params):
    ids = np.ones((1, 4), np.int32)
    for change in ({"chunk": 2}, {"padding": np.array([1], np.int32)}):
        with pytest.raises(ValueError, match="a chunk and padding need a cache"):
            next_logprobs(MODEL, params, ids, ids, **change)
    with pytest.raises(ValueError, match="a chunk and padding need a cache"):
        perplexity(MODEL, params, ids, chunk=2)


@pytest.mark.slow
def test_perplexity_of_a_text_and_of_its_windows(params):
    ids = np.random.default_rng(2).integers(0, 61, 20)
    rows = perplexity(MODEL, params, ids[:18].reshape(3, 6))
    assert (
        perplexity(MODEL, params, ids, length=6)
        == rows
        == perplexity(MODEL, params, ids.tolist(), 6)
    )
    losses = [
        log_softmax(params, row)[np.arange(5), row[1:]].mean() for row in ids[:18].reshape(3, 6)
    ]
    assert rows == pytest.approx(np.exp(-np.mean(losses)), rel=1e-5)
    assert perplexity(MODEL, params, ids, 6, cache="float") == pytest.approx(rows, rel=1e-5)
    for name in ("int8", "e4m3"):
        assert 1e-6 < abs(perplexity(MODEL, params, ids, 6, cache=name) / rows - 1) < 0.1
    plain = CacheFormat("int8", keys="plain")
    assert perplexity(MODEL, params, ids, 6, cache=plain, chunk=2) == pytest.approx(
        perplexity(MODEL, params, ids, 6, cache=plain), rel=1e-3
    )


def test_windows():
    assert windows(list(range(10)), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows(list(range(10)), 4, 1).tolist() == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match="expected 1 to 2 windows of 4 tokens"):
        windows(list(range(10)), 4, 3)


@pytest.mark.slow
def test_perplexity_refuses_what_it_can_not_judge(params):
    with pytest.raises(ValueError, match="at least 2 tokens"):
        perplexity(MODEL, params, np.zeros((1, 1), np.int32))
    broken = jax.tree.map(lambda x: x * jnp.nan, params)
    with pytest.raises(ValueError, match="NaN"):
        perplexity(MODEL, broken, np.zeros((1, 4), np.int32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2, 3],), "expected windows .* or ids and a length"),
        ((np.ones((2, 4), int), 2), "expected windows .* or ids and a length"),
        (([1, 2, 3], 4), "expected 1 to 0 windows of 4 tokens in a text of 3"),
        (([1, 2, 61, 4], 2), "perplexity: expected token ids from 0 to 60, got 61"),
        (([1, 2, 3, 4], 1), "of at least 2 tokens"),
        (([1, 2, 3, 4], 0), "expected a length of at least 1, got 0"),
        ((np.zeros((0, 4), int),), "expected at least one window"),
        ((np.zeros((0, 4)),), "expected at least one window"),
        (([],), "expected windows .* or ids and a length"),
        (([], 4), "expected 1 to 0 windows of 4 tokens in a text of 0"),
        (([[1, 2], [3]],), r"perplexity: expected token ids, got \[\[1, 2\], \[3\]\]"),
        (
            (np.array([2**32 + 1, 2, 3]), 3),
            "perplexity: expected token ids from 0 to 60, got 4294967297",
        ),
        (([True, False, True], 3), "perplexity: expected integer token ids, got bool"),
    ],
)
def test_perplexity_refuses(params, arguments, message):
    with untyped(), pytest.raises(ValueError, match=message):
        perplexity(MODEL, params, *arguments)


@pytest.mark.parametrize("cache", [None, "int8"])
def test_a_window_longer_than_the_model(params, cache):
    with pytest.raises(ValueError, match=r"expected at most 64 \(config.max_length\), got 65"):
        perplexity(MODEL, params, np.ones(65, int), 65, cache=cache)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([], [1]), r"pairs\[0\]: expected a context of at least one token"),
        (([1], [1] * 65), r"at least one and at most 64 \(config\.max_length\), got 1 and 65"),
        ((5, [1]), r"pairs\[0\], context: expected a flat sequence of token ids, got 5"),
        (([1], [[2]]), r"pairs\[0\], continuation: expected a flat sequence"),
        (([1],), r"pairs\[0\]: expected \(context ids, continuation ids\), got"),
        (("ab", "cd"), r"pairs\[0\], context: expected a flat sequence of token ids, got 'ab'"),
        (([1], [61]), r"pairs\[0\], continuation: expected token ids from 0 to 60, got 61"),
    ],
)
def test_loglikelihoods_refuse(params, pair, message):
    with untyped(), pytest.raises(ValueError, match=message):
        loglikelihoods(MODEL, params, [pair])


def test_nan_is_not_a_likelihood(params):
    broken = jax.tree.map(lambda x: x * jnp.nan, params)
    with pytest.raises(ValueError, match=r"pairs\[0\]: the logits are NaN"):
        loglikelihoods(MODEL, broken, [([1], [2])])


# Multiple choice -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_multiple_choice(params):
    """Choices of unlike lengths, so that the three accuracies differ."""
    rng = np.random.default_rng(5)

    def word(length):
        return "".join(chr(ord("a") + i) for i in rng.integers(0, 26, length))

    questions = [
        Question(word(3), [word(n) for n in (1, 4, 2)], int(rng.integers(3))) for _ in range(12)
    ]
    got = multiple_choice(MODEL, params, questions, batch=4)
    letters = MODEL.tokenizer.encode
    sums = [
        [likelihood(params, letters(q.context), letters(c))[0] for c in q.choices]
        for q in questions
    ]
    np.testing.assert_allclose(got.logprobs, sums, rtol=1e-5)
    best = [np.argmax(row) == q.answer for row, q in zip(sums, questions, strict=True)]
    norm = [
        np.argmax(np.divide(row, [1, 4, 2])) == q.answer
        for row, q in zip(sums, questions, strict=True)
    ]
    assert (got.acc, got.acc_norm, got.acc_bytes) == (np.mean(best), np.mean(norm), np.mean(norm))
    assert got.acc != got.acc_norm


@pytest.mark.slow
def test_bytes_are_not_characters():
    """Letters of two bytes: what is divided by bytes may choose otherwise."""
    tokenizer = Letters(None, eos_id=60)
    object.__setattr__(
        tokenizer, "encode", lambda text: [{"é": 5}.get(c, ord(c) % 61) for c in text]
    )
    model = Model(CONFIG, tokenizer)
    for seed in range(40):
        tree = random_params(model, seed)
        got = multiple_choice(model, tree, [Question("abc", ["é", "xy"], 0)])
        one, two = got.logprobs[0]
        assert got.acc_norm == float(one > two / 2)
        assert got.acc_bytes == float(one / 2 > two / 2)
        if got.acc_norm != got.acc_bytes:
            return
    pytest.fail("no model told bytes from characters")


class Around(Letters):
    """Puts tokens before and after every text, and knows a token that ends one."""

    before, after = [58], [59]

    def encode(self, text):
        return [*self.before, *super().encode(text), *self.after]


@pytest.mark.parametrize(
    ("before", "after", "begin"),
    [([58], [59], [58]), ([], [60], [60]), ([57, 58], [60], [57, 58]), ([60], [], [60])],
)
def test_pairs_have_no_token_that_a_tokenizer_puts_after_a_text(before, after, begin):
    tokenizer = type("Tokenizer", (Around,), {"before": before, "after": after})(None, eos_id=60)
    model = Model(CONFIG, tokenizer)
    assert encode_pair(model, "ab", "cd") == ([*before, 0, 1], [2, 3])
    assert encode_pair(model, "", "cd") == (begin, [2, 3])


def test_a_text_that_begins_with_what_ends_texts():
    tokenizer = type("Tokenizer", (Around,), {"before": [58], "after": [1]})(None, eos_id=1)
    assert (encode_open(tokenizer, "ba"), encode_alone(tokenizer, "ba")) == ([58, 1, 0], [1, 0])
    assert (encode_open(tokenizer, "b"), encode_alone(tokenizer, "b")) == ([58, 1], [1])


def test_pairs_are_parted_as_the_harness_does():
    assert encode_pair(MODEL, "ab", "cd") == ([0, 1], [2, 3])
    assert encode_pair(MODEL, "", "cd") == ([60], [2, 3])
    space = ord(" ") - ord("a")
    assert encode_pair(MODEL, "ab ", "c") == ([0, 1], [space, 2])
    with pytest.raises(ValueError, match="no tokenizer"):
        encode_pair(Model(CONFIG), "a", "b")


class Begun(Letters):
    """Every text begins with token 59, as Llama's do."""

    def encode(self, text):
        return [59, *super().encode(text)]


def test_what_begins_every_text_is_never_asked_for(harness, params):
    model = Model(CONFIG, Begun(None, eos_id=60))
    assert encode_pair(model, "ab", "cd") == ([59, 0, 1], [2, 3])
    assert encode_pair(model, "", "cd") == ([59], [2, 3])
    expected = likelihood(params, [59], [2, 3])[0]
    assert harness_model(model, params).loglikelihood_rolling([Request(("cd",))]) == [
        pytest.approx(expected, rel=1e-5)
    ]
    assert stop_ids(model, "c").tolist() == [2]
    assert [stop_ids(model, kind(5)).tolist() for kind in (int, np.int64, jnp.int32)] == [[5]] * 3


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (Question("a", ["b"], 0), "at least two choices"),
        (Question("a", ["b", ""], 0), "none of them empty"),
        (
            Question("a", ["b", "c"], 2),
            "the number of the right one, got 2 choices .* and answer 2",
        ),
        (("a", ["b", "c"], 0), r"questions\[0\]: expected a Question\(context, choices, answer\)"),
        (Question("w1", "w2", 0), "expected several texts as choices, got 'w2'"),
        (Question("a", {"b", "c"}, 0), "expected several texts as choices"),
        (Question("a", ["b", 3], 0), r"questions\[0\], choices: expected a text, got int"),
        (Question(None, ["b", "c"], 0), r"questions\[0\], context: expected a text, got NoneType"),
        (Question("a", ["b", "\ud800"], 0), "expected a text of Unicode"),
        (Question("a", ["b", "c"], True), "got 2 choices .* and answer True"),
        (Question("a", ["b", "c"], 1.0), "got 2 choices .* and answer 1.0"),
        (Question("a", ["b", "c"], -1), "got 2 choices .* and answer -1"),
    ],
)
def test_questions_that_make_no_sense(question, message):
    with untyped(), pytest.raises(ValueError, match=message):
        multiple_choice(MODEL, {}, [question])
    with pytest.raises(ValueError, match="at least one, got none"):
        multiple_choice(MODEL, {}, [])


class Merging(Letters):
    """Two letters "bc" are one token, 50: after "ab" a "c" leaves nothing of its own."""

    def encode(self, text):
        merged = text.replace("bc", chr(ord("a") + 50))
        return super().encode(merged)


def test_a_choice_that_merges_into_its_context_is_refused(harness, params):
    model = Model(CONFIG, Merging(None, eos_id=60))
    assert encode_pair(model, "ab", "c") == ([0, 1], [])
    message = r"questions\[1\]: the choice 'c' merges into the last token of its context"
    questions = [Question("ab", ["d", "e"], 0), Question("ab", ["d", "c"], 1)]
    with pytest.raises(ValueError, match=message):
        multiple_choice(model, params, questions)
    with pytest.raises(ValueError, match=r"pairs\[0\]: .*merges into the token before it"):
        harness_model(model, params).loglikelihood([Request(("ab", "c"))])


# The harness ---------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    args: tuple


@pytest.fixture
def harness(monkeypatch):
    """A stand-in for lm_eval with the three abstract methods of its LM."""
    import abc

    class LM(abc.ABC):  # noqa: B024 (its methods are abstract, made by calls)
        def __init__(self):
            self.initialized = True

        loglikelihood = abc.abstractmethod(lambda self, requests: None)
        loglikelihood_rolling = abc.abstractmethod(lambda self, requests: None)
        generate_until = abc.abstractmethod(lambda self, requests: None)

    modules = {
        name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model")
    }
    modules["lm_eval.api.model"].LM = LM
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return LM


def test_the_adapter_is_an_lm(harness, params):
    lm = harness_model(MODEL, params, batch=2)
    assert isinstance(lm, harness)
    assert lm.initialized
    [(first, greedy), (second, _)] = lm.loglikelihood([Request(("abc", "de")), Request(("", "b"))])
    assert first == pytest.approx(likelihood(params, [0, 1, 2], [3, 4])[0], rel=1e-5)
    assert greedy is False
    assert second == pytest.approx(likelihood(params, [60], [1])[0], rel=1e-5)


def test_rolling_predicts_every_token_once(harness, params):
    text = "".join(chr(ord("a") + i) for i in np.random.default_rng(3).integers(0, 26, 70))
    ids = MODEL.tokenizer.encode(text)
    lm = harness_model(MODEL, params)
    first, second = log_softmax(params, [60, *ids[:63]]), log_softmax(params, ids[5:69])
    expected = sum(first[i][ids[i]] for i in range(64)) + sum(
        second[i - 6][ids[i]] for i in range(64, 70)
    )
    short = likelihood(params, [60], ids[:5])[0]
    got = lm.loglikelihood_rolling([Request((text,)), Request((text[:5],))])
    assert got == [pytest.approx(expected, rel=1e-5), pytest.approx(short, rel=1e-5)]
    with pytest.raises(ValueError, match="expected a text of at least one token, got ''"):
        lm.loglikelihood_rolling([Request((text,)), Request(("",))])
    for n in (1, 4, 5, 11):
        pairs = rolling_pairs(list(range(n)), 99, 4)
        assert [i for _, asked in pairs for i in asked] == list(range(n))
        assert all(len(before) + len(asked) <= 5 for before, asked in pairs)


@pytest.mark.slow
def test_generate_until(harness, params):
    lm = harness_model(MODEL, params, cache="int8")
    [whole] = generate(MODEL, params, "abc", 9, cache="int8", chunk=64).texts
    end = whole[4:6]
    settings = {"until": [end, "#"], "max_gen_toks": 9, "do_sample": False, "temperature": 0.0}
    got = lm.generate_until(
        [Request(("abc", settings)), Request(("abc", {"until": "#", "max_gen_toks": 3}))]
    )
    assert got == [whole[: whole.index(end)], whole[:3]]
    assert lm.generate_until([Request(("abc", {"until": [""], "max_gen_toks": 3}))]) == [whole[:3]]
    with pytest.raises(ValueError, match="max_gen_toks below 64, got 64"):
        lm.generate_until([Request(("abc", {"max_gen_toks": 64}))])
    assert cut("abcabc", ["c", "bc"]) == "a"
    assert cut("abc", []) == "abc"


def test_the_harness_is_imported_on_demand(params, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install sqjax\[eval\]"):
        harness_model(MODEL, params)


def test_the_adapter_needs_a_tokenizer(harness, params):
    with pytest.raises(ValueError, match="a model whose tokenizer names the end of a text"):
        harness_model(Model(CONFIG), params)


def test_a_plain_function_is_no_model(params):
    calls = {
        "perplexity": lambda fn: perplexity(fn, params, np.ones((1, 8), int)),
        "generate": lambda fn: generate(fn, params, [[1]], 3),
        "loglikelihoods": lambda fn: loglikelihoods(fn, params, PAIRS),
        "multiple_choice": lambda fn: multiple_choice(fn, params, []),
    }
    for name, call in calls.items():
        with untyped(), pytest.raises(ValueError, match=f"{name}: expected a .*Model, .*function"):
            call(lambda p, ids: ids)
