"""One leaf quantized: codes, scales, outlier channels, smoothing and rotation at run time."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int

from sqjax._shapes import from_front, other_axes, sizes_along
from sqjax._trees import is_concrete
from sqjax.numerics.formats import Format, scale_from_absmax, to_format
from sqjax.numerics.hadamard import rotated
from sqjax.numerics.smoothing import believable, smoothing_scales
from sqjax.numerics.weight_products import Activations
from sqjax.weights.clipping import clip_weight
from sqjax.weights.layout import lay_out
from sqjax.weights.qtensor import QTensor
from sqjax.weights.quant_weight import Outliers, QuantWeight
from sqjax.weights.schemes import (
    Float8,
    Int4,
    PerTensor,
    PerToken,
    Rotation,
    Scheme,
    Static,
)
from sqjax.weights.sharding import explicit_shardings

#: What a `QuantWeight` calls each kind of activation; see `_kind_of`.
_KINDS: dict[type, Activations] = {
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
    """The channels whose activations exceeded a threshold; None if none did.

    They are positions along the flattened contracted axes, ascending. Every matrix of a stack gets
    as many as the one that has most: its largest ones.

    Raises:
        ValueError: under jit, where how many there are can not be known.
    """
    if not is_concrete(absmax):
        raise ValueError(
            f"{path}: how many channels exceed {threshold} must be known: quantize outliers "
            "outside jit"
        )
    flat = np.asarray(absmax).reshape(*absmax.shape[:batch], -1)
    count = int((flat > threshold).sum(-1).max(initial=0))
    if not count:
        return None
    # An array has one size, so every matrix takes as many as the one that has most.
    largest = np.argsort(-flat, axis=-1, kind="stable")[..., :count]
    return jnp.asarray(np.sort(largest, axis=-1), jnp.int32)


class Beside(NamedTuple):
    """What a scheme stores beside a weight because of the activations that were measured.

    Attributes:
        smoothing: s for smoothing at run time, or None.
        outliers: the outlier channels, or None.
    """

    smoothing: Array | None
    outliers: Array | None


def measured(
    path: str,
    weight: Array,
    axes: tuple[int, ...],
    scheme: Scheme,
    absmax: Any,
    batch: int,
    smoothing: Array | None = None,
) -> Beside:
    """What `quantize_weight` takes as smoothing and outliers, from the activations' absmax.

    Args:
        path: the leaf's name in errors.
        weight: float.
        axes: its batch axes, then its contracted ones: those of `absmax`.
        scheme: what is asked for.
        absmax: max |X_j|; None will do for a scheme that is not `measured`.
        batch: how many batch axes.
        smoothing: s from elsewhere, if the scheme has no alpha.

    Raises:
        ValueError: outliers are asked for under jit; names the leaf.
    """
    if scheme.smoothing is not None:
        magnitudes = jnp.moveaxis(jnp.abs(weight), axes, range(len(axes)))
        outputs = tuple(range(len(axes), weight.ndim))
        in_float32 = magnitudes.astype(jnp.float32)
        largest = jnp.max(in_float32, axis=outputs, initial=0)
        seen = believable(absmax, batch)
        smoothing = smoothing_scales(seen, largest, scheme.smoothing)
    if scheme.outliers is None:
        return Beside(smoothing, None)
    # The quantizer sees X / s, so outliers are what is large after smoothing.
    seen = absmax if smoothing is None else absmax / smoothing
    channels = outlier_channels(path, seen, scheme.outliers, batch)
    return Beside(smoothing, channels)


def quantize_weight(
    weight: Array,
    contracting: tuple[int, ...],
    scheme: Scheme,
    absmax: Array | None = None,
    smoothing: Array | None = None,
    batch: tuple[int, ...] = (),
    outliers: Array | None = None,
    clip: Array | None = None,
) -> QuantWeight:
    """One weight, quantized along its axes `contracting`.

    Args:
        weight: float, for example a Dense kernel (in, out) with contracting=(0,).
        contracting: the axes that the matmul sums over.
        scheme: how.
        absmax: max |X_j| of the activation it meets, of the shape of the batch axes and then any
            other (there its largest value counts; with outliers: the contracted axes): for static
            schemes. Of a rotated weight it is that of (X / s) Q.
        smoothing: s of the shape of the batch axes, then of the contracted axes, for smoothing at
            run time; `weight` is then multiplied by s here, and `absmax`, of the same shape, is
            that of X before the division by s.
        batch: axes that hold one matrix each (stacked layers, experts): each is quantized on its
            own.
        outliers: (batch, n) channels that are multiplied in float: positions along the flattened
            contracted axes.
        clip: factors of the ranges (`sqjax.weights.clipping.clip_weight`), or None.
    """
    run = partial(
        _quantize_weight, contracting=contracting, scheme=scheme, batch=batch
    )
    arrays = weight, absmax, smoothing, outliers, clip
    sharding: Any = jax.typeof(weight).sharding
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    if not explicit or not any(sharding.spec):
        return run(*arrays)
    # Types say there how arrays are sharded, and few steps in groups can say it of their results.
    made = jax.eval_shape(run, *jax.tree.map(_without_sharding, arrays))
    return jax.sharding.auto_axes(
        run, out_sharding=explicit_shardings(made, sharding)
    )(*arrays)


def _without_sharding(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


@partial(jax.jit, static_argnames=("contracting", "scheme", "batch"))
def _quantize_weight(
    weight: Array,
    absmax: Array | None,
    smoothing: Array | None,
    outliers: Array | None,
    clip: Array | None,
    *,
    contracting: tuple[int, ...],
    scheme: Scheme,
    batch: tuple[int, ...],
) -> QuantWeight:
    """`quantize_weight` where arrays may be sharded as the compiler likes."""
    dtype = weight.dtype
    contracting = tuple(sorted(from_front(contracting, weight.ndim)))
    if smoothing is not None:
        s = smoothing.astype(jnp.float32)
        weight = weight.astype(jnp.float32) * _spread(
            s, (*batch, *contracting), weight.ndim
        )
    rotation = None
    if scheme.rotation is not None:
        channels = math.prod(sizes_along(weight.shape, contracting))
        rotation = block_of(scheme.rotation, channels)
        weight = rotated_weight(weight, contracting, rotation)
    in_float = None
    if outliers is not None:
        split = _split(weight, contracting, batch, outliers, dtype)
        in_float, weight = split.outliers, split.others
        if absmax is not None:
            absmax = absmax * split.is_other.reshape(absmax.shape)
    if clip is not None:
        weight = clip_weight(weight, contracting, scheme, batch, clip)
    input_scale = None
    if isinstance(scheme.activation, Static):
        if absmax is None:
            raise ValueError(
                "a static scheme needs the activation's absmax from calibration; dynamic ones do "
                "not"
            )
        if smoothing is not None and rotation is None:
            absmax = absmax / smoothing
        input_scale = _input_scale(absmax, len(batch), scheme.activation.fmt)
    activation = scheme.activation
    return QuantWeight(
        replace(_tensor(weight, contracting, scheme, batch), dtype=dtype),
        input_scale,
        smoothing,
        _kind_of(activation),
        len(contracting),
        activation.format
        if isinstance(activation, PerToken | PerTensor | Static)
        else "int8",
        in_float,
        rotation,
    )


def _kind_of(activation: Any) -> Activations | None:
    """What a `QuantWeight` calls a scheme's activation; None for floats and for indices."""
    if isinstance(activation, PerToken) and activation.zero_point:
        return "per_token_zero_point"
    return _KINDS.get(type(activation))


