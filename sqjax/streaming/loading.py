"""`load_quantized`: a checkpoint that is smoothed and quantized while it is read."""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.typing import DTypeLike

from sqjax._trees import check_finite
from sqjax.calibration.analysis import Analyses
from sqjax.calibration.parts import part_of_stats, stats_without_numbers
from sqjax.calibration.stats import Stats
from sqjax.folding.apply import fold, leaves_by_path
from sqjax.folding.find_graph import graph_without_groups
from sqjax.folding.graph import Graph
from sqjax.folding.parts import held_together
from sqjax.methods.described import check_sizes, check_stats
from sqjax.methods.quantization import (
    STATIC_ADVICE,
    Rules,
    quantize_sites,
    site_schemes,
)
from sqjax.methods.smoothing import (
    Alpha,
    alphas_of_groups,
    fold_stats,
    scales_of_groups,
)
from sqjax.models import tokenizer
from sqjax.models.checkpoints.family import Family
from sqjax.models.checkpoints.huggingface import open_checkpoint
from sqjax.models.checkpoints.mapping import (
    Placement,
    leaf_shapes,
    on_the_default_device,
    read_leaves,
)
from sqjax.models.model import Model
from sqjax.streaming.sources import (
    abstract_tree,
    checkpoint_directory,
    float_leaf,
    layer_of_path,
    layer_prefix,
)
from sqjax.weights.quantize import named
from sqjax.weights.schemes import W8A8, Scheme

#: Leaves by their paths.
Leaves = dict[str, Any]


def load_quantized(
    directory: str | os.PathLike[str],
    scheme: Rules = W8A8,
    stats: Stats | None = None,
    alpha: Alpha | None = None,
    *,
    groups: str | Iterable[str] = "all",
    dtype: DTypeLike = jnp.float32,
    families: Sequence[Family] = (),
    placement: Placement = on_the_default_device,
) -> tuple[Model, Any]:
    """`sqjax.models.load`, `smooth` and `quantize` in one, for models that do not fit in float.

    Leaves are read in order, and quantized as soon as all leaves that share smoothing scales with
    them are there: memory holds the quantized model and one layer in float. What comes out is, bit
    for bit, what the three make one after the other. Files are read, not mapped, so that no page of
    theirs stays in memory.

    Args:
        directory: of a checkpoint, with ``config.json`` and safetensors.
        scheme: as for `quantize`.
        stats: of the model in float, from `calibrate_layers` or `calibrate`. None will do for
            schemes that take nothing from them (W8A8, W8A16, W4A16), without alpha.
        alpha: as for `scales`; None: the model is not smoothed.
        groups: as for `scales`.
        dtype: of the parameters before they are quantized: what stays float (embeddings, norms)
            keeps it, and the model computes in it.
        families: as for `sqjax.models.load`.
        placement: as for `sqjax.models.load`: where each float leaf is placed before it is
            quantized.

    Returns:
        The model and its quantized parameters, for ``quantized(model.apply)``.

    Raises:
        ValueError: what `load`, `scales` and `quantize` refuse; the scheme or alpha needs
            statistics, and there are none; the statistics are of another model.

    Examples:
        >>> import sqjax as sq
        >>> sq.load_quantized("no/such/directory")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: load_quantized: expected a directory with config.json and safetensors files...
    """
    path = checkpoint_directory(directory, "load_quantized")
    with open_checkpoint(path, families) as found:
        arguments = found.source, found.family, found.config
        shapes = leaf_shapes(*arguments, found.problems)
        # Before the long part, and while memory is free.
        found.check_redundant()
        model = Model(
            found.config,
            tokenizer.from_directory(path, found.config.vocab_size),
        )
        plan = _plan(
            model, abstract_tree(shapes, dtype), scheme, stats, alpha, groups
        )
        leaves = (
            (path, float_leaf(path, x, dtype, placement(path, x.shape)))
            for path, x in read_leaves(*arguments, dtype)
        )
        quantized = _quantized_as_read(plan, leaves)
    return model, unflatten_dict(quantized, sep="/")


class _Plan(NamedTuple):
    """What is to be done with each leaf, decided before any is read.

    Attributes:
        stats: the statistics; without numbers where there are none.
        schemes: {leaf: how it is quantized}.
        alphas: {fold group: its alpha}, of those that are smoothed.
    """

    stats: Stats
    schemes: Mapping[str, Scheme]
    alphas: Mapping[str, Any]


