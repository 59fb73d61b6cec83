"""What the compilers make of quantized programs for NVIDIA GPUs (sm_80, sm_90a), with no GPU: see `gpu_compile`.

Nothing here ran on a GPU. The tests hold to what the optimized program computes and writes to memory.
"""

from functools import cache

import gpu_compile
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sqjax as sq
from sqjax.linen import QuantDense, quantize_dense
from sqjax.models import LlamaConfig, Model
from sqjax.numerics import mosaic, triton
from sqjax.numerics.formats import INT8, to_format
from sqjax.numerics.weight_products import activation_scale

pytestmark = pytest.mark.skipif(
    not gpu_compile.plugin_is_there(),
    reason="needs the CUDA plug-in: pip install sqjax[gpu-compile]",
)
TARGETS = list(gpu_compile.TARGETS)
INT8_DOT = ("s8", "s8", "s32")
W8A8 = {"O1": sq.W8A8_O1, "O2": sq.W8A8_O2, "O3": sq.W8A8_O3}
#: A layer of 1024 inputs and 2048 outputs; few rows, so that no activation is as large as the weight.
INPUTS, FEATURES, ROWS = 1024, 2048, 48


def dense_params(scheme, dtype=jnp.float32, inputs=INPUTS, features=FEATURES):
    def make(kernel, bias, absmax):
        return quantize_dense({"kernel": kernel, "bias": bias}, scheme, absmax=absmax)

    shapes = [((inputs, features), dtype), ((features,), dtype), ((inputs,), jnp.float32)]
    return jax.eval_shape(make, *(jax.ShapeDtypeStruct(shape, kind) for shape, kind in shapes))


def dense(scheme, target, form="triton", rows=ROWS, dtype=jnp.float32, ptx=False):
    def run(params, x):
        return QuantDense(FEATURES).apply({"params": params}, x)

    x = jax.ShapeDtypeStruct((rows, INPUTS), dtype)
    return gpu_compile.compiled(
        run, dense_params(scheme, dtype), x, target=target, form=form, ptx=ptx
    )


# A Dense layer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", gpu_compile.FORMS)
@pytest.mark.parametrize("scheme", W8A8)
def test_a_dense_layer_multiplies_int8_and_copies_no_weight(scheme, form, target):
    program = dense(W8A8[scheme], target, form)
    assert program.matmuls() == [INT8_DOT]
    assert not program.copies(INPUTS * FEATURES, ROWS)
    if form == "triton":
        assert program.temporary < INPUTS * FEATURES


@pytest.mark.parametrize("target", TARGETS)
def test_the_kernel_multiplies_on_the_integer_matrix_units(target):
    assert INTEGER_UNITS[target] in dense(sq.W8A8_O3, target, rows=2048, ptx=True).ptx


INTEGER_UNITS = {"sm_80": "satfinite.s32.s8.s8.s32", "sm_90a": ".s32.s8.s8"}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scheme", ["O2", "O3"])
def test_scales_of_whole_tensors_are_part_of_the_matmul(scheme, target):
    """With enough rows that the contraction is not split: then the only array of the result's shape is the result."""
    program = dense(W8A8[scheme], target, rows=2048)
    assert [value for value in program.written() if value.shape == (2048, FEATURES)] == [
        ("f32", (2048, FEATURES))
    ]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scheme", [*W8A8.values(), sq.W8A16, sq.W4A16, sq.W4A8], ids=str)
def test_a_single_row_copies_no_weight(scheme, target):
    program = dense(scheme, target, rows=1)
    assert program.temporary < INPUTS * FEATURES // 8
    assert not program.copies(INPUTS * FEATURES, 1)


# Other formats -----------------------------------------------------------------------------------------------------

