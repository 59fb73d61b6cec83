"""What `calibrate` says of a model, one array, a loader's pairs or a list in place of its arguments."""

import inspect
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from untyped import untyped

import sqjax as sq

PARAMS = {"w": jnp.ones((6, 3))}
X = jnp.ones((5, 6))


def fn(p, x):
    return x @ p["w"]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x)


@pytest.mark.parametrize(
    ("function", "batches", "match"),
    [
        (Layer(), [X], r"got a model \(Layer\); pass lambda p, \*batch: model.apply\(p, \*batch\)"),
        (fn, X, r"got one, of shapes \(5, 6\).*did you mean \[batch\]"),
        (fn, {"x": X}, r"got one, of shapes \{'x': \(5, 6\)\}.*did you mean \[batch\]"),
        (fn, [(X, jnp.ones(5))], r"this tuple gives fn 2 of them; .*\(\(x,\) for x, y in loader\)"),
        (fn, [np.ones((5, 6)).tolist()], r"a list of 30 numbers is compiled.*np\.asarray"),
    ],
)
def test_wrong_arguments_are_told(function, batches, match):
    with pytest.raises(ValueError, match=match):
        sq.calibrate(function, PARAMS, batches)


def test_values_of_lists_are_not_printed():
    with pytest.raises(ValueError, match=r"failed on inputs of shapes \(\(5, 6\), \[3 numbers\]\)"):
        sq.calibrate(fn, PARAMS, [(X, [1, 2, 3])])


# What is printed, and warned of ---------------------------------------------------------------------


@pytest.mark.slow
def test_statistics_print_as_a_table():
    params = {"gain": jnp.ones(6), "w": jnp.ones((6, 3)), "v": jnp.ones((3, 2))}
    fn = lambda p, x: ((x * p["gain"][None]) @ p["w"]) @ p["v"]
    stats = sq.calibrate(fn, params, [X.at[0, 1].set(-8.0)])
    assert str(stats) == repr(stats)
    assert str(stats).splitlines() == [
        "2 sites, 2 groups",
        "  tokens  max |X|  max / median  site",
        "       5        8             8  w",
        "       5        6             1  v",
    ]


@pytest.mark.slow
def test_layers_refused_alike_are_one_line():
    params = {f"layer{i}": jnp.eye(6) for i in range(7)}

    def net(p, x):
        for i in range(7):
            x = jnp.tanh(x @ p[f"layer{i}"])
        return x

    lines = str(sq.calibrate(net, params, [X]).graph).splitlines()
    assert len(lines) == 4
    assert "refused layer0: its scale would reach input 0 of fn" in lines[1]
    assert re.search(r"refused layer1, layer2, .*\.\.\.: `tanh` at .* \(6 alike; this is", lines[2])


@pytest.mark.slow
def test_many_lengths_are_warned_of():
    batches = [jnp.ones((n, 6)) for n in range(1, 10)]
    with pytest.warns(UserWarning, match=r"batches of 8 different shapes.*pass mask=") as warned:
        sq.calibrate(fn, PARAMS, batches)
    assert len(warned) == 1


def test_a_proof_that_compared_nothing_says_so():
    params = {"gain": jnp.ones(6), "w": jnp.zeros((6, 3))}
    with pytest.warns(UserWarning, match="all weights are zero behind w: the proof had nothing"):
        sq.calibrate(lambda p, x: (x * p["gain"][None]) @ p["w"], params, [X])


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm(use_scale=False, use_bias=False)(x)
        return nn.Dense(3, name="head")(h)


@pytest.mark.slow
def test_refusals_name_the_line_of_the_user_before_that_of_a_library():
    model, x = Net(), jax.random.normal(jax.random.key(1), (5, 6))
    params = model.init(jax.random.key(0), x)
    graph = sq.calibrate(lambda p, x: model.apply(p, x), params, [x]).graph
    reason = dict(graph.refused)["params/head/kernel"]
    assert re.search(
        r"at .*test_arguments\.py:\d+ \(.*__call__\), in flax/linen/normalization\.py:\d+", reason
    )


