"""The results of a fixed set of programs, to the bit: a net under changes that change no result.

    PYTHONPATH=old python benchmarks/same_results.py record old.json
    PYTHONPATH=new python benchmarks/same_results.py record new.json
    python benchmarks/same_results.py compare old.json new.json

`record` runs the sqjax that it imports and writes {name: digest or text}; `compare` prints the
names whose results differ or are missing, and exits with 1 if there are any. Compare records of one
machine and one jax: other compilers round otherwise. Only public names of sqjax are used, so that
files may move, and what our own classes call their fields, and in which order, does not matter.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Nearly all of the time is compiling: LLVM's optimizations are left out, as in tests/conftest.py.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

if sys.argv[1:2] != ["compare"]:  # which needs the two records only
    import sqjax as sq

Results = Iterator[tuple[str, str]]

# Schemes ------------------------------------------------------------------------------------------

PRESETS = (
    *("W8A8_O1", "W8A8_O2", "W8A8_O3", "W8A8_OUTLIERS"),
    *("FP8", "FP8_E5M2", "W8A16", "W4A16", "W4A16_G64", "W4A8"),
)


def variant(preset: str, **changes: Any) -> Any:
    """A preset with some fields changed, in the spelling of the sqjax at hand.

    Until 0.1.0 was typed, a `Scheme` was a NamedTuple: `weights` was "per_tensor" or a group size,
    `activations` a word, `range` a field of its own. Now they are parts of `weight` and
    `activation`.
    """
    scheme = getattr(sq, preset)
    if hasattr(scheme, "_replace"):
        return scheme._replace(**changes)
    if (weights := changes.pop("weights", None)) is not None:
        per_tensor = weights == "per_tensor"
        part = {"per_tensor": True} if per_tensor else {"group_size": weights}
        changes["weight"] = scheme.weight.replace(**part)
    if changes.pop("activations", None) == "static":
        changes["activation"] = sq.Static(format=scheme.activation.format)
    if "range" in changes:
        changes["activation"] = sq.Static(range=changes.pop("range"))
    return scheme.replace(**changes)


def presets() -> dict[str, Any]:
    """The presets for sites, by name."""
    return {name: getattr(sq, name) for name in PRESETS}


def few() -> dict[str, Any]:
    """One preset of each kind, for programs that take long to compile."""
    chosen = ("W8A8_O1", "W8A8_O3", "W8A8_OUTLIERS", "W4A8")
    return {name: getattr(sq, name) for name in chosen}


def variants() -> dict[str, Any]:
    """Schemes that no preset is: the presets' groups are longer than our small weights."""
    return {
        "O1 per tensor": variant("W8A8_O1", weights="per_tensor"),
        "O1 in groups": variant("W8A8_O1", weights=8),
        "O2 smoothed at run time": variant("W8A8_O2", smoothing=0.5),
        "O3 smoothed at run time": variant("W8A8_O3", smoothing=0.5),
        "O3 outliers": variant("W8A8_O3", outliers=2.0),
        "outliers above 2": variant("W8A8_OUTLIERS", outliers=2.0),
        "static FP8": variant("FP8", activations="static"),
        "W4A16 g8": variant("W4A16", weights=8),
        "W4A8 g8": variant("W4A8", weights=8),
    }


# Digests ------------------------------------------------------------------------------------------


def digest(x: Any) -> str:
    """Dtype, shape and a hash of the bytes of an array; texts and None as they are."""
    if x is None or isinstance(x, str | P):
        return str(x)
    if isinstance(x, jax.Array) and jnp.issubdtype(
        x.dtype, jax.dtypes.prng_key
    ):
        x = jax.random.key_data(x)
    array = np.ascontiguousarray(x)
    hashed = hashlib.sha256(array.tobytes()).hexdigest()[:32]
    return f"{array.dtype}{list(np.shape(x))} {hashed}"


def text(found: Any) -> str:
    """A text without the lines of source files, and the functions there: these may move."""
    return re.sub(r"[\w./-]+\.py(:\d+)+( \([\w.<>]+\))?", "FILE", str(found))


def digests(name: str, tree: Any) -> Results:
    """One result for each of a tree's own names, those of dicts and lists.

    The arrays of one of our classes have no order and no names: their digests are sorted, and
    followed by that of the float array they stand for.
    """
    held: dict[str, list[str]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=is_spec
    ):
        held.setdefault(outer(path), []).append(digest(leaf))
    floats: dict[str, list[str]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=is_tensor
    ):
        if is_tensor(leaf) and not has_specs(leaf):
            floats.setdefault(outer(path), []).append(
                digest(sq.dequantize(leaf))
            )
    for where, found in held.items():
        meant = [f"= {one}" for one in sorted(floats.get(where, []))]
        yield f"{name}{where}", "; ".join([*sorted(found), *meant])


