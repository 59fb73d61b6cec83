"""The laws of every format x granularity x scheme, against an oracle in numpy."""

import functools
import itertools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
import schemes_in_numpy as oracle
from slow import slow_but, slow_rows_but

import sqjax as sq
from sqjax.numerics.formats import FORMATS, to_format
from sqjax.numerics.weight_products import activation_scale
from sqjax.weights.dot_general import quantized_dot_general
from sqjax.weights.qtensor import QTensor

DENSE = (((1,), (0,)), ((), ()))
ROWS, INNER, OUTPUTS = 5, 200, 9  # the last group of 64 (the fourth) and of 128 is shorter
EPS = 2.0**-23

GRANULARITIES = ("per_channel", "per_tensor", 64, 128)
KINDS = {
    "int8": (sq.Int8(), "int8"),
    "int4": (sq.Int4(), "int8"),
    "int4 zero": (sq.Int4(zero_point=True), "int8"),
    "int4 two-level": (sq.Int4(group_size=32, zero_point=True, two_level=True), "int8"),
    "e4m3": (sq.Float8(format="e4m3"), "e4m3"),
    "e5m2": (sq.Float8(format="e5m2"), "e5m2"),
    "e4m3 x e5m2": (sq.Float8(format="e4m3"), "e5m2"),
}
#: {name: scheme with activations "per_token"} for every format and granularity.
WEIGHTS = {
    f"{kind} {granularity}": sq.Scheme(
        weight=oracle.with_granularity(weight, granularity), activation=sq.PerToken(format=format)
    )
    for (kind, (weight, format)), granularity in itertools.product(KINDS.items(), GRANULARITIES)
    if not (kind == "int4 two-level" and isinstance(granularity, str))
    and (kind != "e4m3 x e5m2" or granularity in ("per_channel", 64))
    and not (kind in ("e4m3", "e5m2") and granularity == 128)
}
#: Every format and every way to multiply once: the others are slow, a program each.
QUICK = ("int8 per_channel", "int4 zero 64", "int4 two-level 64", "e4m3 per_channel")


ACTIVATIONS = ("per_token", "per_tensor", "static", None)
CASES = [
    (weights, activations)
    for weights, activations in itertools.product(WEIGHTS, ACTIVATIONS)
    if activations or not oracle.has_two_levels(WEIGHTS[weights])
]
cases = pytest.mark.parametrize(("weights", "activations"), slow_rows_but(CASES, *QUICK), ids=str)
#: jax.jit that takes less time: the same program for XLA, less done for speed in LLVM.
compiled = functools.partial(jax.jit, compiler_options={"xla_llvm_disable_expensive_passes": True})


def dtypes(weights):
    return (
        ("float32", "bfloat16")
        if weights.endswith("64") or weights == "int8 per_channel"
        else ("float32",)
    )


def of(weights, activations):
    scheme = WEIGHTS[weights]
    return scheme.replace(activation=oracle.activation_of(activations, scheme.activation.format))


def fn(p, x):
    return x @ p["layer"]["w"]


