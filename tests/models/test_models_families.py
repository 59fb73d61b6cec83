"""Every family against what torch transformers computes with the same tiny random checkpoint."""

import functools
import json
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
import tiny_checkpoint
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file
from traced import spaces_of

import sqjax as sq
from sqjax.models import families as f
from sqjax.models import fuse, generate, load, partition_specs, stack_layers
from sqjax.models.checkpoints.families.known import FAMILIES
from sqjax.models.checkpoints.huggingface import read_config

CASES = tiny_checkpoint.cases()
#: One of each kind of block and position; the others run in the slow tests.
QUICK = ("gemma3_text", "qwen2_moe")
#: What each of these computes another case of its family computes too, or has more of.
AS_OTHERS = {
    "llama", "llama_tied", "llama_linear", "llama_dynamic_short", "bloom", "falcon_rw_sixteen_heads",
    "gemma_gelu", "gemma3_text_plain", "mistral_nemo", "phi3_longrope_short",
    "qwen3_moe_every_second", "stablelm_parallel", "cohere",
}  # fmt: skip
#: transformers rounds Falcon's slopes to bfloat16. These heads' are no powers of two.
ROUNDED = {"falcon_rw_sixteen_heads": 2e-3}


def of_case(name):
    marks = [pytest.mark.slow] * (name not in QUICK) + [pytest.mark.every_case] * (
        name in AS_OTHERS
    )
    return pytest.param(name, marks=marks)


@functools.cache
def loaded(name):
    """(the case, its model, its parameters)."""
    case = tiny_checkpoint.load(name)
    version = min(case["configs"])
    with tempfile.TemporaryDirectory() as folder:
        directory = tiny_checkpoint.write(case, Path(folder) / "model", version)
        return case, *load(directory)


@functools.cache
def logits_of(name):
    case, model, params = loaded(name)
    return np.asarray(jax.jit(model.apply)(params, jnp.asarray(case["vectors"]["ids"])))


def assert_close(got, expected, largest=None):
    largest = np.abs(expected).max() if largest is None else largest
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * largest)


@pytest.mark.parametrize("name", CASES)
def test_both_versions_of_the_configuration_are_one_model(name):
    read = {v: read_config(config) for v, config in tiny_checkpoint.load(name)["configs"].items()}
    for version, (family, config) in read.items():
        assert family is FAMILIES[family.model_type]
        assert config == next(iter(read.values()))[1], version


@pytest.mark.parametrize("name", [of_case(name) for name in CASES])
def test_logits_are_those_of_torch(name):
    case, _, _ = loaded(name)
    expected = case["vectors"]["logits"]
    tolerance = ROUNDED.get(name, 2e-5) * np.abs(expected).max()
    np.testing.assert_allclose(logits_of(name), expected, rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*sorted(set(CASES) - {*QUICK, *ROUNDED, "phi3_longrope_crossing"}), *QUICK]
)
def test_a_padded_batch_decodes_as_in_torch(name):
    """Two prompts of 12 and 7 tokens: the logits of all real tokens, and 32 greedy steps."""
    case, model, params = loaded(name)
    vectors = case["vectors"]
    real = vectors["padded_mask"].astype(bool)
    padding = jnp.asarray(real.shape[1] - real.sum(axis=1), jnp.int32)
    cache = model.init_cache(2, 12)._replace(padding=padding)
    got, _ = jax.jit(model.read)(params, jnp.asarray(vectors["padded_ids"]), cache)
    assert_close(np.asarray(got)[real], vectors["padded_logits"])
    prompts = [ids[where].tolist() for ids, where in zip(vectors["padded_ids"], real, strict=True)]
    tokens = generate(model, params, prompts, 32, stop=()).tokens
    np.testing.assert_array_equal(tokens, vectors["padded_greedy"])


def test_a_text_that_would_need_other_keys_is_refused():
    """transformers computes all keys again when a text grows beyond the original length."""
    case, model, params = loaded("phi3_longrope_crossing")
    prompt = case["vectors"]["ids"][:1].tolist()
    with pytest.raises(ValueError, match=r"one side of 20 tokens, .*got 12 \+ 32; take at most 9"):
        generate(model, params, prompt, 32)


