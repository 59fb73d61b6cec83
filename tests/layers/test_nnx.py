"""NNX modules as functions and back again; `QuantLinear`: nnx.Linear on int8, within the error that theory allows."""

import functools
import itertools

import chex
import int8_in_numpy as numpy_int8
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import optax
import pytest
from flax import nnx
from slow import slow_but

import sqjax as sq
from sqjax._trees import named_leaves
from sqjax.nnx import QuantLinear, QuantModule, QuantParam, functional, rebuild
from sqjax.numerics.smoothing import smoothing_scales
from sqjax.weights.quant_weight import QuantWeight

SCHEMES = {
    "O1": sq.W8A8_O1,
    "O2": sq.W8A8_O2,
    "O3": sq.W8A8_O3,
    "per_tensor": sq.Scheme(weight=sq.Int8(per_tensor=True)),
}
NAMES = {sq.PerToken: "per_token", sq.PerTensor: "per_tensor", sq.Static: "static"}


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


def jittered(module, seed=0):
    """The module with every float value random: ones and zeros would hide what happens to gains and biases."""
    rng = np.random.default_rng(seed)
    graphdef, state, rest = nnx.split(module, (nnx.Param, nnx.BatchStat), ...)
    moved = jax.tree.map(
        lambda x: x + jnp.asarray(0.3 * np.abs(rng.normal(size=x.shape)), x.dtype), state
    )
    return nnx.merge(graphdef, moved, rest)


def distance(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


class Perceptron(nnx.Module):
    """A norm, a List of layers and a Dict of heads, one of them used."""

    def __init__(self, rngs, sizes=(6, 8, 8, 8)):
        self.norm = nnx.LayerNorm(sizes[0], rngs=rngs)
        self.layers = nnx.List([nnx.Linear(m, n, rngs=rngs) for m, n in itertools.pairwise(sizes)])
        self.heads = nnx.Dict(main=nnx.Linear(sizes[-1], 5, rngs=rngs))

    def __call__(self, x):
        x = self.norm(x)
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.heads["main"](x)

    def embed(self, x):
        return self.layers[0](self.norm(x))


class Tied(nnx.Module):
    """One Param at two places: the second layer's kernel is the first's."""

    def __init__(self, rngs):
        self.first = nnx.Linear(6, 6, rngs=rngs)
        self.second = nnx.Linear(6, 6, rngs=rngs)
        self.second.kernel = self.first.kernel

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


class Stateful(nnx.Module):
    """Batch statistics and dropout, the layers between called in the way that `wrap` says."""

    def __init__(self, rngs, wrap=None):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(8, 5, rngs=rngs)
        self.wrap = wrap

    def __call__(self, x):
        def inside(module, x):
            return module.dropout(nnx.relu(module.norm(module.first(x))))

        return self.second((self.wrap(inside) if self.wrap else inside)(self, x))


class Transformer(nnx.Module):
    """A pre-norm block of nnx.MultiHeadAttention and an MLP."""

    def __init__(self, rngs, width=8):
        self.norm1 = nnx.RMSNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 16, rngs=rngs)
        self.down = nnx.Linear(16, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.relu(self.up(self.norm2(x))))


# A module as a function -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_tree_holds_the_params_under_plain_paths():
    module = jittered(Perceptron(nnx.Rngs(0)))
    fn, params = functional(module)
    paths, leaves, _ = named_leaves(params)
    layers = [f"layers/{i}/{name}" for i in range(3) for name in ("bias", "kernel")]
    assert list(paths) == [
        "heads/main/bias",
        "heads/main/kernel",
        *layers,
        "norm/bias",
        "norm/scale",
    ]
    assert all(type(leaf) is type(jnp.ones(1)) for leaf in leaves)
    assert params["layers"][1]["kernel"] is module.layers[1].kernel.get_value()
    x = normal(3, 6)
    chex.assert_trees_all_equal(fn(params, x), module(x))
    doubled = jax.tree.map(lambda x: 2 * x, params)
    assert distance(fn(doubled, x), module(x)) > 1
    chex.assert_trees_all_equal(functional(module)[1], params)  # the module was not touched


@pytest.mark.slow
def test_a_tree_whose_numbers_have_become_strings_is_the_same_tree():
    fn, params = functional(jittered(Perceptron(nnx.Rngs(0))))
    x = normal(3, 6)
    renamed = {**params, "layers": {str(i): layer for i, layer in params["layers"].items()}}
    chex.assert_trees_all_equal(fn(renamed, x), fn(params, x))


@pytest.mark.slow
def test_float_parameters_go_back_into_the_original_class():
    module, x = jittered(Perceptron(nnx.Rngs(0))), normal(3, 6)
    fn, params = functional(module)
    changed = jax.tree.map(lambda x: 1.5 * x, params)
    back = rebuild(fn, changed)
    assert type(back) is Perceptron
    assert type(back.layers) is nnx.List
    chex.assert_trees_all_equal(functional(back)[1], changed)
    chex.assert_trees_all_equal(back(x), fn(changed, x))
    assert distance(back(x), module(x)) > 0.5
    back.norm.scale[...] = jnp.zeros(6)  # a module of its own
    chex.assert_trees_all_equal(module(x), fn(params, x))


