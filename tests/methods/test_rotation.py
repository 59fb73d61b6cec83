"""`rotate`: beside QuaRot's construction in numpy, and as the same function of many programs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lawful_spaces import CASES
from tiny_llama import GROUPED, random_ids, random_params
from untyped import untyped

import sqjax as sq
from sqjax.folding.graph import Graph
from sqjax.folding.space import Along, Space
from sqjax.folding.turn import with_gains_of_one
from sqjax.models import Model, stack_layers, untie
from sqjax.numerics.orthogonal import (
    cayley,
    keeping_ones,
    random_hadamard,
    random_orthogonal,
)

UNTIED = replace(GROUPED, tie_embeddings=False)
HEADS, SHARED, HEAD = GROUPED.num_heads, GROUPED.num_kv_heads, GROUPED.head_dim
RESIDUAL = "model/layers/0/self_attn/q_proj/kernel"
VALUES = [f"model/layers/{i}/self_attn/o_proj/kernel" for i in range(GROUPED.num_layers)]


def rng(seed=0):
    return np.random.default_rng(seed)


# Matrices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 12, 48, 64])
@pytest.mark.parametrize("draw", [random_hadamard, random_orthogonal])
def test_matrices_are_orthogonal_and_drawn(draw, size):
    q = draw(size, rng())
    np.testing.assert_allclose(q @ q.T, np.eye(size), atol=1e-12)
    assert not np.allclose(q, draw(size, rng(1)))
    ones = keeping_ones(q)
    np.testing.assert_allclose(ones @ ones.T, np.eye(size + 1), atol=1e-12)
    np.testing.assert_allclose(ones.sum(0), 1, atol=1e-12)
    assert np.abs(ones - np.eye(size + 1)).max() > 0.1


def test_a_hadamard_matrix_spreads_a_channel_evenly():
    assert np.abs(random_hadamard(64, rng())).max() == pytest.approx(1 / 8)


def test_cayley_is_orthogonal_the_formula_and_differentiable():
    free = rng().normal(size=(5, 5))
    a = free - free.T
    expected = (np.eye(5) - a) @ np.linalg.inv(np.eye(5) + a)
    got = cayley(jnp.asarray(free, jnp.float32))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(got @ got.T, np.eye(5), atol=1e-5)
    slope = jax.grad(lambda f: cayley(f)[0, 1])(jnp.zeros((5, 5)))
    assert (float(slope[0, 1]), float(slope[1, 0])) == (-2.0, 2.0)


def test_those_that_keep_ones_may_be_learned():
    free = jnp.asarray(rng().normal(size=(4, 4)), jnp.float32)
    of_numpy, of_jax = keeping_ones(np.asarray(cayley(free))), keeping_ones(cayley(free))
    np.testing.assert_allclose(of_jax, of_numpy, atol=1e-6)
    slope = jax.jit(jax.grad(lambda f: keeping_ones(cayley(f))[0, 1]))(free)
    step = 1e-2 * slope
    ahead, behind = (keeping_ones(cayley(free + x))[0, 1] for x in (step, -step))
    assert float(ahead - behind) == pytest.approx(2e-2 * float(jnp.sum(slope**2)), rel=0.01)


@pytest.mark.parametrize("make", [cayley, keeping_ones])
def test_a_matrix_that_is_not_square_is_refused(make):
    with untyped(), pytest.raises(ValueError, match=r"expected a square matrix, got \(3, 4\)"):
        make(np.ones((3, 4)))


# Beside QuaRot ------------------------------------------------------------------------------------


def quarot(params, q, per_head):
    """Sections 4.1 and 4.2 of QuaRot (arXiv 2404.00456), in float64, by the names of a Llama.

    Norms' gains go into the kernels that read them; what reads the residual is multiplied by Q^T
    from the left, what writes it by Q from the right; values of each head by a matrix of the
    layer's own, which the output projection undoes.
    """
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    decoder = p["model"]
    decoder["embed_tokens"]["embedding"] = decoder["embed_tokens"]["embedding"] @ q
    for i, layer in decoder["layers"].items():
        attention, mlp = layer["self_attn"], layer["mlp"]
        of_queries = layer["input_layernorm"]["weight"][:, None]
        of_gates = layer["post_attention_layernorm"]["weight"][:, None]
        for part, names, gain in (
            (attention, ("q_proj", "k_proj", "v_proj"), of_queries),
            (mlp, ("gate_proj", "up_proj"), of_gates),
        ):
            for name in names:
                part[name]["kernel"] = q.T @ (gain * part[name]["kernel"])
        heads = per_head[int(i)]
        values, mixed = attention["v_proj"], attention["o_proj"]
        values["kernel"] = values["kernel"] @ np.kron(np.eye(SHARED), heads)
        mixed["kernel"] = np.kron(np.eye(HEADS), heads).T @ mixed["kernel"] @ q
        mlp["down_proj"]["kernel"] = mlp["down_proj"]["kernel"] @ q
        for norm in ("input_layernorm", "post_attention_layernorm"):
            layer[norm]["weight"] = np.ones_like(layer[norm]["weight"])
    gain = decoder["norm"]["weight"][:, None]
    p["lm_head"]["kernel"] = q.T @ (gain * p["lm_head"]["kernel"])
    decoder["norm"]["weight"] = np.ones_like(decoder["norm"]["weight"])
    return p


@pytest.fixture(scope="module")
def llama():
    model = Model(UNTIED)
    params, ids = random_params(model), random_ids(2, 8)
    return model, params, ids, sq.calibrate(model.apply, params, [ids])


def test_weights_are_those_of_quarot(llama):
    _, params, _, stats = llama
    matrices = sq.rotations(stats, seed=3)
    assert set(matrices) == {RESIDUAL, *VALUES}
    exact = {name: np.asarray(q, np.float64) for name, q in matrices.items()}
    expected = quarot(params, exact[RESIDUAL], [exact[name] for name in VALUES])
    got = sq.rotate(params, stats, seed=3)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg=str(path))


def test_drawn_matrices_are_given_ones_and_seeds_differ(llama):
    _, params, _, stats = llama
    drawn = sq.rotate(params, stats, "random", seed=5)
    given = sq.rotate(params, stats, sq.rotations(stats, "random", seed=5))
    jax.tree.map(np.testing.assert_array_equal, drawn, given)
    other = sq.rotations(stats, "random", seed=6)[RESIDUAL]
    assert not np.allclose(other, sq.rotations(stats, "random", seed=5)[RESIDUAL])


def test_some_spaces_alone(llama):
    model, params, ids, stats = llama
    assert set(sq.rotations(stats, spaces=["o_proj"])) == set(VALUES)
    rotated = sq.rotate(params, stats, spaces="o_proj")
    assert sq.verify(model.apply, params, rotated, ids) < 1e-5
    np.testing.assert_array_equal(rotated["lm_head"]["kernel"], params["lm_head"]["kernel"])


@pytest.mark.slow
def test_under_jit_and_its_gradient_by_the_matrix(llama):
    _, params, _, stats = llama
    size = stats.graph.spaces[0].size
    free = jnp.asarray(rng().normal(size=(size, size)) / 5, jnp.float32)

    @jax.jit
    def loss(free):
        rotated = sq.rotate(params, stats, {RESIDUAL: cayley(free)})
        kernel = rotated["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"]
        return jnp.sum(kernel**4)

    value, slope = jax.value_and_grad(loss)(free)
    eager = sq.rotate(params, stats, {RESIDUAL: cayley(free)})
    kernel = eager["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    assert float(value) == pytest.approx(float(jnp.sum(kernel**4)), rel=1e-5)
    step = 1e-3 * slope / jnp.linalg.norm(slope)
    change = float(loss(free + step) - loss(free - step))
    assert change == pytest.approx(2e-3 * float(jnp.linalg.norm(slope)), rel=0.05)


# The same function --------------------------------------------------------------------------------


#: Of a head that is the embedding the gain before it must be ones.
KEPT = {"opt": "g3"}
ROTATED = ("llama", "opt", "experts", "scan", "siamese", "linear", "in flax", "scored")
#: Whose spaces' kinds the others have too.
ALIKE = [pytest.param(name, marks=pytest.mark.every_case) for name in ("parallel", "fused")]


@pytest.mark.slow
@pytest.mark.each_case
@pytest.mark.parametrize("name", [*ROTATED, *ALIKE])
def test_programs_compute_the_same_whatever_their_gains(name):
    """Gains of other values than ones, negative ones among them."""
    case = CASES[name]
    draw = rng()

    def other(path, leaf):
        is_gain = str(path[-1].key).startswith("g") and leaf.ndim <= 2 and (leaf == 1).all()
        is_gain &= path[-1].key != KEPT.get(name)
        return jnp.asarray(draw.normal(size=leaf.shape), leaf.dtype) if is_gain else leaf

    params = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == float else x, case.params)
    inputs = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == float else x, case.inputs)
    params = jax.tree_util.tree_map_with_path(other, params)
    with jax.numpy_rank_promotion("allow"):
        stats = sq.calibrate(case.fn, params, [inputs])
        assert stats.graph.spaces
        rotated = sq.rotate(params, stats)
        assert sq.verify(case.fn, params, rotated, *inputs) < 1e-5
    assert not np.allclose(
        *(np.concatenate([x.ravel() for x in jax.tree.leaves(p)]) for p in (params, rotated))
    )


@pytest.mark.slow
def test_a_tied_head_is_refused_and_untied():
    model = Model(GROUPED)
    params, ids = random_params(model), random_ids(2, 8)
    stats = sq.calibrate(model.apply, params, [ids])
    with pytest.raises(ValueError, match=r"model/norm/weight .*no fold group .*models\.untie"):
        sq.rotate(params, stats)
    own, untied = untie(model, params)
    expected = jax.jit(model.apply)(params, ids)
    np.testing.assert_allclose(jax.jit(own.apply)(untied, ids), expected, atol=1e-5)
    stats = sq.calibrate(own.apply, untied, [ids])
    rotated = sq.rotate(untied, stats)
    assert sq.verify(own.apply, untied, rotated, ids) < 1e-5
    again, same = untie(own, untied)
    assert again is own
    assert same == untied


@pytest.mark.slow
def test_stacked_layers_turn_as_one(llama):
    model, params, ids, _ = llama
    stacked = stack_layers(params)
    stats = sq.calibrate(model.apply, stacked, [ids])
    rotated = sq.rotate(stacked, stats)
    assert sq.verify(model.apply, stacked, rotated, ids) < 1e-5
    kernel = rotated["model"]["layers"]["mlp"]["down_proj"]["kernel"]
    assert not np.allclose(kernel, stacked["model"]["layers"]["mlp"]["down_proj"]["kernel"])


class Block(nn.Module):
    norm: type = nn.LayerNorm

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(12, name="embed")(x)
        x = x + nn.Dense(12, name="down")(jnp.tanh(nn.Dense(7, name="up")(self.norm()(x))))
        return nn.Dense(5, name="head")(self.norm(name="last")(x))


class NNXBlock(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed, self.norm = nnx.Linear(8, 12, rngs=rngs), nnx.LayerNorm(12, rngs=rngs)
        self.head = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(self.embed(x)))


def of_linen(norm):
    module = Block(norm)
    return module.apply, module.init(jax.random.key(0), X)


def of_nnx(_):
    definition, state = nnx.split(NNXBlock())
    return lambda p, x: nnx.merge(definition, p)(x), state


X = rng(1).normal(size=(4, 8)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.each_case
@pytest.mark.parametrize(
    ("make", "norm"), [(of_linen, nn.LayerNorm), (of_linen, nn.RMSNorm), (of_nnx, nnx.LayerNorm)]
)
def test_what_norms_of_flax_read_turns(make, norm):
    """They multiply by the product of the gain and of one number for each token."""
    with jax.numpy_rank_promotion("allow"):
        fn, params = make(norm)
        draw = rng()

        def other(leaf):
            change = draw.normal(size=leaf.shape) if leaf.ndim == 1 else 0.0
            return leaf + jnp.asarray(change, leaf.dtype)

        params = jax.tree.map(other, params)
        stats = sq.calibrate(fn, params, [X])
        [space] = stats.graph.spaces
        assert space.size == 12
        assert space.keeps_ones == (norm is not nn.RMSNorm)
        assert sq.verify(fn, params, sq.rotate(params, stats), X) < 1e-5


# What it is for -----------------------------------------------------------------------------------


def block(p, x):
    h = x @ p["e"]
    normed = h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6) * p["gain"][None]
    return jnp.tanh(normed @ p["w"])


def outlier_params():
    draw = rng()
    e = draw.normal(size=(8, 32))
    e[:, 5] *= 100
    gain = draw.uniform(0.5, 1.5, 32) * np.where(np.arange(32) % 3, 1, -1)
    w = draw.normal(size=(32, 16))
    w[5] /= 100  # so that the other channels matter as much
    leaves = {"e": e, "gain": gain, "w": w}
    return {name: jnp.asarray(x, jnp.float32) for name, x in leaves.items()}


def test_an_outlier_is_spread():
    params, x = outlier_params(), jnp.asarray(rng(1).normal(size=(64, 8)), jnp.float32)
    stats = sq.calibrate(block, params, [x])
    rotated = sq.rotate(params, stats)
    np.testing.assert_array_equal(rotated["gain"], 1)
    after = sq.calibrate(block, rotated, [x])
    largest = [float(seen.absmax["w"].max()) for seen in (stats, after)]
    assert largest[1] < 0.6 * largest[0]


def test_gains_of_zero_and_of_one_plus_w():
    params = outlier_params()
    params["gain"] = params["gain"].at[3].set(0.0)
    x = jnp.asarray(rng(1).normal(size=(4, 8)), jnp.float32)
    stats = sq.calibrate(block, params, [x])
    assert sq.verify(block, params, sq.rotate(params, stats), x) < 1e-5

    def offset(p, x):
        return block({**p, "gain": 1 + p["gain"]}, x)

    stats = sq.calibrate(offset, params, [x])
    rotated = sq.rotate(params, stats)
    np.testing.assert_array_equal(rotated["gain"], 0)
    assert sq.verify(offset, params, rotated, x) < 1e-4  # 1 + w rounds w


def test_float64_keeps_its_digits():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        params = {name: jnp.asarray(x, jnp.float64) for name, x in outlier_params().items()}
        params = {name: x + 1e-9 for name, x in params.items()}  # no multiple of float32's
        x = jnp.asarray(rng(1).normal(size=(4, 8)))
        stats = sq.calibrate(block, params, [x])
        expected, got = block(params, x), block(sq.rotate(params, stats), x)
    np.testing.assert_allclose(got, expected, atol=1e-12)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_leaf_stays_on_its_devices(toy, kind):
    params, stats = toy
    mesh = jax.make_mesh((4,), ("x",), (kind,), devices=jax.devices()[:4])
    along = {"e": P("x"), "gain": P("x"), "w": P("x", None)}
    placed = {
        name: jax.device_put(leaf, NamedSharding(mesh, along[name]))
        for name, leaf in params.items()
    }
    rotated = sq.rotate(placed, stats)
    expected = sq.rotate(params, stats)
    for name, leaf in placed.items():
        assert rotated[name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim), name
        np.testing.assert_allclose(rotated[name], expected[name], atol=1e-4)


# Statistics ---------------------------------------------------------------------------------------


def opt_like(p, x):
    """A LayerNorm with a bias, and attention's values with two contracted axes in the kernel."""
    h = x @ p["e"]
    centred = h - jnp.mean(h, -1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5)
    normed = centred * scale * p["gain"][None] + p["bias"][None]
    v = jnp.einsum("tc,chd->thd", normed, p["v"])
    h = h + jnp.einsum("thd,hdc->tc", v, p["o"])
    return jnp.tanh(h @ p["head"])


