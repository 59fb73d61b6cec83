"""Hugging Face's Flax classes, unmodified: groups written by hand, exact folds, int8, generation, refused configs."""

import doctest
import functools
import inspect
import re
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from flax_transformers import flax_transformers
from slow import slow_but

import sqjax as sq
from sqjax._trees import map_named, named_leaves
from sqjax.folding.find_graph import find_graph
from sqjax.folding.groups import Survey
from sqjax.layers.hf_flax import ASSUMPTIONS, from_flax
from sqjax.program.facts import Program
from sqjax.program.trace import trace

hf = flax_transformers()

pytestmark = pytest.mark.huggingface


class Case(NamedTuple):
    """A class and what must be found in it.

    Attributes:
        groups: (number of scales, absorbing leaves, sites) of every group.
        refused: {leaf: what its reason says} of every other matmul or convolution weight.
        outputs: what `from_flax` returns of the model's output.
        affine: whether a leaf is folded as 1 + w, which rounds.
    """

    model: str
    config: Any
    args: tuple
    groups: list
    refused: dict
    outputs: str = "logits"
    affine: bool = False


IDS = np.random.default_rng(0).integers(3, 30, (2, 5))
#: What stands between a GELU's (or SiLU's) input and its output, in the order jax writes them.
CURVED = r"`(add|integer_pow|tanh|logistic|erf|erfc|mul)` at .*modeling_flax"
#: A tied head: scaling its columns would scale the residual stream too.
TIED = r"`(gather|square|integer_pow|mul|add)` at "
#: Where a residual connection reads a norm, the next norm's variance sees the scale.
RESIDUAL = r"`(square|integer_pow|mul|sub|reduce_sum)` at .*normalization"


def norm(path, kind="scale", bias=True):
    return [f"{path}/{kind}", *([f"{path}/bias"] if bias else [])]


def dense(path, bias=True):
    return [f"{path}/kernel", *([f"{path}/bias"] if bias else [])]


def kernels(path, *names):
    return [f"{path}/{name}/kernel" for name in names]


