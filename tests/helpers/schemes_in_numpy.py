"""Every scheme's matmul once more, in numpy: integers and their sums in int64, scales and scaling in float64.

Written from the formulas of the docstrings and papers. Weights are (outputs, inner) here, as they are stored, and
scales are spread to one for every element.
"""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import sqjax as sq

BOUNDS = {"int8": 127.0, "int4": 7.0, "e4m3": 448.0, "e5m2": 57344.0}
FLOAT8: dict[str, Any] = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
#: (bits of mantissa, smallest exponent of a normal number).
FLOAT8_STEPS = {"e4m3": (3, -6), "e5m2": (2, -14)}
#: QServe's protective range: int8 codes of the first level.
FIRST_LEVEL = 119.0


class Narrow(NamedTuple):
    """A quantized matrix: (values - zero) * step * scale, each part (rows, columns), and the number of each group."""

    values: np.ndarray
    zero: np.ndarray
    step: np.ndarray
    scale: np.ndarray
    group: np.ndarray

    @property
    def codes(self):
        return (self.values - self.zero) * self.step

    @property
    def floats(self):
        return self.codes * self.scale


def rounded(r, fmt):
    """r at a format's precision, clipped at its bound first: int64, or float64 for a float8."""
    bound = BOUNDS[fmt]
    if fmt in FLOAT8:
        return np.clip(r, -bound, bound).astype(FLOAT8[fmt]).astype(np.float64)
    return np.clip(np.rint(r), -bound, bound).astype(np.int64)


def groups_of(granularity, inner):
    """The group of every channel."""
    return np.arange(inner) // granularity if isinstance(granularity, int) else np.zeros(inner, int)


def extremes(w, granularity):
    """(least, largest) of what shares a scale, spread over the elements of w."""
    low, high = np.empty_like(w), np.empty_like(w)
    group = groups_of(granularity, w.shape[1])
    for g in range(group[-1] + 1):
        part = w[:, group == g]
        axis = None if granularity == "per_tensor" else 1
        low[:, group == g] = part.min(axis=axis, keepdims=True)
        high[:, group == g] = part.max(axis=axis, keepdims=True)
    return low, high


def symmetric(w, granularity, fmt, bound=None):
    """values = round(w / scale), scale = absmax / bound, 1 where all is 0."""
    w = np.asarray(w, np.float64)
    low, high = extremes(w, granularity)
    scale = np.maximum(-low, high) / (BOUNDS[fmt] if bound is None else bound)
    scale = np.where(scale == 0, 1.0, scale)
    no, one = np.zeros(w.shape, np.int64), np.ones(w.shape, np.int64)
    return Narrow(rounded(w / scale, fmt), no, one, scale, groups_of(granularity, w.shape[1]))


def with_zero_point(w, granularity):
    """int4: [min, max] made to hold 0, scale = (max - min) / 15, zero = round(-min / scale) - 8."""
    w = np.asarray(w, np.float64)
    low, high = extremes(w, granularity)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = np.where(high == low, 1.0, (high - low) / 15)
    zero = (np.rint(-low / scale) - 8).astype(np.int64)
    values = np.clip(np.rint(w / scale) + zero, -8, 7).astype(np.int64)
    return Narrow(
        values, zero, np.ones(w.shape, np.int64), scale, groups_of(granularity, w.shape[1])
    )


