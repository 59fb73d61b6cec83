"""Programs with a space by hand that a careless search would give: no rotation of it is lawful."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from traced import normal

from sqjax.folding.space import Along, Space


class Unlawful(NamedTuple):
    """A function, its arguments, and the space that must be refused."""

    fn: Callable[..., Any]
    params: dict[str, Any]
    inputs: tuple[Any, ...]
    space: Space


SIZE = 6
X = normal(5, SIZE)
VECTOR = normal(1, SIZE, seed=5)


def square(*names):
    return {name: normal(SIZE, SIZE, seed=seed) for seed, name in enumerate(names)}


def between(make, columns=("e",), rows=("w",), size=SIZE, space=None, **more):
    """make(h, p, x) stands between the kernel e, whose columns turn, and w, whose rows do."""
    params = square(*columns, *rows) | more
    leaves = [*((name, Along(1)) for name in columns), *((name, Along(0)) for name in rows)]
    fn = lambda p, x: make(x @ p["e"], p, x) @ p["w"]
    return Unlawful(fn, params, (X,), space or Space("w", size, tuple(leaves)))


def rms(h):
    return h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6)


def centred(h):
    return h - jnp.mean(h, -1, keepdims=True)


def layer_norm(h):
    return centred(h) * lax.rsqrt(jnp.var(h, -1, keepdims=True) + 1e-6)


def grouped_norm(h, p, x):
    """An RMSNorm of each half of the channels."""
    return rms(h.reshape(5, 2, 3)).reshape(5, SIZE)


def each_head_attends(p, x):
    """Two heads of three channels; Q of all six mixes their values."""
    q, k, v = ((x @ p[name]).reshape(5, 2, 3) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k))
    return jnp.einsum("hqk,khd->qhd", weights, v).reshape(5, SIZE) @ p["o"]


def positioned(p, x):
    """Positions turn pairs of channels of queries and keys."""
    angles = jnp.arange(5.0)[:, None] / 10.0 ** jnp.arange(3.0)[None]

    def turned(h):
        a, b = jnp.split(h, 2, 1)
        return jnp.concatenate(
            [
                a * jnp.cos(angles) - b * jnp.sin(angles),
                a * jnp.sin(angles) + b * jnp.cos(angles),
            ],
            1,
        )

    return jax.nn.softmax(turned(x @ p["q"]) @ turned(x @ p["k"]).T) @ x


def routed(p, x):
    """Experts behind an RMSNorm, and the router that reads it too."""
    h = rms(x @ p["e"])
    weights, chosen = lax.top_k(jax.nn.softmax(h @ p["router"]), 2)
    made = jnp.einsum("td,cdf->tcf", h, p["w"])
    return jnp.sum(weights[..., None] * jnp.take_along_axis(made, chosen[..., None], 1), 1)


def determinants(p, x):
    """x1 y2 - x2 y1 of every pair of tokens: a turn of the plane keeps it, a mirror does not."""
    (a, b), (c, d) = (jnp.split(x @ p[name], 2, 1) for name in "uv")
    return a @ d.T - b @ c.T


PLANE = {"u": normal(SIZE, 2), "v": normal(SIZE, 2, seed=1)}


def steps(p, x):
    """A residual stream in a scan, and a gain inside."""

    def step(h, gain):
        return h + rms(h) * gain[None] @ p["a"] @ p["b"], None

    return lax.scan(step, x @ p["e"], p["gains"])[0] @ p["w"]


def tied(p, ids):
    """The head is the embedding, and between them stands a gain that can not move into it."""
    return (rms(p["embed"][ids]) * p["gain"][None]) @ p["embed"].T


def of_residual(**places):
    return tuple((name, Along(axis)) for name, axis in places.items())


E_AND_W = of_residual(e=1, w=0)

UNLAWFUL: dict[str, Unlawful] = {
    # What works on each channel apart.
    "relu": between(lambda h, p, x: jax.nn.relu(h)),
    "gelu": between(lambda h, p, x: jax.nn.gelu(h)),
    "silu and a gate": between(lambda h, p, x: jax.nn.silu(h) * h),
    "tanh": between(lambda h, p, x: jnp.tanh(h)),
    "abs": between(lambda h, p, x: jnp.abs(h)),
    "cube": between(lambda h, p, x: h**3),
    "clip": between(lambda h, p, x: jnp.clip(h, -1.0, 1.0)),
    "round": between(lambda h, p, x: jnp.round(h)),
    "float8 in between": between(
        lambda h, p, x: h.astype(jnp.float8_e4m3fn).astype(jnp.float32)
    ),
    "a mask by sign": between(lambda h, p, x: jnp.where(h > 0, h, 0.0)),
    "members multiplied, not summed": between(lambda h, p, x: h * (x @ p["f"]), ("e", "f")),
    "dropout of channels": between(
        lambda h, p, x: jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, h.shape), h, 0.0)
    ),
    # What differs from channel to channel.
    "a constant is added": between(lambda h, p, x: h + VECTOR),
    "a constant multiplies": between(lambda h, p, x: h * VECTOR),
    "one is added": between(lambda h, p, x: h + 1.0),
    "a gain is not named": between(lambda h, p, x: rms(h) * p["gain"][None], gain=normal(SIZE)),
    "a bias is forgotten": between(lambda h, p, x: h + p["bias"][None], bias=normal(SIZE)),
    "the input is added": between(lambda h, p, x: h + x),
    "a bias of another width": between(
        lambda h, p, x: h + jnp.pad(p["bias"], (0, 3))[None], bias=normal(3)
    ),
    # What mixes channels.
    "softmax over channels": between(lambda h, p, x: jax.nn.softmax(h)),
    "the largest channel": between(lambda h, p, x: h - jnp.max(h, -1, keepdims=True)),
    "sorted channels": between(lambda h, p, x: jnp.sort(h, -1)),
    "the best channel is looked up": between(
        lambda h, p, x: h + p["table"][jnp.argmax(h, -1)], table=normal(SIZE, SIZE, seed=3)
    ),
    "channels in another order": between(lambda h, p, x: h[:, ::-1]),
    "channels one further": between(lambda h, p, x: jnp.roll(h, 1, 1)),
    "sums along channels": between(lambda h, p, x: jnp.cumsum(h, 1)),
    "half of the channels": between(lambda h, p, x: h.at[:, 3:].set(0.0)),
    "a convolution over channels": between(
        lambda h, p, x: jax.vmap(lambda row: jnp.convolve(row, p["k"], "same"))(h), k=normal(3)
    ),
    # Norms.
    "a norm of absolute values": between(lambda h, p, x: h / jnp.sum(jnp.abs(h), -1, keepdims=True)),
    "a norm of fourth powers": between(
        lambda h, p, x: h * lax.rsqrt(jnp.mean(h**4, -1, keepdims=True))
    ),
    "a norm by the largest": between(
        lambda h, p, x: h / jnp.max(jnp.abs(h), -1, keepdims=True)
    ),
    "a weighted norm": between(
        lambda h, p, x: h * lax.rsqrt(jnp.mean(h * h * VECTOR**2, -1, keepdims=True))
    ),
    "a norm in two halves": between(grouped_norm),
    "LayerNorm, and Q moves ones": between(lambda h, p, x: layer_norm(h)),
    "centred, and Q moves ones": between(lambda h, p, x: centred(h)),
    "the mean of channels is read": between(lambda h, p, x: h * jnp.mean(h, -1, keepdims=True)),
    # Who reads or makes it besides.
    "fn returns it": Unlawful(
        lambda p, x: ((h := x @ p["e"]) @ p["w"], h), square("e", "w"), (X,), Space("w", SIZE, E_AND_W)
    ),
    "fn returns the kernel": Unlawful(
        lambda p, x: (x @ p["e"] @ p["w"], p["w"]), square("e", "w"), (X,), Space("w", SIZE, E_AND_W)
    ),
    "a kernel behind is forgotten": between(lambda h, p, x: h + h @ p["a"], a=normal(SIZE, SIZE)),
    "a kernel twice": Unlawful(
        lambda p, x: x @ p["e"] @ p["e"], square("e"), (X,), Space("e", SIZE, of_residual(e=1))
    ),
    "a router is forgotten": Unlawful(
        routed,
        {"e": normal(SIZE, SIZE), "router": normal(SIZE, 3), "w": normal(3, SIZE, 4)},
        (X,),
        Space("w", SIZE, of_residual(e=1, w=1)),
    ),
    "a tied head behind a gain": Unlawful(
        tied,
        {"embed": normal(7, SIZE), "gain": normal(SIZE)},
        (jnp.arange(7),),
        Space("embed", SIZE, of_residual(embed=1)),
    ),
    "a gain in every step of a scan": Unlawful(
        steps,
        square(*"eabw") | {"gains": normal(2, SIZE)},
        (X,),
        Space("w", SIZE, of_residual(e=1, a=0, b=1, w=0)),
    ),
    # Attention.
    "queries alone": Unlawful(
        lambda p, x: jax.nn.softmax((x @ p["q"]) @ (x @ p["k"]).T) @ x,
        square("q", "k"),
        (X,),
        Space("q", SIZE, of_residual(q=1)),
    ),
    "queries and keys behind positions": Unlawful(
        positioned, square("q", "k"), (X,), Space("q", SIZE, of_residual(q=1, k=1))
    ),
    "values of all heads by one Q": Unlawful(
        each_head_attends, square(*"qkvo"), (X,), Space("o", SIZE, of_residual(v=1, o=0))
    ),
    "channels attend to channels": between(lambda h, p, x: h @ jax.nn.softmax(h.T @ h)),
    "determinants": Unlawful(determinants, PLANE, (X,), Space("u", 2, of_residual(u=1, v=1))),
    "roots of determinants": Unlawful(
        lambda p, x: jnp.sqrt(determinants(p, x)), PLANE, (X,), Space("u", 2, of_residual(u=1, v=1))
    ),
    "a branch that adds a constant": between(
        lambda h, p, x: lax.cond(x.shape[0] > 4, lambda h: h + VECTOR, lambda h: h, h)
    ),
    # Where it lies.
    "the keys' place for the values'": Unlawful(
        lambda p, x: (
            lambda q, k, v: jax.nn.softmax(q @ k.T) @ v @ p["o"]
        )(*jnp.split(x @ p["qkv"], 3, 1)),
        {"qkv": normal(SIZE, 3 * SIZE), "o": normal(SIZE, SIZE)},
        (X,),
        Space("o", SIZE, (("qkv", Along(1, start=SIZE)), ("o", Along(0)))),
    ),
    "heads side by side for channels": Unlawful(
        each_head_attends,
        square(*"qkvo"),
        (X,),
        Space("o", 3, (("v", Along(1, 1, 2)), ("o", Along(0, 1, 2)))),
    ),
}  # fmt: skip
