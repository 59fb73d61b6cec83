"""The walk: runs a traced program in which some values are special, and hands those to a table of rules."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.sharding import PartitionSpec

from sqjax.equations import emit, inner_program
from sqjax.matmul import QuantWeight
from sqjax.qtensor import QTensor
from sqjax.trees import named_leaves


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Leaf:
    """A parameter leaf on its way through the program: its path, and the value it has taken on so far."""

    path: str = field(metadata={"static": True})
    value: Any


class Rules(NamedTuple):
    """What to do where a `Leaf` meets a primitive: a rule by the primitive's name, else `otherwise`.

    A rule is called as rule(equation, *operands) and returns the result (a list of them, if the primitive has
    several). Where `concerns(equation)`, the same happens though no leaf is there.
    """

    table: Mapping[str, Callable[..., Any]]
    otherwise: Callable[..., Any]
    concerns: Callable[[JaxprEqn], bool] = lambda equation: False


class Traced(NamedTuple):
    """A function as a program: its jaxpr, the paths of its first inputs (the leaves), its output's treedef."""

    jaxpr: ClosedJaxpr
    paths: tuple[str, ...]
    treedef: jax.tree_util.PyTreeDef


def is_array(x: Any) -> bool:
    """Whether an argument is an input of the program; anything else (a bool, a string) is passed as it is."""
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct | QTensor)


def is_tensor(x: Any) -> bool:
    """Whether this is a quantized array."""
    return isinstance(x, QTensor)


def array_leaves(args: Any) -> list[Any]:
    """The program's inputs among the arguments, in the order in which `trace` names them."""
    return [x for x in jax.tree.leaves(args, is_leaf=is_tensor) if is_array(x)]


def trace(
    fn: Callable[..., Any], params: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Traced, list[Any]]:
    """Traces fn(params, *args, **kwargs) into (program, its inputs after the leaves).

    Leaves of params are seen by shape and dtype only. Arrays among the arguments become inputs; so do quantized ones.
    """
    paths, leaves, treedef = named_leaves(params, is_leaf=lambda x: isinstance(x, QuantWeight))
    avals = [_aval(x) for x in leaves]
    flat, arguments = jax.tree_util.tree_flatten((args, dict(kwargs)), is_leaf=is_tensor)

    def flat_fn(leaves, inputs):
        rest = iter(inputs)
        filled = [next(rest) if is_array(x) else x for x in flat]
        args, kwargs = jax.tree_util.tree_unflatten(arguments, filled)
        return fn(jax.tree_util.tree_unflatten(treedef, leaves), *args, **kwargs)

    inputs = array_leaves((args, dict(kwargs)))
    seen = [_aval(x) if is_tensor(x) else x for x in inputs]
    jaxpr, out = jax.make_jaxpr(flat_fn, return_shape=True)(avals, seen)
    return Traced(jaxpr, paths, jax.tree_util.tree_structure(out)), inputs


def _aval(leaf: Any) -> jax.ShapeDtypeStruct:
    """A leaf's shape and dtype; on a mesh with explicit axes also how it is cut."""
    plain = jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.result_type(leaf))
    stored = leaf.tensor.values if isinstance(leaf, QuantWeight) else leaf
    if not isinstance(stored, jax.Array):
        return plain
    sharding = jax.typeof(stored).sharding
    axes = leaf.tensor.axes if isinstance(leaf, QuantWeight) else range(len(plain.shape))
    entries = [sharding.spec[a] for a in axes]
    return plain.update(sharding=sharding.update(spec=PartitionSpec(*entries))) if any(entries) else plain


def walk(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], rules: Rules) -> list[Any]:
    """Runs `jaxpr`. Equations that meet no `Leaf` are emitted again as they were, custom gradients included."""
    env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    fills: dict[Any, Any] = {}

    def read(atom):
        return atom.val if isinstance(atom, Literal) else env[atom]

    for equation in jaxpr.eqns:
        operands = [read(v) for v in equation.invars]
        if equation.primitive.name in ("broadcast_in_dim", "convert_element_type"):
            _note_fill(fills, equation, operands[0])
        elif equation.primitive.name == "select_n" and any(isinstance(x, Leaf) for x in operands):
            equation = equation.replace(invars=[_filled(fills, v) for v in equation.invars])
        with source_info_util.user_context(equation.source_info.traceback):
            results = _step(equation, operands, rules)
        env.update(zip(equation.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _note_fill(fills: dict[Any, Any], equation: JaxprEqn, operand: Any) -> None:
    """Notes what number is everywhere in the result of an equation, if that is known while tracing."""
    source = equation.invars[0]
    number = operand if isinstance(source, Literal) else fills.get(source, operand)
    if not isinstance(number, jax.core.Tracer | Leaf) and np.ndim(number) == 0:
        fills[equation.outvars[0]] = number


def _filled(fills: Mapping[Any, Any], atom: Any) -> Any:
    """A variable that one number fills as that number, by which rules know a mask; anything else as it is."""
    return atom if isinstance(atom, Literal) or atom not in fills else Literal(fills[atom], atom.aval)


def _step(equation: JaxprEqn, operands: list[Any], rules: Rules) -> list[Any]:
    if not any(isinstance(x, Leaf) for x in operands) and not rules.concerns(equation):
        results = emit(equation, *operands)
    elif (inner := inner_program(equation)) is not None:
        return walk(inner.jaxpr, inner.consts, operands, rules)
    else:
        results = rules.table.get(equation.primitive.name, rules.otherwise)(equation, *operands)
    return results if equation.primitive.multiple_results else [results]
