"""`save_gguf`: a float model as llama.cpp reads it, its matrices in one of ggml's types."""

import math
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from sqjax._arguments import check_mapping, expect
from sqjax.files.aside import written_aside
from sqjax.files.opening import check_path
from sqjax.files.saving import told
from sqjax.files.tensors import NewTensor
from sqjax.models.checkpoints.gguf import import_gguf, read_metadata
from sqjax.models.checkpoints.huggingface import Checkpoint
from sqjax.models.checkpoints.mapping import Source, parameter_shapes
from sqjax.models.checkpoints.writing.floats import float_tensor
from sqjax.models.checkpoints.writing.gguf_keys import Described, describe
from sqjax.models.checkpoints.writing.leaves import (
    leaves_apart,
    refuse_quantized,
)
from sqjax.models.fields import one_of
from sqjax.models.json_files import read_object
from sqjax.models.model import Model, Params, check_model
from sqjax.models.text.gguf_metadata import gguf_metadata
from sqjax.weights.quantize import named

GgufType = Literal["q8_0", "q4_0", "q4_1", "f16", "bf16", "f32"]
#: {type: the number that `general.file_type` has for a file that is mostly of it}.
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "bf16": 32}
#: Numbers of a row that share a scale, or a scale and a minimum.
_BLOCK = 32
_NARROW = ("q4_0", "q4_1")
#: Of 4 bits these would cost most, so they have 8, as in the files of others.
_FIRST_AND_LAST = ("token_embd.weight", "output.weight")
#: What llama.cpp has in float32 whatever the file's type is: norms, routers and vectors.
_ALWAYS_WIDE = (
    "norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_inp_shexp.weight",
)
#: What a file says of itself, and may not be copied of another.
_OWN = ("architecture", "file_type", "quantization_version", "alignment")


