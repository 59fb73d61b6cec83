"""The main job: `sqjax demo` and `sqjax decode` on a tiny model, the parts they are made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sqjax as sq
from sqjax.commands import benchmark, cli, demo, schemes
from sqjax.commands import decode as decoding
from sqjax.commands.shared import text_windows
from sqjax.models import LlamaConfig, Model
from sqjax.models.tokenizer import Tokenizer
from sqjax.report.timing import interleaved
from sqjax.weights.sizes import weight_bytes


class _Letters(Tokenizer):
    """A tokenizer of characters, which reads the first 400 of them."""

    longest = 400

    def encode(self, text):
        return [ord(c) % 600 for c in text[: self.longest]]

    def decode(self, ids):
        return "".join(chr(32 + i % 90) for i in ids)


class _MoreLetters(_Letters):
    longest = 1024


class _MostLetters(_Letters):
    longest = 5000


def tiny(config, tokenizer=None):
    model = Model(config, tokenizer)
    return model, jax.jit(model.init)(jax.random.key(0))


@pytest.mark.slow
def test_demo_prints_every_row(monkeypatch, capsys):
    config = LlamaConfig(600, 32, 32, 1, 4, 2, 8, tie_embeddings=True)
    model, params = tiny(config, _Letters(None, 0))
    monkeypatch.setattr(demo, "load", lambda name: (model, params))
    monkeypatch.setattr(demo, "LENGTH", 64)
    monkeypatch.setattr(demo, "SCHEMES", {"O1 per-token": sq.W8A8_O1})
    rows = demo.demo(demo.Size(2, 2, 4, 1), 0.5)
    printed = capsys.readouterr().out
    smoothings = ["unsmoothed", "norms only", "all groups"]
    assert [r.name.split(", ")[-1] for r in rows] == ["float32", *smoothings]
    assert all(r.name in printed and f"{r.perplexity:.2f}" in printed for r in rows)
    assert len({r.perplexity for r in rows}) == len(rows)
    assert all(r.weight_bytes < rows[0].weight_bytes / 2 for r in rows[1:])
    for row in rows:
        assert row.prefill_tokens_per_second > 0
        assert row.decode_tokens_per_second > 0
    assert printed.count(demo.PROMPT) == 2


@pytest.mark.slow
def test_schemes_prints_every_row(monkeypatch, capsys):
    config = LlamaConfig(600, 32, 32, 1, 4, 2, 8, tie_embeddings=True)
    model, params = tiny(config, _Letters(None, 0))
    monkeypatch.setattr(schemes, "load", lambda name: (model, params))
    monkeypatch.setattr(schemes, "LENGTH", 64)
    monkeypatch.setattr(schemes, "SCHEMES", {"O3": sq.W8A8_O3_ROTATED})
    rows = schemes.compare(demo.Size(2, 2, 0, 0), 0.5)
    printed = capsys.readouterr().out
    assert [row.name for row in rows] == ["float32", "O3", "W8A8 O1, int8 attention"]
    float32, *others = rows
    assert float32.smoothed_perplexity == pytest.approx(float32.unsmoothed_perplexity, rel=1e-4)
    for row in others:
        assert 0 < abs(row.unsmoothed_perplexity / float32.unsmoothed_perplexity - 1) < 0.05
        assert row.weight_bytes < float32.weight_bytes / 2
        assert f"{row.name}: {row.unsmoothed_perplexity:.2f}, smoothed" in printed


@pytest.mark.slow
def test_decode_measures_caches_and_steps():
    model, params = tiny(LlamaConfig(600, 32, 32, 1, 2, 1, 16), _MoreLetters(None, 0))
    size = decoding.Size(
        windows=2, length=64, steps=2, repeats=1, batches=(2,), contexts=(512, 8), copied=1
    )
    variants = {"float32": params, "W8A8": decoding.w8a8(model, params)}
    none, exact, *coded = decoding.accuracy(model, {"float32": params}, size)
    assert abs(exact.perplexity / none.perplexity - 1) < 1e-5
    off = {row.cache: abs(row.perplexity / none.perplexity - 1) for row in coded}
    assert 1e-7 < off["int8"] < off["int4"] < 0.05
    assert {row.cache: row.bytes_per_token for row in coded} == {"int8": 40, "e4m3": 40, "int4": 22}

    rows = decoding.speed(model, variants, size)
    cases = [(row.batch, row.context_tokens) for row in rows]
    assert cases[::2] == cases[1::2] == [(2, 512), (1, 8)]
    assert [row.weights for row in rows] == ["float32", "W8A8"] * 2
    assert all(row.seconds_per_step > 0 for row in rows)
    floats = sum(x.size for x in jax.tree.leaves(params)) * 4
    cached = 10 * 2 * 16 * 4  # 10 slots, keys and values, 16 channels, 4 bytes
    floor, bandwidth = rows[2].floor_seconds_per_step, rows[2].copy_bytes_per_second
    np.testing.assert_allclose(floor * bandwidth, floats + cached)


ACCURACY = [decoding.Accuracy("caches", w, "none", 40.0, 0.0) for w in ("float32", "W8A8")]
SPEED = [
    decoding.Speed("steps", "float32", "float", 1, 128, 0.03, 0.01, 12e9),
    decoding.Speed("steps", "W8A8", "int8", 1, 128, 0.01, 0.001, 12e9),
]


@pytest.mark.parametrize("only", [None, "accuracy", "speed"])
def test_decode_prints_the_tables_that_are_asked_for(monkeypatch, capsys, only):
    model = Model(LlamaConfig(600, 32, 32, 1, 2, 1, 16), _MostLetters(None, 0))
    monkeypatch.setattr(decoding, "load", lambda name: (model, {}))
    monkeypatch.setattr(decoding, "w8a8", lambda *_: {})
    monkeypatch.setattr(decoding, "accuracy", lambda *_: ACCURACY)
    monkeypatch.setattr(decoding, "speed", lambda *_: SPEED)
    rows = decoding.run("tiny", only=only)
    printed = capsys.readouterr().out
    expected = {None: ACCURACY + SPEED, "accuracy": ACCURACY, "speed": SPEED}[only]
    assert rows == [row._asdict() for row in expected]
    assert ("bytes a token" in printed) == (only != "speed")
    assert ("3.00x" in printed) == (only != "accuracy")
    assert ("12.0 GB/s" in printed) == (only != "accuracy")


def model_of(length, letters=_MostLetters):
    return Model(LlamaConfig(600, 32, 32, 1, 2, 1, 16, max_length=length), letters(None, 0))


@pytest.mark.parametrize(
    ("length", "contexts"),
    [(1024, (128, 512)), (2048, (128, 512, 1024)), (2064, (128, 512, 1024, 2048))],
)
def test_contexts_that_do_not_fit_are_left_out_before_anything_is_measured(
    capsys, length, contexts
):
    assert decoding.fitting(model_of(length), decoding.Size()).contexts == contexts
    said = capsys.readouterr().out
    assert ("left out: contexts of" in said) == (len(contexts) < 4)


class NoWork:
    """In the place of what takes minutes."""

    def __call__(self, *_, **__):
        pytest.fail("the work began before the arguments were checked")


@pytest.mark.parametrize(
    ("length", "letters", "only", "message"),
    [
        (
            256,
            _MostLetters,
            None,
            "windows of text of 512 tokens: expected a model that takes as many",
        ),
        (512, _MostLetters, None, "a context and its steps of 528 tokens"),
        (128, _MostLetters, "speed", "windows of text of 256 tokens"),
        (4096, _MoreLetters, None, "expected 1 to 2 windows of 512 tokens"),
    ],
)
def test_decode_checks_the_model_first(monkeypatch, length, letters, only, message):
    monkeypatch.setattr(decoding, "load", lambda name: (model_of(length, letters), {}))
    monkeypatch.setattr(decoding, "w8a8", NoWork())
    with pytest.raises(ValueError, match=message):
        decoding.run("tiny", only=only)


@pytest.mark.parametrize("alpha", [2.0, -0.1, float("nan")])
def test_alpha_is_checked_before_a_model_is_loaded(monkeypatch, capsys, alpha):
    for module, run in ((demo, demo.demo), (schemes, schemes.compare)):
        monkeypatch.setattr(module, "load", NoWork())
        with pytest.raises(
            ValueError, match="alpha: expected a smoothing strength from 0 to 1, got"
        ):
            run(alpha=alpha, size=demo.QUICK)
    for command in ("demo", "schemes"):
        assert cli.main([command, "--alpha", str(alpha)]) == 2
        assert "sqjax: alpha: expected a smoothing strength" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (model_of(256), "windows of text of 512 tokens"),
        (model_of(512, lambda *_: None), "expected a model with a tokenizer"),
    ],
)
def test_demo_and_schemes_check_the_model_first(monkeypatch, model, message):
    for module, run in ((demo, demo.demo), (schemes, schemes.compare)):
        monkeypatch.setattr(module, "load", lambda name: (model, {}))
        monkeypatch.setattr(module, "calibrate", NoWork())
        with pytest.raises(ValueError, match=message):
            run(demo.QUICK)


def test_benchmark_checks_the_names_first(monkeypatch):
    monkeypatch.setattr(benchmark, "square_matmul", NoWork())
    with pytest.raises(ValueError, match="no/such: expected one of"):
        benchmark.benchmark(benchmark.QUICK, ("llama-shaped", "no/such"))


@pytest.mark.slow
def test_the_head_may_stay_float():
    params = {"q_proj": jnp.ones((8, 4)), "lm_head": jnp.ones((4, 6))}
    stats = sq.calibrate(lambda p, x: x @ p["q_proj"] @ p["lm_head"], params, [jnp.ones((2, 8))])
    for groups in (None, "norm", "all"):
        tree = demo.quantized_variant(params, stats, 0.5, groups, sq.W8A8, float_head=True)
        assert isinstance(tree["q_proj"], sq.QuantWeight)
        assert isinstance(tree["lm_head"], jax.Array)
    tree = demo.quantized_variant(params, stats, 0.5, None, sq.W8A8)
    assert isinstance(tree["lm_head"], sq.QuantWeight)


@pytest.mark.slow
def test_bytes_of_a_tree_count_int4_as_half_a_byte():
    params = {"w": jnp.ones((128, 4)), "b": jnp.ones(4)}
    floats = 4 * 4  # the bias; and also the scales of the weight's channels
    fn = lambda p, x: x @ p["w"] + p["b"][None]
    stats = sq.calibrate(fn, params, [jnp.ones((2, 128))])
    assert weight_bytes(params) == 4 * 128 * 4 + floats
    assert weight_bytes(sq.quantize(params, stats, sq.W8A16)) == 128 * 4 + 2 * floats
    static = sq.quantize(params, stats, sq.W8A8_O3)
    assert weight_bytes(static) == 128 * 4 + 2 * floats + 4  # one scale for all activations
    in_int4 = sq.quantize(params, stats, sq.W4A16)
    beside = in_int4["w"].tensor.scale.nbytes + in_int4["w"].tensor.zero.nbytes
    assert weight_bytes(in_int4) == 128 * 4 // 2 + beside + floats


def test_texts_need_a_tokenizer():
    config = LlamaConfig(600, 32, 32, 1, 4, 2, 8)
    assert text_windows(Model(config, _Letters(None, 0)), "calibration", 8, 3).shape == (3, 8)
    with pytest.raises(ValueError, match="expected a model with a tokenizer, got one without"):
        text_windows(Model(config), "calibration", 8, 3)


def test_interleaved_times_what_runs():
    calls = []
    runs = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = interleaved(runs, 3, "test")
    assert calls == ["a", "b"] * 4
    assert all(t >= 0 for t in seconds.values())
