"""Reads a Llama model from a GGUF file (llama.cpp's format), dequantized."""

import contextlib
import re
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sqjax.files.opening import open_file
from sqjax.models.checkpoints.families.llama import LLAMA
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
from sqjax.models.checkpoints.problems import raise_problems
from sqjax.models.config import DecoderConfig, llama_config
from sqjax.models.fields import (
    EPSILON,
    POSITIVE,
    SIZE,
    Key,
    is_whole,
    read_fields,
)
from sqjax.models.model import Params

# GGUF's name of a tensor -> Hugging Face's, whose names `mapping` translates further.
HUGGINGFACE_NAMES = [
    (r"token_embd\.weight", r"model.embed_tokens.weight"),
    (
        r"blk\.(\d+)\.attn_([qkv])\.(weight|bias)",
        r"model.layers.\1.self_attn.\2_proj.\3",
    ),
    (
        r"blk\.(\d+)\.attn_output\.(weight|bias)",
        r"model.layers.\1.self_attn.o_proj.\2",
    ),
    (
        r"blk\.(\d+)\.ffn_(gate|up|down)\.(weight|bias)",
        r"model.layers.\1.mlp.\2_proj.\3",
    ),
    (
        r"blk\.(\d+)\.attn_norm\.weight",
        r"model.layers.\1.input_layernorm.weight",
    ),
    (
        r"blk\.(\d+)\.ffn_norm\.weight",
        r"model.layers.\1.post_attention_layernorm.weight",
    ),
    (r"output_norm\.weight", r"model.norm.weight"),
    (r"output\.weight", r"lm_head.weight"),
]

# What is read of the metadata. The default of a head's size and of the key/value heads follows from
# the other sizes.
_HEADS_KV = "llama.attention.head_count_kv"
_HEAD_DIM = "llama.attention.key_length"
KEYS = (
    Key("llama.embedding_length", "hidden_size", SIZE, required=True),
    Key("llama.feed_forward_length", "intermediate_size", SIZE, required=True),
    Key("llama.block_count", "num_layers", SIZE, required=True),
    Key("llama.attention.head_count", "num_heads", SIZE, required=True),
    Key(
        "llama.attention.layer_norm_rms_epsilon",
        "rms_norm_eps",
        EPSILON,
        required=True,
    ),
    Key("llama.context_length", "max_length", SIZE, required=True),
    Key(_HEADS_KV, "num_kv_heads", SIZE),
    Key(_HEAD_DIM, "head_dim", SIZE),
    Key("llama.rope.freq_base", "rope_theta", POSITIVE, 10000.0),
)
# Keys that say again what the rest says: they must agree with it.
AGAIN = (
    Key("llama.attention.value_length", "value_length", SIZE),
    Key("llama.rope.dimension_count", "rotated", SIZE),
    Key("llama.vocab_size", "vocab_size", SIZE),
)
# Keys that would change what the model computes, with the values that do not.
HARMLESS_VALUES = {
    "llama.rope.scaling.type": "none",
    "llama.expert_count": 0,
    "llama.expert_used_count": 0,
    "llama.attention.sliding_window": 0,
}


