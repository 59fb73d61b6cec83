"""The main job: `sqjax demo`, its parts on the real model, the README's code, and the examples."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import INT8_DOT, dots, widened

import sqjax as sq
from sqjax.commands import cli, demo
from sqjax.commands import decode as decoding
from sqjax.commands.timing import interleaved
from sqjax.models import LlamaConfig, Model
from sqjax.models.evaluation.perplexity import perplexity, windows
from sqjax.models.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def smollm2():
    """(model, params, windows of the evaluation text, statistics of the calibration text)."""
    model, params = sq.models.load("smollm2-135m")
    text = {
        name: model.tokenizer.encode(demo.shipped(name)) for name in ("calibration", "evaluation")
    }
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        stats = sq.calibrate(
            model.apply, params, [row[None] for row in windows(text["calibration"], 256, 4)]
        )
    return model, params, windows(text["evaluation"], 256, 2), stats


def test_every_group_of_smollm2_folds_and_only_the_tied_head_is_refused(smollm2):
    *_, stats = smollm2
    assert len(stats.graph.sites) == 30 * 7 + 1
    assert len(stats.graph.groups) == 30 * 4
    assert sum(g.norm for g in stats.graph.groups) == 30 * 2
    [(path, reason)] = stats.graph.refused
    assert path == "model/embed_tokens/embedding"
    assert "gather" in reason


def test_every_matmul_with_a_weight_is_int8(smollm2):
    model, params, tokens, stats = smollm2
    qparams = sq.quantize(params, stats, sq.W8A8)
    jaxpr = jax.make_jaxpr(sq.quantized(model.apply))(qparams, jnp.asarray(tokens[:1, :8]))
    found = [dot.dtypes for dot in dots(jaxpr) if "int8" in dot.dtypes]
    assert found == [INT8_DOT] * (30 * 7 + 1)
    assert widened(jaxpr, larger_than=8 * 1536) == []


def test_smoothing_rescues_static_int8_on_the_real_model(smollm2):
    model, params, tokens, stats = smollm2
    s = sq.scales(params, stats, 0.85)
    smoothed = sq.quantize(sq.fold(params, stats.graph, s), sq.fold_stats(stats, s), sq.W8A8_O3)
    plain = perplexity(model, params, tokens)
    unsmoothed = perplexity(model, sq.quantize(params, stats, sq.W8A8_O3), tokens)
    assert 20 < plain < 60
    assert unsmoothed > 1.5 * plain
    assert plain < perplexity(model, smoothed, tokens) < 1.15 * plain


def test_demo_prints_every_row(tmp_path, monkeypatch, capsys):
    model = Model(
        LlamaConfig(600, 32, 64, 2, 4, 2, 8, tie_embeddings=True), tokenizer=_Letters(None, 0)
    )
    params = jax.jit(model.init)(jax.random.key(0))
    monkeypatch.setattr(demo, "load", lambda name: (model, params))
    monkeypatch.setattr(demo, "LENGTH", 64)
    rows = demo.demo(demo.Size(2, 2, 4, 1), 0.5)
    printed = capsys.readouterr().out
    assert [r.name.split(", ")[-1] for r in rows] == [
        "float32",
        *["unsmoothed", "norms only", "all groups"] * 2,
    ]
    assert all(r.name in printed and f"{r.perplexity:.2f}" in printed for r in rows)
    assert len({r.perplexity for r in rows}) == len(rows)
    assert all(r.nbytes < rows[0].nbytes / 2 for r in rows[1:])
    assert all(r.prefill > 0 and r.decode > 0 for r in rows)
    assert demo.PROMPT in printed


def test_decode_prints_both_tables(monkeypatch, capsys):
    model = Model(LlamaConfig(600, 32, 64, 1, 2, 1, 16), tokenizer=_MoreLetters(None, 0))
    params = jax.jit(model.init)(jax.random.key(0))
    size = decoding.Size(
        windows=2, length=64, steps=2, repeats=1, batches=(1, 2), contexts=(8,), copied=1
    )
    qparams = decoding.w8a8(model, params)
    none, exact, *coded = decoding.accuracy(model, params, size)
    assert abs(exact.perplexity / none.perplexity - 1) < 1e-5
    off = {row.cache: abs(row.perplexity / none.perplexity - 1) for row in coded}
    assert 1e-7 < off["int8"] < off["int4"] < 0.05
    assert {row.cache: row.bytes_per_token for row in coded} == {"int8": 40, "e4m3": 40, "int4": 22}

    rows, bandwidth = decoding.speed(model, params, qparams, size)
    assert [(r.batch, r.context) for r in rows[::2]] == [(1, 512), (2, 512), (1, 8)]
    floats = sum(x.size for x in jax.tree.leaves(params)) * 4
    np.testing.assert_allclose(
        rows[4].floor * bandwidth, floats + 10 * 2 * 16 * 4
    )  # 10 slots, 2 layers, keys and values
    assert rows[2].tokens_per_second == 2 / rows[2].seconds

    monkeypatch.setattr(decoding, "load", lambda name: (model, params))
    monkeypatch.setattr(decoding, "w8a8", lambda *_: qparams)
    monkeypatch.setattr(decoding, "speed", lambda *_: (rows, bandwidth))  # measured above
    assert cli.main(["decode", "--quick", "--only", "speed"]) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"W8A8, int8 cache +\d+ +\d+ +[\d.]+ +[\d.]+x", printed)) == 3
    decoding.print_accuracy("float32", [none, *coded])
    assert f"{none.perplexity:.3f}" in (printed := capsys.readouterr().out)
    assert f"{100 * (coded[-1].perplexity / none.perplexity - 1):+.2f}%" in printed


def test_the_head_may_stay_float():
    model = Model(LlamaConfig(60, 32, 64, 1, 4, 2, 8, tie_embeddings=True))
    params = jax.jit(model.init)(jax.random.key(0))
    stats = sq.calibrate(model.apply, params, [jnp.zeros((1, 4), jnp.int32)])
    variant = demo._variant(params, stats, 0.5, "all", sq.W8A8, float_head=True)
    assert (
        variant["model"]["embed_tokens"]["embedding"]
        is params["model"]["embed_tokens"]["embedding"]
    )
    assert isinstance(
        variant["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"], sq.QuantWeight
    )


class _Letters(Tokenizer):
    """A tokenizer of characters."""

    longest = 400

    def encode(self, text):
        return [ord(c) % 600 for c in text[: self.longest]]

    def decode(self, ids):
        return "".join(chr(32 + i % 90) for i in ids)


class _MoreLetters(_Letters):
    longest = 1024


def test_interleaved_times_what_runs():
    calls = []
    seconds = interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, "test"
    )
    assert calls == ["a", "b"] * 4
    assert all(t >= 0 for t in seconds.values())


def test_cli_reports_errors_in_one_line(capsys):
    assert cli.main(["demo", "--model", "no/such/model"]) == 1
    assert "no/such/model" in capsys.readouterr().err


def test_windows_and_perplexity_refuse_what_does_not_fit():
    assert windows(list(range(10)), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match="expected 1 to 2 windows of 4 tokens"):
        windows(list(range(10)), 4, 3)
    model = Model(LlamaConfig(16, 8, 16, 1, 2, 1, 4))
    params = jax.jit(model.init)(jax.random.key(0))
    with pytest.raises(ValueError, match="at least 2 tokens"):
        perplexity(model, params, np.zeros((1, 1), np.int32))
    params["model"]["norm"]["weight"] = params["model"]["norm"]["weight"] * jnp.nan
    with pytest.raises(ValueError, match="NaN"):
        perplexity(model, params, np.zeros((1, 4), np.int32))


def test_perplexity_against_numpy():
    model = Model(LlamaConfig(16, 8, 16, 1, 2, 1, 4))
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = np.asarray(jax.random.randint(jax.random.key(1), (3, 6), 0, 16), np.int32)
    logits = np.asarray(jax.jit(model.apply)(params, jnp.asarray(tokens)), np.float64)[:, :-1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.exp(-np.take_along_axis(log_p, tokens[:, 1:, None], -1).mean())
    assert perplexity(model, params, tokens) == pytest.approx(expected, rel=1e-5)


def test_readme_code_runs_as_written():
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_readme_has_exactly_two_setup_commands():
    commands = re.findall(r"^python -m pip install.*$", (ROOT / "README.md").read_text(), re.M)
    assert len(commands) == 2
    assert "sqjax demo" in commands[0]
    assert "pytest" in commands[1]


@pytest.mark.parametrize("example", sorted(p.name for p in (ROOT / "examples").glob("*.py")))
def test_examples_compile_and_say_how_to_run(example):
    source = (ROOT / "examples" / example).read_text()
    assert f"python examples/{example}" in source
    runpy.run_path(str(ROOT / "examples" / example), run_name="not main")
