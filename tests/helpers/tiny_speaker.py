"""A tiny Llama with a tokenizer of (nearly) bytes and a chat template, as a Hugging Face directory."""

import json

import numpy as np
from hf_directories import CONFIG, tensors
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

END = "<|end|>"
SMALL = {
    **CONFIG,
    "vocab_size": 258,
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 32,  # as the others, so that fewer programs are compiled
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


def write_speaker(directory, *, template=TEMPLATE, seed=0, **changes):
    """Writes the checkpoint; its weights are small, so that its predictions are spread."""
    directory.mkdir(exist_ok=True)
    config = {**SMALL, **changes}
    (directory / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)
    weights = {}
    for name, x in tensors(config).items():
        noise = rng.normal(size=x.shape).astype(np.float32)
        is_gain = name.endswith("norm.weight")
        weights[name] = 1 + 0.2 * noise if is_gain else 0.3 * noise
    # One channel is an outlier of every layer's activations.
    for name in weights:
        if name.endswith("layernorm.weight"):
            weights[name][3] = 12.0
    save_file(weights, directory / "model.safetensors")
    bytes_of = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    # One merge, because GGUF has no tokenizer without any.
    backend = Tokenizer(BPE(vocab={**bytes_of, "\u0120d": 256}, merges=[("\u0120", "d")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END])
    backend.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": END}
    if template is not None:
        settings["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
