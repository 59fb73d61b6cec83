"""Encoders of images against what torch transformers computes with the same tiny random checkpoint."""

import functools
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
import tiny_vision
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file
from slow import slow_but

import sqjax as sq
from sqjax.folding.find_graph import find_graph
from sqjax.folding.groups import Survey
from sqjax.models import (
    EncoderConfig,
    ImageText,
    Preprocessing,
    TextTowerConfig,
    TextTowerModel,
    VisionConfig,
    VisionModel,
    fuse,
    load,
    load_image_text,
    load_vision,
    partition_specs,
    stack_layers,
)
from sqjax.models import families as f
from sqjax.models.checkpoints.families.text_towers import TEXT_TOWERS
from sqjax.models.checkpoints.families.vision import PATCH_KERNEL, PATCHES
from sqjax.models.checkpoints.huggingface import read_config
from sqjax.models.vision import cut
from sqjax.program.facts import Program
from sqjax.program.trace import trace

CASES = tiny_vision.cases()
#: The outputs of torch -> the method that gives them.
METHODS = {"hidden": "apply", "pooled": "embed", "embeds": "embed", "logits": "classify"}


def written(case, version="4"):
    """(model, parameters) of a case's checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        return load_vision(tiny_vision.write(case, Path(folder) / "model", version))


@functools.cache
def loaded(name):
    """(the case, its model, its parameters)."""
    case = tiny_vision.load(name)
    return case, *written(case)


def richest(model):
    """The function that computes the most of a model."""
    if model.config.num_classes is not None:
        return model.classify
    return model.apply if model.config.pooling is None else model.embed


def config_of(name, **changes):
    return {**tiny_vision.load(name)["configs"]["4"], **changes}


def read(config):
    """The configuration that a config.json describes."""
    return read_config(config, config_type=VisionConfig)[1]


def tiny(**changes):
    """A model of one layer."""
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_layers": 1, "num_heads": 2}
    return VisionModel(VisionConfig(image_size=5, patch_size=2, **sizes, **changes))


# What torch computes ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_both_versions_of_the_configuration_are_one_model(name):
    configs = tiny_vision.load(name)["configs"]
    assert read(configs["4"]) == read(configs["5"])


@pytest.mark.parametrize("name", slow_but(CASES, "vit", "siglip"))
def test_outputs_are_those_of_torch(name):
    case, model, params = loaded(name)
    vectors = case["vectors"]
    compared = METHODS.keys() & vectors.keys()
    assert compared
    for key in compared:
        expected = vectors[key]
        got = jax.jit(getattr(model, METHODS[key]))(params, vectors["pixels"])
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_names_of_version_5_are_read():
    """It leaves the names of an image tower without their prefix."""
    case, model, params = loaded("clip_vision")
    assert case["dropped"]
    other, same = written(case, "5")
    assert other == model
    jax.tree.map(np.testing.assert_array_equal, same, params)


def both_towers(case):
    """(model, parameters) of a case's checkpoint with two towers."""
    with tempfile.TemporaryDirectory() as folder:
        return load_image_text(tiny_vision.write(case, Path(folder) / "model"))


@pytest.mark.parametrize("name", slow_but(["siglip", "clip_old", "clip"], "clip"))
@pytest.mark.slow
def test_images_and_texts_are_as_similar_as_in_torch(name):
    case = tiny_vision.load(name)
    model, params = both_towers(case)
    vectors = case["vectors"]

    def all_of(params, pixels, ids):
        texts = model.embed_texts(params, ids)
        return texts, model.similarity(params, pixels, ids)

    found = jax.jit(all_of)(params, vectors["pixels"], vectors["ids"])
    for got, key in zip(found, ("text_embeds", "similarity"), strict=True):
        expected = vectors[key]
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_number_that_is_stored_as_a_vector():
    """What scales a SigLIP's similarities, and what is added to them."""
    case = tiny_vision.load("siglip")
    _, params = both_towers(case)
    for name in ("logit_scale", "logit_bias"):
        assert params["texts"][name].shape == ()
        np.testing.assert_array_equal(params["texts"][name], tiny_vision.weights(case)[name][0])


