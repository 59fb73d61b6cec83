"""Groups found in a program beside those written by hand; programs that must be refused."""

import functools
import itertools
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from slow import slow_except

import sqjax as sq
from sqjax._trees import named_leaves
from sqjax.calibration.analysis import shared_arrays
from sqjax.folding import moves
from sqjax.folding import search as closure
from sqjax.folding.certificate import certify
from sqjax.folding.find_graph import find_graph
from sqjax.folding.groups import Survey
from sqjax.folding.per_step import Stack
from sqjax.folding.sites import find_sites
from sqjax.models import LlamaConfig, Model
from sqjax.program.build import Var
from sqjax.program.facts import Program
from sqjax.program.trace import trace


class Case(NamedTuple):
    """A function, its parameters and arguments, and its groups: (number of scales, absorbing leaves, sites)."""

    fn: Any
    params: Any
    args: tuple
    groups: list


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


def jittered(params, seed=0):
    """Every leaf random: ones and zeros would hide what happens to gains and biases."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), params)


def program_of(fn, params, *args):
    return Program(trace(fn, params, args, {})[0])


def graph_of(fn, params, *args):
    return find_graph(Survey.of(program_of(fn, params, *args), shared_arrays(params)))


def linen_case(module, x, groups, **kwargs):
    params = jittered(module.init(jax.random.key(0), x, **kwargs)["params"])
    return Case(lambda p, x: module.apply({"params": p}, x, **kwargs), params, (x,), groups)


# Programs and their groups ---------------------------------------------------------------------------


class Perceptron(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(8, name="fc1")(nn.LayerNorm(name="norm")(x)))
        return x + nn.Dense(6, name="fc2")(h)


class Gained(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, use_bias=False, name="head")(nn.RMSNorm(name="norm")(x))


class SelfAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.MultiHeadDotProductAttention(num_heads=2, name="mha")(
            nn.LayerNorm(name="norm")(x)
        )


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="head")(
            nn.Dropout(0.5, deterministic=False)(nn.LayerNorm(name="norm")(x))
        )


class BatchNormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.BatchNorm(use_running_average=False, name="norm")(nn.Dense(8, name="fc1")(x))
        return nn.Dense(5, name="fc2")(nn.relu(h))


class Network(nnx.Module):
    def __init__(self, rngs):
        sizes = [4, 6, 8, 3]
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(m, n, rngs=rngs) for m, n in itertools.pairwise(sizes)])

    def __call__(self, x):
        x = self.norm(x)
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def perceptron():
    groups = [
        (6, ["norm/bias", "norm/scale"], ["fc1/kernel"]),
        (8, ["fc1/bias", "fc1/kernel"], ["fc2/kernel"]),
    ]
    return linen_case(Perceptron(), normal(3, 6), groups)


def rms_norm():
    return linen_case(Gained(), normal(3, 6), [(6, ["norm/scale"], ["head/kernel"])])


def attention():
    qkv = ["mha/key/kernel", "mha/query/kernel", "mha/value/kernel"]
    out = (6, ["mha/value/bias", "mha/value/kernel"], ["mha/out/kernel"])
    return linen_case(
        SelfAttention(), normal(2, 5, 6), [(6, ["norm/bias", "norm/scale"], qkv), out]
    )


def dropout():
    """A mask drawn from a key depends on no scale: it multiplies, and that is lawful."""
    case = linen_case(Gained(), normal(3, 6), [(6, ["norm/bias", "norm/scale"], ["head/kernel"])])
    module = Dropped()
    params = jittered(
        module.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, *case.args)[
            "params"
        ]
    )

    def fn(p, x, key):
        return module.apply({"params": p}, x, rngs={"dropout": key})

    return case._replace(fn=fn, params=params, args=(*case.args, jax.random.key(2)))


def batch_norm():
    """Batch statistics that are taken *before* the gain do not see its scale, even if fn returns them."""
    module, x = BatchNormed(), normal(5, 6)
    variables = module.init(jax.random.key(0), x)

    def fn(p, x):
        return module.apply({**variables, "params": p}, x, mutable=["batch_stats"])

    return Case(
        fn, jittered(variables["params"]), (x,), [(8, ["norm/bias", "norm/scale"], ["fc2/kernel"])]
    )


LLAMA = LlamaConfig(
    vocab_size=31,
    hidden_size=12,
    intermediate_size=10,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
)


def llama():
    """Grouped queries: o_proj's 24 channels read v_proj's 8, so three query heads share one scale."""
    model = Model(LLAMA)
    groups = [(12, ["model/norm/weight"], ["lm_head/kernel"])]
    for i in range(2):
        layer = f"model/layers/{i}"
        groups += [
            (
                12,
                [f"{layer}/input_layernorm/weight"],
                [f"{layer}/self_attn/{n}_proj/kernel" for n in "kqv"],
            ),
            (8, [f"{layer}/self_attn/v_proj/kernel"], [f"{layer}/self_attn/o_proj/kernel"]),
            (
                12,
                [f"{layer}/post_attention_layernorm/weight"],
                [f"{layer}/mlp/{n}_proj/kernel" for n in ("gate", "up")],
            ),
            (10, [f"{layer}/mlp/up_proj/kernel"], [f"{layer}/mlp/down_proj/kernel"]),
        ]
    params = jittered(jax.jit(model.init)(jax.random.key(0)))
    return Case(model.apply, params, (jnp.array([[1, 5, 30, 2], [7, 7, 0, 3]]),), groups)


def opt():
    """Hugging Face's class; lm_head is the embedding and is refused."""
    from transformers import FlaxOPTForCausalLM, OPTConfig

    config = OPTConfig(
        vocab_size=31,
        hidden_size=8,
        ffn_dim=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        word_embed_proj_dim=8,
        dropout=0.0,
    )
    model = FlaxOPTForCausalLM(config)

    def fn(params, ids):
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        return model.module.apply({"params": params}, ids, jnp.ones_like(ids), positions).logits

    layer = "model/decoder/layers/0"
    attention = f"{layer}/self_attn"
    groups = [
        (
            8,
            [f"{layer}/self_attn_layer_norm/{n}" for n in ("bias", "scale")],
            [f"{attention}/{n}_proj/kernel" for n in "kqv"],
        ),
        (
            8,
            [f"{attention}/v_proj/{n}" for n in ("bias", "kernel")],
            [f"{attention}/out_proj/kernel"],
        ),
        (8, [f"{layer}/final_layer_norm/{n}" for n in ("bias", "scale")], [f"{layer}/fc1/kernel"]),
        (12, [f"{layer}/fc1/{n}" for n in ("bias", "kernel")], [f"{layer}/fc2/kernel"]),
    ]
    return Case(fn, jittered(model.params), (jnp.array([[4, 5, 30, 2, 9]]),), groups)


