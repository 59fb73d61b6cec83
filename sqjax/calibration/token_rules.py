"""How marks of tokens (see `sqjax.calibration.tokens`) pass through each primitive."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from sqjax._shapes import other_axes, runs, sizes_along
from sqjax.program.equations import Equation, Var
from sqjax.program.facts import Program
from sqjax.program.marks import Mark
from sqjax.program.primitives import (
    COMPARISONS,
    ELEMENTWISE,
    IDENTITIES,
    REDUCTIONS,
    RUNNING,
)

#: No token has flowed in; tokens that count; padding.
NOTHING, REAL, PADDING = 0, 1, 2


def is_boolean(program: Program, v: Var) -> bool:
    """Whether a variable holds booleans."""
    return program.avals[v].dtype == np.bool_


@dataclass(frozen=True)
class Call:
    """An equation that runs: what its rule may ask for.

    Attributes:
        program: what it is part of.
        sparse: variables whose zeros say that a token is not meant.
        equation: itself.
        operands, results: the values.
    """

    program: Program
    sparse: frozenset[Var]
    equation: Equation
    operands: Sequence[Any]
    results: Sequence[Any]

    @property
    def params(self) -> dict[str, Any]:
        """The primitive's parameters."""
        return self.equation.params

    def shape(self, operand: int = 0) -> tuple[int, ...]:
        """The shape of an operand."""
        return tuple(np.shape(self.operands[operand]))

    @property
    def new(self) -> tuple[int, ...]:
        """The shape of the result."""
        return self.program.shape(self.equation.outputs[0])


_Known = Sequence[Any]  # of each operand its mark, or None
_Rule = Callable[[Call, _Known], Sequence[Mark] | None]


# Shapes of marks ----------------------------------------------------------------------------------


def _full(
    mark: Array | None, shape: Sequence[int], axes: Sequence[int]
) -> Array:
    """A mark written out along these axes; NOTHING where there is none."""
    if mark is None:
        mark = jnp.full((1,) * len(shape), NOTHING, jnp.int8)
    sizes = [shape[a] if a in axes else n for a, n in enumerate(mark.shape)]
    return jnp.broadcast_to(mark, sizes)


def _varying(mark: Array | None) -> set[int]:
    """The axes along which a mark may vary."""
    return (
        set()
        if mark is None
        else {a for a, n in enumerate(mark.shape) if n != 1}
    )


def _largest(marks: Sequence[Array | None]) -> Array:
    """The largest mark of each element."""
    known = jax.tree.leaves(list(marks))  # None is no leaf
    rank = max(map(jnp.ndim, known))
    result = reduce(jnp.maximum, known)
    return result if rank else result.reshape(())


def _summed(mark: Array, axes: Sequence[int]) -> Array:
    """The mark of a sum over axes: REAL if something real is in it; the axes are dropped."""
    axes = tuple(axes)
    # Not the largest mark, which PADDING would be: a mean over real tokens and padding counts.
    real = (mark == REAL).any(axes)
    return jnp.where(real, jnp.int8(REAL), mark.max(axes, initial=NOTHING))


# Rules --------------------------------------------------------------------------------------------


def _elementwise(call: Call, marks: _Known) -> list[Mark]:
    ndim = len(call.new)
    fitting = [
        m if m is None or m.ndim == ndim else m.reshape((1,) * ndim)
        for m in marks
    ]
    return [_largest(fitting)] * len(call.equation.outputs)


def _each(call: Call, marks: _Known) -> list[Mark]:
    return list(marks)


def _transpose(call: Call, marks: _Known) -> list[Mark]:
    return [marks[0].transpose(call.params["permutation"])]


def _reshape(call: Call, marks: _Known) -> list[Mark] | None:
    """Runs of axes along which a mark does not vary keep the size 1, as in `labels.reshape`."""
    mark, old, new = marks[0], call.shape(), call.new
    if call.params.get("dimensions") is not None:
        return None
    if 0 in old:
        return [None]
    written, target = np.array(old, int), np.array(new, int)
    # Example: a mark (2, 7, 1) of x (2, 7, 16) becomes (14, 1) where x becomes (14, 16), because
    # only the first run, 2 * 7 = 14, is written out.
    for sources, targets in runs(old, new):
        if _varying(mark).isdisjoint(sources):
            written[sources] = 1
            target[targets] = 1
    return [jnp.broadcast_to(mark, written.tolist()).reshape(target.tolist())]


def _squeeze(call: Call, marks: _Known) -> list[Mark]:
    return [marks[0].squeeze(tuple(call.params["dimensions"]))]


