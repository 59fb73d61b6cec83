"""`prove`: that a change of leaves leaves a function what it is, by running it in a prime field."""

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sqjax._arguments import check_function, expect
from sqjax._trees import PyTree, named_leaves
from sqjax.folding.graph import Graph
from sqjax.folding.space import Space
from sqjax.numerics.prime_field import draw, embed, mul, salt, sub
from sqjax.program.trace import Traced, trace
from sqjax.proving.changes import (
    Change,
    Leaves,
    Unprovable,
    permutation,
    rotation,
    scaling,
)
from sqjax.proving.running import run
from sqjax.proving.values import Field, Value


class FieldProof(NamedTuple):
    """What held in a finite field, and what did not.

    Attributes:
        held: the names of the changes that leave the function what it is, as "scales of q_proj",
            "rotation of q_proj".
        refused: (name, reason) of the others.
    """

    held: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]

    @property
    def holds(self) -> bool:
        """Whether all of them held, each alone and all together."""
        return not self.refused

    def __str__(self) -> str:
        """How many held, and a line for each that did not."""
        every = len(self.held) + len(self.refused)
        lines = [f"{len(self.held)} of {every} changes proved"]
        lines += [
            f"  refused {name}: {reason}" for name, reason in self.refused
        ]
        return "\n".join(lines)


def prove(
    fn: Callable[..., Any],
    params: PyTree,
    graph: Any,
    *inputs: Any,
    spaces: Sequence[Space] = (),
    permutations: Sequence[Space] = (),
    leaves: str = "random",
    gains: str = "folded",
    trials: int = 3,
    seed: int = 0,
) -> FieldProof:
    """Proves that scales, rotations and permutations of leaves change nothing, in exact arithmetic.

    `fn` is traced, and its program is run with every float replaced by a number modulo the prime p
    = 2^31 - 1: sums and products are exact then, whatever the order of their terms, so two runs
    can be compared without a tolerance. A comparison asks whether a difference is a square modulo
    p (a *positive* number is a square: signs multiply alike), and every other function (exp, tanh
    ...) is a random one, of which nothing is known but that equal arguments give equal results.

    The program runs with the leaves as they are, and with leaves to which random scales of all
    groups, random rotations of all spaces and random permutations have been applied. All outputs
    must be the same numbers. If they are not, halves of the changes are tried, until those that
    change the function are found.

    **What it shows.** If all outputs agree, the change is lawful for any scales > 0 and any
    orthogonal Q, but for a chance of about d / p, where d is the degree of the program between two
    of its random functions (thousands: d / p is about 10^-6). A comparison that a wrong change
    reaches may hide it with a probability of a half; programs have many, and `trials` are
    independent.

    **What it does not show.** How the result is rounded in floats (a cast that keeps fewer than 7
    bits of a mantissa is no rounding, but a function that nothing passes). What the inputs do not
    reach: rows of a table, experts, branches; and of a single token queries and keys, because its
    softmax is 1 whatever they are. And it refuses what holds only because of what a random function
    is in truth, such as exp(a + b) = exp(a) exp(b): a refusal is no proof that a change is wrong.

    Args:
        fn: fn(params, *inputs).
        params: its parameter tree; shapes and dtypes are enough (`jax.ShapeDtypeStruct`) if
            `leaves` are random.
        graph: whose groups are to be proved: a `Graph`, or `Stats`.
        inputs: one batch. Integers and booleans are taken as given; of floats the shapes only:
            they are random, because a zero or a one could hide what is wrong.
        spaces: what is to be rotated.
        permutations: spaces whose elements are to change places. Two trials show it for all orders,
            a single one for one order only.
        leaves: "random": float leaves are random numbers, which proves it for all parameters of
            these shapes; "given": they are those of `params`, exactly, and it is proved for these.
        gains: "folded": the gains of a space are first folded, by a group of the graph, into what
            is behind them, and a space with a gain that no group folds is refused, unless given
            leaves are ones there; "ones": random leaves are ones there (zeros where the program
            reads 1 + leaf), so that spaces are proved for such parameters only.
        trials: how often everything is drawn anew, 1 or more.
        seed: of all drawing.

    Returns:
        `FieldProof`: what held, and what did not.

    Raises:
        ValueError: the program has a primitive without a rule (it is named, with its line); the
            graph is of another tree; `leaves` or `gains` is another word; an integer, or a given
            leaf, is a shape only, or not finite; fn returns nothing.

    Source: Schwartz (1980), Zippel (1979), of polynomials; random functions in place of all others
    are ours.

    Examples:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: jax.nn.relu((x * p["norm"]) @ p["up"]) @ p["down"]
        >>> params = {"norm": jnp.ones(4), "up": jnp.ones((4, 8)), "down": jnp.ones((8, 2))}
        >>> x = jnp.ones((3, 4))
        >>> graph = sq.calibrate(fn, params, [x]).graph
        >>> proof = sq.prove(fn, params, graph, x)
        >>> proof.holds, proof.held
        (True, ('scales of up', 'scales of down'))
    """
    check_function(fn, "prove", "(fn, params, graph, *inputs)")
    graph = getattr(graph, "graph", graph)
    expect(isinstance(graph, Graph), "prove", "a graph or statistics", graph)
    words = ("random", "given")
    expect(leaves in words, "prove: leaves=", " or ".join(words), leaves)
    expect(
        gains in ("folded", "ones"), "prove: gains=", "folded or ones", gains
    )
    whole = isinstance(trials, int) and not isinstance(trials, bool)
    expect(whole and trials > 0, "prove: trials=", "1 or more", trials)
    traced, arrays = trace(fn, params, inputs, {})
    held: dict[str, None] = {}
    refused: dict[str, str] = {}
    for number in range(trials):
        rng = np.random.default_rng([seed, number])
        values = leaf_values(
            params, graph, (*spaces, *permutations), (leaves, gains), rng
        )
        trial = FieldTrial(
            traced, values, input_values(arrays, rng), salt(seed, number)
        )
        changes = [
            *(rotation(space, graph, rng) for space in spaces),
            *(permutation(x, graph, seed, number) for x in permutations),
            *(scaling(graph, group, rng) for group in graph.groups),
        ]
        held.update(dict.fromkeys(map(attrgetter("name"), changes)))
        refused = trial.refused(changes) | refused
    return FieldProof(
        tuple(name for name in held if name not in refused),
        tuple(refused.items()),
    )


