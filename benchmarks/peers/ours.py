"""The rows of `theirs.py` by sqjax: the same model, the same windows in the same order, one core.

    python ours.py write FOLDER         # the float model and the windows, which theirs.py reads too
    python ours.py FOLDER ROW ...       # measures rows, each by its name
    python ours.py list

Of each row FOLDER/ours/ROW.json says the seconds of a core that calibrating, choosing and
quantizing took, with all compiling, and the mean negative log-likelihood of every window.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

import sqjax as sq
from sqjax.commands.shared import text_windows
from sqjax.models.decoder import embed, run_layer
from sqjax.report.machine import current_commit

MODEL = "smollm2-135m"
TOKENS, CALIBRATION, EVALUATION, SEED = 512, 16, 60, 0
#: llm-compressor's examples smooth with this, so that the fixed rows differ in the groups only.
ALPHA = 0.8
#: The tied head stays float, here as there.
HEAD = {"embed_tokens|lm_head": None}
#: Of learning: one window each.
STEPS = 40
W4 = sq.W4A16_G64
W4_SYMMETRIC = sq.Scheme(weight=sq.Int4(group_size=64), activation=None)


class Case(NamedTuple):
    """What is quantized, on which batches, and which tokens stand before each in float."""

    model: Any
    params: Any
    batches: list[Any]
    prefix: sq.models.Prefix | None = None

    def stats(self, **what: Any) -> sq.Stats:
        """The statistics of the float model."""
        mask = None if self.prefix is None else self.prefix.mask
        return sq.calibrate(
            self.model.apply, self.params, self.batches, mask=mask, **what
        )

    def measured(self) -> sq.Stats:
        """The statistics that the searches read: Gram matrices, and a sample of the tokens."""
        return self.stats(gram=True, sample=TOKENS, seed=SEED)


class Chosen(NamedTuple):
    """Smoothed parameters, their statistics, the clips of their weights, and other rules."""

    params: Any
    stats: sq.Stats
    clips: Mapping[str, Any] | None
    rules: Mapping[str, Any] | None = None


def rules(scheme: sq.Scheme) -> dict[str, sq.Scheme | None]:
    """Every matmul but the head's."""
    return {**HEAD, ".*": scheme}


def folded(case: Case, stats: sq.Stats, result: Any) -> Chosen:
    """What a search found, applied."""
    params = sq.fold(case.params, stats.graph, result.s)
    clips = getattr(result, "clips", None)
    return Chosen(params, sq.fold_stats(stats, result.s), clips)


def rotated(case: Case) -> Case:
    """The same function with rotated activations, for which the head gets a weight of its own."""
    model, params = sq.models.untie(case.model, case.params)
    stats = sq.calibrate(model.apply, params, case.batches[:1])
    return Case(model, sq.rotate(params, stats, seed=SEED), case.batches)


def prefixed(case: Case) -> Case:
    """The same model after a few tokens that stand out, whose keys and values stay float."""
    held = sq.models.prefix(case.model, case.params, case.batches[:2])
    batches = [held.before(ids) for ids in case.batches]
    return Case(case.model, case.params, batches, held)


def rotated_and_prefixed(case: Case) -> Case:
    """Both."""
    return prefixed(rotated(case))


# How scales and clips are chosen ------------------------------------------------------------------

Choice = Callable[[Case, sq.Scheme], Chosen]


def nothing(case: Case, scheme: sq.Scheme) -> Chosen:
    """The model as it is."""
    return Chosen(case.params, case.stats(), None)


def nothing_measured(case: Case, scheme: sq.Scheme) -> Chosen:
    """The model as it is, with what GPTQ reads."""
    return Chosen(case.params, case.measured(), None)


def smooth(case: Case, scheme: sq.Scheme) -> Chosen:
    """One alpha for all groups, also those without a norm."""
    stats = case.stats()
    s = sq.scales(case.params, stats, ALPHA)
    params = sq.fold(case.params, stats.graph, s)
    return Chosen(params, sq.fold_stats(stats, s), None)


def by_search(case: Case, scheme: sq.Scheme) -> Chosen:
    """What `quantize_by_search` rounds by GPTQ."""
    stats = case.measured()
    found = sq.prepare_by_search(case.params, stats, rules(scheme))
    return Chosen(found.params, found.stats, found.clips, found.rules)


def search(case: Case, scheme: sq.Scheme) -> Chosen:
    """The best alpha of each group."""
    stats = case.measured()
    return folded(
        case, stats, sq.search_alpha(case.params, stats, rules(scheme))
    )


def awq(case: Case, scheme: sq.Scheme) -> Chosen:
    """AWQ's scales and clips."""
    stats = case.measured()
    return folded(case, stats, sq.awq(case.params, stats, rules(scheme)))


