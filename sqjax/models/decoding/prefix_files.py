"""`save_prefix` and `load_prefix`: a prefix as one file, beside the model that it belongs to."""

import os
from dataclasses import MISSING, fields
from typing import Any

from sqjax._arguments import expect
from sqjax.files.loading import load_saved
from sqjax.files.saving import save
from sqjax.models.cache import PrefixCache
from sqjax.models.decoding.prefixes import Prefix, check_prefix_ids
from sqjax.models.model import Model, check_model, check_prefix


def save_prefix(path: str | os.PathLike[str], prefix: Prefix) -> None:
    """Writes a prefix to a safetensors file, bit for bit, by `sqjax.save`; `load_prefix` reads it.

    Its tokens and what the model computes stand in the file, so that another model's is refused.

    Args:
        path: "prefix.safetensors", say; a file that is there is replaced.
        prefix: what `sqjax.models.prefix` made: that of the float parameters which were quantized.

    Raises:
        ValueError: it is no prefix, or its arrays are traced or deleted.
        OSError: it can not be written.

    Examples:
        >>> import tempfile, jax, sqjax as sq
        >>> model = sq.models.Model(sq.models.llama_config(32, 8, 16, 1, 2, 1, 4))
        >>> prefix = sq.models.prefix(model, model.init(jax.random.key(0)), ids=[7, 5])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sq.models.save_prefix(f"{folder}/prefix.safetensors", prefix)
        ...     same = sq.models.load_prefix(f"{folder}/prefix.safetensors", model)
        >>> same.ids
        (7, 5)
    """
    expected = "what sqjax.models.prefix returns"
    expect(isinstance(prefix, Prefix), "save_prefix: prefix", expected, prefix)
    tree = {
        "keys": list(prefix.cache.keys),
        "values": list(prefix.cache.values),
    }
    described = {"ids": list(prefix.ids), "model": _said(prefix.model)}
    save(path, tree, config={"prefix": described})


def load_prefix(path: str | os.PathLike[str], model: Model) -> Prefix:
    """The prefix that `save_prefix` wrote, for its model.

    Args:
        path: of the file.
        model: a `Model` that computes the same. That the parameters are the same too, nobody can
            see: keep the file beside theirs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, holds something else, or is another model's: names what differs.
    """
    check_model(model, "load_prefix")
    saved = load_saved(path)
    described = (saved.config or {}).get("prefix")
    if described is None:
        raise ValueError(
            f"load_prefix: {path}: expected what save_prefix wrote, got another tree: sqjax.load "
            "reads it"
        )
    theirs, ours = described["model"], _said(model)
    differing = [
        f"{name} = {theirs.get(name, 'the default')}, not {ours.get(name, 'the default')}"
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name)
    ]
    if differing:
        raise ValueError(
            f"load_prefix: {path}: expected a prefix of this model, got one of another, with "
            f"{'; '.join(differing)}; make it with sqjax.models.prefix(model, params, ...)"
        )
    cache = PrefixCache(
        tuple(saved.params["keys"]), tuple(saved.params["values"])
    )
    check_prefix(model.config, cache)
    return Prefix(model, check_prefix_ids(model, described["ids"]), cache)


def _said(model: Model) -> dict[str, Any]:
    """What a model computes, by the fields that are not the default.

    Without the others a file can still be read when there are more fields than when it was written.
    """
    said = {}
    for field in fields(model.config):
        value = getattr(model.config, field.name)
        if field.default is MISSING or value != field.default:
            said[field.name] = repr(value)
    return said
