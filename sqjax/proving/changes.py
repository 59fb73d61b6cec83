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
    offsets, degree = dict(graph.offsets), group.degree
    after = dict(leaves)
    for path, labels in group.leaves:
        factors = _factors(labels.array, roots, degree)
        offset = embed(np.asarray(offsets.get(path, 0.0)))
        value = mul(add(_residues(after, path), offset), factors)
        after[path] = Field(sub(value, offset))
    return after


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
    places: Sequence[tuple[str, Along]],
    act: Callable[[Residues], Residues],
) -> dict[str, Value]:
    """The leaves, each of them changed by `act` along the axis where a space lies.

    `act` takes arrays with that axis, of the size of the space, last.
    """
    after = dict(leaves)
    for path, along in places:
        x = _residues(after, path)
        if not 0 <= along.axis < x.ndim:
            raise Unprovable(f"{path} of shape {x.shape} has no axis {along}")
        length, parts = x.shape[along.axis], along.before * along.after
        if length % parts:
            raise Unprovable(f"{path} of shape {x.shape} does not fit {along}")
        head, tail = x.shape[: along.axis], x.shape[along.axis + 1 :]
        split = (*head, along.before, length // parts, along.after, *tail)
        axis = along.axis + 1
        try:
            made = act(np.moveaxis(x.reshape(split), axis, -1))
        except (ValueError, IndexError) as misfit:
            raise Unprovable(
                f"{path} of shape {x.shape} does not fit {along}: {misfit}"
            ) from misfit
        after[path] = Field(np.moveaxis(made, -1, axis).reshape(x.shape))
    return after


#: A rotation is a product of so many reflections: one alone is its own transpose, so a Q in the
#: place of its transpose would not be seen.
REFLECTIONS = 4


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
            without_gains(leaves, graph, space), space.leaves, act
        ),
    )


def permutation(space: Space, rng: np.random.Generator) -> Change:
    """A random order of the elements of one space, in all its leaves."""
    order = rng.permutation(space.size)
    return Change(
        f"permutation of {space.name}",
        lambda leaves: moved(
            leaves, space.leaves, lambda x: _in_order(x, order)
        ),
    )


def _in_order(x: Residues, order: np.ndarray) -> Residues:
    if x.shape[-1] != len(order):
        raise ValueError(f"{x.shape[-1]} elements, not {len(order)}")
    return x[..., order]


def without_gains(leaves: Leaves, graph: Graph, space: Space) -> Leaves:
    """The leaves with all gains of a space folded into the kernels behind them: the gains are ones
    then.

    Raises:
        Unprovable: no group folds a gain, or not to ones.
    """
    offsets = dict(graph.offsets)
    for gain in space.gains:
        leaves = _without_gain(leaves, graph, gain)
    for gain in space.gains:
        value = add(
            _residues(leaves, gain), embed(np.asarray(offsets.get(gain, 0.0)))
        )
        if (value != 1).any():
            raise Unprovable(
                f"the gain {gain} does not become ones: its group has one scale for several of "
                "its elements, or another gain has the same"
            )
    return leaves


def _without_gain(leaves: Leaves, graph: Graph, gain: str) -> Leaves:
    groups = [group for group in graph.groups if gain in group.absorbers]
    if not groups:
        raise Unprovable(
            f"no group folds the gain {gain}, and Q does not pass a gain that is not ones"
        )
    offset = embed(np.asarray(dict(graph.offsets).get(gain, 0.0)))
    for group in groups:
        labels = dict(group.leaves)[gain].array
        value = add(_residues(leaves, gain), offset)
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
