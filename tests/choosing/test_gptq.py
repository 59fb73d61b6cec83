"""gptq beside quantize: errors of whole functions in float64, every kind of site and scheme."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from slow import slow_but

import sqjax as sq
from sqjax.choosing import gptq as module
from sqjax.choosing.gptq import gptq

FEATURES, OUTPUTS = 24, 10
W4 = sq.Scheme(weight=sq.Int4(group_size=8, zero_point=True), activation=None)
TWO_LEVELS = sq.W4A8.replace(weight=sq.W4A8.weight.replace(group_size=8))


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def activations(seed, *shape):
    """Correlated channels of unlike sizes."""
    mixing = draw(seed, shape[-1], shape[-1]) * np.exp(draw(seed + 1, shape[-1]))
    return jnp.asarray(draw(seed + 2, *shape) @ mixing, jnp.float32)


def scanned(w, x):
    return lax.scan(lambda carry, pair: (carry, pair[0] @ pair[1]), 0, (x, w))[1]


#: {kind of site: (function of one weight, the weight's shape, the activation's shape)}.
KINDS = {
    "plain": (lambda w, x: x @ w, (FEATURES, OUTPUTS), (40, FEATURES)),
    "transposed": (lambda w, x: x @ w.T, (OUTPUTS, FEATURES), (40, FEATURES)),
    "two axes": (
        lambda w, x: jnp.einsum("tji,ioj->to", x, w),
        (3, OUTPUTS, 8),
        (40, 8, 3),
    ),
    "layers": (scanned, (3, FEATURES, OUTPUTS), (3, 40, FEATURES)),
    "experts": (
        lambda w, x: jnp.einsum("eti,oei->eto", x, w),
        (OUTPUTS, 3, FEATURES),
        (3, 40, FEATURES),
    ),
    "ragged": (
        lambda w, x: lax.ragged_dot(x, w, jnp.cumsum(jnp.int32(x[:3, 0] * 0 + 6))),
        (3, FEATURES, OUTPUTS),
        (36, FEATURES),
    ),
}
SCHEMES = {
    "zero points": W4,
    "symmetric": W4.replace(weight=sq.Int4(group_size=8)),
    "per channel": W4.replace(weight=sq.Int4()),
    "per tensor": W4.replace(weight=sq.Int4(per_tensor=True)),
    "int8": sq.W8A16,
    "two levels": TWO_LEVELS,
    "static": sq.W8A8_O3,
    "float8": sq.FP8,
}


def case(kind, seed=0):
    """(fn, params, x, statistics)."""
    apply, shape, tokens = KINDS[kind]
    fn = lambda params, x: apply(params["w"], x)
    params = {"w": jnp.asarray(draw(seed, *shape), jnp.float32)}
    x = activations(seed, *tokens)
    return fn, params, x, sq.calibrate(fn, params, [x], gram=True)


def loss(fn, params, qparams, x):
    """|fn with the quantized weight, as a float array, - fn| squared."""
    narrow = {"w": sq.dequantize(qparams["w"].tensor)}
    return float(np.square(np.asarray(fn(narrow, x) - fn(params, x), float)).sum())


CASES = {f"{kind}, zero points": (kind, "zero points") for kind in KINDS}
CASES |= {f"two axes, {scheme}": ("two axes", scheme) for scheme in SCHEMES}


@pytest.mark.parametrize(
    ("kind", "scheme"), slow_but(CASES, "two axes, two levels", "layers, zero points")
)
def test_the_outputs_are_nearer_and_the_rest_is_as_quantize_makes_it(kind, scheme):
    fn, params, x, stats = case(kind)
    usual = sq.quantize(params, stats, SCHEMES[scheme])
    found = gptq(params, stats, SCHEMES[scheme])
    assert loss(fn, params, found, x) < 0.7 * loss(fn, params, usual, x)
    found["w"].tensor.check("w")
    same_codes = {"w": module.replace(found["w"], tensor=usual["w"].tensor)}
    assert jax.tree.all(jax.tree.map(np.array_equal, same_codes, usual))
    beside = [
        (q.tensor.scale, q.tensor.zero, q.tensor.group_scale) for q in (found["w"], usual["w"])
    ]
    assert jax.tree.all(jax.tree.map(np.array_equal, *beside))


def test_two_levels_stay_inside_of_int8():
    fn, params, x, stats = case("plain")
    # Steps of 16 at the first level: 8 of them would be 128.
    params = {"w": params["w"].at[0].set(9).at[1].set(-9)}
    stats = sq.calibrate(fn, params, [x], gram=True)
    tensor = gptq(params, stats, TWO_LEVELS)["w"].tensor
    wide = np.asarray(tensor.values, int) - np.asarray(tensor.spread(tensor.zero))
    wide = wide * np.asarray(tensor.spread(tensor.group_scale), int)
    assert abs(wide).max() <= 127
    assert tensor.group_scale.max() == 16


@pytest.mark.parametrize(
    "scheme",
    slow_but(
        {
            "smoothing": TWO_LEVELS.replace(smoothing=0.5),
            "outliers": sq.W8A8.replace(weight=sq.Int4(), outliers=40.0),
            "rotation": sq.Scheme(weight=sq.Int4(), activation=None, rotation="hadamard"),
        },
        "outliers",
        "rotation",
    ),
)
def test_what_the_product_sees_is_compensated(scheme):
    fn, params, x, stats = case("plain")
    exact = fn(params, x)
    errors = []
    for make in (sq.quantize, gptq):
        qparams = make(params, stats, scheme)
        errors.append(jnp.linalg.norm(sq.quantized(fn)(qparams, x) - exact))
    assert errors[1] < 0.9 * errors[0]
    if scheme.outliers:
        channels = qparams["w"].outliers.channels
        assert not qparams["w"].tensor.values[:, channels].any()


def test_clips_and_folds_come_first():
    fn = lambda p, x: (x * p["norm"]) @ p["w"]
    _, params, x, _ = case("plain")
    params["norm"] = jnp.ones((1, FEATURES))
    stats = sq.calibrate(fn, params, [x], gram=True)
    s = sq.scales(params, stats, 0.5)
    folded, of_folded = sq.fold(params, stats.graph, s), sq.fold_stats(stats, s)
    clips = {"w": jnp.full((OUTPUTS, 3), 0.8)}
    found = gptq(folded, of_folded, W4, clips=clips)
    usual = sq.quantize(folded, of_folded, W4, clips=clips)
    np.testing.assert_array_equal(found["w"].tensor.scale, usual["w"].tensor.scale)
    again = sq.calibrate(fn, folded, [x], gram=True)
    measured = gptq(folded, again, W4, clips=clips)
    assert np.mean(found["w"].tensor.values != measured["w"].tensor.values) < 0.02
    with pytest.raises(ValueError, match=r"w: the statistics are of other parameters.*fold_stats"):
        gptq(folded, stats, W4)


def test_convolutions_and_tables_are_rounded_as_usual():
    def fn(p, ids):
        image = p["table"][ids]
        out = lax.conv_general_dilated(
            image, p["kernel"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return out @ p["w"]

    params = {
        "table": draw(0, 9, 4), "kernel": draw(1, 3, 4, FEATURES), "w": draw(2, FEATURES, OUTPUTS)
    }  # fmt: skip
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    ids = jnp.asarray(np.random.default_rng(3).integers(0, 9, (2, 20)), jnp.int32)
    stats = sq.calibrate(fn, params, [ids], gram=True)
    rules = {"table": sq.EMBEDDING_INT8, "kernel": sq.W8A16, "w": W4}
    found, usual = gptq(params, stats, rules), sq.quantize(params, stats, rules)
    for path in ("table", "kernel"):
        assert jax.tree.all(jax.tree.map(np.array_equal, found[path], usual[path]))
    assert (found["w"].tensor.values != usual["w"].tensor.values).any()


def test_it_repeats_in_any_order_of_batches_and_under_jit():
    fn, params, x, stats = case("plain")
    found = gptq(params, stats, W4)
    again = jax.jit(lambda p, s: gptq(p, s, W4))(params, stats)
    assert np.array_equal(found["w"].tensor.values, gptq(params, stats, W4)["w"].tensor.values)
    batches = [x[:7], x[7:20], x[20:]]
    other = gptq(params, sq.calibrate(fn, params, batches[::-1], gram=True), W4)
    least = loss(fn, params, found, x)
    assert loss(fn, params, other, x) == pytest.approx(least, rel=0.05)
    assert loss(fn, params, again, x) == pytest.approx(least, rel=0.05)


def test_layers_of_one_shape_are_compiled_once():
    def fn(params, x):
        for w in params.values():
            x = jnp.tanh(x @ w)
        return x

    params = {f"w{i}": jnp.asarray(draw(i, 16, 16), jnp.float32) for i in range(5)}
    stats = sq.calibrate(fn, params, [activations(0, 30, 16)], gram=True)
    module._compensated.clear_cache()
    gptq(params, stats, W4)
    gptq(params, stats, W4, damping=0.1)
    assert module._compensated._cache_size() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1.0}, "damping=: expected a share of 0 or more, got -1.0"),
        ({"damping": "1%"}, "damping=: expected a share"),
        ({"act_order": 1}, "act_order=: expected True or False, got 1"),
        ({"scheme": {"v": W4}}, "'v'"),
        ({"clips": {"v": jnp.ones(1)}}, "'v' is no matmul's weight"),
    ],
)
def test_what_is_refused(options, message):
    _, params, _, stats = case("plain")
    with pytest.raises(ValueError, match=message):
        gptq(params, stats, **{"scheme": W4} | options)


def test_without_gram_matrices_it_says_how_to_get_them():
    fn, params, x, _ = case("plain")
    with pytest.raises(ValueError, match=r"gptq: w: .*calibrate\(\.\.\., gram=True\)"):
        gptq(params, sq.calibrate(fn, params, [x]), W4)
