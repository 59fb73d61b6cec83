"""Tiny Llama checkpoints as GGUF files, written with the `gguf` package."""

import gguf
import numpy as np
from gguf_converted import paired, write_file

METADATA = {
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.key_length": 8,
    "llama.attention.value_length": 8,
    "llama.rope.dimension_count": 8,
    "llama.rope.freq_base": 5000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.context_length": 128,
}


def tensors(tied=False):
    """Original matrices under GGUF's names, (out, in), queries and keys in Hugging Face's order of rows."""
    shapes = {"token_embd.weight": (31, 64), "output_norm.weight": (64,)}
    if not tied:
        shapes["output.weight"] = (31, 64)
    for i in range(2):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (64,),
            f"blk.{i}.ffn_norm.weight": (64,),
            f"blk.{i}.attn_q.weight": (32, 64),
            f"blk.{i}.attn_k.weight": (16, 64),
            f"blk.{i}.attn_v.weight": (16, 64),
            f"blk.{i}.attn_output.weight": (64, 32),
            f"blk.{i}.ffn_gate.weight": (96, 64),
            f"blk.{i}.ffn_up.weight": (96, 64),
            f"blk.{i}.ffn_down.weight": (64, 96),
        }
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def interleaved(rows):
    """llama.cpp's order: of each head of 8 rows, the rows that rotate together side by side."""
    return paired(rows, len(rows) // 8)


def write(path, weights=None, metadata=METADATA, architecture="llama", quantized=()):
    floats, kinds = {}, {}
    for name, array in (tensors() if weights is None else weights).items():
        array = interleaved(array) if ".attn_q." in name or ".attn_k." in name else array
        if name in quantized:
            kind = gguf.GGMLQuantizationType.Q8_0
            kinds[name] = kind, gguf.quantize(array, kind)
        else:
            floats[name] = array
    return write_file(path, architecture, metadata, floats, kinds)
