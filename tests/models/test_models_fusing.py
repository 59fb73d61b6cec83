"""q/k/v and gate/up stored as one kernel: the same function, fewer matmuls."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from flax import linen as nn
from slow import slow_but

import sqjax as sq
from sqjax.models import LlamaConfig, Model, fuse
from sqjax.weights.quant_weight import is_quantized

MODEL = Model(LlamaConfig(50, 64, 96, 1, 4, 2, 16, attention_bias=True))
IDS = jnp.arange(12).reshape(2, 6) % 50
FORMS = {
    "float": None,
    "O1": sq.W8A8,
    "O2": sq.W8A8_O2,
    "O3": sq.W8A8_O3,
    "per tensor": sq.W8A8.replace(weight=sq.Int8(per_tensor=True)),
    "smoothed at run time": sq.W8A8.replace(smoothing=0.5),
    "outliers": sq.W8A8_OUTLIERS.replace(outliers=2.0),
    "W4A16": sq.W4A16.replace(weight=sq.Int4(group_size=32, zero_point=True)),
    "W4A8": sq.W4A8.replace(weight=sq.Int4(group_size=32, zero_point=True, two_level=True)),
    "FP8": sq.FP8,
    "apart": {"gate_proj": sq.W8A16, "v_proj": None, ".*": sq.W8A8},
}


@cache
def params_of_model():
    params = jax.jit(MODEL.init)(jax.random.key(0))
    bias = lambda path, x: (
        x if "bias" not in str(path) else jnp.arange(x.size, dtype=x.dtype) / x.size
    )
    return jax.tree_util.tree_map_with_path(bias, params)


@cache
def calibrated():
    return sq.calibrate(MODEL.apply, params_of_model(), [IDS])


@cache
def params_in(form):
    """The model's parameters, float or quantized as FORMS says."""
    params = params_of_model()
    return params if FORMS[form] is None else sq.quantize(params, calibrated(), FORMS[form])


def run_dense(layer, x):
    """x through a Dense layer, float or quantized, of whatever features its parameters have."""
    features = layer["kernel"].shape[-1]
    kind = sq.linen.QuantDense if is_quantized(layer["kernel"]) else nn.Dense
    return kind(features, use_bias="bias" in layer).apply({"params": layer}, x)


@pytest.mark.parametrize("form", slow_but(list(FORMS), "float", "O3", "outliers", "apart"))
@pytest.mark.slow
def test_one_kernel_gives_the_outputs_of_its_parts_side_by_side(form):
    params = params_in(form)
    one = fuse(params)
    parts, layer = (tree["model"]["layers"]["0"] for tree in (params, one))
    if form in ("apart", "smoothed at run time"):  # there every site has an s of its own
        assert set(layer["self_attn"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
        assert set(layer["mlp"]) == {"gate_proj", "up_proj", "down_proj"}
        assert jax.tree.structure(one) == jax.tree.structure(params)
        return
    assert set(layer["self_attn"]) == {"q_proj+k_proj+v_proj", "o_proj"}
    assert set(layer["mlp"]) == {"gate_proj+up_proj", "down_proj"}
    assert layer["self_attn"]["q_proj+k_proj+v_proj"]["kernel"].shape == (64, 8 * 16)
    assert layer["self_attn"]["q_proj+k_proj+v_proj"]["bias"].shape == (8 * 16,)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 64)), jnp.float32)
    pairs = [("self_attn", "q_proj+k_proj+v_proj"), ("mlp", "gate_proj+up_proj")]

    @jax.jit
    def outputs(parts, layer, x):
        expected = [[run_dense(parts[a][n], x) for n in b.split("+")] for a, b in pairs]
        return [jnp.concatenate(e, axis=-1) for e in expected], [
            run_dense(layer[a][b], x) for a, b in pairs
        ]

    for expected, got in zip(*outputs(parts, layer, x), strict=True):
        largest = float(jnp.abs(expected).max())
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.parametrize("form", slow_but(("O3", "float", "outliers", "W4A8"), "O3"))
@pytest.mark.slow
def test_is_the_same_function_with_fewer_matmuls(form):
    params = params_in(form)
    one, fn = fuse(params), jax.jit(sq.quantized(MODEL.apply))
    expected, got = fn(params, IDS), fn(one, IDS)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))
    dots = [len(jaxprs.dots(jaxprs.of(fn, tree, IDS))) for tree in (params, one)]
    assert dots[0] - dots[1] >= 3


@pytest.mark.slow
def test_decodes_as_before():
    qparams = params_in("O1")
    decode = jax.jit(sq.quantized(MODEL.decode))
    expected, _ = decode(qparams, IDS, MODEL.init_cache(2, 8))
    got, _ = decode(fuse(qparams), IDS, MODEL.init_cache(2, 8))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(expected).max()) > 0.1


@pytest.mark.slow
def test_kernels_that_meet_other_scales_stay_apart():
    params, stats = params_of_model(), calibrated()
    qparams = jax.tree.map(lambda x: x, params_in("O3"))  # dicts of its own
    layer = qparams["model"]["layers"]["0"]["self_attn"]
    layer["k_proj"]["kernel"] = sq.quantize(
        params, replace(stats, absmax={p: 2 * x for p, x in stats.absmax.items()}), sq.W8A8_O3
    )["model"]["layers"]["0"]["self_attn"]["k_proj"]["kernel"]
    one = fuse(qparams)["model"]["layers"]["0"]
    assert "k_proj" in one["self_attn"]
    assert "up_proj" not in one["mlp"]
