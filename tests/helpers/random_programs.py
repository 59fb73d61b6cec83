"""A grammar of random programs: runs of producers, data movements and matmuls, drawn from a tape of
numbers.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from dags import Dag, Node, evaluate

SAME_SHAPES = ("add", "sub", "mul", "div", "max", "min", "where", "gt", "ge", "lt", "le", "ne")
LARGEST, MOST_ELEMENTS, MOST_AXES = 1e6, 192, 4


class Rejected(Exception):
    """A step that can not be taken here: wrong shape, or numbers out of bounds."""


class Tape:
    """Choices read from a list of numbers; 0 where it has ended, so that a short tape means a short
    program.
    """

    def __init__(self, numbers: Iterable[int]):
        self.numbers = iter(numbers)

    def __call__(self, n: int) -> int:
        return int(next(self.numbers, 0)) % n

    def pick(self, options: Sequence[Any]) -> Any:
        if not options:
            raise Rejected
        return options[self(len(options))]


def numbers(*key: int, size: Sequence[int]) -> np.ndarray:
    """Multiples of 1/64 that are not zero: 1 + w and its quotients by powers of two are then exact
    in float32.
    """
    rng = np.random.default_rng(key)
    return np.asarray(rng.integers(1, 128, size) * rng.choice([-1.0, 1.0], size) / 64)


class Builder:
    """A program under construction; every node is evaluated as it is added, on the first input."""

    def __init__(
        self,
        tape: Tape,
        inputs: Sequence[np.ndarray],
        outer: "Builder | None" = None,
        layers: int = 0,
    ):
        self.tape, self.outer, self.layers = tape, outer, layers
        self.nodes: list[Node] = []
        self.values: list[Any] = []
        self.leaves: dict[str, np.ndarray] = {}
        self.made: list[int] = []
        self.operands: list[
            int
        ] = []  # of the call or scan that this is the body of: nodes of the outer program
        self.stacked: list[bool] = []  # whether a scan takes one layer of the operand at a time
        self.inputs = [self._append(Node("input", (), k), x) for k, x in enumerate(inputs)]

    def _append(self, node: Node, value: Any) -> int:
        self.nodes.append(node)
        self.values.append(value)
        return len(self.nodes) - 1

    def shape(self, k: int) -> tuple[int, ...]:
        return np.shape(self.values[k])

    def constant(self, value: Any) -> int:
        return self._append(Node("constant", (), value), value)

    def add(self, op: str, *operands: int, params: Any = None) -> int:
        """Adds a node; numbers stand for constants where a float is given."""
        known = [self.constant(x) if isinstance(x, float | np.ndarray) else x for x in operands]
        if (
            op in SAME_SHAPES
            and len({self.shape(k) for k in known if isinstance(self.values[k], np.ndarray)}) > 1
        ):
            raise Rejected
        small = Dag(
            (
                *(Node("input", (), k) for k in range(len(known))),
                Node(op, tuple(range(len(known))), params),
            ),
            (len(known),),
            {},
            (),
        )
        try:
            with np.errstate(all="ignore"):
                value = evaluate(small, {}, [self.values[k] for k in known])[-1].operands[0]
        except (ValueError, IndexError) as misfit:  # shapes that do not go together
            raise Rejected from misfit
        for x in value if isinstance(value, tuple) else [value]:
            fits = x.size <= MOST_ELEMENTS and x.ndim <= MOST_AXES
            if not fits or (x.dtype.kind == "f" and not (np.abs(x) < LARGEST).all()):
                raise Rejected
        return self._append(Node(op, tuple(known), params), value)

    def leaf(self, shape: Sequence[int]) -> int:
        """A new leaf; in the body of a scan, one layer of a new leaf (or sometimes a leaf that all
        layers share).
        """
        if self.outer is None:
            name = f"w{len(self.leaves)}"
            self.leaves[name] = numbers(len(self.leaves), size=shape)
            k = self._append(Node("leaf", (), name), self.leaves[name])
        else:
            stacked = bool(self.layers) and self.tape(6) < 5
            make = self.outer.leaf if self.tape(4) else self.outer.weight
            outside = make((self.layers, *shape) if stacked else shape)
            self.operands.append(outside)
            self.stacked.append(stacked)
            value = self.outer.values[outside][0] if stacked else self.outer.values[outside]
            k = self._append(Node("input", (), len(self.inputs)), value)
            self.inputs.append(k)
        self.made.append(k)
        return k

    def weight(self, shape: Sequence[int]) -> int:
        """A leaf of this shape, or what a few movements make of one."""
        shape = tuple(shape)
        return self.tape.pick(WEIGHTS)(self, shape)

    def like(self, k: int) -> int:
        """An earlier value of the same shape."""
        shape = self.shape(k)
        found = [
            j
            for j, v in enumerate(self.values)
            if np.shape(v) == shape and _is_float(v) and j not in self.made
        ]
        return self.tape.pick(found[::-1])

    def widened(self, small: int, k: int, axes: Sequence[int] | None = None) -> int:
        """A value broadcast to another's shape: its axes are that one's last ones, or `axes`."""
        shape = self.shape(k)
        axes = (
            tuple(range(len(shape) - len(self.shape(small)), len(shape)))
            if axes is None
            else tuple(axes)
        )
        return self.add("broadcast", small, params=(shape, axes))

    def step(self, steps: Sequence[tuple[int, Callable]], k: int) -> int:
        """One step of a table of (weight, step), or none if the one drawn does not fit."""
        every = list(itertools.chain.from_iterable([s] * n for n, s in steps))
        try:
            return self.tape.pick(every)(self, k)
        except Rejected:
            return k

    def finish(self, outputs: Sequence[int]) -> Dag:
        """The program without the nodes that nothing returned needs."""
        alive = set(outputs)
        for k in reversed(range(len(self.nodes))):
            if k in alive:
                alive.update(self.nodes[k].operands)
        alive.update(self.inputs)
        new = {k: i for i, k in enumerate(sorted(alive))}
        nodes = tuple(
            self.nodes[k]._replace(operands=tuple(new[j] for j in self.nodes[k].operands))
            for k in new
        )
        used = {n.params for n in nodes if n.op == "leaf"}
        leaves = {name: x for name, x in self.leaves.items() if name in used}
        return Dag(
            nodes,
            tuple(new[k] for k in outputs),
            leaves,
            tuple(self.values[k] for k in self.inputs),
        )


def _is_float(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


# Weights: leaves, and views of leaves -------------------------------------------------------------


def fresh(b: Builder, shape):
    return b.leaf(shape)


def again(b: Builder, shape):
    """A leaf that exists already: used twice."""
    found = [k for k in b.made if b.shape(k) == shape]
    return b.tape.pick(found) if found else b.leaf(shape)


def transposed(b: Builder, shape):
    order = [
        (*range(len(shape))[:1], *range(len(shape))[:0:-1]),
        tuple(reversed(range(len(shape)))),
    ][b.tape(2)]
    return b.add("transpose", b.leaf([shape[a] for a in np.argsort(order)]), params=order)


def flat(b: Builder, shape):
    return b.add("reshape", b.leaf((int(np.prod(shape)),)), params=shape)


def part(b: Builder, shape):
    """A slice of a leaf that is twice as wide, which other places may read too."""
    if not shape:
        return b.leaf(shape)
    axis = len(shape) - 1 - b.tape(len(shape))
    wide = (*shape[:axis], 2 * shape[axis], *shape[axis + 1 :])
    found = [k for k in b.made if b.shape(k) == wide]
    whole = found[-1] if found else b.leaf(wide)
    start, stride = [(shape[axis], 1), (0, 1), (0, 2), (1, 2)][b.tape(4)]
    starts = [start if a == axis else 0 for a in range(len(shape))]
    limits = [start + stride * (n - 1) + 1 if a == axis else n for a, n in enumerate(shape)]
    strides = [stride if a == axis else 1 for a in range(len(shape))]
    return b.add("slice", whole, params=(starts, limits, strides))


def layer(b: Builder, shape):
    """One of two stacked leaves."""
    if len(shape) == MOST_AXES:
        return b.leaf(shape)
    found = [k for k in b.made if b.shape(k) == (2, *shape)]
    whole = found[-1] if found else b.leaf((2, *shape))
    k = b.tape(2)
    cut = b.add(
        "slice", whole, params=([k, *[0] * len(shape)], [k + 1, *shape], [1] * (1 + len(shape)))
    )
    return b.add("squeeze", cut, params=(0,))


def computed(b: Builder, shape):
    """Something simple made of leaves."""
    how = b.tape(6)
    if how == 0:
        return b.add("neg", b.leaf(shape))
    if how == 1:
        return b.add("mul", b.leaf(shape), 0.5)
    if how == 2:
        return b.add("mul", b.leaf(shape), again(b, shape))
    if how == 3:
        return b.add("add", b.leaf(shape), b.leaf(shape))
    if how == 4:
        return b.add("sub", 1.0, b.leaf(shape))
    return b.add("barrier", b.leaf(shape))


def affine(b: Builder, shape):
    """1 + w, as Gemma's norms have it."""
    how = b.tape(4)
    if how == 0:
        return b.add("add", b.leaf(shape), 1.0)
    if how == 1:
        return b.add("add", 1.0, b.leaf(shape))
    return (
        b.add("add", b.leaf(shape), numbers(7, size=shape))
        if how == 2
        else b.add("sub", b.leaf(shape), 0.5)
    )