def opt():
    config = hf.OPTConfig(
        vocab_size=31,
        hidden_size=8,
        ffn_dim=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    layer = "model/decoder/layers/0"
    groups = [
        (
            8,
            norm(f"{layer}/self_attn_layer_norm"),
            kernels(f"{layer}/self_attn", "q_proj", "k_proj", "v_proj"),
        ),
        (8, dense(f"{layer}/self_attn/v_proj"), kernels(layer, "self_attn/out_proj")),
        (8, norm(f"{layer}/final_layer_norm"), kernels(layer, "fc1")),
        (12, dense(f"{layer}/fc1"), kernels(layer, "fc2")),
    ]
    return Case(
        "FlaxOPTForCausalLM", config, (IDS,), groups, {"model/decoder/embed_tokens/embedding": TIED}
    )


def gpt2():
    """Of the fused kernel only v's third absorbs; see `test_fused_kernels_absorb_in_their_values_only`."""
    config = hf.GPT2Config(vocab_size=31, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    layer = "transformer/h/0"
    groups = [
        (8, norm(f"{layer}/ln_1"), kernels(layer, "attn/c_attn")),
        (8, dense(f"{layer}/attn/c_attn"), kernels(layer, "attn/c_proj")),
        (8, norm(f"{layer}/ln_2"), kernels(layer, "mlp/c_fc")),
    ]
    refused = {f"{layer}/mlp/c_proj/kernel": CURVED, "transformer/wte/embedding": TIED}
    return Case("FlaxGPT2LMHeadModel", config, (IDS,), groups, refused)


def gpt_neo():
    config = hf.GPTNeoConfig(
        vocab_size=31,
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        window_size=3,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=16,
    )
    groups, refused = [], {"transformer/wte/embedding": TIED}
    for i in range(2):
        layer, attention = f"transformer/h/{i}", f"transformer/h/{i}/attn/attention"
        groups += [
            (8, norm(f"{layer}/ln_1"), kernels(attention, "q_proj", "k_proj", "v_proj")),
            (8, dense(f"{attention}/v_proj", bias=False), kernels(attention, "out_proj")),
            (8, norm(f"{layer}/ln_2"), kernels(layer, "mlp/c_fc")),
        ]
        refused[f"{layer}/mlp/c_proj/kernel"] = CURVED
    return Case("FlaxGPTNeoForCausalLM", config, (IDS,), groups, refused)


def gptj():
    """One norm feeds attention and MLP, side by side."""
    config = hf.GPTJConfig(
        vocab_size=31, n_embd=8, n_layer=1, n_head=2, rotary_dim=2, n_positions=16
    )
    layer = "transformer/h/0"
    qkv = kernels(f"{layer}/attn", "q_proj", "k_proj", "v_proj")
    groups = [
        (8, norm(f"{layer}/ln_1"), [*qkv, f"{layer}/mlp/fc_in/kernel"]),
        (8, dense(f"{layer}/attn/v_proj", bias=False), kernels(layer, "attn/out_proj")),
        (8, norm("transformer/ln_f"), ["lm_head/kernel"]),
    ]
    return Case(
        "FlaxGPTJForCausalLM", config, (IDS,), groups, {f"{layer}/mlp/fc_out/kernel": CURVED}
    )


def bloom():
    """Heads are interleaved in the fused kernel: (head, q k v, channel)."""
    config = hf.BloomConfig(vocab_size=31, hidden_size=8, n_layer=1, n_head=2)
    layer = "transformer/h/0"
    groups = [
        (8, norm(f"{layer}/input_layernorm"), kernels(layer, "self_attention/query_key_value")),
        (
            8,
            dense(f"{layer}/self_attention/query_key_value"),
            kernels(layer, "self_attention/dense"),
        ),
        (8, norm(f"{layer}/post_attention_layernorm"), kernels(layer, "mlp/dense_h_to_4h")),
    ]
    refused = {
        f"{layer}/mlp/dense_4h_to_h/kernel": CURVED,
        "transformer/word_embeddings/embedding": TIED,
    }
    return Case("FlaxBloomForCausalLM", config, (IDS,), groups, refused)


SMALL = {
    "vocab_size": 31,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}


def gated(values):
    """Llama's layer: `values` channels of v are read by all heads; SiLU bars the gate, not `up`."""
    layer = "model/layers/0"
    return [
        (
            8,
            norm(f"{layer}/input_layernorm", "weight", bias=False),
            kernels(f"{layer}/self_attn", *QKV),
        ),
        (
            values,
            dense(f"{layer}/self_attn/v_proj", bias=False),
            kernels(layer, "self_attn/o_proj"),
        ),
        (
            8,
            norm(f"{layer}/post_attention_layernorm", "weight", bias=False),
            kernels(f"{layer}/mlp", *GATE_UP),
        ),
        (12, dense(f"{layer}/mlp/up_proj", bias=False), kernels(layer, "mlp/down_proj")),
    ]


QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
HEAD = (8, ["model/norm/weight"], ["lm_head/kernel"])


def llama():
    return Case("FlaxLlamaForCausalLM", hf.LlamaConfig(**SMALL), (IDS,), [*gated(4), HEAD], {})


def mistral():
    config = hf.MistralConfig(**SMALL, sliding_window=16)
    return Case("FlaxMistralForCausalLM", config, (IDS,), [*gated(4), HEAD], {})


def gemma():
    """Gains are 1 + w; one key and value head of four channels; the head is tied."""
    config = hf.GemmaConfig(
        **SMALL | {"num_key_value_heads": 1}, head_dim=4, hidden_activation="gelu_pytorch_tanh"
    )
    refused = {"model/embed_tokens/embedding": TIED}
    return Case("FlaxGemmaForCausalLM", config, (IDS,), gated(4), refused, affine=True)


ENCODER = {
    "vocab_size": 31,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


def post_norm(name, head):
    """A norm that the residual reads absorbs nothing; the last one is read by the head alone."""
    layer = f"{name}/encoder/layer/0"
    groups = [
        (8, dense(f"{layer}/attention/self/value"), kernels(layer, "attention/output/dense")),
        (8, norm(f"{layer}/output/LayerNorm"), [head]),
    ]
    refused = {
        path: RESIDUAL for path in kernels(f"{layer}/attention/self", "query", "key", "value")
    }
    refused |= {
        f"{layer}/intermediate/dense/kernel": RESIDUAL,
        f"{layer}/output/dense/kernel": CURVED,
    }
    return groups, refused | {f"{name}/embeddings/word_embeddings/embedding": TIED}


def bert():
    groups, refused = post_norm("bert", "cls/predictions/transform/dense/kernel")
    return Case("FlaxBertForMaskedLM", hf.BertConfig(**ENCODER), (IDS,), groups, refused)


def roberta():
    groups, refused = post_norm("roberta", "lm_head/dense/kernel")
    return Case("FlaxRobertaForMaskedLM", hf.RobertaConfig(**ENCODER), (IDS,), groups, refused)


def vit():
    """The patches' convolution is a site whose input nothing can scale."""
    sizes = {
        key: value
        for key, value in ENCODER.items()
        if key not in ("vocab_size", "max_position_embeddings")
    }
    config = hf.ViTConfig(**sizes, image_size=4, patch_size=2, num_labels=3)
    layer = "vit/encoder/layer/0"
    attention = f"{layer}/attention"
    groups = [
        (
            8,
            norm(f"{layer}/layernorm_before"),
            kernels(f"{attention}/attention", "query", "key", "value"),
        ),
        (8, dense(f"{attention}/attention/value"), kernels(attention, "output/dense")),
        (8, norm(f"{layer}/layernorm_after"), kernels(layer, "intermediate/dense")),
        (8, norm("vit/layernorm"), ["classifier/kernel"]),
    ]
    refused = {
        f"{layer}/output/dense/kernel": CURVED,
        "vit/embeddings/patch_embeddings/projection/kernel": "its scale would reach input 0",
    }
    images = np.random.default_rng(1).normal(size=(2, 3, 4, 4)).astype(np.float32)
    return Case("FlaxViTForImageClassification", config, (images,), groups, refused)


def clip_text():
    """Every text's last token is gathered between the last norm and the projection."""
    config = hf.CLIPTextConfig(**ENCODER, projection_dim=6, eos_token_id=30)
    layer = "text_model/encoder/layers/0"
    groups = [
        (
            8,
            norm(f"{layer}/layer_norm1"),
            kernels(f"{layer}/self_attn", "q_proj", "k_proj", "v_proj"),
        ),
        (8, dense(f"{layer}/self_attn/v_proj"), kernels(layer, "self_attn/out_proj")),
        (8, norm(f"{layer}/layer_norm2"), kernels(layer, "mlp/fc1")),
        (8, norm("text_model/final_layer_norm"), ["text_projection/kernel"]),
    ]
    refused = {f"{layer}/mlp/fc2/kernel": CURVED}
    return Case(
        "FlaxCLIPTextModelWithProjection", config, (IDS,), groups, refused, outputs="text_embeds"
    )


def whisper():
    """The encoder's last norm feeds the keys and values of the decoder's cross attention. The first convolution reads the sound,
    the second what a GELU made of the first: sites, but in no group.
    """
    config = hf.WhisperConfig(
        vocab_size=31,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        num_mel_bins=4,
        max_source_positions=6,
        max_target_positions=16,
        decoder_start_token_id=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        begin_suppress_tokens=None,
    )
    encoder, decoder = "model/encoder/layers/0", "model/decoder/layers/0"
    groups, refused = [], {"model/decoder/embed_tokens/embedding": TIED}
    for layer in (encoder, decoder):
        groups += [
            (8, norm(f"{layer}/self_attn_layer_norm"), kernels(f"{layer}/self_attn", *QKV)),
            (8, dense(f"{layer}/self_attn/v_proj"), kernels(layer, "self_attn/out_proj")),
            (8, norm(f"{layer}/final_layer_norm"), kernels(layer, "fc1")),
        ]
        refused[f"{layer}/fc2/kernel"] = CURVED
    groups += [
        (
            8,
            norm("model/encoder/layer_norm"),
            kernels(f"{decoder}/encoder_attn", "k_proj", "v_proj"),
        ),
        (8, norm(f"{decoder}/encoder_attn_layer_norm"), kernels(decoder, "encoder_attn/q_proj")),
        (8, dense(f"{decoder}/encoder_attn/v_proj"), kernels(decoder, "encoder_attn/out_proj")),
    ]
    first, second = kernels("model/encoder", "conv1", "conv2")
    refused |= {first: "its scale would reach input 0", second: CURVED}
    sound = np.random.default_rng(2).normal(size=(2, 4, 12)).astype(np.float32)
    return Case("FlaxWhisperForConditionalGeneration", config, (sound, IDS), groups, refused)


CASES = [
    opt,
    gpt2,
    gpt_neo,
    gptj,
    bloom,
    llama,
    mistral,
    gemma,
    bert,
    roberta,
    vit,
    clip_text,
    whisper,
]


#: The quick one has a fused kernel.
each_class = pytest.mark.parametrize("build", slow_but(CASES, gpt2))


def random_leaf(path, shape):
    """Gains about 1, the rest about 0: zeros and ones would hide what happens to biases and gains."""
    noise = np.random.default_rng([sum(path.encode()), *shape.shape]).normal(size=shape.shape)
    return jnp.asarray(0.3 * noise + (path.endswith(("scale", "norm/weight"))), shape.dtype)


class Built(NamedTuple):
    case: Case
    fn: Any
    params: Any
    stats: Any


@functools.cache
def built(build):
    """The model with random parameters, calibrated; once for all tests."""
    case = build()
    model = getattr(hf, case.model)(case.config, _do_init=False)
    fn, params = from_flax(
        model, map_named(random_leaf, model.params_shape_tree), outputs=case.outputs
    )
    return Built(case, fn, params, sq.calibrate(fn, params, [case.args]))


def sorted_groups(groups):
    return sorted((size, sorted(absorbers), sorted(sites)) for size, absorbers, sites in groups)


@each_class
@pytest.mark.slow
def test_groups_are_those_written_by_hand(build):
    case, _, _, stats = built(build)
    got = [(g.size, g.absorbers, [path for path, _ in g.sites]) for g in stats.graph.groups]
    assert sorted_groups(got) == sorted_groups(case.groups)


@each_class
@pytest.mark.slow
def test_refused_sites_say_why(build):
    case, _, _, stats = built(build)
    reasons = dict(stats.graph.refused)
    assert reasons.keys() == case.refused.keys()
    for path, pattern in case.refused.items():
        assert re.search(pattern, reasons[path]), f"{path}: {reasons[path]}"
    grouped = {path for g in stats.graph.groups for path, _ in g.sites}
    assert {site.path for site in stats.graph.sites} == grouped | reasons.keys()


@functools.cache
def folded(build):
    """((outputs, parameters) at s = 1, the same at powers of two) of one compiled program with s as an argument."""
    case, fn, params, stats = built(build)
    rng = np.random.default_rng(3)
    draw = {
        g.name: 2.0 ** (rng.integers(1, 4, g.size) * rng.choice([-1, 1], g.size))
        for g in stats.graph.groups
    }
    ones, drawn = (
        {name: jnp.asarray(f(s), jnp.float32) for name, s in draw.items()}
        for f in (np.ones_like, np.array)
    )
    run = jax.jit(lambda p, s, args: (fn(changed := sq.fold(p, stats.graph, s), *args), changed))
    return run(params, ones, case.args), run(params, drawn, case.args)


def leaves_of(tree):
    return dict(zip(*named_leaves(tree)[:2], strict=True))


@each_class
def test_folds_with_powers_of_two_change_no_bit(build):
    case, _, _, stats = built(build)
    (expected, before), (got, after) = folded(build)
    before, after = leaves_of(before), leaves_of(after)
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {path for g in stats.graph.groups for path, _ in g.leaves}
    if case.affine:
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    else:
        np.testing.assert_array_equal(got, expected)


@each_class
@pytest.mark.slow
def test_every_site_runs_in_int8(build):
    """Outputs near float's: rounding moves each activation by at most 1/254 of its token's largest."""
    case, fn, params, stats = built(build)
    qparams = sq.quantize(sq.smooth(params, stats, 0.5), stats, sq.W8A8)
    program = jax.jit(sq.quantized(fn)).trace(qparams, *case.args)
    int8 = [dot for dot in jaxprs.dots(program.jaxpr) if dot.dtypes == jaxprs.INT8_DOT]
    assert len(int8) == len(stats.graph.sites)
    expected, got = folded(build)[0][0], program.lower().compile()(qparams, *case.args)
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert 0 < error < 0.05


# What a group holds ---------------------------------------------------------------------------------------------------


def labels_of(build, site, leaf):
    """(the scale of each of the site's channels, the scale that divides each element of the leaf; 0: none)."""
    graph = built(build).stats.graph
    group = next(g for g in graph.groups if site in dict(g.sites) and leaf in g.absorbers)
    return dict(group.sites)[site].array, -dict(group.leaves)[leaf].array


def test_fused_kernels_absorb_in_their_values_only():
    """GPT-2 lays q, k, v side by side, 8 columns each; its kernels are (out, in)."""
    attention = "transformer/h/0/attn"
    site, bias = labels_of(gpt2, f"{attention}/c_proj/kernel", f"{attention}/c_attn/bias")
    np.testing.assert_array_equal(bias, [0] * 16 + list(site))
    _, kernel = labels_of(gpt2, f"{attention}/c_proj/kernel", f"{attention}/c_attn/kernel")
    np.testing.assert_array_equal(kernel.ravel(), bias)
    assert kernel.shape == (24, 1)


@pytest.mark.slow
def test_interleaved_heads_absorb_in_their_values_only():
    """BLOOM's columns are (2 heads, q k v, 4 channels)."""
    attention = "transformer/h/0/self_attention"
    site, bias = labels_of(bloom, f"{attention}/dense/kernel", f"{attention}/query_key_value/bias")
    bias = bias.reshape(2, 3, 4)
    np.testing.assert_array_equal(bias[:, :2], 0)
    np.testing.assert_array_equal(bias[:, 2].ravel(), site)
    assert len(set(site)) == 8


SHARING = {"llama": (llama, 2), "mistral": (mistral, 2), "gemma": (gemma, 4)}


@pytest.mark.parametrize(("build", "heads"), slow_but(SHARING, "gemma"))
@pytest.mark.slow
def test_query_heads_that_read_one_value_head_share_its_scales(build, heads):
    attention = "model/layers/0/self_attn"
    site, columns = labels_of(build, f"{attention}/o_proj/kernel", f"{attention}/v_proj/kernel")
    shape = {"llama": (2, 2, 2), "mistral": (2, 2, 2), "gemma": (1, 4, 4)}[
        build.__name__
    ]  # (kv heads, queries, d)
    site = site.reshape(shape)
    np.testing.assert_array_equal(site, np.broadcast_to(site[:, :1], shape))
    np.testing.assert_array_equal(columns.ravel(), site[:, 0].ravel())
    assert shape[1] == heads


@pytest.mark.slow
def test_one_plus_w_absorbs_affinely():
    """(1 + w') s = 1 + w."""
    _, _, params, stats = built(gemma)
    norm = "model/layers/0/input_layernorm/weight"
    group = next(g for g in stats.graph.groups if norm in g.absorbers)
    s = np.linspace(0.5, 3, 8, dtype=np.float32)
    changed = sq.fold(params, stats.graph, {group.name: jnp.asarray(s)})
    before, after = (leaves_of(tree)[norm] for tree in (params, changed))
    scale_of = -dict(group.leaves)[norm].array - 1
    np.testing.assert_allclose((1 + after) * s[scale_of], 1 + before, rtol=1e-6)


@pytest.mark.slow
def test_one_plus_w_in_bfloat16_is_refused():
    """1 + w computed in bfloat16 is too coarse for w = (1 + w)/s - 1 to bring it back."""
    case, fn, params, _ = built(gemma)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    graph = find_graph(Survey.of(Program(trace(fn, params, case.args, {})[0]), {}))
    reasons = dict(graph.refused)
    for path in kernels("model/layers/0/self_attn", *QKV):
        assert re.search(r"1 \+ model/layers/0/input_layernorm/weight, in bfloat16", reasons[path])


# The function ---------------------------------------------------------------------------------------------------------


class Compiled(hf.FlaxOPTForCausalLM):
    """The class, initialised by one compiled program: op by op it takes ten seconds."""

    def init_weights(self, rng, input_shape, params=None):
        return jax.jit(super().init_weights, static_argnums=1)(rng, input_shape)


@functools.cache
def initialised():
    return Compiled(opt().config)


@pytest.mark.slow
def test_the_function_is_the_model():
    """The model's own call, to the bit; the whole output if nothing else is asked for."""
    _, _, params, _ = built(opt)
    model = initialised()
    model.params = flax.core.freeze(params)
    fn, own = from_flax(model)
    assert jax.tree.structure(own) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, own, params))
    mask = np.tril(np.ones(5, int))[[2, 4]]
    expected, got = (
        jax.jit(f)(IDS, mask) for f in (model, lambda ids, mask: fn(own, ids, attention_mask=mask))
    )
    assert type(got) is type(expected)
    np.testing.assert_array_equal(got.logits, expected.logits)
    assert list(got) == ["logits"]
    assert not np.array_equal(got.logits, jax.jit(fn)(own, IDS).logits)


@pytest.mark.slow
@pytest.mark.every_case
def test_named_outputs():
    case, fn, params, _ = built(whisper)
    model = getattr(hf, case.model)(case.config, _do_init=False)
    both, _ = from_flax(model, params, outputs=("logits", "encoder_last_hidden_state"))
    got = jax.jit(both)(params, *case.args)
    assert {name: x.shape for name, x in got.items()} == {
        "logits": (2, 5, 31),
        "encoder_last_hidden_state": (2, 6, 8),
    }
    np.testing.assert_array_equal(got["logits"], jax.jit(fn)(params, *case.args))
    wrong, _ = from_flax(model, params, outputs="logit")
    with pytest.raises(
        ValueError, match=r"FlaxWhisper\w+: outputs \['logit'\]: expected some of \['logits'"
    ):
        jax.eval_shape(wrong, params, *case.args)


@pytest.mark.slow
def test_a_returned_activation_is_not_scaled():
    """A Whisper that returns the encoder's output keeps the encoder's last norm as it is."""
    case, _, params, _ = built(whisper)
    fn, _ = from_flax(getattr(hf, case.model)(case.config, _do_init=False), params)
    program = Program(trace(fn, params, case.args, {})[0])
    reasons = dict(find_graph(Survey.of(program, {})).refused)
    for path in kernels("model/decoder/layers/0/encoder_attn", "k_proj", "v_proj"):
        assert "output of fn" in reasons[path]


@pytest.mark.slow
def test_the_function_is_hashable_and_holds_no_parameters():
    _, _, params, _ = built(opt)
    model = initialised()
    fn, _ = from_flax(model)
    other, _ = from_flax(model)
    assert fn == fn
    assert fn != other
    assert hash(fn) == hash(fn)
    assert fn.generate == fn.generate
    assert hash(fn.generate) == hash(fn.generate)
    assert sq.quantized(fn) is sq.quantized(fn)
    assert sq.quantized(fn.generate) is sq.quantized(fn.generate)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(fn.model.params))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(model.params))
    run = jax.jit(fn)
    run(params, IDS)
    run(jax.tree.map(lambda x: 2 * x, params), IDS)
    assert run._cache_size() == 1