def block_of(rotation: Rotation, channels: int) -> int:
    """The channels of a rotation's block: of a whole weight, "hadamard", all of them.

    Raises:
        ValueError: the block does not divide the channels.
    """
    if rotation == "hadamard":
        return max(channels, 1)
    if channels % rotation:
        raise ValueError(
            f"rotation: expected blocks that divide its {channels} contracted channels, got "
            f"{rotation}; take 'hadamard', all channels in one block, or a number that divides them"
        )
    return int(rotation)


def rotated_weight(
    weight: Array, contracting: tuple[int, ...], block: int
) -> Array:
    """Q W, along all contracted channels as one axis: a kernel (4, 64, 8) has 256 of them."""
    last = tuple(range(-len(contracting), 0))
    moved = jnp.moveaxis(weight, contracting, last)
    flat = moved.reshape(*moved.shape[: last[0]], -1)
    return jnp.moveaxis(
        rotated(flat, block).reshape(moved.shape), last, contracting
    )


def _input_scale(
    absmax: Float[Array, "..."], batch: int, fmt: Format
) -> Float[Array, "*batch"]:
    """The static scale of each matrix of a stack, from the channels' absmax.

    An expert that calibration never reached takes the largest range of the others: its own, 0,
    would clip whatever meets it later.
    """
    channels = tuple(range(batch, absmax.ndim))
    largest = jnp.max(absmax, axis=channels, initial=0)
    largest = jnp.where(largest > 0, largest, jnp.max(largest))
    return scale_from_absmax(largest, fmt)