def leaf_values(
    params: PyTree,
    graph: Graph,
    spaces: Sequence[Space],
    how: tuple[str, str],
    rng: np.random.Generator,
) -> dict[str, Value]:
    """{path: value} of all leaves.

    `how` is `leaves` and `gains` of `prove`. Random gains that are to be folded are squares,
    because a gain is folded as a scale, and these are positive.
    """
    paths, leaves, _ = named_leaves(params)
    expected = {path: tuple(shape) for path, shape in graph.leaves}
    _check_tree(dict(zip(paths, leaves, strict=True)), expected)
    offsets = dict(graph.offsets)
    gains = {gain for space in spaces for gain in space.gains}
    values: dict[str, Value] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        shape = expected[path]
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            values[path] = _given(path, leaf)
        elif how[0] == "given":
            values[path] = Field(embed(_finite(path, _given(path, leaf))))
        elif path in gains:
            ones = np.ones(shape, np.uint32)
            drawn = ones if how[1] == "ones" else draw(rng, shape)
            offset = embed(np.asarray(offsets.get(path, 0.0)))
            values[path] = Field(sub(mul(drawn, drawn), offset))
        else:
            values[path] = Field(draw(rng, shape))
    return values


def _check_tree(
    leaves: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises ValueError for a leaf of another shape than the graph's, or that one of them lacks."""
    for path, leaf in leaves.items():
        shape = tuple(jnp.shape(leaf))
        if expected.get(path) != shape:
            raise ValueError(
                f"prove: {path}: expected shape {expected.get(path)} of the graph's tree, got "
                f"{shape}; pass the parameters that were calibrated"
            )
    missing = [path for path in expected if path not in leaves]
    if missing:
        raise ValueError(
            f"prove: {missing[0]}: expected the leaf of the graph's tree, got none; pass the "
            "parameters that were calibrated"
        )


def _given(name: str, x: Any) -> Any:
    """An array as it is; a shape alone says nothing of it."""
    if isinstance(x, jax.ShapeDtypeStruct):
        raise ValueError(
            f"prove: {name}: expected an array, got the shape {x.shape} of {x.dtype}; a shape is "
            "enough for what is drawn, which integers and given leaves are not"
        )
    return x


def _finite(path: str, x: Any) -> np.ndarray:
    wide = np.asarray(x).astype(np.float64)
    if not np.isfinite(wide).all():
        raise ValueError(
            f"prove: {path}: expected finite numbers, got infinity or NaN, which no residue stands "
            'for; pass leaves="random"'
        )
    return wide


def input_values(
    arrays: Sequence[Any], rng: np.random.Generator
) -> list[Value]:
    """A program's inputs: floats are random, all others as given."""
    return [
        Field(draw(rng, jnp.shape(x)))
        if jnp.issubdtype(x.dtype, jnp.floating)
        else _given(f"input {number}", x)
        for number, x in enumerate(arrays)
    ]


class FieldTrial:
    """A program in the field, with leaves, inputs and random functions that are drawn."""

    def __init__(
        self,
        traced: Traced,
        leaves: Leaves,
        inputs: Sequence[Value],
        seed: int,
    ):
        self._traced, self._inputs, self._seed = traced, inputs, seed
        self.leaves = leaves
        self._expected = self._outputs(leaves)
        if not any(x.size for x in self._expected):
            raise ValueError(
                "prove: expected a function that returns numbers, got none; of an empty batch "
                "nothing is shown"
            )

    def unchanged_by(self, changes: Sequence[Change]) -> bool:
        """Whether the outputs are the same numbers after these changes, one after the other."""
        after = self.leaves
        try:
            for change in changes:
                after = change.make(after)
        except Unprovable:  # a gain that another change has folded away
            return False
        return self.unchanged(after)

    def unchanged(self, after: Leaves) -> bool:
        """Whether the outputs are the same numbers with other leaves."""
        got = self._outputs(after)
        return all(map(_equal, self._expected, got))

    def refused(self, changes: Sequence[Change]) -> dict[str, str]:
        """{name: reason} of the changes that can not be made, or change what is returned."""
        refused: dict[str, str] = {}
        possible, after = [], self.leaves
        for change in changes:
            try:
                after = change.make(after)
            except Unprovable as reason:
                refused[change.name] = str(reason)
            else:
                possible.append(change)
        if not self.unchanged(after):
            for change in self._wrong(possible):
                refused[change.name] = "it changes what the function returns"
        return refused

    def _wrong(self, changes: Sequence[Change]) -> list[Change]:
        """Those that change the function, found by halving; all of them, if the halves do not."""
        if not changes or self.unchanged_by(changes):
            return []
        if len(changes) == 1:
            return list(changes)
        middle = len(changes) // 2
        first, second = changes[:middle], changes[middle:]
        found = self._wrong(first) + self._wrong(second)
        return found or list(changes)

    def _outputs(self, leaves: Leaves) -> list[np.ndarray]:
        operands = [leaves[path] for path in self._traced.paths]
        results = run(
            self._traced.jaxpr, [*operands, *self._inputs], self._seed
        )
        return list(map(_numbers, results))


def _numbers(x: Value) -> np.ndarray:
    """An output as an array of numpy; a random key as its bits."""
    if isinstance(x, Field):
        return x.residues
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(x))
    return np.asarray(x)


def _equal(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether all bits are the same, and so every NaN."""
    same = (x.shape, x.dtype) == (y.shape, y.dtype)
    return same and x.tobytes() == y.tobytes()