def greedy(run, params, prompt, steps, *before):
    """Without a cache: the whole sequence again for every token; a causal model does not see the zeros at its end."""
    ids = np.pad(prompt, [(0, 0), (0, steps)])
    for at in range(prompt.shape[1], ids.shape[1]):
        ids[:, at] = np.argmax(run(params, *before, ids)[:, at - 1], -1)
    return ids


#: The model's own `generate` for four tokens; no token ends the sequence.
ENDLESS = {"max_new_tokens": 4, "eos_token_id": 99, "pad_token_id": 0}
STATIC = (*ENDLESS, "num_beams")


@pytest.mark.slow
def test_generate_is_greedy_decoding():
    _, fn, params, _ = built(opt)
    got = jax.jit(fn.generate, static_argnames=STATIC)(params, IDS, **ENDLESS).sequences
    np.testing.assert_array_equal(got, greedy(jax.jit(fn), params, IDS, 4))


@pytest.mark.parametrize("build", slow_but([gpt2, llama], gpt2))
@pytest.mark.slow
def test_quantized_generate_is_greedy_decoding_in_int8(build):
    """With a scale for every token, what a token sees does not depend on the cache: both ways agree."""
    _, fn, params, stats = built(build)
    qparams = sq.quantize(params, stats, sq.W8A8)
    program = jax.jit(sq.quantized(fn.generate), static_argnames=STATIC).trace(
        qparams, IDS, **ENDLESS
    )
    got = program.lower().compile()(qparams, IDS).sequences
    np.testing.assert_array_equal(got, greedy(jax.jit(sq.quantized(fn)), qparams, IDS, 4))
    int8 = [dot for dot in jaxprs.dots(program.jaxpr) if dot.dtypes == jaxprs.INT8_DOT]
    assert len(int8) == 2 * len(stats.graph.sites)  # the prompt, and the body of the loop


