"""Any of Hugging Face's Flax models, from float to jitted int8.

    python examples/huggingface_flax.py

The model is a small random OPT with a few outlier channels, as large models have, so nothing is
downloaded. A trained one: FlaxOPTForCausalLM.from_pretrained("facebook/opt-125m"). It needs
transformers 4, the last with Flax classes. The error is that of the logits.
"""

import jax
import numpy as np
from transformers import FlaxOPTForCausalLM, OPTConfig

import sqjax as sq


def main() -> dict[str, float]:
    sizes = {
        "vocab_size": 512,
        "hidden_size": 128,
        "ffn_dim": 512,
        "max_position_embeddings": 64,
    }
    config = OPTConfig(
        **sizes, num_hidden_layers=1, num_attention_heads=4, init_std=0.1
    )
    model = FlaxOPTForCausalLM(config, _do_init=False)
    params = jax.jit(model.init_weights, static_argnums=1)(
        jax.random.key(0), (1, 1)
    )
    for layer in params["model"]["decoder"]["layers"].values():
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            layer[norm]["scale"] = layer[norm]["scale"].at[:4].set(30.0)
    fn, params = sq.models.from_flax(model, params, outputs="logits")
    *batches, ids = np.random.default_rng(0).integers(4, 512, (5, 2, 32))

    stats = sq.calibrate(fn, params, batches)
    run, logits = jax.jit(sq.quantized(fn)), jax.jit(fn)(params, ids)
    errors = {}
    for name, weights in (
        ("unsmoothed", params),
        ("smoothed", sq.smooth(params, stats, alpha=0.5)),
    ):
        int8 = run(sq.quantize(weights, stats, sq.W8A8), ids)
        errors[name] = float(
            np.linalg.norm(int8 - logits) / np.linalg.norm(logits)
        )
        print(f"W8A8, {name}: relative error {errors[name]:.2%}")
    return errors


if __name__ == "__main__":
    main()
