"""The proof: folding with powers of two must not change a bit of what a function returns."""

from collections.abc import Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sqjax._trees import PyTree, map_named
from sqjax.calibration.analysis import Analysis, Known
from sqjax.calibration.observe import observe
from sqjax.folding.apply import expand, fold
from sqjax.folding.graph import Graph, Group
from sqjax.program.facts import Program

#: Primitives that run the user's Python while the program runs.
CALLBACKS = frozenset({"pure_callback", "io_callback"})


def prove(
    analysis: Analysis,
    params: PyTree,
    inputs: list[Any],
    graph: Graph,
    known: Known,
) -> Graph:
    """The graph without the groups that fail the proof; their sites are refused.

    One compiled program runs with s = 1, and with s drawn from 2^-3 .. 2^3 (never 1). A power of
    two changes the exponent of a number and none of its digits, so every sum rounds as it did
    before, in whatever order it is taken: the outputs must agree bit for bit, and every site's
    absmax must be exactly the old one divided by s. A fold that is wrong by a factor anywhere can
    not pass. In both runs leaves are rounded first where that makes scaling them exact (see
    `_rounded`). In float16, whose smallest numbers lose bits when they are divided, activations are
    only scaled up: s is 2^-2 or 2^-1.

    All groups are tried at once, which one run decides. Only if that fails is each of them tried
    alone.

    Raises:
        ValueError: the groups that pass one by one fail together; or two runs on the same inputs
            differ.
    """
    trial = Trial(analysis, params, inputs, graph, known)
    names = map(attrgetter("name"), analysis.program.equations)
    calls_back = not CALLBACKS.isdisjoint(names)
    passes = trial.passes(graph.groups)
    if calls_back or not passes:
        trial.check_repeats()
    if passes:
        return graph

    sound = [group for group in graph.groups if trial.passes([group])]
    if not trial.passes(sound):
        raise ValueError(
            "calibrate: groups that fold exactly one by one do not fold together; "
            "please report this program"
        )
    return _without_the_others(graph, sound, in_float16(analysis.program))


def _without_the_others(
    graph: Graph, sound: Sequence[Group], float16: bool
) -> Graph:
    """The graph with the groups in `sound` only; the sites of the others are refused."""
    reason = "folding it with powers of two changed a bit of fn's output"
    if float16:
        reason += (
            " (float16 loses bits of very small and very large numbers: "
            "bfloat16 or float32 parameters may pass)"
        )
    refused = [*graph.refused]
    for group in graph.groups:
        if group not in sound:
            refused += dict.fromkeys(group.paths, reason).items()
    return graph._replace(groups=tuple(sound), refused=tuple(refused))


class Trial:
    """A program on one batch, compiled once, that runs with powers of two folded into any groups.

    Attributes:
        ones, powers: {group: s}, all ones, and drawn powers of two.
        expected: what the program returns with s = 1.
    """

    def __init__(
        self,
        analysis: Analysis,
        params: PyTree,
        inputs: list[Any],
        graph: Graph,
        known: Known,
    ):
        # A small float16 that is divided by 2 may lose its last digit. One that is multiplied by 2
        # does not, so activations are divided by 1/2 and by 1/4 only.
        exponents = [-3, -2, -1, 1, 2, 3]
        if in_float16(analysis.program):
            exponents = [-2, -1]
        # The same draw every time: a calibration that is repeated gives the same graph.
        draw = np.random.default_rng(0)
        self.ones: dict[str, Array] = {}
        self.powers: dict[str, Array] = {}
        for group in graph.groups:
            # Where leaves carry a root of s, that must be a power of two as well.
            exponent = group.degree * draw.choice(exponents, group.size)
            drawn = 2.0**exponent
            ones = np.ones(group.size, np.float32)
            self.ones[group.name] = jnp.asarray(ones)
            self.powers[group.name] = jnp.asarray(drawn.astype(np.float32))

        run = partial(_run_folded, analysis, graph)
        self._run = known.compiled("prove", analysis, run)
        self._params, self._inputs = params, inputs
        self.expected = self._results(self.ones)

    def check_repeats(self) -> None:
        """Raises ValueError if a second run on the same inputs does not give the same bits."""
        if not self.passes([]):
            raise ValueError(
                "calibrate: fn returned two different results on the same inputs (a callback that "
                "draws or counts?), so nothing can be proved of it; pass what differs as an "
                "argument"
            )

    def passes(self, groups: Sequence[Group]) -> bool:
        """Whether the same bits come out with powers of two folded into these groups."""
        powers = {group.name: self.powers[group.name] for group in groups}
        got = self._results(self.ones | powers)
        # NaN equals NaN here, because fn may return one for good reasons (a masked row, say).
        same = jax.tree.map(
            partial(np.array_equal, equal_nan=True), got, self.expected
        )
        return all(jax.tree.leaves(same))

    def _results(self, s: Mapping[str, Array]) -> Any:
        return jax.device_get(self._run(self._params, s, self._inputs))


def _run_folded(
    analysis: Analysis,
    graph: Graph,
    params: PyTree,
    s: Mapping[str, Array],
    inputs: list[Any],
) -> tuple[list[Any], dict[str, Array]]:
    """(the outputs with s folded in, every site's absmax times s): the same for every s."""
    folded = fold(_rounded(params, graph), graph, s)
    outputs, observations = observe(analysis, jax.tree.leaves(folded), inputs)
    s_of_site = expand(s, graph)
    absmax = {}
    for site in (*graph.sites, *graph.keys):
        absmax[site.path] = observations[site].absmax * s_of_site.get(
            site.path, 1.0
        )
    return outputs, absmax


def in_float16(program: Program) -> bool:
    """Whether a program computes in float16 anywhere."""
    return any(
        getattr(aval, "dtype", None) == jnp.float16 for aval in program.avals
    )


def _rounded(params: PyTree, graph: Graph) -> PyTree:
    """The leaves, rounded where scaling them by powers of two would lose bits otherwise.

    A leaf w that is read as c + w is folded as w' = (c + w) / s - c. That is exact only if c + w
    has few digits, so w is rounded such that the sum is a multiple of 2^-8. A leaf in float16 is
    rounded to a multiple of 2^-21, because the smallest float16 is 2^-24 and s takes it up to three
    digits closer.
    """
    offsets = dict(graph.offsets)

    def rounded(path: str, leaf: Any) -> Any:
        if path in offsets:
            return jnp.round((offsets[path] + leaf) * 256) / 256 - offsets[path]
        if leaf.dtype == jnp.float16:
            multiple = jnp.round(leaf.astype(jnp.float32) * 2**21) / 2**21
            return multiple.astype(jnp.float16)
        return leaf

    return map_named(rounded, params)
