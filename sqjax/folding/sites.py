"""Sites: leaves that an activation is multiplied with; places: the matmuls where that happens."""

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from sqjax._shapes import sizes_along
from sqjax.folding.convolutions import Convolution
from sqjax.folding.embeddings import is_lookup, is_passed_on
from sqjax.folding.graph import Site
from sqjax.folding.labels import Labels, other_axes, put_axes, varies
from sqjax.folding.moves import MOVES
from sqjax.folding.norms import is_of_a_norm
from sqjax.program.entries import carried
from sqjax.program.equations import Atom, Equation, Var
from sqjax.program.facts import Program
from sqjax.program.primitives import ELEMENTWISE
from sqjax.program.views import View

#: The matmuls that can be places.
MATMULS = ("dot_general", "ragged_dot_general")
#: A convolution of an activation with a leaf is a place too.
CONVOLUTION = "conv_general_dilated"


class Place(NamedTuple):
    """A place in the program where a site's leaf is multiplied with an activation.

    Attributes:
        site: the leaf with its channels.
        equation: the matmul.
        activation: the variable that the leaf is multiplied with.
        axes: the activation's batch and contracted axes, in the order of the leaf's. Along these it
            has the site's channels, but for the steps of scans around it.
        view: how the matmul sees the leaf.
        batch: how many of `axes`, the first ones, are batch axes.

    Example: scores = einsum("tec,ecf->tef", x, w) of 8 tokens and 3 experts with 4 channels is a
    place of the site w with `batch` (0,), `axes` (1,) and `channels` (3, 4); its activation is x,
    which has these channels along `axes` (1, 2).
    """

    site: Site
    equation: Equation
    activation: Var
    axes: tuple[int, ...]
    view: View
    batch: int = 0

    @property
    def block(self) -> tuple[int, ...]:
        """The sizes of the site's channel axes at one step of a scan, on one device."""
        sizes = sizes_along(self.view.shape, self.site.channel_axes)
        kernel = self.site.kernel
        groups = 1 if kernel is None else kernel.groups
        return (*sizes[:-1], sizes[-1] * groups)

    @property
    def entry(self) -> tuple[Any, ...]:
        """Which of the site's channels this matmul reads: all, or those of one of its matrices."""
        return tuple(map(attrgetter("seen"), self.view.taken))

    @property
    def name(self) -> str:
        """The site's path, with the indices of a matrix in a stack: layers/kernel[3]."""
        return self.site.path + "".join(
            f"[{taken.at}]" for taken in self.view.fixed
        )


class Side(NamedTuple):
    """One operand of a matmul.

    Attributes:
        var: the operand.
        contracted, batch, free: its axes of these kinds.
        out: where its free axes stand in the result. (The batch axes come first there.)
        stack: the axis along which a ragged dot chooses one matrix for every row; it is not in the
            result.

    Example: y = x @ w of (tokens, 2) and (2, 3) has the sides x with `contracted` (1,), `free`
    (0,), `out` (0,), and w with `contracted` (0,), `free` (1,), `out` (1,).
    """

    var: Atom
    contracted: tuple[int, ...]
    batch: tuple[int, ...]
    free: tuple[int, ...]
    out: tuple[int, ...]
    stack: tuple[int, ...] = ()


def sides_of(program: Program, e: Equation) -> tuple[Side, Side]:
    """The two operands of a matmul."""
    stacks: tuple[tuple[int, ...], tuple[int, ...]] = (), ()
    if e.name == "ragged_dot_general":
        numbers = e.params["ragged_dot_dimension_numbers"]
        contracted, batch = numbers.dot_dimension_numbers
        stacks = (), tuple(numbers.rhs_group_dimensions)
    else:
        contracted, batch = e.params["dimension_numbers"]
    sides = []
    begin = len(batch[0])  # of this operand's free axes in the result
    for i, var in enumerate(e.inputs[:2]):
        gone = (*contracted[i], *batch[i], *stacks[i])
        free = tuple(other_axes(len(program.shape(var)), gone))
        out = tuple(range(begin, begin + len(free)))
        side = Side(var, tuple(contracted[i]), tuple(batch[i]), free, out)
        sides.append(side._replace(stack=stacks[i]))
        begin += len(free)
    return sides[0], sides[1]


