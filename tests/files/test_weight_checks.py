"""Quantized leaves that no quantizer gives: each number and each part changed by itself."""

import copy
import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from sealing import sealed_again

import sqjax as sq
from sqjax.files import loading
from sqjax.weights.quant_weight import Outliers
from sqjax.weights.quantize import quantize_weight

SCHEMES = {
    "int8": sq.W8A8,
    "static": sq.W8A8_O3,
    "smoothed": sq.W8A8.replace(smoothing=0.5),
    "outliers": sq.W8A8_OUTLIERS,
    "rotated": sq.W8A8.replace(rotation=4),
    "int4": sq.W4A16.replace(weight=sq.Int4()),
    "zeros": sq.W4A16.replace(weight=sq.Int4(group_size=4, zero_point=True)),
    "levels": sq.W4A8.replace(weight=sq.Int4(group_size=4, zero_point=True, two_level=True)),
    "e4m3": sq.FP8,
    "e5m2": sq.FP8_E5M2,
}


@functools.cache
def weights():
    """A weight (8, 3) in each scheme, by one compiled program."""

    def make():
        w = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
        made = {}
        for name, scheme in SCHEMES.items():
            smoothing = jnp.linspace(0.5, 2, 8) if name == "smoothed" else None
            channels = jnp.asarray([1, 4], jnp.int32) if name == "outliers" else None
            made[name] = quantize_weight(w, (0,), scheme, jnp.ones(8), smoothing, (), channels)
        return made

    return jax.device_get(jax.jit(make)())


def changed(name, path, change):
    """The weight with one field changed by a function, past all checks."""
    *way, last = path.split("/")
    w = node = copy.copy(weights()[name])
    for field in way:
        below = copy.copy(getattr(node, field))
        object.__setattr__(node, field, below)
        node = below
    value = change(getattr(node, last))
    if isinstance(node, Outliers):
        object.__setattr__(w, "outliers", w.outliers._replace(**{last: value}))
    else:
        object.__setattr__(node, last, value)
    return w


def first(number):
    """The array with one of its numbers replaced."""

    def put(x):
        x = np.array(x)
        x.reshape(-1)[0] = number
        return x

    return put


def to(value):
    return lambda _: value


NAN8 = {
    name: np.array(np.nan, getattr(ml_dtypes, name)) for name in ("float8_e4m3fn", "float8_e5m2")
}
VALUES = {
    "negative scale": ("int8", "tensor/scale", first(-1.0), "scale must be finite and above 0"),
    "no scale": ("int8", "tensor/scale", first(0.0), "scale must be finite and above 0"),
    "scale of NaN": ("int4", "tensor/scale", first(np.nan), "scale must be finite and above 0"),
    "infinite scale": ("e4m3", "tensor/scale", first(np.inf), "scale must be finite and above 0"),
    "9": ("zeros", "tensor/values", first(9), r"int4 values must be in \[-8, 7\]"),
    "e4m3 NaN": ("e4m3", "tensor/values", first(NAN8["float8_e4m3fn"]), "e4m3 values must be in"),
    "e5m2 NaN": ("e5m2", "tensor/values", first(NAN8["float8_e5m2"]), "e5m2 values must be in"),
    "e5m2 inf": (
        "e5m2",
        "tensor/values",
        first(np.array(np.inf, ml_dtypes.float8_e5m2)),
        "e5m2 values must be in",
    ),
    "zero": ("zeros", "tensor/zero", first(100), r"zero must be in \[-8, 7\]"),
    "step": ("levels", "tensor/group_scale", first(0), r"group_scale must be in \[1, 127\]"),
    "expansion": (
        "levels",
        "tensor/group_scale",
        first(100),
        r"group_scale must be in \[-127, 127",
    ),
    "input scale": ("static", "input_scale", first(-1.0), "input_scale must be finite"),
    "input scale NaN": ("static", "input_scale", first(np.nan), "input_scale must be finite"),
    "smoothing": ("smoothed", "smoothing", first(0.0), "smoothing must be finite and above 0"),
    "channel": ("outliers", "outliers/channels", first(8), r"channels must be in \[0, 7\]"),
    "channel twice": ("outliers", "outliers/channels", first(4), "every outlier channel once"),
    "row": ("outliers", "outliers/weight", first(np.inf), "outliers' weight must be finite"),
}
PARTS = {
    "zeros of int8": ("int8", "tensor/zero", to(np.ones((3, 1), np.int8)), "only int4 has zero"),
    "one level": ("levels", "tensor/zero", to(None), "integer group scales need groups and zero"),
    "logical dtype": ("int8", "tensor/dtype", to(np.dtype(np.int32)), "stands for a float array"),
    "formats": ("int8", "activation_format", to("e4m3"), r"expected an activation_format among"),
    "int4 activations": ("e4m3", "activation_format", to("int4"), "activation_format among"),
    "zero point": ("int8", "activations", to("per_token_zero_point"), "only int4 activations"),
    "rotation": (
        "rotated",
        "rotation",
        to(3),
        r"a rotation that divides 8 channels expected, got 3",
    ),
    "rotated outliers": ("outliers", "rotation", to(8), "outliers need unrotated channels"),
    "float8 weights": ("e4m3", "activation_format", to("int8"), "activation_format among"),
    "scale of none": ("static", "activations", to("per_token"), "input_scale needs static"),
    "outliers of none": ("outliers", "activations", to(None), "outliers need quantized"),
    "levels of none": ("levels", "activations", to(None), "two levels need quantized"),
    "input scale": ("static", "input_scale", to(np.ones(3, np.float32)[:2]), r"shape \(3,\)"),
    "smoothing": ("smoothed", "smoothing", to(np.ones(7, np.float32)), r"shape \(8,\) expected"),
    "rows": ("outliers", "outliers/weight", to(np.ones((3, 1), np.float32)), r"shape \(3, 2\)"),
    "channels": ("outliers", "outliers/channels", to(None), "expected two arrays as outliers"),
}