def nnx_network():
    graphdef, state = nnx.split(Network(nnx.Rngs(0)))
    linear = [[f"layers/{i}/bias/value", f"layers/{i}/kernel/value"] for i in range(3)]
    groups = [
        (4, ["norm/bias/value", "norm/scale/value"], linear[0][1:]),
        (6, linear[0], linear[1][1:]),
        (8, linear[1], linear[2][1:]),
    ]
    return Case(
        lambda state, x: nnx.merge(graphdef, state)(x), jittered(state), (normal(3, 4),), groups
    )


def leaky_relu():
    params = {"a": normal(6, 8), "b": normal(8, 5), "c": normal(5, 3)}

    def fn(p, x):
        return (
            jax.nn.leaky_relu(jnp.where((h := x @ p["a"]) > 0, h, 0.2 * h) @ p["b"], 0.3) @ p["c"]
        )

    return Case(fn, params, (normal(3, 6),), [(8, ["a"], ["b"]), (5, ["b"], ["c"])])


@jax.custom_jvp
def plain_relu(x):
    return jnp.maximum(x, 0)


plain_relu.defjvp(lambda primals, tangents: (plain_relu(*primals), tangents[0]))


def wrapped():
    """jit inside remat inside custom_jvp: the walk looks through all of them."""
    params = {"gain": normal(6), "a": normal(6, 8), "b": normal(8, 5)}

    @jax.jit
    def inner(p, x):
        return jax.checkpoint(lambda x: plain_relu(x @ p["a"]))(x * p["gain"][None])

    groups = [(6, ["gain"], ["a"]), (8, ["a"], ["b"])]
    return Case(lambda p, x: inner(p, x) @ p["b"], params, (normal(3, 6),), groups)


def in_bfloat16():
    case = wrapped()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), case.params)
    return case._replace(params=params, args=(normal(3, 6, dtype=jnp.bfloat16),))


def cast_inside():
    case = wrapped()

    def fn(p, x):
        return case.fn(jax.tree.map(lambda x: x.astype(jnp.bfloat16), p), x.astype(jnp.bfloat16))

    return case._replace(fn=fn)


def fused_gate_up():
    """up is the right half of one kernel: only those columns absorb."""
    params = {"gain": normal(6), "gate_up": normal(6, 16), "down": normal(8, 6)}

    def fn(p, x):
        gate, up = jnp.split(x * p["gain"][None] @ p["gate_up"], 2, axis=-1)
        return x + (jax.nn.silu(gate) * up) @ p["down"]

    return Case(
        fn, params, (normal(3, 6),), [(6, ["gain"], ["gate_up"]), (8, ["gate_up"], ["down"])]
    )


def fused_qkv():
    """One kernel, three slices, two heads of four channels; v's rows of a (out, in) kernel and its bias absorb."""
    params = {"gain": normal(6), "qkv": normal(24, 6), "bias": normal(24), "out": normal(8, 6)}

    def fn(p, x):
        h = (x * p["gain"][None, None]) @ p["qkv"].T + p["bias"][None, None]
        q, k, v = (h[..., i : i + 8].reshape(2, 5, 2, 4) for i in (0, 8, 16))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k), -1)
        return x + jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(2, 5, 8) @ p["out"]

    groups = [(6, ["gain"], ["qkv"]), (8, ["bias", "qkv"], ["out"])]
    return Case(fn, params, (normal(2, 5, 6),), groups)