def awq_scales(case: Case, scheme: sq.Scheme) -> Chosen:
    """AWQ's scales alone."""
    stats = case.measured()
    found = sq.awq(case.params, stats, rules(scheme), clip=False)
    return folded(case, stats, found)


def learned(start: Callable[[Any, Any, Any], Any]) -> Choice:
    """Scales and clips by gradient, from what a search found."""

    def choose(case: Case, scheme: sq.Scheme) -> Chosen:
        stats = case.measured()
        first = start(case.params, stats, rules(scheme))
        result = sq.learn(
            case.model.apply,
            case.params,
            stats,
            case.batches,
            rules(scheme),
            s=first.s,
            clips=getattr(first, "clips", {}) or False,
            steps=STEPS,
        )
        params, after = result.applied(case.params, stats)
        return Chosen(params, after, result.clips or None)

    return choose


# How weights are rounded --------------------------------------------------------------------------


def rounding(chosen: Chosen, scheme: sq.Scheme) -> Any:
    """To nearest."""
    if chosen.clips is None:
        return sq.quantize(chosen.params, chosen.stats, rules(scheme))
    return sq.quantize(
        chosen.params, chosen.stats, rules(scheme), clips=chosen.clips
    )


def gptq(chosen: Chosen, scheme: sq.Scheme) -> Any:
    """So that later channels make up for the errors of earlier ones."""
    how = chosen.rules or rules(scheme)
    return sq.gptq(chosen.params, chosen.stats, how, clips=chosen.clips)


def by_layers(chosen: Chosen, scheme: sq.Scheme) -> Any:
    """Layer by layer, each making up for what the layers before it have lost."""
    model, _ = sq.models.load(MODEL)
    config, inner = model.config, chosen.params["model"]
    names = [str(number) for number in range(config.num_layers)]
    windows = text_windows(model, "calibration", TOKENS, CALIBRATION)
    inputs = [embed(config, chosen.params, ids) for ids in windows[:, None]]
    block = partial(run_layer, config, 0)
    layers = [inner["layers"][name] for name in names]
    made = sq.gptq_blocks(block, layers, inputs, scheme)
    layers_by_name = dict(zip(names, made, strict=True))
    return {**chosen.params, "model": {**inner, "layers": layers_by_name}}


# The rows -----------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A scheme, how scales are chosen for it, how weights are rounded, what is done before.

    And how keys and values are kept while it is measured.
    """

    scheme: sq.Scheme
    choose: Choice
    narrow: Callable[[Chosen, sq.Scheme], Any] = rounding
    before: Callable[[Case], Case] | None = None
    cache: Literal["int8"] | None = None


def learned_from_search() -> Choice:
    """Learned from the best alphas."""
    return learned(lambda *given: sq.search_alpha(*given))


def learned_from_smoothing() -> Choice:
    """Learned from one alpha for all groups."""
    return learned(
        lambda params, stats, _: SimpleNamespace(
            s=sq.scales(params, stats, ALPHA)
        )
    )


def learned_from_awq() -> Choice:
    """Learned from AWQ's scales and clips."""
    return learned(lambda *given: sq.awq(*given))


def learned_from_smooth_awq() -> Choice:
    """Learned from what `smooth_awq` found for int4 weights and int8 activations."""
    return learned(lambda *given: sq.smooth_awq(*given))


