"""`calibrate`: runs a function on example batches, and records what each of its matmuls saw."""

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from sqjax._arguments import check_function, check_mapping, expect
from sqjax._trees import PyTree, check_arrays, check_finite, is_concrete
from sqjax._warnings import warn
from sqjax.calibration.analysis import (
    Analyses,
    Analysis,
    Arguments,
    Fn,
    check_no_numbers,
    described,
)
from sqjax.calibration.measure import Wanted
from sqjax.calibration.proof import prove
from sqjax.calibration.recorder import Recorder
from sqjax.calibration.stats import FEW_TOKENS, Stats
from sqjax.folding.graph import Group
from sqjax.program.facts import Program
from sqjax.program.trace import array_leaves


def calibrate(
    fn: Fn | Sequence[Fn],
    params: PyTree,
    batches: Iterable[Any],
    *,
    mask: Callable[..., Any] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    attention: bool = False,
    histogram: bool = False,
    gram: bool = False,
    sample: int = 0,
    seed: int = 0,
    progress: bool = False,
) -> Stats:
    """Finds what can be folded in `fn`, proves it, and records what every matmul sees.

    In four steps:

    1. Analyse: `fn` is traced on the first batch. Every matmul of an activation X with a leaf W is
       a site; the search looks for the leaves that can absorb X's scale (a norm's gain before it,
       say).
    2. Prove: all groups are folded at once with random powers of two, which are exact in float32
       and bfloat16, and `fn` must return the same bits on the first batch. A group that changes a
       bit is refused.
    3. Record: max |X_j| and sum |X_j| of every channel j of every site, over the tokens of all
       batches. A batch of other shapes is analysed too, and a group that does not fold there is
       refused.
    4. Warn: of a site, layer or expert that no token reached, and of experts that only few
       reached: little is known of their activations.

    A site that is refused is still calibrated, and can be quantized; it is only not smoothed.
    `print(stats.graph)` lists the groups and says why each other site is in none;
    `stats.graph.explain(path)` walks to the obstacle.

    Args:
        fn: a pure function fn(params, *batch): Flax linen's `apply`, a Hugging Face Flax model, any
            JAX function. Or several functions that share the parameters (an encoder and a decoder,
            a prefill and a step): only what folds in all of them is folded.
        params: its parameter tree of float arrays.
        batches: an iterable; a tuple is splatted into fn(params, *batch), anything else is one
            argument. Some thousand tokens like those the model will see are enough, because only
            maxima and means are kept. Shapes may differ from batch to batch (each new shape
            compiles once). For several functions: one iterable for each.
        mask: mask(*batch) gives booleans of the shape of the tokens, (batch, tokens) say, as they
            are in the batch: False for padding, whose activations do not count. The tokens are
            followed through the program, wherever it moves them; where several flow together (a
            pooled activation), what holds a real one counts. What can not be followed is warned of.
            The mask is that of every input whose first axes have its shape: pad the inputs of an
            encoder and a decoder to different lengths, because one mask can not be both's.
        groups: {a site's path: the paths of the leaves that shall absorb its scale}: groups stated
            by hand, where the search would choose others. They pass the same certificate and proof.
            The rest is found as always.
        attention: whether to look for scales between keys and queries too, for `scales(...,
            attention=0.5)`.
        histogram: whether to record a histogram of |X| at every site too, for static schemes with a
            `range`. It takes 8 KiB of memory for each matrix, however many batches there are, and
            about as long as the other statistics; exact while one batch has less than 2^32
            activations at a site.
        gram: whether to keep the Gram matrix X^T X of every site too, for `awq` and `gptq`. A site
            of n input features takes 4 n^2 bytes, whatever the number of tokens (`gram_bytes` says
            how much of a graph), and twice that while a batch is added.
        sample: of how many tokens to keep the activations, for `search_alpha`: 4 x sample x n bytes
            a site. They are drawn at random from all tokens of all batches
            (`sqjax.numerics.samples.Sample`).
        seed: of that drawing.
        progress: whether to show a progress bar.

    Returns:
        `Stats`: the statistics, and the graph of what can be folded.

    Raises:
        ValueError: there are no batches; a batch does not fit `fn`; a parameter, a batch or an
            activation holds NaN or infinity; there is no matmul of an activation with a leaf; a
            stated group does not hold; a site of the first batch's program is missing in a later
            one's; the mask fits none of the inputs; it is called inside jax.jit, grad or vmap.

    Examples:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x * p["norm"]) @ p["w"]
        >>> params = {"norm": jnp.ones(2), "w": jnp.ones((2, 3))}
        >>> stats = sq.calibrate(fn, params, [jnp.array([[1.0, 16.0]]), jnp.array([[-3.0, 0.5]])])
        >>> stats.absmax["w"].tolist()
        [3.0, 16.0]
    """
    functions, iterables = _one_iterable_each(fn, batches)
    check_arrays(params)
    check_finite(params, "parameter")
    check_mask(mask)
    _check_groups(groups)
    wanted = checked_wanted(histogram, gram, sample, seed)
    first_batches, streams = [], []
    for iterable in iterables:
        first_batch, stream = _open(iterable)
        first_batches.append(first_batch)
        streams.append(stream)

    _check_known(params, first_batches)

    # Analyse: what folds is decided by all functions together, on their first batches.
    analyses = Analyses(
        functions, params, first_batches, groups or {}, attention
    )
    totals = [operator.length_hint(batches) for batches in iterables]
    stats = calibrated(analyses, streams, mask, wanted, progress, totals)
    warn_of_unreached(stats)
    return stats


