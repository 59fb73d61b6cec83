"""What the graph says: its table, `explain`, groups stated by hand, scales between keys and
queries.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal

import sqjax as sq
from sqjax.models import LlamaConfig, Model


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


# The table and `explain` --------------------------------------------------------------------------


def gated(p, x):
    h = x * p["norm"][None]
    return jax.nn.silu(h @ p["gate"]) * (h @ p["up"]) @ p["down"]


PARAMS = {"norm": normal(4), "gate": normal(4, 6), "up": normal(4, 6, seed=1), "down": normal(6, 3)}


@pytest.fixture(scope="module")
def graph():
    return sq.calibrate(gated, PARAMS, [normal(5, 4)]).graph


@pytest.mark.slow
def test_the_table_has_a_row_for_every_group(graph):
    lines = str(graph).splitlines()
    assert lines[0] == "2 groups, 3 sites"
    assert [line.split() for line in lines[1:]] == [
        ["scales", "absorbed", "by", "sites"],
        ["4", "norm", "gate,", "up"],
        ["6", "up", "down"],
    ]


@pytest.mark.slow
def test_the_table_tells_tied_channels_steps_and_refusals():
    params = {"a": normal(3, 4, 2), "b": normal(3, 4, 4), "c": normal(4, 2)}

    def fn(p, x):
        step = lambda x, w: (jnp.tanh(jnp.repeat(x @ w[0], 2, axis=-1) @ w[1]), None)
        return jax.lax.scan(step, x, (p["a"], p["b"]))[0] @ p["c"]

    lines = str(sq.calibrate(fn, params, [normal(5, 4)]).graph).splitlines()
    assert lines[2].split() == ["3", "x", "2", "of", "4", "channels", "a", "b"]
    assert re.fullmatch(
        r"  refused c: `scan` at .*test_graph\.py:\d+.*stands in the way", lines[-2]
    )


@pytest.mark.slow
def test_explain_walks_from_the_activation_to_who_absorbs(graph):
    lines = graph.explain("down").splitlines()
    assert lines[:2] == ["down is a site of the group down: 6 scales, absorbed by", "  up"]
    ways = [re.match(r"    `(\w+)` at .*test_graph\.py:\d+", line) for line in lines]
    steps = [way.group(1) for way in ways if way]
    assert steps == ["mul", "dot_general"]
    both = graph.explain("up")
    assert "up is a site of the group gate" in both
    assert "up absorbs the scales of the group down" in both


def test_explain_walks_to_what_stands_in_the_way():
    fn = lambda p, x: jnp.tanh(x @ p["a"]).reshape(5, 2, 2).reshape(5, 4) @ p["b"]
    params = {"a": normal(4, 4), "b": normal(4, 3), "idle": normal(2)}
    graph = sq.calibrate(fn, params, [normal(5, 4)]).graph
    lines = graph.explain("b").splitlines()
    assert lines[0].startswith("b is in no group: `tanh` at")
    assert lines[1] == "  from its activation, through"
    assert [re.search(r"`(\w+)`", line).group(1) for line in lines[2:4]] == ["reshape", "reshape"]
    assert "smooth it too, do so at run time: a scheme with smoothing=0.5" in lines[4]
    assert (
        graph.explain("idle") == "idle: no matmul of an activation meets it, and no group needs it"
    )
    with pytest.raises(ValueError, match=r"'ilde' is no leaf.*Near misses: 'idle'"):
        graph.explain("ilde")


# Spaces -------------------------------------------------------------------------------------------

RESIDUAL = {
    "embed": normal(7, 4), "gain": jnp.ones(4), "up": normal(4, 5), "down": normal(5, 4),
    "head": normal(4, 3),
}  # fmt: skip


def residual(p, ids):
    x = p["embed"][ids]
    h = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True)) * p["gain"][None]
    x = x + jnp.tanh(h @ p["up"]) @ p["down"]
    # A short batch is read in another way.
    return (jnp.tanh(x) if len(ids) == 1 else x) @ p["head"]


TEXT = jnp.arange(3)


def test_spaces_are_printed_and_explained():
    graph = sq.calibrate(residual, RESIDUAL, [TEXT]).graph
    assert "  1 space that may turn: 1 with 4 channels in 4 leaves" in str(graph).splitlines()
    text = graph.explain("down")
    assert "down turns along its axis 1 in the space up: 4 channels, with 3 other leaves" in text
    assert re.search(r"the activation of down is in no space: `tanh` at .*test_graph\.py", text)
    assert "gain must be folded into what reads it before the space up turns" in graph.explain(
        "gain"
    )


def test_a_space_must_be_one_in_the_program_of_every_batch():
    graph = sq.calibrate(residual, RESIDUAL, [TEXT, TEXT[:1]]).graph
    assert graph.spaces == ()
    reasons = [reason for site, reason in graph.space_refusals if site == "head"]
    assert len(reasons) == 1
    assert "it does not turn in the program of batch 1: `tanh` at" in reasons[0]


# Groups stated by hand -----------------------------------------------------------------------------

PRODUCT = {"a": normal(4, 6), "b": normal(4, 6, seed=1), "c": normal(6, 3)}
BATCH = normal(5, 4)


def product(p, x):
    return ((x @ p["a"]) * (x @ p["b"])) @ p["c"]


@pytest.mark.slow
def test_a_stated_group_takes_the_place_of_the_one_found():
    found = sq.calibrate(product, PRODUCT, [BATCH])
    stated = sq.calibrate(product, PRODUCT, [BATCH], groups={"c": ["b"]})
    assert [g.absorbers for g in found.graph.groups] == [("a",)]
    assert [g.absorbers for g in stated.graph.groups] == [("b",)]
    smoothed = sq.smooth(PRODUCT, stated)
    assert not np.array_equal(smoothed["b"], PRODUCT["b"])
    assert_trees_all_equal(smoothed["a"], PRODUCT["a"])
    assert sq.verify(product, PRODUCT, smoothed, BATCH) < 1e-5


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"c": ["a", "b"]}, r"groups: c: \['b'\] absorb nothing of its scale; \('a',\) do"),
        (
            {"a": ["b"]},
            r"groups: a: \['b'\] can not absorb its scale: its scale would reach input 0 of fn",
        ),
        (
            {"c": []},
            r"groups: c: \[\] can not absorb its scale: .*a is not among the leaves that were said to absorb",
        ),
        ({"d": ["a"]}, r"groups: 'd' is no site; the sites are \['a', 'b', 'c'\]"),
    ],
)
def test_a_stated_group_that_does_not_hold_is_an_error(groups, message):
    with pytest.raises(ValueError, match=message):
        sq.calibrate(product, PRODUCT, [BATCH], groups=groups)


def test_a_stated_group_is_proved_too():
    """An unlawful one can not be forced: tanh stands between."""
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["c"]
    with pytest.raises(ValueError, match=r"groups: c: .*`tanh` at .*stands in the way"):
        sq.calibrate(fn, PRODUCT, [BATCH], groups={"c": ["a"]})


# Keys and queries ---------------------------------------------------------------------------------

LLAMA = Model(LlamaConfig(31, 12, 10, 1, 6, 2, 4))
IDS = jnp.array([[1, 5, 30, 2, 7, 8, 9, 11]])
BATCHES = [IDS, IDS[:, ::-1]]


@pytest.fixture(scope="module")
def llama():
    params = jax.jit(LLAMA.init)(jax.random.key(0))
    return params, sq.calibrate(LLAMA.apply, params, BATCHES, attention=True)


@pytest.mark.slow
def test_keys_are_looked_for_only_when_asked(llama):
    params, stats = llama
    plain = sq.calibrate(LLAMA.apply, params, BATCHES)
    assert not plain.graph.keys
    assert plain.graph.groups == tuple(g for g in stats.graph.groups if not g.keys)
    with pytest.raises(
        ValueError, match=r"attention was asked for.*calibrate\(\.\.\., attention=True\)"
    ):
        sq.smooth(params, plain, 0.5, attention=0.5)
    assert_trees_all_close(sq.smooth(params, stats, 0.5), sq.smooth(params, plain, 0.5), rtol=1e-6)


@pytest.mark.slow
def test_scales_between_keys_and_queries(llama):
    """Tied over rotary pairs (i, i + 2), one vector a key head, shared by its three query heads."""
    _, stats = llama
    names = [site.path for site in stats.graph.keys]
    assert names == ["model/layers/0/self_attn/k_proj/kernel (keys)"]
    groups = {g.name: g for g in stats.graph.groups if g.keys}
    for i, name in enumerate(names):
        layer = f"model/layers/{i}/self_attn"
        leaves = {path: labels.array for path, labels in groups[name].leaves}
        assert set(leaves) == {f"{layer}/k_proj/kernel", f"{layer}/q_proj/kernel"}
        np.testing.assert_array_equal(
            leaves[f"{layer}/k_proj/kernel"], -np.array([[1, 2, 1, 2, 3, 4, 3, 4]])
        )
        heads = np.array([[1, 2, 1, 2], [3, 4, 3, 4]])
        np.testing.assert_array_equal(
            leaves[f"{layer}/q_proj/kernel"], heads.repeat(3, 0).reshape(1, 24)
        )


def rotated_keys(params, ids, layer=0):
    """The first layer's keys after the rotary embedding, in numpy: (tokens, heads, head_dim)."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)["model"]
    x = p["embed_tokens"]["embedding"][np.asarray(ids[0])]
    block = p["layers"]["0"]
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * block["input_layernorm"]["weight"]
    keys = (normed @ block["self_attn"]["k_proj"]["kernel"]).reshape(len(x), 2, 4)
    angles = np.arange(len(x))[:, None, None] * 10000.0 ** -(np.arange(2) / 2)
    left, right = keys[..., :2], keys[..., 2:]
    turned = (
        left * np.cos(angles) - right * np.sin(angles),
        right * np.cos(angles) + left * np.sin(angles),
    )
    return np.concatenate(turned, -1)