def opt_params():
    draw = rng()
    shapes = dict(e=(8, 12), bias=(12,), v=(12, 3, 4), o=(3, 4, 12), head=(12, 3))
    leaves = {name: draw.normal(size=shape) for name, shape in shapes.items()}
    leaves["gain"] = draw.uniform(0.5, 1.5, 12) * np.where(np.arange(12) % 3, 1, -1)
    return {name: jnp.asarray(x, jnp.float32) for name, x in leaves.items()}


def of_layer_norms(_):
    return opt_like, opt_params(), jnp.asarray(rng(1).normal(size=(40, 8)), jnp.float32)


def of_llama(llama):
    model, params, ids, _ = llama
    return model.apply, params, ids


def known_of(sample):
    """The Gram matrix of all tokens, where the sample is as large as these are many."""
    return jnp.einsum("...nf,...ng->...fg", sample.rows, sample.rows, precision="highest")


@pytest.mark.slow
@pytest.mark.each_case
@pytest.mark.parametrize("of", [of_layer_norms, of_llama])
def test_statistics_are_those_of_the_rotated_parameters(llama, of):
    fn, params, x = of(llama)
    asked = dict(gram=True, sample=64, histogram=True)
    stats = sq.calibrate(fn, params, [x], **asked)
    matrices = sq.rotations(stats, "random")
    rotated = sq.rotate(params, stats, matrices)
    got = sq.rotate_stats(params, stats, matrices)
    expected = sq.calibrate(fn, rotated, [x], **asked)

    turning = {path for space in stats.graph.spaces for path in space.sites}
    assert turning
    others = {site.path for site in stats.graph.sites} - turning
    assert got.absmax.keys() == got.abs_sum.keys() == got.histogram.keys() == others
    for path, gram in expected.gram.items():
        size = float(jnp.abs(gram).max())
        np.testing.assert_allclose(got.gram[path], gram, atol=1e-5 * size, err_msg=path)
        np.testing.assert_allclose(known_of(got.sample[path]), gram, atol=1e-5 * size)
        if path in turning:
            assert float(jnp.abs(gram - stats.gram[path]).max()) > 0.1 * size
    for path in others:
        np.testing.assert_allclose(got.absmax[path], expected.absmax[path], rtol=1e-4)
    for name in ("weight_absmax", "leaf_sizes", "count", "reached"):
        for path, value in getattr(expected, name).items():
            np.testing.assert_array_equal(getattr(got, name)[path], value)


