"""Arguments that are refused, with the sentence that says what to do; what is accepted by name."""

import functools
import gc
import inspect
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from untyped import untyped

import sqjax as sq


def fn(p, x):
    return (x * p["norm"][None]) @ p["w"]


@functools.cache
def params():
    return {"norm": jnp.ones(8), "w": jnp.eye(8)}


@functools.cache
def x():
    return jnp.arange(16.0).reshape(2, 8)


@functools.cache
def stats():
    return sq.calibrate(fn, params(), [x()])


@functools.cache
def qparams():
    return sq.quantize(params(), stats())


#: As users have them: the type checks with which tests run refuse wrong types sooner.
quantize, scales = inspect.unwrap(sq.quantize), inspect.unwrap(sq.scales)
EXPECTED_SCHEME = r"expected a Scheme such as sqjax.W8A8, or the name of a preset \(W8A8, .*got "


@pytest.mark.slow
def test_presets_by_name():
    by_name = sq.quantize(params(), stats(), {"w": "W8A8_O3", ".*": None})
    by_itself = sq.quantize(params(), stats(), sq.W8A8_O3)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), by_name, by_itself)
    assert all(jax.tree.leaves(same))
    assert sq.quantize(params(), stats(), "W4A16")["w"].tensor.fmt.name == "int4"
    assert sq.smoothquant(fn, params(), [x()], scheme="FP8")["w"].activation_format == "e4m3"


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: quantize(params(), stats(), "W9A9"), f"quantize: {EXPECTED_SCHEME}'W9A9'"),
        (lambda: quantize(params(), stats(), None), f"quantize: {EXPECTED_SCHEME}None"),
        (lambda: quantize(params(), stats(), {"w": 8}), f"quantize rule 'w': {EXPECTED_SCHEME}8"),
        (lambda: quantize(params(), None), "quantize: expected the Stats .* got NoneType"),
        (lambda: scales(params(), qparams()), "scales: expected the Stats .* got dict"),
        (lambda: quantize(qparams(), stats()), "quantize: .* w is quantized already: QuantWeight"),
        (lambda: scales(qparams(), stats()), "scales: .* w is quantized already: QuantWeight"),
        (
            lambda: scales(params(), stats(), "0.5"),
            r"alpha: expected a number in \[0, 1\], .*'0.5'",
        ),
        (lambda: scales(params(), stats(), {"w": None}), "alpha for 'w': expected a number .*None"),
        (lambda: scales(params(), stats(), attention="x"), "attention: expected a number .*'x'"),
        (lambda: scales(params(), stats(), round_scales="pow3"), "round_scales: .* got 'pow3'"),
        (lambda: scales(params(), stats(), groups="norms"), "'norms' matches nothing. .*'norm'"),
        (
            lambda: quantize(params(), stats(), {"*w*": sq.W8A8}),
            r"'\*w\*' is not a regular expression: .*for a part of a name give the part: 'w'",
        ),
        (lambda: sq.W8A8.replace(outliers=float("inf")), "Scheme.outliers: .*finite .*got inf"),
    ],
)
def test_refusals(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


@pytest.mark.parametrize(
    "use",
    [
        float,
        np.asarray,
        jnp.asarray,
        jnp.sum,
        lambda w: x() @ w,
        lambda w: np.asarray(x()) @ w,
        lambda w: w @ x(),
        lambda w: 2 * w,
        lambda w: w[0],
        lambda w: jnp.einsum("ab,bc->ac", x(), w),
        lambda w: jax.jit(fn)(params() | {"w": w}, x()),
    ],
)
def test_a_quantized_weight_used_as_an_array_names_quantized(use):
    with pytest.raises(TypeError, match=r"QuantWeight\(\(8, 8\).* runs in sqjax.quantized\(fn\)"):
        use(qparams()["w"])


@pytest.mark.parametrize("name", ["T", "astype", "at", "reshape"])
def test_what_only_arrays_have_names_quantized(name):
    with pytest.raises(AttributeError, match=rf"has no '{name}': .*sqjax.quantized\(fn\)"):
        getattr(qparams()["w"], name)
    with pytest.raises(AttributeError, match="'QuantWeight' object has no attribute 'colour'"):
        _ = qparams()["w"].colour
    with pytest.raises(TypeError, match=r"QTensor\(.* argument of sqjax.quantized\(fn\)"):
        x() @ qparams()["w"].tensor


@pytest.mark.parametrize("kind", ["function", "method"])
@pytest.mark.slow
def test_what_quantized_wraps_is_not_kept_alive(kind):
    class Holder:
        def method(self, p, x):
            return x @ p["w"]

    holder = Holder()

    def function(p, x):
        return (x @ p["w"], holder)[0]

    wrapped = {"function": function, "method": holder.method}[kind]
    jax.jit(sq.quantized(wrapped))(qparams(), x())
    assert sq.quantized(wrapped) is sq.quantized(wrapped)
    alive = weakref.ref(holder)
    del holder, function, wrapped
    gc.collect()
    assert alive() is None


S = {"w": jnp.ones(8)}
OTHER_ARGUMENTS = {
    "fold(graph, params, s)": (
        lambda: sq.fold(stats().graph, params(), S),
        r"fold\(params, stats.graph, s\), got dict",
    ),
    "fold(params, stats, s)": (
        lambda: sq.fold(params(), stats(), S),
        r"fold\(params, stats.graph, s\), got Stats",
    ),
    "fold(params, graph, alpha)": (
        lambda: sq.fold(params(), stats().graph, 0.5),
        r"s: expected \{group: its scales\}, as sqjax.scales returns it, got 0.5",
    ),
    "fold_stats(s, stats)": (
        lambda: sq.fold_stats(S, stats()),
        r"fold_stats\(stats, s\): expected the Stats .* got dict",
    ),
    "fold_stats(stats, alpha)": (
        lambda: sq.fold_stats(stats(), 0.5),
        r"s: expected \{group: its scales\}.* got 0.5",
    ),
    "alpha of two numbers": (
        lambda: sq.smooth(params(), stats(), jnp.array([0.5, 0.6])),
        r"alpha: expected a number in \[0, 1\], got Array",
    ),
    "runtime": (
        lambda: sq.smoothquant(fn, params(), [x()], runtime=3),
        r"smoothquant: runtime: expected a number in \[0, 1\], got 3",
    ),
    "a scheme for alpha": (
        lambda: sq.smoothquant(fn, params(), [x()], "W8A8"),
        r"smoothquant: alpha: expected a number in \[0, 1\], got 'W8A8'",
    ),
    "no embeddings": (
        lambda: sq.quantize(params(), stats(), "EMBEDDING_INT8"),
        r"'\.\*' matches nothing, because this model has no embeddings .* take sqjax.W8A8",
    ),
    "dequantize(weight)": (
        lambda: sq.dequantize(qparams()["w"]),
        r"one QTensor \(of a quantized weight that is `weight.tensor`.* got QuantWeight",
    ),
    "dequantize(tree)": (
        lambda: sq.dequantize(qparams()),
        r"of a tree take each weight's, with jax.tree.map .* got dict",
    ),
    "quantized(tree)": (
        lambda: sq.quantized(qparams()),
        r"as in quantized\(fn\)\(qparams, \*inputs\), got dict",
    ),
    "groups of a number": (
        lambda: sq.smooth(params(), stats(), groups=3),
        r"groups: expected 'all', 'norm', or patterns of names, got 3",
    ),
    "a tolerance that is a text": (
        lambda: sq.verify(fn, params(), params(), x(), tolerance="0.1"),
        r"verify: tolerance=: expected a number, got '0.1'",
    ),
    "nnx.functional(fn)": (
        lambda: sq.nnx.functional(fn),
        r"functional: expected an NNX module .* got function",
    ),
    "quantize_dense(kernel)": (
        lambda: sq.linen.quantize_dense(jnp.eye(4)),
        r"quantize_dense: expected a layer's \{'kernel': ...\}, got ArrayImpl",
    ),
    "stack_layers(None)": (
        lambda: sq.models.stack_layers(None),
        r"layers: expected the parameters of a Model, got None",
    ),
    "fuse(array)": (
        lambda: sq.models.fuse(x()),
        r"fuse: expected the parameters of a Model, got ArrayImpl",
    ),
    "calibrate under jit": (
        lambda: jax.jit(lambda p: sq.calibrate(fn, p, [x()]).absmax)(params()),
        "expected arrays whose numbers are known, got tracers: call calibrate outside of jax.jit",
    ),
    "merge({})": (lambda: stats().merge({}), "merge: expected other Stats, got dict"),
    "split(tree, 3)": (
        lambda: sq.split(qparams(), 3),
        "split: expected a pattern of names, or several, got 3",
    ),
    "a rule for a number": (
        lambda: sq.quantize(params(), stats(), {1: sq.W8A8}),
        "quantize rule: expected a regular expression, .*got 1",
    ),
    "explain(3)": (
        lambda: stats().graph.explain(3),
        "explain: expected the path of a leaf, got 3",
    ),
    "a pattern that is none": (
        lambda: sq.quantize_cache({"key": jnp.ones((1, 2, 4))}, None),
        r"quantize_cache pattern: expected a regular expression, as in 'key\|value', got None",
    ),
    "quantized(None)": (lambda: sq.quantized(None), r"a function .*, got None"),
    "int8_attention(tree)": (
        lambda: sq.int8_attention(qparams()),
        r"as in int8_attention\(fn\)\(params, \*inputs\), got dict",
    ),
}


@pytest.mark.parametrize("name", OTHER_ARGUMENTS)
def test_arguments_in_another_order_or_form_are_told(name):
    call, sentence = OTHER_ARGUMENTS[name]
    with untyped(), pytest.raises(ValueError, match=sentence):
        call()


def test_a_model_of_embeddings_alone_has_no_matmuls():
    table = {"embed": jnp.ones((5, 4))}
    of_table = sq.calibrate(lambda p, ids: p["embed"][ids], table, [jnp.arange(3)])
    with pytest.raises(ValueError, match=r"no matmul of this model reads a leaf; .*EMBEDDING_INT8"):
        sq.quantize(table, of_table, sq.W8A8)