def outer(path: Any) -> str:
    """A leaf's path up to the last key of a dict or index of a list: the rest is ours.

    `Stats` is ours, but the attributes that lead to its dicts are public.
    """
    own = (jax.tree_util.DictKey, jax.tree_util.SequenceKey)
    ends = [i + 1 for i, key in enumerate(path) if isinstance(key, own)]
    return jax.tree_util.keystr(path[: ends[-1]]) if ends else ""


def is_spec(x: Any) -> bool:
    return isinstance(x, P)


def is_tensor(x: Any) -> bool:
    return isinstance(x, sq.QTensor)


def has_specs(tensor: Any) -> bool:
    """Whether a `QTensor` holds how its arrays are cut, and no arrays."""
    leaves = jax.tree.leaves(tensor, is_leaf=is_spec)
    return not all(isinstance(x, jax.Array | np.ndarray) for x in leaves)


# What is recorded of a function ------------------------------------------------------------------


class Case(NamedTuple):
    """A function, parameters, batches (tuples of inputs) and a pattern for its embeddings."""

    fn: Any
    params: Any
    batches: list[Any]
    tables: str | None = None
    schemes: dict[str, Any] | None = None  # None: the presets

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The first batch."""
        return self.batches[0]


def of_case(case: Case) -> Results:
    """Everything that a function goes through from calibration to its quantized outputs."""
    stats = sq.calibrate(case.fn, case.params, case.batches)
    run = jax.jit(sq.quantized(case.fn))
    yield from of_graph(stats.graph, case.params)
    yield from digests("stats", stats)
    yield from digests("float output", run(case.params, *case.inputs))
    smoothed, folded = yield from of_smoothing(case, stats, run)
    for name, scheme in of_rules(case).items():
        qparams = sq.quantize(case.params, stats, scheme)
        yield from digests(f"{name} tree", qparams)
        try:
            yield from digests(f"{name} output", run(qparams, *case.inputs))
        except ValueError:  # outliers of ragged dots, and in a shard_map; what it says may change
            yield f"{name} output", "refused"
    for name in (
        "W8A8_O1",
        "W8A8_O3",
    ):  # the presets' programs are compiled already
        qparams = sq.quantize(smoothed, folded, getattr(sq, name))
        yield from digests(f"{name} smoothed tree", qparams)
        yield from digests(
            f"{name} smoothed output", run(qparams, *case.inputs)
        )


def of_graph(graph: Any, params: Any) -> Results:
    """The table, what was refused, and what `explain` says of every leaf."""
    yield "graph", text(graph)
    yield "refused", text([name for name, *_ in graph.refused])
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        yield f"explain {name}", text(graph.explain(name))


def of_smoothing(case: Case, stats: Any, run: Callable[..., Any]) -> Any:
    """Scales, folded parameters and statistics; returns those of alpha 0.5."""
    for alpha in (0.85, 0.5):
        s = sq.scales(case.params, stats, alpha)
        smoothed = sq.fold(case.params, stats.graph, s)
        folded = sq.fold_stats(stats, s)
        yield from digests(f"scales {alpha}", s)
        yield from digests(f"fold {alpha}", smoothed)
        yield from digests(f"fold_stats {alpha}", folded)
        yield from digests(
            f"smoothed output {alpha}", run(smoothed, *case.inputs)
        )
    yield from digests("smooth", sq.smooth(case.params, stats, 0.5))
    return smoothed, folded


def of_rules(case: Case) -> dict[str, Any]:
    """The schemes of a case, and its embeddings' where it has any."""
    found = dict(case.schemes or presets())
    if case.tables is not None:
        for name in ("EMBEDDING_INT8", "EMBEDDING_INT4"):
            found[name] = {case.tables: getattr(sq, name), ".*": sq.W8A8}
    return found


# Plain functions ----------------------------------------------------------------------------------

WIDTH, HIDDEN = 16, 24


def normal(*shape: int, seed: int = 0) -> jax.Array:
    """Normal numbers, float32."""
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def weight(*shape: int, seed: int = 0) -> jax.Array:
    """A matrix that keeps the size of what it multiplies."""
    return normal(*shape, seed=seed) / shape[-2] ** 0.5


def tokens(*lead: int, seed: int = 0) -> jax.Array:
    """Activations with a few channels that are much larger than the others."""
    gains = np.exp(np.random.default_rng(seed).normal(size=WIDTH))
    return normal(*lead, WIDTH, seed=seed) * jnp.asarray(gains, jnp.float32)


def batches(*shapes: tuple[int, ...]) -> list[Any]:
    """A batch of one activation for each shape."""
    return [(tokens(*shape, seed=i),) for i, shape in enumerate(shapes)]


def rms(x: jax.Array) -> jax.Array:
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)