ROWS = {
    "w8a8-rounding": Row(sq.W8A8, nothing),
    "w8a8-smooth": Row(sq.W8A8, smooth),
    "w8a8-search": Row(sq.W8A8, search),
    "w8a8-search-gptq": Row(sq.W8A8, search, gptq),
    "w8a8-learned": Row(sq.W8A8, learned_from_search()),
    "w8a8-by-search": Row(sq.W8A8, by_search, gptq),
    "w8a8-rotated-by-search": Row(sq.W8A8, by_search, gptq, rotated),
    "w8a8-prefixed-by-search": Row(
        sq.W8A8, by_search, gptq, rotated_and_prefixed
    ),
    "w8a8-o2-rounding": Row(sq.W8A8_O2, nothing),
    "w8a8-o2-smooth": Row(sq.W8A8_O2, smooth),
    "w8a8-o2-by-search": Row(sq.W8A8_O2, by_search, gptq),
    "w8a8-o2-rotated-by-search": Row(sq.W8A8_O2, by_search, gptq, rotated),
    "w8a8-o2-prefixed-by-search": Row(
        sq.W8A8_O2, by_search, gptq, rotated_and_prefixed
    ),
    "w8a8-o3-rounding": Row(sq.W8A8_O3, nothing),
    "w8a8-o3-smooth": Row(sq.W8A8_O3, smooth),
    "w8a8-o3-by-search": Row(sq.W8A8_O3, by_search, gptq),
    "w8a8-o3-rotated-by-search": Row(sq.W8A8_O3, by_search, gptq, rotated),
    "w8a8-o3-prefixed-by-search": Row(
        sq.W8A8_O3, by_search, gptq, rotated_and_prefixed
    ),
    "w8a8-o3-rotated-at-run-time": Row(
        sq.W8A8_O3_ROTATED, nothing_measured, gptq
    ),
    "w8a8-o3-prefixed-at-run-time": Row(
        sq.W8A8_O3_ROTATED, nothing_measured, gptq, prefixed
    ),
    "w8a8-o3-learned": Row(sq.W8A8_O3, learned_from_smoothing()),
    "w4a16-rounding": Row(W4, nothing),
    "w4a16-gptq": Row(W4, nothing_measured, gptq),
    "w4a16-gptq-symmetric": Row(W4_SYMMETRIC, nothing_measured, gptq),
    "w4a16-awq": Row(W4, awq),
    "w4a16-awq-gptq": Row(W4, awq, gptq),
    "w4a16-by-layers": Row(W4, nothing, by_layers),
    "w4a16-awq-by-layers": Row(W4, awq_scales, by_layers),
    "w4a16-g128-awq-gptq": Row(sq.W4A16, awq, gptq),
    "w4a8-rounding": Row(sq.W4A8, nothing),
    "w4a8-by-search": Row(sq.W4A8, by_search, gptq),
    "w4a8-by-layers": Row(sq.W4A8, by_search, by_layers),
    "w4a8-by-search-int8-cache": Row(sq.W4A8, by_search, gptq, cache="int8"),
    "w4a8-by-layers-int8-cache": Row(
        sq.W4A8, by_search, by_layers, cache="int8"
    ),
    "w4a8-learned-gptq-int8-cache": Row(
        sq.W4A8, learned_from_smooth_awq(), gptq, cache="int8"
    ),
    "w4a16-learned": Row(W4, learned_from_awq()),
    "w4a16-learned-gptq": Row(W4, learned_from_awq(), gptq),
}
FLOAT, FLOAT_PREFIXED = "float", "float-prefixed"
NAMES = (FLOAT, FLOAT_PREFIXED, *ROWS)


class Made(NamedTuple):
    """A quantized model, with the prefix of its float form, and its cache."""

    model: Any
    tree: Any
    prefix: sq.models.Prefix | None = None
    cache: Literal["int8"] | None = None


def quantized(name: str, case: Case) -> Made:
    """What one row makes, computed."""
    if name == FLOAT:
        return Made(case.model, case.params)
    if name == FLOAT_PREFIXED:
        return Made(case.model, case.params, prefixed(case).prefix)
    row = ROWS[name]
    start = case if row.before is None else row.before(case)
    chosen = row.choose(start, row.scheme)
    tree = jax.block_until_ready(row.narrow(chosen, row.scheme))
    # Folding changes what the prefix's values must be.
    held = None if start.prefix is None else start.prefix.of(chosen.params)
    return Made(start.model, tree, held, row.cache)


def losses(made: Made, windows: np.ndarray) -> list[float]:
    """The mean negative log-likelihood of each window's tokens after its first."""
    return [
        math.log(
            sq.models.perplexity(
                made.model,
                made.tree,
                window[None],
                prefix=made.prefix,
                cache=made.cache,
            )
        )
        for window in windows
    ]


def measure(folder: Path, name: str) -> None:
    """Quantizes by one row, and writes what was measured."""
    model, params = sq.models.load(MODEL)
    windows = np.load(folder / "calibration.npy")
    case = Case(model, params, list(windows[:, None]))
    start = time.process_time()
    made = quantized(name, case)
    seconds = time.process_time() - start
    evaluated = np.load(folder / "evaluation.npy")
    result = {
        "name": name,
        "versions": {"sqjax": sq.__version__, "jax": jax.__version__},
        "commit": current_commit(),
        "threads": len(os.sched_getaffinity(0)),
        "seconds": round(seconds, 1),
        "losses": losses(made, evaluated),
    }
    path = folder / "ours" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    perplexity = np.exp(np.mean(result["losses"]))
    print(f"{name}: perplexity {perplexity:.4f}, {seconds:.0f} s", flush=True)


def write(folder: Path) -> None:
    """The float model as Hugging Face has it, and the ids of both texts' windows."""
    folder.mkdir(parents=True, exist_ok=True)
    model, params = sq.models.load(MODEL)
    sq.models.save_huggingface(folder / FLOAT, model, params, overwrite=True)
    for text, count in (
        ("calibration", CALIBRATION),
        ("evaluation", EVALUATION),
    ):
        ids = text_windows(model, text, TOKENS, count)
        np.save(folder / f"{text}.npy", ids)


def main(arguments: list[str]) -> None:
    """What the command line asks for."""
    match arguments:
        case ["list"]:
            print("\n".join(NAMES))
        case ["write", folder]:
            write(Path(folder))
        case [folder, *names] if names and {*names} <= {*NAMES}:
            for name in names:
                measure(Path(folder), name)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
