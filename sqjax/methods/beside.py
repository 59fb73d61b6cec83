"""`Beside`: a float program in which quantized versions of its leaves are multiplied beside them.

The function runs once in float. Where it multiplies an activation with a leaf, every quantized
version of the leaf multiplies the same activation, by the rules by which `quantized` runs. What
they give is handed to `Beside.meeting`, and the float result goes on. So what one leaf loses has no
part in what another does.

A leaf is a `Versions` on its way: the float array and the quantized ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.extend.core import JaxprEqn
from jax.sharding import PartitionSpec
from jaxtyping import Array

from sqjax.program.registry import Kind, Registry, Rule, Special, specials_among
from sqjax.program.subprograms import emit, listed
from sqjax.runtime.kinds import JoinedWeight, SummedWeight
from sqjax.runtime.quantized import RULES
from sqjax.runtime.weight_rules import weight_leaves
from sqjax.weights.quant_weight import QuantWeight

#: The primitives at which an activation, or indices, meet a leaf.
PRODUCTS = (
    "dot_general",
    "ragged_dot_general",
    "conv_general_dilated",
    "gather",
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Versions:
    """A float array, and the special values that `quantized` would have in its place.

    Attributes:
        exact: the array.
        coded: a `Special` for each version. It holds a quantized weight, or several that fn has
            joined.
    """

    exact: Any
    coded: tuple[Special, ...]


class Meeting(NamedTuple):
    """A product of an activation with a leaf of which there are quantized versions.

    Attributes:
        equation: the product.
        floats: the operands of the float product.
        operands: the operands of each version's product.
        exact: what the float leaf gives.
        results: what each version gives; nothing where the walk does not multiply them.
    """

    equation: JaxprEqn
    floats: Sequence[Any]
    operands: Sequence[Sequence[Any]]
    exact: Array
    results: Sequence[Array]

    @property
    def leaves(self) -> Iterator[Special]:
        """The quantized weights of the first version: several if fn has joined them."""
        for x in specials_among(self.operands[0]):
            yield from _weights_in(x)

    @property
    def paths(self) -> tuple[str, ...]:
        """The names of the leaves that are multiplied."""
        return tuple(leaf.path for leaf in self.leaves)


def leaves_beside(
    paths: Sequence[str],
    floats: Sequence[Any],
    versions: Sequence[Sequence[Any]],
) -> list[Any]:
    """The leaves that `run` takes: a float one as it is, a quantized one beside its versions.

    Args:
        paths: the leaves' names.
        floats: the leaves of the float tree.
        versions: the leaves of each quantized tree. All of them quantize the same leaves.
    """
    made = []
    each = zip(
        *[weight_leaves(paths, leaves) for leaves in versions], strict=True
    )
    for path, exact, coded in zip(paths, floats, each, strict=True):
        is_coded = isinstance(coded[0], Special)
        made.append(_beside(path, exact, coded) if is_coded else exact)
    return made


def _beside(path: str, exact: Any, coded: Sequence[Any]) -> Special:
    return Special(path, Versions(exact, tuple(coded)))


def _slices(equation: JaxprEqn, special: Special, length: int) -> Special:
    sliced = [
        RULES.kind_of(x).slices(equation, x, length)
        for x in special.value.coded
    ]
    return _beside(special.path, special.value.exact, sliced)


def _specs(
    equation: JaxprEqn, special: Special, spec: PartitionSpec
) -> Special:
    specs = [
        RULES.kind_of(x).specs(equation, x, spec) for x in special.value.coded
    ]
    return _beside(special.path, spec, specs)


def _carry(equation: JaxprEqn, special: Special) -> Any:
    coded = special.value.coded[0]
    return RULES.kind_of(coded).carry(equation, coded)


def _leave(special: Special) -> Any:
    coded = special.value.coded[0]
    return RULES.kind_of(coded).leave(coded)


def _no_rule(equation: JaxprEqn, *operands: Any) -> Any:
    """Raises what `quantized` raises."""
    coded = _of_version(operands, 0)
    return RULES.owner(coded).otherwise(equation, *coded)


VERSIONS = Kind(
    Versions,
    otherwise=_no_rule,
    slices=_slices,
    specs=_specs,
    carry=_carry,
    leave=_leave,
)


class Beside(Registry):
    """One rule for every primitive: run it on the floats, and what `quantized` does beside it.

    A walk that only wants to know which versions a product meets says `multiplies = False`.
    """

    multiplies = True

    def __init__(self) -> None:
        super().__init__(VERSIONS)

    def meeting(self, met: Meeting) -> Array:
        """What goes on from a product: its float result, on which what is wanted may hang."""
        raise NotImplementedError

    def rule(self, equation: JaxprEqn, operands: Sequence[Any]) -> Rule:
        """The rule of the float program and of all versions."""
        return Rule(self._all, asks=True)

    def _all(
        self, equation: JaxprEqn, *operands: Any, known: Sequence[Any]
    ) -> Any:
        """The float results, beside the versions' where these are quantized weights still."""
        exact = emit(equation, *map(_exact, operands))
        special = specials_among(operands)[0]
        versions = range(len(special.value.coded))
        each = [_of_version(operands, version) for version in versions]
        floats = list(map(_exact, operands))
        # A look-up may give a part of the weight, which is a weight still.
        is_matmul = equation.primitive.name in PRODUCTS[:-1]
        if is_matmul and not self.multiplies:
            [x] = exact
            return self.meeting(Meeting(equation, floats, each, x, ()))
        results_of = [_made(equation, coded, known) for coded in each]
        # By identity, because == of two arrays is an array.
        if any(made is None for made in results_of):
            return None
        results = [
            self._result(Meeting(equation, floats, each, x, others), special)
            for x, *others in zip(exact, *results_of, strict=True)
        ]
        return results if equation.primitive.multiple_results else results[0]

    def _result(self, met: Meeting, special: Special) -> Any:
        """One result: weights still, a product, or an array of another kind."""
        if all(isinstance(other, Special) for other in met.results):
            return _beside(special.path, met.exact, met.results)
        if met.equation.primitive.name in PRODUCTS:
            return self.meeting(met)
        # The norm of a weight, an array that passes a barrier.
        return met.exact


def _made(
    equation: JaxprEqn, coded: Sequence[Any], known: Sequence[Any]
) -> Any:
    """What `quantized` makes of the operands of one version; None where it has no rule."""
    rule = RULES.rule(equation, coded).given(known)
    made = rule(equation, *coded)
    return None if made is None else listed(equation, made)


def _exact(x: Any) -> Any:
    return x.value.exact if isinstance(x, Special) else x


def _of_version(operands: Sequence[Any], version: int) -> list[Any]:
    """The operands as one version has them."""
    return [
        x.value.coded[version] if isinstance(x, Special) else x
        for x in operands
    ]


def _weights_in(special: Special) -> Iterator[Special]:
    """The quantized weights that a special value is made of."""
    value = special.value
    if isinstance(value, QuantWeight):
        yield special
    elif isinstance(value, JoinedWeight):
        yield from specials_among(value.pieces)
    elif isinstance(value, SummedWeight):
        yield from specials_among(value.terms)
