"""Quantized convolutions against numpy: int64 sums bit for bit, in every layout and geometry."""

from typing import NamedTuple

import convolutions_in_numpy as oracle
import int8_in_numpy as numpy_int8
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sqjax.numerics.channels import Channels, channel_absmax
from sqjax.numerics.convolution import EXACT_IN_FLOAT32, Window, convolve
from sqjax.weights.convolution import quantize_kernel, quantized_convolution
from sqjax.weights.qtensor import dequantize
from sqjax.weights.schemes import Int4, Int8, PerTensor, PerToken, Scheme, Static


class Case(NamedTuple):
    """A convolution of x (batch, *positions, channels) with a kernel (*window, inputs, outputs)."""

    x: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...] = ()
    rhs_dilation: tuple[int, ...] = ()
    groups: int = 1
    layout: str = "last"

    @property
    def window(self):
        ones = (1,) * len(self.strides)
        return Window(
            self.strides,
            self.padding,
            self.lhs_dilation or ones,
            self.rhs_dilation or ones,
            self.groups,
        )


SAME, NONE = ((1, 1), (1, 1)), ((0, 0), (0, 0))
CASES = {
    "in float32": Case((2, 5, 6, 3), (3, 3, 3, 4), (1, 1), SAME),
    "strides": Case((1, 7, 8, 3), (3, 2, 3, 4), (2, 3), SAME),
    "rhs dilation": Case((1, 9, 8, 2), (3, 2, 2, 3), (1, 2), SAME, rhs_dilation=(2, 3)),
    "lhs dilation": Case((1, 4, 5, 2), (3, 3, 2, 3), (1, 2), SAME, lhs_dilation=(2, 3)),
    "negative padding": Case((1, 6, 6, 2), (3, 3, 2, 3), (1, 1), ((-1, 2), (1, -2))),
    "pointwise": Case((2, 3, 4, 5), (1, 1, 5, 3), (1, 1), NONE),
    "pointwise, strides": Case((2, 5, 4, 5), (1, 1, 5, 3), (2, 3), ((0, 1), (0, 0))),
    "patches": Case((2, 9, 8, 3), (4, 2, 3, 5), (4, 2), NONE),
    "patches, padded": Case((2, 6, 8, 3), (4, 2, 3, 5), (4, 2), ((1, 1), (0, 0))),
    "long": Case((1, 4, 5, 120), (3, 3, 120, 2), (1, 2), SAME),
    "1d": Case((2, 9, 4), (3, 4, 5), (2,), ((2, 0),)),
    "3d": Case((1, 3, 4, 4, 2), (2, 3, 2, 2, 3), (1, 1, 2), ((0, 1), (1, 1), (0, 0))),
    "no positions": Case((2, 4), (4, 3), (), ()),
    "depthwise": Case((2, 5, 6, 4), (3, 3, 1, 4), (1, 2), SAME, groups=4),
    "depthwise, multiplied": Case((1, 5, 5, 3), (3, 2, 1, 6), (2, 1), SAME, (1, 1), (2, 1), 3),
    "depthwise, dilated image": Case((1, 5, 3), (3, 1, 3), (1,), ((2, 1),), (2,), (1,), 3),
    "depthwise, many taps": Case((1, 140, 2), (131, 1, 4), (1,), ((5, 5),), groups=2),
    "groups": Case((2, 5, 5, 6), (3, 3, 2, 9), (1, 1), SAME, groups=3),
    "groups, long": Case((1, 3, 3, 240), (3, 3, 120, 4), (1, 1), SAME, groups=2),
    "first": Case((2, 5, 6, 3), (3, 3, 3, 4), (1, 2), SAME, layout="first"),
    "first, groups": Case((2, 5, 6, 4), (3, 3, 2, 4), (1, 1), SAME, groups=2, layout="first"),
    "odd": Case((2, 5, 6, 3), (3, 2, 3, 4), (1, 1), SAME, layout="odd"),
    "window outside": Case((2, 2, 2, 3), (3, 3, 3, 4), (1, 1), NONE),
    "no images": Case((0, 4, 4, 3), (3, 3, 3, 4), (1, 1), NONE),
}


class Layout(NamedTuple):
    """Where the axes of (batch, *positions, channels) and (*window, inputs, outputs) go."""

    image: tuple[int, ...]
    kernel: tuple[int, ...]
    result: tuple[int, ...]


def layout_of(case):
    n = len(case.strides)
    last = Layout(tuple(range(n + 2)), tuple(range(n + 2)), tuple(range(n + 2)))
    if case.layout == "first":  # NCHW, OIHW
        image = (0, n + 1, *range(1, n + 1))
        return Layout(image, (n + 1, n, *range(n)), image)
    if case.layout == "odd":  # HNWC, OHIW, CWHN
        return Layout((1, 0, 2, 3), (3, 0, 2, 1), (3, 2, 1, 0))
    return last


