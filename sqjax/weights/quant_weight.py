"""A matmul weight as it is stored, and how the activations that meet it are quantized."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array

from sqjax._serialized import exported
from sqjax._shapes import Shape, sharded_as
from sqjax._trees import named_leaves
from sqjax.numerics.formats import FormatName
from sqjax.numerics.hadamard import rotated
from sqjax.numerics.weight_products import Activations, Recipe
from sqjax.weights.no_array import NoArray
from sqjax.weights.qtensor import QTensor
from sqjax.weights.text import weight_text


class Outliers(NamedTuple):
    """Channels whose activations are too large for int8: they are multiplied in float.

    Their quantized weights are 0.

    LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), with channels fixed by calibration.

    Attributes:
        channels: (*batch, n) int32, positions along the contracted axes (flattened, in stored
            order).
        weight: (*batch, *outputs, n), the float weight's rows of these channels.
    """

    channels: Any
    weight: Any


export.register_namedtuple_serialization(
    Outliers, serialized_name="sqjax.Outliers"
)


@exported()
@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class QuantWeight(NoArray):
    """A matmul weight as it is stored, and how the activations that meet it are quantized.

    Attributes:
        tensor: the quantized weight.
        input_scale: float32, the activation's scale, when `activations` is "static"; otherwise
            None. A scalar, or one for each matrix of a stack.
        smoothing: float32 s of the activation's contracted shape (after the axes of a stack), or
            None. Where it is given the weight holds s * W and the activation quantizer divides by
            s: smoothing at run time, (X/s)(sW) = XW.
        activations: "per_token" (one scale a row, computed at run time), "per_token_zero_point"
            (the same with a zero point; int4 only), "per_tensor" (one for the whole activation, at
            run time), "static" (`input_scale`), or None: the activation stays float (weight-only).
        contracted: the number of contracted axes, which are stored last.
        activation_format: the format of quantized activations, "int8", "int4", "e4m3" or "e5m2".
        outliers: the channels that are multiplied in float, or None.
        rotation: the channels of a block of Q, a rotation at run time (see
            `sqjax.numerics.hadamard`), or None. Where it is given the weight holds Q s W along its
            contracted channels, flattened as they are stored, and the quantizer sees (X/s) Q.
        kernel: "pallas" where `with_kernel` chose that, or None: XLA's own program.

    Examples:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: x @ p["w"]
        >>> params = {"w": jnp.ones((2, 3))}
        >>> w = sq.quantize(params, sq.calibrate(fn, params, [jnp.array([[1.0, 16.0]])]))["w"]
        >>> w.shape, w.tensor.values.shape, w.activations
        ((2, 3), (3, 2), 'per_token')
    """

    _instead = (
        "a quantized weight runs in sqjax.quantized(fn)(params, ...), not in fn(params, ...); its "
        "float array is sqjax.dequantize(weight.tensor)"
    )

    tensor: QTensor
    input_scale: Any
    smoothing: Any
    activations: Activations | None = field(metadata={"static": True})
    contracted: int = field(default=1, metadata={"static": True})
    activation_format: FormatName = field(
        default="int8", metadata={"static": True}
    )
    outliers: Any = None  # Outliers or None
    rotation: int | None = field(default=None, metadata={"static": True})
    kernel: Literal["pallas"] | None = field(
        default=None, metadata={"static": True}
    )

    def __repr__(self) -> str:
        return weight_text(self)

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape of the float weight."""
        return self.tensor.shape

    @property
    def dtype(self) -> np.dtype:
        """The logical dtype of the float weight."""
        return self.tensor.dtype

    @property
    def ndim(self) -> int:
        """The logical rank of the float weight."""
        return self.tensor.ndim

    def with_tensor(
        self,
        tensor: QTensor,
        *,
        input_scale: Callable[[Any], Any],
        smoothing: Callable[[Any], Any],
        channels: Callable[[Any], Any],
        outlier_weight: Callable[[Any], Any],
    ) -> "QuantWeight":
        """The weight with another tensor, and what is beside it changed by one function each.

        What the weight does not have is not asked for: its function is not called.
        """
        outliers = self.outliers
        if outliers is not None:
            outliers = Outliers(
                channels(outliers.channels), outlier_weight(outliers.weight)
            )
        return replace(
            self,
            tensor=tensor,
            input_scale=jax.tree.map(input_scale, self.input_scale),
            smoothing=jax.tree.map(smoothing, self.smoothing),
            outliers=outliers,
        )

    def times(self, factor: Any) -> "QuantWeight":
        """The weight times a number, or one for each output, of its rank and of size 1 along the
        channels. What the activations are divided by stays what it was.
        """

        def of_outliers(kept):
            return kept * self._at_outliers(factor).astype(kept.dtype)

        return self._with_codes(self.tensor.times(factor), of_outliers)

    def where(self, mask: Any) -> "QuantWeight | None":
        """The weight where a mask is true, an array of its rank or a number, and 0 elsewhere.

        All scales stay, and what the activations are divided by. None for a mask of channels where
        the weight holds sums of channels, as a rotated one does.
        """
        if self.rotation is not None and not self.is_one_for_channels(mask):
            return None

        def of_outliers(kept):
            return jnp.where(self._at_outliers(mask), kept, 0)

        return self._with_codes(self.tensor.where(mask), of_outliers)

    def is_one_for_channels(self, x: Any) -> bool:
        """Whether a number, or an array of the weight's rank, is the same for all channels."""
        if not jnp.ndim(x):
            return True
        stored = self.tensor.as_stored(jnp.shape(x))
        return math.prod(stored[-self.contracted :]) == 1

    def rotated_channels(self, x: Array) -> Array:
        """An array whose last axes are the stored channels, times Q, which is its own inverse."""
        if self.rotation is None:
            return x
        flat = x.reshape(*x.shape[: x.ndim - self.contracted], -1)
        return rotated(flat, self.rotation).reshape(x.shape)

    def _with_codes(
        self, tensor: QTensor, of_outliers: Callable[[Any], Any]
    ) -> "QuantWeight":
        """The weight with other elements; what its activations meet stays what it was."""
        return self.with_tensor(
            tensor,
            input_scale=_same,
            smoothing=_same,
            channels=_same,
            outlier_weight=of_outliers,
        )

    def _at_outliers(self, x: Any) -> Array:
        """The entries of an array of the weight's rank that stand beside those of the outliers.

        Example: of (in, out) = (16, 12) and the outlier channels [3, 5] it is of shape (12, 2); of
        (1, 12), which is the same for all channels, of shape (12, 1). A number is of shape (1, 1).
        """
        stored = self.tensor.stored(x)
        first = self.ndim - self.contracted
        rows, channels = stored.shape[:first], stored.shape[first:]
        rows = (*[1] * (first - len(rows)), *rows)
        if math.prod(channels) == 1:
            return stored.reshape(*rows, 1)
        whole = (*rows, *self.tensor.values.shape[first:])
        flat = jnp.broadcast_to(stored, whole).reshape(*rows, -1)
        return jnp.take_along_axis(flat, self._outlier_channels(), -1)

    def _outlier_channels(self) -> Array:
        """The numbers of the outlier channels, of the rank of their weights: (*batch, 1, n)."""
        channels = self.outliers.channels
        outputs = self.outliers.weight.ndim - channels.ndim
        axes = range(channels.ndim - 1, channels.ndim - 1 + outputs)
        return jnp.expand_dims(channels, tuple(axes))

    def dequantize(self) -> Array:
        """The float weight that it stands for, as a matmul that is not smoothed would read it.

        So the rotation and the smoothing at run time are undone, and the outlier channels are where
        they were.
        """
        tensor = self.tensor
        x = tensor.codes().astype(jnp.float32) * tensor.spread(tensor.scale)
        first = self.ndim - self.contracted
        if self.outliers is not None:
            kept = self.outliers.weight.astype(jnp.float32)
            flat = x.reshape(*x.shape[:first], -1)
            at = jnp.broadcast_to(self._outlier_channels(), kept.shape)
            put = jnp.put_along_axis(flat, at, kept, -1, inplace=False)
            x = put.reshape(x.shape)
        x = self.rotated_channels(x)
        if self.smoothing is not None:
            x = x / self._smoothing_beside(x.shape)
        return x.transpose(tensor.axes).astype(tensor.dtype)

    def _smoothing_beside(self, stored: Shape) -> Array:
        """The smoothing scales, in a shape that broadcasts against the stored values.

        Example: of 3 layers (outputs, channels) = (12, 16) those of shape (3, 16) get (3, 1, 16).
        Those of a convolution's 8 channels in 2 groups, for a kernel (12, 3, 4), get (2, 1, 4), and
        each group's are repeated for its 6 outputs.
        """
        first = len(stored) - self.contracted
        lead = self.smoothing.ndim - self.contracted
        batch, own = self.smoothing.shape[:lead], self.smoothing.shape[lead:]
        groups = max(own[-1], 1) // max(stored[-1], 1)
        outputs = (groups, *[1] * (first - lead))[: first - lead]
        s = self.smoothing.reshape(*batch, *outputs, *own[:-1], stored[-1])
        if groups > 1:
            s = jnp.repeat(s, stored[lead] // groups, axis=lead)
        return s

    @property
    def recipe(self) -> Recipe:
        """How a product with one of its matrices runs."""
        return Recipe(
            self.activations,
            self.activation_format,
            self.tensor.group,
            self.kernel,
        )


def _same(x: Any) -> Any:
    return x


def is_quantized(x: Any) -> bool:
    """Whether a leaf is a quantized weight: what our tree utilities take as `is_leaf`."""
    return isinstance(x, QuantWeight)


def is_quantized_leaf(x: Any) -> bool:
    """Whether this is one of our leaves, a weight or a tensor, whose arrays belong together."""
    return isinstance(x, QuantWeight | QTensor)


def check_float(params: Any, what: str) -> None:
    """Raises ValueError, naming the leaf, if some leaf of a tree is quantized already."""
    paths, leaves, _ = named_leaves(params, is_leaf=is_quantized)
    for path, leaf in zip(paths, leaves, strict=True):
        if is_quantized(leaf):
            raise ValueError(
                f"{what}: expected float parameters, but {path or 'the tree'} is quantized "
                f"already: {leaf!r}; pass the float tree that it was made of"
            )


def weight_type(x: Any) -> jax.ShapeDtypeStruct | None:
    """The type of the float weight that a `QuantWeight` stands for; None for anything else."""
    if not isinstance(x, QuantWeight):
        return None
    return sharded_as(
        jax.ShapeDtypeStruct(x.shape, x.dtype), x.tensor.values, x.tensor.axes
    )