@pytest.mark.slow
@pytest.mark.every_case
def test_quantized_beam_search_runs_the_models_own_loop():
    """The score of a sequence that has not ended is the log-probability of its new tokens in the int8 model."""
    _, fn, params, stats = built(gpt2)
    qparams, beams = sq.quantize(params, stats, sq.W8A8), ENDLESS | {"num_beams": 2}
    got = jax.jit(sq.quantized(fn.generate), static_argnames=STATIC)(qparams, IDS, **beams)
    np.testing.assert_array_equal(got.sequences[:, :5], IDS)
    odds = jax.nn.log_softmax(jax.jit(sq.quantized(fn))(qparams, got.sequences))[:, 4:-1]
    odds = np.take_along_axis(odds, np.asarray(got.sequences)[:, 5:, None], -1)
    np.testing.assert_allclose(got.scores, odds.sum((1, 2)), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.every_case
def test_speech_is_transcribed_in_int8():
    """The encoder runs once, the decoder from its start token on."""
    case, fn, params, stats = built(whisper)
    qparams, sound = sq.quantize(params, stats, sq.W8A8), case.args[0]
    got = jax.jit(sq.quantized(fn.generate), static_argnames=STATIC)(
        qparams, sound, **ENDLESS
    ).sequences
    expected = greedy(jax.jit(sq.quantized(fn)), qparams, np.ones((2, 1), int), 4, sound)
    np.testing.assert_array_equal(got, expected)


# What is refused ------------------------------------------------------------------------------------------------------

LLAMA, MISTRAL = SMALL, SMALL | {"sliding_window": 16}
GEMMA = SMALL | {"head_dim": 4, "num_key_value_heads": 1}
GPT2 = {"vocab_size": 31, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
OPT = {
    "vocab_size": 31,
    "hidden_size": 8,
    "ffn_dim": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
LOAD = r"read the checkpoint with sqjax\.models\.load\(directory\)"
OWN = r"write the model as a function of \(params, \*inputs\)"


@pytest.mark.parametrize(
    ("model", "config", "change", "message"),
    [
        (
            "LlamaForCausalLM",
            LLAMA,
            {"rope_theta": 5e5},
            rf"rope_theta = 500000\.0: .*base 10000; {LOAD}",
        ),
        (
            "LlamaModel",
            LLAMA,
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            f"rope_scaling = .*{LOAD}",
        ),
        (
            "LlamaForCausalLM",
            LLAMA,
            {"tie_word_embeddings": True},
            f"tie_word_embeddings = True: .*own; {LOAD}",
        ),
        ("LlamaForCausalLM", LLAMA, {"mlp_bias": True}, "mlp_bias = True: .*no biases in its MLP"),
        (
            "LlamaForCausalLM",
            LLAMA,
            {"head_dim": 4},
            "head_dim = 4: .*hidden_size / num_attention_heads",
        ),
        (
            "LlamaForCausalLM",
            LLAMA,
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor = 0.5: .*whole heads",
        ),
        ("MistralForCausalLM", MISTRAL, {"rope_theta": 1e6}, rf"rope_theta = 1000000\.0: .*{LOAD}"),
        (
            "MistralForCausalLM",
            MISTRAL,
            {"tie_word_embeddings": True},
            "tie_word_embeddings = True",
        ),
        (
            "MistralForCausalLM",
            MISTRAL,
            {"sliding_window": 3},
            "sliding_window = 3: .*one token too few",
        ),
        (
            "MistralForCausalLM",
            MISTRAL,
            {"sliding_window": None},
            "sliding_window = None: .*all tokens but the last",
        ),
        ("MistralForCausalLM", MISTRAL, {"head_dim": 4}, "head_dim = 4"),
        ("GemmaForCausalLM", GEMMA, {"rope_theta": 1e6}, f"rope_theta = .*{OWN}"),
        (
            "GPT2LMHeadModel",
            GPT2,
            {"scale_attn_weights": False},
            f"scale_attn_weights = False.*{OWN}",
        ),
        (
            "GPT2Model",
            GPT2,
            {"scale_attn_by_inverse_layer_idx": True},
            f"scale_attn_by_.* = True.*{OWN}",
        ),
        ("OPTForCausalLM", OPT, {"enable_bias": False}, f"enable_bias = False: .*{OWN}"),
        (
            "OPTForCausalLM",
            OPT,
            {"layer_norm_elementwise_affine": False},
            "layer_norm_elementwise_affine = False",
        ),
        (
            "BertModel",
            ENCODER,
            {"position_embedding_type": "relative_key"},
            "position_embedding_type = 'relative_key'",
        ),
        (
            "RobertaModel",
            ENCODER,
            {"position_embedding_type": "relative_key"},
            "has absolute positions",
        ),
    ],
)
@pytest.mark.slow
@pytest.mark.each_case
def test_fields_that_a_class_ignores(model, config, change, message):
    """The model is refused, with the fix; and rightly: its class traces to one program whatever the field says."""
    kind = getattr(hf, f"Flax{model}")
    plain, other = (kind(kind.config_class(**c), _do_init=False) for c in (config, config | change))
    with pytest.raises(ValueError, match=message):
        from_flax(other, {})
    from_flax(plain, {})
    assert str(plain.params_shape_tree) == str(other.params_shape_tree)
    programs = [
        jax.make_jaxpr(lambda p, m=m: m(IDS, params=p)[0])(plain.params_shape_tree)
        for m in (plain, other)
    ]
    same = len({str(p) for p in programs}) == 1 and all(
        map(np.array_equal, *(p.consts for p in programs))
    )
    assert same == ("sliding_window" not in change)


@pytest.mark.slow
def test_mistral_masks_one_token_too_few():
    """A window of w tokens is the token itself and w - 1 before it; the class sees one more, or with no window one."""

    def seen(window):
        config = hf.MistralConfig(**SMALL, sliding_window=window)
        model = hf.FlaxMistralForCausalLM(config, _do_init=False)
        params = map_named(random_leaf, model.params_shape_tree)
        run = jax.jit(
            lambda params, ids: model(ids, params=params, output_attentions=True).attentions[0]
        )
        attention = run(params, np.arange(3, 15)[None])
        return np.count_nonzero(attention[0, 0, -1])

    assert [seen(3), seen(16), seen(None)] == [4, 12, 1]


def test_every_problem_in_one_error():
    config = hf.LlamaConfig(**SMALL, rope_theta=5e5, tie_word_embeddings=True)
    with pytest.raises(
        ValueError, match=r"FlaxLlamaForCausalLM would compute (.|\n)*rope_theta(.|\n)*tie_word_emb"
    ):
        from_flax(hf.FlaxLlamaForCausalLM(config, _do_init=False), {})


@pytest.mark.parametrize("assumption", ASSUMPTIONS, ids=lambda a: f"{a.classes}-{a.field}")
@pytest.mark.slow
@pytest.mark.each_case
def test_the_table_is_true_of_the_installed_classes(assumption):
    """No class of these names reads the field, but for two that read and misuse it."""
    names = [
        name for name in dir(hf) if re.match(assumption.classes, name) and name.startswith("Flax")
    ]
    assert names
    source = {inspect.getsource(inspect.getmodule(getattr(hf, name))) for name in names}
    reads = any(re.search(rf"config\.{assumption.field}\b", text) for text in source)
    misused = assumption.classes.startswith("FlaxMistral") and assumption.field == "sliding_window"
    misused |= (
        "Mistral" in assumption.classes and assumption.field == "rope_theta"
    )  # stored, then used by nothing
    assert reads == misused


def test_what_is_no_flax_model():
    with pytest.raises(
        ValueError,
        match=r"Hugging Face's Flax models .*, got OPTConfig; transformers 5 has no Flax classes.*hf",
    ):
        from_flax(hf.OPTConfig())
    model = hf.FlaxOPTForCausalLM(opt().config, _do_init=False)
    with pytest.raises(
        ValueError,
        match=r"holds no parameters \(_do_init=False\); pass them: from_flax\(model, params\)",
    ):
        from_flax(model)


@pytest.mark.parametrize("name", ["train", "deterministic", "dropout_rng", "return_dict"])
@pytest.mark.slow
def test_arguments_of_training(name):
    _, fn, params, _ = built(opt)
    with pytest.raises(ValueError, match=f"{name}: fn runs for inference"):
        fn(params, IDS, **{name: False})


@pytest.mark.slow
def test_the_docstrings_example_runs():
    [test] = doctest.DocTestFinder(recurse=False).find(from_flax, globs={})
    report = []
    doctest.DocTestRunner().run(test, out=report.append)
    assert not report, "".join(report)