def save_gguf(
    file: str | os.PathLike[str],
    model: Model,
    params: Params,
    dtype: GgufType = "q8_0",
    *,
    like: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes float parameters, smoothed or not, as a GGUF file, which llama.cpp reads.

    It is written for the architectures whose files `sqjax.models.load` reads: Llama, Mistral,
    Mixtral, Qwen 2 and 3 (with experts too), Gemma 1 to 3, Phi-3. Matrices are quantized by ggml's
    own rules, as the `gguf` package has them: blocks of 32 numbers of a row with one scale. Norms,
    biases and routers stay float32; with 4 bits the embedding and the head have 8. A matrix whose
    rows blocks do not fill is float16.

    Args:
        file: to write, whose name ends with ".gguf".
        model: as `sqjax.models.load` gave it.
        params: its float parameters; layers may be one stack, and kernels one by `fuse`.
        dtype: of the matrices: "q8_0", "q4_0", "q4_1", "f16", "bf16" or "f32".
        like: the .gguf file or the directory that the model was loaded from. Of a file the
            tokenizer's keys, and what `general.` says, are copied. A directory is needed where the
            tokenizer is in ``tokenizer.model``, whose scores the model does not keep. None: a
            byte-level tokenizer is described by what the model knows.
        overwrite: whether a file that is there is replaced.

    Raises:
        ValueError: leaves are missing, too many, misshapen or quantized; no architecture of
            llama.cpp's is this model; GGUF has no words for the tokenizer; the file may not be
            written. Names the leaf or the file.
        ImportError: if the `gguf` package is not installed.
        OSError: the file can not be written. What was there stays.

    Examples:
        >>> import tempfile, jax, sqjax as sq
        >>> model = sq.models.Model(sq.models.llama_config(32, 8, 16, 1, 2, 1, 4))
        >>> params = model.init(jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sq.models.save_gguf(f"{folder}/new.gguf", model, params, "f32")
        ...     again, _ = sq.models.load(f"{folder}/new.gguf")
        >>> again == model
        True
    """
    check_model(model, "save_gguf")
    check_mapping(params, "save_gguf", "the parameters of a model")
    check_path(file, "save_gguf(file, ...)")
    package = import_gguf("writing")
    target = Path(file)
    with named("save_gguf"):
        known = one_of(*_FILE_TYPES)
        expect(known.holds(dtype), "dtype", known.expected, dtype)
        _check_target(target, overwrite)
        source = _source(like)
        described = describe(model.config, source.architecture)
        keys = _keys(model, described, source)
        leaves = leaves_apart(params, _leaf_shapes(model))
        refuse_quantized(leaves, "save_gguf quantizes float parameters itself")
        tensors = list(_tensors(model, described, leaves, dtype, package))
    quantizes = {"quantization_version": 2} if "q" in dtype else {}
    keys |= {"general.file_type": _FILE_TYPES[dtype]}
    keys |= {f"general.{key}": x for key, x in quantizes.items()}
    try:
        with written_aside(target) as new:
            _write(new, described.architecture, keys, tensors, package)
    except OSError as error:
        raise told(error, f"save_gguf: {target}") from error


def _check_target(file: Path, overwrite: bool) -> None:
    problems = {
        'a name that ends with ".gguf", by which load knows it': (
            file.suffix != ".gguf"
        ),
        f"a path in a directory that exists; make {file.parent} first": (
            not file.parent.is_dir()
        ),
        "a path that is free, got a directory; choose another": file.is_dir(),
        "a path that is free, got a file; pass overwrite=True to replace it": (
            file.exists() and not overwrite
        ),
    }
    for expected, is_wrong in problems.items():
        if is_wrong:
            raise ValueError(f"{file}: expected {expected}")


def _leaf_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    return parameter_shapes(model.config, model.config.num_layers)


# What the source says -----------------------------------------------------------------------------


class _Source(NamedTuple):
    """What is known of where a model came from.

    Attributes:
        architecture: its own, as GGUF names it; None if that is not known.
        directory: with the files of its tokenizer; None for none.
        keys: of its tokenizer and of itself, if it was a GGUF file.
    """

    architecture: str | None = None
    directory: Path | None = None
    keys: Mapping[str, Any] = {}


def _source(like: str | os.PathLike[str] | None) -> _Source:
    if like is None:
        return _Source()
    path = Path(like)
    if path.is_dir():
        model_type = str(read_object(path / "config.json").get("model_type"))
        # "qwen2_moe" there is "qwen2moe" here, "gemma3_text" is "gemma3".
        name = model_type.removesuffix("_text").replace("_", "")
        return _Source(name, path)
    expected = "the .gguf file or the directory that the model was loaded from"
    expect(path.is_file(), "like", expected, str(like))
    metadata = read_metadata(path)
    own = {f"general.{key}" for key in _OWN}
    kept = {
        key: value
        for key, value in metadata.items()
        if key.startswith(("tokenizer.", "general.")) and key not in own
    }
    return _Source(metadata.get("general.architecture"), None, kept)


def _keys(
    model: Model, described: Described, source: _Source
) -> dict[str, Any]:
    """All keys and values but those of the file's type."""
    keys = {"general.type": "model", **described.keys, **source.keys}
    size = model.config.vocab_size
    tokens = source.keys.get("tokenizer.ggml.tokens")
    if tokens is not None:
        count = len(tokens)
        fits = count == size
        expected = f"a file with {size} tokens, as the model has rows"
        expect(fits, "like", expected, f"one with {count}")
    elif model.tokenizer is None:
        # What llama.cpp calls a model that is given ids.
        keys["tokenizer.ggml.model"] = "no_vocab"
    else:
        keys |= gguf_metadata(model.tokenizer, size, source.directory)
    return keys


# Tensors ------------------------------------------------------------------------------------------


class _Stored(NamedTuple):
    """A tensor of the file: its name, its type in ggml, and its array in floats."""

    name: str
    kind: Any
    floats: NewTensor


def _tensors(
    model: Model,
    described: Described,
    leaves: Mapping[str, Any],
    dtype: str,
    package: Any,
) -> Iterator[_Stored]:
    """All tensors. Each is made when its turn has come, so that memory holds one."""
    kinds = package.GGMLQuantizationType
    source = Source("the new file", described.shapes, _no_arrays)
    checkpoint = Checkpoint(
        source, described.family, model.config, (), _nothing, {}, False
    )
    for name, shape in described.shapes.items():
        found = described.family.find(name, leaves)
        assert found is not None  # the names are those of the family's rows
        kind = _type_of(name, shape, dtype)
        narrow = np.dtype(np.float16 if kind == "f16" else np.float32)
        floats = float_tensor(checkpoint, name, found, leaves, narrow)
        yield _Stored(name, kinds[kind.upper()], floats)
    for name, factors in described.factors.items():
        read = partial(np.asarray, factors)
        floats = NewTensor(factors.dtype, factors.shape, read)
        yield _Stored(name, kinds.F32, floats)


def _type_of(name: str, shape: tuple[int, ...], dtype: str) -> str:
    """The type of a tensor in a file that is mostly of another."""
    is_wide = len(shape) == 1 or name.endswith(_ALWAYS_WIDE)
    if is_wide or not dtype.startswith("q"):
        return "f32" if is_wide else dtype
    # As llama.cpp's converter does.
    if shape[-1] % _BLOCK:
        return "f16"
    is_outer = name in _FIRST_AND_LAST
    return "q8_0" if is_outer and dtype in _NARROW else dtype


def _no_arrays(name: str) -> Any:
    raise ValueError(f"{name}: a new file has no arrays")


def _nothing() -> None:
    """There are no tensors that could say something else than the rest."""


# The file -----------------------------------------------------------------------------------------


def _write(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any],
    tensors: list[_Stored],
    package: Any,
) -> None:
    """Writes the file with the package's own writer."""
    writer = package.GGUFWriter(path, architecture)
    for key, value in keys.items():
        _add_key(writer, key, value)
    for name, kind, floats in tensors:
        elements, size = package.GGML_QUANT_SIZES[kind]
        nbytes = math.prod(floats.shape) // elements * size
        writer.add_tensor_info(
            name, floats.shape, np.dtype(np.float32), nbytes, raw_dtype=kind
        )
    # All types are known by now: the header needs no array.
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, kind, floats in tensors:
            array = np.ascontiguousarray(floats.read())
            if not np.isfinite(array).all():
                raise ValueError(
                    f"save_gguf: {name}: expected finite numbers, got NaN or infinity; mend the "
                    "parameters first"
                )
            writer.write_tensor_data(package.quantize(array, kind))
    finally:
        writer.close()


def _add_key(writer: Any, key: str, value: Any) -> None:
    """Adds a key with the type that llama.cpp expects of such a value."""
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    adders[type(value)](key, value)
