"""Each rule of the field beside jax: what is exact gives just the integers that jax gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from slow import slow_but

from sqjax.numerics.prime_field import draw, embed, mul, sub
from sqjax.proving import running
from sqjax.proving.running import run
from sqjax.proving.values import Field

DIMENSIONS = lax.ScatterDimensionNumbers((1,), (0,), (0,))
ROWS = jnp.array([[2], [0], [2]])


def integers(*shape, seed=0):
    """Small integers, as floats: all sums and products are exact."""
    return jnp.asarray(np.random.default_rng(seed).integers(-9, 10, shape), jnp.float32)


def pooled(x, by, init, **options):
    return lax.reduce_window(x, np.float32(init), by, (1, 2, 3), (1, 1, 2), **options)


def stepped(x, w):
    """A scan that goes backwards, with carries and slices."""
    return lax.scan(lambda c, row: (c + row @ w, (c, 2 * row)), jnp.zeros(4), x, reverse=True)


def looped(x):
    return lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] * s[1] - x), (0, x))


#: What is exact: sums, products, movements, and what runs a program.
EXACT = {
    "dot": lambda x, y: jnp.einsum("abc,dbc->ad", x, y),
    "batched dot": lambda x, y: jnp.einsum("abc,adc->bad", x, x),
    "powers": lambda x, y: x**3 + jnp.square(x) - 2 * (-x),
    "division": lambda x, y: (x * 8) / 2.0,
    "sums": lambda x, y: (jnp.cumsum(x, 1), lax.cumsum(y, 0, reverse=True), jnp.sum(x, (0, 2))),
    "products": lambda x, y: (jnp.prod(x, 1), jnp.cumprod(x, 1)),
    "movements": lambda x, y: jnp.flip(jnp.moveaxis(x[:, ::2], 0, 2), 1).reshape(-1),
    "joined": lambda x, y: jnp.stack(jnp.split(jnp.concatenate([x, x + 1], 2), 2, 2)),
    "tiled": lambda x, y: jnp.tile(x, (1, 2, 1)),
    "padded": lambda x, y: lax.pad(x, np.float32(3), [(1, 0, 1), (0, 2, 0), (-1, 0, 0)]),
    "dynamic slice": lambda x, y: lax.dynamic_slice(x, (0, 1, 9), (2, 2, 3)),
    "update": lambda x, y: lax.dynamic_update_slice(x, x[:1, :2] + 1, (1, 2, 0)),
    "rows": lambda x, y: (x[jnp.array([1, 0, 1])], jnp.take(x, jnp.array([5, 0]), 0, fill_value=0)),
    "written": lambda x, y: x.at[:, jnp.array([1, 3])].set(x[:, :2] * 2),
    "added": lambda x, y: x[0].at[jnp.array([2, 0, 2])].add(x[1, :3]),
    "subtracted": lambda x, y: lax.scatter_sub(x[0], ROWS, x[1, :3], DIMENSIONS),
    "chosen": lambda x, y: (jnp.where(jnp.arange(4)[None, None] < 2, x, 7.0), lax.select_n(ROWS[0, 0] > 5, x, -x)),
    "one-hot": lambda x, y: jax.nn.one_hot(jnp.arange(5), 5) @ x[0],
    "convolution": lambda x, y: lax.conv_general_dilated(
        x, jnp.moveaxis(y, 2, 1)[..., :2], (2,), [(1, 2)], (2,), (2,), ("NWC", "OIW", "WNC"), 1
    ),
    "convolution in groups": lambda x, y: lax.conv_general_dilated(
        x, jnp.concatenate([y, y])[:, :2], (1,), [(0, 0)], dimension_numbers=("NWC", "OIW", "NWC"),
        feature_group_count=2,
    ),
    "pools": lambda x, y: pooled(x, lax.add, 0, padding=[(0, 0), (1, 0), (0, 1)], window_dilation=(1, 2, 1)),
    "ragged": lambda x, y: lax.ragged_dot(x[0], jnp.stack([y[0].T, y[1].T, y[2].T]), jnp.array([1, 0, 3])),
    "scan": lambda x, y: stepped(x[0], y[0][:4].T),
    "scan of nothing": lambda x, y: stepped(x[0][:0], y[0][:4].T),
    "while": lambda x, y: looped(x),
    "cond": lambda x, y: lax.cond(jnp.array(True), lambda a: (a + 1, a), lambda a: (a, a), x),
    "calls": lambda x, y: jax.checkpoint(jax.jit(jnp.square))(jax.jit(jnp.sum)(x * 0) + 3) * x,
    "precision": lambda x, y: x.astype(jnp.bfloat16).astype(jnp.float32),
    "constants": lambda x, y: x * jnp.round(jnp.sin(jnp.arange(4.0)) * 9)[None, None],
    "barrier": lambda x, y: lax.optimization_barrier((x, y)),
}  # fmt: skip


def in_the_field(fn, *inputs, seed=0):
    program = jax.make_jaxpr(fn)(*inputs)
    return run(program, [Field(embed(np.asarray(x))) for x in inputs], seed)


def residues(value):
    return value.residues if isinstance(value, Field) else embed(np.asarray(value))


@pytest.mark.parametrize("fn", slow_but(EXACT, *EXACT))
def test_what_is_exact_gives_the_integers_that_jax_gives(fn):
    x, y = integers(2, 5, 4), integers(3, 5, 4, seed=1)
    expected = jax.tree.leaves(jax.jit(fn)(x, y))
    for got, real in zip(in_the_field(fn, x, y), expected, strict=True):
        assert np.array_equal(residues(got), embed(np.asarray(real)))


def relations(x, s, by):
    """What passes a multiplication by a square: each with what it should be."""
    positive = by * x
    return {
        "relu": (jax.nn.relu(positive), by * jax.nn.relu(x)),
        "abs": (jnp.abs(positive), by * jnp.abs(x)),
        "sign": (jnp.sign(positive), jnp.sign(x)),
        "sqrt": (jnp.sqrt(positive * positive), by * jnp.abs(x)),
        "rsqrt": (lax.rsqrt(by) * lax.rsqrt(x * x), lax.rsqrt(x * x * by)),
        "pow": (positive**1.5, by**1.5 * x**1.5),
        "clamp": (jnp.clip(positive, -by, by), by * jnp.clip(x, -1.0, 1.0)),
        "where": (jnp.where(positive > 0, positive, 0), jnp.where(x >= 0, by * x, 0)),
        "max": (jnp.max(positive, 1), by * jnp.max(x, 1)),
        "min": (jnp.min(positive, 1), -by * jnp.max(-x, 1)),
        "cummax": (lax.cummax(positive, 1), by * lax.cummax(x, 1)),
        "cummin": (lax.cummin(positive, 1, True), -by * lax.cummax(-x, 1, True)),
        "sort": (jnp.sort(positive, 1), by * jnp.sort(x, 1)),
        "sort descending": (jnp.sort(x, descending=True), -jnp.sort(-x)),
        "argsort": (jnp.argsort(positive), jnp.argsort(x)),
        "top_k": (lax.top_k(positive, 2), lax.top_k(x, 2)[0] * by, lax.top_k(x, 2)[1]),
        "the top is the max": (lax.top_k(x, 1)[0][..., 0], jnp.max(x, 1)),
        "argmax": (jnp.argmax(positive, 1), jnp.argmin(-x, 1)),
        "max pool": (pooled(positive[None], lax.max, -np.inf, padding="SAME"),
                     by * pooled(x[None], lax.max, -np.inf, padding="SAME")),
        "min pool": (pooled(positive[None], lax.min, np.inf, padding="SAME"),
                     -by * pooled(-x[None], lax.max, -np.inf, padding="SAME")),
        "no softmax of s x": (jnp.max(x + s, 1), jnp.max(x, 1) + s),
        "softmax": (jax.nn.softmax(x + s), jax.nn.softmax(x)),
        "finite": (jnp.isfinite(x), x == x),
    }  # fmt: skip


@pytest.mark.parametrize("name", relations(integers(4, 6), 2.0, 4.0))
def test_positive_factors_pass_what_they_pass_in_floats(name):
    def fn(x, s):
        return jax.tree.leaves(relations(x, s, s * s)[name])

    rng = np.random.default_rng(0)
    program = jax.make_jaxpr(fn)(integers(4, 6), jnp.float32(3))
    operands = [Field(draw(rng, (4, 6))), Field(draw(rng, ()))]
    made = list(map(residues, run(program, operands, 0)))
    half = len(made) // 2
    for got, expected in zip(made[:half], made[half:], strict=True):
        assert np.array_equal(got, expected)


def test_negative_factors_and_sums_do_not_pass():
    """A sign is one, a maximum does not turn over, and nothing is known of exp but that it is a function."""
    wrong = lambda x, s: [
        (jax.nn.relu(-s * s * x), -s * s * jax.nn.relu(x)),
        (jnp.max(-x, 1), -jnp.max(x, 1)),
        (jnp.exp(x + s), jnp.exp(x) * jnp.exp(s)),
        (jnp.floor(x + s), jnp.floor(x) + s),
        (jnp.tanh(x), jnp.exp(x)),
        (jnp.sort(x[:, :1] * x, 1), x[:, :1] * jnp.sort(x, 1)),
    ]
    program = jax.make_jaxpr(wrong)(integers(9, 6), jnp.float32(3))
    rng = np.random.default_rng(1)
    made = run(program, [Field(draw(rng, (9, 6))), Field(draw(rng, ()))], 0)
    for left, right in zip(made[::2], made[1::2], strict=True):
        assert not np.array_equal(residues(left), residues(right))


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda x: jnp.linalg.cholesky(x), r"`cholesky` at .*test_field_rules.py:\d+"),
        (lambda x: lax.complex(x, x).real, "`complex` at "),
        (lambda x: x * jnp.inf, "`mul`.*infinity as a factor"),
        (lambda x: jnp.inf / x, "`div`.*infinity as a factor"),
        (lambda x: x @ jnp.full((3, 2), -jnp.inf), "`dot_general`.*infinity as a factor"),
        (
            lambda x: lax.while_loop(lambda x: x[0, 0] != 0, lambda x: x * x, x),
            "`while`.*20 steps",
        ),
    ],
)
def test_what_has_no_rule_is_named_with_its_line(fn, message, monkeypatch):
    monkeypatch.setattr(running, "MOST_STEPS", 20)
    with pytest.raises(ValueError, match=message):
        in_the_field(fn, 2 + jnp.eye(3))


def test_what_returns_nothing_and_keys_are_as_always():
    def fn(x):
        jax.debug.print("{}", x)
        return x / jnp.inf, jax.random.key(3)

    zeros, key = in_the_field(fn, integers(4))
    assert not residues(zeros).any()
    assert key == jax.random.key(3)


def test_half_powers_of_positive_and_negative_numbers_differ():
    """A sign is not lost in a root; a factor passes it either way."""
    x, s = draw(np.random.default_rng(0), (2, 9))
    fn = lambda x, s: (jnp.sqrt(s * s * x), s * s * x, jnp.sqrt(x), jnp.sqrt(-x))
    program = jax.make_jaxpr(fn)(integers(9), integers(9))
    of_product, _, of_x, of_minus = map(residues, run(program, [Field(x), Field(s)], 0))
    s_or_minus_s = mul(of_x, s)
    assert ((of_product == s_or_minus_s) | (of_product == sub(np.uint32(0), s_or_minus_s))).all()
    assert (of_x != of_minus).all()


def test_integers_of_floats_are_small_and_the_same_for_the_same_number():
    fn = lambda x: (x.astype(jnp.int32), x.astype(bool), x.astype(jnp.int8))
    numbers, booleans, small = in_the_field(fn, jnp.array([0.0, 1.5, 1.5, 7.25]))
    assert numbers[1] == numbers[2]
    assert len(set(numbers.tolist())) == 3
    assert small.dtype == np.int8
    assert booleans.tolist() == [False, True, True, True]
