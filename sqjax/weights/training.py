"""Training around quantized weights: what is trained, and what stays, taken apart and merged."""

from collections.abc import Iterable
from typing import Any

import jax

from sqjax._arguments import expect
from sqjax._names import first_matches
from sqjax._trees import PyTree, is_float, named_leaves
from sqjax.weights.qtensor import is_tensor
from sqjax.weights.quant_weight import is_quantized


def split(
    qparams: PyTree, trainable: str | Iterable[str] = ""
) -> tuple[PyTree, PyTree]:
    """The float leaves that are trained, and everything else: (trained, frozen).

    Gradients and optimizers take floats, but codes are integers. So differentiate with respect to
    the first tree, and put both together inside the loss: `merge(trained, frozen)`. Adapters, norms
    and biases are trained so around int8 or int4 weights (QLoRA, Dettmers et al. 2023, arXiv
    2305.14314).

    Args:
        qparams: what `quantize` returned, or any tree of arrays.
        trainable: a regular expression, or several, searched in the leaves' paths: which float
            leaves are trained. By default all that are not quantized.

    Returns:
        Two trees with the paths of qparams; where one has a leaf, the other has None, which jax and
            optax take as "nothing here".

    Raises:
        ValueError: a pattern is no regular expression, or is found in no float leaf's path. (By
            default a tree without float leaves is no error: nothing is trained.)

    Examples:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x * p["norm"]) @ p["w"]
        >>> params, x = {"norm": jnp.ones(2), "w": jnp.ones((2, 3))}, jnp.array([[1.0, 16.0]])
        >>> qparams = sq.quantize(params, sq.calibrate(fn, params, [x]))
        >>> trained, frozen = sq.split(qparams)
        >>> loss = lambda trained, x: sq.quantized(fn)(sq.merge(trained, frozen), x).sum()
        >>> jax.grad(loss)(trained, x)
        {'norm': Array([ 3., 48.], dtype=float32), 'w': None}
    """
    paths, leaves, treedef = named_leaves(qparams, is_leaf=_is_whole)
    able = [
        path
        for path, x in zip(paths, leaves, strict=True)
        if is_float(x) and not _is_whole(x)
    ]
    is_known = isinstance(trainable, str | Iterable)
    expect(is_known, "split", "a pattern of names, or several", trainable)
    patterns = [trainable] if isinstance(trainable, str) else [*trainable]
    # By default all are trained that can be, even if there are none.
    if patterns == [""] and not able:
        patterns = []
    chosen = first_matches(patterns, able, "split pattern")
    trained: list[Any] = []
    frozen: list[Any] = []
    for path, x in zip(paths, leaves, strict=True):
        is_trained = chosen.get(path) is not None
        mine, other = (trained, frozen) if is_trained else (frozen, trained)
        mine.append(x)
        other.append(None)
    return treedef.unflatten(trained), treedef.unflatten(frozen)


def merge(trained: PyTree, frozen: PyTree) -> PyTree:
    """The whole tree again, of the two that `split` made; the trained one may have changed since.

    Raises:
        ValueError: the trees differ, or both have a leaf at one path; names it.

    Examples:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> trained, frozen = sq.split({"norm": jnp.ones(2), "step": jnp.int32(3)})
        >>> sq.merge(trained, frozen)["step"].item()
        3
    """
    paths, ours, treedef = named_leaves(trained, is_leaf=_is_part)
    names, theirs, _ = named_leaves(frozen, is_leaf=_is_part)
    if names != paths:
        odd = sorted(set(paths).symmetric_difference(names))
        raise ValueError(
            f"merge: expected the two trees that split made; they differ at {odd[:5]}"
        )
    whole = []
    for path, own, other in zip(paths, ours, theirs, strict=True):
        if own is not None and other is not None:
            raise ValueError(
                f"merge: {path} is in both trees; expected the two that split made"
            )
        whole.append(other if own is None else own)
    return jax.tree_util.tree_unflatten(treedef, whole)


def _is_whole(x: Any) -> bool:
    """Whether x is one leaf of ours, though jax sees a tree of arrays."""
    return is_quantized(x) or is_tensor(x)


def _is_part(x: Any) -> bool:
    return x is None or _is_whole(x)