def keys_absmax(params):
    """Over the tokens of all batches: (heads, head_dim)."""
    return np.concatenate([np.abs(rotated_keys(params, ids)) for ids in BATCHES]).max(0)


@pytest.mark.slow
def test_scales_are_the_keys_absmax_to_the_exponent(llama):
    params, stats = llama
    name = stats.graph.keys[0].path
    absmax = keys_absmax(params)
    np.testing.assert_allclose(stats.absmax[name], absmax, rtol=1e-4)
    pairs = np.maximum(absmax[:, :2], absmax[:, 2:]).ravel()
    np.testing.assert_allclose(
        sq.scales(params, stats, 0.5, attention=0.5)[name], pairs**0.5, rtol=1e-4
    )


@pytest.mark.slow
def test_smoothed_keys_are_the_same_function_with_flatter_keys(llama):
    params, stats = llama
    s = sq.scales(params, stats, 0.5, attention=1.0)
    folded = sq.fold(params, stats.graph, s)
    assert sq.verify(LLAMA.apply, params, folded, IDS) < 1e-5
    absmax = keys_absmax(folded)
    np.testing.assert_allclose(np.maximum(absmax[:, :2], absmax[:, 2:]), 1.0, rtol=1e-3)
    again = sq.calibrate(LLAMA.apply, folded, BATCHES, attention=True)
    assert_trees_all_close(again.absmax, sq.fold_stats(stats, s).absmax, rtol=2e-4)
    sq.quantize(
        folded, sq.fold_stats(stats, s), sq.W8A8_O3
    )  # the statistics describe these parameters


