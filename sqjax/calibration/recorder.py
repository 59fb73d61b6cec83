"""`Recorder`: running totals of what the sites see, batch after batch."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sqjax._trees import check_finite
from sqjax._warnings import warn
from sqjax.calibration.analysis import (
    Analyses,
    Analysis,
    Arguments,
    common_groups,
    shapes_of,
)
from sqjax.calibration.measure import Wanted
from sqjax.calibration.observe import (
    Observation,
    combine,
    experts_of,
    observe,
    wanted_of,
)
from sqjax.calibration.stats import Stats, leaf_sizes, weight_absmaxes
from sqjax.folding.apply import leaves_by_path
from sqjax.folding.graph import Graph, Site
from sqjax.numerics.ranges import Histogram
from sqjax.numerics.samples import Sample
from sqjax.program.trace import array_leaves

#: So many different shapes of batches are warned of.
MANY_SHAPES = 8
#: {site: what it saw}.
Totals = dict[str, Observation]


class Recorder:
    """A calibration under way.

    Attributes:
        graph: what can be folded in the programs of all batches so far.
        totals: {path: what that site, or these keys, saw in all batches so far}.
    """

    def __init__(
        self,
        analyses: Analyses,
        first: Analysis,
        graph: Graph,
        mask: Callable[..., Any] | None,
        wanted: Wanted,
    ):
        self.graph = graph
        self._analyses, self._mask, self._wanted = analyses, mask, wanted
        self._recorded = frozenset((*graph.sites, *graph.keys))
        self._expected: dict[int, frozenset[Site]] = {}
        self._steps: dict[tuple[int, str], Callable[..., Totals]] = {}
        self.totals = self._nothing_seen(first)

    def _nothing_seen(self, first: Analysis) -> Totals:
        """Zeros in the place of every statistic, to which the batches are added."""
        experts = {
            place.site.path: experts_of(first.program, place)
            for place in first.places
        }
        totals: Totals = {}
        for site in sorted(self._recorded):
            stack = site.channels[: len(site.batch)]
            shape = stack + experts.get(site.path, ())
            # From numpy, because jnp.zeros compiles a program for every shape.
            zeros = jnp.asarray(np.zeros(site.channels, np.float32))
            reached = jnp.asarray(np.zeros(shape, np.int32))
            none = Observation(zeros, zeros, jnp.asarray(np.int32(0)), reached)
            # Keys are no sites: they have no weight to quantize, so nobody asks for more of them.
            if site in self.graph.sites:
                own = wanted_of(site, self._wanted, first.looked_up)
                none = _with_nothing(site, none, own)
            totals[site.path] = none
        return totals

    def record(self, which: int, args: Arguments, number: int) -> None:
        """Adds what the sites see in batch `number` of function `which`."""
        key = which, shapes_of(args)
        # One compiled step for batches of one shape, whichever of them comes first.
        if key not in self._steps:
            self._steps[key] = self._compile(which, args, number)
            if len(self._steps) == MANY_SHAPES:
                warn(
                    f"calibrate: batches of {MANY_SHAPES} different shapes so far, each of which "
                    "is compiled anew: pad them to one length and pass mask=, or sort them into "
                    "a few lengths"
                )
        mask = None
        if self._mask is not None:
            mask = _checked_mask(_called(self._mask, args))
        leaves = jax.tree.leaves(self._analyses.params)
        self.totals = self._steps[key](
            self.totals, leaves, array_leaves(args), mask
        )

    def _compile(
        self, which: int, args: Arguments, number: int
    ) -> Callable[..., Totals]:
        """The step for batches of these shapes.

        What does not fold in their program is not folded at all.
        """
        analysis = self._analyses.alone(which, args, number)
        # Other sites than the first batch's are not recorded: nothing was proved of these.
        recorded = analysis.sites & self._recorded
        expected = self._expected.setdefault(which, recorded)
        missing = sorted(site.path for site in expected - recorded)
        if missing:
            raise ValueError(
                f"calibration batch {number}: {missing[0]} was in the first batch's program, "
                "not in this one's; fn must use the same weights on every batch"
            )
        # The graph was found in the programs of the first batches, and of no other shapes.
        if number > 0:
            there = self._analyses.together(which, args, number).graph
            self.graph = common_groups(self.graph, there, f"batch {number}")
        step = partial(_added, analysis, self._recorded, self._wanted)
        what = f"record {self._wanted}"
        return self._analyses.known.compiled(what, analysis, step)

    def stats(self) -> Stats:
        """The totals as `Stats`.

        Raises:
            ValueError: an activation was NaN or infinite; it names the site.
        """
        absmax, abs_sum, count, reached = {}, {}, {}, {}  # of every path
        for path, seen in self.totals.items():
            reached[path] = seen.reached
            absmax[path] = _with_nan_of(seen.absmax, seen.abs_sum)
            abs_sum[path] = seen.abs_sum
            count[path] = seen.tokens
        # Not batch by batch: a check waits for the device. Maxima keep an infinity. Only the sums
        # keep a NaN, because a CPU's vectorised maximum passes over it.
        check_finite(absmax, "activation at")
        grams = self._of_each("gram")
        check_finite(
            grams, "Gram matrix (of activations that are too large) at"
        )

        leaves = leaves_by_path(self._analyses.params, self.graph)
        weights = weight_absmaxes(self.graph.sites, leaves)
        folded = {}
        for group in self.graph.groups:
            ones = np.ones(group.size, np.float32)
            folded[group.name] = jnp.asarray(ones)
        return Stats(
            absmax,
            abs_sum,
            count,
            weights,
            folded,
            self.graph,
            self._of_each("histogram"),
            leaf_sizes(leaves),
            reached,
            grams,
            self._of_each("sample"),
        )

    def _of_each(self, field: str) -> dict[str, Any]:
        """{path: this field of its totals}, of those that have it."""
        found = {
            path: getattr(seen, field) for path, seen in self.totals.items()
        }
        return {path: x for path, x in found.items() if x is not None}


def _with_nothing(site: Site, none: Observation, wanted: Wanted) -> Observation:
    """An observation of nothing, with what is wanted beside maxima and sums."""
    stack = site.channels[: len(site.batch)]
    features = math.prod(site.channels[len(site.batch) :])
    if wanted.histogram:
        none = none._replace(histogram=Histogram.empty(stack))
    if wanted.gram:
        zeros = np.zeros((*stack, features, features), np.float32)
        none = none._replace(gram=jnp.asarray(zeros))
    if wanted.sample:
        empty = Sample.empty(stack, wanted.sample, features)
        none = none._replace(sample=empty)
    return none


def _added(
    analysis: Analysis,
    recorded: frozenset[Site],
    wanted: Wanted,
    totals: Totals,
    leaves: Any,
    inputs: Any,
    mask: Any,
) -> Totals:
    """The totals after one more batch. Sites of other functions stay as they are."""
    _, observations = observe(analysis, leaves, inputs, mask, wanted)
    added = dict(totals)
    for site, observation in observations.items():
        if site in recorded:
            added[site.path] = combine(totals[site.path], observation)
    return added


def _called(mask: Callable[..., Any], args: Arguments) -> Any:
    """mask(*args).

    Raises:
        ValueError: it takes another number of arguments than a batch has.
    """
    try:
        inspect.signature(mask).bind(*args)
    except TypeError as error:
        raise ValueError(
            f"calibrate: mask=: expected a function of the {len(args)} arguments of a batch, "
            f"mask(*batch), got one of other arguments ({error}); where it needs only some, take "
            "the rest with `lambda ids, *rest: ids != 0`"
        ) from error
    except ValueError:  # one of C has no signature that Python knows
        pass
    return mask(*args)


def _checked_mask(mask: Any) -> Array:
    """A mask as booleans.

    Raises:
        ValueError: it holds anything but true and false, or 1 and 0. An additive mask, 0 for real
            tokens and -1e9 for padding, means the opposite.
    """
    values = np.asarray(mask)
    is_number = values.dtype == bool or values.dtype.kind in "iuf"
    if not is_number or not np.isin(values, (0, 1)).all():
        raise ValueError(
            "calibrate: mask=: expected booleans (or 1 and 0), True where a token is real, got "
            f"{values.dtype.name} of shape {values.shape} with other values; of an additive mask "
            "(0 and -1e9) pass `lambda *batch: additive(*batch) == 0`"
        )
    return jnp.asarray(values, bool)


@jax.jit
def _with_nan_of(absmax: Array, abs_sum: Array) -> Array:
    """Maxima, NaN where the sum of the same numbers is."""
    return jnp.where(jnp.isnan(abs_sum), jnp.float32(jnp.nan), absmax)