def _broadcast(call: Call, marks: _Known) -> list[Mark]:
    mark, axes = marks[0], call.params["broadcast_dimensions"]
    sizes = [1] * len(call.new)
    for a, b in enumerate(axes):
        sizes[b] = mark.shape[a]
    return [lax.broadcast_in_dim(mark, sizes, axes)]


def _slice(call: Call, marks: _Known) -> list[Mark]:
    mark, params = marks[0], call.params
    strides = params["strides"] or (1,) * mark.ndim
    ends = zip(
        params["start_indices"], params["limit_indices"], strides, strict=True
    )
    # An axis of size 1 stands for all its positions, so that there is nothing to cut from it.
    index = [
        slice(*end) if size > 1 else slice(None)
        for end, size in zip(ends, mark.shape, strict=True)
    ]
    return [mark[tuple(index)]]


def _reverse(call: Call, marks: _Known) -> list[Mark]:
    return [lax.rev(marks[0], call.params["dimensions"])]


def _pad(call: Call, marks: _Known) -> list[Mark]:
    config = call.params["padding_config"]
    padded = [a for a, widths in enumerate(config) if any(widths)]
    # What is put around is of no token, so the mark varies along these axes from now on.
    mark = _full(marks[0], call.shape(), padded)
    return [lax.pad(mark, jnp.int8(NOTHING), config)]


def _tile(call: Call, marks: _Known) -> list[Mark]:
    mark = marks[0]
    reps = [
        n if size > 1 else 1
        for n, size in zip(call.params["reps"], mark.shape, strict=True)
    ]
    return [jnp.tile(mark, reps)]


def _stack(call: Call, marks: _Known) -> list[Mark]:
    axis = call.params["axis"]
    pieces = map(
        partial(jnp.expand_dims, axis=axis), _all_full(call, marks, [])
    )
    return [_along(list(pieces), axis)]


def _concatenate(call: Call, marks: _Known) -> list[Mark]:
    axis = call.params["dimension"]
    return [_along(_all_full(call, marks, [axis]), axis)]


def _all_full(call: Call, marks: _Known, axes: Sequence[int]) -> list[Array]:
    """The marks of all operands, written out along these axes."""
    return [_full(m, call.shape(i), axes) for i, m in enumerate(marks)]


def _along(pieces: Sequence[Array], axis: int) -> Array:
    """Pieces one after the other, which need not vary along the same other axes."""
    firsts = [_resized(p.shape, axis, 1) for p in pieces]
    shape = np.broadcast_shapes(*firsts)
    whole = [
        jnp.broadcast_to(p, _resized(shape, axis, p.shape[axis]))
        for p in pieces
    ]
    return jnp.concatenate(whole, axis)


def _resized(shape: Sequence[int], axis: int, size: int) -> tuple[int, ...]:
    """A shape with another size along one axis."""
    return (*shape[:axis], size, *shape[axis + 1 :])


def _split(call: Call, marks: _Known) -> list[Mark]:
    axis = call.params["axis"]
    mark = _full(marks[0], call.shape(), [axis])
    ends = np.cumsum(call.params["sizes"])[:-1].tolist()
    return list(jnp.split(mark, ends, axis))


def _reduce(call: Call, marks: _Known) -> list[Mark]:
    return [_summed(marks[0], call.params["axes"])]


def _sort(call: Call, marks: _Known) -> list[Mark]:
    """Marks are sorted along with what they mark."""
    axis = call.params["dimension"]
    if all(axis not in _varying(m) for m in marks):
        return list(marks)
    # lax.sort takes operands of one shape; the marks follow the values as operands that are no
    # keys.
    every = range(len(call.shape()))
    full = [_full(m, call.shape(), every) for m in marks]
    ordered = lax.sort(
        (*call.operands, *full),
        dimension=axis,
        is_stable=True,
        num_keys=call.params["num_keys"],
    )
    after = ordered[len(marks) :]
    return [m if marks[i] is not None else None for i, m in enumerate(after)]


def _top_k(call: Call, marks: _Known) -> list[Mark]:
    mark, shape = marks[0], call.shape()
    axis = call.params.get("axis", len(shape) - 1) % len(shape)
    if axis not in _varying(mark):
        return [mark, mark]
    # The second result of top_k holds the indices of what was chosen.
    full = _full(mark, shape, range(len(shape)))
    chosen = jnp.take_along_axis(full, call.results[1], axis)
    return [chosen, chosen]


def _cut_axes(whole: Sequence[int], part: Sequence[int]) -> list[int]:
    """The axes along which an array is larger than a part of it."""
    return np.flatnonzero(np.not_equal(whole, part)).tolist()