@pytest.mark.slow
def test_a_shared_param_stands_in_the_tree_once_and_is_shared_again():
    module, x = jittered(Tied(nnx.Rngs(0))), normal(3, 6)
    fn, params = functional(module)
    assert named_leaves(params)[0] == ("first/bias", "first/kernel", "second/bias")
    chex.assert_trees_all_equal(fn(params, x), module(x))
    back = rebuild(fn, params)
    assert back.second.kernel is back.first.kernel
    params["first"]["kernel"] = -params["first"]["kernel"]
    w, b, c = (
        np.asarray(params[n][m])
        for n, m in (("first", "kernel"), ("first", "bias"), ("second", "bias"))
    )
    expected = np.maximum(np.asarray(x) @ w + b, 0) @ w + c
    chex.assert_trees_all_close(fn(params, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_another_method_can_be_the_function():
    module, x = jittered(Perceptron(nnx.Rngs(0))), normal(3, 6)
    fn, params = functional(module, method="embed")
    chex.assert_trees_all_equal(fn(params, x), module.embed(x))
    assert fn != functional(module)[0]


@pytest.mark.slow
def test_constants_are_those_of_the_day():
    module, x = jittered(Stateful(nnx.Rngs(0))), normal(4, 6)
    module.eval()
    fn, params = functional(module)
    expected = module(x)
    chex.assert_trees_all_equal(fn(params, x), expected)
    module.norm.mean[...] = module.norm.mean[...] + 1
    assert distance(module(x), expected) > 1e-2
    chex.assert_trees_all_equal(fn(params, x), expected)


WRAPS = {"plain": None, "jit": nnx.jit, "remat": nnx.remat}


@pytest.mark.parametrize("wrap", slow_but(WRAPS, "jit"))
@pytest.mark.slow
def test_batch_statistics_and_dropout_run_in_eval_mode_and_are_refused_in_training(wrap):
    module, x = jittered(Stateful(nnx.Rngs(0), wrap)), normal(4, 6)
    module.eval()
    fn, params = functional(module)
    assert not {"norm/mean", "norm/var"} & set(named_leaves(params)[0])
    w, b = (np.asarray(v[...]) for v in (module.first.kernel, module.first.bias))
    mean, var, scale, bias = (
        np.asarray(getattr(module.norm, n)[...]) for n in ("mean", "var", "scale", "bias")
    )
    hidden = np.maximum((np.asarray(x) @ w + b - mean) / np.sqrt(var + 1e-5) * scale + bias, 0)
    expected = hidden @ np.asarray(module.second.kernel[...]) + np.asarray(module.second.bias[...])
    chex.assert_trees_all_close(fn(params, x), expected, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(jax.jit(fn)(params, x), expected, rtol=1e-4, atol=1e-5)
    module.train()
    with pytest.raises(
        ValueError, match=r"^dropout/rngs/count: the call changes .* \(3 in all\).*module\.eval\(\)"
    ):
        functional(module)[0](params, x)
    module.dropout.eval()
    with pytest.raises(ValueError, match=r"^norm/mean: the call changes"):
        jax.jit(functional(module)[0])(params, x)


@pytest.mark.slow
def test_changes_are_dropped_on_request_and_every_call_starts_afresh():
    module, x = jittered(Stateful(nnx.Rngs(0))), normal(4, 6)
    fn, params = functional(module, discard=True)
    first = fn(params, x)
    chex.assert_trees_all_equal(fn(params, x), first)
    chex.assert_trees_all_close(jax.jit(fn)(params, x), first, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(module(x), first)  # the module itself still moves on
    assert distance(module(x), first) > 1e-2


@pytest.mark.slow
def test_a_key_value_cache_is_refused():
    attention = nnx.MultiHeadAttention(2, 8, decode=True, rngs=nnx.Rngs(0))
    attention.init_cache((1, 4, 8))
    fn, params = functional(attention)
    with pytest.raises(
        ValueError, match=r"^cache\w+: the call changes this variable \(3 in all\).*cache off"
    ):
        fn(params, normal(1, 1, 8))


class Lazy(nnx.Module):
    """Makes a variable when it is called."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        self.last = nnx.Cache(x)
        return self.linear(x)


def test_a_variable_that_the_call_makes_is_refused():
    fn, params = functional(Lazy(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"^last: the call changes this variable \(1 in all\)"):
        fn(params, normal(2, 3))


class Sowing(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        self.sow(nnx.Intermediate, "seen", x)
        return self.linear(x)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_what_the_module_sows_is_dropped():
    module, x = Sowing(nnx.Rngs(0)), normal(2, 3)
    fn, params = functional(module)
    chex.assert_trees_all_equal(fn(params, x), module.linear(x))
    module(x)
    assert set(nnx.state(module)) == {"linear", "seen"}  # called by itself, it does keep it


class Odd(nnx.Module):
    def __init__(self):
        self.pair = nnx.Param({"a": jnp.ones(2)})


def test_errors_say_what_is_wrong():
    fn, params = functional(Perceptron(nnx.Rngs(0)))
    x = normal(3, 6)
    with pytest.raises(ValueError, match=r"missing \['norm/bias', 'norm/scale'\], unknown \[\]"):
        fn({name: x for name, x in params.items() if name != "norm"}, x)
    with pytest.raises(
        ValueError,
        match=r"missing \[\], unknown \['more'\]; pass the tree that sqjax.nnx.functional",
    ):
        rebuild(fn, {**params, "more": x})
    with pytest.raises(
        ValueError, match=r"expected the fn that sqjax.nnx.functional returned, got function"
    ):
        rebuild(lambda params, x: x, params)
    with pytest.raises(ValueError, match=r"^pair: expected a Param of one array, got one of dict"):
        functional(Odd())


# Equality and caches ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_functions_of_one_structure_are_one_function():
    a, b = (functional(Perceptron(nnx.Rngs(seed))) for seed in (0, 1))
    assert a[0] == b[0]
    assert hash(a[0]) == hash(b[0])
    assert sq.quantized(a[0]) is sq.quantized(b[0])
    assert a[0] != functional(Perceptron(nnx.Rngs(0), (6, 8, 9)))[0]
    traced = []

    def counted(fn, params, x):
        traced.append(fn)
        return fn(params, x)

    run, x = jax.jit(counted, static_argnums=0), normal(3, 6)
    outputs = [run(fn, params, x) for fn, params in (a, b, a)]
    assert len(traced) == 1
    assert distance(outputs[0], outputs[1]) > 0.1
    chex.assert_trees_all_equal(outputs[0], outputs[2])


def test_functions_with_other_constants_are_other_functions():
    module = jittered(Stateful(nnx.Rngs(0)))
    module.eval()
    fn = functional(module)[0]
    copy = nnx.clone(module)
    copy.norm.mean[...] = jnp.array(
        np.asarray(module.norm.mean[...])
    )  # the same bits in another array
    assert copy.norm.mean.get_value() is not module.norm.mean.get_value()
    assert functional(copy)[0] == fn
    assert hash(functional(copy)[0]) == hash(fn)
    assert jax.jit(lambda x: x if functional(copy)[0] == fn else -x)(jnp.float32(1)) == 1
    copy.norm.mean[...] = copy.norm.mean[...] + 1
    assert functional(copy)[0] != fn
    assert functional(jittered(Stateful(nnx.Rngs(1))))[0] != fn  # another key


@pytest.mark.slow
def test_a_quantized_function_does_not_trace_twice():
    calls = []

    class Counted(Perceptron):
        def __call__(self, x):
            calls.append(x)
            return super().__call__(x)

    def run():
        fn, params = functional(Counted(nnx.Rngs(0)))
        return jax.jit(sq.quantized(fn)), params, fn

    compiled, params, fn = run()
    x = normal(3, 6)
    stats = sq.calibrate(fn, params, [x])
    qparams, smoothed = sq.quantize(params, stats), sq.quantize(sq.smooth(params, stats), stats)
    calls.clear()
    compiled(qparams, x)
    assert len(calls) == 1
    compiled(smoothed, x + 1)
    run()[0](qparams, x)  # another function of another module of the same class, wrapped again
    assert len(calls) == 1


# Smoothing and quantization ---------------------------------------------------------------------------------------


def groups_of(stats):
    found = [
        (g.size, sorted(g.absorbers), sorted(path for path, _ in g.sites))
        for g in stats.graph.groups
    ]
    return sorted(found, key=lambda group: group[2])


MLP = [
    (8, ["layers/2/bias", "layers/2/kernel"], ["heads/main/kernel"]),
    (6, ["norm/bias", "norm/scale"], ["layers/0/kernel"]),
    (8, ["layers/0/bias", "layers/0/kernel"], ["layers/1/kernel"]),
    (8, ["layers/1/bias", "layers/1/kernel"], ["layers/2/kernel"]),
]
QKV = ["attention/key/kernel", "attention/query/kernel", "attention/value/kernel"]
BLOCK = [
    (8, ["norm1/scale"], QKV),
    (8, ["attention/value/bias", "attention/value/kernel"], ["attention/out/kernel"]),
    (16, ["up/bias", "up/kernel"], ["down/kernel"]),
    (8, ["norm2/bias", "norm2/scale"], ["up/kernel"]),
]


CALIBRATED = {
    "mlp": (Perceptron, "norm", (16, 6), MLP),
    "transformer": (Transformer, "norm1", (2, 7, 8), BLOCK),
}


@pytest.mark.parametrize(("make", "gain", "shape", "groups"), slow_but(CALIBRATED))
@pytest.mark.slow
def test_calibrate_smooth_quantize_jit(make, gain, shape, groups):
    module, x = jittered(make(nnx.Rngs(0))), normal(*shape)
    scale = getattr(module, gain).scale
    scale[...] = scale[...].at[2].set(100.0)  # an outlier channel
    fn, params = functional(module)
    stats = sq.calibrate(fn, params, [x])
    assert groups_of(stats) == groups
    assert stats.graph.refused == ()

    smoothed = sq.smooth(params, stats, 0.5)
    run, errors = nnx.jit(lambda module, x: module(x)), {}
    expected, back = run(module, x), rebuild(fn, smoothed)
    assert type(back) is make
    assert distance(smoothed[gain]["scale"], params[gain]["scale"]) > 0.1
    chex.assert_trees_all_close(run(back, x), expected, rtol=1e-3, atol=1e-4)

    for name, tree in {"rough": params, "smooth": smoothed}.items():
        quantized = rebuild(fn, sq.quantize(tree, stats, sq.W8A8_O2))
        assert type(quantized) is QuantModule
        errors[name] = distance(run(quantized, x), expected)
        program = jaxprs.of(lambda module, x: module(x), quantized, x)
        dots = [dot.dtypes for dot in jaxprs.dots(program)]
        assert dots.count(jaxprs.INT8_DOT) == len(stats.graph.sites)
        assert len(dots) - len(stats.graph.sites) == (
            2 if make is Transformer else 0
        )  # q . k and p . v stay float
    assert 1e-4 < errors["smooth"] < errors["rough"] / 1.5


@functools.cache
def quantized_tree(scheme):
    fn, params = functional(jittered(Perceptron(nnx.Rngs(0))))
    return sq.smoothquant(fn, params, [normal(16, 6)], 0.5, scheme)


def quantized_module(scheme=sq.W8A8):
    """A module, its function, the quantized tree, the module of that, and an input; new ones at every call."""
    module, x = jittered(Perceptron(nnx.Rngs(0))), normal(16, 6)
    fn, _ = functional(module)
    qparams = jax.tree.map(lambda leaf: leaf, quantized_tree(scheme))
    return module, fn, qparams, rebuild(fn, qparams), x


@pytest.mark.parametrize("scheme", slow_but(SCHEMES))
def test_a_quant_module_is_the_quantized_function_under_both_jits(scheme):
    module, fn, qparams, quantized, x = quantized_module(scheme)
    expected = sq.quantized(fn)(qparams, x)
    chex.assert_trees_all_equal(quantized(x), expected)
    for jit in (jax.jit, nnx.jit):
        chex.assert_trees_all_close(
            jit(lambda module, x: module(x))(quantized, x), expected, rtol=1e-4, atol=1e-4
        )
    assert 1e-3 < distance(expected, module(x)) < 0.1


@pytest.mark.slow
def test_a_quant_module_shows_its_parameters():
    _, fn, qparams, quantized, x = quantized_module()
    graphdef, floats, ints = nnx.split(quantized, nnx.Param, QuantParam)
    names = {
        "/".join(map(str, path)): v.get_value()
        for path, v in nnx.to_flat_state(nnx.state(quantized))
    }
    paths, leaves, _ = named_leaves(qparams, is_leaf=lambda x: isinstance(x, QuantWeight))
    chex.assert_trees_all_equal(
        names, {f"params/{path}": leaf for path, leaf in zip(paths, leaves, strict=True)}
    )
    assert {path[-1] for path, _ in nnx.to_flat_state(ints)} == {"kernel"}
    assert {path[-1] for path, _ in nnx.to_flat_state(floats)} == {"bias", "scale"}
    zeroed = nnx.merge(graphdef, jax.tree.map(jnp.zeros_like, floats), ints)
    expected = sq.quantized(fn)(jax.tree.map(lambda x: x if x.ndim == 2 else 0 * x, qparams), x)
    chex.assert_trees_all_equal(zeroed(x), expected)
    assert distance(expected, quantized(x)) > 0.1
    assert "QuantModule" in repr(quantized)


@pytest.mark.slow
def test_nnx_grad_of_a_quant_module_reaches_the_float_parameters():
    module, _, _, quantized, x = quantized_module()
    target = normal(16, 5, seed=9)

    def loss(module):
        return jnp.sum(module(x) * target)

    grads, expected = nnx.grad(loss)(quantized)["params"], nnx.grad(loss)(module)
    chex.assert_trees_all_close(grads["heads"]["main"]["bias"][...], target.sum(0), rtol=1e-5)
    assert set(grads["layers"][0]) == {"bias"}
    assert (
        distance(grads["layers"][2]["bias"][...], 0 * expected["layers"][2]["bias"][...] + 1) > 0.01
    )


@pytest.mark.slow
def test_a_quant_module_is_a_module_for_functional_too():
    _, _, qparams, quantized, x = quantized_module()
    fn, params = functional(quantized)
    chex.assert_trees_all_equal(params["params"], qparams)
    chex.assert_trees_all_equal(jax.jit(fn)(params, x), jax.jit(lambda m, x: m(x))(quantized, x))


# QuantLinear ------------------------------------------------------------------------------------------------------


def layer(inputs=32, features=8, bias=True, dtype=jnp.float32, **options):
    """(an nnx.Linear, an input in which two channels are outliers)."""
    linear = nnx.Linear(
        inputs, features, use_bias=bias, param_dtype=dtype, rngs=nnx.Rngs(0), **options
    )
    linear.kernel[...] = normal(inputs, features, dtype=dtype)
    if linear.bias is not None:
        linear.bias[...] = normal(features, seed=1, dtype=dtype)
    outliers = jnp.where((jnp.arange(inputs) == 3) | (jnp.arange(inputs) == 17), 50.0, 1.0)
    return linear, (normal(6, inputs, seed=2) * outliers[None, :]).astype(dtype)


def smoothing_of(linear, x, alpha=0.5):
    absmax = jnp.max(jnp.abs(x), axis=0)
    return absmax, smoothing_scales(absmax, jnp.max(jnp.abs(linear.kernel[...]), axis=1), alpha)


def quantized_layer(linear, x, scheme=sq.W8A8, smooth=False):
    absmax, s = smoothing_of(linear, x)
    return QuantLinear.from_linear(linear, scheme, absmax, s if smooth else None)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.slow
def test_the_smoothed_layer_is_the_layer(alpha):
    """(X / s)(s W) = X W: in float bit for bit but rounding, and what QuantLinear stores is s W, and divides by s."""
    linear, x = layer(bias=False)
    absmax, s = smoothing_of(linear, x, alpha)
    assert float(s.max() / s.min()) > 2
    w = linear.kernel[...]
    chex.assert_trees_all_close((x / s[None, :]) @ (s[:, None] * w), x @ w, rtol=1e-5, atol=1e-4)
    smoothed = QuantLinear.from_linear(linear, sq.W8A8, absmax, s).kernel.get_value()
    scale = np.asarray(smoothed.tensor.scale).ravel()
    error = np.abs(np.asarray(sq.dequantize(smoothed.tensor)) - np.asarray(s[:, None] * w))
    assert (error <= scale[None, :] / 2 * (1 + 1e-5)).all()
    assert error.max() > scale.max() / 4
    chex.assert_trees_all_equal(smoothed.smoothing, s)
    again = nnx.Linear(32, 8, use_bias=False, rngs=nnx.Rngs(0))
    again.kernel[...] = sq.dequantize(smoothed.tensor)  # s W within half a step: so is X W
    bound = (
        np.abs(np.asarray(x / s[None, :])).sum(1, keepdims=True) * scale[None, :] / 2 * (1 + 1e-5)
        + 1e-4
    )
    assert (np.abs(np.asarray(again(x / s[None, :]) - linear(x))) <= bound).all()


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("scheme", slow_but(SCHEMES, "O1", "O3"))
@pytest.mark.slow
def test_every_element_is_within_the_bound_of_theory(scheme, smooth):
    """|err_tj| <= sum_k |x_tk| sw_j / 2 + |w_kj| sx_t / 2 + sx_t sw_j / 4: both operands are off by half a step."""
    linear, x = layer()
    expected, got = linear(x), quantized_layer(linear, x, scheme, smooth)(x)
    s = smoothing_of(linear, x)[1] if smooth else jnp.ones(32)
    x, w = (
        np.asarray(x / s[None, :], np.float64),
        np.asarray(linear.kernel[...] * s[:, None], np.float64),
    )
    sx = numpy_int8.scale_of(x, 1 if isinstance(scheme.activation, sq.PerToken) else None).astype(
        np.float64
    )
    sw = numpy_int8.scale_of(w, 0 if scheme.weight.granularity == "per_channel" else None).astype(
        np.float64
    )
    bound = (
        np.abs(x).sum(1, keepdims=True) * sw / 2 + sx / 2 * np.abs(w).sum(0) + len(w) * sx * sw / 4
    )
    error = np.abs(np.asarray(got, np.float64) - np.asarray(expected, np.float64))
    assert (error <= bound + 1e-5 * (np.abs(x) @ np.abs(w) + 10)).all()
    assert error.max() > 0.01 * bound.max()  # an int8 layer does err
    assert bound.max() < np.abs(np.asarray(expected)).max()  # and the bound says something


@pytest.mark.parametrize("bias", [False, True])
def test_is_the_integer_product_of_numpy(bias):
    linear, x = layer(bias=bias)
    x = numpy_int8.away_from_ties(x, 1)
    linear.kernel[...] = jnp.asarray(numpy_int8.away_from_ties(linear.kernel[...], 0))
    expected = numpy_int8.matmul(x, linear.kernel[...])
    expected = expected + (np.asarray(linear.bias[...])[None, :] if bias else 0)
    got = QuantLinear.from_linear(linear)(jnp.asarray(x))
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)
    assert distance(got, linear(jnp.asarray(x))) > 1e-4


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("scheme", slow_but(SCHEMES, "O1", "O3"))
def test_the_only_matmul_is_int8_and_accumulates_in_int32(scheme, smooth):
    linear, x = layer()
    program = jaxprs.of(lambda module, x: module(x), quantized_layer(linear, x, scheme, smooth), x)
    [dot] = [e for e in jaxprs.equations(program) if e.primitive.name == "dot_general"]
    assert [d.dtypes for d in jaxprs.dots(program)] == [jaxprs.INT8_DOT]
    assert dot.params["preferred_element_type"] == jnp.int32
    assert jaxprs.widened(program, larger_than=0) == []


@pytest.mark.parametrize("scheme", ["O2", "O3"])
def test_smoothing_reduces_the_error_where_channels_are_outliers(scheme):
    linear, x = layer()
    rough, smooth = (
        distance(quantized_layer(linear, x, SCHEMES[scheme], s)(x), linear(x))
        for s in (False, True)
    )
    assert smooth < rough / 2


@pytest.mark.slow
def test_transformations_agree():
    linear, x = layer()
    module = QuantLinear.from_linear(linear)
    eager = module(x)
    for jit in (jax.jit, nnx.jit):
        chex.assert_trees_all_close(jit(lambda m, x: m(x))(module, x), eager, rtol=1e-4, atol=1e-3)
    for rows in (jax.vmap(module)(x), nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))(module, x)):
        chex.assert_trees_all_close(rows, eager, rtol=1e-4, atol=1e-3)
    chex.assert_trees_all_close(module(x.reshape(2, 3, 32)).reshape(6, 8), eager, rtol=1e-6)
    assert distance(eager, linear(x)) > 1e-3


@pytest.mark.slow
def test_the_gradients_of_input_and_bias_are_straight_through():
    linear, x = layer()
    module, g = QuantLinear.from_linear(linear), normal(6, 8, seed=4)

    def loss(module, x):
        return jnp.sum(module(x) * g)

    dmodule, dx = nnx.grad(loss, argnums=(0, 1))(module, x)
    assert set(dmodule) == {"bias"}
    chex.assert_trees_all_close(dmodule["bias"][...], g.sum(0), rtol=1e-5, atol=1e-6)
    weight = sq.dequantize(module.kernel.get_value().tensor)
    chex.assert_trees_all_close(dx, g @ weight.T, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(jax.grad(lambda x: loss(module, x))(x), dx, rtol=1e-6)
    fx = jax.grad(lambda x: loss(linear, x))(x)
    cosine = jnp.sum(dx * fx) / jnp.linalg.norm(dx) / jnp.linalg.norm(fx)
    assert 0.99 < cosine < 1 - 1e-7


@pytest.mark.slow
def test_stacked_layers_map_and_scan():
    linears = nnx.vmap(lambda rngs: nnx.Linear(16, 16, use_bias=False, rngs=rngs))(
        nnx.Rngs(0).split(3)
    )
    kernels, x = linears.kernel[...], normal(5, 16, seed=1)
    stacked = nnx.vmap(lambda linear: QuantLinear.from_linear(linear))(linears)
    assert stacked.kernel.get_value().shape == (3, 16, 16)
    each = [QuantLinear.from_linear(_linear(k)) for k in kernels]

    got = nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(stacked, x)
    chex.assert_trees_all_close(got, jnp.stack([m(x) for m in each]), rtol=1e-5, atol=1e-5)
    assert distance(got, jnp.einsum("ti,lio->lto", x, kernels)) > 1e-3

    scanned = nnx.scan(lambda m, x: m(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(stacked, x)
    expected = each[2](each[1](each[0](x)))
    chex.assert_trees_all_close(scanned, expected, rtol=1e-2, atol=1e-2)
    with pytest.raises(
        ValueError,
        match=r"^from_linear: expected a kernel of shape \(inputs, features\), got \(3, 16",
    ):
        QuantLinear.from_linear(linears)


def _linear(kernel):
    linear = nnx.Linear(*kernel.shape, use_bias=False, rngs=nnx.Rngs(0))
    linear.kernel[...] = kernel
    return linear


@pytest.mark.parametrize("scheme", slow_but(SCHEMES, "O3"))
@pytest.mark.slow
def test_the_constructor_draws_what_nnx_linear_draws(scheme):
    module, linear = (
        QuantLinear(16, 8, scheme=scheme, rngs=nnx.Rngs(7)),
        nnx.Linear(16, 8, rngs=nnx.Rngs(7)),
    )
    kernel = module.kernel.get_value()
    assert (kernel.shape, kernel.activations) == ((16, 8), NAMES[type(scheme.activation)])
    error = jnp.abs(sq.dequantize(kernel.tensor) - linear.kernel[...]).max()
    assert 0 < float(error) < 0.01
    chex.assert_shape(module.bias[...], (8,))
    reach, x = (
        1.0 if isinstance(scheme.activation, sq.Static) else jnp.inf,
        normal(5, 16),
    )  # without statistics, it clips at 1
    assert 1e-4 < distance(module(x), jnp.clip(x, -reach, reach) @ linear.kernel[...]) < 0.02
    assert QuantLinear(16, 8, use_bias=False, rngs=nnx.Rngs(0)).bias is None


@pytest.mark.parametrize(
    ("x", "param", "dtype", "expected"),
    [
        (jnp.bfloat16, jnp.bfloat16, None, jnp.bfloat16),
        (jnp.float32, jnp.float32, jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32),
        (jnp.float32, jnp.float32, None, jnp.float32),
    ],
)
def test_dtypes_are_those_of_nnx_linear(x, param, dtype, expected):
    linear, inputs = layer(dtype=param)
    linear.dtype = dtype
    module, inputs = QuantLinear.from_linear(linear), inputs.astype(x)
    assert (module.dtype, module.in_features, module.out_features, module.use_bias) == (
        dtype,
        32,
        8,
        True,
    )
    got, reference = module(inputs), linear(inputs)
    assert got.dtype == reference.dtype == expected
    error = (
        np.abs(got.astype(np.float32) - reference.astype(np.float32)).max()
        / np.abs(reference).max()
    )
    assert 1e-3 < error < 0.05


@pytest.mark.slow
def test_quant_linear_inside_a_model_goes_through_functional():
    model, x = jittered(Perceptron(nnx.Rngs(0))), normal(16, 6)
    expected = model(x)
    model.heads["main"] = QuantLinear.from_linear(model.heads["main"])
    fn, params = functional(model)
    assert isinstance(params["heads"]["main"]["kernel"], QuantWeight)
    got = jax.jit(fn)(params, x)
    chex.assert_trees_all_close(got, model(x), rtol=1e-4, atol=1e-4)
    assert 1e-4 < distance(got, expected) < 0.05
    back = rebuild(fn, params)
    assert type(back) is Perceptron
    chex.assert_trees_all_equal(back(x), model(x))


def test_from_linear_does_not_touch_the_float_layer():
    linear, x = layer()
    before = linear(x)
    module = QuantLinear.from_linear(linear)
    module.bias[...] = module.bias[...] + 1
    chex.assert_trees_all_equal(linear(x), before)


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, {"smoothing": jnp.ones(8)}, r"expected smoothing of shape \(32,\), got \(8,\)"),
        ({}, {"absmax": jnp.ones(31)}, r"expected absmax of shape \(32,\), got \(31,\)"),
        (
            {},
            {"scheme": sq.EMBEDDING_INT8},
            r"^from_linear: kernel: a scheme for embeddings, which meet indices",
        ),
        (
            {},
            {"scheme": sq.W8A8_OUTLIERS},
            r"^from_linear: kernel: a scheme with outliers .* pass absmax=max",
        ),
        ({}, {"scheme": sq.W8A8_O3}, "a static scheme needs the activation's absmax"),
        ({"preferred_element_type": jnp.float32}, {}, "a preferred_element_type of its own"),
        (
            {"dot_general": lambda *a, **k: jax.lax.dot_general(*a, **k)},
            {},
            "a dot_general of its own",
        ),
    ],
)
def test_from_linear_says_what_it_expected(options, change, message):
    with pytest.raises(ValueError, match=message):
        QuantLinear.from_linear(layer(**options)[0], **change)


def test_a_wrong_kernel_is_refused():
    linear, x = layer()
    module = QuantLinear.from_linear(linear)
    with pytest.raises(ValueError, match=r"^kernel: expected shape \(31, 8\), got \(32, 8\)"):
        module(x[:, 1:])
    module.kernel = QuantParam(linear.kernel[...])
    with pytest.raises(
        ValueError, match=r"^kernel: expected a QuantWeight, got .*\(32, 8\); .*from_linear"
    ):
        module(x)


# Every scheme -----------------------------------------------------------------------------------------------------

#: Every preset for matmuls, with what relative error its rounding may leave in a product of 128 random channels.
PRESETS = {
    "W8A8_O1": (sq.W8A8_O1, 0.03),
    "W8A8_O2": (sq.W8A8_O2, 0.1),
    "W8A8_O3": (sq.W8A8_O3, 0.1),
    "W8A8_OUTLIERS": (sq.W8A8_OUTLIERS, 0.02),
    "FP8": (sq.FP8, 0.06),
    "FP8_E5M2": (sq.FP8_E5M2, 0.12),
    "W8A16": (sq.W8A16, 0.02),
    "W4A16": (sq.W4A16, 0.15),
    "W4A16_G64": (sq.W4A16_G64, 0.15),
    "W4A8": (sq.W4A8, 0.15),
    "W4A4_ROTATED": (sq.W4A4_ROTATED, 0.2),
    "smoothing": (sq.W8A8_O2.replace(smoothing=0.5), 0.03),
}
QUICK = ("W8A8_O3", "W4A8")
each_preset = pytest.mark.parametrize(("scheme", "error"), slow_but(PRESETS, *QUICK))


@each_preset
@pytest.mark.slow
@pytest.mark.every_case
def test_every_scheme_runs_under_nnx_jit_vmap_and_grad(scheme, error):
    linear, x = layer(128, 16)
    module = QuantLinear.from_linear(linear, scheme, jnp.max(jnp.abs(x), axis=0))
    assert (module.scheme, module.in_features) == (scheme, 128)
    g = normal(6, 16, seed=4)

    @nnx.jit
    def program(module, x):
        run = lambda m, x: m(x)
        # Under vmap every row has a scale of its own, which per-tensor schemes do not have.
        per_tensor = isinstance(scheme.activation, sq.PerTensor)
        rows = run(module, x) if per_tensor else nnx.vmap(run, in_axes=(None, 0))(module, x)
        grads, dx = nnx.grad(lambda m, x: jnp.sum(m(x) * g), argnums=(0, 1))(module, x)
        return run(module, x), rows, grads, dx

    got, rows, grads, dx = program(module, x)
    assert 1e-4 < distance(got, linear(x)) < error
    chex.assert_trees_all_close(rows, got, atol=1e-2 * float(jnp.abs(got).max()))
    assert set(grads) == {"bias"}
    fx = g @ linear.kernel[...].T
    coarse = scheme.weight.fmt.name in ("int4", "e5m2")
    assert jnp.sum(dx * fx) / jnp.linalg.norm(dx) / jnp.linalg.norm(fx) > (0.98 if coarse else 0.99)
    drawn = QuantLinear(128, 16, scheme=scheme, rngs=nnx.Rngs(0))
    assert jnp.isfinite(drawn(x)).all()
    assert drawn.kernel.get_value().tensor.fmt == scheme.weight.fmt
    assert drawn.kernel.get_value().outliers is None  # there are no data yet


@pytest.mark.parametrize(("scheme", "error"), slow_but(PRESETS))
def test_stacked_layers_of_every_scheme_scan_as_a_loop(scheme, error):
    kernels, x = normal(3, 64, 64) / 8, normal(5, 64, seed=1)
    absmax = jnp.maximum(jnp.max(jnp.abs(x), axis=0), 3)
    each = [QuantLinear.from_linear(_linear(k), scheme, absmax) for k in kernels]
    graphdef, *_ = nnx.split(each[0])
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *(nnx.state(m) for m in each))
    steps = lambda x: jax.lax.scan(
        lambda x, state: (nnx.merge(graphdef, state)(x), None), x, stacked
    )[0]
    expected = each[2](each[1](each[0](x)))
    chex.assert_trees_all_close(
        jax.jit(steps)(x), expected, atol=1e-2 * float(jnp.abs(expected).max())
    )
    of_float = x @ kernels[0] @ kernels[1] @ kernels[2]
    assert 1e-4 < distance(expected, of_float) < 3 * error


@pytest.mark.slow
def test_smoothing_by_powers_of_two_moves_the_steps_and_nothing_else():
    """(X / s)(s W) = X W without a lost bit: float products are equal, and so are the layers smoothed at run time and
    by folding."""
    linear, x = layer(bias=False)
    absmax, s = smoothing_of(linear, x)
    s = jnp.exp2(jnp.round(jnp.log2(s)))
    assert float(s.max() / s.min()) >= 4
    moved = _linear(s[:, None] * linear.kernel[...])
    chex.assert_trees_all_equal(moved(x / s[None, :]), linear(x))
    folded = QuantLinear.from_linear(moved)(x / s[None, :])
    chex.assert_trees_all_equal(QuantLinear.from_linear(linear, sq.W8A8, absmax, s)(x), folded)
    assert (
        1e-4 < distance(folded, linear(x)) < distance(QuantLinear.from_linear(linear)(x), linear(x))
    )


class Around(nnx.Module):
    """A norm, a hidden layer that may be quantized, and a float head."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.body = nnx.Linear(64, 16, rngs=rngs)
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.body(self.norm(x))))


TRAINED = {"W8A8": sq.W8A8, "W4A8": sq.W4A8, "FP8": sq.FP8}


@pytest.mark.parametrize("scheme", slow_but(TRAINED))
@pytest.mark.every_case
def test_what_is_around_a_quantized_layer_trains(scheme):
    """nnx.grad and nnx.Optimizer see every nnx.Param: the norm, the biases, the head; a QuantParam is none."""
    model, x, target = Around(nnx.Rngs(0)), normal(32, 64), normal(32, 4, seed=1)
    model.body = QuantLinear.from_linear(model.body, scheme)
    before = jax.tree.map(jnp.array, model.body.kernel.get_value())
    floats = {
        p: jnp.array(v.get_value()) for p, v in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    assert set(floats) == {
        (a, b) for a in ("norm", "body", "head") for b in ("bias", "scale", "kernel")
    } - {*(("norm", "kernel"), ("body", "kernel"), ("body", "scale"), ("head", "scale"))}
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - target) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(12)]
    assert losses[-1] < 0.7 * losses[0]
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        assert float(jnp.abs(variable.get_value() - floats[path]).max()) > 1e-3
    chex.assert_trees_all_equal(model.body.kernel.get_value(), before)