def _plan(
    model: Model,
    shapes: Any,
    scheme: Rules,
    stats: Stats | None,
    alpha: Alpha | None,
    groups: str | Iterable[str],
) -> _Plan:
    """The plan, checked as far as it can be before a leaf is read."""
    if stats is None:
        graph = _sites_graph(model, shapes)
        schemes = site_schemes(graph, scheme)
        _check_needs_no_statistics(schemes, alpha)
        return _Plan(stats_without_numbers(graph), schemes, {})
    check_stats(stats, "load_quantized: stats")
    leaves_by_path(shapes, stats.graph)  # raises if they are another model's
    schemes = site_schemes(stats.graph, scheme)
    alphas: Mapping[str, Any] = {}
    if alpha is not None:
        alphas = alphas_of_groups(alpha, stats.graph.select(groups))
    return _Plan(stats, schemes, alphas)


def _sites_graph(model: Model, shapes: Any) -> Graph:
    """The sites of a model, from its shapes: no leaf is read."""
    # Any batch will do: which leaves a matmul reads does not hang on its shape.
    tokens = min(8, model.config.max_length)
    ids = jax.ShapeDtypeStruct((2, tokens), jnp.int32)
    analyses = Analyses([model.apply], shapes, [(ids,)], {}, False)
    return graph_without_groups(analyses.together(0, (ids,), 0).survey)


def _check_needs_no_statistics(
    schemes: Mapping[str, Scheme], alpha: Alpha | None
) -> None:
    """Raises ValueError where statistics are needed."""
    advice = (
        "pass stats=sqjax.calibrate_layers(directory, batches), with token ids like those that "
        "the model will see"
    )
    if alpha is not None:
        raise ValueError(
            "load_quantized: alpha: smoothing scales are made of statistics, and there are none; "
            f"{advice}"
        )
    for path, scheme in schemes.items():
        if scheme.measured:
            raise ValueError(
                f"{path}: a static scheme, outliers and smoothing at run time need statistics, and "
                f"there are none; {advice}"
            )


def _quantized_as_read(
    plan: _Plan, leaves: Iterable[tuple[str, Any]]
) -> Leaves:
    """The leaves, each set of those that are folded together quantized once it is complete."""
    # {leaf: the leaves that it is folded together with, itself among them}.
    together: dict[str, tuple[str, ...]] = {}
    for paths in held_together(plan.stats.graph):
        together.update(dict.fromkeys(paths, paths))
    waiting: dict[tuple[str, ...], Leaves] = defaultdict(dict)
    done: Leaves = {}
    for path, leaf in leaves:
        paths = together[path]
        waiting[paths][path] = leaf
        del leaf  # else it would live until the next one is read
        if len(waiting[paths]) == len(paths):
            part = _quantized_part(plan, waiting.pop(paths))
            # Else many leaves would wait in float, because jax computes them in the background.
            done |= jax.block_until_ready(part)
    return done


def _quantized_part(plan: _Plan, leaves: Leaves) -> Leaves:
    """Leaves that are folded together, smoothed and quantized.

    They get the names that they have within their layer: so one compiled program serves all layers.
    """
    prefix = _common_prefix(leaves)
    stats = part_of_stats(plan.stats, leaves, prefix)
    short = {path.removeprefix(prefix): leaf for path, leaf in leaves.items()}
    schemes = {
        path: plan.schemes[prefix + path]
        for path in short
        if prefix + path in plan.schemes
    }
    alphas = {
        group.name: plan.alphas[prefix + group.name]
        for group in stats.graph.groups
        if prefix + group.name in plan.alphas
    }
    with named(prefix.rstrip("/") or "load_quantized"):
        _check_part(plan, short, stats, schemes)
        if alphas:
            s = scales_of_groups(short, stats, alphas)
            short = fold(short, stats.graph, s)
            stats = fold_stats(stats, s)
        quantized = quantize_sites(short, stats, schemes)
    return {prefix + path: leaf for path, leaf in quantized.items()}


def _common_prefix(paths: Iterable[str]) -> str:
    """What the paths of one layer begin with; "" for any others."""
    layers = set(map(layer_of_path, paths))
    number = layers.pop()
    return "" if layers or number is None else layer_prefix(number)


def _check_part(
    plan: _Plan, leaves: Leaves, stats: Stats, schemes: Mapping[str, Scheme]
) -> None:
    """Raises ValueError for numbers that are not finite, and for leaves of other parameters.

    `quantize` checks what sites depend on. That includes leaves in no group, which here are apart.
    """
    check_finite(leaves, "parameter")
    measured = any(scheme.measured for scheme in plan.schemes.values())
    if measured and not stats.graph.groups and not schemes:
        check_sizes(leaves, stats, leaves, STATIC_ADVICE)
