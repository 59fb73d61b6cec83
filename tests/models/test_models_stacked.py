"""Layers in one stack: the same scales, codes, logits and tokens as layers apart; a loop that copies no weight."""

import re
from collections import Counter
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from slow import slow_but
from tiny_llama import GROUPED, random_ids, random_params

import sqjax as sq
from sqjax._trees import named_leaves
from sqjax.models import (
    CacheFormat,
    Model,
    fuse,
    generate,
    greedy,
    loglikelihoods,
    stack_layers,
    unstack_layers,
)
from sqjax.models.decoding import generation
from sqjax.models.evaluation.perplexity import perplexity

CONFIG = replace(GROUPED, num_layers=2, tie_embeddings=False, attention_bias=True)
MODEL = Model(CONFIG)
IDS = random_ids(4, 12)
LAYERS = range(CONFIG.num_layers)
PROMPTS = [[3, 14, 15, 9, 26, 5, 35], [8], [9, 7, 9, 3]]
SCHEMES = {
    "O1": sq.W8A8_O1,
    "O3": sq.W8A8_O3,
    "one of each": {
        "q_proj": sq.W8A8_O2.replace(weight=sq.Int8(per_tensor=True)),
        "k_proj": sq.W8A8_O3.replace(weight=sq.Int8(per_tensor=True)),
        "v_proj": sq.W8A16,
        "o_proj": sq.W4A16.replace(weight=sq.Int4(group_size=8, zero_point=True)),
        "gate_proj": sq.W4A8.replace(weight=sq.Int4(group_size=8, zero_point=True, two_level=True)),
        "up_proj": sq.FP8,
        ".*": sq.W8A8.replace(smoothing=0.5),
    },
}


def stacked_by_hand(params):
    """In numpy: what `stack_layers` should make of float parameters."""
    layers = params["model"]["layers"]
    one = jax.tree.map(
        lambda *rows: jnp.asarray(np.stack(rows)), *(layers[str(i)] for i in range(len(layers)))
    )
    return {**params, "model": {**params["model"], "layers": one}}


@cache
def calibrated():
    """For layers apart, and in one stack: parameters smoothed by powers of two (which is exact), and statistics."""
    apart, found = random_params(MODEL), []
    for params in (apart, stacked_by_hand(apart)):
        stats = sq.calibrate(MODEL.apply, params, [IDS])
        s = sq.scales(params, stats, round_scales="pow2")
        found.append((sq.fold(params, stats.graph, s), sq.fold_stats(stats, s), stats))
    return found


@cache
def trees(scheme):
    """(layers apart, one stack), float or quantized."""
    if scheme == "float":
        params = random_params(MODEL)
        return params, stacked_by_hand(params)
    (apart, of_apart, _), (stacked, of_stacked, _) = calibrated()
    return sq.quantize(apart, of_apart, SCHEMES[scheme]), sq.quantize(
        stacked, of_stacked, SCHEMES[scheme]
    )