def layer(p: Any, x: jax.Array) -> jax.Array:
    """A norm, two matmuls with a ReLU between them, a residual."""
    h = rms(x) * p["norm"]
    h = jax.nn.relu(h @ p["up"] + p["bias"])
    return x + h @ p["down"]


def layer_params(*lead: int) -> dict[str, jax.Array]:
    return {
        "norm": 2 + normal(*lead, WIDTH),
        "up": weight(*lead, WIDTH, HIDDEN),
        "bias": normal(*lead, HIDDEN),
        "down": weight(*lead, HIDDEN, WIDTH),
    }


def mlp() -> Case:
    x = batches((6,), (4,))
    return Case(layer, layer_params(), x, schemes=presets() | variants())


def fused_qkv() -> Case:
    """One matmul makes queries, keys and values; the values' slice absorbs the output's scale."""

    def fn(p, x):
        h = (rms(x) * p["norm"]) @ p["qkv"] + p["bias"]
        q, k, v = jnp.split(h, 3, axis=-1)
        odds = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k) / 4)
        return x + jnp.einsum("bts,bsd->btd", odds, v) @ p["out"]

    params = {"norm": 2 + normal(WIDTH), "bias": normal(3 * WIDTH)}
    params |= {"qkv": weight(WIDTH, 3 * WIDTH), "out": weight(WIDTH, WIDTH)}
    return Case(fn, params, batches((2, 5)))


def tied_embedding() -> Case:
    def fn(p, ids):
        return rms(layer(p, p["embed"][ids])) @ p["embed"].T

    params = {**layer_params(), "embed": normal(31, WIDTH)}
    ids = np.random.default_rng(0).integers(0, 31, (2, 2, 5))
    return Case(fn, params, [(jnp.asarray(row),) for row in ids])


def embedding() -> Case:
    """A table that is no head."""

    def fn(p, ids):
        return layer(p, p["embed"][ids])

    case = tied_embedding()
    return case._replace(fn=fn, tables="embed", schemes={"W8A8_O1": sq.W8A8})


def offset_norm() -> Case:
    """Gemma's 1 + w."""

    def fn(p, x):
        h = rms(x) * (1 + p["norm"])
        gate, up = h @ p["gate"], h @ p["up"]
        return jax.nn.silu(gate) * up @ p["down"]

    params = {"norm": 0.5 * normal(WIDTH), "down": weight(HIDDEN, WIDTH)}
    for seed, name in enumerate(("gate", "up")):
        params[name] = weight(WIDTH, HIDDEN, seed=seed)
    return Case(fn, params, batches((6,)))


EXPERTS = 3


def expert_params() -> dict[str, jax.Array]:
    return {
        "norm": 2 + normal(WIDTH),
        "router": weight(WIDTH, EXPERTS),
        "up": weight(EXPERTS, WIDTH, HIDDEN),
        "down": weight(EXPERTS, HIDDEN, WIDTH),
    }


def experts_einsum() -> Case:
    """Every expert sees every token."""

    def fn(p, x):
        h = x * p["norm"]
        odds = jax.nn.softmax(h @ p["router"], -1)
        hidden = jax.nn.relu(jnp.einsum("td,edf->tef", h, p["up"]))
        return jnp.einsum(
            "te,ted->td", odds, jnp.einsum("tef,efd->ted", hidden, p["down"])
        )

    return Case(fn, expert_params(), batches((8,)))


def experts_ragged() -> Case:
    """Tokens sorted by expert."""

    def fn(p, x):
        h = x * p["norm"]
        expert = jnp.argmax(h @ p["router"], -1)
        order, sizes = jnp.argsort(expert), jnp.bincount(expert, length=EXPERTS)
        hidden = jax.nn.relu(lax.ragged_dot(h[order], p["up"], sizes))
        output = lax.ragged_dot(hidden, p["down"], sizes)
        return jnp.zeros_like(x).at[order].set(output)

    return Case(fn, expert_params(), batches((8,)))


def scanned() -> Case:
    def step(x, p):
        return layer(p, x), None

    def fn(p, x):
        return lax.scan(step, x, p)[0]

    x = batches((6,), (4,))
    return Case(fn, layer_params(3), x, schemes=presets() | variants())


def out_of_a_stack() -> Case:
    def fn(p, x):
        for i in range(2):
            x = layer({name: leaf[i] for name, leaf in p.items()}, x)
        return x

    return Case(fn, layer_params(2), batches((6,)), schemes=few())


def mesh() -> Any:
    kinds = (jax.sharding.AxisType.Auto,) * 2
    devices = jax.devices()[:4]
    return jax.make_mesh((2, 2), ("data", "model"), kinds, devices=devices)


CUT = {
    "norm": P(),
    "up": P(None, "model"),
    "bias": P("model"),
    "down": P("model", None),
}