def in_part(b: Builder, shape):
    """A leaf of which a mask leaves a part: chosen among zeros, or multiplied with zeros and ones."""
    mask = np.asarray(numbers(9, size=shape) > 0)
    if b.tape(2):
        return b.add("where", mask, b.leaf(shape), b.add("zeros", params=shape))
    return b.add("mul", b.leaf(shape), mask.astype(float))


WEIGHTS = [
    *[fresh] * 7,
    in_part,
    *[again] * 2,
    transposed,
    transposed,
    flat,
    *[part] * 3,
    layer,
    computed,
    affine,
]

# Steps: from one value to the next ----------------------------------------------------------------


def along_an_axis(b: Builder, v: int, weight: Callable) -> int:
    """A vector (or a number, or a matrix) of leaves, broadcast to v."""
    shape = b.shape(v)
    how = b.tape(8)
    if how == 6:
        return b.widened(weight(b, ()), v)
    if how == 7 and len(shape) > 1:
        return b.widened(weight(b, shape[-2:]), v)
    axis = len(shape) - 1 if how < 5 else b.tape(max(len(shape), 1))
    return b.widened(weight(b, shape[axis : axis + 1]), v, (axis,) if shape else ())


def gain(b: Builder, v: int) -> int:
    g = along_an_axis(b, v, Builder.weight)
    return b.add("mul", v, g) if b.tape(2) else b.add("mul", g, v)


