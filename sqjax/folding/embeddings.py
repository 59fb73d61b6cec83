"""Tables: leaves that a function only looks rows up in (embeddings that are no head)."""

from dataclasses import replace

from sqjax.folding.graph import Site
from sqjax.program.equations import Equation, Var
from sqjax.program.facts import Program
from sqjax.program.gathers import rows_last
from sqjax.program.views import View


def find_tables(program: Program, matmuls: frozenset[str]) -> tuple[Site, ...]:
    """The leaves, no path of `matmuls` among them, of which nothing but whole rows are read, as
    given by indices.

    As sites: `axes` are those of a row, whose elements share a scale. Example: an embedding of
    shape (vocabulary, 64) that `fn` reads as `table[ids]` only is the site with `axes` (1,) and
    `channels` (64,).
    """
    variables_of: dict[str, list[Var]] = {}
    for var, view in program.seen.items():
        if view.path not in matmuls:
            variables_of.setdefault(view.path, []).append(var)
    found = []
    for path, variables in variables_of.items():
        if _is_table(program, variables):
            shape = program.seen[variables[0]].full_shape
            row_axes = tuple(range(1, len(shape)))
            found.append(Site(path, row_axes, shape[1:]))
    return tuple(found)


def _is_table(program: Program, variables: list[Var]) -> bool:
    """Whether a leaf is looked up in and otherwise only passed on, given all variables that are
    views of it.
    """
    looked_up = False
    for var in variables:
        for equation in program.readers.get(var, ()):
            if is_lookup(program, var, equation):
                looked_up = True
            elif not is_passed_on(program, var, equation):
                return False
    is_returned = not program.outputs.keys().isdisjoint(variables)
    return looked_up and not is_returned


def is_passed_on(program: Program, var: Var, equation: Equation) -> bool:
    """Whether all that an equation makes of a leaf is seen as that leaf."""
    results = [y for y in equation.outputs if var in equation.behind(y)]
    # What multiplies a leaf, or is added to it, is not seen in the result.
    seen_as = set(map(program.path_of, results))
    return not equation.bodies and seen_as == {program.path_of(var)}


def is_lookup(program: Program, var: Var, equation: Equation) -> bool:
    """Whether an equation takes whole rows of a leaf that is seen as it is."""
    view = program.views.get(var)
    # Leaves that were concatenated, or added to, are no rows of one leaf.
    if view is None or equation.name != "gather" or equation.inputs[0] != var:
        return False
    # A transposed or sliced leaf has no rows to look up; a multiple of it has.
    as_it_is = View.of(view.path, view.shape)
    if len(view.shape) < 2 or replace(view, scaled=False) != as_it_is:
        return False
    numbers, sizes = (
        equation.params["dimension_numbers"],
        equation.params["slice_sizes"],
    )
    one_row = (1, *view.shape[1:])
    # Indices along the first axis, one row for each.
    if tuple(numbers.start_index_map) != (0,) or tuple(sizes) != one_row:
        return False
    return rows_last(numbers, len(program.shape(equation.inputs[1])))