def calibrated(
    analyses: Analyses,
    streams: Iterable[Iterable[Any]],
    mask: Callable[..., Any] | None,
    wanted: Wanted,
    progress: bool = False,
    totals: Sequence[int] = (),
) -> Stats:
    """What `calibrate` does between its checks and its warnings.

    Args:
        analyses: of the functions, on their first batches.
        streams: the batches of each function, the first ones among them.
        mask, progress: as for `calibrate`.
        wanted: what to keep beside maxima and sums.
        totals: how many batches each stream has, for the progress bar; 0 where nobody knows.
    """
    first_batches = analyses.first_batches
    first = analyses.together(0, first_batches[0], 0)
    _check_has_something_to_do(first)

    # Prove, on the first batches and before anything is recorded.
    graph = prove(
        first,
        analyses.params,
        array_leaves(first_batches),
        first.graph,
        analyses.known,
    )

    # Record: one function and one batch at a time, so that only one batch is in memory.
    recorder = Recorder(analyses, first, graph, mask, wanted)
    counted = itertools.zip_longest(streams, totals)
    for which, (stream, total) in enumerate(counted):
        shown = tqdm(
            stream,
            desc="calibrating",
            unit="batch",
            total=total or None,
            disable=not progress,
        )
        for number, batch in enumerate(shown):
            recorder.record(which, _arguments(batch, number), number)

    # Refuse what is no program.
    analyses.check_repeatable()
    return recorder.stats()


def _one_iterable_each(
    fn: Any, batches: Iterable[Any]
) -> tuple[list[Fn], list[Iterable[Any]]]:
    """The functions, and the iterable of batches of each."""
    several = isinstance(fn, list | tuple)
    functions: list[Any] = list(fn) if several else [fn]
    for function in functions:
        check_function(function, "calibrate", _ORDER)
    check_batches(batches)
    if not several:
        return functions, [batches]
    iterables = list(batches)
    for iterable in iterables:
        check_batches(iterable)
    if len(functions) != len(iterables):
        raise ValueError(
            f"calibrate: {len(functions)} functions, but {len(iterables)} iterables of batches; "
            "pass one iterable of batches for each function"
        )
    return functions, iterables


#: The order of the arguments of `calibrate`; those of `smoothquant` begin so too.
_ORDER = "(fn, params, batches)"


def checked_wanted(
    histogram: bool, gram: bool, sample: int, seed: int
) -> Wanted:
    """What to keep beside maxima and sums.

    Raises:
        ValueError: sample or seed is no such number; a mask in their place, say.
    """
    is_bool = isinstance(gram, bool)
    expect(is_bool, "calibrate: gram=", "True or False", gram)
    for name, number in (("sample", sample), ("seed", seed)):
        is_count = type(number) is int and 0 <= number < 2**31
        expect(is_count, f"calibrate: {name}=", "an int of 0 or more", number)
    return Wanted(bool(histogram), gram, sample, seed)


def check_mask(mask: Any) -> None:
    """Raises ValueError unless a mask is a function, or None."""
    if mask is not None and not callable(mask):
        raise ValueError(
            "calibrate: mask=: expected a function of a batch, such as `lambda ids: ids != 0`, got "
            f"{type(mask).__name__}; each batch has a mask of its own"
        )


def _check_groups(groups: Any) -> None:
    """Raises ValueError unless groups are {site: [leaves]}, or None."""
    if groups is None:
        return
    expected = "{a site's path: the paths of the leaves that absorb its scale}"
    check_mapping(groups, "calibrate: groups=", expected)
    for site, leaves in groups.items():
        expect(
            isinstance(leaves, list | tuple),
            f"calibrate: groups= of {site!r}",
            "a list of leaves' paths",
            leaves,
        )


def check_batches(batches: Any) -> None:
    """Raises ValueError for one batch where an iterable of batches is expected."""
    if hasattr(batches, "shape") or isinstance(batches, Mapping | str):
        raise ValueError(
            f"calibrate: expected an iterable of batches, got one, of shapes {described(batches)}, "
            "which would be walked row by row; did you mean [batch], a list of that one? (If each "
            f"row is a batch: list(batches). The order of arguments is {_ORDER})"
        )
    if batches is None or not isinstance(batches, Iterable):
        raise ValueError(
            f"calibrate: expected an iterable of batches, got {type(batches).__name__}; pass a "
            f"list of them. The order of arguments is {_ORDER}"
        )


def _open(batches: Iterable[Any]) -> tuple[Arguments, Iterable[Any]]:
    """(the arguments of the first batch, all batches): an iterator's first is not lost."""
    stream = iter(batches)
    for first in stream:
        return _arguments(first, 0), itertools.chain([first], stream)
    raise ValueError(
        "calibrate: batches is empty (an iterator that was used up?); at least one batch is needed"
    )


