"""`choose_precision`: sensitivities beside numpy, assignments beside all others, the laws."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow import slow_but

import sqjax as sq
from sqjax.choosing.sensitivity import sensitivity
from sqjax.weights.sizes import weight_bytes

RNG = np.random.default_rng(0)
W4 = sq.Scheme(weight=sq.Int4(), activation=None)


def normal(*shape):
    return jnp.float32(RNG.normal(size=shape))


X = normal(40, 16)
NET = {"g": 1 + normal(1, 16) ** 2, "q": normal(16, 24), "k": normal(16, 8)}
NET |= {"o": normal(24, 16), "head": normal(16, 10)}


def net(p, x):
    """Its q and k share an activation, which g absorbs."""
    h = x * p["g"]
    mixed = jnp.tanh(h @ p["q"]) * jnp.tile(jnp.tanh(h @ p["k"]), 3)
    return (x + 0.3 * mixed @ p["o"]) @ p["head"] / 4


def kl(params, x):
    """The mean divergence of the quantized model's predictions from the float model's."""
    ref = jax.nn.log_softmax(net(NET, x))
    got = jax.nn.log_softmax(sq.quantized(net)(params, x))
    return float(jnp.mean(jnp.sum(jnp.exp(ref) * (ref - got), -1)))


@cache
def calibrated():
    return sq.calibrate(net, NET, [X])


def chosen(candidates=("W8A16", W4), **options):
    return sq.choose_precision(net, NET, calibrated(), [X[:20], X[20:]], candidates, **options)


@cache
def best(seed=0):
    return chosen(bits=8, seed=seed)


def rounded(w, bound=127):
    scale = np.abs(w).max(0) / bound
    return np.rint(w / scale) * scale


# Sensitivities ----------------------------------------------------------------------------------


def concatenated(p, x, c):
    return x @ jnp.concatenate([p["a"], p["b"]], 1), c


def stacked(p, x, c):
    _, ys = jax.lax.scan(lambda x, w: (x, x @ w), x, p["stack"])
    return jnp.moveaxis(ys, 0, 1).reshape(len(x), -1), c


def twice(p, x, c):
    return jnp.concatenate([x @ p["a"], (2 * x) @ p["a"]], 1), c


@pytest.mark.parametrize("fn", slow_but([twice, concatenated, stacked], twice))
def test_the_score_is_that_of_numpy(fn):
    """A loss that is linear in the outputs y, sum of c y, has the gradient c."""
    a, b = (np.asarray(normal(6, 4), np.float64) for _ in "ab")
    x, c = (np.asarray(normal(5, n), np.float64) for n in (6, 8))
    trees = {"twice": {"a": a}, "concatenated": {"a": a, "b": b}, "stacked": {"stack": [a, b]}}
    params = {k: jnp.float32(np.array(v)) for k, v in trees[fn.__name__].items()}
    batch = jnp.float32(x), jnp.float32(c)
    stats = sq.calibrate(fn, params, [batch])
    versions = [sq.quantize(params, stats, scheme) for scheme in ("W8A16", W4)]
    found = sensitivity(fn, params, versions, [batch], lambda y, x, c: jnp.sum(y[0] * c, 1))

    for version, bound in enumerate((127, 7)):
        changes = [x @ (rounded(w, bound) - w) for w in (a, b)]
        if fn is twice:
            changes[1] = 2 * changes[0]
        first, last = (0.5 * np.sum((c * np.hstack(changes)) ** 2, 0) / len(x)).reshape(2, 4).sum(1)
        wanted = {"a": (first + last) / 2, "b": (first + last) / 2}  # each its part
        if fn is not concatenated:
            wanted = dict.fromkeys(params, first + last)
        got = {path: losses[version] for path, losses in found.loss.items()}
        assert got == pytest.approx(wanted, rel=1e-3)
    assert found.joined == ((("a", "b"),) if fn is concatenated else ())


def test_the_divergence_is_predicted():
    """Of one site at a time, where the errors are small: second order, and 40 drawn labels."""
    for path in ("q", "head"):
        lost = kl(sq.quantize(NET, calibrated(), {f"^{path}$": W4}), X)
        of_w8, of_w4 = best().sensitivity[path]
        assert of_w4 == pytest.approx(lost, rel=0.7)
        assert of_w8 < 0.02 * of_w4


def test_one_program_whatever_the_number_of_candidates():
    traced = []

    def counted(p, x):
        traced.append(1)
        return net(p, x)

    counts = []
    for candidates in ([W4], [W4, "W8A16", "W8A8", None]):
        traced.clear()
        sq.choose_precision(counted, NET, calibrated(), [X, X + 1], candidates, bits=8)
        counts.append(len(traced))
    assert counts == [1, 1]


# Assignments ------------------------------------------------------------------------------------


def test_the_rules_are_what_quantize_takes_and_keep_to_the_budget():
    found = chosen(bits=5, candidates=["W8A16", W4, None], fixed={"head": None})
    assert set(found.sensitivity) == {"q", "k", "o"}
    qparams = sq.quantize(NET, calibrated(), found.rules)
    assert qparams["head"] is NET["head"]
    assert found.nbytes == weight_bytes({path: qparams[path] for path in "qko"})
    assert found.bits <= 5
    # The tied ones have one scheme.
    assert {frozenset(paths) for paths in found.tied} == {frozenset("qk"), frozenset("o")}
    assert found.rules["^q$"] == found.rules["^k$"]
    losses = found.sensitivity
    places = [found.candidates.index(found.rules[f"^{path}$"]) for path in losses]
    each = [loss[place] for loss, place in zip(losses.values(), places, strict=True)]
    assert found.loss == pytest.approx(sum(each))


def test_more_bytes_lose_less_and_the_curve_says_so():
    found = best().within(nbytes=10**6)
    assert found.rules == {f"^{path}$": sq.W8A16 for path in found.sensitivity}
    for nbytes, loss in zip(*found.curve, strict=True):
        within = found.within(nbytes=float(nbytes))
        assert (within.nbytes, within.loss) == pytest.approx((nbytes, loss))
    assert (np.diff(found.curve.loss) < 0).all()


def test_the_mixture_beats_the_small_scheme_and_never_loses_to_the_large():
    at = {
        bits: kl(sq.quantize(NET, calibrated(), best().within(bits=bits).rules), X)
        for bits in (4, 6, 8)
    }
    uniform = [kl(sq.quantize(NET, calibrated(), scheme), X) for scheme in (W4, "W8A16")]
    assert at[4] == uniform[0] > at[6]
    assert at[8] == uniform[1]


def test_seeds_repeat_and_the_order_of_batches_does_not_matter():
    first, again, other = best(), chosen(bits=8), best(seed=1)
    back = sq.choose_precision(net, NET, calibrated(), [X[20:], X[:20]], ["W8A16", W4], bits=8)
    for path, loss in first.sensitivity.items():
        assert np.array_equal(loss, again.sensitivity[path])
        assert not np.array_equal(loss, other.sensitivity[path])
        np.testing.assert_allclose(loss, back.sensitivity[path], rtol=1e-6)
    assert first.rules == again.rules == back.rules


WRONG = {
    "two budgets": ({"bits": 6, "nbytes": 3}, "expected one budget"),
    "none": ({}, "expected one budget"),
    "too small": ({"bits": 3}, "the smallest candidates take 4"),
    "no scheme": ({"bits": 6, "candidates": [None]}, "got no scheme"),
    "a name": ({"bits": 6, "candidates": "W8A16"}, "schemes to choose among"),
    "unknown": ({"bits": 6, "candidates": ["W5"]}, "got 'W5'"),
    "embeddings": ({"bits": 6, "candidates": ["EMBEDDING_INT8"]}, "fixed="),
    "nothing left": ({"bits": 6, "fixed": {".*": None}}, "leave some"),
    "no site": ({"bits": 6, "fixed": {"haed": None}}, "head"),
    "loss": ({"bits": 6, "loss": lambda y, x: "low"}, "one loss for every prediction"),
    "fails": ({"bits": 6, "loss": lambda y: y}, "failed on inputs of shapes"),
    "NaN": ({"bits": 6, "loss": lambda y, x: jnp.sqrt(-1 - y**2)}, "batch 0.*NaN"),
}


@pytest.mark.parametrize(("options", "text"), [*WRONG.values()], ids=[*WRONG])
def test_wrong_arguments_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        chosen(**options)


def test_a_budget_may_be_infinite():
    without_end = best().within(bits=float("inf"))
    assert without_end.rules == best().within(bits=8).rules


def test_batches_that_are_used_up_are_refused():
    with pytest.raises(ValueError, match="batches is empty"):
        sq.choose_precision(net, NET, calibrated(), iter([]), [W4], bits=6)