def test_what_rotated_statistics_know_and_what_they_do_not():
    params, x = outlier_params(), jnp.asarray(rng(1).normal(size=(64, 8)), jnp.float32)
    stats = sq.calibrate(block, params, [x], gram=True)
    matrices = sq.rotations(stats)
    rotated, known = sq.rotate(params, stats, matrices), sq.rotate_stats(params, stats, matrices)
    assert repr(known).splitlines()[-1].split() == ["?", "?", "?", "w"]
    scheme = {"w": sq.W4A16, ".*": None}
    codes = sq.gptq(rotated, known, scheme)["w"].tensor.values
    expected = sq.gptq(rotated, sq.calibrate(block, rotated, [x], gram=True), scheme)
    assert float(jnp.mean(codes == expected["w"].tensor.values)) > 0.99
    sq.quantize(rotated, known, sq.W8A8_O1)
    refused = "w: the range of its activation is needed, .* calibrate the rotated parameters"
    for asks in (
        lambda: sq.quantize(rotated, known, sq.W8A8_O3),
        lambda: sq.scales(rotated, known),
        lambda: sq.fold_stats(known, {}),
        lambda: sq.search_alpha(rotated, known, sq.W8A8_O1),
        lambda: sq.awq(rotated, known, sq.W4A16),
        lambda: sq.prepare_by_search(rotated, known, sq.W4A16),
        lambda: known.input_range("w"),
    ):
        with pytest.raises(ValueError, match=refused):
            asks()


