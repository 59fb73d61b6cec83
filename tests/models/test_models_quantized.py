"""Checkpoints that are quantized already: every layout bit for bit, and models that run on them."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantized_tensors as of_layouts
from hf_directories import CONFIG, tensors, write
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sqjax as sq
from sqjax.models import generate, load
from sqjax.weights.quant_weight import is_quantized

# Sizes that words of 8 codes and groups of 8 divide.
LLAMA = CONFIG | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
}
LAYER = "model.layers.0"
UP = f"{LAYER}.mlp.up_proj"


def checkpoint(draw, config=LLAMA, floats=None):
    """({name: tensor}, {module: known arrays}, {name: tensor of the float model}), drawn anew."""
    rng = np.random.default_rng(0)
    stored, known = {}, {}
    floats = dict(tensors(config) if floats is None else floats)
    for name, x in list(floats.items()):
        if "_proj.weight" not in name:
            stored[name] = x
            continue
        module = name.removesuffix(".weight")
        own, known[module], weight = draw(rng, x.shape)
        floats[name] = weight.astype(np.float32)
        stored |= {f"{module}.{end}": x for end, x in own.items()}
    return stored, known, floats


def quantized_leaves(params):
    found, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    named = {".".join(key.key for key in keys): leaf for keys, leaf in found}
    return {name: leaf for name, leaf in named.items() if is_quantized(leaf)}


@pytest.mark.parametrize("layout", of_layouts.LAYOUTS)
def test_leaves_are_what_the_file_holds(tmp_path, layout):
    config, draw = of_layouts.LAYOUTS[layout]
    stored, known, floats = checkpoint(draw)
    _, params = load(write(tmp_path, LLAMA | {"quantization_config": config}, stored))
    leaves = quantized_leaves(params)
    assert set(leaves) == {f"{module}.kernel" for module in known}
    for module, expected in known.items():
        leaf = leaves[f"{module}.kernel"]
        tensor = leaf.tensor
        tensor.check(module)
        np.testing.assert_array_equal(np.float64(tensor.values), expected["values"])
        np.testing.assert_array_equal(tensor.scale, expected["scale"])
        zero = 0 if tensor.zero is None else np.asarray(tensor.zero)
        np.testing.assert_array_equal(
            np.broadcast_to(zero, np.shape(expected["zero"])), expected["zero"]
        )
        assert (leaf.activations, leaf.dtype) == (None, np.float32)
        # From the definition in float64, where every product is exact.
        np.testing.assert_array_equal(leaf.dequantize(), floats[f"{module}.weight"].T)


@pytest.mark.slow
@pytest.mark.parametrize("layout", sorted(of_layouts.LAYOUTS))
def test_logits_of_the_dequantized_model(tmp_path, layout):
    config, draw = of_layouts.LAYOUTS[layout]
    stored, _, floats = checkpoint(draw)
    model, params = load(write(tmp_path / "q", LLAMA | {"quantization_config": config}, stored))
    _, in_float = load(write(tmp_path / "f", LLAMA, floats))
    ids = jnp.asarray([[1, 2, 3, 4], [5, 6, 7, 8]])
    expected = jax.jit(model.apply)(in_float, ids)
    got = jax.jit(sq.quantized(model.apply))(params, ids)
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_float8_of_deepseek_is_the_same_as_blocks_of_compressed_tensors(tmp_path):
    """Blocks of 8 outputs and 4 inputs, which do not divide the outputs of k and v."""
    blocks, draw = copy.deepcopy(of_layouts.LAYOUTS["float8_blocks"])
    config = LLAMA | {"num_key_value_heads": 1, "num_attention_heads": 3}
    stored, _, floats = checkpoint(draw, config)
    theirs = {
        name.replace("weight_scale", "weight_scale_inv"): x
        for name, x in stored.items()
        if not name.endswith("lm_head.weight_scale")
    }
    fp8 = {"quant_method": "fp8", "weight_block_size": [8, 4], "activation_scheme": "dynamic"}
    with pytest.warns(UserWarning, match="one scale for each token here"):
        _, params = load(write(tmp_path / "fp8", config | {"quantization_config": fp8}, theirs))
    group = {**of_layouts.FLOAT, "dynamic": True, "strategy": "group", "group_size": 4}
    blocks["config_groups"]["group_0"]["input_activations"] = group
    with pytest.warns(UserWarning, match="one scale for each token here"):
        _, same = load(write(tmp_path / "ct", config | {"quantization_config": blocks}, stored))
    assert jax.tree.structure(params) == jax.tree.structure(same)
    jax.tree.map(np.testing.assert_array_equal, params, same)
    leaf = quantized_leaves(params)[f"{UP}.kernel"]
    assert (leaf.activations, leaf.activation_format) == ("per_token", "e4m3")
    np.testing.assert_array_equal(leaf.dequantize(), floats[f"{UP}.weight"].T)


@pytest.mark.slow
def test_a_quantized_checkpoint_generates(tmp_path):
    config, draw = of_layouts.LAYOUTS["int4_zeros"]
    stored, _, floats = checkpoint(draw)
    model, params = load(write(tmp_path / "q", LLAMA | {"quantization_config": config}, stored))
    _, in_float = load(write(tmp_path / "f", LLAMA, floats))
    prompt = [[3, 4, 5]]
    got = generate(model, params, prompt, 8)
    expected = generate(model, in_float, prompt, 8)
    assert got.tokens == expected.tokens


def test_save_and_load_again(tmp_path):
    config, draw = of_layouts.LAYOUTS["int8"]
    stored, _, _ = checkpoint(draw)
    assert stored[f"{UP}.weight"].min() == -128  # which no quantizer of ours gives
    _, params = load(write(tmp_path / "q", LLAMA | {"quantization_config": config}, stored))
    sq.save(tmp_path / "saved", params)
    again = sq.load(tmp_path / "saved")
    jax.tree.map(np.testing.assert_array_equal, params, again)


# Activations --------------------------------------------------------------------------------------

STATIC = {"num_bits": 8, "type": "int", "dynamic": False, "strategy": "tensor", "symmetric": True}
ACTIVATIONS = {
    "token": (of_layouts.TOKEN, "per_token", "int8"),
    "tensor": (of_layouts.TOKEN | {"strategy": "tensor"}, "per_tensor", "int8"),
    "static": (STATIC, "static", "int8"),
    "float8": (of_layouts.TOKEN | {"type": "float"}, "per_token", "e4m3"),
}


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_how_activations_are_quantized(tmp_path, case):
    stated, activations, format_ = ACTIVATIONS[case]
    kind, weights, draw = "int-quantized", of_layouts.CHANNEL, of_layouts.int8
    if format_ != "int8":
        kind, weights, draw = "float-quantized", of_layouts.FLOAT, of_layouts.float8
    if case == "static":
        draw = lambda rng, shape: of_layouts.int8(rng, shape, static=True)
    stored, _, _ = checkpoint(draw)
    config = of_layouts.compressed(kind, weights, stated)
    _, params = load(write(tmp_path, LLAMA | {"quantization_config": config}, stored))
    for name, leaf in quantized_leaves(params).items():
        assert (leaf.activations, leaf.activation_format) == (activations, format_)
        module = name.removesuffix(".kernel")
        if case == "static":
            assert leaf.input_scale == stored[f"{module}.input_scale"][0]
        else:
            assert leaf.input_scale is None


def test_a_static_matmul_in_integers(tmp_path):
    stored, known, _ = checkpoint(lambda rng, shape: of_layouts.int8(rng, shape, static=True))
    config = of_layouts.compressed("int-quantized", of_layouts.CHANNEL, STATIC)
    _, params = load(write(tmp_path, LLAMA | {"quantization_config": config}, stored))
    x = np.random.default_rng(1).normal(size=(3, 16)).astype(np.float32)
    s = np.float64(stored[f"{UP}.input_scale"][0])
    codes = np.clip(np.round(x / s), -127, 127).astype(np.int64)
    values, scale = known[UP]["values"].astype(np.int64), known[UP]["scale"]
    expected = (codes @ values.T) * s * scale.T
    up = params["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    got = jax.jit(sq.quantized(lambda w, x: x @ w))(up, x)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


# Tensors that hold several leaves, and leaves that several tensors hold ---------------------------


def test_fused_projections_are_split_with_their_scales(tmp_path):
    config = LLAMA | {"model_type": "phi3", "quantization_config": of_layouts.AWQ}
    floats = tensors(LLAMA)
    for fused, parts in {
        "self_attn.qkv": ("self_attn.q", "self_attn.k", "self_attn.v"),
        "mlp.gate_up": ("mlp.gate", "mlp.up"),
    }.items():
        joined = [floats.pop(f"{LAYER}.{part}_proj.weight") for part in parts]
        floats[f"{LAYER}.{fused}_proj.weight"] = np.concatenate(joined)
    stored, _, dequantized = checkpoint(of_layouts.awq, floats=floats)
    _, params = load(write(tmp_path, config, stored))
    attention = params["model"]["layers"]["0"]["self_attn"]
    qkv = [attention[f"{part}_proj"]["kernel"] for part in "qkv"]
    assert [part.tensor.scale.shape for part in qkv] == [(16, 2), (8, 2), (8, 2)]
    joined = np.concatenate([part.dequantize() for part in qkv], axis=1)
    np.testing.assert_array_equal(joined, dequantized[f"{LAYER}.self_attn.qkv_proj.weight"].T)


def test_one_scale_of_a_fused_projection_is_that_of_each_part(tmp_path):
    weights = of_layouts.CHANNEL | {"strategy": "tensor"}
    config = LLAMA | {
        "model_type": "phi3",
        "quantization_config": of_layouts.compressed("int-quantized", weights),
    }
    floats = tensors(LLAMA)
    for part in "qkv":
        del floats[f"{LAYER}.self_attn.{part}_proj.weight"]
    floats[f"{LAYER}.self_attn.qkv_proj.weight"] = np.ones((32, 16), np.float32)
    draw = of_layouts.LAYOUTS["int8_tensor"][1]
    stored, _, _ = checkpoint(draw, floats=floats)
    _, params = load(write(tmp_path, config, stored))
    attention = params["model"]["layers"]["0"]["self_attn"]
    for part in "qkv":
        tensor = attention[f"{part}_proj"]["kernel"].tensor
        np.testing.assert_array_equal(
            tensor.scale.reshape(-1), stored[f"{LAYER}.self_attn.qkv_proj.weight_scale"]
        )


MOE = LLAMA | {
    "model_type": "qwen3_moe",
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "norm_topk_prob": True,
}


def moe_tensors():
    floats = {name: x for name, x in tensors(LLAMA).items() if ".mlp." not in name}
    rng = np.random.default_rng(2)
    shapes = {f"{LAYER}.self_attn.{part}_norm.weight": (4,) for part in "qk"}
    shapes[f"{LAYER}.mlp.gate.weight"] = (3, 16)
    for e in range(3):
        shapes |= {
            f"{LAYER}.mlp.experts.{e}.{part}_proj.weight": (16, 8) if part == "down" else (8, 16)
            for part in ("gate", "up", "down")
        }
    drawn = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return floats | drawn


def test_experts_become_one_quantized_leaf(tmp_path):
    draw = lambda rng, shape: of_layouts.int8(rng, shape, static=True)
    stored, known, dequantized = checkpoint(draw, MOE, moe_tensors())
    config = of_layouts.compressed("int-quantized", of_layouts.CHANNEL, STATIC)
    _, params = load(write(tmp_path, MOE | {"quantization_config": config}, stored))
    mlp = params["model"]["layers"]["0"]["mlp"]
    assert not is_quantized(mlp["router"]["kernel"])
    up = mlp["experts"]["up_proj"]["kernel"]
    assert (up.shape, up.tensor.axes) == ((3, 16, 8), (0, 2, 1))
    for e in range(3):
        module = f"{LAYER}.mlp.experts.{e}.up_proj"
        np.testing.assert_array_equal(up.tensor.values[e], known[module]["values"])
        assert up.input_scale[e] == stored[f"{module}.input_scale"][0]
        np.testing.assert_array_equal(up.dequantize()[e], dequantized[f"{module}.weight"].T)


@pytest.mark.slow
def test_logits_of_quantized_experts(tmp_path):
    stored, _, floats = checkpoint(of_layouts.awq, MOE, moe_tensors())
    config = {"quantization_config": of_layouts.AWQ}
    model, params = load(write(tmp_path / "q", MOE | config, stored))
    _, in_float = load(write(tmp_path / "f", MOE, floats))
    ids = jnp.asarray([[1, 2, 3, 4]])
    expected = jax.jit(model.apply)(in_float, ids)
    got = jax.jit(sq.quantized(model.apply))(params, ids)
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_experts_that_are_not_alike(tmp_path):
    stored, _, floats = checkpoint(of_layouts.awq, MOE, moe_tensors())
    module = f"{LAYER}.mlp.experts.1.up_proj"
    for end in ("qweight", "qzeros", "scales"):
        del stored[f"{module}.{end}"]
    stored[f"{module}.weight"] = floats[f"{module}.weight"]
    config = {"quantization_config": of_layouts.AWQ}
    with pytest.raises(
        ValueError, match=f"{module}.weight: expected all entries .* quantized alike"
    ):
        load(write(tmp_path, MOE | config, stored))


def test_gpt2_stores_its_layers_inputs_first(tmp_path):
    config = {
        "model_type": "gpt2",
        "vocab_size": 31,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 32,
        "quantization_config": of_layouts.GPTQ,
    }
    rng = np.random.default_rng(3)
    shapes = {"wte.weight": (31, 16), "wpe.weight": (32, 16)}
    for name in ("ln_f", "h.0.ln_1", "h.0.ln_2"):
        shapes |= {f"{name}.weight": (16,), f"{name}.bias": (16,)}
    outputs = {"attn.c_attn": (48, 16), "attn.c_proj": (16, 16)}
    outputs |= {"mlp.c_fc": (64, 16), "mlp.c_proj": (16, 64)}
    stored = {}
    for name, shape in outputs.items():
        own, _, weight = of_layouts.gptq(rng, shape)
        stored |= {f"h.0.{name}.{end}": x for end, x in own.items()}
        shapes[f"h.0.{name}.bias"] = shape[:1]
        outputs[name] = weight
    stored |= {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    _, params = load(write(tmp_path, config, stored))
    layer = params["model"]["layers"]["0"]
    parts = [layer["self_attn"][f"{part}_proj"]["kernel"].dequantize() for part in "qkv"]
    np.testing.assert_array_equal(np.concatenate(parts, 1), outputs["attn.c_attn"].T)
    down = layer["mlp"]["down_proj"]["kernel"].dequantize()
    np.testing.assert_array_equal(down, outputs["mlp.c_proj"].T)


# dtypes and devices -------------------------------------------------------------------------------


def test_the_dtype_that_is_asked_for(tmp_path):
    stored, _, _ = checkpoint(of_layouts.awq)
    config = LLAMA | {"quantization_config": of_layouts.AWQ}
    _, params = load(write(tmp_path, config, stored), jnp.bfloat16)
    assert {x.dtype for x in quantized_leaves(params).values()} == {jnp.dtype(jnp.bfloat16)}
    assert params["model"]["norm"]["weight"].dtype == jnp.bfloat16


def test_placement(tmp_path):
    stored, _, _ = checkpoint(of_layouts.awq)
    config = LLAMA | {"quantization_config": of_layouts.AWQ}
    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))
    asked = {}

    def place(path, shape):
        asked[path] = shape
        cut = (None, "model") if path.endswith("up_proj/kernel") else ()
        return NamedSharding(mesh, PartitionSpec(*cut))

    _, params = load(write(tmp_path, config, stored), placement=place)
    up = params["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    assert asked["model/layers/0/mlp/up_proj/kernel"] == up.shape == (16, 24)
    assert up.tensor.values.sharding.spec == PartitionSpec("model", None)
    assert up.tensor.zero.sharding.spec == PartitionSpec("model", None)