def affine_gain(b: Builder, v: int) -> int:
    return b.add("mul", v, along_an_axis(b, v, affine))


def bias(b: Builder, v: int) -> int:
    return b.add(b.tape.pick(["add", "add", "sub"]), v, along_an_axis(b, v, Builder.weight))


def divided_by_leaf(b: Builder, v: int) -> int:
    return b.add("div", v, along_an_axis(b, v, Builder.weight))


def matmul(b: Builder, v: int) -> int:
    """v times a leaf: on either side, along one axis or two, with a batch axis (experts) or
    without.
    """
    shape, how = b.shape(v), b.tape(10)
    last = len(shape) - 1
    if last < 0:
        raise Rejected
    contracted, batch = (last,), ()
    if how in (5, 6) and last:
        contracted = (last - 1, last) if how == 5 else (last, last - 1)
    elif how == 7:
        contracted = (b.tape(last + 1),)
    elif how in (8, 9) and last:
        batch = (0,)
    out = b.tape.pick([4, 2, 3, 6])
    sizes = [*(shape[a] for a in batch), *(shape[a] for a in contracted)]
    places = (tuple(range(len(batch), len(sizes))), tuple(range(len(batch))))
    if b.tape(2):  # the leaf's free axis first: (batch, out, contracted)
        sizes.insert(len(batch), out)
        places = (tuple(a + 1 for a in places[0]), places[1])
    else:
        sizes.append(out)
    w = b.weight(sizes)
    if b.tape(4):
        return b.add("dot", v, w, params=((contracted, places[0]), (batch, places[1])))
    return b.add("dot", w, v, params=((places[0], contracted), (places[1], batch)))


