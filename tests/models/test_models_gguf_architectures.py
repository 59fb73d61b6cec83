"""GGUF files of every architecture, written as llama.cpp's converter does, against Hugging Face's own form."""

from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoint as tiny
from slow import slow_but

from sqjax.models import load
from sqjax.models.checkpoints.gguf_architectures import (
    ARCHITECTURES,
    HARMLESS,
    KEYS,
    ONE_ADDED,
    PAIRS,
    ROWS,
    SCALINGS,
    STACKED,
    TYPE,
)
from sqjax.models.checkpoints.gguf_config import read_config
from sqjax.models.checkpoints.huggingface import read_config as read_config_json
from sqjax.models.checkpoints.mapping import Source, assemble
from sqjax.models.config import LayerKind
from sqjax.models.rope import LongRope, Rope, Yarn, rotary_table

gguf = pytest.importorskip("gguf")
converted = pytest.importorskip("gguf_converted")

CASES = converted.CASES


def checkpoint(name):
    """(case, config.json, weights)."""
    case = tiny.load(name)
    config, weights = case["configs"]["4"], tiny.weights(case)
    if name == "qwen2_moe":
        # llama.cpp has experts in every layer of it; the tiny one has none in layer 1.
        config = {**config, "mlp_only_layers": []}
        like = {k: v for k, v in weights.items() if k.startswith("model.layers.0.mlp.")}
        weights = {k: v for k, v in weights.items() if not k.startswith("model.layers.1.mlp.")}
        for key, array in like.items():
            weights[key.replace("layers.0", "layers.1")] = 2 * array
    return case, config, weights


def from_huggingface(config, weights):
    family, ours = read_config_json(config)
    shapes = {name: array.shape for name, array in weights.items()}
    source = Source("weights", shapes, lambda name: weights[name])
    return ours, assemble(source, family, ours, jnp.float32)


def assert_close(got, expected):
    """Two configurations: numbers that a file rounds to float32 may differ by that."""
    if isinstance(got, dict):
        assert got.keys() == expected.keys()
        got, expected = list(got.values()), list(expected.values())
    if isinstance(got, list | tuple):
        for one, other in zip(got, expected, strict=True):
            assert_close(one, other)
    elif isinstance(got, float) and expected is not None:
        assert got == pytest.approx(expected, rel=1e-7)
    else:
        assert got == expected


@pytest.mark.parametrize(
    "name", slow_but(CASES, "llama_biases", "mixtral", "qwen3_moe", "gemma3_text", "phi4_mini")
)
def test_the_same_model_as_from_hugging_face(tmp_path, name):
    _, config, weights = checkpoint(name)
    model, params = load(converted.convert(tmp_path / "model.gguf", config, weights))
    ours, expected = from_huggingface(config, weights)
    read = model.config
    if name == "llama_llama3":
        # The file says which factors come of it, and not of what.
        ours = replace(ours, kinds=read.kinds)
    assert_close(asdict(read), asdict(ours))
    # Of Gemma's gains 1 + w is stored, in float32.
    tolerance = 2.0**-23 if "gemma" in name else 0.0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 0, tolerance), params, expected)


@pytest.mark.slow
@pytest.mark.each_case
@pytest.mark.parametrize("name", [name for name in CASES if name != "qwen2_moe"])
def test_logits_are_those_of_torch(tmp_path, name):
    case, config, weights = checkpoint(name)
    model, params = load(converted.convert(tmp_path / "model.gguf", config, weights))
    got = jax.jit(model.apply)(params, jnp.asarray(case["vectors"]["ids"]))
    expected = case["vectors"]["logits"]
    np.testing.assert_allclose(got, expected, 0, 1e-5 * np.abs(expected).max())


def test_layouts_are_each_others_inverse():
    rng = np.random.default_rng(0)
    _, config = read_config("file", *metadata("qwen3"))
    shapes = {PAIRS: (8, 24), ONE_ADDED: (8,), STACKED: (3, 8, 6)}
    for layout, shape in shapes.items():
        leaf = rng.integers(-9, 9, shape).astype(np.float32)
        (back,) = layout.split(config, np.asarray(layout.join(config, [leaf])), [shape])
        np.testing.assert_array_equal(back, leaf)