def experts():
    """A router and experts that read one norm are one group; a router's softmax bars the rest."""
    params = {
        "gain": normal(6),
        "router": normal(6, 3),
        "up": normal(3, 6, 8),
        "shared": normal(6, 4),
    }

    def fn(p, x):
        h = x * p["gain"][None]
        odds = jax.nn.softmax(h @ p["router"], -1)
        return jnp.einsum("te,tef->tf", odds, jnp.einsum("td,edf->tef", h, p["up"])), h @ p[
            "shared"
        ]

    return Case(fn, params, (normal(3, 6),), [(6, ["gain"], ["router", "shared", "up"])])


def skip_connection():
    """A site that reads the norm beside something else: only some of its channels have a scale."""
    params = {"gain": normal(4), "a": normal(4, 5), "both": normal(8, 5)}

    def fn(p, x):
        h = x * p["gain"][None]
        return jnp.concatenate([jnp.tanh(x), h], 1) @ p["both"] + h @ p["a"]

    return Case(fn, params, (normal(3, 4),), [(4, ["gain"], ["a", "both"])])


def tied_by_repetition():
    params = {"a": normal(6, 4), "b": normal(8, 5)}
    fn = lambda p, x: jnp.repeat(x @ p["a"], 2, axis=-1) @ p["b"]
    return Case(fn, params, (normal(3, 6),), [(4, ["a"], ["b"])])


def scalar_leaf():
    params = {"temperature": jnp.float32(1.5), "a": normal(6, 4)}
    return Case(
        lambda p, x: (x * p["temperature"]) @ p["a"],
        params,
        (normal(3, 6),),
        [(1, ["temperature"], ["a"])],
    )


def broadcast_bias():
    """A bias of one number a row stands beside channels: it ties them all."""
    params = {"a": normal(6, 4), "bias": normal(3, 1), "b": normal(4, 5)}
    fn = lambda p, x: (x @ p["a"] + p["bias"]) @ p["b"]
    return Case(fn, params, (normal(3, 6),), [(1, ["a", "bias"], ["b"])])


def channels_mixed_up():
    """Another site reads the channels in another order: lawful only with one scale for all."""
    params = {"gain": normal(4), "a": normal(4, 5), "b": normal(4, 5)}

    def fn(p, x):
        h = x * p["gain"][None]
        return h.T.reshape(3, 4) @ p["a"] + h @ p["b"]

    return Case(fn, params, (normal(3, 4),), [(1, ["gain"], ["a", "b"])])


def one_channel():
    params = {"a": normal(6, 1), "b": normal(1, 1), "c": normal(1, 5)}
    fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"] @ p["c"]
    return Case(fn, params, (normal(3, 6),), [(1, ["a"], ["b"]), (1, ["b"], ["c"])])


def named():
    """What training code leaves in a program: names for rematerialisation, stopped gradients."""
    params = {"a": normal(6, 8), "b": normal(8, 5)}

    def fn(p, x):
        return lax.stop_gradient(checkpoint_name(x @ p["a"], "hidden")) @ p["b"]

    return Case(fn, params, (normal(3, 6),), [(8, ["a"], ["b"])])


def permuting_reshape():
    params = {"a": normal(6, 4), "b": normal(4, 5)}

    def fn(p, x):
        flipped = lax.reshape(x @ p["a"], (4, 3), dimensions=(1, 0))
        return lax.reshape(flipped, (3, 4), dimensions=(1, 0)) @ p["b"]

    return Case(fn, params, (normal(3, 6),), [(4, ["a"], ["b"])])


LAWFUL = [
    perceptron,
    rms_norm,
    attention,
    dropout,
    batch_norm,
    llama,
    pytest.param(opt, marks=[pytest.mark.huggingface, pytest.mark.slow]),
    nnx_network,
    leaky_relu,
    wrapped,
    in_bfloat16,
    cast_inside,
    fused_gate_up,
    fused_qkv,
    experts,
    skip_connection,
    tied_by_repetition,
    scalar_leaf,
    broadcast_bias,
    channels_mixed_up,
    one_channel,
    named,
    permuting_reshape,
]
found = functools.cache(lambda build: (case := build(), graph_of(case.fn, case.params, *case.args)))


@pytest.mark.parametrize("build", LAWFUL)
def test_groups_are_those_written_by_hand(build):
    case, graph = found(build)
    got = {
        (g.size, tuple(sorted(g.absorbers)), tuple(sorted(path for path, _ in g.sites)))
        for g in graph.groups
    }
    assert got == {
        (size, tuple(sorted(absorb)), tuple(sorted(sites))) for size, absorb, sites in case.groups
    }
    assert not {path for path, _ in graph.refused} & {
        path for g in graph.groups for path, _ in g.sites
    }