@functools.lru_cache
def data(dtype):
    """(x, w, statistics): rows, columns and groups of very different ranges; some groups lie on one side of 0."""
    rng, inner = np.random.default_rng(0), INNER
    x = (
        rng.normal(size=(ROWS, inner))
        * 4.0 ** rng.integers(-2, 3, (ROWS, 1))
        * 2.0 ** rng.integers(-1, 2, inner)
    )
    spread = 4.0 ** rng.integers(-2, 3, (1, OUTPUTS)) * 2.0 ** rng.integers(
        -2, 3, (inner // 8, OUTPUTS)
    ).repeat(8, 0)
    w = (
        rng.normal(size=(inner, OUTPUTS)) + rng.normal(size=(inner // 8, OUTPUTS)).repeat(8, 0) * 2
    ) * spread
    x, w = jnp.asarray(x, dtype), jnp.asarray(w, dtype)
    quantized = [of(*case) for case in CASES if case[1]]
    x, w = oracle.settled(x, w.T, [*quantized], [*WEIGHTS.values()])
    params, x = {"layer": {"w": jnp.asarray(w.T)}}, jnp.asarray(x)
    return x, params, sq.calibrate(fn, params, [x])


def operands(dtype="float32"):
    """x and w (outputs first) in float64."""
    x, params, _ = data(dtype)
    return np.asarray(x, np.float64), np.asarray(params["layer"]["w"], np.float64).T


@functools.lru_cache
def run(weights, dtype):
    """{activations: (the quantized parameters, the result of the compiled function)}, one program for all."""
    x, params, stats = data(dtype)
    kinds = [a for a in ACTIVATIONS if (weights, a) in CASES]

    @compiled
    def quantize(params, stats):
        return [sq.quantize(params, stats, of(weights, a)) for a in kinds]

    @compiled
    def multiply(qparams, x):
        return [sq.quantized(fn)(one, x) for one in qparams]

    qparams = quantize(params, stats)
    return dict(zip(kinds, zip(qparams, multiply(qparams, x), strict=True), strict=True))


# The table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", slow_but(list(WEIGHTS), *QUICK))
@pytest.mark.slow
def test_values_zero_points_and_integer_scales_are_those_of_the_oracle_bit_for_bit(weights):
    for dtype in dtypes(weights):
        _, w = operands(dtype)
        expected = oracle.quantize(w, WEIGHTS[weights])
        for qparams, _ in run(weights, dtype).values():
            tensor = qparams["layer"]["w"].tensor
            tensor.check("w")
            assert tensor.dtype == dtype
            np.testing.assert_array_equal(np.asarray(tensor.values, np.float64), expected.values)
            np.testing.assert_allclose(spread(tensor, tensor.scale), expected.scale, rtol=3e-7)
            for part, reference, missing in (
                ("zero", expected.zero, 0),
                ("group_scale", expected.step, 1),
            ):
                got = (
                    missing
                    if getattr(tensor, part) is None
                    else spread(tensor, getattr(tensor, part))
                )
                np.testing.assert_array_equal(
                    got, reference if np.ndim(got) else np.unique(reference)
                )
            floats = np.asarray(tensor.values, np.float64)  # the formula of the docstring
            floats = (floats - expected.zero) * expected.step * expected.scale
            np.testing.assert_allclose(
                sq.dequantize(tensor).astype(jnp.float32).T, floats, rtol=ulp(dtype), atol=1e-30
            )


def spread(tensor, x):
    return np.broadcast_to(np.asarray(tensor.spread(x)), tensor.values.shape)


def ulp(dtype):
    return 4e-7 if dtype == "float32" else 2.0**-8


@pytest.mark.parametrize("weights", slow_but([name for name in WEIGHTS if "int" in name], *QUICK))
@pytest.mark.slow
def test_the_integer_sums_are_those_of_the_oracle_bit_for_bit(weights):
    """With scales of 1 the result is the sum itself: below 2^24 float32 holds it exactly."""
    weight, (x, w) = run(weights, "float32")["per_token"][0]["layer"]["w"], operands()
    q = np.concatenate([oracle.quantize_activations(x, of(weights, a))[0] for a in ACTIVATIONS[:3]])
    ones = replace(weight.tensor, scale=jnp.ones_like(weight.tensor.scale))
    bare = replace(weight, tensor=ones, activations="static", input_scale=jnp.float32(1.0))
    got = quantized_dot_general(jnp.asarray(q, jnp.float32), bare, DENSE, "w")
    expected = q @ oracle.quantize(w, of(weights, "per_token")).codes.T
    assert 1000 < np.abs(expected).max() < 2**24
    np.testing.assert_array_equal(np.asarray(got, np.int64), expected)


@pytest.mark.parametrize("fmt", slow_but(["int8", "e4m3", "e5m2"], "int8"))
@pytest.mark.parametrize("activations", ACTIVATIONS[:3])
def test_activations_are_rounded_as_the_oracle_does_bit_for_bit(activations, fmt):
    weight = sq.Int8() if fmt == "int8" else sq.Float8(format=fmt)
    scheme = sq.Scheme(weight=weight, activation=oracle.activation_of(activations, fmt))
    for dtype in ("float32", "bfloat16"):
        (x, params, stats), (x64, _) = data(dtype), operands(dtype)
        given = sq.quantize(params, stats, scheme)["layer"]["w"].input_scale
        scale = jax.jit(
            lambda x, given=given: activation_scale(x, activations, given, FORMATS[fmt])
        )(x)
        expected, scale64 = oracle.quantize_activations(x64, scheme)
        np.testing.assert_allclose(np.broadcast_to(scale, scale64.shape), scale64, rtol=3e-7)
        got = jax.jit(to_format, static_argnums=2)(x, scale, FORMATS[fmt])
        assert got.dtype == FORMATS[fmt].dtype
        np.testing.assert_array_equal(np.asarray(got, np.float64), expected)


@pytest.mark.parametrize(
    ("weights", "activations", "dtype"),
    slow_rows_but([(*case, dtype) for case in CASES for dtype in dtypes(case[0])], *QUICK),
    ids=str,
)
@pytest.mark.slow
def test_the_result_is_that_of_the_oracle(weights, activations, dtype):
    got, (x, w) = run(weights, dtype)[activations][1], operands(dtype)
    assert (got.shape, got.dtype) == ((ROWS, OUTPUTS), dtype)
    scheme = of(weights, activations)
    expected = oracle.matmul(x, w, scheme)
    tolerance = float32_error(scheme) * expected.magnitude
    if dtype == "bfloat16":
        tolerance = tolerance + 2.0**-8 * np.abs(expected.out)
        if (
            activations is None
            and scheme.weight.fmt.name in oracle.FLOAT8
            and scheme.weight.group_size == 64
        ):
            tolerance = (
                tolerance + 2.0**-9 * expected.magnitude
            )  # the weight is dequantized to x's dtype
    assert (np.abs(np.asarray(got, np.float64) - expected.out) <= tolerance).all()


def float32_error(scheme):
    """Relative to the sum of the absolute values: a few roundings, and those of a float sum where the terms are."""
    groups = -(-INNER // scheme.weight.group_size) if scheme.weight.group_size else 1
    floats = scheme.weight.fmt.name in oracle.FLOAT8
    return (6 + groups + (INNER / 2 if floats else 0)) * EPS


@cases
def test_the_error_is_within_the_bound_of_theory(weights, activations):
    got, (x, w) = run(weights, "float32")[activations][1], operands()
    scheme = of(weights, activations)
    error = np.abs(np.asarray(got, np.float64) - x @ w.T)
    assert (error <= oracle.error_bound(x, w, scheme) + 200 * EPS * np.abs(x) @ np.abs(w).T).all()
    assert (
        error > 1e-4 * oracle.error_bound(x, w, scheme)
    ).mean() > 0.9  # and it is no float product


@pytest.mark.parametrize(
    ("weights", "activations"),
    slow_rows_but([c for c in CASES if c[1] in ("per_token", None)], *QUICK),
    ids=str,
)
@pytest.mark.slow
def test_jit_equals_eager(weights, activations):
    qparams, expected = run(weights, "float32")[activations]
    got = sq.quantized(fn)(qparams, data("float32")[0])
    x, w = operands()
    tolerance = (
        2
        * float32_error(of(weights, activations))
        * oracle.matmul(x, w, of(weights, activations)).magnitude
    )
    assert (np.abs(np.asarray(got) - np.asarray(expected)) <= tolerance).all()


@pytest.mark.parametrize("weights", slow_but(list(WEIGHTS), *QUICK))
def test_a_quantizer_gives_the_same_codes_eager_and_compiled(weights):
    scheme, w = WEIGHTS[weights], data("float32")[1]["layer"]["w"]
    how = scheme.weight
    if oracle.has_two_levels(scheme):
        eager = QTensor.quantize_twice(w, (0,), how.group_size)
    else:
        eager = QTensor.quantize(
            w, (0,), how.granularity, how.fmt, (), oracle.has_zero_point(scheme)
        )
    inside_jit = run(weights, "float32")["per_token"][0]["layer"]["w"].tensor
    assert jax.tree.structure(eager) == jax.tree.structure(inside_jit)
    for one, other in zip(jax.tree.leaves(eager), jax.tree.leaves(inside_jit), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(
            np.asarray(one, np.float32),
            np.asarray(other, np.float32),
            rtol=2e-7 if one.dtype == jnp.float32 else 0,
        )


@cases
def test_a_second_call_compiles_nothing(weights, activations):
    """Other values in the tree, the same program: what `quantize` gives has one structure and one set of types."""
    x, params, stats = data("float32")
    again = jax.eval_shape(lambda p: sq.quantize(p, stats, of(weights, activations)), params)
    qparams = run(weights, "float32")[activations][0]
    jitted, traces = jax.jit(lambda q, x: (traces.append(1), sq.quantized(fn)(q, x))[1]), []
    jitted.eval_shape(again, x)
    jitted.eval_shape(jax.tree.map(lambda a: a + jnp.ones((), a.dtype), qparams), 2 * x)
    assert traces == [1]


#: {weights: (dtypes of the product's operands and result)} where activations are quantized.
NARROW = {
    "int8": ("int8", "int8", "int32"),
    "int4": ("int8", "int8", "int32"),
    "e4m3": ("float8_e4m3fn", "float8_e4m3fn", "float32"),
    "e5m2": ("float8_e5m2", "float8_e5m2", "float32"),
    "e4m3 x e5m2": ("float8_e5m2", "float8_e4m3fn", "float32"),
}


@pytest.mark.parametrize(
    ("weights", "activations"), slow_rows_but([case for case in CASES if case[1]], *QUICK), ids=str
)
def test_every_product_in_the_program_is_on_narrow_operands(weights, activations):
    """On any platform: int8 x int8 -> int32, W4A8 too, or float8 x float8 -> float32; no float of the weight's size."""
    qparams, (x, _, _) = run(weights, "float32")[activations][0], data("float32")
    program = jaxprs.of(sq.quantized(fn), qparams, x)
    kind = weights.rsplit(" ", 1)[0]
    assert {dot.dtypes for dot in jaxprs.dots(program)} == {NARROW.get(kind, NARROW["int4"])}
    assert largest_float(program) < INNER * OUTPUTS


def largest_float(program):
    """As `jaxprs.largest_float`, of floats wider than a byte."""
    made = [v.aval for p in jaxprs.programs(program) for e in p.eqns for v in e.outvars]
    return max(
        a.size for a in made if jnp.issubdtype(a.dtype, jnp.floating) and a.dtype.itemsize > 1
    )


# What compilers are given -----------------------------------------------------------------------------------------


def products_for(platform, qparams, x):
    """[(lhs, rhs, result)] of every product in the program for a platform, as "5x200xf32"; and its text."""
    text = (
        jax.jit(sq.quantized(fn)).trace(qparams, x).lower(lowering_platforms=(platform,)).as_text()
    )
    pattern = r"stablehlo\.dot_general.*: \(tensor<(.*?)>, tensor<(.*?)>\) -> tensor<(.*?)>"
    return [tuple(found) for found in re.findall(pattern, text)], text


def for_gpu(qparams):
    """The tree with int4 stored two to a byte."""
    weight = qparams["layer"]["w"]
    return {"layer": {"w": replace(weight, tensor=weight.tensor.stored_as(jnp.int4))}}


@pytest.mark.parametrize(
    "weights",
    slow_but([name for name in WEIGHTS if name.startswith("int") and "two" not in name], *QUICK),
)
def test_weight_only_programs_of_cpus_multiply_integers_and_make_no_float_weight(weights):
    qparams, (x, _, _) = run(weights, "float32")[None][0], data("float32")
    products, text = products_for("cpu", qparams, x)
    assert {tuple(t.split("x")[-1] for t in product) for product in products} == {
        ("i8", "i8", "i32")
    }
    for product in products:
        sizes = [int(operand.split("x")[0]) for operand in product[:2]]
        assert any(size % (3 * ROWS) == 0 for size in sizes)  # three digits of each row
    assert f"tensor<{OUTPUTS}x{INNER}xf32>" not in text


@pytest.mark.parametrize(
    "weights", slow_but([name for name in WEIGHTS if "x" not in name and "two" not in name], *QUICK)
)
@pytest.mark.slow
def test_weight_only_programs_of_gpus_convert_in_the_product_and_scale_its_result(weights):
    for dtype, kind in (("float32", "f32"), ("bfloat16", "bf16")):
        if dtype not in dtypes(weights):
            continue
        qparams, (x, _, _) = for_gpu(run(weights, dtype)[None][0]), data(dtype)
        products, text = products_for("cuda", qparams, x)
        product = (f"{ROWS}x{INNER}x{kind}", f"{OUTPUTS}x{INNER}x{kind}", f"{ROWS}x{OUTPUTS}xf32")
        assert products == [product]
        stored = {"int8": "i8", "int4": "i4", "e4m3": "f8E4M3FN", "e5m2": "f8E5M2"}[
            weights.split()[0]
        ]
        assert f"tensor<{OUTPUTS}x{INNER}x{stored}>" in text
        if weights.endswith(("channel", "tensor")):  # no product of a scale and the whole weight
            assert not re.search(rf"stablehlo.multiply .* tensor<{OUTPUTS}x{INNER}x", text)


@pytest.mark.slow
def test_whole_groups_of_weight_only_are_multiplied_group_by_group_for_gpus():
    x, params = normal(ROWS, 128), {"layer": {"w": normal(128, OUTPUTS)}}
    qparams = for_gpu(
        sq.quantize(
            params,
            sq.calibrate(fn, params, [x]),
            sq.W4A16.replace(weight=sq.Int4(group_size=32, zero_point=True)),
        )
    )
    products, _ = products_for("cuda", qparams, x)
    assert [tuple(t.split("x")[-1] for t in product) for product in products] == [
        ("f32", "f32", "f32")
    ]
    assert products[0][:2] == (f"{ROWS}x4x32xf32", f"{OUTPUTS}x4x32xf32")


@pytest.mark.parametrize("weights", ["int8 64", "int4 zero 64", "int4 two-level 64"])
@pytest.mark.slow
def test_programs_of_gpus_multiply_groups_in_int8(weights):
    qparams, (x, _, _) = for_gpu(run(weights, "float32")["per_token"][0]), data("float32")
    products, text = products_for("cuda", qparams, x)
    assert {tuple(t.split("x")[-1] for t in product) for product in products} == {
        ("i8", "i8", "i32")
    }
    assert "while" not in text  # one batched product, no loop
    if "two" in weights:
        assert [product[1] for product in products] == [f"{OUTPUTS}x{INNER}xi8"]


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)
