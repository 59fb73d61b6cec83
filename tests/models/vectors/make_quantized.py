"""Makes `quantized/`: weights as compressed-tensors stores them, and what it reads back of them.

Run by hand in an environment with compressed-tensors (0.20.1) and torch:

    python tests/models/vectors/make_quantized.py

compressed_tensors.json: {case: quantization_config of a config.json}.
compressed_tensors.npz: "case/tensor" of each case: the module's tensors (float8 as its bytes), and
    "case/expected", the float32 weight that compressed-tensors makes of them.
awq.npz: qweight, qzeros and scales as AutoAWQ packs them; values, zero: the codes around 0 that
    compressed-tensors' converter reads there, outputs first.
"""

import json
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)
from compressed_tensors.quantization.utils import calculate_qparams

HERE = Path(__file__).parent / "quantized"
OUT, IN = 12, 40
TOKEN = {"num_bits": 8, "dynamic": True, "strategy": "token"}
FP8_TOKEN = {**TOKEN, "type": "float"}
FP8_STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor"}

#: {case: (format, weights, activations)}.
CASES = {
    "int8_channel": ("int-quantized", {"strategy": "channel"}, TOKEN),
    "int8_tensor": ("int-quantized", {"strategy": "tensor"}, TOKEN),
    "int8_static": ("int-quantized", {"strategy": "channel"}, {"strategy": "tensor"}),
    "int8_packed": ("pack-quantized", {"strategy": "channel"}, None),
    "int4_group": ("pack-quantized", {"num_bits": 4, "group_size": 8}, None),
    "int4_zeros": ("pack-quantized", {"num_bits": 4, "group_size": 8, "symmetric": False}, None),
    "int4_channel": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "channel", "symmetric": False},
        None,
    ),
    "int4_naive": ("naive-quantized", {"num_bits": 4, "group_size": 8}, None),
    "fp8_tensor": ("float-quantized", {"type": "float", "strategy": "tensor"}, FP8_STATIC),
    "fp8_channel": ("float-quantized", {"type": "float", "strategy": "channel"}, FP8_TOKEN),
    "fp8_block": (
        "naive-quantized",
        {"type": "float", "strategy": "block", "block_structure": [8, 8]},
        None,
    ),
}


def ranges(weight, args):
    """(min, max) of what shares a scale, in the scale's shape."""
    if args.strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    rows, columns = {
        "channel": (1, IN),
        "group": (1, args.group_size),
        "block": args.block_structure,
    }[args.strategy]
    padded = torch.nn.functional.pad(weight, (0, -IN % columns, 0, -OUT % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    return blocks.amin((1, 3)), blocks.amax((1, 3))


def module(scheme, format_, seed):
    """({name: tensor}, the weight that is read back)."""
    torch.manual_seed(seed)
    weight = torch.randn(OUT, IN)
    scale, zero = calculate_qparams(*ranges(weight, scheme.weights), scheme.weights)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    activations = scheme.input_activations
    if activations is not None and not activations.dynamic:
        state["input_scale"] = torch.tensor([0.0625])
    compressor = BaseCompressor.get_value_from_registry(format_)
    stored = compressor.compress(state, scheme)
    return stored, compressor.decompress(stored, scheme)["weight"]


def as_numpy(x):
    return (x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x).numpy()


def main():
    HERE.mkdir(exist_ok=True)
    configs, arrays = {}, {}
    for seed, (name, (format_, weights, activations)) in enumerate(CASES.items()):
        scheme = QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArgs(**weights),
            input_activations=activations and QuantizationArgs(**activations),
            format=format_,
        )
        config = QuantizationConfig(
            config_groups={"group_0": scheme},
            format=format_,
            ignore=["lm_head"],
            quantization_status="compressed",
        )
        configs[name] = config.model_dump(mode="json")
        stored, expected = module(scheme, format_, seed)
        for end, x in stored.items():
            arrays[f"{name}/{end}"] = as_numpy(x)
        arrays[f"{name}/expected"] = expected.numpy()
    (HERE / "compressed_tensors.json").write_text(json.dumps(configs, indent=1) + "\n")
    np.savez_compressed(HERE / "compressed_tensors.npz", **arrays)

    rng = np.random.default_rng(0)
    shapes = (IN, OUT // 4), (IN // 8, OUT // 4)
    qweight, qzeros = (rng.integers(-(2**31), 2**31, s).astype(np.int32) for s in shapes)
    scales = rng.uniform(0.01, 0.1, (IN // 8, OUT * 2)).astype(np.float16)
    converter = AutoAWQConverter(group_size=8)
    of_torch = map(torch.from_numpy, (qweight, scales, qzeros))
    values, _, zero = converter._convert_gemm_module(*of_torch)
    np.savez_compressed(
        HERE / "awq.npz",
        qweight=qweight,
        qzeros=qzeros,
        scales=scales,
        values=values.numpy(),
        zero=zero.numpy(),
    )


if __name__ == "__main__":
    main()
