"""The proof: folding with powers of two must not change a bit of what a function returns."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sqjax._trees import PyTree, map_named
from sqjax.calibration.observe import Watch, observe
from sqjax.folding.apply import expand, fold
from sqjax.folding.graph import Graph
from sqjax.program.facts import Program


def prove(watched: Watch, params: PyTree, inputs: list[Any], graph: Graph) -> Graph:
    """The graph without the groups that fail the proof; these are refused.

    One compiled program runs with s = 1 and with s drawn from 2^-3 .. 2^3 (never 1), so that no order of summation
    differs: its outputs must agree bit for bit, and every site's absmax must be exactly the old one divided by s. In
    both runs leaves are rounded first where that makes scaling them exact (see `_rounded`). In float16, whose smallest
    numbers lose bits when they are divided, activations are only scaled up: s from 2^-2, 2^-1.

    Raises:
        ValueError: the groups that pass one by one fail together.
    """
    low = _in_float16(watched.program)
    ones = {g.name: jnp.ones(g.size, jnp.float32) for g in graph.groups}
    draw = np.random.default_rng(0)
    exponents = [-2, -1] if low else [-3, -2, -1, 1, 2, 3]
    powers = {
        g.name: jnp.asarray(2.0 ** draw.choice(exponents, g.size), jnp.float32)
        for g in graph.groups
    }

    @jax.jit
    def run(params, s, inputs):
        outputs, seen = observe(
            watched, jax.tree.leaves(fold(_rounded(params, graph), graph, s)), inputs
        )
        scale = expand(s, graph)
        absmax = {
            site.path: seen[site].absmax * scale.get(site.path, 1.0)
            for site in (*graph.sites, *graph.keys)
        }
        return outputs, absmax

    expected = jax.device_get(run(params, ones, inputs))

    def passes(names: Iterable[str]) -> bool:
        got = jax.device_get(run(params, ones | {name: powers[name] for name in names}, inputs))
        return all(
            jax.tree.leaves(jax.tree.map(partial(np.array_equal, equal_nan=True), got, expected))
        )

    if passes(powers):
        return graph
    sound = [g for g in graph.groups if passes([g.name])]
    if not passes([g.name for g in sound]):
        raise ValueError(
            "calibrate: groups that fold exactly one by one do not fold together; please report this program"
        )
    failed = [path for g in graph.groups if g not in sound for path, _ in g.sites]
    reason = "folding it with powers of two changed a bit of fn's output"
    if low:
        reason += " (float16 loses bits of very small and very large numbers: bfloat16 or float32 parameters may pass)"
    return graph._replace(
        groups=tuple(sound), refused=(*graph.refused, *((path, reason) for path in failed))
    )


def _in_float16(program: Program) -> bool:
    return any(getattr(aval, "dtype", None) == jnp.float16 for aval in program.avals)


def _rounded(params: PyTree, graph: Graph) -> PyTree:
    """Leaves w that are read as c + w, such that the sum is a multiple of 2^-8; float16 ones a multiple of 2^-21."""
    offsets = dict(graph.offsets)

    def rounded(path: str, leaf: Any) -> Any:
        if path in offsets:
            return jnp.round((offsets[path] + leaf) * 256) / 256 - offsets[path]
        if leaf.dtype == jnp.float16:
            return (jnp.round(leaf.astype(jnp.float32) * 2**21) / 2**21).astype(jnp.float16)
        return leaf

    return map_named(rounded, params)