def _dynamic_slice(call: Call, marks: _Known) -> list[Mark]:
    mark, old, new = marks[0], call.shape(), call.new
    if mark is None:
        return [None]
    cut = _cut_axes(old, new)
    full = _full(mark, old, sorted(_varying(mark).intersection(cut)))
    starts, sizes = [], []
    for a, start in enumerate(call.operands[1:]):
        # Along an axis of size 1 every start is 0: lax would clamp another one to it anyhow.
        here = a in cut and full.shape[a] > 1
        starts.append(start if here else jnp.zeros_like(start))
        sizes.append(new[a] if here else full.shape[a])
    return [lax.dynamic_slice(full, starts, sizes)]


def _update(call: Call, marks: _Known) -> list[Mark]:
    old, part = call.shape(), call.shape(1)
    cut = _cut_axes(old, part)
    # Written out where the part is put in, and where either mark varies; elsewhere both have size
    # 1.
    axes = {*cut, *_varying(marks[0]), *_varying(marks[1])}
    operand, update = (
        _full(marks[0], old, [*axes]),
        _full(marks[1], part, [*axes]),
    )
    starts = [
        start if a in axes else jnp.zeros_like(start)
        for a, start in enumerate(call.operands[2:])
    ]
    return [lax.dynamic_update_slice(operand, update, starts)]


def _gather(call: Call, marks: _Known) -> list[Mark]:
    """Rows keep their marks wherever indices take them; indices of padding give padding."""
    of_rows, of_indices = marks[0], marks[1]
    made = []
    if of_indices is not None:
        window = call.params["dimension_numbers"].offset_dims
        batch = other_axes(len(call.new), window)
        # The last axis of the indices holds one coordinate each, and all of them are one token's.
        last = _summed(of_indices, [of_indices.ndim - 1])
        placed = last.reshape(last.shape + (1,) * len(window))
        made.append(placed.transpose(np.argsort([*batch, *window])))
    if of_rows is not None:
        made.append(_taken(call, of_rows))
    return [_largest(made)]


def _taken(call: Call, mark: Array) -> Array:
    """The marks of rows at their indices; axes that are taken whole are not written out."""
    numbers, sizes = (
        call.params["dimension_numbers"],
        call.params["slice_sizes"],
    )
    shape = call.shape()
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    whole = [a for a in other_axes(len(shape), gone) if sizes[a] == shape[a]]
    full = _full(mark, shape, other_axes(len(shape), whole))
    taken = [full.shape[a] if a in whole else n for a, n in enumerate(sizes)]
    return lax.gather(
        full,
        call.operands[1],
        numbers,
        taken,
        mode=call.params["mode"],
        fill_value=NOTHING,
    )


def _scatter(call: Call, marks: _Known) -> list[Mark]:
    """Where something real is written the result is real; elsewhere it is as it was."""
    numbers = call.params["dimension_numbers"]
    operand, update = call.shape(), call.shape(2)
    into = _full(marks[0], operand, range(len(operand)))
    written = _full(marks[2], update, range(len(update)))
    blank = jnp.zeros(operand, jnp.int8)

    # A maximum of ones and zeros, because several updates may meet one place, in any order.
    def hit(code: int) -> Array:
        chosen = (written == code).astype(jnp.int8)
        return lax.scatter_max(
            blank, call.operands[1], chosen, numbers, mode=call.params["mode"]
        )

    real, padding = hit(REAL) == 1, hit(PADDING) == 1
    added = jnp.where(
        real, jnp.int8(REAL), jnp.where(padding, jnp.int8(PADDING), into)
    )
    if call.equation.name == "scatter":
        return [added]
    # Added to padding (2) something real (1) is padding still, as in any sum of two elements.
    return [jnp.where(added == REAL, jnp.maximum(added, into), added)]


def _dot(call: Call, marks: _Known) -> list[Mark]:
    """A sum over pairs of elements: REAL where one pair is of nothing but what counts.

    A pair with a factor that chooses (a one-hot row) and is 0 is left out of the sum. Example:
    Switch's dispatch (tokens, experts, places) times x (tokens, channels) gives every place of an
    expert the mark of the token that was sent there.
    """
    contracted, batch = call.params["dimension_numbers"]
    sides = []
    for i in (0, 1):
        shape = call.shape(i)
        free = other_axes(len(shape), contracted[i], batch[i])
        order = (*batch[i], *free, *contracted[i])
        mark = _full(marks[i], shape, []).transpose(order)
        chooses = None
        var = call.equation.inputs[i]
        if isinstance(var, Var) and (
            var in call.sparse or is_boolean(call.program, var)
        ):
            chooses = (jnp.asarray(call.operands[i]) != 0).transpose(order)
        sides.append((mark, chooses, len(free), sizes_along(shape, order)))
    return [_paired(sides, len(batch[0]), len(contracted[0]))]


