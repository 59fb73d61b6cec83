"""Primitives that move numbers, in a prime field: numpy's views, or jax itself on the residues."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

from sqjax.numerics.prime_field import PRIME, Residues, add, embed, mul, neg
from sqjax.proving.values import Field, Rule, Value, residues_of, unknown

#: What jax writes where an index is out of range: no residue.
_OUTSIDE = 2**32 - 1


def _view(make: Callable[[dict[str, Any], Residues], Residues]) -> Rule:
    """The rule of a primitive that moves all of its one operand."""

    def rule(equation: JaxprEqn, operands: Sequence[Value], seed: int) -> Any:
        return [Field(make(equation.params, residues_of(operands[0])))]

    return rule


def _broadcast(params: dict[str, Any], x: Residues) -> Residues:
    shape = params["shape"]
    full = [1] * len(shape)
    for axis, size in zip(params["broadcast_dimensions"], x.shape, strict=True):
        full[axis] = size
    return np.broadcast_to(x.reshape(full), shape)


def _reshape(params: dict[str, Any], x: Residues) -> Residues:
    order = params.get("dimensions")
    return (x if order is None else x.transpose(order)).reshape(
        params["new_sizes"]
    )


def _slice(params: dict[str, Any], x: Residues) -> Residues:
    strides = params["strides"] or (1,) * x.ndim
    bounds = params["start_indices"], params["limit_indices"], strides
    return x[tuple(slice(*cut) for cut in zip(*bounds, strict=True))]


def _concatenate(
    equation: JaxprEqn, operands: Sequence[Value], seed: int
) -> list[Value]:
    pieces = list(map(residues_of, operands))
    return [Field(np.concatenate(pieces, equation.params["dimension"]))]


def _split(
    equation: JaxprEqn, operands: Sequence[Value], seed: int
) -> list[Value]:
    ends = np.cumsum(equation.params["sizes"])[:-1]
    x = residues_of(operands[0])
    return list(map(Field, np.split(x, ends, equation.params["axis"])))


def _stack(
    equation: JaxprEqn, operands: Sequence[Value], seed: int
) -> list[Value]:
    pieces = list(map(residues_of, operands))
    return [Field(np.stack(pieces, equation.params["axis"]))]


def _tile(params: dict[str, Any], x: Residues) -> Residues:
    return np.tile(x, params["reps"])


def _pad(
    equation: JaxprEqn, operands: Sequence[Value], seed: int
) -> list[Value]:
    x, value = map(residues_of, operands)
    widths = equation.params["padding_config"]
    return [Field(np.asarray(lax.pad(x, jnp.asarray(value), widths)))]


def _dynamic_slice(
    equation: JaxprEqn, operands: Sequence[Value], seed: int
) -> list[Value]:
    x, *starts = operands
    sizes = equation.params["slice_sizes"]
    return [Field(np.asarray(lax.dynamic_slice(residues_of(x), starts, sizes)))]


def _dynamic_update_slice(
    equation: JaxprEqn, operands: Sequence[Value], seed: int
) -> list[Value]:
    x, update, *starts = operands
    made = lax.dynamic_update_slice(residues_of(x), residues_of(update), starts)
    return [Field(np.asarray(made))]


def _gather(
    equation: JaxprEqn, operands: Sequence[Value], seed: int
) -> list[Value]:
    x, indices = operands
    options = {
        name: equation.params[name]
        for name in (
            "dimension_numbers",
            "slice_sizes",
            "unique_indices",
            "indices_are_sorted",
            "mode",
        )
    }
    options["fill_value"] = _OUTSIDE
    found = np.asarray(lax.gather(residues_of(x), indices, **options))
    fill = equation.params["fill_value"]
    filled = embed(np.asarray(np.nan if fill is None else fill))
    return [Field(np.where(found < PRIME, found, filled))]


_SCATTERED = (
    "dimension_numbers",
    "indices_are_sorted",
    "unique_indices",
    "mode",
)


def _scatter(
    equation: JaxprEqn, operands: Sequence[Value], seed: int
) -> list[Value]:
    x, indices, updates = operands
    options = {name: equation.params[name] for name in _SCATTERED}
    made = lax.scatter(residues_of(x), indices, residues_of(updates), **options)
    return [Field(np.asarray(made))]


def _scatter_sum(
    sign: Callable[[Residues], Residues],
) -> Callable[[JaxprEqn, Sequence[Value], int], list[Value]]:
    """Updates are added where they meet: their upper and lower 16 bits apart, which uint32 holds
    for up to 65536 of them.
    """

    def rule(
        equation: JaxprEqn, operands: Sequence[Value], seed: int
    ) -> list[Value]:
        x, indices, updates = operands
        given, added = residues_of(x), sign(residues_of(updates))
        if added.size > 2**16:
            raise unknown(equation, f"{added.size} updates, more than 65536")
        options = {name: equation.params[name] for name in _SCATTERED}
        low, high = (
            np.asarray(
                lax.scatter_add(np.zeros_like(given), indices, part, **options)
            )
            for part in (added & np.uint32(2**16 - 1), added >> np.uint32(16))
        )
        upper = mul(embed(high), np.uint32(2**16))
        return [Field(add(given, add(embed(low), upper)))]

    return rule


MOVEMENTS: dict[str, Rule] = {
    "transpose": _view(lambda params, x: x.transpose(params["permutation"])),
    "reshape": _view(_reshape),
    "squeeze": _view(lambda params, x: x.squeeze(params["dimensions"])),
    "broadcast_in_dim": _view(_broadcast),
    "slice": _view(_slice),
    "rev": _view(lambda params, x: np.flip(x, params["dimensions"])),
    "concatenate": _concatenate,
    "split": _split,
    "stack": _stack,
    "tile": _view(_tile),
    "pad": _pad,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "scatter": _scatter,
    "scatter-add": _scatter_sum(lambda x: x),
    "scatter-sub": _scatter_sum(neg),
}
