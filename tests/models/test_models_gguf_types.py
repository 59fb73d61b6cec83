"""The types of GGUF's tensors, each against its definition in ggml, said once more in float64."""

import numpy as np
import pytest

from sqjax.models import load

gguf = pytest.importorskip("gguf")
converted = pytest.importorskip("gguf_converted")

ROWS, LENGTH = 8, 512
#: The values of the four bits of IQ4_NL.
NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def signed(byte):
    return byte - 256 if byte > 127 else byte


def float32(block):
    return [float(np.frombuffer(bytes(block), "<f4")[0])]


def half(block, at):
    """The float16 that stands at a byte."""
    return float(np.frombuffer(bytes(block[at : at + 2]), "<f2")[0])


def nibbles(raw):
    """The low halves of some bytes, then the high ones."""
    return [byte & 15 for byte in raw] + [byte >> 4 for byte in raw]


def q4_0(block):
    return [half(block, 0) * (q - 8) for q in nibbles(block[2:])]


def q4_1(block):
    return [half(block, 0) * q + half(block, 2) for q in nibbles(block[4:])]


def q8_0(block):
    return [half(block, 0) * q for q in map(signed, block[2:])]


def iq4_nl(block):
    return [half(block, 0) * NONLINEAR[q] for q in nibbles(block[2:])]


def scale_and_least(packed, j):
    """The j-th of 8 scales of 6 bits, and of 8 minima, in 12 bytes."""
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    high = packed[j - 4] >> 6, packed[j] >> 6
    return (packed[j + 4] & 15) + 16 * high[0], (packed[j + 4] >> 4) + 16 * high[1]


def q4_k(block):
    return k_blocks(block, block[16:], None)


def q5_k(block):
    return k_blocks(block, block[48:], block[16:48])


def k_blocks(block, low, high):
    """8 blocks of 32, each with a scale and a minimum; `high` holds the fifth bits."""
    scale, least = half(block, 0), half(block, 2)
    numbers = []
    for j in range(8):
        own_scale, own_least = scale_and_least(block[4:16], j)
        for i in range(32):
            byte = low[32 * (j // 2) + i]
            q = byte >> 4 if j % 2 else byte & 15
            if high is not None:
                q += 16 * ((high[i] >> j) & 1)
            numbers.append(scale * own_scale * q - least * own_least)
    return numbers


def q6_k(block):
    """16 blocks of 16, each with a scale of 8 bits."""
    low, high = block[:128], block[128:192]
    scale, scales = half(block, 208), list(map(signed, block[192:208]))
    numbers = []
    for i in range(256):
        half_of_block, inside = divmod(i, 128)
        quarter, at = divmod(inside, 32)
        byte = low[64 * half_of_block + 32 * (quarter % 2) + at]
        q = byte >> 4 if quarter >= 2 else byte & 15
        q += 16 * ((high[32 * half_of_block + at] >> (2 * quarter)) & 3)
        numbers.append(scale * scales[i // 16] * (q - 32))
    return numbers


def bf16(block):
    return float32([0, 0, *block])


#: Type -> (numbers in a block, bytes in a block, where its float16s are, its definition).
TYPES = {
    "Q4_0": (32, 18, [0], q4_0),
    "Q4_1": (32, 20, [0, 2], q4_1),
    "Q4_K": (256, 144, [0, 2], q4_k),
    "Q5_K": (256, 176, [0, 2], q5_k),
    "Q6_K": (256, 210, [208], q6_k),
    "Q8_0": (32, 34, [0], q8_0),
    "IQ4_NL": (32, 18, [0], iq4_nl),
    "F16": (1, 2, [0], lambda block: [half(block, 0)]),
    "BF16": (1, 2, [], bf16),
    "F32": (1, 4, [], float32),
}


def random_blocks(kind, rng):
    """Any bytes, but scales that are numbers."""
    numbers, size, halves, _ = TYPES[kind]
    if kind in ("BF16", "F32"):
        values = rng.normal(size=(ROWS, LENGTH)).astype("<f4")
        return values.view(np.uint8).reshape(ROWS, LENGTH, 4)[..., -size:].reshape(ROWS, -1)
    blocks = rng.integers(0, 256, (ROWS, LENGTH // numbers, size), np.uint8)
    for at in halves:
        scales = rng.normal(size=blocks.shape[:2]).astype("<f2")
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(ROWS, -1)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """({type: stored bytes}, parameters): a model with a layer for each type."""
    rng, layers = np.random.default_rng(0), len(TYPES)
    shapes = {"token_embd": (4, ROWS), "output_norm": (ROWS,)}
    kinds, stored = {}, {}
    for i, name in enumerate(TYPES):
        shapes |= {f"blk.{i}.{part}_norm": (ROWS,) for part in ("attn", "ffn")}
        shapes |= {f"blk.{i}.attn_{part}": (ROWS, ROWS) for part in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_{part}": (LENGTH, ROWS) for part in ("gate", "up")}
        stored[name] = random_blocks(name, rng)
        raw = stored[name].view("<f4") if name == "F32" else stored[name]
        raw = raw.view("<f2") if name == "F16" else raw
        kinds[f"blk.{i}.ffn_down.weight"] = gguf.GGMLQuantizationType[name], raw
    keys = {
        "block_count": layers,
        "context_length": 16,
        "embedding_length": ROWS,
        "feed_forward_length": LENGTH,
        "attention.head_count": 1,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    weights = {f"{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("types") / "model.gguf"
    _, params = load(converted.write(path, "llama", keys, weights, kinds))
    return stored, params


@pytest.mark.parametrize("kind", TYPES)
def test_numbers_are_as_the_type_is_defined(loaded, kind):
    stored, params = loaded
    _, size, _, definition = TYPES[kind]
    blocks = stored[kind].reshape(-1, size).tolist()
    expected = np.float64([definition(block) for block in blocks]).reshape(ROWS, LENGTH)
    layer = params["model"]["layers"][str(list(TYPES).index(kind))]
    got = np.asarray(layer["mlp"]["down_proj"]["kernel"], np.float64).T
    np.testing.assert_allclose(got, expected, 0, 3e-7 * np.abs(expected).max())
    assert np.ptp(expected) > 1


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "BF16", "F16"])
def test_what_the_package_quantizes_comes_back(kind):
    values = np.random.default_rng(1).normal(size=(ROWS, LENGTH)).astype(np.float32)
    number = gguf.GGMLQuantizationType[kind]
    raw = gguf.quantize(values, number).view(np.uint8)
    _, size, _, definition = TYPES[kind]
    back = np.float64([definition(block) for block in raw.reshape(-1, size).tolist()])
    error = np.abs(back.reshape(values.shape) - values).max()
    steps = {"Q4_0": 8, "Q4_1": 15, "Q8_0": 127, "BF16": 128, "F16": 1024}
    assert error < np.ptp(values) / steps[kind]
