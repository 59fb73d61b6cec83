"""`site_errors`: each site's own loss, beside numpy on functions whose activations are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow import slow_but

import sqjax as sq

RNG = np.random.default_rng(0)
G, A, B = (RNG.normal(size=shape) for shape in ((1, 12), (12, 10), (10, 6)))
X = RNG.normal(size=(7, 12)) * np.linspace(0.2, 3, 12)
PARAMS = {"g": jnp.float32(G), "a": jnp.float32(A), "b": jnp.float32(B)}
SEEN, MORE = jnp.float32(X), jnp.float32(1.7 * X)


def mlp(params, x):
    hidden = (x * params["g"]) @ params["a"]
    return jnp.maximum(hidden, 0.1 * hidden) @ params["b"]


def activations(x):
    """What meets a and what meets b in float, whatever happens at the other."""
    first = np.asarray(x, np.float64) * G
    return {"a": first, "b": np.maximum(first @ A, 0.1 * first @ A)}


def rounded(x, scale):
    return np.clip(np.rint(x / scale), -127, 127) * scale


def snr(exact, got):
    return 10 * np.log10((exact**2).sum() / ((exact - got) ** 2).sum())


@pytest.mark.parametrize("scheme", slow_but(["W8A8", "W8A8_O3", "W8A16"], "W8A8_O3"))
def test_each_site_is_compared_on_the_float_activation(scheme):
    stats = sq.calibrate(mlp, PARAMS, [SEEN])
    found = sq.site_errors(mlp, PARAMS, sq.quantize(PARAMS, stats, scheme), MORE)
    assert list(found) == ["a", "b"]
    seen = activations(SEEN)
    for path, x in activations(MORE).items():
        w = {"a": A, "b": B}[path]
        coded = rounded(w, np.abs(w).max(0) / 127)
        covered = {"W8A8": np.abs(x).max(1, keepdims=True), "W8A8_O3": np.abs(seen[path]).max()}
        kept = x if scheme == "W8A16" else rounded(x, covered[scheme] / 127)
        assert found[path].snr_db == pytest.approx(snr(x @ w, kept @ coded), abs=0.02)
        beyond = np.mean(np.abs(x) > covered[scheme]) if scheme == "W8A8_O3" else 0
        assert found[path].clipped == pytest.approx(beyond)
    assert (found["a"].clipped > 0.005) == (scheme == "W8A8_O3")


@pytest.mark.slow
@pytest.mark.each_case
def test_the_layers_of_a_scan_are_one_site():
    stack = jnp.float32(RNG.normal(size=(3, 8, 8)))

    def fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    x = jnp.float32(RNG.normal(size=(5, 8)))
    stats = sq.calibrate(fn, {"w": stack}, [x])
    found = sq.site_errors(fn, {"w": stack}, sq.quantize({"w": stack}, stats, "W8A16"), x)
    exact, got = [], []
    for w in np.asarray(stack, np.float64):
        exact.append(x @ w)
        got.append(x @ rounded(w, np.abs(w).max(0) / 127))
        x = np.tanh(exact[-1])
    assert found["w"].snr_db == pytest.approx(snr(np.stack(exact), np.stack(got)), abs=0.02)


def convolved(p, x):
    return jax.lax.conv_general_dilated(
        x, p["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


#: (fn, the weight's shape, the activation's, the axes within which a static scale is shared)
PRODUCTS = {
    "on the left": (lambda p, x: p["w"] @ x, (4, 6), (6, 9), (0, 1)),
    "experts": (lambda p, x: jnp.einsum("tec,ecf->tef", x, p["w"]), (3, 6, 4), (9, 3, 6), (0, 2)),
    "ragged": (
        lambda p, x: jax.lax.ragged_dot(x, p["w"], jnp.int32(x[0, 0] > 99) + jnp.array([4, 0, 5])),
        (3, 6, 4),
        (9, 6),
        (0, 1),
    ),
    "convolution": (convolved, (2, 2, 3, 4), (2, 5, 5, 3), (0, 1, 2, 3)),
    "concatenated": (
        lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], 1),
        (6, 4),
        (9, 6),
        (0, 1),
    ),
}


@pytest.mark.parametrize("name", slow_but([*PRODUCTS], "experts"))
def test_what_lies_beyond_a_static_range_is_counted(name):
    fn, of_weight, of_x, shared = PRODUCTS[name]
    rng = np.random.default_rng(3)
    params = {"w": jnp.float32(rng.normal(size=of_weight))}
    if name == "concatenated":
        params["v"] = params["w"] + 1
    x = jnp.float32(rng.normal(size=of_x))
    stats = sq.calibrate(fn, params, [x])
    qparams = sq.quantize(params, stats, "W8A8_O3")
    largest = np.abs(x).max(shared, keepdims=True)
    beyond = np.mean(np.abs(1.5 * x) > largest)
    inside = sq.site_errors(fn, params, qparams, x)
    outside = sq.site_errors(fn, params, qparams, 1.5 * x)
    assert inside.keys() == params.keys()
    for path in params:
        assert inside[path].clipped == 0
        assert inside[path].snr_db > 30 > outside[path].snr_db
        assert outside[path].clipped == pytest.approx(beyond)
    assert beyond > 0


@pytest.mark.slow
@pytest.mark.each_case
def test_with_smoothing_at_run_time_what_counts_is_x_over_s():
    fn = lambda p, x: x @ p["w"]
    params = {"w": jnp.float32(A)}
    stats = sq.calibrate(fn, params, [SEEN])
    scheme = sq.W8A8_O3.replace(smoothing=0.5)
    found = sq.site_errors(fn, params, sq.quantize(params, stats, scheme), MORE)
    s = np.sqrt(np.abs(X).max(0) / np.abs(A).max(1))
    beyond = np.mean(np.abs(1.7 * X / s) > np.abs(X / s).max())
    assert found["w"].clipped == pytest.approx(beyond)


@pytest.mark.slow
@pytest.mark.each_case
def test_rows_that_are_looked_up_have_an_error_too():
    fn = lambda p, ids: p["table"][ids] @ p["w"]
    params = {"table": jnp.float32(A.T), "w": jnp.float32(A)}
    ids = jnp.array([[1, 3, 1]])
    stats = sq.calibrate(fn, params, [ids])
    rules = {"table": "EMBEDDING_INT8", "w": None}
    found = sq.site_errors(fn, params, sq.quantize(params, stats, rules), ids)
    rows = A.T[np.asarray(ids)]
    got = rounded(rows, np.abs(rows).max(-1, keepdims=True) / 127)
    assert found == {"table": (pytest.approx(snr(rows, got), abs=0.02), 0.0)}


@pytest.mark.slow
@pytest.mark.each_case
def test_what_no_token_reaches_is_nan_and_what_is_exact_infinite():
    fn = lambda p, x: x @ p["w"] + (0 * x) @ p["v"]
    params = {"w": jnp.eye(4) * 127, "v": jnp.float32(A[:4, :4])}
    x = jnp.array([[127.0, -3.0, 5.0, 64.0], [0.0, 1.0, -2.0, 127.0]])
    with pytest.warns(UserWarning, match="every activation was zero"):
        stats = sq.calibrate(fn, params, [x])
    found = sq.site_errors(fn, params, sq.quantize(params, stats, "W8A8"), x)
    assert np.isnan(found["v"].snr_db)
    assert found["w"].snr_db == np.inf


@pytest.mark.slow
def test_trees_that_do_not_belong_together_are_refused():
    stats = sq.calibrate(mlp, PARAMS, [SEEN])
    smoothed = sq.smooth(PARAMS, stats, 0.5)
    qparams = sq.quantize(smoothed, stats, "W8A8")
    assert sq.site_errors(mlp, smoothed, qparams, SEEN)["a"].snr_db > 30
    with pytest.raises(ValueError, match=r"g is another array in params .* the smoothed one"):
        sq.site_errors(mlp, PARAMS, qparams, SEEN)
    with pytest.raises(ValueError, match="expected qparams with quantized leaves"):
        sq.site_errors(mlp, PARAMS, PARAMS, SEEN)
    with pytest.raises(ValueError, match="h is in one tree only"):
        sq.site_errors(mlp, {**smoothed, "h": SEEN}, qparams, SEEN)
    with pytest.raises(
        ValueError, match="site_errors: params: expected float parameters, but a is"
    ):
        sq.site_errors(mlp, qparams, qparams, SEEN)
    trees = [x | {"h": jnp.ones(n)} for x, n in ((smoothed, 2), (qparams, 3))]
    with pytest.raises(
        ValueError, match=r"h has the shape \(2,\) in params, and \(3,\) in qparams"
    ):
        sq.site_errors(mlp, *trees, SEEN)
    with pytest.raises(ValueError, match=r"failed on inputs of shapes \(\(3, 5\),\)"):
        sq.site_errors(mlp, smoothed, qparams, jnp.ones((3, 5)))