@pytest.mark.slow
@pytest.mark.each_case
@pytest.mark.parametrize("name", ["bloom", "gemma3_text", "smollm3", "mixtral", "cohere2"])
def test_a_stack_is_the_layers_apart(name):
    case, model, params = loaded(name)
    ids = jnp.asarray(case["vectors"]["ids"])
    assert_close(jax.jit(model.apply)(stack_layers(params), ids), logits_of(name))


@pytest.mark.slow
def test_fused_experts_are_the_experts_apart():
    case, model, params = loaded("mixtral")
    fused = fuse(params)
    kernel = fused["model"]["layers"]["0"]["mlp"]["experts"]["gate_proj+up_proj"]["kernel"]
    experts, inner = model.config.experts.count, model.config.experts.intermediate_size
    assert kernel.shape == (experts, model.config.hidden_size, 2 * inner)
    ids = jnp.asarray(case["vectors"]["ids"])
    assert_close(jax.jit(model.apply)(fused, ids), logits_of("mixtral"))


def test_layers_that_differ_are_no_stack():
    _, _, params = loaded("qwen2_moe")
    with pytest.raises(
        ValueError, match=r"expected what layer 0 has, .* only layers that are alike"
    ):
        stack_layers(params)


# Smoothing ----------------------------------------------------------------------------------------

ATTENTION = ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj")
EXPERTS = ("mlp/router", "mlp/experts/gate_proj", "mlp/experts/up_proj")
FIRST, SECOND = "input_layernorm", "post_attention_layernorm"
#: What the authors' code smooths in each layer: {norm: the kernels after it}.
AUTHORS = {
    "opt": {FIRST: ATTENTION, SECOND: ("mlp/up_proj",)},
    "bloom": {FIRST: ATTENTION, SECOND: ("mlp/up_proj",)},
    "llama_grouped": {FIRST: ATTENTION, SECOND: ("mlp/gate_proj", "mlp/up_proj")},
    "mistral": {FIRST: ATTENTION, SECOND: ("mlp/gate_proj", "mlp/up_proj")},
    "mixtral": {FIRST: ATTENTION, SECOND: EXPERTS},
    "falcon_7b": {FIRST: (*ATTENTION, "mlp/up_proj")},
    "falcon_40b": {FIRST: ATTENTION, SECOND: ("mlp/up_proj",)},
}


def of_authors(name):
    """One of each block; the others are theirs under other names."""
    often = name in ("opt", "mixtral")
    return pytest.param(name, marks=[pytest.mark.slow, *[pytest.mark.every_case] * (not often)])


def leaf(params, layer, path):
    found = params["model"]["layers"][str(layer)]
    for key in path.split("/"):
        found = found[key]
    return np.asarray(found, np.float64)


@pytest.mark.parametrize("name", [of_authors(name) for name in AUTHORS])
def test_smoothed_weights_are_those_of_the_authors_code(name):
    """s = max|X|^a / max|W|^(1 - a), clipped at 1e-5; norm / s and W * s, in float64."""
    case, model, params = loaded(name)
    ids = jnp.asarray(case["vectors"]["ids"])
    stats = sq.calibrate(model.apply, params, [ids])
    smoothed = sq.smooth(params, stats, 0.5, groups="norm")
    for layer in range(model.config.num_layers):
        for norm, kernels in AUTHORS[name].items():
            paths = [f"model/layers/{layer}/{kernel}/kernel" for kernel in kernels]
            x_absmax = np.asarray(stats.absmax[paths[0]], np.float64)
            x_absmax = x_absmax.reshape(-1, x_absmax.shape[-1]).max(0)
            matrices = [leaf(params, layer, f"{kernel}/kernel") for kernel in kernels]
            rows = [np.abs(m).reshape(-1, *m.shape[-2:]).max(axis=(0, 2)) for m in matrices]
            w_absmax = np.maximum(np.max(rows, axis=0), 1e-5)
            s = np.maximum(np.sqrt(x_absmax / w_absmax), 1e-5)
            for kernel, matrix in zip(kernels, matrices, strict=True):
                got = leaf(smoothed, layer, f"{kernel}/kernel")
                np.testing.assert_allclose(got, matrix * s[:, None], rtol=1e-5)
            gain = leaf(params, layer, f"{norm}/weight")
            np.testing.assert_allclose(leaf(smoothed, layer, f"{norm}/weight"), gain / s, rtol=1e-5)


