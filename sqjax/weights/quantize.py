"""One leaf quantized: codes, scales, outlier channels, smoothing at run time."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sqjax._trees import is_concrete
from sqjax.numerics.formats import scale_from_absmax
from sqjax.numerics.weight_products import Activations
from sqjax.weights.qtensor import QTensor
from sqjax.weights.quant_weight import Outliers, QuantWeight
from sqjax.weights.schemes import Int4, PerTensor, PerToken, Scheme, Static

#: What a `QuantWeight` calls each kind of activation; it has None for activations that stay float, and for indices.
ACTIVATIONS: dict[type, Activations] = {
    PerToken: "per_token",
    PerTensor: "per_tensor",
    Static: "static",
}


@contextlib.contextmanager
def named(path: str) -> Iterator[None]:
    """Names the leaf in the ValueErrors that are raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def outlier_channels(
    path: str, absmax: Float[Array, "..."], threshold: float, batch: int
) -> Int[Array, "..."] | None:
    """The channels, along the flattened contracted axes, whose activations exceeded a threshold; None if none did.

    Every matrix of a stack gets as many as the one that has most: its largest ones.

    Raises:
        ValueError: under jit, where how many there are can not be known.
    """
    if not is_concrete(absmax):
        raise ValueError(
            f"{path}: how many channels exceed {threshold} must be known: quantize outliers outside jit"
        )
    flat = np.asarray(absmax).reshape(*absmax.shape[:batch], -1)
    count = int((flat > threshold).sum(-1).max(initial=0))
    largest = np.argsort(-flat, axis=-1, kind="stable")[..., :count]
    return jnp.asarray(np.sort(largest, axis=-1), jnp.int32) if count else None


@partial(jax.jit, static_argnames=("contracting", "scheme", "batch"))
def quantize_weight(
    weight: Array,
    contracting: tuple[int, ...],
    scheme: Scheme,
    absmax: Array | None = None,
    smoothing: Array | None = None,
    batch: tuple[int, ...] = (),
    outliers: Array | None = None,
) -> QuantWeight:
    """One weight, quantized along its axes `contracting`.

    Args:
        weight: float, for example a Dense kernel (in, out) with contracting=(0,).
        contracting: the axes that the matmul sums over.
        scheme: how.
        absmax: max |X_j| of the activation it meets, of the shape of the batch axes and then any other (there its
            largest value counts; with outliers: the contracted axes): for static schemes.
        smoothing: s of the shape of the batch axes, then of the contracted axes, for smoothing at run time; `weight`
            is then multiplied by s here, and `absmax`, of the same shape, is that of X before the division by s.
        batch: axes that hold one matrix each (stacked layers, experts): each is quantized on its own.
        outliers: (batch, n) channels that are multiplied in float: positions along the flattened contracted axes.
    """
    dtype, contracting = weight.dtype, tuple(sorted(a % weight.ndim for a in contracting))
    if smoothing is not None:
        s = smoothing.astype(jnp.float32)
        weight = weight.astype(jnp.float32) * _spread(s, (*batch, *contracting), weight.ndim)
    apart = None
    if outliers is not None:
        apart, weight, normal = _split(weight, contracting, batch, outliers, dtype)
        absmax = None if absmax is None else absmax * normal.reshape(absmax.shape)
    input_scale = None
    if isinstance(scheme.activation, Static):
        if absmax is None:
            raise ValueError(
                "a static scheme needs the activation's absmax from calibration; dynamic ones do not"
            )
        absmax = absmax if smoothing is None else absmax / smoothing
        largest = jnp.max(absmax, axis=tuple(range(len(batch), absmax.ndim)))
        # An expert that calibration never reached takes the largest range of the others.
        largest = jnp.where(largest > 0, largest, jnp.max(largest))
        input_scale = scale_from_absmax(largest, scheme.activation.fmt)
    activation = scheme.activation
    return QuantWeight(
        replace(_tensor(weight, contracting, scheme, batch), dtype=dtype),
        input_scale,
        smoothing,
        ACTIVATIONS.get(type(activation)),
        len(contracting),
        activation.format if isinstance(activation, PerToken | PerTensor | Static) else "int8",
        apart,
    )


def _tensor(
    weight: Array, contracting: tuple[int, ...], scheme: Scheme, batch: tuple[int, ...]
) -> QTensor:
    """The weight in the format and with the scales that the scheme's `weight` says."""
    how = scheme.weight
    if isinstance(how, Int4) and how.two_level:
        assert how.group_size is not None  # `Int4` has checked it
        return QTensor.quantize_twice(weight, contracting, how.group_size, batch)
    zero_point = isinstance(how, Int4) and how.zero_point
    return QTensor.quantize(weight, contracting, how.granularity, how.fmt, batch, zero_point)


def _split(
    weight: Array, contracting: tuple[int, ...], batch: tuple[int, ...], channels: Array, dtype: Any
) -> tuple[Outliers, Array, Array]:
    """(the weight of some channels, the weight with zeros there, 1 for the other channels and 0 for these)."""
    outer = [a for a in range(weight.ndim) if a not in (*batch, *contracting)]
    moved = weight.transpose(*batch, *outer, *contracting)
    flat = moved.reshape(*moved.shape[: weight.ndim - len(contracting)], -1)
    index = jnp.expand_dims(channels, tuple(range(len(batch), len(batch) + len(outer))))
    apart = jnp.take_along_axis(
        flat, jnp.broadcast_to(index, (*flat.shape[:-1], channels.shape[-1])), axis=-1
    )
    normal = 1 - jnp.max(jax.nn.one_hot(channels, flat.shape[-1], dtype=jnp.float32), axis=-2)
    shape = [weight.shape[a] for a in (*batch, *contracting)]
    kept = _spread(normal.reshape(shape), (*batch, *contracting), weight.ndim).astype(weight.dtype)
    return Outliers(channels, apart.astype(dtype)), weight * kept, normal


def _spread(x: Array, axes: tuple[int, ...], ndim: int) -> Array:
    """x with its axis i at `axes[i]` of an array of rank `ndim`."""
    return jnp.moveaxis(x.reshape(x.shape + (1,) * (ndim - x.ndim)), range(x.ndim), axes)
