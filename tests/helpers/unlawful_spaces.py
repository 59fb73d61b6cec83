"""Spaces that are none: `UNLAWFUL[name]` is (fn, params, inputs, (the space, written by hand)).

Some programs have something in the way, others a space that is written wrongly. For each a rotation
of these leaves changes the outputs, which a test shows beside the refusals.
"""

import jax
import jax.numpy as jnp
import numpy as np
from lawful_spaces import (
    CASES,
    IDS,
    LLAMA,
    OPT_BLOCK,
    RESIDUAL,
    Case,
    X,
    named,
    normal,
    rms,
    space,
)


def between(step):
    """fn, params, inputs and space of y = step(x @ u) @ v, for six channels."""
    return Case(
        lambda p, x: step(x @ p["u"]) @ p["v"],
        named(u=(5, 6), v=(6, 3)),
        (X,),
        (space("6 u:1 v:0"),),
    )


def ones(case):
    """The same, by rotations that keep the vector of ones."""
    return case._replace(spaces=tuple(s._replace(keeps_ones=True) for s in case.spaces))


def of(name, text, gains="", keeps_ones=False):
    """A lawful program with another space."""
    return CASES[name]._replace(spaces=(space(text, gains, keeps_ones),))


def without(case, *paths):
    """The first space of a case, of which leaves are forgotten."""
    [first, *_] = case.spaces
    left = tuple(pair for pair in first.leaves if pair[0] not in paths)
    return case._replace(spaces=(first._replace(leaves=left),))


def residual(fn, **more):
    """A residual of six channels with a norm, and what `fn(p, x, h)` makes of both."""
    params = named(embed=(5, 6), g1=(6,), up=(6, 7), down=(7, 6))

    def whole(p, ids):
        x = p["embed"][ids]
        x = x + jnp.tanh(rms(x, p["g1"]) @ p["up"]) @ p["down"]
        return fn(p, x)

    text = "6 embed:1 up:0 down:1" + "".join(f" {path}:0" for path in more)
    return Case(whole, {**params, **named(**more)}, (IDS,), (space(text, "g1"),))


def loop_reads(p, x):
    """A while loop reads the channels."""
    y = x @ p["u"]
    body = lambda state: (state[0] + 1, jnp.tanh(state[1] + y))
    return jax.lax.while_loop(lambda s: s[0] < 2, body, (0, y))[1] @ p["v"]


def branch_reads(p, x):
    y = x @ p["u"]
    return jax.lax.cond(x[0, 0] > 100.0, lambda y: y, jnp.tanh, y) @ p["v"]


def over_channels(p, x):
    """A scan runs over the channels."""
    step = lambda h, column: (jnp.tanh(h + column), h)
    return jax.lax.scan(step, jnp.zeros(x.shape[0], x.dtype), (x @ p["u"]).T)[1].T @ p["v"]


def carries_squares(p, x):
    """The sum of squares over tokens, channel by channel."""
    step = lambda h, row: (row * row, h)
    return jax.lax.scan(step, jnp.zeros(6, x.dtype), x @ p["u"])[1].max(-1)


def returns_squares(p, x):
    return jnp.square(x @ p["u"])


def between_zeros(p, x):
    """Two channels with zeros on both sides: 0 x y 0."""
    return jnp.pad(x @ p["u"], ((0, 0), (1, 1))) @ p["v"]


def beside_zeros(p, x):
    y = x @ p["u"]
    zero = jnp.zeros_like(y[:, :1])
    return jnp.concatenate([zero, y, zero], -1) @ p["v"]


def drawn_apart(p, x):
    config = ((0, 0, 0), (0, 0, 2))
    return jax.lax.pad(x @ p["u"], jnp.zeros((), x.dtype), config) @ p["v"]


def infinite_row(p, x):
    """A row of infinities, of which one kernel makes what another one does not."""
    y = x @ p["u"]
    return jnp.exp(jnp.concatenate([y, jnp.full_like(y, -jnp.inf)]) @ p["v"])


def ragged_rows(p, x):
    sizes = jnp.array([1, 2], jnp.int32)
    return p["mix"] @ jax.lax.ragged_dot(p["table"], p["u"], sizes) + x.sum()


def ragged_sum(p, x):
    """For each group of rows the product of the two tables: a sum over some of the rows."""
    numbers = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    sizes = jnp.array([1, 2], jnp.int32)
    y = jax.lax.ragged_dot_general(p["table"], p["other"], sizes, numbers)
    return y.sum((1, 2)) + x.sum()