def _tensor(
    weight: Array,
    contracting: tuple[int, ...],
    scheme: Scheme,
    batch: tuple[int, ...],
) -> QTensor:
    """The weight in the format and with the scales that the scheme's `weight` says."""
    how = scheme.weight
    if isinstance(how, Float8) and how.block_size is not None:
        return _in_blocks(weight, contracting, how.block_size, how.fmt, batch)
    if isinstance(how, Int4) and how.two_level:
        assert how.group_size is not None  # `Int4` has checked it
        return QTensor.quantize_twice(
            weight, contracting, how.group_size, batch
        )
    zero_point = isinstance(how, Int4) and how.zero_point
    return QTensor.quantize(
        weight, contracting, how.granularity, how.fmt, batch, zero_point
    )


def _in_blocks(
    weight: Array,
    contracting: tuple[int, ...],
    size: int,
    fmt: Format,
    batch: tuple[int, ...],
) -> QTensor:
    """The weight in groups of `size` channels, whose scales are those of blocks of `size` outputs.

    For a kernel (256, 300) and a size of 128 there are 2 x 3 blocks, the last for 44 outputs. The
    scales are (300, 2), of which the rows 0 to 127 are alike.

    Raises:
        ValueError: the weight is no kernel (in, out), or a stack of these.
    """
    stored, order, sharing = lay_out(weight, contracting, batch, size)
    if len(contracting) != 1 or stored.ndim != len(batch) + 2:
        raise ValueError(
            f"blocks: expected a kernel (in, out), got one of {stored.ndim - len(batch)} axes, of "
            f"which {len(contracting)} are contracted; take group_size in place of block_size"
        )
    largest = sharing.reduced(jnp.abs(stored), jnp.max)
    *stack, outputs, groups = largest.shape
    # Rows of zeros fill the last block up, because they change no maximum.
    missing = [(0, 0)] * len(stack) + [(0, -outputs % size), (0, 0)]
    padded = jnp.pad(largest, missing)
    # (outputs, groups) -> (blocks, size, groups): the scale of a block is that of its largest row.
    by_block = padded.reshape(*stack, -1, size, groups)
    of_blocks = jnp.max(by_block, axis=-2)
    rows = jnp.repeat(of_blocks, size, axis=-2)[..., :outputs, :]
    scale = scale_from_absmax(rows, fmt)
    values = to_format(stored, sharing.spread(scale), fmt)
    return QTensor(
        values, scale, order, weight.dtype, group=sharing.group, fmt=fmt
    )


class _Split(NamedTuple):
    """A weight whose outlier channels are apart; `is_other` is 0 for these and 1 for the others."""

    outliers: Outliers
    others: Array
    is_other: Array


def _split(
    weight: Array,
    contracting: tuple[int, ...],
    batch: tuple[int, ...],
    channels: Array,
    dtype: Any,
) -> _Split:
    """The outlier channels of a weight as they are, and the weight with zeros in their place.

    Of W (in, out) and the channels (1, 4) the outliers' weight is (out, 2), W[[1, 4], :].T.

    Args:
        weight: float.
        contracting: its contracted axes, ascending.
        batch: its batch axes.
        channels: (*batch, n) positions along the flattened contracted axes.
        dtype: of the outliers' weight.
    """
    outer = other_axes(weight.ndim, batch, contracting)
    as_stored = weight.transpose(*batch, *outer, *contracting)
    first = weight.ndim - len(contracting)
    flat = as_stored.reshape(*as_stored.shape[:first], -1)
    # All outputs of a matrix have the same outlier channels, so these get axes for the outputs.
    index = jnp.expand_dims(channels, tuple(range(len(batch), first)))
    index = jnp.broadcast_to(index, (*flat.shape[:-1], channels.shape[-1]))
    in_float = jnp.take_along_axis(flat, index, axis=-1)
    is_outlier = jax.nn.one_hot(channels, flat.shape[-1], dtype=jnp.float32)
    is_other = 1 - jnp.max(is_outlier, axis=-2)
    axes = (*batch, *contracting)
    kept = _spread(
        is_other.reshape(sizes_along(weight.shape, axes)), axes, weight.ndim
    )
    return _Split(
        Outliers(channels, in_float.astype(dtype)),
        weight * kept.astype(weight.dtype),
        is_other,
    )


def _spread(x: Array, axes: tuple[int, ...], ndim: int) -> Array:
    """x in a shape that broadcasts against an array of rank `ndim`, its axis i at `axes[i]`.

    x of shape (in,) with axes=(0,) and ndim=2 becomes (in, 1).
    """
    padded = x.reshape(x.shape + (1,) * (ndim - x.ndim))
    return jnp.moveaxis(padded, range(x.ndim), axes)
