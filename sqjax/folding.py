"""Folding: which leaves of a program can absorb a channel scale, found by passing labels through its equations.

Ask of a site's input x: could x be x / s? Labels (see `sqjax.labels`) start at x and go wherever equations carry them,
to the operands and to every reader, until all of them end in leaves, or something refuses. One rule for every
primitive: given the labels of some of an equation's variables, it puts labels on the others. What is found here is
believed only after `sqjax.certificate` has checked it.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sqjax import labels as lab
from sqjax.certificate import certify
from sqjax.graph import Graph, Group, LabelMap, Site
from sqjax.labels import Labels
from sqjax.program import Equation, Program, Var

#: Equations that one search may visit: far more than any sound group needs.
BUDGET = 20_000


class Refused(Exception):
    """Why an activation's scale can not be folded: one reason, or one for every way that was tried."""

    def __str__(self) -> str:
        return "; and ".join(self.args[:4])

    def at(self, equation: Equation) -> "Refused":
        """The same, with the equation named where none is named yet."""
        return Refused(*(r if "`" in r else f"{r} (through {equation})" for r in self.args))


class Place(NamedTuple):
    """A site in the program: the matmul's activation, and its contracted axes in the order of the leaf's."""

    site: Site
    equation: Equation
    activation: Var
    axes: tuple[int, ...]


class Ties:
    """A union-find of channels: tied channels share one scale."""

    def __init__(self, roots: np.ndarray):
        self.roots = roots

    def of(self, labels: Labels) -> Labels:
        """The labels with every channel replaced by the one that stands for it."""
        return lab.compress(np.where(labels == 0, 0, np.sign(labels) * (self.roots[np.abs(labels) - 1] + 1)))

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
    """Labels on the way to a fixed point, for one site's activation."""

    def __init__(self, program: Program, shared: Mapping[str, str], channels: int):
        self.program, self.shared = program, shared
        self.ties = Ties(np.arange(channels))
        self.labels: dict[Var, Labels] = {}
        self.queue: deque[Equation] = deque()
        self.undecided: list[tuple[Equation, Sequence[tuple[Var, Labels]]]] = []
        self.visits = itertools.count(1)

    def copy(self) -> "Closure":
        other = Closure(self.program, self.shared, 0)
        other.ties, other.labels = Ties(self.ties.roots), dict(self.labels)
        other.queue, other.undecided = deque(self.queue), list(self.undecided)
        other.visits = self.visits  # one budget for all branches
        return other

    def __getitem__(self, atom: Var | np.ndarray) -> Labels | None:
        labels = self.labels.get(atom) if isinstance(atom, int) else None
        return None if labels is None else self.ties.of(labels)

    def put(self, atom: Var | np.ndarray, labels: Labels | None) -> None:
        """Adds labels to a variable, and wakes the equations it stands in."""
        if labels is None or not labels.any() or self.program.is_zero(atom):
            return
        if not isinstance(atom, int):
            raise Refused(f"it would scale the constant {atom}")
        shape = self.program.shape(atom)
        if not shape and labels.ndim:
            labels = self.tie_along(labels, range(labels.ndim)).reshape(())
        labels = self.tie_along(labels, [a for a, n in enumerate(labels.shape) if n > shape[a]])  # x broadcasts
        old = self[atom]
        if old is None:
            self._admit(atom)
            merged = labels
        else:
            merged = self.merge(old, labels)
        merged = self.ties.of(merged)
        if old is None or not np.array_equal(merged, self.ties.of(old)):
            self.labels[atom] = merged
            self.queue.extend(self.program.touching(atom))

    def _admit(self, var: Var) -> None:
        """Refuses variables that can not carry a scale, whatever it is."""
        program = self.program
        if var in program.outputs:
            raise Refused("its scale would reach an output of fn")
        if var in program.roots:
            raise Refused(f"its scale would reach {program.roots[var]}")
        if not program.is_float(var):
            raise Refused(f"its scale would reach a value of dtype {program.avals[var].dtype}")
        if (path := program.leaves.get(var, "")) in self.shared:
            raise Refused(f"the array at {path} also stands at {self.shared[path]}")
        for equation in program.touching(var):
            if equation.name not in RULES:
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

    def choose(self, equation: Equation, options: Sequence[tuple[Var | np.ndarray, Labels]]) -> None:
        """Takes one of `options` (variable, labels): the only possible one, or notes that there is a choice."""
        possible: list[tuple[Var, Labels]] = []
        reasons: list[str] = []
        for var, labels in options:
            if isinstance(var, int):
                try:
                    self._admit(var)
                except Refused as refused:
                    reasons += refused.at(equation).args
                else:
                    possible.append((var, labels))
        if not possible:
            raise Refused(*dict.fromkeys(reasons or [f"{equation} would have to scale a constant"]))
        if len(possible) == 1:
            self.put(*possible[0])
        else:
            possible.sort(key=lambda o: o[0] not in self.program.from_leaves)  # leaves first
            self.undecided.append((equation, possible))

    def close(self) -> "Closure":
        """The fixed point; where there is a choice, the first one that leads to a fixed point."""
        while self.queue:
            equation = self.queue.popleft()
            if next(self.visits) > BUDGET:
                raise Refused(f"the search gave up after {BUDGET} equations")
            try:
                RULES[equation.name](self, equation)
            except Refused as refused:
                raise refused.at(equation) from None
        while self.undecided:
            equation, options = self.undecided.pop()
            if any(self[v] is not None for v, _ in options):
                continue
            return self._branch(equation, options)
        return self

    def _branch(self, equation: Equation, options: Sequence[tuple[Var, Labels]]) -> "Closure":
        reasons: list[str] = []
        for var, labels in options:
            branch = self.copy()
            try:
                branch.put(var, labels)
                return branch.close()
            except Refused as refused:
                reasons += refused.at(equation).args
        raise Refused(*dict.fromkeys(reasons))