def gain_and_bias(p, ids):
    x = p["embed"][ids]
    return (rms(x, p["g1"]) + p["g1"]) @ p["head"]


def one_plus_bias(p, x):
    return (x @ p["u"] + (1.0 + p["w"])) @ p["v"]


def picked(p, x):
    return (x @ p["u"])[:, jnp.array([1, 1, 0, 3, 2, 5])] @ p["v"]


def convolved(p, x):
    """Along the channels, as if they were places."""
    y = (x @ p["u"])[:, None]
    kernel = jnp.array([[[1.0, 2.0, 1.0]]], x.dtype)
    return jax.lax.conv_general_dilated(y, kernel, (1,), "SAME")[:, 0] @ p["v"]


def all_outputs(p, ids):
    x = p["embed"][ids]
    return x, rms(x, p["g1"]) @ p["head"]


def of_an_input(p, x, y):
    return (x @ p["u"] + y) @ p["v"]


def gated(p, x):
    return jax.nn.silu(x @ p["gate"]) * (x @ p["up"]) @ p["down"]


WEIGHTS = np.arange(1.0, 7.0)
SMALL = named(embed=(5, 6), g1=(6,), head=(6, 5))
UNLAWFUL = {
    # Something stands in the way.
    "rounded to few bits": between(lambda h: jax.lax.reduce_precision(h, 8, 3)),
    "through relu": between(jax.nn.relu),
    "gelu": between(jax.nn.gelu),
    "softmax": between(lambda y: jax.nn.softmax(y, -1)),
    "sort": between(lambda y: jnp.sort(y, -1)),
    "rounded": between(jnp.round),
    "cumulative": between(lambda y: jnp.cumsum(y, -1)),
    "reversed": between(lambda y: y[:, ::-1]),
    "shifted": between(lambda y: jnp.roll(y, 1, -1)),
    "permuted": Case(picked, named(u=(5, 6), v=(6, 3)), (X,), (space("6 u:1 v:0"),)),
    "some of them": Case(
        lambda p, x: (x @ p["u"])[:, :4] @ p["v"], named(u=(5, 6), v=(4, 3)), (X,),
        (space("3 u:1@2 v:0@1"),),
    ),
    "weighed": between(lambda y: y * WEIGHTS.astype(y.dtype)),
    "a gain weighed": Case(
        lambda p, ids: p["embed"][ids] * (p["g1"] * WEIGHTS.astype(p["g1"].dtype)) @ p["head"],
        SMALL, (IDS,), (space("6 embed:1 head:0", "g1"),),
    ),
    "some masked": between(lambda y: jnp.where(np.arange(6) > 2, y, 0.0)),
    "shifted by a constant": between(lambda y: y + WEIGHTS.astype(y.dtype)),
    "shifted by a number": between(lambda y: y + 1.0),
    "chosen": between(lambda y: jnp.where(y > 0, y, 2.0 * y)),
    "divided by the largest": between(lambda y: y / jnp.max(jnp.abs(y), -1, keepdims=True)),
    "divided by the mean size": between(lambda y: y / jnp.mean(jnp.abs(y), -1, keepdims=True)),
    "divided by cubes": between(lambda y: y / jnp.sum(y**3, -1, keepdims=True)),
    "weighed squares": between(
        lambda y: y / jnp.sum(y * y * WEIGHTS.astype(y.dtype), -1, keepdims=True)
    ),
    "squares through a kernel": between(jnp.square),
    "some squares": between(lambda y: y / jnp.sum(y[:, :3] ** 2, -1, keepdims=True)),
    "mean taken": between(lambda y: y - jnp.mean(y, -1, keepdims=True)),
    "mean of a part": ones(between(lambda y: y - jnp.mean(y[:, :3], -1, keepdims=True))),
    "convolved": Case(convolved, named(u=(5, 6), v=(6, 3)), (X,), (space("6 u:1 v:0"),)),
    "in a while loop": Case(loop_reads, named(u=(5, 6), v=(6, 3)), (X,), (space("6 u:1 v:0"),)),
    "in a branch": Case(branch_reads, named(u=(5, 6), v=(6, 3)), (X,), (space("6 u:1 v:0"),)),
    "scanned over": Case(over_channels, named(u=(5, 6), v=(6, 3)), (X,), (space("6 u:1 v:0"),)),
    "squares carried": Case(carries_squares, named(u=(5, 6)), (X,), (space("6 u:1"),)),
    "squares returned": Case(returns_squares, named(u=(5, 6)), (X,), (space("6 u:1"),)),
    "returned": Case(all_outputs, SMALL, (IDS,), (space("6 embed:1 head:0", "g1"),)),
    "an input added": Case(
        of_an_input, named(u=(5, 6), v=(6, 3)), (X, normal(3, 6)), (space("6 u:1 v:0"),)
    ),
    "a gated product": Case(
        gated, named(gate=(5, 7), up=(5, 7), down=(7, 3)), (X,), (space("7 gate:1 up:1 down:0"),)
    ),
    "rotary": of("llama", "2 wq:1/4x1 wk:1/2x1"),
    "embedding read twice": residual(lambda p, x: x @ p["v"] + jnp.tanh(p["embed"][0]).sum(), v=(6, 3)),
    "a norm's own gain added": Case(
        gain_and_bias, SMALL, (IDS,), (space("6 embed:1 g1:0 head:0", "g1"),)
    ),
    "one plus a bias": Case(
        one_plus_bias, named(u=(5, 6), w=(6,), v=(6, 3)), (X,), (space("6 u:1 w:0 v:0"),)
    ),
    "a squared bias": residual(lambda p, x: (x + p["b"] ** 2) @ p["v"], v=(6, 3), b=(6,)),
    # A place that stands for another vector's.
    "zeros on both sides": Case(
        between_zeros, named(u=(5, 2), v=(4, 3)), (X,), (space("2 u:1 v:0/1x2"),)
    ),
    "zeros beside": Case(
        beside_zeros, named(u=(5, 2), v=(4, 3)), (X,), (space("2 u:1 v:0/1x2"),)
    ),
    "drawn apart": Case(
        drawn_apart, named(u=(5, 4), v=(10, 3)), (X,), (space("2 u:1/2x1 v:0/5x1"),)
    ),
    "of two vectors": Case(
        lambda p, x: (x @ p["u"])[:, 1:3] @ p["v"], named(u=(5, 4), v=(2, 3)), (X,),
        (space("2 u:1/1x2 v:0"),),
    ),
    "every third": Case(
        lambda p, x: (x @ p["u"])[:, ::3] @ p["v"], named(u=(5, 4), v=(2, 3)), (X,),
        (space("2 u:1/2x1 v:0"),),
    ),
    "infinite": Case(
        infinite_row, {"u": normal(5, 2), "v": np.abs(normal(2, 3))}, (X,), (space("2 u:1 v:0"),)
    ),
    "rows of experts": Case(
        ragged_rows, named(table=(3, 4), u=(2, 4, 5), mix=(2, 3)), (X,),
        (space("3 table:0 mix:1"),),
    ),
    "sums of some rows": Case(
        ragged_sum, named(table=(3, 4), other=(3, 5)), (X,), (space("3 table:0 other:0"),)
    ),
    # A lawful program, and a space that is written wrongly.
    "gains forgotten": Case(
        CASES["llama"].fn, {**LLAMA, "g1": WEIGHTS, "g2": WEIGHTS}, (IDS,),
        (space(RESIDUAL + " head:0"),),
    ),
    "router forgotten": without(CASES["experts"], "router"),
    "router of ragged experts forgotten": without(CASES["ragged experts"], "router"),
    "head forgotten": without(CASES["llama"], "head"),
    "bias forgotten": without(CASES["opt"], "bdown"),
    "norm's bias forgotten": without(CASES["opt"], "b3"),
    "class token forgotten": without(CASES["vit"], "cls"),
    "one of a stack forgotten": without(CASES["scan"], "layers/up"),
    "LayerNorm turned at will": of(
        "opt", f"6 embed:1 places:1 {OPT_BLOCK} b3:0", "g1 g2 g3"
    ),
    "BERT turned at will": of(
        "bert", f"6 embed:1 kinds:1 places:1 b0:0 {OPT_BLOCK} pool:0", "g0 g1 g2"
    ),
    "keys for values": of("fused", "2 qkv:1/2x1@8 wo:0/4x1"),
    "a head in part": of("fused", "2 qkv:1/2x1@11 wo:0/4x1"),
    "heads for channels": of("llama", "2 wv:1/1x2 wo:0/4x1"),
    "values alone": of("llama", "2 wv:1/2x1"),
    "all heads as one": of("opt", "4 wv:1 bv:0 wo:0"),
    "queries without their bias": of("opt", "2 wq:1/2x1 wk:1/2x1 bk:0/2x1"),
    "the other axis": of("linear", "6 a:1 b:1"),
    "a cache": of("cached", "2 wv:1/2x1 wo:0/2x1"),
    "one axis of two": of("recurrent", "4 a:1 b:1 c:0"),
}  # fmt: skip
