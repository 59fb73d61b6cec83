"""`sqjax quantize`: a quantized checkpoint, in our layout or in one that others read."""

from pathlib import Path
from typing import Any

import click

from sqjax.commands.asked import Asked, How
from sqjax.commands.defaults import GGUF_SCHEMES, SCHEMES
from sqjax.commands.options import (
    MODEL,
    STATS,
    TEXT,
    AlphaType,
    Talk,
    command,
    output,
)
from sqjax.commands.outputs import check_output, new_directory, new_file
from sqjax.commands.recipes import settle

_EXAMPLES = """
sqjax quantize smollm2-135m -o smollm2-w8a8
sqjax quantize smollm2-135m --scheme w4a16 --rule embed_tokens=none -o smollm2-w4a16
sqjax quantize smollm2-135m --scheme w4a16_g64 --search -o smollm2-searched
sqjax quantize ./Llama-3.2-1B --alpha 0.8 --format compressed-tensors -o ./Llama-3.2-1B-w8a8
sqjax quantize smollm2-135m --format gguf --scheme q8_0 -o smollm2-q8_0.gguf
sqjax quantize --recipe smollm2-w8a8/recipe.yaml -o again
"""
_FORMATS = ("sqjax", "compressed-tensors", "gguf")
#: What --scheme is where it is not given.
_USUAL = {"sqjax": "w8a8", "compressed-tensors": "w8a8", "gguf": "q8_0"}
#: The strength of smoothing where --alpha is not given and activations are quantized.
_ALPHA = 0.5


class _Rule(click.ParamType):
    """PATTERN=SCHEME, or PATTERN=none."""

    name = "rule"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """The rule as it is, with its scheme in small letters."""
        pattern, equals, scheme = str(value).rpartition("=")
        scheme = scheme.lower()
        known = (*SCHEMES, "none")
        if not equals or scheme not in known:
            self.fail(
                f"expected PATTERN=SCHEME with one of {', '.join(known)}, got {value!r}",
                param,
                ctx,
            )
        return f"{pattern}={scheme}"


@command(
    "quantize",
    _EXAMPLES,
    MODEL,
    click.option(
        "--scheme",
        type=click.Choice((*SCHEMES, *GGUF_SCHEMES), case_sensitive=False),
        metavar="SCHEME",
        help="How every matmul is quantized; see above.  [default: w8a8, or q8_0]",
    ),
    click.option(
        "--rule",
        type=_Rule(),
        multiple=True,
        metavar="PATTERN=SCHEME",
        help="Another scheme, or none for float, where the pattern is found in a weight's path. "
        "The first that is found wins. May be given several times.",
    ),
    click.option(
        "--alpha",
        type=AlphaType(),
        help="Smoothing strength from 0 to 1, or none.  [default: 0.5 where activations are "
        "quantized, else none]",
    ),
    click.option(
        "--search",
        is_flag=True,
        help="Search for the scales and roundings on the text, in place of --alpha: a smoothing "
        "strength for each group, and for int4 weights AWQ and GPTQ. Takes minutes more.",
    ),
    click.option(
        "--format",
        type=click.Choice(_FORMATS),
        default="sqjax",
        show_default=True,
        help="What reads the result: sqjax; vLLM and its kin; llama.cpp.",
    ),
    TEXT,
    STATS,
    output("DIR", "The quantized model (a FILE.gguf for gguf)"),
)
def quantize(
    talk: Talk,
    model: str,
    dtype: str,
    scheme: str | None,
    rule: tuple[str, ...],
    alpha: float | str | None,
    search: bool,
    format: str,
    text: Path | None,
    tokens: int | None,
    windows: int | None,
    stats: Path | None,
    output: Path,
    force: bool,
) -> None:
    """Smooth and quantize MODEL, and write it.

    It is calibrated first, unless --stats are given. The result is a MODEL again, for `eval`,
    `generate`, `compare`, `inspect` and `export`. Paths of weights, for --rule, are those that
    `inspect` shows: model/layers/0/self_attn/q_proj/kernel.

    SCHEME is one of these. Weights of 8 bits have a scale for each output channel.

    \b
    w8a8, w8a8_o1     int8 weights, int8 activations with a scale for each token
    w8a8_o2           the same, with one scale that is measured at run time
    w8a8_o3           the same, with one scale from calibration (static)
    w8a8_o3_rotated   the same, with activations that are rotated at run time
    w8a8_outliers     as w8a8, but channels above 6 in calibration stay float
    fp8, fp8_e5m2     float8 weights, float8 activations by token
    w8a16             int8 weights alone
    w4a16, w4a16_g64  int4 weights alone, in groups of 128 or of 64
    w4a8              int4 weights in groups, int8 activations by token
    w4a4              the same, with int4 activations
    w4a4_rotated      the same, with activations that are rotated at run time
    embedding_int8, embedding_int4
                      of an embedding that is no head, for --rule
    q8_0, q4_0, q4_1  8 and 4 bits of ggml, for --format gguf

    compressed-tensors takes w8a8, w8a8_o1 to w8a8_o3, fp8, w8a16, w4a16 and w4a16_g64.
    """
    how = _how(format, scheme, rule, alpha, search)
    _check_name(output, format)
    settle(scheme=how.scheme)
    if not search:
        settle(alpha=how.alpha)
    is_directory = format != "gguf"
    check_output(
        output, force, directory=is_directory, reads=(model, text, stats)
    )
    # Only now, because these load jax, and a wrong option should be told of at once.
    from sqjax.commands import quantizing
    from sqjax.commands.calibrating import (
        calibrated,
        check_asked,
        uncalibrated,
    )
    from sqjax.commands.model_argument import open_model

    sample = quantizing.needs_sample([how.scheme, *how.rules.values()])
    asked = Asked(text, tokens, windows, stats, search, sample)
    if how.needs_statistics:
        check_asked(asked)
    opened = open_model(model, dtype, talk)
    if how.needs_statistics:
        found = calibrated(opened, asked, talk, "quantize")
    else:
        found = uncalibrated(opened, "quantize")
    made = quantizing.quantized_as(opened, found.stats, how, talk)
    write = new_directory if is_directory else new_file
    with write(output, found.made_of) as new:
        talk.note(f"writing {output}")
        quantizing.write(new, opened, made, how)
    record = quantizing.record(opened, made, how, output)
    record["text"] = found.name
    talk.result(record, f"{output}: {quantizing.summary(record)}")


