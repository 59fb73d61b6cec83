"""`Closure`: the search for labels that an activation's scale forces on the rest of the program.

The search starts with labels on one variable, the activation that a site reads: it shall be divided
by a scale of its own for each channel. A *queue* holds the equations that a labelled variable
stands in: the one that makes it and those that read it. Taking one of them, the search lets the
primitive's rule (`sqjax.folding.rules`) put labels on the equation's other variables. Each of these
wakes the equations that it stands in, and so on, backwards to who made the activation and forwards
to whoever else reads it, until

- the queue is empty: what was reached is closed, every concerned variable has its labels; or
- a label would stand where none may: on an input, an output, an integer ... Then it is refused.

Labels that meet on one variable are merged: channels that have to be the same are tied. So labels
only spread and ties only grow, and the search ends.

Example: y = relu((x * norm) @ w) with the activation h = x * norm of two channels.

    h     [[-1, -2]]      the start; in the queue: `mul`, which makes h, and `dot_general`
    norm  [-1, -2]        `mul`, backwards: x is an input, so norm must absorb
    w     [[1], [2]]      `dot_general`, forwards: h's scale must meet its inverse
                          the product, and so relu and y, carry no label; the queue is empty

Where an equation leaves a choice (which factor of a product absorbs?) it is put off until the queue
is empty, because labels that arrive in between may decide it. What is still open then is tried, one
option after the other, each in a copy of the search.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sqjax.folding.labels import Labels, channels_and_degrees
from sqjax.folding.ties import Ties
from sqjax.program.equations import Atom, Equation, Var
from sqjax.program.facts import Program

#: Equations that one search may visit: far more than any sound group needs.
BUDGET = 20_000


class Refused(Exception):
    """Why an activation's scale can not be folded: one reason, or one for every way that was tried.

    `way` holds the equations from the activation to the one that stands in the way.
    """

    way: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "; and ".join(self.args[:4])

    def at(self, equation: Equation) -> "Refused":
        """The same, with the equation named in each reason that names none yet."""
        reasons = [
            r if "`" in r else f"{r} (through {equation})" for r in self.args
        ]
        return self._because(reasons)

    def beside(self, reasons: Sequence[str]) -> "Refused":
        """The same, with the reasons for which another choice was impossible."""
        return self._because(dict.fromkeys((*self.args, *reasons)))

    def _because(self, reasons: Iterable[str]) -> "Refused":
        refused = Refused(*reasons)
        refused.way = self.way
        return refused


class Question(NamedTuple):
    """Where a search may go.

    Attributes:
        program: the program searched.
        rules: by a primitive's name, what puts labels on an equation's variables given those of
            others.
        shared: {path: another path} of leaves that are the same array; no scale may reach them.
        absorbers: the only leaves that may be divided; None: any.
        crossing: whether a scale may meet its inverse in another activation (keys and queries), not
            only in a leaf.
    """

    program: Program
    rules: Mapping[str, "Rule"]
    shared: Mapping[str, str]
    absorbers: frozenset[str] | None = None
    crossing: bool = False


class Closure:
    """Labels on the way to a fixed point, for one activation.

    Attributes:
        labels: {variable: its labels} so far. Read them by `closure[variable]`, which applies the
            ties.
        ties: which of the activation's channels share one scale.
        causes: {labelled variable: the equation through which its first label came}, in that order.
        rejected: why the other options of choices were impossible; told if what was left fails too.
    """

    def __init__(self, question: Question, ties: Ties):
        self.question = question
        self.program = question.program
        self.ties = ties
        self.labels: dict[Var, Labels] = {}
        self.causes: dict[Var, Equation | None] = {}
        self.rejected: list[str] = []
        self._current: Equation | None = (
            None  # the equation whose rule is at work
        )
        self._queue: deque[Equation] = deque()
        self._undecided: list[
            tuple[Equation, Sequence[tuple[Var, Labels]]]
        ] = []
        self._visits = itertools.count(1)

    def check_may_meet(self, equation: Equation, a: Atom, b: Atom) -> None:
        """A scale may meet its inverse in a leaf; in another activation only where asked for.

        Raises:
            Refused: both factors are activations, and that was not asked for.
        """
        of_activations = self.program.from_leaves.isdisjoint((a, b))
        if of_activations and not self.question.crossing:
            raise Refused(f"{equation} multiplies it with another activation")

    def copy(self) -> "Closure":
        """A search that goes on from here by itself; label arrays are never changed in place."""
        other = Closure(self.question, Ties(self.ties.roots))
        other.labels = dict(self.labels)
        other.causes = dict(self.causes)
        other.rejected = list(self.rejected)
        other._current = self._current
        other._queue = deque(self._queue)
        other._undecided = list(self._undecided)
        other._visits = self._visits  # one budget for all branches
        return other

    # Labels on variables --------------------------------------------------------------------------

    def __getitem__(self, atom: Atom) -> Labels | None:
        """The labels of a variable, tied channels being one; None if it has none (yet)."""
        if not isinstance(atom, Var) or atom not in self.labels:
            return None
        return self.ties.of(self.labels[atom])

    def written(self, atom: Atom) -> Labels:
        """The labels of a variable; 0 everywhere if it has none (yet)."""
        labels = self[atom]
        return (
            np.zeros((1,) * self.rank(atom), int) if labels is None else labels
        )

    def put(self, atom: Atom, labels: Labels | None) -> None:
        """Adds labels to a variable, and wakes the equations it stands in.

        Raises:
            Refused: it is a literal, or can not carry such labels.
        """
        # A zero is zero at any scale, and infinity infinity: they need no label and carry any.
        if (
            labels is None
            or not labels.any()
            or self.program.is_scale_free(atom)
        ):
            return
        if not isinstance(atom, Var):
            raise Refused(
                f"the constant {atom} would have to be rescaled with it"
            )
        labels = self._fitted(labels, self.program.shape(atom))
        if atom not in self.labels:
            self._admit(atom, labels)
            self.causes[atom] = self._current
        old = self.written(atom)
        merged = self.ties.of(self._merged(old, labels))
        # Only what is new wakes equations, so the search ends. Ties that merging has just made are
        # no news: they hold for all variables at once.
        if not np.array_equal(merged, self.ties.of(old)):
            self.labels[atom] = merged
            self._queue.extend(self.program.touching(atom))

    def carry(
        self,
        source: Atom,
        target: Atom,
        change: Callable[[Labels], Labels | None],
    ) -> None:
        """Puts on one variable what `change` makes of another one's labels, if that has any."""
        labels = self[source]
        if labels is not None:
            self.put(target, change(labels))

    def rank(self, atom: Atom) -> int:
        """The number of axes of a variable or literal."""
        return len(self.program.shape(atom))

    def _fitted(self, labels: Labels, shape: tuple[int, ...]) -> Labels:
        """Labels for an operand of this shape, which may be broadcast: its one element is read for
        several labels, which are tied.

        Example: a bias of shape (3, 1) beside channels [[1, 2, 3, 4]] gets [[1]], all of them tied.
        """
        own = shape or (1,) * labels.ndim  # a scalar stands beside any rank
        broadcast = np.flatnonzero(np.greater(labels.shape, own)).tolist()
        tied = self.tie_along(labels, broadcast)
        return tied if shape else tied.reshape(())

    def _merged(self, a: Labels, b: Labels) -> Labels:
        """One label array for two: no label gives way, different channels are tied.

        Example: [1, 0] and [2, 3] give [1, 3], with channels 0 and 1 tied.

        Raises:
            Refused: an element has a positive label in one and a negative one in the other, or a
                scale in one and a root in the other.
        """
        a, b = np.broadcast_arrays(a, b)
        both = (a != 0) & (b != 0)
        if (np.sign(a) != np.sign(b))[both].any():
            raise Refused(
                "an element would have to be both multiplied and divided"
            )
        differ = both & (a != b)
        if differ.any():
            channels_a, degrees_a = channels_and_degrees(a[differ])
            channels_b, degrees_b = channels_and_degrees(b[differ])
            if (degrees_a != degrees_b).any():
                raise Refused("an element would carry a scale and its root")
            self.ties.join(channels_a - 1, channels_b - 1)
        return np.where(a == 0, b, a)

    def tie_along(self, labels: Labels, axes: Iterable[int]) -> Labels:
        """Ties all labels along each of `axes`, which get size 1: [[1, 2, 3]] along axis 1: [[1]].

        By halves: the first half is merged with the second until one is left.
        """
        for axis in axes:
            while (size := labels.shape[axis]) > 1:
                half = size // 2
                first, second, odd = np.split(labels, [half, 2 * half], axis)
                labels = np.concatenate(
                    [self._merged(first, second), odd], axis
                )
        return self.ties.of(labels)

    def numbered(self) -> dict[Var, Labels]:
        """The labels of every variable, the channels that stand for others numbered 0, 1, 2 ..."""
        ties = self.ties.numbered()
        return {var: ties.of(labels) for var, labels in self.labels.items()}

    # What may carry labels ------------------------------------------------------------------------

    def _admit(self, var: Var, labels: Labels) -> None:
        """Refuses variables that can not carry a scale like this."""
        reason = self._fixed(var) or self._fixed_leaf(var, labels)
        if reason is not None:
            raise Refused(reason)
        for equation in self.program.touching(var):
            if equation.name not in self.question.rules:
                raise Refused(f"{equation} stands in the way")

    def _fixed(self, var: Var) -> str | None:
        """Why no scale may reach a variable; None if one may."""
        program = self.program
        if var in program.outputs:
            return f"its scale would reach {program.outputs[var]}"
        if var in program.barred:
            return program.barred[var]
        if var in program.roots:
            return f"its scale would reach {program.roots[var]}"
        if not program.is_scalable(var):
            return f"its scale would reach a value of dtype {program.avals[var].dtype}"
        return None

    def _fixed_leaf(self, var: Var, labels: Labels) -> str | None:
        """Why a leaf may not carry these labels; None if it may, or if the variable is no leaf."""
        path = self.program.leaves.get(var)
        if path is None:
            return None
        shared, absorbers = self.question.shared, self.question.absorbers
        if path in shared:
            return f"the array at {path} also stands at {shared[path]}"
        if (
            absorbers is not None
            and path not in absorbers
            and (labels < 0).any()
        ):
            return f"{path} is not among the leaves that were said to absorb"
        return None

    # Choices --------------------------------------------------------------------------------------

    def choose(
        self, equation: Equation, options: Sequence[tuple[Atom, Labels]]
    ) -> None:
        """Takes one of `options` (variable, labels): the only possible one, or puts the choice off.

        Raises:
            Refused: none is possible.
        """
        possible: list[tuple[Var, Labels]] = []
        reasons: list[str] = []
        for atom, labels in options:
            if not isinstance(atom, Var):
                continue  # a literal can not be scaled
            try:
                self._admit(atom, labels)
            except Refused as refused:
                reasons += refused.at(equation).args
            else:
                possible.append((atom, labels))
        if not possible:
            raise Refused(
                *dict.fromkeys(
                    reasons or [f"{equation} would have to scale a constant"]
                )
            )
        if len(possible) == 1:
            self.rejected += reasons
            self.put(*possible[0])
            return

        def rank(option: tuple[Var, Labels]) -> tuple[int, bool]:
            """Those that tie the fewest channels first; among equals, what is no activation."""
            var, labels = option
            is_activation = var not in self.program.steady
            return -self._distinct(var, labels), is_activation

        # Labels that arrive before the queue is empty may decide it.
        self._undecided.append((equation, sorted(possible, key=rank)))

    def _distinct(self, var: Var, labels: Labels) -> int:
        """How many scales would be left if a variable took these labels."""
        shape = self.program.shape(var) or (1,) * labels.ndim
        # Less than the labels' where the variable broadcasts.
        kept = np.minimum(labels.shape, shape)
        return np.unique(labels[tuple(map(slice, kept))]).size

    # The search -----------------------------------------------------------------------------------

    def close(self) -> "Closure":
        """The fixed point; where there is a choice, the first option that leads to a fixed point.

        Raises:
            Refused: there is none.
        """
        while self._queue:
            self._visit(self._queue.popleft())
        while self._undecided:
            equation, options = self._undecided.pop()
            # By labels that reached one of the options in another way.
            decided = any(self[var] is not None for var, _ in options)
            if not decided:
                return self._branch(equation, options)
        return self

    def _visit(self, equation: Equation) -> None:
        """Lets the rule of an equation put labels on its variables."""
        if next(self._visits) > BUDGET:
            raise Refused(f"the search gave up after {BUDGET} equations")
        self._current = equation
        try:
            self.question.rules[equation.name](self, equation)
        except Refused as refused:
            # A refusal of a branch brings its own way, which leads further than this equation.
            refused.way = refused.way or self.way_to(equation)
            raise refused.at(equation).beside(self.rejected) from None

    def _branch(
        self, equation: Equation, options: Sequence[tuple[Var, Labels]]
    ) -> "Closure":
        """The first option, tried in a copy of the search, from which there is a fixed point."""
        reasons: list[str] = []
        way: tuple[str, ...] = ()
        for var, labels in options:
            branch = self.copy()
            branch._current = equation
            try:
                branch.put(var, labels)
                return branch.close()
            except Refused as refused:
                reasons += refused.at(equation).args
                way = way or refused.way
        none_left = Refused(*dict.fromkeys(reasons))
        none_left.way = way
        raise none_left

    def way_to(self, equation: Equation | None) -> tuple[str, ...]:
        """The equations that carried labels from the activation to this one.

        From an equation backwards: of its labelled variables the first to be labelled got its
        labels through the equation before it.
        """
        order = {var: position for position, var in enumerate(self.causes)}
        way: list[str] = []
        while equation is not None:
            way.insert(0, str(equation))
            atoms = (*equation.inputs, *equation.outputs)
            labelled = order.keys() & set(atoms)
            if not labelled:
                break  # refused before any label was put
            cause = self.causes[min(labelled, key=order.__getitem__)]
            equation = None if cause is equation else cause
        return tuple(way)


Rule = Callable[[Closure, Equation], None]
