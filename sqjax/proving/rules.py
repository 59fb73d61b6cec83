"""What every primitive does in a prime field: a table, apart from those of the search.

A sum, product, quotient or movement of residues is exact. `sqrt` and `rsqrt` are powers, because p
= 3 mod 4. Comparisons, `abs`, `max` and what else depends on the order of floats take the
character of a difference for its sign. All other functions of floats are oracles. What is missing
in the table has no rule: nothing is guessed.

The names of primitives stand here once more, apart from the tables that the search reads, because
an error there shall be caught here.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal

from sqjax.numerics.prime_field import (
    PRIME,
    Residues,
    add,
    character,
    hashed,
    inverse,
    mul,
    neg,
    oracle,
    places,
    power,
    root,
    running_total,
    salt,
    sub,
    total,
)
from sqjax.proving.movements import MOVEMENTS
from sqjax.proving.products import PRODUCTS
from sqjax.proving.values import (
    Field,
    Rule,
    Value,
    factor_of,
    residues_of,
    unknown,
)


def _of_residues(make: Callable[..., Residues]) -> Rule:
    """The rule of a primitive that makes residues of residues, element by element."""

    def rule(equation: JaxprEqn, operands: Sequence[Value], seed: int) -> Any:
        return [Field(make(*map(residues_of, operands)))]

    return rule


def _of_factors(make: Callable[..., Residues]) -> Rule:
    """The rule of a product, which infinity is no factor of."""

    def rule(equation: JaxprEqn, operands: Sequence[Value], seed: int) -> Any:
        return [Field(make(*(factor_of(equation, x) for x in operands)))]

    return rule


def _divide(
    equation: JaxprEqn, operands: Sequence[Value], seed: int
) -> list[Value]:
    """x / y, which is 0 where y is infinity."""
    x, y = operands
    return [Field(mul(factor_of(equation, x), inverse(residues_of(y))))]


def _of_params(make: Callable[..., Residues]) -> Rule:
    """The same, where the equation's parameters have a say."""

    def rule(equation: JaxprEqn, operands: Sequence[Value], seed: int) -> Any:
        return [Field(make(equation.params, *map(residues_of, operands)))]

    return rule


def _booleans(make: Callable[..., np.ndarray]) -> Rule:
    """The rule of a comparison."""

    def rule(equation: JaxprEqn, operands: Sequence[Value], seed: int) -> Any:
        return [make(*map(residues_of, operands))]

    return rule


# Element by element -------------------------------------------------------------------------------


def _sign(x: Residues) -> Residues:
    return np.asarray(np.mod(character(x).astype(np.int64), PRIME)).astype(
        np.uint32
    )


#: A square, as any: it shall stand in no program.
_NEGATIVE = mul(np.uint32(1_234_577_321), np.uint32(1_234_577_321))


def _root(x: Residues) -> Residues:
    """The square root of a square; of -x it is another number, or a sign would be lost in it.

    A factor that is a square passes either as its root.
    """
    positive = root(x)
    is_square = mul(positive, positive) == x
    return np.where(is_square, positive, mul(positive, _NEGATIVE))


def _less(x: Residues, y: Residues) -> np.ndarray:
    """Whether y - x counts as positive."""
    return np.asarray(character(sub(y, x)) > 0)


def _larger(x: Residues, y: Residues) -> Residues:
    return np.where(_less(x, y), y, x)


def _smaller(x: Residues, y: Residues) -> Residues:
    return np.where(_less(y, x), y, x)


def _clamp(low: Residues, x: Residues, high: Residues) -> Residues:
    return _smaller(_larger(x, low), high)


def _extremum(make: Callable[..., Residues]) -> Rule:
    """Of `max` and `min`: infinity in the program itself leaves the other operand as it is."""

    def rule(equation: JaxprEqn, operands: Sequence[Value], seed: int) -> Any:
        kept = [
            x
            for atom, x in zip(equation.invars, operands, strict=True)
            if not (isinstance(atom, Literal) and np.isinf(atom.val))
        ]
        values = list(map(residues_of, kept))
        return [Field(make(*values) if len(values) == 2 else values[0])]

    return rule


def _select(
    equation: JaxprEqn, operands: Sequence[Value], seed: int
) -> list[Value]:
    which, *cases = operands
    values = list(map(residues_of, cases))
    chosen = np.asarray(which).astype(np.int32)
    result = values[0]
    for number, case in enumerate(values[1:], start=1):
        result = np.where(chosen == number, case, result)
    return [Field(result)]


