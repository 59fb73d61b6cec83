"""The spaces of a program: what may be rotated, and why the rest may not."""

from collections.abc import Iterator, Mapping
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

from sqjax.folding.groups import Survey
from sqjax.folding.search import Refused
from sqjax.folding.sites import Place
from sqjax.folding.space import Along, Space
from sqjax.folding.space_certificate import certify_space
from sqjax.folding.space_rules import SPACE_RULES
from sqjax.folding.space_search import Failure, SpaceSearch, World
from sqjax.program.equations import Var


class Spaces(NamedTuple):
    """What was found.

    Attributes:
        spaces: each has passed the certificate.
        refused: (site, why its activation is in no space).
    """

    spaces: tuple[Space, ...]
    refused: tuple[tuple[str, str], ...]


class Start(NamedTuple):
    """Where a search begins: a variable that shall turn, of a site."""

    name: str
    var: Var
    axis: int


def find_spaces(survey: Survey) -> Spaces:
    """Finds the spaces of a program: those of the sites' activations, then of their outputs.

    The outputs matter where two activations are multiplied: queries and keys turn together.
    """
    world = World.of(survey.program, SPACE_RULES, survey.shared)
    finder = _Finder(survey, world, {})
    spaces: dict[Space, None] = {}
    refused: dict[str, str] = {}
    for place in survey.places:
        reasons = []
        found = False
        for start in _activation_axes(place):
            space, reason = finder.space(start)
            found = found or space is not None
            if space is not None:
                spaces[space] = None
            else:
                reasons.append(reason)
        if not found:
            refused.setdefault(
                place.name, "; and ".join(dict.fromkeys(reasons))
            )
    for place in survey.places:
        for start in _output_axes(survey, place):
            space, _ = finder.space(start)
            if space is not None:
                spaces[space] = None
    turning = set(chain(*map(attrgetter("sites"), spaces)))
    refusals = [
        (site, why) for site, why in refused.items() if site not in turning
    ]
    return Spaces(tuple(spaces), tuple(refusals))


def _activation_axes(place: Place) -> Iterator[Start]:
    """The contracted axes of a site's activation, the last one first."""
    if place.site.kernel is None:
        for axis in reversed(place.axes[place.batch :]):
            yield Start(place.name, place.activation, axis)


def _output_axes(survey: Survey, place: Place) -> Iterator[Start]:
    """The axes of a site's product that are the leaf's."""
    if place.equation.name != "dot_general":
        return
    [y] = place.equation.outputs
    (contracted, _), (batch, _) = place.equation.params["dimension_numbers"]
    lhs, _ = place.equation.inputs
    rank = len(survey.program.shape(y))
    of_lhs = len(survey.program.shape(lhs)) - len(contracted)
    is_left = lhs == place.activation
    axes = range(of_lhs, rank) if is_left else range(len(batch), of_lhs)
    for axis in reversed(axes):
        yield Start(f"{place.name} (outputs)", y, axis)


class _Finder(NamedTuple):
    """Searches of one program, which learn from each other.

    Attributes:
        survey: the program and its sites.
        world: what the searches know of the program, and where one has failed.
        known: {(variable, axis): the space found for it}.
    """

    survey: Survey
    world: World
    known: dict[tuple[Var, int], Space]

    def space(self, start: Start) -> tuple[Space | None, str]:
        """The space of a variable along an axis, or why there is none."""
        key = start.var, start.axis
        size = self.survey.program.shape(start.var)[start.axis]
        if size < 2:
            return None, f"it has {size} channels"
        if key in self.known:
            return self.known[key], ""
        reasons: list[str] = []
        waiting = [(1, size, 1)]
        while waiting:
            before, part, after = waiting.pop(0)
            search = SpaceSearch(self.world, part)
            along = Along(start.axis, before, after)
            try:
                return self._closed(search, start, along), ""
            except Refused as refused:
                failure = Failure.of(refused)
            self._note(search, failure)
            reasons += failure.reasons
            for b, n, a in failure.parts:
                if n > 1:
                    waiting.append((before * b, n, a * after))
        return None, "; and ".join(dict.fromkeys(reasons))

    def _closed(self, search: SpaceSearch, start: Start, along: Along) -> Space:
        search.put(start.var, along)
        search.close()
        members = {v: frozenset(a) for v, a in search.members.items() if a}
        space = self._space(search, start.name, members)
        problem = certify_space(
            self.survey.program, search.size, members, space
        )
        if problem is not None:
            raise Refused(problem)
        for var, places in members.items():
            for place in places:
                self.known[var, place.axis] = space
        return space

    def _space(
        self,
        search: SpaceSearch,
        name: str,
        members: Mapping[Var, frozenset[Along]],
    ) -> Space:
        leaves = [
            (path, along)
            for path, var in self.survey.program.whole.items()
            for along in sorted(members.get(var, ()))
        ]
        if not leaves:
            raise Refused("no leaf turns with it")
        sites = [
            place.name
            for place in self.survey.places
            for along in members.get(place.activation, ())
            if along.axis in place.axes
        ]
        return Space(
            name,
            search.size,
            tuple(leaves),
            tuple(sorted(search.gains)),
            search.keeps_ones,
            tuple(dict.fromkeys(sites)),
        )

    def _note(self, search: SpaceSearch, failure: Failure) -> None:
        """Whoever is tied to what can not turn can not turn either."""
        for var, places in search.members.items():
            for along in places:
                self.world.failed[var, along, search.size] = failure
