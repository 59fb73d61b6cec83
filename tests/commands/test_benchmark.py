"""`sqjax benchmark`, at sizes that take seconds: what its rows run, and what it prints of them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import INT8_DOT, dots

from sqjax.commands import benchmark, cli
from sqjax.models import LlamaConfig, Model

# qwix asks flax for a name that flax has removed.
pytestmark = pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")
TINY = LlamaConfig(300, 32, 64, 1, 4, 2, 8, tie_embeddings=True, max_length=64)
SIZE = benchmark.Size((4,), 8, 1, 1, 32, (4, 1), ((32, 64),))
SITES, ATTENTION = 7 + 1, 2


@pytest.fixture(scope="module")
def tiny():
    model = Model(TINY)
    return model, jax.jit(model.init)(jax.random.key(0))


DECODE = jax.jit(Model(TINY).decode)  # once: jax does not know a bound method again


def test_every_row_has_every_column_and_ratios_are_to_the_base(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "LLAMA_SHAPED", TINY)
    monkeypatch.setattr(benchmark, "PRESETS", ("W8A8_O1",))
    matmul, matvecs, decoder = benchmark.benchmark(SIZE, ("llama-shaped",))
    printed = capsys.readouterr().out
    assert list(matmul.rows)[:3] == [benchmark.BARE, "float32", "bfloat16"]
    assert list(decoder.rows) == ["float32", "bfloat16", "W8A8_O1", "W8A8_O1 fused", benchmark.QWIX]
    columns = (["M = 4", "M = 1"], ["32 to 64"], ["prefill 4", "decode"])
    for table, expected in zip((matmul, matvecs, decoder), columns, strict=True):
        for name, row in table.rows.items():
            if row == benchmark.INSTALL_QWIX:
                continue
            assert list(row) == expected
            assert all(seconds > 0 for seconds in row.values())
            assert re.search(
                rf"^{re.escape(name)} .*{table.ratio(name, expected[0]):.2f}x", printed, re.M
            )
        assert table.ratio(table.base, expected[0]) == 1
    assert f"jax {jax.__version__}" in printed


def test_ratios_are_of_speeds():
    table = benchmark.Table(
        "t", "slow", {"slow": {"a": 0.004}, "fast": {"a": 0.001}, "none": "why"}
    )
    assert table.ratio("fast", "a") == 4
    assert re.search(r"^fast +4\.00x \(1\.00\)$", benchmark.text(table), re.M)
    assert re.search(r"^none +why$", benchmark.text(table), re.M)
    beside = benchmark.Table(
        "t", "W8A8_O1", {"W8A8_O1": {"a": 0.001}, "W8A16": {"a": 1.0}, benchmark.QWIX: {"a": 0.008}}
    )
    assert re.findall(r"^(.*) to qwix +(.*)x$", benchmark.text(beside), re.M) == [
        ("W8A8_O1", "8.00")
    ]
    with pytest.raises(ValueError, match="t: none was not measured: why"):
        table.ratio("none", "a")


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


def test_qwix_runs_the_same_model_with_every_weight_in_int8(tiny):
    pytest.importorskip("qwix", reason='its row needs it: pip install "sqjax[benchmark]"')
    _check_int8(benchmark.qwix_variant(*tiny), *tiny)


def test_without_qwix_its_row_says_how_to_install_it(tiny, monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(benchmark, "import_module", absent)
    monkeypatch.setattr(benchmark, "PRESETS", ())
    variants, notes = benchmark.model_variants(*tiny)
    assert benchmark.QWIX not in variants
    assert "pip install" in notes[benchmark.QWIX]


def test_a_step_reads_the_last_slot_of_a_full_cache(tiny):
    model, params = tiny
    ids = jnp.arange(8, dtype=jnp.int32)[None] % 2
    _, filled = DECODE(params, ids, model.init_cache(1, 8))
    expected, _ = DECODE(params, jnp.zeros((1, 1), jnp.int32), filled._replace(length=jnp.int32(7)))
    run = benchmark._step(benchmark.Variant(model.decode, params), filled, SIZE._replace(short=2))
    first = np.asarray(run())
    np.testing.assert_allclose(first, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(first, run())


def test_presets_are_looked_up_by_name(monkeypatch):
    monkeypatch.setattr(benchmark, "PRESETS", ("W8A8_O1", "NO_SUCH_SCHEME"))
    assert list(benchmark.presets()) == ["W8A8_O1"]


def test_the_command(monkeypatch):
    calls = []
    monkeypatch.setattr(benchmark, "benchmark", lambda *args: calls.append(args))
    assert cli.main(["benchmark"]) == 0
    assert cli.main(["benchmark", "--quick"]) == 0
    assert calls == [(), (benchmark.QUICK, ("llama-shaped",))]