class _Part(NamedTuple):
    """One file of a checkpoint: its path, the opened file, and its header."""

    path: Path
    file: BinaryIO
    header: Header


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
            complete Llama model; every problem is listed.
        ImportError: if the `gguf` package is not installed.
    """
    package = _import_gguf()
    blocks = {
        int(kind): Block(*sizes)
        for kind, sizes in package.GGML_QUANT_SIZES.items()
    }
    with contextlib.ExitStack() as opened:
        parts = [_open(path, blocks, opened)]
        others = _paths_of_parts(parts[0])
        if others:
            parts = [_open(other, blocks, opened) for other in others]
            _check_parts(parts)
        stored = _tensors_of(parts)
        metadata = parts[0].header.metadata
        shapes = {name: tensor.shape for name, (_, tensor) in stored.items()}
        config = read_config(str(path), metadata, shapes)

        def read(name: str) -> np.ndarray:
            part, tensor = stored[name]
            kind = package.GGMLQuantizationType(tensor.kind)
            raw = read_tensor(
                part.file, part.header, tensor, blocks[tensor.kind]
            )
            array = package.dequantize(raw, kind).reshape(tensor.shape)
            return _in_halves(name, array, config)

        source = Source(str(path), shapes, read, _huggingface_name)
        problems = _unreadable(stored, package)
        params = assemble(source, LLAMA, config, dtype, problems, placement)
    return config, params, metadata


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


def _tensors_of(
    parts: list[_Part],
) -> dict[str, tuple[_Part, StoredTensor]]:
    """{name: the part that holds it, the tensor} of all parts."""
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


# The configuration --------------------------------------------------------------------------------


def read_config(
    source: str, metadata: Mapping[str, Any], shapes: Mapping[str, tuple]
) -> DecoderConfig:
    """The configuration that the metadata describes.

    The head is tied to the embedding if there is no output tensor.

    Args:
        source: the file, for the error message.
        metadata: the file's keys and values.
        shapes: the shape of each tensor of all parts, by GGUF's name.

    Raises:
        ValueError: listing every key that is missing, that is not what it must be, or that asks for
            something the model here does not do.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"{source}: expected general.architecture 'llama', got {architecture!r}"
        )
    fields, problems = read_fields(metadata, KEYS)
    again, other_problems = read_fields(metadata, AGAIN)
    problems += other_problems + _unsupported_keys(metadata)
    raise_problems(source, problems)
    fields |= _usual_heads(fields)
    # Where there is no embedding, which `assemble` reports as missing, any size serves.
    stated = again["vocab_size"]
    fields["vocab_size"], *_ = shapes.get("token_embd.weight", (stated or 1,))
    raise_problems(source, _contradictions(fields, again))
    for name in ("rms_norm_eps", "rope_theta"):
        fields[name] = float(fields[name])  # a file may write a whole number
    try:
        return llama_config(
            **fields,
            tie_embeddings="output.weight" not in shapes,
            attention_bias="blk.0.attn_q.bias" in shapes,
            mlp_bias="blk.0.ffn_gate.bias" in shapes,
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _usual_heads(fields: Mapping[str, Any]) -> dict[str, int]:
    """The fields of heads that the metadata leaves open, as they usually are."""
    usual = {
        "num_kv_heads": fields["num_heads"],
        "head_dim": fields["hidden_size"] // fields["num_heads"],
    }
    return {name: n for name, n in usual.items() if fields[name] is None}


def _contradictions(
    fields: Mapping[str, Any], again: Mapping[str, Any]
) -> list[str]:
    """One problem for each key that says something else than the rest."""
    expected = {
        "value_length": ("the head size", fields["head_dim"]),
        "rotated": ("the head size", fields["head_dim"]),
        "vocab_size": ("the embedding's rows", fields["vocab_size"]),
    }
    problems = []
    for key in AGAIN:
        what, size = expected[key.field]
        got = again[key.field]
        if got not in (None, size):
            problems.append(f"{key.key}: expected {what} {size}, got {got}")
    return problems


def _unsupported_keys(metadata: Mapping[str, Any]) -> list[str]:
    """One problem for each key of the architecture that could change what the model computes.

    A key that nobody here has heard of is one of them, because ignoring it could make a model that
    loads and computes something else.
    """
    known = set(map(attrgetter("key"), (*KEYS, *AGAIN)))
    problems = []
    for key in sorted(metadata.keys() - known):
        if key.startswith("llama.") and metadata[key] != HARMLESS_VALUES.get(
            key
        ):
            problems.append(
                f"{key} = {metadata[key]!r}: not supported, or not known to be without effect"
            )
    return problems


def _huggingface_name(name: str) -> str:
    """Hugging Face's name of a tensor; one that is not in the table stays, for the error."""
    for pattern, other in HUGGINGFACE_NAMES:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(other)
    return name


def _in_halves(
    name: str, array: np.ndarray, config: DecoderConfig
) -> np.ndarray:
    """Undoes llama.cpp's order of the query and key rows, which differs from Hugging Face's.

    Rotary embedding turns the rows of a head in pairs. llama.cpp stores a pair side by side,
    Hugging Face one of each pair in the first half of the head and the other in the second. For a
    head of 6 rows, [0, 3, 1, 4, 2, 5] becomes [0, 1, 2, 3, 4, 5]. Other tensors stay as they are.
    """
    match = re.search(r"attn_([qk])\.", name)
    if not match:
        return array
    heads = config.num_heads if match[1] == "q" else config.num_kv_heads
    rest = array.shape[1:]  # the input channels of a weight, nothing of a bias
    pairs = array.reshape(heads, config.head_dim // 2, 2, *rest)
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _unreadable(
    stored: Mapping[str, tuple[_Part, StoredTensor]], package: Any
) -> list[str]:
    """One problem for each tensor of a type that cannot be dequantized, tried on a row of zeros."""
    problems = []
    for name, (_, tensor) in stored.items():
        try:
            kind = package.GGMLQuantizationType(tensor.kind)
            _, row_bytes = package.GGML_QUANT_SIZES[kind]
            package.dequantize(np.zeros((1, row_bytes), np.uint8), kind)
        except (ValueError, KeyError):
            problems.append(
                f"{name}: expected a type of ggml, got number {tensor.kind}"
            )
        except NotImplementedError:
            problems.append(
                f"{name}: expected a type that `gguf` can read, got {kind.name}"
            )
    return problems


def _import_gguf():
    """The `gguf` package, imported here because only these files need it."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "reading a .gguf file needs the `gguf` package: pip install sqjax[demo]"
        ) from error
    return gguf