def test_a_patch_times_its_kernel_is_the_convolution():
    """5 x 5 pixels of 2 channels in patches of 2: the last row and column are in none."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(-9, 9, (1, 5, 5, 2))
    stored = rng.integers(-9, 9, (8, 2, 2, 2))
    expected = np.zeros((1, 2, 2, 8), np.int64)
    for row, column in np.ndindex(2, 2):
        patch = pixels[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        expected[0, row, column] = np.einsum("rcd,odrc->o", patch, stored)
    config = tiny(num_channels=2).config
    (kernel,) = PATCHES.split(config, stored, [(8, 8)])
    got = np.asarray(cut(jnp.asarray(pixels, jnp.float32), 2)) @ kernel
    np.testing.assert_array_equal(got, expected.reshape(1, 4, 8))
    back = PATCHES.join(config, [jnp.asarray(kernel)])
    np.testing.assert_array_equal(back, stored)


def test_a_vit_without_a_pooler_embeds_its_class_token():
    """Nothing in config.json says whether there is one: the file does."""
    case = tiny_vision.load("vit")
    for part in ("weight", "bias"):
        del case["shapes"][f"pooler.dense.{part}"]
    model, params = written(case)
    assert model.config.pooler_size is None
    pixels = case["vectors"]["pixels"]
    got = jax.jit(model.embed)(params, pixels)
    expected = case["vectors"]["hidden"][:, 0]
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_a_family_from_outside(tmp_path):
    """A ViT's checkpoint under other names, with queries, keys and values as one tensor."""
    _, model, params = loaded("vit")
    layer, norms = "blocks.{layer}", ("input_layernorm", "post_attention_layernorm")
    family = f.Family(
        "timm_vit",
        fields={**f.FAMILIES["vit"].fields, "pooler_size": None},
        rows=(
            *f.tensor("cls_token", "model/class_token", f.WITH_BATCH_AXIS),
            *f.tensor("pos_embed", "model/embed_positions/embedding", f.WITH_BATCH_AXIS),
            *f.tensor("patch_embed.proj.weight", "model/embed_patches/kernel", f.PATCHES),
            *f.tensor("patch_embed.proj.bias", "model/embed_patches/bias"),
            *f.norm("norm", "model/norm"),
            *f.norm(f"{layer}.norm1", f"{f.OUR_LAYER}/{norms[0]}"),
            *f.norm(f"{layer}.norm2", f"{f.OUR_LAYER}/{norms[1]}"),
            *f.several(f"{layer}.attn.qkv", f.QKV),
            *f.dense(f"{layer}.attn.proj", f"{f.OUR_LAYER}/self_attn/o_proj"),
            *f.dense(f"{layer}.mlp.fc1", f"{f.OUR_LAYER}/mlp/up_proj"),
            *f.dense(f"{layer}.mlp.fc2", f"{f.OUR_LAYER}/mlp/down_proj"),
        ),
        config_type=f.VisionConfig,
    )
    tower = flatten_dict(params["model"], sep="/")
    tensors = {}
    for row in family.rows:
        for number in range(model.config.num_layers if "{layer}" in row.theirs else 1):
            paths = [path.format(layer=number).removeprefix("model/") for path in row.ours]
            theirs = row.layout.join(model.config, [tower[path] for path in paths])
            tensors[row.theirs.format(layer=number)] = np.ascontiguousarray(theirs)
    config = config_of("vit", model_type="timm_vit")
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    _, found = load_vision(tmp_path, families=[family])
    jax.tree.map(np.testing.assert_array_equal, found["model"], params["model"])


