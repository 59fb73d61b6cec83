"""Make two tiny checkpoints and what SmoothQuant should give on them, with PyTorch and no line of sqjax.

Needs `torch`, `transformers` (4.57) and `safetensors` in a virtual environment of its own; the tests only
read what it wrote and never run it:

    python tests/vectors/make_reference.py           # rewrites tests/vectors/opt and tests/vectors/llama

Written from the published formulas (Xiao et al. 2022, arXiv 2211.10438) and the conventions of the authors'
code:

- smoothing: a norm and the linears that read it share s = max(a^alpha / w^(1 - alpha), 1e-5), where a is the
  absmax of each input channel over the calibration set and w = max(max |W[:, j]| over all these linears,
  1e-5). Norm weight and bias are divided by s, weight columns multiplied. Groups: attention norm -> q, k, v;
  MLP norm -> fc1 or gate, up.
- fake quantization: scale = max(absmax, 1e-5) / 127, round half to even, multiply back. Weights per output
  row. Every linear inside the decoder layers is quantized, lm_head is not, nor are attention's two matmuls.
- `w8a8`: per-token dynamic activations, each linear quantizes its own copy of its input. `w8a8_inplace`: the
  input is overwritten, as in the authors' code, so that k, v and up read what q or gate has already rounded.
  In float32 rounding twice changes nothing, so the two are equal here (in bfloat16 they are not).
- `w8a8_static`: one scale a linear, from the absmax over the calibration set of the *smoothed float* model,
  and values beyond it are clipped to +-127 (the dynamic kinds never need clipping).
"""

import copy
import pathlib

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
ALPHAS = (0.5, 0.85)
FLOOR = 1e-5
QMAX = 127

OPT_CONFIG = transformers.OPTConfig(
    hidden_size=64,
    ffn_dim=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=128,
    max_position_embeddings=64,
    word_embed_proj_dim=64,
    activation_function="relu",
    do_layer_norm_before=True,
    dropout=0.0,
    attention_dropout=0.0,
    layerdrop=0.0,
    torch_dtype="float32",
)
LLAMA_CONFIG = transformers.LlamaConfig(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
    max_position_embeddings=64,
    rope_theta=50000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    hidden_act="silu",
    torch_dtype="float32",
)
# name of a norm inside a decoder layer -> the linears that read it
OPT_GROUPS = {
    "self_attn_layer_norm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "final_layer_norm": ("fc1",),
}
LLAMA_GROUPS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


# Making the checkpoints ---------------------------------------------------------------------------


def plant(model, groups, rng):
    """Random parameters; decoder norms get outlier channels, whose readers have smaller columns there."""
    for name, parameter in model.named_parameters():
        is_norm = "norm" in name
        if name.endswith("bias"):
            value = 0.1 * rng.standard_normal(parameter.shape)
        elif is_norm:
            value = 1 + 0.2 * rng.standard_normal(parameter.shape)
        elif "embed" in name:
            value = 0.4 * rng.standard_normal(parameter.shape)
        else:
            value = 0.12 * rng.standard_normal(parameter.shape)
        parameter.data = torch.tensor(value, dtype=torch.float32)
    for layer in decoder(model).layers:
        for norm_name, linear_names in groups.items():
            norm = layer.get_submodule(norm_name)
            channels = rng.choice(norm.weight.shape[0], 5, replace=False)
            factors = torch.tensor(rng.uniform(10, 40, channels.shape), dtype=torch.float32)
            norm.weight.data[channels] *= factors
            if getattr(norm, "bias", None) is not None:
                norm.bias.data[channels] *= factors
            for linear_name in linear_names:
                layer.get_submodule(linear_name).weight.data[:, channels] /= factors**0.8


def decoder(model):
    return model.model.decoder if hasattr(model.model, "decoder") else model.model


def linears(module):
    return {
        name: child for name, child in module.named_modules() if isinstance(child, torch.nn.Linear)
    }


def quantized_linears(model):
    return {name: child for name, child in linears(model).items() if name != "lm_head"}


# The reference algorithm --------------------------------------------------------------------------


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def input_absmax(model, ids):
    """Per-channel absmax of the input of every nn.Linear, over all tokens."""
    seen = {}

    def observe(name):
        def hook(module, args):
            seen[name] = args[0].detach().abs().reshape(-1, args[0].shape[-1]).amax(0)

        return hook

    handles = [
        child.register_forward_pre_hook(observe(name)) for name, child in linears(model).items()
    ]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def smooth(model, groups, absmax, alpha):
    """A smoothed copy of the model, and s by name of the norm."""
    model = copy.deepcopy(model)
    names = {id(module): name for name, module in model.named_modules()}
    scales = {}
    for layer in decoder(model).layers:
        for norm_name, linear_names in groups.items():
            norm = layer.get_submodule(norm_name)
            readers = [layer.get_submodule(linear_name) for linear_name in linear_names]
            a = absmax[names[id(readers[0])]]
            w = (
                torch.stack([reader.weight.abs().amax(0) for reader in readers])
                .amax(0)
                .clamp(min=FLOOR)
            )
            s = (a.pow(alpha) / w.pow(1 - alpha)).clamp(min=FLOOR)
            norm.weight.div_(s)
            if getattr(norm, "bias", None) is not None:
                norm.bias.div_(s)
            for reader in readers:
                reader.weight.mul_(s[None, :])
            scales[names[id(norm)]] = s
    return model, scales


