"""`Scheme` and its parts: what they refuse when they are made, how they print, that they are plain values."""

import dataclasses
import importlib.machinery
import importlib.util
import re

import jax
import pytest

import sqjax as sq
from sqjax.weights import schemes

# By their names, because sqjax has what was asked for only.
NAMES = {name: getattr(sq, name) for name in sq.__all__}
PRESETS = {name: value for name, value in NAMES.items() if isinstance(value, sq.Scheme)}


@pytest.mark.parametrize("name", PRESETS)
def test_a_scheme_prints_as_the_call_that_makes_it(name):
    scheme = PRESETS[name]
    again = eval(repr(scheme), dict(NAMES))
    assert again == scheme
    assert hash(again) == hash(scheme)


def test_a_repr_leaves_out_what_is_the_default():
    scheme = sq.W4A8.replace(smoothing=0.5, outliers=6.0, activation=sq.PerTensor())
    assert repr(scheme) == (
        "Scheme(weight=Int4(group_size=128, zero_point=True, two_level=True), "
        "activation=PerTensor(), smoothing=0.5, outliers=6.0)"
    )
    assert repr(sq.Scheme()) == "Scheme(weight=Int8(), activation=PerToken())"
    assert sq.Scheme() == sq.W8A8 == sq.W8A8_O1


def test_presets_differ():
    names = set(PRESETS) - {"W8A8"}
    assert len({PRESETS[name] for name in names}) == len(names) == 15


def test_a_scheme_is_a_value_and_no_container():
    scheme = sq.W8A8_OUTLIERS
    assert not isinstance(scheme, tuple)
    assert jax.tree.leaves({"a": scheme}) == [scheme]
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme.outliers = 3.0
    with pytest.raises(TypeError, match="positional"):
        sq.Scheme(sq.Int8())
    with pytest.raises(TypeError, match="weights"):
        scheme.replace(weights="per_tensor")


def test_granularity_says_which_elements_share_a_scale():
    assert sq.Int8().granularity == "per_channel"
    assert sq.Int4(group_size=32).granularity == 32
    assert sq.Float8(per_tensor=True).granularity == "per_tensor"


@pytest.mark.parametrize(
    ("scheme", "activation", "measured", "histogram"),
    [
        (sq.W8A8, True, False, False),
        (sq.W8A16, False, False, False),
        (sq.EMBEDDING_INT8, False, False, False),
        (sq.W8A8_OUTLIERS, True, True, False),
        (sq.W8A16.replace(smoothing=0.5), False, True, False),
        (sq.W8A8_O3, True, True, False),
        (sq.W8A8_O3.replace(activation=sq.Static(range="mse")), True, True, True),
    ],
    ids=str,
)
def test_what_a_scheme_asks_of_calibration(scheme, activation, measured, histogram):
    assert scheme.quantizes_activation is activation
    assert scheme.measured is measured
    assert scheme.needs_histogram is histogram


def _without_type_checks():
    """`sqjax.weights.schemes` as users have it: the type checks with which tests run refuse wrong types sooner."""
    loader = importlib.machinery.SourceFileLoader("plain_schemes", schemes.__file__)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