def test_names_are_those_of_the_gguf_package():
    """Every tensor of every architecture has a row, and every key is one of the package's."""
    keys = gguf.Keys
    known = {
        value.removeprefix("{arch}.")
        for group in (keys.LLM, keys.Attention, keys.Rope)
        for value in vars(group).values()
        if isinstance(value, str)
    }
    assert set(KEYS) <= known
    theirs = {name.format(bid="{layer}") for name in gguf.TENSOR_NAMES.values()}
    for row in ROWS:
        if "{entry}" not in row.theirs:
            assert row.theirs.rpartition(".")[0] in theirs
    assert set(ARCHITECTURES) <= set(gguf.MODEL_ARCH_NAMES.values())


def test_experts_of_older_files_are_a_tensor_each(tmp_path):
    _, config, weights = checkpoint("mixtral")
    architecture, keys = converted.metadata(config)
    tensors = converted.tensors(config, weights)
    for name in [name for name in tensors if "_exps" in name]:
        for i, array in enumerate(tensors.pop(name)):
            tensors[name.replace("_exps", f".{i}")] = array
    _, params = load(converted.write(tmp_path / "model.gguf", architecture, keys, tensors))
    _, expected = from_huggingface(config, weights)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_matrix_of_one_row_may_be_a_vector(tmp_path):
    _, config, weights = checkpoint("qwen2_moe")
    architecture, keys = converted.metadata(config)
    tensors = converted.tensors(config, weights)
    for name, array in tensors.items():
        if name.endswith("ffn_gate_inp_shexp.weight"):
            tensors[name] = array[0]
    _, params = load(converted.write(tmp_path / "model.gguf", architecture, keys, tensors))
    gate = params["model"]["layers"]["2"]["mlp"]["shared_expert_gate"]["kernel"]
    expected = weights["model.layers.2.mlp.shared_expert_gate.weight"].T
    np.testing.assert_array_equal(gate, expected)


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_split_files(tmp_path, name):
    _, config, weights = checkpoint(name)
    architecture, keys = converted.metadata(config)
    tensors = converted.tensors(config, weights)
    names = sorted(tensors)
    for i in range(3):
        split = {"split.no": i, "split.count": 3, "split.tensors.count": len(names)}
        converted.write(
            tmp_path / f"model-{i + 1:05d}-of-00003.gguf",
            architecture,
            {**keys, **split} if i == 0 else split,
            {key: tensors[key] for key in names[i::3]},
        )
    model, params = load(tmp_path / "model-00002-of-00003.gguf")
    whole, expected = load(converted.convert(tmp_path / "whole.gguf", config, weights))
    assert model.config == whole.config
    jax.tree.map(np.testing.assert_array_equal, params, expected)


# Metadata -----------------------------------------------------------------------------------------


def metadata(name, changes=(), factors=None, tensors=None):
    """What `read_config` takes of a tiny checkpoint; None among the changes leaves a key out."""
    _, config, _ = checkpoint(name)
    architecture, keys = converted.metadata(config)
    keys = {k: v for k, v in {**keys, **dict(changes)}.items() if v is not None}
    whole = {f"{architecture}.{key}": value for key, value in keys.items()}
    shapes = {"token_embd.weight": (64, 32), **(tensors or {})}
    return {"general.architecture": architecture, **whole}, shapes, factors or {}


def config_of(name, changes=(), factors=None):
    _, config = read_config("file", *metadata(name, changes, factors))
    return config


def test_the_factors_of_llama_3_are_its_scaling():
    _, config, _ = checkpoint("llama_llama3")
    factors = {"rope_freqs.weight": converted.llama3_factors(config)}
    rope = config_of("llama_llama3", factors=factors).kinds[0].rope
    assert isinstance(rope.scaling, LongRope)
    assert rope.scaling.original_length == 2**31 - 1  # a text never outgrows it
    _, ours = read_config_json(config)
    positions = jnp.arange(40)[None]
    got, expected = (
        rotary_table(positions, one, 8, jnp.int32(40), jnp.float32)
        for one in (rope, ours.kinds[0].rope)
    )
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, 0, 1e-5)


