"""`sqjax benchmark`, at sizes that take seconds: what its rows run, and what it prints of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import INT8_DOT, dots
from tiny_llama import random_params

import sqjax as sq
from sqjax.commands import benchmark
from sqjax.commands.layouts_of_speed import QWIX, SECONDS
from sqjax.models import LlamaConfig, Model

# qwix asks flax for a name that flax has removed.
pytestmark = pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")
TINY = LlamaConfig(300, 32, 32, 1, 4, 2, 8, tie_embeddings=True, max_length=64)
SIZE = benchmark.Size((4,), 8, 1, 1, 32, (4, 1), ((32, 64),))
SITES, ATTENTION = 7 + 1, 2


@pytest.fixture(scope="module")
def tiny():
    model = Model(TINY)
    return model, random_params(model)


# Compiled once, because jax does not know a bound method again.
DECODE = jax.jit(Model(TINY).decode)


@pytest.mark.slow
def test_every_row_has_every_column(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "LLAMA_CONFIG", TINY)
    monkeypatch.setattr(benchmark, "PRESETS", {"W8A8_O1": sq.W8A8_O1})
    rows = benchmark.benchmark(SIZE, ("llama-shaped",))
    printed = capsys.readouterr().out
    columns = {
        "matmul": {"M = 4 seconds", "M = 1 seconds"},
        "matvec": {"32 to 64 seconds"},
        "model": {"prefill 4 seconds", "decode seconds"},
    }
    names = {table: [] for table in columns}
    for row in rows:
        names[row["table"]].append(row["name"])
        assert row["name"] in printed
        if "note" not in row:
            assert {key for key in row if key.endswith(SECONDS)} == columns[row["table"]]
            assert all(row[key] > 0 for key in columns[row["table"]])
    matmuls = ["float32", "bfloat16", "W8A8_O1"]
    assert names["matmul"] == [benchmark.BARE, *matmuls]
    assert names["matvec"] == matmuls
    assert names["model"] == [*matmuls, "W8A8_O1 fused", QWIX]
    assert f"jax {jax.__version__}" in printed


def test_rows_are_made_of_columns():
    columns = {"a": {"x": 1.0, "y": 2.0}, "b": {"x": 3.0, "y": 4.0}}
    assert benchmark.timed_rows({"table": "t"}, columns) == [
        {"table": "t", "name": "x", "a seconds": 1.0, "b seconds": 3.0},
        {"table": "t", "name": "y", "a seconds": 2.0, "b seconds": 4.0},
    ]


@pytest.mark.slow
def test_w8a8_rows_run_every_weight_in_int8_and_mean_the_same(tiny):
    model, params = tiny
    variants, _ = benchmark.model_variants(model, params)
    for name in ("W8A8_O1", "W8A8_O3"):
        _check_int8(variants[name], model, params)
    _check_int8(variants["W8A8_O1 fused"], model, params, sites=SITES - 3)


def _check_int8(variant, model, params, sites=SITES):
    """Only attention's two matmuls are float, and the logits are near the float model's."""
    ids, cache = jnp.arange(6, dtype=jnp.int32)[None], model.init_cache(1, 8)
    found = [dot.dtypes for dot in dots(jax.make_jaxpr(variant.decode)(variant.params, ids, cache))]
    assert len(found) - found.count(INT8_DOT) == ATTENTION
    assert (
        found.count(INT8_DOT) >= sites
    )  # the head, of one row, has a form for this processor and one for others
    logits, grown = jax.jit(variant.decode)(variant.params, ids, cache)
    expected, wanted = DECODE(params, ids, cache)
    assert 0 < np.linalg.norm(logits - expected) < 0.1 * np.linalg.norm(expected)
    assert grown.length == wanted.length == 6


@pytest.mark.slow
def test_qwix_runs_the_same_model_with_every_weight_in_int8(tiny):
    pytest.importorskip("qwix", reason='its row needs it: pip install "sqjax[benchmark]"')
    _check_int8(benchmark.qwix_variant(*tiny), *tiny)


def test_without_qwix_its_row_says_how_to_install_it(tiny, monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(benchmark, "import_module", absent)
    monkeypatch.setattr(benchmark, "PRESETS", {})
    monkeypatch.setattr(benchmark, "calibrate", lambda *_: None)  # presets alone need it
    variants, notes = benchmark.model_variants(*tiny)
    assert list(variants) == ["float32", "bfloat16"]
    assert "pip install" in notes[QWIX]


@pytest.mark.slow
def test_a_step_reads_the_last_slot_of_a_full_cache(tiny):
    model, params = tiny
    ids = jnp.arange(8, dtype=jnp.int32)[None] % 2
    _, filled = DECODE(params, ids, model.init_cache(1, 8))
    expected, _ = DECODE(params, jnp.zeros((1, 1), jnp.int32), filled._replace(length=jnp.int32(7)))
    run = benchmark.decode_steps(
        benchmark.Variant(model.decode, params), filled, SIZE._replace(short=2)
    )
    first = np.asarray(run())
    np.testing.assert_allclose(first, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(first, run())
