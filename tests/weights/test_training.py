"""Training around quantized weights: what is trained, what stays, and the gradients."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sqjax as sq

EXAMPLE = Path(__file__).parents[2] / "examples" / "adapters.py"


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def fn(p, x):
    h = x * p["norm"][None]
    return h @ p["w"] + (h @ p["lora"]["a"]) @ p["lora"]["b"]


@functools.cache
def params():
    return {
        "norm": 1 + normal(16),
        "w": normal(16, 8),
        "lora": {"a": normal(16, 2), "b": normal(2, 8)},
        "steps": jnp.int32(3),
    }


@functools.cache
def x():
    return normal(4, 16, seed=1)


@functools.cache
def stats():
    return sq.calibrate(fn, params(), [x()])


def quantize(scheme):
    return sq.quantize(params(), stats(), {"lora": None, ".*": scheme})


@pytest.mark.slow
def test_what_is_trained_and_what_stays():
    qparams = quantize("W8A8")
    trained, frozen = sq.split(qparams)
    assert trained["w"] is None
    assert trained["steps"] is None
    assert frozen["norm"] is None
    assert frozen["w"] is qparams["w"]
    assert len(jax.tree.leaves(trained)) == 3
    whole = sq.merge(jax.tree.map(lambda x: x + 1, trained), frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(qparams)
    np.testing.assert_array_equal(whole["norm"], qparams["norm"] + 1)
    adapters, _ = sq.split(qparams, "lora/")
    assert [adapters["norm"], len(jax.tree.leaves(adapters))] == [None, 2]
    assert sq.split(qparams, ["lora", "norm"])[0]["norm"] is qparams["norm"]


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16", "FP8"])
@pytest.mark.slow
def test_the_gradient_is_that_of_the_float_matmul_with_the_quantized_weight(scheme):
    qparams = quantize(scheme)
    trained, frozen = sq.split(qparams)

    def loss(trained):
        return sq.quantized(fn)(sq.merge(trained, frozen), x()).sum()

    got = jax.jit(jax.grad(loss))(trained)
    w = np.asarray(sq.dequantize(qparams["w"].tensor), np.float64)
    rows, norm, a, b = (np.asarray(v, np.float64) for v in (x(), params()["norm"], *_adapters()))
    np.testing.assert_allclose(got["norm"], rows.sum(0) * (w + a @ b).sum(1), rtol=1e-4, atol=1e-4)
    of_a = (rows * norm).sum(0)[:, None] * b.sum(1)
    np.testing.assert_allclose(got["lora"]["a"], of_a, rtol=1e-4, atol=1e-4)
    assert got["w"] is None


def _adapters():
    return params()["lora"]["a"], params()["lora"]["b"]


@pytest.mark.slow
def test_optax_trains_the_floats_only():
    qparams = quantize("W8A16")
    trained, frozen = sq.split(qparams)
    optimizer = optax.adamw(0.05)

    @jax.jit
    def step(trained, state):
        loss = lambda t: jnp.mean(sq.quantized(fn)(sq.merge(t, frozen), x()) ** 2)
        value, gradient = jax.value_and_grad(loss)(trained)
        changes, state = optimizer.update(gradient, state, trained)
        return optax.apply_updates(trained, changes), state, value

    state, losses = optimizer.init(trained), []
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats and counts
        for _ in range(20):
            trained, state, value = step(trained, state)
            losses.append(float(value))
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.slow
def test_trees_that_split_did_not_make_are_refused():
    trained, frozen = sq.split(quantize("W8A8"))
    with pytest.raises(ValueError, match=r"two trees that split made; they differ at \['other'\]"):
        sq.merge(trained | {"other": None}, frozen)
    with pytest.raises(ValueError, match="merge: norm is in both trees"):
        sq.merge(trained, frozen | {"norm": jnp.ones(16)})
    with pytest.raises(ValueError, match=r"split pattern .\^w. matches nothing"):
        sq.split(quantize("W8A8"), "^w")


@pytest.mark.filterwarnings("ignore:calibrate. all weights are zero:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("scheme", [sq.W4A16_G64, sq.W8A8], ids=str)
def test_the_example_learns(scheme):
    assert len(EXAMPLE.read_text().splitlines()) < 80
    spec = importlib.util.spec_from_file_location("adapters", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with jax.numpy_dtype_promotion("standard"):
        losses = module.main(scheme)
    assert losses[-1] < 0.1 * losses[0]


def test_where_every_leaf_is_quantized_there_is_nothing_to_train():
    qparams = {"w": sq.QTensor.quantize(jnp.ones((4, 3)), (0,))}
    trained, frozen = sq.split(qparams)
    assert trained == {"w": None}
    assert frozen["w"] is qparams["w"]
    with pytest.raises(ValueError, match="matches nothing"):
        sq.split(qparams, ["lora"])
