"""The authors' files of activation scales as statistics: smoothing with them is numpy's formula."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoint
from hf_directories import CONFIG, tensors, write
from safetensors.numpy import save_file
from untyped import untyped

import sqjax as sq
from sqjax.models import load

LLAMA = CONFIG | {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
}
LINEARS = ("_proj.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load(write(tmp_path_factory.mktemp("llama") / "source", LLAMA))


def act_scales():
    """max |X_j| of every Linear: of q, k and v that read one activation the same."""
    found = {}
    for name, weight in tensors(LLAMA).items():
        if name.endswith(LINEARS):
            shared = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj")
            shared = shared.replace("up_proj", "gate_proj")
            rng = np.random.default_rng(len(shared) + 100 * sum(map(ord, shared)))
            channels = rng.uniform(0.5, 4.0, weight.shape[1]).astype(np.float32)
            found[name.removesuffix(".weight")] = channels
    return found


def numpys_scales(names, alpha):
    """s of some Linears that share an activation, by the authors' formula in float64."""
    weights = tensors(LLAMA)
    rows = [np.abs(weights[f"{name}.weight"]).max(axis=0) for name in names]
    w = np.maximum(np.max(rows, axis=0).astype(np.float64), 1e-5)
    x = act_scales()[names[0]].astype(np.float64)
    return np.maximum(x**alpha / w ** (1 - alpha), 1e-5)


@pytest.mark.slow
def test_the_scales_are_those_of_the_authors_formula(tmp_path, llama):
    model, params = llama
    save_file(act_scales(), tmp_path / "act.safetensors")
    stats = sq.stats_from_act_scales(tmp_path / "act.safetensors", model, params)
    s = sq.scales(params, stats, 0.7)
    layer = "model.layers.0."
    groups = {
        "self_attn/q_proj": [f"{layer}self_attn.{x}_proj" for x in "qkv"],
        "mlp/gate_proj": [f"{layer}mlp.gate_proj", f"{layer}mlp.up_proj"],
    }
    for name, modules in groups.items():
        [group] = [
            group for group in stats.graph.groups if f"model/layers/0/{name}/kernel" in group.paths
        ]
        assert len(group.paths) == len(modules)
        labels = dict(group.sites)[f"model/layers/0/{name}/kernel"].array.ravel() - 1
        expected = numpys_scales(modules, 0.7)
        np.testing.assert_allclose(s[group.name][labels], expected, rtol=1e-5)
    smooth = sq.smooth(params, stats, 0.7)
    gain = params["model"]["layers"]["0"]["input_layernorm"]["weight"]
    modules = groups["self_attn/q_proj"]
    expected = gain / numpys_scales(modules, 0.7)
    got = smooth["model"]["layers"]["0"]["input_layernorm"]["weight"]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.slow
def test_they_are_the_statistics_of_the_same_ranges(llama):
    """Of real statistics the ranges alone are kept: smoothing and static schemes see no difference."""
    model, params = llama
    real = sq.calibrate(model.apply, params, [jnp.arange(24).reshape(3, 8)])
    theirs = {}
    for path, absmax in real.absmax.items():
        name = path.removesuffix("/kernel").replace("/", ".")
        theirs[name] = np.asarray(absmax)
    stats = sq.stats_from_act_scales(theirs, model, params)
    assert stats.graph == real.graph
    assert stats.absmax.keys() == real.absmax.keys()
    scheme = sq.W8A8_O3
    expected = sq.quantize(
        sq.smooth(params, real, 0.5), sq.fold_stats(real, sq.scales(params, real, 0.5)), scheme
    )
    s = sq.scales(params, stats, 0.5)
    got = sq.quantize(sq.fold(params, stats.graph, s), sq.fold_stats(stats, s), scheme)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def changed(**changes):
    """The scales with some entries changed; None takes one out."""
    found = act_scales() | changes
    return {name: x for name, x in found.items() if x is not None}