def _convert(
    equation: JaxprEqn, operands: Sequence[Value], seed: int
) -> list[Value]:
    """Of floats to floats nothing changes, but to float8; an integer or boolean is an oracle."""
    [x] = map(residues_of, operands)
    dtype = equation.params["new_dtype"]
    if jnp.issubdtype(dtype, jnp.floating):
        old: Any = equation.invars[0].aval
        kept = int(jnp.finfo(dtype).nmant)
        return [_rounded(x, kept, int(jnp.finfo(old.dtype).nmant), seed)]
    if dtype == np.bool_:
        return [x != 0]
    if not jnp.issubdtype(dtype, jnp.integer):
        raise unknown(equation, f"one to {dtype}")
    # Small, because a loop may run so often.
    bits = hashed(seed ^ salt("integer"), x) & np.uint64(127)
    return [bits.astype(dtype)]


#: What keeps fewer bits of a mantissa (bfloat16 has 7) is no way to compute a float but a
#: quantizer, which no scale and no rotation passes.
_FEWEST_BITS = 7


def _rounded(x: Residues, bits: int, before: int, seed: int) -> Value:
    """Floats that keep so many bits of their mantissa, of those before."""
    if bits >= min(before, _FEWEST_BITS):
        return Field(x)
    return Field(oracle(seed ^ salt("rounded", bits), x))


def _reduce_precision(
    equation: JaxprEqn, operands: Sequence[Value], seed: int
) -> list[Value]:
    bits = equation.params["mantissa_bits"]
    return [_rounded(residues_of(operands[0]), bits, bits + 1, seed)]


#: A power is a polynomial of this degree, which must be far below p: x^(p - 1) is 1 for all x.
_HIGHEST_POWER = 2**10


def _whole_power(
    equation: JaxprEqn, operands: Sequence[Value], seed: int
) -> list[Value]:
    exponent = equation.params["y"]
    if abs(exponent) > _HIGHEST_POWER:
        return _oracle(equation, operands, seed)
    return [Field(power(residues_of(operands[0]), exponent))]


def _power(
    equation: JaxprEqn, operands: Sequence[Value], seed: int
) -> list[Value]:
    """x^(n / 2) of a number in the program is a power of the root of x; all else an oracle."""
    _, exponent = equation.invars
    if isinstance(exponent, Literal):
        twice = 2 * float(exponent.val)
        if twice.is_integer() and abs(twice) <= _HIGHEST_POWER:
            x = residues_of(operands[0])
            whole = twice % 2 == 0
            halves = int(twice) // 2 if whole else int(twice)
            return [Field(power(x if whole else _root(x), halves))]
    return _oracle(equation, operands, seed)


def _oracle(
    equation: JaxprEqn, operands: Sequence[Value], seed: int
) -> list[Value]:
    """A random function of the arguments, one for each primitive and its parameters."""
    function = seed ^ salt(
        equation.primitive.name, sorted(equation.params.items(), key=repr)
    )
    return [Field(oracle(function, *map(residues_of, operands)))]


# Along axes ---------------------------------------------------------------------------------------


def _largest(
    order: int, equation: JaxprEqn, operands: Sequence[Value], seed: int
) -> list[Value]:
    """The element whose place is the last (order 1) or the first (-1)."""
    lines = _lines(residues_of(operands[0]), equation.params["axes"])
    best = np.argmax(order * places(lines, seed), -1)
    return [Field(np.take_along_axis(lines, best[..., None], -1)[..., 0])]


def _which(
    order: int, equation: JaxprEqn, operands: Sequence[Value], seed: int
) -> list[Value]:
    """Where that element is."""
    lines = _lines(residues_of(operands[0]), equation.params["axes"])
    best = np.argmax(order * places(lines, seed), -1)
    return [np.asarray(best).astype(equation.params["index_dtype"])]


def _lines(x: Residues, axes: Sequence[int]) -> Residues:
    """The array with these axes as one, the last."""
    ends = tuple(range(x.ndim - len(axes), x.ndim))
    moved = np.moveaxis(x, tuple(axes), ends)
    kept = moved.shape[: x.ndim - len(axes)]
    size = int(np.prod([x.shape[a] for a in axes], dtype=int))
    return moved.reshape(*kept, size)


def _top(
    equation: JaxprEqn, operands: Sequence[Value], seed: int
) -> list[Value]:
    x = residues_of(operands[0])
    axis = equation.params.get("axis", x.ndim - 1)
    lines = np.moveaxis(x, axis, -1)
    first = np.argsort(-places(lines, seed), -1, kind="stable")
    index = first[..., : equation.params["k"]]
    values = np.take_along_axis(lines, index, -1)
    dtype: Any = equation.outvars[1].aval
    return [
        Field(np.moveaxis(values, -1, axis)),
        np.moveaxis(index, -1, axis).astype(dtype.dtype),
    ]


