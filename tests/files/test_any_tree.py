"""Trees of containers that JSON has not: written by path, and read into a tree like the one saved."""

import dataclasses
import functools
from collections import OrderedDict
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax.core import FrozenDict

import sqjax as sq


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Dense:
    """As equinox has them: arrays as children, and a function that no file can hold."""

    kernel: object
    bias: object
    activation: object = dataclasses.field(metadata={"static": True}, default=jnp.tanh)


@jax.tree_util.register_pytree_node_class
class Unnamed:
    """A class that does not name its children."""

    def __init__(self, *xs):
        self.xs = xs

    def tree_flatten(self):
        return self.xs, "aux"

    @classmethod
    def tree_unflatten(cls, aux, xs):
        assert aux == "aux"
        return cls(*xs)


class Pair(NamedTuple):
    first: object
    second: object


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.cache
def trees():
    x = numbers(2, 3)
    return {
        "dataclass": {"layers": [Dense(x, None), Dense(x + 1, x[0])]},
        "the tree itself": Dense(x, Dense(x + 1, None)),
        "unnamed": {"a": Unnamed(x, [x + 1], {"": x + 2})},
        "namedtuple": Pair(x, Pair(x + 1, None)),
        "ordered": OrderedDict([("b", x), ("a", x + 1)]),
        "frozen": {"a": FrozenDict({"b": x})},
        "state": nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0))),
        "boxed": {"kernel": linen.Partitioned(x, names=("in", "out"))},
    }


NAMES = (
    *("dataclass", "the tree itself", "unnamed", "namedtuple"),
    *("ordered", "frozen", "state", "boxed"),
)


def test_every_tree_is_tried():
    assert set(NAMES) == set(trees())


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


@pytest.mark.parametrize("name", NAMES)
def test_a_tree_of_any_containers_comes_back(tmp_path, name):
    tree, file = trees()[name], tmp_path / "x.safetensors"
    sq.save(file, tree)
    assert_same(sq.load(file, like=tree), tree)
    # Shapes are enough, and containers are all that is taken from there.
    assert_same(sq.load(file, like=jax.eval_shape(lambda: tree)), tree)
    assert_same(sq.load(file, like=jax.tree.map(jnp.zeros_like, tree)), tree)
    with pytest.raises(
        ValueError, match=r"load: .*x.safetensors: .*it is a \w+ with the children .*like="
    ):
        sq.load(file)


def test_an_empty_key_is_a_key(tmp_path):
    x = numbers(2)
    tree = {"": {"a": x, "": {"": x + 1}}, "b": [{"": x + 2}]}
    sq.save(tmp_path / "x.safetensors", tree)
    assert_same(sq.load(tmp_path / "x.safetensors"), tree)


@pytest.mark.slow
def test_a_quantized_module_comes_back_into_a_float_one(tmp_path):
    fn = lambda p, x: p.activation(x @ p.kernel + p.bias[None])
    params, x = Dense(numbers(8, 4), numbers(4, seed=1)), numbers(3, 8, seed=2)
    qparams = sq.quantize(params, sq.calibrate(fn, params, [x]))
    sq.save(tmp_path / "x.safetensors", qparams)
    for like in (params, qparams):
        found = sq.load(tmp_path / "x.safetensors", like=like)
        assert_same(found, qparams)
    np.testing.assert_array_equal(sq.quantized(fn)(found, x), sq.quantized(fn)(qparams, x))


def other_trees():
    """{what `load` says: a tree that is not like the saved one}."""
    x = numbers(2, 3)
    return {
        r"a: it is a Dense .*got Pair with \['first', 'second'\]": {"a": Pair(x, None)},
        r"a: it is a Dense .*got int with \[\]": {"a": 3},
        r"a: it is a Dense .*say load\(path, like=tree\).*got no `like`": {},
        r"a/kernel: expected float32 \(3, 2\), got .*\(2, 3\)": {"a": Dense(x.T, None)},
        r"a/kernel: expected bool .*got float32": {"a": Dense(x > 0, None)},
        r"the file lacks \['a/bias'\]": {"a": Dense(x, x[0])},
        r"the file lacks \['b'\]": {"a": Dense(x, None), "b": x},
        "expected the containers .*FrozenDict": FrozenDict({"a": Dense(x, None)}),
    }


def test_a_tree_that_is_not_like_it_is_refused(tmp_path):
    sq.save(tmp_path / "x.safetensors", {"a": Dense(numbers(2, 3), None)})
    for message, like in other_trees().items():
        with pytest.raises(ValueError, match=rf"load: .*x.safetensors: .*{message}"):
            sq.load(tmp_path / "x.safetensors", like=like)


def test_a_plain_tree_is_compared_too(tmp_path):
    sq.save(tmp_path / "x.safetensors", [numbers(2)])
    assert_same(sq.load(tmp_path / "x.safetensors", like=[numbers(2)]), [numbers(2)])
    with pytest.raises(ValueError, match="expected the containers"):
        sq.load(tmp_path / "x.safetensors", like=(numbers(2),))


def deep(levels):
    tree = numbers(1)
    for _ in range(levels):
        tree = [tree]
    return tree


def cyclic():
    tree = []
    tree.append(tree)
    return tree


def refused():
    return {
        r"a: expected a plain array, got MaskedArray.*save x.filled": {
            "a": np.ma.masked_array([1.0, 2.0], [True, False])
        },
        "a: .*got Mine": {"a": np.zeros((2, 2)).view(type("Mine", (np.ndarray,), {}))},
        "expected keys all str or all int": {"\ud800": numbers(1)},
        "nested too deeply": deep(5000),
        "nested too deeply, or holds itself": cyclic(),
    }


def test_what_would_be_lost_is_refused(tmp_path):
    for message, tree in refused().items():
        with pytest.raises(ValueError, match=rf"save: .*x.safetensors: .*{message}"):
            sq.save(tmp_path / "x.safetensors", tree)
    assert not list(tmp_path.iterdir())
