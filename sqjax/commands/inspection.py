"""`sqjax inspect`: what is in a model, and what can be smoothed."""

from collections import Counter
from pathlib import Path
from typing import Any

from sqjax.commands.asked import Asked
from sqjax.commands.model_argument import Opened
from sqjax.commands.options import MODEL, STATS, TEXT, Talk, command

_EXAMPLES = """
sqjax inspect smollm2-135m
sqjax inspect ./opt-125m --text novel.txt --json
sqjax inspect smollm2-w8a8
"""


@command("inspect", _EXAMPLES, MODEL, TEXT, STATS)
def inspect(
    talk: Talk,
    model: str,
    dtype: str,
    text: Path | None,
    tokens: int | None,
    windows: int | None,
    stats: Path | None,
) -> None:
    """Show the matmuls, outliers, sizes and refusals of MODEL.

    It is calibrated for that. Of a quantized model, how its weights are quantized is shown.
    """
    from sqjax.commands.calibrating import calibrated, check_asked
    from sqjax.commands.model_argument import open_model

    asked = Asked(text, tokens, windows, stats)
    check_asked(asked)
    opened = open_model(model, dtype, talk)
    head = _what_it_is(opened)
    # Codes tell nothing of outliers, and nothing can be folded into them.
    if opened.is_quantized:
        talk.result(*_of_quantized(opened, head))
        return
    from sqjax.report import inspect as inspected

    found = calibrated(opened, asked, talk, "inspect")
    model_fn: Any = opened.model
    # An encoder is quantized as it is used: with its pooling.
    fn = model_fn.embed if opened.is_encoder else model_fn.apply
    inspection = inspected(fn, opened.params, [], stats=found.stats)
    record = head | {"text": found.name} | inspection.as_dict()
    talk.result(record, f"{_line(head)}\n{inspection}")


def _what_it_is(opened: Opened) -> dict[str, Any]:
    """The sizes of a model that its configuration says."""
    config = opened.model.config
    kind = "an encoder of texts" if opened.is_encoder else "a decoder"
    return {
        "model": opened.name,
        "kind": kind,
        "layers": config.num_layers,
        "channels": config.hidden_size,
        "vocabulary": config.vocab_size,
        "max_length": config.max_length,
    }


def _line(head: dict[str, Any]) -> str:
    return (
        f"{head['model']}: {head['kind']} of {head['layers']} layers, {head['channels']} channels, "
        f"{head['vocabulary']} tokens, texts of up to {head['max_length']}"
    )


def _of_quantized(
    opened: Opened, head: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """A record and a text of how the weights of a model are quantized."""
    from sqjax._trees import named_leaves
    from sqjax.weights.quant_weight import is_quantized
    from sqjax.weights.sizes import weight_bytes

    paths, leaves, _ = named_leaves(opened.params, is_leaf=is_quantized)
    kinds: dict[str, str] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        if is_quantized(leaf):
            kinds[path] = _kind_of(leaf)
    size = weight_bytes(opened.params)
    rest = len(paths) - len(kinds)
    lines = [
        _line(head),
        f"{size / 1e6:.0f} MB, {len(kinds)} weights quantized, {rest} other leaves float",
    ]
    for kind, count in Counter(kinds.values()).most_common():
        lines.append(f"  {count} x {kind}")
    record = head | {"bytes": size, "quantized": kinds, "float_leaves": rest}
    return record, "\n".join(lines)


def _kind_of(leaf: Any) -> str:
    """How a leaf is quantized: "int8 weight, int8 activations per token"."""
    tensor = getattr(leaf, "tensor", leaf)
    weight = f"{tensor.fmt.name} weight"
    if tensor.group is not None:
        weight += f" in groups of {tensor.group}"
    # A table whose rows are looked up meets no activation.
    if leaf is tensor:
        return f"{weight}, looked up"
    if leaf.activations is None:
        return f"{weight}, float activations"
    scales = leaf.activations.replace("_", " ")
    how = "" if leaf.rotation is None else ", rotated"
    return f"{weight}, {leaf.activation_format} activations, {scales}{how}"