@pytest.mark.parametrize(
    "build", slow_except(LAWFUL, attention, fused_qkv, in_bfloat16, channels_mixed_up)
)
def test_powers_of_two_change_no_bit_and_any_scale_only_rounding(build):
    """One compiled program folds and runs at s = 1, at powers of two and at any scales."""
    case, graph = found(build)
    run = jax.jit(
        lambda params, s, args: (folded := sq.fold(params, graph, s), case.fn(folded, *args))
    )
    rng = np.random.default_rng(0)
    draws = (
        np.ones,
        lambda n: 2.0 ** (rng.integers(1, 4, n) * rng.choice([-1, 1], n)),
        lambda n: rng.uniform(0.3, 3, n),
    )
    trees, results = [], []
    for draw in draws:
        s = {g.name: jnp.asarray(draw(g.size), jnp.float32) for g in graph.groups}
        folded, out = run(case.params, s, case.args)
        paths, leaves, _ = named_leaves(folded)
        trees.append(dict(zip(paths, leaves, strict=True)))
        results.append(jax.tree.leaves(out))
    before, *folds = trees
    for path in {path for g in graph.groups for path, _ in g.leaves}:
        for after in folds:
            assert not np.array_equal(before[path], after[path]), path
            assert before[path].shape == after[path].shape
            assert before[path].dtype == after[path].dtype
    coarse = build in (in_bfloat16, cast_inside)
    for expected, exact, rounded in zip(*results, strict=True):
        np.testing.assert_array_equal(expected, exact)
        a, b = np.asarray(expected, np.float64), np.asarray(rounded, np.float64)
        assert np.abs(a - b).max() <= (5e-2 if coarse else 1e-5) * np.abs(a).max()


def test_grouped_queries_share_their_head():
    """Query heads 0, 1, 2 read key/value head 0: channel d of each has the scale of v_proj's column d."""
    _, graph = found(llama)
    group = next(g for g in graph.groups if g.name.endswith("0/self_attn/o_proj/kernel"))
    site = dict(group.sites)[group.name].array.reshape(2, 3, 4)
    np.testing.assert_array_equal(site, np.broadcast_to(site[:, :1], site.shape))
    columns = dict(group.leaves)["model/layers/0/self_attn/v_proj/kernel"].array
    np.testing.assert_array_equal(-columns.reshape(2, 4), site[:, 0])
    assert len(set(columns.ravel())) == 8


def test_columns_of_a_fused_kernel_that_no_group_needs_stay():
    case, graph = found(fused_gate_up)
    group = next(g for g in graph.groups if g.name == "down")
    labels = dict(group.leaves)["gate_up"].array
    np.testing.assert_array_equal(labels, [[0] * 8 + [-i for i in range(1, 9)]])
    folded = sq.fold(case.params, graph, {"down": jnp.full(8, 4.0)})
    np.testing.assert_array_equal(
        folded["gate_up"], np.asarray(case.params["gate_up"]) / ([1] * 8 + [4] * 8)
    )


def test_a_site_that_is_only_partly_scaled():
    _, graph = found(skip_connection)
    (group,) = graph.groups
    assert dict(group.sites)["both"].array.tolist() == [0, 0, 0, 0, 1, 2, 3, 4]
    assert "tied" not in str(graph)
    assert "4 of 8 channels  a            b" in str(found(tied_by_repetition)[1])


@pytest.mark.parametrize("build", [perceptron, llama, attention])
def test_norm_groups_are_those_of_the_authors(build):
    _, graph = found(build)
    expected = {perceptron: 1, llama: 4, attention: 1}[build]
    chosen = graph.select("norm")
    assert len(chosen) == expected < len(graph.groups)
    assert all("norm" in path for g in chosen for path in g.absorbers)


def test_two_traces_give_one_graph():
    case, graph = found(fused_qkv)
    again = graph_of(case.fn, case.params, *case.args)
    assert again == graph
    assert hash(again) == hash(graph)


# Programs that must be refused -----------------------------------------------------------------------


class Unlawful(NamedTuple):
    """fn, its arguments, the refused site, what the reason says, and the labels that a careless search would give.

    `labels`: {leaf (or "input of <site>"): labels}; the rest follows by `carelessly`.
    """

    fn: Any
    params: Any
    args: tuple
    site: str
    reason: str
    labels: dict


CHANNELS = np.arange(1, 5)
ROWS, COLUMNS = CHANNELS[:, None], CHANNELS[None, :]
AB = {"a": normal(4, 4), "b": normal(4, 4, seed=1)}
NB = {"n": normal(4), "b": normal(4, 4)}
CONSTANT = np.asarray(normal(3, 4, seed=2))
X = normal(3, 4)
COLUMNS_THEN_ROWS = {"a": -COLUMNS, "b": ROWS}
GAIN_THEN_ROWS = {"n": -CHANNELS, "b": ROWS}
HERE = r".*test_folding\.py:\d+"


def unscaled_batch_norm(p, x):
    h = jax.nn.relu(x @ p["a"])
    return (h - h.mean(0, keepdims=True)) * lax.rsqrt(jnp.var(h, 0, keepdims=True) + 1e-5) @ p["b"]


def mixed_up(p, x):
    """u times its own channels in another order: each reader alone looks harmless."""
    u = x @ p["a"]
    return u * u.reshape(3, 2, 2).swapaxes(1, 2).reshape(3, 4) @ p["b"]


