"""`NoArray`: what stands for an array in a tree, and says so where it is used as one."""

from typing import Any, NoReturn

import jax


class NoArray:
    """A base class: used as an array, its instances raise an error that says what to do instead.

    A program that was not wrapped by `quantized` meets them so, far from the line where the wrapper
    is missing. Subclasses say in `_instead` what to do.
    """

    _instead: str
    #: By it rooms that may not import this one know such a leaf.
    is_no_array = True

    def _refuse(self, *others: Any, **options: Any) -> NoReturn:
        raise TypeError(f"{self!r} is no array: {self._instead}")

    # What numpy, jax and Python's operators ask for.
    __array__ = __jax_array__ = __float__ = __int__ = __complex__ = _refuse
    __getitem__ = __iter__ = __neg__ = __abs__ = _refuse
    __matmul__ = __rmatmul__ = __mul__ = __rmul__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = _refuse
    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = _refuse

    def __getattr__(self, name: str) -> NoReturn:
        """Asked for what the class does not have: `T` or `astype`, which arrays have."""
        of_arrays = hasattr(jax.Array, name) and not hasattr(type(self), name)
        if of_arrays:
            raise AttributeError(f"{self!r} has no {name!r}: {self._instead}")
        raise AttributeError(
            f"{type(self).__name__!r} object has no attribute {name!r}"
        )