def test_yarn_as_the_file_says():
    changes = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 16,
        "rope.scaling.yarn_attn_factor": 0.8,
        "rope.scaling.yarn_beta_fast": 30.0,
        "rope.scaling.yarn_beta_slow": 2.0,
    }
    scaling = config_of("qwen3", changes).kinds[0].rope.scaling
    assert scaling == Yarn(4.0, 16, fast=30.0, slow=2.0, attention_factor=0.8)
    del changes["rope.scaling.yarn_attn_factor"]
    scaling = config_of("qwen3", changes).kinds[0].rope.scaling
    assert scaling.attention_factor == pytest.approx(0.1 * np.log(4) + 1)


def test_a_factor_without_a_type_is_linear():
    scaling = config_of("llama", {"rope.scaling.factor": 8.0}).kinds[0].rope.scaling
    assert scaling.factor == 8.0
    none = {"rope.scaling.factor": 8.0, "rope.scaling.type": "none"}
    assert config_of("llama", none).kinds[0].rope.scaling is None


@pytest.mark.parametrize(
    ("name", "layers", "heads", "hidden", "expected"),
    [
        ("gemma2", 26, 8, 2304, 256**-0.5),
        ("gemma2", 46, 32, 4608, 144**-0.5),
        ("gemma3_text", 48, 16, 3840, 256**-0.5),
        ("gemma3_text", 62, 32, 5376, 168**-0.5),
    ],
)
def test_the_scale_of_gemma_where_the_file_says_none(name, layers, heads, hidden, expected):
    sizes = {
        "block_count": layers,
        "attention.head_count": heads,
        "embedding_length": hidden,
        "attention.key_length": 256,
        "attention.value_length": 256,
        "attention.scale": None,
        "attention.sliding_window_pattern": None,
    }
    config = config_of(name, sizes)
    assert config.query_scale == pytest.approx(expected)
    every = 2 if name == "gemma2" else 6
    full = [i for i in range(layers) if config.kind(i).sliding_window is None]
    assert full == list(range(every - 1, layers, every))


def test_which_layers_have_a_window():
    for pattern in (3, [True, True, False, True]):
        kinds = config_of("gemma2", {"attention.sliding_window_pattern": pattern}).kinds
        assert [kind.sliding_window for kind in kinds] == [5, 5, None, 5]
    none = {"attention.sliding_window": None, "attention.sliding_window_pattern": None}
    config = config_of("gemma3_text", none)
    assert [kind.sliding_window for kind in config.kinds] == [None]
    assert config.kinds[0].rope.scaling.factor == 8.0
    assert config_of("llama", {"attention.sliding_window": 7}).kinds == (LayerKind(7, Rope()),)


def test_numbers_are_the_decimals_that_were_rounded():
    rounded = float(np.float32(1e-6))
    config = config_of("qwen2", {"attention.layer_norm_rms_epsilon": rounded})
    assert rounded != 1e-6
    assert config.norm.eps == 1e-6
    assert config_of("llama", {"attention.scale": 0.0}).query_scale is None
    assert config_of("llama", {"attention.scale": 0.5}).query_scale == 0.5