def test_what_a_file_says_twice_holds_as_its_older_object_says():
    """As in transformers, and all of it: what is not there has its default, 768 channels."""
    config = config_of("clip", vision_config_dict={"num_attention_heads": 8})
    found = read(config)
    assert (found.num_heads, found.hidden_size) == (8, 768)
    left_out = config_of("siglip", vision_config={})
    assert read(left_out).hidden_size == 768


# Forms of the parameters --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stack_and_fused_layers_compute_the_same():
    case, model, params = loaded("siglip")
    pixels = case["vectors"]["pixels"]
    expected = jax.jit(model.embed)(params, pixels)
    again = VisionModel(model.config, remat=True)
    for form in (stack_layers(params), fuse(params)):
        np.testing.assert_allclose(jax.jit(again.embed)(form, pixels), expected, atol=1e-5)


def test_specs_split_the_layers_by_their_names():
    specs = partition_specs(jax.eval_shape(tiny().init, jax.random.key(0)))
    layer = specs["model"]["layers"]["0"]
    assert layer["mlp"]["up_proj"]["kernel"] == jax.sharding.PartitionSpec(None, "model")


def test_bfloat16_is_computed_in_bfloat16():
    model = tiny(embedding_norm=True)
    params = jax.eval_shape(lambda key: model.init(key, jnp.bfloat16), jax.random.key(0))
    pixels = jax.ShapeDtypeStruct((2, 5, 5, 3), jnp.float32)
    assert jax.eval_shape(model.apply, params, pixels).dtype == jnp.bfloat16
    dots = jaxprs.dots(jaxprs.of(model.apply, params, pixels))
    assert {dot.rhs for dot in dots} == {"bfloat16"}


# Smoothing and int8 -------------------------------------------------------------------------------

#: {case: the groups in a layer, and outside of layers}: norm to q k v, v to o, norm to up; DINOv2's
#: gated one has up to down too.
GROUPS = {
    "vit": (3, 1),  # the last norm to the pooler
    "vit_classes": (3, 1),
    "clip": (3, 1),  # the last norm to the projection
    "dinov2_classes": (4, 1),
    "siglip": (3, 3),  # the last norm to the pooler's k v, its v to o, its norm to up
}


def kernels(groups):
    """The paths of the kernels of each group, without the numbers of layers."""
    return [tuple(sorted(path for path, _ in group.sites)) for group in groups]


def test_the_groups_of_a_layer():
    """Found in the program; `test_the_groups_that_fold_and_int8` runs it."""
    model = tiny(pooler_size=4)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    program, _ = trace(model.embed, params, (jnp.ones((1, 5, 5, 3)),), {})
    graph = find_graph(Survey.of(Program(program), {}))
    layer = "model/layers/0"
    attention = f"{layer}/self_attn"
    assert sorted(kernels(graph.groups)) == [
        (f"{layer}/mlp/up_proj/kernel",),
        tuple(f"{attention}/{part}_proj/kernel" for part in "kqv"),
        (f"{attention}/o_proj/kernel",),
        ("pooler/kernel",),
    ]
    assert PATCH_KERNEL in [site.path for site in graph.sites]


@pytest.mark.slow
@pytest.mark.parametrize("name", GROUPS)
def test_the_groups_that_fold_and_int8(name):
    case, model, params = loaded(name)
    run, pixels = richest(model), jnp.asarray(case["vectors"]["pixels"])
    stats = sq.calibrate(run, params, [pixels])
    in_layer, outside = GROUPS[name]
    assert PATCH_KERNEL in [site.path for site in stats.graph.sites]
    assert len(stats.graph.groups) == in_layer * model.config.num_layers + outside
    compiled = jax.jit(run)
    expected = compiled(params, pixels)
    scales = sq.scales(params, stats, 0.5)
    smoothed = sq.fold(params, stats.graph, scales)
    got = compiled(smoothed, pixels)
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())
    rules = {"self_attn": sq.W8A8_O1, ".*": sq.W8A8_O3}
    qparams = sq.quantize(smoothed, sq.fold_stats(stats, scales), rules)
    int8 = jax.jit(sq.quantized(run))
    dots = jaxprs.dots(int8.trace(qparams, pixels).jaxpr)
    # Every site, so that of the patches too.
    assert [dot.dtypes for dot in dots].count(jaxprs.INT8_DOT) == len(stats.graph.sites)
    error = np.sqrt(np.mean((int8(qparams, pixels) - expected) ** 2) / np.mean(expected**2))
    assert 0 < error < 0.1