UNLAWFUL = {
    "square": Unlawful(
        lambda p, x: (x @ p["a"]) ** 2 @ p["b"],
        AB,
        (X,),
        "b",
        rf"`(square|integer_pow)` at {HERE}",
        COLUMNS_THEN_ROWS,
    ),
    "u * u": Unlawful(
        lambda p, x: (u := x @ p["a"]) * u @ p["b"],
        AB,
        (X,),
        "b",
        rf"`mul` at {HERE}",
        COLUMNS_THEN_ROWS,
    ),
    "u / u": Unlawful(
        lambda p, x: (u := x @ p["a"]) / u @ p["b"],
        AB,
        (X,),
        "b",
        rf"`div` at {HERE}",
        COLUMNS_THEN_ROWS,
    ),
    "1 / u": Unlawful(
        lambda p, x: 1 / (x @ p["a"]) @ p["b"],
        AB,
        (X,),
        "b",
        rf"1.*`div` at {HERE}",
        COLUMNS_THEN_ROWS,
    ),
    "u * reshape(u)": Unlawful(mixed_up, AB, (X,), "b", rf"`mul` at {HERE}", COLUMNS_THEN_ROWS),
    "a bound other than 0": Unlawful(
        lambda p, x: jnp.maximum(x @ p["a"], 1.0) @ p["b"],
        AB,
        (X,),
        "b",
        r"constant 1\.0",
        COLUMNS_THEN_ROWS,
    ),
    "a threshold other than 0": Unlawful(
        lambda p, x: jnp.where((u := x @ p["a"]) > 0.5, u, 0.0) @ p["b"],
        AB,
        (X,),
        "b",
        rf"`gt` at {HERE}.*compares it",
        COLUMNS_THEN_ROWS,
    ),
    "softmax": Unlawful(
        lambda p, x: jax.nn.softmax(x @ p["a"]) @ p["b"],
        AB,
        (X,),
        "b",
        r"`(exp|reduce_max)` at",
        COLUMNS_THEN_ROWS,
    ),
    "activation function": Unlawful(
        lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"],
        AB,
        (X,),
        "b",
        rf"`tanh` at {HERE}.*stands in",
        COLUMNS_THEN_ROWS,
    ),
    "residual reads the norm": Unlawful(
        lambda p, x: (h := x * p["n"][None]) @ p["b"] + h,
        NB,
        (X,),
        "b",
        "an output of fn",
        GAIN_THEN_ROWS,
    ),
    "fn returns the norm": Unlawful(
        lambda p, x: ((h := x * p["n"][None]) @ p["b"], h),
        NB,
        (X,),
        "b",
        "an output of fn",
        GAIN_THEN_ROWS,
    ),
    "fn returns the leaf": Unlawful(
        lambda p, x: ((x * p["n"][None]) @ p["b"], p["n"]),
        NB,
        (X,),
        "b",
        "an output of fn",
        GAIN_THEN_ROWS,
    ),
    "kernel used twice": Unlawful(
        lambda p, x: jax.nn.relu(x @ p["b"]) @ p["b"],
        {"b": AB["a"]},
        (X,),
        "b",
        "input 0 of fn",
        {"b": -COLUMNS},
    ),
    "kernel used twice, its rows": Unlawful(
        lambda p, x: jax.nn.relu((x * p["n"][None]) @ p["b"]) @ p["b"],
        {"n": NB["n"], "b": AB["a"]},
        (X,),
        "b",
        rf"`dot_general` at {HERE}",
        GAIN_THEN_ROWS,
    ),
    "slices of one leaf overlap": Unlawful(
        lambda p, x: (x * p["n"][None]) @ p["b"][:4] + x @ p["b"][2:],
        {"n": NB["n"], "b": normal(6, 4)},
        (X,),
        "b",
        rf"`dot_general` at {HERE}.*`slice` at {HERE}",
        {"n": -CHANNELS, "b": np.array([[1, 2, 3, 4, 0, 0]]).T},
    ),
    "batch statistics": Unlawful(
        unscaled_batch_norm, AB, (X,), "b", "`square` at|`mul` at", COLUMNS_THEN_ROWS
    ),
    "a constant is added": Unlawful(
        lambda p, x: (x * p["n"][None] + CONSTANT) @ p["b"],
        NB,
        (X,),
        "b",
        "a constant captured by fn",
        GAIN_THEN_ROWS,
    ),
    "ones are added": Unlawful(
        lambda p, x: (x * p["n"][None] + jnp.ones(4)[None]) @ p["b"],
        NB,
        (X,),
        "b",
        r"constant 1\.0",
        GAIN_THEN_ROWS,
    ),
    "a constant is the activation": Unlawful(
        lambda p, x: x + jnp.asarray(CONSTANT) @ p["b"],
        {"b": AB["b"]},
        (X,),
        "b",
        "a constant captured by fn",
        {"input of b": -COLUMNS, "b": ROWS},
    ),
    "the input is the activation": Unlawful(
        lambda p, x: x @ p["b"],
        {"b": AB["b"]},
        (X,),
        "b",
        "input 0 of fn",
        {"input of b": -COLUMNS, "b": ROWS},
    ),
    "integer input": Unlawful(
        lambda p, x: x.astype(jnp.float32) @ p["b"],
        {"b": AB["b"]},
        (jnp.arange(12).reshape(3, 4),),
        "b",
        rf"input 0 of fn.*`convert_element_type` at {HERE}",
        {"input of b": -COLUMNS, "b": ROWS},
    ),
    "integers in between": Unlawful(
        lambda p, x: (x * p["n"][None]).astype(jnp.int32).astype(jnp.float32) @ p["b"],
        NB,
        (X,),
        "b",
        rf"dtype int32.*`convert_element_type` at {HERE}",
        {"input of b": -COLUMNS, "b": ROWS},
    ),
    "float8 in between": Unlawful(
        lambda p, x: (x * p["n"][None]).astype(jnp.float8_e4m3fn).astype(jnp.float32) @ p["b"],
        NB,
        (X,),
        "b",
        "float8_e4m3fn",
        GAIN_THEN_ROWS,
    ),
    "channels are added up": Unlawful(
        lambda p, x: (h := x * p["n"][None]) @ p["b"] + h.sum(-1, keepdims=True),
        NB,
        (X,),
        "b",
        rf"`reduce_sum` at {HERE}.*adds up its channels",
        GAIN_THEN_ROWS,
    ),
}