@pytest.mark.slow
def test_a_norm_on_the_keys_absorbs():
    """Qwen3's q and k norms: one gain for all heads, so all heads share one vector."""
    params = {
        "q": normal(6, 2, 4),
        "k": normal(6, 2, 4, seed=1),
        "qn": normal(4),
        "kn": normal(4, seed=1),
    }

    def fn(p, x):
        def normed(w, gain):
            y = jnp.einsum("td,dhk->thk", x, w)
            return y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6) * gain[None, None]

        scores = jnp.einsum("qhk,shk->hqs", normed(p["q"], p["qn"]), normed(p["k"], p["kn"]))
        return jax.nn.softmax(scores, -1)

    x = normal(5, 6)
    stats = sq.calibrate(fn, params, [x], attention=True)
    [group] = stats.graph.groups
    assert (group.name, group.size, group.absorbers) == ("kn (keys)", 4, ("kn",))
    assert set(dict(group.leaves)) == {"kn", "qn"}
    smoothed = sq.smooth(params, stats, attention=0.5)
    assert sq.verify(fn, params, smoothed, x) < 1e-5
    assert not np.array_equal(smoothed["qn"], params["qn"])


# Smoothing at run time ----------------------------------------------------------------------------


@pytest.mark.slow
def test_smoothing_at_run_time_where_no_leaf_absorbs():
    """(X / s)(s W) = X W with the division in the quantizer; the error falls as that of a folded
    group would.
    """
    x = normal(64, 16) * jnp.array([100.0] + [1.0] * 15)[None]
    params = {"w": normal(16, 8)}
    fn = lambda p, x: jnp.tanh(x) @ p["w"] + (x @ p["w2"])
    params = {"w": normal(16, 8), "w2": normal(16, 8, seed=1)}
    stats = sq.calibrate(fn, params, [x])
    assert not stats.graph.groups
    expected = fn(params, x)

    def error(scheme):
        got = jax.jit(sq.quantized(fn))(sq.quantize(params, stats, scheme), x)
        return float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))

    for scheme in (sq.W8A8_O1, sq.W8A8_O2, sq.W8A8_O3):
        assert error(scheme.replace(smoothing=0.5)) < 0.5 * error(scheme)


