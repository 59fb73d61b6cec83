"""`Registry`: rules for special values, by primitive and kind; how such values enter bodies.

A program is run equation by equation (`sqjax.program.walk`). Most values are arrays, and most
equations are simply emitted again. Some values are special: a quantized weight, an int8 cache. They
travel as a `Special`. What happens where a `Special` meets a primitive is a rule, registered by the
primitive's name and the kind of the value:

    rules = Registry(CACHES, WEIGHTS)

    @rules.register(("transpose",), WEIGHTS)
    def _transpose(equation, special): ...

An equation that meets values of several kinds belongs to the kind that the registry names first.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import jax
from jax.extend.core import JaxprEqn
from jax.sharding import PartitionSpec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Special:
    """A special value on its way through the program.

    Attributes:
        path: the name of the leaf (or input) that it came in as, for errors.
        value: what it has become so far. Its type says of which kind it is.
    """

    path: str = field(metadata={"static": True})
    value: Any

    def holding(self, value: Any) -> "Special | None":
        """It with another value; None where there is none, which rules hand on."""
        return None if value is None else Special(self.path, value)


def specials_among(operands: Iterable[Any]) -> list[Special]:
    """The special values among some operands."""
    return [x for x in operands if isinstance(x, Special)]


class Kind(NamedTuple):
    """One kind of special value, and what becomes of it where it enters or leaves a body.

    A registry refuses nothing by itself, because only whoever made the values can name the remedy:
    `otherwise` and `carry` may raise.

    Attributes:
        type: the type of these special values' `value`.
        otherwise: otherwise(equation, *operands) stands in for the rule of a primitive that has
            none.
        slices: slices(equation, special, length): what a scan runs over in its place, as a tree of
            arrays whose first axis is that of the steps.
        specs: specs(equation, special, spec): the tree of the PartitionSpecs of its arrays, where a
            shard_map is given it with this spec.
        carry: carry(equation, special): what a loop carries in its place.
        leave: leave(special): what a body, or the whole program, returns in its place.
    """

    type: type
    otherwise: Callable[..., Any]
    slices: Callable[[JaxprEqn, Special, int], Any]
    specs: Callable[[JaxprEqn, Special, PartitionSpec], Any]
    carry: Callable[[JaxprEqn, Special], Any]
    leave: Callable[[Special], Any]


class Rule(NamedTuple):
    """A rule: run(equation, *operands) gives the result, or a list if the primitive has several.

    It gives None where it does not serve these operands: then its kind's `otherwise` stands in.

    `asks` is for a keyword argument `known`: for every operand what is known of its values, as in
    `sqjax.program.known_values`. (A mask is `select_n` with an operand that zero fills.)
    """

    run: Callable[..., Any]
    asks: bool = False

    def given(self, known: Sequence[Any]) -> Callable[..., Any]:
        """Its function, told what is known of the operands' values where it asks for that."""
        return partial(self.run, known=known) if self.asks else self.run


def _never(equation: JaxprEqn) -> bool:
    """No equation without a special value concerns anyone."""
    return False


class Registry:
    """The rules of some kinds of special values.

    Args:
        kinds: the first kind that an equation meets owns it.
        concerns: concerns(equation) is true of equations that are handed to the first kind's rules
            though no operand is special.
    """

    def __init__(
        self, *kinds: Kind, concerns: Callable[[JaxprEqn], bool] = _never
    ):
        self.kinds, self.concerns = kinds, concerns
        self._rules: dict[tuple[str, type], Rule] = {}

    @classmethod
    def joined(cls, *registries: "Registry") -> "Registry":
        """The rules of several registries; an equation of several kinds belongs to the first."""
        made = cls(*chain(*map(attrgetter("kinds"), registries)))
        for registry in registries:
            made._rules.update(registry._rules)
        return made

    def register(
        self, primitives: Iterable[str], kind: Kind, *, asks: bool = False
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """A decorator: the function is the rule of these primitives for this kind (see `Rule`)."""

        def add(run: Callable[..., Any]) -> Callable[..., Any]:
            for primitive in primitives:
                self._rules[primitive, kind.type] = Rule(run, asks)
            return run

        return add

    def kind_of(self, special: Special) -> Kind:
        """The kind of one special value."""
        for kind in self.kinds:
            if isinstance(special.value, kind.type):
                return kind
        raise TypeError(
            f"{special.path}: a {type(special.value).__name__} is of no registered kind"
        )

    def owner(self, operands: Sequence[Any]) -> Kind:
        """The kind whose rules are asked: the first one among the operands."""
        # Without a special value it is an equation that `concerns` the first kind.
        met = map(self.kind_of, specials_among(operands))
        return min(met, key=self.kinds.index, default=self.kinds[0])

    def rule(self, equation: JaxprEqn, operands: Sequence[Any]) -> Rule:
        """The rule for an equation on these operands."""
        kind = self.owner(operands)
        without_rule = Rule(kind.otherwise)
        return self._rules.get(
            (equation.primitive.name, kind.type), without_rule
        )

    def carry(self, equation: JaxprEqn, operands: Iterable[Any]) -> list[Any]:
        """What a loop carries in place of these operands."""
        return self._changed(operands, lambda kind, x: kind.carry(equation, x))

    def slices(
        self, equation: JaxprEqn, operands: Iterable[Any], length: int
    ) -> list[Any]:
        """What a scan of this length runs over in place of these operands."""
        return self._changed(
            operands, lambda kind, x: kind.slices(equation, x, length)
        )

    def leave(self, results: Iterable[Any]) -> list[Any]:
        """What a body, or the whole program, returns in place of these results."""
        return self._changed(results, lambda kind, x: kind.leave(x))

    def _changed(
        self, values: Iterable[Any], change: Callable[[Kind, Special], Any]
    ) -> list[Any]:
        """The values, with change(its kind, x) in place of every special value x."""
        changed = []
        for x in values:
            if isinstance(x, Special):
                x = change(self.kind_of(x), x)
            changed.append(x)
        return changed
