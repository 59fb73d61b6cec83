"""What one layer of a key/value cache stores: vectors as float, int8, float8 or packed int4.

A vector is stored as codes and scales: vector = (codes - zero) * scale. A scale belongs to one
token, one head and one group of consecutive channels. With head_dim = 32 and int8, a token's key
in one head takes 32 bytes of codes and 4 bytes of one float32 scale, where float32 takes 128. With
int4 in groups of 16 it takes 16 bytes of codes (two channels share a byte), two bfloat16 scales
and two int8 zero points: 22 bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from sqjax._serialized import serialized
from sqjax.models.fields import (
    FLAG,
    SIZE_OR_NONE,
    What,
    check_fields,
    one_of,
)
from sqjax.numerics.formats import (
    E4M3,
    INT4,
    INT8,
    Format,
    absmax,
    scale_from_absmax,
    to_codes,
    to_format,
    zero_point_range,
)
from sqjax.numerics.int4 import pack_halves, unpack_halves

#: What may be done to keys before they are encoded; see `CacheFormat`.
KEYS = ("plain", "channels", "rotated")
_CODES: dict[str, Format] = {"int8": INT8, "e4m3": E4M3, "int4": INT4}
#: What each field of `CacheFormat` must be.
_FIELDS = {
    "codes": What(
        f"'float' or one of {sorted(_CODES)}",
        one_of("float", *_CODES).holds,
    ),
    "group": What(
        "a group of at least one channel, or None", SIZE_OR_NONE.holds
    ),
    "zero_point": FLAG,
    "keys": one_of(*KEYS),
}


@dataclass(frozen=True)
class CacheFormat:
    """How keys and values are stored.

    Attributes:
        codes: "float" (the dtype of the parameters), "int8", "e4m3", or "int4", of which two
            share a byte.
        group: how many consecutive channels of a head share a scale; None for the whole head.
        zero_point: int4 only: whether a group's 16 codes span its own [min, max] and not
            [-absmax, absmax].
        keys: what is done to keys before they are encoded, because a few channels of keys are much
            larger than the others (those with a large bias, as Qwen's). It depends on the first
            tokens that the row reads at once. None: "rotated", and "plain" for floats. "plain":
            nothing. "channels": each channel is divided by its largest magnitude in these
            tokens (a later token may exceed it: its own scale then grows). "rotated": each
            channel's mean over these tokens is subtracted, which adds the same number to all scores
            of a query and so changes no softmax (a soft cap gets the number back); then an
            orthogonal matrix spreads large channels over all channels, and turns the queries too.

    Raises:
        ValueError: a name that is not known, a group that is not positive, scales or a zero point
            for floats.

    Examples:
        >>> from sqjax.models import CacheFormat
        >>> CacheFormat("int4", group=16, zero_point=True, keys="rotated").codes
        'int4'
    """

    codes: str = "float"
    group: int | None = None
    zero_point: bool = False
    keys: str | None = None

    def __post_init__(self):
        if self.keys is None:
            usual = "plain" if self.codes == "float" else "rotated"
            object.__setattr__(self, "keys", usual)
        check_fields(self, _FIELDS)
        if self.codes == "float" and (self.group or self.keys != "plain"):
            raise ValueError(
                "CacheFormat: a float cache has no scales; leave group and keys out"
            )
        if self.zero_point and self.codes != "int4":
            raise ValueError(
                f"CacheFormat: only int4 may have a zero point, got {self.codes!r}"
            )

    @property
    def packed(self) -> bool:
        """Whether two codes share a byte."""
        return self.codes == "int4"

    @property
    def codes_dtype(self) -> np.dtype:
        """The dtype of the array that holds codes: int8 for packed int4. A float cache has none."""
        return np.dtype(np.int8) if self.packed else _CODES[self.codes].dtype

    @property
    def scale_dtype(self) -> DTypeLike:
        """bfloat16 for int4, because its groups are short and have many scales."""
        return jnp.bfloat16 if self.packed else jnp.float32


#: The formats that have a name of their own.
CACHE_FORMATS = {
    "float": CacheFormat(),
    "int8": CacheFormat("int8"),
    "e4m3": CacheFormat("e4m3"),
    "int4": CacheFormat("int4", group=16, zero_point=True),
}


def cache_format(kind: str | CacheFormat) -> CacheFormat:
    """The format a name stands for; a `CacheFormat` stands for itself.

    Raises:
        ValueError: there is no such name.
    """
    if isinstance(kind, CacheFormat):
        return kind
    if not isinstance(kind, str) or kind not in CACHE_FORMATS:
        raise ValueError(
            f"cache: expected one of {sorted(CACHE_FORMATS)} or a CacheFormat, got {kind!r}"
        )
    return CACHE_FORMATS[kind]


@serialized(CacheFormat)
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """The keys, or the values, of one layer: head vectors as codes, one slot for each token.

    A vector is (codes - zero) * scale. For keys that is the vector after `changed_keys`.

    Attributes:
        codes: (batch, kv_heads, capacity, head_dim). For int4 (batch, kv_heads, capacity,
            head_dim / 2): a byte holds channel i in its low nibble and channel i + head_dim / 2 in
            its high one. With head_dim = 4 the bytes hold the channels (0, 2) and (1, 3).
        scale: (batch, kv_heads, capacity, groups), float32, bfloat16 for int4; or None for floats.
        zero: int8 of scale's shape, in [-8, 7], or None.
        channel: float32 (batch, kv_heads, head_dim), or None: the keys' largest magnitudes, or
            their means, in the first tokens; zero before them.
        format: how they are stored.
    """

    codes: Any
    scale: Any = None
    zero: Any = None
    channel: Any = None
    format: CacheFormat = field(
        default=CacheFormat(), metadata={"static": True}
    )

    @property
    def capacity(self) -> int:
        """The number of slots."""
        return self.codes.shape[2]

    @property
    def head_dim(self) -> int:
        """The number of channels of a head."""
        return self.codes.shape[3] * (2 if self.format.packed else 1)

    def first(self, count: int) -> "Slots":
        """The first slots only."""
        if count == self.capacity:
            return self
        return self.map_tokens(lambda x: x[:, :, :count])

    def token_arrays(self) -> list[Array]:
        """The arrays that grow with the number of slots."""
        return jax.tree.leaves((self.codes, self.scale, self.zero))

    def map_tokens(
        self, change: Callable[..., Any], *others: "Slots"
    ) -> "Slots":
        """change(array, *arrays of others) for the arrays that grow with the number of slots."""
        # `channel` has no axis of slots: it stays as it is.
        alone = [replace(slots, channel=None) for slots in (self, *others)]
        return replace(jax.tree.map(change, *alone), channel=self.channel)


def empty_slots(
    batch: int,
    kv_heads: int,
    capacity: int,
    head_dim: int,
    dtype: DTypeLike,
    kind: CacheFormat,
    changes_keys: bool,
) -> Slots:
    """Slots of zeros. `dtype`: of floats. `changes_keys`: whether there is a `channel` array."""
    lead = (batch, kv_heads, capacity)
    if kind.codes == "float":
        return Slots(jnp.zeros((*lead, head_dim), dtype))
    groups = head_dim // (kind.group or head_dim)
    stored = head_dim // 2 if kind.packed else head_dim
    return Slots(
        codes=jnp.zeros((*lead, stored), kind.codes_dtype),
        scale=jnp.zeros((*lead, groups), kind.scale_dtype),
        zero=jnp.zeros((*lead, groups), jnp.int8) if kind.zero_point else None,
        channel=jnp.zeros((batch, kv_heads, head_dim), jnp.float32)
        if changes_keys
        else None,
        format=kind,
    )


# Vectors to codes and back -------------------------------------------------------------------


def encode(
    vectors: Float[Array, "batch kv_heads tokens head_dim"], kind: CacheFormat
) -> Slots:
    """Vectors as a format stores them; |decoded - vector| <= scale / 2 for integers."""
    if kind.codes == "float":
        return Slots(vectors)
    wide = _groups(vectors.astype(jnp.float32), kind)
    largest = absmax(wide, -1)[..., 0]
    # Codes are made with the scale as it is stored, because that is the one that decodes them.
    zero = None
    if kind.zero_point:
        low, high = jnp.min(wide, axis=-1), jnp.max(wide, axis=-1)
        scale, zero = zero_point_range(low, high)
        # A minimum or maximum may have lost a NaN: see `absmax`.
        scale = jnp.where(jnp.isnan(largest), jnp.nan, scale)
        stored_scale = _stored_scale(scale, kind)
        step = stored_scale.astype(jnp.float32)[..., None]
        codes = to_codes(wide, step, zero[..., None])
    else:
        fmt = _CODES[kind.codes]
        scale = scale_from_absmax(largest, fmt)
        stored_scale = _stored_scale(scale, kind)
        step = stored_scale.astype(jnp.float32)[..., None]
        codes = to_format(wide, step, fmt)
    # Groups are a view of the channels; they are not stored apart.
    codes = codes.reshape(vectors.shape)
    return Slots(
        pack_halves(codes) if kind.packed else codes,
        stored_scale,
        zero,
        None,
        kind,
    )


def _stored_scale(
    scale: Float[Array, "*s"], kind: CacheFormat
) -> Float[Array, "*s"]:
    """The scale in the dtype that is stored, never smaller than it was, so that nothing is clipped.

    Rounding to bfloat16 loses at most 2^-9 of a number, so a scale made larger by 2^-8 first
    does not end below what it was.
    """
    if kind.scale_dtype == jnp.float32:
        return scale
    return (scale * (1 + 2.0**-8)).astype(jnp.bfloat16)


def integers(
    slots: Slots,
) -> Shaped[Array, "batch kv_heads slots groups group"]:
    """The codes minus their zero points, by group: what the scales multiply.

    int8 for integers; float8 codes come as they are.
    """
    codes = unpack_halves(slots.codes) if slots.format.packed else slots.codes
    codes = _groups(codes, slots.format)
    return codes if slots.zero is None else codes - slots.zero[..., None]


def decoded(slots: Slots) -> Float[Array, "batch kv_heads slots head_dim"]:
    """The vectors in float: for tests and for formats that have no arithmetic of their own."""
    if slots.scale is None:
        return slots.codes
    scale = slots.scale.astype(jnp.float32)[..., None]
    grouped = integers(slots).astype(jnp.float32) * scale
    vectors = grouped.reshape(*grouped.shape[:3], -1)
    if slots.channel is None:
        return vectors
    if slots.format.keys == "channels":
        return vectors * _factors(slots)
    # The matrix is orthogonal, so that its transpose turns back.
    turned_back = jnp.matmul(
        vectors, rotation(slots.head_dim).T, precision="highest"
    )
    return turned_back + slots.channel[:, :, None, :]


def _groups(x: Array, kind: CacheFormat) -> Array:
    """Channels in groups that share a scale: (..., 32) becomes (..., 2, 16) in groups of 16."""
    group = kind.group or x.shape[-1]
    return x.reshape(*x.shape[:-1], -1, group)


# Changes of keys -----------------------------------------------------------------------------


def first_channels(slots: Slots, new: Array, positions: Array) -> Array:
    """Each channel's absmax, or mean, in the first tokens that a row reads.

    That is in `new` if these are the first ones, else what `slots` knows already. Keys that are
    stored were changed by it, so later tokens must not alter it.
    """
    real = (positions >= 0)[:, None, :, None]
    if slots.format.keys == "channels":
        seen = jnp.max(jnp.abs(new), axis=2, where=real, initial=0.0)
    else:
        total = jnp.sum(new, axis=2, where=real)
        count = jnp.sum(real, axis=2, dtype=jnp.float32)
        seen = total / jnp.maximum(
            count, 1
        )  # a row of padding alone has the mean 0
    # Position 0 is a row's first token; a row with padding before that begins at -1.
    row_begins = positions[:, 0] <= 0
    return jnp.where(row_begins[:, None, None], seen, slots.channel)


def changed_keys(slots: Slots, keys: Array) -> Array:
    """Keys as they are encoded, (batch, kv_heads, tokens, head_dim)."""
    if slots.format.keys == "channels":
        return keys / _factors(slots)
    centred = keys - slots.channel[:, :, None, :]
    return jnp.matmul(centred, rotation(slots.head_dim), precision="highest")


def changed_queries(slots: Slots, rows: Array) -> Array:
    """Queries whose products with the changed keys are those with the keys.

    Up to a constant of each row, which changes no softmax. For "channels" (q c) . (k / c) = q .
    k. For "rotated", with an orthogonal R and the mean m, (q R) . ((k - m) R) = q . k - q . m,
    and q . m is the constant, which `omitted_scores` gives.
    """
    if slots.channel is None:
        return rows
    if slots.format.keys == "channels":
        return rows.astype(jnp.float32) * _factors(slots)
    return jnp.matmul(
        rows.astype(jnp.float32), rotation(slots.head_dim), precision="highest"
    )


def omitted_scores(
    slots: Slots, rows: Float[Array, "batch kv_heads rows head_dim"]
) -> Float[Array, "batch kv_heads rows 1"] | None:
    """What the products of changed queries and changed keys lack of q . k: q . m of each row.

    A softmax does not see it. What stands before the softmax and is not linear, as a soft cap,
    does. None where they lack nothing.
    """
    if slots.channel is None or slots.format.keys == "channels":
        return None
    means = slots.channel[:, :, None, :]
    products = rows.astype(jnp.float32) * means
    return jnp.sum(products, axis=-1, keepdims=True)


def _factors(slots: Slots) -> Array:
    """What each channel is divided by: 1 for a channel of zeros, which may be larger later."""
    factors = jnp.where(slots.channel == 0, jnp.float32(1), slots.channel)
    return factors[:, :, None, :]


def rotation(size: int) -> Float[Array, "size size"]:
    """The orthonormal cosine transform, which spreads one large channel over all of them.

    Every result has at most sqrt(2 / size) of that channel: a quarter of it for 32 channels.
    """
    rows = np.arange(size)[:, None]
    columns = np.arange(size)[None, :]
    # DCT-II: entry (n, k) is cos(pi (n + 1/2) k / size), each column divided by its length.
    angles = np.pi * (rows + 0.5) * columns / size
    lengths = np.sqrt(np.where(columns == 0, 1, 2) / size)
    return jnp.asarray(np.cos(angles) * lengths, jnp.float32)
