"""`measure`: quantizes a language model with and without smoothing, and records what came of it."""

import datetime
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sqjax._arguments import expect
from sqjax._trees import named_leaves
from sqjax.calibration.calibrate import calibrate
from sqjax.calibration.stats import Stats, outlier_ratio
from sqjax.folding.apply import fold
from sqjax.methods.quantization import (
    Rules,
    quantize_sites,
    sample_for,
    site_schemes,
)
from sqjax.methods.site_errors import Comparison, SiteError
from sqjax.methods.smoothing import check_alpha, fold_stats, scales
from sqjax.models.decoding.generation import generate
from sqjax.models.evaluation.perplexity import perplexity
from sqjax.models.model import Model, Params, check_model
from sqjax.report.activations import BLOCKS, pooled, seen_at
from sqjax.report.inspection import site_facts
from sqjax.report.machine import current_commit, this_machine, versions
from sqjax.report.record import (
    Continuation,
    Record,
    SiteRow,
    State,
    Surface,
    Variant,
)
from sqjax.report.timing import interleaved
from sqjax.weights.quant_weight import is_quantized
from sqjax.weights.schemes import PRESETS, W8A8, Scheme
from sqjax.weights.sizes import weight_bytes

FLOAT, UNSMOOTHED, SMOOTHED = "float", "unsmoothed", "smoothed"


class _Model(NamedTuple):
    """A model that is measured, and what calibration knows of it.

    Attributes:
        model, params: it, in float.
        batches: what calibration read.
        stats: what it saw.
        schemes: {leaf: its scheme}.
    """

    model: Model
    params: Params
    batches: list[Any]
    stats: Stats
    schemes: Mapping[str, Scheme]

    def form(self, alpha: float | None) -> "_Form":
        """It smoothed with this alpha, or as it is; quantized."""
        s = {} if alpha is None else scales(self.params, self.stats, alpha)
        floats = fold(self.params, self.stats.graph, s)
        stats = fold_stats(self.stats, s)
        # A histogram of X says nothing about X / s, so it is taken anew.
        if any(scheme.needs_histogram for scheme in self.schemes.values()):
            stats = calibrate(
                self.model.apply, floats, self.batches, histogram=True
            )
        return _Form(floats, stats, quantize_sites(floats, stats, self.schemes))


class _Form(NamedTuple):
    """One form of the model: float parameters, their statistics, what `quantize` made of them."""

    floats: Params
    stats: Stats
    quantized: Any