def on_four_devices() -> Case:
    """Columns of the first matmul and rows of the second on each device; tokens are cut too."""

    def part(p, x):
        h = x * p["norm"]
        h = jax.nn.relu(h @ p["up"] + p["bias"])
        return lax.psum(h @ p["down"], "model")

    specs = {"in_specs": (CUT, P("data")), "out_specs": P("data")}
    fn = jax.shard_map(part, mesh=mesh(), **specs)
    return Case(fn, layer_params(), batches((4,)))


def refusals() -> Case:
    """In the way: GELU, a convolution, a condition, computed weights, a leaf read twice."""

    def fn(p, x):
        h = jax.nn.gelu((x * p["norm"]) @ p["up"])
        h = h @ p["down"] + p["norm"]
        cases = [lambda h, name=name: h @ p[name] for name in ("a", "b")]
        h = lax.cond(h.sum() > 0, *cases, h)
        h = jnp.convolve(h[0], p["taps"], mode="same") + h
        return h @ jnp.tanh(p["tanh"])

    params = {**layer_params(), "taps": normal(3)}
    del params["bias"]
    for seed, name in enumerate(("a", "b", "tanh")):
        params[name] = weight(WIDTH, WIDTH, seed=seed)
    return Case(fn, params, batches((6,)), schemes={"W8A8_O1": sq.W8A8})


# Modules ------------------------------------------------------------------------------------------


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.Dense(HIDDEN, name="up")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(WIDTH, name="down")(nn.relu(h)), None


class Network(nn.Module):
    """Attention, then layers in a scan."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        options = {
            "variable_axes": {"params": 0},
            "split_rngs": {"params": True},
        }
        return nn.scan(Layer, length=2, **options)()(x, None)[0]


def linen_module() -> Case:
    module, x = Network(), batches((2, 5))
    params = module.init(jax.random.key(0), *x[0])["params"]

    def fn(params, x):
        return module.apply({"params": params}, x)

    return Case(fn, jittered(params), x, schemes=few())


def jittered(params: Any) -> Any:
    """Every leaf random: ones and zeros would hide what happens to gains and biases."""
    return jax.tree.map(lambda x: x + 0.2 * normal(*x.shape), params)


class Perceptron(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        layers = [nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(2)]
        self.layers = nnx.List(layers)

    def __call__(self, x):
        for one in self.layers:
            x = nnx.relu(one(self.norm(x)))
        return x


def nnx_module() -> Case:
    fn, params = sq.nnx.functional(Perceptron(nnx.Rngs(0)))
    return Case(fn, jittered(params), batches((6,)))


def nnx_rebuilt() -> Results:
    """Modules made of smoothed and of quantized parameters."""
    fn, params, x, *_ = nnx_module()
    stats = sq.calibrate(fn, params, x)
    run = nnx.jit(lambda module, x: module(x))
    trees = {"smoothed": sq.smooth(params, stats, 0.5)}
    trees["O1"] = sq.quantize(params, stats)
    for name, tree in trees.items():
        module = sq.nnx.rebuild(fn, tree)
        yield f"{name} class", type(module).__name__
        yield from digests(f"{name} output", run(module, *x[0]))


# Language models ----------------------------------------------------------------------------------


def llama(**options: Any) -> tuple[Any, Any]:
    """The tiny Llama and its parameters."""
    config = sq.models.LlamaConfig(256, 64, 160, 2, 4, 2, 16, **options)
    model = sq.models.Model(config)
    return model, jittered(model.init(jax.random.key(0)))


def ids(*shape: int, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(4, 256, shape), jnp.int32)


def llama_unrolled() -> Case:
    model, params = llama()
    x = [(ids(2, 8, seed=seed),) for seed in range(2)]
    return Case(model.apply, params, x, tables="embed")


def llama_stacked() -> Case:
    model, params = llama()
    stacked, x = sq.models.stack_layers(params), [(ids(2, 8),)]
    return Case(model.apply, stacked, x, schemes=few())


def llama_tied() -> Case:
    """Tied embeddings, biases, a sliding window."""
    model, params = llama(
        tie_embeddings=True, attention_bias=True, sliding_window=4
    )
    schemes = {"W8A8_O3": sq.W8A8_O3}
    return Case(model.apply, params, [(ids(2, 8),)], schemes=schemes)


def decoding() -> Results:
    """Generation and likelihoods, with every kind of cache."""
    model, params = llama()
    stats = sq.calibrate(model.apply, params, [ids(2, 8)])
    qparams = sq.quantize(sq.smooth(params, stats, 0.5), stats)
    channels = sq.models.CacheFormat("int8", keys="channels")
    prompts = [[5, 6, 7, 8], [9, 10]]
    caches = {name: name for name in ("float", "int8", "e4m3", "int4")}
    for name, cache in (caches | {"channels": channels}).items():
        found = sq.models.generate(
            model, qparams, prompts, 6, stop=(), cache=cache
        )
        yield f"generate {name}", str(found.tokens)
    drawn = {
        "temperature": 0.8,
        "top_k": 20,
        "top_p": 0.9,
        "seed": 3,
        "chunk": 2,
    }
    found = sq.models.generate(model, params, prompts, 6, stop=(), **drawn)
    yield "sampled", str(found.tokens)
    for cache in (None, "int4"):
        measured = sq.models.perplexity(model, qparams, ids(1, 12), cache=cache)
        yield f"perplexity {cache}", repr(measured)
    pairs = [([5, 6], [7, 8, 9])]
    pairs.append(([10], [11]))
    scored = sq.models.loglikelihoods(model, qparams, pairs)
    yield "loglikelihoods", str([tuple(x) for x in scored])


def layouts() -> Results:
    """Layers fused, stacked, unstacked; the cache after a prefill."""
    model, params = llama()
    stats = sq.calibrate(model.apply, params, [ids(2, 8)])
    for name in ("W8A8_O1", "W8A8_O3", "W4A8"):
        qparams = sq.quantize(params, stats, getattr(sq, name))
        fused = sq.models.fuse(qparams)
        stacked = sq.models.stack_layers(qparams)
        yield from digests(f"{name} fused", fused)
        yield from digests(f"{name} stacked", stacked)
        yield from digests(
            f"{name} unstacked", sq.models.unstack_layers(stacked)
        )
        output = jax.jit(sq.quantized(model.apply))(fused, ids(2, 8))
        yield from digests(f"{name} fused output", output)
    for kind in ("float", "int8", "e4m3", "int4"):
        cache = model.init_cache(2, 12, kind=kind)
        run = jax.jit(sq.quantized(model.decode))
        logits, cache = run(params, ids(2, 8), cache)
        yield f"{kind} logits", digest(logits)
        yield (
            f"{kind} cache",
            "; ".join(sorted(map(digest, jax.tree.leaves(cache)))),
        )


def opt() -> tuple[Any, Any]:
    """A small random OPT, of Hugging Face's Flax classes, as `from_flax` makes it."""
    from transformers import FlaxOPTForCausalLM, OPTConfig

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "ffn_dim": 48,
        "max_position_embeddings": 32,
    }
    config = OPTConfig(
        **sizes, num_hidden_layers=1, num_attention_heads=2, init_std=0.1
    )
    model = FlaxOPTForCausalLM(config, _do_init=False)
    init = jax.jit(model.init_weights, static_argnums=1)
    params = jittered(init(jax.random.key(0), (1, 1)))
    return sq.models.from_flax(model, params, outputs="logits")


