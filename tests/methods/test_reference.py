"""Whole models against tests/vectors: made by PyTorch from the published formulas, with no line of sqjax."""

import functools
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_transformers import flax_transformers

import sqjax as sq
from sqjax._trees import named_leaves

VECTORS = pathlib.Path(__file__).parent / "vectors"
ALPHAS = (0.5, 0.85)
RULES = {"lm_head|embed": None, ".*": sq.W8A8}
STATIC = {"lm_head|embed": None, ".*": sq.W8A8_O3}


class Reference(NamedTuple):
    """A model, its parameters, the stored arrays, what calibration found."""

    fn: Any
    params: Any
    arrays: dict[str, np.ndarray]
    stats: sq.Stats


def load_llama(directory):
    model, params = sq.models.load(directory)
    return model.apply, params


def load_opt(directory):
    model = flax_transformers().FlaxOPTForCausalLM.from_pretrained(directory)

    def fn(params, ids):
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        return model.module.apply({"params": params}, ids, jnp.ones_like(ids), positions).logits

    return fn, model.params


LOADERS = {"llama": load_llama, "opt": load_opt}


@functools.cache
def reference(name):
    fn, params = LOADERS[name](VECTORS / name)
    with np.load(VECTORS / name / "reference.npz") as file:
        arrays = dict(file)
    stats = sq.calibrate(fn, params, [jnp.asarray(arrays["ids_calibration"])])
    return Reference(fn, params, arrays, stats)


OPT = pytest.param("opt", marks=[pytest.mark.huggingface, pytest.mark.slow])


@pytest.fixture(params=["llama", OPT])
def model(request):
    return reference(request.param)


def pytorch_name(path):
    """A leaf's name in PyTorch: OPT's and Llama's trees differ from it in the last part only."""
    return re.sub("/(kernel|scale|embedding)$", "/weight", path).replace("/", ".")


def site_name(path):
    """A site's name as a torch.nn.Linear; OPT's head is its embedding."""
    return "lm_head" if "embed" in path else pytorch_name(path).removesuffix(".weight")


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(
        np.asarray(actual), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()
    )


def error(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def run(fn, params, arrays):
    return jax.jit(sq.quantized(fn))(params, jnp.asarray(arrays["ids"]))


@pytest.mark.slow
def test_float_logits(model):
    assert error(run(model.fn, model.params, model.arrays), model.arrays["logits"]) < 2e-6


@pytest.mark.slow
def test_absmax_of_every_linear(model):
    stored = {
        key.removeprefix("absmax/"): value
        for key, value in model.arrays.items()
        if key.startswith("absmax/")
    }
    assert {site_name(path) for path in model.stats.absmax} == set(stored)
    for path, absmax in model.stats.absmax.items():
        close(absmax, stored[site_name(path)])
        assert model.stats.count[path] == model.arrays["ids_calibration"].size


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.slow
def test_scales(model, alpha):
    prefix = f"scales/{alpha}/"
    expected = {
        key.removeprefix(prefix): value
        for key, value in model.arrays.items()
        if key.startswith(prefix)
    }
    s = sq.scales(model.params, model.stats, alpha, groups="norm")
    absorbers = {
        g.name: pytorch_name(g.absorbers[-1]).removesuffix(".weight")
        for g in model.stats.graph.groups
    }
    assert {absorbers[name] for name in s} == set(expected)
    for name, scale in s.items():
        close(scale, expected[absorbers[name]])


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.slow
def test_smoothed_parameters(model, alpha):
    """Those that PyTorch changed agree, and no others are touched."""
    prefix = f"smoothed/{alpha}/"
    expected = {
        key.removeprefix(prefix): value
        for key, value in model.arrays.items()
        if key.startswith(prefix)
    }
    paths, smoothed, _ = named_leaves(sq.smooth(model.params, model.stats, alpha, groups="norm"))
    changed = set()
    for path, before, after in zip(paths, jax.tree.leaves(model.params), smoothed, strict=True):
        if not np.array_equal(before, after):
            changed.add(pytorch_name(path))
            close(after.T if after.ndim == 2 else after, expected[pytorch_name(path)])
    assert changed == set(expected)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("groups", ["norm", "all"])
@pytest.mark.slow
def test_smoothing_keeps_the_logits(model, alpha, groups):
    smoothed = sq.smooth(model.params, model.stats, alpha, groups=groups)
    logits = run(model.fn, smoothed, model.arrays)
    assert 0 < error(logits, model.arrays["logits"]) < 1e-5
    if groups == "norm":
        assert error(logits, model.arrays[f"smoothed_logits/{alpha}"]) < 1e-5


@pytest.mark.parametrize("alpha", ["none", *ALPHAS])
@pytest.mark.parametrize(("key", "rules"), [("w8a8", RULES), ("w8a8_static", STATIC)])
@pytest.mark.slow
def test_quantized_models_lose_as_much_as_pytorchs(model, alpha, key, rules):
    """The error against the float model within 10% of the reference's; the logits themselves only roughly."""
    params, stats = model.params, model.stats
    if alpha != "none":
        s = sq.scales(params, stats, alpha, groups="norm")
        params, stats = sq.fold(params, stats.graph, s), sq.fold_stats(stats, s)
    logits = run(model.fn, sq.quantize(params, stats, rules), model.arrays)
    float_logits, expected = model.arrays["logits"], model.arrays[f"{key}/{alpha}"]
    assert error(logits, float_logits) == pytest.approx(error(expected, float_logits), rel=0.1)
    assert error(logits, expected) < 2e-2


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.slow
def test_smoothing_is_what_saves_static_int8(model, alpha):
    """And with the statistics of the wrong parameters it is refused."""
    losses = []
    for a in (None, alpha):
        s = {} if a is None else sq.scales(model.params, model.stats, a, groups="norm")
        params = sq.fold(model.params, model.stats.graph, s)
        quantized = sq.quantize(params, sq.fold_stats(model.stats, s), STATIC)
        losses.append(error(run(model.fn, quantized, model.arrays), model.arrays["logits"]))
    assert losses[1] < losses[0] / 3
    with pytest.raises(ValueError, match="fold_stats"):
        sq.quantize(params, model.stats, STATIC)


@pytest.mark.parametrize("alpha", ["none", *ALPHAS])
@pytest.mark.slow
def test_static_scales(model, alpha):
    prefix = f"static_scale/{alpha}/"
    expected = {
        key.removeprefix(prefix): value
        for key, value in model.arrays.items()
        if key.startswith(prefix)
    }
    s = {} if alpha == "none" else sq.scales(model.params, model.stats, alpha, groups="norm")
    params, stats = sq.fold(model.params, model.stats.graph, s), sq.fold_stats(model.stats, s)
    leaves = named_leaves(
        sq.quantize(params, stats, STATIC), is_leaf=lambda x: isinstance(x, sq.QuantWeight)
    )
    got = {
        site_name(p): x.input_scale
        for p, x in zip(*leaves[:2], strict=True)
        if isinstance(x, sq.QuantWeight)
    }
    assert set(got) == set(expected)
    for name, scale in got.items():
        close(scale, expected[name])