@pytest.mark.parametrize(
    "scheme", [pytest.param(sq.W8A8_O1, marks=pytest.mark.every_case), sq.W8A8_O3]
)
@pytest.mark.slow
@pytest.mark.every_case
def test_the_tied_head_is_smoothed_at_run_time(scheme):
    """The embedding is gathered and is the head: s W is stored, gathered rows are divided by s
    again.
    """
    model = Model(LlamaConfig(31, 12, 10, 1, 6, 2, 4, tie_embeddings=True))
    params = jax.jit(model.init)(jax.random.key(0))
    weight = params["model"]["norm"]["weight"]
    params["model"]["norm"]["weight"] = weight.at[3].set(60.0)
    head = "model/embed_tokens/embedding"
    expected = jax.jit(model.apply)(params, IDS)
    errors = []
    for runtime in (None, 0.5):
        qparams = sq.smoothquant(model.apply, params, [IDS], 0.5, scheme, runtime=runtime)
        leaf = qparams["model"]["embed_tokens"]["embedding"]
        assert (leaf.smoothing is None) == (runtime is None), head
        got = jax.jit(sq.quantized(model.apply))(qparams, IDS)
        errors.append(float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected)))
    assert errors[1] < errors[0]


@pytest.mark.slow
def test_run_time_smoothing_asks_for_statistics_of_these_parameters():
    stats = sq.calibrate(gated, PARAMS, [normal(5, 4)])
    smoothed = sq.smooth(PARAMS, stats, 0.5)
    with pytest.raises(
        ValueError, match=r"statistics are of other parameters.*smoothing at run time"
    ):
        sq.quantize(smoothed, stats, sq.W8A8.replace(smoothing=0.5))


# What a reviewer broke: statistics must stay those of the folded parameters -----------------------


def stacked_matmul(a, w):
    return jnp.einsum("lbx,lxy->lby", a, w)


