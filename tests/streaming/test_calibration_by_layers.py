"""`calibrate_layers`: the statistics of the whole model, with one layer in memory."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_directories import CONFIG, tensors, write
from tiny_llama import GROUPED, random_ids, random_params

import sqjax as sq
from sqjax.models import Model
from sqjax.models.config import DecoderConfig, Experts, LayerKind, Norm
from sqjax.models.rope import Rope
from sqjax.numerics.ranges import EDGES
from sqjax.streaming import calibration

NUMBERS = ("absmax", "abs_sum", "count", "reached", "weight_absmax", "leaf_sizes", "folded")


def assert_equal_stats(got, expected):
    """Equal but for the rounding of activations between layers."""
    assert got.graph == expected.graph
    for name in NUMBERS:
        ours, theirs = getattr(got, name), getattr(expected, name)
        assert ours.keys() == theirs.keys()
        for path, x in ours.items():
            np.testing.assert_allclose(x, theirs[path], 1e-4, 1e-6, err_msg=f"{name} of {path}")
    for path, histogram in got.histogram.items():
        ours = np.asarray(histogram.counts, int)
        theirs = np.asarray(expected.histogram[path].counts, int)
        assert abs(ours.sum() - theirs.sum()) <= 0.01 * ours.sum()
        # A rounded activation may be in the next bin. The smallest ones may be in any bin below,
        # because GELU of a large negative number is what is left of 1 - 0.99999.
        large = EDGES[:-1] >= 2.0**-10 * histogram.absmax.max()
        moved = np.abs(ours - theirs)[..., large].sum()
        assert moved <= 0.005 * ours[..., large].sum()
    assert got.histogram.keys() == expected.histogram.keys()


#: As little as a decoder can be, so that it compiles soon.
SMALL = DecoderConfig(
    *(61, 8, 12, 2, 2, 2, 4),
    block="parallel",
    gated_mlp=False,
    activation="relu",
    kinds=(LayerKind(None, None),),
    max_length=64,
)
WINDOWS = (LayerKind(3), LayerKind(None, Rope(1e6)), LayerKind(3))
SIZES = (61, 32, 32, 3, 4, 2, 8)
CONFIGS = {
    "tied": GROUPED,
    "gemma": DecoderConfig(
        *SIZES,
        norm=Norm(one_plus=True),
        block="sandwich",
        kinds=WINDOWS,
        qk_norm="head",
        activation="gelu_tanh",
        embedding_scale=4.9,
        logit_softcap=30.0,
        tie_embeddings=True,
    ),
    "opt": DecoderConfig(
        *(61, 32, 32, 2, 4, 4, 8),
        norm=Norm("layer", bias=True),
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        gated_mlp=False,
        activation="relu",
        learned_positions=True,
        position_offset=2,
        kinds=(LayerKind(None, None),),
        embedding_size=16,
        max_length=32,
    ),
    "experts": DecoderConfig(
        *(61, 32, 32, 2, 4, 2, 8), experts=Experts(4, 2, 16, shared_size=8, dense_layers=(0,))
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore:calibrate. (no|less|every)")
def test_it_is_what_calibrating_the_whole_gives(name):
    model = Model(CONFIGS[name])
    params = random_params(model)
    batches = [random_ids(2, 8, seed) for seed in (1, 2)]
    expected = sq.calibrate(model.apply, params, batches, histogram=True)
    got = sq.calibrate_layers((model, params), batches, histogram=True)
    assert_equal_stats(got, expected)


@pytest.mark.slow
def test_a_small_one_and_that_layers_that_are_alike_are_compiled_once(monkeypatch):
    model = Model(SMALL)
    params = random_params(model)
    expected = sq.calibrate(model.apply, params, [random_ids(2, 4)])
    made = []
    known = calibration.Known

    def counted():
        made.append(known())
        return made[-1]

    monkeypatch.setattr(calibration, "Known", counted)
    got = sq.calibrate_layers((model, params), [random_ids(2, 4)])
    assert_equal_stats(got, expected)
    _, layers, head = made
    assert len(layers.analyses) == len(head.analyses) == 1
    assert len(layers.programs) == len(head.programs) == 2  # the proof, and the recording
    assert all(program._cache_size() == 1 for program in layers.programs.values())


@pytest.mark.slow
@pytest.mark.every_case
def test_of_a_directory_with_a_mask_and_keys_and_two_lengths(tmp_path):
    directory = write(tmp_path / "model")
    model, params = sq.models.load(directory)
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, CONFIG["vocab_size"], (2, n)) for n in (9, 9, 6)]
    mask = lambda ids: ids > 4
    expected = sq.calibrate(model.apply, params, batches, mask=mask, attention=True)
    got = sq.calibrate_layers(directory, batches, mask=mask, attention=True)
    assert got.graph.keys
    assert_equal_stats(got, expected)
    s = sq.scales(params, got, 0.5, attention=0.5)
    assert s.keys() == sq.scales(params, expected, 0.5, attention=0.5).keys()


def test_one_layer_is_alive_at_a_time(tmp_path, monkeypatch):
    """Of all arrays that jax holds when a layer has been read, one has its kernel's shape."""
    config = CONFIG | {"num_hidden_layers": 4, "intermediate_size": 28}
    directory = write(tmp_path / "model", config, tensors(config))
    shape = (28, 12)  # of down_proj, and of nothing else
    held = lambda: sum(x.shape == shape and x.dtype == jnp.float32 for x in jax.live_arrays())
    gc.collect()
    before, alive = held(), []

    def stats(*_):
        alive.append(held() - before)

    monkeypatch.setattr(calibration, "_stats", stats)
    monkeypatch.setattr(calibration, "joined_stats", lambda *_: None)
    monkeypatch.setattr(calibration, "warn_of_unreached", lambda *_: None)
    monkeypatch.setattr(calibration, "_whole_graph", lambda *_: None)
    sq.calibrate_layers(directory, [np.arange(12).reshape(2, 6)])
    assert alive == [0, 1, 1, 1, 1, 0]  # the embedding, the layers, the head


