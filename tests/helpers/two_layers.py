"""A language model of two small layers, with all that rotations meet, and its spaces by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from traced import normal

from sqjax.folding.space import Along, Space

HIDDEN, HEADS, SHARED, HEAD, WIDE, EXPERTS, VOCABULARY = 16, 4, 2, 4, 6, 3, 7
IDS = jnp.array([3, 0, 5, 5, 1])


def parameters(biased=False, sandwich=False):
    """Float leaves, none of them special; `biased` for LayerNorm."""
    shapes = {"embed": (VOCABULARY, HIDDEN)}
    for layer in "01":
        own = {
            "gain_1": (HIDDEN,),
            "q": (HIDDEN, HEADS * HEAD),
            "k": (HIDDEN, SHARED * HEAD),
            "v": (HIDDEN, SHARED * HEAD),
            "o": (HEADS * HEAD, HIDDEN),
            "gain_2": (HIDDEN,),
            "router": (HIDDEN, EXPERTS),
            "gate": (EXPERTS, HIDDEN, WIDE),
            "up": (EXPERTS, HIDDEN, WIDE),
            "down": (EXPERTS, WIDE, HIDDEN),
        }
        if biased:
            own |= {"bias_1": (HIDDEN,), "bias_2": (HIDDEN,)}
        if sandwich:
            own |= {"after": (HIDDEN,)}
        shapes |= {f"{layer}/{name}": shape for name, shape in own.items()}
    shapes |= {"gain": (HIDDEN,), "head": (HIDDEN, VOCABULARY)}
    return {
        path: normal(*shape, seed=number) for number, (path, shape) in enumerate(shapes.items())
    }


def rms(x):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def layer_norm(x):
    centred = x - jnp.mean(x, -1, keepdims=True)
    return centred * lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-6)


def scale(x, p, layer, number):
    bias = p.get(f"{layer}/bias_{number}")
    y = x * p[f"{layer}/gain_{number}"][None]
    return y if bias is None else y + bias[None]


def turned(x):
    """Rotary positions of (tokens, heads, HEAD)."""
    angles = np.arange(x.shape[0])[:, None] / 10.0 ** np.arange(HEAD // 2)[None]
    cos, sin = (jnp.asarray(f(angles)[:, None], jnp.float32) for f in (np.cos, np.sin))
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def attention(p, layer, h):
    tokens = h.shape[0]
    q, k, v = ((h @ p[f"{layer}/{name}"]).reshape(tokens, -1, HEAD) for name in "qkv")
    k, v = (jnp.repeat(x, HEADS // SHARED, 1) for x in (turned(k), v))
    scores = jnp.einsum("qhd,khd->hqk", turned(q), k) / 2.0
    seen = jnp.tril(jnp.ones((1, tokens, tokens), bool))
    mixed = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), v)
    return mixed.reshape(tokens, -1) @ p[f"{layer}/o"]


def experts(p, layer, h):
    weights, chosen = lax.top_k(jax.nn.softmax(h @ p[f"{layer}/router"]), 2)
    gate, up = (jnp.einsum("td,edf->tef", h, p[f"{layer}/{name}"]) for name in ("gate", "up"))
    made = jnp.einsum("tef,efd->ted", jax.nn.silu(gate) * up, p[f"{layer}/down"])
    of_chosen = jnp.take_along_axis(made, chosen[..., None], 1)
    return jnp.sum(weights[..., None] * of_chosen, 1)


def language_model(norm):
    """fn(params, ids) of RMSNorms or LayerNorms."""

    def fn(p, ids):
        x = p["embed"][ids]
        for layer in "01":
            y = attention(p, layer, scale(norm(x), p, layer, 1))
            if f"{layer}/after" in p:
                y = rms(y) * p[f"{layer}/after"][None]
            x = x + y
            x = x + experts(p, layer, scale(norm(x), p, layer, 2))
        return (norm(x) * p["gain"][None]) @ p["head"]

    return fn


def residual(params, keeps_ones=False):
    """The space of the residual stream."""
    places = {"embed": 1, "head": 0}
    for layer in "01":
        own = dict.fromkeys(("q", "k", "v", "router"), 0) | dict.fromkeys(("gate", "up"), 1)
        own |= {"o": 1, "down": 2}
        places |= {f"{layer}/{name}": axis for name, axis in own.items()}
        biases = [f"{layer}/bias_{number}" for number in (1, 2)]
        places |= {path: 0 for path in biases if path in params}
    gains = tuple(path for path in params if path.rpartition("/")[2].startswith("gain"))
    leaves = tuple((path, Along(axis)) for path, axis in places.items())
    return Space("residual", HIDDEN, leaves, gains, keeps_ones)


def values(layer="0"):
    """The space of what attention mixes, one Q for all heads."""
    leaves = ((f"{layer}/v", Along(1, SHARED)), (f"{layer}/o", Along(0, HEADS)))
    return Space(f"{layer}/o", HEAD, leaves)


def feed_forward(layer="0"):
    """What may change places, in all experts alike."""
    leaves = ((f"{layer}/gate", Along(2)), (f"{layer}/up", Along(2)), (f"{layer}/down", Along(1)))
    return Space(f"{layer}/down", WIDE, leaves)