def convolution(b: Builder, v: int) -> int:
    """v, as images with channels last or first, and a kernel of leaves: plain, depthwise, in
    groups.
    """
    shape, tape = b.shape(v), b.tape
    if len(shape) < 3:
        raise Rejected
    last = len(shape) - 1
    of_image = (0, last, *range(1, last)) if tape(3) else tuple(range(last + 1))
    channels = shape[of_image[1]]
    groups = tape.pick([1, channels, *(g for g in (2, 3) if channels % g == 0), 1])
    outputs = groups * tape.pick([1, 2, 2] if groups > 1 else [4, 2, 3])
    window = [1 + tape(min(shape[a], 2)) for a in of_image[2:]]
    kernel = [*window, channels // groups, outputs]
    of_kernel = (last, last - 1, *range(last - 1))
    if tape(3) == 2:  # (outputs, inputs, *window)
        kernel, of_kernel = [outputs, channels // groups, *window], tuple(range(last + 1))
    of_result = of_image if tape(4) else tuple(reversed(of_image))
    strides = tuple(1 + (tape(3) == 2) for _ in window)
    padding = tuple(tape.pick([(0, 0), (1, 0), (1, 1)]) for _ in window)
    specs = of_image, of_kernel, of_result
    return b.add("conv", v, b.weight(kernel), params=(specs, strides, padding, groups))


def pool(b: Builder, v: int) -> int:
    """Maxima or sums under a window along one or two axes."""
    shape, tape = b.shape(v), b.tape
    if not shape:
        raise Rejected
    axes = {tape(len(shape)), tape(len(shape))}
    sizes = tuple(min(2, n) if a in axes else 1 for a, n in enumerate(shape))
    strides = tuple(1 + tape(2) if a in axes else 1 for a in range(len(shape)))
    padding = tuple((tape(2), 0) if n > 1 else (0, 0) for n in sizes)
    return b.add("pool", v, params=(tape.pick(["max", "sum"]), sizes, strides, padding))


def two_matmuls(b: Builder, v: int) -> int:
    """Two sites that read one activation, put together: a gate, a sum, or attention scores."""
    x, y = matmul(b, v), matmul(b, v)
    how = b.tape(4)
    if b.shape(x) != b.shape(y):
        return (
            b.add("dot", x, y, params=(((len(b.shape(x)) - 1,), (len(b.shape(y)) - 1,)), ((), ())))
            if (b.shape(x)[-1:] == b.shape(y)[-1:])
            else y
        )
    if how == 0:
        return b.add("mul", b.add("mul", x, b.add("logistic", x)), y)
    return b.add(["add", "mul", "max"][how - 1], x, y)


def embedding(b: Builder, v: int) -> int:
    """Rows of a table of leaves, chosen by constant numbers or by an input."""
    table = b.weight((3, b.tape.pick([4, 2, 6])))
    ids = (
        b.inputs[1]
        if b.tape(2) and b.outer is None
        else np.array([0, 1, 1, 2][: 2 + b.tape(3)], np.int32)
    )
    return b.add(b.tape.pick(["gather", "gather, filled"]), table, ids, params=0)


def unary(*names: str) -> Callable:
    return lambda b, v: b.add(b.tape.pick(names), v)


def control(b: Builder, v: int) -> int:
    """Control flow with something labelled inside: a barrier."""
    return b.add("cond", v, b.inputs[1]) if b.outer is None and b.tape(2) else b.add("loop", v)


def power(b: Builder, v: int) -> int:
    return b.add("power", v, params=b.tape.pick([2, 3, -1]))


def leaky(b: Builder, v: int) -> int:
    """relu, leaky relu, and their relatives, by a comparison with zero."""
    how = b.tape(5)
    if how == 0:
        return b.add("max", v, 0.0)
    if how == 1:
        return b.add(
            "where",
            b.add(b.tape.pick(["gt", "ge", "lt", "le", "ne"]), v, 0.0),
            v,
            b.add("mul", v, 0.25),
        )
    if how == 2:
        return b.add("where", b.add("lt", 0.0, v), v, b.add("zeros", params=b.shape(v)))
    if how == 3:
        return b.add("where", b.add("gt", v, b.tape.pick([0.5, 0.0])), v, b.add("mul", v, 0.5))
    return b.add("where", b.add("gt", b.like(v), 0.0), v, b.like(v))


def masked(b: Builder, v: int) -> int:
    mask = np.asarray(numbers(5, size=b.shape(v)) > 0)
    other = (
        b.add("zeros", params=b.shape(v))
        if b.tape(4)
        else np.full(b.shape(v), b.tape.pick([0.0, 0.5]))
    )
    return b.add("where", mask, *((v, other) if b.tape(2) else (other, v)))


def by_constant(b: Builder, v: int) -> int:
    c = b.tape.pick([0.5, -2.0, numbers(3, size=b.shape(v))])
    return b.add(b.tape.pick(["mul", "mul", "div"]), v, c)


def constant_term(b: Builder, v: int) -> int:
    return b.add(b.tape.pick(["add", "max", "min", "sub"]), v, b.tape.pick([0.5, 0.0, 1.0]))


def binary(b: Builder, v: int) -> int:
    u, op = b.like(v), b.tape.pick(["add", "sub", "mul", "div", "max", "min"])
    return b.add(op, *((v, u) if b.tape(3) else (u, v)))


def gated(b: Builder, v: int) -> int:
    u = b.add(b.tape.pick(["logistic", "tanh", "exp", "relu"]), b.like(v))
    return b.add(b.tape.pick(["mul", "div"]), v, u)


def norm(b: Builder, v: int) -> int:
    """x / sqrt(mean(x^2) + c), without a gain."""
    last = len(b.shape(v)) - 1
    if last < 0:
        raise Rejected
    mean = b.add("mul", b.add("sum", b.add("mul", v, v), params=(last,)), 0.25)
    return b.add("mul", v, b.widened(b.add("rsqrt", b.add("add", mean, 0.125)), v, range(last)))


def transpose(b: Builder, v: int) -> int:
    ndim = len(b.shape(v))
    orders = [
        tuple(np.roll(range(ndim), 1).tolist()),
        tuple(reversed(range(ndim))),
        (*range(ndim)[:-2], *range(ndim)[:-3:-1]),
    ]
    return b.add("transpose", v, params=b.tape.pick(orders))


def split_axis(b: Builder, v: int) -> int:
    shape = b.shape(v)
    axis, first = b.tape.pick(
        [(a, f) for a, n in reversed([*enumerate(shape)]) for f in (2, 3) if n % f == 0 and n > f]
    )
    return b.add(
        "reshape", v, params=(*shape[:axis], first, shape[axis] // first, *shape[axis + 1 :])
    )


def merge_axes(b: Builder, v: int) -> int:
    shape = b.shape(v)
    axis = b.tape.pick(range(len(shape) - 1)[::-1])
    return b.add(
        "reshape", v, params=(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
    )


def reshape_badly(b: Builder, v: int) -> int:
    """The same elements under other axes: (2, 3) as (3, 2)."""
    return b.add("reshape", v, params=b.shape(v)[::-1])


def ones(b: Builder, v: int) -> int:
    """An axis of size 1 that comes, and sometimes goes."""
    wide = b.add("expand", v, params=(b.tape(len(b.shape(v)) + 1),))
    found = [a for a, n in enumerate(b.shape(wide)) if n == 1]
    return b.add("squeeze", wide, params=(b.tape.pick(found),)) if b.tape(2) else wide


def repeat(b: Builder, v: int) -> int:
    """Every element (or all of them) along an axis twice: what grouped queries do with their
    keys.
    """
    shape = b.shape(v)
    axis = len(shape) - 1 - b.tape(max(len(shape), 1))
    at = axis + b.tape(2)
    wide = b.add(
        "broadcast",
        v,
        params=((*shape[:at], 2, *shape[at:]), tuple(a + (a >= at) for a in range(len(shape)))),
    )
    if b.tape(3) == 2 or not shape:
        return wide
    return b.add("reshape", wide, params=(*shape[:axis], 2 * shape[axis], *shape[axis + 1 :]))


def cut(b: Builder, v: int) -> int:
    shape = b.shape(v)
    axis = b.tape.pick([a for a, n in enumerate(shape) if n > 1][::-1])
    start, stride = b.tape.pick([(0, 1), (1, 1), (0, 2), (1, 2)])
    limit = shape[axis] - (1 - start)
    starts, limits, strides = [0] * len(shape), list(shape), [1] * len(shape)
    starts[axis], limits[axis], strides[axis] = start, max(limit, start + 1), stride
    return b.add("slice", v, params=(starts, limits, strides))


def halves(b: Builder, v: int) -> int:
    """Split in two, and joined otherwise: rotary halves, gates, sums."""
    shape = b.shape(v)
    axis = b.tape.pick([a for a, n in enumerate(shape) if n % 2 == 0][::-1])
    both = b.add("split", v, params=((shape[axis] // 2,) * 2, axis))
    x, y = b.add("item", both, params=0), b.add("item", both, params=1)
    how = b.tape(6)
    if how == 0:
        return b.add("concatenate", b.add("neg", y), x, params=axis)
    if how == 1:
        return b.add("mul", b.add("tanh", x), y)
    if how == 2:
        return b.add("mul", b.add("concatenate", b.add("neg", y), x, params=axis), 0.5)
    if how == 3:
        return b.add("concatenate", x, y, params=axis)
    return b.add(["add", "mul"][how - 4], x, y)


def joined(b: Builder, v: int) -> int:
    axis = b.tape.pick(range(len(b.shape(v)))[::-1])
    other = b.add("zeros", params=b.shape(v)) if b.tape(2) else b.like(v)
    return b.add("concatenate", *((v, other) if b.tape(2) else (other, v)), params=axis)


def reverse(b: Builder, v: int) -> int:
    return b.add("rev", v, params=(b.tape.pick(range(len(b.shape(v)))[::-1]),))


def pad(b: Builder, v: int) -> int:
    axis = b.tape.pick(range(len(b.shape(v)))[::-1])
    edges = b.tape.pick([(0, 1, 0), (1, 0, 0), (1, 2, 0), (0, 0, 1)])
    return b.add(
        "pad", v, params=tuple(edges if a == axis else (0, 0, 0) for a in range(len(b.shape(v))))
    )


def cumulative(b: Builder, v: int) -> int:
    axis = b.tape.pick(range(len(b.shape(v))))
    return b.add(b.tape.pick(["cumsum", "cumsum", "cummax"]), v, params=(axis, bool(b.tape(2))))


def reduce(b: Builder, v: int) -> int:
    ndim = len(b.shape(v))
    axis = b.tape.pick(range(ndim))
    y = b.add(b.tape.pick(["sum", "reduce_max", "reduce_min"]), v, params=(axis,))
    how = b.tape(3)
    if how == 0:
        return y
    wide = b.widened(y, v, [a for a in range(ndim) if a != axis])
    return wide if how == 1 else b.add("sub", v, wide)


def sort(b: Builder, v: int) -> int:
    return b.add("sort", v, params=b.tape(max(len(b.shape(v)), 1)))


def mixed(b: Builder, v: int) -> int:
    """Probabilities times values: v mixed along one axis by another activation."""
    shape = b.shape(v)
    axis = b.tape.pick(range(len(shape)))
    found = [
        k
        for k, x in enumerate(b.values)
        if _is_float(x) and x.ndim > 1 and x.shape[-1] == shape[axis]
    ]
    p = b.add(b.tape.pick(["logistic", "tanh", "neg"]), b.tape.pick(found[::-1]))
    last = len(b.shape(p)) - 1
    batch = ((0,), (0,)) if axis and last and b.shape(p)[0] == shape[0] and b.tape(2) else ((), ())
    if b.tape(2):
        return b.add("dot", p, v, params=(((last,), (axis,)), batch))
    return b.add("dot", v, p, params=(((axis,), (last,)), batch[::-1]))


def scores(b: Builder, v: int) -> int:
    """Two activations contracted along their last axis."""
    last = len(b.shape(v)) - 1
    return b.add(
        "dot",
        v,
        b.like(v),
        params=(((last,), (last,)), ((0,), (0,)) if b.tape(2) and last > 0 else ((), ())),
    )


def attention(b: Builder, v: int) -> int:
    """One head: probabilities of queries and keys, times values."""
    c = b.shape(v)[-1:]
    if len(b.shape(v)) != 2:
        raise Rejected
    q, k, x = (
        b.add("dot", v, b.weight((*c, 2)), params=(((1,), (0,)), ((), ()))) for _ in range(3)
    )
    if b.tape(2):
        q, x = gain(b, q), bias(b, x)
    p = b.add("exp", b.add("tanh", b.add("dot", q, k, params=(((1,), (1,)), ((), ())))))
    return b.add("dot", p, x, params=(((1,), (0,)), ((), ())))


def rows(b: Builder, v: int) -> int:
    axis = b.tape.pick(range(len(b.shape(v))))
    ids = np.array(b.tape.pick([[0], [1, 0], [0, 0, 1]]), np.int32)
    if b.shape(v)[axis] < 2:
        raise Rejected
    return b.add(
        b.tape.pick(["gather", "gather, filled"]),
        v,
        b.inputs[1] if b.outer is None and b.tape(2) else ids,
        params=axis,
    )


def window(b: Builder, v: int) -> int:
    """A dynamic slice, at a constant place or at one that is an input."""
    shape = b.shape(v)
    axis = b.tape.pick([a for a, n in enumerate(shape) if n > 1])
    ids = b.inputs[1] if b.tape(2) and b.outer is None else np.array([1], np.int32)
    return b.add(
        "dynamic_slice", v, ids, params=tuple(n - (a == axis) for a, n in enumerate(shape))
    )


def cache(b: Builder, v: int) -> int:
    """v written into zeros, as into a key-value cache."""
    shape = b.shape(v)
    axis = b.tape.pick(range(len(shape)))
    ids = b.inputs[1] if b.tape(2) and b.outer is None else np.array([1], np.int32)
    return b.add(
        "dynamic_update_slice", v, ids, params=tuple(n + (a == axis) for a, n in enumerate(shape))
    )


def residual(b: Builder, v: int) -> int:
    """v + f(v), f ending in a matmul back to v's last axis."""
    shape = b.shape(v)
    y = b.step(PRODUCERS, v)
    for _ in range(b.tape(3)):
        y = b.step(MOVES, y)
    back = b.add(
        "dot",
        y,
        b.weight((*b.shape(y)[-1:], *shape[-1:])),
        params=(((len(b.shape(y)) - 1,), (0,)), ((), ())),
    )
    return b.add("add", *((v, back) if b.tape(2) else (back, v)))


def call(b: Builder, v: int) -> int:
    """A few steps inside jit or remat."""
    how, inner = b.tape.pick(["jit", "remat"]), Builder(b.tape, [b.values[v]], b)
    y = inner.inputs[0]
    for _ in range(1 + b.tape(2)):
        y = inner.step([*MOVES, *MATMULS], y)
    body = inner.finish([y])
    return b.add("call", v, *inner.operands, params=(how, body._replace(inputs=())))


def layers(b: Builder, v: int) -> int:
    """A scan over two or three stacked layers."""
    if not b.shape(v) or (b.outer is not None and b.outer.outer is not None):
        raise Rejected
    inner = Builder(b.tape, [b.values[v]], b, layers=2 + b.tape(2))
    carry = inner.inputs[0]
    y = inner.step(PRODUCERS, carry)
    for _ in range(b.tape(4)):
        y = inner.step(MOVES, y)
    y = inner.step(MATMULS, y)
    if b.tape(2):
        y = inner.step(MOVES, y)
    last = len(inner.shape(y)) - 1
    if last < 0:
        raise Rejected
    back = inner.weight((*inner.shape(y)[-1:], *inner.shape(carry)[-1:]))
    y = inner.add("dot", y, back, params=(((last,), (0,)), ((), ())))
    if inner.shape(y) != inner.shape(carry):
        raise Rejected
    y = inner.add("add", carry, y) if b.tape(2) else inner.add("tanh", y)
    if b.tape(8) == 7:
        y = inner.step([(1, layers)], y)
    body = inner.finish([y])
    return b.add(
        "scan",
        v,
        *inner.operands,
        params=(body._replace(inputs=()), inner.layers, tuple(inner.stacked), bool(b.tape(2))),
    )


PRODUCERS = [(4, gain), (5, matmul), (2, affine_gain), (1, bias), (1, embedding), (1, two_matmuls)]
MATMULS = [(6, matmul), (2, two_matmuls)]
BARRIERS = [
    (2, unary("tanh", "exp", "logistic", "abs", "square", "sign")),
    (1, power),
    (1, norm),
    (1, sort),
    (1, control),
]
MOVES = [
    (4, leaky),
    (2, unary("neg", "relu", "barrier", "bfloat16")),
    (2, bias),
    (2, gain),
    (1, divided_by_leaf),
    (2, masked),
    (2, by_constant),
    (1, constant_term),
    (2, binary),
    (2, gated),
    (2, transpose),
    (2, split_axis),
    (2, merge_axes),
    (1, reshape_badly),
    (2, ones),
    (2, repeat),
    (2, cut),
    (2, halves),
    (2, joined),
    (1, reverse),
    (2, pad),
    (2, cumulative),
    (2, reduce),
    (3, mixed),
    (2, attention),
    (1, unary("abs", "sign")),
    (1, scores),
    (2, rows),
    (2, window),
    (2, cache),
    *BARRIERS,
]
OUTER = [*MOVES, (2, call), (2, residual), (1, layers)]
AFTER = [(3, lambda b, v: v), (2, residual), (2, layers), (1, norm), (1, unary("tanh"))]


def random_dag(numbers_: Iterable[int]) -> Dag:
    """The program that a tape of numbers stands for: one to three runs of producer, movements,
    matmul.
    """
    tape = Tape(numbers_)
    shape = tape.pick([(2, 4), (3, 4), (2, 3, 4), (2, 2, 6), (4, 2, 3)])
    b = Builder(tape, [numbers(11, size=shape), np.array([1, 0], np.int32)])
    v = b.inputs[0]
    for _ in range(1 + tape(3)):
        v = b.step(PRODUCERS, v)
        for _ in range(tape(5)):
            v = b.step(OUTER, v)
        v = b.step(AFTER, b.step(MATMULS, v))
    seen = [
        k
        for k, x in enumerate(b.values)
        if _is_float(x) and b.nodes[k].op not in ("leaf", "input", "constant")
    ]
    return b.finish([v, *([tape.pick(seen[::-1])] if seen and tape(8) == 7 else [])])


def random_image_dag(numbers_: Iterable[int]) -> Dag:
    """The same of images: convolutions and pooling among all the rest."""
    tape = Tape(numbers_)
    shape = tape.pick([(1, 3, 4), (2, 3, 2, 4), (1, 4, 2, 3), (2, 4, 6), (1, 2, 3, 4)])
    b = Builder(tape, [numbers(11, size=shape), np.array([1, 0], np.int32)])
    v = b.inputs[0]
    for _ in range(1 + tape(3)):
        v = b.step([*PRODUCERS, (8, convolution)], v)
        for _ in range(tape(3)):
            v = b.step([*OUTER, (12, leaky), (24, pool), (4, convolution)], v)
        v = b.step(AFTER, b.step([*MATMULS, (16, convolution)], v))
    return b.finish([v])
