"""Symmetric int8 quantization written once more, in numpy with int64 sums: the reference of the numeric tests."""

import numpy as np


def scale_of(x, axis=None):
    """absmax / 127 along `axis`, in float32, with that axis kept; 1 where that is zero."""
    scale = np.max(np.abs(np.asarray(x, np.float32)), axis=axis, keepdims=True) / np.float32(127)
    return np.where(scale == 0, np.float32(1), scale)


def rounded(x, scale):
    """int64 in [-127, 127]."""
    return np.clip(np.rint(np.asarray(x, np.float32) / scale), -127, 127).astype(np.int64)


def matmul(x, w, x_axis=1, w_axis=0, x_scale=None):
    """x @ w of matrices on rounded operands. An axis of None is one scale for the whole array."""
    sx = scale_of(x, x_axis) if x_scale is None else np.float32(x_scale)
    sw = scale_of(w, w_axis)
    return (rounded(x, sx) @ rounded(w, sw)).astype(np.float32) * sx * sw


def away_from_ties(x, axis=None, scale=None):
    """x with the elements that are nearly halfway between two integers times the scale moved onto one.

    XLA multiplies by a reciprocal where numpy divides: within a few units in the last place of a tie the two may round
    apart. Elsewhere the integers must be equal.
    """
    x = np.array(x, np.float32)
    scale = scale_of(x, axis) if scale is None else np.float32(scale)
    steps = x / scale
    near = np.abs(np.abs(steps - np.floor(steps)) - 0.5) < 0.01
    return np.where(near, np.rint(steps) * scale, x).astype(np.float32)
