"""Changes of leaves in a prime field: scales of groups, rotations and permutations of spaces."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sqjax.folding.graph import Graph, Group
from sqjax.folding.labels import DEGREE
from sqjax.folding.space import Along, Space
from sqjax.numerics.prime_field import (
    Residues,
    add,
    draw,
    embed,
    inverse,
    matmul,
    mul,
    power,
    reflected,
    sub,
    total,
)
from sqjax.proving.values import Field, Value

#: {path: what the leaf holds}.
Leaves = Mapping[str, Value]


class Change(NamedTuple):
    """A change of leaves that shall leave a function what it is.

    Attributes:
        name: what it is called in a `FieldProof`.
        make: the leaves before -> those after. Raises `Unprovable`.
    """

    name: str
    make: Callable[[Leaves], Leaves]


class Unprovable(Exception):
    """A change that can not be made; the text says why."""


# Scales -------------------------------------------------------------------------------------------


def scaled(
    leaves: Leaves, graph: Graph, group: Group, roots: Residues
) -> dict[str, Value]:
    """The leaves with the scales of one group folded in, as `sqjax.fold` does it.

    Args:
        leaves: before.
        graph: tells which leaves are read as c + leaf.
        group: the group.
        roots: (group.size,), the `group.degree`-th roots of the scales. (Of a scale itself a leaf
            may carry a root, and not every residue has one.)
    """
    offsets = dict(graph.offsets)
    after = dict(leaves)
    for path, labels in group.leaves:
        x = _residues(after, path)
        _check_labels(group, path, labels.array, x)
        factors = _factors(labels.array, roots, group.degree)
        offset = embed(np.asarray(offsets.get(path, 0.0)))
        after[path] = Field(sub(mul(add(x, offset), factors), offset))
    return after


def _check_labels(
    group: Group, path: str, labels: np.ndarray, x: Residues
) -> None:
    """Raises `Unprovable` for labels that are not of this leaf and this group."""
    fits = labels.ndim == x.ndim and all(
        n in (1, m) for n, m in zip(labels.shape, x.shape, strict=True)
    )
    size = np.abs(labels[labels != 0].astype(np.int64)) - 1
    if not fits or (size % DEGREE >= group.size).any():
        raise Unprovable(
            f"the labels of {path}, of shape {labels.shape}, do not fit its shape {x.shape} or the "
            f"{group.size} scales of {group.name}"
        )
    if (group.degree % (size // DEGREE + 1)).any():
        raise Unprovable(
            f"{path} carries another root of the scales than {group.name} has"
        )


def _factors(labels: np.ndarray, roots: Residues, degree: int) -> Residues:
    """What each element is multiplied by: s[c] where the label is c + 1, 1 / s[c] where it is -(c +
    1), its d-th root where (d - 1) * DEGREE has been added to the label.
    """
    size = np.maximum(np.abs(labels.astype(np.int64)) - 1, 0)
    own_degrees, channels = size // DEGREE + 1, size % DEGREE
    factors = np.ones(labels.shape, np.uint32)
    for own in np.unique(own_degrees[labels != 0]).tolist():
        here = (own_degrees == own) & (labels != 0)
        factor = power(roots, degree // own)
        inverted = inverse(factor)
        chosen = channels[here]
        factors[here] = np.where(
            labels[here] > 0, factor[chosen], inverted[chosen]
        )
    return factors


def scaling(graph: Graph, group: Group, rng: np.random.Generator) -> Change:
    """A change of scale of one group, by random squares: these count as positive."""
    drawn = draw(rng, (group.size,))
    roots = mul(drawn, drawn)
    return Change(
        f"scales of {group.name}",
        lambda leaves: scaled(leaves, graph, group, roots),
    )


# Rotations and permutations -----------------------------------------------------------------------


def moved(
    leaves: Leaves,
    size: int,
    places: Sequence[tuple[str, Along]],
    act: Callable[[Residues], Residues],
) -> dict[str, Value]:
    """The leaves, each of them changed by `act` where a space of this size lies.

    `act` takes arrays whose last axis is the space.
    """
    if not places:
        raise Unprovable("the space has no leaves")
    after = dict(leaves)
    for path, along in places:
        x = _residues(after, path)
        _check_place(path, x, along, size)
        last = along.start + along.length(size)
        here = (*[slice(None)] * along.axis, slice(along.start, last))
        head, tail = x.shape[: along.axis], x.shape[along.axis + 1 :]
        split = (*head, along.before, size, along.after, *tail)
        axis = along.axis + 1
        made = act(np.moveaxis(x[here].reshape(split), axis, -1))
        whole = x.copy()
        whole[here] = np.moveaxis(made, -1, axis).reshape(x[here].shape)
        after[path] = Field(whole)
    return after


def _check_place(path: str, x: Residues, along: Along, size: int) -> None:
    """Raises `Unprovable` if a space of this size does not lie in an array of this shape."""
    if not 0 <= along.axis < x.ndim:
        raise Unprovable(f"{path} of shape {x.shape} has no axis {along}")
    last = along.start + along.length(size)
    if min(size, along.before, along.after) < 1 or not (
        along.start >= 0 and last <= x.shape[along.axis]
    ):
        raise Unprovable(
            f"a space of size {size} does not fit {path} of shape {x.shape} {along}"
        )


#: A rotation is a product of so many reflections. One alone is its own transpose, so a Q in the
#: place of its transpose would not be seen; and an even number of them never turns the space
#: inside out, so what holds only for determinants of 1, as x1 y2 - x2 y1, would pass.
REFLECTIONS = 5


def mirrors(
    space: Space, rng: np.random.Generator, count: int = REFLECTIONS
) -> list[Residues]:
    """Random vectors v, with v . v not 0; where the space keeps ones, with the sum 0."""
    found: list[Residues] = []
    while len(found) < count:
        v = draw(rng, (space.size,))
        if space.keeps_ones:
            mean = mul(total(v, (0,)), inverse(np.uint32(space.size)))
            v = sub(v, mean)
        # Of size 1 none keeps ones but the identity, which 0 . v = 0 is taken for.
        if int(matmul(v[None], v[:, None])[0, 0]) or space.size == 1:
            found.append(v)
    return found


def rotation(space: Space, graph: Graph, rng: np.random.Generator) -> Change:
    """A random orthogonal Q for one space, after its gains have been folded into what is behind."""
    vectors = mirrors(space, rng)

    def act(x: Residues) -> Residues:
        for v in vectors:
            x = reflected(x, v)
        return x

    return Change(
        f"rotation of {space.name}",
        lambda leaves: moved(
            without_gains(leaves, graph, space), space.size, space.leaves, act
        ),
    )


def permutation(space: Space, graph: Graph, seed: int, number: int) -> Change:
    """Another order of the elements of one space, after its gains have been folded away.

    The elements stand in a random circle. In trials of an even number each takes the place of the
    next one, in the others two neighbours change places: of these two orders all are composed.
    """
    circle = np.random.default_rng([seed, space.size]).permutation(space.size)
    order = np.arange(space.size)
    moving = circle[:2] if number % 2 else circle
    order[moving] = np.roll(moving, 1)
    return Change(
        f"permutation of {space.name}",
        lambda leaves: moved(
            without_gains(leaves, graph, space),
            space.size,
            space.leaves,
            lambda x: x[..., order],
        ),
    )


def without_gains(leaves: Leaves, graph: Graph, space: Space) -> Leaves:
    """The leaves with all gains of a space folded into the kernels behind them: the gains are ones
    then.

    Raises:
        Unprovable: no group folds a gain, or not to ones.
    """
    for gain in space.gains:
        if (_gain(leaves, graph, gain) != 1).any():
            leaves = _without_gain(leaves, graph, gain)
    for gain in space.gains:
        if (_gain(leaves, graph, gain) != 1).any():
            raise Unprovable(
                f"the gain {gain} does not become ones: its group has one scale for several of "
                "its elements, or another gain has the same"
            )
    return leaves


def _gain(leaves: Leaves, graph: Graph, path: str) -> Residues:
    """A leaf as the program reads it: c + leaf, where it does so."""
    offset = embed(np.asarray(dict(graph.offsets).get(path, 0.0)))
    return add(_residues(leaves, path), offset)


def _without_gain(leaves: Leaves, graph: Graph, gain: str) -> Leaves:
    groups = [group for group in graph.groups if gain in group.absorbers]
    if not groups:
        raise Unprovable(
            f"no group folds the gain {gain}, and Q does not pass a gain that is not ones"
        )
    for group in groups:
        labels = dict(group.leaves)[gain].array
        value = _gain(leaves, graph, gain)
        roots = _roots_that_fold(labels, value, group)
        leaves = scaled(leaves, graph, group, roots)
    return leaves


def _roots_that_fold(
    labels: np.ndarray, value: Residues, group: Group
) -> Residues:
    """The roots of the scales by which a gain is divided by itself; 1 for all other channels."""
    labels = np.broadcast_to(labels, value.shape)
    divided = labels < 0
    size = np.abs(labels[divided].astype(np.int64)) - 1
    if (size >= DEGREE).any() or group.degree > 1:
        raise Unprovable(f"{group.name} folds a gain by its root")
    roots = np.ones(group.size, np.uint32)
    roots[size] = value[divided]
    return roots


def _residues(leaves: Leaves, path: str) -> Residues:
    leaf: Any = leaves.get(path)
    if not isinstance(leaf, Field):
        raise Unprovable(f"{path} is no leaf of floats")
    return leaf.residues
