"""GLM4-MoE and AFMoE as functions of their parameters, tiny, for `exactness.py`.

`sqjax.models` does not read these two families, but any function can be smoothed. They do what
transformers 5.14.1 does: with its random weights their logits were its own to 1e-6 of the largest,
for 12 tokens, one group of experts and a window that is longer than the text.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

VOCABULARY, WIDTH, HEADS, KV_HEADS, SIZE = 61, 32, 4, 2, 8
INNER, EXPERTS, CHOSEN, LAYERS = 24, 4, 2, 2


def norm(x: Any, gain: Any) -> Any:
    """RMSNorm."""
    return gain * (x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5))


def rotary(x: Any, turned: int) -> Any:
    """Turns the first channels of each head by position. x: (batch, tokens, heads, size)."""
    exponents = jnp.arange(0, turned, 2) / turned
    angles = jnp.arange(x.shape[1])[:, None] * 10000.0 ** -exponents[None]
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    first, second, rest = jnp.split(x, [turned // 2, turned], -1)
    halves = first * cos - second * sin, second * cos + first * sin
    return jnp.concatenate([*halves, rest], -1)


def attention(p: Any, x: Any, turned: int) -> Any:
    """Grouped queries with normed heads; a sigmoid gate on the values where the layer has one."""
    batch, tokens, _ = x.shape
    q, k, v = (x @ p[f"{name}_proj"] for name in "qkv")
    if "q_bias" in p:
        q, k, v = q + p["q_bias"], k + p["k_bias"], v + p["v_bias"]
    q = norm(q.reshape(batch, tokens, HEADS, SIZE), p["q_norm"])
    k = norm(k.reshape(batch, tokens, KV_HEADS, SIZE), p["k_norm"])
    v = v.reshape(batch, tokens, KV_HEADS, SIZE)
    if turned:
        q, k = rotary(q, turned), rotary(k, turned)
    q = q.reshape(batch, tokens, KV_HEADS, HEADS // KV_HEADS, SIZE)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", q, k) / SIZE**0.5
    causal = jnp.tril(jnp.ones((tokens, tokens), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), -1)
    out = jnp.einsum("bkgqs,bskd->bqkgd", weights, v).reshape(batch, tokens, -1)
    if "gate_proj" in p:
        out = out * jax.nn.sigmoid(x @ p["gate_proj"])
    return out @ p["o_proj"]


def feed_forward(p: Any, x: Any) -> Any:
    """SwiGLU."""
    return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def experts(p: Any, x: Any) -> Any:
    """A shared expert, and the chosen ones by the sigmoids of a router that reads the same x."""
    scores = jax.nn.sigmoid(x @ p["router"])
    _, chosen = jax.lax.top_k(scores + p["router_bias"], CHOSEN)
    of_token = jax.nn.one_hot(chosen, EXPERTS).sum(-2) * scores
    of_token = of_token / (of_token.sum(-1, keepdims=True) + 1e-20)
    gate = jnp.einsum("btf,efh->bteh", x, p["experts_gate"])
    up = jnp.einsum("btf,efh->bteh", x, p["experts_up"])
    hidden = jax.nn.silu(gate) * up
    out = jnp.einsum("bteh,ehf->btef", hidden, p["experts_down"])
    return (of_token[..., None] * out).sum(-2) + feed_forward(p, x)


def decoder(
    params: Any, ids: Any, turned: tuple[int, ...], scale: float
) -> Any:
    """Logits. A layer with `after` norms has one behind each block too."""
    x = params["embed"][ids] * scale
    for number, how_many in enumerate(turned):
        p = params[f"layer{number}"]
        out = attention(p["attention"], norm(x, p["before"]), how_many)
        x = x + (norm(out, p["after"]) if "after" in p else out)
        block = feed_forward if "router" not in p["mlp"] else experts
        out = block(p["mlp"], norm(x, p["before_mlp"]))
        x = x + (norm(out, p["after_mlp"]) if "after_mlp" in p else out)
    return norm(x, params["norm"]) @ params["head"]


def drawn(gated: bool) -> Any:
    """Random parameters: the first layer dense, the second of experts. `gated`: as AFMoE is."""
    rng = np.random.default_rng(0)

    def matrix(*shape):
        return jnp.asarray(
            rng.normal(size=shape) / shape[-2] ** 0.5, jnp.float32
        )

    def vector(size, middle):
        return jnp.asarray(middle + 0.2 * rng.normal(size=size), jnp.float32)

    queries, keys = HEADS * SIZE, KV_HEADS * SIZE
    params = {
        "embed": 0.4 * matrix(VOCABULARY, WIDTH) * VOCABULARY**0.5,
        "norm": vector(WIDTH, 1),
        "head": 3 * matrix(WIDTH, VOCABULARY),
    }
    norms = ["before", "before_mlp", *["after", "after_mlp"] * gated]
    for number in range(LAYERS):
        heads = {f"{x}_norm": vector(SIZE, 1) for x in "qk"}
        sizes = {"q": queries, "k": keys, "v": keys}
        for name, size in sizes.items():
            heads[f"{name}_proj"] = matrix(WIDTH, size)
            if not gated:
                heads[f"{name}_bias"] = vector(size, 0)
        if gated:
            heads["gate_proj"] = matrix(WIDTH, queries)
        heads["o_proj"] = matrix(queries, WIDTH)
        shapes = {
            "gate": (WIDTH, INNER),
            "up": (WIDTH, INNER),
            "down": (INNER, WIDTH),
        }
        mlp = {name: matrix(*shape) for name, shape in shapes.items()}
        if number:
            mlp |= {
                f"experts_{k}": matrix(EXPERTS, *s) for k, s in shapes.items()
            }
            mlp["router"] = 2 * matrix(WIDTH, EXPERTS)
            mlp["router_bias"] = vector(EXPERTS, 0)
        layer = {"attention": heads, "mlp": mlp}
        params[f"layer{number}"] = layer | {x: vector(WIDTH, 1) for x in norms}
    return params


def glm4_moe() -> Any:
    """(function, parameters, no untied form, vocabulary); half of each head turns."""
    fn = partial(decoder, turned=(SIZE // 2, SIZE // 2), scale=1.0)
    return fn, drawn(gated=False), None, VOCABULARY


def afmoe() -> Any:
    """As `glm4_moe`; the second layer attends without positions."""
    fn = partial(decoder, turned=(SIZE, 0), scale=WIDTH**0.5)
    return fn, drawn(gated=True), None, VOCABULARY


DECODERS = {"GLM4-MoE": glm4_moe, "AFMoE": afmoe}
