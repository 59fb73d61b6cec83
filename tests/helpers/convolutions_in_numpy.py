"""A convolution written once more in numpy, with loops: the reference of the convolutions' tests."""

import numpy as np


def convolve(x, kernel, strides, padding, lhs_dilation, rhs_dilation, groups=1):
    """x (batch, *positions, channels), kernel (*window, inputs, outputs), both int64 or float64."""
    x = padded(x, padding, lhs_dilation)
    window, (inputs, outputs) = kernel.shape[:-2], kernel.shape[-2:]
    positions = [
        max((size - (taps - 1) * apart - 1) // stride + 1, 0)
        for size, taps, apart, stride in zip(
            x.shape[1:-1], window, rhs_dilation, strides, strict=True
        )
    ]
    y = np.zeros((x.shape[0], *positions, outputs), np.result_type(x, kernel))
    each = outputs // groups
    for place in np.ndindex(*positions):
        for tap in np.ndindex(*window):
            at = tuple(np.multiply(place, strides) + np.multiply(tap, rhs_dilation))
            pixel = x[(slice(None), *at)]
            for group in range(groups):
                own = pixel[:, group * inputs : (group + 1) * inputs]
                out = slice(group * each, (group + 1) * each)
                y[(slice(None), *place, out)] += own @ kernel[tap][:, out]
    return y


def padded(x, padding, lhs_dilation):
    """Zeros between the pixels, then around them; a negative width takes pixels off."""
    for axis, ((before, after), apart) in enumerate(zip(padding, lhs_dilation, strict=True), 1):
        shape = list(x.shape)
        shape[axis] = (shape[axis] - 1) * apart + 1
        wide = np.zeros(shape, x.dtype)
        np.moveaxis(wide, axis, 0)[::apart] = np.moveaxis(x, axis, 0)
        widths = [(0, 0)] * x.ndim
        widths[axis] = (max(before, 0), max(after, 0))
        wide = np.pad(wide, widths)
        kept = slice(max(-before, 0), wide.shape[axis] - max(-after, 0))
        x = np.moveaxis(np.moveaxis(wide, axis, 0)[kept], 0, axis)
    return x