#: The primitives that multiply an activation with a weight.
DOTS = ("dot_general", "ragged_dot_general")
#: {case of a family: its groups}, as the literature has them and beyond. A Llama's are four a layer
#: (norm to q k v; v to o; norm to gate, up; up to down), and one for its final norm if its head is
#: not tied. Nothing passes GELU to a second matmul without a gate.
GROUPS = {
    "llama_tied": 2 * 4,
    "smollm3": 4 * 4,
    "mistral": 2 * 4 + 1,
    "ministral": 4 * 4 + 1,
    "qwen2": 2 * 4,
    "qwen3": 2 * 4,
    "granite": 2 * 4,
    "olmo2": 2 * 2 + 1,  # its norms follow the matmuls
    "phi3": 2 * 4 + 1,
    "glm": 2 * 4 + 1,
    "glm4": 2 * 4 + 1,
    "stablelm": 2 * 4 + 1,
    "cohere": 2 * 3,  # q k v gate up, o, down
    "cohere2": 4 * 3,
    "mixtral": 2 * 4 + 1,
    "qwen2_moe": 4 + 2 * 5 + 1,  # two layers have a shared expert, with a down of its own
    "qwen3_moe": 2 * 4 + 1,
    "olmoe": 2 * 4 + 1,
    "deepseek_v2": 6 + 2 * 7 + 1,  # of latents two norms more; a shared expert's down
    "gemma": 2 * 4,
    "gemma2": 4 * 4,
    "gemma3_text": 4 * 4,
    "gpt2": 2 * 3,
    "gptj": 2 * 2 + 1,
    "gpt_neox": 2 * 3 + 1,
    "phi": 2 * 2 + 1,
    "opt": 2 * 4,
    "opt_350m": 2 * 2 + 1,  # as Olmo 2
    "bloom": 2 * 3,
    "falcon_7b": 2 * 2,
    "falcon_40b": 2 * 3,
}


def of_family(name):
    """One with experts runs always."""
    marks = [pytest.mark.slow] + [pytest.mark.every_case] * (name != "mixtral")
    return pytest.param(name, marks=marks)


@pytest.mark.filterwarnings("ignore:calibrate. (no|less|every)")  # few tokens for so many experts
@pytest.mark.parametrize("name", [of_family(name) for name in GROUPS])
def test_the_groups_that_fold_and_int8(name):
    case, model, params = loaded(name)
    ids = jnp.asarray(case["vectors"]["ids"])
    stats = sq.calibrate(model.apply, params, [ids])
    assert len(stats.graph.groups) == GROUPS[name]
    spaces = spaces_of(model.apply, params, ids)
    proof = sq.prove(model.apply, params, stats, ids, spaces=spaces, trials=1, gains="ones")
    assert proof.holds, proof
    expected = logits_of(name)
    scales = sq.scales(params, stats, 0.5)
    smoothed = sq.fold(params, stats.graph, scales)
    assert_close(jax.jit(model.apply)(smoothed, ids), expected)
    # A router that changes its mind changes everything after it.
    float_sites = {"router": None} if model.config.experts else {}
    rules = {**float_sites, "self_attn": sq.W8A8_O1, ".*": sq.W8A8_O3}
    qparams = sq.quantize(smoothed, sq.fold_stats(stats, scales), rules)
    run = jax.jit(sq.quantized(model.apply))
    found = jaxprs.equations(run.trace(qparams, ids).jaxpr)
    dots = [e for e in found if e.primitive.name in DOTS]
    int8 = [e for e in dots if {v.aval.dtype for v in e.invars[:2]} == {jnp.dtype(jnp.int8)}]
    routers = sum(map(model.config.has_experts, range(model.config.num_layers)))
    assert len(int8) == len(stats.graph.sites) - routers
    got = run(qparams, ids)
    error = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
    assert 0 < error < 0.1


# What is wrong ------------------------------------------------------------------------------------


def config_of(name, **changes):
    case = tiny_checkpoint.load(name)
    return {**case["configs"][min(case["configs"])], **changes}


