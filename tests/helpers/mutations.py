"""Small programs with lawful foldings, and these foldings with one mistake in each."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from traced import normal
from two_layers import (
    feed_forward,
    language_model,
    layer_norm,
    parameters,
    residual,
    rms,
    values,
)

from sqjax.folding.graph import Graph, Group, LabelMap
from sqjax.folding.space import Along, Space
from sqjax.numerics.prime_field import Residues, draw, matmul, mul, reflected
from sqjax.proving.changes import mirrors, moved, scaled, without_gains


class Small(NamedTuple):
    """A program, and the spaces of it that may be rotated, or whose channels may change places."""

    fn: Callable[..., Any]
    params: dict[str, Any]
    inputs: tuple[Any, ...]
    spaces: tuple[Space, ...] = ()
    permutations: tuple[Space, ...] = ()


SIZE, HEADS = 6, 2


def square(*names):
    return {name: normal(SIZE, SIZE, seed=seed) for seed, name in enumerate(names)}


def attended(p, x):
    q, k, v = (x @ p[name] for name in "qkv")
    return jax.nn.softmax(q @ k.T) @ v @ p["o"]


def fused(p, x):
    """Queries, keys and values of two heads in one kernel."""
    q, k, v = (y.reshape(len(x), HEADS, -1) for y in jnp.split(x @ p["qkv"], 3, 1))
    weights = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k))
    return jnp.einsum("hqk,khd->qhd", weights, v).reshape(len(x), -1) @ p["o"]


#: Of the models every row of the table is looked up, or a mistake in it would change nothing.
IDS = jnp.array([3, 0, 5, 2, 6, 5, 1, 4])
MODEL, BIASED = parameters(), parameters(biased=True)
BLOCKS = (feed_forward("0"), feed_forward("1"))
#: Where the heads of `fused` lie, in the values' part of its kernel and in the next one.
FUSED = (("qkv", Along(1, HEADS, 1, 2 * SIZE)), ("o", Along(0, HEADS)))
PROGRAMS = {
    "gated": Small(
        lambda p, x: (jax.nn.silu(x @ p["a"]) * (x @ p["b"])) @ p["c"],
        square(*"abc"),
        (normal(4, 6),),
        (),
        (Space("c", 6, (("a", Along(1)), ("b", Along(1)), ("c", Along(0)))),),
    ),
    "relu": Small(
        lambda p, x: jax.nn.relu(x @ p["a"] + p["bias"][None]) @ p["b"],
        square(*"ab") | {"bias": normal(6)},
        (normal(9, 6),),
        (),
        (Space("b", 6, (("a", Along(1)), ("bias", Along(0)), ("b", Along(0)))),),
    ),
    "attention": Small(
        attended,
        square(*"qkvo"),
        (normal(4, 6),),
        (
            Space("o", 6, (("v", Along(1)), ("o", Along(0)))),
            Space("k", 6, (("q", Along(1)), ("k", Along(1)))),
        ),
    ),
    "fused attention": Small(
        fused,
        {"qkv": normal(SIZE, 3 * SIZE), "o": normal(SIZE, SIZE)},
        (normal(4, 6),),
        (Space("o", SIZE // HEADS, FUSED),),
    ),
    "residual": Small(
        lambda p, x: rms((y := x @ p["e"]) + jnp.tanh(rms(y) * p["g"][None] @ p["a"]) @ p["b"]) @ p["c"],
        square(*"eabc") | {"g": normal(6)},
        (normal(4, 6),),
        (Space("e", 6, (("e", Along(1)), *((w, Along(0)) for w in "ac"), ("b", Along(1))), ("g",)),),
    ),
    "means": Small(
        lambda p, x: layer_norm(x @ p["e"] + p["bias"][None]) @ p["w"],
        square(*"ew") | {"bias": normal(6)},
        (normal(4, 6),),
        (Space("w", 6, (("e", Along(1)), ("bias", Along(0)), ("w", Along(0))), (), True),),
    ),
    "1 + w": Small(
        lambda p, x: rms(x) * (1 + p["g"])[None] @ p["a"],
        square("a") | {"g": normal(6)},
        (normal(4, 6),),
    ),
    "a model": Small(
        language_model(rms), MODEL, (IDS,), (residual(MODEL), values("0"), values("1")), BLOCKS
    ),
    "a model of LayerNorms": Small(
        language_model(layer_norm),
        BIASED,
        (IDS,),
        (residual(BIASED, keeps_ones=True), values("0"), values("1")),
        BLOCKS,
    ),
}  # fmt: skip

Leaves = dict[str, Any]


# Scales -------------------------------------------------------------------------------------------


def wrong_labels(group: Group, rng: np.random.Generator, elements: int = 1) -> Iterator[Group]:
    """The group with one leaf forgotten, inverted, shifted by a channel, or wrong in one element."""
    for number, (path, labels) in enumerate(group.leaves):
        array = labels.array
        wrong = [0 * array, -array, np.roll(array, 1)]
        for _ in range(elements):
            one = array.copy()
            one[tuple(rng.integers(n) for n in one.shape)] = 0
            wrong.append(one)
        for other in wrong:
            if not np.array_equal(other, array):
                leaves = [*group.leaves]
                leaves[number] = path, LabelMap.of(other)
                yield group._replace(leaves=tuple(leaves))


def wrong_scales(
    graph: Graph, leaves: Leaves, rng: np.random.Generator, elements: int
) -> Iterator[Leaves]:
    """The leaves after each group's scales, with one mistake."""
    for group in graph.groups:
        drawn = draw(rng, (group.size,))
        roots = mul(drawn, drawn)
        for wrong in wrong_labels(group, rng, elements):
            yield scaled(leaves, graph, wrong, roots)
        if {path for path, _ in group.leaves} & {path for path, _ in graph.offsets}:
            yield scaled(leaves, graph._replace(offsets=()), group, roots)


