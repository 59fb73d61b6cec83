"""`verify` compares what matters of an output; a function that is no program is noticed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from untyped import untyped

import sqjax as sq

PARAMS = {
    "n": jnp.ones(16),
    "head": jnp.asarray(np.random.default_rng(0).normal(size=(16, 50)), jnp.float32),
}
X = jnp.asarray(np.random.default_rng(1).normal(size=(4, 16)), jnp.float32)
FILLS = [-1e9, -1e4, float(jnp.finfo(jnp.float32).min), 1e6]


def head(p, x):
    return (x * p["n"][None]) @ p["head"]


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("used", [45, 10])
@pytest.mark.slow
def test_a_padded_vocabulary_does_not_hide_a_wrong_head(fill, used):
    lm = lambda p, x: jnp.where(jnp.arange(50)[None] < used, head(p, x), fill)
    wrong = PARAMS | {"head": PARAMS["head"] * -3.0}
    with pytest.raises(ValueError, match=r"differs by 4 > 0\.0001"):
        sq.verify(lm, PARAMS, wrong, X)
    smoothed = sq.smooth(PARAMS, sq.calibrate(lm, PARAMS, [X]))
    assert 0 < sq.verify(lm, PARAMS, smoothed, X) < 1e-6


def test_an_added_mask_and_logits_in_one_output_do_not_hide_one_either():
    lm = lambda p, x: head(p, x) + jnp.where(jnp.arange(50)[None] < 45, 0.0, -1e9)
    with pytest.raises(ValueError, match=r"differs by 4 >"):
        sq.verify(lm, PARAMS, PARAMS | {"head": PARAMS["head"] * -3.0}, X)


def test_ordinary_outputs_are_measured_by_their_maximum():
    other = PARAMS | {"head": PARAMS["head"].at[3, 7].add(0.01)}
    y, z = (np.asarray(head(p, X), np.float64) for p in (PARAMS, other))
    expected = np.abs(y - z).max() / np.abs(y).max()
    assert sq.verify(head, PARAMS, other, X, tolerance=1.0) == expected


def test_of_integers_the_share_that_differs_is_told():
    ids = lambda p, x: jnp.argmax(head(p, x), -1) + 50_000
    assert sq.verify(ids, PARAMS, PARAMS, X) == 0
    with pytest.raises(ValueError, match="differs by 1 >"):
        sq.verify(ids, PARAMS, PARAMS | {"head": PARAMS["head"] * -1}, X)


@pytest.mark.slow
def test_a_quantized_tree_is_told_to_say_its_tolerance():
    qparams = sq.quantize(PARAMS, sq.calibrate(head, PARAMS, [X]))
    with pytest.raises(ValueError, match=r"tolerance=0\.05.*site by site quantize one at a t"):
        sq.verify(head, PARAMS, qparams, X)
    assert sq.verify(head, PARAMS, qparams, X, tolerance=0.05) < 0.05


@pytest.mark.slow
def test_rounding_of_half_precision_is_told_from_a_wrong_fold():
    """The small difference of two large sums: bfloat16 leaves one digit of it."""

    def fn(p, x):
        h = (x * p["n"][None]) @ p["head"]
        return h.sum(-1) - h[:, ::-1].sum(-1) + 0.01 * h[:, 0]

    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    x = X.astype(jnp.bfloat16)
    rounded = narrow | {"n": narrow["n"] * 1.004}
    exchanged = narrow | {"head": jnp.roll(narrow["head"], 3, 1) * 3}
    assert sq.verify(fn, narrow, narrow, x) == 0
    with pytest.raises(ValueError, match=r"beside the same program in float32 .* more than round"):
        sq.verify(fn, narrow, exchanged, x)
    assert rounded["n"].dtype == jnp.bfloat16


# Functions that are another program each time -----------------------------------------------------

GENERATOR = np.random.default_rng(0)


def draws(p, x):
    return head(p, x + np.random.normal(size=(4, 16)).astype(np.float32))


def draws_a_number(p, x):
    return head(p, x * float(GENERATOR.uniform()))


def draws_an_array(p, x):
    return head(p, x + GENERATOR.normal(size=(4, 16)).astype(np.float32))


class Remembers:
    """Keeps a value of its first call."""

    def __init__(self):
        self.seen = []

    def __call__(self, p, x):
        self.seen.append(x)
        return head(p, x) + self.seen[0].sum()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: draws, "draws from np.random"),
        (lambda: draws_a_number, "`mul` at .*draws_a_number.* reads another constant"),
        (lambda: draws_an_array, "`add.*` at .*draws_an_array.* reads another constant"),
        (Remembers, "keeps a value of one call and reads it in the next"),
    ],
    ids=["np.random", "number", "array", "tracer"],
)
@pytest.mark.parametrize(
    "use",
    [lambda fn: sq.calibrate(fn, PARAMS, [X]), lambda fn: sq.verify(fn, PARAMS, PARAMS, X)],
    ids=["calibrate", "verify"],
)
def test_a_function_that_draws_or_remembers_is_refused(make, match, use):
    fn = make()
    with pytest.raises(ValueError, match=match):
        use(fn)


def test_a_callback_that_draws_is_noticed_when_it_runs():
    def fn(p, x):
        draw = lambda: np.float32(GENERATOR.uniform())
        noise = jax.pure_callback(draw, jax.ShapeDtypeStruct((), jnp.float32))
        return head(p, x * noise)

    with pytest.raises(ValueError, match="two different results on the same inputs"):
        sq.calibrate(fn, PARAMS, [X])


@pytest.mark.slow
def test_a_function_with_constants_is_the_same_program_each_time():
    table = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    noise = lambda p, x: head(p, x * table + jax.random.normal(jax.random.key(3), x.shape))
    stats = sq.calibrate(noise, PARAMS, [X])
    assert sq.verify(noise, PARAMS, sq.smooth(PARAMS, stats), X) < 1e-5


def test_nan_in_both_outputs_is_no_difference():
    fn = lambda p, x: jnp.sqrt(x) @ p
    w, x = jnp.ones((3, 2)), jnp.ones((4, 3)).at[1].set(-1.0)
    assert sq.verify(fn, w, w, x) == 0
    assert sq.verify(fn, w, 2 * w, x, tolerance=1.5) == pytest.approx(1)


def test_parameters_of_another_model_are_refused():
    with pytest.raises(
        ValueError, match=r"shape \(4, 2\) with the parameters before, and \(4, 5\)"
    ):
        sq.verify(lambda p, x: x @ p, jnp.ones((3, 2)), jnp.ones((3, 5)), jnp.ones((4, 3)))


ORDERS = {
    "params first": (
        lambda fn, p, x: (p, fn, p, x),
        r"as in verify\(fn, before, after, .*got dict",
    ),
    "inputs in a list": (
        lambda fn, p, x: (fn, p, p, [x]),
        r"fn\(before, \*inputs\) failed on inputs of shapes \(\[\(2, 4\)\],\).*not in a list",
    ),
    "inputs before params": (
        lambda fn, p, x: (fn, x, p, p),
        r"the order is verify\(fn, before, after, \*inputs\)",
    ),
    "no inputs": (lambda fn, p, x: (fn, p, p), r"failed on inputs of shapes \(\)"),
    "another tree after": (
        lambda fn, p, x: (fn, p, {"other": p["w"]}, x),
        r"fn\(after, \*inputs\) failed",
    ),
    "nothing is returned": (
        lambda fn, p, x: (lambda p, x: None, p, p, x),
        "fn returns no array, or only empty ones, so there is nothing to compare",
    ),
    "nothing but NaN": (
        lambda fn, p, x: (fn, p, {"w": 7 * p["w"]}, x * jnp.nan),
        "every number that fn returns is 0, NaN or infinite",
    ),
    "nothing but zeros": (
        lambda fn, p, x: (fn, p, {"w": 7 * p["w"]}, 0 * x),
        "every number that fn returns is 0, NaN or infinite",
    ),
    "no rows": (
        lambda fn, p, x: (fn, p, p, x[:0]),
        "only empty ones, .*of inputs that have rows",
    ),
}


@pytest.mark.parametrize("name", ORDERS)
def test_arguments_in_another_order_or_form_are_told(name):
    arguments, sentence = ORDERS[name]
    called = arguments(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 3))}, jnp.ones((2, 4)))
    with untyped(), pytest.raises(ValueError, match=sentence):
        sq.verify(*called)


@pytest.mark.slow
def test_rounding_by_reduce_precision_is_that_of_the_narrow_dtype():
    fn = lambda p, x: jax.lax.reduce_precision(x * p["norm"][None], 8, 7) @ p["w"]
    params = {"norm": jnp.linspace(1, 2, 8), "w": jnp.linspace(-1, 1, 24).reshape(8, 3)}
    x = jnp.sin(jnp.arange(40.0)).reshape(5, 8)
    smoothed = sq.smooth(params, sq.calibrate(fn, params, [x]), 0.5)
    assert 1e-4 < sq.verify(fn, params, smoothed, x) < 0.02
    with pytest.raises(ValueError, match="differs by"):
        sq.verify(fn, params, params | {"w": 1.2 * params["w"]}, x)
