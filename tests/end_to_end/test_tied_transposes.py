"""One leaf multiplied as w and as w.T (tied autoencoders, onehot @ E beside h @ E.T): one site, both products narrow.

The leaf's rows are the outputs of its own product, h @ w.T, which is what an untied leaf gets. In x @ w the scales of
the rows are multiplied to x, and x is then quantized by the token.
"""

from functools import partial

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from traced import normal

import sqjax as sq

W, X, H = normal(16, 12), normal(6, 16).at[:, 3].mul(20), normal(6, 12, seed=1).at[:, 5].mul(9)


def matrix(weight):
    """(codes, scale, float64 matrix) of a quantized weight, all of them (rows, channels)."""
    codes = np.asarray(weight.tensor.codes(), np.float64)
    scale = np.asarray(weight.tensor.spread(weight.tensor.scale), np.float64)
    return codes, scale, codes * scale


def by_token(x, codes):
    """x @ codes in float64, of the integers that x has in int8, by the token."""
    scale = np.abs(x).max(1, keepdims=True) / 127
    return np.round(x / scale) @ codes * scale


def times_rows(x, weight):
    """x @ w in float64, where h @ w.T is the weight's own product."""
    codes, scale, dense = matrix(weight)
    x = np.asarray(x, np.float64)
    narrow = weight.activations is not None and (scale == scale[:, :1]).all()
    out = by_token(x * scale[:, 0], codes) if narrow else x @ dense
    if weight.outliers is not None:
        out[:, weight.outliers.channels] = x @ np.asarray(weight.outliers.weight, np.float64)
    return out if weight.smoothing is None else out / np.asarray(weight.smoothing, np.float64)


def times_channels(h, weight):
    """h @ w.T in float64, the weight's own product: per token, per channel."""
    codes, scale, _ = matrix(weight)
    return by_token(np.asarray(h, np.float64), codes.T) * scale[:, 0]


def both(p, x, h):
    return x @ p["w"], h @ p["w"].T


def int8_dots(run, *args):
    return [dot.dtypes for dot in jaxprs.dots(jaxprs.of(run, *args))].count(jaxprs.INT8_DOT)


# Which product the leaf is quantized for --------------------------------------------------------------------------