def check_statistics(fn, params, batches, attention=False, groups=None):
    """Folds with the scales asked for; fn and a recalibration agree. Returns the graph."""
    with jax.numpy_rank_promotion("allow"):
        stats = sq.calibrate(fn, params, batches, attention=attention, groups=groups)
        s = sq.scales(params, stats, 0.5, attention=0.5 if attention else None)
        folded = sq.fold(params, stats.graph, s)
        for batch in batches:
            assert sq.verify(fn, params, folded, *batch) < 1e-5
        again = sq.calibrate(fn, folded, batches, attention=attention, groups=groups)
    assert_trees_all_close(sq.fold_stats(stats, s).absmax, again.absmax, rtol=1e-4)
    return stats.graph


@pytest.mark.slow
def test_an_offset_of_one_batch_only_is_refused():
    def fn(p, x):
        gain = 1 + p["g"] if x.shape[0] == 5 else p["g"]
        return jnp.tanh((x * gain) @ p["w"])

    graph = check_statistics(
        fn, {"g": normal(4), "w": normal(4, 6)}, [(normal(5, 4),), (normal(3, 4),)]
    )
    assert not graph.groups
    assert "does not fold in the program of batch 1" in dict(graph.refused)["w"]


@pytest.mark.slow
def test_a_stack_read_whole_with_a_scale_and_by_index_without_is_refused():
    def fn(p, x, y):
        u = stacked_matmul(jnp.tanh(x) * p["g"], p["V"])
        return jnp.tanh(stacked_matmul(u * p["k"], p["W"])), jnp.tanh(y @ p["V"][0])

    params = {
        "g": normal(2, 1, 1),
        "k": jnp.float32(0.7),
        "V": normal(2, 4, 4),
        "W": normal(2, 4, 4, seed=1),
    }
    x, y = normal(2, 5, 4), normal(5, 4)
    graph = check_statistics(fn, params, [(x, 0.001 * y), (x, 100 * y)])
    assert "multiplies another part of V" in dict(graph.refused)["W"]


@pytest.mark.slow
def test_a_scale_that_passes_a_shared_site_is_shared_by_all_steps():
    def fn(p, x):
        def step(c, q):
            u = stacked_matmul(jnp.tanh(c) * q["g"], p["V"][0])
            return c + jnp.tanh(stacked_matmul(u, q["W"])), None

        return jax.lax.scan(step, x, {"g": p["g"], "W": p["W"]})[0]

    params = {"g": normal(3, 2, 1, 1), "V": normal(1, 2, 4, 4), "W": normal(3, 2, 4, 4)}
    # Stated by hand, because the search would let V absorb the scale of W.
    graph = check_statistics(fn, params, [(normal(2, 5, 4),)], groups={"W": ["g"]})
    assert [(g.size, g.steps) for g in graph.groups] == [(2, ())]


@pytest.mark.slow
def test_keys_of_layers_in_one_stack_have_scales_of_their_own():
    def fn(p, x):
        for i in range(2):
            x = x + jax.nn.softmax((x @ p["wq"][i]) @ (x @ p["wk"][i]).T, -1) @ x
        return x

    params = {"wq": normal(2, 4, 4), "wk": normal(2, 4, 4, seed=1)}
    graph = check_statistics(fn, params, [(normal(5, 4),)], attention=True)
    assert [g.name for g in graph.groups if g.keys] == ["wk (keys)", "wk (keys, 2)"]


@pytest.mark.slow
def test_sites_that_the_keys_scale_passes_are_counted():
    def fn(p, x):
        k = x @ p["k"]
        mixed = jax.nn.softmax((x @ p["v"]) @ k.T, -1) @ k
        return jax.nn.softmax((x @ p["q"]) @ k.T, -1) @ x, mixed @ p["o"]

    params = {name: normal(4, 4, seed=i) for i, name in enumerate("kqvo")}
    graph = check_statistics(fn, params, [(normal(5, 4),)], attention=True)
    assert [path for path, _ in graph.groups[-1].sites] == ["k (keys)", "o"]
