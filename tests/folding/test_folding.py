"""Groups found in a program beside those written by hand, and that folding them changes nothing."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax_transformers import flax_transformers
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from slow import slow_but
from traced import graph_of, normal

import sqjax as sq
from sqjax._trees import named_leaves
from sqjax.models import LlamaConfig, Model


class Case(NamedTuple):
    """A function, its parameters and arguments, and its groups: (number of scales, absorbing
    leaves, sites).
    """

    fn: Any
    params: Any
    args: tuple
    groups: list


def jittered(params, seed=0):
    """Every leaf random: ones and zeros would hide what happens to gains and biases."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), params)


def linen_case(module, x, groups, **kwargs):
    init = jax.jit(lambda key, x: module.init(key, x, **kwargs)["params"])
    params = jittered(init(jax.random.key(0), x))
    return Case(lambda p, x: module.apply({"params": p}, x, **kwargs), params, (x,), groups)


# Programs and their groups ------------------------------------------------------------------------


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
    """Batch statistics that are taken *before* the gain do not see its scale, even if fn returns
    them.
    """
    module, x = BatchNormed(), normal(5, 6)
    variables = jax.jit(module.init)(jax.random.key(0), x)

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
    """Grouped queries: o_proj's 24 channels read v_proj's 8, so three query heads share one
    scale.
    """
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
    hf = flax_transformers()

    config = hf.OPTConfig(
        vocab_size=31,
        hidden_size=8,
        ffn_dim=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        word_embed_proj_dim=8,
        dropout=0.0,
    )
    model = hf.FlaxOPTForCausalLM(config)

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
    """One kernel, three slices, two heads of four channels; v's rows of a (out, in) kernel and its
    bias absorb.
    """
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
OPT = pytest.param(opt, marks=[pytest.mark.huggingface, pytest.mark.slow])
found = functools.cache(lambda build: (case := build(), graph_of(case.fn, case.params, *case.args)))


@pytest.mark.parametrize("build", [*slow_but(LAWFUL, attention, fused_qkv, batch_norm), OPT])
@pytest.mark.slow
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
    "build", [*slow_but(LAWFUL, attention, fused_qkv, in_bfloat16, channels_mixed_up), OPT]
)
@pytest.mark.slow
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


@pytest.mark.slow
def test_grouped_queries_share_their_head():
    """Query heads 0, 1, 2 read key/value head 0: channel d of each has the scale of v_proj's column
    d.
    """
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
@pytest.mark.slow
def test_norm_groups_are_those_of_the_authors(build):
    _, graph = found(build)
    expected = {perceptron: 1, llama: 4, attention: 1}[build]
    chosen = graph.select("norm")
    assert len(chosen) == expected < len(graph.groups)
    assert all("norm" in path for g in chosen for path in g.absorbers)


@pytest.mark.slow
def test_two_traces_give_one_graph():
    case, graph = found(fused_qkv)
    again = graph_of(case.fn, case.params, *case.args)
    assert again == graph
    assert hash(again) == hash(graph)
