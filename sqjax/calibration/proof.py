"""The proof: folding with powers of two must not change a bit of what a function returns."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sqjax._trees import PyTree, map_named
from sqjax.calibration.analysis import Analysis
from sqjax.calibration.observe import observe
from sqjax.folding.apply import expand, fold
from sqjax.folding.graph import Graph
from sqjax.program.facts import Program


def prove(analysis: Analysis, params: PyTree, inputs: list[Any], graph: Graph) -> Graph:
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
        ValueError: the groups that pass one by one fail together.
    """
    in_float16 = _in_float16(analysis.program)
    ones = {group.name: jnp.ones(group.size, jnp.float32) for group in graph.groups}
    powers = _powers_of_two(graph, [-2, -1] if in_float16 else [-3, -2, -1, 1, 2, 3])
    run = jax.jit(partial(_run_folded, analysis, graph))
    expected = jax.device_get(run(params, ones, inputs))

    def passes(names: Iterable[str]) -> bool:
        s = ones | {name: powers[name] for name in names}
        got = jax.device_get(run(params, s, inputs))
        same = jax.tree.map(partial(np.array_equal, equal_nan=True), got, expected)
        return all(jax.tree.leaves(same))

    if passes(powers):
        return graph
    sound = [group for group in graph.groups if passes([group.name])]
    if not passes([group.name for group in sound]):
        raise ValueError(
            "calibrate: groups that fold exactly one by one do not fold together; "
            "please report this program"
        )
    reason = "folding it with powers of two changed a bit of fn's output"
    if in_float16:
        reason += (
            " (float16 loses bits of very small and very large numbers: "
            "bfloat16 or float32 parameters may pass)"
        )
    unsound = [group for group in graph.groups if group not in sound]
    failed = [(path, reason) for group in unsound for path, _ in group.sites]
    return graph._replace(groups=tuple(sound), refused=(*graph.refused, *failed))


def _run_folded(
    analysis: Analysis, graph: Graph, params: PyTree, s: Mapping[str, Array], inputs: list[Any]
) -> tuple[list[Any], dict[str, Array]]:
    """(the outputs with s folded in, every site's absmax times s): the same for every s."""
    folded = fold(_rounded(params, graph), graph, s)
    outputs, observations = observe(analysis, jax.tree.leaves(folded), inputs)
    s_of_site = expand(s, graph)
    absmax = {}
    for site in (*graph.sites, *graph.keys):
        absmax[site.path] = observations[site].absmax * s_of_site.get(site.path, 1.0)
    return outputs, absmax


def _powers_of_two(graph: Graph, exponents: list[int]) -> dict[str, Array]:
    """{group: its s}, drawn from these powers, the same ones every time."""
    draw = np.random.default_rng(0)
    powers = {}
    for group in graph.groups:
        exponent = draw.choice(exponents, group.size)
        powers[group.name] = jnp.asarray(2.0**exponent, jnp.float32)
    return powers


def _in_float16(program: Program) -> bool:
    return any(getattr(aval, "dtype", None) == jnp.float16 for aval in program.avals)


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
            return (jnp.round(leaf.astype(jnp.float32) * 2**21) / 2**21).astype(jnp.float16)
        return leaf

    return map_named(rounded, params)
