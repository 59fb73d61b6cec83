"""The walk: rules by primitive and kind of special value, and what becomes of these in calls and bodies."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from sqjax.program.registry import Kind, Registry, Special
from sqjax.program.walk import run


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Halved:
    """A toy of a quantized array: the numbers' halves."""

    halves: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Negated:
    """Another kind: the numbers with the other sign."""

    minus: Any


def refuse(equation, *operands):
    paths = [x.path for x in operands if isinstance(x, Special)]
    raise ValueError(f"{paths}: no rule for {equation.primitive.name}")


def never_leaves(leaf):
    raise ValueError(f"{leaf.path} is returned")


def same(equation, leaf, *_):
    return leaf


def spec_of_each(equation, leaf, spec):
    return jax.tree.map(lambda _: spec, leaf)


HALVES = Kind(Halved, refuse, same, spec_of_each, carry=refuse, leave=never_leaves)
NEGATIVES = Kind(Negated, refuse, same, spec_of_each, carry=same, leave=lambda leaf: leaf)
RULES = Registry(NEGATIVES, HALVES)
ASKED: list[Any] = []


@RULES.register(("mul", "dot_general"), HALVES)
def _scale_twice(equation, x, y):
    x, y = (2 * v.value.halves if isinstance(v, Special) else v for v in (x, y))
    return equation.primitive.bind(x, y, **equation.params)


@RULES.register(("mul",), NEGATIVES)
def _turn_sign(equation, x, y):
    """Meets the other kind too, because its kind is named first."""
    plain = [v.value if isinstance(v, Special) else v for v in (x, y)]
    [minus] = [v.minus for v in plain if isinstance(v, Negated)]
    [other] = [v for v in plain if not isinstance(v, Negated)]
    return -minus * (2 * other.halves if isinstance(other, Halved) else other)


@RULES.register(("select_n",), NEGATIVES, asks=True)
def _mask(equation, which, *cases, known):
    ASKED[:] = [None if values is None else np.asarray(values).tolist() for values in known]
    leaf = next(x for x in cases if isinstance(x, Special))
    cases = [x.value.minus if isinstance(x, Special) else -x for x in cases]
    return Special(leaf.path, Negated(lax.select_n(which, *cases)))


def negated(x):
    return Special("n", Negated(-jnp.asarray(x, jnp.float32)))


def halved(x):
    return Special("h", Halved(jnp.asarray(x, jnp.float32) / 2))


def plain(x):
    if not isinstance(x, Special):
        return x
    return -x.value.minus if isinstance(x.value, Negated) else 2 * x.value.halves


def both(fn, *args):
    """What a function gives on special values, and on the arrays they stand for."""
    arrays = [plain(x) for x in args]
    special = run(jax.make_jaxpr(fn)(*arrays), args, RULES)
    return special, jax.tree.leaves(fn(*arrays))


def check(fn, *args):
    special, expected = both(fn, *args)
    for got, want in zip(special, expected, strict=True):
        np.testing.assert_array_equal(plain(got), want)


X = np.arange(6, dtype=np.float32)


def scanned(stack, weight, x):
    return lax.scan(lambda c, w: (c * weight, w * c), x, stack)


def looped(weight, x):
    return lax.while_loop(lambda c: (c * weight).sum() < 50, lambda c: c * weight + 1, x)


def branched(weight, x):
    return lax.cond(x.sum() > 3, lambda w: w * x, lambda w: w * (x - 1), weight)


def sharded(weight, x):
    mesh = Mesh(jax.devices()[:1], ("data",))
    spec = PartitionSpec("data")
    return jax.shard_map(lambda w, x: w * x, mesh=mesh, in_specs=spec, out_specs=spec)(weight, x)


@pytest.mark.parametrize(
    ("fn", "args"),
    [
        (lambda w, x: w * x + 1, (halved(X), X)),
        (lambda n, w: n * w, (negated(X), halved(X + 1))),  # the first kind's rule
        (jax.jit(lambda w, x: x * w), (halved(X), X)),
        (jax.checkpoint(lambda w, x: x * w), (halved(X), X)),
        (scanned, (halved(np.stack([X, X + 1])), halved(X - 2), X)),
        (looped, (halved(X / 2 + 1), X)),
        (branched, (halved(X), X)),
        (sharded, (halved(X), X)),
        (lambda n, x: (n, x), (negated(X), X)),  # this kind may be returned
        (lambda n: lax.scan(lambda c, _: (c, None), n, None, 3)[0], (negated(X),)),  # and carried
    ],
)
def test_special_values_stand_for_their_arrays(fn, args):
    check(fn, *args)


def test_what_has_no_rule_is_left_to_the_kind():
    with pytest.raises(ValueError, match=r"\['h'\]: no rule for neg"):
        run(jax.make_jaxpr(lambda w: -w)(X), [halved(X)], RULES)
    with pytest.raises(ValueError, match="h is returned"):
        run(jax.make_jaxpr(lambda w: w)(X), [halved(X)], RULES)
    carried = jax.make_jaxpr(lambda w: lax.fori_loop(0, 3, lambda _, c: c + 1, w))(X)
    with pytest.raises(ValueError, match=r"\['h'\]: no rule for (scan|while)"):
        run(carried, [halved(X)], RULES)


def test_a_rule_may_ask_which_numbers_fill_its_operands():
    def masked(n, x):
        zeros = jnp.zeros((1, 6)).reshape(6)
        return lax.select_n(x > 2, zeros, n)

    jax.jit(lambda n, x: run(jax.make_jaxpr(masked)(X, X), [n, x], RULES))(negated(X), X)
    assert ASKED == [[0, 1], 0.0, None]
    check(masked, negated(X), X)


def test_equations_may_concern_the_rules_though_nothing_special_is_there():
    counting = Registry(HALVES, concerns=lambda equation: equation.primitive.name == "add")

    @counting.register(("add",), HALVES)
    def _add_ten(equation, x, y):
        return x + y + 10

    program = jax.make_jaxpr(lambda x: jnp.tanh(x) + x)(X)
    [got] = run(program, [X], counting)
    np.testing.assert_array_equal(got, np.asarray(jnp.tanh(X)) + X + 10)