def test_statistics_that_can_not_be_rotated(toy):
    params, stats = toy
    matrices = sq.rotations(stats)
    with pytest.raises(ValueError, match="takes the parameters that were calibrated, not the rot"):
        sq.rotate_stats(sq.rotate(params, stats, matrices), stats, matrices)
    [group] = [group for group in stats.graph.groups if group.name == "w"]
    folded = sq.fold_stats(stats, {"w": jnp.full(group.size, 2.0)})
    smoothed = sq.fold(params, stats.graph, {"w": jnp.full(group.size, 2.0)})
    with pytest.raises(ValueError, match="got s of w folded in; rotate first"):
        sq.rotate_stats(smoothed, folded, matrices)
    zero = {**params, "gain": params["gain"].at[3].set(0.0)}
    of_zero = sq.calibrate(block, zero, [jnp.ones((2, 8))])
    with pytest.raises(ValueError, match="w: a gain before it is 0 in some channels"):
        sq.rotate_stats(zero, of_zero, matrices)


# Refused ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy():
    params = outlier_params()
    return params, sq.calibrate(block, params, [jnp.ones((2, 8))])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("spun", "expected 'hadamard', 'random' or .* got 'spun'"),
        ({"e": np.eye(32)}, "no space is named 'e'"),
        ({"w": np.eye(31)}, r"w: expected floats of shape \(32, 32\), got .*\(31, 31\)"),
        ({"w": np.eye(32, dtype=int)}, "w: expected floats of shape"),
        ({"w": 2 * np.eye(32)}, "w: expected an orthogonal matrix, .* off by 3"),
        ({"w": np.full((32, 32), np.nan)}, "w: expected an orthogonal matrix"),
        ({"w": "hadamard"}, "w: expected floats of shape .* got 'hadamard', which is no array"),
        ({"w": [[1.0], [0.0, 1.0]]}, "w: expected floats of shape .* got list, which is no array"),
        ({0: np.eye(32)}, "no space is named 0"),
        (np.eye(32), "how: expected 'hadamard', 'random' or {space: matrix}"),
    ],
)
def test_wrong_matrices(toy, how, message):
    with untyped(), pytest.raises(ValueError, match=message):
        sq.rotate(*toy, how)


