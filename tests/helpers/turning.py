"""Leaves turned in NumPy, from the data of spaces alone; and spaces that are changed a little."""

import jax
import numpy as np

from sqjax._trees import named_leaves
from sqjax.folding.space import Along, Space


def written(space):
    """A space as it is written by hand: without names, its leaves in order."""
    return space.effect._replace(leaves=tuple(sorted(space.leaves)))


def rotation(rng, space):
    """A random orthogonal matrix; where ones are kept it acts on what is orthogonal to these."""
    size = space.size
    if not space.keeps_ones:
        return np.linalg.qr(rng.normal(size=(size, size)))[0]
    basis = np.linalg.qr(np.column_stack([np.ones(size), rng.normal(size=(size, size - 1))]))[0]
    inner = np.eye(size)
    inner[1:, 1:] = np.linalg.qr(rng.normal(size=(size - 1, size - 1)))[0]
    return basis @ inner @ basis.T


def turned_leaf(leaf, along, q):
    """x Q along an axis, or along a factor or a part of it."""
    out = np.moveaxis(np.array(leaf), along.axis, -1)
    part = slice(along.start, along.start + along.length(len(q)))
    vectors = out[..., part].reshape(*out.shape[:-1], along.before, len(q), along.after)
    turned = np.einsum("...bia,ij->...bja", vectors, q)
    out[..., part] = turned.reshape(out[..., part].shape)
    return np.moveaxis(out, -1, along.axis)


def turned(params, spaces, seed=0):
    rng = np.random.default_rng(seed)
    paths, leaves, treedef = named_leaves(params)
    by_path = dict(zip(paths, leaves, strict=True))
    for space in spaces:
        q = rotation(rng, space)
        for path, along in space.leaves:
            by_path[path] = turned_leaf(by_path[path], along, q)
    return jax.tree.unflatten(treedef, by_path.values())


def mutations(space: Space):
    """Spaces with one thing wrong, or changed at least."""
    leaves = space.leaves
    for i, (path, along) in enumerate(leaves):
        others = leaves[:i] + leaves[i + 1 :]
        yield space._replace(leaves=others)
        yield space._replace(leaves=(*leaves, leaves[i]))
        changes = [
            along._replace(axis=1 - along.axis),
            along._replace(axis=along.axis + 1),
            along._replace(before=along.after, after=along.before),
            along._replace(before=along.before + 1),
            along._replace(before=max(1, along.before - 1)),
            along._replace(start=along.start + 1),
            along._replace(start=max(0, along.start - 1)),
            along._replace(start=along.start + space.size),
        ]
        for change in changes:
            yield space._replace(leaves=(*others[:i], (path, change), *others[i:]))
    for gain in space.gains:
        yield space._replace(gains=tuple(g for g in space.gains if g != gain))
        yield space._replace(leaves=(*leaves, (gain, Along(0))))
    if space.keeps_ones:
        yield space._replace(keeps_ones=False)
    yield space._replace(size=space.size - 1)
    yield space._replace(size=space.size + 1)