@pytest.mark.slow
@pytest.mark.every_case
def test_two_towers_smoothed_and_in_int8():
    """Of both towers: 3 groups in each layer, and the last norm to the projection."""
    case = tiny_vision.load("clip")
    model, params = both_towers(case)
    batch = jnp.asarray(case["vectors"]["pixels"]), jnp.asarray(case["vectors"]["ids"])
    stats = sq.calibrate(model.similarity, params, [batch])
    assert len(stats.graph.groups) == 2 * (3 * 2 + 1)
    expected = case["vectors"]["similarity"]
    smoothed = jax.jit(model.similarity)(sq.smooth(params, stats, 0.5), *batch)
    np.testing.assert_allclose(smoothed, expected, atol=2e-5 * np.abs(expected).max())
    qparams = sq.smoothquant(model.similarity, params, [batch], 0.5, sq.W8A8)
    got = jax.jit(sq.quantized(model.similarity))(qparams, *batch)
    assert 0 < np.abs(got - expected).max() < 0.1 * np.abs(expected).max()


# What is wrong ------------------------------------------------------------------------------------

WRONG = {
    "a patch that is larger than the image": (
        config_of("vit", patch_size=16),
        r"VisionConfig.patch_size: expected at most the image size 12, got 16 \(from patch_size",
    ),
    "an image of two sizes": (
        config_of("vit", image_size=[12, 12]),
        r"image_size: expected a whole number from 1 to 2147483647, got \[12, 12\]",
    ),
    "an image beyond an array": (
        config_of("vit", image_size=2**20, patch_size=2**19),
        r"VisionConfig.image_size: expected an image of at most .*\(from image_size\)",
    ),
    "very many patches": (
        config_of("vit", image_size=2**14, patch_size=1),
        "VisionConfig.image_size: expected at most 65536 patches, got 268435456 of 1 x 1",
    ),
    "heads that do not divide": (
        config_of("siglip_vision", num_attention_heads=5),
        "hidden_size: expected a multiple of num_attention_heads = 5, got 32",
    ),
    "heads in a part": (
        config_of("clip", vision_config={"num_attention_heads": 5}),
        "vision_config: hidden_size: expected a multiple of num_attention_heads = 5, got 768",
    ),
    "activation": (
        config_of("clip_vision", hidden_act="gelu_python"),
        "hidden_act: expected one of .*'quick_gelu'.*, got 'gelu_python'",
    ),
    "layers": (config_of("vit", num_hidden_layers=0), "num_hidden_layers: expected a whole number"),
    "no object": (
        config_of("siglip", vision_config=3),
        "vision_config: expected an object with names, got 3",
    ),
    "epsilon": (
        config_of("vit", layer_norm_eps="small"),
        "layer_norm_eps: expected a finite number of at least 0, got 'small'",
    ),
    "pooler": (config_of("vit", pooler_act="sign"), "pooler_act: expected one of .*'tanh'"),
    "classes": (config_of("vit_classes", id2label=[]), "id2label: expected an object with names"),
    "another kind": ({"model_type": "llama"}, "this is a decoder: sqjax.models.load loads it"),
}


@pytest.mark.parametrize("case", WRONG)
def test_configurations_that_are_refused(case):
    config, message = WRONG[case]
    with pytest.raises(ValueError, match=f"config.json(.|\n)*{message}"):
        read(config)