def carelessly(program, labels):
    """Labels of every variable: forwards through anything, whoever else reads it, the first operand's label winning.

    This is what a search would give that asks of each reader alone whether it could cope.
    """
    named = {path: var for var, path in program.leaves.items()}
    named |= {f"input of {p.site.path}": p.activation for p in find_sites(program)[0]}
    carried = {named[name]: array for name, array in labels.items()}
    for equation in program.equations:
        operands = [v for v in equation.inputs if isinstance(v, Var) and v in carried]
        if not operands or equation.outputs[0] in carried:
            continue
        x, y = operands[0], equation.outputs[0]
        old, new = program.shape(x), program.shape(y)
        if equation.name in moves.MOVES:
            carried[y] = moves.MOVES[equation.name](carried[x], equation.params, old, new)
        elif equation.name == "dot_general":
            columns = carried.get(equation.inputs[1], np.zeros((2, 1)))
            if columns.shape[0] == 1:  # else they are a site's rows, where the scale ends
                carried[y] = columns
        elif len(old) == len(new) and program.is_float(y):
            carried[y] = carried[x]
        elif equation.name == "reduce_sum":
            carried[y] = (
                carried[x].squeeze(equation.params["axes"])
                if carried[x].shape[-1] == 1
                else np.array(0)
            )
    return {var: array for var, array in carried.items() if array.any()}


@pytest.mark.parametrize("name", UNLAWFUL)
def test_refused_with_a_reason(name):
    case = UNLAWFUL[name]
    graph = graph_of(case.fn, case.params, *case.args)
    grouped = {path for g in graph.groups for path, _ in g.sites}
    assert case.site not in grouped
    assert re.search(case.reason, dict(graph.refused)[case.site])


@pytest.mark.parametrize("name", UNLAWFUL)
def test_the_certificate_alone_refuses(name):
    case = UNLAWFUL[name]
    program = program_of(case.fn, case.params, *case.args)
    problem = certify(program, carelessly(program, case.labels))
    assert isinstance(problem, str)
    assert "`" in problem or "fn" in problem or "dtype" in problem


@pytest.mark.parametrize(
    ("fn", "params", "labels"),
    [
        (lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], AB, COLUMNS_THEN_ROWS),
        (lambda p, x: (x * p["n"][None]) @ p["b"], NB, GAIN_THEN_ROWS),
        (
            lambda p, x: 2.0 * (x * p["n"][None]).reshape(3, 4, 1).squeeze(2) @ p["b"],
            NB,
            GAIN_THEN_ROWS,
        ),
    ],
)
def test_the_certificate_passes_what_is_lawful(fn, params, labels):
    """So that the refusals above mean something; and one wrong label in the lawful ones is refused."""
    program = program_of(fn, params, X)
    carried = carelessly(program, labels)
    assert certify(program, carried) is None
    assert certify(program, {}) is None
    for var, array in carried.items():
        others = {v: a for v, a in carried.items() if v != var}
        assert certify(program, others), "a label forgotten"
        assert certify(program, {**others, var: -array}), "multiplied in place of divided"
        swapped = np.sign(array) * np.array([0, 2, 1, 3, 4])[np.abs(array)]
        assert certify(program, {**others, var: swapped}), "two channels swapped"
        assert "shape" in certify(program, {**others, var: np.resize(array, [7] * array.ndim)})
        assert "rank" in certify(program, {**others, var: array[None]})


def test_the_certificate_counts_no_label_twice():
    """u * u with every channel tied carries s^2; that is not the scale of channel 1 + 1."""
    program = program_of(lambda p, x: (u := x @ p["a"]) * u @ p["b"], AB, X)
    carried = carelessly(program, {"a": -(COLUMNS**0), "b": 2 * ROWS**0})
    (product,) = (e for e in program.equations if e.name == "mul")
    carried[product.outputs[0]] = np.array([[-2]])
    assert "`mul` at" in certify(program, carried)


def test_the_certificate_refuses_channels_that_a_site_reads_in_another_order():
    case = channels_mixed_up()
    program = program_of(case.fn, case.params, *case.args)
    assert "`dot_general`" in certify(
        program, carelessly(program, {"gain": -CHANNELS, "a": ROWS, "b": ROWS})
    )
    assert (
        certify(program, carelessly(program, {"gain": -(CHANNELS**0), "a": ROWS**0, "b": ROWS**0}))
        is None
    )