WEIGHT_ONLY = {"int8": sq.W8A16, "int4": sq.Scheme(weight=sq.Int4(), activation=None)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fmt", WEIGHT_ONLY)
def test_narrow_weights_are_converted_inside_the_matmul(fmt, target):
    program = dense(WEIGHT_ONLY[fmt], target, dtype=jnp.bfloat16)
    assert program.matmuls() == [("bf16", "bf16", "f32")]
    assert not program.copies(INPUTS * FEATURES, ROWS)
    assert program.temporary < INPUTS * FEATURES


@pytest.mark.parametrize("form", gpu_compile.FORMS)
def test_float8_stays_float8_on_sm_90a(form):
    program = dense(sq.FP8, "sm_90a", form)
    assert program.matmuls() == [("f8e4m3fn", "f8e4m3fn", "f32")]
    assert not program.copies(INPUTS * FEATURES, ROWS)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", gpu_compile.FORMS)
def test_two_levels_expand_in_integers_to_one_int8_matmul(form, target):
    """jax 0.10 writes the expanded weight, in int8; jax 0.12 may fuse the expansion."""
    program = dense(sq.W4A8, target, form)
    assert program.matmuls() == [INT8_DOT]
    assert {copy.dtype for copy in program.copies(INPUTS * FEATURES, ROWS)} <= {"s8"}


# A decoder layer ---------------------------------------------------------------------------------------------------

CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
)
SITES = 8  # q, k, v, o, gate, up, down and the head
SMALLEST = 256 * 2 * 64  # elements of k_proj


@cache
def calibrated():
    model = Model(CONFIG)
    params = jax.jit(model.init, static_argnums=1)(jax.random.key(0), jnp.bfloat16)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, 8)), jnp.int32)
    return model, params, sq.calibrate(model.apply, params, [ids])


def decoder(scheme):
    model, params, stats = calibrated()
    return model, jax.eval_shape(
        lambda params, stats: sq.quantize(params, stats, W8A8[scheme]), params, stats
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("scheme", "form"),
    [
        pytest.param("O1", "triton", marks=pytest.mark.every_case),
        pytest.param("O2", "triton", marks=pytest.mark.every_case),
        ("O3", "triton"),
        ("O3", "cublas"),
    ],
)
@pytest.mark.slow
def test_a_decoder_layer_multiplies_every_site_in_int8(scheme, form, target):
    model, params = decoder(scheme)
    ids = jax.ShapeDtypeStruct((1, ROWS), jnp.int32)
    program = gpu_compile.compiled(sq.quantized(model.apply), params, ids, target=target, form=form)
    assert program.matmuls().count(INT8_DOT) == SITES
    assert not program.copies(SMALLEST, ROWS)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.slow
def test_matmuls_that_the_compiler_merges_stay_int8_and_copy_no_weight(target):
    """By default q, k, v are one matmul, and gate and up, on concatenated weights; that is part of its kernel."""
    model, params = decoder("O1")
    ids = jax.ShapeDtypeStruct((1, ROWS), jnp.int32)
    program = gpu_compile.compiled(
        sq.quantized(model.apply), params, ids, target=target, merge=True
    )
    assert program.matmuls().count(INT8_DOT) == SITES - 3
    assert not program.copies(SMALLEST, ROWS)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.slow
def test_a_decoding_step_copies_no_weight(target):
    model, params = decoder("O1")
    cache = jax.eval_shape(lambda: model.init_cache(1, ROWS, jnp.bfloat16))
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    program = gpu_compile.compiled(sq.quantized(model.decode), params, ids, cache, target=target)
    assert not program.copies(SMALLEST, ROWS)


# The Triton matmul -------------------------------------------------------------------------------------------------

#: jax 0.12 still has the backend, and says that a later one will not (see `sqjax.triton`).
deprecated = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)


@deprecated
@pytest.mark.parametrize("target", TARGETS)
def test_the_triton_matmul_scales_by_token_before_it_writes(target):
    def run(x, values, scale):
        x_scale = activation_scale(x, "per_token", None, INT8)
        return triton.matmul(to_format(x, x_scale), values, scale, x_scale=x_scale.squeeze(1))

    shapes = (
        ((ROWS, INPUTS), jnp.float32),
        ((FEATURES, INPUTS), jnp.int8),
        ((FEATURES, 1), jnp.float32),
    )
    args = [jax.ShapeDtypeStruct(*spec) for spec in shapes]
    program = gpu_compile.compiled(run, *args, target=target, ptx=True)
    assert [value for value in program.written() if FEATURES in value.shape] == [
        ("f32", (ROWS, FEATURES))
    ]
    assert INTEGER_UNITS[target] in program.ptx


