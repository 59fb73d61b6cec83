"""`save_huggingface` and `save_compressed_tensors`: a model as others read it."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from sqjax._arguments import check_mapping, expect
from sqjax.files.opening import check_path
from sqjax.files.saving import SHARD, check_shard_size, told
from sqjax.models.checkpoints.family import Family
from sqjax.models.checkpoints.huggingface import Checkpoint, open_checkpoint
from sqjax.models.checkpoints.kinds import Config
from sqjax.models.checkpoints.mapping import leaf_shapes
from sqjax.models.checkpoints.writing.caches import (
    cache_scheme,
    scale_tensors,
)
from sqjax.models.checkpoints.writing.compressed import (
    compressed_tensors,
    quantization_config,
)
from sqjax.models.checkpoints.writing.directory import (
    Others,
    check_target,
    dtype_key,
    others_of,
    write_checkpoint,
)
from sqjax.models.checkpoints.writing.floats import (
    DTYPES,
    Tensors,
    float_tensor,
    taken_over,
)
from sqjax.models.checkpoints.writing.leaves import (
    Leaf,
    leaves_apart,
    refuse_quantized,
)
from sqjax.models.checkpoints.writing.llamas import (
    llama_checkpoint,
    new_files,
)
from sqjax.models.decoding.cache_scales import CacheScales
from sqjax.models.encoder import Encoder
from sqjax.models.model import Model, Params
from sqjax.models.vision_model import VisionModel
from sqjax.weights.quantize import named

_FLOAT, _QUANTIZED = "save_huggingface", "save_compressed_tensors"
_FIX = (
    "save the float parameters, or write these with "
    "sqjax.models.save_compressed_tensors"
)
#: What is written, each as it was loaded.
AnyModel = Model | Encoder | VisionModel


def save_huggingface(
    directory: str | os.PathLike[str],
    model: AnyModel,
    params: Params,
    *,
    like: str | os.PathLike[str] | None = None,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = SHARD,
    overwrite: bool = False,
    families: Sequence[Family] = (),
) -> None:
    """Writes float parameters, smoothed or not, as the Hugging Face checkpoint that they came from.

    Names, layout, config.json and tokenizer are the source's, so whatever reads that reads this
    (tried with transformers). A tied head is written from the embedding. Everything is checked
    before a byte is written; the files are written beside the directory, and renamed at the end, so
    a reader never sees half.

    Args:
        directory: to write. It must not be there, or be empty, unless `overwrite`.
        model: as `sqjax.models.load`, `load_encoder` or `load_vision` gave it.
        params: its parameters. Layers in one stack, and kernels that `fuse` made one, are taken
            apart again.
        like: the directory that the model was loaded from. None for a Llama, of a GGUF file say:
            then config.json and the tokenizer's files are made of what the model knows. What else
            is in it is copied: tensors that the model here does not read, the tokenizer's files.
        dtype: of every parameter, float32, bfloat16 or float16; None: that which it has.
        max_shard_bytes: how large a file of tensors may be; where there are several there is an
            index. A tensor is never divided.
        overwrite: whether a checkpoint that is there is replaced, as a whole.
        families: as when the model was loaded.

    Raises:
        ValueError: leaves are missing, too many, misshapen or quantized; the model is another than
            that of `like`; numbers are too large for the dtype; the directory may not be written.
            Names the leaf or the file.
        OSError: the files can not be written. What was there stays.

    Examples:
        >>> import tempfile, jax, sqjax as sq
        >>> model = sq.models.Model(sq.models.llama_config(32, 8, 16, 1, 2, 1, 4))
        >>> params = model.init(jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sq.models.save_huggingface(f"{folder}/new", model, params)
        ...     again, _ = sq.models.load(f"{folder}/new")
        >>> again == model
        True
    """
    how = _How(_FLOAT, directory, like, dtype, max_shard_bytes, overwrite)
    with _opened(how, model, params, families) as (checkpoint, leaves, others):
        refuse_quantized(leaves, _FIX)
        tensors = _float_tensors(checkpoint, leaves, how.float_dtype)
        _write(how, tensors, others)


def save_compressed_tensors(
    directory: str | os.PathLike[str],
    model: AnyModel,
    params: Params,
    *,
    like: str | os.PathLike[str] | None = None,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = SHARD,
    overwrite: bool = False,
    families: Sequence[Family] = (),
    cache_scales: CacheScales | None = None,
) -> None:
    """Writes quantized parameters as compressed-tensors, the format of vLLM's own tools.

    Codes, scales and zero points are written as they are: `sqjax.models.load` gives the same leaves
    back. config.json says how each module is quantized, and which stay float (``ignore``). int8,
    int4 and e4m3 weights are written, in groups too; with activations that stay float, or are
    quantized per token, per tensor, or static. Where a checkpoint has one tensor for several leaves
    (the q, k and v of Phi-3), these must be quantized alike; scales of whole tensors become scales
    of outputs there, if they differ.

    Args:
        directory: as for `save_huggingface`.
        model: as for `save_huggingface`.
        params: as `sqjax.quantize` gave them, before `fuse`. An embedding must be float, so of a
            model with a tied head leave it out: {"embed_tokens": None, ".*": sqjax.W8A8}.
        like: as for `save_huggingface`: the float checkpoint.
        dtype: of what stays float.
        max_shard_bytes: as for `save_huggingface`.
        overwrite: as for `save_huggingface`.
        families: as for `save_huggingface`.
        cache_scales: as `sqjax.models.cache_scales` gave them, for a server whose cache is
            quantized: ``kv_cache_scheme`` says so, and the tensors ``k_scale`` and ``v_scale`` of
            each layer's attention hold them. None: nothing is said of caches.

    Raises:
        ValueError: as for `save_huggingface`; or a leaf is quantized in a way for which the format
            has no name: smoothing at run time, outliers, two levels, e5m2, embeddings. Names it.
        OSError: the files can not be written. What was there stays.

    Examples:
        >>> import tempfile, jax, sqjax as sq
        >>> model = sq.models.Model(sq.models.llama_config(32, 8, 16, 1, 2, 1, 4))
        >>> params = model.init(jax.random.key(0))
        >>> stats = sq.calibrate(model.apply, params, [jax.numpy.array([[1, 2, 3]])])
        >>> qparams = sq.quantize(params, stats, {"lm_head": None, ".*": sq.W8A8})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sq.models.save_compressed_tensors(f"{folder}/new", model, qparams)
        ...     _, same = sq.models.load(f"{folder}/new")
        >>> same["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"].activations
        'per_token'
    """
    how = _How(_QUANTIZED, directory, like, dtype, max_shard_bytes, overwrite)
    with _opened(how, model, params, families) as (checkpoint, leaves, others):
        modules = compressed_tensors(checkpoint, leaves)
        floats = _float_tensors(
            checkpoint, leaves, how.float_dtype, but=modules.of
        )
        config = quantization_config(checkpoint, modules)
        tensors = {**floats, **modules.tensors}
        if cache_scales is not None:
            tensors |= scale_tensors(checkpoint, leaves, cache_scales)
            config["kv_cache_scheme"] = cache_scheme(cache_scales)
        _write(how, tensors, others, quantization_config=config)


class _How(NamedTuple):
    """What was asked for: the function that was called, and its arguments."""

    what: str
    directory: Any
    like: Any
    dtype: Any
    max_shard_bytes: int
    overwrite: bool

    @property
    def source(self) -> Path | None:
        """The directory whose names are taken, if there is one."""
        return Path(self.like) if _is_path(self.like) else None

    @property
    def float_dtype(self) -> np.dtype | None:
        """The dtype of floats; None for that which each has."""
        return None if self.dtype is None else np.dtype(self.dtype)

    def check(self) -> None:
        """Raises ValueError for arguments of a wrong kind."""
        check_source(self.like)
        source = self.source
        if self.dtype is not None and _dtype(self.dtype) not in DTYPES:
            known = ", ".join(dtype.name for dtype in DTYPES)
            raise ValueError(
                f"dtype: expected one of {known}, or None, got {self.dtype!r}"
            )
        check_shard_size(self.max_shard_bytes)
        check_target(Path(self.directory), source, self.overwrite)


def check_source(like: Any) -> None:
    """Raises ValueError unless this is None, or the directory of a model."""
    is_there = _is_path(like) and (Path(like) / "config.json").is_file()
    if like is not None and not is_there:
        raise ValueError(
            "like: expected the directory that the model was loaded from, with config.json and "
            f"safetensors, got {like!r}"
        )


def _is_path(x: Any) -> bool:
    return isinstance(x, str | os.PathLike)


def _dtype(x: Any) -> np.dtype | None:
    try:
        return np.dtype(x)
    except TypeError:
        return None


class _Opened(NamedTuple):
    """What a checkpoint is written from: the names of its tensors, the leaves, all other files."""

    checkpoint: Checkpoint
    leaves: dict[str, Leaf]
    others: Others


@contextlib.contextmanager
def _opened(
    how: _How, model: AnyModel, params: Params, families: Sequence[Family]
) -> Iterator[_Opened]:
    """What is written, when all of it is checked. The source's files stay open until the end."""
    expected = (
        "a model as sqjax.models.load, load_encoder or load_vision gives it, and its parameters "
        "after it"
    )
    expect(isinstance(model, AnyModel), how.what, expected, model)
    check_mapping(params, how.what, "the parameters of a model")
    check_path(how.directory, f"{how.what}(directory, ...)")
    with named(how.what):
        how.check()
        with _names_and_files(how, model, families) as (checkpoint, others):
            shapes = leaf_shapes(*checkpoint[:4])
            checkpoint.check_redundant()
            yield _Opened(checkpoint, leaves_apart(params, shapes), others)


@contextlib.contextmanager
def _names_and_files(
    how: _How, model: AnyModel, families: Sequence[Family]
) -> Iterator[tuple[Checkpoint, Others]]:
    """The source and its other files; without one, those of a Llama."""
    source = how.source
    if source is None:
        others = new_files(model)
        yield llama_checkpoint(model.config), others
        return
    # So that a file of another kind of model is refused by its name.
    kind = type(model.config)
    with open_checkpoint(source, families, kind) as checkpoint:
        if checkpoint.is_quantized:
            raise ValueError(
                f"like: expected a float checkpoint, got a quantized one, {source}; give the one "
                "that it was made of"
            )
        check_model_of(source, checkpoint.config, model)
        yield checkpoint, others_of(source)


def check_model_of(source: Path, config: Config, model: AnyModel) -> None:
    """Raises ValueError, naming a field, if the source, of this configuration, is another model."""
    for field in fields(config):
        expected = getattr(config, field.name)
        got = getattr(model.config, field.name, None)
        if got != expected:
            raise ValueError(
                f"model.config.{field.name}: expected {expected!r}, as {source} says, got {got!r}; "
                "give the directory that the model was loaded from"
            )


def _float_tensors(
    checkpoint: Checkpoint,
    leaves: Mapping[str, Leaf],
    dtype: np.dtype | None,
    but: frozenset[str] = frozenset(),
) -> Tensors:
    """All tensors of the source but some, in its order."""
    made = {}
    for name in checkpoint.source.shapes:
        # Every name is in the table, as `leaf_shapes` has checked.
        found = checkpoint.family.find(name, leaves)
        if name not in but and found is not None:
            made[name] = float_tensor(checkpoint, name, found, leaves, dtype)
    return made | taken_over(checkpoint, leaves, dtype)


def _write(how: _How, tensors: Tensors, others: Others, **keys: Any) -> None:
    """Writes the directory; `keys` are new ones of config.json."""
    directory = Path(how.directory)
    others = others.with_keys(dtype_key(others, tensors, DTYPES) | keys)
    try:
        write_checkpoint(directory, tensors, others, how.max_shard_bytes)
    except OSError as error:
        # The system's own error names no file where the disk is full.
        raise told(error, f"{how.what}: {directory}") from error