def test_a_pattern_of_sites_that_can_not_turn_is_told_why(llama):
    _, params, _, stats = llama
    with pytest.raises(ValueError, match=r"'down_proj' .* in no space, .* multiplied channel by"):
        sq.rotate(params, stats, spaces="down_proj")
    # Of a pattern that is found in others, too, only these turn.
    assert set(sq.rotations(stats, spaces="o_proj|down_proj")) == set(VALUES)


def test_wrong_arguments(toy):
    params, stats = toy
    with pytest.raises(ValueError, match="pattern of spaces"):
        sq.rotate(params, stats, spaces="nothing")
    with pytest.raises(ValueError, match="give only those wanted"):
        sq.rotate(params, stats, {}, spaces="w")
    with pytest.raises(ValueError, match="seed"):
        sq.rotate(params, stats, seed=-1)
    with pytest.raises(ValueError, match="not the tree that was calibrated"):
        sq.rotate({**params, "gain": jnp.ones(31)}, stats)
    with pytest.raises(ValueError, match=r"NaN|finite"):
        sq.rotate({**params, "w": params["w"].at[0, 0].set(jnp.nan)}, stats)


def test_a_layer_norm_takes_matrices_that_keep_its_mean():
    def fn(p, x):
        h = x @ p["e"]
        centred = h - jnp.mean(h, -1, keepdims=True)
        return (centred * jax.lax.rsqrt(jnp.var(h, -1, keepdims=True) + 1e-5)) @ p["w"]

    params = {name: x for name, x in outlier_params().items() if name != "gain"}
    x = jnp.asarray(rng(1).normal(size=(4, 8)), jnp.float32)
    stats = sq.calibrate(fn, params, [x])
    rotated = sq.rotate(params, stats)
    assert sq.verify(fn, params, rotated, x) < 1e-5
    with pytest.raises(ValueError, match="fix the vector of ones, 1 Q = 1; it is off by"):
        sq.rotate(params, stats, {"w": random_orthogonal(32, rng())})


