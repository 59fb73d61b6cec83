"""A quantized weight matrix, as products take it."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped


class Matrix(NamedTuple):
    """A weight matrix: the float one is codes * scale, outputs first.

    It is what products take. `sqjax.weights.qtensor.QTensor`, which users hold, is the same numbers
    with logical axes; `sqjax.weights.dot_general.matrices` makes one of the other.

    Attributes:
        codes: (outputs, inner), int8, int4 or float8: what a product multiplies.
        zero, group_scale: (outputs, groups) int8, or None: codes are (codes - zero) * group_scale.
        scale: (outputs, groups) float32; one group, unless the recipe has a group size.
        input_scale: () float32 of static activations, or None.
    """

    codes: Shaped[Array, "outputs inner"]
    zero: Int[Array, "outputs groups"] | None
    group_scale: Int[Array, "outputs groups"] | None
    scale: Float[Array, "outputs groups"]
    input_scale: Float[Array, ""] | None

    def integers(self, group: int | None) -> Array:
        """The codes with zero points and integer scales applied: int8, or float8."""
        length = self.codes.shape[1]
        whole_groups = (
            group is not None and length > group and length % group == 0
        )
        # Groups become an axis before all else: spread scales would divide by the group size in the
        # compiled loop over channels.
        by_group = whole_groups and self.zero is not None
        q = (
            self.codes.reshape(self.codes.shape[0], -1, group)
            if by_group
            else self.codes
        )

        def of_channels(scales: Array) -> Array:
            return (
                scales[:, :, None]
                if by_group
                else _spread(scales, group, length)
            )

        if self.zero is not None:
            q = q.astype(jnp.int8) - of_channels(self.zero)
        if self.group_scale is not None:
            q = q.astype(jnp.int8) * of_channels(self.group_scale)
        return q.reshape(self.codes.shape)

    def columns(self, number: Any, first: Any, length: int) -> "Matrix":
        """One group as a matrix: its number, its first channel, its length."""

        def part(x: Any, start: Any, size: int) -> Any:
            return (
                None
                if x is None
                else lax.dynamic_slice_in_dim(x, start, size, 1)
            )

        return Matrix(
            codes=part(self.codes, first, length),
            zero=part(self.zero, number, 1),
            group_scale=part(self.group_scale, number, 1),
            scale=part(self.scale, number, 1),
            input_scale=self.input_scale,
        )

    def dequantized(self, group: int | None) -> Float[Array, "outputs inner"]:
        """The float32 matrix."""
        scale = _spread(self.scale, group, self.codes.shape[1])
        return self.integers(group).astype(jnp.float32) * scale


def _spread(x: Array, group: int | None, length: int) -> Array:
    """Scales of groups, repeated for every channel: (7, 3) in groups of 4 becomes (7, 10).

    For whole groups this is a broadcast, which compilers fuse into what reads it.
    """
    if group is None or x.shape[1] == 1:
        return x
    return jnp.repeat(x, group, axis=1)[:, :length]
