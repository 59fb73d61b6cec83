"""`recommend`: the few sensible recipes, each beside the float model; the smallest that holds.

A recipe is a scheme with the choice of scales and roundings that suits it. All are made from one
calibration, and all are judged on the same batches, which calibration did not see.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from sqjax._arguments import check_function, expect
from sqjax._names import first_matches
from sqjax._tables import aligned
from sqjax._trees import PyTree
from sqjax.calibration.calibrate import calibrate, check_batches
from sqjax.calibration.stats import Stats
from sqjax.choosing.by_search import quantize_by_search
from sqjax.choosing.judging import Judge, Loss, Tried
from sqjax.choosing.precision import choose_precision
from sqjax.folding.graph import Graph, paths_of
from sqjax.methods.quantization import Rules, quantize
from sqjax.methods.rotation import rotate
from sqjax.weights.schemes import (
    W4A4_ROTATED,
    W4A8,
    W4A16_G64,
    W8A8_O1,
    W8A8_O3,
    W8A8_O3_ROTATED,
    W8A16,
    Scheme,
)
from sqjax.weights.sizes import shown_bytes, weight_bytes

#: Tokens of a site that the search for alphas sees.
_SAMPLE = 512
#: Bits a weight of the recipe that mixes precisions.
_MIXED_BITS = 6.0

#: What is smaller by less than 1% is of the same size: static scales alone make such differences.
_SMALLER = 0.99


class Recommendation(NamedTuple):
    """What `recommend` found.

    Attributes:
        name: the recipe; None if none is within the budget.
        params: the quantized tree, for `quantized(fn)`; the float one if there is none.
        rules: what `quantize` was given; None if there is none.
        tried: every recipe, the smallest first.
        float_loss: the float model's loss.
        float_bytes: of its parameters.
        budget: what was asked for.
    """

    name: str | None
    params: PyTree
    rules: Rules | None
    tried: tuple[Tried, ...]
    float_loss: float
    float_bytes: int
    budget: float

    def __str__(self) -> str:
        """A table with a row for every recipe; the one that is recommended has a star."""
        rows = [("", "size", "loss", "more than float", "")]
        size = shown_bytes(self.float_bytes)
        rows.append(("", size, f"{self.float_loss:.4f}", "", "float"))
        for one in self.tried:
            star = "*" if one.name == self.name else ""
            more = f"{one.difference:+.4f} +- {one.interval:.4f}"
            size = shown_bytes(one.nbytes)
            rows.append((star, size, f"{one.loss:.4f}", more, one.name))
        lines = aligned(rows, left={4})
        found = "none" if self.name is None else self.name
        lines.append(f"within {self.budget:g}: {found}")
        return "\n".join(lines)


def recommend(
    fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    held_out: Iterable[Any] | None = None,
    budget: float = 0.01,
    loss: Loss | None = None,
    mask: Callable[..., Any] | None = None,
    logits: bool | None = None,
    floats: Sequence[str] | str = (),
    recipes: Sequence[str] | str | None = None,
    progress: bool = False,
) -> Recommendation:
    """Tries the sensible recipes, and returns the smallest that loses less than a budget.

    A recipe is within the budget if the upper end of the 95% interval of its loss, less the float
    model's on the same batches, is. Of two of one size the one that runs faster is taken.

    The recipes:

    - "w8a8 static": int8 weights and activations, alphas searched (`search_alpha`), scales from
      calibration: the fastest.
    - "w8a8 static rotated": the same of rotated activations (`rotate`), whose outliers are spread
      over all channels; it calibrates again. Left out where the program has no space to rotate.
    - "w8a8": as "w8a8 static" with a scale for each token.
    - "w8a16": int8 weights alone.
    - "mixed": int8 weights with int4 ones where they matter least, 6 bits a weight together
      (`choose_precision`). It takes the outputs as logits, so with a `loss` it is left out, unless
      `logits=True` says that they are.
    - "w4a16": int4 weights in groups of 64, by AWQ and GPTQ.
    - "w4a8": int4 weights in groups of 128 by smoothing, AWQ and GPTQ, int8 activations by token.

    And two that are tried where `recipes` names them, because no platform runs them faster than
    those of their size above. They need no space, because they rotate when the program runs (not
    what a convolution reads):

    - "w8a8 static rotated at run time": `W8A8_O3_ROTATED`.
    - "w4a4 rotated at run time": `W4A4_ROTATED`, int4 activations too.

    Args:
        fn: as for `calibrate`.
        params: as for `calibrate`.
        batches: an iterable, which is kept in a list; for the statistics.
        held_out: two batches or more to be judged on; None: the last quarter of `batches`, at
            least two, which calibration then does not see. The interval is narrow where many are
            judged: with two it is 12.7 standard errors to each side, with ten 2.3.
        budget: how much more loss is accepted. 0.01 nats are 1% of a perplexity.
        loss: loss(outputs, float_outputs, *batch) of a batch, a scalar; it is traced, as by
            `jax.jit`. None: the mean divergence KL(float || quantized) of the distributions that
            the last axis gives as logits; of outputs that are a tree the sum over its float
            arrays.
        mask: as for `calibrate`, and for calibration alone: the losses include padding, unless a
            `loss` of your own leaves it out.
        logits: whether the outputs are logits, for "mixed"; None: where there is no `loss`.
        floats: name patterns of sites that stay float: a head, a router. Or one pattern.
        recipes: the names of those to try, or one name; None: all but those of the last list.
        progress: whether to show a progress bar.

    Returns:
        `Recommendation`; print it for a table.

    Raises:
        ValueError: what `calibrate` refuses; no batch is left to calibrate on, or fewer than two to
            judge on; an unknown recipe, or "mixed" where the outputs are no logits; a budget that
            is no number of 0 or more; a rotated recipe is asked for where nothing may turn; a
            pattern of `floats` that is found in no site, or `floats` that leave nothing to
            quantize; a `loss` that does not take these arguments, or gives no finite scalar; no
            `loss`, and outputs without a float array or with one without axes.

    Examples:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: jnp.tanh((x * p["norm"]) @ p["up"]) @ p["down"]
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> params = {"norm": jnp.ones((1, 64)), "up": jax.random.normal(keys[0], (64, 64)) / 8,
        ...           "down": jax.random.normal(keys[1], (64, 64)) / 8}
        >>> batches = list(jax.random.normal(keys[2], (8, 32, 64)))
        >>> found = sq.recommend(fn, params, batches, budget=0.01, recipes=["w8a8", "w8a16"])
        >>> found.name, len(found.tried)
        ('w8a8', 2)
    """
    check_function(fn, "recommend", "(fn, params, batches)")
    if logits is None:
        logits = loss is None
    names = _checked(budget, recipes, logits)
    floats = _listed(floats)
    seen, judged = _split(batches, held_out)
    wanted: dict[str, Any] = {"gram": True, "sample": _SAMPLE}

    def calibrated(tree: PyTree) -> Stats:
        return calibrate(fn, tree, seen, mask=mask, progress=progress, **wanted)

    stats = calibrated(params)
    _check_floats(stats.graph, floats)
    if recipes is None and not stats.graph.spaces:
        names.remove(_ROTATED)
    problem = _Problem(fn, params, calibrated, stats, seen, floats)
    judge = Judge.of(fn, params, judged, loss)

    tried: list[Tried] = []
    best: tuple[Tried, PyTree] | None = None
    shown = tqdm(names, desc="recipes", disable=not progress)
    for name in shown:
        shown.set_postfix_str(name)
        rules, tree = RECIPES[name](problem)
        one = judge.tried(name, rules, tree)
        tried.append(one)
        within = one.difference + one.interval <= budget
        # Of one size the faster recipe, which comes first, stays.
        smaller = best is None or one.nbytes < _SMALLER * best[0].nbytes
        if within and smaller:
            best = one, tree
    tried.sort(key=lambda one: one.nbytes)
    beside = float(judge.losses.mean()), weight_bytes(params), float(budget)
    if best is None:
        return Recommendation(None, params, None, tuple(tried), *beside)
    chosen, tree = best
    return Recommendation(
        chosen.name, tree, chosen.rules, tuple(tried), *beside
    )


def _listed(names: Sequence[str] | str) -> tuple[str, ...]:
    """Several names or one: a str is one, and no sequence of letters."""
    return (names,) if isinstance(names, str) else tuple(names)


def _checked(
    budget: Any, recipes: Sequence[str] | str | None, logits: bool
) -> list[str]:
    """The names of the recipes, in the order of `RECIPES`."""
    is_number = isinstance(budget, Real) and float(budget) >= 0
    expect(is_number, "recommend: budget=", "a number of 0 or more", budget)
    if recipes is None:
        left_out = _BY_NAME if logits else (*_BY_NAME, _MIXED)
        return [name for name in RECIPES if name not in left_out]
    asked = _listed(recipes)
    _check_known(asked)
    if _MIXED in asked and not logits:
        raise ValueError(
            f"recommend: recipes=: {_MIXED!r} takes the outputs as logits, whatever loss= is; pass "
            "logits=True if they are, or leave it out"
        )
    return [name for name in RECIPES if name in asked]


def _check_known(asked: Sequence[str]) -> None:
    """Raises ValueError for names of no recipe, or none at all."""
    unknown = sorted({*asked} - {*RECIPES})
    if unknown or not asked:
        raise ValueError(
            f"recommend: recipes=: expected some of {list(RECIPES)}, got {unknown or 'none'}"
        )


def _split(
    batches: Iterable[Any], held_out: Iterable[Any] | None
) -> tuple[list[Any], list[Any]]:
    """The batches to calibrate on, and those to judge on."""
    check_batches(batches)
    seen = list(batches)
    if held_out is not None:
        check_batches(held_out)
        judged = list(held_out)
    else:
        # Two at least, because one says nothing of how the loss varies.
        count = max(len(seen) // 4, 2)
        seen, judged = seen[:-count], seen[-count:]
    if not seen or len(judged) < 2:
        raise ValueError(
            "recommend: expected batches to calibrate on and two others or more to judge on, got "
            f"{len(seen)} and {len(judged)}; pass at least 3 batches, or held_out= with two or more"
        )
    return seen, judged


def _check_floats(graph: Graph, floats: Sequence[str]) -> None:
    """Raises ValueError unless every pattern is found, and a site is left to quantize."""
    sites, tables = paths_of(graph.sites), paths_of(graph.tables)
    matched = first_matches(floats, [*sites, *tables], "recommend: floats=")
    if floats and None not in map(matched.get, sites):
        raise ValueError(
            "recommend: floats=: expected patterns that leave a matmul to quantize, got "
            f"{[*floats]}, found in all of {sites[:5]}; leave some out"
        )


# The recipes --------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """What every recipe starts from."""

    fn: Callable[..., Any]
    params: PyTree
    calibrated: Callable[[PyTree], Stats]
    stats: Stats
    batches: list[Any]
    floats: tuple[str, ...]

    def rotated(self) -> "_Problem":
        """The same function with rotated activations, whose statistics are others."""
        params = rotate(self.params, self.stats)
        return self._replace(params=params, stats=self.calibrated(params))

    def rules(self, scheme: Scheme) -> dict[str, Scheme | None]:
        """The scheme for all sites but those that stay float."""
        floats: dict[str, Scheme | None] = dict.fromkeys(self.floats)
        return floats | {".*": scheme}


def _rounded(scheme: Scheme, problem: _Problem) -> tuple[Rules, PyTree]:
    """No search, because int8 weights alone lose nearly nothing."""
    rules = problem.rules(scheme)
    return rules, quantize(problem.params, problem.stats, rules)


def _searched(scheme: Scheme, problem: _Problem) -> tuple[Rules, PyTree]:
    """The scheme, with the search that suits it."""
    rules = problem.rules(scheme)
    return rules, quantize_by_search(problem.params, problem.stats, rules)


def _rotated(scheme: Scheme, problem: _Problem) -> tuple[Rules, PyTree]:
    """The scheme, searched for after its activations are rotated."""
    return _searched(scheme, problem.rotated())


def _rotated_at_run_time(
    scheme: Scheme, problem: _Problem
) -> tuple[Rules, PyTree]:
    """The scheme, but for convolutions without its rotation, which is for matmuls."""
    rules = problem.rules(scheme)
    every = rules.pop(".*")
    for site in problem.stats.graph.sites:
        if site.kernel is not None:
            rules[f"^{re.escape(site.path)}$"] = scheme.replace(rotation=None)
    rules[".*"] = every
    return rules, quantize_by_search(problem.params, problem.stats, rules)


def _mixed(problem: _Problem) -> tuple[Rules, PyTree]:
    """int8 weights, and int4 ones where they matter least."""
    found = choose_precision(
        problem.fn,
        problem.params,
        problem.stats,
        problem.batches,
        [W4A16_G64, W8A16],
        bits=_MIXED_BITS,
        fixed=dict.fromkeys(problem.floats),
    )
    tree = quantize_by_search(problem.params, problem.stats, found.rules)
    return found.rules, tree


#: The recipe whose choice is made by gradients of logits, not by the judge's loss.
_MIXED = "mixed"
#: The recipe for programs that have a space.
_ROTATED = "w8a8 static rotated"
#: The recipes that are tried by name alone.
_BY_NAME = ("w8a8 static rotated at run time", "w4a4 rotated at run time")

#: The recipes by name: of two of one size the faster one first.
RECIPES: dict[str, Callable[[_Problem], tuple[Rules, PyTree]]] = {
    "w8a8 static": partial(_searched, W8A8_O3),
    _ROTATED: partial(_rotated, W8A8_O3),
    "w8a8": partial(_searched, W8A8_O1),
    _BY_NAME[0]: partial(_rotated_at_run_time, W8A8_O3_ROTATED),
    "w8a16": partial(_rounded, W8A16),
    _MIXED: _mixed,
    "w4a8": partial(_searched, W4A8),
    _BY_NAME[1]: partial(_rotated_at_run_time, W4A4_ROTATED),
    "w4a16": partial(_searched, W4A16_G64),
}