def test_a_sum_tells_how_many_matmuls_stay_float():
    """Here one of three leaves is a site; the others are multiplied with something first."""
    params = {"w": jnp.ones((6, 3)), "a": jnp.ones((6, 3)), "b": jnp.ones((6, 3))}
    fn = lambda p, x: x @ p["w"] + x @ jnp.tanh(p["a"]) + x @ jnp.tanh(p["b"])
    first = str(sq.calibrate(fn, params, [X]).graph).splitlines()[0]
    assert first == "0 groups, 1 sites: 1 of 3 leaves that matmuls read; the others stay float"


def test_a_refused_site_that_absorbs_says_so():
    params = {"v": jnp.eye(6) + 1, "o": jnp.ones((6, 3))}
    graph = sq.calibrate(lambda p, x: (x @ p["v"]) @ p["o"], params, [X]).graph
    assert "refused v: its scale would reach input 0 of fn; it absorbs another site's scale" in str(
        graph
    )


#: As users get it: here a type checker would be faster.
untyped_calibrate = inspect.unwrap(sq.calibrate)

MASKS = {
    "additive": lambda x: np.where(np.arange(x.shape[0]) < 3, 0.0, -1e9),
    "soft": lambda x: np.full(x.shape[:1], 0.3),
    "a text": lambda x: "all",
    "nothing": lambda x: None,
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_that_is_no_mask_is_refused(kind):
    with pytest.raises(ValueError, match=r"mask=: expected booleans .* True where a token is real"):
        sq.calibrate(fn, PARAMS, [X], mask=MASKS[kind])


def test_a_mask_is_a_function_of_the_batch():
    with pytest.raises(ValueError, match=r"mask=: expected a function of a batch.*got ndarray"):
        untyped_calibrate(fn, PARAMS, [X], mask=np.ones(5))


def test_no_function_says_the_order():
    with pytest.raises(ValueError, match=r"calibrate\(fn, params, batches\), got None"):
        untyped_calibrate(None, PARAMS, [X])


SWAPPED = {
    "params first": (
        lambda: sq.calibrate(PARAMS, fn, [X]),
        r"a function .* first, as in calibrate\(fn, params, batches\), got dict",
    ),
    "batches first": (
        lambda: sq.calibrate([X], PARAMS, fn),
        r"as in calibrate\(fn, params, batches\), got ArrayImpl",
    ),
    "batches before params": (
        lambda: sq.calibrate(fn, [X], PARAMS),
        r"expected an iterable of batches.* order of arguments is \(fn, params, batches\)",
    ),
    "smoothquant": (
        lambda: sq.smoothquant(PARAMS, fn, [X]),
        r"as in calibrate\(fn, params, batches\), got dict",
    ),
    "groups in a list": (
        lambda: sq.calibrate(fn, PARAMS, [X], groups=["w"]),
        r"groups=: expected \{a site's path: .*\}, got list",
    ),
    "one leaf for a list of leaves": (
        lambda: sq.calibrate(fn, PARAMS, [X], groups={"w": "norm"}),
        r"groups= of 'w': expected a list of leaves' paths, got 'norm'",
    ),
    "a mask of two arguments": (
        lambda: sq.calibrate(fn, PARAMS, [X], mask=lambda a, b: a),
        r"a function of the 1 arguments of a batch.*missing a required argument: 'b'.*\*rest",
    ),
    "closed over": (
        lambda: sq.calibrate(lambda p, x: x @ PARAMS["w"], {}, [X]),
        r"closed over arrays of shapes \(6, 3\): if these are weights, pass them in params, as in",
    ),
}


@pytest.mark.parametrize("name", SWAPPED)
def test_arguments_in_another_order_or_form_are_told(name):
    call, sentence = SWAPPED[name]
    with untyped(), pytest.raises(ValueError, match=sentence):
        call()


def test_quantized_parameters_are_not_calibrated():
    qparams = sq.quantize(PARAMS, sq.calibrate(fn, PARAMS, [X]))
    for function in (fn, sq.quantized(fn)):
        with pytest.raises(ValueError, match=r"parameter w: .* got QuantWeight.*with fn itself"):
            sq.calibrate(function, qparams, [X])


def test_matrices_of_their_own_are_no_hint_where_leaves_are_read():
    table = jnp.ones((3, 3))
    stats = sq.calibrate(lambda p, x: (x @ p["w"]) @ table, PARAMS, [X])
    assert [site.path for site in stats.graph.sites] == ["w"]
