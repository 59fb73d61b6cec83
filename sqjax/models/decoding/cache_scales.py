"""`cache_scales`: one static scale for the keys, and one for the values, of each layer's cache."""

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from sqjax._arguments import check_mapping
from sqjax.models.fields import one_of
from sqjax.models.model import (
    Model,
    Params,
    TokenIds,
    cache_for,
    check_ids,
    check_model,
    compute_dtype,
)
from sqjax.models.slots import CacheFormat
from sqjax.numerics.formats import E4M3, INT8, absmax, scale_from_absmax
from sqjax.runtime.quantized import quantized

CacheCodes = Literal["int8", "fp8"]
_FORMATS = {"int8": INT8, "fp8": E4M3}


class CacheScales(NamedTuple):
    """The static scales of a quantized cache: a key is its codes times the scale of its layer.

    Attributes:
        fmt: "int8" or "fp8" (e4m3).
        keys: of each layer's keys, as they are after the rotary embedding.
        values: of each layer's values.
    """

    fmt: CacheCodes
    keys: Float32[np.ndarray, " layers"]
    values: Float32[np.ndarray, " layers"]


def cache_scales(
    model: Model,
    params: Params,
    batches: Iterable[Any],
    fmt: CacheCodes = "int8",
) -> CacheScales:
    """Measures max|K| and max|V| of each layer, and divides them by the format's largest code.

    Servers whose caches have one scale for a whole layer read these from a checkpoint:
    `save_compressed_tensors(..., cache_scales=)` writes them. The caches here need none, because
    they have a scale for each token (`CacheFormat`).

    Args:
        model: a `Model`.
        params: its parameters, float or quantized in any scheme.
        batches: token ids, (batch, tokens) each, without padding, as for `sqjax.calibrate`.
        fmt: "int8" (127) or "fp8" (e4m3: 448).

    Raises:
        ValueError: no batches, what are no ids, more tokens than ``config.max_length``, an unknown
            format, or keys and values that are NaN or infinite.

    Examples:
        >>> import jax, sqjax as sq
        >>> model = sq.models.Model(sq.models.llama_config(32, 8, 16, 1, 2, 1, 4))
        >>> params = model.init(jax.random.key(0))
        >>> scales = sq.models.cache_scales(model, params, [jax.numpy.array([[1, 2, 3]])])
        >>> scales.keys.shape, bool((scales.values > 0).all())
        ((1,), True)
    """
    check_model(model, "cache_scales")
    check_mapping(params, "cache_scales", "the parameters of a model")
    known = one_of(*_FORMATS)
    if not known.holds(fmt):
        raise ValueError(
            f"cache_scales: fmt: expected {known.expected}, got {fmt!r}"
        )
    largest = np.zeros((2, model.config.num_layers), np.float32)
    count = 0
    for batch in batches:
        # `calibrate` takes its inputs one by one, as tuples.
        ids = batch[0] if isinstance(batch, tuple) else batch
        check_ids(ids)
        largest = np.maximum(largest, _largest(model, params, ids))
        count += 1
    if count == 0:
        raise ValueError("cache_scales: expected at least one batch, got none")
    if not np.isfinite(largest).all():
        raise ValueError(
            "cache_scales: expected finite keys and values, got NaN or infinity; check the "
            "parameters"
        )
    keys, values = np.asarray(
        scale_from_absmax(jnp.asarray(largest), _FORMATS[fmt])
    )
    return CacheScales(fmt, keys, values)


@partial(jax.jit, static_argnames="model")
def _largest(
    model: Model, params: Params, ids: TokenIds
) -> Float[Array, "2 layers"]:
    """max|K| and max|V| of each layer, as a float cache holds them after these tokens."""
    batch, tokens = ids.shape
    # Of floats, because these are the keys and values themselves.
    dtype = compute_dtype(params)
    empty = cache_for(model.config, batch, tokens, dtype, CacheFormat(), None)
    _, cache = quantized(model.decode)(params, ids, empty)

    def of_all(slots: Any) -> Array:
        return absmax(slots.codes, None).reshape(())

    keys, values = (map(of_all, part) for part in (cache.keys, cache.values))
    return jnp.stack([jnp.stack(list(keys)), jnp.stack(list(values))])