def numbers_of(case):
    """The dimension numbers: (batch, channels, *positions) by the axes that hold them."""
    n, layout = len(case.strides), layout_of(case)
    image, kernel, result = (
        [order.index(a) for a in range(n + 2)]
        for order in (layout.image, layout.kernel, layout.result)
    )
    return lax.ConvDimensionNumbers(
        (image[0], image[-1], *image[1:-1]),
        (kernel[-1], kernel[-2], *kernel[:-2]),
        (result[0], result[-1], *result[1:-1]),
    )


def params_of(case):
    window = case.window
    return {
        "window_strides": window.strides,
        "padding": window.padding,
        "lhs_dilation": window.lhs_dilation,
        "rhs_dilation": window.rhs_dilation,
        "dimension_numbers": numbers_of(case),
        "feature_group_count": case.groups,
        "batch_group_count": 1,
    }


def axes_of(case):
    """(the axes that are summed over, where the channels are)."""
    outputs, inputs, *window = numbers_of(case).rhs_spec
    summed = tuple(sorted((inputs, *window)))
    if case.groups == case.x[-1] == case.kernel[-1]:
        return summed, Channels((outputs,))
    return summed, Channels((inputs,), case.groups, outputs)


def reference(case, x, kernel):
    window = case.window
    return oracle.convolve(
        x,
        kernel,
        window.strides,
        window.padding,
        window.lhs_dilation,
        window.rhs_dilation,
        case.groups,
    )


def integers(case, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.integers(-127, 128, shape) for shape in (case.x, case.kernel))


@pytest.mark.slow
def test_sums_are_those_of_int64_bit_for_bit():
    operands, expected = {}, {}
    for name, case in CASES.items():
        x, kernel = integers(case)
        outputs_first = np.moveaxis(kernel, -1, 0)
        operands[name] = jnp.asarray(x, jnp.int8), jnp.asarray(outputs_first, jnp.int8)
        expected[name] = reference(case, x, kernel)
    every = jax.jit(
        lambda operands: {name: convolve(*xs, CASES[name].window) for name, xs in operands.items()}
    )
    for name, got in every(operands).items():
        assert got.dtype == jnp.int32, name
        np.testing.assert_array_equal(got, expected[name], err_msg=name)


