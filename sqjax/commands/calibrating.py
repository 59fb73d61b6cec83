"""What `calibrate`, `smooth`, `quantize` and others share: statistics of a model, and its fold."""

from pathlib import Path
from typing import Any, NamedTuple

from sqjax import load
from sqjax.calibration.calibrate import calibrate
from sqjax.calibration.stats import Stats
from sqjax.commands.asked import Asked
from sqjax.commands.defaults import WINDOWS
from sqjax.commands.model_argument import Opened, float_only
from sqjax.commands.options import Talk
from sqjax.commands.outputs import check_recipe
from sqjax.commands.recipes import digest_at, settle
from sqjax.commands.shared import NO_TOKENIZER
from sqjax.commands.texts import lines, read_texts, token_windows
from sqjax.folding.apply import fold
from sqjax.methods.quantization import SAMPLE
from sqjax.methods.smoothing import fold_stats, scales


class Calibrated(NamedTuple):
    """A model's statistics.

    Attributes:
        stats: the statistics; None where they are not needed.
        name: of what was read; None where nothing was.
        made_of: digests of the model and of what was read, for the recipe.
    """

    stats: Any
    name: str | None
    made_of: dict[str, str]


def calibrated(
    opened: Opened, asked: Asked, talk: Talk, command: str
) -> Calibrated:
    """The statistics of a model, from a file or by calibrating now.

    Raises:
        ValueError: the model is quantized or has no tokenizer; the recipe was made of other things;
            the file holds no statistics, or what `calibrate` refuses.
    """
    float_only(opened, command)
    if asked.stats is not None:
        # The text is in the statistics already, and so not part of the recipe.
        made_of = {"model": opened.digest, "stats": digest_at(asked.stats)}
        check_recipe(made_of)
        return Calibrated(_kept(asked), str(asked.stats), made_of)
    if opened.model.tokenizer is None:
        raise ValueError(f"{opened.name}: {NO_TOKENIZER}")
    texts = read_texts(asked.text, "calibration")
    made_of = {"model": opened.digest, "text": texts.digest}
    check_recipe(made_of)
    if opened.is_encoder:
        # An encoder sees sentences, and not windows that begin in the middle of one.
        read = lines(texts, asked.windows)
        settle(windows=asked.windows or WINDOWS[texts.purpose])
        name = f"{len(read)} lines of {texts.name}"
        talk.note(f"calibrating on {name}")
        stats = calibrate(
            opened.model.embed,
            opened.params,
            opened.model.batches(read),
            mask=lambda _, mask: mask,
            progress=talk.progress,
            **kept(asked),
        )
        return Calibrated(stats, name, made_of)
    windows = token_windows(opened.model, texts, asked.tokens, asked.windows)
    settle(windows=windows.ids.shape[0], tokens=windows.ids.shape[1])
    talk.note(f"calibrating on {windows}; compiling comes first")
    # One window a batch, because memory then holds the activations of one.
    batches = list(windows.ids[:, None])
    stats = calibrate(
        opened.model.apply,
        opened.params,
        batches,
        progress=talk.progress,
        **kept(asked),
    )
    return Calibrated(stats, str(windows), made_of)


def kept(asked: Asked) -> dict[str, Any]:
    """What `calibrate` keeps beside maxima."""
    sample = SAMPLE if asked.search or asked.sample else 0
    return {"gram": asked.search, "sample": sample}


def _kept(asked: Asked) -> Stats:
    """The statistics of the file that was named.

    Raises:
        ValueError: what `read_stats` refuses; a search is asked for, and they hold nothing for one.
    """
    assert asked.stats is not None
    stats = read_stats(asked.stats)
    lacks = asked.search and not stats.gram
    if lacks or ((asked.search or asked.sample) and not stats.sample):
        what = "--search" if asked.search else "static ranges after a rotation"
        raise ValueError(
            f"--stats: {asked.stats}: expected statistics for {what}, got some of maxima alone; "
            "write them with `sqjax calibrate --search`"
        )
    return stats


def check_asked(asked: Asked) -> None:
    """Raises ValueError if there is nothing to calibrate on.

    Commands ask before they load a model, because the answer should not take a minute. What was
    read is read again later: beside a model it is small.
    """
    if asked.stats is None:
        read_texts(asked.text, "calibration")
        return
    if asked.text is not None:
        raise ValueError(
            "--stats: expected it without --text, which would not be read"
        )
    _kept(asked)


def uncalibrated(opened: Opened, command: str) -> Calibrated:
    """What `calibrated` gives, for what needs no statistics: only the checks.

    Raises:
        ValueError: the model is quantized, or the recipe was made of another one.
    """
    float_only(opened, command)
    made_of = {"model": opened.digest}
    check_recipe(made_of)
    return Calibrated(None, None, made_of)


def read_stats(path: Path) -> Stats:
    """The statistics of a file.

    Raises:
        ValueError: it is no file of sqjax, or holds something else.
    """
    expected = f"--stats: {path}: expected a file that `sqjax calibrate` wrote"
    try:
        found = load(path)
    except ValueError as error:
        raise ValueError(f"{expected}; {error}") from error
    if not isinstance(found, Stats):
        raise ValueError(f"{expected}, got a tree of parameters")
    return found


def smoothed(
    params: Any, stats: Stats, alpha: float | str, groups: str = "all"
) -> tuple[Any, Stats]:
    """The parameters with the smoothing scales of this alpha folded in, and their statistics.

    With "none" both are as they were.
    """
    if alpha == "none":
        return params, stats
    s = scales(params, stats, alpha, groups=groups)
    # Static schemes need the statistics of the parameters that are quantized: the smoothed ones.
    return fold(params, stats.graph, s), fold_stats(stats, s)


def what_folds(stats: Stats) -> str:
    """How many matmuls there are, and how many scales can be folded away."""
    graph = stats.graph
    groups = graph.select("all")
    sites = {path for group in groups for path in group.paths}
    return (
        f"{len(graph.sites)} matmuls, {len(sites)} of which can be smoothed, in "
        f"{len(groups)} groups"
    )
