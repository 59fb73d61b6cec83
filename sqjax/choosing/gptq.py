"""`gptq`: what `quantize` makes, with codes whose errors make up for one another.

The scales are those of `quantize`; only the codes change, by the Gram matrices of `calibrate`.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from sqjax._arguments import expect
from sqjax._trees import PyTree, is_concrete, named_leaves
from sqjax.calibration.stats import Stats
from sqjax.folding.apply import leaves_by_path
from sqjax.methods.described import check_leaves, check_stats
from sqjax.methods.quantization import (
    Clips,
    Rules,
    quantize_sites,
    site_schemes,
)
from sqjax.numerics.formats import HIGHEST, LOWEST
from sqjax.numerics.gptq import Grid, gptq_rounded
from sqjax.numerics.hadamard import rotated, rotated_gram
from sqjax.weights.qtensor import QTensor
from sqjax.weights.quant_weight import QuantWeight, is_quantized
from sqjax.weights.schemes import W4A16_G64

_ADVICE = (
    "codes made for the tokens of other parameters would be wrong. Pass fold_stats(stats, s) with "
    "params that s was folded into, or calibrate again"
)


class Options(NamedTuple):
    """How GPTQ rounds: what `gptq` says of its arguments of these names."""

    damping: float | Array
    act_order: bool

    def check(self, what: str) -> None:
        """Raises ValueError for options that GPTQ does not take; `what` is the function."""
        damping: Any = self.damping
        is_share = not is_concrete(damping) or (
            isinstance(damping, float | int | Array)
            and bool(0 <= damping < math.inf)
        )
        meaning = "a share of 0 or more"
        expect(is_share, f"{what}: damping=", meaning, damping)
        is_bool = isinstance(self.act_order, bool)
        name = f"{what}: act_order="
        expect(is_bool, name, "True or False", self.act_order)


def gptq(
    params: PyTree,
    stats: Stats,
    scheme: Rules = W4A16_G64,
    *,
    clips: Clips | None = None,
    damping: float | Array = 0.01,
    act_order: bool = True,
) -> PyTree:
    """`quantize`, with each weight rounded so that it makes up for the errors of those before it.

    What is made small is the error of every site's outputs over the calibrated tokens, trace(E G
    E^T) with E the weights' error and G = X^T X, and not E itself. Scales, zero points and static
    ranges are those of `quantize`, and so are the sites that have no Gram matrix: convolutions and
    embeddings that are looked up, heads among them.

    Args:
        params: the calibrated or the smoothed tree.
        stats: their statistics, from `calibrate(..., gram=True)`: after `fold`, pass
            `fold_stats(stats, s)`.
        scheme: as for `quantize`: one for all sites, or rules.
        clips: as for `quantize`.
        damping: the share of the mean of G's diagonal that is added to the diagonal first, because
            directions that calibration hardly saw are not to be relied on.
        act_order: whether the channels of large activations come first, when most others are left
            to make up for their errors. Groups stay those of the weight's own order.

    Returns:
        A tree as that of `quantize`, of the same shapes and types. No output's error over the
        calibrated tokens is larger than with `quantize`.

    Raises:
        ValueError: what `quantize` refuses; there are no Gram matrices; the statistics are of other
            params; damping is negative. Values can not be checked under jit.

    Frantar et al. 2022 (arXiv 2210.17323). Where smoothing, a rotation or outliers change what the
    weight meets, G is changed likewise.

    Examples:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: x @ p["w"]
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> x = jax.random.normal(keys[0], (64, 4)) @ jax.random.normal(keys[1], (4, 16))
        >>> params = {"w": jax.random.normal(keys[2], (16, 8))}
        >>> stats = sq.calibrate(fn, params, [x], gram=True)
        >>> def error(make):
        ...     qparams = make(params, stats, sq.W4A16_G64)
        ...     return float(jnp.linalg.norm(sq.quantized(fn)(qparams, x) - fn(params, x)))
        >>> error(sq.gptq) < error(sq.quantize) / 2
        True
    """
    check_stats(stats, "gptq", ranges=False)
    how = Options(damping, act_order)
    how.check("gptq")
    schemes = site_schemes(stats.graph, scheme)
    _check_has_gram(stats, schemes)
    qparams = quantize_sites(params, stats, schemes, clips=clips)
    compensating = [
        site
        for site in stats.graph.sites
        if site.path in schemes and site.path in stats.gram
    ]
    check_leaves(params, stats, compensating, _ADVICE)
    return compensated(params, qparams, stats, how)


def compensated(
    params: PyTree,
    qparams: PyTree,
    stats: Stats,
    how: Options,
) -> PyTree:
    """What `quantize` made of params, with the codes of GPTQ at the sites with Gram matrices."""
    leaves = leaves_by_path(params, stats.graph)
    batch_of = {site.path: len(site.batch) for site in stats.graph.sites}

    def changed(path: str, weight: Any) -> Any:
        if path not in stats.gram or not isinstance(weight, QuantWeight):
            return weight
        return _compensated(
            leaves[path],
            weight,
            stats.gram[path],
            how.damping,
            batch=batch_of[path],
            act_order=how.act_order,
        )

    paths, weights, treedef = named_leaves(qparams, is_leaf=is_quantized)
    return jax.tree.unflatten(treedef, map(changed, paths, weights))


def _check_has_gram(stats: Stats, schemes: Any) -> None:
    """Raises ValueError if matmuls are to be quantized, and there are no Gram matrices."""
    if stats.gram:
        return
    for site in stats.graph.sites:
        if site.kernel is None and site.path in schemes:
            raise ValueError(
                f"gptq: {site.path}: expected statistics with Gram matrices, got some without; "
                "call calibrate(..., gram=True)"
            )


@partial(jax.jit, static_argnames=("batch", "act_order"))
def _compensated(
    leaf: ArrayLike,
    weight: QuantWeight,
    gram: Array,
    damping: float | Array,
    *,
    batch: int,
    act_order: bool,
) -> QuantWeight:
    """A quantized weight with other codes, compiled once for all leaves of one shape and scheme.

    Args:
        leaf: the float weight.
        weight: what `quantize` made of it.
        gram: (*batch, F, F).
        batch: how many batch axes there are.
    """
    matrices = _Matrices.of(weight, batch)
    float_weight = matrices.flat(weight.tensor.stored(jnp.asarray(leaf)))
    float_weight, gram = _as_quantized(
        float_weight.astype(jnp.float32), gram.astype(jnp.float32), weight
    )
    numbers = gptq_rounded(
        float_weight,
        gram,
        matrices.numbers,
        matrices.grid,
        matrices.group,
        damping,
        act_order=act_order,
        fmt=weight.tensor.fmt,
    )
    return replace(weight, tensor=matrices.tensor_of(numbers))


def _as_quantized(
    float_weight: Array, gram: Array, weight: QuantWeight
) -> tuple[Array, Array]:
    """The weight and the Gram matrix as the product of a quantized weight has them.

    It multiplies (X / s) Q with codes that stand for Q s W, and has zeros for the outliers in both.
    """
    if weight.smoothing is not None:
        s = weight.smoothing.reshape(gram.shape[:-1]).astype(jnp.float32)
        float_weight = float_weight * s[..., None, :]
        gram = gram / (s[..., :, None] * s[..., None, :])
    if weight.rotation is not None:
        float_weight = rotated(float_weight, weight.rotation)
        gram = rotated_gram(gram, weight.rotation)
    if weight.outliers is not None:
        features = gram.shape[-1]
        is_outlier = jax.nn.one_hot(weight.outliers.channels, features)
        kept = 1 - jnp.max(is_outlier, axis=-2)
        float_weight = float_weight * kept[..., None, :]
        gram = gram * (kept[..., :, None] * kept[..., None, :])
    return float_weight, gram


class _Matrices(NamedTuple):
    """A `QTensor` as a stack of plain matrices, (*batch, outputs, F).

    A `tensor` with the values (layers 2, heads 3, outputs 4, rows 5, columns 6), of which the last
    two axes are contracted, is 2 matrices (12, 30).

    Attributes:
        tensor: the tensor.
        batch: the sizes of its batch axes.
        numbers: codes - zero.
        grid: what they may be, (*batch, outputs, groups).
        group: (F,), the group of each column.
    """

    tensor: QTensor
    batch: tuple[int, ...]
    numbers: Array
    grid: Grid
    group: Array

    @classmethod
    def of(cls, weight: QuantWeight, batch: int) -> "_Matrices":
        """The matrices of a weight whose first `batch` stored axes are batch axes."""
        tensor = weight.tensor
        shape = tensor.values.shape
        first = len(shape) - weight.contracted  # of the contracted axes
        scales = tensor.scale, tensor.zero, tensor.group_scale
        sizes = np.broadcast_shapes(*(x.shape for x in scales if x is not None))
        groups = (*shape[:first], *sizes[first:])

        def of_groups(x: Any) -> Array:
            x = jnp.broadcast_to(x, groups).astype(jnp.float32)
            return x.reshape(*shape[:batch], -1, math.prod(groups[first:]))

        step = of_groups(tensor.scale)
        zero = of_groups(0 if tensor.zero is None else tensor.zero)
        lowest, highest = _codes(tensor)
        low, high = lowest - zero, highest - zero
        if tensor.group_scale is not None:
            inner = of_groups(tensor.group_scale)
            # The second level expands to int8, which holds no more than 127.
            most = jnp.floor(127 / inner)
            low, high = jnp.maximum(low, -most), jnp.minimum(high, most)
            step = step * inner
        places = jnp.arange(math.prod(sizes[first:])).reshape(sizes[first:])
        group = jnp.broadcast_to(tensor.spread(places), shape[first:])
        codes = tensor.values.astype(jnp.float32)
        if tensor.zero is not None:
            codes = codes - tensor.spread(tensor.zero).astype(jnp.float32)
        flat = (*shape[:batch], -1, math.prod(shape[first:]))
        return cls(
            tensor,
            shape[:batch],
            codes.reshape(flat),
            Grid(step, low, high),
            group.reshape(-1),
        )

    def flat(self, stored: Array) -> Array:
        """An array like the tensor's values as matrices."""
        return stored.reshape(self.numbers.shape)

    def tensor_of(self, numbers: Array) -> QTensor:
        """The tensor with these numbers as its codes."""
        tensor = self.tensor
        codes = numbers.reshape(tensor.values.shape)
        if tensor.zero is not None:
            codes = codes + tensor.spread(tensor.zero).astype(jnp.float32)
        return replace(tensor, values=codes.astype(tensor.values.dtype))


def _codes(tensor: QTensor) -> tuple[float, float]:
    """The lowest and the highest code."""
    if tensor.zero is not None:
        return LOWEST, HIGHEST
    return -tensor.fmt.bound, tensor.fmt.bound