Rule = Callable[[Closure, Equation], None]


def _move(c: Closure, e: Equation) -> None:
    """Data movement: labels move with the data, both ways."""
    x, y = e.inputs[0], e.outputs[0]
    old, new = c.program.shape(x), c.program.shape(y)
    if (labels := c[x]) is not None:
        c.put(y, lab.MOVES[e.name](labels, e.params, old, new))
    if (labels := c[y]) is not None:
        c.put(x, _UNDO.get(e.name, _same)(c, labels, e.params, old, new))


def _same(c, labels, params, old, new):
    return labels


def _undo_transpose(c, labels, params, old, new):
    return labels.transpose(np.argsort(params["permutation"]))


def _undo_reshape(c, labels, params, old, new):
    if (order := params.get("dimensions")) is None:
        return lab.reshape(labels, new, old)
    return lab.reshape(labels, new, tuple(old[a] for a in order)).transpose(np.argsort(order))


def _undo_squeeze(c, labels, params, old, new):
    return np.expand_dims(labels, tuple(params["dimensions"]))


def _undo_broadcast(c, labels, params, old, new):
    axes = params["broadcast_dimensions"]
    repeated = [a for a in range(len(new)) if a not in axes or old[axes.index(a)] != new[a]]
    return lab.take_axes(c.tie_along(labels, repeated), axes)


