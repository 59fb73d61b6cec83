"""`load_quantized`: bit for bit what loading, smoothing and quantizing give, with less in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantized_tensors as of_layouts
from hf_directories import CONFIG, shard, tensors, write
from slow import slow_but

import sqjax as sq
from sqjax.streaming import loading

IDS = jnp.asarray(np.random.default_rng(3).integers(0, CONFIG["vocab_size"], (2, 12)))
TIED = CONFIG | {"tie_word_embeddings": True, "num_hidden_layers": 3}


def assert_same_trees(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, str(path))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """(directory, model, float parameters, statistics)."""
    directory = write(tmp_path_factory.mktemp("hf") / "model")
    model, params = sq.models.load(directory)
    return directory, model, params, sq.calibrate(model.apply, params, [IDS], histogram=True)


RULES = {
    "W8A8": sq.W8A8,
    "static, by pattern": {"layers/1/mlp": None, "lm_head": sq.W4A16.replace(), ".*": sq.W8A8_O3},
    "smoothed at run time": {"down_proj": sq.W8A8.replace(smoothing=0.5), ".*": "W8A16"},
    "an embedding": {"embed": sq.EMBEDDING_INT8, ".*": sq.W8A8_O1},
}


@pytest.mark.parametrize("rules", slow_but(RULES))
def test_it_is_what_smoothing_and_quantizing_the_whole_gives(calibrated, rules):
    directory, model, params, stats = calibrated
    alpha = {"layers/0": 0.9, ".*": 0.6}
    s = sq.scales(params, stats, alpha)
    smoothed = sq.fold(params, stats.graph, s)
    expected = sq.quantize(smoothed, sq.fold_stats(stats, s), rules)
    got_model, got = sq.load_quantized(directory, rules, stats, alpha)
    assert got_model == model
    assert_same_trees(got, expected)


@pytest.mark.slow
def test_groups_are_chosen_as_by_scales(calibrated):
    directory, _, params, stats = calibrated
    smoothed = sq.smooth(params, stats, 0.7, groups="norm")
    _, got = sq.load_quantized(directory, {".*": None}, stats, 0.7, groups="norm")
    assert_same_trees(got, smoothed)


@pytest.mark.parametrize("scheme", [sq.W8A8, "W8A16", {"embed": "EMBEDDING_INT8", "mlp": "W4A16"}])
@pytest.mark.slow
def test_without_statistics(tmp_path, scheme):
    directory = shard(tmp_path / "model", tensors(TIED), TIED) if scheme == sq.W8A8 else None
    directory = directory or write(tmp_path / "model")
    model, params = sq.models.load(directory, jnp.bfloat16)
    stats = sq.calibrate(model.apply, params, [IDS])
    if isinstance(scheme, dict):
        scheme = {"embed": sq.EMBEDDING_INT8, "mlp": sq.W8A16}
    _, got = sq.load_quantized(directory, scheme, dtype=jnp.bfloat16)
    assert_same_trees(got, sq.quantize(params, stats, scheme))


@pytest.mark.slow
def test_what_waits_in_float_is_less_than_one_layer(calibrated, monkeypatch):
    """Counted: the bytes of all float leaves that are alive when the next one is read."""
    directory, _, params, stats = calibrated
    layer = sum(x.nbytes for x in jax.tree.leaves(params["model"]["layers"]["0"]))
    alive, waiting = [], {}
    quantize = loading._quantized_part

    def placed(path, array, dtype, _):
        leaf = jnp.asarray(array, dtype)
        waiting[path] = leaf.nbytes
        alive.append(sum(waiting.values()))
        return leaf

    def quantized(plan, leaves):
        for path in leaves:
            del waiting[path]
        return quantize(plan, leaves)

    monkeypatch.setattr(loading, "float_leaf", placed)
    monkeypatch.setattr(loading, "_quantized_part", quantized)
    sq.load_quantized(directory, sq.W8A8, stats, 0.5)
    assert not waiting
    assert layer / 2 < max(alive[3:]) <= layer  # the first three are the embedding and the head


@pytest.mark.slow
def test_float_leaves_are_dropped(calibrated):
    """No float kernel is alive once its layer is done: of all arrays that jax holds."""
    directory, _, params, stats = calibrated
    kernel = params["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    alike = lambda: sum(
        x.shape == kernel.shape and x.dtype == kernel.dtype for x in jax.live_arrays()
    )
    before = alike()
    _, qparams = sq.load_quantized(directory, sq.W8A8, stats, 0.5)
    assert alike() == before
    assert isinstance(qparams["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"], sq.QuantWeight)


REFUSALS = {
    "static without statistics": (
        dict(scheme=sq.W8A8_O3),
        r"static scheme, outliers and smoothing at run time need statistics.*calibrate_layers",
    ),
    "alpha without statistics": (dict(alpha=0.5), "alpha: smoothing scales are made of statistics"),
    "no such pattern": (dict(scheme={"gate_prj": sq.W8A8}), "gate_prj"),
    "no statistics": (dict(stats=0.5), r"expected the Stats that sqjax.calibrate.*got float"),
    "no scheme": (dict(scheme=8), "expected"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_before_anything_is_read(calibrated, monkeypatch, arguments, message):
    monkeypatch.setattr(loading, "read_leaves", None)
    with pytest.raises(ValueError, match=message):
        sq.load_quantized(calibrated[0], **arguments)


def test_statistics_of_another_model(calibrated, tmp_path):
    _, _, _, stats = calibrated
    other = write(tmp_path / "other", CONFIG | {"num_hidden_layers": 1})
    with pytest.raises(ValueError, match=r"layers/1/.*missing"):
        sq.load_quantized(other, sq.W8A8, stats)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
@pytest.mark.slow
def test_statistics_of_other_numbers(calibrated, tmp_path, name):
    _, _, _, stats = calibrated
    weights = tensors()
    weights[name] = weights[name] * 2
    other = write(tmp_path / "other", weights=weights)
    with pytest.raises(ValueError, match="the statistics are of other parameters than these"):
        sq.load_quantized(other, sq.W8A8_O3, stats, 0.5)


def test_a_number_that_is_not_finite_names_its_layer(tmp_path):
    weights = tensors()
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
    with pytest.raises(ValueError, match="model/layers/1: parameter mlp/up_proj/kernel: 1 of"):
        sq.load_quantized(write(tmp_path / "nan", weights=weights))


def test_a_truncated_file_is_refused(calibrated, tmp_path):
    directory = write(tmp_path / "short")
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[:-8])
    with pytest.raises(ValueError, match=r"model.safetensors"):
        sq.load_quantized(directory)


def test_a_stored_head_that_contradicts_the_tie(tmp_path):
    weights = tensors(CONFIG)
    config = CONFIG | {"tie_word_embeddings": True}
    with pytest.raises(ValueError, match=r"lm_head.weight.*other numbers"):
        sq.load_quantized(write(tmp_path / "tied", config, weights))


@pytest.mark.parametrize("call", [sq.load_quantized, lambda path: sq.calibrate_layers(path, [IDS])])
def test_a_checkpoint_that_is_quantized_already(tmp_path, call):
    config = CONFIG | {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    said, draw = of_layouts.LAYOUTS["awq"]
    stored = {}
    for name, x in tensors(config).items():
        if "_proj.weight" not in name:
            stored[name] = x
            continue
        module = name.removesuffix(".weight")
        own, _, _ = draw(np.random.default_rng(0), x.shape)
        stored |= {f"{module}.{end}": part for end, part in own.items()}
    directory = write(tmp_path / "awq", config | {"quantization_config": said}, stored)
    with pytest.raises(ValueError, match=r"down_proj/kernel: expected floats, got a weight that"):
        call(directory)


def test_it_is_no_directory():
    with pytest.raises(ValueError, match=r"expected a directory with config.json"):
        sq.load_quantized("smollm2-135m")
