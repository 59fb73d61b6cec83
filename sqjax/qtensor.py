"""`QTensor`: integer values and float scales that stand for a float array."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sqjax.formats import INT8, Format, Granularity, scale_from_absmax, to_format
from sqjax.views import runs


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QTensor:
    """A quantized array: `values * scale`, seen under the logical shape and dtype of the float array it replaces.

    Invariants (`check` holds them):

    - `values` is stored with the contracted axes last: a Dense kernel of logical shape (in, out) is stored
      (out, in), which is what int8 matrix units read without a transpose.
    - `scale` is float32, has the rank of `values`, and broadcasts against it.
    - `order` gives the stored axis, counted from the end, of each of the last `len(order)` logical axes; the axes
      before those are stored in place. So leading axes (layers stacked for a scan) may come and go.
    - `dtype` is the logical dtype: what `dequantize` returns and a matmul's result is cast to.

    Example:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> w = sq.QTensor.quantize(jnp.array([[1.0, -2.0], [0.5, 4.0]]), contracting=(0,))
        >>> w.shape, w.values.dtype.name
        ((2, 2), 'int8')
    """

    values: Any  # an int8 Array; a ShapeDtypeStruct, a sharding, ... where jax maps over the tree
    scale: Any
    order: tuple[int, ...] = field(metadata={"static": True})
    dtype: np.dtype = field(metadata={"static": True})

    @classmethod
    def quantize(
        cls,
        x: Float[Array, "..."],
        contracting: tuple[int, ...],
        granularity: Granularity = "per_channel",
        fmt: Format = INT8,
        batch: tuple[int, ...] = (),
    ) -> "QTensor":
        """Quantizes `x` along its logical axes `contracting`.

        Args:
            x: a float array (for example a Dense kernel, (in, out)).
            contracting: the axes that a matmul sums over; they share one scale and are stored last.
            granularity: "per_channel" (one scale for every index of the other axes) or "per_tensor".
            fmt: the number format.
            batch: axes that hold one matrix each (stacked layers, experts): stored first, with scales of their own.
        """
        contracting = tuple(sorted(a % x.ndim for a in contracting))
        stored = (*batch, *(a for a in range(x.ndim) if a not in (*contracting, *batch)), *contracting)
        moved = x.transpose(stored)
        shared = len(contracting) if granularity == "per_channel" else x.ndim - len(batch)
        axes = tuple(range(-shared, 0))
        scale = scale_from_absmax(jnp.max(jnp.abs(moved), axis=axes, keepdims=True), fmt)
        order = _shortest(tuple(stored.index(a) - x.ndim for a in range(x.ndim)))
        return cls(to_format(moved, scale, fmt), scale, order, x.dtype)

    @property
    def axes(self) -> tuple[int, ...]:
        """The stored axis of every logical axis."""
        lead = self.ndim - len(self.order)
        return (*range(lead), *(a + self.ndim for a in self.order))

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return tuple(self.values.shape[a] for a in self.axes)

    @property
    def ndim(self) -> int:
        """The logical rank."""
        return self.values.ndim

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in (self.values, self.scale))

    def transpose(self, permutation: tuple[int, ...]) -> "QTensor":
        """The logical transpose: only `order` changes, the stored values stay where they are."""
        return replace(self, order=_shortest(tuple(self.axes[p] - self.ndim for p in permutation)))

    def slice(self, cuts: Sequence[slice]) -> "QTensor":
        """The logical slice: values, and scales along the axes that have them, are cut."""
        cut = {stored: c for stored, c in zip(self.axes, cuts, strict=True)}
        values, scale = (
            x[tuple(cut[a] if x.shape[a] > 1 else slice(None) for a in range(self.ndim))]
            for x in (self.values, self.scale)
        )
        return replace(self, values=values, scale=scale)

    def reshape(self, shape: tuple[int, ...]) -> "QTensor | None":
        """The logical reshape; None if it would mix axes that are stored apart, or that do not share their scales."""
        old, new = ([a for a, n in enumerate(sizes) if n != 1] for sizes in (self.shape, shape))  # 1s come and go
        stored: list[tuple[int, bool, list[int]]] = []  # (first stored axis, whether it has scales, logical axes)
        for sources, targets in runs([self.shape[a] for a in old], [shape[a] for a in new]):
            own = [self.axes[old[a]] for a in sources]
            scaled = {self.scale.shape[a] > 1 for a in own}
            if own != list(range(own[0], own[0] + len(own))) or len(scaled) > 1:
                return None
            stored.append((own[0], scaled.pop(), [new[a] for a in targets]))
        ones = [(-1, False, [a for a, n in enumerate(shape) if n == 1])]
        order = [(a, scaled) for _, scaled, targets in ones + sorted(stored) for a in targets]
        values = self.values.reshape([shape[a] for a, _ in order])
        scale = self.scale.reshape([shape[a] if scaled else 1 for a, scaled in order])
        place = {a: i - len(shape) for i, (a, _) in enumerate(order)}
        return replace(self, values=values, scale=scale, order=_shortest(tuple(place[a] for a in range(len(shape)))))

    def check(self, where: str) -> None:
        """Raises ValueError, naming `where`, if an invariant does not hold."""
        problem = None
        if self.values.dtype != INT8.dtype:
            problem = f"values must be {INT8.name}, got {self.values.dtype.name}: was the tree cast?"
        elif self.scale.dtype != jnp.float32:
            problem = f"scale must be float32, got {self.scale.dtype.name}: was the tree cast?"
        elif self.scale.ndim != self.values.ndim:
            problem = f"scale of rank {self.values.ndim} expected, got shape {self.scale.shape}"
        elif any(s not in (1, v) for s, v in zip(self.scale.shape, self.values.shape, strict=True)):
            problem = f"scale {self.scale.shape} does not broadcast against values {self.values.shape}"
        elif sorted(self.order) != list(range(-len(self.order), 0)):
            problem = f"order must permute the last {len(self.order)} axes, got {self.order}"
        elif len(self.order) > self.ndim:
            problem = f"values of rank {len(self.order)} or more expected, got shape {self.values.shape}"
        if problem:
            raise ValueError(f"{where}: not a valid QTensor: {problem}; quantize the float leaf again")


def dequantize(q: QTensor) -> Array:
    """values * scale, in the logical shape and dtype: the float array that `q` stands for.

    |dequantize(quantize(x)) - x| <= scale / 2 elementwise.

    Example:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> w = jnp.array([[1.0, -2.0], [0.5, 4.0]])
        >>> bool(jnp.abs(sq.dequantize(sq.QTensor.quantize(w, (0,))) - w).max() <= 4 / 127 / 2)
        True
    """
    return (q.values.astype(jnp.float32) * q.scale).transpose(q.axes).astype(q.dtype)


def _shortest(order: tuple[int, ...]) -> tuple[int, ...]:
    """The order without the leading axes that are stored in place."""
    moved = [i for i, a in enumerate(order) if a != i - len(order)]
    return order[moved[0] :] if moved else ()
