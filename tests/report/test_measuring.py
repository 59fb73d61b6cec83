"""`measure` and `inspect` on tiny models: sizes, refusals, errors, perplexities, texts."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import GROUPED, Letters, random_ids, random_params
from untyped import untyped

import sqjax as sq
from sqjax.calibration.stats import outlier_ratio
from sqjax.report import inspect, measure
from sqjax.report.activations import seen_at

RNG = np.random.default_rng(0)


def fn(params, x):
    """One site that a norm absorbs the scale of, one that nothing does."""
    hidden = (x * params["norm"]) @ params["up"]["kernel"]
    return jnp.exp(hidden) @ params["down"]["kernel"] + params["bias"]


PARAMS = {
    "norm": jnp.ones((1, 4)),
    "up": {"kernel": jnp.float32(0.3 * RNG.normal(size=(4, 6)))},
    "down": {"kernel": jnp.float32(RNG.normal(size=(6, 2)))},
    "bias": jnp.ones((1, 2)),
}
X = jnp.array([[1.0, -2.0, 30.0, 0.0], [0.5, 3.0, -40.0, 0.0]])


@pytest.mark.slow
def test_inspect_says_how_large_and_what_is_refused():
    found = inspect(fn, PARAMS, [X / 40])
    up = next(site for site in found.sites if site.path == "up/kernel")
    down = next(site for site in found.sites if site.path == "down/kernel")
    assert (up.absorbed_by, up.refused) == (("norm",), "")
    assert down.absorbed_by == ()
    assert "`exp`" in down.refused
    assert up.outlier_ratio == pytest.approx(40 / 3)  # of 1, 3 and 40; the dead channel left out
    assert (up.shape, up.tokens, up.bytes) == ((4, 6), 2, 96)
    assert found.bytes == 4 * (4 + 24 + 12 + 2)
    assert found.site_bytes == 4 * (24 + 12)
    assert json.loads(json.dumps(found.as_dict()))["sites"][0]["path"] == found.sites[0].path
    text = str(found)
    assert "4 leaves, 168 B: 2 sites of 144 B" in text
    assert "13.3" in text
    assert "refused down/kernel" in text


def test_inspect_reads_no_batch_where_the_statistics_are_known():
    stats = sq.calibrate(fn, PARAMS, [X / 40])
    assert inspect(fn, PARAMS, [], stats=stats) == inspect(fn, PARAMS, [X / 40])
    with pytest.raises(ValueError, match="the site up/kernel, which is no leaf of these"):
        inspect(fn, {"norm": jnp.ones((1, 4))}, [], stats=stats)


def test_the_ratio_of_nothing_is_0():
    assert outlier_ratio([0, 0]) == 0
    assert outlier_ratio([1, 2, 3, 0, 40]) == 16


def test_what_is_seen_at_a_site_is_its_activation_and_its_weight():
    found = seen_at(fn, PARAMS, X / 40, "down/kernel")
    hidden = np.exp(np.asarray(X / 40) @ np.asarray(PARAMS["up"]["kernel"]))
    np.testing.assert_allclose(found.activation, hidden, rtol=1e-5)
    np.testing.assert_array_equal(found.weight, np.abs(PARAMS["down"]["kernel"]).T)
    with pytest.raises(ValueError, match="norm: no matmul of an activation meets this leaf"):
        seen_at(fn, PARAMS, X, "norm")


@pytest.mark.slow
@pytest.mark.each_case
def test_of_a_stack_the_matrix_with_the_largest_activation_is_seen():
    stack = {"w": jnp.stack([jnp.eye(3), 5 * jnp.eye(3), 0.1 * jnp.eye(3)])}

    def scanned(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]

    x = jnp.array([[1.0, 2.0, 3.0]])
    found = seen_at(scanned, stack, x, "w")
    np.testing.assert_array_equal(found.activation, [[5, 10, 15]])
    np.testing.assert_array_equal(found.weight, 0.1 * np.eye(3, dtype=np.float32))


@pytest.mark.slow
def test_measure_records_what_the_page_shows():
    model = sq.models.Model(replace(GROUPED, num_layers=1))
    params = random_params(model)
    batches, windows = [random_ids(2, 16)], random_ids(2, 12, seed=3)
    rules = {"embed": None, ".*": sq.W8A8_O3}
    made = measure(
        model, params, batches, windows, scheme=rules, alpha=0.7, alphas=(0.7,), repeats=0
    )

    exact, plain, smooth = made.variants
    assert exact.perplexity == pytest.approx(sq.models.perplexity(model, params, windows))
    smoothed = sq.smoothquant(model.apply, params, batches, 0.7, rules)
    value = sq.models.perplexity(model, smoothed, windows)
    assert smooth.perplexity == pytest.approx(value, rel=1e-4)
    assert made.alphas == ((0.7, pytest.approx(value, rel=1e-4)),)
    assert plain.perplexity != smooth.perplexity
    assert exact.bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert exact.bytes > smooth.bytes == plain.bytes

    stats = sq.calibrate(model.apply, params, batches)
    errors = sq.site_errors(model.apply, params, sq.quantize(params, stats, rules), windows[:1])
    rows = {row.path: row for row in made.sites}
    assert rows.keys() == {site.path for site in stats.graph.sites}
    for path, error in errors.items():
        assert rows[path].unsmoothed.snr_db == pytest.approx(error.snr_db, abs=1e-3)
        assert rows[path].scheme == "W8A8_O3"
    head = rows["model/embed_tokens/embedding"]
    assert (head.scheme, head.smoothed.snr_db, head.absorbed_by) == ("float", None, ())
    assert "is an embedding" in head.refused
    assert {surface.what for surface in made.surfaces} == {"activation", "weight"}
    assert made.recipe["scheme"] == "embed: float, .*: W8A8_O3"


def test_measure_refuses_what_can_be_known_before_anything_long_begins():
    model = sq.models.Model(GROUPED)
    with pytest.raises(ValueError, match="prompts need a model with a tokenizer"):
        measure(model, {}, [], None, prompts=["a"])
    with pytest.raises(ValueError, match="measure: alpha: expected a number in"):
        measure(model, {}, [], None, alphas=[2.0])
    with_letters = sq.models.Model(GROUPED, Letters(None, 0))
    with pytest.raises(ValueError, match="prompts=: expected a list of texts, got 'abc'"):
        measure(with_letters, {}, [], None, prompts="abc")
    with untyped(), pytest.raises(ValueError, match=r"expected a sqjax\.models\.Model"):
        measure(fn, PARAMS, [], None)
