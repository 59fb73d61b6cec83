"""The key/value cache of a decoder, a pytree: float, int8, float8 or packed int4, a scale for each token and head."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from sqjax.numerics.formats import (
    E4M3,
    INT4,
    INT8,
    Format,
    scale_from_absmax,
    to_codes,
    to_format,
    zero_point_range,
)


@dataclass(frozen=True)
class CacheFormat:
    """How keys and values are stored.

    Attributes:
        codes: "float" (the dtype of the parameters), "int8", "e4m3", or "int4", of which two share a byte.
        group: how many consecutive channels of a head share a scale; None for the whole head.
        zero_point: int4 only: whether a group's 16 codes span its own [min, max] and not [-absmax, absmax].
        keys: what is done to keys before they are encoded, by what each channel is in the first tokens that the row
            reads at once. "plain": nothing. "channels": each channel is divided by its largest magnitude there (a later
            token may exceed it: its own scale then grows). "rotated": each channel less its mean there, which adds the
            same to all scores of a query and so changes no softmax; then an orthogonal matrix that spreads what is
            large over all channels, and that turns the queries too.

    Raises:
        ValueError: a name that is not known, a group that is not positive, scales or a zero point for floats.

    Example:
        >>> from sqjax.models import CacheFormat
        >>> CacheFormat("int4", group=16, zero_point=True, keys="rotated").codes
        'int4'
    """

    codes: str = "float"
    group: int | None = None
    zero_point: bool = False
    keys: str = "plain"

    def __post_init__(self):
        if self.codes not in ("float", *_STORED):
            raise ValueError(
                f"CacheFormat: expected 'float' or one of {sorted(_STORED)}, got {self.codes!r}"
            )
        if self.keys not in KEYS:
            raise ValueError(f"CacheFormat.keys: expected one of {KEYS}, got {self.keys!r}")
        if self.group is not None and self.group < 1:
            raise ValueError(
                f"CacheFormat: expected a group of at least one channel, got {self.group}"
            )
        if self.codes == "float" and (self.group or self.keys != "plain"):
            raise ValueError("CacheFormat: a float cache has no scales; leave group and keys out")
        if self.zero_point and self.codes != "int4":
            raise ValueError(f"CacheFormat: only int4 may have a zero point, got {self.codes!r}")


#: The most slots over which a sum of products of two int8 in [-127, 127] is exact in int32.
LONGEST = (2**31 - 1) // 127**2
KEYS = ("plain", "channels", "rotated")
_STORED: dict[str, Format] = {"int8": INT8, "e4m3": E4M3, "int4": INT4}
#: What a name alone stands for.
CACHE_FORMATS = {
    "float": CacheFormat(),
    "int8": CacheFormat("int8"),
    "e4m3": CacheFormat("e4m3"),
    "int4": CacheFormat("int4", group=16, zero_point=True, keys="rotated"),
}


def cache_format(kind: str | CacheFormat) -> CacheFormat:
    """The format a name stands for; a `CacheFormat` stands for itself.

    Raises:
        ValueError: there is no such name.
    """
    if isinstance(kind, CacheFormat):
        return kind
    if kind not in CACHE_FORMATS:
        raise ValueError(
            f"cache: expected one of {sorted(CACHE_FORMATS)} or a CacheFormat, got {kind!r}"
        )
    return CACHE_FORMATS[kind]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """The keys, or the values, of one layer: head vectors as codes, one slot for each token.

    A vector is (codes - zero) * scale, for keys after what the format does to them first.

    Attributes:
        codes: (batch, kv_heads, capacity, head_dim), or half of that in the last axis for int4: a byte holds channel i
            in its low nibble and channel i + head_dim / 2 in its high one.
        scale: (batch, kv_heads, capacity, groups), float32, bfloat16 for int4; or None for floats.
        zero: int8 of scale's shape, in [-8, 7], or None.
        channel: float32 (batch, kv_heads, head_dim), or None: the keys' largest magnitudes, or their means, in the
            first tokens; zero before them.
        format: how they are stored.
    """

    codes: Any
    scale: Any = None
    zero: Any = None
    channel: Any = None
    format: CacheFormat = field(default=CacheFormat(), metadata={"static": True})

    @property
    def capacity(self) -> int:
        """The number of slots."""
        return self.codes.shape[2]

    @property
    def head_dim(self) -> int:
        """The number of channels of a head."""
        return self.codes.shape[3] * (2 if self.format.codes == "int4" else 1)

    def first(self, count: int) -> "Slots":
        """The first slots only."""
        return self if count == self.capacity else self._map(lambda x: x[:, :, :count])

    def token_arrays(self) -> list[Array]:
        """The arrays that grow with the number of slots."""
        return [x for x in (self.codes, self.scale, self.zero) if x is not None]

    def _map(self, change) -> "Slots":
        changed = {
            name: change(x)
            for name in ("codes", "scale", "zero")
            if (x := getattr(self, name)) is not None
        }
        return replace(self, **changed)


class KVCache(NamedTuple):
    """What a decoder remembers of the tokens it has read.

    Keys are stored already rotated. Slots from ``length`` on hold nothing and are masked out, and so are the first
    ``padding`` slots of a row: rows of unequal length are padded on the left, so that they all write to one slot.
    The cache of a model with a sliding window is a ring: token n is in slot n modulo the capacity.
    Writing past the capacity cannot be seen inside ``jax.jit``, so the caller sizes the cache.

    Attributes:
        keys, values: one `Slots` for each layer.
        length: how many tokens were written to each row, padding included.
        padding: (batch,), how many of those are padding.
    """

    keys: tuple[Slots, ...]
    values: tuple[Slots, ...]
    length: Int[Array, ""]
    padding: Int[Array, " batch"]

    @property
    def capacity(self) -> int:
        """The number of slots of each row."""
        return self.keys[0].capacity

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one token of one row takes in all layers: codes, scales and zero points."""
        arrays = [x for slots in (*self.keys, *self.values) for x in slots.token_arrays()]
        return sum(x.nbytes for x in arrays) / (self.capacity * self.padding.shape[0])