def opt_ids() -> np.ndarray:
    return np.random.default_rng(0).integers(4, 64, (2, 8))


def huggingface_opt() -> Case:
    fn, params = opt()
    return Case(fn, params, [(opt_ids(),)], schemes=few())


def huggingface_generate() -> Results:
    """Its own loop, on int8 weights."""
    fn, params = opt()
    qparams = sq.quantize(params, sq.calibrate(fn, params, [opt_ids()]))
    run = jax.jit(sq.quantized(fn.generate), static_argnames="max_new_tokens")
    found = run(qparams, opt_ids(), max_new_tokens=4)
    yield "tokens", str(np.asarray(found.sequences).tolist())


# Single features ----------------------------------------------------------------------------------


def masked() -> Results:
    """Padding is left out; batches of other shapes, and merged statistics."""
    fn, params, x, *_ = fused_qkv()
    lengths = jnp.array([[5], [3]])
    seen = jnp.arange(5)[None] < lengths
    stats = sq.calibrate(fn, params, x, mask=lambda x: seen)
    yield from digests("stats", stats)
    shorter = (tokens(1, 3, seed=4),)
    both = sq.calibrate(fn, params, [*x, shorter])
    yield from digests("two shapes", both)
    yield "two shapes graph", text(both.graph)
    yield from digests("merged", sq.calibrate(fn, params, x).merge(stats))
    yield "unreached", str(stats.unreached)


def keys_to_queries() -> Results:
    """SmoothAttention."""
    model, params = llama()
    stats = sq.calibrate(model.apply, params, [ids(2, 8)], attention=True)
    yield "graph", text(stats.graph)
    yield from digests("stats", stats)
    yield from digests("scales", sq.scales(params, stats, 0.5, attention=0.5))
    smoothed = sq.smooth(params, stats, 0.5, attention=0.5)
    yield from digests("smoothed", smoothed)
    yield "verify", repr(sq.verify(model.apply, params, smoothed, ids(2, 8)))