def test_what_was_quantized_is_valid(tmp_path):
    sq.save(tmp_path / "x.safetensors", weights())
    assert jax.tree.structure(sq.load(tmp_path / "x.safetensors")) == jax.tree.structure(weights())


@pytest.mark.parametrize("case", VALUES)
def test_values_are_refused_by_save_and_by_load(tmp_path, monkeypatch, case):
    name, path, change, message = VALUES[case]
    tree = {"a": [changed(name, path, change)]}
    with pytest.raises(ValueError, match=rf"save: .*a/0.*: not a valid \w+: .*{message}"):
        sq.save(tmp_path / "x.safetensors", tree)
    with monkeypatch.context() as patched:
        patched.setattr("sqjax.files.tree_json.check_values", lambda *_: None)
        sq.save(tmp_path / "x.safetensors", tree)
    if case == "9":  # four bits can not say it: what they do say is a code
        return
    with pytest.raises(
        ValueError, match=rf"load: .*x.safetensors: a/0: not a valid \w+: .*{message}"
    ):
        sq.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("case", PARTS)
def test_parts_that_do_not_go_together_are_refused(tmp_path, case):
    name, path, change, message = PARTS[case]
    with pytest.raises(ValueError, match=rf"a/0.*: not a valid \w+: .*{message}"):
        sq.save(tmp_path / "x.safetensors", {"a": [changed(name, path, change)]})


def rewritten(file, **fields):
    """The file, with fields of its only leaf changed in the JSON of the tree."""
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    tree = json.loads(header["__metadata__"]["tree"])
    tree["QuantWeight"].update(fields)
    header["__metadata__"]["tree"] = json.dumps(tree)
    text = json.dumps(header).encode()
    file.write_bytes(sealed_again(len(text).to_bytes(8, "little") + text + raw[start:]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_format": "e5m2"}, "expected an activation_format among"),
        ({"activation_format": ["int8"]}, "expected a known activation_format"),
        ({"activations": {}}, "expected a known activations"),
        ({"outliers": {"Outliers": {"channels": None, "weight": None}}}, "two arrays as outliers"),
        ({"smoothing": {"list": []}}, "smoothing must be float32"),
    ],
)
def test_parts_of_a_file_are_checked_before_an_array_is_read(
    tmp_path, monkeypatch, fields, message
):
    sq.save(tmp_path / "x.safetensors", weights()["int8"])
    rewritten(tmp_path / "x.safetensors", **fields)
    monkeypatch.setattr(loading, "_Reader", None)
    with pytest.raises(
        ValueError, match=rf"load: .*x.safetensors: \(the tree itself\): .*{message}"
    ):
        sq.load(tmp_path / "x.safetensors")


def test_a_flipped_bit_of_a_scale(tmp_path):
    sq.save(tmp_path / "x.safetensors", {"w": weights()["int8"]})
    raw = bytearray((tmp_path / "x.safetensors").read_bytes())
    scale = weights()["int8"].tensor.scale.tobytes()
    where = bytes(raw).index(scale)
    raw[where + 3] ^= 0x80  # the sign
    (tmp_path / "x.safetensors").write_bytes(sealed_again(bytes(raw)))
    with pytest.raises(ValueError, match=r"w: not a valid QTensor: scale must be finite and above"):
        sq.load(tmp_path / "x.safetensors")