# Sites --------------------------------------------------------------------------------------------


def find_sites(program: Program) -> tuple[list[Place], dict[str, str]]:
    """The places where an activation is multiplied with a leaf, which is the place's site.

    A leaf may be multiplied as w and as w.T. Its site is then the product that sums along its rows:
    each row is an output, as in the untied head h @ E.T beside onehot @ E, and can be looked up
    too. The other product is no place: it needs no statistics, because its activation is always
    quantized at run time (see `sqjax.numerics.weight_products.transposed_product`).

    Returns:
        The places, and {leaf: why it is no site} of other leaves that a matmul may meet.
    """
    places: list[Place] = []
    refused: dict[str, str] = {}
    for equation in program.equations:
        places_of = _PLACES_OF.get(equation.name)
        if places_of is not None:
            found, reasons = places_of(program, equation)
            places += found
            refused.update(reasons)
            continue
        refused.update(_not_looked_into(program, equation))
    # Where a leaf has two, that of the later axes stays: of (rows, columns) the columns are summed.
    by_axes = sorted(places, key=attrgetter("site.axes"))
    sites = {place.site.path: place.site for place in by_axes}
    refused.update(_read_otherwise(program, places, sites))
    refused.update(_read_in_two_ways(places, sites))
    kept = set(map(sites.get, sites.keys() - refused.keys()))
    return [place for place in places if place.site in kept], refused


def _of_matmul(
    program: Program, equation: Equation
) -> tuple[list[Place], dict[str, str]]:
    """The places of one matmul (none, or one), and {leaf: why it is no site here}."""
    places: list[Place] = []
    refused: dict[str, str] = {}
    sides = sides_of(program, equation)
    for me, other in (sides, sides[::-1]):  # the leaf may be on either side
        leaf, activation = me.var, other.var
        if not program.is_activation(activation):
            continue
        if not program.is_of_leaves(leaf):
            refused.update(_picked(program, equation, leaf, activation))
            continue
        meeting = _Meeting(program, equation, me, other, leaf, activation)
        for place in meeting.places():
            if isinstance(place, Place):
                places.append(place)
                continue
            behind = sorted(program.leaves_behind(leaf))
            refused.update(dict.fromkeys(behind, place))
    return places, refused


class _Meeting(NamedTuple):
    """A matmul of something that is made of leaves with an activation.

    Attributes:
        program: the program that it is in.
        equation: the matmul.
        me, other: its operands, `me` being the one made of leaves.
        leaf, activation: their variables.
    """

    program: Program
    equation: Equation
    me: Side
    other: Side
    leaf: Var
    activation: Var

    def places(self) -> list[Place | str]:
        """Its places, or why it is none.

        One place, or one for each leaf where leaves are concatenated along the outputs, because
        x @ [a, b] is [x @ a, x @ b].
        """
        joined = self.program.joined.get(self.leaf)
        if joined is not None and joined.axis in self.me.free:
            return list(map(self._place, joined.views))
        view = _view_of(self.program, self.equation, self.leaf)
        return [view if isinstance(view, str) else self._place(view)]

    def _place(self, view: View) -> Place | str:
        """The matmul with a view of a leaf as a `Place`, or why it is none."""
        equation, me, other = self.equation, self.me, self.other
        # The leaf's axes, and the activation's that meet them, in the order of the leaf.
        own_batch, its_batch = _in_order(view, me.batch, other.batch)
        own, its = _in_order(view, me.contracted, other.contracted)
        batch, axes = view.whole_axes(own_batch), view.whole_axes(own)
        if batch is None or not axes:
            maker = self.program.maker.get(self.leaf)
            return (
                f"{equation} contracts parts or mixtures of its axes (through {maker}): it stays "
                "float"
            )
        if not view.varying.isdisjoint(axes):
            return _of_a_computed_matrix(self.program, equation, self.leaf)
        # The layers that scans run over, or the index of one of them, are batch axes too.
        batch = (*view.taken_axes, *batch)
        channels = sizes_along(view.full_shape, (*batch, *axes))
        site = Site(view.path, axes, channels, batch)
        its_axes = its_batch + its
        return Place(
            site, equation, self.activation, its_axes, view, len(its_batch)
        )