def _how(
    layout: str,
    scheme: str | None,
    rules: tuple[str, ...],
    alpha: float | str | None,
    search: bool,
) -> How:
    """The options together, with the defaults that depend on each other.

    Raises:
        ValueError: the scheme or the rules do not go with the format.
    """
    scheme = _USUAL[layout] if scheme is None else scheme
    is_gguf = layout == "gguf"
    known = GGUF_SCHEMES if is_gguf else tuple(SCHEMES)
    if scheme not in known:
        raise ValueError(
            f"--scheme: expected one of {', '.join(known)} for --format {layout}, got {scheme}"
        )
    if rules and is_gguf:
        raise ValueError(
            "--rule: expected none for --format gguf, whose weights are all of one type"
        )
    alpha = _alpha(layout, scheme, alpha, search)
    # At the last "=", because a pattern may hold one, and a scheme's name does not.
    split = (rule.rpartition("=") for rule in rules)
    return How(layout, scheme, {p: s for p, _, s in split}, alpha, search)


def _alpha(
    layout: str, scheme: str, alpha: float | str | None, search: bool
) -> float | str:
    """The strength of smoothing, or "none".

    Raises:
        ValueError: it is given beside --search, or GGUF is.
    """
    if search:
        others = {"--alpha": alpha is not None}
        others["--format gguf, which rounds by itself"] = layout == "gguf"
        for other, given in others.items():
            if given:
                raise ValueError(f"--search: expected it without {other}")
        return "none"
    if alpha is not None:
        return alpha
    # Where activations stay float, smoothing only makes the weights harder.
    return _ALPHA if SCHEMES.get(scheme) else "none"


def _check_name(output: Path, layout: str) -> None:
    """Raises ValueError if the name of the result is that of another format."""
    if (output.suffix == ".gguf") != (layout == "gguf"):
        problem = (
            "--format gguf writes one file. Give it a name that ends with .gguf"
            if layout == "gguf"
            else "a name that ends with .gguf is for --format gguf. Pass that, or name a directory"
        )
        raise ValueError(f"{output}: {problem}")