def _undo_slice(c, labels, params, old, new):
    strides = params["strides"] or (1,) * len(old)
    cuts = list(zip(params["start_indices"], params["limit_indices"], strides, strict=True))
    partial = [(b - a) // s != n for (a, b, s), n in zip(cuts, old, strict=True)]
    full = np.zeros([n if p or size > 1 else 1 for n, p, size in zip(old, partial, labels.shape, strict=True)], int)
    full[tuple(slice(*cut) if p else slice(None) for cut, p in zip(cuts, partial, strict=True))] = labels
    return full


_UNDO = {
    "transpose": _undo_transpose,
    "reshape": _undo_reshape,
    "squeeze": _undo_squeeze,
    "broadcast_in_dim": _undo_broadcast,
    "slice": _undo_slice,
}


def _split(c: Closure, e: Equation) -> None:
    axis, sizes = e.params["axis"], [int(n) for n in e.params["sizes"]]
    if (labels := c[e.inputs[0]]) is not None:
        for y, piece in zip(e.outputs, lab.split(labels, axis, sizes), strict=True):
            c.put(y, piece)
    _join(c, e.inputs[0], e.outputs, axis, sizes)


def _concatenate(c: Closure, e: Equation) -> None:
    axis = e.params["dimension"]
    sizes = [c.program.shape(x)[axis] for x in e.inputs]
    if (labels := c[e.outputs[0]]) is not None:
        for x, piece in zip(e.inputs, lab.split(labels, axis, sizes), strict=True):
            c.put(x, piece)
    _join(c, e.outputs[0], e.inputs, axis, sizes)


def _join(c: Closure, whole: Var | np.ndarray, parts: Sequence[Var | np.ndarray], axis: int, sizes) -> None:
    found = [c[p] for p in parts]
    if any(p is not None for p in found):
        blank = np.zeros((1,) * len(c.program.shape(whole)), int)
        c.put(whole, lab.concatenate([blank if p is None else p for p in found], axis, sizes))


def _alike(c: Closure, e: Equation) -> None:
    """Sums, maxima: every term and the result carry the same labels."""
    terms = [*(e.inputs[1:] if e.name == "select_n" else e.inputs), e.outputs[0]]
    for labels in [c[v] for v in terms]:
        for v in terms:
            c.put(v, labels)
    if e.name == "select_n" and c[e.inputs[0]] is not None:
        raise Refused(f"{e} chooses by it")


def _compare(c: Closure, e: Equation) -> None:
    """x > 0 does not change when x is divided by s > 0."""
    if not any(c.program.is_zero(x) for x in e.inputs):
        raise Refused(f"{e} compares it")


def _multiply(c: Closure, e: Equation) -> None:
    """The result carries the labels of one factor."""
    y = e.outputs[0]
    factors = [(x, labels) for x in e.inputs if (labels := c[x]) is not None]
    if len(factors) == 2:
        raise Refused(f"{e} multiplies two values of that scale")
    if factors:
        [(x, labels)] = factors
        c.put(y, _spread(labels, c.program.shape(y)))
        c.put(x, c[y])
    elif (labels := c[y]) is not None:
        c.choose(e, [(x, labels) for x in e.inputs])


def _divide(c: Closure, e: Equation) -> None:
    """The result carries the labels of the numerator."""
    (x, divisor), y = e.inputs, e.outputs[0]
    if c[divisor] is not None:
        raise Refused(f"{e} divides by it")
    if (labels := c[x]) is not None:
        c.put(y, _spread(labels, c.program.shape(y)))
    c.put(x, c[y])


def _spread(labels: Labels, shape: tuple[int, ...]) -> Labels:
    return labels if labels.ndim == len(shape) else labels.reshape((1,) * len(shape))


def _reduce(c: Closure, e: Equation) -> None:
    """Sums and maxima along axes on which labels do not vary."""
    x, y, axes = e.inputs[0], e.outputs[0], tuple(e.params["axes"])
    if (labels := c[x]) is not None:
        if lab.varies(labels, axes):
            raise Refused(f"{e} adds up its channels" if e.name == "reduce_sum" else f"{e} compares its channels")
        c.put(y, labels.squeeze(axes))
    if (labels := c[y]) is not None:
        c.put(x, np.expand_dims(labels, axes))


class _Side(NamedTuple):
    """One operand of a dot_general: its axes, and where its free axes stand in the result."""

    var: Var | np.ndarray
    contracted: tuple[int, ...]
    batch: tuple[int, ...]
    free: tuple[int, ...]
    out: tuple[int, ...]


def _sides(program: Program, e: Equation) -> tuple[_Side, _Side]:
    contracting, batch = e.params["dimension_numbers"]
    sides, start = [], len(batch[0])
    for var, c, b in zip(e.inputs, contracting, batch, strict=True):
        ndim = len(program.shape(var))
        free = tuple(a for a in range(ndim) if a not in c and a not in b)
        sides.append(_Side(var, tuple(c), tuple(b), free, tuple(range(start, start + len(free)))))
        start += len(free)
    return sides[0], sides[1]


def _dot(c: Closure, e: Equation) -> None:
    """Labels along contracted axes must meet their opposites in a leaf; labels along the others pass through."""
    sides, y = _sides(c.program, e), e.outputs[0]
    ndim = len(c.program.shape(y))
    carriers: list[_Side] = []
    for me, other in (sides, sides[::-1]):
        if (labels := c[me.var]) is None or _cancelled(labels, c[other.var]):
            continue
        if _cancels(c, labels, me, other):
            _meet(c, e, labels, me, other)
        else:
            carriers.append(me)
            c.put(y, lab.put_axes(lab.take_axes(labels, me.batch + me.free), (*range(len(me.batch)), *me.out), ndim))
    if (labels := c[y]) is None:
        return
    if len(carriers) == 2:
        raise Refused(f"{e} multiplies two values of that scale")
    if carriers:
        c.put(carriers[0].var, _into(c, labels, carriers[0]))
    else:
        c.choose(e, [(s.var, _into(c.copy(), labels, s)) for s in sides])


def _cancelled(labels: Labels, other: Labels | None) -> bool:
    """Whether one channel's scale meets its inverse: all channels are tied, or there is one only."""
    return other is not None and labels.size == other.size == 1 and labels.item() == -other.item()


def _cancels(c: Closure, labels: Labels, me: _Side, other: _Side) -> bool:
    meets_leaf = other.var in c.program.from_leaves and me.var not in c.program.from_leaves
    return lab.varies(labels, me.contracted) or (labels.size == 1 and meets_leaf)


def _meet(c: Closure, e: Equation, labels: Labels, me: _Side, other: _Side) -> None:
    if lab.varies(labels, me.free):
        raise Refused(f"{e} adds up its channels")
    if not c.program.from_leaves.intersection(v for v in (me.var, other.var) if isinstance(v, int)):
        raise Refused(f"{e} multiplies it with another activation")
    met = lab.take_axes(labels, me.batch + me.contracted)
    ndim = len(c.program.shape(other.var))
    c.put(other.var, -lab.put_axes(met, other.batch + other.contracted, ndim))


def _into(c: Closure, labels: Labels, side: _Side) -> Labels:
    """The result's labels as labels of one operand: tied along the other operand's free axes."""
    mine = (*range(len(side.batch)), *side.out)
    tied = c.tie_along(labels, [a for a in range(labels.ndim) if a not in mine])
    ndim = len(side.batch) + len(side.free) + len(side.contracted)
    return lab.put_axes(lab.take_axes(tied, mine), side.batch + side.free, ndim)


RULES: dict[str, Rule] = {
    **dict.fromkeys(lab.MOVES, _move),
    **dict.fromkeys(("add", "add_any", "sub", "max", "min", "select_n"), _alike),
    **dict.fromkeys(("gt", "lt", "ge", "le", "eq", "ne"), _compare),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min"), _reduce),
    "mul": _multiply,
    "div": _divide,
    "dot_general": _dot,
    "split": _split,
    "concatenate": _concatenate,
}


def find_graph(program: Program, shared: Mapping[str, str]) -> Graph:
    """Finds the sites and the groups of a program.

    Args:
        program: the traced function.
        shared: {path: another path} of leaves that are the same array at two places of the tree.
    """
    places, refused = find_sites(program)
    heads = _heads(program, places)
    groups: list[Group] = []
    grouped: set[str] = set()
    for place in places:
        if place.site.path in grouped:
            continue
        try:
            group = find_group(program, place, places, shared, heads)
        except Refused as reason:
            refused[place.site.path] = str(reason)
        else:
            groups.append(group)
            grouped.update(path for path, _ in group.sites)
    refused = {path: reason for path, reason in refused.items() if path not in grouped}
    leaves = tuple((path, program.shape(var)) for var, path in program.leaves.items())
    sites = tuple(dict.fromkeys(p.site for p in places))
    return Graph(leaves, sites, tuple(groups), tuple(refused.items()))


def find_sites(program: Program) -> tuple[list[Place], dict[str, str]]:
    """(the matmuls of an activation with a leaf, {leaf: why it is none} of other leaves that a matmul may meet)."""
    places: list[Place] = []
    others: dict[str, str] = {}
    for equation in program.equations:
        if equation.runs_a_program:  # scan, while, cond, custom kernels
            read = [
                program.leaves_behind(v) for v in equation.inputs if isinstance(v, int) and v in program.from_leaves
            ]
            others.update(dict.fromkeys(sorted(set().union(*read)), f"{equation} reads it, and is not looked into"))
        if equation.name != "dot_general":
            continue
        sides = _sides(program, equation)
        for me, other in (sides, sides[::-1]):
            if not isinstance(me.var, int) or me.var not in program.from_leaves:
                continue
            if not isinstance(other.var, int) or other.var in program.from_leaves:
                continue
            view = program.views.get(me.var)
            if view is None or me.batch:
                maker = program.maker.get(me.var)
                what = f"what {maker} makes of it" if maker else f"it in {program.avals[me.var].dtype}"
                why = f"{equation} has batch axes" if view else f"{equation} multiplies {what}"
                others.update(dict.fromkeys(program.leaves_behind(me.var), why))
                continue
            order = np.argsort([view.axes[a] for a in me.contracted])
            axes = tuple(view.axes[me.contracted[i]] for i in order)
            shape = program.shape(me.var)
            site = Site(view.path, axes, tuple(shape[me.contracted[i]] for i in order))
            places.append(Place(site, equation, other.var, tuple(other.contracted[i] for i in order)))
    seen: dict[str, Site] = {}
    for place in places:
        if seen.setdefault(place.site.path, place.site) != place.site:
            others[place.site.path] = f"it is contracted along different axes; {place.equation} is the second use"
    return [p for p in places if p.site.path not in others], others


def _heads(program: Program, places: Sequence[Place]) -> frozenset[str]:
    """The sites whose product reaches an output of fn through no other site."""
    weights = {p.equation.outputs[0]: p.site.path for p in places}
    reaching, heads = set(program.outputs), set()
    for equation in reversed(program.equations):
        if reaching.intersection(equation.outputs):
            if (path := weights.get(equation.outputs[0])) is not None:
                heads.add(path)
            else:
                reaching.update(v for v in equation.inputs if isinstance(v, int))
    return frozenset(heads)


def find_group(
    program: Program, place: Place, places: Sequence[Place], shared: Mapping[str, str], heads: frozenset[str]
) -> Group:
    """The group of one site's activation, certified.

    Raises:
        Refused: with the reason.
    """
    size = int(np.prod(place.site.channels))
    closure = Closure(program, shared, size)
    seed = -1 - np.arange(size).reshape(place.site.channels)
    closure.put(place.activation, lab.put_axes(seed, place.axes, len(program.shape(place.activation))))
    closure = closure.close()
    found = closure.numbered()
    if place.activation not in found:
        raise Refused("it holds only zeros" if size else "it has no channels")
    if problem := certify(program, found):
        raise Refused(problem)
    leaves = {program.leaves[v]: labels for v, labels in found.items() if v in program.leaves}
    sites = {
        p.site.path: np.broadcast_to(-lab.take_axes(found[p.activation], p.axes), p.site.channels)
        for p in places
        if p.activation in found and p.site.path in leaves and (leaves[p.site.path] > 0).any()
    }
    absorbers = {path for path, labels in leaves.items() if (labels < 0).any()}
    return Group(
        name=place.site.path,
        size=int(max(labels.max() for labels in sites.values())),
        sites=tuple((path, LabelMap.of(labels)) for path, labels in sites.items()),
        leaves=tuple((path, LabelMap.of(labels)) for path, labels in leaves.items()),
        norm=not absorbers.intersection(p.site.path for p in places) and not heads.intersection(sites),
    )
