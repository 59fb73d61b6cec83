"""What is refused of quantized checkpoints: one error that names the tensor or the key, and what is expected."""

import contextlib
import re
import warnings

import numpy as np
import pytest
import quantized_tensors as of_layouts
from hf_directories import CONFIG, tensors, write
from slow import slow_but

from sqjax.models import load
from sqjax.models.checkpoints.quantized.known import read_quantization

LLAMA = CONFIG | {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}
UP = "model.layers.0.mlp.up_proj"
TOKEN, CHANNEL, GROUPS = of_layouts.TOKEN, of_layouts.CHANNEL, of_layouts.GROUPS


def stored_in(draw):
    """The tensors of a checkpoint of which one module is quantized."""
    found = tensors(LLAMA)
    own, *_ = draw(np.random.default_rng(0), found.pop(f"{UP}.weight").shape)
    return found | {f"{UP}.{end}": x for end, x in own.items()}


def refused(directory, config, stored, *messages):
    with pytest.raises(ValueError, match=re.escape(str(directory))) as caught:
        load(write(directory, LLAMA | {"quantization_config": config}, stored))
    for message in messages:
        assert re.search(message, str(caught.value)), str(caught.value)
    return str(caught.value)


# Configurations -----------------------------------------------------------------------------------


def of_group(**changes):
    """A configuration of compressed-tensors, with other keys of its group."""
    config = of_layouts.compressed("int-quantized", CHANNEL)
    config["config_groups"]["group_0"] |= changes
    return config


