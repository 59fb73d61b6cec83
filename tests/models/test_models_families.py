"""Every family against what torch transformers computes with the same tiny random checkpoint."""

import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoint
from slow import slow_but

import sqjax as sq
from sqjax.models import generate, load, stack_layers
from sqjax.models.checkpoints.families.known import FAMILIES
from sqjax.models.checkpoints.huggingface import read_config

CASES = tiny_checkpoint.cases()
#: One of each kind of block and position; the others run in the slow tests.
QUICK = ("opt_350m", "falcon_40b", "gemma3_text", "qwen2_moe")
#: transformers rounds Falcon's slopes to bfloat16. These heads' are no powers of two.
ROUNDED = {"falcon_rw_sixteen_heads": 2e-3}


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
    case, model, _ = loaded(name)
    for version, config in case["configs"].items():
        family, found = read_config(config)
        assert family is FAMILIES[config["model_type"]]
        assert found == model.config, version


@pytest.mark.each_case
@pytest.mark.parametrize("name", slow_but(CASES, *QUICK))
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


def leaf(params, layer, path):
    found = params["model"]["layers"][str(layer)]
    for key in path.split("/"):
        found = found[key]
    return np.asarray(found, np.float64)


@pytest.mark.slow
@pytest.mark.each_case
@pytest.mark.parametrize("name", AUTHORS)
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


#: {case: its groups in a layer, and outside of layers}, as the literature has them and beyond.
GROUPS = {
    "opt": (4, 0),  # q k v, o, up, down: the head is tied
    "bloom": (3, 0),  # nothing passes GELU
    "gpt_neox": (3, 1),
    "gemma2": (4, 0),
    "olmo2": (2, 1),  # its norms follow the matmuls
    "mixtral": (4, 1),
    "cohere": (3, 0),  # q k v gate up, o, down
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GROUPS)
def test_the_groups_that_fold_and_int8(name):
    case, model, params = loaded(name)
    ids = jnp.asarray(case["vectors"]["ids"])
    stats = sq.calibrate(model.apply, params, [ids])
    in_layer, outside = GROUPS[name]
    groups = stats.graph.groups
    assert len(groups) == in_layer * model.config.num_layers + outside
    expected = logits_of(name)
    smoothed = jax.jit(model.apply)(sq.smooth(params, stats, 0.5), ids)
    assert_close(smoothed, expected)
    for scheme in (sq.W8A8_O1, sq.W8A8_O3):
        qparams = sq.smoothquant(model.apply, params, [ids], 0.5, {"router": None, ".*": scheme})
        got = jax.jit(sq.quantized(model.apply))(qparams, ids)
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
