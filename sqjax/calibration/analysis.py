"""`Analysis`: what calibration finds in a program, found once for each function and set of shapes.

Tracing a large model takes seconds, and finding the keys of its attention longer still. So the
proof, the recording and the comparison of batches of other shapes all read the same `Analysis`, and
`Analyses` makes no second one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any

import jax
import numpy as np

from sqjax._trees import PyTree, named_leaves
from sqjax.folding.attention_keys import Keys, find_keys
from sqjax.folding.find_graph import find_graph
from sqjax.folding.graph import Graph, Group, Site
from sqjax.folding.groups import Survey
from sqjax.folding.sites import Place
from sqjax.folding.space import Space
from sqjax.program.facts import Program
from sqjax.program.repeatable import Repeated
from sqjax.program.trace import is_array

Fn = Callable[..., Any]
#: The arguments of a function after params.
Arguments = tuple[Any, ...]
#: Lists of Python numbers up to this length are static arguments (sizes, axes); longer ones data.
LONGEST_LIST = 16


@dataclass(frozen=True)
class Analysis:
    """A function as a program, and what calibration observes in it.

    Attributes:
        survey: the program and its sites.
        keys: where scales can move between keys and queries; empty where nobody asked for them.
        stated: {site: leaves that shall absorb its scale}: the groups that the user states by hand.
    """

    survey: Survey
    keys: Sequence[Keys]
    stated: Mapping[str, Sequence[str]]

    @property
    def program(self) -> Program:
        """The traced function."""
        return self.survey.program

    @property
    def places(self) -> Sequence[Place]:
        """The matmuls of an activation with a leaf. Several of them may read one site."""
        return self.survey.places

    @property
    def sites(self) -> frozenset[Site]:
        """Everything that is observed: the sites, and the keys."""
        of_places = list(map(attrgetter("site"), self.places))
        of_keys = list(map(attrgetter("site"), self.keys))
        return frozenset([*of_places, *of_keys])

    @cached_property
    def looked_up(self) -> frozenset[str]:
        """The paths of leaves of which rows are looked up: a head that is the embedding, say."""
        paths = [
            self.program.path_of(equation.inputs[0])
            for equation in self.program.equations
            if equation.name == "gather"
        ]
        return frozenset(path for path in paths if path is not None)

    @cached_property
    def graph(self) -> Graph:
        """What can be folded: searched for when first asked for, because recording needs none."""
        return find_graph(self.survey, self.keys, self.stated)


@dataclass(frozen=True)
class Known:
    """What was found and compiled for some functions and shapes.

    Tracing sees shapes and no numbers, so this serves all parameters of the same shapes: those of
    the layers of one model, say. It holds no parameters.

    Attributes:
        analyses: {(which function, the shapes of its arguments): its analysis}.
        programs: {what it is for: a compiled function}.
    """

    analyses: dict[tuple[int, str], Analysis] = field(default_factory=dict)
    programs: dict[Any, Callable[..., Any]] = field(default_factory=dict)

    def compiled(
        self, what: str, analysis: Analysis, function: Callable[..., Any]
    ) -> Callable[..., Any]:
        """The function, jitted: the one that was given first for this purpose and analysis."""
        # The function holds its analysis, so that no other one can get the same id.
        return self.programs.setdefault((what, id(analysis)), jax.jit(function))


class Analyses:
    """Makes the analyses of functions that share parameters: each alone, and all together.

    A function alone is what runs on one of its batches. Only the analysis of all together tells
    what may be folded, because a leaf that one function could absorb a scale into may be read by
    another one. For a single function the two are the same, and it is traced once.
    """

    def __init__(
        self,
        functions: Sequence[Fn],
        params: PyTree,
        first_batches: Sequence[Arguments],
        stated: Mapping[str, Sequence[str]],
        attention: bool,
        known: Known | None = None,
    ):
        self.functions, self.params, self.first_batches = (
            functions,
            params,
            first_batches,
        )
        self.stated, self.attention = stated, attention
        self._shared = shared_arrays(params)
        self.known = Known() if known is None else known
        self._first: list[Repeated] = []

    def alone(self, which: int, args: Arguments, number: int) -> Analysis:
        """The analysis of one function on batch `number`: made once for batches of its shapes."""
        key = which, shapes_of(args)
        # Not by `fn` and the arrays: tracing sees shapes only, and batches of one shape are many.
        if key not in self.known.analyses:
            self.known.analyses[key] = self._analysis(
                self.functions[which], args, number
            )
        return self.known.analyses[key]

    def together(self, which: int, args: Arguments, number: int) -> Analysis:
        """The analysis of all functions: `which` on batch `number`, the others on their first."""
        if len(self.functions) == 1:
            return self.alone(0, args, number)
        # One program of all functions: a leaf that two of them read has two readers there.
        batches = [*self.first_batches]
        batches[which] = args

        def every(params: PyTree, *batches: Arguments) -> list[Any]:
            pairs = zip(self.functions, batches, strict=True)
            return [fn(params, *args) for fn, args in pairs]

        return self._analysis(every, tuple(batches), number)

    def check_repeatable(self) -> None:
        """Raises ValueError if a function is another program each time it is called.

        Asked last, and of the first batches only, because it may trace these once more.
        """
        for repeated in self._first:
            repeated.check()

    def _analysis(self, fn: Fn, args: Arguments, number: int) -> Analysis:
        repeated = traced_program(fn, self.params, args, number)
        if number == 0:
            self._first.append(repeated)
        survey = Survey.of(Program(repeated.traced), self._shared)
        keys = find_keys(survey) if self.attention else []
        return Analysis(survey, keys, self.stated)


def shapes_of(args: Arguments) -> str:
    """The shapes, dtypes and static values of arguments, as a text that can be a key.

    Two batches with the same text have the same program. Example: a batch of 2 x 5 float32 numbers
    and a flag gives "(ShapedArray(float32[2,5]), True)".
    """
    return str(_arrays_to(jax.typeof, args))


def _arrays_to(describe: Callable[[Any], Any], args: Arguments) -> PyTree:
    """The arguments with describe(x) for every array x; what is no array stays as it is."""
    return jax.tree.map(lambda x: describe(x) if is_array(x) else x, args)


def traced_program(
    fn: Fn, params: PyTree, args: Arguments, number: int
) -> Repeated:
    """fn(params, *args), traced.

    Raises:
        ValueError: fn fails on these arguments; it names the batch and its shapes.
    """
    try:
        repeated = Repeated(fn, params, args)
    # Whatever fn raises: a TypeError of two arguments for one, a shape that does not fit, ...
    except Exception as error:
        raise ValueError(
            f"calibration batch {number}: fn(params, *batch) failed on inputs of shapes "
            f"{described(args)}; a batch is one argument, or a tuple of fn's arguments after "
            f"params{_hint(args)}. {type(error).__name__}: {error}"
        ) from error
    return repeated


def described(args: Any) -> str:
    """The shapes of the arrays in a batch as a text; of lists of numbers how many there are.

    Example: (jnp.ones((2, 5)), [1, 2, 3], True) is "((2, 5), [3 numbers], True)".
    """
    if is_array(args):
        return str(np.shape(args))
    if isinstance(args, Mapping):
        inside = [f"{key!r}: {described(args[key])}" for key in args]
        return "{" + ", ".join(inside) + "}"
    if isinstance(args, tuple | list):
        return _described_sequence(args)
    return repr(args)[:80]


def _described_sequence(args: Sequence[Any]) -> str:
    is_list = isinstance(args, list)
    if is_list and _numbers_in(args):
        return f"[{_numbers_in(args)} numbers]"
    # Twenty are enough to see what kind of batch this is; a long list would bury the message.
    inside = list(map(described, args[:20]))
    text = ", ".join([*inside, "..."] if len(args) > 20 else inside)
    if is_list:
        return f"[{text}]"
    return f"({text},)" if len(args) == 1 else f"({text})"


def _numbers_in(args: Any) -> int:
    """How many Python numbers a nested list holds; 0 if it holds anything else."""
    leaves = jax.tree.leaves(args)
    plain = all(isinstance(x, int | float) for x in leaves)
    return len(leaves) if plain else 0


def check_no_numbers(args: Arguments, number: int) -> None:
    """Raises ValueError for a nested list of numbers, which would be constants of the program."""
    for position, arg in enumerate(args):
        if isinstance(arg, list) and _numbers_in(arg) > LONGEST_LIST:
            raise ValueError(
                f"calibration batch {number}, argument {position}: a list of {_numbers_in(arg)} "
                "numbers is compiled into the program as constants, anew for every batch; pass an "
                "array: np.asarray(batch)"
            )


def _hint(args: Arguments) -> str:
    """What else may be wrong with a batch of several arguments."""
    if len(args) < 2:
        return ""
    return (
        f" (this tuple gives fn {len(args)} of them; if some are for training, labels say, leave "
        "them out: ((x,) for x, y in loader))"
    )


def shared_arrays(params: PyTree) -> dict[str, str]:
    """{path: another path} of leaves that are one and the same array.

    Example: {"embed": table, "head": table, "norm": gain} gives {"embed": "head", "head": "embed"}.
    Such leaves can not be scaled apart from each other, because the user's function may rely on
    their being one.
    """
    paths, leaves, _ = named_leaves(params)
    first: dict[int, str] = {}
    shared: dict[str, str] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        # By identity: two arrays of equal numbers may still be scaled apart.
        other = first.setdefault(id(leaf), path)
        if other != path:
            shared[path] = other
            shared[other] = path
    return shared


def common_groups(graph: Graph, other: Graph, where: str) -> Graph:
    """The graph without the groups and spaces that are not in `other`, the graph of `where`.

    The sites of a lost group are refused. Two groups are the same one if folding them does the same
    to the parameters and to the statistics; so are two spaces if rotating them does.
    """
    # By what they do, because the names of groups may differ from program to program.
    there = {_effect(group, other) for group in other.groups}
    kept: list[Group] = []
    lost: list[Group] = []
    for group in graph.groups:
        same = _effect(group, graph) in there
        (kept if same else lost).append(group)

    # The other program may say what stands in the way; or there is a group, but another one.
    reasons = dict(other.refused)
    refused = [*graph.refused]
    for group in lost:
        for path, _ in group.sites:
            reason = reasons.get(path, "its group is another there")
            refused.append(
                (
                    path,
                    f"it does not fold in the program of {where}: {reason}",
                )
            )

    names = {group.name for group in kept}
    keys = tuple(key for key in graph.keys if key.path in names)
    spaces, space_refusals = _common_spaces(graph, other, where)
    return graph._replace(
        groups=tuple(kept),
        refused=tuple(refused),
        keys=keys,
        spaces=spaces,
        space_refusals=space_refusals,
    )


def _common_spaces(
    graph: Graph, other: Graph, where: str
) -> tuple[tuple[Space, ...], tuple[tuple[str, str], ...]]:
    """The spaces that are in both graphs, and the refusals, with the sites of all others."""
    there = {space.effect for space in other.spaces}
    kept = tuple(space for space in graph.spaces if space.effect in there)
    reasons = dict(other.space_refusals)
    refused = [*graph.space_refusals]
    for space in graph.spaces:
        if space.effect in there:
            continue
        for site in space.sites:
            reason = reasons.get(site, "its space is another there")
            text = f"it does not turn in the program of {where}: {reason}"
            refused.append((site, text))
    return kept, tuple(refused)


def _effect(group: Group, graph: Graph) -> tuple[Any, ...]:
    """What folding a group does: how channels and elements scale, and the c of c + leaf."""
    offset_of = dict(graph.offsets)
    offsets = tuple(offset_of.get(path) for path, _ in group.leaves)
    return group.sites, group.leaves, offsets
