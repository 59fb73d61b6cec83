"""`Closure`: the search for a fixed point of labels, whatever the rules that pass them through equations."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from sqjax.folding import labels as lab
from sqjax.folding.labels import Labels
from sqjax.program.build import Atom, Equation, Var
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
        """The same, with the equation named where none is named yet."""
        refused = Refused(*(r if "`" in r else f"{r} (through {equation})" for r in self.args))
        refused.way = self.way
        return refused

    def beside(self, reasons: Sequence[str]) -> "Refused":
        """The same, with the reasons for which another choice was impossible."""
        refused = Refused(*dict.fromkeys((*self.args, *reasons)))
        refused.way = self.way
        return refused


class Ties:
    """A union-find of channels: tied channels share one scale."""

    def __init__(self, roots: np.ndarray):
        self.roots = roots

    def of(self, labels: Labels) -> Labels:
        """The labels with every channel replaced by the one that stands for it."""
        return lab.compress(
            np.where(labels == 0, 0, np.sign(labels) * (self.roots[np.abs(labels) - 1] + 1))
        )

    def join(self, a: np.ndarray, b: np.ndarray) -> None:
        """Ties channel a[i] with channel b[i]; the smallest of them stands for all that are tied."""
        while (differ := self.roots[a] != self.roots[b]).any():
            p, q = self.roots[a[differ]], self.roots[b[differ]]
            parent = np.arange(self.roots.size)
            np.minimum.at(parent, np.maximum(p, q), np.minimum(p, q))
            while (parent != (up := parent[parent])).any():
                parent = up
            self.roots = parent[self.roots]


class Closure:
    """Labels on the way to a fixed point, for one site's activation.

    Args:
        program: the program searched.
        rules: by a primitive's name, what puts labels on an equation's variables given those of others.
        shared: {path: another path} of leaves that are the same array; no scale may reach them.
        channels: the number of channels of the activation.
        absorbers: the only leaves that may be divided; None: any.
        crossing: whether a scale may meet its inverse in another activation (keys and queries), not only in a leaf.
    """

    def __init__(
        self,
        program: Program,
        rules: Mapping[str, "Rule"],
        shared: Mapping[str, str],
        channels: int,
        absorbers: frozenset[str] | None = None,
        crossing: bool = False,
    ):
        self.program, self.rules, self.shared, self.absorbers = program, rules, shared, absorbers
        self.crossing = crossing
        self.causes: dict[Var, Equation | None] = {}
        self.current: Equation | None = None
        self.rejected: list[str] = []
        self.ties = Ties(np.arange(channels))
        self.labels: dict[Var, Labels] = {}
        self.queue: deque[Equation] = deque()
        self.undecided: list[tuple[Equation, Sequence[tuple[Var, Labels]]]] = []
        self.visits = itertools.count(1)

    def copy(self) -> "Closure":
        other = Closure(self.program, self.rules, self.shared, 0, self.absorbers, self.crossing)
        other.causes, other.current, other.rejected = (
            dict(self.causes),
            self.current,
            list(self.rejected),
        )
        other.ties, other.labels = Ties(self.ties.roots), dict(self.labels)
        other.queue, other.undecided = deque(self.queue), list(self.undecided)
        other.visits = self.visits  # one budget for all branches
        return other

    def __getitem__(self, atom: Atom) -> Labels | None:
        labels = self.labels.get(atom) if isinstance(atom, Var) else None
        return None if labels is None else self.ties.of(labels)

    def put(self, atom: Atom, labels: Labels | None) -> None:
        """Adds labels to a variable, and wakes the equations it stands in."""
        if labels is None or not labels.any() or self.program.is_zero(atom):
            return
        if not isinstance(atom, Var):
            raise Refused(f"the constant {atom} would have to be rescaled with it")
        shape = self.program.shape(atom)
        if not shape and labels.ndim:
            labels = self.tie_along(labels, range(labels.ndim)).reshape(())
        labels = self.tie_along(
            labels, [a for a, n in enumerate(labels.shape) if n > shape[a]]
        )  # x broadcasts
        old = self[atom]
        if old is None:
            self._admit(atom, labels)
            self.causes[atom] = self.current
            merged = labels
        else:
            merged = self.merge(old, labels)
        merged = self.ties.of(merged)
        if old is None or not np.array_equal(merged, self.ties.of(old)):
            self.labels[atom] = merged
            self.queue.extend(self.program.touching(atom))

    def _admit(self, var: Var, labels: Labels) -> None:
        """Refuses variables that can not carry a scale like this."""
        program = self.program
        if var in program.outputs:
            raise Refused(f"its scale would reach {program.outputs[var]}")
        if var in program.barred:
            raise Refused(program.barred[var])
        if var in program.roots:
            raise Refused(f"its scale would reach {program.roots[var]}")
        if not program.is_float(var):
            raise Refused(f"its scale would reach a value of dtype {program.avals[var].dtype}")
        if (path := program.leaves.get(var, "")) in self.shared:
            raise Refused(f"the array at {path} also stands at {self.shared[path]}")
        if (
            path
            and self.absorbers is not None
            and (labels < 0).any()
            and path not in self.absorbers
        ):
            raise Refused(f"{path} is not among the leaves that were said to absorb")
        for equation in program.touching(var):
            if equation.name not in self.rules:
                raise Refused(f"{equation} stands in the way")

    def merge(self, a: Labels, b: Labels) -> Labels:
        """One label array for two: no label gives way, different channels are tied, opposite signs refused."""
        a, b = np.broadcast_arrays(a, b)
        both = (a != 0) & (b != 0)
        if (np.sign(a) != np.sign(b))[both].any():
            raise Refused("an element would have to be both multiplied and divided")
        differ = both & (a != b)
        if differ.any():
            self.ties.join(np.abs(a[differ]) - 1, np.abs(b[differ]) - 1)
        return np.where(a == 0, b, a)

    def tie_along(self, labels: Labels, axes: Iterable[int]) -> Labels:
        """Ties all labels along each of `axes`, which get size 1."""
        for axis in axes:
            while (size := labels.shape[axis]) > 1:
                first, second, odd = np.split(labels, [size // 2, size // 2 * 2], axis)
                labels = np.concatenate([self.merge(first, second), odd], axis)
        return self.ties.of(labels)

    def numbered(self) -> dict[Var, Labels]:
        """The labels of every variable, the channels that stand for themselves numbered 0, 1, 2 ..."""
        used, number = np.unique(self.ties.roots, return_inverse=True)
        assert (used[number] == self.ties.roots).all()
        ties = Ties(number)
        return {var: ties.of(labels) for var, labels in self.labels.items()}

    def choose(self, equation: Equation, options: Sequence[tuple[Atom, Labels]]) -> None:
        """Takes one of `options` (variable, labels): the only possible one, or notes that there is a choice."""
        possible: list[tuple[Var, Labels]] = []
        reasons: list[str] = []
        for var, labels in options:
            if isinstance(var, Var):
                try:
                    self._admit(var, labels)
                except Refused as refused:
                    reasons += refused.at(equation).args
                else:
                    possible.append((var, labels))
        if not possible:
            raise Refused(*dict.fromkeys(reasons or [f"{equation} would have to scale a constant"]))
        if len(possible) == 1:
            self.rejected += reasons
            self.put(*possible[0])
        else:
            # Those that tie the fewest channels first; among equals, leaves first.
            possible.sort(key=lambda o: (-self._distinct(*o), o[0] not in self.program.from_leaves))
            self.undecided.append((equation, possible))

    def _distinct(self, var: Var, labels: Labels) -> int:
        """How many scales would be left if a variable took these labels."""
        shape = self.program.shape(var)
        kept = tuple(
            slice(0, 1) if n > m else slice(None)
            for n, m in zip(labels.shape, shape or (1,) * labels.ndim, strict=True)
        )
        return np.unique(labels[kept]).size

    def close(self) -> "Closure":
        """The fixed point; where there is a choice, the first one that leads to a fixed point."""
        while self.queue:
            equation = self.queue.popleft()
            if next(self.visits) > BUDGET:
                raise Refused(f"the search gave up after {BUDGET} equations")
            self.current = equation
            try:
                self.rules[equation.name](self, equation)
            except Refused as refused:
                refused.way = refused.way or self.way_to(equation)
                raise refused.at(equation).beside(self.rejected) from None
        while self.undecided:
            equation, options = self.undecided.pop()
            if any(self[v] is not None for v, _ in options):
                continue
            return self._branch(equation, options)
        return self

    def _branch(self, equation: Equation, options: Sequence[tuple[Var, Labels]]) -> "Closure":
        reasons: list[str] = []
        way: tuple[str, ...] = ()
        for var, labels in options:
            branch = self.copy()
            branch.current = equation
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
        """The equations that carried labels from the activation to this one."""
        way: list[str] = []
        while equation is not None:
            way.insert(0, str(equation))
            known = [
                v
                for v in (*equation.inputs, *equation.outputs)
                if isinstance(v, Var) and v in self.causes
            ]
            first = min(known, key=list(self.causes).index, default=None)
            cause = None if first is None else self.causes[first]
            equation = cause if cause is not equation else None
        return tuple(way)


Rule = Callable[[Closure, Equation], None]
