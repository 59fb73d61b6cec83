"""Random weights in the layouts of quantized checkpoints, written from the layouts' definitions.

Each function gives (the tensors of a module, {"values", "zero", "scale"} outputs first and in float64,
the float64 weight): w = scale * (values - zero).
"""

import ml_dtypes
import numpy as np

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def pack(codes, bits):
    """Codes from 0 on along the last axis, in int32 words, the first in the lowest bits."""
    a_word = 32 // bits
    padding = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % a_word)]
    by_word = np.pad(codes, padding).astype(np.int64).reshape(*codes.shape[:-1], -1, a_word)
    total = sum(by_word[..., i] << (bits * i) for i in range(a_word))
    return np.ascontiguousarray(total.astype(np.uint32).view(np.int32))


def _drawn(rng, shape, bits, group, zeros):
    """(codes, zero points, scales) of a weight (out, in): codes and zero points from 0 on."""
    outputs, inputs = shape
    groups = 1 if group is None else -(-inputs // group)
    codes = rng.integers(0, 2**bits, shape)
    codes[0, :2] = 0, 2**bits - 1
    zero = np.full((outputs, groups), 2 ** (bits - 1))
    if zeros:
        zero = rng.integers(0, 2**bits, (outputs, groups))
    # Powers of two times few digits: their products with codes are exact in float32.
    scale = rng.integers(1, 200, (outputs, groups)) / 4096
    return codes, zero, scale


def _known(codes, zero, scale, bits, group):
    middle = 2 ** (bits - 1)

    def spread(x):
        return np.repeat(x, group or codes.shape[1], 1)[:, : codes.shape[1]]

    weight = spread(scale) * (codes.astype(np.float64) - spread(zero))
    return {"values": codes - middle, "zero": zero - middle, "scale": scale}, weight


def awq(rng, shape, group=8, zeros=True):
    codes, zero, scale = _drawn(rng, shape, 4, group, zeros)

    def packed(x):
        by_word = x.T.reshape(x.shape[1], -1, 8)
        return pack(by_word[..., AWQ_ORDER].reshape(x.shape[1], -1), 4)

    tensors = {
        "qweight": packed(codes),
        "qzeros": packed(zero),
        "scales": np.ascontiguousarray(scale.T).astype(np.float16),
    }
    return tensors, *_known(codes, zero, scale, 4, group)


def gptq(rng, shape, group=8, bits=4, zeros=True, less=1):
    codes, zero, scale = _drawn(rng, shape, bits, group, zeros and bits == 4)
    # Zero points less 1: of a whole word at once, so that a 0 borrows from the next.
    ones = sum(less << shift for shift in range(0, 32, bits))
    words = pack(np.ascontiguousarray(zero.T), bits).view(np.uint32) - np.uint32(ones)
    tensors = {
        "qweight": np.ascontiguousarray(pack(codes, bits).T),
        "qzeros": words.view(np.int32),
        "scales": np.ascontiguousarray(scale.T).astype(np.float16),
        "g_idx": (np.arange(shape[1]) // (group or shape[1])).astype(np.int32),
    }
    return tensors, *_known(codes, zero, scale, bits, group)


def packed(rng, shape, group=8, bits=4, zeros=True):
    """compressed-tensors' "pack-quantized"."""
    codes, zero, scale = _drawn(rng, shape, bits, group, zeros)
    tensors = {
        "weight_packed": pack(codes, bits),
        "weight_scale": scale.astype(ml_dtypes.bfloat16),
        "weight_shape": np.array(shape, np.int64),
    }
    if zeros:
        words = pack(np.ascontiguousarray(zero.T), bits)
        tensors["weight_zero_point"] = np.ascontiguousarray(words.T)
    return tensors, *_known(codes, zero, scale, bits, group)


def int8(rng, shape, per_tensor=False, static=False):
    """compressed-tensors' "int-quantized"."""
    codes, zero, scale = _drawn(rng, shape, 8, None, False)
    scale = scale[:1] if per_tensor else scale
    tensors = {
        "weight": (codes - 128).astype(np.int8),
        "weight_scale": (scale[0] if per_tensor else scale).astype(np.float32),
    }
    if static:
        tensors["input_scale"] = np.array([rng.integers(1, 9) / 64], np.float32)
    return tensors, *_known(codes, zero, scale, 8, None)


def float8(rng, shape, block=None):
    """compressed-tensors' "float-quantized": a scale for each output, or for a block."""
    values = rng.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
    rows, columns = block or (1, shape[1])
    scales = -(-shape[0] // rows), -(-shape[1] // columns)
    scale = rng.integers(1, 200, scales) / 4096
    tensors = {"weight": values, "weight_scale": scale.astype(np.float32)}
    by_output = np.repeat(scale, rows, 0)[: shape[0]]
    spread = np.repeat(by_output, columns, 1)[:, : shape[1]]
    known = {"values": values.astype(np.float64), "zero": 0, "scale": by_output}
    return tensors, known, spread * values.astype(np.float64)


def compressed(format_, weights, activations=None, **others):
    """A quantization_config of compressed-tensors."""
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        **others,
    }


CHANNEL = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FLOAT = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
GROUPS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "symmetric": True}
TOKEN = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token", "symmetric": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False, "sym": False}

#: {layout: (quantization_config, what draws a weight of a shape)}; activations stay float.
LAYOUTS = {
    "awq": (AWQ, awq),
    "gptq": (GPTQ, gptq),
    "gptq_v2": (
        GPTQ | {"checkpoint_format": "gptq_v2"},
        lambda rng, shape: gptq(rng, shape, less=0),
    ),
    "gptq_symmetric": (GPTQ | {"sym": True}, lambda rng, shape: gptq(rng, shape, zeros=False)),
    "gptq_8_bits": (
        GPTQ | {"bits": 8, "group_size": -1, "sym": True},
        lambda rng, shape: gptq(rng, shape, None, 8),
    ),
    "int8": (compressed("int-quantized", CHANNEL), int8),
    "int8_tensor": (
        compressed("naive-quantized", CHANNEL | {"strategy": "tensor"}),
        lambda rng, shape: int8(rng, shape, per_tensor=True),
    ),
    "int8_packed": (
        compressed("pack-quantized", CHANNEL),
        lambda rng, shape: packed(rng, shape, None, 8, zeros=False),
    ),
    "int4": (
        compressed("pack-quantized", GROUPS),
        lambda rng, shape: packed(rng, shape, zeros=False),
    ),
    "int4_zeros": (compressed("pack-quantized", GROUPS | {"symmetric": False}), packed),
    "float8": (compressed("float-quantized", FLOAT), float8),
    "float8_blocks": (
        compressed("naive-quantized", FLOAT | {"strategy": "block", "block_structure": [8, 4]}),
        lambda rng, shape: float8(rng, shape, (8, 4)),
    ),
}
