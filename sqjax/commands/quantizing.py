"""The work of `sqjax quantize`: parameters in a scheme, written in a format."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sqjax import models
from sqjax.calibration.stats import Stats
from sqjax.choosing.by_search import quantize_by_search
from sqjax.commands.asked import How
from sqjax.commands.calibrating import smoothed
from sqjax.commands.model_argument import Opened
from sqjax.commands.options import Talk
from sqjax.folding.graph import paths_of
from sqjax.methods.quantization import quantize, site_schemes
from sqjax.weights.schemes import PRESETS
from sqjax.weights.sizes import weight_bytes

#: What a tied head is called in the trees of models here.
TIED = "embed_tokens"


def needs_sample(names: Iterable[str]) -> bool:
    """Whether a scheme of these names, or of other formats' names, needs samples of tokens."""
    schemes = [PRESETS.get(name.upper()) for name in names]
    return any(how is not None and how.needs_sample for how in schemes)


def quantized_as(opened: Opened, stats: Any, how: How, talk: Talk) -> Any:
    """The smoothed parameters; quantized too, but for GGUF, whose writer quantizes itself."""
    if how.layout == "gguf":
        params, _ = smoothed(opened.params, stats, how.alpha)
        return params
    rules = _rules(stats, how, talk)
    # Before the work, because wrong patterns are found at once.
    site_schemes(stats.graph, rules)
    if how.search:
        talk.note("searching for scales and roundings; compiling comes first")
        return quantize_by_search(opened.params, stats, rules)
    if how.alpha != "none":
        talk.note(f"smoothing with alpha {how.alpha}")
    params, their_stats = smoothed(opened.params, stats, how.alpha)
    talk.note("quantizing")
    return quantize(params, their_stats, rules)


def _rules(stats: Stats, how: How, talk: Talk) -> dict[str, Any]:
    """{pattern: scheme, or None for float}, with one for all at the end."""
    # "none" is no preset, and None is what a rule says for float.
    chosen = map(PRESETS.get, map(str.upper, how.rules.values()))
    rules = dict(zip(how.rules, chosen, strict=True))
    sites = paths_of(stats.graph.sites)
    is_tied = any(TIED in path for path in sites)
    if how.layout == "compressed-tensors" and is_tied and TIED not in rules:
        # The format has no name for a quantized embedding, and this one is the head too.
        rules[TIED] = None
        talk.note(
            "the head stays float, because it is the embedding, which compressed-tensors does not "
            "quantize"
        )
    rules.setdefault(".*", PRESETS[how.scheme.upper()])
    return rules


def write(new: Path, opened: Opened, params: Any, how: How) -> None:
    """Writes the parameters in the format that was asked for."""
    model, like = opened.model, opened.directory
    if how.layout == "gguf":
        kind: Any = how.scheme
        # The file itself says best how its tokenizer is written.
        models.save_gguf(new, model, params, dtype=kind, like=opened.source)
    elif how.layout == "compressed-tensors":
        models.save_compressed_tensors(new, model, params, like=like)
    else:
        models.save(new, model, params, like=like)


def record(
    opened: Opened, params: Any, how: How, written: Path
) -> dict[str, Any]:
    """What was made, for machines."""
    # What GGUF's writer got was float, so only its file says what became of it.
    is_file = how.layout == "gguf"
    size = written.stat().st_size if is_file else weight_bytes(params)
    return {
        "model": opened.name,
        "scheme": how.scheme,
        "rules": how.rules,
        "alpha": None if how.alpha == "none" else how.alpha,
        "search": how.search,
        "format": how.layout,
        "float_bytes": weight_bytes(opened.params),
        "weight_bytes": size,
        "output": str(written),
    }


def summary(made: dict[str, Any]) -> str:
    """What was made, for people."""
    alpha, text = made["alpha"], made["text"]
    before, after = made["float_bytes"] / 1e6, made["weight_bytes"] / 1e6
    smoothing = (
        "not smoothed" if alpha is None else f"smoothed with alpha {alpha}"
    )
    said = [
        made["scheme"],
        "searched" if made["search"] else smoothing,
        f"{before:.0f} MB to {after:.0f} MB",
    ]
    calibrated = "" if text is None else f"; calibrated on {text}"
    return ", ".join(said) + calibrated