Q = "model.layers.0.self_attn.q_proj"
REFUSED = {
    "unknown": (
        {"model.layers.0.self_attn.query": np.ones(16)},
        r"\['model.layers.0.self_attn.que",
    ),
    "layer too many": (
        {"model.layers.2.mlp.up_proj": np.ones(16)},
        "expected the names of a model",
    ),
    "missing": ({Q: None}, r"none for \['model/layers/0/self_attn/q_proj/kernel'\] \(1 in all\)"),
    "channels": ({Q: np.ones(15, np.float32)}, f"{Q}: expected 16 input channels, got 15"),
    "negative": ({Q: -np.ones(16)}, f"{Q}: expected a vector of finite numbers of at least 0"),
    "NaN": ({Q: np.full(16, np.nan)}, f"{Q}: expected a vector of finite numbers"),
    "matrix": ({Q: np.ones((4, 4))}, rf"{Q}: expected a vector .*shape \(4, 4\)"),
    "ragged": ({Q: [[1.0], [1.0, 2.0]]}, rf"{Q}: expected a vector: "),
    "text": ({Q: "16"}, f"{Q}: expected a vector .*str"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_the_models_is_refused(llama, case):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"stats_from_act_scales: .*{message}"):
        sq.stats_from_act_scales(changed(**changes), *llama)


def test_a_pickle_is_not_read(tmp_path, llama):
    file = tmp_path / "act.pt"
    file.write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(
        ValueError, match=r"act.pt: expected a safetensors file, got .*torch once more"
    ):
        sq.stats_from_act_scales(file, *llama)
    with untyped(), pytest.raises(ValueError, match="act_scales: expected a safetensors file, or"):
        sq.stats_from_act_scales(None, *llama)
    with pytest.raises(ValueError, match="act_scales: expected names of modules, got 5"):
        sq.stats_from_act_scales({5: np.ones(16)}, *llama)
    with untyped(), pytest.raises(ValueError, match=r"expected a model as sqjax.models.load"):
        sq.stats_from_act_scales({}, lambda params, ids: ids, llama[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phi3", "opt", "mixtral"])
def test_experts_joined_layers_and_tied_heads(tmp_path, name):
    """Experts have the largest of theirs; q, k and v in one the same; a tied head is the embedding."""
    case = tiny_checkpoint.load(name)
    model, params = load(tiny_checkpoint.write(case, tmp_path / "source"))
    real = sq.calibrate(model.apply, params, [jnp.arange(16).reshape(2, 8)])
    shapes = {k: x for k, x in case["shapes"].items() if k.endswith(".weight") and len(x) == 2}
    theirs = {}
    for key, shape in shapes.items():
        if "embed" not in key:
            theirs[key.removesuffix(".weight")] = np.full(shape[1], 1.0 + len(theirs), np.float32)
    if model.config.tie_embeddings:
        theirs["lm_head"] = np.full(model.config.hidden_size, 77.0, np.float32)
    stats = sq.stats_from_act_scales(theirs, model, params)
    assert stats.graph == real.graph
    absmax = {path: np.asarray(x) for path, x in stats.absmax.items()}
    assert {path: x.shape for path, x in absmax.items()} == {
        path: x.shape for path, x in real.absmax.items()
    }
    if name == "mixtral":
        of_experts = [x[0] for name, x in theirs.items() if re.search(r"\.0\..*\.w2$", name)]
        assert len(of_experts) == len(set(of_experts)) > 1
        got = absmax["model/layers/0/mlp/experts/down_proj/kernel"]
        np.testing.assert_array_equal(got, max(of_experts))
    if name == "phi3":
        q, k, v = (f"model/layers/0/self_attn/{x}_proj/kernel" for x in "qkv")
        assert set(absmax[q]) == set(absmax[k]) == set(absmax[v])
    if model.config.tie_embeddings:
        np.testing.assert_array_equal(absmax["model/embed_tokens/embedding"], 77.0)
