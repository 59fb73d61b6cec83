"""Rotations into parameters: gains moved out of the way, and leaves multiplied by Q."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sqjax._trees import (
    PyTree,
    is_concrete,
    map_named,
    named_leaves,
    replicated,
)
from sqjax.folding.apply import fold_any_sign
from sqjax.folding.graph import Graph, Group
from sqjax.folding.space import Along, Space

_ADVICE = (
    "A tied head behind a norm is the usual reason: give it a weight of its own (of a model of "
    "ours: sqjax.models.untie), or leave this space out with spaces="
)


def with_gains_of_one(
    params: PyTree, graph: Graph, spaces: Iterable[Space]
) -> PyTree:
    """The same function, in which the gains of these spaces are ones.

    A gain that multiplies channels stands in the way of a rotation of them, because diag(g) and Q
    do not commute. As an ordinary fold with s = g it goes into the kernels behind: (x g) W = x (g
    W). Here s may be negative, and zero where nothing else is divided by it, if the group has no
    leaves but those that turn with the space: between them there are only equations that a
    rotation, and so a change of sign, may pass.

    Raises:
        ValueError: no fold group can take a gain that is not ones; or it is to turn in another
            space, after which it would not be ones.
    """
    s, ones = gain_scales(params, graph, spaces)
    folded = fold_any_sign(params, graph, s)
    offsets = dict(graph.offsets)

    # g / g is 1 but for rounding, and not even that where g is 0: so ones are written.
    def exactly_one(path: str, leaf: Any) -> Any:
        if path not in ones or not ones[path].any():
            return leaf
        one = jnp.asarray(1 - offsets.get(path, 0.0), leaf.dtype)
        return jnp.where(ones[path], one, leaf)

    return map_named(exactly_one, folded)


def gain_scales(
    params: PyTree, graph: Graph, spaces: Iterable[Space]
) -> tuple[dict[str, Array], dict[str, np.ndarray]]:
    """({group: s} that makes the gains of these spaces ones, {gain: where it does}).

    Raises:
        ValueError: as `with_gains_of_one`.
    """
    spaces = list(spaces)  # an iterator could be read only once
    _check_turning_gains(spaces)
    gains = dict.fromkeys(gain for space in spaces for gain in space.gains)
    paths, leaves, _ = named_leaves(params)
    by_path = dict(zip(paths, leaves, strict=True))
    turning = {gain: _turning_axes(spaces, gain) for gain in gains}
    s: dict[str, Array] = {}
    ones: dict[str, np.ndarray] = {}
    for gain in gains:
        own, ones[gain] = _scales_and_channels(
            graph, gain, by_path[gain], set(gains)
        )
        for group in graph.groups:
            if group.name in own:
                _check_sign(group, gain, own[group.name], turning[gain])
        s |= own
    return s, ones


def _check_turning_gains(spaces: Sequence[Space]) -> None:
    """Raises ValueError where a gain of one space turns in another: it would not stay ones."""
    turning = {path: space.name for space in spaces for path, _ in space.leaves}
    for space in spaces:
        for gain in space.gains:
            if gain in turning:
                raise ValueError(
                    f"rotate: {gain} is a gain of the space {space.name}, and turns in the space "
                    f"{turning[gain]}; rotate one of the two, by spaces="
                )


def _scales_and_channels(
    graph: Graph, gain: str, leaf: Array, gains: set[str]
) -> tuple[dict[str, Array], np.ndarray]:
    """({group: s} that makes a gain ones, where in the gain that is)."""
    offset = dict(graph.offsets).get(gain, 0.0)
    # The gain is multiplied into kernels, so it keeps all digits that these have.
    array = replicated(jnp.asarray(leaf))
    wide = array.astype(jnp.promote_types(array.dtype, jnp.float32))
    value = wide + offset if offset else wide
    covered = np.zeros(leaf.shape, bool)
    s: dict[str, Array] = {}
    for group in graph.groups:
        labels = dict(group.leaves).get(gain)
        # Negative labels mark what is divided by s, as a gain is by itself.
        if labels is None or not (labels.array < 0).any():
            continue
        _check_group(group, gain, gains)
        absorbing = np.broadcast_to(labels.array, leaf.shape)
        s[group.name] = _scales_of(group, gain, absorbing, value)
        covered |= absorbing < 0
    _check_others(graph, gain, value, covered)
    _check_divided(graph, gain, s)
    return s, covered


def _turning_axes(spaces: Iterable[Space], gain: str) -> dict[str, set[int]]:
    """{leaf: the axes that turn} of the spaces that a gain multiplies."""
    axes: dict[str, set[int]] = {}
    for space in spaces:
        if gain in space.gains:
            for path, along in space.leaves:
                axes.setdefault(path, set()).add(along.axis)
    return axes


def _check_sign(
    group: Group, gain: str, s: Array, turning: Mapping[str, set[int]]
) -> None:
    """A group that also reaches leaves outside the space takes positive gains only, because there a
    relu or an abs may stand between.
    """
    if is_concrete(s) and (np.asarray(s) > 0).all():
        return
    # A leaf turns with the space if an axis that turns is the one along which s differs.
    outside = [
        path
        for path, labels in group.leaves
        if path != gain
        and not turning.get(path, set()) & _varying_axes(labels.array)
    ]
    if outside:
        raise ValueError(
            f"rotate: {gain} is not known to be positive everywhere, and its group {group.name} "
            f"also scales {outside} outside the space, where a change of sign may not pass. "
            "Leave this space out with spaces="
        )


def _varying_axes(labels: np.ndarray) -> set[int]:
    """The axes along which a leaf has several channels of a group."""
    # A label of 0 is no channel, so it must not count as the least one.
    channels, known = np.abs(labels), labels != 0
    largest = np.iinfo(channels.dtype).max
    return {
        axis
        for axis in range(labels.ndim)
        if (
            channels.max(axis) > np.where(known, channels, largest).min(axis)
        ).any()
    }


def _scales_of(
    group: Group, gain: str, labels: np.ndarray, value: Array
) -> Array:
    """s of a group: the gain itself at every channel.

    Example: of labels [-1, -2, -2] and a gain [3, 5, 5] it is [3, 5].
    """
    here = labels < 0
    channels = -labels[here] - 1  # labels count channels from 1
    own = value[here]
    s = jnp.ones(group.size, value.dtype).at[channels].set(own)
    # Of channels that share one scale the last was taken; all must agree with it.
    if is_concrete(s) and not np.array_equal(s[channels], own):
        raise ValueError(
            f"rotate: {gain} has channels that must be scaled together, in the group "
            f"{group.name}, and they are not equal, so it can not be made ones. {_ADVICE}"
        )
    return s


def _check_group(group: Group, gain: str, gains: set[str]) -> None:
    """What a gain may be folded by: a group that rescales no other gain, and takes no root."""
    others = gains.intersection(dict(group.leaves)) - {gain}
    if others or group.degree != 1:
        why = f"{sorted(others)} with it" if others else "a root of it"
        raise ValueError(
            f"rotate: {gain} can not be made ones, because the group {group.name} scales {why}; "
            "leave this space out with spaces="
        )


def _check_divided(graph: Graph, gain: str, s: Mapping[str, Array]) -> None:
    """A gain of 0 may go into the kernels; a bias behind it can not be divided by it."""
    for group in graph.groups:
        if group.name not in s or not is_concrete(s[group.name]):
            continue
        others = [path for path in group.absorbers if path != gain]
        zero = np.flatnonzero(np.asarray(s[group.name]) == 0)
        if others and zero.size:
            raise ValueError(
                f"rotate: {gain} is 0 at channel {zero[0]}, and {others} can not be divided by "
                f"it. {_ADVICE}"
            )


def _check_others(
    graph: Graph, gain: str, value: Array, covered: np.ndarray
) -> None:
    """What no group folds must be one already."""
    if covered.all():
        return
    if is_concrete(value) and (np.asarray(value)[~covered] == 1).all():
        return
    known = "; ".join(reason for path, reason in graph.refused if path == gain)
    because = f" ({known})" if known else ""
    raise ValueError(
        f"rotate: {gain} multiplies channels of a space, and no fold group can move it into the "
        f"weights behind it{because}; expected ones. print(stats.graph) tells why. {_ADVICE}"
    )


def turned(
    params: PyTree, turns: Iterable[tuple[Space, Float[Array, "size size"]]]
) -> PyTree:
    """The parameters with every leaf of these spaces multiplied by its Q.

    Computed in float32, or the leaf's own dtype if that is wider, and cast back once.
    """
    of_leaf: dict[str, list[tuple[Along, Array]]] = {}
    for space, q in turns:
        matrix = replicated(jnp.asarray(q))
        for path, along in space.leaves:
            of_leaf.setdefault(path, []).append((along, matrix))

    def turn(path: str, leaf: Any) -> Any:
        if path not in of_leaf:
            return leaf
        array = replicated(jnp.asarray(leaf))
        wide = jnp.promote_types(array.dtype, jnp.float32)
        result = array.astype(wide)
        for along, q in of_leaf[path]:
            result = turned_along(result, q.astype(wide), along)
        return _placed_as(leaf, result.astype(array.dtype))

    return map_named(turn, params)


def _placed_as(leaf: Any, result: Array) -> Array:
    """An array on the devices that a leaf lies on, which a product may have left."""
    of_type = jax.typeof(leaf).sharding
    if any(entry is not None for entry in of_type.spec):
        return jax.sharding.reshard(result, of_type)
    # Other shardings are known of values only.
    if (
        isinstance(leaf, jax.Array)
        and is_concrete(leaf)
        and is_concrete(result)
    ):
        return jax.device_put(result, leaf.sharding)
    return result


@partial(jax.jit, static_argnames="along")
def turned_along(x: Array, q: Float[Array, "size size"], along: Along) -> Array:
    """x multiplied by q where `along` says.

    Example: x of shape (in, 576) and Along(1, before=9) with q of 64 x 64 is seen as (in, 9, 64,
    1), and each of the 9 vectors of 64 is multiplied by q.
    """
    size = len(q)
    # Only a part of the axis may turn, such as the values beside queries and keys.
    last = along.start + along.length(size)
    here = (*[slice(None)] * along.axis, slice(along.start, last))
    part = x[here]
    head, tail = part.shape[: along.axis], part.shape[along.axis + 1 :]
    split = part.reshape(*head, along.before, size, along.after, *tail)
    axis = along.axis + 1
    # `tensordot` puts the turned axis last.
    product = jnp.tensordot(split, q, axes=([axis], [0]), precision="highest")
    result = jnp.moveaxis(product, -1, axis).reshape(part.shape)
    return result if result.shape == x.shape else x.at[here].set(result)