def same_trees(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all((x == y).all() for x, y in pairs)


@pytest.mark.slow
def test_the_rows_are_outputs_in_whatever_order_the_program_has_the_products():
    """So the leaf and its statistics are those of a leaf that only h @ w.T reads."""
    alone = sq.calibrate(lambda p, h: h @ p["w"].T, {"w": W}, [H])
    for fn in (both, lambda p, x, h: both(p, x, h)[::-1]):
        stats = sq.calibrate(fn, {"w": W}, [(X, H)])
        [site] = stats.graph.sites
        assert (site.axes, site.channels, stats.count["w"]) == ((1,), (12,), 6)
        np.testing.assert_array_equal(stats.absmax["w"], np.abs(H).max(0))
    scheme = sq.W8A8_O3.replace(smoothing=0.5)
    trees = [sq.quantize({"w": W}, of, scheme) for of in (stats, alone)]
    assert same_trees(*trees)


@pytest.mark.slow
def test_a_one_hot_embedding_tied_to_the_head_is_the_untied_head():
    def fn(p, ids):
        h = jax.nn.one_hot(ids, 40) @ p["E"]
        return (h * p["norm"]) @ p["head" if "head" in p else "E"].T

    ids = jnp.array([3, 39, 0, 7, 11])
    tied = {"E": normal(40, 8), "norm": 1 + normal(1, 8) / 9}
    untied = tied | {"head": tied["E"]}
    qparams = sq.smoothquant(fn, tied, [ids], runtime=0.5)
    rules = {"head": sq.W8A8.replace(smoothing=0.5), "E": None}
    its_own = sq.quantize(untied, sq.calibrate(fn, untied, [ids]), rules)["head"]
    assert same_trees(qparams["E"], its_own)
    run = sq.quantized(fn)
    assert int8_dots(run, qparams, ids) == 2
    h = times_rows(jax.nn.one_hot(ids, 40), qparams["E"])
    # A row of int8 is its row, because a one in int8 is one.
    np.testing.assert_allclose(h, tied["E"][ids], atol=0.05)
    smoothing = np.asarray(qparams["E"].smoothing, np.float64)
    expected = times_channels(h * np.asarray(tied["norm"]) / smoothing, qparams["E"])
    np.testing.assert_allclose(jax.jit(run)(qparams, ids), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_rows_are_looked_up_as_well():
    def fn(p, ids, x):
        return p["E"][ids] @ p["E"].T + x @ p["E"] @ p["E"].T

    params, args = {"E": normal(16, 12)}, (jnp.arange(6), X)
    qparams = sq.quantize(params, sq.calibrate(fn, params, [args]))
    rows = np.asarray(sq.dequantize(qparams["E"].tensor), np.float64)[:6]
    h = times_rows(X, qparams["E"])
    expected = times_channels(rows, qparams["E"]) + times_channels(h, qparams["E"])
    got = jax.jit(sq.quantized(fn))(qparams, *args)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-3)


# Every scheme -----------------------------------------------------------------------------------------------------

SCHEMES = {
    "O1": sq.W8A8,
    "O2": sq.W8A8_O2,
    "O3": sq.W8A8_O3,
    "smoothed": sq.W8A8_O3.replace(smoothing=0.5),
    "outliers": sq.W8A8_OUTLIERS.replace(outliers=9.0),
    "both": sq.W8A8_OUTLIERS.replace(outliers=3.0, smoothing=0.5),
    "per tensor": sq.Scheme(weight=sq.Int8(per_tensor=True)),
    "two levels": sq.W4A8.replace(weight=sq.W4A8.weight.replace(group_size=4)),
    "groups": sq.Scheme(weight=sq.Int8(group_size=4)),
    "weight-only": sq.W8A16,
    "int4 groups": sq.W4A16_G64.replace(weight=sq.W4A16_G64.weight.replace(group_size=4)),
}
#: Those whose weights have one float scale for a row, and whose activations are integers.
NARROW = [*SCHEMES][:8]
QUICK = ["O3", "both", "groups"]


@pytest.mark.parametrize("names", [QUICK, pytest.param([*SCHEMES], marks=pytest.mark.slow)])
@pytest.mark.slow
def test_schemes_in_one_program(names):
    params = dict.fromkeys(names, W)
    rules = {f"^{name}$": SCHEMES[name] for name in names}

    def fn(p, x):
        return {name: x @ p[name] for name in names}

    def with_own(p, x, h):
        return fn(p, x), {name: h @ p[name].T for name in names}

    qparams = sq.quantize(params, sq.calibrate(with_own, params, [(X, H)]), rules)
    run = sq.quantized(fn)
    assert int8_dots(run, qparams, X) == len(set(names) & set(NARROW))
    assert qparams["both"].outliers is not None
    got = jax.jit(run)(qparams, X)
    exact = np.asarray(X, np.float64) @ np.asarray(W, np.float64)
    for name in names:
        expected = times_rows(X, qparams[name])
        np.testing.assert_allclose(got[name], expected, rtol=1e-4, atol=2e-3, err_msg=name)
        assert np.abs(expected - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.slow
def test_float8_rounds_the_scaled_activations_once():
    qparams = sq.quantize({"w": W}, sq.calibrate(both, {"w": W}, [(X, H)]), sq.FP8)
    run = sq.quantized(lambda p, x: x @ p["w"])
    [dot] = jaxprs.dots(jaxprs.of(run, qparams, X))
    assert dot.dtypes == ("float8_e4m3fn", "float8_e4m3fn", "float32")
    _, _, dense = matrix(qparams["w"])
    x = np.asarray(X, np.float64)
    # Three bits of mantissa: half of the last one is a sixteenth of the number.
    allowed = np.abs(x) @ np.abs(dense) / 16 + 1e-3
    assert (np.abs(run(qparams, X) - x @ dense) < allowed).all()


@pytest.mark.slow
def test_more_outputs_than_an_int32_sum_holds_are_summed_in_float():
    """A vocabulary of 140,000 in onehot @ E."""
    big = jnp.broadcast_to(normal(20, 1), (7_000, 20, 2)).reshape(140_000, 2)
    qparams = sq.quantize(
        {"w": big}, sq.calibrate(lambda p, h: h @ p["w"].T, {"w": big}, [H[:, :2]])
    )
    x = jnp.ones((2, 140_000))
    got = jax.jit(sq.quantized(lambda p, x: x @ p["w"]))(qparams, x)
    expected = np.asarray(big, np.float64).sum(0)
    np.testing.assert_allclose(got, [expected, expected], rtol=0.01)


# Every shape ------------------------------------------------------------------------------------------------------


def autoencoder(p, x):
    return jnp.tanh(x @ p["w"]) @ p["w"].T


def heads(p, x):
    h = jnp.einsum("td,dhk->thk", x, p["w"].reshape(16, 3, 4))
    return jnp.einsum("thk,dhk->td", jnp.tanh(h), p["w"].reshape(16, 3, 4))


SHAPES = {
    "plain": autoencoder,
    "through heads": heads,
    "heads in x @ w alone": lambda p, x: (
        jnp.tanh(x @ p["w"].reshape(16, 3, 4).reshape(16, 12)) @ p["w"].T
    ),
    "on the left": lambda p, x: (p["w"] @ jnp.tanh(p["w"].T @ x.T)).T,
    "multiples": lambda p, x: jnp.tanh(x @ (-2 * p["w"] / 2)) @ -p["w"].T,
    "remat": lambda p, x: jax.checkpoint(autoencoder)(p, x),
    "one row at a time": lambda p, x: jax.vmap(lambda r: autoencoder(p, r[None])[0])(x),
    "stored the other way": lambda p, x: jnp.tanh(x @ p["v"].T) @ p["v"],
}


def encoded(x, w):
    """tanh(x @ w) @ w.T of a quantized w."""
    return times_channels(np.tanh(times_rows(x, w)), w)


@pytest.mark.slow
def test_a_tied_autoencoder_in_every_shape():
    params = {name: {"w": W, "v": W.T} for name in SHAPES}

    def fn(p, x):
        return {name: way(p[name], x) for name, way in SHAPES.items()}

    stats = sq.calibrate(fn, params, [X])
    assert len(stats.graph.sites) == len(SHAPES)
    assert "`tanh`" in stats.graph.explain("plain/w")
    qparams = sq.quantize(params, stats)
    run = sq.quantized(fn)
    assert int8_dots(run, qparams, X) == 2 * len(SHAPES)
    got = jax.jit(run)(qparams, X)
    expected = encoded(X, qparams["plain"]["w"])
    v = qparams["stored the other way"]["v"]
    of_v = times_rows(np.tanh(times_channels(X, v)), v)
    for name in SHAPES:
        want = of_v if name == "stored the other way" else expected
        np.testing.assert_allclose(got[name], want, rtol=1e-4, atol=2e-3, err_msg=name)


def of_layer(weight, i):
    """One layer of a quantized stack."""
    return jax.tree.map(lambda x: x[i], weight)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [sq.W8A8, sq.W8A8.replace(smoothing=0.5)])
def test_layers_that_a_scan_runs_over(scheme):
    """And, as experts are, in a batch; both are stacks (3, 16, 12)."""

    def fn(p, x):
        step = lambda x, w: (x + autoencoder({"w": w}, x) / 4, None)
        h = jnp.tanh(jnp.einsum("etd,edf->etf", jnp.stack([x, x, x]), p["e"]))
        return lax.scan(step, x, p["w"])[0], jnp.einsum("etf,edf->etd", h, p["e"])

    params = {"w": normal(3, 16, 12), "e": normal(3, 16, 12, seed=5)}
    stats = sq.calibrate(fn, params, [X])
    sites = [(site.axes, site.batch, site.channels) for site in stats.graph.sites]
    assert sites == 2 * [((2,), (0,), (3, 12))]
    qparams = sq.quantize(params, stats, scheme)
    got = jax.jit(sq.quantized(fn))(qparams, X)
    x = np.asarray(X, np.float64)
    for i in range(3):
        x = x + _smoothed_autoencoder(x, of_layer(qparams["w"], i)) / 4
        expert = _smoothed_autoencoder(X, of_layer(qparams["e"], i))
        np.testing.assert_allclose(got[1][i], expert, rtol=1e-4, atol=2e-3)
    np.testing.assert_allclose(got[0], x, rtol=1e-3, atol=5e-3)


def _smoothed_autoencoder(x, w):
    s = 1.0 if w.smoothing is None else np.asarray(w.smoothing, np.float64)
    return times_channels(np.tanh(times_rows(x, w)) / s, w)


@pytest.mark.slow
def test_one_layer_after_the_scan_over_all_of_them():
    """The layers that only the scan reads have no statistics: they meet no activation in h @ w.T."""

    def fn(p, x):
        h, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])
        return h @ p["w"][1].T

    params, x = {"w": normal(2, 12, 12)}, H
    with pytest.warns(UserWarning, match="no token reached"):
        stats = sq.calibrate(fn, params, [x])
    qparams = sq.quantize(params, stats)
    h = np.asarray(x)
    for i in range(2):
        h = np.tanh(times_rows(h, of_layer(qparams["w"], i)))
    expected = times_channels(h, of_layer(qparams["w"], 1))
    got = jax.jit(sq.quantized(fn))(qparams, x)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-3)


