"""Reads a model from a GGUF file (llama.cpp's format), dequantized."""

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sqjax.files.opening import open_file
from sqjax.models.checkpoints.gguf_architectures import FACTORS, ONE_ROW
from sqjax.models.checkpoints.gguf_config import read_config
from sqjax.models.checkpoints.gguf_file import (
    Block,
    Header,
    StoredTensor,
    read_header,
    read_tensor,
)
from sqjax.models.checkpoints.mapping import (
    Placement,
    Source,
    assemble,
    on_the_default_device,
)
from sqjax.models.config import DecoderConfig
from sqjax.models.fields import is_whole
from sqjax.models.model import Params


class _Part(NamedTuple):
    """One file of a checkpoint: its path, the opened file, and its header."""

    path: Path
    file: BinaryIO
    header: Header


#: {a tensor's name: the part that holds it, the tensor}.
_Stored = Mapping[str, tuple[_Part, StoredTensor]]


def read_gguf(
    path: Path,
    dtype: DTypeLike = jnp.float32,
    placement: Placement = on_the_default_device,
) -> tuple[DecoderConfig, Params, dict[str, Any]]:
    """Reads a file: the configuration, the parameters, and all metadata, the tokenizer's too.

    Of a checkpoint in parts, which are named as model-00001-of-00003.gguf, any part may be named:
    all are read. Quantized tensors are dequantized to float32 and then cast to ``dtype``.

    Raises:
        ValueError: if a file is not a GGUF file, a part is missing, or all together are not a
            complete model of an architecture that is known; every problem is listed.
        ImportError: if the `gguf` package is not installed.
    """
    package = import_gguf()
    blocks = _blocks(package)
    with contextlib.ExitStack() as opened:
        parts = [_open(path, blocks, opened)]
        others = _paths_of_parts(parts[0])
        if others:
            parts = [_open(other, blocks, opened) for other in others]
            _check_parts(parts)
        stored = _tensors_of(parts)
        metadata = parts[0].header.metadata
        shapes = {name: _shape(tensor) for name, (_, tensor) in stored.items()}

        def read(name: str) -> np.ndarray:
            part, tensor = stored[name]
            kind = package.GGMLQuantizationType(tensor.kind)
            block = blocks[tensor.kind]
            raw = read_tensor(part.file, part.header, tensor, block)
            return package.dequantize(raw, kind).reshape(_shape(tensor))

        unreadable = _unreadable(stored, package)
        factors = {}
        for name in FACTORS:
            if name in stored and name not in unreadable:
                factors[name] = read(name)
                del shapes[name]
        family, config = read_config(str(path), metadata, shapes, factors)
        source = Source(str(path), shapes, read)
        problems = unreadable.values()
        params = assemble(source, family, config, dtype, problems, placement)
    return config, params, metadata


def read_metadata(path: Path) -> dict[str, Any]:
    """The keys and values of a file, or of the first part of one.

    Raises:
        ValueError: it is no GGUF file.
        ImportError: if the `gguf` package is not installed.
    """
    blocks = _blocks(import_gguf())
    with contextlib.ExitStack() as opened:
        return _open(path, blocks, opened).header.metadata


def _blocks(package: Any) -> dict[int, Block]:
    """How each type is stored, by its number."""
    return {
        int(kind): Block(*sizes)
        for kind, sizes in package.GGML_QUANT_SIZES.items()
    }


def _shape(tensor: StoredTensor) -> tuple[int, ...]:
    """A tensor's shape; a matrix of one row is one, though some files have it as a vector."""
    is_vector = len(tensor.shape) == 1
    is_matrix = is_vector and tensor.name.endswith(ONE_ROW)
    return (1, *tensor.shape) if is_matrix else tensor.shape


def _open(
    path: Path, blocks: dict[int, Block], opened: contextlib.ExitStack
) -> _Part:
    """One file, which stays open until `opened` ends."""
    file = opened.enter_context(open_file(path))
    try:
        return _Part(path, file, read_header(file, blocks))
    except ValueError as error:
        raise ValueError(
            f"{path}: expected a GGUF file, got {error}; fetch it again"
        ) from error


# Parts --------------------------------------------------------------------------------------------


def _paths_of_parts(part: _Part) -> list[Path]:
    """The files of a checkpoint of which one part is known; [] for a checkpoint in one file.

    Raises:
        ValueError: some of them are missing, or the name does not say where they are.
    """
    count = part.header.metadata.get("split.count", 1)
    named = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", part.path.name)
    of_name = int(named[3]) if named else 1
    if not is_whole(count) or max(count, 1) != of_name:
        raise ValueError(
            f"{part.path}: expected a file that is whole, or parts that are named as "
            f"model-00001-of-00003.gguf, got split.count = {count!r}; give all parts the names "
            "that they were made with"
        )
    if named is None or of_name == 1:
        return []
    paths = [
        part.path.with_name(f"{named[1]}-{i + 1:05d}-of-{of_name:05d}.gguf")
        for i in range(of_name)
    ]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"{part.path}: expected all {of_name} parts beside each other, {len(missing)} are "
            f"missing: {missing[:5]}; fetch them"
        )
    return paths


def _check_parts(parts: list[_Part]) -> None:
    """Raises ValueError unless these are all parts of one checkpoint, in order."""
    for number, part in enumerate(parts):
        metadata = part.header.metadata
        got = metadata.get("split.no"), metadata.get("split.count")
        if got != (number, len(parts)):
            raise ValueError(
                f"{part.path}: expected split.no and split.count to be {(number, len(parts))}, "
                f"got {got}; fetch it again"
            )
    found = sum(len(part.header.tensors) for part in parts)
    stated = parts[0].header.metadata.get("split.tensors.count", found)
    if stated != found:
        raise ValueError(
            f"{parts[0].path}: expected {stated} tensors (split.tensors.count) in all parts, got "
            f"{found}; fetch them again"
        )


def _tensors_of(parts: list[_Part]) -> _Stored:
    """The tensors of all parts."""
    stored: dict[str, tuple[_Part, StoredTensor]] = {}
    for part in parts:
        for tensor in part.header.tensors:
            if tensor.name in stored:
                other, _ = stored[tensor.name]
                raise ValueError(
                    f"{part.path}: expected each tensor in one part, got {tensor.name}, which is "
                    f"in {other.path.name} too; fetch both again"
                )
            stored[tensor.name] = part, tensor
    return stored


# Types --------------------------------------------------------------------------------------------


def _unreadable(stored: _Stored, package: Any) -> dict[str, str]:
    """{name: problem} of tensors of types that cannot be dequantized, tried on a row of zeros."""
    problems = {}
    for name, (_, tensor) in stored.items():
        try:
            kind = package.GGMLQuantizationType(tensor.kind)
            _, row_bytes = package.GGML_QUANT_SIZES[kind]
            package.dequantize(np.zeros((1, row_bytes), np.uint8), kind)
        except (ValueError, KeyError):
            problems[name] = (
                f"{name}: expected a type of ggml, got number {tensor.kind}"
            )
        except NotImplementedError:
            problems[name] = (
                f"{name}: expected a type that `gguf` can read, got {kind.name}"
            )
    return problems


def import_gguf(what: str = "reading") -> Any:
    """The `gguf` package, imported here because only these files need it."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            f"{what} a .gguf file needs the `gguf` package: pip install sqjax[demo]"
        ) from error
    return gguf
