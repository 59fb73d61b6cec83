"""`save` and `load`: bit for bit, in one safetensors file that says what it holds; damage is named."""

import base64
import copy
import dataclasses
import functools
import json
import os
import re
import stat
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from safetensors import safe_open
from sealing import sealed_again

import sqjax as sq
from sqjax.files import arrays, tree_json
from sqjax.numerics.formats import INT4, container
from sqjax.weights.qtensor import QTensor
from sqjax.weights.quant_weight import Outliers
from sqjax.weights.quantize import quantize_weight


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_same(found, expected):
    """The same structure, dtypes, shapes and bytes."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def there_and_back(tmp_path, tree):
    sq.save(tmp_path / "tree.safetensors", tree)
    return sq.load(tmp_path / "tree.safetensors")


# What comes back --------------------------------------------------------------------------------------------------


def test_containers_come_back(tmp_path):
    x = iter(range(100))
    leaf = lambda: jnp.full((2, 3), next(x), jnp.float32)
    tree = {
        "b": [leaf(), (leaf(), None)],
        "a": {"c/d": leaf(), "": leaf()},
        "layers": {2: leaf(), 10: leaf()},
        "e": {},
    }
    found = there_and_back(tmp_path, tree)
    assert_same(found, tree)
    assert [float(v[0, 0]) for v in jax.tree.leaves(found)] == [
        float(v[0, 0]) for v in jax.tree.leaves(tree)
    ]


@pytest.mark.parametrize("tree", [{}, None, [], jnp.arange(3)], ids=str)
def test_small_trees_come_back(tmp_path, tree):
    assert_same(there_and_back(tmp_path, tree), tree)


SHAPES = [(), (1,), (5,), (3, 4), (2, 3, 7), (0, 3), (3, 0)]


def any_bits(dtype, shape):
    """An array of random bytes: among the floats there are NaNs of every kind."""
    kind = arrays.DTYPES[dtype]
    x = np.random.default_rng(0).integers(0, 256, (*shape, kind.itemsize), np.uint8)
    if dtype == "bool":
        x = (x & 1).astype(bool)
    x = x.view(np.int8).astype(kind) if dtype == "int4" else x.view(kind)
    return jnp.asarray(x[..., 0])


@pytest.mark.parametrize("dtype", [d for d in arrays.DTYPES if not d.endswith("64")])
def test_every_dtype_comes_back_in_every_shape(tmp_path, dtype):
    tree = {str(shape): any_bits(dtype, shape) for shape in SHAPES}
    assert {(x.dtype, x.shape) for x in tree.values()} == {
        (arrays.DTYPES[dtype], shape) for shape in SHAPES
    }
    assert_same(there_and_back(tmp_path, tree), tree)


def test_64_bits_need_jax_to_have_them(tmp_path):
    tree = {
        "a": [np.array([1 / 3]), np.array([2**40]), np.array([2**63], np.uint64)],
        "b": np.array([1 / 3], ">f4"),
    }
    file = tmp_path / "x.safetensors"
    sq.save(file, tree)
    with pytest.raises(
        ValueError, match=r"a/0: expected float64 \(1,\), which jax would cut .*jax_enable_x64.*a/1"
    ):
        sq.load(file)
    with jax.enable_x64(True):
        found = sq.load(file)
        assert [x.dtype.name for x in found["a"]] == ["float64", "int64", "uint64"]
        assert [x.item() for x in found["a"]] == [1 / 3, 2**40, 2**63]
    assert found["b"].item() == np.float32(1 / 3)


def test_numpy_arrays_of_any_layout_come_back(tmp_path):
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    tree = {"t": x.T, "s": x[:, ::2, 1:], "f": np.asfortranarray(x), "n": np.float32(3)}
    assert_same(there_and_back(tmp_path, tree), tree)


STACK = sq.W8A8_O3.replace(smoothing=0.5)
WEIGHTS = {  # scheme, shape, contracted axes, batch, smoothing's shape, outliers
    "W8A8": (sq.W8A8, (6, 4), (0,), (), None, None),
    "per tensor": (
        sq.W8A8_O2.replace(weight=sq.Int8(per_tensor=True)),
        (6, 4),
        (0,),
        (),
        None,
        None,
    ),
    "static": (sq.W8A8_O3, (6, 4), (0,), (), None, None),
    "smoothed at run time": (STACK, (2, 6, 4), (1,), (0,), (2, 6), None),
    "outliers": (sq.W8A8_OUTLIERS, (6, 4), (0,), (), None, [1, 4]),
    "several axes": (sq.W8A8, (6, 4, 3), (0, 2), (), None, None),
    "W4A16": (
        sq.W4A16.replace(weight=sq.Int4(group_size=4, zero_point=True)),
        (10, 3),
        (0,),
        (),
        None,
        None,
    ),
    "W4A16 symmetric": (
        sq.W4A16.replace(weight=sq.Int4()),
        (7, 3),
        (0,),
        (),
        None,
        None,
    ),
    "W4A8": (
        sq.W4A8.replace(weight=sq.Int4(group_size=4, zero_point=True, two_level=True)),
        (2, 8, 3),
        (1,),
        (0,),
        None,
        None,
    ),
    "FP8": (sq.FP8, (6, 4), (0,), (), None, None),
    "FP8_E5M2": (sq.FP8_E5M2, (6, 4), (0,), (), None, None),
    "embedding": (sq.EMBEDDING_INT4, (5, 6), (1,), (), None, None),
}


@functools.cache
def all_weights():
    """Those of `WEIGHTS`, made by one program, because compiling is what takes the time."""
    return jax.jit(lambda: {name: made_weight(name) for name in WEIGHTS})()


def weight(name):
    return all_weights()[name]


def made_weight(name):
    scheme, shape, contracting, batch, smoothing, outliers = WEIGHTS[name]
    absmax = jnp.ones([shape[a] for a in (*batch, *contracting)])
    s = None if smoothing is None else 0.5 + jnp.abs(normal(*smoothing, seed=1))
    channels = None if outliers is None else jnp.asarray(outliers, jnp.int32)
    return quantize_weight(normal(*shape), contracting, scheme, absmax, s, batch, channels)


def of_dtype(w, dtype):
    """The weight as a float leaf of another dtype would give it."""
    outliers = w.outliers and w.outliers._replace(weight=w.outliers.weight.astype(dtype))
    tensor = dataclasses.replace(w.tensor, dtype=jnp.dtype(dtype))
    return dataclasses.replace(w, tensor=tensor, outliers=outliers)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_of_every_scheme_come_back(tmp_path, dtype):
    tree = {}
    for name in WEIGHTS:
        w = of_dtype(weight(name), dtype)
        tree[name] = {"layers": [{"w": w, "bias": normal(4, dtype=dtype)}], "q": w.tensor}
    found = there_and_back(tmp_path, tree)
    for name, expected in tree.items():
        assert_same(found[name], expected)
        assert found[name]["layers"][0]["w"].dtype == dtype
        assert found[name]["q"] is not expected["q"]


def test_every_field_of_our_classes_is_kept():
    assert set(tree_json.FIELDS) == {QTensor, sq.QuantWeight, Outliers}
    assert (*tree_json.FIELDS[Outliers].nodes,) == Outliers._fields
    for cls in (QTensor, sq.QuantWeight):
        static = {f.name: f.metadata.get("static", False) for f in dataclasses.fields(cls)}
        nodes, values = tree_json.FIELDS[cls]
        assert sorted(nodes) == sorted(name for name in static if not static[name])
        # Which program multiplies is no part of a file.
        assert sorted(values) == sorted(
            name for name in static if static[name] and name != "kernel"
        )


@pytest.mark.parametrize("stored", [jnp.int8, jnp.int4], ids=["int8", "int4"])
def test_int4_is_read_as_this_backend_holds_it(tmp_path, stored):
    quantize = jax.jit(lambda x: QTensor.quantize(x, (0,), 8, INT4, zero_point=True))
    q = quantize(normal(32, 3)).stored_as(stored)
    assert q.values.dtype == stored
    found = there_and_back(tmp_path, {"w": q})["w"]
    assert_same(found, q.stored_as(container(INT4)))
    with safe_open(tmp_path / "tree.safetensors", framework="numpy") as file:
        assert file.get_slice("w/values").get_shape() == [3, 16]
        low = file.get_tensor("w/values") & 15
    expected = np.asarray(q.values.astype(jnp.int8))[:, ::2] & np.int8(15)
    np.testing.assert_array_equal(low, expected.astype(np.uint8))


def test_int4_takes_half_a_byte_a_weight(tmp_path):
    tree = {f"w{i}": quantize_weight(normal(512, 256, seed=i), (0,), sq.W4A16) for i in range(2)}
    sq.save(tmp_path / "x.safetensors", tree)
    size, weights = (tmp_path / "x.safetensors").stat().st_size, 2 * 512 * 256
    held = sum(w.tensor.nbytes for w in tree.values())
    assert held <= size <= held + 2048  # the header
    scales = 5 / 128  # a float32 scale and an int8 zero point for every group of 128
    assert size / weights == pytest.approx(0.5 + scales, abs=0.01)


@pytest.mark.slow
def test_a_loaded_tree_runs_what_was_compiled(tmp_path):
    """Four schemes in one program, because compiling it is what takes the time."""
    traces = []

    def fn(p, x):
        traces.append(1)
        x = jnp.tanh(x @ p["static"] * p["gain"].reshape(1, -1))
        return x @ p["outliers"] @ p["groups"] @ p["levels"]

    params = {"gain": normal(16)}
    schemes = {
        "static": sq.W8A8_O3,
        "outliers": sq.W8A8_OUTLIERS.replace(outliers=2.0),
        "groups": sq.W4A16.replace(weight=sq.Int4(group_size=8, zero_point=True)),
        "levels": sq.W4A8.replace(weight=sq.Int4(group_size=8, zero_point=True, two_level=True)),
    }
    params |= {name: normal(16, 16, seed=i) for i, name in enumerate(schemes)}
    x = normal(5, 16, seed=9)
    qparams = sq.quantize(params, sq.calibrate(fn, params, [x]), schemes)
    run = jax.jit(sq.quantized(fn))
    expected, before = run(qparams, x), len(traces)
    found = run(there_and_back(tmp_path, qparams), x)
    assert (len(traces), run._cache_size()) == (before, 1)
    assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()
    assert not np.array_equal(found, fn(params, x))


@pytest.mark.slow
def test_a_module_comes_back(tmp_path):
    class Net(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return jnp.tanh(self.layer(x))

    fn, params = sq.nnx.functional(Net())
    x = normal(3, 8)
    qparams = sq.quantize(params, sq.calibrate(fn, params, [x]))
    module = sq.nnx.rebuild(fn, there_and_back(tmp_path, qparams))
    np.testing.assert_array_equal(module(x), sq.quantized(fn)(qparams, x))


def test_other_programs_can_read_the_file(tmp_path):
    tree = {"norm": normal(4, dtype=jnp.bfloat16), "w": weight("FP8")}
    sq.save(tmp_path / "x.safetensors", tree)
    with safe_open(tmp_path / "x.safetensors", framework="numpy") as file:
        assert set(file.keys()) == {"norm", "w/tensor/values", "w/tensor/scale"}
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (not a dict)
        assert kinds == {"norm": "BF16", "w/tensor/values": "F8_E4M3", "w/tensor/scale": "F32"}
        np.testing.assert_array_equal(file.get_tensor("norm"), np.asarray(tree["norm"]))
        assert file.metadata()["sqjax"] == "2"


# What is refused on the way out -----------------------------------------------------------------------------------


class Pair(tuple):
    pass


def forced(x, **changes):
    """dataclasses.replace, past the types that the tests enforce."""
    x = copy.copy(x)
    for name, value in changes.items():
        object.__setattr__(x, name, value)
    return x


def cast(w, **changes):
    return {"a": [forced(w, tensor=forced(w.tensor, **changes))]}


@functools.cache
def refused():
    w, four = weight("W8A8"), weight("W4A16")
    deleted = jnp.ones(2)
    deleted.delete()
    return {
        "float": ({"a": [1.0]}, r"a/0: expected an array.*got float; make it an array"),
        "text": ({"a": "x"}, r"a: expected an array.*got str; keep what is no array elsewhere"),
        "tuple of their own": ({"a": Pair([jnp.ones(2)])}, r"a: .*got Pair; save tuple"),
        "mixed keys": (
            {"a": {1: jnp.ones(2), "b": jnp.ones(2)}},
            r"a: expected keys all str or all int",
        ),
        "key": (
            {"a": {(1, 2): jnp.ones(2)}},
            r"a: expected keys all str or all int, got \[\(1, 2\)\]",
        ),
        "one path": (
            {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}},
            r"a/b: two leaves have this path",
        ),
        "reserved": (
            {"__metadata__": jnp.ones(2)},
            r"__metadata__: .*safetensors keeps it to itself; rename",
        ),
        "complex": (
            {"a": jnp.ones(2, jnp.complex64)},
            r"a: expected a dtype among .*got complex64; cast it",
        ),
        "random key": ({"a": jax.random.key(0)}, r"a: expected a dtype among .*got key<"),
        "objects": ({"a": np.array([None])}, r"a: expected a dtype among .*got object"),
        "abstract": (
            jax.eval_shape(lambda: {"a": jnp.ones(2)}),
            r"a: .*got ShapeDtypeStruct; save outside jit",
        ),
        "deleted": ({"a": deleted}, r"a: the array is deleted"),
        "weak": ({"a": jnp.asarray(1.0)}, r"a: its float32 is weak.*save x.astype\(jnp.float32\)"),
        "cast values": (
            cast(w, values=jnp.ones((4, 6))),
            r"a/0/tensor: not a valid QTensor: values must be int8",
        ),
        "cast scale": (
            cast(w, scale=w.tensor.scale.astype(jnp.bfloat16)),
            r"a/0/tensor: .*scale must be float32",
        ),
        "no scale": (cast(w, scale=None), r"a/0/tensor: expected an array.*got NoneType"),
        "group": (cast(four, group=0), r"a/0/tensor: expected a known group, got 0"),
        "format": (
            cast(w, fmt=INT4._replace(bound=1.0)),
            r"a/0/tensor: expected a known fmt, got .*bound=1.0",
        ),
        "too large for int4": (
            cast(four, values=four.tensor.values.astype(jnp.int8) + jnp.int8(90)),
            r"\[-8, 7\]",
        ),
        "spec": (sq.shardings({"a": w}, {"a": None}), r"a/tensor: expected an array.* got P; keep"),
        "static": (
            {"a": forced(w, activations="static")},
            r"a: .*static activations need an input_scale",
        ),
        "activations": (
            {"a": forced(w, activations="none")},
            r"a: expected a known activations, got 'none'",
        ),
        "no axes": ({"a": forced(w, contracted=0)}, r"a: expected a known contracted, got 0"),
        "contracted": (
            {"a": forced(w, contracted=3)},
            r"a: .*expected at most 2 contracted axes, got 3",
        ),
        "smoothing": ({"a": forced(w, smoothing=jnp.arange(6))}, r"a: .*smoothing must be float32"),
        "channels": (
            {"a": forced(w, outliers=Outliers(jnp.ones(1), jnp.ones((4, 1))))},
            r"a: .*channels must be int32",
        ),
        "tensor": ({"a": forced(w, tensor=jnp.ones(2))}, r"a: .*expected a QTensor"),
    }


@pytest.mark.parametrize("case", refused())
def test_what_a_file_can_not_keep_is_refused(tmp_path, case):
    tree, message = refused()[case]
    with pytest.raises(ValueError, match=f"save: .*x.safetensors: .*{message}"):
        sq.save(tmp_path / "x.safetensors", tree)
    assert not list(tmp_path.iterdir())


def test_save_is_refused_under_jit(tmp_path):
    with pytest.raises(
        ValueError, match=r"a: expected an array of numbers, got .*Tracer; save outside jit"
    ):
        jax.jit(lambda x: sq.save(tmp_path / "x.safetensors", {"a": x}))(jnp.ones(2))


@pytest.mark.parametrize("path", ["nowhere/x", "nowhere/x.safetensors"])
def test_save_needs_a_directory(tmp_path, path):
    with pytest.raises(
        ValueError, match=r"expected a path in a directory that exists; make .*nowh"
    ):
        sq.save(tmp_path / path, {"a": jnp.ones(2)})


# Written aside ----------------------------------------------------------------------------------------------------


def failing(*_args, **_kwargs):
    raise OSError("no space left")


def half_written(tensors, file, metadata):
    with open(file, "wb") as opened:
        opened.write(b"half")
    raise OSError("no space left")


@pytest.mark.parametrize("where", ["writing", "syncing", "renaming"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where):
    file, old, new = tmp_path / "x.safetensors", {"a": jnp.ones(2)}, {"a": jnp.zeros(3)}
    sq.save(file, old)
    with monkeypatch.context() as patched:
        owner, name = {
            "writing": (safetensors.numpy, "save_file"),
            "syncing": (os, "fsync"),
            "renaming": (os, "replace"),
        }[where]
        patched.setattr(owner, name, half_written if where == "writing" else failing)
        with pytest.raises(OSError, match="no space left"):
            sq.save(file, new)
    assert list(tmp_path.iterdir()) == [file]
    assert_same(sq.load(file), old)
    sq.save(file, new)
    assert list(tmp_path.iterdir()) == [file]
    assert_same(sq.load(file), new)


def test_a_tree_can_be_saved_over_the_file_it_came_from(tmp_path):
    tree = {"w": weight("W4A8")}
    for _ in range(2):
        assert_same(there_and_back(tmp_path, there_and_back(tmp_path, tree)), tree)


@pytest.mark.skipif(os.name != "posix", reason="modes and links are those of POSIX")
def test_the_file_is_as_readable_as_any_and_a_link_stays_one(tmp_path):
    (tmp_path / "plain").touch()
    link = tmp_path / "link"
    link.symlink_to("target.bin")
    sq.save(link, {"a": jnp.ones(2)})
    assert link.is_symlink()
    names = "plain", "target.bin"
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in names}
    assert modes["plain"] == modes["target.bin"]


# What is refused on the way in ------------------------------------------------------------------------------------


def rewritten(file, change):
    """The file, with its header (a dict) changed by `change`, which may return other data.

    It is sealed again, as by a program that writes what `load` must not take.
    """
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    tree = json.loads(header["__metadata__"]["tree"])
    data = change(header, tree)
    if "tree" in header.get("__metadata__", {}):
        header["__metadata__"]["tree"] = json.dumps(tree)
    new = json.dumps(header).encode()
    data = raw[start:] if data is None else data
    file.write_bytes(sealed_again(len(new).to_bytes(8, "little") + new + data))


def renamed(header, old, new):
    header[new] = header.pop(old)


def wide(header, tree):
    header["bias"] |= {"dtype": "I32"}


def w_of(tree):
    return dict(tree["dict"])["w"]["QuantWeight"]


def set_to(**changes):
    return lambda header, tree: w_of(tree).update(changes)


def set_tensor(**changes):
    return lambda header, tree: w_of(tree)["tensor"]["QTensor"].update(changes)


TAMPERED = {
    "not ours": (
        lambda h, t: h.pop("__metadata__") and None,
        r"expected a file of sqjax.save, got metadata \[\]",
    ),
    "another's": (
        lambda h, t: h.update(__metadata__={"format": "pt"}),
        r"got metadata \['format'\]",
    ),
    "newer": (
        lambda h, t: h["__metadata__"].update(sqjax="4"),
        r"expected layout version 3, got 4; update sqjax",
    ),
    "missing and extra": (
        lambda h, t: renamed(h, "bias", "other"),
        r"other: a tensor that is not in the tree; bias: expected float32 \(4, 6\), got none",
    ),
    "shape": (
        lambda h, t: h["bias"].update(shape=[6, 4]),
        r"bias: expected float32 \(4, 6\), got F32 \(6, 4\)",
    ),
    "shape of a scale": (
        lambda h, t: h["w/tensor/scale"].update(shape=[1, 4]),
        r"w/tensor/scale: expected float32 \(4, 1\), got F32 \(1, 4\)",
    ),
    "dtype": (wide, r"bias: expected float32 \(4, 6\), got I32 \(4, 6\)"),
    "unknown node": (
        lambda h, t: t["dict"].__setitem__(0, ["bias", {"set": []}]),
        r"bias: .*does not describe a set",
    ),
    "no node": (
        lambda h, t: t["dict"].__setitem__(0, ["bias", 7]),
        r"bias: expected a node.*got 7",
    ),
    "path twice": (lambda h, t: t["dict"].append(t["dict"][0]), r"bias: two leaves have this path"),
    "unknown dtype": (
        lambda h, t: t["dict"][0][1].update(array=["int3", [4, 6]]),
        r"bias: .*KeyError\('int3'\)",
    ),
    "field too many": (
        set_to(reflection=1),
        r"w: expected \('tensor', .*got also \['reflection'\]; update sqjax",
    ),
    "rotation": (set_to(rotation=0), r"w: expected a known rotation, got 0"),
    "field too few": (
        lambda h, t: w_of(t).pop("contracted") and None,
        r"w: .*KeyError\('contracted'\)",
    ),
    "order": (set_tensor(order=[-3, -1]), r"w/tensor: not a valid QTensor: order must permute"),
    "order of text": (set_tensor(order="ab"), r"w/tensor: expected a known order, got 'ab'"),
    "group": (set_tensor(group=0), r"w/tensor: expected a known group, got 0"),
    "format": (
        set_tensor(fmt="e4m3"),
        r"w/tensor: not a valid QTensor: values must be e4m3, got int8",
    ),
    "unknown format": (set_tensor(fmt="int3"), r"w/tensor: expected a known fmt, got 'int3'"),
    "no values": (set_tensor(values=None), r"w/tensor: the header does not describe a QTensor"),
    "activations": (
        set_to(activations="per_row"),
        r"w: expected a known activations, got 'per_row'",
    ),
    "contracted": (set_to(contracted=0), r"w: expected a known contracted, got 0"),
    "static": (set_to(activations="static"), r"w: .*static activations need an input_scale"),
}


def test_rewriting_a_file_does_no_harm(tmp_path):
    """Or the next test would show nothing."""
    file, tree = tmp_path / "x.safetensors", {"bias": normal(4, 6), "w": weight("W8A8")}
    sq.save(file, tree)
    rewritten(file, lambda header, tree: None)
    assert_same(sq.load(file), tree)


@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_file_is_refused(tmp_path, case):
    file, (change, message) = tmp_path / "x.safetensors", TAMPERED[case]
    sq.save(file, {"bias": normal(4, 6), "w": weight("W8A8")})
    rewritten(file, change)
    with pytest.raises(ValueError, match=f"^load: {re.escape(str(file))}: .*{message}"):
        sq.load(file)


def is_taken(file, raw):
    """Whether a file of these bytes is loaded."""
    file.write_bytes(raw)
    try:
        sq.load(file)
    except ValueError as error:
        return not str(error).startswith(f"load: {file}: ")
    return True


EVERY = [pytest.mark.slow, pytest.mark.every_case]


@pytest.mark.parametrize(
    "step", [pytest.param(1, marks=EVERY), pytest.param(3, marks=pytest.mark.slow), 29]
)
def test_a_byte_that_changes_anywhere_is_refused(tmp_path, step):
    """By one bit, and to a digit or a blank."""
    file = tmp_path / "x.safetensors"
    sq.save(file, {"b": jnp.arange(3, dtype=jnp.int8), "w": weight("W4A16")})
    raw = file.read_bytes()
    taken = []
    for number in range(0, len(raw), step):
        byte = raw[number]
        for other in {byte ^ (1 << number % 8), ord("0\n"[number % 2])} - {byte}:
            if is_taken(file, raw[:number] + bytes([other]) + raw[number + 1 :]):
                taken.append((number, other, raw[number - 20 : number + 20]))
    assert taken == []
    assert is_taken(file, raw)


def test_what_was_changed_is_named(tmp_path):
    file = tmp_path / "x.safetensors"
    tree = {"b": jnp.arange(9, dtype=jnp.int8), "w": jnp.ones((4, 6))}
    sq.save(file, tree)
    raw = file.read_bytes()
    ones = raw.index(np.ones(24, np.float32).tobytes())
    file.write_bytes(raw[:ones] + b"1" + raw[ones + 1 :])
    with pytest.raises(ValueError, match=r"x.safetensors: w: expected an array with the checksum"):
        sq.load(file)
    # Two arrays of one shape that have changed places.
    sq.save(file, {"v": jnp.ones(3), "w": jnp.zeros(3)})
    raw = file.read_bytes()
    ones, zeros = np.ones(3, np.float32).tobytes(), np.zeros(3, np.float32).tobytes()
    file.write_bytes(raw.replace(ones + zeros, zeros + ones))
    with pytest.raises(ValueError, match=r"v: expected an array with the checksum"):
        sq.load(file)
    # The tree says something else than what was saved.
    sq.save(file, {"norm": jnp.ones(3)})
    file.write_bytes(file.read_bytes().replace(b"norm", b"form"))
    with pytest.raises(ValueError, match=r"expected a header with the checksum"):
        sq.load(file)


def test_a_file_of_the_layout_without_sums_is_read(tmp_path):
    file, tree = tmp_path / "x.safetensors", {"w": weight("W8A8")}
    sq.save(file, tree)

    def older(header, tree):
        kept = header["__metadata__"]
        header["__metadata__"] = {"sqjax": "1", "tree": kept["tree"]}

    rewritten(file, older)
    raw = file.read_bytes()
    assert b"sums" not in raw
    assert_same(sq.load(file), tree)


#: A file that sqjax wrote before directories of shards were known, compressed.
OF_VERSION_2 = (
    "c-nPR+iKh}5KWeTh|#k`bg^zr3wbK^vCuc$n2{|dTfFPU_LioL$*=WO`YDy<-DE=&A%kXo&Y3eK{aan6bwG8!brZ"
    "BOL0zNu0ZoH*XpIgfYB$YPqIFgjC4v&+EabY)xa7hah5;T^P@>Il(h*Yds+w`O+jm_xS2+H%N9y+<Za4NrB!uV}b"
    "bB`*gLjn}&R7yF(bz!e-og5=hl#TjoF3tS+|WlvbP?m*q2J%v&myOEKeR5{DXu8au2>b5?eut`P_NXF8s}`kofg<"
    ")c%DOXgwg1r3*+;-VnSM<YsGyd71P2<PmO7%4ZDfR{dQai4cBCm0wo$^Noy3Bq@fm+=DCs1N+8?_SghFVm*JJj2?"
    "a!HAsl6%G(<AjI4z{0ytR_56X&`8K;g_A!HHJdd!wDTd7BeqgFi5?31w0z4?p2|Fv!r1PyF~m(u6|(D`ydP2Qdoc"
    "rxix&8TH<eZVJ5>1nY1kvA=WTH+{zAZ&?~sTBVvxpC57=W^dV)Vk)Y6&eHm{y8IlzFBg}qr<=b|{{dIq-c0"
)


def test_a_file_of_the_layout_of_one_tree_is_read_and_written(tmp_path):
    """Older versions read what is written for a tree alone."""
    file = tmp_path / "x.safetensors"
    file.write_bytes(zlib.decompress(base64.b85decode(OF_VERSION_2)))
    found = sq.load(file)
    assert found["a"][0].tolist() == [0, 1, 2]
    assert found["b"].values.tolist() == [[127, 64], [-64, 127]]
    with safe_open(file, framework="numpy") as opened:
        before = opened.metadata()
    sq.save(tmp_path / "again.safetensors", found)
    with safe_open(tmp_path / "again.safetensors", framework="numpy") as opened:
        assert opened.metadata() == before


@pytest.mark.parametrize("kept", [0, 5, 100, -1], ids=str)
def test_a_truncated_file_is_refused(tmp_path, kept):
    file = tmp_path / "x.safetensors"
    sq.save(file, {"w": weight("W4A16")})
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(
        ValueError, match=r"load: .*x\.safetensors: expected a whole safetensors file, got .*again"
    ):
        sq.load(file)


def test_something_else_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x04N." * 40)
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        sq.load(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match="nothing"):
        sq.load(tmp_path / "nothing")