def _view_of(program: Program, equation: Equation, leaf: Var) -> View | str:
    """How a product sees a leaf, or why what it multiplies is none."""
    if leaf in program.offsets:
        return f"{equation} multiplies {program.offsets[leaf]:g} + it"
    view = program.seen.get(leaf)
    if view is None:
        if program.scanned.get(leaf, leaf) not in program.maker:
            return f"{equation} multiplies it in {program.avals[leaf].dtype}"
        return _of_a_computed_matrix(program, equation, leaf)
    # An index into a sharded axis picks another matrix on every device.
    axis_of = attrgetter("axis")
    sharded = set(map(axis_of, view.blocks))
    if not sharded.isdisjoint(map(axis_of, view.fixed)):
        return (
            f"{equation} multiplies another one of its matrices on every device"
        )
    return view


def _of_a_computed_matrix(
    program: Program, equation: Equation, leaf: Var
) -> str:
    """Why a product with what fn computes of one leaf, or of several, has no site.

    Example: x @ (v + w) names v and w, because their sum is a matrix that is no leaf.
    """
    maker = program.maker[program.scanned.get(leaf, leaf)]
    paths = sorted(program.leaves_behind(leaf))
    if len(paths) == 1:
        return (
            f"{equation} multiplies what {maker} makes of it: it stays float. Compute that once, "
            "before calibrating, and pass the result in params"
        )
    more = f" ... ({len(paths)} leaves)" if len(paths) > 6 else ""
    return (
        f"{equation} multiplies what {maker} makes of {', '.join(paths[:6])}{more} together: they "
        "stay float. Compute this matrix once, before calibrating, and pass it in params as one "
        f"leaf{_HINTS.get(maker.name, '')}"
    )


#: What else may be done about leaves that are computed together, by the primitive that does it.
_HINTS = {"mul": "; if one is a mask, make the mask boolean"}


def _of_convolution(
    program: Program, equation: Equation
) -> tuple[list[Place], dict[str, str]]:
    """The place of a convolution (none, or one), and {leaf: why it is no site here}."""
    image, leaf = equation.inputs
    if not program.is_activation(image):
        return [], dict(_not_looked_into(program, equation))
    if not program.is_of_leaves(leaf):
        return [], dict(_picked(program, equation, leaf, image))
    found = _view_of(program, equation, leaf)
    convolution = Convolution.of(program, equation)
    if isinstance(found, View):
        site = convolution.site(found)
        if isinstance(site, Site) and not found.varying.isdisjoint(site.summed):
            site = _of_a_computed_matrix(program, equation, leaf)
        if isinstance(site, Site):
            axes = (convolution.channels,)
            return [Place(site, equation, image, axes, found)], {}
        found = site
    return [], dict.fromkeys(sorted(program.leaves_behind(leaf)), f"{found}")


#: What finds the places of an equation, by its primitive.
_PLACES_OF = {
    **dict.fromkeys(MATMULS, _of_matmul),
    CONVOLUTION: _of_convolution,
}