# Rotations and orders -----------------------------------------------------------------------------

Act = Callable[[Residues], Residues]


def rotation_of(vectors: Sequence[Residues]) -> Act:
    """The product of reflections, as a matrix."""
    q = np.eye(vectors[0].size, dtype=np.uint32)
    for v in vectors:
        q = reflected(q, v)
    return lambda x: matmul(x.reshape(-1, len(q)), q).reshape(x.shape)


def acts_of(space: Space, rng: np.random.Generator, permuted: bool) -> tuple[Act, list[Act]]:
    """A lawful change of a space, and others: its inverse, one of its own, none, one with a factor."""
    if permuted:
        circle = rng.permutation(space.size)
        order, other = np.empty((2, space.size), int)
        order[circle], other[circle] = np.roll(circle, 1), np.roll(circle, 2)
        right, *wrong = ((lambda x, by=by: x[..., by]) for by in (order, np.argsort(order), other))
    else:
        vectors = mirrors(space, rng)
        right = rotation_of(vectors)
        wrong = [rotation_of(vectors[::-1]), rotation_of(mirrors(space, rng))]
    return right, [*wrong, lambda x: x, lambda x: mul(right(x), np.uint32(4))]


def all_by(act: Act, space: Space, leaves: Leaves) -> Leaves:
    """The leaves of a space after its change."""
    return moved(leaves, space.size, space.leaves, act)


def wrong_moves(
    space: Space, graph: Graph, leaves: Leaves, rng: np.random.Generator, permuted: bool
) -> Iterator[Leaves]:
    """The leaves after a rotation, or another order, of a space, with one mistake."""
    right, wrong = acts_of(space, rng, permuted)
    folded = without_gains(leaves, graph, space)
    after = all_by(right, space, folded)
    for path, along, act in wrong_actions(space, leaves, right, wrong):
        yield {**after, path: moved(folded, space.size, [(path, along)], act)[path]}
    for gain in space.gains:
        forgetful = space._replace(gains=tuple(x for x in space.gains if x != gain))
        yield all_by(right, space, without_gains(leaves, graph, forgetful))
    if space.keeps_ones:
        moves_ones, _ = acts_of(space._replace(keeps_ones=False), rng, permuted=False)
        yield all_by(moves_ones, space, folded)


def right_move(
    space: Space, graph: Graph, leaves: Leaves, rng: np.random.Generator, permuted: bool
) -> Leaves:
    right, _ = acts_of(space, rng, permuted)
    return all_by(right, space, without_gains(leaves, graph, space))


def wrong_actions(
    space: Space, leaves: Leaves, right: Act, wrong: Sequence[Act]
) -> Iterator[tuple[str, Along, Act]]:
    """What one leaf gets in place of what is right: at another place, by another act, or at all."""
    shapes = {path: x.residues.shape for path, x in leaves.items()}
    for path, along in space.leaves:
        for other in wrong_places(along, space.size, shapes[path]):
            yield path, other, right
        for act in wrong:
            yield path, along, act
    inside = {path for path, _ in space.leaves} | {*space.gains}
    for path in sorted(shapes.keys() - inside):
        for axis, length in enumerate(shapes[path]):
            if length == space.size:
                yield path, Along(axis), right


def wrong_places(along: Along, size: int, shape: tuple[int, ...]) -> Iterator[Along]:
    """Along other axes; one further; the factors exchanged; of some of the heads only."""
    length = along.length(size)
    places = [along.at(axis) for axis in range(len(shape))]
    places += [along.at(along.axis, along.start + step) for step in (-length, -1, 1)]
    places += [along._replace(before=along.after, after=along.before)]
    if along.before > 1:
        places += [along._replace(before=along.before - 1)]
    for other in dict.fromkeys(places):
        fits = 0 <= other.start <= shape[other.axis] - other.length(size)
        if fits and other != along:
            yield other