def test_a_negative_gain_goes_through_no_relu():
    """Its group scales v before a ReLU, along the axis of v that does not turn."""

    def fn(p, x, z):
        h = x @ p["e"] + jax.nn.relu(z * p["gain"][None]) @ p["v"]
        normed = h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6) * p["gain"][None]
        return jnp.tanh(normed @ p["w"])

    params = {**outlier_params(), "v": jnp.asarray(rng(2).normal(size=(32, 32)), jnp.float32)}
    x, z = (jnp.asarray(rng(i).normal(size=(4, n)), jnp.float32) for i, n in ((1, 8), (3, 32)))
    stats = sq.calibrate(fn, params, [(x, z)])
    assert ("v", Along(1)) in stats.graph.spaces[0].leaves
    with pytest.raises(ValueError, match=r"gain is not known to be positive.*\['v'\] outside"):
        sq.rotate(params, stats)
    positive = {**params, "gain": jnp.abs(params["gain"])}
    assert sq.verify(fn, positive, sq.rotate(positive, stats), x, z) < 1e-5


def test_a_program_without_a_space_is_refused():
    params = {"w": jnp.ones((3, 2))}
    stats = sq.calibrate(lambda p, x: x @ p["w"], params, [jnp.ones((2, 3))])
    with pytest.raises(ValueError, match=r"no space that may turn\n  w: it would turn input 0"):
        sq.rotate(params, stats)


