"""`save`: a model and its parameters, quantized in any way, for `sqjax.models.load`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqjax._arguments import check_mapping, expect
from sqjax.files.aside import directory_written_aside
from sqjax.files.checksums import sum_of
from sqjax.files.contents import contents_of
from sqjax.files.opening import check_path
from sqjax.files.saving import SHARD, check_shard_size, told
from sqjax.files.shards import write_shards
from sqjax.models.checkpoints.family import Family
from sqjax.models.checkpoints.saved import config_of, fitted
from sqjax.models.checkpoints.writing.directory import (
    Others,
    check_target,
    others_of,
    write_files,
)
from sqjax.models.checkpoints.writing.leaves import check_leaves
from sqjax.models.checkpoints.writing.llamas import new_files
from sqjax.models.checkpoints.writing.saving import (
    AnyModel,
    check_model_of,
    check_source,
)
from sqjax.models.model import Params
from sqjax.weights.quantize import named


def save(
    directory: str | os.PathLike[str],
    model: AnyModel,
    params: Params,
    *,
    like: str | os.PathLike[str] | None = None,
    stats: Any = None,
    max_shard_bytes: int = SHARD,
    overwrite: bool = False,
    families: Sequence[Family] = (),
) -> None:
    """Writes a model with its parameters, float or quantized in any way; `load` gives both back.

    Bit for bit, as `sqjax.save`, with ``config.json`` and the tokenizer's files beside. Everything
    is checked before a byte is written. The files are written beside the directory, and renamed at
    the end, so a reader never sees half. All of them are under checksums. For other programs there
    are `save_huggingface` and `save_compressed_tensors`.

    Args:
        directory: to write. It must not be there, or be empty, unless `overwrite`.
        model: as `sqjax.models.load`, `load_encoder` or `load_vision` gave it.
        params: its parameters, layers apart or in one stack, kernels apart or fused.
        like: the directory that the model was loaded from, whose config.json and tokenizer are
            copied; None for a Llama, of a GGUF file say: then they are made of what the model
            knows.
        stats: `Stats` to keep with it: `sqjax.load_saved(directory).stats` gives them.
        max_shard_bytes: how large a file of arrays may be; an array is never divided.
        overwrite: whether a checkpoint that is there is replaced, as a whole.
        families: as when the model was loaded.

    Raises:
        ValueError: leaves are missing, too many, misshapen, or not valid; the model is another than
            that of `like`; the directory may not be written. Names the leaf or the file.
        OSError: the files can not be written. What was there stays.

    Examples:
        >>> import tempfile, jax, sqjax as sq
        >>> model = sq.models.Model(sq.models.llama_config(32, 8, 16, 1, 2, 1, 4))
        >>> params, ids = model.init(jax.random.key(0)), jax.numpy.array([[1, 2, 3]])
        >>> qparams = sq.smoothquant(model.apply, params, [ids], scheme=sq.W4A16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sq.models.save(f"{folder}/w4", model, qparams)
        ...     again, same = sq.models.load(f"{folder}/w4")
        >>> again == model, same["lm_head"]["kernel"].tensor.fmt.name
        (True, 'int4')
    """
    expected = (
        "a model as sqjax.models.load, load_encoder or load_vision gives it, and its parameters "
        "after it"
    )
    expect(isinstance(model, AnyModel), "save", expected, model)
    check_mapping(params, "save", "the parameters of a model")
    check_path(directory, "save(directory, ...)")
    target = Path(directory)
    with named("save"):
        check_source(like)
        source = None if like is None else Path(like)
        check_shard_size(max_shard_bytes)
        check_target(target, source, overwrite)
        others, absent = _files(model, source, families)
        check_leaves(model.config, params)
        config = {"model": _described(model, others, absent)}
        contents = contents_of(params, stats, config)
        try:
            with directory_written_aside(target.resolve()) as new:
                write_files(new, others)
                write_shards(new, contents, max_shard_bytes)
        except OSError as error:
            raise told(error, f"save: {directory}") from error


def _files(
    model: AnyModel, source: Path | None, families: Sequence[Family]
) -> tuple[Others, list[str]]:
    """(the files beside the parameters, the optional tensors that the model does not have)."""
    if source is None:
        return new_files(model), []
    family, config = config_of(source, families, type(model.config))
    # By the model and not by the source's tensors: a directory of `save` has none of their names.
    absent = []
    for name, changes in family.optional.items():
        is_off = [getattr(model.config, x) == y for x, y in changes.items()]
        if all(is_off):
            absent.append(name)
    check_model_of(source, fitted(family, config, absent), model)
    # The parameters say how they are quantized, whatever those of the source were.
    others = others_of(source).with_keys({"quantization_config": None})
    return others, absent


def _described(
    model: AnyModel, others: Others, absent: list[str]
) -> dict[str, Any]:
    """What is kept of the model beside its files: see `sqjax.models.checkpoints.saved`."""
    files = {"config.json": sum_of(others.config.encode())}
    for name, content in others.files.items():
        if isinstance(content, str):
            files[name] = sum_of(content.encode())
        else:
            files[name] = sum_of(content.read_bytes())
    kind = type(model.config).__name__
    return {"kind": kind, "absent": absent, "files": files}