def measure(
    model: Model,
    params: Params,
    batches: Iterable[Any],
    windows: Any,
    *,
    scheme: Rules = W8A8,
    alpha: float = 0.5,
    alphas: Sequence[float] = (),
    prompts: Sequence[str] = (),
    steps: int = 32,
    title: str = "A language model",
    recipe: Mapping[str, Any] | None = None,
    stats: Stats | None = None,
    repeats: int = 3,
    progress: bool = False,
) -> Record:
    """What a report shows: a model in float, quantized, and smoothed and quantized.

    Args:
        model: a `sqjax.models.Model`.
        params: its float parameters.
        batches: what calibration reads: arrays of ids, (batch, tokens).
        windows: ids of text that calibration has not seen, (windows, tokens). Perplexities are of
            all of it, errors and surfaces of its first window.
        scheme: as for `sqjax.quantize`: a scheme, a preset's name, or {pattern: scheme}.
        alpha: the smoothing strength.
        alphas: others whose perplexity is measured too.
        prompts: texts that every variant continues; they need a tokenizer.
        steps: by how many tokens.
        title: the model's name.
        recipe: the options that the report repeats; by default those given here.
        stats: what `sqjax.calibrate` found for these parameters, if it is known.
        repeats: how often reading a window is timed; 0 for not at all.
        progress: whether to show progress bars.

    Returns:
        The record, for `html`.

    Raises:
        ValueError: what `calibrate`, `scales`, `quantize` and `perplexity` refuse; prompts for a
            model without a tokenizer.

    Examples:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> from sqjax.report import measure
        >>> model = sq.models.Model(sq.models.llama_config(32, 8, 8, 1, 2, 1, 4))
        >>> params, ids = jax.jit(model.init)(jax.random.key(0)), jnp.arange(24)[None] % 32
        >>> record = measure(model, params, [ids], ids, scheme="W8A8", repeats=0)
        >>> [variant.name for variant in record.variants], len(record.sites)
        (['float', 'unsmoothed', 'smoothed'], 8)
    """
    start = time.perf_counter()
    _check(model, alpha, alphas, prompts)
    batches, windows = list(batches), jnp.asarray(windows)
    if stats is None:
        stats = calibrate(
            model.apply,
            params,
            batches,
            sample=sample_for(scheme),
            progress=progress,
        )
    schemes = site_schemes(stats.graph, scheme)
    # Both forms are made before anything is measured, because they refuse what does not fit.
    measured = _Model(model, params, batches, stats, schemes)
    plain, smooth = measured.form(None), measured.form(alpha)
    every = {
        FLOAT: params,
        UNSMOOTHED: plain.quantized,
        SMOOTHED: smooth.quantized,
    }
    read = partial(perplexity, model, progress=progress)
    # Errors and clipped shares on text that calibration has not seen, as a served model meets it.
    rows = _rows(measured, plain, smooth, windows[:1])
    given: dict[str, Any] = {
        "scheme": _rules_text(scheme),
        "alpha": alpha,
        "calibration": _shapes(batches),
        "evaluation": f"{windows.shape[0]} x {windows.shape[1]} tokens",
    }
    return Record(
        title=title,
        summary=_summary(model, params),
        scheme=_rules_text(scheme),
        alpha=float(alpha),
        text=given["evaluation"],
        variants=_variants(read, every, windows, repeats),
        sites=rows,
        alphas=_by_alpha(read, measured, alphas, windows),
        surfaces=_surfaces(model, plain, smooth, rows, windows[:1]),
        continuations=_continuations(model, every, prompts, steps),
        recipe=dict(given if recipe is None else recipe),
        versions=versions(),
        machine=str(this_machine()),
        commit=current_commit(),
        date=datetime.date.today().isoformat(),
        seconds=round(time.perf_counter() - start, 1),
    )


def _check(model: Any, alpha: Any, alphas: Sequence[Any], prompts: Any) -> None:
    """Raises ValueError for what can be known to be wrong before anything long begins."""
    check_model(model, "measure")
    for number in (alpha, *alphas):
        check_alpha("measure: alpha", number)
    is_list = isinstance(prompts, Sequence) and not isinstance(prompts, str)
    expect(is_list, "measure: prompts=", "a list of texts", prompts)
    if prompts and model.tokenizer is None:
        raise ValueError(
            "measure: prompts need a model with a tokenizer, and this one has none; leave them out"
        )


def _variants(
    read: Any, trees: Mapping[str, Any], windows: Any, repeats: int
) -> tuple[Variant, ...]:
    """The size, the perplexity and the speed of each tree."""
    values = {
        name: read(tree, windows, description=name)
        for name, tree in trees.items()
    }
    speeds = _speeds(read, trees, windows, repeats)
    return tuple(
        Variant(name, weight_bytes(tree), values[name], speeds.get(name))
        for name, tree in trees.items()
    )


def _speeds(
    read: Any, trees: Mapping[str, Any], windows: Any, repeats: int
) -> dict[str, float]:
    """{variant: tokens read in a second}, medians of runs that take turns."""
    if repeats < 1:
        return {}
    runs = {
        name: partial(read, tree, windows[:1], progress=False)
        for name, tree in trees.items()
    }
    shown = read.keywords["progress"]
    seconds = interleaved(runs, repeats, "reading", shown)
    # Of one window alone: a whole text would say the same, and take longer.
    return {name: windows.shape[1] / s for name, s in seconds.items()}


def _by_alpha(
    read: Any, measured: _Model, alphas: Sequence[float], windows: Any
) -> tuple[tuple[float, float], ...]:
    """(alpha, the perplexity smoothed with it)."""
    found = []
    for alpha in sorted(set(alphas)):
        tree = measured.form(alpha).quantized
        value = read(tree, windows, description=f"alpha {alpha:g}")
        found.append((float(alpha), value))
    return tuple(found)


# Sites --------------------------------------------------------------------------------------------