def two_functions() -> Results:
    """Only what folds in both is folded."""

    def other(p, x):
        h = rms(x) * p["norm"]
        return jnp.tanh(h @ p["up"]) @ p["down"]

    streams = [batches((6,)), batches((3,))]
    stats = sq.calibrate([layer, other], layer_params(), streams)
    yield "graph", text(stats.graph)
    yield from digests("stats", stats)


def stated_group() -> Results:
    """A group that is given by hand."""
    stated = {"up": ["norm"]}
    stats = sq.calibrate(layer, layer_params(), batches((6,)), groups=stated)
    yield "graph", text(stats.graph)


def histograms() -> Results:
    """Static ranges that clip."""
    for name, case in (("mlp", mlp()), ("scanned", scanned())):
        stats = sq.calibrate(case.fn, case.params, case.batches, histogram=True)
        yield from digests(f"{name} stats", stats)
        for how in ("mse", 0.9, 0.999):
            scheme = variant("W8A8_O3", range=how)
            yield from digests(
                f"{name} {how}", sq.quantize(case.params, stats, scheme)
            )


def smoothing_options() -> Results:
    fn, params, x, *_ = fused_qkv()
    stats = sq.calibrate(fn, params, x)
    options = {
        "pow2": {"round_scales": "pow2"},
        "norm": {"groups": "norm"},
        "pattern": {"groups": ["out"]},
        "alphas": {"alpha": {"out": 0.3, ".*": 0.7}},
    }
    for name, chosen in options.items():
        yield from digests(name, sq.smooth(params, stats, **chosen))


def all_in_one() -> Results:
    """`smoothquant`, with rules and smoothing at run time."""
    case = llama_unrolled()
    o3 = sq.smoothquant(case.fn, case.params, case.batches, 0.85, sq.W8A8_O3)
    yield from digests("O3", o3)
    rules = {
        "lm_head": None,
        "embed": sq.EMBEDDING_INT8,
        "down_proj": sq.W4A8,
        ".*": sq.W8A8_O2,
    }
    options = {"groups": "norm", "runtime": 0.5}
    tree = sq.smoothquant(
        case.fn, case.params, case.batches, 0.5, rules, **options
    )
    yield from digests("rules", tree)
    run = jax.jit(sq.quantized(case.fn))
    for name, qparams in (("O3", o3), ("rules", tree)):
        yield from digests(f"{name} output", run(qparams, *case.inputs))
    clipping = variant("W8A8_O3", range="mse")
    tree = sq.smoothquant(layer, layer_params(), batches((6,)), 0.5, clipping)
    yield from digests("range", tree)


def files() -> Results:
    """Through `save` and `load`, and what is in the file."""
    stats = sq.calibrate(layer, layer_params(), batches((6,)))
    for name, scheme in (presets() | variants()).items():
        qparams = sq.quantize(layer_params(), stats, scheme)
        with tempfile.TemporaryDirectory() as folder:
            file = f"{folder}/params.safetensors"
            sq.save(file, qparams)
            loaded, stored = sq.load(file), tensors_in(Path(file).read_bytes())
        yield (
            f"{name} same",
            str(dict(digests("", loaded)) == dict(digests("", qparams))),
        )
        yield (
            f"{name} structure",
            str(jax.tree.structure(loaded) == jax.tree.structure(qparams)),
        )
        yield f"{name} tensors", "; ".join(sorted(stored))


def tensors_in(content: bytes) -> Iterator[str]:
    """Digests of a safetensors file's tensors: safetensors.numpy does not read float8."""
    start = 8 + int.from_bytes(content[:8], "little")
    for name, stated in json.loads(content[8:start]).items():
        if name != "__metadata__":
            first, last = (start + offset for offset in stated["data_offsets"])
            data = np.frombuffer(content[first:last], np.uint8)
            yield f"{stated['dtype']}{stated['shape']} of {digest(data)}"


def placements() -> Results:
    """How quantized weights are cut, as specs and on devices."""
    case = on_four_devices()
    stats = sq.calibrate(case.fn, case.params, case.batches)
    placed_by = partial(jax.sharding.NamedSharding, mesh())
    places = {name: placed_by(spec) for name, spec in CUT.items()}
    run = jax.jit(sq.quantized(case.fn))
    for name, scheme in (presets() | variants()).items():
        qparams = sq.quantize(case.params, stats, scheme)
        yield from digests(f"{name} specs", sq.shardings(qparams, CUT))
        if name in ("W8A8_O3", "W4A16"):
            placed = jax.device_put(qparams, sq.shardings(qparams, places))
            yield from digests(f"{name} output", run(placed, *case.inputs))


