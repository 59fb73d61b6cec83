"""The activation and the weight of one site as matrices, to be looked at."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from sqjax._trees import PyTree, named_leaves
from sqjax.calibration.analysis import traced_program
from sqjax.folding.groups import Survey
from sqjax.folding.sites import Place
from sqjax.program.evaluate import evaluate
from sqjax.program.facts import Program
from sqjax.program.trace import array_leaves

#: Rows and columns of blocks of a surface, at most: more can not be told apart.
BLOCKS = 40, 64


class Seen(NamedTuple):
    """What meets at one site, float32.

    Attributes:
        activation: |X|, (tokens, channels).
        weight: |W|, (outputs, channels).
    """

    activation: np.ndarray
    weight: np.ndarray


def seen_at(
    fn: Callable[..., Any], params: PyTree, batch: Any, path: str
) -> Seen:
    """The activation that meets a site in a batch, and the site's weight.

    Of a stack of layers or experts it is the matrix whose activation is largest.

    Args:
        fn, params, batch: as for `sqjax.site_errors`.
        path: the site.

    Raises:
        ValueError: no activation meets this leaf.
    """
    args = batch if isinstance(batch, tuple) else (batch,)
    traced = traced_program(fn, params, args, 0).traced
    program = Program(traced)
    places = [p for p in Survey.of(program, {}).places if p.site.path == path]
    if not places:
        raise ValueError(
            f"{path}: no matmul of an activation meets this leaf; "
            "print(stats.graph) lists the sites"
        )
    # Of several matmuls that read one leaf the first: all of them see its channels.
    place = places[0]
    x = _activation(program, place, params, args)
    paths, leaves, _ = named_leaves(params)
    weight = np.asarray(dict(zip(paths, leaves, strict=True))[path])
    return _matched(x, _weight(weight, place), place)


def _activation(
    program: Program, place: Place, params: PyTree, args: tuple[Any, ...]
) -> np.ndarray:
    """|X| as (matrices, tokens, channels)."""
    # The values themselves: a probe that measures would lose what is to be drawn.
    probes = {place.activation: lambda x: x}

    @jax.jit
    def run(leaves, inputs):
        _, measured = evaluate(program, leaves, inputs, probes)
        return measured[place.activation]

    x = run(jax.tree.leaves(params), array_leaves(args))
    x = np.abs(np.asarray(x, np.float32))
    # Outermost are the steps of scans around it, which an inner axis does not count.
    steps = x.ndim - len(program.shape(place.activation))
    batch = [steps + axis for axis in place.axes[: place.batch]]
    features = [steps + axis for axis in place.axes[place.batch :]]
    ends = *range(steps), *batch
    tokens = [a for a in range(x.ndim) if a not in (*ends, *features)]
    sizes = [
        int(np.prod([x.shape[a] for a in axes])) for axes in (ends, tokens)
    ]
    return x.transpose(*ends, *tokens, *features).reshape(*sizes, -1)


def _weight(weight: np.ndarray, place: Place) -> np.ndarray:
    """|W| as (matrices, outputs, channels)."""
    site = place.site
    ends = [a for a in range(weight.ndim) if a not in site.channel_axes]
    # The order of `_activation`: matrices, rows, channels.
    order = [*site.batch, *ends, *site.axes]
    matrices = int(np.prod([weight.shape[a] for a in site.batch], dtype=int))
    channels = int(np.prod([weight.shape[a] for a in site.axes]))
    moved = np.abs(weight.astype(np.float32)).transpose(order)
    return moved.reshape(matrices, -1, channels)


def _matched(x: np.ndarray, weight: np.ndarray, place: Place) -> Seen:
    """The matrix whose activation is largest, with its own weight."""
    which = int(x.reshape(len(x), -1).max(1).argmax())
    # Where x has no such axis (or others too), all matrices see one activation.
    own = which if len(x) == len(weight) else 0
    return Seen(x[which], weight[own])


def pooled(x: Any, rows: int, columns: int) -> tuple[tuple[float, ...], ...]:
    """The largest |x| of each block of a matrix, of at most so many rows and columns of blocks.

    Maxima, because a mean would hide the one channel in a thousand that a surface is drawn for.
    Three digits of each are kept. Example: (1, 2, -3, 4) in two columns is (2, 4).
    """
    x = np.abs(np.asarray(x, np.float32))
    for axis, most in enumerate((rows, columns)):
        size = x.shape[axis]
        # Blocks of nearly one size: 10 channels in 4 blocks begin at 0, 2, 5 and 7.
        starts = np.linspace(0, size, min(most, size), endpoint=False)
        x = np.maximum.reduceat(x, starts.astype(int), axis=axis)
    return tuple(
        tuple(float(f"{value:.3g}") for value in row) for row in x.tolist()
    )