def fake_quantize(x, absmax):
    scale = absmax.clamp(min=FLOOR) / QMAX
    return (x / scale).round().clamp(-QMAX, QMAX) * scale


@torch.no_grad()
def quantize(model, kind, absmax=None):
    """A fake-quantized copy. `kind`: per_token, per_token_inplace, per_tensor, static (needs `absmax`)."""
    model = copy.deepcopy(model)

    def per_token(module, args):
        return (fake_quantize(args[0], args[0].abs().amax(-1, keepdim=True)),)

    def per_token_inplace(module, args):
        args[0].copy_(per_token(module, args)[0])

    def per_tensor(module, args):
        return (fake_quantize(args[0], args[0].abs().amax()),)

    def static(bound):
        return lambda module, args: (fake_quantize(args[0], bound.to(args[0].dtype)),)

    for name, linear in quantized_linears(model).items():
        linear.weight.copy_(fake_quantize(linear.weight, linear.weight.abs().amax(1, keepdim=True)))
        hook = {
            "per_token": per_token,
            "per_token_inplace": per_token_inplace,
            "per_tensor": per_tensor,
            "static": static(absmax[name].amax()) if kind == "static" else None,
        }[kind]
        linear.register_forward_pre_hook(hook)
    return model


# Writing ------------------------------------------------------------------------------------------


def make(directory, model_class, config, groups, seed):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model = model_class(config).eval().to(torch.float32)
    plant(model, groups, rng)
    model.tie_weights()
    ids_calibration = torch.tensor(rng.integers(4, config.vocab_size, (4, 32)))
    ids = torch.tensor(rng.integers(4, config.vocab_size, (2, 32)))

    directory.mkdir(exist_ok=True)
    model.save_pretrained(directory, safe_serialization=True)
    (directory / "generation_config.json").unlink(missing_ok=True)
    model = model_class.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    ).eval()

    reference = {"ids_calibration": ids_calibration, "ids": ids, "logits": logits(model, ids)}
    absmax = input_absmax(model, ids_calibration)
    reference |= {f"absmax/{name}": value for name, value in absmax.items()}

    rows = []
    for label in ("none", *map(str, ALPHAS)):
        smoothed, smoothed_absmax = model, absmax
        if label != "none":
            smoothed, scales = smooth(model, groups, absmax, float(label))
            smoothed_absmax = input_absmax(smoothed, ids_calibration)
            before = model.state_dict()
            changed = {
                name: value
                for name, value in smoothed.state_dict().items()
                if not value.equal(before[name])
            }
            reference |= {f"smoothed/{label}/{name}": value for name, value in changed.items()}
            reference |= {f"scales/{label}/{name}": value for name, value in scales.items()}
            reference[f"smoothed_logits/{label}"] = logits(smoothed, ids)
        reference |= {
            f"static_scale/{label}/{name}": smoothed_absmax[name].amax().clamp(min=FLOOR) / QMAX
            for name in quantized_linears(model)
        }
        for kind, key in [
            ("per_token", "w8a8"),
            ("per_token_inplace", "w8a8_inplace"),
            ("static", "w8a8_static"),
            ("per_tensor", None),
        ]:
            quantized = quantize(smoothed, kind, smoothed_absmax)
            result = logits(quantized, ids)
            # the same quantized model in float64 shows how far rounding flips alone carry the result
            twin = logits(quantized.double(), ids)
            rows.append(
                (
                    key or "(dynamic per-tensor, not stored)",
                    label,
                    error(result, reference["logits"]),
                    error(twin, result),
                )
            )
            if key and not (kind == "per_token_inplace" and label == "none"):
                reference[f"{key}/{label}"] = result
        if label != "none":
            float_error = error(reference[f"smoothed_logits/{label}"], reference["logits"])
            rows.append(("smoothed_logits", label, float_error, 0.0))

    arrays = {}
    for key, value in reference.items():
        array = value.detach().numpy()
        arrays[key] = array.astype(np.float32 if array.dtype.kind == "f" else np.int32)
        assert np.isfinite(arrays[key]).all(), key
    np.savez_compressed(directory / "reference.npz", **arrays)

    print(f"\n{directory.name}: std of the logits {reference['logits'].std():.3f}")
    print(f"{'variant':36}{'alpha':>6}{'error':>12}{'f64 vs f32':>12}")
    for variant, label, value, noise in sorted(rows, key=lambda row: row[0]):
        print(f"{variant:36}{label:>6}{value:12.2e}{noise:12.2e}")


def error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    make(HERE / "opt", transformers.OPTForCausalLM, OPT_CONFIG, OPT_GROUPS, seed=1)
    make(HERE / "llama", transformers.LlamaForCausalLM, LLAMA_CONFIG, LLAMA_GROUPS, seed=2)