GROUPED = {
    "int8 x int8": (100, jnp.int8, jnp.int8, False, "s8.s8"),
    "int8 x int4": (100, jnp.int8, jnp.int4, False, "s8.s8"),
    "one row of int8 x int4": (1, jnp.int8, jnp.int4, False, "s8.s8"),
    "bfloat16 x int8": (100, jnp.bfloat16, jnp.int8, False, "bf16.bf16"),
    "bfloat16 x int4 with zeros": (100, jnp.bfloat16, jnp.int4, True, "bf16.bf16"),
}


@deprecated
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", GROUPED)
def test_the_triton_matmul_scales_groups_with_no_copy_of_the_weight(case, target):
    rows, x_dtype, dtype, zeros, units = GROUPED[case]
    features = FEATURES - 8  # not a multiple of the block
    shapes = [
        ((rows, INPUTS), x_dtype),
        ((features, INPUTS), dtype),
        ((features, INPUTS // 128), jnp.float32),
    ]
    shapes += [((features, INPUTS // 128), jnp.int8)] if zeros else []

    def run(x, values, scale, zero=None):
        return triton.matmul(
            x, values, scale, zero=zero, blocks=triton.Blocks(16 if rows == 1 else 64)
        )

    args = [jax.ShapeDtypeStruct(*spec) for spec in shapes]
    program = gpu_compile.compiled(run, *args, target=target, ptx=True)
    assert program.written() == [("f32", (rows, features))]
    assert program.temporary == 0
    assert units in program.ptx


# The Mosaic matmul -------------------------------------------------------------------------------------------------

#: {case: (rows, dtype of x, dtype of the values, groups, zero points, the instruction of the matrix units)}.
MOSAIC = {
    "int8 x int8": (300, jnp.int8, jnp.int8, 1, False, "s32.s8.s8"),
    "few rows of int8 x int8": (16, jnp.int8, jnp.int8, 1, False, "s32.s8.s8"),
    "bfloat16 x int8": (300, jnp.bfloat16, jnp.int8, 1, False, "f32.bf16.bf16"),
    "float8 x float8": (300, jnp.float8_e4m3fn, jnp.float8_e4m3fn, 1, False, "f32.e4m3.e4m3"),
    "bfloat16 x int4 with zeros": (16, jnp.bfloat16, jnp.int4, 8, True, "f32.bf16.bf16"),
}


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs jax 0.11")
@pytest.mark.parametrize("case", MOSAIC)
def test_the_mosaic_matmul_reads_weights_as_they_are(case):
    rows, x_dtype, dtype, groups, zeros, units = MOSAIC[case]
    shapes = [
        ((rows, INPUTS), x_dtype),
        ((FEATURES, INPUTS), dtype),
        ((FEATURES, groups), jnp.float32),
    ]
    shapes += [((FEATURES, groups), jnp.int8)] if zeros else []

    def run(x, values, scale, zero=None):
        return mosaic.matmul(x, values, scale, zero=zero)

    args = [jax.ShapeDtypeStruct(*spec) for spec in shapes]
    program = gpu_compile.compiled(run, *args, target="sm_90a")
    assert f"wgmma.mma_async.sync.aligned.m64n{128 if rows > 64 else 16}" in program.text
    assert units in program.text
    # No weight in another dtype, and no sums before they are scaled.
    assert all(value.size < FEATURES * INPUTS for value in program.written())
    assert "s32" not in {value.dtype for value in program.written()}


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs jax 0.11")
def test_with_kernel_puts_the_kernel_in_the_matmul_s_place():
    def fn(params, x):
        return x @ params["w"]

    params, x = {"w": jnp.ones((INPUTS, FEATURES))}, jnp.ones((ROWS, INPUTS))
    tree = sq.quantize(params, sq.calibrate(fn, params, [x]), sq.W8A8)
    tree = sq.with_kernel(tree, "pallas")
    shapes = jax.eval_shape(lambda *args: args, tree, x)
    program = gpu_compile.compiled(sq.quantized(fn), *shapes, target="sm_90a")
    assert "s32.s8.s8" in program.text
    assert program.matmuls() == []
    assert all(value.size < FEATURES * INPUTS for value in program.written())
    # The scales of rows are found among integers; the sums are nowhere.
    assert all(value.size < ROWS * FEATURES for value in program.written() if value.dtype == "s32")