def linen_layers() -> Results:
    """QuantDense and QuantDenseGeneral, of float parameters and drawn by `init`."""
    x, absmax = tokens(6), jnp.abs(tokens(6)).max(0)
    params = {"kernel": weight(WIDTH, HIDDEN), "bias": normal(HIDDEN)}
    dense = sq.linen.QuantDense(HIDDEN)
    heads = sq.linen.QuantDenseGeneral(HIDDEN, axis=(-2, -1))
    general = {**params, "kernel": weight(2, WIDTH // 2, HIDDEN)}
    for name, scheme in presets().items():
        tree = sq.linen.quantize_dense(params, scheme, absmax=absmax)
        yield from digests(f"{name} dense", tree)
        yield from digests(
            f"{name} dense output", jax.jit(dense.apply)({"params": tree}, x)
        )
        options = {"axis": (-2, -1), "absmax": absmax.reshape(2, -1)}
        tree = sq.linen.quantize_dense_general(general, scheme, **options)
        yield from digests(f"{name} general", tree)
        apart = x.reshape(6, 2, -1)
        output = jax.jit(heads.apply)({"params": tree}, apart)
        yield from digests(f"{name} general output", output)
        layer = sq.linen.QuantDense(HIDDEN, scheme=scheme)
        drawn = layer.init(jax.random.key(0), x)
        yield from digests(f"{name} drawn", drawn)


def nnx_layers() -> Results:
    linear = nnx.Linear(WIDTH, HIDDEN, rngs=nnx.Rngs(0))
    x, absmax = tokens(6), jnp.abs(tokens(6)).max(0)
    run = nnx.jit(lambda module, x: module(x))
    for name, scheme in presets().items():
        made = sq.nnx.QuantLinear.from_linear(linear, scheme, absmax)
        yield from digests(f"{name} output", run(made, x))
        drawn = sq.nnx.QuantLinear(
            WIDTH, HIDDEN, scheme=scheme, rngs=nnx.Rngs(1)
        )
        yield from digests(f"{name} drawn output", run(drawn, x))


def gradients() -> Results:
    """Straight through the quantized matmuls, with respect to a norm and the input."""
    for name, case in (("mlp", mlp()), ("scanned", scanned())):
        stats = sq.calibrate(case.fn, case.params, case.batches)
        for scheme in ("W8A8_O1", "W8A8_O3", "W8A16", "FP8"):
            qparams = sq.quantize(case.params, stats, getattr(sq, scheme))
            loss = partial(squares, sq.quantized(case.fn), qparams)
            grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
            found = grad(qparams["norm"], *case.inputs)
            yield from digests(f"{name} {scheme}", found)


def squares(fn: Any, qparams: Any, norm: Any, x: Any) -> jax.Array:
    """The sum of squares of a function's outputs, with a norm of its own."""
    return jnp.sum(fn({**qparams, "norm": norm}, x) ** 2)


def attention_in_int8() -> Results:
    """The batched matmuls of attention, around float and quantized weights, and in a scan."""
    fn, params, x, *_ = fused_qkv()
    qparams = sq.quantize(params, sq.calibrate(fn, params, x))
    for how in ("per_token", "per_tensor"):
        narrow = sq.int8_attention(fn, how)
        yield from digests(f"{how} float", jax.jit(narrow)(params, *x[0]))
        inside = sq.quantized(narrow)
        yield from digests(f"{how} inside", jax.jit(inside)(qparams, *x[0]))
        outside = sq.int8_attention(sq.quantized(fn), how)
        yield from digests(f"{how} outside", jax.jit(outside)(qparams, *x[0]))
    model, params = llama()
    stacked = sq.models.stack_layers(params)
    run = jax.jit(sq.int8_attention(model.apply))
    yield from digests("llama", run(stacked, ids(2, 8)))


def cached_attention(p: Any, x: jax.Array, cache: Any) -> Any:
    """Attention of one head that writes to a cache, and reads all of it."""
    start = cache["index"]
    held = {"index": start + x.shape[1]}
    for name in ("key", "value"):
        new = (x @ p[name])[:, :, None]
        place = (0, start, 0, 0)
        held[name] = lax.dynamic_update_slice(cache[name], new, place)
    now = start + jnp.arange(x.shape[1])
    seen = now[:, None] >= jnp.arange(8)[None, :]
    scores = jnp.einsum("bqd,bkhd->bhqk", x @ p["query"], held["key"]) / 4
    odds = jax.nn.softmax(jnp.where(seen, scores, -1e9))
    return jnp.einsum("bhqk,bkhd->bqhd", odds, held["value"]), held


def int8_cache() -> Results:
    """A prefill and a step through the int8 form of a function's own cache."""
    params = {}
    for seed, name in enumerate(("query", "key", "value")):
        params[name] = weight(WIDTH, WIDTH, seed=seed)
    zeros = jnp.zeros((2, 8, 1, WIDTH))
    empty = {"key": zeros, "value": zeros, "index": jnp.int32(0)}
    stats = sq.calibrate(cached_attention, params, [(tokens(2, 4), empty)])
    qparams, cache = sq.quantize(params, stats), sq.quantize_cache(empty)
    run = jax.jit(sq.quantized(cached_attention))
    for step, length in enumerate((4, 1)):
        output, cache = run(qparams, tokens(2, length, seed=step), cache)
        yield from digests(f"output {step}", output)
        yield from digests(f"cache {step}", cache)


def checks() -> Results:
    """Errors that `verify` measures, of smoothed and of quantized parameters."""
    for name, case in (("mlp", mlp()), ("scanned", scanned())):
        stats = sq.calibrate(case.fn, case.params, case.batches)
        trees = {"smoothed": sq.smooth(case.params, stats)}
        trees["O1"] = sq.quantize(case.params, stats)
        for kind, tree in trees.items():
            error = sq.verify(
                case.fn, case.params, tree, *case.inputs, tolerance=1.0
            )
            yield f"{name} {kind}", repr(error)


# The two modes ------------------------------------------------------------------------------------

CASES = (
    *(mlp, fused_qkv, tied_embedding, embedding, offset_norm),
    *(
        experts_einsum,
        experts_ragged,
        scanned,
        out_of_a_stack,
        on_four_devices,
        refusals,
    ),
    *(
        linen_module,
        nnx_module,
        llama_unrolled,
        llama_stacked,
        llama_tied,
        huggingface_opt,
    ),
)
FEATURES = (
    *(
        masked,
        keys_to_queries,
        two_functions,
        stated_group,
        histograms,
        smoothing_options,
    ),
    *(
        all_in_one,
        files,
        placements,
        linen_layers,
        nnx_layers,
        nnx_rebuilt,
        gradients,
    ),
    *(
        attention_in_int8,
        int8_cache,
        checks,
        decoding,
        layouts,
        huggingface_generate,
    ),
)


#: Compiles faster; as in tests/conftest.py.
NO_EMITTERS = "--xla_cpu_use_fusion_emitters=false"


def has_flax_classes() -> bool:
    """Whether there is a transformers that still has Flax models."""
    with contextlib.suppress(ImportError):
        from transformers import __version__

        return int(__version__.split(".")[0]) < 5
    return False


def record(path: str) -> int:
    """Runs everything; what raises is a result too, but makes the exit status 1."""
    jax.config.update("jax_num_cpu_devices", 4)
    if jax.__version_info__ < (
        0,
        11,
    ):  # newer ones can not leave the fusion emitters out
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} {NO_EMITTERS}"
        )
    warnings.simplefilter("ignore")
    results, failed = {"jax": jax.__version__}, []
    start = time.process_time()
    for build in (*CASES, *FEATURES):
        name = build.__name__
        if name.startswith("huggingface") and not has_flax_classes():
            continue
        try:
            results |= numbered(
                name, of_case(build()) if build in CASES else build()
            )
        except Exception as error:
            results[f"{name}: raised"] = text(
                f"{type(error).__name__}: {error}"
            )
            failed.append(name)
        print(
            f"{time.process_time() - start:6.1f} s  {name}",
            file=sys.stderr,
            flush=True,
        )
    Path(path).write_text(json.dumps(results, indent=0))
    print(
        f"{len(results)} results of {Path(sq.__file__).parent}, {len(failed)} programs raised"
    )
    for name in failed:
        print(results[f"{name}: raised"])
    return int(bool(failed))