WRONG_TEXTS = {
    "heads": (
        {"num_attention_heads": 7},
        "text_config: hidden_size: expected a multiple of num_attention_heads = 7, got 512",
    ),
    "end": (
        {"eos_token_id": [1, 2]},
        r"text_config: eos_token_id: expected a token id, got \[1, 2",
    ),
    "positions": ({"max_position_embeddings": 0}, "max_position_embeddings: expected a whole"),
}


@pytest.mark.parametrize("case", WRONG_TEXTS)
def test_text_towers_that_are_refused(case):
    part, message = WRONG_TEXTS[case]
    config = config_of("clip", text_config=part)
    with pytest.raises(ValueError, match=f"config.json(.|\n)*{message}"):
        read_config(config, families=TEXT_TOWERS, config_type=TextTowerConfig)


def test_texts_that_are_refused():
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_layers": 1, "num_heads": 2}
    encoder = EncoderConfig(32, **sizes, max_length=4)
    texts = TextTowerModel(TextTowerConfig(encoder=encoder, projection_size=6))
    model = ImageText(tiny(projection_size=6), texts)
    with pytest.raises(ValueError, match=r"tokens: expected at most 4 .*, got 5; .* cut the texts"):
        model.embed_texts({"texts": {}}, np.zeros((1, 5), np.int32))


WRONG_FIELDS = {
    "no class token": (
        {"class_token": False},
        "VisionConfig.class_token: expected one, because the pooling",
    ),
    "nothing pooled": (
        {"pooling": None, "projection_size": 4},
        "VisionConfig.pooling: expected one for the matmuls that follow it, got None",
    ),
    "a norm of what is not picked": (
        {"final_norm": "pooled", "pooling": "attention"},
        "VisionConfig.final_norm: expected 'tokens', .*, got 'pooled' and the pooling 'attention'",
    ),
    "an unknown norm": ({"final_norm": "all"}, "VisionConfig.final_norm: expected one of"),
    "heads": ({"num_heads": 3}, "VisionConfig.hidden_size: expected a multiple of num_heads = 3"),
}


@pytest.mark.parametrize("case", WRONG_FIELDS)
def test_fields_that_are_refused(case):
    changes, message = WRONG_FIELDS[case]
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ValueError, match=message):
        VisionConfig(**{"image_size": 4, "patch_size": 2, **sizes, **changes})


def test_a_head_of_classes_must_be_there(tmp_path):
    case = tiny_vision.load("vit_classes")
    del case["shapes"]["classifier.weight"]
    directory = tiny_vision.write(case, tmp_path)
    with pytest.raises(ValueError, match="classifier/kernel: expected a tensor for it, got none"):
        load_vision(directory)


def test_positions_of_another_size_are_refused(tmp_path):
    """A checkpoint whose config.json says another image size: positions are not interpolated."""
    case = tiny_vision.load("siglip_vision")
    case["configs"]["4"]["image_size"] = 16
    directory = tiny_vision.write(case, tmp_path)
    name = r"embeddings\.position_embedding\.weight"
    with pytest.raises(ValueError, match=rf"{name}: expected shape \(16, 32\), got \(9, 32\)"):
        load_vision(directory)


def test_the_other_loaders_are_named(tmp_path):
    directory = tiny_vision.write(tiny_vision.load("clip_vision"), tmp_path)
    with pytest.raises(ValueError, match=r"an encoder of images: sqjax\.models\.load_vision loads"):
        load(directory)