def _arguments(batch: Any, number: int) -> Arguments:
    """The arguments of fn after params that a batch stands for, checked for NaN and infinity."""
    args = batch if isinstance(batch, tuple) else (batch,)
    check_no_numbers(args, number)
    # An additive mask holds -inf. Where that reaches a site, the activation is refused.
    check_finite(args, f"calibration batch {number}, input", but=-np.inf)
    return args


def _check_known(params: PyTree, batches: Any) -> None:
    """Raises ValueError for tracers, because statistics are made of numbers."""
    if not all(map(is_concrete, array_leaves((params, batches)))):
        raise ValueError(
            "calibrate: expected arrays whose numbers are known, got tracers: call calibrate "
            "outside of jax.jit, grad and vmap, and compile what runs: jax.jit(sq.quantized(fn))"
        )


def _check_has_something_to_do(analysis: Analysis) -> None:
    """Raises ValueError if there is nothing to quantize: no site, and no embedding table."""
    graph = analysis.graph
    if graph.sites or graph.tables:
        return
    reasons = "".join(
        f"\n  {path}: {reason}" for path, reason in graph.refused[:10]
    )
    raise ValueError(
        "calibrate: found no matmul of an activation with a leaf of params, so nothing to do"
        f"{_captured(analysis.program)}{reasons}"
    )


def _captured(program: Program) -> str:
    """What to do about matrices that fn has closed over; nothing to say if there are none."""
    shapes = [program.shape(v) for v in program.constants]
    # Vectors may be positions, or a mask; weights are matrices.
    matrices = [shape for shape in shapes if len(shape) > 1]
    if not matrices:
        return ""
    return (
        f". fn has closed over arrays of shapes {str(matrices[:5])[1:-1]}: if these are weights, "
        "pass them in params, as in fn = lambda p, x: x @ p['w'], calibrate(fn, {'w': w}, batches)"
    )


def warn_of_unreached(stats: Stats) -> None:
    """Warns of sites, layers and experts that no token reached, or only few."""
    texts = [*_of_unreached(stats), *_of_few(stats), *_of_blank(stats)]
    for text in texts:
        warn(f"calibrate: {text}")


def _of_unreached(stats: Stats) -> Iterator[str]:
    """What to say of sites that only zeros, or nothing at all, have reached."""
    unseen: list[str] = []
    zeros: list[str] = []
    for path, entries in stats.unreached.items():
        # A site without batch axes has one entry, whose index is ().
        of_a_stack = entries != ((),)
        text = f"{path}{list(entries)}" if of_a_stack else path
        if of_a_stack or not stats.count[path]:
            unseen.append(text + _not_taken(stats, path, entries))
        else:
            zeros.append(text)
    if unseen:
        yield (
            f"no token reached {', '.join(unseen)}; smoothing scales stay 1 there, unless another "
            "site shares them. A static scheme lends an expert the largest range of the others, "
            "and refuses a whole site"
        )
    if zeros:
        yield (
            f"every activation was zero at {', '.join(zeros)} (a norm's gain of 0, or an input "
            "that is always zeros?); nothing is known of these, and a static scheme refuses them"
        )


def _not_taken(
    stats: Stats, path: str, entries: Iterable[tuple[int, ...]]
) -> str:
    """Which branches or loops would have to run for these matrices of a site: " (...)", or ""."""
    conditions = dict(stats.graph.branches)
    names = [path, *(path + _indices(entry) for entry in entries)]
    found = dict.fromkeys(conditions[n] for n in names if n in conditions)
    return f" ({'; '.join(found)})" if found else ""


def _indices(entry: tuple[int, ...]) -> str:
    """Which of a stack of matrices, as a site's name has it: [2][0]."""
    return "".join(f"[{index}]" for index in entry)


def _of_few(stats: Stats) -> Iterator[str]:
    """What to say of sites and experts that some tokens reached, but not enough to rely on."""
    few = [
        f"{path}{list(entry)} ({tokens})"
        for path, entry, tokens in stats.scarce(FEW_TOKENS)
    ]
    if few:
        yield (
            f"less than {FEW_TOKENS} tokens reached {', '.join(few)}; smoothing scales are drawn "
            "towards 1 there, unless another site or expert shares them, because so few tokens say "
            "little of the largest: calibrate on more"
        )


def _of_blank(stats: Stats) -> Iterator[str]:
    """What to say of groups whose fold could not be proved, because everything is 0 there."""
    blank = [
        group.name
        for group in stats.graph.groups
        if not group.keys and _is_blank(group, stats)
    ]
    if blank:
        yield (
            f"all weights are zero behind {', '.join(blank)}: the proof had nothing to compare "
            "there. Calibrate trained parameters, or verify the fold once there are some"
        )


def _is_blank(group: Group, stats: Stats) -> bool:
    """Whether all weights of a group's sites are zero: whatever is folded, 0 comes out."""
    absmax = [stats.weight_absmax[path] for path, _ in group.sites]
    return all(is_concrete(x) and not np.asarray(x).any() for x in absmax)
