"""Models saved whole: any scheme, bit for bit, ready to run; what was changed or is another's is refused."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoint
import tiny_vision
from flax.traverse_util import flatten_dict, unflatten_dict
from hf_directories import CONFIG, write
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_llama import random_params
from untyped import untyped

import sqjax as sq
from sqjax.models import (
    Model,
    fuse,
    llama_config,
    load,
    load_encoder,
    load_image_text,
    load_model,
    load_vision,
    save,
    save_huggingface,
    stack_layers,
)
from sqjax.weights.quantize import quantize_weight

LLAMA = CONFIG | {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 4}
KERNEL = "model/layers/0/mlp/up_proj/kernel"
IDS = jnp.arange(16).reshape(2, 8)


def assert_same(tree, expected):
    """Bit for bit, quantized leaves too."""
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Llama's directory, with files that a tokenizer could have, and one of weights beside them."""
    directory = write(tmp_path_factory.mktemp("llama") / "source", LLAMA)
    (directory / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    return directory


@functools.cache
def of_source(source):
    """The model, its parameters, and these with one quantized leaf."""
    model, params = load(source)
    flat = flatten_dict(params, sep="/")
    flat[KERNEL] = quantize_weight(flat[KERNEL], (0,), sq.W8A8)
    return model, params, unflatten_dict(flat, sep="/")


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


SCHEMES = {
    "down_proj": sq.W4A16.replace(weight=sq.Int4(group_size=8, zero_point=True)),
    "up_proj": sq.W8A8_O3.replace(smoothing=0.5),
    "q_proj": sq.W8A8.replace(outliers=1.0),
    "k_proj": sq.FP8,
    "v_proj": sq.W4A8.replace(weight=sq.Int4(group_size=8, zero_point=True, two_level=True)),
    "o_proj": None,
    ".": sq.W8A8,
}


def test_a_model_comes_back(tmp_path, source):
    model, params, qparams = of_source(source)
    save(tmp_path / "q", model, qparams, like=source, max_shard_bytes=12_000)
    assert names_in(tmp_path / "q") == [
        "config.json",
        "sqjax-00001-of-00002.safetensors",
        "sqjax-00002-of-00002.safetensors",
        "sqjax.json",
        "tokenizer_config.json",
    ]
    again, same = load(tmp_path / "q")
    assert again == model == load_model(tmp_path / "q")
    assert_same(same, qparams)
    assert_same(sq.load(tmp_path / "q"), qparams)
    # How this one was made is not how the next one is: commands write that beside it, afterwards.
    (tmp_path / "q/recipe.yaml").write_text("command: quantize")
    # What was saved can be the source of the next.
    save(tmp_path / "next", again, params, like=tmp_path / "q")
    assert_same(load(tmp_path / "next")[1], params)
    assert len(names_in(tmp_path / "next")) == 4


@pytest.mark.slow
def test_a_model_comes_back_with_any_schemes(tmp_path, source):
    model, params, _ = of_source(source)
    stats = sq.calibrate(model.apply, params, [IDS])
    qparams = sq.quantize(params, stats, SCHEMES)
    save(tmp_path / "q", model, qparams, like=source, stats=stats)
    same = load(tmp_path / "q")[1]
    assert_same(same, qparams)
    assert_same(sq.load_saved(tmp_path / "q").stats, stats)
    run = jax.jit(sq.quantized(model.apply))
    np.testing.assert_array_equal(run(same, IDS), run(qparams, IDS))
    assert run._cache_size() == 1  # nothing was compiled anew


FORMS = {
    "stacked": stack_layers,
    "fused": fuse,
    "bfloat16": lambda x: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), x),
}


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_come_back_as_they_are(tmp_path, source, form):
    model, params, _ = of_source(source)
    tree = FORMS[form](params)
    save(tmp_path / "new", model, tree, like=source)
    assert_same(load(tmp_path / "new")[1], tree)


@pytest.mark.slow
def test_fused_and_quantized(tmp_path, source):
    model, params, _ = of_source(source)
    fused = fuse(params)
    qparams = sq.quantize(fused, sq.calibrate(model.apply, fused, [IDS]), sq.W8A8)
    save(tmp_path / "new", model, qparams, like=source)
    assert_same(load(tmp_path / "new")[1], qparams)


def test_a_llama_needs_no_source(tmp_path):
    model = Model(llama_config(32, 8, 16, 1, 2, 1, 4))
    params = random_params(model)
    save(tmp_path / "new", model, params)
    again, same = load(tmp_path / "new")
    assert again == model
    assert_same(same, params)
    assert names_in(tmp_path / "new") == [
        "config.json",
        "sqjax-00001-of-00001.safetensors",
        "sqjax.json",
    ]


def test_a_quantized_source_is_no_more_quantized_than_what_is_saved(tmp_path, source):
    model, params, _ = of_source(source)
    (tmp_path / "like").mkdir()
    theirs = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    config = json.dumps(LLAMA | {"quantization_config": theirs})
    (tmp_path / "like/config.json").write_text(config)
    save(tmp_path / "new", model, params, like=tmp_path / "like")
    written = json.loads((tmp_path / "new/config.json").read_text())
    assert written == LLAMA | {"quantization_config": None}
    assert_same(load(tmp_path / "new")[1], params)


ENCODERS = {
    "roberta": ("encoders", load_encoder, "an encoder of texts: sqjax.models.load_encoder"),
    "clip": (None, load_vision, "an encoder of images: sqjax.models.load_vision"),
}