def _in_order(
    view: View, mine: Sequence[int], its: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes of a view of a leaf, and the axes that they meet, both in the order of the leaf's
    axes.
    """
    positions = list(map(view.position_of, mine))
    order = sorted(range(len(mine)), key=positions.__getitem__)
    return sizes_along(mine, order), sizes_along(its, order)


# Leaves that a matmul meets, but not as a site ----------------------------------------------------


def _read_in_two_ways(
    places: Sequence[Place], sites: Mapping[str, Site]
) -> dict[str, str]:
    """{leaf: why it is no site} of leaves whose places do not agree on what its channels are."""
    refused: dict[str, str] = {}
    first_place: dict[Site, Place] = {}
    for place in places:
        path = place.site.path
        first = first_place.setdefault(place.site, place)
        if not _agrees(place, sites[path]):
            refused[path] = (
                f"it is contracted along different axes, and {place.equation} does not sum over "
                "just what are outputs elsewhere: it stays float, unless that reads a leaf of its "
                "own"
            )
        elif first.view.stacked != place.view.stacked:
            refused[path] = f"{place.equation} reads its layers in another way"
    return refused


def _agrees(place: Place, site: Site) -> bool:
    """Whether a matmul with a site's leaf sums over its channels, or over all of its outputs and
    has all of its channels as outputs.

    Example: w (3, 16, 12), a stack of 3 matrices that x @ w contracts along the axis 1, may be
    contracted along the axis 2 in h @ w.T, but not in h @ w[:, :8].T, a part of the channels.
    """
    view = place.view
    outputs = other_axes(len(view.shape), site.channel_axes)
    channels = sizes_along(view.full_shape, (*site.batch, *outputs))
    transposed = site._replace(axes=tuple(outputs), channels=channels)
    # A quantized weight keeps its channels together, because they share scales.
    apart = view.sliced | view.varying
    is_transposed = place.site == transposed and apart.isdisjoint(site.axes)
    return place.site == site or is_transposed


def _read_otherwise(
    program: Program, places: Sequence[Place], sites: Mapping[str, Site]
) -> dict[str, str]:
    """{leaf: why it is no site} of weights that something else reads too, or that fn returns.

    A quantized weight can be multiplied with, and rows of it can be looked up, but its elements are
    nowhere: a sum of their squares, say, needs the float leaf. Example: fn returns x @ w and
    (w**2).sum(): w stays float. (A norm that only divides w may be that of the quantized one.)
    """
    refused: dict[str, str] = {}
    matmuls = {(place.site.path, id(place.equation)) for place in places}
    for var, path in _seen_as(program, sites):
        if var in program.outputs:
            refused[path] = f"it is {program.outputs[var]} too: it stays float"
        for equation in program.readers.get(var, []):
            multiplied = (path, id(equation)) in matmuls
            may_read = multiplied or _may_read(
                program, var, equation, sites[path].axes
            )
            if not may_read:
                refused[path] = (
                    f"{equation} reads it too, and a quantized weight has no elements to read: it "
                    "stays float"
                )
    return refused


def _may_read(
    program: Program, var: Var, equation: Equation, channels: Sequence[int]
) -> bool:
    """Whether something that is no matmul can read a quantized weight with these channels."""
    by_rows = 0 not in channels
    return (
        (by_rows and is_lookup(program, var, equation))
        or _is_passed_on(program, var, equation)
        or is_of_a_norm(program, var, equation, channels)
    )


def _seen_as(
    program: Program, paths: Mapping[str, Any]
) -> Iterator[tuple[Var, str]]:
    """(variable, leaf) of the variables that are one of these leaves, or hold it among others."""
    for var, view in program.seen.items():
        if view.path in paths:
            yield var, view.path
    for var, joined in program.joined.items():
        own = paths.keys() & map(attrgetter("path"), joined.views)
        for path in sorted(own):
            yield var, path


def _is_passed_on(program: Program, var: Var, equation: Equation) -> bool:
    """Whether what an equation makes of a leaf is seen as that leaf, as one of several, or as a sum
    with it; loops and branches pass leaves to what they run, but for those that a loop goes on to
    change.
    """
    if equation.runs_a_program:
        return all(value.first != var for value in carried(equation))
    joins = not program.joined.keys().isdisjoint(equation.outputs)
    is_seen = var in program.seen and is_passed_on(program, var, equation)
    return joins or is_seen


def _not_looked_into(program: Program, equation: Equation) -> Mapping[str, str]:
    """{leaf: why it is no site} of the leaves that another kind of matmul reads."""
    opaque = equation.runs_a_program and not equation.bodies
    if opaque:  # a custom kernel
        why = f"{equation} reads it, and is not looked into: not calibrated, it stays float"
    elif equation.name == CONVOLUTION:
        why = f"{equation} convolves it, but not as a kernel: it stays float"
    else:
        return {}
    read = program.from_leaves.intersection(equation.inputs)
    return dict.fromkeys(sorted(program.leaves_behind(*read)), why)


def _picked(
    program: Program, equation: Equation, me: Atom, activation: Var
) -> Mapping[str, str]:
    """{leaf: why it is no site} where an activation meets what an index has picked of a leaf."""
    if not isinstance(me, Var):
        return {}
    source = program.picked.get(me)
    if source is None:
        return _scaled(program, equation, me)
    if activation in program.picked and source.name == "gather":
        return {}  # rows of an embedding: they are the activation
    why = f"{equation} multiplies what {source} picks of it by an index: it stays float"
    if source.name == "dynamic_slice":  # the layers of a fori_loop, say
        why += "; to run over a stack of layers use jax.lax.scan"
    return dict.fromkeys(program.leaves_behind(source.variables[0]), why)


def _scaled(program: Program, equation: Equation, me: Var) -> Mapping[str, str]:
    """{leaf: why it is no site} where a captured array has scaled a leaf along its channels."""
    maker = program.maker.get(me, equation)
    reads_a_leaf = not program.seen.keys().isdisjoint(maker.inputs)
    if not (reads_a_leaf and me in program.steady):
        return {}
    why = _of_a_computed_matrix(program, equation, me)
    return dict.fromkeys(sorted(program.leaves_behind(me)), why)


# What is behind a product -------------------------------------------------------------------------


def normalised_over(
    program: Program, product: Equation, axes: Sequence[int]
) -> bool:
    """Whether a softmax runs over one of these axes of a product.

    It does if the first maximum after the product is taken along one of them. The axes are followed
    through transposes, reshapes ... by marks on the product's elements, which differ along these
    axes only, and are moved as labels are.

    Example: scores of shape (queries, keys) and the axis 1 get the marks [[0, 1, 2, ...]]; after a
    transpose they are [[0], [1], [2], ...], so a maximum along axis 0 is one over the keys.
    """
    y = product.outputs[0]
    sizes = sizes_along(program.shape(y), axes)
    numbers = np.arange(int(np.prod(sizes))).reshape(sizes)
    marks = {y: put_axes(numbers, axes, len(program.shape(y)))}
    waiting = [y]
    while waiting:
        x = waiting.pop(0)
        for equation in program.readers.get(x, []):
            if equation.name == "reduce_max":  # a softmax begins with it
                return varies(marks[x], equation.params["axes"])
            for result in equation.outputs:
                moved = _moved(program, equation, marks[x], x, result)
                if moved is not None and result not in marks:
                    marks[result] = moved
                    waiting.append(result)
    return False


def _moved(
    program: Program, equation: Equation, marks: Labels, x: Var, result: Var
) -> Labels | None:
    """The marks of an operand on a result that holds its elements; None where it holds others."""
    if x not in equation.behind(result):
        return None
    old, new = program.shape(x), program.shape(result)
    if equation.name in ELEMENTWISE and old == new:
        return marks
    move = MOVES.get(equation.name)
    return None if move is None else move(marks, equation.params, old, new)
