"""Tables: leaves that a function only looks rows up in (embeddings that are no head)."""

from sqjax.folding.graph import Site
from sqjax.program.build import Equation, Var
from sqjax.program.facts import Program
from sqjax.program.gathers import rows_last
from sqjax.program.views import View


def find_tables(program: Program, matmuls: frozenset[str]) -> tuple[Site, ...]:
    """The leaves, no path of `matmuls` among them, of which nothing but whole rows are read, as given by indices.

    As sites: `axes` are those of a row, whose elements share a scale.
    """
    seen: dict[str, list[Var]] = {}
    for var, view in program.views.items():
        seen.setdefault(view.path, []).append(var)
    found = []
    for path, variables in seen.items():
        shape = program.views[variables[0]].full_shape
        readers = [(v, e) for v in variables for e in program.readers.get(v, ())]
        looked_up = [_is_lookup(program, v, e) for v, e in readers]
        passed_on = [_is_passed_on(program, v, e) for v, e in readers]
        only = all(a or b for a, b in zip(looked_up, passed_on, strict=True))
        if (
            path not in matmuls
            and any(looked_up)
            and only
            and not set(variables).intersection(program.outputs)
        ):
            axes = tuple(range(1, len(shape)))
            found.append(Site(path, axes, tuple(shape[a] for a in axes)))
    return tuple(found)


def _is_passed_on(program: Program, var: Var, equation: Equation) -> bool:
    """Whether all that an equation makes of a leaf is seen as that leaf."""
    results = [y for y in equation.outputs if var in equation.behind(y)]
    return equation.body is None and bool(results) and all(y in program.views for y in results)


def _is_lookup(program: Program, var: Var, equation: Equation) -> bool:
    """Whether an equation takes whole rows of a leaf that is seen as it is."""
    view = program.views[var]
    if (
        equation.name != "gather"
        or view != View.of(view.path, view.shape)
        or equation.inputs[0] != var
    ):
        return False
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    of_rows = (
        tuple(numbers.start_index_map) == (0,)
        and tuple(sizes) == (1, *view.shape[1:])
        and len(view.shape) > 1
    )
    return of_rows and rows_last(numbers, len(program.shape(equation.inputs[1])))