def directory_of(name, path):
    folder = ENCODERS[name][0]
    if folder is None:
        return tiny_vision.write(tiny_vision.load(name), path)
    return tiny_checkpoint.write(tiny_checkpoint.load(name, folder), path)


@pytest.mark.parametrize("name", ["roberta", "clip"])
def test_encoders_come_back(tmp_path, name):
    _, loader, message = ENCODERS[name]
    source = directory_of(name, tmp_path / "source")
    model, params = loader(source)
    save(tmp_path / "new", model, params, like=source)
    again, same = loader(tmp_path / "new")
    assert again == model
    assert_same(same, params)
    with pytest.raises(ValueError, match=f"new.*{message} loads it"):
        load(tmp_path / "new")
    if name == "clip":
        with pytest.raises(ValueError, match="expected the text tower of two, got an encoder of"):
            load_image_text(tmp_path / "new")


def test_an_optional_part_stays_away(tmp_path):
    """A ViT's pooler: no key of config.json says that there is none."""
    case = tiny_vision.load("vit")
    for part in ("weight", "bias"):
        del case["shapes"][f"pooler.dense.{part}"]
    source = tiny_vision.write(case, tmp_path / "source")
    model, params = load_vision(source)
    save(tmp_path / "new", model, params, like=source)
    again, same = load_vision(tmp_path / "new")
    assert again == model
    assert again.config.pooler_size is None
    assert_same(same, params)


def test_leaves_are_placed_by_the_paths_of_float_leaves(tmp_path, source):
    model, _, qparams = of_source(source)
    save(tmp_path / "q", model, qparams, like=source)
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])

    def placement(path, shape):
        assert len(shape) in (1, 2)
        return NamedSharding(mesh, P(None, "x")) if path.endswith("up_proj/kernel") else None

    got = load(tmp_path / "q", placement=placement)[1]
    assert_same(got, qparams)
    kernel = flatten_dict(got, sep="/")[KERNEL]
    assert {x.data.shape for x in kernel.tensor.values.addressable_shards} == {(8, 16)}
    assert len(got["model"]["norm"]["weight"].sharding.device_set) == 1


# What is refused ----------------------------------------------------------------------------------


def test_what_is_saved_is_checked(tmp_path, source):
    model, params, _ = of_source(source)
    without = {**params, "lm_head": {}}
    other = Model(llama_config(32, 8, 16, 1, 2, 1, 4))
    refused = {
        "lm_head/kernel: expected a leaf of shape": lambda: save(
            tmp_path / "x", model, without, like=source
        ),
        "model.config.vocab_size: expected 31": lambda: save(
            tmp_path / "x", other, params, like=source
        ),
        "like: expected the directory that": lambda: save(
            tmp_path / "x", model, params, like=tmp_path
        ),
        "stats: expected the Stats": lambda: save(
            tmp_path / "x", model, params, like=source, stats={}
        ),
        "does not hold like": lambda: save(source, model, params, like=source, overwrite=True),
        "expected a model as sqjax.models.load": lambda: save(tmp_path / "x", params, model),
    }
    for message, call in refused.items():
        with untyped(), pytest.raises(ValueError, match=f"save: .*{message}|^{message}"):
            call()
    assert names_in(tmp_path) == []


def test_a_directory_is_replaced_when_that_is_asked_for(tmp_path, source):
    model, params, _ = of_source(source)
    save(tmp_path / "new", model, params, like=source)
    with pytest.raises(ValueError, match=r"save: .*pass overwrite=True"):
        save(tmp_path / "new", model, params, like=source)
    zeros = jax.tree.map(jnp.zeros_like, params)
    save(tmp_path / "new", model, zeros, like=source, overwrite=True)
    assert_same(load(tmp_path / "new")[1], zeros)
    # A tree alone would lose the model's files.
    with pytest.raises(ValueError, match=r"got one that holds \['config.json', 'tokenizer_config"):
        sq.save(tmp_path / "new", params)


def test_a_file_that_was_changed_is_refused(tmp_path, source):
    model, params, _ = of_source(source)
    save(tmp_path / "new", model, params, like=source)
    for name in ("config.json", "tokenizer_config.json"):
        file = tmp_path / "new" / name
        text = file.read_text()
        file.write_text(text.replace('"', '"', 1) + " ")
        with pytest.raises(ValueError, match=f"{name}: expected the file with the checksum that"):
            load(tmp_path / "new")
        file.unlink()
        with pytest.raises(ValueError, match=f"{name}: expected this file, which was saved with"):
            load(tmp_path / "new")
        file.write_text(text)
    assert_same(load(tmp_path / "new")[1], params)
    shard = tmp_path / "new/sqjax-00001-of-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x99")
    with pytest.raises(ValueError, match=r"safetensors: model/.*expected an array with the check"):
        load(tmp_path / "new")


@pytest.mark.slow
def test_what_other_functions_say_of_it(tmp_path, source):
    model, params, _ = of_source(source)
    save(tmp_path / "new", model, params, like=source)
    with pytest.raises(
        ValueError, match=r"dtype: expected none, or one of \['float32'\], .*bfloat"
    ):
        load(tmp_path / "new", jnp.bfloat16)
    for call in (
        lambda: sq.load_quantized(tmp_path / "new"),
        lambda: save_huggingface(tmp_path / "x", model, params, like=tmp_path / "new"),
    ):
        with pytest.raises(ValueError, match=r"got neither \(sqjax.models.save wrote it, and"):
            call()
    # A tree alone is no model.
    sq.save(tmp_path / "tree", params)
    with pytest.raises(ValueError, match=r"tree: expected a model that sqjax.models.save wrote"):
        load(tmp_path / "tree")
