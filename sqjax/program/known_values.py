"""What is known of an array's values before the program runs: one number, or zeros and ones.

It is written as an array that holds all values which may occur: `np.array(2.0)` of one that the
number 2 fills, `ZEROS_AND_ONES` of a mask, and of an array that fn has captured the array itself.
None says that nothing is known.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sqjax._trees import is_concrete, quickly_read
from sqjax.program.equations import Atom, Equation, Var
from sqjax.program.primitives import KEEP_A_FILL

#: What a mask holds, and any array of booleans.
ZEROS_AND_ONES = np.array([0, 1])


def values_made(name: str, operands: Sequence[Any]) -> Sequence[Any]:
    """What the results of an equation hold, given what its operands do; empty if that is unknown.

    Example: `jnp.zeros((2, 3))` is a broadcast_in_dim of 0.0, and holds what that holds. A boolean
    that is converted to float32 holds zeros and ones, and so does 1 - it.
    """
    rule = _RULES.get(name)
    return [] if rule is None else rule(operands)


def _mask_of_masks(operands: Sequence[Any]) -> list[Any]:
    # What is not known comes first, because a look at a large captured array takes time.
    in_order = sorted(operands, key=lambda values: values is not None)
    return [ZEROS_AND_ONES] if all(map(is_mask, in_order)) else []


def _mask_of_cases(operands: Sequence[Any]) -> list[Any]:
    """Of `select_n` the first operand only chooses."""
    return _mask_of_masks(operands[1:])


def _complement(operands: Sequence[Any]) -> list[Any]:
    """1 - mask."""
    return _mask_of_masks(operands) if holds_only(operands[0], 1) else []


_RULES: dict[str, Callable[[Sequence[Any]], Sequence[Any]]] = {
    **dict.fromkeys(KEEP_A_FILL, list),
    **dict.fromkeys(("mul", "max", "min"), _mask_of_masks),
    "select_n": _mask_of_cases,
    "sub": _complement,
}


def is_mask(values: Any) -> bool:
    """Whether these values are zeros and ones."""
    return _all(values, lambda x: (x == 0) | (x == 1))


def holds_only(values: Any, number: float) -> bool:
    """Whether these values are one number."""
    return _all(values, lambda x: x == number)


def number_in(values: Any) -> Any:
    """The number that fills an array of these values; None if it may hold several."""
    return values if np.size(values) == 1 else None  # the size of None is 1


def captured_values(array: Any) -> np.ndarray | None:
    """What an array holds that fn has captured: a bias of zeros, say, or a mask; else None."""
    if not is_concrete(array):
        return None
    near = quickly_read(array)
    if near is not None:
        only_zeros, zeros_and_ones = _looked_at(near)
    else:
        # Now, even if the caller is being traced, because the answer decides what is done.
        with jax.ensure_compile_time_eval():
            looked_at = _compiled_looked_at(array)
            only_zeros, zeros_and_ones = jax.device_get(looked_at)
    if only_zeros:
        return np.zeros((), array.dtype)
    return ZEROS_AND_ONES if zeros_and_ones else None


def _looked_at(array: Any) -> tuple[Any, Any]:
    """(whether an array holds only zeros, whether it holds only zeros and ones)."""
    zero, one = np.array([0, 1], array.dtype)
    is_zero = array == zero
    return is_zero.all(), (is_zero | (array == one)).all()


_compiled_looked_at = jax.jit(_looked_at)


class KnownValues:
    """What is known of the values of a program's variables.

    Args:
        avals: the types of the variables.
        captured: {variable: value} of the arrays that fn has captured.
    """

    def __init__(self, avals: Sequence[Any], captured: Mapping[Var, Any]):
        self._avals = avals
        self._known: dict[Var, np.ndarray] = {}
        for v in filter(self._holds_numbers, captured):
            self.note(v, captured_values(captured[v]))

    def note(self, v: Var, values: np.ndarray | None) -> None:
        """Notes what a variable holds; None: that is not known."""
        if values is not None and self._holds_numbers(v):
            self._known[v] = values.astype(self._avals[v].dtype)

    def pass_on(self, equation: Equation, y: Var) -> None:
        """Notes a result: copies of a number are that number; what is made of masks may be one."""
        made = values_made(equation.name, list(map(self.of, equation.inputs)))
        own = dict(zip(equation.outputs, made, strict=False))
        self.note(y, own.get(y))

    def of(self, atom: Atom) -> np.ndarray | None:
        """What an operand holds, as far as it is known."""
        if not isinstance(atom, Var):
            return atom.value
        is_boolean = self._avals[atom].dtype == bool
        return self._known.get(atom, ZEROS_AND_ONES if is_boolean else None)

    def number(self, atom: Atom) -> np.ndarray | None:
        """The number that fills an operand, as an array of one element; None if not known."""
        return number_in(self.of(atom))

    def _holds_numbers(self, v: Var) -> bool:
        """Whether a variable holds numbers: keys of jax.random do not."""
        dtype = self._avals[v].dtype
        return not jax.dtypes.issubdtype(dtype, jax.dtypes.extended)


def _all(values: Any, test: Callable[[Any], Any]) -> bool:
    # None, of which nothing is known, is equal to no number.
    return bool(np.all(test(values)))
