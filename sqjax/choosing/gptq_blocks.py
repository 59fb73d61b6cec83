"""`gptq_blocks`: GPTQ from layer to layer, each making up for what the layers before have lost."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tqdm.auto import tqdm

from sqjax._arguments import check_function, expect
from sqjax._shapes import other_axes
from sqjax._trees import PyTree, map_named, named_leaves
from sqjax.calibration.analysis import Analyses, Analysis
from sqjax.calibration.calibrate import calibrate, check_batches
from sqjax.calibration.observe import experts_of
from sqjax.choosing.clips import search_clips
from sqjax.choosing.gptq import Options, compensated
from sqjax.folding.sites import Place
from sqjax.methods.quantization import Rules, quantize_sites, site_schemes
from sqjax.numerics.gptq import corrected_weight
from sqjax.numerics.output_error import EXACT
from sqjax.program.equations import Var
from sqjax.program.evaluate import evaluate
from sqjax.weights.quant_weight import QuantWeight, is_quantized
from sqjax.weights.schemes import W4A16_G64, Scheme


def gptq_blocks(
    block: Callable[..., Any],
    layers: Sequence[PyTree],
    batches: Iterable[Any],
    scheme: Rules = W4A16_G64,
    *,
    correct: bool = True,
    clip: bool = True,
    damping: float = 0.01,
    act_order: bool = True,
    progress: bool = False,
) -> list[PyTree]:
    """`gptq` of one layer after the other, each calibrated on what the quantized ones before give.

    Two streams of activations run through the layers: X of the float layers, and Y of those that
    are quantized so far. Within a layer too, matmuls that read one activation come after those that
    it depends on. The Gram matrix is that of Y; and the weight that is rounded is not W, but the
    one whose Y V^T is nearest to X W^T. So a layer makes up for errors of the layers before it,
    where `gptq` of the whole model makes each matmul as if there were no others.

    Args:
        block: block(params of a layer, x) gives the next layer's x; the same for all layers.
        layers: their parameters, float trees of equal shapes, folded or not. Layers in one stack
            are to be taken apart first.
        batches: arrays, what the first layer reads. They are kept, in both streams.
        scheme: as for `quantize`, with the paths of one layer. Activations may stay float or have
            scales of their own at run time.
        correct: whether weights are corrected for Y; if not, Y changes the Gram matrix alone.
        clip: whether the ranges of weights are searched too, as `awq` does.
        damping, act_order: as for `gptq`.
        progress: whether to show a progress bar.

    Returns:
        The quantized layers. What is rounded to is no longer a float layer's own weight, so
        `site_errors` says little of them: compare outputs.

    Raises:
        ValueError: what `calibrate` and `quantize` refuse; a scheme needs statistics (static
            scales, smoothing or outliers); a site is within a loop of the block, or has batch axes,
            or is multiplied with several activations; a rule is for a convolution's kernel or an
            embedding table; layers is no list of trees of equal shapes, or is empty; a batch is no
            array; an activation of any layer holds NaN or infinity.

    Li et al. 2025 (GPTAQ, arXiv 2504.02692).

    Examples:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> block = lambda params, x: x + jnp.tanh(x @ params["w"])
        >>> layers = [{"w": w} for w in jax.random.normal(jax.random.key(0), (3, 16, 16)) / 4]
        >>> x = jax.random.normal(jax.random.key(1), (64, 16))
        >>> qlayers = sq.gptq_blocks(block, layers, [x])
        >>> [layer["w"].tensor.fmt.name for layer in qlayers]
        ['int4', 'int4', 'int4']
    """
    check_function(block, "gptq_blocks", "(block, layers, batches)")
    how = Options(damping, act_order)
    how.check("gptq_blocks")
    _check_layers(layers)
    exact = _arrays(batches)
    stats = calibrate(block, layers[0], exact[:1], gram=True)
    schemes = site_schemes(stats.graph, scheme)
    _check_schemes(schemes)
    streams = _Streams.of(block, layers[0], exact, schemes)
    done = []
    shown = tqdm(layers, "quantizing", unit="layer", disable=not progress)
    for number, layer in enumerate(shown):
        # `coded` is handed to the user, `narrow` is the same in float, to be run here.
        coded = narrow = layer
        for stage in streams.stages:
            grams = streams.grams(stage, layer, narrow)
            _check_finite(grams, number)
            target = layer
            if correct:
                target = _corrected(layer, stage, grams, damping)
            own = {path: schemes[path] for path in grams}
            seen = replace(stats, gram={p: g.gram for p, g in grams.items()})
            clips = search_clips(target, seen, own) if clip else None
            made = quantize_sites(target, seen, own, clips=clips)
            made = compensated(target, made, seen, how)
            coded = _with_leaves(coded, made, own)
            narrow = _with_leaves(narrow, made, own, as_float=True)
        # Only now, because both streams must have the whole layer behind them.
        streams = streams.after(layer, narrow)
        done.append(coded)
    return done


def _check_layers(layers: Any) -> None:
    """Raises ValueError for what is no list of trees of equal shapes."""
    expected = "a list of parameter trees, one for each layer"
    fits = isinstance(layers, Sequence) and not isinstance(layers, str)
    expect(fits, "gptq_blocks: layers", expected, layers)
    if not layers:
        raise ValueError(f"gptq_blocks: layers: expected {expected}, got none")
    kind = _kind(layers[0])
    for number, layer in enumerate(layers):
        if _kind(layer) != kind:
            raise ValueError(
                f"gptq_blocks: layers[{number}]: expected leaves of the paths, shapes and dtypes "
                "of layers[0], got others; layers of another kind are to be quantized in a call of "
                "their own"
            )


def _kind(layer: PyTree) -> Any:
    """What all layers must have in common."""
    paths, leaves, treedef = named_leaves(layer)
    kinds = [(np.shape(x), getattr(x, "dtype", type(x))) for x in leaves]
    return treedef, paths, kinds


def _arrays(batches: Iterable[Any]) -> list[Array]:
    """The batches, each of which is the one array that a layer reads."""
    check_batches(batches)
    exact = []
    for number, x in enumerate(batches):
        expected = "one array, what the first layer reads"
        expect(hasattr(x, "shape"), f"gptq_blocks: batch {number}", expected, x)
        exact.append(jnp.asarray(x))
    return exact


def _check_finite(grams: Mapping[str, "_Pair"], number: int) -> None:
    """Raises ValueError where a batch was not finite, or what the layers have made of it."""
    for path, pair in grams.items():
        if not all(bool(jnp.isfinite(x).all()) for x in pair):
            raise ValueError(
                f"gptq_blocks: layers[{number}], {path}: expected finite activations, got NaN or "
                "infinity; a batch holds these, or its numbers overflow: mend or drop it"
            )


def _check_schemes(schemes: Mapping[str, Scheme]) -> None:
    """Raises ValueError for what needs statistics, which are made layer by layer here."""
    for path, scheme in schemes.items():
        if scheme.measured:
            raise ValueError(
                f"gptq_blocks: {path}: expected a scheme without static scales, smoothing or "
                f"outliers, got {scheme}; take PerToken(), or gptq for the whole model"
            )


class _Pair(NamedTuple):
    """Y^T Y and Y^T X of one activation, of the quantized model and of both."""

    gram: Array
    cross: Array


class _Streams(NamedTuple):
    """What the layers have given so far, float and quantized.

    Attributes:
        stages: the places of each activation, in the order in which the program makes these.
        forward: the block, compiled.
        pairs: for each stage a compiled function of both trees' leaves and both inputs.
        exact: the float layers' outputs for each batch.
        narrow: those of the quantized layers.
    """

    stages: tuple[tuple[Place, ...], ...]
    forward: Callable[..., Any]
    pairs: Mapping[Var, Callable[..., _Pair]]
    exact: list[Array]
    narrow: list[Array]

    @classmethod
    def of(
        cls,
        block: Callable[..., Any],
        layer: PyTree,
        batches: list[Array],
        schemes: Mapping[str, Scheme],
    ) -> "_Streams":
        """The streams before the first layer."""
        first = (batches[0],)
        analyses = Analyses([block], layer, [first], {}, False)
        analysis = analyses.together(0, first, 0)
        # q, k and v are one stage, because they read one activation.
        by_activation: dict[Var, list[Place]] = {}
        for place in analysis.places:
            if place.site.path in schemes and place.site.kernel is None:
                _check_place(analysis, place)
                by_activation.setdefault(place.activation, []).append(place)
        stages = tuple(map(tuple, by_activation.values()))
        _check_stages(stages, schemes)
        pairs = {
            stage[0].activation: jax.jit(partial(_pair, analysis, stage[0]))
            for stage in stages
        }
        return cls(stages, jax.jit(block), pairs, batches, batches)

    def grams(
        self, stage: Sequence[Place], layer: PyTree, narrow: PyTree
    ) -> dict[str, _Pair]:
        """{site: the Gram matrices of its activation}."""
        pair = self.pairs[stage[0].activation]
        trees = jax.tree.leaves(layer), jax.tree.leaves(narrow)
        # Batch by batch, because the activations of all batches may not fit.
        total: Any = None
        for x, y in zip(self.exact, self.narrow, strict=True):
            new = pair(*trees, x, y)
            total = new if total is None else jax.tree.map(jnp.add, total, new)
        return {place.site.path: total for place in stage}

    def after(self, layer: PyTree, narrow: PyTree) -> "_Streams":
        """The streams after a layer, of which `narrow` is the quantized one in float."""
        return self._replace(
            exact=[self.forward(layer, x) for x in self.exact],
            narrow=[self.forward(narrow, y) for y in self.narrow],
        )


def _check_stages(
    stages: Sequence[Sequence[Place]], schemes: Mapping[str, Scheme]
) -> None:
    """Raises ValueError for a leaf that is to be quantized and is not in one stage alone."""
    stages_of = Counter(
        path for stage in stages for path in {p.site.path for p in stage}
    )
    for path in schemes:
        if stages_of[path] != 1:
            came = (
                "one that is multiplied with several activations"
                if stages_of[path]
                else "a convolution's kernel, or an embedding table"
            )
            raise ValueError(
                f"gptq_blocks: {path}: expected a weight that a block multiplies with one "
                f"activation, got {came}; leave it float here, with None, or take gptq for the "
                "whole model"
            )


def _check_place(analysis: Analysis, place: Place) -> None:
    """Raises ValueError for a matmul of which there is not one Gram matrix."""
    in_loop = analysis.program.scopes[place.activation] != ()
    several = place.site.batch or experts_of(analysis.program, place)
    if in_loop or several:
        raise ValueError(
            f"gptq_blocks: {place.site.path}: expected one matrix outside of loops, got "
            f"{'one in a loop' if in_loop else 'a stack'}; leave it float here, with None, or take "
            "gptq for the whole model"
        )


def _pair(
    analysis: Analysis,
    place: Place,
    exact_leaves: list[Array],
    narrow_leaves: list[Array],
    x: Array,
    y: Array,
) -> _Pair:
    """The Gram matrices of an activation, from the inputs of a layer in both streams."""

    def activation(leaves: list[Array], inputs: Array) -> Array:
        probes = {place.activation: jnp.asarray}
        _, seen = evaluate(analysis.program, leaves, [inputs], probes)
        count = len(place.axes)
        moved = jnp.moveaxis(
            seen[place.activation], place.axes, range(-count, 0)
        )
        features = math.prod(moved.shape[-count:])
        return moved.reshape(-1, features).astype(jnp.float32)

    of_exact = activation(exact_leaves, x)
    of_narrow = activation(narrow_leaves, y)
    return _Pair(
        jnp.matmul(of_narrow.T, of_narrow, precision=EXACT),
        jnp.matmul(of_narrow.T, of_exact, precision=EXACT),
    )


# Layers with some leaves changed ------------------------------------------------------------------


def _corrected(
    layer: PyTree,
    stage: Sequence[Place],
    grams: Mapping[str, _Pair],
    damping: float,
) -> PyTree:
    """The layer with the weights of a stage corrected for the activations of the narrow stream."""
    axes_of = {place.site.path: place.site.axes for place in stage}

    def changed(path: str, leaf: Any) -> Any:
        if path not in axes_of:
            return leaf
        return _corrected_leaf(leaf, grams[path], damping, axes=axes_of[path])

    return map_named(changed, layer)


@partial(jax.jit, static_argnames="axes")
def _corrected_leaf(
    leaf: Array, pair: _Pair, damping: float, *, axes: tuple[int, ...]
) -> Array:
    """A leaf that is contracted along `axes`, corrected.

    Example: a leaf (in, heads, size) with axes (0,) is corrected as a matrix (heads size, in).
    """
    outer = other_axes(leaf.ndim, axes)
    order = (*outer, *axes)
    moved = leaf.transpose(order)
    features = pair.gram.shape[0]
    rows = moved.reshape(-1, features).astype(jnp.float32)
    corrected = corrected_weight(rows, pair.gram, pair.cross, damping)
    # The inverse permutation leads back to the order of the leaf's axes.
    back = np.argsort(order).tolist()
    return corrected.reshape(moved.shape).transpose(back).astype(leaf.dtype)


def _with_leaves(
    tree: PyTree,
    made: PyTree,
    paths: Mapping[str, Any],
    as_float: bool = False,
) -> PyTree:
    """The tree with the quantized leaves at these paths, or with the float arrays of these."""
    names, leaves, treedef = named_leaves(tree, is_leaf=is_quantized)
    _, others, _ = named_leaves(made, is_leaf=is_quantized)
    taken = []
    for name, leaf, other in zip(names, leaves, others, strict=True):
        is_other = name in paths and isinstance(other, QuantWeight)
        weight = other if is_other else leaf
        if is_other and as_float:
            weight = other.dequantize()
        taken.append(weight)
    return jax.tree.unflatten(treedef, taken)