def test_one_array_at_two_places_is_refused():
    n, b = NB["n"], NB["b"]
    fn = lambda p, x: (x * p["n"][None]) @ p["b"] + x @ p["c"]
    assert len(graph_of(fn, {"n": n, "b": b, "c": b + 0}, X).groups) == 1
    graph = graph_of(fn, {"n": n, "b": b, "c": b}, X)
    assert not graph.groups
    assert "the array at b also stands at c" in dict(graph.refused)["b"]


def test_two_leaves_of_one_path_are_refused():
    """Or one's scale would go into the other."""
    params = {"n/g": NB["n"], "n": {"g": NB["n"] + 1}, "b": NB["b"]}
    with pytest.raises(ValueError, match=r"one path, \['n/g'\]"):
        graph_of(lambda p, x: (x * p["n"]["g"][None]) @ p["b"] + x * p["n/g"][None], params, X)


def test_a_tied_embedding_is_refused():
    model = Model(LLAMA.__class__(**{**vars(LLAMA), "tie_embeddings": True, "num_layers": 1}))
    params = jax.eval_shape(model.init, jax.random.key(0))
    graph = graph_of(model.apply, params, jnp.array([[1, 2]]))
    reason = dict(graph.refused)["model/embed_tokens/embedding"]
    assert re.search(
        r"`mul` at \S*llama.py.* multiplies two values of that scale", reason
    )  # the residual's norm
    assert len(graph.groups) == 4


# Odd programs: a Refused is no crash, and says why ------------------------------------------------------


ORDER = jnp.array([3, 0, 1, 1])


def loop(p, x):
    return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x * p["n"][None], p["w"])[0] @ p["b"]