def numbered(program: str, found: Results) -> dict[str, str]:
    """The results of one program; two of one name are a mistake here."""
    results: dict[str, str] = {}
    for name, value in found:
        assert name not in results, (
            f"{program}: two results are called {name!r}"
        )
        results[name] = value
    return {f"{program}: {name}": value for name, value in results.items()}


def compare(first: str, second: str) -> int:
    """Prints what differs between two records."""
    paths = (first, second)
    a, b = (json.loads(Path(path).read_text()) for path in paths)
    names = list(a | b)
    differing = [name for name in names if a.get(name) != b.get(name)]
    for name in differing:
        print(name)
        for path, held in zip(paths, (a, b), strict=True):
            if name not in held:
                print(f"    missing in {path}")
        for line in changed_lines(a.get(name, ""), b.get(name, "")):
            print(f"    {line}")
    if not differing:
        print(f"{len(names)} results equal")
    return int(bool(differing))


def changed_lines(a: str, b: str) -> list[str]:
    """The lines, or parts of a digest, that only one of two results has."""
    before, after = (re.split(r"\n|; ", one) for one in (a, b))
    gone = [f"- {line}" for line in before if line not in after]
    return gone + [f"+ {line}" for line in after if line not in before]


def main(mode: str = "", *paths: str) -> int:
    if (mode, len(paths)) not in (("record", 1), ("compare", 2)):
        print(__doc__)
        return 2
    return record(*paths) if mode == "record" else compare(*paths)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