@pytest.mark.slow
def test_the_largest_sums_are_exact():
    """The most products that go through float32, all of the largest size; and one more."""
    window = Window((1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1))
    for count in (EXACT_IN_FLOAT32 // 2 * 2, EXACT_IN_FLOAT32 // 2 * 2 + 2):
        x = np.full((1, 2, 2, count // 2), 127)
        x[..., -1, :, -1] = 126  # an odd sum: float32 has none of these beyond 2^24
        kernel = np.full((1, 2, 1, count // 2), 127)
        got = convolve(jnp.asarray(x, jnp.int8), jnp.asarray(kernel, jnp.int8), window)
        expected = (x[:, :-1] + x[:, 1:]).sum(-1) * 127
        np.testing.assert_array_equal(got[..., 0], expected)


def normal_operands(case, seed=1):
    """Images and channels of very different sizes, so that every granularity differs."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=case.x) * 4.0 ** rng.integers(-2, 3, (case.x[0], *[1] * (len(case.x) - 1)))
    kernel = rng.normal(size=case.kernel) * 4.0 ** rng.integers(-2, 3, case.kernel[-1])
    kernel = numpy_int8.away_from_ties(kernel, tuple(range(kernel.ndim - 1)))
    return x, kernel


IMAGES = {"per_token": PerToken(), "per_tensor": PerTensor(), "static": Static()}
AS_USERS = ["patches", "depthwise, multiplied", "first, groups", "odd"]


@pytest.mark.slow
def test_quantized_convolutions_are_those_of_numpy():
    """Per image, per tensor and static: (q_x * q_w) scale_x scale_w, in the caller's layout."""
    programs, expected = {}, {}
    for name in AS_USERS:
        case, layout = CASES[name], layout_of(CASES[name])
        x, kernel = normal_operands(case)
        for kind, activation in IMAGES.items():
            shared = tuple(range(1, x.ndim)) if kind == "per_token" else None
            image = numpy_int8.away_from_ties(x, shared)
            sx, sw = (
                numpy_int8.scale_of(image, shared),
                numpy_int8.scale_of(kernel, tuple(range(kernel.ndim - 1))),
            )
            sums = reference(case, numpy_int8.rounded(image, sx), numpy_int8.rounded(kernel, sw))
            result = sums.astype(np.float32) * sx * sw.reshape(-1)
            expected[name, kind] = result.transpose(layout.result)
            weight = quantize_kernel(
                jnp.asarray(kernel.transpose(layout.kernel), jnp.float32),
                *axes_of(case),
                Scheme(activation=activation),
                absmax=jnp.asarray(np.abs(image).max(tuple(range(image.ndim - 1)))),
            )
            programs[name, kind] = jnp.asarray(image.transpose(layout.image)), weight

    @jax.jit
    def every(operands):
        return [
            quantized_convolution(x, weight, params_of(CASES[name]), name)
            for (name, _), (x, weight) in zip(programs, operands, strict=True)
        ]

    for key, got in zip(programs, every([*programs.values()]), strict=True):
        np.testing.assert_allclose(got, expected[key], rtol=1e-6, err_msg=str(key))


SCHEMES = {
    "weight-only": Scheme(activation=None),
    "weight-only, groups": Scheme(weight=Int4(group_size=2), activation=None),
    "zero points": Scheme(weight=Int4(zero_point=True), activation=None),
    "per tensor": Scheme(weight=Int8(per_tensor=True), activation=None),
    "groups": Scheme(weight=Int8(group_size=2)),
    "two levels": Scheme(weight=Int4(group_size=2, zero_point=True, two_level=True)),
}


@pytest.mark.slow
def test_other_weights_are_their_float_kernels():
    """Weight-only is the float convolution with the dequantized kernel; groups and zero points too."""
    case = CASES["1d"]
    x, kernel = (jnp.asarray(a, jnp.float32) for a in normal_operands(case))
    weights = {name: quantize_kernel(kernel, *axes_of(case), s) for name, s in SCHEMES.items()}
    run = jax.jit(
        lambda ws: {k: quantized_convolution(x, w, params_of(case), k) for k, w in ws.items()}
    )
    for name, got in run(weights).items():
        image = np.asarray(x, np.float64)
        if weights[name].activations is not None:
            scale = numpy_int8.scale_of(x, (1, 2))
            image = numpy_int8.rounded(x, scale) * np.float64(scale)
        expected = reference(case, image, np.asarray(dequantize(weights[name].tensor), np.float64))
        size = np.abs(expected).max()
        np.testing.assert_allclose(got / size, expected / size, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", ["groups", "depthwise, multiplied"])
@pytest.mark.slow
def test_smoothing_at_run_time_divides_the_image(name):
    """(X / s) (s W), with s of every channel of the image, also where channels are in groups."""
    case = CASES[name]
    x, kernel = normal_operands(case)
    s = 2.0 ** np.arange(case.x[-1]) / 4
    each = case.kernel[-1] // case.groups
    by_output = np.repeat(s.reshape(case.groups, 1, -1), each, axis=1).reshape(case.kernel[-1], -1)
    smoothed = jnp.asarray(kernel * by_output.T, jnp.float32)
    x, kernel, s = (jnp.asarray(a, jnp.float32) for a in (x, kernel, s))
    scheme, params = Scheme(), params_of(case)
    at_run_time = quantize_kernel(kernel, *axes_of(case), scheme, smoothing=s)
    before = quantize_kernel(smoothed, *axes_of(case), scheme)
    got = quantized_convolution(x, at_run_time, params, "w")
    expected = quantized_convolution(x / s.reshape(1, 1, 1, -1), before, params, "w")
    np.testing.assert_array_equal(got, expected)


def test_channel_maxima_follow_the_groups():
    kernel = np.arange(1.0, 13).reshape(1, 2, 6) * [1, -1, 1, 1, 1, 1]
    found = channel_absmax(jnp.asarray(kernel, jnp.float32), Channels((1,), 2, 2))
    # Outputs 0, 1, 2 read the channels 0 and 1, outputs 3, 4, 5 the channels 2 and 3.
    assert found.tolist() == [3.0, 9.0, 6.0, 12.0]
    depthwise = channel_absmax(jnp.asarray(kernel, jnp.float32), Channels((2,)))
    assert depthwise.tolist() == [7.0, 8.0, 9.0, 10.0, 11.0, 12.0]


def test_the_derivative_is_that_of_the_float_convolution():
    case = CASES["strides"]
    x, kernel = (jnp.asarray(a, jnp.float32) for a in normal_operands(case))
    weight = quantize_kernel(kernel, *axes_of(case), Scheme())
    params = params_of(case)

    ours = jax.jit(jax.grad(lambda x: (quantized_convolution(x, weight, params, "w") * 3).sum()))(x)
    window = case.window

    def float_fn(x):
        wide, layout = dequantize(weight.tensor), ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, wide, window.strides, window.padding, dimension_numbers=layout
        )

    theirs = jax.jit(jax.grad(lambda x: (float_fn(x) * 3).sum()))(x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_what_has_no_quantized_form_is_refused():
    case = CASES["in float32"]
    x, kernel = (jnp.asarray(a, jnp.float32) for a in normal_operands(case))
    axes, params = axes_of(case), params_of(case)
    with pytest.raises(
        ValueError, match=r"outlier channels are for matmuls.*scheme without outliers"
    ):
        quantize_kernel(kernel, *axes, Scheme(outliers=6.0))
    weight = quantize_kernel(kernel, *axes, Scheme())
    with pytest.raises(
        ValueError, match="w: a convolution with batch_group_count=2 has no quantized"
    ):
        quantized_convolution(x, weight, {**params, "batch_group_count": 2}, "w")
    other = quantize_kernel(kernel, (0, 1, 3), Channels((3,)), Scheme())
    with pytest.raises(ValueError, match="w: a convolution with the output axis 3, but its scales"):
        quantized_convolution(x, other, params, "w")