def _rows(
    measured: _Model, plain: _Form, smooth: _Form, window: Any
) -> tuple[SiteRow, ...]:
    """A row for every site."""
    paths, leaves, _ = named_leaves(measured.params)
    sizes = {p: int(leaf.nbytes) for p, leaf in zip(paths, leaves, strict=True)}
    _, coded, _ = named_leaves(smooth.quantized, is_leaf=is_quantized)
    narrow = dict(zip(paths, map(weight_bytes, coded), strict=True))
    # The two forms are of one kind, so that one program compares both.
    fn = measured.model.apply
    compare = Comparison.of(fn, plain.floats, plain.quantized, window)
    before = compare.errors(plain.floats, plain.quantized, window)
    after = compare.errors(smooth.floats, smooth.quantized, window)

    rows = []
    for site in site_facts(measured.stats, sizes):
        path = site.path
        ratio = outlier_ratio(smooth.stats.absmax[path])
        rows.append(
            SiteRow(
                path=path,
                scheme=scheme_text(measured.schemes.get(path)),
                unsmoothed=_state(before.get(path), site.outlier_ratio),
                smoothed=_state(after.get(path), ratio),
                bytes=site.bytes,
                quantized_bytes=narrow[path],
                absorbed_by=site.absorbed_by,
                refused=site.refused,
            )
        )
    return tuple(rows)


def _state(error: SiteError | None, ratio: float) -> State:
    if error is None:
        return State(None, 0.0, ratio)
    # JSON knows neither infinity nor NaN.
    snr = error.snr_db if math.isfinite(error.snr_db) else None
    return State(snr, error.clipped, ratio)


def scheme_text(scheme: Scheme | None) -> str:
    """A scheme in few words: the name of the preset that it is, or how it is written."""
    if scheme is None:
        return "float"
    # W8A8 and W8A8_O1 are one scheme: the shorter name comes first.
    names = [name for name, preset in PRESETS.items() if preset == scheme]
    return names[0] if names else repr(scheme)


def _rules_text(rules: Any) -> str:
    """Rules in one line."""
    if not isinstance(rules, Mapping):
        return rules if isinstance(rules, str) else scheme_text(rules)
    parts = [
        f"{pattern}: {rule if isinstance(rule, str) else scheme_text(rule)}"
        for pattern, rule in rules.items()
    ]
    return ", ".join(parts)


def _surfaces(
    model: Model,
    plain: _Form,
    smooth: _Form,
    rows: Sequence[SiteRow],
    window: Any,
) -> tuple[Surface, ...]:
    """The activation and the weight of the smoothed site with the largest outliers."""
    # Of a site that nothing absorbs the scale of, there is no "after".
    smoothed = [row for row in rows if row.absorbed_by]
    if not smoothed:
        return ()
    worst = max(smoothed, key=lambda row: row.unsmoothed.outlier_ratio).path
    before = seen_at(model.apply, plain.floats, window, worst)
    after = seen_at(model.apply, smooth.floats, window, worst)
    return tuple(
        Surface(
            what=what,
            path=worst,
            before=pooled(getattr(before, what), *BLOCKS),
            after=pooled(getattr(after, what), *BLOCKS),
            size=getattr(before, what).shape,
        )
        for what in ("activation", "weight")
    )


# Texts --------------------------------------------------------------------------------------------


def _continuations(
    model: Model, trees: Mapping[str, Any], prompts: Sequence[str], steps: int
) -> tuple[Continuation, ...]:
    """How each variant continues each prompt."""
    if not prompts:
        return ()
    texts: dict[str, Sequence[str]] = {}
    # All prompts at once, because each batch size is a program to compile.
    for name, tree in trees.items():
        made = generate(model, tree, list(prompts), steps).texts
        texts[name] = [] if made is None else made
    return tuple(
        Continuation(prompt, {name: of[i] for name, of in texts.items()})
        for i, prompt in enumerate(prompts)
    )


def _summary(model: Model, params: Params) -> str:
    """How large a model is: "134.5 million parameters, 30 layers of 576 channels"."""
    config = model.config
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
    numbers = f"{count / 1e6:.1f} million" if count >= 1e5 else str(count)
    return (
        f"{numbers} parameters, {config.num_layers} layers of {config.hidden_size} channels, "
        f"a vocabulary of {config.vocab_size}"
    )


def _shapes(batches: Sequence[Any]) -> str:
    """How much calibration read: "16 batches of (1, 512)"."""
    shapes = dict.fromkeys(str(np.shape(batch)) for batch in batches)
    return f"{len(batches)} batches of {', '.join(list(shapes)[:4])}"
