"""Networks that this library's authors did not design, in the styles that JAX code comes in, and their groups by hand.

Each is searched on one batch; its fold is then run on another batch of another shape, and must not change a bit.
"""

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from slow import slow_but
from traced import spaces_of

import sqjax as sq
from sqjax._trees import map_named, named_leaves
from sqjax.calibration.analysis import shared_arrays
from sqjax.folding.find_graph import find_graph
from sqjax.folding.groups import Survey
from sqjax.program.facts import Program
from sqjax.program.trace import trace


class Case(NamedTuple):
    """A function, its parameters, two batches, and its groups: (number of scales, absorbing leaves, sites).

    `refused`: {site: what stands in its reason}; every other site is in a group. `int8`: the number of int8 matmuls.
    """

    fn: Any
    params: Any
    args: tuple
    other: tuple
    groups: list
    refused: dict
    int8: int


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(
        scale * np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32
    )


def filled(tree):
    """A tree of shapes as random arrays: initial ones and zeros would hide what happens to gains and biases."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), tree)


def relaxed(fn):
    """fn as its authors run it: most code relies on rank promotion; the library around it stays under strict rules."""

    @functools.wraps(fn)
    def run(*args):
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return fn(*args)

    return run


def case(fn, params, args, other, groups, int8, **refused):
    return Case(
        relaxed(fn),
        params,
        args,
        other,
        groups,
        {k.replace("__", "/"): v for k, v in refused.items()},
        int8,
    )


IDS, OTHER_IDS = jnp.array([[1, 5, 3, 2, 9], [7, 7, 0, 3, 11]]), jnp.array([[4, 8, 2]])
X, OTHER_X = normal(2, 4, 6), normal(1, 3, 6, seed=1)
TOKENS, OTHER_TOKENS = normal(7, 6), normal(4, 6, seed=1)


# Pieces ----------------------------------------------------------------------------------------------


def rms(x, gain):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * gain


def layer_norm(x, gain, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * gain + bias


def rotary(x, positions, base=10000.0):
    half = x.shape[-1] // 2
    angles = (positions[..., None] / base ** (jnp.arange(half) / half))[..., None, :]
    a, b = jnp.split(x, 2, -1)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def heads(x, n=2):
    return x.reshape(*x.shape[:2], n, -1)


def flat(x):
    return x.reshape(*x.shape[:2], -1)


def attend(q, k, v, bias=0.0):
    """(batch, tokens, heads, channels), all of one number of heads."""
    odds = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) + bias, -1)
    return jnp.einsum("bhts,bshd->bthd", odds, v)


def causal(t):
    return jnp.tril(jnp.ones((t, t), bool))


def kernels(names, *shape, seed=0):
    return {n: normal(*shape, seed=seed + i) for i, n in enumerate(names)}


# Decoders --------------------------------------------------------------------------------------------


class Einsum(nnx.Module):
    def __init__(self, equation, shape, rngs):
        self.equation = equation
        self.w = nnx.Param(nnx.initializers.normal(0.3)(rngs.params(), shape))

    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.w[...])


class Gain(nnx.Module):
    def __init__(self, size, rngs):
        self.w = nnx.Param(nnx.initializers.ones(rngs.params(), size))

    def __call__(self, x):
        return (
            self.w[...]
            * x
            / jnp.sqrt(jnp.mean(x.astype(jnp.float32) ** 2, -1, keepdims=True) + 1e-6)
        )


class Qwen3Layer(nnx.Module):
    """Four query heads on two key/value heads, norms on queries and keys, k and v in one kernel (2, heads, ...)."""

    def __init__(self, rngs):
        self.norm_1, self.norm_2 = Gain(8, rngs), Gain(8, rngs)
        self.q_norm, self.k_norm = Gain(4, rngs), Gain(4, rngs)
        self.q_proj = Einsum("BTD,DNH->BTNH", (8, 4, 4), rngs)
        self.kv_proj = Einsum("BSD,CKDH->CBSKH", (2, 2, 8, 4), rngs)
        self.o_proj = Einsum("BTNH,NHD->BTD", (4, 4, 8), rngs)
        self.gate_proj = nnx.Linear(8, 12, use_bias=False, rngs=rngs)
        self.up_proj = nnx.Linear(8, 12, use_bias=False, rngs=rngs)
        self.down_proj = nnx.Linear(12, 8, use_bias=False, rngs=rngs)

    def __call__(self, x, positions, mask):
        h = self.norm_1(x)
        q = rotary(self.q_norm(self.q_proj(h)), positions)
        k, v = self.kv_proj(h)
        k = rotary(self.k_norm(k), positions)
        b, t = x.shape[:2]
        scores = jnp.einsum("BTKGH,BSKH->BTKGS", q.reshape(b, t, 2, 2, 4), k) * 0.5
        odds = jax.nn.softmax(
            jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min), -1
        )
        x = x + self.o_proj(jnp.einsum("BTKGS,BSKH->BTKGH", odds, v).reshape(b, t, 4, 4))
        h = self.norm_2(x)
        return x + self.down_proj(nnx.silu(self.gate_proj(h)) * self.up_proj(h))


class Qwen3(nnx.Module):
    def __init__(self, rngs):
        self.embedding = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (12, 8)))
        self.layers = nnx.List([Qwen3Layer(rngs)])
        self.norm = Gain(8, rngs)
        self.head = Einsum("BTD,DV->BTV", (8, 12), rngs)

    def __call__(self, ids):
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        x = self.embedding[...][(ids,)]
        for layer in self.layers:
            x = layer(x, positions, causal(ids.shape[1]))
        return self.head(self.norm(x))


def qwen3():
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Qwen3(nnx.Rngs(0))))
    layer = "layers/0"
    groups = [
        (8, [f"{layer}/norm_1/w/value"], [f"{layer}/q_proj/w/value", f"{layer}/kv_proj/w/value"]),
        (8, [f"{layer}/kv_proj/w/value"], [f"{layer}/o_proj/w/value"]),
        (
            8,
            [f"{layer}/norm_2/w/value"],
            [f"{layer}/gate_proj/kernel/value", f"{layer}/up_proj/kernel/value"],
        ),
        (12, [f"{layer}/up_proj/kernel/value"], [f"{layer}/down_proj/kernel/value"]),
        (8, ["norm/w/value"], ["head/w/value"]),
    ]
    fn = lambda state, ids: nnx.merge(graphdef, state)(ids)
    return case(fn, filled(state), (IDS,), (OTHER_IDS,), groups, 7)


def one_plus(x, w):
    normed = x * lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True) + 1e-6)
    return normed * (1 + jnp.expand_dims(w, axis=range(x.ndim - 1)))


def gemma3():
    """1 + w norms before and after, a sliding window, gate and up in one kernel (2, F, D), soft caps, a tied head."""

    def fn(p, ids):
        t = ids.shape[1]
        positions = jnp.broadcast_to(jnp.arange(t), ids.shape)
        x = p["embedding"][(ids,)] * jnp.sqrt(8.0)
        window = causal(t) * jnp.triu(jnp.ones((t, t), bool), -1)
        h = one_plus(x, p["pre_attention"])
        q = jnp.einsum("BTD,NDH->BTNH", h, p["q"])
        k, v = jnp.einsum("BSD,CKDH->CBSKH", h, p["kv"])
        q, k = (
            rotary(one_plus(q, p["q_norm"]), positions),
            rotary(one_plus(k, p["k_norm"]), positions),
        )
        scores = jnp.einsum("BTKGH,BSKH->BTKGS", q.reshape(*ids.shape, 1, 2, 4), k)
        odds = jax.nn.softmax(jnp.where(window[:, None, None], scores, -2.3819763e38), -1)
        mixed = jnp.einsum("BTKGS,BSKH->BTKGH", odds, v).reshape(*ids.shape, 2, 4)
        x = x + one_plus(jnp.einsum("BTNH,NHD->BTD", mixed, p["o"]), p["post_attention"])
        gate_up = jnp.einsum("...D,NFD->...NF", one_plus(x, p["pre_mlp"]), p["gating"])
        x = x + one_plus(
            (nn.gelu(gate_up[..., 0, :]) * gate_up[..., 1, :]) @ p["linear"], p["post_mlp"]
        )
        return jnp.tanh(one_plus(x, p["final"]) @ p["embedding"].T / 30) * 30

    norms = ("pre_attention", "post_attention", "pre_mlp", "post_mlp", "final")
    params = {
        "embedding": normal(12, 8),
        "q": normal(2, 8, 4),
        "kv": normal(2, 1, 8, 4),
        "o": normal(2, 4, 8),
        "q_norm": normal(4, scale=0.2),
        "k_norm": normal(4, seed=1, scale=0.2),
        "gating": normal(2, 10, 8),
        "linear": normal(10, 8),
    }
    params |= {n: normal(8, seed=i, scale=0.2) for i, n in enumerate(norms)}
    groups = [
        (8, ["pre_attention"], ["kv", "q"]),
        (4, ["kv"], ["o"]),
        (8, ["pre_mlp"], ["gating"]),
        (10, ["gating"], ["linear"]),
    ]
    return case(fn, params, (IDS,), (OTHER_IDS,), groups, 6, embedding="`square` at")


class BoxedNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
        return rms(x, self.param("scale", init, (x.shape[-1],)))


class BoxedDense(nn.Module):
    features: tuple
    axes: int = 1

    @nn.compact
    def __call__(self, x):
        contracted = tuple(range(x.ndim - self.axes, x.ndim))
        shape = tuple(x.shape[a] for a in contracted) + self.features
        init = nn.with_logical_partitioning(nn.initializers.normal(0.5), ("any",) * len(shape))
        kernel = jnp.asarray(self.param("kernel", init, shape), x.dtype)
        return lax.dot_general(x, kernel, ((contracted, tuple(range(self.axes))), ((), ())))


class BoxedLayer(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        h = BoxedNorm(name="norm_1")(nn.with_logical_constraint(x, ("batch", "length", "embed")))
        q, k, v = (
            BoxedDense((n, 4), name=name)(h) for name, n in (("query", 4), ("key", 2), ("value", 2))
        )
        b, t = x.shape[:2]
        scores = jnp.einsum("btkgd,bskd->bkgts", q.reshape(b, t, 2, 2, 4), k) + mask
        mixed = jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores, -1), v).reshape(b, t, 4, 4)
        x = x + BoxedDense((8,), axes=2, name="out")(checkpoint_name(mixed, "mixed"))
        h = BoxedNorm(name="norm_2")(x)
        up = nn.silu(BoxedDense((10,), name="wi_0")(h)) * BoxedDense((10,), name="wi_1")(h)
        return x + BoxedDense((8,), name="wo")(up), None


class Boxed(nn.Module):
    """A remat'ed layer scanned along axis 1 of its leaves, which are boxes with names of mesh axes."""

    @nn.compact
    def __call__(self, ids):
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
        x = self.param("embedding", init, (12, 8))[ids]
        policy = jax.checkpoint_policies.save_only_these_names("mixed")
        layer = nn.scan(
            nn.remat(BoxedLayer, prevent_cse=False, policy=policy),
            variable_axes={"params": 1},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layer(name="layers")(x, jnp.where(causal(ids.shape[1]), 0.0, -1e9))
        return BoxedDense((12,), name="head")(BoxedNorm(name="norm")(x))


def scanned_and_boxed():
    module = Boxed()
    params = filled(jax.eval_shape(relaxed(module.init), jax.random.key(0), IDS))
    layer = "params/layers"
    groups = [
        (
            24,
            [f"{layer}/norm_1/scale/value"],
            [f"{layer}/{n}/kernel/value" for n in ("query", "key", "value")],
        ),
        (24, [f"{layer}/value/kernel/value"], [f"{layer}/out/kernel/value"]),
        (
            24,
            [f"{layer}/norm_2/scale/value"],
            [f"{layer}/{n}/kernel/value" for n in ("wi_0", "wi_1")],
        ),
        (30, [f"{layer}/wi_1/kernel/value"], [f"{layer}/wo/kernel/value"]),
        (8, ["params/norm/scale/value"], ["params/head/kernel/value"]),
    ]
    return case(module.apply, params, (IDS,), (OTHER_IDS,), groups, 8)


def latent_attention():
    """DeepSeek's: queries and keys/values through small normed latents; v is a slice of kv_b's columns."""

    def fn(p, x):
        h = rms(x, p["norm"])
        q = heads(rms(h @ p["q_a"], p["q_norm"]) @ p["q_b"])
        latent, rotated = jnp.split(h @ p["kv_a"], [4], -1)
        k, v = jnp.split(heads(rms(latent, p["kv_norm"]) @ p["kv_b"]), [4], -1)
        k = jnp.concatenate([k, jnp.broadcast_to(rotated[:, :, None], (*x.shape[:2], 2, 2))], -1)
        return x + flat(attend(q, k, v)) @ p["o"]

    params = {"norm": normal(6), "q_norm": normal(5), "kv_norm": normal(4), "o": normal(6, 6)}
    params |= {
        "q_a": normal(6, 5),
        "q_b": normal(5, 12),
        "kv_a": normal(6, 6, seed=1),
        "kv_b": normal(4, 14),
    }
    groups = [(6, ["norm"], ["kv_a", "q_a"]), (5, ["q_norm"], ["q_b"]), (4, ["kv_norm"], ["kv_b"])]
    return case(fn, params, (X,), (OTHER_X,), [*groups, (6, ["kv_b"], ["o"])], 5)


def fused_by_heads():
    """GPT-NeoX: q, k, v of one head side by side in one kernel; attention and MLP in parallel."""

    def fn(p, x):
        h = layer_norm(x, p["gain_1"], p["bias_1"])
        q, k, v = jnp.split(heads(h @ p["qkv"] + p["qkv_bias"]), 3, -1)
        h = layer_norm(x, p["gain_2"], p["bias_2"])
        up = jax.nn.gelu(h @ p["up"], approximate=False)
        return x + flat(attend(q, k, v)) @ p["dense"] + up @ p["down"]

    params = kernels(("gain_1", "bias_1", "gain_2", "bias_2"), 6) | {
        "qkv": normal(6, 18),
        "qkv_bias": normal(18),
    }
    params |= {"dense": normal(6, 6), "up": normal(6, 8), "down": normal(8, 6)}
    groups = [
        (6, ["bias_1", "gain_1"], ["qkv"]),
        (6, ["qkv", "qkv_bias"], ["dense"]),
        (6, ["bias_2", "gain_2"], ["up"]),
    ]
    return case(fn, params, (X,), (OTHER_X,), groups, 4, down="`erfc?` at")


def fused_parallel():
    """PaLM: one kernel in, one kernel out; four query heads on one key/value head, ALiBi."""

    def fn(p, x):
        t = x.shape[1]
        q, k, v, both = jnp.split(rms(x, p["norm"]) @ p["fused"], [8, 10, 12], -1)
        away = p["slopes"][:, None, None] * (jnp.arange(t)[None] - jnp.arange(t)[:, None])
        odds = jax.nn.softmax(jnp.einsum("bthd,bsd->bhts", heads(q, 4), k) + away, -1)
        up, gate = jnp.split(both, 2, -1)
        mixed = flat(jnp.einsum("bhts,bsd->bthd", odds, v))
        return x + jnp.concatenate([mixed, up * jax.nn.silu(gate)], -1) @ p["out"]

    params = {"norm": normal(6), "fused": normal(6, 22), "slopes": normal(4), "out": normal(13, 6)}
    return case(
        fn, params, (X,), (OTHER_X,), [(6, ["norm"], ["fused"]), (2 + 5, ["fused"], ["out"])], 2
    )


def library_attention():
    """`jax.nn.dot_product_attention` with grouped queries."""

    def fn(p, x):
        h = rms(x, p["norm"])
        mixed = jax.nn.dot_product_attention(
            heads(h @ p["q"], 4), heads(h @ p["k"]), heads(h @ p["v"]), is_causal=True
        )
        return x + flat(mixed) @ p["o"]

    params = {
        "norm": normal(6),
        "q": normal(6, 8),
        "k": normal(6, 4),
        "v": normal(6, 4, seed=1),
        "o": normal(8, 6),
    }
    return case(
        fn, params, (X,), (OTHER_X,), [(6, ["norm"], ["k", "q", "v"]), (4, ["v"], ["o"])], 4
    )


def differential_attention():
    """The norm after the difference of two softmaxes has one gain for all heads: its channels are tied over heads."""

    def fn(p, x):
        h = rms(x, p["norm"])
        (q1, q2), (k1, k2) = (jnp.split(heads(h @ p[n]), 2, -1) for n in "qk")
        factor = jnp.exp(jnp.sum(p["l1"] * p["l2"])) + 0.2
        v = heads(h @ p["v"])
        mixed = rms(attend(q1, k1, v) - factor * attend(q2, k2, v), p["sub_norm"]) * 0.8
        return x + flat(mixed) @ p["o"]

    params = {
        "norm": normal(6),
        **kernels("qk", 6, 8),
        **kernels("vo", 6, 6),
        "sub_norm": normal(3),
    }
    params |= kernels(("l1", "l2"), 2)
    return case(
        fn, params, (X,), (OTHER_X,), [(6, ["norm"], ["k", "q", "v"]), (3, ["sub_norm"], ["o"])], 4
    )


def shared_over_depth():
    """One block used twice (ALBERT), its norms its own (Zamba), k and v of the first use kept (cross-layer sharing)."""

    def fn(p, x):
        for i, gain in enumerate(p["norms"]):
            h = rms(x, gain)
            q = heads(h @ p["q"])
            if i == 0:
                k, v = heads(h @ p["k"]), heads(h @ p["v"])
            x = x + flat(attend(q, k, v)) @ p["o"]
        return rms(x, p["norm_a"]) @ p["head"], rms(jnp.tanh(x), p["norm_b"]) @ p["head"]

    params = {
        "norms": [normal(6), normal(6, seed=1)],
        **kernels("qkvo", 6, 6),
        "head": normal(6, 5),
    }
    params |= kernels(("norm_a", "norm_b"), 6, seed=2)
    groups = [
        (6, ["norms/0", "norms/1"], ["k", "q", "v"]),
        (6, ["v"], ["o"]),
        (6, ["norm_a", "norm_b"], ["head"]),
    ]
    return case(fn, params, (X,), (OTHER_X,), groups, 8)


def t5():
    """Encoder and decoder, relative position bias, one shared embedding that is the head too.

    The encoder's last norm is read by the keys and values of every decoder layer: one group.
    """

    def bias(p, t, s):
        return jnp.transpose(
            p[jnp.clip(jnp.arange(s)[None] - jnp.arange(t)[:, None] + 3, 0, 6)], (2, 0, 1)
        )

    def layer(p, x, memory, added=0.0):
        q, k, v = heads(x @ p["q"]), heads(memory @ p["k"]), heads(memory @ p["v"])
        return flat(attend(q, k, v, added)) @ p["o"]

    def fn(p, ids, target):
        x, y = p["shared"][ids], p["shared"][target]
        h = rms(x, p["norm_1"])
        x = x + layer(p["self"], h, h, bias(p["bias"], x.shape[1], x.shape[1]))
        x = rms(x + jax.nn.relu(rms(x, p["norm_2"]) @ p["wi"]) @ p["wo"], p["last"])
        for cross, gain in zip(p["cross"], p["cross_norms"], strict=True):
            y = y + layer(cross, rms(y, gain), x)
        return rms(y, p["norm_3"]) * 6**-0.5 @ p["shared"].T

    params = {"shared": normal(12, 6), "bias": normal(7, 2), "wi": normal(6, 9), "wo": normal(9, 6)}
    params |= {
        "self": kernels("qkvo", 6, 6),
        "cross": [kernels("qkvo", 6, 6, seed=s) for s in (4, 8)],
    }
    params |= kernels(("norm_1", "norm_2", "norm_3", "last"), 6)
    params["cross_norms"] = [normal(6, seed=s) for s in (4, 5)]
    groups = [
        (6, ["norm_1"], ["self/k", "self/q", "self/v"]),
        (6, ["self/v"], ["self/o"]),
        (6, ["norm_2"], ["wi"]),
        (9, ["wi"], ["wo"]),
        (6, ["last"], ["cross/0/k", "cross/0/v", "cross/1/k", "cross/1/v"]),
    ]
    groups += [(6, [f"cross_norms/{i}"], [f"cross/{i}/q"]) for i in range(2)]
    groups += [(6, [f"cross/{i}/v"], [f"cross/{i}/o"]) for i in range(2)]
    return case(
        fn,
        params,
        (IDS, IDS[:, :4]),
        (OTHER_IDS, OTHER_IDS[:, :2]),
        groups,
        15,
        shared="`mul` at|rsqrt",
    )


# Experts ---------------------------------------------------------------------------------------------

EXPERTS = {
    "norm": normal(6),
    "router": normal(6, 4),
    "bias": normal(4, scale=0.1),
    "down": normal(4, 8, 6),
}
EXPERTS |= {"gate": normal(4, 6, 8), "up": normal(4, 6, 8, seed=1)}
EXPERTS["shared"] = {"gate": normal(6, 5), "up": normal(6, 5, seed=1), "down": normal(5, 6)}


def routed(p, h):
    """DeepSeek's router: sigmoid scores, a bias that only chooses, two experts of four."""
    scores = jax.nn.sigmoid(h @ p["router"])
    chosen = lax.top_k(scores + p["bias"], 2)[1]
    odds = jnp.take_along_axis(scores, chosen, -1)
    return odds / odds.sum(-1, keepdims=True), chosen


def shared_expert(p, h):
    return (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def expert_groups(scales):
    return [
        (6, ["norm"], ["gate", "router", "shared/gate", "shared/up", "up"]),
        (scales, ["up"], ["down"]),
        (5, ["shared/up"], ["shared/down"]),
    ]


def sorted_experts():
    """Tokens sorted by expert, then ragged matmuls: which rows an expert gets is not known, so experts share s."""

    def fn(p, x):
        h = rms(x, p["norm"])
        odds, chosen = routed(p, h)
        order = jnp.argsort(chosen.reshape(-1))
        sizes = jnp.bincount(chosen.reshape(-1), length=4)
        rows = h[order // 2]
        up = jax.nn.silu(lax.ragged_dot(rows, p["gate"], sizes)) * lax.ragged_dot(
            rows, p["up"], sizes
        )
        out = lax.ragged_dot(up, p["down"], sizes)[jnp.argsort(order)].reshape(*chosen.shape, -1)
        return x + jnp.einsum("tkd,tk->td", out, odds) + shared_expert(p["shared"], h)

    return case(fn, EXPERTS, (TOKENS,), (OTHER_TOKENS,), expert_groups(8), 7)


def dispatched_experts():
    """One-hot dispatch into slots of a fixed capacity: each expert has scales of its own."""

    def fn(p, x):
        h = rms(x, p["norm"])
        odds, chosen = routed(p, h)
        hot = jax.nn.one_hot(chosen, 4)
        place = jnp.cumsum(hot.reshape(-1, 4), 0).reshape(hot.shape) * hot - 1
        slots = jax.nn.one_hot(place.astype(jnp.int32), 6)
        sent = jnp.einsum("tec,td->ecd", jnp.einsum("tke,tkec->tec", hot, slots), h)
        up = jax.nn.silu(jnp.einsum("ecd,edf->ecf", sent, p["gate"])) * jnp.einsum(
            "ecd,edf->ecf", sent, p["up"]
        )
        out = jnp.einsum("ecf,efd->ecd", up, p["down"])
        back = jnp.einsum("tk,tke,tkec->tec", odds, hot, slots)
        return x + jnp.einsum("tec,ecd->td", back, out) + shared_expert(p["shared"], h)

    return case(fn, EXPERTS, (TOKENS,), (OTHER_TOKENS,), expert_groups(4 * 8), 7)


# Vision ----------------------------------------------------------------------------------------------


class VisionBlock(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        h = nn.LayerNorm(name="norm_1")(x)
        x = x + nn.MultiHeadDotProductAttention(
            2, dropout_rate=0.1, deterministic=deterministic, name="mha"
        )(h, h)
        h = nn.gelu(nn.Dense(16, name="fc1")(nn.LayerNorm(name="norm_2")(x)))
        return x + nn.Dense(8, name="fc2")(nn.Dropout(0.1)(h, deterministic=deterministic))


class VisionTransformer(nn.Module):
    """A convolution for patches, a class token, learned positions; the head reads the class token."""

    @nn.compact
    def __call__(self, image, train=False):
        x = nn.Conv(8, (4, 4), strides=(4, 4), padding="VALID", name="patches")(image).reshape(
            len(image), -1, 8
        )
        token = self.param("token", nn.initializers.zeros, (1, 1, 8))
        x = jnp.concatenate([jnp.tile(token, [len(image), 1, 1]), x], 1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], 8))
        x = VisionBlock(name="block")(x, deterministic=not train)
        return nn.Dense(5, name="head")(nn.LayerNorm(name="norm")(x)[:, 0])


def vision_transformer():
    module, images = VisionTransformer(), normal(2, 8, 8, 3)
    params = filled(jax.eval_shape(relaxed(module.init), jax.random.key(0), images))
    block = "params/block"
    groups = [
        (
            8,
            [f"{block}/norm_1/bias", f"{block}/norm_1/scale"],
            [f"{block}/mha/{n}/kernel" for n in ("key", "query", "value")],
        ),
        (8, [f"{block}/mha/value/bias", f"{block}/mha/value/kernel"], [f"{block}/mha/out/kernel"]),
        (8, [f"{block}/norm_2/bias", f"{block}/norm_2/scale"], [f"{block}/fc1/kernel"]),
        (8, ["params/norm/bias", "params/norm/scale"], ["params/head/kernel"]),
    ]
    refused = {"params__patches__kernel": "input", "params__block__fc2__kernel": "`"}
    return case(
        module.apply, params, (images,), (normal(1, 8, 8, 3, seed=1),), groups, 8, **refused
    )


class Mixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = jnp.swapaxes(nn.LayerNorm(name="norm_1")(x), 1, 2)
        h = nn.Dense(x.shape[1], name="tokens_2")(nn.relu(nn.Dense(7, name="tokens_1")(h)))
        x = x + jnp.swapaxes(h, 1, 2)
        h = nn.relu(nn.Dense(12, name="channels_1")(nn.LayerNorm(name="norm_2")(x)))
        x = x + nn.Dense(x.shape[2], name="channels_2")(h)
        return nn.Dense(3, name="head")(nn.LayerNorm(name="norm_3")(x).mean(1))


def mixer():
    """The norm's gain knows channels, the token matmul knows tokens: one scale for them all is lawful, no more."""
    module = Mixer()
    params = filled(jax.eval_shape(relaxed(module.init), jax.random.key(0), X)["params"])
    fn = lambda p, x: module.apply({"params": p}, x)
    names = [(1, "norm_1", "tokens_1"), (6, "norm_2", "channels_1"), (6, "norm_3", "head")]
    groups = [(n, [f"{norm}/bias", f"{norm}/scale"], [f"{site}/kernel"]) for n, norm, site in names]
    groups += [
        (n, [f"{a}/bias", f"{a}/kernel"], [f"{b}/kernel"])
        for n, a, b in ((7, "tokens_1", "tokens_2"), (12, "channels_1", "channels_2"))
    ]
    return case(fn, params, (X,), (OTHER_X[:, :1] * jnp.ones((1, 4, 1)),), groups, 5)


# Recurrence ------------------------------------------------------------------------------------------


def state_space():
    """Mamba: a convolution by shifted products, a scan over time, a gated and normed output."""

    def fn(p, x):
        t = x.shape[1]
        u, gate = jnp.split(rms(x, p["norm"]) @ p["in"], 2, -1)
        padded = jnp.pad(u, ((0, 0), (2, 0), (0, 0)))
        u = jax.nn.silu(sum(padded[:, i : i + t] * p["conv"][i] for i in range(3)))
        low, b, c = jnp.split(u @ p["x_proj"], [2, 5], -1)
        step_size, decay = (
            jax.nn.softplus(low @ p["dt_proj"] + p["dt_bias"]),
            -jnp.exp(p["log_decay"]),
        )

        def step(state, now):
            u, dt, b, c = now
            state = jnp.exp(dt[..., None] * decay) * state + (dt * u)[..., None] * b[:, None]
            return state, jnp.einsum("bdn,bn->bd", state, c)

        over_time = [jnp.swapaxes(a, 0, 1) for a in (u, step_size, b, c)]
        y = (
            jnp.swapaxes(lax.scan(step, jnp.zeros((x.shape[0], 5, 3)), over_time)[1], 0, 1)
            + u * p["skip"]
        )
        return x + rms(y * jax.nn.silu(gate), p["out_norm"]) @ p["out"]

    params = {"norm": normal(6), "in": normal(6, 10), "conv": normal(3, 5), "x_proj": normal(5, 8)}
    params |= {
        "dt_proj": normal(2, 5),
        "dt_bias": normal(5),
        "log_decay": normal(5, 3),
        "skip": normal(5),
    }
    params |= {"out_norm": normal(5, seed=1), "out": normal(5, 6)}
    groups = [(6, ["norm"], ["in"]), (2, ["x_proj"], ["dt_proj"]), (5, ["out_norm"], ["out"])]
    return case(fn, params, (X,), (OTHER_X,), groups, 4, x_proj="`logistic` at")


def linear_recurrence():
    """h_t = a h_(t-1) + B x_t by an associative scan: B absorbs what C reads."""

    def fn(p, x):
        driven = rms(x, p["norm"]) @ p["B"]
        decay = jnp.broadcast_to(jax.nn.sigmoid(p["decay"]), driven.shape)
        _, states = lax.associative_scan(
            lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (decay, driven), axis=1
        )
        return x + states @ p["C"]

    params = {"norm": normal(6), "decay": normal(5), "B": normal(6, 5), "C": normal(5, 6)}
    return case(fn, params, (X,), (OTHER_X,), [(6, ["norm"], ["B"]), (5, ["B"], ["C"])], 2)


def token_shift():
    """RWKV: each channel mixed with that of the token before; the mixing weights must not take the scale."""

    def fn(p, x):
        h = rms(x, p["norm"])
        before = jnp.pad(h, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        k, r = (h * p[m] + before * (1 - p[m]) for m in ("mix_k", "mix_r"))
        return x + jax.nn.sigmoid(r @ p["r"]) * (jnp.square(jax.nn.relu(k @ p["k"])) @ p["v"])

    params = {
        "norm": normal(6),
        **kernels(("mix_k", "mix_r"), 6, seed=1),
        "k": normal(6, 8),
        "r": normal(6, 6),
    }
    params["v"] = normal(8, 6)
    groups = [(6, ["norm"], ["k", "r"]), (8, ["k"], ["v"])]  # k by the square root of v's scale
    return case(fn, params, (X,), (OTHER_X,), groups, 3)


# Trees, wrappers, dtypes -----------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    weight: Any
    bias: Any

    def __call__(self, x):
        return self.weight @ x + self.bias


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    """Modules that are trees, written for one example: a vector, or tokens by channels."""

    gain: Any
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    layers: list

    def __call__(self, x):
        h = jax.vmap(lambda token: rms(token, self.gain))(x)
        q, k, v = (jax.vmap(layer)(h).reshape(len(x), 2, -1) for layer in (self.q, self.k, self.v))
        one_head = lambda q, k, v: jax.nn.softmax(q @ k.T, -1) @ v
        mixed = jax.vmap(one_head, in_axes=1, out_axes=1)(q, k, v).reshape(len(x), -1)
        x = x + jax.vmap(self.o)(mixed)
        first, second = self.layers
        return x + jax.vmap(second)(jax.nn.relu(jax.vmap(first)(x)))


def per_example():
    def linear(outputs, inputs, seed=0):
        return Linear(normal(outputs, inputs, seed=seed), normal(outputs, seed=seed))

    block = Block(normal(6), *(linear(6, 6, i) for i in range(4)), [linear(8, 6), linear(6, 8)])
    groups = [
        (6, ["gain"], ["k/weight", "q/weight", "v/weight"]),
        (6, ["v/bias", "v/weight"], ["o/weight"]),
        (8, ["layers/0/bias", "layers/0/weight"], ["layers/1/weight"]),
    ]
    return case(
        lambda m, x: jax.vmap(m)(x),
        block,
        (X,),
        (OTHER_X,),
        groups,
        6,
        layers__0__weight="input 0 of fn|`",
    )


class Affine(NamedTuple):
    w: Any
    b: Any


def tuples_in_a_list():
    """Also: Haiku's names with a slash in them, a leaf of numpy, a missing bias, an argument that is no array."""

    def fn(p, x, times):
        for layer in p["mlp/~/layers"]:
            x = jax.nn.relu(x) @ layer.w + (0 if layer.b is None else layer.b)
        return x * times

    layers = [
        Affine(normal(6, 8), normal(8)),
        Affine(normal(8, 7), None),
        Affine(np.asarray(normal(7, 3)), normal(3)),
    ]
    paths = [f"mlp/~/layers/{i}" for i in range(3)]
    groups = [
        (8, [f"{paths[0]}/b", f"{paths[0]}/w"], [f"{paths[1]}/w"]),
        (7, [f"{paths[1]}/w"], [f"{paths[2]}/w"]),
    ]
    made = case(fn, {"mlp/~/layers": layers}, (TOKENS, 2), (OTHER_TOKENS, 2), groups, 3)
    return made._replace(refused={f"{paths[0]}/w": "input 0 of fn"})


@jax.custom_vjp
def fused_mlp(x, a, b):
    return jax.nn.relu(x @ a) @ b


fused_mlp.defvjp(
    lambda x, a, b: (fused_mlp(x, a, b), (x, a, b)),
    lambda saved, g: jax.vjp(lambda x, a, b: jax.nn.relu(x @ a) @ b, *saved)[1](g),
)


def adapted():
    """LoRA beside its kernel, a weight-normed layer, a layer with a gradient of its own, remat with a policy."""
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

    @functools.partial(jax.checkpoint, policy=policy)
    def normed(p, h):
        w = p["g"] * p["v"] / jnp.linalg.norm(p["v"], axis=0, keepdims=True)
        return jax.nn.relu(h @ w) @ p["o"]

    def fn(p, x):
        h = x * p["norm"]
        x = jax.nn.relu(h @ p["w"] + 2.0 * ((h @ p["A"]) @ p["B"])) @ p["down"]
        return normed(p, x) + fused_mlp(rms(x, p["gain"]), p["a"], p["b"])

    params = {
        "norm": normal(6),
        "w": normal(6, 8),
        "A": normal(6, 2),
        "B": normal(2, 8),
        "down": normal(8, 6),
    }
    params |= {"g": normal(7), "v": normal(6, 7), "o": normal(7, 6)}
    params |= {"gain": normal(6, seed=1), "a": normal(6, 8, seed=1), "b": normal(8, 6, seed=1)}
    groups = [
        (6, ["norm"], ["A", "w"]),
        (2, ["A"], ["B"]),
        (8, ["B", "w"], ["down"]),
        (7, ["g"], ["o"]),
        (6, ["gain"], ["a"]),
        (8, ["a"], ["b"]),
    ]
    return case(fn, params, (TOKENS,), (OTHER_TOKENS,), groups, 7, v="by its own norm")


def fourier():
    """FNet: complex numbers mix the tokens; they carry no scale, and need not."""

    def fn(p, x):
        x = x + jnp.fft.fft2(x).real
        return jax.nn.relu(rms(x, p["norm"]) @ p["a"]) @ p["b"]

    params = {"norm": normal(6), "a": normal(6, 8), "b": normal(8, 6)}
    return case(fn, params, (X,), (OTHER_X,), [(6, ["norm"], ["a"]), (8, ["a"], ["b"])], 2)


def half_precision():
    """Parameters in bfloat16, the norm in float32, sums of the matmuls in float32."""
    columns = (((1,), (0,)), ((), ()))

    def fn(p, x):
        h = (rms(x.astype(jnp.float32), p["norm"])).astype(jnp.bfloat16)
        up = jax.nn.relu(lax.dot_general(h, p["a"], columns, preferred_element_type=jnp.float32))
        return lax.dot_general(
            up.astype(jnp.bfloat16), p["b"], columns, preferred_element_type=jnp.float32
        )

    params = {"norm": normal(6), "a": normal(6, 8), "b": normal(8, 6)}
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    batches = (TOKENS.astype(jnp.bfloat16),), (OTHER_TOKENS.astype(jnp.bfloat16),)
    return case(fn, params, *batches, [(6, ["norm"], ["a"]), (8, ["a"], ["b"])], 2)


CASES = [
    qwen3,
    gemma3,
    scanned_and_boxed,
    latent_attention,
    fused_by_heads,
    fused_parallel,
    library_attention,
    differential_attention,
    shared_over_depth,
    t5,
    sorted_experts,
    dispatched_experts,
    vision_transformer,
    mixer,
    state_space,
    linear_recurrence,
    token_shift,
    per_example,
    tuples_in_a_list,
    adapted,
    fourier,
    half_precision,
]


@functools.cache
def found(build):
    made = build()
    program = Program(trace(made.fn, made.params, made.args, {})[0])
    return made, find_graph(Survey.of(program, shared_arrays(made.params)))


@pytest.mark.parametrize("build", CASES)
def test_groups_are_those_written_by_hand(build):
    made, graph = found(build)
    got = {
        (g.size, tuple(sorted(g.absorbers)), tuple(sorted(path for path, _ in g.sites)))
        for g in graph.groups
    }
    assert got == {
        (size, tuple(sorted(absorb)), tuple(sorted(sites))) for size, absorb, sites in made.groups
    }


@pytest.mark.parametrize("build", CASES)
def test_every_other_site_is_refused_with_its_reason(build):
    made, graph = found(build)
    reasons = dict(graph.refused)
    for path, reason in made.refused.items():
        assert re.search(reason, reasons[path]), reasons[path]
    assert set(reasons) == set(made.refused)
    assert {s.path for s in graph.sites} <= {
        path for g in graph.groups for path, _ in g.sites
    } | set(reasons)


@pytest.mark.parametrize("build", CASES)
@pytest.mark.slow
def test_powers_of_two_change_no_bit_of_another_batch(build):
    made, graph = found(build)
    rng = np.random.default_rng(0)
    ones = {g.name: jnp.ones(g.size, jnp.float32) for g in graph.groups}
    drawn = {}
    for group in graph.groups:  # of four, where a leaf carries the square root
        exponents = rng.integers(1, 4, group.size) * rng.choice([-1, 1], group.size)
        drawn[group.name] = jnp.asarray(2.0 ** (group.degree * exponents), jnp.float32)
    params = rounded(made.params, dict(graph.offsets))

    @jax.jit
    def run(s):
        folded = sq.fold(params, graph, s)
        return dict(zip(*named_leaves(folded)[:2], strict=True)), made.fn(folded, *made.other)

    (before, expected), (after, got) = run(ones), run(drawn)
    for path in {path for g in graph.groups for path, _ in g.leaves}:
        assert not np.array_equal(before[path], after[path]), path
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("build", [build for build in CASES if build is not fourier])
@pytest.mark.slow
def test_all_groups_and_spaces_are_proved_in_a_finite_field(build):
    """Of gains that no group folds it is proved that they need to be ones only."""
    made, graph = found(build)
    spaces = spaces_of(made.fn, made.params, *made.args)
    prove = functools.partial(sq.prove, spaces=spaces, trials=1, gains="ones")
    proof = prove(made.fn, made.params, graph, *made.args)
    assert proof.holds, proof


def test_a_fourier_transform_has_no_rule_in_a_finite_field():
    made, graph = found(fourier)
    with pytest.raises(ValueError, match=r"expected a primitive that has a rule.*to complex64"):
        sq.prove(made.fn, made.params, graph, *made.args)


def rounded(params, offsets):
    """Leaves w that are read as c + w, rounded so that c + w is divided by 8 without rounding."""
    return map_named(lambda path, x: jnp.round(x * 256) / 256 if path in offsets else x, params)


@pytest.mark.parametrize("build", slow_but([latent_attention, scanned_and_boxed, sorted_experts]))
@pytest.mark.slow
def test_int8_error_and_matmuls(build):
    """Rounding to 127 steps of four standard deviations costs each operand 4 / 127 / sqrt(12) = 0.9% of its rms.

    Two operands a matmul, errors that add up like noise over the matmuls, and a factor of two for norms and softmax
    that amplify. The router stays float: which experts are chosen is no continuous function.
    """
    made, graph = found(build)
    stats = sq.calibrate(made.fn, made.params, [made.args])
    assert stats.graph == graph
    s = sq.scales(made.params, stats, 0.5)
    routers = {"router": None} if any(site.path == "router" for site in graph.sites) else {}
    rules = {**routers, ".*": sq.W8A8}
    qparams = sq.quantize(sq.fold(made.params, graph, s), sq.fold_stats(stats, s), rules)
    run = sq.quantized(made.fn)
    expected, got = (
        np.asarray(jax.jit(f)(p, *made.args)) for f, p in ((made.fn, made.params), (run, qparams))
    )
    error = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
    assert 0 < error < 2 * 0.009 * np.sqrt(2 * made.int8)
    equations = jaxprs.equations(jaxprs.of(run, qparams, *made.args))
    matmuls = [e for e in equations if e.primitive.name in ("dot_general", "ragged_dot_general")]
    assert sum(
        all(v.aval.dtype == jnp.int8 for v in e.invars[:2]) for e in matmuls
    ) == made.int8 - len(routers)