def empty_cache(
    layers: int,
    batch: int,
    kv_heads: int,
    capacity: int,
    head_dim: int,
    dtype: DTypeLike,
    kind: CacheFormat,
) -> KVCache:
    """A `KVCache` of zeros, with no token in it.

    Raises:
        ValueError: the format's group does not divide `head_dim`, or integer sums over so many slots could overflow.
    """
    if kind.codes in ("int8", "int4") and capacity > LONGEST:
        raise ValueError(
            f"cache: sums over integer codes are exact up to {LONGEST} tokens, got {capacity}; use 'e4m3'"
        )
    group = kind.group or head_dim
    if head_dim % group:
        raise ValueError(
            f"cache: expected a group that divides head_dim = {head_dim}, got {group}; "
            f"say CacheFormat({kind.codes!r}, group=...)"
        )
    lead = (batch, kv_heads, capacity)

    def slots(channels: bool) -> Slots:
        if kind.codes == "float":
            return Slots(jnp.zeros((*lead, head_dim), dtype))
        packed = kind.codes == "int4"
        stored = np.dtype(np.int8) if packed else _STORED[kind.codes].dtype
        return Slots(
            jnp.zeros((*lead, head_dim // 2 if packed else head_dim), stored),
            jnp.zeros((*lead, head_dim // group), _scale_dtype(kind)),
            jnp.zeros((*lead, head_dim // group), jnp.int8) if kind.zero_point else None,
            jnp.zeros((batch, kv_heads, head_dim), jnp.float32) if channels else None,
            kind,
        )

    keys, values = (
        tuple(slots(channels) for _ in range(layers)) for channels in (kind.keys != "plain", False)
    )
    return KVCache(keys, values, jnp.zeros((), jnp.int32), jnp.zeros((batch,), jnp.int32))


def _scale_dtype(kind: CacheFormat) -> DTypeLike:
    """Two bytes where groups are short."""
    return jnp.bfloat16 if kind.codes == "int4" else jnp.float32


def write(
    slots: Slots,
    new: Float[Array, "batch kv_heads tokens head_dim"],
    start: Int[Array, ""],
    positions: Int[Array, "batch tokens"],
    ring: bool,
) -> Slots:
    """The slots with new vectors in them, from slot `start` on (modulo the capacity, in a ring).

    `positions` are those of the tokens in their rows, negative for padding, which sets nothing of channels.
    """
    if slots.channel is not None:
        slots = replace(slots, channel=_first_channels(slots, new.astype(jnp.float32), positions))
        new = changed_keys(slots, new.astype(jnp.float32))
    put = _put_in_ring if ring else _put
    by_token = replace(slots, channel=None)
    by_token = jax.tree.map(
        lambda x, part: put(x, part.astype(x.dtype), start), by_token, encode(new, slots.format)
    )
    return replace(by_token, channel=slots.channel)


def _first_channels(slots: Slots, new: Array, positions: Array) -> Array:
    """What each channel is in the first tokens: what these say, or what was known if they are not the first."""
    real = (positions >= 0)[:, None, :, None]
    if slots.format.keys == "channels":
        seen = jnp.max(jnp.abs(new), axis=2, where=real, initial=0.0)
    else:
        seen = jnp.sum(new, axis=2, where=real) / jnp.maximum(
            jnp.sum(real, axis=2, dtype=jnp.float32), 1
        )
    return jnp.where((positions[:, 0] <= 0)[:, None, None], seen, slots.channel)


def changed_keys(slots: Slots, keys: Array) -> Array:
    """Keys as they are encoded, (batch, kv_heads, tokens, head_dim)."""
    if slots.format.keys == "channels":
        return keys / _factors(slots)
    return jnp.matmul(
        keys - slots.channel[:, :, None, :], rotation(slots.head_dim), precision="highest"
    )


def changed_queries(slots: Slots, rows: Array) -> Array:
    """Queries such that their products with changed keys are those with the keys, but for a constant of each row."""
    if slots.channel is None:
        return rows
    if slots.format.keys == "channels":
        return rows.astype(jnp.float32) * _factors(slots)
    return jnp.matmul(rows.astype(jnp.float32), rotation(slots.head_dim), precision="highest")


def _factors(slots: Slots) -> Array:
    return jnp.where(slots.channel == 0, jnp.float32(1), slots.channel)[:, :, None, :]


def rotation(size: int) -> Float[Array, "size size"]:
    """The orthonormal cosine transform: of one large channel every result has at most sqrt(2 / size)."""
    angles = np.pi * (np.arange(size)[:, None] + 0.5) * np.arange(size)[None, :] / size
    scale = np.sqrt(np.where(np.arange(size) == 0, 1, 2) / size)
    return jnp.asarray(np.cos(angles) * scale[None, :], jnp.float32)


def _put(array: Array, new: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(array, new, start, axis=2)


def _put_in_ring(array: Array, new: Array, start: Array) -> Array:
    tokens, capacity = new.shape[2], array.shape[2]
    if tokens == 1:
        return _put(array, new, start % capacity)
    where = (start + jnp.arange(tokens, dtype=start.dtype)) % capacity
    return array.at[:, :, where].set(new, unique_indices=True, mode="promise_in_bounds")


def encode(vectors: Float[Array, "batch kv_heads tokens head_dim"], kind: CacheFormat) -> Slots:
    """Vectors as a format stores them; |decoded - vector| <= scale / 2 for integers."""
    if kind.codes == "float":
        return Slots(vectors)
    fmt, wide = _STORED[kind.codes], _groups(vectors.astype(jnp.float32), kind)
    if kind.zero_point:
        scale, zero = zero_point_range(jnp.min(wide, axis=-1), jnp.max(wide, axis=-1))
        stored = _stored_scale(scale, kind)
        codes = to_codes(wide, stored.astype(jnp.float32)[..., None], zero[..., None])
    else:
        stored, zero = (
            _stored_scale(scale_from_absmax(jnp.max(jnp.abs(wide), axis=-1), fmt), kind),
            None,
        )
        codes = to_format(wide, stored.astype(jnp.float32)[..., None], fmt)
    codes = codes.reshape(vectors.shape)
    return Slots(_pack(codes) if kind.codes == "int4" else codes, stored, zero, None, kind)


def _stored_scale(scale: Float[Array, "*s"], kind: CacheFormat) -> Float[Array, "*s"]:
    """The scale in the dtype that is stored, not smaller than it was, so that nothing is clipped."""
    if _scale_dtype(kind) == jnp.float32:
        return scale
    return (scale * (1 + 2.0**-8)).astype(jnp.bfloat16)


def integers(slots: Slots) -> Shaped[Array, "batch kv_heads slots groups group"]:
    """The codes minus their zero points, int8, by group: what the scales multiply. int8 codes come as they are."""
    codes = _unpack(slots.codes) if slots.format.codes == "int4" else slots.codes
    codes = _groups(codes, slots.format)
    return codes if slots.zero is None else codes - slots.zero[..., None]


def decoded(slots: Slots) -> Float[Array, "batch kv_heads slots head_dim"]:
    """The vectors in float: for tests and for formats that have no arithmetic of their own."""
    if slots.scale is None:
        return slots.codes
    vectors = integers(slots).astype(jnp.float32) * slots.scale.astype(jnp.float32)[..., None]
    vectors = vectors.reshape(*vectors.shape[:3], -1)
    if slots.channel is None:
        return vectors
    if slots.format.keys == "channels":
        return vectors * _factors(slots)
    turned_back = jnp.matmul(vectors, rotation(slots.head_dim).T, precision="highest")
    return turned_back + slots.channel[:, :, None, :]


def _groups(x: Array, kind: CacheFormat) -> Array:
    return x.reshape(*x.shape[:-1], -1, kind.group or x.shape[-1])


def _pack(codes: Shaped[Array, "*lead head_dim"]) -> Array:
    """Two int4 in a byte: channel i in the low nibble, channel i + head_dim / 2 in the high one."""
    low, high = jnp.split(codes.astype(jnp.int8), 2, axis=-1)
    return (low & 15) | (high << 4)


def _unpack(packed: Shaped[Array, "*lead half"]) -> Array:
    """Shifts of int8 keep the sign."""
    return jnp.concatenate([(packed << 4) >> 4, packed >> 4], axis=-1)
