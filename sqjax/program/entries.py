"""How operands enter bodies: which variable of a body is which slice, block or carried value."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sqjax.program.equations import Atom, Body, Equation, Var
from sqjax.program.subprograms import Scan, ShardMap, While
from sqjax.program.views import View


class Entry(NamedTuple):
    """What a body gets of one operand: the slice of a step, or the block of a device.

    Example: a scan over a stack (32, 64, 64) gives its body slices of (64, 64), one for each step.
    A shard_map with the spec P(None, "model") on 4 devices gives its body blocks of (64, 16) of an
    operand of (64, 64).

    Attributes:
        outer: the operand of the scan or shard_map.
        inner: the body's variable.
        scan: the scan that takes another index of the operand's first axis at every step; None in a
            shard_map.
        shards: {axis of the operand: the (mesh axis, number of devices) that shard it, major first}
            in a shard_map.
    """

    outer: Atom
    inner: Var
    scan: int | None
    shards: Mapping[int, Sequence[tuple[int, int]]]

    @property
    def mesh_axes(self) -> frozenset[int]:
        """The mesh axes along which every device has another block."""
        return frozenset(
            number for axes in self.shards.values() for number, _ in axes
        )

    def view(self, outer: View) -> View | None:
        """The slice or block of a view of a leaf, as a view of that leaf; None if it is none."""
        return (
            outer.block(self.shards)
            if self.scan is None
            else outer.slice_of_scan(self.scan)
        )


class Carried(NamedTuple):
    """A value that a scan or a while loop carries from step to step.

    Attributes:
        first: what it is before the first step.
        inner: the body's variable.
        following: what it is for the next step.
    """

    first: Atom
    inner: Var
    following: Atom


def entries(equation: Equation) -> list[Entry]:
    """The slices of a scan, or the blocks of a shard_map; [] for an equation without a body."""
    body = equation.body
    if body is None:
        return []
    if isinstance(body.call, ShardMap):
        return _blocks(equation, body, body.call)
    assert isinstance(body.call, Scan)
    [scan] = body.scopes
    _, _, xs = body.call.sort(equation.inputs)
    slices = body.inputs[body.call.carry :]
    pairs = zip(xs, slices, strict=True)
    return [Entry(outer, inner, scan, {}) for outer, inner in pairs]


def _blocks(equation: Equation, body: Body, shards: ShardMap) -> list[Entry]:
    """One device's blocks of a shard_map's operands."""
    numbers = dict(zip(shards.sizes, body.scopes, strict=True))
    found = []
    operands = zip(equation.inputs, body.inputs, shards.in_specs, strict=True)
    for outer, inner, spec in operands:
        sharded = {}
        for axis, names in shards.sharded_axes(spec).items():
            sharded[axis] = [
                (numbers[name], shards.sizes[name]) for name in names
            ]
        found.append(Entry(outer, inner, None, sharded))
    return found


def carried(equation: Equation) -> list[Carried]:
    """What a scan, or the body of a while loop, carries; [] for everything else."""
    if not equation.bodies:
        return []
    *_, body = equation.bodies
    if isinstance(body.call, Scan):
        first = body.call.sort(equation.inputs)[1]
    elif isinstance(body.call, While):
        first = body.call.sort(equation.inputs)[2]
    else:
        return []
    # A scan has slices after what it carries.
    values = zip(first, body.inputs, body.outputs, strict=False)
    return [Carried(*value) for value in values]
