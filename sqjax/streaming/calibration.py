"""`calibrate_layers`: statistics of a whole model, one layer of which is in memory at a time."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from tqdm.auto import tqdm

from sqjax._trees import check_finite
from sqjax.calibration.analysis import Analyses, Fn, Known, shapes_of
from sqjax.calibration.calibrate import (
    calibrated,
    check_batches,
    check_mask,
    checked_wanted,
    warn_of_unreached,
)
from sqjax.calibration.measure import Wanted
from sqjax.calibration.parts import joined_stats
from sqjax.calibration.stats import Stats
from sqjax.folding.graph import Graph
from sqjax.models.checkpoints.family import Family
from sqjax.models.config import DecoderConfig
from sqjax.models.decoder import embed, read_out, run_layer
from sqjax.models.model import Model, check_ids
from sqjax.streaming.sources import Parts, layer_prefix, opened_parts
from sqjax.weights.quantize import named

#: Arrays on the host: of token ids, of a mask, of what a layer gives.
Arrays = list[np.ndarray]


def calibrate_layers(
    source: Any,
    batches: Iterable[Any],
    *,
    mask: Callable[..., Any] | None = None,
    attention: bool = False,
    histogram: bool = False,
    gram: bool = False,
    sample: int = 0,
    seed: int = 0,
    dtype: DTypeLike = jnp.float32,
    families: Sequence[Family] = (),
    progress: bool = False,
) -> Stats:
    """`calibrate` of a decoder that does not fit in memory: one layer after the other.

    The batches are embedded. Then each layer is read, calibrated on what the layer before it gave
    for all batches, run on it, and dropped; last come the final norm and the head. Memory holds one
    layer in float (before and after the layers: the embedding, the head), what calibration makes of
    it (the proof folds a copy), and the activations of all batches, which stay on the host: tokens
    x hidden size x bytes of the dtype.

    What can be folded is searched for in the program of the whole model, which takes shapes and no
    numbers. Each layer's groups are then proved on that layer alone. A group that scales leaves of
    two layers is refused, because no layer alone can prove it; no family that is known here has
    one.

    Args:
        source: the directory of a checkpoint, as `sqjax.models.load` takes it; or (model, params)
            with layers apart.
        batches: an iterable of token ids, each (batch, tokens).
        mask: as for `calibrate`: mask(ids) is False for padding.
        attention: as for `calibrate`.
        histogram, gram, sample, seed: as for `calibrate`.
        dtype: of the parameters that are read from a directory, and so of the computation.
        families: as for `sqjax.models.load`.
        progress: whether to show a progress bar.

    Returns:
        `Stats` of the whole model, with its own paths: those of ``calibrate(model.apply, params,
        batches)``, up to the rounding of activations between two layers.

    Raises:
        ValueError: what `load` and `calibrate` refuse; the source is neither a directory nor
            (model, params); the layers are one stack.

    Examples:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> model = sq.models.Model(sq.models.llama_config(32, 8, 16, 3, 2, 1, 4))
        >>> params = model.init(jax.random.key(0))
        >>> stats = sq.calibrate_layers((model, params), [jnp.arange(12).reshape(2, 6)])
        >>> len(stats.graph.sites), len(stats.graph.groups)
        (22, 13)
    """
    ids = _token_ids(batches)
    keep = _masks(mask, ids)
    with opened_parts(source, dtype, families) as parts:
        graph = _whole_graph(parts, ids, attention)
        wanted = checked_wanted(histogram, gram, sample, seed)
        options = _Options(attention, wanted, keep is not None)
        found = _of_parts(parts, ids, keep, options, progress)
    stats = joined_stats(graph, found)
    warn_of_unreached(stats)
    return stats


class _Options(NamedTuple):
    """What is asked of calibration, the same for every part.

    Attributes:
        attention: as for `calibrate`.
        wanted: what to keep beside maxima and sums.
        masked: whether each batch's last argument says which tokens count.
    """

    attention: bool
    wanted: Wanted
    masked: bool


def _token_ids(batches: Iterable[Any]) -> Arrays:
    """The token ids of each batch, all kept, because embedding and head both need them.

    Raises:
        ValueError: there are no batches, or one holds something else.
    """
    check_batches(batches)
    ids = []
    for number, batch in enumerate(batches):
        alone = batch[0] if isinstance(batch, tuple) else batch
        with named(f"calibration batch {number}"):
            check_ids(alone)
        ids.append(np.asarray(alone))
    if not ids:
        raise ValueError(
            "calibrate_layers: batches is empty (an iterator that was used up?); at least one "
            "batch is needed"
        )
    return ids


def _masks(mask: Callable[..., Any] | None, ids: Arrays) -> Arrays | None:
    """Which tokens count, of each batch; None if all do."""
    check_mask(mask)
    return None if mask is None else [np.asarray(mask(x)) for x in ids]


def _whole_graph(parts: Parts, ids: Arrays, attention: bool) -> Graph:
    """What can be folded in the whole model, from shapes alone: nothing is proved yet."""
    model = Model(parts.config)
    # Batches of every shape must fit the model: the longest, above all.
    for batch in {x.shape: x for x in ids}.values():
        jax.eval_shape(model.apply, parts.shapes, batch)
    first = (ids[0],)
    analyses = Analyses([model.apply], parts.shapes, [first], {}, attention)
    return analyses.together(0, first, 0).graph


def _of_parts(
    parts: Parts,
    ids: Arrays,
    keep: Arrays | None,
    options: _Options,
    progress: bool,
) -> list[tuple[str, Stats]]:
    """(what its paths begin with, the statistics of a part) of each part of a model."""
    config = parts.config
    embedding = _Alike.of(partial(_embed, config))
    batches = _with_masks([(batch,) for batch in ids], keep)
    params = parts.embedding()
    found = []
    # A tied head reads the same leaf: then they are one program, and come together at the end.
    if not config.tie_embeddings:
        found.append(("", _stats(embedding, params, batches, options)))
    # On the host, because the activations of all batches may not fit on the device.
    x = [jax.device_get(embedding.forward(params, batch)) for batch in ids]
    del params  # before the first layer is read

    found += _of_layers(parts, x, keep, options, progress)

    run = _embed_and_read_out if config.tie_embeddings else _read_out
    batches = _with_masks(list(zip(x, ids, strict=True)), keep)
    head = _stats(
        _Alike.of(partial(run, config)), parts.head(), batches, options
    )
    return [*found, ("", head)]


def _of_layers(
    parts: Parts,
    x: Arrays,
    keep: Arrays | None,
    options: _Options,
    progress: bool,
) -> list[tuple[str, Stats]]:
    """The same of the layers. Each replaces x, what it reads of each batch, by what it gives."""
    config = parts.config
    alike: dict[Any, _Alike] = {}
    found = []
    # tqdm(layers) would hold a layer while the next one is read.
    bar = tqdm(
        desc="calibrating",
        unit="layer",
        total=config.num_layers,
        disable=not progress,
    )
    for number, params in parts.layers():
        prefix = layer_prefix(number)
        kind = config.kind(number), config.has_experts(number)
        key = kind, shapes_of((params,))
        # Layers that are alike run the programs that were found and compiled for the first.
        if key not in alike:
            alike[key] = _Alike.of(partial(_run_layer, config, number))
        with named(prefix.rstrip("/")):
            batches = _with_masks([(batch,) for batch in x], keep)
            seen = _stats(alike[key], params, batches, options)
        found.append((prefix, seen))
        # In place, one batch after the other: two sets of activations are never held.
        for i, batch in enumerate(x):
            x[i] = jax.device_get(alike[key].forward(params, batch))
        # The next layer is read before the loop's name for this one is used again.
        del params
        bar.update()
    bar.close()
    return found


def _with_masks(
    batches: list[tuple[Any, ...]], keep: Arrays | None
) -> list[tuple[Any, ...]]:
    """The arguments of each batch, with its mask as the last one if there are masks."""
    if keep is None:
        return batches
    return [(*args, mask) for args, mask in zip(batches, keep, strict=True)]


class _Alike(NamedTuple):
    """What serves all layers that are alike.

    Attributes:
        fn: fn(params, x, *mask), one of the layers as a function.
        forward: the same, jitted.
        known: what calibration found and compiled for it.
    """

    fn: Fn
    forward: Callable[..., Any]
    known: Known

    @classmethod
    def of(cls, fn: Fn) -> "_Alike":
        """Of a function for which nothing is compiled yet."""
        return cls(fn, jax.jit(fn), Known())


def _run_layer(
    config: DecoderConfig, number: int, params: Any, x: Any, *_: Any
) -> Any:
    """One layer; `_` is the mask, which calibration alone reads."""
    return run_layer(config, number, params, x)


def _embed(config: DecoderConfig, params: Any, ids: Any, *_: Any) -> Any:
    return embed(config, params, ids)


def _read_out(config: DecoderConfig, params: Any, x: Any, *_: Any) -> Any:
    return read_out(config, params, x)


def _embed_and_read_out(
    config: DecoderConfig, params: Any, x: Any, ids: Any, *_: Any
) -> Any:
    """The embedding and the head, which read the same leaf."""
    return embed(config, params, ids), read_out(config, params, x)


def _stats(
    alike: _Alike,
    params: Any,
    batches: list[tuple[Any, ...]],
    options: _Options,
) -> Stats:
    """What `calibrate` finds of a part, without its warnings."""
    check_finite(params, "parameter")
    analyses = Analyses(
        [alike.fn], params, batches[:1], {}, options.attention, alike.known
    )
    mask = _last if options.masked else None
    return calibrated(analyses, [batches], mask, options.wanted)


def _last(*args: Any) -> Any:
    """The mask function of batches that carry their mask."""
    return args[-1]