@pytest.mark.slow
def test_nothing_of_a_layer_is_kept(tmp_path, monkeypatch):
    """The same, with the calibration of each layer."""
    config = CONFIG | {"num_hidden_layers": 3, "intermediate_size": 28}
    directory = write(tmp_path / "model", config, tensors(config))
    held = lambda: sum(x.shape == (28, 12) for x in jax.live_arrays())
    before, alive = held(), []
    calibrate = calibration._stats

    def stats(*args):
        alive.append(held() - before)
        return calibrate(*args)

    monkeypatch.setattr(calibration, "_stats", stats)
    sq.calibrate_layers(directory, [np.arange(12).reshape(2, 6)])
    assert alive == [0, 1, 1, 1, 0]


@pytest.mark.slow
def test_a_broken_layer_is_named():
    model = Model(SMALL)
    params = random_params(model)
    up = params["model"]["layers"]["0"]["mlp"]["up_proj"]
    up["kernel"] = up["kernel"].at[0, 0].set(jnp.inf)
    with pytest.raises(ValueError, match="model/layers/0: parameter mlp/up_proj/kernel"):
        sq.calibrate_layers((model, params), [random_ids(1, 4)])


MODEL = Model(GROUPED)
SHAPES = jax.eval_shape(MODEL.init, jax.random.key(0))
REFUSALS = {
    "no batches": (lambda: ((MODEL, SHAPES), []), "batches is empty"),
    "one batch": (lambda: ((MODEL, SHAPES), random_ids(2, 4)), "expected an iterable of batches"),
    "no token ids": (lambda: ((MODEL, SHAPES), [jnp.ones((2, 3))]), "batch 0: ids: expected integ"),
    "one axis": (lambda: ((MODEL, SHAPES), [jnp.arange(3)]), "batch 0: ids: expected an array"),
    "too long": (lambda: ((MODEL, SHAPES), [random_ids(1, 65)]), "expected at most 64"),
    "no source": (lambda: ("smollm2-135m", [random_ids(1, 4)]), "expected a directory with config"),
    "no model": (lambda: ((MODEL.apply, SHAPES), [random_ids(1, 4)]), "a sqjax.models.Model"),
    "a stack": (
        lambda: ((MODEL, sq.models.stack_layers(random_params(MODEL))), [random_ids(1, 4)]),
        "take it apart with sqjax.models.unstack_layers",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        sq.calibrate_layers(*arguments())