def two_level(w, granularity):
    """int8 within 119 per channel; in each group of it int4 with step = max(ceil((max - min) / 15), 1)."""
    first = symmetric(w, "per_channel", "int8", FIRST_LEVEL)
    q = first.values
    low, high = (x.astype(np.int64) for x in extremes(q, granularity))
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    step = np.maximum(-((low - high) // 15), 1)  # ceil, in integers
    zero = -_half_up(low / step) - 8
    values = np.clip(_half_up(q / step) + zero, -8, 7)
    return Narrow(values, zero, step, first.scale, groups_of(granularity, w.shape[1]))


def _half_up(r):
    return np.floor(r + 0.5).astype(np.int64)


def activation_of(name, format="int8"):
    """The activation's class for "per_token", "per_tensor", "static" or None."""
    kinds = {"per_token": sq.PerToken, "per_tensor": sq.PerTensor, "static": sq.Static}
    return None if name is None else kinds[name](format=format)


def with_granularity(weight, granularity):
    """A scheme's weight with the scales of "per_channel", "per_tensor" or a group size."""
    if granularity == "per_tensor":
        return weight.replace(per_tensor=True, group_size=None)
    size = None if granularity == "per_channel" else granularity
    return weight.replace(per_tensor=False, group_size=size)


def has_two_levels(scheme):
    return isinstance(scheme.weight, sq.Int4) and scheme.weight.two_level


def has_zero_point(scheme):
    return isinstance(scheme.weight, sq.Int4) and scheme.weight.zero_point


def quantize(w, scheme):
    """The weight (outputs, inner) by a `Scheme`."""
    granularity = scheme.weight.granularity
    if has_two_levels(scheme):
        return two_level(w, granularity)
    if has_zero_point(scheme):
        return with_zero_point(w, granularity)
    return symmetric(w, granularity, scheme.weight.fmt.name)


def quantize_activations(x, scheme, absmax=None):
    """The activation (rows, inner): a scale a row, or one; `absmax` gives the static one.

    With a zero point its codes are those of a weight's rows, less the zero point.
    """
    x = np.asarray(x, np.float64)
    if getattr(scheme.activation, "zero_point", False):
        rows = with_zero_point(x, "per_channel")
        return rows.codes, rows.scale[:, :1]
    largest = (
        np.abs(x).max(1, keepdims=True)
        if isinstance(scheme.activation, sq.PerToken)
        else np.abs(x).max()
    )
    if isinstance(scheme.activation, sq.Static) and absmax is not None:
        largest = np.asarray(absmax, np.float64)
    scale = np.broadcast_to(largest / BOUNDS[scheme.activation.fmt.name], (*x.shape[:1], 1))
    scale = np.where(scale == 0, 1.0, scale)
    return rounded(x / scale, scheme.activation.fmt.name), scale


class Result(NamedTuple):
    """A product in float64, and what float32 may round in it: the absolute values of the terms, added up."""

    out: np.ndarray
    magnitude: np.ndarray


def matmul(x, w, scheme, absmax=None):
    """x (rows, inner) times w (outputs, inner) transposed, on the scheme's operands."""
    weight = quantize(w, scheme)
    if scheme.activation is None:
        x, w = np.asarray(x, np.float64), weight.floats
        reach = np.abs(x) + np.abs(x).max(
            1, keepdims=True
        )  # digits leave out parts of the row's absmax
        return Result(x @ w.T, reach @ np.abs(w).T)
    q, scale = quantize_activations(x, scheme, absmax)
    if has_two_levels(scheme):  # one float scale for every output
        return Result(*[sums * scale * weight.scale[:, 0] for sums in _sums(q, weight.codes)])
    terms = [_sums(q[:, own], weight.codes[:, own]) for own in _each(weight.group)]
    scales = [scale * weight.scale[:, own][:, 0] for own in _each(weight.group)]
    parts = [[t[i] * s for t, s in zip(terms, scales, strict=True)] for i in range(2)]
    return Result(sum(parts[0]), sum(parts[1]))


def with_outliers(x, w, scheme, channels, absmax=None):
    """LLM.int8(): these channels in float, the others (with zeros there) on the scheme's operands."""
    normal = np.ones(x.shape[1], bool)
    normal[channels] = False
    rest = matmul(np.where(normal, x, 0), np.where(normal, w, 0), scheme, absmax)
    large, weight = np.asarray(x, np.float64)[:, ~normal], np.asarray(w, np.float64)[:, ~normal]
    return Result(rest.out + large @ weight.T, rest.magnitude + np.abs(large) @ np.abs(weight).T)


def _each(group):
    return [group == g for g in range(group[-1] + 1)]


def _sums(q, codes):
    """(the sums, the sums of absolute values where a float32 sum rounds: integers do not)."""
    sums = q @ codes.T
    return sums, np.abs(sums) if sums.dtype == np.int64 else np.abs(q) @ np.abs(codes).T


# Bounds from theory -----------------------------------------------------------------------------------------------


def weight_error(w, scheme):
    """How far each element of the dequantized weight may be from w."""
    narrow = quantize(w, scheme)
    if has_two_levels(scheme):
        return narrow.scale * (narrow.step + 1) / 2
    return _rounding_error(w, narrow.scale, scheme.weight.fmt.name)


def activation_error(x, scheme, absmax=None):
    """How far each element of the dequantized activation may be from x (none is beyond the range)."""
    if scheme.activation is None:
        return np.abs(x).max(1, keepdims=True) * 2.0**-23 + np.zeros(x.shape)
    return _rounding_error(
        x, quantize_activations(x, scheme, absmax)[1], scheme.activation.fmt.name
    )


def error_bound(x, w, scheme, absmax=None):
    """|quantized product - x w^T| <= |x| dw + dx (|w| + dw), elementwise."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    dx, dw = activation_error(x, scheme, absmax), weight_error(w, scheme)
    return np.abs(x) @ dw.T + dx @ (np.abs(w) + dw).T


def _rounding_error(x, scale, fmt):
    if fmt not in FLOAT8:
        return np.broadcast_to(scale / 2, np.shape(x))
    mantissa, smallest = FLOAT8_STEPS[fmt]
    return np.maximum(np.abs(x) * 2.0 ** -(mantissa + 1), scale * 2.0 ** (smallest - mantissa - 1))


# Ties -------------------------------------------------------------------------------------------------------------


def settled(x, w, activations, weights):
    """(x, w) with zeros in place of what is nearly halfway between two codes, in any of these schemes.

    There a scale that is one unit in the last place off rounds apart; elsewhere all integers must be equal.
    """
    x, w = np.array(x), np.array(w)
    for array, near, schemes in ((x, _near_in_x, activations), (w, _near_in_w, weights)):
        while True:
            ties = np.any([near(array.astype(np.float64), scheme) for scheme in schemes], axis=0)
            if not ties.any():
                break
            array[ties] = 0
    return x, w


def _near(r, fmt):
    return rounded(r * (1 + 1e-5), fmt) != rounded(r * (1 - 1e-5), fmt)


def _near_in_x(x, scheme):
    return _near(x / quantize_activations(x, scheme)[1], scheme.activation.fmt.name)


def _near_in_w(w, scheme):
    if has_two_levels(scheme):
        return _near(w / two_level(w, scheme.weight.granularity).scale, "int8")
    ties = _near(
        w / quantize(w, scheme).scale, "int8" if has_zero_point(scheme) else scheme.weight.fmt.name
    )
    if has_zero_point(scheme):
        low, _ = extremes(w, scheme.weight.granularity)
        ties |= (w == low) & _near(np.minimum(low, 0) / quantize(w, scheme).scale, "int8")
    return ties
