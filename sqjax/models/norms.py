"""The norms of a decoder, computed in float32 whatever the dtype of their input."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sqjax.models.config import Norm


class NormLayer(nn.Module):
    """x divided by its size over the last axes, times a gain: the norm that a `Norm` describes.

    Attributes:
        norm: which one.
        axes: how many last axes the gain has; the sums run over the last one alone. With 2, for
            (heads, channels), every head has a gain of its own.
    """

    norm: Norm
    axes: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
        norm, shape = self.norm, x.shape[-self.axes :]
        initial = (
            nn.initializers.zeros if norm.one_plus else nn.initializers.ones
        )
        weight = self.param("weight", initial, shape)
        # In bfloat16 the mean of many squares would keep 8 bits.
        wide = x.astype(jnp.float32)
        if norm.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + norm.eps)
        gain = weight.astype(jnp.float32)
        if norm.one_plus:
            gain = 1 + gain
        result = normed * _in_front(gain, x.ndim)
        if norm.bias:
            bias = self.param("bias", nn.initializers.zeros, shape)
            result = result + _in_front(bias.astype(jnp.float32), x.ndim)
        return result.astype(x.dtype)


class Gain(nn.Module):
    """x times a gain for each channel."""

    @nn.compact
    def __call__(self, x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
        weight = self.param("weight", nn.initializers.ones, x.shape[-1:])
        return x * _in_front(weight, x.ndim).astype(x.dtype)


def _in_front(array: Array, ndim: int) -> Array:
    """An array with axes of size 1 in front, so that it has so many axes."""
    axes: Sequence[int] = range(ndim - array.ndim)
    return jnp.expand_dims(array, tuple(axes))