AWQ, GPTQ = of_layouts.AWQ, of_layouts.GPTQ
GROUP = "config.json.*quantization_config: config_groups: group_0: "
CONFIGS = {
    "method": ({"quant_method": "bitsandbytes"}, r"one of \['awq', .*'gptq'\], got 'bitsandbytes'"),
    "fp8 without blocks": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        "activation_scheme: expected 'dynamic', got 'static'",
    ),
    "no method": ({"bits": 4}, r"quant_method to be one of \['awq', .*\], got None"),
    "no object": ([4], "quant_method to be one of .*, got None"),
    "unhashable": ({"quant_method": ["awq"]}, r"got \['awq'\]"),
    "awq bits": (AWQ | {"bits": 8}, "quantization_config: bits: expected 4, got 8"),
    "awq version": (AWQ | {"version": "gemv"}, r"version: expected one of \('gemm', .*got 'gemv'"),
    "awq group": (AWQ | {"group_size": 0}, "group_size: expected a number of channels, or -1"),
    "gptq bits": (GPTQ | {"bits": 3}, "quantization_config: bits: expected 4 or 8, got 3"),
    "gptq format": (
        GPTQ | {"checkpoint_format": "marlin"},
        r"checkpoint_format: expected one of \('gptq', 'gptq_v2'\), got 'marlin'",
    ),
    "gptq dynamic": (GPTQ | {"dynamic": {"-:.*up": {}}}, r"dynamic: expected \{\} \(nothing else"),
    "gptq words": (GPTQ | {"pack_dtype": "int16"}, "pack_dtype: expected 'int32' .*got 'int16'"),
    "format": (
        of_layouts.compressed("nvfp4-pack-quantized", CHANNEL),
        r"format: expected one of \('pack-quantized', .*got 'nvfp4-pack-quantized'",
    ),
    "status": (
        of_layouts.compressed("int-quantized", CHANNEL, quantization_status="frozen"),
        "quantization_status: expected 'compressed' .*got 'frozen'",
    ),
    "transform": (
        of_layouts.compressed(
            "int-quantized", CHANNEL, transform_config={"config_groups": {"a": 1}}
        ),
        r"transform_config: expected \{\} or .*got",
    ),
    "sparse": (
        of_layouts.compressed("int-quantized", CHANNEL, sparsity_config={"format": "bitmask"}),
        r"sparsity_config: format: expected 'dense', got 'bitmask'",
    ),
    "pattern": (
        of_layouts.compressed("int-quantized", CHANNEL, ignore=["re:("]),
        "ignore: expected a list of names, or of regular expressions",
    ),
    "no groups": (
        of_layouts.compressed("int-quantized", CHANNEL, config_groups={}),
        "config_groups: expected an object with at least one group, got {}",
    ),
    "groups": (
        of_layouts.compressed("int-quantized", CHANNEL, config_groups=[1]),
        r"config_groups: expected an object with at least one group, got \[1\]",
    ),
    "group": (
        of_layouts.compressed("int-quantized", CHANNEL, config_groups={"W8A8": ["Linear"]}),
        r"config_groups: W8A8: expected an object with names, got \['Linear'\]",
    ),
    "targets": (of_group(targets="Linear"), GROUP + "targets: expected a list of names"),
    "6 bits": (
        of_group(weights=CHANNEL | {"num_bits": 6}),
        GROUP + "weights: num_bits: expected 4 or 8, got 6",
    ),
    "float of 4 bits": (
        of_group(weights=CHANNEL | {"num_bits": 4, "type": "float"}),
        GROUP + "weights: num_bits: expected 8, got 4",
    ),
    "strategy": (
        of_group(weights=CHANNEL | {"strategy": "tensor_group"}),
        GROUP + r"weights: strategy: expected one of \('tensor', .*got 'tensor_group'",
    ),
    "blocks": (
        of_group(weights=CHANNEL | {"strategy": "block", "block_structure": [128]}),
        GROUP + r"weights: block_structure: expected two sizes .*got \[128\]",
    ),
    "outputs": (
        of_group(output_activations=TOKEN),
        GROUP + "output_activations: expected no such key",
    ),
    "asymmetric activations": (
        of_group(input_activations=TOKEN | {"symmetric": False}),
        GROUP + "input_activations: symmetric: expected True .*no zero points here.*got False",
    ),
    "activations in groups": (
        of_group(input_activations=TOKEN | {"strategy": "group", "group_size": 128}),
        GROUP + r"input_activations: strategy: expected one of \('token', 'tensor'\), got 'group'",
    ),
    "float activations": (
        of_group(input_activations=TOKEN | {"type": "float"}),
        GROUP + r"input_activations: type: expected one of \('int',\), got 'float'",
    ),
    "static by token": (
        of_group(input_activations=TOKEN | {"dynamic": False}),
        GROUP + r"input_activations: strategy: expected one of \('tensor',\), got 'token'",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations(tmp_path, case):
    config, message = CONFIGS[case]
    refused(tmp_path, config, tensors(LLAMA), f"(?s){message}")


# Tensors ------------------------------------------------------------------------------------------


def test_every_problem_of_the_tensors_in_one_error(tmp_path):
    stored = stored_in(of_layouts.awq)
    del stored["model.norm.weight"]
    del stored[f"{UP}.scales"]
    stored[f"{UP}.qzeros"] = stored[f"{UP}.qzeros"].astype(np.int64)
    down, gate = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate_proj"
    stored[f"{down}.qzeros"] = stored[f"{UP}.qzeros"]
    q = "model.layers.0.self_attn.q_proj"
    own, *_ = of_layouts.awq(np.random.default_rng(0), (16, 8))
    del stored[f"{q}.weight"]
    stored |= {f"{q}.{end}": x for end, x in own.items()}
    own, *_ = of_layouts.awq(np.random.default_rng(0), (24, 16))
    own["scales"] = own["scales"].T.copy()
    stored |= {f"{gate}.{end}": x for end, x in own.items()}
    del stored["model.layers.0.mlp.down_proj.weight"]
    text = refused(tmp_path, of_layouts.AWQ, stored)
    for line in (
        "model/norm/weight: expected a tensor for it, got none",
        f"{UP}.scales: expected a tensor, got none",
        f"{UP}.qzeros: expected a dtype of ('I32',), got I64",
        f"{down}.qweight: expected this tensor beside ['qzeros'], got none",
        f"{q}.weight: expected shape (16, 16), got (16, 8)",
        f"{gate}.scales: expected shape (2, 24), got (24, 2)",
        f"{gate}.weight: expected no such tensor, got one of shape (24, 16)",
    ):
        assert line in text
    assert "8 problem(s)" in text


def with_other(draw, **changes):
    stored = stored_in(draw)
    for end, change in changes.items():
        stored[f"{UP}.{end}"] = change(stored.get(f"{UP}.{end}"))
    return stored


def put(number):
    def change(x):
        x = x.copy()
        x.flat[-1] = number
        return x

    return change


def int4(rng, shape):
    return of_layouts.packed(rng, shape, zeros=False)


INT8, INT4 = of_layouts.LAYOUTS["int8"][0], of_layouts.LAYOUTS["int4"][0]
GPTQ_8 = of_layouts.LAYOUTS["gptq_8_bits"][0]
ORDERED = np.arange(16)[::-1].astype(np.int32) // 8
STATIC = of_layouts.compressed(
    "int-quantized", CHANNEL, TOKEN | {"dynamic": False, "strategy": "tensor"}
)
VALUES = {
    "order of activations": (
        GPTQ | {"desc_act": True},
        with_other(of_layouts.gptq, g_idx=lambda x: ORDERED),
        rf"{UP}.g_idx: expected groups of 8 neighbouring channels.*channel 0 in group 1.*desc_act",
    ),
    "no order": (
        GPTQ | {"desc_act": True},
        {k: x for k, x in stored_in(of_layouts.gptq).items() if "g_idx" not in k},
        rf"{UP}.g_idx: expected a tensor, got none",
    ),
    "order of compressed-tensors": (
        INT4,
        with_other(int4, weight_g_idx=lambda x: ORDERED),
        rf"{UP}.weight_g_idx: expected groups of 8 neighbouring channels",
    ),
    "no order of compressed-tensors": (
        of_layouts.compressed("pack-quantized", GROUPS | {"actorder": "group"}),
        stored_in(int4),
        rf"{UP}.weight_g_idx: expected a tensor, got none",
    ),
    "zero points of 8 bits": (
        GPTQ_8,
        with_other(of_layouts.LAYOUTS["gptq_8_bits"][1], qzeros=put(0x7F7F7F7E)),
        rf"{UP}.qzeros: expected zero points in the middle .*that is -1 away",
    ),
    "zero points of symmetric": (
        INT8,
        with_other(of_layouts.int8, weight_zero_point=lambda x: np.ones((24, 1), np.int8)),
        rf"{UP}.weight_zero_point: expected 0, because the configuration says symmetric, got 1",
    ),
    "NaN": (
        AWQ,
        with_other(of_layouts.awq, scales=put(np.nan)),
        f"{UP}: expected finite scales, got nan",
    ),
    "float64": (
        INT8,
        with_other(of_layouts.int8, weight_scale=lambda x: x.astype(np.float64)),
        rf"{UP}.weight_scale: expected a dtype of \('F32', 'F16', 'BF16'\), got F64",
    ),
    "no input scale": (STATIC, stored_in(of_layouts.int8), f"{UP}.input_scale: expected a tensor"),
    "input scale of 0": (
        STATIC,
        with_other(of_layouts.int8, input_scale=lambda x: np.zeros(1, np.float32)),
        f"{UP}.input_scale: expected a scale above 0, got 0",
    ),
    "input scale of none": (
        INT8,
        with_other(of_layouts.int8, input_scale=lambda x: np.ones(1, np.float32)),
        f"{UP}.input_scale: expected no such tensor",
    ),
    "ignored": (
        INT8 | {"ignore": ["re:.*up_proj$"]},
        stored_in(of_layouts.int8),
        f"{UP}.weight: expected a float weight alone",
    ),
    "no group": (
        of_group(targets=["re:.*down_proj"]),
        stored_in(of_layouts.int8),
        f"{UP}.weight: expected a float weight alone",
    ),
    "float weight": (
        INT8,
        with_other(of_layouts.int8, weight=lambda x: x.astype(np.float32)),
        rf"{UP}.weight: expected a dtype of \('I8',\), got F32",
    ),
    "shape": (
        INT4,
        with_other(int4, weight_shape=lambda x: np.array([0, -1])),
        rf"{UP}.weight_shape: expected sizes of at least 1, got \(0, -1\)",
    ),
    "huge shape": (
        INT4,
        with_other(int4, weight_shape=lambda x: np.array([2**62, 2**62])),
        rf"{UP}.weight: expected at most 132104 inputs",
    ),
    "shape of floats": (
        INT4,
        with_other(int4, weight_shape=lambda x: x.astype(np.float32)),
        rf"{UP}.weight_shape: expected a dtype of \('I64', 'I32'\), got F32",
    ),
    "another shape": (
        INT4,
        with_other(int4, weight_shape=lambda x: np.array([24, 24])),
        rf"{UP}.weight_packed: expected shape \(24, 3\), got \(24, 2\)",
    ),
    "rank": (
        AWQ,
        with_other(of_layouts.awq, qweight=lambda x: x.reshape(-1)),
        rf"{UP}.qweight: expected rank 2, got shape \(48,\)",
    ),
    "codes of 4 bits": (
        of_layouts.compressed("naive-quantized", CHANNEL | {"num_bits": 4}),
        stored_in(of_layouts.int8),
        rf"{UP}.weight: expected codes of 4 bits, got -128 to 127",
    ),
    "a quantized embedding": (
        INT8,
        stored_in(of_layouts.int8)
        | {"model.embed_tokens.weight_scale": np.ones((31, 1), np.float32)},
        "model.embed_tokens.weight: expected a float embedding",
    ),
    "a bias": (
        GPTQ,
        with_other(of_layouts.gptq, bias=lambda x: np.ones(24, np.float16)),
        f"{UP}.bias: expected no bias, or one that is 0",
    ),
    "a bias of another tool": (
        AWQ,
        with_other(of_layouts.awq, bias=lambda x: np.zeros(24, np.float16)),
        f"{UP}.bias: expected no such tensor",
    ),
    "scaled activations": (
        AWQ,
        stored_in(of_layouts.awq) | {"model.layers.0.mlp.act.scales": np.ones(24, np.float16)},
        r"mlp.act.qweight: expected this tensor beside \['scales'\], got none",
    ),
}


@pytest.mark.parametrize("case", VALUES)
def test_what_a_leaf_can_not_hold(tmp_path, case):
    config, stored, message = VALUES[case]
    refused(tmp_path, config, stored, f"(?s){message}")


def test_a_quantized_head_of_tied_embeddings(tmp_path):
    stored = stored_in(of_layouts.int8)
    del stored["lm_head.weight"]
    own, *_ = of_layouts.int8(np.random.default_rng(0), (31, 16))
    stored |= {f"lm_head.{end}": x for end, x in own.items()}
    config = INT8 | {"ignore": []}
    tied = LLAMA | {"quantization_config": config, "tie_word_embeddings": True}
    with pytest.raises(ValueError, match=r"lm_head\.weight: expected no quantized head, because"):
        load(write(tmp_path, tied, stored))
    _, params = load(write(tmp_path, tied | {"tie_word_embeddings": False}, stored))
    assert params["lm_head"]["kernel"].shape == (16, 31)


# What is taken ------------------------------------------------------------------------------------


def test_biases_that_are_zero_may_be_beside_gptq(tmp_path):
    stored = with_other(of_layouts.gptq, bias=lambda x: np.zeros(24, np.float16))
    _, params = load(write(tmp_path, LLAMA | {"quantization_config": GPTQ}, stored))
    assert set(params["model"]["layers"]["0"]["mlp"]["up_proj"]) == {"kernel"}


def test_orders_that_change_nothing(tmp_path):
    for name, config, stored in (
        ("gptq", GPTQ | {"desc_act": True}, stored_in(of_layouts.gptq)),
        (
            "by weight",
            of_layouts.compressed("pack-quantized", GROUPS | {"actorder": "weight"}),
            stored_in(int4),
        ),
        ("none", INT4, with_other(int4, weight_g_idx=lambda x: np.full(16, -1, np.int32))),
    ):
        load(write(tmp_path / name, LLAMA | {"quantization_config": config}, stored))


def test_zero_points_that_are_zero(tmp_path):
    for name, dtype in (("int8", np.int8), ("float32", np.float32)):
        stored = with_other(
            of_layouts.int8, weight_zero_point=lambda x, d=dtype: np.zeros((24, 1), d)
        )
        _, params = load(write(tmp_path / name, LLAMA | {"quantization_config": INT8}, stored))
        assert params["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"].tensor.zero is None


def test_what_a_configuration_says_that_changes_nothing(tmp_path):
    dense = {"format": "dense", "sparsity_structure": "unstructured", "targets": []}
    config = INT8 | {"sparsity_config": dense, "transform_config": {}, "version": "0.12.0"}
    load(write(tmp_path, LLAMA | {"quantization_config": config}, stored_in(of_layouts.int8)))


def test_the_scheme_of_a_cache_is_named_and_not_used(tmp_path):
    stored = stored_in(of_layouts.int8)
    stored |= {f"model.layers.0.self_attn.{x}_scale": np.ones(1, np.float32) for x in "kv"}
    config = INT8 | {"kv_cache_scheme": TOKEN}
    with pytest.warns(UserWarning, match="kv_cache_scheme is not used: choose the cache's format"):
        load(write(tmp_path, LLAMA | {"quantization_config": config}, stored))


def test_a_group_that_names_a_module_goes_first(tmp_path):
    stored = stored_in(int4)
    own, *_ = of_layouts.int8(np.random.default_rng(0), (16, 16))
    stored |= {f"model.layers.0.self_attn.q_proj.{end}": x for end, x in own.items()}
    config = of_layouts.compressed("mixed-precision", CHANNEL)
    config["config_groups"]["group_1"] = {
        "targets": ["re:.*mlp.up"],
        "weights": GROUPS,
        "input_activations": None,
        "format": "pack-quantized",
    }
    _, params = load(write(tmp_path, LLAMA | {"quantization_config": config}, stored))
    layer = params["model"]["layers"]["0"]
    assert layer["mlp"]["up_proj"]["kernel"].tensor.fmt.name == "int4"
    assert layer["self_attn"]["q_proj"]["kernel"].tensor.fmt.name == "int8"


ANYTHING = (None, True, -1, 0, 8, 2**70, 0.5, float("nan"), "", "re:(", [], [1], {}, {"a": {}})


def changed_in_every_place(value):
    """A configuration with anything in place of each of its parts."""
    yield from ANYTHING
    if isinstance(value, dict):
        for key, inner in value.items():
            for other in changed_in_every_place(inner):
                yield value | {key: other}


@pytest.mark.parametrize("layout", slow_but(["awq", "gptq", "int4", "float8_blocks"], "int4"))
def test_a_configuration_of_any_json(layout):
    config = of_layouts.LAYOUTS[layout][0]
    for other in changed_in_every_place(config):
        with contextlib.suppress(ValueError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = read_quantization({"quantization_config": other}, "config.json")
            found.format_of(UP, {"weight", "weight_scale"})
