"""Reads a Llama model from a GGUF file (llama.cpp's format), dequantized."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sqjax.models.checkpoints.mapping import assemble, raise_problems
from sqjax.models.llama import LlamaConfig
from sqjax.models.model import Params

# GGUF's name of a tensor -> Hugging Face's, whose names `mapping` translates further.
TABLE = [
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

# LlamaConfig's field -> GGUF's key, which must be there.
SIZES = {
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_layers": "llama.block_count",
    "num_heads": "llama.attention.head_count",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "max_length": "llama.context_length",
}
# Keys that may be missing: the model's own sizes then follow from the others.
OPTIONAL = {
    "llama.attention.head_count_kv",
    "llama.attention.key_length",
    "llama.attention.value_length",
    "llama.rope.dimension_count",
    "llama.rope.freq_base",
    "llama.vocab_size",
}
# Keys that would change what the model computes, with the values that do not.
WITHOUT_EFFECT = {
    "llama.rope.scaling.type": "none",
    "llama.expert_count": 0,
    "llama.expert_used_count": 0,
    "llama.attention.sliding_window": 0,
}


def read_gguf(
    path: Path, dtype: DTypeLike = jnp.float32
) -> tuple[LlamaConfig, Params, dict[str, Any]]:
    """Reads a file: the configuration, the parameters, and all metadata, the tokenizer's too.

    Quantized tensors are dequantized to float32 and then cast to ``dtype``.

    Raises:
        ValueError: if the file is not a GGUF file or not a complete Llama model; every problem is
            listed.
        ImportError: if the `gguf` package is not installed.
    """
    package = _import_gguf()
    try:
        reader = package.GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"{path}: expected a GGUF file, got {error or 'a damaged one'}; fetch it again"
        ) from error
    metadata = {name: value.contents() for name, value in reader.fields.items()}
    stored = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {}
    for name, tensor in stored.items():
        # GGUF writes the fastest axis first: a matrix of 96 rows and 64 columns is [64, 96].
        shapes[name] = tuple(int(size) for size in tensor.shape[::-1])
    config = read_config(str(path), metadata, shapes)

    def read(name: str) -> np.ndarray:
        array = package.dequantize(stored[name].data, stored[name].tensor_type)
        return _in_halves(name, array, config)

    tensors = {
        name: (_huggingface_name(name), shape) for name, shape in shapes.items()
    }
    problems = _unreadable(reader.tensors, package.dequantize)
    params = assemble(str(path), config, tensors, read, dtype, problems)
    return config, params, metadata


def read_config(
    source: str, metadata: Mapping[str, Any], shapes: Mapping[str, tuple]
) -> LlamaConfig:
    """The configuration that the metadata describes.

    The head is tied to the embedding if there is no output tensor.

    Args:
        source: the file, for the error message.
        metadata: the file's keys and values.
        shapes: the shape of each tensor, by GGUF's name.

    Raises:
        ValueError: listing every key that is missing, or that asks for something the model here
            does not do.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"{source}: expected general.architecture 'llama', got {architecture!r}"
        )
    missing = [key for key in SIZES.values() if key not in metadata]
    problems = [f"{key}: expected a number, got none" for key in missing]
    raise_problems(source, problems + _unsupported_keys(metadata))
    sizes = {field: metadata[key] for field, key in SIZES.items()}
    usual_head_dim = sizes["hidden_size"] // sizes["num_heads"]
    head_dim = metadata.get("llama.attention.key_length", usual_head_dim)
    problems = []
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        got = metadata.get(key, head_dim)
        if got != head_dim:
            problems.append(
                f"{key}: expected the head size {head_dim}, got {got}"
            )
    raise_problems(source, problems)
    # Where there is no embedding, which `assemble` reports as missing, any size serves.
    stated_vocab_size = metadata.get("llama.vocab_size", 1)
    vocab_size, *_ = shapes.get("token_embd.weight", (stated_vocab_size,))
    return LlamaConfig(
        **sizes,
        num_kv_heads=metadata.get(
            "llama.attention.head_count_kv", sizes["num_heads"]
        ),
        head_dim=head_dim,
        vocab_size=vocab_size,
        rope_theta=metadata.get("llama.rope.freq_base", 10000.0),
        tie_embeddings="output.weight" not in shapes,
        attention_bias="blk.0.attn_q.bias" in shapes,
        mlp_bias="blk.0.ffn_gate.bias" in shapes,
    )


def _unsupported_keys(metadata: Mapping[str, Any]) -> list[str]:
    """One problem for each key of the architecture that could change what the model computes.

    A key that nobody here has heard of is one of them, because ignoring it could make a model that
    loads and computes something else.
    """
    known = {*SIZES.values(), *OPTIONAL}
    problems = []
    for key in sorted(metadata.keys() - known):
        if key.startswith("llama.") and metadata[key] != WITHOUT_EFFECT.get(
            key
        ):
            problems.append(
                f"{key} = {metadata[key]!r}: not supported, or not known to be without effect"
            )
    return problems


def _huggingface_name(name: str) -> str:
    """Hugging Face's name of a tensor; a name that is not in the table stays, for the error."""
    for pattern, other in TABLE:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(other)
    return name


def _in_halves(name: str, array: np.ndarray, config: LlamaConfig) -> np.ndarray:
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


def _unreadable(tensors: list, dequantize: Callable) -> list[str]:
    """One problem for each tensor of a type that cannot be dequantized, tried on its first row."""
    problems = []
    for tensor in tensors:
        try:
            dequantize(tensor.data[:1], tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            problems.append(
                f"{tensor.name}: expected a type that `gguf` can read, got {kind}"
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
