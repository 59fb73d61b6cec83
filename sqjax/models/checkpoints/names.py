"""Tables of names: which tensor of a checkpoint fills which leaves of the parameter tree, and how.

A row says that a tensor of *their* name holds *our* leaves, in another layout:

    dense("model.layers.{layer}.mlp.up_proj", "model/layers/{layer}/mlp/up_proj")

stands for two rows: ``....up_proj.weight``, (out, in), fills ``.../up_proj/kernel``, (in, out);
and ``....up_proj.bias`` fills ``.../up_proj/bias``. ``{layer}`` is a number. ``{entry}`` is one
too, of an entry along the leaf's first axis: of the expert, in most tables.
"""

import re
from collections.abc import Callable, Container, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sqjax.models.checkpoints.kinds import Config
from sqjax.models.config import DecoderConfig

Shape = tuple[int, ...]
#: Their array of a tensor -> our arrays of its leaves, given the leaves' shapes.
Split = Callable[[Config, np.ndarray, Sequence[Shape]], list]
#: Our arrays of the leaves -> their array. The inverse of a `Split`.
Join = Callable[[Config, Sequence], "jax.Array"]


class Layout(NamedTuple):
    """How a tensor holds leaves: as functions in both directions, each other's inverse."""

    split: Split
    join: Join


class Row(NamedTuple):
    """One row of a table: a tensor's name and its leaves' paths, with placeholders in both."""

    theirs: str
    ours: tuple[str, ...]
    layout: Layout


class Found(NamedTuple):
    """What a row says of one tensor.

    Attributes:
        paths: of the leaves that it fills.
        entry: which entry along the leaves' first axis it fills; None for all.
        layout: how it holds them.
    """

    paths: tuple[str, ...]
    entry: int | None
    layout: Layout


class _EveryLeaf:
    """Holds every path."""

    def __contains__(self, path: object) -> bool:
        return True


#: For `find`: takes the first row with a name, whatever leaves the model has.
EVERY_LEAF: Container[str] = _EveryLeaf()


def find(
    rows: Sequence[Row], name: str, leaves: Container[str]
) -> Found | None:
    """What a table says of a tensor: the first row with its name whose leaves the model has.

    None for a name that is in no such row.
    """
    for row in rows:
        match = _pattern(row.theirs).fullmatch(name)
        if match is None:
            continue
        numbers = match.groupdict()
        entry = numbers.pop("entry", None)
        paths = tuple(path.format(**numbers) for path in row.ours)
        if all(path in leaves for path in paths):
            which = None if entry is None else int(entry)
            return Found(paths, which, row.layout)
    return None


@lru_cache(maxsize=4096)
def _pattern(theirs: str) -> re.Pattern:
    """The regular expression of a name with placeholders."""
    # re.escape writes the braces of a placeholder with backslashes.
    escaped = re.escape(theirs)
    return re.compile(
        re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>0|[1-9][0-9]*)", escaped)
    )


@lru_cache(maxsize=4096)
def their_shape(
    config: Config, layout: Layout, shapes: tuple[Shape, ...]
) -> Shape:
    """The shape of a tensor that holds leaves of these shapes."""
    leaves = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.eval_shape(partial(layout.join, config), leaves).shape


# Layouts ------------------------------------------------------------------------------------------


def _whole(config: Config, theirs: np.ndarray, shapes: Sequence[Shape]) -> list:
    return [theirs]


#: The leaf as it is.
AS_IS = Layout(_whole, lambda config, ours: ours[0])
#: A Dense kernel, (in, out), stored as (out, in).
TRANSPOSED = Layout(
    lambda config, theirs, shapes: [theirs.T], lambda config, ours: ours[0].T
)


def _split_rows(
    config: Config, theirs: np.ndarray, shapes: Sequence[Shape]
) -> list:
    """One Dense layer's rows, one output each, apart for several: (48 + 16 + 16, in)."""
    # Outputs are the last axis of our kernels and biases, and their first.
    ends = np.cumsum([shape[-1] for shape in shapes])[:-1]
    return [part.T for part in np.split(theirs, ends)]


