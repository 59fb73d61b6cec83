"""Tracing: a function of (params, *inputs) as a program whose first inputs are the named leaves."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr
from jax.interpreters import partial_eval

from sqjax._shapes import sharded_as
from sqjax._trees import named_leaves


class Traced(NamedTuple):
    """A function as a program.

    Attributes:
        jaxpr: its inputs are the leaves, then the arrays among the arguments.
        paths: the names of the leaves.
        treedef: of what the function returns.
    """

    jaxpr: ClosedJaxpr
    paths: tuple[str, ...]
    treedef: jax.tree_util.PyTreeDef


#: What a value that is no array stands for: the type of an array, or None for "nothing: it is what
#: it is". Quantized values stand for float arrays; this room knows nothing of them, so whoever
#: traces functions of them says so.
StandIn = Callable[[Any], jax.ShapeDtypeStruct | None]


def nothing(x: Any) -> None:
    """The `StandIn` of trees that hold arrays only."""
    return None


def is_array(x: Any) -> bool:
    """Whether an argument is an array, and so an input of the program."""
    return isinstance(
        x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct
    )


def array_leaves(args: Any, stand_in: StandIn = nothing) -> list[Any]:
    """The program's inputs among the arguments, in the order in which `trace` names them."""
    leaves = jax.tree.leaves(args, is_leaf=lambda x: stand_in(x) is not None)
    return [x for x in leaves if _is_input(x, stand_in)]


def _is_input(x: Any, stand_in: StandIn) -> bool:
    """Whether an argument is an input; a bool or a string is not, and is passed to fn as it is."""
    return is_array(x) or stand_in(x) is not None


def trace(
    fn: Callable[..., Any],
    params: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    of_params: StandIn = nothing,
    of_args: StandIn = nothing,
) -> tuple[Traced, list[Any]]:
    """Traces fn(params, *args, **kwargs) into (program, its inputs after the leaves).

    Leaves of params are seen by shape and dtype only. Arrays among the arguments become inputs.
    What is no array but stands for one becomes a leaf (`of_params` knows it) or an input (`of_args`
    does).

    Example: fn(params, ids, train=False) with params {"w": ...} gives a program of two inputs, the
    leaf named "w" and ids. `train` is False in the program, because branches of Python depend on
    it.
    """
    arguments = (args, dict(kwargs))
    paths, leaves, params_def = named_leaves(
        params, is_leaf=lambda x: of_params(x) is not None
    )
    flat, arguments_def = jax.tree.flatten(
        arguments, is_leaf=lambda x: of_args(x) is not None
    )

    def flat_fn(leaves, inputs):
        rest = iter(inputs)
        filled = [next(rest) if _is_input(x, of_args) else x for x in flat]
        args, kwargs = jax.tree.unflatten(arguments_def, filled)
        return fn(jax.tree.unflatten(params_def, leaves), *args, **kwargs)

    inputs = array_leaves(arguments, of_args)
    # Traced on what they stand for, so that fn sees floats and is traced as without quantization.
    leaf_types = [of_params(x) or _type_of_leaf(x) for x in leaves]
    input_types = [of_args(x) or x for x in inputs]
    jaxpr, out = jax.make_jaxpr(flat_fn, return_shape=True)(
        leaf_types, input_types
    )
    return Traced(_alive(jaxpr), paths, jax.tree.structure(out)), inputs


def _alive(program: ClosedJaxpr) -> ClosedJaxpr:
    """The program without dead code; its inputs stay, whether it reads them or not.

    Here, because all walks must agree on what a program reads: a leaf whose norm is computed and
    thrown away is read by its matmul only.
    """
    jaxpr = program.jaxpr
    wanted = [True] * len(jaxpr.outvars)
    alive, _ = partial_eval.dce_jaxpr(jaxpr, wanted, instantiate=True)
    return ClosedJaxpr(alive, program.consts)


def _type_of_leaf(leaf: Any) -> jax.ShapeDtypeStruct:
    """A leaf's shape and dtype; on a mesh with explicit axes also how it is sharded."""
    plain = jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.result_type(leaf))
    return sharded_as(plain, leaf, range(len(plain.shape)))