plain = _without_type_checks()
SIZE = "an int of 1 or more (channels in a group), or None (one scale for an output)"
KIND = "a format that goes with {} (int8 and int4 activations go with int8 or int4 weights, float8"
TWO = "int8 activations, because two levels need them (without them leave two_level out)"
KINDS = "PerToken(...), PerTensor(...), Static(...), Indices() or None"
RANGE = "'absmax', 'mse', or a percentile as a fraction in (0.0, 1.0] such as 0.9999"
BLOCK = "'hadamard', an int of 2 or more (channels in a block), or None"
UNFIT = [  # what is made, the field that is named, what is expected there, what came
    (lambda: plain.Int8(group_size=0), "Int8.group_size", SIZE, "0"),
    (lambda: plain.Int4(group_size=-3), "Int4.group_size", SIZE, "-3"),
    (lambda: plain.Float8(group_size=True), "Float8.group_size", SIZE, "True"),
    (lambda: plain.Int8(group_size="per_tokn"), "Int8.group_size", SIZE, "'per_tokn'"),
    (lambda: plain.Int8(per_tensor=1), "Int8.per_tensor", "True or False", "1"),
    (
        lambda: plain.Int8(per_tensor=True, group_size=8),
        "Int8.group_size",
        "None with per_tensor=True",
        "8",
    ),
    (lambda: plain.Int4(zero_point=None), "Int4.zero_point", "True or False", "None"),
    (lambda: plain.Int4(two_level="yes"), "Int4.two_level", "True or False", "'yes'"),
    (lambda: plain.Int4(two_level=True), "Int4.group_size", "a group size with two_level=", "None"),
    (
        lambda: plain.Int4(two_level=True, group_size=64),
        "Int4.zero_point",
        "True with two_level=True, because two levels have zero points",
        "False",
    ),
    (
        lambda: plain.Int4(two_level=True, per_tensor=True),
        "Int4.group_size",
        "a group size with two_level=",
        "None",
    ),
    (lambda: plain.Float8(format="int8"), "Float8.format", "'e4m3' or 'e5m2'", "'int8'"),
    (
        lambda: plain.PerToken(format="int6"),
        "PerToken.format",
        "'int8', 'int4', 'e4m3' or 'e5m2'",
        "'int6'",
    ),
    (
        lambda: plain.Static(format="e4"),
        "Static.format",
        "'int8', 'int4', 'e4m3' or 'e5m2'",
        "'e4'",
    ),
    (
        lambda: plain.PerToken(format="int4", zero_point=1),
        "PerToken.zero_point",
        "True or False",
        "1",
    ),
    *[
        (
            lambda fmt=fmt: plain.PerToken(format=fmt, zero_point=True),
            "PerToken.zero_point",
            f"False with format='{fmt}', because what is multiplied is code - zero point, which",
            "True",
        )
        for fmt in ("int8", "e4m3")
    ],
    *[
        (lambda wrong=wrong: plain.Static(range=wrong), "Static.range", RANGE, repr(wrong))
        for wrong in (0.0, 99.9, True, "max", None)
    ],
    *[
        (lambda wrong=wrong: plain.Scheme(rotation=wrong), "Scheme.rotation", BLOCK, repr(wrong))
        for wrong in ("haar", 1, True, 64.0)
    ],
    (lambda: plain.Scheme(weight="int8"), "Scheme.weight", "Int8(...), Int4(...) or F", "'int8'"),
    (lambda: plain.Scheme(activation="static"), "Scheme.activation", KINDS, "'static'"),
    (
        lambda: plain.Scheme(weight=plain.Float8()),
        "Scheme.activation",
        KIND.format("Float8()"),
        "PerToken()",
    ),
    (
        lambda: plain.Scheme(activation=plain.PerTensor(format="e5m2")),
        "Scheme.activation",
        KIND.format("Int8()"),
        "PerTensor(format='e5m2')",
    ),
    (lambda: plain.W4A8.replace(activation=None), "Scheme.activation", TWO, "None"),
    (lambda: plain.W4A8.replace(activation=plain.Indices()), "Scheme.activation", TWO, "Indices()"),
    (
        lambda: plain.W8A8.replace(smoothing=1.5),
        "Scheme.smoothing",
        "an alpha in [0, 1], or",
        "1.5",
    ),
    (lambda: plain.W8A8.replace(smoothing=True), "Scheme.smoothing", "an alpha in [0, 1]", "True"),
    (
        lambda: plain.EMBEDDING_INT8.replace(smoothing=0.5),
        "Scheme.smoothing",
        "None, because",
        "0.5",
    ),
    (
        lambda: plain.W8A8.replace(outliers=0.0),
        "Scheme.outliers",
        "a finite threshold above 0, or",
        "0.0",
    ),
    (
        lambda: plain.W8A8.replace(outliers=float("nan")),
        "Scheme.outliers",
        "a finite threshold",
        "nan",
    ),
    (
        lambda: plain.W8A8.replace(outliers="6"),
        "Scheme.outliers",
        "a finite threshold above 0",
        "'6'",
    ),
    (lambda: plain.W8A16.replace(outliers=6.0), "Scheme.outliers", "None, because the act", "6.0"),
    (
        lambda: plain.Scheme(activation=plain.Static(range="mse"), outliers=6.0),
        "Scheme.activation",
        "range='absmax' with smoothing at run time, with outliers and with a rotation, because",
        "Static(range='mse')",
    ),
]


@pytest.mark.parametrize(("make", "field", "expected", "came"), UNFIT)
def test_what_does_not_go_together_is_refused_when_it_is_made(make, field, expected, came):
    message = rf"^{re.escape(f'{field}: expected {expected}')}.*, got {re.escape(came)}$"
    with pytest.raises(ValueError, match=message):
        make()