@pytest.mark.slow
def test_two_functions_that_share_the_leaf():
    """Each has one of the products; the statistics are those of h @ w.T."""
    encode, decode = (lambda p, x: jnp.tanh(x @ p["w"])), (lambda p, h: h @ p["w"].T)
    for functions, batches in (((encode, decode), (X, H)), ((decode, encode), (H, X))):
        stats = sq.calibrate(functions, {"w": W}, [[batch] for batch in batches])
        np.testing.assert_array_equal(stats.absmax["w"], np.abs(H).max(0))
        assert stats.count["w"] == 6
    qparams = sq.quantize({"w": W}, stats, sq.W8A8_O3)
    np.testing.assert_allclose(
        sq.quantized(encode)(qparams, X), np.tanh(times_rows(X, qparams["w"])), atol=2e-3
    )


# Smoothing --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fold_into_the_leaf_must_suit_both_products():
    """relu(x @ w.T) @ v: w's rows absorb v's scale if what meets them in h @ w is multiplied by it, and so is `up`."""

    def fn(p, x, h):
        return jax.nn.relu(x @ p["w"].T) @ p["v"], jnp.tanh(h) * p["up"] @ p["w"]

    params = {"w": W, "v": normal(16, 5), "up": jnp.ones((1, 16))}
    args = H, X
    stats = sq.calibrate(fn, params, [args])
    [group] = stats.graph.groups
    assert (set(group.absorbers), group.paths) == ({"w"}, ("v",))
    scales = sq.scales(params, stats, 0.5)
    smoothed = sq.fold(params, stats.graph, scales)
    s = np.asarray(params["v"][:, 0] / smoothed["v"][:, 0])
    assert s.max() > 2 * s.min()
    np.testing.assert_allclose(smoothed["w"], W * s[:, None], rtol=1e-5)
    np.testing.assert_allclose(smoothed["up"], (1 / s)[None], rtol=1e-5)
    qparams = sq.quantize(smoothed, sq.fold_stats(stats, scales), sq.W8A8_O3)
    results = jax.jit(sq.quantized(fn))(qparams, *args)
    for got, exact in zip(results, fn(params, *args), strict=True):
        assert 0 < np.abs(got - exact).max() < 0.03 * np.abs(exact).max()


