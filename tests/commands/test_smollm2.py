"""Quantizing the real model of `sqjax demo`: what folds, what runs in int8, what smoothing gains."""

import jax
import jax.numpy as jnp
import pytest
import real_models
from jaxprs import INT8_DOT, dots, widened

import sqjax as sq
from sqjax.commands.shared import text_windows
from sqjax.models import stack_layers
from sqjax.models.evaluation.perplexity import perplexity

pytestmark = pytest.mark.slow


#: Of 30; the first ones have the outliers that the demo shows.
LAYERS = 6


@pytest.fixture(scope="module", params=[pytest.param(None, marks=pytest.mark.every_case), LAYERS])
def smollm2(request):
    """(model, params, windows of the evaluation text, statistics of the calibration text).

    Of the whole model, or of its first layers, the last of which the head reads; these are in one
    stack, because a program of one layer is sooner compiled than one of several.
    """
    model, params = real_models.smollm2()
    if request.param:
        model, params = real_models.first_layers(model, params, LAYERS)
        params = stack_layers(params)
    batches = [row[None] for row in text_windows(model, "calibration", 128, 2)]
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        stats = sq.calibrate(model.apply, params, batches)
    return model, params, text_windows(model, "evaluation", 128, 1), stats


def written_out(params):
    """How many layers the program is written out for: a stack is a loop over one."""
    return sum(name.isdigit() for name in params["model"]["layers"]) or 1


def test_every_group_of_smollm2_folds_and_only_the_tied_head_is_refused(smollm2):
    _, params, _, stats = smollm2
    layers = written_out(params)
    assert len(stats.graph.sites) == layers * 7 + 1
    assert len(stats.graph.groups) == layers * 4
    assert sum(g.norm for g in stats.graph.groups) == layers * 2
    [(path, reason)] = stats.graph.refused
    assert path == "model/embed_tokens/embedding"
    assert "gather" in reason


def test_every_matmul_with_a_weight_is_int8(smollm2):
    model, params, tokens, stats = smollm2
    qparams = sq.quantize(params, stats, sq.W8A8)
    jaxpr = jax.make_jaxpr(sq.quantized(model.apply))(qparams, jnp.asarray(tokens[:1, :8]))
    found = [dot.dtypes for dot in dots(jaxpr) if "int8" in dot.dtypes]
    assert found == [INT8_DOT] * (written_out(params) * 7 + 1)
    assert widened(jaxpr, larger_than=8 * 1536) == []


def test_smoothing_rescues_static_int8_on_the_real_model(smollm2):
    """Seen in the logits' error; and in the perplexity, which the first layers alone do not have."""
    model, params, tokens, stats = smollm2
    s = sq.scales(params, stats, 0.85)
    smoothed = sq.quantize(sq.fold(params, stats.graph, s), sq.fold_stats(stats, s), sq.W8A8_O3)
    unsmoothed = sq.quantize(params, stats, sq.W8A8_O3)
    ids = jnp.asarray(tokens[:1, :-1])
    exact = jax.jit(model.apply)(params, ids)
    run = jax.jit(sq.quantized(model.apply))
    error = [float(jnp.linalg.norm(run(q, ids) - exact)) for q in (unsmoothed, smoothed)]
    assert error[1] < 0.7 * error[0]
    if model.config.num_layers == LAYERS:
        return
    plain = perplexity(model, params, tokens)
    assert 20 < plain < 60
    assert perplexity(model, unsmoothed, tokens) > 1.5 * plain
    assert plain < perplexity(model, smoothed, tokens) < 1.25 * plain
