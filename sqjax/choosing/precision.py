"""`choose_precision`: which scheme each site gets, so that the loss is least within a budget.

Sites differ: rounding one to 4 bits costs a hundred times what rounding another does. So each is
scored for every scheme (`sqjax.choosing.sensitivity`), and the best assignment within the budget is
a knapsack (`sqjax.numerics.knapsack`).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from sqjax._arguments import check_function, expect
from sqjax._names import first_matches
from sqjax._trees import PyTree, named_leaves
from sqjax.calibration.calibrate import check_batches
from sqjax.calibration.stats import Stats
from sqjax.choosing.sensitivity import Loss, sensitivity
from sqjax.folding.apply import leaves_by_path
from sqjax.folding.graph import Graph, paths_of
from sqjax.methods.described import check_known, check_stats
from sqjax.methods.quantization import quantize_sites
from sqjax.numerics.knapsack import choose, trade_off
from sqjax.weights.quant_weight import is_quantized
from sqjax.weights.schemes import Indices, Int4, Scheme, scheme_of
from sqjax.weights.sizes import shown_bytes, weight_bytes

#: A scheme, the name of a preset, or None: stay float.
Candidate = Scheme | str | None
Budget = Any  # a number


class Curve(NamedTuple):
    """The trade-off: points from the smallest to the best, each the best one of its size.

    `matplotlib.pyplot.plot(curve.nbytes, curve.loss)` draws it.

    Attributes:
        nbytes: what the sites take, ascending.
        loss: the predicted growth of the mean loss, descending.
    """

    nbytes: np.ndarray
    loss: np.ndarray


class Costs(NamedTuple):
    """What every candidate costs at every set of tied sites: arrays of shape (sets, candidates).

    Attributes:
        loss: the predicted growth of the mean loss.
        nbytes: what the leaves take, scales and zero points included.
        bits: what their codes alone take.
        weights: how many weights there are, (sets,).
    """

    loss: np.ndarray
    nbytes: np.ndarray
    bits: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True, repr=False)
class Precision:
    """An assignment of schemes to sites; `rules` is what `quantize` takes.

    Attributes:
        rules: {pattern: scheme or None}: what `fixed` said, then ^path$ of every site.
        nbytes: what the sites take that were chosen for, quantized by these rules.
        bits: bits a weight of their codes, on average.
        loss: the predicted growth of the mean loss.
        curve: the trade-off.
        sensitivity: {site: the predicted growth of the loss by each candidate}, float64, in the
            order of `candidates`.
        candidates: the schemes, and None.
        tied: the sites that have one scheme together.
        costs: what was weighed.
        fixed: as it was given.
    """

    rules: dict[str, Scheme | None]
    nbytes: int
    bits: float
    loss: float
    curve: Curve
    sensitivity: dict[str, np.ndarray]
    candidates: tuple[Scheme | None, ...]
    tied: tuple[tuple[str, ...], ...]
    costs: Costs
    fixed: dict[str, Candidate]

    def within(
        self, *, bits: Budget | None = None, nbytes: Budget | None = None
    ) -> "Precision":
        """The best assignment within another budget, from the same sensitivities.

        Args:
            bits: as for `choose_precision`.
            nbytes: as for `choose_precision`.

        Raises:
            ValueError: as `choose_precision`.
        """
        choice = _chosen(self.costs, bits, nbytes)
        return replace(
            self,
            rules=dict(_rules(self.fixed, self.tied, self.candidates, choice)),
            nbytes=int(_total(self.costs.nbytes, choice)),
            bits=float(_total(self.costs.bits, choice) / self._weights),
            loss=float(_total(self.costs.loss, choice)),
        )

    @property
    def _weights(self) -> int:
        return int(self.costs.weights.sum())

    def __repr__(self) -> str:
        """How many sites have each candidate, the size and the predicted loss."""
        # The rules of `fixed` come first, and no site was chosen for there.
        schemes = list(self.rules.values())[len(self.fixed) :]
        counts = [
            f"  {schemes.count(candidate):5} sites  {candidate!r}"
            for candidate in self.candidates
        ]
        head = f"{self.bits:.3g} bits a weight, {shown_bytes(self.nbytes)}"
        head += f", predicted loss +{self.loss:.3g}"
        return "\n".join([head, *counts])


def choose_precision(
    fn: Callable[..., Any],
    params: PyTree,
    stats: Stats,
    batches: Iterable[Any],
    candidates: Iterable[Candidate],
    *,
    bits: Budget | None = None,
    nbytes: Budget | None = None,
    loss: Loss | None = None,
    fixed: Mapping[str, Candidate] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Precision:
    """The scheme of every site, chosen among candidates so that the loss is least within a budget.

    For every site i and candidate c the growth of the mean loss is predicted to be

        loss_ic = 1 / (2 n) * sum of g^2 dy^2

    over the elements of the site's output y, where g is the gradient of the loss with respect to y,
    dy is what the quantized site adds to y, and n is how many predictions (tokens, say) the batches
    hold. It is a second-order estimate with the Fisher information of y, of one run forward and
    back for each batch, whatever the number of candidates; the score is that of NVIDIA's Model
    Optimizer (AutoQuantize). The sum over sites of loss_ic is then minimized within the budget,
    exactly where the sizes allow. Sites that share an activation (q, k and v; gate and up) get one
    scheme, because engines read them in one matmul.

    Without a `loss` it is the Kullback-Leibler divergence of the quantized model's predictions from
    the float model's: labels are drawn from softmax(outputs), for every row of the outputs one. No
    labels are needed, and the outputs must be logits.

    Args:
        fn: fn(params, *batch), as for `calibrate`; reverse-mode differentiable.
        params: the calibrated or the smoothed tree: those that will be quantized.
        stats: their statistics.
        batches: an iterable of batches, as for `calibrate`. A few thousand tokens are enough.
        candidates: schemes, names of presets, or None (stay float); the first is taken where two
            serve alike.
        bits: a budget of bits a weight, on average over the sites. The codes alone are counted, so
            that W8A16 has 8 and W4A16 has 4, as their names say; None has those of the leaf's
            dtype.
        nbytes: or a budget of bytes of all sites, scales and zero points included, as
            `quantize` would store them.
        loss: loss(outputs, *batch): the losses of all predictions, an array of any shape, whose
            mean is the loss. For a language model -log p of every next token, say.
        fixed: rules of sites that are not chosen for, {"embed|head": None}. They have no part in
            the budget, and come first in the rules.
        seed: of the labels that are drawn. They depend on it and on their batch, not on the order
            of the batches.
        progress: whether to show a progress bar.

    Returns:
        `Precision`; its `rules` are what `quantize` takes.

    Raises:
        ValueError: there is no budget, or there are two; the budget is below the smallest
            candidates (the error says what these take); no candidate, or one that is no scheme or
            is one for embeddings; a pattern of `fixed` is found in no path, or `fixed` leaves no
            site; `quantize` refuses a candidate; fn fails on a batch, or its gradient holds NaN.

    Examples:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> shapes = {"a": (8, 64), "b": (64, 8)}
        >>> params = {k: jax.random.normal(key, shapes[k]) for k, key in zip(shapes, keys)}
        >>> x = jax.random.normal(keys[2], (16, 8))
        >>> stats = sq.calibrate(fn, params, [x])
        >>> best = sq.choose_precision(fn, params, stats, [x], ["W4A16", "W8A16"], bits=6)
        >>> best.bits, [rule == sq.W8A16 for rule in best.rules.values()].count(True)
        (6.0, 1)
    """
    check_function(fn, "choose_precision", _ORDER)
    check_stats(stats, "choose_precision")
    check_known(params, stats, "choose_precision")
    check_batches(batches)
    _check_budget(bits, nbytes)
    schemes = _schemes(candidates)
    fixed = dict(fixed or {})
    sites = _free_sites(stats.graph, fixed)
    leaves = leaves_by_path(params, stats.graph)
    coded = [scheme for scheme in schemes if scheme is not None]
    # Every site in every scheme once: the sensitivities and the sizes are both read from these.
    trees = [
        quantize_sites(params, stats, dict.fromkeys(sites, scheme))
        for scheme in coded
    ]
    found = sensitivity(fn, params, trees, batches, loss, seed, progress)
    losses = {path: _with_float(found.loss[path], schemes) for path in sites}
    tied = _tied(stats.graph, sites, found.joined)
    costs = _costs(losses, leaves, trees, schemes, tied)
    curve = trade_off(costs.nbytes, costs.loss)
    # Without an assignment yet, because `within` makes one for any budget from the same costs.
    nothing = Precision(
        {},
        0,
        0.0,
        0.0,
        Curve(curve.cost, curve.loss),
        losses,
        schemes,
        tied,
        costs,
        fixed,
    )
    return nothing.within(bits=bits, nbytes=nbytes)


_ORDER = "(fn, params, stats, batches, candidates)"


def _schemes(candidates: Any) -> tuple[Scheme | None, ...]:
    """The candidates, each once."""
    listed = isinstance(candidates, Iterable) and not isinstance(
        candidates, str
    )
    expected = "schemes to choose among, as in ['W4A16', 'W8A16', None]"
    expect(listed, "choose_precision: candidates", expected, candidates)
    schemes: dict[Scheme | None, None] = {}
    for candidate in candidates:
        scheme = None
        if candidate is not None:
            scheme = scheme_of(candidate, "choose_precision: candidate")
            if isinstance(scheme.activation, Indices):
                raise ValueError(
                    f"choose_precision: {candidate!r} is for embeddings, which are no sites; give "
                    "it in fixed={pattern: scheme}"
                )
        schemes[scheme] = None
    # None alone is no choice, because nothing would be quantized.
    if not any(schemes):
        raise ValueError(
            f"choose_precision: candidates: expected {expected}, got no scheme"
        )
    return tuple(schemes)


def _free_sites(graph: Graph, fixed: Mapping[str, Candidate]) -> list[str]:
    """The sites of which no pattern of `fixed` is found."""
    sites, tables = paths_of(graph.sites), paths_of(graph.tables)
    matched = first_matches(
        fixed, [*sites, *tables], "choose_precision: fixed rule"
    )
    free = [path for path in sites if matched[path] is None]
    if not free:
        raise ValueError(
            "choose_precision: fixed has a rule for every site; leave some to choose for"
        )
    return free


def _with_float(
    losses: np.ndarray, schemes: Sequence[Scheme | None]
) -> np.ndarray:
    """The losses of all candidates, from those of the schemes: staying float costs nothing."""
    of_schemes = iter(losses.tolist())
    return np.array(
        [0.0 if scheme is None else next(of_schemes) for scheme in schemes]
    )


def _tied(
    graph: Graph, sites: Sequence[str], joined: Iterable[tuple[str, ...]]
) -> tuple[tuple[str, ...], ...]:
    """The sites in sets that have one scheme: those of a fold group, or of one product.

    Example: groups of q, k, v and of v, o make one set of all four.
    """
    # Sets grow together: where two share a site, every member gets the union.
    set_of = {path: {path} for path in sites}
    # A group of keys ties q and k by their outputs, for which they need not be one matmul.
    groups = [group.paths for group in graph.groups if not group.keys]
    for paths in [*groups, *joined]:
        members = [path for path in paths if path in set_of]
        together = set().union(*[set_of[path] for path in members])
        set_of.update(dict.fromkeys(together, together))
    order = {path: place for place, path in enumerate(sites)}
    sets = dict.fromkeys(
        tuple(sorted(paths, key=order.__getitem__)) for paths in set_of.values()
    )
    return tuple(sets)


def _costs(
    losses: Mapping[str, np.ndarray],
    leaves: Mapping[str, Any],
    trees: Sequence[PyTree],
    schemes: Sequence[Scheme | None],
    tied: Sequence[Sequence[str]],
) -> Costs:
    """What is weighed: the losses, bytes and bits of tied sites added up."""
    # Sizes come from the quantized leaves, because scales and zero points count too.
    of_trees = []
    for tree in trees:
        paths, coded, _ = named_leaves(tree, is_leaf=is_quantized)
        of_trees.append(dict(zip(paths, coded, strict=True)))
    nbytes, bits = {}, {}
    for path in losses:
        of_path = iter([tree[path] for tree in of_trees])
        stored = [
            leaves[path] if scheme is None else next(of_path)
            for scheme in schemes
        ]
        nbytes[path] = np.array(list(map(weight_bytes, stored)))
        each = [_bits(scheme, leaves[path]) for scheme in schemes]
        bits[path] = np.array(each) * leaves[path].size

    def added(of_site: Mapping[str, Any]) -> np.ndarray:
        return np.array([sum(of_site[path] for path in one) for one in tied])

    sizes = {path: leaves[path].size for path in losses}
    return Costs(added(losses), added(nbytes), added(bits), added(sizes))


def _bits(scheme: Scheme | None, leaf: Any) -> int:
    """Bits of one code."""
    if scheme is None:
        return 8 * leaf.dtype.itemsize
    return 4 if isinstance(scheme.weight, Int4) else 8


def _chosen(
    costs: Costs, bits: Budget | None, nbytes: Budget | None
) -> np.ndarray:
    """Which candidate each set of tied sites gets within a budget."""
    _check_budget(bits, nbytes)
    weights = int(costs.weights.sum())
    if nbytes is not None:
        paid, budget = costs.nbytes, float(nbytes)
        shown = f"{nbytes} bytes; the smallest candidates take "
        shown += f"{paid.min(1).sum()}"
    else:
        paid, budget = costs.bits, float(bits or 0) * weights
        shown = f"{bits} bits a weight; the smallest candidates take "
        shown += f"{paid.min(1).sum() / weights:.3g}"
    # Not "budget < ...": NaN is no budget either.
    if not paid.min(axis=1).sum() <= budget:
        raise ValueError(
            f"choose_precision: nothing fits into {shown}; give more, or smaller candidates"
        )
    return choose(paid, costs.loss, budget)


def _check_budget(bits: Budget | None, nbytes: Budget | None) -> None:
    """Raises ValueError unless there is exactly one budget."""
    if (bits is None) == (nbytes is None):
        raise ValueError(
            "choose_precision: expected one budget, bits=6 (a weight) or nbytes=..., got "
            f"bits={bits!r}, nbytes={nbytes!r}"
        )


def _rules(
    fixed: Mapping[str, Candidate],
    tied: Sequence[Sequence[str]],
    candidates: Sequence[Scheme | None],
    choice: np.ndarray,
) -> Iterator[tuple[str, Any]]:
    """(pattern, scheme): what was fixed comes first, because the first match is taken."""
    yield from fixed.items()
    for paths, place in zip(tied, choice.tolist(), strict=True):
        for path in paths:
            yield f"^{re.escape(path)}$", candidates[place]


def _total(of_candidates: np.ndarray, choice: np.ndarray) -> Any:
    """The sum over sets of tied sites, each at its choice."""
    return of_candidates[np.arange(len(choice)), choice].sum()
