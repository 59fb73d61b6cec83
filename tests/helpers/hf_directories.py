"""Tiny Llama checkpoints as Hugging Face directories, written with safetensors."""

import json

import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 12,
    "intermediate_size": 24,  # as many as all heads have, so that fewer programs are compiled
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 128,
}


def tensors(config=CONFIG, dtype=np.float32):
    """A checkpoint's tensors, (out, in), spelled out from the configuration alone."""
    h, f, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], h), "model.norm.weight": (h,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], h)
    for i in range(config["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj": (q, h),
            "self_attn.k_proj": (kv, h),
            "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, q),
            "mlp.gate_proj": (f, h),
            "mlp.up_proj": (f, h),
            "mlp.down_proj": (h, f),
            "input_layernorm": (h,),
            "post_attention_layernorm": (h,),
        }
        biased = ("self_attn",) * config["attention_bias"] + ("mlp",) * config["mlp_bias"]
        for name, shape in layer.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
            if name.startswith(biased or "-"):
                shapes[f"model.layers.{i}.{name}.bias"] = shape[:1]
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write(directory, config=CONFIG, weights=None):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors(config) if weights is None else weights, directory / "model.safetensors")
    return directory


def shard(directory, weights, config=CONFIG):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    names = sorted(weights)
    files = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, directory / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
