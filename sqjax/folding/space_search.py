"""`SpaceSearch`: which variables become x Q if one does.

As in `sqjax.folding.search`, the search starts at one variable and visits the equations that it
stands in; the rule of each primitive (`sqjax.folding.space_rules`) says what else must turn with
it. A variable that turns is a *member*. The product of two members, element by element, is no
member, but its sum over the channels does not change: x . y = (x Q) . (y Q).

Example: h = x * rsqrt(mean(x * x)), y = h @ w, all along the last axis.

    h         the start
    x         `mul`, backwards: the other factor is one number for each token
    x * x     a product of members; `reduce_sum` takes it, and nothing that follows changes
    w         `dot_general`: the sum over the channels does not change if w turns too
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from sqjax.folding.search import Refused
from sqjax.folding.space import Along
from sqjax.folding.space_moves import Parts, Split
from sqjax.program.constant_axes import gain_of, is_constant_along
from sqjax.program.equations import Atom, Body, Equation, Var
from sqjax.program.facts import Program

Rule = Callable[["SpaceSearch", Equation], None]


class Failure(NamedTuple):
    """Why variables can not turn, and what smaller spaces may be left of them (see `Split`)."""

    reasons: tuple[str, ...]
    parts: Parts = ()

    @classmethod
    def of(cls, refused: Refused) -> "Failure":
        """What a refusal says."""
        return cls(refused.args, getattr(refused, "parts", ()))

    def refused(self) -> Refused:
        """The refusal again."""
        return Split(self.parts, *self.reasons)


class World(NamedTuple):
    """What all searches of one program share.

    Attributes:
        program: the program.
        rules: by a primitive's name, what else of an equation turns if some of it does.
        shared: {path: another path} of leaves that are the same array; these must not turn.
        around: {variable that enters or leaves a body: the equations that run the body}.
        failed: {(variable, where, size): why it can not turn}. Whoever is tied to it can not
            either, so that no search walks through a program in vain twice.
    """

    program: Program
    rules: Mapping[str, "Rule"]
    shared: Mapping[str, str]
    around: Mapping[Var, Sequence[Equation]]
    failed: dict[tuple[Var, Along, int], Failure]

    @classmethod
    def of(
        cls,
        program: Program,
        rules: Mapping[str, "Rule"],
        shared: Mapping[str, str],
    ) -> "World":
        """Of a program that nothing was searched in yet."""
        return cls(program, rules, shared, _equations_around(program), {})


class SpaceSearch:
    """Members on the way to a fixed point.

    It ends, because a variable can turn along each of its axes in one way only.

    Attributes:
        members: {variable: where the space lies in it}; two places if two of its axes turn.
        products: {variable: where} of products of two members.
        gains: leaves that multiply members, which must be ones.
        keeps_ones: whether a mean is taken, or one number added to all channels.
    """

    def __init__(self, world: World, size: int):
        self.program = world.program
        self.size = size
        self.members: dict[Var, set[Along]] = {}
        self.products: dict[Var, Along] = {}
        self.gains: set[str] = set()
        self.keeps_ones = False
        self._world = world
        # The equations by identity, so that each waits once.
        self._queue: dict[int, Equation] = {}

    def of(self, atom: Atom) -> list[Along]:
        """Where the space lies in a variable; nothing of what is no member."""
        return list(self.members.get(atom, ())) if isinstance(atom, Var) else []

    def product(self, atom: Atom) -> Along | None:
        """Where the space lies in a product of two members; None of anything else."""
        return self.products.get(atom) if isinstance(atom, Var) else None

    def put(self, atom: Atom, along: Along) -> None:
        """Makes a variable a member, and wakes the equations that it stands in.

        Raises:
            Refused: it can not turn.
        """
        if self.program.is_zero(atom):
            return  # 0 Q = 0
        if not isinstance(atom, Var):
            raise Refused(f"the constant {atom} would have to turn with it")
        known = self.members.setdefault(atom, set())
        if along in known:
            return
        failure = self._world.failed.get((atom, along, self.size))
        if failure is not None:
            raise failure.refused()
        self._check(atom)
        if along.axis in {other.axis for other in known}:
            raise Refused("an axis would have to turn in two ways")
        known.add(along)
        self._wake(atom)

    def put_product(self, atom: Var, along: Along) -> None:
        """Notes that a variable is a product of members."""
        known = self.products.get(atom)
        if known == along:
            return
        if known is not None:
            raise Refused("a product of members lies in two ways")
        self._check(atom)
        self.products[atom] = along
        self._wake(atom)

    def put_or_keep(self, atom: Atom, along: Along) -> None:
        """Makes a summand a member; or, if it is one number for all channels, keeps ones."""
        if self.program.is_zero(atom):
            return
        # Of one number c for all channels, c 1 Q = c 1 is asked instead.
        if self.is_constant(atom, along):
            self.keeps_ones = True
        else:
            self.put(atom, along)

    def is_constant(self, atom: Atom, along: Along) -> bool:
        """Whether an operand is the same for all channels."""
        return is_constant_along(self.program, atom, along.axis)

    def note_gain(self, atom: Atom, along: Along) -> bool:
        """Whether a factor is a leaf, or one times what is the same for all channels; if it is, the
        leaf is noted as one that must be ones.
        """
        path = gain_of(self.program, atom, along.axis)
        if path is None or self.of(atom):
            return False
        self.gains.add(path)
        return True

    def close(self) -> None:
        """The fixed point.

        Raises:
            Refused: there is none.
        """
        while self._queue:
            equation = self._queue.pop(next(iter(self._queue)))
            try:
                self._world.rules[equation.name](self, equation)
            except Refused as refused:
                # The reasons with the equation that gave them; the parts as they are.
                reasons = refused.at(equation).args
                failure = Failure.of(refused)._replace(reasons=reasons)
                raise failure.refused() from None

    def _wake(self, var: Var) -> None:
        """Lets the equations that a variable stands in wait for their rules.

        Raises:
            Refused: there is no rule for one of them.
        """
        equations = [
            *self.program.touching(var),
            *self._world.around.get(var, ()),
        ]
        for equation in equations:
            if equation.name not in self._world.rules:
                raise Refused(f"{equation} stands in the way")
            self._queue.setdefault(id(equation), equation)

    def _check(self, var: Var) -> None:
        """Raises `Refused` for what can not turn."""
        program = self.program
        if var in program.results:
            raise Refused("it would turn an output of fn")
        if var in program.inputs and var not in program.leaves:
            raise Refused(f"it would turn {program.roots[var]}")
        if var in program.constants:
            raise Refused("it would turn a constant captured by fn")
        if not program.is_float(var):
            dtype = program.avals[var].dtype
            raise Refused(f"it would turn a value of dtype {dtype}")
        path = program.leaves.get(var, "")
        # (w + 1) Q is not w Q + 1.
        if var in program.offsets:
            raise Refused(f"it would turn {path} plus a number")
        shared = self._world.shared
        if path in shared:
            other = shared[path]
            raise Refused(f"the array at {path} also stands at {other}")


def _equations_around(program: Program) -> dict[Var, list[Equation]]:
    """{variable that enters or leaves a body: the equations that run the body}."""
    around: dict[Var, list[Equation]] = {}
    for equation in program.equations:
        for var in _at_the_border(equation.bodies):
            around.setdefault(var, []).append(equation)
    return around


def _at_the_border(bodies: tuple[Body, ...]) -> Iterator[Var]:
    """The variables that enter or leave bodies."""
    for body in bodies:
        yield from body.inputs
        for atom in body.outputs:
            if isinstance(atom, Var):
                yield atom