def _sort(
    equation: JaxprEqn, operands: Sequence[Value], seed: int
) -> list[Value]:
    axis, count = equation.params["dimension"], equation.params["num_keys"]
    keys = [_sort_key(x, axis, seed) for x in operands[:count]]
    # The last key of lexsort counts first.
    index = np.lexsort(keys[::-1], axis=-1)
    index = np.moveaxis(index, -1, axis)

    def in_order(value: Value) -> Value:
        x = value.residues if isinstance(value, Field) else np.asarray(value)
        y = np.take_along_axis(x, index, axis)
        return Field(y) if isinstance(value, Field) else y

    return list(map(in_order, operands))


def _sort_key(value: Value, axis: int, seed: int) -> np.ndarray:
    if isinstance(value, Field):
        return places(np.moveaxis(value.residues, axis, -1), seed)
    return np.moveaxis(np.asarray(value), axis, -1)


def _sum(params: dict[str, Any], x: Residues) -> Residues:
    return total(x, map(int, params["axes"]))  # vmap leaves numpy's there


def _product(params: dict[str, Any], x: Residues) -> Residues:
    lines = _lines(x, params["axes"])
    result = np.ones(lines.shape[:-1], np.uint32)
    for k in range(lines.shape[-1]):
        result = mul(result, lines[..., k])
    return result


def _running_sum(params: dict[str, Any], x: Residues) -> Residues:
    axis = params["axis"]
    if params["reverse"]:
        return np.flip(running_total(np.flip(x, axis), axis), axis)
    return running_total(x, axis)


def _running(
    join: Callable[[Residues, Residues], Residues],
) -> Callable[..., Residues]:
    """What is joined of the first 1, 2, ... elements along an axis."""

    def make(params: dict[str, Any], x: Residues) -> Residues:
        axis = params["axis"]
        turned = np.flip(x, axis) if params["reverse"] else x
        made = np.moveaxis(turned, axis, 0).copy()
        for k in range(1, len(made)):
            made[k] = join(made[k - 1], made[k])
        made = np.moveaxis(made, 0, axis)
        return np.flip(made, axis) if params["reverse"] else made

    return make


def _kept(
    equation: JaxprEqn, operands: Sequence[Value], seed: int
) -> Sequence[Value]:
    return operands


# The table ----------------------------------------------------------------------------------------

_KEPT = """
copy copy_p stop_gradient name optimization_barrier sharding_constraint layout_constraint reshard
mesh_cast pvary reduced_vary_cast reduced_vary_cast_p vary_unreduced_cast vary_unreduced_cast_p
"""
_ORACLES = """
exp exp2 expm1 log log1p tanh logistic erf erfc erf_inv sin cos tan asin acos atan sinh cosh asinh
acosh atanh atan2 cbrt lgamma digamma igamma igammac polygamma regularized_incomplete_beta
bessel_i0e bessel_i1e floor ceil round rem nextafter
"""
RULES: dict[str, Rule] = {
    **MOVEMENTS,
    **PRODUCTS,
    **dict.fromkeys(_KEPT.split(), _kept),
    **dict.fromkeys(_ORACLES.split(), _oracle),
    **dict.fromkeys(("add", "add_any"), _of_residues(add)),
    "sub": _of_residues(sub),
    "mul": _of_factors(mul),
    "neg": _of_residues(neg),
    "div": _divide,
    "square": _of_residues(lambda x: mul(x, x)),
    "integer_pow": _whole_power,
    "pow": _power,
    "sqrt": _of_residues(_root),
    "rsqrt": _of_residues(lambda x: inverse(_root(x))),
    "sign": _of_residues(_sign),
    "abs": _of_residues(lambda x: mul(x, _sign(x))),
    "max": _extremum(_larger),
    "min": _extremum(_smaller),
    "clamp": _of_residues(_clamp),
    "select_n": _select,
    "lt": _booleans(_less),
    "gt": _booleans(lambda x, y: _less(y, x)),
    "ge": _booleans(lambda x, y: ~_less(x, y)),
    "le": _booleans(lambda x, y: ~_less(y, x)),
    "eq": _booleans(np.equal),
    "ne": _booleans(np.not_equal),
    # 0 stands for infinity too: so what a program has in its place is looked at.
    "is_finite": _booleans(lambda x: x != 0),
    "convert_element_type": _convert,
    "reduce_precision": _reduce_precision,
    "reduce_sum": _of_params(_sum),
    "reduce_prod": _of_params(_product),
    "reduce_max": partial(_largest, 1),
    "reduce_min": partial(_largest, -1),
    "argmax": partial(_which, 1),
    "argmin": partial(_which, -1),
    "cumsum": _of_params(_running_sum),
    "cumprod": _of_params(_running(mul)),
    "cummax": _of_params(_running(_larger)),
    "cummin": _of_params(_running(_smaller)),
    "sort": _sort,
    "top_k": _top,
}