def _join_rows(config: Config, ours: Sequence) -> jax.Array:
    return jnp.concatenate([leaf.T for leaf in ours])


#: Several Dense layers as one, the outputs of one after those of the other.
ONE_AFTER_ANOTHER = Layout(_split_rows, _join_rows)


def _split_columns(
    config: Config, theirs: np.ndarray, shapes: Sequence[Shape]
) -> list:
    ends = np.cumsum([shape[-1] for shape in shapes])[:-1]
    return np.split(theirs, ends, axis=-1)


#: As `ONE_AFTER_ANOTHER`, stored as (in, out): GPT-2's Conv1D.
COLUMNS_ONE_AFTER_ANOTHER = Layout(
    _split_columns, lambda config, ours: jnp.concatenate(ours, axis=-1)
)


def _split_by_key_head(
    config: DecoderConfig, theirs: np.ndarray, shapes: Sequence[Shape]
) -> list:
    """Queries, keys and values, stored head by head: each key head after its query heads.

    With 6 query heads and 2 key/value heads of 8 channels: their rows are (2, 3 + 1 + 1, 8, in),
    of which the first 3 of the second axis are query heads.
    """
    sharing = config.num_heads // config.num_kv_heads
    heads = config.num_kv_heads, sharing + 2, config.head_dim
    rows = theirs.reshape(*heads, *theirs.shape[1:])
    parts = rows[:, :sharing], rows[:, sharing], rows[:, sharing + 1]
    return [part.reshape(-1, *theirs.shape[1:]).T for part in parts]


def _join_by_key_head(config: DecoderConfig, ours: Sequence) -> jax.Array:
    parts = []
    for leaf in ours:
        rows = leaf.T
        by_head = (config.num_kv_heads, -1, config.head_dim, *rows.shape[1:])
        parts.append(rows.reshape(by_head))
    joined = jnp.concatenate(parts, axis=1)
    return joined.reshape(-1, *joined.shape[3:])


#: Queries, keys and values of one key head after another: GPT-NeoX, BLOOM, Falcon.
BY_KEY_HEAD = Layout(_split_by_key_head, _join_by_key_head)


# Rows ---------------------------------------------------------------------------------------------


def tensor(theirs: str, ours: str, layout: Layout = AS_IS) -> tuple[Row, ...]:
    """The row of one tensor that fills one leaf."""
    return (Row(theirs, (ours,), layout),)


def dense(theirs: str, ours: str) -> tuple[Row, ...]:
    """The rows of a Dense layer: its weight, stored as (out, in), and its bias."""
    return (
        Row(f"{theirs}.weight", (f"{ours}/kernel",), TRANSPOSED),
        Row(f"{theirs}.bias", (f"{ours}/bias",), AS_IS),
    )


def conv1d(theirs: str, ours: str) -> tuple[Row, ...]:
    """The rows of a Dense layer that is stored as (in, out), as GPT-2 does."""
    return (
        Row(f"{theirs}.weight", (f"{ours}/kernel",), AS_IS),
        Row(f"{theirs}.bias", (f"{ours}/bias",), AS_IS),
    )


def several(
    theirs: str, ours: Sequence[str], layout: Layout = ONE_AFTER_ANOTHER
) -> tuple[Row, ...]:
    """The rows of one Dense layer that holds several: its weight and its bias."""
    kernels = tuple(f"{path}/kernel" for path in ours)
    biases = tuple(f"{path}/bias" for path in ours)
    return (
        Row(f"{theirs}.weight", kernels, layout),
        Row(f"{theirs}.bias", biases, layout),
    )


def norm(theirs: str, ours: str) -> tuple[Row, ...]:
    """The rows of a norm: its gain and its bias."""
    return (
        Row(f"{theirs}.weight", (f"{ours}/weight",), AS_IS),
        Row(f"{theirs}.bias", (f"{ours}/bias",), AS_IS),
    )