def assert_same(got, expected):
    """The same tree to the bit, static fields included."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def assert_alike(got, expected):
    """The same tree; scales but for rounding, as two programs compute them, and codes but for what that moves."""

    def compare(x, y):
        assert x.dtype == y.dtype
        codes = jnp.issubdtype(x.dtype, jnp.integer)
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        if codes:
            assert np.abs(x - y).max() <= 1
            assert (x != y).mean() < 0.01
        else:
            np.testing.assert_allclose(x, y, rtol=2**-21)

    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(compare, got, expected)


#: Compiled once for all tests that ask for the logits of a tree of one form.
APPLY = jax.jit(sq.quantized(MODEL.apply))


def logits(params):
    return np.asarray(APPLY(params, IDS))


# The same numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stacks_are_those_made_by_hand():
    params = random_params(MODEL)
    stacked = stack_layers(params)
    assert_same(stacked, stacked_by_hand(params))
    assert stacked["model"]["layers"]["self_attn"]["q_proj"]["kernel"].shape == (2, 32, 32)
    assert stacked["model"]["layers"]["self_attn"]["q_proj"]["bias"].shape == (2, 32)
    assert_same(unstack_layers(stacked), params)
    assert stack_layers(stacked) is stacked
    assert unstack_layers(params) is params


@pytest.mark.slow
def test_a_stack_is_one_scan_of_one_layer():
    """And what is compiled does not grow with the number of layers."""
    apart, stacked = trees("float")
    program = jaxprs.of(MODEL.apply, stacked, IDS)
    [scan] = [e for e in jaxprs.equations(program) if e.primitive.name == "scan"]
    assert scan.params["length"] == 2
    assert len(jaxprs.dots(program)) == 9 + 1  # seven projections and two of attention; the head
    assert len(jaxprs.dots(jaxprs.of(MODEL.apply, apart, IDS))) == 2 * 9 + 1


@pytest.mark.slow
def test_gradients_are_those_of_layers_apart():
    apart, stacked = trees("float")
    loss = jax.jit(jax.grad(lambda params: (MODEL.apply(params, IDS) ** 2).mean()))
    expected, got = stacked_by_hand(loss(apart)), loss(stacked)
    for want, have in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.every_case
def test_every_layer_has_the_statistics_and_scales_that_it_has_apart():
    (apart, _, of_apart), (stacked, _, of_stacked) = calibrated()
    s_apart, s_stacked = (
        sq.scales(random_params(MODEL), of_apart),
        sq.scales(stack_layers(random_params(MODEL)), of_stacked),
    )
    assert len(s_stacked) == 5
    assert len(s_apart) == 2 * 4 + 1
    for path, found in of_stacked.absmax.items():
        for i in LAYERS if "layers" in path else ():
            own = of_apart.absmax[path.replace("layers/", f"layers/{i}/")]
            np.testing.assert_allclose(found[i], own, rtol=1e-5)
    for name, s in s_stacked.items():
        rows = [
            s_apart[name.replace("layers/", f"layers/{i}/")]
            for i in (LAYERS if "layers" in name else [0])
        ]
        np.testing.assert_allclose(s.reshape(len(rows), -1), np.stack(rows), rtol=1e-5)
    assert_same(stack_layers(apart), stacked)
    gain = stacked["model"]["layers"]["input_layernorm"]["weight"]
    assert (
        np.asarray(gain)
        != stack_layers(random_params(MODEL))["model"]["layers"]["input_layernorm"]["weight"]
    ).any()


@pytest.mark.parametrize("scheme", slow_but(list(SCHEMES)))
@pytest.mark.slow
def test_codes_scales_and_logits_are_those_of_layers_apart(scheme):
    apart, stacked = trees(scheme)
    assert_alike(stack_layers(apart), stacked)
    assert_same(stack_layers(unstack_layers(stacked)), stacked)
    expected, got, exact = logits(apart), logits(stacked), logits(trees("float")[1])
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    assert (
        1e-3 < np.abs(got - exact).max() / np.abs(exact).max() < 0.7
    )  # it is quantized; 4 bits of so few are coarse


@pytest.mark.slow
@pytest.mark.every_case
def test_outliers_of_a_stack_come_apart():
    """Every layer of a stack has as many as the one that has most; apart they are fewer, and no stack."""
    (apart, of_apart, _), (stacked, of_stacked, _) = calibrated()
    scheme = sq.W8A8_OUTLIERS.replace(outliers=3.0)
    qparams = sq.quantize(stacked, of_stacked, scheme)
    np.testing.assert_allclose(logits(unstack_layers(qparams)), logits(qparams), atol=1e-5)
    assert_same(stack_layers(unstack_layers(qparams)), qparams)
    assert not np.allclose(logits(qparams), logits(trees("O1")[1]), atol=1e-2)
    with pytest.raises(
        ValueError,
        match=r"model/layers/\d/\w+/\w+/kernel: expected what layer 0 has, .* stack the float",
    ):
        stack_layers(sq.quantize(apart, of_apart, scheme))


@pytest.mark.slow
@pytest.mark.every_case
def test_smoothquant_of_a_stack():
    params, (_, _, stats) = stack_layers(random_params(MODEL)), calibrated()[1]
    s = sq.scales(params, stats, 0.5)
    expected = sq.quantize(sq.fold(params, stats.graph, s), sq.fold_stats(stats, s), sq.W8A8_O3)
    got = sq.smoothquant(MODEL.apply, params, [IDS], 0.5, sq.W8A8_O3)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    np.testing.assert_allclose(logits(got), logits(expected), atol=1e-3)
    assert not np.allclose(logits(got), logits(params), atol=1e-2)


@pytest.mark.parametrize("scheme", slow_but(["float", "O3"], "O3"))
@pytest.mark.slow
def test_kernels_of_a_stack_are_fused(scheme):
    apart, stacked = trees(scheme)
    assert_alike(unstack_layers(fuse(stacked)), fuse(apart))
    assert fuse(stacked)["model"]["layers"]["mlp"]["gate_proj+up_proj"]["kernel"].shape == (
        2,
        32,
        64,
    )
    np.testing.assert_allclose(logits(fuse(stacked)), logits(apart), atol=1e-4)


@pytest.mark.slow
def test_files_keep_a_stack(tmp_path):
    _, stacked = trees("one of each")
    sq.save(tmp_path / "stack.safetensors", stacked)
    assert_same(sq.load(tmp_path / "stack.safetensors"), stacked)


# Decoding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", slow_but(["float", "one of each"]))
@pytest.mark.slow
def test_decode_reads_a_stack_as_it_is(scheme):
    """A prefill and a step; in float the whole text without a cache is a reference too."""
    run, found = jax.jit(sq.quantized(MODEL.decode)), []
    for params in trees(scheme):
        _, slots = run(params, IDS[:, :11], MODEL.init_cache(4, 12))
        last, slots = run(params, IDS[:, 11:], slots)
        assert int(slots.length) == 12
        found.append(np.asarray(last))
    expected, got = found
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    if scheme == "float":
        np.testing.assert_allclose(
            got, logits(trees("float")[0])[:, -1], atol=1e-5 * np.abs(expected).max(), rtol=0
        )


@pytest.mark.slow
@pytest.mark.every_case
def test_evaluation_of_a_stack():
    """Without a cache in a scan; through a cache apart."""
    (apart, stacked), exact = trees("O1"), trees("float")[0]
    got, expected, other = (
        perplexity(MODEL, params, IDS[:2]) for params in (stacked, apart, exact)
    )
    assert got == pytest.approx(expected, rel=1e-5)
    assert got != pytest.approx(other, rel=1e-5)
    pairs = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9])]
    got, expected = (
        loglikelihoods(MODEL, params, pairs, cache="int8") for params in (stacked, apart)
    )
    assert [x.logprob for x in got] == pytest.approx([x.logprob for x in expected], rel=1e-5)


#: The shapes of every weight of a layer, as a set of sizes: stored either way, with an axis of layers of 1 or 2.
WEIGHTS = {frozenset((32,)), frozenset((32, 16))}


def weight_copies(compiled: str) -> Counter:
    """What makes an array of a weight's size in the bodies of a compiled program's loops, fused operations too."""
    found = re.findall(
        r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", compiled, re.MULTILINE | re.DOTALL
    )
    computations, seen, todo = dict(found), set(), re.findall(r"body=%?([\w.\-]+)", compiled)
    assert todo, "no loop"
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += [
                called
                for called in re.findall(r"%([\w.\-]+)", computations[name])
                if called in computations
            ]
    made = Counter()
    for line in "\n".join(computations[name] for name in seen).splitlines():
        match = re.match(r"\s*(?:ROOT )?%\S+ = \w+\[([\d,]+)\]\S* ([\w\-]+)\(", line)
        sizes = [int(n) for n in match[1].split(",") if n not in ("1", "2")] if match else []
        if len(sizes) == 2 and frozenset(sizes) in WEIGHTS:
            made[match[2]] += 1
    return Counter(
        {
            name: n
            for name, n in made.items()
            if name not in ("parameter", "get-tuple-element", "bitcast")
        }
    )


@pytest.mark.slow
@pytest.mark.every_case  # as the tests below, whose `weight_copies` it is about
def test_the_loop_of_a_stack_taken_apart_on_every_step_copies_every_weight():
    """What `generate` and `greedy` must not do: a slice of each of seven weights and two layers."""

    def careless(params, ids):
        decode = sq.quantized(MODEL.decode)
        first = decode(params, ids, MODEL.init_cache(1, 12))
        step = lambda state, _: (
            decode(params, state[0].argmax(-1)[:, None].astype(jnp.int32), state[1]),
            state[0],
        )
        return jax.lax.scan(step, first, length=4)[1]

    made = weight_copies(jax.jit(careless).lower(trees("O1")[1], IDS[:1, :7]).compile().as_text())
    assert made["slice"] == 7 * 2


@pytest.mark.slow
@pytest.mark.every_case
def test_greedy():
    apart, stacked = trees("O1")
    prompt = jnp.asarray(PROMPTS[:1])
    compiled = greedy.lower(MODEL, stacked, prompt, 6, "int8").compile()
    assert not weight_copies(compiled.as_text())
    assert (
        compiled(stacked, prompt).tolist()
        == generate(MODEL, apart, PROMPTS[0], 6, cache="int8").tokens
    )


GENERATED = [("O1", "int8"), ("float", "e4m3"), ("one of each", "int4")]


@pytest.mark.parametrize("case", slow_but(GENERATED))
@pytest.mark.slow
@pytest.mark.every_case
def test_generate(case, monkeypatch):
    """The program that both forms run is one: it is compiled for the stack."""
    scheme, kind = case
    (apart, stacked), compiled, advance = trees(scheme), [], generation._advance

    def compiled_once(model, *args):
        if not compiled:
            compiled.append(advance.lower(model, *args).compile())
        return compiled[0](*args)

    monkeypatch.setattr(generation, "_advance", compiled_once)
    kind = {"int4": CacheFormat("int4", group=4, zero_point=True, keys="rotated")}.get(kind, kind)
    got = generate(MODEL, stacked, PROMPTS, 8, cache=kind, stream=lambda *_: None)
    assert not weight_copies(compiled[0].as_text())
    monkeypatch.undo()
    assert got == generate(MODEL, apart, PROMPTS, 8, cache=kind)
    assert len({token for row in got.tokens for token in row}) > 4


@pytest.mark.slow
def test_chunks_change_nothing():
    apart, stacked = trees("float")
    assert (
        generate(MODEL, stacked, PROMPTS, 8, chunk=3).tokens
        == generate(MODEL, apart, PROMPTS, 8).tokens
    )


# Errors --------------------------------------------------------------------------------------------------------------


def changed(params, **layers):
    return {
        **params,
        "model": {**params["model"], "layers": {**params["model"]["layers"], **layers}},
    }


def without(params, name):
    layers = {key: x for key, x in params["model"]["layers"].items() if key != name}
    return {**params, "model": {**params["model"], "layers": layers}}


def bad_trees():
    apart = random_params(MODEL)
    stacked = stack_layers(apart)
    one, norm = apart["model"]["layers"]["0"], apart["model"]["layers"]["0"]["input_layernorm"]
    both = "model/layers: expected layers apart, named '0', '1', ... without a gap, or one stack of"
    return {
        "both": (changed(stacked, **{"0": one}), re.escape(both)),
        "a part is missing": (without(stacked, "mlp"), re.escape(both)),
        "a gap": (without(apart, "0"), re.escape(both)),
        "no layers": (changed({"model": {"layers": {}}}), re.escape(both)),
        "one norm for all": (
            changed(stacked, input_layernorm=norm),
            r"model/layers/\S+: expected shape \(layers, .*, got \(.*make stacks with stack_layers",
        ),
    }


@pytest.mark.parametrize(
    "name", ["both", "a part is missing", "a gap", "no layers", "one norm for all"]
)
@pytest.mark.slow
def test_a_tree_of_neither_form(name):
    params, message = bad_trees()[name]
    for call in (unstack_layers, stack_layers, lambda params: generate(MODEL, params, PROMPTS, 2)):
        if call is stack_layers and name == "one norm for all":
            continue  # it is a stack by its names, and returned as it is
        with pytest.raises(ValueError, match=message):
            call(params)
    if name != "no layers":
        with pytest.raises(ValueError, match=message):
            MODEL.apply(params, IDS)


@pytest.mark.parametrize("change", [lambda params: params, stack_layers])
def test_the_layers_of_another_model(change):
    params = change(random_params(Model(replace(CONFIG, num_layers=1))))
    with pytest.raises(
        ValueError, match=r"model/layers: expected 2 layers \(config.num_layers\), got 1"
    ):
        MODEL.apply(params, IDS)


@pytest.mark.slow
def test_layers_that_are_not_alike():
    params = random_params(MODEL)
    kernel = params["model"]["layers"]["1"]["mlp"]["up_proj"]["kernel"].astype(jnp.bfloat16)
    other = changed(
        params, **{"1": {**params["model"]["layers"]["1"], "mlp": {"up_proj": {"kernel": kernel}}}}
    )
    with pytest.raises(
        ValueError, match=r"model/layers/1/mlp/\w+/kernel: expected what layer 0 has, float32.*got"
    ):
        stack_layers(other)
    (apart, of_apart, _), _ = calibrated()
    mixed = sq.quantize(apart, of_apart, {"layers/1/mlp/up_proj": None, ".*": sq.W8A8})
    with pytest.raises(
        ValueError,
        match=r"model/layers/1/mlp/up_proj/kernel: expected .*int8.*got float32\[32, 32\]",
    ):
        stack_layers(mixed)


def test_a_tree_of_no_model():
    with pytest.raises(ValueError, match="with model/layers in it, got one of \\['layers'\\]"):
        stack_layers({"layers": {}})
    assert named_leaves(stack_layers(random_params(MODEL)))[0]  # and one of a model passes