def _paired(sides: Sequence[Any], batch: int, contracted: int) -> Array:
    """The mark of a matmul from (mark, what is chosen, number of free axes, full shape) of each
    side, whose axes are the batch, free and contracted ones, in this order.
    """
    (left, _, n, _), (right, _, m, _) = sides
    summed = range(left.ndim - contracted, left.ndim)
    of_right = range(right.ndim - contracted, right.ndim)
    # Where no mark varies along what is summed, all pairs of a sum have one mark: the larger one.
    if not _varying(left).intersection(summed) | _varying(right).intersection(
        of_right
    ):
        first = left.reshape(left.shape[: batch + n] + (1,) * m)
        head, free = right.shape[:batch], right.shape[batch : batch + m]
        return jnp.maximum(first, right.reshape((*head, *(1,) * n, *free)))
    flat = []
    for mark, chosen, free, shape in sides:
        rank = len(shape)
        axes = range(rank - contracted, rank)
        if chosen is not None:
            axes = range(rank)
        mark = _full(mark, shape, axes)
        valid = jnp.ones_like(mark, bool) if chosen is None else chosen
        lead, inner = mark.shape[: batch + free], mark.shape[batch + free :]
        rows = int(np.prod(lead[batch:])), int(np.prod(inner))
        # Counts as matmuls of zeros and ones: of all pairs, of those without padding, and of those
        # of nothing at all. What is in one count and not in the next is padding, or real.
        stack = [valid, valid & (mark != PADDING), valid & (mark == NOTHING)]
        flat.append(
            [x.reshape(*lead[:batch], *rows).astype(jnp.float32) for x in stack]
        )
    products = [
        jnp.einsum("...ik,...jk->...ij", a, b)
        for a, b in zip(*flat, strict=True)
    ]
    pairs, counted, empty = products
    code = jnp.where(
        pairs - counted > 0.5, jnp.int8(PADDING), jnp.int8(NOTHING)
    )
    code = jnp.where(counted - empty > 0.5, jnp.int8(REAL), code)
    frees = []
    for mark, chosen, free, shape in sides:
        source = shape if chosen is not None else mark.shape
        frees.append(source[batch : batch + free])
    return code.reshape(*code.shape[:batch], *frees[0], *frees[1])


def _ragged_dot(call: Call, marks: _Known) -> list[Mark] | None:
    """Every row meets one matrix: it keeps its mark."""
    numbers = call.params["ragged_dot_dimension_numbers"]
    contracted, batch = numbers.dot_dimension_numbers
    if marks[0] is None or any(batch) or len(call.new) != 2:
        return None
    return [_summed(marks[0], contracted[0])[:, None]]


#: Others whose results come from the elements at the same place; a running product is at its last.
# fmt: off
_MORE_ELEMENTWISE = (
    "abs", "acos", "acosh", "and", "asin", "asinh", "atan", "atan2",
    "atanh", "cbrt", "ceil", "clamp", "conj", "cos", "cosh",
    "convert_element_type", "cumlogsumexp", "cumprod", "digamma", "erf",
    "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "imag",
    "integer_pow", "is_finite", "lgamma", "log", "log1p", "logistic", "neg",
    "nextafter", "not", "or", "pmax", "pmin", "population_count", "pow",
    "psum", "psum_invariant", "real", "reduce_precision", "rem", "round",
    "rsqrt", "shift_left", "shift_right_arithmetic", "shift_right_logical",
    "sign", "sin", "sinh", "sqrt", "square", "tan", "xor", "clz",
)
# fmt: on

RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(
        (*ELEMENTWISE, *COMPARISONS, *RUNNING, *_MORE_ELEMENTWISE), _elementwise
    ),
    **dict.fromkeys(IDENTITIES, _each),
    **dict.fromkeys(
        (
            *REDUCTIONS,
            "reduce_prod",
            "reduce_and",
            "reduce_or",
            "argmax",
            "argmin",
        ),
        _reduce,
    ),
    **dict.fromkeys(
        ("scatter", "scatter-add", "scatter-max", "scatter-min", "scatter-mul"),
        _scatter,
    ),
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "rev": _reverse,
    "pad": _pad,
    "concatenate": _concatenate,
    "stack": _stack,
    "tile": _tile,
    "split": _split,
    "sort": _sort,
    "top_k": _top_k,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _update,
    "gather": _gather,
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
}