ODD = {
    "scan": (loop, {**NB, "w": normal(2, 4, 4)}, r"`scan` at .*stands in the way"),
    "while": (
        lambda p, x: (
            lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1 + p["n"][None], x) @ p["b"]
        ),
        NB,
        r"`while` at .*stands in the way",
    ),
    "cond": (
        lambda p, x: lax.cond(x.sum() > 0, lambda y: y * p["n"][None], lambda y: y, x) @ p["b"],
        NB,
        r"`cond` at .*stands in the way",
    ),
    "convolution": (
        lambda p, x: (
            lax.conv((x * p["n"][None])[None, None], p["k"], (1, 1), "SAME")[0, 0] @ p["b"]
        ),
        {**NB, "k": normal(1, 1, 3, 3)},
        "`conv_general_dilated` at",
    ),
    "sort": (lambda p, x: jnp.sort(x * p["n"][None], -1) @ p["b"], NB, "`sort` at"),
    "gather of channels": (
        lambda p, x: (x * p["n"][None])[:, ORDER] @ p["b"],
        NB,
        "1 of 4 channels  n            b",
    ),
    "gather of channels, beside them": (
        lambda p, x: ((h := x * p["n"][None]) @ p["b"], h[:, ORDER].sum()),
        NB,
        "refused b: `gather` at .*does not take its channels whole",
    ),
    "gather of rows": (
        lambda p, x: (x * p["n"][None])[ORDER % 3] @ p["b"],
        NB,
        "       4  n            b",
    ),
    "scatter": (lambda p, x: (x * p["n"][None]).at[0].add(1.0) @ p["b"], NB, "`scatter-add` at"),
    "callback": (
        lambda p, x: (jax.debug.print("{}", p["n"][0]), (x * p["n"][None]) @ p["b"])[1],
        NB,
        "`debug_(print|callback)` at",
    ),
    "leaf with batch axes": (
        lambda p, x: jnp.einsum("bi,bij->bj", x, p["w"]),
        {"w": normal(3, 4, 5)},
        "(?s)1 sites.*refused w: its scale would reach input 0 of fn",
    ),
    "leaf with batch axes, and a gain": (
        lambda p, x: jnp.einsum("bi,bij->bj", x * p["n"], p["w"]),
        {"n": normal(3, 4), "w": normal(3, 4, 5)},
        r"(?s)1 sites\n.*\n      12  n            w",
    ),
    "integer leaf": (
        lambda p, x: x.astype(jnp.int32) @ p["i"],
        {"i": jnp.ones((4, 5), jnp.int32)},
        "refused i: `dot_general` at .*int32",
    ),
    "complex leaf": (
        lambda p, x: (x.astype(jnp.complex64) @ p["c"]).real,
        {"c": jnp.ones((4, 5), jnp.complex64)},
        "refused c: `dot_general` at .*complex64",
    ),
    "a slice of a leaf": (
        lambda p, x: (x * p["n"][None]) @ p["w"][:4],
        {"n": NB["n"], "w": normal(8, 4)},
        "refused w: `dot_general` at .*`slice` at",
    ),
    "a leaf reshaped": (
        lambda p, x: x @ p["w"].reshape(4, 4),
        {"w": normal(16)},
        "refused w: `dot_general` at .*`reshape` at",
    ),
    "two leaves added": (
        lambda p, x: x @ (p["w"] + p["a"] @ p["b"]),
        {"w": normal(4, 5), "a": normal(4, 2), "b": normal(2, 5)},
        "refused (a|b|w): `dot_general` at .*`add` at",
    ),
    "contracted along different axes": (
        lambda p, x: jnp.tanh(x @ p["b"]) @ p["b"].T,
        {"b": AB["b"]},
        "refused b: .*different axes; `dot_general` at .*second use",
    ),
    "zeros are the activation": (
        lambda p, x: jnp.tanh(jnp.zeros((3, 4)) @ p["h"] + x @ p["b"]),
        {"h": AB["a"], "b": AB["b"]},
        "refused h: it holds only zeros",
    ),
    "no channels": (
        lambda p, x: x[:, :0] * p["n"][None] @ p["b"],
        {"n": normal(0), "b": normal(0, 5)},
        "refused b: it has no channels",
    ),
    "no tokens": (
        lambda p, x: (
            (x[:0] * p["n"][None]).reshape(0).sum() + ((x[:0] * p["n"][None]) @ p["b"]).sum()
        ),
        NB,
        "1 sites",
    ),
    "a literal is split": (
        lambda p, x: (
            (x * p["n"][None]) @ p["b"]
            + jnp.concatenate(jnp.split(np.ones((3, 4), np.float32), 2, 1), 1)
        ),
        NB,
        "n            b",
    ),
    "no leaves at all": (lambda p, x: x, {}, "0 groups, 0 sites"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_programs(name):
    fn, params, expected = ODD[name]
    assert re.search(expected, str(graph_of(fn, params, X)))


def test_a_search_that_would_branch_for_ever_gives_up(monkeypatch):
    """Twenty free choices, then one that can not be met: without a budget, 2^20 tries."""
    params = {f"{n}{i}": normal(4, 4, seed=i) for i in range(20) for n in "ab"} | {
        "w": normal(4, 4)
    }

    def fn(p, x):
        y = jax.nn.relu(jnp.exp(x)) * jax.nn.relu(jnp.exp(-x))
        for i in range(20):
            y = (x @ p[f"a{i}"]) * (x @ p[f"b{i}"]) + y
        return y @ p["w"]

    def other_order(p, x):
        y = jnp.zeros_like(x)
        for i in range(20):
            y = y + (x @ p[f"a{i}"]) * (x @ p[f"b{i}"])
        return (jax.nn.relu(jnp.exp(x)) * jax.nn.relu(jnp.exp(-x)) + y) @ p["w"]

    monkeypatch.setattr(closure, "BUDGET", 2000)
    for f in (fn, other_order):
        reason = dict(graph_of(f, params, X).refused)["w"]
        assert "`exp` at" in reason or "gave up" in reason
        assert len(reason) < 2000


@pytest.mark.slow
def test_the_search_is_linear_in_the_layers(monkeypatch):
    """A 32-layer Llama of realistic widths, by shapes alone: its time, and how often labels are spread over a site."""
    spread, of_site = [], Stack.of_site
    monkeypatch.setattr(Stack, "of_site", lambda *args: spread.append(args) or of_site(*args))

    def cost(layers):
        config = LlamaConfig(32000, 4096, 14336, layers, 32, 8, 128)
        model = Model(config)
        params = jax.eval_shape(model.init, jax.random.key(0))
        program = program_of(model.apply, params, jnp.zeros((1, 16), jnp.int32))
        spread.clear()
        start = time.process_time()
        graph = find_graph(Survey.of(program, {}))
        assert len(graph.groups) == 4 * layers + 1
        assert not graph.refused
        return time.process_time() - start, len(spread)

    (short, few), (long, many) = cost(8), cost(32)
    assert long < 5
    assert long < 10 * short  # 4 if linear, 16 if quadratic; a noisy clock
    assert 0 < many < 5 * few


def while_loop(p, x):
    return lax.while_loop(
        lambda c: c[0] < 2, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["inner"])), (0, x @ p["b"])
    )[1]


def branches(p, x):
    return lax.cond(x.sum() > 0, lambda y: y @ p["inner"], lambda y: y, x @ p["b"])


def convolution(p, x):
    return lax.conv((x @ p["b"])[None, None], p["inner"][None, None], (1, 1), "SAME")[0, 0]


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (while_loop, rf"`while` at {HERE}.*\(while_loop\) reads it, and is not looked into"),
        (branches, rf"`cond` at {HERE}.*\(branches\) reads it, and is not looked into"),
        (convolution, rf"`conv_general_dilated` at {HERE}.*\(convolution\) is a convolution"),
    ],
)
def test_leaves_that_are_read_where_no_site_can_be_are_reported_with_the_line(fn, reason):
    params = {"b": AB["a"], "inner": AB["b"]}
    stats = sq.calibrate(fn, params, [X])
    assert [site.path for site in stats.graph.sites] == ["b"]
    assert re.search(reason, dict(stats.graph.refused)["inner"])
    with pytest.raises(ValueError, match=rf"(?s)no matmul.*inner: {reason}"):
        sq.calibrate(lambda p, x: fn({"b": AB["a"], **p}, x), {"inner": params["inner"]}, [X])