PIXELS = {
    "channels in front": (
        np.zeros((1, 3, 5, 5), np.float32),
        r"pixels: expected an array \(batch, rows, columns, channels\) = "
        r"\('batch', 5, 5, 3\), got \(1, 3, 5, 5\); .*put the channels last",
    ),
    "another size": (np.zeros((2, 6, 6, 3), np.float32), r"got \(2, 6, 6, 3\); resize the images"),
    "channels": (np.zeros((2, 5, 5, 1), np.float32), r"got \(2, 5, 5, 1\)"),
    "one image": (np.zeros((5, 5, 3), np.float32), r"got \(5, 5, 3\)"),
    "no image": (np.zeros((0, 5, 5, 3), np.float32), r"got \(0, 5, 5, 3\)"),
    "integers": (np.zeros((2, 5, 5, 3), np.uint8), "pixels: expected floats, got uint8"),
    "a list": ([[1.0]], "got list"),
}


@pytest.mark.parametrize("case", PIXELS)
def test_pixels_that_are_refused(case):
    pixels, message = PIXELS[case]
    with pytest.raises(ValueError, match=message):
        tiny().apply({}, pixels)


def test_what_a_model_does_not_compute_is_refused():
    pixels = np.zeros((1, 5, 5, 3), np.float32)
    with pytest.raises(ValueError, match="classify: expected a model with a head of classes"):
        tiny().classify({}, pixels)
    with pytest.raises(ValueError, match="embed: expected a model with a pooling, got one without"):
        tiny(pooling=None).embed({}, pixels)
    with pytest.raises(ValueError, match=r"preprocess: expected a preprocessor_config\.json"):
        tiny().preprocess(pixels.astype(np.uint8))


# Preprocessing ------------------------------------------------------------------------------------

HOW = {"image_mean": [0.5, 0.25, 0.125], "image_std": [0.5, 0.75, 2.0]}


def with_preprocessor(directory, **keys):
    """The model of a tiny ViT with such a preprocessor_config.json."""
    tiny_vision.write(tiny_vision.load("vit"), directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(keys))
    return load_vision(directory)[0]


def test_preprocessing_is_that_of_the_file(tmp_path):
    model = with_preprocessor(tmp_path, **HOW)
    images = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3), np.uint8)
    expected = (images / 255.0 - np.array(HOW["image_mean"])) / np.array(HOW["image_std"])
    np.testing.assert_allclose(model.preprocess(images), expected, atol=1e-6)
    with pytest.raises(ValueError, match="images: expected 8-bit integers, got int32"):
        model.preprocess(images.astype(np.int32))


def test_steps_of_preprocessing_may_be_left_out(tmp_path):
    bare = with_preprocessor(tmp_path, do_rescale=False, do_normalize=False)
    assert bare.preprocessing == Preprocessing(1.0, (0.0,) * 3, (1.0,) * 3)


WRONG_HOW = {
    "no mean": (
        {"image_std": [1.0] * 3},
        "image_mean: expected a list of 3 finite numbers.*, got none",
    ),
    "two of three": (
        {**HOW, "image_mean": [1.0, 2.0]},
        r"image_mean: expected a list of 3 finite numbers, one for each channel, got \[1.0, 2.0\]",
    ),
    "no spread": (
        {**HOW, "image_std": [1.0, 0.0, 1.0]},
        r"image_std = \[1.0, 0.0, 1.0\]: expected numbers above 0",
    ),
    "no number": (
        {**HOW, "image_mean": [float("nan"), 0.0, 0.0]},
        r"image_mean: expected a list of 3 finite numbers.*, got \[nan, 0.0, 0.0\]",
    ),
    "too large": (
        {**HOW, "image_std": [1.0, 1.0, 10**400]},
        "image_std: expected a list of 3 finite numbers",
    ),
    "scale": ({**HOW, "rescale_factor": -1}, "rescale_factor: expected a finite number above 0"),
}


@pytest.mark.parametrize("case", WRONG_HOW)
def test_preprocessing_that_is_refused(case, tmp_path):
    keys, message = WRONG_HOW[case]
    with pytest.raises(ValueError, match=f"(preprocessor_config.json(.|\n)*)?{message}"):
        with_preprocessor(tmp_path, **keys)
