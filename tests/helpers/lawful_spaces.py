"""Programs with the spaces that a reader finds in them, written by hand.

`CASES[name]` is (fn, params, inputs, spaces). A space is written `space("6 embed:1 up:0 down:1")`:
the size, then every leaf with its axis; `wv:1/2x1@8` is before=2, after=1, start=8.
All gains are ones (of 1 + w: w is zeros), as a fold leaves them. Sizes differ where they can, so
that no axis is taken for another by accident.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sqjax.folding.space import Along, Space


class Case(NamedTuple):
    fn: object
    params: dict
    inputs: tuple
    spaces: tuple


def along(text):
    """The leaf and where a space lies in it, of a text such as wv:1/2x1@8."""
    path, place = text.split(":")
    place, _, start = place.partition("@")
    axis, _, factors = place.partition("/")
    before, after = map(int, (factors or "1x1").split("x"))
    return path, Along(int(axis), before, after, int(start or 0))


def space(text, gains="", keeps_ones=False):
    size, *leaves = text.split()
    pairs = tuple(sorted(map(along, leaves)))
    return Space("", int(size), pairs, tuple(sorted(gains.split())), keeps_ones)


# Parts of models ----------------------------------------------------------------------------------


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def named(**shapes):
    """A leaf for every name: ones if it begins with g, zeros if it begins with z."""
    leaves = {}
    for number, (name, shape) in enumerate(shapes.items()):
        fill = {"g": np.ones, "z": np.zeros}.get(name[0])
        leaves[name] = normal(*shape, seed=number) / 2 if fill is None else fill(shape)
    return leaves


def rms(x, gain):
    scale = jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    return x * scale * gain


def layer_norm(x, gain, bias):
    centred = x - jnp.mean(x, -1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-6)
    return centred * scale * gain + bias


def flax_norm(x, gain, bias):
    """As flax and haiku write it: the gain times one number a token, and then times x."""
    mean = jnp.mean(x, -1, keepdims=True)
    var = jnp.maximum(0.0, jnp.mean(x * x, -1, keepdims=True) - mean * mean)
    return (x - mean) * (jax.lax.rsqrt(var + 1e-6) * gain) + bias


def heads(x, count):
    return x.reshape(*x.shape[:-1], count, -1)


def rotary(x):
    angle = jnp.arange(x.shape[-3])[:, None, None] * jnp.arange(1, 1 + x.shape[-1] // 2)
    a, b = jnp.split(x, 2, -1)
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def attend(q, k, v, causal=True):
    """Queries, keys and values (tokens, heads, channels); of keys and values there may be fewer."""
    q = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    scores = jnp.einsum("tgrd,sgd->grts", q, k) / q.shape[-1] ** 0.5
    if causal:
        mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(mask, scores, -1e9)
    mixed = jnp.einsum("grts,sgd->tgrd", jax.nn.softmax(scores, -1), v)
    return mixed.reshape(mixed.shape[0], -1)


IDS = np.array([3, 0, 4])
# Sizes: vocabulary 5, residual 6, feed-forward 7; 4 heads of 2 channels, 2 of keys and values.
ATTENTION = dict(wq=(6, 8), wk=(6, 4), wv=(6, 4), wo=(8, 6))
SWIGLU = dict(gate=(6, 7), up=(6, 7), down=(7, 6))
VALUES = space("2 wv:1/2x1 wo:0/4x1")


def self_attention(p, h, turn=rotary):
    q, k = (turn(heads(h @ p[name], count)) for name, count in (("wq", 4), ("wk", 2)))
    return attend(q, k, heads(h @ p["wv"], 2)) @ p["wo"]


def swiglu(p, h):
    return jax.nn.silu(h @ p["gate"]) * (h @ p["up"]) @ p["down"]


def block(p, x, norm=rms):
    x = x + self_attention(p, norm(x, p["g1"]))
    return x + swiglu(p, norm(x, p["g2"]))


RESIDUAL = "6 embed:1 wq:0 wk:0 wv:0 wo:1 gate:0 up:0 down:1"
LLAMA = named(embed=(5, 6), g1=(6,), **ATTENTION, g2=(6,), **SWIGLU, g3=(6,), head=(6, 5))


# Programs -----------------------------------------------------------------------------------------


def llama(p, ids):
    return rms(block(p, p["embed"][ids]), p["g3"]) @ p["head"]


def tied(p, ids):
    return rms(block(p, p["embed"][ids]), p["g3"]) @ p["embed"].T


def gemma(p, ids):
    norm = lambda x, w: rms(x, 1.0 + w)
    q = {**p, "g1": p["z1"], "g2": p["z2"]}
    x = block(q, p["embed"][ids] * 6**0.5, norm)
    return jnp.tanh(norm(x, p["z3"]) @ p["embed"].T / 30.0) * 30.0


def sandwich(p, ids):
    x = p["embed"][ids]
    x = x + rms(self_attention(p, rms(x, p["g1"])), p["g2"])
    x = x + rms(swiglu(p, rms(x, p["g3"])), p["g4"])
    return x @ p["head"]


def opt_block(p, x):
    h = layer_norm(x, p["g1"], p["b1"])
    q, k, v = (heads(h @ p[f"w{n}"] + p[f"b{n}"], 2) for n in "qkv")
    x = x + attend(q, k, v) @ p["wo"] + p["bo"]
    h = layer_norm(x, p["g2"], p["b2"])
    return x + jax.nn.relu(h @ p["up"] + p["bup"]) @ p["down"] + p["bdown"]


def opt(p, ids):
    x = opt_block(p, p["embed"][ids] + p["places"][: ids.shape[0]])
    return layer_norm(x, p["g3"], p["b3"]) @ p["embed"].T


BIASED = dict(bq=(4,), bk=(4,), bv=(4,), bo=(6,), bup=(7,), bdown=(6,))
NORMS = dict(g1=(6,), b1=(6,), g2=(6,), b2=(6,))
PLAIN = dict(wq=(6, 4), wk=(6, 4), wv=(6, 4), wo=(4, 6), up=(6, 7), down=(7, 6))
OPT = named(embed=(5, 6), places=(4, 6), **NORMS, **BIASED, **PLAIN, g3=(6,), b3=(6,))
OPT_BLOCK = "b1:0 b2:0 wq:0 wk:0 wv:0 wo:1 bo:0 up:0 down:1 bdown:0"
#: Nothing stands between queries and keys, so that these turn too.
QUERIES = space("2 wq:1/2x1 wk:1/2x1 bq:0/2x1 bk:0/2x1")
HEADS = space("2 wv:1/2x1 bv:0/2x1 wo:0/2x1")


def parallel(p, ids):
    x = p["embed"][ids]
    h = layer_norm(x, p["g1"], p["b1"])
    x = x + self_attention(p, h) + jax.nn.gelu(h @ p["up"]) @ p["down"]
    return layer_norm(x, p["g2"], p["b2"]) @ p["head"]


def experts(p, ids):
    x = p["embed"][ids]
    h = rms(x, p["g1"])
    weights = jax.nn.softmax(h @ p["router"], -1)
    inner = jax.nn.silu(jnp.einsum("td,edf->tef", h, p["up"]))
    x = x + jnp.einsum("tef,efd,te->td", inner, p["down"], weights)
    return rms(x, p["g2"]) @ p["head"]


def ragged_experts(p, ids):
    x = p["embed"][ids]
    h = rms(x, p["g1"])
    expert = jnp.argmax(h @ p["router"], -1)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=3).astype(jnp.int32)
    inner = jax.nn.silu(jax.lax.ragged_dot(h[order], p["up"], sizes))
    x = x + jax.lax.ragged_dot(inner, p["down"], sizes)[jnp.argsort(order)]
    return rms(x, p["g2"]) @ p["head"]


EXPERTS = named(
    embed=(5, 6), g1=(6,), router=(6, 3), up=(3, 6, 7), down=(3, 7, 6), g2=(6,), head=(6, 5)
)
EXPERT_SPACE = space("6 embed:1 router:0 up:1 down:2 head:0", "g1 g2")


def scanned(p, ids):
    step = lambda x, layer: (block(layer, x), None)
    x, _ = jax.lax.scan(step, p["embed"][ids], p["layers"])
    return rms(x, p["g3"]) @ p["head"]


def stacked(leaves):
    return {name: np.stack([leaf, leaf[..., ::-1]]) for name, leaf in leaves.items()}


LAYERS = {n: LLAMA[n] for n in (*ATTENTION, *SWIGLU, "g1", "g2")}
SCANNED = {"embed": LLAMA["embed"], "layers": stacked(LAYERS), **named(g3=(6,), head=(6, 5))}


def vit(p, images):
    """Images of (4, 4, 3) in patches of 2 x 2, a class token before them."""
    patches = images.reshape(2, 2, 2, 2, 3).transpose(0, 2, 1, 3, 4).reshape(4, 12)
    x = patches @ p["patch"] + p["bpatch"]
    x = jnp.concatenate([p["cls"], x]) + p["places"]
    x = opt_block(p, x)
    return layer_norm(x[0], p["g3"], p["b3"]) @ p["head"]


VIT = {**OPT, **named(patch=(12, 6), bpatch=(6,), cls=(1, 6), places=(5, 6), head=(6, 5))}
del VIT["embed"]


def bert(p, ids, kinds):
    """Norms after the sums: their gains multiply the residual itself, and no kernel alone."""
    x = p["embed"][ids] + p["kinds"][kinds] + p["places"]
    x = layer_norm(x, p["g0"], p["b0"])
    q, k, v = (heads(x @ p[f"w{n}"] + p[f"b{n}"], 2) for n in "qkv")
    x = layer_norm(x + attend(q, k, v, causal=False) @ p["wo"] + p["bo"], p["g1"], p["b1"])
    inner = jax.nn.gelu(x @ p["up"] + p["bup"])
    x = layer_norm(x + inner @ p["down"] + p["bdown"], p["g2"], p["b2"])
    return jnp.tanh(x[0] @ p["pool"])


BERT = {**OPT, **named(kinds=(2, 6), places=(3, 6), g0=(6,), b0=(6,), pool=(6, 5))}
for _name in ("g3", "b3"):
    del BERT[_name]


def fused(p, ids):
    """Queries, keys and values of one kernel; gate and up of another."""
    x = p["embed"][ids]
    q, k, v = jnp.split(rms(x, p["g1"]) @ p["qkv"], [8, 12], -1)
    x = x + attend(rotary(heads(q, 4)), rotary(heads(k, 2)), heads(v, 2)) @ p["wo"]
    both = rms(x, p["g2"]) @ p["both"]
    x = x + jax.nn.silu(both[:, :7]) * both[:, 7:] @ p["down"]
    return rms(x, p["g3"]) @ p["head"]


FUSED = named(
    embed=(5, 6), g1=(6,), qkv=(6, 16), wo=(8, 6), g2=(6,), both=(6, 14), down=(7, 6), g3=(6,),
    head=(6, 5),
)  # fmt: skip


def latent(p, ids):
    """Keys and values of a small latent with a norm of its own; queries as they are."""
    x = p["embed"][ids]
    h = rms(x, p["g1"])
    small = rms(h @ p["shrink"], p["g2"])
    k, v = heads(small @ p["wk"], 2), heads(small @ p["wv"], 2)
    x = x + attend(rotary(heads(h @ p["wq"], 2)), rotary(k), v) @ p["wo"]
    return x @ p["head"]


LATENT = named(
    embed=(5, 6), g1=(6,), shrink=(6, 3), g2=(3,), wk=(3, 4), wv=(3, 4), wq=(6, 4), wo=(4, 6),
    head=(6, 5),
)  # fmt: skip


def lora(p, x):
    return jax.nn.relu(x @ p["first"]) @ (p["w"] + p["a"] @ p["b"]) @ p["last"]


def linear(p, x):
    return x @ p["a"] @ p["b"] @ p["c"]


def relu(p, x):
    return jax.nn.relu(x @ p["a"] + p["bias"]) @ p["b"]


def siamese(p, ids):
    """The cosine of two texts: of two members the sum of products."""
    x = p["embed"][ids] + jnp.tanh(p["embed"][ids] @ p["up"]) @ p["down"]
    x = x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True))
    return jnp.sum(x[0] * x[1], -1) + jnp.sum(x[2] * x[1], -1)


def in_flax(p, ids):
    x = p["embed"][ids]
    x = x + jnp.tanh(flax_norm(x, p["g1"], p["b1"]) @ p["up"]) @ p["down"]
    # A root mean square norm, whose gain is divided by a number for each token.
    root = jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    return x * (2.0 * p["g2"] / root) @ p["head"]


def scored(p, x):
    """A score is the sum of a product with a leaf, which is no gain because nothing else reads it."""
    unit = p["w"] / jnp.sqrt(jnp.sum(p["w"] ** 2))
    return jnp.sum(x @ p["u"] * unit, -1)


def masked(p, ids, hidden):
    """A leaf of its own in place of hidden tokens."""
    x = jnp.where(hidden[:, None], p["mask"], p["embed"][ids])
    return rms(block(p, x), p["g3"]) @ p["head"]


def crossed(p, ids, images):
    """Texts that look at images: two residuals."""
    x, y = p["embed"][ids], images @ p["patch"]
    y = y + jnp.tanh(y @ p["in"]) @ p["out"]
    k, v = heads(y @ p["wk"], 2), heads(y @ p["wv"], 2)
    x = x + attend(heads(rms(x, p["g1"]) @ p["wq"], 2), k, v, causal=False) @ p["wo"]
    return x @ p["head"]


CROSSED = named(
    embed=(5, 6), patch=(3, 7), wk=(7, 4), wv=(7, 4), g1=(6,), wq=(6, 4), wo=(4, 6), head=(6, 5),
    **{"in": (7, 3), "out": (3, 7)},
)  # fmt: skip


def cached(p, ids, keys, values):
    """The caches are inputs and outputs, so values can not turn; the residual can."""
    x = p["embed"][ids]
    h = rms(x, p["g1"])
    keys = jax.lax.dynamic_update_slice(keys, h @ p["wk"], (1, 0))
    values = jax.lax.dynamic_update_slice(values, h @ p["wv"], (1, 0))
    x = x + attend(heads(h @ p["wq"], 2), heads(keys, 2), heads(values, 2), False) @ p["wo"]
    return x @ p["head"], keys, values


CACHED = named(embed=(5, 6), g1=(6,), wk=(6, 4), wv=(6, 4), wq=(6, 4), wo=(4, 6), head=(6, 5))


def normed_queries(p, ids):
    """Norms of queries and keys, each head apart: with gains of ones these turn too."""
    x = p["embed"][ids]
    q, k = (rms(heads(x @ p[w], 2), p[g]) for w, g in (("wq", "gq"), ("wk", "gk")))
    return attend(q, k, heads(x @ p["wv"], 2)) @ p["wo"]


NORMED = named(embed=(5, 6), wq=(6, 4), gq=(2,), wk=(6, 4), gk=(2,), wv=(6, 4), wo=(4, 3))


def recurrent(p, xs):
    """A linear recurrence: what it carries turns, from step to step."""
    step = lambda h, x: (0.5 * h @ p["a"] + x @ p["b"], h @ p["c"])
    return jax.lax.scan(step, jnp.zeros((4,), xs.dtype), xs)[1]


def quadratic(p, x):
    """A space along two axes of a leaf: x a x."""
    h = x @ p["w"]
    return jnp.einsum("td,de,te->t", h, p["a"], h)


X = normal(3, 5)
CASES = {
    "llama": Case(llama, LLAMA, (IDS,), (space(RESIDUAL + " head:0", "g1 g2 g3"), VALUES)),
    "tied": Case(
        tied,
        {n: x for n, x in LLAMA.items() if n != "head"},
        (IDS,),
        (space(RESIDUAL, "g1 g2 g3"), VALUES),
    ),
    "gemma": Case(
        gemma,
        named(embed=(5, 6), z1=(6,), **ATTENTION, z2=(6,), **SWIGLU, z3=(6,)),
        (IDS,),
        (space(RESIDUAL, "z1 z2 z3"), VALUES),
    ),
    "sandwich": Case(
        sandwich,
        {**LLAMA, **named(g4=(6,))},
        (IDS,),
        (space(RESIDUAL + " head:0", "g1 g2 g3 g4"), VALUES),
    ),
    "opt": Case(
        opt,
        OPT,
        (IDS,),
        (space(f"6 embed:1 places:1 {OPT_BLOCK} b3:0", "g1 g2 g3", True), HEADS, QUERIES),
    ),
    "parallel": Case(
        parallel,
        named(embed=(5, 6), **NORMS, **ATTENTION, up=(6, 7), down=(7, 6), head=(6, 5)),
        (IDS,),
        (
            space("6 embed:1 b1:0 wq:0 wk:0 wv:0 wo:1 up:0 down:1 b2:0 head:0", "g1 g2", True),
            VALUES,
        ),
    ),
    "experts": Case(experts, EXPERTS, (IDS,), (EXPERT_SPACE,)),
    "ragged experts": Case(ragged_experts, EXPERTS, (IDS,), (EXPERT_SPACE,)),
    "scan": Case(
        scanned,
        SCANNED,
        (IDS,),
        (
            space(
                "6 embed:1 layers/wq:1 layers/wk:1 layers/wv:1 layers/wo:2 layers/gate:1 "
                "layers/up:1 layers/down:2 head:0",
                "g3 layers/g1 layers/g2",
            ),
            space("2 layers/wv:2/2x1 layers/wo:1/4x1"),
        ),
    ),
    "vit": Case(
        vit,
        VIT,
        (normal(4, 4, 3),),
        (
            space(f"6 patch:1 bpatch:0 cls:1 places:1 {OPT_BLOCK} b3:0 head:0", "g1 g2 g3", True),
            HEADS,
            QUERIES,
        ),
    ),
    "bert": Case(
        bert,
        BERT,
        (IDS, np.array([0, 1, 1])),
        (
            space(f"6 embed:1 kinds:1 places:1 b0:0 {OPT_BLOCK} pool:0", "g0 g1 g2", True),
            HEADS,
            QUERIES,
        ),
    ),
    "fused": Case(
        fused,
        FUSED,
        (IDS,),
        (
            space("6 embed:1 qkv:0 wo:1 both:0 down:1 head:0", "g1 g2 g3"),
            space("2 qkv:1/2x1@12 wo:0/4x1"),
        ),
    ),
    "latent": Case(
        latent,
        LATENT,
        (IDS,),
        (
            space("6 embed:1 shrink:0 wq:0 wo:1 head:0", "g1"),
            space("3 shrink:1 wk:0 wv:0", "g2"),
            space("2 wv:1/2x1 wo:0/2x1"),
        ),
    ),
    "lora": Case(
        lora,
        named(first=(5, 7), w=(7, 6), a=(7, 2), b=(2, 6), last=(6, 3)),
        (X,),
        (space("6 w:1 b:1 last:0"),),
    ),
    "linear": Case(
        linear,
        named(a=(5, 6), b=(6, 7), c=(7, 3)),
        (X,),
        (space("6 a:1 b:0"), space("7 b:1 c:0")),
    ),
    "relu": Case(relu, named(a=(5, 6), bias=(6,), b=(6, 3)), (X,), ()),
    "siamese": Case(
        siamese,
        named(embed=(5, 6), up=(6, 7), down=(7, 6)),
        (IDS,),
        (space("6 embed:1 up:0 down:1"),),
    ),
    "in flax": Case(
        in_flax,
        named(embed=(5, 6), g1=(6,), b1=(6,), up=(6, 7), down=(7, 6), g2=(6,), head=(6, 5)),
        (IDS,),
        (space("6 embed:1 b1:0 up:0 down:1 head:0", "g1 g2", True),),
    ),
    "scored": Case(scored, named(u=(5, 6), w=(6,)), (X,), (space("6 u:1 w:0"),)),
    "masked": Case(
        masked,
        {**LLAMA, **named(mask=(6,))},
        (IDS, np.array([True, False, False])),
        (space(RESIDUAL + " mask:0 head:0", "g1 g2 g3"), VALUES),
    ),
    "crossed": Case(
        crossed,
        CROSSED,
        (IDS, normal(2, 3)),
        (
            space("6 embed:1 wq:0 wo:1 head:0", "g1"),
            space("7 patch:1 in:0 out:1 wk:0 wv:0"),
            space("2 wq:1/2x1 wk:1/2x1"),
            space("2 wv:1/2x1 wo:0/2x1"),
        ),
    ),
    "cached": Case(
        cached,
        CACHED,
        (IDS[:1], normal(3, 4), normal(3, 4)),
        (space("6 embed:1 wk:0 wv:0 wq:0 wo:1 head:0", "g1"),),
    ),
    "normed queries": Case(
        normed_queries,
        NORMED,
        (IDS,),
        (
            space("6 embed:1 wq:0 wk:0 wv:0"),
            space("2 wq:1/2x1 wk:1/2x1", "gq gk"),
            space("2 wv:1/2x1 wo:0/2x1"),
        ),
    ),
    "recurrent": Case(
        recurrent, named(a=(4, 4), b=(5, 4), c=(4, 3)), (X,), (space("4 a:0 a:1 b:1 c:0"),)
    ),
    "quadratic": Case(quadratic, named(w=(5, 4), a=(4, 4)), (X,), (space("4 w:1 a:0 a:1"),)),
}