def test_a_gain_that_another_space_turns_is_refused():
    own = Space("a", 4, (("u", Along(1)), ("g", Along(0))))
    other = Space("b", 3, (("v", Along(1)),), ("g",))
    with pytest.raises(ValueError, match="g is a gain of the space b, and turns in the space a"):
        with_gains_of_one({"g": jnp.ones((4, 3))}, Graph((), (), (), ()), [own, other])


def test_a_bias_behind_a_gain_of_zero_can_not_be_divided():
    def fn(p, x):
        h = x @ p["e"]
        h = h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-5)
        return (h * p["gain"][None] + p["bias"][None]) @ p["w"]

    params = {**outlier_params(), "bias": jnp.ones(32)}
    x = jnp.asarray(rng(1).normal(size=(4, 8)), jnp.float32)
    stats = sq.calibrate(fn, params, [x])
    assert sq.verify(fn, params, sq.rotate(params, stats), x) < 1e-5
    params["gain"] = params["gain"].at[3].set(0.0)
    with pytest.raises(ValueError, match=r"gain is 0 at channel 3, and \['bias'\]"):
        sq.rotate(params, stats)


def test_a_negative_gain_that_is_also_used_outside_the_space_is_refused():
    def fn(p, x):
        outside = jax.nn.relu((x @ p["v"]) * p["gain"][None]) @ p["u"]
        return block(p, x) + outside

    params = outlier_params()
    params |= {"v": params["e"] + 1, "u": params["w"] + 1}
    x = jnp.asarray(rng(1).normal(size=(4, 8)), jnp.float32)
    stats = sq.calibrate(fn, params, [x])
    with pytest.raises(ValueError, match=r"gain is not known to be positive .*'u'\] outside"):
        sq.rotate(params, stats)
    params["gain"] = jnp.abs(params["gain"])
    assert sq.verify(fn, params, sq.rotate(params, stats), x) < 1e-4
