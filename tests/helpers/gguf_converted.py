"""Tiny checkpoints as llama.cpp's converter would write them, in GGUF.

What it does is said here once more and apart from the package's tables: names come from the `gguf`
package, which the converter takes them from.
"""

import gguf
import numpy as np

#: model_type of config.json -> architecture.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
#: Tiny checkpoints whose architectures GGUF has.
CASES = (
    "llama",
    "llama_biases",
    "llama_grouped",
    "llama_linear",
    "llama_llama3",
    "llama_tied",
    "llama_yarn",
    "mistral",
    "mistral_nemo",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3_text_plain",
    "phi3",
    "phi3_longrope_long",
    "phi4_mini",
)
LINEAR, YARN = "linear", "yarn"


def metadata(config):
    """The architecture, and {key without it: value}, of a config.json."""
    get = config.get
    found = {
        "block_count": get("num_hidden_layers"),
        "context_length": get("max_position_embeddings"),
        "embedding_length": get("hidden_size"),
        "feed_forward_length": get("intermediate_size"),
        "attention.head_count": get("num_attention_heads"),
        "attention.head_count_kv": get("num_key_value_heads"),
        "attention.key_length": get("head_dim"),
        "attention.value_length": get("head_dim"),
        "attention.layer_norm_rms_epsilon": get("rms_norm_eps"),
        "rope.freq_base": get("rope_theta"),
        "rope.freq_base_swa": get("rope_local_base_freq"),
        "attn_logit_softcapping": get("attn_logit_softcapping"),
        "final_logit_softcapping": get("final_logit_softcapping"),
        "expert_count": get("num_local_experts", get("num_experts")),
        "expert_used_count": get("num_experts_per_tok"),
        "expert_feed_forward_length": get("moe_intermediate_size"),
        "expert_shared_feed_forward_length": get("shared_expert_intermediate_size"),
        "attention.sliding_window": get("sliding_window"),
    }
    architecture = ARCHITECTURES[get("model_type")]
    head = get("head_dim") or get("hidden_size") // get("num_attention_heads")
    if architecture == "llama":
        found |= {"vocab_size": get("vocab_size"), "rope.dimension_count": head}
    if architecture == "phi3":
        turning = int(head * get("partial_rotary_factor", 1.0))
        found |= {"rope.dimension_count": turning, **_longrope(config)}
    if architecture in ("gemma2", "gemma3"):
        # The converter writes neither, because these are the models' usual ones.
        sliding = [kind == "sliding_attention" for kind in get("layer_types")]
        found["attention.sliding_window_pattern"] = sliding
        found["attention.scale"] = get("query_pre_attn_scalar") ** -0.5
    found |= _scaling(get("rope_scaling") or {})
    return architecture, {key: value for key, value in found.items() if value is not None}


def _scaling(scaling):
    kind = scaling.get("rope_type")
    if kind not in (LINEAR, YARN):
        return {}
    return {
        "rope.scaling.type": kind,
        "rope.scaling.factor": scaling["factor"],
        "rope.scaling.original_context_length": scaling.get("original_max_position_embeddings"),
        "rope.scaling.yarn_beta_fast": scaling.get("beta_fast"),
        "rope.scaling.yarn_beta_slow": scaling.get("beta_slow"),
        "rope.scaling.yarn_attn_factor": scaling.get("attention_factor"),
    }


def _longrope(config):
    original = config["original_max_position_embeddings"]
    found = {"rope.scaling.original_context_length": original}
    if config.get("rope_scaling"):
        ratio = config["max_position_embeddings"] / original
        growth = np.log(ratio) / np.log(original) if ratio > 1 else 0.0
        found["rope.scaling.attn_factor"] = float(np.sqrt(1 + growth))
    return found


def tensors(config, weights):
    """The tensors under GGUF's names, as (out, in), from those of a Hugging Face checkpoint."""
    architecture, _ = metadata(config)
    layers = config["num_hidden_layers"]
    number = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, layers)
    found = {}
    for name, array in {**_stacked(weights), **_factors(config)}.items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        found[theirs] = _changed(architecture, config, name, array)
    return found


def _stacked(weights):
    """The weights with the experts of each layer as one array."""
    found, experts = {}, {}
    for name, array in weights.items():
        before, is_expert, rest = name.partition(".experts.")
        if is_expert:
            number, _, part = rest.partition(".")
            experts.setdefault(f"{before}.experts.{part}", {})[int(number)] = array
        else:
            found[name] = array
    for name, arrays in experts.items():
        # For Mixtral the converter says "layers.0.feed_forward.experts.w1".
        merged = name.replace("model.layers", "layers") if "block_sparse_moe" in name else name
        merged = merged.replace("block_sparse_moe", "feed_forward")
        found[merged] = np.stack([arrays[i] for i in sorted(arrays)])
    return found


def _factors(config):
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") == "llama3":
        return {"rope_freqs.weight": llama3_factors(config)}
    found = {}
    for kind in ("long", "short"):
        if f"{kind}_factor" in scaling:
            factors = np.float32(scaling[f"{kind}_factor"])
            found[f"rope_factors_{kind}.weight"] = factors
    return found


def llama3_factors(config):
    """By what the frequencies of Llama 3 are divided, by wavelengths, as the converter has it."""
    scaling, dim = config["rope_scaling"], config["head_dim"]
    length = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factors = []
    for i in range(0, dim, 2):
        wavelength = 2 * np.pi * config["rope_theta"] ** (i / dim)
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(scaling["factor"])
        else:
            smooth = (length / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.float32(factors)


def _changed(architecture, config, name, array):
    """What the converter changes."""
    if architecture == "llama" and "q_proj" in name:
        return paired(array, config["num_attention_heads"])
    if architecture == "llama" and "k_proj" in name:
        return paired(array, config["num_key_value_heads"])
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return array + np.float32(1)
    return array


def paired(rows, heads):
    """Of each head, the rows that rotate together side by side: of 6, [0, 3, 1, 4, 2, 5]."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_file(path, architecture, metadata, weights, kinds=None):
    """Writes a file. `kinds` is {name: (type, bytes)} for tensors that are not float32."""
    writer = gguf.GGUFWriter(path, architecture)
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in metadata.items():
        add[type(value)](key, value)
    for name, array in weights.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    for name, (kind, raw) in (kinds or {}).items():
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write(path, architecture, keys, weights, kinds=None):
    """The same, with keys that lack the architecture in front."""
    whole = {}
    for key, value in keys.items():
        whole[key if key.startswith("split.") else f"{architecture}.{key}"] = value
    return write_file(path, architecture, whole, weights, kinds)


def convert(path, config, weights):
    """Writes a Hugging Face checkpoint as a GGUF file."""
    architecture, keys = metadata(config)
    return write(path, architecture, keys, tensors(config, weights))