WRONG = {
    "kind of rope": (
        config_of("llama", rope_scaling={"rope_type": "spiral"}),
        "rope_type = 'spiral': not supported, .*'llama3'",
    ),
    "no factor": (
        config_of("llama", rope_scaling={"rope_type": "linear"}),
        "rope_scaling: factor: expected a finite number above 0, got none",
    ),
    "heads that do not divide": (
        config_of("gpt2", n_head=5),
        "n_embd: expected a multiple of n_head = 5, got 32",
    ),
    "negative": (
        config_of("bloom", n_layer=-2),
        "n_layer: expected a whole number from 1 .*got -2",
    ),
    "zero": (config_of("falcon_7b", hidden_size=0), "hidden_size: expected a whole number .*got 0"),
    "experts": (
        config_of("mixtral", num_experts_per_tok=9),
        "Experts.per_token: expected .*, got 9 of",
    ),
    "very many layers": (
        config_of("gemma3_text", num_hidden_layers=2**31 - 1),
        "num_hidden_layers: expected a whole number of layers from 1 to 10000",
    ),
    "kind of layer": (
        config_of("gemma2", layer_types=["linear_attention", "full_attention"]),
        "layer_types: expected .*, got",
    ),
    "another family's key": (
        config_of("llama", final_logit_softcapping=30.0),
        "final_logit_softcapping = 30.0: expected no such key",
    ),
    "factors of another head": (
        config_of(
            "phi3_longrope_short",
            rope_scaling={"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
        ),
        "LongRope: expected 4 factors above 0, .*, got 1",
    ),
    "heads that key heads do not divide": (
        config_of("llama_grouped", num_key_value_heads=3),
        r"DecoderConfig.num_heads: .* 3, got 4 \(from num_attention_heads\)",
    ),
    "layers without experts": (
        config_of("deepseek_v2", first_k_dense_replace=2**31 - 1, topk_group=7),
        r"got 2 of \d+ in 7 of \d+ groups \(from .*topk_group",
    ),
    "positions beyond an array": (
        config_of("opt", max_position_embeddings=2**31 - 1),
        r"max_length: .*got 2147483649 \(from max_position_embeddings\)",
    ),
    "a scaling of no kind": (
        config_of("llama", rope_scaling={"factor": 2.0}),
        "rope_type = None: not supported",
    ),
    "no object": (config_of("llama", rope_scaling=False), "rope_scaling: expected an object"),
    "a flag of null": (
        config_of("opt", enable_bias=None),
        "enable_bias: expected true or false, got None",
    ),
    "no window": (
        config_of("smollm3", layer_types=["sliding_attention"] * 4, sliding_window=None),
        "sliding_window: expected a size for the layers of 'sliding_attention', got none",
    ),
    "scaled heads": (
        config_of("gpt2", scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx = True: expected False",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_configurations_that_are_refused(case):
    config, message = WRONG[case]
    with pytest.raises(ValueError, match=f"config.json(.|\n)*{message}"):
        read_config(config)


def test_all_layers_may_be_without_experts():
    everything = {"first_k_dense_replace": 2**31 - 1, "num_hidden_layers": 2**31 - 1}
    with pytest.raises(ValueError, match=r"num_hidden_layers: expected .* from 1 to 10000"):
        read_config(config_of("deepseek_v2", **everything))
    config = config_of("deepseek_v2", first_k_dense_replace=2**31 - 1)
    _, found = read_config(config)
    assert not any(map(found.has_experts, range(found.num_layers)))


def test_the_older_name_of_a_base_holds():
    """As in transformers: where both are there and differ, an edit of one alone."""
    _, found = read_config(config_of("gpt_neox", rotary_emb_base=77, rope_theta=10000))
    assert found.kinds[0].rope.theta == 77


def test_an_end_that_transformers_writes_by_itself_says_nothing():
    """Whatever the vocabulary's size; one that somebody has said must be in it."""
    ends = [151329, 151336, 151338]
    _, found = read_config(config_of("glm", eos_token_id=ends))
    assert found == loaded("glm")[1].config
    for wrong in (99, [*ends, 99]):
        with pytest.raises(
            ValueError, match=r"eos_token_id: expected token ids below .* 64, got 99"
        ):
            read_config(config_of("glm", eos_token_id=wrong))


def test_a_missing_expert_is_named(tmp_path):
    case = tiny_checkpoint.load("mixtral")
    gone = next(name for name in case["shapes"] if ".experts.2.w1." in name)
    del case["shapes"][gone]
    directory = tiny_checkpoint.write(case, tmp_path)
    path = "model/layers/0/mlp/experts/gate_proj/kernel"
    with pytest.raises(ValueError, match=f"{path}: expected a tensor for it, got none"):
        load(directory)


def test_an_expert_too_many_is_named(tmp_path):
    case = tiny_checkpoint.load("mixtral")
    config = case["configs"]["4"]
    config["num_local_experts"] -= 1
    last = config["num_local_experts"]
    directory = tiny_checkpoint.write(case, tmp_path)
    with pytest.raises(ValueError, match=rf"experts\.{last}\.w1\.weight: expected no such tensor"):
        load(directory)


def test_a_fused_tensor_of_another_shape(tmp_path):
    case = tiny_checkpoint.load("gpt_neox")
    name = next(name for name in case["shapes"] if "query_key_value.weight" in name)
    case["shapes"][name] = [80, 32]
    with pytest.raises(
        ValueError, match=r"query_key_value\.weight: expected shape \(96, 32\), got"
    ):
        load(tiny_checkpoint.write(case, tmp_path))


# Families that are not known here ----------------------------------------------------------------

LAYER, OURS = "layers.{layer}", f.OUR_LAYER
#: InternLM2: a Llama whose queries, keys and values are one tensor, and whose names are others.
INTERNLM2 = f.Family(
    "internlm2",
    fields={
        **f.LLAMA_FIELDS,
        "attention_bias": f.read("bias", f.FLAG, True),
        "output_bias": f.read("bias", f.FLAG, True),
        "mlp_bias": False,
    },
    rows=(
        *f.tensor("tok_embeddings.weight", "model/embed_tokens/embedding"),
        *f.norm("norm", "model/norm"),
        *f.dense("output", "lm_head"),
        *f.norm(f"{LAYER}.attention_norm", f"{OURS}/input_layernorm"),
        *f.norm(f"{LAYER}.ffn_norm", f"{OURS}/post_attention_layernorm"),
        *f.several(f"{LAYER}.attention.wqkv", f.QKV, f.BY_KEY_HEAD),
        *f.dense(f"{LAYER}.attention.wo", f"{OURS}/self_attn/o_proj"),
        *f.dense(f"{LAYER}.feed_forward.w1", f"{OURS}/mlp/gate_proj"),
        *f.dense(f"{LAYER}.feed_forward.w3", f"{OURS}/mlp/up_proj"),
        *f.dense(f"{LAYER}.feed_forward.w2", f"{OURS}/mlp/down_proj"),
    ),
)


def test_a_family_from_outside(tmp_path):
    """A Llama's checkpoint under InternLM2's names and in its layout computes what the Llama does."""
    _, model, params = loaded("llama_grouped")
    config = model.config
    theirs = {"model.norm.weight": np.asarray(params["model"]["norm"]["weight"])}
    theirs["model.tok_embeddings.weight"] = np.asarray(params["model"]["embed_tokens"]["embedding"])
    theirs["output.weight"] = np.asarray(params["lm_head"]["kernel"]).T
    for i, layer in params["model"]["layers"].items():
        own = f"model.layers.{i}."
        theirs[f"{own}attention_norm.weight"] = np.asarray(layer["input_layernorm"]["weight"])
        theirs[f"{own}ffn_norm.weight"] = np.asarray(layer["post_attention_layernorm"]["weight"])
        q, k, v, o = (np.asarray(layer["self_attn"][f"{x}_proj"]["kernel"]).T for x in "qkvo")
        theirs[f"{own}attention.wo.weight"] = o
        heads = []
        for head in range(config.num_kv_heads):
            size = config.head_dim
            sharing = config.num_heads // config.num_kv_heads * size
            heads.append(q[head * sharing : (head + 1) * sharing])
            heads += [x[head * size : (head + 1) * size] for x in (k, v)]
        theirs[f"{own}attention.wqkv.weight"] = np.concatenate(heads)
        for name, part in {"w1": "gate", "w3": "up", "w2": "down"}.items():
            kernel = np.asarray(layer["mlp"][f"{part}_proj"]["kernel"])
            theirs[f"{own}feed_forward.{name}.weight"] = kernel.T
    values = {**config_of("llama_grouped"), "model_type": "internlm2", "bias": False}
    (tmp_path / "config.json").write_text(json.dumps(values))
    theirs = {name: np.ascontiguousarray(array) for name, array in theirs.items()}
    save_file(theirs, tmp_path / "model.safetensors")
    found, same = load(tmp_path, families=[INTERNLM2])
    assert found == model
    jax.tree.map(np.testing.assert_array_equal, same, params)
    with pytest.raises(ValueError, match=r"expected model_type to be one of .*, got 'internlm2'"):
        load(tmp_path)


# The installed transformers ----------------------------------------------------------------------


@pytest.mark.slow  # transformers takes seconds to import
def test_what_the_installed_transformers_writes_is_read(tmp_path):
    """Whichever version: 4.57 and 5 write other keys. Its models are not asked for."""
    transformers = pytest.importorskip("transformers")
    unread = {}
    for name in CASES:
        case = tiny_checkpoint.load(name)
        values = case["configs"][min(case["configs"])]
        kind = transformers.AutoConfig.for_model(**values)
        kind.save_pretrained(tmp_path / name)
        written = json.loads((tmp_path / name / "config.json").read_text())
        _, expected = read_config(values)
        _, found = read_config(written)
        if found != expected:
            unread[name] = written
    assert not unread


def test_no_transformers_is_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    model, _ = load(tiny_checkpoint.write(tiny_checkpoint.load("gemma2"), tmp_path))
    assert model.config.block == "sandwich"


# Placing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_dtype_and_a_placement_for_every_leaf(tmp_path, dtype):
    case = tiny_checkpoint.load("qwen3_moe")
    asked = {}
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def place(path, shape):
        asked[path] = shape
        return device

    _, params = load(tiny_checkpoint.write(case, tmp_path), dtype, placement=place)
    leaves = flatten_dict(params, sep="/")
    assert asked == {path: leaf.shape for path, leaf in leaves.items()}
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype(dtype)}


def test_a_number_that_float16_cannot_hold_is_refused(tmp_path):
    case = tiny_checkpoint.load("opt")
    directory = tiny_checkpoint.write(case, tmp_path)
    weights = tiny_checkpoint.weights(case)
    weights["model.decoder.layers.1.fc1.weight"][3, 5] = -70000.0
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"layers\.1\.fc1\.weight: expected numbers up to 6.55e\+04"
    ):
        load(directory, jnp.float16)


def test_specs_split_heads_inner_channels_and_the_vocabulary():
    _, _, params = loaded("mixtral")
    specs = partition_specs(params, "tp")
    layer = specs["model"]["layers"]["0"]
    assert layer["self_attn"]["q_proj"]["kernel"] == P(None, "tp")
    assert layer["self_attn"]["o_proj"]["kernel"] == P("tp", None)
    assert layer["mlp"]["experts"]["up_proj"]["kernel"] == P(None, None, "tp")
    assert layer["mlp"]["experts"]["down_proj"]["kernel"] == P(None, "tp", None)
    assert layer["mlp"]["router"]["kernel"] == layer["input_layernorm"]["weight"] == P()
    assert specs["model"]["embed_tokens"]["embedding"] == P("tp", None)
    stacked = partition_specs(jax.eval_shape(stack_layers, params), "tp")
    kernel = stacked["model"]["layers"]["mlp"]["experts"]["down_proj"]["kernel"]
    assert kernel == P(None, None, "tp", None)


@pytest.mark.slow
def test_remat_changes_no_gradient():
    case, model, params = loaded("gemma2")
    ids = jnp.asarray(case["vectors"]["ids"])

    def gradients(model):
        return jax.jit(jax.grad(lambda p: jnp.mean(model.apply(p, ids) ** 2)))

    of_blocks = replace(model, remat=True)
    expected = gradients(model)(params)
    found = gradients(of_blocks)(params)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    jax.tree.map(partial(assert_close, largest=largest), found, expected)
    assert "remat" not in str(jax.make_jaxpr(model.apply)(params, ids))
    assert "remat" in str(jax.make_jaxpr(of_blocks.apply)(params, ids))
    stacked = stack_layers(params)
    assert "remat" in str(jax.make_jaxpr(of_blocks.apply)(stacked, ids))
    assert_close(jax.jit(of_blocks.apply)(stacked, ids), logits_of("gemma2"))


def test_a_field_that_no_configuration_has():
    with pytest.raises(ValueError, match=r"Family.fields: .*'hidden_size'.* got \['hiden_size'\]"):
        f.Family("mine", fields={"hiden_size": 3}, rows=())