def test_no_fold_where_only_one_product_could_take_it():
    """norm and w would do for h @ w.T; but then x @ w, an output, would change."""

    def fn(p, x, h):
        return (h * p["norm"]) @ p["w"].T, x @ p["w"]

    params = {"w": W, "norm": jnp.ones((1, 12))}
    stats = sq.calibrate(fn, params, [(X, H)])
    assert not stats.graph.groups
    assert "its scale would reach an output of fn (through `dot_general`" in stats.graph.explain(
        "w"
    )
    assert not sq.scales(params, stats, 0.5)


# The rest of the library ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_gradients_are_those_of_the_dequantized_leaf():
    qparams = sq.quantize({"w": W}, sq.calibrate(autoencoder, {"w": W}, [X]))
    linear = lambda p, x: (x @ p["w"] @ p["w"].T).sum()
    w = {"w": sq.dequantize(qparams["w"].tensor)}
    got = jax.grad(sq.quantized(linear), argnums=1)(qparams, X)
    np.testing.assert_allclose(got, jax.grad(linear, argnums=1)(w, X), rtol=1e-4, atol=1e-4)


def mesh():
    kinds = (AxisType.Auto,)
    return jax.make_mesh((2,), ("model",), axis_types=kinds, devices=jax.devices()[:2])