SIZE = "a whole number from 1 to 2147483647"
WRONG = {
    "size text": ("qwen3", {"embedding_length": "32"}, f"embedding_length: expected {SIZE}, got '32'"),
    "size missing": ("qwen3", {"block_count": None}, f"qwen3.block_count: expected {SIZE}, got none"),
    "heads missing": (
        "llama",
        {"attention.head_count": None},
        f"llama.attention.head_count: expected {SIZE}, got none",
    ),
    "size zero": ("gemma", {"feed_forward_length": 0}, f"feed_forward_length: expected {SIZE}, got 0"),
    "size huge": ("gemma", {"embedding_length": 2**63}, f"embedding_length: expected {SIZE}, got 9223"),
    "size of each layer": (
        "qwen2",
        {"attention.head_count_kv": [2, 2]},
        f"qwen2.attention.head_count_kv: expected {SIZE}, got [2, 2]",
    ),
    "heads": (
        "qwen2",
        {"attention.head_count_kv": 3},
        "DecoderConfig.num_heads: expected a multiple of num_kv_heads = 3, got 4",
    ),
    "context": ("qwen2", {"context_length": None}, f"qwen2.context_length: expected {SIZE}, got none"),
    "eps": ("gemma2", {"attention.layer_norm_rms_epsilon": -1.0}, "epsilon: expected a finite number"),
    "eps missing": (
        "gemma2",
        {"attention.layer_norm_rms_epsilon": None},
        "gemma2.attention.layer_norm_rms_epsilon: expected a finite number of at least 0, got none",
    ),
    "theta": ("qwen3", {"rope.freq_base": float("nan")}, "rope.freq_base: expected a finite number above 0"),
    "head": ("qwen3", {"attention.value_length": 4}, "value_length: expected the head size 12, got 4"),
    "rotary": ("llama", {"rope.dimension_count": 4}, "dimension_count: expected the head size 8, got 4"),
    "rotary of phi": ("phi3", {"rope.dimension_count": 16}, "expected an even number of channels that turn"),
    "vocabulary": ("llama", {"vocab_size": 63}, "vocab_size: expected the embedding's rows 64, got 63"),
    "window of qwen": (
        "qwen2",
        {"attention.sliding_window": 4},
        "qwen2.attention.sliding_window = 4: expected no such key",
    ),
    "pattern of qwen": (
        "qwen3",
        {"attention.sliding_window_pattern": [True, False]},
        "qwen3.attention.sliding_window_pattern = ['sliding_attention', 'full_attention']: not",
    ),
    "pattern": (
        "gemma3_text",
        {"attention.sliding_window_pattern": [True]},
        "gemma3.attention.sliding_window_pattern: expected one for each of 4 layers, got 1",
    ),
    "pattern of texts": (
        "gemma3_text",
        {"attention.sliding_window_pattern": ["a"] * 4},
        "sliding_window_pattern: expected 'full_attention' and 'sliding_attention', got 'a'",
    ),
    "pattern of none": (
        "gemma3_text",
        {"attention.sliding_window_pattern": 0},
        f"gemma3.attention.sliding_window_pattern: expected {SIZE}, got 0",
    ),
    "cap": ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping: expected a finite number"),
    "cap of llama": (
        "llama",
        {"attn_logit_softcapping": 50.0},
        "llama.attn_logit_softcapping = 50.0: expected no such key",
    ),
    "second base": ("gemma2", {"rope.freq_base_swa": 1e4}, "gemma2.rope.freq_base_swa = 10000.0: expected no"),
    "many layers": ("gemma2", {"block_count": 2**31 - 1}, "gemma2.block_count: expected a whole number of layers"),
    "experts of qwen2": ("qwen2", {"expert_count": 4}, "qwen2.expert_count = 4: expected no such key"),
    "experts a token": ("mixtral", {"expert_used_count": None}, f"llama.expert_used_count: expected {SIZE}, got none"),
    "experts missing": ("qwen3_moe", {"expert_count": 0}, f"qwen3moe.expert_count: expected {SIZE}, got none"),
    "fewer experts": ("qwen3_moe", {"expert_used_count": 7}, "at most as many experts a token"),
    "gating": ("qwen3_moe", {"expert_gating_func": 2}, "qwen3moe.expert_gating_func = 2: expected 1; the model here"),
    "unknown": ("qwen3", {"logit_scale": 0.5}, "qwen3.logit_scale = 0.5: expected no such key; the model here"),
    "not causal": ("qwen3", {"attention.causal": False}, "qwen3.attention.causal = False: expected True; the model"),
    "type": (
        "llama",
        {"rope.scaling.type": "dynamic"},
        "llama.rope.scaling.type: expected one of ('none', 'linear', 'yarn', 'longrope', 'llama3'), got 'dynamic'",
    ),
    "type number": ("llama", {"rope.scaling.type": 3}, "llama.rope.scaling.type: expected one of"),
    "type alone": (
        "llama",
        {"rope.scaling.type": "linear"},
        "llama.rope.scaling.factor: expected a finite number above 0, got none",
    ),
    "factor": ("llama", {"rope.scaling.factor": -8.0}, "rope.scaling.factor: expected a finite number above 0"),
    "attention of linear": (
        "llama",
        {"rope.scaling.factor": 8.0, "rope.scaling.attn_factor": 0.5},
        "llama.rope.scaling.attn_factor = 0.5: expected 1; the model",
    ),
    "longrope alone": (
        "phi3",
        {"rope.scaling.type": "longrope"},
        "rope_factors_short.weight: expected a list of numbers, got none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_metadata_that_are_wrong(case):
    name, changes, message = WRONG[case]
    with pytest.raises(ValueError, match=r"^file") as caught:
        read_config("file", *metadata(name, changes))
    assert message in str(caught.value)
    assert "None" not in str(caught.value)
    assert len(str(caught.value).splitlines()) < 5


ANYTHING = (
    "x",
    -1,
    0,
    1,
    3,
    2**31 - 1,
    2**63,
    True,
    -0.5,
    1e300,
    float("nan"),
    [],
    [True] * 4,
    [[1], "a"],
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3_text", "mixtral", "phi3", "qwen2_moe", "gemma2"])
def test_any_value_of_any_key_is_read_or_refused_by_name(name):
    whole, shapes, factors = metadata(name)
    architecture = whole["general.architecture"]
    scaling = [key for _, keys in SCALINGS.values() for key in keys if "weight" not in key]
    for suffix in {*KEYS, *HARMLESS, *scaling, TYPE, "other"}:
        is_float = suffix.endswith(("scale", "softcapping"))
        for value in ANYTHING:
            value = float(value) if is_float and type(value) is int else value
            try:
                read_config("file", {**whole, f"{architecture}.{suffix}": value}, shapes, factors)
            except ValueError as error:
                # Where fields do not go together it may be another one that is named.
                text = str(error)
                assert text.startswith("file")
                assert any(
                    name in text for name in (f"{architecture}.", "DecoderConfig.", "Experts.")
                )
                assert "NoneType" not in text


FACTORS = {
    "shape": ("llama", [1.0, 2.0], {}, "expected 4 finite numbers above 0, one for each pair"),
    "zero": ("llama", [1.0, 2.0, 0.0, 8.0], {}, "rope_freqs.weight: expected 4 finite numbers"),
    "NaN": ("llama", [1.0, np.nan, 2.0, 8.0], {}, "rope_freqs.weight: expected 4 finite numbers"),
    "both": (
        "llama",
        [1.0, 1.0, 2.0, 8.0],
        {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        "rope_freqs.weight = [1.0, 1.0, 2.0, 8.0]: expected no such key; the model",
    ),
}


@pytest.mark.parametrize("case", FACTORS)
def test_factors_that_are_wrong(case):
    name, factors, changes, message = FACTORS[case]
    with pytest.raises(ValueError, match=r"^file") as caught:
        config_of(name, changes, {"rope_freqs.weight": np.float32(factors)})
    assert message in str(caught.value)


@pytest.mark.parametrize("name", [None, 3, ["llama"], "bert", "LLAMA"])
def test_other_architectures(name):
    with pytest.raises(ValueError, match=r"expected general.architecture to be one of \['gemma'"):
        read_config("file", {"general.architecture": name}, {}, {})


def test_every_problem_in_one_error(tmp_path):
    _, config, weights = checkpoint("gemma2")
    architecture, keys = converted.metadata(config)
    tensors = converted.tensors(config, weights)
    del tensors["blk.3.post_ffw_norm.weight"]
    tensors["blk.0.attn_q_norm.weight"] = np.ones(8, np.float32)
    tensors["rope_factors_long.weight"] = np.ones(4, np.float32)
    with pytest.raises(ValueError, match=r"rope_factors_long.weight = .*: expected no such key"):
        load(converted.write(
            tmp_path / "model.gguf", architecture, {**keys, "rope.scaling.type": "none"}, tensors
        ))  # fmt: skip
    del tensors["rope_factors_long.weight"]
    with pytest.raises(ValueError, match=r"2 problem\(s\)") as caught:
        load(converted.write(tmp_path / "model.gguf", architecture, keys, tensors))
    for line in (
        "blk.0.attn_q_norm.weight: expected no such tensor, got one of shape (8,)",
        "model/layers/3/post_feedforward_layernorm/weight: expected a tensor for it, got none",
    ):
        assert line in str(caught.value)
