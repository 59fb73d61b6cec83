"""`with_kernel`: which weights take the kernel for GPUs, that a CPU computes the same, what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import sqjax as sq
from sqjax.numerics import mosaic

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(5, 256)), jnp.float32)
GROUPED = sq.Scheme(weight=sq.Int4(group_size=128, zero_point=True), activation=None)
LONG_GROUPS = sq.Scheme(weight=sq.Int4(group_size=512), activation=None)
SCHEMES = {
    "per token": sq.W8A8,
    "per tensor": sq.W8A8_O2,
    "static": sq.W8A8_O3,
    "float8": sq.FP8,
    "int8 alone": sq.W8A16,
    "int4 in groups": GROUPED,
}
needs_jax_0_11 = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs jax 0.11")


def fn(params, x):
    return x @ params["w"]


def parameters(outputs=128, channels=256, dtype=jnp.float32):
    return {"w": jnp.asarray(RNG.normal(size=(channels, outputs)), dtype)}


def quantized_tree(scheme, params=None):
    params = parameters(dtype=activations(scheme).dtype) if params is None else params
    x = jnp.tile(X, 3)[:, : params["w"].shape[0]].astype(params["w"].dtype)
    return sq.quantize(params, sq.calibrate(fn, params, [x]), scheme)


def activations(scheme):
    return X.astype(jnp.bfloat16) if scheme.activation is None else X


@needs_jax_0_11
@pytest.mark.parametrize("name", SCHEMES)
def test_a_cpu_computes_the_same_numbers(name):
    scheme = SCHEMES[name]
    plain = quantized_tree(scheme)
    tree, x = sq.with_kernel(plain, "pallas"), activations(scheme)
    assert tree["w"].kernel == "pallas"
    assert "kernel pallas" in repr(tree["w"])
    run = jax.jit(sq.quantized(fn))
    np.testing.assert_array_equal(run(tree, x), run(plain, x))
    back = sq.with_kernel(tree, "xla")
    assert back["w"].kernel is None
    assert back["w"].tensor.values.dtype == plain["w"].tensor.values.dtype


@needs_jax_0_11
@pytest.mark.parametrize("name", SCHEMES)
def test_the_kernel_s_numbers_are_those_of_xla(name, monkeypatch):
    """As on a GPU: the program for CUDA is chosen, and its kernel is interpreted."""
    scheme = SCHEMES[name]
    plain = quantized_tree(scheme)
    tree, x = sq.with_kernel(plain, "pallas"), activations(scheme)
    x = jnp.concatenate([x, x])  # a shape of its own: no other test may get this program
    want = np.asarray(sq.quantized(fn)(plain, x), np.float64)

    def on_cuda(*args, cuda=None, default=None, **_):
        return (cuda or default)(*args)

    calls = []

    def interpreted(*args, **options):
        calls.append(args)
        return INTERPRETED(*args, **options)

    monkeypatch.setattr(jax.lax, "platform_dependent", on_cuda)
    monkeypatch.setattr(mosaic, "matmul", interpreted)
    got = np.asarray(sq.quantized(fn)(tree, x), np.float64)
    assert len(calls) == 1
    # int4 in groups: scale and weight are bfloat16 there. Elsewhere only float32's rounding differs.
    limit = 3 * 2.0**-9 if name == "int4 in groups" else 1e-5
    assert np.linalg.norm(got - want) <= limit * np.linalg.norm(want)


INTERPRETED = partial(mosaic.matmul, multiprocessors=2, interpret=True)


@needs_jax_0_11
def test_rules_choose_among_weights():
    def two(params, x):
        return x @ params["first"] @ params["head"]

    params = {"first": parameters(256)["w"], "head": parameters(100)["w"], "norm": jnp.ones(3)}
    tree = sq.quantize(params, sq.calibrate(two, params, [X]), sq.W8A8)
    chosen = sq.with_kernel(tree, {"head": "xla", ".*": "pallas"})
    assert [chosen[name].kernel for name in ("first", "head")] == ["pallas", None]
    assert sq.with_kernel(chosen, {"head": "xla"})["first"].kernel == "pallas"
    run = sq.quantized(two)
    np.testing.assert_array_equal(run(chosen, X), run(tree, X))


@needs_jax_0_11
def test_derivatives_and_files_are_as_without(tmp_path):
    plain = quantized_tree(sq.W8A8)
    tree = sq.with_kernel(plain, "pallas")

    def loss(tree):
        return lambda x: jnp.sum(sq.quantized(fn)(tree, x) ** 2)

    np.testing.assert_array_equal(jax.grad(loss(tree))(X), jax.grad(loss(plain))(X))
    sq.save(tmp_path / "tree", tree)
    assert jax.tree.structure(sq.load(tmp_path / "tree")) == jax.tree.structure(plain)


@needs_jax_0_11
def test_it_runs_in_a_shard_map_and_is_exported_for_one_platform():
    plain, x = quantized_tree(sq.W8A8), jnp.concatenate([X, X, X])[:12]
    tree, run = sq.with_kernel(plain, "pallas"), sq.quantized(fn)
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))
    split = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("rows")), out_specs=P("rows"))
    np.testing.assert_array_equal(jax.jit(split)(tree, x), run(plain, x))
    for platform, has_kernel in (("cpu", False), ("cuda", True)):
        exported = jax.export.export(jax.jit(run), platforms=(platform,))(tree, x)
        assert ("mosaic_gpu" in exported.mlir_module()) == has_kernel


@needs_jax_0_11
@pytest.mark.parametrize(
    ("scheme", "params", "problem"),
    [
        (sq.W4A8, parameters(), "int4 weights with float activations, got int8 ones"),
        (sq.FP8_E5M2, parameters(), "float8 weights as e4m3"),
        (sq.W8A8, parameters(channels=200), "multiples of 128, .* got 200 .* groups of 200"),
        (sq.W4A16_G64, parameters(), "multiples of 128, .* got 256 .* groups of 64"),
        # The last group is shorter, which the kernel does not know.
        (LONG_GROUPS, parameters(channels=768), "one length, got 768 channels in groups of 512"),
    ],
)
def test_a_weight_that_the_kernel_has_no_program_for_is_named(scheme, params, problem):
    tree = quantized_tree(scheme, params)
    with pytest.raises(ValueError, match=f"^w: the kernel 'pallas' takes .*{problem}"):
        sq.with_kernel(tree, "pallas")


@needs_jax_0_11
def test_all_weights_that_are_refused_are_named():
    def sum_of(params, x):
        return sum(x @ w for w in params.values())

    params = {name: jnp.ones((200, 128)) for name in "abcde"}
    tree = sq.quantize(params, sq.calibrate(sum_of, params, [X[:, :200]]), sq.W8A8)
    with pytest.raises(ValueError, match=r"^a: .* \(also b, c, d and 1 more\) the kernel 'xla'$"):
        sq.with_kernel(tree, "pallas")
    with pytest.raises(ValueError, match=r"^d: .* \(also e\) the kernel 'xla'$"):
        sq.with_kernel(tree, {"d|e": "pallas"})


@needs_jax_0_11
def test_groups_of_all_contracted_axes_count():
    def heads(params, x):
        return jnp.einsum("bhi,hio->bo", x, params["w"])

    params, x = {"w": jnp.ones((4, 96, 128))}, jnp.ones((2, 4, 96))
    scheme = sq.Scheme(weight=sq.Int8(group_size=96), activation=None)
    tree = sq.quantize(params, sq.calibrate(heads, params, [x]), scheme)
    with pytest.raises(ValueError, match=r"^w: .* got 384 channels in groups of 96; give"):
        sq.with_kernel(tree, "pallas")


@needs_jax_0_11
def test_a_size_that_export_leaves_open_is_refused():
    tree = sq.with_kernel(quantized_tree(sq.W8A8), "pallas")
    (rows,) = jax.export.symbolic_shape("rows")
    x = jax.ShapeDtypeStruct((rows, 256), jnp.float32)
    run = jax.export.export(jax.jit(sq.quantized(fn)))
    with pytest.raises(ValueError, match=r"^w: .* sizes that are known .* got rows; give"):
        run(tree, x)


@needs_jax_0_11
def test_a_product_that_the_kernel_has_no_program_for_is_named():
    wide = sq.with_kernel(quantized_tree(sq.W8A8, parameters(100)), "pallas")
    with pytest.raises(ValueError, match=r"^w: .* outputs in multiples of 128, got 100; give"):
        sq.quantized(fn)(wide, X)
    narrow = sq.with_kernel(quantized_tree(sq.W8A16, parameters()), "pallas")
    with pytest.raises(ValueError, match="bfloat16 activations, got float32"):
        sq.quantized(fn)(narrow, X)


@needs_jax_0_11
def test_a_batch_of_matrices_is_refused():
    def experts(params, x):
        return jnp.einsum("exi,eio->exo", x, params["w"])

    params = {"w": jnp.ones((2, 256, 128))}
    x = jnp.ones((2, 3, 256))
    tree = sq.quantize(params, sq.calibrate(experts, params, [x]), sq.W8A8)
    with pytest.raises(ValueError, match=r"^w: .* one matrix, got a batch of them"):
        sq.quantized(experts)(sq.with_kernel(tree, "pallas"), x)


def test_other_arguments_are_refused():
    tree = quantized_tree(sq.W8A8)
    with pytest.raises(ValueError, match="kernel: expected 'xla' or 'pallas', got 'cuda'"):
        sq.with_kernel(tree, {"w": "cuda"})
    with pytest.raises(ValueError, match=r"pattern 'v' matches nothing. Near misses: 'w'"):
        sq.with_kernel(tree, {"v": "xla"})
    with pytest.raises(ValueError, match="expected what `quantize` returned, got dict"):
        sq.with_kernel(parameters(), "xla")


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="jax 0.10 only")
def test_an_older_jax_is_told():
    with pytest.raises(ValueError, match=r"^w: the kernel 'pallas' needs jax 0\.11 .* got 0\.10"):
        sq.with_kernel(quantized_tree(sq.W8A8), "pallas")