@pytest.mark.slow
def test_saved_split_verified_and_sharded(tmp_path):
    def fn(p, x):
        return autoencoder(p, x) + p["bias"]

    params = {"w": W, "bias": jnp.ones((1, 16))}
    stats = sq.calibrate(fn, params, [X])
    qparams = sq.quantize(params, stats)
    run = jax.jit(sq.quantized(fn))
    expected = run(qparams, X)
    sq.save(tmp_path / "w.safetensors", qparams)
    assert same_trees(sq.load(tmp_path / "w.safetensors"), qparams)
    assert same_trees(sq.merge(*sq.split(qparams)), qparams)
    sq.verify(fn, params, sq.smooth(params, stats), X)
    for spec in (PartitionSpec("model", None), PartitionSpec(None, "model")):
        sharded = jax.device_put(W, NamedSharding(mesh(), spec))
        got = run(sq.quantize(params | {"w": sharded}, stats), X)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_shard_map_whose_devices_have_a_block_of_rows_or_of_channels():
    def of_blocks(w_spec, x_spec, h_spec, sum_x, sum_h):
        total = {True: partial(lax.psum, axis_name="model"), False: lambda y: y}

        def product(w, x, h):
            return total[sum_x](x @ w), total[sum_h](h @ w.T)

        out_specs = h_spec, x_spec
        return jax.shard_map(
            product, mesh=mesh(), in_specs=(w_spec, x_spec, h_spec), out_specs=out_specs
        )

    rows, columns, whole = PartitionSpec("model"), PartitionSpec(None, "model"), PartitionSpec()
    by_rows = of_blocks(rows, columns, whole, True, False)
    by_channels = of_blocks(columns, whole, columns, False, True)

    def fn(p, x, h):
        return by_rows(p["w"], x, h), by_channels(p["v"], x, h)

    params = {"w": W, "v": W}
    stats = sq.calibrate(fn, params, [(X, H)])
    for path in params:
        np.testing.assert_array_equal(stats.absmax[path], np.abs(H).max(0))
    got = jax.jit(sq.quantized(fn))(sq.quantize(params, stats), X, H)
    exact = both({"w": W}, X, H)
    for pair in got:
        for mine, theirs in zip(pair, exact, strict=True):
            assert 0 < np.abs(mine - theirs).max() < 0.03 * np.abs(theirs).max()


# What stays float -------------------------------------------------------------------------------------------------

STACK = normal(2, 16, 12)
FLOAT = {  # what the function does, the leaf, and the reason that the graph gives
    "some of the outputs": (
        lambda w, x: (jnp.einsum("td,dhk->thk", x, w), jnp.einsum("tk,dhk->tdh", x[:, :4], w)),
        normal(16, 3, 4),
        "contracted along different axes, and `dot_general` at .* does not sum over just what",
    ),
    "one more axis": (
        lambda w, x: (jnp.einsum("td,edf->tef", x, w), jnp.einsum("tf,edf->ted", H, w)),
        STACK,
        "contracted along different axes, and `dot_general` at .* does not sum over just what",
    ),
    "other batches": (
        lambda w, x: (
            jnp.einsum("etd,edf->etf", jnp.stack([x, x]), w),
            jnp.einsum("etf,edf->td", jnp.stack([H, H]), w),
        ),
        STACK,
        "contracted along different axes",
    ),
    "a part of the channels": (
        lambda w, x: (x @ w[:, :5], H @ w.T),
        W,
        "contracted along different axes",
    ),
    "a gain of the channels": (
        lambda w, x: (x @ (w * jnp.tanh(w[:1])), H @ w.T),
        W,
        "contracted along different axes",
    ),
    "a convolution": (
        lambda w, x: (
            lax.conv_general_dilated(
                x[None], w[None], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            ),
            H @ w.T,
        ),
        W,
        "contracted along different axes",
    ),
}


@pytest.mark.parametrize("case", FLOAT)
def test_other_pairs_stay_float_with_a_reason(case):
    fn, leaf, reason = FLOAT[case]
    with pytest.raises(ValueError, match="found no matmul") as caught:
        sq.calibrate(lambda p, x: fn(p["w"], x), {"w": leaf}, [X])
    assert caught.match(reason)
